"""The operators as torch sees them: schemas, kernels, fakes, autocast and counts of operations.

torch's dispatcher is the only registry: it picks the kernel by device, and the reference runs
wherever no other kernel is registered. Derivatives are in autograd.py. All families share every
rule below. They differ in their schema, in the function that makes the Geometry, and in which
tensor is the image (see Note [one bilinear form] in geometry.py).
"""

from __future__ import annotations

import functools
import math
import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion
from torch.utils.flop_counter import register_flop_formula

from . import attention, autograd, cpu, reference, sharding
from .autograd import Gradients
from .geometry import FAMILIES, Family, Geometry, Slots, empty, empty_gradient

_lib = torch.library.Library("deformnd", "DEF")

_SIZES = "SymInt[] stride, SymInt[] padding, SymInt[] dilation"
_CONV = "Tensor input, Tensor weight, Tensor? offset, Tensor? mask"
# The arguments of each family: tensors that its derivatives need, the bias, and parameters.
_SCHEMAS = {
    "deform_conv": (_CONV, ", Tensor? bias", f"{_SIZES}, SymInt groups"),
    "deform_conv_transpose": (
        _CONV,
        ", Tensor? bias",
        "SymInt[] stride, SymInt[] padding, SymInt[] output_padding, SymInt[] dilation, "
        "SymInt groups",
    ),
    "deform_aggregate": (
        "Tensor input, Tensor? offset, Tensor? mask",
        "",
        f"SymInt[] kernel_size, {_SIZES}",
    ),
}


# The oldest Triton whose language has all that the GPU kernels use, and the first torch that brings
# it.
_TRITON, _TORCH = "3.4", "2.8"


@functools.cache
def without_triton() -> str:
    """Why the GPU kernels cannot be built here, or nothing if they can. The first call takes 0.4 s,
    since it imports them."""
    try:
        import triton
    except ImportError as failure:
        return f"Triton cannot be imported ({failure})"
    version = getattr(triton, "__version__", None)
    if version is None:  # a folder of that name, which Python takes for an empty package
        return "Triton is not installed"
    if TorchVersion(version) < _TRITON:
        return (
            f"the kernels need Triton {_TRITON} or later, which comes with torch {_TORCH} and "
            f"later, and this is {version}"
        )
    try:
        from . import gpu  # noqa: F401
    except ImportError as failure:
        return f"the kernels do not fit Triton {version} ({failure})"
    return ""


@functools.cache
def _gpu() -> Any:
    """The GPU kernels, or the reference without Triton."""
    if without_triton():
        warnings.warn(
            f"deformnd: GPU tensors take the slow reference: {without_triton()}", stacklevel=2
        )
        return reference
    from . import gpu

    return gpu


_said_slow = False


def _without_core() -> Any:
    """The reference for CPU tensors where there is no core, of which the first call warns."""
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


# Pairs of a dispatch key and what gives its backend. The first serves every device without one.
_BACKENDS: list[tuple[str, Callable[[], Any]]] = [("CompositeExplicitAutograd", lambda: reference)]
if cpu.available():
    _BACKENDS.append(("CPU", lambda: cpu))
elif not cpu.PATH.exists():  # If there is one that does not fit, cpu.py has warned of it.
    _BACKENDS.append(("CPU", _without_core))
if torch.version.cuda or torch.version.hip:
    _BACKENDS.append(("CUDA", _gpu))


def compiled_keys() -> list[str]:
    """Dispatch keys, such as 'CPU', of the devices that have kernels of their own here."""
    return [
        key
        for key, _ in _BACKENDS[1:]
        if (cpu.available() if key == "CPU" else not without_triton())
    ]


def _remembered(family: Family) -> Callable[..., Geometry]:
    """The family's geometry, which does not check a call again that is like an earlier one."""
    known: dict[Any, Geometry] = {}
    geometry, count = family.geometry, family.tensors

    def remembered(*args: Any) -> Geometry:
        tensors = args[:count]
        key = (
            *[None if t is None else (t.shape, t.dtype, t.device) for t in tensors],
            *[tuple(p) if isinstance(p, (list, tuple)) else p for p in args[count:]],
        )
        try:
            found = known.get(key)
        except TypeError:  # Symbolic sizes have no hash.
            return geometry(*args)
        if found is None:
            found = geometry(*args)
            if len(known) >= 4096:
                known.clear()
            # If dtypes differ, the call is valid under autocast only, and must be checked again.
            if not family.weighted or args[0].dtype == args[1].dtype:
                known[key] = found
        return found

    return remembered


def _forward_kernel(family: Family, backend: Callable[[], Any]) -> Callable[..., Tensor]:
    geometry, count = _remembered(family), family.tensors

    def forward(*args: Any) -> Tensor:
        g = geometry(*args)
        compute = backend().scatter if family.transposed else backend().gather
        result: Tensor = compute(g, *family.slots(args[:count]))
        return result

    return forward


