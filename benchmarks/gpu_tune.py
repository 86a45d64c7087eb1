"""Times tile sizes for the tables in kernels/triton/configs.py.

    python benchmarks/gpu_tune.py [operator ...] [--widths 2 4] [--shapes big ...]

For every kind of row and the shapes that would use it: compiles the candidates in parallel,
times each kernel alone, and prints the best by geometric mean over the shapes.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import math
import multiprocessing
import os
from typing import Any

import torch

from deformnd.kernels.geometry import Geometry
from deformnd.kernels.triton import compiled, configs, hopper, launch, layouts

SHAPES = {  # batch, image channels, size, point channels, kernel, groups of offset and mask
    "big": (8, 256, (128, 128), 256, 3, 1),
    "r50c3": (2, 128, (100, 168), 128, 3, 1),
    "r50c4": (2, 256, (50, 84), 256, 3, 1),
    "r50c5": (2, 512, (25, 42), 512, 3, 1),
    "b64": (16, 64, (128, 128), 64, 3, 1),
    "bvsr": (1, 64, (180, 320), 64, 3, 16),
    "edvr": (4, 128, (128, 128), 128, 3, 8),
    "k7": (1, 256, (64, 64), 256, 7, 1),
}
WARPS, STAGES = (4, 8), (1, 2, 3)
MULTIPROCESSORS = 132
CAPABILITY = 90


def geometry(name: str) -> Geometry:
    batch, image, size, points, k, groups = SHAPES[name]
    n = len(size)
    return Geometry(
        batch, image, points, 1, groups, groups, size, size, (k,) * n, (1,) * n, (k // 2,) * n,
        (1,) * n,
    )  # fmt: skip


def candidates(operator: str, width: int, bound: int) -> list[configs.Row]:
    half = width == 2
    grids: dict[str, tuple[tuple[int, ...], ...]] = {
        "gather": (
            (64, 128),
            tuple({min(256, bound), min(128, bound)}),
            (32, 64) if half else (16, 32),
        ),
        "gather narrow": ((32, 64, 128), tuple({min(128, bound)}), (16, 32, 64)),
        "spread": (
            (32, 64, 128),
            tuple({min(256, bound), 64} if half else {min(128, bound), 64}),
            (32, 64, 128) if half else (32, 64),
        ),
        "spread narrow": ((32, 64, 128), tuple({min(128, bound), 64}), (16, 32, 64)),
        "inverse": ((32, 64, 128), (32, 64), tuple({min(256, bound), min(128, bound), 64})),
        "weight": ((32, 64), tuple({min(256, bound), min(128, bound), 64}), (64, 128)),
        "weight narrow": ((32, 64, 128), tuple({min(128, bound), 64}), (32, 64)),
    }
    found = []
    for p, o, c, warps, stages in itertools.product(*grids[operator], WARPS, STAGES):
        lanes = {"inverse": 64 * c, "weight": o * c, "weight narrow": o * c}.get(
            operator, p * (c if operator.startswith("spread") else o)
        )
        if lanes // warps > 8192 or lanes // warps < 256:
            continue  # accumulators beyond the registers, or idle warps
        found.append(configs.Row(operator, width, configs.ANY, p, o, c, warps, stages))
    return found


def prepare(job: tuple[str, configs.Row]) -> tuple[Any, tuple[Any, ...]]:
    """The launch of a shape with a row, and the dtypes of its tensors."""
    name, row = job
    g = geometry(name)
    for value in (v for m in (launch, layouts, hopper) for v in vars(m).values()):
        if hasattr(value, "cache_clear") and value is not compiled._compile:
            value.cache_clear()
    configs.TABLE = (row, *BASE)
    dtype = torch.float32 if row.width == 4 else torch.float16
    precision = "split" if row.width == 4 else "native"
    weight = torch.bfloat16 if row.width == 4 else dtype
    single = torch.float32
    operator = row.operator.split()[0]
    if operator == "gather":
        made, splits = launch._gather_launch(g, row.width, precision, False, MULTIPROCESSORS)
        return made, (dtype, weight, dtype, dtype, dtype, single if splits > 1 else dtype)
    if operator == "spread":
        atomics = "narrow" in row.operator or row.width == 4
        made = launch._spread_launch(g, row.width, precision, True, atomics, True, MULTIPROCESSORS)
        return made, (dtype, dtype, weight, *(dtype,) * 4, single if atomics else None)
    if operator == "weight":
        made, _ = launch._weight_launch(g, row.width, precision, True, MULTIPROCESSORS)
        return made, (dtype, dtype, dtype, dtype, single)
    tile = configs.TILES[len(g.kernel)]
    tiles = math.prod(-(-s // t) for s, t in zip(g.image_size, tile, strict=True))
    made = launch._inverse_launch(g, row.width, precision, tiles, 1)
    return made, (dtype, weight, dtype, dtype, None, torch.int32, torch.int32, dtype)


BASE = configs.TABLE


def build(job: tuple[str, configs.Row]) -> str:
    from triton.backends.compiler import GPUTarget

    try:
        made, dtypes = prepare(job)
        made.compile(dtypes, GPUTarget("cuda", CAPABILITY, 32))
        return ""
    except Exception as failure:
        return f"{job}: {failure}"[:300]


class Data:
    """Tensors of a shape for every operator."""

    def __init__(self, name: str, width: int) -> None:
        torch.manual_seed(0)
        g = self.g = geometry(name)
        dtype = torch.float32 if width == 4 else torch.float16
        taps, units = math.prod(g.kernel), layouts.units_of(g)

        def randn(*size: int) -> torch.Tensor:
            return torch.randn(*size, device="cuda").to(dtype)

        self.image = randn(g.batch, math.prod(g.image_size), units.number * units.padded)
        self.points = randn(g.batch, math.prod(g.point_size), g.point_channels)
        weight = randn(g.point_channels, g.image_channels, *g.kernel)
        self.plain = weight
        self.weight = layouts.pack_weight(g, weight, width == 4)
        groups = max(g.offset_groups, 1)
        self.offset = 2 * randn(g.batch, groups * taps * len(g.kernel), *g.point_size)
        self.mask = randn(g.batch, groups * taps, *g.point_size)
        self.bias = randn(g.point_channels)
        self.entries: tuple[torch.Tensor, torch.Tensor] | None = None

    def lists(self) -> tuple[torch.Tensor, torch.Tensor]:
        """For the inverse gather with one segment."""
        if self.entries is None:
            g = self.g
            tiles = math.prod(
                -(-s // t) for s, t in zip(g.image_size, configs.TILES[len(g.kernel)], strict=True)
            )
            owners = g.batch * max(g.offset_groups, 1) * math.prod(g.kernel)
            positions = math.prod(g.point_size)
            counts = torch.zeros(owners * tiles, dtype=torch.int32, device="cuda")
            count, fill = launch._bucket_launches(g, tiles, False, 512)
            count(self.offset, counts, None, None)
            ends = torch.cumsum(counts, 0, dtype=torch.int32)
            most = owners * positions * 2 ** len(g.kernel)
            entries = torch.empty(most, dtype=torch.int32, device="cuda")
            fill(self.offset, counts, ends, entries)
            self.entries = ends, entries
        return self.entries

    def arguments(self, operator: str, made: Any, atomics: bool) -> tuple[Any, ...]:
        g = self.g

        def single(count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.float32, device="cuda")

        places = (self.offset, self.mask)
        if operator == "gather":
            splits = made.grid[1]
            if splits > 1:
                out = single(splits * self.points.numel())
            else:
                out = torch.empty_like(self.points)
            return (self.image, self.weight, *places, self.bias, out)
        if operator == "spread":
            grads = (torch.empty_like(self.offset), torch.empty_like(self.mask))
            image = single(self.image.numel()) if atomics else None
            return (self.image, self.points, self.weight, *places, *grads, image)
        if operator == "weight":
            parts = single(made.grid[2] * layouts.weights_of(g))
            return (self.image, self.points, *places, parts)
        out = torch.empty_like(self.image)
        return (self.points, self.weight, *places, None, *self.lists(), out)


def _leading(times: dict[tuple[int, ...], float], count: int) -> str:
    best = sorted(times.items(), key=lambda item: item[1])[:count]
    return "  ".join(f"{'/'.join(map(str, k))} {v:.4f}" for k, v in best)


HOPPER: dict[str, tuple[tuple[int, ...], ...]] = {  # block_o, block_c, warps, stages, programs
    "gather": ((256,), (32, 64), (4, 8), (2, 3), (0,)),
    "along": ((256,), (32, 64), (4, 8), (2, 3), (0,)),
    "outer": ((128, 256), (64,), (4, 8), (2, 3), (1, 2)),
}


def tune_hopper(shapes: list[str], operators: list[str], widths: list[int]) -> None:
    """The kernels of gluon.py, whose rows have fewer choices."""
    from triton.testing import do_bench

    torch.backends.cudnn.allow_tf32 = False
    for name, width in itertools.product(shapes, widths):
        g = geometry(name)
        if layouts.units_of(g).number > 1:
            continue
        data = Data(name, width)
        dtype = data.image.dtype
        grads = (torch.empty_like(data.offset), torch.empty_like(data.mask))
        places, out = (data.offset, data.mask), torch.empty_like(data.points)
        by_image = torch.zeros(data.image.numel(), device="cuda") if width == 4 else None
        call = layouts.Call.of(g, data.image, *places, data.plain)
        points = data.points.movedim(-1, 1)
        for operator in operators:
            if operator == "outer" and width == 2:
                continue
            found = {}
            for choice in itertools.product(*HOPPER[operator]):
                row = configs.HopperRow(operator, width, configs.ANY, *choice)
                configs.HOPPER = (row,)
                if operator == "gather":
                    hopper.gather_launch.cache_clear()
                    made, _ = hopper.gather_launch(g, dtype, False, 0)
                    tensors = (data.image, call.fragments("gather"), *places, data.bias, out)
                elif operator == "along":
                    hopper.along_launch.cache_clear()
                    made = hopper.along_launch(g, dtype, MULTIPROCESSORS)
                    packed = call.fragments("along")
                    tensors = (data.image, data.points, packed, *places, *grads, by_image)
                else:
                    hopper.outer_launch.cache_clear()
                    made = hopper.outer_launch(g, MULTIPROCESSORS)
                    parts = torch.empty(made.launch.grid[2], layouts.weights_of(g), device="cuda")
                    tensors = (data.image, call.factors(points), *places, parts)
                if made is None or not made(*tensors):
                    hopper.BROKEN.clear()
                    continue
                ms = do_bench(lambda: made(*tensors), warmup=3, rep=12, return_mode="median")  # noqa: B023
                found[choice] = ms
            print(name, "hopper", operator, width, _leading(found, 6), flush=True)


def main() -> None:
    from triton.testing import do_bench

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("operators", nargs="*", default=sorted({row.operator for row in BASE}))
    parser.add_argument("--widths", nargs="*", type=int, default=[2, 4])
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--hopper", action="store_true", help="the kernels of gluon.py only")
    args = parser.parse_args()
    if args.hopper:
        operators = [o for o in args.operators if o in HOPPER] or list(HOPPER)
        return tune_hopper(args.shapes, operators, args.widths)
    jobs = []
    for kind in BASE:
        if kind.operator not in args.operators or kind.width not in args.widths:
            continue
        below = max(
            (
                r.channels
                for r in BASE
                if (r.operator, r.width) == (kind.operator, kind.width)
                and r.channels < kind.channels
            ),
            default=0,
        )
        for name in args.shapes:
            g = geometry(name)
            units = layouts.units_of(g)
            if units.narrow != ("narrow" in kind.operator) and kind.operator != "inverse":
                continue
            channels = units.length if kind.operator == "inverse" else g.point_channels
            if not below < channels <= kind.channels:
                continue
            bound = 1 << (channels - 1).bit_length()
            jobs += [(kind, (name, row)) for row in candidates(kind.operator, kind.width, bound)]
    # Shapes share compiled kernels, so neighbours in this order go to one worker.
    order = sorted((job for _, job in jobs), key=lambda job: str(job[1]))
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        failures = [f for f in pool.map(build, order, chunksize=8) if f]
    print(len(jobs), "candidates,", len(failures), "do not compile", *failures[:3], flush=True)
    times: dict[Any, dict[str, dict[tuple[int, ...], float]]] = collections.defaultdict(dict)
    held: tuple[Any, Data] | None = None
    jobs.sort(key=lambda job: (job[1][0], job[0].width))
    for i, (kind, (name, row)) in enumerate(jobs):
        if held is None or held[0] != (name, row.width):
            held = None
            torch.cuda.empty_cache()
            held = ((name, row.width), Data(name, row.width))
        try:
            made, _ = prepare((name, row))
            operator = row.operator.split()[0]
            atomics = "narrow" in row.operator or row.width == 4
            arguments = held[1].arguments(operator, made, atomics)
            made(*arguments)
            ms = do_bench(lambda: made(*arguments), warmup=3, rep=12, return_mode="median")  # noqa: B023
        except Exception as failure:
            if "out of resource" in str(failure):
                continue
            print(name, row)
            raise
        key = (row.block_p, row.block_o, row.block_c, row.warps, row.stages)
        found = times[kind].setdefault(name, {})
        found[key] = ms
        if i + 1 == len(jobs) or jobs[i + 1][0] is not kind or jobs[i + 1][1][0] != name:
            print(name, kind.operator, kind.width, _leading(found, 6), flush=True)
    report = []
    for kind, by_shape in times.items():
        print(f"{kind.operator}, width {kind.width}, up to {kind.channels} channels")
        common = set.intersection(*(set(found) for found in by_shape.values()))
        means = {
            k: math.exp(sum(math.log(found[k]) for found in by_shape.values()) / len(by_shape))
            for k in common
        }
        print("  mean of", *by_shape, _leading(means, 4), flush=True)
        found_by_name = {n: {str(k): v for k, v in f.items()} for n, f in by_shape.items()}
        report.append({"kind": str(kind), "times": found_by_name})
    if "OUT" in os.environ:
        with open(os.path.join(os.environ["OUT"], "tune.json"), "w") as file:
            json.dump(report, file)


if __name__ == "__main__":
    main()
