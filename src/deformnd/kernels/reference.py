"""The definition of the operators in plain PyTorch: any rank, device and floating dtype.

Each function is a composition of differentiable operations, so autograd gives derivatives of any
order. The reference runs where there is no kernel, and tests compare the kernels with it.

Shapes: B batch, K kernel points, P positions of the points, G groups, OG and MG offset and mask
groups, C image channels, O point channels, R rows of the bordered image (see _rows). Columns are
[B, K, P, C]: the image sampled at every point, channels last. Of deform_attention: S pixels of all
levels, Q queries, H heads, P points of a level.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .geometry import Attention, Geometry, arranged


def gather(
    g: Geometry,
    image: Tensor,
    weight: Tensor | None,
    offset: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """dF/dpoints [B, O, *point_size]: the forward of deform_conv."""
    dtype = _compute_dtype(image, offset, mask)
    columns = _masked(g, _sample(g, image.to(dtype), _cells(g, offset, image, dtype)), mask, dtype)
    return arranged(_add_bias(_contract(g, columns, weight), bias), image)


def scatter(
    g: Geometry,
    points: Tensor,
    weight: Tensor | None,
    offset: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """dF/dimage [B, C, *image_size]: the forward of deform_conv_transpose."""
    dtype = _compute_dtype(points, offset, mask)
    columns = _masked(g, _expand(g, points.to(dtype), weight), mask, dtype)
    image = _spread(g, columns, _cells(g, offset, points, dtype))
    return arranged(_add_bias(image, bias), points)


def gradients(
    g: Geometry,
    image: Tensor,
    points: Tensor,
    weight: Tensor | None,
    offset: Tensor | None,
    mask: Tensor | None,
    needs: Sequence[bool],
    summed: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Derivatives of F by (image, points, weight, offset, mask), None where not needed.

    And the channel sums of `summed`, which is the image or the points: a bias's gradient.
    """
    by_image, by_points, by_weight, by_offset, by_mask = needs
    dtype = _compute_dtype(image, offset, mask)
    cells = _cells(g, offset, image, dtype)
    out: list[Tensor | None] = [*[None] * 5, None if summed is None else channel_sums(summed)]
    if by_image or by_offset or by_mask:
        expanded = _expand(g, points.to(dtype), weight)
        if by_image:
            out[0] = arranged(_spread(g, _masked(g, expanded, mask, dtype), cells), image)
        if by_offset and offset is not None:
            masked = _masked(g, expanded, mask, dtype)
            grad = _position_gradient(g, image.to(dtype), masked, cells)
            out[3] = _gradient(grad, offset)
    if by_points or by_weight or by_mask:
        sampled = _sample(g, image.to(dtype), cells)
        columns = _masked(g, sampled, mask, dtype)
        if by_points:
            out[1] = arranged(_contract(g, columns, weight), points)
        if by_weight and weight is not None:
            low = _grouped_points(g, points.to(dtype))
            high = columns.unflatten(3, (g.groups, -1))  # [B, K, P, G, C/G]
            grad = torch.einsum("bgop,bkpgc->gock", low, high)
            out[2] = grad.reshape(weight.shape).to(weight.dtype).contiguous()
        if by_mask and mask is not None:
            product = (expanded * sampled).unflatten(3, (g.mask_groups, -1)).sum(4)
            out[4] = _gradient(product.permute(0, 3, 1, 2).reshape(mask.shape), mask)
    return tuple(out)


def _gradient(t: Tensor, given: Tensor) -> Tensor:
    """A gradient of an offset or a mask, in the layout of empty_gradient."""
    return arranged(t, given) if given.is_cpu else t.to(given.dtype).contiguous()


def _compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    dtype = torch.float32
    for t in tensors:
        if t is not None:
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype


class _Cells(NamedTuple):
    """Where each sample lies: [B, K, P, OG] each (B is 1 without an offset)."""

    row: Tensor  # row of the cell's first corner in the bordered image
    fractions: tuple[Tensor, ...]  # position in the cell along each axis, in [0, 1)
    valid: Tensor  # False for positions outside and for NaN and infinity


# The image gets a border of zeros, two pixels before and one after each axis. A position in
# [-1, size) has all its corners in the bordered image. Any other position is moved to -2, where all
# corners are zero.
_BEFORE, _AFTER = 2, 1


def _bordered(g: Geometry) -> list[int]:
    return [size + _BEFORE + _AFTER for size in g.image_size]


