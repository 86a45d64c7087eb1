"""The CUDA driver through ctypes: loading and launching what Triton compiled.

To launch a kernel, Triton builds a C extension for its signature, which needs a C compiler and more
time than compiling the kernel does. The driver's own interface needs neither.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import weakref
from collections.abc import Iterator, Sequence
from ctypes import (
    POINTER,
    byref,
    c_char_p,
    c_int,
    c_size_t,
    c_ubyte,
    c_uint,
    c_uint32,
    c_uint64,
    c_void_p,
)
from typing import Any, NamedTuple

import torch

_STATIC_SHARED = 48 * 1024  # bytes of shared memory that a block may have without asking
_ALL_REGISTERS = 65536  # registers of a multiprocessor, since compute capability 3.7
_REGISTERS = 4  # CU_FUNC_ATTRIBUTE_NUM_REGS
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
_INVALID_CONTEXT = 201
_CHAINED = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
# From CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC, to port 0, CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC.
_CHAINED_EDGE = 1, 0, 1
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_CHAINS_IN_GRAPHS = 12030  # the first version of the driver whose graphs have chained launches
_PROMOTE_128_BYTES = 2  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B
TENSOR_MAP = 128  # bytes


class _Configuration(ctypes.Structure):
    """The driver's CUlaunchConfig."""

    _fields_ = (
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared", c_uint),
        ("stream", c_void_p),
        ("attributes", c_void_p),
        ("number_of_attributes", c_uint),
    )


class _Attribute(ctypes.Structure):
    """The driver's CUlaunchAttribute."""

    _fields_ = (("id", c_int), ("value", c_int * 17))  # The first of `value` is padding.


class _Node(ctypes.Structure):
    """The driver's CUDA_KERNEL_NODE_PARAMS_v2."""

    _fields_ = (
        ("function", c_void_p),
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared", c_uint),
        ("arguments", c_void_p),
        ("others", c_void_p * 3),
    )


class _Edge(ctypes.Structure):
    """The driver's CUgraphEdgeData."""

    _fields_ = (
        *(("from_port", c_ubyte), ("to_port", c_ubyte)),
        *(("type", c_ubyte), ("reserved", c_ubyte * 5)),
    )


@functools.cache
def _driver() -> Any:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuModuleLoadData.argtypes = (POINTER(c_void_p), c_char_p)
    driver.cuModuleGetFunction.argtypes = (POINTER(c_void_p), c_void_p, c_char_p)
    driver.cuFuncSetAttribute.argtypes = (c_void_p, c_int, c_int)
    driver.cuFuncGetAttribute.argtypes = (POINTER(c_int), c_int, c_void_p)
    driver.cuGetErrorString.argtypes = (c_int, POINTER(c_char_p))
    driver.cuLaunchKernelEx.argtypes = (c_void_p, c_void_p, c_void_p, c_void_p)
    driver.cuThreadExchangeStreamCaptureMode.argtypes = (POINTER(c_int),)
    driver.cuGraphCreate.argtypes = (POINTER(c_void_p), c_uint)
    driver.cuGraphInstantiateWithFlags.argtypes = (POINTER(c_void_p), c_void_p, c_uint64)
    driver.cuGraphDestroy.argtypes = (c_void_p,)
    driver.cuGraphExecDestroy.argtypes = (c_void_p,)
    driver.cuGraphLaunch.argtypes = (c_void_p, c_void_p)
    driver.cuTensorMapEncodeTiled.argtypes = (
        *(c_void_p, c_int, c_uint32, c_void_p),
        *(c_void_p, c_void_p, c_void_p, c_void_p),
        *(c_int, c_int, c_int, c_int),
    )
    return driver


def _check(code: int, what: str) -> None:
    if code:
        text = c_char_p()
        _driver().cuGetErrorString(code, byref(text))
        message = (text.value or b"unknown error").decode()
        raise RuntimeError(f"deformnd: {what}: CUDA driver error {code}, {message}")


@functools.cache
def _version() -> int:
    """The newest version of CUDA that the driver knows, such as 12030 for 12.3."""
    version = c_int()
    _check(_driver().cuDriverGetVersion(byref(version)), "the driver's version")
    return version.value


