"""Checks that need a process in which deformnd is not imported yet, each in one of its own.

All are copies of one process that has imported torch, since the import takes longer than most
checks.
"""

from __future__ import annotations

import os
import subprocess
import sys

# A copy ends by os._exit, since a regular end of Python takes as long as its start.
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
    """Run each script after the lines `first`; return its exit status and what it printed."""

    def python(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], env=os.environ | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip

    if sys.platform != "linux":  # Elsewhere a fork of a process that has imported much may crash.
        runs = [python(f"{first}\n{script}") for script in scripts]
        return [(run.returncode, run.stdout) for run in runs]
    run = python(COPIES.format(first=first, scripts=scripts))
    *parts, rest = run.stdout.split("\0")
    assert len(parts) == 2 * len(scripts) and not run.returncode, rest
    return [(int(status), said) for said, status in zip(parts[::2], parts[1::2], strict=True)]
