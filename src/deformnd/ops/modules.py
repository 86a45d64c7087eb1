"""Layers: the operators as modules, and packed ones that predict their own offset and mask.

The rank-free bases do the work, and the fifteen public classes name it. The layers subclass torch's
own convolutions and have their initialisation, repr, arguments and state_dict names. Aggregations
have no weight, so there are only packed ones.
"""

# ruff: noqa: UP006, UP007, UP035, UP045
import math
from collections.abc import Callable
from numbers import Integral
from typing import TYPE_CHECKING, Any, List, Optional, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from ..kernels.geometry import check_ints, check_tensor
from . import checkpoints, masks
from .bases import ConvNd, ConvTransposeNd
from .functional import (
    Padding,
    Size,
    _ints,
    _node,
    _outside_a_trace,
    deform_aggregate,
    deform_conv,
    deform_conv_transpose,
)

__all__ = [
    "DeformConv1d",
    "DeformConv2d",
    "DeformConv3d",
    "DeformConvTranspose1d",
    "DeformConvTranspose2d",
    "DeformConvTranspose3d",
    "PackedDeformAggregate1d",
    "PackedDeformAggregate2d",
    "PackedDeformAggregate3d",
    "PackedDeformConv1d",
    "PackedDeformConv2d",
    "PackedDeformConv3d",
    "PackedDeformConvTranspose1d",
    "PackedDeformConvTranspose2d",
    "PackedDeformConvTranspose3d",
]

_MODES = ("zeros", "reflect", "replicate", "circular")

Activation = Union[str, Callable[[Tensor], Tensor], None]


_CONV_DOC = """`deform_conv{n}d` with its weight and bias: forward(input, offset, mask=None).

Args:
    in_channels ... dtype: as for torch.nn.Conv{n}d, in its order: in_channels, out_channels,
        kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype.
        padding_mode is 'zeros', 'reflect', 'replicate' or 'circular'; with the last three,
        samples that leave the padded input are still 0.

Shapes, channel order of offset and mask, errors and precision are those of `deform_conv{n}d`.

Example:
    >>> import torch
    >>> from deformnd import DeformConv{n}d
    >>> layer = DeformConv{n}d(4, 6, kernel_size=3, padding=1)
    >>> input, offset = torch.rand(2, 4, {size}), torch.randn(2, {offset}, {size})
    >>> layer(input, offset).shape
    torch.Size([2, 6, {size}])
"""

_TRANSPOSE_DOC = """`deform_conv_transpose{n}d` with its weight and bias.

forward(input, offset, mask=None, output_size=None); output_size chooses among the sizes that a
stride above 1 leaves open, as for torch.nn.ConvTranspose{n}d.

Args:
    in_channels ... dtype: as for torch.nn.ConvTranspose{n}d, but in this order: in_channels,
        out_channels, kernel_size, stride, padding, dilation, output_padding, groups, bias,
        padding_mode, device, dtype. padding_mode is 'zeros'.

Shapes, channel order of offset and mask, errors and precision are those of
`deform_conv_transpose{n}d`.

Example:
    >>> import torch
    >>> from deformnd import DeformConvTranspose{n}d
    >>> layer = DeformConvTranspose{n}d(4, 6, kernel_size=3, padding=1)
    >>> input, offset = torch.rand(2, 4, {size}), torch.randn(2, {offset}, {size})
    >>> layer(input, offset).shape
    torch.Size([2, 6, {size}])
"""

