"""The layer of multi-scale deformable attention."""

# ruff: noqa: UP006, UP035, UP045 (TorchScript)
import math
from typing import Any, ClassVar, Dict, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.overrides import has_torch_function

from ..kernels.geometry import check_ints, check_levels, check_tensor
from .functional import Levels, _ints, _node, _outside_a_trace, deform_attention

__all__ = ["MultiScaleDeformableAttention"]


class MultiScaleDeformableAttention(nn.Module):
    """Multi-scale deformable attention with its projections: the layer of Deformable DETR.

    Each query predicts, by two linear layers, where its heads look around its reference point, a
    few points of every level, and how much each look counts. In a self-attention over the pixels
    of all levels, query and value are the same tensor, with the pixels' centres as reference
    points; in a decoder, queries look into an encoder's output.

    Args:
        embed_dim: channels of query, value and output.
        num_heads: parts of the channels that look at places of their own.
        num_levels: images of different sizes that value consists of.
        num_points: looks of each head into each level.
        dims: 1, 2 or 3 spatial dimensions.
        inner_dim: channels between the projections, a multiple of num_heads; None for embed_dim.
        device, dtype: of the parameters.

    Its parameters are those of `sampling_offsets`, `attention_weights`, `value_proj` and
    `output_proj`, four torch.nn.Linear. With dims=2 they are those of mmcv's and transformers'
    layers, whose checkpoints load; `deformnd.compat.mmcv` and `deformnd.compat.transformers` have
    their arguments. A fresh layer looks from the reference point outwards, each head into a
    direction of its own, and weighs all looks alike.

    forward(query, value, reference_points, shapes, padding_mask=None) gives [B, Q, embed_dim]:

    - query: [B, Q, embed_dim], with its positional encoding.
    - value: [B, S, embed_dim], the pixels of all levels one after another.
    - reference_points: [B, Q, num_levels, dims], from 0 to 1 and with x first, as the locations of
      `deform_attention`; the offsets are then in pixels of each level. Or [B, Q, num_levels,
      2 * dims], boxes: their centres and then their sizes, and an offset of num_points is half the
      box. One level, query or batch item stands for all.
    - shapes: the levels' sizes, as for `deform_attention`.
    - padding_mask: [B, S], True for pixels that count as zero.

    Locations are computed in float32 at least, also where the layer is in half precision.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    References:
        Deformable DETR, arXiv 2010.04159.

    Example:
        >>> import torch
        >>> from deformnd import MultiScaleDeformableAttention
        >>> layer = MultiScaleDeformableAttention(64, num_heads=4, num_levels=2)
        >>> query, value = torch.rand(1, 5, 64), torch.rand(1, 8 * 8 + 4 * 4, 64)
        >>> boxes = torch.rand(1, 5, 1, 4)  # (x, y, width, height), the same in both levels
        >>> layer(query, value, boxes, [(8, 8), (4, 4)]).shape
        torch.Size([1, 5, 64])
    """

    # The names of arguments in messages, where a subclass calls them otherwise.
    _names: ClassVar[Dict[str, str]] = {}

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        dims: int = 2,
        inner_dim: Optional[int] = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        name, inner = type(self).__name__, embed_dim if inner_dim is None else inner_dim
        (self.embed_dim,) = check_ints(name, "embed_dim", embed_dim, 0, 1)
        (self.num_heads,) = check_ints(name, "num_heads", num_heads, 0, 1)
        (self.num_levels,) = check_ints(name, "num_levels", num_levels, 0, 1)
        (self.num_points,) = check_ints(name, "num_points", num_points, 0, 1)
        (self.dims,) = check_ints(name, "dims", dims, 0, 1)
        (self.inner_dim,) = check_ints(name, "inner_dim", inner, 0, 1)
        if self.dims > 3:
            raise ValueError(f"{name}: dims is {dims}, expected 1, 2 or 3")
        if self.inner_dim % self.num_heads:
            key = "embed_dim" if inner_dim is None else "inner_dim"
            raise ValueError(
                f"{name}: num_heads is {num_heads}, expected a divisor of {key} {inner}"
            )
        like: Any = {"device": device, "dtype": dtype}
        looks = self.num_heads * self.num_levels * self.num_points
        self.sampling_offsets = nn.Linear(self.embed_dim, looks * self.dims, **like)
        self.attention_weights = nn.Linear(self.embed_dim, looks, **like)
        self.value_proj = nn.Linear(self.embed_dim, self.inner_dim, **like)
        self.output_proj = nn.Linear(self.inner_dim, self.embed_dim, **like)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as Deformable DETR does."""
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)
        steps = torch.arange(1.0, self.num_points + 1).view(-1, 1)
        offsets = _directions(self.num_heads, self.dims).view(-1, 1, 1, self.dims) * steps
        offsets = offsets.expand(-1, self.num_levels, -1, -1)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())

    def forward(
        self,
        query: Tensor,
        value: Tensor,
        reference_points: Tensor,
        shapes: Levels,
        padding_mask: Optional[Tensor] = None,
    ) -> Tensor:
        return self._attend(query, value, reference_points, shapes, padding_mask)[0]

    def _attend(
        self,
        query: Tensor,
        value: Tensor,
        reference_points: Tensor,
        shapes: Levels,
        padding_mask: Optional[Tensor],
    ) -> Tuple[Tensor, Tensor]:
        """The output, and the weights [B, Q, heads, levels, points]."""
        if not torch.jit.is_scripting():
            if isinstance(shapes, Tensor):
                shapes = _outside_a_trace(_check_levels, self, shapes)
            if torch.jit.is_tracing():
                shapes = _ints(shapes)
            args = (query, value, reference_points, shapes, padding_mask)
            _outside_a_trace(_check, self, *args)
        value = self.value_proj(value)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask.unsqueeze(2), 0.0)
        value = value.unflatten(2, [self.num_heads, self.inner_dim // self.num_heads])
        weights = self.attention_weights(query).unflatten(2, [self.num_heads, -1])
        weights = weights.softmax(3).unflatten(3, [self.num_levels, self.num_points])
        offsets = self.sampling_offsets(query)
        looks = [self.num_heads, self.num_levels, self.num_points, self.dims]
        offsets = offsets.unflatten(2, looks)
        locations = _locations(reference_points, offsets, shapes, self.dims, self.num_points)
        output = deform_attention(value, shapes, locations, weights)
        return self.output_proj(output), weights

    def extra_repr(self) -> str:
        text = (
            f"{self.embed_dim}, num_heads={self.num_heads}, num_levels={self.num_levels}, "
            f"num_points={self.num_points}"
        )
        if self.dims != 2:
            text += f", dims={self.dims}"
        if self.inner_dim != self.embed_dim:
            text += f", inner_dim={self.inner_dim}"
        return text


def _locations(
    reference_points: Tensor, offsets: Tensor, shapes: Levels, dims: int, num_points: int
) -> Tensor:
    """Locations [B, Q, heads, levels, points, dims], in float32 at least."""
    last = reference_points.shape[3]
    # _check does not run under TorchScript, and boxes with one size for all axes would broadcast.
    if torch.jit.is_scripting():
        if last != dims and last != 2 * dims:
            raise ValueError(
                f"MultiScaleDeformableAttention: reference_points have {last} coordinates, "
                f"expected {dims} for points or {2 * dims} for boxes"
            )
    else:
        args = (reference_points, offsets, shapes, dims, num_points)
        if has_torch_function(args):
            node = _node(_locations, args)
            if node is not None:
                return node  # type: ignore[no-any-return]
        if torch.jit.is_tracing():
            last = _ints(last)
    reference = reference_points.unsqueeze(2).unsqueeze(4)
    if reference.dtype != torch.float64:
        reference = reference.float()
    if last == dims:
        if torch.jit.is_scripting():
            sizes = _sizes(shapes, reference)
        else:
            sizes = _outside_a_trace(_sizes, shapes, reference)
        return reference + offsets / sizes
    center, size = reference[..., :dims], reference[..., dims:]
    return center + offsets * (size * (0.5 / num_points))


def _sizes(shapes: Levels, like: Tensor) -> Tensor:
    """The levels' sizes as a tensor [levels, 1, dims], with x first."""
    return torch.tensor(shapes, dtype=like.dtype, device=like.device).flip(1).unsqueeze(1)


