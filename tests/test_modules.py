"""The layers."""

import copy
import io
import itertools
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deformnd

RANKS = [1, 2, 3]
SIZES = {1: (9,), 2: (7, 6), 3: (5, 4, 6)}


def layer(n, transposed=False, packed=False, **options):
    name = "Packed" * packed + "DeformConv" + "Transpose" * transposed + f"{n}d"
    options = {"padding": 1, **options}
    return getattr(deformnd, name)(4, 6, 3, **options)


def inputs(n, groups=1, modulated=True):
    x = torch.randn(2, 4, *SIZES[n])
    offset = torch.randn(2, groups * n * 3**n, *SIZES[n])
    mask = torch.rand(2, groups * 3**n, *SIZES[n]) if modulated else None
    return x, offset, mask


def wake(module):
    """Give the zero-initialised generators something to say."""
    for key in ("offset_generator", "mask_generator"):
        if getattr(module, key, None) is not None:
            nn.init.normal_(getattr(module, key).weight, std=0.2)
    return module


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("transposed", [False, True])
def test_forward_is_the_function(n, transposed):
    module = layer(n, transposed, groups=2)
    function = getattr(deformnd, f"deform_conv_transpose{n}d" if transposed else f"deform_conv{n}d")
    x, offset, mask = inputs(n)
    for m in (mask, None):
        expected = function(x, module.weight, offset, m, module.bias, padding=1, groups=2)
        assert torch.equal(module(x, offset, m), expected)
    assert torch.equal(module(x[0], offset[0], mask[0]), module(x, offset, mask)[0]) or (
        torch.allclose(module(x[0], offset[0], mask[0]), module(x, offset, mask)[0], atol=1e-6)
    )


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("transposed", [False, True])
def test_they_are_torchs_convolutions(n, transposed):
    plain_type = getattr(nn, f"ConvTranspose{n}d" if transposed else f"Conv{n}d")
    torch.manual_seed(0)
    plain = plain_type(4, 6, 3, stride=2, padding=1, groups=2)
    torch.manual_seed(0)
    module = layer(n, transposed, stride=2, groups=2)
    assert isinstance(module, nn.modules.conv._ConvNd)
    assert list(module.state_dict()) == list(plain.state_dict())
    for key, value in plain.state_dict().items():
        assert torch.equal(module.state_dict()[key], value)
    assert repr(module) == "Deform" + repr(plain)
    x = torch.randn(2, 4, *SIZES[n])
    assert torch.equal(module(x, None), plain(x))
    double = layer(n, transposed, dtype=torch.float64, device="meta", bias=False)
    assert double.weight.dtype == torch.float64 and double.weight.is_meta
    assert double.bias is None


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, "same"])
def test_padding_modes(n, mode, padding):
    module = layer(n, padding=padding, padding_mode=mode)
    x, offset, mask = inputs(n)
    function = getattr(deformnd, f"deform_conv{n}d")
    padded = F.pad(x, [1, 1] * n, mode=mode)
    expected = function(padded, module.weight, offset, mask, module.bias)
    assert torch.equal(module(x, offset, mask), expected)
    plain = getattr(nn, f"Conv{n}d")(4, 6, 3, padding=padding, padding_mode=mode)
    plain.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x, torch.zeros_like(offset)), plain(x))


def test_transposed_pads_with_zeros_only():
    with pytest.raises(ValueError, match="zeros"):
        layer(2, True, padding_mode="reflect")


