"""The CPU core beside dense convolution, torchvision, ONNX Runtime and OpenVINO, in one run.

    python benchmarks/cpu.py --output benchmarks/results/cpu.json
    python benchmarks/cpu.py --threads 1 2 4 8 16 --output benchmarks/results/cpu-threads.json
    python benchmarks/cpu.py --aggregate --threads 1 2

The second form shows how one call spreads over threads, beside dense convolution alone, and at the
largest number what each gradient takes by itself and what bfloat16 gains; about 90 seconds.
The third is deform_aggregate2d, and depthwise deform_conv2d, beside the dense depthwise
convolution, which reads one pixel where they read four.
Peers that are not installed are left out. Times are medians of interleaved rounds in milliseconds;
`best` in the JSON are the least, for a machine that others use too. Memory is the peak resident
set beyond what was there before the call and beyond its results, in a fresh process (Linux).
Errors are relative L2 norms against the definition in float64.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import deformnd
from deformnd import bench
from deformnd.bench import Problem, has, relative
from deformnd.kernels import cpu, reference

CASES = bench.CPU_SHAPES
PEERS = ("dense", "deformnd", "torchvision", "onnxruntime", "openvino")


def deformnd_both(p: Problem) -> object:
    return p.kernel(cpu), p.kernel_backward(cpu)


def dense_both(p: Problem) -> object:
    leaves = [t.detach().requires_grad_() for t in (p.input, p.weight, p.bias)]
    x, weight, bias = leaves
    return torch.autograd.grad(p.dense((x, weight, p.offset, p.mask, bias)), leaves, p.grad)


def torchvision_both(p: Problem) -> object:
    leaves = tuple(t.detach().requires_grad_() for t in p.tensors())
    return torch.autograd.grad(p.torchvision(leaves), leaves, p.grad)


def functions(p: Problem, both: bool, threads: int) -> list[dict[str, Callable[[], object]]]:
    """Groups of peers to interleave; the runtimes with pools of their own stand alone."""
    if both:
        first: dict[str, Callable[[], object]] = {
            "dense": lambda: dense_both(p),
            "deformnd": lambda: deformnd_both(p),
        }
        if p.flat and has("torchvision"):
            first["torchvision"] = lambda: torchvision_both(p)
        return [first]
    first = {"dense": p.dense, "deformnd": lambda: p.kernel(cpu)}
    if p.flat and has("torchvision"):
        first["torchvision"] = p.torchvision
    groups = [first]
    if p.flat and has("onnxruntime"):
        groups.append({"onnxruntime": p.onnxruntime(threads)})
    if p.flat and has("openvino"):
        groups.append({"openvino": p.openvino(threads)})
    return groups


def peak(case: str, peer: str, both: bool, threads: int) -> float:
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
    return bench.resident_peak(find(p))


def run_case(name: str, seconds: float) -> dict[str, Any]:
    case = CASES[name]
    p = Problem(case)
    result: dict[str, Any] = {"shape": sizes(case)}
    for both in (False, True):
        phase = "forward+backward" if both else "forward"
        result[phase] = {}
        for threads in (2, 1):
            torch.set_num_threads(threads)
            times: dict[str, list[float]] = {}
            for group in functions(p, both, threads):
                times |= bench.rounds(group, seconds)
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
    exact = p.exact(case.batch)
    want = exact.kernel(reference)
    result["error"] = {
        peer: relative(function(), want)
        for group in functions(p, False, 2)
        for peer, function in group.items()
        if peer != "dense"
    }
    # Where rounding moves a position into the next cell, its gradient differs a lot.
    result["gradient error"] = gradient_errors(
        p.kernel_backward(cpu), exact.kernel_backward(reference)
    )
    return result


def gradient_errors(
    found: Sequence[torch.Tensor | None], want: Sequence[torch.Tensor | None]
) -> dict[str, float]:
    names = ("image", "points", "weight", "offset", "mask", "bias")
    return {
        name: relative(a, b)
        for name, a, b in zip(names, found, want, strict=True)
        if a is not None and b is not None
    }


def quick(group: dict[str, Callable[[], object]], seconds: float) -> dict[str, dict[str, float]]:
    """Interleaved rounds of about 20 ms, each after a call that is not timed; slow calls alone."""
    calls = {}
    for name, function in group.items():
        for _ in range(2):  # A first call is slower, and does not count.
            start = time.perf_counter()
            function()
            took = time.perf_counter() - start
            if took > 0.2:
                break
        calls[name] = int(0.02 / took)
    times: dict[str, list[float]] = {name: [] for name in group}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[name]) < 2:
        for name, function in group.items():
            if calls[name]:
                function()
            start = time.perf_counter()
            for _ in range(max(1, calls[name])):
                function()
            times[name].append((time.perf_counter() - start) * 1e3 / max(1, calls[name]))
    return {name: {"median": statistics.median(t), "best": min(t)} for name, t in times.items()}


def by_threads(counts: list[int], seconds: float) -> dict[str, Any]:
    """Milliseconds of each case by phase and number of threads."""
    cases = {name: CASES[name] for name in "ABCDE"}
    cases["B, batch 8"] = CASES["B"]._replace(batch=8)
    results: dict[str, Any] = {}
    for name, case in cases.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        p = Problem(case)
        found: dict[str, Any] = {"shape": sizes(case), "forward": {}, "forward+backward": {}}
        results[name] = found
        for count in counts:
            torch.set_num_threads(count)
            found["forward"][count] = quick(
                {"dense": p.dense, "deformnd": functools.partial(p.kernel, cpu)}, seconds
            )
            found["forward+backward"][count] = quick(
                {
                    "dense": functools.partial(dense_both, p),
                    "deformnd": functools.partial(deformnd_both, p),
                },
                seconds,
            )
        given = (p.input, p.grad, p.weight, p.offset, p.mask)
        needs = {
            "image": (True, False, False, False, False),
            "weight": (False, False, True, False, False),
            "offset and mask": (False, False, False, True, True),
        }
        one: dict[str, Callable[[], object]] = {
            key: functools.partial(cpu.gradients, p.geometry, *given, need)
            for key, need in needs.items()
        }
        torch.set_num_threads(max(counts))
        found["one gradient"] = {max(counts): quick(one, seconds)}
    return results


def by_dtype(count: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of float32 and bfloat16 by phase, and bfloat16's errors."""
    torch.set_num_threads(count)
    results: dict[str, Any] = {}
    for name in "ABCDE":
        print(f"{name} in bfloat16 ...", file=sys.stderr, flush=True)
        case = CASES[name]
        p, half = Problem(case), Problem(case, torch.bfloat16)
        found: dict[str, Any] = {
            "forward": {
                "float32": functools.partial(p.kernel, cpu),
                "bfloat16": functools.partial(half.kernel, cpu),
                "dense float32": p.dense,
                "dense bfloat16": half.dense,
            },
            "forward+backward": {
                "float32": functools.partial(deformnd_both, p),
                "bfloat16": functools.partial(deformnd_both, half),
                "dense float32": functools.partial(dense_both, p),
                "dense bfloat16": functools.partial(dense_both, half),
            },
        }
        results[name] = {phase: quick(group, seconds) for phase, group in found.items()}
        # The core in float64 is exact enough, as tests show, and a second faster than the
        # reference.
        exact = half.exact(case.batch)
        results[name]["error"] = {
            "output": relative(half.kernel(cpu), exact.kernel(cpu)),
            **gradient_errors(half.kernel_backward(cpu), exact.kernel_backward(cpu)),
        }
    return results


