"""DCNv3 and DCNv4 of OpenGVLab: `from deformnd.compat import internimage as opsm`.

What models of InternImage and FlashInternImage are made of, with the arguments, the parameters'
names and the layouts of the original modules, whose packages need not be installed: their
checkpoints load, and what is saved here loads there. They run wherever `deform_aggregate2d` does.
The functions below the original modules are not here.

Two things differ. With a stride above 1 the offset and mask of an output position are those
predicted at the pixel in its middle; the original DCNv3 reads others there, those of other images
among them, and DCNv4 fails. And pad must be what makes the output of stride 1 as large as the
input.

Example:
    >>> import torch
    >>> from deformnd.compat.internimage import DCNv3, DCNv4
    >>> DCNv3(channels=32, group=2)(torch.rand(1, 8, 8, 32)).shape
    torch.Size([1, 8, 8, 32])
    >>> DCNv4(channels=32, group=2)(torch.rand(1, 48, 32), shape=(8, 6)).shape
    torch.Size([1, 48, 32])
"""

# ruff: noqa: UP006, UP035, UP045 (TorchScript)
from numbers import Integral, Real
from typing import Any, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.geometry import check_ints, check_tensor
from ..ops.functional import _ints, _outside_a_trace, deform_aggregate

__all__ = ["DCNv3", "DCNv3_pytorch", "DCNv4"]

_ACTIVATIONS = {"GELU": nn.GELU, "ReLU": nn.ReLU, "SiLU": nn.SiLU}


