"""The functions.

They are thin on purpose: each makes lists of its sizes, resolves padding='same' and unbatched
input, and calls torch.ops.deformnd, or the ordinary convolution where there is nothing to deform.
All of it compiles under torch.jit.script, so the annotations are those of typing.
"""

# ruff: noqa: UP006, UP007, UP035, UP045
from typing import TYPE_CHECKING, Any, Callable, List, Optional, Sequence, Tuple, TypeVar, Union

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import functional as F
from torch.overrides import has_torch_function

from ..kernels import library as library  # registers torch.ops.deformnd
from ..kernels.autograd import OPERATORS
from ..kernels.geometry import check_attention, check_call, conv_geometry, conv_transpose_geometry

__all__ = [
    "deform_aggregate1d",
    "deform_aggregate2d",
    "deform_aggregate3d",
    "deform_attention",
    "deform_conv1d",
    "deform_conv2d",
    "deform_conv3d",
    "deform_conv_transpose1d",
    "deform_conv_transpose2d",
    "deform_conv_transpose3d",
]

if TYPE_CHECKING:
    Size = Union[int, Sequence[int]]
    Padding = Union[str, int, Sequence[int]]
    Levels = Union[Sequence[Sequence[int]], Tensor]
else:  # TorchScript has neither Sequence nor Tuple[int, ...].
    Size = Union[int, List[int], Tuple[int], Tuple[int, int], Tuple[int, int, int]]
    Padding = Union[str, int, List[int], Tuple[int], Tuple[int, int], Tuple[int, int, int]]
    Levels = List[List[int]]


