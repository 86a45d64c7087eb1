"""What the README and docs/ say: every Python block and `deformnd` command runs, a page in its
order, tables are those of the results, links lead somewhere, and the site is complete.

Commands that install something are left to .ci/run, which runs the README's.

    DEFORMND_PICTURES=docs/pictures pytest tests/test_docs.py

also keeps what they draw, which is how the pictures in docs/pictures are made.
"""

import html
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

import deformnd
import deformnd.onnx
import engines
from deformnd import cli, viz

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
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
    # Those of speed are made by benchmarks/plot.py.
    shown = set(re.findall(r"\(pictures/(?!speed_)([\w.-]+)\)", text))
    assert left_out or shown <= drawn
    if os.environ.get("DEFORMND_PICTURES"):
        for name in shown & drawn:
            shutil.copy(tmp_path / name, ROOT / os.environ["DEFORMND_PICTURES"])
    if left_out:
        pytest.skip("; ".join(left_out))


def test_pages_are_many():
    assert len(PAGES) > 8 and sum(len(BLOCK.findall(p.read_text())) for p in PAGES) > 20


def test_the_readme_is_short():
    assert sum(bool(re.search(r"\w", word)) for word in PAGES[0].read_text().split()) <= 900


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    if not (ROOT / "CONTRIBUTING.md").exists():
        pytest.skip("not a checkout: the files that the README links are not here")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_contributing_maps_every_folder():
    if not (ROOT / "CONTRIBUTING.md").exists():
        pytest.skip("not a checkout")
    text = (ROOT / "CONTRIBUTING.md").read_text()
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a git checkout")
    folders = {folder for file in files.stdout.split() for folder in Path(file).parents}
    unnamed = {f for f in folders - {Path()} if not re.search(rf"\b{f.name.lstrip('.')}/", text)}
    assert not unnamed


@pytest.mark.parametrize("page", ["README.md", "docs/speed.md"])
def test_tables_of_speed_are_those_of_the_results(page):
    script = ROOT / "benchmarks" / "plot.py"
    if not script.exists():
        pytest.skip("not a checkout: the results are not here")
    text = (ROOT / page).read_text()
    assert "<!-- table " in text
    # Run `python benchmarks/plot.py` where they differ.
    assert runpy.run_path(str(script))["filled"](text) == text


def test_table_of_engines_is_that_of_the_results():
    assert engines.table(json.loads(engines.RESULTS.read_text())) in engines.PAGE.read_text()


# The rows of docs/pytorch.md, and the tests of each.
CLAIMS = {
    "`torch.compile`": "test_library.py::test_compile "
    "test_torch.py::test_no_graph_break_in_any_module",
    "dynamic sizes": "test_torch.py::test_no_recompilation_for_another_size",
    "CUDA graphs": "test_torch.py::test_compile_reduce_overhead "
    "test_torch.py::test_cuda_graph_of_forward_and_backward",
    "`torch.export`": "test_library.py::test_export_with_dynamic_sizes",
    "AOTInductor": "test_torch.py::test_aot_inductor "
    "test_torch.py::test_decompositions_of_an_exported_program",
    "`torch.fx`, `torch.jit.trace`": "test_torch.py::test_fx_of_the_functions "
    "test_torch.py::test_trace_of_sizes_from_shapes",
    "TorchScript": "test_modules.py::test_torchscript_saved_loaded_run_and_differentiated",
    "`torch.func`": "test_library.py::test_vmap "
    "test_torch.py::test_second_derivatives_of_torch_func_agree "
    "test_torch.py::test_per_sample_gradients_of_a_network",
    "forward mode": "test_torch.py::test_forward_mode_is_the_adjoint_of_backward",
    "derivatives of any order": "test_library.py::test_numeric_derivatives "
    "test_library.py::test_third_derivative test_torch.py::test_cuda_numeric_derivatives",
    "autocast, GradScaler": "test_library.py::test_autocast "
    "test_torch.py::test_autocast_and_grad_scaler",
    "determinism": "test_torch.py::test_deterministic",
    "channels_last": "test_torch.py::test_channels_last_is_not_copied",
    "switches": "test_torch.py::test_threads_are_torchs test_torch.py::test_cuda_tf32_switch",
    "streams, devices": "test_torch.py::test_cuda_streams "
    "test_torch.py::test_cuda_device_that_is_not_current",
    "FLOP counter": "test_torch.py::test_flop_counter_counts_the_products_of_the_convolution",
    "DDP, FSDP2": "test_distributed.py::test_two_processes",
    "DTensor": "test_distributed.py::test_two_processes",
    "activation checkpointing": "test_torch.py::test_activation_checkpointing",
    "`weight_norm`, `parametrize`": "test_torch.py::test_weight_norm_and_parametrize",
    "BatchNorm": "test_torch.py::test_batch_norm_fused",
    "meta device": "test_torch.py::test_meta_construction test_torch.py::test_fake_tensors",
    "lazy modules": "test_torch.py::test_lazy_modules",
    "pickle, deepcopy, hooks": "test_modules.py::test_copies_pickles_and_hooks",
}


def test_every_claim_about_pytorch_has_a_test():
    rows = re.findall(r"^\| (.+?) \|", (DOCS / "pytorch.md").read_text(), re.MULTILINE)
    assert rows == ["tool", *CLAIMS]
    for test in " ".join(CLAIMS.values()).split():
        file, name = test.split("::")
        source = (Path(__file__).parent / file).read_text()
        assert re.search(rf"^def {name}\(", source, re.MULTILINE), test


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; that it is built without a warning is a part of the README's command."""
    for package in ("sphinx", "furo", "myst_parser", "sphinx_copybutton"):
        pytest.importorskip(package)
    out = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "-m", "sphinx", "-q", str(DOCS), str(out)], check=True)
    return out


def test_each_page_is_once_in_the_sidebar(site):
    text = (site / "index.html").read_text()
    tree = text[text.index('class="sidebar-tree"') : text.index("</aside>")]
    links = [html.unescape(link) for link in re.findall(r'href="([^"#]+)"', tree)]
    pages = {str(p.relative_to(DOCS).with_suffix(".html")) for p in DOCS.rglob("*.md")}
    assert sorted(links) == sorted(pages - {"index.html"})


def test_every_public_name_is_in_the_reference(site):
    listed = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    found = set(re.findall(r"^(\S+) py:", listed, re.MULTILINE))
    wanted = {f"deformnd.{name}" for name in deformnd.__all__} - {
        "deformnd.__version__",
        "deformnd.ops",
    }
    modules = ["compat.torchvision", "compat.mmcv", "compat.counters", "compat.torch_pruning"]
    modules += ["compat.internimage", "compat.transformers", "export"]
    for module in (
        viz,
        deformnd.onnx,
        *(importlib.import_module(f"deformnd.{m}") for m in modules),
    ):
        wanted |= {f"{module.__name__}.{name}" for name in module.__all__}
    assert not wanted - found
    assert "deformnd.compat.tvdcn" in found
