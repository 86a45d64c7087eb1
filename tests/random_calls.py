"""Random calls of the operators against the float64 reference, for every backend.

One generator, `draw`, serves them all: channels of every residue, groups of every kind, batches,
sizes from 1, kernels, strides, dilations, dtypes (offset and mask of another one), layouts, absent
arguments, gradients that are not asked for. tests/test_random.py runs a few hundred calls; by hand

    python tests/random_calls.py cpu --calls 5000
    python tests/random_calls.py compiled --calls 200
    python tests/random_calls.py interpreter --calls 2000     (with Triton; no GPU)
    python tests/random_calls.py gpu --calls 5000             (portable: without Hopper's kernels)

runs as many as wanted, in several processes, and prints each call that is wrong, with the seed and
the number by which `run` finds it again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import math
import multiprocessing
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cases import NAMES, Case
from deformnd import bench
from deformnd.kernels import cpu, reference
from deformnd.kernels.geometry import FAMILIES, Geometry, memory_format

Tensors = dict[str, Tensor | None]

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32, torch.float64)
LAYOUTS = ("contiguous", "last", "slice", "unaligned", "expanded")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a backend's calls may be like."""

    dtypes: tuple[torch.dtype, ...]
    other_dtypes: tuple[torch.dtype, ...]  # of offset and mask
    work: float  # the most products of a forward
    pixels: int  # the most pixels of an image
    hopper: bool = False  # whether to draw numbers of channels that Hopper's kernels take
    steps: float = math.inf  # the most runs of an inner loop, see _steps
    ranks: tuple[int, ...] = (1, 2, 2, 3)


CPU = Limits(FLOATS, FLOATS, 2e6, 2000)
COMPILED = Limits((torch.float32, torch.float64), FLOATS[2:], 2e5, 300)
INTERPRETER = Limits(FLOATS[:3], FLOATS[:3], 3e5, 150, steps=50)
GPU = Limits(FLOATS[:3], FLOATS[:3], 3e8, 3000, hopper=True)
FAMILY = {family.name: family for family in FAMILIES}


@dataclasses.dataclass(frozen=True)
class RandomCall:
    case: Case
    dtype: torch.dtype
    offset_dtype: torch.dtype
    mask_dtype: torch.dtype
    layouts: tuple[str, ...]  # of input, weight, offset, mask, bias, grad_output
    needs: tuple[bool, ...]  # the gradients by NAMES that are asked for
    far: bool = False  # offsets that leave the image
    deterministic: bool = False
    pieces: bool = False  # the batch in pieces, on GPUs
    sorts: bool = False  # the image gradient of half numbers from sorted lists, on GPUs
    lots: bool = False  # few columns at a time, as where memory is short, on GPUs
    tf32: bool = False
    seed: int = 0
    threads: tuple[int, ...] = (0, 1, 2, 3, 16)  # of which run_cpu picks one

    def tensors(self, device: str = "cpu") -> Tensors:
        """The call's tensors and grad_output. Memory between the elements of a slice holds NaN."""
        case = self.case
        values = dict.fromkeys(NAMES) | case.tensors(seed=self.seed)
        generator = torch.Generator().manual_seed(self.seed + 1)
        if self.far and values["offset"] is not None:
            shape = values["offset"].shape
            whole = torch.randint(-24, 24, shape, generator=generator)
            # Quarters are exact in every dtype, and these are no integers.
            values["offset"] = whole + torch.randint(1, 4, shape, generator=generator) / 4
        values["grad_output"] = torch.randn(
            case.batch, case.channels[1], *case.output_size, generator=generator
        )
        dtypes = dict(offset=self.offset_dtype, mask=self.mask_dtype)
        return {
            name: None
            if t is None
            else laid_out(t.to(device, dtypes.get(name, self.dtype)), layout)
            for (name, t), layout in zip(values.items(), self.layouts, strict=True)
        }

    def geometry(self, t: Tensors) -> Geometry:
        family = FAMILY[self.case.family]
        args = family.own([t[name] for name in NAMES])
        return family.geometry(*args, *self.case.operator_parameters())

    def call(self, t: Tensors) -> Tensor:
        """Call the public function with those of the tensors that it takes."""
        names = FAMILY[self.case.family].own(NAMES)
        return self.case.call({name: t[name] for name in names})


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values in another layout."""
    if layout == "last" and t.dim() > 2:
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "slice":
        room = t.new_full((*t.shape[:-1], t.shape[-1] + 3), math.nan)
        room[..., 1:-2] = t
        return room[..., 1:-2]
    if layout == "unaligned":
        room = t.new_full((t.numel() + 1,), math.nan)
        room[1:] = t.flatten()
        return room[1:].view(t.shape)
    if layout == "expanded" and t.dim() > 1:
        return t[:1].expand(t.shape)
    return t.contiguous()


def by_backend(call: RandomCall, t: Tensors, backend: Any) -> Tensors:
    """The output and the gradients, by a backend's own functions."""
    g = call.geometry(t)
    x, weight, offset, mask, bias, grad = t.values()
    forward = backend.scatter if call.case.transposed else backend.gather
    output = forward(g, x, weight, offset, mask, bias)
    image, points = (grad, x) if call.case.transposed else (x, grad)
    by_x, by_weight, by_offset, by_mask, by_bias = call.needs
    by_both = (False, by_x) if call.case.transposed else (by_x, False)
    grads = backend.gradients(
        g, image, points, weight, offset, mask, (*by_both, by_weight, by_offset, by_mask),
        grad if by_bias and bias is not None else None,
    )  # fmt: skip
    return dict(
        output=output, **dict(zip(NAMES, (grads[call.case.transposed], *grads[2:]), strict=True))
    )


