"""What a call does: its operations, their order, the chunks of the batch, and the buffers that they
share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

from ..geometry import Geometry
from . import (
    backward_atomic,
    backward_sorted,
    backward_weight,
    depthwise,
    forward,
    hopper,
    im2col,
    tiles,
    variants,
)
from .layout import Call, Operand, Steps, precision_of
from .runtime import Buffer, Launch, Plan

# The variants of each operation, the fastest first. The last one takes every call on every GPU.
FORWARD = (
    depthwise.FORWARD,
    depthwise.FORWARD_FEW,
    forward.SINGLE_TAP,
    *hopper.FORWARD_FIRST,
    im2col.FORWARD_FIRST,
    *hopper.FORWARD,
    im2col.FORWARD,
    *forward.VARIANTS,
)
ATOMIC = (
    depthwise.BACKWARD_ATOMIC,
    im2col.BACKWARD_ATOMIC_FIRST,
    *hopper.BACKWARD_ATOMIC,
    im2col.BACKWARD_ATOMIC,
    *backward_atomic.VARIANTS,
)
SORTED = (im2col.BACKWARD_SORTED, *hopper.BACKWARD_SORTED, *backward_sorted.VARIANTS)
WEIGHT = (
    depthwise.BACKWARD_WEIGHT,
    im2col.BACKWARD_WEIGHT_FIRST,
    *hopper.BACKWARD_WEIGHT,
    im2col.BACKWARD_WEIGHT,
    *backward_weight.VARIANTS,
)

Forms = Sequence[torch.memory_format]  # the formats of image and points, which results take over


def write(
    plan: Plan,
    make: Any,
    g: Geometry,
    layouts: Sequence[Any],
    wanted: Any,
    more: Callable[[], Sequence[Launch]] = tuple,
) -> None:
    """Write the plan and load its kernels, together with those of `more` if any has to be compiled.

    The plan is written anew while it needs too much memory, first with less room (layout.py, Steps)
    and then in more chunks. What such drafts launch is loaded as well, since smaller calls run it.
    The plan is also written anew without the variants whose kernels cannot be built.
    """
    width = dtype_of(plan).itemsize
    most = max(1, min(g.batch, round(g.batch * math.prod(g.point_size) / tiles.CHUNK)))
    limit, chunks, room = tiles.SCRATCH * width, 1, 2
    spares: list[Launch] = []
    while True:
        launches = draft(plan, make, g, layouts, wanted, chunks, room)
        if plan.size > limit and (room or chunks < most):
            spares += launches
            if room:
                room -= 1
            else:
                chunks = min(most, triton.cdiv(chunks * plan.size, limit))
        else:
            plan.spares += spares
            failures = plan.load(more)
            if not failures:
                return
            variants.give_up(failures)
            chunks, room, spares = 1, 2, []
        plan.clear()


def dtype_of(plan: Plan) -> torch.dtype:
    """The dtype of the image and the points."""
    return next(t.dtype for t in plan.given if t is not None)


def draft(
    plan: Plan,
    make: Any,
    g: Geometry,
    layouts: Sequence[Any],
    wanted: Any,
    chunks: int = 1,
    room: int = 2,
    other: bool = False,
) -> list[Launch]:
    """Write the plan in this many chunks and with so much room (layout.py, Steps). Returns all
    launches that it may need. Where the call's size decides between two ways (Steps.depending),
    they include those of the other way, which `other` asks for."""
    operands: list[Any] = []
    forms = []
    for buffer, layout in zip(plan.given, layouts, strict=False):
        last, form = layout or (False, torch.contiguous_format)
        operands.append(None if buffer is None else Operand(buffer, last))
        forms.append(form)
    image, points, weight = operands
    offset, mask, bias = plan.given[3:]
    dtype, last = dtype_of(plan), (image or points).last
    steps = Steps(plan, room, other)
    call = Call(
        *(g, steps, dtype, precision_of(g, dtype), weight, offset, mask),
        *(last, make is gather, chunks),
    )
    make(call, image, points, bias, forms, wanted)
    steps.finish()
    if steps.depends and not other:
        more = Plan(plan.device, [])
        more.given = plan.given
        plan.spares += draft(more, make, g, layouts, wanted, chunks, room, other=True)
    return [*plan.steps, *plan.spares]


def gather(
    call: Call, image: Operand, points: None, bias: Buffer | None, forms: Forms, wanted: Any
) -> None:
    """dF/dpoints."""
    result = _points_result(call, forms[0])
    for chunk, (source, out) in call.chunks(image, result):
        _forward(chunk, source, bias, out)


def scatter(
    call: Call, image: None, points: Operand, bias: Buffer | None, forms: Forms, wanted: Any
) -> None:
    """dF/dimage."""
    result = _image_result(call, forms[1])
    for chunk, (source, out) in call.chunks(points, result):
        if _by_sorting(chunk):
            with chunk.frame():
                _sorted(chunk, source, bias, out)
        else:
            chunk.only_image = True
            _atomic(chunk, None, source, bias, out, None, None)


def gradients(
    call: Call,
    image: Operand,
    points: Operand,
    bias: None,
    forms: Forms,
    wanted: tuple[bool, ...],
) -> None:
    """Derivatives of F by all that is wanted, and channel sums of the image or the points."""
    by_image, by_points, by_weight, by_offset, by_mask, sums_image, sums_points = wanted
    plan, weight = call.plan, call.given_weight and call.given_weight.buffer
    # The results are made in the order in which they are returned, whatever is computed first.
    grad_image = _image_result(call, forms[0]) if by_image else None
    grad_points = _points_result(call, forms[1]) if by_points else None
    grad_weight, grad_offset, grad_mask = (
        plan.result(t.shape, t.dtype) if want and t is not None else None
        for want, t in ((by_weight, weight), (by_offset, call.offset), (by_mask, call.mask))
    )
    if sums_image or sums_points:
        summed = image if sums_image else points
        call.sums(summed, plan.result((summed.buffer.shape[1],), call.dtype))
    tensors = (image, points, grad_image, grad_points, grad_offset, grad_mask)
    if grad_weight is None or call.number_of_chunks == 1:
        for chunk, parts in call.chunks(*tensors):
            _gradients(chunk, grad_weight, *parts)
        if grad_weight is not None:  # load what calls in several chunks need
            kept = grad_weight._replace(dtype=torch.float32)
            call.reduce_flat(kept, 1, grad_weight, runs=False)
            call.reduce_flat(kept, 1, kept, runs=False)
            call.reduce_weight(kept, kept, runs=False)
        return
    assert weight is not None
    # The gradients of some chunks are kept in float32 and then added up, until one sum is left.
    # Each begins at a multiple of 256 bytes.
    length = -(-math.prod(weight.shape) // 64) * 64
    room = min(call.number_of_chunks, tiles.KEPT)
    kept = plan.scratch(room, length, dtype=torch.float32)
    count = 0
    for chunk, parts in call.chunks(*tensors):
        if count == room:
            first = kept.part(0, 1)._replace(shape=(math.prod(weight.shape),))
            call.reduce_flat(kept, count, first, length)
            count = 1
        _gradients(chunk, kept.part(count, 1), *parts)
        count += 1
    call.reduce_flat(kept, count, grad_weight, length)


def _gradients(
    call: Call,
    grad_weight: Buffer | None,
    image: Operand,
    points: Operand,
    grad_image: Operand | None,
    grad_points: Operand | None,
    grad_offset: Buffer | None,
    grad_mask: Buffer | None,
) -> None:
    call.sorts = by_sorting = grad_image is not None and _by_sorting(call)
    by_position = grad_offset is not None or grad_mask is not None
    by_atomics = None if by_sorting else grad_image
    call.only_image = not by_position
    narrow = variants.choose(hopper.BACKWARD_NARROW, call) if by_position else None
    atomic, users = None, [narrow] if narrow else []
    if narrow is None and (by_position or by_atomics is not None):
        atomic = variants.choose(ATOMIC, call) or ATOMIC[-1]
        users.append(atomic)
    if narrow is None and grad_weight is not None:
        users.append(variants.choose(WEIGHT, call) or WEIGHT[-1])

    def reads_parts(user: variants.Variant) -> bool:
        return call.precision == "bf16x3" and user.wants_parts

    # How these kernels read the points: as parts, as rows, or some so and some so.
    in_parts = set(map(reads_parts, users))
    # The gradient of the image, or of the points, is written last, because until then a copy of the
    # image, or of the points, lies in its memory. So atomic additions come after the weight's
    # gradient.
    if grad_image is not None and grad_points is None:
        call.lend(image, grad_image)
    elif grad_points is not None and grad_image is None:
        call.lend(points, grad_points)
    lists = None
    if by_sorting:
        # These are made before the frame, so that all kernels use the same rows, and everything is
        # prepared in one launch.
        sorting = _sorting(call)
        call.weight(sorting.order)
        parts = reads_parts(sorting)
        if call.steps.together or in_parts <= {parts}:
            call.read(points, parts)
        if call.steps.together:
            lists = backward_sorted.make_lists(call, sorting)
    with call.frame():
        # All that these kernels need is asked for here, so that it is prepared in one launch. Where
        # memory is short, points and zeros wait, unless all kernels read the points alike.
        if by_position or grad_weight is not None or grad_points is not None:
            call.image(image)
        if call.steps.together or len(in_parts) == 1:
            for parts in sorted(in_parts):
                call.read(points, parts)
        if atomic is not None:
            call.weight(atomic.order)
            if by_atomics is not None and call.steps.together:
                call.zero(call.added(by_atomics, None))
        if narrow is not None:
            args = (image, points, by_atomics, grad_offset, grad_mask, grad_weight)
            _atomic_like(call, hopper.BACKWARD_NARROW, *args)
            by_atomics = grad_offset = grad_mask = grad_weight = None
        if grad_weight is not None:
            with call.frame():
                variants.write(WEIGHT, call, image, points, grad_weight)
        if by_atomics is not None or grad_offset is not None or grad_mask is not None:
            _atomic(call, image, points, None, by_atomics, grad_offset, grad_mask)
        if grad_points is not None:
            _forward(call, image, None, grad_points)
    if by_sorting and grad_image is not None:
        _sorted(call, points, None, grad_image, lists)


def _by_sorting(call: Call) -> bool:
    """Whether the image gradient is gathered from sorted lists of samples.

    It is bitwise repeatable if the lists are in order. In half precision it is also faster than
    atomic additions where these would be many and a sample group has the channels that a list is
    worth. In float32 it has more products to split (sampling.py, Note [precision]), so it is slower
    and less accurate.
    """
    if torch.are_deterministic_algorithms_enabled():
        return True
    n = call.sizes
    least = tiles.SORTED_CHANNELS if n.sample_groups > 1 else tiles.NARROW + 1
    if call.precision != "native" or n.group_channels < least:
        return False
    # With strides a tile of pixels has few samples of a tap. It pays to gather them only from lists
    # of all taps together, as hopper/backward_columns.py does.
    if math.prod(n.stride) > 2 and not _sorting(call).together:
        return False
    sectors = n.batch * n.positions * n.taps * 2 ** len(n.image) * n.channels // 8
    if depthwise.takes_depthwise(call):
        most = tiles.ADDED_DEPTHWISE
    else:
        # To gather a sample takes as long as it has outputs, anew for each block of 256 channels,
        # and to add it takes as long as it has channels. Of several weight groups a block has only
        # a few.
        most = tiles.ADDED_BY_BLOCKS if call.by_blocks else tiles.ADDED
        most = max(most, most * n.outputs // min(n.channels, 256))
        most *= 2 if call.g.groups > 1 else 1
    return call.steps.depending(sectors > most)


def _forward(call: Call, image: Operand, bias: Buffer | None, out: Operand) -> None:
    with call.frame():
        variants.write(FORWARD, call, image, bias, out)


def _sorting(call: Call) -> variants.Variant:
    """The variant that will do the sorted gradient, whose weights and lists are made before it."""
    return variants.choose(SORTED, call) or SORTED[-1]


def _sorted(
    call: Call, points: Operand, bias: Buffer | None, out: Operand, lists: Any = None
) -> None:
    if lists is None:
        lists = backward_sorted.make_lists(call, _sorting(call))
    with call.frame():
        variants.write(SORTED, call, points, bias, out, lists)


def _atomic(call: Call, image: Any, points: Operand, bias: Buffer | None, *wanted: Any) -> None:
    """Derivatives by the image (by atomic additions, plus a bias), offset and mask."""
    _atomic_like(call, ATOMIC, image, points, *wanted, bias=bias)


def _atomic_like(
    call: Call,
    kind: Sequence[variants.Variant],
    image: Operand | None,
    points: Operand,
    by_image: Operand | None,
    by_offset: Buffer | None,
    by_mask: Buffer | None,
    *by_weight: Buffer | None,
    bias: Buffer | None = None,
) -> None:
    n = call.sizes
    with call.frame():
        grad_offset = _by_sample_group(call, by_offset, n.per_offset)
        grad_mask = _by_sample_group(call, by_mask, n.per_mask)
        grad_image = None if by_image is None else call.added(by_image, bias)
        args = (image, points, grad_image, grad_offset, grad_mask, *by_weight)
        variants.write(kind, call, *args)
        if grad_image is not None and by_image is not None and grad_image != by_image.buffer:
            call.deliver(grad_image, bias, by_image)
        for grad, result, groups in (
            (grad_offset, by_offset, n.per_offset),
            (grad_mask, by_mask, n.per_mask),
        ):
            if grad is not None and result is not None and grad != result:
                inner = math.prod(result.shape) // (n.batch * n.sample_groups // groups)
                call.reduce_flat(grad, groups, result, inner)


def _by_sample_group(call: Call, result: Buffer | None, groups: int) -> Buffer | None:
    """The buffer that kernels write a gradient of offset or mask to: the result itself, or one for
    every sample group where several share an offset or mask, which are added up afterwards."""
    if result is None or groups == 1:
        return result
    return call.plan.scratch(math.prod(result.shape) * groups, dtype=torch.float32)


def _image_result(call: Call, form: torch.memory_format) -> Operand:
    return _result(call, (call.g.image_channels, *call.g.image_size), form)


def _points_result(call: Call, form: torch.memory_format) -> Operand:
    return _result(call, (call.g.point_channels, *call.g.point_size), form)


def _result(call: Call, shape: tuple[int, ...], form: torch.memory_format) -> Operand:
    buffer = call.plan.result((call.g.batch, *shape), call.dtype, form)
    return Operand(buffer, form is not torch.contiguous_format)
