"""dF/dweight on Hopper: columns of samples, transposed, times points, by wgmma.

A program samples a tile of 64 positions for BLOCK_C channels of one tap, stores the columns, and
multiplies columns^T @ points while it loads the corners of its next tile. It adds up its share of
all tiles of the batch to a partial sum. Samples are tabulated for LISTED tiles at once (tables.py),
and the copy engine brings the points, STAGES tiles deep. Tensor cores round toward zero, so in
"bf16x3" they add up no more than a tile.
"""

from __future__ import annotations

import math

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from .. import sampling
from ..layout import Call, Operand
from ..runtime import Buffer
from ..tiles import POSITION_TILES
from ..variants import Variant
from . import common, tables


@gluon.jit
def size_of(g, TILE: gl.constexpr):
    """The size of the grid of positions, which are taken as one row if TILE has one axis."""
    if len(TILE) == len(g.point):
        return g.point
    else:
        return (g.positions,)


@gluon.jit
def start(tile, across, TILE: gl.constexpr):
    """A tile's batch item and its first position in it."""
    at = sampling.unravel(tile % sampling.product(across), across)
    first = ()
    for a in gl.static_range(len(TILE)):
        first = first + (at[a] * TILE[a],)
    return tile // sampling.product(across), first


@gluon.jit
def bring_points(points, b, first, o0, held, bars, stage, pred, g, PRECISION: gl.constexpr):
    """Start the copy of a tile of points into a stage; in "bf16x3" of its heads, then its tails."""
    parts: gl.constexpr = common.parts_in(PRECISION)
    for part in gl.static_range(parts):
        common.async_load(
            points, (b + part * g.batch,) + first + (o0,), bars.index(stage),
            held.index(stage * parts + part), pred=pred,
        )  # fmt: skip


@gluon.jit
def read_tile(offset, mask, tile, last, group, tap, lane, g, across, item,
              TILE: gl.constexpr):  # fmt: skip
    """What is known of the samples at the positions `lane` of tiles, as `tabulate` takes it."""
    b, first = start(gl.minimum(tile, last - 1), across, TILE)
    local = sampling.unravel(lane, TILE)
    inside = tile < last
    size = size_of(g, TILE)
    point = ()
    for a in gl.static_range(len(TILE)):
        at = first[a] + local[a]
        inside = inside & (at < size[a])
        point = point + (at,)
    p = sampling.ravel(point, size)
    if len(TILE) != len(g.point):
        point = sampling.unravel(p, g.point)
    given = sampling.read(offset, mask, b, group, tap, p, inside, g)
    starts = sampling.starts_of(point, sampling.unravel(tap, g.kernel), g)
    return starts, given, inside, b * item


