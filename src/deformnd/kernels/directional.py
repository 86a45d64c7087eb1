"""Derivatives along a direction, composed of the operators themselves.

Note [directions]
An operator y(input, weight, offset, mask) is linear in input, weight and mask, so its derivative
along a direction (d_input, d_weight, d_offset, d_mask) is

    y(d_input, ...) + y(..., d_weight, ...) + y(..., d_mask) + the part along d_offset.

Interpolation is linear along each axis of a cell, so the last part is, for each axis, the value
on the cell's upper side minus that on its lower side, times d_offset there: y with that axis
of the offset rounded up or down, and the mask multiplied by d_offset or -d_offset.

Forward-mode differentiation is this sum. The second derivative is its gradient: the backward
operator, applied to the same terms. Both run on whatever kernels the operators have, need
little more memory than these, and are differentiable in turn, to any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .geometry import Geometry

# (input, weight, offset, mask), or a derivative by each of them.
Tensors = Sequence["Tensor | None"]


def tangent(
    operator: Callable[..., Tensor], g: Geometry, tensors: Tensors, direction: Tensors
) -> Tensor | None:
    """The derivative of operator(*tensors) along a direction; None stands for zero in both."""
    total: Tensor | None = None
    tensors, direction = _wide(tensors, direction)
    for _, moved in _linear_terms(tensors, direction):
        total = plus(total, operator(*moved))
    for term in _offset_terms(g, tensors, direction):
        total = plus(total, operator(*term.tensors))
    return total


def gradients(
    backward: Callable[..., Sequence[Tensor | None]],
    g: Geometry,
    grad_output: Tensor,
    tensors: Tensors,
    direction: Tensors,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of <grad_output, tangent(...)> by the tensors, None where not needed or zero.

    backward(grad_output, *tensors, needs) gives the gradients of <grad_output, operator(*tensors)>.
    """
    total: list[Tensor | None] = [None] * 4
    if not any(needs):
        return total
    likes = tensors
    tensors, direction = _wide(tensors, direction)
    assert tensors[0] is not None
    grad_output = grad_output.to(tensors[0].dtype)
    for fixed, moved in _linear_terms(tensors, direction):
        needed = [need and i != fixed for i, need in enumerate(needs)]
        if any(needed):
            for i, grad in enumerate(backward(grad_output, *moved, needed)[:4]):
                total[i] = plus(total[i], grad)
    for term in _offset_terms(g, tensors, direction):
        grads = list(backward(grad_output, *term.tensors, needs)[:4])
        if grads[2] is not None:
            grads[2] = term.offset_gradient(g, grads[2])
        if grads[3] is not None:
            grads[3] = term.mask_gradient(g, grads[3])
        total = [plus(a, b) for a, b in zip(total, grads, strict=True)]
    return [
        None if t is None or like is None else t.to(like.dtype)
        for t, like in zip(total, likes, strict=True)
    ]


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _wide(tensors: Tensors, direction: Tensors) -> tuple[Tensors, Tensors]:
    """All tensors in one dtype, float32 at least, since differences in half lose too much."""
    dtype = torch.float32
    for t in tensors:
        if t is not None:
            dtype = torch.promote_types(dtype, t.dtype)

    def wide(ts: Tensors) -> Tensors:
        return [None if t is None else t.to(dtype) for t in ts]

    return wide(tensors), wide(direction)


def _linear_terms(tensors: Tensors, direction: Tensors) -> Iterator[tuple[int, Tensors]]:
    """For each tensor in which the operator is linear: its index, and all with it replaced."""
    for i in (0, 1, 3):
        if direction[i] is not None and tensors[i] is not None:
            yield i, [direction[j] if j == i else t for j, t in enumerate(tensors)]


class _OffsetTerm:
    """One side of the cells along one axis: y(input, weight, snapped offset, mask * factor)."""

    def __init__(self, tensors: Tensors, axis: int, snapped: Tensor, factor: Tensor) -> None:
        input, weight, _, mask = tensors
        self.axis, self.factor, self.has_mask = axis, factor, mask is not None
        if mask is not None:
            factor = _regroup(mask.unflatten(1, (-1, factor.shape[2])), factor.shape[1]) * factor
        self.tensors = (input, weight, snapped, factor.flatten(1, 2))

    def offset_gradient(self, g: Geometry, grad: Tensor) -> Tensor:
        """The gradient by the offset: zero along the snapped axis, where nothing depends on it."""
        n = len(g.kernel)
        axes = torch.arange(n, device=grad.device).view(-1, *[1] * n)
        split = grad.unflatten(1, (g.offset_groups, -1, n))
        return torch.where(axes == self.axis, 0.0, split).flatten(1, 3)

    def mask_gradient(self, g: Geometry, grad: Tensor) -> Tensor | None:
        if not self.has_mask:
            return None
        split: Tensor = grad.unflatten(1, tuple(self.factor.shape[1:3])) * self.factor
        split = split.unflatten(1, (g.mask_groups, -1)).sum(2)
        return split.flatten(1, 2)


def _offset_terms(g: Geometry, tensors: Tensors, direction: Tensors) -> Iterator[_OffsetTerm]:
    offset, along = tensors[2], direction[2]
    if offset is None or along is None:
        return
    n, points = len(g.kernel), math.prod(g.kernel)
    groups = math.lcm(g.offset_groups, max(g.mask_groups, 1))
    split = (g.offset_groups, points, n)
    axes = offset.unflatten(1, split).unbind(3)  # n times [B, OG, K, *point_size]
    for a, factor in enumerate(along.unflatten(1, split).unbind(3)):
        factor = _regroup(factor, groups)
        floor = axes[a].floor()
        for side, signed in ((floor + 1, factor), (floor, -factor)):
            snapped = torch.stack([*axes[:a], side, *axes[a + 1 :]], 3).flatten(1, 3)
            yield _OffsetTerm(tensors, a, snapped, signed)


def _regroup(t: Tensor, groups: int) -> Tensor:
    """Repeat each group of [B, G, ...] until there are `groups`, a multiple of G."""
    repeat = groups // t.shape[1]
    return t.unsqueeze(2).expand(-1, -1, repeat, *t.shape[2:]).flatten(1, 2)
