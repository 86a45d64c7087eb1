"""The tables and pictures of the committed results, for README.md and docs/speed.md.

    python benchmarks/plot.py

reads results/cpu.json, gpu_h200.json and the sweeps, and writes each table between the comments
`<!-- table NAME -->` and `<!-- end -->` that stand in the two pages, and the pictures. A test
checks that the pages hold what this makes.
"""

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

from deformnd import bench, sweep

HERE = Path(__file__).parent
ROOT = HERE.parent
PICTURES = ROOT / "docs" / "pictures"
PAGES = (ROOT / "README.md", ROOT / "docs" / "speed.md")

# What a shape stands for. The sizes of all stand in docs/speed.md, the first table.
LABELS = {
    "big": "Wide layer, batch 8",
    "r50c3": "ResNet-50 stage 3, batch 2",
    "r50c4": "ResNet-50 stage 4, batch 2",
    "r50c5": "ResNet-50 stage 5, batch 2",
    "b64": "Narrow layer, batch 16",
    "bvsr": "BasicVSR++ alignment, 16 offset groups",
    "edvr": "EDVR alignment, 8 offset groups, batch 4",
    "k7": "7x7 kernel (BiRefNet)",
    "depthwise": "Depthwise layer, batch 8",
    "conv3d": "3-D layer (D3Dnet)",
    "conv1d": "1-D layer (speech), batch 16",
    "up2d": "Transposed 2-D layer, batch 4",
    "tiny": "Tiny layer",
    "A": "Narrow layer, one image",
    "B": "ResNet-50 stage 3, one image",
    "C": "ResNet-50 stage 4, one image",
    "D": "BasicVSR++ alignment, one image",
    "E": "7x7 kernel, one image",
}
# The rows of the README: shape, dtype, and whether on the GPU.
CHOSEN = (
    ("r50c3", "float16", True),
    ("r50c4", "float32", True),
    ("bvsr", "float16", True),
    ("big", "float16", True),
    ("B", "float32", False),
)


def read(name: str) -> Any:
    return json.loads((HERE / "results" / name).read_text())


