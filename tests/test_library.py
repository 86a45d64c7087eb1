"""What the registration promises: opcheck, derivatives, autocast, vmap, compile, export."""

import collections
import ctypes
import dataclasses
import functools
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import deformnd
from cases import AGGREGATES, ALL, CASES, Case, aggregate, gradients, relative_error, requires_grad
from deformnd.kernels import autograd, cpu, direct

# Small ones of each rank and family for what is slow: (numeric second derivatives, opcheck).
SMALL = [
    Case((4,), (2,), padding=1, channels=(2, 2)),
    Case((3, 3), (2, 2), padding=1, channels=(2, 2), offset_groups=2, groups=2),
    Case((2, 3, 2), (1, 2, 2), channels=(2, 2), batch=1, mask_groups=2),
]
SMALL += [Case(c.size, c.kernel, True, c.batch, (2, 2), groups=c.groups) for c in SMALL]
SMALL_AGGREGATES = [
    aggregate((4,), (2,), 2, padding=1),
    aggregate((3, 3), (2, 2), 2, padding=1, offset_groups=2),
    aggregate((2, 3, 2), (1, 2, 2), 2, batch=1, mask_groups=2),
    aggregate((3, 3), (2, 2), 2, padding=1, offset_groups=0),
    aggregate((3, 3), (2, 2), 2, padding=1, mask_groups=0),
]
ALL_SMALL = SMALL + SMALL_AGGREGATES


def arguments(case, dtype=torch.float64):
    tensors = requires_grad(case.tensors(dtype))
    return (*tensors.values(), *case.operator_parameters())


