"""The operators of deformnd in the operators of ONNX.

Each lowering takes a Geometry, whose batch and spatial sizes may be tensors of the graph (see
Size), and writes one call in one floating dtype, float32 or float64. All of them follow the
definition in kernels/reference.py.

Shapes: B batch, K kernel points, P positions of the points, G offset groups, MG mask groups,
C image channels, O point channels, V pixels of the image inside a border of one zero pixel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..kernels.geometry import Geometry
from .graph import Graph, Size, Value

# Note [bounded offsets]
# Offsets are bounded by 2^24. No image is that large, so a larger offset points outside, as NaN and
# infinity must do as well. `bounded` moves all of them to the bound, NaN because a comparison with
# it is false. Then floats turn into integers safely, and no NaN reaches a sum or OpenVINO's
# DeformableConvolution, which would read out of bounds.
FAR = 2.0**24


def bounded(b: Graph, t: Value, low: float, high: float | Value) -> Value:
    """t bounded to [low, high]. NaN becomes high if the engine has comparisons."""
    end = b.number(high) if isinstance(high, (int, float)) else b.cast(high, b.float)
    least = b.op.Where(b.op.Less(t, end), t, end) if b.comparisons else b.op.Min(t, end)
    return b.op.Max(least, b.number(low))


# Lowerings to an engine's own operator, which is DeformConv in ONNX since opset 19.


def ordinary(
    b: Graph,
    g: Geometry,
    image: Value,
    weight: Value,
    offset: None,
    mask: None,
    bias: Value | None,
) -> Value:
    """A call without offset and mask is an ordinary convolution, as deform_conv itself does it."""
    inputs = (image, weight) if bias is None else (image, weight, bias)
    return b.op.Conv(
        *inputs,
        strides=list(g.stride),
        pads=[*g.padding, *g.padding],
        dilations=list(g.dilation),
        group=g.groups,
    )


def native(
    b: Graph,
    g: Geometry,
    image: Value,
    weight: Value,
    offset: Value,
    mask: Value | None,
    bias: Value | None,
    deform_conv2d: Any,
) -> Value:
    """A call by the engine's own 2-D operator, to which a 1-D image is an image of one row.

    deform_conv2d is one of the functions below, which write the nodes of different engines.
    """
    points = math.prod(g.kernel)
    g, offset, mask = _repeat_groups(b, g, offset, mask)
    groups = g.offset_groups
    if len(g.kernel) == 2:
        return deform_conv2d(b, g, image, weight, offset, mask, bias)
    size = g.point_size[0]
    # A 1-D offset is dx alone, and becomes (dy, dx) = (0, dx).
    offset = b.reshape(offset, g.batch, groups * points, 1, size)
    offset = b.pad(offset, [0, 0, 1, 0], [0, 0, 0, 0])
    offset = b.reshape(offset, g.batch, groups * points * 2, 1, size)
    flat = g._replace(
        image_size=(1, *g.image_size),
        point_size=(1, *g.point_size),
        kernel=(1, *g.kernel),
        stride=(1, *g.stride),
        padding=(0, *g.padding),
        dilation=(1, *g.dilation),
    )
    if mask is not None:
        mask = b.unsqueeze(mask, 2)
    image, weight = b.unsqueeze(image, 2), b.unsqueeze(weight, 2)
    result = deform_conv2d(b, flat, image, weight, offset, mask, bias)
    return b.op.Squeeze(result, b.tensor(2))


def _repeat_groups(
    b: Graph, g: Geometry, offset: Value, mask: Value | None
) -> tuple[Geometry, Value, Value | None]:
    """Offset and mask repeated to the same number of groups, the least common multiple of
    theirs."""
    common = math.lcm(g.offset_groups, g.mask_groups or 1)

    def repeat(t: Value, groups: int, channels: int) -> Value:
        if groups == common:
            return t
        # This uses few dimensions, since OpenVINO's Broadcast is wrong in seven.
        size = b.mul(channels, *g.point_size)
        t = b.reshape(t, g.batch, groups, 1, size)
        t = b.expand(t, g.batch, groups, common // groups, size)
        return b.reshape(t, g.batch, common * channels, *g.point_size)

    points = math.prod(g.kernel)
    offset = repeat(offset, g.offset_groups, points * len(g.kernel))
    if mask is not None:
        mask = repeat(mask, g.mask_groups, points)
    return g._replace(offset_groups=common, mask_groups=common), offset, mask


def standard_deform_conv2d(
    b: Graph,
    g: Geometry,
    image: Value,
    weight: Value,
    offset: Value,
    mask: Value | None,
    bias: Value | None,
) -> Value:
    from onnxscript import opset19

    return opset19.DeformConv(
        image,
        weight,
        offset,
        bias,
        mask,
        kernel_shape=list(g.kernel),
        strides=list(g.stride),
        pads=[*g.padding, *g.padding],
        dilations=list(g.dilation),
        group=g.groups,
        offset_group=g.offset_groups,
    )


# Note [two engines]
# OpenVINO has no rule for ONNX's DeformConv, but its front end knows a node DeformableConv2D of its
# own domain. So that other engines run the node too, the file holds a local function of that name
# whose body is the standard DeformConv (openvino_function): an engine that does not know the node
# inlines the function, and OpenVINO, which does know it, never looks.
OPENVINO_DOMAIN = "org.openvinotoolkit"
OPENVINO_OPERATOR = "DeformableConv2D"


def openvino_deform_conv2d(
    b: Graph,
    g: Geometry,
    image: Value,
    weight: Value,
    offset: Value,
    mask: Value | None,
    bias: Value | None,
) -> Value:
    # OpenVINO's front end leaves bilinear_interpolation_pad at 0, which means that samples less
    # than a pixel outside are 0 instead of being blended with 0. A zero border around the image
    # gives them pixels to blend with, and the operator gets that much less padding. Where there is
    # no padding to take away, the image grows by one stride instead, and the points by one
    # position, which is cropped afterwards.
    border = [1 if p else s for p, s in zip(g.padding, g.stride, strict=True)]
    padding = [max(p - 1, 0) for p in g.padding]
    extra = [0 if p else 1 for p in g.padding]
    image = b.pad(image, [0, 0, *border], [0, 0, *border])
    # Offsets are bounded because OpenVINO reads out of bounds at NaN.
    offset = b.pad(bounded(b, offset, -FAR, FAR), [0, 0, *extra], [0, 0, *extra])
    if mask is not None:
        mask = b.pad(mask, [0, 0, *extra], [0, 0, *extra])
    result = _openvino_operator()(
        image,
        offset,
        weight,
        *([] if mask is None else [mask]),
        strides=list(g.stride),
        pads=[*padding, *padding],
        dilations=list(g.dilation),
        group=g.groups,
        deformable_groups=g.offset_groups,
    )
    if any(extra):
        axes = [a for a in range(2) if extra[a]]
        starts, ends = b.tensor(*[1] * len(axes)), b.tensor(*[-1] * len(axes))
        result = b.op.Slice(result, starts, ends, b.tensor(*(2 + a for a in axes)))
    return _add_bias(b, result, bias, 2)


_OPENVINO_ATTRIBUTES = {  # OpenVINO's name: (DeformConv's, the type's name)
    "strides": ("strides", "INTS"),
    "pads": ("pads", "INTS"),
    "dilations": ("dilations", "INTS"),
    "group": ("group", "INT"),
    "deformable_groups": ("offset_group", "INT"),
}


def _openvino_operator() -> Any:
    from onnx.defs import OpSchema
    from onnxscript import values

    optional = OpSchema.FormalParameterOption.Optional
    parameter = OpSchema.FormalParameter
    schema = OpSchema(
        OPENVINO_OPERATOR,
        OPENVINO_DOMAIN,
        1,
        inputs=[
            *(parameter(name, "T") for name in ("X", "offset", "W")),
            parameter("mask", "T", param_option=optional),
        ],
        outputs=[parameter("Y", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(double)"], "")],
        attributes=[
            OpSchema.Attribute(name, getattr(OpSchema.AttrType, kind))
            for name, (_, kind) in _OPENVINO_ATTRIBUTES.items()
        ],
    )
    return values.Op(values.Opset(OPENVINO_DOMAIN, 1), OPENVINO_OPERATOR, schema)


def openvino_function(opset: int) -> Any:
    """The local function of Note [two engines], an onnx.FunctionProto."""
    from onnx import AttributeProto, helper

    node = helper.make_node("DeformConv", ["X", "W", "offset", "", "mask"], ["Y"], "deform_conv")
    for name, (original, kind) in _OPENVINO_ATTRIBUTES.items():
        kind = getattr(AttributeProto, kind)
        node.attribute.append(AttributeProto(name=original, ref_attr_name=name, type=kind))
    return helper.make_function(
        OPENVINO_DOMAIN,
        OPENVINO_OPERATOR,
        ["X", "offset", "W", "mask"],
        ["Y"],
        [node],
        [helper.make_opsetid("", opset)],
        attributes=list(_OPENVINO_ATTRIBUTES),
    )


# Note [tall image]
# A 3-D image is written as a tall 2-D image: its planes one below the other, with a row of zeros
# after each. A 3-D sample is then two 2-D samples in neighbouring planes, blended. Row y of plane z
# is row z * (height + 1) + y of the tall image. y is kept in [-1, height], at whose ends it lies on
# a row of zeros or outside, and z is kept in [-1, depth] for the same reason.


def _tall_image(b: Graph, g: Geometry, image: Value) -> tuple[Value, Size, Size]:
    """The tall image [B, C, rows, width], the number of its rows, and the rows of a plane."""
    depth, height, width = g.image_size
    plane = b.add(height, 1)
    rows = b.mul(depth, plane)
    image = b.pad(image, [0] * 5, [0, 0, 0, 1, 0])
    return b.reshape(image, g.batch, g.image_channels, rows, width), rows, plane


def native3d(
    b: Graph,
    g: Geometry,
    image: Value,
    weight: Value,
    offset: Value,
    mask: Value | None,
    bias: Value | None,
    deform_conv2d: Any,
) -> Value:
    """A 3-D call by the engine's 2-D operator on the tall image; see Note [tall image].

    Its kernel is [2, K]: row c samples plane floor(z) + c, with its share of the blend in the
    mask. The operator adds its own regular positions, which are taken off its offsets again.
    """
    points = math.prod(g.kernel)
    g, offset, mask = _repeat_groups(b, g, offset, mask)
    batch, groups = g.batch, g.offset_groups
    tall, rows, plane = _tall_image(b, g, image)
    # The size of the operator's output follows from its image. So the image is padded where the
    # output would be too small, and the points are padded where it is too large.
    stride = (g.stride[0] * g.stride[1], g.stride[2])
    wanted = (b.mul(g.point_size[0], g.point_size[1]), g.point_size[2])
    kernel = (2, points)
    before = [0, 0, 0, 0]
    grow, extra = [], []
    for size, count, s, k in zip((rows, g.image_size[2]), wanted, stride, kernel, strict=True):
        needed = b.add(b.mul(b.add(count, -1), s), k)  # the smallest image with that many points
        grow.append(b.max(b.add(needed, b.mul(size, -1)), 0))
        found = b.add(b.div(b.add(b.add(size, grow[-1]), -k), s), 1)
        extra.append(b.add(found, b.mul(count, -1)))
    tall = b.pad(tall, before, [0, 0, *grow])

    z, y, x = _positions(b, g, offset)  # [B, G, K, P]
    z = bounded(b, z, -1, g.image_size[0])
    y = bounded(b, y, -1, g.image_size[1])
    low = b.op.Floor(z)
    part = b.op.Sub(z, low)
    row = b.op.Add(b.op.Mul(low, b.scalar(plane, b.float)), y)
    # This uses five dimensions, since OpenVINO broadcasts seven wrong where the batch is not known.
    shape = (batch, groups, points, *wanted)
    r = b.scaled(b.arange(wanted[0], b.float), stride[0], b.float)
    r = b.reshape(r, 1, 1, 1, wanted[0], 1)
    c = b.scaled(b.arange(wanted[1], b.float), stride[1], b.float)
    k = b.array(np.arange(points).reshape(1, 1, points, 1, 1), b.float)
    dy = b.op.Sub(b.reshape(row, *shape), r)
    dx = b.op.Sub(b.op.Sub(b.reshape(x, *shape), c), k)
    below = b.op.Add(dy, b.op.Sub(b.scalar(plane, b.float), b.number(1)))
    dy, dx, below = (b.unsqueeze(t, 3) for t in (dy, dx, below))
    pairs = (b.op.Concat(y, dx, axis=3) for y in (dy, below))
    offset = b.op.Concat(*(b.unsqueeze(t, 2) for t in pairs), axis=2)  # [B, G, 2, K, 2, *wanted]
    offset = b.reshape(offset, batch, groups * 2 * points * 2, *wanted)
    offset = b.pad(offset, before, [0, 0, *extra])
    share = b.unsqueeze(part, 2)
    share = b.op.Concat(b.op.Sub(b.number(1.0), share), share, axis=2)  # [B, G, 2, K, P]
    if mask is not None:
        share = b.op.Mul(share, b.reshape(mask, batch, groups, 1, points, *_flat(b, g)))
    share = b.reshape(share, batch, groups * 2 * points, *wanted)
    share = b.pad(share, before, [0, 0, *extra])

    weight = b.reshape(weight, g.point_channels, g.image_channels // g.groups, 1, points)
    weight = b.expand(weight, g.point_channels, g.image_channels // g.groups, 2, points)
    flat = g._replace(
        image_size=(rows, g.image_size[2]),
        point_size=wanted,
        kernel=kernel,
        stride=stride,
        padding=(0, 0),
        dilation=(1, 1),
    )
    result = deform_conv2d(b, flat, tall, weight, offset, share, bias)
    if not all(isinstance(e, int) and e == 0 for e in extra):
        result = b.crop(result, 0, list(wanted))
    return b.reshape(result, batch, g.point_channels, *g.point_size)


# The lowering to GridSample, which every engine has. Its positions are relative to the image's
# size.

# Note [samples inside the image]
# Several engines' GridSample is wrong outside the image, and right inside. So the image gets a
# border of zeros, two pixels wide, and positions are clipped onto the border's middle, half a pixel
# from the outermost pixels' centres. A clipped sample is then 0 however an engine rounds, and no
# sample has a corner outside, not even one of weight 0.
_BORDER = 2


def grid_sample(
    b: Graph,
    g: Geometry,
    image: Value,
    weight: Value,
    offset: Value,
    mask: Value | None,
    bias: Value | None,
) -> Value:
    """A call by one GridSample, with the kernel points as rows of its output.

    GridSample's positions are normalised by the size of the image, so their error, and with it the
    result's, grows with that size.
    """
    n, points = len(g.kernel), math.prod(g.kernel)
    channels = g.image_channels // g.offset_groups
    batch = b.mul(g.batch, g.offset_groups)
    border = [_BORDER] * n if n < 3 else [1, _BORDER, _BORDER]
    positions = [
        b.reshape(p, batch, points, *_flat(b, g)) for p in _positions(b, g, offset, border)
    ]  # [B * G, K, P] each
    image = b.reshape(image, batch, channels, *g.image_size)
    if n == 3:
        columns = _grid_sample3d(b, g, image, positions, batch, channels)
    else:
        size = [b.add(s, 2 * _BORDER) for s in g.image_size]
        normal = [normalised(b, _inside(b, p, s), s) for p, s in zip(positions, size, strict=True)]
        if n == 1:  # the image becomes the middle one of three rows
            image, border = b.unsqueeze(image, 2), [1, _BORDER]
            normal.insert(0, b.op.Mul(normal[0], b.number(0.0)))
        edges = [0, 0, *border]
        columns = grid_sample2d(b, b.pad(image, edges, edges), *normal)  # [B * G, C / G, K, P]
    if mask is not None:
        columns = b.reshape(
            columns, g.batch, g.mask_groups, g.image_channels // g.mask_groups, points, *_flat(b, g)
        )
        columns = b.op.Mul(
            columns, b.reshape(mask, g.batch, g.mask_groups, 1, points, *_flat(b, g))
        )
    return _contract(b, g, columns, weight, bias)


def _inside(b: Graph, position: Value, size: Size) -> Value:
    """Positions in an image of a size that includes a border, clipped onto the border's middle."""
    end = size - 1.5 if isinstance(size, int) else b.op.Sub(b.scalar(size, b.float), b.number(1.5))
    return bounded(b, position, 0.5, end)