@pytest.mark.parametrize("n", RANKS)
def test_output_size(n):
    module = layer(n, True, stride=2)
    x, offset, mask = inputs(n)
    plain = getattr(nn, f"ConvTranspose{n}d")(4, 6, 3, padding=1, stride=2)
    smallest = plain(x).shape[2:]
    for extra in itertools.product((0, 1), repeat=n):
        size = [s + e for s, e in zip(smallest, extra, strict=True)]
        assert list(module(x, offset, mask, output_size=size).shape[2:]) == size
    with pytest.raises(ValueError, match=r"output_size is .* expected"):
        module(x, offset, mask, output_size=[s + 2 for s in smallest])


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("modulated", [False, True])
def test_a_fresh_packed_layer_is_the_plain_convolution(n, transposed, modulated):
    module = layer(
        n,
        transposed,
        packed=True,
        modulated=modulated,
        offset_groups=2,
        mask_groups=2,
        generator_bias=True,
    )
    plain = getattr(nn, f"ConvTranspose{n}d" if transposed else f"Conv{n}d")(4, 6, 3, padding=1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1e9)
        module.reset_parameters()
    assert 0 < module.weight.abs().max() < 1 and 0 < module.bias.abs().max() < 1  # torch's
    plain.load_state_dict({k: module.state_dict()[k] for k in ("weight", "bias")})
    x = torch.randn(2, 4, *SIZES[n])
    torch.testing.assert_close(module(x), plain(x))
    module(x).sum().backward()
    assert module.offset_generator.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax", None, nn.Tanh(), torch.tanh])
def test_packed_is_generators_and_function(n, transposed, activation):
    options = {"offset_groups": 2, "mask_groups": 1, "modulated": True, "stride": 2}
    module = layer(
        n,
        transposed,
        packed=True,
        mask_activation=activation,
        offset_activation=torch.tanh,
        **options,
    )
    wake(module)
    assert isinstance(module, getattr(deformnd, type(module).__name__.removeprefix("Packed")))
    x = torch.randn(2, 4, *SIZES[n])
    offset = module.offset_generator(x).tanh()
    mask = module.mask_generator(x)
    if activation == "sigmoid":
        mask = 2 * mask.sigmoid()
    elif activation == "softmax":
        mask = getattr(deformnd, f"mask_softmax{n}d")(mask, 3)
    elif activation is not None:
        mask = mask.tanh()
    base = super(type(module).__mro__[1], module)
    torch.testing.assert_close(module(x), base.forward(x, offset, mask))


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("kernel, dilation", [(3, 1), (4, 1), (2, 3)])
@pytest.mark.parametrize("mode", ["zeros", "replicate"])
def test_packed_with_padding_same(n, kernel, dilation, mode):
    name = f"PackedDeformConv{n}d"
    module = getattr(deformnd, name)(
        4, 6, kernel, padding="same", dilation=dilation, modulated=True, padding_mode=mode
    )
    x = torch.randn(2, 4, *SIZES[n])
    assert module(x).shape == (2, 6, *SIZES[n])
    plain = getattr(nn, f"Conv{n}d")(
        4, 6, kernel, padding="same", dilation=dilation, padding_mode=mode
    )
    plain.load_state_dict({k: module.state_dict()[k] for k in ("weight", "bias")})
    torch.testing.assert_close(module(x), plain(x))
    torch.testing.assert_close(torch.jit.script(module)(x), plain(x))


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("transposed", [False, True])
def test_state_dict_keys_and_shapes_are_tvdcns(n, transposed):
    module = layer(
        n,
        transposed,
        packed=True,
        offset_groups=2,
        mask_groups=1,
        modulated=True,
        generator_bias=True,
    )
    points, pointwise = 3**n, (1,) * n if transposed else (3,) * n
    assert {k: tuple(v.shape) for k, v in module.state_dict().items()} == {
        "weight": ((4, 6) if transposed else (6, 4)) + (3,) * n,
        "bias": (6,),
        "offset_generator.weight": (2 * n * points, 2, *pointwise),
        "offset_generator.bias": (2 * n * points,),
        "mask_generator.weight": (points, 4, *pointwise),
        "mask_generator.bias": (points,),
    }


def test_without_generators():
    x = torch.randn(2, 4, 7, 6)
    module = layer(2, packed=True, deformable=False)
    assert list(module.state_dict()) == ["weight", "bias"]
    assert torch.equal(module(x), F.conv2d(x, module.weight, module.bias, padding=1))
    module = wake(layer(2, packed=True, deformable=False, modulated=True))
    assert module.offset_generator is None
    mask = 2 * module.mask_generator(x).sigmoid()
    expected = deformnd.deform_conv2d(x, module.weight, None, mask, module.bias, padding=1)
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_torchscript_saved_loaded_run_and_differentiated(n, transposed, packed):
    options = {"modulated": True, "mask_activation": "softmax"} if packed else {}
    module = wake(layer(n, transposed, packed, **options))
    args = inputs(n)[: 1 if packed else 3]
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    output = loaded(*args)
    assert torch.equal(output, module(*args))
    output.sum().backward()
    module(*args).sum().backward()
    for got, expected in zip(loaded.parameters(), module.parameters(), strict=True):
        assert torch.equal(got.grad, expected.grad)
    if transposed:
        size = list(module(*args).shape[2:])
        torch.testing.assert_close(loaded(*args, output_size=size), module(*args))


