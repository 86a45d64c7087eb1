"""Plans of launches, and the kernels that they launch, compiled side by side and kept on disk.

A plan is written once for all calls that are alike and then run for each of them. On the host a
call costs what it takes to allocate its results and one block of scratch memory, and to hand the
driver a list of launches whose arguments, except the addresses, have been made before.

Note [chained launches]
From compute capability 9.0 on, with drivers for CUDA 12.3 or later, each launch of a plan but the
first is chained to the one before: it starts when the programs of that one have ended, and not only
once their writes have arrived ("programmatic dependent launch"). So every kernel first waits for
these writes, and has a constant CHAINED that says whether the GPU knows the instruction. On an H200
37 layers took 5 to 7 % less time in the mean, and the smallest 20 %. A chained launch could start
even earlier, as soon as every program of the one before has started
("griddepcontrol.launch_dependents"). But then its programs go to whatever multiprocessors have
room, unevenly, and half of these layers were slower, up to 1.55 times. The first launch of a plan
waits as usual, since it follows kernels of others.

Note [graphs]
When a model runs again, torch's allocator often gives it the same memory. Then a layer's tensors
have addresses that they had before, and all arguments of a plan's launches are what they were. Such
launches are made a graph, which the driver launches in the time of one: five launches take the host
24 us on a server with an H200, and their graph 3. Making a graph takes 40 us and 100 KB, so it is
made only when the same addresses have come REPEATED times. While the user records a graph, launches
go into that one by one.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.torch_version import TorchVersion

from . import sampling
from .driver import TENSOR_MAP, Function, Graph, Invocation, TensorMap

# These are no public names of Triton, so they may change. Without those that compile a kernel
# ahead, Triton itself launches the portable kernels, which takes longer on the host and compiles
# more often. Without Gluon, or with a Triton before 3.6, the portable kernels do everything.
try:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.cache import get_cache_manager
except ImportError:
    AHEAD = False
else:
    AHEAD = True
try:
    from triton.experimental.gluon._runtime import GluonASTSource
except Exception:
    GluonASTSource = None
GLUON = AHEAD and GluonASTSource is not None and TorchVersion(triton.__version__) >= "3.6"

# Triton's interpreter, chosen by TRITON_INTERPRET=1 when Triton is imported, makes functions
# without this attribute.
INTERPRETED = not hasattr(sampling.product, "cache_key")

CHAINING = 90  # the least compute capability, times ten, whose launches are chained

# A graph is made of launches whose addresses came REPEATED times before. An instance of a plan
# counts at most ADDRESSES sets of addresses. When there are more, it forgets those without a graph,
# or all if each has one. The process has at most GRAPHS graphs, of some 100 KB each; a new one
# replaces the oldest.
REPEATED, ADDRESSES, GRAPHS = 8, 256, 256

_ALIGNMENT = 256  # the bytes that a piece of scratch memory begins at a multiple of


class Buffer(NamedTuple):
    """A tensor that exists when a plan runs: it is given, returned, or scratch memory."""

    kind: int  # GIVEN, RETURNED or SCRATCH
    number: int  # its number among the buffers of that kind
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0  # the bytes before it in its tensor, if it is a part

    @property
    def size(self) -> int:
        """The size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def part(self, first: int, count: int) -> Buffer:
        """Some items of the first axis, which comes first in memory in every layout."""
        item = math.prod(self.shape[1:]) * self.dtype.itemsize
        shape = (count, *self.shape[1:])
        return self._replace(shape=shape, start=self.start + first * item)


GIVEN, RETURNED, SCRATCH, PART = range(4)


class Descriptor(NamedTuple):
    """Says that the copy engine brings an argument, of two or more axes, in blocks."""

    block: tuple[int, ...]
    layout: Any


# The compiler takes the fields of a record (layout.py, Sizes) and the arguments with the names in
# CONSTANT as constants, and it is told the common divisor with 16 of those in DIVISIBLE. All of
# them depend on channels only. Every other number is an ordinary argument, so that no new size of
# an image, batch, stride or padding ever compiles anything.
CONSTANT = frozenset(("per_offset", "per_mask"))
DIVISIBLE = frozenset(
    "channels outputs group_in group_out group_channels padded row plane item columns "
    "tap_columns group_columns padded_outputs weights".split()
)


