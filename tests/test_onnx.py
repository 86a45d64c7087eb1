"""Exported models, run by the real engines: ONNX Runtime and OpenVINO.

An export takes most of a second, so most tests export many calls as one model.
"""

import dataclasses
import gc
import itertools
import os
import random
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from torch import nn

import deformnd
import deformnd.onnx
from cases import AGGREGATES, CASES, Case, aggregate, relative_error
from deformnd.onnx import UnsupportedError, check, export

ENGINES = ("onnxruntime", "openvino")
# The files of the other targets are made of the same lowerings: test_onnx_targets.py.
TARGETS = {
    name: deformnd.onnx.TARGETS[name]
    for name in ("onnxruntime", "openvino", "standard", "precise", "deformnd")
}
CORE = openvino.Core()
# Relative to float64; GridSample's positions are normalised by the size of the image.
BOUND = dict.fromkeys(TARGETS, 1e-6) | {"standard": 4e-6}
DYNAMIC = torch.export.Dim.DYNAMIC


def engines(target):
    """Those that run the files of a target as they are."""
    # OpenVINO knows no local functions.
    only = {"onnxruntime": ("onnxruntime",), "deformnd": ("onnxruntime", "deformnd")}
    return only.get(target, ENGINES)


def load(engine, path):
    """The file as a function of its inputs."""
    if engine != "openvino":
        if engine == "deformnd":
            session = deformnd.onnx.session(path)
        else:
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]
    else:
        model = CORE.read_model(path) if isinstance(path, (str, os.PathLike)) else path
        compiled = CORE.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def call(args):
        arrays = [a.detach().numpy() for a in args if a is not None]
        if engine != "openvino":
            outputs = session.run(None, dict(zip(names, arrays, strict=True)))
        else:
            outputs = [a.copy() for a in compiled(arrays).values()]
        return [torch.from_numpy(a) for a in outputs]

    return call


def run(engine, path, args):
    return load(engine, path)(args)


class Calls(nn.Module):
    """Many calls, each with its own input, offset and mask; weight and bias are parameters."""

    def __init__(self, cases, dtype=torch.float32):
        super().__init__()
        self.cases, self.args, self.parameter_list = cases, [], nn.ParameterList()
        for case in cases:
            t = case.tensors(dtype)
            self.args += [t["input"], t["offset"], t["mask"]]
            self.parameter_list += [t[k] for k in ("weight", "bias") if t.get(k) is not None]

    def forward(self, *args):
        args, parameters, results = list(args), list(self.parameter_list), []
        for case in self.cases:
            tensors = dict(zip(("input", "offset", "mask"), args[:3], strict=True))
            if not case.aggregate:
                tensors["weight"] = parameters.pop(0)
                tensors["bias"] = parameters.pop(0) if case.bias else None
            results.append(case.call(tensors))
            del args[:3]
        return tuple(results)

    def exact(self, args=None):
        """In float64."""
        args = [a if a is None else a.double() for a in args or self.args]
        before = [parameter.dtype for parameter in self.parameter_list]
        results = [r.detach() for r in self.double()(*args)]
        self.to(before[0] if before else torch.float32)
        return results


def save(model, path, target, **options):
    options = {"verify": False, "verbose": False, **options}
    program = export(model, tuple(model.args), path, target=target, **options)
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    assert all(node.name for node in proto.graph.node)
    return program, proto


MORE = [
    Case(size, (3,) * len(size), padding=1, stride=2, offset_groups=0, mask_groups=0, groups=2)
    for size in ((9,), (6, 7), (4, 5, 3))  # neither: an ordinary convolution
] + [
    Case((5, 6), (3, 3), channels=(6, 6), offset_groups=2, mask_groups=3),
    Case((5, 6), (3, 2), padding=1, channels=(128, 6), groups=2, offset_groups=2),  # long rows
]
AGGREGATED = [c for c in AGGREGATES if c.batch]
AGGREGATED += [aggregate((9,), (3,), 2, offset_groups=0, mask_groups=0, stride=2)]
FORWARD = [c for c in CASES if not c.transposed and c.batch] + MORE
TRANSPOSED = [c for c in CASES if c.transposed and c.batch]
TRANSPOSED += [dataclasses.replace(c, transposed=True) for c in MORE[:4]]


