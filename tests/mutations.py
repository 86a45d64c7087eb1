"""Whether the tests see what they are for: break the GPU kernels by hand, one line at a time, and
have the random calls of CI find each.

    python tests/mutations.py          (with Triton 3.6 and NumPy below 2.4, no GPU)

A mutation is a stride, a bound or a mask that is wrong in a way that a hand might write. Each must
be found by the interpreted calls of tests/test_random.py, or by those of tests/test_triton.py.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
SECONDS = 600  # that CI's calls take by far not; broken kernels may read and write anywhere
TRITON = Path("src/deformnd/kernels/triton")


class Mutation(NamedTuple):
    what: str
    file: str
    old: str  # stands there once, or `count` times, of which all are replaced
    new: str
    count: int = 1


MUTATIONS = (
    Mutation(
        "a batch item's stride does without the padding of a unit (once a fault of ours)",
        "layouts.py",
        'return _strides(units, "planes" if units.narrow else "rows", math.prod(g.image_size))[0]',
        "return math.prod(g.image_size) * units.number * units.length",
    ),
    Mutation(
        "the padding of a unit is not written",
        "layouts.py",
        'pad = units.padded if layout_to == "planes" and units.padded != units.length else 0',
        "pad = 0",
    ),
    Mutation(
        "a copy's stride of units leaves out the padding",
        "layouts.py",
        "return units.number * pixels * units.padded, pixels * units.padded, units.padded",
        "return units.number * pixels * units.padded, pixels * units.length, units.padded",
    ),
    Mutation(
        "positions after the last one are taken for some",
        "kernels.py",
        "    inside = p < positions\n",
        "    inside = p < positions + 1\n",
        3,
    ),
    Mutation(
        "a corner beyond the last pixel is not weighed 0",
        "kernels.py",
        "has_high = low + 1 < image_size[a]",
        "has_high = low < image_size[a]",
    ),
    Mutation(
        "the mask's groups are taken for the offset's",
        "kernels.py",
        "mask, b, u0 // mask_units, units // mask_units, tap, p, inside, valid, sizes",
        "mask, b, u0 // offset_units, units // mask_units, tap, p, inside, valid, sizes",
        3,
    ),
    Mutation(
        "channels of a neighbouring group are multiplied",
        "kernels.py",
        "inside = inside & (column >= 0) & (column < group_in)",
        "inside = inside & (column >= 0) & (column <= group_in)",
    ),
    Mutation(
        "kernel points after a part's last one are taken",
        "kernels.py",
        "here = (u < units) & (k < stop) & inside[None, :]",
        "here = (u < units) & inside[None, :]",
    ),
    Mutation(
        "the lanes of a unit's padding are channels",
        "kernels.py",
        "c_in = (lane % BLOCK_C < unit) & (u < units) & (k < stop)",
        "c_in = (u < units) & (k < stop)",
    ),
    Mutation(
        "a list's tile is that of the low corner alone",
        "kernels.py",
        "new = new & ((first != last) | (bit == 0))",
        "new = new & (bit == 0)",
    ),
    Mutation(
        "a group's points end too early",
        "kernels.py",
        "o_last = ((c_stop - 1) // group_in + 1) * group_out",
        "o_last = o_first + group_out",
    ),
    Mutation(
        "partial weights lie one output apart",
        "kernels.py",
        "row = tl.multiple_of((k % taps * group_in + k // taps) * outputs, VECTOR_O)",
        "row = tl.multiple_of((k % taps * group_in + k // taps) * (outputs - 1), VECTOR_O)",
    ),
    Mutation(
        "the stride of a batch item's points is that of one channel more",
        "kernels.py",
        "return (b.to(tl.int64) * outputs + o)[None, :] * positions + p[:, None]",
        "return (b.to(tl.int64) * (outputs + 1) + o)[None, :] * positions + p[:, None]",
    ),
)


def found_by(mutation: Mutation) -> str:
    """What finds it; nothing if none does."""
    with tempfile.TemporaryDirectory() as folder:
        for part in ("src", "tests"):
            shutil.copytree(ROOT / part, Path(folder) / part)
        path = Path(folder) / TRITON / mutation.file
        text = path.read_text()
        assert text.count(mutation.old) == mutation.count, (mutation, text.count(mutation.old))
        path.write_text(text.replace(mutation.old, mutation.new))
        environment = {**os.environ, "PYTHONPATH": str(Path(folder) / "src")}
        for part in range(4):
            command = [sys.executable, "tests/random_calls.py", "interpreter", "--processes", "1",
                       "--calls", "40", "--seed", f"test {part}", "--first"]  # fmt: skip
            child = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True,
                stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            try:
                printed, _ = child.communicate(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.communicate()
                return f"random calls, part {part}: they do not end"
            if child.returncode:
                return f"random calls, part {part}: {(printed.splitlines() or ['a crash'])[0]}"
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-x", "-q",
                   "tests/test_triton.py", "-k", "in_interpreter"]  # fmt: skip
        child = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        return "tests/test_triton.py" if child.returncode else ""


def main() -> None:
    wanted = sys.argv[1:]  # parts of what the mutations do; all unless given
    mutations = [m for m in MUTATIONS if not wanted or any(w in m.what for w in wanted)]
    missed = 0
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for mutation, found in zip(mutations, threads.map(found_by, mutations), strict=True):
            print(f"{mutation.what}: {found or 'NOT FOUND'}", flush=True)
            missed += not found
    print(f"{len(mutations) - missed} of {len(mutations)} found")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
