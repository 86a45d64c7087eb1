"""What the portable kernels share: columns of samples, weights to match, and their product.

Note [rows]
A program takes the samples of ROWS = GROUPS * TAPS rows at once, one row for every pair of one of
GROUPS sample groups and one of TAPS taps, and BLOCK_C channels of each:

    [BLOCK_P, ROWS, BLOCK_C]        samples: cells and their weights are [BLOCK_P, ROWS]
    [BLOCK_P, ROWS * BLOCK_C]       the same as a factor of a product, its `columns`

    columns     | s0, tap | s0+1, tap | .. | s0, tap+1 | s0+1, tap+1 | ..      each BLOCK_C wide

Channels come a block at a time. A wide call has one row. A narrow call has several rows, since a
product needs more channels than a sample group has. In the forward, a narrow call's blocks are runs
of channels that a thread loads at once. So each thread finds the cells of its own samples, and only
the columns go from thread to thread through shared memory. For this, samples_of hides from Triton
that a narrow call's positions are neighbours, or Triton would give a thread the offsets of two of
them. In the gradients, a block is all channels of a group.

Rows of sample groups or taps that do not exist have amplitude 0 and weights 0. With a single row,
sample group and tap are scalars, so that the compiler computes what depends on them alone once for
a program.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .layout import Call, fit
from .sampling import (
    amplitude_of,
    cell_of,
    corner_pixel,
    corner_weight,
    lighter_first,
    locate,
    lost_in_half,
    starts_of,
    unravel,
)
from .tiles import Tiles


def blocks_of(call: Call, tiles: Tiles, run: int) -> dict[str, Any]:
    """The constants of Note [rows]. CHANNELS is a sample group's number of channels in a narrow
    call, and None in a wide one. EVEN says that the last block of channels is full as well."""
    sizes, groups, taps, channels = call.sizes, 1, 1, None
    block_c = fit(sizes.padded, tiles.block_c)
    if call.narrow:
        channels = sizes.padded
        block_c = min(channels, run)
        rows = max(tiles.block_c // block_c, 2)
        # Sample groups with weight groups of their own serve different outputs, so a program takes
        # one of them at a time.
        apart = sizes.group_in < sizes.channels and sizes.group_in <= sizes.group_channels
        groups = 1 if apart else min(rows, triton.next_power_of_2(sizes.sample_groups))
        taps = min(rows // groups, triton.next_power_of_2(sizes.taps))
        groups = rows // taps  # may exceed the sample groups, since a product needs the channels
    even = sizes.padded % block_c == 0
    blocks = dict(BLOCK_P=tiles.block_p, GROUPS=groups, TAPS=taps, BLOCK_C=block_c)
    return dict(blocks, CHANNELS=channels, EVEN=even)


def outputs_of(call: Call, blocks: dict[str, Any]) -> int:
    """The most point channels whose weight groups a block of image channels can meet
    (channels_of)."""
    group_in, outputs, group_out = call.sizes.group_in, call.sizes.outputs, call.sizes.group_out
    channels: int = blocks["GROUPS"] * (blocks["CHANNELS"] or blocks["BLOCK_C"])
    if channels % group_in == 0 or group_in % channels == 0:
        met = max(channels // group_in, 1)
    else:
        met = (channels - 1) // group_in + 2
    return min(met * group_out, outputs)


@triton.jit
def met(first, stop, own, other):
    """The range of channels on the other side of the weight that are in the same weight groups as
    the channels from first to stop on its own side."""
    return first // own * other, ((stop - 1) // own + 1) * other


@triton.jit
def channels_to(g, BLOCK_C: tl.constexpr, CHANNELS: tl.constexpr):
    """Where a loop over blocks of channels stops. It is a constant where the loop has one turn, so
    that the compiler sees that."""
    if CHANNELS is None:
        return g.padded
    elif CHANNELS == BLOCK_C:
        return CHANNELS
    else:
        return g.group_channels


@triton.jit
def channels_of(s0, c0, g, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr, CHANNELS: tl.constexpr):
    """The range of the image's channels that a block has, from channel c0 of sample group s0 on."""
    first = s0 * g.group_channels
    last = tl.minimum(s0 + GROUPS, g.sample_groups) * g.group_channels
    if CHANNELS is None:
        first += c0
        last = tl.minimum(first + BLOCK_C, last)
    return first, last


