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


@pytest.fixture(scope="module")
def operator():
    """torchvision's, or, where that is not installed, one of its schema that computes as ours."""
    try:
        import torchvision as torchvision
    except (ImportError, RuntimeError):  # RuntimeError: of another build of torch
        library = torch.library.Library("torchvision", "DEF")
        library.define(
            "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, "
            "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, "
            "SymInt dilation_w, SymInt groups, SymInt offset_groups, bool use_mask) -> Tensor"
        )

        def call(x, weight, offset, mask, bias, *p):
            stride, padding, dilation, groups, use_mask = p[:2], p[2:4], p[4:6], p[6], p[8]
            mask = mask if use_mask else None
            return deformnd.deform_conv2d(
                x, weight, offset, mask, bias, stride, padding, dilation, groups
            )

        def fake(x, weight, offset, *rest):
            return x.new_empty(x.shape[0], weight.shape[0], *offset.shape[2:])

        library.impl("deform_conv2d", call, "CPU")
        torch.library.register_fake("torchvision::deform_conv2d", fake, lib=library)
        yield torch.ops.torchvision.deform_conv2d
        library._destroy()
    else:
        yield torch.ops.torchvision.deform_conv2d


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
def test_the_existing_exporters_names(operator, mask, gathernd, patch, tmp_path):
    model, args, path = Layer(operator).eval(), arguments(mask), tmp_path / "model.onnx"

    def verify(opset):
        onnx.checker.check_model(path, full_check=True)
        proto = onnx.load(path)
        assert proto.opset_import[0].version == opset
        nodes = {node.op_type for node in proto.graph.node}
        assert ("GatherND" in nodes, "GatherElements" in nodes) == (gathernd, not gathernd)
        for engine in ("onnxruntime", "openvino"):
            assert check(path, model, args, engine=engine) < 1e-6

    op = create_deform_conv2d_custom_op(use_gathernd=gathernd, enable_openvino_patch=patch)
    table = {operator.default: op}
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


def test_the_legacy_exporter_with_dynamic_sizes(operator, tmp_path):
    model, path = Layer(operator).eval(), tmp_path / "model.onnx"
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
def test_a_model_that_mixes_both(operator, target, tmp_path):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.theirs = Layer(operator)
            self.ours = deformnd.PackedDeformConv2d(4, 4, 3, padding=1, modulated=True)
            self.up = deformnd.PackedDeformConvTranspose2d(4, 2, 2, 2)

        def forward(self, x, offset, mask):
            return self.up(self.ours(self.theirs(x, offset, mask)))

    export(Mixed().eval(), arguments(True), tmp_path / "m.onnx", target=target, verbose=False)
