"""What PyTorch does with nn.Conv2d it does with these operators: a test for each row of the
table in docs/pytorch.md that test_library.py has not."""

import copy
import dataclasses
import io
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.export import Dim
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.utils import parametrizations, parametrize
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import deformnd
from cases import ALL, CASES, Case, aggregate, gradients, relative_error, requires_grad
from deformnd.kernels import cpu
from test_library import SMALL, Aggregation, arguments, network
from test_modules import inputs, layer, wake

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
FAMILIES = [False, True]
# One of each rank and family, float32 on a GPU.
SIX = [CASES[i] for i in (1, 5, 13)]
SIX += [CASES[CASES.index(c) + len(CASES) // 2] for c in SIX]
TWO = [SIX[1], SIX[4]]
AGGREGATED = aggregate((6, 7), (3, 3), 6, padding=1, offset_groups=2, mask_groups=2)


@pytest.fixture(autouse=True)
def exact_float32():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def function(case):
    """The call as a function of its given tensors, and these."""
    tensors = case.tensors()
    names = [name for name, t in tensors.items() if t is not None]

    def call(*args):
        return case.call({**dict.fromkeys(tensors), **dict(zip(names, args, strict=True))})

    return call, [tensors[name] for name in names]


# Forward mode


@pytest.mark.parametrize("case", [c for c in ALL if c.batch], ids=str)
def test_forward_mode_is_the_adjoint_of_backward(case):
    call, args = function(case)
    along = [torch.randn_like(t) for t in args]
    output, tangent = jvp(call, tuple(args), tuple(along))
    assert torch.equal(output, call(*args))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, d) for t, d in zip(args, along, strict=True)]
        assert torch.equal(forward_ad.unpack_dual(call(*duals)).tangent, tangent)
    cotangent = torch.randn_like(output)
    leaves = [t.requires_grad_() for t in args]
    grads = torch.autograd.grad(call(*leaves), leaves, cotangent)
    products = sum((g * d).sum() for g, d in zip(grads, along, strict=True))
    torch.testing.assert_close((cotangent * tangent).sum(), products)
    # One at a time, and through vmap.
    total = torch.zeros_like(output)
    for i in range(len(args)):
        total += jvp(lambda t, i=i: call(*args[:i], t, *args[i + 1 :]), (args[i],), (along[i],))[1]
    torch.testing.assert_close(total, tangent)
    both = [torch.stack([d, 2 * d]) for d in along]
    mapped = vmap(lambda *d: jvp(call, tuple(args), d)[1])(*both)
    torch.testing.assert_close(mapped, torch.stack([tangent, 2 * tangent]))


@pytest.mark.parametrize(
    "case",
    [
        Case((2, 2), (2, 2), batch=1, channels=(2, 2), mask_groups=2),
        Case((2, 2), (2, 2), True, batch=1, channels=(2, 2), mask_groups=2),
        aggregate((2, 2), (2, 2), 2, batch=1, mask_groups=2),
    ],
    ids=lambda case: case.family,
)
def test_second_derivatives_of_torch_func_agree(case):
    call, args = function(case)
    every = tuple(range(len(args)))

    def loss(*args):
        return call(*args).sin().sum()

    expected = jacrev(jacrev(loss, every), every)(*args)
    for nested in (
        hessian(loss, every),
        jacfwd(jacfwd(loss, every), every),
        jacrev(jacfwd(loss, every), every),
    ):
        torch.testing.assert_close(nested(*args), expected)
    torch.testing.assert_close(jacfwd(call, every)(*args), jacrev(call, every)(*args))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [*SIX, AGGREGATED], ids=str)
def test_forward_mode_and_second_derivatives_in_low_precision(case, dtype, device):
    """Both go through the device's kernels, in float32."""

    def run(dtype, device):
        tensors = case.tensors(dtype, device=device)
        names = [name for name, t in tensors.items() if t is not None]
        # What half cannot hold would be another input.
        args = [case.tensors(torch.bfloat16)[name].to(device, dtype) for name in names]
        along = [case.tensors(torch.bfloat16, seed=1)[name].to(device, dtype) for name in names]

        def call(*args):
            return case.call({**dict.fromkeys(tensors), **dict(zip(names, args, strict=True))})

        tangent = jvp(call, tuple(args), tuple(along))[1]
        leaves = [t.requires_grad_() for t in args]
        grads = torch.autograd.grad(call(*leaves).sum(), leaves[:-1], create_graph=True)
        product = sum((g * d).sum() for g, d in zip(grads, along, strict=False))
        return [tangent, *torch.autograd.grad(product, leaves[:-1])]

    limit = 1e-5 if dtype == torch.float32 else 2e-2
    for got, expected in zip(run(dtype, device), run(torch.float64, "cpu"), strict=True):
        assert got.dtype == dtype
        assert relative_error(got.cpu(), expected) < limit


