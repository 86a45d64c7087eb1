"""Kernels compiled at their first call and launched without Triton's argument binder."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import ASTSource

from . import kernels

try:  # Gluon's interface may yet change; without it everything runs on kernels.py.
    from triton.experimental.gluon._runtime import GluonASTSource

    from . import gluon, gluon_narrow
except Exception:
    gluon = None  # type: ignore[assignment]


class Launch:
    """One kernel with everything but its tensors; compiles once per device and dtypes.

    Triton's own launch binds and hashes every argument (19 us for 38 of them); the arguments
    here are fixed when the object is made, so the compiled kernel can be called as it is.
    Only pointers are specialised, all to 16 bytes: sizes never cause a compilation.
    """

    def __init__(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        integers: tuple[Any, ...],
        constants: dict[str, Any],
        warps: int,
        stages: int,
        descriptor: int | None = None,
    ) -> None:
        self.kernel = kernel
        self.descriptor = descriptor  # which argument of a Gluon kernel is a tensor descriptor
        self.grid = grid
        self.integers = integers
        self.constants = constants
        self.options = {"num_warps": warps, "num_stages": stages}
        self.tail = (*integers, *constants.values())
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *tensors: Any) -> None:
        if INTERPRETED:
            kernel = getattr(kernels, self.kernel)
            kernel[self.grid](*tensors, *self.integers, **self.constants, **self.options)
            return
        pointers: list[Any] = []
        key: list[Any] = [torch.cuda.current_device()]
        for t in tensors:
            if t is None:
                pointers.append(None)
                key.append(None)
            elif t.__class__ is Tensor or isinstance(t, Tensor):
                pointers.append(t.data_ptr())
                key.append(t.dtype)
            else:  # a descriptor
                pointers.append(t)
        known = self.compiled.get(tuple(key))
        if known is None:
            known = self.load(tensors)
            self.compiled[tuple(key)] = known
        run, head = known
        run(*self.grid, _stream(key[0]), *head, *pointers, *self.tail)

    def load(self, tensors: Sequence[Any]) -> tuple[Any, tuple[Any, ...]]:
        """The compiled kernel's launcher and its first arguments after grid and stream."""
        try:
            target = triton.runtime.driver.active.get_current_target()
            compiled = self.compile([None if t is None else _dtype(t) for t in tensors], target)
            run = compiled.run  # loads it
            if self.kernel.endswith("_narrow"):
                _keep_cache(compiled)
        except Exception as failure:
            raise RuntimeError(
                f"deformnd: Triton {triton.__version__} cannot build its kernel {self.kernel!r} "
                f"for {torch.cuda.get_device_name()}: {failure}"
            ) from failure
        return run, (compiled.function, compiled.packed_metadata, None, None, None)

    def compile(self, dtypes: Sequence[Any], target: Any) -> Any:
        return _compile(
            self.kernel,
            tuple(dtypes),
            _types(self.integers),
            tuple(self.constants.items()),
            tuple(self.options.items()),
            target,
            torch.cuda.current_device() if torch.cuda.is_initialized() else -1,
            self.descriptor is not None,
        )


def _keep_cache(compiled: Any) -> None:
    """Have no more shared memory set aside than the programs need that fit a multiprocessor.

    For kernels of more than 48 KiB Triton lets the driver take all it can from the cache, which
    costs those that gather a third of their speed.
    """
    shared = compiled.metadata.shared + 1024
    if shared <= 49 * 1024:
        return
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    whole = properties.shared_memory_per_multiprocessor
    threads = 32 * compiled.metadata.num_warps
    programs = min(whole // shared, 65536 // (compiled.n_regs * threads))
    percent = -(-100 * programs * shared // whole)
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuFuncSetAttribute(ctypes.c_void_p(compiled.function), 9, percent)  # the carveout


# Whether TRITON_INTERPRET=1 was set when Triton was imported.
INTERPRETED = not hasattr(kernels.gather, "cache_key")


def _stream(device: int) -> int:
    stream: int = triton.runtime.driver.active.get_current_stream(device)
    return stream


_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def _dtype(t: Any) -> Any:
    """A tensor's dtype; a descriptor's type in a signature."""
    if isinstance(t, Tensor):
        return t.dtype
    return descriptor_type(t.base.dtype, t.block_shape, t.layout)


def descriptor_type(dtype: torch.dtype, block: Sequence[int], layout: Any) -> str:
    return f"tensordesc<{_POINTERS[dtype].removeprefix('*')}{list(block)},{layout!r}>"


# The arguments that are multiples of a constant.
_DIVIDED = {
    "VECTOR_C": ("channels", "unit", "group_in"),
    "VECTOR_O": ("outputs", "group_out"),
    "VECTOR_P": ("pixels",),
}


def _types(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_types(v) for v in value)
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@functools.cache
def _compile(
    kernel: str,
    dtypes: tuple[torch.dtype | None, ...],
    integers: tuple[Any, ...],
    constants: tuple[tuple[str, Any], ...],
    options: tuple[tuple[str, int], ...],
    target: Any,
    device: int,
    for_hopper: bool,
) -> Any:
    """Compile for a target; `device` only keeps apart what is loaded on different devices."""
    module = kernels
    if for_hopper:
        module = gluon_narrow if kernel.endswith("_narrow") else gluon
    function = getattr(module, kernel)
    types: list[Any] = ["constexpr" if d is None else _POINTERS.get(d, d) for d in dtypes]
    types += [*integers, *["constexpr"] * len(constants)]
    signature = dict(zip(function.arg_names, types, strict=True))
    bound: dict[tuple[int, ...], Any] = {(i,): None for i, d in enumerate(dtypes) if d is None}
    for i, (name, value) in enumerate(constants, start=len(types) - len(constants)):
        assert function.arg_names[i] == name
        bound[(i,)] = value
    divisors = {
        name: divisor for constant, divisor in constants for name in _DIVIDED.get(constant, ())
    }
    divisors |= {function.arg_names[i]: 16 for i, d in enumerate(dtypes) if d in _POINTERS}
    if for_hopper:
        divisors |= {"channels": 16, "outputs": 16}
    aligned = {
        (i,): [["tt.divisibility", divisors[name]]]
        for i, name in enumerate(function.arg_names)
        if name in divisors
    }
    source = (GluonASTSource if for_hopper else ASTSource)(function, signature, bound, aligned)
    return triton.compile(source, target=target, options=dict(options))


@functools.cache
def multiprocessors_of(device: torch.device) -> int:
    if device.type == "cpu":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
