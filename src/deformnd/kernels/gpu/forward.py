"""The forward: out[b, o, p] = bias[o] + sum over taps and channels of weight * sample.

A program samples BLOCK_P positions, tap after tap and a block of channels at a time, and multiplies
each such block of columns (columns.py, Note [rows]) by BLOCK_O rows of the weight. Where there are
few programs, several share the taps of one (split_k), write sums in parts, and these are added up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import columns, sampling
from .layout import Call, Operand, fit
from .runtime import Buffer
from .tiles import Tiles
from .variants import portable

# Columns of a strip (sampling.py, in_strips) that a program takes one after another: in float16
# a sector of memory.
RUN = tl.constexpr(16)


@triton.jit
def store(out, value, p, o, inside, o_in, g, LAST: tl.constexpr, INDEX: tl.constexpr):
    """To an item of the result [outputs, positions], or with LAST [positions, outputs].

    The places are made here, so that those of two branches do not fill registers at once.
    """
    if LAST:
        place = (p.to(INDEX) * g.outputs)[:, None] + o[None, :]
    else:
        # Neighbours lie in memory one after another, most of them: the compiler needs to know on
        # which axis. As it knows of no place what divides it, it stores them one by one.
        place = (o.to(INDEX) * g.positions)[None, :] + p[:, None]
        place = tl.max_contiguous(place, (RUN, 1))
    keep = inside[:, None] & o_in[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=keep)


@triton.jit
def forward(image, weight, offset, mask, bias, out, parts, g, tiles, blocks, splits,
            LAST: tl.constexpr, GROUPED: tl.constexpr, PRECISION: tl.constexpr,
            INDEX: tl.constexpr, EVEN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr,
            GROUPS: tl.constexpr, TAPS: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Grid: (B x tiles of positions x blocks of outputs, splits)."""
    tile = tl.program_id(0) // blocks
    b = tile // tiles
    p = tile % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < g.positions
    if GROUPS * TAPS == 1:
        p = sampling.ravel(sampling.in_strips(p, g.point, RUN), g.point)
    o0 = tl.program_id(0) % blocks * BLOCK_O
    o = o0 + tl.arange(0, BLOCK_O)
    o_in = o < g.outputs
    # The channels of the weight groups that these outputs belong to.
    first, last = columns.met(o0, tl.minimum(o0 + BLOCK_O, g.outputs), g.group_out, g.group_in)
    image += b.to(tl.int64) * g.item
    dtype: tl.constexpr = image.dtype.element_ty
    acc = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    split = tl.program_id(1)
    stop = (split + 1) * g.taps // splits
    for tap in range(split * g.taps // splits, stop, TAPS):
        for s0 in range(first // g.group_channels, tl.cdiv(last, g.group_channels), GROUPS):
            s, k, here, axes, amplitude, valid = columns.samples_of(
                offset, mask, b, s0, tap, stop, p, inside, g, GROUPS, TAPS
            )
            begin = 0
            end = columns.channels_to(g, GROUPS, TAPS, BLOCK_C)
            if GROUPED and GROUPS * TAPS == 1:
                begin = tl.maximum(first - s0 * g.group_channels, 0) // BLOCK_C * BLOCK_C
                end = tl.minimum(last - s0 * g.group_channels, g.padded)
            places, weights = columns.corners_of(axes, amplitude, s, g, INDEX, dtype)
            values = columns.fetch(image, places, begin + tl.arange(0, BLOCK_C), g, EVEN)
            for c0 in range(begin, end, BLOCK_C):
                w = columns.read_weight(
                    weight, o, o_in, s0, c0, tap, stop, g,
                    GROUPED, PRECISION, GROUPS, TAPS, BLOCK_C,
                )  # fmt: skip
                x = sampling.parts_of(columns.mix(values, weights), dtype, PRECISION)
                if GROUPS * TAPS == 1:
                    # The next ones come while products are summed; the last turn loads in vain.
                    c = tl.where(c0 + BLOCK_C < end, c0 + BLOCK_C, c0) + tl.arange(0, BLOCK_C)
                    values = columns.fetch(image, places, c, g, EVEN)
                acc = columns.dot(x, columns.transpose(w, PRECISION), acc, PRECISION)
    start = b.to(tl.int64) * g.positions * g.outputs
    if splits > 1:
        start += split.to(tl.int64) * g.batch * g.positions * g.outputs
        store(parts + start, acc, p, o, inside, o_in, g, LAST, INDEX)
    else:
        if bias is not None:
            acc += tl.load(bias + o, mask=o_in, other=0.0).to(tl.float32)[None, :]
        store(out + start, acc, p, o, inside, o_in, g, LAST, INDEX)


def write(
    call: Call, image: Operand, bias: Buffer | None, out: Operand, tiles: Tiles | None = None
) -> None:
    sizes = call.sizes
    if tiles is None:
        tiles = call.tiles("forward narrow" if call.narrow else "forward", sizes.group_out)
    constants = columns.blocks_of(call, tiles)
    block_o = fit(sizes.outputs, tiles.block_o)
    across = triton.cdiv(sizes.positions, tiles.block_p)
    blocks = triton.cdiv(sizes.outputs, block_o)
    programs, taps = sizes.batch * across * blocks, triton.cdiv(sizes.taps, constants["TAPS"])
    splits, steps = 1, taps * triton.cdiv(sizes.channels, constants["BLOCK_C"])
    # A short sum is not worth another kernel.
    if 2 * programs <= call.multiprocessors and steps >= 32:
        splits = min(taps, call.multiprocessors // programs)
    call.launch_split(
        *(forward, (programs, splits), dict(BLOCK_O=block_o, **constants), out, bias),
        **dict(warps=tiles.warps, stages=tiles.stages, tiles=across, blocks=blocks),
        **dict(image=call.image(image), weight=call.weight()),
    )


VARIANTS = portable("forward", write)
