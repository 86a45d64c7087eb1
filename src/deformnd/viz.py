"""Pictures: where deformable layers sample, their offset fields and masks.

`pip install 'deformnd[viz]'` brings matplotlib. Everything here reads one image of a batch, works
in 1-D, 2-D and, in slices, 3-D, and returns matplotlib's axes or figure, to be shown or saved.

Positions are pixels, axes slowest first: (x,), (y, x) or (z, y, x), as the offsets' channels are.
Pixel centres have integer positions.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .ops import modules as _modules
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
    "steps",
]


class Step(NamedTuple):
    """One layer, as far as positions go: the offset and mask that it used on one image.

    offset is [OG * K * n, *out] and mask [MG * K, *out], either may be None. A layer with neither
    moves positions regularly (an ordinary convolution, a pooling).
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
            own that call one `DeformConvNd` on the input they are given. Others must be ordinary
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
        deformable = [m for m in layer.modules() if isinstance(m, _DEFORMABLE)]
        if len(deformable) == 1:
            x, offset, mask = _observe(layer, deformable[0], x)
            found.append(_step(deformable[0], offset, mask))
        else:
            x = layer(x)
            if isinstance(layer, _REGULAR):
                found.append(_step(layer, None, None))
            elif x.shape[2:] != before.shape[2:] or deformable:
                raise ValueError(
                    f"steps: positions cannot be followed through {type(layer).__name__}, expected "
                    "a packed layer, a module around one DeformConv, an ordinary convolution or "
                    "pooling, or a module that keeps the size"
                )
    return found


_DEFORMABLE = (_modules._DeformConvNd, _modules._PackedDeformAggregateNd)
_REGULAR = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
)


def _flatten(layers: Iterable[nn.Module]) -> Iterable[nn.Module]:
    for layer in layers:
        if isinstance(layer, nn.Sequential):
            yield from _flatten(layer)
        else:
            yield layer


