"""Gluon kernels for Hopper: gather, the gradients by offset, mask and image, and by the weight.

They compute what `gather`, `spread` and `weight_gradient` of kernels.py do, for one group and one
unit. The copy engine brings weights, STAGES blocks deep, and wgmma multiplies a block of columns
while the corners of the next one are loaded.

`gather` and `outer` store their columns in shared memory, where eight lanes load 128 consecutive
bytes of a corner, which is what the cache gives at once. `along` has a product's numbers and the
corners they are multiplied with in registers: a lane has eight consecutive channels, and the
weights' channels are permuted so that these are just its share of a wgmma accumulator (_pack in
kernels.py).

SPLIT: the tensors are float32, and the products those of Note [precision] in kernels.py; weights
(and points in `outer`) come as heads, then tails.
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

# Triton 3.6's names, and those of later versions.
barrier = getattr(gl, "thread_barrier", None) or gl.barrier
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def _reinterpret(x, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    """Shared memory as other numbers."""
    if RENAMED:
        return x.reinterpret(dtype, shape, layout)
    else:
        return x._reinterpret(dtype, shape, layout)


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
def _given(offset, mask, b, tap, p, point, inside, sizes):
    """What is read of samples: per axis (index without the offset, offset); the mask's value."""
    image_size, point_size, kernel_size, stride, padding, dilation = sizes
    positions = _volume(point_size)
    shift = _unravel(tap, kernel_size)
    base = b.to(gl.int64) * _volume(kernel_size) + tap
    axes = ()
    for a in gl.static_range(len(image_size)):
        place = offset + (base * len(image_size) + a) * positions
        value = gl.load(place + p, mask=inside, other=0.0)
        axes = axes + ((point[a] * stride[a] - padding[a] + shift[a] * dilation[a], value),)
    if mask is not None:
        return axes, gl.load(mask + base * positions + p, mask=inside, other=0.0)
    else:
        return axes, gl.where(inside, 1.0, 0.0)


@gluon.jit
def _cell(given, inside, image_size):
    """As _locate, from what _given has read."""
    at = ()
    valid = inside
    for a in gl.static_range(len(image_size)):
        value = given[0][a][1].to(gl.float32)
        near = gl.abs(value) < 1.0e9
        value = gl.where(near, value, 0.0)
        floor = gl.floor(value)
        low = given[0][a][0] + floor.to(gl.int32)
        valid = valid & near & (low >= -1) & (low < image_size[a])
        at = at + ((low, value - floor),)
    amplitude = given[1].to(gl.float32)
    amplitude = gl.where(valid, amplitude, amplitude * 0.0)  # kernels.py, _amplitude
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
def _locate(offset, mask, b, tap, p, point, inside, sizes):
    """Per axis (low index, step to the high one, their weights, whether they are in the image),
    the mask's value, and whether the sample is valid (kernels.py, Note [corners])."""
    given = _given(offset, mask, b, tap, p, point, inside, sizes)
    return _cell(given, inside, sizes[0])


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
def _corner_weight(axes, q: gl.constexpr):
    """Weight of corner q; the bits of q choose low or high, the last axis is bit 0."""
    weight = axes[0][2][(q >> (len(axes) - 1)) & 1]
    for a in gl.static_range(1, len(axes)):
        weight = weight * axes[a][2][(q >> (len(axes) - 1 - a)) & 1]
    return weight


@gluon.jit
def _weights(axes, amplitude, SPLIT: gl.constexpr):
    """The corners' weights; for half numbers two to an int32 along the last axis."""
    weights = ()
    for q in gl.static_range(2 ** len(axes)):
        weights = weights + (_corner_weight(axes, q) * amplitude,)
    if SPLIT:
        return weights
    else:
        packed = ()
        for q in gl.static_range(2 ** (len(axes) - 1)):
            packed = packed + (_pack(weights[2 * q], weights[2 * q + 1]),)
        return packed


@gluon.jit
def _place(code, q: gl.constexpr, channels, image_size):
    """Where corner q's channels start."""
    rank: gl.constexpr = len(image_size)
    place = (code >> rank) * channels
    stride = channels
    for i in gl.static_range(rank):
        if (q >> i) & 1:
            place += ((code >> i) & 1) * stride
        stride = stride * image_size[rank - 1 - i]
    return place


@gluon.jit
def _fetch(image, code, c0, channels, image_size):
    """The corners' values of a block of channels from c0 on."""
    values = ()
    for q in gl.static_range(2 ** len(image_size)):
        place = _place(code, q, channels, image_size) + c0
        values = values + (gl.load(image + place[:, None]),)
    return values


# Samples in tables, in shared memory: what one lane has found for a sample many read. Tables have
# cells (_tabulate), the corners' weights (_weights) and, for float16, what the last one lacks.
#
# Sums of float16 numbers would err by more than their rounding in the end does if large terms came
# first. So corners go from the smallest weight to the largest, or nearly: along each axis the one
# that weighs less comes first; and what the last one's weight has lost in float16 is added, too.