class Seen(TorchDispatchMode):
    """Records the operators that are called, and their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.calls.append((operator, args))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", ALL_SMALL, ids=str)
def test_numeric_derivatives(case):
    """Time grows with the square of the number of values, so large cases have a batch of one."""
    args = arguments(case if case.n == 1 else dataclasses.replace(case, batch=1))
    assert torch.autograd.gradcheck(case.operator(), args, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(case.operator(), args, check_fwd_over_rev=True)


def test_third_derivative():
    case = SMALL[1]
    x, w, o, m, b = requires_grad(case.tensors()).values()

    def second(o):
        y = deformnd.deform_conv2d(x, w, o, m, b, **case.parameters())
        (g,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.pow(2).sum(), w, create_graph=True)
        return h

    assert torch.autograd.gradcheck(second, (o,))


def test_second_derivative_when_the_offset_depends_on_the_input():
    case = Case((3, 3), (1, 1), channels=(2, 2), offset_groups=1, mask_groups=0, bias=False)
    x, w, o, _, _ = case.tensors().values()

    def f(x):
        return deformnd.deform_conv2d(x, w, o + 0.1 * x.sigmoid())

    assert torch.autograd.gradgradcheck(f, (x.requires_grad_(),))


@pytest.mark.parametrize(
    "case", [*ALL_SMALL, *CASES[10:12], *CASES[-6:-4], AGGREGATES[8], AGGREGATES[9]], ids=str
)
def test_opcheck(case):
    args = arguments(case)
    torch.library.opcheck(case.operator(), args)
    grad_output = torch.randn_like(case.operator()(*args)).requires_grad_()
    tensors = requires_grad(case.tensors())
    needs = [name == "bias" or t is not None for name, t in tensors.items()]
    args = (grad_output, *case.saved(tensors), *case.operator_parameters(), needs)
    torch.library.opcheck(case.operator(backward=True), args)


@pytest.mark.parametrize("case", [*SMALL[1::3], SMALL_AGGREGATES[1]], ids=str)
def test_only_the_gradients_asked_for(case):
    tensors = case.tensors()
    wanted = [name in ("weight", "mask") for name in tensors]
    for t, want in zip(tensors.values(), wanted, strict=True):
        t.requires_grad_(want)
    with Seen() as seen:
        case.call(tensors).sum().backward()
    asked = [args[-1] for operator, args in seen.calls if operator == case.operator(backward=True)]
    assert asked == [wanted]


@pytest.mark.parametrize("case", [c for c in ALL if c.batch], ids=str)
def test_each_gradient_alone_equals_it_among_all(case):
    tensors = case.tensors()
    operator, count = case.operator(backward=True), len(tensors)
    grad_output = torch.randn_like(case.call(tensors))
    rest = (grad_output, *case.saved(tensors), *case.operator_parameters())
    together = operator(*rest, [True] * count)
    for i in range(count):
        alone = operator(*rest, [j == i for j in range(count)])
        assert all(t is None for j, t in enumerate(alone) if j != i)
        if together[i] is None:
            assert alone[i] is None
        else:
            assert torch.equal(alone[i], together[i])


@pytest.mark.parametrize("case", [*SMALL[1::3], SMALL_AGGREGATES[1]], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_all_that_listen_to_a_call_are_heard(case, grad):
    """direct.py, Note [the direct way]: modes, subclasses, transforms, views, the profiler."""
    operator = case.operator()
    name = operator.name()
    args = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in arguments(case))
    args[1].requires_grad_(grad)
    expected = operator(*args)
    with Seen() as seen:
        torch.testing.assert_close(operator(*args), expected, rtol=0, atol=0)
    assert [called for called, _ in seen.calls].count(operator) == 1
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        output = operator(*args)
        if grad:
            torch.autograd.grad(output.sum(), args[1])
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts[name] == 1
    assert counts.get(name + "_backward", 0) == int(grad)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = operator(mode.from_tensor(args[0]), *args[1:])
        assert type(fake) is type(operator(*args)) is type(mode.from_tensor(args[0]))
        assert fake.shape == expected.shape
    without_bias = args[1:] if case.aggregate else (*args[1:4], None, *args[5:])
    both = operator(TwoTensor(args[0], 2 * args[0]), *without_bias)
    torch.testing.assert_close(both.b, 2 * both.a)
    functional = operator(torch._to_functional_tensor(args[0]), *args[1:])
    assert torch._is_functional_tensor(functional)
    functional = torch._from_functional_tensor(functional)
    torch.testing.assert_close(functional, expected, rtol=0, atol=0)
    negative = torch.complex(torch.zeros_like(args[0]), -args[0]).conj().imag
    assert negative.is_neg()
    torch.testing.assert_close(operator(negative, *args[1:]), expected, rtol=0, atol=0)
    traced = torch.jit.trace(lambda x, w: operator(x, w, *args[2:]), args[:2])
    assert name in str(traced.graph)


def placed(address, like):
    """The tensor at an address, with the size, strides and dtype of another one."""
    length = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True))
    memory = (ctypes.c_char * (length * like.dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(like.shape, like.stride())


@pytest.fixture
def looked_at(monkeypatch):
    """Lists the calls that are looked at, with a core that says how to run calls again.

    The real core does not; the GPU's backend does, which is not here.
    """
    calls = []

    def telling(function):
        def told(g, *args):
            calls.append(function.__name__)
            likes = [t for t in args[:5] if t is None or isinstance(t, torch.Tensor)]
            rest = args[len(likes) :]

            def replay(addresses):
                found = iter(addresses)
                again = [None if t is None else placed(next(found), t) for t in likes]
                sums = [again[i] for i in (0, 1) for t in rest[1:] if t is likes[i]]
                results = function(g, *again, *rest[:1], *sums)
                return [results] if isinstance(results, torch.Tensor) else [
                    t for t in results if t is not None
                ]  # fmt: skip

            result = function(g, *args)
            direct.latest.replay = replay
            return result

        return told

    for name in ("gather", "scatter", "gradients"):
        monkeypatch.setattr(cpu, name, telling(getattr(cpu, name)))
    monkeypatch.setattr(direct, "replays", lambda tensors: True)
    yield calls
    for operator in autograd.OPERATORS.values():
        operator.known.clear()


@pytest.mark.skipif(not cpu.available(), reason="the core is not built")
@pytest.mark.parametrize("case", [SMALL[1], SMALL[4]], ids=str)
def test_calls_like_earlier_ones(case, looked_at, monkeypatch):
    """direct.py, Note [calls like earlier ones]: they are not looked at, and nobody notices."""

    def fresh(*needed):
        return requires_grad(
            {k: torch.randn_like(t) for k, t in case.tensors(torch.float32).items()}, needed
        )

    def requires_grad(tensors, needed):
        for name in needed:
            tensors[name].requires_grad_()
        return tensors

    def grads(tensors, output=None, **options):
        output = case.call(tensors) if output is None else output
        wanted = [t for t in tensors.values() if t.requires_grad]
        torch.manual_seed(1)
        return torch.autograd.grad(output, wanted, torch.randn(output.shape), **options)

    def expected(function, *args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(direct, "replays", lambda tensors: False)
            return function(*args, **options)

    def equal(got, want):
        looked = list(looked_at)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        looked_at.clear()
        return looked

    case.call(fresh()), looked_at.clear()
    for guard in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        tensors = fresh()
        with guard():
            got = case.call(tensors)
            assert not equal(got, got.clone()) and not got.requires_grad
            want = expected(case.call, tensors)
            equal(got, want)
    for needed in (["weight"], ["input", "offset", "bias"], list(fresh())):
        for known in (False, True):
            tensors = fresh(*needed)
            output = case.call(tensors)
            got = grads(tensors, output)
            looked = list(looked_at)
            equal(got, expected(grads, tensors))
            assert looked == ([] if known else ["gradients"])

    # Where the saved tensors are others, laid out otherwise, too; not where somebody listens.
    tensors = fresh(*tensors)
    want = expected(grads, tensors)
    last = functools.partial(torch.clone, memory_format=torch.channels_last)
    for copy in (torch.clone, lambda t: last(t) if t.dim() == 4 else t):
        with torch.autograd.graph.saved_tensors_hooks(copy, lambda t: t):
            output = case.call(tensors)
        equal(grads(tensors, output), want)
    # In a backward that is not known yet, a saved tensor may not be unpacked twice.
    fewer = {**tensors, "bias": tensors["bias"].detach()}
    for _ in range(2):
        output = checkpoint(
            lambda *changed: case.call(dict(zip(fewer, changed, strict=True))),
            *fewer.values(),
            use_reentrant=False,
        )
        equal(grads(fewer, output), want[:-1])
    with Seen() as seen:
        equal(grads(tensors), want)
    assert len(seen.calls) >= 2
    with torch.autocast("cpu", torch.bfloat16):
        assert case.call(tensors).dtype == torch.bfloat16
    equal(grads(tensors, create_graph=True), want)
    first = grads(tensors, create_graph=True)
    operands = [t for name, t in tensors.items() if name != "bias"]
    second = torch.autograd.grad([g.sum() for g in first], operands)
    want = expected(grads, tensors, create_graph=True)
    want = torch.autograd.grad([g.sum() for g in want], operands)
    torch.testing.assert_close(second, want)

    def of_weight(weight):
        return case.call({**tensors, "weight": weight})

    weight, along = tensors["weight"].detach(), torch.randn(tensors["weight"].shape)
    got = torch.func.jvp(of_weight, (weight,), (along,))[1]
    torch.testing.assert_close(got, expected(torch.func.jvp, of_weight, (weight,), (along,))[1])
    batch = torch.vmap(of_weight)(torch.stack((weight, along)))
    torch.testing.assert_close(batch[1], of_weight(along))

    # An operand that is changed between forward and backward.
    output = case.call(tensors)
    with torch.no_grad():
        tensors["weight"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grads(tensors, output)


@pytest.mark.skipif(not cpu.available(), reason="the core is not built")
@pytest.mark.parametrize("case", [SMALL[1], SMALL[4]], ids=str)
def test_equal_sizes_of_another_type_are_looked_at(case, looked_at):
    """A known call with sizes in lists, or with sizes that are equal and no ints, is checked."""
    tensors = case.tensors(torch.float32)
    case.call(tensors)
    function, parameters = getattr(deformnd, case.name), case.parameters()
    axes = collections.namedtuple("axes", [f"axis{i}" for i in range(case.n)])
    function(**tensors, **{**parameters, "dilation": axes(*[1] * case.n)})
    for name, wrong in (
        ("groups", float(case.groups)),
        ("dilation", (1.0,) * case.n),
        ("dilation", axes(*[1.0] * case.n)),
    ):
        with pytest.raises(TypeError, match=f"{name} is"):
            function(**tensors, **{**parameters, name: wrong})
    looked_at.clear()
    function(**tensors, **{**parameters, "dilation": [1] * case.n})
    assert looked_at


@pytest.mark.skipif(not cpu.available(), reason="the core is not built")
@pytest.mark.parametrize("case", [SMALL[1], SMALL[4], SMALL_AGGREGATES[1]], ids=str)
def test_what_is_remembered_is_of_the_same_call(case, looked_at):
    """Nothing is remembered of a call that fails, or of calls that hooks of saved tensors make."""
    tensors = requires_grad(case.tensors(torch.float32))
    function, parameters = getattr(deformnd, case.name), case.parameters()
    wrong = {**parameters, "dilation": 1.0}
    with pytest.raises(TypeError, match=r"dilation is 1\.0"):
        function(**tensors, **wrong)
    function(**tensors, **{**parameters, "padding": list(case.values("padding"))})  # not remembered
    with pytest.raises(TypeError, match=r"dilation is 1\.0"):
        function(**tensors, **wrong)

    tensors = {k: torch.randn_like(t) for k, t in tensors.items() if t is not None}
    gone = weakref.ref(tensors["offset"])
    with pytest.raises(TypeError, match=r"dilation is 1\.0"):
        function(**tensors, **wrong)
    del tensors
    assert gone() is None

    tensors, other = requires_grad(case.tensors(torch.float32)), SMALL[0]
    operator, args = other.operator(), tuple(t.detach() for t in arguments(other)[:5])

    def pack(t):
        operator(*args, *other.operator_parameters())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        want = case.call(tensors)
    for _ in range(2):
        torch.testing.assert_close(case.call(tensors), want, rtol=0, atol=0)


@pytest.mark.parametrize("needs", [[], [True] * 4, [True] * 6], ids=len)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("case", [SMALL[0], SMALL[-1], SMALL_AGGREGATES[0]], ids=str)
def test_a_wrong_number_of_needs(case, device, needs):
    tensors = case.tensors()
    grad_output = torch.zeros_like(case.call(tensors))
    args = [None if t is None else t.to(device) for t in (grad_output, *case.saved(tensors))]
    message = f"_backward: needs has {len(needs)} values, expected {len(tensors)}"
    with pytest.raises(ValueError, match=message):
        case.operator(backward=True)(*args, *case.operator_parameters(), needs)
    args[1].requires_grad_()
    with pytest.raises(ValueError, match=message):
        case.operator(backward=True)(*args, *case.operator_parameters(), needs)


@pytest.mark.parametrize("case", [SMALL[1], SMALL[4], SMALL_AGGREGATES[1]], ids=str)
def test_inference_mode_with_gradients_enabled(case, looked_at):
    """As in torch's own operators nothing is recorded, so inference tensors may come in."""
    tensors = requires_grad(case.tensors(torch.float32))
    for _ in range(2):
        with torch.inference_mode(), torch.enable_grad():
            inputs = {**tensors, "input": tensors["input"] * 1}
            output = case.call(inputs)
            assert torch.equal(
                output, case.operator()(*inputs.values(), *case.operator_parameters())
            )
        assert output.is_inference() and not output.requires_grad
    assert case.call(tensors).requires_grad


