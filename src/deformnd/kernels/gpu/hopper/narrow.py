"""Forward and backward on Hopper where many sample groups have few channels each.

Here finding cells and corner weights is what costs. So a lane finds them once for a chunk, which is
RUN consecutive channels of a sample group, and loads a chunk at once from every corner. Chunks lie
in registers as products have them (prepare.py, Order):

    [BLOCK_P, BLOCK_C]               a tile of positions by a block of channels, as a factor or sum
    [BLOCK_P, BLOCK_C // RUN, RUN]   the same by chunks: cells and weights are [BLOCK_P, chunks]
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from .. import sampling
from ..layout import Call, Operand
from ..prepare import Order
from ..runtime import Buffer
from ..tiles import Tiles
from ..variants import Variant
from . import common


@gluon.jit
def corners_of(given, starts, inside, s, g):
    """From what `read` gives of samples [BLOCK_P, chunks] of sample groups s: their cells, the
    pixel of every corner, counted through all sample groups' planes, the amplitude, and the
    validity."""
    axes, valid = sampling.cell_of(given[0], starts, inside, g, True)
    pixel = axes[0][0]
    for a in gl.static_range(1, len(axes)):
        pixel = pixel * g.image[a] + axes[a][0]
    steps = ()
    pitch = 1
    for a in gl.static_range(len(axes) - 1, -1, -1):
        steps = (axes[a][1] * pitch,) + steps
        pitch = pitch * g.image[a]
    pixels = (pixel + s * pitch,)
    for a in gl.static_range(len(axes)):
        finer = ()
        for i in gl.static_range(len(pixels)):
            finer = finer + (pixels[i], pixels[i] + steps[a])
        pixels = finer
    return axes, pixels, sampling.amplitude_of(given[1], valid), valid


@gluon.jit
def weights_of(axes, amplitude):
    """The weight of every corner, times the amplitude."""
    weights = (amplitude,)
    for a in gl.static_range(len(axes)):
        finer = ()
        for i in gl.static_range(len(weights)):
            finer = finer + (weights[i] * axes[a][2][0], weights[i] * axes[a][2][1])
        weights = finer
    return weights


@gluon.jit
def fetch(image, pixels, lane, PADDED: gl.constexpr):
    """Load the channels of every corner [BLOCK_P, chunks, RUN]. `lane` numbers the channels within
    their sample group."""
    values = ()
    for q in gl.static_range(len(pixels)):
        values = values + (gl.load(image + ((pixels[q] * PADDED)[:, :, None] + lane)),)
    return values


@gluon.jit
def blend(values, weights):
    total = values[0].to(gl.float32) * weights[0][:, :, None]
    for q in gl.static_range(1, len(values)):
        total += values[q].to(gl.float32) * weights[q][:, :, None]
    return total


@gluon.jit
def positions_of(lane, tile, tiles, g, TILE: gl.constexpr, VECTOR_P: gl.constexpr):
    """The positions of a tile: their coordinates, their numbers, and whether they exist."""
    at = sampling.unravel(tile, tiles)
    local = sampling.unravel(lane, TILE)
    point = ()
    p = 0 * lane
    inside = p == 0
    for a in gl.static_range(len(TILE)):
        x = at[a] * TILE[a] + local[a]
        inside = inside & (x < g.point[a])
        point = point + (x,)
        p = p * g.point[a] + x
    # The hints let VECTOR_P neighbours be loaded at once.
    p = gl.max_contiguous(gl.multiple_of(p, [VECTOR_P]), [VECTOR_P])
    return point, p, gl.max_constancy(inside, [VECTOR_P])


@gluon.jit
def advance(at, g, BLOCK_C: gl.constexpr):
    """From (coordinates of a tap, first channel) to the next tap. After the last tap comes the
    first one with the next block of channels, and after the last block the start.

    In this order a multiprocessor's cache holds the neighbourhood that a block is sampled from.
    """
    tap, over = sampling.following(at[0], g.kernel)
    c0 = at[1] + over * BLOCK_C
    return tap, gl.where(c0 >= g.columns, 0, c0)


@gluon.jit
def read_at(offset, mask, b, at, chunk, p, inside, g, PADDED: gl.constexpr, VECTOR_P: gl.constexpr):
    """What `read` gives of the samples of the tap and block of channels `at` (advance)."""
    s = (at[1] // PADDED + chunk // PADDED)[None, :]
    tap = sampling.ravel(at[0], g.kernel)
    return sampling.read(offset, mask, b, s, tap, p, inside, g, gl.int32, VECTOR_P)


@gluon.jit
def fetch_at(image, at, chunk, given, point, inside, lane, g, PADDED: gl.constexpr):
    """The values of the corners of the samples of the tap and block of channels `at`, and their
    weights."""
    s = (at[1] // PADDED + chunk // PADDED)[None, :]
    starts = sampling.starts_of(point, at[0], g)
    axes, pixels, amplitude, _ = corners_of(given, starts, inside, s, g)
    weights = weights_of(axes, amplitude)
    return fetch(image, pixels, lane, PADDED), weights


@gluon.jit
def store_tile(out, acc, b, o0, tile, tiles, g, LAST: gl.constexpr, TILE: gl.constexpr,
               VECTOR_P: gl.constexpr):  # fmt: skip
    """Store a tile of points [BLOCK_P, BLOCK_O] of batch item b."""
    layout: gl.constexpr = acc.type.layout
    lane = gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, layout))
    _, p, inside = positions_of(lane, tile, tiles, g, TILE, VECTOR_P)
    o = o0 + gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, layout))
    out += b.to(gl.int64) * g.positions * g.outputs
    common.store_points(out, acc, p, o, inside, g, LAST, VECTOR_P)


@gluon.jit
def forward_narrow_hopper(image, weight, offset, mask, bias, out, parts, g, tiles, blocks, splits,
                          LAST: gl.constexpr, PRECISION: gl.constexpr, PADDED: gl.constexpr,
                          RUN: gl.constexpr,
                          BLOCK_P: gl.constexpr, BLOCK_O: gl.constexpr, BLOCK_C: gl.constexpr,
                          VECTOR_P: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
                          MMA: gl.constexpr, COLUMNS: gl.constexpr,
                          STORED: gl.constexpr, CHAINED: gl.constexpr):  # fmt: skip
    """Write the points, or, where the sum is split, its parts in float32.

    The rows of a warp's products are its positions in an order that moves the last bit of their
    number to the front, so that a lane has two neighbours. The steps are blocks of image channels x
    taps. Grid: (batch x tiles x blocks of point channels, splits of the steps).
    """
    sampling.wait_for_previous(CHAINED)
    dtype: gl.constexpr = gl.bfloat16 if PRECISION == "bf16x3" else image.dtype.element_ty
    count: gl.constexpr = common.parts_in(PRECISION)
    at_chunk: gl.constexpr = gl.SliceLayout(2, COLUMNS)
    operand: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    o0 = (gl.program_id(0) % blocks) * BLOCK_O
    tile = gl.program_id(0) // blocks
    b = tile // sampling.product(tiles)
    tile = tile % sampling.product(tiles)
    steps = g.taps * (g.columns // BLOCK_C)
    first = gl.program_id(1) * steps // splits
    last = (gl.program_id(1) + 1) * steps // splits
    held = gl.allocate_shared_memory(dtype, [STAGES * count, BLOCK_O, BLOCK_C], weight.layout)
    bars = common.allocate_bars(STAGES)
    common.publish()
    rows = g.taps * g.padded_outputs
    at = (sampling.unravel(first % g.taps, g.kernel), first // g.taps * BLOCK_C)
    new = at  # the tap and channels of the next weights to bring
    for s in gl.static_range(STAGES):
        if s > 0:
            new = advance(new, g, BLOCK_C)
        row = sampling.ravel(new[0], g.kernel) * g.padded_outputs + o0
        common.bring(weight, row, new[1], rows, held, bars, s, first + s < last, PRECISION)
    near = gl.arange(0, BLOCK_P, layout=gl.SliceLayout(1, at_chunk))
    point, p, inside = positions_of(near, tile, tiles, g, TILE, VECTOR_P)
    chunk = gl.arange(0, BLOCK_C // RUN, layout=gl.SliceLayout(0, at_chunk)) * RUN
    lane = gl.arange(0, RUN, layout=gl.SliceLayout(0, gl.SliceLayout(1, COLUMNS)))[None, None, :]
    lane = (chunk % PADDED)[None, :, None] + lane
    inside = inside[:, None] & (chunk >= 0)[None, :]
    column = ()
    for a in gl.static_range(len(point)):
        column = column + (point[a][:, None],)
    point, p = column, p[:, None]
    image += b.to(gl.int64) * g.item
    acc = gl.zeros([BLOCK_P, BLOCK_O], gl.float32, layout=MMA)
    given = read_at(offset, mask, b, at, chunk, p, inside, g, PADDED, VECTOR_P)
    values, weights = fetch_at(image, at, chunk, given, point, inside, lane, g, PADDED)
    at = advance(at, g, BLOCK_C)
    given = read_at(offset, mask, b, at, chunk, p, inside, g, PADDED, VECTOR_P)
    for i in range(last - first):
        x = blend(values, weights)
        x = gl.reshape(x, [BLOCK_P // 16, 8, 2, BLOCK_C // (4 * RUN), 4, RUN // 4, 2, 2])
        x = gl.reshape(gl.permute(x, (0, 2, 1, 3, 5, 6, 4, 7)), [BLOCK_P, BLOCK_C])
        x = sampling.parts_of(gl.convert_layout(x, operand), dtype, PRECISION)
        values, weights = fetch_at(image, at, chunk, given, point, inside, lane, g, PADDED)
        at = advance(at, g, BLOCK_C)
        given = read_at(offset, mask, b, at, chunk, p, inside, g, PADDED, VECTOR_P)
        common.barrier()
        ahead = i + STAGES - 1
        row = sampling.ravel(new[0], g.kernel) * g.padded_outputs + o0
        common.bring(weight, row, new[1], rows, held, bars, ahead % STAGES,
                     (first + ahead < last) & (i > 0), PRECISION)  # fmt: skip
        new = advance(new, g, BLOCK_C)
        stage = common.await_full(bars, i)
        y = common.factor(held, stage, PRECISION, True)
        # Registers must not be overwritten before they are multiplied, so the wait names them.
        acc = warpgroup_mma_wait(0, deps=(common.multiply(x, y, acc),) + x)[0]
    acc = gl.reshape(acc, [BLOCK_P // 16, 2, 8, BLOCK_O // 32, 4, 4, 2])
    acc = gl.reshape(gl.permute(acc, (0, 2, 1, 3, 5, 4, 6)), [BLOCK_P, BLOCK_O])
    if splits > 1:
        parts += gl.program_id(1).to(gl.int64) * g.batch * g.positions * g.outputs
        store_tile(parts, acc, b, o0, tile, tiles, g, LAST, TILE, VECTOR_P)
    else:
        if bias is not None:
            o = o0 + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(0, acc.type.layout))
            acc += gl.load(bias + o, mask=o < g.outputs, other=0.0).to(gl.float32)[None, :]
        result = gl.convert_layout(acc.to(out.dtype.element_ty), STORED)
        store_tile(out, result, b, o0, tile, tiles, g, LAST, TILE, VECTOR_P)


@gluon.jit
def store_sums(out, total, b, s0, row, p0, pitch, g, TOGETHER: gl.constexpr):
    """Add up the TOGETHER chunks of every sample group from s0 on, in a tensor [BLOCK_P, chunks],
    and store each sum as row `row` of its sample group's `pitch` rows of positions."""
    size: gl.constexpr = total.shape
    total = gl.reshape(total, [size[0], size[1] // TOGETHER, TOGETHER])
    total = gl.sum(total, 2)
    s = s0 + gl.arange(0, total.shape[1], layout=gl.SliceLayout(0, total.type.layout))
    p = p0 + gl.arange(0, size[0], layout=gl.SliceLayout(1, total.type.layout))
    out += b.to(gl.int64) * (g.sample_groups * pitch * g.positions)
    place = ((s * pitch + row) * g.positions)[None, :] + p[:, None]
    inside = (p < g.positions)[:, None] & (s >= 0)[None, :]
    gl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@gluon.jit
def add_corners(out, grad, pixels, weights, valid, apart, PADDED: gl.constexpr,
                SECTORS: gl.constexpr):  # fmt: skip
    """Add the chunks' gradients, times the corners' weights, to the image's gradient by atomics.

    The memory's atomic units take a sector of 32 bytes at a time. So neighbouring lanes fill as
    many bytes in a row as they can of the low and the high corner along the last axis, which are
    neighbours (SECTORS [BLOCK_P, chunks, low or high, RUN]). With 4 channels a pixel fills only
    half a sector. The image's gradient then has two copies, `apart` pixels apart, of which the
    second is shifted by half a sector and serves the cells whose low corner is odd:

        first copy    | 0  1 | 2  3 | 4  5 |        The numbers are pixels, and the bars are the
        second copy   0 | 1  2 | 3  4 | 5  6        bounds of sectors.
    """
    at_pair: gl.constexpr = gl.SliceLayout(3, SECTORS)
    at_grad: gl.constexpr = gl.SliceLayout(2, SECTORS)
    at_lane: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, at_grad))
    run: gl.constexpr = grad.shape[2]
    grad = gl.convert_layout(grad, at_grad)[:, :, None, :]
    lane = gl.arange(0, run, layout=at_lane)[None, None, None, :]
    chunk = gl.arange(0, grad.shape[1], layout=gl.SliceLayout(0, gl.SliceLayout(2, at_pair)))
    for q in gl.static_range(0, len(weights), 2):
        low, high = pixels[q], pixels[q + 1]
        if apart is not None:
            odd = (low & 1) != 0
            high = gl.where(odd, high + apart, high)
            low = gl.where(odd, low + apart, low)
        pixel = gl.join(
            gl.where(valid & (weights[q] != 0.0), low, -1),
            gl.where(valid & (weights[q + 1] != 0.0), high, -1),
        )
        pixel = gl.convert_layout(pixel, at_pair)
        weight = gl.convert_layout(gl.join(weights[q], weights[q + 1]), at_pair)
        place = pixel * PADDED
        if run < PADDED:
            place += (chunk * run % PADDED)[None, :, None]
        gl.atomic_add(
            out + (place[:, :, :, None] + lane), grad * weight[:, :, :, None],
            mask=(pixel >= 0)[:, :, :, None] & (lane >= 0), sem="relaxed",
        )  # fmt: skip