def by_function(
    call: RandomCall, t: Tensors, function: Callable[[Tensors], Tensor] | None = None
) -> Tensors:
    """The output and the gradients, by the public function and autograd."""
    leaves: Tensors = {}
    for name, need in zip(NAMES, call.needs, strict=True):
        value = t[name]
        leaves[name] = None if value is None else value.detach().requires_grad_(need)
    wanted = {
        name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad
    }
    output = (function or call.call)(leaves)
    grads: Tensors = dict.fromkeys(NAMES)
    if wanted:
        found = torch.autograd.grad(output, list(wanted.values()), t["grad_output"])
        grads |= dict(zip(wanted, found, strict=True))
    return dict(output=output.detach(), **grads)


def exact(call: RandomCall, t: Tensors) -> Tensors:
    """The output and the gradients, by the reference in float64."""
    return by_backend(call, {k: v if v is None else v.double() for k, v in t.items()}, reference)


# The largest relative L2 errors of output and gradients.
TOLERANCE = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 1e-5),
    torch.float16: (4e-4, 2e-3),
    torch.bfloat16: (3e-3, 1e-2),
}
TF32 = (2e-3, 2e-3)


def check(call: RandomCall, got: Tensors, t: Tensors) -> None:
    """Check of every result whether it should be there, its dtype, shape, layout and values."""
    want = exact(call, t)
    for name, expected in want.items():
        actual = got[name]
        like = t["input" if name == "output" else name]
        if expected is None or (name != "output" and not call.needs[NAMES.index(name)]):
            assert actual is None, f"{name} is there"
            continue
        assert actual is not None and like is not None, f"{name} is missing"
        assert actual.dtype == like.dtype and actual.shape == expected.shape, name
        # Output and input gradient take over the input's layout if it is one of these two.
        if name in ("output", "input") and like.is_contiguous(memory_format=memory_format(like)):
            same = memory_format(actual) == memory_format(like)
            assert same or 1 in actual.shape or 1 in like.shape, name
        coarsest = max(
            (t[n].dtype for n in ("input", name) if t.get(n) is not None),
            key=lambda dtype: torch.finfo(dtype).eps,
        )
        limits = TF32 if call.tf32 and coarsest == torch.float32 else TOLERANCE[coarsest]
        limit = limits[name != "output"]

        def again(generator: torch.Generator, name: str = name, size: float = limits[0]) -> Any:
            factors = {k: v for k, v in t.items() if v is not None and k != "offset"}
            other = {k: moved(v, size / 2, generator) for k, v in factors.items()}
            return exact(call, {**t, **other})[name]

        right = close(actual, expected, limit, again)
        norm = expected.norm().item() or 1.0
        assert right, f"{name} errs by {(actual.double() - expected).norm().item() / norm:.2e}"


