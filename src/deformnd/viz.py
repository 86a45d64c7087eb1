"""Pictures: where deformable layers sample, their offset fields and masks.

`pip install 'deformnd[viz]'` brings matplotlib. Everything here reads one image of a batch, works
in 1-D, 2-D and, in slices, 3-D, and returns matplotlib's axes or figure, to be shown or saved.
`show` draws one layer of a model, by its name; the others are what it is made of, and what stacked
layers see together.

Positions are pixels, axes slowest first: (x,), (y, x) or (z, y, x), as the offsets' channels are.
Pixel centres have integer positions.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import itertools
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .compat import internimage as _internimage
from .kernels.geometry import check_tensor
from .ops import modules as _modules
from .ops.bases import ConvNd
from .ops.functional import Size, _values

__all__ = [
    "Samples",
    "Step",
    "animate",
    "draw_mask",
    "draw_offset",
    "draw_samples",
    "flow_colours",
    "follow",
    "show",
    "steps",
]


class Step(NamedTuple):
    """One layer, as far as positions go: the offset and mask that it used on one image.

    offset is [OG * K * n, *out] and mask [MG * K, *out], or both with a batch before, of which
    `follow` takes an item; either may be None. A layer with neither moves positions regularly (an
    ordinary convolution, a pooling).
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    offset: Tensor | None = None
    mask: Tensor | None = None


class Samples(NamedTuple):
    """Where an output location samples: positions [N, n] in pixels, and the masks' product [N]."""

    positions: Tensor
    weights: Tensor


@torch.no_grad()
def steps(layers: nn.Module | Iterable[nn.Module], input: Tensor, index: int = 0) -> list[Step]:
    """Run layers one after the other, and note what each did to positions.

    Args:
        layers: a module, an nn.Sequential (also nested), or the modules on the way through a
            network, in order. Deformable ones are this package's packed layers, or modules of your
            own that call one `DeformConvNd`, or one of the functions `deform_conv` and
            `deform_aggregate`, on an input of the size they are given. Others must be ordinary
            convolutions, poolings, or leave the size as it is.
        input: [B, C, *size]; for a single image B is 1.
        index: the image of the batch.

    Returns:
        A Step for each layer that can change positions.

    Raises:
        ValueError: a layer through which positions cannot be followed.

    Example:
        >>> import torch
        >>> from deformnd import PackedDeformConv2d, viz
        >>> layers = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2), PackedDeformConv2d(8, 8, 3))
        >>> [step.stride for step in viz.steps(layers, torch.rand(1, 3, 17, 17))]
        [(2, 2), (1, 1)]
    """
    if isinstance(layers, nn.Module):
        layers = [layers]
    found: list[Step] = []
    x = input[index : index + 1]
    for layer in _flatten(layers):
        before = x
        with _watch(layer) as calls:
            x = layer(x)
        if len(calls) == 1 and not calls[0].transposed:
            call = calls[0]
            # For padding='same' of an even kernel the operator's input has a zero more at its end.
            kernel, dilation = call.step.kernel, call.step.dilation
            odd = [d * (k - 1) % 2 for k, d in zip(kernel, dilation, strict=True)]
            sizes = (call.size, tuple(s - o for s, o in zip(call.size, odd, strict=True)))
            # Images may have their channels first or last.
            if not {tuple(before.shape[2:]), tuple(before.shape[1:-1])} & {*sizes}:
                raise ValueError(
                    f"steps: {type(layer).__name__} does not call its {call.by} on an input of its "
                    "own size"
                )
            offset, mask = (None if t is None else t[0] for t in (call.step.offset, call.step.mask))
            found.append(call.step._replace(offset=offset, mask=mask))
        elif isinstance(layer, _REGULAR):
            found.append(_step(layer, None, None))
        elif x.shape[2:] != before.shape[2:] or calls:
            raise ValueError(
                f"steps: positions cannot be followed through {type(layer).__name__}, expected "
                "a packed layer, a module around one DeformConv, an ordinary convolution or "
                "pooling, or a module that keeps the size"
            )
    return found


_DEFORMABLE: tuple[Any, ...] = (
    *(_modules._DeformConvNd, _modules._DeformConvTransposeNd),
    *(_modules._PackedDeformAggregateNd, _internimage._Module),
)
_REGULAR = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
)


def _flatten(layers: Iterable[nn.Module]) -> Iterable[nn.Module]:
    for layer in layers:
        if not isinstance(layer, nn.Module):
            raise TypeError(f"steps: layers has {layer!r}, expected Modules")
        if isinstance(layer, nn.Sequential):
            yield from _flatten(layer)
        else:
            yield layer


class _Call(NamedTuple):
    """A call of an operator, with the whole batch's offset and mask."""

    step: Step
    size: tuple[
        int, ...
    ]  # of what has the positions: the input or, of a transposed call, the output
    transposed: bool
    by: str