_PACKED_DOC = """`DeformConv{kind}{n}d` that predicts its own offset and mask: forward({call}).

The predictors `offset_generator` and `mask_generator` are
{generator}.
They start at zero: with mask_activation 'sigmoid' a fresh layer computes exactly the plain
convolution.

Args:
    in_channels ... groups, bias, padding_mode, device, dtype: as for `DeformConv{kind}{n}d`.
    offset_groups, mask_groups: blocks of channels with an offset, or a mask, of their own; each
        divides {divides}.
    generator_bias: whether the generators have a bias.
    deformable: False for no offset.
    modulated: True for a mask.
    offset_activation: None, a Module or a callable on the predicted offset (in pixels).
    mask_activation: 'sigmoid' (2 * sigmoid), 'softmax' (over the kernel points of each group,
        arXiv 2211.05778), None, a Module or a callable.
    generator_groups: groups of the generators, which are convolutions; None for as many as
        offset_groups and mask_groups, as in tvdcn. 1 lets every channel speak on every offset, as
        in the papers and in mmcv.
{padding}
load_state_dict takes mmcv's names, too: `conv_offset`, offset and mask together, is split between
the generators (build the layer with generator_bias=True, generator_groups=1 for its shapes, and
with mask_activation=torch.sigmoid, its activation, since any other is refused;
`deformnd.compat.mmcv` does). What is there and does not fit is warned of.

Example:
    >>> import torch
    >>> from deformnd import PackedDeformConv{kind}{n}d
    >>> layer = PackedDeformConv{kind}{n}d(4, 6, kernel_size=3, padding=1, modulated=True)
    >>> layer(torch.rand(2, 4, {size})).shape
    torch.Size([2, 6, {size}])
"""


_AGGREGATE_DOC = """`deform_aggregate{n}d` that predicts its own offset and mask: forward(input).

The layer has no weight, and each channel is sampled by itself: pointwise convolutions around it mix
them. The predictors `offset_generator` and `mask_generator` are convolutions with this layer's
kernel size, stride, padding and dilation. They start at zero: a fresh layer computes the average
over the kernel points, or with mask_activation 'sigmoid' their sum.

Args:
    in_channels: of the input, and of the output as well.
    kernel_size ... dilation: as for `deform_aggregate{n}d`.
    offset_groups, mask_groups: blocks of channels with an offset, or a mask, of their own; each
        divides in_channels. DCNv3 and DCNv4 have one for each 16 or 32 channels.
    generator_bias ... modulated: as for `PackedDeformConv{n}d`, but modulated is True by default,
        since the mask does here what a weight does there.
    offset_activation, mask_activation: as for `PackedDeformConv{n}d`, but for the default of the
        latter, 'softmax' as in DCNv3. None is DCNv4's, whose fresh layer gives zero.
    device, dtype: of the generators.
    generator_groups: as for `PackedDeformConv{n}d`.

Shapes, errors and precision are those of `deform_aggregate{n}d`. InternImage's own layers are in
`deformnd.compat.internimage`.

Example:
    >>> import torch
    >>> from deformnd import PackedDeformAggregate{n}d
    >>> layer = PackedDeformAggregate{n}d(4, 3, padding=1, offset_groups=2, mask_groups=2)
    >>> layer(torch.rand(2, 4, {size})).shape
    torch.Size([2, 4, {size}])
"""


def _words(n: int) -> dict[str, Any]:
    return {"n": n, "size": ", ".join(["8"] * n), "offset": n * 3**n}


_PACKED_CONV = {
    "kind": "",
    "call": "input",
    "generator": "convolutions with this layer's kernel size, stride, padding and dilation",
    "divides": "in_channels",
    "padding": "\nThe generators pad with zeros whatever padding_mode is, as in tvdcn.\n",
}
_PACKED_TRANSPOSE = {
    "kind": "Transpose",
    "call": "input, output_size=None",
    "generator": "pointwise convolutions",
    "divides": "in_channels and out_channels",
    "padding": "",
}


def _check_arguments(
    module: Any, numbers: dict[str, Any], switches: dict[str, Any], like: dict[str, Any]
) -> None:
    """Check arguments that torch's convolutions do not check, so that the error names them.

    numbers: arguments that are an int; switches: those that are a bool; like: device and dtype.
    """
    name = type(module).__name__
    for key, value in numbers.items():
        least = 0 if key.endswith("channels") else 1  # Lazy layers begin with no channels.
        check_ints(name, key, value, 0, least)
    groups = numbers.get("groups", 1)
    for key, value in numbers.items():
        if key.endswith("channels") and value % groups:
            raise ValueError(f"{name}: {key} is {value}, expected a multiple of groups {groups}")
    for key, value in switches.items():
        # By comparison and not by type, so that None and NumPy's bools may stand for a bool.
        if isinstance(value, Tensor) or value not in (True, False, None):
            raise TypeError(f"{name}: {key} is {value!r}, expected a bool")
    dtype, device = like["dtype"], like["device"]
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"{name}: dtype is {dtype!r}, expected a floating torch.dtype")
    try:
        torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name}: device is {device!r}, expected a device ({reason})") from None


