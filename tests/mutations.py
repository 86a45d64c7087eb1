"""Checks that tests find faults: breaks the GPU kernels, one line at a time, and runs CI's tests.

    python tests/mutations.py          (with Triton 3.6 and NumPy below 2.4, no GPU)

A mutation is a stride, a bound or a mask that is wrong in a way that a hand might write. Each must
be found by the interpreted calls of tests/test_random.py, or by those of tests/test_gpu.py.
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
SECONDS = 600  # CI's calls take far less, but broken kernels may do anything
HOUSE = Path("src/deformnd/kernels/gpu")


class Mutation(NamedTuple):
    what: str
    file: str
    old: str  # what is replaced wherever it stands, which is `count` times
    new: str
    count: int = 1


MUTATIONS = (
    Mutation(
        "a batch item's stride does without the padding of a sample group (once a fault of ours)",
        "layout.py",
        "item=pixels * number * padded,",
        "item=pixels * channels,",
    ),
    Mutation(
        "the padding of a sample group is not written",
        "prepare.py",
        "(j < n.padded)[None, :]",
        "(j < n.channels)[None, :]",
    ),
    Mutation(
        "the stride of sample groups leaves out the padding",
        "layout.py",
        "plane=padded if rows else pixels * padded,",
        "plane=padded if rows else pixels * length,",
    ),
    Mutation(
        "positions after the last one are taken for some",
        "forward.py",
        "    inside = p < g.positions\n",
        "    inside = p < g.positions + 1\n",
    ),
    Mutation(
        "a corner beyond the last pixel is not weighed 0",
        "sampling.py",
        "has_high = low + 1 < g.image[a]",
        "has_high = low < g.image[a]",
    ),
    Mutation(
        "the mask's groups are taken for the offset's",
        "sampling.py",
        "place = (s // g.per_mask * g.taps + tap) * positions + p",
        "place = (s // g.per_offset * g.taps + tap) * positions + p",
    ),
    Mutation(
        "channels of a neighbouring weight group are multiplied",
        "columns.py",
        "inside = inside & (column >= 0) & (column < g.group_in)",
        "inside = inside & (column >= 0) & (column <= g.group_in)",
    ),
    Mutation(
        "taps after a part's last one are taken",
        "columns.py",
        "here = here & (s < g.sample_groups) & (k < stop)",
        "here = here & (s < g.sample_groups)",
    ),
    Mutation(
        "the columns of a sample group's padding are channels",
        "columns.py",
        "(c < length) & (s < g.sample_groups) & (k < stop)",
        "(s < g.sample_groups) & (k < stop)",
    ),
    Mutation(
        "a list's tile is that of the low corner alone",
        "backward_sorted.py",
        "            new = new & (first != last)\n",
        "            new = new & (first > last)\n",
    ),
    Mutation(
        "the columns of a later lot of taps take the place of those before",
        "backward_sorted.py",
        "mask=keep & (first_tap > 0), other=0.0)",
        "mask=keep & (first_tap < 0), other=0.0)",
    ),
    Mutation(
        "the columns of a later lot are those of the first taps",
        "im2col.py",
        "of_output = ((first_tap + tap) * g.padded_outputs + o) * g.columns",
        "of_output = (tap * g.padded_outputs + o) * g.columns",
    ),
    Mutation(
        "the points of a weight group end too early",
        "columns.py",
        "return first // own * other, ((stop - 1) // own + 1) * other",
        "return first // own * other, (first // own + 1) * other",
    ),
    Mutation(
        "partial weights lie one output apart",
        "prepare.py",
        "place = ((k % taps * columns + k // taps) * padded_outputs)[:, None]\n",
        "place = ((k % taps * columns + k // taps) * outputs + 1)[:, None]\n",
    ),
    Mutation(
        "a batch item of points is twice as far from the first",
        "columns.py",
        "points += b.to(tl.int64) * g.positions * g.padded_outputs",
        "points += 2 * b.to(tl.int64) * g.positions * g.padded_outputs",
    ),
)


def found_by(mutation: Mutation) -> str:
    """What finds it; nothing if none does."""
    with tempfile.TemporaryDirectory() as folder:
        for part in ("src", "tests"):
            shutil.copytree(ROOT / part, Path(folder) / part)
        path = Path(folder) / HOUSE / mutation.file
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
                   "tests/test_gpu.py", "-k", "in_interpreter"]  # fmt: skip
        child = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        return "tests/test_gpu.py" if child.returncode else ""


def main() -> None:
    wanted = sys.argv[1:]  # Parts of mutations' descriptions; without any, all are run.
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
