"""The image gradient from lists of samples, on Hopper: ../backward_sorted.py for half precision.

A program has one or two tiles of 64 pixels. Each tile has a warp group that multiplies, and a first
warp group brings what these multiply: the blends of the next entries of the tiles' lists, the rows
of points of these entries, and the weights. It waits for the others only where a ring of shared
memory is full:

    blends   [LISTED samples, 64 pixels]      of each tile, for LISTED entries of its list
    rows     [LISTED samples, 64 outputs]     of each tile, for 64 outputs of these entries
    weights  [64 outputs, channels]           for all tiles, for these 64 outputs

A step is a product of 64 outputs: acc += (blend^T @ rows) @ weights. The tiles of a program take
LISTED entries of their lists at a time and in step, so that they share the weights. A list that has
ended adds nothing until the longest one has ended as well. The taps of all sample groups are taken
one after another. The weight has one array of all channels for every sample group, with 0 in the
channels of the others.
"""

from __future__ import annotations

import math
from collections import namedtuple

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

from .. import sampling
from ..backward_sorted import arguments_of, tiles_of
from ..layout import Call, Operand, whole_blocks
from ..prepare import Order
from ..runtime import Buffer
from ..variants import Variant
from . import common

# Triton 3.6 and later versions have different names for this.
load_rows = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

OUTPUTS = gl.constexpr(64)  # the outputs of a step
SMALL = gl.constexpr(common.mma_layout(64, 4))  # the layout of a step's first product


# What the warp groups of a program are told: the kernel's arguments, and what to do. The program's
# first tile is `tile`, and an image has `tiles` of them. Its taps, counted through all sample
# groups, begin with `first` and end before `last`. `rings` are the rows of each tile, the blends of
# each tile, and the weights. `bars` has for each ring the barriers of its full stages and those of
# its empty ones.
Work = namedtuple(
    "Work",
    "points weight offset mask bias lists entries out parts g number splits "
    "b tile tiles c0 split first last rings bars",
)