def _observe(
    layer: nn.Module, deformable: Any, x: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """layer(x), and the offset and mask that the deformable layer in it used."""
    seen: list[tuple[Tensor, Tensor | None, Tensor | None]] = []

    def note(input: Tensor, offset: Tensor | None = None, mask: Tensor | None = None) -> None:
        if isinstance(deformable, _modules._Predicting):
            offset, mask = deformable._offset(input), deformable._mask(input)
        seen.append((input, offset, mask))

    hook = deformable.register_forward_pre_hook(
        lambda _, args, kwargs: note(*args, **kwargs), with_kwargs=True
    )
    try:
        y = layer(x)
    finally:
        hook.remove()
    if len(seen) != 1 or seen[0][0].shape[2:] != x.shape[2:]:
        raise ValueError(
            f"steps: {type(layer).__name__} does not call its {type(deformable).__name__} on an "
            "input of its own size"
        )
    _, offset, mask = seen[0]
    return y, None if offset is None else offset[0], None if mask is None else mask[0]


def _step(layer: Any, offset: Tensor | None, mask: Tensor | None) -> Step:
    # The rank stands in the name of torch's poolings and nowhere else.
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

    Returns:
        Samples: positions [N, n] and weights [N], on the CPU, in float32 or the offsets' float64;
        the kernel points innermost, in row-major order.

    Raises:
        ValueError: the location or group does not exist.

    Example: where a 3x3 layer with one pixel of padding samples for the output in the corner.
        >>> import torch
        >>> from deformnd import viz
        >>> step = viz.Step((3, 3), (1, 1), (1, 1), (1, 1), torch.zeros(18, 8, 8))
        >>> viz.follow([step], (0, 0)).positions[:4].tolist()
        [[-1.0, -1.0], [-1.0, 0.0], [-1.0, 1.0], [0.0, -1.0]]
    """
    at = tuple(at)
    fields = [s.mask if s.offset is None else s.offset for s in steps]
    rank = len(steps[0].kernel) if steps else len(at)
    if len(at) != rank:
        raise ValueError(f"follow: at is {at}, expected {rank} indices")
    if fields and fields[-1] is not None:
        size = tuple(fields[-1].shape[1:])
        if not all(0 <= a < s for a, s in zip(at, size, strict=True)):
            raise ValueError(f"follow: at is {at}, expected {rank} indices within {size}")
    double = any(t is not None and t.dtype == torch.float64 for t in fields)
    dtype = torch.float64 if double else torch.float32
    positions = torch.tensor([at], dtype=dtype)
    weights = torch.ones(1, dtype=dtype)
    for step in reversed(steps):
        positions, weights = _back(step, positions, weights, group, deformed)
    return Samples(positions, weights)


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
        # Groups of masks and of offsets are blocks of the same channels: the mean of those meeting.
        masks = torch.stack(
            [
                mask[:, g * mask_groups // groups : -(-(g + 1) * mask_groups // groups)].mean(1)
                for g in range(groups)
            ],
            1,
        )
    found = regular[:, None] + (at if deformed else torch.zeros_like(at))  # [N, OG, K, n]
    masks = masks * weights[:, None, None]
    chosen = slice(None) if group is None else slice(group, group + 1)
    return found[:, chosen].reshape(-1, n), masks[:, chosen].reshape(-1)


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
        axis = _subplots(1)[1][0] if axes is None else axes
        _draw_on(axis, shown, samples, regular, colour, size)
        return axis
    if slices is None:
        planes = samples.positions[:, 0].round().long().unique().tolist()
        slices = [p for p in planes if 0 <= p < shown.shape[0]]
    axes = _subplots(len(slices))[1] if axes is None else axes
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
            # A sample outside of the signal is 0, and drawn below it.
            return x, np.interp(x, range(len(image)), image.numpy(), left=low, right=low)
    else:
        if not axis.images:
            axis.imshow(image.numpy(), cmap="gray", interpolation="nearest")
            axis.set_axis_off()

        def place(s: Samples) -> tuple[Any, Any]:
            return s.positions[:, 1].numpy(), s.positions[:, 0].numpy()

    if regular is not None:
        axis.scatter(
            *place(regular), s=0.7 * size, linewidth=0.8, color=colour, alpha=0.7, marker="+"
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
) -> Any:
    """Draw an offset field as optical-flow colours, one tile for each offset group.

    The hue is the direction (red right, green-yellow down, cyan left, violet up), the saturation
    the length; white is no displacement. In 1-D each row of a tile is a kernel point, red to the
    right and blue to the left.

    Args:
        offset: [OG * K * n, *out], the displacements of one image, in pixels.
        kernel_size: an int or n.
        point: the kernel point to show, None for the mean of all.
        plane: in 3-D the plane (first axis) of which the (dy, dx) are shown, None for the middle.
        largest: the length of the fullest colour, None for the largest there is.

    Returns:
        matplotlib's figure.

    Raises:
        ValueError: the channels are no multiple of n * K.

    Example:
        >>> import torch
        >>> from deformnd import viz
        >>> figure = viz.draw_offset(torch.randn(2 * 18, 16, 16), 3)
        >>> len(figure.axes)
        2
    """
    n = offset.dim() - 1
    fields = _grouped("draw_offset", "offset", offset, kernel_size, n)  # [OG, K, n, *out]
    if n == 1:
        rows = fields[:, :, 0] if point is None else fields[:, point : point + 1, 0]
        bound = largest or float(rows.abs().max()) or 1.0
        figure, tiles = _subplots(len(rows))
        for axis, field in zip(tiles, rows, strict=True):
            axis.imshow(field.numpy(), cmap="coolwarm", vmin=-bound, vmax=bound, aspect="auto")
            axis.set_ylabel("kernel point", fontsize=8)
    else:
        field = fields.mean(1) if point is None else fields[:, point]  # [OG, n, *out]
        if n == 3:
            field = field[:, 1:, field.shape[2] // 2 if plane is None else plane]
        bound = largest or float(field.norm(dim=1).max()) or 1.0
        figure, tiles = _subplots(len(field))
        for axis, flow in zip(tiles, field, strict=True):
            axis.imshow(flow_colours(flow, bound).numpy(), interpolation="nearest")
            axis.set_axis_off()
    for g, axis in enumerate(tiles):
        axis.set_title(f"group {g}, up to {bound:.2g} px" if g == 0 else f"group {g}", fontsize=9)
    return figure


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
    from matplotlib.colors import hsv_to_rgb

    dy, dx = flow.detach().cpu().double().nan_to_num()
    hue = torch.atan2(dy, dx) / (2 * math.pi) % 1.0
    length = (torch.hypot(dy, dx) / largest).clamp(0, 1)
    colours = hsv_to_rgb(torch.stack([hue, length, torch.ones_like(hue)], -1).numpy())
    return torch.from_numpy(colours).float()


def draw_mask(
    mask: Tensor, kernel_size: Size, *, point: int | None = None, plane: int | None = None
) -> Any:
    """Draw masks as heat maps, one tile for each mask group.

    Args:
        mask: [MG * K, *out], of one image.
        kernel_size: an int or n.
        point: the kernel point to show, None for the mean of all (1-D: a row for each).
        plane: in 3-D the plane (first axis) to show, None for the middle.

    Returns:
        matplotlib's figure; all tiles share the colours, whose range is 0 to the largest value.

    Raises:
        ValueError: the channels are no multiple of K.
    """
    n = mask.dim() - 1
    fields = _grouped("draw_mask", "mask", mask, kernel_size, 1, n)[:, :, 0]  # [MG, K, *out]
    if n == 1:
        field = fields if point is None else fields[:, point : point + 1]
    else:
        field = fields.mean(1) if point is None else fields[:, point]
    if n == 3:
        field = field[:, field.shape[1] // 2 if plane is None else plane]
    figure, tiles = _subplots(len(field))
    top = float(field.max()) or 1.0
    for g, (axis, tile) in enumerate(zip(tiles, field, strict=True)):
        image = axis.imshow(tile.numpy(), cmap="magma", vmin=0, vmax=top, aspect="auto")
        axis.set_title(f"group {g}", fontsize=9)
        if n > 1:
            axis.set_aspect("equal")
            axis.set_axis_off()
    figure.colorbar(image, ax=list(tiles), shrink=0.8)
    return figure


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
    import matplotlib.pyplot as plt
    from matplotlib.animation import FuncAnimation, PillowWriter

    if frames.dim() > 4:
        raise ValueError(f"animate: frames have {frames.dim() - 2} axes, expected 1 or 2")
    if isinstance(layers, nn.Module):
        layers = [layers]
    layers = list(layers)
    figure, (axis,) = _subplots(1)
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
        FuncAnimation(figure, draw, frames=len(frames)).save(
            os.fspath(path), writer=PillowWriter(fps)
        )
    finally:
        plt.close(figure)


_COLOURS = ("tab:red", "tab:blue", "tab:green", "tab:orange", "tab:purple", "tab:cyan")


def _shown(image: Tensor, n: int) -> Tensor:
    """[*size], or [*size, 3] for colours, on the CPU."""
    image = image.detach().cpu().float()
    if image.dim() == n:
        return image
    if image.dim() != n + 1:
        raise ValueError(
            f"draw_samples: image has {image.dim()} dimensions, expected {n} or {n + 1}"
        )
    if image.shape[0] == 3 and n > 1:
        low, high = image.min(), image.max()
        if low < 0 or high > 1:  # imshow would clip
            image = (image - low) / (high - low)
        return image.movedim(0, -1)
    return image.mean(0)


def _grouped(
    name: str, what: str, t: Tensor, kernel_size: Size, per_point: int, n: int | None = None
) -> Tensor:
    """[G, K, per_point, *out] on the CPU, in float32."""
    n = per_point if n is None else n
    points = math.prod(_values(kernel_size, n))
    if n not in (1, 2, 3) or t.shape[0] % (points * per_point):
        raise ValueError(
            f"{name}: {what} has shape {list(t.shape)}, expected [channels, *out] of 1 to 3 axes "
            f"with a multiple of {points * per_point} channels"
        )
    return t.detach().cpu().float().reshape(-1, points, per_point, *t.shape[1:])


def _subplots(count: int) -> tuple[Any, list[Any]]:
    import matplotlib.pyplot as plt

    columns = min(count, 8)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.8 * columns, 2.9 * rows), squeeze=False, layout="constrained"
    )
    tiles = list(axes.flat)
    for axis in tiles[count:]:
        axis.remove()
    return figure, tiles[:count]
