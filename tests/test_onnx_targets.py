"""The table of targets, what each writes, and files that are none."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import deformnd
import deformnd.onnx
import random_exports
import test_onnx_attention as attention
from cases import Case, aggregate, relative_error
from deformnd import cli
from deformnd.onnx import TARGETS, UnsupportedError, check, export
from deformnd.onnx.table import ELSEWHERE
from test_onnx import DYNAMIC, Calls, load, run, save

ROOT = Path(__file__).parent.parent
X = torch.rand(1, 3, 4, 4)


def test_the_table_is_what_is_told(capsys):
    page = (ROOT / "docs" / "onnx.md").read_text()
    for name, target in TARGETS.items():
        assert f'| `"{name}"` | {target.line} | {target.oldest} and up |' in page
        assert f'"{name}"' in export.__doc__
        assert target.oldest <= target.opset
    for name in ELSEWHERE:
        assert f'`"{name}"`' in page
    with pytest.raises(SystemExit):
        cli.main(["export", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert ", ".join(list(TARGETS)[:-1]) + f" or {list(TARGETS)[-1]}" in said


def test_unknown_targets(tmp_path, capsys):
    layer = deformnd.PackedDeformConv2d(3, 4, 3).eval()
    for name in ("abacus", "", None):
        with pytest.raises(ValueError, match=f"target is {name!r}, expected one of 'o") as caught:
            export(layer, X, tmp_path / "m.onnx", target=name)
        lines = str(caught.value).splitlines()[1:]
        assert [line.split(":")[0].strip() for line in lines] == [*TARGETS, *ELSEWHERE]
    for name, function in (("coreml", "to_torchvision"), ("litert", "to_core_aten")):
        with pytest.raises(ValueError, match=rf"target '{name}': .*deformnd\.export\.{function}$"):
            export(layer, X, tmp_path / "m.onnx", target=name)
        for command in (["export", "nowhere:x"], ["rewrite", "no.onnx", "--out", "new.onnx"]):
            assert cli.main([*command, "--target", name]) == 2
            assert f"deformnd.export.{function}" in capsys.readouterr().err


CASES = [
    Case((7,), (3,), padding=1),
    Case((6, 7), (3, 3), padding=1, groups=2),
    Case((6, 7), (3, 3), stride=2, padding=1, offset_groups=0, bias=False),
    aggregate((6, 7), (3, 3), 4, padding=1, mask_groups=0),
]
MORE = [
    Case((4, 5, 3), (2, 2, 2), padding=1),
    Case((5, 6), (3, 3), padding=1, offset_groups=2, mask_groups=4),
    Case((6, 7), (3, 2), padding=1, transposed=True),
]


def operators(proto):
    return [node.op_type for node in proto.graph.node]


def test_tensorrt(tmp_path):
    """The standard DeformConv where its parser has it, and nowhere GridSample."""
    model, path = Calls(CASES + MORE), tmp_path / "model.onnx"
    _, proto = save(model, path, "tensorrt")
    assert operators(proto).count("DeformConv") == 4 and "GridSample" not in operators(proto)
    for got, want in zip(run("onnxruntime", path, model.args), model.exact(), strict=True):
        assert relative_error(got, want) < 2e-6
    args = attention.inputs()
    assert "GridSample" not in operators(attention.save(path, args, "tensorrt"))
    for got, want in zip(run("onnxruntime", path, args), attention.exact(args), strict=True):
        assert relative_error(got, want) < 2e-6
    with pytest.raises(UnsupportedError, match="target 'tensorrt' at opset 18: it needs opset 19"):
        save(Calls(CASES[:1]), path, "tensorrt", opset=18)


def test_browsers(tmp_path):
    """The files of both targets are those of "precise"."""
    model, path = Calls(CASES[:2] + MORE[2:]), tmp_path / "model.onnx"
    nodes = [save(model, path, name)[1].graph.node for name in ("precise", "webgpu", "web")]
    assert nodes[0] == nodes[1] == nodes[2]


def test_ncnn(tmp_path):
    """Only what pnnx reads; sizes are open for the other engines that run it."""
    batch_1 = [dataclasses.replace(case, batch=1) for case in CASES]
    model, path = Calls(batch_1), tmp_path / "model.onnx"
    _, proto = save(model, path, "ncnn")
    assert operators(proto).count("GridSample") == 4
    assert not {"Less", "Where", "ScatterElements", "DeformConv"} & set(operators(proto))
    for offset in model.args[1::3]:
        if offset is not None:
            offset.view(-1)[::7] = 3e9
    exact = model.exact()
    for engine in ("onnxruntime", "openvino"):
        for got, want in zip(run(engine, path, model.args), exact, strict=True):
            assert relative_error(got, want) < 4e-6
    for case, reason in (
        (MORE[0], "deform_conv3d .* pnnx has no tensors of five axes in 3-D"),
        (MORE[1], "deform_conv2d .* pnnx takes one group of offsets and of masks"),
        (MORE[2], "deform_conv_transpose2d .* pnnx has no ScatterElements"),
        (aggregate((3, 4, 3), (2, 2, 2), 2), "deform_aggregate3d .* pnnx has no tensors of five"),
    ):
        with pytest.raises(UnsupportedError, match=reason):
            save(Calls([case]), path, "ncnn")
    with pytest.raises(UnsupportedError, match=r"deform_attention .* pnnx has no tensors of six"):
        attention.save(path, attention.inputs(), "ncnn")


@pytest.mark.parametrize("target", ["openvino", "standard", "deformnd", "tensorrt"])
def test_random_exports(target):
    """As many as CI has time for; random_exports.py runs more."""
    done, wrong = random_exports.run(target, "test", 4)
    assert not wrong, "\n".join(wrong)
    assert done == 4


def test_sessions_with_weights_in_a_file_beside(tmp_path, monkeypatch):
    """By a relative path, from another folder, and moved; on deformnd's kernels."""
    monkeypatch.chdir(tmp_path)
    layer = deformnd.PackedDeformConv2d(3, 64, 3, padding=1).eval()
    Path("made").mkdir()
    shapes = ({0: DYNAMIC},)
    options = {"external_data": True, "dynamic_shapes": shapes, "verbose": False}
    export(layer, torch.cat((X, X)), "made/m.onnx", target="deformnd", **options)
    assert Path("made/m.onnx.data").stat().st_size >= layer.weight.numel() * 4
    Path("made").rename("moved")
    (got,) = load("deformnd", "moved/m.onnx")((X,))
    assert relative_error(got, layer(X)) < 1e-6
    for engine in ("onnxruntime", "deformnd"):
        assert check("moved/m.onnx", layer, X, engine=engine) < 1e-5
    (tmp_path / "moved" / "m.onnx.data").write_bytes(bytes(8))
    with pytest.raises(ValueError, match=r"onnxruntime \S+ does not run moved/m\.onnx: "):
        deformnd.onnx.session("moved/m.onnx")


