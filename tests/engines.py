"""Every operator in engines that this project does not install: which target runs where.

    python tests/engines.py CACHE                 every engine, and the table of docs/engines.md
    python tests/engines.py CACHE tract iree      these engines
    python tests/engines.py CACHE --sample        the quick ones, in 2-D, and nothing is written

Each engine is installed from its package into an environment of its own below the folder CACHE,
with the versions below. What cannot be installed is said, and left out. Results go to
tests/data/engines.json, and of that the table is made. A call that was right in that file and is
not any more makes the script fail.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tests" / "data" / "engines.json"
PAGE = ROOT / "docs" / "engines.md"
TORCH = "torch==2.13.0"
# Of each engine its packages; the first has the version that the table names.
ENGINES = {
    "tract": ["tract==0.23.9"],
    "IREE": ["iree-base-compiler==3.13.0", "iree-base-runtime==3.13.0", "onnx"],
    "TVM": ["apache-tvm==0.27.0.post1", "onnx"],
    "ExecuTorch": ["executorch==1.5.1", TORCH],
    "ncnn": ["ncnn==1.0.20261020", "pnnx==20261020", TORCH],
    "ORT-web": ["onnxruntime-web@1.30.0"],  # npm's
}
QUICK = ("tract", "IREE")
# What they are given; of "own" the comments below tell.
TARGETS = ("onnxruntime", "standard", "precise", "deformnd", "own")
OPERATORS = ("convolution", "transposed", "aggregation", "attention")
TIMEOUT = 120
WRONG = 1e-3  # of the largest value; a rounding of GridSample's positions is much less

# What each engine does in its own environment: arrays in, the first output out.


def tract(model, arrays):
    import tract

    network = tract.onnx().load(model).into_model().into_runnable()
    return network.run(arrays)[0].to_numpy()


def iree(model, arrays):
    """By its commands, since its importer writes files."""
    here = Path(sys.executable).parent

    def call(command, *arguments):
        done = subprocess.run([here / command, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{command}: {done.stderr}")

    code, module = "model.mlir", "model.vmfb"
    call("iree-import-onnx", model, "-o", code)
    call(
        "iree-compile",
        code,
        "-o",
        module,
        "--iree-hal-target-device=local",
        "--iree-hal-local-target-device-backends=llvm-cpu",
        "--iree-llvmcpu-target-cpu=host",
    )
    for i, array in enumerate(arrays):
        np.save(f"input{i}.npy", array)
    call(
        "iree-run-module",
        "--device=local-sync",
        f"--module={module}",
        "--function=" + re.search(r"func.func @([\w$.]+)", Path(code).read_text())[1],
        *(f"--input=@input{i}.npy" for i in range(len(arrays))),
        "--output=@output.npy",
    )
    return np.load("output.npy")


def tvm(model, arrays):
    import onnx
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    module = relax.transform.DecomposeOpsForInference()(from_onnx(onnx.load(model)))
    module = relax.transform.LegalizeOps()(module)
    machine = relax.VirtualMachine(tvm.compile(module, target="llvm"), tvm.cpu())
    result = machine["main"](*(tvm.runtime.tensor(array) for array in arrays))
    return (result if hasattr(result, "numpy") else result[0]).numpy()


def executorch(model, arrays):
    """Of deformnd.export.to_core_aten's program."""
    import torch
    from executorch.exir import to_edge
    from executorch.runtime import Runtime

    program = to_edge(torch.export.load(model)).to_executorch()
    method = Runtime.get().load_program(program.buffer).load_method("forward")
    return method.execute([torch.from_numpy(array) for array in arrays])[0].numpy()


