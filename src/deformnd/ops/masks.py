"""Activations that turn what a network predicts into masks."""

# ruff: noqa: UP006, UP035
import math
from numbers import Real
from typing import Any, List

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function

from ..kernels.geometry import check_ints, check_tensor
from .functional import Size, _ints, _node, _outside_a_trace, _values

__all__ = [
    "MaskSigmoid",
    "MaskSoftmax1d",
    "MaskSoftmax2d",
    "MaskSoftmax3d",
    "mask_sigmoid",
    "mask_softmax1d",
    "mask_softmax2d",
    "mask_softmax3d",
]


def mask_sigmoid(mask: Tensor, scale: float = 2.0) -> Tensor:
    """scale * sigmoid(mask), elementwise.

    The default scale makes a prediction of zero a mask of one, so that a layer whose mask
    predictor is zero-initialised starts as if it had no mask.

    Args:
        mask: any shape, floating dtype.
        scale: the largest value, above 0; a number, or a Tensor of one.

    Raises:
        ValueError: scale is not positive, or not finite.
        TypeError: mask is no dense tensor of a floating dtype, or scale is no number.

    References:
        Deformable ConvNets v2, arXiv 1811.11168 (there with scale 1).

    Example:
        >>> import torch
        >>> from deformnd import mask_sigmoid
        >>> mask_sigmoid(torch.zeros(2))
        tensor([1., 1.])
    """
    if not torch.jit.is_scripting():
        if has_torch_function((mask, scale)):
            node = _node(mask_sigmoid, (mask, scale))
            if node is not None:
                return node  # type: ignore[no-any-return]
        check_tensor("mask_sigmoid", "mask", mask)
        _outside_a_trace(_check_scale, "mask_sigmoid", scale)
    elif not scale > 0:
        raise ValueError(f"mask_sigmoid: scale is {scale}, expected a positive number")
    return torch.sigmoid(mask) * scale


def _check_scale(name: str, scale: Any) -> float:
    if type(scale) is float and 0 < scale < math.inf:
        return scale  # This is checked first, since it decides nearly all calls.
    value = scale
    if isinstance(scale, Tensor) and scale.numel() == 1:  # It may be learned, or a traced size.
        value = scale.item()
    if isinstance(value, bool) or not isinstance(value, (Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: scale is {scale!r}, expected a number")
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{name}: scale is {scale}, expected a positive number")
    return float(value)


def mask_softmax1d(mask: Tensor, kernel_size: Size) -> Tensor:
    return _mask_softmax(1, mask, kernel_size)


def mask_softmax2d(mask: Tensor, kernel_size: Size) -> Tensor:
    return _mask_softmax(2, mask, kernel_size)


def mask_softmax3d(mask: Tensor, kernel_size: Size) -> Tensor:
    return _mask_softmax(3, mask, kernel_size)


_SOFTMAXES = (mask_softmax1d, mask_softmax2d, mask_softmax3d)


def _mask_softmax(n: int, mask: Tensor, kernel_size: Size) -> Tensor:
    name = f"mask_softmax{n}d"
    if not torch.jit.is_scripting():
        if has_torch_function((mask,)):
            node = _node(_SOFTMAXES[n - 1], (mask, kernel_size))
            if node is not None:
                return node  # type: ignore[no-any-return]
        if torch.jit.is_tracing():
            kernel_size = _ints(kernel_size)
        check_tensor(name, "mask", mask)
        check_ints(name, "kernel_size", kernel_size, n, 1)
    kernel = _values(kernel_size, n)
    points = 1
    for k in kernel:
        points *= k
    if len(kernel) != n or min(kernel) < 1:  # Only TorchScript gets here without a check before.
        raise ValueError(f"{name}: kernel_size is {kernel}, expected {n} positive values")
    if mask.dim() != n + 1 and mask.dim() != n + 2:
        raise ValueError(f"{name}: mask has {mask.dim()} dimensions, expected {n + 2} or {n + 1}")
    axis = mask.dim() - n - 1
    channels = mask.shape[axis]
    if not torch.jit.is_scripting():
        if torch.jit.is_tracing():
            channels = _ints(channels)
    if channels % points != 0 or channels == 0:
        raise ValueError(
            f"{name}: mask has {channels} channels, expected a multiple of {points} kernel points; "
            f"mask {list(mask.shape)}, kernel_size {kernel}"
        )
    grouped = mask.unflatten(axis, [channels // points, points])
    return torch.softmax(grouped, axis + 1).flatten(axis, axis + 1)


_SOFTMAX_DOC = """Softmax over the {n}-D kernel points of each mask group.

Args:
    mask: [B, MG * K, *out], or unbatched, floating dtype; K = prod(kernel_size), channel g * K + k.
    kernel_size: an int or {n}.

Returns:
    The same shape; the K values of a group at one position are positive and add up to 1.

Raises:
    ValueError: the channels are no multiple of K, the rank is another, or kernel_size is not
        positive.
    TypeError: mask is no dense tensor of a floating dtype, or kernel_size is no int or ints.

References:
    InternImage (DCNv3), arXiv 2211.05778.

Example:
    >>> import torch
    >>> from deformnd import mask_softmax{n}d
    >>> mask = mask_softmax{n}d(torch.randn(2, {channels}, {size}), 3)
    >>> bool(torch.allclose(mask[:, :{points}].sum(1), torch.ones(2, {size})))
    True
"""

for _n, _f in ((1, mask_softmax1d), (2, mask_softmax2d), (3, mask_softmax3d)):
    _f.__doc__ = _SOFTMAX_DOC.format(
        n=_n, channels=2 * 3**_n, points=3**_n, size=", ".join(["8"] * _n)
    )


class MaskSigmoid(nn.Module):
    """Module of `mask_sigmoid`.

    Example:
        >>> import torch
        >>> from deformnd import MaskSigmoid
        >>> MaskSigmoid()(torch.zeros(2))
        tensor([1., 1.])
    """

    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        self.scale = _check_scale("MaskSigmoid", scale)

    def forward(self, mask: Tensor) -> Tensor:
        return mask_sigmoid(mask, self.scale)

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


class _MaskSoftmaxNd(nn.Module):
    rank: int
    kernel_size: List[int]

    def __init__(self, kernel_size: Size) -> None:
        super().__init__()
        name = type(self).__name__
        self.kernel_size = list(check_ints(name, "kernel_size", kernel_size, self.rank, 1))

    def forward(self, mask: Tensor) -> Tensor:
        return _mask_softmax(len(self.kernel_size), mask, self.kernel_size)

    def extra_repr(self) -> str:
        return f"kernel_size={tuple(self.kernel_size)}"


class MaskSoftmax1d(_MaskSoftmaxNd):
    """Module of `mask_softmax1d`."""

    rank = 1


class MaskSoftmax2d(_MaskSoftmaxNd):
    """Module of `mask_softmax2d`."""

    rank = 2


class MaskSoftmax3d(_MaskSoftmaxNd):
    """Module of `mask_softmax3d`."""

    rank = 3
