"""The names of deform_conv2d_onnx_exporter: its users change one import."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .graph import Graph, Value
from .lowerings import gather_elements, gather_rows
from .table import opset18, torchvision_call, translate


def create_deform_conv2d_custom_op(
    use_gathernd: bool = True, enable_openvino_patch: bool = False
) -> Callable[..., Any]:
    """The translation of torchvision's deform_conv2d by gathers, as in deform_conv2d_onnx_exporter.

    deformnd.onnx.export writes faster models; this is for code that has that package's calls.

    Args:
        use_gathernd: gather by GatherND, else by GatherElements.
        enable_openvino_patch: a Reshape after each GatherND, whose shape OpenVINO 2021.4 did not
            infer.

    Returns:
        The value for torch.ops.torchvision.deform_conv2d.default in the argument
        custom_translation_table of torch.onnx.export(dynamo=True), for opset 18 or newer.

    Raises:
        ImportError: onnxscript is not installed (`pip install 'deformnd[onnx]'`).

    Example:
        >>> from deformnd.onnx import create_deform_conv2d_custom_op
        >>> callable(create_deform_conv2d_custom_op(use_gathernd=False))
        True
    """
    op, lowering = opset18(), _gather(use_gathernd, enable_openvino_patch)

    def deform_conv2d(*args: Any) -> Value:
        return translate(op, lowering, *torchvision_call(*args))

    return deform_conv2d


def register_deform_conv2d_onnx_op(
    use_gathernd: bool = True, enable_openvino_patch: bool = False
) -> None:
    """Register torchvision's deform_conv2d with torch's legacy exporter.

    For torch.onnx.export(dynamo=False) and opset 12 or newer, as long as torch has that exporter.

    Args:
        use_gathernd, enable_openvino_patch: see create_deform_conv2d_custom_op.

    Example:
        >>> from deformnd.onnx import register_deform_conv2d_onnx_op
        >>> register_deform_conv2d_onnx_op()
    """
    from torch.onnx import symbolic_helper
    from torch.onnx.utils import register_custom_op_symbolic

    lowering = _gather(use_gathernd, enable_openvino_patch)

    def deform_conv2d(g: Any, *args: Any) -> Value:
        parameters = (symbolic_helper._parse_arg(a, "i") for a in args[5:])
        call: Any = torchvision_call(*args[:5], *parameters)
        return translate(_Ops(g), lowering, *call, graph=_Graph)

    register_custom_op_symbolic("torchvision::deform_conv2d", deform_conv2d, 12)


def _gather(use_gathernd: bool, enable_openvino_patch: bool) -> Callable[..., Value]:
    if not use_gathernd:
        return gather_elements
    return functools.partial(gather_rows, nd=True, reshape_gathered=enable_openvino_patch)


class _Graph(Graph):
    """Reads shapes and dtypes from the arguments of a legacy symbolic function."""

    def shape(self, t: Value) -> Sequence[Any]:
        from torch.onnx import symbolic_helper

        sizes: Sequence[Any] = symbolic_helper._get_tensor_sizes(t)
        return sizes

    def dtype(self, t: Value) -> Any:
        name = t.type().scalarType()  # "Float" ...
        return torch.empty(0, dtype=getattr(torch, name.lower())).numpy().dtype


class _Ops:
    """Gives the legacy exporter's graph the calls of an onnxscript opset."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph

    def __getattr__(self, name: str) -> Callable[..., Value]:
        def write(*inputs: Value, **attributes: Any) -> Value:
            kinds = {k + ("_s" if isinstance(v, str) else "_i"): v for k, v in attributes.items()}
            return self._graph.op(name, *inputs, **kinds)

        return write

    def Constant(self, value: Any) -> Value:
        from onnx import numpy_helper

        return self._graph.op("Constant", value_t=torch.tensor(numpy_helper.to_array(value)))

    # The axes of these two were an attribute until opset 13. torch's helpers write what the opset
    # needs.

    def Unsqueeze(self, t: Value, axes: Value) -> Value:
        from torch.onnx import symbolic_helper

        return symbolic_helper._unsqueeze_helper(self._graph, t, _values(axes))

    def Squeeze(self, t: Value, axes: Value) -> Value:
        from torch.onnx import symbolic_helper

        return symbolic_helper._squeeze_helper(self._graph, t, _values(axes))


def _values(constant: Value) -> list[int]:
    return list(constant.node().t("value").tolist())
