"""State dicts in other packages' names: what they mean is kept, or refused by name."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deformnd
from deformnd.compat import mmcv

torch.manual_seed(0)


def mmcvs(channels, modulated=True, groups=1, joint="conv_offset"):
    """A checkpoint as mmcv's packs save it, and what they compute."""
    rows = 9 * groups * (3 if modulated else 2)
    state = {
        "weight": torch.randn(channels, channels, 3, 3),
        "bias": torch.randn(channels),
        f"{joint}.weight": torch.randn(rows, channels, 3, 3) / 3,
        f"{joint}.bias": torch.randn(rows),
    }

    def forward(x):
        both = F.conv2d(x, state[f"{joint}.weight"], state[f"{joint}.bias"], padding=1)
        offset, mask = both[:, : 18 * groups], both[:, 18 * groups :].sigmoid()
        mask = mask if modulated else None
        return deformnd.deform_conv2d(x, state["weight"], offset, mask, state["bias"], padding=1)

    return state, forward


def packed(**options):
    options = {"padding": 1, "modulated": True, "generator_bias": True, **options}
    return deformnd.PackedDeformConv2d(4, 4, 3, **options)


@pytest.mark.parametrize("joint", ["conv_offset", "conv_offset_mask"])
@pytest.mark.parametrize(
    "activation", [torch.sigmoid, F.sigmoid, nn.Sigmoid(), deformnd.MaskSigmoid(1.0)]
)
def test_mmcvs_names_with_mmcvs_activation(joint, activation):
    state, forward = mmcvs(4, joint=joint)
    layer, x = packed(mask_activation=activation), torch.randn(2, 4, 6, 5)
    layer.load_state_dict(state)
    torch.testing.assert_close(layer(x), forward(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "options, message",
    [
        ({}, r"masks are the sigmoid .* mask_activation is MaskSigmoid\(scale=2.0\)"),
        ({"mask_activation": "softmax"}, "mask_activation is MaskSoftmax2d"),
        ({"mask_activation": None}, "mask_activation is None"),
        (
            {"mask_activation": torch.sigmoid, "offset_activation": torch.tanh},
            "offsets are as they are predicted, but offset_activation",
        ),
    ],
)
def test_mmcvs_names_with_another_activation(options, message, strict):
    state, _ = mmcvs(4)
    with pytest.raises(RuntimeError, match=message):
        packed(**options).load_state_dict(state, strict=strict)
    with pytest.raises(RuntimeError, match=message):
        nn.ModuleDict({"a": packed(**options)}).load_state_dict(
            {f"a.{k}": v for k, v in state.items()}, strict=strict
        )
    assert packed(**options).load_state_dict(packed(**options).state_dict())


@pytest.mark.parametrize(
    "options, given, message",
    [
        ({"modulated": False}, {}, "generators have 18 channels"),
        ({"generator_bias": False}, {}, r"conv_offset.bias \[27\] .* has no bias"),
        ({"deformable": False, "mask_groups": 2}, {"modulated": False}, "no offset_generator"),
        # 54 channels are mmcv's two groups, and would be 18 + 36 here.
        ({"mask_groups": 4}, {"groups": 2}, "offset_groups is 1 and mask_groups 4"),
    ],
)
def test_what_does_not_fit_is_said(options, given, message):
    state, _ = mmcvs(4, **given)
    layer = packed(mask_activation=torch.sigmoid, **options)
    with pytest.warns(UserWarning, match=message):
        layer.load_state_dict(state, strict=False)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"conv_offset'), pytest.warns():
        layer.load_state_dict(state)


class Block(nn.Module):
    """As a bottleneck of mmdet; version 1 kept conv2_offset beside conv2."""

    def __init__(self, layer):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 1)
        self.conv2 = layer

    def forward(self, x):
        return self.conv2(self.conv1(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("modulated", [True, False])
def test_names_of_mmdet_1(modulated, strict):
    state, forward = mmcvs(4, modulated)
    if not modulated:
        state["bias"].zero_()
    kind = mmcv.ModulatedDeformConv2dPack if modulated else mmcv.DeformConv2dPack
    model = nn.Sequential(Block(kind(4, 4, 3, padding=1)), Block(kind(4, 4, 3, padding=1)))
    old = {f"0.conv2{k.removeprefix('conv')}": v for k, v in state.items() if "offset" in k}
    old |= {"0.conv2.weight": state["weight"]} | (
        {"0.conv2.bias": state["bias"]} if modulated else {}
    )
    old |= {k: v for k, v in model.state_dict().items() if k.startswith("1.") or "conv1" in k}
    assert "0.conv2_offset.weight" in old
    kept = list(old)
    model.load_state_dict(old, strict=strict)
    assert list(old) == kept
    x = torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(model[0](x), forward(model[0].conv1(x)))


def test_names_of_mmdet_1_where_the_module_above_cannot_tell():
    state, _ = mmcvs(4)
    above = nn.Module()
    above._modules["conv2"] = packed(mask_activation=torch.sigmoid)  # past torch's add_module
    old = {"conv2.weight": state["weight"], "conv2_offset.weight": state["conv_offset.weight"]}
    with pytest.warns(UserWarning, match="conv2_offset.weight .* rename it conv2.conv_offset.weig"):
        above.load_state_dict(old, strict=False)
    # A loader that shows each layer the whole checkpoint, as mmcv 1.x has.
    layer, missing, unexpected = above.conv2, [], ["conv2_offset.weight"]
    layer._load_from_state_dict(old, "conv2.", {}, True, missing, unexpected, [])
    assert unexpected == [] and missing == ["conv2.bias"]
    weight = old["conv2.offset_generator.weight"]
    assert torch.equal(weight, state["conv_offset.weight"][:18])


def test_a_predictor_beside_a_layer_is_left_to_its_own_module():
    block = Block(mmcv.ModulatedDeformConv2dPack(4, 4, 3))
    block.conv2_offset = nn.Conv2d(4, 27, 3)
    other = Block(mmcv.ModulatedDeformConv2dPack(4, 4, 3))
    other.conv2_offset = nn.Conv2d(4, 27, 3)
    other.load_state_dict(block.state_dict())
    assert torch.equal(other.conv2_offset.weight, block.conv2_offset.weight)


PACKS = [f"PackedDeformConv{transposed}{n}d" for transposed in ("", "Transpose") for n in (1, 2, 3)]


@pytest.mark.parametrize("name", PACKS)
def test_a_predictor_of_several_modules(name):
    def layer():
        made = getattr(deformnd, name)(4, 4, 3, padding=1, modulated=True)
        norm = getattr(nn, f"BatchNorm{made.rank}d")
        for key in ("offset_generator", "mask_generator"):
            generator = getattr(made, key)
            norms = norm(generator.out_channels)
            setattr(made, key, nn.Sequential(generator, norms, nn.Identity()))
        return made

    theirs, ours = layer(), layer()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_()
    assert ours.load_state_dict(theirs.state_dict()).missing_keys == []
    x = torch.randn(2, 4, *(5,) * theirs.rank)
    torch.testing.assert_close(ours(x), theirs(x))
    foreign = {"conv_offset.weight": torch.rand(4, 4)}
    with pytest.warns(UserWarning, match="a generator is no plain convolution"):
        ours.load_state_dict(foreign, strict=False)
    ours.reset_parameters()
    for mode in (False, True):
        ours.train(mode)
        assert not ours.offset_generator(x).any() and not ours.mask_generator(x).any()
    assert ours.offset_generator[0].weight.any()  # else it could not learn behind a norm of zero
    ours.offset_generator = nn.Identity()
    with pytest.raises(ValueError, match="offset_generator is a Identity without a convolution"):
        ours.reset_parameters()


def test_original_state_dict_of_mmcvs_layers():
    state, _ = mmcvs(4)
    model = nn.Sequential(nn.ReLU(), mmcv.ModulatedDeformConv2dPack(4, 4, 3), nn.BatchNorm2d(4))
    model[1].load_state_dict(state)
    theirs = deformnd.original_state_dict(model)
    assert {k.removeprefix("1."): v.shape for k, v in theirs.items() if k.startswith("1.")} == {
        k: v.shape for k, v in state.items()
    }
    assert all(torch.equal(theirs[f"1.{k}"], v) for k, v in state.items())
    assert theirs._metadata == model.state_dict()._metadata
    model.load_state_dict(theirs)
    plain = deformnd.PackedDeformConv2d(4, 4, 3)
    assert list(deformnd.original_state_dict(plain)) == list(plain.state_dict())
    with pytest.raises(TypeError, match="model is a dict"):
        deformnd.original_state_dict({})


@pytest.mark.parametrize("kind", ["compat", "packed"])
def test_own_names_win_over_foreign_ones(kind):
    """In a checkpoint of both; what is not taken is an unexpected key."""

    def layer():
        if kind == "compat":
            return mmcv.ModulatedDeformConv2dPack(4, 4, 3, padding=1)
        return packed(mask_activation=torch.sigmoid)

    theirs, ours = layer(), layer()
    for p in theirs.parameters():
        nn.init.normal_(p)
    own, state = theirs.state_dict(), mmcvs(4)[0]
    foreign = {k: v for k, v in state.items() if "offset" in k}
    for model, given, beside in (
        (ours, {**own, **foreign}, "conv_offset.weight"),
        (ours, {**foreign, **own}, "conv_offset.weight"),
        (
            nn.ModuleDict({"conv2": ours}),
            {
                **{f"conv2.{k}": v for k, v in own.items()},
                **{f"conv2_{k.removeprefix('conv_')}": v for k, v in foreign.items()},
            },
            "conv2_offset.weight",
        ),
    ):
        with pytest.warns(UserWarning) as warned:
            found = model.load_state_dict(given, strict=False)
        assert "not loaded" in str(warned[0].message)
        assert beside in found.unexpected_keys and not found.missing_keys
        assert all(torch.equal(ours.state_dict()[k], own[k]) for k in own)
        with pytest.raises(RuntimeError, match=f'Unexpected key.*"{beside}"'), pytest.warns():
            model.load_state_dict(given)


@pytest.mark.parametrize("how", ["copy", "dict"])
@pytest.mark.parametrize(
    "to", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_a_shallow_copy_outlives_the_original(how, to):
    state, forward = mmcvs(4)
    first = nn.Sequential(Block(mmcv.ModulatedDeformConv2dPack(4, 4, 3, padding=1)))[0]
    if how == "copy":
        second = copy.copy(first)
    else:
        second = nn.Module()
        second.__dict__.update(first.__dict__)
    conv1 = first.conv1
    del first
    gc.collect()
    second = to(second)
    old = {f"conv2{k.removeprefix('conv')}": v for k, v in state.items() if "offset" in k}
    old |= {f"conv2.{k}": state[k] for k in ("weight", "bias")}
    old |= {f"conv1.{k}": v for k, v in conv1.state_dict().items()}
    second.load_state_dict(old)
    x = torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(second.conv2(x), forward(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", ["mask", "offset"])
def test_an_activation_that_depends_on_the_size(kind, strict):
    scale = torch.rand(1, 1, 6, 5)
    layer = packed(**{"mask_activation": torch.sigmoid, f"{kind}_activation": lambda t: t * scale})
    layer(torch.randn(2, 4, 6, 5))
    with pytest.raises(RuntimeError, match=rf"conv_offset.weight is of mmcv's layout.*{kind}s are"):
        layer.load_state_dict(mmcvs(4)[0], strict=strict)


def test_weights_of_generators_of_one_group():
    state, forward = mmcvs(4, groups=2)
    options = {"offset_groups": 2, "mask_groups": 2, "mask_activation": torch.sigmoid}
    with pytest.raises(RuntimeError, match="build the layer with generator_groups=1"):
        packed(**options).load_state_dict(state)
    layer, x = packed(generator_groups=1, **options), torch.randn(1, 4, 6, 6)
    layer.load_state_dict(state)
    torch.testing.assert_close(layer(x), forward(x))
