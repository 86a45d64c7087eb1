"""Tables of samples in shared memory, and the columns of products that are made from them.

One lane finds a sample, and many lanes read what it has found. A table has a row of 64 samples for
every turn of a kernel's loop. In a sample's cell (sampling.py, Note [samples]) one corner is the
first on every axis, and the other one is a step of -1, 0 or 1 away from it:

    cells     pixel of the first corner | step | step      two bits for a step on each axis
    weights   those of all corners, times the mask; two to a word unless float32
    lost      only for float16: what the last weight has lost by rounding, twice in a word

On each axis the corner that weighs less is first (sampling.py, lighter_first). What the last
corner's weight has lost in float16 is added to the sample, too.

All numbers of an image are read as words of 32 bits, which are one float32 number or two numbers of
16 bits. Alone, each of the two would take a register.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from .. import sampling
from . import common

SAMPLES = gl.constexpr(64)  # the samples of a row


@gluon.constexpr_function
def log2(n):
    return n.bit_length() - 1


@gluon.constexpr_function
def twos(count, n):
    return [count] + [2] * log2(n)


@gluon.jit
def pack(low, high):
    """Two weights in float16, as the halves of a word."""
    a = low.to(gl.float16).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    b = high.to(gl.float16).to(gl.int16, bitcast=True).to(gl.int32) << 16
    return a | b


@gluon.jit
def together(words):
    """Some tensors [P], as many as a power of two, as one tensor [P, number of tensors]."""
    count: gl.constexpr = len(words)
    for _ in gl.static_range(log2(count)):
        pairs = ()
        for i in gl.static_range(len(words) // 2):
            pairs = pairs + (gl.join(words[i], words[i + len(words) // 2]),)
        words = pairs
    return gl.reshape(words[0], [words[0].shape[0], count])


@gluon.jit
def apart(x):
    """Undo `together`: the tensors [P] that one [P, number of tensors] was made from."""
    words = (gl.reshape(x, twos(x.shape[0], x.shape[1])),)
    for _ in gl.static_range(log2(x.shape[1])):
        low = ()
        high = ()
        for i in gl.static_range(len(words)):
            y, z = gl.split(words[i])
            low = low + (y,)
            high = high + (z,)
        words = low + high
    return words


@gluon.jit
def allocate(rows: gl.constexpr, rank: gl.constexpr, dtype: gl.constexpr):
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    square: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    words: gl.constexpr = 2**rank if dtype == gl.float32 else 2 ** (rank - 1)
    tables = (
        gl.allocate_shared_memory(gl.int32, [rows, SAMPLES], plain),
        gl.allocate_shared_memory(gl.int32, [rows, SAMPLES, words], square),
    )
    if dtype == gl.float16:
        tables = tables + (gl.allocate_shared_memory(gl.int32, [rows, SAMPLES], plain),)
    return tables


@gluon.constexpr_function
def rows_together(shape, count):
    return [shape[0] * shape[1] // count, count, *shape[2:]]


@gluon.jit
def put(table, i, x):
    """Store x as the i-th run of samples of a table, where all runs are as long as x."""
    shape: gl.constexpr = rows_together(table.shape, x.shape[0])
    layout: gl.constexpr = table.layout
    common.reinterpret(table, gl.int32, shape, layout).index(i).store(x.to(gl.int32, bitcast=True))


@gluon.jit
def tabulate(tables, i, known, g):
    """Store samples as the i-th run of the tables. What is `known` of them is where they start,
    what they read (sampling.py), whether they exist, and how many pixels lie before their
    image's."""
    starts, given, inside, before = known
    rank: gl.constexpr = len(g.image)
    axes, valid = sampling.cell_of(given[0], starts, inside, g)
    amplitude = sampling.amplitude_of(given[1], valid)
    axes = sampling.lighter_first(axes)
    pixel = 0
    steps = 0
    for a in gl.static_range(rank):
        pixel = pixel * g.image[a] + axes[a][0]
        steps = steps * 4 + (axes[a][1] & 3)
    put(tables[0], i, (before + pixel) * 4**rank + steps)
    weights = ()
    for q in gl.static_range(2**rank):
        weights = weights + (sampling.corner_weight(axes, q) * amplitude,)
    words = weights
    if tables[1].shape[2] < 2**rank:
        words = ()
        for q in gl.static_range(2 ** (rank - 1)):
            words = words + (pack(weights[2 * q], weights[2 * q + 1]),)
    put(tables[1], i, together(words))
    if len(tables) > 2:
        lost = sampling.lost_in_half(weights[2**rank - 1])
        put(tables[2], i, pack(lost, lost))