@gluon.constexpr_function
def _log2(n):
    return n.bit_length() - 1


@gluon.constexpr_function
def _twos(count, n):
    return [count] + [2] * _log2(n)


@gluon.jit
def _together(words):
    """Tensors [P], a power of two of them, as one [P, how many]."""
    count: gl.constexpr = len(words)
    for _ in gl.static_range(_log2(count)):
        new = ()
        for i in gl.static_range(len(words) // 2):
            new = new + (gl.join(words[i], words[i + len(words) // 2]),)
        words = new
    return gl.reshape(words[0], [words[0].shape[0], count])


@gluon.jit
def _apart(x):
    """The reverse of _together."""
    words = (gl.reshape(x, _twos(x.shape[0], x.shape[1])),)
    for _ in gl.static_range(_log2(x.shape[1])):
        low = ()
        high = ()
        for i in gl.static_range(len(words)):
            y, z = gl.split(words[i])
            low = low + (y,)
            high = high + (z,)
        words = low + high
    return words


@gluon.jit
def _allocate_tables(rows: gl.constexpr, count: gl.constexpr, rank: gl.constexpr,
                     dtype: gl.constexpr):  # fmt: skip
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    words: gl.constexpr = 2**rank if dtype == gl.float32 else 2 ** (rank - 1)
    tables = (
        gl.allocate_shared_memory(gl.int32, [rows, count], plain),
        gl.allocate_shared_memory(
            gl.int32, [rows, count, words], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        ),
    )
    if dtype == gl.float16:
        tables = tables + (gl.allocate_shared_memory(gl.int32, [rows, count], plain),)
    return tables


@gluon.jit
def _tabulate(tables, row, given, inside, before, image_size, SPLIT: gl.constexpr):
    """Store samples (_given) as a row of the tables; `before` comes before their images' pixels.

    A cell is the first corner's pixel, and for each axis two bits: the step to the other, -1 to 1.
    """
    rank: gl.constexpr = len(image_size)
    axes, amplitude, valid = _cell(given, inside, image_size)
    ordered = ()
    pixel = 0
    steps = 0
    for a in gl.static_range(rank):
        low, step, weights = axes[a][0], axes[a][1], axes[a][2]
        high_first = weights[0] > weights[1]
        first = gl.where(high_first, low + step, low)
        pixel = pixel * image_size[a] + first
        steps = steps * 4 + (gl.where(high_first, -step, step) & 3)
        less = gl.minimum(weights[0], weights[1])
        more = gl.maximum(weights[0], weights[1])
        ordered = ordered + ((first, step, (less, more)),)
    tables[0].index(row).store((before + pixel) * 4**rank + steps)
    words = _together(_weights(ordered, amplitude, SPLIT))
    tables[1].index(row).store(words.to(gl.int32, bitcast=True))
    if len(tables) > 2:
        most = _corner_weight(ordered, 2**rank - 1) * amplitude
        lost = most - most.to(gl.float16).to(gl.float32)
        lost = gl.where(gl.abs(most) < 60000.0, lost, 0.0)
        tables[2].index(row).store(_pack(lost, lost))


@gluon.jit
def _fetch_cell(image, cell, c0, channels, image_size):
    """As _fetch, of a cell that is tabulated."""
    rank: gl.constexpr = len(image_size)
    values = ()
    for q in gl.static_range(2**rank):
        place = (cell >> (2 * rank)) * channels + c0
        stride = channels
        for i in gl.static_range(rank):
            if (q >> i) & 1:
                place += ((cell << (30 - 2 * i)) >> 30) * stride
            stride = stride * image_size[rank - 1 - i]
        values = values + (gl.load(image + place[:, None]),)
    return values


@gluon.constexpr_function
def _rows_of(shape, count):
    return [shape[0] * shape[1] // count, count, *shape[2:]]


@gluon.constexpr_function
def _together_layout(layout, n):
    """Of n words for every row of a tensor with a BlockedLayout."""
    each, threads, warps = layout.size_per_thread, layout.threads_per_warp, layout.warps_per_cta
    return gl.SliceLayout(
        2,
        gl.BlockedLayout(
            [each[0], n, each[1]], [threads[0], 1, threads[1]], [warps[0], 1, warps[1]], [2, 1, 0]
        ),
    )


@gluon.jit
def _words(table, i, COUNT: gl.constexpr, layout: gl.constexpr):
    """Of the i-th COUNT samples."""
    shape: gl.constexpr = _rows_of(table.shape, COUNT)
    stored: gl.constexpr = table.layout
    return _reinterpret(table, gl.int32, shape, stored).index(i).load(layout)


@gluon.jit
def _mix(values, tables, i, COUNT: gl.constexpr, COLUMNS: gl.constexpr, dtype: gl.constexpr):
    """The sum of the corners' values times their weights of the i-th COUNT samples, in float32 or
    in words of two half numbers. Those of float16 are multiplied as they are."""
    count: gl.constexpr = len(values)
    at_row: gl.constexpr = gl.SliceLayout(1, COLUMNS)
    together: gl.constexpr = _together_layout(COLUMNS, tables[1].shape[2])
    words = _apart(_words(tables[1], i, COUNT, together))
    args = values
    for w in gl.static_range(len(words)):
        args = args + (gl.convert_layout(words[w], at_row)[:, None],)
    if dtype == gl.float16:
        args = args + (_words(tables[2], i, COUNT, at_row)[:, None],)
    if dtype == gl.float32:
        total = values[0].to(gl.float32, bitcast=True) * args[count].to(gl.float32, bitcast=True)
        for q in gl.static_range(1, count):
            weight = args[count + q].to(gl.float32, bitcast=True)
            total += values[q].to(gl.float32, bitcast=True) * weight
        return total
    else:
        return gl.inline_asm_elementwise(
            _sum_of_products(count, dtype.name), _registers(len(args)), args, gl.int32,
            is_pure=True, pack=1,
        )  # fmt: skip


@gluon.constexpr_function
def _registers(count):
    """Constraints of assembly from so many registers to one."""
    return ",".join(["=r"] + ["r"] * count)


@gluon.constexpr_function
def _sum_of_products(count, dtype):
    """Assembly for `count` pairs of numbers times weights, which are float16, two to a word;
    float16 ones begin with the last pair times what its weight has lost."""
    lines = [".reg .b16 l, h; .reg .b32 v, s; .reg .f32 x, y, w, a, b;"]
    if dtype == "fp16":
        lines.append(f"mul.rn.f16x2 s, ${count}, ${1 + count + count // 2};")
    for q in range(count):
        weight = "lh"[q % 2]
        lines.append(f"mov.b32 {{l, h}}, ${1 + count + q // 2};")
        if dtype == "fp16":
            lines.append(f"mov.b32 v, {{{weight}, {weight}}}; fma.rn.f16x2 s, ${1 + q}, v, s;")
        else:
            lines.append(f"cvt.f32.f16 w, {weight};")
            lines.append(f"shl.b32 x, ${1 + q}, 16; and.b32 y, ${1 + q}, 0xFFFF0000;")
            if q == 0:
                lines.append("mul.f32 a, x, w; mul.f32 b, y, w;")
            else:
                lines.append("fma.rn.f32 a, x, w, a; fma.rn.f32 b, y, w, b;")
    lines.append("mov.b32 $0, s;" if dtype == "fp16" else "cvt.rn.bf16x2.f32 $0, b, a;")
    return "{ " + " ".join(lines) + " }"


@gluon.jit
def _allocate_columns(dtype: gl.constexpr, count: gl.constexpr, channels: gl.constexpr,
                      SPLIT: gl.constexpr):  # fmt: skip
    """Room for columns twice, SPLIT: for heads and for tails."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([count, channels], dtype)
    columns = (gl.allocate_shared_memory(dtype, [2, count, channels], layout),)
    if SPLIT:
        columns = columns + (gl.allocate_shared_memory(dtype, [2, count, channels], layout),)
    return columns


@gluon.jit
def _store_columns(columns, i, x, SPLIT: gl.constexpr):
    """Store columns, as _mix made them, as a factor: SPLIT, as heads and tails."""
    if SPLIT:
        x = _parts(x, columns[0].dtype, SPLIT)
        columns[0].index(i).store(x[0])
        columns[1].index(i).store(x[1])
    else:
        shape: gl.constexpr = [columns[0].shape[0], x.shape[0], x.shape[1]]
        layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(shape[1:], gl.int32)
        _reinterpret(columns[0], gl.int32, shape, layout).index(i).store(x)
    fence_async_shared()


@gluon.jit
def _parts(x, dtype: gl.constexpr, SPLIT: gl.constexpr):
    if SPLIT:
        head = x.to(gl.bfloat16)
        return (head, (x - head.to(gl.float32)).to(gl.bfloat16))
    else:
        return (x.to(dtype),)


@gluon.jit
def _bring(source, row, column, rows, held, bars, stage, pred, BYTES: gl.constexpr,
           SPLIT: gl.constexpr):  # fmt: skip
    """Start the copy of a block of weights (SPLIT: of heads and of tails) into a stage."""
    parts: gl.constexpr = 2 if SPLIT else 1
    mbarrier.expect(bars.index(stage), parts * BYTES, pred=pred)
    for part in gl.static_range(parts):
        async_load(
            source, [row + part * rows, column], bars.index(stage),
            held.index(stage * parts + part), pred=pred,
        )  # fmt: skip


@gluon.jit
def _bring_block(weight, unit, stage, first, outputs, per_tap, rows, held, bars, pred,
                 BLOCKS: gl.constexpr, BLOCK_O: gl.constexpr, BLOCK_C: gl.constexpr,
                 BYTES: gl.constexpr, SPLIT: gl.constexpr):  # fmt: skip
    """The copy of the weights' unit, numbered by kernel points from `first` on, blocks of C,
    blocks of O."""
    step = unit // BLOCKS
    row = (first + step // per_tap) * outputs + unit % BLOCKS * BLOCK_O
    _bring(weight, row, step % per_tap * BLOCK_C, rows, held, bars, stage, pred, BYTES, SPLIT)


@gluon.constexpr_function
def _bytes(rows, columns):
    return 2 * rows * columns


@gluon.jit
def _fill(held, num_warps: gl.constexpr):
    """Zeros."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    rows: gl.constexpr = held.shape[0]
    columns: gl.constexpr = held.shape[1]
    held.store(gl.zeros([rows, columns], held.dtype, layout=layout))


@gluon.jit
def _product_of_zeros(x, y, MMA: gl.constexpr):
    """A first product: ptxas makes all products wait for one another if, for what it sees at a
    loop's head, a sum may come from elsewhere than a product."""
    fence_async_shared()
    barrier()
    rows: gl.constexpr = x.shape[0]
    columns: gl.constexpr = y.shape[1]
    acc = gl.zeros([rows, columns], gl.float32, layout=MMA)
    return warpgroup_mma(x, y, acc, use_acc=False, is_async=True)


@gluon.jit
def _position(q, size):
    """The q-th position: in strips of 4 rows of the last two axes, by columns in pairs, so that
    those of a program lie near each other and share corners in L1."""
    if len(size) == 1:
        return (q,)
    else:
        rows = size[len(size) - 2]
        width = size[len(size) - 1]
        lead = q // (rows * width)
        q = q % (rows * width)
        strip = q // (4 * width) * 4
        q = q % (4 * width)
        height = gl.maximum(gl.minimum(rows - strip, 4), 1)
        column = q // (2 * height) * 2
        q = q % (2 * height)
        pair = gl.minimum(width - column, 2)
        here = (strip + q // pair, column + q % pair)
        if len(size) == 3:
            here = (lead,) + here
        return here


@gluon.jit
def _ravel(point, size):
    index = point[0]
    for a in gl.static_range(1, len(size)):
        index = index * size[a] + point[a]
    return index


@gluon.jit
def _next(tap, c0, taps, BLOCK: gl.constexpr):
    """The next kernel point, or the first one and the next channels."""
    end = tap + 1 == taps
    return gl.where(end, 0, tap + 1), gl.where(end, c0 + BLOCK, c0)


@gluon.jit
def gather(image, weight, offset, mask, bias, out,
           sizes, channels, outputs, tiles, blocks, splits, count,
           POINTS_LAST: gl.constexpr, SPLIT: gl.constexpr, BLOCK_O: gl.constexpr,
           BLOCK_C: gl.constexpr, STAGES: gl.constexpr, PAIRS: gl.constexpr, MMA: gl.constexpr,
           COLUMNS: gl.constexpr, STORED: gl.constexpr, VECTOR_P: gl.constexpr,
           num_warps: gl.constexpr):  # fmt: skip
    """dF/dpoints, or where the sum is split float32 parts [splits, count] of it.

    A program takes 64 positions that lie near each other, and up to 2 PAIRS kernel points at once,
    whose samples it tabulates. Then it samples BLOCK_C channels of one kernel point after the
    other, channels outside, so that most corners are found in the cache; stores the columns; and
    multiplies columns @ weights while it loads the corners of the next ones.
    Grid: (B x tiles x blocks of O, splits of the kernel points).
    """
    dtype: gl.constexpr = image.dtype.element_ty
    factor: gl.constexpr = gl.bfloat16 if SPLIT else dtype
    parts: gl.constexpr = 2 if SPLIT else 1
    words: gl.constexpr = BLOCK_C if SPLIT else BLOCK_C // 2
    size: gl.constexpr = _bytes(BLOCK_C, BLOCK_O)
    image_size = sizes[0]
    positions = _volume(sizes[1])
    tile = gl.program_id(0) // blocks
    o0 = (gl.program_id(0) % blocks) * BLOCK_O
    b = tile // tiles
    p0 = (tile % tiles) * 64
    columns = _allocate_columns(factor, 64, BLOCK_C, SPLIT)
    held = gl.allocate_shared_memory(factor, [STAGES * parts, BLOCK_O, BLOCK_C], weight.layout)
    tables = _allocate_tables(PAIRS, 128, len(image_size), dtype)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(bars.index(s), count=1)
    idle = held.index((STAGES - 1) * parts)
    _fill(columns[0].index(1), num_warps)
    _fill(idle, num_warps)
    acc = _product_of_zeros(columns[0].index(1), idle.permute((1, 0)), MMA)

    taps = _volume(sizes[2])
    rows = taps * outputs
    first = gl.program_id(1) * taps // splits
    last = (gl.program_id(1) + 1) * taps // splits
    lane = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [num_warps], [0]))
    q = p0 + lane % 64
    point = _position(q, sizes[1])
    p = _ravel(point, sizes[1])
    inside = q < positions
    pitch = channels // BLOCK_C * words
    here = image.to(gl.pointer_type(gl.int32), bitcast=True)
    here += b.to(gl.int64) * _volume(image_size) * pitch
    here = here + gl.arange(0, words, layout=gl.SliceLayout(0, COLUMNS))[None, :]
    chunks = (last - first + 2 * PAIRS - 1) // (2 * PAIRS)
    unit = 0  # blocks of weights so far
    for chunk in range(chunks):
        start = first + chunk * (last - first) // chunks
        found = first + (chunk + 1) * (last - first) // chunks - start
        steps = found * (channels // BLOCK_C)
        new_tap = 0  # of the next block of weights to bring
        new_c0 = 0
        for s in gl.static_range(STAGES - 1):
            _bring(
                weight, (start + new_tap) * outputs + o0, new_c0, rows, held, bars,
                (unit + s) % STAGES, s < steps, size, SPLIT,
            )  # fmt: skip
            new_tap, new_c0 = _next(new_tap, new_c0, found, BLOCK_C)
        given = ()
        for j in gl.static_range(PAIRS):
            tap = start + gl.minimum(2 * j + lane // 64, found - 1)
            given = given + (_given(offset, mask, b, tap, p, point, inside, sizes),)
        for j in gl.static_range(PAIRS):
            _tabulate(tables, j, given[j], inside, 0, image_size, SPLIT)
        barrier()
        cell = _words(tables[0], 0, 64, gl.SliceLayout(1, COLUMNS))
        values = _fetch_cell(here, cell, 0, pitch, image_size)
        tap = 0
        c0 = 0
        for i in range(steps):
            now = (unit + i) % 2
            _store_columns(columns, now, _mix(values, tables, tap, 64, COLUMNS, dtype), SPLIT)
            tap, c0 = _next(tap, c0, found, words)
            # The last turn loads a block in vain instead of branching.
            cell = _words(tables[0], tap, 64, gl.SliceLayout(1, COLUMNS))
            values = _fetch_cell(here, cell, gl.minimum(c0, pitch - words), pitch, image_size)
            acc = warpgroup_mma_wait(0, deps=[acc])
            barrier()
            ahead = i + STAGES - 1
            _bring(
                weight, (start + new_tap) * outputs + o0, new_c0, rows, held, bars,
                (unit + ahead) % STAGES, ahead < steps, size, SPLIT,
            )  # fmt: skip
            new_tap, new_c0 = _next(new_tap, new_c0, found, BLOCK_C)
            stage = (unit + i) % STAGES
            mbarrier.wait(bars.index(stage), ((unit + i) // STAGES) & 1)
            head = held.index(stage * parts).permute((1, 0))
            if SPLIT:
                tail = held.index(stage * parts + 1).permute((1, 0))
                acc = warpgroup_mma(columns[1].index(now), head, acc, is_async=True)
                acc = warpgroup_mma(columns[0].index(now), tail, acc, is_async=True)
            acc = warpgroup_mma(columns[0].index(now), head, acc, is_async=True)
        unit += steps
    acc = warpgroup_mma_wait(0, deps=[acc])
    if bias is not None:
        o = o0 + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(0, MMA))
        acc += gl.load(bias + o).to(gl.float32)[None, :]
    acc = gl.convert_layout(acc.to(out.dtype.element_ty), STORED)
    base = gl.program_id(1).to(gl.int64) * count + b.to(gl.int64) * positions * outputs
    out += gl.multiple_of(base, 64)  # as point channels are
    q = p0 + gl.arange(0, 64, layout=gl.SliceLayout(1, STORED))
    p = _ravel(_position(q, sizes[1]), sizes[1])
    o = o0 + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(0, STORED))
    keep = (q < positions)[:, None] & (o >= 0)[None, :]
    if POINTS_LAST:
        place = (p * outputs)[:, None] + o[None, :]
    else:
        place = (o * positions)[None, :] + p[:, None]
        place = gl.max_contiguous(gl.multiple_of(place, (VECTOR_P, 1)), (VECTOR_P, 1))
        keep = gl.max_constancy(keep, (VECTOR_P, 1))
    gl.store(out + place, acc, mask=keep)


@gluon.jit
def _multiply(grads, block, held, stage, acc, use_acc: gl.constexpr, BLOCKS: gl.constexpr,
              SPLIT: gl.constexpr):  # fmt: skip
    """Start acc + points' block @ weights[stage]; the factors lie in shared memory."""
    if SPLIT:
        head = grads.index(block)
        tail = grads.index(BLOCKS + block)
        acc = warpgroup_mma(tail, held.index(2 * stage), acc, use_acc=use_acc, is_async=True)
        acc = warpgroup_mma(head, held.index(2 * stage + 1), acc, is_async=True)
        return warpgroup_mma(head, held.index(2 * stage), acc, is_async=True)
    else:
        return warpgroup_mma(
            grads.index(block), held.index(stage), acc, use_acc=use_acc, is_async=True
        )


@gluon.jit
def along(image, points, weight, offset, mask, grad_offset, grad_mask, grad_image,
          sizes, channels, outputs, tiles, splits,
          SPLIT: gl.constexpr, BLOCK_P: gl.constexpr, BLOCK_O: gl.constexpr,
          BLOCKS: gl.constexpr, BLOCK_C: gl.constexpr, STAGES: gl.constexpr, MMA: gl.constexpr,
          COLUMNS: gl.constexpr, SECTORS: gl.constexpr, ROWS: gl.constexpr,
          num_warps: gl.constexpr):  # fmt: skip
    """dF/doffset and dF/dmask, and dF/dimage (float32) by atomic additions, each unless None;
    from points in rows [B, P, O].

    The points' tile stays in shared memory, all BLOCKS of O; weights come a block of O at a time.
    Of the next product's blocks those that are there already are multiplied before this one's
    results are used (EARLY), the others, whose stages it has just freed, after. Atomic additions
    go by SECTORS, where two lanes fill 32 bytes. Grid: (B x tiles, splits of the kernel points).
    """
    dtype: gl.constexpr = gl.bfloat16 if SPLIT else points.dtype.element_ty
    parts: gl.constexpr = 2 if SPLIT else 1
    size: gl.constexpr = _bytes(BLOCK_O, BLOCK_C)
    EARLY: gl.constexpr = BLOCKS if STAGES >= 2 * BLOCKS else STAGES - BLOCKS
    rank: gl.constexpr = len(sizes[0])
    by_position: gl.constexpr = grad_offset is not None or grad_mask is not None
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
        dtype, [parts * BLOCKS, BLOCK_P, BLOCK_O],
        gl.NVMMASharedLayout.get_default_for([BLOCK_P, BLOCK_O], dtype),
    )  # fmt: skip
    p = p0 + gl.arange(0, BLOCK_P, layout=gl.SliceLayout(1, ROWS))
    o = gl.arange(0, BLOCK_O, layout=gl.SliceLayout(0, ROWS))
    points += b.to(gl.int64) * positions * outputs
    here = (p < positions)[:, None] & (o < outputs)[None, :]
    for j in gl.static_range(BLOCKS):
        source = (p * outputs + j * BLOCK_O)[:, None] + o[None, :]
        tile = _parts(gl.load(points + source, mask=here, other=0.0), dtype, SPLIT)
        for part in gl.static_range(parts):
            grads.index(part * BLOCKS + j).store(tile[part])
    held = gl.allocate_shared_memory(dtype, [STAGES * parts, BLOCK_O, BLOCK_C], weight.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(bars.index(s), count=1)
    fence_async_shared()
    barrier()
    rows = taps * outputs
    for s in gl.static_range(STAGES):
        _bring_block(weight, s, s, first, outputs, per_tap, rows, held, bars, s < steps * BLOCKS,
                     BLOCKS, BLOCK_O, BLOCK_C, size, SPLIT)  # fmt: skip
    p = p0 + gl.arange(0, BLOCK_P, layout=at_row)
    inside = p < positions
    point = _unravel(p, sizes[1])
    start = b.to(gl.int64) * _volume(image_size) * channels
    if by_position:
        image += start
        image_block = image + gl.arange(0, BLOCK_C, layout=gl.SliceLayout(0, COLUMNS))[None, :]
    if grad_image is not None:
        grad_image += start
    zero = gl.zeros([BLOCK_P, BLOCK_C], gl.float32, layout=MMA)
    acc = zero
    for j in gl.static_range(BLOCKS):
        mbarrier.wait(bars.index(j), 0)
        acc = _multiply(grads, j, held, j, acc, j > 0, BLOCKS, SPLIT)
    i = 0
    for tap in range(first, last):
        axes, amplitude, valid = _locate(offset, mask, b, tap, p, point, inside, sizes)
        code = _code(axes, image_size)
        dots = ()
        for _ in gl.static_range(2**rank):
            dots = dots + (gl.zeros([BLOCK_P], gl.float32, layout=at_row),)
        for block in range(per_tap):
            values = ()
            if by_position:
                values = _fetch(image_block, code, block * BLOCK_C, channels, image_size)
            grad = warpgroup_mma_wait(0, deps=[acc])
            barrier()
            for j in gl.static_range(BLOCKS):
                ahead = i * BLOCKS + j + STAGES
                _bring_block(weight, ahead, ahead % STAGES, first, outputs, per_tap, rows, held,
                             bars, ahead < steps * BLOCKS, BLOCKS, BLOCK_O, BLOCK_C, size,
                             SPLIT)  # fmt: skip
            # The last turn multiplies its own blocks again, to no end, instead of branching.
            i1 = gl.minimum(i + 1, steps - 1) * BLOCKS
            acc = zero
            for j in gl.static_range(EARLY):
                mbarrier.wait(bars.index((i1 + j) % STAGES), ((i1 + j) // STAGES) & 1)
                acc = _multiply(grads, j, held, (i1 + j) % STAGES, acc, j > 0, BLOCKS, SPLIT)
            grad = gl.reshape(grad, [BLOCK_P, BLOCK_C // 32, 4, 4, 2])
            grad = gl.reshape(gl.permute(grad, (0, 1, 3, 2, 4)), [BLOCK_P, BLOCK_C])
            grad = gl.convert_layout(grad, COLUMNS)
            if by_position:
                new = ()
                for q in gl.static_range(2**rank):
                    new = new + (dots[q] + gl.sum(values[q].to(gl.float32) * grad, 1),)
                dots = new
            if grad_image is not None:
                for q in gl.static_range(2**rank):
                    factor = _corner_weight(axes, q) * amplitude
                    place = _place(code, q, channels, image_size) + block * BLOCK_C
                    touched = gl.convert_layout((valid & (factor != 0.0)).to(gl.int32),
                                                gl.SliceLayout(1, SECTORS))  # fmt: skip
                    place = gl.convert_layout(place, gl.SliceLayout(1, SECTORS))
                    c = gl.arange(0, BLOCK_C, layout=gl.SliceLayout(0, SECTORS))
                    gl.atomic_add(
                        grad_image + (place[:, None] + c[None, :]),
                        gl.convert_layout(grad * factor[:, None], SECTORS),
                        mask=(touched != 0)[:, None] & (c >= 0)[None, :],
                        sem="relaxed",
                    )
            for j in gl.static_range(EARLY, BLOCKS):
                mbarrier.wait(bars.index((i1 + j) % STAGES), ((i1 + j) // STAGES) & 1)
                acc = _multiply(grads, j, held, (i1 + j) % STAGES, acc, True, BLOCKS, SPLIT)
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


@gluon.constexpr_function
def _product(sizes):
    product = 1
    for s in sizes:
        product *= s
    return product


@gluon.jit
def _start(tile, tiles, TILE: gl.constexpr):
    """A tile's batch item and the place of its first position in it."""
    b = tile // _volume(tiles)
    at = _unravel(tile % _volume(tiles), tiles)
    first = ()
    for a in gl.static_range(len(TILE)):
        first = first + (at[a] * TILE[a],)
    return b, first


@gluon.jit
def _next_tile(b, first, tiles, TILE: gl.constexpr):
    """As _start, of the next tile."""
    new = ()
    carry = 1
    for i in gl.static_range(len(TILE)):
        at = first[len(TILE) - 1 - i] + carry * TILE[len(TILE) - 1 - i]
        over = at >= tiles[len(TILE) - 1 - i] * TILE[len(TILE) - 1 - i]
        carry = gl.where(over, 1, 0)
        new = (gl.where(over, 0, at),) + new
    return b + carry, new


@gluon.jit
def _bring_points(points, b, batch, first, o0, held, bars, stage, pred, parts: gl.constexpr):
    """Start the copy of a tile of points (of heads, then of tails) into a stage."""
    for part in gl.static_range(parts):
        async_load(
            points, (b + part * batch,) + first + (o0,), bars.index(stage),
            held.index(stage * parts + part), pred=pred,
        )  # fmt: skip


@gluon.jit
def _read(offset, mask, tile, last, tap, lane, sizes, tiles, TILE: gl.constexpr):
    """Positions `lane` of tiles: (batch item, what _given reads, whether they are to be used)."""
    b, first = _start(gl.minimum(tile, last - 1), tiles, TILE)
    local = _unravel(lane, TILE)
    extent = sizes[1] if len(TILE) == len(sizes[1]) else (_volume(sizes[1]),)
    inside = tile < last
    p = 0 * lane
    point = ()
    for a in gl.static_range(len(TILE)):
        at = first[a] + local[a]
        inside = inside & (at < extent[a])
        p = p * extent[a] + at
        point = point + (at,)
    if len(TILE) != len(sizes[1]):
        point = _unravel(p, sizes[1])
    return b, _given(offset, mask, b, tap, p, point, inside, sizes), inside


@gluon.jit
def outer(image, points, offset, mask, out,
          sizes, batch, channels, outputs, tiles, splits,
          SPLIT: gl.constexpr, TILE: gl.constexpr, BLOCK_O: gl.constexpr, BLOCK_C: gl.constexpr,
          STAGES: gl.constexpr, LISTED: gl.constexpr, MMA: gl.constexpr, COLUMNS: gl.constexpr,
          num_warps: gl.constexpr):  # fmt: skip
    """dF/dweight: partial sums [splits, K, C, O], from points [B, ..., O] in tiles (of heads, then
    of tails, [2 x B, ..., O]).

    A program samples a tile of positions for BLOCK_C channels of one kernel point, stores the
    columns, and multiplies columns^T @ points while it loads the corners of its next tile. Samples
    are tabulated for LISTED tiles at once. Two half numbers are a word throughout, or each would
    take a register.

    TILE has as many axes as the positions, or one along all of them.
    SPLIT: tensor cores, which round toward zero, add up no more than a tile.
    Grid: (blocks of C x K x blocks of O, splits).
    """
    dtype: gl.constexpr = image.dtype.element_ty
    factor: gl.constexpr = gl.bfloat16 if SPLIT else dtype
    parts: gl.constexpr = 2 if SPLIT else 1
    words: gl.constexpr = BLOCK_C if SPLIT else BLOCK_C // 2
    block_p: gl.constexpr = _product(TILE)
    size: gl.constexpr = parts * _bytes(block_p, BLOCK_O)
    pixels = _volume(sizes[0])
    taps = _volume(sizes[2])
    blocks = outputs // BLOCK_O
    o0 = gl.program_id(0) % blocks * BLOCK_O
    tap = gl.program_id(0) // blocks % taps
    c0 = gl.program_id(0) // blocks // taps * BLOCK_C
    split = gl.program_id(1)
    total = batch * _volume(tiles)
    first = split * (total // splits) + gl.minimum(split, total % splits)
    last = first + total // splits + gl.where(split < total % splits, 1, 0)

    columns = _allocate_columns(factor, block_p, BLOCK_C, SPLIT)
    held = gl.allocate_shared_memory(factor, [STAGES * parts] + points.block_shape, points.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    tables = _allocate_tables(2, LISTED * block_p, len(sizes[0]), dtype)
    for s in gl.static_range(STAGES):
        mbarrier.init(bars.index(s), count=1)
    fence_async_shared()
    barrier()
    b, at = _start(first, tiles, TILE)
    for s in gl.static_range(STAGES - 1):
        mbarrier.expect(bars.index(s), size, pred=first + s < last)
        _bring_points(points, b, batch, at, o0, held, bars, s, first + s < last, parts)
        b, at = _next_tile(b, at, tiles, TILE)

    lane = gl.arange(0, LISTED * block_p, layout=gl.BlockedLayout([1], [32], [num_warps], [0]))
    ahead = lane // block_p
    lane = lane % block_p
    item, given, inside = _read(offset, mask, first + ahead, last, tap, lane, sizes, tiles, TILE)
    _tabulate(tables, 0, given, inside, item * pixels, sizes[0], SPLIT)
    y = held.index((STAGES - 1) * parts).reshape([block_p, BLOCK_O])
    _fill(columns[0].index(1), num_warps)
    _fill(y, num_warps)
    product = _product_of_zeros(columns[0].index(1).permute((1, 0)), y, MMA)
    acc = gl.zeros([BLOCK_C, BLOCK_O], gl.float32, layout=MMA)
    c = c0 // BLOCK_C * words + gl.arange(0, words, layout=gl.SliceLayout(0, COLUMNS))
    here = image.to(gl.pointer_type(gl.int32), bitcast=True) + c[None, :]
    pitch = channels // BLOCK_C * words
    cell = _words(tables[0], 0, block_p, gl.SliceLayout(1, COLUMNS))
    values = _fetch_cell(here, cell, 0, pitch, sizes[0])
    for i in range(last - first):
        refill = i % LISTED == 0
        if refill:
            tile = first + i + LISTED + ahead
            item, given, inside = _read(offset, mask, tile, last, tap, lane, sizes, tiles, TILE)
        row = i % (2 * LISTED)
        _store_columns(columns, i % 2, _mix(values, tables, row, block_p, COLUMNS, dtype), SPLIT)
        # Tabulated are the tiles up to a chunk's end; past the last one they are unused.
        row = (i + 1) % (2 * LISTED)
        cell = _words(tables[0], row, block_p, gl.SliceLayout(1, COLUMNS))
        values = _fetch_cell(here, cell, 0, pitch, sizes[0])
        stage = (i + STAGES - 1) % STAGES
        more = first + i + STAGES - 1 < last
        mbarrier.expect(bars.index(stage), size, pred=more)
        product = warpgroup_mma_wait(0, deps=[product])
        if SPLIT:  # in volatile assembly, or LLVM moves it past the start of the next product
            acc = gl.inline_asm_elementwise(
                "add.f32 $0, $1, $2;", "=f,f,f", [acc, product], gl.float32, is_pure=False, pack=1
            )
        barrier()
        _bring_points(points, b, batch, at, o0, held, bars, stage, more, parts)
        b, at = _next_tile(b, at, tiles, TILE)
        stage = i % STAGES
        mbarrier.wait(bars.index(stage), (i // STAGES) & 1)
        x_head = columns[0].index(i % 2).permute((1, 0))
        y_head = held.index(stage * parts).reshape([block_p, BLOCK_O])
        if SPLIT:
            x_tail = columns[1].index(i % 2).permute((1, 0))
            y_tail = held.index(stage * parts + 1).reshape([block_p, BLOCK_O])
            product = warpgroup_mma(x_tail, y_head, product, use_acc=False, is_async=True)
            product = warpgroup_mma(x_head, y_tail, product, is_async=True)
            product = warpgroup_mma(x_head, y_head, product, is_async=True)
        else:
            product = warpgroup_mma(x_head, y_head, product, is_async=True)
        if refill:
            row = (i // LISTED + 1) % 2
            _tabulate(tables, row, given, inside, item * pixels, sizes[0], SPLIT)
    acc += warpgroup_mma_wait(0, deps=[product])
    c = c0 + gl.arange(0, BLOCK_C, layout=gl.SliceLayout(1, MMA))
    o = o0 + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(0, MMA))
    place = ((split * taps + tap).to(gl.int64) * channels + c) * outputs
    gl.store(out + (place[:, None] + o[None, :]), acc)