def _check_padding_mode(module: Any, mode: Any, modes: tuple[str, ...]) -> None:
    if mode not in modes:
        expected = " or ".join(map(repr, modes))
        name = type(module).__name__
        raise ValueError(f"{name}: padding_mode is {mode!r}, expected {expected}")


def _check_padding(module: Any, padding: str, stride: tuple[int, ...]) -> None:
    name = type(module).__name__
    if padding not in ("same", "valid"):
        raise ValueError(f"{name}: padding is {padding!r}, expected 'same', 'valid' or ints")
    if padding == "same" and max(stride) > 1:
        raise ValueError(f"{name}: padding is 'same', which expects stride 1, got {stride}")


def _refuse(module: Any, options: dict[str, Any]) -> None:
    """Raise TypeError for arguments that no layer has, or that this one does not need."""
    for key in options:
        hint = ""
        if key in ("offset_groups", "mask_groups", "deform_groups", "deformable_groups"):
            if not isinstance(module, _Predicting):
                source = "mask" if key == "mask_groups" else "offset"
                hint = f"; the number of groups is read off the {source}'s channels"
            else:
                hint = "; its name here is offset_groups"
        raise TypeError(f"{type(module).__name__}: unexpected argument {key!r}{hint}")


def _check_rank(module: Any, input: Tensor) -> None:
    name, n = type(module).__name__, module.rank
    check_tensor(name, "input", input)
    if input.dim() not in (n + 1, n + 2):
        raise ValueError(
            f"{name}: input has {input.dim()} dimensions, expected {n + 2} (batch, channels, "
            f"{n} spatial) or {n + 1} (unbatched); input {list(input.shape)}"
        )


def _check_input(module: Any, input: Tensor) -> None:
    """Check an input that the layer pads, or predicts from, before an operator sees it."""
    if isinstance(input, torch.fx.Proxy):
        return
    _check_rank(module, input)
    name, n = type(module).__name__, module.rank
    # A parametrized weight is no parameter: it is not looked at, since that would compute it.
    weight = module._parameters.get("weight")
    channels, size, expected = input.shape[-n - 1], input.shape[-n:], module.in_channels
    if weight is not None:  # The in_channels of a layer that was pruned may be out of date.
        expected = weight.shape[0] if module.transposed else weight.shape[1] * module.groups
    if channels != expected:
        raise ValueError(
            f"{name}: input has {channels} channels, expected in_channels {expected}; "
            f"input {list(input.shape)}"
        )
    key, like = "weight", weight
    if isinstance(module, _PackedDeformAggregateNd):
        key, like = module._generators_weight()
    if like is not None:
        if like.device != input.device:
            raise ValueError(f"{name}: input is on {input.device}, expected {like.device} as {key}")
        if like.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
            raise TypeError(
                f"{name}: input has dtype {input.dtype}, expected {like.dtype} as {key}"
            )
    # In the order of F.pad, which has the last axis first.
    around = [0, 0] * n if module.transposed else module._reversed_padding_repeated_twice
    mode = module.padding_mode
    for a in range(n):
        before, after = around[2 * (n - 1 - a) : 2 * (n - a)]
        most = size[a] - (1 if mode == "reflect" else 0)
        if mode in ("reflect", "circular") and size[a] > 0 and max(before, after) > most:
            raise ValueError(
                f"{name}: padding is {module.padding}, expected at most {most} with padding_mode "
                f"{mode!r}; input {list(input.shape)}"
            )
        least = 1 if module.transposed else module.dilation[a] * (module.kernel_size[a] - 1) + 1
        if size[a] < 1 or size[a] + before + after < least:
            raise ValueError(
                f"{name}: input has spatial size {tuple(size)}, expected at least "
                f"{max(1, least - before - after)} on axis {a} (kernel_size {module.kernel_size}, "
                f"padding {module.padding}, dilation {module.dilation})"
            )


