"""Gluon kernels for Hopper: gather and the gradients by offset and mask, for half numbers.

They compute what `gather` and `spread` of kernels.py do, for one group and one unit, and keep the
sampled columns in registers: a lane samples eight consecutive channels at once, and the weights'
channels are permuted so that these are just the lane's share of a wgmma operand or accumulator
(pack_fragments in kernels.py). So nothing goes through shared memory but the weights, which the
copy engine brings, STAGES blocks deep.

Note [pipeline]
Corners of block i + 1 are loaded while wgmma multiplies block i. A register operand must not be
overwritten before its wgmma is done, so the wait names it.
"""

# Tuples of Triton grow by +.
# ruff: noqa: RUF005, RUF059

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _volume(size):
    volume = size[0]
    for a in gl.static_range(1, len(size)):
        volume = volume * size[a]
    return volume


@gluon.jit
def _unravel(index, size):
    point = ()
    for a in gl.static_range(len(size)):
        point = (index % size[len(size) - 1 - a],) + point
        index = index // size[len(size) - 1 - a]
    return point


@gluon.jit
def _pack(low, high):
    """Two weights as halves of an int32."""
    a = low.to(gl.float16).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    b = high.to(gl.float16).to(gl.int16, bitcast=True).to(gl.int32) << 16
    return a | b


@gluon.jit
def _half(packed, high: gl.constexpr):
    if high:
        return (packed >> 16).to(gl.int16).to(gl.float16, bitcast=True)
    else:
        return packed.to(gl.int16).to(gl.float16, bitcast=True)


@gluon.jit
def _locate(offset, mask, b, tap, p, point, inside, sizes):
    """Per axis (low index, step to the high one, their weights, their derivatives), the mask's
    value, and whether the sample is valid (kernels.py, Note [corners])."""
    image_size, point_size, kernel_size, stride, padding, dilation = sizes
    positions = _volume(point_size)
    shift = _unravel(tap, kernel_size)
    base = b.to(gl.int64) * _volume(kernel_size) + tap
    valid = inside
    at = ()
    for a in gl.static_range(len(image_size)):
        place = offset + (base * len(image_size) + a) * positions
        value = gl.load(place + p, mask=inside, other=0.0).to(gl.float32)
        near = gl.abs(value) < 1.0e9
        value = gl.where(near, value, 0.0)
        floor = gl.floor(value)
        low = point[a] * stride[a] - padding[a] + shift[a] * dilation[a] + floor.to(gl.int32)
        valid = valid & near & (low >= -1) & (low < image_size[a])
        at = at + ((low, value - floor),)
    amplitude = gl.where(valid, 1.0, 0.0)
    if mask is not None:
        value = gl.load(mask + base * positions + p, mask=inside, other=0.0)
        amplitude = gl.where(valid, value.to(gl.float32), 0.0)
    axes = ()
    for a in gl.static_range(len(image_size)):
        low = gl.where(valid, at[a][0], 0)
        has_low = low >= 0
        has_high = low + 1 < image_size[a]
        step = gl.where(has_low & has_high, 1, 0)
        weights = (
            gl.where(has_low, 1.0 - at[a][1], 0.0),
            gl.where(has_high, at[a][1], 0.0),
        )
        axes = axes + ((gl.maximum(low, 0), step, weights, has_low, has_high),)
    return axes, amplitude, valid


@gluon.jit
def _code(axes, image_size):
    """The low corner's pixel, and per axis a bit: whether the high one is another pixel."""
    row = axes[0][0]
    bits = axes[0][1]
    for a in gl.static_range(1, len(image_size)):
        row = row * image_size[a] + axes[a][0]
        bits = bits * 2 + axes[a][1]
    return row * (2 ** len(image_size)) + bits


@gluon.jit
def _weights(axes, amplitude):
    """The corners' weights, two to an int32 along the last axis."""
    rank: gl.constexpr = len(axes)
    packed = ()
    for q in gl.static_range(2 ** (rank - 1)):
        weight = amplitude
        for a in gl.static_range(rank - 1):
            weight = weight * axes[a][2][(q >> (rank - 2 - a)) & 1]
        packed = packed + (_pack(weight * axes[rank - 1][2][0], weight * axes[rank - 1][2][1]),)
    return packed


