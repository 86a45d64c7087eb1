"""How torch.onnx.export translates the operators: which lowering is chosen for which target."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..kernels import library as library  # registers torch.ops.deformnd
from ..kernels.geometry import Attention, Geometry, check_ints
from . import attention, lowerings, nodes
from .graph import Graph, Size, Value, WithoutComparisons

Lowering = Callable[..., Value]
Choice = Callable[[Any], "Lowering | str"]  # the str is the reason why there is no lowering
Choices = tuple[Choice, Choice, Choice]  # for 1-D, 2-D and 3-D
Tensors = tuple[Value | None, ...]  # input, weight, offset, mask, bias


class UnsupportedError(NotImplementedError, ValueError):
    """A target cannot express an operator. The message names target, opset and operator."""

    def __init__(self, target: str, opset: int, operator: str, reason: str) -> None:
        super().__init__(
            f"deformnd.onnx: {operator} cannot be exported for target {target!r} at opset {opset}: "
            + reason
        )


def resolve(target: str, opset: int | None) -> int:
    """The opset to write. Raises ValueError or TypeError if target or opset is not a valid one."""
    if isinstance(target, str) and target in ELSEWHERE:
        raise ValueError(f"deformnd.onnx: target {target!r}: {ELSEWHERE[target]}")
    if not isinstance(target, str) or target not in TARGETS:
        names = ", ".join(map(repr, TARGETS))
        lines = {name: t.line for name, t in TARGETS.items()} | ELSEWHERE
        raise ValueError(
            f"deformnd.onnx: target is {target!r}, expected one of {names}"
            + "".join(f"\n    {name}: {line}" for name, line in lines.items())
        )
    if opset is None:
        return TARGETS[target].opset
    return check_ints("deformnd.onnx", "opset", opset, 0, 1)[0]


def translation_table(
    target: str = "onnxruntime", opset: int | None = None
) -> dict[Callable[..., Any], Callable[..., Any]]:
    """How torch.onnx.export translates deformnd's operators and torchvision's deform_conv2d.

    This is for those who call torch.onnx.export themselves. deformnd.onnx.export does it for you,
    and checks what it wrote.

    Args:
        target: a name in deformnd.onnx.TARGETS; see deformnd.onnx.export. A program that was made
            for "openvino" or "deformnd" runs in other engines, too, once
            deformnd.onnx.add_function has completed it.
        opset: the opset_version that torch.onnx.export is given. None: the target's opset in
            deformnd.onnx.TARGETS.

    Returns:
        A dict for the argument custom_translation_table of torch.onnx.export(dynamo=True).
        torchvision's operator is in it if torchvision has been imported.

    Raises:
        ValueError, TypeError: there is no such target, or opset is no positive int.
        ImportError: onnxscript is not installed (`pip install 'deformnd[onnx]'`).
        The export itself raises UnsupportedError, as the cause of torch's own error.

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
    op, found = opset18(), TARGETS[target]
    own = target == "deformnd"

    def lowered(operator: str, choices: Choices) -> Lowering:
        def lowering(b: Graph, g: Any, *call: Value | None) -> Value:
            n = len(g.shapes[0] if isinstance(g, Attention) else g.kernel)
            chosen = choices[n - 1](g)
            if isinstance(chosen, str):
                raise UnsupportedError(target, version, operator, chosen)
            return chosen(b, g, *call)

        return lowering

    def deform_conv(
        input: Value,
        weight: Value,
        offset: Value | None,
        mask: Value | None,
        bias: Value | None,
        *parameters: Any,
    ) -> Value:
        tensors = (input, weight, offset, mask, bias)
        operator = f"deform_conv{len(parameters[0])}d"
        _check(target, version, operator, tensors)
        if own:
            return nodes.write(op, "DeformConv", tensors, **_named(*parameters))
        lowering = lowered(operator, found.conv)
        return translate(op, lowering, tensors, *parameters, graph=found.graph)

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
        operator = f"deform_conv_transpose{len(stride)}d"
        _check(target, version, operator, tensors)
        parameters = (stride, padding, dilation, groups, output_padding)
        if own:
            return nodes.write(op, "DeformConvTranspose", tensors, **_named(*parameters))
        lowering = lowered(operator, (found.transpose,) * 3)
        return translate(op, lowering, tensors, *parameters, graph=found.graph)

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
        operator = f"deform_aggregate{len(kernel)}d"
        _check(target, version, operator, tensors)
        ordinary = offset is None and mask is None
        if own and not ordinary:
            attributes = {"kernel_size": kernel, **_named(stride, padding, dilation)}
            return nodes.write(op, "DeformAggregate", (input, offset, mask), **attributes)
        lowering = lowerings.ordinary if ordinary else lowered(operator, found.conv)
        sizes = (stride, padding, dilation, int(input.shape[1]))
        return translate(op, lowering, tensors, *sizes, kernel=tuple(kernel), graph=found.graph)

    def deform_attention(
        value: Value, locations: Value, weights: Value, shapes: list[Any]
    ) -> Value:
        _check(target, version, "deform_attention", (value, locations, weights))
        if own:
            return nodes.write_attention(op, value, locations, weights, shapes)
        lowering = lowered("deform_attention", found.attention)
        return translate_attention(op, lowering, value, locations, weights, shapes)

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
    """Write what a node of target "deformnd" computes; see Note [nodes and functions] in
    nodes.py."""
    if name == "DeformAttention":
        value, shapes, locations, weights = tensors
        b = Graph(op, [])
        assert shapes is not None and locations is not None
        listed: list[Any] | None = sizes
        if sizes is None:
            levels, axes = map(int, shapes.shape)
            flat = b.reshape(shapes, levels * axes)
            listed = [b.take(flat, i, 0) for i in range(levels * axes)]
        return translate_attention(op, attention.gather, value, locations, weights, listed or [])
    values = dict(attributes)
    kernel = tuple(values.pop("kernel_size", ()))
    if kernel:
        input, offset, mask = tensors
        assert input is not None
        tensors = (input, None, offset, mask, None)
        values["groups"] = int(input.shape[1])
    lowering = lowerings.scatter if "output_padding" in values else _gathered
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
    """The arguments of torchvision's operator as deform_conv takes them."""
    return (
        (input, weight, offset, mask if use_mask else None, bias),
        [stride_h, stride_w],
        [pad_h, pad_w],
        [dilation_h, dilation_w],
        groups,
    )


