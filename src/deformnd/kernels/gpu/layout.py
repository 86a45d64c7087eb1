"""How a call's tensors lie in memory (copies, padding, packed weights, sums), and what kernels are
told of a call.

Note [layouts]
Torch's tensors have channels first, [B, C, pixels], or last. The kernels want 16 bytes of a pixel's
channels in a row. So images are copied, and padded with zeros where the channels of a sample group
are no multiple of 8 (of 32 for most of Hopper's kernels, which take 32 at once):

    wide    [B, pixels, C]                        if the channels of a sample group need no padding,
            [B, sample group, pixels, padded]     else;
    narrow  [B, sample group, pixels, padded]     padded to a power of two, so that the two corners
                                                  of a cell on the last axis are neighbours, or for
                                                  im2col.py alone to a multiple of 8.

All of these have one form: element (b, s, pixel, c) lies at b * item + s * plane + pixel * row + c.
Points are read as rows [B, positions, padded_outputs]. A weight is packed as [taps, padded_outputs,
columns], or for im2col.py as [padded_outputs, taps, columns], and in "bf16x3" twice, first heads
and then tails (sampling.py, Note [precision]).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..geometry import Geometry
from . import tiles
from .prepare import (
    COPY,
    PACK,
    SUM,
    ZERO,
    ZEROS,
    CopySizes,
    Order,
    PackSizes,
    SumSizes,
    ZeroSizes,
    prepare,
    reduce,
    reduce_weight,
)
from .runtime import RETURNED, Buffer, Descriptor, Launch, Plan


class Sizes(NamedTuple):
    """What every kernel is told of a call, where it is named g."""

    image: tuple[int, ...]
    point: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    batch: int
    pixels: int
    positions: int
    taps: int
    channels: int  # of the image
    outputs: int  # channels of the points
    group_in: int  # image channels of a weight group
    group_out: int  # point channels of a weight group
    sample_groups: int
    group_channels: int  # channels of a sample group
    padded: int  # channels of a sample group as they lie in memory
    offset_groups: int
    mask_groups: int
    per_offset: int  # sample groups that share offsets
    per_mask: int  # sample groups that share masks
    row: int  # elements between pixels of the image as it is laid out
    plane: int  # elements between its sample groups
    item: int  # elements between its batch items
    columns: int  # elements of an output and tap in the packed weight
    weights: int  # elements of all rows of the packed weight
    padded_outputs: int  # channels of the points as they are read, and rows of the weight of a tap


def round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def sample_channels(g: Geometry) -> int:
    """How many channels a sample group has: those that share both an offset and a mask."""
    channels = g.image_channels
    return math.gcd(channels // max(g.offset_groups, 1), channels // max(g.mask_groups, 1))


@functools.lru_cache(maxsize=4096)
def sizes_of(
    g: Geometry, blocks: bool, as_rows: bool = False, apart: bool = False, tight: bool = False
) -> Sizes:
    """The sizes of a call. With `blocks` channels are padded for kernels that take whole blocks of
    them: 32 of the image's, and as many of the points' as make whole tiles. With `as_rows` the
    image is read as it lies, with channels last, if no sample group needs padding. With `apart`
    each weight group is a sample group, and so is padded, if sample groups consist of them. With
    `tight` narrow sample groups are padded to multiples of 8 and not to powers of two."""
    channels, length = g.image_channels, sample_channels(g)
    if apart and length % (channels // g.groups) == 0:
        length = channels // g.groups
    number = channels // length
    if is_narrow(length, number):
        padded = round_up(length, 8) if tight else triton.next_power_of_2(length)
        padded = min(padded, triton.next_power_of_2(length))
    elif blocks:
        padded = round_up(length, 32)
    else:
        padded = round_up(length, 8)
    pixels, taps = math.prod(g.image_size), math.prod(g.kernel)
    planes = is_narrow(length, number) and number > 1 and not as_rows
    rows = padded == length and not planes
    columns = number * padded if g.groups == 1 else channels // g.groups
    outputs = round_up(g.point_channels, 8)
    if blocks and columns % 32 == 0:
        outputs = whole_blocks(outputs)
    return Sizes(
        *(g.image_size, g.point_size, g.kernel, g.stride, g.padding, g.dilation),
        *(g.batch, pixels, math.prod(g.point_size), taps, channels, g.point_channels),
        *(channels // g.groups, g.point_channels // g.groups, number, length, padded),
        *(g.offset_groups, g.mask_groups),
        *(number // max(g.offset_groups, 1), number // max(g.mask_groups, 1)),
        row=channels if rows else padded,
        plane=padded if rows else pixels * padded,
        item=pixels * number * padded,
        columns=columns,
        weights=taps * outputs * columns,
        padded_outputs=outputs,
    )


def whole_blocks(channels: int) -> int:
    """The number of channels rounded up to a multiple of a block. The block is the smallest of 64,
    128 and 256 that holds all of them, or 256 if none does."""
    return round_up(channels, min(256, max(64, int(triton.next_power_of_2(channels)))))


def is_narrow(length: int, number: int) -> bool:
    return length <= (tiles.NARROW if number > 1 else tiles.NARROW // 2)


def is_single(g: Geometry, dtype: torch.dtype) -> bool:
    """Whether a call has a single tap, sample group and weight group, and few channels and
    outputs."""
    channels = g.image_channels
    single = math.prod(g.kernel) == g.groups == 1 and sample_channels(g) == channels
    few = channels * dtype.itemsize <= tiles.SINGLE and g.point_channels <= tiles.SINGLE_OUTPUTS
    return single and few


def fit(size: int, block: int, least: int = 32) -> int:
    """A block that is not much larger than what it holds, but has at least `least` channels: a
    product needs 16 of them, and 32 fill a sector of memory."""
    return int(min(block, max(least, triton.next_power_of_2(size))))


def allows_tf32() -> bool:
    """Whether torch's own switch for convolutions allows TF32. On AMD it never counts, since few of
    AMD's GPUs have TF32."""
    if torch.version.hip:
        return False
    conv = getattr(torch.backends.cudnn, "conv", None)
    precision = getattr(conv, "fp32_precision", None)
    if precision is not None:
        return bool(precision == "tf32")
    return bool(torch.backends.cudnn.allow_tf32)


