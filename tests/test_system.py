"""What the package says about where it runs."""

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
import types
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
    """The process as it would be with this version of Triton, or without any."""
    there = request.param and types.SimpleNamespace(__version__=request.param)
    monkeypatch.setitem(sys.modules, "triton", there)
    for function in (library._gpu, library.without_triton):
        function.cache_clear()
    yield request.param
    for function in (library._gpu, library.without_triton):
        function.cache_clear()


@pytest.mark.parametrize("triton", [None, "3.3.1"], indirect=True)
def test_without_triton_the_reference_runs_and_one_warning_says_so(triton):
    why = r"3\.4 or later.* torch 2\.8.* 3\.3\.1" if triton else "Triton cannot be imported"
    with pytest.warns(UserWarning, match=f"take the slow reference: .*{why}") as caught:
        assert library._gpu() is library._gpu() is reference
    assert len(caught) == 1
    assert "CUDA" not in library.compiled_keys()


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("triton", [None, "3.2.0", "3.4.0", "3.10.0+git1"], indirect=True)
def test_cuda_needs_a_gpu_and_triton(gpu, triton, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert deformnd.with_cuda() == (gpu and triton not in (None, "3.2.0"))
