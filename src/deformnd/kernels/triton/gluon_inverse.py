"""Gluon kernel for Hopper: the image gradient by inverse gather, of half numbers.

It computes what `inverse` of kernels.py does, for one group: one warp group brings what others,
with a tile of the image each, multiply.
"""

# Tuples of Triton grow by +.
# ruff: noqa: RUF005, RUF059

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gluon import _bring, _bytes, _reinterpret, _unravel, _volume, barrier

# Triton 3.6's name, and that of later versions.
load_rows = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

POINTS = gl.constexpr(64)  # point channels at once


@gluon.jit
def _lists_of(lists, slots, b, t, last, pair, taps, tiles, groups, offset_units,
              TILES: gl.constexpr):  # fmt: skip
    """(Start, length) of the lists of TILES tiles for tap t of all units' taps."""
    item = b.to(gl.int64) * groups + t // taps // offset_units
    slot = (item * taps + t % taps) * tiles + TILES * pair
    found = ()
    for k in gl.static_range(TILES):
        here = (t < last) & (TILES * pair + k < tiles)
        count = gl.load(lists + slot + k, mask=here, other=0)
        end = gl.load(lists + slots + 1 + slot + k, mask=here, other=0)
        found = found + ((end - count, count.to(gl.int32)),)
    return found


@gluon.jit
def _advance(at, lists, slots, b, last, pair, taps, tiles, groups, offset_units,
             LISTED: gl.constexpr, TILES: gl.constexpr):  # fmt: skip
    """From (tap, its lists, the next tap's lists) to what follows LISTED entries of each list."""
    t, current, following = at
    more = gl.maximum(current[0][1], current[TILES - 1][1]) > LISTED
    step = gl.where(more, 0, 1)
    t += step
    fresh = _lists_of(
        lists, slots, b, t + 1, gl.where(more, 0, last), pair, taps, tiles, groups, offset_units,
        TILES,
    )  # fmt: skip
    rest = ()
    later = ()
    for k in gl.static_range(TILES):
        start = gl.where(more, current[k][0] + LISTED, following[k][0])
        count = gl.where(more, gl.maximum(current[k][1] - LISTED, 0), following[k][1])
        rest = rest + ((start, count),)
        later = later + (
            (
                gl.where(more, following[k][0], fresh[k][0]),
                gl.where(more, following[k][1], fresh[k][1]),
            ),
        )
    return t, rest, later


@gluon.jit
def _items(lists, b, first, last, pair, taps, tiles, groups, offset_units,
           LISTED: gl.constexpr, TILES: gl.constexpr):  # fmt: skip
    """How often _advance reaches an end, one at least for every tap."""
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [4], [0]))
    total = gl.zeros_like(lane)
    for t0 in range(first, last, 32):
        t = t0 + lane
        item = b.to(gl.int64) * groups + t // taps // offset_units
        slot = (item * taps + t % taps) * tiles + TILES * pair
        count = gl.load(lists + slot, mask=t < last, other=0)
        if TILES == 2:
            inside = (t < last) & (TILES * pair + 1 < tiles)
            count = gl.maximum(count, gl.load(lists + slot + 1, mask=inside, other=0))
        items = (count.to(gl.int32) + LISTED - 1) // LISTED
        items = gl.maximum(items, 1)
        total += gl.where(t < last, items, 0)
    return gl.sum(total, 0)


@gluon.jit
def _entries_of(entries, current, layout: gl.constexpr, LISTED: gl.constexpr,
                TILES: gl.constexpr):  # fmt: skip
    """Of each list the first LISTED positions, 0 after its end."""
    e = gl.arange(0, LISTED, layout=layout)
    found = ()
    for k in gl.static_range(TILES):
        found = found + (gl.load(entries + current[k][0] + e, mask=e < current[k][1], other=0),)
    return found


