"""Triton kernels of the bilinear form (geometry.py, Note [one bilinear form]).

Every kernel serves one, two and three axes: sizes are tuples, and loops over axes and corners
unroll. Letters: B batch, P positions of the points, K kernel points, S pixels of the image,
C image channels, O point channels.

Note [units]
A unit is a run of image channels that shares one offset group and one mask group; `unit` is its
length U. Positions, cells and corner weights are found once per (position, kernel point, unit).
  wide    UNITS == TAPS == 1: one unit at a time, its channels in blocks of BLOCK_C. The image
          lies in rows of pixels [B, S, C] (channels last).
  narrow  UNITS units of TAPS kernel points at once, each padded to BLOCK_C channels (a power of
          two). The image lies in planes [B, C / U, S, BLOCK_C], so that the two corners of a
          cell along the last axis are neighbours in memory.
Weights lie as [K, O, C / groups]; in "split" precision as two such arrays, the bfloat16 heads
and what they leave. Points are [B, P, O] or [B, O, P] (POINTS_LAST or not).

Note [precision]
"native" multiplies half and bfloat16 numbers as they are, "tf32" rounds float32 ones to TF32,
"ieee" does not (no tensor cores). "split" writes each float32 factor as head + tail in bfloat16
and adds three products: relative error 4e-6 in a sum of many terms, at three times the cost of
one half product. All sums are in float32; tensor cores round theirs toward zero, so the longest
ones take them only a tile at a time in "split" (_dot_once), which is ten times more accurate.

Note [corners]
A position is valid in [-1, size) on every axis; NaN and infinity are not. A corner outside
the image is moved inside and gets weight 0 along its axis, so a load needs no predicate;
an invalid sample has amplitude 0. No float is converted that an integer cannot hold. Only the
offset is split into floor and fraction, not the position, whose fraction float32 rounds the more
the larger the image is.
"""

# Tuples of Triton grow by +, and a name of an outer loop must not be taken for another type.
# ruff: noqa: RUF005, RUF059, B007

import triton
import triton.language as tl


@triton.jit
def _volume(size):
    volume = size[0]
    for a in tl.static_range(1, len(size)):
        volume = volume * size[a]
    return volume


@triton.jit
def _unravel(index, size):
    """Coordinates of a row-major index."""
    point = ()
    for a in tl.static_range(len(size)):
        point = (index % size[len(size) - 1 - a],) + point
        index = index // size[len(size) - 1 - a]
    return point


@triton.jit
def _positions(offset, b, group, groups, tap, p, inside, sizes):
    """Per axis (floor, fraction) of where kernel point `tap` of the points p samples, and whether
    that is valid (Note [corners]).

    group may be a scalar with p [N], or [M, 1] with p [1, N].
    """
    image_size, point_size, kernel_size, stride, padding, dilation = sizes
    point = _unravel(p, point_size)
    shift = _unravel(tap, kernel_size)
    valid = inside
    positions = ()
    base = (b.to(tl.int64) * groups + group) * _volume(kernel_size) + tap
    for a in tl.static_range(len(image_size)):
        low = point[a] * stride[a] - padding[a] + shift[a] * dilation[a]
        if offset is not None:
            place = (base * len(image_size) + a) * _volume(point_size) + p
            value = tl.load(offset + place, mask=inside, other=0.0).to(tl.float32)
            near = tl.abs(value) < 1.0e9
            value = tl.where(near, value, 0.0)
            floor = tl.floor(value)
            low += floor.to(tl.int32)
            fraction = value - floor
            valid = valid & near
        else:
            fraction = tl.zeros(low.shape, tl.float32)
        valid = valid & (low >= -1) & (low < image_size[a])
        positions = positions + ((low, fraction),)
    return positions, valid


@triton.jit
def _amplitude(mask, b, group, groups, tap, p, inside, valid, sizes):
    """The mask's value; where the sample is not valid 0 times that, which is NaN if the mask is
    not finite: the definition multiplies a sample of 0 by it."""
    amplitude = tl.where(valid, 1.0, 0.0)
    if mask is not None:
        place = (b.to(tl.int64) * groups + group) * _volume(sizes[2]) + tap
        value = tl.load(mask + place * _volume(sizes[1]) + p, mask=inside, other=0.0)
        value = value.to(tl.float32)
        amplitude = tl.where(valid, value, value * 0.0)
    return amplitude


@triton.jit
def _cell(positions, valid, image_size):
    """Per axis: (low, high) indices inside the image, their weights, their derivatives."""
    indices = ()
    weights = ()
    slopes = ()
    for a in tl.static_range(len(image_size)):
        low = tl.where(valid, positions[a][0], 0)
        fraction = positions[a][1]
        has_low = low >= 0
        has_high = low + 1 < image_size[a]
        indices = indices + ((tl.maximum(low, 0), tl.minimum(low + 1, image_size[a] - 1)),)
        weights = weights + (
            (tl.where(has_low, 1.0 - fraction, 0.0), tl.where(has_high, fraction, 0.0)),
        )
        slopes = slopes + ((tl.where(has_low, -1.0, 0.0), tl.where(has_high, 1.0, 0.0)),)
    return indices, weights, slopes


@triton.jit
def _corner_row(indices, image_size, q: tl.constexpr):
    """The pixel of corner q; the bits of q choose low or high, the last axis is bit 0."""
    row = indices[0][(q >> (len(image_size) - 1)) & 1]
    for a in tl.static_range(1, len(image_size)):
        row = row * image_size[a] + indices[a][(q >> (len(image_size) - 1 - a)) & 1]
    return row


@triton.jit
def _corner_weight(weights, slopes, q: tl.constexpr, along: tl.constexpr):
    """Weight of corner q; its derivative along an axis if `along` >= 0."""
    if along == 0:
        weight = slopes[0][(q >> (len(weights) - 1)) & 1]
    else:
        weight = weights[0][(q >> (len(weights) - 1)) & 1]
    for a in tl.static_range(1, len(weights)):
        if a == along:
            weight = weight * slopes[a][(q >> (len(weights) - 1 - a)) & 1]
        else:
            weight = weight * weights[a][(q >> (len(weights) - 1 - a)) & 1]
    return weight


@triton.jit
def _blend(value, weight, HALF: tl.constexpr):
    """value * weight, in float32 unless HALF allows half numbers to stay half.

    Rounding to half after every corner makes a forward 4.4e-4 wrong instead of 3e-4.
    """
    if HALF and value.dtype == tl.float16:
        return value * weight.to(tl.float16)
    else:
        return value.to(tl.float32) * weight


