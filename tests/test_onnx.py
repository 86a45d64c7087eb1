"""Exported models run in the real ONNX Runtime."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import deformnd
from cases import CASES, Case
from deformnd.onnx import translation_table

CASES_2D = [c for c in CASES if c.n == 2 and not c.transposed]


class Layer(nn.Module):
    """One call, its weight and bias parameters, the other tensors inputs."""

    def __init__(self, case, tensors):
        super().__init__()
        self.case = case
        self.weight = nn.Parameter(tensors["weight"])
        self.bias = None if tensors["bias"] is None else nn.Parameter(tensors["bias"])

    def forward(self, input, offset=None, mask=None):
        return self.case.call(
            {
                "input": input,
                "weight": self.weight,
                "offset": offset,
                "mask": mask,
                "bias": self.bias,
            }
        )


def export(model, args, path, **options):
    options = {"dynamo": True, "verbose": False, "optimize": True, **options}
    torch.onnx.export(model, args, path, custom_translation_table=translation_table(), **options)
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def run(path, args):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    feed = dict(zip(names, [a.detach().numpy() for a in args if a is not None], strict=True))
    return torch.from_numpy(session.run(None, feed)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", [c for c in CASES_2D if c.batch], ids=str)
def test_deform_conv2d(case, dtype, tmp_path):
    tensors = case.tensors(dtype)
    model = Layer(case, tensors).eval()
    args = (tensors["input"], tensors["offset"], tensors["mask"])
    proto = export(model, args, tmp_path / "model.onnx")
    assert [n.op_type for n in proto.graph.node].count("DeformConv") == 1
    got = run(tmp_path / "model.onnx", args)
    expected = model(*args)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_network_with_dynamic_sizes(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        deformnd.PackedDeformConv2d(3, 8, 3, padding=1, modulated=True, offset_groups=3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        deformnd.PackedDeformConv2d(
            8, 4, 3, 2, 1, modulated=True, mask_groups=4, offset_groups=2, mask_activation="softmax"
        ),
        deformnd.PackedDeformConv2d(4, 4, 3, padding=1, deformable=False, modulated=True),
        deformnd.PackedDeformConv2d(4, 4, 3, padding=1, deformable=False),
    ).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    sizes = (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),)
    path = tmp_path / "model.onnx"
    proto = export(model, (torch.randn(2, 3, 16, 20),), path, dynamic_shapes=sizes)
    assert [n.op_type for n in proto.graph.node].count("DeformConv") == 3
    for size in ((2, 3, 16, 20), (1, 3, 22, 18), (5, 3, 9, 31)):
        x = torch.randn(size)
        torch.testing.assert_close(run(path, (x,)), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "case",
    [Case((9,), (3,)), Case((4, 5, 3), (2, 3, 2)), Case((6, 7), (3, 3), transposed=True)],
    ids=str,
)
def test_what_cannot_be_exported_says_so(case, tmp_path):
    tensors = case.tensors(torch.float32)
    args = (tensors["input"], tensors["offset"], tensors["mask"])
    with pytest.raises(Exception) as caught:
        export(Layer(case, tensors), args, tmp_path / "model.onnx")
    reasons, error = "", caught.value
    while error is not None:
        reasons, error = reasons + str(error), error.__cause__
    assert f"deformnd.onnx: {case.name} cannot be exported yet" in reasons


def test_the_file_agrees_with_onnx_own_reference(tmp_path):
    """onnx.reference is a second implementation of DeformConv (slow: one tiny case)."""
    from onnx.reference import ReferenceEvaluator

    case = Case((3, 4), (2, 2), batch=1, channels=(2, 2), offset_groups=2)
    tensors = case.tensors(torch.float32)
    model = Layer(case, tensors).eval()
    args = (tensors["input"], tensors["offset"], tensors["mask"])
    proto = export(model, args, tmp_path / "model.onnx")
    names = [i.name for i in proto.graph.input]
    feed = {name: a.numpy() for name, a in zip(names, args, strict=True)}
    got = ReferenceEvaluator(proto).run(None, feed)[0]
    np.testing.assert_allclose(got, model(*args).detach().numpy(), rtol=1e-4, atol=1e-5)
