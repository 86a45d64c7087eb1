"""How a call's tensors lie in memory (kernels.py, Note [units]), and what all kernels are told."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..geometry import Geometry
from . import configs
from .compiled import Launch


class Units(NamedTuple):
    """How a call's image channels split into units."""

    length: int
    number: int
    narrow: bool
    padded: int  # length of a unit in memory


@functools.lru_cache(maxsize=4096)
def units_of(g: Geometry) -> Units:
    channels = g.image_channels
    length = math.gcd(channels // max(g.offset_groups, 1), channels // max(g.mask_groups, 1))
    number = channels // length
    narrow = number > 1 and length <= configs.NARROW
    return Units(length, number, narrow, triton.next_power_of_2(length) if narrow else length)


def allows_tf32() -> bool:
    """torch's own switch for convolutions."""
    conv = getattr(torch.backends.cudnn, "conv", None)
    precision = getattr(conv, "fp32_precision", None)
    if precision is not None:
        return bool(precision == "tf32")
    return bool(torch.backends.cudnn.allow_tf32)


def precision_of(g: Geometry, dtype: torch.dtype) -> str:
    """See kernels.py, Note [precision]."""
    if dtype != torch.float32:
        return "native"
    # With narrow units the gathers cost most, and Triton 3.6 cannot compile TF32 weight gradients.
    if allows_tf32() and not units_of(g).narrow:
        return "tf32"
    per_group = g.image_channels * g.point_channels // g.groups**2
    return "ieee" if per_group < configs.FEW else "split"


class Call:
    """What the operators of one call share: contiguous tensors, layouts made at most once."""

    def __init__(
        self, g: Geometry, offset: Tensor | None, mask: Tensor | None, weight: Tensor
    ) -> None:
        self.g = g
        self.offset = offset
        self.mask = mask
        self._weight = weight
        self.units = units_of(g)
        self.precision = precision_of(g, weight.dtype)
        self._packed: Tensor | None = None
        self._image: tuple[Tensor, Tensor] | None = None
        self._rows: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(
        cls, g: Geometry, like: Tensor, offset: Tensor | None, mask: Tensor | None, weight: Tensor
    ) -> Call:
        return cls(
            g,
            None if offset is None else _contiguous(offset),
            None if mask is None else _contiguous(mask),
            weight.to(like.dtype),
        )

    def weight(self) -> Tensor:
        """[K, O, C / groups], or its bfloat16 heads and tails [2, K, O, C / groups]."""
        if self._packed is None:
            self._packed = pack_weight(self.g, self._weight, self.precision == "split")
        return self._packed

    def fragments(self, order: str, run: int = 8) -> Tensor:
        """As gluon.py takes it: rows of channels."""
        packed = pack_weight(self.g, self._weight, self.precision == "split", order, run)
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
        whole = Units(channels, 1, False, channels)
        layout = "rows" if last else "channels"
        relayout_launch(whole, layout, "rows", points.shape[0], pixels_of(points), True)(
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
        whole = Units(t.shape[1], 1, False, t.shape[1])
        relayout(source, out, None, whole, "rows", "channels", pixels_of(t))
        return out
    return t.contiguous()


def _as_rows(t: Tensor) -> Tensor:
    """Channels last: the tensor itself if it is so, else a copy."""
    if t.movedim(1, -1).is_contiguous():
        return _aligned(t)
    source = t if t.is_contiguous() else t.contiguous()
    out = t.new_empty(t.shape[0], *t.shape[2:], t.shape[1])
    whole = Units(t.shape[1], 1, False, t.shape[1])
    relayout(_aligned(source), out, None, whole, "channels", "rows", pixels_of(t))
    return out


def _planes(t: Tensor, units: Units) -> Tensor:
    out = t.new_empty(t.shape[0], units.number, pixels_of(t), units.padded)
    last = t.movedim(1, -1).is_contiguous()
    source = t if last or t.is_contiguous() else t.contiguous()
    if units.padded == 1 and not last:
        return _aligned(source)
    relayout(
        _aligned(source), out, None, units, "rows" if last else "channels", "planes", pixels_of(t)
    )
    return out


def pixels_of(t: Tensor) -> int:
    return math.prod(t.shape[2:])


def relayout(
    source: Tensor,
    out: Tensor,
    bias: Tensor | None,
    units: Units,
    layout_from: str,
    layout_to: str,
    pixels: int,
) -> None:
    """Copy between "channels" [B, C, S], "rows" [B, S, C] and "planes" [B, units, S, padded]."""
    launch = relayout_launch(units, layout_from, layout_to, out.shape[0], pixels)
    launch(source, out, bias)


def _strides(units: Units, layout: str, pixels: int) -> tuple[int, int, int]:
    """Of a batch item, a unit, and a pixel (of a channel in "channels")."""
    channels = units.length * units.number
    if layout == "channels":
        return channels * pixels, units.length * pixels, pixels
    if layout == "rows":
        return channels * pixels, units.length, channels
    return units.number * pixels * units.padded, pixels * units.padded, units.padded


@functools.lru_cache(maxsize=4096)
def relayout_launch(
    units: Units, source: str, to: str, batch: int, pixels: int, split: bool = False
) -> Launch:
    block_c = fit(units.padded, 64, least=1)
    block_p = 4096 // max(block_c, 32)
    blocks = triton.cdiv(pixels, block_p)
    # What divides every distance between the channels of different pixels and units.
    pitches = [s for x in (source, to) if x != "channels" for s in _strides(units, x, pixels)]
    pad = units.padded if to == "planes" and units.padded != units.length else 0
    return Launch(
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


def pack_weight(g: Geometry, weight: Tensor, split: bool, order: str = "", run: int = 8) -> Tensor:
    """[K, O, C / groups], or bfloat16 heads and tails of that (kernels.py, pack_weight)."""
    last = not weight.is_contiguous() and weight.movedim(1, -1).is_contiguous()
    weight = _aligned(weight if last else weight.contiguous())
    if math.prod(g.kernel) == 1 and not split and not order:
        return weight
    dtype = torch.bfloat16 if split else weight.dtype
    out = weight.new_empty((1 + split) * weight.numel(), dtype=dtype)
    pack_launch(g, last, split, order, run)(weight, out)
    return out


@functools.lru_cache(maxsize=4096)
def pack_launch(g: Geometry, last: bool, split: bool, order: str, run: int = 8) -> Launch:
    group_in, taps = g.image_channels // g.groups, math.prod(g.kernel)
    block_k = fit(taps, 64, least=1)
    block_c = 2048 // max(block_k, 16)
    blocks = triton.cdiv(group_in, block_c)
    return Launch(
        "pack_weight",
        (g.point_channels * blocks, triton.cdiv(taps, block_k), 1),
        (taps, g.point_channels, group_in, weights_of(g), blocks),
        dict(LAST=last, SPLIT=split, ORDER=order, RUN=run, BLOCK_C=block_c, BLOCK_K=block_k),
        4,
        1,
    )


def sizes_of(g: Geometry) -> tuple[tuple[int, ...], ...]:
    return (g.image_size, g.point_size, g.kernel, g.stride, g.padding, g.dilation)


def channels_of(g: Geometry) -> tuple[int, ...]:
    """The arguments channels .. mask_units of the kernels."""
    units = units_of(g)
    return (
        g.image_channels,
        units.length,
        g.point_channels,
        g.image_channels // g.groups,
        g.point_channels // g.groups,
        units.number // max(g.offset_groups, 1),
        units.number // max(g.mask_groups, 1),
    )


def weights_of(g: Geometry) -> int:
    return math.prod(g.kernel) * g.point_channels * g.image_channels // g.groups


def constants_of(g: Geometry, precision: str, rows: int) -> dict[str, Any]:
    """`rows` is the largest number of elements that is indexed within a batch item."""
    units = units_of(g)
    group_in, group_out = g.image_channels // g.groups, g.point_channels // g.groups
    return dict(
        GROUPED=g.groups > 1,
        PRECISION=precision,
        INDEX=tl.int32 if rows < 2**31 else tl.int64,
        VECTOR_C=math.gcd(16, units.length, group_in, g.image_channels),
        VECTOR_O=math.gcd(16, group_out),
    )


# Channels of a block at least: a product needs 16, and 32 fill a sector of memory.
LEAST = 32


def fit(size: int, block: int, least: int = LEAST) -> int:
    return int(min(block, max(least, triton.next_power_of_2(size))))


def image_rows(g: Geometry) -> int:
    units = units_of(g)
    return math.prod(g.image_size) * units.number * units.padded
