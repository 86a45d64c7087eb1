"""The counters of other packages: the layers count as the ordinary convolutions that they are."""

import math

import pytest
from torch import nn

import deformnd
from deformnd.compat import counters
from test_modules import inputs, layer

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


def test_a_subclass_defined_by_then_is_counted():
    class Mine(deformnd.PackedDeformConv2d):
        pass

    for known in (counters.thop(), counters.ptflops()):
        assert Mine in known and deformnd.compat.mmcv.DeformConv2d in known
