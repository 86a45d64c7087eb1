"""A BatchNorm becomes part of the layer before it: by `fuse_batch_norm`, or by another tool."""

# ruff: noqa: UP045
import copy
import warnings
from typing import Any, Optional, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.utils import parametrize

from . import checkpoints
from .bases import PLAIN, BatchNorm, ConvNd, NormBase
from .modules import _Packed

__all__ = ["fuse_batch_norm"]

Layer = TypeVar("Layer", bound=ConvNd)


def fuse_batch_norm(layer: Layer, norm: BatchNorm) -> Layer:
    """A copy of the layer that computes norm(layer(...)) by itself, for inference.

    For any of the twelve layers (and torch's own convolutions, also grouped transposed ones) in
    any rank: the normalisation becomes part of weight and bias. Offsets and masks stay.

    Args:
        layer: a convolution in eval mode.
        norm: the BatchNorm that follows it, in eval mode, with running statistics.

    Raises:
        TypeError: layer is no convolution, or norm no BatchNorm.
        ValueError: either is in training mode, norm has other channels or no running statistics,
            or the layer's weight is parametrized (remove_parametrizations first).

    Example:
        >>> import torch
        >>> from deformnd import PackedDeformConv2d, fuse_batch_norm
        >>> layer, norm = PackedDeformConv2d(3, 4, 3).eval(), torch.nn.BatchNorm2d(4).eval()
        >>> x = torch.rand(1, 3, 8, 8)
        >>> torch.allclose(fuse_batch_norm(layer, norm)(x), norm(layer(x)), atol=1e-6)
        True
    """
    if not isinstance(layer, ConvNd):
        raise TypeError(
            f"fuse_batch_norm: layer is a {type(layer).__name__}, expected a convolution"
        )
    if not isinstance(norm, NormBase):  # InstanceNorm with running statistics is the same in eval
        raise TypeError(f"fuse_batch_norm: norm is a {type(norm).__name__}, expected a BatchNorm")
    if layer.training or norm.training:
        raise ValueError("fuse_batch_norm: expected layer and norm in eval mode")
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        raise ValueError("fuse_batch_norm: norm has no running statistics")
    if norm.num_features != layer.out_channels:
        raise ValueError(
            f"fuse_batch_norm: norm has {norm.num_features} features, expected the layer's "
            f"{layer.out_channels} output channels"
        )
    if parametrize.is_parametrized(layer):
        raise ValueError("fuse_batch_norm: layer is parametrized, expected plain parameters")
    fused = copy.deepcopy(layer)
    with torch.no_grad():
        scale = (variance.double() + norm.eps).rsqrt()
        shift = -mean.double()
        if layer.bias is not None:
            shift = shift + layer.bias
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = shift * scale
        if norm.bias is not None:
            shift = shift + norm.bias
        if layer.transposed:  # weight is [groups * Cin / groups, Cout / groups, ...]
            weight = layer.weight.double().unflatten(0, (layer.groups, -1))
            weight = weight * scale.view(layer.groups, 1, -1, *[1] * len(layer.kernel_size))
            weight = weight.flatten(0, 1)
        else:
            weight = layer.weight * scale.view(-1, 1, *[1] * len(layer.kernel_size))
        dtype, grad = layer.weight.dtype, layer.weight.requires_grad
        fused.weight = nn.Parameter(weight.to(dtype), grad)
        fused.bias = nn.Parameter(shift.to(dtype), grad)
    return fused


def _registered(parent: nn.Module, name: str, new: Optional[nn.Module]) -> Optional[nn.Module]:
    """A hook of torch that sees each module get its place; what it returns takes that place.

    Note [fusing tools]
    Tools that fuse norms, such as the fuse() of YOLO, read the geometry of a convolution and put an
    ordinary one in its place, whose weight is the old one times the norm's factors. They know
    nothing of offsets, which would silently be gone. So a packed layer stays where it is, and takes
    over the new weight and bias. Where the new weight and bias equal the layer's own, nothing tells
    a tool from a person who wants the ordinary convolution, which then gets its place. Either way a
    warning says what was done.
    """
    if isinstance(new, _Packed):
        checkpoints.watch_beside(parent)
    elif type(new) in PLAIN and name in parent._modules:
        old, plain = parent._modules[name], cast(Any, new)
        if isinstance(old, _Packed) and _is_multiple(old, new):
            what = f"{type(old).__name__} {name!r}: a {type(new).__name__} with"
            if _same(old.weight, plain.weight) and _same(old.bias, plain.bias):
                warnings.warn(
                    f"{what} its weight and bias takes its place, without its offsets; if that is "
                    "a norm being fused, call deformnd.fuse_batch_norm instead",
                    stacklevel=3,
                )
                return None
            warnings.warn(
                f"{what} multiples of its filters is taken for itself with a norm fused: it stays, "
                "offsets and all, with this weight and bias; put None there first to be rid of it",
                stacklevel=3,
            )
            fused = copy.deepcopy(old)
            fused.weight, fused.bias = plain.weight, plain.bias
            return fused
    return None


register_module_module_registration_hook(_registered)  # type: ignore[arg-type]


def _same(a: Optional[Tensor], b: Optional[Tensor]) -> bool:
    """Whether they have equal values; None stands for zeros."""
    if a is None or b is None:
        return not any(t is not None and bool(t.any()) for t in (a, b))
    return torch.equal(a.cpu().double(), b.cpu().double())


def _is_multiple(old: Any, new: Any) -> bool:
    """Whether new's weight is old's with a factor for each output channel."""
    keys = ("in_channels", "out_channels", "kernel_size", "stride", "groups", "transposed")
    if any(getattr(old, key) != getattr(new, key) for key in keys):
        return False
    if old.weight.is_meta or new.weight.is_meta:
        return False
    with torch.no_grad():
        a, b = (_by_output_channel(m, m.weight).flatten(1).double().cpu() for m in (old, new))
        if a.shape[1] < 2:  # one number is always a multiple of another
            return False
        factor = ((a * b).sum(1) / a.square().sum(1)).nan_to_num(0.0)
        return bool((b - factor[:, None] * a).norm() < 1e-2 * b.norm())


def _by_output_channel(layer: ConvNd, weight: Tensor) -> Tensor:
    """The layer's weight with the output channels first, whatever its family and groups."""
    if not layer.transposed:
        return weight
    grouped: Tensor = weight.unflatten(0, (layer.groups, -1))
    return grouped.transpose(1, 2).flatten(0, 1)
