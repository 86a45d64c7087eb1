"""The forward: out[b, o, p] = bias[o] + sum over taps and channels of weight * sample.

A program samples BLOCK_P positions, tap after tap and a block of channels at a time, and multiplies
each such block of columns (columns.py, Note [rows]) by BLOCK_O rows of the weight. Where there
would be few programs, several share the taps of one: each writes its sum as a part, and the parts
are added up afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import columns, sampling
from .layout import Call, Operand, fit, is_single
from .runtime import Buffer
from .tiles import DEEP, Tiles
from .variants import Variant, portable

# A program takes this many columns of a strip (sampling.py, in_strips) one after another. In
# float16 they fill a sector of memory.
RUN = tl.constexpr(16)


@triton.jit
def store(out, value, p, o, inside, o_in, g, LAST: tl.constexpr, INDEX: tl.constexpr,
          DEEP: tl.constexpr = False):  # fmt: skip
    """Store a tile in an item of the result: [outputs, positions], with LAST [positions, outputs].

    The places are computed here, so that those of two branches do not fill registers at once.
    """
    if LAST:
        place = (p.to(INDEX) * g.outputs)[:, None] + o[None, :]
    else:
        place = (o.to(INDEX) * g.positions)[None, :] + p[:, None]
        if DEEP:
            # Most neighbours lie one after another in memory, and the hint tells the compiler on
            # which axis. It still stores them one by one, since it knows no divisor of the places,
            # and so the hint is right as well where neighbours do not follow each other.
            place = tl.max_contiguous(place, (RUN, 1))
    keep = inside[:, None] & o_in[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=keep)


@triton.jit
def blocks_between(s, first, last, g, GROUPED: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where the blocks begin and end that have, of sample group s, the channels first to last."""
    begin = 0
    end = g.padded
    if GROUPED:
        begin = tl.maximum(first - s * g.group_channels, 0) // BLOCK_C * BLOCK_C
        end = tl.minimum(last - s * g.group_channels, g.padded)
    return begin, end