def _check_output_size(module: Any, sizes: Any) -> None:
    if isinstance(sizes, torch.fx.Proxy):
        return
    # In a torch.jit.trace sizes are tensors.
    ints = (int, torch.SymInt, Integral, Tensor, torch.fx.Proxy)
    if not isinstance(sizes, (list, tuple)) or not all(isinstance(s, ints) for s in sizes):
        name = type(module).__name__
        raise TypeError(f"{name}: output_size is {sizes!r}, expected a list of ints")


def _around(module: Any) -> List[int]:
    """The padding in the order of F.pad, which has the last axis first."""
    around: List[int] = []
    for a in reversed(range(module.rank)):
        if isinstance(module.padding, str):
            total = (module.padding == "same") * module.dilation[a] * (module.kernel_size[a] - 1)
            around += [total // 2, total - total // 2]
        else:
            around += [module.padding[a]] * 2
    return around


class _DeformConvNd(ConvNd):
    rank: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Padding = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        **unknown: Any,
    ) -> None:
        _refuse(self, unknown)
        numbers = {"in_channels": in_channels, "out_channels": out_channels, "groups": groups}
        like = {"device": device, "dtype": dtype}
        _check_arguments(self, numbers, {"bias": bias}, like)
        _check_padding_mode(self, padding_mode, _MODES)
        if isinstance(padding, str):
            _check_padding(self, padding, _tuple(self, "stride", stride))
        super().__init__(
            int(in_channels),
            int(out_channels),
            _tuple(self, "kernel_size", kernel_size),
            _tuple(self, "stride", stride),
            padding if isinstance(padding, str) else _tuple(self, "padding", padding),
            _tuple(self, "dilation", dilation),
            False,  # transposed
            (0,) * self.rank,  # output_padding
            int(groups),
            bias,
            padding_mode,  # type: ignore[arg-type]
            device=device,
            dtype=dtype,
        )
        # torch has an attribute of this name, which is private and so need not stay.
        self._reversed_padding_repeated_twice = _around(self)

    def forward(
        self, input: Tensor, offset: Optional[Tensor], mask: Optional[Tensor] = None
    ) -> Tensor:
        return self._deform(input, offset, mask)

    def _deform(self, input: Tensor, offset: Optional[Tensor], mask: Optional[Tensor]) -> Tensor:
        n = len(self.kernel_size)
        if self.padding_mode != "zeros":
            if not torch.jit.is_scripting():
                _outside_a_trace(_check_input, self, input)
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return deform_conv(
                n,
                input,
                self.weight,
                offset,
                mask,
                self.bias,
                self.stride,
                0,
                self.dilation,
                self.groups,
            )
        return deform_conv(
            n,
            input,
            self.weight,
            offset,
            mask,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )


class _DeformConvTransposeNd(ConvTransposeNd):
    rank: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        **unknown: Any,
    ) -> None:
        _refuse(self, unknown)
        numbers = {"in_channels": in_channels, "out_channels": out_channels, "groups": groups}
        like = {"device": device, "dtype": dtype}
        _check_arguments(self, numbers, {"bias": bias}, like)
        _check_padding_mode(self, padding_mode, ("zeros",))
        super().__init__(
            int(in_channels),
            int(out_channels),
            _tuple(self, "kernel_size", kernel_size),
            _tuple(self, "stride", stride),
            _tuple(self, "padding", padding),
            _tuple(self, "dilation", dilation),
            True,  # transposed
            _tuple(self, "output_padding", output_padding),
            int(groups),
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        input: Tensor,
        offset: Optional[Tensor],
        mask: Optional[Tensor] = None,
        output_size: Optional[List[int]] = None,
    ) -> Tensor:
        return self._deform(input, offset, mask, output_size)

    def _deform(
        self,
        input: Tensor,
        offset: Optional[Tensor],
        mask: Optional[Tensor],
        output_size: Optional[List[int]],
    ) -> Tensor:
        n = len(self.kernel_size)
        if torch.jit.is_scripting():
            output_padding: List[int] = []
            if output_size is None:
                output_padding += self.output_padding
            else:
                output_padding += _fill(
                    input,
                    output_size,
                    self.stride,  # type: ignore[arg-type]
                    self.padding,  # type: ignore[arg-type]
                    self.kernel_size,  # type: ignore[arg-type]
                    n,
                    self.dilation,  # type: ignore[arg-type]
                )
        else:
            if output_size is not None:
                _outside_a_trace(_check_input, self, input)
                _check_output_size(self, output_size)
            output_padding = _output_padding(
                self.output_padding,
                input,
                output_size,
                self.stride,
                self.padding,
                self.kernel_size,
                n,
                self.dilation,
            )
        return deform_conv_transpose(
            n,
            input,
            self.weight,
            offset,
            mask,
            self.bias,
            self.stride,
            self.padding,  # type: ignore[arg-type]
            output_padding,
            self.dilation,
            self.groups,
        )


