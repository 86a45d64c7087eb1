"""Calls without products of matrices: depthwise convolutions and aggregations, in which a channel
of the image has channels of the points for its own, and convolutions with few outputs.

Products would be mostly padding, so tensor cores have nothing to do, and reading corners is what
costs. A program takes BLOCK_P positions and channels of one sample group. It finds a cell once, and
every lane reads 16 bytes of each corner's channels, one chunk of BLOCK_C after another:

    [BLOCK_P, BLOCK_C]      a chunk of samples; CHUNKS of them lie in the same lanes,
    [BLOCK_P]               and share the cells, which every lane of a position finds for itself

Channel c of the image has the MULTIPLIER points' channels from c * MULTIPLIER on. With few outputs,
SHARED, every channel of the image has all of the points' channels, which are MULTIPLIER. The
repeatable gradient of the image is in backward_sorted.py, which serves these calls as well.

im2col.py lets backward_atomic_depthwise add up the gradients of samples that a product has written,
LAID, for calls with any number of outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .backward_atomic import arguments_of
from .forward import store
from .layout import Call, Operand
from .runtime import Buffer
from .sampling import (
    amplitude_of,
    cell_of,
    contract,
    corner_pixel,
    corner_weight,
    following,
    read,
    starts_of,
    unravel,
    wait_for_previous,
)
from .tiles import MOST
from .variants import Variant


@triton.jit
def place_of(axes, q: tl.constexpr, c, g, INDEX: tl.constexpr):
    """Where channels c of corner q lie in a sample group of the image [BLOCK_P, BLOCK_C]."""
    return (corner_pixel(axes, q, g).to(INDEX) * g.row)[:, None] + c[None, :]


@triton.jit
def channels_of(image, axes, q: tl.constexpr, c, j: tl.constexpr, stop, g,
                INDEX: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """Chunk j of channels c of corner q [BLOCK_P, BLOCK_C], with 0 for the channels at `stop` or
    after. EVEN chunks end before `stop`, so that they need no check."""
    # The chunk is added to the pointer last, so that it is a constant in the load's instruction.
    place = image + place_of(axes, q, c, g, INDEX) + j * c.shape[0]
    if EVEN:
        return tl.load(place)
    else:
        return tl.load(place, mask=(c + j * c.shape[0] < stop)[None, :], other=0.0)


@triton.jit
def paired(axes):
    """Shares for float16, and a cell for their sum. Instead of the low and the high corner of the
    last axis, with their weights there, one may take  low * share + high * share  with the weight
    `common`, which both have in this cell. The larger share is 1/2, so that only the other one is
    rounded, and no sum is larger than the pixels."""
    first, step, weights, inside = axes[len(axes) - 1]
    # Both weights are 0 where no corner is in the image.
    common = 2.0 * tl.maximum(tl.maximum(weights[0], weights[1]), 1e-30)
    shares = ((weights[0] / common).to(tl.float16), (weights[1] / common).to(tl.float16))
    cell = ()
    for a in tl.static_range(len(axes) - 1):
        cell = cell + (axes[a],)
    return cell + ((first, step, (common, common), inside),), shares


@triton.jit
def sample(image, axes, amplitude, c, stop, g,
           INDEX: tl.constexpr, EVEN: tl.constexpr, CHUNKS: tl.constexpr):  # fmt: skip
    """Chunks of samples, in float32.

    If the image is float16, the two corners on the last axis are added in float16, two channels in
    one instruction. Depthwise results then err by 3e-4, of which 2e-4 is their own rounding. Pixels
    below 6e-5 lose digits before a mask multiplies them.
    """
    half: tl.constexpr = image.dtype.element_ty == tl.float16
    if half:
        axes, shares = paired(axes)
    chunks = ()
    for j in tl.static_range(CHUNKS):
        total = None
        for q in tl.static_range(0, 2 ** len(axes), 2 if half else 1):
            x = channels_of(image, axes, q, c, j, stop, g, INDEX, EVEN)
            # From explicit fma the compiler makes better pairs of instructions.
            if half:
                high = channels_of(image, axes, q + 1, c, j, stop, g, INDEX, EVEN)
                x = tl.fma(high, shares[1][:, None], x * shares[0][:, None])
            weight = (corner_weight(axes, q) * amplitude)[:, None]
            if q == 0:
                total = x.to(tl.float32) * weight
            else:
                total = tl.fma(x.to(tl.float32), weight, total)
        chunks = chunks + (total,)
    return chunks


@triton.jit
def rows_of(s, tap, g):
    """How far from their tensors' start a sample group's rows for a tap lie, in offset and mask."""
    row = s // g.per_offset * g.taps + tap
    mask_row = s // g.per_mask * g.taps + tap
    return row.to(tl.int64) * (len(g.image) * g.positions), mask_row.to(tl.int64) * g.positions


@triton.jit
def read_at(offset, mask, rows, b, p, inside, g, INDEX: tl.constexpr):
    """Read the offsets and masks of positions p in these rows."""
    if offset is not None:
        offset += rows[0]
    if mask is not None:
        mask += rows[1]
    return read(offset, mask, b, 0, 0, p, inside, g, INDEX)


@triton.jit
def next_rows(rows, g):
    """The rows of the next tap."""
    return rows[0] + len(g.image) * g.positions, rows[1] + g.positions


@triton.jit
def cells(offsets, masks, point, shift, inside, g, NEAR: tl.constexpr):
    """The cells of samples, their amplitudes and validity, as sampling.locate gives them."""
    axes, valid = cell_of(offsets, starts_of(point, shift, g), inside, g, NEAR)
    return axes, amplitude_of(masks, valid), valid


@triton.jit
def read_row(row, c, j: tl.constexpr, i: tl.constexpr, stop, MULTIPLIER: tl.constexpr):
    """In float32, from a row with a number for each of the points' channels, the i-th number of
    each image channel in chunk j of channels c."""
    c += j * c.shape[0]
    return tl.load(row + (c * MULTIPLIER + i), mask=c < stop, other=0.0).to(tl.float32)


@triton.jit
def weights_from(weight, s, c0, g, MULTIPLIER: tl.constexpr, SHARED: tl.constexpr):
    """Where the first tap's weights of a sample group's channels begin, from channel c0 on."""
    if SHARED:
        return weight + (s * g.padded + c0)
    else:
        return weight + (s * g.group_channels + c0) * MULTIPLIER


@triton.jit
def read_weight(weight, c, j: tl.constexpr, i: tl.constexpr, stop, g,
                EVEN: tl.constexpr, MULTIPLIER: tl.constexpr, SHARED: tl.constexpr):  # fmt: skip
    """In float32, the weights of each image channel in chunk j of channels c for the i-th of its
    points' channels [1, BLOCK_C]."""
    if SHARED:
        weight += i * g.columns
        if EVEN:  # the row of a sample group ends with zeros, and so needs no check either
            return tl.load(weight + (c + j * c.shape[0])).to(tl.float32)[None, :]
        else:
            return read_row(weight, c, j, 0, stop, 1)[None, :]
    else:
        return read_row(weight, c, j, i, stop, MULTIPLIER)[None, :]


