"""What trains deformable layers: `parameter_groups`, `reset_offsets`, `watch_offsets`."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn

from ..compat import internimage
from ..ops.modules import _DeformConvNd, _DeformConvTransposeNd, _Predicting
from . import packages


def parameter_groups(
    model: nn.Module,
    lr: float,
    factor: float = 0.1,
    names: str | Sequence[str] = ("offset_generator", "mask_generator"),
) -> list[dict[str, Any]]:
    """Two parameter groups for an optimizer: all others, and the predictors with a smaller rate.

    Args:
        model: has packed layers.
        lr: learning rate of all parameters but the predictors'.
        factor: the predictors' rate is factor * lr.
        names: what predictors' attributes are called; for layers that are not deformnd's, such as
            BasicSR's, say 'conv_offset'. A name or several.

    Raises:
        TypeError: model is no Module, or names are no names.
        ValueError: no trainable parameter belongs to a predictor, or lr or factor is negative or
            not finite.

    References:
        Deformable Convolutional Networks, arXiv 1703.06211; v2, arXiv 1811.11168 (factor 0.1).

    Example:
        >>> import torch
        >>> import deformnd
        >>> model = deformnd.PackedDeformConv2d(3, 8, kernel_size=3)
        >>> optimizer = torch.optim.SGD(deformnd.parameter_groups(model, lr=0.1), momentum=0.9)
        >>> [(len(group["params"]), round(group["lr"], 4)) for group in optimizer.param_groups]
        [(2, 0.1), (1, 0.01)]
    """
    _check_model("parameter_groups", model)
    names = (names,) if isinstance(names, str) else names
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"parameter_groups: names is {names!r}, expected names of attributes")
    for key, value in (("lr", lr), ("factor", factor)):
        _check_number("parameter_groups", key, value)
    others: list[nn.Parameter] = []
    predictors: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            inside = not set(names).isdisjoint(name.split("."))
            (predictors if inside else others).append(parameter)
    if not predictors:
        raise ValueError(
            f"parameter_groups: the model has no trainable parameter in {' or '.join(names)}"
        )
    return [{"params": others, "lr": lr}, {"params": predictors, "lr": factor * lr}]


def reset_offsets(model: nn.Module) -> None:
    """Give all predictors of a model's packed layers zeros again: offset 0, and mask 1 by default.

    For after an initialisation that goes through all torch.nn.Conv2d of a model, since the
    predictors are such: random ones move samples by pixels. Where a predictor is made of several
    modules, the last that has weight and bias, convolution or norm, is what becomes zero. If that
    is a norm, the convolution before it must not be zero, too, or neither learns.

    Raises:
        TypeError: model is no Module.
        ValueError: the model has no packed layer of deformnd, or a predictor has no convolution, a
            computed weight, or a norm at its end with statistics and no weight. The model is then
            unchanged.

    Example:
        >>> import torch
        >>> import deformnd
        >>> model = deformnd.PackedDeformConv2d(3, 8, kernel_size=3)
        >>> for m in model.modules():
        ...     if isinstance(m, torch.nn.Conv2d):
        ...         _ = torch.nn.init.kaiming_normal_(m.weight)
        >>> deformnd.reset_offsets(model)
        >>> bool(model.offset_generator.weight.any())
        False
    """
    _check_model("reset_offsets", model)
    layers = [m for m in model.modules() if isinstance(m, _Predicting)]
    if not layers:
        raise ValueError("reset_offsets: the model has no packed layer of deformnd")
    for parameter in [p for layer in layers for p in layer._to_zero()]:
        nn.init.zeros_(parameter)


def _check_model(name: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model is a {type(model).__name__}, expected a Module")


def _check_number(name: str, key: str, value: Any, infinite: bool = False) -> None:
    """That value is not negative, and finite."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()  # an optimizer takes a rate that is a tensor
    if isinstance(value, (bool, str, Tensor)) or not isinstance(value, SupportsFloat):
        raise TypeError(f"{name}: {key} is {value!r}, expected a number")
    if not 0 <= float(value) or (math.isinf(value) and not infinite):
        raise ValueError(f"{name}: {key} is {value!r}, expected a number of at least 0")


