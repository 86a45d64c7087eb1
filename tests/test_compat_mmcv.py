"""mmcv's names, and mmcv itself on deformnd's kernels."""

import importlib
import importlib.util
import sys
import types

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.profiler import profile

import deformnd
from deformnd import compat
from deformnd.compat import mmcv, mmcv_kernels
from deformnd.compat.mmcv import accelerate
from deformnd.kernels import library

LAYERS = ["DeformConv2d", "DeformConv2dPack", "ModulatedDeformConv2d", "ModulatedDeformConv2dPack"]


def arguments(groups=2, dtype=torch.float32):
    """Input, offset, mask, weight and bias of a call of stride (2, 1), padding 1 and 2 groups."""
    torch.manual_seed(0)
    shapes = [(2, 4, 9, 8), (2, 18 * groups, 5, 8), (2, 9 * groups, 5, 8), (6, 2, 3, 3), (6,)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def gradients(y, tensors):
    grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, tensors, grad)]


# deformnd.compat.mmcv, without mmcv


def test_deform_groups_is_checked():
    x, offset, mask, weight, bias = arguments()
    sizes = ((2, 1), 1, 1, 2)
    expected = deformnd.deform_conv2d(x, weight, offset, mask, bias, *sizes)
    assert torch.equal(
        mmcv.modulated_deform_conv2d(x, offset, mask, weight, bias, *sizes, 2), expected
    )
    expected = deformnd.deform_conv2d(x, weight, offset, None, None, *sizes)
    assert torch.equal(mmcv.deform_conv2d(x, offset, weight, *sizes, 2), expected)

    plain = mmcv.DeformConv2d(4, 6, 3, (2, 1), 1, groups=2, deform_groups=4)
    modulated = mmcv.ModulatedDeformConv2d(4, 6, 3, (2, 1), 1, groups=2)
    wrong = r"offset has 36 channels, expected 18 \(deform_groups 1 x 2 axes x 9 kernel points\)"
    for call, message in (
        (lambda: mmcv.deform_conv2d(x, offset, weight, *sizes), f"^deform_conv2d: {wrong}"),
        (
            lambda: mmcv.modulated_deform_conv2d(x, offset, mask, weight, bias, *sizes),
            f"^modulated_deform_conv2d: {wrong}",
        ),
        (
            lambda: mmcv.modulated_deform_conv2d(x, offset, mask[:, :9], weight, bias, *sizes, 2),
            r"mask has 9 channels, expected 18 \(deform_groups 2 x 9",
        ),
        (lambda: plain(x, offset), "DeformConv2d: offset has 36 channels, expected 72"),
        (lambda: modulated(x, offset, mask), wrong),
        (lambda: mmcv.deform_conv2d(x, offset, weight, *sizes, 0), "deform_groups is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="deform_groups is two, expected an int"):
        mmcv.deform_conv2d(x, offset, weight, *sizes, "two")


@pytest.mark.parametrize("name", LAYERS)
def test_deform_groups_of_a_layer(name):
    for value, error in ((0, ValueError), (-1, ValueError), ("a", TypeError), (None, TypeError)):
        with pytest.raises(error, match=f"^{name}: deform_groups is {value!r}, expected an int"):
            getattr(mmcv, name)(4, 6, 3, deform_groups=value)


@pytest.mark.parametrize("name", LAYERS)
def test_deformable_groups(name):
    kind = getattr(mmcv, name)
    with pytest.warns(DeprecationWarning, match=f"{name}: deformable_groups is deprecated"):
        layer = kind(4, 6, 3, deformable_groups=2)
    assert layer.deform_groups == 2
    with pytest.raises(TypeError, match=f"{name}: deformable_groups is deform_groups"):
        kind(4, 6, 3, deformable_groups=2, deform_groups=2)


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_scripted_and_traced():
    x, offset, mask, weight, bias = (t.detach() for t in arguments())
    for name in LAYERS:
        layer = getattr(mmcv, name)(4, 6, 3, (2, 1), 1, groups=2, deform_groups=2)
        if name.endswith("Pack"):
            nn.init.normal_(layer.offset_generator.weight)
        args = (x, offset, mask)[: 1 if name.endswith("Pack") else 3 if "Mod" in name else 2]
        expected = layer(*args)
        for made in (
            torch.jit.script(layer),
            torch.jit.trace(layer.requires_grad_(False), args),
            fx.symbolic_trace(layer),
            torch.compile(layer, backend="eager", fullgraph=True),
        ):
            torch.testing.assert_close(made(*args), expected)

    def plain(x, o, w):
        groups = x.shape[1] // w.shape[1]
        return mmcv.deform_conv2d(x, o, w, (2, 1), w.shape[2] // 2, 1, groups, groups)

    def modulated(x, o, m, w, b):
        groups = x.shape[1] // w.shape[1]
        return mmcv.modulated_deform_conv2d(
            x, o, m, w, b, (2, 1), w.shape[2] // 2, 1, groups, groups
        )

    for function, call, args in (
        (mmcv.deform_conv2d, plain, (x, offset, weight)),
        (mmcv.modulated_deform_conv2d, modulated, (x, offset, mask, weight, bias)),
    ):
        expected = call(*args)
        assert torch.equal(torch.jit.trace(call, args)(*args), expected)
        assert torch.equal(fx.symbolic_trace(call)(*args), expected)
        scripted = torch.jit.script(function)
        got = scripted(*args, stride=(2, 1), padding=1, groups=2, deform_groups=2)
        assert torch.equal(got, expected)


def test_a_larger_offset_is_read_from_its_beginning(monkeypatch):
    """As DyHead has it: the offset of one level for the convolution of the next, smaller one."""
    monkeypatch.setattr(compat, "_warned", False)
    x, weight = torch.randn(2, 4, 4, 4), torch.randn(6, 4, 3, 3)
    both = torch.randn(2, 27, 8, 8)
    offset, mask = both[:, :18], both[:, 18:].sigmoid()
    with pytest.warns(UserWarning, match=r"of \(8, 8\) for an output of \(4, 4\)"):
        got = mmcv.modulated_deform_conv2d(x, offset, mask, weight, None, 1, 1)
    first = [t.reshape(2, -1)[:, : t.shape[1] * 16].view(2, -1, 4, 4) for t in (offset, mask)]
    assert torch.equal(got, deformnd.deform_conv2d(x, weight, *first, padding=1))
    layer = mmcv.ModulatedDeformConv2d(4, 6, 3, padding=1, bias=False)
    layer.weight.data = weight
    assert torch.equal(layer(x, offset, mask), got)  # and without a second warning


def test_deform_sampling_of_tood():
    """A 1x1 depthwise convolution of ones, with a group of offsets for each channel."""
    x, offset = torch.rand(2, 4, 6, 7), torch.rand(2, 8, 6, 7)
    got = mmcv.deform_conv2d(x, offset, torch.ones(4, 1, 1, 1), 1, 0, 1, 4, 4)
    y, z = torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")
    for c in range(4):
        at = torch.stack((z + offset[:, 2 * c + 1], y + offset[:, 2 * c]), -1)
        grid = 2 * at / torch.tensor([6.0, 5.0]) - 1
        expected = F.grid_sample(x[:, c : c + 1], grid, align_corners=True)
        torch.testing.assert_close(got[:, c : c + 1], expected, rtol=1e-5, atol=1e-5)


# accelerate(), with mmcv or mmcv-lite


def test_without_mmcv(monkeypatch):
    monkeypatch.setitem(sys.modules, "mmcv", None)
    with pytest.raises(ImportError, match="mmcv is not installed, expected mmcv or mmcv-lite"):
        accelerate()


@pytest.fixture
def theirs():
    """mmcv's package, without its operators in sys.modules before or after."""
    package = pytest.importorskip("mmcv")
    pytest.importorskip("mmengine")
    yield package
    assert accelerate._uses == 0


def counted(call):
    """The result, and how often deformnd's kernels ran."""
    with profile() as p:
        result = call()
    return result, sum(e.name == "deformnd::deform_conv" for e in p.events())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Failed to import:UserWarning")
def test_functions_of_mmcv(theirs):
    with accelerate() as handle:
        assert list(handle.devices) == [key.lower() for key in library.compiled_keys()]
        from mmcv.ops import deform_conv2d, modulated_deform_conv2d

        for dtype in (torch.float32, torch.float64):
            x, offset, mask, weight, bias = arguments(dtype=dtype)
            sizes = ((2, 1), (1, 1), (1, 1), 2)
            got, count = counted(lambda: deform_conv2d(x, offset, weight, *sizes, 2))  # noqa: B023
            wanted = deformnd.deform_conv2d(x, weight, offset, None, None, *sizes)
            assert count == 1
            for a, b in zip(
                gradients(got, (x, offset, weight)),
                gradients(wanted, (x, offset, weight)),
                strict=True,
            ):
                torch.testing.assert_close(a, b)
            for b in (bias, None):
                tensors = [t for t in (x, offset, mask, weight, b) if t is not None]
                got = modulated_deform_conv2d(x, offset, mask, weight, b, *sizes, 2)
                wanted = deformnd.deform_conv2d(x, weight, offset, mask, b, *sizes)
                for s, t in zip(gradients(got, tensors), gradients(wanted, tensors), strict=True):
                    torch.testing.assert_close(s, t)
        with pytest.raises(ValueError, match=r"deform_conv2d: offset has 36 .* expected 18"):
            deform_conv2d(x, offset, weight, *sizes, 1)
        with pytest.raises(ValueError, match=r"modulated_deform_conv2d: offset has 36 .* 18"):
            modulated_deform_conv2d(x, offset, mask, weight, bias, *sizes, 1)
        with torch.autocast("cpu", dtype=torch.bfloat16):  # mmcv's dtype, not autocast's
            again = modulated_deform_conv2d(x, offset, mask, weight, bias, *sizes, 2)
        assert again.dtype == torch.float64


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_mmcv(theirs, name):
    """mmcv's own layers, names and checkpoints, against deformnd.compat.mmcv's."""
    x, offset, mask, _, _ = arguments()
    with accelerate():
        ops = importlib.import_module("mmcv.ops")
        layer = getattr(ops, name)(4, 6, 3, (2, 1), 1, groups=2, deform_groups=2)
        if name.endswith("Pack"):
            nn.init.normal_(layer.conv_offset.weight)
        args = (x, offset, mask)[: 1 if name.endswith("Pack") else 3 if "Mod" in name else 2]
        got = layer(*args)
        converted = deformnd.convert(layer, inplace=False, verbose=False)
        torch.testing.assert_close(converted(*args), got, rtol=1e-4, atol=1e-4)
    ours = getattr(mmcv, name)(4, 6, 3, (2, 1), 1, groups=2, deform_groups=2)
    ours.load_state_dict(layer.state_dict())
    torch.testing.assert_close(got, ours(*args), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:deformnd.compat.mmcv. an offset or mask of")
def test_a_larger_offset_of_mmcv(theirs):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 4, 4, 4), torch.randn(6, 4, 3, 3)
    leaves = [torch.randn(2, 27, 8, 8, requires_grad=True) for _ in range(2)]
    with accelerate():
        from mmcv.ops import modulated_deform_conv2d

        results = []
        for function, both in ((modulated_deform_conv2d, leaves[0]), (None, leaves[1])):
            both.data = leaves[0].data
            function = function or mmcv.modulated_deform_conv2d
            y = function(x, both[:, :18], both[:, 18:].sigmoid(), weight, None, 1, 1)
            results.append(gradients(y, [both]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_registry_of_mmcv_and_undone(theirs):
    from mmcv.cnn import build_conv_layer

    lite = importlib.util.find_spec("mmcv._ext") is None

    def build(kind="DCNv2"):
        return build_conv_layer(dict(type=kind), 3, 4, kernel_size=3, padding=1)

    def nothing_is_left():
        assert not hasattr(theirs, "ops")
        assert not [k for k in sys.modules if k.startswith(("mmcv.ops", "mmcv._ext"))]
        with pytest.raises(KeyError):
            build()
        with pytest.raises(ModuleNotFoundError, match=r"mmcv\._ext"):
            importlib.import_module("mmcv.ops")

    x = torch.rand(1, 3, 8, 8)
    if lite:
        nothing_is_left()
    first = accelerate()
    with pytest.raises(ZeroDivisionError), accelerate() as second:
        first.undo()
        first.undo()
        layer = build()
        kind = type(layer)
        assert kind.__module__ == "mmcv.ops.modulated_deform_conv"
        assert type(build("DCN")).__name__ == "DeformConv2dPack"
        for t in (layer, build("DCN")):
            assert counted(lambda t=t: t(x))[1] == 1
        # A fresh pack is half the plain convolution: its mask is sigmoid(0).
        plain = F.conv2d(x, layer.weight, padding=1) / 2
        torch.testing.assert_close(layer(x), plain + layer.bias.view(-1, 1, 1))
        if lite:
            from mmcv.ops import nms

            with pytest.raises(NotImplementedError, match=r"operator nms is not there; .* alone"):
                nms(torch.rand(2, 4), torch.rand(2), 0.5)
        raise ZeroDivisionError
    second.undo()
    assert accelerate._uses == 0 and accelerate._undo is None
    if lite:
        nothing_is_left()
        with pytest.raises(NotImplementedError, match=r"modulated_deform_conv_forward is not ther"):
            layer(x)
    with accelerate():
        assert type(build()) is kind  # what was built before works again
        layer(x)


def test_compiled_operators_of_mmcv_come_back(theirs, monkeypatch):
    """A compiled module keeps its functions for other devices and after the block."""
    if importlib.util.find_spec("mmcv._ext") is not None:
        compiled = importlib.import_module("mmcv._ext")
    else:
        compiled, called = types.ModuleType("mmcv._ext"), []
        for name in mmcv_kernels._FUNCTIONS:
            setattr(compiled, name, lambda *args, name=name, **sizes: called.append(name))
        monkeypatch.setitem(sys.modules, "mmcv._ext", compiled)
        monkeypatch.setitem(sys.modules, "mmcv.ops", types.ModuleType("mmcv.ops"))
        file = types.ModuleType("mmcv.ops.multi_scale_deform_attn")
        file.multi_scale_deformable_attn_pytorch = lambda value: value
        monkeypatch.setitem(sys.modules, file.__name__, file)
    before = dict(vars(compiled))
    if not library.compiled_keys():
        with pytest.raises(RuntimeError, match="without its compiled kernels"):
            accelerate()
        return
    with accelerate():
        for name in mmcv_kernels._FUNCTIONS:
            assert getattr(compiled, name) is not before[name]
        if "__file__" not in before:
            meta = torch.empty(1, device="meta")
            compiled.deform_conv_forward(meta)
            assert called == ["deform_conv_forward"]
            with pytest.raises(TypeError):  # ours, which asks for more
                compiled.deform_conv_forward(torch.empty(1))
    assert dict(vars(compiled)) == before


SIZES = [(6, 5), (3, 4)]


def attention():
    torch.manual_seed(0)
    shapes = [(2, 42, 2, 4), (2, 3, 2, 2, 4, 2), (2, 3, 2, 2, 4)]
    value, at, weight = (torch.rand(shape).requires_grad_() for shape in shapes)
    return [value, torch.tensor(SIZES), torch.tensor([0, 30]), at, weight]


@pytest.mark.filterwarnings("ignore:You'd better set embed_dims:UserWarning")
def test_attention_of_mmcv(theirs):
    """In mmcv's own layer, checkpoints both ways; afterwards it runs as before."""
    torch.manual_seed(0)
    query, points = torch.rand(42, 2, 24), torch.rand(2, 42, 2, 4)
    inputs = {"reference_points": points, "spatial_shapes": torch.tensor(SIZES)}
    inputs["key_padding_mask"] = torch.rand(2, 42) < 0.3

    def runs(call):
        with profile() as p:
            result = call()
        return result, sum(e.name == "deformnd::deform_attention" for e in p.events())

    compiled = bool(library.compiled_keys())
    with accelerate():
        from mmcv.ops import MultiScaleDeformableAttention

        layer = MultiScaleDeformableAttention(24, 4, 2, 3, value_proj_ratio=0.5).eval()
        for p in layer.parameters():
            nn.init.normal_(p, std=0.3)
        got, count = runs(lambda: layer(query, **inputs))
        assert count == compiled
        function = sys.modules[layer.__module__].multi_scale_deformable_attn_pytorch
        args = attention()
        both = [gradients(function(*args[:2], *args[3:]), [args[i] for i in (0, 3, 4)])]
    wanted, count = runs(lambda: layer(query, **inputs))
    assert count == 0
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    both.append(gradients(function(*args[:2], *args[3:]), [args[i] for i in (0, 3, 4)]))
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    ours = mmcv.MultiScaleDeformableAttention(24, 4, 2, 3, value_proj_ratio=0.5).eval()
    ours.load_state_dict(layer.state_dict())
    layer.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(query, **inputs), wanted, rtol=1e-5, atol=1e-5)
    converted = deformnd.convert(layer, check={"query": query, **inputs}, verbose=False)
    assert type(converted) is mmcv.MultiScaleDeformableAttention
    assert converted.value_proj is layer.value_proj
    torch.testing.assert_close(converted(query, **inputs), wanted, rtol=1e-5, atol=1e-5)


def test_compiled_attention_of_mmcv():
    """What stands in for mmcv's compiled functions, as mmcv's Function calls them."""
    value, sizes, start, at, weight = attention()
    functions = mmcv_kernels._FUNCTIONS
    args = (value, sizes, start, at, weight)
    got = functions["ms_deform_attn_forward"](*args, im2col_step=64)
    wanted = gradients(deformnd.deform_attention(value, SIZES, at, weight), [value, at, weight])
    torch.testing.assert_close(got, wanted[0])
    grad = torch.linspace(-1, 1, got.numel()).view(got.shape)
    into = [torch.full_like(t, torch.nan) for t in (value, at, weight)]
    with torch.no_grad():
        functions["ms_deform_attn_backward"](*args, grad, *into, im2col_step=64)
    for a, b in zip(into, wanted[1:], strict=True):
        torch.testing.assert_close(a, b)
