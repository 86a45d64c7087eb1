"""What can run here. The names are tvdcn's; the answers are this package's."""

from __future__ import annotations

import importlib.util

import torch

from .kernels import cpu


def has_ops() -> bool:
    """Whether the compiled CPU core is present.

    Without it every operator still works, on the slower reference.

    Example:
        >>> import deformnd
        >>> isinstance(deformnd.has_ops(), bool)
        True
    """
    return cpu.available()


def with_cuda() -> bool:
    """Whether GPU kernels run on CUDA (and ROCm) tensors: a GPU is there, and Triton.

    The kernels are Triton programs, compiled for the device at their first call; they need no
    CUDA toolkit, and none is used to build this package. Without Triton such tensors take the
    slow reference.

    Example:
        >>> import deformnd
        >>> isinstance(deformnd.with_cuda(), bool)
        True
    """
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def cuda_version() -> int:
    """The CUDA version that the GPU kernels use: torch's own, as major * 1000 + minor * 10.

    -1 where with_cuda() is False. There is no version that the package was built with, since
    Triton compiles for the device at hand.

    Example:
        >>> import deformnd
        >>> deformnd.cuda_version() == -1 or deformnd.with_cuda()
        True
    """
    if not with_cuda() or torch.version.cuda is None:
        return -1
    major, minor = torch.version.cuda.split(".")[:2]
    return int(major) * 1000 + int(minor) * 10


def cuda_arch_list() -> list[str]:
    """Compute capabilities of the devices present, for which Triton compiles, such as ['9.0'].

    Empty where with_cuda() is False.

    Example:
        >>> import deformnd
        >>> bool(deformnd.cuda_arch_list()) == deformnd.with_cuda()
        True
    """
    if not with_cuda():
        return []
    devices = range(torch.cuda.device_count())
    found = {torch.cuda.get_device_capability(d) for d in devices}
    return [f"{major}.{minor}" for major, minor in sorted(found)]
