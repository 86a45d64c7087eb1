"""deformnd beside torchvision and the dense convolution on a GPU: time, memory, error.

    python benchmarks/gpu.py [--out benchmarks/results/gpu_h200.json] [--dtypes float16 ...]

Times are medians of triton.testing.do_bench, through the public functions, with NCHW tensors
unless said. `dense` is torch's own convolution of the same sizes (cuDNN, channels last,
benchmark mode), the practical limit. Errors are relative L2 against the float64 reference on one
image of the batch. Peak memory counts what a forward and backward allocate beyond the tensors
that they are given and return.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import deformnd
from deformnd.kernels import reference
from deformnd.kernels.geometry import conv_geometry, conv_transpose_geometry


class Shape(NamedTuple):
    batch: int
    channels: int  # of the input
    size: tuple[int, ...]
    out_channels: int
    kernel: int
    offset_groups: int = 1
    stride: tuple[int, ...] | int = 1
    padding: int = -1  # -1: half the kernel
    dilation: tuple[int, ...] | int = 1
    groups: int = 1
    transposed: bool = False


SHAPES = {
    "big": Shape(8, 256, (128, 128), 256, 3),
    "r50c3": Shape(2, 128, (100, 168), 128, 3),
    "r50c4": Shape(2, 256, (50, 84), 256, 3),
    "r50c5": Shape(2, 512, (25, 42), 512, 3),
    "b64": Shape(16, 64, (128, 128), 64, 3),
    "bvsr": Shape(1, 64, (180, 320), 64, 3, 16),
    "edvr": Shape(4, 128, (128, 128), 128, 3, 8),
    "k7": Shape(1, 256, (64, 64), 256, 7),
    "conv3d": Shape(1, 64, (7, 32, 32), 64, 3),
    "conv1d": Shape(16, 512, (128,), 512, 16, padding=22, dilation=3),
    "up2d": Shape(4, 256, (64, 64), 128, 4, stride=2, padding=1, transposed=True),
    "tiny": Shape(1, 4, (32, 32), 2, 5, stride=(1, 2), padding=2, dilation=(1, 2), groups=2),
}
SCALING = {f"big, batch {b}": SHAPES["big"]._replace(batch=b) for b in (1, 2, 4, 16, 32)}

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class Problem:
    """The tensors of a shape, and the calls that are timed."""

    def __init__(self, shape: Shape, dtype: torch.dtype, channels_last: bool = False) -> None:
        torch.manual_seed(0)
        n = len(shape.size)
        self.shape, self.n = shape, n

        def every(value: tuple[int, ...] | int) -> tuple[int, ...]:
            return (value,) * n if isinstance(value, int) else value

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, device="cuda").to(dtype)

        padding = shape.kernel // 2 if shape.padding < 0 else shape.padding
        self.parameters: dict[str, Any] = {
            "stride": every(shape.stride),
            "padding": every(padding),
            "dilation": every(shape.dilation),
            "groups": shape.groups,
        }
        taps = shape.kernel**n
        self.input = randn(shape.batch, shape.channels, *shape.size)
        ends = (shape.out_channels, shape.channels)
        rows, columns = ends[::-1] if shape.transposed else ends
        self.weight = randn(rows, columns // shape.groups, *(shape.kernel,) * n)
        self.weight /= math.sqrt(shape.channels / shape.groups * taps)
        if channels_last:
            form = {2: torch.channels_last, 3: torch.channels_last_3d}[n]
            self.input = self.input.to(memory_format=form)
        self.bias = randn(shape.out_channels)
        if shape.transposed:
            point_size = shape.size
        else:
            point_size = tuple(
                (s + 2 * p - d * (shape.kernel - 1) - 1) // t + 1
                for s, p, d, t in zip(
                    shape.size, every(padding), every(shape.dilation), every(shape.stride),
                    strict=True,
                )
            )  # fmt: skip
        groups = shape.offset_groups
        self.offset = 2 * randn(shape.batch, groups * taps * n, *point_size)
        self.mask = torch.rand(shape.batch, groups * taps, *point_size, device="cuda").to(dtype)
        with torch.no_grad():
            self.grad = torch.randn_like(self.deform())

    def tensors(self) -> tuple[Tensor, ...]:
        return self.input, self.weight, self.offset, self.mask, self.bias

    def deform(self, tensors: tuple[Tensor, ...] | None = None) -> Tensor:
        kind = "deform_conv_transpose" if self.shape.transposed else "deform_conv"
        function = getattr(deformnd, f"{kind}{self.n}d")
        result: Tensor = function(*(tensors or self.tensors()), **self.parameters)
        return result

    def torchvision(self, tensors: tuple[Tensor, ...] | None = None) -> Tensor:
        import torchvision

        x, weight, offset, mask, bias = tensors or self.tensors()
        p = {k: v for k, v in self.parameters.items() if k != "groups"}
        result: Tensor = torchvision.ops.deform_conv2d(x, offset, weight, bias, mask=mask, **p)
        return result

    def dense(self, tensors: tuple[Tensor, ...] | None = None) -> Tensor:
        x, weight, _, _, bias = tensors or self.tensors()
        kind = "conv_transpose" if self.shape.transposed else "conv"
        result: Tensor = getattr(F, f"{kind}{self.n}d")(x, weight, bias, **self.parameters)
        return result

    def last(self) -> tuple[Tensor, ...]:
        """The tensors as cuDNN likes them."""
        x, weight, *rest = self.tensors()
        if self.n > 1:
            form = {2: torch.channels_last, 3: torch.channels_last_3d}[self.n]
            x, weight = x.to(memory_format=form), weight.to(memory_format=form)
        return (x, weight, *rest)


def median_ms(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    result: float = do_bench(call, warmup=10, rep=60, return_mode="median")
    return result


def timed(
    call: Callable[[tuple[Tensor, ...]], Tensor], tensors: tuple[Tensor, ...], grad: Tensor
) -> tuple[float, float]:
    """Milliseconds of a forward and of a backward."""
    with torch.no_grad():
        forward = median_ms(lambda: call(tensors))
    leaves = tuple(t.detach().requires_grad_() for t in tensors)
    y = call(leaves)
    wanted = [t for t in leaves if y.grad_fn is not None]
    backward = median_ms(
        lambda: torch.autograd.grad(y, wanted, grad, retain_graph=True, allow_unused=True)
    )
    return forward, backward


def peak(
    call: Callable[[tuple[Tensor, ...]], Tensor], tensors: tuple[Tensor, ...], grad: Tensor
) -> float:
    """MiB that a forward and backward hold at most beyond inputs, output and gradients."""
    leaves = tuple(t.detach().requires_grad_() for t in tensors)
    most = 0.0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = call(leaves)
    most = torch.cuda.max_memory_allocated() - before - y.nbytes
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    grads = torch.autograd.grad(y, leaves, grad, allow_unused=True)
    own = sum(t.nbytes for t in grads if t is not None)
    most = max(most, torch.cuda.max_memory_allocated() - before - own)
    return most / 2**20


def host_us(call: Callable[[], Any]) -> float:
    """Microseconds that the host needs to issue a call (best of five)."""
    best = math.inf
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            call()
        best = min(best, (time.perf_counter() - start) / 100)
        torch.cuda.synchronize()
    return best * 1e6


def errors(problem: Problem) -> dict[str, float]:
    """Relative L2 errors of output and gradients on the first image."""
    shape = problem.shape
    x, weight, offset, mask, bias = problem.tensors()
    x, offset, mask, grad = x[:1], offset[:1], mask[:1], problem.grad[:1]
    leaves = tuple(t.detach().clone().requires_grad_() for t in (x, weight, offset, mask, bias))
    y = problem.deform(leaves)
    grads = torch.autograd.grad(y, leaves[:4], grad)
    d = [t.detach().double() for t in (x, weight, offset, mask, bias)]
    p = problem.parameters
    rest = (p["dilation"], p["groups"])
    if shape.transposed:
        zero = (0,) * problem.n
        g = conv_transpose_geometry(*d, p["stride"], p["padding"], zero, *rest)
        want = reference.scatter(g, *d)
        image, points, needs = grad.double(), d[0], (False, True, True, True, True)
    else:
        g = conv_geometry(*d, p["stride"], p["padding"], *rest)
        want = reference.gather(g, *d)
        image, points, needs = d[0], grad.double(), (True, False, True, True, True)
    found = reference.gradients(g, image, points, *d[1:4], needs)
    wanted = [want, found[int(shape.transposed)], *found[2:]]

    def error(a: Tensor, b: Tensor | None) -> float:
        assert b is not None
        return float((a.double() - b).norm() / b.norm())

    names = ("output", "input", "weight", "offset", "mask")
    return {k: error(a, b) for k, a, b in zip(names, (y, *grads), wanted, strict=True)}


def measure(
    name: str, shape: Shape, dtype: str, channels_last: bool = False, light: bool = False
) -> dict[str, Any]:
    torch.cuda.empty_cache()
    problem = Problem(shape, DTYPES[dtype], channels_last)
    row: dict[str, Any] = {
        "name": name,
        "dtype": dtype,
        "layout": "channels last" if channels_last else "channels first",
        "shape": shape._asdict(),
    }
    ours = problem.tensors()
    row["forward"], row["backward"] = timed(problem.deform, ours, problem.grad)
    if not light:
        torch.use_deterministic_algorithms(True)
        row["deterministic backward"] = timed(problem.deform, ours, problem.grad)[1]
        torch.use_deterministic_algorithms(False)
        row["memory"] = peak(problem.deform, ours, problem.grad)
        row["errors"] = errors(problem)
        last = problem.last()
        grad = problem.grad
        if problem.n > 1:
            form = {2: torch.channels_last, 3: torch.channels_last_3d}[problem.n]
            grad = grad.contiguous(memory_format=form)
        row["dense forward"], row["dense backward"] = timed(problem.dense, last, grad)
        if dtype == "float32":
            # In the run with TF32 off, what cuDNN takes for the same accuracy.
            row["dense is IEEE"] = not torch.backends.cudnn.allow_tf32
        if problem.n == 2 and not shape.transposed and dtype != "bfloat16":
            row["torchvision forward"], row["torchvision backward"] = timed(
                problem.torchvision, ours, problem.grad
            )
            row["torchvision memory"] = peak(problem.torchvision, ours, problem.grad)
        if name == "tiny":
            calls = {"": problem.deform, "torchvision ": problem.torchvision}
            if dtype == "bfloat16":  # torchvision has none
                del calls["torchvision "]
            for key, call in calls.items():
                with torch.no_grad():
                    row[key + "host forward"] = host_us(call)
                leaves = tuple(t.detach().requires_grad_() for t in ours)
                y = call(leaves)
                row[key + "host backward"] = host_us(
                    lambda y=y, leaves=leaves: torch.autograd.grad(
                        y, leaves, problem.grad, retain_graph=True
                    )
                )
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
    parser.add_argument("--quick", action="store_true", help="no scaling, no channels last")
    args = parser.parse_args()
    import torchvision
    import triton

    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    rows: list[dict[str, Any]] = []
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "torchvision": torchvision.__version__,
        "command": "python benchmarks/gpu.py",
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
            add(measure(name, SHAPES[name], dtype))
    if not args.quick:
        for name in ("big", "r50c4", "b64", "edvr"):
            add(measure(name, SHAPES[name], "float16", channels_last=True))
        for name, shape in SCALING.items():
            add(measure(name, shape, "float16", light=True))


if __name__ == "__main__":
    main()
