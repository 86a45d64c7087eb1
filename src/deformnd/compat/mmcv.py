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

# ruff: noqa: UP006, UP035, UP045 (TorchScript)
from __future__ import annotations

import warnings
from typing import List, Optional

import torch
from torch import Tensor

from .. import ops
from ..kernels.geometry import check_call
from ..ops.checkpoints import joint_names
from ..ops.functional import Size, _values

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
    """deformnd.deform_conv2d; deform_groups is read off offset and mask.

    An offset or mask that is larger than the output is read as mmcv reads it, see
    `ModulatedDeformConv2d`.
    """
    del deform_groups
    tensors = {"input": input, "weight": weight, "offset": offset, "mask": mask, "bias": bias}
    sizes = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    check_call("modulated_deform_conv2d", 2, tensors, sizes)
    read: tuple[Optional[Tensor], Optional[Tensor]] = (offset, mask)
    if input.dim() == 4 and not isinstance(padding, str):
        a, b, c = (_values(size, 2) for size in (stride, padding, dilation))
        read = (
            _as_long_as_output(offset, input, weight, a, b, c),
            _as_long_as_output(mask, input, weight, a, b, c),
        )
    return ops.deform_conv2d(
        input, weight, read[0], read[1], bias, stride, padding, dilation, groups
    )


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


def _as_long_as_output(
    t: Optional[Tensor],
    input: Tensor,
    weight: Tensor,
    stride: List[int],
    padding: List[int],
    dilation: List[int],
) -> Optional[Tensor]:
    """Of an offset or mask that is larger than the output, what mmcv's kernels read: the memory of
    each image from its beginning, as if it had the output's size."""
    if t is None or t.dim() != 4:
        return t
    out: List[int] = []
    for a in range(2):
        reach = dilation[a] * (weight.shape[2 + a] - 1) + 1
        out.append((input.shape[2 + a] + 2 * padding[a] - reach) // max(stride[a], 1) + 1)
    if min(out) < 1 or t.shape[2] * t.shape[3] <= out[0] * out[1]:
        return t
    if not torch.jit.is_scripting():
        _warn_of_prefix(tuple(t.shape[2:]), tuple(out))
    channels = t.shape[1]
    read = t.flatten(1)[:, : channels * out[0] * out[1]]
    return read.view(t.shape[0], channels, out[0], out[1])


_warned = False


def _warn_of_prefix(given: tuple[int, ...], out: tuple[int, ...]) -> None:
    global _warned
    if not _warned and not torch.compiler.is_compiling():
        _warned = True
        warnings.warn(
            f"deformnd.compat.mmcv: an offset or mask of {given} for an output of {out} is read as "
            "mmcv reads it, from the beginning of its memory; models trained so depend on it (said "
            "once)",
            stacklevel=3,
        )


class ModulatedDeformConv2d(ops.DeformConv2d):
    """deformnd.DeformConv2d by mmcv's arguments: forward(input, offset, mask).

    As in mmcv, offset and mask may be larger than the output (DyHead's are). Then they are not
    resized: of each image's values the first ones are taken, as many as there should be. The first
    time a UserWarning says so.
    """

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

    def forward(
        self, input: Tensor, offset: Optional[Tensor], mask: Optional[Tensor] = None
    ) -> Tensor:
        if input.dim() == 4:
            a, c = list(self.stride), list(self.dilation)
            b: List[int] = list(self.padding)  # type: ignore[arg-type]
            offset = _as_long_as_output(offset, input, self.weight, a, b, c)
            mask = _as_long_as_output(mask, input, self.weight, a, b, c)
        return self._deform(input, offset, mask)


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
        self._original = joint_names("conv_offset", self)  # for `deformnd.original_state_dict`


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
