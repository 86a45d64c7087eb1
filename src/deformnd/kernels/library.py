"""The operators as torch sees them: schemas, kernels, fakes, autocast, counts (and autograd.py).

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
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import autograd, cpu, reference, sharding
from .autograd import Gradients
from .geometry import FAMILIES, Family, Geometry, empty

_lib = torch.library.Library("deformnd", "DEF")

_TENSORS = "Tensor input, Tensor weight, Tensor? offset, Tensor? mask"
_PARAMETERS = {
    False: "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups",
    True: "SymInt[] stride, SymInt[] padding, SymInt[] output_padding, SymInt[] dilation, "
    "SymInt groups",
}


@functools.cache
def _gpu() -> Any:
    """The Triton kernels, imported at the first call (0.4 s), or the reference without Triton."""
    try:
        from . import gpu
    except ImportError as failure:
        warnings.warn(
            f"deformnd: without Triton GPU tensors take the slow reference ({failure})",
            stacklevel=2,
        )
        return reference
    return gpu


_said_slow = False


def _without_core() -> Any:
    """The reference for CPU tensors; the first call says what an installation of it lacks."""
    global _said_slow
    if not _said_slow:
        _said_slow = True
        warnings.warn(
            "deformnd: calls on CPU tensors are slow here: deformnd was installed without its C++ "
            "core, and they take the reference in plain PyTorch, which also needs more memory. "
            "Install a C++17 compiler and reinstall deformnd, with pip's --force-reinstall "
            "--no-deps --no-cache-dir (said once)",
            stacklevel=2,
        )
    return reference


# What computes, by dispatch key; the first stands in wherever there is no other.
_BACKENDS: list[tuple[str, Callable[[], Any]]] = [("CompositeExplicitAutograd", lambda: reference)]
if cpu.available():
    _BACKENDS.append(("CPU", lambda: cpu))
elif not cpu.PATH.exists():  # of one that is there and does not fit, cpu.py has said so
    _BACKENDS.append(("CPU", _without_core))
if torch.version.cuda or torch.version.hip:
    _BACKENDS.append(("CUDA", _gpu))


def compiled_keys() -> list[str]:
    """Dispatch keys of the devices that have kernels of their own here, such as 'CPU'."""
    there = {"CPU": cpu.available(), "CUDA": importlib.util.find_spec("triton") is not None}
    return [key for key, _ in _BACKENDS[1:] if there[key]]


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


def _forward_kernel(family: Family, backend: Callable[[], Any]) -> Callable[..., Tensor]:
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


def _backward_kernel(family: Family, backend: Callable[[], Any]) -> Callable[..., Gradients]:
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


def _recalled(
    kernel: Callable[..., Any], order: Sequence[int], backward: bool
) -> Callable[..., Any]:
    """The kernel as gpu.recalled has it, from the first call on."""
    found: list[Callable[..., Any]] = []

    def recalled(*args: Any) -> Any:
        if not found:
            gpu = _gpu()
            found.append(kernel if gpu is reference else gpu.recalled(kernel, order, backward))
        return found[0](*args)

    return recalled


def _check_backward(
    family: Family, g: Geometry, grad_output: Tensor, input: Tensor, needs: Sequence[bool]
) -> None:
    if len(needs) != 5:  # the schema's bool[5] lets any number pass
        raise ValueError(
            f"{family.name}_backward: needs has {len(needs)} values, expected 5 (whether the "
            "gradients of input, weight, offset, mask and bias are needed)"
        )
    expected = family.output_shape(g)
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


# What deformnd.onnx.translation_table has made, as long as somebody holds it.
onnx_translations: weakref.WeakSet[Any] = weakref.WeakSet()


def hint_at_onnx() -> None:
    """Warn where torch.onnx.export meets an operator and nobody holds translations for it.

    The error with which it ends, unless it is given others, says that it found no function.
    """
    if "torch.onnx" in sys.modules and not onnx_translations and torch.onnx.is_in_onnx_export():
        warnings.warn(
            "deformnd: torch.onnx.export does not know deformnd's operators by itself: call "
            "deformnd.onnx.export(model, args, path) instead, or give it "
            "custom_translation_table=deformnd.onnx.translation_table()",
            stacklevel=2,
        )


def _forward_fake(family: Family, input: Tensor, *rest: Any) -> Tensor:
    hint_at_onnx()
    return empty(family.output_shape(family.geometry(input, *rest)), input)


def _backward_fake(
    family: Family,
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
        grads[0] = empty(input.shape, input)
    for i, t in ((1, weight), (2, offset), (3, mask)):
        if needs[i] and t is not None:
            grads[i] = t.new_empty(t.shape)
    if needs[4]:
        grads[4] = grad_output.new_empty(grad_output.shape[1])
    return tuple(grads)


def _autocast(
    family: Family,
    device: str,
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
        result: Tensor = operator(cast(input), cast(weight), offset, mask, cast(bias), *parameters)
    return result


def _forward_flops(
    family: Family, input: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Any
) -> int:
    """As torch counts an ordinary convolution: the products of the GEMM, not the interpolation."""
    points = input if family.transposed else out_shape
    return 2 * points[0] * math.prod(points[2:]) * math.prod(weight)


def _backward_flops(
    family: Family,
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
    for family in FAMILIES:
        for name, kernel in (
            (family.name, _forward_kernel(family, lambda: reference)),
            (family.name + "_backward", _backward_kernel(family, lambda: reference)),
        ):
            table[getattr(torch.ops.deformnd, name).default] = kernel
    return table


def _register(family: Family) -> None:
    backward, parameters = family.name + "_backward", _PARAMETERS[family.transposed]
    for schema in (
        f"{family.name}({_TENSORS}, Tensor? bias, {parameters}) -> Tensor",
        f"{backward}(Tensor grad_output, {_TENSORS}, {parameters}, bool[5] needs) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    ):
        _lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    kernels = {key: _forward_kernel(family, backend) for key, backend in _BACKENDS}
    backward_kernels = {key: _backward_kernel(family, backend) for key, backend in _BACKENDS}
    if "CUDA" in kernels:
        kernels["CUDA"] = _recalled(kernels["CUDA"], (0, 1, 2, 3, 4), False)
        order = (0, 1, 2, 3, 4) if family.transposed else (1, 0, 2, 3, 4)
        backward_kernels["CUDA"] = _recalled(backward_kernels["CUDA"], order, True)
    for key, _ in _BACKENDS:
        _lib.impl(family.name, kernels[key], key)
        _lib.impl(backward, backward_kernels[key], key)
    autograd.register(_lib, family, kernels, backward_kernels)
    for device in ("cpu", "cuda", "mps", "xpu"):
        rule = functools.partial(_autocast, family, device)
        _lib.impl(family.name, rule, "Autocast" + device.upper())
    for name, fake, count in (
        (family.name, _forward_fake, _forward_flops),
        (backward, _backward_fake, _backward_flops),
    ):
        torch.library.register_fake(f"deformnd::{name}", functools.partial(fake, family), lib=_lib)
        operator = getattr(torch.ops.deformnd, name)
        register_flop_formula(operator)(functools.partial(count, family))


for _family in FAMILIES:
    _register(_family)

if "torch.distributed.tensor" in sys.modules:
    sharding.register()
