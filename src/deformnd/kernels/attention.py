"""deform_attention as torch sees it: schema, kernels, fakes, autocast, counts and derivatives.

It is no Family of geometry.py, since its samples lie on several images at once and its channels are
last. What it shares with the other operators is in autograd.py, its sizes are in geometry.py and
its definition is in reference.py.

Note [derivatives of attention]
With J the operator's derivative at its tensors x, the backward gives u -> J(x)^T u, and
reference.attend_along gives v -> J(x) v as a composition of torch's own operations. The backward's
own derivatives are made of these two: the one by u is J again, and the one by x is the gradient of
<u, J(x) v> by x, in forward and in reverse mode alike. So all derivatives but the first are
computed by the reference, on every device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import autograd, direct, reference
from .autograd import Gradients
from .directional import Tensors, plus
from .geometry import attention_geometry

NAME = "deform_attention"
_TENSORS = "Tensor value, Tensor locations, Tensor weights"


def _forward_kernel(backend: Callable[[], Any]) -> Callable[..., Tensor]:
    def forward(value: Tensor, locations: Tensor, weights: Tensor, shapes: Sequence[int]) -> Tensor:
        a = attention_geometry(value, locations, weights, shapes)
        result: Tensor = backend().attend(a, value, locations, weights)
        return result

    return forward


def _backward_kernel(backend: Callable[[], Any]) -> Callable[..., Gradients]:
    def backward(
        grad_output: Tensor,
        value: Tensor,
        locations: Tensor,
        weights: Tensor,
        shapes: Sequence[int],
        needs: Sequence[bool],
    ) -> Gradients:
        a = attention_geometry(value, locations, weights, shapes)
        _check_backward(a.output_shape, grad_output, value, needs)
        grads: Gradients = (None, None, None)
        if any(needs):
            grads = backend().attend_gradients(a, grad_output, value, locations, weights, needs)
        return grads

    return backward


def _check_backward(
    expected: Sequence[int], grad_output: Tensor, value: Tensor, needs: Sequence[bool]
) -> None:
    if len(needs) != 3:
        raise ValueError(
            f"{NAME}_backward: needs has {len(needs)} values, expected 3 (whether the gradients of "
            "value, locations and weights are needed)"
        )
    if tuple(grad_output.shape) != tuple(expected):
        raise ValueError(
            f"{NAME}_backward: grad_output has shape {list(grad_output.shape)}, "
            f"expected {list(expected)}"
        )
    for what, got, want in (
        ("dtype", grad_output.dtype, value.dtype),
        ("device", grad_output.device, value.device),
    ):
        if got != want:
            raise TypeError(f"{NAME}_backward: grad_output has {what} {got}, expected {want}")


def _forward_fake(*args: Any) -> Tensor:
    from .library import hint_at_onnx  # Not above, since library.py imports this module.

    hint_at_onnx()
    value: Tensor = args[0]
    return value.new_empty(attention_geometry(*args).output_shape)


def _backward_fake(grad_output: Tensor, *args: Any) -> Gradients:
    *args_, needs = args
    a = attention_geometry(*args_)
    _check_backward(a.output_shape, grad_output, args[0], needs)
    return tuple(
        t.new_empty(t.shape) if need else None for t, need in zip(args[:3], needs, strict=True)
    )


def _autocast(device: str, value: Tensor, *rest: Any) -> Tensor:
    # As in torch's own rules, float64 stays. Locations and weights keep their precision.
    if value.dtype != torch.float64:
        value = value.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        result: Tensor = torch.ops.deformnd.deform_attention(value, *rest)
    return result


def _flops(value: Sequence[int], weights: Sequence[int]) -> int:
    """Operations of summing the samples up; as elsewhere, interpolation is not counted."""
    return int(2 * math.prod(weights) * value[-1])


def _forward_flops(*args: Any, out_shape: Any) -> int:
    return _flops(args[0], args[2])


def _backward_flops(grad_output: Sequence[int], *args: Any, out_shape: Any) -> int:
    by_value, by_locations, by_weights = args[-1]
    return (bool(by_value) + bool(by_locations or by_weights)) * _flops(args[0], args[2])


class _Kind(NamedTuple):
    """What autograd.py has to know of this operator."""

    name: str = NAME
    tensors: int = 3
    saved: int = 3
    transposed: bool = True


def _tangent(tensors: Tensors, parameters: Sequence[Any], along: Tensors) -> Tensor:
    value, locations, weights = tensors
    assert value is not None and locations is not None and weights is not None
    a = attention_geometry(value, locations, weights, *parameters)
    return reference.attend_along(a, (value, locations, weights), along)


def _curved(
    tensors: Tensors, shapes: Sequence[int], along: Tensors, grad_output: Tensor
) -> tuple[Tensor, ...]:
    """The gradient of <grad_output, J(tensors) along> by the tensors."""

    def tangent(*tensors: Tensor) -> Tensor:
        return _tangent(tensors, (shapes,), along)

    pulled = torch.func.vjp(tangent, *tensors)[1]
    grads: tuple[Tensor, ...] = pulled(grad_output)
    return grads


def _backward_gradient(ctx: Any, *along: Tensor | None) -> tuple[Any, ...]:
    grad_output, *tensors = ctx.saved_tensors
    shapes, _ = ctx.parameters
    if all(t is None for t in along):
        return (None,) * 6
    first = _tangent(tensors, (shapes,), along) if ctx.needs_input_grad[0] else None
    rest: Gradients = (None, None, None)
    if any(ctx.needs_input_grad[1:4]):
        rest = _curved(tensors, shapes, along, grad_output)
    return (first, *rest, None, None)


def _backward_tangent(tensors: Tensors, parameters: Sequence[Any], direction: Tensors) -> Gradients:
    grad_output, *saved = tensors
    along_grad_output, *along = direction
    shapes, needs = parameters
    assert grad_output is not None
    grads: Gradients = (None, None, None)
    if any(t is not None for t in along):
        grads = _curved(saved, shapes, along, grad_output)
    if along_grad_output is not None:
        backward = torch.ops.deformnd.deform_attention_backward
        more = backward(along_grad_output, *saved, shapes, needs)
        grads = tuple(plus(t, m) for t, m in zip(grads, more, strict=True))
    return tuple(
        None if not need or like is None else torch.zeros_like(like) if t is None else t
        for need, t, like in zip(needs, grads, saved, strict=True)
    )


def _fold(t: Tensor, dim: int | None, size: int) -> Tensor:
    """Merge the mapped dimension (None: not mapped) into the batch."""
    t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.flatten(0, 1)


def _vmap(name: str, count: int, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    size: int = info.batch_size
    folded = [_fold(t, d, size) for t, d in zip(args[:count], in_dims[:count], strict=True)]
    results = getattr(torch.ops.deformnd, name)(*folded, *args[count:])
    if isinstance(results, Tensor):
        return results.unflatten(0, (size, results.shape[0] // size)), 0
    grads = tuple(
        None if t is None else t.unflatten(0, (size, t.shape[0] // size)) for t in results
    )
    return grads, tuple(None if t is None else 0 for t in grads)


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """What library.decompositions gives for this operator."""
    ops = torch.ops.deformnd
    return {
        ops.deform_attention.default: _forward_kernel(lambda: reference),
        ops.deform_attention_backward.default: _backward_kernel(lambda: reference),
    }


def register(
    lib: torch.library.Library,
    backends: Sequence[tuple[str, Callable[[], Any]]],
    recalled: Callable[..., Any],
) -> None:
    """Register the operator and its backward.

    backends: pairs of a dispatch key and what gives its backend. recalled: what wraps the kernels
    for GPUs, from gpu/__init__.py.
    """
    backward_name = NAME + "_backward"
    for schema in (
        f"{NAME}({_TENSORS}, SymInt[] shapes) -> Tensor",
        f"{backward_name}(Tensor grad_output, {_TENSORS}, SymInt[] shapes, bool[3] needs) -> "
        "(Tensor, Tensor, Tensor)",
    ):
        lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    of = functools.partial
    forward = {key: _forward_kernel(backend) for key, backend in backends}
    backward = {key: _backward_kernel(backend) for key, backend in backends}
    if "CUDA" in forward:
        forward["CUDA"] = recalled(forward["CUDA"], range(3), False)
        backward["CUDA"] = recalled(backward["CUDA"], range(4), True)
    directly = direct.kernels_by_keys(backward)
    by_forward = of(autograd.forward_gradient, _Kind(), directly)
    for name, kernels, count, gradient, tangent, fake, flops in (
        (NAME, forward, 3, by_forward, _tangent, _forward_fake, _forward_flops),
        (
            backward_name,
            backward,
            4,
            _backward_gradient,
            _backward_tangent,
            _backward_fake,
            _backward_flops,
        ),
    ):
        for key, kernel in kernels.items():
            lib.impl(name, kernel, key)
        vmap_rule = of(_vmap, name, count)
        autograd.register_one(lib, name, kernels, count, count, gradient, tangent, vmap_rule)
        torch.library.register_fake(f"deformnd::{name}", fake, lib=lib)
        register_flop_formula(getattr(torch.ops.deformnd, name))(flops)
    autograd.OPERATORS[NAME].repeat = autograd.repeated(_Kind(), directly)
    for device in ("cpu", "cuda", "mps", "xpu"):
        lib.impl(NAME, of(_autocast, device), "Autocast" + device.upper())