def normalised(b: Graph, position: Value, size: Size, border: int = 0) -> Value:
    """Positions in pixels as GridSample counts them without align_corners: edges at -1 and 1.

    border: the width of a border that is part of the size, but within which positions begin.
    """
    edge = 2 * border + 1
    if isinstance(size, int):
        scale, shift = b.number(2 / size), b.number(edge / size - 1)
    else:
        scale = b.op.Div(b.number(2.0), b.scalar(size, b.float))
        shift = b.op.Sub(b.op.Mul(scale, b.number(edge / 2)), b.number(1.0))
    return b.op.Add(b.op.Mul(position, scale), shift)


def grid_sample2d(b: Graph, image: Value, y: Value, x: Value) -> Value:
    # OpenVINO joins along the last axis one number at a time. Joining along the first axis and
    # transposing is faster.
    grid = b.op.Concat(b.unsqueeze(x, 0), b.unsqueeze(y, 0), axis=0)
    # align_corners is 0 even where its value makes no difference to the result: 1 fails on axes of
    # size 1, and misses ONNX Runtime's fast path.
    return b.op.GridSample(
        image,
        b.transpose(grid, 1, 2, 3, 0),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=0,
    )


def _grid_sample3d(
    b: Graph, g: Geometry, image: Value, positions: list[Value], batch: Size, channels: int
) -> Value:
    """Samples of the tall image, with the plane below each as more channels; see
    Note [tall image]."""
    z, y, x = positions  # counted from one plane, two rows and two columns before the image
    depth, height, width = g.image_size
    z = bounded(b, z, 0, b.add(depth, 1))
    y = bounded(b, y, _BORDER - 1, b.add(height, _BORDER))
    low = b.op.Floor(z)
    # Plane z of the image made here holds planes z - 1 and z, for z = 0 ... depth + 1. Two rows
    # before and one after are the border of Note [samples inside the image].
    plane, width = b.add(height, 1), b.add(width, 2 * _BORDER)
    image = b.pad(image, [0] * 4 + [_BORDER], [0, 0, 0, 1, _BORDER])
    image = b.reshape(image, batch, channels, b.mul(depth, plane), width)
    upper = b.pad(image, [0, 0, b.add(plane, _BORDER), 0], [0, 0, b.add(plane, 1), 0])
    lower = b.pad(image, [0, 0, _BORDER, 0], [0, 0, b.add(b.add(plane, plane), 1), 0])
    pair = b.op.Concat(upper, lower, axis=1)
    rows = b.add(b.mul(b.add(depth, 2), plane), _BORDER + 1)
    row = b.op.Add(b.op.Mul(low, b.scalar(plane, b.float)), y)
    x = _inside(b, x, width)
    sampled = grid_sample2d(b, pair, normalised(b, row, rows), normalised(b, x, width))
    axis = b.tensor(1)
    first = b.op.Slice(sampled, b.tensor(0), b.tensor(channels), axis)
    second = b.op.Slice(sampled, b.tensor(channels), b.tensor(2 * channels), axis)
    part = b.unsqueeze(b.op.Sub(z, low), 1)
    return b.op.Add(first, b.op.Mul(b.op.Sub(second, first), part))