# All targets share one lowering of the transpose.
@pytest.mark.parametrize(
    ("cases", "target"),
    [
        *((FORWARD, target) for target in TARGETS),
        *((AGGREGATED, target) for target in TARGETS),
        (TRANSPOSED, "onnxruntime"),
        (TRANSPOSED, "deformnd"),
    ],
    ids=[
        *TARGETS,
        *(f"aggregated-{target}" for target in TARGETS),
        "transposed",
        "transposed-deformnd",
    ],
)
def test_every_case(cases, target, tmp_path):
    model = Calls(cases)
    _, proto = save(model, tmp_path / "model.onnx", target)
    native = {"onnxruntime": "DeformConv", "openvino": "DeformableConv2D"}.get(target)
    if native and cases is FORWARD:
        nodes = [n.op_type for n in proto.graph.node]
        deformable = [c for c in FORWARD if c.offset_groups or c.mask_groups]
        # OpenVINO gathers in 1-D.
        assert nodes.count(native) == sum(target == "onnxruntime" or c.n > 1 for c in deformable)
    exact = model.exact()
    for engine in ENGINES if (cases, target) == (TRANSPOSED, "onnxruntime") else engines(target):
        results = run(engine, tmp_path / "model.onnx", model.args)
        for case, got, expected in zip(cases, results, exact, strict=True):
            assert got.dtype == torch.float32
            # The sums of an aggregation are short, and average less.
            bound = BOUND[target] * (1 + case.aggregate)
            assert relative_error(got, expected) < bound, (engine, str(case))


@pytest.mark.parametrize("target", TARGETS)
def test_an_empty_batch(target, tmp_path):
    """ONNX Runtime only: OpenVINO divides by zero at sizes of zero that are known beforehand."""
    cases = [
        Case(size, (2,) * len(size), batch=0, groups=groups, transposed=transposed)
        for size, groups in (((5,), 1), ((4, 5), 2), ((3, 4, 3), 1))
        for transposed in (False, True)
    ]
    cases.append(Case((4, 5), (2, 2), batch=0, channels=(128, 6), groups=2))
    model = Calls(cases)
    save(model, tmp_path / "model.onnx", target)
    results = run("onnxruntime", tmp_path / "model.onnx", model.args)
    assert [r.shape for r in results] == [r.shape for r in model(*model.args)]


def test_openvino_is_not_given_an_empty_batch(tmp_path):
    """It would take the process along; a batch that is open may be empty."""
    model = deformnd.PackedDeformConv1d(4, 2, 3, padding=1).eval()
    path = tmp_path / "model.onnx"
    with pytest.raises(
        ValueError, match=r"openvino \S+ does not run .*shape \[0,4,6\].* fixed at 0"
    ):
        export(model, torch.rand(0, 4, 6), path, target="openvino", verbose=False)
    assert not path.exists()
    open_batch = {"dynamic_shapes": ({0: "batch"},), "verbose": False}
    export(model, torch.rand(2, 4, 6), path, target="openvino", **open_batch)
    assert check(path, model, torch.rand(0, 4, 6), engine="openvino") == 0


class Network(nn.Module):
    """Both operators of a rank with all that a model puts around them."""

    def __init__(self, n):
        super().__init__()
        conv = getattr(deformnd, f"PackedDeformConv{n}d")
        transpose = getattr(deformnd, f"PackedDeformConvTranspose{n}d")
        self.first = nn.Sequential(
            conv(3, 6, 3, padding=1, modulated=True, offset_groups=3),
            getattr(nn, f"BatchNorm{n}d")(6),
            nn.ReLU(),
        )
        self.residual = nn.Identity()
        if n < 3:
            self.residual = nn.Sequential(
                conv(6, 6, 3, padding=1, groups=2, offset_groups=2),
                conv(6, 6, 3, padding=1, deformable=False, modulated=True),
                conv(6, 6, 3, padding=1, deformable=False),
            )
        softmax = {"modulated": True, "mask_activation": "softmax", "mask_groups": 2}
        self.down = conv(6, 4, 2, 2, 1, **softmax)
        self.up = transpose(4, 6, 2, 2, 1, groups=2, offset_groups=2, modulated=True)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x):
        x = self.first(x)
        return self.up(self.down(x + self.residual(x)))


