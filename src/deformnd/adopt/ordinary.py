"""Ordinary convolutions become deformable: `deformify`."""

# ruff: noqa: UP007, UP045 (aliases that Python 3.10 evaluates)
from __future__ import annotations

import copy
import fnmatch
import re
from collections.abc import Callable, Sequence
from typing import Any, Optional, Union

import torch
from torch import nn

from ..ops.bases import PLAIN
from ..ops.modules import Activation
from .exchange import check_nothing_lost, layer_like, replace, replacements, take_place

Chooser = Callable[[str, nn.Module], bool]
Where = Optional[Union[str, type, Chooser, Sequence[Union[str, type]]]]


def deformify(
    model: nn.Module,
    where: Where = None,
    *,
    modulated: bool = True,
    offset_groups: int = 1,
    mask_groups: int = 1,
    generator_bias: bool = True,
    generator_groups: int | None = None,
    offset_activation: Activation = None,
    mask_activation: Activation = "sigmoid",
    inplace: bool = True,
    verbose: bool = True,
) -> nn.Module:
    """Make convolutions deformable. The model's outputs are the same until it is trained.

    Each chosen torch.nn.Conv or ConvTranspose, of any rank, becomes the packed deformable layer
    with the same weight and bias (the same Parameter objects) and predictors of zeros: offset 0,
    mask 1. Train on with `parameter_groups`.

    Args:
        model: any module.
        where: which convolutions. None: the 3x3 ones in layer3 and layer4, the last two stages of a
            ResNet of torchvision or timm. A pattern of names with * and ?, such as
            'layer4.*.conv2'; a type, such as torch.nn.Conv3d; a list of these, any of which
            suffices; or a function of the name and the module that returns a bool.
        modulated ... mask_activation: as for `PackedDeformConv2d`. The activations must map 0 to
            offset 0 and to mask 1.
        inplace: False to leave the model alone and change a copy.
        verbose: print what was replaced.

    Returns:
        The model, or what replaces it.

    Raises:
        ValueError: nothing matched, or an argument does not fit a layer. The model is then
            unchanged.

    References:
        Deformable ConvNets v2 (which stages), arXiv 1811.11168.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import deformnd
        >>> model = nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.ConvTranspose3d(4, 1, 3))
        >>> x = torch.rand(1, 1, 5, 6, 7)
        >>> expected = model(x)
        >>> model = deformnd.deformify(model, nn.ConvTranspose3d)
        deformnd.deformify: 1 layer replaced
          ConvTranspose3d -> PackedDeformConvTranspose3d: 2
        >>> torch.testing.assert_close(model(x), expected)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"deformify: model is a {type(model).__name__}, expected a Module")
    chosen = _chooser(where)
    if not inplace:
        model = copy.deepcopy(model)

    def replacement(name: str, module: nn.Module) -> nn.Module | None:
        if type(module) not in PLAIN or not chosen(name, module):
            return None
        layer: Any = layer_like(
            f"deformify: {name}",
            module,
            module,
            True,
            modulated=modulated,
            offset_groups=offset_groups,
            mask_groups=mask_groups,
            generator_bias=generator_bias,
            generator_groups=generator_groups,
            offset_activation=offset_activation,
            mask_activation=mask_activation,
        )
        for generator in (layer.offset_generator, layer.mask_generator):
            if generator is not None:
                generator.to_empty(device=module.weight.device)
                for parameter in generator.parameters():
                    nn.init.zeros_(parameter)
                generator.train(module.training)
        _check_start(layer)
        check_nothing_lost(f"deformify: {name}", module)
        take_place(layer, module)
        return layer  # type: ignore[no-any-return]

    replaced = replacements(model, replacement)
    if not replaced:
        if where is None:
            wanted = "3x3 convolution in layer3 or layer4, as a ResNet has; choose others by where="
        else:
            wanted = f"ordinary convolution that fits where={where!r}"
            fit = [f"{n} ({type(m).__name__})" for n, m in model.named_modules() if chosen(n, m)]
            if fit:
                wanted += f"; there is {', '.join(fit[:3])}"
        raise ValueError(f"deformify: the model has no {wanted}")
    model, report = replace(model, replaced)
    if verbose:
        print(f"deformnd.deformify: {report}")
    return model


def _chooser(where: Where) -> Chooser:
    if where is None:
        return lambda name, m: (
            isinstance(m, nn.Conv2d)
            and m.kernel_size == (3, 3)
            and re.search(r"(^|\.)layer[34]\.", name) is not None
        )
    if isinstance(where, (str, type)):
        where = [where]
    if isinstance(where, Sequence):
        for w in where:
            if not isinstance(w, (str, type)):
                raise TypeError(f"deformify: where has {w!r}, expected names and types")
        choices = where
        return lambda name, m: any(
            fnmatch.fnmatchcase(name, w) if isinstance(w, str) else isinstance(m, w)
            for w in choices
        )
    if not callable(where):
        raise TypeError(f"deformify: where is {where!r}, expected a name, a type or a function")
    return where


def _check_start(layer: Any) -> None:
    """That predictors of zeros mean offset 0 and mask 1."""
    if layer.weight.is_meta:
        return
    for kind, start in (("offset", 0.0), ("mask", 1.0)):
        generator, activation = (getattr(layer, f"{kind}_{k}") for k in ("generator", "activation"))
        if generator is None:
            continue
        zeros = layer.weight.new_zeros(1, generator.out_channels, *(1,) * layer.rank)
        with torch.no_grad():
            value = zeros if activation is None else activation(zeros)
        if not torch.all(value == start):
            raise ValueError(
                f"deformify: {kind}_activation is {activation}, which maps 0 to "
                f"{float(value.flatten()[0]):.4g}, expected {start:.0f}"
                + (", as 'sigmoid' (2 * sigmoid) does" if kind == "mask" else "")
            )
