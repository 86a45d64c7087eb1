"""Every Python block and `deformnd` command of the README and docs/ runs, a page in its order.

Commands that install something are left to .ci/run, which runs the README's.

    DEFORMND_PICTURES=docs/pictures pytest tests/test_docs.py

also keeps what they draw, which is how the pictures in docs/pictures are made.
"""

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from deformnd import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def run(language: str, text: str, line: int, page: Path, names: dict[str, object]) -> None:
    if language == "python":
        exec(compile("\n" * line + text, str(page), "exec"), names)
        return
    for command in text.splitlines():
        if command.startswith("deformnd "):
            absent = "--device cuda" in command and not torch.cuda.is_available()
            arguments = shlex.split(command, comments=True)[1:]
            assert cli.main(arguments) == (2 if absent else 0), command


@pytest.mark.parametrize(
    "page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=lambda page: page.name
)
def test_blocks_run(page, tmp_path, monkeypatch):
    text = page.read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "__main__"}
    left_out = []
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start()) + 1
        try:
            run(block[1], block[2], line, page, names)
        except ImportError as error:
            missing = re.search(r"No module named '?([\w.]+)|(\w+) is not installed", str(error))
            if not missing or missing[0].startswith("No module named 'deformnd"):
                raise
            left_out.append(f"line {line}: {error}")
        except NameError as error:
            if not left_out:
                raise
            left_out.append(f"line {line}: {error}, after one that could not run")
    drawn = {path.name for path in tmp_path.iterdir() if path.suffix in (".png", ".gif")}
    shown = set(re.findall(r"\(pictures/([\w.-]+)\)", text))
    assert left_out or shown <= drawn
    if os.environ.get("DEFORMND_PICTURES"):
        for name in shown & drawn:
            shutil.copy(tmp_path / name, ROOT / os.environ["DEFORMND_PICTURES"])
    if left_out:
        pytest.skip("; ".join(left_out))


def test_pages_are_many():
    assert len(PAGES) > 8 and sum(len(BLOCK.findall(p.read_text())) for p in PAGES) > 20


def test_the_tests_the_readme_names_exist():
    cited = re.findall(r"(?:(test_\w+\.py))?::(test_\w+)", PAGES[0].read_text())
    assert cited
    file = ""
    for name, test in cited:
        file = name or file
        source = (Path(__file__).parent / file).read_text()
        assert re.search(rf"^def {test}\(", source, re.MULTILINE), f"{file}::{test}"
