"""The sweep: what it draws, what it measures, and what it says of what fails."""

import json
import math
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

from deformnd import bench, cli, sweep
from deformnd.bench import Shape

ROOT = Path(sweep.__file__).parents[1]
SMALL = Shape(2, 6, (7, 8), 4, 3, 2)
ABOUT = {"do": "about", "peers": []}
OPTIONS = {"device": "cpu", "threads": 1, "portable": False}


def asked(shape=SMALL, phases=bench.PHASES):
    sizes = shape._asdict()
    return {
        **{"do": "time", "sizes": sizes, "dtype": "float32", "phases": list(phases)},
        "seconds": 0.01,
    }


@pytest.fixture
def worker():
    """Starts processes, and ends them."""
    started = []

    def start(tree=ROOT):
        started.append(sweep.Worker(tree, OPTIONS))
        return started[-1]

    yield start
    for each in started:
        each.close()


def test_draws_are_reproducible():
    layers = sweep.draw(50, 7, 10**7)
    assert layers == sweep.draw(50, 7, 10**7)
    assert layers[:20] == sweep.draw(20, 7, 10**7)
    assert layers != sweep.draw(50, 8, 10**7) != sweep.draw(50, -8, 10**7)


@pytest.mark.parametrize("samples", sweep.SAMPLES.values())
def test_draws_are_within_bounds(samples):
    layers = sweep.draw(600, 0, samples)
    for s in layers:
        assert sweep.allowed(s, samples)
        assert 1 <= s.batch <= 32 and 3 <= s.channels <= 1024 and 3 <= s.out_channels <= 1024
        assert 1 <= s.kernel <= 7 and s.stride in (1, 2) and s.dilation in (1, 2, 3)
        assert all(7 <= side <= 400 for side in s.size)
        assert s.channels % s.groups == 0 == s.out_channels % s.groups
        image = s.out_channels if s.transposed else s.channels
        assert image % s.offset_groups == 0
        assert s.offset_groups == 1 or 3 <= image // s.offset_groups <= 128
    kinds = [(len(s.size), s.transposed) for s in layers]
    for kind, share in sweep.KINDS.items():
        assert kinds.count(kind) == pytest.approx(6 * share, abs=35), kind
    # Where little work is allowed, layers with the most channels are rare and may not come up.
    assert {s.channels for s in layers} >= {c for c in sweep.CHANNELS if c <= samples // 10**4}
    assert {s.kernel for s in layers} == set(range(1, 8))
    assert {s.offset_groups for s in layers} >= {1, 2, 3, 4, 8, 16}
    assert 0.6 < sum(s.kernel == 3 for s in layers) / 600
    assert 0.6 < sum(s.batch <= 8 for s in layers) / 600
    assert 20 < sum(map(sweep.depthwise, layers)) < 120
    assert any(s.groups > 1 and not sweep.depthwise(s) for s in layers)
    assert any(min(s.size) <= 16 and max(s.size) >= 128 for s in layers if len(s.size) > 1)


def test_draws_are_valid_calls():
    for shape in [*sweep.draw(40, 1, 50_000), bench.SHAPES["tiny"]]:
        p = bench.Problem(shape)
        y = p.deform()
        found = sweep.work(shape)
        assert y.shape[2:] == sweep.sizes_out(shape) and y.shape == p.grad.shape
        assert found.elements == sum(t.numel() for t in (*p.tensors()[:4], y, p.grad))
        samples = math.prod(p.mask.shape) // shape.offset_groups
        assert found.samples == samples * (p.geometry.image_channels)


def test_models_are_of_a_size_that_fits():
    assert not set(sweep.MODELS.values()) & set(bench.SHAPES.values())
    assert len(sweep.MODELS) > 80
    for name, shape in sweep.MODELS.items():
        assert sweep.allowed(shape, sweep.SAMPLES["cuda"]), name
        assert sweep.sizes_out(shape) and shape.channels % shape.offset_groups == 0, name


def test_command_line(tmp_path, capsys, monkeypatch):
    """Two random layers, also of another source tree, which is this one."""
    pytest.importorskip("tqdm")
    monkeypatch.setitem(sweep.SAMPLES, "cpu", 100_000)
    file = tmp_path / "sweep.json"
    arguments = ["bench", "--sweep", "2", "--seed", "5", "--threads", "1", "--json", str(file)]
    assert cli.main([*arguments, "--against", str(ROOT.parent)]) == 0
    out = capsys.readouterr().out
    report = json.loads(file.read_text())
    assert report["command"] == f"deformnd {' '.join(arguments)} --against {ROOT.parent}"
    assert report["seed"] == 5 and report["device"] and report["versions"]["torch"]
    assert report["threads"] == 1 and report["against"] == str(ROOT)
    assert [row["layer"] for row in report["rows"]] == [
        sweep.describe(s) for s in sweep.draw(2, 5, 100_000)
    ]
    for row in report["rows"]:
        assert row["layer"] in out and not row["wrong"] and "failed" not in row
        for phase in bench.PHASES:
            for peer in ("deformnd", "dense", "against"):
                assert row[phase][peer]["ms"] > 0 and row[phase][peer]["first s"] > 0
            assert row[phase]["deformnd"]["error"] < 1e-5
    assert "2 of 2 layers" in out and "failed or wrong: 0" in out
    assert "against      float32   backward" in out


def test_layers_stop_when_the_time_is_up(tmp_path):
    pytest.importorskip("tqdm")
    file = tmp_path / "sweep.json"
    layers = {str(i): SMALL for i in range(9)}
    report = sweep.run(layers, ["float32"], seconds=1e-9, path=file)
    assert report["rows"] == [] and json.loads(file.read_text()) == report
    assert "0 of 9 layers" in sweep.text(report)


def test_kernels_are_compiled_ahead(worker):
    """By several processes at once; a layer that fails there does not stop the others."""
    bad = SMALL._replace(offset_groups=5)
    jobs = [(str(i), shape, "float32") for i, shape in enumerate((SMALL, bad, SMALL, SMALL))]
    workers = [worker(), worker()]
    assert sweep._compile([workers], jobs, bench.PHASES, math.inf) > 0
    assert all(w.ask(ABOUT)["from"] == str(ROOT) for w in workers)


@pytest.fixture
def changed(tmp_path):
    """A copy of the source tree, with more lines at the end of a file of it."""

    def copy(lines, file="deformnd/ops/functional.py"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "deformnd", tmp_path / "deformnd", ignore=ignore)
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as f:
            f.write(lines)
        return sweep.tree_of(tmp_path)

    return copy


def test_a_wrong_result_is_seen(worker, changed):
    """A wrong gradient of the weight is seen, even if it is wrong for the second image alone."""
    tree = changed("""
_right = deform_conv2d
class _Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()
    @staticmethod
    def backward(ctx, grad):
        return grad * 1.01
def deform_conv2d(input, weight, *rest, **options):
    one = _right(input[:1], weight, *(t[:1] for t in rest[:2]), rest[2], **options)
    more = _right(input[1:], _Wrong.apply(weight), *(t[1:] for t in rest[:2]), rest[2], **options)
    return torch.cat([one, more])
""")
    row = sweep._row([worker(tree)], asked(), ["dense"])
    assert row["wrong"] and "failed" not in row
    assert row["forward"]["deformnd"]["error"] < 1e-6
    assert row["backward"]["deformnd"]["error"] > 1e-3
    report = {"rows": [{"name": "one", **row}]}
    assert "WRONG" in sweep.failures(report)[0]


@pytest.mark.parametrize(
    "fault", ["raise RuntimeError('CUDA error: an illegal access')", "os.abort()"]
)
def test_an_error_of_ours_fails_the_layer_alone(worker, changed, fault):
    tree = changed(f"""
import os
_right = deform_conv2d
def deform_conv2d(input, *rest, **options):
    if input.shape[1] == 6:
        {fault}
    return _right(input, *rest, **options)
""")
    ours = worker(tree)
    row = sweep._row([ours], asked(), ["dense"])
    assert row["failed"] and not row["wrong"]
    assert "FAILED" in sweep.show({"name": "one", **row})
    row = sweep._row([ours], asked(SMALL._replace(channels=4)), ["dense"])
    assert "failed" not in row and not row["wrong"] and row["forward"]["dense"]["ms"] > 0


@pytest.mark.parametrize("fault", ["raise RuntimeError('no Half')", "import os; os._exit(3)"])
def test_an_error_of_a_peer_is_recorded(worker, changed, fault):
    tree = changed(f"def deform_conv2d(*args, **options):\n    {fault}\n", "torchvision/ops.py")
    (tree / "torchvision" / "__init__.py").touch()
    row = sweep._row([worker(tree)], asked(), ["dense", "torchvision"])
    assert "failed" not in row and not row["wrong"]
    assert row["forward"]["deformnd"]["ms"] > 0
    assert row["forward"]["torchvision"]["failed"].endswith(("no Half", "code 3"))
    assert "torchvision failed 2 times in float32: " in "\n".join(sweep._failed_peers([row]))


def test_a_process_that_does_not_answer_is_ended(worker):
    one = worker()
    assert one.ask(ABOUT, patience=0.01)["failed"].endswith("no answer in 0.01 s")
    assert one.ask(ABOUT)["from"] == str(ROOT)


def _report(*rows):
    """A report of rows (name, shape, then times of deformnd, torchvision and dense, each phase)."""
    peers = ("deformnd", "torchvision", "dense")
    return {
        **{"device": "abacus", "cores": 2, "threads": 2, "kernels": "beads", "portable": False},
        **{"versions": {"torch": "2"}, "layers": 9, "seconds": 3.0, "compile s": 1.0},
        "peers": ["dense", "torchvision"],
        "rows": [
            {
                **{"name": name, "layer": sweep.describe(shape), "sizes": shape._asdict()},
                **{"dtype": "float16", "depthwise": sweep.depthwise(shape), "wrong": False},
                "forward": {p: {"ms": ms} for p, ms in zip(peers, times[:3], strict=True) if ms},
                "backward": {p: {"ms": ms} for p, ms in zip(peers, times[3:], strict=True) if ms},
            }
            for name, shape, *times in rows
        ],
    }


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux")
def test_all_threads_are_on_one_core():
    """Those that began before, too; afterwards they have all cores again."""

    def cores():
        return {frozenset(os.sched_getaffinity(int(t.name))) for t in tasks.iterdir()}

    tasks, stop = Path("/proc/self/task"), threading.Event()
    all_cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        with bench.one_core():
            assert cores() == {frozenset({max(all_cores)})}
            assert torch.get_num_threads() == 1
        assert cores() == {frozenset(all_cores)} and torch.get_num_threads() == threads
    finally:
        stop.set()
        thread.join()


def test_summary():
    deep = Shape(1, 8, (9, 9), 8, 3, groups=8)
    text = sweep.text(
        _report(
            *[("fast", SMALL, 1, 4, 1, 2, 16, 2), ("slow", SMALL, 2, 1, 0.5, 1, 2, 1)],
            *[
                ("deep", deep, 10, 5, 9, 1, 3, 1),
                ("flat", Shape(1, 4, (9,), 4, 3), 1, 0, 1, 1, 0, 1),
            ],
        )
    )
    assert (
        "torchvision  float16   forward   1.41 (0.50), 2 layers; depthwise 0.50 (0.50), 1" in text
    )
    assert (
        "torchvision  float16   backward  4.00 (2.00), 2 layers; depthwise 3.00 (3.00), 1" in text
    )
    assert "dense        float16   forward   0.63 (0.25), 3 layers" in text
    assert "4 of 9 layers in 3 s, 1 s of it to compile ahead" in text
    assert "slower than torchvision: 2\n  0.50 forward   float16   slow: 2x6x7x8 > 4 k3 og2" in text
    assert "over 2.5 x dense: 1\n  0.25 forward   float16   slow: 2x6x7x8 > 4 k3 og2" in text
    assert "failed or wrong: 0" in text
    # Nothing is said of a peer that is not there.
    alone = _report(("slow", SMALL, 2, 0, 0.5, 1, 0, 1)) | {"peers": ["dense"]}
    assert "torchvision" not in sweep.text(alone)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(tmp_path, capsys):
    pytest.importorskip("tqdm")
    file = tmp_path / "sweep.json"
    arguments = ["bench", "--sweep", "2", "--device", "cuda", "--processes", "2"]
    assert cli.main([*arguments, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert len(report["rows"]) == 4 and report["compile s"] > 0
    assert all(row["forward"]["deformnd"]["host us"] > 0 for row in report["rows"])
