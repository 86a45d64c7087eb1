"""The operations by im2col: samples are written to memory as columns, and one product of matrices
takes them all. Or one product writes the gradients of all samples, as columns. On Hopper the
forward's product is that of hopper/product.py.

    columns [rows, taps, channels]      a row for each position of each batch item
    out [rows, outputs] = columns @ weight      or one product for each weight group
    weight's gradient = columns.T @ points [rows, outputs]
    gradients of the columns = points @ weight.T

In forward.py and backward_weight.py each program finds the samples for its own block of outputs.
Im2col is faster where there are several such blocks, which would find the same samples again, and
where sample groups are narrow, so that a product waits long for its samples. In backward_atomic.py
a program keeps a product beside the samples' cells and corners, and has registers for few warps.
Here depthwise.py adds up what the product has written, or backward_sorted.py does where algorithms
have to be deterministic. The columns go through memory in lots of rows, or there of taps. Small
lots stay in the second-level cache. But the last programs of a lot leave multiprocessors idle, so
fewer and larger lots are faster where memory is not short.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import backward_sorted, columns, depthwise, forward, tiles
from .backward_atomic import arguments_of
from .layout import Call, Operand, fit, round_up
from .prepare import Order, sum_parts
from .runtime import Buffer
from .sampling import following, parts_of, unravel, wait_for_previous
from .tiles import Tiles
from .variants import Variant


@triton.jit
def sample_columns(image, offset, mask, out, g, tap_columns, first_tile, first_row, room, tiles,
                   blocks, splits,
                   PRECISION: tl.constexpr, INDEX: tl.constexpr, EVEN: tl.constexpr,
                   BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, CHUNKS: tl.constexpr,
                   NEAR: tl.constexpr, CHAINED: tl.constexpr):  # fmt: skip
    """Write the columns of the tiles of positions from `first_tile` on, counted through all batch
    items. Their first row is `first_row` of all. In "bf16x3" the columns are heads, and their tails
    begin `room` rows after them.

    Grid: (tiles x sample groups x blocks of their channels, splits of the taps).
    """
    wait_for_previous(CHAINED)
    c0 = tl.program_id(0) % blocks * (CHUNKS * BLOCK_C)
    s = tl.program_id(0) // blocks % g.sample_groups
    tile = first_tile + tl.program_id(0) // blocks // g.sample_groups
    b = (tile // tiles).to(tl.int64)
    p = tile % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < g.positions
    c = tl.arange(0, BLOCK_C)
    image += b * g.item + s.to(tl.int64) * g.plane + c0
    stop = g.padded - c0
    split = tl.program_id(1)
    first = split * g.taps // splits
    last = (split + 1) * g.taps // splits
    tails = out + room * (g.taps * tap_columns)
    row = (b * g.positions - first_row).to(tl.int32) + p
    out += first * tap_columns
    tails += first * tap_columns
    place = s * g.padded + c0 + (row * (g.taps * tap_columns))[:, None] + c[None, :]
    point = unravel(p, g.point)
    shift = unravel(first, g.kernel)
    rows = depthwise.rows_of(s, first, g)
    offsets, masks = depthwise.read_at(offset, mask, rows, b, p, inside, g, INDEX)
    for tap in range(first, last):
        axes, amplitude, _ = depthwise.cells(offsets, masks, point, shift, inside, g, NEAR)
        # The next tap's offsets and masks are read now, so that it need not wait for them.
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
        out += tap_columns
        tails += tap_columns


@triton.jit
def read_factor(of, tails, place, inside, c, here,
                EVEN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The numbers c of the rows that begin at each place, as a factor of a product: of columns, of
    points or of weights. `here` says which of them exist, which is all of them if EVEN. In "bf16x3"
    these are heads, and their tails lie `tails` after them."""
    keep = inside[:, None]
    if not EVEN:
        keep = keep & here[None, :]
    factor = (tl.load(of + place[:, None] + c[None, :], mask=keep, other=0.0),)
    if PRECISION == "bf16x3":
        of += tails
        factor = factor + (tl.load(of + place[:, None] + c[None, :], mask=keep, other=0.0),)
    return factor


