"""The core as ONNX Runtime's library of custom operators."""

import subprocess
import sys
import textwrap
from pathlib import Path

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
from test_onnx import Calls, Network, load, newest_opset

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


def attention(n, dtype, coordinates=None, **sizes):
    value, locations, weights = make(n, **sizes)
    shapes = torch.tensor(SHAPES[n])
    coordinates = coordinates or dtype
    return value.to(dtype), shapes, locations.to(coordinates), weights.to(coordinates)


@pytest.mark.parametrize("channels", [4, 5])  # the core takes them by four
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_attention(dtype, channels):
    given = [attention(n, dtype, channels=channels) for n in SHAPES]
    half = torch.finfo(dtype).bits == 16
    if half:  # the accurate choice
        given.append(attention(2, dtype, torch.float32, channels=channels))
    got = run([("DeformAttention", tensors, {}, "deformnd") for tensors in given])
    bound = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-6, torch.float64: 1e-14}
    for (value, shapes, locations, weights), output in zip(given, got, strict=True):
        rest = locations.double(), weights.double()
        want = deformnd.deform_attention(value.double(), shapes.tolist(), *rest)
        assert relative_error(output, want) < bound[dtype]


def test_attention_without_queries_or_points():
    empty = [attention(2, torch.float32, queries=0), attention(2, torch.float32, batch=0)]
    nothing = attention(2, torch.float32, points=0)
    *got, zeros = run([("DeformAttention", t, {}, "deformnd") for t in (*empty, nothing)])
    assert [t.shape for t in got] == [(2, 0, 12), (0, 11, 12)]
    assert zeros.shape == (2, 11, 12) and not zeros.any()


def test_coordinates_of_another_dtype():
    """Of which float32 for half a model is the accurate one, and float64 computes in float64."""
    calls, exact = [], []
    for case in CASES[4:8]:
        for dtype, other in (
            (torch.float16, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.float32, torch.float64),
            (torch.float32, torch.float16),
        ):
            tensors = case.tensors(dtype)
            for key in ("offset", "mask"):
                if tensors[key] is not None:
                    tensors[key] = tensors[key].to(other)
            calls.append(call_of(case, tensors))
            exact.append(case.call({k: t if t is None else t.double() for k, t in tensors.items()}))
    for got, want in zip(run(calls), exact, strict=True):
        assert relative_error(got, want) < (8e-3 if got.dtype == torch.float32 else 1e-3)


def test_defaults_and_unequal_padding_of_the_standard_operator():
    x, w = torch.randn(1, 4, 6, 7), torch.randn(3, 4, 3, 2)
    offset = torch.randn(1, 12, 4, 6)
    (got,) = run([("DeformConv", (x, w, offset), {}, "")])
    assert relative_error(got, deformnd.deform_conv2d(x, w, offset)) < 1e-6
    # One more pixel at the end of an axis is as one more of zeros.
    wide = torch.nn.functional.pad(x, (2, 1, 0, 3))
    offset = torch.randn(1, 12, 7, 9)
    (got,) = run([("DeformConv", (x, w, offset), {"pads": [0, 2, 3, 1]}, "")])
    assert got.shape == (1, 3, 7, 9)
    # All samples of a zero border, too, are inside here: the offsets are small.
    small = offset.clamp(-0.9, 0.9)
    (got,) = run([("DeformConv", (x, w, small), {"pads": [0, 2, 3, 1]}, "")])
    want = deformnd.deform_conv2d(wide, w, small)
    assert relative_error(got, want) < 1e-6


# Input, weight, offset, mask; and value, shapes, locations, weights.
X, W, O = torch.randn(1, 4, 5, 6), torch.randn(6, 4, 3, 3), torch.randn(1, 18, 3, 4)  # noqa: E741
M, V = torch.randn(1, 9, 3, 4), attention(2, torch.float32)