@pytest.mark.parametrize(
    ("target", "n"),
    [*itertools.product(TARGETS, (2, 3)), ("onnxruntime", 1), ("standard", 1), ("precise", 1)],
)
def test_a_network_with_dynamic_sizes(target, n, tmp_path):
    torch.manual_seed(0)
    model, path = Network(n).eval(), tmp_path / "model.onnx"
    x = torch.randn(2, 3, *(12, 9, 8)[:n])
    sizes = (dict.fromkeys((0, *range(2, 2 + n)), DYNAMIC),)
    options = {"dynamic_shapes": sizes, "verify": False, "verbose": False}
    export(model, (x,), path, target=target, **options)
    for engine in engines(target):
        loaded = load(engine, path)
        for batch, grown in ((3, 5), (0, 1)):
            if batch or engine != "openvino":
                x = torch.randn(batch, 3, *(s + grown for s in (12, 9, 8)[:n]))
                (got,) = loaded((x,))
                expected = model(x).detach()
                assert got.shape == expected.shape
                assert not batch or relative_error(got, expected) < 10 * BOUND[target]


def test_unbatched_and_same(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.even = deformnd.PackedDeformConv2d(3, 4, (2, 3), padding="same")
            self.up = deformnd.PackedDeformConvTranspose2d(4, 4, 2, 2)
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.3)

        def forward(self, x):
            return self.up(self.even(x))

    model, args = Model().eval(), (torch.randn(3, 6, 7),)
    export(model, args, tmp_path / "m.onnx", target="openvino", verbose=False)
    exact = model.double()(*(a.double() for a in args)).detach()
    for engine in ENGINES:
        assert relative_error(run(engine, tmp_path / "m.onnx", args)[0], exact) < 1e-6