# Channels, groups, height and width, of InternImage's stages at 224 pixels and of a detector's.
AGGREGATES = [(64, 4, 56, 56), (128, 8, 28, 28), (256, 16, 14, 14), (192, 6, 100, 100)]


def aggregators(
    channels: int, groups: int, size: Sequence[int], dtype: torch.dtype, last: bool
) -> dict[str, tuple[Callable[[], torch.Tensor], list[torch.Tensor]]]:
    """Each peer, and the tensors that it has gradients by."""
    torch.manual_seed(0)
    x = torch.randn(1, *size, channels).permute(0, 3, 1, 2)
    leaves = (
        (x if last else x.contiguous()),
        torch.randn(channels, 1, 3, 3),
        torch.randn(1, groups * 18, *size),
        torch.rand(1, groups * 9, *size),
    )
    x, weight, offset, mask = (t.to(dtype).requires_grad_() for t in leaves)

    def dense() -> torch.Tensor:
        return torch.conv2d(x, weight, padding=1, groups=channels)

    def aggregate() -> torch.Tensor:
        return deformnd.deform_aggregate2d(x, offset, mask, 3, padding=1)

    def depthwise() -> torch.Tensor:
        return deformnd.deform_conv2d(x, weight, offset, mask, padding=1, groups=channels)

    return {
        "dense": (dense, [x, weight]),
        "aggregate": (aggregate, [x, offset, mask]),
        "depthwise": (depthwise, [x, weight, offset, mask]),
    }


