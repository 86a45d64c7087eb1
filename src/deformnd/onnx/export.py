"""Export a model to a file, and check that the file computes what the model does."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import engines
from .lowerings import OPENVINO_DOMAIN, openvino_function
from .nodes import add_functions
from .table import TARGETS, UnsupportedError, body, resolve, translation_table

# The tolerances are in units of an output's largest value. A wrong file is wrong by much more, and
# a deep network adds up the rounding of many layers.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2}
_TOLERANCE_OF_STANDARD = 10  # the tolerance's factor, as GridSample's positions are coarser


def export(
    model: Any,
    args: tuple[Any, ...] | Tensor,
    path: str | os.PathLike[str] | None = None,
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

    It calls torch.onnx.export(dynamo=True) with translation_table(target, opset), and then checks
    that the file is valid, has the opset asked for, and, run by the target's engine, agrees with
    the model.

    Args:
        model: an nn.Module in eval mode, or a torch.export.ExportedProgram. Its dtype is float16
            (in which these operators still compute in float32), float32 or float64. While a Module
            is exported, its parameters do not require gradients.
        args: the model's positional inputs, or the one tensor that is its input.
        path: the file to write, in a folder that exists. Weights of 2 GB or more, and all weights
            with external_data=True, go to a second file beside it, path + ".data".
        target: the engine that is to run the file.
            "onnxruntime": the standard DeformConv, for ONNX Runtime 1.26 or newer. (1.25 has it,
            too, and crashes where an offset is NaN.)
            "openvino": one file for OpenVINO and ONNX Runtime 1.26 or newer, each of which runs
            its own operator. The fastest in OpenVINO.
            "standard": GridSample, which every engine has; its error grows with the image.
            "precise": gathers at integer coordinates; the most exact, and for old engines.
            "deformnd": deformnd's own CPU kernels in ONNX Runtime, by deformnd.onnx.session or a
            registered deformnd.onnx.custom_ops_library(). In every other engine that knows local
            functions it is as "precise".
            "tensorrt": the standard DeformConv in 2-D, else as "precise"; never GridSample.
            "webgpu", "web": as "precise".
            "ncnn": GridSample in operators that pnnx reads, for 1-D and 2-D with one group of
            offsets and of masks. ncnn takes a batch of one, which is not checked.
        kwargs: the model's inputs by name.
        dynamic_shapes: as for torch.onnx.export: the axes whose size may vary.
        opset: the opset, from the target's oldest up to the newest that torch writes. None: the
            target's default. deformnd.onnx.TARGETS has the oldest and the default.
        verify: run the file and compare. Without the engine installed, only the file is checked.
        verbose: say what was written and how well it agrees.
        **options: more arguments of torch.onnx.export: input_names, output_names, external_data ...
            Its names f and opset_version are taken for path and opset.

    Returns:
        torch's ONNXProgram.

    Raises:
        UnsupportedError: the target cannot express an operator of the model at this opset, or torch
            cannot write this opset.
        ValueError, TypeError: an argument does not fit, and the message names it; or the target's
            engine does not load the file, or the file disagrees with the model. Then the file has
            been removed.
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
    for ours, theirs, given in (("path", "f", path), ("opset", "opset_version", opset)):
        if theirs in options and given is not None:
            raise TypeError(f"deformnd.onnx: both {ours} and {theirs} are given, expected one")
    known = inspect.signature(torch.onnx.export).parameters
    for key in options:
        if key not in known:
            raise TypeError(
                f"deformnd.onnx: unexpected argument {key!r}, expected one of torch.onnx.export's"
            )
    for key in ("input_names", "output_names"):
        names = options.get(key)
        if names is not None and not (
            isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        ):
            raise TypeError(f"deformnd.onnx: {key} is {names!r}, expected a list of names")
    path, opset = options.pop("f", path), options.pop("opset_version", opset)
    version = resolve(target, opset)
    table = translation_table(target, version)
    table.update(options.pop("custom_translation_table", None) or {})
    args, kwargs = _inputs(args, kwargs)
    _check_model(model)
    path = path_to_write(path)
    if dynamic_shapes is not None and not isinstance(dynamic_shapes, (dict, tuple, list)):
        kind = type(dynamic_shapes).__name__
        raise TypeError(f"deformnd.onnx: dynamic_shapes is a {kind}, expected a tuple or a dict")
    if not options.pop("dynamo", True):
        raise ValueError("deformnd.onnx: dynamo is False, expected True: see docs/onnx.md")
    if getattr(model, "training", False):
        warnings.warn(
            "deformnd.onnx: the model is in training mode, and is exported so: for inference call "
            "model.eval() first",
            stacklevel=2,
        )
    saving: dict[str, Any] = {
        key: options.pop(key)
        for key in ("external_data", "keep_initializers_as_inputs")
        if key in options
    }
    if "export_params" in options:
        saving["include_initializers"] = options.pop("export_params")
    log = logging.getLogger("onnxscript")
    level = log.level
    log.setLevel(logging.CRITICAL)  # onnxscript logs tracebacks of errors that are raised below
    try:
        with _frozen(model), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Exporting a model while it is in training mode")
            program = torch.onnx.export(
                model,
                _detached(args),
                None,
                kwargs=_detached(kwargs) or None,
                dynamo=True,
                verbose=False,
                dynamic_shapes=dynamic_shapes,
                opset_version=version,
                custom_translation_table=table,
                **options,
            )
    except Exception as error:
        explained = _explained(error, model, args, kwargs, dynamic_shapes)
        raise explained from (None if explained is error else error)
    finally:
        log.setLevel(level)
    assert program is not None
    if not program.model.graph.outputs:
        raise ValueError("deformnd.onnx: the model returns no tensor, expected at least one")
    add_function(program)
    _check_program(program, target, version)
    said = f"deformnd.onnx: wrote {path} for target {target!r}, opset {version}"
    try:
        program.save(path, **saving)
        if verify and saving.get("include_initializers", True):
            for engine in TARGETS[target].engines:
                said += "; " + _compared(path, model, args, kwargs, engine, target)
    except BaseException:
        for file in (path, path.with_name(path.name + ".data")):
            file.unlink(missing_ok=True)
        raise
    if verbose:
        print(said)
    return program


def _compared(path: Path, model: Any, args: Any, kwargs: Any, engine: str, target: str) -> str:
    """A line that says how well the file agrees with the model in an engine, or why it is not
    known."""
    try:
        found = check(
            path, model, args, kwargs=kwargs, engine=engine, standard=TARGETS[target].coarse
        )
    except ImportError as error:
        return f"not compared with torch ({error})"
    except engines.NotLoadedError as error:
        if engine == target:
            raise
        return f"not compared with torch in {engine} ({error})"
    return f"differs from torch by {found:.1e} of its largest value in {engine}"


def _inputs(args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The model's inputs by position and by name, as torch.onnx.export reads them."""
    if isinstance(args, Tensor):
        args = (args,)
    if not isinstance(args, tuple):
        kind = type(args).__name__
        raise TypeError(f"deformnd.onnx: args is a {kind}, expected a tuple of inputs or a tensor")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        kind = type(kwargs).__name__
        raise TypeError(f"deformnd.onnx: kwargs is a {kind}, expected inputs by name")
    if not kwargs and args and isinstance(args[-1], dict):
        args, kwargs = args[:-1], args[-1]
    return args, dict(kwargs or {})


