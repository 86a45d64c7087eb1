"""The benchmark: deformnd beside every peer that is installed, in one run.

`deformnd bench` runs it. The scripts in benchmarks/ measure more of one device with the same parts,
and sweep.py times layers that nobody chose. All calls go through the public functions with NCHW
tensors (on CUDA the dense convolution gets channels last, in which cuDNN is fastest). Times are
medians of rounds in which the peers take turns. Errors are relative L2 norms against the definition
in float64, on the first image; the weight's gradient is compared on the whole batch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernels import cpu, reference
from .kernels.geometry import Geometry, conv_geometry, conv_transpose_geometry
from .ops import functional


class Shape(NamedTuple):
    """The sizes of one call, which has a mask, and offsets of a standard deviation of 2 pixels."""

    batch: int
    channels: int  # of the input
    size: tuple[int, ...]
    out_channels: int
    kernel: int
    offset_groups: int = 1
    stride: tuple[int, ...] | int = 1
    padding: int = -1  # -1 stands for half the kernel
    dilation: tuple[int, ...] | int = 1
    groups: int = 1
    transposed: bool = False


SHAPES = {
    "big": Shape(8, 256, (128, 128), 256, 3),  # throughput
    "r50c3": Shape(2, 128, (100, 168), 128, 3),  # ResNet-50 with 800 x 1344 images
    "r50c4": Shape(2, 256, (50, 84), 256, 3),
    "r50c5": Shape(2, 512, (25, 42), 512, 3),
    "b64": Shape(16, 64, (128, 128), 64, 3),  # narrow layers
    "bvsr": Shape(1, 64, (180, 320), 64, 3, 16),  # BasicVSR++
    "edvr": Shape(4, 128, (128, 128), 128, 3, 8),
    "k7": Shape(1, 256, (64, 64), 256, 7),  # BiRefNet
    "depthwise": Shape(8, 128, (64, 64), 128, 3, groups=128),
    "conv3d": Shape(1, 64, (7, 32, 32), 64, 3),  # D3Dnet
    "conv1d": Shape(16, 512, (128,), 512, 16, padding=22, dilation=3),  # speech
    "up2d": Shape(4, 256, (64, 64), 128, 4, stride=2, padding=1, transposed=True),
    "tiny": Shape(1, 4, (32, 32), 2, 5, stride=(1, 2), dilation=(1, 2), groups=2),  # overhead
}
# Shapes that a CPU finishes in reasonable time: single images, and the last four from above.
CPU_SHAPES = {
    "A": Shape(1, 64, (64, 64), 64, 3),
    "B": Shape(1, 128, (100, 168), 128, 3),
    "C": Shape(1, 256, (50, 84), 256, 3),
    "D": Shape(1, 64, (180, 320), 64, 3, 16),
    "E": Shape(1, 256, (32, 32), 256, 7),
    **{name: SHAPES[name] for name in ("conv1d", "conv3d", "up2d", "tiny")},
}
DTYPES = ("float16", "bfloat16", "float32", "float64")
PHASES = ("forward", "backward")
Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # in the order of the functions
Call = Callable[[], Any]


def padding_of(shape: Shape) -> int:
    """The padding of every axis."""
    return shape.kernel // 2 if shape.padding < 0 else shape.padding


def every(value: tuple[int, ...] | int, n: int) -> tuple[int, ...]:
    """One number for each axis."""
    return (value,) * n if isinstance(value, int) else value


class Problem:
    """The tensors of a shape, and the calls that are timed."""

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        channels_last: bool = False,
    ) -> None:
        n = len(shape.size)
        self.shape, self.n, self.device = shape, n, device
        self.flat = n == 2 and not shape.transposed  # Only this is what the 2-D peers compute.
        generator = torch.Generator(device).manual_seed(0)

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, device=device, generator=generator)

        padding = padding_of(shape)
        self.parameters: dict[str, Any] = {
            "stride": every(shape.stride, n),
            "padding": every(padding, n),
            "dilation": every(shape.dilation, n),
            "groups": shape.groups,
        }
        taps = shape.kernel**n
        ends = (shape.out_channels, shape.channels)
        rows, columns = ends[::-1] if shape.transposed else ends
        x = randn(shape.batch, shape.channels, *shape.size)
        weight = randn(rows, columns // shape.groups, *(shape.kernel,) * n)
        weight /= math.sqrt(shape.channels / shape.groups * taps)
        bias = randn(shape.out_channels)
        out = self.dense((x[:1], weight, x, x, bias)).shape[2:]
        where = (shape.batch, *(shape.size if shape.transposed else out))
        groups = shape.offset_groups * taps
        offset = 2 * randn(where[0], groups * n, *where[1:])
        mask = torch.rand(where[0], groups, *where[1:], device=device, generator=generator)
        grad = randn(shape.batch, shape.out_channels, *out)
        self.input, self.weight, self.offset, self.mask, self.bias, self.grad = (
            t.to(dtype) for t in (x, weight, offset, mask, bias, grad)
        )
        if channels_last:
            self.input, self.grad = (t.to(memory_format=_LAST[n]) for t in (self.input, self.grad))

    def tensors(self) -> Tensors:
        return self.input, self.weight, self.offset, self.mask, self.bias

    def deform(self, tensors: Tensors | None = None) -> Tensor:
        kind = "deform_conv_transpose" if self.shape.transposed else "deform_conv"
        function = getattr(functional, f"{kind}{self.n}d")
        result: Tensor = function(*(tensors or self.tensors()), **self.parameters)
        return result

    def dense(self, tensors: Tensors | None = None) -> Tensor:
        x, weight, _, _, bias = tensors or self.tensors()
        kind = "conv_transpose" if self.shape.transposed else "conv"
        result: Tensor = getattr(F, f"{kind}{self.n}d")(x, weight, bias, **self.parameters)
        return result

    def last(self) -> Tensors:
        """The tensors with channels last, in which cuDNN is fastest."""
        x, weight = self.input, self.weight
        if self.n > 1:
            x, weight = (t.to(memory_format=_LAST[self.n]) for t in (x, weight))
        return x, weight, self.offset, self.mask, self.bias

    def torchvision(
        self, tensors: Tensors | None = None, module: str = "torchvision.ops"
    ) -> Tensor:
        x, weight, offset, mask, bias = tensors or self.tensors()
        p = {k: v for k, v in self.parameters.items() if k != "groups"}
        function = importlib.import_module(module).deform_conv2d
        result: Tensor = function(x, offset, weight, bias, mask=mask, **p)
        return result

    def deformops(self, tensors: Tensors | None = None) -> Tensor:
        return self.torchvision(tensors, "deformops.integrations.torchvision")

    def tvdcn(self, tensors: Tensors | None = None) -> Tensor:
        kind = "deform_conv_transpose" if self.shape.transposed else "deform_conv"
        function = getattr(importlib.import_module("tvdcn.ops"), f"{kind}{self.n}d")
        # tvdcn 1.1 does not accept its own default, which is an integer.
        more = {"output_padding": (0,) * self.n} if self.shape.transposed else {}
        result: Tensor = function(*(tensors or self.tensors()), **self.parameters, **more)
        return result

    @functools.cached_property
    def geometry(self) -> Geometry:
        p = self.parameters
        rest = (p["dilation"], p["groups"])
        if self.shape.transposed:
            zero = (0,) * self.n
            return conv_transpose_geometry(*self.tensors(), p["stride"], p["padding"], zero, *rest)
        return conv_geometry(*self.tensors(), p["stride"], p["padding"], *rest)

    def kernel(self, backend: Any) -> Tensor:
        """The forward by one backend's function, without torch's dispatcher."""
        forward = backend.scatter if self.shape.transposed else backend.gather
        out: Tensor = forward(self.geometry, *self.tensors())
        return out

    def kernel_backward(self, backend: Any) -> tuple[Tensor | None, ...]:
        """The gradients by one backend's function: (image, points, weight, offset, mask, bias)."""
        transposed = self.shape.transposed
        image, points = (self.grad, self.input) if transposed else (self.input, self.grad)
        needs = (not transposed, transposed, True, True, True)
        grads: tuple[Tensor | None, ...] = backend.gradients(
            self.geometry, image, points, self.weight, self.offset, self.mask, needs, self.grad
        )
        return grads

    def exact(self, images: int = 1, first: int = 0) -> Problem:
        """The problem in float64, with this number of its images, from the image `first` on."""
        p = object.__new__(Problem)
        p.__dict__.update(self.__dict__)
        p.__dict__.pop("geometry", None)
        p.shape = self.shape._replace(batch=images)
        p.input, p.offset, p.mask, p.grad = (
            t[first : first + images].double()
            for t in (self.input, self.offset, self.mask, self.grad)
        )
        p.weight, p.bias = self.weight.double(), self.bias.double()
        return p

    def onnxruntime(self, threads: int) -> Callable[[], Any]:
        import onnxruntime as ort
        from onnx import TensorProto, helper

        feed = {"x": self.input, "w": self.weight, "o": self.offset, "b": self.bias, "m": self.mask}
        p = self.parameters
        node = helper.make_node(
            "DeformConv",
            list(feed),
            ["y"],
            kernel_shape=[self.shape.kernel] * 2,
            pads=p["padding"] * 2,
            strides=p["stride"],
            dilations=p["dilation"],
            group=self.shape.groups,
            offset_group=self.shape.offset_groups,
        )
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            [node],
            "g",
            [info(k, TensorProto.FLOAT, list(t.shape)) for k, t in feed.items()],
            [info("y", TensorProto.FLOAT, list(self.grad.shape))],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        arrays = {k: t.numpy() for k, t in feed.items()}
        return lambda: session.run(None, arrays)[0]

    def openvino(self, threads: int) -> Callable[[], Any]:
        import numpy as np
        import openvino as ov
        from openvino import opset8

        p = self.parameters
        feed = (self.input.numpy(), self.offset.numpy(), self.mask.numpy())
        x, offset, mask = (opset8.parameter(list(a.shape), np.float32) for a in feed)
        y = opset8.deformable_convolution(
            x,
            offset,
            opset8.constant(self.weight.numpy()),
            list(p["stride"]),
            list(p["padding"]),
            list(p["padding"]),
            list(p["dilation"]),
            mask,
            "explicit",
            self.shape.groups,
            self.shape.offset_groups,
            True,
        )
        y = opset8.add(y, opset8.constant(self.bias.numpy().reshape(1, -1, 1, 1)))
        model = ov.Core().compile_model(
            ov.Model([y], [x, offset, mask]),
            "CPU",
            {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads},
        )
        request = model.create_infer_request()
        return lambda: request.infer(feed)[0]


