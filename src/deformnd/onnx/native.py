"""Lowering to the DeformConv operator of ONNX (opset 19), which ONNX Runtime runs from 1.25 on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..kernels import library as library  # registers torch.ops.deformnd


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How torch.onnx.export translates deformnd's operators.

    Covers deform_conv2d in float32 and float64 with any groups, strides, paddings and dilations;
    offset and mask may be None and in different numbers of groups. The target opset must be 19 or
    newer (torch's default is). The other operators raise NotImplementedError when exported; a
    layer without offset and mask is an ordinary convolution and needs no table.

    Returns:
        A dict for the argument `custom_translation_table` of torch.onnx.export(dynamo=True).

    Raises:
        ImportError: onnxscript is not installed (`pip install deformnd[onnx]`).

    Example:
        >>> import io, torch
        >>> from deformnd import PackedDeformConv2d
        >>> from deformnd.onnx import translation_table
        >>> layer = PackedDeformConv2d(3, 8, 3, padding=1).eval()
        >>> program = torch.onnx.export(
        ...     layer,
        ...     (torch.rand(1, 3, 16, 16),),
        ...     dynamo=True,
        ...     verbose=False,
        ...     custom_translation_table=translation_table(),
        ... )
        >>> sorted({node.op_type for node in program.model.graph})
        ['Conv', 'DeformConv']
    """
    try:
        from onnxscript import opset19 as op
    except ImportError as error:
        raise ImportError("deformnd.onnx needs onnxscript: pip install 'deformnd[onnx]'") from error

    def deform_conv(
        input: Any,
        weight: Any,
        offset: Any,
        mask: Any,
        bias: Any,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Any:
        n = len(stride)
        if n != 2:
            raise _unsupported(f"deform_conv{n}d")
        kernel = [int(k) for k in weight.shape[2:]]
        points = math.prod(kernel)
        offset_groups = int(offset.shape[1]) // (2 * points) if offset is not None else 1
        mask_groups = int(mask.shape[1]) // points if mask is not None else 1
        # DeformConv has one number of groups: repeat both to the least common multiple.
        common = math.lcm(offset_groups, mask_groups)
        if offset is None:
            offset = _zeros(op, input, mask, 2 * points * common)
        else:
            offset = _repeat_groups(op, offset, offset_groups, common)
        if mask is not None:
            mask = _repeat_groups(op, mask, mask_groups, common)
        return op.DeformConv(
            input,
            weight,
            offset,
            bias,
            mask,
            kernel_shape=kernel,
            strides=list(stride),
            pads=[*padding, *padding],
            dilations=list(dilation),
            group=groups,
            offset_group=common,
        )

    def deform_conv_transpose(*args: Any) -> Any:
        raise _unsupported(f"deform_conv_transpose{len(args[5])}d")

    return {
        torch.ops.deformnd.deform_conv.default: deform_conv,
        torch.ops.deformnd.deform_conv_transpose.default: deform_conv_transpose,
    }


def _unsupported(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"deformnd.onnx: {name} cannot be exported yet; the standard operator DeformConv that "
        "this table uses is 2-D and not transposed"
    )


def _repeat_groups(op: Any, t: Any, groups: int, common: int) -> Any:
    """Repeat each group of channels of t [B, groups * c, H, W], so that there are `common`."""
    if groups == common:
        return t
    channels = int(t.shape[1])
    size = op.Shape(t, start=2, end=4)
    batch = op.Shape(t, start=0, end=1)

    def shape(*dims: int) -> Any:
        return op.Concat(batch, op.Constant(value_ints=list(dims)), size, axis=0)

    split = op.Reshape(t, shape(groups, 1, channels // groups), allowzero=1)
    repeated = op.Expand(split, shape(groups, common // groups, channels // groups))
    return op.Reshape(repeated, shape(common * channels // groups), allowzero=1)


def _zeros(op: Any, input: Any, mask: Any, channels: int) -> Any:
    """An offset of zeros with the mask's batch and spatial size."""
    batch, size = op.Shape(mask, start=0, end=1), op.Shape(mask, start=2, end=4)
    shape = op.Concat(batch, op.Constant(value_ints=[channels]), size, axis=0)
    zero = op.CastLike(op.Constant(value_float=0.0), input)
    return op.Expand(zero, shape)