def cpu_rows() -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds by shape, phase and peer, on two threads."""
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for name, case in read("cpu.json")["cases"].items():
        for phase in ("forward", "forward+backward"):
            found = case.get(phase, {}).get("2 threads", {})
            rows.setdefault(name, {})[phase] = {q: t["median"] for q, t in found.items()}
    return rows


def gpu_rows(name: str = "gpu_h200.json") -> list[dict[str, Any]]:
    """The rows of a named shape, of which all peers were timed with channels first."""
    return [
        row
        for row in read(name)["rows"]
        if row["layout"] == "channels first" and row["name"] in bench.SHAPES
    ]


def shown(ms: float | None) -> str:
    """Three significant digits, microseconds at most; or a dash."""
    if ms is None:
        return "-"
    return f"{ms:,.{min(3, max(0, 2 - math.floor(math.log10(ms))))}f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table_of_shapes() -> str:
    rows = []
    for name, label in LABELS.items():
        s = {**bench.SHAPES, **bench.CPU_SHAPES}[name]
        kernel = "x".join([str(s.kernel)] * len(s.size))
        more = [
            f"{key.replace('_', ' ')} {value}"
            for key in ("offset_groups", "groups", "stride", "dilation")
            if (value := getattr(s, key)) != 1
        ]
        size = "x".join(map(str, s.size))
        sizes = [str(s.batch), str(s.channels), size, str(s.out_channels), kernel]
        rows.append([label, f"`{name}`", *sizes, ", ".join(more)])
    head = ["layer", "in `deformnd bench`", "batch", "channels", "size", "outputs", "kernel"]
    return table([*head, "besides"], rows)


def table_of_cpu(phase: str) -> str:
    peers = {"dense": "dense", "deformnd": "deformnd", "torchvision": "torchvision"}
    if phase == "forward":  # Inference engines have no backward.
        peers |= {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
    rows = []
    for name, phases in cpu_rows().items():
        cells = [shown(phases[phase].get(q)) for q in peers]
        cells[1] = f"**{cells[1]}**"
        rows.append([LABELS[name], *cells])
    return table(["layer", *peers.values()], rows)


def table_of_gpu(phase: str, dtype: str) -> str:
    peers = {f"dense {phase}": "dense", phase: "deformnd"}
    if phase == "backward":
        peers["deterministic backward"] = "deformnd, deterministic"
    peers[f"torchvision {phase}"] = "torchvision"
    rows = []
    for row in gpu_rows():
        if row["dtype"] == dtype:
            cells = [shown(row.get(key)) for key in peers]
            cells[1] = f"**{cells[1]}**"
            rows.append([LABELS[row["name"]], *cells])
    return table(["layer", *peers.values()], rows)


def table_of_means() -> str:
    """Geometric means of other packages' times in units of deformnd's, without the tiny layer."""
    rows = []
    for peer, file in (
        ("torchvision", "gpu_h200.json"),
        ("tvdcn", "gpu_tvdcn_h200.json"),
        ("deformops", "gpu_deformops_h200.json"),
    ):
        cells = [f"{peer} {read(file)[peer].split('+')[0]}"]
        for dtype in ("float16", "float32"):
            for phase in ("forward", "backward"):
                ratios = [
                    row[f"{peer} {phase}"] / row[phase]
                    for row in gpu_rows(file)
                    if row["dtype"] == dtype and row["name"] != "tiny" and f"{peer} {phase}" in row
                ]
                mean = shown(statistics.geometric_mean(ratios)) if ratios else "-"
                cells.append(f"{mean} ({len(ratios)} layers)")
        rows.append(cells)
    head = ["package", "float16 forward", "float16 backward", "float32 forward"]
    return table([*head, "float32 backward"], rows)


def table_of_sweep() -> str:
    """Geometric means (and the least) against torchvision, for layers that nobody chose."""
    rows = []
    for kernels, file in (
        ("H100/H200", "sweep_h200.json"),
        ("other GPUs", "sweep_h200_portable.json"),
    ):
        for how, time in (("one call", "ms"), ("device alone", "device ms")):
            means = [
                mean_of_sweep(read(file)["rows"], dtype, phase, time)
                for dtype in ("float16", "float32")
                for phase in bench.PHASES
            ]
            if any(means):
                rows.append([f"{kernels}, {how}", *means])
    head = ["kernels", "float16 forward", "float16 backward", "float32 forward"]
    return table([*head, "float32 backward"], rows)


def mean_of_sweep(layers: list[dict[str, Any]], dtype: str, phase: str, time: str) -> str:
    """The mean of torchvision's times divided by deformnd's, and the least; "" for no layers."""
    found = [
        value
        for row in layers
        if row["dtype"] == dtype and not row["depthwise"]
        and (value := sweep.ratio(row, phase, "torchvision", time)) is not None
    ]  # fmt: skip
    return f"{statistics.geometric_mean(found):.1f} ({min(found):.1f})" if found else ""


def label(case: str) -> str:
    """What a case of benchmarks/cpu.py, such as "B, batch 8", is called in tables."""
    name, _, batch = case.partition(", ")
    return f"{LABELS[name]} x {batch.removeprefix('batch ')}" if batch else LABELS[name]


def table_of_threads(phase: str) -> str:
    """Milliseconds of deformnd by numbers of threads, and in units of the dense convolution's."""
    rows, cases = [], read("cpu_threads.json")["cases"]
    for name, case in cases.items():
        times = case[phase].values()
        cells = [(t["deformnd"]["median"], t["dense"]["median"]) for t in times]
        rows.append([label(name), *(f"{shown(o)} ({o / d:.2f})" for o, d in cells)])
    threads = next(iter(cases.values()))[phase]
    return table(["layer", *(f"{t} thread{'s' * (t != '1')}" for t in threads)], rows)


def table_of_bfloat16() -> str:
    """Milliseconds on all of the machine's processors, each the least of several runs."""
    rows = []
    for name, phases in read("cpu_threads.json")["bfloat16"].items():
        cells = [label(name)]
        for phase in ("forward", "forward+backward"):
            ms = {kind: times["best"] for kind, times in phases[phase].items() if "best" in times}
            cells += [shown(ms[kind]) for kind in ("dense bfloat16", "bfloat16", "float32")]
        rows.append(cells)
    head = ["layer", "forward: dense", "deformnd", "deformnd float32"]
    return table([*head, "with backward: dense", "deformnd", "deformnd float32"], rows)