# Lowerings to gathers by integers, whose coordinates are exact at any size, in any engine and
# opset.


def gather_rows(
    b: Graph,
    g: Geometry,
    image: Value,
    weight: Value,
    offset: Value,
    mask: Value | None,
    bias: Value | None,
    nd: bool = False,
    reshape_gathered: bool = False,
) -> Value:
    """A call that gathers the corners of each sample, a row of all channels of a group at a time.

    nd: gather by GatherND. reshape_gathered: reshape what is gathered to the shape that it has.
    """
    g, offset, mask = _repeat_groups(b, g, offset, mask)
    points, (positions,) = math.prod(g.kernel), _flat(b, g)
    groups, channels = g.offset_groups, g.image_channels // g.offset_groups
    image, size = _with_border(b, g, image)
    image = b.transpose(image, 0, *range(2, 2 + len(size)), 1)
    data = b.reshape(image, b.mul(g.batch, *size, groups), channels)
    first = b.array(np.arange(groups), np.int32)  # the row at which a group of an image begins
    if g.batch != 1:
        rows = b.scalar(b.mul(*size, groups), np.int32)
        first = b.op.Add(b.reshape(b.op.Mul(b.arange(g.batch), rows), g.batch, 1, 1, 1), first)
    columns = None
    for index, share in _corners(b, g, offset, mask, rows=True):  # [B, P, K, G]
        index = b.op.Add(index, first)
        if nd:
            value = b.op.GatherND(data, b.unsqueeze(b.cast(index, np.int64), 4))
        else:
            value = b.op.Gather(data, index, axis=0)  # [B, P, K, G, C / G]
        if reshape_gathered:
            value = b.reshape(value, g.batch, positions, points, groups, channels)
        value = b.op.Mul(value, b.unsqueeze(share, 4))
        columns = value if columns is None else b.op.Add(columns, value)
    return _contract_rows(b, g, columns, weight, bias)


