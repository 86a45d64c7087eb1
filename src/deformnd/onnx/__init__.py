"""ONNX export of every operator, for the engine that shall run the file."""

from .export import TARGETS, UnsupportedError, check, export
from .table import translation_table

__all__ = ["TARGETS", "UnsupportedError", "check", "export", "translation_table"]
