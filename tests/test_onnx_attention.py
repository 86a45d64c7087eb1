"""deform_attention in exported models, run by the real engines."""

import gc
import math

import onnx
import pytest
import torch
from torch import nn

from cases import relative_error
from deformnd import deform_attention
from deformnd.onnx import UnsupportedError, check, export
from test_attention import SHAPES, Net, make
from test_onnx import ENGINES, TARGETS, load, newest_opset, run
from test_onnx import engines as engines_of_convolutions

# Relative to float64; locations are multiplied by the size of a level in float32.
BOUND = {target: 4e-6 if target == "standard" else 2e-6 for target in TARGETS}
DYNAMIC = torch.export.Dim.DYNAMIC


def engines(target):
    """Both, since no target writes a node that one of them does not have; but see there."""
    return engines_of_convolutions(target) if target == "deformnd" else ENGINES


class Calls(nn.Module):
    """Calls in each rank, their tensors one after another."""

    def __init__(self, shapes=None):
        super().__init__()
        self.shapes = list(SHAPES.values()) if shapes is None else shapes
        self.eval()

    def forward(self, *args):
        return tuple(
            deform_attention(args[3 * i], shapes, *args[3 * i + 1 : 3 * i + 3])
            for i, shapes in enumerate(self.shapes)
        )


def inputs(dtype=torch.float32, **sizes):
    """For Calls: samples inside, outside, on the edges, and on the centres of pixels."""
    torch.manual_seed(0)
    args = []
    for n, shapes in SHAPES.items():
        value, locations, weights = make(n, **sizes)
        edges = (0.0, 1.0, 0.5, 0.5 / shapes[0][-1], -0.5 / shapes[0][-1], 1 + 0.5 / shapes[0][-1])
        for query, at in enumerate(edges[: locations.shape[1]]):
            locations[:, query] = at
        args += [value, locations, weights]
    return tuple(t.to(dtype) for t in args)


def exact(args):
    return Calls()(*(t.double() for t in args))


def save(path, args, target, model=None, **options):
    export(model or Calls(), args, path, target=target, verify=False, verbose=False, **options)
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    assert all(node.name for node in proto.graph.node)
    return proto


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("target", TARGETS)
def test_every_rank(target, batch, tmp_path):
    path, args = tmp_path / "model.onnx", inputs(batch=batch)
    for opset in (TARGETS[target].oldest, newest_opset()):
        proto = save(path, args, target, opset=opset)
        nodes = [node.op_type for node in proto.graph.node]
        if target == "standard":
            assert nodes.count("GridSample") == sum(map(len, SHAPES.values()))
        if target == "precise":
            assert "GridSample" not in nodes
        for engine in engines(target):
            for got, want in zip(run(engine, path, args), exact(args), strict=True):
                assert got.dtype == torch.float32
                assert relative_error(got, want) < BOUND[target], (engine, opset)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("queries", [3, 400])
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_few_queries_are_gathered(target, queries, dynamic, tmp_path):
    shapes = [(12, 20), (6, 10)]
    args = tuple(t.float() for t in make(2, queries=queries, shapes=shapes))
    sizes = (({}, {1: DYNAMIC}, {1: DYNAMIC}),) if dynamic else None
    model, path = Calls([shapes]), tmp_path / "model.onnx"
    proto = save(path, args, target, model, dynamic_shapes=sizes)
    found = "GridSample" in [node.op_type for node in proto.graph.node]
    # As many as are not known are taken for many.
    assert found == (queries == 400 or dynamic)
    (want,) = model(*(t.double() for t in args))
    for engine in engines(target):
        assert relative_error(run(engine, path, args)[0], want) < BOUND["standard"]