def ncnn(model, arrays):
    """By way of pnnx."""
    import ncnn

    shapes = ",".join(f"[{','.join(map(str, array.shape))}]f32" for array in arrays)
    shutil.copy(model, "model.onnx")
    pnnx = [Path(sys.executable).parent / "pnnx", "model.onnx", f"inputshape={shapes}", "fp16=0"]
    said = subprocess.run(pnnx, capture_output=True, text=True)
    base = "model.ncnn."
    if not Path(base + "param").exists():
        raise RuntimeError(f"pnnx ends without a result (status {said.returncode})")
    net = ncnn.Net()
    options = net.opt
    options.use_fp16_packed = options.use_fp16_storage = options.use_fp16_arithmetic = False
    options.use_bf16_storage = False
    if net.load_param(base + "param") or net.load_model(base + "bin"):
        raise RuntimeError("ncnn does not load what pnnx made of it")
    run = net.create_extractor()
    for i, array in enumerate(arrays):
        run.input(f"in{i}", ncnn.Mat(np.ascontiguousarray(array), batch_index=0).clone())
    status, result = run.extract("out0")
    if status:
        raise RuntimeError(f"ncnn ends with status {status}")
    return result.numpy(batch_index=0).copy()


WEB = """
import * as ort from "onnxruntime-web";
import fs from "fs";
const given = JSON.parse(fs.readFileSync("inputs.json"));
const session = await ort.InferenceSession.create("model.onnx", {executionProviders: ["wasm"]});
const feeds = {};
session.inputNames.forEach((name, i) => {
  feeds[name] = new ort.Tensor("float32", Float32Array.from(given[i].data), given[i].shape);
});
const output = (await session.run(feeds))[session.outputNames[0]];
fs.writeFileSync("output.json", JSON.stringify({shape: output.dims, data: [...output.data]}));
"""


