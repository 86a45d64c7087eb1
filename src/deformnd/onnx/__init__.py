"""ONNX export of every operator, for the engine that is to run the file.

    deformnd.onnx.export(model, args, "model.onnx", target="onnxruntime")

It needs `pip install 'deformnd[onnx]'` when it is used, but not when it is imported.
"""

from .compat import create_deform_conv2d_custom_op, register_deform_conv2d_onnx_op
from .export import add_function, check, export
from .openvino import read_openvino_model
from .rewrite import rewrite
from .session import custom_ops_library, session
from .table import TARGETS, UnsupportedError, translation_table

__all__ = [
    "TARGETS",
    "UnsupportedError",
    "add_function",
    "check",
    "create_deform_conv2d_custom_op",
    "custom_ops_library",
    "export",
    "read_openvino_model",
    "register_deform_conv2d_onnx_op",
    "rewrite",
    "session",
    "translation_table",
]