def _output_padding(default: Any, input: Any, output_size: Any, *sizes: Any) -> Any:
    """The output_padding that gives output_size; torch.fx makes the call a node of its graph."""
    if output_size is None:
        return default
    node = _node(_output_padding, (default, input, output_size, *sizes))
    if node is not None:
        return node
    return _outside_a_trace(_fill, input, list(_ints(output_size)), *sizes)


def _fill(
    input: Tensor,
    output_size: List[int],
    stride: List[int],
    padding: List[int],
    kernel: List[int],
    n: int,
    dilation: List[int],
) -> List[int]:
    """By how much output_size is larger than the least output, on each axis."""
    first = input.dim() - n
    if len(output_size) == input.dim():
        output_size = output_size[first:]
    extra: List[int] = []
    if len(output_size) == n:
        for a in range(n):
            least = (input.size(first + a) - 1) * stride[a] - 2 * padding[a]
            least += dilation[a] * (kernel[a] - 1) + 1
            if least <= output_size[a] < least + stride[a]:
                extra.append(output_size[a] - least)
    if len(extra) != n:
        raise ValueError(
            f"deform_conv_transpose{n}d: output_size is {output_size}, expected {n} sizes, each "
            f"the least one or less than the stride above; input {list(input.shape)}, stride "
            f"{stride}, padding {padding}, dilation {dilation}"
        )
    return extra


def _tuple(module: Any, name: str, size: Size) -> tuple[int, ...]:
    least = 0 if name.endswith("padding") else 1
    return check_ints(type(module).__name__, name, size, module.rank, least)


class DeformConv1d(_DeformConvNd):
    __doc__ = _CONV_DOC.format(**_words(1))
    rank = 1


class DeformConv2d(_DeformConvNd):
    __doc__ = _CONV_DOC.format(**_words(2))
    rank = 2


class DeformConv3d(_DeformConvNd):
    __doc__ = _CONV_DOC.format(**_words(3))
    rank = 3


class DeformConvTranspose1d(_DeformConvTransposeNd):
    __doc__ = _TRANSPOSE_DOC.format(**_words(1))
    rank = 1


class DeformConvTranspose2d(_DeformConvTransposeNd):
    __doc__ = _TRANSPOSE_DOC.format(**_words(2))
    rank = 2


class DeformConvTranspose3d(_DeformConvTransposeNd):
    __doc__ = _TRANSPOSE_DOC.format(**_words(3))
    rank = 3


_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_SOFTMAX = {1: masks.MaskSoftmax1d, 2: masks.MaskSoftmax2d, 3: masks.MaskSoftmax3d}