@triton.jit
def sum_deep(image, weight, offset, mask, b, p, inside, o, o_in, first, last, start, stop, g,
             GROUPED: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
             EVEN: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """The sums of a program [BLOCK_P, BLOCK_O], over taps from start to stop, where sample groups
    have many channels (tiles.py, DEEP).

    One loop goes over taps, sample groups and blocks of channels, and loads the corners of the next
    block while products are summed. It reads offsets and masks one sample group earlier still.
    """
    dtype: tl.constexpr = image.dtype.element_ty
    s_first = first // g.group_channels
    s_last = tl.cdiv(last, g.group_channels)
    blocks = 0
    for s in range(s_first, s_last):
        begin, end = blocks_between(s, first, last, g, GROUPED, BLOCK_C)
        blocks += tl.cdiv(end - begin, BLOCK_C)
    p = p[:, None]
    inside = inside[:, None]
    point = sampling.unravel(p, g.point)
    tap = start
    s = s_first
    c0, end = blocks_between(s, first, last, g, GROUPED, BLOCK_C)
    read = sampling.read(offset, mask, b, s, tap, p, inside, g)
    places, weights = columns.corners_read(read, point, s, tap, inside, g, INDEX, dtype)
    values = columns.fetch(image, places, c0 + tl.arange(0, BLOCK_C), g, EVEN)
    new_tap, new_s = next_group(tap, s, s_first, s_last, stop)
    read = sampling.read(offset, mask, b, new_s, new_tap, p, inside, g)
    acc = tl.zeros((p.shape[0], o.shape[0]), tl.float32)
    for _ in range((stop - start) * blocks):
        w = columns.read_weight(
            weight, o, o_in, s, c0, tap, stop, g, GROUPED, PRECISION, 1, 1, BLOCK_C
        )
        x = sampling.parts_of(columns.mix(values, weights), dtype, PRECISION)
        c0 += BLOCK_C
        if c0 >= end:
            tap = new_tap
            s = new_s
            c0, end = blocks_between(s, first, last, g, GROUPED, BLOCK_C)
            places, weights = columns.corners_read(read, point, s, tap, inside, g, INDEX, dtype)
            new_tap, new_s = next_group(tap, s, s_first, s_last, stop)
            read = sampling.read(offset, mask, b, new_s, new_tap, p, inside, g)
        # The last turn loads a block in vain instead of branching.
        values = columns.fetch(image, places, c0 + tl.arange(0, BLOCK_C), g, EVEN)
        acc = columns.dot(x, columns.transpose(w, PRECISION), acc, PRECISION)
    return acc


@triton.jit
def next_group(tap, s, first, last, stop):
    """The tap and the sample group after (tap, s), where sample groups go from first to last within
    a tap. After the last tap the sample groups of that tap come again."""
    over = s + 1 == last
    return tl.where(over, tl.minimum(tap + 1, stop - 1), tap), tl.where(over, first, s + 1)


@triton.jit
def forward(image, weight, offset, mask, bias, out, parts, g, tiles, blocks, run, splits,
            LAST: tl.constexpr, GROUPED: tl.constexpr, PRECISION: tl.constexpr,
            INDEX: tl.constexpr, EVEN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr,
            GROUPS: tl.constexpr, TAPS: tl.constexpr, BLOCK_C: tl.constexpr,
            CHANNELS: tl.constexpr, DEEP: tl.constexpr, CHAINED: tl.constexpr):  # fmt: skip
    """Write the forward of a tile of positions and a block of outputs.

    Blocks of outputs begin anew at every `run` outputs. With several weight groups a run begins
    where a group does, since a block samples the channels of all weight groups that it touches.

    Grid: (B x tiles of positions x blocks of outputs, splits).
    """
    sampling.wait_for_previous(CHAINED)
    tile = tl.program_id(0) // blocks
    b = tile // tiles
    p = tile % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < g.positions
    if DEEP:
        p = sampling.ravel(sampling.in_strips(p, g.point, RUN), g.point)
    block = tl.program_id(0) % blocks
    o0 = block * BLOCK_O
    o_last = g.outputs
    if GROUPED:
        per_run = tl.cdiv(run, BLOCK_O)
        o0 = block // per_run * run + block % per_run * BLOCK_O
        o_last = tl.minimum(block // per_run * run + run, g.outputs)
    o = o0 + tl.arange(0, BLOCK_O)
    o_in = o < o_last
    # These are the image's channels in the weight groups that the outputs belong to.
    first, last = columns.met(o0, tl.minimum(o0 + BLOCK_O, o_last), g.group_out, g.group_in)
    image += b.to(tl.int64) * g.item
    split = tl.program_id(1)
    start = split * g.taps // splits
    stop = (split + 1) * g.taps // splits
    if DEEP:
        acc = sum_deep(
            image, weight, offset, mask, b, p, inside, o, o_in, first, last, start, stop, g,
            GROUPED, PRECISION, INDEX, EVEN, BLOCK_C,
        )  # fmt: skip
    else:
        acc = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
        for tap in range(start, stop, TAPS):
            for s0 in range(first // g.group_channels, tl.cdiv(last, g.group_channels), GROUPS):
                s, k, _, here, axes, amplitude, valid = columns.samples_of(
                    offset, mask, b, s0, tap, stop, p, inside, g, INDEX, GROUPS, TAPS
                )
                begin = 0
                end = columns.channels_to(g, BLOCK_C, CHANNELS)
                if GROUPS == 1 and (TAPS == 1 or GROUPED):
                    begin, end = blocks_between(s0, first, last, g, GROUPED, BLOCK_C)
                for c0 in range(begin, end, BLOCK_C):
                    c = c0 + tl.arange(0, BLOCK_C)
                    samples = columns.sample(image, axes, amplitude, s, c, g, INDEX, EVEN)
                    w = columns.read_weight(
                        weight, o, o_in, s0, c0, tap, stop, g,
                        GROUPED, PRECISION, GROUPS, TAPS, BLOCK_C,
                    )  # fmt: skip
                    x = sampling.parts_of(samples, image.dtype.element_ty, PRECISION)
                    acc = columns.dot(x, columns.transpose(w, PRECISION), acc, PRECISION)
    item = b.to(tl.int64) * g.positions * g.outputs
    if splits > 1:
        item += split.to(tl.int64) * g.batch * g.positions * g.outputs
        store(parts + item, acc, p, o, inside, o_in, g, LAST, INDEX, DEEP)
    else:
        if bias is not None:
            acc += tl.load(bias + o, mask=o_in, other=0.0).to(tl.float32)[None, :]
        store(out + item, acc, p, o, inside, o_in, g, LAST, INDEX, DEEP)


def is_deep(call: Call) -> bool:
    """Whether samples are loaded ahead."""
    return not call.narrow and call.sizes.padded * call.dtype.itemsize >= DEEP


def tiles_of(call: Call, outputs: int) -> Tiles:
    """The tiles for so many outputs that a program computes together."""
    kind = " narrow" if call.narrow else " deep" if is_deep(call) else ""
    return call.tiles(f"forward{kind}", outputs)


def write(
    call: Call, image: Operand, bias: Buffer | None, out: Operand, tiles: Tiles | None = None
) -> None:
    sizes, deep = call.sizes, is_deep(call)
    load = 16 // call.dtype.itemsize  # channels that a thread loads at once
    # A block takes the outputs of several weight groups if these have few channels: as many groups
    # as fit into 32 channels, or into one load in a narrow call. Otherwise most of a block of
    # channels would be multiplied by zeros.
    width = min(load if call.narrow else 32, sizes.padded)
    together = min(sizes.group_out * max(width // sizes.group_in, 1), sizes.outputs)
    tiles = tiles or tiles_of(call, together)
    constants = columns.blocks_of(call, tiles, load)
    block_o = fit(sizes.outputs, tiles.block_o)
    across = triton.cdiv(sizes.positions, tiles.block_p)
    run = sizes.outputs
    if sizes.group_out < run:
        run = max(block_o // together, 1) * together
    blocks = triton.cdiv(sizes.outputs, run) * triton.cdiv(run, block_o)
    programs = sizes.batch * across * blocks
    # A unit is as many taps as are taken together.
    taps, groups = constants["TAPS"], constants["GROUPS"]
    channels = triton.cdiv(min(block_o, run), sizes.group_out) * sizes.group_in
    steps = triton.cdiv(triton.cdiv(channels, sizes.group_channels), groups)
    if taps == groups == 1:
        steps *= triton.cdiv(min(channels, sizes.padded), constants["BLOCK_C"])
    splits = call.splits(
        *("forward narrow" if call.narrow else "forward", programs, tiles.warps),
        triton.cdiv(sizes.taps, taps),
        products=sizes.group_in * taps,
        **call.sampling(tiles.block_p, channels * taps, steps),
    )
    call.launch_split(
        *(forward, (programs, splits), dict(BLOCK_O=block_o, DEEP=deep, **constants), out, bias),
        **dict(warps=tiles.warps, stages=tiles.stages, tiles=across, blocks=blocks, run=run),
        **dict(image=call.image(image), weight=call.weight()),
    )


def takes_single(call: Call) -> bool:
    """Whether a call has a single tap and few channels and outputs. Then there is so little to sum
    that other ways, which prepare more before they begin, take longer."""
    return is_single(call.g, call.dtype) and not call.narrow


VARIANTS = portable("forward", write)
SINGLE_TAP = Variant("forward", takes_single, write)
