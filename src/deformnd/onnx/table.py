"""How torch.onnx.export translates the operators: what is chosen for which target."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..kernels import library as library  # registers torch.ops.deformnd
from ..kernels.geometry import Geometry
from . import lowerings
from .graph import Graph, Value

# Each with the opset that it takes by default, and the oldest that it can.
TARGETS = {
    "onnxruntime": (20, 19),
    "openvino": (20, 19),
    "standard": (20, 18),
    "precise": (18, 18),
}

Lowering = Callable[..., Value]


class UnsupportedError(NotImplementedError):
    """What a target cannot express: the message names target, opset and operator."""

    def __init__(self, target: str, opset: int, operator: str, reason: str) -> None:
        super().__init__(
            f"deformnd.onnx: {operator} cannot be exported for target {target!r} at opset {opset}: "
            + reason
        )


def resolve(target: str, opset: int | None) -> int:
    """The opset to write; raises ValueError for what is no target."""
    if target not in TARGETS:
        names = ", ".join(map(repr, TARGETS))
        raise ValueError(f"deformnd.onnx: target is {target!r}, expected one of {names}")
    return TARGETS[target][0] if opset is None else opset


def translation_table(
    target: str = "onnxruntime", opset: int | None = None
) -> dict[Callable[..., Any], Callable[..., Any]]:
    """How torch.onnx.export translates deformnd's operators and torchvision's deform_conv2d.

    For those who call torch.onnx.export themselves; deformnd.onnx.export does it for you, and
    checks what it wrote.

    Args:
        target: "onnxruntime", "openvino", "standard" or "precise"; see deformnd.onnx.export. A
            program that was made for "openvino" runs in other engines, too, once
            deformnd.onnx.add_function has completed it.
        opset: the opset_version that torch.onnx.export is given; None: 20, or 18 for "precise".

    Returns:
        A dict for the argument custom_translation_table of torch.onnx.export(dynamo=True).
        torchvision's operator is in it if torchvision has been imported.

    Raises:
        ValueError: no such target.
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
    op = _opset18()

    def deform_conv(
        input: Value,
        weight: Value,
        offset: Value | None,
        mask: Value | None,
        bias: Value | None,
        *parameters: Any,
    ) -> Value:
        call = (input, weight, offset, mask, bias)
        return _translate(op, target, version, "deform_conv", call, *parameters)

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
        call = (input, weight, offset, mask, bias)
        name = "deform_conv_transpose"
        return _translate(
            op, target, version, name, call, stride, padding, dilation, groups, output_padding
        )

    table: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.deformnd.deform_conv.default: deform_conv,
        torch.ops.deformnd.deform_conv_transpose.default: deform_conv_transpose,
    }
    if hasattr(torch.ops.torchvision, "deform_conv2d"):

        def torchvision(*args: Any) -> Value:
            return _translate(op, target, version, "deform_conv", *torchvision_call(*args))

        table[torch.ops.torchvision.deform_conv2d.default] = torchvision
    return table


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


def _opset18() -> Any:
    # The one that torch's own translations are written in; the exporter converts to the opset asked
    # for. DeformConv alone is newer.
    try:
        from onnxscript import opset18
    except ImportError as error:
        raise ImportError("deformnd.onnx needs onnxscript: pip install 'deformnd[onnx]'") from error
    return opset18


def _translate(
    op: Any,
    target: str,
    opset: int,
    name: str,
    tensors: tuple[Value | None, ...],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    output_padding: list[int] | None = None,
) -> Value:
    name = f"{name}{len(stride)}d"
    if opset < TARGETS[target][1]:
        oldest = TARGETS[target][1]
        hint = "; target 'precise' needs 18" if oldest == 19 else ""
        reason = f"it needs opset {oldest} or newer{hint}"
        raise UnsupportedError(target, opset, name, reason)
    dtypes = [t.dtype.numpy() for t in tensors if t is not None]
    if any(dtype.name == "bfloat16" for dtype in dtypes):
        reason = "no engine runs bfloat16 models on a CPU; export model.float() or model.half()"
        raise UnsupportedError(target, opset, name, reason)
    # Coordinates and sums in float32 at least.
    input, *rest = tensors
    b = Graph(op, np.result_type(np.float32, *dtypes))
    image, weight, offset, mask, bias = (
        t if t is None or t.dtype.numpy() == b.float else b.cast(t, b.float)
        for t in (input, *rest)
    )
    g = geometry(b, tensors, stride, padding, dilation, groups, output_padding)
    result = lower(b, g, target, output_padding is not None, image, weight, offset, mask, bias)
    assert input is not None
    return result if dtypes[0] == b.float else b.cast(result, dtypes[0])


def geometry(
    b: Graph,
    tensors: tuple[Value | None, ...],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    output_padding: list[int] | None = None,
) -> Geometry:
    """The sizes of a call, with tensors of the graph for those that are not known."""
    input, weight, offset, mask, _ = tensors
    batch, channels, *size = b.sizes(input)
    first, second, *kernel = b.sizes(weight)
    points, n = math.prod(kernel), len(kernel)
    which = mask if offset is None else offset
    if output_padding is None:
        image_channels, point_channels = channels, first
        image_size, point_size = size, b.sizes(which)[2:]
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


# Rows of a tall image up to which positions in it are good to 1e-5 of the result; see the docs.
_TALL = 1024

# Offset groups from which OpenVINO is faster by GridSample than by its own operator.
_MANY_GROUPS = 8


def lower(
    b: Graph,
    g: Geometry,
    target: str,
    transposed: bool,
    input: Value,
    weight: Value,
    offset: Value | None,
    mask: Value | None,
    bias: Value | None,
) -> Value:
    """Write a call by the lowering that is best for the target."""
    if offset is None:  # as many groups as the mask has, so that they need no repeating
        channels = g.mask_groups * math.prod(g.kernel) * len(g.kernel)
        offset = b.expand(b.number(0), g.batch, channels, *g.point_size)
        g = g._replace(offset_groups=g.mask_groups)
    call = (b, g, input, weight, offset, mask, bias)
    if transposed:
        return lowerings.scatter(*call)
    if target == "precise":
        return lowerings.gather(*call)
    if target == "standard":
        return lowerings.grid_sample(*call)
    node = lowerings.standard_deform_conv2d
    if target == "openvino":
        if g.offset_groups >= _MANY_GROUPS:
            return lowerings.grid_sample(*call)
        node = lowerings.openvino_deform_conv2d
    if len(g.kernel) < 3:
        return lowerings.native(*call, node)
    depth, height, _ = g.image_size
    if isinstance(depth, int) and isinstance(height, int) and depth * (height + 1) <= _TALL:
        return lowerings.native3d(*call, node)
    return lowerings.gather(*call)
