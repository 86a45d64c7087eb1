"""What the package says about where it runs."""

import torch

import deformnd


def test_no_gpu_no_claims():
    if not torch.cuda.is_available():
        assert not deformnd.with_cuda()
        assert deformnd.cuda_version() == -1
        assert deformnd.cuda_arch_list() == []
    assert isinstance(deformnd.has_ops(), bool)


def test_version_is_the_installed_one():
    from importlib.metadata import version

    assert version("deformnd") == deformnd.__version__
