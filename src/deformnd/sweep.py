"""The sweep: random realistic layers and those of public models, beside torchvision and dense.

`deformnd bench --sweep N` runs it. Kernels are tuned for named shapes, so here are layers that
nobody chose. The process that the user starts draws them, keeps the report and touches no device.
Other processes, which it asks one line of JSON at a time, time the layers and compile kernels
ahead. So a crash, a hang or an error that spoils the device costs one layer, and another process
may have the operators of another source tree.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

from . import bench
from .bench import Shape, mean

# What is drawn for a layer: values, and how often each comes.
KINDS = {(2, False): 80, (1, False): 6, (3, False): 7, (2, True): 5, (1, True): 1, (3, True): 1}
BATCHES = {1: 30, 2: 16, 3: 4, 4: 14, 6: 4, 8: 16, 12: 3, 16: 6, 24: 2, 32: 5}
CHANNELS = {
    **{3: 4, 16: 4, 24: 4, 32: 6, 40: 4, 48: 5, 64: 14, 72: 3, 80: 4, 96: 6, 112: 3, 120: 3},
    **{128: 14, 160: 4, 192: 5, 256: 12, 320: 3, 384: 4, 512: 6, 768: 2, 1024: 2},
}
KERNELS = {1: 7, 2: 1, 3: 75, 4: 1, 5: 8, 6: 1, 7: 6}
STRIDES = {1: 80, 2: 20}
DILATIONS = {1: 84, 2: 11, 3: 5}
UPSAMPLINGS = {(4, 2): 5, (2, 2): 3, (3, 1): 2, (3, 2): 1}  # kernel and stride of the transposed
SIDES = (7, 400)
THIN = 16  # a thin image has a side of at most so many pixels
# How many samples a layer may have at most, see Work. So many take the slowest peer about 10 ms on
# an H200, or a second on two cores. The convolution's products are at most 256 times as many. All
# tensors have at most as many elements, which with gradients and columns in float32 are about 4 GB.
SAMPLES = {"cuda": 10**8, "cpu": 2 * 10**6}
PRODUCTS = 256

# A larger relative error of the output or a gradient counts as wrong.
TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-5, "float64": 1e-9}
SLOW = 2.5  # a layer that takes so many times as long as the dense convolution is listed

# How many seconds a process may take for an answer, since a kernel that waits for itself never
# ends.
PATIENCE = 180


class Work(NamedTuple):
    """How much a layer does."""

    samples: int  # positions x kernel points x image channels
    products: int
    elements: int  # of all tensors


def sizes_out(shape: Shape) -> tuple[int, ...]:
    """The output's size."""
    n = len(shape.size)
    padding = bench.padding_of(shape)
    out = []
    for size, step, apart in zip(
        shape.size, bench.every(shape.stride, n), bench.every(shape.dilation, n), strict=True
    ):
        reach = apart * (shape.kernel - 1) - 2 * padding
        out.append(
            (size - 1) * step + reach + 1 if shape.transposed else (size - reach - 1) // step + 1
        )
    return tuple(out)


def work(shape: Shape) -> Work:
    out, taps = math.prod(sizes_out(shape)), shape.kernel ** len(shape.size)
    into = math.prod(shape.size)
    positions = shape.batch * (into if shape.transposed else out)
    image = shape.out_channels if shape.transposed else shape.channels
    per_group = shape.channels * shape.out_channels // shape.groups
    elements = shape.batch * (shape.channels * into + 2 * shape.out_channels * out)
    elements += positions * taps * shape.offset_groups * (len(shape.size) + 1) + per_group * taps
    return Work(positions * taps * image, positions * taps * per_group, elements)


def allowed(shape: Shape, samples: int) -> bool:
    found = work(shape)
    return (
        min(sizes_out(shape)) > 0
        and max(found.samples, found.elements) <= samples
        and found.products <= PRODUCTS * samples
    )


def depthwise(shape: Shape) -> bool:
    return shape.groups == shape.channels > 1


