"""The demo and the command line, run as a user would (with fewer epochs)."""

import subprocess
import sys

import pytest
import torch

from deformnd import cli

np, onnxruntime, demo = map(pytest.importorskip, ("numpy", "onnxruntime", "deformnd.demo"))


def command(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "deformnd", *arguments], cwd=cwd, capture_output=True, text=True
    )


def test_demo(tmp_path):
    done = command("demo", "--epochs", "1", "--out", "a/out", "--seed", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "a" / "out"
    assert {p.name for p in out.iterdir()} == {"model.onnx", "report.md", "sampling.png"}
    report = (out / "report.md").read_text()
    assert report in done.stdout and "Seeds 3 to 5" in report
    difference = float(report.split("largest difference of a logit is ")[1].split()[0].rstrip("."))
    assert difference < 1e-3
    assert (out / "sampling.png").read_bytes().startswith(b"\x89PNG")
    assert "train deformable, seed 5" in done.stderr  # the progress bar

    # The ordinary networks have no fewer parameters, and one of them no fewer epochs.
    rows = [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith("|")]
    names, _, parameters, epochs, seconds = zip(*rows[2:], strict=True)
    assert names == ("ordinary", "ordinary, as long", "deformable")
    wide, longer, ours = (int(p.replace(",", "")) for p in parameters)
    assert ours <= wide == longer <= 1.01 * ours
    assert epochs[0] == epochs[2] == "1" and int(epochs[1]) >= 1
    assert all(s.endswith(" s") for s in seconds)
    # One file, for any batch.
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    for batch in (1, 5):
        image = np.zeros((batch, 1, demo.SIDE, demo.SIDE), np.float32)
        assert session.run(None, {"image": image})[0].shape == (batch, 10)


def test_the_verdict_is_true_either_way():
    def verdict(ours, same, longer):
        runs = {demo.ORDINARY: same, demo.LONGER: longer, demo.DEFORMABLE: ours}
        return demo._verdict(
            {k: [demo.Training(1, 1.0, a / 100) for a in v] for k, v in runs.items()}
        )

    better = verdict([90, 91, 92], [60, 61, 62], [70, 71, 72])
    assert "20.0 points more" in better and "(ordinary, as long): its worst training" in better
    worse = verdict([60, 61, 62], [90, 91, 92], [70, 71, 72])
    assert "30.0 points fewer" in worse and "(ordinary): its best training is behind" in worse
    assert "so that proves nothing" in verdict([60, 70, 80], [1, 2, 3], [60, 70, 77])


def test_pictures_show_whole_digits():
    _, test = demo.load(0, "cpu")
    images = demo.transform(test.images, torch.Generator().manual_seed(1))
    assert images[..., 0, :].max() > 0.5  # others are cropped
    shown = demo.whole(images, test.labels, 5)
    assert len(set(test.labels[shown].tolist())) == len(shown) == 5
    for edge in ((..., 0, slice(None)), (..., -1, slice(None)), (..., 0), (..., -1)):
        assert images[shown][edge].max() < 0.05


def test_an_interrupted_demo_leaves_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "train", interrupted)
    assert cli.main(["demo", "--out", "a/b/out"]) == 1
    assert not list(tmp_path.iterdir())
    name = "n" * 300
    for out in (name, f"a/b/{name}"):  # found before anything is trained
        assert cli.main(["demo", "--out", out]) == 2
        assert f"deformnd demo: --out {out} is no folder to write to: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


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
