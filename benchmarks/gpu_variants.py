"""Whether a call's operations go by their fastest variants, on layers that nobody chose.

    python benchmarks/gpu_variants.py FILE [--layers 60] [--seed 0] [--portable]

It times each forward and backward as it is, and again with one operation done by another variant
that is able to do it (kernels/gpu/strategy.py), or with the image's gradient added up in the other
way, by sorted lists or by atomic additions. It prints how much slower calls are than with their
fastest variants, and which other ones would be faster. FILE has the times of all of them.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm

from deformnd import bench, sweep
from deformnd.bench import Problem, Shape
from deformnd.kernels import gpu
from deformnd.kernels.gpu import hopper, im2col, strategy, variants
from deformnd.kernels.gpu.layout import Call
from deformnd.kernels.gpu.variants import Variant

KINDS = {name: getattr(strategy, name) for name in ("FORWARD", "ATOMIC", "WEIGHT")}
NARROW = hopper.BACKWARD_NARROW  # takes the place of two of them
FASTER = 0.97  # of the time of the chosen one

Row = dict[str, Any]


def able(variant: Variant, call: Call) -> bool:
    """Whether it can do a call that it may leave to a variant which should be faster."""
    if variant.name == "forward_im2col":
        return im2col.group_columns(call) > 0
    if variant.name == "forward_product_hopper":
        return call.suits_hopper and im2col.is_one_matrix(call)
    if variant.name in ("backward_weight_im2col", "backward_atomic_im2col"):
        return im2col.is_one_matrix(call)
    if variant.name == "forward_narrow_hopper":
        return hopper.narrow.takes(call)
    return variant.takes(call)


def timed(run: Callable[[], Any]) -> tuple[float, dict[str, tuple[Call, str]], bool | None]:
    """Milliseconds of a call; for each kind of operation the call and its variant; and whether the
    image's gradient came from lists, or None if there was none."""
    found: dict[str, tuple[Call, str]] = {}
    lists: list[bool] = []
    write, by_sorting = variants.write, strategy._by_sorting

    def seen(kind: Any, call: Call, *args: Any) -> None:
        for name, every in (*KINDS.items(), ("NARROW", NARROW)):
            if kind is every and not call.steps.other:
                found[name] = call, (variants.choose(kind, call) or kind[-1]).name
        write(kind, call, *args)

    def sorts(call: Call) -> bool:
        choice = by_sorting(call)
        if not call.steps.other:
            lists.append(choice)
        return choice

    gpu._PLANS.clear()
    with (
        mock.patch.object(variants, "write", seen),
        mock.patch.object(strategy, "_by_sorting", sorts),
    ):
        run()
    return round(bench.device_ms(run, 9), 6), found, lists[-1] if lists else None


def ways(run: Callable[[], Any]) -> Row:
    """The times of a call as it is and in all other ways."""
    usual, found, lists = timed(run)
    row: Row = {"chosen": {k: name for k, (_, name) in found.items()}, "ms": usual, "others": {}}
    others = row["others"]

    def other(name: str, patch: Any) -> None:
        with patch:
            others[name] = timed(run)[0]

    if "NARROW" in found:
        _, chosen = found.pop("NARROW")
        other(f"two kernels for {chosen}", mock.patch.object(hopper, "BACKWARD_NARROW", ()))
    for kind, (call, chosen) in found.items():
        for variant in {v.name: v for v in reversed(KINDS[kind])}.values():
            if variant.name != chosen and "small" not in variant.name and able(variant, call):
                forced = (variant._replace(takes=lambda call: True),)
                other(f"{variant.name} for {chosen}", mock.patch.object(strategy, kind, forced))
    if lists is not None:
        by_sorting = strategy._by_sorting
        name = "atomic additions for lists" if lists else "lists for atomic additions"
        other(name, mock.patch.object(strategy, "_by_sorting", lambda c: not by_sorting(c)))
    return row


def rows(layers: Sequence[Shape], dtypes: Sequence[str]) -> Iterator[Row]:
    for shape in tqdm(layers, unit="layer", disable=None):
        for dtype in dtypes:
            problem = Problem(shape, getattr(torch, dtype), "cuda")
            for phase, kernel in (
                ("forward", problem.kernel),
                ("backward", problem.kernel_backward),
            ):
                run = functools.partial(kernel, gpu)
                yield dict(layer=sweep.describe(shape), dtype=dtype, phase=phase, **ways(run))
            torch.cuda.empty_cache()


def summary(report: list[Row]) -> str:
    """How much slower the chosen variants are, and which others would be faster."""
    lines = []
    by_kind: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in report:
        by_kind[row["phase"], row["dtype"]].append(row)
    for kind, same in by_kind.items():
        slower = [
            row["ms"] / min(row["ms"], *row["others"].values()) for row in same if row["others"]
        ]
        if slower:
            mean = bench.mean(slower)
            lines.append(f"{' '.join(kind)}: {len(slower)} calls, {mean:.3f} times the fastest")
        better: dict[str, list[tuple[float, str]]] = defaultdict(list)
        for row in same:
            for name, ms in row["others"].items():
                if ms < FASTER * row["ms"]:
                    better[name].append((ms / row["ms"], row["layer"]))
        for name, layers in sorted(better.items()):
            lines.append(f"  {name}")
            lines += [f"    {ratio:.2f} {layer}" for ratio, layer in sorted(layers)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="JSON file to write")
    parser.add_argument("--layers", type=int, default=60, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the random layers")
    parser.add_argument("--dtypes", nargs="*", default=["float16", "float32"])
    parser.add_argument("--portable", action="store_true", help="without the kernels for Hopper")
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    if args.portable:
        bench.without_hopper()
    report: Row = {"device": torch.cuda.get_device_name(), **bench.versions(), "rows": []}
    report |= {"seed": args.seed, "portable": args.portable}
    layers = sweep.draw(args.layers, args.seed, sweep.SAMPLES["cuda"] // 2)
    for row in rows(layers, args.dtypes):
        report["rows"].append(row)
        args.file.write_text(json.dumps(report).replace('{"layer"', '\n{"layer"') + "\n")
    print(summary(report["rows"]))


if __name__ == "__main__":
    main()
