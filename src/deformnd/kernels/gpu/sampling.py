"""Where a sample lies and what it is made of: device functions that Triton and Gluon kernels share.

Every function serves one, two and three axes: sizes are tuples, and loops over axes and corners
unroll. `g` is the record of the call (layout.py, Sizes). Arrays may have any shape that broadcasts.

Note [samples]
A sample is the image at one position for one tap, of all channels of a sample group (channels that
share offsets and masks). It lies in a cell between 2^n pixels, its corners:

    low corner  q=0 +-------+ q=1      The bits of q choose low or high on every axis; the last
                    |  .    |          axis is bit 0. A corner's weight is the product of its
                    |       |          weights on all axes; its slope on an axis is -1 or +1
                q=2 +-------+ q=3      times its weights on the others.

A sample is valid if it lies in [-1, size) on every axis; at NaN or infinity it is not. A corner
outside the image is moved inside, so that a load needs no predicate, and has weight 0 on its axis.
A sample that is not valid has amplitude 0. No float is converted that an integer cannot hold. Only
the offset is split into floor and fraction, and not the position, because float32 rounds the
fraction of a position more coarsely the larger the image is.

Note [precision]
PRECISION "native" multiplies half and bfloat16 numbers as they are, "tf32" rounds float32 ones to
TF32, "ieee" does not (no tensor cores). "bf16x3" writes each float32 factor as head + tail in
bfloat16 and adds three products: relative error 4e-6 in a sum of many terms, at three times the
cost of one half product. "tf32x3" does so in TF32, at twice that: relative error 2e-7 for every
product, for calls with so few weights that errors do not average out (tiles.py, FEW), and where a
call with few outputs has a product at all (depthwise.py). All sums are in float32.
"""

import triton
import triton.language as tl


@triton.jit
def wait_for_previous(CHAINED: tl.constexpr):
    """Wait until the launch before this one has written its results (runtime.py, Note [chained
    launches])."""
    if CHAINED:
        # The instruction has no result, but Triton's inline assembly must name one ($0).
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def product(sizes):
    result = sizes[0]
    for a in tl.static_range(1, len(sizes)):
        result = result * sizes[a]
    return result


@triton.jit
def unravel(index, size):
    """Coordinates of a row-major index; only the first is out of bounds if the index is."""
    point = ()
    for a in tl.static_range(len(size) - 1):
        point = (index % size[len(size) - 1 - a],) + point
        index = index // size[len(size) - 1 - a]
    return (index,) + point


@triton.jit
def ravel(point, size):
    index = point[0]
    for a in tl.static_range(1, len(size)):
        index = index * size[a] + point[a]
    return index


