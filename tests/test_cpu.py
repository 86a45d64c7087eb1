"""The C++ core against the definition in float64, on every instruction set of this machine."""

from __future__ import annotations

import _ctypes
import itertools
import math
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import cases
import deformnd
from apart import apart
from cases import Case, relative_error
from deformnd.kernels import cpu, reference
from deformnd.kernels.geometry import (
    Geometry,
    conv_geometry,
    conv_transpose_geometry,
    memory_format,
)

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU core is not built")

LEVELS = range(min(max(cpu.best_level(), 0), 2) + 1)
PAIRS = range(3, cpu.best_level() + 1)  # Levels for bfloat16 alone: 3 is AVX512-BF16, 4 AMX.
# Each level, with a dtype that takes all of its paths.
KINDS = [(level, torch.float32) for level in LEVELS] + [(level, torch.bfloat16) for level in PAIRS]
ALL = (True,) * 5
NAMES = ("image", "points", "weight", "offset", "mask")


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)
    cpu.level, cpu.threads = -1, 0


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> int:
    cpu.level = request.param
    return cpu.level


@pytest.fixture(params=KINDS, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    cpu.level, of = request.param
    return of  # type: ignore[no-any-return]


class Call:
    """A geometry with random tensors for it."""

    def __init__(
        self, g: Geometry, dtype: torch.dtype = torch.float64, spread: float = 2.0, seed: int = 0
    ) -> None:
        gen = torch.Generator().manual_seed(seed)
        n, k = len(g.kernel), math.prod(g.kernel)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=gen, dtype=torch.float64).to(dtype)

        self.g = g
        self.image = normal(g.batch, g.image_channels, *g.image_size)
        self.points = normal(g.batch, g.point_channels, *g.point_size)
        self.weight = normal(g.point_channels, g.image_channels // g.groups, *g.kernel)
        self.point_bias = normal(g.point_channels)
        self.image_bias = normal(g.image_channels)
        self.offset = self.mask = None
        if g.offset_groups:
            offset = normal(g.batch, g.offset_groups * k * n, *g.point_size).double() * spread
            # Offsets are exact in float32 and no integers, so that every type finds the same cells.
            self.offset = ((offset * 64).round() / 64 + 1 / 128).to(dtype)
        if g.mask_groups:
            self.mask = normal(g.batch, g.mask_groups * k, *g.point_size)

    def to(self, dtype: torch.dtype) -> Call:
        other = object.__new__(Call)
        other.__dict__ = {
            key: value.to(dtype) if isinstance(value, Tensor) else value
            for key, value in self.__dict__.items()
        }
        return other

    def run(self, backend: object = cpu) -> dict[str, Tensor | None]:
        """Both operators and all gradients."""
        grads = backend.gradients(  # type: ignore[attr-defined]
            self.g, self.image, self.points, self.weight, self.offset, self.mask, ALL
        )
        return {
            "gather": backend.gather(  # type: ignore[attr-defined]
                self.g, self.image, self.weight, self.offset, self.mask, self.point_bias
            ),
            "scatter": backend.scatter(  # type: ignore[attr-defined]
                self.g, self.points, self.weight, self.offset, self.mask, self.image_bias
            ),
            **dict(zip(NAMES, grads[:5], strict=True)),
        }


def assert_close(
    got: dict[str, Tensor | None], want: dict[str, Tensor | None], limit: float, what: object = ""
) -> None:
    """Compare every result with the one wanted by its relative L2 error."""
    for name, expected in want.items():
        actual = got[name]
        if expected is None:
            assert actual is None, (name, what)
            continue
        assert actual is not None, (name, what)
        assert actual.shape == expected.shape, (name, what)
        error = relative_error(actual, expected)
        assert error <= limit, (name, what, error)


def assert_same(got: dict[str, Tensor | None], want: dict[str, Tensor | None]) -> None:
    for name, expected in want.items():
        actual = got[name]
        assert (actual is None) == (expected is None), name
        if actual is not None and expected is not None:
            assert torch.equal(actual, expected), name


def random_geometry(rank: int, seed: int) -> Geometry:
    r = random.Random(f"{rank} {seed}")
    while True:
        channels = r.choice((1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 33, 48, 64, 72)[: 14 - 2 * rank])
        divisors = [d for d in range(1, channels + 1) if channels % d == 0]
        groups = r.choice((1, 1, channels, r.choice(divisors)))
        points = groups * r.choice((1, 1, 2, 3, 5, 8) if groups < 9 else (1, 2))

        def each(*values: int) -> tuple[int, ...]:
            return tuple(r.choice(values) for _ in range(rank))

        kernel, stride, padding, dilation = (
            each(1, 2, 3, 3, 4),
            each(1, 1, 2, 3),
            each(0, 1, 2),
            each(1, 1, 2),
        )
        image = tuple(r.randint(1, (60, 14, 7)[rank - 1]) for _ in range(rank))
        size = tuple(
            (s + 2 * p - d * (k - 1) - 1) // t + 1
            for s, p, d, k, t in zip(image, padding, dilation, kernel, stride, strict=True)
        )
        if min(size) > 0:
            return Geometry(
                r.choice((1, 1, 2, 3)),
                channels,
                points,
                groups,
                r.choice((0, 1, 1, r.choice(divisors))),
                r.choice((0, 1, 1, r.choice(divisors))),
                image,
                size,
                kernel,
                stride,
                padding,
                dilation,
            )


def plain(batch: int, channels: int, points: int, size: tuple[int, ...], **other: int) -> Geometry:
    """3^n kernel, stride 1, padding 1; offsets and mask of one group."""
    n = len(size)
    return Geometry(
        batch,
        channels,
        points,
        other.get("groups", 1),
        other.get("offset_groups", 1),
        other.get("mask_groups", 1),
        size,
        size,
        (3,) * n,
        (1,) * n,
        (1,) * n,
        (1,) * n,
    )


@pytest.mark.parametrize("seeds", [range(s, s + 50) for s in range(0, 500, 50)], ids=str)
@pytest.mark.parametrize("rank", (1, 2, 3))
def test_random_configurations(rank: int, seeds: range) -> None:
    for seed in seeds:
        g = random_geometry(rank, seed)
        single = Call(g, torch.float32, seed=seed)
        double = single.to(torch.float64)
        want = double.run(reference)
        for cpu.level in LEVELS:
            cpu.threads = (1, 2, 3, 16)[seed % 4]
            assert_close(double.run(), want, 1e-10, (seed, cpu.level, g))
            assert_close(single.run(), want, 1e-5, (seed, cpu.level, g))


def run_case(case: Case, tensors: dict[str, Tensor | None], grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients (of all but the bias) of one call of the six functions."""
    args = [tensors[name] for name in cases.NAMES]
    input, weight, offset, mask, _ = args
    geometry = conv_transpose_geometry if case.transposed else conv_geometry
    g = geometry(*args, *case.operator_parameters())  # type: ignore[arg-type]
    forward = cpu.scatter if case.transposed else cpu.gather
    got = {"output": forward(g, *args)}  # type: ignore[arg-type]
    image, points = (grad, input) if case.transposed else (input, grad)
    needs = (not case.transposed, case.transposed, True, True, True)
    grads = cpu.gradients(g, image, points, weight, offset, mask, needs)  # type: ignore[arg-type]
    found = dict(zip(cases.NAMES[:4], (grads[case.transposed], *grads[2:5]), strict=True))
    return got | {f"grad_{name}": t for name, t in found.items() if t is not None}


@pytest.mark.parametrize("case, tensors, arrays", cases.golden(), ids=lambda v: str(v)[:60])
def test_golden_vectors(
    case: Case, tensors: dict[str, Tensor | None], arrays: dict[str, Tensor], level: int
) -> None:
    got = run_case(case, tensors, arrays["grad_output"])
    assert_close(got, {name: arrays[name] for name in got}, 1e-10)
    assert len(got) == 1 + sum(t is not None for t in list(tensors.values())[:4])


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_cases(case: Case, level: int) -> None:
    tensors = case.tensors()
    gen = torch.Generator().manual_seed(1)
    args = [tensors[name] for name in cases.NAMES]
    geometry = conv_transpose_geometry if case.transposed else conv_geometry
    g = geometry(*args, *case.operator_parameters())  # type: ignore[arg-type]
    size = (
        (g.image_channels, *g.image_size) if case.transposed else (g.point_channels, *g.point_size)
    )
    grad = torch.randn(g.batch, *size, dtype=torch.float64, generator=gen)
    given = cases.requires_grad(tensors)
    output = (reference.scatter if case.transposed else reference.gather)(g, *given.values())  # type: ignore[arg-type]
    want = {"output": output.detach()}
    del given["bias"]
    want |= {f"grad_{k}": t for k, t in cases.gradients(output, given, grad).items()}
    assert_close(run_case(case, tensors, grad), want, 1e-10)
    single = {k: None if t is None else t.float() for k, t in tensors.items()}
    assert_close(run_case(case, single, grad.float()), want, 1e-5)


# Chosen for the paths of the core: full and ragged blocks of channels, groups that span the
# parts of the reverse, tiles of whole and partial rows, long kernels, depthwise, few channels.
GEOMETRIES = [
    plain(2, 64, 40, (9, 40)),
    plain(1, 130, 33, (5, 70)),
    plain(3, 72, 6, (4, 5), groups=3, offset_groups=12, mask_groups=72),
    plain(1, 96, 24, (3, 400), offset_groups=24, mask_groups=8),
    plain(2, 24, 24, (8, 9), groups=24, offset_groups=3, mask_groups=0),
    plain(1, 32, 70, (300,), offset_groups=2, mask_groups=0),
    plain(1, 48, 20, (3, 5, 33), offset_groups=0, mask_groups=3),
    plain(2, 3, 5, (1, 1), offset_groups=3),
    plain(1, 1, 1, (1, 1, 1)),
    Geometry(1, 20, 300, 2, 2, 5, (90,), (29,), (31,), (2,), (3,), (1,)),
    Geometry(2, 5, 7, 1, 1, 1, (600, 2), (601, 1), (2, 2), (1, 3), (1, 1), (1, 2)),
    plain(2, 3, 3, (5, 37)),
    plain(1, 12, 51, (3, 340), groups=3, mask_groups=2),
    Geometry(2, 4, 20, 1, 1, 0, (9, 7, 13), (5, 4, 7), (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
]


@pytest.mark.parametrize("g", GEOMETRIES, ids=lambda g: "x".join(map(str, (*g[:6], *g.image_size))))
def test_geometries(g: Geometry) -> None:
    call = Call(g)
    single = call.to(torch.float32)
    want, rounded = call.run(reference), single.to(torch.float64).run(reference)
    for cpu.level in LEVELS:
        for cpu.threads in (1, 2, 5, 16):
            assert_close(call.run(), want, 1e-10, (cpu.level, cpu.threads))
        assert_close(single.run(), rounded, 1e-5, cpu.level)


def aggregation(batch: int, channels: int, size: tuple[int, ...], *groups: int) -> Call:
    """A call of deform_aggregate; `groups` are those of the offset and of the mask."""
    g = plain(batch, channels, channels, size, groups=channels)
    call = Call(g._replace(offset_groups=groups[0], mask_groups=groups[-1]))
    call.weight = None
    return call


# They have whole blocks of each number of lanes and vectors, partial blocks, and groups in a block.
AGGREGATIONS = [
    aggregation(1, 64, (9, 40), 4),
    aggregation(2, 64, (9, 10), 1),
    aggregation(2, 32, (5, 33), 1, 0),
    aggregation(1, 48, (6, 7), 6),
    aggregation(1, 40, (6, 70), 2),
    aggregation(2, 24, (7, 5), 6, 3),
    aggregation(2, 6, (7, 5), 6, 1),
    aggregation(3, 1, (7, 5), 1),
    aggregation(1, 16, (600,), 1, 2),
    aggregation(2, 32, (3, 4, 9), 2),
    aggregation(2, 16, (1, 9), 1),
    aggregation(1, 16, (4, 3, 1), 0, 2),
]


def channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.parametrize("call", AGGREGATIONS, ids=lambda c: str(c.g[:7]))
def test_without_a_weight(call: Call) -> None:
    """Any layout and number of threads give the same numbers."""
    call.image_bias = call.point_bias = None
    ones = call.to(torch.float64)
    ones.weight = torch.ones(call.g.groups, 1, *call.g.kernel, dtype=torch.float64)
    want = call.run(reference)
    assert_close(want, ones.run(reference) | {"weight": None}, 1e-12)
    single = call.to(torch.float32)
    rounded = single.to(torch.float64).run(reference)
    last = single.to(torch.float32)
    last.image, last.points = channels_last(last.image), channels_last(last.points)
    if last.offset is not None:
        last.offset = channels_last(last.offset)
    for cpu.level in LEVELS:
        first = single.run()
        for cpu.threads in (1, 2, 5, 16):
            assert_close(call.run(), want, 1e-12, (cpu.level, cpu.threads))
            got = single.run(), last.run()
            assert_close(got[0], rounded, 1e-5, (cpu.level, cpu.threads))
            for result in got:
                assert torch.equal(result["gather"], first["gather"])
            assert_same(got[1], got[0])
        cpu.threads = 0
    for dtype, limit in ((torch.float16, 5e-4), (torch.bfloat16, 4e-3)):
        half = call.to(dtype)
        half.offset = single.offset
        assert_close(half.run(), half.to(torch.float64).run(reference), limit)


# Image size, point size, kernel, stride, padding, dilation.
UNEVEN = [
    ((6, 9), (5, 11), (2, 3), (1, 1), (0, 2), (1, 1)),
    ((5, 40), (2, 40), (3, 3), (2, 1), (1, 2), (2, 2)),
    ((4, 1), (4, 1), (3, 1), (1, 1), (1, 0), (1, 1)),
    ((3, 5, 7), (5, 4, 4), (1, 2, 3), (1, 1, 2), (1, 0, 1), (1, 1, 1)),
]


@pytest.mark.parametrize("sizes", UNEVEN, ids=str)
@pytest.mark.parametrize(
    "channels,groups", ((8, (8, 4, 2)), (80, (80, 2, 0)), (3, (3, 0, 3)), (8, (2, 1, 2))), ids=str
)
def test_views_with_exchanged_axes(
    sizes: tuple[tuple[int, ...], ...], channels: int, groups: tuple[int, ...]
) -> None:
    """What lies channels last with its axes backwards is read, and written, as it lies."""
    call = Call(Geometry(2, channels, channels, *groups, *sizes))
    if channels == groups[0]:
        call.image_bias = call.point_bias = call.weight = None
    keys = ("image", "points", "offset", "mask")

    def backwards(t: Tensor) -> Tensor:
        return t.permute(0, *range(t.dim() - 1, 0, -1))

    for some in (keys, ("image",), keys[:3], keys[1:]):
        for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 5e-4)):
            other = call.to(dtype)
            if dtype == torch.float16 and call.offset is not None:
                other.offset = call.offset.float()
            want = other.to(torch.float64).run(reference)
            for key in some:
                value = other.__dict__[key]
                if value is not None:
                    other.__dict__[key] = backwards(backwards(value).contiguous())
            for cpu.level, cpu.threads in itertools.product(LEVELS, (1, 5)):
                got = other.run()
                assert_close(got, want, limit, (some, dtype, cpu.level))
                for key in some:
                    assert got[key] is None or backwards(got[key]).is_contiguous(), (key, some)
                for key, owner in (("gather", "image"), ("scatter", "points")):
                    assert owner not in some or backwards(got[key]).is_contiguous(), (key, some)


@pytest.mark.parametrize("dtype", [*KINDS], indirect=True, ids=str)
@pytest.mark.parametrize("size", [(6, 40), (3, 5, 9)], ids=str)
def test_offsets_with_channels_last_are_not_copied(
    size: tuple[int, ...], dtype: torch.dtype
) -> None:
    call = Call(plain(2, 8, 16, size)).to(dtype)
    for key in ("image", "points", "offset", "mask"):
        call.__dict__[key] = channels_last(call.__dict__[key])
    with torch.profiler.profile() as profile:
        got = call.run()
    assert not {event.name for event in profile.events()} & {"aten::copy_", "aten::clone"}
    for key in ("image", "points", "offset", "mask"):
        assert got[key].movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("core", (True, False))
@pytest.mark.parametrize("last", (False, True))
@pytest.mark.parametrize("aggregate", (False, True))
def test_layouts_are_foretold(
    aggregate: bool, last: bool, core: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result has the strides of its fake, whether the core or the reference computes it."""
    if not core:
        monkeypatch.setattr(cpu, "_fits", lambda g: False)
    turn = (0, 3, 1, 2) if last else (0, 3, 2, 1)
    tensors = [torch.rand(2, 5, 6, c).permute(turn).requires_grad_() for c in (4, 18, 9)]
    if not aggregate:
        tensors.insert(1, torch.rand(3, 4, 3, 3).requires_grad_())

    def results(tensors: list[Tensor]) -> list[tuple[int, ...]]:
        if aggregate:
            output = deformnd.deform_aggregate2d(*tensors, 3, padding=1)
        else:
            output = deformnd.deform_conv2d(*tensors, padding=1)
        grads = torch.autograd.grad(output, tensors, torch.ones_like(output))
        return [t.stride() for t in (output, *grads)]

    with FakeTensorMode() as mode:
        foretold = results([mode.from_tensor(t) for t in tensors])
    assert results(tensors) == foretold
    assert foretold[0] == torch.empty(2, 5, 6, 4 if aggregate else 3).permute(turn).stride()


@pytest.mark.parametrize("size", ((5,), (4, 5), (3, 4, 5)), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_what_lies_outside_is_not_read(
    size: tuple[int, ...], dtype: torch.dtype, level: int
) -> None:
    """A NaN reaches the samples that it is a corner of, and no others."""
    call = aggregation(1, 16, size, 1).to(dtype)
    call.point_bias = call.mask = None
    call.g = call.g._replace(mask_groups=0)
    call.image = channels_last(call.image)
    call.image[(..., *[-1] * len(size))] = math.nan
    call.image[(..., *[0] * len(size))] = math.nan
    shape = call.offset.shape
    call.offset = torch.randint(-6, 6, shape).to(dtype) / 2
    args = (call.g, call.image, None, call.offset, None, None)
    got, want = cpu.gather(*args), reference.gather(*args)
    assert torch.equal(got.isnan(), want.isnan()) and want.isnan().any()
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize(
    "g", GEOMETRIES[:7], ids=lambda g: "x".join(map(str, (*g[:6], *g.image_size)))
)
@pytest.mark.parametrize(
    "dtype, limit", [(torch.float16, 5e-4), (torch.bfloat16, 4e-3)], ids=("half", "bfloat16")
)
def test_half_types(dtype: torch.dtype, limit: float, g: Geometry) -> None:
    call = Call(g).to(dtype)
    if call.offset is not None:
        call.offset = Call(g).to(torch.float32).offset
    want = call.to(torch.float64).run(reference)
    for cpu.level in LEVELS:
        got = call.run()
        # Results are rounded once, so only their own precision is lost.
        assert_close(got, want, limit, cpu.level)
        assert got["gather"] is not None and got["gather"].dtype == dtype
        assert call.offset is None or (
            got["offset"] is not None and got["offset"].dtype == torch.float32
        )


def test_float32_loses_nothing_in_large_images() -> None:
    """A position there has few bits left for its fraction; an offset has all of them."""
    call = Call(plain(1, 8, 8, (3, 5000)), torch.float32)
    want = call.to(torch.float64).run(reference)
    assert_close(call.run(reference), want, 4e-6)
    for cpu.level in LEVELS:
        assert_close(call.run(), want, 4e-6, cpu.level)


@pytest.mark.parametrize("zero", (True, False), ids=("zero", "random"))
def test_float32_loses_little_in_long_sums(zero: bool) -> None:
    """Over 1024 channels and nine kernel points, and over many positions."""
    call = Call(plain(1, 1024, 1024, (5, 6)), torch.float32)
    if zero:
        assert call.offset is not None and call.mask is not None
        call.offset.zero_()
        call.mask.fill_(1)
    want = call.to(torch.float64).run(reference)
    for cpu.level in LEVELS:
        assert_close(call.run(), want, 3e-7, cpu.level)


@pytest.mark.parametrize("groups", (1, 16))
def test_float32_loses_little_in_large_images(groups: int) -> None:
    call = Call(plain(1, 16, 16, (150, 200), groups=groups), torch.float32)
    cpu.threads = 1
    want = call.to(torch.float64).run(reference)
    for cpu.level in LEVELS:
        assert_close(call.run(), want, 5e-7, cpu.level)


@pytest.mark.skipif(not PAIRS, reason="no fast products of bfloat16 on this machine")
@pytest.mark.parametrize(
    "g",
    [
        *GEOMETRIES,
        plain(1, 33, 33, (9, 9)),  # a ragged block in the image, a ragged tile of the points
        plain(1, 7, 17, (13, 13), groups=1, offset_groups=7),
        plain(2, 8, 4, (7, 9), groups=2),  # 4 channels a group: words of neighbours
        plain(1, 160, 64, (6, 6), groups=2),  # five blocks of 32 columns a group
        plain(1, 16, 16, (3, 700)),
    ],
    ids=lambda g: "x".join(map(str, (*g[:6], *g.image_size))),
)
def test_products_of_bfloat16(g: Geometry) -> None:
    call = Call(g).to(torch.bfloat16)
    want = call.to(torch.float64).run(reference)
    cpu.level = 2
    wide = call.run()
    before = None
    for cpu.level in PAIRS:
        for cpu.threads in (1, 3):
            got = call.run()
            assert_close(got, want, 3e-3, (cpu.level, cpu.threads))
        # The columns are the same numbers, but are added up in another order.
        if before is not None:
            assert_close(got, before, 6e-4, cpu.level)
        before = got
        if g.image_channels >= 16 and got["gather"] is not None and wide["gather"] is not None:
            depthwise = g.groups == g.image_channels
            assert torch.equal(got["gather"], wide["gather"]) == depthwise  # it has no products


@pytest.mark.skipif(not PAIRS, reason="no fast products of bfloat16 on this machine")
def test_other_products_between_those_of_bfloat16() -> None:
    """oneDNN, which torch's convolutions use, has other shapes of AMX's tiles."""
    call = Call(GEOMETRIES[0]).to(torch.bfloat16)
    convolution = torch.nn.Conv2d(64, 40, 3, dtype=torch.bfloat16)
    with torch.no_grad():
        ours, theirs = call.run(), convolution(call.image)
        for cpu.threads in (0, 1, 3):
            for _ in range(3):
                assert torch.equal(convolution(call.image), theirs)
                got = call.run()
                assert got["gather"] is not None and ours["gather"] is not None
                assert torch.equal(got["gather"], ours["gather"])


@pytest.mark.skipif(4 not in PAIRS, reason="no AMX on this machine")
def test_where_the_system_refuses_amx() -> None:
    """As it does where a signal stack would be too small for the tiles."""
    code = """
        import ctypes, sys
        from pathlib import Path

        class Stack(ctypes.Structure):
            _fields_ = [("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

        memory = ctypes.create_string_buffer(8192)
        stack = Stack(ctypes.addressof(memory), 0, len(memory))
        assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
        print(ctypes.CDLL(sys.argv[1]).deformnd_level())
    """
    (core,) = Path(cpu.__file__).parent.parent.glob("_core.*")
    command = [sys.executable, "-c", textwrap.dedent(code), str(core)]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(child.stdout) in (2, 3)


def test_half_conversions_are_exact() -> None:
    """A 1x1 kernel with weight 1 copies, so every half value must survive, and round to even."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    g = Geometry(1, 1, 1, 1, 0, 0, (2**16,), (2**16,), (1,), (1,), (0,), (1,))
    for dtype, wide in itertools.product(
        (torch.float16, torch.bfloat16), (torch.float32, torch.float64)
    ):
        image = bits.view(dtype).view(1, 1, -1)
        finite = image.isfinite()
        image = torch.where(finite, image, 0)
        one = torch.ones(1, 1, 1, dtype=dtype)
        for cpu.level in LEVELS:
            assert torch.equal(cpu.gather(g, image, one, None, None, None), image)
            # The same product, written in the half type from sums that it must round.
            scale = torch.full((1, 1, 1), 1.0009765625, dtype=wide)
            got = cpu.gather(g, image, scale, None, None, None)
            exact = (image.to(wide) * scale.item()).to(dtype)
            assert torch.equal(got, exact), (dtype, wide)


def test_offset_and_mask_of_other_dtypes(level: int) -> None:
    g = GEOMETRIES[0]
    call = Call(g).to(torch.float32)
    assert call.offset is not None and call.mask is not None
    call.offset = call.offset.double()
    got, want = call.run(), call.to(torch.float64).run(reference)
    assert_close(got, want, 1e-6)
    assert got["offset"] is not None and got["offset"].dtype == torch.float64
    call.offset, call.mask = call.offset.float(), call.mask.half()
    assert_close(call.run(), call.to(torch.float64).run(reference), 5e-4)


@pytest.mark.parametrize(
    "dtype", [*KINDS, *((level, torch.bfloat16) for level in LEVELS)], indirect=True, ids=str
)
@pytest.mark.parametrize("size", [(40,), (6, 40), (3, 5, 9)], ids=str)
@pytest.mark.parametrize("channels", (3, 36))
def test_layouts(channels: int, size: tuple[int, ...], dtype: torch.dtype) -> None:
    """Channels last and slices give what contiguous tensors give, in the layout of the tensor."""
    call = Call(plain(2, channels, 70, size)).to(dtype)
    want = call.run()
    last = {1: None, 2: torch.channels_last, 3: torch.channels_last_3d}[len(size)]

    def assert_runs(arrange: object) -> None:
        other = object.__new__(Call)
        other.__dict__ = {
            key: arrange(value) if isinstance(value, Tensor) else value  # type: ignore[operator]
            for key, value in call.__dict__.items()
        }
        got = other.run()
        assert_same(got, want)
        for name, owner in (("gather", other.image), ("scatter", other.points)):
            result = got[name]
            assert result is not None
            assert result.is_contiguous(memory_format=memory_format(owner))

    assert_runs(lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 2 else t)
    assert_runs(lambda t: t.repeat_interleave(2, dim=-1)[..., ::2])
    if last is not None:
        assert_runs(lambda t: t.contiguous(memory_format=last) if t.dim() > 2 else t)


def test_computes_only_what_is_needed(dtype: torch.dtype) -> None:
    for g in (GEOMETRIES[0], GEOMETRIES[2], GEOMETRIES[6], GEOMETRIES[-2]):
        call = Call(g).to(dtype)
        given = (call.image, call.points, call.weight, call.offset, call.mask)
        full = cpu.gradients(g, *given, ALL)
        for needs in itertools.product((False, True), repeat=5):
            got = cpu.gradients(g, *given, needs)
            want = [t if need else None for t, need in zip(full[:5], needs, strict=True)]
            assert_same(dict(zip(NAMES, got[:5], strict=True)), dict(zip(NAMES, want, strict=True)))


@pytest.mark.parametrize(
    "g",
    [
        plain(1, 128, 40, (20, 30)),
        plain(5, 64, 24, (12, 30)),
        plain(2, 64, 24, (9, 40), offset_groups=16),
        plain(1, 8, 8, (64, 64)),  # one block of channels: threads share the image
        plain(1, 16, 16, (48, 50), groups=16),
        plain(1, 3, 5, (48, 50)),
        plain(1, 12, 5, (12, 14, 15)),
    ],
    ids=lambda g: "x".join(map(str, (*g[:6], *g.image_size))),
)
def test_the_same_threads_give_the_same_bits(g: Geometry, dtype: torch.dtype) -> None:
    call = Call(g, dtype)
    summed = call.points
    runs = {}
    for cpu.threads in (1, 2, 3, 7, 16, 64):
        runs[cpu.threads] = call.run()
        for _ in range(3):
            assert_same(call.run(), runs[cpu.threads])
    for got in runs.values():  # Another number of threads may add up in another order.
        assert_close(got, runs[1], 1e-6 if dtype == torch.float32 else 2e-3)
    cpu.threads = 0
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        sums = [
            cpu.gradients(
                g, call.image, call.points, call.weight, call.offset, call.mask, ALL, summed
            )[5]
            for _ in range(3)
        ]
        assert all(torch.equal(t, sums[0]) for t in sums if t is not None)


@pytest.mark.parametrize("size", [(9,), (5, 6), (3, 4, 5)], ids=str)
def test_odd_positions(size: tuple[int, ...], dtype: torch.dtype) -> None:
    """Positions that no pixel is near, or that are no numbers, sample 0 without gradient."""
    limits = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 4e-3}
    for of in (torch.float32, torch.float64) if dtype == torch.float32 else (dtype,):
        call = Call(plain(2, 20, 6, size), of)
        assert call.offset is not None
        odd = torch.tensor(
            [math.nan, math.inf, -math.inf, 1e30, -1e30, 3e9, -3e9, 2.0**31, 1e-40, -1e-40, -0.0],
            dtype=of,
        )
        flat = call.offset.view(-1)
        flat[::3] = odd.repeat(-(-len(flat) // 33))[: len(flat[::3])]
        got = call.run()
        for name, t in got.items():
            assert t is not None and t.isfinite().all(), name
        assert_close(got, call.to(torch.float64).run(reference), limits[of])


@pytest.mark.parametrize("rank", (1, 2, 3))
def test_positions_far_outside(rank: int) -> None:
    """Their indices would not fit 32 bits: for tests/sanitize.sh, which sees them overflow."""
    for seed in range(60):
        g = random_geometry(rank, seed)
        call = Call(g, torch.float32, seed=seed)
        if call.offset is None:
            continue
        far = torch.tensor(
            [-998244352.0, 998244352.0, -(2.0**30), 2.0**30 - 64, 2.0**29, -(2.0**28)]
        )
        gen = torch.Generator().manual_seed(seed)
        picked = far[torch.randint(len(far), call.offset.shape, generator=gen)]
        odd = torch.rand(call.offset.shape, generator=gen) < 0.2
        call.offset = torch.where(odd, picked, call.offset)
        want = call.to(torch.float64).run(reference)
        for cpu.level in LEVELS:
            assert_close(call.run(), want, 1e-5, (seed, cpu.level, g))


@pytest.mark.parametrize("what", ("mask", "points", "image", "weight", "offset"))
@pytest.mark.parametrize("value", (math.inf, -math.inf, math.nan), ids=str)
def test_values_that_are_not_finite(what: str, value: float, dtype: torch.dtype) -> None:
    """NaN, infinite or finite as in the definition; a mask multiplies its sample, also a 0."""
    for rank, (seed, of) in itertools.product((1, 2, 3), enumerate((dtype, torch.double))):
        g = random_geometry(rank, seed)
        call = Call(g, of, seed=seed)
        tensor = getattr(call, what)
        if tensor is None:
            continue
        gen = torch.Generator().manual_seed(seed)
        tensor.view(-1)[torch.randint(tensor.numel(), (2,), generator=gen)] = value
        want = call.run(reference)
        limit = 1e-1 if of == torch.bfloat16 else 1e-4
        for name, got in call.run().items():
            if got is None:
                continue
            torch.testing.assert_close(got, want[name], rtol=limit, atol=limit, equal_nan=True)


def test_a_mask_multiplies_its_sample(level: int) -> None:
    # Four positions: inside with samples 1.5 and -2, outside, and no number.
    g = Geometry(1, 1, 1, 1, 1, 1, (4,), (4,), (1,), (1,), (0,), (1,))
    image = torch.tensor([[[1.0, 2.0, -2.0, -2.0]]])
    offset = torch.tensor([[[0.5, 1.5, 9.0, math.nan]]])
    image[0, 0, 2:] = -2
    one = torch.ones(1, 1, 1)
    for value in (math.inf, -math.inf, math.nan):
        mask = torch.full((1, 1, 4), value)
        want = torch.tensor([[[1.5, -2.0, 0.0, 0.0]]]) * value
        for backend in (cpu, reference):
            got = backend.gather(g, image, one, offset, mask, None)
            assert got[0, 0, 2:].isnan().all()
            assert torch.equal(got.nan_to_num(0), want.nan_to_num(0))
            # The gradient of the mask is that of the output times the sample.
            grads = backend.gradients(g, image, mask, one, offset, None, ALL)
            assert grads[4] is None
            grads = backend.gradients(g, image, mask, one, offset, torch.ones(1, 1, 4), ALL)
            assert grads[4] is not None and grads[3] is not None
            assert torch.equal(grads[4].nan_to_num(0), want.nan_to_num(0))
            assert grads[4][0, 0, 2:].isnan().all()
            assert torch.equal(grads[3][0, 0, 2:], torch.zeros(2))  # nothing moves there


@pytest.mark.parametrize("size", [(9,), (5, 6), (3, 4, 5)], ids=str)
def test_integer_positions(size: tuple[int, ...], level: int) -> None:
    """The cell of a position is [floor, floor + 1); -1 is inside, the size is not."""
    for seed, dtype in enumerate((torch.float32, torch.float64)):
        call = Call(plain(2, 20, 6, size), dtype)
        gen = torch.Generator().manual_seed(seed)
        assert call.offset is not None
        call.offset = torch.randint(-7, 8, call.offset.shape, generator=gen).to(dtype)
        assert_close(call.run(), call.to(torch.float64).run(reference), 1e-5)


def test_empty_tensors() -> None:
    for g in (
        plain(0, 4, 6, (5, 6)),
        plain(2, 0, 6, (5, 6), mask_groups=0),
        plain(2, 4, 0, (5, 6)),
    ):
        call = Call(g, torch.float32)
        assert_close(call.run(), call.run(reference), 0.0)


def test_writes_every_element(dtype: torch.dtype) -> None:
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN
    try:
        for g in GEOMETRIES:
            call = Call(g, dtype)
            for cpu.threads in (1, 3):
                for name, t in call.run().items():
                    assert t is None or t.isfinite().all(), (name, g)
    finally:
        torch.use_deterministic_algorithms(False)


def test_non_finite_values_stay_in_their_group(level: int) -> None:
    g = plain(1, 32, 32, (6, 7), groups=32, offset_groups=1)
    call = Call(g, torch.float32)
    call.image[:, 5] = math.inf
    call.points[:, 7] = math.nan
    got = call.run()
    assert got["gather"] is not None and got["scatter"] is not None and got["weight"] is not None
    assert got["gather"].isfinite().all(dim=(0, 2, 3)).tolist() == [c != 5 for c in range(32)]
    assert got["scatter"].isfinite().all(dim=(0, 2, 3)).tolist() == [c != 7 for c in range(32)]
    assert got["weight"].isfinite().all(dim=(1, 2, 3)).tolist() == [
        c not in (5, 7) for c in range(32)
    ]


def test_python_threads_at_once() -> None:
    calls = [Call(GEOMETRIES[i % 7], torch.float32, seed=i) for i in range(8)]
    cpu.threads = 2
    want = [call.run() for call in calls]
    got: list[dict[str, Tensor | None]] = [{} for _ in calls]

    def work(i: int) -> None:
        for _ in range(5):
            got[i] = calls[i].run()

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for g, w in zip(got, want, strict=True):
        assert_same(g, w)


def _threads() -> set[str]:
    return set(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are not counted here")
def test_no_call_ends_or_starts_threads() -> None:
    """A region of fewer threads would end the others, and the next one start them anew."""
    calls = [
        Call(plain(1, 64, 64, (40, 40)), torch.float32),  # few panels of weights
        Call(plain(1, 64, 64, (12, 12)), torch.float32),  # work for some of the threads
        Call(plain(1, 8, 4, (3, 4)), torch.float32),  # for one
        Call(plain(2, 32, 32, (20, 20), groups=32), torch.float32),
    ]
    torch.set_num_threads(16)
    for call in calls:
        call.run()
    before = _threads()
    for call in calls:
        call.run()
        assert _threads() == before


@pytest.mark.parametrize("size", [(4000,), (90, 60), (40, 12, 12)], ids=str)
@pytest.mark.parametrize("spread", (0.0, 2.0, 40.0))
def test_threads_share_one_image(size: tuple[int, ...], spread: float, level: int) -> None:
    """Each with image gradients of its own, of which it clears and adds what its samples touch."""
    call = Call(plain(1, 16, 8, size), spread=spread)
    want = call.run(reference)
    for cpu.threads in (3, 16, 64):
        assert_close(call.run(), want, 1e-10, cpu.threads)


def test_large_results_of_many_threads() -> None:
    """Threads touch the pages of large results before they compute, and must not spoil any."""
    call = Call(plain(1, 8, 8, (1200, 300), groups=8), torch.float32)
    cpu.threads = 1
    want = call.run()
    for cpu.threads in (2, 16):
        assert_close(call.run(), want, 1e-5, cpu.threads)


def test_as_many_callers_as_threads_get_the_same_bits() -> None:
    """Then each call runs on the thread that makes it."""
    calls = [Call(plain(1, 16, 16, (48, 50)), torch.float32, seed=i) for i in range(4)]
    for count in (2, 5):
        cpu.threads = count
        want = [call.run() for call in calls]
        with ThreadPoolExecutor(len(calls)) as pool:
            for _ in range(5):
                for got, w in zip(pool.map(Call.run, calls), want, strict=True):
                    assert_same(got, w)


@pytest.mark.parametrize("limit", ("1", "3"))
def test_fewer_threads_than_asked_for_give_the_same_bits(limit: str, tmp_path: Path) -> None:
    code = """
import sys
sys.path[:0] = sys.argv[2:]
import torch, test_cpu
test_cpu.cpu.threads = 7
call = test_cpu.Call(test_cpu.plain(1, 16, 16, (48, 50)), torch.float32)
torch.save(call.run(), sys.argv[1])
"""
    paths = [Path(__file__).parent, Path(deformnd.__file__).parents[1]]
    results = []
    for environment in ({}, {"OMP_THREAD_LIMIT": limit}):
        file = tmp_path / f"{len(results)}.pt"
        subprocess.run(
            [sys.executable, "-c", code, file, *paths],
            env={**os.environ, **environment},
            check=True,
        )
        results.append(torch.load(file))
    assert_same(*results)


def _child(call: Call, want: dict[str, Tensor | None]) -> None:
    torch.set_num_threads(1)  # as a DataLoader does; the core is still told to use more
    assert_same(call.run(), want)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_runs_in_a_forked_child() -> None:
    """A DataLoader worker: the parent's thread pool is gone there."""
    cpu.threads = 7
    call = Call(plain(1, 16, 16, (48, 50)), torch.float32)
    child = multiprocessing.get_context("fork").Process(target=_child, args=(call, call.run()))
    child.start()
    child.join(60)
    try:
        assert child.exitcode == 0
    finally:
        child.kill()


def import_with(cores: list[bytes], tmp_path: Path, version: str | None = None) -> list[list[str]]:
    """What a fresh Python says that imports a copy of the package, for each of these cores."""
    package = Path(cpu.__file__).parent.parent
    scripts = []
    for i, core in enumerate(cores):
        copy = tmp_path / str(i) / "deformnd"
        shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
        (found,) = copy.glob("_core.*")
        found.write_bytes(core)
        if version is not None:
            init = copy / "__init__.py"
            init.write_text(
                re.sub('__version__ = ".*"', f'__version__ = "{version}"', init.read_text())
            )
        scripts.append(f"""
import sys, torch, warnings
from importlib.machinery import PathFinder
sys.meta_path.insert(0, PathFinder)  # before the finder of an editable install
sys.path.insert(0, {str(copy.parent)!r})
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import deformnd
assert deformnd.__file__.startswith({str(copy.parent)!r})
x = torch.randn(1, 2, 5, 5)
y = deformnd.deform_conv2d(x, torch.ones(1, 2, 1, 1), torch.zeros(1, 2, 5, 5))
assert torch.allclose(y, x.sum(1, keepdim=True))
print(deformnd.has_ops(), *[w.message for w in seen if "deformnd" in str(w.message)], sep="\\n")
""")
    runs = apart("import torch", scripts)
    for status, said in runs:
        assert not status, said
    return [said.splitlines() for _, said in runs]


def core_bytes() -> bytes:
    (found,) = Path(cpu.__file__).parent.parent.glob("_core.*")
    return found.read_bytes()


def test_a_core_of_another_version_is_not_called(tmp_path: Path) -> None:
    ((ops, warning),) = import_with([core_bytes()], tmp_path, "0.0.9")
    assert ops == "False"
    assert f"is of version {deformnd.__version__}, expected 0.0.9" in warning


@pytest.mark.skipif(not hasattr(_ctypes, "__file__"), reason="no other library at hand")
def test_a_core_without_a_version_is_not_called(tmp_path: Path) -> None:
    """A library that has no version, as a core of an early version, is not called."""
    ((ops, warning),) = import_with([Path(_ctypes.__file__).read_bytes()], tmp_path)
    assert ops == "False"
    assert f"is of another version, expected {deformnd.__version__}" in warning


@pytest.mark.skipif(sys.platform != "linux", reason="ELF files")
def test_a_core_that_was_cut_off_is_not_loaded(tmp_path: Path) -> None:
    """Loading such a file would end the process when it reads what is missing."""
    core = core_bytes()
    cores = [core[:size] for size in (0, 40, 100, 5000, 100000, len(core) // 2, len(core) * 7 // 8)]
    # The same for headers that make no sense.
    for at, value in ((32, b"\xff" * 8), (54, b"\0\0"), (54, b"\xff" * 4)):
        cores.append(core[:at] + value + core[at + len(value) :])
    for ops, warning in import_with(cores, tmp_path):
        assert ops == "False"
        assert "cannot be loaded (" in warning


def test_a_version_that_is_no_text(tmp_path: Path) -> None:
    version = deformnd.__version__.encode() + b"\0"
    core = core_bytes()
    assert version in core
    wrong = core.replace(version, b"\xff" * (len(version) - 1) + b"\0")
    ((ops, warning),) = import_with([wrong], tmp_path)
    assert ops == "False"
    assert "is of version \ufffd\ufffd" in warning


def test_a_core_that_is_no_library_is_not_called(tmp_path: Path) -> None:
    (ops, warning), right = import_with([b"no library", core_bytes()], tmp_path)
    assert ops == "False"
    assert "cannot be loaded" in warning
    assert right == ["True"]


def test_huge_planes_go_to_the_reference() -> None:
    """Planes beyond 32-bit pixel indices; the check alone, since none fits in memory here."""
    g = plain(1, 1, 1, (2**16, 2**15))
    assert not cpu._fits(g)
    assert cpu._fits(plain(2**20, 2**12, 2**12, (2**15, 2**15)))