class _Notice(TorchDispatchMode):
    """Calls `note` for each call of an operator, be it by a layer, a function or a script."""

    def __init__(self, note: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.namespace == "deformnd":
            name = func._schema.name.split("::")[1]
            if name in ("deform_conv", "deform_conv_transpose", "deform_aggregate"):
                self.note(name, args, output)
        return output


@contextlib.contextmanager
def _watch(module: nn.Module) -> Iterator[list[_Call]]:
    """While open, lists the calls of operators that the module and those below it make."""
    calls: list[_Call] = []
    # Of the modules that run now, the watched one and layers of this package: each with its input
    # and the number of calls before it.
    running: list[tuple[Any, Any, int]] = []

    def enter(layer: nn.Module, args: Any, kwargs: Any) -> None:
        running.append((layer, args[0] if args else kwargs.get("input"), len(calls)))

    def leave(layer: Any, args: Any, output: Any) -> None:
        _, input, before = running.pop()
        # A layer with neither offset nor mask calls the ordinary convolution, and no operator.
        if len(calls) == before and isinstance(layer, _DEFORMABLE):
            size = (output if layer.transposed else input).shape[-layer.rank :]
            step, by = _step(layer, None, None), type(layer).__name__
            calls.append(_Call(step, tuple(size), layer.transposed, by))

    def note(name: str, args: Sequence[Any], output: Tensor) -> None:
        if not running:
            return
        layer, input, _ = running[-1]
        transposed = name == "deform_conv_transpose"
        if name == "deform_aggregate":
            image, offset, mask, kernel, stride, padding, dilation = args
        else:  # A transposed call has output_padding before the dilation.
            image, weight, offset, mask, _, stride, padding, *_, dilation, _ = args
            kernel = weight.shape[2:]
        n = image.dim() - 2
        step = Step(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), offset, mask)
        size = tuple((output if transposed else image).shape[2:])
        if isinstance(layer, _internimage._Module):
            if image.is_cpu:  # On CPUs these layers call the operator with the axes (x, y).
                step, size = _turned(step), size[::-1]
        elif isinstance(layer, _DEFORMABLE):
            # The operator's input may be padded already, but positions are those in the layer's
            # own.
            step = _step(layer, offset, mask)
            size = size if transposed else tuple(input.shape[-n:])
        by = type(layer).__name__ if isinstance(layer, _DEFORMABLE) else f"{name}{n}d"
        calls.append(_Call(step, size, transposed, by))

    layers = {module: None} | {m: None for m in module.modules() if isinstance(m, _DEFORMABLE)}
    hooks: list[Any] = []
    try:
        for layer in layers:
            hooks.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(layer.register_forward_hook(leave))
        # A module that torch.compile has compiled would run without its hooks. If torch._dynamo,
        # whose import takes a second, is not imported yet, then nothing is compiled.
        eager: Any = contextlib.nullcontext()
        if "torch._dynamo" in sys.modules:
            eager = torch.compiler.set_stance("force_eager")
        with eager, _Notice(note):
            yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _turned(step: Step) -> Step:
    """A 2-D step with its axes, and with them its kernel points, exchanged."""
    kernel, offset, mask = step.kernel, step.offset, step.mask
    if offset is not None:
        places = offset.unflatten(1, (-1, *kernel, 2)).permute(0, 1, 3, 2, 4, 6, 5)
        offset = places.flip(4).flatten(1, 4)
    if mask is not None:
        mask = mask.unflatten(1, (-1, *kernel)).permute(0, 1, 3, 2, 5, 4).flatten(1, 3)
    kernel, stride, padding, dilation = (values[::-1] for values in step[:4])
    return Step(kernel, stride, padding, dilation, offset, mask)