def aggregates(counts: list[int], seconds: float) -> dict[str, Any]:
    """Milliseconds by shape, dtype, layout, number of threads and phase; kernels of 3x3."""

    def without(function: Callable[[], torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return function()

    def both(function: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> object:
        output = function()
        return torch.autograd.grad(output, leaves, output.detach())

    results: dict[str, Any] = {}
    kinds = itertools.product(AGGREGATES, (torch.float32, torch.bfloat16), (True, False))
    for (channels, groups, *size), dtype, last in kinds:
        name = f"{size[0]}x{size[1]}x{channels} in {groups}, {str(dtype)[6:]}, channels "
        name += "last" if last else "first"
        print(f"{name} ...", file=sys.stderr, flush=True)
        peers = aggregators(channels, groups, size, dtype, last).items()
        results[name] = {}
        for count in counts:
            torch.set_num_threads(count)
            results[name][count] = {
                "forward": quick(
                    {k: functools.partial(without, f) for k, (f, _) in peers}, seconds
                ),
                "forward+backward": quick(
                    {k: functools.partial(both, f, leaves) for k, (f, leaves) in peers}, seconds
                ),
            }
    return results


def table_of_aggregates(results: dict[str, Any], key: str) -> str:
    lines, peers = [], ("dense", "aggregate", "depthwise")
    for phase in ("forward", "forward+backward"):
        heads = ["", "threads", *peers, "aggregate / (4 dense)"]
        lines += [f"\n{phase}, {key} ms\n", "| " + " | ".join(heads) + " |"]
        lines += ["|---" * len(heads) + "|"]
        for name, found in results.items():
            for count, phases in found.items():
                times = [phases[phase][peer][key] for peer in peers]
                cells = [name, str(count), *(f"{t:.3g}" for t in times)]
                lines.append("| " + " | ".join(cells) + f" | {times[1] / times[0] / 4:.2f} |")
    return "\n".join(lines)


def table_by_dtype(results: dict[str, Any]) -> str:
    lines = []
    for phase in ("forward", "forward+backward"):
        peers = list(results["A"][phase])
        lines += [f"\n{phase}, median ms\n", "| | " + " | ".join(peers) + " | gain | error |"]
        lines += ["|---" * (len(peers) + 3) + "|"]
        for name, found in results.items():
            times = [found[phase][peer]["median"] for peer in peers]
            errors = found["error"]
            error = errors["output"] if phase == "forward" else max(errors.values())
            cells = [*(f"{t:.3g}" for t in times), f"{times[0] / times[1]:.2f}", f"{error:.1e}"]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table_by_threads(results: dict[str, Any], counts: list[int]) -> str:
    lines = []
    for phase in ("forward", "forward+backward"):
        heads = [f"{n} threads: deformnd / dense = ratio" for n in counts]
        lines += [f"\n{phase}, median ms\n", "| | " + " | ".join(heads) + " |"]
        lines += ["|---" * (len(counts) + 1) + "|"]
        for name, found in results.items():
            cells = []
            for n in counts:
                ours, dense = (found[phase][n][peer]["median"] for peer in ("deformnd", "dense"))
                cells.append(f"{ours:.3g} / {dense:.3g} = {ours / dense:.2f}")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["\none gradient by itself, median ms\n"]
    for name, found in results.items():
        parts = [f"{k} {t['median']:.3g}" for k, t in found["one gradient"][max(counts)].items()]
        lines.append(f"- {name}: " + ", ".join(parts))
    return "\n".join(lines)


def device() -> dict[str, Any]:
    return {
        "cpu": bench.processor(),
        "cores": os.cpu_count(),
        "instructions": cpu.LEVELS[cpu.best_level()],
        "load before": os.getloadavg(),
        "versions": bench.versions(PEERS),
    }


def sizes(case: bench.Shape) -> dict[str, Any]:
    """The shape in the words of earlier results."""
    words = {"channels": "cin", "out_channels": "cout"}
    return {words.get(key, key): value for key, value in case._asdict().items()}


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
    parser.add_argument("--threads", type=int, nargs="+", help="only spread over so many threads")
    parser.add_argument("--aggregate", action="store_true", help="only the aggregation")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        case, peer, both = args.peak
        print(peak(case, peer, both == "1", 2))
        return
    if args.aggregate:
        report = {"device": device(), "cases": aggregates(args.threads or [1, 2], 0.5)}
        for key in ("median", "best"):
            print(table_of_aggregates(report["cases"], key))
        save(report, args.output)
        return
    if args.threads:
        report = {"device": device(), "cases": by_threads(args.threads, 0.5)}
        print(table_by_threads(report["cases"], args.threads))
        report["bfloat16"] = by_dtype(max(args.threads), 0.5)
        print(table_by_dtype(report["bfloat16"]))
        save(report, args.output)
        return
    report = {"device": device(), "cases": {}}
    for name in args.cases.split(","):
        print(f"{name} ...", file=sys.stderr, flush=True)
        report["cases"][name] = run_case(name, args.seconds)
    print(json.dumps(report["device"], indent=1))
    for key in ("median", "best"):
        print(table(report["cases"], key))
    save(report, args.output)


def save(report: dict[str, Any], output: Path | None) -> None:
    if output:
        report["device"]["load after"] = os.getloadavg()
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