SOME = [
    Case((7,), (3,), padding=1, groups=2),
    Case((6, 7), (3, 3), padding=1, offset_groups=2, mask_groups=4),
    Case((5, 6), (1, 3), stride=(2, 1), padding=(0, 1), offset_groups=2, mask_groups=0),
    Case((4, 5, 3), (2, 3, 2), padding=1),
    Case((6, 7), (3, 2), padding=1, transposed=True),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("target", TARGETS)
def test_dtypes(target, dtype, tmp_path):
    model = Calls(SOME, dtype)
    save(model, tmp_path / "model.onnx", target)
    exact = model.exact()
    # Coordinates in float32 also of a float16 model; OpenVINO computes float64 in float32.
    bound = {
        (torch.float16, "onnxruntime"): 5e-4,
        (torch.float16, "openvino"): 5e-4,
        (torch.float64, "onnxruntime"): 1e-14,
        (torch.float64, "openvino"): BOUND[target],
    }
    bound |= {(dtype, "deformnd"): bound[dtype, "onnxruntime"] for dtype, _ in bound}
    for engine in engines(target):
        for case, got, e in zip(
            SOME, run(engine, tmp_path / "model.onnx", model.args), exact, strict=True
        ):
            assert got.dtype == dtype
            assert relative_error(got, e) < bound[dtype, engine], (engine, str(case))


@pytest.mark.parametrize("target", TARGETS)
def test_offsets_that_are_not_finite_or_huge(target, tmp_path):
    model = Calls(SOME)
    save(model, tmp_path / "model.onnx", target)
    loaded = {engine: load(engine, tmp_path / "model.onnx") for engine in engines(target)}
    for bad in (1e4, 3e9, 3e38, float("inf"), -float("inf"), float("nan")):
        args = [None if a is None else a.clone() for a in model.args]
        for offset in args[1::3]:
            offset.view(-1)[::7] = bad
        exact = model.exact(args)
        for engine, call in loaded.items():
            for case, got, expected in zip(SOME, call(args), exact, strict=True):
                assert relative_error(got, expected) < BOUND[target], (engine, bad, str(case))


def newest_opset():
    return torch.onnx._constants.ONNX_MAX_OPSET


@pytest.mark.parametrize("target", TARGETS)
def test_opsets(target, tmp_path):
    model = Calls([SOME[1], SOME[4]])
    exact = model.exact()
    oldest = TARGETS[target].oldest
    # One lowering serves all opsets, converted by the exporter; every target has the transpose's.
    every = target == "onnxruntime"
    for opset in range(oldest, newest_opset() + 1) if every else (oldest, newest_opset()):
        path = tmp_path / f"{opset}.onnx"
        _, proto = save(model, path, target, opset=opset)
        assert {o.domain: o.version for o in proto.opset_import}[""] == opset
        for engine in engines(target):
            for got, expected in zip(run(engine, path, model.args), exact, strict=True):
                assert relative_error(got, expected) < BOUND[target], (engine, opset)


def test_what_cannot_be_exported_says_so(tmp_path):
    path = tmp_path / "model.onnx"
    for target, opset in (("onnxruntime", 18), ("openvino", 18), ("standard", 17), ("precise", 17)):
        with pytest.raises(UnsupportedError) as caught:
            save(Calls(SOME[:1]), path, target, opset=opset)
        assert "deform_conv1d cannot be exported for" in str(caught.value)
        assert f"target '{target}' at opset {opset}: it needs opset" in str(caught.value)
    with pytest.raises(UnsupportedError, match=r"deform_conv2d .* bfloat16 .*model\.float\(\)"):
        save(Calls(SOME[1:2], torch.bfloat16), path, "precise")
    with pytest.raises(ValueError, match="target is 'abacus', expected one of 'onnxruntime'"):
        save(Calls(SOME[:1]), path, "abacus")
    assert not path.exists()


def test_verify_removes_a_wrong_file(tmp_path, capsys):
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    path, args = tmp_path / "model.onnx", (torch.rand(2, 3),)
    with pytest.raises(ValueError, match=r"model\.onnx in onnxruntime differs from torch by"):
        export(Noise(), args, path)
    assert not path.exists()
    export(nn.ReLU(), args, path)
    assert "differs from torch by 0.0e+00 of its largest value in onnxru" in capsys.readouterr().out
    assert check(path, nn.ReLU(), args, engine="openvino") == 0
    with pytest.raises(ValueError, match=r"differs from torch by .* expected at most 1e-03"):
        check(path, nn.Sigmoid(), args)
    with pytest.raises(ValueError, match=r"returns shape \[2, 3\], expected \[6\]"):
        check(path, nn.Flatten(0), args)


def test_names_and_shapes_as_of_torch(tmp_path, capsys):
    """A bare tensor, f= and opset_version=, as torch.onnx.export takes them."""
    layer, x = deformnd.PackedDeformConv2d(3, 4, 3, padding=1).eval(), torch.rand(1, 3, 8, 8)
    path = tmp_path / "model.onnx"
    export(layer, x, f=path, opset_version=21)
    assert "opset 21; differs from torch by" in capsys.readouterr().out
    assert {o.domain: o.version for o in onnx.load(path).opset_import}[""] == 21
    assert check(path, layer, x) < 1e-5
    export(layer, ({"input": x},), path, dynamo=True, verbose=False)
    with pytest.warns(UserWarning, match="the model is in training mode"):
        export(layer.train(), x, path, verbose=False)


class Returns(nn.Module):
    """Of its input, whatever a function makes."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.eval()

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    "error, options, message",
    [
        (TypeError, {"path": None}, "path is None, expected the name of a file to write"),
        (ValueError, {"path": "."}, "path '.' is a folder, expected a file to write"),
        (ValueError, {"path": "none/m.onnx"}, "path is 'none/m.onnx', but there is no folder 'no"),
        (TypeError, {"f": "m.onnx"}, "both path and f are given"),
        (TypeError, {"args": [3]}, "args is a list, expected a tuple of inputs or a tensor"),
        (TypeError, {"kwargs": 3}, "kwargs is a int, expected inputs by name"),
        (TypeError, {"model": 3}, "model is a int, expected a Module or ExportedProgram"),
        (TypeError, {"opset": "20"}, "opset is '20', expected an int"),
        (UnsupportedError, {"opset": 99}, "at opset 99: torch"),
        (ValueError, {"opset": 99}, "at opset 99: torch"),
        (ValueError, {"dynamo": False}, "dynamo is False, expected True"),
        (TypeError, {"dynamic_shapes": "batch"}, "dynamic_shapes is a str, expected a tuple"),
        *(
            (ValueError, {"dynamic_shapes": shapes}, "dynamic_shapes does not fit the inputs: ")
            for shapes in ({"y": {0: "b"}}, ({7: "b"},), ({0: 1.5},), ({0: "b"},) * 2)
        ),
        (TypeError, {"foo": 1}, "unexpected argument 'foo'"),
        (TypeError, {"input_names": 3}, "input_names is 3, expected a list of names"),
        (TypeError, {"output_names": [3]}, "output_names is [3], expected a list of names"),
        *(
            (ValueError, {"model": Returns(f)}, message)
            for f, message in (
                (lambda x: x.sum().item(), "the model returns a float, expected tensors"),
                (lambda x: (x, None, 3), "the model returns a int, expected tensors"),
                (lambda x: (2 * x, {"a": "b"}), "the model returns a str, expected tensors"),
                (lambda x: None, "the model returns no tensor, expected at least one"),
                (lambda x: (), "the model returns no tensor, expected at least one"),
            )
        ),
        (ValueError, {"args": (torch.rand(1, 2, 8, 8),)}, "the model does not take args: Packed"),
    ],
)
def test_arguments_of_export(error, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layer = deformnd.PackedDeformConv2d(3, 4, 3, padding=1).eval()
    given = {"model": layer, "args": (torch.rand(1, 3, 8, 8),), "path": "m.onnx", **options}
    with pytest.raises(error, match=r"deformnd\.onnx: ") as caught:
        export(**given)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_scripted_model(tmp_path):
    """It is not exported, but what its source became can be compared with it."""
    layer, x = nn.Conv2d(3, 4, 3).eval(), torch.rand(1, 3, 8, 8)
    for scripted in (torch.jit.script(layer), torch.jit.trace(layer, x)):
        with pytest.raises(TypeError, match=r"^deformnd\.onnx: model is a torch.jit.ScriptModule"):
            export(scripted, x, tmp_path / "scripted.onnx", verbose=False)
        export(layer, x, tmp_path / "m.onnx", verbose=False)
        assert check(tmp_path / "m.onnx", scripted, x) < 1e-5


def test_an_output_that_is_none(tmp_path):
    model, x = Returns(lambda x: (2 * x, None)).eval(), torch.rand(2, 3)
    export(model, x, tmp_path / "m.onnx", verbose=False)
    assert check(tmp_path / "m.onnx", model, x) == 0
    with pytest.raises(ValueError, match=r"m\.onnx in onnxruntime returns 1 tensors, expected 2"):
        check(tmp_path / "m.onnx", Returns(lambda x: (2 * x, x)), x)


def test_an_engine_that_does_not_load_the_file(tmp_path, capsys, monkeypatch):
    """Another engine's file is right all the same; that of the engine's own target is of no use.

    ONNX Runtime before 1.25 says so of every DeformConv; this one says it of an operator set from
    the future.
    """
    monkeypatch.chdir(tmp_path)
    real = deformnd.onnx.export.__globals__["_check_program"]

    def newer(program, *rest):
        real(program, *rest)
        program.model.opset_imports["nobody.knows"] = 1
        for node in program.model.graph:
            if node.op_type == "Relu":
                node.domain = "nobody.knows"

    monkeypatch.setitem(deformnd.onnx.export.__globals__, "_check_program", newer)
    args = (torch.rand(2, 3),)
    with pytest.raises(ValueError, match=r"onnxruntime [0-9.]+ does not run m\.onnx: "):
        export(nn.ReLU().eval(), args, "m.onnx")
    assert not list(tmp_path.iterdir())
    export(nn.ReLU().eval(), args, "m.onnx", target="precise")
    assert "not compared with torch in onnxruntime (" in capsys.readouterr().out
    assert (tmp_path / "m.onnx").exists()


def test_the_message_of_an_engine_without_deform_conv():
    from deformnd.onnx import engines

    said = engines.reason("onnxruntime", "NOT_IMPLEMENTED : no implementation for\n DeformConv(19)")
    assert "target 'precise' runs in older ones" in said and "\n" not in said


def test_the_transpose_does_not_race(tmp_path):
    """Many offsets meet at each pixel, and many threads."""
    model = Calls([Case((40, 40), (3, 3), padding=1, transposed=True, channels=(8, 8), batch=1)])
    save(model, tmp_path / "model.onnx", "onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 16
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    args = [model.args[0], model.args[1] * 0.1, model.args[2]]
    names = [i.name for i in session.get_inputs()]
    feed = dict(zip(names, (a.numpy() for a in args), strict=True))
    exact = model.exact(args)[0]
    for _ in range(50):
        assert relative_error(torch.from_numpy(session.run(None, feed)[0]), exact) < 1e-6


def test_no_lowering_copies_the_weights(tmp_path):
    cases = [
        Case((5,) * n, (3,) * n, channels=(96, 96), transposed=t) for n in (1, 2, 3) for t in (0, 1)
    ]
    model = Calls(cases)
    weights = sum(p.numel() * 4 for p in model.parameters())
    for target in TARGETS:
        save(model, tmp_path / "model.onnx", target)
        assert os.path.getsize(tmp_path / "model.onnx") < 1.3 * weights, target


def test_a_table_for_those_who_export_themselves(tmp_path):
    model = Calls(SOME[1:2])
    program = torch.onnx.export(
        model,
        tuple(model.args),
        dynamo=True,
        verbose=False,
        opset_version=21,
        custom_translation_table=deformnd.onnx.translation_table("openvino", 21),
    )
    deformnd.onnx.add_function(program)
    program.save(tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    for engine in ENGINES:
        (got,) = run(engine, tmp_path / "model.onnx", model.args)
        assert relative_error(got, model.exact()[0]) < 1e-6


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dynamo", [True, False])
def test_plain_torch_onnx_export_names_ours(dynamo, transposed, tmp_path):
    gc.collect()  # tables of other tests
    model = Calls([Case((6, 7), (3, 3), transposed=transposed)])
    options = {"verbose": False, "dynamo": dynamo}
    with pytest.warns(UserWarning, match=r"call deformnd\.onnx\.export\(model, args, path\) in"):
        with pytest.raises(Exception, match=r"deformnd\S+deform_conv"):
            torch.onnx.export(model, tuple(model.args), tmp_path / "model.onnx", **options)


def test_who_has_the_translations_is_told_nothing(tmp_path, recwarn):
    model = Calls(SOME[1:2])
    torch.jit.trace(model, tuple(model.args))
    torch.export.export(model, tuple(model.args))
    export(model, tuple(model.args), tmp_path / "model.onnx", verbose=False)
    table = deformnd.onnx.translation_table(opset=20)
    options = {"dynamo": True, "verbose": False, "opset_version": 20}
    torch.onnx.export(model, tuple(model.args), custom_translation_table=table, **options)
    assert not [w for w in recwarn if "deformnd.onnx.export" in str(w.message)]


class LearnedMask(nn.Module):
    """Attention with a learned bias beside a deformable layer."""

    def __init__(self):
        super().__init__()
        self.conv = deformnd.PackedDeformConv2d(3, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.bias = nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        x = self.conv(x).flatten(2).mT
        return self.attention(x, x, x, attn_mask=self.bias, need_weights=False)[0]


class Masked(nn.Module):
    """Attention with a mask that is an input."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2).eval()
        self.eval()

    def forward(self, x, mask):
        return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]