@gluon.jit
def await_empty(bars, i):
    """Wait until the stage for a ring's i-th blocks is no longer in use, and return that stage."""
    stage = i % bars.shape[0]
    mbarrier.wait(bars.index(stage), ((i // bars.shape[0]) & 1) ^ 1)
    return stage


@gluon.jit
def lists_of(w, t, stop, TILES: gl.constexpr):
    """(Start, length) of the tiles' lists for taps t. From the tap `stop` on they are empty."""
    groups = w.g.sample_groups // w.g.per_offset
    item = w.b.to(gl.int64) * groups + t // w.g.taps // w.g.per_offset
    at = w.lists + ((item * w.g.taps + t % w.g.taps) * w.tiles + w.tile)
    found = ()
    for k in gl.static_range(TILES):
        here = (t < stop) & (w.tile + k < w.tiles)
        length = gl.load(at + k, mask=here, other=0)
        end = gl.load(at + w.number + 1 + k, mask=here, other=0)
        found = found + ((end - length, length.to(gl.int32)),)
    return found


@gluon.jit
def advance(at, w, LISTED: gl.constexpr, TILES: gl.constexpr):
    """From (tap, its lists, the next tap's lists) go on past LISTED entries of each list."""
    t, current, following = at
    more = gl.maximum(current[0][1], current[TILES - 1][1]) > LISTED
    t += gl.where(more, 0, 1)
    fresh = lists_of(w, t + 1, gl.where(more, 0, w.last), TILES)
    rest = ()
    later = ()
    for k in gl.static_range(TILES):
        start = gl.where(more, current[k][0] + LISTED, following[k][0])
        length = gl.where(more, gl.maximum(current[k][1] - LISTED, 0), following[k][1])
        rest = rest + ((start, length),)
        start = gl.where(more, following[k][0], fresh[k][0])
        length = gl.where(more, following[k][1], fresh[k][1])
        later = later + ((start, length),)
    return t, rest, later


@gluon.jit
def count_turns(w, LISTED: gl.constexpr, TILES: gl.constexpr):
    """How many turns `advance` needs to reach the end. Every tap takes at least one."""
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [4], [0]))
    total = gl.zeros_like(lane)
    for first in range(w.first, w.last, 32):
        t = first + lane
        found = lists_of(w, t, w.last, TILES)
        length = gl.maximum(found[0][1], found[TILES - 1][1])
        turns = gl.maximum((length + LISTED - 1) // LISTED, 1)
        total += gl.where(t < w.last, turns, 0)
    return gl.sum(total, 0)


@gluon.jit
def entries_of(w, current, layout: gl.constexpr, LISTED: gl.constexpr):
    """The first LISTED positions of each list, with 0 after the list's end."""
    e = gl.arange(0, LISTED, layout=layout)
    found = ()
    for k in gl.static_range(len(current)):
        found = found + (gl.load(w.entries + current[k][0] + e, mask=e < current[k][1], other=0),)
    return found


@gluon.jit
def samples_of(w, t, current, listed, layout: gl.constexpr, LISTED: gl.constexpr):
    """Read the offsets and the mask of entries, as they are stored."""
    e = gl.arange(0, LISTED, layout=layout)
    s, tap = t // w.g.taps, t % w.g.taps
    found = ()
    for k in gl.static_range(len(current)):
        inside = e < current[k][1]
        found = found + (sampling.read(w.offset, w.mask, w.b, s, tap, listed[k], inside, w.g),)
    return found


@gluon.jit
def corner_of(tile, g, TILE: gl.constexpr):
    """The first pixel of a tile."""
    cell = sampling.unravel(tile, sampling.tiles_across(g.image, TILE))
    corner = ()
    for a in gl.static_range(len(TILE)):
        corner = corner + (cell[a] * TILE[a],)
    return corner


@gluon.jit
def blend_of(given, p, length, tap, corner, g, dtype: gl.constexpr, TILE: gl.constexpr,
             layout: gl.constexpr, LISTED: gl.constexpr):  # fmt: skip
    """The shares of pixels in samples, times the mask [LISTED, 64]. A lane has one entry, and half
    the tile's pixels or all of them. Listed samples are valid, so that no bounds are checked."""
    inside = gl.arange(0, LISTED, layout=gl.SliceLayout(1, layout)) < length
    pixel = sampling.unravel(gl.arange(0, 64, layout=gl.SliceLayout(0, layout)), TILE)
    starts = sampling.starts_of(sampling.unravel(p, g.point), sampling.unravel(tap, g.kernel), g)
    offsets, masks = given
    amplitude = gl.where(inside, 1.0, 0.0)
    if len(masks) > 0:
        amplitude = gl.where(inside, masks[0].to(gl.float32), 0.0)
    blend = amplitude[:, None]
    for a in gl.static_range(len(TILE)):
        value = offsets[a].to(gl.float32)
        floor = gl.floor(value)
        low = (starts[a] + floor.to(gl.int32) - corner[a]).to(gl.float32) + (value - floor)
        away = gl.abs(low[:, None] - pixel[a][None, :].to(gl.float32))
        blend = blend * gl.maximum(1.0 - away, 0.0)
    return blend.to(dtype)


@gluon.jit
def bring_all(w, TILE: gl.constexpr):
    """Bring blends, rows of points, and weights to shared memory."""
    rows, blends, weights = w.rings
    row_bars, blend_bars, weight_bars = w.bars
    g = w.g
    dtype: gl.constexpr = w.points.dtype.element_ty
    TILES: gl.constexpr = len(rows)
    LISTED: gl.constexpr = blends[0].shape[1]
    by_entry: gl.constexpr = gl.BlockedLayout(
        [1, LISTED // 2], [32, 1], [LISTED // 32, 128 // LISTED], [1, 0]
    )
    entry: gl.constexpr = gl.SliceLayout(1, by_entry)
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    blocks = (g.outputs + OUTPUTS - 1) // OUTPUTS
    e = gl.arange(0, LISTED, layout=gl.SliceLayout(1, copies))
    o = gl.arange(0, OUTPUTS, layout=gl.SliceLayout(0, copies))
    points = w.points + w.b.to(gl.int64) * g.positions * g.padded_outputs
    at = (w.first, lists_of(w, w.first, w.last, TILES), lists_of(w, w.first + 1, w.last, TILES))
    listed = entries_of(w, at[1], entry, LISTED)
    given = samples_of(w, w.first, at[1], listed, entry, LISTED)
    at1 = advance(at, w, LISTED, TILES)
    listed1 = entries_of(w, at1[1], entry, LISTED)
    i = 0 * g.outputs
    step = 0 * g.outputs
    while at[0] < w.last:
        t, current, following = at
        at2 = advance(at1, w, LISTED, TILES)
        listed2 = entries_of(w, at2[1], entry, LISTED)
        given1 = samples_of(w, at1[0], at1[1], listed1, entry, LISTED)
        sources = entries_of(w, current, gl.SliceLayout(1, copies), LISTED)
        for k in gl.static_range(TILES):
            blend = blend_of(given[k], listed[k], current[k][1], t % g.taps,
                             corner_of(w.tile + k, g, TILE), g, dtype, TILE, by_entry,
                             LISTED)  # fmt: skip
            stage = await_empty(blend_bars[1], i)
            blends[k].index(stage).store(blend)
        common.publish()
        mbarrier.arrive(blend_bars[0].index(i % blend_bars[0].shape[0]), count=1)
        i += 1
        for block in range(blocks):
            stage = await_empty(weight_bars[1], step)
            row = t * g.padded_outputs + block * OUTPUTS
            common.bring(w.weight, row, w.c0, 0, weights, weight_bars[0], stage, True, "native")
            stage = await_empty(row_bars[1], step)
            for k in gl.static_range(TILES):
                place = sources[k] * g.padded_outputs + block * OUTPUTS
                load_rows(
                    rows[k].index(stage), points + (place[:, None] + o[None, :]),
                    mask=(e < current[k][1])[:, None] & (o >= 0)[None, :],
                )  # fmt: skip
            async_copy.mbarrier_arrive(row_bars[0].index(stage), increment_count=False)
            step += 1
        at = at1
        at1 = at2
        listed = listed1
        listed1 = listed2
        given = given1


@gluon.jit
def put(k: gl.constexpr, w, out, x, TILE: gl.constexpr, LAST: gl.constexpr,
        RUN: gl.constexpr = 1):  # fmt: skip
    """Store the result of the program's k-th tile [64, channels], RUN neighbours at once."""
    layout: gl.constexpr = x.type.layout
    g = w.g
    local = sampling.unravel(gl.arange(0, 64, layout=gl.SliceLayout(1, layout)), TILE)
    c = w.c0 + gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, layout))
    corner = corner_of(w.tile + k, g, TILE)
    here = local[0] >= 0
    for a in gl.static_range(len(TILE)):
        here = here & (corner[a] + local[a] < g.image[a])
    here = here & (w.tile + k < w.tiles)
    pixel = sampling.ravel(corner, g.image) + sampling.ravel(local, g.image)
    out += (w.split.to(gl.int64) * g.batch + w.b) * g.pixels * g.channels
    if LAST:
        place = (pixel * g.channels)[:, None] + c[None, :]
    else:
        place = pixel[:, None] + (c * g.pixels)[None, :]
        place = gl.max_contiguous(gl.multiple_of(place, (RUN, 1)), (RUN, 1))
    keep = here[:, None] & (c < g.channels)[None, :]
    gl.store(out + place, x, mask=gl.max_constancy(keep, (RUN, 1)))


@gluon.jit
def deliver(k: gl.constexpr, w, acc, room, TILE: gl.constexpr, LAST: gl.constexpr,
            MMA: gl.constexpr):  # fmt: skip
    """Store the sum of the program's k-th tile, or this split's part of it. A whole sum goes
    through the shared memory `room`, whose content is no longer needed."""
    g = w.g
    BLOCK_C: gl.constexpr = acc.shape[1]
    dtype: gl.constexpr = room.dtype
    if w.splits > 1:
        put(k, w, w.parts, acc, TILE, LAST)
    else:
        if w.bias is not None:
            c = w.c0 + gl.arange(0, BLOCK_C, layout=gl.SliceLayout(0, MMA))
            acc += gl.load(w.bias + c, mask=c < g.channels, other=0.0).to(gl.float32)[None, :]
        common.barrier()  # all threads have read what `room` held
        layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_C], dtype)
        staged = common.reinterpret(room, dtype, [64, BLOCK_C], layout)
        staged.store(acc.to(dtype))
        common.barrier()
        if LAST:
            target: gl.constexpr = gl.BlockedLayout(
                [1, 8], [256 // BLOCK_C, BLOCK_C // 8], [4, 1], [1, 0]
            )
            put(k, w, w.out, staged.load(target), TILE, LAST)
        elif g.image[len(TILE) - 1] % 4 == 0 and TILE[len(TILE) - 1] % 4 == 0:
            fours: gl.constexpr = gl.BlockedLayout([4, 1], [2, 16], [1, 4], [0, 1])
            put(k, w, w.out, staged.load(fours), TILE, LAST, 4)
        else:
            ones: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [1, 4], [0, 1])
            put(k, w, w.out, staged.load(ones), TILE, LAST)


