"""Checks that need a process in which deformnd is not imported yet, each in one of its own.

All begin as copies of one that has imported torch, which takes longer than most checks.
"""

from __future__ import annotations

import os
import subprocess
import sys

# A copy does not clear up, which would take as long again.
COPIES = """
import os, sys, traceback
{first}
for script in {scripts!r}:
    copy = os.fork()
    if not copy:
        status = 0
        try:
            exec(script)
        except BaseException:
            print(traceback.format_exc())
            status = 1
        sys.stdout.flush()
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])
    os.write(1, b"\\0%d\\0" % status)
"""


def apart(first: str, scripts: list[str], **environment: str) -> list[tuple[int, str]]:
    """The exit status of each script and what it printed, with the lines `first` before each."""

    def python(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], env=os.environ | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip

    if sys.platform != "linux":  # elsewhere copies of a process that has imported much may crash
        runs = [python(f"{first}\n{script}") for script in scripts]
        return [(run.returncode, run.stdout) for run in runs]
    run = python(COPIES.format(first=first, scripts=scripts))
    *parts, rest = run.stdout.split("\0")
    assert len(parts) == 2 * len(scripts) and not run.returncode, rest
    return [(int(status), said) for said, status in zip(parts[::2], parts[1::2], strict=True)]
