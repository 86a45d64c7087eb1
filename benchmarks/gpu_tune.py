"""Times other rows for the tables in kernels/triton/configs.py, in the calls that use them.

    python benchmarks/gpu_tune.py gather block_o=128,256 stages=2,3 --shapes big r50c4
    python benchmarks/gpu_tune.py "spread narrow" block_p=32,64 warps=4,8 --dtypes float32

For every shape and dtype the row that the tables give for the operator takes each combination of
the values in turn; what the GPU's profiler then says of the call's kernels is printed, fastest
first. Operators are those of configs.py: gather, spread, inverse, weight (or narrow) of Triton's
kernels, and with --hopper gather, along, outer, inverse and the narrow ones of Gluon's.
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
from deformnd.kernels.triton import configs, hopper, launch, layouts

Choice = dict[str, int]


def choices(given: list[str]) -> list[Choice]:
    """['a=1,2', 'b=3'] -> [{a: 1, b: 3}, {a: 2, b: 3}]."""
    fields = [text.split("=") for text in given]
    values = [[int(v) for v in several.split(",")] for _, several in fields]
    return [
        dict(zip([name for name, _ in fields], c, strict=True)) for c in itertools.product(*values)
    ]


def changed(find: Callable[..., Any], operator: str, choice: Choice) -> Callable[..., Any]:
    """A table's lookup, with other values in the rows of the operator."""

    def lookup(*key: Any) -> Any:
        row = find(*key)
        mine = getattr(row, "operator", "inverse") == operator
        return dataclasses.replace(row, **choice) if mine else row

    return lookup


def forget() -> None:
    """Drop what was made with other rows."""
    for value in (v for m in (launch, layouts, hopper) for v in vars(m).values()):
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    launch._PLANS.clear()
    hopper.BROKEN.clear()


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
    parser.add_argument("operator")
    parser.add_argument("values", nargs="+", help="field=value,value ...")
    parser.add_argument("--hopper", action="store_true", help="a row of HOPPER or INVERSE")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="*", default=["float16", "float32"])
    args = parser.parse_args()
    table = "find"
    if args.hopper:
        table = "find_inverse" if args.operator == "inverse" else "find_hopper"
    find = getattr(configs, table)
    # Kernels of the narrow rows have their name in another form.
    kernel = args.operator.replace(" 3d", "").replace(" ", "_") if args.hopper else args.operator
    kernel = {"weight": "weight_gradient"}.get(kernel.split()[0], kernel.split()[0])
    torch.backends.cudnn.allow_tf32 = False
    for name, dtype in itertools.product(args.shapes, args.dtypes):
        found = []
        for choice in tqdm(choices(args.values), desc=f"{name} {dtype}", disable=None):
            setattr(configs, table, changed(find, args.operator, choice))
            forget()
            try:
                problem = Problem(SHAPES[name], getattr(torch, dtype), "cuda")
                times = collections.Counter()
                for call in calls(problem):
                    times.update(kernel_us(call))
            except RuntimeError as failure:  # does not compile, or does not fit
                print(name, dtype, choice, str(failure)[:200], flush=True)
                continue
            if kernel in times:
                found.append((times[kernel], sum(times.values()), choice))
        for us, total, choice in sorted(found, key=lambda f: f[0]):
            print(f"{name} {dtype} {kernel} {us:.1f} us of {total:.1f}: {choice}", flush=True)
    setattr(configs, table, find)
    forget()


if __name__ == "__main__":
    main()
