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


def narrow_on_hopper(g: Geometry, like: Tensor, precision: str) -> bool:
    """Whether gluon_narrow.py can take the call: one group, units of 4 to 32, sizes that fit."""
    units, taps, positions = units_of(g), math.prod(g.kernel), math.prod(g.point_size)
    return (
        gluon is not None
        and like.is_cuda
        and precision in ("native", "split")
        and capability_of(like.device) == (9, 0)
        and g.groups == 1
        and units.narrow
        and units.length in (4, 8, 16, 32)
        and g.offset_groups > 0
        and g.image_channels % 32 == 0
        and g.point_channels % 64 == 0
        and max(*g.image_size, *_reach(g)) < 2**21  # gluon_narrow.py, _floor
        and max(image_rows(g), positions * g.point_channels) < 2**31
        and g.offset_groups * taps * len(g.kernel) * positions < 2**31
        and g.mask_groups * taps * positions < 2**31
        and 2 * g.batch * positions < 2**31
    )


def _reach(g: Geometry) -> list[int]:
    """How far positions without offsets lie from the image's first pixel at most, per axis."""
    return [
        p + s * t + d * k
        for s, t, p, d, k in zip(
            g.point_size, g.stride, g.padding, g.dilation, g.kernel, strict=True
        )
    ]


class HopperLaunch:
    """A Gluon kernel; calling it says whether it ran. One that cannot be compiled never does."""

    def __init__(self, launch: Launch, block: tuple[int, int], layout: Any) -> None:
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