def gather_elements(
    b: Graph,
    g: Geometry,
    image: Value,
    weight: Value,
    offset: Value,
    mask: Value | None,
    bias: Value | None,
) -> Value:
    """A call that gathers the corners of each sample, one channel at a time."""
    g, offset, mask = _repeat_groups(b, g, offset, mask)
    batch, channels = b.mul(g.batch, g.offset_groups), g.image_channels // g.offset_groups
    samples = b.mul(math.prod(g.kernel), *g.point_size)
    image, size = _with_border(b, g, image)
    data = b.reshape(image, batch, channels, b.mul(*size))
    columns = None
    for index, share in _corners(b, g, offset, mask, rows=False):  # [B, G, K, P]
        index = b.expand(b.reshape(index, batch, 1, samples), batch, channels, samples)
        value = b.op.GatherElements(data, index, axis=2)
        value = b.op.Mul(value, b.reshape(share, batch, 1, samples))
        columns = value if columns is None else b.op.Add(columns, value)
    return _contract(b, g, columns, weight, bias)


def _with_border(b: Graph, g: Geometry, image: Value) -> tuple[Value, list[Size]]:
    """The image inside a border of one zero pixel, and its size."""
    border = [0, 0, *[1] * len(g.kernel)]
    return b.pad(image, border, border), [b.add(s, 2) for s in g.image_size]


