"""deform_attention against grid_sample, loops and its own definition; and as torch uses it."""

import itertools
import math
import random

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import deformnd
from deformnd import deform_attention
from deformnd.kernels import autograd, cpu, direct, reference
from deformnd.kernels.geometry import attention_geometry
from test_library import placed

SHAPES = {1: [(7,), (3,)], 2: [(5, 6), (3, 2), (1, 4)], 3: [(3, 4, 5), (2, 1, 3)]}
LEVELS = range(min(cpu.best_level(), 2) + 1)


def make(n, batch=2, queries=11, heads=3, channels=4, points=2, dtype=torch.float64, shapes=None):
    shapes = shapes or SHAPES[n]
    pixels = sum(map(math.prod, shapes))
    value = torch.randn(batch, pixels, heads, channels, dtype=dtype)
    samples = (batch, queries, heads, len(shapes), points)
    locations = torch.rand(*samples, n, dtype=dtype) * 1.6 - 0.3  # some outside
    weights = torch.randn(samples, dtype=dtype)
    return value, locations, weights


def flat(shapes):
    return [size for shape in shapes for size in shape]


def call(shapes):
    return lambda value, locations, weights: deform_attention(value, shapes, locations, weights)


def by_grid_sample(value, shapes, locations, weights):
    """As models without an operator compute it."""
    (batch, _, heads, channels), queries, n = value.shape, *locations.shape[1::4]
    total = 0
    for level, part in enumerate(value.split([math.prod(shape) for shape in shapes], 1)):
        image = part.permute(0, 2, 3, 1).reshape(batch * heads, channels, *shapes[level])
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        if n == 1:
            image, grid = image.unsqueeze(2), torch.cat([grid, torch.zeros_like(grid)], -1)
        if n == 3:
            grid = grid.unsqueeze(3)
        sampled = F.grid_sample(image, grid, align_corners=False).flatten(3)
        weight = weights[:, :, :, level].transpose(1, 2).flatten(0, 1).unsqueeze(1)
        total = total + (sampled * weight).sum(-1)
    return total.view(batch, heads * channels, queries).transpose(1, 2)


def by_loops(value, shapes, locations, weights):
    batch, queries, heads, levels, points, n = locations.shape
    out = torch.zeros(batch, queries, heads, value.shape[3], dtype=value.dtype)
    starts = [sum(map(math.prod, shapes[:level])) for level in range(levels)]
    for b, q, h, level, p in itertools.product(
        *map(range, (batch, queries, heads, levels, points))
    ):
        shape = shapes[level]
        at = [
            locations[b, q, h, level, p, n - 1 - axis].item() * size - 0.5
            for axis, size in enumerate(shape)
        ]
        for pixel in itertools.product(*map(range, shape)):
            factor = math.prod(max(0, 1 - abs(a - i)) for a, i in zip(at, pixel, strict=True))
            row = 0
            for i, size in zip(pixel, shape, strict=True):
                row = row * size + i
            out[b, q, h] += value[b, starts[level] + row, h] * factor * weights[b, q, h, level, p]
    return out.flatten(2)


def with_gradients(function, tensors, grad_output=None):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    output = function(*tensors)
    if grad_output is None:
        grad_output = torch.ones_like(output)
    return [output.detach(), *torch.autograd.grad(output, tensors, grad_output.to(output.dtype))]


