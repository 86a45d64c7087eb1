"""convert, deformify, parameter_groups, watch_offsets, and mmcv's names."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deformnd
from deformnd import PackRule, compat, convert, deformify
from deformnd.compat import mmcv

torch.manual_seed(0)


def of_package(module):
    """Make a stand-in recognisable as a layer of another package."""

    def decorate(kind):
        kind.__module__ = module
        return kind

    return decorate


def conv2d(layer, x, offset, mask=None, weight=None, bias=None):
    """The operator by a layer's attributes, as the stand-ins' packages call theirs."""
    weight = layer.weight if weight is None else weight
    options = (layer.stride, layer.padding, layer.dilation, getattr(layer, "groups", 1))
    bias = getattr(layer, "bias", None) if bias is None else bias
    return deformnd.deform_conv2d(x, weight, offset, mask, bias, *options)


# Stand-ins with the attributes and the forward that the packages document.


class Theirs(nn.Module):
    def __init__(self, groups=1, deform_groups=1, bias=True, stride=1, padding=1, dilation=1):
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = 4, 6, (3, 3)
        self.stride, self.padding, self.dilation = (stride,) * 2, (padding,) * 2, (dilation,) * 2
        self.groups, self.deform_groups = groups, deform_groups
        self.weight = nn.Parameter(torch.randn(6, 4 // groups, 3, 3))
        self.bias = nn.Parameter(torch.randn(6)) if bias else None

    def predictor(self, channels):
        return nn.Conv2d(4, channels, 3, self.stride, self.padding, self.dilation)


@of_package("torchvision.ops.deform_conv")
class DeformConv2d(Theirs):
    def forward(self, input, offset, mask=None):
        return conv2d(self, input, offset, mask)


@of_package("mmcv.ops.modulated_deform_conv")
class ModulatedDeformConv2d(Theirs):
    def forward(self, x, offset, mask):
        return conv2d(self, x, offset, mask)


@of_package("mmcv.ops.deform_conv")
class DeformConv2dPack(Theirs):
    def __init__(self, **options):
        super().__init__(**{**options, "bias": False})
        self.conv_offset = self.predictor(18 * self.deform_groups)

    def forward(self, x):
        return conv2d(self, x, self.conv_offset(x))


@of_package("mmcv.ops.modulated_deform_conv")
class ModulatedDeformConv2dPack(ModulatedDeformConv2d):
    def __init__(self, **options):
        super().__init__(**options)
        self.conv_offset = self.predictor(27 * self.deform_groups)

    def forward(self, x):
        first, second, mask = self.conv_offset(x).chunk(3, dim=1)
        return conv2d(self, x, torch.cat((first, second), 1), mask.sigmoid())


@of_package("basicsr.ops.dcn.deform_conv")
class ModulatedDeformConvPack(ModulatedDeformConv2dPack):
    def forward(self, x):
        return ModulatedDeformConv2dPack.forward(self, x)


PLAIN = [DeformConv2d, ModulatedDeformConv2d]
PACKS = [DeformConv2dPack, ModulatedDeformConv2dPack, ModulatedDeformConvPack]


def inputs(model, groups):
    x = torch.randn(2, 4, 7, 8)
    if type(model) in PACKS:
        return (x,)
    y = F.conv2d(x, model.weight[:, :1].repeat(1, 4, 1, 1), None, model.stride, model.padding)
    size = y.shape[2:]
    return x, torch.randn(2, 18 * groups, *size), torch.rand(2, 9 * groups, *size)


def gradients(model, args):
    """The output, and the gradients of input and of all parameters by their sum of squares."""
    x, *rest = args
    x = x.detach().requires_grad_()
    y = model(x, *rest)
    model.zero_grad()
    y.square().sum().backward()
    return y.detach(), x.grad, model.weight.grad


@pytest.mark.parametrize("kind", PLAIN + PACKS)
@pytest.mark.parametrize("options", [{}, {"groups": 2, "deform_groups": 2, "stride": 2}])
def test_convert(kind, options):
    theirs = kind(**options)
    args = inputs(theirs, options.get("deform_groups", 1))
    ours = convert(theirs, inplace=False, verbose=False)
    expected = getattr(deformnd, "Packed" * (kind in PACKS) + "DeformConv2d")
    assert type(ours) is (mmcv.ModulatedDeformConv2d if kind is ModulatedDeformConv2d else expected)
    for a, b in zip(gradients(ours, args), gradients(theirs, args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    exported = torch.export.export(ours.eval(), args).module()
    torch.testing.assert_close(exported(*args), theirs(*args), rtol=1e-5, atol=1e-5)


TVDCN = [
    "Packed" * packed + "DeformConv" + "Transpose" * transposed + f"{n}d"
    for packed in (0, 1)
    for transposed in (0, 1)
    for n in (1, 2, 3)
]


@pytest.mark.parametrize("name", TVDCN)
def test_convert_tvdcn(name):
    """tvdcn's layers have our attributes and state_dict; what differs is where they come from."""

    def theirs(kind, module="tvdcn.ops.deform_conv"):
        names = {"__module__": module, "forward": kind.forward, "__init__": kind.__init__}
        return type(kind.__name__, (kind,), names)

    n = int(name[-2])
    options = {"padding": 1, "stride": 2, "groups": 2}
    if name.startswith("Packed"):
        sigmoid = theirs(deformnd.MaskSigmoid, "tvdcn.ops.activations.mask_sigmoid")(scale=1.5)
        options |= {"offset_groups": 2, "modulated": True, "mask_activation": sigmoid}
    old = theirs(getattr(deformnd, name))(4, 6, 3, **options)
    x = torch.randn(2, 4, *(5,) * n)
    size = (getattr(old, "_output_padding", None) and (5,) * n) or (3,) * n
    args = (x,)
    if name.startswith("Packed"):
        for generator in (old.offset_generator, old.mask_generator):
            nn.init.normal_(generator.weight)
    else:
        args = (x, torch.randn(2, n * 3**n, *size), torch.rand(2, 3**n, *size))
    model = nn.Sequential()
    model.add_module("a", old)
    expected = old(*args)
    convert(model, verbose=False)
    assert type(model.a) is getattr(deformnd, name)
    assert model.a.weight is old.weight
    torch.testing.assert_close(model.a(*args), expected)
    if name.startswith("Packed"):
        assert type(model.a.mask_activation) is deformnd.MaskSigmoid
        assert model.a.mask_activation.scale == 1.5
    getattr(deformnd, name)(4, 6, 3, **options).load_state_dict(old.state_dict())


class HandWritten(nn.Module):
    """Two predictors, the weight in a convolution, all dx before all dy, a stride."""

    def __init__(self):
        super().__init__()
        self.p_conv = nn.Conv2d(4, 18, 3, 2, 1)
        self.m_conv = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 9, 1))
        self.conv = nn.Conv2d(4, 6, 3, 2, 1, bias=False)

    def forward(self, x):
        dx, dy = self.p_conv(x).clamp(-1, 1).chunk(2, 1)
        offset = torch.stack((dy, dx), 2).flatten(1, 2)
        mask = 2 * self.m_conv(x).sigmoid()
        return deformnd.deform_conv2d(x, self.conv.weight, offset, mask, stride=2, padding=1)


