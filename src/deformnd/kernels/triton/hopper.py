"""Which calls the kernels in Gluon take, and how they are launched."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import torch
import triton

from ..geometry import Geometry
from . import configs
from .compiled import Descriptor, Launch, capability_of
from .layouts import Call, image_rows, sizes_of, tiles_of, units_of, weights_of

try:  # as in compiled.py
    from triton.experimental.gluon import language as gl

    from . import gluon
except Exception:
    gluon = None  # type: ignore[assignment]


def _on_hopper(call: Call) -> bool:
    """What all of the kernels need."""
    device = call.plan.device
    return (
        gluon is not None
        and device.type == "cuda"
        and capability_of(device) == (9, 0)
        and call.precision in ("native", "split")
        and call.g.groups == 1
        and call.g.offset_groups > 0
        and call.g.point_channels % 64 == 0
    )


def takes(call: Call) -> bool:
    """Whether gluon.py can take the call: one group, one unit, sizes that fit."""
    g = call.g
    return (
        _on_hopper(call)
        and call.units.number == 1
        and g.image_channels % 32 == 0
        and max(image_rows(g), math.prod(g.point_size) * g.point_channels) < 2**31
        and math.prod(g.image_size) * 4 ** len(g.image_size) < 2**31
        and 2 * g.batch * math.prod(g.point_size) < 2**31
    )


def takes_narrow(call: Call) -> bool:
    """Whether gluon_narrow.py can take the call: one group, units of 4 to 32, sizes that fit."""
    g, units = call.g, call.units
    taps, positions = math.prod(g.kernel), math.prod(g.point_size)
    return (
        _on_hopper(call)
        and units.narrow
        and units.length in (4, 8, 16, 32)
        and g.image_channels % 32 == 0
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


def builds(launch: Launch) -> bool:
    """Whether the kernel can be built, as far as is known. If not, another must do."""
    return _kind(launch) not in BROKEN


def give_up(failures: dict[Launch, Exception]) -> None:
    """Of kernels that cannot be built: say so once if they are in Gluon, else raise."""
    for launch, failure in failures.items():
        if launch.descriptor is None:
            raise failure
        if builds(launch):
            BROKEN.add(_kind(launch))
            warnings.warn(f"{failure}; a slower one does its work", stacklevel=2)


def _kind(launch: Launch) -> tuple[str, bool]:
    return launch.kernel, launch.constants.get("SPLIT", True)


# Bytes of shared memory that a multiprocessor has; each program takes 1024 beside its own.
SHARED = 228 * 1024

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


def _stored_layout(block_o: int, rank: int, last: bool) -> Any:
    """Of the result of gluon.py's `gather`: neighbouring lanes have channels, or positions along
    the image's last axis (gluon.py, `_position`)."""
    channels = [[0, 1 << i] for i in range(block_o.bit_length() - 1)]
    if last:
        along, rest = channels, [[1 << i, 0] for i in range(6)]
        registers = 3
    else:
        along = [[b, 0] for b in ((1, 2, 4, 8, 16, 32) if rank == 1 else (1, 8, 16, 32))]
        rest = [*channels, *([] if rank == 1 else [[2, 0], [4, 0]])]
        registers = 1
    order = [*along[registers:], *rest]
    return gl.DistributedLinearLayout(
        [*along[:registers], *order[7:]], order[:5], order[5:7], [], [64, block_o]
    )