@triton.jit
def points_from(points, b, s, c0, g, MULTIPLIER: tl.constexpr, SHARED: tl.constexpr):
    """Where the rows of points of a batch item begin, from those of a sample group's channel c0."""
    points += b * g.positions * g.padded_outputs
    if SHARED:
        return points
    else:
        return points + (s * g.group_channels + c0) * MULTIPLIER


@triton.jit
def read_points(points, p, inside, c, j: tl.constexpr, i: tl.constexpr, stop, g,
                INDEX: tl.constexpr, MULTIPLIER: tl.constexpr, SHARED: tl.constexpr):  # fmt: skip
    """In float32, for each image channel in chunk j of channels c, the i-th of its points' channels
    at positions p: [BLOCK_P, BLOCK_C], or [BLOCK_P, 1] where all have the same."""
    place = (p.to(INDEX) * g.padded_outputs)[:, None]
    if SHARED:
        return tl.load(points + (place + i), mask=inside[:, None], other=0.0).to(tl.float32)
    else:
        c += j * c.shape[0]
        keep = inside[:, None] & (c < stop)[None, :]
        place = place + (c * MULTIPLIER + i)[None, :]
        return tl.load(points + place, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def forward_depthwise(image, weight, offset, mask, bias, out, g, tiles, blocks,
                      LAST: tl.constexpr, INDEX: tl.constexpr, EVEN: tl.constexpr,
                      MULTIPLIER: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
                      CHUNKS: tl.constexpr, NEAR: tl.constexpr, CHAINED: tl.constexpr):  # fmt: skip
    """out[b, c, p] = bias[c] + sum over taps of weight[c, tap] * sample.

    Grid: (B x tiles of positions x sample groups x blocks of their channels).
    """
    wait_for_previous(CHAINED)
    c0 = tl.program_id(0) % blocks * (CHUNKS * BLOCK_C)
    s = tl.program_id(0) // blocks % g.sample_groups
    tile = tl.program_id(0) // blocks // g.sample_groups
    b = (tile // tiles).to(tl.int64)
    p = tile % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < g.positions
    c = tl.arange(0, BLOCK_C)
    first = s * g.group_channels + c0  # the first channel, counted through all sample groups
    image += b * g.item + s.to(tl.int64) * g.plane + c0
    if weight is not None:
        weight = weights_from(weight, s, c0, g, MULTIPLIER, False)
    stop = g.group_channels - c0
    acc = ()
    for j in tl.static_range(CHUNKS * MULTIPLIER):
        acc = acc + (tl.zeros((BLOCK_P, BLOCK_C), tl.float32),)
    point = unravel(p, g.point)
    shift = unravel(0, g.kernel)
    rows = rows_of(s, 0, g)
    offsets, masks = read_at(offset, mask, rows, b, p, inside, g, INDEX)
    for tap in range(g.taps):
        axes, amplitude, valid = cells(offsets, masks, point, shift, inside, g, NEAR)
        # The next tap's offsets and masks are read now, so that it need not wait for them.
        more = inside & (tap + 1 < g.taps)
        rows = next_rows(rows, g)
        offsets, masks = read_at(offset, mask, rows, b, p, more, g, INDEX)
        x = sample(image, axes, amplitude, c, g.padded - c0, g, INDEX, EVEN, CHUNKS)
        sums = ()
        for j in tl.static_range(CHUNKS):
            for i in tl.static_range(MULTIPLIER):
                term = x[j]
                if weight is not None:
                    term *= read_weight(weight, c, j, i, stop, g, EVEN, MULTIPLIER, False)
                sums = sums + (acc[j * MULTIPLIER + i] + term,)
        acc = sums
        shift, _ = following(shift, g.kernel)
        if weight is not None:
            weight += g.padded_outputs
    out += b * g.positions * g.outputs
    for j in tl.static_range(CHUNKS):
        for i in tl.static_range(MULTIPLIER):
            value = acc[j * MULTIPLIER + i]
            if bias is not None:
                value += read_row(bias + first * MULTIPLIER, c, j, i, stop, MULTIPLIER)[None, :]
            channel = c + j * BLOCK_C
            o = (first + channel) * MULTIPLIER + i
            store(out, value, p, o, inside, channel < stop, g, LAST, INDEX)


@triton.jit
def forward_few(image, weight, offset, mask, bias, out, parts, g, tiles, splits,
                LAST: tl.constexpr, INDEX: tl.constexpr, EVEN: tl.constexpr,
                MULTIPLIER: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
                CHUNKS: tl.constexpr, NEAR: tl.constexpr, ONCE: tl.constexpr,
                CHAINED: tl.constexpr):  # fmt: skip
    """out[b, i, p] = bias[i] + sum over taps and channels of weight[i, c, tap] * sample, for
    MULTIPLIER outputs.

    Grid: (B x tiles of positions, splits). Splits share the taps of all sample groups.
    """
    wait_for_previous(CHAINED)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < g.positions
    c = tl.arange(0, BLOCK_C)
    image += b * g.item
    point = unravel(p, g.point)
    end = g.padded
    if ONCE:
        end = BLOCK_C
    acc = ()
    for i in tl.static_range(MULTIPLIER):
        acc = acc + (tl.zeros((BLOCK_P, BLOCK_C), tl.float32),)
    split = tl.program_id(1)
    units = g.sample_groups * g.taps
    first = split * units // splits
    stop = (split + 1) * units // splits
    s = first // g.taps
    tap = first % g.taps
    shift = unravel(tap, g.kernel)
    offsets, masks = read_at(offset, mask, rows_of(s, tap, g), b, p, inside, g, INDEX)
    for _ in range(first, stop):
        axes, amplitude, valid = cells(offsets, masks, point, shift, inside, g, NEAR)
        source = image + s.to(tl.int64) * g.plane
        at = weights_from(weight, s, 0, g, MULTIPLIER, True)
        at += tap * (g.padded_outputs * g.columns)
        # The next offsets and masks are read now, so that the next turn need not wait for them. The
        # last turn reads those of its own sample group in vain.
        shift, over = following(shift, g.kernel)
        tap = tl.where(over > 0, 0, tap + 1)
        s = tl.minimum(s + over, g.sample_groups - 1)
        offsets, masks = read_at(offset, mask, rows_of(s, tap, g), b, p, inside, g, INDEX)
        for c0 in range(0, end, CHUNKS * BLOCK_C):
            x = sample(source + c0, axes, amplitude, c, g.padded - c0, g, INDEX, EVEN, CHUNKS)
            sums = ()
            for i in tl.static_range(MULTIPLIER):
                total = acc[i]
                for j in tl.static_range(CHUNKS):
                    total += x[j] * read_weight(
                        at + c0, c, j, i, g.group_channels - c0, g, EVEN, MULTIPLIER, True
                    )
                sums = sums + (total,)
            acc = sums
    item = b * g.positions * g.outputs
    if splits > 1:
        item += split.to(tl.int64) * g.batch * g.positions * g.outputs
    for i in tl.static_range(MULTIPLIER):
        value = tl.sum(acc[i], 1)
        place = item + i * g.positions.to(tl.int64) + p
        if LAST:
            place = item + p.to(tl.int64) * g.outputs + i
        if splits > 1:
            tl.store(parts + place, value, mask=inside)
        else:
            if bias is not None:
                value += tl.load(bias + i).to(tl.float32)
            tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_atomic_depthwise(image, points, weight, offset, mask, grad_image, grad_offset,
                              grad_mask, g, first_tile, first_row, tiles, splits,
                              INDEX: tl.constexpr, EVEN: tl.constexpr, MULTIPLIER: tl.constexpr,
                              SHARED: tl.constexpr, LAID: tl.constexpr, BLOCK_P: tl.constexpr,
                              BLOCK_C: tl.constexpr, CHUNKS: tl.constexpr, NEAR: tl.constexpr,
                              ONCE: tl.constexpr, CHAINED: tl.constexpr):  # fmt: skip
    """The gradients that backward_atomic writes. ONCE says that the chunks hold all channels of a
    sample group. With LAID the samples' gradients have been computed, and are given as columns
    instead of the points, from `first_tile` and `first_row` on (im2col.py).

    Grid: (B x tiles of positions x sample groups, splits).
    """
    wait_for_previous(CHAINED)
    rank: tl.constexpr = len(g.image)
    by_position: tl.constexpr = grad_offset is not None or grad_mask is not None
    s = tl.program_id(0) % g.sample_groups
    tile = first_tile + tl.program_id(0) // g.sample_groups
    b = (tile // tiles).to(tl.int64)
    p = tile % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < g.positions
    start = b * g.item + s.to(tl.int64) * g.plane
    if by_position:
        image += start
    if grad_image is not None:
        grad_image += start
    split = tl.program_id(1)
    first = split * g.taps // splits
    stop = (split + 1) * g.taps // splits
    row = p
    if LAID:
        row = (b * g.positions - first_row).to(tl.int32) + p
        points += first * g.columns + s * g.padded
    else:
        points = points_from(points, b, s, 0, g, MULTIPLIER, SHARED)
    if weight is not None:
        weight = weights_from(weight, s, 0, g, MULTIPLIER, SHARED)
        weight += first * (g.padded_outputs * g.columns)
    point = unravel(p, g.point)
    shift = unravel(first, g.kernel)
    end = g.padded
    if ONCE:
        end = BLOCK_C
    rows = rows_of(s, first, g)
    offsets, masks = read_at(offset, mask, rows, b, p, inside, g, INDEX)
    for tap in range(first, stop):
        axes, amplitude, valid = cells(offsets, masks, point, shift, inside, g, NEAR)
        more = inside & (tap + 1 < stop)
        rows = next_rows(rows, g)
        offsets, masks = read_at(offset, mask, rows, b, p, more, g, INDEX)
        dots = ()
        for q in tl.static_range(2**rank):
            dots = dots + (tl.zeros((BLOCK_P,), tl.float32),)
        for c0 in range(0, end, CHUNKS * BLOCK_C):
            # The hints give a lane 16 bytes of the float32 numbers that are added.
            c = c0 + tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK_C), 4), 4)
            grads = ()
            for j in tl.static_range(CHUNKS):
                grad = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
                if LAID:
                    place = (row * (g.taps * g.columns))[:, None] + (c + j * BLOCK_C)[None, :]
                    keep = inside[:, None]
                    if not EVEN:
                        keep = keep & (c + j * BLOCK_C < g.padded)[None, :]
                    grad = tl.load(points + place, mask=keep, other=0.0)
                for i in tl.static_range(MULTIPLIER):
                    x = read_points(
                        points, p, inside, c, j, i, g.group_channels, g, INDEX, MULTIPLIER, SHARED
                    )
                    if weight is not None:
                        x = x * read_weight(
                            weight, c, j, i, g.group_channels, g, EVEN, MULTIPLIER, SHARED
                        )
                    grad += x
                grads = grads + (grad,)
            sums = ()
            for q in tl.static_range(2**rank):
                total = dots[q]
                if by_position:
                    terms = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
                    for j in tl.static_range(CHUNKS):
                        x = channels_of(image, axes, q, c, j, g.padded, g, INDEX, EVEN)
                        terms += x.to(tl.float32) * grads[j]
                    total += tl.sum(terms, 1)
                sums = sums + (total,)
                if grad_image is not None:
                    w = corner_weight(axes, q) * amplitude
                    place = grad_image + place_of(axes, q, c, g, INDEX)
                    for j in tl.static_range(CHUNKS):
                        touched = (valid & (w != 0.0))[:, None]  # as in backward_atomic
                        if not EVEN:
                            real = tl.max_constancy(c + j * BLOCK_C < g.padded, 4)
                            touched = touched & real[None, :]
                        tl.atomic_add(
                            place + j * BLOCK_C, grads[j] * w[:, None], mask=touched, sem="relaxed"
                        )
            dots = sums
        if by_position:
            sums = contract(dots, axes)
            base = (b * g.sample_groups + s) * g.taps + tap
            if grad_offset is not None:
                for a in tl.static_range(rank):
                    value = tl.where(valid, sums[a] * amplitude, 0.0)
                    place = grad_offset + ((base * rank + a) * g.positions + p)
                    tl.store(place, value.to(grad_offset.dtype.element_ty), mask=inside)
            if grad_mask is not None:
                value = tl.where(valid, sums[rank], 0.0).to(grad_mask.dtype.element_ty)
                tl.store(grad_mask + (base * g.positions + p), value, mask=inside)
        shift, _ = following(shift, g.kernel)
        if LAID:
            points += g.columns
        if weight is not None:
            weight += g.padded_outputs * g.columns


