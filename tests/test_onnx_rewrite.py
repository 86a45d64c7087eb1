"""Files that exist, rewritten for a target."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import deformnd
import deformnd.onnx
from deformnd import cli
from deformnd.onnx import engines, old_graphs

# Those with lowerings of their own.
TARGETS = ["onnxruntime", "openvino", "standard", "precise", "deformnd"]
OLD = "deform_conv2d_onnx_exporter"
# Each with an input and what torchvision 0.29 made of it. deform_conv2d_onnx_exporter 1.2.0 wrote
# them, at opsets 12 to 18, with and without constant folding; those with an open batch are of its
# functions called from torch's newer exporter, as its later version does. "simplified": by onnxsim.
DATA = np.load(Path(__file__).parent / "data" / "old_exporter.npz")
FILES = [name for name in DATA.files if "/" not in name]
MMCV = {"MMCVDeformConv2d": False, "MMCVModulatedDeformConv2d": True}


@pytest.fixture
def new(tmp_path):
    return tmp_path / "new.onnx"


def file_of(content, tmp_path):
    path = tmp_path / "old.onnx"
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    return path


def run(path, *arrays, engine="onnxruntime"):
    return engines.ENGINES[engine](str(path))[1](arrays)[0]


def far(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


def domains(path):
    return {(node.domain, node.op_type) for node in onnx.load(path).graph.node}


# The first file for all targets, the others for ONNX Runtime's and one more.
PAIRS = [
    (name, target)
    for i, name in enumerate(FILES)
    for j, target in enumerate(TARGETS)
    if i == 0 or j in (0, 1 + i % (len(TARGETS) - 1))
]


@pytest.mark.parametrize("name,target", PAIRS)
def test_old_exporter(name, target, tmp_path, new, capsys):
    old = file_of(DATA[name].tobytes(), tmp_path)
    ((node, kind),) = deformnd.onnx.rewrite(old, new, target=target)
    assert kind == OLD and node in {n.name for n in onnx.load(old).graph.node}
    said = capsys.readouterr().out
    assert f"replaced 1 {OLD}; differs from {old} by " in said
    x, y = DATA[name + "/x"], DATA[name + "/y"]
    assert far(run(new, x), y) < 1e-5
    before, after = onnx.load(old), onnx.load(new)
    onnx.checker.check_model(after, full_check=True)
    assert ("", "GatherND") not in domains(new)
    assert after.opset_import[0].version == max(
        before.opset_import[0].version, deformnd.onnx.TARGETS[target].oldest
    )
    if target == "onnxruntime":  # nothing of the old graph is left
        assert ("", "DeformConv") in domains(new) and len(after.graph.node) < 30
        assert all(i.name not in ("127", "w4") for i in after.graph.initializer)
        used = {i for node in after.graph.node for i in node.input}
        assert {i.name for i in after.graph.initializer} <= used
    if target == "deformnd":
        assert ("deformnd", "DeformConv") in domains(new)
        assert far(run(new, x, engine="deformnd"), y) < 1e-5


@pytest.mark.parametrize("target", TARGETS)
def test_openvino(target, tmp_path, new):
    openvino = pytest.importorskip("openvino")
    name = FILES[TARGETS.index(target) % len(FILES)]
    old = file_of(DATA[name].tobytes(), tmp_path)
    deformnd.onnx.rewrite(old, new, target=target, verify=False, verbose=False)
    model = deformnd.onnx.read_openvino_model(new)
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert far(compiled(DATA[name + "/x"])[0], DATA[name + "/y"]) < 1e-5


def constants(graph):
    """The constants of a graph as its own TensorProtos."""
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            yield node.attribute[0].t
    yield from graph.initializer


@pytest.mark.parametrize("which", ["gathernd", "gatherelements, unmasked"])
def test_what_only_resembles(which, tmp_path, new):
    """Each constant and attribute changed: what is found then computes what the file does."""
    proto = onnx.load_from_string(DATA[which].tobytes())
    content = proto.SerializeToString()
    changes = []
    for i, t in enumerate(constants(proto.graph)):
        if t.dims and t.dims[0] == 4 and len(t.dims) == 4:  # weights are free
            continue
        changes.append(("constant", i))
    for i, node in enumerate(proto.graph.node):
        changes += [("attribute", i, a.name) for a in node.attribute if a.type != a.TENSOR]
    found = valid = 0
    for kind, i, *name in changes:
        proto.ParseFromString(content)
        if kind == "constant":
            t = list(constants(proto.graph))[i]
            array = numpy_helper.to_array(t).copy()
            flat = array.reshape(-1)
            flat[-1] = 0 if flat[-1] == np.iinfo(np.int64).max else flat[-1] + 1
            t.CopyFrom(numpy_helper.from_array(array, t.name))
        else:
            (a,) = (a for a in proto.graph.node[i].attribute if a.name == name[0])
            if a.ints:
                a.ints[:] = [*a.ints[1:], a.ints[0]] if name[0] == "perm" else [2, *a.ints[1:]]
            elif name[0] == "to":
                a.i = TensorProto.INT32
            else:
                a.i += 1
        old = file_of(proto, tmp_path)
        try:
            run(old, DATA[which + "/x"])
        except Exception:  # ONNX Runtime has its own
            continue
        valid += 1
        found += bool(deformnd.onnx.rewrite(old, new, verbose=False))
    assert 0 < found < valid  # some are of the rest of the model


@pytest.mark.parametrize("name", ["gathernd", "gatherelements"])
def test_order_and_sums_of_two(name, tmp_path, new):
    """Optimisers turn sums and products around, and write a Sum as Adds; torch writes Identity."""
    proto = onnx.load_from_string(DATA[name].tobytes())
    nodes = [
        helper.make_node("Identity", [t.name], [t.name + "i"]) for t in proto.graph.initializer
    ]
    behind = {node.input[0]: node.output[0] for node in nodes}
    for node in proto.graph.node:
        node.input[:] = [behind.get(i, i) for i in node.input]
        if node.op_type in ("Add", "Mul"):
            node.input[:] = reversed(node.input)
        if node.op_type == "Sum":
            a, b, c, d = node.input
            nodes.append(helper.make_node("Add", [d, b], ["p"]))
            nodes.append(helper.make_node("Add", [a, c], ["q"]))
            node = helper.make_node("Add", ["p", "q"], node.output)
        nodes.append(node)
        if node.op_type == "Clip":
            nodes.append(helper.make_node("Identity", node.output, [node.output[0] + "i"]))
            behind[node.output[0]] = node.output[0] + "i"
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    old = file_of(proto, tmp_path)
    assert len(deformnd.onnx.rewrite(old, new, verbose=False)) == 1
    assert far(run(new, DATA[name + "/x"]), DATA[name + "/y"]) < 1e-5


def test_points_outside(tmp_path, new):
    """The old graph makes NaN of what is no number, and agrees outside the image."""
    x = DATA["gathernd/x"].copy()
    old = file_of(DATA["gathernd"].tobytes(), tmp_path)
    deformnd.onnx.rewrite(old, new, target="precise", verbose=False)
    x *= 1e3  # offsets of thousands of pixels
    assert far(run(new, x), run(old, x)) < 1e-5
    x[0, 0, 2, 2] = np.inf
    assert np.isnan(run(old, x)).sum() > np.isnan(run(new, x)).sum()


# mmcv's nodes, and DeformConv


def model_of(nodes, inputs, initializers=(), opset=13, domain="mmdeploy", **more):
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(n, e, s) for n, e, s in inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a, n) for n, a in initializers],
    )
    opsets = [helper.make_opsetid(d, v) for d, v in ({"": 0, domain: 1} | {"": opset}).items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, **more)


def tensors(n=2, groups=2, offset_groups=2, mask=True, size=(6, 5, 4), points=(6, 5, 4)):
    """Of a kernel of 3."""
    g = torch.Generator().manual_seed(n)
    size, points, k = size[:n], points[:n], 3**n
    return {
        "x": torch.randn(2, 4, *size, generator=g),
        "weight": torch.randn(4, 4 // groups, *[3] * n, generator=g),
        "offset": torch.randn(2, offset_groups * k * n, *points, generator=g) * 2,
        "mask": torch.rand(2, offset_groups * k, *points, generator=g) if mask else None,
        "bias": torch.randn(4, generator=g) if mask else None,
    }


def call(t, **options):
    n = t["x"].dim() - 2
    function = getattr(deformnd, f"deform_conv{n}d")
    return function(t["x"], t["weight"], t["offset"], t["mask"], t["bias"], **options).numpy()


def split(t, shape=None):
    """A call's tensors as inputs, weights and arrays: its weight and bias are in the file."""
    inputs, weights, arrays = [], [], []
    for name, value in t.items():
        if value is None:
            continue
        if name in ("weight", "bias"):
            weights.append((name, value.numpy()))
        else:
            inputs.append((name, TensorProto.FLOAT, shape or list(value.shape)))
            arrays.append(value.numpy())
    return inputs, weights, arrays


