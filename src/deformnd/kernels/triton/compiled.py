"""Kernels with everything but their tensors, compiled at their first call."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager

from . import kernels
from .driver import Function

try:  # Gluon's interface may yet change; without it everything runs on kernels.py.
    from triton.experimental.gluon._runtime import GluonASTSource

    from . import gluon, gluon_inverse, gluon_narrow
except Exception:
    gluon = None  # type: ignore[assignment]

# Whether TRITON_INTERPRET=1 was set when Triton was imported.
INTERPRETED = not hasattr(kernels.gather, "cache_key")


class Descriptor(NamedTuple):
    """That an argument of a Gluon kernel is a matrix which the copy engine brings in blocks."""

    argument: int
    block: tuple[int, ...]
    layout: Any

    def type_of(self, dtype: torch.dtype) -> str:
        """Of a matrix of that dtype, in the kernel's signature."""
        kind = _POINTERS[dtype].removeprefix("*")
        return f"tensordesc<{kind}{list(self.block)},{self.layout!r}>"


class Launch:
    """A kernel, its grid and all its arguments but the tensors.

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
        descriptor: Descriptor | None = None,  # only Gluon kernels have one
        programs: int = 0,  # on a multiprocessor at most; 0: as many as fit
        registers: int = 0,  # of a thread at most; 0: as many as the compiler likes
    ) -> None:
        self.kernel = kernel
        self.grid = grid
        self.integers = integers
        self.constants = constants
        self.options = {"num_warps": warps, "num_stages": stages}
        if registers:
            self.options["maxnreg"] = registers
        self.descriptor = descriptor
        self.programs = programs

    def interpret(self, tensors: Sequence[Tensor | None]) -> None:
        kernel = getattr(kernels, self.kernel)
        kernel[self.grid](*tensors, *self.integers, **self.constants, **self.options)

    def compile(
        self, dtypes: Sequence[torch.dtype | None], target: Any, room: int = 1 << 30
    ) -> Any:
        """For tensors of these dtypes, None where there is none."""
        return self._fit(self._source(dtypes), target, room)

    def load(self, dtypes: Sequence[torch.dtype | None]) -> Loaded:
        """The function on the current CUDA device."""
        for failure in load([(self, dtypes)]).values():
            raise failure
        return _LOADED[self._key(dtypes)]

    def _key(self, dtypes: Sequence[torch.dtype | None]) -> Any:
        device = torch.cuda.current_device()
        parts = (self.kernel, *dtypes, _types(self.integers), *self.constants.items(), device)
        return (*parts, *self.options.values(), self.descriptor, self.programs)

    def _binary(self, source: Any, hashed: str, target: Any, room: int) -> tuple[bytes, _About]:
        """The machine code for a device with so many bytes of shared memory for a program, from
        disk if it is there."""
        # Triton's own cache takes 0.3 s to look at, since it hashes Triton itself.
        identity = (triton.__version__, hashed, target, self.options, room, _About._fields)
        cache = get_cache_manager(hashlib.sha256(str(identity).encode()).hexdigest())
        kept = _kept(cache)
        if kept is not None:
            return kept
        compiled = self._fit(source, target, room)
        known = compiled.metadata
        if known.global_scratch_size or known.num_ctas != 1:
            raise RuntimeError("it needs scratch memory or clusters")
        code: bytes = compiled.asm["cubin"]
        about = _About(
            known.name,
            _parameters(compiled.asm["ptx"]),
            known.shared,
            known.num_warps,
            list(getattr(known, "tensordesc_meta", None) or ()),
            hashlib.sha256(code).hexdigest(),
        )
        cache.put(code, "kernel.cubin")
        cache.put(json.dumps(about._asdict()), "kernel.json", binary=False)
        return code, about

    def _fit(self, source: Any, target: Any, room: int) -> Any:
        """Compiled, in fewer stages where so many do not fit into shared memory."""
        options = dict(self.options)
        while True:
            compiled = triton.compile(source, target=target, options=dict(options))
            if compiled.metadata.shared <= room or options["num_stages"] == 1:
                return compiled
            options["num_stages"] -= 1

    def _source(self, dtypes: Sequence[torch.dtype | None]) -> Any:
        of_gluon = self.descriptor is not None
        modules = (gluon, gluon_inverse, gluon_narrow) if of_gluon else (kernels,)
        function = next(vars(m)[self.kernel] for m in modules if self.kernel in vars(m))
        types: list[Any] = ["constexpr" if d is None else _POINTERS[d] for d in dtypes]
        if self.descriptor is not None:
            at = self.descriptor.argument
            dtype = dtypes[at]
            assert dtype is not None
            types[at] = self.descriptor.type_of(dtype)
        types += [*_types(self.integers), *["constexpr"] * len(self.constants)]
        names = function.arg_names
        signature = dict(zip(names, types, strict=True))
        bound: dict[tuple[int, ...], Any] = {(i,): None for i, d in enumerate(dtypes) if d is None}
        for i, (name, value) in enumerate(
            self.constants.items(), start=len(names) - len(self.constants)
        ):
            assert names[i] == name
            bound[(i,)] = value
        divisors = {
            name: self.constants[constant]
            for constant, divided in _DIVIDED.items()
            if constant in self.constants
            for name in divided
        }
        if of_gluon:
            divisors |= {"channels": 16, "outputs": 16}
        divisors |= {n: 16 for n, t in signature.items() if isinstance(t, str) and t[0] == "*"}
        aligned = {
            (i,): [["tt.divisibility", divisors[name]]]
            for i, name in enumerate(names)
            if name in divisors
        }
        return (GluonASTSource if of_gluon else ASTSource)(function, signature, bound, aligned)


def _parameters(ptx: str) -> list[int]:
    """The sizes in bytes of a kernel's parameters."""
    header = ptx[ptx.index(".entry") : ptx.index("{", ptx.index(".entry"))]
    found = re.findall(r"\.param (?:\.align \d+ )?\.[bu](\d+)[^,\n\[]*(?:\[(\d+)\])?", header)
    return [int(bits) // 8 * int(count or 1) for bits, count in found]


def load(
    launches: Sequence[tuple[Launch, Sequence[torch.dtype | None]]],
) -> dict[Launch, Exception]:
    """Load what is not loaded yet onto the current CUDA device; what cannot be, and why.

    Threads compile side by side: Triton lets go of the interpreter for most of it.
    """
    missing = {
        launch._key(dtypes): (launch, dtypes)
        for launch, dtypes in sorted(launches, key=lambda pair: pair[0].descriptor is None)
    }  # those of Gluon, which take longest, first
    missing = {key: pair for key, pair in missing.items() if key not in _LOADED}
    if not missing:
        return {}
    capability = torch.cuda.get_device_capability()
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    room = shared_memory()
    failures: dict[Launch, Exception] = {}
    binaries: dict[Any, Future[tuple[bytes, _About]]] = {}
    with ThreadPoolExecutor(min(len(missing), os.cpu_count() or 1)) as threads:
        for key, (launch, dtypes) in missing.items():
            try:
                source = launch._source(dtypes)
                # Hashed here, since not every Triton can do that in two threads.
                binaries[key] = threads.submit(launch._binary, source, source.hash(), target, room)
            except Exception as failure:
                failures[launch] = failure
        for key, binary in binaries.items():
            try:
                code, about = binary.result()
                function = Function(
                    *(code, about.name, about.parameters, about.shared, about.warps),
                    missing[key][0].programs,
                )
                _LOADED[key] = function, next(iter(about.descriptors), None)
            except Exception as failure:
                failures[missing[key][0]] = failure
    for launch, reason in failures.items():
        failures[launch] = RuntimeError(
            f"deformnd: Triton {triton.__version__} cannot build its kernel "
            f"{launch.kernel!r} for {torch.cuda.get_device_name()}: {reason}"
        )
        failures[launch].__cause__ = reason
    return failures


class _About(NamedTuple):
    """What the disk keeps of a kernel beside its code."""

    name: str
    parameters: list[int]  # their sizes in bytes
    shared: int
    warps: int
    descriptors: list[Any]
    digest: str  # of the code


def _kept(cache: Any) -> tuple[bytes, _About] | None:
    """What the disk keeps, unless it is incomplete or something else."""
    code, described = cache.get_file("kernel.cubin"), cache.get_file("kernel.json")
    if code is None or described is None:
        return None
    try:
        binary, about = Path(code).read_bytes(), _About(**json.loads(Path(described).read_text()))
    except (OSError, TypeError, ValueError):
        return None
    return (binary, about) if hashlib.sha256(binary).hexdigest() == about.digest else None


Loaded = tuple[Function, Any]  # and what its descriptor is like

_LOADED: dict[Any, Loaded] = {}

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}

# The arguments that are multiples of a constant.
_DIVIDED = {"VECTOR_C": ("channels", "unit", "group_in"), "VECTOR_O": ("outputs", "group_out")}


def _types(value: Any) -> Any:
    """Of an integer, or of the integers in nested tuples."""
    if isinstance(value, tuple):
        return tuple(_types(v) for v in value)
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def shared_memory() -> int:
    """Bytes of it that a program can have on the current CUDA device."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    # torch 2.6 tells only what a multiprocessor has, of which the driver takes some.
    whole = properties.shared_memory_per_multiprocessor - 1024
    return int(getattr(properties, "shared_memory_per_block_optin", whole))


@functools.cache
def multiprocessors_of(device: torch.device) -> int:
    if device.type == "cpu":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """Of an NVIDIA device."""
    return (0, 0) if torch.version.hip else torch.cuda.get_device_capability(device)
