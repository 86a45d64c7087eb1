"""Sizes of a call, and every check of its arguments.

Note [one bilinear form]
All operator families come from one form, linear in `image`, `points`, weight and mask:

    F(image, points) = sum over b, o, p, c, k of
        points[b,o,p] * weight[o,c,k] * mask[b,k,p] * I(image[b,c], position[b,k,p])

where I interpolates the image at p * stride - padding + k * dilation + offset. deform_conv
returns dF/dpoints (gather) for image = input; its transpose returns dF/dimage (scatter) for
points = input. Every gradient of either is a derivative of F with (image, points) =
(input, grad_output) or (grad_output, input). So Geometry speaks of the image and the points,
never of input and output, the weight is [point channels, image channels / groups, *kernel] in
both families, and a backend needs three functions: gather, scatter and gradients of F. The
gradient of a bias is the channel sums of grad_output, which gradients gives along with its own.

deform_aggregate is deform_conv with a group for each channel and a weight of ones, which is no
tensor then but None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# The largest stride, padding, dilation and number of groups. torch's own convolutions cut larger
# ones to 32 bits, and products of these with sizes of up to 2^32 still fit 64 bits.
LARGEST = 2**31 - 1


class Geometry(NamedTuple):
    """All sizes of one call (see Note [one bilinear form])."""

    batch: int
    image_channels: int
    point_channels: int
    groups: int
    offset_groups: int  # 0 without an offset
    mask_groups: int  # 0 without a mask
    image_size: tuple[int, ...]
    point_size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def memory_format(t: Tensor) -> torch.memory_format:
    """The layout that a result takes over from the tensor it belongs to."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(t.dim())
    # The stride is looked at first, since it decides most cases without a guard on symbolic sizes.
    if last is not None and t.stride(-1) != 1 and t.is_contiguous(memory_format=last):
        return last
    return torch.contiguous_format


def backwards(t: Tensor) -> Tensor:
    """A view of [B, C, *size] as [B, *reversed size, C], or of the latter as the former."""
    return t.permute(0, *range(t.dim() - 1, 0, -1))


def lies_backwards(t: Tensor) -> bool:
    """Whether the core takes this view without a copy, see Note [backwards] in cpu.py."""
    return (
        t.is_cpu
        and t.dim() > 3
        and t.stride(-1) != 1
        and memory_format(t) == torch.contiguous_format
        and backwards(t).is_contiguous()
    )


def empty(size: Sequence[int], like: Tensor) -> Tensor:
    """An empty tensor in the dtype and layout of the tensor that it belongs to."""
    if lies_backwards(like):
        return backwards(like.new_empty((size[0], *reversed(size[1:]))))
    return torch.empty(
        size, dtype=like.dtype, device=like.device, memory_format=memory_format(like)
    )


def arranged(t: Tensor, like: Tensor) -> Tensor:
    """The tensor in another's dtype and layout."""
    t = t.to(like.dtype)
    if lies_backwards(like):
        return backwards(backwards(t).contiguous())
    return t.contiguous(memory_format=memory_format(like))


def empty_gradient(given: Tensor) -> Tensor:
    """An empty gradient of an offset or a mask, which the GPU kernels write contiguously."""
    return empty(given.shape, given) if given.is_cpu else given.new_empty(given.shape)