def test_forward_mode_at_odd_positions():
    """At whole positions the cell is [floor, floor + 1), as in reverse mode; NaN moves nothing."""
    x, w = torch.randn(1, 1, 4).double(), torch.ones(1, 1, 1).double()
    offset = torch.tensor([[[-1.0, 0.0, 2.0, float("nan")]]]).double()

    def call(offset):
        return deformnd.deform_conv1d(x, w, offset)

    tangent = jvp(call, (offset,), (torch.ones_like(offset),))[1]
    positions = torch.tensor([-1, 1, 4])
    padded = torch.nn.functional.pad(x[0, 0], (1, 2))
    expected = padded[positions + 2] - padded[positions + 1]
    torch.testing.assert_close(tangent[0, 0, :3], expected)
    assert tangent[0, 0, 3] == 0
    # This offset would vanish in float32 if it were added to its position.
    offset = torch.full((1, 1, 4), -1e-9)
    x, w = x.float(), w.float()
    tangent = jvp(lambda o: deformnd.deform_conv1d(x, w, o), (offset,), (torch.ones(1, 1, 4),))[1]
    offset.requires_grad_()
    (reverse,) = torch.autograd.grad(deformnd.deform_conv1d(x, w, offset).sum(), offset)
    torch.testing.assert_close(tangent, reverse)


def test_per_sample_gradients_of_a_network():
    model = network().double()
    parameters = dict(model.named_parameters())
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)

    def loss(parameters, sample):
        return functional_call(model, parameters, (sample[None],)).pow(2).sum()

    mapped = vmap(grad(loss), (None, 0))(parameters, x)
    for i, sample in enumerate(x):
        for name, expected in grad(loss)(parameters, sample).items():
            torch.testing.assert_close(mapped[name][i], expected)


# Counting and looking


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("transposed", FAMILIES)
def test_flop_counter_counts_the_products_of_the_convolution(n, transposed):
    plain = getattr(nn, f"ConvTranspose{n}d" if transposed else f"Conv{n}d")
    x, offset, _ = inputs(n)
    x.requires_grad_()

    def count(module, *args):
        with FlopCounterMode(display=False) as counter:
            module(*args).sum().backward()
        return counter.get_total_flops()

    assert count(layer(n, transposed), x, offset) == count(plain(4, 6, 3, padding=1), x) > 0


@pytest.mark.parametrize("n", [1, 2, 3])
def test_flop_counter_counts_the_products_of_the_aggregation(n):
    """Those of a depthwise convolution, in each of the two passes."""
    tensors = aggregate((5, 4, 3)[:n], (3,) * n, 4, padding=1).tensors()
    x = tensors["input"]
    with FlopCounterMode(display=False) as counter:
        y = getattr(deformnd, f"deform_aggregate{n}d")(
            **requires_grad(tensors), kernel_size=3, padding=1
        )
    assert counter.get_total_flops() == 2 * x.numel() * 3**n
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * x.numel() * 3**n


@pytest.mark.parametrize("n", [2, 3])
def test_channels_last_is_not_copied_for_aggregation(n):
    if not deformnd.has_ops():
        pytest.skip("the C++ core is not built, and the reference does copy")
    case = aggregate((5, 4, 3)[:n], (3,) * n, 4, padding=1, offset_groups=2)
    tensors = requires_grad(case.tensors(torch.float32))
    last = {2: torch.channels_last, 3: torch.channels_last_3d}[n]
    tensors["input"] = tensors["input"].detach().to(memory_format=last).requires_grad_()
    grad_output = torch.randn_like(case.call(tensors))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        output = case.call(tensors)
        grads = gradients(output, tensors, grad_output)
    assert output.is_contiguous(memory_format=last)
    assert grads["input"].is_contiguous(memory_format=last)
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts["deformnd::deform_aggregate"] and counts["deformnd::deform_aggregate_backward"]
    assert not {"aten::copy_", "aten::clone", "aten::contiguous"} & set(counts)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("transposed", FAMILIES)
