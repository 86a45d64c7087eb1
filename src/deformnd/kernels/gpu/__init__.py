"""The operators on CUDA and ROCm tensors, by Triton: the same functions as those of reference.py.

Tensors of float64 take the reference. What a call does is written down in a plan (strategy.py),
once for all calls that are alike. docs/gpu.md says how a call goes through these files.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import autograd, direct, reference
from ..geometry import Attention, Geometry, memory_format
from . import attention, strategy
from .layout import allows_tf32
from .runtime import GIVEN, Buffer, Launch, Plan, ahead


def gather(
    g: Geometry,
    image: Tensor,
    weight: Tensor | None,
    offset: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """dF/dpoints [B, O, *point_size]: the forward of deform_conv."""
    if _for_reference(g, image, offset, mask):
        return reference.gather(g, image, weight, offset, mask, bias)
    return _run(strategy.gather, g, image, None, weight, offset, mask, bias)[0]


def scatter(
    g: Geometry,
    points: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """dF/dimage [B, C, *image_size]: the forward of deform_conv_transpose."""
    if _for_reference(g, points, offset, mask):
        return reference.scatter(g, points, weight, offset, mask, bias)
    return _run(strategy.scatter, g, None, points, weight, offset, mask, bias)[0]


def gradients(
    g: Geometry,
    image: Tensor,
    points: Tensor,
    weight: Tensor | None,
    offset: Tensor | None,
    mask: Tensor | None,
    needs: Sequence[bool],
    summed: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Derivatives of F by (image, points, weight, offset, mask), None where not needed.

    After them come the channel sums of `summed`, which is the image or the points: the gradient of
    a bias.
    """
    if _for_reference(g, image, offset, mask) or not any(needs):
        return reference.gradients(g, image, points, weight, offset, mask, needs, summed)
    by_image, by_points, by_weight, by_offset, by_mask = needs
    wanted = (
        *(by_image, by_points, by_weight and weight is not None),
        *(by_offset and offset is not None, by_mask and mask is not None),
        *(summed is image, summed is points),
    )
    found = iter(_run(strategy.gradients, g, image, points, weight, offset, mask, None, wanted))
    grads = [next(found) if want else None for want in wanted[:5]]
    return (*grads, next(found, None))


