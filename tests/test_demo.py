"""The demo and the command line, run as a user would (with fewer epochs)."""

import subprocess
import sys

import pytest

from deformnd import cli


def command(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "deformnd", *arguments], cwd=cwd, capture_output=True, text=True
    )


def test_demo(tmp_path):
    done = command("demo", "--epochs", "2", "--out", "out", "--seed", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "out" / "report.md").read_text()
    assert report in done.stdout
    assert "| ordinary |" in report and "| deformable |" in report
    difference = float(report.split("largest difference of a logit is ")[1].split()[0].rstrip("."))
    assert difference < 1e-3
    assert (tmp_path / "out" / "model.onnx").stat().st_size > 10_000
    assert (tmp_path / "out" / "sampling.png").read_bytes().startswith(b"\x89PNG")
    assert "train deformable" in done.stderr  # the progress bar


def test_errors_have_no_traceback(tmp_path):
    done = command("demo", "--device", "nonsense", "--out", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("deformnd demo: ") and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    done = command("demo", "--epochs", "0", cwd=tmp_path)
    assert done.returncode == 2 and "argument --epochs: 0 is not from 1" in done.stderr


def test_usage(capsys):
    for arguments, code in ((["--help"], 0), (["--version"], 0), ([], 2), (["nonsense"], 2)):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == code
    assert "demo" in capsys.readouterr().out
