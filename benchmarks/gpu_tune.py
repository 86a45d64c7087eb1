"""Times other rows for the tables in kernels/gpu/tiles.py, in the calls that use them.

    python benchmarks/gpu_tune.py forward_hopper block_o=128,256 stages=2,3 --shapes big r50c4
    python benchmarks/gpu_tune.py "backward_atomic narrow" block_p=32,64 warps=4,8 --dtypes float32

For every shape and dtype the row that the tables give for the operation takes each combination of
the values in turn; what the GPU's profiler then says of the call's kernels is printed, fastest
first. Operations are those of tiles.py.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tqdm import tqdm

from deformnd.bench import SHAPES, Problem
from deformnd.kernels import gpu
from deformnd.kernels.gpu import tiles, variants

Choice = dict[str, int]


def choices(given: list[str]) -> list[Choice]:
    """['a=1,2', 'b=3'] -> [{a: 1, b: 3}, {a: 2, b: 3}]."""
    fields = [text.split("=") for text in given]
    values = [[int(v) for v in several.split(",")] for _, several in fields]
    return [
        dict(zip([name for name, _ in fields], c, strict=True)) for c in itertools.product(*values)
    ]


def changed(find: Callable[..., Any], operation: str, choice: Choice) -> Callable[..., Any]:
    """A table's lookup, with other values in the rows of the operation."""

    def lookup(*key: Any) -> Any:
        row = find(*key)
        return dataclasses.replace(row, **choice) if row.operation == operation else row

    return lookup


def forget() -> None:
    """Drop what was made with other rows."""
    gpu._PLANS.clear()
    variants.BROKEN.clear()


def calls(problem: Problem) -> Iterator[Callable[[], Any]]:
    """A forward and a backward."""
    tensors = problem.tensors()
    yield lambda: problem.deform(tensors)
    leaves = tuple(t.detach().requires_grad_() for t in tensors)
    y = problem.deform(leaves)
    yield lambda: torch.autograd.grad(y, leaves, problem.grad, retain_graph=True)


def kernel_us(call: Callable[[], Any], count: int = 10) -> dict[str, float]:
    """Microseconds of each kernel in a call."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(count):
            call()
        torch.cuda.synchronize()
    total: dict[str, float] = collections.defaultdict(float)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            total[event.name] += event.device_time / count
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("operation")
    parser.add_argument("values", nargs="+", help="field=value,value ...")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="*", default=["float16", "float32"])
    args = parser.parse_args()
    find = tiles.find
    kernel = args.operation.split()[0]
    torch.backends.cudnn.allow_tf32 = False
    for name, dtype in itertools.product(args.shapes, args.dtypes):
        found = []
        for choice in tqdm(choices(args.values), desc=f"{name} {dtype}", disable=None):
            tiles.find = changed(find, args.operation, choice)
            forget()
            try:
                problem = Problem(SHAPES[name], getattr(torch, dtype), "cuda")
                times = collections.Counter()
                for call in calls(problem):
                    times.update(kernel_us(call))
            except RuntimeError as failure:  # It does not compile, or needs too much memory.
                print(name, dtype, choice, str(failure)[:200], flush=True)
                continue
            if kernel in times:
                found.append((times[kernel], sum(times.values()), choice))
        for us, total, choice in sorted(found, key=lambda f: f[0]):
            print(f"{name} {dtype} {kernel} {us:.1f} us of {total:.1f}: {choice}", flush=True)
    tiles.find = find
    forget()


if __name__ == "__main__":
    main()
