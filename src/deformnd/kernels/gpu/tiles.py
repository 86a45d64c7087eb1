"""Tile sizes and costs of GPUs: one table for an architecture, and one for all others.

Every row gives right results for every size: it only decides how fast a call is, and nothing is
tuned on a user's call. `find` takes the first row that fits, from the device's own table and then
from the one for every GPU. To tune another GPU, give it a table in TABLES. The rows were measured
on an NVIDIA H200 with torch 2.11 and Triton 3.6, on shapes of two dimensions with 3 x 3 and 7 x 7
taps; benchmarks/gpu_tune.py tries other rows.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Tiles:
    operation: str  # a kernel's name, and which calls of it: "deep", "narrow" or "few"
    width: int  # bytes of an element of the image
    channels: int  # the most channels that the row is for; callers of `find` say which are counted
    block_p: int  # positions of a program (for sorted kernels list entries, and for those on Hopper
    # pixels of a tile; for attention rows)
    block_o: int  # point channels of a block (attention: blocks of channels in the same lanes)
    block_c: int  # image channels of a block
    warps: int
    stages: int
    resident: int = 0  # the most programs on a multiprocessor; 0 means as many as fit
    registers: int = 0  # the most registers of a thread; 0 leaves it to the compiler
    tiles: int = 1  # tiles of the image that a program of backward_sorted_hopper takes
    rings: tuple[int, ...] = ()  # the stages of points (or columns), of blends and of weights


ANY = 1 << 31

# Some other tiles of "backward_sorted" compile to wrong machine code for Hopper with Triton 3.6:
# 32/64/64/4/1 with many sample groups, and 64 point channels beside 32 image channels where neither
# count is even. unset_registers in tests/test_gpu.py looks for such code in every row it compiles.
PORTABLE = (
    Tiles("forward", 2, 32, 64, 32, 32, 4, 1),
    Tiles("forward", 2, 64, 64, 64, 32, 4, 1),
    Tiles("forward", 2, ANY, 64, 128, 32, 4, 1),
    Tiles("forward", 4, 64, 64, 64, 32, 4, 1),
    Tiles("forward", 4, ANY, 64, 128, 32, 4, 1),
    Tiles("forward deep", 2, 64, 64, 64, 32, 4, 2),
    Tiles("forward deep", 2, 128, 64, 128, 32, 4, 2),
    Tiles("forward deep", 2, 256, 128, 256, 32, 8, 1),
    Tiles("forward deep", 2, ANY, 64, 512, 32, 8, 2),
    Tiles("forward deep", 4, 64, 128, 64, 16, 4, 2),
    Tiles("forward deep", 4, 128, 64, 128, 32, 4, 2),
    Tiles("forward deep", 4, ANY, 128, 256, 16, 8, 2),
    Tiles("forward narrow", 2, 64, 64, 64, 32, 4, 1),
    Tiles("forward narrow", 2, ANY, 64, 128, 32, 4, 1),
    Tiles("forward narrow", 4, 64, 64, 64, 16, 4, 1),
    Tiles("forward narrow", 4, ANY, 64, 128, 32, 4, 1),
    Tiles("forward_im2col", 2, 64, 128, 64, 64, 4, 3),
    Tiles("forward_im2col", 2, ANY, 128, 128, 64, 8, 3),
    Tiles("forward_im2col", 4, 64, 128, 64, 32, 4, 3),
    Tiles("forward_im2col", 4, ANY, 128, 128, 32, 4, 3),
    Tiles("backward_weight_im2col", 2, ANY, 64, 128, 128, 8, 3),
    Tiles("backward_weight_im2col", 4, ANY, 32, 128, 128, 8, 3),
    Tiles("backward_atomic_im2col", 2, 64, 128, 64, 64, 4, 3),
    Tiles("backward_atomic_im2col", 2, ANY, 128, 64, 128, 8, 3),
    Tiles("backward_atomic_im2col", 4, 64, 128, 32, 64, 4, 3),
    Tiles("backward_atomic_im2col", 4, ANY, 128, 32, 128, 4, 3),
    Tiles("backward_atomic", 2, 128, 64, 128, 32, 4, 1),
    Tiles("backward_atomic", 2, 256, 64, 256, 32, 4, 1),
    Tiles("backward_atomic", 2, ANY, 64, 64, 64, 4, 2),
    Tiles("backward_atomic", 4, 64, 128, 64, 32, 4, 3),
    Tiles("backward_atomic", 4, 128, 64, 128, 32, 4, 2),
    Tiles("backward_atomic", 4, ANY, 128, 64, 64, 8, 3),
    Tiles("backward_atomic few", 2, ANY, 64, 64, 16, 4, 1),
    Tiles("backward_atomic few", 4, ANY, 64, 64, 16, 4, 1),
    Tiles("backward_atomic narrow", 2, 64, 64, 64, 32, 4, 1),
    Tiles("backward_atomic narrow", 2, 128, 64, 128, 32, 4, 1),
    Tiles("backward_atomic narrow", 2, ANY, 64, 256, 32, 4, 1),
    Tiles("backward_atomic narrow", 4, 64, 32, 64, 64, 4, 1),
    Tiles("backward_atomic narrow", 4, ANY, 64, 64, 32, 4, 1),
    Tiles("backward_sorted", 2, 32, 128, 32, 32, 4, 2),
    Tiles("backward_sorted", 2, 64, 128, 64, 64, 4, 2),
    Tiles("backward_sorted", 2, 128, 128, 32, 128, 4, 3),
    Tiles("backward_sorted", 2, ANY, 128, 32, 256, 4, 3),
    Tiles("backward_sorted", 4, ANY, 64, 32, 64, 4, 1),
    Tiles("backward_sorted_im2col", 2, ANY, 32, 0, 32, 1, 2),
    Tiles("backward_sorted_im2col", 4, 16, 32, 0, 16, 1, 2),
    Tiles("backward_sorted_im2col", 4, 64, 32, 0, 64, 2, 1),
    Tiles("backward_sorted_im2col", 4, ANY, 32, 0, 128, 4, 1),
    Tiles("backward_sorted depthwise", 2, ANY, 128, 32, 128, 4, 1),
    Tiles("backward_sorted depthwise", 4, ANY, 64, 32, 64, 4, 1),
    Tiles("backward_weight", 2, 64, 64, 64, 64, 4, 2),
    Tiles("backward_weight", 2, 128, 64, 128, 64, 8, 1),
    Tiles("backward_weight", 2, ANY, 64, 256, 64, 4, 1),
    Tiles("backward_weight", 4, 64, 32, 64, 64, 4, 1),
    Tiles("backward_weight", 4, 128, 64, 128, 64, 4, 1),
    Tiles("backward_weight", 4, ANY, 64, 256, 64, 8, 1),
    Tiles("backward_weight narrow", 2, 64, 64, 64, 32, 4, 1),
    Tiles("backward_weight narrow", 2, ANY, 64, 128, 32, 4, 1),
    Tiles("backward_weight narrow", 4, ANY, 32, 128, 32, 4, 1),
    Tiles("forward_attention", 2, 8, 128, 1, 8, 4, 1),
    Tiles("forward_attention", 2, 32, 64, 1, 32, 4, 1),
    Tiles("forward_attention", 2, 64, 32, 1, 64, 4, 1),
    Tiles("forward_attention", 2, ANY, 32, 2, 64, 4, 1),
    Tiles("forward_attention", 4, 16, 64, 1, 16, 4, 1),
    Tiles("forward_attention", 4, 32, 32, 1, 32, 4, 1),
    Tiles("forward_attention", 4, ANY, 32, 2, 32, 4, 1),
    Tiles("backward_attention", 2, 16, 32, 1, 16, 4, 1),
    Tiles("backward_attention", 2, ANY, 16, 4, 32, 4, 1),
    Tiles("backward_attention", 4, 16, 32, 1, 16, 4, 1),
    Tiles("backward_attention", 4, ANY, 16, 4, 32, 4, 1),
    Tiles("backward_sorted_attention", 2, ANY, 32, 1, 32, 4, 1),
    Tiles("backward_sorted_attention", 4, ANY, 32, 1, 32, 4, 1),
)

HOPPER = (
    Tiles("forward_hopper", 2, 64, 64, 64, 64, 4, 2, registers=128),
    Tiles("forward_hopper", 2, 128, 64, 128, 64, 4, 2, resident=2),
    Tiles("forward_hopper", 2, ANY, 64, 256, 64, 4, 2),
    Tiles("forward_hopper", 4, 64, 64, 64, 32, 4, 2, registers=128),
    Tiles("forward_hopper", 4, 128, 64, 128, 32, 4, 2, resident=2),
    Tiles("forward_hopper", 4, ANY, 64, 256, 32, 4, 2),
    Tiles("forward_product_hopper", 2, ANY, 128, 128, 64, 4, 3, resident=2),
    Tiles("forward_product_hopper", 4, ANY, 128, 128, 64, 8, 3, resident=1),
    Tiles("forward_hopper 3d", 2, 64, 64, 64, 64, 4, 2),
    Tiles("forward_hopper 3d", 2, ANY, 64, 128, 32, 4, 2, registers=168),
    Tiles("forward_hopper 3d", 4, 64, 64, 64, 32, 4, 2),
    Tiles("forward_hopper 3d", 4, ANY, 64, 128, 32, 4, 2),
    Tiles("forward_narrow_hopper", 2, 64, 64, 64, 32, 4, 2, registers=128),
    Tiles("forward_narrow_hopper", 2, 128, 64, 128, 64, 4, 2),
    Tiles("forward_narrow_hopper", 2, ANY, 64, 256, 32, 4, 2),
    Tiles("forward_narrow_hopper", 4, 64, 64, 64, 32, 4, 2),
    Tiles("forward_narrow_hopper", 4, 128, 64, 128, 32, 4, 2),
    Tiles("forward_narrow_hopper", 4, ANY, 64, 256, 32, 4, 2),
    Tiles("backward_narrow_hopper", 2, ANY, 64, 128, 32, 4, 2, resident=2),
    Tiles("backward_narrow_hopper", 4, ANY, 64, 128, 32, 4, 2, resident=2),
    Tiles("backward_atomic_hopper", 2, 128, 64, 128, 64, 4, 3),
    Tiles("backward_atomic_hopper", 2, 256, 64, 256, 64, 4, 2),
    Tiles("backward_atomic_hopper", 2, 512, 64, 256, 64, 4, 3),
    Tiles("backward_atomic_hopper", 2, ANY, 64, 256, 32, 4, 3),
    Tiles("backward_atomic_hopper", 4, 128, 64, 128, 32, 4, 2),
    Tiles("backward_atomic_hopper", 4, 256, 128, 256, 32, 8, 2),
    Tiles("backward_atomic_hopper", 4, ANY, 64, 256, 32, 4, 3),
    Tiles("backward_weight_hopper", 2, 64, 64, 64, 64, 4, 2, resident=4),
    Tiles("backward_weight_hopper", 2, 128, 64, 128, 64, 4, 2, resident=3),
    Tiles("backward_weight_hopper", 2, ANY, 64, 256, 64, 4, 2, resident=2),
    Tiles("backward_weight_hopper", 4, 64, 64, 64, 64, 4, 2, resident=2),
    Tiles("backward_weight_hopper", 4, 128, 64, 128, 64, 8, 2, resident=1),
    Tiles("backward_weight_hopper", 4, ANY, 64, 256, 64, 8, 2, resident=1),
    Tiles("backward_weight_hopper 3d", 2, 64, 64, 64, 64, 4, 2, resident=2),
    Tiles("backward_weight_hopper 3d", 2, ANY, 64, 128, 64, 4, 2, resident=2),
    Tiles("backward_weight_hopper 3d", 4, ANY, 64, 64, 64, 8, 2, resident=1),
    Tiles("backward_sorted_hopper", 2, 64, 64, 64, 64, 4, 1, 2, 104, tiles=1, rings=(2, 2, 2)),
    Tiles("backward_sorted_hopper", 2, 128, 64, 64, 128, 4, 1, 2, 136, tiles=1, rings=(2, 2, 2)),
    Tiles("backward_sorted_hopper", 2, ANY, 64, 64, 256, 4, 1, 1, 192, tiles=2, rings=(2, 2, 3)),
    Tiles("multiply_columns_hopper", 2, ANY, 128, 64, 128, 8, 1),
    Tiles("backward_columns_hopper", 2, 64, 64, 0, 64, 4, 1, 3, 72, rings=(4, 2)),
    Tiles("backward_columns_hopper", 2, ANY, 64, 0, 128, 4, 1, 2, 104, rings=(4, 3)),
)

# These rows are for GPUs without Hopper's products, where both factors go through registers, and
# for as little shared memory as GPUs of workstations have (99 KiB for a program). They replace the
# rows of PORTABLE that do not fit there or spill many registers. They were chosen by what they
# compile to and have not been timed.
AMPERE = (
    Tiles("forward_im2col", 4, ANY, 128, 128, 32, 8, 3),
    Tiles("backward_atomic_im2col", 4, ANY, 128, 32, 128, 8, 3),
    Tiles("forward deep", 2, 256, 64, 256, 64, 8, 2),
    Tiles("forward deep", 4, 64, 64, 64, 32, 4, 2),
    Tiles("forward deep", 4, 128, 64, 128, 16, 4, 2),
    Tiles("forward deep", 4, ANY, 64, 256, 32, 8, 2),
    Tiles("backward_atomic", 2, 32, 64, 128, 32, 8, 1),
    Tiles("backward_atomic", 4, 64, 64, 64, 32, 8, 2),
    Tiles("backward_atomic", 4, 128, 64, 128, 32, 8, 2),
    Tiles("backward_atomic", 4, ANY, 64, 64, 64, 8, 2),
    Tiles("backward_sorted", 2, 32, 128, 32, 32, 4, 2),
    Tiles("backward_sorted", 2, 64, 128, 64, 64, 4, 2),
    Tiles("backward_sorted", 2, 128, 128, 32, 128, 4, 3),
    Tiles("backward_sorted", 2, ANY, 128, 32, 256, 8, 2),
)

# The last variant of every operation takes this row, which fits any device.
SMALLEST = Tiles("", 0, ANY, block_p=32, block_o=32, block_c=32, warps=4, stages=1)

# The tables are found by architecture, as torch and Triton name it ("sm_90", "gfx942").
TABLES: dict[str, tuple[Tiles, ...]] = {"sm_90": HOPPER} | dict.fromkeys(
    ("sm_80", "sm_86", "sm_87", "sm_89", "sm_120", "sm_121"), AMPERE
)


class Costs(NamedTuple):
    """How long a kernel takes for a unit of its sums."""

    warps: int  # that a multiprocessor runs at once in half precision; in float32 half as many
    alone: float  # microseconds that a unit takes at least for each time it waits for memory
    beside: float  # microseconds of a multiprocessor for a unit's work, which its programs share


# These costs decide into how many parts sums are split (layout.py, Call.splits). What a unit is,
# the callers say: some taps, a tap of one sample group, a block of columns, or a tile of positions.
# In the first four kernels its work is the bytes that it samples, in the next three (im2col.py) and
# the last one its products, in the one before the last its blocks of channels, and in the others 1.
# benchmarks/gpu_costs.py fits them; these are of an H200.
COSTS = {
    "forward": Costs(16, 1.0, 1 / 12_000),
    "forward narrow": Costs(24, 1.9, 1 / 7_300),
    "forward_hopper": Costs(16, 0.38, 1 / 26_000),
    "forward_narrow_hopper": Costs(16, 0.42, 1 / 24_000),
    "forward_im2col": Costs(16, 0.33, 1 / 2_600_000),
    "forward_product_hopper": Costs(8, 0.25, 1 / 5_000_000),
    "backward_weight_im2col": Costs(24, 0.27, 1 / 2_000_000),
    "forward_few": Costs(32, 0.62, 0.28),
    "backward_weight": Costs(32, 1.3, 0.41),
    "backward_weight_depthwise": Costs(48, 0.71, 0.24),
    "backward_weight_hopper": Costs(16, 1.3, 1.0),
    "backward_atomic": Costs(48, 2.6, 0.85),
    "backward_atomic_depthwise": Costs(32, 10.0, 0.02),
    "backward_atomic_hopper": Costs(16, 1.7, 1.5),
    "backward_atomic_hopper wide": Costs(12, 1.5, 0.675),
    "multiply_columns_hopper": Costs(8, 1.7, 1 / 2_200_000),
}

# The start and end of a program take START_US. To add parts takes ADD_US, and memory writes and
# reads them at BANDWIDTH bytes in a microsecond. A forward has at most PARTS, unless its sums would
# be too long (LONGEST).
START_US, ADD_US, BANDWIDTH = 1.5, 1.2, 4e6
PARTS = 16

# These architectures have kernels that take whole blocks of channels. Calls for those pad the
# channels to whole blocks (layout.py, sizes_of).
BLOCKS = frozenset(("sm_90",))

# With more outputs than SAMPLED_ONCE, by precision, samples are written to memory as columns
# (im2col.py) instead of being found anew for each block of outputs. In half precision a forward of
# a single weight group does so with more than FORWARD_ONCE, while there are at most MANY columns.
# With more than MANY, forward.py takes FULL outputs, in one block that is nearly full. MANY is so
# many times 32 MiB for each byte of an element.
SAMPLED_ONCE = {"native": 112, "bf16x3": 128, "tf32x3": 128, "tf32": 128, "ieee": 128}
FORWARD_ONCE, FULL, MANY = 64, range(225, 257), 1.5

# Hopper's kernels for the forward give way to im2col.py where they would find samples anew for each
# block of 256 outputs (in three dimensions of 128), and where few positions fill few of their
# programs. But to write many columns down costs more. So with more outputs than the first number
# of a pair they give way, while all columns take no more than the second number times 32 MiB. By
# precision, the tuples are for sample groups of up to 8 channels, other narrow ones and wide ones,
# each in one, two and three dimensions.
ALWAYS = math.inf
NARROWEST = ((512, ALWAYS), (256, 1))
IN_LINE, IN_PLANE = ((256, 0.5),), ((512, ALWAYS), (256, 3), (128, 1))  # of wide ones
GIVES_WAY = {
    "native": (
        (NARROWEST,) * 3,
        (((256, ALWAYS), (128, 1)), ((256, ALWAYS), (128, 1)), ((256, ALWAYS), (0, 3))),
        (IN_LINE, IN_PLANE, ((128, ALWAYS), (0, 0.5))),
    ),
    "bf16x3": (
        (NARROWEST,) * 3,
        (((384, ALWAYS), (128, 1)), ((384, ALWAYS), (128, 1)), ((384, ALWAYS), (0, 3))),
        (IN_LINE, IN_PLANE, ((256, ALWAYS), (128, 3), (0, 0.5))),
    ),
}

# Where the image's gradient is wanted alone, Hopper's kernel for it is faster than im2col.py if
# each multiprocessor has at least this many POSITIONS (im2col.py, atomic_beats_hopper).
POSITIONS = 100

# At least COLUMNS_AT_ONCE numbers of columns are kept at once, which are 32 MiB in half precision
# and stay in the cache, or half as many float32 gradients of samples, of which there are at most
# LOTS lots. Each lot costs two launches. Where memory is not short, a lot may have this SHARE of
# what is left (im2col.py).
COLUMNS_AT_ONCE = 16 << 20
LOTS = 64
SHARE = 0.75

# Columns are also written for several weight groups where each has at least this many columns of a
# tap and outputs (im2col.py, takes_groups).
WIDE = 32

# From this many outputs on, one product may write the gradients of all samples (im2col.py,
# takes_atomic). With fewer a product is short, and writing its result costs more than it saves.
PRODUCT_FIRST = 24

# With a single sample group, this holds for sums from sorted lists (im2col.py, takes_sorted) with
# more than this many outputs.
SORTED_ONCE = 64

# Tensor cores round sums toward zero. Where float32 numbers are multiplied as parts, a sum errs by
# 3.6e-6 of itself for every thousand products in it, so sums of more than LONGEST are split. The
# longest ones, over the positions, are added up outside of the tensor cores (columns.py, dot_once).
LONGEST = 2304

# The portable forward loads samples ahead where a sample group's channels have at least this many
# bytes. With fewer it is busy with other work, and loading ahead does not pay.
DEEP = 512

# With a single tap, at most SINGLE bytes of channels and at most SINGLE_OUTPUTS, forward.py takes
# calls that other variants would take as well (takes_single).
SINGLE, SINGLE_OUTPUTS = 384, 256

# Sample groups of at most this many channels are narrow: a program takes several of them at a time.
# A single sample group is narrow with at most half as many, and then a program takes several taps
# at a time.
NARROW = 32

# The kernels of depthwise.py take at most this many channels of the points for one channel of the
# image, because more sums do not fit into registers. So a convolution has few outputs if it has at
# most as many.
MOST = 4

# With fewer weights than this in a group and tap, the errors of "bf16x3" (sampling.py,
# Note [precision]) do not average out. "tf32x3" takes its place, and is no bottleneck there.
FEW = 16

# A weight of several groups is treated as one of a single group (layout.py, Call) where image and
# points each have at most this many channels, by precision. SPREAD_BY_BLOCKS holds for the
# architectures in BLOCKS, and SPREAD for all others.
SPREAD = {"native": 192, "bf16x3": 128, "tf32x3": 128, "tf32": 128, "ieee": 128}
SPREAD_BY_BLOCKS = SPREAD | {"native": 256, "bf16x3": 256}

# A batch is taken in chunks where a call would need more than SCRATCH elements, of the image's
# dtype, of scratch memory at once. A chunk keeps about CHUNK positions, which make four waves of
# programs of 64 positions on an H200, whose 132 multiprocessors hold two programs each.
SCRATCH = 35 << 20
CHUNK = 65536

# hopper/backward_columns.py keeps columns of at most this many numbers at once, which is 64 MiB.
# Half as many would stay in the cache of an H200 but take twice the launches, which costs more.
COLUMNS = 32 << 20

# The gradients of the weight of this many chunks are kept before they are added up.
KEPT = 8

# In half precision the image gradient comes from sorted lists instead of atomic additions
# (strategy.py, _by_sorting) where these would go to more than ADDED sectors of 32 bytes, by kernels
# that take whole blocks of channels ADDED_BY_BLOCKS, in depthwise calls ADDED_DEPTHWISE. An H200
# adds to 100 of them in a nanosecond. Where there are several sample groups, each needs
# SORTED_CHANNELS.
ADDED, ADDED_BY_BLOCKS, ADDED_DEPTHWISE, SORTED_CHANNELS = 9_000_000, 5_000_000, 30_000_000, 96

# This many positions are listed at a time for the sorted image gradient.
LISTED = 128

# Most lists have at most SHORT samples and are sorted at once as lists of that size. Those of at
# most LONG samples are sorted as lists of that larger size. Longer ones are written anew, in order
# (backward_sorted.py).
SHORT, LONG = 128, 1024

# By rank, the tiles of the image for the sorted image gradient and of the positions for the weight
# gradient on Hopper. Each tile has 64 pixels or positions.
IMAGE_TILES = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}
POSITION_TILES = {1: (64,), 2: (8, 8), 3: (1, 8, 8)}


class Device(NamedTuple):
    architecture: str
    multiprocessors: int
    shared_memory: int  # bytes of each multiprocessor; each program takes 1024 beside its own


@functools.cache
def device_of(device: torch.device) -> Device:
    if device.type == "cpu":
        return Device("interpreter", 4, 228 << 10)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        architecture = str(properties.gcnArchName).split(":")[0]
    else:
        architecture = f"sm_{properties.major}{properties.minor}"
    shared = getattr(properties, "shared_memory_per_multiprocessor", 64 << 10)
    return Device(architecture, properties.multi_processor_count, shared)


def find(architecture: str, operation: str, width: int, channels: int) -> Tiles:
    rows: tuple[Tiles, ...] = (*TABLES.get(architecture, ()), *PORTABLE)
    for row in rows:
        if (row.operation, row.width) == (operation, width) and channels <= row.channels:
            return row
    raise LookupError(f"no tiles for {operation}, width {width}")
