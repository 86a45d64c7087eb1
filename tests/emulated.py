"""A plugin of pytest (-p emulated): tests call a core in another process.

The command in DEFORMND_EMULATED starts that process: an emulator of another processor (aarch64.sh),
or a build that Python could not load (sanitize.sh --threads). Python, torch and the reference run
natively. So tests take minutes, where all under emulation would take hours.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import shlex
import struct
import subprocess
import threading

from deformnd.kernels import cpu

SIZE = 1 << 30  # bytes that both programs see; only those that are touched take memory


class Core:
    """Stands in for deformnd_run of csrc/core.cpp."""

    def __init__(self, command: str) -> None:
        descriptor = os.memfd_create("calls")
        os.ftruncate(descriptor, SIZE)
        self.memory = mmap.mmap(descriptor, SIZE)
        self.lock = threading.Lock()
        self.process = subprocess.Popen(
            [*shlex.split(command), str(descriptor), str(SIZE)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[descriptor], bufsize=0,
        )  # fmt: skip
        self.address, self.level = struct.unpack("<2q", self.answer(16))

    def answer(self, count: int) -> bytes:
        assert self.process.stdout is not None
        answer = self.process.stdout.read(count)
        assert len(answer) == count, "the emulated core ended"
        return answer

    def __call__(self, packed: bytes) -> int:
        words = list(struct.unpack(f"<{len(packed) // 8}q", packed))
        gather, rank = words[1], words[3]
        batch, image, points, groups, offset_groups, mask_groups = words[4:10]
        sizes = [math.prod(words[10 + i * rank :][:rank]) for i in range(3)]
        pixels, positions, taps = (batch * sizes[0], batch * sizes[1], sizes[2])
        weight, offset = image * points // groups * taps, offset_groups * rank * taps * positions
        mask = mask_groups * taps * positions
        given = [
            image * pixels,
            points * positions,
            weight,
            offset,
            mask,
            points if gather else image,
        ]
        written = [given[0], *given[2:5]]
        with self.lock:
            back, end = [], 4096
            for i, elements in enumerate((*given, *written)):
                at = 10 + 6 * rank + 2 * i
                pointer, code = words[at : at + 2]
                if not pointer:
                    continue
                count = elements * (2, 2, 4, 8)[code & 3]
                start = (end + 63) // 64 * 64 + pointer % 64
                end = start + count
                self.memory[start:end] = ctypes.string_at(pointer, count)
                words[at] = self.address + start
                if i > 5 or (gather and i == 1):
                    back.append((pointer, start, count))
            self.memory[: len(packed)] = struct.pack(f"<{len(words)}q", *words)
            assert self.process.stdin is not None
            self.process.stdin.write(b"\0")
            (status,) = self.answer(1)
            for pointer, start, count in back:
                ctypes.memmove(pointer, self.memory[start : start + count], count)
            return status


def pytest_configure() -> None:
    """Put the core in place before tests are imported, since they ask for its level then."""
    core = cpu._run = Core(os.environ["DEFORMND_EMULATED"])
    cpu.best_level = lambda: core.level
