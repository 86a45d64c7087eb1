"""Which calls the kernels of gluon.py take, and how they are launched."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import torch
import triton
from torch import Tensor

from ..geometry import Geometry
from . import configs
from .compiled import Launch, capability_of
from .layouts import image_rows, sizes_of, units_of

try:  # as in compiled.py
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from . import gluon
except Exception:
    gluon = None  # type: ignore[assignment]


def on_hopper(g: Geometry, like: Tensor, precision: str) -> bool:
    """Whether gluon.py can take the call: one group, one unit, sizes that fit."""
    return (
        gluon is not None
        and like.is_cuda
        and precision in ("native", "split")
        and capability_of(like.device) == (9, 0)
        and g.groups == 1
        and units_of(g).number == 1
        and g.offset_groups == 1
        and g.image_channels % 32 == 0
        and g.point_channels % 64 == 0
        and max(image_rows(g), math.prod(g.point_size) * g.point_channels) < 2**31
        and math.prod(g.image_size) * 2 ** len(g.image_size) < 2**31
        and 2 * g.batch * math.prod(g.point_size) < 2**31
    )


class HopperLaunch:
    """A Gluon kernel; calling it says whether it ran. One that cannot be compiled never does."""

    def __init__(self, launch: Launch, block: tuple[int, ...], layout: Any) -> None:
        self.launch = launch
        self.block = list(block)
        self.layout = layout

    def __call__(self, *tensors: Tensor | None) -> bool:
        key = (self.launch.kernel, self.launch.constants.get("SPLIT", True))
        if key in BROKEN:
            return False
        given: list[Any] = list(tensors)
        at = self.launch.descriptor
        assert at is not None
        given[at] = TensorDescriptor.from_tensor(given[at], self.block, self.layout)
        try:
            self.launch(*given)
        except Exception as failure:
            BROKEN.add(key)
            warnings.warn(f"deformnd: {self.launch.kernel} of gluon.py: {failure}", stacklevel=2)
            return False
        return True


BROKEN: set[tuple[str, bool]] = set()


def _columns_layout(rows: int, channels: int, warps: int, run: int = 8) -> Any:
    """Eight consecutive channels to a lane, as wgmma has them (gluon.py), or twice four."""
    registers = [[0, 1], [0, 2], [0, 12 - run]]
    registers += [[0, 32 << i] for i in range((channels // 32).bit_length() - 1)] + [[8, 0]]
    lanes = [[0, run], [0, 16], [1, 0], [2, 0], [4, 0]]
    warp = [[16 << i, 0] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, warp, [], [rows, channels])


def _mma_layout(columns: int, warps: int) -> Any:
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, columns, 16]
    )


def _shared_layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    """Of a block of a factor, whose dtype is bfloat16 where float32 numbers are split."""
    kind = gl.float16 if dtype == torch.float16 else gl.bfloat16
    return gl.NVMMASharedLayout.get_default_for([rows, columns], kind)


@functools.lru_cache(maxsize=4096)
def gather_launch(
    g: Geometry, dtype: torch.dtype, last: bool, multiprocessors: int
) -> HopperLaunch | None:
    row = configs.find_hopper("gather", dtype.itemsize, g.point_channels)
    block_p = 16 * row.warps
    block_o = math.gcd(row.block_o, g.point_channels)
    # Eight corners of 32 channels take the registers of four of 64; bfloat16 spills with these.
    few = len(g.kernel) == 3 or dtype == torch.bfloat16
    block_c = math.gcd(32 if few else row.block_c, g.image_channels)
    tiles = triton.cdiv(math.prod(g.point_size), block_p)
    blocks = g.point_channels // block_o
    if g.batch * tiles * blocks < multiprocessors:
        return None  # the Triton kernel has more warps to a program, and may split the sum
    launch = Launch(
        "gather",
        (g.batch * tiles * blocks, 1, 1),
        (sizes_of(g), g.image_channels, g.point_channels, tiles, blocks),
        dict(
            POINTS_LAST=last,
            SPLIT=dtype == torch.float32,
            BLOCK_P=block_p,
            BLOCK_O=block_o,
            BLOCK_C=block_c,
            STAGES=row.stages,
            MMA=_mma_layout(block_o, row.warps),
            COLUMNS=_columns_layout(block_p, block_c, row.warps),
            ROWS=_columns_layout(block_p, block_o, row.warps),
            PLANES=gl.BlockedLayout([2, 1], [32, 1], [block_p // 64, row.warps * 64 // block_p],
                                    [0, 1]),
            num_warps=row.warps,
        ),
        row.warps,
        1,
        descriptor=1,
    )  # fmt: skip
    return HopperLaunch(launch, (block_o, block_c), _shared_layout(block_o, block_c, dtype))


@functools.lru_cache(maxsize=4096)
def along_launch(g: Geometry, dtype: torch.dtype, multiprocessors: int) -> HopperLaunch | None:
    block_o = g.point_channels
    if block_o > 256 or block_o & (block_o - 1):
        return None
    row = configs.find_hopper("along", dtype.itemsize, g.point_channels)
    block_p = 16 * row.warps
    block_c = math.gcd(row.block_c if len(g.kernel) < 3 else 32, g.image_channels)
    tiles = triton.cdiv(math.prod(g.point_size), block_p)
    taps = math.prod(g.kernel)
    splits = max(1, min(taps, 2 * multiprocessors // (g.batch * tiles)))
    across = min(32, block_o // 8)
    launch = Launch(
        "along",
        (g.batch * tiles, splits, 1),
        (sizes_of(g), g.image_channels, g.point_channels, tiles, splits),
        dict(
            SPLIT=dtype == torch.float32,
            BLOCK_P=block_p,
            BLOCK_O=block_o,
            BLOCK_C=block_c,
            STAGES=row.stages,
            MMA=_mma_layout(block_c, row.warps),
            COLUMNS=_columns_layout(block_p, block_c, row.warps),
            SECTORS=_columns_layout(block_p, block_c, row.warps, 4),
            ROWS=gl.BlockedLayout([1, 8], [32 // across, across], [row.warps, 1], [1, 0]),
            num_warps=row.warps,
        ),
        row.warps,
        1,
        descriptor=2,
    )
    return HopperLaunch(launch, (block_o, block_c), _shared_layout(block_o, block_c, dtype))


@functools.lru_cache(maxsize=4096)
def outer_launch(
    g: Geometry, dtype: torch.dtype, multiprocessors: int
) -> tuple[HopperLaunch, int, tuple[int, ...]] | None:
    """The launch, into how many partial sums, and the shape in which it takes the points."""
    pixels = g.batch * math.prod(g.image_size)
    if g.image_channels % 64 or pixels * max(g.image_channels, 2 ** len(g.kernel)) >= 2**31:
        return None
    block_o = math.gcd(256, g.point_channels)
    operator = "outer 3d" if len(g.kernel) == 3 else "outer"
    row = configs.find_hopper(operator, dtype.itemsize, block_o)
    block_o = math.gcd(row.block_o, block_o)
    tile, size = _position_tile(g.point_size, configs.HOPPER_TILES[len(g.kernel)])
    tiles = tuple(triton.cdiv(s, t) for s, t in zip(size, tile, strict=True))
    programs = (
        math.prod(g.kernel) * (g.image_channels // row.block_c) * (g.point_channels // block_o)
    )
    weights = math.prod(g.kernel) * g.image_channels * g.point_channels
    at_once = multiprocessors * row.programs
    splits = _splits(programs, g.batch * math.prod(tiles), at_once, weights)
    each = triton.cdiv(programs * splits, multiprocessors)
    split = dtype == torch.float32
    launch = Launch(
        "outer",
        (multiprocessors * each, 1, 1),
        (sizes_of(g), g.batch, g.image_channels, g.point_channels, tiles, splits, multiprocessors),
        dict(
            SPLIT=split,
            TILE=tile,
            BLOCK_O=block_o,
            BLOCK_C=row.block_c,
            STAGES=row.stages,
            LISTED=row.warps // 2,  # a sample to every lane
            MMA=gl.NVMMADistributedLayout(
                version=[3, 0],
                warps_per_cta=[4, row.warps // 4],
                instr_shape=[16, block_o // (row.warps // 4), 16],
            ),
            COLUMNS=gl.BlockedLayout([1, 4], [4, 8], [row.warps, 1], [1, 0]),
            num_warps=row.warps,
        ),
        row.warps,
        1,
        descriptor=1,
    )
    launch.options["maxnreg"] = min(255, 65536 // (32 * row.warps * row.programs) // 8 * 8)
    kind = gl.float16 if dtype == torch.float16 else gl.bfloat16
    block = (1, *tile, block_o)
    made = HopperLaunch(launch, block, gl.NVMMASharedLayout.get_default_for(list(block), kind))
    return made, splits, (g.batch * (2 if split else 1), *size, g.point_channels)


def _position_tile(
    size: tuple[int, ...], tile: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tile and what it tiles: the positions, or all in a row where too much would stand out."""
    volume = math.prod(tile)
    flat = triton.cdiv(math.prod(size), volume)
    if math.prod(triton.cdiv(s, t) for s, t in zip(size, tile, strict=True)) <= 1.1 * flat:
        return tile, size
    return (volume,), (math.prod(size),)


def _splits(programs: int, tiles: int, at_once: int, weights: int) -> int:
    """Into how many partial sums it pays to split one: a tile takes 1.6 us, a program starts and
    ends in three tiles' time, and a partial sum is written and read at 2 TB/s."""

    def time(splits: int) -> float:
        waves = -(-programs * splits // at_once)
        return waves * (-(-tiles // splits) + 3) * 1.6 + splits * weights * 8 / 2e6

    return min(range(1, min(tiles, 4 * at_once // programs + 1) + 1), key=time)
