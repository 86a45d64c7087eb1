"""Programs of torch.export for other converters, and OpenVINO's, which is the one that runs here.

Without torchvision, an operator of its schema stands in for it where torch runs a program.
"""

import sys

import openvino
import pytest
import torch
from torch import nn

import deformnd
import deformnd.export
from cases import AGGREGATES, CASES, Case, relative_error
from deformnd.export import openvino_extensions, to_core_aten, to_torchvision

DYNAMIC = torch.export.Dim.DYNAMIC
FORWARD = [case for case in CASES if not case.transposed and case.batch]
FORWARD += [
    Case((9,), (3,), stride=2, offset_groups=0, mask_groups=0, groups=2),  # an ordinary one
    Case((5, 6), (3, 3), channels=(6, 6), offset_groups=2, mask_groups=3),
    Case((2, 3, 9), (1, 1, 2), stride=(1, 1, 4)),  # fewer points than the tall image has
    Case((2, 2, 2), (3, 3, 3), padding=4),  # and more
]
AGGREGATED = [case for case in AGGREGATES if case.batch]
TRANSPOSED = [case for case in CASES if case.transposed and case.batch]
# What is decomposed is the reference, and takes long to export.
SOME = [FORWARD[1], FORWARD[6], FORWARD[-1], AGGREGATED[3], TRANSPOSED[4]]
EVERY = {
    "torchvision": FORWARD + AGGREGATED[3::4] + TRANSPOSED[4:5],
    "core_aten": SOME,
    "operator": FORWARD + AGGREGATED + TRANSPOSED,
}


class Calls(nn.Module):
    """Many calls, each with its own input, offset and mask; weight and bias are constants."""

    def __init__(self, cases, dtype=torch.float32):
        super().__init__()
        self.cases, self.tensors = cases, [case.tensors(dtype) for case in cases]

    @property
    def args(self):
        keys = ("input", "offset", "mask")
        return tuple(t[k] for t in self.tensors for k in keys if t[k] is not None)

    def forward(self, *args):
        args, results = list(args), []
        for case, tensors in zip(self.cases, self.tensors, strict=True):
            given = {k: args.pop(0) for k in ("input", "offset", "mask") if tensors[k] is not None}
            results.append(case.call({**tensors, **given}))
        return tuple(results)

    def exact(self):
        return [
            case.call({k: None if t is None else t.double() for k, t in tensors.items()})
            for case, tensors in zip(self.cases, self.tensors, strict=True)
        ]


def converted(kind, program):
    """The program as `kind` has it, and what runs it in OpenVINO."""
    extension = None
    if kind == "operator":
        extension = openvino_extensions()
    else:
        program = {"torchvision": to_torchvision, "core_aten": to_core_aten}[kind](program)
    model = openvino.convert_model(program, extension=extension)
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(args):
        return [torch.from_numpy(t.copy()) for t in compiled([a.numpy() for a in args]).values()]

    return program, run


def namespaces(program):
    return {str(n.target).split(".")[0] for n in program.graph.nodes if n.op == "call_function"}


@pytest.mark.parametrize("kind", EVERY)
def test_every_case(kind, torchvision_operator):
    cases = EVERY[kind]
    model = Calls(cases).eval()
    given = torch.export.export(model, model.args)
    program, run = converted(kind, given)
    assert "deformnd" in namespaces(given)
    expected = {"torchvision": {"aten", "torchvision"}, "core_aten": {"aten"}}
    assert namespaces(program) - {"_operator"} == expected.get(kind, namespaces(given))
    exact = model.exact()
    for results in (program.module()(*model.args), run(model.args)):
        for case, result, right in zip(cases, results, exact, strict=True):
            assert relative_error(result, right) < 2e-6, case


@pytest.mark.parametrize("kind", ["torchvision", "operator"])
def test_open_sizes(kind, torchvision_operator):
    torch.manual_seed(0)
    layer = deformnd.PackedDeformConv2d(3, 4, 3, stride=2, padding=1, modulated=True).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    sizes = ({0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC},)
    x = torch.rand(2, 3, 8, 9)
    program, run = converted(kind, torch.export.export(layer, (x,), dynamic_shapes=sizes))
    for args in ((x,), (torch.rand(3, 3, 12, 7),)):
        right = layer.double()(args[0].double())
        layer.float()
        for result in (program.module()(*args), run(args)[0]):
            assert relative_error(result, right) < 2e-6


class Volume(nn.Module):
    def forward(self, x, weight, offset):
        return deformnd.deform_conv3d(x, weight, offset)