class _Call(nn.Module):
    """A callable as a module, since TorchScript cannot compare a function with None."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, t: Tensor) -> Tensor:
        return self.function(t)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


def _module(activation: Any) -> Optional[nn.Module]:
    if activation is None or isinstance(activation, nn.Module):
        return activation
    return _Call(activation)


class _Predicting(nn.Module):
    """What the packed layers add: the generators and their activations."""

    rank: int
    if TYPE_CHECKING:  # TorchScript would try to compile these annotations.
        in_channels: int
        kernel_size: tuple[int, ...]
        stride: tuple[int, ...]
        padding: Union[str, tuple[int, ...]]
        dilation: tuple[int, ...]
        transposed: bool

        def reset_parameters(self) -> None: ...

    def _as_placed(self, bias: bool, device: Any, dtype: Any) -> dict[str, Any]:
        """The arguments of a generator whose kernel lies where the layer's own kernel does."""
        return {
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "bias": bias,
            "device": device,
            "dtype": dtype,
        }

    def _add_generators(
        self,
        generator: dict[str, Any],
        offset_groups: int,
        mask_groups: int,
        deformable: bool,
        modulated: bool,
        offset_activation: Activation,
        mask_activation: Activation,
        generator_groups: Optional[int],
    ) -> None:
        name = type(self).__name__
        numbers = {"offset_groups": offset_groups, "mask_groups": mask_groups}
        if generator_groups is not None:
            numbers["generator_groups"] = generator_groups
        switches = {
            "deformable": deformable,
            "modulated": modulated,
            "generator_bias": generator["bias"],
        }
        _check_arguments(self, numbers, switches, generator)
        for key, activation in (
            ("offset_activation", offset_activation),
            ("mask_activation", mask_activation),
        ):
            if not (activation is None or isinstance(activation, str) or callable(activation)):
                raise TypeError(
                    f"{name}: {key} is {activation!r}, expected None, a Module or a callable"
                )
        self.offset_groups = offset_groups
        self.mask_groups = mask_groups
        self._check_groups()
        if isinstance(offset_activation, str):
            raise ValueError(
                f"{name}: offset_activation is {offset_activation!r}, "
                "expected None, a Module or a callable"
            )
        if mask_activation == "sigmoid":
            mask_activation = masks.MaskSigmoid(scale=2.0)
        elif mask_activation == "softmax":
            mask_activation = _SOFTMAX[self.rank](list(self.kernel_size))
        elif isinstance(mask_activation, str):
            raise ValueError(
                f"{name}: mask_activation is {mask_activation!r}, "
                "expected 'sigmoid', 'softmax', None, a Module or a callable"
            )
        self.deformable = deformable
        self.modulated = modulated
        points = math.prod(self.kernel_size)
        for present, key, channels, groups in (
            (deformable, "offset_generator", self.rank * points * offset_groups, offset_groups),
            (modulated, "mask_generator", points * mask_groups, mask_groups),
        ):
            module = None
            if present:
                convolution = _CONVOLUTIONS[self.rank]
                if generator_groups is not None:
                    groups = generator_groups
                    if groups < 1 or self.in_channels % groups or channels % groups:
                        raise ValueError(
                            f"{name}: generator_groups is {groups}, expected a divisor of "
                            f"in_channels {self.in_channels} and of the {channels} channels of "
                            f"{key}"
                        )
                module = convolution(self.in_channels, channels, groups=groups, **generator)
            self.register_module(key, module)
        self.offset_activation = _module(offset_activation)
        self.mask_activation = _module(mask_activation)
        self.reset_parameters()

    def _check_groups(self) -> None:
        sides = ["in_channels", "out_channels"] if self.transposed else ["in_channels"]
        for key in ("offset_groups", "mask_groups"):
            groups = getattr(self, key)
            for side in sides:
                channels = getattr(self, side)
                if groups < 1 or channels % groups:
                    raise ValueError(
                        f"{type(self).__name__}: {key} is {groups}, "
                        f"expected a divisor of {side} {channels}"
                    )

    def _to_zero(self) -> list[Tensor]:
        """The parameters that, where they are zero, make the generators' outputs zero."""
        found = []
        for key in ("offset_generator", "mask_generator"):
            # The base class's constructor gets here before the generators are there.
            generator = getattr(self, key, None)
            if generator is None:
                continue
            last = _last_affine(generator)
            why = ""
            if last is None or _last_convolution(generator) is None:
                why = f"{key} is a {type(generator).__name__} without a convolution"
            elif last.weight is None:
                why = f"{key} ends in a {type(last).__name__} with statistics and no weight"
            elif not {"weight", "bias"} <= last._parameters.keys():
                why = f"the weight of {key} is computed (parametrized?)"
            if why:
                raise ValueError(f"{type(self).__name__}: {why}, so it cannot be reset")
            tensors = (last.weight, last.bias)
            # Lazy parameters are reset when they get their sizes.
            found += [t for t in tensors if t is not None and not is_lazy(t)]
        return found

    def _offset(self, input: Tensor) -> Optional[Tensor]:
        if self.offset_generator is None:
            return None
        offset: Tensor = self.offset_generator(input)  # type: ignore[operator]
        if self.offset_activation is not None:
            offset = self.offset_activation(offset)
        return offset

    def _mask(self, input: Tensor) -> Optional[Tensor]:
        if self.mask_generator is None:
            return None
        mask: Tensor = self.mask_generator(input)  # type: ignore[operator]
        if self.mask_activation is not None:
            mask = self.mask_activation(mask)
        return mask

    def _repr_of_predictions(self) -> str:
        return (
            f"offset_groups={self.offset_groups}, mask_groups={self.mask_groups}, "
            f"deformable={self.deformable}, modulated={self.modulated}"
        )


