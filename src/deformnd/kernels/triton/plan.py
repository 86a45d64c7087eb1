"""Kernel launches and their memory, recorded once for calls alike and then run for each.

On the host a call costs what it takes to allocate its results, one block of scratch memory, and to
hand the driver a list of launches whose arguments are made already but for the addresses.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .compiled import INTERPRETED, Launch, load
from .driver import TENSOR_MAP, Invocation, Side, TensorMap

_ALIGNMENT = 256  # bytes, of a piece of scratch memory


class Slot(NamedTuple):
    """A tensor that there is when a plan runs: given, returned, or scratch memory."""

    kind: int  # which of the three
    number: int  # among those
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0  # bytes before it, if it is a part

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def part(self, first: int, count: int) -> Slot:
        """Items of the first axis, which no layout moves."""
        item = math.prod(self.shape[1:]) * self.dtype.itemsize
        shape = (count, *self.shape[1:])
        return self._replace(shape=shape, start=self.start + first * item)


GIVEN, RETURNED, SCRATCH, PART = range(4)


class _Result(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...]  # the memory format, in the words of the cheapest call that makes it


class Job(NamedTuple):
    """A part of the kernel `prepare`: the arguments of one sum, copy, packing or zeros."""

    kind: str  # "sum", "copy", "pack" or "zero"
    slots: tuple[Slot | None, ...]
    sizes: tuple[Any, ...]  # the first is the number of programs
    constants: tuple[Any, ...] = ()


class _First:
    """Jobs for one launch of `prepare`."""

    def __init__(self) -> None:
        self.jobs: dict[str, list[Job]] = {"sum": [], "copy": [], "pack": [], "zero": []}

    def takes(self, job: Job) -> bool:
        same = self.jobs[job.kind]
        if job.kind in ("sum", "zero") or not same:
            return not same
        if job.kind == "copy":  # only the first may have a bias
            return len(same) < 2 and job.slots[2] is None
        return len(same) < 2 and job.slots[0] == same[0].slots[0]

    def launch(self) -> tuple[Launch, tuple[Slot | None, ...]]:
        nothing = Job("", (None,) * 3, (0,))
        sums, copies, packs, zeros = ([*jobs, nothing, nothing][:2] for jobs in self.jobs.values())
        slots = (
            *sums[0].slots[:2],
            *copies[0].slots,
            *copies[1].slots[:2],
            *packs[0].slots[:2],
            packs[1].slots[1],
            zeros[0].slots[0],
        )
        sizes = tuple(job.sizes for job in (sums[0], *copies, *packs, zeros[0]))
        constants = dict(
            SUM=sums[0].constants,
            COPY=copies[0].constants,
            SECOND_COPY=copies[1].constants,
            PACK=packs[0].constants,
            SECOND_PACK=packs[1].constants,
            BLOCK=ZEROS,
        )
        programs = sum(size[0] for size in sizes)
        return Launch("prepare", (programs, 1, 1), sizes, constants, 4, 1), slots


ZEROS = 4096  # that a program writes


class Plan:
    """What a call does, for all calls with tensors of these sizes, dtypes and layouts.

    A frame is a part of the plan whose scratch memory later parts may use again.
    """

    def __init__(self, device: torch.device, given: Sequence[Tensor | None]) -> None:
        self.device = device
        self.given: list[Slot | None] = []
        for t in given:
            number = sum(s is not None for s in self.given)
            self.given.append(None if t is None else Slot(GIVEN, number, t.dtype, tuple(t.shape)))
        self.clear()

    def clear(self) -> None:
        """Start anew."""
        self.results: list[_Result] = []
        self.offsets: list[int] = []  # of the scratch slots, in bytes
        self.size = 0  # of all scratch memory
        self._top = 0
        self.steps: list[tuple[Launch, tuple[Slot | None, ...]]] = []
        self.asides: set[int] = set()  # the numbers of steps beside others
        self.joins: set[int] = set()  # and of those that wait for them
        self._then: list[tuple[Launch, tuple[Slot | None, ...], bool]] = []
        self._last: list[tuple[Launch, tuple[Slot | None, ...]]] = []
        self._first = _First()
        self._idle: list[_Instance] = []  # those that no thread runs now

    def result(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        form: torch.memory_format = torch.contiguous_format,
    ) -> Slot:
        strides = torch.empty(shape, memory_format=form, device="meta").stride()
        self.results.append(_Result(tuple(shape), dtype, strides))
        return Slot(RETURNED, len(self.results) - 1, dtype, tuple(shape))

    def scratch(self, *shape: int, dtype: torch.dtype) -> Slot:
        self.offsets.append(self._top)
        size = math.prod(shape) * dtype.itemsize
        self._top += -(-size // _ALIGNMENT) * _ALIGNMENT
        self.size = max(self.size, self._top)
        return Slot(SCRATCH, len(self.offsets) - 1, dtype, shape)

    @contextlib.contextmanager
    def frame(self) -> Iterator[None]:
        top = self._top
        yield
        self.flush()
        self._top = top

    def launch(self, launch: Launch, *slots: Slot | None) -> None:
        self.flush()
        self.steps.append((launch, slots))

    def then(self, launch: Launch, *slots: Slot | None, aside: bool = False) -> None:
        """A launch after what is to be done before the next one; aside: while others go on, until
        `join`, so that memory of frames in between is not for it."""
        self._then.append((launch, slots, aside))

    def join(self) -> None:
        """What follows waits for what is aside."""
        self.flush()
        self.joins.add(len(self.steps))

    def last(self, launch: Launch, *slots: Slot | None) -> None:
        """Something to be done when all else is."""
        self._last.append((launch, slots))

    def finish(self) -> None:
        """All is written."""
        self.flush()
        self.steps += self._last

    def first(self, job: Job) -> None:
        """Something to be done before the next launch, together with its like."""
        if not self._first.takes(job):
            self.flush()
        self._first.jobs[job.kind].append(job)

    def zero(self, slot: Slot) -> None:
        count = math.prod(slot.shape)
        self.first(Job("zero", (slot,), (-(-count // ZEROS), count)))

    def flush(self) -> None:
        if any(self._first.jobs.values()):
            self.steps.append(self._first.launch())
            self._first = _First()
        for launch, slots, aside in self._then:
            if aside:
                self.asides.add(len(self.steps))
            self.steps.append((launch, slots))
        self._then = []

    def load(self) -> dict[Launch, Exception]:
        """Load the kernels, all at once; those that cannot be, and why."""
        if INTERPRETED or torch.version.hip:
            return {}
        return load([(launch, _dtypes(slots)) for launch, slots in self.steps])

    def run(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        given = [t for t in tensors if t is not None]
        results = [
            torch.empty_strided(shape, strides, dtype=dtype, device=self.device)
            for shape, dtype, strides in self.results
        ]
        if INTERPRETED:
            self._interpret(given, results)
            return results
        memory = _storage(self.size, self.device)
        try:
            instance = self._idle.pop()
        except IndexError:
            instance = _Instance(self)
        instance.run(
            [t.data_ptr() for t in given], [t.data_ptr() for t in results], memory.data_ptr()
        )
        self._idle.append(instance)
        return results

    def _interpret(self, given: list[Tensor], results: list[Tensor]) -> None:
        memory = torch.full((self.size,), 255, dtype=torch.uint8)
        for t in results:
            t.fill_(math.nan)

        def tensor(slot: Slot | None) -> Tensor | None:
            if slot is None:
                return None
            if slot.kind != SCRATCH:
                whole = (given, results)[slot.kind][slot.number]
                items = math.prod(slot.shape[1:]) * slot.dtype.itemsize
                return whole[slot.start // items :] if slot.start else whole
            start = self.offsets[slot.number] + slot.start
            return memory[start : start + slot.size].view(slot.dtype).view(slot.shape)

        for launch, slots in self.steps:
            launch.interpret([tensor(s) for s in slots])


class _Instance:
    """A plan's launches with room for the addresses of one call."""

    def __init__(self, plan: Plan) -> None:
        given = sum(s is not None for s in plan.given)
        slots = [s for _, slots in plan.steps for s in slots if s is not None and s.start]
        self.parts = list(dict.fromkeys((s.kind, s.number, s.start) for s in slots))
        counts = (given, len(plan.results), len(plan.offsets), len(self.parts))
        self.words: list[Any] = [(ctypes.c_uint64 * n)() for n in counts]
        self.offsets = plan.offsets
        self.maps: list[tuple[TensorMap, int, int, int]] = []
        self.mapped: list[int] = []  # the addresses that they were last made for
        self.room: list[Any] = []
        self.calls = [self._bind(*step) for step in plan.steps]
        self.asides = set() if torch.version.hip else plan.asides
        self.forks = {i for i in self.asides if i - 1 not in self.asides}
        self.joins = plan.joins
        self.device = plan.device.index
        self.stream = _stream_of(plan.device)

    def run(self, given: list[int], results: list[int], memory: int) -> None:
        words = self.words
        words[GIVEN][:] = given
        words[RETURNED][:] = results
        words[SCRATCH][:] = [memory + offset for offset in self.offsets]
        if self.parts:
            words[PART][:] = [words[kind][number] + start for kind, number, start in self.parts]
        for i, (tensor_map, place, kind, number) in enumerate(self.maps):
            address = words[kind][number]
            if address != self.mapped[i]:
                tensor_map.encode(place, address)
                self.mapped[i] = address
        stream = self.stream()
        if not self.asides:
            for call in self.calls:
                call(stream)
            return
        side = Side.of(stream, self.device)
        for i, call in enumerate(self.calls):
            if i in self.forks:
                side.fork()
            if i in self.joins:
                side.join()
            call(side.stream if i in self.asides else stream)

    def _bind(self, launch: Launch, slots: Sequence[Slot | None]) -> Callable[[int], None]:
        dtypes = _dtypes(slots)
        if torch.version.hip:
            return self._bind_by_triton(launch, dtypes, slots)
        function, described = launch.load(dtypes)
        arguments: list[tuple[bool, int]] = []
        for i, slot in enumerate(slots):
            if slot is None:
                continue
            if launch.descriptor is not None and launch.descriptor.argument == i:
                tensor_map = TensorMap.of(described, slot.shape)
                arguments.append((True, self._room_for(tensor_map, slot)))
                strides = [math.prod(slot.shape[i + 1 :]) for i in range(len(slot.shape))]
                arguments += [(False, n) for n in (*slot.shape, *strides)]
            else:
                arguments.append((True, self._address_of(slot)))
        arguments += [(False, n) for n in _flat(launch.integers)]
        return Invocation(function, launch.grid, arguments)

    def _word_of(self, slot: Slot) -> tuple[int, int]:
        """Which word, of which kind, holds its address."""
        if not slot.start:
            return slot.kind, slot.number
        return PART, self.parts.index((slot.kind, slot.number, slot.start))

    def _address_of(self, slot: Slot) -> int:
        kind, number = self._word_of(slot)
        return ctypes.addressof(self.words[kind]) + 8 * number

    def _room_for(self, tensor_map: TensorMap, slot: Slot) -> int:
        room = ctypes.create_string_buffer(2 * TENSOR_MAP)
        place = -(-ctypes.addressof(room) // TENSOR_MAP) * TENSOR_MAP
        self.room.append(room)
        self.maps.append((tensor_map, place, *self._word_of(slot)))
        self.mapped.append(0)
        return place

    def _bind_by_triton(
        self, launch: Launch, dtypes: list[torch.dtype | None], slots: Sequence[Slot | None]
    ) -> Callable[[int], None]:
        """By Triton's own launcher, which knows drivers other than CUDA's."""
        compiled = launch.compile(dtypes, triton.runtime.driver.active.get_current_target())
        run = compiled.run
        head = (compiled.function, compiled.packed_metadata, None, None, None)
        tail = (*launch.integers, *launch.constants.values())

        words = [None if s is None else self._word_of(s) for s in slots]

        def call(stream: int) -> None:
            pointers = [None if w is None else self.words[w[0]][w[1]] for w in words]
            run(*launch.grid, stream, *head, *pointers, *tail)

        return call


def _storage(size: int, device: torch.device) -> torch.UntypedStorage:
    """Scratch memory. Not torch.empty, which fills tensors where algorithms are deterministic."""
    return torch.UntypedStorage(size, device=device)


def _dtypes(slots: Sequence[Slot | None]) -> list[torch.dtype | None]:
    return [None if s is None else s.dtype for s in slots]


def _flat(value: Any) -> list[int]:
    if isinstance(value, tuple):
        return [n for v in value for n in _flat(v)]
    return [value]


def _stream_of(device: torch.device) -> Callable[[], int]:
    current = torch._C._cuda_getCurrentRawStream  # as Triton and inductor do
    index = device.index
    return lambda: int(current(index))
