"""deformnd in a model that exists: replace its layers, and train what is new."""

from ..ops.checkpoints import original_state_dict
from .foreign import convert
from .ordinary import deformify
from .rules import PackRule
from .train import parameter_groups, reset_offsets, watch_offsets

__all__ = [
    "PackRule",
    "convert",
    "deformify",
    "original_state_dict",
    "parameter_groups",
    "reset_offsets",
    "watch_offsets",
]