# Files that are wrong


def bad_files():
    """Each by its name, as bytes."""

    def node(kind, inputs, outputs, **attributes):
        return helper.make_node(kind, inputs, outputs, name=outputs[0], **attributes)

    def model(nodes, weights=(), functions=()):
        values = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in (("x", (1, 3, 4, 4)), ("y", None))
        ]
        graph = helper.make_graph(nodes, "g", values[:1], values[1:], initializer=weights)
        opsets = [helper.make_opsetid("", 19), helper.make_opsetid("deformnd", 1)]
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=9, functions=list(functions)
        )

    def conv(**attributes):
        shapes = {"w": (4, 3, 3, 3), "o": (1, 18, 2, 2)}
        weights = [numpy_helper.from_array(np.zeros(s, "f"), name) for name, s in shapes.items()]
        return model([node("DeformConv", ["x", "w", "o"], ["y"], **attributes)], weights)

    def changed(change):
        made = conv()
        change(made.graph)
        return made

    def function(name, called):
        inner = helper.make_node(called, ["x"], ["y"], domain="deformnd")
        opsets = [helper.make_opsetid("deformnd", 1), helper.make_opsetid("", 19)]
        return helper.make_function("deformnd", name, ["x"], ["y"], [inner], opsets)

    def beside(graph):
        weight = graph.initializer[0]
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "no.bin"), ("offset", str(2**62)), ("length", "432")):
            weight.external_data.add(key=key, value=value)

    def calls(*functions):
        return model([node("A", ["x"], ["y"], domain="deformnd")], (), functions)

    def huge(graph):
        graph.initializer[0].dims[0] = 2**40

    def negative(graph):
        graph.initializer[0].dims[0] = -4

    def integers(graph):
        graph.initializer[0].data_type = TensorProto.INT64

    def kind(graph):
        graph.input[0].type.tensor_type.elem_type = 77

    def huge_input(graph):
        graph.input[0].type.tensor_type.shape.dim[2].dim_value = 2**62

    whole = conv().SerializeToString()
    found = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"no model at all",
        **{f.__name__: changed(f) for f in (huge, negative, integers, kind, huge_input, beside)},
        "no groups": conv(group=0),
        "no stride": conv(strides=[0, 0]),
        "huge stride": conv(strides=[2**62, 2**62]),
        "words": conv(dilations="a"),
        "cyclic": model(
            [
                node("Add", ["x", "b"], ["a"]),
                node("Relu", ["a"], ["b"]),
                node("Relu", ["b"], ["y"]),
            ]
        ),
        "functions in a ring": calls(function("A", "B"), function("B", "A")),
        "own without inputs": model([node("DeformConv", [], ["y"], domain="deformnd")]),
    }
    return {k: v if isinstance(v, bytes) else v.SerializeToString() for k, v in found.items()}


