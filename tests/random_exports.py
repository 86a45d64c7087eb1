"""Random calls of every operator, exported for every target, in ONNX Runtime and OpenVINO.

    python tests/random_exports.py --calls 200            (--target tensorrt: of one target)

Calls are those of random_calls.py, and some of deform_attention. Many stand in one model, since an
export takes long. tests/test_onnx_targets.py runs a few.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import random
import sys
import tempfile
import time
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cases import NAMES
from deformnd import deform_attention
from deformnd.onnx import TARGETS, UnsupportedError, export, read_openvino_model
from deformnd.onnx.engines import ENGINES
from random_calls import Limits, RandomCall, draw

DTYPES = (torch.float16, torch.float32, torch.float64)
LIMITS = Limits(DTYPES, DTYPES, 3e5, 300)
BAD = (1e4, -3e9, 3e38, math.inf, -math.inf, math.nan)
# OpenVINO computes float64 in float32. Those of few elements are not averaged.
BOUND = {torch.float16: 2e-3, torch.float32: 2e-5, torch.float64: 1e-11}


@dataclasses.dataclass
class Attention:
    """A call of deform_attention."""

    n: int
    levels: list[tuple[int, ...]]
    sizes: tuple[int, ...]  # batch, queries, heads, channels, points
    dtype: torch.dtype
    seed: int

    def tensors(self) -> list[Tensor]:
        batch, queries, heads, channels, points = self.sizes
        generator = torch.Generator().manual_seed(self.seed)
        pixels = sum(map(math.prod, self.levels))
        value = torch.randn(batch, pixels, heads, channels, generator=generator)
        shape = (batch, queries, heads, len(self.levels), points)
        locations = torch.rand(*shape, self.n, generator=generator) * 1.6 - 0.3
        weights = torch.rand(*shape, generator=generator)
        return [t.to(self.dtype) for t in (value, locations, weights)]

    def __call__(self, tensors: list[Tensor | None]) -> Tensor:
        value, locations, weights = tensors
        assert value is not None and locations is not None and weights is not None
        return deform_attention(value, self.levels, locations, weights)


@dataclasses.dataclass
class Convolution:
    call: RandomCall

    @property
    def dtype(self) -> torch.dtype:
        return self.call.dtype

    def tensors(self) -> list[Tensor | None]:
        given = self.call.tensors()
        return [given[name] for name in NAMES]

    def __call__(self, tensors: list[Tensor | None]) -> Tensor:
        return self.call.call(dict(zip(NAMES, tensors, strict=True)))


def draw_call(rng: random.Random, target: str) -> Attention | Convolution:
    ncnn = target == "ncnn"  # which takes few
    if rng.random() < 0.2 and not ncnn:
        n = rng.choice((1, 2, 2, 3))
        levels = [tuple(rng.randint(1, 7) for _ in range(n)) for _ in range(rng.randint(1, 3))]
        sizes = tuple(rng.randint(1, top) for top in (3, 12, 4, 8, 4))
        return Attention(n, levels, sizes, rng.choice(DTYPES), rng.randrange(1 << 30))
    while True:
        call = draw(rng, LIMITS)
        case = call.case
        several = max(case.offset_groups, case.mask_groups) > 1
        if not ncnn or not (case.transposed or case.n == 3 or several):
            return Convolution(dataclasses.replace(call, layouts=("contiguous",) * 6))


class Calls(nn.Module):
    def __init__(self, calls: list[Any]) -> None:
        super().__init__()
        self.calls = calls
        self.there = [[t is not None for t in call.tensors()] for call in calls]
        self.eval()

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        left = list(args)
        return tuple(
            call([left.pop(0) if there else None for there in all_there])
            for call, all_there in zip(self.calls, self.there, strict=True)
        )

    def exact(self, args: list[Tensor]) -> list[Tensor]:
        return [t.double() for t in self(*(a.double() for a in args))]


def arguments(model: Calls, rng: random.Random, target: str) -> list[Tensor]:
    """The tensors of the calls, here and there with positions that are far away or none."""
    args = []
    for call in model.calls:
        given = call.tensors()
        at = 1 if isinstance(call, Attention) else NAMES.index("offset")
        bad = rng.choice([b for b in BAD if target != "ncnn" or not math.isnan(b)])
        where = given[at]
        if where is not None and rng.random() < 0.3 and abs(bad) < torch.finfo(where.dtype).max:
            where.view(-1)[::7] = bad
        elif where is not None and rng.random() < 0.1:
            where.view(-1)[::5] = math.inf
        args += [t for t in given if t is not None]
    return args


def runners(path: str, target: str) -> dict[str, Any]:
    """Both engines, and deformnd's kernels."""
    import openvino

    core = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(read_openvino_model(path, core), "CPU", options)

    def run_openvino(arrays: list[Any]) -> list[Any]:
        results = compiled(arrays)
        return [results[o].copy() for o in compiled.outputs]

    found = {"onnxruntime": ENGINES["onnxruntime"](path)[1], "openvino": run_openvino}
    if target == "deformnd":
        found["deformnd"] = ENGINES["deformnd"](path)[1]
    return found


