import os
import sys
from pathlib import Path

import pytest

# OpenMP's threads sleep while they wait, since spinning they would keep the processor that another
# worker of these tests needs. This must be set before torch loads OpenMP, and processes that tests
# start inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# What torch.compile has kept of an earlier run would have the strides that our fakes gave then.
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

sys.path.insert(0, str(Path(__file__).parent))  # cases.py, brute_force.py


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skip a test in which torch.compile finds no compiler, as in tests/wheel.sh."""
    try:
        return (yield)
    except Exception as error:
        if "InvalidCxxCompiler" in f"{type(error)} {error}":
            pytest.skip("torch.compile finds no C++ compiler here")
        raise
