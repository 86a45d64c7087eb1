"""The GPU backend against the float64 reference: interpreted, compiled, and on a GPU.

Triton must know before it is imported that it is to interpret, so the interpreted tests run in
a process of their own with TRITON_INTERPRET=1, which test_in_interpreter starts.
"""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import itertools
import math
import os
import random
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import cases
import deformnd
import random_calls
from apart import apart
from cases import relative_error
from deformnd.kernels import attention, autograd, geometry, library, reference
from deformnd.kernels.geometry import (
    Geometry,
    memory_format,
)
from random_calls import close

triton = pytest.importorskip("triton")

from deformnd.kernels import gpu as backend  # noqa: E402
from deformnd.kernels.gpu import (  # noqa: E402
    backward_sorted,
    driver,
    forward,
    hopper,
    layout,
    prepare,
    runtime,
    strategy,
    tiles,
    variants,
)
from deformnd.kernels.gpu.runtime import GIVEN, Buffer, Launch, Plan  # noqa: E402

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
gpu = pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETING, reason="no GPU")

# The largest relative L2 error of the result and of the gradients.
TOLERANCE = {
    torch.float32: (1e-5, 1e-5),
    torch.float16: (4e-4, 2e-3),
    torch.bfloat16: (3e-3, 1e-2),
}


@dataclasses.dataclass(frozen=True)
class Case:
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    transposed: bool = False
    batch: int = 2
    image: int = 4  # channels
    points: int = 6
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    offset_groups: int = 1
    mask_groups: int = 1
    bias: bool = True
    last: bool = False

    def make(
        self, dtype: torch.dtype, device: str, seed: int = 0, float_offset: bool = False
    ) -> Problem:
        channels = (self.points, self.image) if self.transposed else (self.image, self.points)
        case = cases.Case(
            self.size, self.kernel, self.transposed, self.batch, channels, self.stride or 1,
            self.padding or 1, 0, self.dilation or 1, self.groups, self.offset_groups,
            self.mask_groups, self.bias,
        )  # fmt: skip
        given = case.tensors(seed=seed)
        t = {name: None if t is None else t.to(device, dtype) for name, t in given.items()}
        if float_offset and self.offset_groups:
            t["offset"] = given["offset"].to(device, torch.float32)
        if self.last and case.n > 1:
            form = {2: torch.channels_last, 3: torch.channels_last_3d}[case.n]
            t |= {name: t[name].to(memory_format=form) for name in ("input", "weight")}
        family = geometry.FAMILIES[self.transposed]
        g = family.geometry(*t.values(), *case.operator_parameters())
        grad = torch.randn(family.output_shape(g), generator=torch.Generator().manual_seed(seed))
        return Problem(g, self.transposed, *t.values(), grad.to(device, dtype))


@dataclasses.dataclass
class Problem:
    g: Geometry
    transposed: bool
    x: Tensor
    weight: Tensor
    offset: Tensor | None
    mask: Tensor | None
    bias: Tensor | None
    grad: Tensor

    def double(self) -> Problem:
        return Problem(
            **{
                f.name: value.double() if isinstance(value, Tensor) else value
                for f in dataclasses.fields(self)
                for value in [getattr(self, f.name)]
            }
        )

    def moved(self, size: float, generator: torch.Generator) -> Problem:
        """With every factor changed by a relative `size`, or so."""
        found = {name: getattr(self, name) for name in ("x", "weight", "mask", "grad")}
        other = {
            name: random_calls.moved(t, size, generator)
            for name, t in found.items()
            if t is not None
        }
        return dataclasses.replace(self, **other)

    def forward(self, backend: Any) -> Tensor:
        function = backend.scatter if self.transposed else backend.gather
        return function(self.g, self.x, self.weight, self.offset, self.mask, self.bias)

    def backward(self, backend: Any, needs: tuple[bool, ...] = (True,) * 5) -> tuple[Any, ...]:
        """Gradients of input, weight, offset, mask and bias."""
        by_x, *others, by_bias = needs
        image, points = (self.grad, self.x) if self.transposed else (self.x, self.grad)
        by_both = (False, by_x) if self.transposed else (by_x, False)
        grads = backend.gradients(
            self.g, image, points, self.weight, self.offset, self.mask,
            (*by_both, *others), self.grad if by_bias else None,
        )  # fmt: skip
        return (grads[self.transposed], *grads[2:])


def check(problem: Problem, forward: float, backward: float) -> None:
    exact = problem.double()
    y = problem.forward(backend)
    assert y.dtype == problem.x.dtype and memory_format(y) == memory_format(problem.x)

    def moved(generator: torch.Generator) -> Problem:
        return exact.moved(forward / 2, generator)

    expected = exact.forward(reference)
    assert close(y, expected, forward, lambda generator: moved(generator).forward(reference))
    expected = exact.backward(reference)
    bias = problem.grad[0].flatten(1)[:, 0]
    tensors = (problem.x, problem.weight, problem.offset, problem.mask, bias)
    names = ("input", "weight", "offset", "mask", "bias")
    found = problem.backward(backend)
    for i, (name, got, want, t) in enumerate(zip(names, found, expected, tensors, strict=True)):
        if want is None:
            assert got is None
            continue
        assert got.dtype == t.dtype and got.shape == t.shape
        form = memory_format(t) if name == "input" else torch.contiguous_format
        assert got.is_contiguous(memory_format=form)
        right = close(got, want, backward, lambda g, i=i: moved(g).backward(reference)[i])
        assert right, f"gradient of {name}: {relative_error(got, want):.2e}"


# Interpreted on the CPU


@pytest.mark.skipif(INTERPRETING, reason="is in the interpreter")
def test_in_interpreter() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        __file__,
        "-rs",
        "-p",
        "no:cacheprovider",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    child = subprocess.run(
        [*command, "-k", "test_interpreted"], env=environment, capture_output=True, text=True
    )
    print(child.stdout, child.stderr)
    assert child.returncode == 0
    if "passed" not in child.stdout:
        pytest.skip(child.stdout)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's interpreter, and tiles fit for it."""
    import numpy as np

    if not INTERPRETING:
        pytest.skip("runs in test_in_interpreter")
    if tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("Triton 3.6 interprets with NumPy below 2.4 only")
    rows = tuple(
        dataclasses.replace(row, block_p=32, block_o=16, block_c=16) for row in tiles.PORTABLE
    )
    random_calls.prepare_interpreter()
    limits(monkeypatch, PORTABLE=rows)
    yield
    forget()


def limits(monkeypatch: pytest.MonkeyPatch, **values: Any) -> None:
    """Other limits than those of tiles.py, for calls that are planned from now on."""
    for name, value in values.items():
        monkeypatch.setattr(tiles, name, value)
    forget()


def sorting(monkeypatch: pytest.MonkeyPatch, on: bool = True) -> None:
    """Have the image gradient of half numbers come from sorted lists, however small the call is, or
    never."""
    most = 0 if on else 1 << 62
    most_added = dict.fromkeys(("ADDED", "ADDED_BY_BLOCKS", "ADDED_DEPTHWISE"), most)
    limits(monkeypatch, **most_added, SORTED_CHANNELS=0)


def on_device(monkeypatch: pytest.MonkeyPatch, architecture: str, count: int = 132) -> None:
    """Plan as for a GPU with so many multiprocessors."""
    device = tiles.Device(architecture, count, 228 << 10)
    monkeypatch.setattr(tiles, "device_of", lambda _: device)


def repeatable(monkeypatch: pytest.MonkeyPatch, on: bool) -> None:
    """As torch.use_deterministic_algorithms, but for this package alone."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: on)


def forget() -> None:
    """Drop plans that were made with other tables of tiles."""
    layout.sizes_of.cache_clear()
    backend._PLANS.clear()


INTERPRETED = [
    Case((9,), (3,), batch=1),
    Case((11,), (4,), stride=(2,), padding=(3,), dilation=(2,), groups=2, offset_groups=2,
         mask_groups=4, batch=1),
    Case((8,), (1,), padding=(0,), mask_groups=0, bias=False, transposed=True),
    Case((6, 7), (3, 3), batch=1, last=True),
    Case((7, 5), (3, 2), stride=(2, 1), padding=(2, 0), dilation=(1, 2), groups=2),
    Case((5, 4), (2, 3), image=20, points=17, offset_groups=1, mask_groups=0, batch=1),
    Case((4, 5), (1, 3), image=12, offset_groups=4, mask_groups=2, batch=1, last=True),
    Case((5, 4), (3, 1), groups=2, offset_groups=0, mask_groups=2, batch=1),
    Case((4, 4), (2, 2), points=4, groups=4, offset_groups=4, mask_groups=1, batch=1),
    Case((4, 3), (2, 2), stride=(2, 2), transposed=True),
    Case((4, 3), (2, 2), stride=(2, 2), transposed=True, offset_groups=2, last=True, batch=1),
    Case((3, 4, 3), (2, 1, 2), batch=1),
    Case((3, 2, 3), (1, 2, 2), offset_groups=2, mask_groups=1, batch=1, transposed=True),
    Case((6, 5), (3, 2), image=3, points=5, batch=1, last=True),
    # Several columns of a strip of positions, blocks of channels, and groups of as many.
    Case((6, 19), (1, 2), image=40, points=17, offset_groups=1, mask_groups=1, batch=1),
    Case((5, 3), (1, 2), image=160, points=12, groups=2, offset_groups=2, batch=1),
    # Narrow sample groups of several blocks of channels, across weight groups.
    Case((4, 3), (2, 2), image=24, points=6, groups=3, offset_groups=2, mask_groups=2, batch=1),
    Case((5, 3), (2, 1), image=40, points=5, offset_groups=2, mask_groups=1, batch=1),
    # Several weight groups in a load of channels, and in a sample group.
    Case((5, 4), (3, 2), image=32, points=48, groups=16, offset_groups=2, mask_groups=1, batch=1),
    Case((4, 5), (1, 2), image=18, points=12, groups=6, offset_groups=2, batch=1, last=True),
]  # fmt: skip

# Calls without products between channels. In the last two, lanes take several chunks of a sample
# group's channels, and there are several blocks of those.
DEPTHWISE = [
    Case((6, 7), (3, 3), image=8, points=8, groups=8),
    Case((6, 5), (3, 2), image=12, points=24, groups=12, offset_groups=3, mask_groups=1, batch=1),
    Case((11,), (4,), image=6, points=6, groups=6, offset_groups=6, mask_groups=2, stride=(2,),
         padding=(3,), last=True),
    Case((5, 4), (3, 1), image=6, points=24, groups=6, offset_groups=0, mask_groups=2, batch=1,
         transposed=True),
    Case((3, 2, 3), (2, 1, 2), image=40, points=40, groups=40, batch=1, mask_groups=0, last=True,
         padding=(1, 0, 1)),
    Case((4, 3), (2, 2), image=100, points=100, groups=100, batch=1),
    Case((4, 3), (2, 2), image=160, points=160, groups=160, batch=1, transposed=True),
]  # fmt: skip


# Calls with few outputs, which all channels share: sample groups of few channels and of several
# blocks of them, an output alone, and weights of two groups that are spread.
FEW_OUTPUTS = [
    Case((6, 7), (3, 3), image=3, points=3),
    Case((5, 6), (3, 2), image=40, points=1, offset_groups=5, mask_groups=5, batch=1, bias=False),
    Case((9,), (3,), image=20, points=4, offset_groups=2, mask_groups=1, stride=(2,), last=True),
    Case((3, 2, 3), (2, 1, 2), image=9, points=2, offset_groups=3, mask_groups=0, batch=1),
    Case((4, 3), (1, 1), image=150, points=3, offset_groups=1, batch=1, padding=(0, 0)),
    Case((4, 3), (2, 2), image=16, points=4, groups=2, offset_groups=1, mask_groups=1),
    Case((5, 4), (3, 2), image=7, points=3, stride=(2, 1), transposed=True),
]  # fmt: skip


@pytest.mark.parametrize("case", FEW_OUTPUTS, ids=str)
def test_interpreted_few_outputs(
    case: Case, interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(case.make(torch.float32, "cpu"), 1e-5, 1e-5)
    if case.groups == 1:
        assert {"backward_atomic_depthwise", "backward_weight_depthwise"} <= kernels_used()
    if case.points < 4 and not case.transposed:
        assert "forward_few" in kernels_used()


@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
def test_interpreted_depthwise(
    case: Case, interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(case.make(torch.float32, "cpu"), 1e-6, 1e-6)
    if case.image in (8, 12, 40, 100):
        half = torch.float16
        check(case.make(half, "cpu", float_offset=True), *TOLERANCE[half])
    assert not kernels_used() & {"forward", "backward_atomic", "backward_weight"}
    if case.image in (12, 40):
        repeatable(monkeypatch, True)
        check(case.make(torch.float32, "cpu"), 1e-6, 1e-6)


# Aggregations have no weight, and the depthwise kernels take one of ones for them.
AGGREGATIONS = [
    Case((6, 7), (3, 3), image=8, points=8, groups=8, offset_groups=2, mask_groups=2, bias=False),
    Case((11,), (4,), image=6, points=6, groups=6, offset_groups=3, mask_groups=0, stride=(2,),
         padding=(3,), bias=False),
    Case((3, 2, 3), (2, 1, 2), image=20, points=20, groups=20, offset_groups=0, mask_groups=4,
         batch=1, last=True, padding=(1, 0, 1), bias=False),
]  # fmt: skip


def check_aggregation(case: Case, dtype: torch.dtype, device: str, *bounds: float) -> None:
    made = dataclasses.replace(case.make(dtype, device, float_offset=True), weight=None)
    exact = made.double()
    assert close(made.forward(backend), exact.forward(reference), bounds[0])
    needs = (True, False, True, True, False)
    want = exact.backward(reference, needs)
    for name, got, expected in zip("xwomb", made.backward(backend, needs), want, strict=True):
        if expected is None:
            assert got is None
        else:
            assert close(got, expected, bounds[1]), f"{name}: {relative_error(got, expected):.2e}"


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", AGGREGATIONS, ids=str)
def test_interpreted_aggregation(
    case: Case, deterministic: bool, interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeatable(monkeypatch, deterministic)
    check_aggregation(case, torch.float32, "cpu", 1e-6, 1e-6)


@dataclasses.dataclass(frozen=True)
class Attends:
    """A call of deform_attention."""

    shapes: tuple[tuple[int, ...], ...]
    batch: int = 2
    queries: int = 11
    heads: int = 3
    channels: int = 8
    points: int = 4
    # The value is a part of a wider tensor; pixels come before the batch.
    part: bool = False
    pixels_first: bool = False

    def make(
        self, dtype: torch.dtype, device: str, other: torch.dtype = torch.float32, seed: int = 0
    ) -> list[Tensor]:
        """grad_output, value, and locations and weights of the other dtype."""
        generator = torch.Generator().manual_seed(seed)
        levels, n, pixels = len(self.shapes), len(self.shapes[0]), sum(map(math.prod, self.shapes))
        samples = (self.batch, self.queries, self.heads, levels, self.points)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        # Positions away from the centres of pixels, where float32 and float64 may find different
        # cells; some outside.
        sizes = torch.tensor(self.shapes).flip(1).view(levels, 1, n)
        whole = torch.rand(*samples, n, generator=generator) * (sizes + 4) - 2
        position = whole.floor() + 0.15 + 0.7 * torch.rand(*samples, n, generator=generator)
        locations = (position + 0.5) / sizes
        value = randn(self.batch, pixels, self.heads + self.part, self.channels).to(device, dtype)
        if self.pixels_first:
            value = value.transpose(0, 1).contiguous().transpose(0, 1)
        grad_output = randn(self.batch, self.queries, self.heads * self.channels)
        return [
            grad_output.to(device, dtype),
            value[:, :, self.part :],
            locations.to(device, other),
            randn(*samples).to(device, other),
        ]

    def geometry(self, tensors: Sequence[Tensor]) -> geometry.Attention:
        sizes = [size for shape in self.shapes for size in shape]
        return geometry.attention_geometry(*tensors[1:], sizes)


def check_attention(case: Attends, tensors: Sequence[Tensor], *bounds: float) -> None:
    """Output and gradients against the float64 reference."""
    a = case.geometry(tensors)
    grad_output, *given = tensors
    exact = [t.double() for t in given]
    # By float32 positions, whose rounding is a part of the definition.
    sizes = torch.tensor(case.shapes, device=given[0].device).flip(1).unsqueeze(1)
    exact[1] = (given[1].float() * sizes).double() / sizes
    wanted = [
        reference.attend(a, *exact),
        *reference.attend_gradients(a, grad_output.double(), *exact, [True] * 3),
    ]
    got = [backend.attend(a, *given), *backend.attend_gradients(a, *tensors, [True] * 3)]
    likes = (grad_output, *given)
    for i, (g, w, like) in enumerate(zip(got, wanted, likes, strict=True)):
        assert g is not None and g.dtype == like.dtype and g.shape == like.shape
        assert g.is_contiguous() and close(g, w, bounds[i > 0]), (i, relative_error(g, w))


# Channels that need masks, several chunks and blocks of them; points that 1, 2 and 4 divide.
ATTENDS = [
    Attends(((5, 6), (3, 2), (1, 4))),
    Attends(((7,), (3,)), channels=5, points=3),
    Attends(((3, 4, 5), (2, 1, 3)), channels=12, points=2, heads=1, batch=1),
    Attends(((5, 6), (3, 2)), channels=32, queries=5, part=True),
    Attends(((9, 3),), channels=100, points=1, queries=3, heads=2, batch=1),
    Attends(((4, 4), (2, 2)), channels=1, points=6, pixels_first=True),
    Attends(((4, 3), (2, 3)), channels=200, points=2, queries=2, heads=1, part=True),
]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", ATTENDS, ids=str)
def test_interpreted_attention(
    case: Attends, deterministic: bool, interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeatable(monkeypatch, deterministic)
    check_attention(case, case.make(torch.float32, "cpu"), 1e-6, 1e-6)
    if case.channels in (5, 32):
        monkeypatch.setattr(backend.attention, "SORTED", 1)  # a batch item at a time
        half = torch.float16
        check_attention(case, case.make(half, "cpu", half), *TOLERANCE[half])
        check_attention(case, case.make(torch.bfloat16, "cpu"), *TOLERANCE[torch.bfloat16])


def test_interpreted_attention_reads_the_value_as_it_lies(interpreted: None) -> None:
    case = Attends(((5, 6), (3, 2)), queries=3, part=True, pixels_first=True)
    tensors = case.make(torch.float32, "cpu")
    value = tensors[1]
    assert not value.is_contiguous() and backend.attention.reads(value)
    turned = value.transpose(2, 3).contiguous().transpose(2, 3)
    assert not backend.attention.reads(turned)
    tensors[2:] = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in tensors[2:]]
    for given in (value, turned, value[:1, :, :1].expand(2, -1, 3, -1)):
        check_attention(case, [tensors[0], given, *tensors[2:]], 1e-6, 1e-6)


def test_interpreted_attention_nonfinite(interpreted: None) -> None:
    attention_nonfinite("cpu")


def attention_nonfinite(device: str) -> None:
    """What is not finite counts as by the definition: locations, weights and pixels.

    Pixels beside the sampled ones count nothing, and neither do far locations.
    """
    case = Attends(((5, 6), (3, 2)), queries=13)
    tensors = case.make(torch.float32, device)
    _, value, locations, weights = tensors
    for query, at in enumerate((math.nan, math.inf, -math.inf, 1e38, -3e9, 1e9)):
        locations[:, query] = at
    check_attention(case, tensors, 1e-6, 1e-6)
    got = backend.attend(case.geometry(tensors), value, locations, weights)
    assert (got[:, :6] == 0).all() and got[:, 6:].any()
    weights[0, 0, 0, 0, 0], weights[0, 7, 0, 0, 0] = math.inf, -math.inf
    value[1, 0, 1, 2], value[1, 29, 1, 1], value[0, 31] = math.inf, math.nan, math.nan
    a = case.geometry(tensors)
    for g, w in zip(
        (backend.attend(a, *tensors[1:]), *backend.attend_gradients(a, *tensors, [True] * 3)),
        (reference.attend(a, *tensors[1:]), *reference.attend_gradients(a, *tensors, [True] * 3)),
        strict=True,
    ):
        torch.testing.assert_close(g, w, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_interpreted_attention_centres(interpreted: None) -> None:
    attention_centres("cpu")


def attention_centres(device: str) -> None:
    """Samples at pixels' centres lie in the cells of the definition in float32, which the slope
    tells: no fused product moves them."""
    generator = torch.Generator().manual_seed(14)
    sizes = range(3, 103)
    centres = torch.stack([(torch.arange(3) + 0.5) / size for size in sizes])
    tensors = [
        torch.randn(1, 1, 4, generator=generator).to(device),
        torch.randn(1, sum(sizes), 1, 4, generator=generator).to(device),
        centres.view(1, 1, 1, 100, 3, 1).to(device),
        torch.ones(1, 1, 1, 100, 3, device=device),
    ]
    a = geometry.attention_geometry(*tensors[1:], list(sizes))
    got = backend.attend_gradients(a, *tensors, [False, True, False])[1]
    wanted = reference.attend_gradients(a, *tensors, [True] * 3)[1]
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("deterministic", [False, True])
def test_interpreted_attention_needs(
    deterministic: bool, interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeatable(monkeypatch, deterministic)
    case = Attends(((3, 2), (2, 1)), queries=3, points=2, batch=1)
    tensors = case.make(torch.float32, "cpu")
    a = case.geometry(tensors)
    wanted = reference.attend_gradients(a, *tensors, [True] * 3)
    for needs in itertools.product([False, True], repeat=3):
        got = backend.attend_gradients(a, *tensors, needs)
        for g, w, need in zip(got, wanted, needs, strict=True):
            assert (g is not None) == need
            assert g is None or close(g, w.double(), 1e-5)


@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_interpreted(case: Case, interpreted: None) -> None:
    check(case.make(torch.float32, "cpu"), 1e-5, 1e-5)


@pytest.mark.parametrize("case", [INTERPRETED[i] for i in (3, 4, 6, 9, 12)], ids=str)
def test_interpreted_wide(case: Case, interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample groups of few channels also take the wide kernels, one group at a time."""
    limits(monkeypatch, NARROW=0)
    check(case.make(torch.float32, "cpu"), 1e-5, 1e-5)