@pytest.mark.parametrize(
    ("operator", "tensors", "attributes", "message"),
    [
        ("DeformConv", (X[:, :3], W, O), {}, "input has 3 channels, expected 4 (weight.shape[1] 4"),
        ("DeformConv", (X[0], W, O), {}, "weight has 4 dimensions, expected 3 as input"),
        ("DeformConv", (X[0, 0], W, O), {}, "input has 2 dimensions, expected 3 to 5"),
        ("DeformConv", (X, W, O[:, :17]), {}, "expected a multiple of 18 (2 axes x 9 kernel"),
        (
            "DeformConv",
            (X, W, O[..., :3]),
            {},
            "offset has spatial size (3, 3), expected the output",
        ),
        ("DeformConv", (X, W, O[0]), {}, "offset has 3 dimensions, expected 4 as input"),
        ("DeformConv", (X, W, O.repeat(2, 1, 1, 1)), {}, "offset has batch size 2, expected 1"),
        (
            "DeformConv",
            (X, W, O.repeat(1, 3, 1, 1)),
            {},
            "3 groups (54 channels / 18), which do not",
        ),
        ("DeformConv", (X, W, None, M[:, :8]), {}, "mask has 8 channels, expected a multiple of 9"),
        ("DeformConv", (X, W, O, M, torch.ones(5)), {}, "bias has shape [5], expected [6]"),
        ("DeformConv", (X, W, O), {"stride": [1]}, "stride is (1,), expected 2 values"),
        ("DeformConv", (X, W, O), {"stride": [0, 1]}, "stride is (0, 1), expected at least 1"),
        ("DeformConv", (X, W, O), {"padding": [-1, 0]}, "padding is (-1, 0), expected at least 0"),
        ("DeformConv", (X, W, O), {"padding": [2**31, 0]}, "expected at most 2147483647"),
        ("DeformConv", (X, W, O), {"padding": [2**30, 0]}, "too large for positions of 32 bits"),
        ("DeformConv", (X, W, O), {"dilation": [9, 1]}, "the output would have size (0, 4)"),
        ("DeformConv", (X, W, O), {"dilation": [1] * 7}, "dilation has 7 values"),
        ("DeformConv", (X, W, O), {"groups": 0}, "groups is 0, expected at least 1"),
        ("DeformConv", (X[:, :0], W[:, :0], None), {}, "no channels"),
        (
            "DeformConvTranspose",
            (X, W[:4], O),
            {},
            "offset has spatial size (3, 4), expected the in",
        ),
        ("DeformConvTranspose", (X, W), {}, "input has 4 channels, expected 6 (weight.shape[0])"),
        ("DeformConvTranspose", (X, W[:4]), {"output_padding": [1, 0]}, "output_padding is (1, 0)"),
        (
            "DeformConvTranspose",
            (X, W[:4]),
            {"padding": [9, 0]},
            "size (-11, 8), expected at least",
        ),
        ("DeformAggregate", (X, O), {}, "kernel_size is missing"),
        ("DeformAggregate", (X, O), {"kernel_size": [3]}, "kernel_size is (3,), expected 2 values"),
        ("DeformAttention", (V[0][:, :5], *V[1:]), {}, "value has 5 pixels, expected 40"),
        ("DeformAttention", (V[0], V[1] * 0, *V[2:]), {}, "expected to be at least 1"),
        (
            "DeformAttention",
            (V[0], V[1][0], *V[2:]),
            {},
            "shapes has shape [2], expected [levels, 2]",
        ),
        (
            "DeformAttention",
            (*V[:3], V[3][:, 1:]),
            {},
            "weights has shape [2, 10, 3, 3, 2], expected",
        ),
        ("DeformAttention", (*V[:2], V[2][0], V[3]), {}, "locations has 5 dimensions, expected 6"),
        ("DeformAttention", (*V[:2], V[2][..., :0], V[3]), {}, "0 coordinates, expected 1 to 3"),
    ],
)
def test_errors_are_of_onnxruntime_and_say_what_is_wrong(operator, tensors, attributes, message):
    content, feed = model([(operator, tensors, attributes, "deformnd")])
    with pytest.raises(Exception) as caught:
        deformnd.onnx.session(content).run(None, feed)
    assert message in str(caught.value)
    # A session that does not start names the file.
    error = caught.value.__cause__ or caught.value
    assert type(error).__module__.startswith("onnxruntime")
    assert operator.replace("Deform", "deform_").lower()[:10] in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "attributes", "message"),
    [
        (
            (X, W, O),
            {"offset_group": 2},
            "offset has 18 channels, expected 36 (18 for each of offs",
        ),
        ((X, W, O), {"kernel_shape": [3, 2]}, "kernel_shape is (3, 2), expected weight's (3, 3)"),
        ((X, W, O), {"pads": [1, 1]}, "pads is (1, 1), expected 4 values"),
    ],
)
def test_errors_of_the_standard_operator(tensors, attributes, message):
    content, feed = model([("DeformConv", tensors, attributes, "")])
    with pytest.raises(Error) as caught:
        deformnd.onnx.session(content).run(None, feed)
    assert message in str(caught.value)