@pytest.mark.parametrize("n", SHAPES)
def test_it_is_grid_sample_and_a_sum(n):
    torch.manual_seed(0)
    shapes, tensors = SHAPES[n], make(n)
    grad_output = torch.randn(2, 11, 12, dtype=torch.float64)
    wanted = with_gradients(lambda v, o, w: by_grid_sample(v, shapes, o, w), tensors, grad_output)
    got = with_gradients(call(shapes), tensors, grad_output)
    a = attention_geometry(*tensors, flat(shapes))
    defined = [
        reference.attend(a, *tensors),
        *reference.attend_gradients(a, grad_output, *tensors, [True] * 3),
    ]
    for g, d, w in zip(got, defined, wanted, strict=True):
        torch.testing.assert_close(g, w, atol=1e-11, rtol=1e-11)
        torch.testing.assert_close(d, w, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("n", SHAPES)
def test_it_is_the_loops(n):
    torch.manual_seed(1)
    shapes = SHAPES[n]
    value, locations, weights = make(n, batch=1, queries=7, heads=2)
    # Borders, and centres of pixels of the first level.
    for query, at in enumerate((0.0, 1.0, 0.5 / shapes[0][-1], -0.5 / shapes[0][-1], -1e30)):
        locations[:, query] = at
    got = deform_attention(value, shapes, locations, weights)
    torch.testing.assert_close(got, by_loops(value, shapes, locations, weights))


@pytest.mark.parametrize("n", SHAPES)
def test_derivatives_of_both_orders(n):
    torch.manual_seed(2)
    shapes = {1: [(4,), (2,)], 2: [(2, 3), (1, 2)], 3: [(2, 1, 3)]}[n]
    tensors = make(n, batch=1, queries=2, heads=2, channels=1, points=1, shapes=shapes)
    tensors = [t.requires_grad_() for t in tensors]
    assert gradcheck(call(shapes), tensors, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(call(shapes), tensors, check_fwd_over_rev=True)


@pytest.mark.parametrize("seed", range(30))
def test_the_core_is_the_definition(seed, monkeypatch):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    n = rng.choice((1, 2, 2, 3))
    shapes = [
        tuple(rng.randint(1, 9) for _ in range(n)) for _ in range(rng.choice((1, 2, 3, 4, 5)))
    ]
    tensors = make(
        n,
        rng.randint(1, 3),
        rng.choice((1, 5, 40)),
        rng.choice((1, 2, 8)),
        rng.choice((1, 3, 4, 8, 12, 16, 24, 32, 40, 68)),
        rng.randint(1, 5),
        shapes=shapes,
    )
    a = attention_geometry(*tensors, flat(shapes))
    grad_output = torch.randn(a.output_shape, dtype=torch.float64)
    for level in LEVELS:
        monkeypatch.setattr(cpu, "level", level)
        monkeypatch.setattr(cpu, "threads", rng.choice((0, 1, 2, 3, 16)))
        for dtype, close in ((torch.float64, 1e-11), (torch.float32, 3e-5)):
            given = [t.to(dtype) for t in tensors]
            exact = [t.double() for t in given]
            wanted = [
                reference.attend(a, *exact),
                *reference.attend_gradients(a, grad_output, *exact, [True] * 3),
            ]
            got = with_gradients(call(shapes), given, grad_output)
            for g, w in zip(got, wanted, strict=True):
                scale = max(w.abs().max().item(), 1)
                torch.testing.assert_close(g.double(), w, atol=close * scale, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("half_locations", [False, True])
def test_halves_are_summed_in_float32(dtype, half_locations):
    torch.manual_seed(3)
    value, locations, weights = make(2, channels=16, queries=50)
    value, weights = value.to(dtype), weights.to(dtype)
    locations = locations.to(dtype if half_locations else torch.float32)
    grad_output = torch.randn(2, 50, 48).to(dtype)
    got = with_gradients(call(SHAPES[2]), (value, locations, weights), grad_output)
    wanted = with_gradients(
        call(SHAPES[2]), [t.float() for t in (value, locations, weights)], grad_output
    )
    assert [t.dtype for t in got] == [dtype, dtype, locations.dtype, dtype]
    for g, w in zip(got, wanted, strict=True):
        assert torch.equal(g, w.to(g.dtype))


def test_samples_at_centres_lie_in_the_cells_of_the_definition():
    """The slope tells. Where the location of a centre is rounded, its position may be, too."""
    torch.manual_seed(14)
    sizes = range(3, 103)
    shapes = [(size,) for size in sizes]
    centres = torch.stack([(torch.arange(3) + 0.5) / size for size in sizes])
    tensors = (
        torch.randn(1, sum(sizes), 1, 4),
        centres.view(1, 1, 1, 100, 3, 1),
        torch.ones(1, 1, 1, 100, 3),
    )
    a = attention_geometry(*tensors, list(sizes))
    grad_output = torch.randn(1, 1, 4)
    got = with_gradients(call(shapes), tensors, grad_output)
    wanted = reference.attend_gradients(a, grad_output, *tensors, [True] * 3)
    torch.testing.assert_close(got[2], wanted[1], atol=1e-3, rtol=1e-5)


def test_what_is_not_finite():
    torch.manual_seed(4)
    value, locations, weights = make(2, dtype=torch.float32)
    for query, at in enumerate((math.nan, math.inf, -math.inf, 1e38)):
        locations[:, query] = at
    tensors = (value, locations, weights)
    output, by_value, by_locations, by_weights = with_gradients(call(SHAPES[2]), tensors)
    assert (output[:, :4] == 0).all() and output[:, 4:].all()
    assert (by_locations[:, :4] == 0).all() and (by_weights[:, :4] == 0).all()
    assert by_value.isfinite().all()

    # A weight multiplies its sample, also one of 0; pixels beside the sampled ones count nothing.
    weights[0, 0, 0, 0, 0], weights[0, 5, 0, 0, 0] = math.inf, -math.inf
    value[1, 3, 1, 2], value[1, 4, 1, 1] = math.inf, math.nan
    a = attention_geometry(*tensors, flat(SHAPES[2]))
    wanted = [
        reference.attend(a, *tensors),
        *reference.attend_gradients(a, torch.ones(2, 11, 12), *tensors, [True] * 3),
    ]
    got = with_gradients(call(SHAPES[2]), tensors)
    assert got[0][0, 0, 0].isnan() and not got[0][0, 5, 0].isfinite()
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, equal_nan=True)


@pytest.mark.skipif(not cpu.available(), reason="of the core")
@pytest.mark.parametrize("heads", [1, 2])
def test_bits_do_not_depend_on_threads(heads, monkeypatch):
    torch.manual_seed(5)
    tensors = make(2, 1, 60, heads, 32, dtype=torch.float32)
    found = []
    for threads in (1, 2, 3, 8, 40):  # a head's channels, then bands of pixels
        monkeypatch.setattr(cpu, "threads", threads)
        found.append(with_gradients(call(SHAPES[2]), tensors))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
def test_only_what_is_needed(needs):
    torch.manual_seed(6)
    tensors = make(2)
    wanted = with_gradients(call(SHAPES[2]), tensors)[1:]
    shapes = flat(SHAPES[2])
    grad_output = torch.ones(2, 11, 12, dtype=torch.float64)
    grads = torch.ops.deformnd.deform_attention_backward(grad_output, *tensors, shapes, needs)
    for grad, want, need in zip(grads, wanted, needs, strict=True):
        assert (grad is not None) == need
        assert not need or torch.equal(grad, want)


@pytest.mark.parametrize("empty", ["batch", "queries", "heads", "channels", "points"])
def test_empty(empty):
    tensors = make(2, **{empty: 0})
    output, *grads = with_gradients(call(SHAPES[2]), tensors)
    assert output.shape == (tensors[0].shape[0], tensors[1].shape[1], tensors[0].shape[2:].numel())
    assert (output == 0).all()
    assert [g.shape for g in grads] == [t.shape for t in tensors]


def test_strides():
    torch.manual_seed(7)
    tensors = make(2)
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in tensors]
    grad_output = torch.randn(11, 12, 2, dtype=torch.float64).permute(2, 0, 1)
    for a, b in zip(
        with_gradients(call(SHAPES[2]), tensors, grad_output),
        with_gradients(call(SHAPES[2]), turned, grad_output),
        strict=True,
    ):
        assert torch.equal(a, b)


V, O, W = make(2, dtype=torch.float32)  # noqa: E741
SIZES = SHAPES[2]


@pytest.mark.parametrize(
    ("error", "message", "args"),
    [
        (TypeError, "value is a list, expected a Tensor", ([1], SIZES, O, W)),
        (TypeError, "locations is a NoneType, expected a Tensor", (V, SIZES, None, W)),
        (TypeError, "weights has layout torch.sparse_coo, expected", (V, SIZES, O, W.to_sparse())),
        (
            TypeError,
            "value has dtype torch.int64, expected one of float16",
            (V.long(), SIZES, O, W),
        ),
        (
            ValueError,
            "weights is on meta, expected cpu, where value is",
            (V, SIZES, O, W.to("meta")),
        ),
        (ValueError, r"value has 3 dimensions, expected 4 \(batch, pixels", (V[0], SIZES, O, W)),
        (ValueError, "locations has 5 dimensions, expected 6", (V, SIZES, O[0], W)),
        (ValueError, "weights has 4 dimensions, expected 5", (V, SIZES, O, W[0])),
        (ValueError, "locations have 4 coordinates", (V, [(1,) * 4], torch.cat([O, O], -1), W)),
        (ValueError, "locations have 4 coordinates", (V, SIZES, torch.cat([O, O], -1), W)),
        (ValueError, "locations have 0 coordinates", (V, SIZES, O[..., :0], W)),
        (
            ValueError,
            "locations has 0 dimensions, expected 6",
            (V, SIZES, O.sum(), W),
        ),
        (ValueError, "locations has 4 dimensions, expected 6", (V, SIZES, V, W)),
        (TypeError, "locations has dtype torch.int64, expected one of", (V, SIZES, V.long(), W)),
        (TypeError, "shapes is 5, expected .* each of 1 to 3 ints", (V, 5, V, W)),
        (ValueError, "shapes have 0 values, expected 2 for each level", (V, [], O, W)),
        (
            TypeError,
            "shapes is 5, expected a list of the levels' sizes, each of 2 ints",
            (V, 5, O, W),
        ),
        (TypeError, r"shapes is \[5, 6\], expected a list", (V, [5, 6], O, W)),
        (TypeError, r"shapes is \[\(5.0, 6\)\], expected a list", (V, [(5.0, 6)], O, W)),
        (TypeError, r"shapes is a tensor \[2\] of torch.int64", (V, torch.tensor([5, 6]), O, W)),
        (TypeError, r"shapes is a tensor \[1, 2\] of torch.float32", (V, torch.ones(1, 2), O, W)),
        (
            TypeError,
            "shapes is on meta, where it has no values",
            (V, torch.ones(3, 2, dtype=torch.int64, device="meta"), O, W),
        ),
        (
            TypeError,
            "shapes has layout torch.sparse_coo",
            (V, torch.ones(3, 2, dtype=torch.int64).to_sparse(), O, W),
        ),
        (
            TypeError,
            "shapes is a nested tensor",
            (V, torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged), O, W),
        ),
        (ValueError, r"shapes is \[\(5,\)\], expected a list", (V, [(5,)], O, W)),
        (ValueError, "shapes is .*, expected at most", (V, [(5, 2**40)], O, W)),
        (ValueError, "shapes are expected to be at least 1", (V, [(5, 6), (0, 2), (1, 4)], O, W)),
        (
            ValueError,
            "value has 40 pixels, expected 39, the sum of",
            (V, [(5, 6), (3, 1), (1, 6)], O, W),
        ),
        (
            ValueError,
            r"locations has shape .*, expected \[2, 11, 3, 1, 2, 2\] \(batch",
            (V, [(5, 8)], O, W),
        ),
        (
            ValueError,
            r"locations has shape .*, expected \[2, 11, 3, 3, 2, 2\]",
            (V, SIZES, O[:1], W),
        ),
        (
            ValueError,
            r"weights has shape .*, expected \[2, 11, 3, 3, 2\] \(batch",
            (V, SIZES, O, W[:, 1:]),
        ),
    ],
)
def test_errors(error, message, args):
    with pytest.raises(error, match=message) as caught:
        deform_attention(*args)
    assert str(caught.value).startswith("deform_attention: ")