@gluon.constexpr_function
def columns_layout(words, warps):
    """The layout of columns [64, words] in registers. Eight lanes load 128 bytes of a corner, which
    is what the cache gives at once."""
    across = min(words, 32) // 4
    return gl.BlockedLayout([1, 4], [32 // across, across], [warps, 1], [1, 0])


@gluon.jit
def fetch(image, tables, row, c0, pitch, g, COLUMNS: gl.constexpr):
    """The values of the corners of a row of samples, in words. A pixel has `pitch` words."""
    rank: gl.constexpr = len(g.image)
    cell = tables[0].index(row).load(gl.SliceLayout(1, COLUMNS))
    values = ()
    for q in gl.static_range(2**rank):
        place = (cell >> (2 * rank)) * pitch + c0
        stride = pitch
        for i in gl.static_range(rank):
            if (q >> i) & 1:
                place += ((cell << (30 - 2 * i)) >> 30) * stride
            stride = stride * g.image[rank - 1 - i]
        values = values + (gl.load(image + place[:, None]),)
    return values


@gluon.constexpr_function
def together_layout(layout, n):
    """The layout of n words for every row of a tensor that has the given BlockedLayout."""
    each, threads, warps = layout.size_per_thread, layout.threads_per_warp, layout.warps_per_cta
    return gl.SliceLayout(
        2,
        gl.BlockedLayout(
            [each[0], n, each[1]], [threads[0], 1, threads[1]], [warps[0], 1, warps[1]], [2, 1, 0]
        ),
    )


@gluon.jit
def mix(values, tables, row, COLUMNS: gl.constexpr):
    """The sum of the corners' values times their weights, in words. Values of float16 are
    multiplied as they are, and those of bfloat16 in float32."""
    count: gl.constexpr = len(values)
    at_row: gl.constexpr = gl.SliceLayout(1, COLUMNS)
    layout: gl.constexpr = together_layout(COLUMNS, tables[1].shape[2])
    words = apart(tables[1].index(row).load(layout))
    args = values
    for w in gl.static_range(len(words)):
        args = args + (gl.convert_layout(words[w], at_row)[:, None],)
    if len(tables) > 2:
        args = args + (tables[2].index(row).load(at_row)[:, None],)
    if len(words) == count:
        total = values[0].to(gl.float32, bitcast=True) * args[count].to(gl.float32, bitcast=True)
        for q in gl.static_range(1, count):
            weight = args[count + q].to(gl.float32, bitcast=True)
            total += values[q].to(gl.float32, bitcast=True) * weight
        return total
    else:
        return gl.inline_asm_elementwise(
            sum_of_products(count, len(tables) > 2), registers(len(args)), args, gl.int32,
            is_pure=True, pack=1,
        )  # fmt: skip


@gluon.constexpr_function
def registers(count):
    """The constraints of assembly that reads this many registers and writes one."""
    return ",".join(["=r"] + ["r"] * count)


@gluon.constexpr_function
def sum_of_products(count, half):
    """Assembly for the sum of `count` pairs of numbers times weights, which are float16, two to a
    word. For float16 numbers (half) it begins with the last pair times what its weight has lost."""
    lines = [".reg .b16 l, h; .reg .b32 v, s; .reg .f32 x, y, w, a, b;"]
    if half:
        lines.append(f"mul.rn.f16x2 s, ${count}, ${1 + count + count // 2};")
    for q in range(count):
        weight = "lh"[q % 2]
        lines.append(f"mov.b32 {{l, h}}, ${1 + count + q // 2};")
        if half:
            lines.append(f"mov.b32 v, {{{weight}, {weight}}}; fma.rn.f16x2 s, ${1 + q}, v, s;")
        else:
            lines.append(f"cvt.f32.f16 w, {weight};")
            lines.append(f"shl.b32 x, ${1 + q}, 16; and.b32 y, ${1 + q}, 0xFFFF0000;")
            if q == 0:
                lines.append("mul.f32 a, x, w; mul.f32 b, y, w;")
            else:
                lines.append("fma.rn.f32 a, x, w, a; fma.rn.f32 b, y, w, b;")
    lines.append("mov.b32 $0, s;" if half else "cvt.rn.bf16x2.f32 $0, b, a;")
    return "{ " + " ".join(lines) + " }"


@gluon.jit
def allocate_columns(channels: gl.constexpr, factor: gl.constexpr, PRECISION: gl.constexpr):
    """Room for the parts (sampling.py, Note [precision]) of two blocks of columns, since one is
    multiplied while the next one is stored."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SAMPLES.value, channels], factor)
    columns = ()
    # The parts are allocated apart. Otherwise Triton would take a store of one part for a store of
    # the other as well, and wait between them.
    for _ in gl.static_range(common.parts_in(PRECISION)):
        columns = columns + (gl.allocate_shared_memory(factor, [2, SAMPLES, channels], layout),)
    return columns


@gluon.jit
def columns_at(columns, i, TURNED: gl.constexpr = False):
    """The parts of the i-th of the two blocks of columns as a factor, or (TURNED) its
    transpose's."""
    parts = ()
    for part in gl.static_range(len(columns)):
        x = columns[part].index(i)
        if TURNED:
            x = x.permute((1, 0))
        parts = parts + (x,)
    return parts


@gluon.jit
def store_columns(columns, i, x):
    """Store columns that `mix` has made, as the parts of the i-th factor."""
    if len(columns) > 1:
        parts = sampling.parts_of(x, gl.bfloat16, "bf16x3")
        columns[0].index(i).store(parts[0])
        columns[1].index(i).store(parts[1])
    else:
        shape: gl.constexpr = [2, x.shape[0], x.shape[1]]
        layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(shape[1:], gl.int32)
        common.reinterpret(columns[0], gl.int32, shape, layout).index(i).store(x)
    fence_async_shared()