RULE = PackRule(
    offset="p_conv",
    mask="m_conv",
    weight="conv",
    interleaved=False,
    x_first=True,
    offset_activation=lambda offset: offset.clamp(-1, 1),
    mask_activation=deformnd.mask_sigmoid,
)


@pytest.mark.parametrize("key", ["HandWritten", HandWritten])
@pytest.mark.parametrize("function", [False, True])
def test_convert_by_a_rule(key, function, capsys):
    model = nn.ModuleDict({"a": HandWritten(), "b": nn.Sequential(HandWritten())})
    model["again"] = model["a"]
    x = torch.randn(2, 4, 9, 8)
    expected = [model[k](x) for k in ("a", "b", "again")]
    trunk, weight = model["a"].m_conv, model["a"].conv.weight
    assert convert(model, {key: (lambda layer: RULE) if function else RULE}) is model
    for k, y in zip(("a", "b", "again"), expected, strict=True):
        torch.testing.assert_close(model[k](x), y)
    assert model["a"] is model["again"]
    assert model["a"].mask_generator is trunk and model["a"].weight is weight
    assert capsys.readouterr().out == (
        "deformnd.convert: 3 layers replaced\n  HandWritten -> PackedDeformConv2d: a, b.0, again\n"
    )


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("x_first", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_orders_of_channels(n, interleaved, x_first, groups):
    class Pack(nn.Module):
        def __init__(self):
            super().__init__()
            conv = getattr(nn, f"Conv{n}d")
            self.both = conv(4, groups * (n + 1) * 3**n, 3, padding=1)
            self.weight = nn.Parameter(torch.randn(6, 4, *(3,) * n))
            self.padding = 1

        def forward(self, x):
            offset, mask = self.both(x).split([groups * n * 3**n, groups * 3**n], 1)
            offset = offset.unflatten(1, (groups, 3**n, n) if interleaved else (groups, n, 3**n))
            offset = offset if interleaved else offset.transpose(2, 3)
            offset = (offset.flip(3) if x_first else offset).flatten(1, 3)
            function = getattr(deformnd, f"deform_conv{n}d")
            return function(x, self.weight, offset, mask.sigmoid(), padding=1)

    theirs, x = Pack(), torch.randn(2, 4, *(5,) * n)
    rule = PackRule("both", "both", interleaved=interleaved, x_first=x_first)
    ours = convert(theirs, {Pack: rule}, inplace=False, verbose=False)
    torch.testing.assert_close(ours(x), theirs(x))


def test_convert_keeps_what_belongs_to_the_layer():
    model = nn.Sequential(DeformConv2d()).eval().requires_grad_(False).double()
    old, seen = model[0], []
    handle = old.register_forward_hook(lambda *args: seen.append(args))
    state = torch.random.get_rng_state()
    copied = convert(model, inplace=False, verbose=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model[0] is old and copied[0].weight is not old.weight
    convert(model, verbose=False)
    new = model[0]
    assert new.weight is old.weight and new.bias is old.bias and not new.training
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    args = [a.double() for a in inputs(DeformConv2d(), 1)]
    new(*args)
    assert len(seen) == 1
    handle.remove()
    new(*args)
    assert len(seen) == 1
    split = ModulatedDeformConv2dPack().requires_grad_(False)
    assert not any(p.requires_grad for p in convert(split, verbose=False).parameters())


class Aligner(ModulatedDeformConv2dPack):
    """Predicts from another input, as BasicSR's and mmagic's alignment, so it is not replaced."""

    def forward(self, x, other):
        return x + other


class Renamed(ModulatedDeformConv2dPack):
    """A subclass with the same forward, which is replaced as its base class."""


def test_subclasses(capsys):
    model = nn.Sequential(Renamed(), Aligner())
    convert(model)
    assert type(model[0]) is deformnd.PackedDeformConv2d and type(model[1]) is Aligner
    out = capsys.readouterr().out
    assert out.startswith("deformnd.convert: 1 layer replaced\n  Renamed ->")
    assert out.endswith("  left: without a rule: test_adopt.Aligner (1)\n")


def test_convert_refuses():
    @of_package("mine")
    class MyDCN(Theirs):
        pass

    model = nn.Sequential(nn.Linear(2, 2), MyDCN(), MyDCN())
    with pytest.raises(ValueError, match=r"nothing to replace; without a rule: mine.MyDCN \(2\)"):
        convert(model)
    with pytest.raises(ValueError, match="nothing to replace; no other layer of it looks"):
        convert(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="nothing to replace"):
        convert(deformnd.PackedDeformConv2d(4, 6, 3))
    with pytest.raises(ValueError, match="no layer of the model is a Nothing"):
        convert(nn.Sequential(DeformConv2d()), {"Nothing": RULE})
    with pytest.raises(TypeError, match="model is a dict"):
        convert({})

    pack, x = HandWritten(), torch.randn(1, 4, 8, 8)
    for changes, message in (
        ({"offset": "conv_offset"}, "has no submodule 'conv_offset', PackRule.offset"),
        ({"mask": "mask"}, "has no submodule 'mask', PackRule.mask"),
        ({"weight": ""}, "has no weight"),
        ({"offset": "m_conv"}, "m_conv predicts 9 channels, expected a multiple of 27"),
        (
            {"mask": "p_conv"},
            r"a multiple of 27 \(2-D, 9 kernel points, offset and mask\)",
        ),
    ):
        rule = PackRule(**{**RULE.__dict__, **changes})
        model = nn.Sequential(DeformConv2d(), pack)
        with pytest.raises(ValueError, match=message):
            convert(model, {"HandWritten": rule})
        assert type(model[0]) is DeformConv2d  # nothing was replaced
    trunk = HandWritten()
    trunk.p_conv = nn.Sequential(trunk.p_conv)
    with pytest.raises(ValueError, match="expected one convolution of groups 1"):
        convert(trunk, {"HandWritten": RULE})
    parametrized = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3, 2, 1, bias=False))
    pack.conv = parametrized
    assert pack(x).shape == (1, 6, 4, 4)
    with pytest.raises(ValueError, match="weight is computed"):
        convert(pack, {"HandWritten": RULE})


# Layouts of public models, in small.


