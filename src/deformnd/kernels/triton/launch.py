"""Runs the Triton kernels: the functions of reference.py for CUDA and ROCm tensors.

Kernels are compiled once per dtype and kind of call, not per size, and launched without
Triton's argument binder. Tensors of float64 take the reference.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import ASTSource

from .. import reference
from ..geometry import Geometry, memory_format
from . import configs, kernels

try:  # Gluon's interface may yet change; without it everything runs on the kernels above.
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from . import gluon
except Exception:
    gluon = None  # type: ignore[assignment]


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
        return _gather(_Call.of(g, image, offset, mask, weight), image, bias, image)


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
        call = _Call.of(g, points, offset, mask, weight)
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
        call = _Call.of(g, image, offset, mask, weight)
        if by_image and _by_inverse(g, image):
            call.rows(points)  # first, so that all kernels use them
        if by_points:
            out[1] = _gather(call, image, None, points)
        if by_weight:
            out[2] = _weight_gradient(call, image, points, weight)
        atomics = by_image and not _by_inverse(g, image)
        if by_offset or by_mask or atomics:
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


# Layouts (kernels.py, Note [units])


class _Units(NamedTuple):
    """How a call's image channels split into units."""

    length: int
    number: int
    narrow: bool
    padded: int  # length of a unit in memory


