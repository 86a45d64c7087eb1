"""dF/dpoints on Hopper: columns of samples times weights, by wgmma.

A program takes 64 positions that lie near each other, and up to ten units at once, which are taps
of each sample group (common.py, parted), and tabulates their samples (tables.py). Then it samples
BLOCK_C channels of one tap after another. The loop over channels is the outer one, so that most
corners are found in the cache. It stores the columns, and multiplies columns @ weights while it
loads the corners of the next columns. The copy engine brings the weights, STAGES blocks deep.
"""

from __future__ import annotations

import math
from typing import Any

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from .. import sampling
from ..layout import Call, Operand
from ..runtime import Buffer
from ..variants import Variant
from . import common, tables

PAIRS = gl.constexpr(5)  # pairs of taps that are tabulated at once


@gluon.jit
def next_block(tap, c0, taps, BLOCK: gl.constexpr):
    """The next tap, or after the last one the first tap and the next channels."""
    end = tap + 1 == taps
    return gl.where(end, 0, tap + 1), gl.where(end, c0 + BLOCK, c0)


@gluon.jit
def bring_weight(weight, unit, c0, o0, held, bars, stage, pred, g, SEVERAL: gl.constexpr,
                 PRECISION: gl.constexpr):  # fmt: skip
    """Start the copy of a unit's block of weights from its sample group's channel c0 on."""
    s, tap = common.parted(unit, g, SEVERAL)
    row = tap * g.padded_outputs + o0
    column = s * g.padded + c0
    rows = g.taps * g.padded_outputs
    common.bring(weight, row, column, rows, held, bars, stage, pred, PRECISION)


@gluon.jit
def deliver(out, acc, p, o, inside, g, LAST: gl.constexpr, STORED: gl.constexpr):
    """Store a tile of the result, or of a part of it where the sum is split."""
    acc = gl.convert_layout(acc.to(out.dtype.element_ty), STORED)
    if LAST:
        common.store_points(out, acc, p, o, inside, g, LAST, 1)
    elif g.point[len(g.point) - 1] % 2 == 0:
        common.store_points(out, acc, p, o, inside, g, LAST, 2)
    else:
        common.store_points(out, acc, p, o, inside, g, LAST, 1)