def test_meta_tensors_give_shapes():
    case = CASES[4]
    meta = {k: None if t is None else t.to("meta") for k, t in case.tensors().items()}
    output = case.call(meta)
    assert output.is_meta and output.shape == case.call(case.tensors()).shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [c for c in ALL if c.batch and c.offset_groups], ids=str)
def test_autocast(case, dtype):
    tensors = requires_grad(case.tensors(torch.float32))
    with torch.autocast("cpu", dtype):
        output = case.call(tensors)
    assert output.dtype == dtype
    expected = case.call(tensors)
    assert relative_error(output, expected) < (1e-2 if dtype == torch.bfloat16 else 2e-3)
    # The offset was not rounded: the result is that of half operands with the float32 offset.
    half = {
        k: t if t is None or k in ("offset", "mask") else t.to(dtype) for k, t in tensors.items()
    }
    assert torch.equal(output, case.call(half))
    grads = gradients(output, tensors, torch.ones_like(output))
    assert all(grad.dtype == torch.float32 for grad in grads.values())


def test_autocast_leaves_float64_alone():
    tensors = CASES[4].tensors()
    with torch.autocast("cpu", torch.bfloat16):
        assert CASES[4].call(tensors).dtype == torch.float64


@pytest.mark.parametrize("case", [c for c in ALL if c.batch], ids=str)
@pytest.mark.parametrize(
    "mapped", [("input",), ("offset", "mask"), ("weight",), ("input", "weight", "offset", "bias")]
)
def test_vmap(case, mapped):
    tensors = case.tensors()
    names = [name for name, t in tensors.items() if t is not None]
    mapped = [name for name in mapped if name in names]
    if not mapped:
        return
    size = 3
    batches = {
        name: torch.stack([case.tensors(seed=s)[name] for s in range(size)], dim=-1)
        if name in mapped
        else tensors[name]
        for name in names
    }
    dims = tuple(-1 if name in mapped else None for name in names)

    def call(*args):
        return case.call({**dict.fromkeys(tensors), **dict(zip(names, args, strict=True))})

    def loss(*args):
        return call(*args).pow(2).sum()

    one_by_one = [
        [batches[n][..., i] if n in mapped else batches[n] for n in names] for i in range(size)
    ]
    got = torch.vmap(call, dims)(*batches.values())
    expected = torch.stack([call(*args) for args in one_by_one])
    torch.testing.assert_close(got, expected)
    # Per-sample gradients by all tensors at once.
    argnums = tuple(range(len(names)))
    got = torch.vmap(torch.func.grad(loss, argnums), dims)(*batches.values())
    expected = [torch.func.grad(loss, argnums)(*args) for args in one_by_one]
    for i in argnums:
        torch.testing.assert_close(got[i], torch.stack([e[i] for e in expected]))


