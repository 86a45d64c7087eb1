"""The demo: what deformable convolution does for a small network on real images."""

from __future__ import annotations

import copy
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from . import viz
from .onnx import translation_table
from .ops import PackedDeformConv2d

SIDE = 28  # pixels of the enlarged digits
TEST = 500  # of the 1797 images
BATCH = 64


class Data(NamedTuple):
    """Digits as scanned [N, 1, 8, 8] in [0, 1], and their classes [N]."""

    images: Tensor
    labels: Tensor


def load(seed: int, device: str) -> tuple[Data, Data]:
    """Training and test digits."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order].to(device), labels[order].to(device)
    return Data(images[TEST:], labels[TEST:]), Data(images[:TEST], labels[:TEST])


def transform(images: Tensor, generator: torch.Generator) -> Tensor:
    """Enlarge each image to SIDE pixels, randomly rotated, sheared, scaled and moved."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(images), generator=generator)

    angle, shear = uniform(-1.0, 1.0), uniform(-0.5, 0.5)
    scale = uniform(0.9, 2.2)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    move_x, move_y = uniform(-0.3, 0.3), uniform(-0.3, 0.3)
    rows = [
        torch.stack([cos, shear * cos - sin, move_x], 1),
        torch.stack([sin, shear * sin + cos, move_y], 1),
    ]
    grid = F.affine_grid(
        torch.stack(rows, 1).to(images.device), [len(images), 1, SIDE, SIDE], align_corners=False
    )
    return F.grid_sample(images, grid, align_corners=False)


def network(deformable: bool) -> nn.Sequential:
    """Three 3x3 convolutions and a classifier; the last two are deformable, or all ordinary."""

    def convolution(channels: int, out: int, stride: int) -> nn.Module:
        if deformable:
            return PackedDeformConv2d(channels, out, 3, stride, padding=1, modulated=True)
        return nn.Conv2d(channels, out, 3, stride, padding=1)

    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        convolution(16, 32, stride=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        convolution(32, 64, stride=2),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def train(model: nn.Module, data: Data, epochs: int, seed: int, name: str) -> float:
    """Train in place; returns the seconds it took."""
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(data.labels) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    model.train()
    start = time.perf_counter()
    with tqdm(total=steps, desc=f"train {name:>10}", unit="step") as progress:
        for _ in range(epochs):
            order = torch.randperm(len(data.labels), generator=generator)
            for batch in order.split(BATCH):
                if len(batch) < BATCH:
                    continue
                images = transform(data.images[batch], generator)
                loss = F.cross_entropy(model(images), data.labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update()
                progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return time.perf_counter() - start


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    guesses = torch.cat([model(batch).argmax(1) for batch in images.split(BATCH)])
    return float((guesses == labels).float().mean())


def milliseconds(call: Callable[[], Any], repeats: int = 20) -> float:
    """Median time of a call."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def export(model: nn.Module, example: Tensor, path: Path) -> None:
    batch = torch.export.Dim("batch")
    # It warns of every operator of torchvision when that is not installed.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.onnx.export(
        model,
        (example,),
        path,
        dynamo=True,
        verbose=False,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: batch},),
        custom_translation_table=translation_table(),
    )


@torch.no_grad()
def draw(model: nn.Sequential, images: Tensor, labels: Tensor, path: Path) -> None:
    """Where the first deformable convolution samples, for three output points a digit."""
    figure, axes = plt.subplots(1, len(images), figsize=(2.6 * len(images), 3.1))
    for i, axis in enumerate(axes):
        axis.imshow(images[i, 0], cmap="gray_r", interpolation="nearest")
        axis.set_title(f"a {labels[i].item()}")
        axis.set_axis_off()
        steps = viz.steps(model[:4], images, i)
        # The darkest places, apart from each other: where the digit is.
        ink = F.avg_pool2d(images[i : i + 1], 3, stride=2, padding=1)[0, 0]
        for colour in ("tab:red", "tab:blue", "tab:green"):
            y, x = divmod(int(ink.argmax()), ink.shape[1])
            ink[max(0, y - 3) : y + 4, max(0, x - 3) : x + 4] = 0
            regular = viz.follow(steps, (y, x), deformed=False)
            samples = viz.follow(steps, (y, x))
            viz.draw_samples(images[i], samples, regular, axes=axis, colour=colour)
    figure.suptitle(
        "Sampling points of three outputs (+ regular, ● learned, larger = larger mask)", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def run(epochs: int, out: Path, seed: int, device: str) -> dict[str, float]:
    """The whole demo; prints and writes what `deformnd demo --help` says, returns the figures."""
    torch.zeros(1, device=device)  # an unknown device fails here, with torch's own words
    out.mkdir(parents=True, exist_ok=True)
    training, test = load(seed, device)
    test_images = transform(test.images, torch.Generator().manual_seed(seed + 1))
    models, result = {}, {}
    for name, deformable in (("ordinary", False), ("deformable", True)):
        torch.manual_seed(seed)
        model = models[name] = network(deformable).to(device)
        result[f"{name}_seconds"] = train(model, training, epochs, seed, name)
        result[f"{name}_accuracy"] = accuracy(model, test_images, test.labels)
        result[f"{name}_parameters"] = sum(p.numel() for p in model.parameters())

    model = copy.deepcopy(models["deformable"]).cpu().eval()
    images = test_images[:BATCH].cpu()
    print("exporting to ONNX ...")
    export(model, images, out / "model.onnx")
    session = onnxruntime.InferenceSession(
        str(out / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    feed = {"image": images.numpy()}
    with torch.no_grad():
        expected = model(images).numpy()
        got = session.run(None, feed)[0]
        result["onnx_difference"] = float(np.abs(got - expected).max())
        result["torch_ms"] = milliseconds(lambda: model(images)) / BATCH
    result["onnx_ms"] = milliseconds(lambda: session.run(None, feed)) / BATCH
    draw(model, images[:5], test.labels[:5].cpu(), out / "sampling.png")

    report = _report(result, epochs, seed, device)
    (out / "report.md").write_text(report)
    print("\n" + report)
    print(f"written: {out / 'model.onnx'}, {out / 'report.md'}, {out / 'sampling.png'}")
    return result


def _report(r: dict[str, float], epochs: int, seed: int, device: str) -> str:
    gain = 100 * (r["deformable_accuracy"] - r["ordinary_accuracy"])
    verdict = (
        f"The deformable network is {abs(gain):.1f} points "
        f"{'better' if gain > 0 else 'worse'} on the {TEST} test images."
        if gain
        else f"Both are right equally often on the {TEST} test images."
    )
    rows = "\n".join(
        f"| {name} | {100 * r[f'{name}_accuracy']:.1f} % | {r[f'{name}_parameters']:,.0f} "
        f"| {r[f'{name}_seconds']:.1f} s |"
        for name in ("ordinary", "deformable")
    )
    return f"""# Handwritten digits, rotated, sheared and scaled

| convolutions | test accuracy | parameters | training |
|---|---|---|---|
{rows}

{verdict} One training each: {epochs} epochs, seed {seed}, on {device}, torch {torch.__version__}.

ONNX Runtime {onnxruntime.__version__} runs the exported network (model.onnx) with the same
results: the largest difference of a logit is {r["onnx_difference"]:.1e}. Time per image, on the
CPU in batches of {BATCH}: torch {r["torch_ms"]:.3f} ms, ONNX Runtime {r["onnx_ms"]:.3f} ms.

![Where the kernel samples](sampling.png)
"""
