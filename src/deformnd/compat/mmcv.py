"""mmcv's deformable operators: `from deformnd.compat.mmcv import ModulatedDeformConv2dPack`.

Arguments and their order are mmcv's, mmcv need not be installed, and load_state_dict takes its
checkpoints. Two things differ: weights are initialised as torch's convolutions are, and state_dict
has deformnd's names (`offset_generator`, `mask_generator` for `conv_offset`). Where mmcv or
mmcv-lite is installed, `accelerate()` brings deformnd's kernels to mmcv's own functions and layers.

Example:
    >>> import torch
    >>> from deformnd.compat import mmcv
    >>> layer = mmcv.ModulatedDeformConv2dPack(4, 6, 3, padding=1, deform_groups=2)
    >>> layer(torch.rand(1, 4, 8, 8)).shape
    torch.Size([1, 6, 8, 8])
    >>> checkpoint = {
    ...     "weight": torch.rand(6, 4, 3, 3),
    ...     "bias": torch.rand(6),
    ...     "conv_offset.weight": torch.rand(54, 4, 3, 3),
    ...     "conv_offset.bias": torch.rand(54),
    ... }
    >>> layer.load_state_dict(checkpoint)
    <All keys matched successfully>
"""

# ruff: noqa: UP006, UP035, UP045 (TorchScript)
from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, Dict, List, Optional

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function

from .. import ops
from ..kernels.geometry import check_call, check_ints
from ..ops.checkpoints import joint_names
from ..ops.functional import Levels, Padding, Size, _ints, _node, _outside_a_trace, _values
from . import _check_groups, _first_values
from .mmcv_kernels import accelerate

__all__ = [
    "DeformConv2d",
    "DeformConv2dPack",
    "ModulatedDeformConv2d",
    "ModulatedDeformConv2dPack",
    "MultiScaleDeformableAttention",
    "MultiScaleDeformableAttnFunction",
    "accelerate",
    "deform_conv2d",
    "modulated_deform_conv2d",
    "multi_scale_deformable_attn_pytorch",
]


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    deform_groups: int = 1,
    bias: bool = False,
    im2col_step: int = 32,
) -> Tensor:
    """deformnd.deform_conv2d without mask, by mmcv's arguments; im2col_step has no meaning here.

    Raises:
        ValueError, TypeError: an argument does not fit, such as an offset of another number of
            groups than deform_groups.
    """
    if not torch.jit.is_scripting():
        args = (input, offset, weight, stride, padding, dilation, groups, deform_groups, bias)
        if has_torch_function(args):
            node = _node(deform_conv2d, args)
            if node is not None:
                return node  # type: ignore[no-any-return]
    del im2col_step
    _check_bias("deform_conv2d", bias)
    _check_groups("deform_conv2d", "deform_groups", deform_groups, weight, offset, None)
    return ops.deform_conv2d(input, weight, offset, None, None, stride, padding, dilation, groups)


def modulated_deform_conv2d(
    input: Tensor,
    offset: Optional[Tensor],
    mask: Optional[Tensor],
    weight: Tensor,
    bias: Optional[Tensor] = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    deform_groups: int = 1,
) -> Tensor:
    """deformnd.deform_conv2d by mmcv's arguments.

    An offset or mask that is larger than the output is read as mmcv reads it, see
    `ModulatedDeformConv2d`.

    Raises:
        ValueError, TypeError: an argument does not fit, such as an offset or a mask of another
            number of groups than deform_groups.
    """
    name = "modulated_deform_conv2d"
    if not torch.jit.is_scripting():
        sizes = (stride, padding, dilation, groups)
        args = (input, offset, mask, weight, bias, *sizes, deform_groups)
        if has_torch_function(args):
            node = _node(modulated_deform_conv2d, args)
            if node is not None:
                return node  # type: ignore[no-any-return]
        if torch.jit.is_tracing():
            stride, padding, dilation, groups = _ints(sizes)
        _outside_a_trace(
            check_call,
            name,
            2,
            {"input": input, "weight": weight, "offset": offset, "mask": mask, "bias": bias},
            {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups},
        )
    _check_groups(name, "deform_groups", deform_groups, weight, offset, mask)
    if input.dim() == 4 and weight.dim() == 4 and not isinstance(padding, str):
        strides, paddings, dilations = _values(stride, 2), _values(padding, 2), _values(dilation, 2)
        out = _out_size(input, weight, strides, paddings, dilations)
        if min(out) > 0:
            offset, mask = _first_values(offset, out), _first_values(mask, out)
    return ops.deform_conv2d(input, weight, offset, mask, bias, stride, padding, dilation, groups)


