"""The ways to do an operation: the first variant that takes the call and can be built does it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .layout import Call
from .prepare import Order
from .runtime import Launch
from .tiles import SMALLEST


class Variant(NamedTuple):
    """A way to do an operation, on some devices for some calls."""

    name: str
    takes: Callable[[Call], bool]
    write: Callable[..., None]  # adds its launches to the call's plan
    wants_parts: bool = False  # whether it reads points as parts in "bf16x3", not as rows
    order: Order = Order.PLAIN  # the order in which it wants the weight's channels
    others: tuple[str, ...] = ()  # the names of its other kernels
    together: bool = False  # whether it takes lists of all taps together (backward_sorted.py)


def portable(
    name: str, write: Callable[..., None], wants_parts: bool = False
) -> tuple[Variant, Variant]:
    """The variants of a portable kernel, which take every call on every GPU: with the device's
    tiles, and with the smallest."""
    smallest = functools.partial(write, tiles=SMALLEST)
    return (
        Variant(name, _any, write, wants_parts),
        Variant(name + ", small", _any, smallest, wants_parts),
    )


def _any(call: Call) -> bool:
    return True


# The variants that could not be built here, as (name, architecture, dtype, precision, rank).
BROKEN: set[tuple[Any, ...]] = set()


def choose(variants: Sequence[Variant], call: Call) -> Variant | None:
    """The first variant that takes the call and has not failed to build."""
    return next((v for v in variants if _key(v, call) not in BROKEN and v.takes(call)), None)


def write(variants: Sequence[Variant], call: Call, *args: Any) -> None:
    """Add an operation to the call's plan. The last variant does it if no other can."""
    variant = choose(variants, call) or variants[-1]
    steps, spares = len(call.plan.steps), len(call.plan.spares)
    variant.write(call, *args)
    for launch in (*call.plan.steps[steps:], *call.plan.spares[spares:]):
        # The last variant has another name than its kernel, and so no fallback: nothing can stand
        # in for it.
        if launch.name in (variant.name, *variant.others):
            launch.fallback = _key(variant, call)


def give_up(failures: dict[Launch, Exception]) -> None:
    """Leave out the variants whose kernels cannot be built, and say so once. Raise the failure of a
    kernel that nothing can stand in for."""
    for launch, failure in failures.items():
        if launch.fallback is None:
            raise failure
        if launch.fallback not in BROKEN:
            BROKEN.add(launch.fallback)
            warnings.warn(f"{failure}; a slower one does its work", stacklevel=2)


def _key(variant: Variant, call: Call) -> tuple[Any, ...]:
    return variant.name, call.architecture, call.dtype, call.precision, len(call.g.kernel)
