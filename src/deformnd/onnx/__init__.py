"""ONNX export of every operator, for the engine that shall run the file."""

from .export import add_function, check, export
from .table import TARGETS, UnsupportedError, translation_table

__all__ = ["TARGETS", "UnsupportedError", "add_function", "check", "export", "translation_table"]