def _out_size(
    input: Tensor, weight: Tensor, stride: List[int], padding: List[int], dilation: List[int]
) -> List[int]:
    if not torch.jit.is_scripting():
        if torch.jit.is_tracing():
            return _outside_a_trace(_out_size, input, weight, stride, padding, dilation)
    out: List[int] = []
    for a in range(2):
        reach = dilation[a] * (weight.shape[2 + a] - 1) + 1
        out.append((input.shape[2 + a] + 2 * padding[a] - reach) // max(stride[a], 1) + 1)
    return out


def _old_name(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that also takes deformable_groups, the older name of deform_groups."""

    @functools.wraps(init)
    def both_names(self: Any, *args: Any, **options: Any) -> None:
        if "deformable_groups" in options:
            name = type(self).__name__
            if "deform_groups" in options:
                raise TypeError(f"{name}: deformable_groups is deform_groups, expected one of both")
            warnings.warn(
                f"{name}: deformable_groups is deprecated, deform_groups is its name",
                DeprecationWarning,
                stacklevel=2,
            )
            options["deform_groups"] = options.pop("deformable_groups")
        init(self, *args, **options)

    return both_names


class DeformConv2d(ops.DeformConv2d):
    """deformnd.DeformConv2d by mmcv's arguments: forward(input, offset)."""

    @_old_name
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = False,
        im2col_step: int = 32,
    ) -> None:
        _check_bias("DeformConv2d", bias)
        deform_groups = _deform_groups(self, deform_groups)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        )
        self.deform_groups = deform_groups

    def forward(
        self, input: Tensor, offset: Optional[Tensor], mask: Optional[Tensor] = None
    ) -> Tensor:
        groups = self.deform_groups
        _check_groups("DeformConv2d", "deform_groups", groups, self.weight, offset, mask)
        return self._deform(input, offset, mask)


class ModulatedDeformConv2d(ops.DeformConv2d):
    """deformnd.DeformConv2d by mmcv's arguments: forward(input, offset, mask).

    As in mmcv, offset and mask may be larger than the output (DyHead's are). Then they are not
    resized: of each image's values the first ones are taken, as many as there should be. The first
    time a UserWarning says so.
    """

    @_old_name
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = True,
    ) -> None:
        deform_groups = _deform_groups(self, deform_groups)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bool(bias)
        )
        self.deform_groups = deform_groups

    def forward(
        self, input: Tensor, offset: Optional[Tensor], mask: Optional[Tensor] = None
    ) -> Tensor:
        return modulated_deform_conv2d(
            input,
            offset,
            mask,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.deform_groups,
        )


class _Pack(ops.PackedDeformConv2d):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size,
        padding: Size,
        dilation: Size,
        groups: int,
        deform_groups: int,
        bias: bool,
        modulated: bool,
    ) -> None:
        deform_groups = _deform_groups(self, deform_groups)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            offset_groups=deform_groups,
            mask_groups=deform_groups,
            bias=bias,
            generator_bias=True,
            modulated=modulated,
            mask_activation=ops.MaskSigmoid(1.0),
            generator_groups=1,
        )
        self.deform_groups = deform_groups
        self._original = joint_names("conv_offset", self)  # for `deformnd.original_state_dict`


class DeformConv2dPack(_Pack):
    """deformnd.PackedDeformConv2d by mmcv's arguments: it predicts its offset."""

    @_old_name
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = False,
        im2col_step: int = 32,
    ) -> None:
        _check_bias("DeformConv2dPack", bias)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            deform_groups,
            bias,
            False,
        )


class ModulatedDeformConv2dPack(_Pack):
    """deformnd.PackedDeformConv2d by mmcv's arguments: it predicts its offset and mask."""

    @_old_name
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            deform_groups,
            bool(bias),
            True,
        )