def table_of_memory() -> str:
    found: dict[str, dict[str, Any]] = {}
    for row in gpu_rows():
        found.setdefault(row["name"], {})[row["dtype"]] = row
    peers = ("memory", "torchvision memory")
    rows = []
    for name, dtypes in found.items():
        cells = [dtypes.get(d, {}).get(key) for d in ("float16", "float32") for key in peers]
        rows.append([LABELS[name], *("-" if c is None else f"{c:,.0f}" for c in cells)])
    head = ["layer", "float16: deformnd", "torchvision"]
    return table([*head, "float32: deformnd", "torchvision"], rows)


def table_of_readme() -> str:
    cpu, gpu = cpu_rows(), {(row["name"], row["dtype"]): row for row in gpu_rows()}
    rows = []
    for name, dtype, on_gpu in CHOSEN:
        cells = []
        for peer in ("dense", "deformnd", "torchvision"):
            if on_gpu:
                row, key = gpu[name, dtype], "" if peer == "deformnd" else f"{peer} "
                forward, backward = row[f"{key}forward"], row[f"{key}backward"]
                cells.append((forward, forward + backward))
            else:
                phases = cpu[name]
                cells.append((phases["forward"][peer], phases["forward+backward"][peer]))
        numbers = [shown(cell[phase]) for phase in (0, 1) for cell in cells]
        numbers[1], numbers[4] = f"**{numbers[1]}**", f"**{numbers[4]}**"
        where = "H200" if on_gpu else "2 CPU cores"
        rows.append([f"{LABELS[name]}, {dtype}, {where}", *numbers])
    head = ["layer", "forward: ordinary", "deformnd", "torchvision"]
    return table([*head, "with backward: ordinary", "deformnd", "torchvision"], rows)


TABLES = {
    "shapes": table_of_shapes,
    "cpu forward": lambda: table_of_cpu("forward"),
    "cpu both": lambda: table_of_cpu("forward+backward"),
    "cpu threads forward": lambda: table_of_threads("forward"),
    "cpu threads both": lambda: table_of_threads("forward+backward"),
    "cpu bfloat16": table_of_bfloat16,
    "gpu forward float16": lambda: table_of_gpu("forward", "float16"),
    "gpu backward float16": lambda: table_of_gpu("backward", "float16"),
    "gpu forward float32": lambda: table_of_gpu("forward", "float32"),
    "gpu backward float32": lambda: table_of_gpu("backward", "float32"),
    "gpu means": table_of_means,
    "gpu memory": table_of_memory,
    "sweep": table_of_sweep,
    "readme": table_of_readme,
}


def filled(text: str) -> str:
    """A page with every table between its comments made anew."""

    def fill(found: re.Match[str]) -> str:
        return f"{found[1]}\n\n{TABLES[found[2]]()}\n\n{found[3]}"

    return re.sub(r"(<!-- table ([\w ]+) -->)\n.*?(<!-- end -->)", fill, text, flags=re.DOTALL)


def picture_of_cpu() -> dict[str, Any]:
    rows = [
        {
            **{"shape": LABELS[name], "dtype": "float32", "phase": phase},
            "peers": {peer: {"ms": ms} for peer, ms in peers.items()},
        }
        for name, phases in cpu_rows().items()
        for phase, peers in phases.items()
    ]
    device = read("cpu.json")["device"]
    return {
        "device": f"{device['cores']} cores, {device['cpu'].removeprefix('model name ')}",
        "rows": rows,
    }


def picture_of_gpu() -> dict[str, Any]:
    rows = []
    for row in gpu_rows():
        if row["dtype"] == "bfloat16":
            continue
        for phase in ("forward", "backward"):
            peers = {"deformnd": {"ms": row[phase]}}
            for peer in bench.PEERS:
                if f"{peer} {phase}" in row:
                    peers[peer] = {"ms": row[f"{peer} {phase}"]}
            about = {"shape": LABELS[row["name"]], "dtype": row["dtype"], "phase": phase}
            rows.append({**about, "peers": peers})
    return {"device": read("gpu_h200.json")["device"], "rows": rows}


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
    bench.plot(picture_of_cpu(), PICTURES / "speed_cpu.png")
    bench.plot(picture_of_gpu(), PICTURES / "speed_gpu.png")