def test_channels_last_is_not_copied(n, transposed, device):
    """The profiler sees the operators by name, and none of torch's copies beside them."""
    if device == "cpu" and not deformnd.has_ops():
        pytest.skip("the C++ core is not built, and the reference does copy")
    module = layer(n, transposed).to(device)
    x, offset, mask = (t.to(device) for t in inputs(n))
    last = {2: torch.channels_last, 3: torch.channels_last_3d}[n]
    x = x.to(memory_format=last).requires_grad_()
    grad_output = torch.randn_like(module(x, offset, mask))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        output = module(x, offset, mask)
        grads = torch.autograd.grad(output, [x, module.weight], grad_output)
    assert output.is_contiguous(memory_format=last)
    assert grads[0].is_contiguous(memory_format=last)
    counts = {event.key: event.count for event in profiler.key_averages()}
    name = "deformnd::deform_conv_transpose" if transposed else "deformnd::deform_conv"
    assert counts[name] and counts[name + "_backward"]
    assert not {"aten::copy_", "aten::clone", "aten::contiguous"} & set(counts)


def test_threads_are_torchs(monkeypatch):
    if not cpu.available():
        pytest.skip("the C++ core is not built")
    seen = []
    monkeypatch.setattr(cpu, "_run", lambda words: seen.append(words) or 0)
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            CASES[4].call(CASES[4].tensors())
    finally:
        torch.set_num_threads(before)
    assert [int.from_bytes(words[16:24], sys.byteorder) for words in seen] == [1, 3]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SIX, ids=str)