def ort_web(model, arrays):
    """WebAssembly, in node; the working folder is the one with the packages."""
    shutil.copy(model, "model.onnx")
    given = [{"shape": a.shape, "data": a.reshape(-1).tolist()} for a in arrays]
    Path("inputs.json").write_text(json.dumps(given))
    Path("run.mjs").write_text(WEB)
    done = subprocess.run(["node", "run.mjs"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    output = json.loads(Path("output.json").read_text())
    return np.array(output["data"], np.float32).reshape(output["shape"])


RUN = {
    "tract": tract,
    "IREE": iree,
    "TVM": tvm,
    "ExecuTorch": executorch,
    "ncnn": ncnn,
    "ORT-web": ort_web,
}


def install(engine: str, folder: Path) -> str | None:
    """The Python to run an engine with, or None where it cannot be had."""
    web = engine == "ORT-web"
    python = sys.executable if web else str(folder / "bin" / "python")
    done = folder / "installed.json"
    if done.exists() and json.loads(done.read_text()) == ENGINES[engine]:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if web:
        commands = [["npm", "install", "--silent", "--prefix", str(folder), *ENGINES[engine]]]
    else:
        pip = [python, "-m", "pip", "install", "--quiet", "numpy", *ENGINES[engine]]
        commands = [[sys.executable, "-m", "venv", str(folder)], pip]
    for command in commands:
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
            print(f"{engine}: not tested, since it cannot be installed ({said[-1:]})")
            return None
    done.write_text(json.dumps(ENGINES[engine]))
    return python


def models(folder: Path, ranks: tuple[int, ...], wanted: set[str]) -> list[str]:
    """Write what the engines are given, each with its inputs and what is right; their names."""
    import torch

    import deformnd
    import deformnd.export
    import deformnd.onnx

    class Call(torch.nn.Module):
        def __init__(self, operator: str, n: int, weight: torch.Tensor) -> None:
            super().__init__()
            self.operator, self.n = operator, n
            self.weight = torch.nn.Parameter(weight, requires_grad=False)

        def forward(self, x, offset, mask):
            if self.operator == "attention":
                levels = [(6, 5, 4)[-self.n :], (3, 4, 2)[-self.n :]]
                return deformnd.deform_attention(x, levels, offset, mask)
            if self.operator == "aggregation":
                function = getattr(deformnd, f"deform_aggregate{self.n}d")
                return function(x, offset, mask, kernel_size=3, padding=1)
            name = "deform_conv_transpose" if self.operator == "transposed" else "deform_conv"
            return getattr(deformnd, f"{name}{self.n}d")(x, self.weight, offset, mask, padding=1)

    logging.disable(logging.WARNING)  # of torch's exporter, about torchvision
    torch.manual_seed(0)
    names = []
    for n in ranks:
        size, points = (5, 6, 7)[-n:], 3**n
        for operator in OPERATORS:
            args = (
                torch.randn(1, 4, *size),
                2 * torch.randn(1, n * points, *size),  # some lie outside
                torch.rand(1, points, *size),
            )
            if operator == "attention":
                pixels = math.prod((6, 5, 4)[-n:]) + math.prod((3, 4, 2)[-n:])
                args = (
                    torch.randn(1, pixels, 2, 4),
                    1.4 * torch.rand(1, 7, 2, 2, 3, n) - 0.2,
                    torch.rand(1, 7, 2, 2, 3),
                )
            model = Call(operator, n, torch.randn(4, 4, *[3] * n)).eval()
            right = model.double()(*(a.double() for a in args)).float()
            model.float()
            for target in ("onnxruntime", "standard", "precise", "deformnd", "ncnn", "core_aten"):
                name = f"{operator}-{n}-{target}"
                base = folder / name
                if target not in wanted:
                    continue
                try:
                    if target == "core_aten":
                        program = torch.export.export(model, args)
                        program = deformnd.export.to_core_aten(program)
                        torch.export.save(program, f"{base}.pt2")
                    else:
                        deformnd.onnx.export(
                            model, args, f"{base}.onnx", target=target, verify=False, verbose=False
                        )
                except deformnd.onnx.UnsupportedError as error:
                    reason = str(error).partition(": ")[2].partition(": ")[2]
                    (folder / f"{name}.refused").write_text(reason)
                arrays = {f"input{i}": a.numpy() for i, a in enumerate(args)}
                np.savez(f"{base}.npz", right=right.numpy(), **arrays)
                names.append(name)
    return names


def attempt(engine: str, python: str, folder: Path, name: str, home: Path) -> dict[str, object]:
    """What became of one model in one engine."""
    refused = folder / f"{name}.refused"
    if refused.exists():
        return {"reason": "not exported: " + refused.read_text()}
    model = folder / f"{name}.{'pt2' if engine == 'ExecuTorch' else 'onnx'}"
    result = folder / "output.npy"
    result.unlink(missing_ok=True)
    command = [python, str(Path(__file__).resolve()), "--run", engine, str(model), str(result)]
    work = str(home) if engine == "ORT-web" else tempfile.mkdtemp(dir=folder)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, cwd=work)
    except subprocess.TimeoutExpired:
        return {"reason": f"takes more than {TIMEOUT} s"}
    if not result.exists():
        if done.returncode < 0:
            return {"reason": f"crashes (signal {-done.returncode})"}
        return {"reason": short(done.stderr)}
    right, found = np.load(f"{folder / name}.npz")["right"], np.load(result)
    if found.size != right.size:
        return {"reason": f"returns shape {list(found.shape)}, expected {list(right.shape)}"}
    error = np.abs(found.reshape(right.shape) - right).max() / np.abs(right).max()
    return {"error": float(f"{error:.1e}")}


def short(text: str) -> str:
    """The line that says what went wrong, without what differs from one run to the next."""
    unknown = re.search(r"layer (\S+) not exists", text)  # which ncnn writes itself
    if unknown:
        return f"ncnn has no layer {unknown[1]}"
    text = re.sub(r"^ *(\d+:|at ).*", "", text, flags=re.MULTILINE)  # of Rust's stack
    text = re.sub(r'Translating node #\d+ "\S+" ', "", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\w*Error\b", line)]
    said = (errors or lines or ["no reason given"])[-1]
    said = re.sub(r"\S+\.mlir:\d+:\d+: |: %\d.*", "", said)  # of MLIR, places and values
    said = re.sub(r"\x1b\[[\d;]*m|/\S*/|0x[0-9a-f]+", "", said)
    return said.replace("|", "/").replace("`", "'")[:160]


def run(engine: str, model: str, result: str) -> None:
    """In the engine's own environment."""
    arrays = np.load(Path(model).with_suffix(".npz"))
    given = [arrays[key] for key in arrays.files if key != "right"]
    np.save(result, RUN[engine](model, given))


def table(results: dict) -> str:
    """Of docs/engines.md."""
    reasons: list[str] = []

    def cell(engine: str, operator: str, target: str) -> str:
        outcomes: dict[str, list[str]] = {}
        for n in (1, 2, 3):
            found = results[engine]["calls"].get(f"{operator}-{n}-{target}")
            if found is None:
                continue
            error = found.get("error")
            if error is not None and error < WRONG:
                said = "right"
            else:
                reason = found.get("reason", "")
                if error is not None:
                    reason = f"wrong by {error:.0e} of the largest value"
                reasons.append(reason) if reason not in reasons else None
                said = ("wrong" if error is not None else "no") + f" ({reasons.index(reason) + 1})"
            outcomes.setdefault(said, []).append(f"{n}-D")
        if len(outcomes) == 1:
            return next(iter(outcomes))
        return "; ".join(f"{', '.join(ranks)} {said}" for said, ranks in outcomes.items()) or "-"

    heads = ["engine", "operator", *(f'`"{t}"`' for t in TARGETS[:-1]), "its own"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for engine in ENGINES:
        if engine not in results:
            continue
        own = {"ExecuTorch": "core_aten", "ncnn": "ncnn"}.get(engine, "")
        for operator in OPERATORS:
            first = f"{engine} {results[engine]['version']}" if operator == OPERATORS[0] else ""
            cells = (cell(engine, operator, own if t == "own" else t) for t in TARGETS)
            lines.append("| " + " | ".join([first, operator, *cells]) + " |")
    return "\n".join([*lines, "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))])


def write_page(results: dict) -> None:
    text = PAGE.read_text()
    before, rest = text.split("<!-- engines -->\n")
    after = rest.split("<!-- end -->")[1]
    PAGE.write_text(f"{before}<!-- engines -->\n\n{table(results)}\n\n<!-- end -->{after}")


def main() -> int:
    if sys.argv[1:2] == ["--run"]:
        run(*sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path, help="the folder for the engines")
    parser.add_argument("engines", nargs="*", help=", ".join(ENGINES))
    parser.add_argument("--sample", action="store_true", help="2-D, and nothing is written")
    options = parser.parse_intermixed_args()
    names = {engine.lower(): engine for engine in ENGINES}
    for engine in options.engines:
        if engine.lower() not in names:
            parser.error(f"no engine {engine!r}, expected one of {', '.join(ENGINES)}")
    engines = [names[e.lower()] for e in options.engines]
    engines = engines or list(QUICK if options.sample else ENGINES)
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results, worse = dict(before), []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        wanted = {"standard", "precise"} if options.sample else {*TARGETS[:-1]}
        wanted |= {{"ExecuTorch": "core_aten", "ncnn": "ncnn"}.get(e, "standard") for e in engines}
        calls = models(folder, (2,) if options.sample else (1, 2, 3), wanted)
        for engine in engines:
            home = options.cache.resolve() / engine
            python = install(engine, home)
            if python is None:
                continue
            of_engine = {}
            for name in calls:
                target = name.rpartition("-")[2]
                if (target == "core_aten") != (engine == "ExecuTorch"):
                    continue
                if target == "ncnn" and engine != "ncnn":
                    continue
                found = of_engine[name] = attempt(engine, python, folder, name, home)
                print(engine, name, found.get("error", found.get("reason")), flush=True)
                was = before.get(engine, {}).get("calls", {}).get(name, {}).get("error", math.inf)
                if was < WRONG <= found.get("error", math.inf):
                    worse.append(f"{engine} {name}")
            version = re.split("[=@]+", ENGINES[engine][0])[1]
            results[engine] = {"version": version, "with": ENGINES[engine], "calls": of_engine}
    if not options.sample:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        write_page(results)
    if worse:
        print("not right any more: " + ", ".join(worse))
    return bool(worse)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    sys.exit(main())
