"""The README's pictures of the committed results: each peer's time in units of deformnd's.

python benchmarks/plot.py
"""

import json
from pathlib import Path
from typing import Any

from deformnd import bench

HERE = Path(__file__).parent
PICTURES = HERE.parent / "docs" / "pictures"


def cpu() -> dict[str, Any]:
    report = json.loads((HERE / "results" / "cpu.json").read_text())
    rows = []
    for name, case in report["cases"].items():
        for phase in ("forward", "forward+backward"):
            found = case.get(phase, {}).get("2 threads")
            if found:
                peers = {peer: {"ms": times["median"]} for peer, times in found.items()}
                rows.append({"shape": name, "dtype": "float32", "phase": phase, "peers": peers})
    cpu = report["device"]["cpu"].removeprefix("model name ")
    return {"device": f"{report['device']['cores']} cores, {cpu}", "rows": rows}


def gpu() -> dict[str, Any]:
    report = json.loads((HERE / "results" / "gpu_h200.json").read_text())
    rows = []
    for row in report["rows"]:
        if row["layout"] != "channels first" or "dense forward" not in row:
            continue
        for phase in ("forward", "backward"):
            peers = {"deformnd": {"ms": row[phase]}}
            for peer in bench.PEERS:
                if f"{peer} {phase}" in row:
                    peers[peer] = {"ms": row[f"{peer} {phase}"]}
            about = {"shape": row["name"], "dtype": row["dtype"], "phase": phase}
            rows.append({**about, "peers": peers})
    return {"device": report["device"], "rows": rows}


if __name__ == "__main__":
    bench.plot(cpu(), PICTURES / "speed_cpu.png")
    bench.plot(gpu(), PICTURES / "speed_gpu.png")
