"""The command line: `deformnd` or `python -m deformnd`.

Exit codes: 0 done, 1 it failed or a check did not hold, 2 wrong usage. What a user can get wrong
ends with one line, never with a traceback.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__

TOLERANCE = 1e-3  # of the largest value, between engines


class UsageError(Exception):
    """What argparse cannot see; ends with exit code 2."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 it failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="deformnd",
        description="Deformable convolution for PyTorch: tools and demo.",
        epilog="Exit codes: 0 done, 1 it failed or a check did not hold, 2 wrong usage.",
    )
    parser.add_argument("--version", action="version", version=f"deformnd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_demo, _add_info, _add_bench, _add_export, _add_check):
        add(commands)
    options = parser.parse_args(arguments)
    name = f"deformnd {options.command}"
    try:
        code: int = options.run(options)
        return code
    except ImportError as error:
        print(f"{name} needs more packages: {error}", file=sys.stderr)
        print(f"install them with: pip install 'deformnd[{options.extra}]'", file=sys.stderr)
        return 1
    except UsageError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        # No such device, no such folder, an operator that the target cannot express ...
        print(f"{name}: {error}", file=sys.stderr)
        return 1


def _add(commands: Any, name: str, run: Any, extra: str, help: str, description: str) -> Any:
    parser = commands.add_parser(
        name,
        help=help,
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run, extra=extra)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(_positive(part) for part in text.replace("x", ",").split(","))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape, expected sizes such as 1,3,224,224"
        ) from None


def _add_demo(commands: Any) -> None:
    demo = _add(
        commands,
        "demo",
        _demo,
        "demo",
        "train a deformable and an ordinary network on real images, export, compare",
        "Trains the same small network twice on scikit-learn's handwritten digits, "
        "enlarged and randomly rotated, sheared and scaled: with ordinary and with packed "
        "deformable convolutions. Exports the deformable one to ONNX, runs it in ONNX Runtime, "
        "and writes model.onnx, report.md and sampling.png.",
    )
    demo.add_argument("--epochs", type=_positive, default=20, help="passes over the images")
    demo.add_argument("--out", type=Path, default=Path("deformnd-demo"), help="folder to write")
    demo.add_argument("--seed", type=int, default=0, help="seed of data, weights and order")
    demo.add_argument("--device", default="cpu", help="torch device to train on")


def _demo(options: Any) -> int:
    from .demo import run

    run(options.epochs, options.out, options.seed, options.device)
    return 0


def _add_info(commands: Any) -> None:
    _add(
        commands,
        "info",
        _info,
        "test",
        "versions, devices, the kernels that run here and why, and a self-test",
        "Says what is installed, which kernels the operators run on each device and why, and "
        "compares the six operators, forward and backward, with the definition in float64 on each "
        "device. Exit code 1 if one is wrong.",
    )


def _info(options: Any) -> int:
    from .system import describe, self_test

    print("\n".join(describe()))
    print("self-test, relative error of output and gradients in float32 against float64:")
    failed = False
    for name, device, error, ok in self_test():
        print(f"  {name:22} {device:6} {error:.0e}  {'ok' if ok else 'WRONG'}")
        failed |= not ok
    return int(failed)


def _add_bench(commands: Any) -> None:
    bench = _add(
        commands,
        "bench",
        _bench,
        "bench",
        "time, memory and error beside every peer that is installed",
        "Measures deformnd, dense convolution, torchvision, tvdcn, deformops, ONNX Runtime and "
        "OpenVINO, whichever are installed, in one run, taking turns: median times, ratios, peak "
        "memory, and relative error against float64. Prints tables in Markdown.",
    )
    bench.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    bench.add_argument("--shapes", help="names, with commas; unset: all of the device's")
    bench.add_argument(
        "--dtypes",
        help="names with commas, or all; unset: float32 on a CPU, else float16,bfloat16,float32",
    )
    bench.add_argument("--peers", help="names, with commas; unset: all")
    bench.add_argument("--phases", default="forward,backward", help="either or both")
    bench.add_argument("--seconds", type=float, default=1.0, help="for each row, on a CPU")
    bench.add_argument("--threads", type=_positive, help="on a CPU; unset: torch's own number")
    bench.add_argument("--no-memory", action="store_true", help="skip the peak memory")
    bench.add_argument("--json", type=Path, help="write the results, device and versions")
    bench.add_argument("--plot", type=Path, help="write a picture of the ratios")
    bench.add_argument("--list", action="store_true", help="list the shapes, and do nothing")


