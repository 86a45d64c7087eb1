"""transformers' models on deformnd's kernels: outputs and gradients as before."""

import contextlib
import copy
import importlib
import inspect
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.profiler import profile

import deformnd
from cases import relative_error
from deformnd import compat
from deformnd.compat import transformers as ours
from deformnd.compat.transformers import accelerate

try:
    import transformers
except ImportError as error:
    transformers, why = None, f"transformers does not import: {error}"
else:
    why = f"transformers is {transformers.__version__}, the tests are for 5"
    why = "" if int(transformers.__version__.split(".")[0]) >= 5 else why

needs_transformers = pytest.mark.skipif(bool(why), reason=why)
DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
needs_core = pytest.mark.skipif(not deformnd.has_ops(), reason="built without the C++ core")


def resnet(stages):
    return transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        out_features=[f"stage{i}" for i in stages],
    )


def swin(stages):
    return transformers.SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_features=[f"stage{i}" for i in stages],
    )


def encoder_and_decoder(heads=4):
    return {
        **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 16),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), heads),
        "d_model": 32,
        "num_queries": 7,
    }


def detr(**options):
    """What RT-DETR and those that come of it are made of."""
    return {
        **encoder_and_decoder(),
        "backbone_config": resnet([2, 3, 4]),
        "encoder_hidden_dim": 32,
        "encoder_in_channels": [16, 24, 32],
        "decoder_in_channels": [32, 32, 32],
        "encoder_layers": 1,
        "num_denoising": 0,
        **options,
    }


def order():
    """Of PP-DocLayoutV2's second network."""
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 16)
    return {**sizes, "num_attention_heads": 2, "num_hidden_layers": 1}


def text():
    return {
        "model_type": "bert",
        "vocab_size": 120,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 32,
    }


def grounding():
    return {
        **encoder_and_decoder(),
        "backbone_config": swin([2, 3, 4]),
        "text_config": text(),
        "d_model": 64,  # or a norm over the one pixel of the last level would see no variance
        "num_feature_levels": 4,
        "max_text_len": 16,
    }


def clip():
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "projection_dim"), 16)
    heads = {"num_attention_heads": 2, "num_hidden_layers": 1}
    tokens = {"vocab_size": 120, "max_position_embeddings": 16}
    return {"model_type": "clip_text_model", **sizes, **heads, **tokens}


def masks(**options):
    return {
        "backbone_config": swin([1, 2, 3, 4]),
        **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
        **dict.fromkeys(("hidden_dim", "mask_dim", "conv_dim"), 32),
        **dict.fromkeys(("encoder_feedforward_dim", "dim_feedforward"), 16),
        "num_attention_heads": 4,
        "num_queries": 7,
        **options,
    }


def vits(kind):
    backbone = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 8,
        "num_windows": 4,
        "out_features": ["stage1", "stage2"],
    }
    heads = ("decoder_self_attention_heads", "decoder_cross_attention_heads")
    options = {
        "backbone_config": getattr(transformers, kind)(**backbone),
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_ffn_dim": 16,
        "num_queries": 7,
        "group_detr": 1,
        **dict.fromkeys(heads, 4),
    }
    if kind == "LwDetrViTConfig":
        options["projector_scale_factors"] = [2.0, 0.5]
    return options


def omdet():
    return {
        "backbone_config": resnet([2, 3, 4]),
        "text_config": clip(),
        "image_size": 64,
        "apply_layernorm_after_vision_backbone": False,
        "encoder_in_channels": [16, 24, 32],
        "vision_features_channels": [32, 32, 32],
        **dict.fromkeys(("encoder_hidden_dim", "decoder_hidden_dim"), 32),
        "class_embed_dim": 16,
        **dict.fromkeys(("text_projection_in_dim", "text_projection_out_dim"), 16),
        **dict.fromkeys(("encoder_attention_heads", "decoder_num_heads"), 4),
        **dict.fromkeys(("encoder_dim_feedforward", "decoder_dim_feedforward"), 16),
        "task_encoder_hidden_dim": 16,
        "decoder_num_layers": 2,
        "num_queries": 7,
    }


