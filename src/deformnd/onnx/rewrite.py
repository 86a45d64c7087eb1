"""Rewriting files that exist: older forms of deformable convolution become a target's lowering."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import engines, old_graphs
from .export import checked_difference, complete, path_to_read, path_to_write
from .graph import Graph
from .lowerings import OPENVINO_DOMAIN
from .nodes import DOMAIN
from .old_graphs import Call, Node, Value
from .table import TARGETS, resolve, translation_table

_OURS = "deformnd.rewrite"  # the domain of the nodes that stand for calls while a file is rewritten
_LARGEST_INPUT = 2**28  # the most values of an input that is made up to compare files
_NAMES = ("input", "weight", "offset", "mask", "bias")
_ORDER = {  # for each operator, the place in a Call of each of its inputs
    "MMCVDeformConv2d": (0, 2, 1),
    "MMCVModulatedDeformConv2d": (0, 2, 3, 1, 4),
    "DeformConv": (0, 1, 2, 4, 3),
}


def rewrite(
    file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    target: str = "onnxruntime",
    verify: bool = True,
    verbose: bool = True,
) -> list[tuple[str, str]]:
    """Rewrite the deformable convolutions of an ONNX file for a target, without a model.

    It finds the graphs that deform_conv2d_onnx_exporter writes (with GatherND or GatherElements,
    with or without its patch for OpenVINO, optimised or not), nodes MMCVDeformConv2d and
    MMCVModulatedDeformConv2d of mmcv and mmdeploy, and the standard DeformConv, in subgraphs and
    local functions, too. Each becomes what deformnd.onnx.export writes for the target. All else
    stays, in a newer opset if the target needs one. Then it runs both files on random inputs, which
    have a batch of 1 and size 64 along other axes whose size is open, and compares the results.

    Args:
        file: the ONNX file, with its external data beside it.
        out: the file to write, another one, in a folder that exists. If `file` has external data,
            so has it: out + ".data".
        target: as for deformnd.onnx.export.
        verify: run both files in ONNX Runtime (`file` on deformnd's kernels where ONNX Runtime
            lacks an operator), and `out` in the target's engine, too. If `file` does not run, or an
            engine is not installed, the files are not compared, and the message says so.
        verbose: say what was done.

    Returns:
        What was replaced: for each call the name of its last node, and what it was,
        "deform_conv2d_onnx_exporter", "MMCVDeformConv2d", "MMCVModulatedDeformConv2d" or
        "DeformConv". The list is empty if the file has no calls, or has them in the target's form
        already. Then no file is written.

    Raises:
        UnsupportedError: the target cannot express a call.
        ValueError, TypeError: an argument does not fit; `file` is no valid ONNX file; a node's
            sizes do not fit; onnx cannot raise its opset; or `out` does not compute what `file`
            does, and is not written.
        ImportError: onnx or onnxscript is not installed (`pip install 'deformnd[onnx]'`).

    Example:
        >>> import os, tempfile, torch
        >>> import deformnd.onnx
        >>> layer = deformnd.PackedDeformConv2d(3, 8, 3, padding=1).eval()
        >>> folder, x = tempfile.mkdtemp(), torch.rand(1, 3, 16, 16)
        >>> old, new = os.path.join(folder, "old.onnx"), os.path.join(folder, "new.onnx")
        >>> program = deformnd.onnx.export(layer, x, old, verbose=False)  # DeformConv
        >>> replaced = deformnd.onnx.rewrite(old, new, target="precise", verbose=False)
        >>> [kind for _, kind in replaced]
        ['DeformConv']
        >>> deformnd.onnx.check(new, layer, x) < 1e-5
        True
    """
    resolve(target, None)
    source, path = Path(path_to_read(file, "file")), path_to_write(out, "out")
    with _quiet():
        model = _load(source)
    data = path.with_name(path.name + ".data")
    try:
        external = _external(model, source)
    except Exception as error:
        wrong = _wrong(source, error)
        raise wrong from (None if wrong is error else error)
    if any(new.exists() and new.samefile(old) for new in (path, data) for old in external):
        raise ValueError(
            f"deformnd.onnx: out is {str(path)!r}, which would take the place of {source} or of "
            "its data, expected another file"
        )
    try:
        with _quiet():
            replaced = _rewrite(model, source, target)
    except ImportError:
        raise
    except Exception as error:
        wrong = _wrong(source, error)
        raise wrong from (None if wrong is error else error)
    if not replaced:
        if verbose:
            print(
                f"deformnd.onnx: nothing in {source} is to be rewritten for target {target!r}, "
                "nothing was written"
            )
        return replaced
    opset = model.opset_imports[""]
    said = f"deformnd.onnx: wrote {path} for target {target!r}, opset {opset}; replaced "
    said += ", ".join(f"{n} {kind}" for kind, n in Counter(kind for _, kind in replaced).items())
    import onnx_ir as ir

    # The file is first written elsewhere, so that an older file at `path` stays if this one is
    # wrong.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        external_data = data.name if external[1:] else None
        ir.save(model, made, format="protobuf", external_data=external_data)
        if verify:
            said += "; " + _compared(model, source, made, path, target)
        for new in Path(folder).iterdir():
            new.replace(path.parent / new.name)
    if verbose:
        print(said)
    return replaced


def _wrong(source: Path, error: Exception) -> Exception:
    """The error to raise for one: ours as it is, those of onnx and onnx_ir with the file's name."""
    if str(error).startswith("deformnd.onnx: "):
        return error
    reason = " ".join(str(error).split())[:300]
    return ValueError(f"deformnd.onnx: {source} cannot be rewritten: {reason}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the packages log of problems for which there is a fallback, or an error here."""
    logs = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir")]
    levels = [log.level for log in logs]
    try:
        for log in logs:
            log.setLevel(logging.CRITICAL)
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def _load(source: Path) -> Any:
    """The onnx_ir.Model of a file. External data stays where it is."""
    try:
        import onnx
        import onnx_ir as ir
    except ImportError as error:
        raise ImportError("deformnd.onnx needs onnx: pip install 'deformnd[onnx]'") from error
    try:
        proto = onnx.load(str(source), format="protobuf", load_external_data=False)
        for what in ("graph.sparse_initializer", "training_info"):
            part: Any = proto
            for name in what.split("."):
                part = getattr(part, name)
            if part:
                raise ValueError(f"it has {what}, which is not known here")
        if not proto.HasField("graph") or all(o.domain for o in proto.opset_import):
            raise ValueError("it holds no graph, or names no opset")
        model = ir.serde.deserialize_model(proto)
        ir.external_data.set_base_dir(model.graph, source.parent)
        model.graph.sort()  # fails if it has a cycle
        graphs: tuple[Any, ...] = (model.graph, *model.functions.values())
        for node in (node for graph in graphs for node in graph.all_nodes()):
            for v in node.inputs:
                made = v is None or v.producer() or v.is_graph_input() or v.is_initializer()
                if not made:
                    raise ValueError(f"node {node.name!r} reads {v.name!r}, which nothing makes")
    except Exception as error:  # whatever protobuf and onnx_ir raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"deformnd.onnx: {source} is no valid ONNX file: {reason}") from None
    return model


def _external(model: Any, source: Path) -> list[Path]:
    """The files that a model is in: its own, and then those of its external data."""
    import onnx_ir as ir

    found = [source]
    for graph in (model.graph, *model.graph.subgraphs()):
        for v in graph.initializers.values():
            t = v.const_value
            if isinstance(t, ir.ExternalTensor):
                data, end = Path(t.path), (t.offset or 0) + (t.length or t.nbytes)
                if not data.is_file() or data.stat().st_size < end:
                    raise ValueError(
                        f"deformnd.onnx: {source} has data in {str(data)!r}, expected a file of at "
                        f"least {end} bytes"
                    )
                found.append(data)
    return found


def _rewrite(model: Any, source: Path, target: str) -> list[tuple[str, str]]:
    """Replace all calls, and say which."""
    from onnx_ir.passes import common

    while called := [f for f in model.functions.values() if _in_function(f)]:
        # Functions with calls are inlined, since sizes are not known within a function, and differ
        # between its uses.
        common.InlinePass(criteria=called.__contains__)(model)
        for f in called:
            model.functions.pop(f.identifier(), None)
            for domain, version in f.opset_imports.items():
                model.opset_imports.setdefault(domain, version)
    if not any(_is_call(node) for node in model.graph.all_nodes()):
        return []
    if target == "deformnd" and any(f.domain == DOMAIN for f in model.functions.values()):
        raise ValueError(f"deformnd.onnx: {source} is for target 'deformnd' in part already")
    common.ShapeInferencePass()(model)
    for node in list(model.graph.all_nodes()):
        call = _found(node)
        if call is not None and call.kind != "DeformConv":
            _stand_in(model, call)
    opset = max(model.opset_imports[""], TARGETS[target].oldest)
    _raise_opset(model, opset, source)
    common.ShapeInferencePass()(model)

    table = translation_table(target, opset)
    translation = table[torch.ops.deformnd.deform_conv.default]
    replaced = []
    stale = False
    for node in list(model.graph.all_nodes()):
        # An old graph that _stand_in has not replaced did not fit, and stays.
        call = None if node.op_type == "Conv" else _found(node)
        if call is None:
            continue
        if stale and not all(t is None or _known(t) for t in call.tensors):
            # Values behind a node that onnx does not know get their sizes once it is replaced.
            common.ShapeInferencePass()(model)
            stale = False
        _learn(call)
        body = _body(call, translation, opset)
        same = any(n.op_type == "DeformConv" and n.domain == "" for n in body)
        if call.kind == "DeformConv" and same and len(call.stride) == 2:
            continue
        _replace(model, call, body)
        replaced.append((node.name or node.outputs[0].name, call.kind))
        stale = True
    model.opset_imports.pop(_OURS, None)
    if replaced:
        complete(model)
    return replaced


def _in_function(function: Any) -> bool:
    """Whether a local function holds a call. Functions that deformnd's targets write do not
    count."""
    if function.domain in (DOMAIN, OPENVINO_DOMAIN):
        return False
    return any(_is_call(node) for node in function.all_nodes())


def _is_call(node: Node) -> bool:
    if node.op_type == "Conv":
        return old_graphs.find(node) is not None
    return node.op_type in _ORDER and node.domain in (
        ("",) if node.op_type == "DeformConv" else ("", "mmcv", "mmdeploy")
    )


def _found(node: Node) -> Call | None:
    """The call that ends in a node."""
    if node.domain == _OURS:
        return _call(node, node.inputs)
    if not _is_call(node):
        return None
    if node.op_type == "Conv":
        return old_graphs.find(node)
    given = [*node.inputs, *[None] * 5]
    tensors: list[Any] = [None] * 5
    for i, place in enumerate(_ORDER[node.op_type]):
        tensors[place] = given[i]
    return _call(node, tensors)


def _call(node: Node, tensors: Sequence[Value | None]) -> Call:
    """The call that a node's attributes describe: mmcv's, DeformConv's, or those of _stand_in."""
    kind, tensors = node.op_type, [*tensors, *[None] * 5][:5]
    for name, t in zip(_NAMES[:3], tensors, strict=False):
        if t is None:
            raise _error(node, kind, name, "missing", "a tensor")
    weight = tensors[1]
    shape = None if weight is None or weight.shape is None else list(weight.shape)
    n = 2
    if kind == "DeformConv":
        n = 2 if shape is None else len(shape) - 2  # _learn refuses a weight of unknown shape
        pads = _ints(node, kind, "pads", [0], 2 * n, 0)
        begin, end = pads[:n], pads[n:]
        stride, padding = _ints(node, kind, "strides", [1], n), [*map(min, begin, end)]
        dilation = _ints(node, kind, "dilations", [1], n)
        (groups,) = _ints(node, kind, "group", [1], 1)
        (offset_groups,) = _ints(node, kind, "offset_group", [1], 1)
        kernel = (shape or [])[2:]
        if kernel and all(isinstance(k, int) for k in kernel):
            given = _ints(node, kind, "kernel_shape", kernel, n)
            if given != kernel:
                raise _error(node, kind, "kernel_shape", repr(given), f"the weight's {kernel}")
        before = [b - p for b, p in zip(begin, padding, strict=True)]
        after = [e - p for e, p in zip(end, padding, strict=True)]
    else:
        stride = _ints(node, kind, "stride", [1], n)
        padding = _ints(node, kind, "padding", [0], n, 0)
        dilation = _ints(node, kind, "dilation", [1], n)
        (groups,) = _ints(node, kind, "groups", [1], 1)
        (offset_groups,) = _ints(node, kind, "deform_groups", [1], 1)
        before = after = [0] * n
    shapes: list[tuple[int | None, ...] | None] = [None] * 5
    if shape is not None and len(shape) == 2 + n and all(isinstance(s, int) for s in shape):
        outputs, channels, *kernel = shape
        points, size = math.prod(kernel), [None] * n
        shapes = [
            (None, channels * groups, *size),
            (outputs, channels, *kernel),
            (None, offset_groups * points * n, *size),
            (None, offset_groups * points, *size),
            (outputs,),
        ]
    return Call(
        *(node, kind, tuple(tensors), tuple(shapes), stride, padding, dilation),
        *(groups, offset_groups, before, after),
    )


def _ints(
    node: Node, kind: str, name: str, default: list[int], count: int = 0, least: int = 1
) -> list[int]:
    """An attribute as a list of ints, one for each axis. The file may give one int for all axes."""
    found = node.attributes.get(name)
    value = default if found is None or found.is_ref() else found.value
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(values) == 1:
        values *= count or 1
    if len(values) != (count or len(values)) or not all(
        isinstance(v, int) and v >= least for v in values
    ):
        raise _error(node, kind, name, repr(value), f"{count} ints of at least {least}")
    return values


def _error(node: Node, kind: str, what: str, found: str, expected: str) -> ValueError:
    name = node.name or node.outputs[0].name
    return ValueError(f"deformnd.onnx: {kind} {name!r}: {what} is {found}, expected {expected}")


def _shape(t: Value | None) -> str:
    return f"of shape {t.shape}" if t is not None and t.shape is not None else "of no known shape"


def _known(t: Value) -> bool:
    """Whether all sizes but the batch are known."""
    return t.shape is not None and all(isinstance(s, int) for s in t.shape[1:])


def _learn(call: Call) -> None:
    """Store the shapes and dtypes that a call implies in its tensors. Raises ValueError if the file
    contradicts them."""
    import onnx_ir as ir

    if call.shapes[1] is None:
        raise _error(call.node, call.kind, "weight", _shape(call.tensors[1]), "known sizes")
    dtype = next((t.dtype for t in call.tensors if t is not None and t.dtype is not None), None)
    for name, t, wanted in zip(_NAMES, call.tensors, _follows(call), strict=True):
        if t is None:
            continue
        assert wanted is not None
        found = [None] * len(wanted) if t.shape is None else list(t.shape)
        if len(found) != len(wanted) or any(
            isinstance(f, int) and w not in (f, None) for f, w in zip(found, wanted, strict=True)
        ):
            shape = ", ".join("?" if w is None else str(w) for w in wanted)
            raise _error(call.node, call.kind, name, _shape(t), f"[{shape}]")
        merged = [f if w is None else w for f, w in zip(found, wanted, strict=True)]
        if t.shape is None or merged != found:
            t.shape = ir.Shape(merged)
        if t.dtype is None:
            t.dtype = dtype
        if dtype is None or t.dtype != dtype or not dtype.is_floating_point():
            kind = "a floating dtype" if t.dtype == dtype else str(dtype)
            raise _error(call.node, call.kind, name, f"of dtype {t.dtype}", kind)


def _follows(call: Call) -> list[tuple[int | None, ...] | None]:
    """The shapes of a call, with the batch and the points that follow from other tensors."""
    shapes = list(call.shapes)
    weight = shapes[1]
    image = call.tensors[0]
    assert weight is not None and image is not None
    n = len(weight) - 2
    found = [None] * (2 + n) if image.shape is None else list(image.shape)
    if len(found) != 2 + n:  # which is refused
        return shapes
    size: list[int | None] = []
    for axis in range(n):
        s, k = found[2 + axis], weight[2 + axis]
        assert k is not None
        if not isinstance(s, int):
            size.append(None)
            continue
        reach = call.dilation[axis] * (k - 1) + 1
        pad = 2 * call.padding[axis] + call.before[axis] + call.after[axis]
        if s + pad < reach:
            raise _error(
                *(call.node, call.kind, "input", _shape(image)),
                f"at least {reach - pad} along axis {2 + axis}",
            )
        size.append((s + pad - reach) // call.stride[axis] + 1)
    batch = found[0] if isinstance(found[0], int) else None
    for i in (2, 3):  # the offset and the mask
        known = shapes[i]
        assert known is not None
        follows = (batch, known[1], *size)
        shapes[i] = tuple(f if k is None else k for k, f in zip(known, follows, strict=True))
    return shapes


def _stand_in(model: Any, call: Call) -> None:
    """Replace a call by one node that stands in for it, while shape inference and the version
    converter, which know neither, go over the file."""
    import onnx_ir as ir

    tensors = list(call.tensors)
    bias = tensors[4]
    if call.kind == old_graphs.KIND:
        found = None if bias is None else ir.convenience.get_const_tensor(bias)
        if found is not None and len(found.shape) > 1:
            flat = ir.tensor(found.numpy().reshape(-1), name=f"{call.node.outputs[0].name}.bias")
            tensors[4] = ir.val(flat.name, const_value=flat)
        try:
            _learn(call._replace(tensors=tuple(tensors)))
        except ValueError:  # the sizes do not fit, so this is another kind of graph
            return
        if tensors[4] is not bias:
            model.graph.register_initializer(tensors[4])
    attributes: dict[str, Any] = {
        "stride": call.stride,
        "padding": call.padding,
        "dilation": call.dilation,
        "groups": call.groups,
        "deform_groups": call.offset_groups,
    }
    while tensors[-1] is None:
        tensors.pop()
    node = ir.node(call.kind, tensors, attributes, domain=_OURS, name=call.node.name)
    model.opset_imports[_OURS] = 1
    _swap(call.node, [node], node.outputs[0])


def _swap(old: Node, new: list[Node], result: Value) -> None:
    """Put nodes in the place of one, and remove what is then no longer used."""
    import onnx_ir as ir

    before = old.outputs[0]
    result.name, result.type, result.shape = before.name, before.type, before.shape
    ir.convenience.replace_all_uses_with(before, result, replace_graph_outputs=True)
    old.graph.insert_before(old, new)
    left = [old]
    while left:
        node = left.pop()
        if node.graph is None or any(v.uses() or v.is_graph_output() for v in node.outputs):
            continue
        inputs = [v for v in node.inputs if v is not None]
        node.graph.remove(node, safe=True)
        for v in inputs:
            made = v.producer()
            if made is not None:
                left.append(made)
            elif v.is_initializer() and not (v.uses() or v.is_graph_input() or v.is_graph_output()):
                v.graph.initializers.pop(v.name)


def _raise_opset(model: Any, opset: int, source: Path) -> None:
    """Convert a model to an opset, if it has an older one."""
    import onnx
    import onnx_ir as ir
    from onnx_ir.passes import common
    from onnxscript import version_converter

    found = model.opset_imports[""]
    if found >= opset:
        return
    common.RemoveUnusedNodesPass()(model)
    version_converter.convert_version(model, opset, fallback=True)
    if model.opset_imports[""] == opset:
        # Each opset came with a version of the IR, which the file has to name. Functions came with
        # that of opset 15, so it is new enough for them as well.
        oldest = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
        model.ir_version = max(model.ir_version, oldest)
        return
    reason = "it fails"  # the converter leaves the model as it was, and does not say why
    try:
        onnx.version_converter.convert_version(ir.to_proto(model), opset)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
    raise ValueError(
        f"deformnd.onnx: {source} has opset {found}, and the target needs {opset}, to which onnx "
        f"{onnx.__version__} cannot convert it: {reason}"
    )


class _Writer:
    """Stands in for onnxscript's evaluator: every call of an operator becomes a node."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.opsets: dict[str, int] = {"": 18}

    def eval_op(self, op: Any, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Value:
        import onnx_ir as ir

        given = {k: v for k, v in attributes.items() if v is not None}
        if "value" in given:
            given["value"] = ir.serde.deserialize_tensor(given["value"])
        self.opsets[op.domain] = max(op.opset.version, self.opsets.get(op.domain, 0))
        self.nodes.append(ir.node(op.name, inputs, given, domain=op.domain))
        return self.nodes[-1].outputs[0]


def _body(call: Call, translation: Any, opset: int) -> Any:
    """The lowering of a call as an onnx_ir.Graph of an opset."""
    import onnx_ir as ir
    from onnxscript import evaluator, opset18, version_converter

    writer = _Writer()
    inputs = [
        None if t is None else ir.Value(name=name, shape=t.shape, type=t.type)
        for name, t in zip(_NAMES, call.tensors, strict=True)
    ]
    tensors: list[Any] = list(inputs)
    with evaluator.default_as(writer):  # type: ignore[arg-type]
        if any(call.before + call.after):
            b = Graph(opset18, [])
            zeros = [[0, 0, *side] for side in (call.before, call.after)]
            padded = b.pad(tensors[0], *zeros)
            padded.dtype = tensors[0].dtype
            padded.shape = ir.Shape(
                s + b + a if isinstance(s, int) else None
                for s, b, a in zip(tensors[0].shape, *zeros, strict=True)
            )
            tensors[0] = padded
        result = translation(*tensors, call.stride, call.padding, call.dilation, call.groups)
    graph = ir.Graph(
        [v for v in inputs if v is not None],
        [result],
        nodes=writer.nodes,
        opset_imports=writer.opsets,
    )
    body = ir.Model(graph, ir_version=10)
    version_converter.convert_version(body, opset)
    return body.graph


def _replace(model: Any, call: Call, body: Any) -> None:
    """Replace a call by its lowering."""
    import onnx_ir as ir

    result = body.outputs[0]
    tensors = [t for t in call.tensors if t is not None]
    for inner, outer in zip(body.inputs, tensors, strict=True):
        ir.convenience.replace_all_uses_with(inner, outer)
    nodes = list(body)
    body.outputs.clear()
    body.remove(nodes)
    prefix = call.node.outputs[0].name
    for i, node in enumerate(nodes):
        node.name = f"{prefix}/{node.op_type}_{i}"
        for v in node.outputs:
            v.name = f"{prefix}/{i}"
    _swap(call.node, nodes, result)
    for domain, version in body.opset_imports.items():
        model.opset_imports.setdefault(domain, version)


def _compared(model: Any, source: Path, made: Path, path: Path, target: str) -> str:
    """A line that says how well the new file agrees with the old one, or why that is not known."""
    expected = None
    try:
        arrays = _inputs(model)
        expected = _loaded("onnxruntime", source)(arrays)
    except ImportError as error:
        return f"not compared ({error})"
    except Exception as error:  # ONNX Runtime has its own errors
        reason = engines.reason("onnxruntime", error)
        with contextlib.suppress(Exception):
            expected = _loaded("deformnd", source)(arrays)
    if expected is None:
        return f"not compared, since {source} does not run in onnxruntime: {reason}"
    said = []
    for engine in TARGETS[target].engines:
        try:
            run = _loaded(engine, made)
        except Exception as error:
            reason = engines.reason(engine, error)
            # An engine that lacks an operator in a dtype says nothing about a file for others.
            other = engine != target and "NOT_IMPLEMENTED" in reason
            if not (other or isinstance(error, ImportError)):
                raise engines.not_loaded(engine, str(path), error) from None
            said.append(f"not compared in {engine} ({reason})")
            continue
        try:
            got = run(arrays)
        except Exception as error:
            reason = engines.reason(engine, error)
            raise ValueError(f"deformnd.onnx: {path} fails in {engine}: {reason}") from None
        worst = 0.0
        for g, e in zip(got, expected, strict=True):
            worst = max(
                worst,
                checked_difference(g, e, TARGETS[target].coarse, engine, str(path), str(source)),
            )
        said.append(f"differs from {source} by {worst:.1e} of its largest value in {engine}")
    return "; ".join(said)


def _loaded(engine: str, path: Path) -> Callable[[list[Any]], list[torch.Tensor]]:
    """The function that runs a file in an engine."""
    engines.version(engine)
    _, run = engines.ENGINES[engine](str(path))
    return lambda arrays: [torch.from_numpy(np.asarray(a)) for a in run(arrays)]


def _inputs(model: Any) -> list[Any]:
    """A random array for each input of a model."""
    generator = np.random.default_rng(0)
    sizes: dict[str, int] = {}
    arrays = []
    for v in model.graph.inputs:
        if v.is_initializer():
            continue
        if v.shape is None or v.dtype is None:
            raise ValueError(f"the shape or the type of input {v.name} is not known")
        shape = []
        for axis, s in enumerate(v.shape):
            size = 1 if axis == 0 else 64
            shape.append(
                s
                if isinstance(s, int)
                else size
                if s.value is None
                else sizes.setdefault(s.value, size)
            )
        if not 0 <= math.prod(shape) <= _LARGEST_INPUT or min(shape, default=0) < 0:
            raise ValueError(f"input {v.name} of shape {shape} is too large to make one up")
        real = v.dtype.is_floating_point()
        array = generator.standard_normal(shape) if real else np.zeros(shape)
        arrays.append(array.astype(v.dtype.numpy()))
    return arrays