def test_a_learned_attention_mask(tmp_path):
    """torch's exporter fails at it while parameters require gradients."""
    model, x = LearnedMask().eval(), torch.rand(2, 3, 4, 4)
    model.attention.in_proj_bias.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    export(model, x, tmp_path / "model.onnx", verbose=False)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert check(tmp_path / "model.onnx", model, x) < 1e-5
    # An input that requires gradients may be the mask, too.
    args = (torch.rand(16, 2, 8), torch.rand(16, 16, requires_grad=True))
    export(Masked(), args, tmp_path / "masked.onnx", verbose=False)
    assert args[1].requires_grad
    with pytest.raises(Exception, match="Failed to export the model"):  # 25 tokens, not 16
        export(model, torch.rand(2, 3, 5, 5), tmp_path / "wrong.onnx", verbose=False)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_parameters_that_cannot_be_frozen(tmp_path):
    """Those of lazy modules have no values yet; those made in inference mode could not go back."""
    with torch.inference_mode():
        layer = deformnd.PackedDeformConv2d(3, 4, 3)
    x = torch.rand(1, 3, 8, 8)
    for model in (layer, deformnd.LazyPackedDeformConv2d(4, 3)):
        export(model.eval(), x, tmp_path / "model.onnx", verbose=False)
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("target", TARGETS)
def test_weights_in_a_file_beside(target, tmp_path, monkeypatch, capsys):
    """By a relative path, from another folder, and moved."""
    monkeypatch.chdir(tmp_path)
    layer, x = deformnd.PackedDeformConv2d(3, 64, 3, padding=1).eval(), torch.rand(1, 3, 8, 8)
    os.mkdir("made")
    export(layer, x, "made/m.onnx", target=target, external_data=True)
    assert "not compared" not in capsys.readouterr().out
    assert os.path.getsize("made/m.onnx.data") >= layer.weight.numel() * 4
    os.rename("made", "moved")
    os.mkdir("elsewhere")
    monkeypatch.chdir("elsewhere")
    for path in ("../moved/m.onnx", str(tmp_path / "moved" / "m.onnx")):
        for engine in engines(target):
            assert check(path, layer, x, engine=engine) < 1e-5
        if target == "onnxruntime":
            (got,) = run("openvino", deformnd.onnx.read_openvino_model(path), (x,))
            assert relative_error(got, layer(x).detach()) < 1e-5


