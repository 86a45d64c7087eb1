"""Multi-scale deformable attention: samples of several images, whose channels are last.

A program takes queries of one head. A row is a query with every SPLIT-th point of each level, and
the row's lanes have the head's channels, one chunk of BLOCK_C after another, as in depthwise.py:

    [ROWS, BLOCK_C]     a chunk of samples; CHUNKS of them lie in the same lanes,
    [ROWS]              and share the cells, which every lane of a row finds for itself

Everything is computed in float32.

Programs of one head follow each other, so that its pixels stay in the second-level cache, those of
small levels in the first-level one, and its gradient in the second until it is complete. The value
is read where it lies. Nothing is compiled for a size: kernels are compiled only for a rank, a
number of levels, dtypes, channels, and for whether 2 or 4 divide the points of a level.

Note [repeatable attention]
The value's gradient at a pixel is a sum of what samples bring to it. Atomics add these terms in any
order. Where algorithms must be deterministic, torch's stable sort sorts the samples by their cell
instead, and each pixel gathers from the 2^n cells around it in that order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..geometry import Attention
from . import tiles
from .layout import Steps, fit
from .runtime import Buffer, Launch, Plan
from .sampling import contract, corner_weight, product, ravel, unravel, wait_for_previous
from .tiles import Tiles


@triton.jit
def level_of(shapes, level):
    """The sizes of a level, and how many pixels are before it."""
    image = shapes[0]
    start = 0
    before = 0
    for i in tl.static_range(1, len(shapes)):
        before += product(shapes[i - 1])
        reached = level >= i
        start = tl.where(reached, before, start)
        sizes = ()
        for a in tl.static_range(len(image)):
            sizes = sizes + (tl.where(reached, shapes[i][a], image[a]),)
        image = sizes
    return image, start


@triton.jit
def next_points(level, point, points, SPLIT: tl.constexpr):
    """The level and the first of the next SPLIT points, found without a division."""
    point += SPLIT
    last = point >= points
    return tl.where(last, level + 1, level), tl.where(last, 0, point)


@triton.jit
def read_samples(locations, weights, at, here, RANK: tl.constexpr):
    """Read the locations, x first, and the weights of samples, as they are stored."""
    found = ()
    for a in tl.static_range(RANK):
        found = found + (tl.load(locations + (at * RANK + a), mask=here, other=0.0),)
    return found, tl.load(weights + at, mask=here, other=0.0)


@triton.jit
def cells_of(location, image, here):
    """The cells of samples as sampling.cell_of gives them, except that low corners are not moved
    into the image; and whether the samples are near enough to have a cell."""
    axes = ()
    near = here
    for a in tl.static_range(len(image)):
        at = location[len(image) - 1 - a].to(tl.float32)
        # The definition rounds the product before it subtracts a half. Compilers would join a
        # product and a difference to one operation that rounds once; they do not join these.
        at = tl.fma(at, image[a].to(tl.float32), 0.0) - 0.5
        finite = tl.abs(at) < 1.0e9
        near = near & finite
        at = tl.where(finite, at, 0.0)
        floor = tl.floor(at)
        fraction = at - floor
        low = floor.to(tl.int32)
        # One comparison checks both bounds: without its sign a number below 0 is a large one.
        has_low = low.to(tl.uint32) < image[a].to(tl.uint32)
        has_high = (low + 1).to(tl.uint32) < image[a].to(tl.uint32)
        axes = axes + ((low, 1, (1.0 - fraction, fraction), (has_low, has_high)),)
    return axes, near


@triton.jit
def corner_of(axes, near, q: tl.constexpr, image):
    """The pixel of corner q, and whether it is in the image."""
    pixel = 0
    inside = near
    for a in tl.static_range(len(axes)):
        pixel = pixel * image[a] + (axes[a][0] + ((q >> (len(axes) - 1 - a)) & 1))
        inside = inside & axes[a][3][(q >> (len(axes) - 1 - a)) & 1]
    return pixel, inside


@triton.jit
def channels_of(value, corner, c, j: tl.constexpr, stop, g,
                INDEX: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """Chunk j of channels c of a corner [ROWS, BLOCK_C], 0 outside the image and from channel
    `stop` on. EVEN chunks end before `stop`, so that they need no check."""
    # The chunk is added to the pointer last, so that it is a constant in the load's instruction.
    place = value + ((corner[0].to(INDEX) * g.row)[:, None] + c[None, :])
    keep = corner[1][:, None]
    if not EVEN:
        keep = keep & (c + j * c.shape[0] < stop)[None, :]
    return tl.load(place + j * c.shape[0], mask=keep, other=0.0)


@triton.jit
def add_sample(sums, value, axes, near, weight, c, stop, image, g,
               INDEX: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """The sums of chunks, in float32, with samples times their weight added to them."""
    result = ()
    for j in tl.static_range(len(sums)):
        total = sums[j]
        for q in tl.static_range(2 ** len(axes)):
            x = channels_of(value, corner_of(axes, near, q, image), c, j, stop, g, INDEX, EVEN)
            share = (corner_weight(axes, q) * weight)[:, None]
            total = tl.fma(x.to(tl.float32), share, total)
        result = result + (total,)
    return result


@triton.jit
def read_grads(grad_output, place, c, here, stop, CHUNKS: tl.constexpr):
    """Chunks of a row of grad_output at each place, in float32."""
    grads = ()
    for j in tl.static_range(CHUNKS):
        keep = here[:, None] & (c + j * c.shape[0] < stop)[None, :]
        at = grad_output + (place[:, None] + c[None, :]) + j * c.shape[0]
        grads = grads + (tl.load(at, mask=keep, other=0.0).to(tl.float32),)
    return grads


@triton.jit
def forward_attention(value, locations, weights, out, g, tiles, blocks,
                      INDEX: tl.constexpr, EVEN: tl.constexpr, SPLIT: tl.constexpr,
                      ROWS: tl.constexpr, BLOCK_C: tl.constexpr, CHUNKS: tl.constexpr,
                      CHAINED: tl.constexpr):  # fmt: skip
    """out[b, q, h, c] = sum over levels and points of weight * sample.

    Grid: (B x heads x tiles of queries x blocks of a head's channels).
    """
    wait_for_previous(CHAINED)
    rank: tl.constexpr = len(g.shapes[0])
    levels: tl.constexpr = len(g.shapes)
    queries: tl.constexpr = ROWS // SPLIT
    c0 = tl.program_id(0) % blocks * (CHUNKS * BLOCK_C)
    tile = tl.program_id(0) // blocks % tiles
    h = tl.program_id(0) // blocks // tiles % g.heads
    b = (tl.program_id(0) // blocks // tiles // g.heads).to(tl.int64)
    r = tl.arange(0, ROWS)
    q = tile * queries + r // SPLIT
    here = q < g.queries
    c = tl.arange(0, BLOCK_C)
    samples = levels * g.points
    before = b * g.queries * g.heads * samples
    locations += before * rank
    weights += before
    value += b * g.item + h.to(tl.int64) * g.plane + c0
    at = (q.to(INDEX) * g.heads + h) * samples + r % SPLIT
    sums = ()
    for _ in tl.static_range(CHUNKS):
        sums = sums + (tl.zeros((ROWS, BLOCK_C), tl.float32),)
    location, weight = read_samples(locations, weights, at, here, rank)
    # Levels and points share one loop, since with two the compiler would exchange cells between
    # lanes.
    level = 0
    point = 0
    for step in range(0, samples, SPLIT):
        image, start = level_of(g.shapes, level)
        level, point = next_points(level, point, g.points, SPLIT)
        axes, near = cells_of(location, image, here)
        amplitude = weight.to(tl.float32)
        # The next locations and weights are read now, so that the next samples need not wait.
        at += SPLIT
        more = here & (step + SPLIT < samples)
        location, weight = read_samples(locations, weights, at, more, rank)
        of_level = value + tl.cast(start, tl.int64) * g.row
        sums = add_sample(sums, of_level, axes, near, amplitude, c, g.channels - c0, image, g,
                          INDEX, EVEN)  # fmt: skip
    q = tile * queries + tl.arange(0, queries)
    out += (b * g.queries * g.heads + h) * g.channels + c0
    place = q.to(INDEX) * (g.heads * g.channels)
    for j in tl.static_range(CHUNKS):
        total = tl.reshape(sums[j], (queries, SPLIT, BLOCK_C))
        total = tl.sum(total, 1).to(out.dtype.element_ty)
        keep = (q < g.queries)[:, None] & (c0 + c + j * BLOCK_C < g.channels)[None, :]
        tl.store(out + (place[:, None] + c[None, :]) + j * BLOCK_C, total, mask=keep)


@triton.jit
def backward_attention(value, locations, weights, grad_output, grad_value, grad_locations,
                       grad_weights, g, tiles,
                       INDEX: tl.constexpr, EVEN: tl.constexpr, ONCE: tl.constexpr,
                       SPLIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
                       CHUNKS: tl.constexpr, CHAINED: tl.constexpr):  # fmt: skip
    """The gradients of locations and weights, and that of the value by atomic additions to float32
    numbers [B, S, H, C]; each unless None. ONCE says that the chunks hold all channels of a head.

    Grid: (B x heads x tiles of queries).
    """
    wait_for_previous(CHAINED)
    rank: tl.constexpr = len(g.shapes[0])
    levels: tl.constexpr = len(g.shapes)
    by_sample: tl.constexpr = grad_locations is not None or grad_weights is not None
    tile = tl.program_id(0) % tiles
    h = tl.program_id(0) // tiles % g.heads
    b = (tl.program_id(0) // tiles // g.heads).to(tl.int64)
    r = tl.arange(0, ROWS)
    q = tile * (ROWS // SPLIT) + r // SPLIT
    here = q < g.queries
    # The hints give a lane 16 bytes of the float32 numbers that are added, since adding to half of
    # a sector of memory costs as much as adding to all of it.
    c = tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK_C), 4), 4)
    samples = levels * g.points
    before = b * g.queries * g.heads * samples
    locations += before * rank
    weights += before
    if grad_locations is not None:
        grad_locations += before * rank
    if grad_weights is not None:
        grad_weights += before
    if by_sample:
        value += b * g.item + h.to(tl.int64) * g.plane
    row = g.heads * g.channels
    if grad_value is not None:
        grad_value += b * g.pixels * row + h * g.channels
    grad_output += b * g.queries * row + h * g.channels
    of_query = q.to(INDEX) * row
    end = g.channels
    if ONCE:
        end = CHUNKS * BLOCK_C
    grads = read_grads(grad_output, of_query, c, here, g.channels, CHUNKS)
    at = (q.to(INDEX) * g.heads + h) * samples + r % SPLIT
    location, weight = read_samples(locations, weights, at, here, rank)
    level = 0
    point = 0
    for step in range(0, samples, SPLIT):
        image, start = level_of(g.shapes, level)
        level, point = next_points(level, point, g.points, SPLIT)
        before = tl.cast(start, tl.int64)
        axes, near = cells_of(location, image, here)
        amplitude = weight.to(tl.float32)
        now = at
        at += SPLIT
        more = here & (step + SPLIT < samples)
        location, weight = read_samples(locations, weights, at, more, rank)
        dots = ()
        for _ in tl.static_range(2**rank):
            dots = dots + (tl.zeros((ROWS,), tl.float32),)
        for c0 in range(0, end, CHUNKS * BLOCK_C):
            own = grads
            if not ONCE:
                own = read_grads(
                    grad_output + c0, of_query, c, here, g.channels - c0, CHUNKS
                )  # fmt: skip
            totals = ()
            for k in tl.static_range(2**rank):
                corner = corner_of(axes, near, k, image)
                total = dots[k]
                if by_sample:
                    terms = tl.zeros((ROWS, BLOCK_C), tl.float32)
                    for j in tl.static_range(CHUNKS):
                        x = channels_of(value + before * g.row + c0, corner, c, j,
                                        g.channels - c0, g, INDEX, EVEN)  # fmt: skip
                        terms = tl.fma(x.to(tl.float32), own[j], terms)
                    total += tl.sum(terms, 1)
                totals = totals + (total,)
                if grad_value is not None:
                    share = corner_weight(axes, k) * amplitude
                    touched = (corner[1] & (share != 0.0))[:, None]
                    place = (corner[0].to(INDEX) * row)[:, None] + c[None, :]
                    for j in tl.static_range(CHUNKS):
                        keep = touched
                        if not EVEN:
                            keep = keep & (c0 + c + j * BLOCK_C < g.channels)[None, :]
                        tl.atomic_add(
                            grad_value + before * row + c0 + place + j * BLOCK_C,
                            own[j] * share[:, None], mask=keep, sem="relaxed",
                        )  # fmt: skip
            dots = totals
        if by_sample:
            slopes = contract(dots, axes)
            if grad_locations is not None:
                for a in tl.static_range(rank):
                    slope = slopes[a] * amplitude * image[a].to(tl.float32)
                    slope = slope.to(grad_locations.dtype.element_ty)
                    tl.store(grad_locations + (now * rank + rank - 1 - a), slope, mask=here)
            if grad_weights is not None:
                by_weight = slopes[rank].to(grad_weights.dtype.element_ty)
                tl.store(grad_weights + now, by_weight, mask=here)


@triton.jit
def list_cells(locations, keys, g, count, INDEX: tl.constexpr, BLOCK: tl.constexpr,
               CHAINED: tl.constexpr):  # fmt: skip
    """Write the cell in which each sample lies, counted through all heads and levels.
    Samples that are not valid get the count of all cells. On every axis a level has one more cell
    than pixels.

    Grid: (blocks of samples).
    """
    wait_for_previous(CHAINED)
    rank: tl.constexpr = len(g.shapes[0])
    i = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    here = i < count
    level = i // g.points % len(g.shapes)
    head = i // g.points // len(g.shapes)
    head = head // g.heads // g.queries * g.heads + head % g.heads
    location, _ = read_samples(locations, locations, i, here, rank)
    image, _ = level_of(g.shapes, level)
    axes, valid = cells_of(location, image, here)
    cell = ()
    for a in tl.static_range(rank):
        valid = valid & (axes[a][3][0] | axes[a][3][1])
        cell = cell + (axes[a][0] + 1,)
    grid, start = level_of(g.grids, level)
    key = head.to(INDEX) * g.cells + start + ravel(cell, grid)
    key = tl.where(valid, key, tl.cast(g.batch, INDEX) * g.heads * g.cells)
    tl.store(keys + i, key.to(keys.dtype.element_ty), mask=here)


@triton.jit
def backward_sorted_attention(locations, weights, grad_output, order, starts, out, g, tiles, blocks,
                              INDEX: tl.constexpr, ROWS: tl.constexpr,
                              BLOCK_C: tl.constexpr, CHAINED: tl.constexpr):  # fmt: skip
    """The value's gradient [B, S, H, C] from the samples in sorted order, where `starts` says at
    which place those of each cell begin. See Note [repeatable attention].

    Grid: (B x heads x tiles of pixels x blocks of a head's channels).
    """
    wait_for_previous(CHAINED)
    rank: tl.constexpr = len(g.shapes[0])
    c0 = tl.program_id(0) % blocks * BLOCK_C
    tile = tl.program_id(0) // blocks % tiles
    head = tl.program_id(0) // blocks // tiles
    h = head % g.heads
    s = tile * ROWS + tl.arange(0, ROWS)
    here = s < g.pixels
    c = c0 + tl.arange(0, BLOCK_C)
    level = s * 0
    before = 0
    for i in tl.static_range(1, len(g.shapes)):
        before += product(g.shapes[i - 1])
        level += tl.where(s >= before, 1, 0)
    image, start = level_of(g.shapes, level)
    grid, first = level_of(g.grids, level)
    pixel = unravel(s - start, image)
    total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for k in tl.static_range(2**rank):
        cell = ()
        for a in tl.static_range(rank):
            cell = cell + (pixel[a] + (1 - ((k >> (rank - 1 - a)) & 1)),)
        key = head.to(INDEX) * g.cells + first + ravel(cell, grid)
        at = tl.load(starts + key, mask=here, other=0)
        stop = tl.load(starts + key + 1, mask=here, other=0)
        for _ in range(0, tl.max(stop - at, 0).to(tl.int32)):
            listed = at < stop
            sample = tl.load(order + at, mask=listed, other=0).to(INDEX)
            location, weight = read_samples(locations, weights, sample, listed, rank)
            # `near` is not used, but Triton 3.4 takes a `_` for the loop's own variable.
            axes, near = cells_of(location, image, listed)
            share = corner_weight(axes, k) * weight.to(tl.float32)
            row = sample // (len(g.shapes) * g.points) * g.channels
            keep = listed[:, None] & (c < g.channels)[None, :]
            x = tl.load(grad_output + (row[:, None] + c[None, :]), mask=keep, other=0.0)
            total = tl.fma(x.to(tl.float32), share[:, None], total)
            at += 1
    out += (head // g.heads).to(tl.int64) * g.pixels * g.heads * g.channels
    place = (s.to(INDEX) * g.heads + h) * g.channels
    keep = here[:, None] & (c < g.channels)[None, :]
    tl.store(out + (place[:, None] + c[None, :]), total.to(out.dtype.element_ty), mask=keep)


class Sizes(NamedTuple):
    """What the kernels are told of a call, where it is named g."""

    shapes: tuple[tuple[int, ...], ...]
    grids: tuple[tuple[int, ...], ...]  # the cells of each level on every axis
    batch: int
    queries: int
    heads: int
    channels: int  # of a head
    points: int
    pixels: int
    cells: int  # of all levels
    row: int  # elements between pixels of the value
    plane: int  # elements between its heads
    item: int  # elements between its batch items
    padded: int  # the common divisor of these three and 16


class Call:
    """What the operations of one plan share."""

    def __init__(self, a: Attention, plan: Plan, strides: Sequence[int]) -> None:
        """`strides` are those of the value, of which the last is 1."""
        item, row, plane = (
            stride if size > 1 else other
            for size, stride, other in zip(
                (a.batch, a.pixels, a.heads),
                strides,
                (a.pixels * a.heads * a.channels, a.heads * a.channels, a.channels),
                strict=False,
            )
        )
        grids = tuple(tuple(size + 1 for size in shape) for shape in a.shapes)
        cells = sum(map(math.prod, grids))
        self.a, self.plan, self.steps = a, plan, Steps(plan)
        self.sizes = Sizes(
            *(a.shapes, grids, a.batch, a.queries, a.heads, a.channels, a.points, a.pixels, cells),
            *(row, plane, item, math.gcd(16, row, plane, item)),
        )
        self.device = tiles.device_of(plan.device)
        rank, samples = len(a.shapes[0]), len(a.shapes) * a.points
        # The most numbers that a tensor has in a batch item, and in the whole batch, apart from the
        # value, which may have gaps where it lies.
        own = max(a.queries * max(samples * rank, a.channels), a.pixels * a.channels) * a.heads
        every = max(own, cells * a.heads) * a.batch
        self.index = tl.int32 if max(own, a.pixels * row) < 2**31 else tl.int64
        self.many = tl.int32 if every < 2**31 else tl.int64

    def tiles(self, operation: str, width: int) -> Tiles:
        return tiles.find(self.device.architecture, operation, width, self.a.channels)

    def blocks(
        self, operation: str, width: int, split: int = 4
    ) -> tuple[dict[str, Any], int, Tiles]:
        """The constants, the number of tiles of queries, and the row of the table. At most `split`
        rows share the points of a query."""
        channels = self.a.channels
        row = self.tiles(operation, width)
        split = math.gcd(split, self.a.points)
        block_c = fit(channels, row.block_c, least=4)
        chunks = min(triton.cdiv(channels, block_c), row.block_o)
        constants = dict(
            INDEX=self.index,
            EVEN=channels % (block_c * chunks) == 0,
            SPLIT=split,
            ROWS=row.block_p,
            BLOCK_C=block_c,
            CHUNKS=chunks,
        )
        return constants, triton.cdiv(self.a.queries, row.block_p // split), row

    def launch(
        self,
        kernel: Any,
        programs: int,
        constants: dict[str, Any],
        row: Tiles,
        runs: bool = True,
        **rest: Any,
    ) -> None:
        arguments = dict(g=self.sizes, **rest)
        options = (row.warps, row.stages)
        self.steps.launch(Launch(kernel, (programs, 1, 1), arguments, constants, *options), runs)


def write_forward(call: Call, given: Sequence[Buffer], wanted: Any) -> None:
    """Write the forward, given the value, locations and weights."""
    a, (value, locations, weights) = call.a, given
    out = call.plan.result(a.output_shape, value.dtype)
    name, width = "forward_attention", value.dtype.itemsize
    # Two rows share the points of a query if that makes enough programs, since they leave less to
    # be added than four rows do. The launch that does not suit this size is only loaded.
    _, count, _ = call.blocks(name, width)
    enough = a.batch * a.heads * count >= 8 * call.device.multiprocessors
    splits = {math.gcd(split, a.points) for split in (2, 4)}
    for split in sorted(splits):
        constants, count, row = call.blocks(name, width, split)
        blocks = triton.cdiv(a.channels, constants["BLOCK_C"] * constants["CHUNKS"])
        call.launch(
            forward_attention,
            a.batch * a.heads * count * blocks,
            constants,
            row,
            runs=split == (min(splits) if enough else max(splits)),
            value=value,
            locations=locations,
            weights=weights,
            out=out,
            tiles=count,
            blocks=blocks,
        )


def write_gradients(call: Call, given: Sequence[Buffer], wanted: tuple[bool, ...]) -> None:
    """Write the gradients that are wanted by value, locations and weights, given grad_output and
    these three."""
    a, plan, (grad_output, value, locations, weights) = call.a, call.plan, given
    by_value, by_locations, by_weights = (
        plan.result(t.shape, t.dtype) if want else None
        for want, t in zip(wanted, given[1:], strict=True)
    )
    sums = by_value
    if by_value is not None and by_value.dtype != torch.float32:
        sums = plan.scratch(*by_value.shape, dtype=torch.float32)
    if sums is not None:
        call.steps.zero(sums)
    if not any(wanted):  # only the value's gradient is needed, and sorting gives it
        return
    constants, count, row = call.blocks("backward_attention", value.dtype.itemsize)
    constants["ONCE"] = constants["BLOCK_C"] * constants["CHUNKS"] >= a.channels
    call.launch(
        backward_attention,
        a.batch * a.heads * count,
        constants,
        row,
        value=value,
        locations=locations,
        weights=weights,
        grad_output=grad_output,
        grad_value=sums,
        grad_locations=by_locations,
        grad_weights=by_weights,
        tiles=count,
    )
    if by_value is not None and sums is not None and by_value is not sums:
        call.steps.convert(sums, by_value)


def write_cells(call: Call, given: Sequence[Buffer], wanted: Any) -> None:
    """Write the cell of each sample to the keys, which are the first buffer given."""
    keys, _, locations, _ = given
    count, block = math.prod(keys.shape), 512
    constants = dict(INDEX=call.many, BLOCK=block)
    row = call.tiles("backward_sorted_attention", 2)
    programs = triton.cdiv(count, block)
    call.launch(
        *(list_cells, programs, constants, row), locations=locations, keys=keys, count=count
    )


def write_sorted(call: Call, given: Sequence[Buffer], wanted: Any) -> None:
    """Write the value's gradient, given first the samples in sorted order, and then the places
    where those of each cell begin."""
    a, (order, starts, grad_output, value, locations, weights) = call.a, given
    row = call.tiles("backward_sorted_attention", value.dtype.itemsize)
    block_c = fit(a.channels, row.block_c, least=4)
    count, blocks = triton.cdiv(a.pixels, row.block_p), triton.cdiv(a.channels, block_c)
    call.launch(
        backward_sorted_attention,
        a.batch * a.heads * count * blocks,
        dict(INDEX=call.many, ROWS=row.block_p, BLOCK_C=block_c),
        row,
        locations=locations,
        weights=weights,
        grad_output=grad_output,
        order=order,
        starts=starts,
        out=call.plan.result(value.shape, value.dtype),
        tiles=count,
        blocks=blocks,
    )


# At most this many samples are sorted at once, unless a single batch item has more. The sort takes
# 24 to 32 bytes for each.
SORTED = 1 << 23


def keys_of(a: Attention, device: torch.device) -> tuple[Tensor, int]:
    """Room for the cell of each sample, and the number of cells."""
    number = a.batch * a.heads * sum(math.prod(size + 1 for size in shape) for shape in a.shapes)
    samples = a.batch * a.queries * a.heads * len(a.shapes) * a.points
    dtype = torch.int32 if number < 2**31 - 1 else torch.int64
    return torch.empty(samples, dtype=dtype, device=device), number


def reads(value: Tensor) -> bool:
    """Whether the kernels can read the value as it lies."""
    strides = zip(value.shape, value.stride(), strict=True)
    return value.stride(3) == 1 and all(stride > 0 for size, stride in strides if size > 1)


def write(
    plan: Plan, make: Any, a: Attention, strides: Sequence[int], wanted: tuple[bool, ...]
) -> list[Launch]:
    """Write the plan by one of the functions above. Returns all launches that it may need."""
    call = Call(a, plan, strides)
    make(call, plan.given, wanted)
    call.steps.finish()
    return [*plan.steps, *plan.spares]
