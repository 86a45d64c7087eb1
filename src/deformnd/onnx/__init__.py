"""ONNX export: the standard DeformConv operator for deform_conv2d.

table = deformnd.onnx.translation_table()
torch.onnx.export(model, args, "model.onnx", dynamo=True, custom_translation_table=table)
"""

from .native import translation_table

__all__ = ["translation_table"]