@pytest.mark.parametrize("target", TARGETS)
def test_3d_where_only_the_batch_is_dynamic(target, tmp_path):
    """By the tall image where the target has it, in whose sizes the batch is the one unknown."""
    case = Case((4, 3, 5), (2, 2, 1), offset_groups=2, mask_groups=2, groups=2)

    class Model(nn.Module):
        def forward(self, input, weight, offset, mask, bias):
            output = deformnd.deform_conv3d(input, weight, offset, mask, bias, groups=2)
            return output, deformnd.deform_aggregate3d(input, offset, mask, (2, 2, 1))

    args = [t.float() for t in case.tensors().values()]
    shapes = tuple({0: DYNAMIC} if t.dim() == 5 and i != 1 else None for i, t in enumerate(args))
    path = tmp_path / "model.onnx"
    export(Model(), tuple(args), path, target=target, dynamic_shapes=shapes, verbose=False)
    args = [torch.cat((t, t)) if shape else t for t, shape in zip(args, shapes, strict=True)]
    for engine in engines(target):
        for got, want in zip(run(engine, path, args), Model()(*args), strict=True):
            assert relative_error(got, want) < BOUND[target]


@pytest.mark.parametrize("opset", [19, 22])
def test_reading_plain_files_in_openvino(opset, tmp_path):
    model = Calls([c for c in FORWARD if c.n < 3])
    save(model, tmp_path / "model.onnx", "onnxruntime", opset=opset)
    read = deformnd.onnx.read_openvino_model(tmp_path / "model.onnx")
    for got, expected in zip(run("openvino", read, model.args), model.exact(), strict=True):
        assert relative_error(got, expected) < 1e-6
    bad = [None if a is None else a.clone() for a in model.args]
    for offset in bad[1::3]:
        if offset is not None:
            offset.view(-1)[::5] = float("nan")
    for got, expected in zip(run("openvino", read, bad), model.exact(bad), strict=True):
        assert relative_error(got, expected) < 1e-6