class _Packed(_Predicting, ConvNd):
    """A convolution of either family that predicts its own offset and mask."""

    def reset_parameters(self) -> None:
        """Initialise the weight as torch's convolution does, and the generators with zero."""
        zeros = self._to_zero()
        super().reset_parameters()
        for parameter in zeros:
            nn.init.zeros_(parameter)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: Any,
        unexpected_keys: Any,
        error_msgs: Any,
    ) -> None:
        checkpoints.take_original(self, state_dict, prefix)
        checkpoints.take_mmcv(self, state_dict, prefix, unexpected_keys, error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        plain = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{plain}, {self._repr_of_predictions()}"


def _last_convolution(generator: nn.Module) -> Optional[ConvNd]:
    convolutions = [m for m in generator.modules() if isinstance(m, ConvNd)]
    return convolutions[-1] if convolutions else None


def _last_affine(generator: nn.Module) -> Any:
    """The last module that can make its output other than zero: a convolution or norm, or None.

    A norm without weight and bias makes zeros of zeros, unless it has running statistics.
    """
    found = [
        m
        for m in generator.modules()
        if hasattr(m, "weight")
        and hasattr(m, "bias")
        and not (m.weight is None and getattr(m, "running_mean", None) is None)
    ]
    return found[-1] if found else None


class _PackedDeformConvNd(_Packed, _DeformConvNd):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Padding = 0,
        dilation: Size = 1,
        groups: int = 1,
        offset_groups: int = 1,
        mask_groups: int = 1,
        bias: bool = True,
        generator_bias: bool = False,
        deformable: bool = True,
        modulated: bool = False,
        offset_activation: Activation = None,
        mask_activation: Activation = "sigmoid",
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        generator_groups: Optional[int] = None,
        **unknown: Any,
    ) -> None:
        _refuse(self, unknown)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self._add_generators(
            self._as_placed(generator_bias, device, dtype),
            offset_groups,
            mask_groups,
            deformable,
            modulated,
            offset_activation,
            mask_activation,
            generator_groups,
        )

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        if not torch.jit.is_scripting():
            _outside_a_trace(_check_input, self, input)
        return self._deform(input, self._offset(input), self._mask(input))


class _PackedDeformConvTransposeNd(_Packed, _DeformConvTransposeNd):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        output_padding: Size = 0,
        groups: int = 1,
        offset_groups: int = 1,
        mask_groups: int = 1,
        bias: bool = True,
        generator_bias: bool = False,
        deformable: bool = True,
        modulated: bool = False,
        offset_activation: Activation = None,
        mask_activation: Activation = "sigmoid",
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        generator_groups: Optional[int] = None,
        **unknown: Any,
    ) -> None:
        _refuse(self, unknown)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            output_padding,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        generator = {"kernel_size": 1, "bias": generator_bias, "device": device, "dtype": dtype}
        self._add_generators(
            generator,
            offset_groups,
            mask_groups,
            deformable,
            modulated,
            offset_activation,
            mask_activation,
            generator_groups,
        )

    def forward(  # type: ignore[override]
        self, input: Tensor, output_size: Optional[List[int]] = None
    ) -> Tensor:
        if not torch.jit.is_scripting():
            _outside_a_trace(_check_input, self, input)
        return self._deform(input, self._offset(input), self._mask(input), output_size)


