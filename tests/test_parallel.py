"""Calls on CPUs from many threads and processes, beside another OpenMP, by any number of threads.

What may wait forever runs in a process of its own, which is ended after a while.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import deformnd
from cases import Case, relative_error
from deformnd.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU core is not built")

TIME = 120  # seconds after which something waits forever

# Of a size where the core takes all threads, and one where it takes one; of each rank and family.
CASES = [
    Case((64, 64), (3, 3), channels=(16, 16)),
    Case((5, 6), (3, 3)),
    Case((12, 12, 12), (3, 3, 3), transposed=True, channels=(8, 8)),
    Case((700,), (3,), channels=(16, 32), offset_groups=2),
]


def run(case: Case, seed: int = 0) -> list[Tensor]:
    """The output and the gradients of one call."""
    tensors = {
        name: None if t is None else t.float().requires_grad_()
        for name, t in case.tensors(seed=seed).items()
    }
    output = case.call(tensors)
    leaves = [t for t in tensors.values() if t is not None]
    return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]


def assert_alike(got: list[Tensor], want: list[Tensor]) -> None:
    """Other numbers of threads add up in another order."""
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) <= 1e-5


@pytest.fixture(scope="module")
def wanted() -> list[list[Tensor]]:
    """What each case gives by one thread, which other tests compare with the definition."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [run(case, seed) for seed, case in enumerate(CASES)]
    finally:
        torch.set_num_threads(count)


# The beginning of what runs in a process of its own.
FIRST = """
import ctypes, os, re, shutil, sys, threading
import torch
from test_parallel import CASES, assert_alike, run

def right():
    for seed, (case, want) in enumerate(zip(CASES, torch.load(sys.argv[1]))):
        assert_alike(run(case, seed), want)

def tasks():
    return set(os.listdir("/proc/self/task"))

def at_once(work, count=16):
    failures = []
    def guarded(i):
        try:
            work(i)
        except BaseException as failure:
            failures.append(failure)
    workers = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, failures
"""


def apart(code: str, wanted: list[list[Tensor]], folder: Path, **environment: str) -> None:
    """Run code in a fresh process, with what the cases give in a file."""
    file = folder / "wanted.pt"
    torch.save(wanted, file)
    path = [Path(__file__).parent, Path(deformnd.__file__).parents[1]]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("OMP_NUM")}
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FIRST + code, file, folder],
        env={**inherited, "PYTHONPATH": os.pathsep.join(map(str, path)), **environment},
        timeout=TIME, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stdout


@pytest.mark.parametrize("count", (1, 3))
def test_sixteen_threads_at_once(count: int, wanted: list[list[Tensor]], tmp_path: Path) -> None:
    code = """
right()
at_once(lambda i: [right() for _ in range(3)])
right()
"""
    apart(code, wanted, tmp_path, OMP_NUM_THREADS=str(count))


def test_the_number_of_threads_changes(wanted: list[list[Tensor]], tmp_path: Path) -> None:
    """Between calls, in each of the calling threads, and while others call."""
    code = """
for count in (1, 3, 2, 16, 1):
    torch.set_num_threads(count)
    right()

def work(i):
    for j in range(6):
        torch.set_num_threads((i + j) % 5 + 1)
        right()

at_once(work, 6)
"""
    apart(code, wanted, tmp_path)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are not counted here")
def test_no_more_threads_than_torch_has_set(wanted: list[list[Tensor]], tmp_path: Path) -> None:
    """Each calling thread has a pool of its own, so a new one starts with none."""
    code = """
def work(i):
    count = torch.get_num_threads()
    assert count == wanted, (count, wanted)
    before = tasks()
    for _ in range(3):
        right()
        assert len(tasks() - before) <= count - 1, (before, tasks(), count)
    assert count == 1 or tasks() - before, (before, count)

right()
for wanted in (torch.get_num_threads(), 1, 4, 2, 7):
    torch.set_num_threads(wanted)
    at_once(work, 1)
"""
    apart(code, wanted, tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_after_a_call(wanted: list[list[Tensor]], tmp_path: Path) -> None:
    """Whose child still counts as many threads as its parent, and has none of them."""
    code = """
from deformnd.kernels import cpu
torch.set_num_threads(3)
right()
at_once(lambda i: right(), 3)
for _ in range(2):
    child = os.fork()
    if not child:
        # What torch itself runs by threads waits forever in such a child.
        cpu.threads = 3
        torch.set_num_threads(1)
        right()
        at_once(lambda i: right(), 3)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    right()
"""
    apart(code, wanted, tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for OpenMP as Linux maps it")
@pytest.mark.parametrize("first", (True, False), ids=("first", "last"))
def test_beside_another_openmp(first: bool, wanted: list[list[Tensor]], tmp_path: Path) -> None:
    """A copy of torch's: another one as far as the loader knows, with a pool of its own."""
    code = """
found = re.search(r"/.*libgomp.*", open("/proc/self/maps").read())
other = shutil.copy(found[0], os.path.join(sys.argv[2], "libanother.so"))

def load():
    global library
    library = ctypes.CDLL(other, mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(None).sched_yield.restype = ctypes.c_int

def use():
    before = tasks()
    library.GOMP_parallel(ctypes.CDLL(None).sched_yield, None, 3, 0)
    return len(tasks() - before)

if {first}:
    load()
    assert use() == 2
torch.set_num_threads(3)
right()
if not {first}:
    load()
    assert use() == 2
at_once(lambda i: [(use(), right()) for _ in range(2)], 4)
""".replace("{first}", str(first))
    apart(code, wanted, tmp_path)


class Sampled(Dataset[list[Tensor]]):
    """Whose items are made by calls of an operator."""

    def __len__(self) -> int:
        return 2 * len(CASES)

    def __getitem__(self, i: int) -> list[Tensor]:
        return run(CASES[i % len(CASES)], i % len(CASES))


@pytest.fixture
def _three() -> Iterator[None]:
    count = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(count)


@pytest.mark.parametrize("start", ("fork", "spawn", "forkserver"))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("_three")
def test_in_the_workers_of_a_dataloader(start: str, wanted: list[list[Tensor]]) -> None:
    if start not in torch.multiprocessing.get_all_start_methods():
        pytest.skip("no such way to start a process here")
    run(CASES[0])  # before the workers are there
    loader = DataLoader(
        Sampled(), batch_size=None, num_workers=2, multiprocessing_context=start, timeout=TIME
    )
    for i, item in enumerate(loader):
        assert_alike(item, wanted[i % len(CASES)])
        run(CASES[0])  # and beside them
    assert i == len(Sampled()) - 1
