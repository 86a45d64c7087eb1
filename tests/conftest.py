import os
import sys
from pathlib import Path

import pytest

# A thread that waits for others sleeps, before torch loads OpenMP: it would keep spinning on the
# processor that another worker of these tests needs. Processes that tests start inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# What torch.compile kept of an earlier run holds the strides that our fakes foretold then.
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

sys.path.insert(0, str(Path(__file__).parent))  # cases.py, brute_force.py


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Where there is no compiler (tests/wheel.sh), torch.compile's own needs are not ours."""
    try:
        return (yield)
    except Exception as error:
        if "InvalidCxxCompiler" in f"{type(error)} {error}":
            pytest.skip("torch.compile finds no C++ compiler here")
        raise