def test_a_mask_that_is_infinite():
    """Its sum may be NaN where that of deform_conv2d is infinite, and nothing else changes."""
    mask = M.clone()
    mask[..., 1, 1] = torch.inf
    (got,) = run([("DeformConv", (X, W, O, mask), {}, "deformnd")])
    want = deformnd.deform_conv2d(X, W, O, mask)
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite)
    assert relative_error(got[finite], want[finite]) < 1e-6


def test_the_switch_and_options():
    """ONNX Runtime's own kernel has another rounding, and its DeformConv no bfloat16."""
    w = torch.randn(6, 4, 3, 3).bfloat16()
    content, feed = model([("DeformConv", (X.bfloat16(), w, O.bfloat16()), {}, "")])
    deformnd.onnx.session(content).run(None, feed)
    with pytest.raises(Exception, match="DeformConv"):
        deformnd.onnx.session(content, override=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = deformnd.onnx.session(
        content, sess_options=options, providers=["CPUExecutionProvider"], disabled_optimizers=[]
    )
    assert session.get_session_options().intra_op_num_threads == 2
    assert options.get_session_config_entry("deformnd.threads") == "2"
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    deformnd.onnx.session(content, sess_options=options)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "1"


def test_what_session_refuses(tmp_path):
    with pytest.raises(ValueError, match="expected a file that exists"):
        deformnd.onnx.session(tmp_path / "none.onnx")
    with pytest.raises(TypeError, match=r"sess_options is a dict, expected onnxruntime\.Session"):
        deformnd.onnx.session(b"", sess_options={})


def test_options_serve_several_sessions():
    content, feed = model([("DeformConv", (X, W, O), {}, "deformnd")])
    options = onnxruntime.SessionOptions()
    first, second = (deformnd.onnx.session(content, sess_options=options) for _ in "ab")
    assert np.array_equal(first.run(None, feed), second.run(None, feed))
    with pytest.raises(ValueError, match="override is False, but sess_options were given for a se"):
        deformnd.onnx.session(content, override=False, sess_options=options)


def test_sessions_at_once():
    """With different numbers of threads, from several threads, and closed meanwhile."""
    from concurrent.futures import ThreadPoolExecutor

    case = Case((40, 41), (3, 3), padding=1, channels=(16, 16))
    tensors = case.tensors(torch.float32)
    content, feed = model([call_of(case, tensors)])
    want = case.call(tensors)

    def some(threads):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = deformnd.onnx.session(content, sess_options=options)
        return [relative_error(torch.from_numpy(session.run(None, feed)[0]), want) for _ in "abc"]

    with ThreadPoolExecutor(4) as pool:
        for errors in pool.map(some, [1, 2, 3, 1, 2, 3, 1, 2]):
            assert max(errors) < 1e-6


def test_without_torch(tmp_path):
    """The library alone, copied, in a process that has neither torch nor this package."""
    case = Case((6, 7), (3, 3), padding=1)
    tensors = case.tensors(torch.float32)
    content, feed = model([call_of(case, tensors)])
    copied = tmp_path / "deformnd.so"
    copied.write_bytes(open(deformnd.onnx.custom_ops_library(), "rb").read())
    (tmp_path / "model.onnx").write_bytes(content)
    np.savez(tmp_path / "feed.npz", **feed)
    code = """
        import sys, numpy as np, onnxruntime
        sys.modules["torch"] = None
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(sys.argv[1])
        session = onnxruntime.InferenceSession("model.onnx", options)
        np.save("output.npy", session.run(None, dict(np.load("feed.npz")))[0])
    """
    command = [sys.executable, "-c", textwrap.dedent(code), copied]
    subprocess.run(command, cwd=tmp_path, check=True)
    got = torch.from_numpy(np.load(tmp_path / "output.npy"))
    assert relative_error(got, case.call(tensors)) < 1e-6


class Many(torch.nn.Module):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls
        self.weight = torch.nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x, *offsets):
        return sum(
            deformnd.deform_conv2d(x, self.weight, offset, dilation=1 + i).sum()
            for i, offset in enumerate(offsets)
        )