def test_errors_of_the_backward():
    backward = torch.ops.deformnd.deform_attention_backward
    grad, shapes = torch.ones(2, 11, 12), flat(SIZES)
    with pytest.raises(ValueError, match="deform_attention_backward: grad_output has shape"):
        backward(grad[1:], V, O, W, shapes, [True] * 3)
    with pytest.raises(TypeError, match=r"grad_output has dtype torch.float64, expected"):
        backward(grad.double(), V, O, W, shapes, [True] * 3)
    with pytest.raises(ValueError, match="needs has 2 values, expected 3"):
        backward(grad, V, O, W, shapes, [True] * 2)


def test_shapes_may_be_a_tensor():
    assert torch.equal(
        deform_attention(V, torch.tensor(SIZES), O, W), deform_attention(V, SIZES, O, W)
    )


def test_torch_finds_nothing_wrong():
    tensors = [t.requires_grad_() for t in make(2, channels=3, dtype=torch.float32)]
    torch.library.opcheck(
        torch.ops.deformnd.deform_attention.default, (*tensors, flat(SIZES)), atol=1e-4, rtol=1e-4
    )


def test_compile():
    torch.manual_seed(8)
    torch._dynamo.reset()

    def loss(value, locations, weights, shapes):
        return deform_attention(value, shapes, locations.sigmoid(), weights.softmax(-1)).sin()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for shapes in (SIZES, [(4, 9), (2, 3), (3, 3)]):
        tensors = make(2, shapes=shapes, dtype=torch.float32)
        a = with_gradients(lambda v, o, w, s=shapes: compiled(v, o, w, s), tensors)
        b = with_gradients(lambda v, o, w, s=shapes: loss(v, o, w, s), tensors)
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y)