def has_few_outputs(g: Geometry, dtype: torch.dtype) -> bool:
    """Whether the call goes by the kernels for few outputs (depthwise.py). In half precision tensor
    cores are faster unless a sample group has few channels, too."""
    few = g.groups == 1 and g.point_channels <= tiles.MOST
    return few and (dtype == torch.float32 or sizes_of(g, False).padded <= 8)


def precision_of(g: Geometry, dtype: torch.dtype) -> str:
    """The precision of the call's products (sampling.py, Note [precision])."""
    if dtype != torch.float32:
        return "native"
    sizes = sizes_of(g, False)
    # With narrow groups the gathers cost most, so TF32 would gain little, and Triton 3.6 cannot
    # compile its weight gradients.
    if allows_tf32() and not is_narrow(sizes.group_channels, sizes.sample_groups):
        return "tf32"
    if sizes.group_in * sizes.group_out >= tiles.FEW and not has_few_outputs(g, dtype):
        return "bf16x3"
    return "ieee" if torch.version.hip else "tf32x3"


class Operand(NamedTuple):
    """An image or points [B, channels, *size], or a weight, as it is in memory."""

    buffer: Buffer
    last: bool  # whether the channels, which are a weight's second axis, lie last in memory

    def part(self, first: int, count: int) -> Operand:
        return self._replace(buffer=self.buffer.part(first, count))


