"""deformnd beside its peers and the dense convolution on a GPU: time, memory, error.

    python benchmarks/gpu.py [--out benchmarks/results/gpu_h200.json] [--dtypes float16 ...]

Times are medians of three of triton.testing.do_bench, through the public functions, with NCHW
tensors unless said, and with all threads of the host on one core (bench.one_core). `dense` is
torch's own convolution of the same sizes (cuDNN, channels last, benchmark mode), the practical
limit. Errors are relative L2 against the float64 reference on one image of the batch. Peak memory
counts what a forward and backward allocate beyond the tensors that they are given and return. Peers
that are not installed, or lack a shape or dtype, have no figures. deformops tunes each shape at its
first call, for minutes: name it to have it measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deformnd import bench
from deformnd.bench import SHAPES, Problem, Shape, relative
from deformnd.kernels import reference

SCALING = {f"big, batch {b}": SHAPES["big"]._replace(batch=b) for b in (1, 2, 4, 16, 32)}

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def timed(peer: str, problem: Problem) -> tuple[float, float]:
    """Milliseconds of a forward and of a backward."""
    calls = {phase: bench.prepare(peer, problem, phase, 1) for phase in bench.PHASES}
    for call in calls.values():  # Kernels are compiled on all cores.
        call()
    with bench.one_core():
        times = bench.gpu_rounds(calls, rep=60)
    return statistics.median(times["forward"]), statistics.median(times["backward"])


def peak(
    call: Callable[[tuple[Tensor, ...]], Tensor], tensors: tuple[Tensor, ...], grad: Tensor
) -> float:
    """MiB that a forward and backward hold at most beyond inputs, output and gradients."""
    leaves = tuple(t.detach().requires_grad_() for t in tensors)
    forward = bench.gpu_peak(lambda: call(leaves))
    y = call(leaves)
    backward = bench.gpu_peak(lambda: torch.autograd.grad(y, leaves, grad, allow_unused=True))
    return max(forward, backward)


def errors(problem: Problem) -> dict[str, float]:
    """Relative L2 errors of output and gradients on the first image."""
    x, weight, offset, mask, bias = problem.tensors()
    leaves = tuple(
        t.detach().clone().requires_grad_() for t in (x[:1], weight, offset[:1], mask[:1], bias)
    )
    y = problem.deform(leaves)
    grads = torch.autograd.grad(y, leaves[:4], problem.grad[:1])
    exact = problem.exact()
    image, points, *rest = exact.kernel_backward(reference)
    by_input = points if problem.shape.transposed else image
    wanted = (exact.kernel(reference), by_input, *rest[:3])
    names = ("output", "input", "weight", "offset", "mask")
    return {
        key: relative(a.detach(), b)
        for key, a, b in zip(names, (y, *grads), wanted, strict=True)
        if b is not None
    }


def measure(
    name: str,
    shape: Shape,
    dtype: str,
    channels_last: bool = False,
    peers: Sequence[str] | None = None,
) -> dict[str, Any]:
    """A row of figures; where `peers` is None, only the times of deformnd."""
    torch.cuda.empty_cache()
    problem = Problem(shape, DTYPES[dtype], "cuda", channels_last)
    row: dict[str, Any] = {
        "name": name,
        "dtype": dtype,
        "layout": "channels last" if channels_last else "channels first",
        "shape": shape._asdict(),
    }
    ours = problem.tensors()
    row["forward"], row["backward"] = timed("deformnd", problem)
    if peers is not None:
        torch.use_deterministic_algorithms(True)
        row["deterministic backward"] = timed("deformnd", problem)[1]
        torch.use_deterministic_algorithms(False)
        row["memory"] = peak(problem.deform, ours, problem.grad)
        row["errors"] = errors(problem)
        row["dense forward"], row["dense backward"] = timed("dense", problem)
        if dtype == "float32":
            # In the run with TF32 off, this is the time that cuDNN takes for the same accuracy.
            row["dense is IEEE"] = not torch.backends.cudnn.allow_tf32
        for peer in peers:
            if not bench.fits(peer, problem, "forward"):
                continue
            with contextlib.suppress(NotImplementedError):  # torch may lack a kernel for a dtype.
                row[f"{peer} forward"], row[f"{peer} backward"] = timed(peer, problem)
                row[f"{peer} memory"] = peak(getattr(problem, peer), ours, problem.grad)
        if name == "tiny":
            named = {"": "deformnd"}
            if "torchvision forward" in row:
                named["torchvision "] = "torchvision"
            for key, peer in named.items():
                for phase in bench.PHASES:
                    call = bench.prepare(peer, problem, phase, 1)
                    with bench.one_core():
                        row[f"{key}host {phase}"] = bench.host_us(call, 100)
    return row


def show(row: dict[str, Any]) -> str:
    def number(key: str) -> str:
        return f"{row[key]:8.3f}" if key in row else "       -"

    def ratio(peer: str, mine: str) -> str:
        return f"{row[peer] / row[mine]:5.1f}x" if peer in row else "     -"

    worst = max(row["errors"].values()) if "errors" in row else math.nan
    first = row["errors"]["output"] if "errors" in row else math.nan
    layout = "" if row["layout"] == "channels first" else ", last"
    return (
        f"{row['name'] + layout:16} {row['dtype']:9}"
        f" {number('forward')} {ratio('torchvision forward', 'forward')}"
        f" {ratio('dense forward', 'forward')}"
        f" {number('backward')} {ratio('torchvision backward', 'backward')}"
        f" {ratio('dense backward', 'backward')}"
        f" {number('deterministic backward')}"
        f" {row.get('memory', math.nan):7.1f} {row.get('torchvision memory', math.nan):7.1f}"
        f" {first:.1e} {worst:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="write all rows to this JSON file")
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES))
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--peers", nargs="*", default=["torchvision", "tvdcn"])
    parser.add_argument("--quick", action="store_true", help="no scaling, no channels last")
    args = parser.parse_args()

    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    peers = [peer for peer in args.peers if bench.has(peer)]
    rows: list[dict[str, Any]] = []
    report = {
        "device": torch.cuda.get_device_name(),
        **bench.versions(peers),
        "command": " ".join(["python benchmarks/gpu.py", *sys.argv[1:]]),
        "rows": rows,
    }

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(show(row), flush=True)
        if args.out:
            with open(args.out, "w") as file:
                json.dump(report, file, indent=1)
                file.write("\n")

    print(
        "shape            dtype      forward    tv  dense backward    tv  dense  determ.  "
        "MiB  tv MiB output worst error"
    )
    for dtype in args.dtypes:
        for name in args.shapes:
            add(measure(name, SHAPES[name], dtype, peers=peers))
    if not args.quick:
        for name in ("big", "r50c4", "b64", "edvr"):
            add(measure(name, SHAPES[name], "float16", channels_last=True, peers=peers))
        for name, shape in SCALING.items():
            add(measure(name, shape, "float16"))


if __name__ == "__main__":
    main()