@pytest.mark.parametrize("packed", [False, True])
def test_copies_pickles_and_hooks(packed):
    module = wake(layer(2, packed=packed))
    args = inputs(2)[: 1 if packed else 2]
    expected = module(*args)
    assert torch.equal(copy.deepcopy(module)(*args), expected)
    assert torch.equal(pickle.loads(pickle.dumps(module))(*args), expected)
    seen = []
    module.register_forward_hook(lambda m, a, out: seen.append(out.shape))
    module(*args)
    assert seen == [expected.shape]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: deformnd.DeformConv2d(4, 6, (3, 3, 3)), "DeformConv2d: kernel_size is (3, 3, 3)"),
        (lambda: deformnd.DeformConv1d(4, 6, 3, stride="2"), "DeformConv1d: stride is '2'"),
        (
            lambda: deformnd.DeformConv2d(4, 6, 3, groups=3),
            "in_channels is 4, expected a multiple of groups 3",
        ),
        (
            lambda: layer(2, packed=True, offset_groups=3),
            "PackedDeformConv2d: offset_groups is 3, expected a divisor of in_channels 4",
        ),
        (
            lambda: layer(2, True, packed=True, mask_groups=4),
            "PackedDeformConvTranspose2d: mask_groups is 4, expected a divisor of out_channels 6",
        ),
        (
            lambda: layer(2, packed=True, mask_activation="relu"),
            "mask_activation is 'relu', expected 'sigmoid', 'softmax', None",
        ),
        (
            lambda: layer(2, packed=True, offset_activation="tanh"),
            "offset_activation is 'tanh', expected None, a Module or a callable",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        make()
    assert message in str(caught.value)


def yolos_fuse(conv, norm):
    """What fusing tools make of a convolution and the norm behind it."""
    plain = nn.ConvTranspose2d if conv.transposed else nn.Conv2d
    fused = plain(
        conv.in_channels,
        conv.out_channels,
        kernel_size=conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        groups=conv.groups,
        bias=True,
    ).requires_grad_(False)
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    shape = (1, -1, 1, 1) if conv.transposed else (-1, 1, 1, 1)
    bias = 0 if conv.bias is None else conv.bias
    fused.weight.copy_(conv.weight * factor.view(shape))
    fused.bias.copy_(norm.bias + factor * (bias - norm.running_mean))
    return fused


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_a_fusing_tool_keeps_the_offsets(transposed, bias):
    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = wake(layer(2, transposed, packed=True, modulated=True, bias=bias))
            self.bn = nn.BatchNorm2d(6)

        def forward(self, x):
            return self.bn(self.conv(x)) if hasattr(self, "bn") else self.conv(x)

    module, x = Conv().eval(), torch.randn(2, 4, 7, 6)
    with torch.no_grad():
        for t in (module.bn.weight, module.bn.bias, module.bn.running_mean):
            t.normal_()
        module.bn.running_var.uniform_(0.5, 2)
        module.bn.weight[0] = 0
        expected, old = module(x), module.conv
        with pytest.warns(UserWarning, match="offsets and all"):
            module.conv = yolos_fuse(module.conv, module.bn)
        del module.bn
        assert type(module.conv) is type(old) and module.conv is not old
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
    again = torch.nn.utils.fusion.fuse_conv_bn_eval(old, nn.BatchNorm2d(6).eval(), transposed)
    torch.testing.assert_close(again(x), old(x), rtol=1e-4, atol=1e-4)


def test_what_is_no_fused_convolution_takes_its_place():
    parent = nn.Sequential(wake(layer(2, packed=True)))
    for plain in (
        nn.Conv2d(4, 6, 3, padding=1),  # new weights
        nn.Conv2d(4, 6, 3, stride=2),
        nn.Conv2d(4, 6, 1),
        nn.ConvTranspose2d(4, 6, 3),
        nn.Identity(),
    ):
        parent[0] = wake(layer(2, packed=True))
        parent[0] = plain
        assert parent[0] is plain
    packed, plain = wake(layer(2, packed=True)), nn.Conv2d(4, 6, 3, padding=1)
    plain.load_state_dict({k: packed.state_dict()[k] for k in ("weight", "bias")})
    parent[0] = packed
    with pytest.warns(UserWarning, match="without its offsets"):
        parent[0] = plain
    assert parent[0] is plain


def test_fuse_batch_norm_refuses_other_modules():
    packed = layer(2, packed=True).eval()
    for norm in (nn.GroupNorm(2, 6), nn.LayerNorm(6), nn.Identity(), None):
        with pytest.raises(TypeError, match=f"norm is a {type(norm).__name__}, expected a Batch"):
            deformnd.fuse_batch_norm(packed, norm)
    with pytest.raises(TypeError, match="layer is a Linear, expected a convolution"):
        deformnd.fuse_batch_norm(nn.Linear(6, 6), nn.BatchNorm2d(6))
    with pytest.raises(ValueError, match="norm has no running statistics"):
        deformnd.fuse_batch_norm(packed, nn.InstanceNorm2d(6).eval())


@pytest.mark.parametrize("n", RANKS)
def test_padding_by_name(n):
    for prefix in ("", "Packed", "Lazy"):
        name, sizes = f"{prefix}DeformConv{n}d", (6, 3) if prefix == "Lazy" else (4, 6, 3)
        make = getattr(deformnd, name)
        with pytest.raises(ValueError, match=rf"^{name}: padding is 'same', which .* stride 1, g"):
            make(*sizes, padding="same", stride=(1,) * (n - 1) + (2,))
        with pytest.raises(ValueError, match=rf"^{name}: padding is 'x', expected 'same', 'valid'"):
            make(*sizes, padding="x")
        assert make(*sizes, padding="valid", stride=2).padding == "valid"
        assert make(*sizes, padding="same", dilation=2).padding == "same"


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("transposed", [False, True])
def test_numbers_of_numpy(n, transposed):
    kind = f"DeformConv{'Transpose' * transposed}{n}d"
    for name in (kind, f"Packed{kind}", f"Lazy{kind}"):
        make, ints = getattr(deformnd, name), (6, 3) if "Lazy" in name else (4, 6, 3)
        given = make(*map(np.int64, ints), groups=np.int64(2), padding=(np.int32(1),) * n)
        plain = make(*ints, groups=2, padding=(1,) * n)
        assert repr(given) == repr(plain)
        assert all(type(v) is int for v in (*given.kernel_size, *given.padding, given.groups))


@pytest.mark.parametrize(
    "error, options, message",
    [
        (TypeError, {"offset_groups": 2}, "unexpected argument 'offset_groups'; the number of gr"),
        (TypeError, {"mask_groups": 2}, "the number of groups is read off the mask's channels"),
        (TypeError, {"deform_groups": 2}, "read off the offset's channels"),
        (TypeError, {"deformable_groups": 2}, "read off the offset's channels"),
        (TypeError, {"strides": 2}, "unexpected argument 'strides'"),
        (TypeError, {"kernel_size": True}, "kernel_size is True, expected an int or 2 ints"),
        (
            ValueError,
            {"kernel_size": (3, 0)},
            "kernel_size is (3, 0), expected an int or 2 ints fr",
        ),
        (ValueError, {"stride": 10**30}, "stride is 1000"),
        (ValueError, {"padding": -1}, "padding is -1, expected an int or 2 ints from 0"),
        (TypeError, {"groups": 1.0}, "groups is 1.0, expected an int"),
        (ValueError, {"in_channels": -1}, "in_channels is -1, expected an int from 0"),
        (TypeError, {"out_channels": "6"}, "out_channels is '6', expected an int"),
        (TypeError, {"bias": torch.zeros(6)}, "bias is tensor"),
        (ValueError, {"padding_mode": []}, "padding_mode is [], expected 'zeros'"),
        (ValueError, {"device": "abacus"}, "device is 'abacus', expected a device"),
        (TypeError, {"dtype": "float32"}, "dtype is 'float32', expected a floating torch.dtype"),
    ],
)
def test_arguments_of_layers(error, options, message):
    sizes = {"in_channels": 4, "out_channels": 6, "kernel_size": 3}
    for name in ("DeformConv2d", "DeformConvTranspose2d", "LazyDeformConv2d"):
        given = {**sizes, **options}
        if name.startswith("Lazy"):
            del given["in_channels"]
            if "in_channels" in options:
                continue
        with pytest.raises(error) as caught:
            getattr(deformnd, name)(**given)
        assert str(caught.value).startswith(f"{name}: ") and message in str(caught.value)


@pytest.mark.parametrize(
    "error, options, message",
    [
        (
            TypeError,
            {"deform_groups": 2},
            "argument 'deform_groups'; its name here is offset_groups",
        ),
        (
            TypeError,
            {"mask_activation": 3},
            "mask_activation is 3, expected None, a Module or a ca",
        ),
        (TypeError, {"offset_activation": []}, "offset_activation is [], expected None, a Module"),
        (TypeError, {"offset_groups": 1.0}, "offset_groups is 1.0, expected an int"),
        (TypeError, {"generator_groups": "1"}, "generator_groups is '1', expected an int"),
        (TypeError, {"modulated": "yes"}, "modulated is 'yes', expected a bool"),
    ],
)
def test_arguments_of_packed_layers(error, options, message):
    for name in ("PackedDeformConv2d", "PackedDeformConvTranspose2d"):
        with pytest.raises(error) as caught:
            getattr(deformnd, name)(4, 6, 3, **options)
        assert str(caught.value).startswith(f"{name}: ") and message in str(caught.value)


@pytest.mark.parametrize(
    "error, input, message",
    [
        (ValueError, torch.zeros(1, 5, 8, 8), "input has 5 channels, expected in_channels 4"),
        (ValueError, torch.zeros(8, 8), "input has 2 dimensions, expected 4"),
        (TypeError, torch.zeros(1, 4, 8, 8).double(), "input has dtype torch.float64, expected"),
        (TypeError, torch.zeros(1, 4, 8, 8).long(), "input has dtype torch.int64, expected"),
        (TypeError, [1.0], "input is a list, expected a Tensor"),
        (ValueError, torch.zeros(1, 4, 8, 8, device="meta"), "input is on meta, expected cpu"),
        (ValueError, torch.zeros(1, 4, 0, 8), "input has spatial size (0, 8), expected at least"),
    ],
)
def test_inputs_of_layers_that_pad_or_predict(error, input, message):
    """What they compute ahead of the operator must not end in another function's error."""
    for make in (
        deformnd.PackedDeformConv2d,
        deformnd.PackedDeformConvTranspose2d,
        lambda *sizes: deformnd.PackedDeformAggregate2d(sizes[0], sizes[-1]),
        lambda *sizes: deformnd.PackedDeformConv2d(*sizes, padding=1, padding_mode="reflect"),
    ):
        with pytest.raises(error, match=r"^PackedDeform") as caught:
            make(4, 6, 3)(input)
        assert message in str(caught.value)
    if not isinstance(input, torch.Tensor) or input.device.type == "cpu":
        plain = deformnd.DeformConv2d(4, 6, 3, padding=1, padding_mode="circular")
        with pytest.raises(error, match=r"^DeformConv2d: input "):
            plain(input, None)


def test_sizes_of_layers_that_pad_or_predict():
    x = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match=r"spatial size \(2, 8\), expected at least 3 on axis 0"):
        deformnd.PackedDeformConv2d(4, 6, 3)(x)
    with pytest.raises(
        ValueError, match=r"padding is \(2, 2\), expected at most 1 with padding_mo"
    ):
        deformnd.DeformConv2d(4, 6, 3, padding=2, padding_mode="reflect")(x, None)
    with pytest.raises(TypeError, match=r"output_size is 'abc', expected a list of ints"):
        deformnd.DeformConvTranspose2d(4, 6, 3)(x, None, output_size="abc")
    with pytest.raises(ValueError, match="LazyPackedDeformConv2d: input has 2 dimensions"):
        deformnd.LazyPackedDeformConv2d(6, 3)(x[0, 0])


