"""The operators as torch sees them: schemas, kernels, fakes, autograd, autocast, vmap.

The dispatcher is the only registry: it picks the kernel by device, and the reference runs
wherever no other kernel is registered. Both families share every rule below; what differs is
the schema, the function that makes the Geometry, and which tensor is the image (see
Note [one bilinear form] in geometry.py).
"""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function
from torch.utils.flop_counter import register_flop_formula

from . import cpu, directional, reference, sharding
from .directional import Tensors
from .geometry import Geometry, conv_geometry, conv_transpose_geometry, memory_format

_lib = torch.library.Library("deformnd", "DEF")

_TENSORS = "Tensor input, Tensor weight, Tensor? offset, Tensor? mask"
_CONV = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"
_TRANSPOSE = (
    "SymInt[] stride, SymInt[] padding, SymInt[] output_padding, SymInt[] dilation, SymInt groups"
)


class _Family(NamedTuple):
    name: str
    transposed: bool
    parameters: str
    geometry: Callable[..., Geometry]


_FAMILIES = (
    _Family("deform_conv", False, _CONV, conv_geometry),
    _Family("deform_conv_transpose", True, _TRANSPOSE, conv_transpose_geometry),
)


@functools.cache
def _gpu() -> Any:
    """The Triton kernels, imported at the first call (0.4 s), or the reference without Triton."""
    try:
        from .triton import launch
    except ImportError as failure:
        warnings.warn(
            f"deformnd: without Triton GPU tensors take the slow reference ({failure})",
            stacklevel=2,
        )
        return reference
    return launch


# What computes, by dispatch key; the first stands in wherever there is no other.
_BACKENDS: list[tuple[str, Callable[[], Any]]] = [("CompositeExplicitAutograd", lambda: reference)]
if cpu.available():
    _BACKENDS.append(("CPU", lambda: cpu))
if torch.version.cuda or torch.version.hip:
    _BACKENDS.append(("CUDA", _gpu))


def compiled_keys() -> list[str]:
    """Dispatch keys of the devices that have kernels of their own here, such as 'CPU'."""
    triton = importlib.util.find_spec("triton") is not None
    return [key for key, _ in _BACKENDS[1:] if triton or key != "CUDA"]


# Gradients by (input, weight, offset, mask, bias); None where not needed.
Gradients = tuple[Tensor | None, ...]


def _remembered(geometry: Callable[..., Geometry]) -> Callable[..., Geometry]:
    """`geometry`, but a call with the sizes of an earlier one is not checked again."""
    known: dict[Any, Geometry] = {}

    def remembered(*args: Any) -> Geometry:
        tensors = args[:5]
        key = (
            *[None if t is None else (t.shape, t.dtype, t.device) for t in tensors],
            *[tuple(p) if isinstance(p, (list, tuple)) else p for p in args[5:]],
        )
        try:
            found = known.get(key)
        except TypeError:  # symbolic sizes
            return geometry(*args)
        if found is None:
            found = geometry(*args)
            if len(known) >= 4096:
                known.clear()
            if args[0].dtype == args[1].dtype:  # or only autocast made it valid
                known[key] = found
        return found

    return remembered


def _forward_kernel(family: _Family, backend: Callable[[], Any]) -> Callable[..., Tensor]:
    geometry = _remembered(family.geometry)

    def forward(
        input: Tensor,
        weight: Tensor,
        offset: Tensor | None,
        mask: Tensor | None,
        bias: Tensor | None,
        *parameters: Any,
    ) -> Tensor:
        g = geometry(input, weight, offset, mask, bias, *parameters)
        compute = backend().scatter if family.transposed else backend().gather
        result: Tensor = compute(g, input, weight, offset, mask, bias)
        return result

    return forward


def _backward_kernel(family: _Family, backend: Callable[[], Any]) -> Callable[..., Gradients]:
    geometry = _remembered(family.geometry)

    def backward(
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        offset: Tensor | None,
        mask: Tensor | None,
        *parameters: Any,
    ) -> Gradients:
        needs = parameters[-1]
        g = geometry(input, weight, offset, mask, None, *parameters[:-1])
        _check_backward(family, g, grad_output, input, needs)
        by_input, by_weight, by_offset, by_mask, by_bias = needs
        by_offset, by_mask = by_offset and offset is not None, by_mask and mask is not None
        grads: Gradients = (None,) * 6
        if by_input or by_weight or by_offset or by_mask or by_bias:
            image, points = (grad_output, input) if family.transposed else (input, grad_output)
            by_image, by_points = (False, by_input) if family.transposed else (by_input, False)
            grads = backend().gradients(
                g,
                image,
                points,
                weight,
                offset,
                mask,
                (by_image, by_points, by_weight, by_offset, by_mask),
                grad_output if by_bias else None,
            )
        grad_image, grad_points, grad_weight, grad_offset, grad_mask, grad_bias = grads
        grad_input = grad_points if family.transposed else grad_image
        return grad_input, grad_weight, grad_offset, grad_mask, grad_bias

    return backward