def attend(a: Attention, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """The forward of deform_attention: [B, Q, H * C]."""
    found = _attend(attention.write_forward, a, (value, locations, weights), ())
    return reference.attend(a, value, locations, weights) if found is None else found[0]


def attend_gradients(
    a: Attention,
    grad_output: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of deform_attention by (value, locations, weights), None where not needed."""
    tensors = (grad_output, value, locations, weights)
    sorts = needs[0] and torch.are_deterministic_algorithms_enabled()
    found = _attend(attention.write_gradients, a, tensors, (needs[0] and not sorts, *needs[1:]))
    if found is None:
        return reference.attend_gradients(a, *tensors, needs)
    if sorts:
        found.insert(0, _attention_by_sorting(a, *tensors))
        direct.latest.replay = None  # it would replay a part of the call only
    return direct.spread(found, needs)


def _attention_by_sorting(a: Attention, *tensors: Tensor) -> Tensor:
    """The value's gradient, bitwise repeatable (attention.py, Note [repeatable attention]). It
    takes as many batch items at a time as have at most attention.SORTED samples."""
    parts = []
    step = max(1, attention.SORTED // (a.queries * a.heads * len(a.shapes) * a.points))
    for first in range(0, a.batch, step):
        some = [t[first : first + step] for t in tensors]
        part = a._replace(batch=len(some[0]))
        keys, number = attention.keys_of(part, some[0].device)
        _attend(attention.write_cells, part, (keys, *some[1:]), ())
        keys, order = torch.sort(keys, stable=True)
        starts = torch.searchsorted(keys, torch.arange(number + 1, device=keys.device).to(keys))
        found = _attend(attention.write_sorted, part, (order, starts, *some), ())
        assert found is not None
        parts += found
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend(
    make: Any, a: Attention, given: Sequence[Tensor], wanted: tuple[bool, ...]
) -> list[Tensor] | None:
    """Run the plan of a call of deform_attention, which `make` writes. It returns None where the
    reference has to do the call.

    The last three tensors given are value, locations and weights. The value is read as it lies if
    its channels follow each other.
    """
    value = given[-3]
    sizes = (a.batch, a.queries, a.heads, a.channels, a.points)
    if 0 in sizes or a.pixels >= 2**31 or torch.float64 in [t.dtype for t in given]:
        return None
    device = value.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _attend(make, a, given, wanted)
    tensors = [
        _aligned(t if t.is_contiguous() or (t is value and attention.reads(t)) else t.contiguous())
        for t in given
    ]
    strides = tensors[-3].stride()
    key = (make, wanted, a, strides, device.index, *[t.dtype for t in given])
    plan = _PLANS.get(key)
    if plan is None:
        plan = Plan(device, tensors)
        attention.write(plan, make, a, strides, wanted)
        more = functools.partial(_of_attention_backward, a, plan, strides, given)
        for failure in plan.load(more).values():
            raise failure
        _PLANS[key] = plan
    if all(t is u for t, u in zip(tensors, given, strict=True)) and ahead():
        direct.latest.replay = functools.partial(_replay, plan, None)
    return plan.run(tensors)


def _of_attention_backward(
    a: Attention, plan: Plan, strides: Sequence[int], given: Sequence[Tensor]
) -> Sequence[Launch]:
    """What the backward of an attention will launch, to be compiled together with the forward, as
    _of_backward says."""
    needs = tuple([t.requires_grad for t in given])
    if not autograd.call.differentiated or not any(needs) or len(given) != 3:
        return ()
    grad_output = Buffer(GIVEN, len(given), given[0].dtype, a.output_shape)
    backward = Plan(plan.device, [])
    backward.given = [grad_output, *plan.given]
    return attention.write(backward, attention.write_gradients, a, strides, needs)


def _replay(plan: Plan, tf32: bool | None, addresses: Sequence[int]) -> list[Tensor] | None:
    """Run a plan again, or return None if it cannot take tensors at these addresses as they are.
    `tf32` says whether the plan uses TF32, and is None if it has no float32."""
    bits = 0
    for address in addresses:
        bits |= address
    if (
        bits & 15  # kernels are compiled for pointers to multiples of 16 bytes
        or plan.device.index != torch.cuda.current_device()
        or (tf32 is not None and tf32 != allows_tf32())
    ):
        return None
    return plan.run_at(addresses)


def recalled(kernel: Callable[..., Any], order: Sequence[int], backward: bool) -> Any:
    """Wrap a kernel of the dispatcher's, so that a call like an earlier one only runs that call's
    plan.

    `order` lists the places of its first arguments, which are tensors or None, in the order that
    plans have them. See Note [calls like earlier ones] in direct.py.
    """

    def call(*args: Any) -> Any:
        parts, addresses = direct.described([args[i] for i in order])
        key = (
            kernel,
            *parts,
            *[tuple(p) if isinstance(p, list) else p for p in args[len(order) :]],
        )
        if key in _CALLS:
            replay, wanted = _CALLS[key]
            results = replay(addresses)
            if results is not None:
                direct.latest.replay = replay
                return results[0] if wanted is None else direct.spread(results, wanted)
        direct.latest.replay = None
        result = kernel(*args)
        if direct.latest.replay is not None:
            if len(_CALLS) >= 4096:
                _CALLS.clear()
            wanted = tuple([t is not None for t in result]) if backward else None
            _CALLS[key] = direct.latest.replay, wanted
        return result

    return call


def _for_reference(g: Geometry, *tensors: Tensor | None) -> bool:
    """Whether the reference has to do a call, as it does for float64 and for empty tensors."""
    if 0 in (g.batch, g.image_channels, g.point_channels):
        return True
    return torch.float64 in [t.dtype for t in tensors if t is not None]


def _run(
    make: Any,
    g: Geometry,
    image: Tensor | None,
    points: Tensor | None,
    weight: Tensor | None,
    offset: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    wanted: tuple[bool, ...] = (),
) -> list[Tensor]:
    """Run the plan of the call, which `make` writes."""
    like = points if image is None else image
    assert like is not None
    device, dtype = like.device, like.dtype
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _run(make, g, image, points, weight, offset, mask, bias, wanted)
    tensors: list[Tensor | None] = []
    layouts: list[Any] = []
    if weight is not None and weight.dtype != dtype:
        weight = weight.to(dtype)
    for t in (image, points, weight):
        if t is None or (t.is_contiguous() and t.data_ptr() % 16 == 0):
            tensors.append(t)
            layouts.append(None)
        else:
            usable, last = _usable(t)
            tensors.append(usable)
            # A tensor that is contiguous as well, as one of single pixels is, has no such format.
            layouts.append((last, memory_format(t) if last else torch.contiguous_format))
    for t in (offset, mask, bias):
        if t is None or (t.is_contiguous() and t.data_ptr() % 16 == 0):
            tensors.append(t)
        else:
            tensors.append(_aligned(t.contiguous()))
    key = (
        *(make, wanted, g, *layouts, dtype, weight is None, bias is None, device.index),
        *(None if offset is None else offset.dtype, None if mask is None else mask.dtype),
        torch.are_deterministic_algorithms_enabled(),
        dtype == torch.float32 and allows_tf32(),
    )
    plan = _PLANS.get(key)
    if plan is None:
        plan = Plan(device, tensors)
        needs = [t is not None and t.requires_grad for t in (like, weight, offset, mask, bias)]
        more = functools.partial(_of_backward, g, plan, layouts, needs)
        strategy.write(plan, make, g, layouts, wanted, more)
        _PLANS[key] = plan
    given = (image, points, weight, offset, mask, bias)
    as_given = all(t is u for t, u in zip(tensors, given, strict=True))
    if as_given and ahead():
        tf32 = allows_tf32() if dtype == torch.float32 else None
        direct.latest.replay = functools.partial(_replay, plan, tf32)
    return plan.run(tensors)


class _Plans(dict[Any, Plan]):
    """At most 4096 plans, by all that a plan depends on. When they are dropped, what is recalled of
    calls is dropped with them, since it runs these plans."""

    def __setitem__(self, key: Any, plan: Plan) -> None:
        if len(self) >= 4096:
            self.clear()
        super().__setitem__(key, plan)

    def clear(self) -> None:
        super().clear()
        _CALLS.clear()
        for operator in autograd.OPERATORS.values():
            operator.known.clear()


_CALLS: dict[Any, tuple[direct.Replay, tuple[bool, ...] | None]] = {}
_PLANS = _Plans()


def _of_backward(
    g: Geometry, plan: Plan, layouts: Sequence[Any], needs: Sequence[bool]
) -> Sequence[Launch]:
    """What the backward of this forward will launch, if there will be a backward. Its kernels are
    compiled together with the forward's, which takes little longer than the forward's alone. This
    guesses that the gradient of the result lies in memory as the input does. If the guess is
    wrong, the backward compiles its own kernels."""
    if not autograd.call.differentiated or not any(needs) or None not in plan.given[:2]:
        return ()
    image, points, *others, _ = plan.given
    by_input, *by_others, by_bias = needs
    other = len(plan.given)  # a number that no buffer of the forward has
    if image is None:
        assert points is not None
        image = points._replace(shape=(g.batch, g.image_channels, *g.image_size), number=other)
        wanted = (False, by_input, *by_others, by_bias, False)
    else:
        points = image._replace(shape=(g.batch, g.point_channels, *g.point_size), number=other)
        wanted = (by_input, False, *by_others, False, by_bias)
    layout = layouts[0] or layouts[1]
    backward = Plan(plan.device, [])
    backward.given = [image, points, *others, None]
    return strategy.draft(backward, strategy.gradients, g, [layout, layout, layouts[2]], wanted)


def _usable(t: Tensor) -> tuple[Tensor, bool]:
    """The tensor, contiguous or with its channels last, and whether they are last."""
    last = not t.is_contiguous() and t.movedim(1, -1).is_contiguous()
    return _aligned(t if last else t.contiguous()), last


def _aligned(t: Tensor) -> Tensor:
    """The tensor at a multiple of 16 bytes, since kernels are compiled for such pointers."""
    return t if t.data_ptr() % 16 == 0 else t.clone()
