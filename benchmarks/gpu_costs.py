"""Fits what units of the kernels' sums cost on a GPU (kernels/gpu/tiles.py, COSTS).

    python benchmarks/gpu_costs.py time costs.json --layers 100 --seed 1
    python benchmarks/gpu_costs.py fit costs.json [more.json ...]

`time` has each kernel of random layers (deformnd/sweep.py) split its sums into several numbers of
parts, and writes down how long the whole call takes on the device, with a cold second-level cache.
`fit` needs Triton, but no GPU. It searches for costs by which `Call.splits` loses least: the loss
of a call is how much slower its number of parts is than the best one that was timed. For each
kernel it prints the costs of the table and those that it found, with their mean losses.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm

from deformnd import bench, sweep
from deformnd.bench import Problem
from deformnd.kernels import gpu
from deformnd.kernels.gpu import tiles
from deformnd.kernels.gpu.layout import Call

FACTORS = (0.25, 0.5, 0.67, 0.8, 1.25, 1.5, 2, 3, 4)  # of the number of parts that is chosen
FEW = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16)
ROUNDS = 16  # no number of parts is timed that makes more programs for each multiprocessor
TRIES = 400  # costs that `fit` tries for a kernel

Row = dict[str, Any]


class Forced:
    """Call.splits, with some numbers of parts forced and the arguments written down."""

    def __init__(self) -> None:
        self.parts: dict[str, int] = {}  # by kernel
        self.seen: dict[str, Row] = {}  # what the last plan runs
        self.ambiguous: set[str] = set()  # kernels that this plan has with different arguments
        self.steps: Any = None  # of the last plan
        splits = Call.splits

        def forced(call: Call, kernel: str, *given: int, **more: Any) -> int:
            chosen = splits(call, kernel, *given, **more)
            if call.steps.other:  # These launches are only loaded.
                return chosen
            if call.steps is not self.steps:  # Plans that were made before are thrown away.
                self.steps = call.steps
                self.seen.clear()
                self.ambiguous.clear()
            row = dict(kernel=kernel, given=given, more=more, chosen=chosen)
            row |= dict(dtype=str(call.dtype)[6:], precision=call.precision)
            row |= dict(multiprocessors=call.multiprocessors)
            if self.seen.setdefault(kernel, row) != row:
                self.ambiguous.add(kernel)
            return min(self.parts.get(kernel, chosen), given[2])

        Call.splits = forced  # type: ignore[assignment]


def candidates(row: Row) -> list[int]:
    programs, _, units = row["given"]
    most = min(units, max(ROUNDS * row["multiprocessors"] // programs, row["chosen"]))
    numbers = {*FEW, *(round(row["chosen"] * f) for f in FACTORS)} - {0, row["chosen"]}
    return sorted(n for n in numbers if n <= most)


def timed(problem: Problem, forced: Forced) -> Iterator[Row]:
    """A row for each kernel of a forward and a backward."""
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: problem.kernel(gpu),
        "backward": lambda: problem.kernel_backward(gpu),
    }
    for phase, call in calls.items():

        def ms(parts: dict[str, int], call: Callable[[], Any] = call) -> float:
            forced.parts = parts
            gpu._PLANS.clear()
            call()
            return round(bench.device_ms(call, 9), 6)

        usual = ms({})
        rows = {k: row for k, row in forced.seen.items() if k not in forced.ambiguous}
        for kernel, row in rows.items():
            times = {n: ms({kernel: n}) for n in candidates(row)}
            if times:
                times[row["chosen"]] = usual
                yield {**row, "phase": phase, "ms": times}


def time(args: argparse.Namespace) -> None:
    torch.backends.cudnn.allow_tf32 = False
    if args.portable:
        bench.without_hopper()
    report: Row = {"device": torch.cuda.get_device_name(), **bench.versions(), "rows": []}
    layers = sweep.draw(args.layers, args.seed, sweep.SAMPLES["cuda"] // 2)
    forced = Forced()
    for shape in tqdm(layers, unit="layer", disable=None):
        for dtype in args.dtypes:
            problem = Problem(shape, getattr(torch, dtype), "cuda")
            about = dict(layer=sweep.describe(shape), portable=args.portable)
            report["rows"] += [{**about, **row} for row in timed(problem, forced)]
            torch.cuda.empty_cache()
        args.file.write_text(json.dumps(report).replace('{"layer"', '\n{"layer"') + "\n")


def loss(row: Row) -> float:
    """How much slower the number of parts that Call.splits chooses is than the best one, as a
    logarithm. Between two numbers that were timed, the time is interpolated."""
    call: Any = SimpleNamespace(
        multiprocessors=row["multiprocessors"],
        dtype=getattr(torch, row["dtype"]),
        precision=row["precision"],
        steps=SimpleNamespace(room=2),
    )
    chosen = Call.splits(call, row["kernel"], *row["given"], **row["more"])
    times = {int(n): math.log(ms) for n, ms in row["ms"].items()}
    below = max((n for n in times if n <= chosen), default=min(times))
    above = min((n for n in times if n >= chosen), default=max(times))
    share = math.log(chosen / below) / math.log(above / below) if above > below else 0.0
    return (1 - share) * times[below] + share * times[above] - min(times.values())


def fit(args: argparse.Namespace) -> None:
    by_kernel: dict[str, list[Row]] = defaultdict(list)
    for file in args.files:
        for row in json.loads(file.read_text())["rows"]:
            by_kernel[row["kernel"]].append(row)
    for kernel, rows in by_kernel.items():
        table = tiles.COSTS[kernel]
        print(f"{kernel}, {len(rows)} calls")
        for mean, (warps, alone, beside) in ((_mean(rows, table), table), _search(rows, table)):
            print(f"  {mean:.4f} Costs({warps}, {alone:.3g}, 1 / {1 / beside:.3g})")


def _mean(rows: Sequence[Row], costs: tiles.Costs) -> float:
    """The mean loss of a kernel's calls with these costs."""
    with mock.patch.dict(tiles.COSTS, {rows[0]["kernel"]: costs}):
        return sum(map(loss, rows)) / len(rows)


def _search(rows: Sequence[Row], table: tiles.Costs) -> tuple[float, tiles.Costs]:
    """The least mean loss, and its costs, among random ones near the best so far."""
    rng = random.Random(0)
    best = (_mean(rows, table), table)
    for _ in tqdm(range(TRIES), leave=False, disable=None):
        _, costs = best
        near = tiles.Costs(
            rng.choice([costs.warps, costs.warps, 8, 16, 24, 32, 48]),
            costs.alone * math.exp(rng.gauss(0, 0.3)),
            costs.beside * math.exp(rng.gauss(0, 0.3)),
        )
        best = min(best, (_mean(rows, near), near))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    timing = commands.add_parser("time")
    timing.add_argument("file", type=Path, help="JSON file to write")
    timing.add_argument("--layers", type=int, default=100, help="how many")
    timing.add_argument("--seed", type=int, default=0, help="of the random layers")
    timing.add_argument("--dtypes", nargs="*", default=["float16", "float32"])
    timing.add_argument("--portable", action="store_true", help="without the kernels for Hopper")
    timing.set_defaults(run=time)
    fitting = commands.add_parser("fit")
    fitting.add_argument("files", type=Path, nargs="+", help="JSON files of `time`")
    fitting.set_defaults(run=fit)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