@pytest.mark.parametrize("mapped", ["input", "weight", "offset", "mask"])
@pytest.mark.parametrize("name", ["deform_conv2d", "deform_conv_transpose2d", "deform_aggregate2d"])
def test_vmap_of_nothing(name, mapped):
    """As with torch.vmap of torch's own operators, the result is empty."""
    output = (5, 5) if name == "deform_conv_transpose2d" else (3, 3)
    tensors = {
        "input": torch.randn(2, 4, 5, 5),
        "weight": torch.randn(4, 4, 3, 3),
        "offset": torch.randn(2, 18, *output),
        "mask": torch.randn(2, 9, *output),
    }
    if name == "deform_aggregate2d":
        if mapped == "weight":
            return
        del tensors["weight"]

    def call(t):
        given = {**tensors, mapped: t}
        if name == "deform_aggregate2d":
            return deformnd.deform_aggregate2d(**given, kernel_size=3)
        return getattr(deformnd, name)(**given)

    def loss(t):
        return call(t).pow(2).sum()

    one = tensors[mapped]
    none = one.new_empty(*one.shape, 0).requires_grad_()
    got = torch.vmap(call, -1)(none)
    assert got.shape == (0, *call(one).shape)
    assert torch.autograd.grad(got.sum(), none)[0].shape == none.shape
    assert torch.vmap(torch.func.grad(loss), -1)(none).shape == (0, *one.shape)
    assert torch.vmap(torch.func.hessian(loss), -1)(none).shape == (0, *one.shape, *one.shape)
    assert torch.vmap(torch.vmap(call, -1))(torch.zeros(2, *none.shape)).shape[:2] == (2, 0)


