"""Tile sizes, by operator, element width and channels; nothing is tuned on a user's call.

A row is right for every size: it only decides how fast. The first row that fits is taken.
Measured on an NVIDIA H200 with torch 2.11 and Triton 3.6, on shapes of two dimensions with 3 x 3
and 7 x 7 kernel points; benchmarks/gpu_tune.py tries others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar


@dataclass(frozen=True)
class Row:
    operator: str
    width: int  # bytes of an element of the image
    channels: int  # up to so many point channels of a group (inverse: image channels of a unit)
    block_p: int  # positions (inverse: list entries) of a program
    block_o: int  # point channels
    block_c: int  # image channels
    warps: int
    stages: int


ANY = 1 << 31

# Tiles for one unit at a time (kernels.py, Note [units]), then for many, or for many kernel points
# ("narrow").
#
# Some other tiles of "inverse" compile to wrong machine code for Hopper with Triton 3.6:
# 32/64/64/4/1 with many units, and 64 point channels beside 32 image channels where neither count
# is even.
# tests/test_triton.py, unset_registers, looks for that in every row it compiles.
TABLE = (
    Row("gather", 2, 32, 128, 32, 32, 4, 2),
    Row("gather", 2, 64, 64, 64, 32, 4, 1),
    Row("gather", 2, 128, 128, 128, 32, 4, 3),
    Row("gather", 2, ANY, 64, 256, 64, 8, 3),
    Row("gather", 4, 64, 128, 64, 32, 4, 2),
    Row("gather", 4, 128, 64, 128, 32, 4, 2),
    Row("gather", 4, ANY, 128, 256, 32, 8, 1),
    Row("gather narrow", 2, 64, 64, 64, 32, 4, 1),
    Row("gather narrow", 2, ANY, 128, 128, 32, 4, 2),
    Row("gather narrow", 4, ANY, 128, 64, 32, 4, 1),
    Row("spread", 2, 128, 64, 128, 32, 4, 2),
    Row("spread", 2, 256, 64, 256, 64, 4, 2),
    Row("spread", 2, ANY, 64, 64, 64, 4, 2),
    Row("spread", 4, 64, 128, 64, 32, 4, 3),
    Row("spread", 4, 128, 64, 128, 32, 4, 2),
    Row("spread", 4, ANY, 128, 64, 64, 8, 3),
    Row("spread narrow", 2, 64, 64, 64, 32, 4, 1),
    Row("spread narrow", 2, 128, 128, 128, 32, 4, 1),
    Row("spread narrow", 2, ANY, 64, 64, 32, 4, 2),
    Row("spread narrow", 4, ANY, 32, 64, 64, 4, 1),
    Row("inverse", 2, 32, 128, 32, 32, 4, 2),
    Row("inverse", 2, 64, 128, 64, 64, 4, 2),
    Row("inverse", 2, 128, 128, 32, 128, 4, 3),
    Row("inverse", 2, ANY, 128, 32, 256, 4, 3),
    Row("inverse", 4, ANY, 64, 32, 64, 4, 1),
    Row("weight", 2, 64, 64, 64, 64, 4, 2),
    Row("weight", 2, ANY, 64, 256, 64, 4, 1),
    Row("weight", 4, 64, 32, 64, 64, 4, 1),
    Row("weight", 4, ANY, 64, 256, 64, 8, 1),
    Row("weight narrow", 2, 64, 64, 64, 32, 4, 1),
    Row("weight narrow", 2, ANY, 64, 128, 32, 4, 1),
    Row("weight narrow", 4, ANY, 32, 64, 32, 4, 1),
)

# Units of at most so many channels are taken several at a time, a single one of half as many for
# several kernel points at a time, and their image gradient goes by atomic additions.
NARROW = 32

# In so few weights of a group and kernel point the errors of "split" (kernels.py) do not average
# out, and plain float32 products are no bottleneck.
FEW = 1024

# A batch is taken in pieces where a call would need more scratch memory at once (in elements of the
# image), as long as a piece has about so many positions: four waves of programs of 64 on an H200,
# whose 132 multiprocessors hold two each.
SCRATCH = 35 << 20
PIECE = 65536

# So many pieces' gradients of the weight are kept before they are added.
KEPT = 8

# Bytes of an image from which a launch more is worth less memory.
LARGE = 16 << 20

# Positions that are listed at once for the inverse gather.
LISTED = 512

# Samples of a list at most that are sorted at once, in the usual case and at all.
SHORT, LONG = 128, 1024

# Tiles of the image for the inverse gather, by rank: 64 pixels each.
TILES = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}


@dataclass(frozen=True)
class HopperRow:
    """For a kernel in Gluon; a program of all but `outer` takes 16 positions a warp, and one of
    `gather` has four warps."""

    operator: str
    width: int
    channels: int  # up to so many point channels
    block_o: int
    block_c: int
    warps: int
    stages: int
    programs: int = 0  # a multiprocessor holds: outer, gradients; gather: at most, 0 as many as fit
    registers: int = 0  # gathers: of a thread at most (narrow: for units of 4 channels)


HOPPER = (
    HopperRow("gather", 2, 64, 64, 64, 4, 2, registers=128),
    HopperRow("gather", 2, 128, 128, 64, 4, 2, 2),
    HopperRow("gather", 2, ANY, 256, 64, 4, 2),
    HopperRow("gather", 4, 64, 64, 32, 4, 2, registers=128),
    HopperRow("gather", 4, 128, 128, 32, 4, 2, 2),
    HopperRow("gather", 4, ANY, 256, 32, 4, 2),
    HopperRow("gather 3d", 2, 64, 64, 64, 4, 2),
    HopperRow("gather 3d", 2, ANY, 128, 32, 4, 2),
    HopperRow("gather 3d", 4, 64, 64, 32, 4, 2),
    HopperRow("gather 3d", 4, ANY, 128, 32, 4, 2),
    HopperRow("gather narrow", 2, 64, 64, 32, 4, 2, registers=128),
    HopperRow("gather narrow", 2, ANY, 128, 64, 4, 2),
    HopperRow("gather narrow", 4, 64, 64, 32, 4, 2),
    HopperRow("gather narrow", 4, ANY, 128, 32, 4, 2),
    HopperRow("gradients narrow", 2, ANY, 128, 32, 4, 2, 2),
    HopperRow("gradients narrow", 4, ANY, 128, 32, 4, 2, 2),
    HopperRow("along", 2, 128, 128, 32, 4, 3),
    HopperRow("along", 2, 256, 256, 64, 4, 2),
    HopperRow("along", 2, 512, 256, 64, 4, 4),
    HopperRow("along", 2, ANY, 256, 32, 4, 3),
    HopperRow("along", 4, 128, 128, 32, 4, 2),
    HopperRow("along", 4, 256, 256, 32, 8, 2),
    HopperRow("along", 4, ANY, 256, 32, 4, 3),
    HopperRow("outer", 2, 64, 64, 64, 4, 2, 4),
    HopperRow("outer", 2, 128, 128, 64, 4, 2, 3),
    HopperRow("outer", 2, ANY, 256, 64, 4, 2, 2),
    HopperRow("outer", 4, 64, 64, 64, 4, 2, 2),
    HopperRow("outer", 4, 128, 128, 64, 8, 2, 1),
    HopperRow("outer", 4, ANY, 256, 64, 8, 2, 1),
    HopperRow("outer 3d", 2, 64, 64, 64, 4, 2, 2),
    HopperRow("outer 3d", 2, ANY, 128, 64, 4, 2, 2),
    HopperRow("outer 3d", 4, ANY, 64, 64, 8, 2, 1),
)


AnyRow = TypeVar("AnyRow", Row, HopperRow)

# Tiles of the positions for `outer`: neighbours share pixels in the cache.
HOPPER_TILES = {1: (64,), 2: (8, 8), 3: (1, 8, 8)}


def find(operator: str, width: int, channels: int) -> Row:
    return _first(TABLE, operator, width, channels)


def find_hopper(operator: str, width: int, channels: int) -> HopperRow:
    return _first(HOPPER, operator, width, channels)


def _first(rows: Sequence[AnyRow], operator: str, width: int, channels: int) -> AnyRow:
    for row in rows:
        if (row.operator, row.width) == (operator, width) and channels <= row.channels:
            return row
    raise LookupError(f"no row for {operator}, width {width}")


@dataclass(frozen=True)
class InverseRow:
    """For gluon_inverse.py."""

    channels: int  # image channels of a program
    tiles: int
    points: int  # stages of the rings of points,
    factors: int  # of interpolation weights,
    weights: int  # and of weights
    registers: int  # of a lane that multiplies
    programs: int = 1  # on a multiprocessor


INVERSE = (
    InverseRow(64, 1, 2, 2, 2, 104, 2),
    InverseRow(128, 1, 2, 2, 2, 136, 2),
    InverseRow(256, 2, 2, 2, 3, 192),
)


def find_inverse(channels: int) -> InverseRow:
    return next(row for row in INVERSE if channels <= row.channels)