def _corners(
    b: Graph, g: Geometry, offset: Value, mask: Value | None, rows: bool
) -> list[tuple[Value, Value]]:
    """For each of the 2^n corners of every sample: its index, and its weight (times the mask).

    The index is that of the pixel in an image with a border; with `rows` it is multiplied by G.
    Index and weight are [B, G, K, P], or with `rows` [B, P, K, G].

    The whole and the fractional part of an offset are exact, and the regular position is an
    integer. So positions are not rounded, however large the image is.
    """
    n, points = len(g.kernel), math.prod(g.kernel)
    shape = (g.batch, g.offset_groups, points)
    offset = b.reshape(bounded(b, offset, -FAR, FAR), *shape, n, *_flat(b, g))
    size = [b.add(s, 2) for s in g.image_size]
    zero, one = b.array(0, np.int32), b.array(1, np.int32)

    def ordered(t: Value) -> Value:
        return b.transpose(t, 0, 3, 2, 1) if rows else t

    corners: list[tuple[Value, Value]] = []
    for a in range(n):
        along = b.take(offset, a, 3)
        floor = b.op.Floor(along)
        fraction = ordered(b.op.Sub(along, floor))
        index = b.cast(floor, np.int32)
        index = ordered(_plus_regular(b, g, index, a, np.int32, border=1))
        last = b.scalar(b.add(size[a], -1), np.int32)
        step = b.mul(*size[a + 1 :], g.offset_groups if rows else 1)
        ends = []
        for i, share in (
            (index, b.op.Sub(b.number(1.0), fraction)),
            (b.op.Add(index, one), fraction),
        ):
            # Corners outside the image are moved onto the border, whose pixels are 0.
            i = b.op.Min(b.op.Max(i, zero), last)
            ends.append((i if step == 1 else b.op.Mul(i, b.scalar(step, np.int32)), share))
        if corners:
            corners = [
                (b.op.Add(i, j), b.op.Mul(s, t))
                for (i, s), (j, t) in itertools.product(corners, ends)
            ]
        elif mask is None:
            corners = ends
        else:
            mask = ordered(b.reshape(mask, *shape, *_flat(b, g)))
            corners = [(i, b.op.Mul(share, mask)) for i, share in ends]
    return corners