@gluon.jit
def backward_weight_hopper(image, points, offset, mask, parts, g, splits, PRECISION: gl.constexpr,
                           TILE: gl.constexpr, BLOCK_O: gl.constexpr, BLOCK_C: gl.constexpr,
                           STAGES: gl.constexpr, LISTED: gl.constexpr, SEVERAL: gl.constexpr,
                           MMA: gl.constexpr, num_warps: gl.constexpr,
                           CHAINED: gl.constexpr):  # fmt: skip
    """Partial sums [splits, K, C, O] of the gradient, from points [B, *size, O], which in "bf16x3"
    are heads and then tails [2 x B, *size, O].

    Grid: (sample groups x blocks of C x K x blocks of O, splits)."""
    sampling.wait_for_previous(CHAINED)
    dtype: gl.constexpr = image.dtype.element_ty
    factor: gl.constexpr = points.dtype
    count: gl.constexpr = common.parts_in(PRECISION)
    words: gl.constexpr = BLOCK_C * dtype.primitive_bitwidth // 32
    size: gl.constexpr = 2 * count * 64 * BLOCK_O  # bytes of a tile of points
    COLUMNS: gl.constexpr = tables.columns_layout(words, num_warps)
    across = sampling.tiles_across(size_of(g, TILE), TILE)
    blocks = g.padded_outputs // BLOCK_O
    o0 = gl.program_id(0) % blocks * BLOCK_O
    tap = gl.program_id(0) // blocks % g.taps
    # The last block of channels ends where the channels do, so it may begin within the block
    # before.
    new = gl.program_id(0) // blocks // g.taps
    group = 0
    if SEVERAL:
        per_group = (g.group_channels + BLOCK_C - 1) // BLOCK_C
        group = new // per_group
        new = new % per_group
    new = new * BLOCK_C
    c0 = gl.minimum(new, g.padded - BLOCK_C) // 32 * 32
    split = gl.program_id(1)
    total = g.batch * sampling.product(across)
    first = split * (total // splits) + gl.minimum(split, total % splits)
    last = first + total // splits + gl.where(split < total % splits, 1, 0)

    columns = tables.allocate_columns(BLOCK_C, factor, PRECISION)
    held = gl.allocate_shared_memory(factor, [STAGES * count] + points.block_shape, points.layout)
    samples = tables.allocate(2 * LISTED, len(g.image), dtype)
    bars = common.allocate_bars(STAGES)
    common.publish()
    # The batch item and first position of the next tile to bring.
    b, at = start(first, across, TILE)
    for s in gl.static_range(STAGES - 1):
        mbarrier.expect(bars.index(s), size, pred=first + s < last)
        bring_points(points, b, at, o0, held, bars, s, first + s < last, g, PRECISION)
        at, over = sampling.following(at, size_of(g, TILE), TILE)
        b += over
    lane = gl.arange(0, LISTED * 64, layout=gl.BlockedLayout([1], [32], [num_warps], [0]))
    ahead = lane // 64
    lane = lane % 64
    item = g.pixels  # the rows of an image between batch items
    if SEVERAL:
        item = g.item // g.row
    known = read_tile(offset, mask, first + ahead, last, group, tap, lane, g, across, item, TILE)
    tables.tabulate(samples, 0, known, g)
    idle = held.index((STAGES - 1) * count).reshape([64, BLOCK_O])
    common.fill(columns[0].index(1), num_warps)
    common.fill(idle, num_warps)
    result = common.product_of_zeros(columns[0].index(1).permute((1, 0)), idle, MMA)
    acc = gl.zeros([BLOCK_C, BLOCK_O], gl.float32, layout=MMA)
    image = image.to(gl.pointer_type(gl.int32), bitcast=True)
    channel = c0 // 32
    if SEVERAL:
        channel += group * (g.plane // 32)
    image = image + (
        channel * (words * 32 // BLOCK_C) + gl.arange(0, words, layout=gl.SliceLayout(0, COLUMNS))
    )
    image = image[None, :]
    pitch = g.row // 32 * (words * 32 // BLOCK_C)
    values = tables.fetch(image, samples, 0, 0, pitch, g, COLUMNS)
    for i in range(last - first):
        refill = i % LISTED == 0
        if refill:
            tile = first + i + LISTED + ahead
            known = read_tile(offset, mask, tile, last, group, tap, lane, g, across, item, TILE)
        mixed = tables.mix(values, samples, i % (2 * LISTED), COLUMNS)
        tables.store_columns(columns, i % 2, mixed)
        # The tables reach at least one tile further. What they hold past the last tile is not used.
        values = tables.fetch(image, samples, (i + 1) % (2 * LISTED), 0, pitch, g, COLUMNS)
        stage = (i + STAGES - 1) % STAGES
        more = first + i + STAGES - 1 < last
        mbarrier.expect(bars.index(stage), size, pred=more)
        result = warpgroup_mma_wait(0, deps=[result])
        if PRECISION == "bf16x3":
            # This is volatile assembly, since LLVM would move a plain addition past the start of
            # the next product.
            acc = gl.inline_asm_elementwise(
                "add.f32 $0, $1, $2;", "=f,f,f", [acc, result], gl.float32, is_pure=False, pack=1
            )
        common.barrier()
        bring_points(points, b, at, o0, held, bars, stage, more, g, PRECISION)
        at, over = sampling.following(at, size_of(g, TILE), TILE)
        b += over
        stage = common.await_full(bars, i)
        x = tables.columns_at(columns, i % 2, True)
        y = ()
        for part in gl.static_range(count):
            y = y + (held.index(stage * count + part).reshape([64, BLOCK_O]),)
        result = common.multiply(x, y, result, PRECISION == "native")
        if refill:
            tables.tabulate(samples, (i // LISTED + 1) % 2, known, g)
    acc += warpgroup_mma_wait(0, deps=[result])
    c = c0 + gl.arange(0, BLOCK_C, layout=gl.SliceLayout(1, MMA))
    o = o0 + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(0, MMA))
    place = (split * g.taps + tap).to(gl.int64) * g.channels + group * g.group_channels + c
    place = place * g.padded_outputs
    here = (c >= new) & (c < g.group_channels)
    gl.store(parts + (place[:, None] + o[None, :]), acc, mask=here[:, None] & (o >= 0)[None, :])


def takes(call: Call) -> bool:
    n = call.sizes
    pixels = n.batch * n.item // n.row  # a table counts pixels through all batch items
    return (
        common.takes_wide(call)
        and n.padded >= 64
        and pixels * max(n.row, 4 ** len(n.image)) < 2**31
    )


def write(call: Call, image: Operand, points: Operand, out: Buffer) -> None:
    n, bf16x3 = call.sizes, call.precision == "bf16x3"
    rank = len(n.image)
    operation = "backward_weight_hopper 3d" if rank == 3 else "backward_weight_hopper"
    tiles = call.tiles(operation, math.gcd(256, n.padded_outputs))
    block_o = math.gcd(tiles.block_o, n.padded_outputs)
    programs = n.sample_groups * triton.cdiv(n.group_channels, tiles.block_c)
    programs *= n.taps * (n.padded_outputs // block_o)
    rows = call.parts(points) if bf16x3 else call.rows(points)
    across = tiles.warps // 4
    mma = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, across], instr_shape=[16, block_o // across, 16]
    )
    constants = dict(BLOCK_O=block_o, BLOCK_C=tiles.block_c, STAGES=tiles.stages, MMA=mma)
    constants |= dict(SEVERAL=n.sample_groups > 1)
    constants |= dict(LISTED=tiles.warps // 2)  # gives every lane one sample

    def count(size: tuple[int, ...], tile: tuple[int, ...]) -> int:
        return math.prod(triton.cdiv(s, t) for s, t in zip(size, tile, strict=True))

    # Neighbouring positions share pixels in the cache, so tiles have several axes, unless too much
    # of them would lie outside.
    near = (n.point, POSITION_TILES[rank])
    flat = ((n.positions,), (64,))
    taken = near if count(*near) <= 1.1 * count(*flat) else flat
    splits = call.splits(
        *("backward_weight_hopper", programs, tiles.warps, n.batch * count(*taken)),
        added=n.weights,
        most=call.filling(programs),
    )
    parts = call.plan.scratch(splits, n.taps, n.channels, n.padded_outputs, dtype=torch.float32)
    for size, tile in dict.fromkeys((near, flat)):
        shape = (n.batch * (2 if bf16x3 else 1), *size, n.padded_outputs)
        launch = call.make(
            *(backward_weight_hopper, (programs, splits), dict(TILE=tile, **constants)),
            descriptors={"points": common.block(1, *tile, block_o, dtype=call.dtype)},
            warps=tiles.warps,
            # A multiprocessor has 65536 registers.
            registers=min(255, 65536 // (32 * tiles.warps * tiles.resident) // 8 * 8),
            **dict(image=call.image(image), points=rows._replace(shape=shape)),
            **dict(parts=parts, splits=splits),
        )
        call.steps.launch(launch, (size, tile) == taken)
    call.reduce_weight(parts, out)


VARIANT = Variant("backward_weight_hopper", takes, write, wants_parts=True)