# A plane and an item change with the image's size. What divides `padded` divides them as well, and
# the compiler is told only that, so that a new size compiles nothing.
ALIGNED = {"plane": "padded", "item": "padded"}


class Launch:
    """A kernel, its grid, and its arguments by name: buffers, None, integers or nested tuples."""

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        arguments: dict[str, Any],
        constants: dict[str, Any],
        warps: int,
        stages: int = 1,
        descriptors: dict[str, Descriptor] | None = None,
        resident: int = 0,  # the most programs on a multiprocessor; 0 means as many as fit
        registers: int = 0,  # the most registers of a thread; 0 leaves it to the compiler
    ) -> None:
        self.kernel, self.grid = kernel, grid
        self.constants = {**constants, "CHAINED": False}  # `source` sets it for the target
        self.name: str = getattr(kernel, "__name__", "")
        self.arguments = {n: arguments[n] for n in kernel.arg_names if n not in self.constants}
        self.options: dict[str, Any] = {"num_warps": warps, "num_stages": stages}
        if registers:
            self.options["maxnreg"] = registers
        self.descriptors = descriptors or {}
        self.resident = resident
        self.fallback: Any = None  # the variant to give up if it cannot be built; None: an error

    @property
    def buffers(self) -> list[Buffer]:
        return [v for n, a in self.arguments.items() for v in _flat(n, a) if isinstance(v, Buffer)]

    @functools.cached_property
    def key(self) -> Any:
        """What its machine code depends on."""
        types = tuple(_describe(n, v, self.descriptors) for n, v in self.arguments.items())
        options = (*self.options.values(), self.resident)
        return self.name, types, tuple(self.constants.items()), options

    def run(self, tensor_of: Callable[[Buffer], Tensor]) -> None:
        """Have Triton itself launch the kernel."""

        def given(value: Any) -> Any:
            if isinstance(value, Buffer):
                return tensor_of(value)
            if isinstance(value, tuple):
                parts = map(given, value)
                return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
            return value

        arguments = {n: given(v) for n, v in self.arguments.items()}
        self.kernel[self.grid](**arguments, **self.constants, **self.options)

    def compile(self, target: Any, room: int = 1 << 30) -> Any:
        """Compile the kernel for devices with `room` bytes of shared memory for a program, in fewer
        stages where it does not fit with all of them."""
        return self._compile(self.source(target), target, room)

    def _compile(self, source: Any, target: Any, room: int) -> Any:
        with _TURN, contextlib.suppress(ImportError):
            from triton.runtime.cache import triton_key

            # The first call takes .5 s, in every thread that asks before it is done. So one thread
            # asks first, while the others wait for their turn.
            triton_key()
        with _TURN:
            # The kernel remembers its hash. Not every Triton can compute two at once.
            source.hash()
        # Triton writes checks for overflow only to drop them again. To leave them out saves a sixth
        # of its time in Python.
        options = {**self.options, "sanitize_overflow": False}
        while True:
            compiled = triton.compile(source, target=target, options=dict(options))
            if compiled.metadata.shared <= room:
                return compiled
            if options["num_stages"] == 1:
                raise RuntimeError(
                    f"it needs {compiled.metadata.shared} bytes of shared memory, of {room}"
                )
            options["num_stages"] -= 1

    def source(self, target: Any) -> Any:
        """The kernel with all that the compiler is told of it."""
        chained = target.backend == "cuda" and target.arch >= CHAINING
        given = {**self.constants, "CHAINED": chained}
        signature: dict[str, Any] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}
        for i, name in enumerate(self.kernel.arg_names):
            if name in given:
                signature[name], constants[(i,)] = "constexpr", given[name]
                continue
            value = self.arguments[name]
            described = _describe(name, value, self.descriptors)
            signature[name] = _unwrap(described, value, (i,), constants, attributes)
        of_gluon = type(self.kernel).__name__ == "GluonJITFunction"
        make = GluonASTSource if of_gluon else ASTSource
        source = make(self.kernel, signature, constants, attributes)
        source.make_ir = functools.partial(_in_turn, source.make_ir)
        return source

    def binary(self, source: Any, target: Any, room: int) -> tuple[bytes, _About]:
        """The machine code and what is known of it, read from disk if they are kept there.

        `_tools` says what the kernel's source is. Triton's own hash of it depends on which kernels
        the process has hashed before (as of 3.6), so another process might look for another hash.
        """
        kernel = self.kernel.__module__, self.name
        told = source.signature, source.constants, source.attrs
        identity = (_tools(), *kernel, *told, target, self.options, room, _About._fields)
        cache = get_cache_manager(hashlib.sha256(str(identity).encode()).hexdigest())
        kept = _kept(cache)
        if kept is not None:
            return kept
        compiled = self._compile(source, target, room)
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
            "griddepcontrol.wait" in compiled.asm["ptx"],
            hashlib.sha256(code).hexdigest(),
        )
        cache.put(code, "kernel.cubin")
        cache.put(json.dumps(about._asdict()), "kernel.json", binary=False)
        return code, about


