"""DCNv3 and DCNv4 by the names and layouts of OpenGVLab, against the formulas of their papers."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import deformnd
from cases import relative_error
from deformnd.compat import internimage
from deformnd.compat.internimage import DCNv3, DCNv4

C, G = 12, 3
# Names and sizes as the original modules save them.
PROJECTIONS = {"weight": (C, C), "bias": (C,)}
CENTER = {
    "center_feature_scale_proj_weight": (G, C),
    "center_feature_scale_proj_bias": (G,),
}


def saved3(kernel=3, dw=None, points=9, norm="1.1", center=False):
    shapes = {
        "dw_conv.0.weight": (C, 1, dw or kernel, dw or kernel),
        "dw_conv.0.bias": (C,),
        f"dw_conv.{norm}.weight": (C,),
        f"dw_conv.{norm}.bias": (C,),
        "offset.weight": (G * points * 2, C),
        "offset.bias": (G * points * 2,),
        "mask.weight": (G * points, C),
        "mask.bias": (G * points,),
    }
    for name in ("input_proj", "output_proj"):
        shapes |= {f"{name}.{key}": shape for key, shape in PROJECTIONS.items()}
    return shapes | (CENTER if center else {})


def saved4(rows=88, dw=None, pointwise=True, bias=True, center=False):
    shapes = {"offset_mask.weight": (rows, C), "offset_mask.bias": (rows,)}
    if dw:
        shapes |= {"offset_mask_dw.weight": (C, 1, dw, dw), "offset_mask_dw.bias": (C,)}
    for name in ("value_proj", "output_proj") if pointwise else ():
        shapes |= {f"{name}.{key}": shape for key, shape in PROJECTIONS.items()}
    if not bias:
        del shapes["output_proj.bias"]
    return shapes | (CENTER if center else {})


def aggregate(value, offset, mask, kernel, stride, pad, dilation, scale, remove_center):
    """The formula, in plain indices: value [N, H, W, C], offset [N, Ho, Wo, G, P, 2] as (x, y)."""
    n, height, width, channels = value.shape
    rows, columns, groups, points = offset.shape[1:5]
    middle = dilation * (kernel - 1) // 2
    grid = [(i, j) for i in range(kernel) for j in range(kernel)]  # column by column
    if remove_center:
        grid.remove((kernel // 2, kernel // 2))
    assert len(grid) == points
    size = channels // groups
    out = torch.zeros(n, rows, columns, groups, size, dtype=value.dtype)
    images = value.unflatten(3, (groups, size))
    b = torch.arange(n).view(n, 1, 1, 1)
    g = torch.arange(groups)
    for point, (i, j) in enumerate(grid):
        x, y = offset[..., point, 0], offset[..., point, 1]  # [N, Ho, Wo, G]
        across = torch.arange(columns).view(1, 1, -1, 1) * stride - pad + middle
        down = torch.arange(rows).view(1, -1, 1, 1) * stride - pad + middle
        x = across + scale * (i * dilation - middle + x)
        y = down + scale * (j * dilation - middle + y)
        for below in (0, 1):
            for right in (0, 1):
                v, u = y.floor().long() + below, x.floor().long() + right
                share = (1 - (y - v).abs()) * (1 - (x - u).abs())
                inside = (v >= 0) & (v < height) & (u >= 0) & (u < width)
                pixel = images[b, v.clamp(0, height - 1), u.clamp(0, width - 1), g]
                out = out + pixel * (share * inside * mask[..., point])[..., None]
    return out.flatten(3)


def blend(state, output, query, value):
    if "center_feature_scale_proj_weight" not in state:
        return output
    weight, bias = (state[f"center_feature_scale_proj_{k}"] for k in ("weight", "bias"))
    share = torch.sigmoid(query @ weight.T + bias).repeat_interleave(C // G, 3)
    return output * (1 - share) + value * share


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def formula3(state, x, module):
    s, near = module.stride, state["dw_conv.0.weight"]
    near = F.conv2d(
        x.permute(0, 3, 1, 2), near, state["dw_conv.0.bias"], padding=near.shape[2] // 2, groups=C
    )
    if "dw_conv.1.0.weight" in state:
        norm = state["dw_conv.1.0.weight"], state["dw_conv.1.0.bias"]
        running = state["dw_conv.1.0.running_mean"], state["dw_conv.1.0.running_var"]
        near = F.batch_norm(near, *running, *norm).permute(0, 2, 3, 1)
    else:
        norm = state["dw_conv.1.1.weight"], state["dw_conv.1.1.bias"]
        near = F.layer_norm(near.permute(0, 2, 3, 1), (C,), *norm, eps=1e-6)
    act = {nn.GELU: F.gelu, nn.ReLU: F.relu, nn.SiLU: F.silu}[type(module.dw_conv[2])]
    near = act(near)[:, ::s, ::s]
    value = linear(state, "input_proj", x)
    offset = linear(state, "offset", near).unflatten(3, (G, -1, 2))
    mask = linear(state, "mask", near).unflatten(3, (G, -1)).softmax(4)
    y = blend(state, sampled(module, value, offset, mask), near, value[:, ::s, ::s])
    return linear(state, "output_proj", y)


def formula4(state, x, module, height, width):
    s, points = module.stride, module.kernel_size**2 - module.remove_center
    near = image = x.view(len(x), height, width, C)
    if "offset_mask_dw.weight" in state:
        near = state["offset_mask_dw.weight"]
        near = F.conv2d(
            image.permute(0, 3, 1, 2),
            near,
            state["offset_mask_dw.bias"],
            padding=near.shape[2] // 2,
            groups=C,
        ).permute(0, 2, 3, 1)
    both = linear(state, "offset_mask", near[:, ::s, ::s])[..., : G * points * 3]
    both = both.unflatten(3, (G, points * 3))
    offset, mask = both[..., : points * 2].unflatten(4, (points, 2)), both[..., points * 2 :]
    value = linear(state, "value_proj", image) if "value_proj.weight" in state else image
    y = sampled(module, value, offset, mask)
    y = blend(state, y, y, value[:, ::s, ::s]).flatten(1, 2)
    return linear(state, "output_proj", y) if "output_proj.weight" in state else y


def sampled(m, *tensors):
    sizes = m.kernel_size, m.stride, m.pad, m.dilation, m.offset_scale, m.remove_center
    return aggregate(*tensors, *sizes)


def random_state(shapes):
    state = {}
    for name, shape in shapes.items():
        state[name] = torch.randn(shape, dtype=torch.float64) / max(1, shape[-1]) ** 0.5
        if name.endswith("running_var"):
            state[name] = torch.rand(shape, dtype=torch.float64) + 0.5
    return state


NORM = {f"dw_conv.1.0.running_{k}": (C,) for k in ("mean", "var")}
CASES3 = {
    "plain": ({}, saved3()),
    "scaled": ({"offset_scale": 2.0, "use_dcn_v4_op": True}, saved3()),
    "shrunk": ({"offset_scale": 0.7, "kernel_size": 5, "pad": 2}, saved3(5, None, 25)),
    "strided": ({"stride": 2, "center_feature_scale": True}, saved3(center=True)),
    "dilated": ({"dilation": 2, "pad": 2, "offset_scale": 1.5, "stride": 3}, saved3()),
    "even": ({"kernel_size": 2, "dilation": 2, "dw_kernel_size": 1}, saved3(2, 1, 4)),
    "without-center": (
        {"remove_center": True, "offset_scale": 2, "dw_kernel_size": 5, "act_layer": "ReLU"},
        saved3(3, 5, 8),
    ),
    "norm": (
        {"norm_layer": "BN", "act_layer": "SiLU", "center_feature_scale": True},
        saved3(norm="1.0", center=True) | NORM,
    ),
}
CASES4 = {
    "plain": ({}, saved4()),
    "scaled": ({"offset_scale": 2.0, "dw_kernel_size": 3}, saved4(dw=3)),
    "large": ({"offset_scale": 0.7, "kernel_size": 5, "pad": 2}, saved4(232)),
    "strided": ({"stride": 2, "center_feature_scale": True}, saved4(center=True)),
    "dilated": ({"dilation": 2, "pad": 2, "output_bias": False}, saved4(bias=False)),
    "without-center": (
        {"remove_center": True, "center_feature_scale": True, "act_layer": "GELU"},
        saved4(72, center=True),
    ),
    "without-projections": ({"without_pointwise": True}, saved4(pointwise=False)),
}


@pytest.mark.parametrize(
    "kind, options, shapes",
    [
        *(pytest.param(DCNv3, *case, id=f"3-{name}") for name, case in CASES3.items()),
        *(pytest.param(DCNv4, *case, id=f"4-{name}") for name, case in CASES4.items()),
    ],
)
def test_formula_gradients_and_checkpoint(kind, options, shapes):
    torch.manual_seed(0)
    module = kind(channels=C, group=G, **options).double().eval()
    state = random_state(shapes)
    own = {k: v for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert {k: tuple(v.shape) for k, v in own.items()} == shapes
    module.load_state_dict(state, strict="running_var" not in "".join(shapes))
    saved = module.state_dict()
    assert all(torch.equal(saved[key], value) for key, value in state.items())
    x = torch.randn(2, 7, 6, C, dtype=torch.float64)
    x, arguments = (x, ()) if kind is DCNv3 else (x.flatten(1, 2), (7, 6))
    x.requires_grad_()
    leaves = [x, *(t.requires_grad_() for k, t in state.items() if "running" not in k)]
    formula = formula3 if kind is DCNv3 else formula4
    expected = formula(state, x, module, *arguments)
    output = module(x, arguments) if arguments else module(x)
    assert output.shape == expected.shape and relative_error(output, expected) < 1e-12
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, weight)
    parameters = dict(module.named_parameters())
    mine = [x, *(parameters[k] for k in state if "running" not in k)]
    for got, want in zip(torch.autograd.grad(output, mine, weight), wanted, strict=True):
        assert relative_error(got, want) < 1e-10


@pytest.mark.parametrize("kind", [DCNv3, DCNv4])
def test_fresh_layers(kind):
    torch.manual_seed(0)
    module = kind(32, group=2, center_feature_scale=True)
    x = torch.rand(1, 8, 8, 32)
    if kind is DCNv4:  # its mask begins with zeros
        module = kind(32, group=2)
        assert torch.equal(module(x.flatten(1, 2)), torch.zeros(1, 64, 32))
        assert torch.equal(module(x.flatten(1, 2)), module(x.flatten(1, 2), [8, 8]))
        return
    value = module.input_proj(x).permute(0, 3, 1, 2)
    mean = F.avg_pool2d(value, 3, 1, 1)  # with the zeros around
    expected = module.output_proj((0.5 * (mean + value)).permute(0, 2, 3, 1))
    torch.testing.assert_close(module(x), expected)
    nn.init.normal_(module.offset.weight)
    module._reset_parameters()
    assert not module.offset.weight.any()


def awake(kind, **options):
    torch.manual_seed(0)
    module = kind(C, group=G, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 6, 6, C)
    return module, x if kind is DCNv3 else x.flatten(1, 2)


class Inputs(TorchDispatchMode):
    """Notes the tensors that the operator is given."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() == "deformnd::deform_aggregate":
            self.seen = args[:3]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [DCNv3, DCNv4])
