"""The operators on CUDA and ROCm tensors, by Triton: the functions of reference.py.

Tensors of float64 take the reference. What a call does is written down in a Plan, once for calls
alike: the functions here make plans, with every choice of kernel and tile.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..geometry import Geometry, memory_format
from . import configs, hopper
from .compiled import Launch, multiprocessors_of
from .layouts import (
    Call,
    Operand,
    Units,
    allows_tf32,
    channels_of,
    constants_of,
    copy,
    fit,
    image_constants_of,
    image_rows,
    precision_of,
    sizes_of,
    tiles_of,
    units_of,
    weights_of,
)
from .plan import Job, Plan, Slot


def gather(
    g: Geometry,
    image: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """dF/dpoints [B, O, *point_size]: the forward of deform_conv."""
    if _for_reference(g, image, offset, mask):
        return reference.gather(g, image, weight, offset, mask, bias)
    return _run(_plan_gather, g, image, None, weight, offset, mask, bias)[0]


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
    return _run(_plan_scatter, g, None, points, weight, offset, mask, bias)[0]


def gradients(
    g: Geometry,
    image: Tensor,
    points: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    needs: Sequence[bool],
    summed: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Derivatives of F by (image, points, weight, offset, mask), None where not needed.

    And the channel sums of `summed`, which is the image or the points: a bias's gradient.
    """
    if _for_reference(g, image, offset, mask) or not any(needs):
        return reference.gradients(g, image, points, weight, offset, mask, needs, summed)
    by_image, by_points, by_weight, by_offset, by_mask = needs
    wanted = (
        *(by_image, by_points, by_weight),
        *(by_offset and offset is not None, by_mask and mask is not None),
        *(summed is image, summed is points),
    )
    found = iter(_run(_plan_gradients, g, image, points, weight, offset, mask, None, wanted))
    grads = [next(found) if want else None for want in wanted[:5]]
    return (*grads, next(found, None))


def _for_reference(g: Geometry, *tensors: Tensor | None) -> bool:
    """float64 and empty tensors take the reference."""
    if 0 in (g.batch, g.image_channels, g.point_channels):
        return True
    return torch.float64 in [t.dtype for t in tensors if t is not None]


def _run(
    make: Any,
    g: Geometry,
    image: Tensor | None,
    points: Tensor | None,
    weight: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    wanted: tuple[bool, ...] = (),
) -> list[Tensor]:
    """Run the plan of the call, which `make` writes."""
    device = weight.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _run(make, g, image, points, weight, offset, mask, bias, wanted)
    like = points if image is None else image
    assert like is not None
    dtype = like.dtype
    if weight.dtype != dtype:
        weight = weight.to(dtype)
    tensors: list[Tensor | None] = []
    layouts: list[Any] = []
    for t in (image, points, weight):
        if t is None or (t.is_contiguous() and t.data_ptr() % 16 == 0):
            tensors.append(t)
            layouts.append(None)
        else:
            usable, last = _usable(t)
            tensors.append(usable)
            # Not of a tensor of single pixels, which is contiguous as well.
            layouts.append((last, memory_format(t) if last else torch.contiguous_format))
    for t in (offset, mask, bias):
        if t is None or (t.is_contiguous() and t.data_ptr() % 16 == 0):
            tensors.append(t)
        else:
            tensors.append(_aligned(t.contiguous()))
    key = (
        *(make, wanted, g, *layouts, dtype, bias is None, device.index),
        *(None if offset is None else offset.dtype, None if mask is None else mask.dtype),
        torch.are_deterministic_algorithms_enabled(),
        dtype == torch.float32 and allows_tf32(),
    )
    plan = _PLANS.get(key)
    if plan is None:
        plan = Plan(device, tensors)
        _write(plan, make, g, layouts, wanted)
        if len(_PLANS) >= 4096:
            _PLANS.clear()
        _PLANS[key] = plan
    return plan.run(tensors)


_PLANS: dict[Any, Plan] = {}