@triton.jit
def backward_weight_depthwise(image, points, offset, mask, parts, g, tiles, blocks, splits,
                              INDEX: tl.constexpr, EVEN: tl.constexpr, MULTIPLIER: tl.constexpr,
                              SHARED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
                              CHUNKS: tl.constexpr, NEAR: tl.constexpr,
                              TAPS: tl.constexpr, CHAINED: tl.constexpr):  # fmt: skip
    """Sums [splits, K, C / groups, O] of points times samples over shares of the positions. The
    points are read once for TAPS taps at a time, which divide all taps.

    Grid: (sample groups x blocks of their channels x K / TAPS, splits).
    """
    wait_for_previous(CHAINED)
    runs = g.taps // TAPS
    first_tap = tl.program_id(0) % runs * TAPS
    c0 = tl.program_id(0) // runs % blocks * (CHUNKS * BLOCK_C)
    s = tl.program_id(0) // runs // blocks
    c = tl.arange(0, BLOCK_C)
    stop = g.group_channels - c0
    image += s.to(tl.int64) * g.plane + c0
    acc = ()
    for j in tl.static_range(TAPS * CHUNKS * MULTIPLIER):
        acc = acc + (tl.zeros((BLOCK_P, BLOCK_C), tl.float32),)
    split = tl.program_id(1).to(tl.int64)
    total = g.batch * tiles
    for t in range((split * total // splits).to(tl.int32),
                   ((split + 1) * total // splits).to(tl.int32)):  # fmt: skip
        b = (t // tiles).to(tl.int64)
        p = t % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = p < g.positions
        source = image + b * g.item
        at = points_from(points, b, s, c0, g, MULTIPLIER, SHARED)
        point = unravel(p, g.point)
        grads = ()
        for j in tl.static_range(CHUNKS):
            for i in tl.static_range(MULTIPLIER):
                grads = grads + (
                    read_points(at, p, inside, c, j, i, stop, g, INDEX, MULTIPLIER, SHARED),
                )
        sums = ()
        for k in tl.static_range(TAPS):
            rows = rows_of(s, first_tap + k, g)
            offsets, masks = read_at(offset, mask, rows, b, p, inside, g, INDEX)
            shift = unravel(first_tap + k, g.kernel)
            axes, amplitude, valid = cells(offsets, masks, point, shift, inside, g, NEAR)
            x = sample(source, axes, amplitude, c, g.padded - c0, g, INDEX, EVEN, CHUNKS)
            for j in tl.static_range(CHUNKS * MULTIPLIER):
                term = x[j // MULTIPLIER] * grads[j]
                sums = sums + (acc[k * (CHUNKS * MULTIPLIER) + j] + term,)
        acc = sums
    for k in tl.static_range(TAPS):
        to = parts + (split * g.taps + first_tap + k) * (g.group_in * g.padded_outputs)
        for j in tl.static_range(CHUNKS * MULTIPLIER):
            channel = c + j // MULTIPLIER * BLOCK_C
            value = tl.sum(acc[k * (CHUNKS * MULTIPLIER) + j], 0)
            place = s * g.group_channels + c0 + channel
            if SHARED:
                place = place * g.padded_outputs + j % MULTIPLIER
            else:
                place = place * MULTIPLIER + j % MULTIPLIER
            tl.store(to + place, value, mask=channel < stop)


def multiplier_of(call: Call) -> int:
    """How many channels of the points a channel of the image has for its own, or 0 if the call is
    not depthwise or has too many of them."""
    n = call.sizes
    fits = n.group_in == 1 and n.group_out <= MOST and call.precision != "bf16x3"
    return n.group_out if fits else 0


def takes_depthwise(call: Call) -> bool:
    return multiplier_of(call) > 0


def takes_few(call: Call) -> bool:
    return call.few_outputs and call.sizes.group_in > 1


def takes(call: Call) -> bool:
    return takes_depthwise(call) or takes_few(call)


WARPS = 4

# The weight's gradient takes this many taps at once, if they divide all taps and a lane has at most
# SUMS sums of them.
TAPS, SUMS = 3, 96


def blocks_of(call: Call) -> tuple[dict[str, Any], int, int]:
    """The constants, the tiles of positions, and the blocks of a sample group's channels."""
    n, width = call.sizes, call.dtype.itemsize
    # A chunk is a line of memory of 128 bytes or a whole sample group, and a lane has at most 16
    # numbers of a position. There are fewer positions than lanes, unless each lane has one for
    # itself. Each lane of a position reads its offset, which costs less than to exchange it.
    block_c = min(triton.next_power_of_2(n.padded), 128 // width)
    chunks = min(triton.cdiv(n.padded, block_c), width)
    lanes = max(block_c * width // 16, 1)
    block_p = 128 if lanes == 1 else min(256 // lanes, 64)
    even = n.padded % (chunks * block_c) == 0
    constants = dict(
        MULTIPLIER=n.group_out,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        CHUNKS=chunks,
        EVEN=even,
        NEAR=call.is_near,
    )
    return constants, triton.cdiv(n.positions, block_p), triton.cdiv(n.padded, chunks * block_c)


def write_forward(call: Call, image: Operand, bias: Buffer | None, out: Operand) -> None:
    constants, tiles, blocks = blocks_of(call)
    call.launch(
        forward_depthwise,
        (call.sizes.batch * tiles * call.sizes.sample_groups * blocks, 1, 1),
        dict(LAST=out.last, **constants),
        warps=WARPS,
        image=call.image(image),
        weight=call.weight(),
        bias=bias,
        out=out.buffer,
        tiles=tiles,
        blocks=blocks,
    )


def write_few(call: Call, image: Operand, bias: Buffer | None, out: Operand) -> None:
    n = call.sizes
    constants, tiles, blocks = blocks_of(call)
    programs = n.batch * tiles
    splits = call.splits(
        *("forward_few", programs, WARPS, n.sample_groups * n.taps),
        added=n.batch * n.positions * n.outputs,
    )
    call.launch_split(
        forward_few,
        (programs, splits),
        constants | dict(ONCE=blocks == 1),
        out,
        bias,
        warps=WARPS,
        image=call.image(image),
        weight=call.weight(),
        tiles=tiles,
    )


def blocks_of_atomic(call: Call) -> tuple[dict[str, Any], int]:
    """The constants of backward_atomic_depthwise, and the tiles of positions."""
    n = call.sizes
    constants, _, blocks = blocks_of(call)
    # With several chunks of half numbers, eight corners or several points' channels would spill.
    if call.dtype.itemsize == 2 and (len(n.image) == 3 or multiplier_of(call) > 1):
        constants |= dict(CHUNKS=1, EVEN=n.padded % constants["BLOCK_C"] == 0)
        blocks = triton.cdiv(n.padded, constants["BLOCK_C"])
    # So many positions give every lane 16 bytes of the float32 numbers that are added.
    block_p = max(32 * WARPS // max(constants["BLOCK_C"] // 4, 1), 16)
    constants |= dict(SHARED=takes_few(call), LAID=False, ONCE=blocks == 1, BLOCK_P=block_p)
    return constants, triton.cdiv(call.sizes.positions, block_p)


def write_backward_atomic(
    call: Call,
    image: Operand | None,
    points: Operand,
    by_image: Buffer | None,
    by_offset: Buffer | None,
    by_mask: Buffer | None,
) -> None:
    constants, tiles = blocks_of_atomic(call)
    launch_atomic(
        *(call, constants, call.sizes.batch * tiles, tiles),
        **arguments_of(call, image, call.rows(points), by_image, by_offset, by_mask),
        weight=call.weight(),
    )


def launch_atomic(
    call: Call,
    constants: dict[str, Any],
    count: int,
    tiles: int,
    first_tile: int = 0,
    first_row: int = 0,
    **arguments: Any,
) -> None:
    """Launch backward_atomic_depthwise for `count` tiles. A batch item has `tiles` of them."""
    n = call.sizes
    programs = count * n.sample_groups
    splits = call.splits("backward_atomic_depthwise", programs, WARPS, n.taps)
    call.launch(
        *(backward_atomic_depthwise, (programs, splits, 1), constants),
        **dict(tiles=tiles, splits=splits, warps=WARPS),
        **dict(first_tile=first_tile, first_row=first_row, **arguments),
    )


def write_backward_weight(call: Call, image: Operand, points: Operand, out: Buffer) -> None:
    n = call.sizes
    constants, _, blocks = blocks_of(call)
    # The sums of several taps leave registers for half as many positions as a forward takes.
    constants["BLOCK_P"] //= 2
    tiles = triton.cdiv(n.positions, constants["BLOCK_P"])
    warps = WARPS if call.dtype == torch.float32 else WARPS // 2
    sums = constants["BLOCK_P"] * constants["BLOCK_C"] * constants["CHUNKS"] * n.group_out
    taps = TAPS if n.taps % TAPS == 0 and TAPS * sums <= SUMS * 32 * warps else 1
    programs = n.sample_groups * blocks * n.taps // taps
    splits = call.splits(
        *("backward_weight_depthwise", programs, warps, n.batch * tiles),
        added=n.weights,
        most=call.filling(programs),
    )
    parts = call.plan.scratch(splits, n.taps, n.group_in, n.padded_outputs, dtype=torch.float32)
    call.launch(
        backward_weight_depthwise,
        (programs, splits, 1),
        dict(TAPS=taps, SHARED=takes_few(call), **constants),
        warps=warps,
        image=call.image(image),
        points=call.rows(points),
        parts=parts,
        tiles=tiles,
        blocks=blocks,
        splits=splits,
    )
    call.reduce_weight(parts, out)


FORWARD = Variant("forward_depthwise", takes_depthwise, write_forward)
FORWARD_FEW = Variant("forward_few", takes_few, write_few)
BACKWARD_ATOMIC = Variant("backward_atomic_depthwise", takes, write_backward_atomic)
BACKWARD_WEIGHT = Variant("backward_weight_depthwise", takes, write_backward_weight)
