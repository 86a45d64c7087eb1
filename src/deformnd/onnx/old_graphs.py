"""Finding the graphs that deform_conv2d_onnx_exporter writes.

Note [the old graph]
The exporter writes a call of torchvision's deform_conv2d as some sixty nodes of standard operators,
from an image [B, C, H, W], an offset [B, G * K * 2, h, w] and maybe a mask [B, G * K, h, w].
Positions are a constant plus the offset. Four gathers, by GatherND or GatherElements, read the
padded image at the corners around them. Their weighted sum is laid out as an image of h * kernel
height rows, which a Conv contracts whose strides are the kernel's sizes.

`find` goes up from this Conv, and requires of each node what the exporter writes there. If anything
else stands there, nothing is found. Names play no part. All sizes but the batch are constants, and
stride, padding and dilation follow from the constant of the positions. What optimisers make of the
graph is known, too: constants anywhere, one node in place of equal ones, a bias within the Conv or
none, Identity nodes, a sum of four as sums of two, and a Reshape left out that changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Value = Any  # an onnx_ir.Value
Node = Any
KIND = "deform_conv2d_onnx_exporter"


class Call(NamedTuple):
    """A call that was found in a file."""

    node: Node  # its first output is the call's result
    kind: str
    tensors: tuple[Value | None, ...]  # input, weight, offset, mask, bias
    shapes: tuple[tuple[int | None, ...] | None, ...]  # each tensor's, as far as the call says
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    offset_groups: int
    # Zeros before and after the image beside the padding, if its two sides are padded differently.
    before: list[int]
    after: list[int]


class _OtherError(Exception):
    """The graph holds something else than the exporter writes."""


def find(conv: Node) -> Call | None:
    """The call that ends in a Conv, or in the Add of a bias behind it; see Note [the old graph]."""
    try:
        return _find(conv)
    except (_OtherError, IndexError, ValueError):  # the last two: older opsets, or odd nodes
        return None


def _require(holds: Any) -> None:
    if not holds:
        raise _OtherError


def _source(v: Value) -> Value:
    while v is not None and (node := v.producer()) is not None and node.op_type == "Identity":
        v = node.inputs[0]
    return v


def _maker(v: Value | None) -> Node | None:
    v = _source(v)
    return None if v is None else v.producer()


def _made_by(v: Value | None, *operators: str) -> Node:
    """The node that made a value, which has to be of one of these operators."""
    node = _maker(v)
    _require(node is not None and node.domain == "" and node.op_type in operators)
    return node


def _constant(v: Value | None) -> Any:
    """The numpy array of a value that has to be a constant."""
    import onnx_ir as ir

    v = _source(v)
    tensor = None if v is None else ir.convenience.get_const_tensor(v)
    if tensor is None:
        raise _OtherError
    return tensor.numpy()


def _is(v: Value | None, *numbers: int) -> None:
    """Require that a value is a constant with these numbers, one after another."""
    found = _constant(v).reshape(-1)
    _require(found.size == len(numbers) and (found == numbers).all())


def _attribute(node: Node, name: str, default: Any = None) -> Any:
    found = node.attributes.get(name)
    if found is None:
        return default
    _require(not found.is_ref())
    return found.value if isinstance(found.value, (int, str)) else list(found.value)


def _sizes(v: Value, count: int) -> tuple[Value, list[int]]:
    """The input of the Reshape that made a value, and the sizes that it reshapes to."""
    node = _made_by(v, "Reshape")
    sizes = _constant(node.inputs[1]).reshape(-1).tolist()
    _require(len(sizes) == count)
    return node.inputs[0], sizes


def _reshaped(v: Value, *wanted: int) -> Value:
    """The input of a Reshape to [batch, *wanted]."""
    t, (_, *sizes) = _sizes(v, 1 + len(wanted))
    _require(sizes == list(wanted))
    return t


def _either(node: Node, first: Callable[[Value], Any], second: Callable[[Value], Any]) -> Any:
    """What the two functions give of a node's two inputs, in the order that fits."""
    _require(len(node.inputs) == 2)
    a, b = node.inputs
    try:
        return first(a), second(b)
    except _OtherError:
        return first(b), second(a)