def test_nothing_is_copied_twice(kind):
    module, x = awake(kind, offset_scale=2.0, remove_center=True)
    values = []
    name = "input_proj" if kind is DCNv3 else "value_proj"
    getattr(module, name).register_forward_hook(lambda m, args, out: values.append(out))
    with torch.no_grad(), Inputs() as inputs:
        output = module(x)
    image, offset, mask = inputs.seen
    assert image.data_ptr() == values[0].data_ptr() and output.is_contiguous()
    assert all(t.permute(0, 3, 2, 1).is_contiguous() for t in (image, offset, mask))


def test_nothing_is_copied():
    """Neither on the way to the operator nor in it, nor on the way back."""
    module = DCNv3(C, group=G)
    sizes = {"value": (C,), "offset": (G, 9, 2), "mask": (G, 9)}
    leaves = {key: torch.rand(2, 5, 7, *size).requires_grad_() for key, size in sizes.items()}
    with torch.profiler.profile() as profile:
        module._sample(**leaves).backward(torch.rand(2, 5, 7, C))
    called = {event.name for event in profile.events()}
    assert "aten::permute" in called
    assert not called & {"aten::copy_", "aten::clone", "aten::cat", "aten::contiguous"}
    assert all(leaf.grad.is_contiguous() for leaf in leaves.values())