@triton.jit
def in_strips(q, size, RUN: tl.constexpr):
    """The q-th point of a grid whose last two axes are taken in strips of 4 rows, and each strip by
    RUN columns at a time. So the points of a tile lie near each other, and their samples share
    corners in the cache. With RUN 2 the order is:

         0  1 |  8  9 | 16 ..        The last strip may have fewer rows, and its last columns may
         2  3 | 10 11 |              be fewer than RUN.
         4  5 | 12 13 |
         6  7 | 14 15 |
    """
    if len(size) == 1:
        return (q,)
    else:
        rows = size[len(size) - 2]
        width = size[len(size) - 1]
        lead = q // (rows * width)
        q = q % (rows * width)
        strip = q // (4 * width) * 4
        q = q % (4 * width)
        height = tl.maximum(tl.minimum(rows - strip, 4), 1)
        column = q // (RUN * height) * RUN
        q = q % (RUN * height)
        run = tl.minimum(width - column, RUN)
        here = (strip + q // run, column + q % run)
        if len(size) == 3:
            here = (lead,) + here
        return here


SINGLE = tl.constexpr((1, 1, 1))


@triton.jit
def following(point, size, STEPS: tl.constexpr = SINGLE):
    """The point STEPS on in row-major order, and 1 if the grid has begun anew, else 0."""
    new = ()
    carry = 1
    for a in tl.static_range(len(size) - 1, -1, -1):
        at = point[a] + carry * STEPS[a]
        carry = tl.where(at >= size[a], 1, 0)
        new = (tl.where(carry > 0, 0, at),) + new
    return new, carry


@triton.jit
def tiles_across(size, TILE: tl.constexpr):
    """How many tiles an image has on every axis."""
    across = ()
    for a in tl.static_range(len(TILE)):
        across = across + ((size[a] + TILE[a] - 1) // TILE[a],)
    return across


@triton.jit
def starts_of(point, shift, g):
    """Per axis, where the position `point` samples for the tap `shift` without its offset."""
    starts = ()
    for a in tl.static_range(len(point)):
        start = point[a] * g.stride[a] - g.padding[a] + shift[a] * g.dilation[a]
        starts = starts + (start,)
    return starts


@triton.jit
def read(offset, mask, b, s, tap, p, inside, g,
         INDEX: tl.constexpr = tl.int64, VECTOR_P: tl.constexpr = 1):  # fmt: skip
    """Read the offset on every axis, and the mask, of samples of sample group s, as they are
    stored: two tuples, each empty where the call has no such tensor.

    INDEX is an integer type that can count the numbers of a batch item. VECTOR_P divides the number
    of positions on the last axis; as many neighbours are read at once if the compiler knows that
    the positions p are neighbours.
    """
    rank: tl.constexpr = len(g.image)
    item = b.to(tl.int64)
    positions = (g.positions // VECTOR_P * VECTOR_P).to(INDEX)
    offsets = ()
    if offset is not None:
        offset += item * (g.offset_groups * g.taps * rank * positions)
        row = (s // g.per_offset * g.taps + tap) * rank
        for a in tl.static_range(rank):
            place = (row + a) * positions + p
            offsets = offsets + (tl.load(offset + place, mask=inside, other=0.0),)
    masks = ()
    if mask is not None:
        mask += item * (g.mask_groups * g.taps * positions)
        place = (s // g.per_mask * g.taps + tap) * positions + p
        masks = masks + (tl.load(mask + place, mask=inside, other=0.0),)
    return offsets, masks


@triton.jit
def floor_of(x):
    """The floor, as an integer, and the fraction of float32 numbers, in three of NVIDIA's
    instructions.

    Adding 1.5 * 2^23 and rounding down leaves the floor in the low bits. For numbers beyond 2^22,
    NaN and infinity the integer is at least 2^21 away from 0, and the fraction is some number in
    [0, 1], because saturation turns NaN to 0.
    """
    shifted = tl.inline_asm_elementwise(
        "add.rm.f32 $0, $1, 0f4B400000;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )
    fraction = tl.inline_asm_elementwise(
        "sub.sat.f32 $0, $1, $2;", "=f,f,f", [x, shifted - 12582912.0], dtype=tl.float32,
        is_pure=True, pack=1,
    )  # fmt: skip
    return shifted.to(tl.int32, bitcast=True) - 0x4B400000, fraction


@triton.jit
def cell_of(offsets, starts, inside, g, NEAR: tl.constexpr = False):
    """For each axis (low corner, step to the high one, their two weights, whether each is in the
    image), and whether the sample is valid. NEAR says that starts and sizes are below 2^21, so that
    floor_of can be used, which saves a kernel that finds many cells 5 % of its instructions."""
    axes = ()
    valid = inside
    for a in tl.static_range(len(starts)):
        low = starts[a]
        if len(offsets) == 0:
            fraction = (low * 0).to(tl.float32)
        elif NEAR:
            floor, fraction = floor_of(offsets[a].to(tl.float32))
            low = low + floor
        else:
            value = offsets[a].to(tl.float32)
            near = tl.abs(value) < 1.0e9
            value = tl.where(near, value, 0.0)
            floor = tl.floor(value)
            low = low + floor.to(tl.int32)
            valid = valid & near
            fraction = value - floor
        # One comparison checks both bounds: without its sign a number below -1 is a large one.
        valid = valid & ((low + 1).to(tl.uint32) <= g.image[a].to(tl.uint32))
        has_low = low >= 0
        has_high = low + 1 < g.image[a]
        step = tl.where(has_low & has_high, 1, 0)
        weights = (tl.where(has_low, 1.0 - fraction, 0.0), tl.where(has_high, fraction, 0.0))
        low = tl.minimum(tl.maximum(low, 0), g.image[a] - 1)
        axes = axes + ((low, step, weights, (has_low, has_high)),)
    return axes, valid


@triton.jit
def amplitude_of(masks, valid):
    """The mask's value, or 1 without a mask. Where the sample is not valid it is 0 times that
    value, which is NaN if the mask is not finite: the definition multiplies a sample of 0 by it."""
    amplitude = tl.where(valid, 1.0, 0.0)
    if len(masks) > 0:
        value = masks[0].to(tl.float32)
        amplitude = tl.where(valid, value, value * 0.0)
    return amplitude


@triton.jit
def locate(offset, mask, b, s, tap, p, inside, g, INDEX: tl.constexpr = tl.int64):
    """The cell (cell_of), amplitude and validity of the samples of positions p."""
    offsets, masks = read(offset, mask, b, s, tap, p, inside, g, INDEX)
    starts = starts_of(unravel(p, g.point), unravel(tap, g.kernel), g)
    axes, valid = cell_of(offsets, starts, inside, g)
    return axes, amplitude_of(masks, valid), valid


@triton.jit
def lighter_first(axes):
    """The same cell with the corner that weighs less first on every axis, so that a step may be -1.
    Corners then go from the smallest weight to the largest, or nearly, and a sum in float16 errs
    little more than the rounding of its result does."""
    ordered = ()
    for a in tl.static_range(len(axes)):
        low, step, weights, inside = axes[a]
        turned = weights[0] > weights[1]
        first = tl.where(turned, low + step, low)
        step = tl.where(turned, -step, step)
        weights = (tl.minimum(weights[0], weights[1]), tl.maximum(weights[0], weights[1]))
        ordered = ordered + ((first, step, weights, inside),)
    return ordered


@triton.jit
def lost_in_half(weight):
    """What a weight loses by rounding to float16, or 0 where float16 might make it infinite."""
    lost = weight - weight.to(tl.float16).to(tl.float32)
    return tl.where(tl.abs(weight) < 60000.0, lost, 0.0)


@triton.jit
def corner_pixel(axes, q: tl.constexpr, g):
    pixel = axes[0][0] + axes[0][1] * ((q >> (len(axes) - 1)) & 1)
    for a in tl.static_range(1, len(axes)):
        index = axes[a][0] + axes[a][1] * ((q >> (len(axes) - 1 - a)) & 1)
        pixel = pixel * g.image[a] + index
    return pixel


@triton.jit
def corner_weight(axes, q: tl.constexpr):
    weight = axes[0][2][(q >> (len(axes) - 1)) & 1]
    for a in tl.static_range(1, len(axes)):
        weight = weight * axes[a][2][(q >> (len(axes) - 1 - a)) & 1]
    return weight


@triton.jit
def contract(dots, axes):
    """Contract one number per corner to a sum by slopes for each axis, and then a sum by weights.

    The loop goes from the last axis to the first, so that the sums share their partial sums.
    """
    plain = dots
    slopes = ()
    for a in tl.static_range(len(axes) - 1, -1, -1):
        weights, inside = axes[a][2], axes[a][3]
        slope = ()
        coarser = ()
        for q in tl.static_range(len(plain) // 2):
            low = tl.where(inside[0], plain[2 * q], 0.0)
            high = tl.where(inside[1], plain[2 * q + 1], 0.0)
            slope = slope + (high - low,)
            coarser = coarser + (plain[2 * q] * weights[0] + plain[2 * q + 1] * weights[1],)
        plain = coarser
        finer = (slope,)
        for k in tl.static_range(len(slopes)):
            coarser = ()
            for q in tl.static_range(len(slopes[k]) // 2):
                coarser = coarser + (
                    slopes[k][2 * q] * weights[0] + slopes[k][2 * q + 1] * weights[1],
                )
            finer = finer + (coarser,)
        slopes = finer
    sums = ()
    for k in tl.static_range(len(slopes)):
        sums = sums + (slopes[k][0],)
    return sums + (plain[0],)


@triton.jit
def parts_of(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """The factors that stand for x in a product: (head, tail) for "bf16x3", else x as `dtype`."""
    if PRECISION == "bf16x3":
        # The head is rounded as an integer, which is as exact, because GPUs convert single numbers
        # slowly. For NaN the tail is NaN if the head is not.
        bits = (x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000
        head = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        return (head, (x - bits.to(tl.float32, bitcast=True)).to(tl.bfloat16))
    else:
        return (x.to(dtype),)