MASK = torch.ones(2, 64, 64, dtype=torch.long)
MASK[1, :, 50:] = 0
TEXT = {"input_ids": torch.tensor([[101, 7, 8, 102]]).expand(2, -1)}
TASKS = {
    "classes_input_ids": torch.tensor([[5, 6, 7, 8]] * 4),
    "classes_attention_mask": torch.ones(4, 4, dtype=torch.long),
    "tasks_input_ids": torch.tensor([[5, 6, 7, 8]] * 2),
    "tasks_attention_mask": torch.ones(2, 4, dtype=torch.long),
    "classes_structure": torch.tensor([2, 2]),
}

# By the folder in transformers.models: class, what its configuration is made of, further inputs.
# One folder may have several, as (folder, what is special).
MODELS = {
    "deformable_detr": (
        "DeformableDetrForObjectDetection",
        lambda: {**encoder_and_decoder(), "backbone_config": resnet([2, 3, 4])},
        {"pixel_mask": MASK},
    ),
    "deformable_detr, boxes": (
        "DeformableDetrForObjectDetection",
        lambda: {
            **encoder_and_decoder(),
            "backbone_config": resnet([2, 3, 4]),
            "two_stage": True,
            "with_box_refine": True,
            "two_stage_num_proposals": 7,
        },
        {"pixel_mask": MASK},
    ),
    "rt_detr": ("RTDetrForObjectDetection", detr, {}),
    "rt_detr_v2": ("RTDetrV2ForObjectDetection", detr, {}),
    "rt_detr_v2, discrete": (
        "RTDetrV2ForObjectDetection",
        lambda: detr(decoder_method="discrete"),
        {},
    ),
    "d_fine": ("DFineForObjectDetection", detr, {}),
    "d_fine, points by level": (
        "DFineForObjectDetection",
        lambda: detr(decoder_n_points=[3, 6, 2]),
        {},
    ),
    "deimv2": ("Deimv2ForObjectDetection", detr, {}),
    "pp_doclayout_v2": (
        "PPDocLayoutV2ForObjectDetection",
        lambda: detr(class_thresholds=[0.5, 0.5], class_order=[0, 1], reading_order_config=order()),
        {},
    ),
    "pp_doclayout_v3": (
        "PPDocLayoutV3ForObjectDetection",
        lambda: detr(
            backbone_config=resnet([1, 2, 3, 4]),
            mask_feature_channels=[16, 16],
            x4_feat_dim=8,
            num_prototypes=4,
        ),
        {},
    ),
    "pp_doclayout_v4": ("PPDocLayoutV4ForObjectDetection", detr, {}),
    "lw_detr": ("LwDetrForObjectDetection", lambda: vits("LwDetrViTConfig"), {}),
    "rf_detr": ("RfDetrForObjectDetection", lambda: vits("RfDetrDinov2Config"), {}),
    "grounding_dino": ("GroundingDinoForObjectDetection", grounding, TEXT),
    "mm_grounding_dino": ("MMGroundingDinoForObjectDetection", grounding, TEXT),
    "omdet_turbo": ("OmDetTurboForObjectDetection", omdet, TASKS),
    "mask2former": ("Mask2FormerForUniversalSegmentation", masks, {}),
    "oneformer": ("OneFormerForUniversalSegmentation", masks, {"task_inputs": torch.ones(2, 77)}),
}


