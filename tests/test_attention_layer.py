"""MultiScaleDeformableAttention: the layer around deform_attention, and mmcv's face of it."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import deformnd
from deformnd import MultiScaleDeformableAttention, deform_attention
from deformnd.compat import mmcv

SIZES = {1: [(8,), (5,)], 2: [(6, 5), (3, 4)], 3: [(3, 4, 2), (2, 2, 3)]}


def pixels(n):
    return sum(int(torch.tensor(size).prod()) for size in SIZES[n])


def trained(layer):
    torch.manual_seed(0)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    return layer


def arguments(n, boxes=False, dtype=torch.float64):
    torch.manual_seed(1)
    query, value = torch.randn(2, 7, 24), torch.randn(2, pixels(n), 24)
    points = torch.rand(2, 7, 2, 2 * n if boxes else n)
    return [t.to(dtype) for t in (query, value, points)]


def expected(layer, query, value, points, sizes, padding=None):
    """As the paper has it, a head and a point at a time."""
    n, heads, looks = layer.dims, layer.num_heads, layer.num_points
    v = layer.value_proj(value)
    if padding is not None:
        v = torch.where(padding[..., None], torch.zeros_like(v), v)
    v = v.view(len(v), -1, heads, layer.inner_dim // heads)
    shape = (*query.shape[:2], heads, layer.num_levels, looks)
    weights = layer.attention_weights(query).view(*shape[:3], -1).softmax(-1).view(shape)
    offsets = layer.sampling_offsets(query).view(*shape, n)
    at = torch.empty_like(offsets)
    for level, size in enumerate(sizes):
        for axis in range(n):  # x first
            center = points[:, :, level, axis, None, None]
            scale = 1 / size[n - 1 - axis]
            if points.shape[-1] == 2 * n:
                scale = points[:, :, level, n + axis, None, None] / (2 * looks)
            at[:, :, :, level, :, axis] = center + offsets[:, :, :, level, :, axis] * scale
    return layer.output_proj(deform_attention(v, sizes, at, weights))


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("boxes", [False, True])
def test_forward(n, boxes):
    args = arguments(n, boxes)
    layer = trained(MultiScaleDeformableAttention(24, 4, 2, 3, dims=n, inner_dim=8)).double()
    padding = torch.rand(2, pixels(n)) < 0.3
    for mask in (None, padding):
        got = layer(*args, SIZES[n], mask)
        torch.testing.assert_close(got, expected(layer, *args, SIZES[n], mask))
    got.square().sum().backward()
    assert all(p.grad.any() for p in layer.parameters())
    torch.testing.assert_close(layer(*args, torch.tensor(SIZES[n])), layer(*args, SIZES[n]))
    one = args[2][:, :, :1]  # a level for all
    torch.testing.assert_close(
        layer(*args[:2], one, SIZES[n]), layer(*args[:2], one.expand_as(args[2]), SIZES[n])
    )


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_fresh_layer_looks_outwards_and_weighs_alike(n):
    layer = MultiScaleDeformableAttention(24, 6, 2, 3, dims=n)
    assert not any(p.any() for k, p in layer.named_parameters() if k.startswith("attention_w"))
    offsets = layer.sampling_offsets.bias.view(6, 2, 3, n)
    torch.testing.assert_close(offsets.abs().amax(-1), torch.tensor([1.0, 2, 3]).expand(6, 2, 3))
    first = offsets[:, :, :1]
    torch.testing.assert_close(offsets, first * torch.tensor([1.0, 2, 3]).view(3, 1))
    assert len(torch.unique(first[:, 0, 0].detach().round(decimals=3), dim=0)) == (
        2 if n == 1 else 6
    )


def test_half_precision_has_exact_locations():
    """Of a level of 1,000 pixels, half precision would miss by half a pixel."""
    layer = MultiScaleDeformableAttention(4, 1, 1, 1, dims=1)
    nn.init.zeros_(layer.sampling_offsets.bias)
    for linear in (layer.value_proj, layer.output_proj):
        nn.init.eye_(linear.weight)
    value = torch.randn(1, 1000, 4)
    points = ((torch.arange(1000.0) + 0.5) / 1000).view(1, 1000, 1, 1)
    for dtype in (torch.bfloat16, torch.float16):
        got = layer.to(dtype)(value.to(dtype), value.to(dtype), points, [(1000,)])
        assert got.dtype == dtype
        torch.testing.assert_close(got, value.to(dtype), rtol=2e-2, atol=2e-2)
    layer.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer(value, value, points, [(1000,)])
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), value, rtol=2e-2, atol=2e-2)


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_scripted_traced_exported_compiled_and_copied():
    layer, args = trained(MultiScaleDeformableAttention(24, 4, 2, 3)), arguments(2)
    args, sizes = [t.float() for t in args], [list(size) for size in SIZES[2]]
    mask = torch.rand(2, pixels(2)) < 0.3
    wanted = layer(*args, sizes, mask)
    scripted = torch.jit.script(layer)
    torch.testing.assert_close(scripted(*args, sizes, mask), wanted)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, query, value, points, mask):
            return self.layer(query, value, points, sizes, mask)

    model, inputs = Model(), (*args, mask)
    for again in (
        torch.jit.trace(model, inputs),
        torch.compile(model, backend="eager", fullgraph=True),
        torch.export.export(model, inputs).module(),
        torch.fx.symbolic_trace(model),
        copy.deepcopy(model),
    ):
        torch.testing.assert_close(again(*inputs), wanted)
    other = pickle.loads(pickle.dumps(layer))
    torch.testing.assert_close(other(*args, sizes, mask), wanted)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    assert list(torch.load(file)) == [
        f"{key}.{kind}"
        for key in ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
        for kind in ("weight", "bias")
    ]
    assert repr(layer).startswith(
        "MultiScaleDeformableAttention(\n  24, num_heads=4, num_levels=2, num_points=3\n"
    )
    assert "num_points=4, dims=3, inner_dim=8" in repr(
        MultiScaleDeformableAttention(24, dims=3, inner_dim=8)
    )
    assert MultiScaleDeformableAttention(24, device="meta").value_proj.weight.is_meta


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"embed_dim": 0}, ValueError, "embed_dim is 0, expected an int from 1"),
        ({"embed_dim": "a"}, TypeError, "embed_dim is 'a', expected an int"),
        ({"num_heads": 5}, ValueError, "num_heads is 5, expected a divisor of embed_dim 24"),
        ({"inner_dim": 9}, ValueError, "num_heads is 8, expected a divisor of inner_dim 9"),
        ({"num_levels": 0}, ValueError, "num_levels is 0"),
        ({"num_points": 1.5}, TypeError, "num_points is 1.5"),
        ({"dims": 4}, ValueError, "dims is 4, expected 1, 2 or 3"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=f"^MultiScaleDeformableAttention: {message}"):
        MultiScaleDeformableAttention(**{"embed_dim": 24, **options})


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"query": torch.rand(2, 24)}, ValueError, r"query is \[2, 24\], expected \[B, Q, 24\]"),
        ({"query": None}, TypeError, "query is a NoneType, expected a Tensor"),
        (
            {"value": torch.rand(1, 42, 24)},
            ValueError,
            r"value is .*, expected \[B, S, 24\]; query",
        ),
        ({"value": torch.rand(2, 42, 25)}, ValueError, r"value is \[2, 42, 25\], expected"),
        ({"value": torch.rand(2, 43, 24)}, ValueError, "deform_attention: .*43"),
        ({"points": None}, TypeError, "reference_points is a NoneType"),
        (
            {"points": torch.rand(2, 7, 2, 3)},
            ValueError,
            r"reference_points is \[2, 7, 2, 3\], expected \[2, 7, 2, 2\] for points or "
            r"\[2, 7, 2, 4\] for boxes",
        ),
        ({"points": torch.rand(2, 7, 3, 2)}, ValueError, r"reference_points is \[2, 7, 3, 2\]"),
        (
            {"sizes": [(6, 5)]},
            ValueError,
            r"shapes is \[\(6, 5\)\], expected the sizes of 2 levels",
        ),
        ({"sizes": [6, 5]}, TypeError, r"shapes is \[6, 5\], expected a list of the levels' sizes"),
        ({"sizes": [(6, 5), (3, 4.0)]}, TypeError, "shapes is .* each of 2 ints"),
        ({"sizes": None}, TypeError, "shapes is None"),
        ({"sizes": [(6, 5), (3,)]}, ValueError, "shapes is .* each of 2 ints"),
        ({"sizes": torch.rand(2, 2)}, TypeError, r"shapes is a tensor \[2, 2\] of torch.float32"),
        ({"sizes": torch.zeros(2, 3, 4)}, TypeError, r"shapes is a tensor \[2, 3, 4\] of"),
        (
            {"sizes": torch.ones(2, 2, dtype=torch.int64, device="meta")},
            TypeError,
            "shapes is on meta, where it has no values",
        ),
        (
            {"mask": torch.rand(2, 42)},
            TypeError,
            "padding_mask is of torch.float32, expected a Ten",
        ),
        (
            {"mask": torch.ones(2, 41, dtype=torch.bool)},
            ValueError,
            r"padding_mask is \[2, 41\], expected \[2, 42\], as value \[2, 42, 24\]",
        ),
    ],
)
def test_wrong_arguments(change, error, message):
    query, value, points = arguments(2, dtype=torch.float32)
    layer = MultiScaleDeformableAttention(24, 4, 2, 3)
    given = {"query": query, "value": value, "points": points, "sizes": SIZES[2], "mask": None}
    name = "" if message.startswith("deform_attention") else "MultiScaleDeformableAttention: "
    with pytest.raises(error, match=f"^{name}{message}"):
        layer(*{**given, **change}.values())


def test_a_script_refuses_halves_of_boxes():
    query, value, points = arguments(2, dtype=torch.float32)
    layer = torch.jit.script(MultiScaleDeformableAttention(24, 4, 2, 3))
    layer(query, value, points, SIZES[2])
    points = torch.cat([points, points[..., :1]], -1)
    with pytest.raises(
        torch.jit.Error, match="reference_points have 3 coordinates, expected 2 for"
    ):
        layer(query, value, points, SIZES[2])


@pytest.mark.parametrize("batch_first", [False, True])
def test_mmcv(batch_first):
    """By mmcv's arguments; a layer that has learned nothing adds dropout's zeros to identity."""
    query, value, points = arguments(2, dtype=torch.float32)
    layer = mmcv.MultiScaleDeformableAttention(
        24, 4, 2, 3, 128, 0.5, batch_first, dict(type="LN"), None, value_proj_ratio=0.5
    )
    trained(layer).eval()
    core = MultiScaleDeformableAttention(24, 4, 2, 3, inner_dim=12)
    core.load_state_dict(layer.state_dict())
    mask = torch.rand(2, 42) < 0.3
    position, identity = torch.rand_like(query), torch.rand_like(query)
    turn = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    sizes = torch.tensor(SIZES[2])
    got = layer(
        turn(query),
        None,
        turn(value),
        turn(identity),
        turn(position),
        mask,
        points,
        sizes,
        torch.tensor([0, 30]),
        something_else=1,
    )
    wanted = core(query + position, value, points, SIZES[2], mask) + identity
    torch.testing.assert_close(got, turn(wanted))
    same = torch.rand(2, 42, 24)  # a self-attention
    points = torch.rand(2, 42, 2, 2)
    got = layer(turn(same), reference_points=points, spatial_shapes=sizes)
    torch.testing.assert_close(got, turn(core(same, same, points, SIZES[2]) + same))
    with pytest.warns(DeprecationWarning, match="residual is deprecated, identity is its name"):
        old = layer(
            turn(same), residual=turn(2 * same), reference_points=points, spatial_shapes=sizes
        )
    torch.testing.assert_close(old, got + turn(same))
    given = {"value": turn(value), "reference_points": points, "spatial_shapes": sizes}
    for change, message in (
        ({"spatial_shapes": None}, "spatial_shapes is None, expected a list"),
        ({"spatial_shapes": sizes[:1]}, "spatial_shapes is .*, expected the sizes of 2 levels"),
        ({"key_padding_mask": mask[:, 1:]}, r"key_padding_mask is \[2, 41\], expected \[2, 42\]"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"MultiScale.*Attention: {message}"):
            layer(turn(same), **{**given, **change})
    layer.init_weights()
    assert not layer.attention_weights.weight.any()
    nn.init.zeros_(layer.output_proj.weight)
    assert torch.equal(layer(turn(same), reference_points=points, spatial_shapes=sizes), turn(same))
    with pytest.raises(TypeError, match="reference_points is a NoneType"):
        layer(turn(same), spatial_shapes=sizes)
    with pytest.raises(ValueError, match=r"^MultiScaleDeformableAttention: .*divisor of embed_dim"):
        mmcv.MultiScaleDeformableAttention(24, 5)


def test_functions_of_mmcv():
    torch.manual_seed(0)
    value, at, weight = (
        torch.rand(2, 42, 2, 4),
        torch.rand(2, 3, 2, 2, 4, 2),
        torch.rand(2, 3, 2, 2, 4),
    )
    wanted = deformnd.deform_attention(value, SIZES[2], at, weight)
    sizes, start = torch.tensor(SIZES[2]), torch.tensor([0, 30])
    assert torch.equal(mmcv.multi_scale_deformable_attn_pytorch(value, sizes, at, weight), wanted)
    apply = mmcv.MultiScaleDeformableAttnFunction.apply
    assert torch.equal(apply(value, sizes, start, at, weight, 64), wanted)
