"""The kernels that bring tensors into the form that others want (layout.py, Note [layouts]), and
those that add up parts of results.
"""

from __future__ import annotations

import enum
from collections import namedtuple

import triton
import triton.language as tl

from .sampling import unravel, wait_for_previous


class Order(enum.IntEnum):
    """The order of a packed weight: of its channels, and with FLAT of its axes. OPERAND,
    ACCUMULATOR and BY_GROUP are for the kernels in Gluon."""

    PLAIN = 0
    OPERAND = 1  # image channels as registers hold a factor, point channels as they hold a sum
    ACCUMULATOR = 2  # image channels as registers hold a sum of products
    BY_GROUP = 3  # one array of all channels per sample group, 0 in the channels of the others
    FLAT = 4  # [outputs, taps, columns], a row with all that an output multiplies (im2col.py)


@triton.jit
def accumulator_order(i, RUN: tl.constexpr):
    """The channel in column i of a wgmma accumulator, if every lane is to have RUN channels in a
    row."""
    return i // (4 * RUN) * (4 * RUN) + (i // 2 % 4) * RUN + (i // 8 % (RUN // 2)) * 2 + i % 2


@triton.jit
def operand_order(i, RUN: tl.constexpr):
    """The channel in column i of a wgmma operand in registers, if every lane is to have RUN
    channels in a row."""
    first = i // (4 * RUN) * (4 * RUN) + (i // 2 % 4) * RUN
    return first + (i // 16 % (RUN // 4)) * 4 + (i // 8 % 2) * 2 + i % 2


# The sizes that _pack needs. `channels` are those of a sample group and `padded` how many they take
# in a row of the packed weight. Where rows are not divided into sample groups, channels is group_in
# and padded is all columns. `group` is the channels of a sample group, for BY_GROUP. `weights` is
# the number of elements of an array. Rows beyond the outputs are zeros. `group_out` outputs read
# the same channels; these are all outputs unless a weight is spread (Call.spread).
PackSizes = namedtuple(
    "PackSizes",
    "programs taps outputs padded_outputs group_in group_out columns channels padded group weights "
    "blocks",
)


@triton.jit
def _pack(program, weight, out, n, LAST: tl.constexpr, BF16X3: tl.constexpr,
          ORDER: tl.constexpr, RUN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
          WIDTH: tl.constexpr):  # fmt: skip
    """Pack a weight [outputs, group_in, taps] (with LAST [outputs, taps, group_in]) as [taps,
    padded_outputs, columns], or as Order.FLAT says. RUN is the channels of a lane in the orders of
    registers (Order).

    Tiles of WIDTH taps are loaded, all before the first is stored. With a WIDTH of 1 a lane has one
    column and works out only once where its channel lies. With more, stores are wider.
    """
    first = (program % ((n.taps + BLOCK_K - 1) // BLOCK_K)) * BLOCK_K
    row = program // ((n.taps + BLOCK_K - 1) // BLOCK_K)
    o = row // n.blocks % n.padded_outputs
    s = row // n.blocks // n.padded_outputs
    column = (row % n.blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    inside = column < n.columns
    taps = first + tl.arange(0, WIDTH)[None, :]
    from_o = o
    from_c = column
    if ORDER == 1:
        from_o = accumulator_order(o, 8)
        from_c = operand_order(column, RUN)
    if ORDER == 2:
        from_c = accumulator_order(column, RUN)
    real = inside & (from_c % n.padded < n.channels) & (from_o < n.outputs)
    c = from_c // n.padded * n.channels + from_c % n.padded
    own = c - from_o // n.group_out * n.group_in
    real = real & (own >= 0) & (own < n.group_in)
    if ORDER == 3:
        real = real & (c >= s * n.group) & (c < (s + 1) * n.group)
        out += s * n.weights
    values = ()
    for k in tl.static_range(BLOCK_K // WIDTH):
        tap = taps + k * WIDTH
        if LAST:
            place = (from_o * n.taps + tap) * n.group_in + own
        else:
            place = (from_o * n.group_in + own) * n.taps + tap
        values = values + (tl.load(weight + place, mask=real & (tap < n.taps), other=0.0),)
    for k in tl.static_range(BLOCK_K // WIDTH):
        value = values[k]
        tap = taps + k * WIDTH
        there = inside & (tap < n.taps)
        to = (tap * n.padded_outputs + o) * n.columns + column
        if ORDER == 4:
            to = (o * n.taps + tap) * n.columns + column
        if BF16X3:
            head = value.to(tl.bfloat16)
            tail = (value - head.to(tl.float32)).to(tl.bfloat16)
            tl.store(out + to, head, mask=there)
            tl.store(out + n.weights + to, tail, mask=there)
        else:
            tl.store(out + to, value, mask=there)


# The sizes that _copy needs. Of each group `channels` channels are read and `padded` are written,
# with zeros at the end. from_ and to_ are the elements between batch items, between groups, and
# between pixels (between channels where those are not last). `blocks` counts the blocks of pixels
# and `across` those of channels.
CopySizes = namedtuple(
    "CopySizes",
    "programs batch pixels groups channels padded from_item from_group from_row to_item to_group "
    "to_row blocks across",
)


@triton.jit
def _copy(program, source, out, bias, n, FROM_LAST: tl.constexpr, TO_LAST: tl.constexpr,
          FROM_C: tl.constexpr, TO_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
          BF16X3: tl.constexpr):  # fmt: skip
    """Copy an image between layouts, add a bias, and convert the dtype.

    With LAST the channels are contiguous, and FROM_C and TO_C divide every distance between runs of
    them; else the pixels are contiguous. BF16X3 writes heads, and tails after all of them.
    """
    if n.pixels % 8 == 0:  # the compiler may then take several pixels at once
        _copy_tile(program, source, out, bias, n, FROM_LAST, TO_LAST, FROM_C, TO_C, 8, BLOCK_P,
                   BLOCK_C, BF16X3)  # fmt: skip
    else:
        _copy_tile(program, source, out, bias, n, FROM_LAST, TO_LAST, FROM_C, TO_C, 1, BLOCK_P,
                   BLOCK_C, BF16X3)  # fmt: skip


@triton.jit
def _copy_tile(program, source, out, bias, n, FROM_LAST: tl.constexpr, TO_LAST: tl.constexpr,
               FROM_C: tl.constexpr, TO_C: tl.constexpr, VECTOR_P: tl.constexpr,
               BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BF16X3: tl.constexpr):  # fmt: skip
    pixels = n.pixels // VECTOR_P * VECTOR_P  # tells the compiler that VECTOR_P divides it
    s = (program // n.blocks) % n.groups
    j = (program // n.blocks // n.groups) % n.across * BLOCK_C + tl.arange(0, BLOCK_C)
    b = (program // n.blocks // n.groups // n.across).to(tl.int64)
    p = program % n.blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    start = b * n.from_item + s.to(tl.int64) * n.from_group
    source += tl.multiple_of(start, FROM_C if FROM_LAST else VECTOR_P)
    start = b * n.to_item + s.to(tl.int64) * n.to_group
    out += tl.multiple_of(start, TO_C if TO_LAST else VECTOR_P)
    inside = (p < pixels)[:, None] & (j < n.channels)[None, :]
    if FROM_LAST:
        place = tl.multiple_of(p.to(tl.int64) * n.from_row, FROM_C)[:, None] + j[None, :]
    else:
        place = tl.multiple_of(j.to(tl.int64) * n.from_row, VECTOR_P)[None, :] + p[:, None]
    value = tl.load(source + place, mask=inside, other=0.0)
    if bias is not None:
        added = tl.load(bias + s * n.channels + j, mask=j < n.channels, other=0.0)
        value = value.to(tl.float32) + added.to(tl.float32)[None, :]
    inside = (p < pixels)[:, None] & (j < n.padded)[None, :]
    if TO_LAST:
        place = tl.multiple_of(p.to(tl.int64) * n.to_row, TO_C)[:, None] + j[None, :]
    else:
        place = tl.multiple_of(j.to(tl.int64) * n.to_row, VECTOR_P)[None, :] + p[:, None]
    if BF16X3:
        head = value.to(tl.bfloat16)
        tl.store(out + place, head, mask=inside)
        out += n.batch.to(tl.int64) * n.to_item
        tl.store(out + place, (value - head.to(tl.float32)).to(tl.bfloat16), mask=inside)
    else:
        tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


SumSizes = namedtuple("SumSizes", "programs batch positions outputs blocks splits")
ZeroSizes = namedtuple("ZeroSizes", "programs count")
ZEROS = 4096  # how many zeros a program writes
SUM, COPY, PACK, ZERO = map(tl.constexpr, range(4))  # the kinds of jobs of `prepare`


@triton.jit
def _sum(program, source, out, parts, n, LAST: tl.constexpr,
         BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr):  # fmt: skip
    """Sum points [B, O, P], or [B, P, O] with LAST, over all but O. Where there are several splits,
    each writes its own sum to parts [splits, O]. The programs are blocks of O x splits."""
    o = program % n.blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    split = program // n.blocks
    if LAST:
        result = _sum_tiles(source, split, o, n, LAST, 1, BLOCK_P, BLOCK_O)
    elif n.positions % 8 == 0:
        result = _sum_tiles(source, split, o, n, LAST, 8, BLOCK_P, BLOCK_O)
    else:
        result = _sum_tiles(source, split, o, n, LAST, 1, BLOCK_P // 4, BLOCK_O)
    if n.splits > 1:
        tl.store(parts + split.to(tl.int64) * n.outputs + o, result, mask=o < n.outputs)
    else:
        tl.store(out + o, result.to(out.dtype.element_ty), mask=o < n.outputs)


@triton.jit
def _sum_tiles(source, split, o, n, LAST: tl.constexpr, VECTOR_P: tl.constexpr,
               BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr):  # fmt: skip
    positions = n.positions // VECTOR_P * VECTOR_P  # tells the compiler that VECTOR_P divides it
    tiles = (positions + BLOCK_P - 1) // BLOCK_P
    total = (n.batch * tiles).to(tl.int64)
    first = (split * total // n.splits).to(tl.int32)
    stop = ((split + 1) * total // n.splits).to(tl.int32)
    acc = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    for next in range(first, stop, 4):
        for i in tl.static_range(4):  # unrolled, so that the four loads do not wait for each other
            t = next + i
            b = (t // tiles).to(tl.int64)
            p = (t % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
            here = (p < positions)[:, None] & (o < n.outputs)[None, :] & (t < stop)
            if LAST:
                place = ((b * positions + p) * n.outputs)[:, None] + o[None, :]
            else:
                place = ((b * n.outputs + o) * positions)[None, :] + p[:, None]
            acc += tl.load(source + place, mask=here, other=0.0).to(tl.float32)
    return tl.sum(acc, 0)


@triton.jit
def _zero(program, out, n, BLOCK: tl.constexpr):
    i = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.zeros((BLOCK,), out.dtype.element_ty), mask=i < n.count)


@triton.jit
def prepare(jobs, KINDS: tl.constexpr, CHAINED: tl.constexpr):
    """Do in one launch what other kernels need done first: sums, copies, packed weights, zeros.

    A job is a tuple of its pointers and then its sizes, of which the first is its number of
    programs. Its kind is SUM, COPY, PACK or ZERO, followed by the constants of the function that
    does it. Grid: (programs of all jobs).
    """
    wait_for_previous(CHAINED)
    program = tl.program_id(0)
    for i in tl.static_range(len(KINDS)):
        job = jobs[i]
        n = job[len(job) - 1]
        if program >= 0 and program < n.programs:
            if KINDS[i][0] == SUM:
                _sum(program, job[0], job[1], job[2], n, KINDS[i][1], KINDS[i][2], KINDS[i][3])
            if KINDS[i][0] == COPY:
                bias = None
                if len(job) == 4:
                    bias = job[2]
                _copy(program, job[0], job[1], bias, n, KINDS[i][1], KINDS[i][2], KINDS[i][3],
                      KINDS[i][4], KINDS[i][5], KINDS[i][6], KINDS[i][7])  # fmt: skip
            if KINDS[i][0] == PACK:
                _pack(program, job[0], job[1], n, KINDS[i][1], KINDS[i][2], KINDS[i][3],
                      KINDS[i][4], KINDS[i][5], KINDS[i][6], KINDS[i][7])  # fmt: skip
            if KINDS[i][0] == ZERO:
                _zero(program, job[0], n, KINDS[i][1])
        program -= n.programs


@triton.jit
def sum_parts(parts, place, inside, splits, apart, TOGETHER: tl.constexpr):
    """The sums of the parts at these places, of which each lies `apart` after the one before.
    TOGETHER is how many loads do not wait for each other."""
    total = tl.zeros(place.shape, tl.float32)
    for first in range(0, splits, TOGETHER):
        for s in tl.static_range(TOGETHER):
            total += tl.load(parts + place, mask=inside & (first + s < splits), other=0.0)
            parts += apart
    return total


@triton.jit
def reduce(parts, bias, out, count, splits, inner, sizes, strides, INDEX: tl.constexpr,
           BLOCK: tl.constexpr, TOGETHER: tl.constexpr, CHAINED: tl.constexpr):  # fmt: skip
    """Sum partial results [count / inner, splits, inner] to a result whose three axes have these
    sizes and strides, and add a bias, which goes by the middle axis. TOGETHER is how many loads do
    not wait for each other."""
    wait_for_previous(CHAINED)
    i = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    place = i + i // inner * (splits - 1) * inner
    acc = tl.zeros((BLOCK,), tl.float32)
    # Places move on, and not the pointer as in sum_parts, which would take 128 registers for 72.
    for first in range(0, splits, TOGETHER):
        for s in tl.static_range(TOGETHER):
            acc += tl.load(parts + place, mask=inside & (first + s < splits), other=0.0)
            place += inner
    at = unravel(i, sizes)
    if bias is not None:
        acc += tl.load(bias + at[1], mask=inside, other=0.0).to(tl.float32)
    place = at[0] * strides[0] + at[1] * strides[1] + at[2] * strides[2]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def reduce_weight(parts, out, taps, group_in, group_out, columns, outputs, padded_outputs, splits,
                  BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
                  TOGETHER: tl.constexpr, CHAINED: tl.constexpr):  # fmt: skip
    """Sum partial weights [splits, taps, columns, padded_outputs] to a weight [outputs, group_in,
    taps]. The columns of each run of group_out outputs begin group_in after those of the run
    before.

    The tile is transposed between the loads and the store, so that both are runs of memory.
    Grid: (blocks of group_in x taps, blocks of outputs).
    """
    wait_for_previous(CHAINED)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    length = group_in * taps
    inside = (k < length)[:, None] & (o < outputs)[None, :]
    place = ((k % taps * columns + k // taps) * padded_outputs)[:, None]
    place = place + (o // group_out * group_in * padded_outputs + o)[None, :]
    apart = columns * taps * padded_outputs
    # A loop over loads of many parts at once spends most of its time on loads that are not done
    # where there are few.
    if splits <= 4:
        acc = sum_parts(parts, place, inside, splits, apart, 4)
    else:
        acc = sum_parts(parts, place, inside, splits, apart, TOGETHER)
    tl.store(out + (k[:, None] + o[None, :] * length), acc.to(out.dtype.element_ty), mask=inside)