def _chunks_layout(positions: int, run: int, chunks: int, warps: int, pairs: bool) -> Any:
    """Chunks of `run` consecutive elements to a lane, [position, chunk, element of it], as wgmma
    has them (gluon_narrow.py); `pairs`: of two neighbouring positions."""
    near, rows = (1, (2, 4, 8)) if pairs else (8, (1, 2, 4))
    registers = [[0, 0, 1 << i] for i in range(run.bit_length() - 1)] + [[near, 0, 0]]
    registers += [[0, 4 << i, 0] for i in range((chunks // 4).bit_length() - 1)]
    lanes = [[0, 1, 0], [0, 2, 0], *([r, 0, 0] for r in rows)]
    warp = [[16 << i, 0, 0] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, warp, [], [positions, chunks, run])


def _sectors_layout(positions: int, run: int, chunks: int, unit: int, warps: int) -> Any:
    """As _chunks_layout, [position, chunk, low or high corner, channel], but neighbouring lanes
    have four channels each of what is contiguous."""
    pair, second, third = [0, 0, 1, 0], [0, 1, 0, 0], [0, 2, 0, 0]
    if run == 4:
        near, registers = [pair, third], [second]
    elif run == 8 and unit == 8:
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


def _narrow_constants(g: Geometry, dtype: torch.dtype, row: configs.HopperRow) -> dict[str, Any]:
    unit = units_of(g).length
    # Eight corners, or more than a unit to a lane, take too many registers; bfloat16 spills.
    few = len(g.kernel) == 3 or unit < 16 or dtype == torch.bfloat16
    block_c = math.gcd(32 if few else row.block_c, g.image_channels)
    return dict(
        SPLIT=dtype == torch.float32,
        UNIT=unit,
        OFFSET_CHANNELS=g.image_channels // g.offset_groups,
        MASK_CHANNELS=g.image_channels // max(g.mask_groups, 1),
        RUN=min(unit, block_c // 4),
        BLOCK_P=16 * row.warps,
        BLOCK_O=math.gcd(row.block_o, g.point_channels),
        BLOCK_C=block_c,
    )


@functools.lru_cache(maxsize=4096)
def gather_narrow_launch(
    g: Geometry, dtype: torch.dtype, last: bool, multiprocessors: int
) -> HopperLaunch | None:
    row = configs.find_hopper("gather narrow", dtype.itemsize, g.point_channels)
    fixed = _narrow_constants(g, dtype, row)
    block_p, block_o = fixed["BLOCK_P"], fixed["BLOCK_O"]
    block_c, run = fixed["BLOCK_C"], fixed["RUN"]
    # Tiles of two dimensions sample a smaller neighbourhood, of which more stays in the cache.
    tile_x = block_p if len(g.point_size) == 1 else 16
    tiles_x = triton.cdiv(g.point_size[-1], tile_x)
    tiles_y = triton.cdiv(g.point_size[-2], block_p // tile_x) if len(g.point_size) > 1 else 1
    tiles = math.prod(g.point_size[:-2]) * tiles_y * tiles_x
    blocks = g.point_channels // block_o
    if g.batch * tiles * blocks < multiprocessors:
        return None  # as in gather_launch
    launch = Launch(
        "gather_narrow",
        (g.batch * tiles * blocks, 1, 1),
        (sizes_of(g), g.image_channels, g.point_channels, tiles, tiles_y, tiles_x, blocks),
        dict(
            POINTS_LAST=last,
            **fixed,
            VECTOR_P=math.gcd(2, g.point_size[-1]),
            TILE_X=tile_x,
            STAGES=row.stages,
            MMA=_mma_layout(block_o, row.warps),
            COLUMNS=_chunks_layout(block_p, run, block_c // run, row.warps, True),
            ROWS=_columns_layout(block_p, block_o, row.warps),
            PLANES=gl.BlockedLayout([2, 1], [32, 1], [block_p // 64, row.warps * 64 // block_p],
                                    [0, 1]),
            num_warps=row.warps,
        ),
        row.warps,
        1,
        descriptor=1,
    )  # fmt: skip
    if row.registers and run == 4 and len(g.kernel) < 3:
        launch.options["maxnreg"] = row.registers  # others spill
    return HopperLaunch(launch, (block_o, block_c), _shared_layout(block_o, block_c, dtype))


@functools.lru_cache(maxsize=4096)
def gradients_narrow_launch(
    g: Geometry, dtype: torch.dtype, multiprocessors: int
) -> HopperLaunch | None:
    row = configs.find_hopper("gradients narrow", dtype.itemsize, g.point_channels)
    if g.point_channels > row.block_o:
        return None
    fixed = _narrow_constants(g, dtype, row)
    fixed["BLOCK_O"] = block_o = g.point_channels
    block_p, block_c, run = fixed["BLOCK_P"], fixed["BLOCK_C"], fixed["RUN"]
    across = max(1, round(g.point_size[-1] / block_p))
    down = triton.cdiv(triton.cdiv(math.prod(g.point_size), block_p), across)
    programs = math.prod(g.kernel) * (g.image_channels // block_c)
    splits = max(1, min(g.batch * down * across, row.programs * multiprocessors // programs))
    launch = Launch(
        "gradients_narrow",
        (programs, splits, 1),
        (sizes_of(g), g.batch, g.image_channels, g.point_channels, down, across, splits),
        dict(
            **fixed,
            TWICE=fixed["UNIT"] == 4 and 2 * g.batch * image_rows(g) < 2**31,
            MMA=_mma_layout(block_c, row.warps),
            OUTER=_mma_layout(block_c, row.warps),
            COLUMNS=_chunks_layout(block_p, run, block_c // run, row.warps, False),
            SECTORS=_sectors_layout(block_p, run, block_c // run, fixed["UNIT"], row.warps),
            ROWS=gl.BlockedLayout([1, 8], [256 // block_c, block_c // 8], [row.warps, 1], [1, 0]),
            num_warps=row.warps,
        ),
        row.warps,
        1,
        descriptor=1,
    )
    return HopperLaunch(launch, (block_p, block_o), _shared_layout(block_p, block_o, dtype))


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
def outer_launch(g: Geometry, multiprocessors: int) -> HopperLaunch:
    row = configs.find_hopper("outer", 4, g.point_channels)
    block_o = math.gcd(row.block_o, g.point_channels)
    block_c, block_p = math.gcd(row.block_c, g.image_channels), 64
    taps, tiles = math.prod(g.kernel), triton.cdiv(math.prod(g.point_size), block_p)
    programs = taps * (g.image_channels // block_c) * (g.point_channels // block_o)
    splits = max(1, min(g.batch * tiles // 8, row.programs * multiprocessors // programs))
    # Whole warp groups along the channels, the rest along the point channels.
    along = 4 * max(1, min(block_c // 64, row.warps // 4))
    launch = Launch(
        "outer",
        (taps * (g.image_channels // block_c), g.point_channels // block_o, splits),
        (sizes_of(g), g.batch, g.image_channels, g.point_channels, tiles, splits),
        dict(
            BLOCK_P=block_p,
            BLOCK_O=block_o,
            BLOCK_C=block_c,
            STAGES=row.stages,
            MMA=gl.NVMMADistributedLayout(
                version=[3, 0],
                warps_per_cta=[along, row.warps // along],
                instr_shape=[16, block_o // (row.warps // along), 16],
            ),
            COLUMNS=gl.BlockedLayout([1, 8], [256 // block_c, block_c // 8], [row.warps, 1],
                                     [1, 0]),
            num_warps=row.warps,
        ),
        row.warps,
        1,
        descriptor=1,
    )  # fmt: skip
    return HopperLaunch(launch, (block_p, block_o), _shared_layout(block_p, block_o, torch.float32))