def opset18() -> Any:
    # torch's own translations are written in this opset, and the exporter converts them to the
    # opset asked for. Of the operators used here only DeformConv is newer.
    try:
        from onnxscript import opset18
    except ImportError as error:
        raise ImportError("deformnd.onnx needs onnxscript: pip install 'deformnd[onnx]'") from error
    return opset18


def _check(target: str, opset: int, operator: str, tensors: Tensors) -> None:
    oldest = TARGETS[target].oldest
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
    """Write a call by a lowering, in float32 at least. output_padding is given for the transpose.

    A call of deform_aggregate has no weight. Its kernel is given instead, and a weight of ones is
    written.
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
    """The geometry of a call, with tensors of the graph for the sizes that are not known."""
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
    op: Any, lowering: Lowering, value: Value, locations: Value, weights: Value, shapes: list[Any]
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
    result = lowering(b, a, *tensors)
    dtype = b.dtype(value)
    return result if dtype == b.float else b.cast(result, dtype)


# In a tall image of at most this many rows, positions are exact enough for results to be good to
# 1e-5 (docs/onnx.md).
_TALL = 1024

# From this many offset groups on, OpenVINO is faster by GridSample than by its own 2-D operator.
_MANY_GROUPS = 8

# From this many channels in an offset group on, ONNX Runtime gathers rows faster than elements.
_LONG_ROW = 32


def _by_gather(g: Geometry) -> Lowering:
    if g.image_channels // g.offset_groups >= _LONG_ROW:
        return lowerings.gather_rows
    return lowerings.gather_elements


def _gathered(b: Graph, g: Geometry, *call: Value | None) -> Value:
    return _by_gather(g)(b, g, *call)


def _by_rows(g: Geometry) -> Lowering:
    return lowerings.gather_rows


def _by_grid_sample(g: Geometry) -> Lowering:
    return lowerings.grid_sample


def _by_deform_conv(g: Geometry) -> Lowering:
    node = lowerings.standard_deform_conv2d
    if len(g.kernel) < 3:
        return functools.partial(lowerings.native, deform_conv2d=node)
    if not short(g):
        return _by_gather(g)
    return functools.partial(lowerings.native3d, deform_conv2d=node)


def _by_openvino(g: Geometry) -> Lowering:
    node = lowerings.openvino_deform_conv2d
    if len(g.kernel) == 3:
        native = functools.partial(lowerings.native3d, deform_conv2d=node)
        return native if short(g) else lowerings.gather_rows
    if g.offset_groups >= _MANY_GROUPS:
        return lowerings.grid_sample
    return functools.partial(lowerings.native, deform_conv2d=node)


def _by_ncnn(g: Geometry) -> Lowering | str:
    if max(g.offset_groups, g.mask_groups) > 1:
        return "pnnx takes one group of offsets and of masks; try target 'standard' elsewhere"
    return lowerings.grid_sample


def _by_scatter(g: Geometry) -> Lowering:
    return lowerings.scatter


def short(g: Geometry) -> bool:
    """Whether positions in the tall image of a 3-D call are fine enough; see _TALL."""
    depth, height, _ = g.image_size
    return isinstance(depth, int) and isinstance(height, int) and depth * (height + 1) <= _TALL


def _attention_by_gather(a: Attention) -> Lowering:
    return attention.gather


def _attention_by_grid_sample(a: Attention) -> Lowering:
    return attention.gather if _few_queries(a) else attention.grid_sample


def _few_queries(a: Attention) -> bool:
    """Whether there are so few queries that bringing all pixels into GridSample's order costs more
    than it saves.

    If their number is not known, the queries are assumed to be the pixels themselves, as in an
    encoder. A decoder has a fixed number of queries.
    """
    if not isinstance(a.queries, int):
        return False
    return not isinstance(a.pixels, int) or 8 * a.queries < a.pixels


def _no(reason: str) -> Choice:
    return lambda g: reason


class Target(NamedTuple):
    """The engine that runs a file, and what becomes of each operator in it."""

    opset: int  # the default
    oldest: int  # the oldest opset that a file can have
    line: str
    conv: Choices = (_by_gather,) * 3  # for deform_conv and deform_aggregate
    attention: Choices = (_attention_by_gather,) * 3
    transpose: Choice = _by_scatter
    engines: tuple[str, ...] = ("onnxruntime",)  # the engines in which an export is verified
    coarse: bool = False  # whether positions are those of GridSample, which are less exact
    graph: type[Graph] = Graph


# docs/onnx.md says what runs where and how fast, as measured. Three choices are for 1-D, 2-D and
# 3-D. `_no` stands where there is no lowering, and says why.
TARGETS = {
    # ONNX Runtime has DeformConv. A 1-D image is one row of its 2-D image, and a 3-D one a tall
    # image.
    "onnxruntime": Target(
        20,
        19,
        "ONNX Runtime 1.26 or newer, by the standard DeformConv",
        (_by_deform_conv,) * 3,
        (_attention_by_gather, _attention_by_grid_sample, _attention_by_gather),
    ),
    # The file has OpenVINO's own operator, and other engines read it, too. In 1-D, OpenVINO gathers
    # faster than its operator runs.
    "openvino": Target(
        20,
        19,
        "OpenVINO, or one file for it and ONNX Runtime, by either engine's own operator",
        (_by_rows, _by_openvino, _by_openvino),
        (_attention_by_gather, _attention_by_grid_sample, _attention_by_gather),
        engines=("openvino", "onnxruntime"),
    ),
    # GridSample's samples are kept inside the image, since several engines are wrong outside it.
    "standard": Target(
        20,
        18,
        "another engine, by GridSample",
        (_by_grid_sample,) * 3,
        (_attention_by_grid_sample,) * 3,
        coarse=True,
    ),
    # Gathers do not round positions, and their operators are the oldest and plainest.
    "precise": Target(
        18, 18, "most engines, ONNX Runtime from 1.19, with the smallest error, by Gather"
    ),
    # The target's own nodes are written by nodes.py. These lowerings are for the functions that
    # stand in for them.
    "deformnd": Target(
        18,
        18,
        "ONNX Runtime 1.19 or newer on deformnd's own kernels, the fastest on a CPU",
        engines=("onnxruntime", "deformnd"),
    ),
    # TensorRT's parser has DeformConv in 2-D from 10.1 on. Its GridSample is wrong in several
    # versions.
    "tensorrt": Target(
        19,
        19,
        "TensorRT 10.1 or newer, by DeformConv in 2-D, else by Gather",
        (_by_gather, _by_deform_conv, _by_gather),
    ),
    # WebGPU's provider has no DeformConv, and its GridSample was wrong.
    "webgpu": Target(18, 18, "ONNX Runtime's WebGPU provider, by Gather"),
    # When a file is made it is not known whether the browser will have WebGPU.
    "web": Target(18, 18, "ONNX Runtime in browsers, on WebAssembly or WebGPU, by Gather"),
    # pnnx reads GridSample, but not Less, Where or ScatterElements, nor tensors of five axes.
    "ncnn": Target(
        20,
        18,
        "ncnn by pnnx, by GridSample, in 1-D and 2-D with one group of offsets",
        (_by_ncnn, _by_ncnn, _no("pnnx has no tensors of five axes in 3-D")),
        (_no("pnnx has no tensors of six axes"),) * 3,
        transpose=_no("pnnx has no ScatterElements"),
        coarse=True,
        graph=WithoutComparisons,
    ),
}

# These converters read no ONNX file, but a torch.export.ExportedProgram.
ELSEWHERE = {
    "coreml": "coremltools reads no ONNX file, but an ExportedProgram with torchvision's "
    "operator: deformnd.export.to_torchvision",
    "litert": "LiteRT's converter reads no ONNX file, but an ExportedProgram of core ATen "
    "operators: deformnd.export.to_core_aten",
}
