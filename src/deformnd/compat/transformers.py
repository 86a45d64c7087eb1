"""Multi-scale deformable attention of Hugging Face's transformers on deformnd's kernels.

`accelerate()` reaches every model of transformers that samples by it, without a change to the
model. The two classes below it are transformers' own by name, arguments and parameters, for code
that builds such a layer itself; transformers need not be installed for them.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from .. import ops
from ..kernels import library
from . import _Acceleration, _attend, _check_kernels, _divert

__all__ = [
    "DeformableDetrMultiscaleDeformableAttention",
    "MultiScaleDeformableAttention",
    "accelerate",
]


class MultiScaleDeformableAttention(nn.Module):
    """transformers' layer of this name, which has no parameters: `deformnd.deform_attention`.

    It is what `deformnd.convert` puts into models of transformers.

    Example:
        >>> import torch
        >>> from deformnd.compat.transformers import MultiScaleDeformableAttention
        >>> sizes = [(8, 8), (4, 4)]
        >>> value, locations = torch.rand(1, 80, 2, 16), torch.rand(1, 5, 2, 2, 4, 2)
        >>> weights = torch.full((1, 5, 2, 2, 4), 1 / 8)
        >>> layer = MultiScaleDeformableAttention()
        >>> layer(value, torch.tensor(sizes), sizes, None, locations, weights, 64).shape
        torch.Size([1, 5, 32])
    """

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: Sequence[Sequence[int]],
        level_start_index: Tensor | None,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        return _attend(value, value_spatial_shapes_list, sampling_locations, attention_weights)


class DeformableDetrMultiscaleDeformableAttention(ops.MultiScaleDeformableAttention):
    """deformnd.MultiScaleDeformableAttention by transformers' arguments.

    Args:
        config: has d_model and num_feature_levels, as a DeformableDetrConfig.
        num_heads, n_points: of each head, points of each level.

    forward gives the output and the attention weights [B, Q, heads, L, P]. In attention_mask,
    [B, S], True is for pixels that count, as in transformers.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from deformnd.compat import transformers
        >>> config = SimpleNamespace(d_model=32, num_feature_levels=2)
        >>> layer = transformers.DeformableDetrMultiscaleDeformableAttention(config, 4, 4)
        >>> sizes, queries = [(8, 8), (4, 4)], torch.rand(1, 5, 32)
        >>> output, weights = layer(
        ...     queries,
        ...     encoder_hidden_states=torch.rand(1, 80, 32),
        ...     reference_points=torch.rand(1, 5, 2, 2),
        ...     spatial_shapes=torch.tensor(sizes),
        ...     spatial_shapes_list=sizes,
        ... )
        >>> output.shape, weights.shape
        (torch.Size([1, 5, 32]), torch.Size([1, 5, 4, 2, 4]))
    """

    _names: ClassVar[dict[str, str]] = {
        "query": "hidden_states",
        "value": "encoder_hidden_states",
        "shapes": "spatial_shapes",
        "padding_mask": "attention_mask",
    }

    def __init__(self, config: Any, num_heads: int, n_points: int) -> None:
        super().__init__(config.d_model, num_heads, config.num_feature_levels, n_points)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        spatial_shapes_list: Sequence[Sequence[int]] | None = None,
        level_start_index: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor]:
        if position_embeddings is not None:
            hidden_states = hidden_states + position_embeddings
        padding: Any = attention_mask
        if isinstance(padding, Proxy) or getattr(padding, "dtype", None) == torch.bool:
            padding = ~padding
        shapes: Any = spatial_shapes if spatial_shapes_list is None else spatial_shapes_list
        value: Any = encoder_hidden_states  # Its default does not work, as in transformers.
        points: Any = reference_points
        return self._attend(hidden_states, value, points, shapes, padding)


class accelerate(_Acceleration):
    """Run the multi-scale deformable attention of transformers' models on deformnd's kernels.

    It takes effect at once, for the whole process, until `undo()` or, as a context manager, until
    the block ends. What changes is the code of transformers' own functions that sample: Deformable
    DETR, Grounding DINO, RT-DETR, D-FINE, Mask2Former and all others of the installed version get
    there, built before or inside the block. Weights, outputs' shapes and dtypes stay as they are.
    A program that torch.compile has made before the block may go on with what it has; compile it
    inside.

    Devices whose kernels deformnd does not have compiled keep transformers' own: `devices` has
    those that run on deformnd's. So do layers whose forward transformers took from the Hub
    (use_kernels=True). Uses may be nested.

    Attributes:
        models: the models that run on deformnd's kernels, by the names of their folders in
            transformers.models.
        left: those that sample in a form that deformnd does not know and stay as they are, with
            the reason. Empty for transformers 5.24.

    Raises:
        ImportError: transformers is not installed.
        RuntimeError: deformnd has no compiled kernels here (see `deformnd.has_ops`).

    Example:
        >>> import torch, transformers  # doctest: +SKIP
        >>> from deformnd.compat.transformers import accelerate
        >>> name = "PekingU/rtdetr_r50vd"
        >>> model = transformers.RTDetrForObjectDetection.from_pretrained(name)  # doctest: +SKIP
        >>> with accelerate() as handle:  # doctest: +SKIP
        ...     outputs = model(torch.rand(1, 3, 640, 640))
        ...     "rt_detr" in handle.models
        True
    """

    models: tuple[str, ...]
    left: dict[str, str]

    def __init__(self) -> None:
        _check()
        self.devices = tuple(key.lower() for key in library.compiled_keys())
        _check_kernels(self.devices)
        functions, self.left = _functions()
        self.models = tuple(functions)
        super().__init__(functools.partial(_exchange, self.devices, functions))


def _check() -> None:
    try:
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(
            "accelerate: transformers is not installed, so there is nothing to accelerate "
            "(deformnd.MultiScaleDeformableAttention needs no acceleration)"
        ) from error


# What computes in the place of transformers' functions, and has parameters of the same names.


def _function(
    value: Tensor,
    value_spatial_shapes: Tensor | Sequence[Sequence[int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    return _attend(value, value_spatial_shapes, sampling_locations, attention_weights)


def _points_by_level(
    value: Tensor,
    value_spatial_shapes: Sequence[Sequence[int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: Sequence[int],
    method: str = "default",
) -> Tensor:
    """Attention whose levels may have different numbers of points, listed in num_points_list.

    Locations are [B, Q, heads, points of all levels, 2], weights the same without the last axis.
    """
    most, levels = max(num_points_list), len(num_points_list)
    if method != "discrete" and min(num_points_list) == most:
        at, weight = sampling_locations, attention_weights
        at, weight = (t.unflatten(3, (levels, most)) for t in (at, weight))
        return _attend(value, value_spatial_shapes, at, weight)
    locations, weights = [], []
    for (height, width), at, weight in zip(
        value_spatial_shapes,
        sampling_locations.split(num_points_list, 3),
        attention_weights.split(num_points_list, 3),
        strict=True,
    ):
        if method == "discrete":  # Each location moves to the centre of the nearest pixel.
            size = torch.tensor([width, height], device=at.device)
            pixel = torch.minimum((at * size + 0.5).long().clamp(min=0), size - 1)
            at = (pixel + 0.5) / size
        more = most - at.shape[3]
        # A level with fewer points gets more that lie outside, where the kernels have nothing to
        # do.
        locations.append(F.pad(at, (0, 0, 0, more), value=-1.0))
        weights.append(F.pad(weight, (0, more)))
    return _attend(value, value_spatial_shapes, torch.stack(locations, 3), torch.stack(weights, 3))


_FORMS: dict[str, Callable[..., Tensor]] = {
    "MultiScaleDeformableAttention": MultiScaleDeformableAttention.forward,
    "multi_scale_deformable_attention": _function,
    "multi_scale_deformable_attention_v2": _points_by_level,
}

# What in a model's file shows that it samples. Other names may go on after these words.
_SAMPLES = re.compile(rb"^(?:class|def) \w*multi_?scale_?deformable_?attention", re.M | re.I)

Functions = dict[str, dict[types.FunctionType, Callable[..., Tensor]]]


@functools.cache
def _functions() -> tuple[Functions, dict[str, str]]:
    """For each model that samples its functions and ours, and why others are left as they are."""
    import transformers

    found: Functions = {}
    left: dict[str, str] = {}
    root = Path(transformers.__file__).parent
    for file in sorted(root.glob("models/**/modeling_*.py")):
        if not _SAMPLES.search(file.read_bytes()):
            continue
        model = file.parent.name
        name = ".".join(file.relative_to(root).with_suffix("").parts)
        try:
            module = importlib.import_module(f"transformers.{name}")
        except ImportError as error:
            left[model] = f"{file.name} does not import: {error}"
            continue
        forms: dict[types.FunctionType, Callable[..., Tensor]] = {}
        for form, ours in _FORMS.items():
            there: Any = getattr(module, form, None)
            there = getattr(there, "forward", there)
            if _fits(there, ours):
                forms[there] = ours
        if forms:
            found[model] = found.get(model, {}) | forms
        else:
            left[model] = f"{file.name} samples by functions of other arguments"
    return found, left


def _fits(theirs: Any, ours: Callable[..., Tensor]) -> bool:
    return (
        isinstance(theirs, types.FunctionType)
        and not theirs.__code__.co_freevars
        and list(inspect.signature(theirs).parameters) == list(inspect.signature(ours).parameters)
    )


def _exchange(devices: tuple[str, ...], found: Functions) -> Callable[[], None]:
    """Put our functions in place; return a function that takes them out again."""
    every = {theirs: ours for forms in found.values() for theirs, ours in forms.items()}
    undos = [_divert(theirs, devices, ours) for theirs, ours in every.items()]

    def undo() -> None:
        for each in undos:
            each()

    return undo
