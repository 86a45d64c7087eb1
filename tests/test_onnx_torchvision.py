"""torchvision's deform_conv2d, and the names of deform_conv2d_onnx_exporter."""

import warnings

import onnx
import pytest
import torch
from torch import nn

import deformnd
from deformnd.onnx import (
    check,
    create_deform_conv2d_custom_op,
    export,
    register_deform_conv2d_onnx_op,
)
from test_onnx import TARGETS


class Layer(nn.Module):
    def __init__(self, operator):
        super().__init__()
        torch.manual_seed(0)
        self.operator = operator
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3, 3, 2)), nn.Parameter(torch.randn(4))

    def forward(self, x, offset, mask=None):
        given = x.new_zeros(x.shape[0], 1) if mask is None else mask
        parameters = (2, 1, 1, 0, 1, 2, 2, 3, mask is not None)
        return self.operator(x, self.weight, offset, given, self.bias, *parameters)


def arguments(mask):
    x, offset = torch.randn(2, 6, 12, 11), 3 * torch.randn(2, 36, 6, 9)
    return (x, offset, torch.rand(2, 18, 6, 9)) if mask else (x, offset)


@pytest.mark.parametrize("patch", [False, True])
@pytest.mark.parametrize("gathernd", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_the_existing_exporters_names(torchvision_operator, mask, gathernd, patch, tmp_path):
    model, args, path = Layer(torchvision_operator).eval(), arguments(mask), tmp_path / "model.onnx"

    def verify(opset):
        onnx.checker.check_model(path, full_check=True)
        proto = onnx.load(path)
        assert proto.opset_import[0].version == opset
        nodes = {node.op_type for node in proto.graph.node}
        assert ("GatherND" in nodes, "GatherElements" in nodes) == (gathernd, not gathernd)
        for engine in ("onnxruntime", "openvino"):
            assert check(path, model, args, engine=engine) < 1e-6

    op = create_deform_conv2d_custom_op(use_gathernd=gathernd, enable_openvino_patch=patch)
    table = {torchvision_operator.default: op}
    torch.onnx.export(
        model,
        args,
        path,
        dynamo=True,
        verbose=False,
        opset_version=18,
        custom_translation_table=table,
    )
    verify(18)
    register_deform_conv2d_onnx_op(gathernd, patch)
    for opset in (12, 16):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this exporter is deprecated
            torch.onnx.export(model, args, path, dynamo=False, opset_version=opset)
        verify(opset)


def test_the_legacy_exporter_with_dynamic_sizes(torchvision_operator, tmp_path):
    model, path = Layer(torchvision_operator).eval(), tmp_path / "model.onnx"
    register_deform_conv2d_onnx_op()
    axes = {key: {0: "batch", 2: "height", 3: "width"} for key in ("x", "offset", "mask")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            arguments(True),
            path,
            dynamo=False,
            opset_version=17,
            input_names=list(axes),
            dynamic_axes=axes,
        )
    other = torch.randn(3, 6, 8, 13), torch.randn(3, 36, 4, 11), torch.rand(3, 18, 4, 11)
    assert check(path, model, other) < 1e-6


@pytest.mark.parametrize("target", TARGETS)
def test_a_model_that_mixes_both(torchvision_operator, target, tmp_path):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.theirs = Layer(torchvision_operator)
            self.ours = deformnd.PackedDeformConv2d(4, 4, 3, padding=1, modulated=True)
            self.up = deformnd.PackedDeformConvTranspose2d(4, 2, 2, 2)

        def forward(self, x, offset, mask):
            return self.up(self.ours(self.theirs(x, offset, mask)))

    export(Mixed().eval(), arguments(True), tmp_path / "m.onnx", target=target, verbose=False)
