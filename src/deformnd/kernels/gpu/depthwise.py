"""Depthwise convolutions: every channel of the points has one channel of the image.

There are no products between channels, so tensor cores have nothing to do, and reading corners is
what costs. A program takes BLOCK_P positions and channels of one sample group. It finds a cell
once, and every lane reads 16 bytes of each corner's channels, one chunk of BLOCK_C after another:

    [BLOCK_P, BLOCK_C]      a chunk of samples; CHUNKS of them lie in the same lanes,
    [BLOCK_P]               and share the cells, which every lane of a position finds for itself

Channel c of the image has the points' channels from c * MULTIPLIER to (c + 1) * MULTIPLIER. The
repeatable gradient of the image is in backward_sorted.py, whose product with interpolation weights
serves depthwise calls as well.
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
def sample(image, axes, amplitude, c, stop, g,
           INDEX: tl.constexpr, EVEN: tl.constexpr, CHUNKS: tl.constexpr):  # fmt: skip
    """Chunks of samples, in float32.

    If the image is float16, the two corners on the last axis are added in float16, two channels in
    one instruction. Results then err by 3.9e-4. To add all corners so would make it 4.4e-4, which
    is too much.
    """
    half: tl.constexpr = image.dtype.element_ty == tl.float16
    dtype: tl.constexpr = tl.float16 if half else tl.float32
    chunks = ()
    for j in tl.static_range(CHUNKS):
        total = None
        for q in tl.static_range(0, 2 ** len(axes), 2):
            low = channels_of(image, axes, q, c, j, stop, g, INDEX, EVEN).to(dtype)
            high = channels_of(image, axes, q + 1, c, j, stop, g, INDEX, EVEN).to(dtype)
            # From explicit fma the compiler makes better pairs of instructions.
            of_low = (corner_weight(axes, q) * amplitude).to(dtype)[:, None]
            of_high = (corner_weight(axes, q + 1) * amplitude).to(dtype)[:, None]
            if half or q == 0:
                pair = low * of_low
            else:
                pair = tl.fma(low, of_low, total)
            pair = tl.fma(high, of_high, pair)
            if half and q > 0:
                total += pair.to(tl.float32)
            else:
                total = pair.to(tl.float32)
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
def read_rows(rows, p, inside, c, j: tl.constexpr, i: tl.constexpr, stop, g, INDEX: tl.constexpr,
              MULTIPLIER: tl.constexpr):  # fmt: skip
    """The numbers that read_row gives, from the rows of points at positions p."""
    c += j * c.shape[0]
    place = (p.to(INDEX) * g.padded_outputs)[:, None] + (c * MULTIPLIER + i)[None, :]
    keep = inside[:, None] & (c < stop)[None, :]
    return tl.load(rows + place, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def forward_depthwise(image, weight, offset, mask, bias, out, g, tiles, blocks,
                      LAST: tl.constexpr, INDEX: tl.constexpr, EVEN: tl.constexpr,
                      MULTIPLIER: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
                      CHUNKS: tl.constexpr, NEAR: tl.constexpr):  # fmt: skip
    """out[b, c, p] = bias[c] + sum over taps of weight[c, tap] * sample.

    Grid: (B x tiles of positions x sample groups x blocks of their channels).
    """
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
        weight += first * MULTIPLIER
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
                    term *= read_row(weight, c, j, i, stop, MULTIPLIER)[None, :]
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
def backward_atomic_depthwise(image, points, weight, offset, mask, grad_image, grad_offset,
                              grad_mask, g, tiles, splits,
                              INDEX: tl.constexpr, EVEN: tl.constexpr, MULTIPLIER: tl.constexpr,
                              BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, CHUNKS: tl.constexpr,
                              NEAR: tl.constexpr, ONCE: tl.constexpr):  # fmt: skip
    """The gradients that backward_atomic writes. ONCE says that the chunks hold all channels of a
    sample group.

    Grid: (B x tiles of positions x sample groups, splits).
    """
    rank: tl.constexpr = len(g.image)
    by_position: tl.constexpr = grad_offset is not None or grad_mask is not None
    s = tl.program_id(0) % g.sample_groups
    tile = tl.program_id(0) // g.sample_groups
    b = (tile // tiles).to(tl.int64)
    p = tile % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < g.positions
    start = b * g.item + s.to(tl.int64) * g.plane
    if by_position:
        image += start
    if grad_image is not None:
        grad_image += start
    channel = s * g.group_channels * MULTIPLIER
    points += b * g.positions * g.padded_outputs + channel
    if weight is not None:
        weight += channel
    split = tl.program_id(1)
    first = split * g.taps // splits
    stop = (split + 1) * g.taps // splits
    if weight is not None:
        weight += first * g.padded_outputs
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
                for i in tl.static_range(MULTIPLIER):
                    x = read_rows(
                        points, p, inside, c, j, i, g.group_channels, g, INDEX, MULTIPLIER
                    )
                    if weight is not None:
                        x *= read_row(weight, c, j, i, g.group_channels, MULTIPLIER)[None, :]
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
        if weight is not None:
            weight += g.padded_outputs


@triton.jit
def backward_weight_depthwise(image, points, offset, mask, parts, g, tiles, blocks, splits,
                              INDEX: tl.constexpr, EVEN: tl.constexpr, MULTIPLIER: tl.constexpr,
                              BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, CHUNKS: tl.constexpr,
                              NEAR: tl.constexpr, TAPS: tl.constexpr):  # fmt: skip
    """Sums [splits, K, 1, O] of points times samples over shares of the positions. The points are
    read once for TAPS taps at a time, which divide all taps.

    Grid: (sample groups x blocks of their channels x K / TAPS, splits).
    """
    runs = g.taps // TAPS
    first_tap = tl.program_id(0) % runs * TAPS
    c0 = tl.program_id(0) // runs % blocks * (CHUNKS * BLOCK_C)
    s = tl.program_id(0) // runs // blocks
    c = tl.arange(0, BLOCK_C)
    first = (s * g.group_channels + c0) * MULTIPLIER
    stop = g.group_channels - c0
    image += s.to(tl.int64) * g.plane + c0
    points += first
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
        at = points + b * g.positions * g.padded_outputs
        point = unravel(p, g.point)
        grads = ()
        for j in tl.static_range(CHUNKS):
            for i in tl.static_range(MULTIPLIER):
                grads = grads + (read_rows(at, p, inside, c, j, i, stop, g, INDEX, MULTIPLIER),)
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
        to = parts + (split * g.taps + first_tap + k) * g.padded_outputs + first
        for j in tl.static_range(CHUNKS * MULTIPLIER):
            channel = c + j // MULTIPLIER * BLOCK_C
            value = tl.sum(acc[k * (CHUNKS * MULTIPLIER) + j], 0)
            place = channel * MULTIPLIER + j % MULTIPLIER
            tl.store(to + place, value, mask=channel < stop)


def multiplier_of(call: Call) -> int:
    """How many of the points' channels a channel of the image has, or 0 if no kernel of this file
    takes the call."""
    n = call.sizes
    fits = n.group_in == 1 and n.group_out <= MOST and call.precision != "bf16x3"
    return n.group_out if fits else 0


def takes(call: Call) -> bool:
    return multiplier_of(call) > 0


WARPS = 4

# The weight's gradient takes this many taps at once, if they divide all taps.
TAPS = 3


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


def write_backward_atomic(
    call: Call,
    image: Operand | None,
    points: Operand,
    by_image: Buffer | None,
    by_offset: Buffer | None,
    by_mask: Buffer | None,
) -> None:
    n = call.sizes
    constants, _, blocks = blocks_of(call)
    # So many positions give every lane 16 bytes of the float32 numbers that are added.
    block_p = max(32 * WARPS // max(constants["BLOCK_C"] // 4, 1), 16)
    tiles = triton.cdiv(n.positions, block_p)
    programs = n.batch * tiles * n.sample_groups
    splits = max(1, min(n.taps, 4 * call.multiprocessors // programs))
    call.launch(
        backward_atomic_depthwise,
        (programs, splits, 1),
        constants | dict(ONCE=blocks == 1, BLOCK_P=block_p),
        warps=WARPS,
        **arguments_of(call, image, call.rows(points), by_image, by_offset, by_mask),
        weight=call.weight(),
        tiles=tiles,
        splits=splits,
    )


def write_backward_weight(call: Call, image: Operand, points: Operand, out: Buffer) -> None:
    n = call.sizes
    constants, _, blocks = blocks_of(call)
    # The sums of several taps leave registers for half as many positions as a forward takes.
    constants["BLOCK_P"] //= 2
    tiles = triton.cdiv(n.positions, constants["BLOCK_P"])
    warps = WARPS if call.dtype == torch.float32 else WARPS // 2
    taps = TAPS if n.taps % TAPS == 0 else 1
    programs = n.sample_groups * blocks * n.taps // taps
    splits = min(n.batch * tiles, triton.cdiv(8 * call.multiprocessors, programs))
    parts = call.plan.scratch(splits, n.taps, 1, n.padded_outputs, dtype=torch.float32)
    call.launch(
        backward_weight_depthwise,
        (programs, splits, 1),
        dict(TAPS=taps, **constants),
        warps=warps,
        image=call.image(image),
        points=call.rows(points),
        parts=parts,
        tiles=tiles,
        blocks=blocks,
        splits=splits,
    )
    call.reduce_weight(parts, out)


FORWARD = Variant("forward_depthwise", takes, write_forward)
BACKWARD_ATOMIC = Variant("backward_atomic_depthwise", takes, write_backward_atomic)
BACKWARD_WEIGHT = Variant("backward_weight_depthwise", takes, write_backward_weight)