def _check_backward(
    family: _Family, g: Geometry, grad_output: Tensor, input: Tensor, needs: Sequence[bool]
) -> None:
    if len(needs) != 5:  # the schema's bool[5] lets any number pass
        raise ValueError(
            f"{family.name}_backward: needs has {len(needs)} values, expected 5 (whether the "
            "gradients of input, weight, offset, mask and bias are needed)"
        )
    expected = _output_shape(family, g)
    if tuple(grad_output.shape) != expected:
        raise ValueError(
            f"{family.name}_backward: grad_output has shape {list(grad_output.shape)}, "
            f"expected {list(expected)}"
        )
    for what, got, want in (
        ("dtype", grad_output.dtype, input.dtype),
        ("device", grad_output.device, input.device),
    ):
        if got != want:
            raise TypeError(
                f"{family.name}_backward: grad_output has {what} {got}, expected {want} as input"
            )


def _output_shape(family: _Family, g: Geometry) -> tuple[int, ...]:
    if family.transposed:
        return (g.batch, g.image_channels, *g.image_size)
    return (g.batch, g.point_channels, *g.point_size)


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=memory_format(like)
    )


def _forward_fake(family: _Family) -> Callable[..., Tensor]:
    def fake(input: Tensor, *rest: Any) -> Tensor:
        return _empty(_output_shape(family, family.geometry(input, *rest)), input)

    return fake


def _backward_fake(family: _Family) -> Callable[..., Gradients]:
    def fake(
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        offset: Tensor | None,
        mask: Tensor | None,
        *parameters: Any,
    ) -> Gradients:
        needs = parameters[-1]
        g = family.geometry(input, weight, offset, mask, None, *parameters[:-1])
        _check_backward(family, g, grad_output, input, needs)
        grads: list[Tensor | None] = [None] * 5
        if needs[0]:
            grads[0] = _empty(input.shape, input)
        for i, t in ((1, weight), (2, offset), (3, mask)):
            if needs[i] and t is not None:
                grads[i] = t.new_empty(t.shape)
        if needs[4]:
            grads[4] = grad_output.new_empty(grad_output.shape[1])
        return tuple(grads)

    return fake


def _register_kernels(
    name: str,
    kernels: dict[str, Callable[..., Any]],
    saved: int,
    gradient: Callable[..., tuple[Any, ...]],
    tangent: Callable[[Tensors, Sequence[Any], Tensors], Any],
    vmap_rule: Callable[..., tuple[Any, Any]],
) -> None:
    """Register the kernels, by dispatch key, and the derivatives of an operator.

    Its first five arguments are tensors; the derivatives need the first `saved` of these.

    Not torch.library.register_autograd, since its functions refuse torch.func's transforms
    (torch 2.13) and know no forward mode. See Note [functorch] for how this one comes to them.
    """

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return getattr(torch.ops.deformnd, name)(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*inputs[:saved])
            ctx.save_for_forward(*inputs[:saved])
            ctx.parameters = inputs[5:]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return gradient(ctx, *grads)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            # torch turns forward mode off in here, to spare this level; an outer one (jacfwd of
            # jacfwd) needs it, so it is this level's tangents that go.
            tensors = [
                None if t is None else forward_ad.unpack_dual(t, level=0).primal
                for t in ctx.saved_tensors
            ]
            with forward_ad._set_fwd_grad_enabled(True):
                return tangent(tensors, ctx.parameters, tangents[:5])

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
            return vmap_rule(info, in_dims, *args)

    apply: Any = Differentiable.apply

    direct: dict[int, tuple[Any, Callable[..., Any]]] = {}
    for keys, below in _direct(kernels).items():
        known: Any = type("Differentiable", (Differentiable,), {"forward": staticmethod(below)})
        direct[keys] = super(torch.autograd.Function, known).apply, below
    otherwise = apply, Differentiable.forward

    def kernel(keys: Any, *args: Any) -> Any:
        if _unsharded and "torch.distributed.tensor" in sys.modules:
            _register_sharding()
        differentiated, plain = direct.get(keys.raw_repr(), otherwise)
        if forward_ad._current_level >= 0 or (
            torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:5])
        ):
            return differentiated(*args)
        return plain(*args)

    for key, compute in kernels.items():
        _lib.impl(name, compute, key)
    _lib.impl(name, kernel, "Autograd", with_keyset=True)
    _lib.impl(name, apply, "FuncTorchDynamicLayerFrontMode")