@pytest.mark.parametrize("target", TARGETS)
def test_dtypes(target, tmp_path):
    path = tmp_path / "model.onnx"
    for dtype, bound in ((torch.float16, 1e-3), (torch.float64, 1e-14)):
        args = inputs(dtype)
        if dtype == torch.float16:  # the accurate choice: locations in float32
            args = tuple(t.float() if i % 3 == 1 else t for i, t in enumerate(args))
        save(path, args, target)
        for engine in engines(target):
            # OpenVINO computes float64 in float32.
            least = BOUND[target] if engine == "openvino" else 0.0
            for got, want in zip(run(engine, path, args), exact(args), strict=True):
                assert got.dtype == dtype
                assert relative_error(got, want) < max(bound, least), (engine, dtype)


@pytest.mark.parametrize("target", TARGETS)
def test_locations_that_are_not_finite_or_huge(target, tmp_path):
    path, args = tmp_path / "model.onnx", inputs()
    save(path, args, target)
    loaded = {engine: load(engine, path) for engine in engines(target)}
    for bad in (10.0, 3e9, -3e38, float("inf"), -float("inf"), float("nan")):
        bent = [t.clone() for t in args]
        for locations in bent[1::3]:
            locations.view(-1)[::7] = bad
        for engine, call in loaded.items():
            for got, want in zip(call(bent), exact(bent), strict=True):
                assert relative_error(got, want) < BOUND[target], (engine, bad)


@pytest.mark.parametrize("target", TARGETS)
def test_dynamic_sizes(target, tmp_path):
    """Of the batch, of the queries, and of levels that are sizes of tensors."""

    def given(batch, queries, *sizes):
        features = (torch.randn(batch, 8, *size) for size in sizes)
        locations = torch.rand(batch, queries, 2, 2, 3, 2) * 1.6 - 0.3
        return (*features, locations, torch.rand(batch, queries, 2, 2, 3))

    level = {0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC}
    sizes = (level, level, {0: DYNAMIC, 1: DYNAMIC}, {0: DYNAMIC, 1: DYNAMIC})
    path = tmp_path / "model.onnx"
    args = given(2, 5, (6, 8), (3, 4))
    save(path, args, target, Net().eval(), dynamic_shapes=sizes)
    for engine in engines(target):
        loaded = load(engine, path)
        for other in (args, given(3, 7, (9, 5), (2, 7)), given(1, 1, (1, 1), (5, 1))):
            (got,) = loaded(other)
            assert relative_error(got, Net()(*(t.double() for t in other))) < BOUND[target]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rank", SHAPES)
def test_dynamic_batch_and_queries_of_each_rank(rank, target, tmp_path):
    shapes, path = SHAPES[rank], tmp_path / "model.onnx"

    def given(**sizes):
        return tuple(t.float() for t in make(rank, **sizes))

    both = {0: DYNAMIC, 1: DYNAMIC}
    sizes = (({0: DYNAMIC}, both, both),)
    save(path, given(), target, Calls([shapes]), dynamic_shapes=sizes)
    for engine in engines(target):
        loaded = load(engine, path)
        for args in (given(), given(batch=1, queries=5), given(batch=0), given(queries=0)):
            (want,) = Calls([shapes])(*(t.double() for t in args))
            if want.numel():
                assert relative_error(loaded(args)[0], want) < BOUND[target], engine
            elif engine != "openvino":
                assert loaded(args)[0].shape == want.shape


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("sizes", [{"batch": 0}, {"queries": 0}])
def test_empty(target, sizes, tmp_path):
    args = inputs(**sizes)
    save(tmp_path / "model.onnx", args, target)
    got = run("onnxruntime", tmp_path / "model.onnx", args)
    assert [t.shape for t in got] == [t.shape for t in exact(args)]


def test_what_cannot_be_exported_says_so(tmp_path):
    path = tmp_path / "model.onnx"
    for target, opset in (("onnxruntime", 18), ("openvino", 18), ("standard", 17), ("precise", 17)):
        message = f"deform_attention cannot be exported for target '{target}' at opset {opset}"
        with pytest.raises(UnsupportedError, match=message):
            save(path, inputs(), target, opset=opset)
    with pytest.raises(UnsupportedError, match=r"deform_attention .* bfloat16 .*model\.float\(\)"):
        save(path, inputs(torch.bfloat16), "precise")
    assert not path.exists()