class TensorMap(NamedTuple):
    """What a descriptor for the copy engine says of a contiguous tensor, except its address."""

    kind: int  # CUtensorMapDataType
    width: int  # bytes of a number
    swizzle: int  # CUtensorMapSwizzle
    size: tuple[int, ...]
    block: tuple[int, ...]

    @classmethod
    def of(cls, described: dict[str, Any], size: tuple[int, ...]) -> TensorMap:
        """The map that Triton's description of a descriptor asks for."""
        kind = described["elem_type"]
        # Triton numbers three types in another order than CUtensorMapDataType does.
        kind = {8: 10, 9: 8, 10: 9}.get(kind, kind)
        block = tuple(described["block_size"])
        return cls(kind, described["elem_size"], described["swizzle"], size, block)

    def encode(self, place: int, address: int) -> None:
        """Write the descriptor to `place`."""
        rank = len(self.size)
        size, block = self.size[::-1], self.block[::-1]  # the last axis first
        pitches = [self.width * math.prod(size[: i + 1]) for i in range(rank - 1)]
        long, short = c_uint64 * rank, c_uint32 * rank
        arguments = (
            *(place, self.kind, rank, address, long(*size), long(*pitches)),
            *(short(*block), short(*[1] * rank), 0, self.swizzle, _PROMOTE_128_BYTES, 0),
        )
        encode = _driver().cuTensorMapEncodeTiled
        _check(_in_context(encode(*arguments), encode, arguments), "a tensor map")