@contextlib.contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Within this, no parameter requires gradients, since torch 2.13 fails at attention with a
    learned mask that does.

    Parameters of lazy modules and of inference mode are left out, because their flag cannot be
    changed, or not be changed back.
    """
    learned = [
        p
        for p in model.parameters()
        if p.requires_grad and not torch.nn.parameter.is_lazy(p) and not p.is_inference()
    ]
    try:
        for parameter in learned:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


def _detached(inputs: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, inputs)


def _check_model(model: Any) -> None:
    if not isinstance(model, (torch.nn.Module, torch.export.ExportedProgram)):
        kind = type(model).__name__
        raise TypeError(f"deformnd.onnx: model is a {kind}, expected a Module or ExportedProgram")


def path_to_write(path: Any, argument: str = "path") -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            f"deformnd.onnx: {argument} is {_told(path)}, expected the name of a file to write"
        )
    file = Path(path)
    if file.is_dir():
        raise ValueError(
            f"deformnd.onnx: {argument} {str(file)!r} is a folder, expected a file to write"
        )
    if not file.parent.is_dir():
        raise ValueError(
            f"deformnd.onnx: {argument} is {str(file)!r}, but there is no folder "
            f"{str(file.parent)!r}"
        )
    return file


def path_to_read(path: Any, argument: str = "path") -> str:
    if not isinstance(path, (str, os.PathLike)) or not os.path.isfile(path):
        raise ValueError(f"deformnd.onnx: {argument} is {_told(path)}, expected a file that exists")
    return os.fspath(path)


def _told(value: Any) -> str:
    """What is no path, in short: it may be a whole model."""
    said = repr(value)
    short = len(said) < 200 or isinstance(value, (str, os.PathLike))
    return said if short else f"a {type(value).__name__}"


def _explained(
    error: Exception, model: Any, args: tuple[Any, ...], kwargs: Any, dynamic_shapes: Any
) -> Exception:
    """The error to raise for one that torch.onnx.export raised: a clearer one if an argument is the
    cause, else torch's own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UnsupportedError):
            return cause
        cause = cause.__cause__
    # torch's own error is ten lines of advice, and its cause says what went wrong.
    reason = error if error.__cause__ is None else error.__cause__
    said = " ".join(str(reason).split())
    if dynamic_shapes is not None and (
        isinstance(reason, IndexError)
        or type(reason).__name__ == "ConstraintViolationError"
        or any(words in said for words in ("dynamic_shapes", "dynamic shape", "user-specified"))
    ):
        return ValueError(f"deformnd.onnx: dynamic_shapes does not fit the inputs: {said}")
    if isinstance(model, torch.jit.ScriptModule):
        return TypeError(
            "deformnd.onnx: model is a torch.jit.ScriptModule, expected the Module it was made from"
        )
    if type(error).__name__ == "ConversionError":
        with contextlib.suppress(Exception):  # if the model fails, torch's error is raised
            odd = _no_output(_returned(model, args, kwargs))
            if odd is not None:
                return odd
    if reason is not error and isinstance(reason, (ValueError, TypeError)):
        return ValueError(f"deformnd.onnx: the model does not take args: {said}")
    return error


