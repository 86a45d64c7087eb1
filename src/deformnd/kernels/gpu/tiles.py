"""Tile sizes and costs of GPUs: one table for an architecture, and one for all others.

A row is right for every size: it only decides how fast, and nothing is tuned on a user's call. The
first row that fits is taken: those of the device's own table, then those for every GPU. To tune
another GPU, give it a table in TABLES. Measured on an NVIDIA H200 with torch 2.11 and Triton 3.6,
on shapes of two dimensions with 3 x 3 and 7 x 7 taps; benchmarks/gpu_tune.py tries others.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Tiles:
    operation: str  # a kernel's name; for "deep" or "narrow" sample groups, "few" channels in all
    width: int  # bytes of an element of the image
    channels: int  # up to so many point channels of a weight group (sorted: of a sample group's)
    block_p: int  # positions of a program (sorted: list entries; for Hopper: pixels of a tile;
    # attention: rows)
    block_o: int  # point channels (attention: blocks of channels in the same lanes)
    block_c: int  # image channels
    warps: int
    stages: int
    resident: int = 0  # programs on a multiprocessor at most; 0: as many as fit
    registers: int = 0  # of a thread at most; 0: as many as the compiler likes
    tiles: int = 1  # backward_sorted_hopper: tiles of the image of a program,
    rings: tuple[int, ...] = ()  # and stages of points (or columns), blends and weights


ANY = 1 << 31

# Some other tiles of "backward_sorted" compile to wrong machine code for Hopper with Triton 3.6:
# 32/64/64/4/1 with many sample groups, and 64 point channels beside 32 image channels where neither
# count is even. tests/test_gpu.py, unset_registers, looks for that in every row it compiles.
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
    Tiles("forward_im2col", 4, ANY, 128, 128, 32, 8, 3),
    Tiles("backward_weight_im2col", 2, ANY, 64, 128, 128, 8, 3),
    Tiles("backward_weight_im2col", 4, ANY, 32, 128, 128, 8, 3),
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
    Tiles("backward_atomic_hopper", 2, 128, 64, 128, 32, 4, 3),
    Tiles("backward_atomic_hopper", 2, 256, 64, 256, 64, 4, 2),
    Tiles("backward_atomic_hopper", 2, 512, 64, 256, 64, 4, 4),
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

# For GPUs without Hopper's products, where both factors go through registers, and with as little
# shared memory as those of workstations have (99 KiB for a program): where rows of PORTABLE do not
# fit, or spill many registers, blocks that do not. Chosen by what they compile to, not timed.
AMPERE = (
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

# Of the last variant of every operation, which fits any device.
SMALLEST = Tiles("", 0, ANY, block_p=32, block_o=32, block_c=32, warps=4, stages=1)

# By architecture, as torch and Triton name it ("sm_90", "gfx942").
TABLES: dict[str, tuple[Tiles, ...]] = {"sm_90": HOPPER} | dict.fromkeys(
    ("sm_80", "sm_86", "sm_87", "sm_89", "sm_120", "sm_121"), AMPERE
)

# What backward_weight_hopper weighs against each other, measured on an H200, whose memory moves
# 4.8 TB/s at best: microseconds of a program's tile, and bytes of partial sums in a microsecond.
TILE_US, BANDWIDTH = 1.6, 4e6

# Architectures with kernels that take whole blocks of channels, and whose calls therefore pad them
# (layout.py, sizes_of).
BLOCKS = frozenset(("sm_90",))

# Above so many outputs samples are written down as columns (im2col.py), instead of being
# found anew for several blocks of outputs; and by Hopper's narrow kernel above so many, by
# precision. Of columns there are so many numbers at once: 32 MiB of half ones.
SAMPLED_ONCE = 128
SAMPLED_ONCE_NARROW = {"native": 256, "bf16x3": ANY}
COLUMNS_AT_ONCE = 16 << 20

# What it takes to write and add a number of a partial sum, in products of half numbers (im2col.py).
PART = 300

# From so many bytes of a sample group's channels on the portable forward loads samples ahead; with
# fewer it has too much else to do.
DEEP = 512

# Sample groups of at most so many channels are taken several at a time, a single one of half as
# many for several taps at a time, and their image gradient goes by atomic additions.
NARROW = 32

# Depthwise kernels take up to so many of the points' channels for one of the image's: more sums do
# not fit into registers.
MOST = 4

# In so few weights of a group and tap the errors of "bf16x3" (sampling.py, Note [precision]) do not
# average out, and "tf32x3", which takes their place, is no bottleneck.
FEW = 16

# A weight of several groups is taken for one of a single group (layout.py, Call) where image and
# points have at most so many channels each, by precision: on most architectures, and on BLOCKS.
SPREAD = {"native": 192, "bf16x3": 128, "tf32x3": 128, "tf32": 128, "ieee": 128}
SPREAD_BY_BLOCKS = SPREAD | {"native": 256, "bf16x3": 256}

# A batch is taken in chunks where a call would need more scratch memory at once (in elements of the
# image), as long as a chunk has about so many positions: four waves of programs of 64 on an H200,
# whose 132 multiprocessors hold two each.
SCRATCH = 35 << 20
CHUNK = 65536

# Columns of so many numbers at most are there at once (hopper/backward_columns.py): 64 MiB. Half
# as many would stay in the cache of an H200, but would take twice the launches, which costs more.
COLUMNS = 32 << 20

# So many chunks' gradients of the weight are kept before they are added.
KEPT = 8

# Positions that are listed at once for the sorted image gradient.
LISTED = 512

# Samples of a list at most that are sorted at once, in the usual case and at all.
SHORT, LONG = 128, 1024

# Tiles of the image for the sorted image gradient, and of the positions for the weight gradient on
# Hopper, by rank: 64 each.
IMAGE_TILES = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}
POSITION_TILES = {1: (64,), 2: (8, 8), 3: (1, 8, 8)}


class Device(NamedTuple):
    architecture: str
    multiprocessors: int
    shared_memory: int  # bytes of each, of which a program takes 1024 beside its own


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