def test_a_lazy_layer_that_loaded_has_its_channels():
    lazy = deformnd.LazyPackedDeformConvTranspose2d(6, 3, groups=2)
    lazy.load_state_dict(deformnd.PackedDeformConvTranspose2d(4, 6, 3, groups=2).state_dict())
    lazy(torch.zeros(1, 4, 5, 5))
    assert lazy.in_channels == 4


def fused_in(dtype, beta):
    """A layer, its norm behind it, and what a fusing tool makes of both."""
    conv = wake(layer(2, packed=True)).eval().to(dtype)
    norm = nn.BatchNorm2d(6, eps=0 if dtype == torch.float32 else 1e-5).eval().to(dtype)
    nn.init.constant_(norm.bias, beta)
    with torch.no_grad():
        return conv, norm, yolos_fuse(conv, norm).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_factor_that_rounds_to_one(dtype):
    conv, norm, fused = fused_in(dtype, 0.5)
    assert torch.equal(conv.weight, fused.weight)
    parent, x = nn.Sequential(conv), torch.randn(2, 4, 7, 6, dtype=dtype)
    expected = norm(conv(x))
    with pytest.warns(UserWarning, match="'0': a Conv2d with multiples of its filters .* stays"):
        parent[0] = fused
    torch.testing.assert_close(parent(x), expected, rtol=5e-2, atol=5e-2)
    conv, _, fused = fused_in(dtype, 0.0)  # nothing to tell it by
    parent = nn.Sequential(conv)
    with pytest.warns(UserWarning, match="its weight and bias takes its place, without its offs"):
        parent[0] = fused
    assert parent[0] is fused