@functools.lru_cache(maxsize=4096)
def _units(g: Geometry) -> _Units:
    channels = g.image_channels
    length = math.gcd(channels // max(g.offset_groups, 1), channels // max(g.mask_groups, 1))
    number = channels // length
    narrow = number > 1 and length <= configs.NARROW
    return _Units(length, number, narrow, triton.next_power_of_2(length) if narrow else length)


def _precision(g: Geometry, dtype: torch.dtype) -> str:
    """See kernels.py, Note [precision]."""
    if dtype != torch.float32:
        return "native"
    # With narrow units the gathers cost most, and Triton 3.6 cannot compile TF32 weight gradients.
    if _allows_tf32() and not _units(g).narrow:
        return "tf32"
    per_group = g.image_channels * g.point_channels // g.groups**2
    return "ieee" if per_group < configs.FEW else "split"


class _Call:
    """What the operators of one call share: contiguous tensors, layouts made at most once."""

    def __init__(
        self, g: Geometry, offset: Tensor | None, mask: Tensor | None, weight: Tensor
    ) -> None:
        self.g = g
        self.offset = offset
        self.mask = mask
        self._weight = weight
        self.units = _units(g)
        self.precision = _precision(g, weight.dtype)
        self._packed: Tensor | None = None
        self._image: tuple[Tensor, Tensor] | None = None
        self._rows: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(
        cls, g: Geometry, like: Tensor, offset: Tensor | None, mask: Tensor | None, weight: Tensor
    ) -> _Call:
        return cls(
            g,
            None if offset is None else _contiguous(offset),
            None if mask is None else _contiguous(mask),
            weight.to(like.dtype),
        )

    def weight(self) -> Tensor:
        """[K, O, C / groups], or its bfloat16 heads and tails [2, K, O, C / groups]."""
        if self._packed is None:
            self._packed = _pack_weight(self.g, self._weight, self.precision == "split")
        return self._packed

    def fragments(self, order: str) -> Tensor:
        """As gluon.py takes it: rows of channels."""
        packed = _pack_weight(self.g, self._weight, self.precision == "split", order)
        return packed.view(-1, self.g.image_channels)

    def image(self, image: Tensor) -> Tensor:
        """As rows [B, S, C], or as planes [B, units, S, padded] if the units are narrow."""
        if self._image is None or self._image[0] is not image:
            if self.units.narrow:
                laid = _planes(image, self.units)
            else:
                laid = _as_rows(image)
            self._image = (image, laid)
        return self._image[1]

    def rows(self, points: Tensor) -> Tensor:
        """Points as rows [B, P, O]."""
        if self._rows is None or self._rows[0] is not points:
            self._rows = (points, _as_rows(points))
        return self._rows[1]

    def factors(self, points: Tensor) -> Tensor:
        """Points as bfloat16 heads and tails of rows [2 x B x P, O] (kernels.py, precision)."""
        last = points.movedim(1, -1).is_contiguous()
        source = _aligned(points if last or points.is_contiguous() else points.contiguous())
        channels = points.shape[1]
        out = points.new_empty(2 * points.numel() // channels, channels, dtype=torch.bfloat16)
        whole = _Units(channels, 1, False, channels)
        layout = "rows" if last else "channels"
        _relayout_launch(whole, layout, "rows", points.shape[0], _pixels(points), True)(
            source, out, None
        )
        return out

    def points(self, points: Tensor) -> tuple[Tensor, bool]:
        """Points as rows or as they are [B, O, P], and which."""
        if self._rows is not None and self._rows[0] is points:
            return self._rows[1], True
        if points.movedim(1, -1).is_contiguous():
            return _aligned(points), True
        return _contiguous(points), False


def _aligned(t: Tensor) -> Tensor:
    """Kernels are compiled for pointers to multiples of 16 bytes."""
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _contiguous(t: Tensor) -> Tensor:
    """Contiguous, by our own copy kernel where the channels are last."""
    if t.is_contiguous():
        return _aligned(t)
    if t.movedim(1, -1).is_contiguous():
        source = _aligned(t)
        out = torch.empty_like(t, memory_format=torch.contiguous_format)
        whole = _Units(t.shape[1], 1, False, t.shape[1])
        _relayout(source, out, None, whole, "rows", "channels", _pixels(t))
        return out
    return t.contiguous()


def _as_rows(t: Tensor) -> Tensor:
    """Channels last: the tensor itself if it is so, else a copy."""
    if t.movedim(1, -1).is_contiguous():
        return _aligned(t)
    source = t if t.is_contiguous() else t.contiguous()
    out = t.new_empty(t.shape[0], *t.shape[2:], t.shape[1])
    whole = _Units(t.shape[1], 1, False, t.shape[1])
    _relayout(_aligned(source), out, None, whole, "channels", "rows", _pixels(t))
    return out


def _planes(t: Tensor, units: _Units) -> Tensor:
    out = t.new_empty(t.shape[0], units.number, _pixels(t), units.padded)
    last = t.movedim(1, -1).is_contiguous()
    source = t if last or t.is_contiguous() else t.contiguous()
    if units.padded == 1 and not last:
        return _aligned(source)
    _relayout(
        _aligned(source), out, None, units, "rows" if last else "channels", "planes", _pixels(t)
    )
    return out


def _pixels(t: Tensor) -> int:
    return math.prod(t.shape[2:])


def _relayout(
    source: Tensor,
    out: Tensor,
    bias: Tensor | None,
    units: _Units,
    layout_from: str,
    layout_to: str,
    pixels: int,
) -> None:
    """Copy between "channels" [B, C, S], "rows" [B, S, C] and "planes" [B, units, S, padded]."""
    launch = _relayout_launch(units, layout_from, layout_to, out.shape[0], pixels)
    launch(source, out, bias)


def _strides(units: _Units, layout: str, pixels: int) -> tuple[int, int, int]:
    """Of a batch item, a unit, and a pixel (of a channel in "channels")."""
    channels = units.length * units.number
    if layout == "channels":
        return channels * pixels, units.length * pixels, pixels
    if layout == "rows":
        return channels * pixels, units.length, channels
    return units.number * pixels * units.padded, pixels * units.padded, units.padded


@functools.lru_cache(maxsize=4096)
def _relayout_launch(
    units: _Units, source: str, to: str, batch: int, pixels: int, split: bool = False
) -> _Launch:
    block_c = _fit(units.padded, 64, least=1)
    block_p = 4096 // max(block_c, 32)
    blocks = triton.cdiv(pixels, block_p)
    # What divides every distance between the channels of different pixels and units.
    pitches = [s for x in (source, to) if x != "channels" for s in _strides(units, x, pixels)]
    pad = units.padded if to == "planes" and units.padded != units.length else 0
    return _Launch(
        "relayout",
        (blocks * units.number * batch, triton.cdiv(units.padded, block_c), 1),
        (
            pixels,
            units.number,
            units.length,
            *_strides(units, source, pixels),
            *_strides(units, to, pixels),
            blocks,
        ),
        dict(
            FROM_LAST=source != "channels",
            TO_LAST=to != "channels",
            VECTOR_C=math.gcd(16, units.length, *pitches),
            VECTOR_P=next(v for v in (16, 4, 1) if pixels % v == 0),  # few kernels
            BLOCK_P=block_p,
            BLOCK_C=block_c,
            PAD=pad,
            SPLIT=split,
        ),
        4,
        1,
    )


def _pack_weight(g: Geometry, weight: Tensor, split: bool, order: str = "") -> Tensor:
    """[K, O, C / groups], or bfloat16 heads and tails of that (kernels.py, pack_weight)."""
    last = not weight.is_contiguous() and weight.movedim(1, -1).is_contiguous()
    weight = _aligned(weight if last else weight.contiguous())
    if math.prod(g.kernel) == 1 and not split and not order:
        return weight
    dtype = torch.bfloat16 if split else weight.dtype
    out = weight.new_empty((1 + split) * weight.numel(), dtype=dtype)
    _pack_launch(g, last, split, order)(weight, out)
    return out


@functools.lru_cache(maxsize=4096)
def _pack_launch(g: Geometry, last: bool, split: bool, order: str) -> _Launch:
    group_in, taps = g.image_channels // g.groups, math.prod(g.kernel)
    block_k = _fit(taps, 64, least=1)
    block_c = 2048 // max(block_k, 16)
    blocks = triton.cdiv(group_in, block_c)
    return _Launch(
        "pack_weight",
        (g.point_channels * blocks, triton.cdiv(taps, block_k), 1),
        (taps, g.point_channels, group_in, _weights(g), blocks),
        dict(LAST=last, SPLIT=split, ORDER=order, BLOCK_C=block_c, BLOCK_K=block_k),
        4,
        1,
    )


# Operators


def _gather(call: _Call, image: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    """In the memory format of `like`."""
    g = call.g
    form = memory_format(like)
    last = form is not torch.contiguous_format
    shape = (g.batch, g.point_channels, *g.point_size)
    out = torch.empty(shape, dtype=image.dtype, device=image.device, memory_format=form)
    if _on_hopper(g, image, call.precision):
        made = _hopper_gather_launch(g, image.dtype, last, _multiprocessors(image.device))
        if made is not None and made(
            call.image(image), call.fragments("gather"), call.offset, call.mask, bias, out
        ):
            return out
    key = (image.element_size(), call.precision, last, _multiprocessors(image.device))
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


def _sizes(g: Geometry) -> tuple[tuple[int, ...], ...]:
    return (g.image_size, g.point_size, g.kernel, g.stride, g.padding, g.dilation)


def _channels(g: Geometry) -> tuple[int, ...]:
    """The arguments channels .. mask_units of the kernels."""
    units = _units(g)
    return (
        g.image_channels,
        units.length,
        g.point_channels,
        g.image_channels // g.groups,
        g.point_channels // g.groups,
        units.number // max(g.offset_groups, 1),
        units.number // max(g.mask_groups, 1),
    )


def _weights(g: Geometry) -> int:
    return math.prod(g.kernel) * g.point_channels * g.image_channels // g.groups


def _constants(g: Geometry, precision: str, rows: int) -> dict[str, Any]:
    """`rows` is the largest number of elements that is indexed within a batch item."""
    units = _units(g)
    group_in, group_out = g.image_channels // g.groups, g.point_channels // g.groups
    return dict(
        GROUPED=g.groups > 1,
        PRECISION=precision,
        INDEX=tl.int32 if rows < 2**31 else tl.int64,
        VECTOR_C=math.gcd(16, units.length, group_in, g.image_channels),
        VECTOR_O=math.gcd(16, group_out),
    )


def _blocks(g: Geometry, operator: str, width: int, channels: int) -> tuple[configs.Row, int, int]:
    """The table's row, UNITS and BLOCK_C."""
    units = _units(g)
    row = configs.find(operator + " narrow" if units.narrow else operator, width, channels)
    if not units.narrow:
        return row, 1, _fit(units.length, row.block_c)
    # At least the lanes of _LEAST.
    at_once = min(row.block_c // units.padded, triton.next_power_of_2(units.number))
    return row, max(at_once, min(_LEAST, row.block_c) // units.padded, 2), units.padded


def _outputs_of(g: Geometry, channels: int) -> int:
    """The most point channels whose groups a block of image channels can meet."""
    group_in, group_out = g.image_channels // g.groups, g.point_channels // g.groups
    if channels % group_in == 0 or group_in % channels == 0:
        met = max(channels // group_in, 1)
    else:
        met = (channels - 1) // group_in + 2
    return min(met, g.groups) * group_out


# Channels of a block at least: a product needs 16, and 32 fill a sector of memory.
_LEAST = 32


def _fit(size: int, block: int, least: int = _LEAST) -> int:
    return int(min(block, max(least, triton.next_power_of_2(size))))


def _image_rows(g: Geometry) -> int:
    units = _units(g)
    return math.prod(g.image_size) * units.number * units.padded


@functools.lru_cache(maxsize=4096)
def _gather_launch(
    g: Geometry, width: int, precision: str, last: bool, multiprocessors: int
) -> tuple[_Launch, int]:
    group_out = g.point_channels // g.groups
    row, units, block_c = _blocks(g, "gather", width, group_out)
    positions, taps = math.prod(g.point_size), math.prod(g.kernel)
    block_o = _fit(g.point_channels, row.block_o)
    tiles, blocks = triton.cdiv(positions, row.block_p), triton.cdiv(g.point_channels, block_o)
    programs = g.batch * tiles * blocks
    splits = 1
    # A short sum is not worth a second kernel.
    if 2 * programs <= multiprocessors and taps * triton.cdiv(g.image_channels, block_c) >= 16:
        splits = min(taps, multiprocessors // programs)
    launch = _Launch(
        "gather",
        (programs, splits, 1),
        (_sizes(g), *_channels(g), _weights(g), tiles, blocks, splits),
        dict(
            POINTS_LAST=last,
            **_constants(g, precision, _image_rows(g)),
            EVEN=g.groups == 1 and _units(g).length % block_c == 0,
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
) -> _Launch:
    count = math.prod(sizes)
    return _Launch(
        "reduce",
        (triton.cdiv(count, 1024), 1, 1),
        (count, splits, sizes, strides),
        dict(INDEX=tl.int32 if count * splits < 2**31 else tl.int64, BLOCK=1024),
        4,
        1,
    )


def _spread(
    call: _Call,
    image: Tensor | None,
    points: Tensor,
    bias: Tensor | None,
    needs: tuple[bool, bool, bool],
    like: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Derivatives by image (through atomic additions), offset and mask; image as `like`."""
    g, units = call.g, call.units
    by_image, by_offset, by_mask = needs
    grad_offset = grad_mask = grad_image = None
    if by_offset and call.offset is not None:
        grad_offset = _by_unit(g, call.offset, g.offset_groups)
    if by_mask and call.mask is not None:
        grad_mask = _by_unit(g, call.mask, g.mask_groups)
    pixels = math.prod(g.image_size)
    if by_image:
        shape = (g.batch, units.number * units.padded * pixels)
        grad_image = torch.zeros(shape, dtype=torch.float32, device=points.device)
    by_position = grad_offset is not None or grad_mask is not None
    laid = call.image(image) if by_position and image is not None else None
    made = None
    if _on_hopper(g, points, call.precision):
        made = _hopper_along_launch(g, points.dtype, _multiprocessors(points.device))
    tensors: tuple[Tensor | None, ...] = (call.offset, call.mask, grad_offset, grad_mask)
    if made is None or not made(
        laid, call.rows(points), call.fragments("along"), *tensors, grad_image
    ):
        placed, last = call.points(points)
        key = (points.element_size(), call.precision, last, by_image, by_position)
        launch = _spread_launch(g, *key, _multiprocessors(points.device))
        launch(laid, placed, call.weight(), *tensors, grad_image)
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
    count = _units(g).number
    if count == groups:
        return torch.empty_like(like)
    return like.new_empty(like.numel() * (count // groups), dtype=torch.float32)


def _sum_units(g: Geometry, grad: Tensor, like: Tensor, groups: int) -> Tensor:
    count = _units(g).number
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
    units = _units(g)
    if not units.narrow:
        units = _Units(g.image_channels, 1, False, g.image_channels)
    _relayout(laid, out, bias, units, layout, "rows" if last else "channels", _pixels(out))
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
) -> _Launch:
    row, units, block_c = _blocks(g, "spread", width, g.point_channels // g.groups)
    positions, taps = math.prod(g.point_size), math.prod(g.kernel)
    block_o = _fit(_outputs_of(g, units * block_c), row.block_o)
    tiles = triton.cdiv(positions, row.block_p)
    splits = max(1, min(taps, 4 * multiprocessors // (g.batch * tiles)))
    return _Launch(
        "spread",
        (g.batch * tiles, splits, 1),
        (_sizes(g), *_channels(g), _weights(g), tiles, splits),
        dict(
            POINTS_LAST=last,
            **_constants(g, precision, _image_rows(g)),
            EVEN=_units(g).length % block_c == 0,
            HOLD=g.groups == 1 and g.point_channels <= block_o,
            UNITS=units,
            BLOCK_P=row.block_p,
            BLOCK_O=block_o,
            BLOCK_C=block_c,
        ),
        row.warps,
        row.stages,
    )


# Hopper


def _on_hopper(g: Geometry, like: Tensor, precision: str) -> bool:
    """Whether gluon.py can take the call: one group, one unit, sizes that fit."""
    return (
        gluon is not None
        and like.is_cuda
        and precision in ("native", "split")
        and _capability(like.device) == (9, 0)
        and g.groups == 1
        and _units(g).number == 1
        and g.offset_groups == 1
        and g.image_channels % 32 == 0
        and g.point_channels % 64 == 0
        and max(_image_rows(g), math.prod(g.point_size) * g.point_channels) < 2**31
        and math.prod(g.image_size) * 2 ** len(g.image_size) < 2**31
        and 2 * g.batch * math.prod(g.point_size) < 2**31
    )


class _HopperLaunch:
    """A Gluon kernel; calling it says whether it ran. One that cannot be compiled never does."""

    def __init__(self, launch: _Launch, block: tuple[int, int], layout: Any) -> None:
        self.launch = launch
        self.block = list(block)
        self.layout = layout

    def __call__(self, *tensors: Tensor | None) -> bool:
        key = (self.launch.kernel, self.launch.constants.get("SPLIT", True))
        if key in _BROKEN:
            return False
        given: list[Any] = list(tensors)
        at = self.launch.descriptor
        assert at is not None
        given[at] = TensorDescriptor.from_tensor(given[at], self.block, self.layout)
        try:
            self.launch(*given)
        except Exception as failure:
            _BROKEN.add(key)
            warnings.warn(f"deformnd: {self.launch.kernel} of gluon.py: {failure}", stacklevel=2)
            return False
        return True


_BROKEN: set[tuple[str, bool]] = set()


def _columns_layout(rows: int, channels: int, warps: int, run: int = 8) -> Any:
    """Eight consecutive channels to a lane, as wgmma has them (gluon.py), or twice four."""
    registers = [[0, 1], [0, 2], [0, 12 - run]]
    registers += [[0, 32 << i] for i in range((channels // 32).bit_length() - 1)] + [[8, 0]]
    lanes = [[0, run], [0, 16], [1, 0], [2, 0], [4, 0]]
    warp = [[16 << i, 0] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, warp, [], [rows, channels])


def _mma_layout(columns: int, warps: int) -> Any:
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, columns, 16]
    )


def _shared_layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    """Of a block of a factor, whose dtype is bfloat16 where float32 numbers are split."""
    kind = gl.float16 if dtype == torch.float16 else gl.bfloat16
    return gl.NVMMASharedLayout.get_default_for([rows, columns], kind)


@functools.lru_cache(maxsize=4096)
def _hopper_gather_launch(
    g: Geometry, dtype: torch.dtype, last: bool, multiprocessors: int
) -> _HopperLaunch | None:
    row = configs.find_hopper("gather", dtype.itemsize, g.point_channels)
    block_p = 16 * row.warps
    block_o = math.gcd(row.block_o, g.point_channels)
    # Eight corners of 32 channels take the registers of four of 64.
    block_c = math.gcd(row.block_c if len(g.kernel) < 3 else 32, g.image_channels)
    tiles = triton.cdiv(math.prod(g.point_size), block_p)
    blocks = g.point_channels // block_o
    if g.batch * tiles * blocks < multiprocessors:
        return None  # the Triton kernel has more warps to a program, and may split the sum
    launch = _Launch(
        "gather",
        (g.batch * tiles * blocks, 1, 1),
        (_sizes(g), g.image_channels, g.point_channels, tiles, blocks),
        dict(
            POINTS_LAST=last,
            SPLIT=dtype == torch.float32,
            BLOCK_P=block_p,
            BLOCK_O=block_o,
            BLOCK_C=block_c,
            STAGES=row.stages,
            MMA=_mma_layout(block_o, row.warps),
            COLUMNS=_columns_layout(block_p, block_c, row.warps),
            ROWS=_columns_layout(block_p, block_o, row.warps),
            PLANES=gl.BlockedLayout([2, 1], [32, 1], [block_p // 64, row.warps * 64 // block_p],
                                    [0, 1]),
            num_warps=row.warps,
        ),
        row.warps,
        1,
        descriptor=1,
    )  # fmt: skip
    return _HopperLaunch(launch, (block_o, block_c), _shared_layout(block_o, block_c, dtype))


@functools.lru_cache(maxsize=4096)
def _hopper_along_launch(
    g: Geometry, dtype: torch.dtype, multiprocessors: int
) -> _HopperLaunch | None:
    block_o = g.point_channels
    if block_o > 256 or block_o & (block_o - 1):
        return None
    row = configs.find_hopper("along", dtype.itemsize, g.point_channels)
    block_p = 16 * row.warps
    block_c = math.gcd(row.block_c if len(g.kernel) < 3 else 32, g.image_channels)
    tiles = triton.cdiv(math.prod(g.point_size), block_p)
    taps = math.prod(g.kernel)
    splits = max(1, min(taps, 2 * multiprocessors // (g.batch * tiles)))
    across = min(32, block_o // 8)
    launch = _Launch(
        "along",
        (g.batch * tiles, splits, 1),
        (_sizes(g), g.image_channels, g.point_channels, tiles, splits),
        dict(
            SPLIT=dtype == torch.float32,
            BLOCK_P=block_p,
            BLOCK_O=block_o,
            BLOCK_C=block_c,
            STAGES=row.stages,
            MMA=_mma_layout(block_c, row.warps),
            COLUMNS=_columns_layout(block_p, block_c, row.warps),
            SECTORS=_columns_layout(block_p, block_c, row.warps, 4),
            ROWS=gl.BlockedLayout([1, 8], [32 // across, across], [row.warps, 1], [1, 0]),
            num_warps=row.warps,
        ),
        row.warps,
        1,
        descriptor=2,
    )
    return _HopperLaunch(launch, (block_o, block_c), _shared_layout(block_o, block_c, dtype))


@functools.lru_cache(maxsize=4096)
def _hopper_outer_launch(g: Geometry, multiprocessors: int) -> _HopperLaunch:
    row = configs.find_hopper("outer", 4, g.point_channels)
    block_o = math.gcd(row.block_o, g.point_channels)
    block_c, block_p = math.gcd(row.block_c, g.image_channels), 64
    taps, tiles = math.prod(g.kernel), triton.cdiv(math.prod(g.point_size), block_p)
    programs = taps * (g.image_channels // block_c) * (g.point_channels // block_o)
    splits = max(1, min(g.batch * tiles // 8, row.programs * multiprocessors // programs))
    # Whole warp groups along the channels, the rest along the point channels.
    along = 4 * max(1, min(block_c // 64, row.warps // 4))
    launch = _Launch(
        "outer",
        (taps * (g.image_channels // block_c), g.point_channels // block_o, splits),
        (_sizes(g), g.batch, g.image_channels, g.point_channels, tiles, splits),
        dict(
            BLOCK_P=block_p,
            BLOCK_O=block_o,
            BLOCK_C=block_c,
            STAGES=row.stages,
            MMA=gl.NVMMADistributedLayout(
                version=[3, 0],
                warps_per_cta=[along, row.warps // along],
                instr_shape=[16, block_o // (row.warps // along), 16],
            ),
            COLUMNS=gl.BlockedLayout([1, 8], [256 // block_c, block_c // 8], [row.warps, 1],
                                     [1, 0]),
            num_warps=row.warps,
        ),
        row.warps,
        1,
        descriptor=1,
    )  # fmt: skip
    return _HopperLaunch(
        launch, (block_p, block_o), _shared_layout(block_p, block_o, torch.float32)
    )


def _by_inverse(g: Geometry, like: Tensor) -> bool:
    """Whether the image gradient goes by inverse gather.

    It is bitwise repeatable if the lists are in order. For half numbers it is also faster than
    atomic additions, unless few channels share the cost of a list; for float32 it has more
    products to split (kernels.py, Note [precision]), so it is slower and less accurate.
    """
    if torch.are_deterministic_algorithms_enabled():
        return True
    return like.element_size() == 2 and _units(g).length > configs.NARROW


def _inverse(call: _Call, points: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
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
    launches: tuple[_Launch, _Launch]


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
def _bucket_launches(
    g: Geometry, tiles: int, ordered: bool, segment: int
) -> tuple[_Launch, _Launch]:
    """The passes that count and fill; a program takes `segment` positions."""
    segments = triton.cdiv(math.prod(g.point_size), segment)
    groups = max(g.offset_groups, 1)
    owners = g.batch * groups * math.prod(g.kernel)
    block = configs.LISTED

    def launch(fill: bool) -> _Launch:
        return _Launch(
            "bucket",
            (owners * segments, 1, 1),
            (_sizes(g), groups, tiles, segments, segment),
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
def _inverse_launch(g: Geometry, width: int, precision: str, tiles: int, segments: int) -> _Launch:
    units = _units(g)
    row = configs.find("inverse", width, units.length)
    tile = configs.TILES[len(g.kernel)]
    block_c = _fit(units.length, row.block_c)
    constants = _constants(g, precision, math.prod(g.point_size) * g.point_channels)
    return _Launch(
        "inverse",
        (g.batch * units.number * tiles, triton.cdiv(units.length, block_c), 1),
        (_sizes(g), *_channels(g), _weights(g), tiles, segments),
        dict(
            **constants,
            TILE=tile,
            PIXELS=math.prod(tile),
            BLOCK_E=row.block_p,
            BLOCK_O=_fit(g.point_channels // g.groups, row.block_o),
            BLOCK_C=block_c,
        ),
        row.warps,
        row.stages,
    )


def _weight_gradient(call: _Call, image: Tensor, points: Tensor, weight: Tensor) -> Tensor:
    g = call.g
    taps, group_in = math.prod(g.kernel), g.image_channels // g.groups
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    multiprocessors = _multiprocessors(image.device)
    if call.precision == "split" and _on_hopper(g, image, "split") and group_in % 64 == 0:
        made = _hopper_outer_launch(g, multiprocessors)
        splits = made.launch.grid[2]
        parts = image.new_empty(splits, _weights(g), dtype=torch.float32)
        if made(call.image(image), call.factors(points), call.offset, call.mask, parts):
            sizes, strides = (taps, group_in, g.point_channels), (1, taps, group_in * taps)
            _reduce_launch(splits, sizes, strides)(parts, None, out)
            return out
    placed, last = call.points(points)
    key = (image.element_size(), call.precision, last, multiprocessors)
    launch, splits = _weight_launch(g, *key)
    parts = image.new_empty(splits, _weights(g), dtype=torch.float32)
    launch(call.image(image), placed, call.offset, call.mask, parts)
    sizes, strides = (taps, g.point_channels, group_in), (1, group_in * taps, taps)
    _reduce_launch(splits, sizes, strides)(parts, None, out)
    return out


@functools.lru_cache(maxsize=4096)
def _weight_launch(
    g: Geometry, width: int, precision: str, last: bool, multiprocessors: int
) -> tuple[_Launch, int]:
    units = _units(g)
    row, at_once, block_c = _blocks(g, "weight", width, g.point_channels // g.groups)
    positions, taps = math.prod(g.point_size), math.prod(g.kernel)
    tiles = triton.cdiv(positions, row.block_p)
    if units.narrow:
        blocks, channels = triton.cdiv(units.number, at_once), at_once * units.length
    else:
        blocks, channels = units.number * triton.cdiv(units.length, block_c), block_c
    outputs = _outputs_of(g, channels)
    block_o = _fit(outputs, row.block_o)
    over = triton.cdiv(outputs, block_o)
    splits = max(1, min(g.batch * tiles, 4 * multiprocessors // (taps * blocks * over)))
    launch = _Launch(
        "weight_gradient",
        (taps * blocks, over, splits),
        (_sizes(g), g.batch, *_channels(g), tiles, blocks, splits),
        dict(
            POINTS_LAST=last,
            **_constants(g, precision, _image_rows(g)),
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


# Launching


class _Launch:
    """One kernel with everything but its tensors; compiles once per device and dtypes.

    Triton's own launch binds and hashes every argument (19 us for 38 of them); the arguments
    here are fixed when the object is made, so the compiled kernel can be called as it is.
    Only pointers are specialised, all to 16 bytes: sizes never cause a compilation.
    """

    def __init__(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        integers: tuple[Any, ...],
        constants: dict[str, Any],
        warps: int,
        stages: int,
        descriptor: int | None = None,
    ) -> None:
        self.kernel = kernel
        self.descriptor = descriptor  # which argument of a Gluon kernel is a tensor descriptor
        self.grid = grid
        self.integers = integers
        self.constants = constants
        self.options = {"num_warps": warps, "num_stages": stages}
        self.tail = (*integers, *constants.values())
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *tensors: Any) -> None:
        if _INTERPRETED:
            kernel = getattr(kernels, self.kernel)
            kernel[self.grid](*tensors, *self.integers, **self.constants, **self.options)
            return
        pointers: list[Any] = []
        key: list[Any] = [torch.cuda.current_device()]
        for t in tensors:
            if t is None:
                pointers.append(None)
                key.append(None)
            elif t.__class__ is Tensor or isinstance(t, Tensor):
                pointers.append(t.data_ptr())
                key.append(t.dtype)
            else:  # a descriptor
                pointers.append(t)
        known = self.compiled.get(tuple(key))
        if known is None:
            known = self.load(tensors)
            self.compiled[tuple(key)] = known
        run, head = known
        run(*self.grid, _stream(key[0]), *head, *pointers, *self.tail)

    def load(self, tensors: Sequence[Any]) -> tuple[Any, tuple[Any, ...]]:
        """The compiled kernel's launcher and its first arguments after grid and stream."""
        try:
            target = triton.runtime.driver.active.get_current_target()
            compiled = self.compile([None if t is None else _dtype(t) for t in tensors], target)
            run = compiled.run  # loads it
        except Exception as failure:
            raise RuntimeError(
                f"deformnd: Triton {triton.__version__} cannot build its kernel {self.kernel!r} "
                f"for {torch.cuda.get_device_name()}: {failure}"
            ) from failure
        return run, (compiled.function, compiled.packed_metadata, None, None, None)

    def compile(self, dtypes: Sequence[Any], target: Any) -> Any:
        return _compile(
            self.kernel,
            tuple(dtypes),
            _types(self.integers),
            tuple(self.constants.items()),
            tuple(self.options.items()),
            target,
            torch.cuda.current_device() if torch.cuda.is_initialized() else -1,
            self.descriptor is not None,
        )


# Whether TRITON_INTERPRET=1 was set when Triton was imported.
_INTERPRETED = not hasattr(kernels.gather, "cache_key")


def _stream(device: int) -> int:
    stream: int = triton.runtime.driver.active.get_current_stream(device)
    return stream


_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def _dtype(t: Any) -> Any:
    """A tensor's dtype; a descriptor's type in a signature."""
    if isinstance(t, Tensor):
        return t.dtype
    return _descriptor_type(t.base.dtype, t.block_shape, t.layout)


def _descriptor_type(dtype: torch.dtype, block: Sequence[int], layout: Any) -> str:
    return f"tensordesc<{_POINTERS[dtype].removeprefix('*')}{list(block)},{layout!r}>"


# The arguments that are multiples of a constant.
_DIVIDED = {
    "VECTOR_C": ("channels", "unit", "group_in"),
    "VECTOR_O": ("outputs", "group_out"),
    "VECTOR_P": ("pixels",),
}


def _types(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_types(v) for v in value)
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@functools.cache
def _compile(
    kernel: str,
    dtypes: tuple[torch.dtype | None, ...],
    integers: tuple[Any, ...],
    constants: tuple[tuple[str, Any], ...],
    options: tuple[tuple[str, int], ...],
    target: Any,
    device: int,
    for_hopper: bool,
) -> Any:
    """Compile for a target; `device` only keeps apart what is loaded on different devices."""
    function = getattr(gluon if for_hopper else kernels, kernel)
    types: list[Any] = ["constexpr" if d is None else _POINTERS.get(d, d) for d in dtypes]
    types += [*integers, *["constexpr"] * len(constants)]
    signature = dict(zip(function.arg_names, types, strict=True))
    bound: dict[tuple[int, ...], Any] = {(i,): None for i, d in enumerate(dtypes) if d is None}
    for i, (name, value) in enumerate(constants, start=len(types) - len(constants)):
        assert function.arg_names[i] == name
        bound[(i,)] = value
    divisors = {
        name: divisor for constant, divisor in constants for name in _DIVIDED.get(constant, ())
    }
    divisors |= {function.arg_names[i]: 16 for i, d in enumerate(dtypes) if d in _POINTERS}
    if for_hopper:
        divisors |= {"channels": 16, "outputs": 16}
    aligned = {
        (i,): [["tt.divisibility", divisors[name]]]
        for i, name in enumerate(function.arg_names)
        if name in divisors
    }
    source = (GluonASTSource if for_hopper else ASTSource)(function, signature, bound, aligned)
    return triton.compile(source, target=target, options=dict(options))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _allows_tf32() -> bool:
    """torch's own switch for convolutions."""
    conv = getattr(torch.backends.cudnn, "conv", None)
    precision = getattr(conv, "fp32_precision", None)
    if precision is not None:
        return bool(precision == "tf32")
    return bool(torch.backends.cudnn.allow_tf32)