class Yolos(nn.Module):
    """As YOLO forks have it: normalisation and activation inside, attributes set from outside."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, 3, 3))
        self.bias = nn.Parameter(torch.randn(6))
        self.stride, self.padding, self.dilation = (1, 1), (1, 1), (1, 1)
        self.conv_offset_mask = nn.Conv2d(4, 27, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.act = nn.SiLU()

    def forward(self, x):
        first, second, mask = self.conv_offset_mask(x).chunk(3, 1)
        y = conv2d(self, x, torch.cat((first, second), 1), mask.sigmoid())
        return self.act(self.bn(y))


YOLO_RULE = PackRule("conv_offset_mask", "conv_offset_mask", then=("bn", "act"))


def yolos():
    layer = Yolos().eval()
    nn.init.uniform_(layer.bn.running_mean)
    nn.init.uniform_(layer.bn.running_var, 0.5, 2)
    nn.init.normal_(layer.bn.weight)
    layer.f, layer.i = -1, 7  # A YOLO's forward reads here which inputs a layer gets.
    return layer


def test_nothing_of_a_layer_is_dropped(capsys):
    x = torch.randn(2, 4, 6, 7)
    model = nn.Sequential(yolos())
    rule = PackRule("conv_offset_mask", "conv_offset_mask")
    with pytest.raises(
        ValueError, match=r"Yolos '0': nothing is said of bn \(BatchNorm2d\), act \("
    ):
        convert(model, {Yolos: rule})
    assert type(model[0]) is Yolos
    expected, seen = model(x), []
    before = {k: v.clone() for k, v in model.state_dict().items()}
    handle = model[0].register_forward_hook(lambda *args: seen.append(args))
    parameters = set(model.parameters())
    convert(model, {Yolos: YOLO_RULE}, check=x)
    assert len(seen) == 1  # The hook ran once, for `check`.
    assert capsys.readouterr().out == (
        "deformnd.convert: 1 layer replaced\n"
        "  Yolos -> PackedDeformConv2d + BatchNorm2d + SiLU: 0\n"
    )
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert len(seen) == 2 and (model[0].f, model[0].i) == (-1, 7)
    handle.remove()
    # Only the predictor's weight and bias are other Parameters, since it was split.
    assert len(parameters - set(model.parameters())) == 2
    torch.testing.assert_close(torch.jit.script(model)(x), expected, rtol=1e-5, atol=1e-5)
    back = deformnd.original_state_dict(model)
    assert back.keys() == before.keys()
    assert all(torch.equal(back[k], before[k]) for k in before)

    other, state = nn.Sequential(yolos()), copy.deepcopy(model.state_dict())
    convert(other, {Yolos: YOLO_RULE}, verbose=False)
    assert not torch.equal(other(x), model(x))
    for given in (before, state):
        nn.init.zeros_(other[0].deform.weight)
        other.load_state_dict(given)
        assert torch.equal(other(x), model(x))


def test_leftovers_of_every_kind():
    layer = yolos()
    layer.extra = nn.Parameter(torch.zeros(3))
    layer.register_buffer("count", torch.zeros(2), persistent=False)
    layer.rest = nn.Sequential(nn.Linear(2, 2), nn.Identity())
    layer.same = nn.Identity()
    with pytest.raises(ValueError, match=r"of extra \[3\], count \[2\], rest \(Sequential\); name"):
        convert(layer, {Yolos: YOLO_RULE})
    for drop in (("extra", "count", "rest"), ("extra", "count", "rest.0", "rest")):
        rule = PackRule(**{**YOLO_RULE.__dict__, "drop": drop})
        assert convert(layer, {Yolos: rule}, verbose=False, inplace=False).i == 7
    with pytest.raises(ValueError, match=r"buffer 'none', PackRule.drop"):
        convert(layer, {Yolos: PackRule(**{**YOLO_RULE.__dict__, "drop": "none"})})
    inner = ModulatedDeformConv2dPack()
    inner.gamma = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"ModulatedDeformConv2dPack '': .* of gamma \[1\]"):
        convert(inner)
    inner = DeformConv2d()
    inner.norm = nn.BatchNorm2d(6)
    with pytest.raises(ValueError, match="DeformConv2d '' has what would be lost: norm"):
        convert(inner)


class Tall(nn.Module):
    """Samples laid out three by three for each position, and convolved with stride 3."""

    def __init__(self, stride=1):
        super().__init__()
        self.stride = stride
        self.zero_padding = nn.ZeroPad2d(1)
        self.conv = nn.Conv2d(4, 6, 3, stride=3, bias=False)
        self.p_conv = nn.Conv2d(4, 18, 3, stride, 1)
        self.m_conv = nn.Conv2d(4, 9, 3, stride, 1)

    def forward(self, x):
        offset, mask = self.p_conv(x), self.m_conv(x).sigmoid()
        x = self.zero_padding(x)
        h, w = offset.shape[2:]
        rows = self.stride * torch.arange(h).view(h, 1).float()
        columns = self.stride * torch.arange(w).float()
        samples = []
        for k in range(9):
            y = rows + k // 3 + offset[:, k]
            z = columns + k % 3 + offset[:, 9 + k]
            size = x.new_tensor([x.shape[3] - 1, x.shape[2] - 1])
            grid = 2 * torch.stack((z, y), -1) / size - 1
            sample = F.grid_sample(x, grid, align_corners=True) * mask[:, k : k + 1]
            samples.append(sample)
        tall = torch.stack(samples, -1).unflatten(-1, (3, 3))  # [B, C, h, w, 3, 3]
        return self.conv(tall.permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3))


@pytest.mark.parametrize("stride", [1, 2])
def test_geometry_of_the_rule(stride):
    model, x = nn.Sequential(Tall(stride)), torch.randn(2, 4, 7, 8)
    options = {"offset": "p_conv", "mask": "m_conv", "weight": "conv", "interleaved": False}
    options["drop"] = ("zero_padding",)
    with pytest.raises(ValueError, match=r"p_conv has stride .*convolution stride \(3, 3\)"):
        convert(model, {Tall: PackRule(**options)})
    rule = PackRule(**options, stride=stride, padding=1)
    ours = convert(model, {Tall: rule}, inplace=False, verbose=False, check=x)
    torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"PackRule.stride, padding and dilation"):
        convert(model, {Tall: PackRule(**options, stride=stride, padding=2)})
    with pytest.raises(ValueError, match=r"PackRule.stride, padding and dilation"):
        convert(model, {Tall: PackRule(**options, stride=stride, padding=1, dilation=2)})


class PartialAxes(nn.Module):
    """As in D3Dnet: an offset for some axes only, zero for the others."""

    def __init__(self, axes, groups, interleaved, joint):
        super().__init__()
        self.axes, self.blocks, self.interleaved, self.joint = axes, groups, interleaved, joint
        self.padding = 1
        self.weight = nn.Parameter(torch.randn(6, 4, 3, 3, 3))
        rows = groups * 27 * (len(axes) + joint)
        self.conv_offset = nn.Conv3d(4, rows, 3, padding=1)

    def forward(self, x):
        some = self.conv_offset(x)
        mask = some[:, self.blocks * 27 * len(self.axes) :].sigmoid() if self.joint else None
        offset = x.new_zeros(len(x), self.blocks, 27, 3, *x.shape[2:])
        for g in range(self.blocks):
            for k in range(27):
                for i, axis in enumerate(self.axes):
                    m = len(self.axes)
                    channel = (g * 27 + k) * m + i if self.interleaved else (g * m + i) * 27 + k
                    offset[:, g, k, axis] = some[:, channel].tanh()
        return deformnd.deform_conv3d(x, self.weight, offset.flatten(1, 3), mask, padding=1)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("axes, groups", [((1, 2), 1), ((0,), 2), ((2, 1), 2), ((2, 0, 1), 1)])
@pytest.mark.parametrize("joint", [True, False])
def test_partial_axes(axes, groups, interleaved, joint):
    layer, x = PartialAxes(axes, groups, interleaved, joint), torch.randn(2, 4, 4, 5, 6)
    mask, options = "conv_offset" if joint else None, {"offset_activation": torch.tanh}
    options |= {"interleaved": interleaved, "axes": axes}
    rule = PackRule("conv_offset", mask, **options)
    reverse = PackRule("conv_offset", mask, **{**options, "axes": axes[::-1], "x_first": True})
    for r in (rule, reverse):
        ours = convert(layer, {PartialAxes: r}, inplace=False, verbose=False, check=x)
        torch.testing.assert_close(ours(x), layer(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.jit.script(ours)(x), layer(x), rtol=1e-5, atol=1e-5)
        for key, value in deformnd.original_state_dict(ours).items():
            assert torch.equal(value, layer.state_dict()[key])
        assert torch.equal(copy.deepcopy(ours)(x), ours(x))
        ours.load_state_dict(layer.state_dict())
    for wrong in ((), (1, 1), (3,), (0, 1, 2, 0)):
        with pytest.raises(ValueError, match=r"PackRule.axes is .* expected different ones of"):
            convert(layer, {PartialAxes: PackRule("conv_offset", axes=wrong)})


class TwoInputs(ModulatedDeformConv2dPack):
    """Predicts from other features, as the alignment of video models does."""

    def forward(self, x, feat):
        return ModulatedDeformConv2dPack.forward(self, x) + self.conv_offset(feat).mean()


def test_a_layer_of_two_inputs_is_refused():
    rule = PackRule("conv_offset", "conv_offset")
    with pytest.raises(ValueError, match=r"takes 2 inputs, x, feat, expected one.*accelerate\(\)"):
        convert(TwoInputs(), {TwoInputs: rule})
    with pytest.raises(ValueError, match=r"without a rule: test_adopt.TwoInputs \(1\)"):
        convert(TwoInputs())
    exchanged = yolos()
    exchanged.forward = lambda x: x
    with pytest.raises(ValueError, match="its forward was replaced"):
        convert(exchanged, {Yolos: YOLO_RULE})
    exchanged = ModulatedDeformConv2dPack()
    exchanged.forward = lambda x: x
    with pytest.raises(ValueError, match="nothing to replace"):
        convert(exchanged)


def test_check_finds_a_wrong_rule():
    model, x = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(yolos())), torch.randn(1, 4, 6, 6)
    model.train()
    state = copy.deepcopy(model.state_dict())
    for changes in ({"x_first": True}, {"mask_activation": deformnd.mask_sigmoid}):
        wrong = PackRule(**{**YOLO_RULE.__dict__, **changes})
        with pytest.raises(ValueError, match=r"Yolos '1.0': .* off by .* of the original's norm"):
            convert(model, {Yolos: wrong}, check=x)
        with pytest.raises(ValueError, match="off by"):
            convert(model, {Yolos: wrong}, check={"input": x})
    with pytest.raises(ValueError, match="the replacement fails: "):
        convert(model, {Yolos: lambda layer: nn.Linear(3, 3)}, check=(x,))
    with pytest.raises(ValueError, match=r"\[1, 6, 6, 6\], the replacement \[1, 5, 6, 6\]"):
        convert(model, {Yolos: lambda layer: nn.Conv2d(4, 5, 1)}, check=(x,))
    unused = nn.ModuleDict({"a": yolos()})
    unused.forward = lambda x: x
    with pytest.raises(ValueError, match="check did not reach a"):
        convert(unused, {Yolos: YOLO_RULE}, check=x)
    assert all(m.training for m in model.modules())
    assert all(not m._forward_hooks for m in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    convert(model, {Yolos: YOLO_RULE}, check=x, verbose=False)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in deformnd.original_state_dict(model).items())


def test_check_says_that_zero_predictors_hide_the_order():
    model = nn.Sequential(yolos())
    nn.init.zeros_(model[0].conv_offset_mask.weight)
    nn.init.zeros_(model[0].conv_offset_mask.bias)
    with pytest.warns(UserWarning, match="predictors of 0 are zero"):
        convert(model, {Yolos: YOLO_RULE}, check=torch.randn(1, 4, 5, 5), verbose=False)


def test_a_rule_may_give_the_module_itself():
    model, x = nn.Sequential(yolos()), torch.randn(1, 4, 5, 5)
    convert(model, {Yolos: lambda layer: nn.Conv2d(4, 6, 1)}, verbose=False)
    assert type(model[0]) is nn.Conv2d and not model[0].training
    assert model(x).shape == (1, 6, 5, 5)
    around = {Yolos: lambda layer: nn.Sequential(layer, nn.Identity())}
    assert len(convert(nn.Sequential(yolos()), around, check=x, verbose=False)[0]) == 2
    around = {Yolos: lambda layer: nn.Sequential(layer, nn.Tanh())}
    with pytest.raises(ValueError, match="the replacement's output is another"):
        convert(nn.Sequential(yolos()), around, check=x)
    for rules, message in (
        ({Yolos: lambda layer: {}}, "its rule returned a dict, expected a PackRule or a Module"),
        ({Yolos: 3}, "the rule of Yolos is a int"),
        ({Yolos: nn.Conv2d(4, 6, 1)}, "the rule of Yolos is a Conv2d"),
        ({3: YOLO_RULE}, "rules has the key 3"),
        ([YOLO_RULE], "rules is a list"),
    ):
        with pytest.raises(TypeError, match=message):
            convert(yolos(), rules)
    for options, message in (
        ({"offset": 3}, "PackRule: offset is 3"),
        ({"offset": "a", "then": (3,)}, r"PackRule: then is \(3,\)"),
        ({"offset": "a", "then": 3}, "PackRule: then is 3"),
        ({"offset": "a", "drop": (None,)}, r"PackRule: drop is \(None,\)"),
        ({"offset": "a", "axes": 1}, "PackRule: axes is 1"),
        ({"offset": "a", "axes": ("H",)}, r"PackRule: axes is \('H',\)"),
    ):
        with pytest.raises(TypeError, match=message):
            PackRule(**options)
    assert PackRule("a", then="bn").then == ("bn",)


def test_attributes_of_parameters_are_kept():
    layer = yolos()
    layer.weight.lr_mult, layer.conv_offset_mask.weight.lr_mult = 2.0, 0.1
    layer.conv_offset_mask.bias.requires_grad_(False)
    new = convert(layer, {Yolos: YOLO_RULE}, verbose=False).deform
    assert new.weight.lr_mult == 2.0
    for generator in (new.offset_generator, new.mask_generator):
        assert generator.weight.lr_mult == 0.1 and generator.weight.requires_grad
        assert not generator.bias.requires_grad


def test_a_predictor_that_does_not_fit():
    layer = HandWritten()
    layer.m_conv = nn.Conv2d(4, 10, 3, 2, 1)
    with pytest.raises(ValueError, match="m_conv predicts 10 channels, expected a multiple of 9"):
        convert(layer, {"HandWritten": RULE})
    layer = HandWritten()
    nn.utils.parametrizations.weight_norm(layer.p_conv)
    with pytest.raises(ValueError, match="with a weight that is not computed"):
        convert(layer, {"HandWritten": RULE})


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_model_with_a_scripted_part():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)))
    pack = ModulatedDeformConv2dPack()
    model, x = nn.Sequential(scripted, pack, deformnd.DeformConv2d(4, 6, 3)), torch.rand(1, 4, 5, 5)
    expected = model[:2](x)
    convert(model, verbose=False)
    assert model[0] is scripted and type(model[1]) is deformnd.PackedDeformConv2d
    torch.testing.assert_close(model[:2](x), expected)
    with pytest.raises(ValueError, match=r"without a rule: a scripted DeformConv2d \(1\)"):
        convert(torch.jit.script(deformnd.DeformConv2d(4, 6, 3)))
    with pytest.raises(ValueError, match="nothing to replace; no other layer"):
        convert(scripted)


@pytest.mark.parametrize("how", ["module", "function", "convert"])
def test_an_offset_larger_than_the_output(how):
    """As in DyHead. mmcv reads the memory of each image's offset from its beginning."""
    theirs = ModulatedDeformConv2d(groups=2, deform_groups=2)
    x = torch.randn(2, 4, 8, 8)
    both = torch.randn(2, 54, 16, 17, requires_grad=True)
    offset, mask = both[:, :36], both[:, 36:].sigmoid()
    first = [t.reshape(2, -1)[:, : t.shape[1] * 64].view(2, -1, 8, 8) for t in (offset, mask)]
    expected = conv2d(theirs, x, *first)
    (wanted,) = torch.autograd.grad(expected.square().sum(), both)
    if how == "module":
        layer = mmcv.ModulatedDeformConv2d(4, 6, 3, 1, 1, 1, 2, 2)
        layer.load_state_dict(theirs.state_dict())
    elif how == "convert":
        layer = convert(theirs, verbose=False)
    else:

        def layer(x, offset, mask):
            sizes = (theirs.bias, 1, 1, 1, 2, 2)
            return mmcv.modulated_deform_conv2d(x, offset, mask, theirs.weight, *sizes)

    compat._warned = False
    with pytest.warns(UserWarning, match=r"of \(16, 17\) for an output of \(8, 8\)") as said:
        y = layer(x, both[:, :36], both[:, 36:].sigmoid())
        layer(x, both[:, :36], both[:, 36:].sigmoid())
    assert len(said) == 1
    assert torch.equal(y, expected)
    (got,) = torch.autograd.grad(y.square().sum(), both)
    torch.testing.assert_close(got, wanted)
    if how != "function":
        torch.testing.assert_close(torch.jit.script(layer)(x, offset, mask), expected)
    with pytest.raises(ValueError, match="offset"):  # A smaller offset cannot be read so.
        layer(x, offset[..., :3], mask[..., :3])
    with pytest.raises(ValueError, match="offset"):
        deformnd.deform_conv2d(x, theirs.weight, offset, mask, padding=1, groups=2)
    same = mmcv.ModulatedDeformConv2d(4, 6, 3, padding="same")
    assert torch.jit.script(same)(x, first[0][:, :18], first[1][:, :9]).shape == (2, 6, 8, 8)
    assert same(x, first[0][:, :18], first[1][:, :9]).shape == (2, 6, 8, 8)
    with pytest.raises(ValueError, match="offset"):  # mmcv's first version checks this, too.
        mmcv.deform_conv2d(x, offset, theirs.weight, 1, 1, 1, 2, 2)