def _slice(v: Value) -> tuple[Value, int]:
    """The input and the index of a Slice of one along axis 3, which is y or x."""
    node = _made_by(v, "Slice")
    start = int(_constant(node.inputs[1]).reshape(-1)[0])
    _require(start in (0, 1))
    _is(node.inputs[2], start + 1)
    _is(node.inputs[3], 3)
    if len(node.inputs) > 4:
        _is(node.inputs[4], 1)
    return node.inputs[0], start


class _Shape(NamedTuple):
    """The sizes of the call, except its groups."""

    channels: int
    points: int
    size: tuple[int, int]


class _Corner(NamedTuple):
    """What one of the four terms of the sum says of its corner."""

    groups: int
    image: Value
    size: tuple[int, int]  # the size of the padded image
    positions: Value
    beyond: tuple[int, int]  # how far from the floor of the positions, 0 or 1 along y and x


def _find(conv: Node) -> Call:
    _require(conv.op_type == "Conv" and conv.domain == "")
    t, flat = _sizes(conv.inputs[0], 4)
    weight = _source(conv.inputs[1])
    known = [] if weight is None or weight.shape is None else list(weight.shape)
    _require(len(known) == 4 and all(isinstance(s, int) and s > 0 for s in known))
    outputs, channels, *kernel = known
    groups = _attribute(conv, "group", 1)
    channels *= groups
    _require(_attribute(conv, "strides", [1, 1]) == kernel)
    _require(_attribute(conv, "kernel_shape", kernel) == kernel)
    _require(not any(_attribute(conv, "pads", [0])))
    _require(set(_attribute(conv, "dilations", [1])) == {1})
    _require(_attribute(conv, "auto_pad", "NOTSET") in ("NOTSET", "VALID"))
    size = (flat[2] // kernel[0], flat[3] // kernel[1])
    _require(flat[1:] == [channels, size[0] * kernel[0], size[1] * kernel[1]])
    node = _made_by(t, "Transpose")
    _require(_attribute(node, "perm") == [0, 1, 4, 2, 5, 3])
    shape = _Shape(channels, kernel[0] * kernel[1], size)
    node = _made_by(node.inputs[0], "Reshape", "Sum", "Add", "Mul")
    in_place = node.op_type != "Reshape"  # a Reshape that changes nothing was left out
    if not in_place:
        t = _reshaped(node.outputs[0], channels, *kernel, *size)
        node = _made_by(t, "Sum", "Add", "Mul")

    mask, mask_groups = None, None
    if node.op_type == "Mul":
        node, (mask, mask_groups) = _either(
            node, lambda v: _made_by(v, "Sum", "Add"), lambda v: _mask(v, shape)
        )
    terms = _terms(node)
    _require(len(terms) == 4)
    corners = [_corner(term, shape) for term in terms]
    _require({c.beyond for c in corners} == {(0, 0), (0, 1), (1, 0), (1, 1)})
    first = corners[0]
    _require(all(c[:4] == first[:4] for c in corners[1:]))
    _require(mask_groups in (None, first.groups))
    _require(not in_place or (first.groups == channels and kernel[0] == 1))

    padded = _made_by(first.image, "Pad")
    pads = _pads(padded)
    image_size = [s - 2 * p for s, p in zip(first.size, pads, strict=True)]
    _require(min(image_size) >= 0)
    node = _made_by(first.positions, "Add")
    origin, offset = _either(
        node, _constant, lambda v: _reshaped(v, first.groups, shape.points, 2, *size)
    )
    stride, padding, dilation = _regular(origin, kernel, size, image_size, pads)

    root, bias = conv, conv.inputs[2] if len(conv.inputs) > 2 else None
    if bias is None:
        root, bias = _added(conv, outputs)
    batch = flat[0] if flat[0] > 0 else None
    return Call(
        root,
        KIND,
        (_source(padded.inputs[0]), weight, _source(offset), mask and _source(mask), bias),
        (
            (batch, channels, *image_size),
            tuple(known),
            (batch, first.groups * shape.points * 2, *size),
            (batch, first.groups * shape.points, *size),
            (outputs,),
        ),
        stride,
        padding,
        dilation,
        groups,
        first.groups,
        [0, 0],
        [0, 0],
    )


def _mask(v: Value, s: _Shape) -> tuple[Value, int]:
    """The mask [B, G * K, h, w] that was reshaped to [B, G, 1, K, h, w], and G."""
    mask, sizes = _sizes(v, 6)
    _require(sizes[2:] == [1, s.points, *s.size])
    return mask, sizes[1]


def _terms(node: Node) -> list[Value]:
    """The terms that a Sum, or several Adds, add up."""
    found: list[Value] = []
    for v in node.inputs:
        made = _maker(v)
        if len(found) < 4 and made is not None and made.op_type in ("Sum", "Add"):
            found += _terms(made)
        else:
            found.append(v)
    return found


def _corner(term: Value, s: _Shape) -> _Corner:
    sample, (beyond, positions) = _either(
        _made_by(term, "Mul"), lambda v: _sample(v, s), lambda v: _share(v, s)
    )
    _require(sample.beyond == beyond and sample.positions is positions)
    found: _Corner = sample
    return found


def _share(v: Value, s: _Shape) -> tuple[tuple[int, int], Value]:
    """The corner and the positions for which a factor [B, G, 1, K, h, w] is the bilinear weight."""
    node = _made_by(v, "Reshape", "Mul")
    if node.op_type == "Reshape":
        t, sizes = _sizes(v, 6)
        _require(sizes[2:] == [1, s.points, *s.size])
        node = _made_by(t, "Mul")
    else:  # a Reshape that changes nothing was left out
        _require(s.points == 1)
    found: dict[int, int] = {}
    fractions = []
    for factor in node.inputs:
        node = _made_by(factor, "Sub", "Slice")
        beyond = int(node.op_type == "Slice")
        if not beyond:
            _is(node.inputs[0], 1)
            factor = node.inputs[1]
        fraction, axis = _slice(factor)
        found[axis] = beyond
        fractions.append(_source(fraction))
    _require(len(found) == 2 and fractions[0] is fractions[1])
    node = _made_by(fractions[0], "Sub")
    positions = _source(node.inputs[0])
    _require(_source(_made_by(node.inputs[1], "Floor").inputs[0]) is positions)
    return (found[0], found[1]), positions


def _sample(v: Value, s: _Shape) -> _Corner:
    """The corner whose values of the image [B, G, C / G, K, h, w] a factor holds."""
    t, (_, groups, *sizes) = _sizes(v, 6)
    _require(groups > 0 and sizes == [s.channels // groups, s.points, *s.size])
    count = s.points * s.size[0] * s.size[1]
    node = _made_by(t, "Transpose", "GatherElements")
    if node.op_type == "Transpose":  # what GatherND returns has the channels last
        _require(_attribute(node, "perm") == [0, 1, 3, 2])
        node = _made_by(node.inputs[0], "GatherND", "Reshape")
        if node.op_type == "Reshape":  # the exporter's enable_openvino_patch adds it
            node = _made_by(node.inputs[0], "GatherND")
        _require(_attribute(node, "batch_dims", 0) == 2)
        data = _made_by(node.inputs[0], "Transpose")
        _require(_attribute(data, "perm") == [0, 1, 3, 4, 2])
        data = data.inputs[0]
        index = _made_by(node.inputs[1], "Concat")
        _require(_attribute(index, "axis") in (3, -1) and len(index.inputs) == 2)
        y, x = (_end(_reshaped(i, groups, count, 1)) for i in index.inputs)
    else:
        _require(_attribute(node, "axis", 0) in (3, -1))
        data = _made_by(node.inputs[0], "Reshape").inputs[0]
        index = _made_by(_made_by(node.inputs[1], "Expand").inputs[0], "Add")
        (y, columns), x = _either(
            index,
            lambda v: _row(v, groups, count),
            lambda v: _end(_reshaped(v, groups, 1, count)),
        )
        _is(columns, x.last + 1)
    _require((y.axis, x.axis) == (0, 1) and y.positions is x.positions)
    size = (y.last + 1, x.last + 1)
    image, sizes = _sizes(data, 5) if node.op_type == "GatherND" else _whole(data, groups, s, size)
    _require(sizes[1:] == [groups, s.channels // groups, *size])
    return _Corner(groups, _source(image), size, y.positions, (y.beyond, x.beyond))


def _whole(data: Value, groups: int, s: _Shape, size: tuple[int, int]) -> tuple[Value, list[int]]:
    """What _sizes gives, also where an optimiser has left out the first of two Reshapes."""
    made = _maker(data)
    if made is not None and made.op_type == "Reshape":
        return _sizes(data, 5)
    return data, [0, groups, s.channels // groups, *size]


class _End(NamedTuple):
    """Where a corner is along an axis."""

    axis: int
    beyond: int
    last: int
    positions: Value


def _row(v: Value, groups: int, count: int) -> tuple[_End, Value]:
    """The factors of a product of a row and the number of columns."""
    node = _made_by(v, "Mul")
    end: tuple[_End, Value] = _either(
        node, lambda v: _end(_reshaped(v, groups, 1, count)), lambda v: v
    )
    return end


def _end(v: Value) -> _End:
    clip = _made_by(v, "Clip")
    _is(clip.inputs[1], 0)
    last = int(_constant(clip.inputs[2]).reshape(-1)[0])
    node = _made_by(clip.inputs[0], "Slice", "Add")
    beyond = int(node.op_type == "Add")
    t = clip.inputs[0]
    if beyond:
        t, _ = _either(node, lambda v: _made_by(v, "Slice").outputs[0], lambda v: _is(v, 1))
    t, axis = _slice(t)
    floor = _made_by(_made_by(t, "Cast").inputs[0], "Floor")
    return _End(axis, beyond, last, _source(floor.inputs[0]))


def _pads(node: Node) -> list[int]:
    """How many zeros a Pad adds to rows and columns, as many at both ends."""
    inputs = [*node.inputs, None, None][:4]
    _require(_attribute(node, "mode", "constant") == "constant")
    if inputs[2] is not None:
        _is(inputs[2], 0)
    if inputs[3] is not None:
        _is(inputs[3], 0, 1, 2, 3)
    pads = _constant(inputs[1]).reshape(-1).tolist()
    _require(len(pads) == 8 and pads[:4] == pads[4:] and pads[:2] == [0, 0])
    found: list[int] = pads[2:4]
    _require(min(found) > 0)  # so that positions clipped onto the border read 0
    return found


def _regular(
    origin: Any, kernel: list[int], size: tuple[int, int], image_size: list[int], pads: list[int]
) -> tuple[list[int], list[int], list[int]]:
    """Stride, padding and dilation, from the positions [1, 1, K, 2, h, w] in the padded image."""
    _require(origin.shape == (1, 1, kernel[0] * kernel[1], 2, *size) and origin.size)
    stride, padding, dilation = [], [], []
    for axis in range(2):
        # This is [kernel, size] along the axis, which has to be repeated along all other axes.
        along = origin[0, 0, :, axis].reshape(*kernel, *size)
        line = along[:, 0, :, 0] if axis == 0 else along[0, :, 0, :]
        repeated = line.reshape(line.shape[0], 1, -1, 1) if axis == 0 else line[:, None]
        _require((along == repeated).all())
        k, n = line.shape
        d = int(line[1, 0] - line[0, 0]) if k > 1 else 1
        p = pads[axis] - int(line[0, 0])
        room = image_size[axis] + 2 * p - d * (k - 1) - 1
        s = int(line[0, 1] - line[0, 0]) if n > 1 else room + 1  # one point has no stride
        _require(min(d, s) > 0 and min(p, room) >= 0 and room // s + 1 == n)
        regular = np.arange(k)[:, None] * d + np.arange(n) * s + pads[axis] - p
        _require((line == regular).all())
        stride.append(s)
        padding.append(p)
        dilation.append(d)
    return stride, padding, dilation


def _added(conv: Node, outputs: int) -> tuple[Node, Value | None]:
    """The Add of a bias behind a Conv, and the bias, of one axis or of [1, outputs, 1, 1]."""
    result = conv.outputs[0]
    users = list(result.uses())
    if len(users) != 1 or result.is_graph_output() or users[0].node.op_type != "Add":
        return conv, None
    add = users[0].node
    if add.graph is not conv.graph:
        return conv, None
    other = _source(add.inputs[1 - users[0].idx])
    try:
        node = _made_by(other, "Unsqueeze")
        axes = _attribute(node, "axes")
        axes = _constant(node.inputs[1]).reshape(-1).tolist() if axes is None else axes
        bias = _source(node.inputs[0])
        _require(axes == [0, 2, 3] and bias.shape == (outputs,))
        return add, bias
    except _OtherError:
        pass
    try:
        _require(_constant(other).shape in ((1, outputs, 1, 1), (outputs, 1, 1)))
    except _OtherError:
        return conv, None
    return add, other
