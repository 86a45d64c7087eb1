import os
import sys
from pathlib import Path

import pytest

# OpenMP's threads sleep while they wait, since spinning they would keep the processor that another
# worker of these tests needs. This must be set before torch loads OpenMP, and processes that tests
# start inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# What torch.compile has kept of an earlier run would have the strides that our fakes gave then.
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

sys.path.insert(0, str(Path(__file__).parent))  # cases.py, brute_force.py


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skip a test in which torch.compile finds no compiler, as in tests/wheel.sh."""
    try:
        return (yield)
    except Exception as error:
        if "InvalidCxxCompiler" in f"{type(error)} {error}":
            pytest.skip("torch.compile finds no C++ compiler here")
        raise


@pytest.fixture(scope="module")
def torchvision_operator():
    """torchvision's deform_conv2d, or, where that is not installed, one that computes as ours."""
    import torch

    import deformnd

    try:
        import torchvision as torchvision
    except (ImportError, RuntimeError):  # RuntimeError: of another build of torch
        library = torch.library.Library("torchvision", "DEF")
        library.define(
            "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, "
            "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, "
            "SymInt dilation_w, SymInt groups, SymInt offset_groups, bool use_mask) -> Tensor"
        )

        def call(x, weight, offset, mask, bias, *p):
            stride, padding, dilation, groups, use_mask = p[:2], p[2:4], p[4:6], p[6], p[8]
            mask = mask if use_mask else None
            return deformnd.deform_conv2d(
                x, weight, offset, mask, bias, stride, padding, dilation, groups
            )

        def fake(x, weight, offset, *rest):
            return x.new_empty(x.shape[0], weight.shape[0], *offset.shape[2:])

        library.impl("deform_conv2d", call, "CPU")
        torch.library.register_fake("torchvision::deform_conv2d", fake, lib=library)
        yield torch.ops.torchvision.deform_conv2d
        library._destroy()
    else:
        yield torch.ops.torchvision.deform_conv2d
