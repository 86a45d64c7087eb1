"""deform_attention beside its definition by grid_sample, and a study of it, on a GPU.

    python benchmarks/attention.py [--study FILE] [--out FILE] [--tune] [--dtypes float16 float32]

The shapes are those of Deformable DETR's encoder and decoder, and of a decoder of RT-DETR's.
Times are medians of triton.testing.do_bench, in rounds in turns. `study` are the kernels `rf` and
`rb` of a file, which are given the best of a few tiles for each shape. Errors are relative L2
against the float64 reference on one batch item: of the output, and of the gradients of value,
locations and weights. --tune times other rows of the tables in kernels/gpu/tiles.py instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from deformnd import bench, deform_attention
from deformnd.kernels import gpu, reference
from deformnd.kernels.geometry import attention_geometry
from deformnd.kernels.gpu import tiles


class Shape(NamedTuple):
    batch: int
    levels: tuple[tuple[int, int], ...]
    queries: int = 0  # 0 stands for one for each pixel
    heads: int = 8
    channels: int = 32
    points: int = 4


DETR = ((100, 134), (50, 67), (25, 34), (13, 17))
SHAPES = {
    "encoder": Shape(2, DETR),
    "decoder": Shape(2, DETR, 300),
    "RT-DETR decoder": Shape(8, ((80, 80), (40, 40), (20, 20)), 300),
}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
Call = Callable[[], Any]


def make(shape: Shape, dtype: torch.dtype, other: torch.dtype) -> list[Tensor]:
    """value, locations, weights and grad_output; the two in the middle of the other dtype."""
    torch.manual_seed(0)
    pixels = sum(map(math.prod, shape.levels))
    samples = (shape.batch, shape.queries or pixels, shape.heads, len(shape.levels), shape.points)
    value = torch.randn(shape.batch, pixels, shape.heads, shape.channels, device="cuda")
    weights = torch.rand(samples, device="cuda").flatten(3).softmax(-1).view(samples)
    grad_output = torch.randn(*samples[:2], shape.heads * shape.channels, device="cuda")
    locations = torch.rand(*samples, 2, device="cuda")
    return [value.to(dtype), locations.to(other), weights.to(other), grad_output.to(dtype)]


def by_grid_sample(value: Tensor, shape: Shape, locations: Tensor, weights: Tensor) -> Tensor:
    """What models compute that have no operator for it."""
    batch, _, heads, channels = value.shape
    queries, grid = locations.shape[1], (2 * locations - 1).to(value.dtype)
    sampled = []
    for level, part in enumerate(value.split([h * w for h, w in shape.levels], 1)):
        image = part.flatten(2).transpose(1, 2)
        image = image.reshape(batch * heads, channels, *shape.levels[level])
        at = grid[:, :, :, level].transpose(1, 2).flatten(0, 1)
        sampled.append(F.grid_sample(image, at, align_corners=False))
    weight = weights.to(value.dtype).transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    total = (torch.stack(sampled, -2).flatten(-2) * weight).sum(-1)
    return total.view(batch, heads * channels, queries).transpose(1, 2).contiguous()


def calls(function: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[Call, Call]:
    """Two calls to time: a forward, and a backward alone."""
    *given, grad_output = tensors
    leaves = [t.detach().requires_grad_() for t in given]
    y = function(*leaves)

    def backward() -> Any:
        return torch.autograd.grad(y, leaves, grad_output, retain_graph=True)

    return lambda: function(*given), backward


def of_study(study: Any, shape: Shape, tensors: list[Tensor]) -> tuple[Call, Call]:
    """The same two calls of a study's kernels, with the fastest of their tiles."""
    value, locations, weights, grad_output = tensors
    areas = [h * w for h, w in shape.levels]
    levels = [(*size, sum(areas[:i])) for i, size in enumerate(shape.levels)]
    sizes = torch.tensor(levels, device="cuda", dtype=torch.int32)

    def forward(rows: int, warps: int) -> Any:
        return study.rf(value, locations, weights, sizes, rows, warps)

    def backward(rows: int, warps: int) -> Any:
        return study.rb(value, locations, weights, sizes, grad_output, rows, warps)

    best = []
    for call, choices in (
        (forward, itertools.product((16, 32, 64), (2, 4))),
        (backward, itertools.product((16, 32), (4,))),
    ):
        _, some = min((bench.gpu_ms(lambda c=call, s=s: c(*s), 20), s) for s in choices)
        best.append(lambda call=call, some=some: call(*some))
    return best[0], best[1]


