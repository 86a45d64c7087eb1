"""What the Gluon kernels for Hopper share: names that differ between versions of Triton, copies by
the copy engine, and layouts of registers and shared memory."""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
)

from ..layout import Call
from ..runtime import Descriptor

# Triton 3.6 and later versions have different names for these.
barrier = getattr(gl, "thread_barrier", None) or gl.barrier
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def reinterpret(x, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    """Shared memory, seen as an array of another dtype, shape and layout."""
    if RENAMED:
        return x.reinterpret(dtype, shape, layout)
    else:
        return x._reinterpret(dtype, shape, layout)


@gluon.jit
def publish():
    """Make what was stored in shared memory visible to all threads, to tensor cores and to the copy
    engine."""
    fence_async_shared()
    barrier()


@gluon.constexpr_function
def parts_in(PRECISION):
    """How many factors stand for a number (sampling.py, Note [precision])."""
    return 2 if PRECISION == "bf16x3" else 1


@gluon.jit
def bring(source, row, column, rows, held, bars, stage, pred, PRECISION: gl.constexpr):
    """Start the copy of a block of a matrix of 16-bit numbers into a stage of a ring. In "bf16x3"
    it is a block of heads and then one of tails, which lie `rows` rows further on."""
    size: gl.constexpr = 2 * parts_in(PRECISION) * held.shape[1] * held.shape[2]
    mbarrier.expect(bars.index(stage), size, pred=pred)
    bring_parts(source, row, column, rows, held, bars, stage, pred, PRECISION)


@gluon.jit
def bring_parts(source, row, column, rows, held, bars, stage, pred, PRECISION: gl.constexpr):
    """Start the copies that `bring` starts, of which the stage's barrier has been told before."""
    parts: gl.constexpr = parts_in(PRECISION)
    for part in gl.static_range(parts):
        async_load(
            source, [row + part * rows, column], bars.index(stage),
            held.index(stage * parts + part), pred=pred,
        )  # fmt: skip


@gluon.jit
def await_full(bars, i, pred=True):
    """Wait until a ring's i-th blocks have arrived, and return their stage."""
    stage = i % bars.shape[0]
    mbarrier.wait(bars.index(stage), (i // bars.shape[0]) & 1, pred=pred)
    return stage


@gluon.jit
def factor(held, i, PRECISION: gl.constexpr, TURNED: gl.constexpr = False):
    """The parts of the i-th factor in shared memory, or (TURNED) of its transpose."""
    count: gl.constexpr = parts_in(PRECISION)
    parts = ()
    for part in gl.static_range(count):
        x = held.index(i * count + part)
        if TURNED:
            x = x.permute((1, 0))
        parts = parts + (x,)
    return parts


@gluon.jit
def allocate_bars(count: gl.constexpr, arrivals: gl.constexpr = 1):
    """Allocate barriers that open after this many arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(count):
        mbarrier.init(bars.index(s), count=arrivals)
    return bars


@gluon.jit
def fill(held, num_warps: gl.constexpr):
    """Fill shared memory with zeros."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    rows: gl.constexpr = held.shape[0]
    columns: gl.constexpr = held.shape[1]
    held.store(gl.zeros([rows, columns], held.dtype, layout=layout))


@gluon.jit
def product_of_zeros(x, y, MMA: gl.constexpr):
    """A product of zeros, as the first value of a sum in a loop. ptxas makes all products wait for
    one another if, as far as it sees at a loop's head, the sum may not come from a product."""
    publish()
    rows: gl.constexpr = x.shape[0]
    columns: gl.constexpr = y.shape[1]
    acc = gl.zeros([rows, columns], gl.float32, layout=MMA)
    return warpgroup_mma(x, y, acc, use_acc=False, is_async=True)


@gluon.jit
def multiply(x, y, acc, use_acc: gl.constexpr = True):
    """Start acc + x @ y, or x @ y without use_acc, on factors in parts (sampling.py,
    Note [precision])."""
    if len(x) > 1:
        acc = warpgroup_mma(x[1], y[0], acc, use_acc=use_acc, is_async=True)
        acc = warpgroup_mma(x[0], y[1], acc, is_async=True)
        return warpgroup_mma(x[0], y[0], acc, is_async=True)
    else:
        return warpgroup_mma(x[0], y[0], acc, use_acc=use_acc, is_async=True)


@gluon.jit
def store_points(out, x, p, o, inside, g, LAST: gl.constexpr, VECTOR_P: gl.constexpr):
    """Store a tile of points in one batch item, [P, O] with LAST, else [O, P]; VECTOR_P neighbours
    may be stored at once."""
    inside = inside[:, None] & (o < g.outputs)[None, :]
    if LAST:
        gl.store(out + ((p * g.outputs)[:, None] + o[None, :]), x, mask=inside)
    else:
        # A hint holds for all uses of the value that it is given, so these values are made here and
        # shared with nothing else.
        place = gl.multiple_of((o * g.positions)[None, :] + p[:, None], (VECTOR_P, 1))
        here = gl.max_constancy(inside, (VECTOR_P, 1))
        gl.store(out + gl.max_contiguous(place, (VECTOR_P, 1)), x, mask=here)


def takes_any(call: Call) -> bool:
    """Whether a call has what all of these kernels need."""
    return call.by_blocks and call.sizes.padded_outputs % 64 == 0


def takes_wide(call: Call) -> bool:
    """Whether a call has what the kernels need that take blocks of a sample group's channels, which
    includes sizes that fit into 32 bits."""
    n = call.sizes
    return (
        takes_any(call)
        and n.padded % 32 == 0
        and not (call.narrow and n.sample_groups > 1)
        and max(n.item, n.positions * n.padded_outputs) < 2**31
        and n.pixels * 4 ** len(n.image) < 2**31
        and 2 * n.batch * n.positions < 2**31
        and n.sample_groups * n.taps * n.padded_outputs < 2**31
    )


@gluon.jit
def parted(unit, g, SEVERAL: gl.constexpr):
    """The sample group and the tap of a unit. A unit is one tap of one sample group; those of a
    sample group follow each other. SEVERAL says that there is more than one sample group."""
    if SEVERAL:
        return unit // g.taps, unit % g.taps
    else:
        return 0, unit


def mma_layout(columns: int, warps: int) -> Any:
    """The layout of a sum of products of which each warp has 16 rows."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, columns, 16]
    )


def block(*shape: int, dtype: torch.dtype) -> Descriptor:
    """The descriptor of a factor, which is bfloat16 where float32 numbers are written as parts."""
    kind = gl.float16 if dtype == torch.float16 else gl.bfloat16
    return Descriptor(shape, gl.NVMMASharedLayout.get_default_for(list(shape), kind))


def rows_layout(rows: int, channels: int, warps: int, run: int = 8) -> Any:
    """The layout that gives a lane eight consecutive channels of a row, as a product does if its
    factor's channels are permuted (prepare.py, accumulator_order). With `run` 4 a lane has two runs
    of four channels, 16 apart."""
    registers = [[0, 1], [0, 2], [0, 12 - run]]
    registers += [[0, 32 << i] for i in range((channels // 32).bit_length() - 1)] + [[8, 0]]
    lanes = [[0, run], [0, 16], [1, 0], [2, 0], [4, 0]]
    warp = [[16 << i, 0] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, warp, [], [rows, channels])
