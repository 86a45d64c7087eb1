"""The Triton backend against the float64 reference: interpreted, compiled, and on a GPU.

Triton must know before it is imported that it is to interpret, so the interpreted tests run in
a process of their own with TRITON_INTERPRET=1, which test_in_interpreter starts.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import os
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import random_calls
from deformnd.kernels import reference
from deformnd.kernels.geometry import (
    Geometry,
    conv_geometry,
    conv_transpose_geometry,
    memory_format,
)

triton = pytest.importorskip("triton")

from deformnd.kernels.triton import compiled, configs, hopper, launch, layouts  # noqa: E402
from deformnd.kernels.triton import plan as planning  # noqa: E402
from deformnd.kernels.triton.compiled import _parameters  # noqa: E402
from deformnd.kernels.triton.plan import GIVEN, SCRATCH, Plan  # noqa: E402

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
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        n = len(self.size)
        stride, padding = self.stride or (1,) * n, self.padding or (1,) * n
        dilation, taps = self.dilation or (1,) * n, math.prod(self.kernel)
        x = randn(self.batch, self.points if self.transposed else self.image, *self.size)
        weight = randn(self.points, self.image // self.groups, *self.kernel)
        weight /= math.sqrt(weight[0].numel())
        bias = randn(self.image if self.transposed else self.points) if self.bias else None
        if self.last and n > 1:
            form = {2: torch.channels_last, 3: torch.channels_last_3d}[n]
            x, weight = x.to(memory_format=form), weight.to(memory_format=form)
        if self.transposed:
            point_size = self.size
        else:
            point_size = tuple(
                (s + 2 * p - d * (k - 1) - 1) // t + 1
                for s, p, d, k, t in zip(
                    self.size, padding, dilation, self.kernel, stride, strict=True
                )
            )
        offset = mask = None
        if self.offset_groups:
            shape = (self.batch, self.offset_groups * taps * n, *point_size)
            # Away from integers, where float32 and float64 may find different cells.
            whole = torch.randint(-3, 3, shape, generator=generator)
            offset = whole + 0.15 + 0.7 * torch.rand(shape, generator=generator)
            offset = offset.to(device, torch.float32 if float_offset else dtype)
        if self.mask_groups:
            shape = (self.batch, self.mask_groups * taps, *point_size)
            mask = torch.rand(shape, generator=generator).to(device, dtype)
        if self.transposed:
            g = conv_transpose_geometry(
                x, weight, offset, mask, bias, stride, padding, (0,) * n, dilation, self.groups
            )
        else:
            g = conv_geometry(x, weight, offset, mask, bias, stride, padding, dilation, self.groups)
        shape = (g.batch, g.image_channels, *g.image_size)
        if not self.transposed:
            shape = (g.batch, g.point_channels, *g.point_size)
        return Problem(g, self.transposed, x, weight, offset, mask, bias, randn(*shape))


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


def error(got: Tensor, expected: Tensor) -> float:
    norm = expected.norm().item()
    distance = (got.double() - expected).norm().item()
    return distance / norm if norm else distance


def close(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether the error is within the tolerance, which the errors of few elements, not averaged,
    exceed: a single half number is rounded by up to 4.9e-4."""
    count = max(int(expected.count_nonzero()), 1)
    return error(got, expected) <= tolerance * (1 + 4 / math.sqrt(count))


def check(problem: Problem, forward: float, backward: float) -> None:
    exact = problem.double()
    y = problem.forward(launch)
    assert y.dtype == problem.x.dtype and memory_format(y) == memory_format(problem.x)
    assert close(y, exact.forward(reference), forward)
    expected = exact.backward(reference)
    bias = problem.grad[0].flatten(1)[:, 0]
    tensors = (problem.x, problem.weight, problem.offset, problem.mask, bias)
    for name, got, want, t in zip(
        ("input", "weight", "offset", "mask", "bias"), problem.backward(launch), expected, tensors,
        strict=True,
    ):  # fmt: skip
        if want is None:
            assert got is None
            continue
        assert got.dtype == t.dtype and got.shape == t.shape
        form = memory_format(t) if name == "input" else torch.contiguous_format
        assert got.is_contiguous(memory_format=form)
        assert close(got, want, backward), f"gradient of {name}: {error(got, want):.2e}"


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
        dataclasses.replace(row, block_p=32, block_o=16, block_c=16) for row in configs.TABLE
    )
    monkeypatch.setattr(configs, "TABLE", rows)

    random_calls.prepare_interpreter()
    forget()
    yield
    forget()


def forget() -> None:
    """Drop the launches that were made with other kernels or tables."""
    for value in (v for m in (launch, layouts, hopper) for v in vars(m).values()):
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    launch._PLANS.clear()


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
]  # fmt: skip


@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_interpreted(case: Case, interpreted: None) -> None:
    check(case.make(torch.float32, "cpu"), 1e-5, 1e-5)