def _cells(g: Geometry, offset: Tensor | None, like: Tensor, dtype: torch.dtype) -> _Cells:
    n, groups = len(g.kernel), max(g.offset_groups, 1)
    if offset is None:
        offset = like.new_zeros(1, n * math.prod(g.kernel), *g.point_size, dtype=dtype)
    shape = (groups, math.prod(g.kernel), n, math.prod(g.point_size))
    offset = offset.to(dtype).reshape(offset.shape[0], *shape)
    cells, fractions = [], []
    valid = torch.ones(1, dtype=torch.bool, device=like.device)
    for a in range(n):
        p = torch.arange(g.point_size[a], device=like.device) * g.stride[a] - g.padding[a]
        k = torch.arange(g.kernel[a], device=like.device) * g.dilation[a]
        p = p.view(_along(n, a)).expand(g.point_size).reshape(1, -1)
        k = k.view(_along(n, a)).expand(g.kernel).reshape(-1, 1)
        # The offset is split into an integer and a fraction, and not the position: in a large image
        # a position has few bits left for its fraction.
        along = offset[:, :, :, a].permute(0, 2, 3, 1)
        near = along.abs() < 2**30
        along = torch.where(near, along, 0.0)
        floor = along.detach().floor()
        cell = (p + k)[:, :, None] + floor.long()
        cells.append(cell)
        fractions.append(along - floor)
        valid = valid & near & (cell >= -1) & (cell < g.image_size[a])
    row = torch.zeros_like(cells[0])
    for cell, size in zip(cells, _bordered(g), strict=True):
        row = row * size + torch.where(valid, cell + _BEFORE, 0)
    fractions = [torch.where(valid, fraction, 0.0) for fraction in fractions]
    batch = torch.arange(g.batch, device=like.device).view(-1, 1, 1, 1)
    group = torch.arange(groups, device=like.device)
    row = (batch * math.prod(_bordered(g)) + row) * groups + group
    return _Cells(row, tuple(fractions), valid)


def _along(n: int, axis: int) -> list[int]:
    return [-1 if a == axis else 1 for a in range(n)]


def _corners(g: Geometry, cells: _Cells) -> list[tuple[tuple[int, ...], Tensor]]:
    """For each of the 2^n corners of the cells, its bits (one for each axis) and its rows."""
    groups = max(g.offset_groups, 1)
    size = _bordered(g)
    corners = []
    for bits in itertools.product((0, 1), repeat=len(size)):
        step = sum(bit * math.prod(size[a + 1 :]) for a, bit in enumerate(bits))
        corners.append((bits, cells.row + step * groups))
    return corners


def _corner_weight(cells: _Cells, bits: tuple[int, ...], skip: int = -1) -> Tensor | float:
    """Interpolation weights [B, K, P, OG] of a corner, without the factor of the axis `skip`."""
    weight: Tensor | float = 1.0
    for a, (bit, fraction) in enumerate(zip(bits, cells.fractions, strict=True)):
        if a != skip:
            weight = weight * (fraction if bit else 1 - fraction)
    return weight