class Steps:
    """The launches of a plan, in their order, with jobs for one `prepare` gathered before them.

    `room` says how much memory there is. With 2 there is enough for all that is faster. With 1
    nothing takes more than it must. With 0 memory is short, and `together` is false: jobs are
    launched one by one, and what may wait is prepared later. With `other` the steps are those of a
    call of another size.
    """

    def __init__(self, plan: Plan, room: int = 2, other: bool = False) -> None:
        self.plan, self.room, self.other = plan, room, other
        self.depends = False  # whether calls of other sizes have other steps
        self._jobs: list[tuple[Any, Any]] = []  # the jobs for `prepare`, each with its kind
        self._then: list[Launch] = []
        self._last: list[Launch] = []

    @property
    def together(self) -> bool:
        return self.room > 0

    def depending(self, choice: bool) -> bool:
        """Note that a choice depends on the call's size; returns it, or what `other` steps take."""
        self.depends = True
        return choice != self.other

    def first(self, kind: tuple[Any, ...], *job: Any) -> None:
        """Add a job to do before the next launch. Sums take longest, so they come first."""
        self._jobs.insert(0 if kind[0] == SUM.value else len(self._jobs), (job, kind))

    def zero(self, buffer: Buffer) -> None:
        """Fill a buffer with zeros before the next launch."""
        count = math.prod(buffer.shape)
        self.first((ZERO.value, ZEROS), buffer, ZeroSizes(-(-count // ZEROS), count))

    def convert(self, source: Buffer, out: Buffer) -> None:
        """Convert numbers from one dtype to another before the next launch. The kernel is compiled
        for what divides the last two axes; the others may have any size."""
        channels = math.prod(out.shape[-2:])
        pixels = math.prod(out.shape[:-2])
        block_c = fit(channels, 64, least=1)
        block_p = 4096 // max(block_c, 32)
        blocks, across = triton.cdiv(pixels, block_p), triton.cdiv(channels, block_c)
        strides = (pixels * channels, channels, channels)
        sizes = CopySizes(
            *(blocks * across, 1, pixels, 1, channels, channels),
            *(*strides, *strides, blocks, across),
        )
        vector = math.gcd(16, channels)
        kind = (COPY.value, True, True, vector, vector, block_p, block_c, False)
        self.first(kind, source, out, sizes)

    def then(self, launch: Launch) -> None:
        """Add a launch between the jobs for the next launch and that launch."""
        self._then.append(launch)

    def last(self, launch: Launch) -> None:
        """Add a launch that runs after all others."""
        self._last.append(launch)

    def launch(self, launch: Launch, runs: bool = True) -> None:
        """Add a launch. One that does not run is only loaded, since calls of other sizes need
        it."""
        self.flush()
        (self.plan.steps if runs else self.plan.spares).append(launch)

    def finish(self) -> None:
        self.flush()
        self.plan.steps += self._last

    def flush(self) -> None:
        single = [self._prepare([job]) for job in self._jobs]
        if self.together and len(single) > 1:
            self.plan.steps.append(self._prepare(self._jobs))
            self.plan.spares += single
        else:
            self.plan.steps += single
        self.plan.steps += self._then
        self._jobs, self._then = [], []

    @staticmethod
    def _prepare(all_jobs: list[tuple[Any, Any]]) -> Launch:
        jobs, kinds = zip(*all_jobs, strict=True)
        programs = sum(job[-1].programs for job in jobs)
        return Launch(prepare, (programs, 1, 1), dict(jobs=jobs), dict(KINDS=kinds), 4)


def _worth_trying(units: int, least: int, most: int) -> Iterator[int]:
    """Of all numbers of parts for which the longest part has equally many units, the smallest."""
    parts = least
    while parts <= most:
        yield parts
        longest = -(-units // parts)
        if longest <= 1:
            return
        parts = -(-units // (longest - 1))


class Call:
    """What the operations of one plan share: the tensors, and their layouts, each made only
    once."""

    def __init__(
        self,
        g: Geometry,
        steps: Steps,
        dtype: torch.dtype,
        precision: str,
        weight: Operand | None,
        offset: Buffer | None,
        mask: Buffer | None,
        last: bool = False,
        gathers: bool = False,
        chunks: int = 1,
    ) -> None:
        """`last` says that the image has, or will have, its channels last, and `gathers` that
        nothing but the points is wanted."""
        self.steps, self.plan, self.dtype, self.precision = steps, steps.plan, dtype, precision
        self.offset, self.mask = offset, mask
        self.device = tiles.device_of(self.plan.device)
        self.architecture, self.multiprocessors, _ = self.device
        self.weight_groups = g.groups
        self.spread = self._spreads(g)
        self.g = g = g._replace(groups=1) if self.spread else g
        self.few_outputs = has_few_outputs(g, dtype) and precision != "bf16x3"
        # Whether Hopper has kernels for this call, most of which take whole blocks of channels,
        # whatever the number of its channels is.
        self.suits_hopper = suits = (
            self.architecture in tiles.BLOCKS
            and precision in ("native", "bf16x3")
            and not self.few_outputs
            and g.groups == 1
            and g.offset_groups > 0
        )
        self.last, self.gathers = last, gathers
        self.gives_way = suits and self._gives_way(g)
        self.by_blocks = suits and not (gathers and self.gives_way)
        # Planes of sample groups help a depthwise call in the cache. In float32 that gains less
        # than the copy into planes costs, and in half precision it gains about as much.
        depthwise = g.groups == g.image_channels and g.point_channels <= tiles.MOST * g.groups
        rows = last and depthwise and dtype == torch.float32
        # Where weight groups begin at odd places, loads of 16 bytes do not fit them. They are made
        # sample groups, which are padded, if no gradient has to be computed for each of these.
        of_group = g.image_channels // g.groups
        odd = of_group > tiles.NARROW and of_group * dtype.itemsize % 16 > 0
        # Gradients and Hopper's narrow kernel need powers of two. The other kernels of the forward
        # do not, but in float32 im2col.py writes 24 channels down more slowly than 32.
        tight = gathers and g.groups == 1 and dtype.itemsize == 2 and not self.by_blocks
        self.sizes = sizes_of(g, self.by_blocks, rows, gathers and odd, tight)
        self.narrow = is_narrow(self.sizes.group_channels, self.sizes.sample_groups)
        self.given_weight = weight  # None stands for a weight of ones
        self.number_of_chunks = chunks
        self.sorts = False  # whether the image gradient comes from sorted lists (strategy.py)
        self.only_image = False  # whether no gradient of offset or mask is wanted beside it
        self._made: dict[Any, Buffer] = {}
        self._lent: dict[Operand, Buffer] = {}
        coordinates = g.offset_groups * self.sizes.taps * len(g.image_size)
        item = max(self.sizes.padded_outputs, coordinates, g.mask_groups * self.sizes.taps)
        item = max(self.sizes.item, self.sizes.positions * item)
        self._common = dict(
            PRECISION=precision, GROUPED=g.groups > 1, INDEX=tl.int32 if item < 2**31 else tl.int64
        )
        self._record = dict(g=self.sizes, offset=offset, mask=mask)

    @functools.cached_property
    def is_near(self) -> bool:
        """Whether sampling.floor_of can be used: it needs an NVIDIA GPU, and all pixels, and all
        positions without their offsets, within 2^21 of 0."""
        n = self.sizes
        reach = [
            p * s + t + k * d
            for p, s, t, k, d in zip(
                n.point, n.stride, n.padding, n.kernel, n.dilation, strict=True
            )
        ]
        return self.on_nvidia and max(*n.image, *reach) < 2**21

    @property
    def on_nvidia(self) -> bool:
        """Whether kernels may have NVIDIA's instructions."""
        other = self.architecture == "interpreter" or self.architecture.startswith("gfx")
        return not (other or torch.version.hip)

    def _spreads(self, g: Geometry) -> bool:
        """Whether the weight of several groups is spread: treated as one of a single group, with
        zeros where an output does not read a channel.

        The products with zeros cost little where samples cost most, and the kernels of a single
        group are faster: on an H200 they are twice as fast with 192 channels in two groups. With
        several sample groups this holds where neither a sample group nor a weight group consists of
        whole ones of the other kind, so that no product fits both.
        """
        of_weight, of_sample = g.image_channels // g.groups, sample_channels(g)
        crossing = of_weight % of_sample > 0 and of_sample % of_weight > 0
        several = 1 < g.groups < g.image_channels
        several = several and (of_sample == g.image_channels or crossing)
        by_blocks = self.architecture in tiles.BLOCKS
        most = (tiles.SPREAD_BY_BLOCKS if by_blocks else tiles.SPREAD)[self.precision]
        return several and max(g.image_channels, g.point_channels) <= most

    def _gives_way(self, g: Geometry) -> bool:
        """Whether Hopper's kernels for the forward give way to im2col.py, which finds samples only
        once (tiles.py, GIVES_WAY). What forward.py takes in any case (takes_single) is not asked
        for, since the answer may depend on the call's size."""
        if is_single(g, self.dtype):
            return False
        length, outputs = sample_channels(g), g.point_channels
        number, padded = g.image_channels // length, triton.next_power_of_2(length)
        if number * padded % 8 > 0:  # Loads of 16 bytes would not fit the columns.
            return False
        kind = int(padded > 8) if is_narrow(length, number) else 2
        pairs = tiles.GIVES_WAY[self.precision][kind][len(g.kernel) - 1]
        times = next((times for least, times in pairs if outputs > least), 0)
        if times in (0, tiles.ALWAYS):
            return times > 0
        return self.gathers and self.columns_fit(times)

    def columns_fit(self, times: float = 1) -> bool:
        """Whether the columns that im2col.py writes for a call of this size take at most so many
        times the 32 MiB that stay in the cache."""
        g, width = self.g, self.dtype.itemsize
        columns = g.batch * math.prod(g.point_size) * math.prod(g.kernel) * g.image_channels
        return self.steps.depending(columns * width <= times * 2 * tiles.COLUMNS_AT_ONCE)

    def make(
        self,
        kernel: Any,
        grid: Sequence[int],
        constants: dict[str, Any],
        *,
        warps: int,
        stages: int = 1,
        descriptors: dict[str, Descriptor] | None = None,
        resident: int = 0,
        registers: int = 0,
        **arguments: Any,
    ) -> Launch:
        """A launch of a kernel, to which the call's own arguments and constants are added."""
        constants = {**self._common, "num_warps": warps, **constants}
        return Launch(
            kernel,
            (*grid, 1, 1)[:3],
            {**self._record, **arguments},
            {n: v for n, v in constants.items() if n in kernel.arg_names},
            *(warps, stages, descriptors, resident, registers),
        )

    def launch(
        self, kernel: Any, grid: Sequence[int], constants: dict[str, Any], **rest: Any
    ) -> None:
        self.steps.launch(self.make(kernel, grid, constants, **rest))

    def launch_split(
        self,
        kernel: Any,
        grid: Sequence[int],
        constants: dict[str, Any],
        out: Operand,
        bias: Buffer | None,
        **rest: Any,
    ) -> None:
        """Launch a kernel that writes a result plus a bias. The last axis of the grid is splits;
        with several of them the kernel writes partial sums, which are added up afterwards."""
        parts = self.room_for_parts(grid[-1], *out.buffer.shape)
        constants = dict(LAST=out.last, **constants)
        rest |= dict(bias=bias, out=out.buffer, parts=parts, splits=grid[-1])
        self.launch(kernel, grid, constants, **rest)
        self.reduce(parts, out, bias)

    def splits(
        self,
        kernel: str,
        programs: int,
        warps: int,
        units: int,
        *,
        products: int = 0,
        added: int = 0,
        most: int | None = None,
        work: float = 1,
        steps: int = 1,
    ) -> int:
        """How many parts each sum is split into. So many programs, of so many warps, compute sums
        of so many units. More parts fill the multiprocessors better, but have to be added.

        A unit has `products` products. In float32 no part has more than LONGEST of them (tiles.py).
        A part writes `added` numbers to memory; 0 stands for parts that are added atomically. There
        are at most `most` parts, unless LONGEST asks for more. A unit has `work`, of the kind that
        the kernel's costs are for (tiles.py, COSTS), and waits for memory `steps` times.
        """
        costs = tiles.COSTS[kernel]
        resident = max(2 * costs.warps // (warps * self.dtype.itemsize), 1)
        alone, beside = costs.alone * steps, costs.beside * work

        def taken(splits: int) -> float:
            """Microseconds of the multiprocessor that has the most programs, and of adding the
            parts."""
            rounds, rest = divmod(-(-programs * splits // self.multiprocessors), resident)
            time = 0.0
            for many, count in ((resident, rounds), (rest, min(rest, 1))):
                unit = max(alone, beside * many)
                time += count * (-(-units // splits) * unit + tiles.START_US)
            if splits > 1 and added:
                time += tiles.ADD_US + splits * added * 8 / tiles.BANDWIDTH
            return time

        least = 1
        if products and self.precision in ("bf16x3", "tf32x3"):
            least = triton.cdiv(units, max(tiles.LONGEST // products, 1))
        if most is None:
            most = units if not added else tiles.PARTS if self.steps.room > 1 else 1
        return min(_worth_trying(units, least, max(least, min(most, units))), key=taken)

    def sampling(self, positions: int, channels: int, steps: int = 1) -> dict[str, int]:
        """What `splits` is told of a forward whose units sample so many channels at so many
        positions. In three dimensions, with eight corners, a unit takes twice the work and waits
        three times as long."""
        n, work = self.sizes, positions * channels * self.dtype.itemsize
        if len(n.image) == 3:
            work, steps = 2 * work, 3 * steps
        return dict(work=work, steps=steps, added=n.batch * n.positions * n.outputs)

    def filling(self, programs: int) -> int:
        """The most parts of a weight's gradient: those for which so many programs become eight for
        each multiprocessor."""
        filling: int = triton.cdiv(8 * self.multiprocessors, programs)
        return filling

    def room_for_parts(self, splits: int, *shape: int) -> Buffer:
        """Room for several partial sums of this shape, or next to none for a single one."""
        return self.plan.scratch(*((splits, *shape) if splits > 1 else (1,)), dtype=torch.float32)

    def tiles(self, operation: str, channels: int) -> tiles.Tiles:
        return tiles.find(self.architecture, operation, self.dtype.itemsize, channels)

    def chunks(self, *tensors: Operand | Buffer | None) -> Iterator[tuple[Call, list[Any]]]:
        """Yield the call for one chunk of the batch after another, with that chunk's part of each
        tensor. All chunks use the same scratch memory."""
        if self.number_of_chunks == 1:
            yield self, list(tensors)
            return
        every = (*tensors, self.offset, self.mask)
        buffers = [t.buffer if isinstance(t, Operand) else t for t in every if t is not None]
        # A chunk has a multiple of this many items, so that all begin at a multiple of 16 bytes.
        step = max(16 // math.gcd(16, b.part(1, 1).start) for b in buffers)
        steps = triton.cdiv(self.g.batch, step)
        number = min(self.number_of_chunks, steps)
        bounds = [min(step * (i * steps // number), self.g.batch) for i in range(number + 1)]
        for first, last in itertools.pairwise(bounds):
            parts: list[Any] = [t and t.part(first, last - first) for t in every]
            g = self.g._replace(batch=last - first, groups=self.weight_groups)
            offset, mask = parts[-2:]
            call = Call(
                *(g, self.steps, self.dtype, self.precision, self.given_weight),
                *(offset, mask, self.last, self.gathers),
            )
            with self.frame():
                yield call, parts[:-2]

    @contextlib.contextmanager
    def frame(self) -> Iterator[None]:
        """Layouts made within the frame are dropped at its end, and their memory is free again."""
        before = dict(self._made)
        with self.plan.frame():
            yield
            self.steps.flush()
        self._made = before

    def image(self, image: Operand) -> Buffer:
        """The image laid out as Note [layouts] says."""
        n = self.sizes
        if n.row == n.channels:
            return self._rows(image, n.channels)
        key = ("image", image)
        if key not in self._made:
            shape = (n.batch, n.sample_groups, n.pixels, n.padded)
            self._made[key] = self._room(image, image.buffer.dtype, *shape)
            self._copy(image, self._made[key], True)
        return self._made[key]

    def rows(self, points: Operand) -> Buffer:
        """The points as rows [B, positions, padded_outputs]."""
        return self._rows(points, self.sizes.padded_outputs)

    def _rows(self, t: Operand, padded: int) -> Buffer:
        """A tensor with channels last, and with zeros after the last channel up to `padded`."""
        batch, channels, *size = t.buffer.shape
        if t.last and padded == channels:
            return t.buffer
        key = ("rows", t, padded)
        if key not in self._made:
            shape = (batch, math.prod(size), padded)
            self._made[key] = self._room(t, t.buffer.dtype, *shape)
            self._copy_rows(t, self._made[key])
        return self._made[key]

    def parts(self, points: Operand) -> Buffer:
        """The points as rows [2 x B x P, padded_outputs] of bfloat16, all heads before all
        tails."""
        key = ("parts", points)
        if key not in self._made:
            n = self.sizes
            shape = (2 * n.batch * n.positions, n.padded_outputs)
            self._made[key] = self._room(points, torch.bfloat16, *shape)
            self._copy_rows(points, self._made[key])
        return self._made[key]

    def factors(self, points: Operand) -> Buffer:
        """The points as factors of products, which are parts in "bf16x3" and else rows."""
        return self.read(points, self.precision == "bf16x3")

    def read(self, points: Operand, in_parts: bool) -> Buffer:
        return self.parts(points) if in_parts else self.rows(points)

    def lend(self, t: Operand, result: Operand) -> None:
        """Let a copy of t lie in a result's memory. The result has to be written last, when the
        copy has served."""
        self._lent[t] = result.buffer

    def _room(self, t: Operand, dtype: torch.dtype, *shape: int) -> Buffer:
        """Room for a copy of t: the result that was lent for it if it is free and as large, else
        scratch memory."""
        lent = self._lent.get(t)
        taken = any(buffer.kind == RETURNED for buffer in self._made.values())
        if lent is not None and not taken:
            room = lent._replace(dtype=dtype, shape=shape)
            if room.size == lent.size:
                return room
        return self.plan.scratch(*shape, dtype=dtype)

    def deliver(self, laid: Buffer, bias: Buffer | None, out: Operand) -> None:
        """Copy an image from the kernels' layout to a result, and add a bias."""
        self._copy(out, laid, False, bias)

    def _copy(self, given: Operand, laid: Buffer, laying: bool, bias: Buffer | None = None) -> None:
        """Copy an image from torch's layout to the kernels' (`laying`), or back."""
        n = self.sizes
        first = (n.channels * n.pixels, n.group_channels * n.pixels, n.pixels)
        last = (n.channels * n.pixels, n.group_channels, n.channels)
        ends = [(given, last if given.last else first)]
        ends.insert(int(laying), (Operand(laid, True), (n.item, n.plane, n.row)))
        (source, strides), (out, to) = ends
        written = n.padded if laying else n.group_channels
        count = (n.batch, n.pixels, n.sample_groups, n.group_channels, written)
        self._add_copy(source, out, bias, count, strides, to)

    def _copy_rows(self, t: Operand, out: Buffer) -> None:
        batch, channels, *size = t.buffer.shape
        pixels, padded = math.prod(size), out.shape[-1]
        strides = (channels * pixels, channels, channels if t.last else pixels)
        count, to = (batch, pixels, 1, channels, padded), (pixels * padded, padded, padded)
        self._add_copy(t, Operand(out, True), None, count, strides, to)

    def _add_copy(
        self,
        source: Operand,
        out: Operand,
        bias: Buffer | None,
        count: tuple[int, int, int, int, int],
        strides: tuple[int, int, int],
        to: tuple[int, int, int],
    ) -> None:
        batch, pixels, groups, channels, written = count
        # Where results are narrower than what is read, smaller blocks took 0.93 of the time.
        narrows = out.buffer.dtype.itemsize < source.buffer.dtype.itemsize and not out.last
        block_c = fit(max(channels, written), 32 if narrows else 64, least=1)
        block_p = 4096 // max(block_c, 32)
        blocks, across = triton.cdiv(pixels, block_p), triton.cdiv(max(channels, written), block_c)
        # These divide every distance between pixels, groups and items, so that loads are aligned.
        vectors = (
            math.gcd(16, channels, *strides) if source.last else 1,
            math.gcd(16, written, *to) if out.last else 1,
        )
        programs = blocks * groups * across * batch
        sizes = CopySizes(programs, *count, *strides, *to, blocks, across)
        parts = out.buffer.dtype != source.buffer.dtype == self.dtype == torch.float32
        kind = (COPY.value, source.last, out.last, *vectors, block_p, block_c, parts)
        self.steps.first(kind, source.buffer, out.buffer, *([] if bias is None else [bias]), sizes)

    def zero(self, buffer: Buffer) -> None:
        """Fill a buffer with zeros before the next launch, unless this call has done so."""
        if ("zeros", buffer) not in self._made:
            self._made["zeros", buffer] = buffer
            self.steps.zero(buffer)

    def added(self, result: Operand, bias: Buffer | None) -> Buffer:
        """The float32 image that atomic additions go to. It is the result itself, unless that is
        laid out in another way or has a bias to be added."""
        n, buffer = self.sizes, result.buffer
        if result.last and n.row == n.channels and bias is None and buffer.dtype == torch.float32:
            return buffer
        key = ("added", result)
        if key not in self._made:
            self._made[key] = self.plan.scratch(n.batch, n.item, dtype=torch.float32)
        return self._made[key]

    def weight(self, order: Order = Order.PLAIN, run: int = 8) -> Buffer | None:
        """The weight packed as [taps, padded_outputs, columns], or as the order says, or its
        bfloat16 heads and tails, as a matrix of rows. It is None for an aggregation, whose kernels
        (depthwise.py) need none."""
        if self.given_weight is None:
            return None
        key = ("weight", order, run)
        if key in self._made:
            return self._made[key]
        n, weight, bf16x3 = self.sizes, self.given_weight, self.precision == "bf16x3"
        if order == Order.FLAT and n.taps == self.g.groups == 1:
            return self.weight()
        columns, arrays, lengths = n.columns, 1, (n.group_channels, n.padded)
        if order == Order.BY_GROUP:
            columns, arrays = whole_blocks(n.channels), n.sample_groups
        if order == Order.FLAT and n.padded > n.group_channels:
            columns = n.group_in // n.group_channels * n.padded
        elif order == Order.BY_GROUP or self.g.groups > 1:
            lengths = (n.group_in, columns)
        plain = columns == n.group_in and not bf16x3 and not self.spread
        group_in, group_out = self._given_group()
        single = n.taps == 1 and order == Order.PLAIN and n.padded_outputs == n.outputs
        if plain and (single or (order == Order.FLAT and weight.last)):
            return weight.buffer._replace(shape=(n.outputs * n.taps, columns))
        shape = ((arrays + bf16x3) * n.taps * n.padded_outputs, columns)
        out = self.plan.scratch(*shape, dtype=torch.bfloat16 if bf16x3 else weight.buffer.dtype)
        # Heads and tails are twice as many stores, so they are made wide.
        block_k = fit(n.taps, 64 if bf16x3 else 16, least=1)
        block_c, width = (2048 // max(block_k, 16), block_k) if bf16x3 else (128, 1)
        blocks = triton.cdiv(columns, block_c)
        sizes = PackSizes(
            arrays * n.padded_outputs * blocks * triton.cdiv(n.taps, block_k),
            *(n.taps, n.outputs, n.padded_outputs, group_in, group_out, columns, *lengths),
            *(n.group_channels, n.taps * n.padded_outputs * columns, blocks),
        )
        kind = (PACK.value, weight.last, bf16x3, int(order), run, block_c, block_k, width)
        self.steps.first(kind, weight.buffer, out, sizes)
        self._made[key] = out
        return out

    def _given_group(self) -> tuple[int, int]:
        """The channels of a group of the weight as it is given, and how many outputs read the same
        channels of the packed one: all outputs, unless the weight is spread."""
        n = self.sizes
        if not self.spread:
            return n.group_in, n.outputs
        return n.channels // self.weight_groups, n.outputs // self.weight_groups

    def sums(self, source: Operand, out: Buffer) -> None:
        """Sum a tensor over everything but its channels."""
        batch, channels, *size = source.buffer.shape
        positions = math.prod(size)
        block_o = fit(channels, 64, least=1) if source.last else 1
        block_p = 1024 // block_o
        count, blocks = triton.cdiv(positions, block_p), triton.cdiv(channels, block_o)
        at_once = 8 * self.multiprocessors
        # A short sum is not worth another kernel.
        splits = max(1, min(batch * count * block_p * block_o >> 15, at_once // blocks))
        sizes = SumSizes(blocks * splits, batch, positions, channels, blocks, splits)
        parts = self.plan.scratch(splits, channels, dtype=torch.float32)
        kind = (SUM.value, source.last, block_p, block_o)
        self.steps.first(kind, source.buffer, out, parts, sizes)
        launch = self._reduce(splits, (1, 1, channels), (0, 0, 1), parts, out)
        if splits > 1:
            self.steps.last(launch)
        else:
            self.plan.spares.append(launch)

    def _reduce(
        self,
        splits: int,
        sizes: tuple[int, int, int],
        strides: tuple[int, int, int],
        parts: Buffer,
        out: Buffer,
        bias: Buffer | None = None,
        inner: int = 0,
    ) -> Launch:
        """A launch that sums [count / inner, splits, inner] to a result of these sizes. `inner` is
        the whole count unless it is given."""
        count = math.prod(sizes)
        index = tl.int32 if count * splits < 2**31 else tl.int64
        return self.make(
            *(reduce, (triton.cdiv(count, 1024),), dict(INDEX=index, BLOCK=1024, TOGETHER=4)),
            **dict(parts=parts, bias=bias, out=out, count=count, splits=splits),
            **dict(inner=inner or count, sizes=sizes, strides=strides, warps=4),
        )

    def reduce(
        self, parts: Buffer, out: Operand, bias: Buffer | None = None, runs: bool | None = None
    ) -> None:
        """Sum parts [splits, *out as it lies in memory] and add a bias. Unless `runs` says more, it
        is done if there are several parts. If there is one, the kernel has written the result
        itself, and the sum is only loaded."""
        batch, channels, *size = out.buffer.shape
        positions = math.prod(size)
        sizes = (batch * positions, channels, 1) if out.last else (batch, channels, positions)
        strides = (sizes[1] * sizes[2], sizes[2], 1)
        splits = parts.shape[0]
        launch = self._reduce(splits, sizes, strides, parts, out.buffer, bias)
        self.steps.launch(launch, splits > 1 if runs is None else runs)

    def reduce_flat(
        self, parts: Buffer, splits: int, out: Buffer, inner: int = 0, runs: bool = True
    ) -> None:
        """Sum [numbers / inner, splits, inner] to numbers in a row. `inner` is all of them unless
        it is given."""
        sizes = (1, 1, math.prod(out.shape))
        launch = self._reduce(splits, sizes, (0, 0, 1), parts, out, None, inner)
        self.steps.launch(launch, runs)

    def reduce_weight(self, parts: Buffer, out: Buffer, runs: bool = True) -> None:
        """Sum partial weights [splits, taps, group_in, padded_outputs] to a weight. Their group_in
        are all channels where the weight is spread."""
        n, splits = self.sizes, parts.shape[0]
        group_in, group_out = self._given_group()
        # Few weights have many splits, so smaller blocks give them more programs.
        few = group_in * n.taps * n.outputs <= 1 << 14
        block_k, warps = (2, 2) if few else (16, 4)
        grid = (triton.cdiv(group_in * n.taps, block_k), triton.cdiv(n.outputs, 32))
        launch = self.make(
            *(reduce_weight, grid, dict(BLOCK_K=block_k, BLOCK_O=32, TOGETHER=32)),
            **dict(parts=parts, out=out, taps=n.taps, group_in=group_in, group_out=group_out),
            **dict(columns=n.group_in, outputs=n.outputs, padded_outputs=n.padded_outputs),
            **dict(splits=splits, warps=warps),
        )
        self.steps.launch(launch, runs)
