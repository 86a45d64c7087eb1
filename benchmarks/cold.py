"""How long training waits for the GPU kernels to be compiled, or loaded from the disk.

    python benchmarks/cold.py [--out benchmarks/results/cold_h200.json] [--ranks 1 2 3] ...

A network of two packed layers (64 to 128 channels, then 128 to 128 in 8 offset groups, 3 kernel
points along each axis), or with `--layers` of one of them, is trained for 24 steps, each with a
batch of other images: random sizes, one to four at once. It runs in two fresh processes, the first
with an empty disk cache, the second with what the first has left there. Of every step stand the
seconds that forward and backward take, how many kernels Triton compiled and how many came to be
loaded.

`ordinary` are the seconds that the same step takes right before with ordinary convolutions instead,
whose first step starts CUDA and cuDNN. float16 and bfloat16 are autocast of float32 parameters,
float32 is without autocast and without TF32. `portable` leaves out the kernels for Hopper. On a CPU
nothing is compiled: that run only shows that the script works.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deformnd
from deformnd import bench

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

# The least and the greatest length of an image along each axis, by rank.
LENGTHS = {1: (500, 8000), 2: (32, 160), 3: (6, 24)}

Step = dict[str, Any]


def images(rank: int, count: int) -> list[tuple[int, ...]]:
    """The batch and the size of each step's images, the same in every run."""
    rng = random.Random(0)
    return [
        (rng.randint(1, 4), *(rng.randint(*LENGTHS[rank]) for _ in range(rank)))
        for _ in range(count)
    ]


def kernels() -> tuple[int, int]:
    """How many kernels the disk cache has by now, and how many this process has loaded."""
    if not torch.cuda.is_available():
        return 0, 0
    from deformnd.kernels.gpu import runtime

    # Triton writes such a file, which lists the others, for each kernel that it compiles.
    groups = Path(os.environ["TRITON_CACHE_DIR"]).glob("*/__grp__*")
    return len(list(groups)), len(runtime._LOADED)


# The layers, by their numbers.
LAYERS = {
    1: {"in_channels": 64},
    2: {"in_channels": 128, "offset_groups": 8, "mask_groups": 8},
}


def network(rank: int, numbers: Sequence[int], device: str) -> nn.Sequential:
    layer = getattr(deformnd, f"PackedDeformConv{rank}d")
    torch.manual_seed(0)
    layers = [
        layer(out_channels=128, kernel_size=3, padding=1, modulated=True, **LAYERS[number])
        for number in numbers
    ]
    return nn.Sequential(*layers).to(device)


def ordinary(layers: nn.Sequential, x: Tensor) -> Tensor:
    """The network with its generators, and ordinary convolutions with the same weights."""
    total = x.new_zeros(())
    for layer in layers:
        total = total + layer.offset_generator(x).sum() + layer.mask_generator(x).sum()
        convolution = getattr(F, f"conv{x.dim() - 2}d")
        x = convolution(x, layer.weight, layer.bias, padding=1)
    return total + x.sum()


def clock(device: str) -> float:
    """Seconds, when the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(loss: Callable[[], Tensor], device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of a forward and of a backward."""
    half = dtype != torch.float32
    start = clock(device)
    with torch.autocast(device, dtype) if half else nullcontext():
        value = loss()
    middle = clock(device)
    value.backward()
    return middle - start, clock(device) - middle


def train(
    rank: int, dtype: torch.dtype, device: str, count: int, numbers: Sequence[int]
) -> list[Step]:
    """Train in this process, which must not have run a kernel yet."""
    torch.backends.cudnn.allow_tf32 = False
    layers, channels = network(rank, numbers, device), LAYERS[numbers[0]]["in_channels"]
    steps = []
    for batch, *size in images(rank, count):
        x = torch.randn(batch, channels, *size, device=device, requires_grad=True)
        plain = timed(lambda x=x: ordinary(layers, x), device, dtype)
        before = kernels()
        forward, backward = timed(lambda x=x: layers(x).sum(), device, dtype)
        compiled, loaded = (b - a for a, b in zip(before, kernels(), strict=True))
        steps.append(
            {
                "batch": batch,
                "size": size,
                "ordinary": sum(plain),
                "forward": forward,
                "backward": backward,
                "compiled": compiled,
                "loaded": loaded,
            }
        )
        layers.zero_grad()
    return steps


def in_fresh_process(cache: str, *arguments: Any) -> list[Step]:
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    environment = {**os.environ, "TRITON_CACHE_DIR": cache}
    child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    steps: list[Step] = json.loads(child.stdout.splitlines()[-1])
    return steps


def measure(
    rank: int, dtype: str, variants: str, device: str, count: int, layers: str
) -> list[dict[str, Any]]:
    """A row with an empty disk cache and one with what that left."""
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for state in ("empty", "filled"):
            steps = in_fresh_process(cache, rank, dtype, variants, device, count, layers)
            row = {"rank": rank, "layers": layers, "dtype": dtype, "kernels": variants}
            rows.append({**row, "cache": state, "steps": steps})
    return rows


def show(row: dict[str, Any]) -> str:
    """A line: the first step, then the slowest of the others and the kernels of all others."""
    seconds = [step["forward"] + step["backward"] for step in row["steps"]]
    first, *others = row["steps"]
    return (
        f"{row['rank']}-D {row['layers']:2} {row['dtype']:8} {row['kernels']:8} {row['cache']:6}"
        f" {first['forward']:8.3f} {first['backward']:8.3f} {seconds[0]:8.3f}"
        f" {first['compiled']:8} {first['loaded']:6}"
        f" {max(seconds[1:], default=0):8.3f} {sum(step['compiled'] for step in others):8}"
        f" {sum(step['compiled'] > 0 for step in others):5}"
        f" {sum(step['loaded'] for step in others):6}"
    )


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hopper = device == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    variants = ["hopper", "portable"] if hopper else ["portable"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="write all rows to this JSON file")
    parser.add_argument("--ranks", nargs="*", type=int, default=[2], choices=LENGTHS)
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--kernels", nargs="*", default=variants, choices=variants)
    parser.add_argument("--device", default=device, choices=["cuda", "cpu"])
    parser.add_argument("--layers", nargs="*", default=["12"], choices=["1", "2", "12"],
                        help="those of a network: one, the other, both")  # fmt: skip
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        rank, dtype, chosen, place, count, layers = args.child
        if chosen == "portable" and place == "cuda":
            bench.without_hopper()
        numbers = [int(digit) for digit in layers]
        print(json.dumps(train(int(rank), DTYPES[dtype], place, int(count), numbers)))
        return
    if args.device == "cpu":
        print("On a CPU nothing is compiled: these seconds are those of the steps alone.")
    rows: list[dict[str, Any]] = []
    report = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else bench.processor(),
        "cores": os.cpu_count(),  # Kernels are compiled on all of them, side by side.
        **bench.versions(()),
        "command": " ".join(["python", "benchmarks/cold.py", *sys.argv[1:]]),
        "rows": rows,
    }
    print(f"{'':31}first step{'':34}other steps")
    print(f"{'':31}forward backward      all compiled loaded  slowest compiled    in loaded")
    for case in itertools.product(args.ranks, args.layers, args.dtypes, args.kernels):
        rank, layers, dtype, chosen = case
        for row in measure(rank, dtype, chosen, args.device, args.steps, layers):
            rows.append(row)
            print(show(row), flush=True)
            if args.out:
                Path(args.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