_TURN = threading.Lock()


def _in_turn(make_ir: Callable[..., Any], *args: Any) -> Any:
    """Do the first part of a compile, which is in Python and holds the interpreter's lock. The
    second part does not hold it.

    Kernels take turns at the first part, so that the first ones soon reach the second part. If all
    shared the interpreter, all would reach it only when the last one does. Two threads at once
    would not be safe either, since Triton sets warning filters at each node of a kernel.
    """
    with _TURN:
        return make_ir(*args)


def _describe(name: str, value: Any, descriptors: dict[str, Descriptor], like: Any = 0) -> Any:
    """What the compiler is told of an argument: a constant, a type, or (type, divisor). For a tuple
    it is a tuple of what is told of every element. The divisor is that of `like`, if given."""
    if value is None or name in CONSTANT:
        return ("constexpr", value)
    if isinstance(value, Buffer):
        pointer = _POINTERS[value.dtype]
        if name in descriptors:
            block, layout = descriptors[name]
            return f"tensordesc<{pointer.removeprefix('*')}{list(block)},{layout!r}>"
        return (pointer, 16)
    if isinstance(value, tuple):
        names = getattr(value, "_fields", ("",) * len(value))
        known = [
            (n, v, getattr(value, ALIGNED.get(n, n), v)) for n, v in zip(names, value, strict=True)
        ]
        return tuple(_describe(n, v, {}, like) for n, v, like in known)
    kind = "i32" if -(2**31) <= value < 2**31 else "i64"
    divisor = math.gcd(16, like or value) if name in DIVISIBLE and value else 1
    return (kind, divisor) if divisor > 1 else kind


def _unwrap(
    described: Any,
    value: Any,
    path: tuple[int, ...],
    constants: dict[tuple[int, ...], Any],
    attributes: dict[tuple[int, ...], Any],
) -> Any:
    """The type of an argument as Triton takes it. The constants and divisors in it are added to
    `constants` and `attributes` by path."""
    if isinstance(described, str):
        return described
    if isinstance(value, tuple) and not isinstance(value, Buffer):
        types = (
            _unwrap(d, v, (*path, i), constants, attributes)
            for i, (d, v) in enumerate(zip(described, value, strict=True))
        )
        return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
    kind, what = described
    if kind == "constexpr":
        constants[path] = what
    else:
        attributes[path] = [["tt.divisibility", what]]
    return kind


