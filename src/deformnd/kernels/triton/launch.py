"""The operators on CUDA and ROCm tensors, by Triton: the functions of reference.py.

Tensors of float64 take the reference.
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
    LEAST,
    Call,
    Units,
    channels_of,
    constants_of,
    fit,
    image_rows,
    pixels_of,
    relayout,
    sizes_of,
    units_of,
    weights_of,
)


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
    with _on_device_of(image):
        return _gather(Call.of(g, image, offset, mask, weight), image, bias, image)


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
    with _on_device_of(points):
        call = Call.of(g, points, offset, mask, weight)
        if _by_inverse(g, points):
            return _inverse(call, points, bias, points)
        image = _spread(call, None, points, bias, (True, False, False), points)[0]
        assert image is not None
        return image


def gradients(
    g: Geometry,
    image: Tensor,
    points: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Derivatives of F by (image, points, weight, offset, mask), None where not needed."""
    if _for_reference(g, image, offset, mask):
        return reference.gradients(g, image, points, weight, offset, mask, needs)
    by_image, by_points, by_weight, by_offset, by_mask = needs
    by_offset = by_offset and offset is not None
    by_mask = by_mask and mask is not None
    out: list[Tensor | None] = [None] * 5
    with _on_device_of(image):
        call = Call.of(g, image, offset, mask, weight)
        if call.units.narrow or (by_image and _by_inverse(g, image)):
            call.rows(points)  # first, so that all kernels use them
        if by_points:
            out[1] = _gather(call, image, None, points)
        atomics = by_image and not _by_inverse(g, image)
        at_once = None
        if (by_offset or by_mask) and hopper.narrow_on_hopper(g, image, call.precision):
            needed = (atomics, by_weight, by_offset, by_mask)
            at_once = _narrow_gradients(call, image, points, weight, needed)
        if at_once is not None:
            out[0], out[2], out[3], out[4] = at_once
        elif by_weight:
            out[2] = _weight_gradient(call, image, points, weight)
        if at_once is None and (by_offset or by_mask or atomics):
            out[0], out[3], out[4] = _spread(
                call, image, points, None, (atomics, by_offset, by_mask), image
            )
        if by_image and not atomics:
            out[0] = _inverse(call, points, None, image)
    return tuple(out)


def _for_reference(g: Geometry, *tensors: Tensor | None) -> bool:
    """float64 and empty tensors take the reference."""
    empty = 0 in (g.batch, g.image_channels, g.point_channels)
    return empty or any(t is not None and t.dtype == torch.float64 for t in tensors)


def _on_device_of(t: Tensor) -> Any:
    if not t.is_cuda or t.device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(t.device)


class _Nothing:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *args: object) -> None:
        pass


_NOTHING = _Nothing()


