"""The gradient of the weight: points^T @ columns, summed over all positions.

A program samples the columns (columns.py, Note [rows]) of some taps for a block of channels, one
tile of BLOCK_P positions after another, and multiplies them by BLOCK_O channels of the points.
Programs share the positions: each writes the sum of its share, and these sums are added up
afterwards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import columns, sampling
from .layout import Call, Operand, fit
from .runtime import Buffer
from .tiles import NARROW, Tiles
from .variants import portable


@triton.jit
def read_ahead(offset, mask, s, tap, t, tiles, g, BLOCK_P: tl.constexpr):
    """Read the offsets and masks of tile t of the positions, one turn before they are used."""
    p = (t % tiles * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]
    return sampling.read(offset, mask, t // tiles, s, tap, p, p < g.positions, g)


@triton.jit
def backward_weight(image, points, offset, mask, parts, g, tiles, blocks, splits,
                    GROUPED: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
                    EVEN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr,
                    GROUPS: tl.constexpr, TAPS: tl.constexpr, BLOCK_C: tl.constexpr,
                    CHANNELS: tl.constexpr, CHAINED: tl.constexpr):  # fmt: skip
    """Sums [splits, K, C / groups, O] over shares of the positions.

    Grid: (blocks of taps x blocks of channels, blocks of the outputs in the same weight groups,
    splits).
    """
    sampling.wait_for_previous(CHAINED)
    tap = tl.program_id(0) // blocks * TAPS
    block = tl.program_id(0) % blocks
    chunks = tl.cdiv(g.padded, BLOCK_C)
    s0 = block // chunks * GROUPS
    c0 = block % chunks * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    first, last = columns.channels_of(s0, c0, g, GROUPS, BLOCK_C, CHANNELS)
    o_first, o_last = columns.met(first, last, g.group_in, g.group_out)
    # Blocks of outputs begin at a multiple of eight, so that loads of points are aligned.
    o = o_first // 8 * 8 + tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    WIDE: tl.constexpr = GROUPS * TAPS == 1
    # The sums are TURNED, which means transposed, so that the larger factor need not be. The three
    # products of "bf16x3" are faster as they are, since outputs make more rows.
    TURNED: tl.constexpr = WIDE and PRECISION != "bf16x3"
    if TURNED:
        acc = tl.zeros((BLOCK_C, BLOCK_O), tl.float32)
    else:
        acc = tl.zeros((BLOCK_O, GROUPS * TAPS * BLOCK_C), tl.float32)
    split = tl.program_id(2).to(tl.int64)
    total = g.batch * tiles
    start = (split * total // splits).to(tl.int32)
    stop = ((split + 1) * total // splits).to(tl.int32)
    if WIDE:
        read = read_ahead(offset, mask, s0, tap, start, tiles, g, BLOCK_P)
    for t in range(start, stop):
        b = t // tiles
        p = t % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = p < g.positions
        x = columns.read_point_parts(points, b, p, inside, o, g, PRECISION, INDEX)
        item = image + b.to(tl.int64) * g.item
        if WIDE:
            now = read
            read = read_ahead(offset, mask, s0, tap, tl.minimum(t + 1, stop - 1), tiles, g, BLOCK_P)
            samples = columns.sample_block(
                item, now, p[:, None], s0, tap, inside[:, None], c0, g, INDEX, EVEN, BLOCK_C
            )
        else:
            s, k, _, here, axes, amplitude, valid = columns.samples_of(
                offset, mask, b, s0, tap, g.taps, p, inside, g, INDEX, GROUPS, TAPS
            )
            samples = columns.sample(item, axes, amplitude, s, c, g, INDEX, EVEN)
        y = sampling.parts_of(samples, image.dtype.element_ty, PRECISION)
        if TURNED:
            acc = columns.dot_once(columns.transpose(y, PRECISION), x, acc, PRECISION)
        else:
            acc = columns.dot_once(columns.transpose(x, PRECISION), y, acc, PRECISION)
    if TURNED:
        acc = tl.trans(acc)
    k, c, c_in = columns.columns_of(s0, c0, tap, g.taps, g.group_channels, g, GROUPS, TAPS, BLOCK_C)
    row = c[None, :]
    keep = (o < o_last)[:, None] & c_in[None, :]
    if GROUPED:
        row = row - (o // g.group_out * g.group_in)[:, None]
        keep = keep & (row >= 0) & (row < g.group_in)
    row = ((split * g.taps + k) * g.group_in + row) * g.padded_outputs
    tl.store(parts + (row + o[:, None]), acc, mask=keep)


def write(
    call: Call, image: Operand, points: Operand, out: Buffer, tiles: Tiles | None = None
) -> None:
    sizes = call.sizes
    if tiles is None:
        name = "backward_weight narrow" if call.narrow else "backward_weight"
        tiles = call.tiles(name, sizes.group_out)
    # A block has all channels of a narrow group, since smaller runs would find its cells anew.
    constants = columns.blocks_of(call, tiles, NARROW)
    groups, block_c = constants["GROUPS"], constants["BLOCK_C"]
    outputs = columns.outputs_of(call, constants)
    block_o = fit(outputs, tiles.block_o)
    # Blocks begin at a multiple of eight, so a weight group that does not begin at one has up to
    # seven outputs of other groups before its own.
    extra = 7 if sizes.outputs > outputs and sizes.group_out % 8 else 0
    across = triton.cdiv(outputs + extra, block_o)
    blocks = triton.cdiv(sizes.sample_groups, groups) * triton.cdiv(sizes.padded, block_c)
    programs = triton.cdiv(sizes.taps, constants["TAPS"]) * blocks
    total = triton.cdiv(sizes.positions, tiles.block_p)
    splits = call.splits(
        *("backward_weight", programs * across, tiles.warps, sizes.batch * total),
        added=sizes.weights,
        most=call.filling(programs * across),
    )
    shape = (splits, sizes.taps, sizes.group_in, sizes.padded_outputs)
    parts = call.plan.scratch(*shape, dtype=torch.float32)
    call.launch(
        *(backward_weight, (programs, across, splits), dict(BLOCK_O=block_o, **constants)),
        **dict(warps=tiles.warps, stages=tiles.stages, tiles=total, blocks=blocks),
        **dict(image=call.image(image), points=call.factors(points), parts=parts, splits=splits),
    )
    call.reduce_weight(parts, out)


VARIANTS = portable("backward_weight", write, wants_parts=True)
