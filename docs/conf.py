"""The documentation site: `sphinx-build -W docs build/docs`."""

import re

import deformnd

project = "deformnd"
author = "the deformnd developers"
copyright = author
version = release = deformnd.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
html_theme = "furo"
html_title = f"deformnd {version}"
exclude_patterns = ["pictures"]
myst_heading_anchors = 3
napoleon_custom_sections = [("References", "notes_style")]
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say shapes and units, too
copybutton_prompt_text = r">>> |\.\.\. "  # not a part of what is copied
copybutton_prompt_is_regexp = True


def _plain(app, what, name, obj, options, lines):
    """Docstrings are plain text: a shape's *size is no emphasis, a `name` is code.

    "first ... last" in a list of arguments is one name, or napoleon takes the first for a type.
    """
    lines[:] = [re.sub(r"^(\s+\w+) \.\.\. (?=\w)", r"\1…", line) for line in lines]
    lines[:] = [
        re.sub(
            r"(?<!`)`([^`]+)`(?!`)", r"``\1``", re.sub(r"(?<![*\w`])([*|])(?=\w)", r"\\\1", line)
        )
        for line in lines
    ]


def _signature(app, what, name, obj, options, signature, returned):
    """Layers take **unknown to refuse it by name: that is no argument to offer."""
    return (signature or "").replace(", **unknown", "") or signature, returned


def setup(app):
    app.connect("autodoc-process-docstring", _plain, priority=100)  # before napoleon
    app.connect("autodoc-process-signature", _signature)