@gluon.jit
def forward_hopper(image, weight, offset, mask, bias, out, parts, g, splits,
                   LAST: gl.constexpr, PRECISION: gl.constexpr, BLOCK_O: gl.constexpr,
                   BLOCK_C: gl.constexpr, STAGES: gl.constexpr, ONCE: gl.constexpr,
                   SEVERAL: gl.constexpr, MMA: gl.constexpr, STORED: gl.constexpr,
                   num_warps: gl.constexpr, CHAINED: gl.constexpr):  # fmt: skip
    """Write the forward of a tile of positions and a block of outputs, or a part of their sums.

    ONCE says that all taps are tabulated at once. Without a loop over chunks of taps ptxas keeps
    the copy engine's addresses in registers, which makes layers of few channels faster.
    Grid: (B x tiles of positions x blocks of O, splits of the taps of all sample groups).
    """
    sampling.wait_for_previous(CHAINED)
    dtype: gl.constexpr = image.dtype.element_ty
    factor: gl.constexpr = weight.dtype
    count: gl.constexpr = common.parts_in(PRECISION)
    words: gl.constexpr = BLOCK_C * dtype.primitive_bitwidth // 32
    COLUMNS: gl.constexpr = tables.columns_layout(words, num_warps)
    tiles = (g.positions + 63) // 64
    blocks = g.padded_outputs // BLOCK_O
    tile = gl.program_id(0) // blocks
    o0 = (gl.program_id(0) % blocks) * BLOCK_O
    b = tile // tiles
    p0 = (tile % tiles) * 64
    columns = tables.allocate_columns(BLOCK_C, factor, PRECISION)
    held = gl.allocate_shared_memory(factor, [STAGES * count, BLOCK_O, BLOCK_C], weight.layout)
    samples = tables.allocate(2 * PAIRS, len(g.image), dtype)
    bars = common.allocate_bars(STAGES)
    idle = held.index((STAGES - 1) * count)
    common.fill(columns[0].index(1), num_warps)
    common.fill(idle, num_warps)
    acc = common.product_of_zeros(columns[0].index(1), idle.permute((1, 0)), MMA)

    units = g.taps
    if SEVERAL:
        units = units * g.sample_groups
    first = gl.program_id(1) * units // splits
    last = (gl.program_id(1) + 1) * units // splits
    lane = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [num_warps], [0]))
    q = p0 + lane % 64
    point = sampling.in_strips(q, g.point, 2)
    p = sampling.ravel(point, g.point)
    inside = q < g.positions
    pitch = g.row // BLOCK_C * words
    plane = g.plane // BLOCK_C * words
    length = g.padded // BLOCK_C * words  # the words of a sample group's channels
    image += b.to(gl.int64) * g.item
    image = image.to(gl.pointer_type(gl.int32), bitcast=True)
    image = image + gl.arange(0, words, layout=gl.SliceLayout(0, COLUMNS))[None, :]
    chunks = 1 if ONCE else (last - first + 2 * PAIRS - 1) // (2 * PAIRS)
    done = 0  # how many blocks of weights the chunks before have used
    for chunk in range(chunks):
        start = first + chunk * (last - first) // chunks
        taps = first + (chunk + 1) * (last - first) // chunks - start
        steps = taps * (g.padded // BLOCK_C)
        new_tap = 0  # the tap of the next block of weights to bring
        new_c0 = 0
        for s in gl.static_range(STAGES - 1):
            bring_weight(weight, start + new_tap, new_c0, o0, held, bars, (done + s) % STAGES,
                         s < steps, g, SEVERAL, PRECISION)  # fmt: skip
            new_tap, new_c0 = next_block(new_tap, new_c0, taps, BLOCK_C)
        known = ()
        for j in gl.static_range(PAIRS):
            group, tap = common.parted(start + gl.minimum(2 * j + lane // 64, taps - 1), g, SEVERAL)
            starts = sampling.starts_of(point, sampling.unravel(tap, g.kernel), g)
            read = sampling.read(offset, mask, b, group, tap, p, inside, g)
            known = known + ((starts, read, inside, 0),)
        for j in gl.static_range(PAIRS):
            tables.tabulate(samples, j, known[j], g)
        common.barrier()
        group, tap = common.parted(start, g, SEVERAL)
        values = tables.fetch(image, samples, 0, group * plane, pitch, g, COLUMNS)
        tap = 0
        c0 = 0
        for i in range(steps):
            now = (done + i) % 2
            tables.store_columns(columns, now, tables.mix(values, samples, tap, COLUMNS))
            tap, c0 = next_block(tap, c0, taps, words)
            # The last turn loads a block in vain instead of branching.
            block = gl.minimum(c0, length - words)
            if SEVERAL:
                block += (start + tap) // g.taps * plane
            values = tables.fetch(image, samples, tap, block, pitch, g, COLUMNS)
            acc = warpgroup_mma_wait(0, deps=[acc])
            common.barrier()
            ahead = i + STAGES - 1
            bring_weight(weight, start + new_tap, new_c0, o0, held, bars, (done + ahead) % STAGES,
                         ahead < steps, g, SEVERAL, PRECISION)  # fmt: skip
            new_tap, new_c0 = next_block(new_tap, new_c0, taps, BLOCK_C)
            stage = common.await_full(bars, done + i)
            w = common.factor(held, stage, PRECISION, True)
            acc = common.multiply(tables.columns_at(columns, now), w, acc)
        done += steps
    acc = warpgroup_mma_wait(0, deps=[acc])
    item = b.to(gl.int64) * g.positions * g.outputs
    q = p0 + gl.arange(0, 64, layout=gl.SliceLayout(1, STORED))
    p = sampling.ravel(sampling.in_strips(q, g.point, 2), g.point)
    inside = q < g.positions
    o = o0 + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(0, STORED))
    if splits > 1:
        item += gl.program_id(1).to(gl.int64) * g.batch * g.positions * g.outputs
        deliver(parts + item, acc, p, o, inside, g, LAST, STORED)
    else:
        if bias is not None:
            here = o0 + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(0, MMA))
            acc += gl.load(bias + here, mask=here < g.outputs, other=0.0).to(gl.float32)[None, :]
        deliver(out + item, acc, p, o, inside, g, LAST, STORED)


def _stored_layout(block_o: int, rank: int, last: bool) -> Any:
    """The layout of the result's tile [64, block_o]. What is contiguous in memory, which is
    channels or positions on the last axis, goes to a lane's registers (8 channels or 2 positions),
    and then to its neighbours.

    A layout lists how far each bit of a register's, lane's and warp's number moves in the tile.
    """
    channels = [[0, 1 << i] for i in range(block_o.bit_length() - 1)]
    if last:
        run, rest = channels, [[1 << i, 0] for i in range(6)]
        registers = 3
    else:
        run = [[b, 0] for b in ((1, 2, 4, 8, 16, 32) if rank == 1 else (1, 8, 16, 32))]
        rest = [*channels, *([] if rank == 1 else [[2, 0], [4, 0]])]
        registers = 1
    order = [*run[registers:], *rest]
    return gl.DistributedLinearLayout(
        [*run[:registers], *order[7:]], order[:5], order[5:7], [], [64, block_o]
    )


def write(call: Call, image: Operand, bias: Buffer | None, out: Operand) -> None:
    n = call.sizes
    rank = len(n.image)
    tiles = call.tiles("forward_hopper 3d" if rank == 3 else "forward_hopper", n.padded_outputs)
    block_o, block_c = math.gcd(tiles.block_o, n.padded_outputs), math.gcd(tiles.block_c, n.padded)
    programs = n.batch * triton.cdiv(n.positions, 64) * (n.padded_outputs // block_o)
    units = n.sample_groups * n.taps
    splits = call.splits(
        *("forward_hopper", programs, tiles.warps, units),
        products=n.padded,
        # A unit waits once for each 128 bytes of a pixel.
        **call.sampling(64, n.padded, max(n.padded * call.dtype.itemsize // 128, 1)),
    )
    constants = dict(BLOCK_O=block_o, BLOCK_C=block_c, STAGES=tiles.stages)
    constants |= dict(ONCE=units <= 2 * PAIRS.value, SEVERAL=n.sample_groups > 1)
    constants |= dict(MMA=common.mma_layout(block_o, tiles.warps))
    constants |= dict(STORED=_stored_layout(block_o, rank, out.last))
    call.launch_split(
        *(forward_hopper, (programs, splits), constants, out, bias),
        **dict(image=call.image(image), weight=call.weight()),
        descriptors={"weight": common.block(block_o, block_c, dtype=call.dtype)},
        **dict(warps=tiles.warps, resident=tiles.resident, registers=tiles.registers),
    )


VARIANT = Variant("forward_hopper", common.takes_wide, write)
