"""The operations in Gluon for NVIDIA's Hopper (H100, H200). Without Gluon there are none here.

Gluon's interface may still change. With a Triton whose Gluon does not fit these files there are no
variants here either, and the portable kernels do everything.
"""

from __future__ import annotations

from ..runtime import GLUON
from ..variants import Variant

FORWARD_FIRST: tuple[Variant, ...] = ()
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
        product,
    )
except Exception:  # a changed interface may raise anything
    pass
else:
    FORWARD_FIRST = (product.FIRST,)
    FORWARD = (forward.VARIANT, narrow.FORWARD, product.VARIANT)
    BACKWARD_ATOMIC = (backward_atomic.VARIANT,)
    BACKWARD_NARROW = (narrow.BACKWARD,)
    BACKWARD_SORTED = (backward_columns.VARIANT, backward_sorted.VARIANT)
    BACKWARD_WEIGHT = (backward_weight.VARIANT,)
