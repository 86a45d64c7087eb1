"""How a call's tensors lie in memory (kernels.py, Note [units]), and what all kernels are told."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..geometry import Geometry
from . import configs
from .compiled import multiprocessors_of
from .plan import RETURNED, SCRATCH, Job, Plan, Slot


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
    narrow = length <= (configs.NARROW if number > 1 else configs.NARROW // 2)
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


class Operand(NamedTuple):
    """An image or points [B, channels, *size], or a weight, as it is in memory."""

    slot: Slot
    last: bool  # whether the channels (of a weight, those of its second axis) are last

    def part(self, first: int, count: int) -> Operand:
        return self._replace(slot=self.slot.part(first, count))


class Call:
    """What the operators of one plan share: the tensors, and layouts of them made at most once."""

    def __init__(
        self,
        g: Geometry,
        plan: Plan,
        precision: str,
        weight: Operand,
        offset: Slot | None,
        mask: Slot | None,
        pieces: int = 1,
        aside: bool = False,
    ) -> None:
        self.g, self.plan, self.precision = g, plan, precision
        self.offset, self.mask = offset, mask
        self.units = units_of(g)
        self.multiprocessors = multiprocessors_of(plan.device)
        self.given_weight = weight
        self.number_of_pieces = pieces
        self.aside = aside  # whether there is memory for work beside other work
        self._made: dict[Any, Slot] = {}
        self._lent: dict[Operand, Slot] = {}

    def pieces(self, *tensors: Operand | Slot | None) -> Iterator[tuple[Call, list[Any]]]:
        """The call for one piece of the batch after another, and what of the tensors belongs to
        it. Scratch memory of a piece is that of the next."""
        if self.number_of_pieces == 1:
            yield self, list(tensors)
            return
        every = (*tensors, self.offset, self.mask)
        slots = [t.slot if isinstance(t, Operand) else t for t in every if t is not None]
        # So many items together begin at a multiple of 16 bytes.
        step = max(16 // math.gcd(16, s.part(1, 1).start) for s in slots)
        steps = triton.cdiv(self.g.batch, step)
        number = min(self.number_of_pieces, steps)
        bounds = [min(step * (i * steps // number), self.g.batch) for i in range(number + 1)]
        for first, last in itertools.pairwise(bounds):
            parts: list[Any] = [t and t.part(first, last - first) for t in every]
            g = self.g._replace(batch=last - first)
            call = Call(g, self.plan, self.precision, self.given_weight, *parts[-2:])
            with self.plan.frame():
                yield call, parts[:-2]

    @contextlib.contextmanager
    def frame(self) -> Iterator[None]:
        """Layouts made within are gone after it, and their memory is free for others."""
        before = dict(self._made)
        with self.plan.frame():
            yield
        self._made = before

    def weight(self, order: str = "", run: int = 8) -> Slot:
        """[K, O, C / groups], or its bfloat16 heads and tails [2, K, O, C / groups]; in the order
        of channels that gluon.py takes, image channels `run` to a lane (kernels.py, _pack)."""
        key = (order, run)
        if key not in self._made:
            self._made[key] = self._pack(order, run)
        return self._made[key]

    def image(self, image: Operand) -> Slot:
        """As rows [B, S, C], or as planes [B, units, S, padded] if the units are narrow."""
        if not self.units.narrow:
            return self.rows(image)
        key = ("planes", image)
        if key not in self._made:
            slot, units = image.slot, self.units
            if units.padded == (slot.shape[1] if image.last else 1):  # so already
                return slot
            pixels = math.prod(slot.shape[2:])
            shape = (slot.shape[0], units.number, pixels, units.padded)
            self._made[key] = self._room(image, slot.dtype, *shape)
            layout = "rows" if image.last else "channels"
            copy(self.plan, slot, self._made[key], None, units, layout, "planes")
        return self._made[key]

    def rows(self, t: Operand) -> Slot:
        """Channels last: [B, positions, channels]."""
        if t.last:
            return t.slot
        key = ("rows", t)
        if key not in self._made:
            slot = t.slot
            batch, channels, *size = slot.shape
            shape = (batch, math.prod(size), channels)
            self._made[key] = self._room(t, slot.dtype, *shape)
            whole = Units(channels, 1, False, channels)
            copy(self.plan, slot, self._made[key], None, whole, "channels", "rows")
        return self._made[key]

    def lend(self, t: Operand, result: Operand) -> None:
        """Let a copy of t lie in a result that is written when the copy has served."""
        self._lent[t] = result.slot

    def _room(self, t: Operand, dtype: torch.dtype, *shape: int) -> Slot:
        """For a copy of t."""
        lent = self._lent.get(t)
        taken = any(slot.kind == RETURNED for slot in self._made.values())
        if lent is not None and not taken:
            room = lent._replace(dtype=dtype, shape=shape)
            if room.size == lent.size:
                return room
        return self.plan.scratch(*shape, dtype=dtype)

    def factors(self, points: Operand) -> Slot:
        """Points as bfloat16 heads and tails of rows [2 x B x P, O] (kernels.py, precision)."""
        key = ("factors", points)
        if key not in self._made:
            slot = points.slot
            batch, channels, *size = slot.shape
            rows = 2 * batch * math.prod(size)
            self._made[key] = self._room(points, torch.bfloat16, rows, channels)
            whole = Units(channels, 1, False, channels)
            layout = "rows" if points.last else "channels"
            copy(self.plan, slot, self._made[key], None, whole, layout, "rows", split=True)
        return self._made[key]

    def points(self, points: Operand) -> Operand:
        """Points as rows if they are so already."""
        made = self._made.get(("rows", points))
        return points if made is None else Operand(made, True)

    def _pack(self, order: str, run: int) -> Slot:
        g, weight, split = self.g, self.given_weight, self.precision == "split"
        taps, group_in = math.prod(g.kernel), g.image_channels // g.groups
        if taps == 1 and not split and not order:
            return weight.slot._replace(shape=(g.point_channels, group_in))
        units = self.units.number if order == "units" else 1
        shape = ((units + split) * taps * g.point_channels, group_in)
        out = self.plan.scratch(*shape, dtype=torch.bfloat16 if split else weight.slot.dtype)
        block_k = fit(taps, 64, least=1)
        block_c = 2048 // max(block_k, 16)
        blocks = triton.cdiv(group_in, block_c)
        self.plan.first(
            Job(
                "pack",
                (weight.slot, out),
                (
                    units * g.point_channels * blocks * triton.cdiv(taps, block_k),
                    *(taps, g.point_channels, group_in, self.units.length),
                    *(weights_of(g), blocks),
                ),
                (
                    weight.last,
                    split,
                    ("", "gather", "along", "units").index(order),
                    run,
                    block_c,
                    block_k,
                ),
            )
        )
        return out


def copy(
    plan: Plan,
    source: Slot,
    out: Slot,
    bias: Slot | None,
    units: Units,
    layout_from: str,
    layout_to: str,
    split: bool = False,
) -> None:
    """Between "channels" [B, C, S], "rows" [B, S, C] and "planes" [B, units, S, padded]."""
    channels = next(s for s in (source, out) if s.kind != SCRATCH)
    batch, pixels = channels.shape[0], math.prod(channels.shape[2:])
    block_c = fit(units.padded, 64, least=1)
    block_p = 4096 // max(block_c, 32)
    blocks, across = triton.cdiv(pixels, block_p), triton.cdiv(units.padded, block_c)
    strides = [_strides(units, layout, pixels) for layout in (layout_from, layout_to)]
    # What divides every distance between the channels of different pixels and units.
    pitches = [
        n
        for layout, some in zip((layout_from, layout_to), strides, strict=True)
        if layout != "channels"
        for n in some
    ]
    vector_c = math.gcd(16, units.length, *pitches)
    vector_p = next(v for v in (16, 4, 1) if pixels % v == 0)  # few kernels
    pad = units.padded if layout_to == "planes" and units.padded != units.length else 0
    plan.first(
        Job(
            "copy",
            (source, out, bias),
            (
                *(blocks * units.number * across * batch, batch),
                *(pixels // vector_p, units.number, units.length // vector_c),
                *(*strides, blocks, across),
            ),
            (
                *(layout_from != "channels", layout_to != "channels", vector_c, vector_p),
                *(block_p, block_c, pad, split),
            ),
        )
    )


def _strides(units: Units, layout: str, pixels: int) -> tuple[int, int, int]:
    """Of a batch item, a unit, and a pixel (of a channel in "channels")."""
    channels = units.length * units.number
    if layout == "channels":
        return channels * pixels, units.length * pixels, pixels
    if layout == "rows":
        return channels * pixels, units.length, channels
    return units.number * pixels * units.padded, pixels * units.padded, units.padded


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


def tiles_of(g: Geometry) -> tuple[tuple[int, ...], int]:
    """The image's tile for the inverse gather, and how many there are."""
    tile = configs.TILES[len(g.kernel)]
    return tile, math.prod(triton.cdiv(s, t) for s, t in zip(g.image_size, tile, strict=True))


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


def image_constants_of(g: Geometry, precision: str) -> dict[str, Any]:
    """Those of a kernel that reads the image, or adds to its gradient, as Call.image lays it out;
    the kernel's argument `item` is image_rows."""
    constants = constants_of(g, precision, image_rows(g))
    units = units_of(g)
    vector = min(16, units.padded) if units.narrow else constants["VECTOR_C"]
    return dict(**constants, VECTOR_I=vector)


# Channels of a block at least: a product needs 16, and 32 fill a sector of memory.
LEAST = 32


def fit(size: int, block: int, least: int = LEAST) -> int:
    return int(min(block, max(least, triton.next_power_of_2(size))))


def image_rows(g: Geometry) -> int:
    """Elements of a batch item of the image as Call.image lays it out, padding included."""
    units = units_of(g)
    return _strides(units, "planes" if units.narrow else "rows", math.prod(g.image_size))[0]