@pytest.mark.parametrize("kind", MMCV)
@pytest.mark.parametrize(
    "domain,target",
    [*((d, "onnxruntime") for d in ("", "mmcv")), *(("mmdeploy", t) for t in TARGETS)],
)
def test_mmcv(kind, domain, target, tmp_path, new, capsys):
    """Two in a row: onnx does not know the size of the first one's result."""
    t = tensors(mask=MMCV[kind])
    names = [n for n in ("offset", "mask", "weight", "bias") if t[n] is not None]
    many = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}
    one = {"padding": 1}
    nodes = [
        helper.make_node(
            kind, [i, *names], [o], domain=domain, groups=2, deform_groups=2, name=o, **attributes
        )
        for i, o, attributes in (("x", "h", many), ("h", "y", one))
    ]
    inputs, weights, arrays = split(t)
    old = file_of(model_of(nodes, inputs, weights, domain=domain), tmp_path)
    assert deformnd.onnx.rewrite(old, new, target=target) == [("h", kind), ("y", kind)]
    said = capsys.readouterr().out
    assert "does not run in onnxruntime: " in said and "1.25" not in said
    h = torch.from_numpy(call(t, padding=1, groups=2))
    want = call({**t, "x": h}, padding=1, groups=2)
    assert far(run(new, *arrays), want) < 1e-5
    # All sizes were known at last: a static file holds no arithmetic on them.
    assert ("", "Shape") not in domains(new)


