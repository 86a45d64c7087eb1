"""Deformable convolution in 1-D, 2-D and 3-D and its transpose for PyTorch."""

from . import ops
from .ops import *  # noqa: F403

__version__ = "0.1.0"
__all__ = ["__version__", "ops", *ops.__all__]
