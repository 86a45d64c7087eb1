"""What counters of operations need to know of deformnd's layers, which they would count as zero.

Each function gives a dictionary to hand over. Counted are the multiplications of the ordinary
convolution, as the packages count them, and those of a packed layer's predictors; interpolation is
not counted. deform_aggregate counts as a depthwise convolution; thop sees it in packed layers only.
torch.utils.flop_counter knows the operators without help.

Example:
    >>> import torch
    >>> import deformnd
    >>> from deformnd.compat import counters
    >>> model = torch.nn.Sequential(deformnd.PackedDeformConv2d(3, 8, 3, padding=1))
    >>> x = torch.rand(1, 3, 16, 16)
    >>> import thop  # doctest: +SKIP
    >>> macs, parameters = thop.profile(  # doctest: +SKIP
    ...     model, inputs=(x,), custom_ops=counters.thop()
    ... )
    >>> from fvcore.nn import FlopCountAnalysis  # doctest: +SKIP
    >>> FlopCountAnalysis(model, x).set_op_handle(**counters.fvcore()).total()  # doctest: +SKIP
    179712
    >>> from ptflops import get_model_complexity_info  # doctest: +SKIP
    >>> macs, parameters = get_model_complexity_info(  # doctest: +SKIP
    ...     model, (3, 16, 16), custom_modules_hooks=counters.ptflops()
    ... )
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.modules import _DeformConvNd, _DeformConvTransposeNd, _Predicting

__all__ = ["fvcore", "ptflops", "thop"]

# By operator, whether it is transposed.
_OPERATORS = {"deform_conv": False, "deform_conv_transpose": True}


def fvcore() -> dict[str, Callable[..., int]]:
    """For `FlopCountAnalysis(...).set_op_handle(**fvcore())`, and mmengine's FlopAnalyzer."""

    def handle(transposed: bool) -> Callable[..., int]:
        def count(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            input, weight, output = (v.type().sizes() for v in (*inputs[:2], outputs[0]))
            return _products(input if transposed else output, weight)

        return count

    def aggregate(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        output = outputs[0].type().sizes()
        kernel = [size.toIValue() for size in inputs[3].node().inputs()]
        return _products(output, (output[1], *kernel))

    handles = {f"deformnd::{name}": handle(t) for name, t in _OPERATORS.items()}
    return handles | {"deformnd::deform_aggregate": aggregate}


def thop() -> dict[type, Callable[..., None]]:
    """For `thop.profile(..., custom_ops=thop())`; it has all layers defined when it is called."""

    def count(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        layer.total_ops += _of_layer(layer, inputs[0], output) + _taken(layer, "total_ops")

    return dict.fromkeys(_layers(), count)


def ptflops() -> dict[Any, Callable[..., Any]]:
    """For `get_model_complexity_info(..., custom_modules_hooks=ptflops())`, with either backend.

    It has all layers that are defined when it is called.
    """

    def of_layer(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        biases = 0 if getattr(layer, "bias", None) is None else output.numel()
        layer.__flops__ += _of_layer(layer, inputs[0], output) + biases
        layer.__flops__ += _taken(layer, "__flops__")

    def of_operator(transposed: bool) -> Callable[..., int]:
        def count(inputs: Sequence[Any], outputs: Sequence[Tensor]) -> int:
            return _products((inputs[0] if transposed else outputs[0]).shape, inputs[1].shape)

        return count

    def aggregate(inputs: Sequence[Any], outputs: Sequence[Tensor]) -> int:
        output = outputs[0].shape
        return _products(output, (output[1], *inputs[3]))

    operators = {getattr(torch.ops.deformnd, k): of_operator(t) for k, t in _OPERATORS.items()}
    operators[torch.ops.deformnd.deform_aggregate] = aggregate
    return {**dict.fromkeys(_layers(), of_layer), **operators}


def _products(positions: Sequence[int], weight: Sequence[int]) -> int:
    """The multiplications of a convolution at the positions of a tensor of shape [B, C, *size]."""
    return positions[0] * math.prod(positions[2:]) * math.prod(weight)


def _of_layer(layer: Any, input: Tensor, output: Tensor) -> int:
    positions = input if layer.transposed else output
    batched = positions.dim() == layer.rank + 2
    weight = getattr(layer, "weight", None)
    shape = (layer.in_channels, *layer.kernel_size) if weight is None else weight.shape
    return _products((positions if batched else positions[None]).shape, shape)


def _taken(module: nn.Module, count: str) -> Any:
    """Take over what the modules in a layer have counted, and return it.

    Both packages look no deeper than a layer that has a rule, so it has to add the predictors'
    share.
    """
    total = 0
    for child in module.children():
        total = total + _taken(child, count)
        mine = getattr(child, count, None)
        if mine is not None:
            total = total + mine
            setattr(child, count, 0 * mine)
    return total


def _layers() -> set[type]:
    found: set[type] = set()
    new: list[type] = [_DeformConvNd, _DeformConvTransposeNd, _Predicting]
    while new:
        kind = new.pop()
        if kind not in found:
            found.add(kind)
            new += kind.__subclasses__()
    return found