# mmcv


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [*PLAIN, DeformConv2dPack, ModulatedDeformConv2dPack])
def test_checkpoints_of_mmcv(kind, groups):
    theirs = kind(groups=groups, deform_groups=groups, bias=kind is not DeformConv2dPack)
    name = "ModulatedDeformConv2d" if kind is DeformConv2d else kind.__name__
    ours = getattr(mmcv, name)(4, 6, 3, 1, 1, 1, groups, groups)
    state = theirs.state_dict()
    ours.load_state_dict(state)
    assert list(theirs.state_dict()) == list(state)
    args = inputs(theirs, groups)
    torch.testing.assert_close(ours(*args), theirs(*args))
    torch.testing.assert_close(torch.jit.script(ours)(*args), theirs(*args))
    model = nn.Sequential(nn.Identity(), copy.deepcopy(ours))
    model.load_state_dict({f"1.{k}": v for k, v in state.items()})


def test_checkpoints_that_do_not_fit():
    state = ModulatedDeformConv2dPack().state_dict()
    plain = deformnd.PackedDeformConv2d(4, 6, 3, generator_bias=True)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"conv_offset.weight"'):
        plain.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"conv_offset.weight"'):
        mmcv.ModulatedDeformConv2dPack(4, 6, 3, deform_groups=2).load_state_dict(state)
    with pytest.raises(ValueError, match="bias is True, expected False"):
        mmcv.DeformConv2d(4, 6, 3, bias=True)


