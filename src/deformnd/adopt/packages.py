"""Which layers of other packages are known, by the names of package and class."""

from __future__ import annotations

import re

import torch
from torch import nn

_OLD_AND_NEW = ("DeformConv", "DeformConv2d")
_PLAIN = {f"{prefix}{name}" for prefix in ("", "Modulated") for name in _OLD_AND_NEW}
_MMCV = {**dict.fromkeys(_PLAIN, False), **dict.fromkeys((f"{n}Pack" for n in _PLAIN), True)}
_OPENGVLAB = ("DCNv3", "DCNv3_pytorch", "DCNv4")
_ATTENTION = "MultiScaleDeformableAttention"
_MMCV_PACKAGES = ("mmcv", "mmdet", "mmedit", "basicsr", "easyocr")


def known(module: nn.Module) -> tuple[str, str, bool] | None:
    """The package, the class and whether it predicts its offset.

    The package is 'torchvision', 'mmcv', 'tvdcn', 'transformers' or 'opengvlab', whose files are
    copied around.

    None for any other module, and for a subclass, or an object, that changes forward.
    """
    # A scripted module has neither a Python forward nor a place for another layer.
    if isinstance(module, torch.jit.ScriptModule) or "forward" in vars(module):
        return None
    for kind in type(module).__mro__:
        package, name = kind.__module__.split(".")[0], kind.__name__
        if type(module).forward is not getattr(kind, "forward", None):
            break  # a subclass that does something else
        if package == "torchvision" and name == "DeformConv2d":
            return package, name, False
        if package in _MMCV_PACKAGES and name in _MMCV:
            return "mmcv", name, _MMCV[name]
        if package in ("mmcv", "transformers") and name == _ATTENTION:
            return package, name, False
        if name in _OPENGVLAB and re.search("dcnv[34]", kind.__module__.lower()):
            return None if ours(module) else ("opengvlab", name, True)
        if package == "tvdcn" and re.fullmatch(r"(Packed)?DeformConv(Transpose)?[123]d", name):
            return package, name, name.startswith("Packed")
    return None


def ours(module: nn.Module) -> bool:
    """Whether it is a layer of this package, or of a class made of one."""
    return any(kind.__module__.startswith("deformnd.") for kind in type(module).__mro__)


def is_aligner(module: nn.Module) -> bool:
    """Whether it is BasicSR's DCNv2Pack, whose conv_offset sees other features than the layer."""
    kind = type(module)
    return kind.__name__ == "DCNv2Pack" and kind.__module__.split(".")[0] == "basicsr"


def looks_deformable(module: nn.Module) -> bool:
    """Whether a class that it is of, or was scripted from, has a name of deformable layers."""
    names = [kind.__name__ for kind in type(module).__mro__]
    if isinstance(module, torch.jit.ScriptModule):
        names.append(getattr(module, "original_name", ""))
    return any(re.search(r"deform\w*conv|dcn", name, re.IGNORECASE) for name in names)
