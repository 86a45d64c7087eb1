"""The documentation site: `sphinx-build -W docs build/docs`."""

import re

import deformnd

project = "deformnd"
author = "the deformnd developers"
copyright = author
version = release = deformnd.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"deformnd {version}"
exclude_patterns = ["pictures"]
myst_heading_anchors = 3
napoleon_custom_sections = [("References", "notes_style")]
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say shapes and units, too
autodoc_class_signature = "separated"


def _plain(app, what, name, obj, options, lines):
    """Docstrings are plain text: a shape's *size is no emphasis, a `name` is code."""
    lines[:] = [
        re.sub(
            r"(?<!`)`([^`]+)`(?!`)", r"``\1``", re.sub(r"(?<![*\w`])([*|])(?=\w)", r"\\\1", line)
        )
        for line in lines
    ]


def setup(app):
    app.connect("autodoc-process-docstring", _plain, priority=100)  # before napoleon
