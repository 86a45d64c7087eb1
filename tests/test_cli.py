"""The command line: what it prints, its exit codes, and no traceback for a user's mistake."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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

def leaves():
    raise SystemExit(3)

def stopped():
    raise KeyboardInterrupt

def broken():
    raise KeyError("no such thing")

class Returns(torch.nn.Module):
    def __init__(self, *values):
        super().__init__()
        self.values = values

    def forward(self, *_):
        return torch.tensor(self.values)

def same():
    return Returns(torch.nan, torch.inf, 2)

def near():
    return Returns(torch.nan, torch.inf, 2.001)

def far():
    return Returns(torch.nan, torch.inf, 2.1)

def finite():
    return Returns(5, torch.inf, 2)

def infinite():
    return Returns(torch.nan, -torch.inf, 2)

def nans():
    return Returns(torch.nan, torch.nan, 2)

class Item(torch.nn.Module):
    def forward(self, x):
        return x.sum().item()

def item():
    return Item()
"""


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(MODEL)
    return tmp_path


@pytest.fixture
def files(model):
    """Files that are no checkpoint, and ONNX files of all kinds."""
    (model / "empty.pt").write_text("")
    torch.save({1: torch.ones(2)}, model / "ints.pt")
    torch.save([torch.ones(2)], model / "list.pt")
    torch.save({"weight": torch.ones(2)}, model / "other.pt")
    try:
        from onnx import TensorProto, helper, save
    except ImportError:
        return model
    tensor = helper.make_tensor_value_info

    def write(name, inputs, nodes, shape=None):
        outputs = [tensor(nodes[-1].output[0], TensorProto.FLOAT, shape)]
        graph = helper.make_graph(nodes, "g", inputs, outputs)
        opset = helper.make_opsetid("", 18)
        save(helper.make_model(graph, opset_imports=[opset], ir_version=8), model / name)

    one = [helper.make_node("Relu", ["x"], ["y"])]
    shape = ["batch", 3, "height", "width"]
    write("fine.onnx", [tensor("x", TensorProto.FLOAT, shape)], one)
    write("huge.onnx", [tensor("x", TensorProto.FLOAT, [100000, 200000])], one)
    write("negative.onnx", [tensor("x", TensorProto.FLOAT, [-1, 3])], one)
    write("shapeless.onnx", [tensor("x", TensorProto.FLOAT, None)], one)
    write("words.onnx", [tensor("x", TensorProto.STRING, [2])], one)
    odd = tensor("x", TensorProto.FLOAT, [2])
    odd.type.tensor_type.elem_type = 77
    write("typed.onnx", [odd], one)
    write(
        "sequence.onnx",
        [helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_node("SequenceLength", ["x"], ["y"])],
    )
    names = ["x", *(f"t{i}" for i in range(10000))]
    chain = [helper.make_node("Relu", [a], [b]) for a, b in itertools.pairwise(names)]
    write("deep.onnx", [tensor("x", TensorProto.FLOAT, [2])], chain, [2])
    odd = helper.make_tensor("v", TensorProto.FLOAT, [3], [math.nan, math.inf, 2.0])
    write("notfinite.onnx", [], [helper.make_node("Constant", [], ["y"], value=odd)], [3])
    value = helper.make_tensor("v", TensorProto.FLOAT, [2], [1.0, 2.0])
    write("constant.onnx", [], [helper.make_node("Constant", [], ["y"], value=value)], [2])
    return model


