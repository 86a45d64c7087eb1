"""deform_attention in the operators of ONNX, as lowerings.py has the others.

Each lowering takes an Attention, whose batch, queries, pixels and level sizes may be tensors of the
graph (see Size), and writes one call in one floating dtype, float32 or float64.

Shapes: B batch, S pixels of all levels, H heads, C channels of a head, Q queries, L levels, P
points of a level, n axes.

Note [samples inside]
A sample beyond the outermost pixels blends the nearest of them with zeros: the further out it lies,
the less is left of the pixel, and a pixel away nothing is left. So every sample is moved into the
image, and its weight is multiplied by the share that is left. No engine is asked for a sample
outside, where several are wrong. GridSample's levels still have a border of zeros, a pixel wide,
since a sample on the last pixel also has a corner beyond it, whose weight is 0 or what an engine's
rounding makes of 0.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from ..kernels.geometry import Attention
from .graph import Graph, Size, Value
from .lowerings import bounded, grid_sample2d, normalised


def grid_sample(b: Graph, a: Attention, value: Value, locations: Value, weights: Value) -> Value:
    """A call by one GridSample for each level."""
    maps = b.mul(a.batch, a.heads)
    shapes, positions, weights = _in_2d(b, a, *_inside(b, a, locations, weights))
    points = a.points * (2 if len(a.shapes[0]) == 3 else 1)
    # With the levels first, [L, B, H, Q, P], what one GridSample takes is contiguous.
    y, x, weights = (b.transpose(t, 3, 0, 2, 1, 4) for t in (*positions, weights))
    value = b.reshape(value, a.batch, a.pixels, a.heads * a.channels)
    total: Value = None
    start: Size = 0
    for level, (height, width) in enumerate(shapes):
        end = b.add(start, b.mul(height, width))
        image = b.op.Slice(value, b.tensor(start), b.tensor(end), b.tensor(1))
        image = b.reshape(b.transpose(image, 0, 2, 1), maps, a.channels, height, width)
        image = b.pad(image, [0, 0, 1, 1], [0, 0, 1, 1])
        start = end

        def of_level(t: Value, level: int = level) -> Value:
            # allowzero is needed where there are no queries: without it a 0 would copy the size of
            # the same axis of t, which is the number of heads.
            size = b.tensor(maps, a.queries, points)
            return b.op.Reshape(b.take(t, level, 0), size, allowzero=1)

        normal = (
            normalised(b, of_level(t), b.add(s, 2), border=1) for t, s in ((y, height), (x, width))
        )
        samples = grid_sample2d(b, image, *normal)  # [B * H, C, Q, P]
        samples = b.op.Mul(samples, b.unsqueeze(of_level(weights), 1))
        samples = b.op.ReduceSum(samples, b.tensor(3), keepdims=0)
        total = samples if total is None else b.op.Add(total, samples)
    shape = b.tensor(a.batch, a.heads, a.channels, a.queries)
    total = b.op.Reshape(total, shape, allowzero=1)
    return b.reshape(b.transpose(total, 0, 3, 1, 2), *a.output_shape)


def gather(b: Graph, a: Attention, value: Value, locations: Value, weights: Value) -> Value:
    """A call that gathers the corners of each sample, a row of a head's channels at a time."""
    positions, weights = _inside(b, a, locations, weights)
    corners = [(_first_rows(b, a), weights)]  # a row and a weight [B, Q, H, L, P] for each corner
    for axis, position in enumerate(positions):
        floor = b.op.Floor(position)
        part = b.op.Sub(position, floor)
        low = b.cast(floor, np.int32)
        last = _column(b, [b.add(shape[axis], -1) for shape in a.shapes], np.int32)
        high = b.op.Min(b.op.Add(low, b.array(1, np.int32)), last)
        step = _column(b, [b.mul(*shape[axis + 1 :], a.heads) for shape in a.shapes], np.int32)
        ends = (b.op.Mul(low, step), b.op.Sub(b.number(1.0), part)), (b.op.Mul(high, step), part)
        corners = [
            (b.op.Add(i, j), b.op.Mul(s, t)) for (i, s), (j, t) in itertools.product(corners, ends)
        ]
    rows = b.reshape(value, b.mul(a.batch, a.pixels, a.heads), a.channels)
    samples = len(a.shapes) * a.points
    total: Value = None
    for row, weight in corners:
        row = b.reshape(row, a.batch, a.queries, a.heads, samples)
        weight = b.reshape(weight, a.batch, a.queries, a.heads, 1, samples)
        taken = b.op.MatMul(weight, b.op.Gather(rows, row, axis=0))
        total = taken if total is None else b.op.Add(total, taken)
    return b.reshape(total, *a.output_shape)


