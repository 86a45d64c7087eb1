"""The engines that run ONNX files, on numpy arrays.

`python engines.py ENGINE FILE FOLDER` runs a file in a process of its own, so that an engine that
crashes or never ends does not harm the caller. It needs neither torch nor this package.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Run = Callable[[Sequence[Any]], list[Any]]


def onnxruntime(path: str, library: str | None = None) -> tuple[list[set[int]], Run]:
    """The open axes of each input of a file, and the function that runs it.

    library: the path of a library of custom operators to run it with.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it logs below that is in its errors, too
    if library is not None:
        options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = session.get_inputs()

    def run(arrays: Sequence[Any]) -> list[Any]:
        feed = {i.name: a for i, a in zip(inputs, arrays, strict=True)}
        return list(session.run(None, feed))

    return [{a for a, s in enumerate(i.shape) if not isinstance(s, int)} for i in inputs], run


def openvino(path: str) -> tuple[list[set[int]], Run]:
    """The open axes and the function for OpenVINO, which runs the file in float32."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    for i in model.inputs:
        shape = i.get_partial_shape()
        if any(s.is_static and s.get_length() == 0 for s in shape):
            # It divides by them, or writes out of bounds, and takes the process along.
            raise ValueError(
                f"input {i.get_any_name()} has shape {shape}, and OpenVINO crashes at sizes that "
                "are fixed at 0"
            )
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()

    def run(arrays: Sequence[Any]) -> list[Any]:
        results = request.infer(list(arrays))
        return [results[o].copy() for o in compiled.outputs]

    shapes = [i.get_partial_shape() for i in model.inputs]
    return [{a for a, s in enumerate(shape) if s.is_dynamic} for shape in shapes], run


def deformnd(path: str) -> tuple[list[set[int]], Run]:
    """The open axes and the function for ONNX Runtime with deformnd's kernels."""
    return onnxruntime(path, str(_core()))


def _core() -> Path:
    """The path that deformnd.onnx.custom_ops_library returns, which this file cannot import."""
    found = sorted(Path(__file__).parent.parent.glob("_core.*"))
    if not found:
        raise ImportError("deformnd's core is not there")
    return found[0]


ENGINES = {"onnxruntime": onnxruntime, "openvino": openvino, "deformnd": deformnd}


def version(engine: str) -> str:
    """The version of an engine. Raises ImportError if the engine is not installed."""
    if engine == "deformnd":
        _core()
        engine = "onnxruntime"
    try:
        found: str = importlib.import_module(engine).__version__
    except ImportError as error:
        raise ImportError(f"{engine} is not installed") from error
    return found.split("-")[0]


def reason(engine: str, error: Exception | str) -> str:
    """One line that says why an engine does not run a file, and what helps."""
    said = " ".join(str(error).split())[:300]
    hint = ""
    if "DeformConv" in said and "MMCV" not in said:  # mmcv's nodes have DeformConv in their names
        hint = {
            "onnxruntime": "; it has DeformConv from 1.25 on: target 'precise' runs in older ones",
            "openvino": "; deformnd.onnx.read_openvino_model reads it, and so does OpenVINO itself "
            "what is exported for target 'openvino'",
        }.get(engine, "")
    return said + hint


class NotLoadedError(ValueError):
    """An engine does not load a file. The file need not be at fault."""


def not_loaded(engine: str, path: str, error: Exception) -> NotLoadedError:
    whose = "onnxruntime" if engine == "deformnd" else engine
    return NotLoadedError(
        f"deformnd.onnx: {whose} {version(engine)} does not run {path}: {reason(engine, error)}"
    )


if __name__ == "__main__":
    import numpy as np

    engine, file, folder = sys.argv[-3:]
    given = np.load(Path(folder) / "inputs.npz")
    try:
        outputs = ENGINES[engine](file)[1]([given[key] for key in given.files])
        arrays = [np.asarray(o) for o in outputs]
        if any(a.dtype.kind not in "fiub" for a in arrays):
            raise TypeError("an output is no tensor of numbers")
    except Exception as error:  # each engine has its own errors; only the message matters
        sys.exit(reason(engine, error))
    np.savez(Path(folder) / "outputs.npz", *arrays)
