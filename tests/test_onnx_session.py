"""The core as ONNX Runtime's library of custom operators."""

import subprocess
import sys
import textwrap

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

import deformnd
import deformnd.onnx
from cases import AGGREGATES, CASES, Case, relative_error
from test_attention import SHAPES, make

FLOATS = {
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
}
OPERATORS = {
    "deform_conv": "DeformConv",
    "deform_conv_transpose": "DeformConvTranspose",
    "deform_aggregate": "DeformAggregate",
}
ORDER = ("input", "weight", "offset", "mask", "bias")
STANDARD = ("input", "weight", "offset", "bias", "mask")
Error = onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument


def model(calls, opset=19):
    """Bytes of a model of (operator, tensors in order, attributes, domain), each with an output."""
    nodes, inputs, outputs, feed = [], [], [], {}
    for i, (operator, tensors, attributes, domain) in enumerate(calls):
        names = []
        for j, t in enumerate(tensors):
            names.append("" if t is None else f"x{i}_{j}")
            if t is None:
                continue
            shape = [None] * t.dim()
            half = t.dtype == torch.bfloat16  # which numpy does not have
            element = TensorProto.INT64 if t.dtype == torch.int64 else FLOATS[t.dtype]
            given = TensorProto.FLOAT if half else element
            inputs.append(helper.make_tensor_value_info(names[-1], given, shape))
            feed[names[-1]] = (t.float() if half else t).numpy()
            if half:
                cast = helper.make_node("Cast", [names[-1]], [names[-1] + "b"], to=element)
                nodes.append(cast)
                names[-1] += "b"
        nodes.append(helper.make_node(operator, names, [f"y{i}"], domain=domain, **attributes))
        element = FLOATS[tensors[0].dtype]
        if element == TensorProto.BFLOAT16:
            nodes.append(helper.make_node("Cast", [f"y{i}"], [f"z{i}"], to=TensorProto.FLOAT))
            outputs.append(helper.make_tensor_value_info(f"z{i}", TensorProto.FLOAT, None))
        else:
            outputs.append(helper.make_tensor_value_info(f"y{i}", element, None))
    graph = helper.make_graph(nodes, "graph", inputs, outputs)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("deformnd", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    return proto.SerializeToString(), feed


def run(calls, **options):
    content, feed = model(calls)
    session = deformnd.onnx.session(content, **options)
    return [torch.from_numpy(a) for a in session.run(None, feed)]


def call_of(case, tensors):
    names = [name for name in ORDER if name in tensors]
    attributes = {
        key: value if key == "groups" else case.values(key)
        for key, value in case.parameters().items()
    }
    ordered = [tensors[name] for name in names]
    return OPERATORS[case.family], ordered, attributes, "deformnd"


def standard(case, tensors):
    """As a node of ONNX's own, which has one number of groups for offset and mask."""
    attributes = {
        "strides": case.values("stride"),
        "pads": case.values("padding") * 2,
        "dilations": case.values("dilation"),
        "group": case.groups,
        "offset_group": case.offset_groups,
        "kernel_shape": case.kernel,
    }
    return "DeformConv", [tensors[name] for name in STANDARD], attributes, ""


ALL = [*CASES, *AGGREGATES]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_case(dtype):
    calls, exact = [], []
    for case in ALL:
        tensors = case.tensors(dtype)
        calls.append(call_of(case, tensors))
        exact.append(case.call({k: t if t is None else t.double() for k, t in tensors.items()}))
    bound = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-6, torch.float64: 1e-14}
    for case, got, want in zip(ALL, run(calls), exact, strict=True):
        assert got.shape == want.shape, str(case)
        assert not want.numel() or relative_error(got, want) < bound[dtype], str(case)


STANDARDS = [
    c
    for c in CASES
    if not c.transposed and c.offset_groups and c.mask_groups in (0, c.offset_groups) and c.batch
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_standard_operator(dtype):
    calls, exact = [], []
    for case in STANDARDS:
        tensors = case.tensors(dtype)
        calls.append(standard(case, tensors))
        exact.append(case.call({k: t if t is None else t.double() for k, t in tensors.items()}))
    bound = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-6, torch.float64: 1e-14}
    for case, got, want in zip(STANDARDS, run(calls), exact, strict=True):
        assert relative_error(got, want) < bound[dtype], str(case)