@pytest.mark.parametrize("case", [INTERPRETED[i] for i in (3, 4, 6, 9, 12)], ids=str)
def test_interpreted_wide(case: Case, interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of few channels, too, one at a time."""
    monkeypatch.setattr(configs, "NARROW", 0)
    check(case.make(torch.float32, "cpu"), 1e-5, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_interpreted_half(dtype: torch.dtype, interpreted: None) -> None:
    # The interpreter rounds every product of half numbers, the hardware fuses it with the sum.
    case = Case((5, 5), (3, 3), image=8, batch=1)
    check(case.make(dtype, "cpu", float_offset=True), 1e-2, 2e-2)


def test_interpreted_split(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "allows_tf32", lambda: False)
    monkeypatch.setattr(configs, "FEW", 0)
    for case in (INTERPRETED[3], INTERPRETED[6]):
        # The interpreter truncates to bfloat16 where the hardware rounds.
        check(case.make(torch.float32, "cpu"), 3e-5, 3e-5)


def test_interpreted_deterministic(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many units take the inverse gather too, and lists longer than a block are right."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    monkeypatch.setattr(configs, "LISTED", 16)
    monkeypatch.setattr(configs, "LONG", 32)
    monkeypatch.setattr(configs, "SHORT", 16)
    for case in (
        Case((5, 4), (1, 2), offset_groups=2, mask_groups=2, batch=1),
        Case((40,), (2,), offset_groups=1, batch=1),
    ):
        check(case.make(torch.float32, "cpu"), 1e-5, 1e-5)


PIECES = [
    Case((4, 5), (3, 2), batch=5),
    Case((4, 5), (2, 3), batch=4, last=True, bias=False),
    Case((4, 3), (2, 2), batch=5, image=8, points=8, groups=2, offset_groups=2, last=True),
    Case((4, 3), (2, 2), batch=5, stride=(2, 2), transposed=True),
    Case((4, 5), (1, 3), batch=5, image=12, offset_groups=4, mask_groups=2),
    Case((9,), (3,), batch=5, image=8, offset_groups=8, mask_groups=0, transposed=True),
    Case((2, 3, 4), (1, 3, 2), batch=4, padding=(0, 1, 1), last=True, transposed=True, bias=False),
]  # fmt: skip


def split(monkeypatch: pytest.MonkeyPatch, case: Case, items: int = 2) -> None:
    """Have small batches be taken in pieces of about so many items."""
    g = case.make(torch.float32, "cpu").g
    monkeypatch.setattr(configs, "PIECE", items * math.prod(g.point_size))
    monkeypatch.setattr(configs, "SCRATCH", 1)
    monkeypatch.setattr(configs, "LARGE", 0)
    launch._PLANS.clear()


def sources(plan: Plan) -> set[int]:
    """Where the parts of the plan's first tensor start."""
    slots = [s for _, slots in plan.steps for s in slots if s is not None]
    return {s.start for s in slots if (s.kind, s.number) == (GIVEN, 0)}


def in_pieces() -> bool:
    """Whether every plan is in pieces."""
    return all(len(sources(plan)) > 1 for plan in launch._PLANS.values())


@pytest.mark.parametrize("case", PIECES, ids=str)
def test_interpreted_pieces(case: Case, interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    split(monkeypatch, case)
    check(case.make(torch.float32, "cpu"), 1e-5, 1e-5)
    assert in_pieces() and len(launch._PLANS) == 2


def test_interpreted_many_pieces(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """More pieces than gradients of the weight that are kept."""
    monkeypatch.setattr(configs, "KEPT", 2)
    case = Case((4, 4), (1, 1), padding=(0, 0), batch=5)
    split(monkeypatch, case, 1)
    check(case.make(torch.float32, "cpu"), 1e-5, 1e-5)
    assert all(len(sources(plan)) == 5 for plan in launch._PLANS.values())


def test_interpreted_pieces_inverse(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With lists, for half numbers and where results are to be repeatable."""
    monkeypatch.setattr(configs, "NARROW", 4)
    for name in ("LISTED", "LONG", "SHORT"):
        monkeypatch.setattr(configs, name, 16)
    case = Case((3, 4), (2, 2), image=8, batch=5)
    for half in (case, PIECES[4]):
        split(monkeypatch, half)
        check(half.make(torch.float16, "cpu", float_offset=True), 1e-2, 2e-2)
        assert in_pieces()
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    for ordered in (case, PIECES[3], Case((3, 4), (1, 2), batch=4, offset_groups=2)):
        split(monkeypatch, ordered)
        check(ordered.make(torch.float32, "cpu"), 1e-5, 1e-5)
        assert in_pieces()


def test_interpreted_single_pixels(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels first and last at once, and not aligned: a copy lies in the input's gradient."""
    monkeypatch.setattr(configs, "LARGE", 0)
    launch._PLANS.clear()
    problem = Case((1, 1), (1, 1), padding=(0, 0), image=8).make(torch.float32, "cpu")
    assert problem.offset is not None
    problem.offset.fmod_(1)
    problem.x = torch.randn(17)[1:].as_strided((2, 8, 1, 1), (8, 1, 8, 8))
    expected = problem.double().backward(reference)
    for got, want in zip(problem.backward(launch), expected, strict=True):
        assert want.count_nonzero() and close(got, want, 1e-5)


def test_interpreted_sums(interpreted: None) -> None:
    sums("cpu")


def sums(device: str) -> None:
    """Of channels first and last; enough for several parts."""
    for shape in ((3, 5, 7), (2, 33, 9, 8), (1, 1, 40, 400), (2, 2, 3, 4, 5), (8, 1, 40, 20),
                  (2, 1, 512, 600)):  # fmt: skip
        x = torch.randn(shape).to(device)
        for t in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
            plan = Plan(t.device, (t,))
            source = layouts.Operand(plan.given[0], t is not x)
            launch._sums(plan, source, plan.result(shape[1:2], t.dtype))
            plan.finish()
            (got,) = plan.run((t,))
            torch.testing.assert_close(got, reference.channel_sums(x), rtol=1e-5, atol=1e-4)


def test_interpreted_nonfinite(interpreted: None) -> None:
    nonfinite(Case((5, 5), (3, 3), batch=1), "cpu")
    nonfinite(Case((5, 5), (1, 3), batch=1, offset_groups=4, mask_groups=4), "cpu")


def nonfinite(case: Case, device: str) -> None:
    """NaN, infinite and huge offsets sample 0; their gradients are those of the reference."""
    problem = case.make(torch.float32, device)
    assert problem.offset is not None
    flat = problem.offset.view(-1)
    bad = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -3e9, 6e4], device=device)
    flat[: 6 * (len(flat) // 12)].view(-1, 6)[:] = bad
    check(problem, 1e-5, 1e-5)


def test_interpreted_nan_masks(interpreted: None) -> None:
    nan_masks(Case((5, 5), (3, 3), batch=1), "cpu")
    nan_masks(Case((5, 6), (3, 3), image=20, batch=1), "cpu")
    nan_masks(Case((5, 5), (1, 3), batch=1, offset_groups=4, mask_groups=4), "cpu")


def nan_masks(case: Case, device: str, dtype: torch.dtype = torch.float32) -> None:
    """A mask multiplies its sample, also a 0 outside of the image: NaN where the reference is."""
    problem = case.make(dtype, device, float_offset=True)
    assert problem.offset is not None and problem.mask is not None
    problem.offset.mul_(3)
    problem.mask.view(-1)[::37] = math.nan
    exact = problem.double()
    results = (problem.forward(launch), *problem.backward(launch))
    expected = (exact.forward(reference), *exact.backward(reference))
    assert expected[0].isnan().any() and not expected[0].isnan().all()
    for name, got, want in zip(
        ("output", "input", "weight", "offset", "mask", "bias"), results, expected, strict=True
    ):
        if name == "input" and dtype != torch.float32:
            continue  # tiles of the inverse gather spread NaN
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


@pytest.mark.skipif(INTERPRETING or hopper.gluon is None, reason="no Gluon to plan with")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_pieces_bound_memory(
    dtype: torch.dtype, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an H200 a plan's scratch memory is at most a tenth of what torchvision takes there."""
    torchvision = 352 * dtype.itemsize << 20
    plans: list[Plan] = []

    def run(plan: Plan, tensors: Any) -> list[None]:
        plans.append(plan)
        return [None] * 6

    for module in (layouts, launch):
        monkeypatch.setattr(module, "multiprocessors_of", lambda device: 132)
    monkeypatch.setattr(layouts, "allows_tf32", lambda: False)
    monkeypatch.setattr(launch, "allows_tf32", lambda: False)
    monkeypatch.setattr(hopper, "capability_of", lambda device: (9, 0))
    monkeypatch.setattr(launch, "Plan", lambda device, given: Plan(torch.device("cuda"), given))
    monkeypatch.setattr(Plan, "load", lambda plan: {})
    monkeypatch.setattr(Plan, "run", run)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    size, ones = (128, 128), (1, 1)
    g = Geometry(8, 256, 256, 1, 1, 1, size, size, (3, 3), ones, ones, ones)
    image, points = (torch.empty(8, 256, *size, dtype=dtype, device="meta") for _ in range(2))
    weight = torch.empty(256, 256, 3, 3, dtype=dtype, device="meta")
    offset, mask = (torch.empty(8, n, *size, dtype=dtype, device="meta") for n in (18, 9))
    launch.gather(g, image, weight, offset, mask, None)
    launch.scatter(g, points, weight, offset, mask, None)
    given = (image, points, weight, offset, mask)
    launch.gradients(g, *given, (True, False, True, True, True), points)
    launch.gradients(g, *given, (False, True, True, True, True), image)
    assert [len(sources(plan)) for plan in plans] == [1, 2, 2, 2]
    assert all(16 * 2**20 < plan.size <= torchvision / 10 for plan in plans)

    # It does not grow with the batch. Neither few positions nor a single item are split.
    for batch, size, split in ((128, (128, 128), True), (5, (128, 128), False),
                               (1, (640, 640), False)):  # fmt: skip
        image, points, *others = (
            torch.empty(batch, n, *size, dtype=dtype, device="meta") for n in (256, 256, 18, 9)
        )
        g = g._replace(batch=batch, image_size=size, point_size=size)
        launch.gradients(g, image, points, weight, *others, (True, False, True, True, True))
        assert (len(sources(plans[-1])) > 1) == split
        assert not split or plans[-1].size <= torchvision / 10 + 8 * 4 * weight.numel()


@pytest.mark.parametrize("deterministic", [False, True])
def test_lists_are_made_aside(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory that nothing beside them touches, before the inverse gather reads them."""
    plans: list[Plan] = []
    monkeypatch.setattr(Plan, "load", lambda plan: {})
    monkeypatch.setattr(Plan, "run", lambda plan, _: plans.append(plan) or [None] * 6)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    forget()
    Case((9, 9), (3, 3), image=64, points=64).make(torch.float16, "cpu").backward(launch)
    (plan,) = plans

    def spans(steps: Iterable[int]) -> list[tuple[int, int]]:
        slots = [s for i in steps for s in plan.steps[i][1] if s is not None and s.kind == SCRATCH]
        starts = [plan.offsets[s.number] + s.start for s in slots]
        return [(start, start + s.size) for start, s in zip(starts, slots, strict=True)]

    kernels = [step.kernel for step, _ in plan.steps]
    lists = ["bucket", "starts", "bucket", *["order"] * deterministic]
    aside, (join,) = sorted(plan.asides), plan.joins
    assert kernels[: aside[0]] == ["prepare"] and kernels[join] == "inverse"
    assert kernels[aside[0] : aside[-1] + 1] == [kernels[i] for i in aside] == lists
    others = range(aside[-1] + 1, join)
    assert {"spread", "weight_gradient"} <= {kernels[i] for i in others}
    for first, last in spans(aside):
        assert all(stop <= first or last <= start for start, stop in spans(others))
    forget()


def test_plans_without_gluon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which a Triton for other devices may lack."""
    plans: list[Plan] = []
    monkeypatch.setattr(hopper, "gl", None, raising=False)
    monkeypatch.setattr(layouts, "allows_tf32", lambda: False)
    monkeypatch.setattr(Plan, "load", lambda plan: {})
    monkeypatch.setattr(Plan, "run", lambda plan, _: plans.append(plan) or [None] * 6)
    forget()
    problem = Case((9, 9), (3, 3), image=64, points=64).make(torch.float32, "cpu")
    problem.backward(launch)
    kernels = [step.kernel for step, _ in plans[0].steps]
    assert kernels[-3:] == ["prepare", "weight_gradient", "reduce_weight"]
    forget()


def test_addresses_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches get the addresses of parts, tensor maps too."""
    seen: list[list[int]] = []

    def word(address: int) -> Any:
        return ctypes.c_uint64.from_address(address)

    def invocation(function: Any, grid: Any, arguments: Any) -> Any:
        return lambda stream: seen.append(
            [word(value).value for is_one, value in arguments if is_one]
        )

    class TensorMap:
        of = staticmethod(lambda described, shape: TensorMap())

        def encode(self, place: int, address: int) -> None:
            word(place).value = address

    monkeypatch.setattr(planning, "Invocation", invocation)
    monkeypatch.setattr(planning, "TensorMap", TensorMap)
    monkeypatch.setattr(planning, "_stream_of", lambda device: lambda: 0)
    step: Any = SimpleNamespace(
        grid=(1, 1, 1), integers=(), descriptor=SimpleNamespace(argument=2),
        load=lambda dtypes: (None, None),
    )  # fmt: skip
    plan = Plan(torch.device("cpu"), [torch.empty(4, 8), None, torch.empty(2, 3)])
    given, result = plan.given[0], plan.result((4, 16), torch.float16)
    assert given is not None
    plan.scratch(3, dtype=torch.float32)
    scratch = plan.scratch(4, 64, dtype=torch.float32)
    for first in (0, 1, 3):
        plan.launch(
            step, given.part(first, 1), None, *(t.part(first, 1) for t in (result, scratch))
        )
    plan.launch(step, None, given, given.part(1, 2), None)
    instance = planning._Instance(plan)
    for x, y, z in ((1000, 5000, 9000), (11000, 15000, 19000)):
        seen.clear()
        instance.run([x, 0], [y], z)
        want = [[x + 32 * i, y + 32 * i, z + 256 + 256 * i] for i in (0, 1, 3)]
        assert seen == [*want, [x, x + 32]]


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


def unset_registers(cubin: bytes, tmp_path: Path) -> list[str]:
    """Instructions that read a uniform register before any in program order has written it.

    A block out of line that jumps back may be taken for one; look at the listing then.

    ptxas (12.8, with Triton 3.6) hoists the descriptors of some products out of a loop past what
    they are made from. The kernel then reads outside shared memory; the tables avoid such tiles.
    """
    listing = cuobjdump("--dump-sass", cubin, tmp_path)
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


def launches(n: int, dtype: torch.dtype, offset_groups: int, groups: int) -> list[Any]:
    """One launch of every kernel with the dtypes of its tensors."""
    size, kernel = (16,) * n, (3,) * n
    ones = (1,) * n
    g = Geometry(
        2, 64, 64, groups, offset_groups, offset_groups, size, size, kernel, ones, ones, ones
    )
    width, precision = dtype.itemsize, "split" if dtype == torch.float32 else "native"
    weight = torch.bfloat16 if precision == "split" else dtype
    single, integer = torch.float32, torch.int32
    given = (dtype, dtype)  # offset and mask
    key = (width, precision, True)
    count, starts, fill, order = launch._list_plan(g, True).launches
    of_few = g._replace(image_channels=4 * offset_groups)
    few = (of_few, width, "ieee" if precision == "split" else precision, True)
    wide = g._replace(point_channels=128 * groups)
    gather, gather_few = (launch._gather_launch(*a, 132) for a in ((g, *key), few))
    return [
        (gather_few, (dtype, dtype, *given, dtype, single if gather_few.grid[1] > 1 else dtype)),
        (launch._spread_launch(*few, True, True, 132),
         (dtype, dtype, dtype, *given, *given, single)),
        (launch._weight_launch(*few, 132)[0], (dtype, dtype, *given, single)),
        (gather, (dtype, weight, *given, dtype, single if gather.grid[1] > 1 else dtype)),
        (launch._spread_launch(g, *key, False, True, 132),
         (dtype, dtype, weight, *given, *given, None)),
        (launch._spread_launch(g, *key, True, False, 132),
         (None, dtype, weight, *given, None, None, single)),
        (launch._weight_launch(g, *key, 132)[0], (dtype, dtype, *given, single)),
        (launch._weight_launch(wide, *key, 132)[0], (dtype, dtype, *given, single)),
        (launch._inverse_launch(g, width, precision, False, 132),
         (dtype, weight, *given, None, integer, integer, single)),
        (launch._inverse_launch(g, width, precision, True, 0),
         (dtype, weight, *given, None, integer, integer, dtype)),
        (count, (dtype, integer, None)),
        (starts, (integer,)),
        (fill, (dtype, integer, integer)),
        (order, (dtype, integer, integer)),
        (launch._reduce_launch(4, (9, 64, 64), (1, 9, 576)), (single, None, dtype)),
        (launch._reduce_weight_launch(g, 9), (single, dtype)),
        *sums_of(g, dtype),
        *prepared(g, dtype, precision),
    ]  # fmt: skip


def sums_of(g: Geometry, dtype: torch.dtype) -> list[Any]:
    """Launches of `prepare` that sum."""
    found = []
    for last in (False, True):
        shape = (g.batch, g.point_channels, *g.point_size)
        plan = Plan(torch.device("cpu"), (torch.empty(shape, dtype=dtype),))
        launch._sums(plan, layouts.Operand(plan.given[0], last), plan.result(shape[1:2], dtype))
        plan.finish()
        step, slots = plan.steps[0]
        found.append((step, [s and s.dtype for s in slots]))
    return found


def prepared(g: Geometry, dtype: torch.dtype, precision: str) -> list[Any]:
    """Launches of `prepare` that copy, pack and write zeros."""
    image = torch.empty(g.batch, g.image_channels, *g.image_size, dtype=dtype)
    points = torch.empty(g.batch, g.point_channels, *g.point_size, dtype=dtype)
    weight = torch.empty(g.point_channels, g.image_channels // g.groups, *g.kernel, dtype=dtype)
    plan = Plan(image.device, (image, points, weight))
    x, y, w = (layouts.Operand(slot, False) for slot in plan.given if slot is not None)
    call = layouts.Call(g, plan, precision, w, None, None)
    call.image(x), call.rows(y), call.weight(), call.weight("along")
    plan.zero(plan.scratch(100, dtype=torch.int32))
    plan.flush()
    rows = layouts.Operand(plan.scratch(*points.shape, dtype=dtype), True)
    bias = plan.scratch(g.point_channels, dtype=dtype)
    whole = layouts.Units(g.point_channels, 1, False, g.point_channels)
    layouts.copy(plan, rows.slot, plan.result(points.shape, dtype), bias, whole, "rows", "channels")
    call.factors(y)
    plan.flush()
    assert len(plan.steps) == 2
    return [(step, [s and s.dtype for s in slots]) for step, slots in plan.steps]


@pytest.mark.skipif(INTERPRETING, reason="does not compile")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("n", "dtype", "offset_groups", "groups"),
    [
        (1, torch.bfloat16, 1, 1),
        (2, torch.float16, 1, 1),
        (2, torch.float16, 16, 4),
        (2, torch.float32, 1, 1),
        (3, torch.float32, 8, 1),
    ],
)
def test_compiles(
    n: int,
    dtype: torch.dtype,
    offset_groups: int,
    groups: int,
    capability: int,
    tmp_path: Path,
) -> None:
    from triton.backends.compiler import GPUTarget

    for made, dtypes in launches(n, dtype, offset_groups, groups):
        compiled = made.compile(dtypes, GPUTarget("cuda", capability, 32))
        assert "cubin" in compiled.asm
        # What an sm_80 has for a block; consumer chips of that line have 99 KiB.
        assert compiled.metadata.shared <= (163 if capability == 80 else 227) * 1024
        if capability == 90:
            assert not unset_registers(compiled.asm["cubin"], tmp_path)


@pytest.mark.skipif(INTERPRETING, reason="does not compile")
@pytest.mark.parametrize("groups", [1, 4])
def test_odd_channels_compile_right(groups: int, tmp_path: Path) -> None:
    """Nothing is even that the compiler could use (once wrong, see configs.TABLE)."""
    from triton.backends.compiler import GPUTarget

    size, ones = (16, 16), (1, 1)
    g = Geometry(
        2, 5 * groups, 33 * groups, groups, groups, 1, size, size, (1, 3), ones, ones, ones
    )
    for dtype in (torch.float16, torch.bfloat16):
        key = (2, "native", False, 132)
        inverse = launch._inverse_launch(g, *key)
        parts = torch.float32 if inverse.grid[2] > 1 else dtype
        given, integer, single = (dtype, dtype), torch.int32, torch.float32
        for made, dtypes in (
            (inverse, (dtype, dtype, *given, None, integer, integer, parts)),
            (launch._gather_launch(g, *key), (dtype, dtype, *given, dtype, dtype)),
            (launch._weight_launch(g, *key)[0], (dtype, dtype, *given, single)),
            (launch._spread_launch(g, *key[:3], True, True, 132),
             (dtype, dtype, dtype, *given, *given, single)),
        ):  # fmt: skip
            compiled = made.compile(dtypes, GPUTarget("cuda", 90, 32))
            assert not unset_registers(compiled.asm["cubin"], tmp_path), made.constants


@pytest.mark.skipif(INTERPRETING, reason="does not compile")
def test_fits_into_shared_memory() -> None:
    """In fewer stages where a device has too little, as for three dimensions on an H200 (227 KiB),
    and for most others (99 KiB)."""
    from triton.backends.compiler import GPUTarget

    size, ones = (8, 8, 8), (1, 1, 1)
    g = Geometry(2, 192, 192, 1, 1, 1, size, size, (3, 3, 3), ones, ones, ones)
    made = launch._gather_launch(g, 2, "native", False, 132)
    dtypes = [torch.float16] * 5 + [torch.float32 if made.grid[1] > 1 else torch.float16]
    for capability, room in ((90, 227 << 10), (89, 99 << 10)):
        compiled = made.compile(dtypes, GPUTarget("cuda", capability, 32), room)
        assert compiled.metadata.shared <= room


@pytest.mark.skipif(INTERPRETING or hopper.gluon is None, reason="no Gluon to compile with")
@pytest.mark.parametrize("n", [1, 2, 3])
def test_compiles_for_hopper(n: int, tmp_path: Path) -> None:
    from triton.backends.compiler import GPUTarget

    size, kernel, ones = (16,) * n, (3,) * n, (1,) * n
    g = Geometry(2, 64, 128, 1, 1, 1, size, size, kernel, ones, ones, ones)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        given = (dtype, dtype)  # offset and mask
        along = hopper.along_launch(g, dtype, 132)
        outer = hopper.outer_launch(g, dtype, 132)
        assert outer is not None
        whole = hopper.gather_launch(g, dtype, False, 0)
        rows = hopper.gather_launch(g, dtype, True, 0)
        parts = hopper.gather_launch(g._replace(image_channels=128), dtype, False, 132)
        assert parts.grid[1] > 1 or n == 1
        inverse = [dtype, None, *given, dtype, torch.int32, torch.int32]
        kernels = [
            (whole, [dtype, None, *given, dtype, dtype]),
            (rows, [dtype, None, *given, None, dtype]),
            (parts, [dtype, None, *given, None, torch.float32]),
            (along, [dtype, dtype, None, *given, *given, None]),
            (along, [None, dtype, None, *given, None, None, torch.float32]),
            (outer[0], [dtype, None, *given, torch.float32]),
            (hopper.inverse_launch(g, dtype, False, 132), [*inverse, torch.float32]),
            (hopper.inverse_launch(g, dtype, False, 0), [*inverse, dtype]),
            (hopper.inverse_launch(g, dtype, True, 0), [*inverse, dtype]),
        ]
        if n == 2:
            wide = hopper.along_launch(g._replace(point_channels=512), dtype, 132)
            kernels.append((wide, [dtype, dtype, None, *given, *given, torch.float32]))
        for made, dtypes in kernels:
            if made.kernel == "inverse" and dtype == torch.float32:
                continue
            assert made is not None
            dtypes[made.descriptor.argument] = torch.bfloat16 if dtype == torch.float32 else dtype
            compiled = made.compile(dtypes, GPUTarget("cuda", 90, 32))
            assert "wgmma" in compiled.asm["ptx"]
            assert compiled.metadata.shared <= 227 * 1024
            # Pointers, a descriptor, integers, and scratch memory that is not used.
            sizes = _parameters(compiled.asm["ptx"])
            assert sizes.count(128) == 1 and set(sizes) == {4, 8, 128} and sizes[-2:] == [8, 8]
            if made.kernel not in ("along", "inverse"):
                assert stack(compiled.asm["cubin"], tmp_path) == 0  # nothing spilled
            if triton.__version__.startswith("3.6"):  # whose listings the checks are made for
                assert not unset_registers(compiled.asm["cubin"], tmp_path)
                if made.kernel == "outer":  # products wait in the loop and after it only
                    listing = cuobjdump("--dump-sass", compiled.asm["cubin"], tmp_path)
                    assert listing.count("WARPGROUP.DEPBAR") == 2


@pytest.mark.skipif(INTERPRETING or hopper.gluon is None, reason="no Gluon to compile with")
@pytest.mark.parametrize(
    ("n", "points", "offset_groups"), [(1, 128, 4), (2, 64, 16), (2, 128, 2), (3, 64, 8)]
)
def test_narrow_compiles_for_hopper(
    n: int, points: int, offset_groups: int, tmp_path: Path
) -> None:
    from triton.backends.compiler import GPUTarget

    size, kernel, ones = (16,) * n, (3,) * n, (1,) * n
    g = Geometry(
        2, 64, points, 1, offset_groups, offset_groups, size, size, kernel, ones, ones, ones
    )
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        given = (dtype, dtype)  # offset and mask
        half = torch.bfloat16 if dtype == torch.float32 else dtype
        gradients = hopper.gradients_narrow_launch(g, dtype, 132)
        single = torch.float32
        for made, dtypes in (
            (hopper.gather_narrow_launch(g, dtype, False, 0), [dtype, None, *given, None, dtype]),
            (gradients, [dtype, None, half, *given, *given, single, single]),
            (gradients, [dtype, None, half, *given, None, dtype, None, None]),
        ):
            assert made is not None
            dtypes[made.descriptor.argument] = half
            compiled = made.compile(dtypes, GPUTarget("cuda", 90, 32))
            assert "wgmma" in compiled.asm["ptx"]
            assert compiled.metadata.shared <= 114 * 1024  # so that there is room for two
            if triton.__version__.startswith("3.6"):
                # In three dimensions there are too many corners; else next to nothing is spilled.
                assert n == 3 or stack(compiled.asm["cubin"], tmp_path) <= 16
                assert not unset_registers(compiled.asm["cubin"], tmp_path)


def test_finds_unset_registers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The check above sees what it is for, as long as ptxas does it."""
    from triton.backends.compiler import GPUTarget

    if INTERPRETING or not triton.__version__.startswith("3.6"):
        pytest.skip("known of Triton 3.6")
    bad = configs.Row("inverse", 2, configs.ANY, 32, 64, 64, 4, 1)
    monkeypatch.setattr(configs, "TABLE", (bad, *configs.TABLE))
    forget()
    size, ones = (180, 320), (1, 1)
    g = Geometry(1, 64, 64, 1, 16, 16, size, size, (3, 3), ones, ones, ones)
    half, integer = torch.float16, torch.int32
    made = launch._inverse_launch(g, 2, "native", True, 132)
    dtypes = (half, half, half, half, None, integer, integer, half)
    compiled = made.compile(dtypes, GPUTarget("cuda", 90, 32))
    forget()
    assert unset_registers(compiled.asm["cubin"], tmp_path)


@pytest.mark.skipif(INTERPRETING, reason="does not compile")
def test_kernels_of_a_plan_load_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those that can be built are, though others cannot; and they come from disk another time,
    unless what that keeps of them is laid out otherwise."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no device")
    monkeypatch.setattr(compiled, "shared_memory", lambda: 227 << 10)
    monkeypatch.setattr(compiled, "Function", lambda *about: about)
    single, half = torch.float32, torch.float16
    g = Geometry(1, 4, 4, 1, 1, 1, (9, 9), (9, 9), (1, 1), (1, 1), (0, 0), (1, 1))
    good = [
        (launch._reduce_launch(4, (9, 64, 64), (1, 9, 576)), (single, None, half)),
        (launch._list_plan(g, False).launches[1], (torch.int32,)),
    ]
    bad = compiled.Launch("reduce", (1, 1, 1), good[0][0].integers, dict(INDEX=0, BLOCK=3), 4, 1)

    def load() -> None:
        monkeypatch.setattr(compiled, "_LOADED", {})
        failures = compiled.load([*good, (bad, (single, None, half))])
        assert list(failures) == [bad] and "'reduce' for no device" in str(failures[bad])
        functions = [made.load(dtypes)[0] for made, dtypes in good]
        assert [name for _, name, *_ in functions] == ["reduce", "starts"]
        assert [sizes[:2] for _, _, sizes, *_ in functions] == [[8, 8], [8, 4]]

    def refuse(*args: Any, **options: Any) -> Any:
        raise RuntimeError("compiles again")

    load()
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
    fields = [*compiled._About.__annotations__.items(), ("more", int)]
    monkeypatch.setattr(compiled, "_About", NamedTuple("_About", fields))
    monkeypatch.setattr(compiled, "_LOADED", {})
    with pytest.raises(RuntimeError, match="compiles again"):
        good[1][0].load(good[1][1])


@pytest.mark.skipif(INTERPRETING or hopper.gluon is None, reason="no Gluon")
def test_a_plan_without_what_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is said once, and the general kernel is in its place; of others it is an error. Nothing
    is loaded of a plan that takes too much memory, and so is written again in pieces."""
    case = Case((32, 30), (3, 3), image=64, points=64, batch=4)
    problem = case.make(torch.float16, "cpu")
    broken = {"outer"}
    loaded: list[bool] = []

    def load(plan: Plan) -> dict[Any, Exception]:
        loaded.append(len(sources(plan)) > 1)
        return {s: RuntimeError(s.kernel) for s, _ in plan.steps if s.kernel in broken}

    monkeypatch.setattr(hopper, "_on_hopper", lambda call: True)
    monkeypatch.setattr(hopper, "BROKEN", set())
    monkeypatch.setattr(Plan, "load", load)
    monkeypatch.setattr(Plan, "run", lambda plan, _: [s.kernel for s, _ in plan.steps])
    forget()
    split(monkeypatch, case)

    def kernels() -> set[str]:
        launch._PLANS.clear()
        given = (problem.x, problem.grad, problem.weight, problem.offset, problem.mask)
        wanted = (True, False, True, True, True, False, True)
        return set(launch._run(launch._plan_gradients, problem.g, *given, None, wanted))

    with pytest.warns(UserWarning, match="outer; a slower one"):
        found = kernels()
    assert {"weight_gradient", "along", "inverse", "prepare"} <= found
    assert "outer" not in found and "spread" not in found
    assert loaded == [True, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels() == found
    broken.add("starts")
    with pytest.raises(RuntimeError, match="starts"):
        kernels()
    forget()


# On a GPU


@pytest.fixture
def exact_float32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


GPU_CASES = [
    *INTERPRETED,
    *(dataclasses.replace(c, transposed=not c.transposed) for c in INTERPRETED),
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
]


@gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gpu_cases(case: Case, dtype: torch.dtype, exact_float32: None) -> None:
    # Offsets in float32: coordinates in half of these sizes are exact only nearly.
    check(case.make(dtype, "cuda", float_offset=True), *TOLERANCE[dtype])
    assert not hopper.BROKEN


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
    monkeypatch.setattr(layouts, "multiprocessors_of", lambda device: 4)
    launch._PLANS.clear()
    check(case.make(dtype, "cuda", float_offset=True), *TOLERANCE[dtype])
    if case.points == 64:
        torch.use_deterministic_algorithms(True)
        try:
            check(case.make(dtype, "cuda", float_offset=True), *TOLERANCE[dtype])
        finally:
            torch.use_deterministic_algorithms(False)
    assert not hopper.BROKEN


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
        *PIECES,
    ],
    ids=str,
)
def test_gpu_pieces(
    case: Case,
    dtype: torch.dtype,
    deterministic: bool,
    exact_float32: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if case.offset_groups == 16:  # so that few programs do not keep a gather from Hopper's kernel
        monkeypatch.setattr(layouts, "multiprocessors_of", lambda device: 4)
    split(monkeypatch, case)
    torch.use_deterministic_algorithms(deterministic)
    try:
        check(case.make(dtype, "cuda", float_offset=True), *TOLERANCE[dtype])
        if case.batch > 3 and case.image % 16 == 0:
            assert in_pieces()
    finally:
        torch.use_deterministic_algorithms(False)
        launch._PLANS.clear()
    assert not hopper.BROKEN


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
def test_gpu_random(n: int, part: int, dtype: torch.dtype, exact_float32: None) -> None:
    rng = random.Random(100 * n + part)
    for i in range(50):
        case = draw(rng, n)
        try:
            check(case.make(dtype, "cuda", seed=i, float_offset=i % 4 > 0), *TOLERANCE[dtype])
        except AssertionError as failure:
            raise AssertionError(f"{i}: {case}") from failure


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
    if not layouts.allows_tf32():
        pytest.skip("TF32 is off by default here")
    check(Case((9, 9), (3, 3), image=64, points=64).make(torch.float32, "cuda"), 2e-3, 2e-3)


@gpu
def test_gpu_float64_and_empty() -> None:
    problem = Case((5, 5), (3, 3)).make(torch.float64, "cuda")
    assert torch.equal(problem.forward(launch), problem.forward(reference))
    assert Case((5, 5), (3, 3), batch=0).make(torch.float16, "cuda").forward(launch).numel() == 0


@gpu
def test_gpu_needs() -> None:
    """Only what is asked for comes back."""
    problem = Case((9, 9), (3, 3)).make(torch.float16, "cuda")
    for i in range(5):
        needs = tuple(j == i for j in range(5))
        assert [x is not None for x in problem.backward(launch, needs)] == list(needs)


@gpu
@pytest.mark.parametrize("offset_groups", [1, 16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_gpu_deterministic(
    dtype: torch.dtype, offset_groups: int, transposed: bool, exact_float32: None
) -> None:
    """Bitwise the same results, also where very many samples crowd into one tile."""
    case = Case(
        (40, 40), (3, 3), transposed, image=64, points=64, offset_groups=offset_groups,
        mask_groups=offset_groups,
    )  # fmt: skip
    problem = case.make(dtype, "cuda", float_offset=True)
    assert problem.offset is not None
    problem.offset[1].sub_(torch.arange(40.0, device="cuda") - 3.3)
    torch.use_deterministic_algorithms(True)
    try:
        check(problem, *TOLERANCE[dtype])
        first = (problem.forward(launch), *problem.backward(launch))
        for _ in range(5):
            again = (problem.forward(launch), *problem.backward(launch))
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def run(step: Any, *tensors: Tensor | None) -> None:
    """A launch by itself."""
    device = next(t.device for t in tensors if t is not None)
    plan = Plan(device, tensors)
    plan.launch(step, *plan.given)
    plan.run(tensors)


@gpu
def test_gpu_lists() -> None:
    """The lists in order hold what those out of order hold, each list's samples in order."""
    size, slots = (181, 300), 18 * 23 * 38
    g = Geometry(1, 32, 32, 1, 2, 0, size, size, (3, 3), (1, 1), (1, 1), (1, 1))
    offset = 3 * torch.randn(1, 36, *size, device="cuda")
    offset[0, 3:9] -= torch.arange(300.0, device="cuda") - 3.3  # long lists
    found = []
    for ordered in (True, False):
        lists = torch.zeros(2 * slots + 1, dtype=torch.int32, device="cuda")
        entries = torch.full((18 * math.prod(size) * 4,), -1, dtype=torch.int32, device="cuda")
        count, starts, fill, order = launch._list_plan(g, ordered).launches
        run(count, offset, lists, None)
        run(starts, lists)
        run(fill, offset, lists, entries)
        if order is not None:
            run(order, offset, lists, entries)
        lengths, total, ends = lists.split([slots, 1, slots])
        assert (entries[:total] >= 0).all() and (entries[total:] == -1).all()
        order_of = torch.argsort(ends - lengths, stable=True)
        slot = torch.repeat_interleave(order_of, lengths[order_of].long())
        key = slot * math.prod(size) + entries[:total]
        if ordered:
            assert ((key[1:] > key[:-1]) | (slot[1:] != slot[:-1])).all()
        found.append((lengths, key.sort().values))
        assert lengths.max() > configs.LONG
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@gpu
@pytest.mark.parametrize("offset_groups", [1, 16])
def test_gpu_graph(offset_groups: int) -> None:
    """A CUDA graph captures a forward and a backward, and replays them on new values."""
    case = Case((20, 20), (3, 3), image=64, points=64, offset_groups=offset_groups)
    problem = case.make(torch.float16, "cuda")
    problem.forward(launch), problem.backward(launch)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = (problem.forward(launch), *problem.backward(launch))
    problem.x.copy_(torch.randn_like(problem.x))
    graph.replay()
    exact = problem.double()
    expected = (exact.forward(reference), *exact.backward(reference))
    for got, want in zip(captured, expected, strict=True):
        assert error(got, want) <= 2e-3


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
    got = launch.gather(g, image, weight, offset, None, None)[..., -64:]
    part = SimpleNamespace(image=image[..., -65:].double(), offset=offset[..., -65:].double())
    small = g._replace(image_size=(65,), point_size=(65,))
    want = reference.gather(small, part.image, weight.double(), part.offset, None, None)[..., 1:]
    assert error(got, want) <= 1e-3
    points = torch.zeros(1, 16, *size, device="cuda", dtype=torch.float16)
    points[..., -64:] = torch.randn(16, 64, device="cuda")
    got = launch.scatter(g, points, weight, offset, None, None)[..., -60:]
    want = reference.scatter(
        small, points[..., -65:].double(), weight.double(), part.offset, None, None
    )[..., -60:]
    assert error(got, want) <= 1e-3