def build(name):
    kind, options, inputs = MODELS[name]
    if not hasattr(transformers, kind):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    if kind.endswith("Segmentation"):
        pytest.importorskip("scipy")  # for a loss, which their constructors make
    torch.manual_seed(0)
    kind = getattr(transformers, kind)
    model = kind(kind.config_class(**options())).eval()
    for key, p in model.named_parameters():
        if "sampling_offsets" in key or "attention_weights" in key:
            nn.init.normal_(p, std=0.3)  # or all looks would be at the same few places
        if key.startswith("language_backbone"):
            p.requires_grad_(False)  # OmDet-Turbo keeps its results for the next call
    return model, {"pixel_values": torch.rand(2, 3, 64, 64), **inputs}


def tensors(outputs):
    """All floating ones, in order."""
    if isinstance(outputs, torch.Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    if isinstance(outputs, (tuple, list)):
        return [t for o in outputs for t in tensors(o)]
    return []


def results(model, inputs):
    """Outputs and gradients, each as one vector."""
    outputs = [t for t in tensors(model(**inputs)) if t.isfinite().all()]
    model.zero_grad()
    sums = [
        t.mul(torch.linspace(-1, 1, t.numel(), device=t.device).view(t.shape)).sum()
        for t in outputs
    ]
    sum(t for t in sums if t.requires_grad).backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    assert len(outputs) > 1 and len(grads) > 20
    return torch.cat([t.detach().flatten() for t in outputs]), torch.cat(grads)


def assert_equal(got, wanted, limit=1e-5):
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert relative_error(a, b) <= limit


@contextlib.contextmanager
def counting(at_least):
    """deformnd's kernels run that often; 0 is never."""
    with profile() as p:
        yield
    names = [e.name for e in p.events()]
    for name in ("deformnd::deform_attention", "deformnd::deform_attention_backward"):
        assert names.count(name) >= at_least and (at_least or not names.count(name))


@needs_transformers
@needs_core
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_models(name, device):
    model, inputs = build(name)
    model.to(device)
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    wanted = results(model, inputs)
    with accelerate() as handle, counting(1):
        assert name.split(",")[0] in handle.models and device in handle.devices
        got = results(model, inputs)
    # On GPUs a backbone's convolutions round to TF32, which makes small differences larger.
    assert_equal(got, wanted, 1e-5 if device == "cpu" else 1e-4)
    with counting(0):
        results(model, inputs)


@needs_transformers
@needs_core
def test_every_model_that_samples_is_tested():
    with accelerate() as handle:
        assert set(handle.models) <= {name.split(",")[0] for name in MODELS}
        assert "deformable_detr" in handle.models and not handle.left


@needs_transformers
@needs_core
def test_undone():
    """D-FINE's layers hold the function that samples; none built inside keeps ours."""
    module = importlib.import_module("transformers.models.d_fine.modeling_d_fine")
    function = module.multi_scale_deformable_attention_v2
    before = {k: getattr(function, k) for k in ("__code__", "__defaults__", "__kwdefaults__")}
    signature = inspect.signature(function)
    first = accelerate()
    with pytest.raises(ZeroDivisionError), accelerate() as second:
        first.undo()
        first.undo()
        assert second.models == first.models
        assert function.__code__ is not before["__code__"]
        assert inspect.signature(function) == signature
        model, inputs = build("d_fine")
        with counting(1):
            results(model, inputs)
        twin = copy.deepcopy(model)
        raise ZeroDivisionError
    assert {k: getattr(function, k) for k in before} == before
    assert not hasattr(function, "__signature__")
    for m in (model, twin):
        with counting(0):
            results(m, inputs)
    assert accelerate._uses == 0 and accelerate._undo is None


@needs_transformers
@needs_core
def test_functions_in_other_dtypes():
    """Results have the dtype that transformers' have, under autocast, too; float64 is exact."""
    module = importlib.import_module("transformers.models.oneformer.modeling_oneformer")
    torch.manual_seed(0)
    sizes = [(6, 5), (3, 2)]
    value, at, weight = (
        torch.rand(2, 36, 2, 4),
        torch.rand(2, 3, 2, 2, 4, 2),
        torch.rand(2, 3, 2, 2, 4),
    )
    half = torch.bfloat16
    for dtypes in ((torch.float64,) * 3, (half, half, half), (half, half, torch.float32)):
        args = [t.to(d) for t, d in zip((value, at, weight), dtypes, strict=True)]
        function = module.multi_scale_deformable_attention
        wanted = function(args[0], sizes, *args[1:])
        with accelerate():
            got = function(args[0], torch.tensor(sizes), *args[1:])
        assert got.dtype == wanted.dtype and got.is_contiguous()
        torch.testing.assert_close(got, wanted, rtol=5e-2, atol=5e-2)
    with torch.autocast("cpu", dtype=half):
        wanted = function(value, sizes, at, weight)
        with accelerate():
            got = function(value, sizes, at, weight)
    assert got.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(got, wanted)


@needs_transformers
@needs_core
def test_other_devices_keep_transformers_own():
    module = importlib.import_module("transformers.models.oneformer.modeling_oneformer")
    args = [
        torch.rand(s, device="meta") for s in ((2, 36, 2, 4), (2, 3, 2, 1, 4, 2), (2, 3, 2, 1, 4))
    ]
    with accelerate(), profile() as p:
        module.multi_scale_deformable_attention(args[0], [(6, 6)], *args[1:])
    assert not any("deformnd" in e.name for e in p.events())


@needs_transformers
@needs_core
def test_compile_and_export():
    model, inputs = build("rt_detr")
    x = inputs["pixel_values"]
    with accelerate(), torch.no_grad():
        wanted = model(x).logits
        got = torch.compile(model, backend="eager")(x).logits
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        program = torch.export.export(model, (x,), strict=False)
        assert "deformnd.deform_attention" in str(program.graph)
    torch.testing.assert_close(program.module()(x).logits, wanted, rtol=1e-4, atol=1e-4)


@needs_transformers
@needs_core
@pytest.mark.parametrize("method", ["default", "discrete"])
def test_compiled_points_by_level(method):
    module = importlib.import_module("transformers.models.d_fine.modeling_d_fine")
    torch.manual_seed(0)
    value, at = torch.rand(2, 36, 2, 4), 1.4 * torch.rand(2, 3, 2, 9, 2) - 0.2
    weight, points = torch.rand(2, 3, 2, 9), [3, 6]

    def function(value, at, weight):
        sizes = [(6, 5), (3, 2)]
        sample = module.multi_scale_deformable_attention_v2
        return sample(value, sizes, at, weight, points, method=method)

    wanted = function(value, at, weight)
    with accelerate():
        for call in (function, torch.compile(function, backend="eager", fullgraph=True)):
            torch.testing.assert_close(call(value, at, weight), wanted)


def test_without_transformers():
    if transformers is None:
        with pytest.raises(ImportError, match="accelerate: transformers is not installed"):
            accelerate()
    elif not deformnd.has_ops():
        with pytest.raises(RuntimeError, match="without its compiled kernels"):
            accelerate()
    assert "transformers" in dir(compat) and compat.transformers is ours


CONFIG = SimpleNamespace(d_model=32, num_feature_levels=3, disable_custom_kernels=True)
SIZES = [(8, 6), (4, 3), (2, 2)]


def of_the_layer(n):
    torch.manual_seed(0)
    sizes = torch.tensor(SIZES)
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, 50:] = False
    return torch.rand(2, 5, 32), {
        "attention_mask": mask,
        "encoder_hidden_states": torch.rand(2, 64, 32),
        "position_embeddings": torch.rand(2, 5, 32),
        "reference_points": torch.rand(2, 5, 3, n),
        "spatial_shapes": sizes,
        "spatial_shapes_list": SIZES,
        "level_start_index": torch.tensor([0, 48, 60]),
        "output_attentions": True,
    }


