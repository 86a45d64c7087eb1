"""What the package says about where it runs."""

from importlib import metadata

import pytest
import torch

import deformnd


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