class Net(torch.nn.Module):
    def forward(self, features, coarse, locations, weights):
        """Levels of sizes that vary from call to call."""
        levels = [features, coarse]
        value = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1).unflatten(
            2, (2, 4)
        )
        shapes = [(level.shape[2], level.shape[3]) for level in levels]
        return deform_attention(value, shapes, locations, weights)


@pytest.mark.parametrize("decomposed", [False, True])
def test_export(decomposed):
    torch.manual_seed(9)

    def given(queries, *sizes):
        return (
            *(torch.randn(1, 8, *size) for size in sizes),
            torch.rand(1, queries, 2, 2, 3, 2),
            torch.rand(1, queries, 2, 2, 3),
        )

    auto = torch.export.Dim.AUTO
    dynamic = ({2: auto, 3: auto}, {2: auto, 3: auto}, {1: auto}, {1: auto})
    args = given(5, (6, 8), (3, 4))
    program = torch.export.export(Net(), args, dynamic_shapes=dynamic)
    assert any("deform_attention" in str(node.target) for node in program.graph.nodes)
    if decomposed:
        program = program.run_decompositions(deformnd.decompositions())
        assert not any("deformnd" in str(node.target) for node in program.graph.nodes)
    for other in (args, given(7, (9, 5), (2, 7))):
        torch.testing.assert_close(program.module()(*other), Net()(*other))


