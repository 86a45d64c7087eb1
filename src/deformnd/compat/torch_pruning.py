"""Torch-Pruning for models with packed layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..ops.modules import _Packed

__all__ = ["with_packed"]


def with_packed(model: nn.Module, ignored_layers: Sequence[nn.Module] = ()) -> dict[str, Any]:
    """Arguments for a pruner of Torch-Pruning, so that it prunes packed layers as convolutions.

    Without them it takes the channels of the predicted offset for those of the image, and fails.
    With them input and output channels of a packed layer go, and the predictors lose the same
    input channels.

    Args:
        model: the model that the pruner gets.
        ignored_layers: those of your own, which the pruner is not to prune.

    Raises:
        ImportError: Torch-Pruning is not installed.
        TypeError: model is no Module.
        ValueError: a packed layer has groups, offset groups or mask groups, which would no longer
            divide the channels.

    Example:
        >>> import torch
        >>> import torch_pruning as tp  # doctest: +SKIP
        >>> from deformnd import PackedDeformConv2d
        >>> from deformnd.compat.torch_pruning import with_packed
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), PackedDeformConv2d(8, 8, 3))
        >>> pruner = tp.pruner.MagnitudePruner(  # doctest: +SKIP
        ...     net,
        ...     torch.rand(1, 3, 16, 16),
        ...     importance=tp.importance.MagnitudeImportance(),
        ...     pruning_ratio=0.5,
        ...     **with_packed(net),
        ... )
        >>> pruner.step()  # doctest: +SKIP
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"with_packed: model is a {type(model).__name__}, expected a Module")
    try:
        import torch_pruning
    except ModuleNotFoundError as error:
        raise ImportError("with_packed: torch_pruning is not installed") from error

    class Packed(torch_pruning.BasePruningFunc):  # type: ignore[misc]
        def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
            return torch_pruning.prune_conv_out_channels(layer, idxs)

        def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
            for part in (layer, *_predictors(layer)):
                torch_pruning.prune_conv_in_channels(part, idxs)
            return layer

        def get_out_channels(self, layer: Any) -> int:
            return int(layer.out_channels)

        def get_in_channels(self, layer: Any) -> int:
            return int(layer.in_channels)

    layers: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, _Packed)}
    for name, layer in layers.items():
        groups = {"groups": layer.groups}
        groups |= {"offset_groups": layer.offset_groups, "mask_groups": layer.mask_groups}
        for key, value in groups.items():
            if value != 1:
                raise ValueError(f"with_packed: {name!r} has {key} {value}, expected 1")
        for part in _predictors(layer):
            if not isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                raise ValueError(
                    f"with_packed: a predictor of {name!r} is a {type(part).__name__}, expected a "
                    "convolution"
                )
    predictors = [part for layer in layers.values() for part in _predictors(layer)]
    return {
        "customized_pruners": {type(layer): Packed() for layer in layers.values()},
        "ignored_layers": [*ignored_layers, *predictors],
    }


def _predictors(layer: Any) -> list[nn.Module]:
    return [g for g in (layer.offset_generator, layer.mask_generator) if g is not None]
