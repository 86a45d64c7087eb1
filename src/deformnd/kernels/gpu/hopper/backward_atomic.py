"""The gradients by offset, mask and image on Hopper, where many channels share offsets and masks.

A program has a tile of positions and takes one tap of one sample group after another (common.py,
parted). It multiplies the points' tile, which stays in shared memory, by the tap's weights. The
product, in registers, is the gradient by every sample's channels. This times the values of the
sample's corners gives the gradients by offset and mask, and this times the corners' weights is
added to the image's gradient by atomic additions.

A lane has eight consecutive channels of a position at once, which it loads as 16 bytes of each
corner. The weights' channels are permuted so that these are exactly the lane's share of a product
(prepare.py, Order.ACCUMULATOR).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from .. import sampling
from ..backward_atomic import arguments_of
from ..layout import Call, Operand
from ..prepare import Order
from ..runtime import Buffer
from ..variants import Variant
from . import common


@gluon.jit
def bring_block(weight, number, first, per_tap, g, held, bars, pred, BLOCKS: gl.constexpr,
                SEVERAL: gl.constexpr, PRECISION: gl.constexpr):  # fmt: skip
    """Start the copy of a block of weights. Blocks are numbered by units from `first` on, then by
    blocks of image channels, and then by the BLOCKS blocks of point channels."""
    block_c: gl.constexpr = held.shape[2]
    stages: gl.constexpr = bars.shape[0]
    step = number // BLOCKS
    s, tap = common.parted(first + step // per_tap, g, SEVERAL)
    row = tap * g.padded_outputs + number % BLOCKS * held.shape[1]
    c0 = s * g.padded + step % per_tap * block_c
    common.bring(
        weight, row, c0, g.taps * g.padded_outputs, held, bars, number % stages, pred, PRECISION
    )


@gluon.jit
def multiply_blocks(tile, held, number, bars, BLOCKS: gl.constexpr, PRECISION: gl.constexpr,
                    MMA: gl.constexpr):  # fmt: skip
    """Wait for the BLOCKS blocks of weights from `number` on, and sum the products of the points'
    blocks by them. The waits come before the first product, and the wait for the last product is
    here, because else ptxas makes every product wait for the one before."""
    for j in gl.static_range(BLOCKS):
        common.await_full(bars, number + j)
    rows: gl.constexpr = tile.shape[1]
    across: gl.constexpr = held.shape[2]
    acc = gl.zeros([rows, across], gl.float32, layout=MMA)
    for j in gl.static_range(BLOCKS):
        x = common.factor(tile, j, PRECISION)
        w = common.factor(held, (number + j) % bars.shape[0], PRECISION)
        acc = common.multiply(x, w, acc, j > 0)
    return warpgroup_mma_wait(0, deps=[acc])


@gluon.jit
def backward_atomic_hopper(image, points, weight, offset, mask, grad_offset, grad_mask, grad_image,
                           g, tiles, splits, PRECISION: gl.constexpr, BLOCK_P: gl.constexpr,
                           BLOCK_O: gl.constexpr, BLOCKS: gl.constexpr, BLOCK_C: gl.constexpr,
                           STAGES: gl.constexpr, SEVERAL: gl.constexpr, MMA: gl.constexpr,
                           COLUMNS: gl.constexpr, SECTORS: gl.constexpr,
                           ROWS: gl.constexpr, CHAINED: gl.constexpr):  # fmt: skip
    """Write the gradients by offset and mask, and by the image (float32), each unless None.

    Weights come a block of point channels at a time, STAGES blocks ahead. Corners are being loaded
    while the points are multiplied. Atomic additions use the layout SECTORS, in which two lanes
    fill the 32 bytes of a sector.
    Grid: (batch x tiles of positions, splits of the taps).
    """
    sampling.wait_for_previous(CHAINED)
    dtype: gl.constexpr = gl.bfloat16 if PRECISION == "bf16x3" else points.dtype.element_ty
    parts: gl.constexpr = common.parts_in(PRECISION)
    rank: gl.constexpr = len(g.image)
    by_position: gl.constexpr = grad_offset is not None or grad_mask is not None
    at_row: gl.constexpr = gl.SliceLayout(1, COLUMNS)
    b = gl.program_id(0) // tiles
    p0 = (gl.program_id(0) % tiles) * BLOCK_P
    units = g.taps
    if SEVERAL:
        units = units * g.sample_groups
    first = gl.program_id(1) * units // splits
    last = (gl.program_id(1) + 1) * units // splits
    per_tap = g.padded // BLOCK_C
    steps = (last - first) * per_tap
    tile = gl.allocate_shared_memory(
        dtype, [parts * BLOCKS, BLOCK_P, BLOCK_O],
        gl.NVMMASharedLayout.get_default_for([BLOCK_P, BLOCK_O], dtype),
    )  # fmt: skip
    p = p0 + gl.arange(0, BLOCK_P, layout=gl.SliceLayout(1, ROWS))
    o = gl.arange(0, BLOCK_O, layout=gl.SliceLayout(0, ROWS))
    points += b.to(gl.int64) * g.positions * g.padded_outputs
    here = (p < g.positions)[:, None] & (o < g.padded_outputs)[None, :]
    for j in gl.static_range(BLOCKS):
        source = (p * g.padded_outputs + j * BLOCK_O)[:, None] + o[None, :]
        x = sampling.parts_of(gl.load(points + source, mask=here, other=0.0), dtype, PRECISION)
        for part in gl.static_range(parts):
            tile.index(j * parts + part).store(x[part])
    held = gl.allocate_shared_memory(dtype, [STAGES * parts, BLOCK_O, BLOCK_C], weight.layout)
    bars = common.allocate_bars(STAGES)
    common.publish()
    for s in gl.static_range(STAGES):
        bring_block(weight, s, first, per_tap, g, held, bars, s < steps * BLOCKS, BLOCKS, SEVERAL,
                    PRECISION)  # fmt: skip
    p = p0 + gl.arange(0, BLOCK_P, layout=at_row)
    inside = p < g.positions
    point = sampling.unravel(p, g.point)
    item = b.to(gl.int64) * g.item
    if by_position:
        image += item
        image_block = image + gl.arange(0, BLOCK_C, layout=gl.SliceLayout(0, COLUMNS))[None, :]
    if grad_image is not None:
        grad_image += item
    i = 0
    for unit in range(first, last):
        group, tap = common.parted(unit, g, SEVERAL)
        offsets, value = sampling.read(offset, mask, b, group, tap, p, inside, g)
        starts = sampling.starts_of(point, sampling.unravel(tap, g.kernel), g)
        axes, valid = sampling.cell_of(offsets, starts, inside, g)
        amplitude = sampling.amplitude_of(value, valid)
        dots = ()
        for _ in gl.static_range(2**rank):
            dots = dots + (gl.zeros([BLOCK_P], gl.float32, layout=at_row),)
        for block in range(per_tap):
            c0 = block * BLOCK_C
            if SEVERAL:
                c0 += group * g.plane
            values = ()
            if by_position:
                for q in gl.static_range(2**rank):
                    place = sampling.corner_pixel(axes, q, g) * g.row + c0
                    values = values + (gl.load(image_block + place[:, None]),)
            grad = multiply_blocks(tile, held, i * BLOCKS, bars, BLOCKS, PRECISION, MMA)
            common.barrier()
            for j in gl.static_range(BLOCKS):
                ahead = i * BLOCKS + j + STAGES
                bring_block(weight, ahead, first, per_tap, g, held, bars, ahead < steps * BLOCKS,
                            BLOCKS, SEVERAL, PRECISION)  # fmt: skip
            grad = gl.reshape(grad, [BLOCK_P, BLOCK_C // 32, 4, 4, 2])
            grad = gl.reshape(gl.permute(grad, (0, 1, 3, 2, 4)), [BLOCK_P, BLOCK_C])
            grad = gl.convert_layout(grad, COLUMNS)
            if by_position:
                sums = ()
                for q in gl.static_range(2**rank):
                    sums = sums + (dots[q] + gl.sum(values[q].to(gl.float32) * grad, 1),)
                dots = sums
            if grad_image is not None:
                c = c0 + gl.arange(0, BLOCK_C, layout=gl.SliceLayout(0, SECTORS))
                for q in gl.static_range(2**rank):
                    factor = sampling.corner_weight(axes, q) * amplitude
                    touched = gl.convert_layout((valid & (factor != 0.0)).to(gl.int32),
                                                gl.SliceLayout(1, SECTORS))  # fmt: skip
                    place = sampling.corner_pixel(axes, q, g) * g.row
                    place = gl.convert_layout(place, gl.SliceLayout(1, SECTORS))
                    gl.atomic_add(
                        grad_image + (place[:, None] + c[None, :]),
                        gl.convert_layout(grad * factor[:, None], SECTORS),
                        mask=(touched != 0)[:, None] & (c >= 0)[None, :],
                        sem="relaxed",
                    )
            i += 1
        if by_position:
            sums = sampling.contract(dots, axes)
            base = b.to(gl.int64) * g.taps + tap
            if SEVERAL:
                base = (b.to(gl.int64) * g.sample_groups + group) * g.taps + tap
            if grad_offset is not None:
                for a in gl.static_range(rank):
                    total = gl.where(valid, sums[a] * amplitude, 0.0)
                    place = grad_offset + (base * rank + a) * g.positions
                    gl.store(place + p, total.to(grad_offset.dtype.element_ty), mask=inside)
            if grad_mask is not None:
                total = gl.where(valid, sums[rank], 0.0)
                place = grad_mask + base * g.positions
                gl.store(place + p, total.to(grad_mask.dtype.element_ty), mask=inside)


class Plan(NamedTuple):
    """The blocks and stages that suit a call, and the shared memory that a program then takes."""

    block_p: int
    block_o: int
    blocks: int  # of point channels
    block_c: int
    stages: int
    warps: int
    shared: int


def plan_of(call: Call) -> Plan:
    n = call.sizes
    row = call.tiles("backward_atomic_hopper", n.padded_outputs)
    block_o = min(row.block_o, n.padded_outputs & -n.padded_outputs)
    blocks = n.padded_outputs // block_o
    # A sample group that is one wide block gains nothing from it (314 against 271 us, 48 channels).
    wide = n.padded > row.block_c > 32 and n.padded % row.block_c == 0 and len(n.image) < 3
    block_c = row.block_c if wide else 32
    # Wide blocks are twice as large, and one stage less leaves more of the cache.
    stages = max(row.stages - 1 if wide else row.stages, blocks + 1)
    size = row.block_p * n.padded_outputs + stages * block_o * block_c
    # A multiprocessor keeps 1024 bytes for itself beside those of a program.
    shared = 2 * common.parts_in(call.precision) * size + 1024
    return Plan(row.block_p, block_o, blocks, block_c, stages, row.warps, shared)


def takes(call: Call) -> bool:
    if not common.takes_wide(call):
        return False
    plan = plan_of(call)
    return plan.blocks <= 8 and plan.shared <= call.device.shared_memory


def write(
    call: Call,
    image: Operand | None,
    points: Operand,
    by_image: Buffer | None,
    by_offset: Buffer | None,
    by_mask: Buffer | None,
) -> None:
    n, plan = call.sizes, plan_of(call)
    block_p, block_o, blocks, block_c, stages, warps, _ = plan
    tiles = triton.cdiv(n.positions, block_p)
    programs = n.batch * tiles
    units = n.sample_groups * n.taps
    if block_c > 32 and n.padded_outputs <= 128:
        name, steps = "backward_atomic_hopper wide", n.padded // block_c
    else:
        name, steps = "backward_atomic_hopper", 1
    splits = call.splits(name, programs, warps, units, work=steps, steps=steps)
    across = min(32, block_o // 8)
    constants: dict[str, Any] = dict(
        **dict(BLOCK_P=block_p, BLOCK_O=block_o, BLOCKS=blocks, BLOCK_C=block_c, STAGES=stages),
        **dict(SEVERAL=n.sample_groups > 1, MMA=common.mma_layout(block_c, warps)),
        COLUMNS=common.rows_layout(block_p, block_c, warps),
        SECTORS=common.rows_layout(block_p, block_c, warps, run=4),
        ROWS=gl.BlockedLayout([1, 8], [32 // across, across], [warps, 1], [1, 0]),
    )
    call.launch(
        *(backward_atomic_hopper, (programs, splits), constants),
        **arguments_of(call, image, call.rows(points), by_image, by_offset, by_mask),
        weight=call.weight(Order.ACCUMULATOR),
        **dict(tiles=tiles, splits=splits, warps=warps),
        descriptors={"weight": common.block(block_o, block_c, dtype=call.dtype)},
    )


VARIANT = Variant("backward_atomic_hopper", takes, write, order=Order.ACCUMULATOR)