@needs_transformers
@pytest.mark.parametrize("n", [2, 4])
def test_layer_of_the_same_name(n):
    module = importlib.import_module("transformers.models.deformable_detr.modeling_deformable_detr")
    name = "DeformableDetrMultiscaleDeformableAttention"
    theirs, layer = getattr(module, name)(CONFIG, 4, 3), getattr(ours, name)(CONFIG, 4, 3)
    layer.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(layer.state_dict())
    query, inputs = of_the_layer(n)
    expected = theirs(query, **inputs)
    for got, wanted in zip(layer(query, **inputs), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    del inputs["spatial_shapes_list"]  # as older versions call it
    torch.testing.assert_close(layer(query, **inputs)[0], expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"encoder_hidden_states": None}, TypeError, "encoder_hidden_states is a NoneType"),
        (
            {"encoder_hidden_states": torch.rand(2, 64, 7)},
            ValueError,
            r"encoder_hidden_states is \[2, 64, 7\], expected \[B, S, 32\]; hidden_states \[2, 5",
        ),
        ({"reference_points": None}, TypeError, "reference_points is a NoneType"),
        ({"spatial_shapes_list": [(8, 6)]}, ValueError, "spatial_shapes is .* sizes of 3 levels"),
        (
            {"spatial_shapes_list": None, "spatial_shapes": torch.rand(3, 2)},
            TypeError,
            r"spatial_shapes is a tensor \[3, 2\] of torch.float32",
        ),
        ({"attention_mask": torch.ones(2, 64)}, TypeError, "attention_mask is of torch.float32"),
        (
            {"attention_mask": torch.ones(2, 64, dtype=torch.int64)},
            TypeError,
            "attention_mask is of torch.int64, expected a Tensor of torch.bool",
        ),
        (
            {"attention_mask": torch.ones(2, 7, dtype=torch.bool)},
            ValueError,
            r"attention_mask is \[2, 7\], expected \[2, 64\], as encoder_hidden_states",
        ),
    ],
)
def test_messages_name_transformers_arguments(change, error, message):
    layer = ours.DeformableDetrMultiscaleDeformableAttention(CONFIG, 4, 3)
    query, inputs = of_the_layer(2)
    with pytest.raises(error, match=f"^DeformableDetrMultiscaleDeformableAttention: {message}"):
        layer(query, **{**inputs, **change})


