"""Exported models in ONNX Runtime and OpenVINO, beside what there was before.

    python benchmarks/onnx_export.py --output benchmarks/results/onnx.json

One process, one live session at a time, rounds over all contestants, medians. Contestants:

- each target of deformnd.onnx.export, in every engine that runs its file (one of them for the
  transpose, since they share its lowering);
- `node`: one hand-made DeformConv node, the bound for target "onnxruntime" in 2-D;
- `seed-nd`, `seed-elements`: deform_conv2d_onnx_exporter with either of its gathers, if it is
  installed (`pip install --no-deps deform_conv2d_onnx_exporter`; without torchvision, an operator
  of the same schema stands in, since only the nodes matter here);
- `rewritten`: the first of these files after deformnd.onnx.rewrite;
- `deformnd` and `node` also in ONNX Runtime with deformnd's core as its custom operators (engine
  "deformnd"), and the call itself in PyTorch.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import logging
import math
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

import deformnd
import deformnd.onnx

CASES: dict[str, dict[str, Any]] = {
    # batch, in, spatial, out, kernel, offset groups
    "A": {"shape": (1, 64, 64, 64), "out": 64, "kernel": 3},
    "B": {"shape": (1, 128, 100, 168), "out": 128, "kernel": 3},
    "C": {"shape": (1, 256, 50, 84), "out": 256, "kernel": 3},
    "D": {"shape": (1, 64, 180, 320), "out": 64, "kernel": 3, "offset_groups": 16},
    "K7": {"shape": (1, 256, 32, 32), "out": 256, "kernel": 7},
    "1d": {"shape": (4, 64, 1024), "out": 64, "kernel": 5},
    "3d": {"shape": (1, 32, 8, 56, 56), "out": 32, "kernel": 3},
    "T2d": {"shape": (1, 64, 64, 64), "out": 64, "kernel": 3, "T": True},
    "T2d-s2": {
        "shape": (1, 128, 32, 32),
        "out": 64,
        "kernel": 4,
        "stride": 2,
        "padding": 1,
        "T": True,
    },
    "T3d": {"shape": (1, 16, 4, 14, 14), "out": 16, "kernel": 4, "stride": 2, "padding": 1, "T": 1},
}


class Call(nn.Module):
    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        self.shape, out, k = case["shape"], case["out"], case["kernel"]
        self.n, self.transposed = len(self.shape) - 2, bool(case.get("T"))
        self.stride, self.padding = case.get("stride", 1), case.get("padding", k // 2)
        self.kernel, self.groups = (k,) * self.n, case.get("offset_groups", 1)
        first, second = (self.shape[1], out) if self.transposed else (out, self.shape[1])
        points = k**self.n
        weight = torch.randn(first, second, *self.kernel) / math.sqrt(self.shape[1] * points)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(torch.randn(out))
        name = "deform_conv_transpose" if self.transposed else "deform_conv"
        self.function = getattr(deformnd, f"{name}{self.n}d")

    def inputs(self) -> tuple[Tensor, ...]:
        size = self.shape[2:]
        if not self.transposed:
            size = tuple(
                (s + 2 * self.padding - k) // self.stride + 1
                for s, k in zip(size, self.kernel, strict=True)
            )
        points = math.prod(self.kernel)
        offset = 2 * torch.randn(self.shape[0], self.groups * points * self.n, *size)
        return (
            torch.randn(self.shape),
            offset,
            torch.rand(self.shape[0], self.groups * points, *size),
        )

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        result: Tensor = self.function(
            x, self.weight, offset, mask, self.bias, stride=self.stride, padding=self.padding
        )
        return result


class Torchvision(Call):
    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        s, p = (self.stride, self.stride), (self.padding, self.padding)
        result: Tensor = torch.ops.torchvision.deform_conv2d(
            x, self.weight, offset, mask, self.bias, *s, *p, 1, 1, 1, self.groups, True
        )
        return result


def provide_torchvision_operator() -> bool:
    """Make sure there is an operator of torchvision's name; True if it is torchvision's own."""
    try:
        importlib.import_module("torchvision")
        return True
    except (ImportError, RuntimeError):
        global _library
        _library = torch.library.Library("torchvision", "DEF")
        tensors = "Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias"
        ints = ", ".join(f"SymInt i{i}" for i in range(8))
        _library.define(f"deform_conv2d({tensors}, {ints}, bool use_mask) -> Tensor")

        def call(x: Tensor, w: Tensor, o: Tensor, m: Tensor, b: Tensor, *i: Any) -> Tensor:
            return deformnd.deform_conv2d(x, w, o, m, b, i[:2], i[2:4])

        _library.impl("deform_conv2d", call, "CPU")
        return False


def hand_made(model: Call, inputs: tuple[Tensor, ...], path: str) -> None:
    names = ["x", "offset", "mask"]
    make, info = onnx.helper, onnx.helper.make_tensor_value_info
    node = make.make_node(
        "DeformConv",
        ["x", "weight", "offset", "bias", "mask"],
        ["y"],
        kernel_shape=list(model.kernel),
        strides=[model.stride] * 2,
        pads=[model.padding] * 4,
        offset_group=model.groups,
    )
    weights = [
        onnx.numpy_helper.from_array(getattr(model, name).detach().numpy(), name)
        for name in ("weight", "bias")
    ]
    graph = make.make_graph(
        [node],
        "node",
        [info(n, 1, list(t.shape)) for n, t in zip(names, inputs, strict=True)],
        [info("y", 1, None)],
        weights,
    )
    imports = [make.make_opsetid("", 20)]
    onnx.save(make.make_model(graph, opset_imports=imports, ir_version=9), path)


def seed(model: Call, inputs: tuple[Tensor, ...], path: str, gathernd: bool) -> None:
    # The exporter looks for a private module of torch at a place where it no longer is.
    types = "torch.onnx._internal.torchscript_exporter._type_utils"
    sys.modules.setdefault("torch.onnx._type_utils", importlib.import_module(types))
    exporter = importlib.import_module("deform_conv2d_onnx_exporter")
    exporter.register_deform_conv2d_onnx_op(use_gathernd=gathernd)
    twin = Torchvision.__new__(Torchvision)
    twin.__dict__.update(model.__dict__)
    torch.onnx.export(twin, inputs, path, dynamo=False, opset_version=18)


def rewritten(model: Call, inputs: tuple[Tensor, ...], path: str, old: str) -> None:
    deformnd.onnx.rewrite(old, path, verify=False, verbose=False)


def ort_session(path: str) -> Any:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))[0]


def ov_session(path: str) -> Any:
    import openvino

    model = openvino.compile_model(
        openvino.Core().read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    request = model.create_infer_request()
    return lambda arrays: next(iter(request.infer(arrays).values()))


def our_session(path: str) -> Any:
    session = deformnd.onnx.session(path)
    names = [i.name for i in session.get_inputs()]
    return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))[0]


ENGINES = {"onnxruntime": ort_session, "openvino": ov_session, "deformnd": our_session}


def files(model: Call, inputs: tuple[Tensor, ...], folder: str) -> dict[str, str]:
    found = {}

    def make(name: str, write: Any, *args: Any, **options: Any) -> None:
        path = os.path.join(folder, name + ".onnx")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                write(model, inputs, path, *args, **options)
            except ImportError as error:
                print(f"  no {name}: {error}")
                return
        found[name] = path

    # All targets share one lowering of the transpose; those that are not here, these lowerings.
    targets = "onnxruntime", "openvino", "standard", "precise", "deformnd"
    for target in (targets[0], targets[-1]) if model.transposed else targets:
        make(target, deformnd.onnx.export, target=target, verify=False, verbose=False)
    if model.n == 2 and not model.transposed:
        make("node", hand_made)
        make("seed-nd", seed, gathernd=True)
        make("seed-elements", seed, gathernd=False)
        if "seed-nd" in found:
            make("rewritten", rewritten, old=found["seed-nd"])
    return found


def in_pytorch(model: Call) -> Any:
    def run(arrays: list[Any]) -> Any:
        with torch.no_grad():
            return model(*map(torch.from_numpy, arrays)).numpy()

    return run


def measure(function: Any, seconds: float) -> list[float]:
    times: list[float] = []
    function()
    function()
    start = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        function()
        times.append((time.perf_counter() - before) * 1e3)
    return times


def run_case(name: str, rounds: int, seconds: float) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = Call(CASES[name]).eval()
    inputs = model.inputs()
    with torch.no_grad():
        exact = model.double()(*(t.double() for t in inputs)).numpy()
    model = model.float()
    arrays = [t.numpy() for t in inputs]
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = files(model, inputs, folder)
        pairs = [
            (file, path, engine, start)
            for file, path in paths.items()
            for engine, start in ENGINES.items()
            if engine != "deformnd" or file in ("deformnd", "node")
        ]
        pairs.append(("", "", "PyTorch", lambda _: in_pytorch(model)))
        for _ in range(rounds):
            for file, path, engine, start in pairs:
                row = rows.setdefault((file, engine), {"case": name, "file": file})
                if "failed" in row:
                    continue
                row["engine"] = engine
                try:
                    before = time.perf_counter()
                    session = start(path)
                    row.setdefault("start_ms", []).append((time.perf_counter() - before) * 1e3)
                    got = session(arrays)
                except Exception as error:  # An engine may not know the operator.
                    row["failed"] = str(error).strip().splitlines()[0][:200]
                    continue
                row["error"] = float(np.abs(got - exact).max())
                row["relative_error"] = float(np.linalg.norm(got - exact) / np.linalg.norm(exact))
                row["bytes"] = os.path.getsize(path) if path else 0
                row.setdefault("ms", []).extend(measure(lambda s=session: s(arrays), seconds))
                del session, got
                gc.collect()
    for row in rows.values():
        if "ms" in row:
            row["fastest_ms"] = min(row["ms"])
            row["ms"], row["start_ms"] = map(statistics.median, (row["ms"], row["start_ms"]))
        if "ms" in row:
            print(
                f"  {row['file']:14} {row['engine']:12} {row['ms']:8.2f} ms"
                f"  error {row['error']:.1e}, relative {row['relative_error']:.1e}"
                f"  start {row['start_ms']:.0f} ms, {row['bytes'] / 1e3:.0f} kB",
                flush=True,
            )
    return [row for row in rows.values() if "ms" in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.5, help="per contestant and round")
    parser.add_argument("--output", type=Path, help="add the results to this JSON file")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    provide_torchvision_operator()
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    for module in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        with contextlib.suppress(ImportError):
            versions[module] = importlib.import_module(module).__version__
    for name in options.cases:
        print(name, CASES[name], flush=True)
        rows = run_case(name, options.rounds, options.seconds)
        if options.output:
            record = {"device": f"{cpu_name()}, {os.cpu_count()} cores", "versions": versions}
            if options.output.exists():
                record["cases"] = json.loads(options.output.read_text())["cases"]
            record.setdefault("cases", {})[name] = rows
            options.output.write_text(json.dumps(record, indent=1) + "\n")


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