@pytest.mark.parametrize("depth", [4, 300, None])
def test_a_tall_image_has_its_limits(depth, torchvision_operator):
    """Where positions in it are too coarse, or its height is not known, the reference stands in."""
    size = depth or 4
    args = (torch.rand(1, 2, size, 3, 4), torch.rand(2, 2, 2, 2, 2))
    args += (torch.randn(1, 24, size - 1, 2, 3),)
    dynamic = None if depth else ({2: DYNAMIC}, None, {2: DYNAMIC})
    program = to_torchvision(torch.export.export(Volume(), args, dynamic_shapes=dynamic))
    assert ("torchvision" in namespaces(program)) == (depth == 4)
    assert relative_error(program.module()(*args), Volume()(*(a.double() for a in args))) < 1e-6


class Plane(nn.Module):
    def forward(self, x, weight, offset):
        return deformnd.deform_conv2d(x, weight, offset, padding=1)


@pytest.mark.parametrize("kind", ["torchvision", "operator"])
def test_odd_positions_sample_zero(kind, torchvision_operator):
    args = (torch.rand(1, 3, 6, 6), torch.rand(4, 3, 3, 3), torch.randn(1, 18, 6, 6))
    for value, channel in ((torch.nan, 0), (torch.inf, 1), (-torch.inf, 5), (1e30, 8), (-1e30, 15)):
        args[2][0, channel, ::2] = value
    program, run = converted(kind, torch.export.export(Plane(), args))
    right = Plane()(*args).double()
    assert right.isfinite().all()
    for result in (program.module()(*args), run(args)[0]):
        assert relative_error(result, right) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype, torchvision_operator):
    """Half ones are computed in float32, and mixed ones in the widest."""
    args = (torch.rand(1, 2, 5, 6), torch.rand(3, 2, 3, 3)), torch.randn(1, 18, 5, 6)
    args = (*(a.to(dtype) for a in args[0]), args[1])
    program = to_torchvision(torch.export.export(Plane(), args))
    result, right = program.module()(*args), Plane()(*args)
    assert result.dtype == dtype
    assert relative_error(result, right) < {torch.float64: 1e-12}.get(dtype, 1e-2)


class Attention(nn.Module):
    def forward(self, value, locations, weights):
        return deformnd.deform_attention(value, [(4, 5), (2, 3)], locations, weights)


def test_attention():
    torch.manual_seed(0)
    args = (torch.rand(2, 26, 2, 8), 1.4 * torch.rand(2, 7, 2, 2, 3, 2) - 0.2)
    args += (torch.rand(2, 7, 2, 2, 3),)
    program = torch.export.export(Attention(), args)
    right = Attention()(*(a.double() for a in args))
    for result in (
        converted("operator", program)[1](args)[0],
        to_core_aten(program).module()(*args),
    ):
        assert relative_error(result, right) < 1e-6


def test_a_saved_model_of_the_operator(tmp_path):
    layer = deformnd.PackedDeformConv2d(3, 8, 3, padding=1, modulated=True).eval()
    x = torch.rand(1, 3, 16, 16)
    program = torch.export.export(layer, (x,))
    model = openvino.convert_model(program, extension=openvino_extensions())
    openvino.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)
    core = openvino.Core()
    core.add_extension(openvino_extensions())
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(tmp_path / "model.xml"), "CPU", config)
    assert relative_error(torch.from_numpy(compiled(x.numpy())[0]), layer(x)) < 1e-6


def test_the_operator_checks_sizes():
    args = (torch.rand(1, 3, 6, 6), torch.rand(4, 3, 3, 3), torch.randn(1, 18, 6, 6))
    program = torch.export.export(Plane(), args)
    model = openvino.convert_model(program, extension=openvino_extensions())
    wanted = r"deform_conv2d: input has 4 channels, expected 3 \(weight.shape"
    with pytest.raises(ValueError, match=wanted):
        model.reshape({0: [1, 4, 6, 6], 1: [4, 3, 3, 3], 2: [1, 18, 6, 6]})


def test_onnx_by_torch_alone():
    """onnxscript writes torchvision's operator as DeformConv."""
    pytest.importorskip("torchvision")
    layer = deformnd.PackedDeformConv1d(3, 8, 3, padding=1).eval()
    program = to_torchvision(torch.export.export(layer, (torch.rand(1, 3, 16),)))
    found = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=20)
    assert "DeformConv" in {node.op_type for node in found.model.graph}


def test_errors(monkeypatch):
    layer = deformnd.PackedDeformConv2d(3, 8, 3)
    for function in (to_torchvision, to_core_aten):
        with pytest.raises(
            TypeError,
            match=rf"export\.{function.__name__}: program is a PackedDeformConv2d, expected",
        ):
            function(layer)
    for name in ("openvino", "openvino.frontend.pytorch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="needs OpenVINO: pip install openvino"):
        openvino_extensions()


def test_without_torchvision(monkeypatch):
    if hasattr(torch.ops.torchvision, "deform_conv2d"):
        pytest.skip("its operator is registered here")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    program = torch.export.export(deformnd.PackedDeformConv2d(3, 8, 3), (torch.rand(1, 3, 8, 8),))
    with pytest.raises(ImportError, match="to_torchvision needs torchvision, whose operator"):
        to_torchvision(program)