class Zeros(nn.Module):
    def forward(self, x):
        return x.new_zeros(1, 4, 2, 2)


def bad_file_errors(folder):
    """Prints what is wrong with the errors; in a process of its own, which may crash."""
    for name, content in bad_files().items():
        path = Path(folder) / f"{name}.onnx"
        path.write_bytes(content)

        def session(path=path):
            found = deformnd.onnx.session(path)
            found.run(None, {found.get_inputs()[0].name: X.numpy()})

        def checked(engine, path=path):
            return lambda: check(path, Zeros().eval(), X, engine=engine)

        ways = {engine: checked(engine) for engine in ("onnxruntime", "openvino", "deformnd")}
        ways["session"] = session
        ways["read"] = lambda path=path: deformnd.onnx.read_openvino_model(path)
        for way, call in ways.items():
            try:
                call()
            except ValueError as error:
                if not re.search(re.escape(path.name), str(error)) or "\n" in str(error):
                    print(f"{name}, {way}: {error}")
            except Exception as error:
                # While a session runs, its errors are ONNX Runtime's.
                if way != "session" or not type(error).__module__.startswith("onnxruntime"):
                    print(f"{name}, {way}: {error!r}")
            else:
                print(f"{name}, {way}: works")
    print("done")


def test_bad_files(tmp_path):
    code = f"from test_onnx_targets import *; bad_file_errors({str(tmp_path)!r})"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    child = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert child.stdout.splitlines() == ["done"], child.stdout + child.stderr[-2000:]


def test_bad_files_on_the_command_line(tmp_path, capsys):
    for name in ("truncated", "text", "empty"):
        (tmp_path / "m.onnx").write_bytes(bad_files()[name])
        assert cli.main(["check", str(tmp_path / "m.onnx")]) == 2
        said = capsys.readouterr().err
        assert "is no ONNX file" in said and said.count("\n") == 1
    (tmp_path / "m.onnx").write_bytes(bad_files()["cyclic"])
    assert cli.main(["check", str(tmp_path / "m.onnx")]) == 1
    assert "no engine runs this file" in capsys.readouterr().err
