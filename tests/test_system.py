"""What the package says about where it runs."""

import re
import shutil
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
import torch

import deformnd
import deformnd.kernels
from deformnd import system
from deformnd.kernels import library, reference


def test_no_gpu_no_claims():
    if not torch.cuda.is_available():
        assert not deformnd.with_cuda()
        assert deformnd.cuda_version() == -1
        assert deformnd.cuda_arch_list() == []
    assert isinstance(deformnd.has_ops(), bool)


def test_version_is_the_installed_one():
    try:
        installed = metadata.version("deformnd")
    except metadata.PackageNotFoundError:
        pytest.skip("runs from the source tree, not installed")
    assert installed == deformnd.__version__


WITHOUT_CORE = """
import sys, threading, warnings
sys.path.insert(0, {folder!r})
from importlib.machinery import PathFinder
sys.meta_path.insert(0, PathFinder)  # before the finder of an editable install
warnings.simplefilter("always")
seen = []
warnings.showwarning = lambda message, *rest: seen.append(str(message))
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
import deformnd
from deformnd.kernels import library

assert deformnd.__file__.startswith({folder!r}) and not deformnd.has_ops()
assert "CPU" not in library.compiled_keys()
said = lambda: [message for message in seen if message.startswith("deformnd")]

layer = deformnd.PackedDeformConv2d(3, 4, 3, padding=1)
layer.to("meta")(torch.rand(1, 3, 8, 8, device="meta"))
with FakeTensorMode():
    deformnd.PackedDeformConv2d(3, 4, 3, padding=1)(torch.rand(1, 3, 8, 8))
torch.export.export(deformnd.PackedDeformConv2d(3, 4, 3), (torch.rand(1, 3, 8, 8),))
scripted = torch.jit.script(deformnd.PackedDeformConvTranspose3d(2, 4, 3))
try:
    scripted(torch.rand(1, 5, 4, 4, 4))
except Exception:
    pass
else:
    raise AssertionError("5 channels were taken for 2")
assert not said(), said()

call = lambda: scripted(torch.rand(1, 2, 4, 4, 4)).sum().backward()
call()
worker = threading.Thread(target=call)
worker.start()
worker.join()
deformnd.PackedDeformConv1d(2, 4, 3)(torch.rand(1, 2, 9)).sum().backward()
(message,) = said()
print(message)
"""


def test_without_the_core_the_first_cpu_call_says_so_once(tmp_path):
    package = Path(deformnd.__file__).parent
    ignore = shutil.ignore_patterns("__pycache__", "_core.*")
    shutil.copytree(package, tmp_path / "deformnd", ignore=ignore)
    code = WITHOUT_CORE.format(folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert "slow" in done.stdout and "CPU tensors" in done.stdout
    assert "Install a C++17 compiler and reinstall deformnd" in done.stdout


def test_submodules_are_imported_when_they_are_asked_for():
    code = """
import sys
import deformnd
heavy = ("onnx", "onnxscript", "onnxruntime", "openvino", "matplotlib", "torchvision", "mmcv")
ours = ("deformnd.onnx", "deformnd.viz", "deformnd.compat.counters", "deformnd.compat.tvdcn")
assert not {"torch.onnx", *heavy, *ours} & set(sys.modules) - before
assert {"onnx", "viz", "compat", "adopt", "ops", "deform_conv2d"} <= set(dir(deformnd))
assert {"counters", "mmcv", "torch_pruning", "torchvision", "tvdcn"} <= set(dir(deformnd.compat))
assert callable(deformnd.onnx.export) and callable(deformnd.viz.steps)
assert callable(deformnd.adopt.convert) and deformnd.compat.tvdcn.PackedDeformConv2d
assert callable(deformnd.compat.torchvision.accelerate)
assert callable(deformnd.compat.mmcv.accelerate)
assert deformnd.compat.counters.__name__ == "deformnd.compat.counters"
assert callable(deformnd.compat.torch_pruning.with_packed)
assert not set(heavy) & set(sys.modules)
for module in (deformnd, deformnd.compat):
    try:
        module.nothing
    except AttributeError as error:
        assert str(error) == f"module {module.__name__!r} has no attribute 'nothing'"
    else:
        raise AssertionError
"""
    code = "import sys, torch; before = set(sys.modules)\n" + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.returncode, done.stderr


@pytest.fixture
def triton(request, monkeypatch):
    """The process as it would be with this version of Triton, or without any ("": a folder of that
    name). Its kernels can be imported, unless the version ends in "!"."""
    there = types.SimpleNamespace(__version__=request.param.strip("!")) if request.param else None
    monkeypatch.setitem(
        sys.modules, "triton", types.SimpleNamespace() if request.param == "" else there
    )
    gpu = None if (request.param or "").endswith("!") else types.ModuleType("gpu")
    monkeypatch.setitem(sys.modules, "deformnd.kernels.gpu", gpu)
    monkeypatch.delattr(deformnd.kernels, "gpu", raising=False)
    monkeypatch.setattr(library, "_BACKENDS", [*library._BACKENDS[:1], ("CUDA", library._gpu)])
    for function in (library._gpu, library.without_triton):
        function.cache_clear()
    yield request.param
    for function in (library._gpu, library.without_triton):
        function.cache_clear()


WITHOUT = {
    None: "Triton cannot be imported",
    "": "Triton is not installed",
    "3.3.1": r"3\.4 or later.* torch 2\.8 and later.* 3\.3\.1",
    "4.0!": r"the kernels do not fit Triton 4\.0",
}


@pytest.mark.parametrize("triton", list(WITHOUT), indirect=True)
def test_without_triton_the_reference_runs_and_one_warning_says_so(triton):
    why = f"slow.*reference.*{WITHOUT[triton]}"
    with pytest.warns(UserWarning, match=f"take the {why}") as caught:
        assert library._gpu() is library._gpu() is reference
    assert len(caught) == 1
    assert library.compiled_keys() == []
    assert re.search(WITHOUT[triton], system._gpu_kernels(0))


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("triton", [None, "3.2.0", "3.4.0", "3.10.0+git1"], indirect=True)
def test_cuda_needs_a_gpu_and_triton(gpu, triton, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert deformnd.with_cuda() == (gpu and triton not in (None, "3.2.0"))
    assert library.compiled_keys() == (["CUDA"] if triton not in (None, "3.2.0") else [])


@pytest.mark.parametrize(
    ("there", "capability"), [(False, (9, 0)), (True, (9, 0)), (False, (8, 0))]
)
def test_info_says_where_kernels_for_hopper_are_missing(there, capability, monkeypatch):
    hopper = pytest.importorskip("deformnd.kernels.gpu.hopper")
    monkeypatch.setattr(hopper, "FORWARD", ("a variant",) * there)
    monkeypatch.setattr(library, "without_triton", lambda: "")
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    missing = not there and capability == (9, 0)
    assert system._gpu_kernels(0).endswith("need Triton 3.6 or later") == missing