def test_info(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "kernels: " in out and "OpenMP threads" in out
    if deformnd.has_ops():
        assert f"C++ core with {cpu.LEVELS[cpu.best_level()]}" in out
    assert out.count(" ok\n") >= 12
    assert "deform_conv_transpose3d" in out and "deform_aggregate3d" in out
    assert "deform_attention, 3-D" in out


def test_info_says_why_the_reference_runs(monkeypatch, capsys):
    monkeypatch.setattr(cpu, "available", lambda: False)
    assert cli.main(["info"]) == 0
    assert "kernels: the reference in plain PyTorch, slower: " in capsys.readouterr().out


def test_info_finds_wrong_kernels(monkeypatch, capsys):
    from deformnd.kernels import reference

    exact = reference.gather
    monkeypatch.setattr(reference, "gather", lambda *args: exact(*args) * 1.001)
    assert cli.main(["info"]) == 1
    assert capsys.readouterr().out.count("WRONG") == 6


def test_info_finds_gradients_that_are_nan(monkeypatch, capsys):
    exact = bench.relative
    calls = itertools.count(1)
    monkeypatch.setattr(bench, "relative", lambda *a: exact(*a) if next(calls) % 3 else math.nan)
    assert cli.main(["info"]) == 1
    assert capsys.readouterr().out.count("WRONG") >= 9


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
        (["rewrite", "model.py", "--out", "new.onnx"], "model.py is no ONNX file"),
        (
            ["rewrite", "words.onnx", "--out", "./words.onnx"],
            "--out words.onnx is the file to read",
        ),
        (["bench", "--shapes", "huge"], "no shape 'huge', expected some of big"),
        (["bench", "--device", "abacus"], "device 'abacus' is not here"),
        (["bench", "--device", "cuda:x"], "device 'cuda:x' is not here"),
        (["bench", "--cold"], "--cold needs --sweep or --models"),
        (["bench", "--seed", "0"], "--seed needs --sweep or --models"),
        (["bench", "--against", "."], "--against needs --sweep or --models"),
        (["bench", "--models", "--shapes", "big"], "--shapes is not for --sweep and --models"),
        (["bench", "--sweep", "1", "--no-memory"], "--no-memory is not for --sweep and --models"),
        (["bench", "--sweep", "1", "--portable"], "--portable leaves out kernels for GPUs"),
        (["bench", "--sweep", "1", "--against", "."], "--against . has no deformnd, expected a so"),
        (["bench", "--plot", "x.nonsense"], "--plot x.nonsense, expected a file of"),
        (["export", "model.py:leaves"], "model.py:leaves does not run: SystemExit: 3"),
        (["export", "model.py:stopped"], "model.py:stopped does not run: KeyboardInterrupt"),
        (
            ["export", "model.py:layer", "--input", "1,4,8,8"],
            "does not take inputs [1, 4, 8, 8]: ValueError: PackedDeformConv2d: input has 4 chan",
        ),
        (
            ["export", "model.py:layer", "--input", "1,3,8,8", "--opset", "99"],
            "cannot be exported for target 'onnxruntime' at opset 99: torch",
        ),
        *(
            (["export", "model.py:another", "--weights", file], message)
            for file, message in (
                ("model.py", "model.py is no checkpoint: "),
                ("empty.pt", "empty.pt is no checkpoint: EOFError"),
                ("ints.pt", "ints.pt holds a dict whose keys are no names, expected a state_dict"),
                ("list.pt", "list.pt holds a list, expected a state_dict"),
                ("other.pt", "other.pt does not fit the model: "),
            )
        ),
        (["check", "empty.pt"], "empty.pt is no ONNX file: it holds no graph"),
        (["check", "typed.onnx"], "input x has an unknown type 77"),
        (["check", "words.onnx"], "input x has type string, expected floats, ints or bools"),
        (["check", "shapeless.onnx"], "input x has no shape in the file: give it by --input"),
        (["check", "sequence.onnx"], "input x is a sequence_type, expected a tensor"),
        (["check", "negative.onnx"], "x [-1, 3] has size -1 on axis 0, expected at least 0"),
        (["check", "negative.onnx", "--input", "1,3"], "x [-1, 3] has size -1 on axis 0"),
        (["check", "huge.onnx"], "would be [100000, 200000], 75 GiB, expected at most"),
        (["check", "fine.onnx", "--input", "1,4,8,8"], "does not fit input x [batch, 3, height, w"),
        (["check", "fine.onnx", "--size", "30000"], "10 GiB, expected at most 268435456 values"),
        (["check", "fine.onnx", "--weights", "empty.pt"], "--weights are those of a --model"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_usage_errors(files, capsys, arguments, message):
    if arguments[0] != "bench":
        pytest.importorskip("onnxscript")
    before = sorted(files.iterdir())
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert message in err and "Traceback" not in out + err
    assert err.startswith(f"deformnd {arguments[0]}: ") and err.count("\n") == 1
    after = sorted(p for p in files.iterdir() if p.name != "__pycache__")
    assert after == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "x.onnx", "--size", "abc"], "argument --size: 'abc' is no whole number"),
        (["bench", "--seconds", "-1"], "argument --seconds: '-1' is no positive number of seconds"),
        (["bench", "--seconds", "nan"], "argument --seconds: 'nan' is no positive number of sec"),
        (["bench", "--sweep", "0"], "argument --sweep: 0 is not from 1 to 1000000"),
        (["bench", "--threads", "0"], "argument --threads: 0 is not from 1 to 1024"),
        (["bench", "--json", "nowhere/x.json"], "there is no folder 'nowhere'"),
        (["demo", "--seed", str(2**64)], "argument --seed: 18446744073709551616 is not from"),
        (["export", "model.py:layer", "--opset", "0"], "argument --opset: 0 is not from 1 to"),
        (["export", "model.py:layer", "--out", "."], "argument --out: '.' is a folder"),
        (["export", "model.py:layer", "--input", "1,3,100000,100000"], "has more than 268435456"),
        ([], "the following arguments are required: COMMAND"),
        (["exprot"], "invalid choice: 'exprot'"),
        (["export"], "the following arguments are required: MODEL.py:FACTORY"),
        (["info", "--nonsense\n"], "unrecognized arguments: --nonsense;"),
        (
            ["bench", "--dtypes", "float16", "float32"],
            "deformnd bench: unrecognized arguments: float32; see deformnd bench --help",
        ),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_values_that_argparse_refuses(model, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("deformnd") and err.count("\n") == 1
    assert [p.name for p in model.iterdir()] == ["model.py"]


def test_demo_leaves_no_folder(model, capsys):
    for name in ("matplotlib", "onnxruntime", "sklearn", "tqdm"):
        pytest.importorskip(name)
    for device in ("nonsense", "meta"):
        assert cli.main(["demo", "--device", device, "--out", "out"]) == 2
        assert f"--device {device!r} is not here: " in capsys.readouterr().err
    assert cli.main(["demo", "--out", "model.py/out"]) == 2
    assert "--out model.py/out is no folder" in capsys.readouterr().err
    assert [p.name for p in model.iterdir()] == ["model.py"]


@pytest.mark.parametrize("name", ["same", "near", "far", "finite", "infinite", "nans"])
def test_check_of_what_is_not_finite(files, capsys, name):
    """NaN and infinities must be the same ones, and the rest is compared without them."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    code = cli.main(["check", "notfinite.onnx", "--model", f"model.py:{name}"])
    out = capsys.readouterr().out
    (line,) = [s for s in out.splitlines() if s.startswith("onnxruntime against torch: ")]
    said = {"same": "0.0e+00 of the", "near": "5.0e-04 of the", "far": "4.8e-02 of the"}
    assert said.get(name, "inf of the") in line
    right = name in ("same", "near")
    assert line.endswith("ok" if right else "DIFFERS") and code == (not right)


def test_export_of_a_number(model, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert cli.main(["export", "model.py:item", "--input", "1,3,8,8"]) == 1
    err = capsys.readouterr().err
    assert "the model returns a float, expected tensors\n" in err and err.count("\n") == 1
    assert not (model / "item.onnx").exists()


def test_python_m_in_the_folder_of_a_file_named_as_a_package(model):
    """The folder is on sys.path first: that file is not the package, its neighbours are found."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    (model / "onnx.py").write_text("from model import layer as build\n")
    # Found before a module elsewhere, as for a script.
    (model / "plain.py").write_text("from tabnanny import layer as build\n")
    (model / "tabnanny.py").write_text(MODEL)
    source = str(Path(deformnd.__file__).parent.parent)
    command = [sys.executable, "-m", "deformnd", "export", "--input", "1,3,8,8", "--out", "o.onnx"]
    for spec in ("onnx.py:build", "plain.py:build", "model:layer"):
        environment = {**os.environ, "PYTHONPATH": source}
        done = subprocess.run(
            [*command, spec], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (spec, done.stderr)


def test_model_files_named_as_modules(model, capsys):
    """They are the user's model, and not the module for anyone else."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    for name in ("onnx", "copy", "openvino"):
        (model / f"{name}.py").write_text(f"from sibling import layer as build\n{MODEL}")
    (model / "sibling.py").write_text(MODEL)
    for name in ("onnx", "copy", "openvino"):
        arguments = ["export", f"{name}.py:build", "--input", "1,3,8,8", "--out", "o.onnx"]
        assert cli.main(arguments) == 0, capsys.readouterr().err
        assert cli.main(["check", "o.onnx", "--model", f"{name}.py:build"]) == 0
    import copy

    assert copy.deepcopy([1]) == [1]


def test_check_shows_open_axes_and_stops_in_time(files, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    assert cli.main(["check", "fine.onnx", "--size", "9"]) == 0
    out = capsys.readouterr().out
    assert "input x: float32 [1, 3, 9, 9], in the file [batch, 3, height, width]" in out
    # OpenVINO takes minutes to compile this.
    assert cli.main(["check", "deep.onnx", "--seconds", "15"]) == 0
    out = capsys.readouterr().out
    assert "does not run it: it took more than 15 s" in out and "onnxruntime" in out
    assert cli.main(["check", "constant.onnx"]) == 0


def test_wrong_shape_is_a_usage_error(model, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["export", "model.py:layer", "--input", "1,three"])
    assert caught.value.code == 2
    assert "'1,three' is no shape" in capsys.readouterr().err


def test_bench_names_a_peer_that_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(bench, "has", lambda peer: peer == "deformnd")
    for more in (["--shapes", "tiny"], ["--sweep", "1"]):
        assert cli.main(["bench", "--peers", "deformnd,torchvision", *more]) == 2
        assert "--peers torchvision: it is not installed here" in capsys.readouterr().err


def test_bench_lists_paddings_as_they_are(capsys):
    assert cli.main(["bench", "--list"]) == 0
    said = capsys.readouterr().out
    assert "padding -" not in said and "kernel 7" in said and "padding 3" in said


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