@triton.jit
def _parts(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """The factors that stand for x in a product (Note [precision])."""
    if PRECISION == "split":
        head = x.to(tl.bfloat16)
        return (head, (x - head.to(tl.float32)).to(tl.bfloat16))
    else:
        return (x.to(dtype),)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if PRECISION == "split":
        acc = tl.dot(a[1], b[0], acc)
        acc = tl.dot(a[0], b[1], acc)
        return tl.dot(a[0], b[0], acc)
    elif PRECISION != "native":
        return tl.dot(a[0], b[0], acc, input_precision=PRECISION)
    else:
        return tl.dot(a[0], b[0], acc)


@triton.jit
def _dot_once(a, b, acc, PRECISION: tl.constexpr):
    """As _dot, but where it counts tensor cores add up this one product only."""
    if PRECISION == "split":
        return acc + _dot(a, b, tl.zeros(acc.shape, tl.float32), PRECISION)
    else:
        return _dot(a, b, acc, PRECISION)


@triton.jit
def _load_weight(weight, tap, o, o_in, c, c_in, outputs, group_in, group_out, weights,
                 GROUPED: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Factors of weight[tap, o, c] [len(o), len(c)], 0 where o and c are of different groups.

    tap may be a scalar, or one for each channel [1, len(c)].
    """
    inside = o_in[:, None] & c_in[None, :]
    row = tl.multiple_of((tap * outputs + o[:, None]) * group_in, (VECTOR, VECTOR))
    if GROUPED:
        first = tl.multiple_of((o // group_out) * group_in, VECTOR)
        column = c[None, :] - first[:, None]
        inside = inside & (column >= 0) & (column < group_in)
        place = row + column
    else:
        place = row + c[None, :]
    head = tl.load(weight + place, mask=inside, other=0.0)
    if PRECISION == "split":
        return (head, tl.load(weight + weights + place, mask=inside, other=0.0))
    else:
        return (head,)


@triton.jit
def _transpose_parts(parts, PRECISION: tl.constexpr):
    if PRECISION == "split":
        return (tl.trans(parts[0]), tl.trans(parts[1]))
    else:
        return (tl.trans(parts[0]),)


@triton.jit
def _points_at(b, p, o, positions, outputs, POINTS_LAST: tl.constexpr, VECTOR: tl.constexpr):
    """Where points[b, o, p] lie [len(p), len(o)]."""
    if POINTS_LAST:
        row = tl.multiple_of((b.to(tl.int64) * positions + p) * outputs, VECTOR)
        return row[:, None] + o[None, :]
    else:
        return (b.to(tl.int64) * outputs + o)[None, :] * positions + p[:, None]


@triton.jit
def _item(b, item, VECTOR: tl.constexpr):
    """Where the image of a batch item starts. The host alone knows how many elements an item has
    (layouts.py, image_rows): a unit may be padded, whether or not the kernel takes several."""
    return tl.multiple_of(b.to(tl.int64) * item, VECTOR)


@triton.jit
def _wide_columns(image, indices, weights, amplitude, image_size, channels, c, c_in,
                  INDEX: tl.constexpr, VECTOR: tl.constexpr, EVEN: tl.constexpr,
                  HALF: tl.constexpr):  # fmt: skip
    """Sample channels c of one unit at one position each: [len(position), len(c)]."""
    columns = None
    for q in tl.static_range(2 ** len(image_size)):
        row = _corner_row(indices, image_size, q).to(INDEX)
        place = tl.multiple_of(row * channels, VECTOR)[:, None] + c[None, :]
        if EVEN:
            value = tl.load(image + place)
        else:
            value = tl.load(image + place, mask=c_in[None, :], other=0.0)
        term = _blend(value, (_corner_weight(weights, None, q, -1) * amplitude)[:, None], HALF)
        if q == 0:
            columns = term
        else:
            columns += term
    return columns


@triton.jit
def _narrow_cells(offset, mask, b, u0, units, offset_units, mask_units, tap, stop, p, inside, sizes,
                  UNITS: tl.constexpr, TAPS: tl.constexpr):  # fmt: skip
    """What the units from u0 sample for the kernel points from `tap` to before `stop`.

    The unit and the kernel point of each of UNITS x TAPS rows; then by row and position: whether
    there is such a sample, whether it is valid, its amplitude, and its _cell.
    """
    row = tl.arange(0, UNITS * TAPS)[:, None]
    u = u0 + row % UNITS
    k = tap + row // UNITS
    here = (u < units) & (k < stop) & inside[None, :]
    u = tl.minimum(u, units - 1)
    k = tl.minimum(k, stop - 1)
    at, valid = _positions(
        offset, b, u // offset_units, units // offset_units, k, p[None, :], here, sizes
    )
    amplitude = _amplitude(
        mask, b, u // mask_units, units // mask_units, k, p[None, :], here, valid, sizes
    )
    return u, k, here, valid, amplitude, _cell(at, valid, sizes[0])


@triton.jit
def _narrow_lanes(u0, units, unit, tap, stop, UNITS: tl.constexpr, TAPS: tl.constexpr,
                  BLOCK_C: tl.constexpr):  # fmt: skip
    """The channel and the kernel point of every lane of those rows, and whether they are one."""
    lane = tl.arange(0, UNITS * TAPS * BLOCK_C)
    u = u0 + lane // BLOCK_C % UNITS
    k = tap + lane // (UNITS * BLOCK_C)
    c_in = (lane % BLOCK_C < unit) & (u < units) & (k < stop)
    return u * unit + lane % BLOCK_C, k, c_in


@triton.jit
def _narrow_columns(image, plane, indices, weights, amplitude, image_size, INDEX: tl.constexpr,
                    BLOCK_C: tl.constexpr):  # fmt: skip
    """Sample whole units, in float32: [rows of _narrow_cells, len(position), BLOCK_C].

    Triton 3.9 does not compile products of half numbers that are reshaped after they were added.
    """
    columns = None
    j = tl.arange(0, BLOCK_C)[None, None, :]
    for q in tl.static_range(2 ** len(image_size)):
        row = plane + _corner_row(indices, image_size, q).to(INDEX)
        value = tl.load(image + ((row * BLOCK_C)[:, :, None] + j))
        weight = _corner_weight(weights, None, q, -1) * amplitude
        term = _blend(value, weight[:, :, None], False)
        if q == 0:
            columns = term
        else:
            columns += term
    return columns


@triton.jit
def gather(image, weight, offset, mask, bias, out,
           sizes, channels, unit, outputs, group_in, group_out, offset_units, mask_units,
           weights, item, tiles, blocks, splits,
           POINTS_LAST: tl.constexpr, GROUPED: tl.constexpr, PRECISION: tl.constexpr,
           INDEX: tl.constexpr, VECTOR_C: tl.constexpr, VECTOR_O: tl.constexpr,
           VECTOR_I: tl.constexpr, EVEN: tl.constexpr, SPLIT: tl.constexpr, BLOCK_P: tl.constexpr,
           BLOCK_O: tl.constexpr, UNITS: tl.constexpr, TAPS: tl.constexpr,
           BLOCK_C: tl.constexpr):  # fmt: skip
    """dF/dpoints: a program samples BLOCK_P positions and multiplies by BLOCK_O rows of weight.

    Grid: (B x tiles x blocks of O, splits). With SPLIT a program takes a share of the kernel
    points and writes a partial sum [splits, ...] in float32.
    """
    image_size = sizes[0]
    point_size = sizes[1]
    kernel_size = sizes[2]
    pixels = _volume(image_size)
    positions = _volume(point_size)
    taps = _volume(kernel_size)
    units = channels // unit
    tile = tl.program_id(0) // blocks
    o0 = (tl.program_id(0) % blocks) * BLOCK_O
    b = tile // tiles
    split = tl.program_id(1)
    p = (tile % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < positions
    o = o0 + tl.arange(0, BLOCK_O)
    o_in = o < outputs
    # The channels of the groups that these outputs belong to, and the units that hold them.
    c_first = (o0 // group_out) * group_in
    c_last = ((tl.minimum(o0 + BLOCK_O, outputs) - 1) // group_out + 1) * group_in
    acc = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    image += _item(b, item, VECTOR_I)
    stop = (split + 1) * taps // splits
    for tap in range(split * taps // splits, stop, TAPS):
        for u0 in range(c_first // unit, (c_last + unit - 1) // unit, UNITS):
            if UNITS * TAPS == 1:
                at, valid = _positions(
                    offset, b, u0 // offset_units, units // offset_units, tap, p, inside, sizes
                )
                amplitude = _amplitude(
                    mask, b, u0 // mask_units, units // mask_units, tap, p, inside, valid, sizes
                )
                indices, factors, slopes = _cell(at, valid, image_size)
                first = tl.maximum(c_first, u0 * unit)
                last = tl.multiple_of(tl.minimum(c_last, (u0 + 1) * unit), VECTOR_C)
                for c0 in range(first, last, BLOCK_C):
                    c = tl.multiple_of(c0 + tl.arange(0, BLOCK_C), VECTOR_C)
                    columns = _wide_columns(
                        image, indices, factors, amplitude, image_size, channels, c, c < last,
                        INDEX, VECTOR_C, EVEN, False,
                    )  # fmt: skip
                    w = _load_weight(
                        weight, tap, o, o_in, c, c < last, outputs, group_in, group_out, weights,
                        GROUPED, VECTOR_C, PRECISION,
                    )  # fmt: skip
                    a = _parts(columns, image.dtype.element_ty, PRECISION)
                    acc = _dot(a, _transpose_parts(w, PRECISION), acc, PRECISION)
            else:
                u, k, here, valid, amplitude, cell = _narrow_cells(
                    offset, mask, b, u0, units, offset_units, mask_units, tap, stop, p, inside,
                    sizes, UNITS, TAPS,
                )  # fmt: skip
                columns = _narrow_columns(
                    image, u.to(INDEX) * pixels, cell[0], cell[1], amplitude, image_size, INDEX,
                    BLOCK_C,
                )  # fmt: skip
                c, k, c_in = _narrow_lanes(u0, units, unit, tap, stop, UNITS, TAPS, BLOCK_C)
                w = _load_weight(
                    weight, k[None, :], o, o_in, c, c_in, outputs, group_in, group_out, weights,
                    GROUPED, VECTOR_C, PRECISION,
                )  # fmt: skip
                columns = tl.reshape(
                    tl.permute(columns, (1, 0, 2)), (BLOCK_P, UNITS * TAPS * BLOCK_C)
                )
                a = _parts(columns, image.dtype.element_ty, PRECISION)
                acc = _dot(a, _transpose_parts(w, PRECISION), acc, PRECISION)
    here = inside[:, None] & o_in[None, :]
    if SPLIT:
        out += split.to(tl.int64) * (tl.num_programs(0) // (tiles * blocks)) * positions * outputs
    elif bias is not None:
        acc += tl.load(bias + o, mask=o_in, other=0.0).to(tl.float32)[None, :]
    place = _points_at(b, p, o, positions, outputs, POINTS_LAST, VECTOR_O)
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=here)


@triton.jit
def _add_along(totals, dot, weights, slopes, amplitude, q: tl.constexpr, RANK: tl.constexpr):
    """Add what corner q gives to the derivatives by the position's axes and by the mask."""
    sums = ()
    for a in tl.static_range(RANK):
        sums = sums + (totals[a] + dot * amplitude * _corner_weight(weights, slopes, q, a),)
    return sums + (totals[RANK] + dot * _corner_weight(weights, slopes, q, -1),)


@triton.jit
def _store_along(grad_offset, grad_mask, totals, b, u, units, tap, p, here, valid, sizes):
    """Store the derivatives of one kernel point, laid out as an offset and a mask a unit."""
    positions = _volume(sizes[1])
    rank: tl.constexpr = len(sizes[0])
    base = (b.to(tl.int64) * units + u) * _volume(sizes[2]) + tap
    if grad_offset is not None:
        for a in tl.static_range(rank):
            value = tl.where(valid, totals[a], 0.0).to(grad_offset.dtype.element_ty)
            tl.store(grad_offset + (base * rank + a) * positions + p, value, mask=here)
    if grad_mask is not None:
        value = tl.where(valid, totals[rank], 0.0).to(grad_mask.dtype.element_ty)
        tl.store(grad_mask + base * positions + p, value, mask=here)


@triton.jit
def spread(image, points, weight, offset, mask, grad_offset, grad_mask, grad_image,
           sizes, channels, unit, outputs, group_in, group_out, offset_units, mask_units,
           weights, item, tiles, splits,
           POINTS_LAST: tl.constexpr, GROUPED: tl.constexpr, PRECISION: tl.constexpr,
           INDEX: tl.constexpr, VECTOR_C: tl.constexpr, VECTOR_O: tl.constexpr,
           VECTOR_I: tl.constexpr, EVEN: tl.constexpr, HOLD: tl.constexpr, BLOCK_P: tl.constexpr,
           BLOCK_O: tl.constexpr, UNITS: tl.constexpr, TAPS: tl.constexpr,
           BLOCK_C: tl.constexpr):  # fmt: skip
    """dF/doffset and dF/dmask, and dF/dimage by atomic additions.

    What the columns' derivative points @ weight[tap] is, a program finds for BLOCK_P positions
    and BLOCK_C channels and keeps in registers; its dot products with the gathered corners, over
    the channels of a unit, give everything by offset and mask. Each of grad_offset, grad_mask
    and grad_image (float32, laid out as image) may be None. Grid: (B x tiles, splits of the
    kernel points). HOLD: the points' channels fit in one block, which stays.
    """
    image_size = sizes[0]
    point_size = sizes[1]
    kernel_size = sizes[2]
    rank: tl.constexpr = len(image_size)
    by_position: tl.constexpr = grad_offset is not None or grad_mask is not None
    pixels = _volume(image_size)
    positions = _volume(point_size)
    taps = _volume(kernel_size)
    units = channels // unit
    b = tl.program_id(0) // tiles
    split = tl.program_id(1)
    p = (tl.program_id(0) % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < positions
    start = _item(b, item, VECTOR_I)
    if by_position:
        image += start
    if grad_image is not None:
        grad_image += start
    held = None
    if HOLD:
        o = tl.arange(0, BLOCK_O)
        x = tl.load(
            points + _points_at(b, p, o, positions, outputs, POINTS_LAST, VECTOR_O),
            mask=inside[:, None] & (o < outputs)[None, :],
            other=0.0,
        )
        held = _parts(x, points.dtype.element_ty, PRECISION)
    stop = (split + 1) * taps // splits
    for tap in range(split * taps // splits, stop, TAPS):
        for u0 in range(0, units, UNITS):
            if UNITS * TAPS == 1:
                at, valid = _positions(
                    offset, b, u0 // offset_units, units // offset_units, tap, p, inside, sizes
                )
                amplitude = _amplitude(
                    mask, b, u0 // mask_units, units // mask_units, tap, p, inside, valid, sizes
                )
                indices, factors, slopes = _cell(at, valid, image_size)
                dots = ()
                for q in tl.static_range(2**rank):
                    dots = dots + (tl.zeros((BLOCK_P,), tl.float32),)
                last = (u0 + 1) * unit
                for c0 in range(u0 * unit, last, BLOCK_C):
                    c = tl.multiple_of(c0 + tl.arange(0, BLOCK_C), VECTOR_C)
                    c_in = c < last
                    grad = _grad_columns(
                        points, held, weight, b, p, inside, tap, c, c_in, c0,
                        tl.minimum(c0 + BLOCK_C, last) - 1, positions, outputs, group_in,
                        group_out, weights, POINTS_LAST, GROUPED, PRECISION, VECTOR_C, VECTOR_O,
                        HOLD, BLOCK_P, BLOCK_O, BLOCK_C,
                    )  # fmt: skip
                    new = ()
                    for q in tl.static_range(2**rank):
                        row = _corner_row(indices, image_size, q).to(INDEX)
                        place = tl.multiple_of(row * channels, VECTOR_C)[:, None] + c[None, :]
                        dot = dots[q]
                        if by_position:
                            if EVEN:
                                value = tl.load(image + place)
                            else:
                                value = tl.load(image + place, mask=c_in[None, :], other=0.0)
                            dot += tl.sum(value.to(tl.float32) * grad, 1)
                        new = new + (dot,)
                        if grad_image is not None:
                            w = amplitude * _corner_weight(factors, None, q, -1)
                            touched = (valid & (w != 0.0))[:, None] & c_in[None, :]
                            tl.atomic_add(
                                grad_image + place, grad * w[:, None], mask=touched, sem="relaxed"
                            )
                    dots = new
                if by_position:
                    totals = ()
                    for a in tl.static_range(rank + 1):
                        totals = totals + (tl.zeros((BLOCK_P,), tl.float32),)
                    for q in tl.static_range(2**rank):
                        totals = _add_along(totals, dots[q], factors, slopes, amplitude, q, rank)
                    _store_along(
                        grad_offset, grad_mask, totals, b, u0, units, tap, p, inside, valid, sizes
                    )
            else:
                u, taken, here, valid, amplitude, cell = _narrow_cells(
                    offset, mask, b, u0, units, offset_units, mask_units, tap, stop, p, inside,
                    sizes, UNITS, TAPS,
                )  # fmt: skip
                indices, factors, slopes = cell
                c, k, c_in = _narrow_lanes(u0, units, unit, tap, stop, UNITS, TAPS, BLOCK_C)
                grad = _grad_columns(
                    points, held, weight, b, p, inside, k[None, :], c, c_in, u0 * unit,
                    tl.minimum(u0 + UNITS, units) * unit - 1, positions, outputs, group_in,
                    group_out, weights, POINTS_LAST, GROUPED, PRECISION, VECTOR_C, VECTOR_O,
                    HOLD, BLOCK_P, BLOCK_O, UNITS * TAPS * BLOCK_C,
                )  # fmt: skip
                grad = tl.permute(tl.reshape(grad, (BLOCK_P, UNITS * TAPS, BLOCK_C)), (1, 0, 2))
                j = tl.arange(0, BLOCK_C)[None, None, :]
                totals = ()
                for a in tl.static_range(rank + 1):
                    totals = totals + (tl.zeros((UNITS * TAPS, BLOCK_P), tl.float32),)
                for q in tl.static_range(2**rank):
                    row = u.to(INDEX) * pixels + _corner_row(indices, image_size, q).to(INDEX)
                    place = (row * BLOCK_C)[:, :, None] + j
                    if by_position:
                        dot = tl.sum(tl.load(image + place).to(tl.float32) * grad, 2)
                        totals = _add_along(totals, dot, factors, slopes, amplitude, q, rank)
                    if grad_image is not None:
                        w = amplitude * _corner_weight(factors, None, q, -1)
                        touched = (valid & (w != 0.0))[:, :, None] & (j < unit)
                        tl.atomic_add(
                            grad_image + place, grad * w[:, :, None], mask=touched, sem="relaxed"
                        )
                if by_position:
                    _store_along(
                        grad_offset, grad_mask, totals, b, u, units, taken, p[None, :], here,
                        valid, sizes,
                    )  # fmt: skip


@triton.jit
def _grad_columns(points, held, weight, b, p, inside, tap, c, c_in, c_first, c_last,
                  positions, outputs, group_in, group_out, weights,
                  POINTS_LAST: tl.constexpr, GROUPED: tl.constexpr, PRECISION: tl.constexpr,
                  VECTOR_C: tl.constexpr, VECTOR_O: tl.constexpr, HOLD: tl.constexpr,
                  BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """points @ weight[tap] [BLOCK_P, LANES] for channels c, all within c_first .. c_last.

    tap may be a scalar, or one for each channel [1, LANES].
    """
    acc = tl.zeros((BLOCK_P, LANES), tl.float32)
    if HOLD:
        o = tl.arange(0, BLOCK_O)
        w = _load_weight(weight, tap, o, o < outputs, c, c_in, outputs, group_in, group_out,
                         weights, GROUPED, VECTOR_C, PRECISION)  # fmt: skip
        return _dot(held, w, acc, PRECISION)
    else:
        o_first = (c_first // group_in) * group_out
        o_last = (c_last // group_in + 1) * group_out
        for o0 in range(o_first, o_last, BLOCK_O):
            o = tl.multiple_of(o0 + tl.arange(0, BLOCK_O), VECTOR_O)
            place = _points_at(b, p, o, positions, outputs, POINTS_LAST, VECTOR_O)
            x = tl.load(points + place, mask=inside[:, None] & (o < o_last)[None, :], other=0.0)
            w = _load_weight(weight, tap, o, o < o_last, c, c_in, outputs, group_in, group_out,
                             weights, GROUPED, VECTOR_C, PRECISION)  # fmt: skip
            acc = _dot(_parts(x, points.dtype.element_ty, PRECISION), w, acc, PRECISION)
        return acc


# The image gradient without atomics: samples are listed by the tile of the image that they touch
# (once for every tile that one of their corners lies in), and a tile gathers what touches it.


@triton.jit
def _tile_of(indices, valid, image_size, q, TILE: tl.constexpr):
    """The tile of corner q, and whether no corner of fewer set bits lies in the same one."""
    tile = None
    new = valid
    for a in tl.static_range(len(image_size)):
        bit = (q >> (len(image_size) - 1 - a)) & 1
        first = indices[a][0] // TILE[a]
        last = indices[a][1] // TILE[a]
        new = new & ((first != last) | (bit == 0))
        part = tl.where(bit == 1, last, first)
        if a == 0:
            tile = part
        else:
            tile = tile * ((image_size[a] + TILE[a] - 1) // TILE[a]) + part
    return tile, new


# Note [lists]
# There is a list for every (batch item, offset group, kernel point, tile), a `slot`: its samples'
# positions, together in `entries`. `lists` holds the length of every list, then a cursor, then
# where every list ends. Lists lie in any order, but each is in order where results must be
# repeatable.


@triton.jit
def bucket(offset, lists, entries, sizes, groups, tiles, slots, blocks, FILL: tl.constexpr,
           TILE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Count the samples of every list, or (FILL) write them where `starts` has put its end.

    Grid: (B x groups x taps x blocks of positions).
    """
    image_size = sizes[0]
    owner = tl.program_id(0) // blocks
    taps = _volume(sizes[2])
    tap = owner % taps
    item = owner // taps  # (batch item, group)
    p = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = p < _volume(sizes[1])
    at, valid = _positions(offset, item // groups, item % groups, groups, tap, p, inside, sizes)
    indices, factors, slopes = _cell(at, valid, image_size)
    first = owner.to(tl.int64) * tiles
    places = ()
    for q in tl.static_range(2 ** len(image_size)):
        tile, new = _tile_of(indices, valid, image_size, q, TILE)
        slot = lists + (first + tile)
        if FILL:
            place = tl.atomic_add(slot + slots + 1, 1, mask=new, sem="relaxed")
            places = places + ((place, new),)
        else:
            tl.atomic_add(slot, 1, mask=new, sem="relaxed")
    if FILL:  # when all have been asked for their place
        for q in tl.static_range(2 ** len(image_size)):
            tl.store(entries + places[q][0], p, mask=places[q][1])


@triton.jit
def starts(lists, slots, BLOCK: tl.constexpr):
    """Reserve room for every list: its end, so far, is its start."""
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < slots
    count = tl.load(lists + slot, mask=inside, other=0)
    ends = tl.cumsum(count, 0)
    start = tl.atomic_add(lists + slots, tl.sum(count, 0), sem="relaxed")
    tl.store(lists + slots + 1 + slot, start + ends - count, mask=inside)


@triton.jit
def order(offset, lists, entries, sizes, groups, tiles, slots, TILE: tl.constexpr,
          SHORT: tl.constexpr, LONG: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Sort a list, or write it anew if it has more than LONG samples. Grid: (slots)."""
    slot = tl.program_id(0).to(tl.int64)
    count = tl.load(lists + slot)
    start = tl.load(lists + slots + 1 + slot) - count
    if count <= SHORT:
        _sort(entries + start, count, SHORT)
    elif count <= LONG:
        _sort(entries + start, count, LONG)
    else:
        image_size = sizes[0]
        positions = _volume(sizes[1])
        taps = _volume(sizes[2])
        across = ()
        for a in tl.static_range(len(image_size)):
            across = across + ((image_size[a] + TILE[a] - 1) // TILE[a],)
        cell = _unravel((slot % tiles).to(tl.int32), across)
        owner = (slot // tiles).to(tl.int32)
        item = owner // taps
        for p0 in range(0, positions, BLOCK):
            p = p0 + tl.arange(0, BLOCK)
            at, valid = _positions(
                offset, item // groups, item % groups, groups, owner % taps, p, p < positions,
                sizes,
            )  # fmt: skip
            indices, factors, slopes = _cell(at, valid, image_size)
            touches = valid
            for a in tl.static_range(len(image_size)):
                low = indices[a][0] // TILE[a] == cell[a]
                touches = touches & (low | (indices[a][1] // TILE[a] == cell[a]))
            one = touches.to(tl.int32)
            tl.store(entries + (start + tl.cumsum(one, 0) - 1), p, mask=touches)
            start += tl.sum(one, 0)


@triton.jit
def _sort(entries, count, SIZE: tl.constexpr):
    e = tl.arange(0, SIZE)
    p = tl.sort(tl.load(entries + e, mask=e < count, other=0x7FFFFFFF))
    tl.store(entries + e, p, mask=e < count)


@triton.jit
def inverse(points, weight, offset, mask, bias, lists, entries, out,
            sizes, channels, unit, outputs, group_in, group_out, offset_units, mask_units,
            weights, tiles, slots, batch, splits,
            LAST: tl.constexpr, GROUPED: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
            VECTOR_C: tl.constexpr, VECTOR_O: tl.constexpr, TILE: tl.constexpr,
            PIXELS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_O: tl.constexpr,
            BLOCK_C: tl.constexpr):  # fmt: skip
    """dF/dimage by inverse gather: what every listed sample adds to a tile, by three products'
    worth of tensor cores: (interpolation weights [pixels, samples] @ points) @ weight[tap].

    points are rows; out, with LAST, too, else it has channels first. With several splits it is
    float32: partial sums over shares of the kernel points. Grid: (B x units x tiles, blocks of a
    unit, splits).
    """
    image_size = sizes[0]
    point_size = sizes[1]
    kernel_size = sizes[2]
    rank: tl.constexpr = len(image_size)
    positions = _volume(point_size)
    taps = _volume(kernel_size)
    units = channels // unit
    groups = units // offset_units
    tile = tl.program_id(0) % tiles
    u = (tl.program_id(0) // tiles) % units
    b = tl.program_id(0) // tiles // units
    item = b * groups + u // offset_units
    across = ()
    for a in tl.static_range(rank):
        across = across + ((image_size[a] + TILE[a] - 1) // TILE[a],)
    corner = _unravel(tile, across)
    local = _unravel(tl.arange(0, PIXELS), TILE)
    pixel = ()
    here = tl.arange(0, PIXELS) >= 0
    row = tl.zeros((PIXELS,), INDEX)
    for a in tl.static_range(rank):
        pixel = pixel + (corner[a] * TILE[a] + local[a],)
        here = here & (pixel[a] < image_size[a])
        row = row * image_size[a] + pixel[a]
    c0 = u * unit + tl.program_id(1) * BLOCK_C
    last = (u + 1) * unit
    c = tl.multiple_of(c0 + tl.arange(0, BLOCK_C), VECTOR_C)
    c_in = c < last
    o_first = (c0 // group_in) * group_out
    o_last = ((tl.minimum(c0 + BLOCK_C, last) - 1) // group_in + 1) * group_out
    points += tl.multiple_of(b.to(tl.int64) * positions * outputs, VECTOR_O)
    acc = tl.zeros((PIXELS, BLOCK_C), tl.float32)
    split = tl.program_id(2)
    for tap in range(split * taps // splits, (split + 1) * taps // splits):
        slot = lists + ((item.to(tl.int64) * taps + tap) * tiles + tile)
        stop = tl.load(slot + slots + 1)
        start = stop - tl.load(slot)
        for e0 in range(start, stop, BLOCK_E):
            e = e0 + tl.arange(0, BLOCK_E)
            listed = e < stop
            p = tl.load(entries + e, mask=listed, other=0)
            at, valid = _positions(offset, b, u // offset_units, groups, tap, p, listed, sizes)
            amplitude = _amplitude(
                mask, b, u // mask_units, units // mask_units, tap, p, listed, valid, sizes
            )
            s = tl.where(here[:, None] & valid[None, :], amplitude[None, :], 0.0)
            for a in tl.static_range(rank):
                low = tl.where(valid, at[a][0], 0)
                distance = (low[None, :] - pixel[a][:, None]).to(tl.float32) + at[a][1][None, :]
                s = s * tl.maximum(1.0 - tl.abs(distance), 0.0)
            s = _parts(s, points.dtype.element_ty, PRECISION)
            for o0 in range(o_first, o_last, BLOCK_O):
                o = tl.multiple_of(o0 + tl.arange(0, BLOCK_O), VECTOR_O)
                o_in = o < o_last
                x = tl.load(
                    points + tl.multiple_of(p.to(INDEX) * outputs, VECTOR_O)[:, None] + o[None, :],
                    mask=listed[:, None] & o_in[None, :],
                    other=0.0,
                )
                x = _parts(x, points.dtype.element_ty, PRECISION)
                z = _dot(s, x, tl.zeros((PIXELS, BLOCK_O), tl.float32), PRECISION)
                w = _load_weight(
                    weight, tap, o, o_in, c, c_in, outputs, group_in, group_out, weights,
                    GROUPED, VECTOR_C, PRECISION,
                )  # fmt: skip
                z = _parts(z, points.dtype.element_ty, PRECISION)
                acc = _dot_once(z, w, acc, PRECISION)
    if bias is not None:
        value = tl.load(bias + c, mask=c_in & (split == 0), other=0.0)
        acc += value.to(tl.float32)[None, :]
    pixels = _volume(image_size)
    out += (split * batch + b).to(tl.int64) * pixels * channels
    if LAST:
        place = tl.multiple_of(row.to(tl.int64) * channels, VECTOR_C)[:, None] + c[None, :]
    else:
        place = row[:, None] + (c.to(tl.int64) * pixels)[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=here[:, None] & c_in[None, :])


@triton.jit
def weight_gradient(image, points, offset, mask, out,
                    sizes, batch, channels, unit, outputs, group_in, group_out, offset_units,
                    mask_units, item, tiles, blocks, splits,
                    POINTS_LAST: tl.constexpr, GROUPED: tl.constexpr, PRECISION: tl.constexpr,
                    INDEX: tl.constexpr, VECTOR_C: tl.constexpr, VECTOR_O: tl.constexpr,
                    VECTOR_I: tl.constexpr, EVEN: tl.constexpr, BLOCK_P: tl.constexpr,
                    BLOCK_O: tl.constexpr, UNITS: tl.constexpr, TAPS: tl.constexpr,
                    BLOCK_C: tl.constexpr):  # fmt: skip
    """dF/dweight: partial sums [splits, K, C / groups, O] over shares of the positions.

    A program samples the columns of TAPS kernel points for a block of channels and multiplies
    points^T @ columns. Grid: (blocks of taps x blocks of C, blocks of a group's O, splits).
    """
    image_size = sizes[0]
    point_size = sizes[1]
    kernel_size = sizes[2]
    pixels = _volume(image_size)
    positions = _volume(point_size)
    taps = _volume(kernel_size)
    units = channels // unit
    tap = tl.program_id(0) // blocks * TAPS
    block = tl.program_id(0) % blocks
    split = tl.program_id(2)
    if UNITS * TAPS == 1:
        per_unit = (unit + BLOCK_C - 1) // BLOCK_C
        u0 = block // per_unit
        c_first = u0 * unit + (block % per_unit) * BLOCK_C
        c_stop = tl.multiple_of(tl.minimum(c_first + BLOCK_C, (u0 + 1) * unit), VECTOR_C)
        c = tl.multiple_of(c_first + tl.arange(0, BLOCK_C), VECTOR_C)
        c_in = c < c_stop
        k = tap
    else:
        u0 = block * UNITS
        c_first = u0 * unit
        c_stop = tl.minimum(u0 + UNITS, units) * unit
        c, k, c_in = _narrow_lanes(u0, units, unit, tap, taps, UNITS, TAPS, BLOCK_C)
        k = k[None, :]
    o_first = (c_first // group_in) * group_out
    o_last = ((c_stop - 1) // group_in + 1) * group_out
    o = tl.multiple_of(o_first + tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O), VECTOR_O)
    o_in = o < o_last
    acc = tl.zeros((BLOCK_O, UNITS * TAPS * BLOCK_C), tl.float32)
    total = batch * tiles
    for t in range(
        (split.to(tl.int64) * total // splits).to(tl.int32),
        ((split + 1).to(tl.int64) * total // splits).to(tl.int32),
    ):
        b = t // tiles
        p = (t % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = p < positions
        place = _points_at(b, p, o, positions, outputs, POINTS_LAST, VECTOR_O)
        x = tl.load(points + place, mask=inside[:, None] & o_in[None, :], other=0.0)
        here = image + _item(b, item, VECTOR_I)
        if UNITS * TAPS == 1:
            at, valid = _positions(
                offset, b, u0 // offset_units, units // offset_units, tap, p, inside, sizes
            )
            amplitude = _amplitude(
                mask, b, u0 // mask_units, units // mask_units, tap, p, inside, valid, sizes
            )
            indices, factors, slopes = _cell(at, valid, image_size)
            columns = _wide_columns(
                here, indices, factors, amplitude, image_size, channels, c, c_in,
                INDEX, VECTOR_C, EVEN, True,
            )  # fmt: skip
        else:
            u, taken, listed, valid, amplitude, cell = _narrow_cells(
                offset, mask, b, u0, units, offset_units, mask_units, tap, taps, p, inside, sizes,
                UNITS, TAPS,
            )  # fmt: skip
            columns = _narrow_columns(
                here, u.to(INDEX) * pixels, cell[0], cell[1], amplitude, image_size, INDEX, BLOCK_C
            )
            columns = tl.reshape(tl.permute(columns, (1, 0, 2)), (BLOCK_P, UNITS * TAPS * BLOCK_C))
        x = _transpose_parts(_parts(x, points.dtype.element_ty, PRECISION), PRECISION)
        y = _parts(columns, image.dtype.element_ty, PRECISION)
        acc = _dot_once(x, y, acc, PRECISION)
    keep = o_in[:, None] & c_in[None, :]
    if GROUPED:
        row = c[None, :] - ((o // group_out) * group_in)[:, None]
        keep = keep & (row >= 0) & (row < group_in)
    else:
        row = c[None, :]
    row = ((split * taps + k).to(tl.int64) * group_in + row) * outputs
    tl.store(out + (row + o[:, None]), acc, mask=keep)


@triton.jit
def reduce(parts, bias, out, count, splits, inner, sizes, strides, INDEX: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    """Sum partial results [count / inner, splits, inner], plus a bias along the middle one of the
    three sizes of the result, to where the strides say."""
    i = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    acc = tl.zeros((BLOCK,), tl.float32)
    place = i + i // inner * (splits - 1) * inner
    for s in range(splits):
        acc += tl.load(parts + place, mask=inside, other=0.0)
        place += inner
    at = _unravel(i, sizes)
    if bias is not None:
        acc += tl.load(bias + at[1], mask=inside, other=0.0).to(tl.float32)
    place = at[0] * strides[0] + at[1] * strides[1] + at[2] * strides[2]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def reduce_weight(parts, out, taps, group_in, outputs, splits,
                  VECTOR_O: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
                  TOGETHER: tl.constexpr):  # fmt: skip
    """Sum partial weights [splits, K, C / groups, O] to a weight [O, C / groups, K].

    Reads and writes runs of memory: the tile is transposed between them. Grid: (blocks of C /
    groups x K, blocks of O).
    """
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    length = group_in * taps
    inside = (k < length)[:, None] & (o < outputs)[None, :]
    row = tl.multiple_of((k % taps * group_in + k // taps) * outputs, VECTOR_O)
    place = row[:, None] + o[None, :]
    acc = tl.zeros((BLOCK_K, BLOCK_O), tl.float32)
    for first in range(0, splits, TOGETHER):
        for s in tl.static_range(TOGETHER):
            acc += tl.load(parts + place, mask=inside & (first + s < splits), other=0.0)
            parts += tl.multiple_of(length * outputs, VECTOR_O)
    tl.store(out + (k[:, None] + o[None, :] * length), acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _accumulator_order(i, RUN: tl.constexpr):
    """The channel in column i of a wgmma accumulator of which each lane has RUN in a row."""
    return i // (4 * RUN) * (4 * RUN) + (i // 2 % 4) * RUN + (i // 8 % (RUN // 2)) * 2 + i % 2


@triton.jit
def _operand_order(i, RUN: tl.constexpr):
    """Likewise for the columns of an operand in registers."""
    first = i // (4 * RUN) * (4 * RUN) + (i // 2 % 4) * RUN
    return first + (i // 16 % (RUN // 4)) * 4 + (i // 8 % 2) * 2 + i % 2


@triton.jit
def _pack(program, weight, out, sizes, LAST: tl.constexpr, SPLIT: tl.constexpr,
          ORDER: tl.constexpr, RUN: tl.constexpr, BLOCK_C: tl.constexpr,
          BLOCK_K: tl.constexpr):  # fmt: skip
    """Weight [O, C / groups, K] (LAST: [O, K, C / groups]) to [K, O, C / groups] (Note [units]).

    For the kernels in Gluon, ORDER puts channels in the order in which registers hold them: those
    of an operand and the point channels for gather_narrow (1), the image channels of a product for
    along and gradients_narrow (2), RUN to a lane; for inverse (3) it gives such an array for each
    unit, 0 in the channels of others.
    """
    programs, taps, outputs, group_in, unit, weights, blocks = sizes
    tap = (program % ((taps + BLOCK_K - 1) // BLOCK_K)) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    row = program // ((taps + BLOCK_K - 1) // BLOCK_K)
    o = row // blocks % outputs
    u = row // blocks // outputs
    c = (row % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    inside = (c < group_in) & (tap < taps)
    from_o = o
    from_c = c
    if ORDER == 1:
        from_o = _accumulator_order(o, 8)
        from_c = _operand_order(c, RUN)
    if ORDER == 2:
        from_c = _accumulator_order(c, RUN)
    if LAST:
        place = (from_o * taps + tap) * group_in + from_c
    else:
        place = (from_o * group_in + from_c) * taps + tap
    value = tl.load(weight + place, mask=inside, other=0.0)
    if ORDER == 3:
        value = tl.where(c // unit == u, value, 0.0)
        out += u * weights
    to = (tap * outputs + o) * group_in + c
    if SPLIT:
        head = value.to(tl.bfloat16)
        tl.store(out + to, head, mask=inside)
        tl.store(out + weights + to, (value - head.to(tl.float32)).to(tl.bfloat16), mask=inside)
    else:
        tl.store(out + to, value, mask=inside)


@triton.jit
def _copy(program, source, out, bias, sizes, FROM_LAST: tl.constexpr, TO_LAST: tl.constexpr,
          VECTOR_C: tl.constexpr, VECTOR_P: tl.constexpr, BLOCK_P: tl.constexpr,
          BLOCK_C: tl.constexpr, PAD: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """Copy an image between layouts, add a bias, convert the dtype.

    Element (batch item, unit, pixel, channel of the unit) lies at the given strides; with LAST
    the channels are contiguous, else the pixels are and the stride is that of the channels. PAD
    channels of a unit are written, with zeros after the unit's own. SPLIT: write heads, and after
    all of them tails (Note [precision]). Pixels and channels of a unit come divided by the
    VECTORs, so that the compiler knows what divides them.
    """
    programs, batch, pixels, units, unit, strides_from, strides_to, blocks, across = sizes
    batch_from, unit_from, row_from = strides_from
    batch_to, unit_to, row_to = strides_to
    pixels = pixels * VECTOR_P
    unit = unit * VECTOR_C
    tile = program % blocks
    u = (program // blocks) % units
    j = (program // blocks // units) % across * BLOCK_C + tl.arange(0, BLOCK_C)
    b = (program // blocks // units // across).to(tl.int64)
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    wide_p = p.to(tl.int64)
    wide_j = j.to(tl.int64)
    start = b * batch_from + u.to(tl.int64) * unit_from
    source += tl.multiple_of(start, VECTOR_C if FROM_LAST else VECTOR_P)
    start = b * batch_to + u.to(tl.int64) * unit_to
    out += tl.multiple_of(start, VECTOR_C if TO_LAST else VECTOR_P)
    inside = (p < pixels)[:, None] & (j < unit)[None, :]
    if FROM_LAST:
        place = tl.multiple_of(wide_p * row_from, VECTOR_C)[:, None] + j[None, :]
    else:
        place = tl.multiple_of(wide_j * row_from, VECTOR_P)[None, :] + p[:, None]
    value = tl.load(source + place, mask=inside, other=0.0)
    if bias is not None:
        value = value.to(tl.float32)
        value += tl.load(bias + u * unit + j, mask=j < unit, other=0.0).to(tl.float32)[None, :]
    if PAD:
        inside = (p < pixels)[:, None] & (j < PAD)[None, :]
    if TO_LAST:
        place = tl.multiple_of(wide_p * row_to, VECTOR_C)[:, None] + j[None, :]
    else:
        place = tl.multiple_of(wide_j * row_to, VECTOR_P)[None, :] + p[:, None]
    if SPLIT:
        head = value.to(tl.bfloat16)
        tl.store(out + place, head, mask=inside)
        out += batch.to(tl.int64) * batch_to
        tl.store(out + place, (value - head.to(tl.float32)).to(tl.bfloat16), mask=inside)
    else:
        tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum(program, source, out, sizes, LAST: tl.constexpr, VECTOR_O: tl.constexpr,
         VECTOR_P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr):  # fmt: skip
    """Sums of points [B, O, P] or [B, P, O] (LAST) over all but O, in parts [splits, O].

    Positions and channels come divided by the VECTORs. Programs: blocks of O x splits.
    """
    programs, batch, positions, outputs, tiles, blocks, splits = sizes
    positions = positions * VECTOR_P
    outputs = outputs * VECTOR_O
    o = program % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    split = (program // blocks).to(tl.int64)
    total = batch * tiles
    stop = ((split + 1) * total // splits).to(tl.int32)
    acc = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    for first in range((split * total // splits).to(tl.int32), stop, 4):
        for i in tl.static_range(4):  # whose loads do not wait for each other
            t = first + i
            p = (t % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
            here = (p < positions)[:, None] & (o < outputs)[None, :] & (t < stop)
            place = _points_at(t // tiles, p, o, positions, outputs, LAST, VECTOR_O)
            acc += tl.load(source + place, mask=here, other=0.0).to(tl.float32)
    result = tl.sum(acc, 0).to(out.dtype.element_ty)
    tl.store(out + split * outputs + o, result, mask=o < outputs)


@triton.jit
def prepare(summed, sums, source, copy, bias, second_source, second_copy, weight, packed,
            second_packed, zeros, sum_sizes, sizes, second_sizes, pack_sizes, second_pack_sizes,
            zero_sizes, SUM: tl.constexpr, COPY: tl.constexpr, SECOND_COPY: tl.constexpr,
            PACK: tl.constexpr, SECOND_PACK: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """What other kernels need done first, and a sum, at once: two copies, two packings of the
    weight, zeros.

    Each only if its pointers are not None; its first size is its number of programs, and its
    constants are the last arguments of _sum, _copy and _pack. Grid: (programs of all).
    """
    program = tl.program_id(0)
    if summed is not None:  # first, since its programs take longest
        if program < sum_sizes[0]:
            _sum(program, summed, sums, sum_sizes, SUM[0], SUM[1], SUM[2], SUM[3], SUM[4])
        program -= sum_sizes[0]
    if source is not None:
        if program >= 0 and program < sizes[0]:
            _copy(program, source, copy, bias, sizes, COPY[0], COPY[1], COPY[2], COPY[3], COPY[4],
                  COPY[5], COPY[6], COPY[7])  # fmt: skip
        program -= sizes[0]
    if second_source is not None:
        if program >= 0 and program < second_sizes[0]:
            _copy(program, second_source, second_copy, None, second_sizes, SECOND_COPY[0],
                  SECOND_COPY[1], SECOND_COPY[2], SECOND_COPY[3], SECOND_COPY[4], SECOND_COPY[5],
                  SECOND_COPY[6], SECOND_COPY[7])  # fmt: skip
        program -= second_sizes[0]
    if packed is not None:
        if program >= 0 and program < pack_sizes[0]:
            _pack(program, weight, packed, pack_sizes, PACK[0], PACK[1], PACK[2], PACK[3], PACK[4],
                  PACK[5])  # fmt: skip
        program -= pack_sizes[0]
    if second_packed is not None:
        if program >= 0 and program < second_pack_sizes[0]:
            _pack(program, weight, second_packed, second_pack_sizes, SECOND_PACK[0],
                  SECOND_PACK[1], SECOND_PACK[2], SECOND_PACK[3], SECOND_PACK[4],
                  SECOND_PACK[5])  # fmt: skip
        program -= second_pack_sizes[0]
    if zeros is not None:
        if program >= 0:
            i = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            tl.store(zeros + i, tl.zeros((BLOCK,), zeros.dtype.element_ty), mask=i < zero_sizes[1])