PADS = {"pads": [2, 0, 0, 1], "strides": [2, 1], "dilations": [1, 2]}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [None, ["b", "c", "h", "w"]])
def test_deform_conv(target, shape, tmp_path, new):
    """Padded unlike on its sides, with sizes known or not."""
    t = tensors(points=(3, 2), size=(6, 5))
    names = ["x", "weight", "offset", "bias", "mask"]
    node = helper.make_node("DeformConv", names, ["y"], group=2, offset_group=2, **PADS)
    inputs, weights, arrays = split(t, shape)
    old = file_of(model_of([node], inputs, weights, opset=22), tmp_path)
    replaced = deformnd.onnx.rewrite(old, new, target=target, verbose=False)
    want = run(old, *arrays)
    padded = torch.nn.functional.pad(t["x"], (0, 1, 2, 0))
    own = call({**t, "x": padded}, stride=(2, 1), dilation=(1, 2), groups=2)
    assert far(own, want) < 1e-5
    if target == "onnxruntime":
        assert replaced == [] and not new.exists()
    else:
        assert replaced == [("y", "DeformConv")]
        assert far(run(new, *arrays), want) < 1e-5


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("n", [1, 3])
def test_deform_conv_of_other_ranks(target, n, tmp_path, new, capfd):
    """Which ONNX defines, and ONNX Runtime does not run."""
    t = tensors(n)
    names = ["x", "weight", "offset", "bias", "mask"]
    node = helper.make_node(
        "DeformConv", names, ["y"], group=2, offset_group=2, pads=[1] * 2 * n, kernel_shape=[3] * n
    )
    inputs, weights, arrays = split(t)
    old = file_of(model_of([node], inputs, weights, opset=19), tmp_path)
    assert len(deformnd.onnx.rewrite(old, new, target=target, verbose=False)) == 1
    assert capfd.readouterr().err == ""  # ONNX Runtime logs what is no error here
    assert far(run(new, *arrays), call(t, padding=1, groups=2)) < 1e-5


