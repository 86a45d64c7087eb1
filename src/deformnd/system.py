"""What can run here. The names are tvdcn's; the answers are this package's."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .kernels import cpu, library, reference
from .kernels.geometry import attention_geometry


def has_ops() -> bool:
    """Whether the compiled CPU core is present.

    Without it every operator still works, on the slower reference.

    Example:
        >>> import deformnd
        >>> isinstance(deformnd.has_ops(), bool)
        True
    """
    return cpu.available()


def with_cuda() -> bool:
    """Whether GPU kernels run on CUDA (and ROCm) tensors: a GPU is there, and Triton 3.4 or later,
    which torch brings from 2.8 on.

    The kernels are Triton programs, compiled for the device at their first call; they need no
    CUDA toolkit, and none is used to build this package. Without Triton such tensors take the
    slow reference.

    Example:
        >>> import deformnd
        >>> isinstance(deformnd.with_cuda(), bool)
        True
    """
    return torch.cuda.is_available() and not library.without_triton()


def cuda_version() -> int:
    """The CUDA version that the GPU kernels use: torch's own, as major * 1000 + minor * 10.

    -1 where with_cuda() is False. There is no version that the package was built with, since
    Triton compiles for the device at hand.

    Example:
        >>> import deformnd
        >>> deformnd.cuda_version() == -1 or deformnd.with_cuda()
        True
    """
    if not with_cuda() or torch.version.cuda is None:
        return -1
    major, minor = torch.version.cuda.split(".")[:2]
    return int(major) * 1000 + int(minor) * 10


def cuda_arch_list() -> list[str]:
    """Compute capabilities of the devices present, for which Triton compiles, such as ['9.0'].

    Empty where with_cuda() is False.

    Example:
        >>> import deformnd
        >>> bool(deformnd.cuda_arch_list()) == deformnd.with_cuda()
        True
    """
    if not with_cuda():
        return []
    devices = range(torch.cuda.device_count())
    found = {torch.cuda.get_device_capability(d) for d in devices}
    return [f"{major}.{minor}" for major, minor in sorted(found)]


_PACKAGES = (
    *("numpy", "triton", "torchvision", "onnx", "onnxscript", "onnxruntime", "openvino"),
    *("matplotlib", "scikit-learn", "tqdm"),
)


def describe() -> list[str]:
    """What `deformnd info` says: versions, devices, and the kernels of each with the reason."""
    from . import __version__
    from .bench import processor

    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    lines = [
        f"deformnd {__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        ", ".join(f"{name} {version}" for name, version in found.items()),
        f"CPU: {processor()}, {os.cpu_count()} cores; {torch.get_num_threads()} OpenMP threads, "
        "torch's own number (torch.set_num_threads)",
        f"  kernels: {_cpu_kernels()}",
    ]
    for index in range(torch.cuda.device_count()):
        lines.append(f"cuda:{index}: {torch.cuda.get_device_name(index)}")
        lines.append(f"  kernels: {_gpu_kernels(index)}")
    if not torch.cuda.device_count():
        built = torch.version.cuda or torch.version.hip
        why = "no device was found" if built else "this torch is built for CPUs only"
        lines.append(f"CUDA: none, {why}")
    lines.append("other devices: the reference in plain PyTorch")
    return lines


def _cpu_kernels() -> str:
    if cpu.available():
        level = cpu.LEVELS[cpu.best_level()]
        return f"C++ core with {level}, the best that this machine and the core have"
    files = list(Path(__file__).parent.glob("_core.*"))
    why = (
        f"{files[0].name} cannot be loaded here or is of another version, see the warning"
        if files
        else "the C++ core was not built, for which pip needs a C++17 compiler"
    )
    return f"the reference in plain PyTorch, slower: {why}"


def _gpu_kernels(index: int) -> str:
    if library.without_triton():
        return f"the reference in plain PyTorch, slower: {library.without_triton()}"
    from .kernels.gpu import hopper

    kernels = "Triton, compiled for the device at the first call"
    is_hopper = torch.version.cuda and torch.cuda.get_device_capability(index) == (9, 0)
    if is_hopper and not hopper.FORWARD:
        kernels += "; faster ones for this GPU need Triton 3.6 or later"
    return kernels


def self_test() -> Iterator[tuple[str, str, float, bool]]:
    """Compare the operators with the definition in float64, on each device.

    Yields:
        The operator's name, the device, the largest relative error of output and gradients, and
        whether it is small enough.
    """
    from . import bench
    from .ops import functional

    sizes = ((9,), (6, 7), (4, 5, 6))
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]

    def result(name: str, device: str, got: Any, want: Any) -> tuple[str, str, float, bool]:
        errors = [
            bench.relative(a.detach(), b.detach())
            for a, b in zip(got, want, strict=True)
            if b is not None
        ]
        error = float(torch.tensor(errors).max())  # Unlike Python's max, it is NaN if any is.
        return name, device, error, error < 1e-5

    for device in devices:
        for transposed in (False, True):
            for size in sizes:
                shape = bench.Shape(2, 4, size, 6, 3, 2, stride=2, transposed=transposed)
                p = bench.Problem(shape, device=device)
                leaves: Any = tuple(t.requires_grad_() for t in p.tensors())
                output = p.deform(leaves)
                grads = torch.autograd.grad(output, leaves, p.grad)
                exact = p.exact(shape.batch)
                by_image, by_points, *rest = exact.kernel_backward(reference)
                wanted = (exact.kernel(reference), by_points if transposed else by_image, *rest)
                name = f"deform_conv{'_transpose' if transposed else ''}{len(size)}d"
                yield result(name, device, (output, *grads), wanted)
        for size in sizes:
            name = f"deform_aggregate{len(size)}d"
            p = bench.Problem(bench.Shape(2, 4, size, 4, 3, 2, stride=2, groups=4), device=device)
            p.weight, p.bias = torch.ones_like(p.weight), torch.zeros_like(p.bias)
            leaves = tuple(t.requires_grad_() for t in (p.input, p.offset, p.mask))
            output = getattr(functional, name)(*leaves, 3, stride=2, padding=1)
            grads = torch.autograd.grad(output, leaves, p.grad)
            exact = p.exact(2)
            by_image, _, _, *rest = exact.kernel_backward(reference)
            wanted = (exact.kernel(reference), by_image, *rest[:2])
            yield result(name, device, (output, *grads), wanted)
        for size in sizes:
            samples = (2, 5, 2, 1, 3)  # batch, queries, heads, levels, points
            tensors = (
                torch.randn(2, math.prod(size), 2, 4, device=device),
                torch.rand(*samples, len(size), device=device),
                torch.rand(samples, device=device),
            )
            leaves = tuple(t.requires_grad_() for t in tensors)
            output = functional.deform_attention(leaves[0], [size], *leaves[1:])
            grads = torch.autograd.grad(output, leaves, torch.ones_like(output))
            value, locations, weights = (t.detach().double() for t in tensors)
            a = attention_geometry(value, locations, weights, size)
            ones = torch.ones_like(output)
            wanted = (
                reference.attend(a, value, locations, weights),
                *reference.attend_gradients(a, ones, value, locations, weights, (True,) * 3),
            )
            yield result(f"deform_attention, {len(size)}-D", device, (output, *grads), wanted)