def _write(
    plan: Plan, make: Any, g: Geometry, layouts: Sequence[Any], wanted: tuple[bool, ...]
) -> None:
    """Write the plan and load its kernels.

    It is written anew, with nothing beside other work and then in more pieces, while it needs too
    much scratch memory; and where kernels in Gluon cannot be built, without them.
    """
    operands: list[Any] = []
    forms = []
    for slot, layout in zip(plan.given, layouts, strict=False):
        last, form = layout or (False, torch.contiguous_format)
        operands.append(None if slot is None else Operand(slot, last))
        forms.append(form)
    image, points, weight = operands
    offset, mask, bias = plan.given[3:]
    dtype = weight.slot.dtype
    most = max(1, min(g.batch, round(g.batch * math.prod(g.point_size) / configs.PIECE)))
    limit, pieces, aside = configs.SCRATCH * dtype.itemsize, 1, True
    while True:
        call = Call(g, plan, precision_of(g, dtype), weight, offset, mask, pieces, aside)
        make(call, image, points, bias, forms, wanted)
        plan.finish()
        if plan.size > limit and aside:
            aside = False
        elif plan.size > limit and pieces < most:
            pieces = min(most, triton.cdiv(pieces * plan.size, limit))
        elif failures := plan.load():
            hopper.give_up(failures)
        else:
            return
        plan.clear()


def _usable(t: Tensor) -> tuple[Tensor, bool]:
    """A tensor with its channels contiguous or last, and which."""
    last = not t.is_contiguous() and t.movedim(1, -1).is_contiguous()
    return _aligned(t if last else t.contiguous()), last


def _aligned(t: Tensor) -> Tensor:
    """Kernels are compiled for pointers to multiples of 16 bytes."""
    return t if t.data_ptr() % 16 == 0 else t.clone()


Forms = Sequence[torch.memory_format]  # of image and points, which results take over


def _plan_gather(
    call: Call, image: Operand, points: None, bias: Slot | None, forms: Forms, wanted: Any
) -> None:
    result = _points_result(call, image.slot.dtype, forms[0])
    for piece, (source, out) in call.pieces(image, result):
        _gather(piece, source, bias, out)


def _plan_scatter(
    call: Call, image: None, points: Operand, bias: Slot | None, forms: Forms, wanted: Any
) -> None:
    result = _image_result(call, points.slot.dtype, forms[1])
    for piece, (source, out) in call.pieces(points, result):
        if _by_inverse(piece):
            _inverse(piece, source, bias, out, _lists(piece))
        else:
            _spread(piece, None, source, bias, out, None, None)