def test_engine_without_a_dtype(tmp_path, new, capsys):
    """ONNX Runtime has no GridSample of float64 before opset 20: no error of a file for others."""
    t = tensors(mask=False)
    inputs, weights, arrays = split(t)
    node = helper.make_node(
        "DeformConv", ["x", "weight", "offset"], ["y"], group=2, offset_group=2, pads=[1] * 4
    )
    double = [(name, TensorProto.DOUBLE, shape) for name, _, shape in inputs]
    model = model_of([node], double, [(n, a.astype("d")) for n, a in weights], opset=19)
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    old = file_of(model, tmp_path)
    assert deformnd.onnx.rewrite(old, new, target="standard") == [("y", "DeformConv")]
    assert "not compared in onnxruntime ([ONNXRuntimeError]" in capsys.readouterr().out
    assert new.exists()
    deformnd.onnx.rewrite(old, new, target="precise")
    assert "differs from" in capsys.readouterr().out
    assert far(run(new, *[a.astype("d") for a in arrays]), call(t, padding=1, groups=2)) < 1e-5


# What else is in a file


def test_subgraph_and_shared_weights(tmp_path, new):
    """In a branch of If, with tensors of the graph around it, which another node reads, too."""
    t = tensors(mask=False)
    t["bias"] = torch.ones(4)
    node = helper.make_node(
        "MMCVModulatedDeformConv2d",
        ["x", "offset", "mask", "weight", "bias"],
        ["z"],
        domain="mmdeploy",
        groups=2,
        deform_groups=2,
        padding=[1, 1],
    )
    other = helper.make_node("Conv", ["x", "weight"], ["z2"], group=2, pads=[1] * 4)
    branches = {
        key: helper.make_graph([n], key, [], [helper.make_tensor_value_info(n.output[0], 1, None)])
        for key, n in (("then_branch", node), ("else_branch", other))
    }
    test = helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0)
    zero = helper.make_node("Constant", [], ["zero"], value_float=0.0)
    more = helper.make_node("Greater", ["s", "zero"], ["more"])
    t["mask"] = torch.rand(2, 18, 6, 5)
    inputs, weights, (x, *rest) = split(t)
    nodes = [test, zero, more, helper.make_node("If", ["more"], ["y"], **branches)]
    model = model_of(nodes, inputs, weights, opset=12, producer_name="somebody")
    model.metadata_props.add(key="labels", value="a,b")
    model.doc_string = "what it is"
    old = file_of(model, tmp_path)
    assert deformnd.onnx.rewrite(old, new, verbose=False) == [("z", "MMCVModulatedDeformConv2d")]
    after = onnx.load(new)
    assert after.producer_name == "somebody" and after.doc_string == "what it is"
    assert after.metadata_props[0].value == "a,b" and after.opset_import[0].version == 19
    assert sorted(i.name for i in after.graph.initializer) == ["bias", "weight"]
    assert [i.name for i in after.graph.input] == ["x", "offset", "mask"]
    x = abs(x)
    t["x"] = torch.from_numpy(x)
    assert far(run(new, x, *rest), call(t, padding=1, groups=2)) < 1e-5
    dense = torch.nn.functional.conv2d(-t["x"], t["weight"], padding=1, groups=2)
    assert far(run(new, -x, *rest), dense.numpy()) < 1e-5


def test_function(tmp_path, new):
    """Within a local function, whose attributes differ from call to call."""
    t = tensors(points=(3, 3), size=(6, 6), mask=False)
    opsets = [helper.make_opsetid("", 20)]
    inner = helper.make_node("DeformConv", ["x", "w", "o"], ["y"], group=2, offset_group=2)
    inner.attribute.add(name="pads", ref_attr_name="pads", type=onnx.AttributeProto.INTS)
    inner.attribute.append(helper.make_attribute("strides", [2, 2]))
    function = helper.make_function(
        "own", "Layer", ["x", "w", "o"], ["y"], [inner], opsets, attributes=["pads"]
    )
    node = helper.make_node("Layer", ["x", "weight", "offset"], ["y"], domain="own", pads=[1] * 4)
    inputs, weights, arrays = split(t)
    model = model_of([node], inputs, weights, opset=20, domain="own", functions=[function])
    old = file_of(model, tmp_path)
    assert len(deformnd.onnx.rewrite(old, new, target="standard", verbose=False)) == 1
    assert not onnx.load(new).functions
    want = call(t, stride=2, padding=1, groups=2)
    assert far(run(new, *arrays), want) < 1e-5 and far(run(old, *arrays), want) < 1e-5


