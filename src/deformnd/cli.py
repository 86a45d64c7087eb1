"""The command line: `deformnd` or `python -m deformnd`.

Exit codes: 0 done, 1 it failed or a check did not hold, 2 wrong usage. What a user can get wrong
ends with one line, never with a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import __version__

TOLERANCE = 1e-3  # how far engines may differ, in units of the largest value
LARGEST_INPUT = 2**28  # how many values an input may have that a command makes up


class UsageError(Exception):
    """A wrong use that argparse cannot see. It ends with exit code 2."""


def _line(error: object) -> str:
    """An error in one line: torch's and the engines' have many."""
    said = " ".join(str(error).split())
    return said if len(said) < 400 else said[:400] + " ..."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for every other wrong usage, without argparse's usage before it."""
        self.exit(2, f"{self.prog}: {_line(message)}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 it failed, 2 wrong usage."""
    parser = _Parser(
        prog="deformnd",
        description="Deformable convolution for PyTorch: tools and demo.",
        epilog="Exit codes: 0 done, 1 it failed or a check did not hold, 2 wrong usage.",
    )
    parser.add_argument("--version", action="version", version=f"deformnd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_demo, _add_info, _add_bench, _add_export, _add_check, _add_rewrite):
        add(commands)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:  # The command's own parser says so, since its help has the right options.
        commands.choices[options.command].error("unrecognized arguments: " + " ".join(unknown))
    options.arguments = sys.argv[1:] if arguments is None else list(arguments)
    name = f"deformnd {options.command}"
    try:
        code: int = options.run(options)
        return code
    except ImportError as error:
        print(f"{name} needs more packages: {error}", file=sys.stderr)
        print(f"install them with: pip install 'deformnd[{options.extra}]'", file=sys.stderr)
        return 1
    except UsageError as error:
        print(f"{name}: {_line(error)}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError, ValueError, TypeError, MemoryError) as error:
        # Such as a disk that is full, or a file that an engine finds wrong.
        print(f"{name}: {_line(error) or type(error).__name__}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
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


def _whole(text: str, least: int, most: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text} is not from {least} to {most}")
    return value


def _positive(text: str) -> int:
    return _whole(text, 1, 2**31 - 1)


def _count(text: str) -> int:
    return _whole(text, 1, 10**6)


def _threads(text: str) -> int:
    return _whole(text, 1, 1024)


def _seed(text: str) -> int:
    return _whole(text, -(2**63), 2**63 - 2)  # int64, as torch has it, with room for seed + 1.


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number of seconds")
    return value


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(_positive(part) for part in text.replace("x", ",").split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape, expected sizes such as 1,3,224,224"
        ) from None
    if math.prod(sizes) > LARGEST_INPUT:
        raise argparse.ArgumentTypeError(f"{text!r} has more than {LARGEST_INPUT} values")
    return sizes


def _file(text: str) -> Path:
    """A file to write, checked before the work and not after it."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder, expected a file to write")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: there is no folder {str(path.parent)!r}")
    return path


def _add_demo(commands: Any) -> None:
    demo = _add(
        commands,
        "demo",
        _demo,
        "demo",
        "train a deformable and an ordinary network on real images, export, compare",
        "Trains small networks on scikit-learn's handwritten digits, enlarged and randomly "
        "rotated, sheared and scaled, with three seeds: one with packed deformable convolutions, "
        "and an ordinary one with as many parameters, for as many epochs and for as long. Exports "
        "the deformable one to ONNX, runs it in ONNX Runtime, and writes model.onnx, report.md and "
        "sampling.png.",
    )
    demo.add_argument("--epochs", type=_positive, default=12, help="passes over the images")
    demo.add_argument("--out", type=Path, default=Path("deformnd-demo"), help="folder to write")
    demo.add_argument("--seed", type=_seed, default=0, help="first of the three seeds")
    demo.add_argument("--device", default="cpu", help="torch device to train on")


def _demo(options: Any) -> int:
    import torch

    from .demo import run

    try:
        torch.zeros(1, device=options.device).item()
    except Exception as error:
        raise UsageError(f"--device {options.device!r} is not here: {_line(error)}") from None
    made: list[Path] = []
    try:
        try:
            made = [p for p in (options.out, *options.out.parents) if not os.path.exists(p)]
            options.out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=options.out):
                pass  # To write a file now shows a folder that cannot be written before training.
        except OSError as error:
            reason = f"is no folder to write to: {error.strerror}"
            raise UsageError(f"--out {options.out} {reason}") from None
        run(options.epochs, options.out, options.seed, options.device)
    except BaseException:
        for folder in made:  # The innermost folder comes first.
            with contextlib.suppress(OSError):  # It may have files by now, or was never made.
                folder.rmdir()
        raise
    return 0


def _add_info(commands: Any) -> None:
    _add(
        commands,
        "info",
        _info,
        "test",
        "versions, devices, the kernels that run here and why, and a self-test",
        "Says what is installed, which kernels the operators run on each device and why, and "
        "compares the operators, forward and backward, with the definition in float64 on each "
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
        help="names with commas, or all; unset: float32 on a CPU, all but float64 on a GPU",
    )
    bench.add_argument("--peers", help="names, with commas; unset: all")
    bench.add_argument("--phases", default="forward,backward", help="either or both")
    bench.add_argument(
        "--seconds",
        type=_seconds,
        help="for each row, on a CPU; unset: 1. With --sweep or --models, of the whole run",
    )
    bench.add_argument("--threads", type=_threads, help="on a CPU; unset: torch's own number")
    bench.add_argument("--no-memory", action="store_true", help="skip the peak memory")
    bench.add_argument("--json", type=_file, help="write the results, device and versions")
    bench.add_argument("--plot", type=_file, help="write a picture of the ratios")
    bench.add_argument("--list", action="store_true", help="list the shapes, and do nothing")
    sweep = bench.add_argument_group("sweep", "Other layers than the named ones, a line each.")
    sweep.add_argument("--sweep", type=_count, metavar="N", help="time N random realistic layers")
    sweep.add_argument("--seed", type=_seed, help="of the random layers; unset: 0")
    sweep.add_argument("--models", action="store_true", help="time layers of public models first")
    sweep.add_argument(
        "--processes", type=_threads, help="that compile ahead on a GPU; unset: 8, or the cores"
    )
    sweep.add_argument(
        "--cold", action="store_true", help="do not compile ahead: time it, from an empty cache"
    )
    sweep.add_argument("--portable", action="store_true", help="without the kernels for Hopper")
    sweep.add_argument("--against", type=Path, metavar="TREE", help="another source tree, in turns")


def _bench(options: Any) -> int:
    import torch

    from . import bench, sweep

    known = {**bench.SHAPES, **bench.CPU_SHAPES}
    if options.list:
        for name, shape in (sweep.MODELS if options.models else known).items():
            shape = shape._replace(padding=bench.padding_of(shape))
            print(f"{name:7}", ", ".join(f"{k} {v}" for k, v in shape._asdict().items()))
        return 0
    cpu = options.device == "cpu"
    devices = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if not cpu and not (options.device in devices and torch.cuda.is_available()):
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
    others = options.models or options.sweep is not None
    default = ["float32"] if cpu else bench.DTYPES[: 3 : 2 if others else 1]
    dtypes = choose("dtype", options.dtypes, default, bench.DTYPES)
    few = ["dense", "torchvision"] if others else list(bench.PEERS)
    peers = choose("peer", options.peers, few, bench.PEERS)
    if options.peers not in (None, "all"):
        for peer in peers:
            if not bench.has(peer):
                raise UsageError(f"--peers {peer}: it is not installed here, or does not load")
    phases = choose("phase", options.phases, bench.PHASES, bench.PHASES)
    if others:
        return _sweep(options, dtypes, peers, phases)
    for given in ("seed", "processes", "cold", "portable", "against"):
        if getattr(options, given) is not None and getattr(options, given) is not False:
            raise UsageError(f"--{given} needs --sweep or --models")
    if options.plot:
        from matplotlib.backend_bases import FigureCanvasBase

        kinds = FigureCanvasBase.get_supported_filetypes()
        if options.plot.suffix[1:] not in ("", *kinds):
            raise UsageError(f"--plot {options.plot}, expected a file of {', '.join(kinds)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    seconds = 1.0 if options.seconds is None else options.seconds
    report = bench.run(
        shapes, dtypes, peers, phases, options.device, seconds, not options.no_memory
    )
    print(bench.table(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.plot:
        bench.plot(report, options.plot)
    return 0


def _sweep(options: Any, dtypes: list[str], peers: list[str], phases: list[str]) -> int:
    from . import sweep

    cpu = options.device == "cpu"
    if options.portable and cpu:
        raise UsageError("--portable leaves out kernels for GPUs, expected --device cuda")
    for given in ("shapes", "plot", "no_memory"):
        if getattr(options, given):
            raise UsageError(f"--{given.replace('_', '-')} is not for --sweep and --models")
    if options.against:
        try:
            sweep.tree_of(options.against)
        except ValueError as error:
            raise UsageError(f"--against {error}") from None
    seed = options.seed or 0
    drawn = sweep.draw(options.sweep or 0, seed, sweep.SAMPLES["cpu" if cpu else "cuda"])
    layers = {**(sweep.MODELS if options.models else {}), **{sweep.describe(s): s for s in drawn}}
    report = sweep.run(
        *(layers, dtypes, peers, phases, options.device),
        seconds=options.seconds or math.inf,
        threads=options.threads,
        processes=0 if cpu else options.processes or min(8, os.cpu_count() or 1),
        portable=options.portable,
        cold=options.cold,
        against=options.against,
        about={"command": shlex.join(["deformnd", *options.arguments]), "seed": seed},
        path=options.json,
    )
    print(sweep.text(report))
    return int(bool(sweep.failures(report)))


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
    export.add_argument("--out", type=_file, help="file to write; unset: FACTORY.onnx")
    export.add_argument(
        "--target",
        default="onnxruntime",
        help="who runs the file: onnxruntime, openvino, standard, precise, deformnd, tensorrt, "
        "webgpu, web or ncnn: see docs/onnx.md",
    )
    export.add_argument(
        "--input",
        type=_sizes,
        action="append",
        metavar="SIZES",
        help="shape of an input, such as 1,3,224,224 (random values); repeat it for more inputs",
    )
    export.add_argument("--dynamic", action="store_true", help="leave batch and spatial sizes open")
    export.add_argument("--opset", type=_positive, help="unset: the target's best")
    export.add_argument("--weights", type=Path, help="a state_dict to load first")
    export.add_argument("--no-verify", action="store_true", help="do not run the file")


def _load(spec: str) -> tuple[Any, tuple[Any, ...] | None]:
    """The model that MODEL.py:FACTORY or module:FACTORY makes, and its inputs if it gives any."""
    from torch import nn

    source, separator, name = spec.rpartition(":")
    if not separator or not source or not name:
        raise UsageError(f"{spec!r} is no MODEL.py:FACTORY")
    path = Path(source)
    python = path.suffix == ".py"
    if python and not path.is_file():
        raise UsageError(f"there is no file {source}")
    # The file's folder comes first on sys.path, as for a script. But a file that has the name of a
    # module, such as onnx.py, must not be imported in place of that module.
    taken = python and (path.stem in sys.modules or _is_another_module(path))
    before = list(sys.path)
    if python:
        sys.path.insert(len(before) if taken else 0, str(path.parent))
    what = source
    try:
        module = _run_file(path, "_" * taken + path.stem) if python else _import(source)
        what, factory = spec, getattr(module, name, None)
        if not callable(factory):
            raise UsageError(f"{source} has no function {name}")
        made = factory() if not isinstance(factory, nn.Module) else factory
    except UsageError:
        raise
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        raise UsageError(f"{what} does not run: {type(error).__name__}: {_line(error)}") from None
    finally:
        sys.path[:] = before
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{spec} returned a {type(model).__name__}, expected a torch.nn.Module")
    return model.eval(), inputs if inputs is None or isinstance(inputs, tuple) else (inputs,)


def _is_another_module(path: Path) -> bool:
    """Whether a module of the same name as this Python file is found elsewhere."""
    name = path.stem
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    return found is not None and Path(found.origin or "").resolve() != path.resolve()


def _run_file(path: Path, name: str) -> Any:
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # Classes look their module up here.
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, ValueError, TypeError) as error:
        raise UsageError(f"cannot import {name}: {_line(error)}") from None


def _load_weights(model: Any, path: Path | None) -> None:
    import torch

    if path is None:
        return
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {_line(error)}"
        raise UsageError(f"{path} is no checkpoint: {reason}") from None
    if not isinstance(state, Mapping):
        raise UsageError(f"{path} holds a {type(state).__name__}, expected a state_dict")
    if not all(isinstance(key, str) for key in state):
        raise UsageError(f"{path} holds a dict whose keys are no names, expected a state_dict")
    try:
        model.load_state_dict(state)
    except Exception as error:
        raise UsageError(f"{path} does not fit the model: {_line(error)}") from None


def _output(model: Any, inputs: Sequence[Any]) -> list[Any]:
    """The tensors that the model returns."""
    import torch

    try:
        with torch.no_grad():
            out = model(*inputs)
    except Exception as error:
        shapes = ", ".join(str(list(getattr(t, "shape", "?"))) for t in inputs)
        raise UsageError(
            f"the model does not take inputs {shapes}: {type(error).__name__}: {_line(error)}"
        ) from None
    leaves = torch.utils._pytree.tree_leaves(out)
    return [t for t in leaves if isinstance(t, torch.Tensor)]


def _check_target(target: str) -> None:
    from . import onnx

    if target in onnx.table.ELSEWHERE:
        raise UsageError(f"target {target}: {onnx.table.ELSEWHERE[target]}")
    if target not in onnx.TARGETS:
        raise UsageError(f"no target {target!r}, expected one of {', '.join(onnx.TARGETS)}")


def _export(options: Any) -> int:
    import logging

    import torch

    from . import onnx

    _check_target(options.target)
    path = options.out or Path(options.model.rpartition(":")[2] + ".onnx")
    model, inputs = _load(options.model)
    if options.input:
        inputs = tuple(torch.randn(size) for size in options.input)
    if inputs is None:
        raise UsageError("the input's shape is not known: give --input, such as --input 1,3,64,64")
    _load_weights(model, options.weights)
    _output(model, inputs)  # An error of the model itself comes here, and not from the exporter.
    dynamic = None
    if options.dynamic:
        auto = torch.export.Dim.DYNAMIC

        def open_axes(t: Any) -> Any:
            if not isinstance(t, torch.Tensor):
                return None
            return {a: auto for a in range(t.dim()) if a != 1}

        dynamic = torch.utils._pytree.tree_map(open_axes, inputs)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            onnx.export(
                model,
                inputs,
                path,
                target=options.target,
                opset=options.opset,
                dynamic_shapes=dynamic,
                verify=not options.no_verify,
            )
        except onnx.UnsupportedError as error:
            raise UsageError(str(error)) from None
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
    check.add_argument(
        "--seconds", type=_seconds, default=300.0, help="how long an engine may take, each"
    )


def _onnx_graph(path: Path) -> Any:
    """The model in an ONNX file, without weights that lie beside it."""
    import onnx

    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    try:
        graph = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf has several classes of errors.
        raise UsageError(f"{path} is no ONNX file: {_line(error)}") from None
    if not graph.HasField("graph") or not graph.opset_import:
        raise UsageError(f"{path} is no ONNX file: it holds no graph, or names no opset")
    return graph


def _check(options: Any) -> int:
    from .onnx.export import difference

    if options.weights and options.model is None:
        raise UsageError("--weights are those of a --model, which is not given")
    graph = _onnx_graph(options.file)
    inputs = _random_inputs(graph.graph, options.size, options.input)
    expected = None
    if options.model is not None:
        model, _ = _load(options.model)
        _load_weights(model, options.weights)
        expected = _output(model, [t for _, t in inputs])
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

    for said, _ in inputs:
        print(said)
    results: dict[str, Any] = {}
    for engine in ("onnxruntime", "openvino"):
        results |= _run_engine(engine, options.file, [t for _, t in inputs], options.seconds)
    if not results:
        print("no engine runs this file", file=sys.stderr)
        return 1
    if expected is not None:
        results = {"torch": expected, **results}
    if len(results) == 1:
        print("nothing to compare with: install another engine, or name the --model")
    (first, reference), *others = results.items()
    failed = False
    for other, got in others:
        worst = math.inf
        if len(got) == len(reference):
            worst = max(map(difference, got, reference), default=0.0)
        ok = worst <= TOLERANCE
        failed |= not ok
        verdict = "ok" if ok else "DIFFERS"
        print(f"{other} against {first}: {worst:.1e} of the largest value, {verdict}")
    return int(failed)


def _add_rewrite(commands: Any) -> None:
    rewrite = _add(
        commands,
        "rewrite",
        _rewrite,
        "onnx",
        "replace older forms of deformable convolution in an ONNX file",
        "Finds the graphs of deform_conv2d_onnx_exporter, mmcv's nodes and the standard DeformConv "
        "in a file, and writes another with what the target runs best in their place. Runs both on "
        "random input, and compares. Exit code 1, and no file, if nothing is to be replaced, or "
        "the files differ.",
    )
    rewrite.add_argument("file", type=Path, metavar="FILE.onnx")
    rewrite.add_argument("--out", type=_file, required=True, help="file to write")
    rewrite.add_argument("--target", default="onnxruntime", help="as of export")
    rewrite.add_argument("--no-verify", action="store_true", help="do not run the files")


def _rewrite(options: Any) -> int:
    from . import onnx

    _check_target(options.target)
    _onnx_graph(options.file)
    if options.out.resolve() == options.file.resolve():
        raise UsageError(f"--out {options.out} is the file to read, expected another one")
    try:
        replaced = onnx.rewrite(
            options.file, options.out, target=options.target, verify=not options.no_verify
        )
    except onnx.UnsupportedError as error:
        raise UsageError(str(error)) from None
    for name, kind in replaced:
        print(f"  {name}: {kind}")
    return int(not replaced)


def _random_inputs(
    graph: Any, size: int, given: list[tuple[int, ...]] | None
) -> list[tuple[str, Any]]:
    """A random tensor for each input of the graph, and a line that describes it."""
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
        name, kind = value.name, value.type.WhichOneof("value")
        if kind != "tensor_type":
            raise UsageError(f"input {name} is a {kind or 'value of no type'}, expected a tensor")
        tensor = value.type.tensor_type
        try:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        except Exception:
            raise UsageError(f"input {name} has an unknown type {tensor.elem_type}") from None
        if dtype.kind not in "fiub" or not dtype.isbuiltin:
            what = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
            raise UsageError(f"input {name} has type {what}, expected floats, ints or bools")
        if not tensor.HasField("shape") and not given:
            raise UsageError(f"input {name} has no shape in the file: give it by --input")
        dims = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
        shape = (
            given[k]
            if given
            else tuple(
                d if d is not None else 1 if axis == 0 else size for axis, d in enumerate(dims)
            )
        )
        names = [
            str(d.dim_value) if d.HasField("dim_value") else d.dim_param or "?"
            for d in tensor.shape.dim
        ]
        declared = f"[{', '.join(names)}]"
        for axis, d in enumerate(dims):
            if d is not None and d < 0:
                raise UsageError(
                    f"input {name} {declared} has size {d} on axis {axis}, expected at least 0"
                )
        if tensor.HasField("shape") and (
            len(shape) != len(dims)
            or any(d not in (None, s) for d, s in zip(dims, shape, strict=True))
        ):
            raise UsageError(f"--input {list(shape)} does not fit input {name} {declared}")
        if math.prod(shape) > LARGEST_INPUT:
            gib = math.prod(shape) * dtype.itemsize / 2**30
            raise UsageError(
                f"input {name} {declared} would be {list(shape)}, {gib:.0f} GiB, expected at most "
                f"{LARGEST_INPUT} values"
            )
        real = np.issubdtype(dtype, np.floating)
        array = generator.standard_normal(shape) if real else np.zeros(shape)
        said = f"input {name}: {dtype} {list(shape)}"
        if None in dims:
            said += f", in the file {declared}"
        made.append((said + ("" if real else " (zeros)"), torch.from_numpy(array.astype(dtype))))
    return made


def _run_engine(engine: str, path: Path, inputs: list[Any], seconds: float) -> dict[str, Any]:
    """What an engine makes of a file, in a process of its own, which can be ended or can crash."""
    import numpy as np
    import torch

    from .onnx import engines

    try:
        version = engines.version(engine)
    except ImportError:
        print(f"{engine}: not installed")
        return {}
    # `python engines.py` would not do: its folder, which has an openvino.py, would be first on
    # sys.path, and with -c it is the current folder, which may have any file.
    code = (
        "import sys; sys.path[:1] == [''] and sys.path.pop(0); import runpy; "
        "runpy.run_path(sys.argv[1], run_name='__main__')"
    )
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "inputs.npz", *[t.numpy() for t in inputs])
        command = [sys.executable, "-c", code, engines.__file__, engine, str(path), folder]
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=seconds,
            )
            error = (done.stderr.splitlines() or [""])[-1]
            if done.returncode < 0:
                error = f"it crashed (signal {-done.returncode})"
            elif not done.returncode:
                error = ""
        except subprocess.TimeoutExpired:
            error = f"it took more than {seconds:g} s"
        if error:
            print(f"{engine} {version}: does not run it: {error}")
            return {}
        saved = np.load(Path(folder) / "outputs.npz")
        outputs = [torch.from_numpy(saved[key]) for key in saved.files]
    print(f"{engine} {version}: runs it")
    return {engine: outputs}