def test_a_call_may_come_between_the_steps_of_an_exchange():
    """As one of another thread's does. Outside and inside, the result is the same."""

    def theirs(value, more=1, *, scale=2):
        return value * more * scale

    results, code = [], theirs.__code__

    def at_each_line(frame, event, _):
        if frame.f_code.co_filename == compat.__file__:
            results.append(theirs(torch.ones(())).item())
            return at_each_line
        return None

    before = sys.gettrace()
    sys.settrace(at_each_line)
    try:
        undo = compat._divert(theirs, ("cpu",), lambda value, more=1, *, scale=2: value * 2)
        inside = theirs.__code__
        undo()
    finally:
        sys.settrace(before)
    assert inside is not code and theirs.__code__ is code
    assert len(results) > 10 and set(results) == {2.0}


@needs_transformers
@needs_core
def test_a_wrong_call_has_transformers_message():
    module = importlib.import_module("transformers.models.d_fine.modeling_d_fine")
    function = module.multi_scale_deformable_attention_v2
    for call in (function, lambda: function(None, [], None, None, [])):
        with pytest.raises((TypeError, AttributeError)) as theirs:
            call()
        with accelerate(), pytest.raises(theirs.type, match=f"^{re.escape(str(theirs.value))}$"):
            call()


@needs_transformers
def test_convert():
    model, inputs = build("rt_detr")
    expected = model(**inputs).logits
    state = model.state_dict()
    deformnd.convert(model, check=inputs, verbose=False)
    found = [m for m in model.modules() if type(m) is ours.MultiScaleDeformableAttention]
    assert len(found) == 2
    with counting(1):
        results(model, inputs)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    model.load_state_dict(state)
    assert deformnd.original_state_dict(model).keys() == state.keys()
