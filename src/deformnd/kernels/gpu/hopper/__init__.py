"""The operations in Gluon for NVIDIA's Hopper (H100, H200): nothing here without Gluon.

Gluon's interface may yet change, and a Triton that it does not know has no variants here: the
portable kernels do all.
"""

from __future__ import annotations

from ..runtime import GLUON
from ..variants import Variant

FORWARD: tuple[Variant, ...] = ()
BACKWARD_ATOMIC: tuple[Variant, ...] = ()
BACKWARD_NARROW: tuple[Variant, ...] = ()
BACKWARD_SORTED: tuple[Variant, ...] = ()
BACKWARD_WEIGHT: tuple[Variant, ...] = ()
try:
    if not GLUON:
        raise ImportError("nothing to compile them with")
    from . import (
        backward_atomic,
        backward_columns,
        backward_sorted,
        backward_weight,
        forward,
        narrow,
    )
except Exception:  # whatever a changed interface raises
    pass
else:
    FORWARD = (forward.VARIANT, narrow.FORWARD)
    BACKWARD_ATOMIC = (backward_atomic.VARIANT,)
    BACKWARD_NARROW = (narrow.BACKWARD,)
    BACKWARD_SORTED = (backward_columns.VARIANT, backward_sorted.VARIANT)
    BACKWARD_WEIGHT = (backward_weight.VARIANT,)
