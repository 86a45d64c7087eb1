"""The image gradient without atomic additions, which also is the transposed forward.

Samples are listed by the tiles of 64 pixels that they touch: a sample is in the list of every tile
in which one of its corners lies. A program then takes a tile and a sample group, and adds what the
listed samples bring, by two products for each tap:

    out [pixels, channels] += (blend [pixels, samples] @ points [samples, outputs]) @ weight [tap]

where blend is the share that a pixel has in a sample, times the mask. The gradient is bitwise
repeatable if the lists are in order, so they are sorted where algorithms must be deterministic.
Then im2col.py may do the second product first, for all samples once.

Note [lists]
There is a list for every (batch item, offset group, tap, tile), numbered in that order. It holds
the positions of its samples. `entries` holds the samples of all lists, which lie there in any
order. `lists` holds the length of every list, then a cursor, which is how much of `entries` is
reserved, and then the end of every list in `entries`. A list begins its length before its end.

    lists    | lengths [number] | cursor | ends [number] |
    entries  | a list's samples | another's | ...

With TOGETHER there is one list for every (batch item, offset group, tile) instead, with the samples
of all taps. For each it holds position * taps + tap.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from . import columns, sampling
from .depthwise import multiplier_of
from .layout import fit
from .tiles import IMAGE_TILES, LISTED, LONG, SHORT, Tiles
from .variants import portable

if TYPE_CHECKING:
    from .layout import Call, Operand
    from .runtime import Buffer
    from .variants import Variant


@triton.jit
def samples_of(offset, item, tap, p, g):
    """The cells of positions p for an offset group of a batch item, and whether they are valid."""
    groups = g.sample_groups // g.per_offset
    s = item % groups * g.per_offset
    inside = p < g.positions
    offsets, masks = sampling.read(offset, None, item // groups, s, tap, p, inside, g)
    starts = sampling.starts_of(sampling.unravel(p, g.point), sampling.unravel(tap, g.kernel), g)
    return sampling.cell_of(offsets, starts, inside, g)


@triton.jit
def tile_of(axes, valid, q: tl.constexpr, g, TILE: tl.constexpr):
    """The tile of corner q, and whether it is new: no corner with fewer of q's bits set lies in it.
    So every tile that a sample touches is new once."""
    new = valid
    at = ()
    for a in tl.static_range(len(TILE)):
        first = axes[a][0] // TILE[a]
        if (q >> (len(TILE) - 1 - a)) & 1:
            last = (axes[a][0] + axes[a][1]) // TILE[a]
            new = new & (first != last)
            at = at + (last,)
        else:
            at = at + (first,)
    return sampling.ravel(at, sampling.tiles_across(g.image, TILE)), new


@triton.jit
def add_by_warps(at, tile):
    """Add 1 at the place of every lane whose tile is not negative, and return what was there before
    each. Lanes of a warp with the same tile have the same place. The first of them adds for all.

    All is one block of instructions, so that no lane gets another element meanwhile. No two lanes
    may have the same element, so there are at least as many elements as lanes.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 same, before, count, first, found;
        .reg .pred adds;
        match.any.sync.b32 same, $2, 0xffffffff;
        mov.u32 before, %lanemask_lt;
        and.b32 before, before, same;
        popc.b32 before, before;
        popc.b32 count, same;
        brev.b32 first, same;
        clz.b32 first, first;
        setp.eq.u32 adds, before, 0;
        setp.ge.and.s32 adds, $2, 0, adds;
        mov.u32 found, 0;
        @adds atom.relaxed.gpu.global.add.u32 found, [$1], count;
        shfl.sync.idx.b32 found, found, first, 31, 0xffffffff;
        add.u32 $0, found, before;
        }
        """,
        "=r,l,r",
        [at.to(tl.int64), tile],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def list_samples(offset, lists, entries, g, number, blocks, FILL: tl.constexpr,
                 TOGETHER: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
                 BY_WARPS: tl.constexpr, CHAINED: tl.constexpr):  # fmt: skip
    """Count the samples of every list. With FILL write them instead, from the start that
    start_lists has stored as the list's end, and move that end on. BY_WARPS makes fewer additions,
    which take most of the time.

    Grid: (B x offset groups x taps x blocks of positions).
    """
    sampling.wait_for_previous(CHAINED)
    owner = tl.program_id(0) // blocks
    p = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    axes, valid = samples_of(offset, owner // g.taps, owner % g.taps, p, g)
    if TOGETHER:
        p = p * g.taps + owner % g.taps
        owner = owner // g.taps
    first = owner.to(tl.int64) * sampling.product(sampling.tiles_across(g.image, TILE))
    places = ()
    for q in tl.static_range(2 ** len(TILE)):
        tile, new = tile_of(axes, valid, q, g, TILE)
        at = lists + (first + tile)
        if FILL:
            at += number + 1
        if BY_WARPS:
            place = add_by_warps(at, tl.where(new, tile, -1))
        else:
            place = tl.atomic_add(at, 1, mask=new, sem="relaxed")
        places = places + ((place, new),)
    if FILL:  # the stores follow all requests for places, so that no request waits for a store
        for q in tl.static_range(2 ** len(TILE)):
            tl.store(entries + places[q][0], p, mask=places[q][1])


@triton.jit
def start_lists(lists, number, BLOCK: tl.constexpr, CHAINED: tl.constexpr):
    """Reserve room for every list, and store its start as its end, since it has no samples yet."""
    sampling.wait_for_previous(CHAINED)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    length = tl.load(lists + i, mask=i < number, other=0)
    ends = tl.cumsum(length, 0)
    start = tl.atomic_add(lists + number, tl.sum(length, 0), sem="relaxed")
    tl.store(lists + number + 1 + i, start + ends - length, mask=i < number)


@triton.jit
def sort_list(entries, length, SIZE: tl.constexpr):
    e = tl.arange(0, SIZE)
    p = tl.sort(tl.load(entries + e, mask=e < length, other=0x7FFFFFFF))
    tl.store(entries + e, p, mask=e < length)


@triton.jit
def sort_lists(offset, lists, entries, g, number, TILE: tl.constexpr, SHORT: tl.constexpr,
               LONG: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr):  # fmt: skip
    """Sort a list, or write it anew, in order, if it has more than LONG samples.

    Grid: (number of lists)."""
    sampling.wait_for_previous(CHAINED)
    at = tl.program_id(0).to(tl.int64)
    length = tl.load(lists + at)
    start = tl.load(lists + number + 1 + at) - length
    if length <= SHORT:
        sort_list(entries + start, length, SHORT)
    elif length <= LONG:
        sort_list(entries + start, length, LONG)
    else:
        across = sampling.tiles_across(g.image, TILE)
        owner = (at // sampling.product(across)).to(tl.int32)
        tile = sampling.unravel((at % sampling.product(across)).to(tl.int32), across)
        for p0 in range(0, g.positions, BLOCK):
            p = p0 + tl.arange(0, BLOCK)
            axes, touches = samples_of(offset, owner // g.taps, owner % g.taps, p, g)
            for a in tl.static_range(len(TILE)):
                low = axes[a][0] // TILE[a]
                high = (axes[a][0] + axes[a][1]) // TILE[a]
                touches = touches & ((low == tile[a]) | (high == tile[a]))
            one = touches.to(tl.int32)
            tl.store(entries + (start + tl.cumsum(one, 0) - 1), p, mask=touches)
            start += tl.sum(one, 0)


@triton.jit
def backward_sorted(points, weight, offset, mask, bias, lists, entries, out, parts, g, number,
                    first_tap, taps, splits, LAST: tl.constexpr, GROUPED: tl.constexpr,
                    PRECISION: tl.constexpr, INDEX: tl.constexpr,
                    MULTIPLIER: tl.constexpr, LAID: tl.constexpr, TILE: tl.constexpr,
                    BLOCK_E: tl.constexpr, BLOCK_O: tl.constexpr,
                    BLOCK_C: tl.constexpr, CHAINED: tl.constexpr):  # fmt: skip
    """dF/dimage of a tile, in [B, S, C] with LAST, else in [B, C, S]. MULTIPLIER is how many
    channels of the points a channel of the image has in a depthwise call (depthwise.py), and 0 in
    others. With LAID it is the sum over `taps` taps from `first_tap` on, whose samples' gradients
    have been computed, and are given as columns instead of the points (im2col.py).

    With several splits a program takes a share of the taps, and its sum goes to `parts`
    [splits, B, ...]. With LAID and fewer than all taps it goes there, too, and is added to the sum
    of the taps before. Grid: (B x sample groups x tiles, blocks of a group's channels, splits).
    """
    sampling.wait_for_previous(CHAINED)
    rank: tl.constexpr = len(TILE)
    dtype: tl.constexpr = points.dtype.element_ty
    across = sampling.tiles_across(g.image, TILE)
    tiles = sampling.product(across)
    tile = tl.program_id(0) % tiles
    s = (tl.program_id(0) // tiles) % g.sample_groups
    b = tl.program_id(0) // tiles // g.sample_groups
    split = tl.program_id(2)
    cell = sampling.unravel(tile, across)
    local = sampling.unravel(tl.arange(0, 64), TILE)
    pixel = ()
    here = tl.arange(0, 64) >= 0
    for a in tl.static_range(rank):
        pixel = pixel + (cell[a] * TILE[a] + local[a],)
        here = here & (pixel[a] < g.image[a])
    # These are the channels of a block, and the points' channels in the same weight groups.
    c0 = tl.program_id(1) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    c_in = c < g.group_channels
    own = (s * g.group_channels + c) * MULTIPLIER
    o_first = 0
    o_last = g.outputs
    o_read = g.padded_outputs  # rows end in zeros, so that loads end at a multiple of eight
    if GROUPED:
        last = s * g.group_channels + tl.minimum(c0 + BLOCK_C, g.group_channels)
        o_first, o_last = columns.met(s * g.group_channels + c0, last, g.group_in, g.group_out)
        o_read = o_last
    item = b.to(tl.int64)
    if LAID:
        points += item * g.positions * (taps * g.columns) + s * g.padded
    else:
        points += item * g.positions * g.padded_outputs
    owner = (item * (g.sample_groups // g.per_offset) + s // g.per_offset) * g.taps
    acc = tl.zeros((64, BLOCK_C), tl.float32)
    begin = split * taps // splits
    end = (split + 1) * taps // splits
    if LAID:
        begin += first_tap
        end += first_tap
    for tap in range(begin, end):
        at = lists + ((owner + tap) * tiles + tile)
        stop = tl.load(at + number + 1)
        for e0 in range(stop - tl.load(at), stop, BLOCK_E):
            e = e0 + tl.arange(0, BLOCK_E)
            listed = e < stop
            p = tl.load(entries + e, mask=listed, other=0)
            axes, amplitude, valid = sampling.locate(offset, mask, b, s, tap, p, listed, g)
            blend = None
            for a in tl.static_range(rank):
                low, step, weights, inside = axes[a]
                of_low, of_high = weights
                of_low += tl.where(step == 0, of_high, 0.0)  # without a step both are one pixel
                if a == 0:
                    of_low *= amplitude
                    of_high *= amplitude
                high = (low + step)[None, :]
                share = tl.where(pixel[a][:, None] == high, of_high[None, :], 0.0)
                share = tl.where(pixel[a][:, None] == low[None, :], of_low[None, :], share)
                if a == 0:
                    blend = share
                else:
                    blend *= share
            blend = sampling.parts_of(blend, dtype, PRECISION)
            if LAID:
                place = (p.to(INDEX) * (taps * g.columns))[:, None] + c[None, :]
                x = tl.load(
                    points + (tap - first_tap) * g.columns + place,
                    mask=listed[:, None] & c_in[None, :],
                    other=0.0,
                )
                x = sampling.parts_of(x, dtype, PRECISION)
                acc = columns.dot_once(blend, x, acc, PRECISION)
            elif MULTIPLIER > 0:
                for i in tl.static_range(MULTIPLIER):
                    x = tl.load(
                        points + (p.to(INDEX) * g.padded_outputs)[:, None] + (own + i)[None, :],
                        mask=listed[:, None] & c_in[None, :],
                        other=0.0,
                    )
                    x = sampling.parts_of(x, dtype, PRECISION)
                    z = columns.dot(blend, x, tl.zeros((64, BLOCK_C), tl.float32), PRECISION)
                    if weight is not None:
                        of_tap = weight + (tap * g.padded_outputs + own + i)
                        z *= tl.load(of_tap, mask=c_in, other=0.0).to(tl.float32)[None, :]
                    acc += z
            else:
                for o0 in range(o_first, o_last, BLOCK_O):
                    o = o0 + tl.arange(0, BLOCK_O)
                    x = tl.load(
                        points + (p.to(INDEX) * g.padded_outputs)[:, None] + o[None, :],
                        mask=listed[:, None] & (o < o_read)[None, :],
                        other=0.0,
                    )
                    x = sampling.parts_of(x, dtype, PRECISION)
                    z = columns.dot(blend, x, tl.zeros((64, BLOCK_O), tl.float32), PRECISION)
                    w = columns.read_weight(
                        weight, o, o < o_last, s, c0, tap, g.taps, g,
                        GROUPED, PRECISION, 1, 1, BLOCK_C,
                    )  # fmt: skip
                    z = sampling.parts_of(z, dtype, PRECISION)
                    acc = columns.dot_once(z, w, acc, PRECISION)
    place = sampling.ravel(pixel, g.image).to(INDEX)
    c = s * g.group_channels + c
    if LAST:
        place = (place * g.channels)[:, None] + c[None, :]
    else:
        place = place[:, None] + (c.to(INDEX) * g.pixels)[None, :]
    item = (split.to(tl.int64) * g.batch + b) * g.pixels * g.channels
    keep = here[:, None] & c_in[None, :]
    in_parts = splits > 1
    if LAID:
        in_parts = in_parts | (taps < g.taps)
    if in_parts:
        if LAID:
            acc += tl.load(parts + item + place, mask=keep & (first_tap > 0), other=0.0)
        tl.store(parts + item + place, acc, mask=keep)
    else:
        if bias is not None:
            acc += tl.load(bias + c, mask=c_in, other=0.0).to(tl.float32)[None, :]
        tl.store(out + item + place, acc.to(out.dtype.element_ty), mask=keep)


WARPS = 4  # of the programs that make lists


def tiles_of(call: Call) -> tuple[tuple[int, ...], int]:
    """The shape of the image's tiles, and how many there are."""
    tile = IMAGE_TILES[len(call.sizes.image)]
    sizes = zip(call.sizes.image, tile, strict=True)
    return tile, math.prod(triton.cdiv(size, part) for size, part in sizes)


def make_lists(call: Call, variant: Variant) -> tuple[Buffer, Buffer]:
    """Make the lists that the variant wants, and their entries, which are in order if algorithms
    must be deterministic (Note [lists])."""
    n, together = call.sizes, variant.together
    tile, tiles = tiles_of(call)
    owners = n.batch * (n.sample_groups // n.per_offset) * n.taps
    number = (owners // n.taps if together else owners) * tiles
    blocks = triton.cdiv(n.positions, LISTED)
    most = owners * n.positions * 2 ** len(tile)
    index = torch.int32 if most < 2**31 else torch.int64
    lists = call.plan.scratch(2 * number + 1, dtype=index)
    entries = call.plan.scratch(most, dtype=torch.int32)
    by_warps = call.on_nvidia and index == torch.int32 and LISTED >= 32 * WARPS
    call.zero(lists)

    def add(kernel: Any, programs: int, warps: int = WARPS, **constants: Any) -> None:
        constants = dict(TILE=tile, BLOCK=LISTED, BY_WARPS=by_warps) | constants
        arguments = dict(lists=lists, entries=entries, number=number, blocks=blocks)
        # These launches come after the jobs that the next one needs, so that those are done in the
        # same launch that writes the zeros.
        call.steps.then(call.make(kernel, (programs,), constants, warps=warps, **arguments))

    add(list_samples, owners * blocks, FILL=False, TOGETHER=together)
    add(start_lists, triton.cdiv(number, 1024), BLOCK=1024)
    add(list_samples, owners * blocks, FILL=True, TOGETHER=together)
    if torch.are_deterministic_algorithms_enabled():
        add(sort_lists, number, 1, SHORT=SHORT, LONG=LONG, BLOCK=4 * LISTED)
    return lists, entries


def arguments_of(call: Call, points: Operand, lists: tuple[Buffer, Buffer]) -> dict[str, Any]:
    """The arguments that this kernel and Hopper's share."""
    return dict(points=call.rows(points), **lists_of(lists))


def lists_of(lists: tuple[Buffer, Buffer]) -> dict[str, Any]:
    """The arguments that tell a kernel of the lists."""
    return dict(lists=lists[0], entries=lists[1], number=lists[0].shape[0] // 2)


def write(
    call: Call,
    points: Operand,
    bias: Buffer | None,
    out: Operand,
    lists: tuple[Buffer, Buffer],
    tiles: Tiles | None = None,
) -> None:
    n, multiplier = call.sizes, multiplier_of(call)
    if tiles is None:
        name = "backward_sorted depthwise" if multiplier else "backward_sorted"
        tiles = call.tiles(name, n.group_channels)
    constants = dict(MULTIPLIER=multiplier, LAID=False, BLOCK_O=fit(n.group_out, tiles.block_o))
    call.launch_split(
        *launch_of(call, tiles, fit(n.group_channels, tiles.block_c), n.taps, **constants),
        *(out, bias),
        **arguments_of(call, points, lists),
        **dict(weight=call.weight(), first_tap=0, taps=n.taps),
        **dict(warps=tiles.warps, stages=tiles.stages),
    )


def launch_of(
    call: Call, row: Tiles, block_c: int, taps: int, **constants: Any
) -> tuple[Any, tuple[int, int, int], dict[str, Any]]:
    """The kernel, its grid, whose last axis is splits, and its constants but LAST, for a launch for
    so many taps."""
    n, (tile, count) = call.sizes, tiles_of(call)
    tiles, blocks = n.batch * n.sample_groups * count, triton.cdiv(n.group_channels, block_c)
    splits = max(1, min(taps, 2 * call.multiprocessors // (tiles * blocks)))
    constants |= dict(TILE=tile, BLOCK_E=row.block_p, BLOCK_C=block_c)
    return backward_sorted, (tiles, blocks, splits), constants


VARIANTS = portable("backward_sorted", write)