@gluon.jit
def multiply_all(k: gl.constexpr, w, TILE: gl.constexpr, LAST: gl.constexpr, MMA: gl.constexpr):
    """Sum the products of the program's k-th tile, and store the result."""
    TILES: gl.constexpr = len(w.rings[0])
    rows = w.rings[0][k]
    blends = w.rings[1][k]
    weights = w.rings[2]
    row_bars, blend_bars, weight_bars = w.bars
    g = w.g
    dtype: gl.constexpr = rows.dtype
    LISTED: gl.constexpr = blends.shape[1]
    BLOCK_C: gl.constexpr = weights.shape[2]
    operand: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    acc = gl.zeros([64, BLOCK_C], gl.float32, layout=MMA)
    z = gl.zeros([64, OUTPUTS], gl.float32, layout=SMALL)
    blocks = (g.outputs + OUTPUTS - 1) // OUTPUTS
    steps = blocks * count_turns(w, LISTED, TILES)
    for step in range(steps):
        at = common.await_full(blend_bars[0], step // blocks, step % blocks == 0)
        stage = common.await_full(row_bars[0], step)
        fence_async_shared()
        blend = blends.index(at).permute((1, 0))
        z = warpgroup_mma(blend, rows.index(stage), z, use_acc=False, is_async=True)
        z = warpgroup_mma_wait(0, deps=[z])
        common.barrier()
        mbarrier.arrive(row_bars[1].index(stage), count=1)
        mbarrier.arrive(blend_bars[1].index(at), count=1, pred=(step + 1) % blocks == 0)
        factor = gl.convert_layout(z.to(dtype), operand)
        stage = common.await_full(weight_bars[0], step)
        acc = warpgroup_mma(factor, weights.index(stage), acc, is_async=True)
        acc, factor = warpgroup_mma_wait(0, deps=[acc, factor])
        common.barrier()
        mbarrier.arrive(weight_bars[1].index(stage), count=1)
    deliver(k, w, acc, rows, TILE, LAST, MMA)


@gluon.jit
def backward_sorted_hopper(points, weight, offset, mask, bias, lists, entries, out, parts, g,
                           number, splits, TILE: gl.constexpr, LAST: gl.constexpr,
                           BLOCK_C: gl.constexpr, LISTED: gl.constexpr, TILES: gl.constexpr,
                           RINGS: gl.constexpr, MMA: gl.constexpr, REGISTERS: gl.constexpr,
                           num_warps: gl.constexpr, CHAINED: gl.constexpr):  # fmt: skip
    """The image gradient. The arguments are those of backward_sorted.

    Grid: (B x runs of TILES tiles, blocks of C, splits)."""
    sampling.wait_for_previous(CHAINED)
    dtype: gl.constexpr = points.dtype.element_ty
    tiles = sampling.product(sampling.tiles_across(g.image, TILE))
    runs = (tiles + TILES - 1) // TILES
    split = gl.program_id(2)
    total = g.sample_groups * g.taps
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([LISTED, OUTPUTS], dtype)
    rows = ()
    blends = ()
    for _ in gl.static_range(TILES):
        rows = rows + (gl.allocate_shared_memory(dtype, [RINGS[0], LISTED, OUTPUTS], layout),)
        blends = blends + (gl.allocate_shared_memory(dtype, [RINGS[1], LISTED, 64], layout),)
    weights = gl.allocate_shared_memory(dtype, [RINGS[2], OUTPUTS, BLOCK_C], weight.layout)
    bars = (
        (common.allocate_bars(RINGS[0], 128), common.allocate_bars(RINGS[0], TILES)),
        (common.allocate_bars(RINGS[1]), common.allocate_bars(RINGS[1], TILES)),
        (common.allocate_bars(RINGS[2]), common.allocate_bars(RINGS[2], TILES)),
    )
    common.publish()
    w = Work(
        *(points, weight, offset, mask, bias, lists, entries, out, parts, g, number, splits),
        b=gl.program_id(0) // runs,
        tile=gl.program_id(0) % runs * TILES,
        tiles=tiles,
        c0=gl.program_id(1) * BLOCK_C,
        split=split,
        first=split * total // splits,
        last=(split + 1) * total // splits,
        rings=(rows, blends, weights),
        bars=bars,
    )
    # Constants are passed beside `w`, since Triton cannot join tuples with constants in them.
    if TILES == 1:
        gl.warp_specialize(
            [(bring_all, (w, TILE)), (multiply_all, (0, w, TILE, LAST, MMA))], [4], [REGISTERS]
        )
    else:
        gl.warp_specialize(
            [
                (bring_all, (w, TILE)),
                (multiply_all, (0, w, TILE, LAST, MMA)),
                (multiply_all, (1, w, TILE, LAST, MMA)),
            ],
            [4, 4],
            [REGISTERS, REGISTERS],
        )


def takes(call: Call) -> bool:
    n = call.sizes
    return (
        common.takes_any(call)
        and call.precision == "native"
        and n.sample_groups * n.taps * n.padded_outputs * whole_blocks(n.channels) <= 2**24
        and max(n.positions * n.padded_outputs, n.item) < 2**31
    )


def write(
    call: Call, points: Operand, bias: Buffer | None, out: Operand, lists: tuple[Buffer, Buffer]
) -> None:
    n = call.sizes
    block_c = math.gcd(256, whole_blocks(n.channels))
    tiles = call.tiles("backward_sorted_hopper", block_c)
    # At stride 1, in two dimensions, the samples of about 81 positions touch a tile of 64 pixels.
    listed = min(128, max(32, triton.next_power_of_2(100 // math.prod(n.stride))))
    rows, *others = tiles.rings
    rings = (max(rows, block_c // listed), *others)  # the result has to fit where the rows lie
    tile, count = tiles_of(call)
    programs, blocks = n.batch * triton.cdiv(count, tiles.tiles), triton.cdiv(n.channels, block_c)
    at_once = tiles.resident * call.multiprocessors
    splits = max(1, min(n.sample_groups * n.taps, at_once // (programs * blocks)))
    threads = tiles.resident * 128 * (1 + tiles.tiles)
    constants = dict(TILE=tile, BLOCK_C=block_c, LISTED=listed, TILES=tiles.tiles)
    constants |= dict(MMA=common.mma_layout(block_c, 4), RINGS=rings, REGISTERS=tiles.registers)
    call.launch_split(
        *(backward_sorted_hopper, (programs, blocks, splits), constants, out, bias),
        **arguments_of(call, points, lists),
        **dict(weight=call.weight(Order.BY_GROUP), warps=tiles.warps),
        descriptors={"weight": common.block(64, block_c, dtype=call.dtype)},
        # A multiprocessor has 65536 registers.
        registers=65536 // threads // 8 * 8 if tiles.resident > 1 else 0,
    )


VARIANT = Variant("backward_sorted_hopper", takes, write, order=Order.BY_GROUP)
