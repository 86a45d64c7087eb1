"""Deformable convolution in 1-D, 2-D and 3-D and its transpose for PyTorch."""

__version__ = "0.1.0"

from . import adopt, ops
from .adopt import *  # noqa: F403
from .kernels.library import decompositions
from .ops import *  # noqa: F403
from .system import cuda_arch_list, cuda_version, has_ops, with_cuda

__all__ = [
    "__version__",
    "cuda_arch_list",
    "cuda_version",
    "decompositions",
    "has_ops",
    "ops",
    "with_cuda",
    *adopt.__all__,
    *ops.__all__,
]
