"""Loading plain DeformConv files into OpenVINO, which has no rule for them."""

from __future__ import annotations

import os
from typing import Any

from .export import path_to_read
from .lowerings import FAR
from .nodes import DOMAIN


def read_openvino_model(path: str | os.PathLike[str], core: Any = None) -> Any:
    """Read an ONNX file into OpenVINO, with a rule for the standard 2-D DeformConv.

    It is for files made for target "onnxruntime" or by others, and for files of target "deformnd",
    whose functions OpenVINO does not read either (these need the package onnx). Files made for
    target "openvino" need no help.

    Args:
        path: the file.
        core: the openvino.Core to read with; it knows DeformConv from then on. None: a new one.

    Returns:
        The openvino.Model, for core.compile_model or openvino.compile_model.

    Raises:
        ImportError: OpenVINO is not installed.
        ValueError, TypeError: there is no such file, OpenVINO does not read it, or core is no Core.

    Example:
        >>> import os, tempfile
        >>> import openvino, torch
        >>> import deformnd.onnx
        >>> layer = deformnd.PackedDeformConv2d(3, 8, 3, padding=1).eval()
        >>> path, x = os.path.join(tempfile.mkdtemp(), "layer.onnx"), torch.rand(1, 3, 16, 16)
        >>> program = deformnd.onnx.export(layer, (x,), path, verbose=False)
        >>> compiled = openvino.compile_model(deformnd.onnx.read_openvino_model(path), "CPU")
        >>> compiled(x.numpy())[0].shape
        (1, 8, 16, 16)
    """
    try:
        import openvino
        from openvino.frontend.onnx import ConversionExtension
    except ImportError as error:
        raise ImportError("read_openvino_model needs OpenVINO: pip install openvino") from error
    path = path_to_read(path)
    core = openvino.Core() if core is None else core
    if not isinstance(core, openvino.Core):
        kind = type(core).__name__
        raise TypeError(f"read_openvino_model: core is a {kind}, expected an openvino.Core")
    core.add_extension(ConversionExtension("DeformConv", "", _convert))
    try:
        model = _without_functions(path)
        return core.read_model(path if model is None else model)
    except Exception as error:  # OpenVINO raises RuntimeError, and the package onnx many others
        reason = " ".join(str(error).split())
        raise ValueError(f"read_openvino_model: OpenVINO does not read {path}: {reason}") from error


def _without_functions(path: str) -> bytes | None:
    """The content of a file of target "deformnd", with the bodies of its functions in place of the
    nodes; None for other files, and where the package onnx cannot read it."""
    try:
        import onnx
        import onnx.inliner
    except ImportError:
        return None
    try:
        found = onnx.load(path, load_external_data=False).functions
    except Exception:  # OpenVINO will say what is wrong with it
        return None
    if all(function.domain != DOMAIN for function in found):
        return None
    inlined: bytes = onnx.inliner.inline_local_functions(onnx.load(path)).SerializeToString()
    return inlined


def _convert(node: Any) -> Any:
    from openvino import opset8, opset13

    inputs = [node.get_input(i) for i in range(node.get_input_size())]
    # An input that is left out in the middle is a node of type NullNode.
    given = [None if t.get_node().get_type_name() == "NullNode" else t for t in inputs]
    image, weight, offset, bias, mask = given + [None] * (5 - len(given))
    assert weight is not None and offset is not None
    pads = list(node.get_attribute("pads", [0] * 4))
    if len(pads) != 4:
        raise NotImplementedError(f"deformnd.onnx: DeformConv in {len(pads) // 2}-D in OpenVINO")
    # Offsets are bounded here for the reason in Note [bounded offsets] in lowerings.py.
    far = opset13.convert_like(opset13.constant(FAR), offset)
    offset = opset13.select(opset13.less(opset13.absolute(offset), far), offset, far)
    result = opset8.deformable_convolution(
        image,
        offset,
        weight,
        list(node.get_attribute("strides", [1, 1])),
        pads[:2],
        pads[2:],
        list(node.get_attribute("dilations", [1, 1])),
        mask,
        "explicit",
        node.get_attribute("group", 1),
        node.get_attribute("offset_group", 1),
        True,  # samples less than a pixel outside blend with 0, as in ONNX
    )
    if bias is not None:
        shape = opset13.constant([1, -1, 1, 1])
        result = opset13.add(result, opset13.reshape(bias, shape, False))
    return result.outputs()