def test_the_file_agrees_with_onnx_own_reference(tmp_path):
    """onnx.reference is a second implementation of DeformConv (slow: one tiny case)."""
    from onnx.reference import ReferenceEvaluator

    model = Calls([Case((3, 4), (2, 2), batch=1, channels=(2, 2), offset_groups=2)])
    for target in TARGETS:
        _, proto = save(model, tmp_path / "model.onnx", target)
        names = [i.name for i in proto.graph.input]
        feed = {name: a.numpy() for name, a in zip(names, model.args, strict=True)}
        got = ReferenceEvaluator(proto).run(None, feed)[0]
        expected = model.exact()[0].numpy()
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5, err_msg=target)


def test_importing_needs_no_engine():
    code = """
import sys
for name in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    sys.modules[name] = None
import deformnd.onnx
for call in (
    deformnd.onnx.translation_table,
    deformnd.onnx.create_deform_conv2d_custom_op,
    lambda: deformnd.onnx.read_openvino_model("x.onnx"),
    lambda: deformnd.onnx.check("x.onnx", None, ()),
    lambda: deformnd.onnx.export(None, (), "x.onnx"),
):
    try:
        call()
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "deformnd.onnx needs onnxscript: pip install 'deformnd[onnx]'",
        "deformnd.onnx needs onnxscript: pip install 'deformnd[onnx]'",
        "read_openvino_model needs OpenVINO: pip install openvino",
        "onnxruntime is not installed",
        "deformnd.onnx needs onnxscript: pip install 'deformnd[onnx]'",
    ]


def sample(rng):
    """A call in the space that deform_conv2d_onnx_exporter's own tests draw from."""
    while True:
        groups, offset_groups = rng.randint(1, 3), rng.randint(1, 3)
        common = np.lcm(groups, offset_groups)
        case = Case(
            size=(rng.randint(100, 300), rng.randint(100, 300)),
            kernel=(rng.randint(1, 7), rng.randint(1, 7)),
            batch=rng.randint(1, 5),
            channels=(int(common) * rng.randint(1, 3), groups * rng.randint(1, 4)),
            stride=(rng.randint(1, 4), rng.randint(1, 4)),
            padding=(rng.randint(0, 4), rng.randint(0, 4)),
            dilation=(rng.randint(1, 3), rng.randint(1, 3)),
            groups=groups,
            offset_groups=offset_groups,
            mask_groups=rng.choice((0, offset_groups)),
            bias=rng.random() < 0.5,
        )
        if min(case.point_size) > 0:
            return case


# By hand: DEFORMND_ONNX_SAMPLES=300 pytest -k existing_exporters_space
@pytest.mark.parametrize("seed", range(int(os.environ.get("DEFORMND_ONNX_SAMPLES", "2"))))
def test_the_existing_exporters_space(seed, tmp_path):
    model = Calls([sample(random.Random(seed))])
    exact = model.exact()[0]
    for target in TARGETS:
        save(model, tmp_path / "model.onnx", target)
        for engine in engines(target):
            (got,) = run(engine, tmp_path / "model.onnx", model.args)
            # Here the images are larger: float32 positions in them are coarser.
            bound = {"precise": 1e-6, "standard": 1e-4}.get(target, 1e-5)
            assert relative_error(got, exact) < bound, (target, engine, str(model.cases[0]))