# Calls that take im2col if they are made to.
IM2COL = [
    Case((9,), (3,), image=8, batch=3),
    Case((6, 7), (3, 3), image=24, points=17, offset_groups=3, mask_groups=1),
    Case((5, 4), (2, 3), image=40, points=20, offset_groups=1, mask_groups=0, last=True),
    Case((3, 4, 3), (2, 1, 2), image=16, offset_groups=2),
    Case((9, 8), (3, 1), image=8, points=16, transposed=True),
    # A half-precision weight with channels last is not copied, and groups of 20 are padded to 24.
    Case((6, 7), (3, 3), image=32, points=20, offset_groups=1, mask_groups=1, last=True),
    Case((6, 7), (3, 3), image=60, points=20, offset_groups=3, mask_groups=3),
]
# The same with several weight groups, which only the forward takes.
IM2COL_GROUPS = [
    Case((5, 4), (2, 3), image=48, points=12, groups=2, offset_groups=1, mask_groups=0, last=True),
    Case((6, 7), (3, 1), image=48, points=10, groups=2, offset_groups=6, mask_groups=1),
    Case((7,), (3,), image=54, points=9, groups=3, offset_groups=6, batch=3),
    Case((4, 3, 3), (1, 1, 1), image=38, points=38, groups=2, offset_groups=2, mask_groups=2),
    Case((6, 5), (2, 2), image=32, points=6, groups=2, transposed=True),
    # Groups of 35 channels begin at odd places, so the forward has a sample group for each.
    Case((5, 4), (2, 1), image=70, points=10, groups=2, offset_groups=1, mask_groups=1),
]


def by_im2col(monkeypatch: pytest.MonkeyPatch, at_once: int = 1) -> None:
    """Have calls take it, whatever they have, for so many numbers at a time, or a tile of them."""
    none = dict.fromkeys(tiles.SPREAD, 0)
    least = dict(SAMPLED_ONCE=none, SPREAD=none, PRODUCT_FIRST=0, WIDE=1)
    limits(monkeypatch, **least, COLUMNS_AT_ONCE=at_once, SHARE=0)
    for name in ("FORWARD", "WEIGHT", "ATOMIC"):
        kind = getattr(strategy, name)
        first = [variant for variant in kind if "im2col" in variant.name]
        monkeypatch.setattr(strategy, name, (*first, *kind))


def kernels_used() -> set[str]:
    return {step.name for plan in backend._PLANS.values() for step in plan.steps}


