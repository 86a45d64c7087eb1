"""What users call: the functions, the mask activations and the modules."""

from . import attention, functional, fusing, lazy, masks, modules
from .attention import *  # noqa: F403
from .functional import *  # noqa: F403
from .fusing import *  # noqa: F403
from .lazy import *  # noqa: F403
from .masks import *  # noqa: F403
from .modules import *  # noqa: F403

__all__ = [
    *functional.__all__,
    *masks.__all__,
    *modules.__all__,
    *fusing.__all__,
    *lazy.__all__,
    *attention.__all__,
]