def close(
    actual: Tensor,
    expected: Tensor,
    limit: float,
    again: Callable[[torch.Generator], Tensor] | None = None,
) -> bool:
    """Whether a result is within a limit, relative to the norm, of what is expected.

    More is allowed where few numbers make up most of the norm, because their errors do not average
    out: a single half number is rounded by up to 4.9e-4. Equal numbers have equal errors and count
    as one: those that only a bias makes, or an expanded factor. More is allowed, too, where terms
    cancel, because products round their factors: `again` computes the result once more from factors
    that are changed by half the limit, or so. If that changes the result by more than twice the
    limit, four times as much is allowed.
    """
    distance = (actual.double() - expected).norm().item()
    values, counts = expected.float().unique(return_counts=True)
    squares = counts * values.double().square()
    norm = math.sqrt(squares.sum().item())
    if distance <= limit * (norm + 4 * squares.norm().item() / (norm or 1.0)):
        return True
    if again is None:
        return False
    generator = torch.Generator().manual_seed(0)
    changes = [(again(generator) - expected).norm().item() for _ in range(4)]
    change = math.sqrt(sum(c * c for c in changes) / 4)
    return change > 2 * limit * norm and distance <= 4 * change


def moved(x: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """Every number changed by a relative `size`, or so."""
    return x.double() * (1 + size * torch.randn(x.shape, generator=generator).to(x.device))


# The generator


def draw(rng: random.Random, limits: Limits, like: RandomCall | None = None) -> RandomCall:
    """Draw a call. If `like` another one, it needs nearly the same compiled kernels."""
    while True:
        n = like.case.n if like else rng.choice(limits.ranks)
        kind = _kind(like) if like else _draw_kind(rng, limits, n)
        case = _draw_case(rng, limits, n, kind)
        if case is not None:
            break
    if like is not None:
        return dataclasses.replace(
            like, case=case, far=rng.random() < 0.2, seed=rng.randrange(1 << 30),
            deterministic=rng.random() < 0.3, pieces=rng.random() < 0.15,
            sorts=rng.random() < 0.3, lots=rng.random() < 0.3,
        )  # fmt: skip
    dtype = rng.choice(limits.dtypes)
    others = [dtype if rng.random() < 0.5 else rng.choice(limits.other_dtypes) for _ in range(2)]
    usual = rng.choice(LAYOUTS[:2])
    layouts = tuple(usual if rng.random() < 0.8 else rng.choice(LAYOUTS) for _ in range(6))
    needs = (True,) * 5 if rng.random() < 0.6 else tuple(rng.random() < 0.5 for _ in range(5))
    return RandomCall(
        case, dtype, others[0], others[1], layouts, needs, rng.random() < 0.2,
        rng.random() < 0.3, rng.random() < 0.15, rng.random() < 0.3, rng.random() < 0.3,
        dtype == torch.float32 and rng.random() < 0.1,
        rng.randrange(1 << 30),
    )  # fmt: skip


def _kind(call: RandomCall) -> tuple[Any, ...]:
    c = call.case
    image, points = c.channels[::-1] if c.transposed else c.channels
    groups = c.groups, c.offset_groups, c.mask_groups
    return c.transposed, image, points, *groups, c.bias, c.aggregate


def _draw_kind(rng: random.Random, limits: Limits, n: int) -> tuple[Any, ...]:
    """Family, channels, groups and whether there is a bias; whether it aggregates."""

    def channels() -> int:
        if rng.random() < 0.75:
            return rng.randint(1, 40)
        return rng.choice((48, 56, 64, 72, 96, 100, 128, 132, 144, 160, 192, 256, 320))

    def divisor(number: int) -> int:
        return rng.choice([d for d in range(1, number + 1) if number % d == 0])

    more = ["hopper"] * limits.hopper
    style = rng.choice(("one", "one", "few", "units", "groups", "depthwise", *more, "aggregate"))
    image, points, groups = channels(), channels(), 1
    offset_groups = mask_groups = 1
    if style == "hopper":
        image = 32 * rng.choice((1, 2, 2, 3, 4, 6, 8))
        points = 64 * rng.choice((1, 1, 2, 3, 4))
        several = rng.random()
        if several < 0.5:
            offset_groups = image // rng.choice((4, 8, 16, 32))
            mask_groups = rng.choice((offset_groups, 1, divisor(image)))
        elif several < 0.65:  # Groups have many channels each.
            offset_groups = rng.choice((2, 2, 3, 4))
            image = offset_groups * rng.choice((40, 48, 64, 64, 80, 96, 128))
            mask_groups = rng.choice((offset_groups, offset_groups, 1))
    elif style == "few":
        points, offset_groups = rng.randint(1, 4), rng.choice((1, 1, divisor(image)))
        mask_groups = rng.choice((1, offset_groups))
    elif style == "units":
        offset_groups, mask_groups = divisor(image), divisor(image)
    elif style == "groups":
        groups = rng.choice((2, 2, 3, 4, 5, 6, 8))
        least, most = rng.choice(((1, 34), (1, 34), (32, 80)))
        image, points = (groups * rng.randint(least, most) for _ in range(2))
        offset_groups, mask_groups = divisor(image), divisor(image)
        if rng.random() < 0.5:
            offset_groups = mask_groups = rng.choice((1, groups))
    elif style in ("depthwise", "aggregate"):
        groups, points = image, image * rng.choice((1, 1, 2, 3) if style == "depthwise" else (1,))
        offset_groups = rng.choice((1, 1, image, divisor(image)))
        mask_groups = rng.choice((1, offset_groups, divisor(image)))
    absent = rng.random()
    if absent < 0.1:
        offset_groups = 0
    elif absent < 0.3:
        mask_groups = 0
    all_groups = groups, offset_groups, mask_groups
    if style == "aggregate":
        return False, image, points, *all_groups, False, True
    return rng.random() < 0.5, image, points, *all_groups, rng.random() < 0.6, False


def _draw_case(rng: random.Random, limits: Limits, n: int, kind: tuple[Any, ...]) -> Case | None:
    transposed, image, points, groups, offset_groups, mask_groups, bias, aggregate = kind
    for _ in range(50):
        if rng.random() < 0.4:
            kernel = (3,) * n
        else:
            most = {1: (7,), 2: (5, 5), 3: (4, 5, 4)}[n]
            kernel = tuple(rng.randint(1, k) for k in most)
        longest = max(1, round(limits.pixels ** (1 / n)))
        case = Case(
            size=tuple(rng.randint(1, 1 if rng.random() < 0.05 else longest) for _ in range(n)),
            kernel=kernel,
            transposed=transposed,
            batch=rng.choice((1, 2, 2, 3, 4, 5)),
            channels=(points, image) if transposed else (image, points),
            stride=_axes(rng, n, (1, 1, 1, 2, 3)),
            padding=_axes(rng, n, (0, 1, 1, 2, 4)),
            dilation=_axes(rng, n, (1, 1, 1, 2, 3)),
            groups=groups,
            offset_groups=offset_groups,
            mask_groups=mask_groups,
            bias=bias,
            aggregate=aggregate,
        )
        if transposed:
            extra = tuple(
                rng.randint(0, max(s, d) - 1) if rng.random() < 0.5 else 0
                for s, d in zip(case.values("stride"), case.values("dilation"), strict=True)
            )
            case = dataclasses.replace(case, output_padding=extra)
        sizes = (case.output_size, case.point_size)
        if min(map(min, sizes)) < 1 or max(map(math.prod, sizes)) > 4 * limits.pixels:
            continue
        work = case.batch * math.prod(case.point_size) * math.prod(kernel)
        if work * image * points / groups > limits.work or work * image > limits.work:
            continue
        if limits.steps == math.inf or _steps(case, image, points) <= limits.steps:
            return case
    return None


def _steps(case: Case, image: int, points: int) -> float:
    """About how often a kernel's inner loop runs, each of which takes long in the interpreter."""
    groups = [max(g, 1) for g in (case.offset_groups, case.mask_groups)]
    unit = math.gcd(*(image // g for g in groups))
    number, taps = image // unit, math.prod(case.kernel)
    together = max(1, 32 // (1 << (unit - 1).bit_length())) if unit <= (32, 16)[number == 1] else 1
    blocks = math.ceil(math.prod(case.point_size) / 64) * math.ceil(points / case.groups / 64)
    samples = math.ceil(taps * number / together) * math.ceil(unit / 32)
    image_size = case.output_size if case.transposed else case.size
    lists = number * math.ceil(math.prod(image_size) / 64) * taps  # those of sorted samples
    return case.batch * (blocks * samples * 2**case.n + 2 * lists)


def _axes(rng: random.Random, n: int, values: tuple[int, ...]) -> tuple[int, ...]:
    return (rng.choice(values),) * n if rng.random() < 0.5 else tuple(rng.choices(values, k=n))


# The backends


@contextlib.contextmanager
def patched(owner: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make torch.empty, or a function like it, return memory that holds NaN."""

    def function(*args: Any, **options: Any) -> Tensor:
        t = make(*args, **options)
        return t.fill_(math.nan) if t.is_floating_point() else t

    return function


@contextlib.contextmanager
def poison() -> Iterator[None]:
    with patched(torch, empty=poisoned(torch.empty), empty_strided=poisoned(torch.empty_strided)):
        yield


def spoil_workspace() -> None:
    """Leave NaN in the memory that the core's threads keep between calls."""
    g = Geometry(2, 24, 24, 1, 1, 1, (20, 20), (20, 20), (3, 3), (1, 1), (1, 1), (1, 1))
    t = [torch.full(s, math.nan) for s in ((2, 24, 20, 20), (24, 24, 3, 3), (2, 9, 20, 20))]
    offset = torch.zeros(2, 18, 20, 20)
    cpu.gradients(g, t[0], t[0], t[1], offset, t[2], (True,) * 5)


def run_cpu(call: RandomCall, rng: random.Random) -> None:
    """Check the C++ core, at a random level of instructions and number of threads."""
    t = call.tensors()
    levels = range(-1, min(cpu.best_level(), 4 if call.dtype == torch.bfloat16 else 2) + 1)
    with patched(cpu, level=rng.choice(levels), threads=rng.choice(call.threads)):
        if rng.random() < 0.3:
            spoil_workspace()
        with poison():
            got = by_function(call, t) if rng.random() < 0.5 else by_backend(call, t, cpu)
        try:
            check(call, got, t)
        except AssertionError as error:
            raise AssertionError(f"{error} (level {cpu.level}, {cpu.threads} threads)") from None


def run_compiled(call: RandomCall, rng: random.Random) -> None:
    """Check the public function under torch.compile, with sizes that are symbols or are not."""
    t = call.tensors()
    torch._dynamo.reset()
    function = torch.compile(call.call, fullgraph=True, dynamic=rng.choice((None, True)))
    with poison():
        got = by_function(call, t, function)
    check(call, got, t)


@contextlib.contextmanager
def on_gpu(call: RandomCall, **other: Any) -> Iterator[ModuleType]:
    """The GPU backend, set up for the call, with `other` values in tiles.py."""
    from deformnd.kernels import gpu
    from deformnd.kernels.gpu import tiles

    before = torch.backends.cudnn.allow_tf32, torch.are_deterministic_algorithms_enabled()
    torch.backends.cudnn.allow_tf32 = call.tf32
    torch.use_deterministic_algorithms(call.deterministic)
    try:
        if call.pieces:
            other |= dict(CHUNK=2 * math.prod(call.case.point_size), SCRATCH=1)
        if call.sorts:
            other |= dict(ADDED=0, ADDED_BY_BLOCKS=0, ADDED_DEPTHWISE=0, SORTED_CHANNELS=0)
        if call.lots:
            other |= dict(COLUMNS_AT_ONCE=1, SHARE=0)
        if other:
            gpu._PLANS.clear()
            with patched(tiles, **other):
                yield gpu
            gpu._PLANS.clear()
        else:
            yield gpu
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.use_deterministic_algorithms(before[1])


def run_interpreter(call: RandomCall, rng: random.Random) -> None:
    """Check the GPU kernels in Triton's interpreter, which poisons memory itself (see Plan). Some
    calls are planned for a GPU with many multiprocessors, for which most sums are split."""
    from deformnd.kernels.gpu import tiles

    t = call.tensors()
    large = tiles.Device("interpreter", 132, 228 << 10)
    other = dict(device_of=lambda _: large) if rng.random() < 0.3 else {}
    with on_gpu(call, **other) as backend:
        got = by_backend(call, t, backend)
    check(call, got, t)


def run_gpu(call: RandomCall, rng: random.Random) -> None:
    from deformnd.kernels.gpu import runtime

    t = call.tensors("cuda")

    def storage(size: int, device: torch.device) -> Any:
        return torch.full((size,), 255, dtype=torch.uint8, device=device).untyped_storage()

    # Some calls are made twice, so that the second one may be launched as a graph.
    others: dict[str, Any] = dict(REPEATED=0) if rng.random() < 0.3 else {}
    others |= dict(_storage=storage, _empty_on_cuda=None)
    with on_gpu(call) as backend, poison(), patched(runtime, **others):
        by = by_function if rng.random() < 0.5 else functools.partial(by_backend, backend=backend)
        if "REPEATED" in others:
            by(call, t)
        got = by(call, t)
    check(call, got, t)


def prepare_interpreter() -> None:
    """Make Triton's interpreter faster, and round as the hardware does. By itself it multiplies
    bfloat16 numbers as integers, truncates numbers to bfloat16, and rounds an fma's product.

    It takes a third of the time if it patches Triton's language once for a kernel, and not for
    every function that a kernel calls, sorts by NumPy, and leaves out the check of overflows, whose
    result nobody sees. This holds for the whole process; a second call changes nothing.
    """
    import numpy as np
    import triton
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_dot
    if getattr(original, "widens", False):
        return

    def create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        def widen(x: Any) -> Any:
            if x.dtype != triton.language.bfloat16:
                return x
            bits = x.data.astype(np.uint32) << 16
            return interpreter.TensorHandle(bits.view(np.float32), triton.language.float32)

        return original(self, widen(a), widen(b), *args)

    create_dot.widens = True
    interpreter.InterpreterBuilder.create_dot = create_dot

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        assert x.dtype != triton.language.bfloat16, "these are integers here"
        with np.errstate(over="ignore", invalid="ignore"):
            # float64 holds every product of float32 numbers
            data = x.data.astype(np.float64) * y.data + z.data
            return interpreter.TensorHandle(data.astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma
    convert = interpreter._convert_float

    def rounded(x: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (triton.language.float32, triton.language.bfloat16):
            return convert(x, source, target, mode)
        return _nearest_bfloat16(np.ascontiguousarray(x).view(np.uint32))

    interpreter._convert_float = rounded
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    call = interpreter.InterpretedFunction.__call__
    patched: set[str] = set()

    def fast(self: Any, *args: Any, **options: Any) -> Any:
        if self is triton.language.sort:
            (x,) = args
            data = np.sort(x.handle.data, axis=-1)
            return triton.language.tensor(interpreter.TensorHandle(data, x.handle.dtype), x.type)
        module = self.fn.__module__
        if module.startswith("deformnd") or module in patched:
            return self.rewrite()(*args, **options)
        patched.add(module)  # This patch stays, unlike those that a kernel makes.
        return call(self, *args, **options)

    interpreter.InterpretedFunction.__call__ = fast


def _nearest_bfloat16(bits: Any) -> Any:
    """The bits of the nearest bfloat16 numbers, ties to even, of those of float32 numbers."""
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return nearest.astype("uint16") * ~nan + nan.astype("uint16") * 0x7FC0


RUNS: dict[str, tuple[Limits, Callable[[RandomCall, random.Random], None]]] = {
    "cpu": (CPU, run_cpu),
    "compiled": (COMPILED, run_compiled),
    "interpreter": (INTERPRETER, run_interpreter),
    "gpu": (GPU, run_gpu),
    "portable": (GPU, run_gpu),
}
# How many calls are alike, since kernels are compiled for each kind of call.
ALIKE = {"gpu": 16, "portable": 16}


def calls(
    backend: str, seed: str, count: int, rank: int | None = None, threads: int | None = None
) -> Iterator[RandomCall]:
    """Draw calls without end, of any rank and number of threads, or of the given one."""
    limits, _ = RUNS[backend]
    if rank is not None:
        limits = dataclasses.replace(limits, ranks=(rank,))
    rng = random.Random(seed)
    alike = ALIKE.get(backend, 1)
    first = None
    for i in range(count):
        call = draw(rng, limits, first if i % alike else None)
        if threads is not None:
            call = dataclasses.replace(call, threads=(threads,))
        if i % alike == 0:
            first = call
        yield call


def run(
    backend: str,
    seed: str,
    count: int,
    rank: int | None = None,
    threads: int | None = None,
    stop: float = math.inf,
    first: bool = False,
) -> tuple[int, list[str]]:
    """Run calls until the time `stop`, or to the `first` wrong one.

    Returns how many ran, and for each wrong one what is wrong.
    """
    prepare(backend)
    wrong, done = [], 0
    for i, call in enumerate(calls(backend, seed, count, rank, threads)):
        if time.time() > stop or (first and wrong):
            break
        try:
            RUNS[backend][1](call, random.Random(f"{seed} {i}"))
        except Exception as error:
            kind = "" if isinstance(error, AssertionError) else type(error).__name__ + ": "
            wrong.append(f"{kind}{str(error)[:2000]}\n    seed {seed!r}, call {i}: {call}")
            if kind:
                wrong[-1] += "\n" + traceback.format_exc(limit=-4)
        done += 1
    return done, wrong


def prepare(backend: str) -> None:
    if backend == "interpreter":
        prepare_interpreter()
    elif backend == "portable":
        bench.without_hopper()


def _part(args: tuple[Any, ...]) -> tuple[int, list[str]]:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args[-1]))
    return run(*args[:-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("backend", choices=RUNS)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--rank", type=int, choices=(1, 2, 3), help="otherwise all")
    parser.add_argument("--threads", type=int, help="of each call on CPUs, otherwise some")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=math.inf, help="no new call after these")
    parser.add_argument("--first", action="store_true", help="no new call after a wrong one")
    args = parser.parse_args()
    if args.backend == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    parts = max(args.processes, math.ceil(args.calls / 100))
    each, stop = math.ceil(args.calls / parts), time.time() + args.seconds
    tasks = [
        (
            args.backend, f"{args.seed}.{i}", each, args.rank, args.threads, stop, args.first,
            args.processes,
        )
        for i in range(parts)
    ]  # fmt: skip
    start, done, wrong = time.monotonic(), 0, 0
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=spawn) as pool:
        for part in as_completed([pool.submit(_part, task) for task in tasks]):
            try:
                some, errors = part.result()
            except BrokenExecutor as crash:
                some, errors = 0, [f"a process crashed: {crash}"]
            done, wrong = done + some, wrong + len(errors)
            for error in errors:
                print(error, flush=True)
            if sys.stderr.isatty():
                print(f"{done} calls, {wrong} wrong", end="\r", file=sys.stderr)
    print(f"{args.backend}: {done} calls, {wrong} wrong, {time.monotonic() - start:.0f} s")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