def conv_geometry(
    input: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Geometry:
    """Geometry of a deform_conv call; raises ValueError or TypeError for bad arguments."""
    tensors = {"input": input, "weight": weight, "offset": offset, "mask": mask, "bias": bias}
    fail = _check_tensors("deform_conv", tensors)
    n = input.dim() - 2
    _check_parameters(fail, n, stride, padding, dilation, groups)
    channels, points, per_group, kernel = _static(input, weight)
    if channels != per_group * groups:
        fail(
            f"input has {channels} channels, expected {per_group * groups} "
            f"(weight.shape[1] {per_group} x groups {groups})"
        )
    if points % groups:
        fail(f"weight has {points} output channels, expected a multiple of groups {groups}")
    made_by = (stride, padding, dilation)
    point_size = _point_size(fail, input, points, kernel, *made_by)
    offset_groups, mask_groups = _check_offset_mask(
        fail, offset, mask, input.shape[0], channels, "input", point_size, kernel, made_by
    )
    _check_bias(fail, bias, points)
    return Geometry(
        input.shape[0],
        channels,
        points,
        groups,
        offset_groups,
        mask_groups,
        tuple(input.shape[2:]),
        point_size,
        kernel,
        tuple(stride),
        tuple(padding),
        tuple(dilation),
    )


def aggregate_geometry(
    input: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Geometry:
    """Geometry of a deform_aggregate call; raises ValueError or TypeError likewise."""
    tensors = {"input": input, "offset": offset, "mask": mask}
    fail = _check_tensors("deform_aggregate", tensors, f", kernel_size {list(kernel_size)}")
    n = input.dim() - 2
    _check_list(fail, "kernel_size", kernel_size, n, 1)
    _check_parameters(fail, n, stride, padding, dilation, 1)
    channels, kernel = int(input.shape[1]), tuple(map(int, kernel_size))
    made_by = (stride, padding, dilation)
    point_size = _point_size(fail, input, channels, kernel, *made_by)
    offset_groups, mask_groups = _check_offset_mask(
        fail, offset, mask, input.shape[0], channels, "input", point_size, kernel, made_by
    )
    return Geometry(
        input.shape[0],
        channels,
        channels,
        max(channels, 1),
        offset_groups,
        mask_groups,
        tuple(input.shape[2:]),
        point_size,
        kernel,
        tuple(stride),
        tuple(padding),
        tuple(dilation),
    )


def conv_transpose_geometry(
    input: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Geometry:
    """Geometry of a deform_conv_transpose call; raises ValueError or TypeError likewise."""
    tensors = {"input": input, "weight": weight, "offset": offset, "mask": mask, "bias": bias}
    fail = _check_tensors("deform_conv_transpose", tensors)
    n = input.dim() - 2
    _check_parameters(fail, n, stride, padding, dilation, groups)
    _check_list(fail, "output_padding", output_padding, n, 0)
    for extra, s, d in zip(output_padding, stride, dilation, strict=True):
        if extra >= max(s, d):
            fail(
                f"output_padding is {_show(output_padding)}, expected each value below the "
                f"larger of stride {_show(stride)} and dilation {_show(dilation)} on its axis"
            )
    got, points, per_group, kernel = _static(input, weight)
    channels = per_group * groups
    if got != points:
        fail(f"input has {got} channels, expected {points} (weight.shape[0])")
    if points % groups:
        fail(f"weight has {points} input channels, expected a multiple of groups {groups}")
    image_size = tuple(
        (s - 1) * t - 2 * p + d * (k - 1) + extra + 1
        for s, t, p, d, k, extra in zip(
            input.shape[2:], stride, padding, dilation, kernel, output_padding, strict=True
        )
    )
    if any(size < 1 for size in image_size):
        fail(
            f"the output would have size {_show(image_size)}, expected at least 1 on every axis "
            f"(stride {_show(stride)}, padding {_show(padding)}, "
            f"output_padding {_show(output_padding)}, dilation {_show(dilation)})"
        )
    _check_numel(
        fail,
        (input.shape[0], channels, *image_size),
        f"stride {_show(stride)}, dilation {_show(dilation)}",
    )
    offset_groups, mask_groups = _check_offset_mask(
        fail, offset, mask, input.shape[0], channels, "output", tuple(input.shape[2:]), kernel
    )
    _check_bias(fail, bias, channels)
    return Geometry(
        input.shape[0],
        channels,
        points,
        groups,
        offset_groups,
        mask_groups,
        image_size,
        tuple(input.shape[2:]),
        kernel,
        tuple(stride),
        tuple(padding),
        tuple(dilation),
    )


class Attention(NamedTuple):
    """All sizes of a call of deform_attention."""

    batch: int
    queries: int
    heads: int
    channels: int  # of each head
    points: int  # of each head in each level
    shapes: tuple[tuple[int, ...], ...]  # the levels' sizes
    pixels: int  # of all levels together

    @property
    def starts(self) -> list[int]:
        """The first pixel of each level."""
        sizes = [math.prod(shape) for shape in self.shapes]
        return [sum(sizes[:level]) for level in range(len(sizes))]

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.batch, self.queries, self.heads * self.channels)


def attention_geometry(
    value: Tensor, locations: Tensor, weights: Tensor, shapes: Sequence[int]
) -> Attention:
    """Geometry of a deform_attention call; raises ValueError or TypeError for bad arguments.

    shapes: the levels' sizes one after another, as many values each as a location has.
    """
    tensors: dict[str, Tensor | None] = {
        "value": value,
        "locations": locations,
        "weights": weights,
    }
    n = 0

    def fail(message: str, error: type[Exception] = ValueError) -> NoReturn:
        sizes = [_show(shapes[i : i + n]) for i in range(0, len(shapes), n)] if n else shapes
        listed = ", ".join(map(str, sizes))
        raise error(f"deform_attention: {message}; {_shapes(tensors)}, shapes [{listed}]")

    for key, t, dim, what in (
        ("value", value, 4, "batch, pixels, heads, channels"),
        ("locations", locations, 6, "batch, queries, heads, levels, points, axes"),
        ("weights", weights, 5, "batch, queries, heads, levels, points"),
    ):
        problem = _no_dense_tensor(t) or (_no_dtype(t) if t.dtype not in DTYPES else "")
        if problem:
            fail(f"{key} {problem}", TypeError)
        if t.device != value.device:
            fail(f"{key} is on {t.device}, expected {value.device}, where value is")
        if t.dim() != dim:
            fail(f"{key} has {t.dim()} dimensions, expected {dim} ({what})")
    n = int(locations.shape[-1])
    if not 1 <= n <= 3:
        n, got = 0, n
        fail(f"locations have {got} coordinates, expected 1 to 3, in the last dimension")
    if not shapes or len(shapes) % n:
        n, axes = 0, n
        fail(f"shapes have {len(shapes)} values, expected {axes} for each level, as locations have")
    levels = tuple(tuple(shapes[i : i + n]) for i in range(0, len(shapes), n))
    if any(size < 1 for size in shapes):
        fail("shapes are expected to be at least 1 on every axis")
    batch, pixels = value.shape[:2]
    heads, channels = map(int, value.shape[2:])
    total = sum(math.prod(level) for level in levels)
    if pixels != total:
        fail(f"value has {pixels} pixels, expected {total}, the sum of all levels'")
    queries, points = locations.shape[1], int(locations.shape[4])
    samples = (batch, queries, heads, len(levels), points)
    for key, t, expected, names in (
        ("locations", locations, (*samples, n), "batch, queries, heads, levels, points, axes"),
        ("weights", weights, samples, "batch, queries, heads, levels, points"),
    ):
        if tuple(t.shape) != expected:
            fail(f"{key} has shape {list(t.shape)}, expected {list(expected)} ({names})")
    return Attention(batch, queries, heads, channels, points, levels, total)


# What the kernels and the derivatives take: (input, weight, offset, mask, bias) or the first four
# of these, or something that belongs to each, such as whether its gradient is needed.
Slots = Sequence[Any]


class Family(NamedTuple):
    """One of the operators, which share every rule of Note [one bilinear form]."""

    name: str
    transposed: bool
    geometry: Callable[..., Geometry]
    weighted: bool = True  # False for an operator with neither weight nor bias

    def own(self, slots: Slots) -> Slots:
        """Of slots, those of the tensors that the operator has."""
        return slots if self.weighted else (slots[0], *slots[2:4])

    def slots(self, own: Slots) -> Slots:
        """The reverse of `own`, with None for tensors that the operator does not have."""
        if len(own) == 5:
            return own
        return (*own, None) if self.weighted else (own[0], None, *own[1:], None)

    @property
    def tensors(self) -> int:
        """The number of tensors that the operator takes."""
        return 5 if self.weighted else 3

    @property
    def saved(self) -> int:
        """How many of these its derivatives need, which is all but a bias."""
        return 4 if self.weighted else 3

    def output_shape(self, g: Geometry) -> tuple[int, ...]:
        if self.transposed:
            return (g.batch, g.image_channels, *g.image_size)
        return (g.batch, g.point_channels, *g.point_size)


FAMILIES = (
    Family("deform_conv", False, conv_geometry),
    Family("deform_conv_transpose", True, conv_transpose_geometry),
    Family("deform_aggregate", False, aggregate_geometry, weighted=False),
)


def check_call(
    name: str,
    n: int,
    tensors: dict[str, Tensor | None],
    parameters: dict[str, Any],
) -> None:
    """Check what the operators cannot see of a call of one of the functions.

    That is: the type of every argument, the rank that the function's name promises, and the
    number of values in each size.
    """
    for key, t in tensors.items():
        # This repeats a part of _no_dense_tensor, since it decides nearly all calls in half the
        # time.
        if isinstance(t, Tensor) and t.layout is torch.strided and not t.is_nested:
            continue
        if t is not None or key in ("input", "weight"):
            raise TypeError(f"{name}: {key} {_no_dense_tensor(t)}{_order(n, tensors)}")
    input = tensors["input"]
    assert input is not None
    if input.dim() not in (n + 1, n + 2):
        raise ValueError(
            f"{name}: input has {input.dim()} dimensions, expected {n + 2} (batch, channels, "
            f"{n} spatial) or {n + 1} (unbatched); {_shapes(tensors)}"
        )
    for key, dim in (("weight", n + 2), ("offset", input.dim()), ("mask", input.dim())):
        t = tensors.get(key)
        if t is not None and t.dim() != dim:
            unbatched = " as the unbatched input" if dim == n + 1 else ""
            raise ValueError(
                f"{name}: {key} has {t.dim()} dimensions, expected {dim}{unbatched}"
                f"{_order(n, tensors)}; {_shapes(tensors)}"
            )
    ints = [int] * n
    for key, value in parameters.items():
        # Plain ints in range need none of the checks below, and nearly all calls have nothing else.
        if (type(value) is int and -LARGEST <= value <= LARGEST) or (
            type(value) is tuple
            and [*map(type, value)] == ints
            and key != "groups"
            and -LARGEST <= min(value) <= max(value) <= LARGEST
        ):
            continue
        sequence = isinstance(value, (tuple, list))
        if key == "padding" and isinstance(value, str) and "output_padding" not in parameters:
            if value not in ("same", "valid"):
                raise ValueError(f"{name}: padding is {value!r}, expected 'same', 'valid' or ints")
            continue
        length = 1 if key == "groups" else n
        wanted = "an int" if length == 1 else f"an int or {length} ints"
        for v in value if sequence and key != "groups" else (value,):
            if not isinstance(v, (int, torch.SymInt, Integral)) or isinstance(v, bool):
                raise TypeError(f"{name}: {key} is {_told(value)}, expected {wanted}")
            if not isinstance(v, torch.SymInt) and abs(int(v)) > LARGEST:
                raise ValueError(f"{name}: {key} is {value!r}, expected at most {LARGEST}")
        if sequence and len(value) != length:
            raise ValueError(f"{name}: {key} is {value!r}, expected {wanted}")


def check_attention(value: Any, shapes: Any, locations: Any, weights: Any) -> list[int]:
    """Check the types of deform_attention's arguments; return the levels' sizes in one list."""
    name = "deform_attention"
    for key, t in (("value", value), ("locations", locations), ("weights", weights)):
        problem = _no_dense_tensor(t)
        if problem:
            raise TypeError(f"{name}: {key} {problem}")
    n = locations.shape[-1] if locations.dim() == 6 else 0
    # Where locations are wrong themselves, the operator has a better message than a wrong shape.
    levels = check_levels(name, shapes, n if 1 <= n <= 3 else 0)
    return [size for level in levels for size in level]


# The dtypes that sizes may have where they come in a tensor.
_INTS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_levels(name: str, shapes: Any, n: int, key: str = "shapes") -> Sequence[Sequence[int]]:
    """Check the levels' sizes and return them; those in a tensor become lists.

    name, key: of the function and its argument, for messages. n: the number of axes of each level,
    or 0 if it is not known.
    """
    given = shapes
    if isinstance(shapes, Tensor):
        problem = _no_dense_tensor(shapes)
        if not problem and (shapes.dim() != 2 or shapes.dtype not in _INTS):
            problem = (
                f"is a tensor {list(shapes.shape)} of {shapes.dtype}, expected ints "
                "[levels, axes], or a list of the levels' sizes"
            )
        elif not problem and shapes.is_meta:
            problem = "is on meta, where it has no values, expected a list of the levels' sizes"
        if problem:
            raise TypeError(f"{name}: {key} {problem}")
        shapes = shapes.tolist()
        if any(isinstance(size, torch.SymInt) for level in shapes for size in level):
            raise TypeError(
                f"{name}: {key} is a tensor, whose values are not known where a graph is made, "
                "expected a list of the levels' sizes"
            )
    axes = f"{n or '1 to 3'} int{'' if n == 1 else 's'}"
    wanted = f"a list of the levels' sizes, each of {axes}"
    if not isinstance(shapes, (tuple, list)) or any(
        not isinstance(level, (tuple, list)) for level in shapes
    ):
        raise TypeError(f"{name}: {key} is {given!r}, expected {wanted}")
    for size in (size for level in shapes for size in level):
        if not isinstance(size, (int, torch.SymInt, Integral)) or isinstance(size, bool):
            raise TypeError(f"{name}: {key} is {given!r}, expected {wanted}")
        if not isinstance(size, torch.SymInt) and abs(int(size)) > LARGEST:
            raise ValueError(f"{name}: {key} is {given!r}, expected at most {LARGEST}")
    if n and any(len(level) != n for level in shapes):
        raise ValueError(
            f"{name}: {key} is {given!r}, expected {wanted}, as many as locations have"
        )
    return shapes


def check_ints(name: str, key: str, value: Any, n: int, least: int) -> tuple[int, ...]:
    """Check an int, or one for each of n axes, and return n ints; n = 0 means one int alone."""
    many = n > 0 and isinstance(value, (tuple, list))
    values = tuple(value) if many else (value,) * max(n, 1)
    wanted = "an int" if n == 0 else f"an int or {n} int{'s' if n > 1 else ''}"
    if not all(isinstance(v, Integral) and not isinstance(v, bool) for v in values):
        raise TypeError(f"{name}: {key} is {_told(value)}, expected {wanted}")
    if len(values) != max(n, 1):
        raise ValueError(f"{name}: {key} is {value!r}, expected {wanted}")
    if not all(least <= v <= LARGEST for v in values):
        raise ValueError(f"{name}: {key} is {value!r}, expected {wanted} from {least} to {LARGEST}")
    return tuple(map(int, values))


def _told(value: Any) -> str:
    """A wrong value as a message shows it; of a tensor, such as a misplaced weight, the shape."""
    if getattr(value, "ndim", 0):
        return f"a {type(value).__name__} of shape {list(value.shape)}"
    return repr(value)


Fail = Callable[[str], NoReturn]


def _show(values: Sequence[int]) -> str:
    return "(" + ", ".join(str(v) for v in values) + ("," if len(values) == 1 else "") + ")"


def _parameters(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> str:
    return f" (stride {_show(stride)}, padding {_show(padding)}, dilation {_show(dilation)})"


def _shapes(tensors: dict[str, Tensor | None]) -> str:
    return ", ".join(
        f"{k} {list(t.shape)}"
        for k, t in tensors.items()
        if isinstance(t, Tensor) and not t.is_nested
    )


def _no_dense_tensor(t: Any) -> str:
    """What is wrong with an argument that must be a tensor of plain memory, or ''."""
    if not isinstance(t, Tensor):
        return f"is a {type(t).__name__}, expected a Tensor"
    if t.is_nested:
        return f"is a nested tensor of layout {t.layout}, expected a dense one"
    return "" if t.layout is torch.strided else f"has layout {t.layout}, expected torch.strided"


def check_tensor(name: str, key: str, t: Any) -> None:
    """Raise TypeError unless t is a dense tensor of a floating dtype, or a proxy of torch.fx."""
    if isinstance(t, torch.fx.Proxy):
        return
    problem = _no_dense_tensor(t)
    if not problem and t.dtype not in DTYPES:
        problem = _no_dtype(t)
    if problem:
        raise TypeError(f"{name}: {key} {problem}")


def _no_dtype(t: Tensor) -> str:
    expected = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
    return f"has dtype {t.dtype}, expected one of {expected}"


def _order(n: int, tensors: dict[str, Any]) -> str:
    """A hint for a message if the arguments seem to be in another package's order, or ''.

    They do if the second one fits as an offset for a weight that comes later. torchvision's order
    is (input, offset, weight, ...), mmcv's is that or (input, offset, mask, weight).
    """
    first = (tensors["input"], tensors.get("weight"))
    for last in (tensors.get("offset"), tensors.get("mask")):
        dense = [t for t in (*first, last) if isinstance(t, Tensor) and not t.is_nested]
        if len(dense) < 3 or any(t.dim() != n + 2 for t in dense):
            continue
        input, offset, weight = (t.shape for t in dense)
        unit = n * math.prod(weight[2:])
        like_offset = offset[0] == input[0] and unit and offset[1] % unit == 0
        if like_offset and (input[1] == weight[0] or (weight[1] and input[1] % weight[1] == 0)):
            return (
                "; arguments are (input, weight, offset, mask, ...); "
                "torchvision's and mmcv's order is another"
            )
    return ""


def _check_tensors(operator: str, tensors: dict[str, Any], rest: str = "") -> Fail:
    """Check type, device, dtype and rank of the tensors; return a function that raises errors.

    `rest` is what messages say after the tensors' shapes.
    """
    input = tensors["input"]

    def fail(message: str, error: type[Exception] = ValueError) -> NoReturn:
        n = input.dim() - 2 if isinstance(input, Tensor) and 3 <= input.dim() <= 5 else "N"
        order = _order(n, tensors) if isinstance(n, int) else ""
        raise error(f"{operator}{n}d: {message}{order}; {_shapes(tensors)}{rest}")

    for key, t in tensors.items():
        if t is None and key not in ("input", "weight"):
            continue
        problem = _no_dense_tensor(t)
        if problem:
            fail(f"{key} {problem}", TypeError)
        if t.dtype not in DTYPES:
            fail(f"{key} {_no_dtype(t)}", TypeError)
        if t.device != input.device:
            fail(f"{key} is on {t.device}, expected {input.device}, where input is")
    weight = tensors.get("weight")
    for key, t in (("weight", weight), ("bias", tensors.get("bias"))):
        # Under autocast dtypes may differ, since either this operator casts below autocast's key or
        # the ordinary convolution, which is called where there is nothing to deform, does.
        if (
            t is not None
            and t.dtype != input.dtype
            and not torch.is_autocast_enabled(input.device.type)
        ):
            fail(f"{key} has dtype {t.dtype}, expected {input.dtype} as input", TypeError)
    if not 3 <= input.dim() <= 5:
        fail(f"input has {input.dim()} dimensions, expected 3 to 5 (batch, channels, 1 to 3 axes)")
    if weight is not None and weight.dim() != input.dim():
        fail(f"weight has {weight.dim()} dimensions, expected {input.dim()} as input")
    for key, t in (("input", input), ("weight", weight)):
        if t is not None and any(size < 1 for size in t.shape[2:]):
            what = "kernel" if key == "weight" else "spatial"
            fail(f"{key} has {what} size {_show(t.shape[2:])}, expected at least 1 on every axis")
    return fail


def _static(input: Tensor, weight: Tensor) -> tuple[int, int, int, tuple[int, ...]]:
    """Channels of input, and channels and kernel of weight, as plain ints.

    In a graph with symbolic sizes int() makes them constants, as in torch's own convolutions: they
    do not vary between calls, as batch and spatial sizes do.
    """
    points, per_group, *kernel = map(int, weight.shape)
    return int(input.shape[1]), points, per_group, tuple(kernel)


def _check_parameters(
    fail: Fail,
    n: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    _check_list(fail, "stride", stride, n, 1)
    _check_list(fail, "padding", padding, n, 0)
    _check_list(fail, "dilation", dilation, n, 1)
    if groups < 1:
        fail(f"groups is {groups}, expected at least 1")


def _check_list(fail: Fail, name: str, values: Sequence[int], n: int, least: int) -> None:
    if len(values) != n:
        plural = "s" if n > 1 else ""
        fail(f"{name} is {_show(values)}, expected an int or {n} value{plural}, one for each axis")
    if any(v < least for v in values):
        fail(f"{name} is {_show(values)}, expected at least {least} on every axis")
    if any(isinstance(v, int) and v > LARGEST for v in values):
        fail(f"{name} is {_show(values)}, expected at most {LARGEST} on every axis")


def _check_numel(fail: Fail, shape: Sequence[int], causes: str) -> None:
    """Refuse outputs whose bytes 64 bits cannot count; of symbolic sizes torch does so itself."""
    if all(isinstance(size, int) for size in shape) and math.prod(shape) > 2**60:
        fail(f"the output would have shape {list(shape)}, expected at most 2^60 values ({causes})")


def _point_size(
    fail: Fail,
    input: Tensor,
    channels: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """The output's size where the input is what is sampled."""
    point_size = tuple(
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, p, d, k, t in zip(input.shape[2:], padding, dilation, kernel, stride, strict=True)
    )
    if any(size < 1 for size in point_size):
        fail(
            f"the output would have size {_show(point_size)}, expected at least 1 on every axis; "
            "the dilated kernel is larger than the padded input"
            + _parameters(stride, padding, dilation)
        )
    _check_numel(fail, (input.shape[0], channels, *point_size), f"padding {_show(padding)}")
    return point_size


def _check_offset_mask(
    fail: Fail,
    offset: Tensor | None,
    mask: Tensor | None,
    batch: int,
    channels: int,
    owner: str,
    point_size: tuple[int, ...],
    kernel: tuple[int, ...],
    made_by: tuple[Sequence[int], Sequence[int], Sequence[int]] | None = None,
) -> tuple[int, int]:
    """Check offset and mask against the sizes; return their numbers of groups.

    made_by: stride, padding and dilation, for messages, where point_size was computed from them.
    """
    n, points = len(kernel), math.prod(kernel)
    found = []
    for name, t, unit in (("offset", offset, n * points), ("mask", mask, points)):
        if t is None:
            found.append(0)
            continue
        if t.dim() != n + 2:
            fail(f"{name} has {t.dim()} dimensions, expected {n + 2} as input")
        if t.shape[0] != batch:
            fail(f"{name} has batch size {t.shape[0]}, expected {batch} as input")
        size = int(t.shape[1])
        if size % unit or size == 0:
            axes = f"{n} ax{'es' if n > 1 else 'is'} x " if name == "offset" else ""
            swapped = (
                offset is not None
                and mask is not None
                and mask.shape[1] % (n * points) == 0
                and offset.shape[1] % points == 0
            )
            fail(
                f"{name} has {size} channels, expected a multiple of {unit} "
                f"({axes}{points} kernel points)"
                + (" (are offset and mask swapped?)" if swapped else "")
            )
        if tuple(t.shape[2:]) != point_size:
            whose = "output's" if owner == "input" else "input's"
            fail(
                f"{name} has spatial size {_show(t.shape[2:])}, "
                f"expected the {whose} {_show(point_size)}"
                + (_parameters(*made_by) if made_by else "")
            )
        groups = size // unit
        if channels % groups:
            fail(
                f"{name} has {groups} groups ({size} channels / {unit}), which do not "
                f"divide the {channels} {owner} channels"
            )
        found.append(groups)
    return found[0], found[1]


def _check_bias(fail: Fail, bias: Tensor | None, channels: int) -> None:
    if bias is not None and tuple(bias.shape) != (channels,):
        fail(f"bias has shape {list(bias.shape)}, expected [{channels}]")