class _PackedDeformAggregateNd(_Predicting):
    def __init__(
        self,
        in_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Padding = 0,
        dilation: Size = 1,
        offset_groups: int = 1,
        mask_groups: int = 1,
        generator_bias: bool = False,
        deformable: bool = True,
        modulated: bool = True,
        offset_activation: Activation = None,
        mask_activation: Activation = "softmax",
        device: Any = None,
        dtype: Any = None,
        generator_groups: Optional[int] = None,
        **unknown: Any,
    ) -> None:
        _refuse(self, unknown)
        super().__init__()
        name = type(self).__name__
        (self.in_channels,) = check_ints(name, "in_channels", in_channels, 0, 1)
        self.out_channels = self.in_channels
        self.kernel_size = _tuple(self, "kernel_size", kernel_size)
        self.stride = _tuple(self, "stride", stride)
        if isinstance(padding, str):
            _check_padding(self, padding, self.stride)
        self.padding = padding if isinstance(padding, str) else _tuple(self, "padding", padding)
        self.dilation = _tuple(self, "dilation", dilation)
        self.transposed = False
        self.padding_mode = "zeros"
        self._reversed_padding_repeated_twice = _around(self)
        self._add_generators(
            self._as_placed(generator_bias, device, dtype),
            offset_groups,
            mask_groups,
            deformable,
            modulated,
            offset_activation,
            mask_activation,
            generator_groups,
        )

    def reset_parameters(self) -> None:
        """Initialise the generators with zero."""
        for parameter in self._to_zero():
            nn.init.zeros_(parameter)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            _outside_a_trace(_check_input, self, input)
        return deform_aggregate(
            len(self.kernel_size),
            input,
            self._offset(input),
            self._mask(input),
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
        )

    def _generators_weight(self) -> tuple[str, Optional[Tensor]]:
        """A weight whose device and dtype an input must have, with its name."""
        for key in ("offset_generator", "mask_generator"):
            weight = getattr(getattr(self, key), "_parameters", {}).get("weight")
            if weight is not None:
                return f"{key}.weight", weight
        return "", None

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if self.padding != (0,) * self.rank:
            text += f", padding={self.padding}"
        if self.dilation != (1,) * self.rank:
            text += f", dilation={self.dilation}"
        return f"{text}, {self._repr_of_predictions()}"


class PackedDeformAggregate1d(_PackedDeformAggregateNd):
    __doc__ = _AGGREGATE_DOC.format(**_words(1))
    rank = 1


class PackedDeformAggregate2d(_PackedDeformAggregateNd):
    __doc__ = _AGGREGATE_DOC.format(**_words(2))
    rank = 2


class PackedDeformAggregate3d(_PackedDeformAggregateNd):
    __doc__ = _AGGREGATE_DOC.format(**_words(3))
    rank = 3


class PackedDeformConv1d(_PackedDeformConvNd, DeformConv1d):
    __doc__ = _PACKED_DOC.format(**_words(1), **_PACKED_CONV)


class PackedDeformConv2d(_PackedDeformConvNd, DeformConv2d):
    __doc__ = _PACKED_DOC.format(**_words(2), **_PACKED_CONV)


class PackedDeformConv3d(_PackedDeformConvNd, DeformConv3d):
    __doc__ = _PACKED_DOC.format(**_words(3), **_PACKED_CONV)


class PackedDeformConvTranspose1d(_PackedDeformConvTransposeNd, DeformConvTranspose1d):
    __doc__ = _PACKED_DOC.format(**_words(1), **_PACKED_TRANSPOSE)


class PackedDeformConvTranspose2d(_PackedDeformConvTransposeNd, DeformConvTranspose2d):
    __doc__ = _PACKED_DOC.format(**_words(2), **_PACKED_TRANSPOSE)


class PackedDeformConvTranspose3d(_PackedDeformConvTransposeNd, DeformConvTranspose3d):
    __doc__ = _PACKED_DOC.format(**_words(3), **_PACKED_TRANSPOSE)