def errors(shape: Shape, tensors: list[Tensor]) -> list[float]:
    value, locations, weights, grad_output = (t[:1] for t in tensors)
    leaves = [t.detach().clone().requires_grad_() for t in (value, locations, weights)]
    y = deform_attention(leaves[0], shape.levels, *leaves[1:])
    got = (y, *torch.autograd.grad(y, leaves, grad_output))
    exact = [t.double() for t in (value, locations, weights)]
    a = attention_geometry(*exact, [size for level in shape.levels for size in level])
    wanted = (
        reference.attend(a, *exact),
        *reference.attend_gradients(a, grad_output.double(), *exact, [True] * 3),
    )
    return [bench.relative(g.detach(), w) for g, w in zip(got, wanted, strict=True)]


def medians(pairs: dict[str, tuple[Call, Call]]) -> dict[str, dict[str, float]]:
    """Milliseconds of all forwards, and of all backwards, by rounds in turns."""
    result = {}
    for i, way in enumerate(("forward", "backward")):
        rounds = bench.gpu_rounds({name: pair[i] for name, pair in pairs.items()})
        result[way] = {name: sorted(times)[len(times) // 2] for name, times in rounds.items()}
    return result


def measure(shape: Shape, dtype: torch.dtype, other: torch.dtype, study: Any) -> dict[str, Any]:
    tensors = make(shape, dtype, other)
    pairs = {
        "deformnd": calls(lambda v, o, w: deform_attention(v, shape.levels, o, w), tensors),
        "grid_sample": calls(lambda v, o, w: by_grid_sample(v, shape, o, w), tensors),
    }
    if study is not None:
        pairs["study"] = of_study(study, shape, tensors)
    result: dict[str, Any] = {"errors": errors(shape, tensors), **medians(pairs)}
    torch.use_deterministic_algorithms(True)
    ours = pairs["deformnd"][1]
    result["backward"]["deformnd, deterministic"] = bench.gpu_ms(ours, 20)
    torch.use_deterministic_algorithms(False)
    result["peak"] = [bench.gpu_peak(call) for call in pairs["deformnd"]]
    return result


def tune(shape: Shape, tensors: list[Tensor]) -> None:
    find = tiles.find
    for i, operation in enumerate(("forward_attention", "backward_attention")):
        found = []
        for block_p, block_c, block_o, warps in itertools.product(
            (4, 8, 16, 32, 64, 128), (8, 16, 32, 64), (1, 2, 4), (1, 2, 4, 8)
        ):
            lanes = max(1, min(block_c, shape.channels) // (4 if i else 16 // tensors[0].itemsize))
            if block_c * block_o != max(shape.channels, block_c) or not (
                0.5 <= block_p * lanes / (32 * warps) <= 4
            ):
                continue
            choice = dict(block_p=block_p, block_c=block_c, block_o=block_o, warps=warps)

            def other(*key: Any, choice: dict[str, int] = choice, name: str = operation) -> Any:
                row = find(*key)
                return dataclasses.replace(row, **choice) if row.operation == name else row

            tiles.find = other
            gpu._PLANS.clear()
            pair = calls(lambda v, o, w: deform_attention(v, shape.levels, o, w), tensors)
            found.append((bench.gpu_ms(pair[i], 20), choice))
        tiles.find = find
        gpu._PLANS.clear()
        for time, choice in sorted(found, key=lambda both: both[0])[:6]:
            print(f"    {operation} {time:.4f} {choice}", flush=True)


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("study", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parser_of(about: str, study: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--study", type=Path, help=f"a file with {study}")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--dtypes", nargs="+", default=["float16", "float32"], choices=DTYPES)
    return parser


def show_times(label: str, found: dict[str, Any]) -> None:
    for way in ("forward", "backward"):
        times = ", ".join(f"{who} {ms:.4f}" for who, ms in found[way].items())
        print(f"{label}, {way} (ms): {times}", flush=True)


def write(results: list[dict[str, Any]], path: Path | None) -> None:
    if path:
        about = {"device": torch.cuda.get_device_name(), "versions": bench.versions()}
        path.write_text(json.dumps({**about, "results": results}, indent=1))


def main() -> None:
    parser = parser_of(__doc__, "`rf` and `rb`")
    parser.add_argument("--float-locations", action="store_true", help="and weights, in float32")
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    study = options.study and load(options.study)
    results = []
    for (name, shape), dtype in itertools.product(SHAPES.items(), options.dtypes):
        other = torch.float32 if options.float_locations else DTYPES[dtype]
        if options.tune:
            print(name, dtype, flush=True)
            tune(shape, make(shape, DTYPES[dtype], other))
            continue
        found = measure(shape, DTYPES[dtype], other, study)
        results.append({"shape": name, "dtype": dtype, **found})
        show_times(f"{name}, {dtype}", found)
        listed = " ".join(f"{e:.1e}" for e in found["errors"])
        print(f"    errors {listed}; MiB {found['peak']}", flush=True)
        write(results, options.out)


if __name__ == "__main__":
    main()
