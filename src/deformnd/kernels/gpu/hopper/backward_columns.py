"""The image gradient by columns, on Hopper, where there are more pixels than positions.

In backward_sorted.py a tile of 64 pixels is multiplied by the weights of every tap, although with a
stride of 2 on both axes only about 20 samples of a tap touch it. Here the points are first
multiplied by the weights of all taps, which is as much work as a dense transposed convolution:

    columns [B, positions, taps, channels] = points [B, positions, outputs] @ weight [tap]

A tile then sums the columns of its samples, of all taps together:

    out [pixels, channels] = blend [pixels, samples] @ columns [samples, channels]

The columns of as many batch items are kept at once as tiles.COLUMNS has room for.
"""

from __future__ import annotations

import itertools
import math
from collections import namedtuple
from typing import Any, NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .. import sampling, tiles
from ..backward_sorted import lists_of, tiles_of
from ..layout import Call, Operand, whole_blocks
from ..prepare import Order
from ..runtime import Buffer
from ..variants import Variant
from . import common
from .backward_atomic import bring_block, multiply_blocks
from .backward_sorted import await_empty, blend_of, corner_of, deliver, load_rows

LISTED = gl.constexpr(64)  # entries of a list that are taken at once


@gluon.jit
def multiply_columns_hopper(points, weight, out, g, before, count, splits, BLOCK_P: gl.constexpr,
                            BLOCK_O: gl.constexpr, BLOCKS: gl.constexpr, BLOCK_C: gl.constexpr,
                            STAGES: gl.constexpr, MMA: gl.constexpr, COLUMNS: gl.constexpr,
                            ROWS: gl.constexpr, CHAINED: gl.constexpr):  # fmt: skip
    """Write the columns of `count` rows of points, from the batch item `before` on.

    A program's rows stay in shared memory. Weights are brought and multiplied as in
    backward_atomic.py, where their order of channels gives a lane eight neighbours.
    Grid: (tiles of rows, splits of the taps).
    """
    sampling.wait_for_previous(CHAINED)
    first = gl.program_id(1) * g.taps // splits
    last = (gl.program_id(1) + 1) * g.taps // splits
    per_tap = g.columns // BLOCK_C
    steps = (last - first) * per_tap
    tile = gl.allocate_shared_memory(
        points.dtype.element_ty, [BLOCKS, BLOCK_P, BLOCK_O],
        gl.NVMMASharedLayout.get_default_for([BLOCK_P, BLOCK_O], points.dtype.element_ty),
    )  # fmt: skip
    held = gl.allocate_shared_memory(weight.dtype, [STAGES, BLOCK_O, BLOCK_C], weight.layout)
    bars = common.allocate_bars(STAGES)
    common.publish()
    for s in gl.static_range(STAGES):
        bring_block(weight, s, first, per_tap, g, held, bars, s < steps * BLOCKS, BLOCKS, False,
                    "native")  # fmt: skip
    p0 = gl.program_id(0) * BLOCK_P
    p = p0 + gl.arange(0, BLOCK_P, layout=gl.SliceLayout(1, ROWS))
    o = gl.arange(0, BLOCK_O, layout=gl.SliceLayout(0, ROWS))
    points += before.to(gl.int64) * g.positions * g.padded_outputs
    here = (p < count)[:, None] & (o >= 0)[None, :]
    for j in gl.static_range(BLOCKS):
        source = (p * g.padded_outputs + j * BLOCK_O)[:, None] + o[None, :]
        tile.index(j).store(gl.load(points + source, mask=here, other=0.0))
    common.publish()
    p = p0 + gl.arange(0, BLOCK_P, layout=gl.SliceLayout(1, COLUMNS))
    c = gl.arange(0, BLOCK_C, layout=gl.SliceLayout(0, COLUMNS))
    place = (p * (g.taps * g.columns))[:, None] + (first * g.columns + c)[None, :]
    here = (p < count)[:, None] & (c >= 0)[None, :]
    for i in range(steps):
        x = multiply_blocks(tile, held, i * BLOCKS, bars, BLOCKS, "native", MMA)
        common.barrier()
        for j in gl.static_range(BLOCKS):
            ahead = i * BLOCKS + j + STAGES
            bring_block(weight, ahead, first, per_tap, g, held, bars, ahead < steps * BLOCKS,
                        BLOCKS, False, "native")  # fmt: skip
        x = gl.reshape(x.to(out.dtype.element_ty), [BLOCK_P, BLOCK_C // 32, 4, 4, 2])
        x = gl.reshape(gl.permute(x, (0, 1, 3, 2, 4)), [BLOCK_P, BLOCK_C])
        gl.store(out + place, gl.convert_layout(x, COLUMNS), mask=here)
        place += BLOCK_C


# What the warp groups of a program are told: the kernel's arguments, and what to do. The program's
# entries are those from `first` on and before `last`. `rings` are those of columns and of blends.
# `bars` has for each ring the barriers of its full stages and those of its empty ones.
Work = namedtuple(
    "Work",
    "columns offset mask bias entries out parts g before splits b tile tiles c0 split first last "
    "rings bars",
)


@gluon.jit
def entries_of(w, i, layout: gl.constexpr):
    """The i-th run of LISTED entries, with 0 after the last entry."""
    e = w.first + i * LISTED + gl.arange(0, LISTED, layout=layout)
    return gl.load(w.entries + e, mask=e < w.last, other=0)


@gluon.jit
def samples_of(w, i, listed, layout: gl.constexpr):
    """Read the offsets and masks of the i-th run of entries, as they are stored."""
    inside = w.first + i * LISTED + gl.arange(0, LISTED, layout=layout) < w.last
    p = listed // w.g.taps
    return sampling.read(w.offset, w.mask, w.b, 0, listed % w.g.taps, p, inside, w.g)


@gluon.jit
def bring_all(w, TILE: gl.constexpr):
    """Bring columns and blends to shared memory. Entries are read two turns ahead, and offsets
    one."""
    rows, blends = w.rings
    row_bars, blend_bars = w.bars
    g = w.g
    dtype: gl.constexpr = rows.dtype
    WIDE: gl.constexpr = rows.shape[2]
    by_entry: gl.constexpr = gl.BlockedLayout([1, LISTED // 2], [32, 1], [2, 2], [1, 0])
    entry: gl.constexpr = gl.SliceLayout(1, by_entry)
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDE, WIDE // 8], [4, 1], [1, 0])
    at_row: gl.constexpr = gl.SliceLayout(1, copies)
    r = gl.arange(0, LISTED, layout=at_row)
    c = w.c0 + gl.arange(0, WIDE, layout=gl.SliceLayout(0, copies))
    item = (w.b - w.before).to(gl.int64) * g.positions * (g.taps * g.columns)
    columns = w.columns + item
    corner = corner_of(w.tile, g, TILE)
    sources = entries_of(w, 0, at_row)
    listed = entries_of(w, 0, entry)
    listed1 = entries_of(w, 1, entry)
    given = samples_of(w, 0, listed, entry)
    for i in range((w.last - w.first + LISTED - 1) // LISTED):
        left = w.last - w.first - i * LISTED
        stage = await_empty(row_bars[1], i)
        load_rows(
            rows.index(stage), columns + ((sources * g.columns)[:, None] + c[None, :]),
            mask=(r < left)[:, None] & (c < g.columns)[None, :],
        )  # fmt: skip
        async_copy.mbarrier_arrive(row_bars[0].index(stage), increment_count=False)
        sources = entries_of(w, i + 1, at_row)
        listed2 = entries_of(w, i + 2, entry)
        given1 = samples_of(w, i + 1, listed1, entry)
        blend = blend_of(given, listed // g.taps, left, listed % g.taps, corner, g, dtype, TILE,
                         by_entry, LISTED)  # fmt: skip
        stage = await_empty(blend_bars[1], i)
        blends.index(stage).store(blend)
        common.publish()
        mbarrier.arrive(blend_bars[0].index(stage), count=1)
        listed = listed1
        listed1 = listed2
        given = given1


@gluon.jit
def sum_all(w, TILE: gl.constexpr, LAST: gl.constexpr, MMA: gl.constexpr):
    """The products of blends and columns, and the result."""
    rows, blends = w.rings
    row_bars, blend_bars = w.bars
    BLOCK_C: gl.constexpr = rows.shape[2]
    acc = gl.zeros([64, BLOCK_C], gl.float32, layout=MMA)
    for i in range((w.last - w.first + LISTED - 1) // LISTED):
        at = common.await_full(blend_bars[0], i)
        stage = common.await_full(row_bars[0], i)
        fence_async_shared()
        blend = blends.index(at).permute((1, 0))
        acc = warpgroup_mma(blend, rows.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        common.barrier()
        mbarrier.arrive(row_bars[1].index(stage), count=1)
        mbarrier.arrive(blend_bars[1].index(at), count=1)
    deliver(0, w, acc, rows, TILE, LAST, MMA)


@gluon.jit
def backward_columns_hopper(columns, offset, mask, bias, lists, entries, out, parts, g, number,
                            before, splits, TILE: gl.constexpr, LAST: gl.constexpr,
                            BLOCK_C: gl.constexpr, RINGS: gl.constexpr, MMA: gl.constexpr,
                            REGISTERS: gl.constexpr, num_warps: gl.constexpr,
                            CHAINED: gl.constexpr):  # fmt: skip
    """Write the image gradient as backward_sorted does, but from columns, which are those of the
    batch items from `before` on.

    A first warp group brings what the other one multiplies, as in backward_sorted.py.
    Grid: (batch items x tiles, blocks of C, splits).
    """
    sampling.wait_for_previous(CHAINED)
    dtype: gl.constexpr = columns.dtype.element_ty
    tiles = sampling.product(sampling.tiles_across(g.image, TILE))
    b = before + gl.program_id(0) // tiles
    tile = gl.program_id(0) % tiles
    split = gl.program_id(2)
    at = lists + (b.to(gl.int64) * tiles + tile)
    length = gl.load(at)
    start = gl.load(at + number + 1) - length
    length = length.to(gl.int32)  # even times splits it fits into 32 bits (`takes`)
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([LISTED, 64], dtype)
    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([LISTED, BLOCK_C], dtype)
    rings = (
        gl.allocate_shared_memory(dtype, [RINGS[0], LISTED, BLOCK_C], wide),
        gl.allocate_shared_memory(dtype, [RINGS[1], LISTED, 64], layout),
    )
    bars = (
        (common.allocate_bars(RINGS[0], 128), common.allocate_bars(RINGS[0])),
        (common.allocate_bars(RINGS[1]), common.allocate_bars(RINGS[1])),
    )
    common.publish()
    w = Work(
        *(columns, offset, mask, bias, entries + start, out, parts, g, before, splits),
        b=b,
        tile=tile,
        tiles=tiles,
        c0=gl.program_id(1) * BLOCK_C,
        split=split,
        first=split * length // splits,
        last=(split + 1) * length // splits,
        rings=rings,
        bars=bars,
    )
    gl.warp_specialize([(bring_all, (w, TILE)), (sum_all, (w, TILE, LAST, MMA))], [4], [REGISTERS])


class Blocks(NamedTuple):
    """The blocks and stages of a product that suits a call."""

    block_p: int
    block_o: int
    blocks: int  # of point channels
    block_c: int
    stages: int


def blocks_of(call: Call) -> Blocks | None:
    """The blocks of which two programs fit into a multiprocessor's shared memory, so that one
    multiplies while the other one stores, or else the largest that fit, or None if none do. A
    program takes 1024 bytes beside its own."""
    n = call.sizes
    row = call.tiles("multiply_columns_hopper", n.padded_outputs)
    block_o = min(row.block_o, n.padded_outputs & -n.padded_outputs)
    blocks = n.padded_outputs // block_o
    widths = [width for width in (row.block_c, 64, 32) if n.columns % width == 0]
    choices = [
        *itertools.product((2,), (64,), widths, (blocks + 1,)),
        *itertools.product((1,), (row.block_p, 64), widths, (2 * blocks, blocks + 1)),
    ]
    for programs, block_p, block_c, stages in choices:
        shared = 2 * (block_p * n.padded_outputs + stages * block_o * block_c) + 2048
        if programs * shared <= call.device.shared_memory:
            return Blocks(block_p, block_o, blocks, block_c, stages)
    return None


def takes(call: Call) -> bool:
    n = call.sizes
    return (
        math.prod(n.stride) > 2
        and not torch.are_deterministic_algorithms_enabled()
        and common.takes_wide(call)
        and n.sample_groups == 1
        and call.precision == "native"
        and n.positions * n.taps * n.columns <= tiles.COLUMNS
        and blocks_of(call) is not None
    )


def write(
    call: Call, points: Operand, bias: Buffer | None, out: Operand, lists: tuple[Buffer, Buffer]
) -> None:
    n = call.sizes
    length = n.taps * n.columns
    # Every launch takes as many items as the others, or nearly as many.
    most = max(1, tiles.COLUMNS // (n.positions * length))
    items = triton.cdiv(n.batch, triton.cdiv(n.batch, most))
    columns = call.plan.scratch(items, n.positions, length, dtype=call.dtype)
    row = call.tiles("backward_columns_hopper", n.channels)
    block_c = min(row.block_c, whole_blocks(n.channels))
    tile, count = tiles_of(call)
    blocks = triton.cdiv(n.channels, block_c)
    # A list has about this many entries, and a program's share has to be worth its start.
    entries = triton.cdiv(n.positions * n.taps, count)
    splits = row.resident * call.multiprocessors // (items * count * blocks)
    splits = max(1, min(entries // 128, splits))
    parts = call.room_for_parts(splits, *out.buffer.shape)
    constants: dict[str, Any] = dict(TILE=tile, LAST=out.last, BLOCK_C=block_c, RINGS=row.rings)
    constants |= dict(MMA=common.mma_layout(block_c, 4), REGISTERS=row.registers)
    for before in range(0, n.batch, items):
        now = min(items, n.batch - before)
        multiply(call, points, columns.part(0, now), before)
        call.launch(
            *(backward_columns_hopper, (now * count, blocks, splits), constants),
            **dict(columns=columns, bias=bias, out=out.buffer, parts=parts, **lists_of(lists)),
            **dict(before=before, splits=splits, warps=row.warps),
            registers=65536 // (256 * row.resident) // 8 * 8,
        )
    call.reduce(parts, out, bias)


def multiply(call: Call, points: Operand, columns: Buffer, before: int) -> None:
    """Launch the product that writes the columns of some batch items."""
    n, blocks = call.sizes, blocks_of(call)
    assert blocks is not None
    block_p, block_o, number, block_c, stages = blocks
    warps, across = block_p // 16, min(32, block_o // 8)
    rows = columns.shape[0] * n.positions
    programs = triton.cdiv(rows, block_p)
    work, steps = block_p * n.padded_outputs * n.columns, max(n.columns // 128, 1)
    splits = call.splits("multiply_columns_hopper", programs, warps, n.taps, work=work, steps=steps)
    constants: dict[str, Any] = dict(
        **dict(BLOCK_P=block_p, BLOCK_O=block_o, BLOCKS=number, BLOCK_C=block_c, STAGES=stages),
        MMA=common.mma_layout(block_c, warps),
        COLUMNS=common.rows_layout(block_p, block_c, warps),
        ROWS=gl.BlockedLayout([1, 8], [32 // across, across], [warps, 1], [1, 0]),
    )
    call.launch(
        *(multiply_columns_hopper, (programs, splits), constants),
        **dict(points=call.rows(points), weight=call.weight(Order.ACCUMULATOR), out=columns),
        **dict(before=before, count=rows, splits=splits, warps=warps),
        descriptors={"weight": common.block(block_o, block_c, dtype=call.dtype)},
    )


VARIANT = Variant(
    *("backward_columns_hopper", takes, write),
    order=Order.ACCUMULATOR,
    others=("multiply_columns_hopper",),
    together=True,
)