def _parameters(ptx: str) -> list[int]:
    """The sizes in bytes of a kernel's parameters."""
    header = ptx[ptx.index(".entry") : ptx.index("{", ptx.index(".entry"))]
    found = re.findall(r"\.param (?:\.align \d+ )?\.[bu](\d+)[^,\n\[]*(?:\[(\d+)\])?", header)
    return [int(bits) // 8 * int(count or 1) for bits, count in found]


# How the names of environment variables begin that may change what Triton compiles.
_SETTINGS = ("TRITON_", "DISABLE_", "PTXAS_", "NVPTX_", "LLVM_", "USE_IR_LOC", "ALLOW_LHS_")


@functools.cache
def _tools() -> str:
    """What machine code depends on beside a kernel and its arguments: Triton, the tools that its
    environment variables name, and the files of this folder.

    Triton is known by the hashes of its files that were installed with it. Its own hash would take
    .5 s, which is longer than all else that a first call does when its kernels are on disk."""
    try:
        files = importlib.metadata.distribution("triton").read_text("RECORD")
    except importlib.metadata.PackageNotFoundError:
        files = None
    if files is None:
        from triton.runtime.cache import triton_key

        files = triton_key()
    told = [(k, v) for k, v in sorted(os.environ.items()) if k.startswith(_SETTINGS)]
    ours = [f.read_bytes() for f in sorted(Path(__file__).parent.rglob("*.py"))]
    return str(triton.__version__) + hashlib.sha256(repr((files, told, ours)).encode()).hexdigest()


class _About(NamedTuple):
    """What the disk keeps of a kernel beside its code."""

    name: str
    parameters: list[int]  # the sizes of the parameters in bytes
    shared: int
    warps: int
    descriptors: list[Any]
    waits: bool  # whether it can be chained to the launch before it
    digest: str  # the hash of the code, to find out whether it is complete


def _kept(cache: Any) -> tuple[bytes, _About] | None:
    """The code and what is known of it from disk, or None if it is missing, damaged or of another
    version."""
    code, described = cache.get_file("kernel.cubin"), cache.get_file("kernel.json")
    if code is None or described is None:
        return None
    try:
        binary, about = Path(code).read_bytes(), _About(**json.loads(Path(described).read_text()))
    except (OSError, TypeError, ValueError):
        return None
    return (binary, about) if hashlib.sha256(binary).hexdigest() == about.digest else None


_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}

# The functions that are loaded onto a device, each with what the copy engine needs to know of its
# descriptors. On ROCm these are what Triton has compiled.
_LOADED: dict[Any, Any] = {}
_LOADING = threading.Lock()


def load(
    launches: Sequence[Launch], more: Callable[[], Sequence[Launch]] = tuple
) -> dict[Launch, Exception]:
    """Load the launches' kernels that are not loaded yet onto the current CUDA device, and return
    those that cannot be loaded, with the reason.

    Threads compile side by side, and begin with the kernels that take longest. If any kernel is
    missing, those that `more` gives are compiled with it. These may fail silently: the call that
    needs them will find out.
    """
    device = torch.cuda.current_device()
    if all((launch.key, device) in _LOADED for launch in launches):
        return {}
    needed = {(launch.key, device): launch for launch in (*more(), *launches)}
    if torch.version.hip:
        target = triton.runtime.driver.active.get_current_target()
    else:
        major, minor = torch.cuda.get_device_capability()
        target = GPUTarget("cuda", 10 * major + minor, 32)
    room = shared_memory()
    failures: dict[Launch, Exception] = {}
    binaries: dict[Any, Any] = {}
    with _LOADING, ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        # This is looked up under the lock, since another thread may have loaded some meanwhile.
        missing = {key: launch for key, launch in needed.items() if key not in _LOADED}
        # Gluon's kernels take longest, and then those with the most buffers.
        for key, launch in sorted(
            missing.items(), key=lambda kl: (not kl[1].descriptors, -len(kl[1].buffers))
        ):
            try:
                source = launch.source(target)
                if torch.version.hip:
                    binaries[key] = threads.submit(launch.compile, target, room)
                    continue
                binaries[key] = threads.submit(launch.binary, source, target, room)
            except Exception as failure:
                failures[launch] = failure
        for key, binary in binaries.items():
            try:
                if torch.version.hip:
                    _LOADED[key] = binary.result()
                    continue
                code, about = binary.result()
                function = Function(
                    *(code, about.name, about.parameters, about.shared, about.warps),
                    *(missing[key].resident, about.waits),
                )
                _LOADED[key] = function, about.descriptors
            except Exception as failure:
                failures[missing[key]] = failure
    failures = {launch: failures[launch] for launch in launches if launch in failures}
    for launch, reason in failures.items():
        failures[launch] = RuntimeError(
            f"deformnd: Triton {triton.__version__} cannot build its kernel "
            f"{launch.name!r} for {torch.cuda.get_device_name()}: {reason}"
        )
        failures[launch].__cause__ = reason
    return failures