class _ToChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class _Module(nn.Module):
    """What DCNv3 and DCNv4 share: sizes, sampling, and blending with the features in the middle."""

    center_feature_scale_proj_weight: Optional[Tensor]
    center_feature_scale_proj_bias: Optional[Tensor]

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        dw_kernel_size: Optional[int],
        stride: int,
        pad: int,
        dilation: int,
        group: int,
        offset_scale: float,
        center_feature_scale: bool,
        remove_center: bool,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        channels = check_ints(name, "channels", channels, 0, 1)[0]
        kernel_size = check_ints(name, "kernel_size", kernel_size, 0, 1)[0]
        stride = check_ints(name, "stride", stride, 0, 1)[0]
        pad = check_ints(name, "pad", pad, 0, 0)[0]
        dilation = check_ints(name, "dilation", dilation, 0, 1)[0]
        group = check_ints(name, "group", group, 0, 1)[0]
        if dw_kernel_size is not None:
            dw_kernel_size = check_ints(name, "dw_kernel_size", dw_kernel_size, 0, 1)[0]
        scale: Any = offset_scale
        if isinstance(scale, bool) or not isinstance(scale, Real):
            raise TypeError(f"{name}: offset_scale is {offset_scale!r}, expected a number")
        if channels % group:
            raise ValueError(f"{name}: group is {group}, expected a divisor of channels {channels}")
        reach = dilation * (kernel_size - 1)
        if 2 * pad != reach:
            raise ValueError(
                f"{name}: pad is {pad}, expected {reach / 2:g}, half of dilation {dilation} x "
                f"(kernel_size {kernel_size} - 1): each pixel predicts the offset of an output"
            )
        if remove_center and kernel_size % 2 == 0:
            raise ValueError(
                f"{name}: kernel_size is {kernel_size}, expected an odd number with remove_center"
            )
        if dw_kernel_size is not None and dw_kernel_size % 2 == 0:
            raise ValueError(f"{name}: dw_kernel_size is {dw_kernel_size}, expected an odd number")
        self.channels = channels
        self.kernel_size = kernel_size
        self.dw_kernel_size = dw_kernel_size
        self.stride = stride
        self.dilation = dilation
        self.pad = pad
        self.group = group
        self.group_channels = channels // group
        self.offset_scale = float(scale)
        self.center_feature_scale = bool(center_feature_scale)
        self.remove_center = int(remove_center)
        self.points = kernel_size * kernel_size - self.remove_center
        weight = bias = None
        if center_feature_scale:
            weight, bias = (nn.Parameter(torch.zeros(s)) for s in ((group, channels), (group,)))
        self.register_parameter("center_feature_scale_proj_weight", weight)
        self.register_parameter("center_feature_scale_proj_bias", bias)

    def _sample(self, value: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """The aggregation of value [N, H, W, C], with the points in the original modules' order.

        offset: [N, Ho, Wo, group, points, 2], (x, y) of the points column by column; mask: [N, Ho,
        Wo, group, points]. This is also the operator's order if its image has the axes (x, y). Then
        all three are views of the tensors here, which the CPU core reads in place. The GPU kernels
        need channels first, and the copy that brings them there changes the order as well.
        """
        k = self.kernel_size
        if self.remove_center:  # The operator still samples the middle, with a mask of 0.
            offset = _with_center(offset, 4, self.points // 2)
            mask = _with_center(mask, 4, self.points // 2)
        offset = offset.flatten(3)
        if self.offset_scale != 1.0:
            # The scale is also that of the regular grid, about its middle, `pad` from its corner.
            dtype = torch.promote_types(offset.dtype, torch.float32)
            grid = torch.arange(k, device=offset.device, dtype=dtype)
            grid = (grid * self.dilation - self.pad) * (self.offset_scale - 1.0)
            # The grid is repeated for all groups, since adding long rows is faster.
            grid = torch.cartesian_prod(grid, grid).flatten().repeat(self.group)
            offset = torch.add(grid, offset, alpha=self.offset_scale)
        in_place = True
        if not torch.jit.is_scripting():
            in_place = not isinstance(value, torch.fx.Proxy)  # A proxy's device is not known.
        if in_place and value.is_cpu:
            output = deform_aggregate(
                2,
                value.permute(0, 3, 2, 1),
                offset.permute(0, 3, 2, 1),
                mask.flatten(3).permute(0, 3, 2, 1),
                k,
                self.stride,
                self.pad,
                self.dilation,
            )
            return output.permute(0, 3, 2, 1)
        places = offset.unflatten(3, [self.group, k, k, 2]).permute(0, 3, 5, 4, 6, 1, 2)
        offset = torch.stack([places[:, :, :, :, 1], places[:, :, :, :, 0]], 4).flatten(1, 4)
        mask = mask.unflatten(4, [k, k]).permute(0, 3, 5, 4, 1, 2).flatten(1, 3)
        output = deform_aggregate(
            2, value.permute(0, 3, 1, 2), offset, mask, k, self.stride, self.pad, self.dilation
        )
        return output.permute(0, 2, 3, 1)

    def _thin_out(self, x: Tensor) -> Tensor:
        """The pixels of [N, H, W, C] that are in the middle of the output positions' kernels."""
        return x if self.stride == 1 else x[:, :: self.stride, :: self.stride]

    def _with_features_of_center(self, output: Tensor, query: Tensor, value: Tensor) -> Tensor:
        """The output blended with value, by a share for each group that is predicted of query."""
        weight = self.center_feature_scale_proj_weight
        if weight is None:
            return output
        share = F.linear(query, weight, self.center_feature_scale_proj_bias).sigmoid()
        share = share.unsqueeze(4)
        shape = [self.group, self.group_channels]
        center = self._thin_out(value).unflatten(3, shape)
        blend: Tensor = output.unflatten(3, shape) * (1 - share) + center * share
        return blend.flatten(3)

    def extra_repr(self) -> str:
        text = (
            f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"pad={self.pad}, dilation={self.dilation}, group={self.group}, "
            f"offset_scale={self.offset_scale:g}"
        )
        for key in ("center_feature_scale", "remove_center"):
            text += f", {key}=True" if getattr(self, key) else ""
        return text


def _with_center(t: Tensor, axis: int, at: int) -> Tensor:
    """The tensor with a zero more on an axis, at the place `at`."""
    before, after = t.narrow(axis, 0, at), t.narrow(axis, at, at)
    return torch.cat([before, torch.zeros_like(t.narrow(axis, 0, 1)), after], axis)


def _check_input(module: Any, input: Tensor, layout: str) -> None:
    if isinstance(input, torch.fx.Proxy):
        return
    name, dims = type(module).__name__, layout.count(",") + 1
    check_tensor(name, "input", input)
    if input.dim() != dims or input.shape[-1] != module.channels:
        raise ValueError(
            f"{name}: input is {list(input.shape)}, expected {layout} with {module.channels} "
            "channels C"
        )


def _check_shape(module: Any, input: Tensor, shape: Any) -> None:
    _check_input(module, input, "[N, L, C]")
    if isinstance(input, torch.fx.Proxy) or isinstance(shape, torch.fx.Proxy):
        return
    name, length = type(module).__name__, input.shape[1]
    if shape is None:
        if int(length**0.5) ** 2 != length:
            raise ValueError(
                f"{name}: input has {length} pixels, expected a square number, or shape=(H, W)"
            )
        return
    sizes = (int, torch.SymInt, Integral, Tensor)  # In a torch.jit.trace sizes are tensors.
    if not isinstance(shape, (tuple, list)) or not all(isinstance(s, sizes) for s in shape):
        raise TypeError(f"{name}: shape is {shape!r}, expected two ints, (H, W)")
    if len(shape) != 2 or shape[0] * shape[1] != length:
        raise ValueError(
            f"{name}: shape is {tuple(shape)}, expected (H, W) of the input's {length} pixels"
        )


class DCNv3(_Module):
    """InternImage's layer: forward(input) of [N, H, W, C], channels last, gives [N, Ho, Wo, C].

    A depthwise convolution with norm and activation (`dw_conv`) looks at the input, two linear
    layers (`offset`, `mask`) predict of that where each group of channels samples and a softmax
    over the kernel points; the aggregation stands between two more, `input_proj` and `output_proj`.
    A fresh layer samples the regular grid evenly.

    Args:
        channels: of input and output.
        kernel_size, stride, dilation: an int each, of both axes.
        dw_kernel_size: of the depthwise convolution, odd; None for kernel_size.
        pad: half of dilation * (kernel_size - 1).
        group: blocks of channels that sample together; a divisor of channels.
        offset_scale: factor of the offsets, in pixels, and of the regular grid about its middle.
        act_layer: 'GELU', 'ReLU' or 'SiLU'.
        norm_layer: 'LN' or 'BN'.
        center_feature_scale: blend each output with the projected input at its middle, by a share
            that is predicted for each group.
        remove_center: leave out the kernel point in the middle; kernel_size is odd then.
        use_dcn_v4_op: has no meaning here; the two operators compute the same.

    Raises:
        ValueError, TypeError: an argument or the input does not fit; the message names it.

    References:
        InternImage, arXiv 2211.05778.

    Example:
        >>> import torch
        >>> from deformnd.compat.internimage import DCNv3
        >>> layer = DCNv3(channels=64, group=4, offset_scale=2.0)
        >>> layer(torch.rand(2, 14, 14, 64)).shape
        torch.Size([2, 14, 14, 64])
        >>> layer.offset.weight.shape  # 4 groups of 9 points (x, y)
        torch.Size([72, 64])
    """

    def __init__(
        self,
        channels: int = 64,
        kernel_size: int = 3,
        dw_kernel_size: Optional[int] = None,
        stride: int = 1,
        pad: int = 1,
        dilation: int = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        act_layer: str = "GELU",
        norm_layer: str = "LN",
        center_feature_scale: bool = False,
        remove_center: bool = False,
        use_dcn_v4_op: bool = False,
    ) -> None:
        super().__init__(
            channels,
            kernel_size,
            kernel_size if dw_kernel_size is None else dw_kernel_size,
            stride,
            pad,
            dilation,
            group,
            offset_scale,
            center_feature_scale,
            remove_center,
        )
        del use_dcn_v4_op
        name, size = type(self).__name__, self.dw_kernel_size or 1
        if norm_layer not in ("LN", "BN"):
            raise ValueError(f"{name}: norm_layer is {norm_layer!r}, expected 'LN' or 'BN'")
        if act_layer not in _ACTIVATIONS:
            expected = " or ".join(map(repr, _ACTIVATIONS))
            raise ValueError(f"{name}: act_layer is {act_layer!r}, expected {expected}")
        norm = [_ToChannelsLast(), nn.LayerNorm(channels, eps=1e-6)]
        if norm_layer == "BN":
            norm = [nn.BatchNorm2d(channels), _ToChannelsLast()]
        self.dw_conv = nn.Sequential(
            nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels),
            nn.Sequential(*norm),
            _ACTIVATIONS[act_layer](),
        )
        self.offset = nn.Linear(channels, group * self.points * 2)
        self.mask = nn.Linear(channels, group * self.points)
        self.input_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self._reset_parameters()

    def _reset_parameters(self) -> None:  # InternImage calls this by its name.
        _reset([self.offset, self.mask], [self.input_proj, self.output_proj])

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            _outside_a_trace(_check_input, self, input, "[N, H, W, C]")
        value = self.input_proj(input)
        near = self._thin_out(self.dw_conv(input.permute(0, 3, 1, 2)))
        offset = self.offset(near).unflatten(3, [self.group, self.points, 2])
        mask = self.mask(near).unflatten(3, [self.group, self.points])
        mask = torch.softmax(mask, 4).to(value.dtype)
        output = self._sample(value, offset, mask)
        output = self._with_features_of_center(output, near, value)
        return self.output_proj(output)  # type: ignore[no-any-return]


DCNv3_pytorch = DCNv3
"""The same: InternImage has a second class of this name for where its kernels are not compiled."""


class DCNv4(_Module):
    """FlashInternImage's layer: forward(input, shape=None) of [N, L, C] gives [N, Lo, C].

    L are the pixels of an image, row by row, and shape is its (H, W); without it the image is a
    square. A linear layer (`offset_mask`) predicts of the input, or of a depthwise convolution of
    it (`offset_mask_dw`), where each group of channels samples, and a mask that nothing bounds. The
    aggregation stands between two more, `value_proj` and `output_proj`. A fresh layer's mask is 0,
    and so is its output but for a bias.

    Args:
        channels ... remove_center: as for `DCNv3`, but dw_kernel_size None for no depthwise
            convolution. A group may have any number of channels.
        output_bias: whether output_proj has a bias.
        without_pointwise: no value_proj and no output_proj.
        **unused: taken and not used, as the original does with act_layer and norm_layer.

    offset_mask has for each group the (x, y) of its kernel points and then their masks. Its rows
    are filled up to a multiple of 8 with some that have no use.

    Raises:
        ValueError, TypeError: an argument or the input does not fit; the message names it.

    References:
        DCNv4, arXiv 2401.06197.

    Example:
        >>> import torch
        >>> from deformnd.compat.internimage import DCNv4
        >>> layer = DCNv4(channels=64, group=4)
        >>> layer(torch.rand(2, 14 * 14, 64)).shape
        torch.Size([2, 196, 64])
        >>> layer.offset_mask.weight.shape  # 108 rows, filled up
        torch.Size([112, 64])
    """

    def __init__(
        self,
        channels: int = 64,
        kernel_size: int = 3,
        stride: int = 1,
        pad: int = 1,
        dilation: int = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        dw_kernel_size: Optional[int] = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        output_bias: bool = True,
        without_pointwise: bool = False,
        **unused: Any,
    ) -> None:
        super().__init__(
            channels,
            kernel_size,
            dw_kernel_size,
            stride,
            pad,
            dilation,
            group,
            offset_scale,
            center_feature_scale,
            remove_center,
        )
        self.without_pointwise = bool(without_pointwise)
        near = value = output = None
        if dw_kernel_size is not None:
            near = nn.Conv2d(
                channels, channels, dw_kernel_size, padding=dw_kernel_size // 2, groups=channels
            )
        if not without_pointwise:
            value = nn.Linear(channels, channels)
            output = nn.Linear(channels, channels, bias=bool(output_bias))
        self.offset_mask = nn.Linear(channels, -(-group * self.points * 3 // 8) * 8)
        self.register_module("offset_mask_dw", near)
        self.register_module("value_proj", value)
        self.register_module("output_proj", output)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        projections = [] if self.without_pointwise else [self.value_proj, self.output_proj]
        _reset([self.offset_mask], projections)

    def forward(self, input: Tensor, shape: Optional[Tuple[int, int]] = None) -> Tensor:
        if not torch.jit.is_scripting():
            _outside_a_trace(_check_shape, self, input, shape)
        if shape is None:
            length = input.shape[1]
            if not torch.jit.is_scripting():
                if torch.jit.is_tracing():
                    length = _ints(length)
            size = [int(length**0.5)] * 2
        else:
            size = [shape[0], shape[1]]
        image = input.unflatten(1, size)
        near = value = image
        if self.offset_mask_dw is not None:
            near = self.offset_mask_dw(image.permute(0, 3, 1, 2))  # type: ignore[operator]
            near = near.permute(0, 2, 3, 1)
        if self.value_proj is not None:
            value = self.value_proj(image)  # type: ignore[operator]
        both = self.offset_mask(self._thin_out(near)).narrow(3, 0, self.group * self.points * 3)
        both = both.unflatten(3, [self.group, self.points * 3])
        offset = both.narrow(4, 0, self.points * 2).unflatten(4, [self.points, 2])
        mask = both.narrow(4, self.points * 2, self.points)
        output = self._sample(value, offset, mask)
        output = self._with_features_of_center(output, output, value).flatten(1, 2)
        if self.output_proj is not None:
            output = self.output_proj(output)  # type: ignore[operator]
        return output  # type: ignore[no-any-return]


def _reset(predictors: list[Any], projections: list[Any]) -> None:
    for linear in predictors:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    for linear in projections:
        nn.init.xavier_uniform_(linear.weight)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
