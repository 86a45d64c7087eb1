"""Counters and pruners of other packages take the layers as convolutions."""

import copy
import importlib
import math

import pytest
import torch
from torch import nn

import deformnd
from deformnd.compat import counters
from deformnd.compat.torch_pruning import with_packed
from test_modules import inputs, layer, wake

RANKS = [1, 2, 3]
FAMILIES = [False, True]


class Twice(nn.Module):
    """Three layers, of which one predicts with a norm and is called twice."""

    def __init__(self, n, transposed, bias=True, norm=True):
        super().__init__()
        options = {"modulated": True, "mask_activation": None}  # which would be counted, too
        self.packed = layer(n, transposed, True, bias=bias, **options)
        generator = self.packed.mask_generator
        norm = getattr(nn, f"BatchNorm{n}d")(generator.out_channels) if norm else nn.Identity()
        self.packed.mask_generator = nn.Sequential(generator, norm)
        self.back = layer(n, transposed, False, groups=2, bias=bias)
        self.plain = getattr(nn, f"Conv{n}d")(6, 4, 1, bias=False)

    def forward(self, x):
        n = self.packed.rank
        offset = x.new_zeros(len(x), n * 3**n, *x.shape[2:])
        for _ in range(2):
            x = self.plain(self.packed(x))
        return self.back(x, offset)

    def products(self, x):
        positions = len(x) * math.prod(x.shape[2:])
        weights = [self.packed.weight, self.packed.offset_generator.weight, self.plain.weight]
        weights += [self.packed.mask_generator[0].weight]
        return positions * (2 * sum(w.numel() for w in weights) + self.back.weight.numel())


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("transposed", FAMILIES)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_fvcore(n, transposed):
    fvcore = pytest.importorskip("fvcore.nn")
    model, x = Twice(n, transposed).eval(), inputs(n)[0]
    count = fvcore.FlopCountAnalysis(model, x).set_op_handle(**counters.fvcore())
    by_operator = count.by_operator()
    norms = by_operator.pop("batch_norm")
    assert norms > 0 and sum(by_operator.values()) == model.products(x)
    assert not [name for name in count.unsupported_ops() if "deform" in name]


class Aggregate(nn.Module):
    def forward(self, x):
        n = x.dim() - 2
        offset = x.new_zeros(len(x), n * 3**n, *x.shape[2:])
        return getattr(deformnd, f"deform_aggregate{n}d")(x, offset, None, 3, padding=1)


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_fvcore_of_an_aggregation(n):
    fvcore = pytest.importorskip("fvcore.nn")
    x = inputs(n)[0]
    count = fvcore.FlopCountAnalysis(Aggregate(), x).set_op_handle(**counters.fvcore())
    assert count.total() == x.numel() * 3**n
    assert not [name for name in count.unsupported_ops() if "deform" in name]


@pytest.mark.parametrize("n", RANKS)
def test_ptflops_of_an_aggregation(n):
    ptflops = pytest.importorskip("ptflops")
    x = inputs(n)[0][:1]
    macs, _ = ptflops.get_model_complexity_info(
        Aggregate(),
        tuple(x.shape[1:]),
        backend="aten",
        as_strings=False,
        print_per_layer_stat=False,
        custom_modules_hooks=counters.ptflops(),
    )
    assert macs == x.numel() * 3**n


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("transposed", FAMILIES)
@pytest.mark.filterwarnings("ignore:.*ersion class:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The distutils:DeprecationWarning")
def test_thop(n, transposed):
    thop = pytest.importorskip("thop")
    model, x = Twice(n, transposed).eval(), inputs(n)[0]
    macs, parameters = thop.profile(model, (x,), custom_ops=counters.thop(), verbose=False)
    mask = 2 * x.shape[0] * 3**n * math.prod(x.shape[2:])
    norms = 4 * mask  # thop's count: twice, of a norm with weights, in each call
    assert macs == model.products(x) + norms
    assert parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("transposed", FAMILIES)