def test_deterministic(case, device):
    """Runs are bitwise equal. On the CPU they are without the switch, too, with equal threads."""
    # Large enough for several threads.
    big = dataclasses.replace(case, size={1: (20000,), 2: (110, 110), 3: (24, 24, 24)}[case.n])
    tensors = requires_grad(big.tensors(torch.float32, device=device))
    output = big.call(tensors)
    grad_output = torch.randn_like(output)
    runs = {}
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(device == "cuda")
    try:
        for count in (1, 2, 3, 2, 1, 3):
            torch.set_num_threads(count)
            output = big.call(tensors)
            run = [output, *gradients(output, tensors, grad_output).values()]
            first = runs.setdefault(count, run)
            assert all(torch.equal(a, b) for a, b in zip(run, first, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    for run in runs.values():
        for a, b in zip(run, runs[1], strict=True):
            assert relative_error(a, b) < 1e-5


# torch.compile, torch.export, AOTInductor


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("transposed", FAMILIES)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_graph_break_in_any_module(n, transposed, packed):
    torch._dynamo.reset()
    module = wake(layer(n, transposed, packed, **({"modulated": True} if packed else {})))
    args = inputs(n)[: 1 if packed else 3]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(*args).sum().backward()
    got = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    module(*args).sum().backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(got[name], p.grad)


@pytest.mark.parametrize("device", DEVICES)
def test_no_recompilation_for_another_size(device):
    torch._dynamo.reset()
    model = network().to(device)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((2, 3, 16, 20), (3, 3, 18, 30), (5, 3, 30, 22)):
            x = torch.randn(size, device=device)
            output = compiled(x)
            output.sum().backward()
            torch.testing.assert_close(output, model(x))


def loss_and_gradients(model, x):
    output = model(x)
    loss = output.float().pow(2).mean()
    return [output.detach().clone(), *torch.autograd.grad(loss, list(model.parameters()))]


@needs_gpu
def test_compile_reduce_overhead():
    """CUDA graphs of a small detector-like network, forward and backward."""
    torch._dynamo.reset()
    model = network().cuda()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):  # warm-up, recording, replays
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.randn(2, 3, 16, 20, device="cuda")
        got = [t.clone() for t in loss_and_gradients(compiled, x)]
        for a, b in zip(got, loss_and_gradients(model, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("transposed", FAMILIES)
def test_decompositions_of_an_exported_program(n, transposed):
    module = wake(layer(n, transposed, packed=True, modulated=True, groups=2, stride=2))
    dynamic = ({0: Dim.DYNAMIC, **{i + 2: Dim.DYNAMIC for i in range(n)}},)
    (x,) = inputs(n)[:1]
    program = torch.export.export(module, (x,), dynamic_shapes=dynamic)
    assert any("deformnd" in str(node.target) for node in program.graph.nodes)
    program = program.run_decompositions(deformnd.decompositions())
    assert not any("deformnd" in str(node.target) for node in program.graph.nodes)
    decomposed = program.module()
    for batch in (2, 3):
        x = torch.randn(batch, 4, *[s + batch for s in x.shape[2:]])
        torch.testing.assert_close(decomposed(x), module(x), rtol=1e-4, atol=1e-5)


def test_decompositions_of_an_exported_aggregation():
    module = Aggregation()
    sizes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    program = torch.export.export(module, (torch.randn(2, 3, 8, 9),), dynamic_shapes=sizes)
    assert any("deform_aggregate" in str(node.target) for node in program.graph.nodes)
    program = program.run_decompositions(deformnd.decompositions())
    assert not any("deformnd" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(3, 3, 11, 7)
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-4, atol=1e-5)


LOAD = """
import sys
sys.modules["deformnd"] = None  # as where it is not installed
import torch
package, x, expected = sys.argv[1:]
got = torch._inductor.aoti_load_package(package)(torch.load(x))
torch.testing.assert_close(got, torch.load(expected), rtol=1e-4, atol=1e-4)
assert not hasattr(torch.ops.deformnd, "deform_conv")
"""


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("decomposed", [False, True])
def test_aot_inductor(decomposed, device, tmp_path):
    """Packages call the kernels of an imported deformnd, or hold all their code."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("AOTInductor needs a C++ compiler")
    torch.manual_seed(0)
    module = wake(layer(2, packed=True, modulated=True)).to(device)
    x = torch.randn(2, 4, 9, 10, device=device)
    sizes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC},)
    with torch.no_grad():
        program = torch.export.export(module, (x,), dynamic_shapes=sizes)
        if decomposed:
            program = program.run_decompositions(deformnd.decompositions())
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        x = torch.randn(3, 4, 13, 10, device=device)
        expected = module(x)
    if not decomposed:
        got = torch._inductor.aoti_load_package(package)(x)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        return
    torch.save(x, tmp_path / "x.pt")
    torch.save(expected, tmp_path / "expected.pt")
    command = [sys.executable, "-c", LOAD, package, tmp_path / "x.pt", tmp_path / "expected.pt"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(command, check=True, env=environment, timeout=300)


# Modules


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("transposed", FAMILIES)
@pytest.mark.parametrize("packed", [False, True])
def test_batch_norm_fused(n, transposed, packed):
    module = wake(layer(n, transposed, packed, groups=2)).double().eval()
    norm = getattr(nn, f"BatchNorm{n}d")(6).double()
    args = [t.double() for t in inputs(n)[: 1 if packed else 3]]
    nn.init.uniform_(norm.weight)
    nn.init.normal_(norm.bias)
    norm(module(*args) * 3 + 1)  # This gives the norm running statistics.
    norm.eval()
    fused = deformnd.fuse_batch_norm(module, norm)
    torch.testing.assert_close(fused(*args), norm(module(*args)))
    without = layer(n, transposed, packed, bias=False).double().eval()
    plain = getattr(nn, f"BatchNorm{n}d")(6, affine=False).double().eval()
    torch.testing.assert_close(
        deformnd.fuse_batch_norm(without, plain)(*args), plain(without(*args))
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: (layer(2), nn.BatchNorm2d(6).eval()), "eval mode"),
        (lambda: (layer(2).eval(), nn.BatchNorm2d(4).eval()), "norm has 4 features, expected"),
        (
            lambda: (layer(2).eval(), nn.BatchNorm2d(6, track_running_stats=False).eval()),
            "no running statistics",
        ),
        (
            lambda: (parametrizations.weight_norm(layer(2)).eval(), nn.BatchNorm2d(6).eval()),
            "parametrized",
        ),
    ],
)
def test_batch_norm_not_fused(make, message):
    with pytest.raises(ValueError, match=message):
        deformnd.fuse_batch_norm(*make())


@pytest.mark.parametrize("transposed", FAMILIES)
def test_weight_norm_and_parametrize(transposed):
    module = layer(2, transposed)
    args = inputs(2)
    expected = module(*args)
    normed = parametrizations.weight_norm(copy.deepcopy(module), dim=0)
    torch.testing.assert_close(normed(*args), expected)
    normed(*args).sum().backward()
    assert all(p.grad is not None for p in normed.parameters())

    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(module, "weight", Double())
    bias = module.bias.view(-1, 1, 1)
    torch.testing.assert_close(module(*args), 2 * (expected - bias) + bias)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("transposed", FAMILIES)
@pytest.mark.parametrize("packed", [False, True])
def test_meta_construction(n, transposed, packed):
    """skip_init and to_empty, then reset_parameters, make an ordinary module."""
    options = {"modulated": True} if packed else {}
    expected = layer(n, transposed, packed, **options)
    torch.manual_seed(0)
    expected.reset_parameters()
    expected = expected.state_dict()
    with torch.device("meta"):
        module = layer(n, transposed, packed, **options)
    assert all(p.is_meta for p in module.parameters())
    module = module.to_empty(device="cpu")
    skipped = torch.nn.utils.skip_init(type(module), 4, 6, 3, padding=1, **options)
    for made in (module, skipped):
        assert made.weight.device.type == "cpu"
        torch.manual_seed(0)
        made.reset_parameters()
        for name, value in made.state_dict().items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("transposed", FAMILIES)
@pytest.mark.parametrize("packed", [False, True])
def test_lazy_modules(n, transposed, packed):
    options = {"offset_groups": 2, "modulated": True} if packed else {}
    plain = layer(n, transposed, packed, groups=2, **options)
    make = getattr(deformnd, "Lazy" + type(plain).__name__)
    args = inputs(n)[: 1 if packed else 3]
    module = make(6, 3, padding=1, groups=2, **options)
    module(*args)
    assert type(module) is type(plain) and repr(module) == repr(plain)
    assert all(not p.any() for name, p in module.named_parameters() if "generator" in name)
    assert module.weight.any() and module.bias.any()
    module.load_state_dict(wake(plain).state_dict())
    assert torch.equal(module(*args), plain(*args))
    # A lazy layer that has not seen an input takes the sizes of what it loads.
    loaded = copy.deepcopy(make(6, 3, padding=1, groups=2, **options))
    loaded.load_state_dict(plain.state_dict())
    assert torch.equal(loaded(*args), plain(*args))
    if packed:
        with pytest.raises(ValueError, match="offset_groups is 3, expected a divisor of in_chan"):
            make(6, 3, offset_groups=3)(*args)


def test_fake_tensors():
    with FakeTensorMode():
        model = network()
        x = torch.randn(2, 3, 16, 20, requires_grad=True)
        output = model(x)
        output.sum().backward()
    assert isinstance(output, FakeTensor) and output.shape == (2, 4, 16, 20)
    assert isinstance(x.grad, FakeTensor) and x.grad.shape == x.shape


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant, device):
    model = network().to(device).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, device=device, requires_grad=True)
    results = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        model.zero_grad()
        output = run(x)
        output.pow(2).sum().backward()
        results.append([output, *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


# Precision and streams on a GPU


@pytest.mark.parametrize(
    "device, dtype",
    [
        ("cpu", torch.bfloat16),
        pytest.param("cuda", torch.bfloat16, marks=needs_gpu),
        pytest.param("cuda", torch.float16, marks=needs_gpu),
    ],
)
@pytest.mark.parametrize("case", SIX, ids=str)
def test_autocast_and_grad_scaler(case, device, dtype):
    """Half output, float32 gradients; float32 offsets keep half results accurate."""
    tensors = requires_grad(case.tensors(torch.float32, device=device))
    leaves = [t for t in tensors.values() if t is not None]
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    optimizer = torch.optim.SGD(leaves, lr=0.0)
    with torch.autocast(device, dtype):
        output = case.call(tensors)
        loss = output.float().pow(2).mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert output.dtype == dtype and scaler.get_scale() == 1024.0
    exact = requires_grad(case.tensors())
    expected = case.call(exact)
    limit = 1e-2 if dtype == torch.bfloat16 else 2e-3
    assert relative_error(output.cpu(), expected) < limit
    grads = gradients(expected.pow(2).mean(), exact, torch.ones((), dtype=torch.float64))
    for name, want in grads.items():
        got = tensors[name].grad
        assert got.dtype == torch.float32
        assert relative_error(got.cpu(), want) < 3 * limit


@needs_gpu
@pytest.mark.parametrize("case", TWO, ids=str)
def test_cuda_tf32_switch(case):
    big = dataclasses.replace(case, channels=(128, 128))
    tensors = big.tensors(torch.float32, device="cuda")
    expected = big.call(big.tensors())
    errors = []
    for allowed in (False, True):
        torch.backends.cudnn.allow_tf32 = allowed
        errors.append(relative_error(big.call(tensors).cpu(), expected))
    assert errors[0] < 2e-6
    if torch.cuda.get_device_capability() >= (8, 0):
        assert 2e-5 < errors[1] < 2e-3


@needs_gpu
@pytest.mark.parametrize("case", TWO, ids=str)
def test_cuda_streams(case):
    """What one stream does after a delay is not read too early by another stream."""
    expected = requires_grad(case.tensors(torch.float32, device="cuda"))
    want = gradients(case.call(expected).sin().sum(), expected, torch.ones((), device="cuda"))
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            tensors = requires_grad({k: None if t is None else t * 1 for k, t in expected.items()})
            loss = case.call(tensors).sin().sum()
            results.append(gradients(loss, tensors, torch.ones((), device="cuda")))
    torch.cuda.synchronize()
    for got in results:
        for name, grad_ in got.items():
            torch.testing.assert_close(grad_, want[name], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("case", SIX, ids=str)
def test_cuda_device_that_is_not_current(case):
    assert torch.cuda.current_device() == 0
    results = []
    for device in ("cuda:0", "cuda:1"):
        tensors = requires_grad(case.tensors(torch.float32, device=device))
        output = case.call(tensors)
        assert output.device == torch.device(device)
        results.append([output, *gradients(output, tensors, output.detach()).values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-4, atol=1e-4)
    assert torch.cuda.current_device() == 0


@needs_gpu
@pytest.mark.parametrize("case", SIX, ids=str)
def test_cuda_graph_of_forward_and_backward(case):
    static = requires_grad(case.tensors(torch.float32, device="cuda"))
    leaves = [t for t in static.values() if t is not None]

    def step():
        output = case.call(static)
        return [output, *torch.autograd.grad(output.sin().sum(), leaves)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    for seed in (1, 2):
        with torch.no_grad():
            for name, t in case.tensors(torch.float32, seed, "cuda").items():
                if t is not None:
                    static[name].copy_(t)
        graph.replay()
        got = [t.clone() for t in recorded]
        for a, b in zip(got, step(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@needs_gpu
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_cuda_numeric_derivatives(case):
    args = [
        t.detach().cuda().requires_grad_() if isinstance(t, torch.Tensor) else t
        for t in arguments(case)
    ]
    assert torch.autograd.gradcheck(case.operator(), args, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(case.operator(), args, check_fwd_over_rev=True)
    float32 = [
        t.detach().float().requires_grad_() if isinstance(t, torch.Tensor) else t for t in args
    ]
    torch.library.opcheck(case.operator(), float32)


@needs_gpu
@pytest.mark.parametrize("strict", [False, True])
def test_cuda_compile_and_export(strict):
    torch._dynamo.reset()
    model = network().cuda()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    sizes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    x = torch.randn(2, 3, 16, 20, device="cuda")
    exported = torch.export.export(model, (x,), dynamic_shapes=sizes, strict=strict).module()
    for size in ((2, 3, 16, 20), (3, 3, 18, 30)):
        x = torch.randn(size, device="cuda")
        want = loss_and_gradients(model, x)
        torch.testing.assert_close(exported(x), want[0], rtol=1e-4, atol=1e-4)
        for a, b in zip(loss_and_gradients(compiled, x), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# torch.fx and torch.jit.trace


class Call(nn.Module):
    """A function with its parameters as a module, which is what torch.fx traces."""

    def __init__(self, function, **parameters):
        super().__init__()
        self.function, self.parameters_ = function, parameters

    def forward(self, input, weight, offset, mask, bias):
        return self.function(input, weight, offset, mask, bias, **self.parameters_)


class CallWithoutWeight(Call):
    def forward(self, input, offset, mask):
        return self.function(input, offset, mask, **self.parameters_)


class Sized(nn.Module):
    def __init__(self, layer, size):
        super().__init__()
        self.layer, self.size = layer, size

    def forward(self, x, offset=None, mask=None):
        if isinstance(self.layer, deformnd.ops.modules._Packed):
            return self.layer(x, output_size=self.size)
        return self.layer(x, offset, mask, output_size=self.size)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_fx_of_the_functions(case):
    tensors = case.tensors()
    kind = CallWithoutWeight if case.aggregate else Call
    graph = fx.symbolic_trace(kind(getattr(deformnd, case.name), **case.parameters()))
    (node,) = (n for n in graph.graph.nodes if n.op == "call_function")
    assert node.target is getattr(deformnd, case.name)
    copied = pickle.loads(pickle.dumps(graph))
    assert torch.equal(copied(**tensors), case.call(tensors))
    # A graph of one size runs at another, and says what is wrong with an argument.
    if case.batch:
        one = {k: t if k in ("weight", "bias") or t is None else t[0] for k, t in tensors.items()}
        torch.testing.assert_close(graph(**one), case.call(one))
        key = "input" if case.aggregate else "weight"
        with pytest.raises(ValueError, match=f"{case.name}: {key} has"):
            graph(**tensors | {key: tensors[key][0][0]})


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("transposed", FAMILIES)
@pytest.mark.parametrize("packed", [False, True])
def test_fx_of_the_modules(n, transposed, packed):
    options = {"modulated": True, "mask_activation": "softmax"} if packed else {}
    module = wake(layer(n, transposed, packed, groups=2, **options))
    args = inputs(n)[: 1 if packed else 3]
    assert torch.equal(fx.symbolic_trace(module)(*args), module(*args))
    whole = nn.Sequential(module, nn.ReLU()) if packed else module
    assert torch.equal(fx.symbolic_trace(whole)(*args), whole(*args))
    if transposed:
        module.stride, size = (2,) * n, [2 * s for s in args[0].shape[2:]]
        sized = fx.symbolic_trace(Sized(module, size))
        assert torch.equal(sized(*args), module(*args, output_size=size))
        assert torch.equal(fx.symbolic_trace(module)(*args, output_size=size), sized(*args))
    else:
        wrapped = layer(n, False, packed, padding_mode="circular", **options)
        assert torch.equal(fx.symbolic_trace(wrapped)(*args), wrapped(*args))
        same = layer(n, False, packed, padding="same", **options)
        assert torch.equal(fx.symbolic_trace(same)(*args), same(*args))


def test_fx_of_the_masks():
    for n in (1, 2, 3):
        mask = torch.randn(2, 2 * 3**n, *(4,) * n)
        for module in (getattr(deformnd, f"MaskSoftmax{n}d")(3), deformnd.MaskSigmoid(1.5)):
            assert torch.equal(fx.symbolic_trace(module)(mask), module(mask))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max")
def test_fx_of_sizes_from_shapes_and_of_a_quantised_network():
    def depthwise(x, w, o):
        pad = (w.shape[2] // 2, w.shape[3] // 2)
        return deformnd.deform_conv2d(x, w, o, padding=pad, groups=x.shape[1])

    args = torch.rand(1, 3, 8, 8), torch.rand(3, 1, 3, 3), torch.randn(1, 18, 8, 8)
    assert torch.equal(fx.symbolic_trace(depthwise)(*args), depthwise(*args))

    model = nn.Sequential(nn.Conv2d(4, 4, 1), wake(layer(2, packed=True, modulated=True))).eval()
    x = torch.rand(1, 4, 8, 8)
    quantization = pytest.importorskip("torch.ao.quantization")
    prepare_fx = pytest.importorskip("torch.ao.quantization.quantize_fx").prepare_fx
    mapping = quantization.get_default_qconfig_mapping("x86")
    prepared = prepare_fx(copy.deepcopy(model), mapping, (x,))
    torch.testing.assert_close(prepared(x), model(x))


def test_fx_leaves_other_subclasses_alone():
    """Only a Proxy makes a node; what else listens to torch functions gets the operators."""
    heard = []

    class Heard(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            heard.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    case = Case((6, 7), (3, 3), padding=1)
    tensors = case.tensors()
    got = case.call(tensors | {"input": tensors["input"].as_subclass(Heard)})
    assert torch.equal(got.as_subclass(torch.Tensor), case.call(tensors))
    assert torch.ops.deformnd.deform_conv in heard
    assert deformnd.deform_conv2d not in heard


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.parametrize("transposed", FAMILIES)
def test_trace_of_sizes_from_shapes(transposed):
    name = "deform_conv_transpose2d" if transposed else "deform_conv2d"
    function = getattr(deformnd, name)

    def call(x, w, o, m):
        half = w.shape[2] // 2
        y = function(x, w, o, m, None, x.shape[0], half, (half, x.shape[0]), x.shape[1])
        return y + function(x, w, None, None, None, x.shape[0], [half, half], 1, x.shape[1])

    args = [torch.rand(1, 4, 6, 7), torch.rand(4, 1, 3, 3)]
    args += [torch.randn(1, 18, 6, 7), torch.rand(1, 9, 6, 7)]
    traced = torch.jit.trace(call, args)
    assert torch.equal(traced(*args), call(*args))
    assert f"deformnd::{name[:-2]}(" in str(traced.graph)
    with pytest.raises(ValueError, match=r"offset \[1, 17, 6, 7\]"):
        torch.jit.trace(call, [*args[:2], args[2][:, 1:], args[3]])
    with pytest.raises(TypeError, match="stride is tensor"):
        torch.jit.trace(lambda x, w: function(x, w, stride=x.sum()), args[:2])
    with pytest.raises(TypeError, match="stride is tensor"):
        function(*args, stride=torch.tensor(1))


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_trace_of_the_sizes_of_an_aggregation():
    def call(x, w, o, m):
        half, kernel = w.shape[1] // 2, (w.shape[1], w.shape[0])
        return deformnd.deform_aggregate2d(x, o, m, kernel, x.shape[0], half, x.shape[0])

    args = [torch.rand(1, 4, 6, 7), torch.rand(3, 3)]
    args += [torch.randn(1, 18, 6, 7), torch.rand(1, 9, 6, 7)]
    traced = torch.jit.trace(call, args)
    assert torch.equal(traced(*args), call(*args))
    assert "deformnd::deform_aggregate(" in str(traced.graph)
    with pytest.raises(ValueError, match=r"offset \[1, 17, 6, 7\]"):
        torch.jit.trace(call, [*args[:2], args[2][:, 1:], args[3]])


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_trace_of_the_modules():
    x, offset, mask = inputs(2)
    for kernel in (3, 4):
        module = deformnd.DeformConv2d(4, 6, kernel, padding="same")
        o = torch.randn(2, 2 * kernel**2, *x.shape[2:])
        assert torch.equal(torch.jit.trace(module, (x, o))(x, o), module(x, o))
    module = deformnd.DeformConvTranspose2d(4, 6, 3, stride=2, padding=1)

    def larger(x, o):
        return module(x, o, output_size=(2 * x.shape[2], 2 * x.shape[3]))

    module.requires_grad_(False)
    assert torch.equal(torch.jit.trace(larger, (x, offset))(x, offset), larger(x, offset))
    soft = deformnd.MaskSoftmax2d(3)
    assert torch.equal(torch.jit.trace(soft, mask)(mask[:1]), soft(mask[:1]))


@pytest.mark.filterwarnings("ignore:You are using the legacy")
@pytest.mark.filterwarnings("ignore:The feature will be removed")
def test_the_trace_of_the_legacy_onnx_exporter():
    pytest.importorskip("onnx")

    class Depthwise(nn.Module):
        def forward(self, x, w, o):
            half, groups = w.shape[2] // 2, x.shape[1]
            y = deformnd.deform_conv2d(x, w, o, padding=half, groups=groups)
            return y + deformnd.deform_conv2d(x, w, padding="same", groups=groups)

    def symbolic(g, input, weight, offset, mask, bias, stride, padding, dilation, groups):
        return g.op("here::deform", input, weight, offset)

    torch.onnx.register_custom_op_symbolic("deformnd::deform_conv", symbolic, 19)
    try:
        args = torch.rand(1, 3, 8, 8), torch.rand(3, 1, 3, 3), torch.randn(1, 18, 8, 8)
        file = io.BytesIO()
        torch.onnx.export(
            Depthwise(), args, file, dynamo=False, opset_version=19, custom_opsets={"here": 1}
        )
    finally:
        torch.onnx.unregister_custom_op_symbolic("deformnd::deform_conv", 19)
    import onnx

    kinds = [node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node]
    assert kinds.count("deform") == 1 and kinds.count("Conv") == 1