class TensorOfShapes(nn.Module):
    def forward(self, value, locations, weights, shapes):
        return deform_attention(value, shapes, locations, weights)


def test_shapes_in_a_tensor_are_not_known(tmp_path):
    """They are values, which an export does not know; in eager mode they will do."""
    args = (*(t.float() for t in make(2)), torch.tensor(SHAPES[2]))
    message = r"deform_attention: shapes is a tensor, .* expected a list of the levels' sizes"
    with pytest.raises(ValueError, match=message):
        export(TensorOfShapes().eval(), args, tmp_path / "model.onnx", verbose=False)
    assert TensorOfShapes()(*args).shape == (2, 11, 12)


@pytest.mark.parametrize("dynamo", [True, False])
def test_plain_torch_onnx_export_names_ours(dynamo, tmp_path):
    gc.collect()  # tables of other tests
    with pytest.warns(UserWarning, match=r"call deformnd\.onnx\.export\(model, args, path\) in"):
        with pytest.raises(Exception, match=r"deformnd\S+deform_attention"):
            torch.onnx.export(
                Calls(), inputs(), tmp_path / "model.onnx", dynamo=dynamo, verbose=False
            )


class Detector(nn.Module):
    """Of transformers: an image to classes and boxes."""

    def __init__(self, model):
        super().__init__()
        self.model = model.eval()
        self.eval()

    def forward(self, image):
        output = self.model(pixel_values=image)
        return output.logits, output.pred_boxes


BACKBONE = dict(
    embedding_size=8,
    hidden_sizes=[8, 16, 24, 32],
    depths=[1, 1, 1, 1],
    layer_type="basic",
    out_features=["stage2", "stage3", "stage4"],
)


def rt_detr(transformers):
    backbone = transformers.RTDetrResNetConfig(**BACKBONE)
    config = transformers.RTDetrConfig(
        backbone_config=backbone,
        encoder_hidden_dim=32,
        encoder_in_channels=[16, 24, 32],
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        d_model=32,
        num_queries=20,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=32,
        decoder_layers=2,
        decoder_attention_heads=2,
        num_labels=5,
        anchor_image_size=None,
    )
    return transformers.RTDetrForObjectDetection(config)


def deformable_detr(transformers):
    backbone = transformers.ResNetConfig(**BACKBONE)
    config = transformers.DeformableDetrConfig(
        backbone_config=backbone,
        d_model=32,
        num_queries=20,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_labels=5,
    )
    return transformers.DeformableDetrForObjectDetection(config)


def sample(self, value, shapes, sizes, starts, locations, weights, im2col_step):
    """In place of the forward of transformers' MultiScaleDeformableAttention."""
    return deform_attention(value, sizes, locations, weights)


@pytest.mark.parametrize("make_model", [rt_detr, deformable_detr])
def test_detectors_of_transformers(make_model, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, image = Detector(make_model(transformers)), torch.randn(1, 3, 96, 128)
    # Far from the initial values, so that no two queries score alike: their order would be chance.
    for parameter in model.parameters():
        fan = parameter[0].numel() if parameter.dim() > 1 else 25
        parameter.data.add_(torch.randn_like(parameter), alpha=1 / math.sqrt(fan))
    with torch.no_grad():
        theirs = model(image)
    samplers = {type(m) for m in model.modules() if "MultiScaleDef" in type(m).__name__}
    assert len(samplers) == 1
    monkeypatch.setattr(samplers.pop(), "forward", sample)
    with torch.no_grad():
        for got, want in zip(model(image), theirs, strict=True):
            assert relative_error(got, want.double()) < 1e-5
    for target in TARGETS:
        path = tmp_path / f"{target}.onnx"
        export(model, (image,), path, target=target, verbose=False)
        for engine in engines(target):
            assert check(path, model, (image,), engine=engine) < 1e-5, (target, engine)