def describe(shape: Shape) -> str:
    """A layer in a few letters, such as 4x96x56x56 > 192 k3 s2 d2 g4 og3."""
    sizes = "x".join(map(str, (shape.batch, shape.channels, *shape.size)))
    parts = [f"{'up ' * shape.transposed}{sizes} > {shape.out_channels} k{shape.kernel}"]
    parts += [f"s{shape.stride}"] * (shape.stride != 1)
    parts += [f"d{shape.dilation}"] * (shape.dilation != 1)
    parts += ["dw" if depthwise(shape) else f"g{shape.groups}"] * (shape.groups != 1)
    parts += [f"og{shape.offset_groups}"] * (shape.offset_groups != 1)
    return " ".join(parts)


def draw(count: int, seed: int, samples: int) -> list[Shape]:
    """This number of layers. With another count, the first ones are the same."""
    rng = random.Random(str(seed))  # As a number, a seed would lose its sign.
    shapes: list[Shape] = []
    for _ in range(count):
        # The kind is drawn once, and not anew for a layer that is too large, since shares of kinds
        # would change with how often that happens.
        kind = _pick(rng, KINDS)
        while not allowed(shape := _draw(rng, *kind), samples):
            pass
        shapes.append(shape)
    return shapes


def _pick(rng: random.Random, table: dict[Any, int]) -> Any:
    return rng.choices(list(table), list(table.values()))[0]


