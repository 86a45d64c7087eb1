"""convert, deformify, parameter_groups, watch_offsets, and mmcv's names."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deformnd
from deformnd import PackRule, convert, deformify
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
    """Predicts from another input, so it cannot be replaced (BasicSR's and mmagic's alignment)."""

    def forward(self, x, other):
        return x + other


class Renamed(ModulatedDeformConv2dPack):
    """The same forward."""


def test_subclasses(capsys):
    model = nn.Sequential(Renamed(), Aligner())
    convert(model)
    assert type(model[0]) is deformnd.PackedDeformConv2d and type(model[1]) is Aligner
    assert capsys.readouterr().out.startswith("deformnd.convert: 1 layer replaced\n  Renamed ->")


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
    with pytest.raises(ValueError, match=r"no convolution that fits where='layer9.\*'"):
        deformify(Residual(), "layer9.*")
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


def test_watch_offsets():
    packed = deformnd.PackedDeformConv2d(4, 4, 3, padding=1, generator_bias=True)
    plain, x = deformnd.DeformConv2d(4, 4, 3, padding=1), torch.rand(1, 4, 8, 8)
    model = nn.ModuleDict({"packed": packed, "plain": plain})
    far = torch.full((1, 18, 8, 8), 51.0)
    with deformnd.watch_offsets(model, every=3):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            packed(x), plain(x, far / 2), plain(x, None), plain(x, offset=far)  # the first is seen
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