def test_script_trace_and_fx():
    def scripted(value, locations, weights):
        return deform_attention(value, [[5, 6], [3, 2], [1, 4]], locations, weights)

    wanted = scripted(V, O, W)
    assert torch.equal(torch.jit.script(scripted)(V, O, W), wanted)
    assert torch.equal(torch.jit.trace(scripted, (V, O, W))(V, O, W), wanted)
    graph = torch.fx.symbolic_trace(scripted)
    assert any(node.target is deform_attention for node in graph.graph.nodes)
    assert torch.equal(graph(V, O, W), wanted)


def test_transforms():
    torch.manual_seed(10)
    tensors = make(2, batch=1, queries=2, heads=1, channels=2, points=1)
    f = call(SIZES)
    many = [torch.stack([t, t * 0.9, t * 0.8]) for t in tensors]
    got = torch.vmap(f)(*many)
    torch.testing.assert_close(got, torch.stack([f(*each) for each in zip(*many, strict=True)]))
    got = torch.vmap(f, in_dims=(None, 0, None))(tensors[0], many[1], tensors[2])
    torch.testing.assert_close(got, torch.stack([f(tensors[0], o, tensors[2]) for o in many[1]]))

    def loss(*tensors):
        return f(*tensors).sin().sum()

    argnums = (0, 1, 2)
    none = [t[:0] for t in many]
    assert torch.vmap(f)(*none).shape == (0, *f(*tensors).shape)
    for grad, t in zip(torch.vmap(torch.func.grad(loss, argnums))(*none), tensors, strict=True):
        assert grad.shape == (0, *t.shape)
    wanted = torch.autograd.functional.hessian(loss, tuple(tensors))
    for twice in (
        torch.func.hessian(loss, argnums),
        torch.func.jacrev(torch.func.jacrev(loss, argnums), argnums),
    ):
        for row, wanted_row in zip(twice(*tensors), wanted, strict=True):
            for a, b in zip(row, wanted_row, strict=True):
                torch.testing.assert_close(a, b)


def test_third_derivatives():
    torch.manual_seed(11)
    tensors = make(1, batch=1, queries=2, heads=1, channels=2, points=1)
    tensors = [t.requires_grad_() for t in tensors]

    def first(*tensors):
        output = deform_attention(tensors[0], SHAPES[1], tensors[1], tensors[2])
        return torch.autograd.grad(output.sin().sum(), tensors, create_graph=True)

    assert gradgradcheck(first, tensors)