def _bench(options: Any) -> int:
    import torch

    from . import bench

    known = {**bench.SHAPES, **bench.CPU_SHAPES}
    if options.list:
        for name, shape in known.items():
            print(f"{name:7}", ", ".join(f"{k} {v}" for k, v in shape._asdict().items()))
        return 0
    cpu = options.device == "cpu"
    if not cpu and not (options.device.startswith("cuda") and torch.cuda.is_available()):
        raise UsageError(f"device {options.device!r} is not here, expected cpu or a CUDA device")

    def choose(what: str, text: str | None, default: Any, names: Any) -> list[str]:
        chosen = (
            list(default) if text is None else list(names) if text == "all" else text.split(",")
        )
        for name in chosen:
            if name not in names:
                raise UsageError(f"no {what} {name!r}, expected some of {', '.join(names)}")
        return chosen

    shapes = choose("shape", options.shapes, bench.CPU_SHAPES if cpu else bench.SHAPES, known)
    default = ["float32"] if cpu else bench.DTYPES[:3]
    dtypes = choose("dtype", options.dtypes, default, bench.DTYPES)
    peers = choose("peer", options.peers, list(bench.PEERS), bench.PEERS)
    phases = choose("phase", options.phases, bench.PHASES, bench.PHASES)
    if options.threads:
        torch.set_num_threads(options.threads)
    report = bench.run(
        shapes, dtypes, peers, phases, options.device, options.seconds, not options.no_memory
    )
    print(bench.table(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.plot:
        bench.plot(report, options.plot)
    return 0


def _add_export(commands: Any) -> None:
    export = _add(
        commands,
        "export",
        _export,
        "onnx",
        "write a model as ONNX for the engine that shall run it",
        "Calls FACTORY of the Python file (or importable module) for the model, exports it, runs "
        "the file in the target's engine if that is installed, and compares. FACTORY returns the "
        "model, or the model and the tuple of its inputs.",
    )
    export.add_argument("model", metavar="MODEL.py:FACTORY", help="where the model comes from")
    export.add_argument("--out", type=Path, help="file to write; unset: FACTORY.onnx")
    export.add_argument(
        "--target",
        default="onnxruntime",
        help="onnxruntime, openvino, standard or precise: see docs/onnx.md",
    )
    export.add_argument(
        "--input",
        type=_sizes,
        action="append",
        metavar="SIZES",
        help="shape of an input, such as 1,3,224,224 (random values); repeat it for more inputs",
    )
    export.add_argument("--dynamic", action="store_true", help="leave batch and spatial sizes open")
    export.add_argument("--opset", type=int, help="unset: the target's best")
    export.add_argument("--weights", type=Path, help="a state_dict to load first")
    export.add_argument("--no-verify", action="store_true", help="do not run the file")


def _load(spec: str) -> tuple[Any, tuple[Any, ...] | None]:
    """The model that MODEL.py:FACTORY or module:FACTORY makes, and its inputs if it says them."""
    from torch import nn

    source, separator, name = spec.rpartition(":")
    if not separator or not source or not name:
        raise UsageError(f"{spec!r} is no MODEL.py:FACTORY")
    path = Path(source)
    if path.suffix == ".py":
        if not path.is_file():
            raise UsageError(f"there is no file {source}")
        found = importlib.util.spec_from_file_location(path.stem, path)
        assert found is not None and found.loader is not None
        module = importlib.util.module_from_spec(found)
        sys.modules[path.stem] = module
        sys.path.insert(0, str(path.parent))
        try:
            found.loader.exec_module(module)
        except Exception as error:
            raise UsageError(f"{source} does not run: {type(error).__name__}: {error}") from None
        finally:
            sys.path.remove(str(path.parent))
    else:
        try:
            module = importlib.import_module(source)
        except ImportError as error:
            raise UsageError(f"cannot import {source}: {error}") from None
    factory = getattr(module, name, None)
    if not callable(factory):
        raise UsageError(f"{source} has no function {name}")
    try:
        made = factory() if not isinstance(factory, nn.Module) else factory
    except Exception as error:
        raise UsageError(f"{spec} does not run: {type(error).__name__}: {error}") from None
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{spec} returned a {type(model).__name__}, expected a torch.nn.Module")
    return model.eval(), inputs if inputs is None or isinstance(inputs, tuple) else (inputs,)


def _export(options: Any) -> int:
    import logging

    import torch

    from . import onnx

    if options.target not in onnx.TARGETS:
        raise UsageError(f"no target {options.target!r}, expected one of {', '.join(onnx.TARGETS)}")
    model, inputs = _load(options.model)
    if options.input:
        inputs = tuple(torch.randn(size) for size in options.input)
    if inputs is None:
        raise UsageError("the input's shape is not known: give --input, such as --input 1,3,64,64")
    if options.weights:
        if not options.weights.is_file():
            raise UsageError(f"there is no file {options.weights}")
        model.load_state_dict(torch.load(options.weights, map_location="cpu", weights_only=True))
    dynamic = None
    if options.dynamic:
        auto = torch.export.Dim.DYNAMIC
        axes = [{a: auto for a in range(t.dim()) if a != 1} for t in inputs]
        dynamic = tuple(axes)
    path = options.out or Path(options.model.rpartition(":")[2] + ".onnx")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx.export(
            model,
            inputs,
            path,
            target=options.target,
            opset=options.opset,
            dynamic_shapes=dynamic,
            verify=not options.no_verify,
        )
    return 0


def _add_check(commands: Any) -> None:
    check = _add(
        commands,
        "check",
        _check,
        "onnx",
        "say what an ONNX file needs, which engines run it, and whether they agree",
        "Lists the operators of the file, runs it on random input in ONNX Runtime and OpenVINO, "
        "whichever are installed, and compares their results with each other, and with the torch "
        "model if --model names it. Exit code 1 if no engine runs the file or results differ by "
        f"more than {TOLERANCE} of the largest value.",
    )
    check.add_argument("file", type=Path, metavar="FILE.onnx")
    check.add_argument("--model", metavar="MODEL.py:FACTORY", help="the model it was made from")
    check.add_argument("--weights", type=Path, help="the model's state_dict")
    check.add_argument(
        "--size",
        type=_positive,
        default=64,
        help="for sizes that the file leaves open (1 for the batch)",
    )
    check.add_argument(
        "--input",
        type=_sizes,
        action="append",
        metavar="SIZES",
        help="shape of an input; repeat it for more inputs",
    )


def _check(options: Any) -> int:
    import onnx
    import torch

    if not options.file.is_file():
        raise UsageError(f"there is no file {options.file}")
    try:
        graph = onnx.load(options.file, load_external_data=False)
    except Exception as error:  # whatever protobuf raises
        raise UsageError(f"{options.file} is no ONNX file: {error}") from None
    opsets = ", ".join(f"{o.domain or 'ai.onnx'} {o.version}" for o in graph.opset_import)
    print(f"{options.file}: opset {opsets}")
    names = Counter(
        (node.domain + "::" if node.domain else "") + node.op_type for node in graph.graph.node
    )
    print("operators: " + ", ".join(f"{name} {count}" for name, count in names.most_common()))
    own = {f"{f.domain}::{f.name}" for f in graph.functions}
    foreign = [name for name in names if "::" in name]
    for name in foreign:
        what = "defined in the file" if name in own else "custom: an engine must bring it"
        print(f"  {name}: {what}")

    inputs = _random_inputs(graph.graph, options.size, options.input)
    results: dict[str, Any] = {}
    for engine in ("onnxruntime", "openvino"):
        results |= _run_engine(engine, options.file, inputs)
    if not results:
        print("no engine runs this file", file=sys.stderr)
        return 1
    if options.model:
        model, _ = _load(options.model)
        if options.weights:
            model.load_state_dict(torch.load(options.weights, weights_only=True))
        with torch.no_grad():
            out = model(*inputs)
        leaves = torch.utils._pytree.tree_leaves(out)
        results = {"torch": [t for t in leaves if isinstance(t, torch.Tensor)], **results}
    if len(results) == 1:
        print("nothing to compare with: install another engine, or name the --model")
    (first, expected), *others = results.items()
    failed = False
    for other, got in others:
        worst = _difference(got, expected)
        ok = worst <= TOLERANCE
        failed |= not ok
        verdict = "ok" if ok else "DIFFERS"
        print(f"{other} against {first}: {worst:.1e} of the largest value, {verdict}")
    return int(failed)


def _random_inputs(graph: Any, size: int, given: list[tuple[int, ...]] | None) -> list[Any]:
    import numpy as np
    import onnx
    import torch

    initial = {t.name for t in graph.initializer}
    wanted = [i for i in graph.input if i.name not in initial]
    if given and len(given) != len(wanted):
        raise UsageError(f"{len(given)} --input given, expected {len(wanted)}")
    made = []
    generator = np.random.default_rng(0)
    for k, value in enumerate(wanted):
        kind = value.type.tensor_type
        dims = [
            d.dim_value if d.HasField("dim_value") else (1 if axis == 0 else size)
            for axis, d in enumerate(kind.shape.dim)
        ]
        shape = given[k] if given else tuple(dims)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        real = np.issubdtype(dtype, np.floating)
        array = generator.standard_normal(shape) if real else np.zeros(shape)
        print(f"input {value.name}: {dtype} {list(shape)}" + ("" if real else " (zeros)"))
        made.append(torch.from_numpy(array.astype(dtype)))
    return made


def _run_engine(engine: str, path: Path, inputs: list[Any]) -> dict[str, Any]:
    from .onnx.export import _RUNNERS

    try:
        version = importlib.import_module(engine).__version__.split("-")[0]
    except ImportError:
        print(f"{engine}: not installed")
        return {}
    try:
        outputs = _RUNNERS[engine](str(path))[1](inputs)
    except Exception as error:  # each engine has its own; the message is what counts
        reason = " ".join(str(error).split())
        print(f"{engine} {version}: does not run it: {reason[:300]}")
        if engine == "openvino" and "DeformConv" in reason:
            print("  deformnd.onnx.read_openvino_model reads it; so does target 'openvino' export")
        return {}
    print(f"{engine} {version}: runs it")
    return {engine: outputs}


def _difference(got: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest, in units of the expected output's largest value; infinite for other shapes."""
    worst = 0.0 if len(got) == len(expected) else float("inf")
    for g, e in zip(got, expected, strict=False):
        if g.shape != e.shape:
            return float("inf")
        if e.numel():
            scale = float(e.double().abs().max()) or 1.0
            difference = (g.double() - e.double()).abs().max()
            worst = max(worst, float(difference.nan_to_num(float("inf"))) / scale)
    return worst