def test_functions_of_mmcv():
    x, offset, mask = torch.randn(1, 4, 8, 8), torch.randn(1, 36, 8, 8), torch.rand(1, 18, 8, 8)
    weight, bias = torch.randn(6, 2, 3, 3), torch.randn(6)
    y = mmcv.deform_conv2d(x, offset, weight, 1, 1, 1, 2, 2)
    assert torch.equal(y, deformnd.deform_conv2d(x, weight, offset, padding=1, groups=2))
    y = mmcv.modulated_deform_conv2d(x, offset, mask, weight, bias, 1, 1, 1, 2, 2)
    expected = deformnd.deform_conv2d(x, weight, offset, mask, bias, padding=1, groups=2)
    assert torch.equal(y, expected)


def test_generator_groups():
    layer = deformnd.PackedDeformConv2d(4, 6, 3, offset_groups=2, generator_groups=1)
    assert layer.offset_generator.weight.shape == (36, 4, 3, 3)
    with pytest.raises(ValueError, match=r"generator_groups is 3, .* in_channels 4 and of the 36"):
        deformnd.PackedDeformConv2d(4, 6, 3, offset_groups=2, generator_groups=3)


def test_checkpoints_of_before_the_conversion():
    """Under the names that mmdet's first version had for the predictor, too."""
    theirs = nn.ModuleDict({"conv2": ModulatedDeformConv2dPack(deform_groups=2)})
    state, x = theirs.state_dict(), torch.randn(1, 4, 6, 6)
    ours = convert(copy.deepcopy(theirs), verbose=False)
    old = {k.replace("conv2.conv_offset", "conv2_offset"): v for k, v in state.items()}
    own = copy.deepcopy(ours.state_dict())
    assert old.keys() != state.keys() != own.keys()
    for given in (state, old, own):
        for p in ours.parameters():
            nn.init.zeros_(p)
        ours.load_state_dict(given)
        torch.testing.assert_close(ours["conv2"](x), theirs["conv2"](x))
    back = deformnd.original_state_dict(ours)
    assert all(torch.equal(back[k], v) for k, v in state.items()) and len(back) == len(state)

    layer = HandWritten()
    ours = convert(copy.deepcopy(layer), {"HandWritten": RULE}, verbose=False)
    x = torch.randn(1, 4, 6, 6)
    for p in ours.parameters():
        nn.init.zeros_(p)
    ours.load_state_dict(layer.state_dict())
    torch.testing.assert_close(ours(x), layer(x))
    back = deformnd.original_state_dict(ours)
    assert back.keys() == layer.state_dict().keys()
    assert all(torch.equal(back[k], v) for k, v in layer.state_dict().items())
    with pytest.warns(UserWarning, match=r"p_conv.bias \[3\] .* not loaded: expected 18 rows"):
        ours.load_state_dict({"p_conv.bias": torch.ones(3)}, strict=False)