@gluon.jit
def backward_narrow_hopper(image, points, weight, offset, mask, grad_image, grad_offset, grad_mask,
                           grad_weight, g, down, across, splits, PRECISION: gl.constexpr,
                           PADDED: gl.constexpr, RUN: gl.constexpr, BLOCK_P: gl.constexpr,
                           BLOCK_O: gl.constexpr, BLOCK_C: gl.constexpr, TWICE: gl.constexpr,
                           MMA: gl.constexpr, COLUMNS: gl.constexpr, SECTORS: gl.constexpr,
                           ROWS: gl.constexpr, CHAINED: gl.constexpr):  # fmt: skip
    """Write the gradients by the image (float32, by atomic additions) and by offset and mask (of
    every sample group), and partial sums [splits, taps, channels, outputs] of the gradient by the
    weight, each unless None. Points are rows [batch x positions, outputs] of BLOCK_O outputs.

    A program holds the weights of a block of channels and of one tap, and takes tiles of positions
    in turn, so that a lane finds cells and corners once for all gradients. For the sake of the
    cache tiles are taken down columns of the image, in which a row has about `across` tiles.
    TWICE says that the image's gradient has two copies (add_corners).
    Grid: (taps x blocks of channels, splits of the tiles).
    """
    sampling.wait_for_previous(CHAINED)
    dtype: gl.constexpr = gl.bfloat16 if PRECISION == "bf16x3" else points.dtype
    count: gl.constexpr = common.parts_in(PRECISION)
    rank: gl.constexpr = len(g.image)
    by_position: gl.constexpr = grad_offset is not None or grad_mask is not None
    at_chunk: gl.constexpr = gl.SliceLayout(2, COLUMNS)
    per_tap = g.columns // BLOCK_C
    tap = gl.program_id(0) // per_tap
    shift = sampling.unravel(tap, g.kernel)
    c0 = (gl.program_id(0) % per_tap) * BLOCK_C
    split = gl.program_id(1)
    tiles = down * across
    share = g.batch * tiles // splits
    rest = g.batch * tiles % splits
    first = split * share + gl.minimum(split, rest)
    last = first + share + gl.where(split < rest, 1, 0)
    held = gl.allocate_shared_memory(dtype, [2 * count, BLOCK_P, BLOCK_O], points.layout)
    factor = gl.allocate_shared_memory(
        dtype, [count, BLOCK_O, BLOCK_C],
        gl.NVMMASharedLayout.get_default_for([BLOCK_O, BLOCK_C], dtype),
    )  # fmt: skip
    bars = common.allocate_bars(2)
    o = gl.arange(0, BLOCK_O, layout=gl.SliceLayout(1, ROWS))
    c = c0 + gl.arange(0, BLOCK_C, layout=gl.SliceLayout(0, ROWS))
    for part in gl.static_range(count):
        start = (part * g.taps + tap) * g.padded_outputs + o
        factor.index(part).store(gl.load(weight + ((start * g.columns)[:, None] + c[None, :])))
    w = common.factor(factor, 0, PRECISION)
    common.publish()
    rows = g.batch * g.positions
    b = first // tiles
    at = (first % tiles // down, first % tiles % down)
    p0 = (at[1] * across + at[0]) * BLOCK_P
    common.bring(points, b * g.positions + p0, 0, rows, held, bars, 0, first < last, PRECISION)
    near = gl.arange(0, BLOCK_P, layout=gl.SliceLayout(1, at_chunk))[:, None]
    chunk = gl.arange(0, BLOCK_C // RUN, layout=gl.SliceLayout(0, at_chunk)) * RUN
    lane = gl.arange(0, RUN, layout=gl.SliceLayout(0, gl.SliceLayout(1, COLUMNS)))[None, None, :]
    lane = (chunk % PADDED)[None, :, None] + lane
    s = (c0 // PADDED + chunk // PADDED)[None, :]
    apart = None
    if TWICE:
        apart = g.batch * g.sample_groups * g.pixels | 1
    zero = gl.zeros([BLOCK_P, BLOCK_C], gl.float32, layout=MMA)
    if grad_weight is not None:
        columns = gl.allocate_shared_memory(
            dtype, [count, BLOCK_P, BLOCK_C],
            gl.NVMMASharedLayout.get_default_for([BLOCK_P, BLOCK_C], dtype),
        )  # fmt: skip
        acc = gl.zeros([BLOCK_O, BLOCK_C], gl.float32, layout=MMA)
        product = gl.zeros([BLOCK_O, BLOCK_C], gl.float32, layout=MMA)
    p = p0 + near
    inside = (p < g.positions) & (chunk >= 0)[None, :]
    given = sampling.read(offset, mask, b, s, tap, p, inside, g, gl.int32)
    for t in range(first, last):
        stage = common.await_full(bars, t - first)
        x = common.factor(held, stage, PRECISION)
        grad = common.multiply(x, w, zero, False)
        item = b
        starts = sampling.starts_of(sampling.unravel(p, g.point), shift, g)
        axes, pixels, amplitude, valid = corners_of(given, starts, inside, s, g)
        if by_position or grad_weight is not None:
            values = fetch(image + item.to(gl.int64) * g.item, pixels, lane, PADDED)
        # This goes on to the next tile. After the last one it reads some other tile in vain.
        tile0 = p0
        at, over = sampling.following(at, (across, down))
        b = gl.minimum(b + over, g.batch - 1)
        p0 = (at[1] * across + at[0]) * BLOCK_P
        p = p0 + near
        inside = (p < g.positions) & (chunk >= 0)[None, :]
        given = sampling.read(offset, mask, b, s, tap, p, inside, g, gl.int32)
        weights = weights_of(axes, amplitude)
        grad = warpgroup_mma_wait(0, deps=[grad])
        common.barrier()
        common.bring(points, b * g.positions + p0, 0, rows, held, bars, 1 - stage, t + 1 < last,
                     PRECISION)  # fmt: skip
        if grad_weight is not None:
            y = gl.reshape(blend(values, weights), [BLOCK_P, BLOCK_C])
            y = sampling.parts_of(y, dtype, PRECISION)
            for part in gl.static_range(count):
                columns.index(part).store(y[part])
            left = common.factor(held, stage, PRECISION, True)
            right = common.factor(columns, 0, PRECISION)
            common.publish()
            # Tensor cores round toward zero, so in "bf16x3" they add up no more than a tile.
            product = common.multiply(left, right, product, PRECISION != "bf16x3")
        grad = gl.reshape(grad, [BLOCK_P, BLOCK_C // (4 * RUN), RUN // 2, 4, 2])
        grad = gl.reshape(gl.permute(grad, (0, 1, 3, 2, 4)), [BLOCK_P, BLOCK_C // RUN, RUN])
        grad = gl.convert_layout(grad, COLUMNS)
        if by_position:
            dots = ()
            for q in gl.static_range(2**rank):
                dots = dots + (gl.sum(values[q].to(gl.float32) * grad, 2),)
            sums = sampling.contract(dots, axes)
            s0 = c0 // PADDED
            if grad_offset is not None:
                for a in gl.static_range(rank):
                    total = gl.where(valid, sums[a] * amplitude, 0.0)
                    store_sums(grad_offset, total, item, s0, tap * rank + a, tile0, g.taps * rank,
                               g, PADDED // RUN)  # fmt: skip
            if grad_mask is not None:
                total = gl.where(valid, sums[rank], 0.0)
                store_sums(grad_mask, total, item, s0, tap, tile0, g.taps, g, PADDED // RUN)
        if grad_image is not None:
            out = grad_image + item.to(gl.int64) * g.item
            add_corners(out, grad, pixels, weights, valid, apart, PADDED, SECTORS)
        if grad_weight is not None:
            product = warpgroup_mma_wait(0, deps=[product])
            if PRECISION == "bf16x3":
                acc += product
    if grad_weight is not None:
        if PRECISION == "bf16x3":
            product = acc
        o = gl.arange(0, BLOCK_O, layout=gl.SliceLayout(1, MMA))
        c = c0 + gl.arange(0, BLOCK_C, layout=gl.SliceLayout(0, MMA))
        real = c % PADDED < g.group_channels
        c = c // PADDED * g.group_channels + c % PADDED
        start = (split * g.taps + tap).to(gl.int64) * g.channels + c
        gl.store(grad_weight + ((start * g.padded_outputs)[None, :] + o[:, None]), product,
                 mask=real[None, :] & (o >= 0)[:, None])  # fmt: skip


def chunks_layout(positions: int, run: int, chunks: int, warps: int, pairs: bool) -> Any:
    """The layout of [position, chunk, channel of the chunk] that gives lanes chunks of `run`
    channels, as products have them. With `pairs` a lane has those of two neighbouring positions."""
    near, rows = (1, (2, 4, 8)) if pairs else (8, (1, 2, 4))
    registers = [[0, 0, 1 << i] for i in range(run.bit_length() - 1)] + [[near, 0, 0]]
    registers += [[0, 4 << i, 0] for i in range((chunks // 4).bit_length() - 1)]
    lanes = [[0, 1, 0], [0, 2, 0], *([r, 0, 0] for r in rows)]
    warp = [[16 << i, 0, 0] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, warp, [], [positions, chunks, run])


def sectors_layout(positions: int, run: int, chunks: int, padded: int, warps: int) -> Any:
    """The layout of [position, chunk, low or high corner, channel] that is as chunks_layout, except
    that neighbouring lanes have four channels each of what is contiguous in memory."""
    pair, second, third = [0, 0, 1, 0], [0, 1, 0, 0], [0, 2, 0, 0]
    if run == 4:
        near, registers = [pair, third], [second]
    elif run == 8 and padded == 8:
        near, registers = [[0, 0, 0, 4], pair], [second, third]
    elif run == 8:
        near, registers = [[0, 0, 0, 4], second], [pair, third]
    else:
        near, registers = [[0, 0, 0, 4], [0, 0, 0, 8]], [pair, second, third]
    registers = [[0, 0, 0, 1], [0, 0, 0, 2], *registers, [8, 0, 0, 0]]
    registers += [[0, 4 << i, 0, 0] for i in range((chunks // 4).bit_length() - 1)]
    lanes = [*near, [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]]
    warp = [[16 << i, 0, 0, 0] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, warp, [], [positions, chunks, 2, run])


def blocks_of(call: Call, tiles: Tiles) -> dict[str, int]:
    n = call.sizes
    # Large blocks take too many registers with eight corners, with more than one sample group to a
    # lane, and in bfloat16.
    few = len(n.image) == 3 or n.padded < 16 or call.dtype == torch.bfloat16
    block_c = math.gcd(32 if few else tiles.block_c, n.columns)
    run = min(n.padded, block_c // 4)
    return dict(PADDED=n.padded, RUN=run, BLOCK_P=tiles.block_p, BLOCK_C=block_c)


def takes(call: Call) -> bool:
    """Whether a call has what these kernels need: narrow sample groups, sizes that fit into 32
    bits, and what all kernels for Hopper need."""
    n = call.sizes
    return (
        common.takes_any(call)
        and call.narrow
        and n.padded >= 4
        and n.columns % 32 == 0
        and call.is_near
        and max(n.item, n.positions * n.padded_outputs) < 2**31
        and n.sample_groups * n.taps * len(n.image) * n.positions < 2**31
        and 2 * n.batch * n.positions < 2**31
    )


def takes_forward(call: Call) -> bool:
    """Whether the forward takes a call. With many outputs too many blocks would sample anew, and
    im2col.py is faster."""
    return takes(call) and not call.gives_way


def write_forward(call: Call, image: Operand, bias: Buffer | None, out: Operand) -> None:
    n, rank = call.sizes, len(call.sizes.image)
    row = call.tiles("forward_narrow_hopper", n.padded_outputs)
    fixed = blocks_of(call, row)
    block_p, block_c, run = fixed["BLOCK_P"], fixed["BLOCK_C"], fixed["RUN"]
    block_o = math.gcd(row.block_o, n.padded_outputs)
    # Tiles with two axes sample a smaller neighbourhood, of which more stays in the cache.
    tile = (block_p,) if rank == 1 else (1, block_p // 16, 16)[-rank:]
    tiles = tuple(triton.cdiv(s, t) for s, t in zip(n.point, tile, strict=True))
    blocks = n.padded_outputs // block_o
    programs, steps = n.batch * math.prod(tiles) * blocks, n.taps * n.columns // block_c
    registers = row.registers if run == 4 and rank < 3 else 0  # other calls would spill
    splits = call.splits(
        *("forward_narrow_hopper", programs, row.warps, steps),
        products=block_c,
        **call.sampling(block_p, block_c),
    )
    constants: dict[str, Any] = dict(
        **dict(LAST=out.last, BLOCK_O=block_o, STAGES=row.stages, TILE=tile, **fixed),
        MMA=common.mma_layout(block_o, row.warps),
        COLUMNS=chunks_layout(block_p, run, block_c // run, row.warps, True),
        STORED=common.rows_layout(block_p, block_o, row.warps)
        if out.last
        else gl.BlockedLayout([2, 1], [32, 1], [block_p // 64, row.warps * 64 // block_p], [0, 1]),
    )
    parts = call.room_for_parts(splits, *out.buffer.shape)
    for vector in (1, 2):  # for odd and even widths; the launch for the other kind is only loaded
        launch = call.make(
            *(forward_narrow_hopper, (programs, splits), dict(VECTOR_P=vector, **constants)),
            **dict(image=call.image(image), weight=call.weight(Order.OPERAND, run), bias=bias),
            **dict(out=out.buffer, parts=parts, tiles=tiles, blocks=blocks, splits=splits),
            warps=row.warps,
            registers=registers,
            descriptors={"weight": common.block(block_o, block_c, dtype=call.dtype)},
        )
        call.steps.launch(launch, vector == math.gcd(2, n.point[-1]))
    call.reduce(parts, out, bias)


def takes_backward(call: Call) -> bool:
    """Whether the backward takes a call, for which all point channels must be in one block."""
    n = call.sizes
    operation, outputs = "backward_narrow_hopper", n.padded_outputs
    return takes(call) and outputs <= call.tiles(operation, outputs).block_o


def write_backward(
    call: Call,
    image: Operand,
    points: Operand,
    by_image: Buffer | None,
    by_offset: Buffer | None,
    by_mask: Buffer | None,
    by_weight: Buffer | None,
) -> None:
    n = call.sizes
    row = call.tiles("backward_narrow_hopper", n.padded_outputs)
    fixed = blocks_of(call, row)
    block_p, block_c, run = fixed["BLOCK_P"], fixed["BLOCK_C"], fixed["RUN"]
    across = max(1, round(n.point[-1] / block_p))
    down = triton.cdiv(triton.cdiv(n.positions, block_p), across)
    programs = n.taps * (n.columns // block_c)
    at_once = row.resident * call.multiprocessors
    splits = max(1, min(n.batch * down * across, at_once // programs))
    chunks = (block_p, run, block_c // run)
    length = n.batch * n.item
    twice = n.padded == 4 and 2 * length < 2**31
    constants: dict[str, Any] = dict(
        **dict(BLOCK_O=n.padded_outputs, TWICE=twice, **fixed),
        MMA=common.mma_layout(block_c, row.warps),
        COLUMNS=chunks_layout(*chunks, row.warps, False),
        SECTORS=sectors_layout(*chunks, n.padded, row.warps),
        ROWS=gl.BlockedLayout([1, 8], [256 // block_c, block_c // 8], [row.warps, 1], [1, 0]),
    )
    rows = call.parts(points) if call.precision == "bf16x3" else call.rows(points)
    rows = rows._replace(shape=(math.prod(rows.shape) // n.padded_outputs, n.padded_outputs))
    added, parts, second = by_image, None, (length // 4 | 1) * 4  # the second copy's start
    if by_image is not None:
        if twice:
            added = call.plan.scratch(length + second, dtype=torch.float32)
        call.zero(added)
    if by_weight is not None:
        shape = (splits, n.taps, n.channels, n.padded_outputs)
        parts = call.plan.scratch(*shape, dtype=torch.float32)
    call.launch(
        *(backward_narrow_hopper, (programs, splits), constants),
        **dict(image=call.image(image), points=rows, weight=call.weight(Order.ACCUMULATOR, run)),
        **dict(grad_image=added, grad_offset=by_offset, grad_mask=by_mask, grad_weight=parts),
        **dict(down=down, across=across, splits=splits, warps=row.warps),
        descriptors={"points": common.block(block_p, n.padded_outputs, dtype=call.dtype)},
    )
    if by_image is not None and twice:
        call.reduce_flat(added, 2, by_image, second)
    if by_weight is not None:
        call.reduce_weight(parts, by_weight)


FORWARD = Variant("forward_narrow_hopper", takes_forward, write_forward)
BACKWARD = Variant("backward_narrow_hopper", takes_backward, write_backward, wants_parts=True)