# The lowering of the transpose, which scatters.


def scatter(
    b: Graph,
    g: Geometry,
    points: Value,
    weight: Value,
    offset: Value,
    mask: Value | None,
    bias: Value | None,
) -> Value:
    """The transpose: adds each corner's share into an image with a border, and crops that.

    It uses ScatterElements, since ONNX Runtime's ScatterND with reduction="add" loses additions
    when threads meet at one index.
    """
    g, offset, mask = _repeat_groups(b, g, offset, mask)
    count, (positions,) = math.prod(g.kernel), _flat(b, g)
    batch, channels = b.mul(g.batch, g.offset_groups), g.image_channels // g.offset_groups
    samples = b.mul(count, positions)
    # Points times weight: columns [B, C, K * P].
    per_point, per_image = g.point_channels // g.groups, g.image_channels // g.groups
    if g.groups == 1:
        weight = b.transpose(b.reshape(weight, per_point, per_image * count), 1, 0)
        points = b.reshape(points, g.batch, per_point, positions)
    else:
        weight = b.reshape(weight, g.groups, per_point, per_image * count)
        weight = b.transpose(weight, 0, 2, 1)
        points = b.reshape(points, g.batch, g.groups, per_point, positions)
    columns = b.op.MatMul(_as_many_as_the_batch(b, g, weight), points)
    columns = b.reshape(columns, batch, channels, samples)
    size = [b.add(s, 2) for s in g.image_size]
    image = b.zeros(batch, channels, b.mul(*size))
    for index, share in _corners(b, g, offset, mask, rows=False):
        index = b.expand(b.reshape(index, batch, 1, samples), batch, channels, samples)
        value = b.op.Mul(columns, b.reshape(share, batch, 1, samples))
        image = b.op.ScatterElements(image, index, value, axis=2, reduction="add")
    image = b.reshape(image, g.batch, g.image_channels, *size)
    return _add_bias(b, b.crop(image, 1, list(g.image_size)), bias, len(size))