@triton.jit
def samples_of(offset, mask, b, s0, tap, stop, p, inside, g,
               INDEX: tl.constexpr, GROUPS: tl.constexpr, TAPS: tl.constexpr):  # fmt: skip
    """What is known of the samples in the rows from sample group s0 and `tap` on, for taps before
    `stop`: sample group and tap [1, ROWS]; position [BLOCK_P, 1], which several rows limit to the
    last one; whether the sample exists, its cell, amplitude and validity [BLOCK_P, ROWS]."""
    s = s0
    k = tap
    p = p[:, None]
    here = inside[:, None]
    # Sample group and tap are scalars in a wide call, so that 64 bits cost nothing there. In a
    # narrow call every row has its own.
    index: tl.constexpr = tl.int64 if GROUPS * TAPS == 1 else INDEX
    if GROUPS * TAPS > 1:
        row = tl.arange(0, GROUPS * TAPS)[None, :]
        s = s0 + row % GROUPS
        k = tap + row // GROUPS
        here = here & (s < g.sample_groups) & (k < stop)
        s = tl.minimum(s, g.sample_groups - 1)
        k = tl.minimum(k, stop - 1)
        # This also hides from Triton that positions are neighbours; see Note [rows].
        p = tl.minimum(p, g.positions - 1)
    axes, amplitude, valid = locate(offset, mask, b, s, k, p, here, g, index)
    return s, k, p, here, axes, amplitude, valid


@triton.jit
def corner_place(axes, q: tl.constexpr, s, g, INDEX: tl.constexpr):
    """Where the channels of corner q lie in an item of the image [BLOCK_P, ROWS]."""
    return tl.cast(s, INDEX) * g.plane + corner_pixel(axes, q, g).to(INDEX) * g.row


@triton.jit
def read_image(image, place, c, g, EVEN: tl.constexpr):
    """Channels c at every place, on a new last axis."""
    place = tl.expand_dims(place, -1) + c
    if EVEN:
        return tl.load(image + place)
    else:
        return tl.load(image + place, mask=(c < g.padded)[None, None, :], other=0.0)


@triton.jit
def corners_of(axes, amplitude, s, g, INDEX: tl.constexpr, dtype: tl.constexpr):
    """For each corner of samples [BLOCK_P, ROWS] its place in an item of the image and its weight.
    In float16 one more weight follows: what the last one, the largest, loses by rounding."""
    if dtype == tl.float16:
        axes = lighter_first(axes)
    places = ()
    weights = ()
    for q in tl.static_range(2 ** len(axes)):
        places = places + (corner_place(axes, q, s, g, INDEX),)
        weight = corner_weight(axes, q) * amplitude
        if dtype == tl.float16:
            weights = weights + (weight.to(tl.float16),)
            if q == 2 ** len(axes) - 1:
                weights = weights + (lost_in_half(weight).to(tl.float16),)
        else:
            weights = weights + (weight,)
    return places, weights


@triton.jit
def corners_read(read, point, s, tap, inside, g, INDEX: tl.constexpr, dtype: tl.constexpr):
    """The places and weights of corners_of for the samples at `point` and a tap, whose offsets and
    masks have been read."""
    offsets, masks = read
    starts = starts_of(point, unravel(tap, g.kernel), g)
    axes, valid = cell_of(offsets, starts, inside, g)
    return corners_of(axes, amplitude_of(masks, valid), s, g, INDEX, dtype)