# Note [the direct way]
# Where nothing but autograd and a device's own kernel listens to a call, that kernel is called
# without the dispatcher between them, nor Function.apply and what that does for torch.func: both
# cost the host more than all else. Who listens is in the call's set of dispatch keys: any mode,
# subclass, transform or view that torch still has to see to has a key of its own there.


def _direct(kernels: dict[str, Callable[..., Any]]) -> dict[int, Callable[..., Any]]:
    """The kernels of devices, by the keys of a call to which nobody else listens."""
    return {
        _keys(key, "Autograd" + key).raw_repr(): _below_autograd(kernel)
        for key, kernel in kernels.items()
        if hasattr(torch._C.DispatchKey, "Autograd" + key)
    }


def _listening(tensors: Sequence[Tensor | None]) -> int:
    """The keys of a call with these tensors."""
    keys = torch._C._dispatch_tls_local_include_set()
    for t in tensors:
        if t is not None:
            keys = keys | torch._C._dispatch_keys(t)
    return int((keys - _DEAF).raw_repr())


def _below_autograd(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def below(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(*args)

    return below


def _keys(*names: str) -> Any:
    """The set of these dispatch keys."""
    sets = [torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names]
    return functools.reduce(lambda a, b: a | b, sets)


# Keys that every call has, and that mean nothing to a backward.
_DEAF = _keys("BackendSelect", "ADInplaceOrView", "AutocastCPU", "AutocastCUDA")


# Families that DTensor does not know yet. It is told once somebody has imported it (0.5 s).
_unsharded = list(_FAMILIES)


def _register_sharding() -> None:
    while _unsharded:
        family = _unsharded.pop()
        sharding.register(family.name, family.transposed)


def _operators(family: _Family, parameters: Sequence[Any]) -> tuple[Any, Any]:
    """The operator and its backward as functions of tensors only, as directional.py takes them."""
    forward = getattr(torch.ops.deformnd, family.name)
    backward = getattr(torch.ops.deformnd, family.name + "_backward")
    return (
        lambda *tensors: forward(*tensors, None, *parameters),
        lambda *tensors_needs: backward(
            *tensors_needs[:-1], *parameters, [*tensors_needs[-1], False]
        ),
    )


def _tangent(
    family: _Family, tensors: Tensors, parameters: Sequence[Any], direction: Tensors
) -> Tensor:
    """The operator's derivative along a direction in (input, weight, offset, mask, bias)."""
    g = family.geometry(*tensors, None, *parameters)
    forward, _ = _operators(family, parameters)
    total = directional.tangent(forward, g, tensors, direction[:4])
    input, along_bias = tensors[0], direction[4]
    assert input is not None
    if total is None:
        total = _empty(_output_shape(family, g), input).zero_()
    if along_bias is not None:
        total = total + along_bias.view(-1, *[1] * (total.dim() - 2))
    return total.to(input.dtype)


def _forward_gradient(
    family: _Family, kernels: dict[str, Callable[..., Any]]
) -> Callable[..., tuple[Any, ...]]:
    """`kernels` are the backward's own."""
    direct = _direct(kernels)

    def gradient(ctx: Any, grad_output: Tensor | None) -> tuple[Any, ...]:
        if grad_output is None:
            return (None,) * (5 + len(ctx.parameters))
        needs = list(ctx.needs_input_grad[:5])
        args = (grad_output, *ctx.saved_tensors, *ctx.parameters, needs)
        backward = None
        if not (
            torch.is_grad_enabled()
            or forward_ad._current_level >= 0
            or torch._C._autograd._profiler_enabled()  # which learns of operators by dispatch
            or has_torch_function(args[:5])
        ):
            backward = direct.get(_listening(args[:5]))
        if backward is None:
            backward = getattr(torch.ops.deformnd, family.name + "_backward")
        grads = backward(*args)
        return (*grads, *(None for _ in ctx.parameters))

    return gradient


def _backward_gradient(family: _Family) -> Callable[..., tuple[Any, ...]]:
    """The second derivative. See Note [directions] in directional.py."""

    def gradient(ctx: Any, *along: Tensor | None) -> tuple[Any, ...]:
        grad_output, *tensors = ctx.saved_tensors
        *parameters, _ = ctx.parameters
        by_grad_output, *needs = ctx.needs_input_grad[:5]
        first = _tangent(family, tensors, parameters, along) if by_grad_output else None
        g = family.geometry(*tensors, None, *parameters)
        _, backward = _operators(family, parameters)
        rest = directional.gradients(backward, g, grad_output, tensors, along[:4], needs)
        return (first, *rest, *(None for _ in ctx.parameters))

    return gradient


def _backward_tangent(family: _Family) -> Callable[..., Gradients]:
    def tangent(tensors: Tensors, parameters: Sequence[Any], direction: Tensors) -> Gradients:
        grad_output, *tensors = tensors
        along_grad_output, *along = direction
        assert grad_output is not None
        *parameters, needs = parameters
        g = family.geometry(*tensors, None, *parameters)
        _, backward = _operators(family, parameters)
        total = directional.gradients(backward, g, grad_output, tensors, along, needs[:4])
        bias_like = grad_output.new_empty(grad_output.shape[1])
        total.append(None)
        if along_grad_output is not None:
            operator = getattr(torch.ops.deformnd, family.name + "_backward")
            grads = operator(along_grad_output, *tensors, *parameters, needs)
            total = [directional.plus(a, b) for a, b in zip(total, grads, strict=True)]
        return tuple(
            torch.zeros_like(like) if need and t is None and like is not None else t
            for need, t, like in zip(needs, total, [*tensors, bias_like], strict=True)
        )

    return tangent


def _autocast(family: _Family, device: str) -> Callable[..., Tensor]:
    def forward(
        input: Tensor,
        weight: Tensor,
        offset: Tensor | None,
        mask: Tensor | None,
        bias: Tensor | None,
        *parameters: Any,
    ) -> Tensor:
        dtype = torch.get_autocast_dtype(device)

        def cast(t: Tensor | None) -> Tensor | None:
            # As torch's own rules: float64 stays. Offset and mask are not cast at all.
            return t if t is None or t.dtype == torch.float64 else t.to(dtype)

        operator = getattr(torch.ops.deformnd, family.name)
        with torch.autocast(device, enabled=False):
            result: Tensor = operator(
                cast(input), cast(weight), offset, mask, cast(bias), *parameters
            )
        return result

    return forward


# Note [functorch]
# Under vmap, grad, jacrev ... torch.func's front key sees a call first. Its fallback would bring
# the call to the Autograd key with the transform half undone, where autograd.Function cannot run.
# So the operators have a kernel at that key, which hands the whole call to autograd.Function;
# torch.func peels its transforms off that one by one, by the vmap rules below or by `backward`.


def _fold(t: Tensor | None, dim: int | None, size: int, into: int) -> Tensor | None:
    """Merge the mapped dimension `dim` of t (None: not mapped) into dimension `into`."""
    if t is None:
        return None
    t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.movedim(0, into).flatten(into, into + 1)


def _forward_vmap(family: _Family) -> Callable[..., tuple[Tensor, int]]:
    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        operator = getattr(torch.ops.deformnd, family.name)
        size: int = info.batch_size
        input, weight, offset, mask, bias, *parameters, groups = args
        dims = in_dims[:5]
        if dims[1] is None and dims[4] is None:
            folded = [
                _fold(t, d, size, 0)
                for t, d in ((input, dims[0]), (offset, dims[2]), (mask, dims[3]))
            ]
            output = operator(folded[0], weight, folded[1], folded[2], bias, *parameters, groups)
            return output.unflatten(0, (size, output.shape[0] // size)), 0
        into = (1, 0, 1, 1, 0)
        folded = [_fold(t, d, size, i) for t, d, i in zip(args[:5], dims, into, strict=True)]
        output = operator(*folded, *parameters, groups * size)
        return output.unflatten(1, (size, output.shape[1] // size)), 1

    return rule


def _backward_vmap(family: _Family) -> Callable[..., tuple[Any, Any]]:
    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        operator = getattr(torch.ops.deformnd, family.name + "_backward")
        size: int = info.batch_size
        *parameters, groups, needs = args[5:]
        into = (1, 1, 0, 1, 1)
        folded = [_fold(t, d, size, i) for t, d, i in zip(args[:5], in_dims[:5], into, strict=True)]
        grads = operator(*folded, *parameters, groups * size, needs)
        out_dims = (1, 0, 1, 1, 0)
        grads = tuple(
            None if t is None else t.unflatten(d, (size, t.shape[d] // size))
            for t, d in zip(grads, out_dims, strict=True)
        )
        return grads, tuple(None if t is None else d for t, d in zip(grads, out_dims, strict=True))

    return rule


def _forward_flops(family: _Family) -> Callable[..., int]:
    """As torch counts an ordinary convolution: the products of the GEMM, not the interpolation."""

    def count(input: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Any) -> int:
        points = input if family.transposed else out_shape
        return 2 * points[0] * math.prod(points[2:]) * math.prod(weight)

    return count


def _backward_flops(family: _Family) -> Callable[..., int]:
    def count(
        grad_output: Sequence[int],
        input: Sequence[int],
        weight: Sequence[int],
        *rest: Any,
        **_: Any,
    ) -> int:
        by_input, by_weight, by_offset, by_mask, _ = rest[-1]
        if family.transposed:
            products = by_input + by_weight + (by_offset or by_mask)
        else:
            products = (by_input or by_offset or by_mask) + by_weight
        points = input if family.transposed else grad_output
        return 2 * int(products) * points[0] * math.prod(points[2:]) * math.prod(weight)

    return count


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """The operators as compositions of torch's own, for programs that run without deformnd.

    For torch.export's `ExportedProgram.run_decompositions`, and anything else that takes a
    decomposition table. What comes out is the reference: exact, differentiable, on any device,
    slower than the kernels and with the sampled columns in memory. AOTInductor compiles it to
    C++ or Triton, so its packages hold all the code they need.

    Example:
        >>> import torch, deformnd
        >>> layer = deformnd.PackedDeformConv2d(3, 4, 3, padding=1)
        >>> program = torch.export.export(layer, (torch.rand(1, 3, 8, 8),))
        >>> program = program.run_decompositions(deformnd.decompositions())
        >>> any("deformnd" in str(node.target) for node in program.graph.nodes)
        False
    """
    table = {}
    for family in _FAMILIES:
        for name, kernel in (
            (family.name, _forward_kernel(family, lambda: reference)),
            (family.name + "_backward", _backward_kernel(family, lambda: reference)),
        ):
            table[getattr(torch.ops.deformnd, name).default] = kernel
    return table


def _register(family: _Family) -> None:
    forward, backward = f"deformnd::{family.name}", f"deformnd::{family.name}_backward"
    tags = (torch.Tag.pt2_compliant_tag,)
    _lib.define(
        f"{family.name}({_TENSORS}, Tensor? bias, {family.parameters}) -> Tensor", tags=tags
    )
    _lib.define(
        f"{family.name}_backward(Tensor grad_output, {_TENSORS}, {family.parameters}, "
        "bool[5] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        tags=tags,
    )
    for device in ("cpu", "cuda", "mps", "xpu"):
        _lib.impl(family.name, _autocast(family, device), "Autocast" + device.upper())
    torch.library.register_fake(forward, _forward_fake(family), lib=_lib)
    torch.library.register_fake(backward, _backward_fake(family), lib=_lib)
    kernels = {key: _forward_kernel(family, backend) for key, backend in _BACKENDS}
    backward_kernels = {key: _backward_kernel(family, backend) for key, backend in _BACKENDS}
    for name, own, saved, gradient, tangent, vmap_rule in (
        (
            family.name,
            kernels,
            4,
            _forward_gradient(family, backward_kernels),
            functools.partial(_tangent, family),
            _forward_vmap(family),
        ),
        (
            family.name + "_backward",
            backward_kernels,
            5,
            _backward_gradient(family),
            _backward_tangent(family),
            _backward_vmap(family),
        ),
    ):
        _register_kernels(name, own, saved, gradient, tangent, vmap_rule)
    for name, count in (
        (family.name, _forward_flops(family)),
        (family.name + "_backward", _backward_flops(family)),
    ):
        register_flop_formula(getattr(torch.ops.deformnd, name))(count)


for _family in _FAMILIES:
    _register(_family)

if "torch.distributed.tensor" in sys.modules:
    _register_sharding()