class Ordered(nn.Module):
    """Its predictor has a name of deformnd's, and another order of channels."""

    def __init__(self, own_weight=False, swapped=False):
        super().__init__()
        if own_weight:
            self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))
        else:
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.padding = 1
        self.names = ["offset_generator", "mask_generator"][:: -1 if swapped else 1]
        for name, channels in zip(self.names, (18, 9), strict=True):
            setattr(self, name, nn.Conv2d(4, channels, 3, padding=1))
        self.rule = PackRule(
            *self.names, weight="" if own_weight else "conv", interleaved=swapped and own_weight
        )

    def forward(self, x):
        offset, mask = (getattr(self, name)(x) for name in self.names)
        if not self.rule.interleaved:
            offset = offset.unflatten(1, (2, 9)).transpose(1, 2).flatten(1, 2)
        source = self if hasattr(self, "weight") else self.conv
        return deformnd.deform_conv2d(
            x, source.weight, offset, mask.sigmoid(), getattr(source, "bias", None), padding=1
        )


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("swapped", [True, False])
@pytest.mark.parametrize("own_weight", [True, False])
def test_names_that_both_have(own_weight, swapped, strict):
    theirs, x = nn.Sequential(Ordered(own_weight, swapped)), torch.randn(1, 4, 6, 6)
    old, expected = copy.deepcopy(theirs.state_dict()), theirs(x)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ours = convert(theirs, {Ordered: lambda layer: layer.rule}, check=x, verbose=False)
    ambiguous = ["convert: Ordered '0': the names" in str(w.message) for w in seen]
    assert ambiguous == [True] * own_weight
    own = copy.deepcopy(ours.state_dict())
    generators = {k: v for k, v in own.items() if "generator" in k}
    for given in [own, *[generators] * (not strict), *[old] * (not own_weight)]:
        ours.load_state_dict(given, strict=strict)
        torch.testing.assert_close(ours(x), expected)
    back = deformnd.original_state_dict(ours)
    assert back.keys() == old.keys() and all(torch.equal(back[k], old[k]) for k in old)
    if not own_weight:
        found = ours.load_state_dict({**own, "0.conv.weight": old["0.conv.weight"]}, strict=False)
        assert found.unexpected_keys == ["0.conv.weight"]
        torch.testing.assert_close(ours(x), expected)


