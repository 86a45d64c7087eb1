"""The functions: layouts, defaults, shapes, TorchScript."""

import io

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import deformnd
from cases import ALL, CASES, Case, aggregate, gradients, relative_error, requires_grad

PLAIN = [c for c in ALL if c.offset_groups and c.mask_groups and c.batch]


def test_public_names_are_at_top_level_and_under_ops():
    for name in deformnd.ops.__all__:
        assert getattr(deformnd, name) is getattr(deformnd.ops, name)
    assert {c.name for c in ALL} <= set(deformnd.__all__)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_to_deform_is_torchs_convolution_bit_for_bit(case):
    tensors = case.tensors(torch.float32)
    input, weight, _, _, bias = tensors.values()
    function = getattr(F, case.name.removeprefix("deform_"))
    got = case.call({**tensors, "offset": None, "mask": None})
    assert torch.equal(got, function(input, weight, bias, **case.parameters()))


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_unbatched(case):
    tensors = case.tensors()
    one = dict(tensors)
    for name in ("input", "offset", "mask"):
        one[name] = tensors[name][0]
    torch.testing.assert_close(case.call(one), case.call(tensors)[0])


@pytest.mark.parametrize("case", ALL, ids=str)
def test_non_contiguous_arguments(case):
    tensors = case.tensors()
    strided = {
        name: None if t is None else torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]
        for name, t in tensors.items()
    }
    torch.testing.assert_close(case.call(strided), case.call(tensors))


@pytest.mark.parametrize("case", [c for c in PLAIN if c.n > 1], ids=str)
def test_channels_last_in_channels_last_out(case):
    layout = {2: torch.channels_last, 3: torch.channels_last_3d}[case.n]
    tensors = requires_grad(case.tensors())
    expected = case.call(tensors)
    assert expected.is_contiguous()
    moved = dict(tensors)
    moved["input"] = tensors["input"].detach().contiguous(memory_format=layout).requires_grad_()
    output = case.call(moved)
    if moved["input"][0, 0].numel() > 1:  # one pixel is laid out both ways
        assert output.is_contiguous(memory_format=layout)
        (grad,) = torch.autograd.grad(output.sum(), moved["input"])
        assert grad.is_contiguous(memory_format=layout)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("kernel", [3, 4])
def test_padding_by_name(n, kernel):
    case = Case((7, 6, 5)[:n], (kernel,) * n, padding=0)
    tensors = case.tensors()
    function = getattr(deformnd, case.name)
    input, weight, offset, mask, bias = tensors.values()
    assert torch.equal(
        function(input, weight, offset, mask, bias, padding="valid"), case.call(tensors)
    )
    conv = getattr(F, f"conv{n}d")
    plain = conv(input, weight, bias, padding="same")
    assert torch.equal(function(input, weight, bias=bias, padding="same"), plain)
    zero = torch.zeros(2, n * kernel**n, *case.size, dtype=torch.float64)
    got = function(input, weight, zero, bias=bias, padding="same")
    torch.testing.assert_close(got, plain)
    if kernel % 2 == 0:
        # The odd zero goes behind: as explicit padding of one more row, cut off again.
        offset = torch.randn(2, n * kernel**n, *case.size, dtype=torch.float64)
        wide = F.pad(offset, [0, 1] * n)
        explicit = function(F.pad(input, [0, 2] * n), weight, wide, bias=bias, padding=1)
        cut = (..., *[slice(0, s) for s in case.size])
        got = function(input, weight, offset, bias=bias, padding="same")
        torch.testing.assert_close(got, explicit[cut])


@pytest.mark.parametrize("kernel", [3, 4])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_padding_by_name_of_aggregation(n, kernel):
    case = aggregate((7, 6, 5)[:n], (kernel,) * n, 4, offset_groups=2)
    function = getattr(deformnd, case.name)
    input, offset, mask = case.tensors().values()
    got = function(input, offset, mask, kernel, padding="valid")
    assert torch.equal(got, case.call(case.tensors()))
    # As the convolution has it, where the odd zero goes behind, too.
    size = (2, 2 * n * kernel**n, *case.size)
    offset, mask = torch.randn(size).double(), torch.rand(2, kernel**n, *case.size).double()
    weight = torch.ones(4, 1, *case.kernel).double()
    conv = getattr(deformnd, f"deform_conv{n}d")
    expected = conv(input, weight, offset, mask, padding="same", groups=4)
    torch.testing.assert_close(function(input, offset, mask, kernel, padding="same"), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "case",
    [Case((6, 7), (3, 3), padding=1), aggregate((6, 7), (3, 3), 4, padding=1)],
    ids=lambda case: case.family,
)
def test_offset_and_mask_may_have_another_dtype(dtype, case):
    tensors = case.tensors(torch.float32)
    mixed = requires_grad({**tensors, "offset": tensors["offset"].to(dtype)})
    output = case.call(mixed)
    assert output.dtype == torch.float32
    torch.testing.assert_close(
        output, case.call({**tensors, "offset": mixed["offset"].float()}), rtol=1e-4, atol=1e-5
    )
    (grad,) = torch.autograd.grad(output.sum(), mixed["offset"])
    assert grad.dtype == dtype