def _check(
    layer: Any, query: Any, value: Any, reference_points: Any, shapes: Any, padding_mask: Any
) -> None:
    tensors = {"query": query, "value": value, "reference_points": reference_points}
    if any(isinstance(t, Proxy) for t in (*tensors.values(), padding_mask)):
        return
    name, dim, levels, n = type(layer).__name__, layer.embed_dim, layer.num_levels, layer.dims
    names = {key: layer._names.get(key, key) for key in (*tensors, "shapes", "padding_mask")}
    for key, t in tensors.items():
        check_tensor(name, names[key], t)
    for key, letter in (("query", "Q"), ("value", "S")):
        t = tensors[key]
        if t.dim() != 3 or t.shape[2] != dim or t.shape[0] != query.shape[0]:
            raise ValueError(
                f"{name}: {names[key]} is {list(t.shape)}, expected [B, {letter}, {dim}]; "
                f"{names['query']} {list(query.shape)}"
            )
    got, want = list(reference_points.shape), [query.shape[0], query.shape[1], levels]
    if (
        len(got) != 4
        or any(g not in (1, w) for g, w in zip(got[:3], want, strict=True))
        or got[3] not in (n, 2 * n)
    ):
        raise ValueError(
            f"{name}: {names['reference_points']} is {got}, expected {[*want, n]} for points or "
            f"{[*want, 2 * n]} for boxes"
        )
    _check_levels(layer, shapes)
    if len(shapes) != levels:
        raise ValueError(
            f"{name}: {names['shapes']} is {shapes!r}, expected the sizes of {levels} levels"
        )
    if padding_mask is not None:
        key = names["padding_mask"]
        if not isinstance(padding_mask, Tensor) or padding_mask.dtype != torch.bool:
            what = getattr(padding_mask, "dtype", type(padding_mask).__name__)
            raise TypeError(f"{name}: {key} is of {what}, expected a Tensor of torch.bool")
        if padding_mask.shape != value.shape[:2]:
            raise ValueError(
                f"{name}: {key} is {list(padding_mask.shape)}, expected "
                f"{list(value.shape[:2])}, as {names['value']} {list(value.shape)}"
            )


def _check_levels(layer: Any, shapes: Any) -> Any:
    key = layer._names.get("shapes", "shapes")
    return check_levels(type(layer).__name__, shapes, layer.dims, key)


def _directions(heads: int, dims: int) -> Tensor:
    """Directions [heads, dims], evenly around, whose largest component is 1 or -1."""
    i = torch.arange(heads, dtype=torch.float64)
    if dims == 1:
        return torch.where(i % 2 == 0, 1.0, -1.0).unsqueeze(1).float()
    if dims == 2:
        angle = i * (2.0 * math.pi / heads)
        around = torch.stack([angle.cos(), angle.sin()], 1)
    else:  # They are on a spiral from pole to pole, which turns by the golden angle.
        height = 1 - (2 * i + 1) / heads
        radius, angle = (1 - height * height).sqrt(), i * (math.pi * (3 - math.sqrt(5)))
        around = torch.stack([radius * angle.cos(), radius * angle.sin(), height], 1)
    return (around / around.abs().amax(1, keepdim=True)).float()