def _step(layer: Any, offset: Tensor | None, mask: Tensor | None) -> Step:
    # torch's poolings have their rank in their names alone.
    known = isinstance(layer, _DEFORMABLE) or hasattr(layer, "weight")
    n = len(layer.kernel_size) if known else int(type(layer).__name__[-2])

    def values(size: Any) -> tuple[int, ...]:
        return tuple(_values(size, n))

    kernel, dilation = values(layer.kernel_size), values(getattr(layer, "dilation", 1))
    padding = layer.padding
    if isinstance(padding, str):
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = [t // 2 if padding == "same" else 0 for t in total]
    return Step(kernel, values(layer.stride), values(padding), dilation, offset, mask)


@torch.no_grad()
def follow(
    steps: Sequence[Step],
    at: Sequence[int],
    *,
    group: int | None = None,
    deformed: bool = True,
    index: int | None = None,
) -> Samples:
    """The positions in the first layer's input that an output location of the last one samples.

    A deformable layer samples K points for each group of offsets; a layer before it is looked up
    at the pixel next to each, so three layers of nine points sample 729. What falls outside
    of a layer's input is zero and ends there, except in the first input, where it is kept. An
    ordinary layer moves a position to the centre of its window.

    Args:
        steps: of `steps`, or made by hand of any offset and mask.
        at: the output location, n indices.
        group: the group of offsets to follow, None for all.
        deformed: False follows the regular places, as if all offsets were 0.
        index: the image to follow, of steps made by hand whose offset and mask have a batch; a
            batch of one needs none.

    Returns:
        Samples: positions [N, n] and weights [N], on the CPU, in float32 or the offsets' float64;
        the kernel points innermost, in row-major order.

    Raises:
        ValueError: the location or group does not exist, or the image of a batch.

    Example: where a 3x3 layer with one pixel of padding samples for the output in the corner.
        >>> import torch
        >>> from deformnd import viz
        >>> step = viz.Step((3, 3), (1, 1), (1, 1), (1, 1), torch.zeros(18, 8, 8))
        >>> viz.follow([step], (0, 0)).positions[:4].tolist()
        [[-1.0, -1.0], [-1.0, 0.0], [-1.0, 1.0], [0.0, -1.0]]
    """
    at = tuple(at)
    steps = [
        step._replace(
            offset=_item("follow", "offset", step.offset, len(step.kernel), index),
            mask=_item("follow", "mask", step.mask, len(step.kernel), index),
        )
        for step in steps
    ]
    fields = [s.mask if s.offset is None else s.offset for s in steps]
    rank = len(steps[0].kernel) if steps else len(at)
    if len(at) != rank:
        raise ValueError(f"follow: at is {at}, expected {rank} indices")
    if fields and fields[-1] is not None:
        _check_at("follow", at, tuple(fields[-1].shape[1:]))
    double = any(t is not None and t.dtype == torch.float64 for t in fields)
    dtype = torch.float64 if double else torch.float32
    positions = torch.tensor([at], dtype=dtype)
    weights = torch.ones(1, dtype=dtype)
    for step in reversed(steps):
        positions, weights = _back(step, positions, weights, group, deformed)
    return Samples(positions, weights)


def _check_at(name: str, at: tuple[int, ...], size: tuple[int, ...]) -> None:
    if len(at) != len(size) or not all(0 <= a < s for a, s in zip(at, size, strict=True)):
        raise ValueError(f"{name}: at is {at}, expected {len(size)} indices within {size}")


def _item(name: str, what: str, t: Tensor | None, n: int, index: int | None) -> Any:
    """One image's part of an offset or mask of n axes, which may have a batch."""
    if t is None or t.dim() == n + 1:
        return t
    if t.dim() != n + 2:
        raise ValueError(
            f"{name}: {what} has shape {list(t.shape)}, expected [channels, *out] of {n} axes, "
            "perhaps with a batch before"
        )
    if index is None and len(t) != 1:
        raise ValueError(f"{name}: {what} is of {len(t)} images, expected an index of one of them")
    if not 0 <= (index or 0) < len(t):
        raise ValueError(f"{name}: index is {index}, expected one of the {len(t)} images")
    return t[index or 0]


def _back(
    step: Step, positions: Tensor, weights: Tensor, group: int | None, deformed: bool
) -> tuple[Tensor, Tensor]:
    """From positions [N, n] in a layer's output to those in its input."""
    dtype = positions.dtype
    stride, padding, dilation, kernel = (
        torch.tensor(v, dtype=dtype)
        for v in (step.stride, step.padding, step.dilation, step.kernel)
    )
    field = step.mask if step.offset is None else step.offset
    if field is None:
        return positions * stride - padding + dilation * (kernel - 1) / 2, weights
    n, points = len(step.kernel), math.prod(step.kernel)
    index = positions.round().long()
    size = torch.tensor(field.shape[1:])
    inside = ((index >= 0) & (index < size)).all(1)
    index, weights = index[inside], weights[inside]
    where: Any = (slice(None), *index.unbind(1))
    taps = torch.tensor(list(itertools.product(*map(range, step.kernel))), dtype=dtype)
    regular = (index * stride - padding)[:, None] + taps * dilation  # [N, K, n]
    groups, at = 1, torch.zeros(len(index), 1, points, n, dtype=dtype)
    if step.offset is not None:
        groups = step.offset.shape[0] // (points * n)
        at = step.offset.detach().cpu()[where].T.to(dtype).reshape(-1, groups, points, n)
    if group is not None and not 0 <= group < groups:
        raise ValueError(f"follow: group is {group}, expected one of the {groups} offset groups")
    masks = torch.ones(len(index), groups, points, dtype=dtype)
    if step.mask is not None and deformed:
        mask_groups = step.mask.shape[0] // points
        mask = step.mask.detach().cpu()[where].T.to(dtype).reshape(-1, mask_groups, points)
        # Groups of masks and of offsets divide the same channels. A sample of an offset group gets
        # the mean of the mask groups that share channels with it.
        masks = torch.stack(
            [mask[:, _meeting(g, groups, mask_groups)].mean(1) for g in range(groups)], 1
        )
    found = regular[:, None] + (at if deformed else torch.zeros_like(at))  # [N, OG, K, n]
    masks = masks * weights[:, None, None]
    chosen = slice(None) if group is None else slice(group, group + 1)
    return found[:, chosen].reshape(-1, n), masks[:, chosen].reshape(-1)


def _meeting(group: int, groups: int, others: int) -> slice:
    """Which of `others` groups share channels with one of `groups` groups of the same channels."""
    return slice(group * others // groups, -(-(group + 1) * others // groups))


def draw_samples(
    image: Tensor,
    samples: Samples,
    regular: Samples | None = None,
    *,
    axes: Any = None,
    colour: str = "tab:red",
    slices: Sequence[int] | None = None,
    size: float = 22.0,
) -> Any:
    """Draw sampling points on the input image.

    Dots are the samples, larger where the mask is larger; crosses the regular places.

    Args:
        image: [C, *size] with 1 or 3 channels (of more, the mean is shown) or [*size]; a 1-D signal
            is drawn as a line.
        samples, regular: of `follow`.
        axes: matplotlib axes to draw on, in 3-D a list with one for each slice. None: a new figure.
            An axes that shows an image already is drawn on, without drawing the image again.
        colour: of this output location.
        slices: in 3-D, the planes (first axis) to show, each with the samples next to it; None for
            the planes that hold any.
        size: the area of a dot with mask 1, in square points.

    Returns:
        The axes; in 3-D a list of them.
    """
    n = samples.positions.shape[1]
    shown = _shown(image, n)
    if n < 3:
        axis = _subplots(_figure(1), 1)[0] if axes is None else axes
        _draw_on(axis, shown, samples, regular, colour, size)
        return axis
    if slices is None:
        planes = samples.positions[:, 0].round().long().unique().tolist()
        slices = [p for p in planes if 0 <= p < shown.shape[0]]
    axes = _subplots(_figure(len(slices)), len(slices)) if axes is None else axes
    for plane, axis in zip(slices, axes, strict=True):
        flat = [
            None if s is None else Samples(s.positions[near, 1:], s.weights[near])
            for s in (samples, regular)
            for near in [slice(0) if s is None else (s.positions[:, 0] - plane).abs() <= 0.5]
        ]
        assert flat[0] is not None
        _draw_on(axis, shown[plane], flat[0], flat[1], colour, size)
        axis.set_title(f"plane {plane}", fontsize=9)
    return list(axes)


def _draw_on(
    axis: Any, image: Tensor, samples: Samples, regular: Samples | None, colour: str, size: float
) -> None:
    if samples.positions.shape[1] == 1:
        if not axis.lines:
            axis.plot(image.numpy(), color="0.6", zorder=0)

        def place(s: Samples) -> tuple[Any, Any]:
            x = s.positions[:, 0].double().numpy()
            low = min(0.0, float(image.min()))
            # A sample outside of the signal is 0; it is drawn at the height of the lowest value.
            return x, np.interp(x, range(len(image)), image.numpy(), left=low, right=low)
    else:
        if not axis.images:
            axis.imshow(image.numpy(), cmap="gray", interpolation="nearest")
            axis.set_axis_off()

        def place(s: Samples) -> tuple[Any, Any]:
            return s.positions[:, 1].numpy(), s.positions[:, 0].numpy()

    if regular is not None:
        # Crosses are in front and have a rim, so that they are seen on any image, and on the dot of
        # a sample that has not moved.
        rim = _matplotlib("patheffects").withStroke(linewidth=2.6, foreground="white")
        axis.scatter(
            *place(regular),
            s=0.6 * size,
            linewidth=1.2,
            color=colour,
            marker="x",
            path_effects=[rim],
            zorder=3,
        )
    axis.scatter(
        *place(samples),
        s=size * samples.weights.clamp_min(0).numpy(),
        color=colour,
        edgecolor="white",
        linewidth=0.4,
    )


def draw_offset(
    offset: Tensor,
    kernel_size: Size,
    *,
    point: int | None = None,
    plane: int | None = None,
    largest: float | None = None,
    index: int | None = None,
) -> Any:
    """Draw an offset field as optical-flow colours, one tile for each offset group.

    The hue is the direction (red right, green-yellow down, cyan left, violet up), the saturation
    the length; white is no displacement. In 1-D each row of a tile is a kernel point, red to the
    right and blue to the left.

    Args:
        offset: [OG * K * n, *out], the displacements of one image, in pixels; or those of a batch.
        kernel_size: an int or n.
        point: the kernel point to show, None for the mean of all.
        plane: in 3-D the plane (first axis) of which the (dy, dx) are shown, None for the middle.
        largest: the length of the fullest colour, None for the largest there is.
        index: the image of a batch, [B, OG * K * n, *out]; a batch of one needs none.

    Returns:
        matplotlib's figure.

    Raises:
        ValueError: the channels are no multiple of n * K, or a batch has no such image.

    Example:
        >>> import torch
        >>> from deformnd import viz
        >>> figure = viz.draw_offset(torch.randn(2 * 18, 16, 16), 3)
        >>> len(figure.axes)
        2
    """
    fields = _grouped("draw_offset", "offset", offset, kernel_size, index)  # [OG, K, n, *out]
    figure = _figure(len(fields))
    _draw_offset_on(figure, dict(enumerate(fields)), point, plane, largest)
    return figure


def _draw_offset_on(
    parent: Any,
    fields: dict[int, Tensor],
    point: int | None,
    plane: int | None,
    largest: float | None = None,
) -> list[Any]:
    """Draw a tile for each group of offsets [OG, K, n, *out] in a figure or a part of one."""
    n = next(iter(fields.values())).shape[1]
    field = torch.stack(list(fields.values()))
    tiles = _subplots(parent, len(fields))
    if n == 1:
        rows = field[:, :, 0] if point is None else field[:, point : point + 1, 0]
        bound = largest or float(rows.abs().max()) or 1.0
        for axis, row in zip(tiles, rows, strict=True):
            axis.imshow(row.numpy(), cmap="coolwarm", vmin=-bound, vmax=bound, aspect="auto")
            axis.set_ylabel("kernel point", fontsize=8)
    else:
        field = field.mean(1) if point is None else field[:, point]  # [OG, n, *out]
        if n == 3:
            field = field[:, 1:, field.shape[2] // 2 if plane is None else plane]
        bound = largest or float(field.norm(dim=1).max()) or 1.0
        for axis, flow in zip(tiles, field, strict=True):
            axis.imshow(flow_colours(flow, bound).numpy(), interpolation="nearest")
            axis.set_axis_off()
    for i, (g, axis) in enumerate(zip(fields, tiles, strict=True)):
        axis.set_title(f"group {g}, up to {bound:.2g} px" if i == 0 else f"group {g}", fontsize=9)
    return tiles


def flow_colours(flow: Tensor, largest: float) -> Tensor:
    """Colours [H, W, 3] in [0, 1] of displacements [2, H, W], the (dy, dx) of each pixel.

    Args:
        flow: displacements; not a number becomes no displacement.
        largest: the length that gets the full colour; longer ones do, too.

    Example:
        >>> import torch
        >>> from deformnd import viz
        >>> right = torch.tensor([[[0.0]], [[1.0]]])
        >>> viz.flow_colours(right, 1.0).flatten().tolist()
        [1.0, 0.0, 0.0]
    """
    dy, dx = flow.detach().cpu().double().nan_to_num()
    hue = torch.atan2(dy, dx) / (2 * math.pi) % 1.0
    length = (torch.hypot(dy, dx) / largest).clamp(0, 1)
    colours = _matplotlib("colors").hsv_to_rgb(
        torch.stack([hue, length, torch.ones_like(hue)], -1).numpy()
    )
    return torch.from_numpy(colours).float()


def draw_mask(
    mask: Tensor,
    kernel_size: Size,
    *,
    point: int | None = None,
    plane: int | None = None,
    index: int | None = None,
) -> Any:
    """Draw masks as heat maps, one tile for each mask group.

    Args:
        mask: [MG * K, *out], of one image; or of a batch.
        kernel_size: an int or n.
        point: the kernel point to show, None for the mean of all (1-D: a row for each).
        plane: in 3-D the plane (first axis) to show, None for the middle.
        index: the image of a batch, [B, MG * K, *out]; a batch of one needs none.

    Returns:
        matplotlib's figure; all tiles share the colours, whose range is 0 to the largest value.

    Raises:
        ValueError: the channels are no multiple of K, or a batch has no such image.
    """
    fields = _grouped("draw_mask", "mask", mask, kernel_size, index)  # [MG, K, 1, *out]
    figure = _figure(len(fields))
    _draw_mask_on(figure, dict(enumerate(fields)), point, plane)
    return figure


def _draw_mask_on(
    parent: Any, fields: dict[int, Tensor], point: int | None, plane: int | None
) -> list[Any]:
    """Draw a tile for each group of masks [MG, K, 1, *out] in a figure or a part of one."""
    field = torch.stack(list(fields.values()))[:, :, 0]
    n = field.dim() - 2
    if n == 1:
        field = field if point is None else field[:, point : point + 1]
    else:
        field = field.mean(1) if point is None else field[:, point]
    if n == 3:
        field = field[:, field.shape[1] // 2 if plane is None else plane]
    tiles = _subplots(parent, len(fields))
    top = float(field.max()) or 1.0
    for g, axis, tile in zip(fields, tiles, field, strict=True):
        image = axis.imshow(tile.numpy(), cmap="magma", vmin=0, vmax=top, aspect="auto")
        axis.set_title(f"group {g}", fontsize=9)
        if n > 1:
            axis.set_aspect("equal")
            axis.set_axis_off()
    parent.colorbar(image, ax=tiles, shrink=0.8)
    return tiles


@torch.no_grad()
def show(
    model: nn.Module,
    name: str,
    image: Tensor,
    at: Sequence[int] | Sequence[Sequence[int]] | None = None,
    *,
    index: int = 0,
    group: int | None = None,
    call: int = 0,
    inputs: Sequence[Any] | None = None,
) -> Any:
    """Draw where one layer of a model samples, its offsets and its mask, on an image.

    The model is run on the image, and what the layer then uses is drawn: the points on the image,
    in a colour for each location, dots the samples (the largest has the largest mask) and crosses
    the regular places; the offset field as `draw_offset` and the mask as `draw_mask`, with the
    locations marked. The layer may stand anywhere in the model. Its input is laid over the whole
    image: a pixel of it stands for an equal share of the image's. Of a transposed layer, the dots
    are where an input location writes in the output, which is laid over the image.

    Args:
        model: any module. It is run in eval mode, and has its mode back afterwards.
        name: of a module in it, as in model.named_modules(): a layer of this package (packed or
            not, lazy, transposed, an aggregation), or any module that calls one, or calls the
            functions. "" is the model itself.
        image: [C, *size], or a batch [B, C, *size]; with as many axes *size as the layer deforms.
        at: a location in the offset field, n indices, or several. None: those a quarter from the
            borders, in 3-D in the middle plane.
        index: the image of the batch.
        group: the group of offsets to draw, None for all.
        call: which of the module's calls of a deformable function to draw, from 0: a head is
            called on each level, a block may hold several layers.
        inputs: what to call the model with, if that is not the batch of this one image.

    Returns:
        matplotlib's figure, to be shown or saved.

    Raises:
        ValueError: there is no such module, location, group or call; the module deforms nothing; or
            the image has other axes than the layer.
        TypeError: model, name or image is of another type.
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> from deformnd import PackedDeformConv2d, viz
        >>> layers = torch.nn.Conv2d(3, 8, 3, 2), PackedDeformConv2d(8, 8, 3, modulated=True)
        >>> figure = viz.show(torch.nn.Sequential(*layers), "1", torch.rand(3, 33, 33))
        >>> [len(panel.axes) for panel in figure.subfigs]  # the points, the offset, mask and bar
        [1, 1, 2]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"show: model is a {type(model).__name__}, expected a Module")
    if not isinstance(name, str):
        raise TypeError(f"show: name is {name!r}, expected the name of a module")
    check_tensor("show", "image", image)
    pyplot = _matplotlib("pyplot")
    modules = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        close = ", ".join(map(repr, difflib.get_close_matches(name, modules, 5)))
        hint = f"; names like it: {close}" if close else _deformable_layers(modules)
        raise ValueError(f"show: the model has no module {name!r}{hint}")
    images = image[None] if image.dim() - 1 == _axes_of(model, modules[name]) else image
    if not 0 <= index < len(images):
        raise ValueError(f"show: index is {index}, expected one of the {len(images)} images")
    found = _call_of(model, name, images, index, call, inputs)
    step, image = found.step, images[index]
    n = len(step.kernel)
    if image.dim() != n + 1:
        raise ValueError(
            f"show: image has {image.dim() - 1} axes, expected the {n} that {name!r} deforms"
        )
    field = step.mask if step.offset is None else step.offset
    if field is None:
        raise ValueError(f"show: {name!r} has neither offset nor mask, so it samples regularly")
    out = tuple(field.shape[1:])
    places = _places(at, out)
    groups = 1 if step.offset is None else len(step.offset) // (n * math.prod(step.kernel))
    if group is not None and not 0 <= group < groups:
        raise ValueError(f"show: group is {group}, expected one of the {groups} offset groups")

    drawn: list[tuple[str, Any]] = []
    for what, t in (("offset", step.offset), ("mask", step.mask)):
        if t is not None:
            fields = _grouped("show", what, t, step.kernel, None)
            chosen = range(len(fields))
            if group is not None:
                chosen = chosen[_meeting(group, groups, len(fields))]
            drawn.append((what, {g: fields[g] for g in chosen}))
    shape = (1 + len(drawn), 1) if n == 1 else (1, 1 + len(drawn))
    figure = pyplot.figure(
        figsize=(7, 2.4 * shape[0]) if n == 1 else (4.2 * shape[1], 4.6), layout="constrained"
    )
    parts = list(np.atleast_1d(figure.subfigures(*shape)))
    kernel, size = ("x".join(map(str, values)) for values in (step.kernel, out))
    figure.suptitle(f"{name or 'the model'}: {found.by}, kernel {kernel}, offsets {size}")

    colours = list(itertools.islice(itertools.cycle(_COLOURS), len(places)))
    points = [_points_on_image(found, image, place, group) for place in places]
    _draw_points_on(parts[0], image, points, colours)
    for part, (what, tiles) in zip(parts[1:], drawn, strict=True):
        plane = places[0][0] if n == 3 else None
        part.suptitle(f"{what}, mean of the points" if n > 1 else what, fontsize=10)
        draw = _draw_offset_on if what == "offset" else _draw_mask_on
        for axis in draw(part, tiles, None, plane):
            for place, colour in zip(places, colours, strict=True):
                if n == 1:
                    axis.axvline(place[0], color=colour, linewidth=1)
                elif n == 2 or place[0] == plane:
                    axis.plot(*place[:-3:-1], "o", color=colour, markeredgecolor="white")
    return figure


def _points_on_image(
    found: _Call, image: Tensor, place: tuple[int, ...], group: int | None
) -> list[Samples]:
    """The samples and the regular places of a location, in the pixels of an image."""
    n = len(found.size)
    scale = torch.tensor(image.shape[-n:]) / torch.tensor(found.size)
    # Pixel centres are at integers, so an image's edge is half a pixel outside of them.
    return [
        Samples((s.positions + 0.5) * scale - 0.5, s.weights)
        for s in (
            follow([found.step], place, group=group),
            follow([found.step], place, group=group, deformed=False),
        )
    ]


def _call_of(
    model: nn.Module, name: str, images: Tensor, index: int, call: int, inputs: Sequence[Any] | None
) -> _Call:
    """One of the named module's calls of an operator, for one image of a batch."""
    modules = dict(model.named_modules(remove_duplicate=False))
    training = [(module, module.training) for module in modules.values()]
    model.eval()
    try:
        with _watch(modules[name]) as calls:
            model(*([images[index : index + 1]] if inputs is None else inputs))
    finally:
        for module, mode in training:
            module.training = mode
    if not calls:
        raise ValueError(
            f"show: {name!r}, a {type(modules[name]).__name__}, made no call of deform_conv, "
            f"deform_conv_transpose or deform_aggregate{_deformable_layers(modules)}"
        )
    if not 0 <= call < len(calls):
        raise ValueError(f"show: call is {call}, expected one of the {len(calls)} of {name!r}")
    found = calls[call]
    fields = [found.step.offset, found.step.mask]
    for t in fields:
        if t is not None and len(t) not in (1, len(images)):
            raise ValueError(
                f"show: {name!r} is given a batch of {len(t)}, expected 1, or {len(images)} as the "
                "images: give as many images as it has, and what the model is called with as inputs"
            )
    offset, mask = (None if t is None else t[index if len(t) > 1 else 0] for t in fields)
    return found._replace(step=found.step._replace(offset=offset, mask=mask))


def _deformable_layers(modules: dict[str, nn.Module]) -> str:
    names = [repr(name) for name, module in modules.items() if isinstance(module, _DEFORMABLE)]
    more = ", ..." if len(names) > 8 else ""
    return f"; deformable layers of the model: {', '.join(names[:8])}{more}" if names else ""


def _axes_of(model: nn.Module, module: nn.Module) -> int | None:
    """How many axes a module's images have, by the layers in it, or else by those of the model."""
    for layer in module.modules():
        if isinstance(layer, _DEFORMABLE):
            return int(getattr(layer, "rank", 2))
    for layer in model.modules():
        if isinstance(layer, ConvNd):
            return len(layer.kernel_size)
    return None


def _places(at: Any, out: tuple[int, ...]) -> list[tuple[int, ...]]:
    if at is None:
        quarters = [sorted({s // 4, s - 1 - s // 4}) for s in out[-2:]]
        return list(itertools.product(*[[s // 2] for s in out[:-2]], *quarters))
    places = [at] if isinstance(at, Sequence) and at and isinstance(at[0], Integral) else at
    if not (isinstance(places, Sequence) and places and all(map(_is_location, places))):
        raise ValueError(f"show: at is {at!r}, expected a location of {len(out)} indices, or some")
    for place in places:
        _check_at("show", tuple(place), out)
    return [tuple(place) for place in places]


def _is_location(place: Any) -> bool:
    return isinstance(place, Sequence) and all(isinstance(index, Integral) for index in place)


def _draw_points_on(
    part: Any, image: Tensor, points: list[list[Samples]], colours: Sequence[str]
) -> None:
    """Draw samples and regular places of some locations, in 3-D on the planes that hold most."""
    samples = [s for s, _ in points]
    n, count = samples[0].positions.shape[1], len(samples[0].weights)
    slices = None
    if n == 3:
        near = torch.cat([s.positions[:, 0] for pair in points for s in pair]).round().int()
        held = Counter(p for p in near.tolist() if 0 <= p < image.shape[-3])
        slices = sorted(p for p, _ in held.most_common(9)) or [0]
    axes = _subplots(part, len(slices or [0]))
    # Dots are in units of the largest mask, since after a softmax none is near 1.
    largest = max(0.0, *(float(s.weights.max()) for s in samples)) or 1.0
    size = min(22.0 if n < 3 else 12.0, max(12.0, 600 / count))
    for (moved, regular), colour in zip(points, colours, strict=True):
        draw_samples(
            image,
            moved._replace(weights=moved.weights / largest),
            regular,
            axes=axes if n == 3 else axes[0],
            colour=colour,
            slices=slices,
            size=size,
        )
    if n > 1:  # Samples far outside are 0, and to show them would make the image small.
        for axis in axes:
            for limits, set_limits, length in (
                (axis.get_xlim(), axis.set_xlim, image.shape[-1]),
                (axis.get_ylim(), axis.set_ylim, image.shape[-2]),
            ):
                low, high = -0.5 - 0.12 * length, -0.5 + 1.12 * length
                set_limits(min(max(v, low), high) for v in limits)
    part.suptitle("\u00d7 regular, \u25cf sampled, larger: larger mask", fontsize=10)


def animate(
    path: str | os.PathLike[str],
    layers: nn.Module | Iterable[nn.Module],
    frames: Tensor,
    at: Sequence[Sequence[int]],
    *,
    fps: int = 8,
) -> None:
    """Write an animated GIF of the sampling points as the input changes.

    Args:
        path: the file to write.
        layers: as for `steps`, 1-D or 2-D.
        frames: [T, C, *size], the inputs one after the other.
        at: output locations, each in a colour of its own.
        fps: frames a second.

    Raises:
        ValueError: as `steps` and `follow`; or the frames are 3-D.
    """
    plt, animation = _matplotlib("pyplot"), _matplotlib("animation")
    if frames.dim() > 4:
        raise ValueError(f"animate: frames have {frames.dim() - 2} axes, expected 1 or 2")
    if len(frames) == 0:
        raise ValueError("animate: frames has no image")
    if not (at and all(map(_is_location, at))):
        raise ValueError(f"animate: at is {at!r}, expected a list of locations")
    if isinstance(layers, nn.Module):
        layers = [layers]
    layers = list(layers)
    figure = _figure(1)
    (axis,) = _subplots(figure, 1)
    limits = [-0.08 * frames.shape[-1], 1.08 * frames.shape[-1]]

    def draw(t: int) -> list[Any]:
        axis.clear()
        found = steps(layers, frames, t)
        for place, colour in zip(at, itertools.cycle(_COLOURS)):
            regular = follow(found, place, deformed=False)
            draw_samples(frames[t], follow(found, place), regular, axes=axis, colour=colour)
        axis.set_xlim(limits)
        if frames.dim() == 4:
            axis.set_ylim(1.08 * frames.shape[-2], -0.08 * frames.shape[-2])
        return []

    try:
        animation.FuncAnimation(figure, draw, frames=len(frames)).save(
            os.fspath(path), writer=animation.PillowWriter(fps)
        )
    finally:
        plt.close(figure)


_COLOURS = ("tab:red", "tab:blue", "tab:green", "tab:orange", "tab:purple", "tab:cyan")


def _shown(image: Tensor, n: int) -> Tensor:
    """An image as matplotlib takes it: [*size], or [*size, 3] for colours, on the CPU."""
    image = image.detach().cpu().float()
    if image.dim() == n:
        return image
    if image.dim() != n + 1:
        raise ValueError(
            f"draw_samples: image has {image.dim()} dimensions, expected {n} or {n + 1}"
        )
    if image.shape[0] == 3 and n > 1:
        low, high = image.min(), image.max()
        if low < 0 or high > 1:  # imshow would clip colours outside of [0, 1].
            image = (image - low) / (high - low)
        return image.movedim(0, -1)
    return image.mean(0)


def _grouped(name: str, what: str, t: Tensor, kernel_size: Size, index: int | None) -> Tensor:
    """An offset [OG, K, n, *out] or mask [MG, K, 1, *out] of one image, on the CPU, in float32."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: {what} is {t!r}, expected a Tensor")
    points = math.prod(kernel_size) if isinstance(kernel_size, (tuple, list)) else None
    if points is not None:
        n = len(kernel_size)  # type: ignore[arg-type]
    else:
        # A first dimension of 1 is too few channels for several kernel points, so it is a batch of
        # one.
        alone = len(t) == 1 and t.dim() > 2 and kernel_size != 1
        n = t.dim() - (1 if index is None and not alone else 2)
        points = math.prod(_values(kernel_size, n))
    t = _item(name, what, t, n, index)
    per_point = n if what == "offset" else 1
    if n not in (1, 2, 3) or t.shape[0] % (points * per_point):
        raise ValueError(
            f"{name}: {what} has shape {list(t.shape)}, expected [channels, *out] of 1 to 3 axes "
            f"with a multiple of {points * per_point} channels; of a batch, index says which image"
        )
    return t.detach().cpu().float().reshape(-1, points, per_point, *t.shape[1:])


def _matplotlib(name: str) -> Any:
    try:
        return importlib.import_module(f"matplotlib.{name}")
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ImportError(
            "deformnd.viz draws with matplotlib, and matplotlib is not installed: "
            "pip install 'deformnd[viz]', or pip install matplotlib"
        ) from None


def _columns(count: int) -> int:
    return math.ceil(math.sqrt(max(1, count)))


def _figure(count: int) -> Any:
    """A figure for so many tiles."""
    columns = _columns(count)
    rows = max(1, -(-count // columns))
    return _matplotlib("pyplot").figure(figsize=(2.8 * columns, 2.9 * rows), layout="constrained")


def _subplots(parent: Any, count: int) -> list[Any]:
    """Axes side by side in a figure, or in a part of one."""
    columns = _columns(count)
    axes = parent.subplots(max(1, -(-count // columns)), columns, squeeze=False)
    tiles = list(axes.flat)
    for axis in tiles[count:]:
        axis.remove()
    return tiles[:count]