def network():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        deformnd.PackedDeformConv2d(3, 8, 3, padding=1, modulated=True),
        torch.nn.ReLU(),
        deformnd.PackedDeformConv2d(
            8, 4, 3, stride=2, padding=1, offset_groups=2, mask_groups=4, modulated=True
        ),
        deformnd.PackedDeformConvTranspose2d(4, 4, 4, stride=2, padding=1, modulated=True),
    )
    for parameter in layers.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return layers


class Aggregation(torch.nn.Module):
    """DCNv3's layer in short."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.project = torch.nn.Conv2d(3, 4, 1)
        self.predict = torch.nn.Conv2d(4, 2 * 27, 3, padding=1)

    def forward(self, x):
        x = self.project(x)
        offset, mask = self.predict(x).split((36, 18), 1)
        return deformnd.deform_aggregate2d(x, offset, mask.sigmoid(), 3, padding="same")


@pytest.mark.parametrize("make", [network, Aggregation])
def test_compile(make):
    torch._dynamo.reset()
    model = make()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for size in ((2, 3, 16, 20), (3, 3, 18, 30)):
        x = torch.randn(size)
        output, expected = compiled(x), model(x)
        torch.testing.assert_close(output, expected)
        got = torch.autograd.grad(output.sum(), list(model.parameters()))
        for a, b in zip(
            got, torch.autograd.grad(expected.sum(), list(model.parameters())), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [network, Aggregation])
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_sizes(strict, make, tmp_path):
    model = make()
    sizes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    program = torch.export.export(
        model, (torch.randn(2, 3, 16, 20),), dynamic_shapes=sizes, strict=strict
    )
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for size in ((5, 3, 24, 36), (1, 3, 10, 12)):
        x = torch.randn(size)
        torch.testing.assert_close(loaded(x), model(x))