def _rows(g: Geometry, image: Tensor) -> Tensor:
    """The image with its border as rows of one pixel and offset group [B*R*OG, C/OG]."""
    image = F.pad(image, [_BEFORE, _AFTER] * len(g.image_size))
    groups = max(g.offset_groups, 1)
    count = g.batch * math.prod(_bordered(g)) * groups
    return image.movedim(1, -1).reshape(count, g.image_channels // groups)


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index]: [*index.shape, row length]."""
    flat = index.reshape(-1, 1).expand(-1, rows.shape[1])
    return rows.gather(0, flat).view(*index.shape, rows.shape[1])


def _sample(g: Geometry, image: Tensor, cells: _Cells) -> Tensor:
    """Interpolate the image at every point: columns [B, K, P, C]."""
    rows = _rows(g, image)
    columns: Tensor | float = 0.0
    for bits, index in _corners(g, cells):
        columns = columns + _take(rows, index) * _unsqueeze(_corner_weight(cells, bits))
    assert isinstance(columns, Tensor)
    return columns.flatten(3)


def _spread(g: Geometry, columns: Tensor, cells: _Cells) -> Tensor:
    """The adjoint of _sample: add columns into an image [B, C, *image_size]."""
    groups = max(g.offset_groups, 1)
    length = g.image_channels // groups
    size = _bordered(g)
    rows = columns.new_zeros(g.batch * math.prod(size) * groups, length)
    columns = columns.unflatten(3, (groups, length))
    for bits, index in _corners(g, cells):
        values = columns * _unsqueeze(_corner_weight(cells, bits))
        flat = index.reshape(-1, 1).expand(-1, length)
        rows = rows.scatter_add(0, flat, values.reshape(flat.shape))
    image = rows.view(g.batch, *size, g.image_channels).movedim(-1, 1)
    inner = (slice(None), slice(None), *[slice(_BEFORE, -_AFTER)] * len(size))
    return image[inner].clone(memory_format=torch.contiguous_format)


def _position_gradient(g: Geometry, image: Tensor, columns: Tensor, cells: _Cells) -> Tensor:
    """Derivative of sum(columns * _sample(image)) by the positions, in the layout of offset."""
    rows = _rows(g, image)
    columns = columns.unflatten(3, (g.offset_groups, rows.shape[1]))  # [B, K, P, OG, C/OG]
    grads: list[Tensor | float] = [0.0] * len(g.kernel)
    for bits, index in _corners(g, cells):
        dot = (_take(rows, index) * columns).sum(-1)
        for a, bit in enumerate(bits):
            slope = dot * _corner_weight(cells, bits, skip=a)
            grads[a] = grads[a] + (slope if bit else -slope)
    stacked = torch.stack([torch.as_tensor(grad) for grad in grads], 3)  # [B, K, P, n, OG]
    stacked = torch.where(cells.valid.unsqueeze(3), stacked, 0.0)
    channels = g.offset_groups * math.prod(g.kernel) * len(g.kernel)
    return stacked.permute(0, 4, 1, 3, 2).reshape(g.batch, channels, *g.point_size)


def _unsqueeze(weight: Tensor | float) -> Tensor:
    assert isinstance(weight, Tensor)
    return weight.unsqueeze(-1)


def _masked(g: Geometry, columns: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    if mask is None:
        return columns
    shape = (g.batch, g.mask_groups, math.prod(g.kernel), math.prod(g.point_size))
    mask = mask.to(dtype).reshape(shape)
    mask = mask.permute(0, 2, 3, 1).unsqueeze(-1)  # [B, K, P, MG, 1]
    columns = columns.unflatten(3, (g.mask_groups, -1)) * mask
    return columns.flatten(3)


def _grouped(g: Geometry, weight: Tensor) -> Tensor:
    outputs, inputs = g.point_channels // g.groups, g.image_channels // g.groups
    return weight.reshape(g.groups, outputs, inputs, math.prod(g.kernel))


def _grouped_points(g: Geometry, points: Tensor) -> Tensor:
    return points.reshape(g.batch, g.groups, g.point_channels // g.groups, math.prod(g.point_size))


def _contract(g: Geometry, columns: Tensor, weight: Tensor | None) -> Tensor:
    """Columns times weight: points [B, O, *point_size].

    Without a weight each channel is summed over its own kernel points.
    """
    if weight is None:
        points = columns.sum(1).transpose(1, 2)
    else:
        columns = columns.unflatten(3, (g.groups, -1))  # [B, K, P, G, C/G]
        weight = _grouped(g, weight.to(columns.dtype))
        points = torch.einsum("bkpgc,gock->bgop", columns, weight)
    return points.reshape(g.batch, g.point_channels, *g.point_size)


def _expand(g: Geometry, points: Tensor, weight: Tensor | None) -> Tensor:
    """The adjoint of _contract: points times weight, columns [B, K, P, C]."""
    if weight is None:
        points = points.flatten(2).transpose(1, 2).unsqueeze(1)
        return points.expand(-1, math.prod(g.kernel), -1, -1)
    weight = _grouped(g, weight.to(points.dtype))
    points = _grouped_points(g, points)
    return torch.einsum("bgop,gock->bkpgc", points, weight).flatten(3)


def _add_bias(image: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return image
    return image + bias.to(image.dtype).view(-1, *[1] * (image.dim() - 2))


def channel_sums(t: Tensor) -> Tensor:
    """Sums [channels] over everything else: the gradient of a bias."""
    return t.sum((0, *range(2, t.dim())))


def attend(a: Attention, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """The forward of deform_attention: [B, Q, H * C]."""
    return attend_along(a, (value, locations, weights), (value, None, None))


def attend_along(a: Attention, tensors: Sequence[Tensor], along: Sequence[Tensor | None]) -> Tensor:
    """The derivative of `attend` along a direction in (value, locations, weights)."""
    dtype = _compute_dtype(*tensors, *along)
    value, locations, weights = (t.to(dtype) for t in tensors)
    by_value, by_location, by_weight = (None if t is None else t.to(dtype) for t in along)
    total = value.new_zeros(a.batch, a.queries, a.heads, a.channels)
    for level in range(len(a.shapes)):
        part, weight = _level(a, locations, level), weights[:, :, :, level]
        for bits, index, inside in part.corners:
            factor = part.factor(bits)
            if by_value is not None:
                taken = _take_pixels(a, by_value, index, inside)
                total = total + (taken * (factor * weight).unsqueeze(-1)).sum(3)
            change: Tensor | float = 0.0
            if by_weight is not None:
                change = change + factor * by_weight[:, :, :, level]
            if by_location is not None:
                for axis, size in enumerate(a.shapes[level]):
                    moved = by_location[:, :, :, level, :, -1 - axis] * size
                    change = change + part.factor(bits, axis) * moved * weight
            if isinstance(change, Tensor):
                taken = _take_pixels(a, value, index, inside)
                total = total + (taken * change.unsqueeze(-1)).sum(3)
    return total.flatten(2).to(tensors[0].dtype)


def attend_gradients(
    a: Attention,
    grad_output: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of deform_attention by (value, locations, weights), None where not needed."""
    dtype = _compute_dtype(value, locations, weights)
    tensors = value, locations, weights
    value, locations, weights = (t.to(dtype) for t in tensors)
    grad_output = grad_output.to(dtype).view(a.batch, a.queries, a.heads, 1, a.channels)
    rows = value.new_zeros(a.batch * a.pixels * a.heads, a.channels)
    by_locations, by_weights = [], []
    for level, sizes in enumerate(a.shapes):
        part, weight = _level(a, locations, level), weights[:, :, :, level]
        by_weight: Tensor | float = 0.0
        slopes: list[Tensor | float] = [0.0] * len(sizes)
        for bits, index, inside in part.corners:
            factor = part.factor(bits)
            if needs[0]:
                spread = grad_output * torch.where(inside, factor * weight, 0.0).unsqueeze(-1)
                flat = index.reshape(-1, 1).expand(-1, a.channels)
                rows = rows.scatter_add(0, flat, spread.reshape(flat.shape))
            if needs[1] or needs[2]:
                dot = (_take_pixels(a, value, index, inside) * grad_output).sum(-1)
                by_weight = by_weight + factor * dot
                for axis in range(len(sizes)):
                    slopes[axis] = slopes[axis] + part.factor(bits, axis) * dot
        by_weights.append(torch.as_tensor(by_weight))
        moved = [slope * weight * size for slope, size in zip(slopes, sizes, strict=True)]
        by_locations.append(torch.stack(moved[::-1], -1) if needs[1] else weight)
    grads = (
        rows.view(value.shape) if needs[0] else None,
        torch.stack(by_locations, 3) if needs[1] else None,
        torch.stack(by_weights, 3) if needs[2] else None,
    )
    return tuple(
        None if grad is None else grad.to(t.dtype).contiguous()
        for grad, t in zip(grads, tensors, strict=True)
    )


