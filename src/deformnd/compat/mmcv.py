"""mmcv's deformable convolutions: `from deformnd.compat.mmcv import ModulatedDeformConv2dPack`.

Arguments and their order are mmcv's, mmcv need not be installed, and load_state_dict takes its
checkpoints. Two things differ: weights are initialised as torch's convolutions are, and state_dict
has deformnd's names (`offset_generator`, `mask_generator` for `conv_offset`).

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

from __future__ import annotations

from torch import Tensor

from .. import ops
from ..ops.functional import Size

__all__ = [
    "DeformConv2d",
    "DeformConv2dPack",
    "ModulatedDeformConv2d",
    "ModulatedDeformConv2dPack",
    "deform_conv2d",
    "modulated_deform_conv2d",
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
    """deformnd.deform_conv2d without mask; deform_groups is read off the offset."""
    del deform_groups, im2col_step
    _check_bias("deform_conv2d", bias)
    return ops.deform_conv2d(input, weight, offset, None, None, stride, padding, dilation, groups)


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    deform_groups: int = 1,
) -> Tensor:
    """deformnd.deform_conv2d; deform_groups is read off offset and mask."""
    del deform_groups
    return ops.deform_conv2d(input, weight, offset, mask, bias, stride, padding, dilation, groups)


class DeformConv2d(ops.DeformConv2d):
    """deformnd.DeformConv2d by mmcv's arguments: forward(input, offset)."""

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
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        )
        self.deform_groups = deform_groups


class ModulatedDeformConv2d(ops.DeformConv2d):
    """deformnd.DeformConv2d by mmcv's arguments: forward(input, offset, mask)."""

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
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bool(bias)
        )
        self.deform_groups = deform_groups


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


class DeformConv2dPack(_Pack):
    """deformnd.PackedDeformConv2d by mmcv's arguments: it predicts its offset."""

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


def _check_bias(name: str, bias: bool) -> None:
    if bias:
        raise ValueError(f"{name}: bias is {bias!r}, expected False, as in mmcv")