class watch_offsets:
    """Warn when the offsets of a layer run away.

    A training that diverges shows first in the offsets. Every so many calls of each deformable
    layer the mean of |offset| is compared with a limit; beyond it, or not finite, a RuntimeWarning
    names the layer. Works until `remove()`, or as a context manager. Calls that torch.compile or a
    tracer sees are not watched; remove it before torch.jit.script. A copy of the model, and one
    that is saved and loaded, is not watched.

    Args:
        model: has deformable layers: deformnd's, or those of torchvision, mmcv, BasicSR, tvdcn or
            OpenGVLab that `convert` knows.
        limit: in pixels, at least 0. 50 is what BasicSR warns at.
        every: look at the first of so many calls (each look waits for the device).

    Raises:
        TypeError: model is no Module, limit no number or every no int.
        ValueError: the model has no deformable layer that is known, limit is negative or NaN, or
            every is below 1.

    Example:
        >>> import torch
        >>> import deformnd
        >>> model = deformnd.PackedDeformConv2d(3, 8, kernel_size=3)
        >>> with deformnd.watch_offsets(model, limit=50):
        ...     model(torch.rand(1, 3, 8, 8)).shape
        torch.Size([1, 8, 6, 6])
    """

    def __init__(self, model: nn.Module, limit: float = 50.0, every: int = 100) -> None:
        _check_model("watch_offsets", model)
        _check_number("watch_offsets", "limit", limit, infinite=True)
        if isinstance(every, bool) or not isinstance(every, int):
            raise TypeError(f"watch_offsets: every is {every!r}, expected an int")
        if every < 1:
            raise ValueError(f"watch_offsets: every is {every}, expected at least 1")
        self.limit = limit
        self.every = every
        self._handles: list[Any] = []
        for name, module in model.named_modules():
            self._watch(name, module)
        if not self._handles:
            raise ValueError(
                "watch_offsets: the model has no deformable layer with an offset that is known"
            )

    def _watch(self, name: str, layer: Any) -> None:
        package, kind, packed = packages.known(layer) or ("", "", False)
        if isinstance(layer, _Predicting) or (package == "tvdcn" and packed):
            if layer.offset_generator is not None:
                look = _Look(self, name, layer.offset_activation, 1.0)
                self._handles.append(layer.offset_generator.register_forward_hook(look))
        elif package == "opengvlab" or isinstance(layer, (internimage.DCNv3, internimage.DCNv4)):
            predictor = layer.offset_mask if hasattr(layer, "offset_mask") else layer.offset
            look = _Look(self, name, functools.partial(_offset_of_opengvlab, layer), 1.0)
            self._handles.append(predictor.register_forward_hook(look))
        elif packed or packages.is_aligner(layer):
            # Two of three channels of a modulated layer's prediction are the offset.
            share = 2 / 3 if not packed or kind.startswith("Modulated") else 1.0
            look = _Look(self, name, None, share)
            self._handles.append(layer.conv_offset.register_forward_hook(look))
        elif package or isinstance(layer, (_DeformConvNd, _DeformConvTransposeNd)):
            look = _Look(self, name, None, 1.0)
            self._handles.append(layer.register_forward_pre_hook(look, with_kwargs=True))

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> watch_offsets:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def _offset_of_opengvlab(layer: Any, predicted: Tensor) -> Tensor:
    """In pixels, of what DCNv3's `offset` or DCNv4's `offset_mask` predicts."""
    if hasattr(layer, "offset_mask"):
        points = layer.kernel_size**2 - layer.remove_center
        predicted = predicted[..., : layer.group * points * 3].unflatten(-1, (layer.group, -1))
        predicted = predicted[..., : points * 2]
    offset: Tensor = predicted * layer.offset_scale
    return offset


class _Look:
    """The hook of one layer: a forward hook of its predictor, or a forward pre-hook of itself."""

    def __init__(self, watch: watch_offsets, name: str, activation: Any, share: float) -> None:
        self.watch, self.name, self.activation, self.share = watch, name, activation, share
        self.calls = 0

    def __call__(self, module: nn.Module, args: Any, given: Any) -> None:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return
        offset = given  # what a predictor gave
        if isinstance(given, dict):  # the keyword arguments of a layer
            offset = given["offset"] if "offset" in given else args[1]
        if offset is None:
            return
        self.calls += 1
        if (self.calls - 1) % self.watch.every:
            return
        with torch.no_grad():
            if self.share < 1:
                offset = offset[:, : round(self.share * offset.shape[1])]
            if self.activation is not None:
                offset = self.activation(offset)
            mean = offset.abs().mean().item()
        if not mean <= self.watch.limit:
            warnings.warn(
                f"watch_offsets: mean |offset| of {self.name or 'the model'} is {mean:.4g} pixels, "
                f"above {self.watch.limit:g}",
                RuntimeWarning,
                stacklevel=2,
            )

    def __reduce__(self) -> Any:
        return _Unwatched, ()


class _Unwatched:
    """What a hook becomes in a copy of the model, or in a file."""

    def __call__(self, *args: Any) -> None:
        pass