def test_forward_mode():
    torch.manual_seed(12)
    tensors = make(2)
    along = [torch.randn_like(t) for t in tensors]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, d) for t, d in zip(tensors, along, strict=True)]
        got = forward_ad.unpack_dual(call(SIZES)(*duals)).tangent
    step = 1e-6
    ahead, behind = (
        call(SIZES)(*[t + s * d for t, d in zip(tensors, along, strict=True)])
        for s in (step, -step)
    )
    torch.testing.assert_close(got, (ahead - behind) / (2 * step), atol=1e-5, rtol=1e-5)


def test_autocast_casts_the_value_alone():
    with torch.autocast("cpu", torch.bfloat16):
        output = deform_attention(V, SIZES, O, W)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, deform_attention(V.bfloat16(), SIZES, O, W))
    with torch.autocast("cpu", torch.bfloat16):
        assert deform_attention(V.double(), SIZES, O, W).dtype == torch.float64


def test_flops():
    tensors = [t.detach().requires_grad_() for t in (V, O, W)]
    with FlopCounterMode(display=False) as counter:
        deform_attention(tensors[0], SIZES, *tensors[1:]).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * W.numel() * V.shape[-1]


def test_deterministic_memory_is_never_read():
    """Results come from torch.empty; torch can fill that with NaN."""
    torch.manual_seed(13)
    tensors = make(2, channels=5)
    wanted = with_gradients(call(SIZES), tensors)
    torch.use_deterministic_algorithms(True)
    try:
        got = with_gradients(call(SIZES), tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, got, wanted))


@pytest.mark.skipif(not cpu.available(), reason="of the core")
def test_calls_like_earlier_ones(monkeypatch):
    """direct.py, Note [calls like earlier ones]: they are not looked at, and nobody notices."""
    torch.manual_seed(15)
    looked_at = []

    def telling(function, count):
        def told(a, *args):
            looked_at.append(function.__name__)

            def replay(addresses):
                tensors = [placed(*both) for both in zip(addresses, args, strict=False)]
                results = function(a, *tensors, *args[count:])
                return [results] if count == 3 else [t for t in results if t is not None]

            direct.latest.replay = replay
            return function(a, *args)

        return told

    monkeypatch.setattr(direct, "replays", lambda tensor: True)
    operator = autograd.OPERATORS["deform_attention"]
    for name, count in (("attend", 3), ("attend_gradients", 4)):
        monkeypatch.setattr(cpu, name, telling(getattr(cpu, name), count))
    operator.known.clear()
    try:
        for looks in (["attend", "attend_gradients"], ["attend_gradients"], []):
            tensors = make(2, dtype=torch.float32)
            looked_at.clear()
            got = with_gradients(call(SIZES), tensors)
            assert looked_at == looks
            a = attention_geometry(*tensors, flat(SIZES))
            wanted = [
                reference.attend(a, *tensors),
                *reference.attend_gradients(a, torch.ones(2, 11, 12), *tensors, [True] * 3),
            ]
            for g, w in zip(got, wanted, strict=True):
                torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)
        looked_at.clear()
        deform_attention(tensors[0], [list(size) for size in SIZES], *tensors[1:])
        assert not looked_at
        # Other sizes of as many pixels, and sizes that are equal but not alike, are looked at.
        other = [(6, 5), (2, 3), (4, 1)]
        got = deform_attention(tensors[0], other, *tensors[1:])
        assert looked_at == ["attend"]
        a = attention_geometry(*tensors, flat(other))
        torch.testing.assert_close(got, reference.attend(a, *tensors), rtol=1e-4, atol=1e-4)
        with pytest.raises(TypeError, match="shapes is"):
            deform_attention(tensors[0], [(5.0, 6), *SIZES[1:]], *tensors[1:])
        for wrong in ([5, 6], [(5,), (6,)]):
            with pytest.raises((TypeError, ValueError), match="shapes is"):
                deform_attention(tensors[0], wrong, *tensors[1:])
        # Second derivatives of a repeated call.
        leaves = [t.requires_grad_() for t in tensors]
        output = deform_attention(leaves[0], SIZES, *leaves[1:])
        first = torch.autograd.grad(output.sin().sum(), leaves, create_graph=True)
        assert all(t.isfinite().all() for t in torch.autograd.grad(first[1].sum(), leaves))
    finally:
        operator.known.clear()