def test_other_devices_and_symbolic_traces_copy():
    """The way that no backend has to know of, and the same numbers."""
    module, x = awake(DCNv3, offset_scale=2.0)
    traced = torch.fx.symbolic_trace(module)
    with torch.no_grad(), Inputs() as inputs:
        output = traced(x)
    image, offset, mask = inputs.seen
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert offset.is_contiguous() and mask.is_contiguous()
    torch.testing.assert_close(output, module(x))


@pytest.mark.parametrize("options", [{}, {"remove_center": True, "center_feature_scale": True}])
@pytest.mark.parametrize("kind", [DCNv3, DCNv4])
def test_in_torchs_tools(kind, options):
    module, x = awake(kind, offset_scale=2.0, **options)
    module.eval()
    expected = module(x)
    scripted = torch.jit.script(module)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(module, (x,))
    others = [traced, scripted, torch.jit.load(file), torch.export.export(module, (x,)).module()]
    if kind is DCNv3:
        others.append(torch.fx.symbolic_trace(module))
    for other in others:
        torch.testing.assert_close(other(x), expected)
    if kind is DCNv3:
        sizes = {i: torch.export.Dim.DYNAMIC for i in range(3)}
        program = torch.export.export(module, (x,), dynamic_shapes=(sizes,)).module()
        larger = torch.randn(3, 7, 9, C)
        torch.testing.assert_close(program(larger), module(larger))
    torch.compiler.reset()  # or the cases before count for its limit of compilations
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(copy.deepcopy(module)(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        half = module(x)
    assert half.dtype == torch.bfloat16 and relative_error(half, expected) < 0.05
    assert relative_error(module.bfloat16()(x.bfloat16()), expected) < 0.05


class OfAnImage(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, image):
        return self.layer(image.flatten(2).transpose(1, 2), image.shape[2:])


def test_dcnv4_of_the_shape_of_an_image():
    model = OfAnImage(awake(DCNv4, offset_scale=2.0)[0]).eval()
    image, larger = torch.randn(2, C, 4, 5), torch.randn(1, C, 7, 6)
    expected = formula4(
        dict(model.layer.named_parameters()), larger.flatten(2).mT.contiguous(), model.layer, 7, 6
    )
    torch.testing.assert_close(model(larger), expected, rtol=1e-4, atol=1e-4)
    sizes = ({i: torch.export.Dim.DYNAMIC for i in (0, 2, 3)},)
    exported = torch.export.export(model, (image,), dynamic_shapes=sizes).module()
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, (image,))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for other in (exported, traced, compiled):
        torch.testing.assert_close(other(larger), model(larger))


def test_half_offsets_keep_their_precision_where_they_are_scaled():
    module, x = awake(DCNv3, offset_scale=1.7)
    with Inputs() as inputs:
        module.bfloat16()(x.bfloat16())
    assert inputs.seen[1].dtype == torch.float32


@pytest.mark.parametrize("kind", [DCNv3, DCNv4])
@pytest.mark.parametrize(
    "error, message, options",
    [
        (ValueError, "group is 5, expected a divisor of channels 12", {"group": 5}),
        (ValueError, "pad is 0, expected 1, half of dilation 1 x (kernel_size 3", {"pad": 0}),
        (ValueError, "pad is 1, expected 1.5", {"kernel_size": 4}),
        (ValueError, "dw_kernel_size is 4, expected an odd number", {"dw_kernel_size": 4}),
        (ValueError, "dilation is 0, expected an int from 1", {"dilation": 0}),
        (TypeError, "stride is (1, 1), expected an int", {"stride": (1, 1)}),
        (TypeError, "offset_scale is '2', expected a number", {"offset_scale": "2"}),
        (
            ValueError,
            "kernel_size is 2, expected an odd number with remove_center",
            {"kernel_size": 2, "dilation": 2, "remove_center": True},
        ),
    ],
)
def test_constructors_refuse(kind, error, message, options):
    with pytest.raises(error) as caught:
        kind(**{"channels": C, "group": G, **options})
    assert f"{kind.__name__}: {message}" in str(caught.value)


@pytest.mark.parametrize(
    "message, options",
    [
        ("norm_layer is 'GN', expected 'LN' or 'BN'", {"norm_layer": "GN"}),
        ("act_layer is 'Tanh', expected 'GELU' or 'ReLU' or 'SiLU'", {"act_layer": "Tanh"}),
    ],
)
def test_dcnv3_refuses(message, options):
    with pytest.raises(ValueError, match=f"DCNv3: {message}"):
        DCNv3(C, group=G, **options)


def test_forward_refuses():
    layer = DCNv3(C, group=G)
    with pytest.raises(ValueError, match=r"DCNv3: input is \[1, 12, 4, 5\], expected \[N, H, W, C"):
        layer(torch.rand(1, C, 4, 5))
    with pytest.raises(TypeError, match=r"DCNv3: input is a list"):
        layer([1])
    layer, x = DCNv4(C, group=G), torch.rand(1, 20, C)
    with pytest.raises(ValueError, match=r"DCNv4: input is \[1, 4, 5, 12\], expected \[N, L, C\]"):
        layer(x.view(1, 4, 5, C))
    with pytest.raises(ValueError, match=r"DCNv4: input has 20 pixels, expected a square number"):
        layer(x)
    with pytest.raises(ValueError, match=r"DCNv4: shape is \(4, 4\), expected \(H, W\) of .* 20"):
        layer(x, (4, 4))
    with pytest.raises(TypeError, match=r"DCNv4: shape is 4, expected two ints"):
        layer(x, 4)
    assert layer(x, torch.Size([4, 5])).shape == x.shape


def stand_in(kind, module, **options):
    """What `convert` sees of an original: its parts, attributes and names, and the formula."""
    made = awake(kind, **options)[0]

    class Original(nn.Module):
        def __init__(self):
            super().__init__()
            vars(self).update({k: v for k, v in vars(made).items() if k[0] != "_"})
            self.__dict__["made"] = made
            self._modules.update({k: m for k, m in made._modules.items() if m is not None})
            self._parameters.update({k: p for k, p in made._parameters.items() if p is not None})
            if self.center_feature_scale:
                self.center_feature_scale_module = nn.Identity()

        def forward(self, input, shape=None):
            state = dict(self.named_parameters())
            if kind is DCNv3:
                return formula3(state, input, made)
            return formula4(state, input, made, *(shape or (6, 6)))

    Original.__name__, Original.__module__ = kind.__name__, module
    return Original()


CENTERED = {"center_feature_scale": True, "remove_center": True, "offset_scale": 2.0}


@pytest.mark.parametrize("options", [{}, CENTERED, {"dw_kernel_size": 5}])
@pytest.mark.parametrize(
    "kind, module",
    [
        (DCNv3, "ops_dcnv3.modules.dcnv3"),
        (DCNv3, "transformers_modules.OpenGVLab.internimage_t_1k_224.dcnv3"),
        (DCNv4, "DCNv4.modules.dcnv4"),
    ],
)
def test_convert(kind, module, options, capsys):
    x = torch.randn(2, 6, 6, C) if kind is DCNv3 else torch.randn(2, 36, C)
    model = nn.Sequential(stand_in(kind, module, **options), nn.Identity()).eval()
    expected, parameters = model(x), dict(model.named_parameters())
    old = model[0]
    seen = []
    old.register_forward_hook(lambda m, args, out: seen.append(out))
    assert deformnd.convert(model, check=x) is model
    assert capsys.readouterr().out == (
        f"deformnd.convert: 1 layer replaced\n  {kind.__name__} -> {kind.__name__}: 0\n"
    )
    assert type(model[0]) is kind and not model[0].training
    assert {k: id(p) for k, p in model.named_parameters()} == {
        k: id(p) for k, p in parameters.items()
    }
    seen.clear()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert len(seen) == 1  # the hook came along
    with pytest.raises(ValueError, match="found nothing to replace; no other layer of it looks"):
        deformnd.convert(model)


def test_convert_refuses():
    module = "ops_dcnv3.modules.dcnv3"
    for change, message in (
        (lambda m: setattr(m, "stride", 2), "stride is 2, expected 1"),
        (lambda m: delattr(m, "pad"), "has no pad, expected a DCNv3 as OpenGVLab's"),
        (lambda m: setattr(m, "pad", 0), "pad is 0, expected 1"),
        (lambda m: setattr(m, "gate", nn.Linear(1, 1)), r"has other parts .* \['gate', 'gate.bias"),
        (lambda m: setattr(m, "drop", nn.Dropout()), r"has other parts .* \['drop'\]"),
        (lambda m: delattr(m, "mask"), "has no mask, expected a DCNv3 as Op"),
    ):
        layer = stand_in(DCNv3, module)
        change(layer)
        with pytest.raises(ValueError, match=f"convert: DCNv3 '0'.* ?{message}"):
            deformnd.convert(nn.Sequential(layer))

    class Mine(DCNv3):  # by whatever name
        pass

    Mine.__name__, Mine.__module__ = "DCNv3", module
    with pytest.raises(ValueError, match="found nothing to replace; no other layer of it looks"):
        deformnd.convert(nn.Sequential(Mine(C, group=G)))


@pytest.mark.parametrize("kind", [DCNv3, DCNv4])
@pytest.mark.parametrize("theirs", [False, True])
def test_watch_offsets(kind, theirs):
    layer, x = awake(kind, offset_scale=2.0, remove_center=True)
    predictor = layer.offset if kind is DCNv3 else layer.offset_mask
    nn.init.zeros_(predictor.weight)
    both = torch.full((G, 3, 8), 30.0)
    both[:, 2] = 1e6  # of DCNv4 the masks
    with torch.no_grad():
        predictor.bias.fill_(1e6)[: 72 if kind is DCNv4 else 48] = (
            both.flatten() if kind is DCNv4 else 30.0
        )
    if theirs:
        original = stand_in(kind, f"x.{kind.__name__}", offset_scale=2.0, remove_center=True)
        original._modules.update(layer._modules)
        layer = original
    with deformnd.watch_offsets(nn.Sequential(layer), every=1):
        with pytest.warns(RuntimeWarning, match="of 0 is 60 pixels, above 50"):
            predictor(x) if theirs else layer(x)  # a stand-in calls none of its parts


def test_names():
    assert internimage.DCNv3_pytorch is DCNv3 and deformnd.compat.internimage is internimage