@functools.lru_cache(maxsize=4096)
def gather_launch(g: Geometry, dtype: torch.dtype, last: bool, multiprocessors: int) -> Launch:
    """With a sum in parts where the grid is small (axis 1)."""
    rank = len(g.kernel)
    operator = "gather 3d" if rank == 3 else "gather"
    row = configs.find_hopper(operator, dtype.itemsize, g.point_channels)
    block_o = math.gcd(row.block_o, g.point_channels)
    block_c = math.gcd(row.block_c, g.image_channels)
    words = block_c * dtype.itemsize // 4
    tiles = triton.cdiv(math.prod(g.point_size), 64)
    blocks = g.point_channels // block_o
    programs, taps = g.batch * tiles * blocks, math.prod(g.kernel)
    steps = taps * g.image_channels // block_c
    splits = 1
    if programs < multiprocessors:
        # Two programs fit on a multiprocessor; adding the parts is not worth a short sum's split.
        splits = max(1, min(taps, 2 * multiprocessors // programs, steps // 8))
    count = g.batch * math.prod(g.point_size) * g.point_channels
    return Launch(
        "gather",
        (programs, splits, 1),
        (sizes_of(g), g.image_channels, g.point_channels, tiles, blocks, splits, count),
        dict(
            POINTS_LAST=last,
            SPLIT=dtype == torch.float32,
            BLOCK_O=block_o,
            BLOCK_C=block_c,
            STAGES=row.stages,
            PAIRS=5,
            MMA=_mma_layout(block_o, 4),
            COLUMNS=gl.BlockedLayout([1, 4], [128 // words, words // 4], [4, 1], [1, 0]),
            STORED=_stored_layout(block_o, rank, last),
            VECTOR_P=math.gcd(2, g.point_size[-1]),
            num_warps=4,
        ),
        4,
        1,
        Descriptor(1, (block_o, block_c), _shared_layout(block_o, block_c, dtype)),
        row.programs,
        row.registers,
    )


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
) -> Launch | None:
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
    return Launch(
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
            PLANES=gl.BlockedLayout(
                [2, 1], [32, 1], [block_p // 64, row.warps * 64 // block_p], [0, 1]
            ),
            num_warps=row.warps,
        ),
        row.warps,
        1,
        Descriptor(1, (block_o, block_c), _shared_layout(block_o, block_c, dtype)),
        registers=row.registers if run == 4 and len(g.kernel) < 3 else 0,  # others spill
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def gradients_narrow_launch(g: Geometry, dtype: torch.dtype, multiprocessors: int) -> Launch | None:
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
    return Launch(
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
        Descriptor(1, (block_p, block_o), _shared_layout(block_p, block_o, dtype)),
    )


@functools.lru_cache(maxsize=4096)
def along_launch(g: Geometry, dtype: torch.dtype, multiprocessors: int) -> Launch | None:
    row = configs.find_hopper("along", dtype.itemsize, g.point_channels)
    block_p = 16 * row.warps
    block_o = min(row.block_o, g.point_channels & -g.point_channels)
    blocks = g.point_channels // block_o
    block_c = math.gcd(row.block_c if len(g.kernel) < 3 else 32, g.image_channels)
    stages = max(row.stages, blocks + 1)
    parts = 2 if dtype == torch.float32 else 1
    shared = 2 * parts * (block_p * g.point_channels + stages * block_o * block_c) + 1024
    if blocks > 8 or shared > SHARED:
        return None
    programs: int = g.batch * triton.cdiv(math.prod(g.point_size), block_p)
    tiles, taps = programs // g.batch, math.prod(g.kernel)
    slots = max(1, multiprocessors * min(2, SHARED // shared))

    def cost(splits: int) -> int:
        """Turns of all waves of programs, one more for a start."""
        return -(-programs * splits // slots) * (-(-taps // splits) + 1)

    splits = min(range(1, taps + 1), key=cost)
    across = min(32, block_o // 8)
    return Launch(
        "along",
        (programs, splits, 1),
        (sizes_of(g), g.image_channels, g.point_channels, tiles, splits),
        dict(
            SPLIT=dtype == torch.float32,
            BLOCK_P=block_p,
            BLOCK_O=block_o,
            BLOCKS=blocks,
            BLOCK_C=block_c,
            STAGES=stages,
            MMA=_mma_layout(block_c, row.warps),
            COLUMNS=_columns_layout(block_p, block_c, row.warps),
            SECTORS=_columns_layout(block_p, block_c, row.warps, 4),
            ROWS=gl.BlockedLayout([1, 8], [32 // across, across], [row.warps, 1], [1, 0]),
            num_warps=row.warps,
        ),
        row.warps,
        1,
        Descriptor(2, (block_o, block_c), _shared_layout(block_o, block_c, dtype)),
    )


@functools.lru_cache(maxsize=4096)
def outer_launch(
    g: Geometry, dtype: torch.dtype, multiprocessors: int
) -> tuple[Launch, int, tuple[int, ...]] | None:
    """The launch, into how many partial sums, and the shape in which it takes the points."""
    pixels = g.batch * math.prod(g.image_size)
    if g.image_channels % 64 or pixels * max(g.image_channels, 4 ** len(g.kernel)) >= 2**31:
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
    split = dtype == torch.float32
    kind = gl.float16 if dtype == torch.float16 else gl.bfloat16
    block = (1, *tile, block_o)
    launch = Launch(
        "outer",
        (programs, splits, 1),
        (sizes_of(g), g.batch, g.image_channels, g.point_channels, tiles, splits),
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
        Descriptor(1, block, gl.NVMMASharedLayout.get_default_for(list(block), kind)),
        registers=min(255, _registers(32 * row.warps * row.programs)),
    )
    return launch, splits, (g.batch * (2 if split else 1), *size, g.point_channels)


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
    ends in three tiles' time, and a partial sum is written and read at 4 TB/s."""

    def time(splits: int) -> float:
        waves = -(-programs * splits // at_once)
        return waves * (-(-tiles // splits) + 3) * 1.6 + splits * weights * 8 / 4e6

    return min(range(1, min(tiles, 4 * at_once // programs + 1) + 1), key=time)


def takes_inverse(call: Call) -> bool:
    """Whether gluon_inverse.py can take the call: one group, half numbers, sizes that fit."""
    g = call.g
    return (
        _on_hopper(call)
        and call.precision == "native"
        and g.image_channels % 64 == 0
        and units_of(g).number * weights_of(g) <= 2**24
        and math.prod(g.point_size) * g.point_channels < 2**31
    )


@functools.lru_cache(maxsize=4096)
def inverse_launch(g: Geometry, dtype: torch.dtype, last: bool, multiprocessors: int) -> Launch:
    units = units_of(g)
    tile, tiles = tiles_of(g)
    block_c = math.gcd(256, g.image_channels)
    row = configs.find_inverse(block_c)
    pairs, taps = triton.cdiv(tiles, row.tiles), math.prod(g.kernel)
    programs = g.batch * pairs * (g.image_channels // block_c)
    splits = max(1, min(units.number * taps, row.programs * multiprocessors // programs))
    # At stride 1 the samples of 81 pixels touch a tile of 64 in two dimensions.
    dense = 100 * math.prod(g.point_size) // math.prod(g.image_size)
    listed = min(128, max(32, triton.next_power_of_2(dense)))
    return Launch(
        "inverse",
        (g.batch * pairs, g.image_channels // block_c, splits),
        (sizes_of(g), g.batch * max(g.offset_groups, 1) * taps * tiles, g.batch,
         g.image_channels, g.point_channels, taps, tiles, pairs, splits, units.number,
         units.number // max(g.offset_groups, 1), units.number // max(g.mask_groups, 1)),
        dict(
            TILE=tile,
            EVEN=tuple(s % t == 0 for s, t in zip(g.image_size, tile, strict=True)),
            LAST=last,
            SPLIT=splits > 1,
            RUN=math.gcd(8, tile[-1], g.image_size[-1]),
            BLOCK_C=block_c,
            LISTED=listed,
            XS=max(row.points, block_c // listed),  # the result goes there
            SS=row.factors,
            WS=row.weights,
            TILES=row.tiles,
            REGISTERS=row.registers,
            num_warps=4,
        ),
        4,
        1,
        Descriptor(1, (64, block_c), _shared_layout(64, block_c, dtype)),
        registers=_registers(row.programs * 128 * (1 + row.tiles)) if row.programs > 1 else 0,
    )  # fmt: skip


def _registers(threads: int) -> int:
    """That each has where so many share a multiprocessor."""
    return 65536 // threads // 8 * 8