def _first_rows(b: Graph, a: Attention) -> Value:
    """The row, among those of all heads of all pixels, at which each head of a level begins."""
    starts: list[Size] = [0]
    for shape in a.shapes[:-1]:
        starts.append(b.add(starts[-1], b.mul(*shape, a.heads)))
    heads = b.array(np.arange(a.heads).reshape(-1, 1, 1), np.int32)
    first = b.op.Add(heads, _column(b, starts, np.int32))
    if a.batch == 1:
        return first
    images = b.op.Mul(b.arange(a.batch), b.scalar(b.mul(a.pixels, a.heads), np.int32))
    return b.op.Add(first, b.reshape(images, a.batch, 1, 1, 1, 1))


def _inside(b: Graph, a: Attention, locations: Value, weights: Value) -> tuple[list[Value], Value]:
    """Where the samples lie along each axis, in pixels, and their weights, all [B, Q, H, L, P].

    See Note [samples inside].
    """
    n = len(a.shapes[0])
    # Locations are bounded to one image's width outside, where nothing is left of a sample. NaN and
    # infinity end there, too.
    locations = bounded(b, locations, -1, 2.0)
    half, one = b.number(0.5), b.number(1.0)
    positions = []
    for axis in range(n):
        size = _column(b, [shape[axis] for shape in a.shapes], b.float)
        # Locations have x, which is the last axis of the image, first.
        position = b.op.Sub(b.op.Mul(b.take(locations, n - 1 - axis, 5), size), half)
        inside = b.op.Min(b.op.Max(position, b.number(0.0)), b.op.Sub(size, one))
        left = b.op.Sub(one, b.op.Abs(b.op.Sub(position, inside)))
        weights = b.op.Mul(weights, b.op.Max(left, b.number(0.0)))
        positions.append(inside)
    return positions, weights


def _in_2d(
    b: Graph, a: Attention, positions: list[Value], weights: Value
) -> tuple[list[tuple[Size, ...]], list[Value], Value]:
    """The levels as 2-D images, and where the samples lie in these.

    A 1-D level is one row. A 3-D level is its planes, one below the other, and a sample of it is
    two samples in neighbouring planes, each with its share of the weight.
    """
    n = len(positions)
    if n == 1:
        middle = b.op.Mul(positions[0], b.number(0.0))
        return [(1, *shape) for shape in a.shapes], [middle, *positions], weights
    if n == 2:
        return list(a.shapes), positions, weights
    z, y, x = positions
    one = b.number(1.0)
    low = b.op.Floor(z)
    part = b.op.Sub(z, low)
    last = _column(b, [b.add(depth, -1) for depth, _, _ in a.shapes], b.float)
    height = _column(b, [height for _, height, _ in a.shapes], b.float)
    planes = low, b.op.Min(b.op.Add(low, one), last)
    shares = b.op.Sub(one, part), part

    def twice(first: Value, second: Value) -> Value:
        return b.op.Concat(first, second, axis=4)

    return (
        [(b.mul(depth, height), width) for depth, height, width in a.shapes],
        [twice(*(b.op.Add(b.op.Mul(p, height), y) for p in planes)), twice(x, x)],
        twice(*(b.op.Mul(weights, s) for s in shares)),
    )


def _column(b: Graph, sizes: list[Size], dtype: Any) -> Value:
    """One number for each level, as a tensor [L, 1] that broadcasts with [B, Q, H, L, P]."""
    if all(isinstance(s, int) for s in sizes):
        return b.array(np.reshape(sizes, (-1, 1)), dtype)
    return b.cast(b.reshape(b.tensor(*sizes), len(sizes), 1), dtype)