_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


class Peer(NamedTuple):
    """A package to compare with."""

    modules: tuple[str, ...]  # which must be installed
    ranks: str  # "2d" for deform_conv2d alone, "all" for every operator
    engine: bool = False  # whether it is an inference engine: float32 on the CPU, no backward


PEERS = {
    "dense": Peer((), "all"),
    "deformnd": Peer((), "all"),
    "torchvision": Peer(("torchvision",), "2d"),
    "tvdcn": Peer(("tvdcn",), "all"),
    "deformops": Peer(("deformops",), "2d"),
    "onnxruntime": Peer(("onnxruntime", "onnx"), "2d", engine=True),
    "openvino": Peer(("openvino",), "2d", engine=True),
}


def has(peer: str) -> bool:
    """Whether the packages of a peer can be imported."""
    try:
        for module in PEERS[peer].modules:
            importlib.import_module(module)
    except (ImportError, OSError, RuntimeError):  # It may be built for another torch.
        return False
    return True


def fits(peer: str, p: Problem, phase: str) -> bool:
    """Whether a peer has this operator on this device, in this dtype and direction."""
    wanted = PEERS[peer]
    if wanted.ranks == "2d" and not p.flat:
        return False
    if wanted.engine:
        return p.device == "cpu" and p.input.dtype == torch.float32 and phase == "forward"
    return True