def _deform_groups(module: Any, value: Any) -> int:
    return check_ints(type(module).__name__, "deform_groups", value, 0, 1)[0]


def _check_bias(name: str, bias: bool) -> None:
    if bias:
        raise ValueError(f"{name}: bias is {bias}, expected False, as in mmcv")


def multi_scale_deformable_attn_pytorch(
    value: Tensor,
    value_spatial_shapes: Levels,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """deformnd.deform_attention by mmcv's arguments.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    return ops.deform_attention(value, value_spatial_shapes, sampling_locations, attention_weights)


class MultiScaleDeformableAttnFunction:
    """mmcv's function for GPUs, by its one method `apply`: deformnd.deform_attention."""

    @staticmethod
    def apply(
        value: Tensor,
        value_spatial_shapes: Levels,
        value_level_start_index: Optional[Tensor],
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int = 64,
    ) -> Tensor:
        """deform_attention; value_level_start_index and im2col_step have no meaning here.

        Raises:
            ValueError, TypeError: an argument does not fit.
        """
        return ops.deform_attention(
            value, value_spatial_shapes, sampling_locations, attention_weights
        )


class MultiScaleDeformableAttention(ops.MultiScaleDeformableAttention):
    """deformnd.MultiScaleDeformableAttention by mmcv's arguments.

    Args:
        embed_dims, num_heads, num_levels, num_points: as there, in the same order.
        im2col_step, norm_cfg, init_cfg: have no meaning here.
        dropout: of the output, before identity is added.
        batch_first: whether query, value and output are [B, N, C], or else [N, B, C].
        value_proj_ratio: channels between the projections, in units of embed_dims.

    forward gives dropout(attention(query + query_pos)) + identity. identity is query where it is
    not given, and so is value; key has no meaning. In key_padding_mask, [B, S], True is padding.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> from deformnd.compat import mmcv
        >>> layer = mmcv.MultiScaleDeformableAttention(32, 4, num_levels=2, batch_first=True)
        >>> layer(
        ...     torch.rand(1, 5, 32),
        ...     value=torch.rand(1, 80, 32),
        ...     reference_points=torch.rand(1, 5, 2, 4),
        ...     spatial_shapes=torch.tensor([(8, 8), (4, 4)]),
        ... ).shape
        torch.Size([1, 5, 32])
    """

    _names: ClassVar[Dict[str, str]] = {
        "shapes": "spatial_shapes",
        "padding_mask": "key_padding_mask",
    }

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        im2col_step: int = 64,
        dropout: float = 0.1,
        batch_first: bool = False,
        norm_cfg: Any = None,
        init_cfg: Any = None,
        value_proj_ratio: float = 1.0,
    ) -> None:
        inner = None if value_proj_ratio == 1.0 else int(embed_dims * value_proj_ratio)
        super().__init__(embed_dims, num_heads, num_levels, num_points, inner_dim=inner)
        self.embed_dims = self.embed_dim
        self.im2col_step = im2col_step
        self.norm_cfg = norm_cfg
        self.dropout = nn.Dropout(dropout)
        self.batch_first = batch_first

    def init_weights(self) -> None:
        """Initialise again; mmengine's models call it by this name."""
        self.reset_parameters()

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Optional[Tensor] = None,
        value: Optional[Tensor] = None,
        identity: Optional[Tensor] = None,
        query_pos: Optional[Tensor] = None,
        key_padding_mask: Optional[Tensor] = None,
        reference_points: Optional[Tensor] = None,
        spatial_shapes: Optional[Levels] = None,
        level_start_index: Optional[Tensor] = None,
        **unused: Any,
    ) -> Tensor:
        if "residual" in unused:
            warnings.warn(
                f"{type(self).__name__}: residual is deprecated, identity is its name",
                DeprecationWarning,
                stacklevel=2,
            )
            identity = unused["residual"]
        value = query if value is None else value
        identity = query if identity is None else identity
        if query_pos is not None:
            query = query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        # The default of reference_points does not work, nor does that of the shapes, as in mmcv.
        points: Any = reference_points
        shapes: Any = spatial_shapes
        output = super().forward(query, value, points, shapes, key_padding_mask)
        if not self.batch_first:
            output = output.transpose(0, 1)
        dropped: Tensor = self.dropout(output)
        return dropped + identity
