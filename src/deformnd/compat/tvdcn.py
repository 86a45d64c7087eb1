"""tvdcn's names: `import deformnd.compat.tvdcn as tvdcn` runs code written for tvdcn.

Functions, modules and their argument order are the same, and so are the state_dict keys.

Example:
    >>> import torch
    >>> import deformnd.compat.tvdcn as tvdcn
    >>> layer = tvdcn.PackedDeformConv1d(3, 16, kernel_size=5, modulated=True)
    >>> layer(torch.rand(2, 3, 128)).shape
    torch.Size([2, 16, 124])
"""

import sys as _sys

from .. import __version__, cuda_arch_list, cuda_version, has_ops, ops, with_cuda
from ..ops import *  # noqa: F403

__all__ = [
    "__version__",
    "cuda_arch_list",
    "cuda_version",
    "has_ops",
    "ops",
    "with_cuda",
    *ops.__all__,
]

# For `from deformnd.compat.tvdcn.ops import deform_conv2d`.
_sys.modules[__name__ + ".ops"] = ops