@gluon.jit
def _fetch(image, code, c0, channels, image_size):
    """The corners' values of a block of channels from c0 on."""
    rank: gl.constexpr = len(image_size)
    steps = ()
    stride = channels
    for i in gl.static_range(rank):
        steps = (((code >> i) & 1) * stride,) + steps
        stride = stride * image_size[rank - 1 - i]
    low = (code >> rank) * channels + c0
    values = ()
    for q in gl.static_range(2**rank):
        place = low
        for a in gl.static_range(rank):
            if (q >> (rank - 1 - a)) & 1:
                place = place + steps[a]
        values = values + (gl.load(image + place[:, None]),)
    return values


@gluon.jit
def _blend(values, packed, dtype: gl.constexpr):
    columns = None
    for q in gl.static_range(len(values)):
        weight = _half(packed[q // 2], q % 2)[:, None]
        term = values[q].to(gl.float32) * weight.to(gl.float32)
        if q == 0:
            columns = term
        else:
            columns += term
    return columns.to(dtype)


@gluon.constexpr_function
def _bytes(rows, columns):
    return 2 * rows * columns


@gluon.jit
def gather(image, weight, offset, mask, bias, out,
           sizes, channels, outputs, tiles, blocks,
           POINTS_LAST: gl.constexpr, BLOCK_P: gl.constexpr,
           BLOCK_O: gl.constexpr, BLOCK_C: gl.constexpr, STAGES: gl.constexpr, MMA: gl.constexpr,
           COLUMNS: gl.constexpr, ROWS: gl.constexpr, PLANES: gl.constexpr,
           num_warps: gl.constexpr):  # fmt: skip
    """dF/dpoints. Grid: (B x tiles x blocks of O)."""
    dtype: gl.constexpr = image.dtype.element_ty
    at_row: gl.constexpr = gl.SliceLayout(1, COLUMNS)
    operand: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    image_size = sizes[0]
    positions = _volume(sizes[1])
    tile = gl.program_id(0) // blocks
    o0 = (gl.program_id(0) % blocks) * BLOCK_O
    b = tile // tiles
    p0 = (tile % tiles) * BLOCK_P
    held = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_C, BLOCK_O], weight.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(bars.index(s), count=1)
    fence_async_shared()
    gl.thread_barrier()
    taps = _volume(sizes[2])
    steps = taps * (channels // BLOCK_C)
    for s in gl.static_range(STAGES):
        mbarrier.expect(bars.index(s), _bytes(BLOCK_C, BLOCK_O), pred=s < steps)
        tma.async_copy_global_to_shared(
            weight, [s * BLOCK_C, o0], bars.index(s), held.index(s), pred=s < steps
        )
    p = p0 + gl.arange(0, BLOCK_P, layout=at_row)
    inside = p < positions
    point = _unravel(p, sizes[1])
    image += b.to(gl.int64) * _volume(image_size) * channels
    here = image + gl.arange(0, BLOCK_C, layout=gl.SliceLayout(0, COLUMNS))[None, :]
    acc = gl.zeros([BLOCK_P, BLOCK_O], gl.float32, layout=MMA)
    tap = 0 * channels
    c0 = 0 * channels
    axes, amplitude, valid = _locate(offset, mask, b, tap, p, point, inside, sizes)
    code = _code(axes, image_size)
    packed = _weights(axes, amplitude)
    values = _fetch(here, code, c0, channels, image_size)
    for i in range(steps):
        a = _blend(values, packed, dtype)
        a = gl.reshape(a, [BLOCK_P, BLOCK_C // 32, 4, 2, 2, 2])
        a = gl.reshape(gl.permute(a, (0, 1, 3, 4, 2, 5)), [BLOCK_P, BLOCK_C])
        a = gl.convert_layout(a, operand)
        c0 += BLOCK_C
        if c0 >= channels:
            c0 = 0 * channels
            tap = gl.minimum(tap + 1, taps - 1)
            axes, amplitude, valid = _locate(offset, mask, b, tap, p, point, inside, sizes)
            code = _code(axes, image_size)
            packed = _weights(axes, amplitude)
        values = _fetch(here, code, c0, channels, image_size)
        gl.thread_barrier()
        ahead = i + STAGES - 1
        more = (ahead < steps) & (i > 0)
        mbarrier.expect(bars.index(ahead % STAGES), _bytes(BLOCK_C, BLOCK_O), pred=more)
        tma.async_copy_global_to_shared(
            weight, [ahead * BLOCK_C, o0], bars.index(ahead % STAGES), held.index(ahead % STAGES),
            pred=more,
        )  # fmt: skip
        mbarrier.wait(bars.index(i % STAGES), (i // STAGES) & 1)
        acc = warpgroup_mma(a, held.index(i % STAGES), acc, is_async=True)
        acc, a = warpgroup_mma_wait(0, deps=[acc, a])
    acc = gl.reshape(acc, [BLOCK_P, BLOCK_O // 32, 4, 4, 2])
    acc = gl.reshape(gl.permute(acc, (0, 1, 3, 2, 4)), [BLOCK_P, BLOCK_O])
    if bias is not None:
        o = o0 + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(0, acc.type.layout))
        acc += gl.load(bias + o).to(gl.float32)[None, :]
    out += b.to(gl.int64) * positions * outputs
    target: gl.constexpr = ROWS if POINTS_LAST else PLANES
    acc = gl.convert_layout(acc.to(dtype), target)
    p = p0 + gl.arange(0, BLOCK_P, layout=gl.SliceLayout(1, target))
    o = o0 + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(0, target))
    if POINTS_LAST:
        place = (p * outputs)[:, None] + o[None, :]
    else:
        place = (o * positions)[None, :] + p[:, None]
    gl.store(out + place, acc, mask=(p < positions)[:, None] & (o < outputs)[None, :])


@gluon.jit
def along(image, points, weight, offset, mask, grad_offset, grad_mask,
          sizes, channels, outputs, tiles, splits,
          BLOCK_P: gl.constexpr, BLOCK_O: gl.constexpr, BLOCK_C: gl.constexpr,
          STAGES: gl.constexpr, MMA: gl.constexpr, COLUMNS: gl.constexpr, ROWS: gl.constexpr,
          num_warps: gl.constexpr):  # fmt: skip
    """dF/doffset and dF/dmask (grad_mask may be None), from points in rows [B, P, O].

    The points' tile stays in shared memory. Grid: (B x tiles, splits of the kernel points).
    """
    dtype: gl.constexpr = image.dtype.element_ty
    rank: gl.constexpr = len(sizes[0])
    at_row: gl.constexpr = gl.SliceLayout(1, COLUMNS)
    image_size = sizes[0]
    positions = _volume(sizes[1])
    taps = _volume(sizes[2])
    b = gl.program_id(0) // tiles
    p0 = (gl.program_id(0) % tiles) * BLOCK_P
    first = gl.program_id(1) * taps // splits
    last = (gl.program_id(1) + 1) * taps // splits
    per_tap = channels // BLOCK_C
    steps = (last - first) * per_tap
    grads = gl.allocate_shared_memory(
        dtype, [BLOCK_P, BLOCK_O], gl.NVMMASharedLayout.get_default_for([BLOCK_P, BLOCK_O], dtype)
    )
    p = p0 + gl.arange(0, BLOCK_P, layout=gl.SliceLayout(1, ROWS))
    o = gl.arange(0, BLOCK_O, layout=gl.SliceLayout(0, ROWS))
    points += b.to(gl.int64) * positions * outputs
    here = (p < positions)[:, None] & (o < outputs)[None, :]
    grads.store(gl.load(points + (p * outputs)[:, None] + o[None, :], mask=here, other=0.0))
    held = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_O, BLOCK_C], weight.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(bars.index(s), count=1)
    fence_async_shared()
    gl.thread_barrier()
    for s in gl.static_range(STAGES):
        mbarrier.expect(bars.index(s), _bytes(BLOCK_O, BLOCK_C), pred=s < steps)
        tma.async_copy_global_to_shared(
            weight, [(first + s // per_tap) * outputs, (s % per_tap) * BLOCK_C], bars.index(s),
            held.index(s), pred=s < steps,
        )  # fmt: skip
    p = p0 + gl.arange(0, BLOCK_P, layout=at_row)
    inside = p < positions
    point = _unravel(p, sizes[1])
    image += b.to(gl.int64) * _volume(image_size) * channels
    image_block = image + gl.arange(0, BLOCK_C, layout=gl.SliceLayout(0, COLUMNS))[None, :]
    zero = gl.zeros([BLOCK_P, BLOCK_C], gl.float32, layout=MMA)
    mbarrier.wait(bars.index(0), 0)
    acc = warpgroup_mma(grads, held.index(0), zero, use_acc=False, is_async=True)
    i = 0
    for tap in range(first, last):
        axes, amplitude, valid = _locate(offset, mask, b, tap, p, point, inside, sizes)
        code = _code(axes, image_size)
        dots = ()
        for _ in gl.static_range(2**rank):
            dots = dots + (gl.zeros([BLOCK_P], gl.float32, layout=at_row),)
        for block in range(per_tap):
            values = _fetch(image_block, code, block * BLOCK_C, channels, image_size)
            grad = warpgroup_mma_wait(0, deps=[acc])
            gl.thread_barrier()
            ahead = i + STAGES
            more = ahead < steps
            mbarrier.expect(bars.index(i % STAGES), _bytes(BLOCK_O, BLOCK_C), pred=more)
            tma.async_copy_global_to_shared(
                weight, [(first + ahead // per_tap) * outputs, (ahead % per_tap) * BLOCK_C],
                bars.index(i % STAGES), held.index(i % STAGES), pred=more,
            )  # fmt: skip
            # The last turn multiplies its own block again, to no end, instead of branching.
            i1 = gl.minimum(i + 1, steps - 1)
            mbarrier.wait(bars.index(i1 % STAGES), (i1 // STAGES) & 1)
            acc = warpgroup_mma(grads, held.index(i1 % STAGES), zero, use_acc=False, is_async=True)
            grad = gl.reshape(grad, [BLOCK_P, BLOCK_C // 32, 4, 4, 2])
            grad = gl.reshape(gl.permute(grad, (0, 1, 3, 2, 4)), [BLOCK_P, BLOCK_C])
            grad = gl.convert_layout(grad, COLUMNS)
            new = ()
            for q in gl.static_range(2**rank):
                new = new + (dots[q] + gl.sum(values[q].to(gl.float32) * grad, 1),)
            dots = new
            i += 1
        base = b.to(gl.int64) * taps + tap
        for axis in gl.static_range(rank + 1):
            total = gl.zeros([BLOCK_P], gl.float32, layout=at_row)
            for q in gl.static_range(2**rank):
                term = dots[q]
                for a in gl.static_range(rank):
                    if a == axis:
                        if (q >> (rank - 1 - a)) & 1:
                            term = gl.where(axes[a][4], term, 0.0)
                        else:
                            term = gl.where(axes[a][3], -term, 0.0)
                    else:
                        term = term * axes[a][2][(q >> (rank - 1 - a)) & 1]
                total += term
            total = gl.where(valid, total, 0.0)
            if axis < rank:
                if grad_offset is not None:
                    place = grad_offset + (base * rank + axis) * positions
                    total = total * amplitude
                    gl.store(place + p, total.to(grad_offset.dtype.element_ty), mask=inside)
            elif grad_mask is not None:
                place = grad_mask + base * positions
                gl.store(place + p, total.to(grad_mask.dtype.element_ty), mask=inside)
    warpgroup_mma_wait(0, deps=[acc])