def deform_conv1d(
    input: Tensor,
    weight: Tensor,
    offset: Optional[Tensor] = None,
    mask: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    return deform_conv(1, input, weight, offset, mask, bias, stride, padding, dilation, groups)


def deform_conv2d(
    input: Tensor,
    weight: Tensor,
    offset: Optional[Tensor] = None,
    mask: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    return deform_conv(2, input, weight, offset, mask, bias, stride, padding, dilation, groups)


def deform_conv3d(
    input: Tensor,
    weight: Tensor,
    offset: Optional[Tensor] = None,
    mask: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    return deform_conv(3, input, weight, offset, mask, bias, stride, padding, dilation, groups)


def deform_conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    offset: Optional[Tensor] = None,
    mask: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    return deform_conv_transpose(
        1, input, weight, offset, mask, bias, stride, padding, output_padding, dilation, groups
    )


def deform_conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    offset: Optional[Tensor] = None,
    mask: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    return deform_conv_transpose(
        2, input, weight, offset, mask, bias, stride, padding, output_padding, dilation, groups
    )


def deform_conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    offset: Optional[Tensor] = None,
    mask: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    return deform_conv_transpose(
        3, input, weight, offset, mask, bias, stride, padding, output_padding, dilation, groups
    )


def deform_aggregate1d(
    input: Tensor,
    offset: Optional[Tensor],
    mask: Optional[Tensor],
    kernel_size: Size,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
) -> Tensor:
    return deform_aggregate(1, input, offset, mask, kernel_size, stride, padding, dilation)


def deform_aggregate2d(
    input: Tensor,
    offset: Optional[Tensor],
    mask: Optional[Tensor],
    kernel_size: Size,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
) -> Tensor:
    return deform_aggregate(2, input, offset, mask, kernel_size, stride, padding, dilation)


def deform_aggregate3d(
    input: Tensor,
    offset: Optional[Tensor],
    mask: Optional[Tensor],
    kernel_size: Size,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
) -> Tensor:
    return deform_aggregate(3, input, offset, mask, kernel_size, stride, padding, dilation)


def deform_conv(
    n: int,
    input: Tensor,
    weight: Tensor,
    offset: Optional[Tensor],
    mask: Optional[Tensor],
    bias: Optional[Tensor],
    stride: Size,
    padding: Padding,
    dilation: Size,
    groups: int,
) -> Tensor:
    """deform_conv{n}d; the modules call it with their rank."""
    name = f"deform_conv{n}d"
    if torch.jit.is_scripting():
        _check_rank(name, n, input, weight)
    else:
        if offset is not None or mask is not None:
            again = OPERATORS["deform_conv"].again(
                (input, weight, offset, mask, bias), (n, stride, padding, dilation, groups)
            )
            if again is not None:
                return again
        args = (input, weight, offset, mask, bias, stride, padding, dilation, groups)
        if has_torch_function(args):
            node = _node(_CONVS[n - 1], args)
            if node is not None:
                return node  # type: ignore[no-any-return]
        if torch.jit.is_tracing():
            library.hint_at_onnx()
            stride, padding, dilation, groups = _ints((stride, padding, dilation, groups))
        _outside_a_trace(
            check_call,
            name,
            n,
            {"input": input, "weight": weight, "offset": offset, "mask": mask, "bias": bias},
            {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups},
        )
    unbatched = input.dim() == n + 1
    if unbatched:
        input, offset, mask = _batch_of_one(input, offset, mask)
    strides, dilations = _values(stride, n), _values(dilation, n)
    if isinstance(padding, str):
        paddings = [0] * n
        if padding == "same":
            kernel = weight.shape[2:]
            if not torch.jit.is_scripting():
                if torch.jit.is_tracing():
                    kernel = _ints(kernel)
            input, paddings = _pad_same(name, input, kernel, strides, dilations)  # type: ignore[arg-type]
    else:
        paddings = _values(padding, n)
    if offset is not None or mask is not None:
        if torch.jit.is_scripting():
            output = torch.ops.deformnd.deform_conv(
                input, weight, offset, mask, bias, strides, paddings, dilations, groups
            )
        else:
            output = OPERATORS["deform_conv"](
                input, weight, offset, mask, bias, strides, paddings, dilations, groups
            )
    else:
        if not torch.jit.is_scripting():
            _outside_a_trace(
                conv_geometry,
                input,
                weight,
                None,
                None,
                bias,
                strides,
                paddings,
                dilations,
                groups,
            )
        if n == 1:
            output = torch.conv1d(input, weight, bias, strides, paddings, dilations, groups)
        elif n == 2:
            output = torch.conv2d(input, weight, bias, strides, paddings, dilations, groups)
        else:
            output = torch.conv3d(input, weight, bias, strides, paddings, dilations, groups)
    return output.squeeze(0) if unbatched else output  # type: ignore[no-any-return]


def deform_conv_transpose(
    n: int,
    input: Tensor,
    weight: Tensor,
    offset: Optional[Tensor],
    mask: Optional[Tensor],
    bias: Optional[Tensor],
    stride: Size,
    padding: Size,
    output_padding: Size,
    dilation: Size,
    groups: int,
) -> Tensor:
    """deform_conv_transpose{n}d; the modules call it with their rank."""
    name = f"deform_conv_transpose{n}d"
    if torch.jit.is_scripting():
        _check_rank(name, n, input, weight)
    else:
        if offset is not None or mask is not None:
            again = OPERATORS["deform_conv_transpose"].again(
                (input, weight, offset, mask, bias),
                (n, stride, padding, output_padding, dilation, groups),
            )
            if again is not None:
                return again
        args = (
            *(input, weight, offset, mask, bias),
            *(stride, padding, output_padding, dilation, groups),
        )
        if has_torch_function(args):
            node = _node(_TRANSPOSES[n - 1], args)
            if node is not None:
                return node  # type: ignore[no-any-return]
        if torch.jit.is_tracing():
            library.hint_at_onnx()
            stride, padding, output_padding, dilation, groups = _ints(args[5:])
        _outside_a_trace(
            check_call,
            name,
            n,
            {"input": input, "weight": weight, "offset": offset, "mask": mask, "bias": bias},
            {
                "stride": stride,
                "padding": padding,
                "output_padding": output_padding,
                "dilation": dilation,
                "groups": groups,
            },
        )
    unbatched = input.dim() == n + 1
    if unbatched:
        input, offset, mask = _batch_of_one(input, offset, mask)
    strides, dilations = _values(stride, n), _values(dilation, n)
    paddings, extra = _values(padding, n), _values(output_padding, n)
    if offset is not None or mask is not None:
        if torch.jit.is_scripting():
            output = torch.ops.deformnd.deform_conv_transpose(
                input, weight, offset, mask, bias, strides, paddings, extra, dilations, groups
            )
        else:
            output = OPERATORS["deform_conv_transpose"](
                input, weight, offset, mask, bias, strides, paddings, extra, dilations, groups
            )
    else:
        if not torch.jit.is_scripting():
            _outside_a_trace(
                conv_transpose_geometry,
                input,
                weight,
                None,
                None,
                bias,
                strides,
                paddings,
                extra,
                dilations,
                groups,
            )
        if n == 1:
            output = torch.conv_transpose1d(
                input, weight, bias, strides, paddings, extra, groups, dilations
            )
        elif n == 2:
            output = torch.conv_transpose2d(
                input, weight, bias, strides, paddings, extra, groups, dilations
            )
        else:
            output = torch.conv_transpose3d(
                input, weight, bias, strides, paddings, extra, groups, dilations
            )
    return output.squeeze(0) if unbatched else output  # type: ignore[no-any-return]


def deform_aggregate(
    n: int,
    input: Tensor,
    offset: Optional[Tensor],
    mask: Optional[Tensor],
    kernel_size: Size,
    stride: Size,
    padding: Padding,
    dilation: Size,
) -> Tensor:
    """deform_aggregate{n}d; a module calls it with its rank."""
    name = f"deform_aggregate{n}d"
    if torch.jit.is_scripting():
        _check_rank(name, n, input, None)
    else:
        again = OPERATORS["deform_aggregate"].again(
            (input, offset, mask), (n, kernel_size, stride, padding, dilation)
        )
        if again is not None:
            return again
        args = (input, offset, mask, kernel_size, stride, padding, dilation)
        if has_torch_function(args):
            node = _node(_AGGREGATES[n - 1], args)
            if node is not None:
                return node  # type: ignore[no-any-return]
        if torch.jit.is_tracing():
            library.hint_at_onnx()
            kernel_size, stride, padding, dilation = _ints(args[3:])
        _outside_a_trace(
            check_call,
            name,
            n,
            {"input": input, "offset": offset, "mask": mask},
            {
                "kernel_size": kernel_size,
                "stride": stride,
                "padding": padding,
                "dilation": dilation,
            },
        )
    unbatched = input.dim() == n + 1
    if unbatched:
        input, offset, mask = _batch_of_one(input, offset, mask)
    kernel, strides, dilations = _values(kernel_size, n), _values(stride, n), _values(dilation, n)
    if isinstance(padding, str):
        paddings = [0] * n
        if padding == "same":
            input, paddings = _pad_same(name, input, kernel, strides, dilations)
    else:
        paddings = _values(padding, n)
    if torch.jit.is_scripting():
        output = torch.ops.deformnd.deform_aggregate(
            input, offset, mask, kernel, strides, paddings, dilations
        )
    else:
        output = OPERATORS["deform_aggregate"](
            input, offset, mask, kernel, strides, paddings, dilations
        )
    return output.squeeze(0) if unbatched else output  # type: ignore[no-any-return]


def deform_attention(
    value: Tensor,
    shapes: Levels,
    locations: Tensor,
    weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention in 1-D, 2-D and 3-D, the operator of Deformable DETR.

    Each head of each query samples a few points of every level, with linear, bilinear or trilinear
    interpolation of the value, and sums the samples up by learned weights. No query meets a key:
    its features say where it looks, and how much each look counts.

    Args:
        value: [B, S, heads, C], the pixels of all levels one after another: S is the sum of their
            products. float16, bfloat16, float32 or float64.
        shapes: the levels' sizes, such as [(32, 48), (16, 24)] of heights and widths. A tensor
            [L, n] of ints will do, as transformers and mmcv have it, but brings its values to the
            host, for which a GPU has to be waited for, and which torch.compile, torch.export and
            TorchScript do not follow: give them a list.
        locations: [B, Q, heads, L, P, n], P points of each of L levels, from 0 at the image's first
            edge to 1 at its last, whatever its size. n is 1, 2 or 3, and x comes first: the last
            axis of an image. The centre of pixel i is at (i + 0.5) / size. Any floating dtype;
            float32 with a half value is the accurate choice, since half locations hit no pixel of
            a large level exactly.
        weights: [B, Q, heads, L, P], of any floating dtype; models bring a softmax over L and P.

    Returns:
        [B, Q, heads * C] in value's dtype. Outside the image is zero: a sample fades out between
        the border pixel's centre and one pixel beyond, as torch.nn.functional.grid_sample has it
        with align_corners=False. A NaN or infinite location samples 0 and gets no gradient.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Coordinates, interpolation and sums are computed in float32 at least. Differentiable to any
    order in all three tensors, backwards and forwards; the derivative by a location is that of the
    cell between pixels' centres in which it lies. Kernels give the first derivatives, on GPUs not
    in float64; all others come of the reference in plain PyTorch. On CPUs they are bitwise the same
    with any number of threads. On GPUs the value's gradient is not repeatable, unless
    torch.use_deterministic_algorithms is on: then samples are sorted, up to 2^23 of them at once or
    those of a batch item, for which each takes 32 bytes. Autocast casts the value alone.

    References:
        Deformable DETR, arXiv 2010.04159.

    Example:
        >>> import torch
        >>> from deformnd import deform_attention
        >>> value = torch.rand(1, 8 * 8 + 4 * 4, 2, 16)  # 2 heads of 16 channels
        >>> locations = torch.rand(1, 5, 2, 2, 4, 2)  # 5 queries, 4 points of each of 2 levels
        >>> weights = torch.rand(1, 5, 2, 8).softmax(-1).unflatten(-1, (2, 4))
        >>> deform_attention(value, [(8, 8), (4, 4)], locations, weights).shape
        torch.Size([1, 5, 32])
    """
    if torch.jit.is_scripting():
        sizes: List[int] = []
        for level in shapes:
            for size in level:
                sizes.append(size)
        return torch.ops.deformnd.deform_attention(  # type: ignore[no-any-return]
            value, locations, weights, sizes
        )
    if isinstance(shapes, (tuple, list)):
        again = OPERATORS["deform_attention"].again(
            (value, locations, weights),
            tuple([tuple(level) if isinstance(level, list) else level for level in shapes]),
        )
        if again is not None:
            return again
    args = (value, shapes, locations, weights)
    if has_torch_function(args):
        node = _node(deform_attention, args)
        if node is not None:
            return node  # type: ignore[no-any-return]
    if torch.jit.is_tracing():
        library.hint_at_onnx()
        shapes = _ints(shapes)
    flat = _outside_a_trace(check_attention, value, shapes, locations, weights)
    output: Tensor = OPERATORS["deform_attention"](value, locations, weights, flat)
    return output


_AGGREGATES = (deform_aggregate1d, deform_aggregate2d, deform_aggregate3d)
_CONVS = (deform_conv1d, deform_conv2d, deform_conv3d)
_TRANSPOSES = (deform_conv_transpose1d, deform_conv_transpose2d, deform_conv_transpose3d)

Result = TypeVar("Result")


def _node(function: Callable[..., Any], args: Tuple[Any, ...]) -> Any:
    """The call as a node of torch.fx's graph if an argument is one of its proxies, or else None.

    By this, torch.fx does not trace through our functions, which check sizes that it does not know.
    """
    for proxy in args:
        if isinstance(proxy, Proxy):
            return proxy.tracer.create_proxy("call_function", function, args, {})
    return None


# Private names of torch. Without one of them, traces give the warnings that are described below.
_GET_TRACING: Any = getattr(torch._C, "_get_tracing_state", None)
_SET_TRACING: Any = _GET_TRACING and getattr(torch._C, "_set_tracing_state", None)


def _outside_a_trace(function: Callable[..., Result], *args: Any) -> Result:
    """function(*args), unseen by torch.jit.trace.

    In a trace each size of a tensor is a tensor as well, and each comparison of one gives a
    warning.
    """
    if not torch.jit.is_tracing() or _SET_TRACING is None:
        return function(*args)
    state = _GET_TRACING()
    _SET_TRACING(None)
    try:
        return function(*args)
    finally:
        _SET_TRACING(state)


def _ints(sizes: Any) -> Any:
    """Sizes as ints, where torch.jit.trace has made tensors of them."""
    if isinstance(sizes, (tuple, list)):
        return tuple(_ints(size) for size in sizes)
    if isinstance(sizes, Tensor) and sizes.dim() == 0 and sizes.dtype == torch.int64:
        return _outside_a_trace(int, sizes)
    return sizes


def _values(size: Size, n: int) -> List[int]:
    if torch.jit.is_scripting():
        if isinstance(size, int):
            return [size] * n
        elif isinstance(size, Tuple[int]):  # type: ignore[arg-type]
            return [size[0]]
        elif isinstance(size, Tuple[int, int]):  # type: ignore[arg-type]
            return [size[0], size[1]]
        elif isinstance(size, Tuple[int, int, int]):  # type: ignore[arg-type]
            return [size[0], size[1], size[2]]
        else:
            return size  # type: ignore[return-value]
    return list(size) if isinstance(size, (tuple, list)) else [size] * n  # type: ignore[list-item]


def _check_rank(name: str, n: int, input: Tensor, weight: Optional[Tensor]) -> None:
    """The part of check_call that is not left to types under TorchScript."""
    if input.dim() != n + 1 and input.dim() != n + 2:
        raise ValueError(f"{name}: input has {input.dim()} dimensions, expected {n + 2} or {n + 1}")
    if weight is not None and weight.dim() != n + 2:
        raise ValueError(f"{name}: weight has {weight.dim()} dimensions, expected {n + 2}")


def _batch_of_one(
    input: Tensor, offset: Optional[Tensor], mask: Optional[Tensor]
) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
    if offset is not None:
        offset = offset.unsqueeze(0)
    if mask is not None:
        mask = mask.unsqueeze(0)
    return input.unsqueeze(0), offset, mask


def _pad_same(
    name: str, input: Tensor, kernel: List[int], stride: List[int], dilation: List[int]
) -> Tuple[Tensor, List[int]]:
    """The input and the padding that mean padding='same'.

    Where the padding is odd, the input gets one zero more at its end, as in torch's convolutions.
    That changes no sample, since samples outside are zero anyway.
    """
    padding: List[int] = []
    odd: List[int] = []
    for a in range(len(kernel)):
        if stride[a] != 1:
            raise ValueError(f"{name}: padding='same' expects stride 1, got {stride}")
        if dilation[a] < 1:
            raise ValueError(f"{name}: dilation is {dilation}, expected at least 1 on every axis")
        total = dilation[a] * (kernel[a] - 1)
        padding.append(total // 2)
        odd = [0, total % 2] + odd  # noqa: RUF005 (TorchScript)
    if 1 in odd:
        input = F.pad(input, odd)
    return input, padding


_AXES = {1: "W", 2: "H, W", 3: "D, H, W"}
_DISPLACEMENT = {1: "dx", 2: "(dy, dx)", 3: "(dz, dy, dx)"}

_CONV_DOC = """{n}-D deformable convolution.

Each of the K = prod(kernel size) kernel points of each output position samples the input, with
{interpolation} interpolation, at its regular place plus a learned offset, and the sample is
multiplied by a learned mask before the convolution's weighted sum. With offset and mask None it
is torch.nn.functional.conv{n}d, bit for bit.

Args:
    input: [B, Cin, {axes}], or unbatched [Cin, {axes}]. float16, bfloat16, float32 or float64, on
        any device; channels_last input gives channels_last output.
    weight: [Cout, Cin / groups, *kernel], of input's dtype.
    offset: [B, OG * K * {n}, *out], in input pixels, or None for none. Any of the floating dtypes
        (float32 offsets with half input are the accurate choice). The channel is
        (g * K + k) * {n} + axis: groups outermost, then kernel points in row-major order, then
        the axis, {displacement}. The number of groups OG is read off and must divide Cin; group g
        moves the samples of the g-th block of Cin / OG channels.{halves}
    mask: [B, MG * K, *out], or None for all ones. Channel g * K + k. MG divides Cin and is
        independent of OG and groups.
    bias: [Cout], of input's dtype, or None.
    stride: step of the output positions in pixels; an int or one for each axis.
    padding: zeros around the input in pixels, or 'valid' (none) or 'same' (output as large as
        the input; stride 1).
    dilation: distance of the kernel points in pixels.
    groups: blocks of input and output channels that are convolved separately.

Returns:
    [B, Cout, *out] in input's dtype; out = (size + 2 padding - dilation (kernel - 1) - 1) //
    stride + 1. Outside the input is zero: a sample fades out between the border pixel and one
    pixel beyond. A NaN or infinite position samples 0 and gets no gradient; a NaN or infinite
    mask makes that 0 NaN, too.

Raises:
    ValueError, TypeError: an argument does not fit; the message names it.

Coordinates, interpolation and sums are computed in float32 at least. Differentiable to any order
in all five tensors, backwards and forwards; the derivative by an offset is that of the cell
[floor, floor + 1). CPU results, with all gradients, are bitwise the same in every run with the same
number of threads; another number may change their last bits. On a GPU sums may come in another
order in each run, unless torch.use_deterministic_algorithms(True) forbids it.

References:
    Deformable Convolutional Networks, arXiv 1703.06211; Deformable ConvNets v2 (masks),
    arXiv 1811.11168.

Example:
    >>> import torch
    >>> from deformnd import deform_conv{n}d
    >>> input, weight = torch.rand({input}), torch.rand({weight})
    >>> offset, mask = torch.randn({offset}), torch.rand({mask})
    >>> deform_conv{n}d(input, weight, offset, mask, padding=1).shape
    torch.Size([{output}])
"""

_TRANSPOSE_DOC = """{n}-D transposed deformable convolution, the adjoint of deform_conv{n}d.

Each input position writes its K = prod(kernel size) weighted contributions into the output, each
at its regular place plus a learned offset, spread over the neighbouring pixels with the weights of
{interpolation} interpolation and multiplied by a learned mask. With offset and mask None it is
torch.nn.functional.conv_transpose{n}d, bit for bit.

Args:
    input: [B, Cin, {axes}], or unbatched [Cin, {axes}]. float16, bfloat16, float32 or float64, on
        any device; channels_last input gives channels_last output.
    weight: [Cin, Cout / groups, *kernel], of input's dtype.
    offset: [B, OG * K * {n}, {axes}] (input's spatial size), in output pixels, or None for none.
        Channels as in deform_conv{n}d, the axis innermost: {displacement}. OG divides Cout.
    mask: [B, MG * K, {axes}], or None for all ones. Channel g * K + k. MG divides Cout.
    bias: [Cout], of input's dtype, or None.
    stride: distance of the input positions in output pixels; an int or one for each axis.
    padding: pixels cut from each side of the output.
    output_padding: pixels added behind the output; below the larger of stride and dilation.
    dilation: distance of the kernel points in pixels.
    groups: blocks of input and output channels that are convolved separately.

Returns:
    [B, Cout, *out] in input's dtype; out = (size - 1) stride - 2 padding + dilation (kernel - 1)
    + output_padding + 1. What falls outside is dropped, also at NaN and infinite positions.

Raises:
    ValueError, TypeError: an argument does not fit; the message names it.

Precision, derivatives and determinism are those of deform_conv{n}d.

References:
    Deformable Convolutional Networks, arXiv 1703.06211; transposed, arXiv 2210.09446.

Example:
    >>> import torch
    >>> from deformnd import deform_conv_transpose{n}d
    >>> input, weight = torch.rand({input}), torch.rand({weight_t})
    >>> offset, mask = torch.randn({offset}), torch.rand({mask})
    >>> deform_conv_transpose{n}d(input, weight, offset, mask, padding=1).shape
    torch.Size([{output}])
"""


_AGGREGATE_DOC = """{n}-D deformable aggregation, the operator of DCNv3 and DCNv4.

Each of the K = prod(kernel_size) kernel points of each output position samples the input, with
{interpolation} interpolation, at its regular place plus a learned offset. The output is the sum
of the samples, each multiplied by a learned mask. No channel meets another: there is no weight, the
mask does its work, at every position anew. It is deform_conv{n}d with a group for each channel and
a weight of ones.

Args:
    input: [B, C, {axes}], or unbatched [C, {axes}]. float16, bfloat16, float32 or float64, on
        any device; channels_last input gives channels_last output.
    offset: [B, OG * K * {n}, *out], in input pixels, or None for none. Any of the floating dtypes.
        The channel is (g * K + k) * {n} + axis: groups outermost, then kernel points in row-major
        order, then the axis, {displacement}. The number of groups OG is read off and must divide C;
        group g moves the samples of the g-th block of C / OG channels.
    mask: [B, MG * K, *out], or None for all ones. Channel g * K + k. MG divides C; it is OG in
        DCNv3 and DCNv4, but need not be.
    kernel_size: kernel points along each axis; an int or one for each axis.
    stride: step of the output positions in pixels; an int or one for each axis.
    padding: zeros around the input in pixels, or 'valid' (none) or 'same' (output as large as
        the input; stride 1).
    dilation: distance of the kernel points in pixels.

Returns:
    [B, C, *out] in input's dtype; out = (size + 2 padding - dilation (kernel_size - 1) - 1) //
    stride + 1. What lies outside and what is not finite counts as in deform_conv{n}d.

Raises:
    ValueError, TypeError: an argument does not fit; the message names it.

DCNv3 passes a softmax of the mask over the kernel points, DCNv4 the mask as it is. Both packages
keep channels last, count the kernel points in column-major order and give offsets as (x, y): in
their checkpoints the channels stand in another order than here; `deformnd.compat.internimage` has
their modules.

Coordinates, interpolation and sums are computed in float32 at least. Differentiable to any order
in all three tensors, backwards and forwards. Derivatives and determinism are those of
deform_conv{n}d.

References:
    InternImage (DCNv3), arXiv 2211.05778; DCNv4, arXiv 2401.06197.

Example:
    >>> import torch
    >>> from deformnd import deform_aggregate{n}d
    >>> input = torch.rand({input})
    >>> offset, mask = torch.randn({offset2}), torch.rand({mask2})  # 2 groups
    >>> deform_aggregate{n}d(input, offset, mask, kernel_size=3, padding=1).shape
    torch.Size([{input}])
"""


def _document() -> None:
    for n, conv, transpose, aggregate in (
        (1, deform_conv1d, deform_conv_transpose1d, deform_aggregate1d),
        (2, deform_conv2d, deform_conv_transpose2d, deform_aggregate2d),
        (3, deform_conv3d, deform_conv_transpose3d, deform_aggregate3d),
    ):
        size, kernel = ", ".join(["8"] * n), ", ".join(["3"] * n)
        words = {
            "n": n,
            "axes": _AXES[n],
            "interpolation": {1: "linear", 2: "bilinear", 3: "trilinear"}[n],
            "displacement": _DISPLACEMENT[n],
            "halves": ""
            if n == 1
            else " Halves (all dy,\n        then all dx) have the same shape and cannot be "
            "detected: interleave them first.",
            "input": f"2, 4, {size}",
            "weight": f"6, 4, {kernel}",
            "weight_t": f"4, 6, {kernel}",
            "offset": f"2, {n * 3**n}, {size}",
            "mask": f"2, {3**n}, {size}",
            "output": f"2, 6, {size}",
            "offset2": f"2, {2 * n * 3**n}, {size}",
            "mask2": f"2, {2 * 3**n}, {size}",
        }
        conv.__doc__ = _CONV_DOC.format(**words)
        transpose.__doc__ = _TRANSPOSE_DOC.format(**words)
        aggregate.__doc__ = _AGGREGATE_DOC.format(**words)


_document()