def test_function_that_calls_itself(tmp_path, new):
    model = bad(lambda m, g, n: None)
    inner = helper.make_node("MMCVDeformConv2d", ["a", "b", "c"], ["d"], domain="mmdeploy")
    again = helper.make_node("Layer", ["d", "b", "c"], ["e"], domain="own")
    opsets = [helper.make_opsetid(d, v) for d, v in (("", 13), ("mmdeploy", 1), ("own", 1))]
    function = helper.make_function("own", "Layer", ["a", "b", "c"], ["e"], [inner, again], opsets)
    model.functions.append(function)
    old = file_of(model, tmp_path)
    with pytest.raises(ValueError, match=r"old.onnx cannot be rewritten: "):
        deformnd.onnx.rewrite(old, new)


def test_files_of_target_openvino(tmp_path, new):
    """Their DeformConv stands in a function of OpenVINO's operator, and stays there."""
    old = file_of(DATA["gathernd"].tobytes(), tmp_path)
    deformnd.onnx.rewrite(old, new, target="openvino", verbose=False)
    assert deformnd.onnx.rewrite(new, tmp_path / "newer.onnx", target="precise") == []


def test_external_data(tmp_path, new):
    model = onnx.load_from_string(DATA["gathernd"].tobytes())
    old = tmp_path / "old.onnx"
    onnx.save(model, old, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert len(deformnd.onnx.rewrite(old, new, verbose=False)) == 1
    data = tmp_path / "new.onnx.data"
    assert data.is_file()
    (tmp_path / "weights.bin").rename(tmp_path / "new2.onnx.data")
    x, y = DATA["gathernd/x"], DATA["gathernd/y"]
    assert far(run(new, x), y) < 1e-5
    for content in (None, b"too short"):
        if content:
            (tmp_path / "weights.bin").write_bytes(content)
        with pytest.raises(ValueError, match=r"has data in .*weights.bin', expected a file of at"):
            deformnd.onnx.rewrite(old, tmp_path / "other.onnx")
    with pytest.raises(ValueError, match=r"out is .*new.onnx', which would take the place of"):
        deformnd.onnx.rewrite(new, new)
    assert far(run(new, x), y) < 1e-5


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_dtypes(dtype, tmp_path, new):
    t = tensors(mask=False)
    node = helper.make_node(
        *("MMCVDeformConv2d", ["x", "offset", "weight"], ["y"]),
        domain="mmdeploy",
        groups=2,
        deform_groups=2,
        padding=[1, 1],
    )
    inputs, weights, arrays = split(t)
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model = model_of(
        [node],
        [(name, element, shape) for name, _, shape in inputs],
        [(name, a.astype(dtype)) for name, a in weights],
    )
    model.graph.output[0].type.tensor_type.elem_type = element
    old = file_of(model, tmp_path)
    for target in ("precise", "deformnd"):
        deformnd.onnx.rewrite(old, new, target=target, verbose=False)
        engine = "deformnd" if target == "deformnd" else "onnxruntime"
        got = run(new, *[a.astype(dtype) for a in arrays], engine=engine)
        assert got.dtype == dtype
        assert far(got, call(t, padding=1, groups=2)) < (4e-3 if dtype is np.float16 else 1e-5)


# What is wrong


def bad(change):
    """A model of one mmcv node, changed."""
    t = tensors()
    node = helper.make_node(
        "MMCVModulatedDeformConv2d",
        ["x", "offset", "mask", "weight", "bias"],
        ["y"],
        name="layer",
        domain="mmdeploy",
        groups=2,
        deform_groups=2,
        padding=[1, 1],
    )
    inputs, weights, _ = split(t)
    model = model_of([node], inputs, weights)
    change(model, model.graph, model.graph.node[0])
    return model


def attribute(name, value):
    def change(model, graph, node):
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return change


def element(name, kind):
    def change(model, graph, node):
        (found,) = (i for i in graph.input if i.name == name)
        found.type.tensor_type.elem_type = kind

    return change


def cycle(model, graph, node):
    graph.node.append(helper.make_node("Relu", ["y"], ["x2"]))
    node.input[0] = "x2"


def resized(name, *shape):
    def change(model, graph, node):
        (found,) = (i for i in graph.input if i.name == name)
        for dim, size in zip(found.type.tensor_type.shape.dim, shape, strict=True):
            dim.dim_value = size

    return change


def external(model, graph, node):
    graph.initializer[0].data_type = TensorProto.UNDEFINED
    graph.initializer[0].data_location = TensorProto.EXTERNAL
    graph.initializer[0].external_data.add(key="location", value="old.onnx")


def as_deform_conv(name, value):
    """The standard node, with one more attribute."""

    def change(model, graph, node):
        order = ["x", "weight", "offset", "bias", "mask"]
        options = {"group": 2, "offset_group": 2, "pads": [1] * 4, name: value}
        node.CopyFrom(helper.make_node("DeformConv", order, ["y"], name="layer", **options))

    return change


def untyped(model, graph, node):
    graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, None))
    node.input[3] = "w"