def _gather(call: Call, image: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    """In the memory format of `like`."""
    g = call.g
    form = memory_format(like)
    last = form is not torch.contiguous_format
    shape = (g.batch, g.point_channels, *g.point_size)
    out = torch.empty(shape, dtype=image.dtype, device=image.device, memory_format=form)
    if hopper.on_hopper(g, image, call.precision):
        made = hopper.gather_launch(g, image.dtype, last, multiprocessors_of(image.device))
        if made is not None and made(
            call.image(image), call.fragments("gather"), call.offset, call.mask, bias, out
        ):
            return out
    if hopper.narrow_on_hopper(g, image, call.precision):
        made = hopper.gather_narrow_launch(g, image.dtype, last, multiprocessors_of(image.device))
        if made is not None:
            packed = call.fragments("gather", made.launch.constants["RUN"])
            if made(call.image(image), packed, call.offset, call.mask, bias, out):
                return out
    key = (image.element_size(), call.precision, last, multiprocessors_of(image.device))
    launch, splits = _gather_launch(g, *key)
    target = out
    if splits > 1:
        target = image.new_empty(splits, out.numel(), dtype=torch.float32)
    launch(call.image(image), call.weight(), call.offset, call.mask, bias, target)
    if splits > 1:
        positions = math.prod(g.point_size)
        if last:
            sizes = (g.batch * positions, g.point_channels, 1)
        else:
            sizes = (g.batch, g.point_channels, positions)
        strides = (sizes[1] * sizes[2], sizes[2], 1)
        _reduce_launch(splits, sizes, strides)(target, bias, out)
    return out


def _blocks(g: Geometry, operator: str, width: int, channels: int) -> tuple[configs.Row, int, int]:
    """The table's row, UNITS and BLOCK_C."""
    units = units_of(g)
    row = configs.find(operator + " narrow" if units.narrow else operator, width, channels)
    if not units.narrow:
        return row, 1, fit(units.length, row.block_c)
    # At least the lanes of LEAST.
    at_once = min(row.block_c // units.padded, triton.next_power_of_2(units.number))
    return row, max(at_once, min(LEAST, row.block_c) // units.padded, 2), units.padded


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
) -> tuple[Launch, int]:
    group_out = g.point_channels // g.groups
    row, units, block_c = _blocks(g, "gather", width, group_out)
    positions, taps = math.prod(g.point_size), math.prod(g.kernel)
    block_o = fit(g.point_channels, row.block_o)
    tiles, blocks = triton.cdiv(positions, row.block_p), triton.cdiv(g.point_channels, block_o)
    programs = g.batch * tiles * blocks
    splits = 1
    # A short sum is not worth a second kernel.
    if 2 * programs <= multiprocessors and taps * triton.cdiv(g.image_channels, block_c) >= 16:
        splits = min(taps, multiprocessors // programs)
    launch = Launch(
        "gather",
        (programs, splits, 1),
        (sizes_of(g), *channels_of(g), weights_of(g), tiles, blocks, splits),
        dict(
            POINTS_LAST=last,
            **constants_of(g, precision, image_rows(g)),
            EVEN=g.groups == 1 and units_of(g).length % block_c == 0,
            SPLIT=splits > 1,
            UNITS=units,
            BLOCK_P=row.block_p,
            BLOCK_O=block_o,
            BLOCK_C=block_c,
        ),
        row.warps,
        row.stages,
    )
    return launch, splits


@functools.lru_cache(maxsize=4096)
def _reduce_launch(
    splits: int, sizes: tuple[int, int, int], strides: tuple[int, int, int]
) -> Launch:
    count = math.prod(sizes)
    return Launch(
        "reduce",
        (triton.cdiv(count, 1024), 1, 1),
        (count, splits, sizes, strides),
        dict(INDEX=tl.int32 if count * splits < 2**31 else tl.int64, BLOCK=1024),
        4,
        1,
    )


def _spread(
    call: Call,
    image: Tensor | None,
    points: Tensor,
    bias: Tensor | None,
    needs: tuple[bool, bool, bool],
    like: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Derivatives by image (through atomic additions), offset and mask; image as `like`."""
    g = call.g
    by_image = needs[0]
    grad_image, grad_offset, grad_mask = _room(call, needs, points.device)
    by_position = grad_offset is not None or grad_mask is not None
    laid = call.image(image) if by_position and image is not None else None
    made = None
    if hopper.on_hopper(g, points, call.precision):
        made = hopper.along_launch(g, points.dtype, multiprocessors_of(points.device))
    tensors: tuple[Tensor | None, ...] = (call.offset, call.mask, grad_offset, grad_mask)
    if made is None or not made(
        laid, call.rows(points), call.fragments("along"), *tensors, grad_image
    ):
        placed, last = call.points(points)
        key = (points.element_size(), call.precision, last, by_image, by_position)
        launch = _spread_launch(g, *key, multiprocessors_of(points.device))
        launch(laid, placed, call.weight(), *tensors, grad_image)
    return _given(call, grad_image, grad_offset, grad_mask, bias, like)


def _narrow_gradients(
    call: Call, image: Tensor, points: Tensor, weight: Tensor, needs: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, ...] | None:
    """Derivatives by image (through atomic additions), weight, offset and mask by one kernel of
    gluon_narrow.py; None where that cannot be had."""
    g = call.g
    made = hopper.gradients_narrow_launch(g, image.dtype, multiprocessors_of(image.device))
    if made is None:
        return None
    by_image, by_weight, by_offset, by_mask = needs
    twice = made.launch.constants["TWICE"]
    grads = _room(call, (by_image, by_offset, by_mask), image.device, twice)
    parts = None
    if by_weight:
        shape = (made.launch.grid[1], weights_of(g))
        parts = torch.empty(shape, dtype=torch.float32, device=image.device)
    rows = call.factors(points) if call.precision == "split" else call.rows(points)
    packed = call.fragments("along", made.launch.constants["RUN"])
    rows = rows.view(-1, g.point_channels)
    if not made(
        call.image(image), rows, packed, call.offset, call.mask, grads[1], grads[2], grads[0], parts
    ):
        return None
    grad_image = grads[0]
    if twice and grad_image is not None:  # gluon_narrow.py, _add_corners
        length = g.batch * image_rows(g)
        start = (length // 4 | 1) * 4
        grad_image = grad_image[:length].add_(grad_image[start : start + length])
    by_image_offset_mask = _given(call, grad_image, *grads[1:], None, image)
    grad_weight = None
    if parts is not None:
        grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        _sum_weights(g, parts, grad_weight)
    return (by_image_offset_mask[0], grad_weight, *by_image_offset_mask[1:])


def _room(
    call: Call, needs: tuple[bool, bool, bool], device: torch.device, twice: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Where kernels put derivatives by image (zeros; two copies with `twice`), offset and mask."""
    g = call.g
    by_image, by_offset, by_mask = needs
    grad_image = grad_offset = grad_mask = None
    if by_image:
        length = g.batch * image_rows(g)
        length += twice * (length + 8)
        grad_image = torch.zeros(length, dtype=torch.float32, device=device)
    if by_offset and call.offset is not None:
        grad_offset = _by_unit(g, call.offset, g.offset_groups)
    if by_mask and call.mask is not None:
        grad_mask = _by_unit(g, call.mask, g.mask_groups)
    return grad_image, grad_offset, grad_mask


def _given(
    call: Call,
    grad_image: Tensor | None,
    grad_offset: Tensor | None,
    grad_mask: Tensor | None,
    bias: Tensor | None,
    like: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What _room had made, as the caller gets it."""
    g, units = call.g, call.units
    result = None
    if grad_image is not None:
        result = _image_like(g, grad_image, bias, "planes" if units.narrow else "rows", like)
    if grad_offset is not None and call.offset is not None:
        grad_offset = _sum_units(g, grad_offset, call.offset, g.offset_groups)
    if grad_mask is not None and call.mask is not None:
        grad_mask = _sum_units(g, grad_mask, call.mask, g.mask_groups)
    return result, grad_offset, grad_mask


def _by_unit(g: Geometry, like: Tensor, groups: int) -> Tensor:
    """A gradient like `like`, but of each unit where a group has several."""
    count = units_of(g).number
    if count == groups:
        return torch.empty_like(like)
    return like.new_empty(like.numel() * (count // groups), dtype=torch.float32)


def _sum_units(g: Geometry, grad: Tensor, like: Tensor, groups: int) -> Tensor:
    count = units_of(g).number
    if count == groups:
        return grad
    return grad.view(g.batch, groups, count // groups, -1).sum(2).view(like.shape).to(like.dtype)


def _image_like(
    g: Geometry, laid: Tensor, bias: Tensor | None, layout: str, like: Tensor
) -> Tensor:
    """An image in the dtype and memory format of `like` from one laid out for the kernels."""
    form = memory_format(like)
    last = form is not torch.contiguous_format
    shape = (g.batch, g.image_channels, *g.image_size)
    if layout == "rows" and laid.dtype == like.dtype and bias is None:
        if last or g.image_channels == 1:
            rows = laid.view(g.batch, *g.image_size, g.image_channels).movedim(-1, 1)
            return rows if last else rows.view(shape)
    out = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=form)
    units = units_of(g)
    if not units.narrow:
        units = Units(g.image_channels, 1, False, g.image_channels)
    relayout(laid, out, bias, units, layout, "rows" if last else "channels", pixels_of(out))
    return out


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
    row, units, block_c = _blocks(g, "spread", width, g.point_channels // g.groups)
    positions, taps = math.prod(g.point_size), math.prod(g.kernel)
    block_o = fit(_outputs_of(g, units * block_c), row.block_o)
    tiles = triton.cdiv(positions, row.block_p)
    splits = max(1, min(taps, 4 * multiprocessors // (g.batch * tiles)))
    return Launch(
        "spread",
        (g.batch * tiles, splits, 1),
        (sizes_of(g), *channels_of(g), weights_of(g), tiles, splits),
        dict(
            POINTS_LAST=last,
            **constants_of(g, precision, image_rows(g)),
            EVEN=units_of(g).length % block_c == 0,
            HOLD=g.groups == 1 and g.point_channels <= block_o,
            UNITS=units,
            BLOCK_P=row.block_p,
            BLOCK_O=block_o,
            BLOCK_C=block_c,
        ),
        row.warps,
        row.stages,
    )


def _by_inverse(g: Geometry, like: Tensor) -> bool:
    """Whether the image gradient goes by inverse gather.

    It is bitwise repeatable if the lists are in order. For half numbers it is also faster than
    atomic additions, unless few channels share the cost of a list; for float32 it has more
    products to split (kernels.py, Note [precision]), so it is slower and less accurate.
    """
    if torch.are_deterministic_algorithms_enabled():
        return True
    return like.element_size() == 2 and units_of(g).length > configs.NARROW


def _inverse(call: Call, points: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    """Derivative by the image, in the memory format of `like`."""
    g = call.g
    plan = _list_plan(g, torch.are_deterministic_algorithms_enabled())
    tiles, segments = plan.tiles, plan.segments
    counts = torch.zeros(plan.counts, dtype=torch.int32, device=points.device)
    entries = torch.empty(plan.entries, dtype=torch.int32, device=points.device)
    index = torch.int32 if plan.entries < 2**31 else torch.int64
    count, fill = plan.launches
    count(call.offset, counts, None, None)
    ends = torch.cumsum(counts, 0, dtype=index)
    fill(call.offset, counts, ends, entries)
    laid = torch.empty(
        (g.batch, *g.image_size, g.image_channels), dtype=points.dtype, device=points.device
    )
    rows = call.rows(points)
    _inverse_launch(g, points.element_size(), call.precision, tiles, segments)(
        rows, call.weight(), call.offset, call.mask, bias, ends, entries, laid
    )
    return _image_like(g, laid, None, "rows", like)


class _ListPlan(NamedTuple):
    tiles: int
    segments: int
    counts: int
    entries: int  # at most
    launches: tuple[Launch, Launch]


@functools.lru_cache(maxsize=4096)
def _list_plan(g: Geometry, ordered: bool) -> _ListPlan:
    tile = configs.TILES[len(g.kernel)]
    tiles = math.prod(-(-s // t) for s, t in zip(g.image_size, tile, strict=True))
    owners = g.batch * max(g.offset_groups, 1) * math.prod(g.kernel)
    positions, block = math.prod(g.point_size), configs.LISTED
    # Programs a list: in order, each has counts of its own, so no more than fill a device.
    programs = -(-positions // block)
    if ordered:
        programs = min(programs, max(1, -(-512 // owners)))
    segment = -(-positions // programs // block) * block
    segments = -(-positions // segment) if ordered else 1
    return _ListPlan(
        tiles,
        segments,
        owners * tiles * segments,
        owners * positions * 2 ** len(g.kernel),
        _bucket_launches(g, tiles, ordered, segment),
    )


@functools.lru_cache(maxsize=4096)
def _bucket_launches(g: Geometry, tiles: int, ordered: bool, segment: int) -> tuple[Launch, Launch]:
    """The passes that count and fill; a program takes `segment` positions."""
    segments = triton.cdiv(math.prod(g.point_size), segment)
    groups = max(g.offset_groups, 1)
    owners = g.batch * groups * math.prod(g.kernel)
    block = configs.LISTED

    def launch(fill: bool) -> Launch:
        return Launch(
            "bucket",
            (owners * segments, 1, 1),
            (sizes_of(g), groups, tiles, segments, segment),
            dict(
                FILL=fill,
                ORDERED=ordered,
                KEY=tl.int32 if (tiles + 1) * block < 2**31 else tl.int64,
                TILE=configs.TILES[len(g.kernel)],
                BLOCK=block,
            ),
            4,
            1,
        )

    return launch(False), launch(True)


@functools.lru_cache(maxsize=4096)
def _inverse_launch(g: Geometry, width: int, precision: str, tiles: int, segments: int) -> Launch:
    units = units_of(g)
    row = configs.find("inverse", width, units.length)
    tile = configs.TILES[len(g.kernel)]
    block_c = fit(units.length, row.block_c)
    constants = constants_of(g, precision, math.prod(g.point_size) * g.point_channels)
    return Launch(
        "inverse",
        (g.batch * units.number * tiles, triton.cdiv(units.length, block_c), 1),
        (sizes_of(g), *channels_of(g), weights_of(g), tiles, segments),
        dict(
            **constants,
            TILE=tile,
            PIXELS=math.prod(tile),
            BLOCK_E=row.block_p,
            BLOCK_O=fit(g.point_channels // g.groups, row.block_o),
            BLOCK_C=block_c,
        ),
        row.warps,
        row.stages,
    )


def _weight_gradient(call: Call, image: Tensor, points: Tensor, weight: Tensor) -> Tensor:
    g = call.g
    taps, group_in = math.prod(g.kernel), g.image_channels // g.groups
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    multiprocessors = multiprocessors_of(image.device)
    if call.precision == "split" and hopper.on_hopper(g, image, "split") and group_in % 64 == 0:
        made = hopper.outer_launch(g, multiprocessors)
        splits = made.launch.grid[2]
        parts = image.new_empty(splits, weights_of(g), dtype=torch.float32)
        if made(call.image(image), call.factors(points), call.offset, call.mask, parts):
            sizes, strides = (taps, group_in, g.point_channels), (1, taps, group_in * taps)
            _reduce_launch(splits, sizes, strides)(parts, None, out)
            return out
    placed, last = call.points(points)
    key = (image.element_size(), call.precision, last, multiprocessors)
    launch, splits = _weight_launch(g, *key)
    parts = image.new_empty(splits, weights_of(g), dtype=torch.float32)
    launch(call.image(image), placed, call.offset, call.mask, parts)
    _sum_weights(g, parts, out)
    return out


def _sum_weights(g: Geometry, parts: Tensor, out: Tensor) -> None:
    """Sum partial results [splits, K, O, C / groups] to a weight's gradient."""
    taps, group_in = math.prod(g.kernel), g.image_channels // g.groups
    sizes, strides = (taps, g.point_channels, group_in), (1, group_in * taps, taps)
    _reduce_launch(parts.shape[0], sizes, strides)(parts, None, out)


@functools.lru_cache(maxsize=4096)
def _weight_launch(
    g: Geometry, width: int, precision: str, last: bool, multiprocessors: int
) -> tuple[Launch, int]:
    units = units_of(g)
    row, at_once, block_c = _blocks(g, "weight", width, g.point_channels // g.groups)
    positions, taps = math.prod(g.point_size), math.prod(g.kernel)
    tiles = triton.cdiv(positions, row.block_p)
    if units.narrow:
        blocks, channels = triton.cdiv(units.number, at_once), at_once * units.length
    else:
        blocks, channels = units.number * triton.cdiv(units.length, block_c), block_c
    outputs = _outputs_of(g, channels)
    block_o = fit(outputs, row.block_o)
    over = triton.cdiv(outputs, block_o)
    splits = max(1, min(g.batch * tiles, 4 * multiprocessors // (taps * blocks * over)))
    launch = Launch(
        "weight_gradient",
        (taps * blocks, over, splits),
        (sizes_of(g), g.batch, *channels_of(g), tiles, blocks, splits),
        dict(
            POINTS_LAST=last,
            **constants_of(g, precision, image_rows(g)),
            EVEN=units.length % block_c == 0,
            UNITS=at_once,
            BLOCK_P=row.block_p,
            BLOCK_O=block_o,
            BLOCK_C=block_c,
        ),
        row.warps,
        row.stages,
    )
    return launch, splits
