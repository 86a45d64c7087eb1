"""How the operators run on DTensors: which shardings of their tensors need no communication.

Where tensors are sharded in another way, torch.distributed.tensor brings them to the cheapest of
these first.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .geometry import FAMILIES, Family, Slots

# One sharding: the placements of output, input, weight, offset, mask and bias.
_Placements = tuple[Any, ...]


# Families that DTensor does not know yet. It is told of them once somebody else has imported it,
# since the import takes 0.5 s.
unknown = list(FAMILIES)
_failure = ""  # Why DTensor could not be told.


def register() -> None:
    """Tell DTensor about the operators and their backwards; imports torch.distributed.tensor.

    This needs private parts of DTensor, and where they are missing DTensors are refused: by the
    public part alone, DTensor would give a call the cached output shape of one with other strides.
    """
    global _failure
    try:
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor.experimental import register_sharding

        infos: Any = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
        while unknown:
            family = unknown.pop()
            for suffix, rule in (("", _forward), ("_backward", _backward)):
                operator = getattr(torch.ops.deformnd, family.name + suffix).default
                register_sharding(operator)(_checked(rule, family))
                # The output's shape depends on stride and the like, so they must be part of the
                # key by which DTensor caches it. (register_sharding takes only what comes from the
                # first int on, which is groups.)
                static = family.tensors if rule is _forward else 1 + family.saved
                infos[operator] = dataclasses.replace(infos[operator], static_argnum=static)
    except (AttributeError, ImportError, KeyError, TypeError) as failure:
        unknown.clear()
        _failure = f"deformnd: this torch's DTensor cannot run deformnd's operators ({failure})"
        warnings.warn(_failure, stacklevel=2)


def _checked(rule: Callable[..., Any], family: Family) -> Callable[..., Any]:
    def checked(*args: Any) -> Any:
        if _failure:
            raise NotImplementedError(_failure)
        return rule(family, *args)

    return checked


def _shardings(
    family: Family, tensors: Slots, parameters: Sequence[Any]
) -> tuple[_Placements, list[_Placements]]:
    """The sharding with all tensors replicated, and a list of all other possible ones."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    _, weight, offset, mask, _ = tensors
    whole, total = Replicate(), Partial()
    found: list[_Placements] = [(Shard(0), Shard(0), whole, Shard(0), Shard(0), whole)]
    kernel = weight.shape[2:] if family.weighted else parameters[0]
    n, points = len(kernel), math.prod(kernel)
    # Offset and mask are by groups of image channels: of the input, or of the transposed output.
    # Where image channels are sharded, offset and mask fit each part only if there is one group.
    one_group = (offset is None or offset.shape[1] == n * points) and (
        mask is None or mask.shape[1] == points
    )
    if not family.weighted:
        if one_group:
            found.append((Shard(1), Shard(1), whole, whole, whole, whole))
    elif parameters[-1] == 1:  # groups
        transposed = family.transposed
        out_channels, in_channels = (1, 0) if transposed else (0, 1)  # of weight
        if not transposed or one_group:
            found.append((Shard(1), whole, Shard(out_channels), whole, whole, Shard(0)))
        if transposed or one_group:
            found.append((total, Shard(1), Shard(in_channels), whole, whole, total))
    return (whole,) * 6, found


def _forward(family: Family, *args: Any) -> list[tuple[list[Any], list[Any]]]:
    tensors, parameters = args[: family.tensors], args[family.tensors :]
    replicated, others = _shardings(family, family.slots(tensors), parameters)
    return [
        ([output], _given(tensors, family.own(inputs)) + [None] * len(parameters))
        for output, *inputs in (replicated, *others)
    ]


def _backward(family: Family, *args: Any) -> list[tuple[list[Any], list[Any]]]:
    tensors, (*parameters, needs) = args[: 1 + family.saved], args[1 + family.saved :]
    slots = family.slots(tensors[1:])
    needs = family.slots(needs)
    needs = [n and (i == 4 or slots[i] is not None) for i, n in enumerate(needs)]
    replicated, others = _shardings(family, slots, parameters)
    found = []
    for placements in (replicated, *others):
        # A gradient is sharded as its tensor is. Where the tensor is whole on each device and the
        # work is not, each device has a part of the gradient's sum.
        grads = [p if placements is replicated else _dual(p) for p in placements]
        inputs = [grads[0], *family.own(placements[1:5])]
        outputs = [g if need else None for g, need in zip(grads[1:], needs, strict=True)]
        rest: list[Any] = [None] * (len(parameters) + 1)
        found.append((list(family.own(outputs)), _given(tensors, inputs) + rest))
    return found


def _given(tensors: Sequence[Any], placements: Sequence[Any]) -> list[Any]:
    return [None if t is None else p for t, p in zip(tensors, placements, strict=True)]


def _dual(placement: Any) -> Any:
    from torch.distributed.tensor import Partial, Replicate

    if placement.is_replicate():
        return Partial()
    return Replicate() if placement.is_partial() else placement