BAD = {
    "groups": (attribute("groups", 3), r"'layer': input is of shape \[2,4,6,5\], expected \[\?, 6"),
    "deform_groups": (attribute("deform_groups", 1), "'layer': offset is of shape"),
    "no groups": (attribute("deform_groups", 0), r"deform_groups is 0, expected 1 ints of at leas"),
    "three strides": (attribute("stride", [1, 1, 1]), r"stride is .*, expected 2 ints of at least"),
    "text": (attribute("padding", "same"), r"'layer': padding is 'same', expected 2 ints of at l"),
    "cycle": (cycle, r"is no valid ONNX file: .*cycle"),
    "integers": (
        element("x", TensorProto.INT64),
        "'layer': input is of dtype INT64, expected a floa",
    ),
    "two dtypes": (element("mask", TensorProto.DOUBLE), "'layer': mask is of dtype DOUBLE, expect"),
    "stride": (
        attribute("stride", [2, 2]),
        r"'layer': offset is of shape \[2,36,6,5\], expected \[",
    ),
    "mask": (resized("mask", 2, 18, 5, 5), r"'layer': mask is of shape \[2,18,5,5\], expected \[2"),
    "batch": (
        resized("offset", 3, 36, 6, 5),
        r"'layer': offset is of shape \[3,36,6,5\], expected",
    ),
    "small": (
        resized("x", 2, 4, 6, 0),
        r"'layer': input is of shape .*, expected at least 1 along",
    ),
    "kernel_shape": (
        as_deform_conv("kernel_shape", [5, 3]),
        r"'layer': kernel_shape is \[5, 3\], expected the weight's \[3, 3\]",
    ),
    "pads": (as_deform_conv("pads", [1, 1, 0, 1]), r"DeformConv 'layer': offset is of shape \[2,3"),
    "missing": (lambda m, g, n: n.input.__delitem__(slice(2, 5)), "weight is missing, expected a"),
    "unknown": (untyped, "'layer': weight is of no known shape, expected kno"),
    "nothing makes it": (
        lambda m, g, n: n.input.__setitem__(1, "none"),
        "is no valid ONNX file: node 'layer' reads 'none', which nothing makes",
    ),
    "external": (external, "old.onnx (is no valid ONNX file|cannot be rewritten): "),
    "sparse": (
        lambda m, g, n: g.sparse_initializer.add(dims=[1]),
        "is no valid ONNX file: it has graph.sparse_initializer",
    ),
    "no opset": (
        lambda m, g, n: m.opset_import.__delitem__(slice(0, 1)),
        "no graph, or names no o",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_models(name, tmp_path, new):
    change, message = BAD[name]
    old = file_of(bad(change), tmp_path)
    with pytest.raises(ValueError, match=message):
        deformnd.onnx.rewrite(old, new, target="precise")
    assert [p.name for p in tmp_path.iterdir()] == ["old.onnx"]


@pytest.mark.parametrize("content", [b"", b"no model", DATA["gathernd"].tobytes()[:9000]])
def test_bad_files(content, tmp_path, new):
    with pytest.raises(ValueError, match=r"old.onnx is no valid ONNX file: "):
        deformnd.onnx.rewrite(file_of(content, tmp_path), new)


def test_huge(tmp_path, new):
    """Sizes that no machine has are not made up to compare, and not allocated."""
    model = bad(lambda m, g, n: None)
    for i in model.graph.input:
        i.type.tensor_type.shape.dim[0].dim_value = 2**50
    node = model.graph.node[0]
    node.domain = ""  # as DeformConv, which runs
    node.op_type, node.input[:] = "DeformConv", ["x", "weight", "offset", "bias", "mask"]
    del node.attribute[:]
    node.attribute.extend(
        helper.make_attribute(k, v)
        for k, v in {"group": 2, "offset_group": 2, "pads": [1] * 4}.items()
    )
    model.opset_import[0].version = 20
    old = file_of(model, tmp_path)
    assert len(deformnd.onnx.rewrite(old, new, target="precise")) == 1
    array = numpy_helper.from_array(np.zeros((4, 2, 3, 3), np.float32), "weight")
    array.dims[0] = 2**50
    model.graph.initializer[0].CopyFrom(array)
    old = file_of(model, tmp_path)
    with pytest.raises(ValueError, match="bias is of shape"):
        deformnd.onnx.rewrite(old, new, target="precise")


def test_opset_that_cannot_be_raised(tmp_path, new):
    model = bad(lambda m, g, n: None)
    model.graph.node.append(helper.make_node("NoSuchOperator", ["y"], ["u"]))
    model.graph.output[0].name = "u"
    model.opset_import[0].version = 9
    old = file_of(model, tmp_path)
    with pytest.raises(ValueError, match=r"has opset 9, and the target needs 19, to which onnx"):
        deformnd.onnx.rewrite(old, new)
    assert not new.exists()


def test_a_wrong_lowering_is_found(tmp_path, new, monkeypatch):
    old = file_of(DATA["gathernd"].tobytes(), tmp_path)
    new.write_text("before")

    def wrong(node, find=old_graphs.find):
        found = find(node)
        if found is None:
            return None
        # Of other places and the same sizes.
        more = {key: [i + 1 for i in getattr(found, key)] for key in ("padding", "dilation")}
        return found._replace(**more)

    monkeypatch.setattr(old_graphs, "find", wrong)
    with pytest.raises(ValueError, match=r"new.onnx in onnxruntime (differs from|does not run)"):
        deformnd.onnx.rewrite(old, new, target="precise")
    assert new.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.onnx", "old.onnx"]


def test_arguments(tmp_path, new):
    old = file_of(DATA["gathernd"].tobytes(), tmp_path)
    for arguments, message in (
        ((old, new, "tpu"), "target is 'tpu', expected one of"),
        ((tmp_path / "no.onnx", new, "precise"), "file is .*, expected a file that exists"),
        ((onnx.load(old), new, "precise"), "file is a ModelProto, expected a file that exists"),
        ((old, tmp_path / "no" / "new.onnx", "precise"), "out is .*, but there is no folder"),
        ((old, tmp_path, "precise"), "out .* is a folder, expected a file to write"),
    ):
        with pytest.raises(ValueError, match=message):
            deformnd.onnx.rewrite(*arguments[:2], target=arguments[2])
    with pytest.raises(TypeError, match="out is 3, expected the name of a file to write"):
        deformnd.onnx.rewrite(old, 3)


def test_command(tmp_path, new, capsys):
    old = file_of(DATA["gathernd"].tobytes(), tmp_path)
    assert cli.main(["rewrite", str(old), "--out", str(new), "--target", "precise"]) == 0
    said = capsys.readouterr().out
    assert f"replaced 1 {OLD}" in said and f": {OLD}\n" in said
    again = tmp_path / "again.onnx"
    assert cli.main(["rewrite", str(new), "--out", str(again)]) == 1
    assert "nothing" in capsys.readouterr().out and not again.exists()
    assert cli.main(["rewrite", str(old), "--out", str(new), "--target", "tpu"]) == 2
    assert cli.main(["rewrite", str(tmp_path / "no.onnx"), "--out", str(new)]) == 2
    old.write_bytes(b"no model")
    capsys.readouterr()
    assert cli.main(["rewrite", str(old), "--out", str(again)]) == 2
    error = capsys.readouterr().err
    assert "is no ONNX file" in error and error.count("\n") == 1