def test_multiples_of_a_layers_filters_are_not_taken_silently():
    packed, plain = wake(layer(2, packed=True)), nn.Conv2d(4, 6, 3, padding=1)
    with torch.no_grad():
        plain.weight.copy_(1.01 * packed.weight)
    parent = nn.ModuleDict({"a": packed})
    with pytest.warns(UserWarning, match="PackedDeformConv2d 'a': .* put None there first"):
        parent["a"] = plain
    assert torch.equal(parent["a"].weight, plain.weight)
    assert type(parent["a"]) is type(packed)
    for above, key in ((parent, "a"), (nn.Sequential(packed), 0)):
        above[key] = None
        above[key] = plain
        assert above[key] is plain


@pytest.mark.parametrize("transposed", [False, True])
def test_a_layer_that_was_pruned_by_hand(transposed):
    for padding_mode in ("zeros",) if transposed else ("zeros", "circular"):
        packed = wake(layer(2, transposed, packed=True, modulated=True, padding_mode=padding_mode))
        x = torch.randn(1, 4, 7, 6)
        x[:, 3] = 0
        expected = packed(x)
        for m in (packed, packed.offset_generator, packed.mask_generator):
            rows = transposed and m is packed
            m.weight = nn.Parameter(m.weight[:3] if rows else m.weight[:, :3])
        torch.testing.assert_close(packed(x[:, :3]), expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="input has 4 channels, expected in_channels 3"):
            packed(x)


