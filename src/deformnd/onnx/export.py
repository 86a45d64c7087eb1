from .table import TARGETS, UnsupportedError, translation_table
def check(): pass
def export(): pass
