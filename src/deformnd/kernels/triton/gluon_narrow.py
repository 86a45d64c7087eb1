"""Gluon kernels for Hopper where many offset or mask groups make narrow units (kernels.py, units).

A lane takes chunks of RUN consecutive channels of one unit, and finds cell and corner weights once
for each of its (position, chunk). The chunks lie in registers as wgmma has them, as in gluon.py.
"""

# Tuples of Triton grow by +.
# ruff: noqa: RUF005, RUF059

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gluon import _bring, _bytes, _parts, _unravel, _volume, barrier

# A float32 below 2^22 plus this, rounded down, has its floor in the low bits.
_MAGIC = gl.constexpr(12582912.0)
_MAGIC_BITS = gl.constexpr(0x4B400000)


@gluon.jit
def _floor(x):
    """Floor as an integer, and the fraction.

    Of what is not within 2^22, NaN and infinity too, the integer is at least 2^21 away from 0, and
    the fraction is some number in [0, 1].
    """
    shifted = gl.inline_asm_elementwise(
        "add.rm.f32 $0, $1, 0f4B400000;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )
    # Saturation turns NaN to 0.
    fraction = gl.inline_asm_elementwise(
        "sub.sat.f32 $0, $1, $2;", "=f,f,f", [x, shifted - _MAGIC], dtype=gl.float32,
        is_pure=True, pack=1,
    )  # fmt: skip
    return shifted.to(gl.int32, bitcast=True) - _MAGIC_BITS, fraction


@gluon.jit
def _read(offset, mask, tap, c, p, inside, sizes, OFFSET_CHANNELS: gl.constexpr,
          MASK_CHANNELS: gl.constexpr, VECTOR_P: gl.constexpr):  # fmt: skip
    """Offsets along every axis and the mask, of points p and the channels that start at c."""
    rank: gl.constexpr = len(sizes[0])
    positions = _volume(sizes[1])
    taps = _volume(sizes[2])
    row = (c // OFFSET_CHANNELS * taps + tap) * rank
    values = ()
    for a in gl.static_range(rank):
        start = gl.multiple_of((row + a) * positions, [VECTOR_P])
        values = values + (gl.load(offset + (start[None, :] + p[:, None]), mask=inside, other=0.0),)
    if mask is not None:
        start = gl.multiple_of((c // MASK_CHANNELS * taps + tap) * positions, [VECTOR_P])
        values = values + (gl.load(mask + (start[None, :] + p[:, None]), mask=inside, other=0.0),)
    return values


@gluon.jit
def _locate(values, base, shift, inside, sizes):
    """The low corner's pixel, per axis the step to the high one and (weights, whether there are
    such corners), the mask's value, and whether the sample is valid (kernels.py, corners)."""
    image_size, point_size, kernel_size, stride, padding, dilation = sizes
    rank: gl.constexpr = len(image_size)
    valid = inside
    axes = ()
    for a in gl.static_range(rank):
        low, fraction = _floor(values[a].to(gl.float32))
        low += base[a][:, None] + shift[a] * dilation[a]
        valid = valid & ((low + 1).to(gl.uint32) <= image_size[a].to(gl.uint32))
        has_low = low >= 0
        has_high = low + 1 < image_size[a]
        weights = (gl.where(has_low, 1.0 - fraction, 0.0), gl.where(has_high, fraction, 0.0))
        axes = axes + ((gl.maximum(low, 0), weights, has_low, has_high),)
    row = axes[0][0]
    for a in gl.static_range(1, rank):
        row = row * image_size[a] + axes[a][0]
    row = gl.where(valid, row, 0)
    steps = ()
    pitch = 1
    for a in gl.static_range(rank - 1, -1, -1):
        steps = (gl.where(axes[a][2] & axes[a][3], pitch, 0),) + steps
        pitch = pitch * image_size[a]
    amplitude = gl.where(valid, 1.0, 0.0)
    if len(values) > rank:
        amplitude = values[rank].to(gl.float32)
        amplitude = gl.where(valid, amplitude, amplitude * 0.0)  # kernels.py, _amplitude
    return row, steps, axes, amplitude, valid


@gluon.jit
def _weights(axes, amplitude):
    """Of every corner; the bits of its number choose low or high, the last axis is bit 0."""
    weights = (amplitude,)
    for a in gl.static_range(len(axes)):
        finer = ()
        for w in gl.static_range(len(weights)):
            finer = finer + (weights[w] * axes[a][1][0], weights[w] * axes[a][1][1])
        weights = finer
    return weights


@gluon.jit
def _corner(row, steps, q: gl.constexpr):
    for a in gl.static_range(len(steps)):
        if (q >> (len(steps) - 1 - a)) & 1:
            row = row + steps[a]
    return row


@gluon.jit
def _fetch(image, row, steps, lane, UNIT: gl.constexpr):
    """Every corner's channels; lane is a channel in its unit."""
    values = ()
    for q in gl.static_range(2 ** len(steps)):
        place = (_corner(row, steps, q) * UNIT)[:, :, None] + lane
        values = values + (gl.load(image + place),)
    return values


@gluon.jit
def _blend(values, weights):
    columns = None
    for q in gl.static_range(len(values)):
        term = values[q].to(gl.float32) * weights[q][:, :, None]
        if q == 0:
            columns = term
        else:
            columns += term
    return columns


@gluon.jit
def _tile(lane, tile, tiles_y, tiles_x, size, TILE_X: gl.constexpr, BLOCK_P: gl.constexpr,
          VECTOR_P: gl.constexpr):  # fmt: skip
    """Coordinates of the points of a tile of BLOCK_P // TILE_X x TILE_X along the last two axes,
    which points they are, and whether there are such."""
    rank: gl.constexpr = len(size)
    x = tile % tiles_x * TILE_X + lane % TILE_X
    inside = x < size[rank - 1]
    point = (x,)
    p = x
    if rank > 1:
        tile = tile // tiles_x
        y = tile % tiles_y * (BLOCK_P // TILE_X) + lane // TILE_X
        rest = tile // tiles_y
        row = rest * size[rank - 2] + y
        point = (y, x)
        for a in gl.static_range(rank - 3, -1, -1):
            point = (rest % size[a] + 0 * x,) + point
            rest = rest // size[a]
        p = row * size[rank - 1] + x
        inside = inside & (y < size[rank - 2])
    # VECTOR_P neighbours are loaded at once.
    p = gl.max_contiguous(gl.multiple_of(p, [VECTOR_P]), [VECTOR_P])
    return point, p, gl.max_constancy(inside, [VECTOR_P])


@gluon.jit
def _advance(tap, shift, c0, channels, kernel_size, BLOCK_C: gl.constexpr):
    """The next kernel point, which shift unravels; after the last one the next block of channels;
    after that all over again.

    In this order a multiprocessor's cache holds the neighbourhood that a block is sampled from.
    """
    carry = True
    next = ()
    for a in gl.static_range(len(shift) - 1, -1, -1):
        step = shift[a] + gl.where(carry, 1, 0)
        carry = step >= kernel_size[a]
        next = (gl.where(carry, 0, step),) + next
    tap = gl.where(carry, 0, tap + 1)
    c0 += gl.where(carry, BLOCK_C, 0)
    return tap, next, gl.where(c0 >= channels, 0, c0)


@gluon.jit
def _multiply_columns(a, held, stage, acc, SPLIT: gl.constexpr):
    """acc plus columns, which lie in registers, @ weights[stage], done: a register operand must not
    be overwritten before its wgmma is, so the wait names it."""
    if SPLIT:
        head = held.index(2 * stage).permute((1, 0))
        tail = held.index(2 * stage + 1).permute((1, 0))
        acc = warpgroup_mma(a[1], head, acc, is_async=True)
        acc = warpgroup_mma(a[0], tail, acc, is_async=True)
        acc = warpgroup_mma(a[0], head, acc, is_async=True)
        acc, _, _ = warpgroup_mma_wait(0, deps=[acc, a[0], a[1]])
    else:
        acc = warpgroup_mma(a[0], held.index(stage).permute((1, 0)), acc, is_async=True)
        acc, _ = warpgroup_mma_wait(0, deps=[acc, a[0]])
    return acc


@gluon.jit
def gather_narrow(image, weight, offset, mask, bias, out,
                  sizes, channels, outputs, tiles, tiles_y, tiles_x, blocks,
                  POINTS_LAST: gl.constexpr, SPLIT: gl.constexpr, UNIT: gl.constexpr,
                  OFFSET_CHANNELS: gl.constexpr, MASK_CHANNELS: gl.constexpr,
                  RUN: gl.constexpr, BLOCK_P: gl.constexpr, BLOCK_O: gl.constexpr,
                  BLOCK_C: gl.constexpr, VECTOR_P: gl.constexpr, TILE_X: gl.constexpr,
                  STAGES: gl.constexpr, MMA: gl.constexpr, COLUMNS: gl.constexpr,
                  ROWS: gl.constexpr, PLANES: gl.constexpr, num_warps: gl.constexpr):  # fmt: skip
    """dF/dpoints. Grid: (B x tiles x blocks of O).

    The rows of a warp's products are its positions with the last bit first, so that a lane has
    two neighbours.
    """
    dtype: gl.constexpr = gl.bfloat16 if SPLIT else image.dtype.element_ty
    parts: gl.constexpr = 2 if SPLIT else 1
    size: gl.constexpr = _bytes(BLOCK_C, BLOCK_O)
    rank: gl.constexpr = len(sizes[0])
    at_chunk: gl.constexpr = gl.SliceLayout(2, COLUMNS)
    operand: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    image_size = sizes[0]
    kernel_size = sizes[2]
    pixels = _volume(image_size)
    positions = _volume(sizes[1])
    taps = _volume(kernel_size)
    tile = gl.program_id(0) // blocks
    o0 = (gl.program_id(0) % blocks) * BLOCK_O
    b = tile // tiles
    tile = tile % tiles
    held = gl.allocate_shared_memory(dtype, [STAGES * parts, BLOCK_O, BLOCK_C], weight.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(bars.index(s), count=1)
    fence_async_shared()
    barrier()
    rows = taps * outputs
    steps = taps * (channels // BLOCK_C)
    for s in gl.static_range(STAGES):
        _bring(
            weight, s % taps * outputs + o0, s // taps * BLOCK_C, rows, held, bars, s,
            s < steps, size, SPLIT,
        )  # fmt: skip
    near = gl.arange(0, BLOCK_P, layout=gl.SliceLayout(1, at_chunk))
    point, p, inside = _tile(near, tile, tiles_y, tiles_x, sizes[1], TILE_X, BLOCK_P, VECTOR_P)
    chunk = gl.arange(0, BLOCK_C // RUN, layout=gl.SliceLayout(0, at_chunk)) * RUN
    lane = gl.arange(0, RUN, layout=gl.SliceLayout(0, gl.SliceLayout(1, COLUMNS)))[None, None, :]
    lane = (chunk % UNIT)[None, :, None] + lane
    inside = inside[:, None] & (chunk >= 0)[None, :]
    base = ()
    shift = ()
    for axis in gl.static_range(rank):
        base = base + (point[axis] * sizes[3][axis] - sizes[4][axis],)
        shift = shift + (0 * channels,)
    image += b.to(gl.int64) * pixels * channels
    offset += b.to(gl.int64) * (channels // OFFSET_CHANNELS) * taps * rank * positions
    if mask is not None:
        mask += b.to(gl.int64) * (channels // MASK_CHANNELS) * taps * positions
    acc = gl.zeros([BLOCK_P, BLOCK_O], gl.float32, layout=MMA)
    tap = 0 * channels
    c0 = 0 * channels
    read = _read(
        offset, mask, tap, c0 + chunk, p, inside, sizes, OFFSET_CHANNELS, MASK_CHANNELS, VECTOR_P
    )
    row, jumps, axes, amplitude, valid = _locate(read, base, shift, inside, sizes)
    row += ((c0 + chunk) // UNIT * pixels)[None, :]
    weights = _weights(axes, amplitude)
    values = _fetch(image, row, jumps, lane, UNIT)
    tap, shift, c0 = _advance(tap, shift, c0, channels, kernel_size, BLOCK_C)
    read = _read(
        offset, mask, tap, c0 + chunk, p, inside, sizes, OFFSET_CHANNELS, MASK_CHANNELS, VECTOR_P
    )
    ahead_tap = (STAGES - 1) % taps
    ahead_c = (STAGES - 1) // taps * BLOCK_C
    for i in range(steps):
        a = _blend(values, weights)
        a = gl.reshape(a, [BLOCK_P // 16, 8, 2, BLOCK_C // (4 * RUN), 4, RUN // 4, 2, 2])
        a = gl.reshape(gl.permute(a, (0, 2, 1, 3, 5, 6, 4, 7)), [BLOCK_P, BLOCK_C])
        a = _parts(gl.convert_layout(a, operand), dtype, SPLIT)
        row, jumps, axes, amplitude, valid = _locate(read, base, shift, inside, sizes)
        row += ((c0 + chunk) // UNIT * pixels)[None, :]
        weights = _weights(axes, amplitude)
        values = _fetch(image, row, jumps, lane, UNIT)
        tap, shift, c0 = _advance(tap, shift, c0, channels, kernel_size, BLOCK_C)
        read = _read(
            offset, mask, tap, c0 + chunk, p, inside, sizes, OFFSET_CHANNELS, MASK_CHANNELS,
            VECTOR_P,
        )  # fmt: skip
        barrier()
        ahead = i + STAGES - 1
        _bring(
            weight, ahead_tap * outputs + o0, ahead_c, rows, held, bars, ahead % STAGES,
            (ahead < steps) & (i > 0), size, SPLIT,
        )  # fmt: skip
        ahead_tap += 1
        ahead_c += gl.where(ahead_tap >= taps, BLOCK_C, 0)
        ahead_tap = gl.where(ahead_tap >= taps, 0, ahead_tap)
        stage = i % STAGES
        mbarrier.wait(bars.index(stage), (i // STAGES) & 1)
        acc = _multiply_columns(a, held, stage, acc, SPLIT)
    acc = gl.reshape(acc, [BLOCK_P // 16, 2, 8, BLOCK_O // 32, 4, 4, 2])
    acc = gl.reshape(gl.permute(acc, (0, 2, 1, 3, 5, 4, 6)), [BLOCK_P, BLOCK_O])
    if bias is not None:
        o = o0 + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(0, acc.type.layout))
        acc += gl.load(bias + o).to(gl.float32)[None, :]
    out += b.to(gl.int64) * positions * outputs
    target: gl.constexpr = ROWS if POINTS_LAST else PLANES
    acc = gl.convert_layout(acc.to(out.dtype.element_ty), target)
    near = gl.arange(0, BLOCK_P, layout=gl.SliceLayout(1, target))
    point, p, inside = _tile(near, tile, tiles_y, tiles_x, sizes[1], TILE_X, BLOCK_P, VECTOR_P)
    o = o0 + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(0, target))
    if POINTS_LAST:
        place = (p * outputs)[:, None] + o[None, :]
    else:
        place = gl.multiple_of(o * positions, [VECTOR_P])[None, :] + p[:, None]
    gl.store(out + place, acc, mask=inside[:, None] & (o < outputs)[None, :])


@gluon.jit
def _contract(dots, axes):
    """Sum the corners' numbers with their weights, and per axis with the derivatives of these
    along that axis instead: derivatives first."""
    plain = dots
    along = ()
    for a in gl.static_range(len(axes) - 1, -1, -1):
        weights = axes[a][1]
        slope = ()
        new = ()
        for q in gl.static_range(len(plain) // 2):
            low = gl.where(axes[a][2], plain[2 * q], 0.0)
            high = gl.where(axes[a][3], plain[2 * q + 1], 0.0)
            slope = slope + (high - low,)
            new = new + (plain[2 * q] * weights[0] + plain[2 * q + 1] * weights[1],)
        plain = new
        finer = (slope,)
        for k in gl.static_range(len(along)):
            new = ()
            for q in gl.static_range(len(along[k]) // 2):
                new = new + (along[k][2 * q] * weights[0] + along[k][2 * q + 1] * weights[1],)
            finer = finer + (new,)
        along = finer
    sums = ()
    for k in gl.static_range(len(along)):
        sums = sums + (along[k][0],)
    return sums + (plain[0],)


@gluon.jit
def _store(out, total, row, p0, c0, pitch, positions, UNIT: gl.constexpr, RUN: gl.constexpr):
    """Store what the chunks of a unit [BLOCK_P, chunks] add up to in row `row` of the unit, of
    `pitch` rows."""
    size: gl.constexpr = total.shape
    total = gl.reshape(total, [size[0], size[1] * RUN // UNIT, UNIT // RUN])
    total = gl.sum(total, 2)
    unit = c0 // UNIT + gl.arange(0, total.shape[1], layout=gl.SliceLayout(0, total.type.layout))
    p = p0 + gl.arange(0, size[0], layout=gl.SliceLayout(1, total.type.layout))
    place = ((unit * pitch + row) * positions)[None, :] + p[:, None]
    inside = (p < positions)[:, None] & (unit >= 0)[None, :]
    gl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@gluon.jit
def _add_corners(out, grad, weights, valid, row, steps, apart, UNIT: gl.constexpr,
                 RUN: gl.constexpr, SECTORS: gl.constexpr):  # fmt: skip
    """Add a chunk's derivatives times the corners' weights to the image, by atomic additions.

    Of the low and the high corner along the last axis, which are neighbours, lanes that are
    neighbours fill as many bytes in a row as they can (SECTORS [position, chunk, low or high,
    channel]); the memory's atomic units take a sector of 32 bytes at a time. A unit of 4 channels
    has two copies of the image, `apart` pixels apart: where the low corner's place is odd the pair
    goes to the second one, so that it starts a sector there too.
    """
    at_pair: gl.constexpr = gl.SliceLayout(3, SECTORS)
    at_grad: gl.constexpr = gl.SliceLayout(2, SECTORS)
    at_lane: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, at_grad))
    grad = gl.convert_layout(grad, at_grad)[:, :, None, :]
    lane = gl.arange(0, RUN, layout=at_lane)[None, None, None, :]
    chunk = gl.arange(0, grad.shape[1], layout=gl.SliceLayout(0, gl.SliceLayout(2, at_pair)))
    part = (chunk * RUN % UNIT)[None, :, None]
    for q in gl.static_range(0, len(weights), 2):
        low = _corner(row, steps, q)
        to = low
        if apart is not None:
            to = gl.where((low & 1) != 0, low + apart, low)
        pixel = gl.join(
            gl.where(valid & (weights[q] != 0.0), to, -1),
            gl.where(valid & (weights[q + 1] != 0.0), to + steps[len(steps) - 1], -1),
        )
        pixel = gl.convert_layout(pixel, at_pair)
        weight = gl.convert_layout(gl.join(weights[q], weights[q + 1]), at_pair)
        place = pixel * UNIT
        if RUN < UNIT:
            place += part
        place = place[:, :, :, None] + lane
        gl.atomic_add(
            out + place, grad * weight[:, :, :, None],
            mask=(pixel >= 0)[:, :, :, None] & (lane >= 0), sem="relaxed",
        )  # fmt: skip


@gluon.jit
def gradients_narrow(image, points, weight, offset, mask, grad_offset, grad_mask, grad_image,
                     grad_weight, sizes, batch, channels, outputs, down, across, splits,
                     SPLIT: gl.constexpr, UNIT: gl.constexpr, OFFSET_CHANNELS: gl.constexpr,
                     MASK_CHANNELS: gl.constexpr, RUN: gl.constexpr, BLOCK_P: gl.constexpr,
                     BLOCK_O: gl.constexpr, BLOCK_C: gl.constexpr, TWICE: gl.constexpr,
                     MMA: gl.constexpr, OUTER: gl.constexpr, COLUMNS: gl.constexpr,
                     SECTORS: gl.constexpr, ROWS: gl.constexpr,
                     num_warps: gl.constexpr):  # fmt: skip
    """dF/doffset and dF/dmask (laid out as an offset and a mask of every unit), dF/dimage
    (float32, planes) by atomic additions, and partial sums of dF/dweight [splits, K, O, C], each
    unless None; from points in rows [B x P, O].

    A program holds the weights of a block of channels and of one kernel point, and takes tiles of
    positions in turn, so that a lane finds cells and corners once for everything. Tiles are taken
    down columns of the image (`across` tiles a row), as far as that goes, for the sake of the
    cache. TWICE: the image's gradient has two copies (_add_corners). Grid: (K x blocks of C,
    splits).
    """
    dtype: gl.constexpr = gl.bfloat16 if SPLIT else points.dtype
    parts: gl.constexpr = 2 if SPLIT else 1
    size: gl.constexpr = _bytes(BLOCK_P, BLOCK_O)
    rank: gl.constexpr = len(sizes[0])
    by_position: gl.constexpr = grad_offset is not None or grad_mask is not None
    at_chunk: gl.constexpr = gl.SliceLayout(2, COLUMNS)
    image_size = sizes[0]
    kernel_size = sizes[2]
    pixels = _volume(image_size)
    positions = _volume(sizes[1])
    taps = _volume(kernel_size)
    units = channels // UNIT
    per_tap = channels // BLOCK_C
    tap = gl.program_id(0) // per_tap
    shift = _unravel(tap, kernel_size)
    c0 = (gl.program_id(0) % per_tap) * BLOCK_C
    split = gl.program_id(1)
    tiles = down * across
    share = batch * tiles // splits
    rest = batch * tiles % splits
    first = split * share + gl.minimum(split, rest)
    last = first + share + gl.where(split < rest, 1, 0)
    held = gl.allocate_shared_memory(dtype, [2 * parts, BLOCK_P, BLOCK_O], points.layout)
    factor = gl.allocate_shared_memory(
        dtype, [parts, BLOCK_O, BLOCK_C],
        gl.NVMMASharedLayout.get_default_for([BLOCK_O, BLOCK_C], dtype),
    )  # fmt: skip
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(2):
        mbarrier.init(bars.index(s), count=1)
    o = gl.arange(0, BLOCK_O, layout=gl.SliceLayout(1, ROWS))
    c = c0 + gl.arange(0, BLOCK_C, layout=gl.SliceLayout(0, ROWS))
    for part in gl.static_range(parts):
        start_o = (part * taps + tap) * outputs + o
        factor.index(part).store(gl.load(weight + (start_o * channels)[:, None] + c[None, :]))
    fence_async_shared()
    barrier()
    rows = batch * positions
    b = first // tiles
    column = first % tiles // down
    step = first % tiles % down
    p0 = (step * across + column) * BLOCK_P
    _bring(points, b * positions + p0, 0, rows, held, bars, 0, first < last, size, SPLIT)
    near = gl.arange(0, BLOCK_P, layout=gl.SliceLayout(1, at_chunk))
    chunk = gl.arange(0, BLOCK_C // RUN, layout=gl.SliceLayout(0, at_chunk)) * RUN
    lane = gl.arange(0, RUN, layout=gl.SliceLayout(0, gl.SliceLayout(1, COLUMNS)))[None, None, :]
    lane = (chunk % UNIT)[None, :, None] + lane
    plane = ((c0 + chunk) // UNIT * pixels)[None, :]
    of_offset = (channels // OFFSET_CHANNELS) * taps * rank * positions
    of_mask = (channels // MASK_CHANNELS) * taps * positions
    apart = None
    if TWICE:
        apart = batch * units * pixels | 1
    zero = gl.zeros([BLOCK_P, BLOCK_C], gl.float32, layout=MMA)
    if grad_weight is not None:
        columns = gl.allocate_shared_memory(
            dtype, [parts, BLOCK_P, BLOCK_C],
            gl.NVMMASharedLayout.get_default_for([BLOCK_P, BLOCK_C], dtype),
        )  # fmt: skip
        acc = gl.zeros([BLOCK_O, BLOCK_C], gl.float32, layout=OUTER)
        product = gl.zeros([BLOCK_O, BLOCK_C], gl.float32, layout=OUTER)
    p = p0 + near
    inside = (p < positions)[:, None] & (chunk >= 0)[None, :]
    here = offset + b.to(gl.int64) * of_offset
    here_mask = None
    if mask is not None:
        here_mask = mask + b.to(gl.int64) * of_mask
    read = _read(
        here, here_mask, tap, c0 + chunk, p, inside, sizes, OFFSET_CHANNELS, MASK_CHANNELS, 1
    )
    for t in range(first, last):
        i = t - first
        stage = i % 2
        mbarrier.wait(bars.index(stage), (i // 2) & 1)
        grad = warpgroup_mma(
            held.index(stage * parts), factor.index(0), zero, use_acc=False, is_async=True
        )
        if SPLIT:
            grad = warpgroup_mma(held.index(stage * 2 + 1), factor.index(0), grad, is_async=True)
            grad = warpgroup_mma(held.index(stage * 2), factor.index(1), grad, is_async=True)
        item = b.to(gl.int64)
        point = _unravel(p, sizes[1])
        base = ()
        for axis in gl.static_range(rank):
            base = base + (point[axis] * sizes[3][axis] - sizes[4][axis],)
        row, jumps, axes, amplitude, valid = _locate(read, base, shift, inside, sizes)
        row += plane
        if by_position or grad_weight is not None:
            values = _fetch(image + item * pixels * channels, row, jumps, lane, UNIT)
        # The next tile; after the last one some other, to no end.
        tile0 = p0
        step += 1
        over = step >= down
        step = gl.where(over, 0, step)
        column += gl.where(over, 1, 0)
        over = column >= across
        column = gl.where(over, 0, column)
        b = gl.minimum(b + gl.where(over, 1, 0), batch - 1)
        p0 = (step * across + column) * BLOCK_P
        p = p0 + near
        inside = (p < positions)[:, None] & (chunk >= 0)[None, :]
        here = offset + b.to(gl.int64) * of_offset
        if mask is not None:
            here_mask = mask + b.to(gl.int64) * of_mask
        read = _read(
            here, here_mask, tap, c0 + chunk, p, inside, sizes, OFFSET_CHANNELS, MASK_CHANNELS, 1
        )
        weights = _weights(axes, amplitude)
        grad = warpgroup_mma_wait(0, deps=[grad])
        barrier()
        _bring(
            points, b * positions + p0, 0, rows, held, bars, 1 - stage, t + 1 < last, size, SPLIT
        )
        if grad_weight is not None:
            x = _parts(gl.reshape(_blend(values, weights), [BLOCK_P, BLOCK_C]), dtype, SPLIT)
            for part in gl.static_range(parts):
                columns.index(part).store(x[part])
            fence_async_shared()
            barrier()
            left = held.index(stage * parts).permute((1, 0))
            if SPLIT:
                left1 = held.index(stage * 2 + 1).permute((1, 0))
                product = warpgroup_mma(
                    left1, columns.index(0), product, use_acc=False, is_async=True
                )
                product = warpgroup_mma(left, columns.index(1), product, is_async=True)
            product = warpgroup_mma(left, columns.index(0), product, is_async=True)
        grad = gl.reshape(grad, [BLOCK_P, BLOCK_C // (4 * RUN), RUN // 2, 4, 2])
        grad = gl.reshape(gl.permute(grad, (0, 1, 3, 2, 4)), [BLOCK_P, BLOCK_C // RUN, RUN])
        grad = gl.convert_layout(grad, COLUMNS)
        if by_position:
            dots = ()
            for q in gl.static_range(2**rank):
                dots = dots + (gl.sum(values[q].to(gl.float32) * grad, 2),)
            totals = _contract(dots, axes)
            if grad_offset is not None:
                out = grad_offset + item * units * taps * rank * positions
                for axis in gl.static_range(rank):
                    total = gl.where(valid, totals[axis] * amplitude, 0.0)
                    _store(
                        out, total, tap * rank + axis, tile0, c0, taps * rank, positions, UNIT, RUN
                    )
            if grad_mask is not None:
                out = grad_mask + item * units * taps * positions
                total = gl.where(valid, totals[rank], 0.0)
                _store(out, total, tap, tile0, c0, taps, positions, UNIT, RUN)
        if grad_image is not None:
            out = grad_image + item * pixels * channels
            _add_corners(out, grad, weights, valid, row, jumps, apart, UNIT, RUN, SECTORS)
        if grad_weight is not None:
            product = warpgroup_mma_wait(0, deps=[product])
            if SPLIT:
                acc += product
    if grad_weight is not None:
        if SPLIT:
            product = acc
        o = gl.arange(0, BLOCK_O, layout=gl.SliceLayout(1, OUTER))
        c = c0 + gl.arange(0, BLOCK_C, layout=gl.SliceLayout(0, OUTER))
        place = ((split * taps + tap).to(gl.int64) * outputs + o) * channels
        gl.store(grad_weight + (place[:, None] + c[None, :]), product)