def add_function(program: Any) -> None:
    """Complete a program that torch.onnx.export made for target "openvino" or "deformnd".

    The program gets a definition of the operator that is OpenVINO's or deformnd's own, for all
    other engines. Without it, only the engine that has this operator reads the file.
    deformnd.onnx.export does this for you.

    Args:
        program: torch's ONNXProgram, changed in place.
    """
    if not isinstance(program, torch.onnx.ONNXProgram):
        kind = type(program).__name__
        raise TypeError(f"deformnd.onnx: program is a {kind}, expected an ONNXProgram")
    complete(program.model)


def complete(model: Any) -> None:
    """Complete an onnx_ir.Model, as add_function completes a program."""
    from onnx_ir import serde

    if any(node.domain == OPENVINO_DOMAIN for node in model.graph.all_nodes()):
        opset = model.opset_imports[""]
        function = serde.deserialize_function(openvino_function(opset))
        model.functions[function.identifier()] = function

    def refuse(name: str, reason: str) -> None:
        raise UnsupportedError("deformnd", model.opset_imports[""], f"a model with {name}", reason)

    add_functions(model, body, refuse)


def _check_program(program: Any, target: str, opset: int) -> None:
    import onnx

    found = program.model.opset_imports[""]
    if found != opset:
        reason = f"torch {torch.__version__} with the onnxscript that is here cannot write it"
        raise UnsupportedError(target, opset, "a model", reason)
    size = sum(v.const_value.nbytes for v in program.model.graph.initializers.values())
    if size < 2**30:  # protobuf ends at 2 GB
        onnx.checker.check_model(program.model_proto, full_check=True)


