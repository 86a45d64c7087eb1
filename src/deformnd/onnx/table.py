"""How torch.onnx.export translates the operators: what is chosen for which target."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..kernels import library as library  # registers torch.ops.deformnd
from ..kernels.geometry import Attention, Geometry, check_ints
from . import attention, lowerings, nodes
from .graph import Graph, Size, Value

# Each with the opset that it takes by default, and the oldest that it can.
TARGETS = {
    "onnxruntime": (20, 19),
    "openvino": (20, 19),
    "standard": (20, 18),
    "precise": (18, 18),
    "deformnd": (18, 18),
}

Lowering = Callable[..., Value]
Tensors = tuple[Value | None, ...]  # input, weight, offset, mask, bias


class UnsupportedError(NotImplementedError, ValueError):
    """What a target cannot express: the message names target, opset and operator."""

    def __init__(self, target: str, opset: int, operator: str, reason: str) -> None:
        super().__init__(
            f"deformnd.onnx: {operator} cannot be exported for target {target!r} at opset {opset}: "
            + reason
        )


def resolve(target: str, opset: int | None) -> int:
    """The opset to write; raises ValueError or TypeError for what is no target or no opset."""
    if not isinstance(target, str) or target not in TARGETS:
        names = ", ".join(map(repr, TARGETS))
        raise ValueError(f"deformnd.onnx: target is {target!r}, expected one of {names}")
    if opset is None:
        return TARGETS[target][0]
    return check_ints("deformnd.onnx", "opset", opset, 0, 1)[0]


def translation_table(
    target: str = "onnxruntime", opset: int | None = None
) -> dict[Callable[..., Any], Callable[..., Any]]:
    """How torch.onnx.export translates deformnd's operators and torchvision's deform_conv2d.

    For those who call torch.onnx.export themselves; deformnd.onnx.export does it for you, and
    checks what it wrote.

    Args:
        target: "onnxruntime", "openvino", "standard", "precise" or "deformnd"; see
            deformnd.onnx.export. A program that was made for "openvino" or "deformnd" runs in other
            engines, too, once deformnd.onnx.add_function has completed it.
        opset: the opset_version that torch.onnx.export is given; None: 20, or 18 for "precise" and
            "deformnd".

    Returns:
        A dict for the argument custom_translation_table of torch.onnx.export(dynamo=True).
        torchvision's operator is in it if torchvision has been imported.

    Raises:
        ValueError, TypeError: no such target, or opset is no positive int.
        ImportError: onnxscript is not installed (`pip install 'deformnd[onnx]'`).
        During the export, UnsupportedError (as the cause of torch's own error).

    Example:
        >>> import torch
        >>> from deformnd import PackedDeformConv2d
        >>> from deformnd.onnx import translation_table
        >>> program = torch.onnx.export(
        ...     PackedDeformConv2d(3, 8, 3, padding=1).eval(),
        ...     (torch.rand(1, 3, 16, 16),),
        ...     dynamo=True,
        ...     verbose=False,
        ...     opset_version=20,
        ...     custom_translation_table=translation_table(opset=20),
        ... )
        >>> sorted({node.op_type for node in program.model.graph})
        ['Conv', 'DeformConv']
    """
    version = resolve(target, opset)
    op = opset18()

    def chosen(b: Graph, g: Geometry, *call: Value | None) -> Value:
        return choose(target, g)(b, g, *call)

    def deform_conv(
        input: Value,
        weight: Value,
        offset: Value | None,
        mask: Value | None,
        bias: Value | None,
        *parameters: Any,
    ) -> Value:
        tensors = (input, weight, offset, mask, bias)
        _check(target, version, f"deform_conv{len(parameters[0])}d", tensors)
        if target == "deformnd":
            return nodes.write(op, "DeformConv", tensors, **_named(*parameters))
        return translate(op, chosen, tensors, *parameters)

    def deform_conv_transpose(
        input: Value,
        weight: Value,
        offset: Value | None,
        mask: Value | None,
        bias: Value | None,
        stride: list[int],
        padding: list[int],
        output_padding: list[int],
        dilation: list[int],
        groups: int,
    ) -> Value:
        tensors = (input, weight, offset, mask, bias)
        _check(target, version, f"deform_conv_transpose{len(stride)}d", tensors)
        parameters = (stride, padding, dilation, groups, output_padding)
        if target == "deformnd":
            return nodes.write(op, "DeformConvTranspose", tensors, **_named(*parameters))
        return translate(op, lowerings.scatter, tensors, *parameters)

    def deform_aggregate(
        input: Value,
        offset: Value | None,
        mask: Value | None,
        kernel: list[int],
        stride: list[int],
        padding: list[int],
        dilation: list[int],
    ) -> Value:
        tensors = (input, None, offset, mask, None)
        _check(target, version, f"deform_aggregate{len(kernel)}d", tensors)
        ordinary = offset is None and mask is None
        if target == "deformnd" and not ordinary:
            attributes = {"kernel_size": kernel, **_named(stride, padding, dilation)}
            return nodes.write(op, "DeformAggregate", (input, offset, mask), **attributes)
        lowering = lowerings.ordinary if ordinary else chosen
        sizes = (stride, padding, dilation, int(input.shape[1]))
        return translate(op, lowering, tensors, *sizes, kernel=tuple(kernel))

    def deform_attention(
        value: Value, locations: Value, weights: Value, shapes: list[Any]
    ) -> Value:
        _check(target, version, "deform_attention", (value, locations, weights))
        if target == "deformnd":
            return nodes.write_attention(op, value, locations, weights, shapes)
        return translate_attention(op, target, value, locations, weights, shapes)

    table: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.deformnd.deform_conv.default: deform_conv,
        torch.ops.deformnd.deform_conv_transpose.default: deform_conv_transpose,
        torch.ops.deformnd.deform_aggregate.default: deform_aggregate,
        torch.ops.deformnd.deform_attention.default: deform_attention,
    }
    if hasattr(torch.ops.torchvision, "deform_conv2d"):

        def torchvision(*args: Any) -> Value:
            tensors, *parameters = torchvision_call(*args)
            return deform_conv(*tensors, *parameters)

        table[torch.ops.torchvision.deform_conv2d.default] = torchvision
    library.onnx_translations.update(table.values())
    return table


def _named(
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int | None = None,
    output_padding: list[int] | None = None,
) -> dict[str, Any]:
    """The attributes of a node of target "deformnd"."""
    named = {"stride": stride, "padding": padding, "dilation": dilation}
    more = {"groups": groups, "output_padding": output_padding}
    return {**named, **{key: value for key, value in more.items() if value is not None}}


def body(
    op: Any,
    name: str,
    tensors: Sequence[Value | None],
    attributes: dict[str, Any],
    sizes: list[int] | None,
) -> Value:
    """Write what a node of target "deformnd" computes, see Note [nodes and functions]."""
    if name == "DeformAttention":
        value, shapes, locations, weights = tensors
        b = Graph(op, [])
        assert shapes is not None and locations is not None
        listed: list[Any] | None = sizes
        if sizes is None:
            levels, axes = map(int, shapes.shape)
            flat = b.reshape(shapes, levels * axes)
            listed = [b.take(flat, i, 0) for i in range(levels * axes)]
        return translate_attention(op, "precise", value, locations, weights, listed or [])
    values = dict(attributes)
    kernel = tuple(values.pop("kernel_size", ()))
    if kernel:
        input, offset, mask = tensors
        assert input is not None
        tensors = (input, None, offset, mask, None)
        values["groups"] = int(input.shape[1])

    def chosen(b: Graph, g: Geometry, *call: Value | None) -> Value:
        return choose("precise", g)(b, g, *call)

    lowering = lowerings.scatter if "output_padding" in values else chosen
    return translate(op, lowering, tuple(tensors), kernel=kernel, **values)


def torchvision_call(
    input: Value,
    weight: Value,
    offset: Value,
    mask: Value,
    bias: Value,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
    offset_groups: int,
    use_mask: bool,
) -> tuple[Any, ...]:
    """Arguments of torchvision's operator as ours."""
    return (
        (input, weight, offset, mask if use_mask else None, bias),
        [stride_h, stride_w],
        [pad_h, pad_w],
        [dilation_h, dilation_w],
        groups,
    )


def opset18() -> Any:
    # The one that torch's own translations are written in; the exporter converts to the opset asked
    # for. DeformConv alone is newer.
    try:
        from onnxscript import opset18
    except ImportError as error:
        raise ImportError("deformnd.onnx needs onnxscript: pip install 'deformnd[onnx]'") from error
    return opset18


def _check(target: str, opset: int, operator: str, tensors: Tensors) -> None:
    oldest = TARGETS[target][1]
    if opset < oldest:
        hint = "; target 'precise' needs only 18" if oldest > 18 else ""
        reason = f"it needs opset {oldest} or newer{hint}"
        raise UnsupportedError(target, opset, operator, reason)
    if any(t is not None and t.dtype.name == "BFLOAT16" for t in tensors):
        reason = "engines do not run bfloat16 on a CPU; export model.float() or model.half()"
        raise UnsupportedError(target, opset, operator, reason)


def translate(
    op: Any,
    lowering: Lowering,
    tensors: Tensors,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    output_padding: list[int] | None = None,
    *,
    kernel: tuple[int, ...] = (),
    graph: type[Graph] = Graph,
) -> Value:
    """Write a call by a lowering, in float32 at least; output_padding: of the transpose.

    Without a weight, as of deform_aggregate, whose kernel is given, one of ones is written.
    """
    b = graph(op, [t for t in tensors if t is not None])
    g = _geometry(b, tensors, stride, padding, dilation, groups, output_padding, kernel)
    input, weight, offset, mask, bias = (
        t if t is None or b.dtype(t) == b.float else b.cast(t, b.float) for t in tensors
    )
    if weight is None:
        weight = b.array(np.ones((groups, 1, *kernel)), b.float)
    if (
        offset is None and mask is not None
    ):  # as many groups as the mask has, so that they need no repeating
        channels = g.mask_groups * math.prod(g.kernel) * len(g.kernel)
        offset = b.zeros(g.batch, channels, *g.point_size)
        g = g._replace(offset_groups=g.mask_groups)
    result = lowering(b, g, input, weight, offset, mask, bias)
    dtype = b.dtype(tensors[0])
    return result if dtype == b.float else b.cast(result, dtype)


def _geometry(
    b: Graph,
    tensors: Tensors,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    output_padding: list[int] | None,
    kernel: Sequence[int],
) -> Geometry:
    """The sizes of a call, with tensors of the graph for those that are not known."""
    input, weight, offset, mask, _ = tensors
    batch, channels, *size = b.sizes(input)
    first, second, *kernel = (groups, 1, *kernel) if weight is None else b.sizes(weight)
    points, n = math.prod(kernel), len(kernel)
    which = mask if offset is None else offset
    if output_padding is None:
        image_channels, point_channels = channels, first
        image_size, point_size = size, [] if which is None else b.sizes(which)[2:]
    else:
        image_channels, point_channels = second * groups, channels
        image_size, point_size = [], size
        for s, k, t, p, d, extra in zip(
            size, kernel, stride, padding, dilation, output_padding, strict=True
        ):
            image_size.append(b.add(b.mul(s, t), d * (k - 1) + extra + 1 - t - 2 * p))
    offset_groups = 0 if offset is None else b.sizes(offset)[1] // (n * points)
    mask_groups = 0 if mask is None else b.sizes(mask)[1] // points
    return Geometry(
        batch,
        image_channels,
        point_channels,
        groups,
        offset_groups,
        mask_groups,
        tuple(image_size),
        tuple(point_size),
        tuple(kernel),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
    )


def translate_attention(
    op: Any, target: str, value: Value, locations: Value, weights: Value, shapes: list[Any]
) -> Value:
    """Write a call of deform_attention; shapes are the levels' sizes, one after another."""
    b = Graph(op, (value, locations, weights))
    batch, pixels, heads, channels = b.sizes(value)
    queries, _, _, points, n = b.sizes(locations)[1:]
    # A size that is not known is a scalar of the graph.
    sizes: list[Size] = [s if isinstance(s, int) else b.reshape(s, 1) for s in shapes]
    levels = tuple(tuple(sizes[i : i + n]) for i in range(0, len(sizes), n))
    a = Attention(batch, queries, heads, channels, points, levels, pixels)
    tensors = (
        t if b.dtype(t) == b.float else b.cast(t, b.float) for t in (value, locations, weights)
    )
    result = choose_attention(target, a)(b, a, *tensors)
    dtype = b.dtype(value)
    return result if dtype == b.float else b.cast(result, dtype)


# Rows of a tall image up to which positions in it are good to 1e-5 of the result; see the docs.
_TALL = 1024

# Offset groups from which OpenVINO is faster by GridSample than by its own 2-D operator.
_MANY_GROUPS = 8

# Channels in an offset group from which ONNX Runtime gathers rows of them faster than elements.
_LONG_ROW = 32


def choose(target: str, g: Geometry) -> Lowering:
    """The lowering of a deform_conv that is best for the target, as measured; see docs/onnx.md."""
    n = len(g.kernel)
    if target == "standard":
        return lowerings.grid_sample
    if target == "openvino" and n == 2 and g.offset_groups >= _MANY_GROUPS:
        return lowerings.grid_sample
    if target == "openvino" and n == 1:
        return lowerings.gather_rows
    if target == "precise" or (n == 3 and not _short(g)):
        rows = target == "openvino" or g.image_channels // g.offset_groups >= _LONG_ROW
        return lowerings.gather_rows if rows else lowerings.gather_elements
    node = lowerings.standard_deform_conv2d
    if target == "openvino":
        node = lowerings.openvino_deform_conv2d
    lowering = lowerings.native3d if n == 3 else lowerings.native
    return functools.partial(lowering, deform_conv2d=node)


def _short(g: Geometry) -> bool:
    """Whether positions in the tall image of a 3-D call are fine enough; see _TALL."""
    depth, height, _ = g.image_size
    return isinstance(depth, int) and isinstance(height, int) and depth * (height + 1) <= _TALL


def choose_attention(target: str, a: Attention) -> Lowering:
    """The lowering of a deform_attention that is best for the target, as measured."""
    if target == "standard" and not _few_queries(a):
        return attention.grid_sample
    if target in ("standard", "precise") or len(a.shapes[0]) != 2 or _few_queries(a):
        return attention.gather
    return attention.grid_sample


def _few_queries(a: Attention) -> bool:
    """Whether to bring all pixels into GridSample's order costs more than it saves.

    Where the number of queries is not known, they are the pixels themselves, as in an encoder; a
    decoder has a number of its own.
    """
    if not isinstance(a.queries, int):
        return False
    return not isinstance(a.pixels, int) or 8 * a.queries < a.pixels