@triton.jit
def apart(x):
    """Numbers of samples [BLOCK_P, ROWS], with an axis of one element before several rows; `mix`
    says why."""
    if x.shape[1] > 1:
        return x[:, None]
    else:
        return x


@triton.jit
def fetch(image, places, c, g, EVEN: tl.constexpr):
    """Channels c of all corners."""
    values = ()
    for q in tl.static_range(len(places)):
        values = values + (read_image(image, apart(places[q]), c, g, EVEN),)
    return values


@triton.jit
def mix(values, weights):
    """Samples as columns. Values of float16 are added in float16, two to an instruction, together
    with what the largest weight lost by rounding; all others are added in float32."""
    count: tl.constexpr = len(values)
    total = None
    for q in tl.static_range(count):
        value = values[q]
        weight = tl.expand_dims(apart(weights[q]), -1)
        if len(weights) > count:
            if q == count - 1:
                total += value * tl.expand_dims(apart(weights[count]), -1)
        else:
            value = value.to(tl.float32)
        if q == 0:
            total = value * weight
        else:
            total += value * weight
    positions: tl.constexpr = weights[0].shape[0]
    columns: tl.constexpr = weights[0].shape[1] * total.shape[len(total.shape) - 1]
    if weights[0].shape[1] == 1:
        return tl.reshape(total, (positions, columns))
    else:
        # A sum over an axis of one element is free, and Triton moves no layout across it. Without
        # it Triton would convert each corner to the product's layout, and not just their sum.
        return tl.sum(tl.reshape(total, (positions, 1, columns)), 1)


@triton.jit
def sample(image, axes, amplitude, s, c, g, INDEX: tl.constexpr, EVEN: tl.constexpr):
    """Channels c of samples, as columns."""
    places, weights = corners_of(axes, amplitude, s, g, INDEX, image.dtype.element_ty)
    return mix(fetch(image, places, c, g, EVEN), weights)


@triton.jit
def sample_block(image, read, p, s, tap, inside, c0, g, INDEX: tl.constexpr, EVEN: tl.constexpr,
                 BLOCK_C: tl.constexpr):  # fmt: skip
    """BLOCK_C channels from c0 on, as columns, of samples of a single row whose offsets and masks
    have been read. They come in pieces of 64 bytes, which four lanes load, because every lane of a
    sample finds its cell anew, and more channels to a lane mean fewer lanes to a sample."""
    dtype: tl.constexpr = image.dtype.element_ty
    PIECE: tl.constexpr = 512 // dtype.primitive_bitwidth
    point = unravel(p, g.point)
    places, weights = corners_read(read, point, s, tap, inside, g, INDEX, dtype)
    if BLOCK_C == 4 * PIECE:
        quarters = ()
        for i in tl.static_range(4):
            c = c0 + i * PIECE + tl.arange(0, PIECE)
            quarters = quarters + (mix(fetch(image, places, c, g, EVEN), weights),)
        low = tl.join(quarters[0], quarters[1])
        whole = tl.permute(tl.join(low, tl.join(quarters[2], quarters[3])), (0, 3, 2, 1))
        return tl.reshape(whole, (whole.shape[0], BLOCK_C))
    elif BLOCK_C == 2 * PIECE:
        low = mix(fetch(image, places, c0 + tl.arange(0, PIECE), g, EVEN), weights)
        high = mix(fetch(image, places, c0 + PIECE + tl.arange(0, PIECE), g, EVEN), weights)
        whole = tl.permute(tl.join(low, high), (0, 2, 1))
        return tl.reshape(whole, (whole.shape[0], BLOCK_C))
    else:
        return mix(fetch(image, places, c0 + tl.arange(0, BLOCK_C), g, EVEN), weights)