@gluon.jit
def _samples_of(offset, mask, b, t, current, listed, taps, groups, offset_units, mask_groups,
                mask_units, rank: gl.constexpr, positions, layout: gl.constexpr,
                LISTED: gl.constexpr, TILES: gl.constexpr):  # fmt: skip
    """The offsets and the mask's value of entries, as they are stored."""
    e = gl.arange(0, LISTED, layout=layout)
    u = t // taps
    place = (b.to(gl.int64) * groups + u // offset_units) * taps + t % taps
    masks = (b.to(gl.int64) * mask_groups + u // mask_units) * taps + t % taps
    found = ()
    for k in gl.static_range(TILES):
        inside = e < current[k][1]
        values = ()
        for a in gl.static_range(rank):
            source = offset + (place * rank + a) * positions
            values = values + (gl.load(source + listed[k], mask=inside, other=0.0),)
        if mask is not None:
            values = values + (
                gl.load(mask + masks * positions + listed[k], mask=inside, other=0.0),
            )
        found = found + (values,)
    return found


@gluon.jit
def _interpolation(values, p, count, tap, corner, sizes, dtype: gl.constexpr,
                   TILE: gl.constexpr, layout: gl.constexpr, masked: gl.constexpr,
                   LISTED: gl.constexpr):  # fmt: skip
    """Interpolation weights [LISTED, 64]: a lane has an entry and all pixels of the tile."""
    rank: gl.constexpr = len(TILE)
    image_size, point_size, kernel_size, stride, padding, dilation = sizes
    e = gl.arange(0, LISTED, layout=gl.SliceLayout(1, layout))
    pixel = _unravel(gl.arange(0, 64, layout=gl.SliceLayout(0, layout)), TILE)
    point = _unravel(p, point_size)
    shift = _unravel(tap, kernel_size)
    amplitude = gl.where(e < count, 1.0, 0.0)
    if masked:
        amplitude = gl.where(e < count, values[rank].to(gl.float32), 0.0)
    s = amplitude[:, None]
    for a in gl.static_range(rank):
        value = values[a].to(gl.float32)
        floor = gl.floor(value)
        low = point[a] * stride[a] - padding[a] + shift[a] * dilation[a] + floor.to(gl.int32)
        low = (low - corner[a]).to(gl.float32) + (value - floor)
        away = gl.abs(low[:, None] - pixel[a][None, :].to(gl.float32))
        s = s * gl.maximum(1.0 - away, 0.0)
    return s.to(dtype)


@gluon.jit
def _inverse_bring(points, weight, offset, mask, lists, slots, entries, xs, ss, ws, x_bars,
                   s_bars, w_bars, b, pair, c0, first, last, corners, taps, tiles, groups,
                   offset_units, mask_groups, mask_units, outputs, sizes, TILE: gl.constexpr,
                   BLOCK_C: gl.constexpr, LISTED: gl.constexpr, XS: gl.constexpr,
                   SS: gl.constexpr, WS: gl.constexpr, TILES: gl.constexpr):  # fmt: skip
    """Lists, interpolation weights, rows of points, weights: to shared memory."""
    dtype: gl.constexpr = points.dtype.element_ty
    rank: gl.constexpr = len(TILE)
    by_entry: gl.constexpr = gl.BlockedLayout(
        [1, LISTED // 2], [32, 1], [LISTED // 32, 128 // LISTED], [1, 0]
    )
    entry: gl.constexpr = gl.SliceLayout(1, by_entry)
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    size: gl.constexpr = _bytes(POINTS, BLOCK_C)
    positions = _volume(sizes[1])
    blocks = outputs // POINTS
    rows = gl.arange(0, LISTED, layout=gl.SliceLayout(1, copies))
    o = gl.arange(0, POINTS, layout=gl.SliceLayout(0, copies))
    points += b.to(gl.int64) * positions * outputs
    at = (
        first,
        _lists_of(lists, slots, b, first, last, pair, taps, tiles, groups, offset_units, TILES),
        _lists_of(lists, slots, b, first + 1, last, pair, taps, tiles, groups, offset_units, TILES),
    )
    listed = _entries_of(entries, at[1], entry, LISTED, TILES)
    values = _samples_of(offset, mask, b, first, at[1], listed, taps, groups, offset_units,
                         mask_groups, mask_units, rank, positions, entry, LISTED,
                         TILES)  # fmt: skip
    at1 = _advance(at, lists, slots, b, last, pair, taps, tiles, groups, offset_units,
                   LISTED, TILES)  # fmt: skip
    listed1 = _entries_of(entries, at1[1], entry, LISTED, TILES)
    i = 0 * outputs
    step = 0 * outputs
    while at[0] < last:
        t, current, following = at
        at2 = _advance(at1, lists, slots, b, last, pair, taps, tiles, groups, offset_units,
                       LISTED, TILES)  # fmt: skip
        listed2 = _entries_of(entries, at2[1], entry, LISTED, TILES)
        values1 = _samples_of(offset, mask, b, at1[0], at1[1], listed1, taps, groups,
                              offset_units, mask_groups, mask_units, rank, positions,
                              entry, LISTED, TILES)  # fmt: skip
        sources = _entries_of(entries, current, gl.SliceLayout(1, copies), LISTED, TILES)
        for k in gl.static_range(TILES):
            s = _interpolation(values[k], listed[k], current[k][1], t % taps, corners[k], sizes,
                               dtype, TILE, by_entry, mask is not None, LISTED)  # fmt: skip
            mbarrier.wait(s_bars.index(SS + i % SS), ((i // SS) & 1) ^ 1)
            ss.index(k * SS + i % SS).store(s)
        fence_async_shared()
        barrier()
        mbarrier.arrive(s_bars.index(i % SS), count=1)
        i += 1
        for block in range(blocks):
            stage = step % WS
            mbarrier.wait(w_bars.index(WS + stage), ((step // WS) & 1) ^ 1)
            _bring(weight, t * outputs + block * POINTS, c0, 0, ws, w_bars, stage, True, size,
                   False)  # fmt: skip
            stage = step % XS
            mbarrier.wait(x_bars.index(XS + stage), ((step // XS) & 1) ^ 1)
            for k in gl.static_range(TILES):
                place = sources[k] * outputs + block * POINTS
                load_rows(
                    xs[k].index(stage), points + (place[:, None] + o[None, :]),
                    mask=(rows < current[k][1])[:, None] & (o >= 0)[None, :],
                )  # fmt: skip
            async_copy.mbarrier_arrive(x_bars.index(stage), increment_count=False)
            step += 1
        at = at1
        at1 = at2
        listed = listed1
        listed1 = listed2
        values = values1


@gluon.jit
def _inverse_multiply(k: gl.constexpr, bias, lists, out, xs, ss, ws, x_bars, s_bars,
                      w_bars, b, batch, pair, c0, split, first, last, corner, taps, tiles, groups,
                      offset_units, channels, outputs, sizes, TILE: gl.constexpr,
                      BLOCK_C: gl.constexpr, LISTED: gl.constexpr, XS: gl.constexpr,
                      SS: gl.constexpr, WS: gl.constexpr, LAST: gl.constexpr, SPLIT: gl.constexpr,
                      EVEN: gl.constexpr, RUN: gl.constexpr, TILES: gl.constexpr):  # fmt: skip
    """Products of one tile, and its result."""
    dtype: gl.constexpr = xs.dtype
    small: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, POINTS, 16]
    )
    large: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_C, 16]
    )
    operand: gl.constexpr = gl.DotOperandLayout(0, large, 2)
    acc = gl.zeros([64, BLOCK_C], gl.float32, layout=large)
    z = gl.zeros([64, POINTS], gl.float32, layout=small)
    blocks = outputs // POINTS
    steps = blocks * _items(lists, b, first, last, pair, taps, tiles, groups, offset_units,
                            LISTED, TILES)  # fmt: skip
    for step in range(steps):
        slot = step // blocks % SS
        mbarrier.wait(s_bars.index(slot), (step // blocks // SS) & 1, pred=step % blocks == 0)
        stage = step % XS
        mbarrier.wait(x_bars.index(stage), (step // XS) & 1)
        fence_async_shared()
        z = warpgroup_mma(
            ss.index(k * SS + slot).permute((1, 0)), xs.index(stage), z, use_acc=False,
            is_async=True,
        )  # fmt: skip
        z = warpgroup_mma_wait(0, deps=[z])
        barrier()
        mbarrier.arrive(x_bars.index(XS + stage), count=1)
        mbarrier.arrive(s_bars.index(SS + slot), count=1, pred=(step + 1) % blocks == 0)
        factor = gl.convert_layout(z.to(dtype), operand)
        stage = step % WS
        mbarrier.wait(w_bars.index(stage), (step // WS) & 1)
        acc = warpgroup_mma(factor, ws.index(stage), acc, is_async=True)
        acc, factor = warpgroup_mma_wait(0, deps=[acc, factor])
        barrier()
        mbarrier.arrive(w_bars.index(WS + stage), count=1)
    image_size = sizes[0]
    if SPLIT:
        target: gl.constexpr = large
    elif LAST:
        target: gl.constexpr = gl.BlockedLayout(
            [1, 8], [256 // BLOCK_C, BLOCK_C // 8], [4, 1], [1, 0]
        )
    else:
        target: gl.constexpr = gl.BlockedLayout([RUN, 1], [8 // RUN, 4 * RUN], [1, 4], [0, 1])
    if bias is not None:
        c = c0 + gl.arange(0, BLOCK_C, layout=gl.SliceLayout(0, large))
        acc += gl.where(split == 0, gl.load(bias + c).to(gl.float32), 0.0)[None, :]
    if not SPLIT:
        barrier()  # all have read what the points' place held
        staged = _reinterpret(
            xs, dtype, [64, BLOCK_C], gl.NVMMASharedLayout.get_default_for([64, BLOCK_C], dtype)
        )
        staged.store(acc.to(dtype))
        barrier()
        acc = staged.load(target)
    local = _unravel(gl.arange(0, 64, layout=gl.SliceLayout(1, target)), TILE)
    c = c0 + gl.arange(0, BLOCK_C, layout=gl.SliceLayout(0, target))
    here = local[0] >= 0
    row = gl.zeros_like(local[0])
    for a in gl.static_range(len(TILE)):
        if not EVEN[a]:
            here = here & (corner[a] + local[a] < image_size[a])
        row = row * image_size[a] + local[a]
    base = b.to(gl.int64) * 0
    for a in gl.static_range(len(TILE)):
        base = base * image_size[a] + corner[a]
    pixels = _volume(image_size).to(gl.int64)
    here = here & (TILES * pair + k < tiles)
    place = (split.to(gl.int64) * batch + b) * pixels * channels
    if LAST:
        place += base * channels + row * channels
        place = place[:, None] + c[None, :]
    else:
        place += base + row
        place = place[:, None] + (c.to(gl.int64) * pixels)[None, :]
        place = gl.max_contiguous(gl.multiple_of(place, (RUN, 1)), (RUN, 1))
    keep = here[:, None] & (c >= 0)[None, :]
    gl.store(out + place, acc, mask=gl.max_constancy(keep, (RUN, 1)))


@gluon.jit
def inverse(points, weight, offset, mask, bias, lists, entries, out,
            sizes, slots, batch, channels, outputs, taps, tiles, pairs, splits, units, offset_units,
            mask_units,
            TILE: gl.constexpr, EVEN: gl.constexpr, LAST: gl.constexpr, SPLIT: gl.constexpr,
            RUN: gl.constexpr, BLOCK_C: gl.constexpr, LISTED: gl.constexpr, XS: gl.constexpr,
            SS: gl.constexpr, WS: gl.constexpr, TILES: gl.constexpr, REGISTERS: gl.constexpr,
            num_warps: gl.constexpr):  # fmt: skip
    """dF/dimage from the lists of `bucket`, points in rows [B, P, O]; TILES tiles of 64 pixels to a
    program.

    `weight` has a row of channels for every (unit, kernel point, point channel), zero outside the
    unit. SPLIT: partial sums [splits, ...] in float32 over shares of the kernel points. Grid:
    (B x pairs of tiles, or single ones, blocks of C, splits).
    """
    dtype: gl.constexpr = points.dtype.element_ty
    b = gl.program_id(0) // pairs
    pair = gl.program_id(0) % pairs
    c0 = gl.program_id(1) * BLOCK_C
    split = gl.program_id(2)
    total = units * taps
    first = split * total // splits
    last = (split + 1) * total // splits
    groups = units // offset_units
    mask_groups = units // mask_units
    rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([LISTED, POINTS], dtype)
    xs = ()
    for _ in gl.static_range(TILES):
        xs = xs + (gl.allocate_shared_memory(dtype, [XS, LISTED, POINTS], rows),)
    ss = gl.allocate_shared_memory(dtype, [TILES * SS, LISTED, 64], rows)
    ws = gl.allocate_shared_memory(dtype, [WS, POINTS, BLOCK_C], weight.layout)
    x_bars = gl.allocate_shared_memory(gl.int64, [2 * XS, 1], mbarrier.MBarrierLayout())
    s_bars = gl.allocate_shared_memory(gl.int64, [2 * SS, 1], mbarrier.MBarrierLayout())
    w_bars = gl.allocate_shared_memory(gl.int64, [2 * WS, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(XS):
        mbarrier.init(x_bars.index(s), count=128)
        mbarrier.init(x_bars.index(XS + s), count=TILES)
    for s in gl.static_range(SS):
        mbarrier.init(s_bars.index(s), count=1)
        mbarrier.init(s_bars.index(SS + s), count=TILES)
    for s in gl.static_range(WS):
        mbarrier.init(w_bars.index(s), count=1)
        mbarrier.init(w_bars.index(WS + s), count=TILES)
    fence_async_shared()
    barrier()
    corners = ()
    for k in gl.static_range(TILES):
        across = ()
        for a in gl.static_range(len(TILE)):
            across = across + ((sizes[0][a] + TILE[a] - 1) // TILE[a],)
        cell = _unravel(TILES * pair + k, across)
        corner = ()
        for a in gl.static_range(len(TILE)):
            corner = corner + (cell[a] * TILE[a],)
        corners = corners + (corner,)
    # Written out, since Triton has no name for arguments among which are constants that are tuples.
    if TILES == 1:
        gl.warp_specialize(
            [
                (
                    _inverse_bring,
                    (points, weight, offset, mask, lists, slots, entries, xs, ss, ws, x_bars,
                     s_bars, w_bars, b, pair, c0, first, last, corners, taps, tiles, groups,
                     offset_units, mask_groups, mask_units, outputs, sizes, TILE, BLOCK_C, LISTED,
                     XS, SS, WS, TILES),
                ),
                (
                    _inverse_multiply,
                    (0, bias, lists, out, xs[0], ss, ws, x_bars, s_bars, w_bars, b, batch, pair,
                     c0, split, first, last, corners[0], taps, tiles, groups, offset_units,
                     channels, outputs, sizes, TILE, BLOCK_C, LISTED, XS, SS, WS, LAST, SPLIT,
                     EVEN, RUN, TILES),
                ),
            ],
            [4],
            [REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    _inverse_bring,
                    (points, weight, offset, mask, lists, slots, entries, xs, ss, ws, x_bars,
                     s_bars, w_bars, b, pair, c0, first, last, corners, taps, tiles, groups,
                     offset_units, mask_groups, mask_units, outputs, sizes, TILE, BLOCK_C, LISTED,
                     XS, SS, WS, TILES),
                ),
                (
                    _inverse_multiply,
                    (0, bias, lists, out, xs[0], ss, ws, x_bars, s_bars, w_bars, b, batch, pair,
                     c0, split, first, last, corners[0], taps, tiles, groups, offset_units,
                     channels, outputs, sizes, TILE, BLOCK_C, LISTED, XS, SS, WS, LAST, SPLIT,
                     EVEN, RUN, TILES),
                ),
                (
                    _inverse_multiply,
                    (1, bias, lists, out, xs[1], ss, ws, x_bars, s_bars, w_bars, b, batch, pair,
                     c0, split, first, last, corners[1], taps, tiles, groups, offset_units,
                     channels, outputs, sizes, TILE, BLOCK_C, LISTED, XS, SS, WS, LAST, SPLIT,
                     EVEN, RUN, TILES),
                ),
            ],
            [4, 4],
            [REGISTERS, REGISTERS],
        )  # fmt: skip