@triton.jit
def store_rows(out, acc, bias, row, inside, o, o_in, g,
               LAST: tl.constexpr, INDEX: tl.constexpr):  # fmt: skip
    """Store the outputs o, plus a bias, of rows that are counted through all batch items."""
    if bias is not None:
        acc += tl.load(bias + o, mask=o_in, other=0.0).to(tl.float32)[None, :]
    if LAST:
        place = (row * g.outputs)[:, None] + o[None, :]
    else:
        place = (row // g.positions * (g.outputs * g.positions) + row % g.positions)[:, None]
        place = place + (o.to(INDEX) * g.positions)[None, :]
    keep = inside[:, None] & o_in[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=keep)


@triton.jit
def multiply_columns(laid, weight, bias, out, parts, g, tap_columns, group_columns, first_row, room,
                     number, groups, blocks, splits,
                     LAST: tl.constexpr, GROUPED: tl.constexpr, PRECISION: tl.constexpr,
                     INDEX: tl.constexpr, EVEN: tl.constexpr,
                     BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
                     CHAINED: tl.constexpr):  # fmt: skip
    """The outputs at the `number` rows whose columns sample_columns has written. Each tap has
    tap_columns columns, and group_columns of them are those of a weight group. An output is a sum
    over those of all taps.

    Grid: (tiles of rows x weight groups x blocks of a group's outputs, splits of the columns).
    """
    wait_for_previous(CHAINED)
    row = tl.program_id(0) // blocks // groups * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = row < number
    group = tl.program_id(0) // blocks % groups
    o = tl.program_id(0) % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    o_in = o < g.group_out
    o += group * g.group_out
    length = g.taps * group_columns
    steps = tl.cdiv(length, BLOCK_C)
    split = tl.program_id(1)
    first = (split * steps // splits).to(tl.int32)
    last = ((split + 1) * steps // splits).to(tl.int32)
    laid += group * group_columns
    laid_tails = room * (g.taps * tap_columns)
    weight_tails = g.padded_outputs * length
    of_row = row * (g.taps * tap_columns)
    of_output = o * length
    acc = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    for step in range(first, last):
        k = step * BLOCK_C + tl.arange(0, BLOCK_C)
        column = k
        if GROUPED:
            # Both counts are multiples of 8, so runs of 8 columns stay together.
            column = k // group_columns * tap_columns + k % group_columns
            column = tl.max_contiguous(tl.multiple_of(column, 8), 8)
        here = k < length
        x = read_factor(laid, laid_tails, of_row, inside, column, here, EVEN, PRECISION)
        w = read_factor(weight, weight_tails, of_output, o_in, k, here, EVEN, PRECISION)
        acc = columns.dot(x, columns.transpose(w, PRECISION), acc, PRECISION)
    if splits > 1:
        place = ((split * room + row) * g.outputs)[:, None] + o[None, :]
        tl.store(parts + place, acc, mask=inside[:, None] & o_in[None, :])
    else:
        store_rows(out, acc, bias, first_row.to(tl.int64) + row, inside, o, o_in, g, LAST, INDEX)


@triton.jit
def add_parts(parts, bias, out, g, first_row, room, number, blocks, splits,
              LAST: tl.constexpr, INDEX: tl.constexpr, BLOCK_P: tl.constexpr,
              BLOCK_O: tl.constexpr, TOGETHER: tl.constexpr, CHAINED: tl.constexpr):  # fmt: skip
    """The outputs at the `number` rows of which multiply_columns has written several parts.

    Grid: (tiles of rows x blocks of outputs).
    """
    wait_for_previous(CHAINED)
    row = tl.program_id(0) // blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = row < number
    o = tl.program_id(0) % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    o_in = o < g.outputs
    place = (row * g.outputs)[:, None] + o[None, :]
    keep = inside[:, None] & o_in[None, :]
    acc = sum_parts(parts, place, keep, splits, room * g.outputs, TOGETHER)
    store_rows(out, acc, bias, first_row.to(tl.int64) + row, inside, o, o_in, g, LAST, INDEX)


@triton.jit
def multiply_points(laid, points, parts, g, first_row, room, number, blocks, splits, before,
                    PRECISION: tl.constexpr, BLOCK_P: tl.constexpr,
                    BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
                    CHAINED: tl.constexpr):  # fmt: skip
    """Add up the weight's gradient [splits, taps, channels, outputs] over the `number` rows whose
    columns have been written. If `before` is positive, earlier rows have left a sum in `parts`, and
    this one is added to it.

    Grid: (blocks of columns x blocks of outputs, splits of the rows).
    """
    wait_for_previous(CHAINED)
    length = g.taps * g.columns
    column = tl.program_id(0) // blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    o = tl.program_id(0) % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    split = tl.program_id(1)
    tap, c = column // g.columns, column % g.columns
    s, c = c // g.padded, c % g.padded
    place = (split * g.taps + tap) * g.channels + s * g.group_channels + c
    place = (place.to(tl.int64) * g.padded_outputs)[:, None] + o[None, :]
    real = column < length
    o_in = o < g.padded_outputs
    keep = (real & (c < g.group_channels))[:, None] & o_in[None, :]
    acc = tl.load(parts + place, mask=keep & (before > 0), other=0.0)
    steps = tl.cdiv(number, BLOCK_P)
    points += first_row.to(tl.int64) * g.padded_outputs
    laid_tails = room * length
    point_tails = g.batch.to(tl.int64) * g.positions * g.padded_outputs
    for step in range(split * steps // splits, (split + 1) * steps // splits):
        row = step * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = row < number
        x = read_factor(laid, laid_tails, row * length, inside, column, real, False, PRECISION)
        of_row = row * g.padded_outputs
        y = read_factor(points, point_tails, of_row, inside, o, o_in, False, PRECISION)
        acc = columns.dot_once(columns.transpose(x, PRECISION), y, acc, PRECISION)
    tl.store(parts + place, acc, mask=keep)


@triton.jit
def multiply_weight(points, weight, out, g, first_row, number, first_tap, taps, blocks,
                    PRECISION: tl.constexpr, EVEN: tl.constexpr, BLOCK_P: tl.constexpr,
                    BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
                    CHAINED: tl.constexpr):  # fmt: skip
    """Write the gradients of the columns of `number` rows at `taps` taps from `first_tap` on.

    Grid: (tiles of rows x taps x blocks of a tap's columns).
    """
    wait_for_previous(CHAINED)
    row = tl.program_id(0) // blocks // taps * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = row < number
    tap = tl.program_id(0) // blocks % taps
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    c_in = c < g.columns
    points += first_row.to(tl.int64) * g.padded_outputs
    point_tails = g.batch.to(tl.int64) * g.positions * g.padded_outputs
    weight_tails = g.taps * g.padded_outputs * g.columns
    of_row = row * g.padded_outputs
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for o0 in range(0, g.padded_outputs, BLOCK_O):
        o = o0 + tl.arange(0, BLOCK_O)
        o_in = o < g.padded_outputs
        of_output = ((first_tap + tap) * g.padded_outputs + o) * g.columns
        x = read_factor(points, point_tails, of_row, inside, o, o_in, False, PRECISION)
        w = read_factor(weight, weight_tails, of_output, o_in, c, c_in, EVEN, PRECISION)
        acc = columns.dot(x, w, acc, PRECISION)
    keep = inside[:, None]
    if not EVEN:
        keep = keep & (c < g.columns)[None, :]
    place = (row * taps + tap) * g.columns
    tl.store(out + place[:, None] + c[None, :], acc.to(out.dtype.element_ty), mask=keep)


def at_once(call: Call, width: int, least: int) -> int:
    """How many numbers of `width` bytes to keep at once: `least`, or as many as fit into a share of
    the memory that the plan may still take."""
    if call.steps.room < 2:
        return least
    left = tiles.SCRATCH * call.dtype.itemsize - call.plan.top
    return max(least, int(left * tiles.SHARE) // width)


class Lots:
    """The rows of columns, in lots of so many as are kept at a time: those of whole tiles of
    positions."""

    def __init__(self, call: Call, block_p: int, numbers: int, wave: int = 0) -> None:
        """A tile has block_p positions, and a lot at most `numbers` numbers, up to a tile. `wave`
        is the number of rows for which a product has about as many programs as the device runs at
        once. Lots are rounded up to whole waves if they may have so many rows, and else are of
        equal size."""
        n, self.block_p = call.sizes, block_p
        self.positions = n.positions
        self.tiles: int = triton.cdiv(n.positions, block_p)  # of a batch item
        self.all_tiles, self.length = n.batch * self.tiles, n.taps * tap_columns(call)
        most = max(triton.cdiv(numbers, self.length * block_p), 1)
        even = triton.cdiv(self.all_tiles, triton.cdiv(self.all_tiles, most))
        whole = round_up(even, max(wave // block_p, 1))
        self.tiles_at_once = min(self.all_tiles, whole if whole <= most else even)
        # The most rows of a lot. A batch item's last tile may be part empty, so tiles have at most
        # block_p rows each.
        self.rows = min(self.tiles_at_once * block_p, n.batch * n.positions)

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        """The first tile, the number of tiles, the first row, and the number of rows, of one lot
        after another."""
        for first in range(0, self.all_tiles, self.tiles_at_once):
            count = min(self.tiles_at_once, self.all_tiles - first)
            row = self._row(first)
            yield first, count, row, self._row(first + count) - row

    def _row(self, tile: int) -> int:
        """The first row of a tile, counted through all batch items."""
        return tile // self.tiles * self.positions + tile % self.tiles * self.block_p


class Columns:
    """Room for the columns of a lot of rows."""

    def __init__(self, call: Call, image: Operand, wave: int = 0) -> None:
        parts = 2 if call.precision == "bf16x3" else 1
        self.call, self.image = call, call.image(image)
        self.constants, _, self.blocks = depthwise.blocks_of(call)
        dtype = torch.bfloat16 if parts == 2 else call.dtype
        numbers = at_once(call, parts * dtype.itemsize, tiles.COLUMNS_AT_ONCE)
        self.lots = Lots(call, self.constants["BLOCK_P"], numbers, wave)
        self.buffer = call.plan.scratch(parts, self.lots.rows, self.lots.length, dtype=dtype)

    def write(self) -> Iterator[dict[str, Any]]:
        """Launch the kernel that writes the columns of a lot, yield the arguments that tell a
        product which rows these are, and go on with the next lot until all have been written."""
        call, n = self.call, self.call.sizes
        for first, count, first_row, number in self.lots:
            programs = count * n.sample_groups * self.blocks
            splits = max(1, min(n.taps, 8 * call.multiprocessors // programs))
            which = dict(first_row=first_row, room=self.lots.rows, tap_columns=tap_columns(call))
            call.launch(
                *(sample_columns, (programs, splits), self.constants),
                **dict(image=self.image, out=self.buffer, first_tile=first, tiles=self.lots.tiles),
                **dict(which, blocks=self.blocks, splits=splits, warps=depthwise.WARPS),
            )
            yield dict(which, number=number, laid=self.buffer)


def work_of(call: Call, block_p: int, block_o: int, block_c: int) -> int:
    """The products of a step."""
    return block_p * block_o * block_c * (3 if call.precision == "bf16x3" else 1)


def tap_columns(call: Call) -> int:
    """How many columns a tap has: the channels of all sample groups, as they are padded."""
    return call.sizes.sample_groups * call.sizes.padded


def group_columns(call: Call) -> int:
    """How many columns of a tap a weight group has. It is 0 if they do not follow each other, or if
    loads of 16 bytes do not fit them."""
    n = call.sizes
    if n.padded == n.group_channels:
        count = n.group_in
    elif n.group_in % n.group_channels == 0:
        count = n.group_in // n.group_channels * n.padded
    else:
        return 0
    return count if count % 8 == 0 else 0


def is_one_matrix(call: Call) -> bool:
    """Whether one product can take all columns of a tap."""
    return call.g.groups == 1 and group_columns(call) > 0


def samples_once(call: Call) -> bool:
    """Whether the samples are worth writing down, so that they are found once for all outputs of a
    weight group, or so that no product waits for narrow sample groups. To write down the columns of
    very narrow ones costs most, so it takes 128 outputs in half precision, too."""
    n = call.sizes
    least = tiles.SAMPLED_ONCE["bf16x3" if call.narrow else call.precision]
    return n.group_out > least or (call.narrow and n.padded >= 16)


def takes_groups(call: Call) -> bool:
    """Whether it takes a call of several weight groups. In float32 forward.py is faster where the
    outputs of a group fill one of its blocks and loads of 16 bytes fit the weight as it is."""
    n = call.sizes
    full = call.dtype == torch.float32 and n.group_in % 8 == 0 and n.group_out >= 64
    enough = min(group_columns(call), n.group_out) >= tiles.WIDE
    return enough and (samples_once(call) or not full)


def takes_forward(call: Call) -> bool:
    """Whether it takes a forward. While there are few columns, it takes calls of fewer outputs and
    of narrower sample groups than otherwise."""
    n = call.sizes
    if call.g.groups > 1:
        return takes_groups(call)
    if not is_one_matrix(call):
        return False
    if samples_once(call):
        # A block of forward.py that takes all outputs finds samples once, too. If it is nearly
        # full, it is done before very many samples would be written down and read.
        full = n.group_out in tiles.FULL and not call.narrow
        full = full and n.group_out <= forward.tiles_of(call, n.group_out).block_o
        return not full or call.columns_fit(tiles.MANY * call.dtype.itemsize)
    if call.precision == "native" and n.outputs > tiles.FORWARD_ONCE and not call.narrow:
        return call.columns_fit(tiles.MANY * call.dtype.itemsize)
    return call.narrow and call.columns_fit()


def launch_product(
    call: Call, row: Tiles, rows: int, splits: int, weight: Buffer, last: bool, **rest: Any
) -> None:
    """Launch the product of a lot, with these tiles. `rest` are multiply_columns' arguments."""
    groups, count = call.g.groups, group_columns(call)
    block_o = fit(call.sizes.group_out, row.block_o)
    blocks = triton.cdiv(call.sizes.group_out, block_o)
    call.launch(
        *(multiply_columns, (triton.cdiv(rows, row.block_p) * groups * blocks, splits)),
        dict(
            **dict(LAST=last, EVEN=call.sizes.taps * count % row.block_c == 0),
            **dict(BLOCK_P=row.block_p, BLOCK_O=block_o, BLOCK_C=row.block_c),
        ),
        **dict(rest, weight=weight, groups=groups, group_columns=count, blocks=blocks),
        **dict(splits=splits, warps=row.warps, stages=row.stages),
    )


class Product(NamedTuple):
    """What multiplies columns: the operation in the tables of tiles, and what launches it."""

    operation: str
    launch: Callable[..., None]


PORTABLE = Product("forward_im2col", launch_product)


def write_forward(
    call: Call, image: Operand, bias: Buffer | None, out: Operand, product: Product = PORTABLE
) -> None:
    n, groups, weight = call.sizes, call.g.groups, call.weight(Order.FLAT)
    row = call.tiles(product.operation, n.group_out)
    length = n.taps * group_columns(call)
    block_o = fit(n.group_out, row.block_o)
    of_rows = groups * triton.cdiv(n.group_out, block_o)  # programs for a tile of rows
    programs_at_once = (row.resident or 2) * call.multiprocessors
    made = Columns(call, image, max(programs_at_once // of_rows, 1) * row.block_p)
    programs = triton.cdiv(made.lots.rows, row.block_p) * of_rows
    most = tiles.PARTS
    if not call.steps.together:
        # Memory is short, so parts may take a quarter of what half-precision columns take.
        most = min(most, length // (8 * n.outputs))
    splits = call.splits(
        *(product.operation, programs, row.warps, triton.cdiv(length, row.block_c)),
        **dict(products=row.block_c, added=made.lots.rows * n.outputs, most=most),
        work=work_of(call, row.block_p, block_o, row.block_c),
        steps=3 if call.precision == "bf16x3" else 1,  # products that wait for each other
    )
    parts = call.room_for_parts(splits, made.lots.rows, n.outputs)
    results = dict(bias=bias, out=out.buffer, parts=parts)
    across = triton.cdiv(n.outputs, 32)
    for which in made.write():
        rows = which["number"]
        product.launch(call, row, rows, splits, weight, out.last, **results, **which)
        adds = call.make(
            *(add_parts, (triton.cdiv(rows, 32) * across,)),
            dict(LAST=out.last, BLOCK_P=32, BLOCK_O=32, TOGETHER=4),
            **dict(results, blocks=across, splits=splits, warps=4, **which),
        )
        call.steps.launch(adds, splits > 1)


def forward_beats_hopper(call: Call) -> bool:
    """Whether it takes a call that Hopper's own kernels would take as well."""
    return call.gives_way and is_one_matrix(call)


def takes_weight(call: Call) -> bool:
    return is_one_matrix(call) and samples_once(call)


def weight_beats_hopper(call: Call) -> bool:
    """Whether it takes a call that Hopper's own kernel would take as well. In three dimensions that
    kernel has small blocks for three products."""
    return len(call.sizes.image) == 3 and call.precision == "bf16x3" and takes_weight(call)


def write_weight(call: Call, image: Operand, points: Operand, out: Buffer) -> None:
    n, made, factors = call.sizes, Columns(call, image), call.factors(points)
    row = call.tiles("backward_weight_im2col", n.outputs)
    block_o = fit(n.padded_outputs, row.block_o)
    blocks = triton.cdiv(n.padded_outputs, block_o)
    programs = triton.cdiv(n.taps * n.columns, row.block_c) * blocks
    most = call.filling(programs)
    splits = call.splits(
        *("backward_weight_im2col", programs, row.warps, triton.cdiv(made.lots.rows, row.block_p)),
        added=n.weights,
        most=most if call.steps.together else min(most, tiles.PARTS),
        work=work_of(call, row.block_p, block_o, row.block_c),
    )
    shape = (splits, n.taps, n.channels, n.padded_outputs)
    parts = call.plan.scratch(*shape, dtype=torch.float32)
    constants = dict(BLOCK_P=row.block_p, BLOCK_O=block_o, BLOCK_C=row.block_c)
    for i, which in enumerate(made.write()):
        call.launch(
            *(multiply_points, (programs, splits), constants),
            **dict(points=factors, parts=parts, blocks=blocks, splits=splits, before=min(i, 1)),
            **dict(which, warps=row.warps, stages=row.stages),
        )
    call.reduce_weight(parts, out)


def takes_atomic(call: Call) -> bool:
    """Whether the product may come first. Where the image's gradient comes from sorted lists, that
    of offset and mask alone is not worth writing columns for. Where the image's gradient is wanted
    alone, nothing is sampled, and a program of backward_atomic.py has the registers that it needs.
    """
    alone = call.only_image and call.precision == "bf16x3" and not call.narrow
    least = tiles.SAMPLED_ONCE["bf16x3"] + 1 if alone else tiles.PRODUCT_FIRST
    return is_one_matrix(call) and call.sizes.outputs >= least and not call.sorts


def atomic_beats_hopper(call: Call) -> bool:
    """Whether it takes a call that Hopper's own kernel would take as well. With three products for
    many outputs it is faster, by a fifth on an H200. Where the image's gradient is wanted alone and
    there are many positions, the own kernel is faster, by an eighth, up to the 256 outputs of its
    block."""
    n = call.sizes
    many = n.outputs > tiles.SAMPLED_ONCE[call.precision]
    if not (takes_atomic(call) and call.precision == "bf16x3" and many):
        return False
    if call.only_image and n.outputs <= 256:
        return call.steps.depending(n.batch * n.positions < tiles.POSITIONS * call.multiprocessors)
    return True


def write_atomic(
    call: Call,
    image: Operand | None,
    points: Operand,
    by_image: Buffer | None,
    by_offset: Buffer | None,
    by_mask: Buffer | None,
) -> None:
    n = call.sizes
    constants, across = depthwise.blocks_of_atomic(call)
    constants |= dict(MULTIPLIER=0, SHARED=False, LAID=True)
    # These columns are in float32, so half as many stay in the cache. Beyond that they take no more
    # memory than all columns of the call's dtype would.
    every = n.batch * n.positions * n.taps * n.columns
    least = max(tiles.COLUMNS_AT_ONCE // 2, every // tiles.LOTS)
    numbers = min(at_once(call, 4, least), max(least, every * call.dtype.itemsize // 4))
    lots = Lots(call, constants["BLOCK_P"], numbers)
    laid = call.plan.scratch(lots.rows, lots.length, dtype=torch.float32)
    arguments = arguments_of(call, image, laid, by_image, by_offset, by_mask)
    for first, count, first_row, number in lots:
        write_gradients(call, points, laid, n.taps, number, first_row)
        depthwise.launch_atomic(
            *(call, constants, count, across, first, first_row), weight=None, **arguments
        )


def write_gradients(
    call: Call,
    points: Operand,
    laid: Buffer,
    taps: int,
    number: int,
    first_row: int = 0,
    first_tap: int = 0,
) -> None:
    """Launch the product that writes the gradients of the samples of some rows at some taps."""
    n = call.sizes
    # Where blocks of 128 columns would take 64 or more in vain, those of 64 are taken.
    row = call.tiles("backward_atomic_im2col", 64 if -n.columns % 128 >= 64 else n.columns)
    block_c = fit(n.columns, row.block_c)
    blocks = triton.cdiv(n.columns, block_c)
    call.launch(
        multiply_weight,
        (triton.cdiv(number, row.block_p) * taps * blocks,),
        dict(
            EVEN=n.columns % block_c == 0,
            **dict(BLOCK_P=row.block_p, BLOCK_O=row.block_o, BLOCK_C=block_c),
        ),
        **dict(points=call.factors(points), weight=call.weight(), out=laid, blocks=blocks),
        **dict(first_row=first_row, number=number, first_tap=first_tap, taps=taps),
        **dict(warps=row.warps, stages=row.stages),
    )


def takes_sorted(call: Call) -> bool:
    """Whether the product comes before the sums from sorted lists. Otherwise every tile multiplies
    the points of its samples, and a sample lies in several tiles. That costs most with three
    products, or where a group has far fewer channels than outputs. The places of the points and of
    a tap's columns have to fit into 32 bits."""
    n = call.sizes
    several = n.sample_groups > 1
    worth = several and (call.narrow or call.precision == "bf16x3")
    worth = worth or (call.precision == "bf16x3" and n.outputs > tiles.SORTED_ONCE)
    if not (worth and is_one_matrix(call) and n.outputs >= tiles.PRODUCT_FIRST):
        return False
    places = n.batch * n.positions * max(n.columns, n.padded_outputs)
    return call.steps.depending(places < 2**31)


def write_sorted(
    call: Call, points: Operand, bias: Buffer | None, out: Operand, lists: tuple[Buffer, Buffer]
) -> None:
    n, dtype = call.sizes, call.dtype
    row = call.tiles("backward_sorted_im2col", n.group_channels)
    rows, of_lists = n.batch * n.positions, backward_sorted.lists_of(lists)
    numbers = at_once(call, dtype.itemsize, tiles.COLUMNS_AT_ONCE * 2 // dtype.itemsize)
    lots = triton.cdiv(n.taps, max(numbers // (rows * n.columns), 1))
    at_a_time = triton.cdiv(n.taps, lots)
    laid = call.plan.scratch(rows, at_a_time * n.columns, dtype=dtype)
    kernel, grid, constants = backward_sorted.launch_of(
        *(call, row, fit(n.group_channels, row.block_c, 16), at_a_time),
        **dict(LAST=out.last, MULTIPLIER=0, LAID=True, BLOCK_O=0),
    )
    splits = grid[-1]
    several = lots > 1 or splits > 1
    shape = (splits, *out.buffer.shape) if several else (1,)
    parts = call.plan.scratch(*shape, dtype=torch.float32)
    for first_tap in range(0, n.taps, at_a_time):
        taps = min(at_a_time, n.taps - first_tap)
        write_gradients(call, points, laid, taps, rows, first_tap=first_tap)
        call.launch(
            *(kernel, grid, constants),
            **dict(points=laid, weight=None, bias=bias, out=out.buffer, parts=parts),
            **dict(of_lists, first_tap=first_tap, taps=taps, splits=splits),
            **dict(warps=row.warps, stages=row.stages),
        )
    call.reduce(parts, out, bias, several)


FORWARD = Variant(
    "forward_im2col",
    takes_forward,
    write_forward,
    others=("sample_columns", "multiply_columns", "add_parts"),
)
BACKWARD_WEIGHT = Variant(
    "backward_weight_im2col",
    takes_weight,
    write_weight,
    wants_parts=True,
    others=("sample_columns", "multiply_points"),
)
BACKWARD_ATOMIC = Variant(
    "backward_atomic_im2col",
    takes_atomic,
    write_atomic,
    wants_parts=True,
    others=("multiply_weight", "backward_atomic_depthwise"),
)
BACKWARD_SORTED = Variant(
    "backward_sorted_im2col",
    takes_sorted,
    write_sorted,
    wants_parts=True,
    others=("multiply_weight", "backward_sorted"),
)
# These come before Hopper's own kernels.
FORWARD_FIRST = FORWARD._replace(takes=forward_beats_hopper)
BACKWARD_WEIGHT_FIRST = BACKWARD_WEIGHT._replace(takes=weight_beats_hopper)
BACKWARD_ATOMIC_FIRST = BACKWARD_ATOMIC._replace(takes=atomic_beats_hopper)
