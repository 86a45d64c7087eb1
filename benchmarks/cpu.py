"""The CPU core beside dense convolution, torchvision, ONNX Runtime and OpenVINO, in one run.

    python benchmarks/cpu.py --output benchmarks/results/cpu.json

Peers that are not installed are left out. Times are medians of interleaved rounds in milliseconds;
`best` in the JSON are the least, for a machine that others use too. Memory is the peak resident
set beyond what was there before the call and beyond its results, in a fresh process (Linux).
Errors are relative L2 norms against the definition in float64.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from deformnd.kernels import cpu, reference
from deformnd.kernels.geometry import Geometry, conv_geometry, conv_transpose_geometry


class Case(NamedTuple):
    batch: int
    cin: int
    size: tuple[int, ...]
    cout: int
    kernel: int
    offset_groups: int = 1
    stride: tuple[int, ...] | None = None
    padding: int | None = None  # kernel // 2
    dilation: tuple[int, ...] | None = None
    groups: int = 1
    transposed: bool = False


CASES = {
    "A": Case(1, 64, (64, 64), 64, 3),
    "B": Case(1, 128, (100, 168), 128, 3),
    "C": Case(1, 256, (50, 84), 256, 3),
    "D": Case(1, 64, (180, 320), 64, 3, offset_groups=16),
    "E": Case(1, 256, (32, 32), 256, 7),
    "conv1d": Case(16, 512, (128,), 512, 16, padding=22, dilation=(3,)),
    "conv3d": Case(1, 64, (7, 32, 32), 64, 3),
    "up2d": Case(4, 256, (64, 64), 128, 4, stride=(2, 2), padding=1, transposed=True),
    "tiny": Case(1, 4, (32, 32), 2, 5, stride=(1, 2), dilation=(1, 2), groups=2),
}
PEERS = ("dense", "deformnd", "torchvision", "onnxruntime", "openvino")


class Problem:
    """The tensors of a case, and every peer as a function of no arguments."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32) -> None:
        n = len(case.size)
        gen = torch.Generator().manual_seed(0)
        self.case, self.n = case, n
        self.stride = list(case.stride or (1,) * n)
        self.padding = [case.kernel // 2 if case.padding is None else case.padding] * n
        self.dilation = list(case.dilation or (1,) * n)
        points = case.kernel**n
        cin, cout = case.cin, case.cout
        ends = (cin, cout // case.groups) if case.transposed else (cout, cin // case.groups)
        self.input = torch.randn(case.batch, cin, *case.size, generator=gen)
        self.weight = torch.randn(*ends, *(case.kernel,) * n, generator=gen) * 0.05
        self.bias = torch.randn(cout, generator=gen)
        out = self.dense()
        where = case.size if case.transposed else out.shape[2:]
        channels = case.offset_groups * points
        self.offset = torch.randn(case.batch, n * channels, *where, generator=gen) * 2
        self.mask = torch.rand(case.batch, channels, *where, generator=gen)
        self.grad = torch.randn(out.shape, generator=gen)
        for name, t in list(vars(self).items()):
            if isinstance(t, Tensor):
                setattr(self, name, t.to(dtype))
        tensors = (self.input, self.weight, self.offset, self.mask, self.bias)
        parameters = (self.stride, self.padding, self.dilation, case.groups)
        self.g: Geometry = (
            conv_transpose_geometry(*tensors, *parameters[:2], [0] * n, *parameters[2:])
            if case.transposed
            else conv_geometry(*tensors, *parameters)
        )

    def dense(self, *tensors: Tensor) -> Tensor:
        kind = "conv_transpose" if self.case.transposed else "conv"
        function: Callable[..., Tensor] = getattr(F, f"{kind}{self.n}d")
        return function(
            *(tensors or (self.input, self.weight, self.bias)),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.case.groups,
        )

    def deformnd(self, backend: Any = cpu) -> Tensor:
        forward = backend.scatter if self.case.transposed else backend.gather
        out: Tensor = forward(self.g, self.input, self.weight, self.offset, self.mask, self.bias)
        return out

    def deformnd_backward(self, backend: Any = cpu) -> tuple[Tensor | None, ...]:
        transposed = self.case.transposed
        image, points = (self.grad, self.input) if transposed else (self.input, self.grad)
        needs = (not transposed, transposed, True, True, True)
        grads: tuple[Tensor | None, ...] = backend.gradients(
            self.g, image, points, self.weight, self.offset, self.mask, needs
        )
        return (*grads, self.grad.sum([0, *range(2, self.n + 2)]))

    def deformnd_both(self) -> object:
        return self.deformnd(), self.deformnd_backward()

    def dense_both(self) -> object:
        leaves = [t.detach().requires_grad_() for t in (self.input, self.weight, self.bias)]
        return torch.autograd.grad(self.dense(*leaves), leaves, self.grad)

    def torchvision(self, *tensors: Tensor) -> Tensor:
        import torchvision  # type: ignore[import-not-found]

        x, weight, offset, mask, bias = tensors or (
            self.input,
            self.weight,
            self.offset,
            self.mask,
            self.bias,
        )
        out: Tensor = torchvision.ops.deform_conv2d(
            x, offset, weight, bias, self.stride, self.padding, self.dilation, mask
        )
        return out

    def torchvision_both(self) -> object:
        given = (self.input, self.weight, self.offset, self.mask, self.bias)
        leaves = [t.detach().requires_grad_() for t in given]
        return torch.autograd.grad(self.torchvision(*leaves), leaves, self.grad)

    def onnxruntime(self, threads: int) -> Callable[[], Any]:
        import onnxruntime as ort  # type: ignore[import-not-found]
        from onnx import TensorProto, helper  # type: ignore[import-not-found]

        feed = {"x": self.input, "w": self.weight, "o": self.offset, "b": self.bias, "m": self.mask}
        node = helper.make_node(
            "DeformConv",
            list(feed),
            ["y"],
            kernel_shape=[self.case.kernel] * 2,
            pads=self.padding * 2,
            strides=self.stride,
            dilations=self.dilation,
            group=self.case.groups,
            offset_group=self.case.offset_groups,
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
        import openvino as ov  # type: ignore[import-not-found]
        from openvino import opset8  # type: ignore[import-not-found]

        feed = (self.input.numpy(), self.offset.numpy(), self.mask.numpy())
        x, offset, mask = (opset8.parameter(list(a.shape), np.float32) for a in feed)
        y = opset8.deformable_convolution(
            x,
            offset,
            opset8.constant(self.weight.numpy()),
            self.stride,
            self.padding,
            self.padding,
            self.dilation,
            mask,
            "explicit",
            self.case.groups,
            self.case.offset_groups,
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


def has(peer: str) -> bool:
    try:
        importlib.import_module(peer)
        return peer != "onnxruntime" or importlib.import_module("onnx") is not None
    except ImportError:
        return False


def functions(p: Problem, both: bool, threads: int) -> list[dict[str, Callable[[], object]]]:
    """Groups of peers to interleave; the runtimes with pools of their own stand alone."""
    flat = p.n == 2 and not p.case.transposed
    if both:
        first: dict[str, Callable[[], object]] = {
            "dense": p.dense_both,
            "deformnd": p.deformnd_both,
        }
        if flat and has("torchvision"):
            first["torchvision"] = p.torchvision_both
        return [first]
    first = {"dense": p.dense, "deformnd": p.deformnd}
    if flat and has("torchvision"):
        first["torchvision"] = p.torchvision
    groups = [first]
    if flat and has("onnxruntime"):
        groups.append({"onnxruntime": p.onnxruntime(threads)})
    if flat and has("openvino"):
        groups.append({"openvino": p.openvino(threads)})
    return groups


def measure(group: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds a call, of interleaved rounds of about 30 ms each."""
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
                continue  # a slow peer
            start = time.perf_counter()
            for _ in range(calls[name]):
                function()
            times[name].append((time.perf_counter() - start) * 1e3 / calls[name])
    return times


def peak(case: str, peer: str, both: bool, threads: int) -> float | None:
    """Megabytes beyond inputs and results, in this fresh process."""
    p, small = Problem(CASES[case]), Problem(CASES["tiny"])
    torch.set_num_threads(threads)

    def find(of: Problem) -> Callable[[], object]:
        for group in functions(of, both, threads):
            if peer in group:
                return group[peer]
        raise KeyError(peer)

    if p.n == 2:
        find(small)()
    function = find(p)

    def status(key: str) -> float:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) / 1024
        raise KeyError(key)

    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    result = function()

    def size(x: Any) -> float:
        if isinstance(x, (tuple, list)):
            return sum(map(size, x))
        return 0.0 if x is None else x.nbytes / 2**20

    return round(status("VmHWM") - before - size(result), 1)


def relative(a: Any, b: Tensor) -> float:
    a = torch.as_tensor(a).double()
    return float((a - b).norm() / b.norm())


def run_case(name: str, seconds: float) -> dict[str, Any]:
    case = CASES[name]
    p = Problem(case)
    result: dict[str, Any] = {"shape": case._asdict()}
    for both in (False, True):
        phase = "forward+backward" if both else "forward"
        result[phase] = {}
        for threads in (2, 1):
            torch.set_num_threads(threads)
            times: dict[str, list[float]] = {}
            for group in functions(p, both, threads):
                times |= measure(group, seconds)
            result[phase][f"{threads} threads"] = {
                peer: {"median": statistics.median(t), "best": min(t), "rounds": len(t)}
                for peer, t in times.items()
            }
        torch.set_num_threads(2)
        result[phase]["memory"] = {}
        for peer in result[phase]["2 threads"]:
            command = [sys.executable, __file__, "--peak", name, peer, str(int(both))]
            out = subprocess.run(command, capture_output=True, text=True, check=False)
            if out.returncode == 0:
                result[phase]["memory"][peer] = float(out.stdout)
    exact = Problem(case, torch.float64)
    want = exact.deformnd(reference)
    result["error"] = {
        peer: relative(function(), want)
        for group in functions(p, False, 2)
        for peer, function in group.items()
        if peer != "dense"
    }
    # Where a rounded position falls into the next cell, its gradient differs by far.
    result["gradient error"] = {
        key: relative(a, b)
        for key, a, b in zip(
            ("image", "points", "weight", "offset", "mask", "bias"),
            p.deformnd_backward(),
            exact.deformnd_backward(reference),
            strict=True,
        )
        if a is not None and b is not None
    }
    return result


def device() -> dict[str, Any]:
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        fields = dict(map(str.strip, line.split(":", 1)) for line in reversed(lines) if ":" in line)
        names = ("model name", "cpu family", "model")
        model = ", ".join(f"{name} {fields[name]}" for name in names if name in fields)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for peer in PEERS[2:]:
        if has(peer):
            versions[peer] = importlib.import_module(peer).__version__
    return {
        "cpu": model.strip(),
        "cores": os.cpu_count(),
        "instructions": ("baseline", "AVX2", "AVX-512")[cpu.best_level()],
        "load before": os.getloadavg(),
        "versions": versions,
    }


def mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def table(results: dict[str, Any], key: str) -> str:
    lines = []
    for phase in ("forward", "forward+backward"):
        for threads in ("2 threads", "1 threads"):
            peers = [q for q in PEERS if any(q in r[phase][threads] for r in results.values())]
            lines += [f"\n{phase}, {threads}, {key}, ms (memory in MB)\n"]
            lines += ["| | " + " | ".join(peers) + " | to dense |", "|---" * (len(peers) + 2) + "|"]
            for name, r in results.items():
                times, memory = r[phase][threads], r[phase]["memory"]
                cells = [
                    f"{times[q][key]:.3g} ({memory.get(q, math.nan):.3g})" if q in times else ""
                    for q in peers
                ]
                ratio = times["deformnd"][key] / times["dense"][key]
                lines.append(f"| {name} | " + " | ".join(cells) + f" | {ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--seconds", type=float, default=4.0, help="for each group of peers")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        case, peer, both = args.peak
        print(peak(case, peer, both == "1", 2))
        return
    report = {"device": device(), "cases": {}}
    for name in args.cases.split(","):
        print(f"{name} ...", file=sys.stderr, flush=True)
        report["cases"][name] = run_case(name, args.seconds)
    report["device"]["load after"] = os.getloadavg()
    print(json.dumps(report["device"], indent=1))
    for key in ("median", "best"):
        print(table(report["cases"], key))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