def test_the_default_device_is_not_asked():
    case = Case((6, 7), (3, 3), padding=1)
    tensors = requires_grad(case.tensors())
    expected = case.call(tensors)
    with torch.device("meta"):
        output = case.call(tensors)
        grads = gradients(output, tensors, expected.detach())
    assert torch.equal(output, expected)
    assert all(grad.device.type == "cpu" for grad in grads.values())


def test_numbers_of_numpy_are_ints():
    case = Case((6, 7), (3, 3), padding=1)
    x, w, o, m, b = case.tensors().values()
    one = np.int64(1)
    got = deformnd.deform_conv2d(x, w, o, m, b, one, (one, one), one, one)
    assert torch.equal(got, case.call(case.tensors()))


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.batch and c.groups == 1 and not c.transposed], ids=str
)
def test_empty_channels(case):
    tensors = case.tensors()
    tensors["input"], tensors["weight"] = tensors["input"][:, :0], tensors["weight"][:, :0]
    output = case.call(requires_grad(tensors))
    bias = 0 if tensors["bias"] is None else tensors["bias"].view(-1, *[1] * case.n)
    torch.testing.assert_close(output, torch.zeros_like(output) + bias)
    output.sum().backward()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_aggregation_of_no_channels(n):
    tensors = aggregate((5, 4, 3)[:n], (2,) * n, 2).tensors()
    tensors["input"] = tensors["input"][:, :0]
    output = getattr(deformnd, f"deform_aggregate{n}d")(**requires_grad(tensors), kernel_size=2)
    assert output.shape[1] == 0
    output.sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_torchscript(case):
    tensors = requires_grad(case.tensors())
    scripted = torch.jit.script(getattr(deformnd, case.name))
    expected = case.call(tensors)
    output = scripted(**tensors, **case.parameters())
    assert torch.equal(output, expected)
    lists = {k: list(case.values(k)) for k in case.parameters() if k != "groups"}
    assert torch.equal(scripted(**tensors, **(case.parameters() | lists)), expected)
    given = [t for t in tensors.values() if t is not None]
    got = torch.autograd.grad(output.sum(), given)
    for a, b in zip(got, torch.autograd.grad(expected.sum(), given), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_of_a_users_function():
    @torch.jit.script
    def network(x: torch.Tensor, w: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
        y = deformnd.deform_conv2d(x, w, o, padding="same")
        y = y + deformnd.deform_conv2d(x, w, None, padding=(1, 1))
        y = y + deformnd.deform_aggregate2d(x[:, :1], o, None, 3, padding="same") * 0
        return y + deformnd.deform_conv2d(x[0], w, o[0], stride=[1, 1], padding=1)

    case = Case((6, 7), (3, 3), padding=1, batch=1, mask_groups=0, bias=False)
    x, w, o, _, _ = case.tensors().values()
    buffer = io.BytesIO()
    torch.jit.save(network, buffer)
    buffer.seek(0)
    deformed = case.call(case.tensors())
    expected = 2 * deformed + F.conv2d(x, w, padding=1)
    torch.testing.assert_close(torch.jit.load(buffer)(x, w, o), expected)
    with pytest.raises(torch.jit.Error, match="input has 5 dimensions"):
        network(x[None], w, o)


ACCELERATORS = [
    name
    for name, backend in (("cuda", torch.cuda), ("mps", torch.mps), ("xpu", torch.xpu))
    if backend.is_available()
]


# The largest relative L2 error, allowing for results of few elements.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 2e-2,
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("device", ACCELERATORS)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_accelerators_agree_with_the_cpu(case, device, dtype, monkeypatch):
    if device == "mps" and dtype == torch.float64:
        pytest.skip("MPS has no float64")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    there = requires_grad(case.tensors(dtype, device=device))
    here = requires_grad({k: None if t is None else t.cpu().double() for k, t in there.items()})
    output, expected = case.call(there), case.call(here)
    assert output.device.type == device and output.dtype == dtype
    assert relative_error(output.cpu(), expected) <= TOLERANCE[dtype]
    grad_output = torch.randn_like(expected).to(dtype)
    got = gradients(output, there, grad_output.to(device))
    for name, grad in gradients(expected, here, grad_output.double()).items():
        assert relative_error(got[name].cpu(), grad) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("device", ACCELERATORS)
def test_second_derivatives_on_accelerators(device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    case = Case((5, 6), (3, 3), padding=1)
    second = {}
    for place in ("cpu", device):
        tensors = requires_grad(case.tensors(torch.float32, device=place))
        (grad,) = torch.autograd.grad(
            case.call(tensors).pow(2).sum(), tensors["input"], create_graph=True
        )
        second[place] = gradients(grad.pow(2).sum(), tensors | {"bias": None}, None)
    for name, grad in second["cpu"].items():
        assert relative_error(second[device][name].cpu(), grad) <= 1e-4, name
