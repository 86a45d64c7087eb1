"""Gradients of offset and mask, and of the image by atomic additions.

A program multiplies the points at BLOCK_P positions by the weight of a tap. The product is the
gradient of the columns (columns.py, Note [rows]), which stays in registers. Dot products of this
gradient with each sample's corners, over the channels of the sample group, give the gradients of
offset and mask. The gradient times the corners' weights is added to the image's gradient. Where
there are few tiles of positions, several programs share the taps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import columns, sampling
from .layout import Call, Operand, fit
from .runtime import Buffer
from .tiles import NARROW, Tiles
from .variants import portable


@triton.jit
def backward_atomic(image, points, weight, offset, mask, grad_image, grad_offset, grad_mask,
                    g, tiles, splits,
                    GROUPED: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
                    EVEN: tl.constexpr, HOLD: tl.constexpr, BLOCK_P: tl.constexpr,
                    BLOCK_O: tl.constexpr, GROUPS: tl.constexpr, TAPS: tl.constexpr,
                    BLOCK_C: tl.constexpr, CHANNELS: tl.constexpr,
                    CHAINED: tl.constexpr):  # fmt: skip
    """Write the gradients that are not None. The image may be None if neither offset nor mask gets
    a gradient. HOLD says that the points' channels are one block, which stays in registers.

    Grid: (B x tiles of positions, splits)."""
    sampling.wait_for_previous(CHAINED)
    rank: tl.constexpr = len(g.image)
    by_position: tl.constexpr = grad_offset is not None or grad_mask is not None
    b = tl.program_id(0) // tiles
    p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < g.positions
    if by_position:
        image += b.to(tl.int64) * g.item
    if grad_image is not None:
        grad_image += b.to(tl.int64) * g.item
    if HOLD:
        o = tl.arange(0, BLOCK_O)
        held = columns.read_point_parts(points, b, p, inside, o, g, PRECISION, INDEX)
    split = tl.program_id(1)
    stop = (split + 1) * g.taps // splits
    for tap in range(split * g.taps // splits, stop, TAPS):
        for s0 in range(0, g.sample_groups, GROUPS):
            s, k, at, here, axes, amplitude, valid = columns.samples_of(
                offset, mask, b, s0, tap, stop, p, inside, g, INDEX, GROUPS, TAPS
            )
            dots = ()
            for q in tl.static_range(2**rank):
                dots = dots + (tl.zeros((BLOCK_P, GROUPS * TAPS), tl.float32),)
            for c0 in range(0, columns.channels_to(g, BLOCK_C, CHANNELS), BLOCK_C):
                grad = tl.zeros((BLOCK_P, GROUPS * TAPS * BLOCK_C), tl.float32)
                if HOLD:
                    o = tl.arange(0, BLOCK_O)
                    w = columns.read_weight(
                        weight, o, o < g.outputs, s0, c0, tap, stop, g,
                        GROUPED, PRECISION, GROUPS, TAPS, BLOCK_C,
                    )  # fmt: skip
                    grad = columns.dot(held, w, grad, PRECISION)
                else:
                    first, last = columns.channels_of(s0, c0, g, GROUPS, BLOCK_C, CHANNELS)
                    o_first, o_last = columns.met(first, last, g.group_in, g.group_out)
                    for o0 in range(o_first // 8 * 8, o_last, BLOCK_O):  # eights align the loads
                        o = o0 + tl.arange(0, BLOCK_O)
                        x = columns.read_point_parts(points, b, p, inside, o, g, PRECISION, INDEX)
                        w = columns.read_weight(
                            weight, o, o < o_last, s0, c0, tap, stop, g,
                            GROUPED, PRECISION, GROUPS, TAPS, BLOCK_C,
                        )  # fmt: skip
                        grad = columns.dot(x, w, grad, PRECISION)
                grad = tl.reshape(grad, (BLOCK_P, GROUPS * TAPS, BLOCK_C))
                c = c0 + tl.arange(0, BLOCK_C)
                sums = ()
                for q in tl.static_range(2**rank):
                    place = columns.corner_place(axes, q, s, g, INDEX)
                    total = dots[q]
                    if by_position:
                        total += tl.sum(columns.read_image(image, place, c, g, EVEN) * grad, 2)
                    sums = sums + (total,)
                    if grad_image is not None:
                        w = amplitude * sampling.corner_weight(axes, q)
                        # Channels that only pad a sample group are added to as well, by 0: where
                        # the mask is the same for four of them, one instruction adds all four.
                        touched = (valid & (w != 0.0))[:, :, None]
                        if not EVEN:
                            touched = touched & tl.max_constancy(c < g.padded, 4)
                        tl.atomic_add(
                            grad_image + (place[:, :, None] + c), grad * w[:, :, None],
                            mask=touched, sem="relaxed",
                        )  # fmt: skip
                dots = sums
            if by_position:
                sums = sampling.contract(dots, axes)
                base = (b.to(tl.int64) * g.sample_groups + s) * g.taps + k
                if grad_offset is not None:
                    for a in tl.static_range(rank):
                        value = tl.where(valid, sums[a] * amplitude, 0.0)
                        place = (base * rank + a) * g.positions + at
                        tl.store(
                            grad_offset + place, value.to(grad_offset.dtype.element_ty), mask=here
                        )
                if grad_mask is not None:
                    value = tl.where(valid, sums[rank], 0.0).to(grad_mask.dtype.element_ty)
                    tl.store(grad_mask + (base * g.positions + at), value, mask=here)


def arguments_of(
    call: Call,
    image: Operand | None,
    points: Buffer,
    by_image: Buffer | None,
    by_offset: Buffer | None,
    by_mask: Buffer | None,
) -> dict[str, Buffer | None]:
    """The arguments that this kernel, the depthwise one and Hopper's share. The image's gradient is
    filled with zeros first, since they add to it."""
    by_position = by_offset is not None or by_mask is not None
    if by_image is not None:
        call.zero(by_image)
    return dict(
        image=call.image(image) if by_position and image is not None else None,
        points=points,
        **dict(grad_image=by_image, grad_offset=by_offset, grad_mask=by_mask),
    )


def write(
    call: Call,
    image: Operand | None,
    points: Operand,
    by_image: Buffer | None,
    by_offset: Buffer | None,
    by_mask: Buffer | None,
    tiles: Tiles | None = None,
) -> None:
    sizes = call.sizes
    if tiles is None:
        name = "backward_atomic"
        if call.narrow:
            name += " narrow" if sizes.sample_groups > 1 else " few"
        tiles = call.tiles(name, sizes.group_out)
    # A block has all channels of a narrow group, so that lanes fill the sectors that they add to.
    constants = columns.blocks_of(call, tiles, NARROW)
    block_o = fit(columns.outputs_of(call, constants), tiles.block_o)
    across = triton.cdiv(sizes.positions, tiles.block_p)
    programs, taps = sizes.batch * across, triton.cdiv(sizes.taps, constants["TAPS"])
    splits = call.splits("backward_atomic", programs, tiles.warps, taps)
    hold = sizes.outputs == sizes.group_out <= block_o
    call.launch(
        *(backward_atomic, (programs, splits), dict(HOLD=hold, BLOCK_O=block_o, **constants)),
        **dict(warps=tiles.warps, stages=tiles.stages, tiles=across, splits=splits),
        **arguments_of(call, image, call.factors(points), by_image, by_offset, by_mask),
        weight=call.weight(),
    )


VARIANTS = portable("backward_atomic", write, wants_parts=True)
