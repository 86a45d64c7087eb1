"""The command line: what it prints, its exit codes, and no traceback for a user's mistake."""

import json

import pytest

import deformnd
from deformnd import bench, cli
from deformnd.kernels import cpu

MODEL = """
import torch
import deformnd

def layer():
    torch.manual_seed(0)
    packed = deformnd.PackedDeformConv2d(3, 4, 3, padding=1, modulated=True)
    torch.nn.init.normal_(packed.offset_generator.weight, std=0.1)
    return packed

def another():
    torch.manual_seed(1)
    return deformnd.PackedDeformConv2d(3, 4, 3, padding=1), torch.rand(1, 3, 8, 8)

def number():
    return 3

def broken():
    raise KeyError("no such thing")
"""


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(MODEL)
    return tmp_path


def test_info(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "kernels: " in out and "OpenMP threads" in out
    if deformnd.has_ops():
        assert f"C++ core with {cpu.LEVELS[cpu.best_level()]}" in out
    assert out.count(" ok\n") >= 6 and "deform_conv_transpose3d" in out


def test_info_says_why_the_reference_runs(monkeypatch, capsys):
    monkeypatch.setattr(cpu, "available", lambda: False)
    assert cli.main(["info"]) == 0
    assert "kernels: the reference in plain PyTorch, slower: " in capsys.readouterr().out


def test_info_finds_wrong_kernels(monkeypatch, capsys):
    from deformnd.kernels import reference

    exact = reference.gather
    monkeypatch.setattr(reference, "gather", lambda *args: exact(*args) * 1.001)
    assert cli.main(["info"]) == 1
    assert capsys.readouterr().out.count("WRONG") == 3


def test_export_and_check(model, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    shape = ["--input", "1,3,16,12", "--dynamic", "--out", "layer.onnx"]
    assert cli.main(["export", "model.py:layer", *shape]) == 0
    assert "differs from torch by" in capsys.readouterr().out
    assert cli.main(["check", "layer.onnx", "--model", "model.py:layer", "--size", "20"]) == 0
    out = capsys.readouterr().out
    assert "DeformConv 1" in out and "float32 [1, 3, 20, 20]" in out
    assert "onnxruntime against torch: " in out and ", ok" in out
    # Another model's weights: the check fails.
    assert cli.main(["check", "layer.onnx", "--model", "model.py:another"]) == 1
    assert "DIFFERS" in capsys.readouterr().out
    # A file that no engine runs.
    import onnx

    graph = onnx.load("layer.onnx")
    next(n for n in graph.graph.node if n.op_type == "DeformConv").domain = "nobody.knows"
    graph.opset_import.append(onnx.helper.make_opsetid("nobody.knows", 1))
    onnx.save(graph, "custom.onnx")
    assert cli.main(["check", "custom.onnx"]) == 1
    out, err = capsys.readouterr()
    assert "nobody.knows::DeformConv: custom" in out and "no engine runs this file" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "model.py"], "'model.py' is no MODEL.py:FACTORY"),
        (["export", "none.py:layer"], "there is no file none.py"),
        (["export", "model.py:nothing"], "model.py has no function nothing"),
        (["export", "model.py:number"], "returned a int, expected a torch.nn.Module"),
        (["export", "model.py:broken"], "does not run: KeyError: 'no such thing'"),
        (["export", "model.py:layer"], "give --input"),
        (["export", "model.py:layer", "--target", "x"], "no target 'x', expected one of"),
        (["export", "nowhere_to_be_found:layer"], "cannot import nowhere_to_be_found"),
        (["check", "none.onnx"], "there is no file none.onnx"),
        (["check", "model.py"], "model.py is no ONNX file"),
        (["bench", "--shapes", "huge"], "no shape 'huge', expected some of big"),
        (["bench", "--device", "abacus"], "device 'abacus' is not here"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_usage_errors(model, capsys, arguments, message):
    if arguments[0] != "bench":
        pytest.importorskip("onnx")
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert message in err and "Traceback" not in out + err
    assert err.startswith(f"deformnd {arguments[0]}: ")


def test_wrong_shape_is_a_usage_error(model, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["export", "model.py:layer", "--input", "1,three"])
    assert caught.value.code == 2
    assert "'1,three' is no shape" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "info", "bench", "export", "check"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 5


def test_missing_package_is_named(monkeypatch, capsys):
    import builtins

    real = builtins.__import__

    def absent(name, *rest):
        if name == "tqdm":
            raise ImportError("No module named 'tqdm'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert cli.main(["bench", "--shapes", "tiny"]) == 1
    assert "pip install 'deformnd[bench]'" in capsys.readouterr().err


def test_bench(tmp_path, capsys):
    pytest.importorskip("tqdm")
    pytest.importorskip("matplotlib")
    files = ["--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")]
    some = ["--shapes", "tiny,A", "--dtypes", "float32,float16", "--seconds", "0.01"]
    assert cli.main(["bench", *some, "--no-memory", *files]) == 0
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "b.json").read_text())
    rows = {(r["shape"], r["dtype"], r["phase"]): r["peers"] for r in report["rows"]}
    assert len(rows) == 8
    assert report["versions"]["torch"] and report["device"]
    for (_, dtype, phase), peers in rows.items():
        assert peers["dense"]["ms"] > 0 and peers["deformnd"]["rounds"] >= 3
        assert peers["deformnd"]["error"] < (1e-5 if dtype == "float32" else 1e-2)
        assert ("onnxruntime" in peers) <= (dtype == "float32" and phase == "forward")
        if "onnxruntime" in peers:
            assert peers["onnxruntime"]["error"] < 1e-5
    assert "forward, float32: ms" in out and "| tiny |" in out
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_bench_measures_memory():
    """Two cores' dense convolution of A takes megabytes; deformnd's is given in the same words."""
    pytest.importorskip("tqdm")
    report = bench.run(["A"], ["float32"], ["deformnd"], ["forward"], seconds=0.01)
    memory = report["rows"][0]["peers"]["deformnd"]["memory MiB"]
    assert memory is None or 0 <= memory < 100


def test_bench_inputs_fit_every_peer():
    """The calls of all peers that are installed agree, on a small shape of each kind."""
    for shape in (
        bench.Shape(2, 4, (6, 7), 6, 3, 2, stride=(1, 2), groups=2),
        bench.Shape(2, 4, (9,), 6, 3, dilation=2),
        bench.Shape(2, 4, (4, 5), 6, 4, stride=2, padding=1, transposed=True),
    ):
        p = bench.Problem(shape)
        want = p.exact().kernel(bench.reference)
        for peer in bench.PEERS:
            if peer != "dense" and bench.has(peer) and bench.fits(peer, p, "forward"):
                result = bench.prepare(peer, p, "forward", 1)()
                assert bench.relative(result[:1], want) < 1e-5, peer
