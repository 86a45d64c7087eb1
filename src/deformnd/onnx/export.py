"""Export a model to a file, and check that the file computes what the model does."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .lowerings import OPENVINO_DOMAIN, openvino_function
from .table import UnsupportedError, resolve, translation_table

# Of the largest value of an output. What is wrong is wrong by much more, and a deep network adds
# up more than one layer's rounding.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2}
_TOLERANCE_OF_STANDARD = 10  # GridSample's positions are that much coarser


def export(
    model: Any,
    args: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    target: str = "onnxruntime",
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    opset: int | None = None,
    verify: bool = True,
    verbose: bool = True,
    **options: Any,
) -> Any:
    """Export a model that holds deformnd's operators, or torchvision's deform_conv2d, to ONNX.

    torch.onnx.export(dynamo=True) with translation_table(target, opset), and checks: the file is
    valid, has the opset asked for, and, run by the target's engine, agrees with the model.

    Args:
        model: an nn.Module in eval mode, or a torch.export.ExportedProgram. In float16 (where
            these operators still compute in float32), float32 or float64.
        args: the model's positional inputs.
        path: the file to write. Weights of 2 GB or more, or with external_data=True, go to a second
            one beside it, path + ".data".
        target: who shall run the file.
            "onnxruntime": the standard DeformConv, for ONNX Runtime 1.25 or newer. The fastest
            there.
            "openvino": one file for OpenVINO and ONNX Runtime 1.25 or newer, each of which runs
            its own operator. The fastest in OpenVINO.
            "standard": GridSample, which every engine has; its error grows with the image.
            "precise": gathers at integer coordinates; the most exact, and for old engines.
        kwargs: the model's inputs by name.
        dynamic_shapes: as for torch.onnx.export: the axes whose size may vary.
        opset: from 19, or from 18 for "standard" and "precise", up to the newest that torch
            writes. None: 20, or 18 for "precise".
        verify: run the file and compare. Without the engine installed, only the file is checked.
        verbose: say what was written and how well it agrees.
        **options: more for torch.onnx.export: input_names, output_names, external_data ...

    Returns:
        torch's ONNXProgram.

    Raises:
        UnsupportedError: the target cannot express an operator of the model at this opset.
        ValueError: no such target; or the file disagrees with the model, and was removed.
        ImportError: onnx or onnxscript is not installed (`pip install 'deformnd[onnx]'`).

    Example:
        >>> import os, tempfile, torch
        >>> import deformnd.onnx
        >>> layer = deformnd.PackedDeformConvTranspose2d(3, 8, 3, padding=1).eval()
        >>> path = os.path.join(tempfile.mkdtemp(), "layer.onnx")
        >>> x = torch.rand(1, 3, 16, 16)
        >>> program = deformnd.onnx.export(layer, (x,), path, target="precise", verbose=False)
        >>> deformnd.onnx.check(path, layer, (x,)) < 1e-5
        True
    """
    version = resolve(target, opset)
    table = translation_table(target, version)
    table.update(options.pop("custom_translation_table", None) or {})
    saving: dict[str, Any] = {
        key: options.pop(key)
        for key in ("external_data", "keep_initializers_as_inputs")
        if key in options
    }
    if "export_params" in options:
        saving["include_initializers"] = options.pop("export_params")
    try:
        program = torch.onnx.export(
            model,
            args,
            None,
            kwargs=None if kwargs is None else dict(kwargs),
            dynamo=True,
            verbose=False,
            dynamic_shapes=dynamic_shapes,
            opset_version=version,
            custom_translation_table=table,
            **options,
        )
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, UnsupportedError):
                raise cause from None
            cause = cause.__cause__
        raise
    assert program is not None
    add_function(program)
    _check_program(program, target, version)
    path = Path(path)
    program.save(path, **saving)
    said = f"deformnd.onnx: wrote {path} for target {target!r}, opset {version}"
    if verify and saving.get("include_initializers", True):
        try:
            for engine in _ENGINES[target]:
                difference = check(
                    path, model, args, kwargs=kwargs, engine=engine, standard=target == "standard"
                )
                said += f"; differs from torch by {difference:.1e} of its largest value in {engine}"
        except ImportError as error:
            said += f"; not compared with torch ({error})"
        except Exception:
            for file in (path, path.with_name(path.name + ".data")):
                file.unlink(missing_ok=True)
            raise
    if verbose:
        print(said)
    return program


def add_function(program: Any) -> None:
    """Complete a program that torch.onnx.export made with translation_table("openvino").

    It gets the definition of OpenVINO's operator, for every other engine: without it, only
    OpenVINO reads the file. deformnd.onnx.export does this for you.

    Args:
        program: torch's ONNXProgram, changed in place.
    """
    from onnx_ir import serde

    model = program.model
    if any(node.domain == OPENVINO_DOMAIN for node in model.graph.all_nodes()):
        opset = model.opset_imports[""]
        function = serde.deserialize_function(openvino_function(opset))
        model.functions[function.identifier()] = function


def _check_program(program: Any, target: str, opset: int) -> None:
    import onnx

    found = program.model.opset_imports[""]
    if found != opset:
        raise ValueError(
            f"deformnd.onnx: target {target!r}: torch.onnx.export wrote opset {found}, "
            f"not opset {opset} as asked"
        )
    size = sum(v.const_value.nbytes for v in program.model.graph.initializers.values())
    if size < 2**30:  # protobuf ends at 2 GB
        onnx.checker.check_model(program.model_proto, full_check=True)


def check(
    path: str | os.PathLike[str],
    model: Any,
    args: tuple[Any, ...],
    *,
    kwargs: Mapping[str, Any] | None = None,
    engine: str = "onnxruntime",
    standard: bool = False,
) -> float:
    """Run an exported file and compare it with the model it was made from.

    With the inputs given, and, where the file leaves sizes open, with inputs of twice those sizes
    (of tiled values), unless the model itself refuses them.

    Args:
        path: the file.
        model: the nn.Module or ExportedProgram.
        args, kwargs: inputs, as they were given to export.
        engine: "onnxruntime" or "openvino".
        standard: the file was made for target "standard", which is less exact.

    Returns:
        The largest difference of any output, in units of its largest value.

    Raises:
        ValueError: that is more than 0.001 (0.02 in float16; ten times those with `standard`), or
            NaN where the model has none.
        ImportError: the engine is not installed.

    Example: see export.
    """
    if engine not in _RUNNERS:
        raise ValueError(
            f"deformnd.onnx: engine is {engine!r}, expected 'onnxruntime' or 'openvino'"
        )
    inputs, run = _RUNNERS[engine](os.fspath(path))
    leaves, structure = torch.utils._pytree.tree_flatten((tuple(args), dict(kwargs or {})))
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if len(tensors) != len(inputs):
        raise ValueError(
            f"deformnd.onnx: {path} has {len(inputs)} inputs, expected {len(tensors)} "
            "as many as tensors are given"
        )
    larger = list(leaves)
    for i, open_axes in zip(tensors, inputs, strict=True):
        t = leaves[i]
        larger[i] = t.repeat([2 if axis in open_axes else 1 for axis in range(t.dim())])
    function = model.module() if isinstance(model, torch.export.ExportedProgram) else model
    worst = 0.0
    for given in (leaves,) if not any(inputs) else (leaves, larger):
        positional, named = torch.utils._pytree.tree_unflatten(given, structure)
        try:
            with torch.no_grad():
                expected = function(*positional, **named)
        except Exception:
            if given is larger:
                continue
            raise
        expected = [t for t in torch.utils._pytree.tree_leaves(expected) if isinstance(t, Tensor)]
        got = run([given[i].detach().cpu() for i in tensors])
        for g, e in zip(got, expected, strict=True):
            worst = max(worst, _difference(g, e.cpu(), standard, engine, os.fspath(path)))
    return worst


def _difference(got: Tensor, expected: Tensor, standard: bool, engine: str, path: str) -> float:
    if got.shape != expected.shape:
        raise ValueError(
            f"deformnd.onnx: {path} in {engine} returns shape {list(got.shape)}, "
            f"expected {list(expected.shape)}"
        )
    bound = _TOLERANCE.get(expected.dtype, 0.0) * (_TOLERANCE_OF_STANDARD if standard else 1)
    if not expected.numel():
        return 0.0
    e, g = expected.double(), got.double()
    largest = float(e[e.isfinite()].abs().max()) if e.isfinite().any() else 0.0
    same = (e == g) | (e.isnan() & g.isnan())
    error = torch.where(same, 0.0, (g - e).abs()).nan_to_num(math.inf, math.inf)
    difference = float(error.max()) / max(largest, 1e-30) if error.any() else 0.0
    if difference > bound:
        raise ValueError(
            f"deformnd.onnx: {path} in {engine} differs from torch by {difference:.1e} of the "
            f"largest value, expected at most {bound:.0e}"
        )
    return difference


# A runner reads a file, and returns the open axes of each input, and the function that runs it.
Run = Callable[[Sequence[Tensor]], list[Tensor]]


def _onnxruntime(path: str) -> tuple[list[set[int]], Run]:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("onnxruntime is not installed") from error
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = session.get_inputs()

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        feed = {i.name: t.numpy() for i, t in zip(inputs, tensors, strict=True)}
        return [torch.from_numpy(a) for a in session.run(None, feed)]

    return [{a for a, s in enumerate(i.shape) if not isinstance(s, int)} for i in inputs], run


def _openvino(path: str) -> tuple[list[set[int]], Run]:
    try:
        import openvino
    except ImportError as error:
        raise ImportError("openvino is not installed") from error
    core = openvino.Core()
    model = core.read_model(path)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        results = request.infer([t.numpy() for t in tensors])
        return [torch.from_numpy(results[o].copy()) for o in compiled.outputs]

    shapes = [i.get_partial_shape() for i in model.inputs]
    return [{a for a, s in enumerate(shape) if s.is_dynamic} for shape in shapes], run


_RUNNERS = {"onnxruntime": _onnxruntime, "openvino": _openvino}
_ENGINES = {
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino", "onnxruntime"),
    "standard": ("onnxruntime",),
    "precise": ("onnxruntime",),
}