def prepare(peer: str, p: Problem, phase: str, threads: int) -> Call:
    """The call to time: a forward without autograd's records, or a backward alone."""
    if PEERS[peer].engine:
        engine: Call = getattr(p, peer)(threads)
        return engine
    function = p.deform if peer == "deformnd" else getattr(p, peer)
    last = peer == "dense" and p.device != "cpu"
    tensors = p.last() if last else p.tensors()
    if phase == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                result: Tensor = function(tensors)
                return result

        return forward
    grad = p.grad.contiguous(memory_format=_LAST[p.n]) if last and p.n > 1 else p.grad
    leaves: Any = tuple(t.detach().requires_grad_() for t in tensors)
    for _ in range(2):  # The second call is the one of a training that has begun.
        y = function(leaves)
    return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True, allow_unused=True)


def rounds(group: dict[str, Call], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of a call on the CPU, from interleaved rounds of about 30 ms each.

    A call that is not timed comes before each round, as in steady use. While a slow peer runs, a
    virtual machine may hand free memory back to its host, and getting 100 MB again takes as long as
    a call.
    """
    calls = {}
    for name, function in group.items():
        function()
        start = time.perf_counter()
        function()
        calls[name] = max(1, int(0.03 / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in group}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or any(len(t) < 3 for t in times.values()):
        for name, function in group.items():
            if len(times[name]) >= 3 and sum(times[name]) > 2e3 * seconds:
                continue  # A slow peer has used up its time.
            function()
            start = time.perf_counter()
            for _ in range(calls[name]):
                function()
            times[name].append((time.perf_counter() - start) * 1e3 / calls[name])
    return times


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Have all threads of this process on one core, where the system can do that.

    A backward goes to a thread of autograd's and back, which takes 100 us where it wakes another
    core of a virtual machine. In a model that happens once, but a benchmark of layers would count
    it for each. Afterwards all threads have the cores that this one has now.
    """

    tasks = Path("/proc/self/task")  # the threads by their numbers, on Linux

    def put_threads(cores: set[int]) -> None:
        for task in tasks.iterdir():
            with contextlib.suppress(OSError):  # It may have ended.
                os.sched_setaffinity(int(task.name), cores)

    if not (tasks.is_dir() and hasattr(os, "sched_setaffinity")):
        yield
        return
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    put_threads({max(cores)})
    torch.set_num_threads(1)  # More threads would wait for each other on that core.
    try:
        yield
    finally:
        put_threads(cores)
        torch.set_num_threads(threads)


def gpu_ms(call: Call, rep: int = 60) -> float:
    """Median milliseconds of a call on a GPU with a cold L2 cache."""
    from triton.testing import do_bench

    result: float = do_bench(call, warmup=rep // 4, rep=rep, return_mode="median")
    return result


def gpu_rounds(group: dict[str, Call], count: int = 3, rep: int = 15) -> dict[str, list[float]]:
    """Milliseconds of a call on a GPU, as medians of interleaved rounds."""
    times: dict[str, list[float]] = {name: [] for name in group}
    for _ in range(count):
        for name, function in group.items():
            times[name].append(gpu_ms(function, rep))
    return times


def device_ms(call: Call, count: int = 15) -> float:
    """Median milliseconds of a call on a GPU that waits for no host, with a cold L2 cache.

    The device first clears memory, which takes longer than the host needs to issue the call.
    """
    memory = torch.empty(1 << 30, dtype=torch.int8, device="cuda")  # To clear it takes 0.25 ms.
    times: list[float] = []
    for _ in range(count):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(4):
            memory.zero_()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def host_us(call: Call, calls: int = 10) -> float:
    """Microseconds that the host needs to issue a call on a GPU, best of five rounds.

    The calls of a round are few, since the host waits once the GPU's queue of 1024 kernels is full.
    """
    best = math.inf
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
        torch.cuda.synchronize()
    return best * 1e6


def nbytes(x: Any) -> int:
    """Bytes of the tensors and arrays in a result."""
    if isinstance(x, (tuple, list)):
        return sum(map(nbytes, x))
    return 0 if x is None else int(x.nbytes)


def gpu_peak(call: Call) -> float:
    """MiB that a call holds at most beyond what was there and its results."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    own = nbytes(call())
    return max(torch.cuda.max_memory_allocated() - before - own, 0) / 2**20


def resident_peak(call: Call) -> float:
    """MiB of resident memory (Linux) that a first call takes beyond its results.

    This needs a fresh process, since memory that an allocator has kept from before is not seen.
    """

    def status(key: str) -> float:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) / 1024
        raise KeyError(key)

    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    own = nbytes(call()) / 2**20
    return max(round(status("VmHWM") - before - own, 1), 0.0)


def relative(found: Any, exact: Tensor) -> float:
    """Relative L2 error."""
    exact = exact.cpu()
    return float((torch.as_tensor(found).cpu().double() - exact).norm() / exact.norm())


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    lines = info.read_text().splitlines()
    pairs = [line.split(":", 1) for line in reversed(lines) if ":" in line]
    fields = {key.strip(): value.strip() for key, value in pairs}
    names = ("model name", "cpu family", "model")
    return ", ".join(f"{name} {fields[name]}" for name in names if name in fields)


def without_hopper() -> None:
    """Leave out, in this process, the kernels for Hopper and the tiles of any one architecture."""
    from .kernels.gpu import tiles

    device = tiles.device_of(torch.device("cuda", torch.cuda.current_device()))
    tiles.device_of = lambda _: device._replace(architecture="portable")  # type: ignore[assignment]


def versions(peers: Sequence[str] = tuple(PEERS)) -> dict[str, str]:
    """Of Python, torch, Triton and the peers that are installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for module in ("triton", *(m for peer in peers for m in PEERS[peer].modules)):
        try:
            found[module] = importlib.import_module(module).__version__
        except (ImportError, OSError, RuntimeError, AttributeError):
            continue
    return found


def run(
    shapes: Sequence[str],
    dtypes: Sequence[str],
    peers: Sequence[str],
    phases: Sequence[str] = PHASES,
    device: str = "cpu",
    seconds: float = 1.0,
    memory: bool = True,
) -> dict[str, Any]:
    """Measure, and return the report that `deformnd bench --json` writes.

    Args:
        shapes: names of SHAPES or CPU_SHAPES.
        dtypes: of DTYPES.
        peers: of PEERS; those that are not installed are left out, and named in the report.
        phases: "forward", "backward" or both.
        device: "cpu" or "cuda".
        seconds: for each shape, dtype and phase on the CPU, shared by the peers.
        memory: measure the peak memory, on the CPU in a process of its own for each peer.
    """
    from tqdm import tqdm

    from . import __version__

    cuda = device.startswith("cuda")
    threads = torch.get_num_threads()
    installed = [peer for peer in peers if has(peer)]
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "deformnd": __version__,
        "kernels": "Triton" if cuda else "C++ core" if cpu.available() else "reference",
        "versions": versions(),
        "not installed": [peer for peer in peers if peer not in installed],
        "rows": [],
    }
    if cuda:
        torch.backends.cudnn.benchmark = True
    jobs = [(s, d, f) for d in dtypes for s in shapes for f in phases]
    with tqdm(total=len(jobs) * len(installed), unit="peer", disable=None) as progress:
        for name, dtype, phase in jobs:
            progress.set_description(f"{name} {dtype} {phase}")
            p = Problem({**SHAPES, **CPU_SHAPES}[name], getattr(torch, dtype), device)
            row: dict[str, Any] = {"shape": name, "sizes": p.shape._asdict(), "dtype": dtype}
            row |= {"phase": phase, "peers": measure(p, phase, installed, threads, seconds)}
            for peer, found in row["peers"].items():
                if memory and "ms" in found:
                    found["memory MiB"] = (
                        gpu_peak(prepare(peer, p, phase, threads))
                        if cuda
                        else _fresh_peak(name, dtype, phase, peer)
                    )
            report["rows"].append(row)
            progress.update(len(installed))
    return report


def measure(
    p: Problem, phase: str, peers: Sequence[str], threads: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """Of each peer that has the operator: its times and error, or why it failed."""
    found: dict[str, dict[str, Any]] = {}
    # An engine has a group of its own, since its threads would spin while others are timed.
    groups: list[dict[str, Call]] = [{}]
    want: Any = p.exact().kernel(reference) if phase == "forward" else _exact_gradients(p)
    for peer in peers:
        if not fits(peer, p, phase):
            continue
        try:
            start = time.perf_counter()
            call = prepare(peer, p, phase, threads)
            result = call()
            if p.device != "cpu":
                torch.cuda.synchronize()
            found[peer] = {"first s": time.perf_counter() - start}
            if peer != "dense":
                found[peer]["error"] = (
                    relative(result[:1], want)
                    if isinstance(want, Tensor)
                    else _gradient_error(result, want)
                )
        except Exception as error:  # Each peer has its own error for a dtype that it lacks.
            found[peer] = {"failed": failure(error)}
            continue
        if PEERS[peer].engine:
            groups.append({peer: call})
        else:
            groups[0][peer] = call
    for group in groups:
        times = gpu_rounds(group) if p.device != "cpu" else rounds(group, seconds / len(groups))
        for peer, t in times.items():
            found[peer] |= {"ms": statistics.median(t), "best ms": min(t), "rounds": len(t)}
            if p.device != "cpu":
                found[peer]["host us"] = host_us(group[peer])
                found[peer]["device ms"] = device_ms(group[peer])
    return found


def failure(error: Exception) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _exact_gradients(p: Problem) -> tuple[Any, ...]:
    """Gradients by (input, weight, offset, mask) of the first image; the weight's is of all."""
    grads: tuple[Any, ...] = p.exact().kernel_backward(reference)
    image, points, weight, offset, mask, _ = grads
    for i in range(1, p.shape.batch):
        weight = weight + p.exact(first=i).kernel_backward(reference)[2]
    return points if p.shape.transposed else image, weight, offset, mask


def _gradient_error(grads: Any, want: Any) -> float:
    """The largest of the errors of the gradients by input, weight, offset and mask."""
    found = (grads[0][:1], grads[1], grads[2][:1], grads[3][:1])
    # max may drop a NaN, since every comparison with one is false.
    errors = [relative(a, b) for a, b in zip(found, want, strict=True)]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _fresh_peak(name: str, dtype: str, phase: str, peer: str) -> float | None:
    command = [sys.executable, "-m", "deformnd.bench", name, dtype, phase, peer]
    command.append(str(torch.get_num_threads()))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(done.stdout) if done.returncode == 0 else None  # It fails without /proc.


def _peak_here(name: str, dtype: str, phase: str, peer: str, threads: str) -> float:
    torch.set_num_threads(int(threads))
    problems = {**SHAPES, **CPU_SHAPES}
    small, p = (Problem(problems[key], getattr(torch, dtype)) for key in ("tiny", name))
    if p.n == 2:  # What the first call of a process takes, whatever its size, is not counted.
        prepare(peer, small, phase, int(threads))()
    return resident_peak(prepare(peer, p, phase, int(threads)))


def mean(values: Sequence[float]) -> float:
    """Geometric mean."""
    return math.exp(statistics.fmean(map(math.log, values)))


def table(report: dict[str, Any]) -> str:
    """The report in Markdown: a table for each dtype and phase, and the mean ratios."""
    lines = [f"{report['device']}, {report['threads']} threads, kernels: {report['kernels']}"]
    lines.append(", ".join(f"{k} {v}" for k, v in report["versions"].items()))
    if report["not installed"]:
        lines.append("not installed: " + ", ".join(report["not installed"]))
    kinds = dict.fromkeys((row["dtype"], row["phase"]) for row in report["rows"])
    for dtype, phase in kinds:
        rows = [r for r in report["rows"] if (r["dtype"], r["phase"]) == (dtype, phase)]
        peers = [q for q in PEERS if any("ms" in r["peers"].get(q, {}) for r in rows)]
        lines += ["", f"{phase}, {dtype}: ms (times deformnd's; peak MiB; relative error)", ""]
        lines += ["| | " + " | ".join(peers) + " |", "|---" * (len(peers) + 1) + "|"]
        ratios: dict[str, list[float]] = {}
        for row in rows:
            ours = row["peers"].get("deformnd", {}).get("ms")
            cells = []
            for q in peers:
                found = row["peers"].get(q, {})
                if "ms" not in found:
                    cells.append("-")
                    continue
                more = []
                if ours and q != "deformnd":
                    ratios.setdefault(q, []).append(found["ms"] / ours)
                    more.append(f"{found['ms'] / ours:.2f}x")
                if found.get("memory MiB") is not None:
                    more.append(f"{found['memory MiB']:.3g} MiB")
                if "error" in found:
                    more.append(f"{found['error']:.0e}")
                cells.append(f"{found['ms']:.3g}" + (f" ({'; '.join(more)})" if more else ""))
            lines.append(f"| {row['shape']} | " + " | ".join(cells) + " |")
        if ratios:
            means = [f"{mean(ratios[q]):.2f}x" if q in ratios else "" for q in peers]
            lines.append("| mean | " + " | ".join(means) + " |")
    return "\n".join(lines)


def plot(report: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Bars of each peer's time in units of deformnd's, a panel for each dtype and phase."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    dtypes = list(dict.fromkeys(row["dtype"] for row in report["rows"]))
    phases = list(dict.fromkeys(row["phase"] for row in report["rows"]))
    found = {q for row in report["rows"] for q, r in row["peers"].items() if "ms" in r}
    peers = [q for q in PEERS if q in found and q != "deformnd"]
    longest = max((len(row["shape"]) for row in report["rows"]), default=0)
    most = max((sum(r["dtype"] == d for r in report["rows"]) for d in dtypes), default=0)
    # The bars are horizontal, so that the names of the shapes do not overlap.
    figure, axes = plt.subplots(
        *(len(dtypes), len(phases)),
        figsize=(
            1 + 0.06 * longest + 4 * len(phases),
            0.6 + len(dtypes) * (0.5 + 0.4 * most / max(len(phases), 1)),
        ),
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    for dtype, line in zip(dtypes, axes, strict=True):
        shapes = list(dict.fromkeys(r["shape"] for r in report["rows"] if r["dtype"] == dtype))
        for phase, axis in zip(phases, line, strict=True):
            rows = [
                row
                for row in report["rows"]
                if (row["dtype"], row["phase"]) == (dtype, phase)
                and "ms" in row["peers"].get("deformnd", {})
            ]
            here = [q for q in peers if any("ms" in row["peers"].get(q, {}) for row in rows)]
            width = 0.8 / max(len(here), 1)
            for i, q in enumerate(here):
                there = [row for row in rows if "ms" in row["peers"].get(q, {})]
                ratios = [r["peers"][q]["ms"] / r["peers"]["deformnd"]["ms"] for r in there]
                shift = (i - (len(here) - 1) / 2) * width
                at = [shapes.index(row["shape"]) + shift for row in there]
                # Bars begin at 1, so that those of faster peers go to the left.
                lengths = [ratio - 1 for ratio in ratios]
                axis.barh(at, lengths, width, 1, label=q, color=f"C{peers.index(q)}")
            axis.axvline(1, color="black", linewidth=0.8)
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.tick_params(axis="x", labelsize=7)
            axis.set_yticks(range(len(shapes)), shapes, fontsize=8)
            axis.set_title(f"{phase}, {dtype}", fontsize=9)
            axis.grid(axis="x", alpha=0.3)
        line[0].invert_yaxis()  # The first shape is on top, as in a table.
    handles = {h: n for a in axes.flat for h, n in zip(*a.get_legend_handles_labels(), strict=True)}
    names = {name: handle for handle, name in handles.items()}
    figure.legend(names.values(), names, loc="outside lower center", ncols=len(names), fontsize=8)
    figure.suptitle(f"{report['device']}: time / deformnd's time", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    print(json.dumps(_peak_here(*sys.argv[1:])))