class Joint(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.padding = 1
        self.offset_generator = nn.Conv2d(4, 27, 3, padding=1)

    def forward(self, x):
        offset, mask = self.offset_generator(x).split([18, 9], 1)
        return deformnd.deform_conv2d(x, self.weight, offset, mask.sigmoid(), padding=1)


@pytest.mark.filterwarnings("error")
def test_a_name_that_both_have_for_other_rows():
    theirs, x = Joint(), torch.randn(1, 4, 6, 6)
    rule = PackRule("offset_generator", "offset_generator")
    ours = convert(copy.deepcopy(theirs), {Joint: rule}, verbose=False)
    for given in (copy.deepcopy(ours.state_dict()), theirs.state_dict()):
        for p in ours.parameters():
            nn.init.zeros_(p)
        ours.load_state_dict(given)
        torch.testing.assert_close(ours(x), theirs(x))


class Named(nn.Module):
    """Applies one module twice, and has modules with names of deformnd's and of parameters."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.bias = nn.Parameter(torch.randn(4))
        self.padding = 1
        self.p = nn.Conv2d(4, 18, 3, padding=1)
        self.act = nn.PReLU()
        self.deform = nn.BatchNorm2d(4)
        self.bias_norm = nn.BatchNorm2d(4)
        self.last = nn.PReLU()
        self.bound = nn.PReLU()
        self.register_buffer("grid", torch.zeros(3))
        self.b = nn.Parameter(torch.zeros(1))
        self.unused = nn.Conv2d(1, 1, 1)

    def forward(self, x):
        y = deformnd.deform_conv2d(
            x, self.weight, self.bound(self.p(x)), None, self.bias, padding=1
        )
        return self.last(self.act(self.bias_norm(self.deform(self.act(y)))))


@pytest.mark.filterwarnings("error")
def test_names_of_then_and_drop():
    theirs, x = nn.Sequential(Named()).eval(), torch.randn(1, 4, 6, 6)
    for m in theirs.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight, m.bias, m.running_mean):
                nn.init.normal_(t)
    rules = {
        Named: lambda layer: PackRule(
            "p",
            then=("act", "deform", "bias_norm", "act", layer.last),
            drop=("grid", "b", "unused"),
            offset_activation=layer.bound,
        )
    }
    old, expected = copy.deepcopy(theirs.state_dict()), theirs(x)
    ours = convert(theirs, rules, check=x, verbose=False)
    assert len(ours[0]) == 6
    own = copy.deepcopy(ours.state_dict())
    for given in (own, old, copy.deepcopy(deformnd.original_state_dict(ours))):
        for p in ours.parameters():
            nn.init.zeros_(p)
        ours.load_state_dict(given)
        torch.testing.assert_close(ours(x), expected)
    back = deformnd.original_state_dict(ours)
    dropped = {"0.grid", "0.b", "0.unused.weight", "0.unused.bias"}
    assert back.keys() == old.keys() - dropped and all(torch.equal(back[k], old[k]) for k in back)
    found = ours.load_state_dict({**own, "0.grid": torch.zeros(3)}, strict=False)
    assert found.unexpected_keys == ["0.grid"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_comes_along(wrapped):
    """Hooks and attributes come along, even where a rule is a function that makes the module."""
    layer, seen, x = yolos(), [], torch.randn(1, 4, 5, 5, requires_grad=True)
    layer.type, layer.np = "models.Yolos", 123
    layer.to = layer.to  # This method must not come along: it would move the old layer.
    handle = layer.register_forward_hook(lambda *args: seen.append("forward"))
    layer.register_full_backward_hook(lambda m, given, out: seen.append(len(given)))
    if wrapped:
        rules = {Yolos: lambda layer: nn.Sequential(layer, nn.ReLU())}
    else:
        rules = {Yolos: lambda layer: nn.Conv2d(4, 6, 1)}
    for rule in (rules, {Yolos: YOLO_RULE}):
        seen.clear()
        new = convert(nn.Sequential(copy.copy(layer)), rule, verbose=False)[0]
        assert (new.f, new.i, new.type, new.np) == (-1, 7, "models.Yolos", 123)
        assert "to" not in vars(new) and not new.training
        new(x).sum().backward()
        assert seen == ["forward", 1]
    handle.remove()
    seen.clear()
    new(x)
    assert not seen
    hooked = nn.Conv2d(4, 6, 1)
    hooked.register_forward_hook(lambda *args: seen.append("new"))
    layer.register_forward_hook(lambda *args: seen.append("old"))
    convert(layer, {Yolos: lambda layer: hooked}, verbose=False)(x)
    assert sorted(seen) == ["new", "old"]


def test_check_names_the_model_itself():
    layer = yolos()
    for p in layer.conv_offset_mask.parameters():
        nn.init.zeros_(p)
    with pytest.warns(UserWarning, match="predictors of the model are zero"):
        convert(layer, {Yolos: YOLO_RULE}, check=torch.randn(1, 4, 5, 5), verbose=False)


# deformify


class Residual(nn.Module):
    """A ResNet in small, with torchvision's and timm's names."""

    def __init__(self):
        super().__init__()

        def block(c, stride):
            conv = nn.Conv2d(c, c, 3, stride, 1, groups=2, bias=False)
            return nn.Sequential(nn.Conv2d(c, c, 1), conv, nn.BatchNorm2d(c), nn.ReLU())

        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3)
        for i in (1, 2, 3, 4):
            setattr(self, f"layer{i}", block(8, 1 + i % 2))

    def forward(self, x):
        return self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))


def test_deformify_a_resnet(capsys):
    model = Residual().double().eval()
    x = torch.randn(1, 3, 32, 40, dtype=torch.float64)
    expected, parameters = model(x), set(model.parameters())
    changed = deformify(model, inplace=False, verbose=False)
    assert deformify(model) is model
    assert capsys.readouterr().out == (
        "deformnd.deformify: 2 layers replaced\n"
        "  Conv2d -> PackedDeformConv2d: layer3.1, layer4.1\n"
    )
    for m in (model, changed):
        assert type(m.layer4[1]) is deformnd.PackedDeformConv2d
        assert not m.layer4[1].training and not m.layer4[1].offset_generator.training
        torch.testing.assert_close(m(x), expected, rtol=1e-12, atol=1e-12)
    assert parameters < set(model.parameters())
    model.train()(x).sum().backward()
    assert model.layer4[1].offset_generator.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_deformify_every_convolution(n, transposed):
    kind = getattr(nn, f"Conv{'Transpose' * transposed}{n}d")
    options = [{}, {"stride": 2, "padding": 1, "groups": 2, "dilation": 2}, {"bias": False}]
    if transposed:
        options += [{"stride": 2, "output_padding": 1}]
    else:
        options += [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}]
    for option in options:
        plain = kind(4, 4, 3, dtype=torch.float64, **option)
        x = torch.randn(2, 4, *(6,) * n, dtype=torch.float64)
        state = torch.random.get_rng_state()
        ours = deformify(plain, "*", offset_groups=2, mask_groups=4, inplace=False, verbose=False)
        assert torch.equal(torch.random.get_rng_state(), state)
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-12, atol=1e-12)
        single = deformify(kind(4, 4, 3, **option), kind, verbose=False)
        assert single.offset_generator.bias is not None and single.mask_groups == 1


@pytest.mark.parametrize(
    "where, chosen",
    [
        ("layer1.*", {"layer1.0", "layer1.1"}),
        (["conv?", "*4.1"], {"conv1", "layer4.1"}),
        (nn.Conv2d, {"conv1", *(f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1))}),
        (lambda name, m: m.stride == (2, 2), {"conv1", "layer1.1", "layer3.1"}),
    ],
)
def test_where(where, chosen):
    model = deformify(Residual(), where, verbose=False)
    found = {k for k, m in model.named_modules() if isinstance(m, deformnd.PackedDeformConv2d)}
    assert found == chosen


def test_deformify_refuses():
    with pytest.raises(ValueError, match="no 3x3 convolution in layer3 or layer4"):
        deformify(nn.Sequential(nn.Conv2d(3, 3, 3)))
    with pytest.raises(ValueError, match=r"no ordinary convolution that fits where='layer9.\*'$"):
        deformify(Residual(), "layer9.*")
    with pytest.raises(ValueError, match=r"fits where='1'; there is 1 \(ReLU\)$"):
        deformify(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()), "1")
    with pytest.raises(ValueError, match=r"maps 0 to 0.5, expected 1, as 'sigmoid'"):
        deformify(Residual(), mask_activation=torch.sigmoid)
    with pytest.raises(ValueError, match=r"offset_activation is .* maps 0 to 1, expected 0"):
        deformify(Residual(), offset_activation=torch.exp)
    with pytest.raises(ValueError, match="offset_groups is 3, expected a divisor"):
        deformify(Residual(), offset_groups=3)
    for where in (3, [3]):
        with pytest.raises(TypeError, match="deformify: where"):
            deformify(Residual(), where)
    with pytest.raises(TypeError, match="model is a str"):
        deformify("resnet")
    model = Residual()
    model.conv1.scale = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"conv1 has what would be lost: scale \[2\]"):
        deformify(model, "conv1")
    model = Residual()
    model.conv1.forward = lambda x: x
    with pytest.raises(ValueError, match="conv1 has what would be lost: a forward of"):
        deformify(model, "conv1")
    model = Residual()
    model.conv1.f = -1
    assert deformify(model, "conv1", verbose=False).conv1.f == -1


def test_deformify_on_the_meta_device():
    with torch.device("meta"):
        model = deformify(Residual(), verbose=False)
    assert all(p.is_meta for p in model.parameters())


def test_real_resnets():
    """torchvision's and timm's, where installed."""
    models = {}
    try:
        import torchvision

        models["torchvision"] = torchvision.models.resnet18(num_classes=10)
    except (ImportError, RuntimeError):
        pass
    try:
        import timm

        models["timm"] = timm.create_model("resnet18", num_classes=10)
    except ImportError:
        pass
    if not models:
        pytest.skip("neither torchvision nor timm is installed")
    x = torch.randn(1, 3, 64, 64)
    for model in models.values():
        expected = model.eval()(x)
        deformify(model, verbose=False)
        assert sum(isinstance(m, deformnd.PackedDeformConv2d) for m in model.modules()) == 8
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


# Training


def test_parameter_groups():
    model = deformify(Residual(), verbose=False)
    model.conv1.requires_grad_(False)
    others, predictors = deformnd.parameter_groups(model, lr=0.2, factor=0.5)
    assert (others["lr"], predictors["lr"]) == (0.2, 0.1)
    assert len(predictors["params"]) == 2 * 4
    wanted = {p for p in model.parameters() if p.requires_grad}
    assert wanted == {*others["params"], *predictors["params"]}
    with pytest.raises(ValueError, match="no trainable parameter in offset_generator or mask_"):
        deformnd.parameter_groups(Residual(), lr=0.1)
    pack = nn.Sequential(ModulatedDeformConv2dPack())
    groups = deformnd.parameter_groups(pack, lr=0.1, names=("conv_offset",))
    assert groups[1]["params"] == list(pack[0].conv_offset.parameters())
    assert deformnd.parameter_groups(pack, lr=0.1, names="conv_offset") == groups
    tensor = torch.tensor(0.5)
    assert deformnd.parameter_groups(model, lr=tensor)[0]["lr"] is tensor
    for options, message in (
        ({"lr": -1.0}, "lr is -1.0, expected a number of at least 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": float("inf")}, "lr is inf"),
        ({"lr": 0.1, "factor": -0.1}, "factor is -0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            deformnd.parameter_groups(model, **options)
    for options, message in (
        ({"lr": "fast"}, "lr is 'fast', expected a number"),
        ({"lr": None}, "lr is None"),
        ({"lr": 0.1, "names": [3]}, "names is"),
        ({"lr": 0.1, "names": 3}, "names is 3"),
    ):
        with pytest.raises(TypeError, match=message):
            deformnd.parameter_groups(model, **options)
    with pytest.raises(TypeError, match="parameter_groups: model is a list"):
        deformnd.parameter_groups([model], lr=0.1)


@pytest.mark.parametrize("transposed", [False, True])
def test_reset_offsets_after_an_initialisation_of_all_convolutions(transposed):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    model = nn.Sequential(kind(4, 4, 3), nn.ReLU(), kind(4, 4, 3))
    deformify(model, "*", verbose=False)
    predictor = model[2].mask_generator
    model[2].mask_generator = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), predictor)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight)
            nn.init.constant_(m.bias, 3.0)
    plain = nn.Sequential(kind(4, 4, 3), nn.ReLU(), kind(4, 4, 3))
    for i in (0, 2):
        plain[i].weight, plain[i].bias = model[i].weight, model[i].bias
    x = torch.randn(1, 4, 9, 9)
    assert not torch.allclose(model(x), plain(x), atol=0.1)
    deformnd.reset_offsets(model)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    assert model[2].mask_generator[0].weight.any()
    with pytest.raises(ValueError, match="reset_offsets: the model has no packed layer"):
        deformnd.reset_offsets(plain)
    with pytest.raises(TypeError, match="reset_offsets: model is a str"):
        deformnd.reset_offsets("model")
    deformnd.reset_offsets(deformnd.LazyPackedDeformConv2d(4, 3))
    nn.utils.parametrizations.weight_norm(model[0].offset_generator)
    with pytest.raises(ValueError, match="the weight of offset_generator is computed"):
        deformnd.reset_offsets(model)


@pytest.mark.parametrize("behind", [nn.BatchNorm2d, lambda c: nn.GroupNorm(3, c), nn.Identity])
def test_reset_offsets_of_predictors_with_something_behind(behind):
    packed = deformnd.PackedDeformConv2d(4, 4, 3, padding=1, modulated=True)
    after = (behind(9), nn.InstanceNorm2d(9), nn.ReLU())
    packed.mask_generator = nn.Sequential(packed.mask_generator, *after)
    x = torch.randn(2, 4, 6, 6)
    for t in packed.state_dict().values():
        if t.is_floating_point():
            nn.init.uniform_(t)
    for mode in (True, False):
        packed.train(mode)
        deformnd.reset_offsets(packed)
        assert not packed.mask_generator(x).any() and not packed.offset_generator(x).any()


def test_nothing_is_half_reset():
    def packed():
        layer = deformnd.PackedDeformConv2d(4, 4, 3, modulated=True, generator_bias=True)
        for p in layer.parameters():
            nn.init.normal_(p)
        return layer

    model = nn.Sequential(packed(), packed())
    generator = model[1].mask_generator
    computed = copy.deepcopy(generator)
    nn.utils.parametrizations.weight_norm(computed)
    for wrong, message in (
        (nn.Sequential(generator, nn.BatchNorm2d(9, affine=False)), "BatchNorm2d with statistics"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), computed), "the weight of mask_generator is computed"),
        (nn.Identity(), "mask_generator is a Identity without a convolution"),
    ):
        model[1].mask_generator = wrong
        before = copy.deepcopy(model.state_dict())
        for reset in (lambda: deformnd.reset_offsets(model), model[1].reset_parameters):
            with pytest.raises(ValueError, match=message):
                reset()
        assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_watch_offsets():
    packed = deformnd.PackedDeformConv2d(4, 4, 3, padding=1, generator_bias=True)
    plain, x = deformnd.DeformConv2d(4, 4, 3, padding=1), torch.rand(1, 4, 8, 8)
    model = nn.ModuleDict({"packed": packed, "plain": plain})
    far = torch.full((1, 18, 8, 8), 51.0)
    with deformnd.watch_offsets(model, every=3):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # Of every three calls of a layer the first is looked at.
            packed(x), plain(x, far / 2), plain(x, None), plain(x, offset=far)
            plain(x, far)
        with pytest.warns(RuntimeWarning, match=r"mean \|offset\| of plain is 51 pixels, above 50"):
            plain(x, far)
        nn.init.constant_(packed.offset_generator.bias, float("nan"))
        with pytest.warns(RuntimeWarning, match="of packed is nan pixels"):
            packed(x), packed(x), packed(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6):
            packed(x), plain(x, far)
    with pytest.raises(ValueError, match="no deformable layer"):
        deformnd.watch_offsets(nn.Linear(1, 1))


@of_package("basicsr.archs.arch_util")
class DCNv2Pack(ModulatedDeformConv2dPack):
    def forward(self, x, feat):
        first, second, mask = self.conv_offset(feat).chunk(3, dim=1)
        return conv2d(self, x, torch.cat((first, second), 1), mask.sigmoid())


def test_watch_offsets_of_other_packages():
    """The offset is 60 pixels, and 0 where a mask is predicted with it."""
    x, far = torch.rand(2, 4, 7, 8), torch.full((2, 18, 7, 8), 60.0)
    mask = torch.rand(2, 9, 7, 8)
    for kind in (*PLAIN, *PACKS, DCNv2Pack):
        layer, args = kind(), (x,)
        if kind in PLAIN:
            args = (x, far, mask)
        else:
            nn.init.zeros_(layer.conv_offset.weight)
            nn.init.zeros_(layer.conv_offset.bias)
            nn.init.constant_(layer.conv_offset.bias[:18], 60.0)
            args = (x, x) if kind is DCNv2Pack else (x,)
        with deformnd.watch_offsets(nn.Sequential(layer), every=1):
            with pytest.warns(RuntimeWarning, match="of 0 is 60 pixels, above 50"):
                layer(*args)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layer(*args)


def test_a_watched_model_is_saved_and_copied():
    packed = deformnd.PackedDeformConv2d(4, 4, 3, padding=1, generator_bias=True)
    model = nn.Sequential(packed, nn.ModuleList([deformnd.DeformConv2d(4, 4, 3)])[0])
    nn.init.constant_(packed.offset_generator.bias, 99.0)
    x, file = torch.rand(1, 4, 8, 8), io.BytesIO()
    with deformnd.watch_offsets(model, every=1):
        torch.save(model, file)
        file.seek(0)
        others = [torch.load(file, weights_only=False), copy.deepcopy(model)]
        with pytest.warns(RuntimeWarning):
            expected = packed(x)
        with warnings.catch_warnings():  # Models that are not watched give no warning.
            warnings.simplefilter("error")
            for other in others:
                assert torch.equal(other[0](x), expected)
                other[1](x, None)


def test_watch_offsets_refuses():
    model = deformnd.PackedDeformConv2d(4, 4, 3)
    for options, message in (
        ({"limit": -1}, "limit is -1, expected a number of at least 0"),
        ({"limit": float("nan")}, "limit is nan"),
        ({"every": 0}, "every is 0, expected at least 1"),
        ({"every": -2}, "every is -2"),
    ):
        with pytest.raises(ValueError, match=message):
            deformnd.watch_offsets(model, **options)
    for options, message in (
        ({"limit": "50"}, "limit is '50', expected a number"),
        ({"limit": torch.ones(2)}, "limit is tensor"),
        ({"limit": None}, "limit is None"),
        ({"every": 1.5}, "every is 1.5, expected an int"),
        ({"every": True}, "every is True"),
    ):
        with pytest.raises(TypeError, match=message):
            deformnd.watch_offsets(model, **options)
    with pytest.raises(TypeError, match="watch_offsets: model is a dict"):
        deformnd.watch_offsets({})
    assert not model._forward_hooks and not model.offset_generator._forward_hooks
    deformnd.watch_offsets(model, limit=float("inf")).remove()


def test_watch_offsets_leaves_a_compiled_model_whole():
    model = deformnd.PackedDeformConv2d(4, 4, 3, offset_activation=torch.tanh)
    nn.init.constant_(model.offset_generator.weight, 1.0)
    with deformnd.watch_offsets(model, limit=0, every=1):
        with pytest.warns(RuntimeWarning, match="the model is 1 pixels, above 0"):
            model(torch.rand(1, 4, 8, 8))
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            compiled(torch.rand(1, 4, 8, 8))