@pytest.mark.parametrize("backend", ["pytorch", "aten"])
def test_ptflops(n, transposed, backend):
    ptflops = pytest.importorskip("ptflops")
    x = inputs(n)[0][:1]
    for bias in (False, True):
        model = Twice(n, transposed, bias, norm=False).eval()
        macs, _ = ptflops.get_model_complexity_info(
            model,
            tuple(x.shape[1:]),
            backend=backend,
            as_strings=False,
            print_per_layer_stat=False,
            custom_modules_hooks=counters.ptflops(),
        )
        biases = (2 * 6 + 6) * math.prod(x.shape[2:]) if bias and backend == "pytorch" else 0
        assert macs == model.products(x) + biases


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.filterwarnings("ignore:.*ersion class:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The distutils:DeprecationWarning")
def test_packed_aggregations(n):
    x = inputs(n)[0][:1]
    options = {"padding": 1, "offset_groups": 2, "mask_activation": None}
    model = nn.Sequential(getattr(deformnd, f"PackedDeformAggregate{n}d")(4, 3, **options))
    predictors = sum(p.numel() for p in model.parameters())
    expected = math.prod(x.shape[2:]) * (predictors + 4 * 3**n)
    rules = counters.thop()
    assert type(model[0]) in rules and type(model[0]) in counters.ptflops()
    ran = False
    for package in ("thop", "ptflops"):
        try:
            module = importlib.import_module(package)
        except ImportError:
            continue
        ran = True
        if package == "thop":
            macs = module.profile(copy.deepcopy(model), (x,), custom_ops=rules, verbose=False)[0]
        else:
            macs, _ = module.get_model_complexity_info(
                model,
                tuple(x.shape[1:]),
                as_strings=False,
                print_per_layer_stat=False,
                custom_modules_hooks=counters.ptflops(),
            )
        assert macs == expected
    if not ran:
        pytest.skip("neither thop nor ptflops is installed")


def test_a_subclass_defined_by_then_is_counted():
    class Mine(deformnd.PackedDeformConv2d):
        pass

    for known in (counters.thop(), counters.ptflops()):
        assert Mine in known and deformnd.compat.mmcv.DeformConv2d in known


# Torch-Pruning


@pytest.mark.parametrize("modulated", FAMILIES)
@pytest.mark.parametrize("name", ["PackedDeformConv2d", "PackedDeformConvTranspose2d"])
def test_torch_pruning(modulated, name):
    tp = pytest.importorskip("torch_pruning")
    kind = getattr(deformnd, name)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        kind(8, 6, 3, padding=1, modulated=modulated),
        nn.BatchNorm2d(6),
        kind(6, 8, 3, padding=1, modulated=modulated),
        nn.Conv2d(8, 8, 3),
    ).eval()
    for packed in (net[1], net[3]):
        wake(packed)
    x = torch.rand(1, 3, 16, 16)
    kept = copy.deepcopy(net)
    pruner = tp.pruner.MagnitudePruner(
        net,
        x,
        importance=tp.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        **with_packed(net, [net[4]]),
    )
    pruner.step()
    assert [net[i].in_channels for i in (0, 1, 3, 4)] == [3, 4, 3, 4]
    assert net[4].out_channels == 8
    for packed in (net[1], net[3]):
        assert packed.offset_generator.in_channels == packed.in_channels
        assert packed.offset_generator.out_channels == 18
    # What is left computes what the whole did with the rest at zero.
    with torch.no_grad():
        gone = [not any(torch.equal(a, b) for b in net[0].weight) for a in kept[0].weight]
        kept[0].weight[gone], kept[0].bias[gone] = 0, 0
        first = kept[1](kept[0](x))
        middle = [i for i in range(6) if any(torch.equal(kept[1].bias[i], b) for b in net[1].bias)]
        torch.testing.assert_close(net[1](net[0](x)), first[:, middle], rtol=1e-4, atol=1e-5)
    net(x).sum().backward()


def test_torch_pruning_of_no_model():
    with pytest.raises(TypeError, match=r"^with_packed: model is a NoneType, expected a Module"):
        with_packed(None)


def test_torch_pruning_refuses_groups():
    pytest.importorskip("torch_pruning")
    for options in ({"groups": 2}, {"offset_groups": 2}, {"mask_groups": 2}):
        (key,) = options
        net = nn.Sequential(deformnd.PackedDeformConv2d(4, 4, 3, modulated=True, **options))
        with pytest.raises(ValueError, match=f"with_packed: '0' has {key} 2, expected 1"):
            with_packed(net)