# What the lowerings share.


def _flat(b: Graph, g: Geometry) -> tuple[Size]:
    return (b.mul(*g.point_size),)


def _plus_regular(b: Graph, g: Geometry, t: Value, axis: int, dtype: Any, border: int = 0) -> Value:
    """t, [B, G, K, P], plus the positions along an axis that samples have without offset."""
    points = math.prod(g.kernel)
    k = np.unravel_index(np.arange(points), g.kernel)[axis] * g.dilation[axis]
    k = (k - g.padding[axis] + border).reshape(points, *[1] * len(g.kernel))
    p = b.scaled(b.arange(g.point_size[axis], dtype), g.stride[axis], dtype)
    p = b.reshape(p, *(s if a == axis else 1 for a, s in enumerate(g.point_size)))
    # This covers one axis only, so it is small, and so is a file that holds it.
    regular = b.op.Add(p, b.array(k, dtype))
    shape = (g.batch, g.offset_groups, points)
    return b.reshape(b.op.Add(b.reshape(t, *shape, *g.point_size), regular), *shape, *_flat(b, g))


def _positions(
    b: Graph, g: Geometry, offset: Value, border: Sequence[int] = (0, 0, 0)
) -> list[Value]:
    """Position of each sample along each axis, [B, G, K, P], in an image with that border."""
    n, points = len(g.kernel), math.prod(g.kernel)
    offset = b.reshape(offset, g.batch, g.offset_groups, points, n, *_flat(b, g))
    return [_plus_regular(b, g, b.take(offset, a, 3), a, b.float, border[a]) for a in range(n)]


