"""The forward's product of im2col.py on Hopper, by wgmma.

The copy engine brings blocks of columns and of weights, STAGES steps deep. A product is under way
while the next blocks are awaited.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from .. import im2col, sampling
from ..layout import Call, fit
from ..runtime import Buffer
from ..tiles import Tiles
from ..variants import Variant
from . import common


@gluon.jit
def bring_step(laid, weight, step, row, o, room, outputs, held, bars, stage, pred,
               PRECISION: gl.constexpr):  # fmt: skip
    """Start the copies of a step's blocks of columns and of weights."""
    columns, weights = held
    block: gl.constexpr = columns.shape[2]
    rows: gl.constexpr = columns.shape[1] + weights.shape[1]
    size: gl.constexpr = 2 * common.parts_in(PRECISION) * rows * block
    mbarrier.expect(bars.index(stage), size, pred=pred)
    k = step * block
    common.bring_parts(laid, row, k, room, columns, bars, stage, pred, PRECISION)
    common.bring_parts(weight, o, k, outputs, weights, bars, stage, pred, PRECISION)


@gluon.jit
def multiply_step(held, stage, acc, PRECISION: gl.constexpr, use_acc: gl.constexpr = True):
    """Start the product of a stage's blocks, which have arrived."""
    x = common.factor(held[0], stage, PRECISION)
    w = common.factor(held[1], stage, PRECISION, True)
    return common.multiply(x, w, acc, use_acc)


@gluon.jit
def deliver(out, acc, bias, first_row, row, o, number, g, LAST: gl.constexpr, INDEX: gl.constexpr,
            MMA: gl.constexpr, STORED: gl.constexpr):  # fmt: skip
    """Store a block of the result, plus a bias, in the layout STORED."""
    if bias is not None:
        here = o + gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, MMA))
        acc += gl.load(bias + here, mask=here < g.outputs, other=0.0).to(gl.float32)[None, :]
    p = row + gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, STORED))
    c = o + gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, STORED))
    x = gl.convert_layout(acc.to(out.dtype.element_ty), STORED)
    im2col.store_rows(out, x, None, first_row.to(gl.int64) + p, p < number, c, c < g.outputs, g,
                      LAST, INDEX)  # fmt: skip


@gluon.jit
def forward_product_hopper(laid, weight, bias, out, parts, g, first_row, room, number, blocks,
                           splits, LAST: gl.constexpr, PRECISION: gl.constexpr,
                           INDEX: gl.constexpr, BLOCK_P: gl.constexpr, BLOCK_O: gl.constexpr,
                           BLOCK_C: gl.constexpr, STAGES: gl.constexpr, MMA: gl.constexpr,
                           STORED: gl.constexpr, CHAINED: gl.constexpr):  # fmt: skip
    """The outputs at the `number` rows whose columns have been written (im2col.py,
    multiply_columns).

    Grid: (tiles of rows x blocks of outputs, splits of the columns).
    """
    sampling.wait_for_previous(CHAINED)
    count: gl.constexpr = common.parts_in(PRECISION)
    UNDER_WAY: gl.constexpr = 2 * count - 1  # products of a step
    dtype: gl.constexpr = weight.dtype
    row = gl.program_id(0) // blocks * BLOCK_P
    o = gl.program_id(0) % blocks * BLOCK_O
    steps = (g.taps * g.columns + BLOCK_C - 1) // BLOCK_C
    first = gl.program_id(1) * steps // splits
    last = (gl.program_id(1) + 1) * steps // splits
    held = (
        gl.allocate_shared_memory(dtype, [STAGES * count, BLOCK_P, BLOCK_C], laid.layout),
        gl.allocate_shared_memory(dtype, [STAGES * count, BLOCK_O, BLOCK_C], weight.layout),
    )
    bars = common.allocate_bars(STAGES)
    common.publish()
    for s in gl.static_range(STAGES):
        bring_step(laid, weight, first + s, row, o, room, g.padded_outputs, held, bars, s,
                   first + s < last, PRECISION)  # fmt: skip
    acc = gl.zeros([BLOCK_P, BLOCK_O], gl.float32, layout=MMA)
    common.await_full(bars, 0)
    acc = multiply_step(held, 0, acc, PRECISION, False)
    acc = warpgroup_mma_wait(UNDER_WAY, deps=[acc])
    for i in range(1, last - first):
        stage = common.await_full(bars, i)
        acc = multiply_step(held, stage, acc, PRECISION)
        acc = warpgroup_mma_wait(UNDER_WAY, deps=[acc])
        common.barrier()
        # Only this step's products are under way now, so the stage of the one before is free.
        ahead = i - 1 + STAGES
        bring_step(laid, weight, first + ahead, row, o, room, g.padded_outputs, held, bars,
                   (i - 1) % STAGES, first + ahead < last, PRECISION)  # fmt: skip
    acc = warpgroup_mma_wait(0, deps=[acc])
    if splits > 1:
        p = row + gl.arange(0, BLOCK_P, layout=gl.SliceLayout(1, MMA))
        c = o + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(0, MMA))
        parts += gl.program_id(1) * room * g.outputs
        common.store_points(parts, acc, p, c, p < number, g, True, 1)
    else:
        deliver(out, acc, bias, first_row, row, o, number, g, LAST, INDEX, MMA, STORED)


def launch_product(
    call: Call,
    row: Tiles,
    rows: int,
    splits: int,
    weight: Buffer,
    last: bool,
    *,
    laid: Buffer,
    **rest: Any,
) -> None:
    """Launch the product of a lot (im2col.py, launch_product)."""
    n, parts = call.sizes, common.parts_in(call.precision)
    block_o = fit(n.outputs, row.block_o, 64)
    blocks = triton.cdiv(n.outputs, block_o)
    if last:
        stored = gl.BlockedLayout([1, 8], [256 // block_o, block_o // 8], [row.warps, 1], [1, 0])
    else:
        stored = gl.BlockedLayout([1, 1], [32, 1], [4, row.warps // 4], [0, 1])
    length = laid.shape[-1]
    outputs = math.prod(weight.shape) // length
    call.launch(
        *(forward_product_hopper, (triton.cdiv(rows, row.block_p) * blocks, splits)),
        dict(
            **dict(LAST=last, BLOCK_P=row.block_p, BLOCK_O=block_o, BLOCK_C=row.block_c),
            **dict(STAGES=row.stages, MMA=common.mma_layout(block_o, row.warps), STORED=stored),
        ),
        **dict(rest, laid=laid._replace(shape=(parts * laid.shape[-2], length))),
        **dict(weight=weight._replace(shape=(outputs, length)), blocks=blocks, splits=splits),
        **dict(warps=row.warps),
        descriptors={
            "laid": common.block(row.block_p, row.block_c, dtype=call.dtype),
            "weight": common.block(block_o, row.block_c, dtype=call.dtype),
        },
    )


def takes(call: Call) -> bool:
    """Whether it takes a forward that im2col.py would take on any GPU."""
    return call.suits_hopper and im2col.takes_forward(call)


PRODUCT = im2col.Product("forward_product_hopper", launch_product)
VARIANT = Variant(
    "forward_product_hopper",
    takes,
    functools.partial(im2col.write_forward, product=PRODUCT),
    others=("sample_columns", "add_parts"),
)
FIRST = VARIANT._replace(takes=im2col.forward_beats_hopper)
