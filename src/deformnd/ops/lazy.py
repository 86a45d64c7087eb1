"""Layers that take their input channels from the first input, as torch.nn.LazyConv2d does."""

import warnings
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from ..kernels.geometry import check_ints
from . import modules
from .bases import LazyConvXdMixin
from .functional import Size

__all__ = [
    f"Lazy{packed}DeformConv{transpose}{n}d"
    for packed in ("", "Packed")
    for transpose in ("", "Transpose")
    for n in (1, 2, 3)
]

_DOC = """`{name}` whose in_channels is that of the first input.

Args:
    out_channels, kernel_size: as for `{name}`.
    **options: its other arguments.

Example:
    >>> import torch
    >>> from deformnd import Lazy{name}
    >>> layer = Lazy{name}(6, kernel_size=3, padding=1)
    >>> _ = layer({call})
    >>> type(layer).__name__, layer.in_channels
    ('{name}', 4)
"""

_CONVOLUTIONS = {1: nn.LazyConv1d, 2: nn.LazyConv2d, 3: nn.LazyConv3d}


class _Lazy(LazyConvXdMixin):
    rank: int
    weight: UninitializedParameter

    def __init__(self, out_channels: int, kernel_size: Size, **options: Any) -> None:
        name, bias = type(self).__name__, options.pop("bias", True)
        check_ints(name, "out_channels", out_channels, 0, 0)
        modules._check_arguments(self, {}, {"bias": bias}, {"device": None, "dtype": None})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            super().__init__(0, 0, kernel_size, bias=False, **options)  # type: ignore[misc]
        like: dict[str, Any] = {key: options.get(key) for key in ("device", "dtype")}
        self.out_channels = out_channels
        self.weight = UninitializedParameter(**like)
        if bias:
            self.bias = UninitializedParameter(**like)
        for key, generator in self._generators():
            lazy = _CONVOLUTIONS[self.rank](
                generator.out_channels,
                generator.kernel_size,
                generator.stride,
                generator.padding,
                generator.dilation,
                generator.groups,
                generator.bias is not None,
                **like,
            )
            setattr(self, key, lazy)

    def _generators(self) -> list[tuple[str, Any]]:
        keys = ("offset_generator", "mask_generator")
        return [(key, getattr(self, key)) for key in keys if getattr(self, key, None) is not None]

    def _get_num_spatial_dims(self) -> int:
        return self.rank

    def initialize_parameters(self, input: Tensor, *args: Any, **kwargs: Any) -> None:
        if is_lazy(self.weight):
            modules._check_rank(self, input)
            self.in_channels = self._get_in_channels(input)
            if isinstance(self, modules._Packed):
                self._check_groups()
            for _, generator in self._generators():
                generator.initialize_parameters(input)
            super().initialize_parameters(input, *args, **kwargs)
        else:  # A state_dict was loaded before the first input came.
            rows, columns = self.weight.shape[:2]
            self.in_channels = rows if self.transposed else columns * self.groups


def _lazy(name: str) -> type:
    base = getattr(modules, name)
    size = ", ".join(["8"] * base.rank)
    call = f"torch.rand(2, 4, {size})"
    if not name.startswith("Packed"):
        call += f", torch.rand(2, {base.rank * 3**base.rank}, {size})"
    body = {
        "__doc__": _DOC.format(name=name, call=call),
        "__module__": __name__,
        "cls_to_become": base,
    }
    return type(f"Lazy{name}", (_Lazy, base), body)


LazyDeformConv1d = _lazy("DeformConv1d")
LazyDeformConv2d = _lazy("DeformConv2d")
LazyDeformConv3d = _lazy("DeformConv3d")
LazyDeformConvTranspose1d = _lazy("DeformConvTranspose1d")
LazyDeformConvTranspose2d = _lazy("DeformConvTranspose2d")
LazyDeformConvTranspose3d = _lazy("DeformConvTranspose3d")
LazyPackedDeformConv1d = _lazy("PackedDeformConv1d")
LazyPackedDeformConv2d = _lazy("PackedDeformConv2d")
LazyPackedDeformConv3d = _lazy("PackedDeformConv3d")
LazyPackedDeformConvTranspose1d = _lazy("PackedDeformConvTranspose1d")
LazyPackedDeformConvTranspose2d = _lazy("PackedDeformConvTranspose2d")
LazyPackedDeformConvTranspose3d = _lazy("PackedDeformConvTranspose3d")