def _contract(b: Graph, g: Geometry, columns: Value, weight: Value, bias: Value | None) -> Value:
    """The product of columns, [B, C, K, P] in memory, and the weight: points [B, O,
    *point_size]."""
    inner = math.prod(g.kernel) * g.image_channels // g.groups
    if g.groups == 1:
        weight = b.reshape(weight, g.point_channels, inner)
        columns = b.reshape(columns, g.batch, inner, *_flat(b, g))
    else:
        weight = b.reshape(weight, g.groups, g.point_channels // g.groups, inner)
        columns = b.reshape(columns, g.batch, g.groups, inner, *_flat(b, g))
    result = b.op.MatMul(_as_many_as_the_batch(b, g, weight), columns)
    result = b.reshape(result, g.batch, g.point_channels, *g.point_size)
    return _add_bias(b, result, bias, len(g.kernel))


def _contract_rows(
    b: Graph, g: Geometry, columns: Value, weight: Value, bias: Value | None
) -> Value:
    """The product of columns [B, P, K, ...], whose channels are last in memory, and the weight:
    points [B, O, *point_size]."""
    points, (positions,) = math.prod(g.kernel), _flat(b, g)
    outputs, inputs = g.point_channels // g.groups, g.image_channels // g.groups
    if g.groups == 1:
        weight = b.transpose(b.reshape(weight, outputs, inputs, points), 2, 1, 0)
        weight = b.reshape(weight, points * inputs, outputs)
        columns = b.reshape(columns, g.batch, positions, points * inputs)
        result = b.transpose(b.op.MatMul(columns, weight), 0, 2, 1)
    else:
        weight = b.reshape(weight, g.groups, outputs, inputs, points)
        weight = b.reshape(b.transpose(weight, 0, 3, 2, 1), g.groups, points * inputs, outputs)
        columns = b.reshape(columns, g.batch, positions, points, g.groups, inputs)
        columns = b.transpose(columns, 0, 3, 1, 2, 4)
        columns = b.reshape(columns, g.batch, g.groups, positions, points * inputs)
        weight = _as_many_as_the_batch(b, g, weight)
        result = b.transpose(b.op.MatMul(columns, weight), 0, 1, 3, 2)
    result = b.reshape(result, g.batch, g.point_channels, *g.point_size)
    return _add_bias(b, result, bias, len(g.kernel))


def _as_many_as_the_batch(b: Graph, g: Geometry, weight: Value) -> Value:
    """The weight, with a first axis of size 1, or of 0 in an empty batch, if the batch may be
    empty.

    ONNX Runtime's MatMul broadcasts one item to many, but not to none.
    """
    if isinstance(g.batch, int) and g.batch > 0:
        return weight
    return b.op.Slice(b.unsqueeze(weight, 0), b.tensor(0), b.tensor(g.batch), b.tensor(0))


def _add_bias(b: Graph, result: Value, bias: Value | None, n: int) -> Value:
    if bias is None:
        return result
    return b.op.Add(result, b.unsqueeze(bias, *range(1, 1 + n)))
