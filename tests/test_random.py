"""Random calls on every backend (random_calls.py), as many as CI has time for."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import random_calls
from deformnd.kernels import cpu

SCRIPT = Path(random_calls.__file__)


def passes(backend: str, seed: str, count: int) -> None:
    done, wrong = random_calls.run(backend, seed, count)
    assert not wrong, "\n".join(wrong)
    assert done == count


@pytest.mark.skipif(not cpu.available(), reason="the CPU core is not built")
@pytest.mark.parametrize("part", range(4))
def test_cpu(part: int) -> None:
    passes("cpu", f"test {part}", 100)


@pytest.mark.parametrize("part", range(2))
def test_compiled(part: int) -> None:
    passes("compiled", f"test {part}", 8)


@pytest.mark.parametrize("part", range(4))
def test_interpreter(part: int) -> None:
    """With the tables as they are. In a process that interprets from Triton's import on."""
    np, _ = pytest.importorskip("numpy"), pytest.importorskip("triton")
    if tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("Triton 3.6 interprets with NumPy below 2.4 only")
    # As random_calls.py does with --seed "test {part}", but for a process less.
    code = f"from test_random import passes; passes('interpreter', 'test {part}.0', 40)"
    path = os.pathsep.join([str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", code]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("backend", ["gpu", "portable"])
def test_gpu(backend: str) -> None:
    command = [sys.executable, SCRIPT, backend, "--calls", "800", "--seed", "test"]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr


def test_generator() -> None:
    """The same calls for the same seed; all kinds come up."""
    seen = [list(random_calls.calls("gpu", "x", 400)) for _ in range(2)]
    assert seen[0] == seen[1]
    found = seen[0] + [random_calls.draw(random.Random(i), random_calls.CPU) for i in range(400)]
    images = {c.case.channels[c.case.transposed] for c in found}
    assert images >= set(range(1, 33))
    cases = [c.case for c in found]
    assert {c.n for c in cases} == {1, 2, 3} and {c.batch for c in cases} == {1, 2, 3, 4, 5}
    assert any(c.groups == c.channels[0] > 1 for c in cases)
    assert any(c.aggregate for c in cases)
    assert any(max(c.values("output_padding")) for c in cases)
    assert any(c.offset_groups == 0 for c in cases) and any(c.mask_groups == 0 for c in cases)
    assert {c.dtype for c in found} == set(random_calls.FLOATS)
    assert {layout for c in found for layout in c.layouts} == set(random_calls.LAYOUTS)
    assert any(c.offset_dtype != c.dtype for c in found) and any(c.pieces for c in found)
    assert any(c.deterministic for c in found) and any(not all(c.needs) for c in found)


if os.environ.get("TRITON_INTERPRET") == "1":  # test_gpu.py starts itself so
    pytestmark = pytest.mark.skip("interprets by itself")