# Aggregations


def aggregation(n, **options):
    options = {"padding": 1, "offset_groups": 2, "mask_groups": 4, **options}
    return getattr(deformnd, f"PackedDeformAggregate{n}d")(4, 3, **options)


@pytest.mark.parametrize("n", RANKS)
def test_a_fresh_aggregation_is_an_average_or_a_sum(n):
    x = torch.randn(2, 4, *SIZES[n])
    average = getattr(F, f"avg_pool{n}d")(x, 3, 1, 1)  # with the zeros around
    module = aggregation(n)
    torch.testing.assert_close(module(x), average)
    torch.testing.assert_close(module(x[0]), average[0])
    module(x).square().sum().backward()
    for generator in (module.offset_generator, module.mask_generator):
        assert generator.weight.grad.any()
    for options in ({"mask_activation": "sigmoid"}, {"modulated": False}):
        torch.testing.assert_close(aggregation(n, **options)(x), 3**n * average)
    plain = aggregation(n, deformable=False, modulated=False)
    assert not plain.state_dict()
    torch.testing.assert_close(plain(x), 3**n * average)


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "offset_activation": torch.tanh},
        {"padding": "same", "dilation": 2, "mask_activation": None, "generator_groups": 1},
        {"padding": "valid", "mask_activation": nn.Tanh(), "generator_bias": True},
    ],
)
def test_an_aggregation_is_generators_and_function(n, options):
    module = wake(aggregation(n, **options))
    x = torch.randn(2, 4, *SIZES[n]) if n < 3 else torch.randn(2, 4, 7, 6, 8)
    offset, mask = module.offset_generator(x), module.mask_generator(x)
    if "offset_activation" in options:
        offset = offset.tanh()
    if "mask_activation" not in options:
        mask = getattr(deformnd, f"mask_softmax{n}d")(mask, 3)
    elif options["mask_activation"] is not None:
        mask = mask.tanh()
    sizes = {key: getattr(module, key) for key in ("kernel_size", "stride", "padding", "dilation")}
    expected = getattr(deformnd, f"deform_aggregate{n}d")(x, offset, mask, **sizes)
    assert torch.equal(module(x), expected)
    again = aggregation(n, **options)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x), expected)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(x), expected)
    buffer = io.BytesIO()
    if "offset_activation" not in options:
        torch.jit.save(torch.jit.script(module), buffer)
        buffer.seek(0)
        assert torch.equal(torch.jit.load(buffer)(x), expected)
    exported = torch.export.export(module.eval(), (x,)).module()
    assert torch.equal(exported(x), expected)
    torch.compiler.reset()  # or the cases before count for its limit of compilations
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("n", RANKS)
def test_training_tools_know_an_aggregation(n):
    model = nn.Sequential(wake(aggregation(n)))
    others, predictors = deformnd.parameter_groups(model, lr=1.0)
    assert (len(others["params"]), len(predictors["params"])) == (0, 2)
    nn.init.constant_(model[0].offset_generator.weight, 1000.0)
    with deformnd.watch_offsets(model, every=1), pytest.warns(RuntimeWarning, match="of 0 is"):
        model(torch.rand(2, 4, *SIZES[n]))
    deformnd.reset_offsets(model)
    assert not any(p.any() for p in model.parameters())
    wake(model[0])
    model[0].reset_parameters()
    assert not any(p.any() for p in model.parameters())