def _draw(rng: random.Random, n: int, transposed: bool) -> Shape:
    channels = _pick(rng, CHANNELS) if rng.random() < 0.92 else rng.randint(3, 1024)
    outputs = channels if rng.random() < 0.55 else _pick(rng, CHANNELS)
    groups = 1
    kind = rng.random()
    if kind < 0.08:
        groups, outputs = channels, channels
    elif kind < 0.22:
        both = math.gcd(channels, outputs)
        groups = rng.choice([g for g in range(1, min(both, 64) + 1) if both % g == 0])
    image = outputs if transposed else channels
    offset_groups = 1
    if rng.random() < 0.35:
        several = [g for g in range(2, 17) if image % g == 0 and 3 <= image // g <= 128]
        offset_groups = rng.choice(several or [1])
    if transposed:
        kernel, stride = _pick(rng, UPSAMPLINGS)
        dilation, padding = 1, max(kernel - stride, 0) // 2
    else:
        kernel, stride = _pick(rng, KERNELS), _pick(rng, STRIDES)
        dilation = _pick(rng, DILATIONS) if kernel > 1 else 1
        padding = dilation * (kernel - 1) // 2 if rng.random() < 0.93 else 0
    return Shape(
        *(_pick(rng, BATCHES), channels, _draw_size(rng, n), outputs, kernel, offset_groups),
        *(stride, padding, dilation, groups, transposed),
    )


def _draw_size(rng: random.Random, n: int) -> tuple[int, ...]:
    least, most = SIDES
    first = round(math.exp(rng.triangular(math.log(least), math.log(most), math.log(most / 2))))
    kind = rng.random()
    if kind < 0.35:
        return (first,) * n
    if kind < 0.85 or n == 1:
        others = (round(first * rng.uniform(0.5, 2)) for _ in range(n - 1))
        return (first, *(min(max(other, least), most) for other in others))
    size = [rng.randint(least, THIN), *(rng.randint(4 * THIN, most) for _ in range(n - 1))]
    rng.shuffle(size)
    return tuple(size)


def _stages(batch: int, height: int, width: int) -> dict[str, Shape]:
    """The deformable stages of a ResNet-50 for images of this size."""
    return {
        f"ResNet-50 {batch} x {height}x{width} c{i}": Shape(
            batch, 2**i * 16, (math.ceil(height / 2**i), math.ceil(width / 2**i)), 2**i * 16, 3
        )
        for i in (3, 4, 5)
    }


# Layers of public models, by their papers; none of them is one of bench.SHAPES.
MODELS = {
    **_stages(1, 800, 1344),
    **_stages(8, 512, 512),
    **_stages(4, 640, 640),
    **_stages(16, 224, 224),
    "ResNet-50 c4 entry": Shape(2, 256, (100, 168), 256, 3, stride=2),
    "ResNet-50 c5 entry": Shape(2, 512, (50, 84), 512, 3, stride=2),
    "DeepLab c4": Shape(2, 256, (64, 128), 256, 3, padding=2, dilation=2),
    "DeepLab c5": Shape(1, 512, (64, 128), 512, 3, padding=3, dilation=3),
    "ResNeXt-101 64x4d c3": Shape(1, 512, (100, 168), 512, 3, groups=64),
    "ResNeXt-101 64x4d c4": Shape(2, 1024, (50, 84), 1024, 3, groups=64),
    "ResNeXt-101 32x4d c5": Shape(2, 1024, (25, 42), 1024, 3, groups=32),
    "Res2Net-101 c3": Shape(2, 52, (100, 168), 52, 3),
    "Res2Net-101 c4": Shape(2, 104, (50, 84), 104, 3),
    "Res2Net-101 c5": Shape(2, 208, (25, 42), 208, 3),
    "HRNet-W18 a": Shape(2, 18, (200, 336), 18, 3),
    "HRNet-W18 b": Shape(2, 36, (100, 168), 36, 3),
    "HRNet-W18 d": Shape(2, 144, (25, 42), 144, 3),
    "RepPoints P3": Shape(2, 256, (100, 168), 256, 3),
    "RepPoints P5": Shape(2, 256, (25, 42), 256, 3),
    "RepPoints P6": Shape(2, 256, (13, 21), 256, 3),
    "RepPoints P7": Shape(2, 256, (7, 11), 256, 3),
    "S2ANet P4, 4 groups": Shape(2, 256, (64, 64), 256, 3, 4),
    "CenterNet-DLA34 512": Shape(8, 512, (16, 16), 256, 3),
    "CenterNet-DLA34 256": Shape(8, 256, (32, 32), 128, 3),
    "CenterNet-DLA34 128": Shape(8, 128, (64, 64), 64, 3),
    "CenterNet-DLA34 64": Shape(8, 64, (128, 128), 64, 3),
    "PP-YOLO c5": Shape(8, 512, (19, 19), 512, 3),
    "YOLO-n neck P3": Shape(8, 64, (80, 80), 64, 3),
    "YOLO-n neck P4": Shape(8, 128, (40, 40), 128, 3),
    "YOLO-tiny neck P3": Shape(8, 96, (52, 52), 96, 3),
    "YOLO-m neck P4": Shape(8, 192, (40, 40), 192, 3),
    "YOLO-m neck P5": Shape(8, 384, (20, 20), 384, 3),
    "YOLO-x neck P4": Shape(1, 320, (40, 40), 320, 3),
    "MobileNet neck 24": Shape(8, 24, (56, 56), 24, 3),
    "MobileNet neck 40": Shape(8, 40, (28, 28), 40, 3),
    "MobileNet neck 112": Shape(8, 112, (14, 14), 112, 3),
    "EDVR-M L1": Shape(1, 64, (180, 320), 64, 3, 8),
    "EDVR-M L2": Shape(1, 64, (90, 160), 64, 3, 8),
    "EDVR-M L3": Shape(1, 64, (45, 80), 64, 3, 8),
    "EDVR-M training": Shape(20, 64, (64, 64), 64, 3, 8),
    "EDVR-L L2": Shape(4, 128, (64, 64), 128, 3, 8),
    "TDAN": Shape(4, 64, (48, 48), 64, 3, 8),
    "BasicVSR++ alignment": Shape(1, 128, (180, 320), 64, 3, 16),
    "BasicVSR++ training": Shape(8, 128, (64, 64), 64, 3, 16),
    "VRT alignment": Shape(4, 120, (64, 64), 120, 3, 12),
    "RVRT alignment": Shape(2, 144, (64, 64), 144, 3, 12),
    "Alignment of 96 in 3": Shape(2, 96, (64, 112), 96, 3, 3),
    "RGB stem 224": Shape(8, 3, (224, 224), 64, 7, stride=2),
    "RGB stem 256": Shape(4, 3, (256, 256), 64, 3),
    "RGB stem 32": Shape(8, 3, (320, 320), 32, 3, stride=2),
    "RGB stem patches": Shape(8, 3, (224, 224), 96, 4, stride=4, padding=0),
    "RGB restoration": Shape(1, 3, (400, 400), 48, 3),
    "DBNet-R18 c3": Shape(1, 128, (92, 160), 128, 3),
    "DBNet-R50 c4": Shape(8, 256, (40, 40), 256, 3),
    "DBNet-R50 c5": Shape(8, 512, (20, 20), 512, 3),
    "CRNN stem": Shape(16, 64, (16, 160), 128, 3),
    "CRNN last": Shape(16, 256, (8, 80), 256, 3),
    "OCR line": Shape(1, 32, (32, 400), 64, 3),
    "BiRefNet k1": Shape(1, 64, (128, 128), 256, 1),
    "BiRefNet k3": Shape(1, 64, (128, 128), 256, 3),
    "BiRefNet k7": Shape(1, 64, (64, 64), 256, 7),
    "Matting 32": Shape(1, 32, (256, 256), 32, 3),
    "Matting 16": Shape(2, 16, (384, 384), 16, 3),
    "ALIKED 32": Shape(1, 32, (60, 80), 64, 3),
    "ALIKED 64": Shape(1, 64, (15, 20), 128, 3),
    "Medical U-Net 64": Shape(2, 64, (192, 192), 64, 3),
    "DUNet patches": Shape(32, 32, (48, 48), 32, 3),
    "D-LKA k5": Shape(4, 96, (56, 56), 96, 5, groups=96),
    "D-LKA k7": Shape(4, 96, (56, 56), 96, 7, padding=9, dilation=3, groups=96),
    "Depthwise 56": Shape(4, 96, (56, 56), 96, 7, groups=96),
    "Depthwise 28": Shape(8, 192, (28, 28), 192, 7, groups=192),
    "Depthwise 14": Shape(8, 384, (14, 14), 384, 7, groups=384),
    "Depthwise entry": Shape(8, 144, (56, 56), 144, 3, stride=2, groups=144),
    "TDNN d1": Shape(16, 512, (300,), 512, 5),
    "TDNN d2": Shape(16, 512, (300,), 512, 3, padding=2, dilation=2),
    "TDNN d3": Shape(16, 512, (300,), 512, 3, padding=3, dilation=3),
    "TDNN filterbank": Shape(32, 80, (300,), 512, 5),
    "ECAPA 128": Shape(32, 128, (300,), 128, 3, padding=3, dilation=3),
    "Conv-TasNet depthwise": Shape(8, 512, (400,), 512, 3, padding=2, dilation=2, groups=512),
    "D3Dnet training": Shape(4, 64, (7, 32, 32), 64, 3),
    "D3Dnet frame": Shape(1, 64, (7, 64, 64), 64, 3),
    "Video 3-D": Shape(2, 128, (8, 28, 28), 128, 3),
    "Video 3-D late": Shape(2, 256, (8, 14, 14), 256, 3),
    "Medical 3-D 32": Shape(1, 32, (24, 64, 64), 32, 3),
    "Medical 3-D 64": Shape(1, 64, (16, 40, 40), 64, 3),
    "Medical 3-D 320": Shape(1, 320, (8, 10, 10), 320, 3),
    "Medical 3-D stem": Shape(1, 3, (32, 64, 64), 32, 3),
    "CenterNet-R18 up": Shape(8, 256, (16, 16), 256, 4, stride=2, padding=1, transposed=True),
    "U-Net up": Shape(2, 128, (64, 64), 64, 2, stride=2, padding=0, transposed=True),
    "U-Net 3-D up": Shape(1, 64, (12, 24, 24), 32, 2, stride=2, padding=0, transposed=True),
}


# The processes that do the work

_BOOT = """
import os, sys
from importlib.machinery import PathFinder
sys.path.insert(0, sys.argv[1])
if sys.argv[1] != os.path.dirname(sys.argv[2]):
    sys.meta_path.insert(0, PathFinder)  # before the finder of an editable install
import deformnd
deformnd.__path__.insert(0, sys.argv[2])  # this sweep, whatever the tree has
from deformnd import sweep
sweep.serve()
"""


def tree_of(path: Path) -> Path:
    """The folder to import a source tree from."""
    for folder in (path / "src", path):
        if (folder / "deformnd" / "__init__.py").is_file():
            return folder.resolve()
    raise ValueError(f"{path} has no deformnd, expected a source tree of it")


class Worker:
    """A process that answers, started when it is first asked and anew when it has died."""

    def __init__(self, tree: Path, options: dict[str, Any], cache: Path | None = None) -> None:
        self.environment = {**os.environ, **({"TRITON_CACHE_DIR": str(cache)} if cache else {})}
        here = str(Path(__file__).resolve().parent)
        self.command = [sys.executable, "-c", _BOOT, str(tree), here, json.dumps(options)]
        self.process: subprocess.Popen[str] | None = None

    def ask(self, request: dict[str, Any], patience: float = PATIENCE) -> dict[str, Any]:
        """The answer; {"failed": why} if there is none."""
        if self.process is None:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(patience, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            late = not timer.is_alive()
            timer.cancel()
        if not line:
            self.close()
            why = f"no answer in {patience:g} s" if late else f"code {process.returncode}"
            return {"failed": f"the process ended: {why}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def serve() -> None:
    """Answer requests, a line of JSON each, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # On Ctrl-C the process that asks ends this one.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Whatever else is printed must not mix with the answers.
    options = json.loads(sys.argv[3])
    device = options["device"]
    torch.backends.cudnn.allow_tf32 = False
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    if device != "cpu":
        torch.cuda.set_device(torch.device(device).index or 0)
        if options["portable"]:
            bench.without_hopper()
    for line in sys.stdin:
        request = json.loads(line)
        do: Any = {"about": _about, "warm": _warm, "time": _time}[request.pop("do")]
        try:
            answer = do(device=device, **request)
        except Exception as error:
            answer = {"failed": bench.failure(error)}
        print(json.dumps(answer), file=answers, flush=True)


def _about(peers: Sequence[str], device: str) -> dict[str, Any]:
    import deformnd

    from .kernels import cpu

    cuda = device != "cpu"
    return {
        "from": str(Path(str(deformnd.__file__)).resolve().parents[1]),
        "device": torch.cuda.get_device_name(device) if cuda else bench.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "deformnd": deformnd.__version__,
        "kernels": "Triton" if cuda else "C++ core" if cpu.available() else "reference",
        "versions": bench.versions(peers),
        "peers": [peer for peer in peers if bench.has(peer) and peer != "deformnd"],
    }


def _problem(sizes: dict[str, Any], dtype: str, device: str) -> bench.Problem:
    if device != "cpu":
        torch.cuda.empty_cache()  # Several processes share the device's memory.
    of: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()}
    return bench.Problem(Shape(**of), getattr(torch, dtype), device)


def _warm(sizes: dict[str, Any], dtype: str, phases: Sequence[str], device: str) -> dict[str, Any]:
    """Have the kernels of a layer compiled into the disk cache."""
    p = _problem(sizes, dtype, device)
    for phase in phases:
        bench.prepare("deformnd", p, phase, 1)()
    if device != "cpu":
        torch.cuda.synchronize()
    return {}


def _time(
    sizes: dict[str, Any],
    dtype: str,
    phases: Sequence[str],
    peers: Sequence[str],
    seconds: float,
    device: str,
) -> dict[str, Any]:
    torch.backends.cudnn.benchmark = True
    with nullcontext() if device == "cpu" else bench.one_core():
        p = _problem(sizes, dtype, device)
        threads = torch.get_num_threads()
        return {phase: bench.measure(p, phase, peers, threads, seconds) for phase in phases}


# The run


def run(
    layers: dict[str, Shape],
    dtypes: Sequence[str],
    peers: Sequence[str] = ("dense", "torchvision"),
    phases: Sequence[str] = bench.PHASES,
    device: str = "cpu",
    *,
    seconds: float = math.inf,
    row_seconds: float = 1.0,
    threads: int | None = None,
    processes: int = 0,
    portable: bool = False,
    cold: bool = False,
    against: Path | None = None,
    about: dict[str, Any] | None = None,
    path: Path | None = None,
) -> dict[str, Any]:
    """Time layers in their order until the time is up; prints a line for each.

    Args:
        layers: by name.
        dtypes: of bench.DTYPES.
        peers: of bench.PEERS, beside deformnd; those that are not installed are left out.
        phases: "forward", "backward" or both.
        device: "cpu", "cuda" or "cuda:N".
        seconds: after which no layer is begun.
        row_seconds: for each phase of a layer on a CPU.
        threads: on a CPU; None: torch's own number.
        processes: that compile kernels ahead, side by side; 0: none.
        portable: without the kernels for Hopper.
        cold: compile where a kernel is first needed, into an empty disk cache.
        against: another source tree, whose operators take turns with these.
        about: what else the report shall say, such as a seed.
        path: a file that holds the report after each layer.

    Returns:
        The report, of which `text` makes what is printed at the end.
    """
    from tqdm import tqdm

    start = time.monotonic()
    jobs = [(name, shape, dtype) for name, shape in layers.items() for dtype in dtypes]
    options = {"device": device, "threads": threads, "portable": portable}
    trees = [Path(__file__).resolve().parents[1], *([tree_of(against)] if against else [])]
    with ExitStack() as stack:
        empty = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def worker(tree: Path) -> Worker:
            cache = empty / str(trees.index(tree)) if cold else None
            return stack.enter_context(closing(Worker(tree, options, cache)))

        timers = [worker(tree) for tree in trees]
        ahead = [[worker(tree) for _ in range(0 if cold else processes)] for tree in trees]
        block = 4 * len(ahead[0]) or len(jobs)
        report: dict[str, Any] = {**_introduce(timers, trees, peers), **(about or {})}
        report |= {"portable": portable, "cold": cold, "layers": len(layers)}
        report |= {"compile s": 0.0, "seconds": 0.0, "rows": []}
        if path:
            _write(report, path)
        tqdm.write(_head(bool(against), cold))
        progress = stack.enter_context(tqdm(total=len(jobs), unit="layer", disable=None))
        for at, (name, shape, dtype) in enumerate(jobs):
            if at % block == 0 and ahead[0]:
                progress.set_description("compile")
                part = jobs[at : at + block]
                report["compile s"] += _compile(ahead, part, phases, start + seconds)
            if time.monotonic() - start > seconds:
                break
            progress.set_description(f"{name} {dtype}")
            asked: dict[str, Any] = {"do": "time", "sizes": shape._asdict(), "dtype": dtype}
            asked |= {"phases": list(phases), "seconds": row_seconds}
            row = {"name": name, **_row(timers, asked, report["peers"])}
            tqdm.write(show(row, bool(against), cold))
            report["rows"].append(row)
            report["seconds"] = time.monotonic() - start
            if path:
                _write(report, path)
            progress.update()
    return report


def _write(report: dict[str, Any], path: Path) -> None:
    """Write the report in one step, so that a run that is cut off leaves a whole one."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(path)


def _introduce(
    timers: Sequence[Worker], trees: Sequence[Path], peers: Sequence[str]
) -> dict[str, Any]:
    """What the report says of the device and the versions."""
    said = [timer.ask({"do": "about", "peers": list(peers)}) for timer in timers]
    for answer, tree in zip(said, trees, strict=True):
        if "failed" in answer:
            raise RuntimeError(f"deformnd of {tree} does not run: {answer['failed']}")
        if answer["from"] != str(tree):  # An editable installation may come before all paths.
            raise RuntimeError(f"{tree} was asked for, and deformnd is that of {answer['from']}")
    report = said[0]
    del report["from"]
    if len(said) > 1:
        report["against"] = str(trees[1])
    return report


def _compile(
    ahead: Sequence[Sequence[Worker]],
    jobs: Sequence[tuple[str, Shape, str]],
    phases: Sequence[str],
    stop: float,
) -> float:
    """Compile ahead; returns the seconds it took. What fails fails again where it is timed."""
    start = time.monotonic()
    for several in ahead:
        idle: SimpleQueue[Worker] = SimpleQueue()
        for each in several:
            idle.put(each)

        def warm(job: tuple[str, Shape, str], idle: SimpleQueue[Worker] = idle) -> None:
            if time.monotonic() > stop:
                return
            _, shape, dtype = job
            asked = {"sizes": shape._asdict(), "dtype": dtype, "phases": list(phases)}
            one = idle.get()
            try:
                if "failed" in one.ask({"do": "warm", **asked}):
                    one.close()
            finally:
                idle.put(one)

        with ThreadPoolExecutor(len(several)) as pool:
            list(pool.map(warm, jobs))
    return time.monotonic() - start


def _row(timers: Sequence[Worker], asked: dict[str, Any], peers: Sequence[str]) -> dict[str, Any]:
    """A layer's figures, of this tree with the peers and of the other one alone."""
    shape = Shape(**asked["sizes"])
    row: dict[str, Any] = {"layer": describe(shape), "depthwise": depthwise(shape)}
    row |= {"sizes": asked["sizes"], "dtype": asked["dtype"]}
    # deformnd comes first: an error of a peer that spoils the device must not be taken for its own.
    answer = timers[0].ask({**asked, "peers": ["deformnd", *peers]})
    if "failed" in answer:
        why = answer["failed"]
        timers[0].close()
        answer = timers[0].ask({**asked, "peers": ["deformnd"]})
        if "failed" in answer:
            timers[0].close()
            row["failed"] = answer.pop("failed")
        for phase in answer:
            answer[phase] |= {peer: {"failed": why} for peer in peers}
    row |= answer
    for phase in asked["phases"]:
        if "failed" in row.get(phase, {}).get("deformnd", {}):
            row["failed"] = row[phase]["deformnd"]["failed"]
            timers[0].close()
    errors = [row[f]["deformnd"].get("error", math.nan) for f in asked["phases"] if f in row]
    row["wrong"] = "failed" not in row and not all(e <= TOLERANCE[row["dtype"]] for e in errors)
    for other in timers[1:]:
        theirs = other.ask({**asked, "peers": ["deformnd"]})
        for phase in asked["phases"]:
            found = theirs.get(phase, {}).get("deformnd", {"failed": theirs.get("failed")})
            row.setdefault(phase, {})["against"] = found
            if "failed" in found:
                other.close()
    return row


# What is printed


def ratio(row: dict[str, Any], phase: str, peer: str, time: str = "ms") -> float | None:
    """A peer's time divided by deformnd's; above 1 deformnd is faster."""
    found = row.get(phase, {})
    ours, theirs = (found.get(name, {}).get(time) for name in ("deformnd", peer))
    return theirs / ours if ours and theirs else None


def _peers(against: bool) -> dict[str, str]:
    return {"torchvision": "tv", "dense": "dense", **({"against": "other"} if against else {})}


def _label(row: dict[str, Any]) -> str:
    return row["layer"] if row["name"] == row["layer"] else f"{row['name']}: {row['layer']}"


def _head(against: bool, cold: bool) -> str:
    columns = "".join(f"{word:>7}" for word in _peers(against).values())
    first = f"{'first s':>16}" if cold else ""
    return (
        f"{'ms, and how many times as long the peers take':52}{'dtype':9}{'forward':>9}{columns}"
        f"{'backward':>10}{columns}{'host us':>12}{first}   error"
    )


def show(row: dict[str, Any], against: bool = False, cold: bool = False) -> str:
    """A layer's line."""
    text = f"{_label(row):51} {row['dtype']:8}"
    if "failed" in row:
        return f"{text} FAILED: {row['failed']}"

    def pair(key: str, form: str) -> str:
        values = [row.get(phase, {}).get("deformnd", {}).get(key) for phase in bench.PHASES]
        return "/".join("-" if v is None else format(v, form) for v in values)

    for phase, width in (("forward", 10), ("backward", 10)):
        ms = row.get(phase, {}).get("deformnd", {}).get("ms")
        text += f"{'-' if ms is None else format(ms, '.4g'):>{width}}"
        for peer in _peers(against):
            value = ratio(row, phase, peer)
            text += f"{'-' if value is None else format(value, '.2f'):>7}"
    text += f"{pair('host us', '.0f'):>12}" + (f"{pair('first s', '.2f'):>16}" if cold else "")
    return f"{text}   {pair('error', '.0e')}" + (" WRONG" if row["wrong"] else "")


def failures(report: dict[str, Any]) -> list[str]:
    """What failed or is wrong of deformnd."""
    return [show(row) for row in report["rows"] if "failed" in row or row["wrong"]]


def text(report: dict[str, Any], most: int = 25) -> str:
    """The means, and the `most` slowest layers of each kind."""
    rows = report["rows"]
    lines = [f"{report['device']}, {report['cores']} cores, {report['threads']} threads, kernels: "]
    lines[0] += report["kernels"] + " without Hopper's" * report["portable"]
    lines.append(", ".join(f"{k} {v}" for k, v in report["versions"].items()))
    count = len({(row["name"], row["layer"]) for row in rows})
    lines.append(f"{count} of {report['layers']} layers in {report['seconds']:.0f} s")
    if report["compile s"]:
        lines[-1] += f", {report['compile s']:.0f} s of it to compile ahead"
    lines.append("Geometric means (the least) of the peers' times divided by deformnd's:")
    lines += _all_means(report, "ms")
    if any("device ms" in row.get("forward", {}).get("deformnd", {}) for row in rows):
        lines.append("The same of the device alone, which waits for no host:")
        lines += _all_means(report, "device ms")
    for peer, what, below in (
        ("torchvision", "slower than torchvision", 1),
        ("dense", f"over {SLOW:g} x dense", 1 / SLOW),
    ):
        if peer in report["peers"]:
            lines += _listed(what, rows, peer, below, most)
    if "against" in report:
        lines += _listed("slower than the other tree by 5 %", rows, "against", 1 / 1.05, most)
    lines += _failed_peers(rows)
    wrong = failures(report)
    lines += [f"failed or wrong: {len(wrong)}", *(f"  {line}" for line in wrong)]
    return "\n".join(lines)


def _all_means(report: dict[str, Any], time: str) -> Iterator[str]:
    """The means of every peer, dtype and phase, a line each."""
    rows = report["rows"]
    kinds = [(d, f) for d in dict.fromkeys(r["dtype"] for r in rows) for f in bench.PHASES]
    for peer in (*report["peers"], *(["against"] if "against" in report else [])):
        for dtype, phase in kinds:
            there = [(ratio(r, phase, peer, time), r) for r in rows if r["dtype"] == dtype]
            counted = [q for q, r in there if q and not r["depthwise"]]
            apart = [q for q, r in there if q and r["depthwise"]]
            if counted or apart:
                yield f"  {peer:12} {dtype:9} {phase:9}" + _means(counted, apart)


def _means(counted: Sequence[float], apart: Sequence[float]) -> str:
    parts = [("", counted), ("depthwise ", apart)]
    return " " + "; ".join(
        f"{what}{mean(q):.2f} ({min(q):.2f}), {len(q)} layers" for what, q in parts if q
    )


def _listed(
    what: str, rows: Iterable[dict[str, Any]], peer: str, below: float, most: int
) -> Iterator[str]:
    """The layers whose ratio is below a limit, the slowest first."""
    found = []
    for row in rows:
        for phase in bench.PHASES:
            value = ratio(row, phase, peer)
            if value is not None and value < below:
                found.append((value, phase, row))
    found.sort(key=lambda each: each[0])
    yield f"{what}: {len(found)}"
    for value, phase, row in found[:most]:
        yield f"  {value:.2f} {phase:9} {row['dtype']:9} {_label(row)}"
    if len(found) > most:
        yield f"  and {len(found) - most} more"


def _failed_peers(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Each message once, and how often it came."""
    counts: dict[tuple[str, str, str], int] = {}
    for row in rows:
        for phase in bench.PHASES:
            for peer, found in row.get(phase, {}).items():
                if peer != "deformnd" and "failed" in found:
                    key = (peer, row["dtype"], str(found["failed"]))
                    counts[key] = counts.get(key, 0) + 1
    for (peer, dtype, message), count in counts.items():
        yield f"{peer} failed {count} times in {dtype}: {message}"