def run(target: str, seed: str, count: int, together: int = 20) -> tuple[int, list[str]]:
    """How many calls were exported and run in every engine, and what is wrong with which."""
    rng, wrong, done = random.Random(f"{seed} {target}"), [], 0
    while done < count:
        calls = [draw_call(rng, target) for _ in range(min(together, count - done))]
        model = Calls(calls)
        args = arguments(model, rng, target)
        dynamic = rng.random() < 0.5
        about = f"{target}, seed {seed!r}, calls from {done}{', open sizes' * dynamic}"
        shapes = None
        if dynamic:
            open_axes = {a: torch.export.Dim.AUTO for a in (0, 2, 3, 4)}
            shapes = (tuple({a: d for a, d in open_axes.items() if a < t.dim()} for t in args),)
            # Channels, heads and axes of a location are known.
            at = 0
            for call, there in zip(calls, model.there, strict=True):
                for i in range(len(there)):
                    if not there[i]:
                        continue
                    fixed = i in (NAMES.index("weight"), NAMES.index("bias"))
                    if isinstance(call, Attention):
                        shapes[0][at].clear()
                        if i:
                            shapes[0][at][1] = torch.export.Dim.AUTO
                        shapes[0][at][0] = torch.export.Dim.AUTO
                    elif fixed:
                        shapes[0][at].clear()
                    at += 1
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = os.path.join(folder, "model.onnx")
            try:
                options = {"dynamic_shapes": shapes, "verify": False, "verbose": False}
                export(model, tuple(args), path, target=target, **options)
                exact = model.exact(args)
                for engine, call_engine in runners(path, target).items():
                    got = call_engine([a.numpy() for a in args])
                    wrong += differences(f"{about}, {engine}", engine, calls, args, got, exact)
            except UnsupportedError as error:
                wrong.append(f"{about}: refused: {error}")
            except Exception as error:
                calls_said = "\n    ".join(map(str, calls))
                wrong.append(f"{about}: {type(error).__name__}: {error}\n    {calls_said}")
        done += len(calls)
    return done, wrong


def differences(
    about: str, engine: str, calls: list[Any], args: list[Tensor], got: list[Any], exact: Any
) -> list[str]:
    found = []
    for i, (call, array, want) in enumerate(zip(calls, got, exact, strict=True)):
        result = torch.from_numpy(np.ascontiguousarray(array))
        dtypes = [call.dtype]
        if engine == "openvino":
            dtypes.append(torch.float32)
        bound = max(BOUND[dtype] for dtype in dtypes) * (1 + 4 / math.sqrt(max(want.numel(), 1)))
        error = math.inf
        if result.shape == want.shape and result.dtype == call.dtype:
            # Terms that cancel leave their rounding.
            norm = max(want.norm().item(), 1e-2 * math.sqrt(want.numel()))
            error = (result.double() - want).norm().item() / norm
        if not error <= bound:
            found.append(f"{about}, call {i} errs by {error:.1e}: {call}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--target", choices=TARGETS, help="otherwise each")
    args = parser.parse_args()
    failed = 0
    for target in [args.target] if args.target else TARGETS:
        start = time.monotonic()
        done, wrong = run(target, args.seed, args.calls)
        for what in wrong:
            print(what, flush=True)
        seconds = time.monotonic() - start
        print(f"{target}: {done} calls, {len(wrong)} wrong, {seconds:.0f} s", flush=True)
        failed += len(wrong)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