def test_arguments_of_aggregations():
    for options, error, message in (
        ({"groups": 2}, TypeError, "unexpected argument 'groups'"),
        ({"deform_groups": 2}, TypeError, "'deform_groups'; its name here is offset_groups"),
        ({"offset_groups": 3}, ValueError, "offset_groups is 3, expected a divisor of in_channels"),
        ({"mask_groups": 3}, ValueError, "mask_groups is 3, expected a divisor of in_channels 4"),
        ({"generator_groups": 3}, ValueError, "generator_groups is 3, expected a divisor of in_ch"),
        ({"mask_activation": "relu"}, ValueError, "mask_activation is 'relu', expected 'sigmoid'"),
        ({"padding": "same", "stride": 2}, ValueError, "padding is 'same', which expects stride 1"),
        ({"padding": -1}, ValueError, "padding is -1, expected an int or 2 ints from 0"),
        ({"stride": "2"}, TypeError, "stride is '2', expected an int or 2 ints"),
        ({"modulated": "yes"}, TypeError, "modulated is 'yes', expected a bool"),
        ({"dtype": "float32"}, TypeError, "dtype is 'float32', expected a floating torch.dtype"),
    ):
        with pytest.raises(error) as caught:
            aggregation(2, **options)
        assert str(caught.value).startswith("PackedDeformAggregate2d: ")
        assert message in str(caught.value)
    with pytest.raises(ValueError, match="2d: in_channels is 0, expected an int from 1"):
        deformnd.PackedDeformAggregate2d(0, 3)
    module = aggregation(2, dtype=torch.float64, device="meta")
    assert module.mask_generator.weight.is_meta and repr(module).startswith(
        "PackedDeformAggregate2d(\n  4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), "
        "offset_groups=2, mask_groups=4, deformable=True, modulated=True"
    )
