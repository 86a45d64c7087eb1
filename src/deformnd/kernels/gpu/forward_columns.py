"""The forward by columns: samples are written down, and a product takes them all.

    columns [rows, taps, channels]      a row for each position of each batch item
    out [rows, outputs] = columns @ weight

In forward.py a program samples for its own block of outputs. Where there are several such blocks,
or where sample groups are narrow, so that a product waits long for its samples, this is faster,
although columns go through memory. They are written for so many rows at a time that they stay in
the second cache of most GPUs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import columns, depthwise, tiles
from .layout import Call, Operand, fit
from .runtime import Buffer
from .sampling import following, parts_of, unravel
from .variants import Variant


@triton.jit
def sample_columns(image, offset, mask, out, g, first_item, start, count, room, tiles, blocks,
                   splits, PRECISION: tl.constexpr, INDEX: tl.constexpr, EVEN: tl.constexpr,
                   BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, CHUNKS: tl.constexpr):  # fmt: skip
    """The columns of `count` positions from `start` of batch items from `first_item` on. In
    "bf16x3" they are heads, and their tails lie after `room` rows of these.

    Grid: (batch items x tiles of positions x sample groups x blocks of their channels, splits of
    the taps).
    """
    c0 = tl.program_id(0) % blocks * (CHUNKS * BLOCK_C)
    s = tl.program_id(0) // blocks % g.sample_groups
    tile = tl.program_id(0) // blocks // g.sample_groups
    before = tile // tiles
    b = (first_item + before).to(tl.int64)
    row = tile % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = row < count
    p = start + row
    c = tl.arange(0, BLOCK_C)
    image += b * g.item + s.to(tl.int64) * g.plane + c0
    stop = g.padded - c0
    split = tl.program_id(1)
    first = split * g.taps // splits
    last = (split + 1) * g.taps // splits
    row += before * count
    tails = out + room * (g.taps * g.columns)
    of_tap = first * g.columns + s * g.padded + c0
    place = of_tap + (row * (g.taps * g.columns))[:, None] + c[None, :]
    point = unravel(p, g.point)
    shift = unravel(first, g.kernel)
    rows = depthwise.rows_of(s, first, g)
    offsets, masks = depthwise.read_at(offset, mask, rows, b, p, inside, g, INDEX)
    for tap in range(first, last):
        axes, amplitude, _ = depthwise.cells(offsets, masks, point, shift, inside, g)
        # Now, so that the next tap need not wait for them.
        more = inside & (tap + 1 < last)
        rows = depthwise.next_rows(rows, g)
        offsets, masks = depthwise.read_at(offset, mask, rows, b, p, more, g, INDEX)
        x = depthwise.sample(image, axes, amplitude, c, stop, g, INDEX, EVEN, CHUNKS)
        for j in tl.static_range(CHUNKS):
            keep = inside[:, None]
            if not EVEN:
                keep = keep & (c + j * BLOCK_C < stop)[None, :]
            factors = parts_of(x[j], out.dtype.element_ty, PRECISION)
            tl.store(out + place + j * BLOCK_C, factors[0], mask=keep)
            if PRECISION == "bf16x3":
                tl.store(tails + place + j * BLOCK_C, factors[1], mask=keep)
        shift, _ = following(shift, g.kernel)
        out += g.columns
        tails += g.columns


@triton.jit
def read_columns(of, place, inside, c, g, EVEN: tl.constexpr):
    """Columns c, or weights of these, at each place."""
    keep = inside[:, None]
    if not EVEN:
        keep = keep & (c < g.columns)[None, :]
    return tl.load(of + place[:, None] + c[None, :], mask=keep, other=0.0)


@triton.jit
def multiply_columns(columns_, weight, bias, out, parts, g, first_item, start, count, room, number,
                     blocks, splits,
                     LAST: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
                     EVEN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr,
                     BLOCK_C: tl.constexpr):  # fmt: skip
    """The results at `number` rows, which sample_columns has written the columns of.

    Grid: (tiles of rows x blocks of outputs, splits of the columns).
    """
    row = tl.program_id(0) // blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = row < number
    o = tl.program_id(0) % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    o_in = o < g.outputs
    per_tap = tl.cdiv(g.columns, BLOCK_C)
    split = tl.program_id(1)
    first = (split * (g.taps * per_tap) // splits).to(tl.int32)
    last = ((split + 1) * (g.taps * per_tap) // splits).to(tl.int32)
    tails = g.taps * g.padded_outputs * g.columns
    acc = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    for step in range(first, last):
        tap = step // per_tap
        c = step % per_tap * BLOCK_C + tl.arange(0, BLOCK_C)
        of_row = (row * g.taps + tap) * g.columns
        of_output = (tap * g.padded_outputs + o) * g.columns
        x = (read_columns(columns_, of_row, inside, c, g, EVEN),)
        w = (read_columns(weight, of_output, o_in, c, g, EVEN),)
        if PRECISION == "bf16x3":
            x = x + (
                read_columns(columns_ + room * (g.taps * g.columns), of_row, inside, c, g, EVEN),
            )
            w = w + (read_columns(weight + tails, of_output, o_in, c, g, EVEN),)
        acc = columns.dot(x, columns.transpose(w, PRECISION), acc, PRECISION)
    b = (first_item + row // count).to(tl.int64)
    p = start + row % count
    if LAST:
        place = (b * g.positions + p)[:, None] * g.outputs + o[None, :]
    else:
        place = (b * (g.outputs * g.positions) + p)[:, None]
        place = place + (o.to(INDEX) * g.positions)[None, :]
    keep = inside[:, None] & o_in[None, :]
    if splits > 1:
        parts += split.to(tl.int64) * g.batch * g.positions * g.outputs
        tl.store(parts + place, acc, mask=keep)
    else:
        if bias is not None:
            acc += tl.load(bias + o, mask=o_in, other=0.0).to(tl.float32)[None, :]
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=keep)


def takes(call: Call) -> bool:
    n = call.sizes
    whole = call.g.groups == 1 and n.columns % 8 == 0  # so that loads have 16 bytes
    return whole and (n.outputs > tiles.SAMPLED_ONCE or (call.narrow and n.padded >= 16))


def write(call: Call, image: Operand, bias: Buffer | None, out: Operand) -> None:
    n, plan = call.sizes, call.plan
    precise = call.precision == "bf16x3"
    length = n.taps * n.columns
    # Whole batch items, or positions of a single one.
    most = max(tiles.COLUMNS_AT_ONCE // length, 128)
    items = max(1, min(n.batch, most // n.positions))
    count = min(n.positions, most // 128 * 128)
    kind = torch.bfloat16 if precise else call.dtype
    laid = plan.scratch(1 + precise, items * count, length, dtype=kind)
    source, weight = call.image(image), call.weight()
    row = call.tiles("forward_columns", n.outputs)
    block_o = fit(n.outputs, row.block_o)
    block_c = fit(n.columns, row.block_c)
    blocks = triton.cdiv(n.outputs, block_o)
    programs = triton.cdiv(items * count, row.block_p) * blocks
    steps = n.taps * triton.cdiv(n.columns, block_c)
    at_once = tiles.WARPS_AT_ONCE * call.multiprocessors // row.warps
    splits = max(1, min(at_once // programs, steps // 8))
    parts = call.room_for_parts(splits, out)
    constants: dict[str, Any] = dict(LAST=out.last, EVEN=n.columns % block_c == 0)
    constants |= dict(BLOCK_P=row.block_p, BLOCK_O=block_o, BLOCK_C=block_c)
    sampling, _, _ = depthwise.blocks_of(call)
    across = triton.cdiv(n.padded, sampling["BLOCK_C"] * sampling["CHUNKS"])
    for item in range(0, n.batch, items):
        for start in range(0, n.positions, count):
            now = min(items, n.batch - item)
            here = min(count, n.positions - start)
            part: dict[str, Any] = dict(
                first_item=item, start=start, count=here, room=items * count
            )
            tile = triton.cdiv(here, sampling["BLOCK_P"])
            programs = now * tile * n.sample_groups * across
            shares = max(1, min(n.taps, 8 * call.multiprocessors // programs))
            call.launch(
                *(sample_columns, (programs, shares), sampling),
                **dict(image=source, out=laid, tiles=tile, blocks=across, splits=shares),
                **dict(part, warps=depthwise.WARPS),
            )
            grid = (triton.cdiv(now * here, row.block_p) * blocks, splits)
            call.launch(
                *(multiply_columns, grid, constants),
                **dict(columns_=laid, weight=weight, bias=bias, out=out.buffer, parts=parts),
                **dict(part, number=now * here, blocks=blocks, splits=splits),
                **dict(warps=row.warps, stages=row.stages),
            )
    call.reduce(parts, out, bias)


FORWARD_COLUMNS = Variant("sample_columns", takes, write, others=("multiply_columns",))