@pytest.mark.parametrize("case", IM2COL, ids=str)
def test_interpreted_im2col(case: Case, interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    by_im2col(monkeypatch)
    check(case.make(torch.float32, "cpu"), 1e-5, 1e-5)
    by_products = {"sample_columns", "multiply_columns", "multiply_points", "multiply_weight"}
    assert by_products <= kernels_used()
    if case.image in (24, 32, 60):
        check(case.make(torch.float16, "cpu", float_offset=True), *TOLERANCE[torch.float16])
    if case.image == 32:
        steps = [step for plan in backend._PLANS.values() for step in plan.steps]
        weights = [s.arguments["weight"] for s in steps if s.name == "multiply_columns"]
        assert GIVEN in {weight.kind for weight in weights}
    if case.image == 60:  # forward.py, too, takes groups that are padded to 24
        monkeypatch.setattr(strategy, "FORWARD", forward.VARIANTS)
        forget()
        check(case.make(torch.float16, "cpu", float_offset=True), *TOLERANCE[torch.float16])
        assert "forward" in kernels_used()


@pytest.mark.parametrize("case", IM2COL_GROUPS, ids=str)
def test_interpreted_im2col_groups(
    case: Case, interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_im2col(monkeypatch)
    check(case.make(torch.float32, "cpu"), 1e-5, 1e-5)
    assert "multiply_columns" in kernels_used()


@pytest.mark.parametrize(
    ("case", "splits", "dtype"),
    [
        (Case((6, 7), (3, 3), image=32, points=40, batch=3), 2, torch.float32),
        (Case((6, 7), (3, 3), image=32, points=40, batch=3, last=True), 5, torch.float32),
        (Case((40,), (5,), image=32, points=20, bias=False), 9, torch.float16),
        (Case((3, 4, 5), (2, 2, 2), image=16, points=33, last=True), 5, torch.bfloat16),
    ],
    ids=str,
)
def test_interpreted_im2col_adds_parts(
    case: Case,
    splits: int,
    dtype: torch.dtype,
    interpreted: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Parts of the sums of one lot of rows after another, as where a lot is too small for a GPU."""
    by_im2col(monkeypatch)
    monkeypatch.setattr(layout.Call, "splits", lambda *_, **__: splits)
    made = case.make(dtype, "cpu")
    exact = made.double().forward(reference)
    assert close(made.forward(backend), exact, TOLERANCE[dtype][0])
    (plan,) = backend._PLANS.values()
    steps = [step for step in plan.steps if step.name != "prepare"]
    kernels = ["sample_columns", "multiply_columns", "add_parts"]
    assert len(steps) > 3 and [step.name for step in steps] == kernels * (len(steps) // 3)
    for step in steps[2::3]:  # parts are those of a lot
        rows = step.arguments["room"]
        assert step.arguments["parts"].shape == (splits, rows, case.points)
        assert step.arguments["number"] <= rows < made.grad[:, 0].numel()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_interpreted_half(dtype: torch.dtype, interpreted: None) -> None:
    case = Case((5, 5), (3, 3), image=8, batch=1)
    check(case.make(dtype, "cpu", float_offset=True), *TOLERANCE[dtype])


def test_interpreted_split(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "allows_tf32", lambda: False)
    limits(monkeypatch, FEW=0)
    for case in (INTERPRETED[3], INTERPRETED[6]):
        check(case.make(torch.float32, "cpu"), 1e-5, 1e-5)


def test_interpreted_deterministic(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many sample groups take sorted lists too, and lists longer than a block are right."""
    repeatable(monkeypatch, True)
    for name, value in (("LISTED", 16), ("LONG", 32), ("SHORT", 16)):
        monkeypatch.setattr(backward_sorted, name, value)
    for case in (
        Case((5, 4), (1, 2), offset_groups=2, mask_groups=2, batch=1),
        Case((40,), (2,), offset_groups=1, batch=1),
    ):
        check(case.make(torch.float32, "cpu"), 1e-5, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("lots", [1, 2, 3], ids=str)
def test_interpreted_sorted_columns(
    lots: int, dtype: torch.dtype, interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The samples' gradients are written down before they are added up from sorted lists, those of
    some taps at a time where there are many."""
    repeatable(monkeypatch, True)
    monkeypatch.setattr(layout, "allows_tf32", lambda: False)
    for case in (
        Case((5, 4), (1, 3), image=32, points=24, offset_groups=8, mask_groups=4),
        Case((3, 3, 3), (1, 3, 1), image=40, points=32, transposed=True),
        Case((9,), (3,), image=24, points=24, offset_groups=3, mask_groups=1, last=True, batch=3),
    ):
        backend._PLANS.clear()
        call = case.make(dtype, "cpu")
        g = call.g
        # There is room for the columns of so many taps that the three come in so many lots.
        numbers = g.batch * math.prod(g.point_size) * layout.sizes_of(g, False).columns
        at_once = numbers * -(-3 // lots) * dtype.itemsize // 2
        limits(monkeypatch, COLUMNS_AT_ONCE=at_once, SHARE=0, SORTED_ONCE=0)
        check(call, *((1e-5, 1e-5) if dtype == torch.float32 else (2e-3, 2e-3)))
        counts = []
        for plan in backend._PLANS.values():
            laid = [step for step in plan.steps if step.name == "backward_sorted"]
            counts.append(sum(step.constants["LAID"] for step in laid))
        one_product = dtype == torch.float32 or g.offset_groups > 1
        assert max(counts) == (lots if one_product else 0)


CHUNKS = [
    Case((4, 5), (3, 2), batch=5),
    Case((4, 5), (2, 3), batch=4, last=True, bias=False),
    Case((4, 3), (2, 2), batch=5, image=8, points=8, groups=2, offset_groups=2, last=True),
    Case((4, 3), (2, 2), batch=5, stride=(2, 2), transposed=True),
    Case((4, 5), (1, 3), batch=5, image=12, offset_groups=4, mask_groups=2),
    Case((9,), (3,), batch=5, image=8, offset_groups=8, mask_groups=0, transposed=True),
    Case((4, 5), (2, 3), batch=5, image=8, points=8, groups=8, offset_groups=2),
    Case((2, 3, 4), (1, 3, 2), batch=4, padding=(0, 1, 1), last=True, transposed=True, bias=False),
]  # fmt: skip


def split(monkeypatch: pytest.MonkeyPatch, case: Case, items: int = 2) -> None:
    """Have small batches be taken in chunks of about so many items."""
    g = case.make(torch.float32, "cpu").g
    limits(monkeypatch, CHUNK=items * math.prod(g.point_size), SCRATCH=1)


def sources(plan: Plan) -> set[int]:
    """Where the parts of the plan's first tensor start."""
    buffers = [b for step in plan.steps for b in step.buffers]
    return {b.start for b in buffers if (b.kind, b.number) == (GIVEN, 0)}


def in_chunks() -> bool:
    """Whether every plan is in chunks."""
    return all(len(sources(plan)) > 1 for plan in backend._PLANS.values())


@pytest.mark.parametrize("case", CHUNKS, ids=str)
def test_interpreted_chunks(case: Case, interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    split(monkeypatch, case)
    check(case.make(torch.float32, "cpu"), 1e-5, 1e-5)
    assert in_chunks() and len(backend._PLANS) == 2


def test_interpreted_many_chunks(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be more chunks than gradients of the weight that are kept."""
    limits(monkeypatch, KEPT=2)
    case = Case((4, 4), (1, 1), padding=(0, 0), batch=5)
    split(monkeypatch, case, 1)
    check(case.make(torch.float32, "cpu"), 1e-5, 1e-5)
    assert all(len(sources(plan)) == 5 for plan in backend._PLANS.values())


def test_interpreted_chunks_sorted(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks with lists of samples, for half numbers and where results are to be repeatable."""
    limits(monkeypatch, NARROW=4)
    for name in ("LISTED", "LONG", "SHORT"):
        monkeypatch.setattr(backward_sorted, name, 16)
    sorting(monkeypatch)
    case = Case((3, 4), (2, 2), image=8, batch=5)
    for half in (case, CHUNKS[4]):
        split(monkeypatch, half)
        check(half.make(torch.float16, "cpu", float_offset=True), *TOLERANCE[torch.float16])
        assert in_chunks()
    repeatable(monkeypatch, True)
    for ordered in (case, CHUNKS[3], Case((3, 4), (1, 2), batch=4, offset_groups=2)):
        split(monkeypatch, ordered)
        check(ordered.make(torch.float32, "cpu"), 1e-5, 1e-5)
        assert in_chunks()


@pytest.mark.parametrize("size", [(7,), (5, 6), (2, 3, 2)], ids=str)
def test_interpreted_lists_together(
    size: tuple[int, ...], interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists of all taps hold each sample of a tile once: summed by them, columns are the result."""
    n = len(size)
    case = Case(size, (3,) * n, transposed=True, stride=(2,) * n, mask_groups=0, bias=False)
    problem = case.make(torch.float32, "cpu")
    g, x, weight, offset = problem.g, problem.x, problem.weight, problem.offset
    assert offset is not None
    taps, tile = math.prod(case.kernel), tiles.IMAGE_TILES[n]
    across = [-(-s // t) for s, t in zip(g.image_size, tile, strict=True)]
    number = g.batch * math.prod(across)
    lists = torch.empty(2 * number + 1, dtype=torch.int32)
    entries = torch.empty(offset.numel() // n * 2**n, dtype=torch.int32)
    given = (x, weight, offset, lists, entries)
    plan = Plan(x.device, given)
    room = iter(plan.given[3:])
    monkeypatch.setattr(plan, "scratch", lambda *shape, dtype: next(room))
    given_weight = layout.Operand(plan.given[1], False)
    call = layout.Call(g, layout.Steps(plan), x.dtype, "ieee", given_weight, plan.given[2], None)
    variant = variants.Variant("", lambda _: True, lambda: None, together=True)
    backward_sorted.make_lists(call, variant)
    call.steps.finish()
    plan.run(given)
    columns = torch.einsum("bop,ock->bpkc", x.flatten(2), weight.flatten(2))
    points = torch.cartesian_prod(*map(torch.arange, size)).view(-1, 1, n)
    shifts = torch.cartesian_prod(*map(torch.arange, case.kernel)).view(1, -1, n)
    starts = points * torch.tensor(g.stride) - torch.tensor(g.padding) + shifts
    where = offset.view(g.batch, taps, n, -1).permute(0, 3, 1, 2) + starts
    got = torch.full((g.batch, g.image_channels, *g.image_size), math.nan)
    for i, cell in enumerate(itertools.product(range(g.batch), *map(range, across))):
        listed = entries[lists[number + 1 + i] - lists[i] : lists[number + 1 + i]].long()
        pixels = [
            torch.arange(k * t, min(k * t + t, s))
            for k, t, s in zip(cell[1:], tile, g.image_size, strict=True)
        ]
        pixel = torch.cartesian_prod(*pixels).view(-1, 1, n)
        away = (where[cell[0]].reshape(-1, n)[listed] - pixel).abs()
        blend = (1 - away).clamp(min=0).prod(2)
        assert (blend.sum(0) > 0).all() and len(set(listed.tolist())) == len(listed)
        sums = blend @ columns[cell[0]].flatten(0, 1)[listed]
        place = (cell[0], slice(None), *(slice(p[0], p[-1] + 1) for p in pixels))
        got[place] = sums.T.reshape(-1, *map(len, pixels))
    assert close(got, problem.double().forward(reference), 1e-5)


def test_interpreted_single_pixels(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels first and last at once, and not aligned: a copy lies in the input's gradient."""
    backend._PLANS.clear()
    problem = Case((1, 1), (1, 1), padding=(0, 0), image=8).make(torch.float32, "cpu")
    assert problem.offset is not None
    problem.offset.fmod_(1)
    x = torch.randn(17, generator=torch.Generator().manual_seed(0))
    problem.x = x[1:].as_strided((2, 8, 1, 1), (8, 1, 8, 8))
    expected = problem.double().backward(reference)
    for got, want in zip(problem.backward(backend), expected, strict=True):
        assert want.count_nonzero() and close(got, want, 1e-5)


def test_interpreted_sums(interpreted: None) -> None:
    sums("cpu")


def call_of(plan: Plan, *tensors: Tensor) -> layout.Call:
    """A call of which only what serves every call is used."""
    g = Geometry(1, 1, 1, 1, 0, 0, (1,), (1,), (1,), (1,), (0,), (1,))
    weight = layout.Operand(plan.given[0], False)
    return layout.Call(g, layout.Steps(plan), torch.float16, "native", weight, None, None)


def sums(device: str) -> None:
    """The sums of channels, first or last, that are long enough to be cut into several parts."""
    for shape in ((3, 5, 7), (2, 33, 9, 8), (1, 1, 40, 400), (2, 2, 3, 4, 5), (8, 1, 40, 20),
                  (2, 1, 512, 600)):  # fmt: skip
        x = torch.randn(shape).to(device)
        for t in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
            plan = Plan(t.device, (t,))
            call = call_of(plan, t)
            source = layout.Operand(plan.given[0], t is not x)
            call.sums(source, plan.result(shape[1:2], t.dtype))
            call.steps.finish()
            (got,) = plan.run((t,))
            torch.testing.assert_close(got, reference.channel_sums(x), rtol=1e-5, atol=1e-4)


def test_interpreted_nonfinite(interpreted: None) -> None:
    nonfinite(Case((5, 5), (3, 3), batch=1), "cpu")
    nonfinite(Case((5, 5), (1, 3), batch=1, offset_groups=4, mask_groups=4), "cpu")
    nonfinite(Case((5, 5), (1, 3), batch=1, points=4, groups=4), "cpu")


def nonfinite(case: Case, device: str) -> None:
    """NaN, infinite and huge offsets sample 0; their gradients are those of the reference."""
    problem = case.make(torch.float32, device)
    assert problem.offset is not None
    flat = problem.offset.view(-1)
    bad = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -3e9, 6e4], device=device)
    flat[: 6 * (len(flat) // 12)].view(-1, 6)[:] = bad
    check(problem, 1e-5, 1e-5)


@pytest.mark.parametrize(("groups", "error"), [(1, 3.9e-4), (32, 3.3e-4)])
def test_interpreted_half_errs_little(
    groups: int, error: float, interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float16 where samples are written down, and without products."""
    by_im2col(monkeypatch)
    case = Case((20, 20), (3, 3), image=32, points=32, groups=groups, bias=False)
    made = case.make(torch.float16, "cpu", float_offset=True)
    assert relative_error(made.forward(backend), made.double().forward(reference)) < error


@pytest.mark.parametrize("groups", [1, 32])
def test_interpreted_large_half(
    groups: int, interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples between pixels near the largest number of float16 are not infinite."""
    by_im2col(monkeypatch)
    case = Case((5, 6), (3, 2), image=32, points=32, groups=groups, mask_groups=0, bias=False)
    made = case.make(torch.float16, "cpu", float_offset=True)
    made.x = torch.full_like(made.x, 6e4).copysign(made.x)
    made.weight *= 1e-3
    assert close(
        made.forward(backend), made.double().forward(reference), TOLERANCE[made.x.dtype][0]
    )


def test_interpreted_nan_masks(interpreted: None) -> None:
    nan_masks(Case((5, 5), (3, 3), batch=1), "cpu")
    nan_masks(Case((5, 6), (3, 3), image=20, batch=1), "cpu")
    nan_masks(Case((5, 5), (1, 3), batch=1, offset_groups=4, mask_groups=4), "cpu")
    nan_masks(Case((5, 5), (1, 3), batch=1, points=4, groups=4), "cpu")


def nan_masks(case: Case, device: str, dtype: torch.dtype = torch.float32) -> None:
    """A mask multiplies its sample, also a 0 outside of the image: NaN where the reference is."""
    problem = case.make(dtype, device, float_offset=True)
    assert problem.offset is not None and problem.mask is not None
    problem.offset.mul_(3)
    problem.mask.view(-1)[:: max(37, problem.mask.numel() // 20)] = math.nan
    exact = problem.double()
    results = (problem.forward(backend), *problem.backward(backend))
    expected = (exact.forward(reference), *exact.backward(reference))
    assert expected[0].isnan().any() and not expected[0].isnan().all()
    for name, got, want in zip(
        ("output", "input", "weight", "offset", "mask", "bias"), results, expected, strict=True
    ):
        if name == "input" and dtype != torch.float32:
            continue  # The sorted gradient of the image spreads a NaN over a tile.
        if want is not None:
            assert torch.equal(got.isnan(), want.isnan()), name


def test_interpreted_exact_positions(interpreted: None) -> None:
    exact_positions("cpu")


def exact_positions(device: str) -> None:
    """On integers the cell is [floor, floor + 1): at -1 a slope, at the size none."""
    problem = Case((4, 4), (3, 3), batch=1).make(torch.float32, device)
    assert problem.offset is not None
    problem.offset.zero_()
    check(problem, 1e-5, 1e-5)


# Planned without a device


needs_gluon = pytest.mark.skipif(INTERPRETING or not hopper.FORWARD, reason="no Gluon")


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Plan]]:
    """The plans of calls as on an H200, which are written and not run."""
    found: list[Plan] = []

    def run(plan: Plan, tensors: Any) -> list[None]:
        found.append(plan)
        return [None] * 6

    monkeypatch.setattr(layout, "allows_tf32", lambda: False)
    monkeypatch.setattr(backend, "allows_tf32", lambda: False)
    on_device(monkeypatch, "sm_90")
    monkeypatch.setattr(variants, "BROKEN", set())
    monkeypatch.setattr(Plan, "load", lambda plan, *more: {})
    monkeypatch.setattr(Plan, "run", run)
    forget()
    yield found
    forget()


def names(plan: Plan) -> list[str]:
    return [step.name for step in plan.steps]


@pytest.fixture
def straight(
    plans: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[Plan, Sequence[int]]]:
    """Plans that were run at once, at these addresses; `plans` are those that were looked for."""
    found: list[tuple[Plan, Sequence[int]]] = []

    def run_at(plan: Plan, given: Sequence[int]) -> list[Tensor]:
        found.append((plan, given))
        return [torch.empty(r.shape) for r in plan.results]

    monkeypatch.setattr(Plan, "run_at", run_at)

    def run(plan: Plan, tensors: Any) -> list[Tensor]:
        plans.append(plan)
        return run_at(plan, [])

    monkeypatch.setattr(Plan, "run", run)
    monkeypatch.setattr(backend, "ahead", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # as the CPU's index is
    return found


LONG = [
    Case((12, 20), (5, 5), image=512, points=64, batch=4, bias=False, padding=(2, 2)),
    Case((12, 20), (5, 5), image=512, points=64, batch=4, bias=False, offset_groups=16),
    Case((12, 20), (5, 5), image=512, points=300, batch=4, bias=False, mask_groups=0),
    Case((12, 20), (5, 5), image=1024, points=128, batch=4, bias=False, groups=2, last=True),
    Case((6, 7, 8), (3, 3, 3), image=320, points=64, batch=4, bias=False),
]

PRODUCTS = (
    *("forward", "multiply_columns"),
    *("forward_hopper", "forward_narrow_hopper", "forward_product_hopper"),
)


@needs_gluon
@pytest.mark.parametrize("architecture", ["sm_90", "sm_80"])
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_sums_are_split(
    case: Case, architecture: str, plans: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where memory is short, or where there are more programs than fit on the device."""
    on_device(monkeypatch, architecture, 1)
    products = case.image // case.groups * math.prod(case.kernel)
    for scratch in (tiles.SCRATCH, 1 << 16):
        limits(monkeypatch, SCRATCH=scratch)
        plans.clear()
        case.make(torch.float32, "cpu").forward(backend)
        (product,) = {step.name: step for step in plans[0].steps if step.name in PRODUCTS}.values()
        assert product.arguments["splits"] * tiles.LONGEST >= products


@needs_gluon
def test_aggregations_are_recalled(
    plans: list[Plan], straight: list[tuple[Plan, Sequence[int]]]
) -> None:
    """An aggregation has no weight, and neither has its plan."""
    family = geometry.FAMILIES[2]
    forward = backend.recalled(library._forward_kernel(family, lambda: backend), range(3), False)
    backward = library._backward_kernel(family, lambda: backend)
    backward = backend.recalled(backward, (1, 0, 2, 3), True)
    x, offset, mask = (torch.randn(2, c, 9, 9).half() for c in (16, 36, 18))
    parameters = [[3, 3], [1, 1], [1, 1], [1, 1]]
    for needs in ([True] * 3, [False, True, True], [True, False, False]):
        args = (torch.randn_like(x), x, offset, mask, *parameters, needs)
        for call, given in ((forward, args[1:-1]), (backward, args)):
            call(*given)
            plans.clear(), straight.clear()
            call(*given)
            (plan, addresses) = straight[0]
            assert not plans and len(straight) == 1
            tensors = [x, offset, mask]
            tensors[1:1] = [args[0]] if call is backward else []
            assert list(addresses) == [t.data_ptr() for t in tensors]
            assert [b.shape for b in plan.given if b] == [t.shape for t in tensors]


@needs_gluon
@pytest.mark.parametrize("transposed", [False, True])
def test_calls_are_recalled(
    transposed: bool,
    plans: list[Plan],
    straight: list[tuple[Plan, Sequence[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A call like an earlier one runs its plan at once, with the tensors in the plan's order; any
    other call is looked at anew."""
    family = geometry.FAMILIES[transposed]
    order = (0, 1, 2, 3, 4) if transposed else (1, 0, 2, 3, 4)
    forward = backend.recalled(
        library._forward_kernel(family, lambda: backend), (0, 1, 2, 3, 4), False
    )
    backward = backend.recalled(library._backward_kernel(family, lambda: backend), order, True)
    case = Case((9, 10), (3, 3), transposed, image=64, points=64)
    made = case.make(torch.float16, "cpu")
    x, w, offset, mask = made.x, made.weight, made.offset, made.mask
    sizes = [[1, 1], [1, 1], *([[0, 0]] if transposed else []), [1, 1], 1]

    def new(call: Any, *args: Any) -> bool:
        """Whether the call was looked at."""
        plans.clear(), straight.clear()
        call(*args)
        return bool(plans)

    rest = (w, offset, mask, made.bias, *sizes)
    assert new(forward, x, *rest) and not new(forward, x.clone(), *rest)
    plan, given = straight[0]
    assert len(given) == sum(b is not None for b in plan.given)
    changed = [
        (x, w, offset, mask, None, *sizes),
        (x, w, offset, None, made.bias, *sizes),
        (x, w, offset.float(), mask, made.bias, *sizes),
        (x[:1], w, offset[:1], mask[:1], made.bias, *sizes),
        (x.to(memory_format=torch.channels_last), *rest),
    ]
    for args in changed:
        assert new(forward, *args) and not new(forward, *args)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    for args in ((shifted, *rest), (x.transpose(2, 3).contiguous().transpose(2, 3), *rest)):
        assert new(forward, *args) and new(forward, *args)  # copied each time
    repeatable(monkeypatch, True)
    assert new(forward, x, *rest) and not new(forward, x, *rest)
    repeatable(monkeypatch, False)
    assert not new(forward, x, *rest)

    grad = made.grad
    for needs in ([True] * 5, [False, True, True, False, True], [True, False, False, False, False]):
        args = (grad, x, w, offset, mask, *sizes, needs)
        assert new(backward, *args)
        plans.clear(), straight.clear()
        grads = backward(*args)
        assert not plans and [g is not None for g in grads] == needs
        plan, given = straight[0]
        tensors = (grad, x, w, offset, mask) if transposed else (x, grad, w, offset, mask)
        assert given == [t.data_ptr() for t in tensors]
        assert [g.shape for g in grads if g is not None] == [r.shape for r in plan.results]
    forget()
    assert new(forward, x, *rest)


def test_attention_is_recalled(
    plans: list[Plan], straight: list[tuple[Plan, Sequence[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = attention._forward_kernel(lambda: backend)
    backward = attention._backward_kernel(lambda: backend)
    forward, backward = (
        backend.recalled(forward, range(3), False),
        backend.recalled(backward, range(4), True),
    )
    case = Attends(((5, 6), (3, 2)))
    shapes = [5, 6, 3, 2]
    tensors = case.make(torch.float16, "cpu")

    def new(call: Any, *args: Any) -> bool:
        plans.clear(), straight.clear()
        call(*args)
        return bool(plans)

    assert new(forward, *tensors[1:], shapes)
    assert not new(forward, *[t.clone() for t in tensors[1:]], shapes)
    assert new(forward, *tensors[1:], [6, 5, 3, 2]) and not new(forward, *tensors[1:], shapes)
    assert list(straight[0][1]) == [t.data_ptr() for t in tensors[1:]]
    turned = tensors[1].transpose(2, 3).contiguous().transpose(2, 3)
    for _ in range(2):  # copied each time
        assert new(forward, turned, *tensors[2:], shapes)
    for needs in ([True] * 3, [False, True, False]):
        assert new(backward, *tensors, shapes, needs)
        plans.clear(), straight.clear()
        grads = backward(*tensors, shapes, needs)
        assert not plans and [g is not None for g in grads] == needs
        assert list(straight[0][1]) == [t.data_ptr() for t in tensors]
        plan = straight[0][0]
        assert [g.shape for g in grads if g is not None] == [r.shape for r in plan.results]
    repeatable(monkeypatch, True)  # whose sort no plan has
    for _ in range(2):
        assert new(backward, *tensors, shapes, [True] * 3)


def test_attention_of_no_size_compiles_anything(
    plans: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    for deterministic, dtype, channels, points in (
        *((d, t, 32, 4) for d in (False, True) for t in TOLERANCE),
        (False, torch.float16, 5, 3),
    ):
        repeatable(monkeypatch, deterministic)
        known: set[Any] = set()
        for i, size in enumerate((1, 2, 7, 64, 129)):
            shapes = ((size, size + 1), (size, 2), (1, 1))
            case = Attends(
                shapes, batch=1 + i % 3, queries=1 + 30 * size, channels=channels, points=points
            )
            tensors = case.make(dtype, "cpu")
            plans.clear()
            a = case.geometry(tensors)
            backend.attend(a, *tensors[1:])
            monkeypatch.setattr(torch, "cat", lambda parts: parts[0])  # the plans do not run
            backend.attend_gradients(a, *tensors, [True] * 3)
            found = {step.key for plan in plans for step in (*plan.steps, *plan.spares)}
            known = known or found
            assert found == known


def test_attention_loads_the_kernels_of_its_backward(
    plans: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    monkeypatch.setattr(Plan, "load", lambda plan, *more: found.extend(more) or {})
    monkeypatch.setattr(autograd.call, "differentiated", True)
    case = Attends(((5, 6), (3, 2)))
    for dtype, needs in itertools.product(TOLERANCE, ([True] * 3, [False, True, True])):
        tensors = case.make(dtype, "cpu")
        for t, need in zip(tensors[1:], needs, strict=True):
            t.requires_grad_(need)
        a = case.geometry(tensors)
        plans.clear(), found.clear(), backend._PLANS.clear()
        backend.attend(a, *tensors[1:])
        more = {launch.key for launch in found[0]()}
        backend.attend_gradients(a, *tensors, needs)
        assert more and {step.key for step in plans[-1].steps} == more
        assert not found[1]()


def test_attention_bounds_memory(plans: list[Plan]) -> None:
    """Scratch memory does not grow with the points, and float32 needs none."""
    sizes = set()
    for points in (1, 64):
        case = Attends(((5, 6), (3, 2)), points=points)
        for dtype in TOLERANCE:
            tensors = case.make(dtype, "cpu")
            plans.clear()
            a = case.geometry(tensors)
            backend.attend(a, *tensors[1:])
            backend.attend_gradients(a, *tensors, [True] * 3)
            sizes |= {(dtype.itemsize, plan.size) for plan in plans}
    assert len(sizes) == 3 and {size for width, size in sizes if width == 4} == {0}


@needs_gluon
def test_weights_are_spread(plans: list[Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of a few small groups are taken for those of one, where that is faster."""
    few = Case((20, 22), (3, 3), image=64, points=64, groups=2)

    def grouped(dtype: torch.dtype, **changes: Any) -> bool:
        plans.clear()
        dataclasses.replace(few, **changes).make(dtype, "cpu").forward(backend)
        assert plans[-1].given[2] is not None
        g = next(step.arguments["g"] for step in plans[-1].steps if "g" in step.arguments)
        return bool(g.group_in < g.channels)

    for architecture, many in (("sm_90", 512), ("sm_86", 256)):
        on_device(monkeypatch, architecture)
        forget()
        assert not grouped(torch.float16) and not grouped(torch.float32)
        for changes in (dict(image=many, points=64), dict(offset_groups=4), dict(mask_groups=2)):
            assert grouped(torch.float16, **changes) and grouped(torch.float32, **changes)


@needs_gluon
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_chunks_bound_memory(
    dtype: torch.dtype,
    deterministic: bool,
    plans: list[Plan],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On an H200 a plan's scratch memory is at most a tenth of what torchvision takes there, or an
    eighth where a float32 backward keeps the gradients of samples (im2col.py), or a sixth where it
    keeps lists of samples, too."""
    torchvision = 352 * dtype.itemsize << 20
    most = torchvision / (10 if dtype == torch.float16 else 6 if deterministic else 8)
    repeatable(monkeypatch, deterministic)
    size, ones = (128, 128), (1, 1)
    g = Geometry(8, 256, 256, 1, 1, 1, size, size, (3, 3), ones, ones, ones)
    image, points = (torch.empty(8, 256, *size, dtype=dtype, device="meta") for _ in range(2))
    weight = torch.empty(256, 256, 3, 3, dtype=dtype, device="meta")
    offset, mask = (torch.empty(8, n, *size, dtype=dtype, device="meta") for n in (18, 9))
    backend.gather(g, image, weight, offset, mask, None)
    backend.scatter(g, points, weight, offset, mask, None)
    given = (image, points, weight, offset, mask)
    backend.gradients(g, *given, (True, False, True, True, True), points)
    backend.gradients(g, *given, (False, True, True, True, True), image)
    assert [len(sources(plan)) for plan in plans] == [1, 2, 2, 2]
    assert all(16 * 2**20 < plan.size <= most for plan in plans)

    # It does not grow with the batch. Neither few positions nor a single item are split.
    for batch, size, split in ((128, (128, 128), True), (5, (128, 128), False),
                               (1, (640, 640), False)):  # fmt: skip
        image, points, *others = (
            torch.empty(batch, n, *size, dtype=dtype, device="meta") for n in (256, 256, 18, 9)
        )
        g = g._replace(batch=batch, image_size=size, point_size=size)
        backend.gradients(g, image, points, weight, *others, (True, False, True, True, True))
        assert (len(sources(plans[-1])) > 1) == split
        assert not split or plans[-1].size <= most + 8 * 4 * weight.numel()


def test_few_multiprocessors(plans: list[Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer than there are blocks of outputs."""
    on_device(monkeypatch, "portable", 1)
    made = on_meta(Case((33, 30), (3, 3), image=64, points=700, offset_groups=2), torch.float16)
    made.forward(backend), made.backward(backend)
    assert {"multiply_columns", "multiply_points"} <= kernels_used()


def test_portable_columns(plans: list[Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are written down for many outputs, and narrow ones while they stay in the cache."""
    on_device(monkeypatch, "portable")
    for size, points, groups, dtype, by_columns in (
        *((99, 64, 1, torch.float16, False), (99, 72, 1, torch.float16, True)),
        *((224, 72, 1, torch.float16, False), (224, 120, 1, torch.float16, True)),
        *((99, 240, 1, torch.float16, True), (224, 240, 1, torch.float16, False)),
        *((224, 128, 1, torch.float32, False), (224, 136, 1, torch.float32, True)),
        *((9, 256, 1, torch.float16, True), (9, 64, 32, torch.float16, True)),
        *((99, 64, 32, torch.float32, False), (224, 64, 8, torch.float32, True)),
    ):
        case = Case((size, size), (3, 3), image=256, points=points, offset_groups=groups,
                    mask_groups=1)  # fmt: skip
        on_meta(case, dtype).forward(backend)
        assert ("multiply_columns" in names(plans[-1])) == by_columns, (size, points, dtype)
        assert ("forward" in names(plans[-1])) != by_columns


@needs_gluon
def test_im2col_before_hopper(plans: list[Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward with many outputs or few columns, and in float32 a scatter of few positions."""
    for size, points, groups, dtype, kernel in (
        ((20, 20), 256, 1, torch.float16, "forward_product_hopper"),
        ((20, 20), 128, 1, torch.float16, "forward_hopper"),
        ((150, 150), 256, 1, torch.float16, "forward_hopper"),
        ((100, 100), 160, 1, torch.float32, "forward_hopper"),
        ((150, 150), 320, 1, torch.float16, "forward_product_hopper"),
        ((150, 150), 320, 1, torch.float32, "forward_hopper"),
        ((300, 300), 320, 1, torch.float16, "forward_hopper"),
        ((300, 300), 520, 1, torch.float32, "forward_product_hopper"),
        ((999,), 256, 1, torch.float16, "forward_hopper"),
        ((99,), 320, 1, torch.float16, "forward_product_hopper"),
        ((99999,), 320, 1, torch.float16, "forward_hopper"),
        ((8, 9, 9), 64, 1, torch.float16, "forward_product_hopper"),
        ((8, 20, 20), 64, 1, torch.float16, "forward_hopper"),
        ((20, 60, 60), 128, 1, torch.float32, "forward_hopper"),
        ((20, 60, 60), 192, 1, torch.bfloat16, "forward_product_hopper"),
        ((20, 60, 60), 192, 1, torch.float32, "forward_hopper"),
        ((20, 20), 128, 4, torch.float16, "forward_narrow_hopper"),
        ((20, 20), 192, 4, torch.float16, "forward_product_hopper"),
        ((20, 20), 192, 8, torch.float16, "forward_narrow_hopper"),
        ((150, 150), 192, 4, torch.float16, "forward_narrow_hopper"),
        ((20, 20), 512, 8, torch.float16, "forward_product_hopper"),
        ((150, 150), 512, 8, torch.float16, "forward_narrow_hopper"),
        ((8, 20, 20), 64, 4, torch.float32, "forward_product_hopper"),
        ((8, 20, 20), 64, 8, torch.float32, "forward_narrow_hopper"),
    ):
        case = Case(size, (3,) * len(size), image=64, points=points, offset_groups=groups,
                    mask_groups=groups)  # fmt: skip
        on_meta(case, dtype).forward(backend)
        assert kernel in names(plans[-1]), case
    for image, points, size, kernel in (
        *((64, 128, 9, "backward_atomic_hopper"), (64, 192, 9, "multiply_weight")),
        *((64, 256, 99, "backward_atomic_hopper"), (64, 384, 99, "multiply_weight")),
    ):
        made = on_meta(Case((size, size), (3, 3), image=image, points=points), torch.float32)
        backend.scatter(made.g, made.grad, made.weight, made.offset, made.mask, None)
        assert kernel in names(plans[-1]), (image, points, size)
    on_device(monkeypatch, "portable")
    forget()
    for points, kernel in ((128, "backward_atomic"), (192, "multiply_weight")):
        made = on_meta(Case((9, 9), (3, 3), image=64, points=points), torch.float32)
        backend.scatter(made.g, made.grad, made.weight, made.offset, made.mask, None)
        assert kernel in names(plans[-1]), points


@needs_gluon
@pytest.mark.parametrize("architecture", ["sm_90", "portable"])
def test_single_taps_of_few_channels(
    architecture: str, plans: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are summed up before other variants would have prepared what they need."""
    on_device(monkeypatch, architecture)
    for image, dtype, kernel, single in (
        *((64, torch.float16, 1, True), (192, torch.bfloat16, 1, True)),
        *((96, torch.float32, 1, True), (128, torch.float32, 1, False)),
        *((200, torch.float16, 1, False), (64, torch.float16, 3, False)),
    ):
        case = Case((20, 20), (kernel, kernel), image=image, points=160)
        on_meta(case, dtype).forward(backend)
        assert ("forward" in names(plans[-1])) == single, (image, dtype)


def test_groups_that_cross_are_spread(plans: list[Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    """One product takes all weight groups where they cross the sample groups."""
    on_device(monkeypatch, "portable")
    for groups, offset_groups, mask_groups, spread in (
        *((12, 10, 10, True), (10, 10, 10, False), (5, 10, 1, False)),
        *((12, 6, 4, False), (30, 10, 6, False), (20, 10, 6, True), (5, 0, 0, True)),
    ):
        case = Case((20, 20), (3, 3), image=120, points=120, groups=groups,
                    offset_groups=offset_groups, mask_groups=mask_groups)  # fmt: skip
        on_meta(case, torch.float16).forward(backend)
        grouped = {step.constants.get("GROUPED") for step in plans[-1].steps}
        groups_of_products = {step.arguments.get("groups", 1) for step in plans[-1].steps}
        assert (True not in grouped and groups_of_products == {1}) == spread


def test_odd_weight_groups_are_padded(plans: list[Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pads weight groups that loads of 16 bytes would not fit, and so takes im2col."""
    on_device(monkeypatch, "portable")
    for channels, groups, dtype, padded in (
        (526, 2, torch.float16, True),
        (360, 2, torch.float16, True),
        (360, 2, torch.float32, False),
        (526, 2, torch.float32, True),
        (512, 2, torch.float16, False),
        (600, 30, torch.float16, False),
    ):
        case = Case((20, 20), (3, 3), image=channels, points=channels, groups=groups,
                    offset_groups=1, mask_groups=1)  # fmt: skip
        made = on_meta(case, dtype)
        made.forward(backend)
        (step,) = [s for s in plans[-1].steps if s.name in ("multiply_columns", "forward")]
        assert step.arguments["g"].sample_groups == (groups if padded else 1)
        assert not padded or step.name == "multiply_columns"
        made.backward(backend)
        sizes = [s.arguments["g"] for s in plans[-1].steps if "g" in s.arguments]
        assert {n.sample_groups for n in sizes} == {1}


@pytest.mark.parametrize("architecture", ["sm_90", "portable"])
def test_no_size_compiles_anything(
    architecture: str, plans: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer's kernels, and what its first call loads, serve images of every size and batch."""
    on_device(monkeypatch, architecture)
    for deterministic, step in ((False, 1), (True, 1), (False, -1)):
        repeatable(monkeypatch, deterministic)
        for channels, groups, dtype, of_weight in (
            *((c, g, d, 1) for c, g in ((64, 1), (64, 16), (96, 3)) for d in TOLERANCE),
            *((3, 1, torch.float32, 1), (40, 1, torch.float16, 1)),
            *((128, 1, torch.float16, 1), (128, 1, torch.float32, 128)),
            *((64, g, torch.float16, 64) for g in (1, 8, 64)),
            *((142, 2, torch.float32, 2), (320, 5, torch.float16, 10)),
            *((256, 1, torch.float16, 1), (256, 1, torch.float32, 1)),
            (120, 10, torch.float16, 12),
        ):
            known: set[Any] = set()
            sizes = ((9, 8, 1), (33, 30, 2), (224, 224, 3), (64, 500, 1), (7, 7, 2), (150, 99, 3),
                     (224, 224, 32))  # fmt: skip
            for *size, batch in sizes[::step]:
                case = Case(
                    tuple(size), (3, 3), batch=batch, image=channels,
                    points=channels if of_weight > 1 or channels > 200 else 64, groups=of_weight,
                    offset_groups=groups, mask_groups=groups,
                )  # fmt: skip
                made = on_meta(case, dtype)
                plans.clear()
                made.forward(backend), made.backward(backend)
                backend.scatter(made.g, made.grad, made.weight, made.offset, made.mask, None)
                if not known:
                    known = {x.key for plan in plans for x in (*plan.steps, *plan.spares)}
                found = {x.key for plan in plans for x in plan.steps}
                assert found <= known, (channels, groups, dtype, size, found - known)


def on_meta(case: Case, dtype: torch.dtype) -> Problem:
    made = dataclasses.replace(case, size=(9,) * len(case.size)).make(dtype, "cpu")
    g = made.g._replace(batch=case.batch, image_size=case.size, point_size=case.size)

    def resized(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        return torch.empty(case.batch, t.shape[1], *case.size, dtype=t.dtype, device="meta")

    others = {name: resized(getattr(made, name)) for name in ("x", "offset", "mask", "grad")}
    weight, bias = (t.to("meta") for t in (made.weight, made.bias) if t is not None)
    return dataclasses.replace(made, g=g, weight=weight, bias=bias, **others)


@pytest.mark.parametrize("architecture", ["sm_90", "portable"])
def test_forward_loads_the_kernels_of_its_backward(
    architecture: str, plans: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a backward will follow, the forward loads its kernels along, all of them."""
    on_device(monkeypatch, architecture)
    found: list[Any] = []
    monkeypatch.setattr(Plan, "load", lambda plan, *more: found.extend(more) or {})
    every = itertools.product(TOLERANCE, (False, True), (False, True), (1, 8), (True, False))
    for dtype, transposed, last, groups, learns in every:
        case = Case(
            (9, 9), (3, 3), transposed, image=64, points=64, offset_groups=groups, last=last
        )
        made = case.make(dtype, "cpu")
        if last:
            made.grad = made.grad.to(memory_format=torch.channels_last)
        needs = (learns, True, True, learns, True)
        for t, need in zip(
            (made.x, made.weight, made.offset, made.mask, made.bias), needs, strict=True
        ):
            assert t is not None and t.requires_grad_(need) is t
        plans.clear(), found.clear(), backend._PLANS.clear()
        monkeypatch.setattr(autograd.call, "differentiated", False)
        made.forward(backend)
        assert not found[0]()
        monkeypatch.setattr(autograd.call, "differentiated", True)
        more = {launch.key for launch in found[0]()}
        made.backward(backend, needs)
        assert {x.key for x in (*plans[-1].steps, *plans[-1].spares)} == more
        assert not found[1]()


def test_whether_a_call_is_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend sees in autograd.call whether the call's result will have gradients."""
    cpu = pytest.importorskip("deformnd.kernels.cpu")
    if not cpu.available():
        pytest.skip("no core")
    seen: list[bool] = []
    exact = cpu.gather

    def gather(*args: Any) -> Tensor:
        seen.append(autograd.call.differentiated)
        if len(seen) == 4:
            raise RuntimeError("out of memory")
        result: Tensor = exact(*args)
        return result

    monkeypatch.setattr(cpu, "gather", gather)
    x, offset = torch.rand(1, 2, 4, 4), torch.rand(1, 18, 4, 4)
    weight = torch.rand(2, 2, 3, 3, requires_grad=True)

    def run(weight: Tensor) -> Tensor:
        return deformnd.deform_conv2d(x, weight, offset, padding=1)

    run(weight)
    run(weight.detach())
    with torch.no_grad():
        run(weight)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(weight)
    run(weight.detach())
    assert seen == [True, False, False, True, False]


def test_plans_without_gluon(plans: list[Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    """A Triton for other devices may lack Gluon."""
    on_device(monkeypatch, "sm_80")
    problem = Case((9, 9), (3, 3), image=64, points=64).make(torch.float32, "cpu")
    problem.backward(backend)
    assert {"backward_weight", "reduce_weight", "multiply_weight"} <= set(names(plans[0]))


@pytest.mark.skipif(INTERPRETING, reason="imports Triton anew")
def test_without_private_names_of_triton() -> None:
    """Without them Triton itself launches kernels, or Gluon's kernels are left out."""
    hidden = (
        ("triton.backends.compiler", "GPUTarget", "plainly"),
        ("triton.compiler", "ASTSource", "plainly"),
        ("triton.runtime.cache", "get_cache_manager", "plainly"),
        ("triton.experimental.gluon._runtime", "GluonASTSource", "without Gluon"),
    )
    checks = [
        f"""
import {module}, triton
del {module}.{name}
from deformnd.kernels import gpu
from deformnd.kernels.gpu import hopper, runtime, strategy
assert runtime.AHEAD == {launches != "plainly"}
assert not hopper.FORWARD and len(strategy.FORWARD) == 7
"""
        for module, name, launches in hidden
    ]
    runs = apart("import torch, triton.compiler, triton.backends.compiler", checks)
    for about, (status, said) in zip(hidden, runs, strict=True):
        assert not status, f"{about}: {said}"


def test_addresses_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches get the addresses of parts, tensor maps too."""
    seen: list[list[int]] = []

    def word(address: int) -> Any:
        return ctypes.c_uint64.from_address(address)

    chained: list[bool] = []

    def invocation(function: Any, grid: Any, arguments: Any, is_chained: bool) -> Any:
        chained.append(is_chained)
        return lambda stream: seen.append(
            [word(value).value for is_one, value in arguments if is_one]
        )

    class TensorMap:
        of = staticmethod(lambda described, shape: TensorMap())

        def encode(self, place: int, address: int) -> None:
            word(place).value = address

    class Loaded(dict[Any, Any]):
        def __contains__(self, key: object) -> bool:
            return True

        def __missing__(self, key: Any) -> Any:
            return None, [None]

    monkeypatch.setattr(runtime, "_LOADED", Loaded())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(runtime, "Invocation", invocation)
    monkeypatch.setattr(runtime, "TensorMap", TensorMap)
    monkeypatch.setattr(runtime, "_stream_of", lambda device: lambda: 0)
    plan = Plan(torch.device("cpu"), [torch.empty(4, 8), None, torch.empty(2, 3)])
    given, result = plan.given[0], plan.result((4, 16), torch.float16)
    assert given is not None
    plan.scratch(3, dtype=torch.float32)
    scratch = plan.scratch(4, 64, dtype=torch.float32)
    kernel = SimpleNamespace(arg_names=["a", "b", "c", "n"])

    def launch(a: Any, b: Any, c: Any) -> None:
        arguments = dict(a=a, b=b, c=c, n=3)
        described = {"b": runtime.Descriptor((1,), "")}
        plan.steps.append(Launch(kernel, (1, 1, 1), arguments, {}, 4, descriptors=described))

    for first in (0, 1, 3):
        launch(*(t.part(first, 1) for t in (given, result, scratch)))
    launch(given, given.part(1, 2), None)
    instance = runtime._Instance(plan)
    assert chained == [False, True, True, True]
    for x, y, z in ((1000, 5000, 9000), (11000, 15000, 19000)):
        seen.clear()
        instance.run([x, 0], [y], z)
        want = [[x + 32 * i, y + 32 * i, z + 256 + 256 * i] for i in (0, 1, 3)]
        assert seen == [*want, [x, x + 32]]


def test_launches_become_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of addresses that come again and again, unless the user records or the driver refuses."""
    log: list[Any] = []
    recording = []
    refuses = []

    class Graph:
        def __init__(self, calls: Any) -> None:
            if refuses:
                raise RuntimeError("refused")
            calls[0]("recorded")
            self.address = log.pop()[1]

        def __call__(self, stream: int) -> None:
            if refuses:
                raise RuntimeError("refused")
            log.append(("graph", stream, self.address))

    def instance(steps: int) -> Any:
        plan = Plan(torch.device("cpu"), [torch.empty(4)])
        plan.result((4,), torch.float32)
        plan.steps += [SimpleNamespace(buffers=[]) for _ in range(steps)]  # type: ignore[misc]
        made = runtime._Instance(plan)
        made.calls = [lambda stream: log.append((stream, made.words[0][0]))] * steps
        return made

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(recording))
    monkeypatch.setattr(runtime, "Graph", Graph)
    monkeypatch.setattr(runtime, "_stream_of", lambda device: lambda: 7)
    monkeypatch.setattr(runtime._Instance, "_bind", lambda *_: None)
    monkeypatch.setattr(runtime._Instance, "_bind_by_triton", lambda *_: None)
    several = instance(2)
    several.repeats = True

    def run(address: int, times: int = 1) -> list[Any]:
        log.clear()
        for _ in range(times):
            several.run([address], [5], 9)
        return list(log)

    separate = [(7, 3), (7, 3)]
    assert run(3, runtime.REPEATED + 1) == separate * (runtime.REPEATED + 1)
    assert run(4) == [(7, 4), (7, 4)]
    assert run(3, 2) == [("graph", 7, 3)] * 2
    recording.append(True)
    known = dict(several.graphs)
    assert run(3) == separate and run(5, 20) == [(7, 5), (7, 5)] * 20
    assert several.graphs == known  # to take one away would spoil what the user records
    recording.clear()
    for address in range(100, 100 + 2 * runtime.ADDRESSES):
        run(address)
    assert len(several.graphs) <= runtime.ADDRESSES and run(3) == [("graph", 7, 3)]
    monkeypatch.setattr(runtime, "ADDRESSES", 1)
    run(4, runtime.REPEATED + 1)
    run(5)
    assert list(several.graphs.values()) == [1]  # when all had graphs, all were forgotten
    monkeypatch.setattr(runtime, "GRAPHS", 1)
    monkeypatch.setattr(runtime, "ADDRESSES", 9)
    monkeypatch.setattr(runtime, "_MADE", collections.deque())
    for address in (3, 4):
        assert run(address, runtime.REPEATED + 2)[-1] == ("graph", 7, address)
    assert run(3) == separate  # the graph for 4 took its place
    for refused in range(2):  # a launch of the graph, and to make it
        several.repeats = True
        refuses.clear()
        run(3, (runtime.REPEATED + 2) * (1 - refused))
        refuses.append(True)
        assert run(3, 20) == separate * 20 and not several.repeats and not several.graphs
    assert not instance(1).repeats


# Compiled without a device


def cuobjdump(option: str, cubin: bytes, tmp_path: Path) -> str:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    (tmp_path / "cubin").write_bytes(cubin)
    command = [tools / "cuobjdump", option, tmp_path / "cubin"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def stack(cubin: bytes, tmp_path: Path) -> int:
    """Bytes of memory that a thread has beside its registers."""
    found = re.search(r"STACK:(\d+)", cuobjdump("--dump-resource-usage", cubin, tmp_path))
    assert found is not None
    return int(found[1])


def executed(instructions: list[re.Match[str]], start: int = 0) -> Iterator[re.Match[str]]:
    """In program order from an address on, routines (64-bit divisions) where they are called."""
    for match in instructions:
        address, name, rest = match.groups()
        if int(address, 16) < start:
            continue
        if start and name.startswith("RET"):
            return
        if name.startswith("CALL") and (routine := re.search(r"0x[0-9a-f]+", rest)):
            yield from executed(instructions, int(routine[0], 16))
        yield match


def unset_registers(compiled: Any, tmp_path: Path) -> list[str]:
    """Instructions that read a uniform register before any in program order has written it, in a
    kernel with products; listing one takes as long as compiling most kernels.

    A block out of line that jumps back may be taken for one; look at the listing then.

    ptxas (12.8, with Triton 3.6) hoists the descriptors of some products out of a loop past what
    they are made from. The kernel then reads outside shared memory; the tables avoid such tiles.
    """
    if "wgmma" not in compiled.asm["ptx"]:
        return []
    return unset_in(cuobjdump("--dump-sass", compiled.asm["cubin"], tmp_path))


def unset_in(listing: str) -> list[str]:
    pattern = r"\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+ +)?(\S+)(.*?);"
    instructions = [m for line in listing.splitlines() if (m := re.match(pattern, line))]
    written: set[int] = set()
    found = []
    for match in executed(instructions):
        _, name, rest = match.groups()
        operands = [x.strip() for x in rest.split(",")]
        target = None
        if re.match(r"U(?!BLK|TMA|CGABAR)|R2UR|S2UR|CS2UR|VOTEU|REDUX", name):
            if re.fullmatch(r"U?P\w+", operands[0]):
                operands = operands[1:]
            if operands and re.fullmatch(r"UR\d+", operands[0]):
                target = int(operands.pop(0)[2:])
        read = []
        for operand in operands:
            for kind, number in re.findall(r"(gdesc\[|)UR(\d+)", operand):
                # A pair of descriptors, of which a left factor in registers needs but one.
                one = name.startswith("HGMMA") and re.fullmatch(r"R\d+", operands[1])
                parts = range(2 if one else 0, 4) if kind else range(1)
                read += [int(number) + i for i in parts]
        if not written.issuperset(read):
            found.append(match[0].strip())
        if target is not None:
            written |= {target, target + 1} if re.search(r"64|WIDE|CS2", name) else {target}
    return found


def target(architecture: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture[3:]), 32)
    return GPUTarget("hip", architecture, 64 if architecture.startswith("gfx9") else 32)


def compile_for(architecture: str, step: Launch, room: int = 1 << 30) -> Any:
    """The compiled kernel. It first waits for the launch before it where launches are chained."""
    compiled = step.compile(target(architecture), room)
    if architecture.startswith("sm_"):
        before, *after = compiled.asm["ptx"].split("griddepcontrol.wait")
        assert len(after) == (int(architecture[3:]) >= 90), step.name
        assert not (after and re.search(r"\.global\.|\basync\.|mbarrier", before)), step.name
    return compiled


def different(plans: Iterable[Plan]) -> list[Launch]:
    """One launch of every kernel that has to be compiled."""
    return list({step.key: step for plan in plans for step in plan.steps}.values())


# What a program may have of shared memory. Consumer chips of NVIDIA have 99 KiB.
ROOM = {
    **{"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99},
    **{"gfx942": 64, "gfx1100": 64},
}

# Kernels without products, in which architectures hardly differ.
PLAIN = ("prepare", "list_samples", "start_lists", "sort_lists", "reduce", "reduce_weight")

COMPILED = [
    (Case((16,), (3,), image=64, points=64), torch.bfloat16),
    (Case((16, 16), (3, 3), image=64, points=128, batch=8), torch.float16),
    (Case((16, 16), (3, 3), image=64, points=64, groups=4, offset_groups=16, mask_groups=16),
     torch.float16),
    (Case((16, 16), (3, 3), image=64, points=64), torch.float32),
    (Case((16, 16), (3, 3), image=33, points=5), torch.float32),
    (Case((8, 8, 8), (3, 3, 3), image=192, points=192), torch.float16),
    (Case((8, 8, 8), (3, 3, 3), image=64, points=64, offset_groups=8, mask_groups=8),
     torch.float32),
]  # fmt: skip

COMPILED_DEPTHWISE = [
    (Case((16, 16), (3, 3), image=128, points=128, groups=128), torch.float16),
    (Case((16, 16), (3, 3), image=64, points=64, groups=64, offset_groups=8, mask_groups=8,
          last=True), torch.float16),
    (Case((16,), (3,), image=24, points=48, groups=24, offset_groups=24), torch.bfloat16),
    (Case((8, 8, 8), (3, 3, 3), image=96, points=96, groups=96, mask_groups=0), torch.float32),
]  # fmt: skip


COMPILED_FEW = [
    (Case((16, 16), (3, 3), image=3, points=3), torch.float16),
    (Case((16, 16), (3, 3), image=72, points=3, offset_groups=9, mask_groups=9), torch.bfloat16),
    (Case((8, 8, 8), (3, 3, 3), image=200, points=4), torch.float32),
]

COMPILED_IM2COL = Case((16, 16), (3, 3), image=256, points=300, offset_groups=8, mask_groups=8)


@pytest.mark.skipif(INTERPRETING, reason="does not compile")
@pytest.mark.parametrize(
    ("architecture", "case", "dtype"),
    [
        *(("sm_90", *some) for some in (*COMPILED, *COMPILED_DEPTHWISE, *COMPILED_FEW)),
        *((a, COMPILED_IM2COL, torch.float16) for a in ("sm_86", "sm_90", "gfx942")),
        *((a, COMPILED_IM2COL, torch.float32) for a in ("sm_90", "sm_120")),
        ("gfx942", *COMPILED_DEPTHWISE[0]),
        ("sm_80", *COMPILED_DEPTHWISE[1]),
        *(("sm_80", *some) for some in COMPILED[1:4]),
        *(
            (a, Case((16, 16), (3, 3), image=256, points=256), torch.float32)
            for a in ("sm_86", "sm_90")
        ),
        *((architecture, *COMPILED[2]) for architecture in ("gfx942", "gfx1100", "sm_89")),
        *((architecture, *COMPILED[3]) for architecture in ROOM if architecture[0] == "g"),
        *((architecture, *COMPILED[3]) for architecture in ("sm_100", "sm_120")),
    ],
    ids=str,
)
def test_compiles(
    case: Case,
    dtype: torch.dtype,
    architecture: str,
    plans: list[Plan],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The portable kernels, also where results must be repeatable; ROCm's, too."""
    on_device(monkeypatch, "portable" if architecture == "sm_90" else architecture)
    write_all(case, dtype, monkeypatch)
    for step in different(plans):
        if step.name == "sort_lists" and (architecture != "sm_90" or dtype == torch.float32):
            continue  # Triton takes long for it; list_samples reads offsets of other dtypes alike
        if step.name in PLAIN and architecture != "sm_90" and case != COMPILED[3][0]:
            continue  # once for each architecture
        compiled = compile_for(architecture, step, ROOM[architecture] << 10)
        assert compiled.metadata.shared <= ROOM[architecture] << 10
        if architecture == "sm_90":
            assert not unset_registers(compiled, tmp_path), step.name


@pytest.mark.skipif(INTERPRETING, reason="does not compile")
@pytest.mark.parametrize("outputs", [8, 32])
def test_long_lists_compile(
    outputs: int, plans: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists with more entries than 32 bits count, also where columns are added up from them."""
    repeatable(monkeypatch, True)
    size, ones = (4096, 4096), (1, 1)
    g = Geometry(1, 32, outputs, 1, 4, 0, size, size, (3, 3), ones, ones, ones)
    image, points, offset = (torch.empty(1, n, *size, device="meta") for n in (32, outputs, 72))
    weight = torch.empty(outputs, 32, 3, 3, device="meta")
    needs = (True, False, False, False, False)
    backend.gradients(g, image, points, weight, offset, None, needs)
    steps = [step for step in different(plans) if "lists" in step.arguments]
    assert {step.arguments["lists"].dtype for step in steps} == {torch.int64}
    assert [step.constants["LAID"] for step in steps if step.name == "backward_sorted"] == [
        outputs == 32
    ]
    for step in steps:
        if step.name != "sort_lists" or outputs == 32:
            compile_for("sm_90", step, ROOM["sm_90"] << 10)


def write_all(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of all that is done for a case: both families, by sorted lists or by atomic additions,
    and repeatable."""
    made = case.make(dtype, "cpu")
    for deterministic, sorts in ((False, True), (False, False), (True, True)):
        repeatable(monkeypatch, deterministic)
        sorting(monkeypatch, sorts)
        made.forward(backend), made.backward(backend)
        backend.scatter(made.g, made.grad, made.weight, made.offset, made.mask, None)


@pytest.mark.skipif(INTERPRETING, reason="does not compile")
@pytest.mark.parametrize(
    ("architecture", "n", "channels", "dtype"),
    [
        *(("sm_90", n, 32, dtype) for n in (1, 2, 3) for dtype in TOLERANCE),
        *(("sm_90", 2, channels, torch.float16) for channels in (4, 30, 64, 256)),
        *((a, 2, 32, dtype) for a in ("sm_75", *ROOM) if a != "sm_90" for dtype in TOLERANCE),
    ],
    ids=str,
)
def test_attention_compiles(
    architecture: str,
    n: int,
    channels: int,
    dtype: torch.dtype,
    plans: list[Plan],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Also where results must be repeatable. On an H200 nothing spills, a lane reads 16 bytes of
    channels at once, and adds as many; nor do lanes of the forward's loop wait for each other."""
    on_device(monkeypatch, architecture)
    case = Attends(((5,) * n, (3,) * n), channels=channels)
    tensors = case.make(dtype, "cpu")
    a = case.geometry(tensors)
    backend.attend(a, *tensors[1:])
    for deterministic in (False, True):
        repeatable(monkeypatch, deterministic)
        monkeypatch.setattr(torch, "cat", lambda parts: parts[0])
        backend.attend_gradients(a, *tensors, [True] * 3)
    steps = [step for step in different(plans) if step.name != "prepare"]
    assert {step.name for step in steps} == {
        *("forward_attention", "backward_attention"),
        *("list_cells", "backward_sorted_attention"),
    }
    for step in steps:
        compiled = compile_for(architecture, step, 48 << 10)
        if architecture != "sm_90":
            continue
        assert stack(compiled.asm["cubin"], tmp_path) == 0, step.name
        if channels % 16 == 0 and step.name in ("forward_attention", "backward_attention"):
            ptx = compiled.asm["ptx"]
            width = "v2" if dtype.itemsize == 2 and step.name == "backward_attention" else "v4"
            assert ptx.count(f"ld.global.{width}.b32") >= 2**n
            if step.arguments.get("grad_value") is not None:
                assert len(re.findall(r"(?:red|atom)\S*\.v4", ptx)) >= 2**n
            if step.name == "forward_attention":
                loop = ptx[ptx.index("ld.global") : ptx.rindex(f"ld.global.{width}.b32")]
                assert "bar.sync" not in loop


@pytest.mark.skipif(INTERPRETING, reason="does not compile")
@pytest.mark.parametrize(("groups", "dtype"), [(1, torch.float16), (4, torch.bfloat16)], ids=str)
def test_odd_channels_compile_right(
    groups: int,
    dtype: torch.dtype,
    plans: list[Plan],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Nothing is even that the compiler could use (once wrong, see tiles.PORTABLE)."""
    case = Case(
        (16, 16), (1, 3), image=5 * groups, points=33 * groups, groups=groups, offset_groups=groups
    )
    write_all(case, dtype, monkeypatch)
    for step in different(plans):
        if step.name == "sort_lists":
            continue  # of even channels in test_compiles
        compiled = compile_for("sm_90", step)
        assert not unset_registers(compiled, tmp_path), step.name


HOPPER = [
    *(Case((16,) * n, (3,) * n, image=64, points=128) for n in (1, 2, 3)),
    Case((16, 16), (3, 3), image=64, points=512),
    Case((16, 16), (3, 3), image=224, points=200, last=True),
    Case((16,), (3,), image=96, points=100, offset_groups=4, mask_groups=4),
    Case((16, 16), (3, 3), image=64, points=64, offset_groups=16, mask_groups=16),
    Case((16, 16), (3, 3), image=64, points=128, offset_groups=2, mask_groups=2),
    Case((8, 8, 8), (3, 3, 3), image=64, points=64, offset_groups=8, mask_groups=8),
    Case((16, 16), (3, 3), image=192, points=128, offset_groups=2, mask_groups=1),
]

# Forwards that Hopper's own kernels leave to im2col.py.
GIVEN_UP = [
    Case((16, 16), (3, 3), image=64, points=200),
    Case((16, 16), (3, 3), image=40, points=320, last=True),
    Case((8, 8, 8), (3, 3, 3), image=32, points=64, last=True),
    Case((16, 16), (3, 3), image=80, points=160, offset_groups=4, mask_groups=4),
]


@needs_gluon
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", GIVEN_UP, ids=str)
def test_products_compile_for_hopper(
    case: Case, dtype: torch.dtype, plans: list[Plan], tmp_path: Path
) -> None:
    on_meta(case, dtype).forward(backend)
    (step,) = (step for step in plans[0].steps if step.name == "forward_product_hopper")
    if case.image == 80:  # Sample groups of 20 channels are padded to 24 or to 32.
        length = 9 * 4 * (32 if dtype == torch.float32 else 24)
        assert step.arguments["laid"].shape[1] == length
    compiled = compile_for("sm_90", step)
    assert compiled.metadata.shared <= (227 if dtype == torch.float32 else 113) * 1024
    assert runtime._parameters(compiled.asm["ptx"]).count(128) == 2
    assert stack(compiled.asm["cubin"], tmp_path) == 0
    if triton.__version__.startswith("3.6"):
        listing = cuobjdump("--dump-sass", compiled.asm["cubin"], tmp_path)
        assert not unset_in(listing)
        # After the first product, in the loop, and after it.
        assert listing.count("WARPGROUP.DEPBAR") == 3


# More pixels than positions.
UPSAMPLING = [
    Case((16,), (8,), transposed=True, stride=(4,), image=64, points=64),
    Case((16, 16), (4, 4), transposed=True, stride=(2, 2), image=128, points=256),
    Case((16, 16), (4, 4), transposed=True, stride=(2, 2), image=96, points=512, last=True),
    Case((4, 8, 8), (4, 4, 4), transposed=True, stride=(2, 2, 2), image=64, points=64),
]


@needs_gluon
@pytest.mark.parametrize("case", UPSAMPLING, ids=str)
def test_compiles_for_hopper_by_columns(
    case: Case, plans: list[Plan], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Their image gradient is by columns, unless it must be repeatable."""
    write_all(case, torch.float16, monkeypatch)
    by_columns = {"multiply_columns_hopper", "backward_columns_hopper"}
    assert [by_columns <= set(names(plan)) for plan in plans] == [True, False, True] + 6 * [False]
    steps = [step for step in different(plans) if step.name in by_columns]
    for step in steps:
        compiled = compile_for("sm_90", step)
        assert "wgmma" in compiled.asm["ptx"]
        assert compiled.metadata.shared <= (227 if "multiply" in step.name else 113) * 1024
        assert stack(compiled.asm["cubin"], tmp_path) == 0
        if triton.__version__.startswith("3.6"):
            listing = cuobjdump("--dump-sass", compiled.asm["cubin"], tmp_path)
            assert not unset_in(listing)
            assert listing.count("WARPGROUP.DEPBAR") == 1  # products do not wait for one another


@needs_gluon
def test_columns_bound_memory(plans: list[Plan]) -> None:
    """Columns are there of some items at once; where one item has too many, there are none, and no
    lists."""
    for batch, size in ((4, 64), (64, 64), (1, 512)):
        case = Case((size, size), (4, 4), True, batch, 128, 256, (2, 2))
        g = on_meta(case, torch.float16).g
        g = g._replace(batch=batch, image_size=(2 * size, 2 * size), point_size=(size, size))
        shapes = ((256, size), (32, size), (16, size))
        x, offset, mask = (
            torch.empty(batch, c, s, s, dtype=torch.float16, device="meta") for c, s in shapes
        )
        weight = torch.empty(256, 128, 4, 4, dtype=torch.float16, device="meta")
        backend.scatter(g, x, weight, offset, mask, None)
        by_columns = "backward_columns_hopper" in names(plans[-1])
        assert by_columns == (size == 64)
        together = [s.constants["TOGETHER"] for s in plans[-1].steps if s.name == "list_samples"]
        assert set(together) == ({True} if by_columns else set())
        if by_columns:
            assert plans[-1].size <= 2 * (tiles.SCRATCH + tiles.COLUMNS)


# Products of bfloat16 are those of float32, too.
@needs_gluon
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, dtype) for case in HOPPER for dtype in (torch.float32, torch.float16)),
        *((case, torch.bfloat16) for case in (HOPPER[1], HOPPER[6])),
    ],
    ids=str,
)
def test_compiles_for_hopper(
    case: Case,
    dtype: torch.dtype,
    plans: list[Plan],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(layout.Call, "_gives_way", lambda *_: False)
    write_all(case, dtype, monkeypatch)
    steps = [step for step in different(plans) if step.name.endswith("_hopper")]
    narrow = case.image // case.offset_groups <= 32
    expected = {"forward_narrow_hopper", "backward_narrow_hopper"} if narrow else {
        "forward_hopper", "backward_atomic_hopper", "backward_weight_hopper"}  # fmt: skip
    assert expected <= {step.name for step in steps}
    for step in steps:
        compiled = compile_for("sm_90", step)
        assert "wgmma" in compiled.asm["ptx"]
        # So that there is room for two of those with many sample groups.
        assert compiled.metadata.shared <= (114 if "narrow" in step.name else 227) * 1024
        # Pointers, a descriptor, integers, and scratch memory that is not used.
        sizes = runtime._parameters(compiled.asm["ptx"])
        assert sizes.count(128) == 1 and set(sizes) == {4, 8, 128} and sizes[-2:] == [8, 8]
        spilled = stack(compiled.asm["cubin"], tmp_path)
        if step.name == "forward_hopper":
            assert spilled <= 64  # after the loop, where parts are stored and added
        elif step.name == "backward_weight_hopper":
            assert spilled == 0
        elif "narrow" in step.name and len(case.size) < 3:  # else there are too many corners
            assert spilled <= 24
        if triton.__version__.startswith("3.6"):  # whose listings the checks are made for
            listing = cuobjdump("--dump-sass", compiled.asm["cubin"], tmp_path)
            assert not unset_in(listing)
            if step.name == "backward_weight_hopper":  # products wait in the loop and after it only
                assert listing.count("WARPGROUP.DEPBAR") == 2


def test_finds_unset_registers(
    plans: list[Plan], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The check above misses an instruction that writes what a product's descriptor is made of."""
    if INTERPRETING or not triton.__version__.startswith("3.6"):
        pytest.skip("made for the listings of Triton 3.6")
    on_device(monkeypatch, "portable")
    many = dict.fromkeys(tiles.SAMPLED_ONCE, tiles.ANY)
    limits(monkeypatch, SAMPLED_ONCE=many, FORWARD_ONCE=tiles.ANY)
    case = Case((16, 16), (3, 3), image=192, points=128)
    case.make(torch.float16, "cpu").forward(backend)
    (step,) = (step for step in plans[0].steps if step.name == "forward")
    cubin = compile_for("sm_90", step).asm["cubin"]
    lines = cuobjdump("--dump-sass", cubin, tmp_path).splitlines()
    assert not unset_in("\n".join(lines))
    writers = [i for i, line in enumerate(lines) if re.search(r"R2UR UR|USHF\S* UR|UMOV UR", line)]
    found = [unset_in("\n".join(lines[:i] + lines[i + 1 :])) for i in writers[:40]]
    assert any(any("HGMMA" in line for line in unset) for unset in found)


def test_driver_makes_the_context_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a thread has not called CUDA yet, autograd's for a first backward among them."""
    codes, made = [201, 0, 1], []
    fake = SimpleNamespace(
        cuTensorMapEncodeTiled=lambda *_: codes.pop(0),
        cuLaunchKernelEx=lambda *_: codes.pop(0),
        cuGetErrorString=lambda *_: None,
    )
    monkeypatch.setattr(driver, "_driver", lambda: fake)
    monkeypatch.setattr(driver, "ensure_context", lambda: made.append(True))
    tensor_map = driver.TensorMap(6, 2, 0, (8, 8), (8, 8))
    tensor_map.encode(0, 0)
    with pytest.raises(RuntimeError, match="a tensor map: CUDA driver error 1"):
        tensor_map.encode(0, 0)
    codes += [201, 0]
    driver.Invocation(fake_function(), (1, 1, 1), [], False)(0)
    assert len(made) == 2 and not codes


def test_graph_of_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node for each launch, with its grid and arguments, and an edge to the one before, which is
    chained where the launch is."""
    log: list[Any] = []
    modes = [0]

    def exchange(mode: Any) -> int:
        modes[0], mode._obj.value = mode._obj.value, modes[0]
        return 0

    def add(node: Any, graph: Any, before: Any, count: Any, about: Any) -> int:
        node._obj.value = 100 + len(log)
        about = about._obj
        words = (ctypes.c_uint64 * 1).from_address(about.arguments)
        argument = ctypes.c_uint64.from_address(words[0]).value
        log.append((before._obj.value, count.value, about.function, list(about.grid),
                    list(about.block), about.shared, argument))  # fmt: skip
        return 0

    def link(graph: Any, before: Any, node: Any, edge: Any, count: Any) -> int:
        log.append((before._obj.value, node._obj.value, bytes(edge._obj), count.value))
        return 0

    def make(name: str, value: int = 0) -> Any:
        def call(*args: Any) -> int:
            log.append((name, modes[0]))
            if value:
                args[0]._obj.value = value
            return 0

        return call

    fake = SimpleNamespace(
        cuLaunchKernelEx=None,
        cuThreadExchangeStreamCaptureMode=exchange,
        cuGraphCreate=lambda graph, flags: 0,
        cuGraphAddKernelNode_v2=add,
        cuGraphAddDependencies_v2=link,
        cuGraphInstantiateWithFlags=make("instantiate", 5),
        cuGraphDestroy=make("destroy"),
        cuGraphExecDestroy=make("destroy exec"),
        cuGraphLaunch=lambda handle, stream: log.append((handle, stream)) or 0,
    )
    monkeypatch.setattr(driver, "_driver", lambda: fake)
    calls = []
    for i, chained in enumerate((False, True, False)):
        function = fake_function()
        function.parameters, function.shared = [8], 10 * i
        calls.append(driver.Invocation(function, (i + 1, 2, 1), [(False, 7 + i)], chained))
    graph = driver.Graph(calls)
    assert log == [
        (None, 0, 1, [1, 2, 1], [32, 1, 1], 0, 7),
        (100, 0, 1, [2, 2, 1], [32, 1, 1], 10, 8),
        (100, 101, bytes([1, 0, 1, 0, 0, 0, 0, 0]), 1),
        (101, 1, 1, [3, 2, 1], [32, 1, 1], 20, 9),
        ("instantiate", 2),
        ("destroy", 2),
    ]
    log.clear()
    graph(9)
    del graph
    assert log == [(5, 9), ("destroy exec", 2)] and modes == [0]


def fake_function(waits: bool = True) -> Any:
    return SimpleNamespace(
        name="kernel", parameters=[], threads=32, shared=0, handle=ctypes.c_void_p(1), waits=waits
    )


@pytest.mark.parametrize(("version", "waits"), [(12020, True), (12030, True), (12030, False)])
def test_a_kernel_waits_where_graphs_can_have_it(
    version: int, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get_version(place: Any) -> int:
        place._obj.value = version
        return 0

    done = dict.fromkeys(("cuModuleLoadData", "cuModuleGetFunction"), lambda *_: 0)
    fake = SimpleNamespace(cuDriverGetVersion=get_version, **done)
    monkeypatch.setattr(driver, "_driver", lambda: fake)
    monkeypatch.setattr(driver, "ensure_context", lambda: None)
    driver._version.cache_clear()
    try:
        function = driver.Function(b"", "kernel", [], 0, 1, 0, waits)
    finally:
        driver._version.cache_clear()
    assert function.waits == (waits and version == 12030)


def test_only_kernels_that_wait_are_chained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_driver", lambda: SimpleNamespace(cuLaunchKernelEx=None))
    for waits, chained in ((True, True), (True, False), (False, True)):
        launch = driver.Invocation(fake_function(waits), (1, 1, 1), [], chained)
        configuration = launch.configuration
        assert configuration.number_of_attributes == (waits and chained)
        if waits and chained:  # the driver's CUlaunchAttribute: an identifier, padding, and a value
            assert ctypes.sizeof(launch.attribute) == 72
            words = (ctypes.c_int * 3).from_address(configuration.attributes)
            assert list(words) == [6, 0, 1]


@needs_gluon
@pytest.mark.skipif(INTERPRETING, reason="does not compile")
def test_kernels_are_found_on_disk_after_others(
    plans: list[Plan], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Triton's hash of a kernel depends on which kernels the process hashed before (as of 3.6)."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    on_device(monkeypatch, "sm_90")
    on_meta(Case((20, 20), (3, 3), image=64, points=64), torch.float16).forward(backend)
    (launch,) = [step for step in plans[0].steps if step.name == "forward_hopper"]
    metadata = SimpleNamespace(
        **dict(global_scratch_size=0, num_ctas=1, name="kernel", shared=0, num_warps=4)
    )
    compiled = SimpleNamespace(metadata=metadata, asm=dict(cubin=b"code", ptx=".entry(){"))
    monkeypatch.setattr(runtime, "_parameters", lambda ptx: [])
    found = []
    for first in (True, False):
        target = runtime.GPUTarget("cuda", 90, 32)
        monkeypatch.setattr(Launch, "_compile", lambda *_, first=first: compiled if first else None)
        monkeypatch.setattr(launch.kernel, "hash", None)  # as in a new process
        found.append(launch.binary(launch.source(target), target, 1 << 20))
        hopper.forward.tables.store_columns.cache_key  # noqa: B018
    assert found[0] == found[1] and found[0][0] == b"code"


@pytest.mark.skipif(INTERPRETING, reason="does not compile")
def test_kernels_of_a_plan_load_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those that can be built are, though others cannot; and they come from disk another time,
    unless what that keeps of them is laid out otherwise."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    capability = (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no device")
    monkeypatch.setattr(runtime, "shared_memory", lambda: 227 << 10)
    monkeypatch.setattr(runtime, "Function", lambda *about: about)
    plan = Plan(torch.device("cpu"), [torch.empty(4, 64), torch.empty(64)])
    call = call_of(plan)
    parts, out = plan.given
    call.reduce_flat(parts, 4, out)
    call.zero(plan.scratch(64, dtype=torch.float32))
    call.steps.finish()
    good = plan.steps
    begun: list[int] = []
    make_ir = runtime.ASTSource.make_ir

    def counted(*args: Any) -> Any:
        begun.append(1)
        time.sleep(0.05)  # enough for another thread to come in
        try:
            return make_ir(*args)
        finally:
            begun.append(-1)

    # What Python does of a compile is done in one thread at a time.
    monkeypatch.setattr(runtime.ASTSource, "make_ir", counted)
    arguments = {n: v for n, v in good[0].arguments.items()}
    bad = Launch(prepare.reduce, (1, 1, 1), arguments, dict(INDEX=0, BLOCK=3, TOGETHER=4), 4)

    def load() -> None:
        monkeypatch.setattr(runtime, "_LOADED", {})
        failures = runtime.load([*good, bad])
        assert list(failures) == [bad] and "'reduce' for no device" in str(failures[bad])
        functions = [runtime._LOADED[made.key, 0][0] for made in good]
        assert [name for _, name, *_ in functions] == ["reduce", "prepare"]
        assert [sizes[:2] for _, _, sizes, *_ in functions] == [[8, 8], [8, 4]]
        assert [waits for *_, waits in functions] == [capability >= (9, 0)] * 2

    def refuse(*args: Any, **options: Any) -> Any:
        raise RuntimeError("compiles again")

    load()
    begun.clear()
    capability = (9, 0)
    load()
    assert begun == [1, -1] * (len(begun) // 2) and len(begun) >= 4
    # What may be loaded with them is, and its failure is nothing of theirs.
    monkeypatch.setattr(runtime, "_LOADED", {})
    assert runtime.load(good[:1], lambda: [bad, good[1]]) == {}
    assert {key for key, _ in runtime._LOADED} == {made.key for made in good}
    assert runtime.load(good, lambda: pytest.fail("nothing is missing")) == {}
    # Another thread may load all of it before this one gets to.
    monkeypatch.setattr(runtime, "_LOADED", {})
    assert runtime.load(good, lambda: (runtime.load(good), good)[1]) == {}
    original = triton.compile
    monkeypatch.setattr(triton, "compile", refuse)
    load()

    # A file that is cut short, empty or of something else is written anew.
    for name, left in (("kernel.cubin", 100), ("kernel.json", 9), ("kernel.json", 0)):
        monkeypatch.setattr(triton, "compile", original)
        for file in tmp_path.rglob(name):
            file.write_bytes(file.read_bytes()[:left])
        load()
        monkeypatch.setattr(triton, "compile", refuse)
        load()
    # Another Triton, or another layout of what is kept, compiles anew.
    for name, value in (
        ("_tools", lambda: "another"),
        ("_About", NamedTuple("_About", [*runtime._About.__annotations__.items(), ("more", int)])),
    ):
        with monkeypatch.context() as other:
            other.setattr(runtime, name, value)
            other.setattr(runtime, "_LOADED", {})
            assert "compiles again" in str(runtime.load(good)[good[0]])


@needs_gluon
def test_a_plan_without_what_cannot_be_built(
    plans: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is said once, and the next variant is in its place; where there is none it is an error.
    Nothing is loaded of a plan that takes too much memory, and so is written again in chunks."""
    case = Case((32, 30), (3, 3), image=64, points=64, batch=4)
    problem = case.make(torch.float16, "cpu")
    broken = {"backward_weight_hopper"}
    loaded: list[bool] = []

    def load(plan: Plan, *more: Any) -> dict[Any, Exception]:
        loaded.append(len(sources(plan)) > 1)
        return {s: RuntimeError(s.name) for s in plan.steps if s.name in broken}

    monkeypatch.setattr(Plan, "load", load)
    split(monkeypatch, case)
    sorting(monkeypatch)

    def kernels() -> set[str]:
        backend._PLANS.clear()
        problem.backward(backend)
        return set(names(plans[-1]))

    with pytest.warns(UserWarning, match="backward_weight_hopper; a slower one"):
        found = kernels()
    assert {"backward_weight", "backward_atomic_hopper", "backward_sorted_hopper"} <= found
    assert "backward_weight_hopper" not in found and "backward_atomic" not in found
    assert loaded == [True, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels() == found
    # The only variant of its kind gives way to the kernels of which it does the work at once.
    broken = {"backward_narrow_hopper"}
    narrow = Case((8, 8), (3, 3), image=64, points=64, offset_groups=8, mask_groups=8)
    problem = narrow.make(torch.float16, "cpu")
    with pytest.warns(UserWarning, match="backward_narrow_hopper; a slower one"):
        found = kernels()
    assert {"backward_atomic", "backward_weight"} <= found
    problem = case.make(torch.float16, "cpu")
    # On any GPU: a portable kernel that cannot be built gives way to smaller tiles of its own.
    on_device(monkeypatch, "portable")
    before = {id(v) for v in variants.BROKEN}
    broken = {"backward_weight"}
    with (
        pytest.warns(UserWarning, match="backward_weight; a slower one"),
        pytest.raises(RuntimeError, match="backward_weight"),
    ):
        kernels()
    assert len(variants.BROKEN) > len(before)
    broken.add("start_lists")
    monkeypatch.setattr(variants, "BROKEN", set())
    broken.discard("backward_weight")
    with pytest.raises(RuntimeError, match="start_lists"):
        kernels()


# On a GPU


@pytest.fixture
def exact_float32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


GPU_CASES = [
    *INTERPRETED,
    *DEPTHWISE,
    *(dataclasses.replace(c, transposed=not c.transposed) for c in (*INTERPRETED, *DEPTHWISE)),
    *(
        Case((33, 30), (3, 3), image=128, points=128, groups=128, offset_groups=g, mask_groups=g)
        for g in (1, 8, 128)
    ),
    Case((7, 15, 16), (3, 3, 3), image=64, points=64, groups=64, last=True),
    Case((33, 30), (3, 3), image=64, points=64),
    Case((33, 30), (3, 3), image=64, points=64, last=True, transposed=True),
    Case((20, 23), (3, 3), image=128, points=256, offset_groups=8, mask_groups=8),
    Case((20, 23), (3, 3), image=96, points=160, groups=32, last=True),
    Case((20, 23), (3, 3), image=64, points=64, groups=64, offset_groups=64, mask_groups=64),
    Case((14, 14), (3, 3), image=512, points=512, batch=1),
    Case((300,), (5,), image=512, points=128, dilation=(3,)),
    Case((7, 16, 16), (3, 3, 3), image=64, points=32),
    Case((7, 15, 16), (3, 3, 3), image=64, points=64),
    Case((7, 15, 16), (3, 3, 3), image=64, points=128, last=True, transposed=True),
    Case((301,), (5,), image=96, points=192, mask_groups=0),
    Case((30, 31), (3, 3), image=256, points=256, last=True, bias=False),
    Case((12, 13), (3, 3), image=256, points=1024, last=True),
    Case((13, 14), (5, 5), image=64, points=64),
    Case((21, 23), (5, 7), image=192, points=192, batch=1, last=True),
    # Channels that Hopper's kernels take only if they are padded to whole blocks.
    Case((20, 22), (3, 3), image=72, points=40),
    Case((19, 21), (3, 3), image=24, points=20, last=True),
    Case((19, 21), (3, 3), image=96, points=200, transposed=True),
    Case((300,), (5,), image=161, points=33, padding=(2,)),
    Case((20, 22), (3, 3), image=96, points=96, offset_groups=3, mask_groups=3),
    Case((20, 22), (3, 3), image=160, points=130, offset_groups=4, mask_groups=4, last=True),
    Case((20, 21), (3, 3), image=24, points=24, offset_groups=8, mask_groups=8),
    Case((7, 15, 16), (3, 3, 3), image=48, points=80),
    # Several wide sample groups: their blocks of channels end within a group, or not.
    Case((20, 22), (3, 3), image=256, points=256, offset_groups=4, mask_groups=4),
    Case((20, 22), (3, 3), image=256, points=128, offset_groups=4, mask_groups=2, stride=(2, 2)),
    Case((30, 41), (5, 5), image=32, points=384, groups=16, offset_groups=2, mask_groups=2),
    Case((33, 90), (3, 3), image=64, points=64, offset_groups=16, mask_groups=16),
    # Weights of several groups that Hopper's kernels take for those of one.
    Case((33, 30), (3, 3), image=64, points=96, groups=2, last=True),
    Case((20, 23), (5, 5), image=40, points=40, groups=10, mask_groups=0, transposed=True),
    Case((7, 15, 16), (3, 1, 3), image=96, points=48, groups=3),
    Case((20, 22), (3, 3), image=192, points=64, offset_groups=2, mask_groups=1, last=True),
    Case((19, 21), (3, 3), image=120, points=100, offset_groups=3, mask_groups=3, batch=3),
    Case((19, 21), (5, 5), image=192, points=72, offset_groups=1, mask_groups=2, transposed=True),
    Case((7, 15, 16), (3, 3, 3), image=128, points=128, offset_groups=2, mask_groups=2),
    Case((300,), (5,), image=80, points=64, offset_groups=2, mask_groups=0, padding=(2,)),
]


@gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gpu_cases(
    case: Case, dtype: torch.dtype, exact_float32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Half of the cases sort in float16 and the others in bfloat16.
    sorting(monkeypatch, (GPU_CASES.index(case) + list(TOLERANCE).index(dtype)) % 2 == 0)
    # Offsets in float32: coordinates in half of these sizes are exact only nearly.
    check(case.make(dtype, "cuda", float_offset=True), *TOLERANCE[dtype])
    assert not variants.BROKEN


@gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", AGGREGATIONS, ids=str)
def test_gpu_aggregation(case: Case, dtype: torch.dtype, exact_float32: None) -> None:
    check_aggregation(case, dtype, "cuda", *TOLERANCE[dtype])


@gpu
def test_gpu_aggregations_repeat() -> None:
    """By the function, whose later calls go straight to a plan that has a weight."""
    torch.manual_seed(0)
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            shapes = ((2, 16, 9, 9), (2, 36, 9, 9), (2, 18, 9, 9))
            tensors = [torch.randn(shape, device="cuda").requires_grad_() for shape in shapes]
            exact = [t.detach().double().requires_grad_() for t in tensors]
            for _ in range(3):
                results = []
                for given in (tensors, exact):
                    y = deformnd.deform_aggregate2d(*given, kernel_size=3, padding=1)
                    results.append((y, *torch.autograd.grad(y.sum(), given)))
                for got, want in zip(*results, strict=True):
                    assert close(got, want, 1e-5)


GPU_ATTENDS = [
    *ATTENDS,
    Attends(((30, 41), (15, 20), (7, 10), (3, 5)), channels=32, heads=8, queries=700),
    Attends(((30, 41), (15, 20)), channels=64, points=8, queries=100, pixels_first=True),
    Attends(((300,), (150,), (75,)), channels=30, queries=500, part=True),
    Attends(((7, 16, 15), (3, 8, 8)), channels=24, queries=300, points=5),
    Attends(((20, 22),), channels=520, queries=100, heads=2, points=3),
]


@gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", GPU_ATTENDS, ids=str)
def test_gpu_attention(
    case: Attends, dtype: torch.dtype, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pixel's gradient is a sum of many numbers of either sign, so a half one errs more."""
    repeatable(monkeypatch, deterministic)
    check_attention(case, case.make(dtype, "cuda"), *TOLERANCE[dtype])
    check_attention(case, case.make(dtype, "cuda", dtype, seed=1), *TOLERANCE[dtype])


@gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("part", range(20))
def test_gpu_attention_random(
    part: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(part)
    for seed in range(5):
        n = rng.choice((1, 2, 2, 3))
        most = {1: 400, 2: 40, 3: 12}[n]
        levels = rng.choice((1, 2, 3, 4, 5, 9))
        case = Attends(
            tuple(tuple(rng.randint(1, most) for _ in range(n)) for _ in range(levels)),
            batch=rng.randint(1, 4),
            queries=rng.choice((1, 7, 64, 333)),
            heads=rng.choice((1, 2, 5, 8)),
            channels=rng.choice((1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 33, 48, 64, 96, 128, 260)),
            points=rng.randint(1, 9),
            part=rng.random() < 0.3,
            pixels_first=rng.random() < 0.3,
        )
        repeatable(monkeypatch, rng.random() < 0.3)
        tensors = case.make(dtype, "cuda", rng.choice((torch.float32, dtype)), seed)
        check_attention(case, tensors, *TOLERANCE[dtype])


@gpu
def test_gpu_attention_nonfinite() -> None:
    attention_nonfinite("cuda")
    attention_centres("cuda")


@gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gpu_attention_repeats(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise, where algorithms are deterministic: many samples of few pixels, too."""
    repeatable(monkeypatch, True)
    for case in (GPU_ATTENDS[-5], Attends(((3, 2), (1, 1)), queries=2000, channels=32)):
        tensors = case.make(dtype, "cuda")
        a = case.geometry(tensors)
        first = backend.attend_gradients(a, *tensors, [True] * 3)
        for _ in range(3):
            again = backend.attend_gradients(a, *tensors, [True] * 3)
            for g, w in zip(again, first, strict=True):
                assert g is not None and w is not None and torch.equal(g, w)


@gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gpu_attention_by_the_function(dtype: torch.dtype) -> None:
    """Differentiated, on several streams, under autocast; later calls are recalled, in memory that
    holds NaN."""
    case = GPU_ATTENDS[-5]
    torch.cuda.empty_cache()
    for seed in range(3):
        room = torch.full((1 << 26,), math.nan, device="cuda")
        del room
        grad_output, *given = case.make(dtype, "cuda", seed=seed)
        results = []
        for tensors in (given, [t.double() for t in given]):
            leaves = [t.detach().clone().requires_grad_() for t in tensors]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                y = deformnd.deform_attention(leaves[0], case.shapes, *leaves[1:])
                grads = torch.autograd.grad(y, leaves, grad_output.to(y.dtype))
            torch.cuda.synchronize()
            results.append((y, *grads))
        for i, (got, want) in enumerate(zip(*results, strict=True)):
            assert close(got, want, TOLERANCE[dtype][i > 0]), i
    with torch.autocast("cuda", torch.float16):
        y = deformnd.deform_attention(given[0].float(), case.shapes, *given[1:])
    assert y.dtype == torch.float16


@gpu
def test_gpu_attention_of_no_size_compiles_anything() -> None:
    known = 0
    for size in (3, 4, 9, 33):
        for batch in (1, 3):
            case = Attends(((size, 2 * size), (size, 1)), batch, 5 * size, channels=32)
            check_attention(case, case.make(torch.float16, "cuda"), *TOLERANCE[torch.float16])
            known = known or len(runtime._LOADED)
            assert len(runtime._LOADED) == known


@gpu
def test_gpu_attention_graph() -> None:
    case = GPU_ATTENDS[-5]
    tensors = case.make(torch.float16, "cuda")
    a = case.geometry(tensors)
    backend.attend(a, *tensors[1:]), backend.attend_gradients(a, *tensors, [True] * 3)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = (backend.attend(a, *tensors[1:]), *backend.attend_gradients(a, *tensors, [True] * 3))
    tensors[1].copy_(torch.randn_like(tensors[1]))
    graph.replay()
    exact = [t.double() for t in tensors]
    wanted = (
        reference.attend(a, *exact[1:]),
        *reference.attend_gradients(a, *exact, [True] * 3),
    )
    for g, w in zip(got, wanted, strict=True):
        assert g is not None and relative_error(g, w) <= 2e-3


@gpu
def test_gpu_attention_needs_no_memory_for_samples() -> None:
    """Beyond results: none of the forward, the value's gradient in float32 of the backward."""
    case = Attends(((64, 64), (32, 32)), channels=32, heads=8, queries=4096, points=8)
    tensors = case.make(torch.float16, "cuda")
    a = case.geometry(tensors)
    for call, extra in (
        (lambda: backend.attend(a, *tensors[1:]), 0),
        (lambda: backend.attend_gradients(a, *tensors, [True] * 3), 4 * tensors[1].numel()),
    ):
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call()
        after = torch.cuda.memory_allocated()
        assert torch.cuda.max_memory_allocated() <= after + extra + (1 << 20)
        del results
        assert torch.cuda.memory_allocated() == before


@gpu
def test_gpu_attention_large() -> None:
    """More than 2^31 elements in one item: 64-bit addresses."""
    pixels, channels = 2**21 + 8, 1040
    value = torch.zeros(1, pixels, 1, channels, device="cuda", dtype=torch.float16)
    value[:, -64:] = torch.randn(64, 1, channels, device="cuda")
    position = torch.arange(60, device="cuda") + pixels - 62.3
    locations = ((position + 0.5) / pixels).view(1, 60, 1, 1, 1, 1)
    weights = torch.randn(1, 60, 1, 1, 1, device="cuda")
    grad_output = torch.randn(1, 60, channels, device="cuda").half()
    a = geometry.attention_geometry(value, locations, weights, [pixels])
    # The locations are rounded, to an eighth of a pixel: the same ones in the part.
    at = (locations * pixels - 0.5) - (pixels - 64)
    small = [value[:, -64:].double(), (at.double() + 0.5) / 64, weights.double()]
    b = geometry.attention_geometry(*small, [64])
    assert (
        relative_error(backend.attend(a, value, locations, weights), reference.attend(b, *small))
        <= 1e-3
    )
    got = backend.attend_gradients(a, grad_output, value, locations, weights, [True] * 3)
    wanted = reference.attend_gradients(b, grad_output.double(), *small, [True] * 3)
    assert got[0] is not None and wanted[0] is not None
    assert relative_error(got[0][:, -64:], wanted[0]) <= 2e-3 and not got[0][:, :-64].any()
    assert (
        got[2] is not None and wanted[2] is not None and relative_error(got[2], wanted[2]) <= 1e-3
    )


# With fewer multiprocessors than any device has, so that small images do not need more programs.
NARROW_CASES = [
    Case((33, 30), (3, 3), image=64, points=64, offset_groups=16, mask_groups=16),
    Case((20, 23), (3, 3), image=128, points=128, offset_groups=8, mask_groups=8, last=True),
    Case((20, 23), (3, 2), image=64, points=64, offset_groups=2, mask_groups=0, stride=(2, 1),
         padding=(2, 0), dilation=(1, 2)),
    Case((20, 22), (3, 3), image=64, points=192, offset_groups=8, mask_groups=8, bias=False),
    Case((300,), (5,), image=64, points=128, offset_groups=8, mask_groups=4, padding=(2,)),
    Case((7, 15, 17), (3, 3, 3), image=32, points=64, offset_groups=4, mask_groups=8, batch=3),
    Case((33, 31), (3, 3), image=96, points=64, offset_groups=12, mask_groups=12, transposed=True),
]  # fmt: skip


@gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", NARROW_CASES, ids=str)
def test_gpu_narrow(
    case: Case, dtype: torch.dtype, exact_float32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_device(monkeypatch, tiles.device_of(torch.device("cuda")).architecture, 4)
    backend._PLANS.clear()
    check(case.make(dtype, "cuda", float_offset=True), *TOLERANCE[dtype])
    if case.points == 64:
        torch.use_deterministic_algorithms(True)
        try:
            check(case.make(dtype, "cuda", float_offset=True), *TOLERANCE[dtype])
        finally:
            torch.use_deterministic_algorithms(False)
    assert not variants.BROKEN


@gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        *IM2COL,
        Case((33, 30), (3, 3), image=96, points=300, offset_groups=3, batch=3),
        Case((21,), (5,), image=512, points=40, offset_groups=16, mask_groups=0),
        Case((20, 23), (3, 3), image=341, points=341, offset_groups=11, last=True),
        Case((12, 15), (3, 3), image=200, points=130, transposed=True),
    ],
    ids=str,
)
def test_gpu_im2col(
    case: Case, dtype: torch.dtype, exact_float32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows at once, and some at a time, with more splits the more multiprocessors there are."""
    for at_once, count in ((1 << 30, 132), (1 << 17, 9)):
        by_im2col(monkeypatch, at_once)
        on_device(monkeypatch, tiles.device_of(torch.device("cuda")).architecture, count)
        backend._PLANS.clear()
        check(case.make(dtype, "cuda", float_offset=True), *TOLERANCE[dtype])
        assert {"sample_columns", "multiply_columns"} <= kernels_used()
        assert {"multiply_points", "backward_narrow_hopper"} & kernels_used()
    backend._PLANS.clear()
    assert not variants.BROKEN


@gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        *IM2COL_GROUPS,
        Case((12, 17), (3, 3), image=426, points=300, groups=6, offset_groups=6, mask_groups=2),
        Case((33, 9), (5, 3), image=128, points=264, groups=2, batch=3, last=True),
    ],
    ids=str,
)
def test_gpu_im2col_groups(
    case: Case, dtype: torch.dtype, exact_float32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at_once in (1 << 30, 1 << 17):
        by_im2col(monkeypatch, at_once)
        backend._PLANS.clear()
        check(case.make(dtype, "cuda", float_offset=True), *TOLERANCE[dtype])
        assert {"sample_columns", "multiply_columns"} <= kernels_used()
    backend._PLANS.clear()
    assert not variants.BROKEN


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        *UPSAMPLING,
        Case((20, 23), (3, 3), stride=(2, 2), image=160, points=200, batch=5),
        Case((17, 13), (4, 4), True, stride=(2, 2), image=256, points=1024, batch=3, mask_groups=0),
        Case((40, 37), (5, 5), True, stride=(3, 2), padding=(2, 1), image=48, points=64, batch=5),
    ],
    ids=str,
)
def test_gpu_by_columns(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All items' columns at once, then those of two: and with few multiprocessors, in one split."""
    sorting(monkeypatch)
    made = case.make(dtype, "cuda", float_offset=True)
    check(made, *TOLERANCE[dtype])
    g = made.g
    item = math.prod(g.point_size) * math.prod(g.kernel) * layout.sizes_of(g, True).columns
    limits(monkeypatch, COLUMNS=2 * item)
    architecture = tiles.device_of(torch.device("cuda")).architecture
    on_device(monkeypatch, architecture, 1)
    backend._PLANS.clear()
    check(made, *TOLERANCE[dtype])
    if architecture == "sm_90" and hopper.FORWARD:
        assert any("backward_columns_hopper" in names(p) for p in backend._PLANS.values())
    backend._PLANS.clear()
    assert not variants.BROKEN


@gpu
@pytest.mark.parametrize("architecture", ["", "portable"])
@pytest.mark.parametrize("case", LONG, ids=str)
def test_gpu_long_sums(
    case: Case, architecture: str, exact_float32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensor cores round toward zero, but long sums are as exact as others."""
    architecture = architecture or tiles.device_of(torch.device("cuda")).architecture
    on_device(monkeypatch, architecture, 1)
    forget()
    made = case.make(torch.float32, "cuda")
    error = relative_error(made.forward(backend), made.double().forward(reference))
    forget()
    assert error < 1e-5


@gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gpu_split_forward_repeats(dtype: torch.dtype, exact_float32: None) -> None:
    """Whichever split comes last, the parts are added in their order."""
    for case in (Case((7, 32, 32), (3, 3, 3), image=64, points=64, batch=1),
                 Case((24, 20), (3, 3), image=256, points=256, batch=1, last=True)):  # fmt: skip
        made = case.make(dtype, "cuda", float_offset=True)
        first = made.forward(backend)
        assert close(first, made.double().forward(reference), TOLERANCE[dtype][0])
        assert all(torch.equal(first, made.forward(backend)) for _ in range(50))


@gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case((32, 30), (3, 3), image=64, points=64, batch=5),
        Case((32, 30), (3, 3), image=64, points=64, batch=4, last=True, bias=False),
        Case((20, 23), (3, 3), image=128, points=128, batch=6, transposed=True),
        Case((20, 23), (3, 3), image=64, points=64, batch=5, offset_groups=16, mask_groups=16),
        *CHUNKS,
    ],
    ids=str,
)
def test_gpu_chunks(
    case: Case,
    dtype: torch.dtype,
    deterministic: bool,
    exact_float32: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if case.offset_groups == 16:  # so that few programs do not keep a gather from Hopper's kernel
        on_device(monkeypatch, tiles.device_of(torch.device("cuda")).architecture, 4)
    split(monkeypatch, case)
    sorting(monkeypatch, case.batch % 2 == 0)
    torch.use_deterministic_algorithms(deterministic)
    try:
        check(case.make(dtype, "cuda", float_offset=True), *TOLERANCE[dtype])
        if case.batch > 3 and case.image % 16 == 0:
            assert in_chunks()
    finally:
        torch.use_deterministic_algorithms(False)
        backend._PLANS.clear()
    assert not variants.BROKEN


def draw(rng: random.Random, n: int) -> Case:
    """A random configuration whose channels come from few kinds, so that few kernels compile."""
    image, points, groups, offset_groups, mask_groups = rng.choice(
        [
            (4, 6, 1, 1, 1),
            (4, 6, 2, 2, 1),
            (12, 8, 2, 0, 3),
            (16, 16, 1, 4, 4),
            (24, 24, 1, 1, 0),
            (32, 32, 4, 2, 4),
            (32, 32, 32, 32, 32),
            (48, 48, 48, 1, 1),
            (24, 48, 24, 3, 1),
            (64, 64, 1, 1, 1),
            (64, 128, 2, 1, 1),
            (96, 48, 1, 2, 2),
        ]
    )
    longest = {1: 150, 2: 24, 3: 9}[n]
    while True:
        size = tuple(rng.randint(1, longest) for _ in range(n))
        kernel = tuple(rng.randint(1, 4 if n < 3 else 3) for _ in range(n))
        padding = tuple(rng.randint(0, 3) for _ in range(n))
        dilation = tuple(rng.randint(1, 2) for _ in range(n))
        stride = tuple(rng.randint(1, 3) for _ in range(n))
        transposed = rng.random() < 0.5
        reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        if transposed:
            fits = all(
                (s - 1) * t - 2 * p + r >= 1
                for s, t, p, r in zip(size, stride, padding, reach, strict=True)
            )
        else:
            fits = all(s + 2 * p >= r for s, p, r in zip(size, padding, reach, strict=True))
        if fits:
            return Case(
                size, kernel, transposed, rng.randint(1, 3), image, points, stride, padding,
                dilation, groups, offset_groups, mask_groups, rng.random() < 0.7,
                rng.random() < 0.4,
            )  # fmt: skip


@gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("part", range(10))
@pytest.mark.parametrize("n", [1, 2, 3])
def test_gpu_random(
    n: int, part: int, dtype: torch.dtype, exact_float32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(100 * n + part)
    sorting(monkeypatch, part % 2 == 0)
    if part % 3 == 0:  # lots of one tile
        limits(monkeypatch, COLUMNS_AT_ONCE=1, SHARE=0)
    for i in range(50):
        case = draw(rng, n)
        try:
            check(case.make(dtype, "cuda", seed=i, float_offset=i % 4 > 0), *TOLERANCE[dtype])
        except AssertionError as failure:
            raise AssertionError(f"{i}: {case}") from failure


@gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gpu_another_thread(dtype: torch.dtype, exact_float32: None) -> None:
    """Threads whose first use of CUDA is a call, all kernels of which are loaded."""
    for case in (Case((9, 9), (3, 3), image=64, points=64, offset_groups=n) for n in (1, 8)):
        made = case.make(dtype, "cuda")
        check(made, *TOLERANCE[dtype])
        backend._PLANS.clear()  # the next calls make their tensor maps anew
        with ThreadPoolExecutor(1) as pool:
            y = pool.submit(made.forward, backend).result()
        with ThreadPoolExecutor(1) as pool:
            grads = pool.submit(made.backward, backend).result()
        exact = made.double()
        assert close(y, exact.forward(reference), TOLERANCE[dtype][0])
        assert close(grads[0], exact.backward(reference)[0], TOLERANCE[dtype][1])


@gpu
def test_gpu_nonfinite(exact_float32: None) -> None:
    nonfinite(Case((5, 5), (3, 3)), "cuda")
    nonfinite(Case((5, 5), (3, 3), offset_groups=4, mask_groups=4), "cuda")
    nonfinite(Case((5, 5), (3, 3), transposed=True), "cuda")
    nonfinite(Case((9, 9), (3, 3), image=64, points=64, offset_groups=16, mask_groups=16), "cuda")
    exact_positions("cuda")


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_gpu_nan_masks(dtype: torch.dtype, exact_float32: None) -> None:
    nan_masks(Case((5, 5), (3, 3)), "cuda", dtype)
    nan_masks(Case((9, 9), (3, 3), image=48, points=40), "cuda", dtype)
    nan_masks(Case((9, 9), (3, 3), image=64, points=64), "cuda", dtype)
    nan_masks(
        Case((9, 9), (3, 3), image=64, points=64, offset_groups=16, mask_groups=16), "cuda", dtype
    )


@gpu
def test_gpu_sums() -> None:
    sums("cuda")


@gpu
def test_gpu_tf32() -> None:
    if not layout.allows_tf32():
        pytest.skip("TF32 is off by default here")
    check(Case((9, 9), (3, 3), image=64, points=64).make(torch.float32, "cuda"), 2e-3, 2e-3)


@gpu
def test_gpu_float64_and_empty() -> None:
    problem = Case((5, 5), (3, 3)).make(torch.float64, "cuda")
    assert torch.equal(problem.forward(backend), problem.forward(reference))
    assert Case((5, 5), (3, 3), batch=0).make(torch.float16, "cuda").forward(backend).numel() == 0


@gpu
def test_gpu_needs() -> None:
    """Only what is asked for comes back."""
    problem = Case((9, 9), (3, 3)).make(torch.float16, "cuda")
    for i in range(5):
        needs = tuple(j == i for j in range(5))
        assert [x is not None for x in problem.backward(backend, needs)] == list(needs)


@gpu
@pytest.mark.parametrize(("points", "groups"), [(64, 1), (72, 1), (64, 64)])
@pytest.mark.parametrize("offset_groups", [1, 16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_gpu_deterministic(
    dtype: torch.dtype,
    transposed: bool,
    offset_groups: int,
    points: int,
    groups: int,
    exact_float32: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bitwise the same results, also where very many samples crowd into one tile, or where the
    samples' gradients are written down for one tap at a time."""
    if points == 72:
        limits(monkeypatch, COLUMNS_AT_ONCE=1, SHARE=0)
    case = Case(
        (40, 40), (3, 3), transposed, image=64, points=points, groups=groups,
        offset_groups=offset_groups, mask_groups=offset_groups,
    )  # fmt: skip
    problem = case.make(dtype, "cuda", float_offset=True)
    assert problem.offset is not None
    problem.offset[1].sub_(torch.arange(40.0, device="cuda") - 3.3)
    torch.use_deterministic_algorithms(True)
    try:
        check(problem, *TOLERANCE[dtype])
        first = (problem.forward(backend), *problem.backward(backend))
        for _ in range(5):
            again = (problem.forward(backend), *problem.backward(backend))
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def replaced(value: Any, others: dict[Any, Any]) -> Any:
    """Arguments of a launch with other buffers."""
    if isinstance(value, dict):
        return {name: replaced(v, others) for name, v in value.items()}
    if isinstance(value, tuple) and not isinstance(value, Buffer):
        parts = [replaced(v, others) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return others.get(value, value)


@gpu
def test_gpu_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lists in order hold what those out of order hold, each list's samples in order."""
    size, number = (181, 300), 18 * 23 * 38
    g = Geometry(1, 32, 32, 1, 2, 0, size, size, (3, 3), (1, 1), (1, 1), (1, 1))
    offset = 3 * torch.randn(1, 36, *size, device="cuda")
    offset[0, 3:9] -= torch.arange(300.0, device="cuda") - 3.3  # long lists
    weight = torch.empty(32, 32, 3, 3, device="cuda")
    found = []
    for ordered in (True, False):
        repeatable(monkeypatch, ordered)
        plan = Plan(offset.device, [weight, offset])
        given = layout.Operand(plan.given[0], False)
        call = layout.Call(
            g, layout.Steps(plan), weight.dtype, "bf16x3", given, plan.given[1], None
        )
        lists, entries = backward_sorted.make_lists(call, backward_sorted.VARIANTS[-1])
        copies = [plan.result(b.shape, b.dtype) for b in (lists, entries)]
        call.steps.finish()
        # Where the results are, so that they can be looked at.
        for step in plan.steps:
            step.arguments = replaced(step.arguments, {lists: copies[0], entries: copies[1]})
        lists, entries = plan.run([weight, offset])
        lengths, total, ends = lists.split([number, 1, number])
        order_of = torch.argsort(ends - lengths, stable=True)
        slot = torch.repeat_interleave(order_of, lengths[order_of].long())
        key = slot * math.prod(size) + entries[:total]
        if ordered:
            assert ((key[1:] > key[:-1]) | (slot[1:] != slot[:-1])).all()
        found.append((lengths, key.sort().values))
        assert lengths.max() > tiles.LONG
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@gpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("offset_groups", [1, 8])
def test_gpu_backward_is_compiled_with_its_forward(
    offset_groups: int, transposed: bool, exact_float32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget()
    monkeypatch.setattr(runtime, "_LOADED", {})
    function = deformnd.deform_conv_transpose2d if transposed else deformnd.deform_conv2d
    case = Case((20, 22), (3, 3), transposed, image=64, points=64, offset_groups=offset_groups)
    made = case.make(torch.float32, "cuda")
    given = [
        t.requires_grad_() for t in (made.x, made.weight, made.offset, made.mask) if t is not None
    ]
    with torch.no_grad():
        function(*given, padding=1)
    alone = set(runtime._LOADED)
    runtime._LOADED.clear()
    forget()
    result = function(*given, padding=1)
    loaded = set(runtime._LOADED)
    result.sum().backward()
    torch.cuda.synchronize()
    assert set(runtime._LOADED) == loaded > alone
    forget()


@gpu
@pytest.mark.parametrize("offset_groups", [1, 16])
def test_gpu_graph(offset_groups: int) -> None:
    """A CUDA graph captures a forward and a backward, and replays them on new values."""
    case = Case((20, 20), (3, 3), image=64, points=64, offset_groups=offset_groups)
    problem = case.make(torch.float16, "cuda")
    problem.forward(backend), problem.backward(backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = (problem.forward(backend), *problem.backward(backend))
    problem.x.copy_(torch.randn_like(problem.x))
    graph.replay()
    exact = problem.double()
    expected = (exact.forward(reference), *exact.backward(reference))
    for got, want in zip(captured, expected, strict=True):
        assert relative_error(got, want) <= 2e-3


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("offset_groups", [1, 16])
def test_gpu_repeated_calls(
    offset_groups: int,
    dtype: torch.dtype,
    exact_float32: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Calls at addresses that came before are launched as graphs, right for other values, on other
    streams and in other threads. While the user records, they are not."""
    forget()
    problem = Case((20, 20), (3, 3), image=64, points=64, offset_groups=offset_groups).make(
        dtype, "cuda"
    )
    launched: list[int] = []
    call = driver.Graph.__call__

    def counted(graph: driver.Graph, stream: int) -> None:
        launched.append(stream)
        call(graph, stream)

    monkeypatch.setattr(driver.Graph, "__call__", counted)

    def results() -> list[Tensor]:
        return [problem.forward(backend).cpu(), *(t.cpu() for t in problem.backward(backend))]

    def right(found: Sequence[Tensor]) -> bool:
        exact = problem.double()
        wanted = (exact.forward(reference), *exact.backward(reference))
        errors = [relative_error(g, w.cpu()) for g, w in zip(found, wanted, strict=True)]
        return max(errors) <= TOLERANCE[dtype][1]

    def repeat() -> list[Tensor]:
        for _ in range(runtime.REPEATED + 2):
            results()
        launched.clear()
        return results()

    assert right(repeat()) and len(launched) == 2
    for t in (problem.x, problem.grad, problem.weight):
        t.copy_(torch.randn_like(t))
    assert right(repeat()) and len(launched) == 2
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert right(repeat()) and launched == [stream.cuda_stream] * 2
    with ThreadPoolExecutor(1) as thread:
        assert right(thread.submit(repeat).result()) and len(launched) == 2
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    launched.clear()
    with torch.cuda.graph(graph):
        for _ in range(2 * runtime.REPEATED):
            captured = (problem.forward(backend), *problem.backward(backend))
    assert not launched
    problem.x.copy_(torch.randn_like(problem.x))
    graph.replay()
    assert right([t.cpu() for t in captured])
    forget()


@gpu
@pytest.mark.parametrize(("most", "results"), [(3, 8), (20, 2)])
def test_gpu_graphs_beside_other_threads(
    most: int, results: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread synchronizes the device, or records a graph of its own, while graphs are made
    and destroyed, or with few results, whose addresses come again, made and launched."""
    launched: list[int] = []

    class Counted(runtime.Graph):
        def __call__(self, stream: int) -> None:
            super().__call__(stream)
            launched.append(stream)

    forget()
    monkeypatch.setattr(runtime, "REPEATED", 0)
    monkeypatch.setattr(runtime, "GRAPHS", most)
    monkeypatch.setattr(runtime, "Graph", Counted)
    problem = Case((20, 20), (3, 3), image=64, points=64).make(torch.float16, "cuda")
    wanted = problem.double().forward(reference)
    problem.forward(backend)
    torch.cuda.synchronize()
    stop = threading.Event()

    def make_graphs() -> int:
        kept: list[Tensor] = []
        while not stop.is_set():
            kept = [problem.forward(backend), *kept[: results - 1]]
        torch.cuda.current_stream().synchronize()
        assert all(relative_error(t, wanted) <= 1e-3 for t in kept)
        return len(kept)

    # Beside this tensor torch's allocator finds room for the other thread's scratch memory. If it
    # had to ask the driver for memory there, that would spoil the graph that is recorded here.
    beside = torch.empty(4 << 20, dtype=torch.int8, device="cuda")
    x = torch.ones(8, device="cuda")
    with ThreadPoolExecutor(1) as thread:
        made = thread.submit(make_graphs)
        try:
            for _ in range(1000):
                torch.cuda.synchronize()
            enough = len(launched) + (100 if most > 3 else 0)
            for i in range(5000):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    y = x + 1
                if i >= 20 and len(launched) >= enough:
                    break
        finally:
            stop.set()
        assert made.result() == results
    graph.replay()
    assert bool((y == 2).all())
    assert len(launched) >= enough
    del beside
    forget()


@gpu
def test_gpu_unusual_tensors(exact_float32: None) -> None:
    """Slices, unaligned storage and channels-last offsets; another stream."""
    plain = Case((9, 8), (3, 3), image=8).make(torch.float32, "cuda")

    def slices(t: Tensor) -> Tensor:
        room = t.new_full((*t.shape[:-1], t.shape[-1] + 3), math.nan)
        room[..., 1:-2] = t
        return room[..., 1:-2]

    assert plain.offset is not None and plain.mask is not None
    odd = dataclasses.replace(
        plain, x=slices(plain.x), weight=slices(plain.weight), grad=slices(plain.grad),
        offset=plain.offset.to(memory_format=torch.channels_last), mask=slices(plain.mask),
    )  # fmt: skip
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        check(odd, 1e-5, 1e-5)
    torch.cuda.synchronize()


@gpu
def test_gpu_large() -> None:
    """More than 2^31 elements in one image: 64-bit addresses."""
    size = (2**21 + 8,)
    g = Geometry(1, 1040, 16, 1, 1, 0, size, size, (1,), (1,), (0,), (1,))
    image = torch.zeros(1, 1040, *size, device="cuda", dtype=torch.float16)
    image[:, 1024:, -64:] = torch.randn(16, 64, device="cuda")
    weight = torch.randn(16, 1040, 1, device="cuda", dtype=torch.float16)
    offset = torch.full((1, 1, *size), 0.25, device="cuda", dtype=torch.float16)
    got = backend.gather(g, image, weight, offset, None, None)[..., -64:]
    part = SimpleNamespace(image=image[..., -65:].double(), offset=offset[..., -65:].double())
    small = g._replace(image_size=(65,), point_size=(65,))
    want = reference.gather(small, part.image, weight.double(), part.offset, None, None)[..., 1:]
    assert relative_error(got, want) <= 1e-3
    points = torch.zeros(1, 16, *size, device="cuda", dtype=torch.float16)
    points[..., -64:] = torch.randn(16, 64, device="cuda")
    got = backend.scatter(g, points, weight, offset, None, None)[..., -60:]
    want = reference.scatter(
        small, points[..., -65:].double(), weight.double(), part.offset, None, None
    )[..., -60:]
    assert relative_error(got, want) <= 1e-3