def _loaded(launch: Launch) -> Any:
    """The function of a launch on the current device, which is loaded if it was not."""
    key = (launch.key, torch.cuda.current_device())
    if key not in _LOADED:
        for failure in load([launch]).values():
            raise failure
    return _LOADED[key]


def shared_memory() -> int:
    """The bytes of shared memory that a program can have on the current device."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    # torch 2.6 tells only what a multiprocessor has, of which the driver takes 1024 bytes.
    whole = getattr(properties, "shared_memory_per_multiprocessor", 64 * 1024 + 1024) - 1024
    return int(getattr(properties, "shared_memory_per_block_optin", whole))


# torch.empty_strided on the current CUDA device, in half its time; inductor's code calls it, too.
# It leaves memory as it is where torch.empty_strided fills it for algorithms to be deterministic.
_guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
_empty_on_cuda = getattr(_guards, "_empty_strided_cuda", None)


class _Result(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...]  # stand for the memory format, as torch.empty_strided is the cheapest


def ahead() -> bool:
    """Whether plans are compiled and launched by their addresses, not by Triton itself."""
    return AHEAD and not INTERPRETED


class Plan:
    """What a call does, for all calls with tensors of these sizes, dtypes and layouts.

    A frame is a part of the plan whose scratch memory later parts may use again.
    """

    def __init__(self, device: torch.device, given: Sequence[Tensor | None]) -> None:
        self.device = device
        self.given: list[Buffer | None] = []
        for t in given:
            number = sum(b is not None for b in self.given)
            self.given.append(None if t is None else Buffer(GIVEN, number, t.dtype, tuple(t.shape)))
        self.clear()

    def clear(self) -> None:
        """Drop everything but what is given, so that the plan can be written anew."""
        self.results: list[_Result] = []
        self.offsets: list[int] = []  # where each scratch buffer begins, in bytes
        self.size = 0  # the bytes of all scratch memory
        self.top = 0  # where the next scratch buffer will begin
        self.steps: list[Launch] = []
        self.spares: list[Launch] = []  # not run, but loaded, since calls of other sizes need them
        self._idle: list[_Instance] = []  # the instances that no thread runs now

    def result(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        form: torch.memory_format = torch.contiguous_format,
    ) -> Buffer:
        strides = torch.empty(shape, memory_format=form, device="meta").stride()
        self.results.append(_Result(tuple(shape), dtype, strides))
        return Buffer(RETURNED, len(self.results) - 1, dtype, tuple(shape))

    def scratch(self, *shape: int, dtype: torch.dtype) -> Buffer:
        self.offsets.append(self.top)
        size = math.prod(shape) * dtype.itemsize
        self.top += -(-size // _ALIGNMENT) * _ALIGNMENT
        self.size = max(self.size, self.top)
        return Buffer(SCRATCH, len(self.offsets) - 1, dtype, shape)

    @contextlib.contextmanager
    def frame(self) -> Iterator[None]:
        top = self.top
        yield
        self.top = top

    def load(self, more: Callable[[], Sequence[Launch]] = tuple) -> dict[Launch, Exception]:
        """Load all kernels at once, and return those that cannot be loaded, with the reason."""
        if not ahead():
            return {}
        return load([*self.steps, *self.spares], more)

    def run(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        given = [t for t in tensors if t is not None]
        if not ahead():
            return self._run_plainly(given)
        return self.run_at([t.data_ptr() for t in given])

    def run_at(self, given: Sequence[int]) -> list[Tensor]:
        """Run the plan on given tensors at these addresses."""
        results = self._empty_results()
        memory = _storage(self.size, self.device)
        try:
            instance = self._idle.pop()
        except IndexError:
            instance = _Instance(self)
        instance.run(given, [t.data_ptr() for t in results], memory.data_ptr())
        self._idle.append(instance)
        return results

    def _empty_results(self) -> list[Tensor]:
        if _empty_on_cuda is not None and self.device.type == "cuda":
            return [_empty_on_cuda(shape, strides, dtype) for shape, dtype, strides in self.results]
        return [
            torch.empty_strided(shape, strides, dtype=dtype, device=self.device)
            for shape, dtype, strides in self.results
        ]

    def _run_plainly(self, given: list[Tensor]) -> list[Tensor]:
        """Have Triton itself launch the kernels, in memory filled with NaN, so that tests in the
        interpreter find out what is read before it is written."""
        results = self._empty_results()
        memory = torch.full((self.size,), 255, dtype=torch.uint8, device=self.device)
        for t in results:
            t.fill_(math.nan)

        def tensor(buffer: Buffer) -> Tensor:
            if buffer.kind != SCRATCH:
                whole = (given, results)[buffer.kind][buffer.number]
                if whole.dtype != buffer.dtype:  # the result was lent for a copy (layout.py, lend)
                    memory_of = whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)
                    place = memory_of[buffer.start : buffer.start + buffer.size]
                    return place.view(buffer.dtype).view(buffer.shape)
                items = math.prod(buffer.shape[1:]) * buffer.dtype.itemsize
                return whole[buffer.start // items :] if buffer.start else whole
            start = self.offsets[buffer.number] + buffer.start
            return memory[start : start + buffer.size].view(buffer.dtype).view(buffer.shape)

        for launch in self.steps:
            launch.run(tensor)
        return results


# The graphs that were made, the oldest first, each with its instance and its addresses.
_MADE: collections.deque[tuple[weakref.ref[_Instance], tuple[int, ...], weakref.ref[Graph]]] = (
    collections.deque()
)


class _Instance:
    """A plan's launches with room for the addresses of one call."""

    def __init__(self, plan: Plan) -> None:
        given = sum(b is not None for b in plan.given)
        parts = [b for launch in plan.steps for b in launch.buffers if b.start]
        self.parts = list(dict.fromkeys((b.kind, b.number, b.start) for b in parts))
        counts = (given, len(plan.results), len(plan.offsets), len(self.parts))
        self.words: list[Any] = [(ctypes.c_uint64 * n)() for n in counts]
        self.offsets = plan.offsets
        self.maps: list[tuple[TensorMap, int, int, int]] = []
        self.mapped: list[int] = []  # the addresses that the maps were last made for
        self.room: list[Any] = []
        bind = self._bind_by_triton if torch.version.hip else self._bind
        self.calls: list[Any] = [bind(launch, i > 0) for i, launch in enumerate(plan.steps)]
        # For addresses how often they came, or the graph (Note [graphs]).
        self.graphs: dict[tuple[int, ...], int | Graph] = {}
        self.repeats = len(self.calls) > 1 and not torch.version.hip
        self.stream = _stream_of(plan.device)

    def run(self, given: Sequence[int], results: Sequence[int], memory: int) -> None:
        stream = self.stream()
        if not self.repeats or torch.cuda.is_current_stream_capturing():
            self._launch(stream, given, results, memory)
            return
        key = (*given, *results, memory)
        known = self.graphs.get(key, 0)
        if isinstance(known, Graph):
            try:
                known(stream)
            except RuntimeError:  # Memory may be short. A graph only saves time.
                self._give_up_graphs()
                self._launch(stream, given, results, memory)
            return
        self._launch(stream, given, results, memory)
        if known < REPEATED:
            self._count(key, known + 1)
        else:
            self._make_graph(key)

    def _launch(
        self, stream: int, given: Sequence[int], results: Sequence[int], memory: int
    ) -> None:
        words = self.words
        words[GIVEN][:] = given
        words[RETURNED][:] = results
        words[SCRATCH][:] = [memory + offset for offset in self.offsets]
        if self.parts:
            words[PART][:] = [words[kind][number] + start for kind, number, start in self.parts]
        for i, (tensor_map, place, kind, number) in enumerate(self.maps):
            address = words[kind][number]
            if address != self.mapped[i]:
                tensor_map.encode(place, address)
                self.mapped[i] = address
        for call in self.calls:
            call(stream)

    def _count(self, key: tuple[int, ...], times: int) -> None:
        """Note how many times addresses came."""
        if times == 1 and len(self.graphs) >= ADDRESSES:
            known = list(self.graphs.items())  # another thread may take a graph away
            for other, _ in [kv for kv in known if isinstance(kv[1], int)] or known:
                self.graphs.pop(other, None)
        self.graphs[key] = times

    def _make_graph(self, key: tuple[int, ...]) -> None:
        """Make a graph of the launches as they just were."""
        try:
            graph = self.graphs[key] = Graph(self.calls)
        except Exception:  # It only saves time, so a driver that cannot make it may refuse.
            self._give_up_graphs()
            return
        _MADE.append((weakref.ref(self), key, weakref.ref(graph)))
        if len(_MADE) > GRAPHS:
            of, key, oldest = _MADE.popleft()
            instance = of()
            if instance is not None and instance.graphs.get(key) is oldest():
                instance.graphs.pop(key, None)

    def _give_up_graphs(self) -> None:
        self.repeats, self.graphs = False, {}

    def _bind(self, launch: Launch, chained: bool) -> Callable[[int], None]:
        function, described = _loaded(launch)
        arguments: list[tuple[bool, int]] = []
        maps = iter(described)
        for name, value in launch.arguments.items():
            if isinstance(value, Buffer) and name in launch.descriptors:
                tensor_map = TensorMap.of(next(maps), value.shape)
                arguments.append((True, self._room_for(tensor_map, value)))
                strides = [math.prod(value.shape[i + 1 :]) for i in range(len(value.shape))]
                arguments += [(False, n) for n in (*value.shape, *strides)]
                continue
            for part in _flat(name, value):
                if isinstance(part, Buffer):
                    kind, number = self._word_of(part)
                    arguments.append((True, ctypes.addressof(self.words[kind]) + 8 * number))
                else:
                    arguments.append((False, part))
        return Invocation(function, launch.grid, arguments, chained)

    def _word_of(self, buffer: Buffer) -> tuple[int, int]:
        """The kind and the number of the word that holds a buffer's address."""
        if not buffer.start:
            return buffer.kind, buffer.number
        return PART, self.parts.index((buffer.kind, buffer.number, buffer.start))

    def _room_for(self, tensor_map: TensorMap, buffer: Buffer) -> int:
        room = ctypes.create_string_buffer(2 * TENSOR_MAP)
        place = -(-ctypes.addressof(room) // TENSOR_MAP) * TENSOR_MAP
        self.room.append(room)
        self.maps.append((tensor_map, place, *self._word_of(buffer)))
        self.mapped.append(0)
        return place

    def _bind_by_triton(self, launch: Launch, chained: bool) -> Callable[[int], None]:
        """Bind a launch to Triton's own launcher, which knows drivers other than CUDA's."""
        compiled = _loaded(launch)
        run = compiled.run
        head = (compiled.function, compiled.packed_metadata, None, None, None)

        def word(value: Any) -> Any:
            if isinstance(value, Buffer):
                kind, number = self._word_of(value)
                return self.words[kind][number]
            return tuple(map(word, value)) if isinstance(value, tuple) else value

        values = list(launch.arguments.values())
        constants = launch.constants.values()

        def call(stream: int) -> None:
            run(*launch.grid, stream, *head, *map(word, values), *constants)

        return call


def _storage(size: int, device: torch.device) -> torch.UntypedStorage:
    """Scratch memory. It is not made by torch.empty, which fills tensors where algorithms have to
    be deterministic."""
    return torch.UntypedStorage(size, device=device)


def _flat(name: str, value: Any) -> list[Any]:
    """The buffers and integers that a kernel is handed for an argument."""
    if value is None or name in CONSTANT:
        return []
    if isinstance(value, tuple) and not isinstance(value, Buffer):
        names = getattr(value, "_fields", ("",) * len(value))
        return [n for m, v in zip(names, value, strict=True) for n in _flat(m, v)]
    return [value]


def _stream_of(device: torch.device) -> Callable[[], int]:
    index = device.index
    current = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # as Triton and inductor do
    if current is None:
        return lambda: int(torch.cuda.current_stream(index).cuda_stream)
    return lambda: int(current(index))