def test_nodes_run_on_the_core_and_functions_elsewhere(tmp_path):
    """On the core bit by bit as in torch."""
    case = Case((40, 41), (3, 3), padding=1, channels=(16, 16))
    calls = Calls([case])
    path = tmp_path / "model.onnx"
    deformnd.onnx.export(calls.eval(), tuple(calls.args), path, target="deformnd", verbose=False)
    own, elsewhere = (load(engine, path)(calls.args)[0] for engine in ("deformnd", "onnxruntime"))
    (want,) = calls(*calls.args)
    assert torch.equal(own, want)
    assert not torch.equal(elsewhere, want)
    assert relative_error(elsewhere, want) < 1e-6


def test_functions_stand_in_for_the_nodes(tmp_path):
    """One for each kind of call; of more kinds than the library has names, none are written."""
    path = tmp_path / "model.onnx"
    calls = 3
    args = [torch.randn(1, 4, 80, 80)]
    args += [torch.randn(1, 18, 80 - 2 * d, 80 - 2 * d) for d in range(1, 34)]
    export = {"target": "deformnd", "verbose": False}
    deformnd.onnx.export(Many(calls).eval(), tuple(args[:4]), path, **export)
    proto = onnx.load(path)
    names = [f.name for f in proto.functions]
    assert names == ["DeformConv", "DeformConv_2", "DeformConv_3"]
    assert [n.op_type for n in proto.graph.node if n.domain == "deformnd"] == names
    with pytest.raises(deformnd.onnx.UnsupportedError, match="more than 32 calls of different"):
        deformnd.onnx.export(Many(33).eval(), tuple(args), path, **export)


def test_openvino_reads_the_functions(tmp_path):
    openvino = pytest.importorskip("openvino")
    layer = deformnd.PackedDeformConv2d(3, 8, 3, padding=1, modulated=True).eval()
    torch.nn.init.normal_(
        layer.offset_conv.weight if hasattr(layer, "offset_conv") else layer.weight
    )
    path, x = tmp_path / "layer.onnx", torch.rand(1, 3, 16, 16)
    deformnd.onnx.export(layer, (x,), path, target="deformnd", verbose=False)
    read = deformnd.onnx.read_openvino_model(path)
    compiled = openvino.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert relative_error(torch.from_numpy(compiled(x.numpy())[0]), layer(x)) < 1e-5


@pytest.mark.parametrize("opset", [19, newest_opset()])
def test_other_operators_of_a_file_are_onnxruntimes(opset, tmp_path):
    """Where the library has taken over one of ONNX's own domain."""
    torch.manual_seed(0)
    model, path, x = Network(2).eval(), tmp_path / "model.onnx", torch.randn(2, 3, 12, 9)
    for target in ("onnxruntime", "deformnd"):
        deformnd.onnx.export(model, (x,), path, target=target, opset=opset, verbose=False)
        for override in (True, False):
            session = deformnd.onnx.session(path, override=override)
            got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
            # ONNX Runtime's own adds offsets to coordinates first, which costs a digit.
            assert relative_error(torch.from_numpy(got), model(x)) < 5e-5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc")
@pytest.mark.parametrize("threads", [1, 3])
def test_a_call_takes_the_threads_of_the_session(threads, tmp_path):
    case = Case((80, 80), (3, 3), padding=1, channels=(32, 32))
    content, feed = model([call_of(case, case.tensors(torch.float32))])
    files = tmp_path / "model.onnx", tmp_path / "feed.npz"
    files[0].write_bytes(content)
    np.savez(files[1], **feed)
    code = """
        import os, sys, numpy as np, onnxruntime, deformnd.onnx
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(sys.argv[1])
        session = deformnd.onnx.session(sys.argv[2], sess_options=options)
        feed = dict(np.load(sys.argv[3]))
        before = len(os.listdir("/proc/self/task"))
        session.run(None, feed)
        print(len(os.listdir("/proc/self/task")) - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(threads), *files]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert int(said) == threads - 1


def test_example(tmp_path):
    layer = deformnd.PackedDeformConv2d(3, 8, 3, padding=1).eval()
    sizes = ({0: torch.export.Dim.DYNAMIC},)
    x = torch.full((2, 3, 16, 16), 0.5)
    path = tmp_path / "layer.onnx"
    deformnd.onnx.export(layer, (x,), path, target="deformnd", dynamic_shapes=sizes, verbose=False)
    example = Path(__file__).parents[1] / "examples" / "run_onnx.py"
    command = [sys.executable, example, path, deformnd.onnx.custom_ops_library()]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert f"[1, 8, 16, 16] begins with {layer(x)[0, 0, 0, 0].item():.4g}"[:-1] in said
