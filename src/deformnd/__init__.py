"""Deformable convolution in 1-D, 2-D and 3-D and its transpose for PyTorch."""

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

# Modules that are imported when they are first asked for, since many programs need none of them.
# They are not in __all__, since `from deformnd import *` would then import them.
_LAZY = ("compat", "export", "onnx", "viz")

if TYPE_CHECKING:  # To type checkers a __getattr__ would make every name an attribute.
    from . import compat as compat
    from . import export as export
    from . import onnx as onnx
    from . import viz as viz
else:

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