class _Level(NamedTuple):
    """Where the samples of one level lie, [B, Q, H, P] each."""

    fractions: tuple[Tensor, ...]  # position in the cell along each axis, in [0, 1)
    # For each corner its bits, its rows among those of the value, and whether it is inside.
    corners: list[tuple[tuple[int, ...], Tensor, Tensor]]

    def factor(self, bits: tuple[int, ...], slope: int = -1) -> Tensor:
        """The interpolation weight of a corner, or its derivative by the position on one axis."""
        factor = torch.ones_like(self.fractions[0])
        for axis, (bit, fraction) in enumerate(zip(bits, self.fractions, strict=True)):
            if axis == slope:
                factor = factor if bit else -factor
            else:
                factor = factor * (fraction if bit else 1 - fraction)
        return factor


def _level(a: Attention, locations: Tensor, level: int) -> _Level:
    sizes = a.shapes[level]
    cells, fractions = [], []
    valid = torch.ones((), dtype=torch.bool, device=locations.device)
    for axis, size in enumerate(sizes):
        # Locations have x first, which is the last axis.
        position = locations[:, :, :, level, :, -1 - axis] * size - 0.5
        near = position.abs() < 2**30
        position = torch.where(near, position, 0.0)
        floor = position.detach().floor()
        cells.append(floor.long())
        fractions.append(position - floor)
        valid = valid & near & (floor >= -1) & (floor < size)
    fractions = [torch.where(valid, fraction, 0.0) for fraction in fractions]
    batch = torch.arange(a.batch, device=locations.device).view(-1, 1, 1, 1)
    head = torch.arange(a.heads, device=locations.device).view(-1, 1)
    corners = []
    for bits in itertools.product((0, 1), repeat=len(sizes)):
        pixel, inside = torch.zeros_like(cells[0]), valid
        for cell, bit, size in zip(cells, bits, sizes, strict=True):
            inside = inside & (cell + bit >= 0) & (cell + bit < size)
            pixel = pixel * size + cell + bit
        pixel = a.starts[level] + torch.where(inside, pixel, 0)
        corners.append((bits, (batch * a.pixels + pixel) * a.heads + head, inside))
    return _Level(tuple(fractions), corners)


def _take_pixels(a: Attention, value: Tensor, index: Tensor, inside: Tensor) -> Tensor:
    """The rows of the value at these indices, [B, Q, H, P, C], with zeros for those outside."""
    taken = _take(value.reshape(a.batch * a.pixels * a.heads, a.channels), index)
    return torch.where(inside.unsqueeze(-1), taken, 0.0)