@triton.jit
def columns_of(s0, c0, tap, stop, length, g,
               GROUPS: tl.constexpr, TAPS: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """What stands in the columns of channels from c0 on: the tap of each [1, columns], or one tap
    for all; its channel, counted with `length` channels to a sample group; and whether it exists
    [columns]."""
    column = tl.arange(0, GROUPS * TAPS * BLOCK_C)
    if GROUPS * TAPS == 1:
        c = c0 + column
        return tap, s0 * length + c, c < length
    else:
        s = s0 + column // BLOCK_C % GROUPS
        k = tap + column // (BLOCK_C * GROUPS)
        c = c0 + column % BLOCK_C
        return k[None, :], s * length + c, (c < length) & (s < g.sample_groups) & (k < stop)


@triton.jit
def read_weight(weight, o, o_in, s0, c0, tap, stop, g,
                GROUPED: tl.constexpr, PRECISION: tl.constexpr, GROUPS: tl.constexpr,
                TAPS: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Factors of the weight [point channels o, columns], 0 where there is none."""
    if GROUPED:  # a grouped weight is packed by real channels, others by the image's padded ones
        length = g.group_channels
    else:
        length = g.padded
    k, c, c_in = columns_of(s0, c0, tap, stop, length, g, GROUPS, TAPS, BLOCK_C)
    column = c[None, :]
    inside = o_in[:, None] & c_in[None, :]
    if GROUPED:
        column = column - (o // g.group_out * g.group_in)[:, None]
        inside = inside & (column >= 0) & (column < g.group_in)
    place = (k * g.padded_outputs + o[:, None]) * g.columns + column
    head = tl.load(weight + place, mask=inside, other=0.0)
    if PRECISION == "bf16x3":
        # This is g.weights, but the compiler sees of the product that it is divisible.
        tails = weight + g.taps * g.padded_outputs * g.columns
        return (head, tl.load(tails + place, mask=inside, other=0.0))
    else:
        return (head,)


@triton.jit
def read_points(points, b, p, inside, o, g, INDEX: tl.constexpr):
    """Rows of points [BLOCK_P, BLOCK_O]; after the last channel they hold zeros."""
    points += b.to(tl.int64) * g.positions * g.padded_outputs
    place = (p.to(INDEX) * g.padded_outputs)[:, None] + o[None, :]
    return tl.load(
        points + place, mask=inside[:, None] & (o < g.padded_outputs)[None, :], other=0.0
    )


@triton.jit
def read_point_parts(points, b, p, inside, o, g, PRECISION: tl.constexpr,
                     INDEX: tl.constexpr):  # fmt: skip
    """Rows of points as factors [BLOCK_P, BLOCK_O] of a product; in "bf16x3" heads, of all items,
    lie before tails (layout.py, parts)."""
    head = read_points(points, b, p, inside, o, g, INDEX)
    if PRECISION == "bf16x3":
        tails = points + g.batch.to(tl.int64) * g.positions * g.padded_outputs
        return (head, read_points(tails, b, p, inside, o, g, INDEX))
    else:
        return (head,)


@triton.jit
def transpose(factors, PRECISION: tl.constexpr):
    if PRECISION == "bf16x3":
        return (tl.trans(factors[0]), tl.trans(factors[1]))
    else:
        return (tl.trans(factors[0]),)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    if PRECISION == "bf16x3":
        acc = tl.dot(a[1], b[0], acc)
        acc = tl.dot(a[0], b[1], acc)
        return tl.dot(a[0], b[0], acc)
    elif PRECISION != "native":
        return tl.dot(a[0], b[0], acc, input_precision=PRECISION)
    else:
        return tl.dot(a[0], b[0], acc)


@triton.jit
def dot_once(a, b, acc, PRECISION: tl.constexpr):
    """Do what `dot` does, but tensor cores add up only this product where float32 is meant. They
    round sums toward zero, so that the longest sums are ten times more accurate if the products are
    added here."""
    if PRECISION == "bf16x3" or PRECISION == "tf32x3":
        return acc + dot(a, b, tl.zeros(acc.shape, tl.float32), PRECISION)
    else:
        return dot(a, b, acc, PRECISION)