def _plan_gradients(
    call: Call,
    image: Operand,
    points: Operand,
    bias: None,
    forms: Forms,
    wanted: tuple[bool, ...],
) -> None:
    by_image, by_points, by_weight, by_offset, by_mask, sums_image, sums_points = wanted
    plan, dtype, weight = call.plan, image.slot.dtype, call.given_weight.slot
    # The results in their order, whatever is computed first.
    grad_image = _image_result(call, dtype, forms[0]) if by_image else None
    grad_points = _points_result(call, dtype, forms[1]) if by_points else None
    grad_weight, grad_offset, grad_mask = (
        plan.result(t.shape, t.dtype) if want and t is not None else None
        for want, t in ((by_weight, weight), (by_offset, call.offset), (by_mask, call.mask))
    )
    if sums_image or sums_points:
        summed = image if sums_image else points
        _sums(plan, summed, plan.result((summed.slot.shape[1],), dtype))
    tensors = (image, points, grad_image, grad_points, grad_offset, grad_mask)
    if grad_weight is None or call.number_of_pieces == 1:
        for piece, parts in call.pieces(*tensors):
            _gradients(piece, grad_weight, *parts)
        return
    # Sums of some pieces, in float32, and then of all; each begins at a multiple of 256 bytes.
    size = math.prod(weight.shape)
    length, room = -(-size // 64) * 64, min(call.number_of_pieces, configs.KEPT)
    kept = plan.scratch(room, length, dtype=torch.float32)
    count = 0

    def add(out: Slot) -> None:
        plan.launch(_reduce_launch(count, (1, 1, size), (0, 0, 1), length), kept, None, out)

    for piece, parts in call.pieces(*tensors):
        if count == room:
            add(kept)
            count = 1
        _gradients(piece, kept.part(count, 1), *parts)
        count += 1
    add(grad_weight)


def _gradients(
    call: Call,
    grad_weight: Slot | None,
    image: Operand,
    points: Operand,
    grad_image: Operand | None,
    grad_points: Operand | None,
    grad_offset: Slot | None,
    grad_mask: Slot | None,
) -> None:
    by_inverse = grad_image is not None and _by_inverse(call)
    # Whether the weight's gradient takes factors of the points, not rows.
    factors = call.precision == "split" and (
        hopper.takes_narrow(call) or _outer_launch(call, image.slot.dtype) is not None
    )
    # The derivative by the image, or by the points, is written last: until then a copy of that
    # tensor lies in its place. So atomic additions come after the weight's gradient, which then is
    # early; and it is where its factors of the points would lie beside rows of them. That may take
    # a launch more, which a large image is worth, but not with gluon_narrow.py.
    early = False
    if grad_image is not None and grad_points is None:
        large = image.slot.size >= configs.LARGE
        early = (large and factors) if by_inverse else (large or hopper.takes_narrow(call))
        if early or by_inverse:
            call.lend(image, grad_image)
    elif grad_points is not None and grad_image is None:
        call.lend(points, grad_points)
    if by_inverse:
        # Before the frame, so that all kernels use the rows, and all is done at once.
        if not early:
            call.rows(points)
        call.weight("units" if hopper.takes_inverse(call) else "")
        lists = _lists(call, aside=True) if call.aside else None
    with call.frame():
        by_position = grad_offset is not None or grad_mask is not None
        if not factors and (call.units.narrow or hopper.takes(call)):
            if by_position or grad_weight is not None:
                call.rows(points)
        if by_position or grad_weight is not None or grad_points is not None:
            call.image(image)
        by_atomics = None if by_inverse else grad_image
        if _narrow_gradients(call, image, points, by_atomics, grad_weight, grad_offset, grad_mask):
            by_atomics = grad_weight = grad_offset = grad_mask = None
        if early and grad_weight is not None:
            _weight_gradient(call, image, points, grad_weight)
            grad_weight = None
        if by_atomics is not None or grad_offset is not None or grad_mask is not None:
            _spread(call, image, points, None, by_atomics, grad_offset, grad_mask)
        if grad_weight is not None:
            _weight_gradient(call, image, points, grad_weight)
        if grad_points is not None:
            _gather(call, image, None, grad_points)
    if by_inverse and grad_image is not None:
        call.plan.join()
        _inverse(call, points, None, grad_image, lists or _lists(call))


def _image_result(call: Call, dtype: torch.dtype, form: torch.memory_format) -> Operand:
    return _result(call, (call.g.image_channels, *call.g.image_size), dtype, form)


def _points_result(call: Call, dtype: torch.dtype, form: torch.memory_format) -> Operand:
    return _result(call, (call.g.point_channels, *call.g.point_size), dtype, form)


def _result(
    call: Call, shape: tuple[int, ...], dtype: torch.dtype, form: torch.memory_format
) -> Operand:
    slot = call.plan.result((call.g.batch, *shape), dtype, form)
    return Operand(slot, form is not torch.contiguous_format)


def _gather(call: Call, image: Operand, bias: Slot | None, out: Operand) -> None:
    g, plan, dtype = call.g, call.plan, image.slot.dtype

    def slots(launch: Launch, order: str) -> tuple[Slot | None, ...]:
        weight = call.weight(order, launch.constants.get("RUN", 8))
        given = (call.image(image), weight, call.offset, call.mask)
        if launch.grid[1] == 1:
            return (*given, bias, out.slot)
        parts = plan.scratch(launch.grid[1], *out.slot.shape, dtype=torch.float32)
        return (*given, None, parts)

    with call.frame():
        launch, order = None, ""
        if hopper.takes(call):
            launch = hopper.gather_launch(g, dtype, out.last, call.multiprocessors)
        elif hopper.takes_narrow(call):
            launch = hopper.gather_narrow_launch(g, dtype, out.last, call.multiprocessors)
            order = "gather"
        if launch is not None and hopper.builds(launch):
            taken = slots(launch, order)
        else:
            key = (dtype.itemsize, call.precision, out.last, call.multiprocessors)
            launch = _gather_launch(g, *key)
            taken = slots(launch, "")
        plan.launch(launch, *taken)
        if launch.grid[1] > 1:
            positions = math.prod(g.point_size)
            if out.last:
                sizes = (g.batch * positions, g.point_channels, 1)
            else:
                sizes = (g.batch, g.point_channels, positions)
            strides = (sizes[1] * sizes[2], sizes[2], 1)
            reduce = _reduce_launch(launch.grid[1], sizes, strides)
            plan.launch(reduce, taken[-1], bias, out.slot)


class Blocks(NamedTuple):
    """See kernels.py, Note [units]."""

    units: int
    taps: int
    channels: int

    def constants(self) -> dict[str, int]:
        return dict(UNITS=self.units, TAPS=self.taps, BLOCK_C=self.channels)


def _blocks(g: Geometry, operator: str, width: int, channels: int) -> tuple[configs.Row, Blocks]:
    """The table's row, and what a block of image channels holds."""
    units = units_of(g)
    row = configs.find(operator + " narrow" if units.narrow else operator, width, channels)
    if not units.narrow:
        return row, Blocks(1, 1, fit(units.length, row.block_c))
    rows = max(row.block_c // units.padded, 2)
    at_once = min(rows, triton.next_power_of_2(units.number))
    taps = min(rows // at_once, triton.next_power_of_2(math.prod(g.kernel)))
    return row, Blocks(rows // taps, taps, units.padded)  # as a product needs so many channels


def _outputs_of(g: Geometry, channels: int) -> int:
    """The most point channels whose groups a block of image channels can meet."""
    group_in, group_out = g.image_channels // g.groups, g.point_channels // g.groups
    if channels % group_in == 0 or group_in % channels == 0:
        met = max(channels // group_in, 1)
    else:
        met = (channels - 1) // group_in + 2
    return min(met, g.groups) * group_out


@functools.lru_cache(maxsize=4096)
def _gather_launch(
    g: Geometry, width: int, precision: str, last: bool, multiprocessors: int
) -> Launch:
    """With a sum in parts where the grid is small (axis 1)."""
    group_out = g.point_channels // g.groups
    row, block = _blocks(g, "gather", width, group_out)
    positions, taps = math.prod(g.point_size), triton.cdiv(math.prod(g.kernel), block.taps)
    block_o = fit(g.point_channels, row.block_o)
    tiles, blocks = triton.cdiv(positions, row.block_p), triton.cdiv(g.point_channels, block_o)
    programs = g.batch * tiles * blocks
    steps = taps * triton.cdiv(g.image_channels, block.channels)
    splits = 1
    if 2 * programs <= multiprocessors and steps >= 32:  # a short sum is not worth another kernel
        splits = min(taps, multiprocessors // programs)
    return Launch(
        "gather",
        (programs, splits, 1),
        (sizes_of(g), *channels_of(g), weights_of(g), image_rows(g), tiles, blocks, splits),
        dict(
            POINTS_LAST=last,
            **image_constants_of(g, precision),
            EVEN=g.groups == 1 and units_of(g).length % block.channels == 0,
            SPLIT=splits > 1,
            BLOCK_P=row.block_p,
            BLOCK_O=block_o,
            **block.constants(),
        ),
        row.warps,
        row.stages,
    )


@functools.lru_cache(maxsize=4096)
def _reduce_launch(
    splits: int, sizes: tuple[int, int, int], strides: tuple[int, int, int], inner: int = 0
) -> Launch:
    """Sums [count / inner, splits, inner] to the sizes; inner is all of them unless given."""
    count = math.prod(sizes)
    return Launch(
        "reduce",
        (triton.cdiv(count, 1024), 1, 1),
        (count, splits, inner or count, sizes, strides),
        dict(INDEX=tl.int32 if count * splits < 2**31 else tl.int64, BLOCK=1024),
        4,
        1,
    )


def _sums(plan: Plan, source: Operand, out: Slot) -> None:
    """Sums over everything but the channels."""
    batch, channels, *size = source.slot.shape
    positions = math.prod(size)
    block_o = fit(channels, 64, least=1) if source.last else 1
    block_p = fit(positions, 2048 // block_o)
    tiles, blocks = triton.cdiv(positions, block_p), triton.cdiv(channels, block_o)
    at_once = 8 * multiprocessors_of(plan.device)
    # A short sum is not worth another kernel.
    splits = max(1, min(batch * tiles * block_p * block_o >> 15, at_once // blocks))
    vector_o = math.gcd(16, channels) if source.last else 1
    vector_p = 1 if source.last else next(v for v in (16, 4, 1) if positions % v == 0)
    count = (positions // vector_p, channels // vector_o)
    sizes = (blocks * splits, batch, *count, tiles, blocks, splits)
    constants = (source.last, vector_o, vector_p, block_p, block_o)
    sums = out if splits == 1 else plan.scratch(splits, channels, dtype=torch.float32)
    plan.first(Job("sum", (source.slot, sums), sizes, constants))
    if splits > 1:
        reduce = _reduce_launch(splits, (1, 1, channels), (0, 0, 1))
        plan.last(reduce, sums, None, out)


def _spread(
    call: Call,
    image: Operand | None,
    points: Operand,
    bias: Slot | None,
    by_image: Operand | None,
    by_offset: Slot | None,
    by_mask: Slot | None,
) -> None:
    """Derivatives by image (through atomic additions), offset and mask, each unless None."""
    g, plan, units = call.g, call.plan, call.units
    with call.frame():
        grad_offset = _by_unit(call, by_offset, g.offset_groups)
        grad_mask = _by_unit(call, by_mask, g.mask_groups)
        grad_image = None
        if by_image is not None:
            rows = by_image.last and not units.narrow and bias is None
            if rows and by_image.slot.dtype == torch.float32:
                grad_image = by_image.slot
            else:
                grad_image = plan.scratch(g.batch, image_rows(g), dtype=torch.float32)
            plan.zero(grad_image)
        by_position = grad_offset is not None or grad_mask is not None
        laid = call.image(image) if by_position and image is not None else None
        rest = (call.offset, call.mask, grad_offset, grad_mask, grad_image)
        launch = None
        if hopper.takes(call):
            launch = hopper.along_launch(g, points.slot.dtype, call.multiprocessors)
        if launch is not None and hopper.builds(launch):
            slots = (laid, call.rows(points), call.weight("along"), *rest)
        else:
            placed = call.points(points)
            key = (points.slot.dtype.itemsize, call.precision, placed.last)
            needs = (grad_image is not None, by_position)
            launch = _spread_launch(g, *key, *needs, call.multiprocessors)
            slots = (laid, placed.slot, call.weight(), *rest)
        plan.launch(launch, *slots)
        if grad_image is not None and by_image is not None and grad_image != by_image.slot:
            layout = "planes" if units.narrow else "rows"
            _image_like(call, grad_image, bias, layout, by_image)
        _sum_units(call, grad_offset, by_offset, g.offset_groups)
        _sum_units(call, grad_mask, by_mask, g.mask_groups)


def _narrow_gradients(
    call: Call,
    image: Operand,
    points: Operand,
    by_image: Operand | None,
    by_weight: Slot | None,
    by_offset: Slot | None,
    by_mask: Slot | None,
) -> bool:
    """Derivatives by image (through atomic additions), weight, offset and mask by one kernel of
    gluon_narrow.py; whether that can be had."""
    g, plan, dtype = call.g, call.plan, image.slot.dtype
    if by_offset is by_mask is None or not hopper.takes_narrow(call):
        return False
    launch = hopper.gradients_narrow_launch(g, dtype, call.multiprocessors)
    if launch is None or not hopper.builds(launch):
        return False
    with call.frame():
        grad_offset = _by_unit(call, by_offset, g.offset_groups)
        grad_mask = _by_unit(call, by_mask, g.mask_groups)
        grad_image = parts = None
        length = g.batch * image_rows(g)
        second = (length // 4 | 1) * 4 if launch.constants["TWICE"] else 0  # _add_corners there
        if by_image is not None:
            grad_image = plan.scratch(length + second, dtype=torch.float32)
        if by_weight is not None:
            parts = plan.scratch(launch.grid[1], weights_of(g), dtype=torch.float32)
        split = call.precision == "split"
        rows = call.factors(points) if split else call.rows(points)
        rows = rows._replace(shape=(math.prod(rows.shape) // g.point_channels, g.point_channels))
        weight = call.weight("along", launch.constants["RUN"])
        given = (call.image(image), rows, weight, call.offset, call.mask)
        slots = (*given, grad_offset, grad_mask, grad_image, parts)
        if grad_image is not None:
            plan.zero(grad_image)
        plan.launch(launch, *slots)
        if grad_image is not None and by_image is not None:
            if second:
                sizes = (1, 1, length)
                plan.launch(
                    _reduce_launch(2, sizes, (0, 0, 1), second), grad_image, None, grad_image
                )
            _image_like(call, grad_image, None, "planes", by_image)
        _sum_units(call, grad_offset, by_offset, g.offset_groups)
        _sum_units(call, grad_mask, by_mask, g.mask_groups)
        if parts is not None and by_weight is not None:
            _sum_weights(call, parts, by_weight)
    return True


def _by_unit(call: Call, result: Slot | None, groups: int) -> Slot | None:
    """Where a gradient goes first: that of each unit where a group has several."""
    if result is None or call.units.number == groups:
        return result
    size = math.prod(result.shape) * (call.units.number // groups)
    return call.plan.scratch(size, dtype=torch.float32)


def _sum_units(call: Call, grad: Slot | None, result: Slot | None, groups: int) -> None:
    if grad is None or result is None or call.units.number == groups:
        return
    outer, size = call.g.batch * groups, math.prod(result.shape)
    inner = size // outer
    splits = call.units.number // groups
    sizes, strides = (1, 1, size), (size, size, 1)
    call.plan.launch(_reduce_launch(splits, sizes, strides, inner), grad, None, result)


def _image_like(call: Call, laid: Slot, bias: Slot | None, layout: str, out: Operand) -> None:
    """Copy an image laid out for the kernels to a result."""
    channels = call.g.image_channels
    units = call.units if call.units.narrow else Units(channels, 1, False, channels)
    copy(call.plan, laid, out.slot, bias, units, layout, "rows" if out.last else "channels")


@functools.lru_cache(maxsize=4096)
def _spread_launch(
    g: Geometry,
    width: int,
    precision: str,
    last: bool,
    by_image: bool,
    by_position: bool,
    multiprocessors: int,
) -> Launch:
    row, block = _blocks(g, "spread", width, g.point_channels // g.groups)
    positions, taps = math.prod(g.point_size), triton.cdiv(math.prod(g.kernel), block.taps)
    block_o = fit(_outputs_of(g, block.units * block.channels), row.block_o)
    tiles = triton.cdiv(positions, row.block_p)
    splits = max(1, min(taps, 4 * multiprocessors // (g.batch * tiles)))
    return Launch(
        "spread",
        (g.batch * tiles, splits, 1),
        (sizes_of(g), *channels_of(g), weights_of(g), image_rows(g), tiles, splits),
        dict(
            POINTS_LAST=last,
            **image_constants_of(g, precision),
            EVEN=units_of(g).length % block.channels == 0,
            HOLD=g.groups == 1 and g.point_channels <= block_o,
            BLOCK_P=row.block_p,
            BLOCK_O=block_o,
            **block.constants(),
        ),
        row.warps,
        row.stages,
    )


def _by_inverse(call: Call) -> bool:
    """Whether the image gradient goes by inverse gather.

    It is bitwise repeatable if the lists are in order. For half numbers it is also faster than
    atomic additions, unless few channels share the cost of a list; for float32 it has more
    products to split (kernels.py, Note [precision]), so it is slower and less accurate.
    """
    if torch.are_deterministic_algorithms_enabled():
        return True
    return call.precision == "native" and call.units.length > configs.NARROW


def _inverse(
    call: Call, points: Operand, bias: Slot | None, out: Operand, lists: tuple[Slot, Slot]
) -> None:
    """Derivative by the image."""
    g, plan, dtype = call.g, call.plan, points.slot.dtype

    def slots(launch: Launch, order: str) -> tuple[Slot | None, ...]:
        given = (call.rows(points), call.weight(order), call.offset, call.mask)
        if launch.grid[2] == 1:
            return (*given, bias, *lists, out.slot)
        parts = plan.scratch(launch.grid[2], *out.slot.shape, dtype=torch.float32)
        return (*given, bias, *lists, parts)

    with call.frame():
        launch = None
        if hopper.takes_inverse(call):
            launch = hopper.inverse_launch(g, dtype, out.last, call.multiprocessors)
        if launch is not None and hopper.builds(launch):
            taken = slots(launch, "units")
        else:
            key = (dtype.itemsize, call.precision, out.last, call.multiprocessors)
            launch = _inverse_launch(g, *key)
            taken = slots(launch, "")
        plan.launch(launch, *taken)
        if launch.grid[2] > 1:
            size = math.prod(out.slot.shape)
            reduce = _reduce_launch(launch.grid[2], (1, 1, size), (0, 0, 1))
            plan.launch(reduce, taken[-1], None, out.slot)


def _lists(call: Call, aside: bool = False) -> tuple[Slot, Slot]:
    """The lists of an inverse gather and their entries; aside: made beside what follows, since
    that takes little of what a device can do at once."""
    plan = call.plan
    lists = _list_plan(call.g, torch.are_deterministic_algorithms_enabled())
    index = torch.int32 if lists.entries < 2**31 else torch.int64
    counts = plan.scratch(2 * lists.slots + 1, dtype=index)
    entries = plan.scratch(lists.entries, dtype=torch.int32)
    plan.zero(counts)
    count, starts, fill, order = lists.launches
    plan.then(count, call.offset, counts, None, aside=aside)
    plan.then(starts, counts, aside=aside)
    plan.then(fill, call.offset, counts, entries, aside=aside)
    if order is not None:
        plan.then(order, call.offset, counts, entries, aside=aside)
    return counts, entries


class _ListPlan(NamedTuple):
    slots: int
    entries: int  # at most
    launches: tuple[Launch, Launch, Launch, Launch | None]


@functools.lru_cache(maxsize=4096)
def _list_plan(g: Geometry, ordered: bool) -> _ListPlan:
    """The lists of the inverse gather (kernels.py, Note [lists])."""
    tile, tiles = tiles_of(g)
    groups, positions = max(g.offset_groups, 1), math.prod(g.point_size)
    owners = g.batch * groups * math.prod(g.kernel)
    slots, blocks = owners * tiles, triton.cdiv(positions, configs.LISTED)
    integers = (sizes_of(g), groups, tiles, slots)

    def bucket(fill: bool) -> Launch:
        constants = dict(FILL=fill, TILE=tile, BLOCK=configs.LISTED)
        return Launch("bucket", (owners * blocks, 1, 1), (*integers, blocks), constants, 4, 1)

    constants = dict(TILE=tile, SHORT=configs.SHORT, LONG=configs.LONG, BLOCK=configs.LISTED)
    order = Launch("order", (slots, 1, 1), integers, constants, 1, 1) if ordered else None
    starts = Launch("starts", (triton.cdiv(slots, 1024), 1, 1), (slots,), dict(BLOCK=1024), 4, 1)
    launches = (bucket(False), starts, bucket(True), order)
    return _ListPlan(slots, owners * positions * 2 ** len(g.kernel), launches)


@functools.lru_cache(maxsize=4096)
def _inverse_launch(
    g: Geometry, width: int, precision: str, last: bool, multiprocessors: int
) -> Launch:
    units = units_of(g)
    row = configs.find("inverse", width, units.length)
    tile, tiles = tiles_of(g)
    block_c, taps = fit(units.length, row.block_c), math.prod(g.kernel)
    programs, blocks = g.batch * units.number * tiles, triton.cdiv(units.length, block_c)
    splits = max(1, min(taps, 2 * multiprocessors // (programs * blocks)))
    slots = g.batch * max(g.offset_groups, 1) * taps * tiles
    return Launch(
        "inverse",
        (programs, blocks, splits),
        (sizes_of(g), *channels_of(g), weights_of(g), tiles, slots, g.batch, splits),
        dict(
            LAST=last,
            **constants_of(g, precision, math.prod(g.point_size) * g.point_channels),
            TILE=tile,
            PIXELS=math.prod(tile),
            BLOCK_E=row.block_p,
            BLOCK_O=fit(g.point_channels // g.groups, row.block_o),
            BLOCK_C=block_c,
        ),
        row.warps,
        row.stages,
    )


def _weight_gradient(call: Call, image: Operand, points: Operand, out: Slot) -> None:
    g, plan, dtype = call.g, call.plan, image.slot.dtype
    with call.frame():
        found = _outer_launch(call, dtype)
        if found is not None:
            launch, splits, shape = found
            rows = call.factors(points) if call.precision == "split" else call.rows(points)
            parts = plan.scratch(splits, weights_of(g), dtype=torch.float32)
            given = (call.image(image), rows._replace(shape=shape), call.offset, call.mask)
        else:
            placed = call.points(points)
            key = (dtype.itemsize, call.precision, placed.last, call.multiprocessors)
            launch, splits = _weight_launch(g, *key)
            parts = plan.scratch(splits, weights_of(g), dtype=torch.float32)
            given = (call.image(image), placed.slot, call.offset, call.mask)
        plan.launch(launch, *given, parts)
        plan.launch(_reduce_weight_launch(g, splits), parts, out)


def _outer_launch(call: Call, dtype: torch.dtype) -> tuple[Launch, int, tuple[int, ...]] | None:
    """That of gluon.py, if it takes the call."""
    if not hopper.takes(call):
        return None
    found = hopper.outer_launch(call.g, dtype, call.multiprocessors)
    return found if found is not None and hopper.builds(found[0]) else None


def _sum_weights(call: Call, parts: Slot, out: Slot) -> None:
    """Sum partial results [splits, K, O, C / groups] to a weight's gradient."""
    g = call.g
    taps, group_in = math.prod(g.kernel), g.image_channels // g.groups
    sizes, strides = (taps, g.point_channels, group_in), (1, group_in * taps, taps)
    call.plan.launch(_reduce_launch(parts.shape[0], sizes, strides), parts, None, out)


@functools.lru_cache(maxsize=4096)
def _reduce_weight_launch(g: Geometry, splits: int) -> Launch:
    taps, group_in = math.prod(g.kernel), g.image_channels // g.groups
    together = 8 if splits >= 8 else 4
    block_k, block_o = 128 // together, 32
    return Launch(
        "reduce_weight",
        (triton.cdiv(group_in * taps, block_k), triton.cdiv(g.point_channels, block_o), 1),
        (taps, group_in, g.point_channels, splits),
        dict(
            VECTOR_O=math.gcd(16, g.point_channels),
            BLOCK_K=block_k,
            BLOCK_O=block_o,
            TOGETHER=together,
        ),
        4,
        1,
    )


@functools.lru_cache(maxsize=4096)
def _weight_launch(
    g: Geometry, width: int, precision: str, last: bool, multiprocessors: int
) -> tuple[Launch, int]:
    units = units_of(g)
    row, block = _blocks(g, "weight", width, g.point_channels // g.groups)
    positions, taps = math.prod(g.point_size), triton.cdiv(math.prod(g.kernel), block.taps)
    tiles = triton.cdiv(positions, row.block_p)
    if units.narrow:
        blocks, channels = triton.cdiv(units.number, block.units), block.units * units.length
    else:
        blocks = units.number * triton.cdiv(units.length, block.channels)
        channels = block.channels
    outputs = _outputs_of(g, channels)
    block_o = fit(outputs, row.block_o)
    over = triton.cdiv(outputs, block_o)
    splits = max(1, min(g.batch * tiles, 4 * multiprocessors // (taps * blocks * over)))
    launch = Launch(
        "weight_gradient",
        (taps * blocks, over, splits),
        (sizes_of(g), g.batch, *channels_of(g), image_rows(g), tiles, blocks, splits),
        dict(
            POINTS_LAST=last,
            **image_constants_of(g, precision),
            EVEN=units.length % block.channels == 0,
            BLOCK_P=row.block_p,
            BLOCK_O=block_o,
            **block.constants(),
        ),
        row.warps,
        row.stages,
    )
    return launch, splits