def check(
    path: str | os.PathLike[str],
    model: Any,
    args: tuple[Any, ...] | Tensor,
    *,
    kwargs: Mapping[str, Any] | None = None,
    engine: str = "onnxruntime",
    standard: bool = False,
) -> float:
    """Run an exported file and compare it with the model it was made from.

    The inputs are those given, and, where the file leaves sizes open, also inputs of twice those
    sizes (with tiled values), unless the model itself refuses them.

    Args:
        path: the file.
        model: the nn.Module or ExportedProgram.
        args, kwargs: inputs, as they were given to export.
        engine: "onnxruntime", "openvino" or "deformnd", which is ONNX Runtime with deformnd's
            kernels.
        standard: the file was made for target "standard" or "ncnn", which are less exact.

    Returns:
        The largest difference of any output, in units of its largest value.

    Raises:
        ValueError: the difference is more than 0.001 (0.02 in float16; ten times as much with
            `standard`), or the file gives NaN where the model does not; the engine does not load or
            run the file; an argument does not fit.
        ImportError: the engine is not installed.

    Example: see export.
    """
    if not isinstance(engine, str) or engine not in engines.ENGINES:
        raise ValueError(
            f"deformnd.onnx: engine is {engine!r}, expected 'onnxruntime', 'openvino' or 'deformnd'"
        )
    engines.version(engine)  # raises if it is not installed
    path = path_to_read(path)
    _check_model(model)
    args, kwargs = _inputs(args, kwargs)
    try:
        inputs, run = engines.ENGINES[engine](path)
    except Exception as error:  # each engine has its own errors
        raise engines.not_loaded(engine, path, error) from error
    leaves, structure = torch.utils._pytree.tree_flatten((args, kwargs))
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if len(tensors) != len(inputs):
        raise ValueError(
            f"deformnd.onnx: {path} has {len(inputs)} inputs, expected {len(tensors)}, "
            "as many as tensors are given"
        )
    larger = list(leaves)
    for i, open_axes in zip(tensors, inputs, strict=True):
        t = leaves[i]
        larger[i] = t.repeat([2 if axis in open_axes else 1 for axis in range(t.dim())])
    worst = 0.0
    for given in (leaves,) if not any(inputs) else (leaves, larger):
        positional, named = torch.utils._pytree.tree_unflatten(given, structure)
        try:
            returned = _returned(model, positional, named)
        except Exception:
            if given is larger:
                continue
            raise
        expected = [t for t in returned if isinstance(t, Tensor)]
        arrays = [given[i].detach().cpu().numpy() for i in tensors]
        try:
            got = [torch.from_numpy(a) for a in run(arrays)]
        except Exception as error:
            said = engines.reason(engine, error)
            raise ValueError(f"deformnd.onnx: {path} fails in {engine}: {said}") from error
        if len(got) != len(expected):
            raise _no_output(returned) or ValueError(
                f"deformnd.onnx: {path} in {engine} returns {len(got)} tensors, "
                f"expected {len(expected)} as the model"
            )
        for g, e in zip(got, expected, strict=True):
            worst = max(worst, checked_difference(g, e.cpu(), standard, engine, path))
    return worst


def _returned(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The parts of what the model returns, in one list."""
    function = model.module() if isinstance(model, torch.export.ExportedProgram) else model
    with torch.no_grad():
        leaves: list[Any] = torch.utils._pytree.tree_leaves(function(*args, **kwargs))
    return leaves


def _no_output(returned: list[Any]) -> ValueError | None:
    """The error for a model that returns something that an ONNX file cannot, or None."""
    for part in returned:
        if part is not None and not isinstance(part, Tensor):
            kind = type(part).__name__
            return ValueError(f"deformnd.onnx: the model returns a {kind}, expected tensors")
    return None


def difference(got: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest finite value expected.

    It is infinite if the shapes differ, or if one value is NaN or infinite and the other is not the
    same.
    """
    if got.shape != expected.shape:
        return math.inf
    e, g = expected.double(), got.double()
    same = (e == g) | (e.isnan() & g.isnan())
    error = torch.where(same, 0.0, (g - e).abs()).nan_to_num(math.inf, math.inf)
    if not error.any():  # this holds for an empty tensor, too, which has no largest value
        return 0.0
    largest = float(torch.where(e.isfinite(), e.abs(), 0.0).max())
    return float(error.max()) / max(largest, 1e-30)


def checked_difference(
    got: Tensor,
    expected: Tensor,
    standard: bool,
    engine: str,
    path: str,
    reference: str = "torch",
) -> float:
    if got.shape != expected.shape:
        raise ValueError(
            f"deformnd.onnx: {path} in {engine} returns shape {list(got.shape)}, "
            f"expected {list(expected.shape)}"
        )
    bound = _TOLERANCE.get(expected.dtype, 0.0) * (_TOLERANCE_OF_STANDARD if standard else 1)
    found = difference(got, expected)
    if found > bound:
        raise ValueError(
            f"deformnd.onnx: {path} in {engine} differs from {reference} by {found:.1e} of the "
            f"largest value, expected at most {bound:.0e}"
        )
    return found