def _backward_kernel(family: Family, backend: Callable[[], Any]) -> Callable[..., Gradients]:
    geometry = _remembered(family)

    def backward(grad_output: Tensor, *args: Any) -> Gradients:
        (input, weight, offset, mask, bias), parameters, needs = _split(family, args)
        g = geometry(*family.own((input, weight, offset, mask, bias)), *parameters)
        _check_backward(family, g, grad_output, input, needs)
        by_input, by_weight, by_offset, by_mask, by_bias = family.slots(needs)
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
        grad_image, grad_points, *rest = grads
        return tuple(family.own((grad_points if family.transposed else grad_image, *rest)))

    return backward


def _split(family: Family, args: Sequence[Any]) -> tuple[Slots, Sequence[Any], Sequence[bool]]:
    """Split a backward's arguments after grad_output into tensors, parameters and needs."""
    saved, parameters = args[: family.saved], args[family.saved : -1]
    return family.slots(saved), parameters, args[-1]


def _recalled(
    kernel: Callable[..., Any], order: Sequence[int], backward: bool
) -> Callable[..., Any]:
    """gpu.recalled(kernel, ...), made at the first call, since that imports the GPU kernels."""
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
    if len(needs) != family.tensors:  # torch does not check the size of a bool[5] in a schema.
        *names, last = family.own(("input", "weight", "offset", "mask", "bias"))
        raise ValueError(
            f"{family.name}_backward: needs has {len(needs)} values, expected {family.tensors} "
            f"(whether the gradients of {', '.join(names)} and {last} are needed)"
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


# The tables that deformnd.onnx.translation_table has made and somebody still holds.
onnx_translations: weakref.WeakSet[Any] = weakref.WeakSet()


def hint_at_onnx() -> None:
    """Warn where torch.onnx.export meets an operator and nobody holds a table of translations.

    Without one the export ends with an error that does not say how to get one.
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


def _backward_fake(family: Family, grad_output: Tensor, *args: Any) -> Gradients:
    tensors, parameters, needs = _split(family, args)
    input, weight, offset, mask, _ = tensors
    g = family.geometry(*family.own(tensors), *parameters)
    _check_backward(family, g, grad_output, input, needs)
    needs = family.slots(needs)
    grads: list[Tensor | None] = [None] * 5
    if needs[0]:
        grads[0] = empty(input.shape, input)
    if needs[1] and weight is not None:
        grads[1] = weight.new_empty(weight.shape)
    for i, t in ((2, offset), (3, mask)):
        if needs[i] and t is not None:
            grads[i] = empty_gradient(t)
    if needs[4]:
        grads[4] = grad_output.new_empty(grad_output.shape[1])
    return tuple(family.own(grads))


def _autocast(family: Family, device: str, *args: Any) -> Tensor:
    dtype = torch.get_autocast_dtype(device)
    input, weight, offset, mask, bias = family.slots(args[: family.tensors])

    def cast(t: Tensor | None) -> Tensor | None:
        # As in torch's own rules, float64 stays. Offset and mask keep their precision.
        return t if t is None or t.dtype == torch.float64 else t.to(dtype)

    operator = getattr(torch.ops.deformnd, family.name)
    with torch.autocast(device, enabled=False):
        tensors = family.own((cast(input), cast(weight), offset, mask, cast(bias)))
        result: Tensor = operator(*tensors, *args[family.tensors :])
    return result


def _products(
    family: Family, points: Sequence[int], tensors: Slots, parameters: Sequence[Any]
) -> int:
    """The products of the matrix product, which torch counts; interpolation is not counted."""
    weight = tensors[1] if family.weighted else (tensors[0][1], *parameters[0])
    return int(points[0] * math.prod(points[2:]) * math.prod(weight))


def _forward_flops(family: Family, *args: Any, out_shape: Any) -> int:
    tensors = family.slots(args[: family.tensors])
    points = tensors[0] if family.transposed else out_shape
    return 2 * _products(family, points, tensors, args[family.tensors :])


def _backward_flops(family: Family, grad_output: Sequence[int], *args: Any, out_shape: Any) -> int:
    tensors, parameters, needs = _split(family, args)
    by_input, by_weight, by_offset, by_mask, _ = map(bool, family.slots(needs))
    if family.transposed:
        products = by_input + by_weight + (by_offset or by_mask)
    else:
        products = (by_input or by_offset or by_mask) + by_weight
    points = tensors[0] if family.transposed else grad_output
    return 2 * int(products) * _products(family, points, tensors, parameters)


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
    return table | attention.decompositions()


def _register(family: Family) -> None:
    backward, (tensors, bias, parameters) = family.name + "_backward", _SCHEMAS[family.name]
    for schema in (
        f"{family.name}({tensors}{bias}, {parameters}) -> Tensor",
        f"{backward}(Tensor grad_output, {tensors}, {parameters}, bool[{family.tensors}] needs) -> "
        f"({', '.join(['Tensor'] * family.tensors)})",
    ):
        _lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    kernels = {key: _forward_kernel(family, backend) for key, backend in _BACKENDS}
    backward_kernels = {key: _backward_kernel(family, backend) for key, backend in _BACKENDS}
    if "CUDA" in kernels:
        kernels["CUDA"] = _recalled(kernels["CUDA"], range(family.tensors), False)
        first = (0, 1) if family.transposed else (1, 0)
        order = (*first, *range(2, 1 + family.saved))
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
attention.register(_lib, _BACKENDS, _recalled)

if "torch.distributed.tensor" in sys.modules:
    sharding.register()