class Function:
    """A kernel on the current device."""

    def __init__(
        self,
        cubin: bytes,
        name: str,
        parameters: list[int],
        shared: int,
        warps: int,
        resident: int,  # the most programs on a multiprocessor; 0 means as many as fit
        waits: bool,  # whether it can be chained (runtime.py, Note [chained launches])
    ) -> None:
        driver = _driver()
        self.module, self.handle = c_void_p(), c_void_p()
        self.name, self.parameters = name, parameters  # their sizes in bytes
        self.shared, self.threads = shared, 32 * warps
        self.waits = waits and _version() >= _CHAINS_IN_GRAPHS
        ensure_context()
        _check(driver.cuModuleLoadData(byref(self.module), cubin), f"loading {name}")
        found = driver.cuModuleGetFunction(byref(self.handle), self.module, name.encode())
        _check(found, f"loading {name}")
        if shared > _STATIC_SHARED:
            given = driver.cuFuncSetAttribute(self.handle, _MAX_DYNAMIC_SHARED, shared)
            _check(given, f"{name} needs {shared} bytes of shared memory")
        if shared > _STATIC_SHARED or resident:
            self._keep_cache(resident)

    def _keep_cache(self, most: int) -> None:
        """Set aside no more shared memory than the programs of a multiprocessor need, which are as
        many as fit, or `most` if that is not 0. The rest serves as cache, without which kernels
        that gather lose a third of their speed."""
        registers, driver = c_int(), _driver()
        _check(driver.cuFuncGetAttribute(byref(registers), _REGISTERS, self.handle), self.name)
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        whole = properties.shared_memory_per_multiprocessor
        needed = self.shared + 1024  # each program takes 1024 bytes beside its own
        by_registers = _ALL_REGISTERS // (registers.value * self.threads)
        programs = max(1, min(whole // needed, by_registers, most or by_registers))
        percent = min(100, -(-100 * programs * needed // whole))
        _check(driver.cuFuncSetAttribute(self.handle, _CARVEOUT, percent), self.name)


def ensure_context() -> None:
    """Make torch's context current in this thread, which may not have called CUDA yet."""
    driver, context, device = _driver(), c_void_p(), c_int()
    _check(driver.cuCtxGetCurrent(byref(context)), "the CUDA context")
    if not context:
        _check(driver.cuDeviceGet(byref(device), torch.cuda.current_device()), "the CUDA device")
        _check(driver.cuDevicePrimaryCtxRetain(byref(context), device), "the CUDA context")
        _check(driver.cuCtxSetCurrent(context), "the CUDA context")


def _in_context(code: int, call: Any, arguments: Sequence[Any]) -> int:
    """The code that a call has returned, or, where this thread had no context, that which the call
    returns once it has one."""
    if code != _INVALID_CONTEXT:
        return code
    ensure_context()
    result: int = call(*arguments)
    return result


class Invocation:
    """A function with its arguments, in the order of its parameters. An argument is an integer, or
    an address: of the word that holds a pointer, or of a tensor map. Two threads must not use one
    invocation at the same time."""

    def __init__(
        self,
        function: Function,
        grid: tuple[int, int, int],
        arguments: Sequence[tuple[bool, int]],  # (whether an address, value)
        chained: bool,  # whether to chain it to the launch before it, if the function waits for it
    ) -> None:
        sizes = function.parameters
        self.values: list[Any] = []
        addresses = []
        # The remaining parameters are Triton's pointers to scratch memory, which no kernel here
        # uses.
        rest = [(False, 0)] * (len(sizes) - len(arguments))
        for size, (address, value) in zip(sizes, (*arguments, *rest), strict=True):
            if size not in ((8, TENSOR_MAP) if address else (4, 8)):
                raise RuntimeError(f"deformnd: {function.name} has a parameter of {size} bytes")
            if not address:
                word = (c_uint64 if size == 8 else c_uint32)(value & (2 ** (8 * size) - 1))
                self.values.append(word)
                value = ctypes.addressof(word)
            addresses.append(value)
        self.function = function
        self.arguments = (c_void_p * len(addresses))(*addresses)
        self.configuration = _Configuration(
            (c_uint * 3)(*grid), (c_uint * 3)(function.threads, 1, 1), function.shared
        )
        if chained and function.waits:
            self.attribute = _Attribute(_CHAINED, (c_int * 17)(0, 1))
            self.configuration.attributes = ctypes.addressof(self.attribute)
            self.configuration.number_of_attributes = 1
        self.call = (
            ctypes.addressof(self.configuration),
            function.handle.value,
            ctypes.addressof(self.arguments),
            None,
        )
        self.launch = _driver().cuLaunchKernelEx

    def __call__(self, stream: int) -> None:
        self.configuration.stream = stream
        code = self.launch(*self.call)
        if code:
            code = _in_context(code, self.launch, self.call)
            _check(code, f"launching {self.function.name}")

    def add_to(self, graph: c_void_p, before: c_void_p) -> c_void_p:
        """Add the launch to a graph, after another node of it if `before` is not null. Returns its
        own node."""
        driver, node, of = _driver(), c_void_p(), self.configuration
        arguments = ctypes.addressof(self.arguments)
        about = _Node(self.function.handle.value, of.grid, of.block, of.shared, arguments)
        chained = bool(before and of.number_of_attributes)
        count = c_size_t(bool(before) and not chained)
        add = driver.cuGraphAddKernelNode_v2(byref(node), graph, byref(before), count, byref(about))
        _check(add, f"adding {self.function.name} to a graph")
        if chained:
            edge, one = _Edge(*_CHAINED_EDGE), c_size_t(1)
            link = driver.cuGraphAddDependencies_v2
            _check(link(graph, byref(before), byref(node), byref(edge), one), "chaining a launch")
        return node


class Graph:
    """Launches with all their arguments, which the driver launches again in the time of one. Two
    threads must not use one graph at the same time."""

    def __init__(self, calls: Sequence[Invocation]) -> None:
        """A graph of these launches, one after another, as they would be launched now.

        It is not recorded from a stream, since no thread may synchronize the device meanwhile.
        """
        driver, graph, handle = _driver(), c_void_p(), c_void_p()
        with _relaxed():
            _check(driver.cuGraphCreate(byref(graph), 0), "a graph")
            try:
                before = c_void_p()
                for call in calls:
                    before = call.add_to(graph, before)
                made = driver.cuGraphInstantiateWithFlags(byref(handle), graph, 0)
                _check(made, "making a graph")
            finally:
                driver.cuGraphDestroy(graph)
        self.handle, self.launch = handle.value or 0, driver.cuGraphLaunch
        weakref.finalize(self, _destroy, self.handle).atexit = False

    def __call__(self, stream: int) -> None:
        call = self.handle, stream
        _check(_in_context(self.launch(*call), self.launch, call), "launching a graph")


@contextlib.contextmanager
def _relaxed() -> Iterator[None]:
    """What is called within does not spoil a graph that the user records, in any thread."""
    driver, mode = _driver(), c_int(_RELAXED)
    driver.cuThreadExchangeStreamCaptureMode(byref(mode))
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(byref(mode))


def _destroy(graph: int) -> None:
    with _relaxed():
        _driver().cuGraphExecDestroy(graph)
