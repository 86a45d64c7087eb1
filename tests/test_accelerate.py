"""accelerate(): torchvision's deform_conv2d on deformnd's kernels."""

import contextlib
import itertools
import sys

import pytest
import torch
from torch.profiler import profile

import deformnd
from cases import relative_error
from deformnd.compat.torchvision import accelerate
from deformnd.kernels import library, reference

try:
    import torchvision
except (ImportError, RuntimeError) as error:
    torchvision = None
    why = f"torchvision does not import: {error}"
else:
    why = ""

needs_torchvision = pytest.mark.skipif(torchvision is None, reason=why)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_core = pytest.mark.skipif(not deformnd.has_ops(), reason="built without the C++ core")


def function(x, offset, weight, bias, mask):
    return torchvision.ops.deform_conv2d(
        x, offset, weight, bias, stride=(2, 1), padding=(1, 0), dilation=(1, 2), mask=mask
    )


def arguments(mask=True, bias=True, channels_last=False, dtype=torch.float32):
    torch.manual_seed(0)
    tensors = [
        torch.rand(2, 6, 9, 8),
        2 * torch.randn(2, 24, 5, 6),
        torch.randn(4, 3, 3, 2),
        torch.randn(4) if bias else None,
        torch.rand(2, 12, 5, 6) if mask else None,
    ]
    if channels_last:
        tensors[0] = tensors[0].to(memory_format=torch.channels_last)
    return [t if t is None else t.to(dtype).requires_grad_() for t in tensors]


def results(call, tensors):
    """Output and gradients."""
    y = call(*tensors)
    grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
    grads = torch.autograd.grad(y, [t for t in tensors if t is not None], grad)
    return [y.detach(), *grads]


def expected(tensors):
    """By the reference in float64."""
    x, offset, weight, bias, mask = (None if t is None else t.detach().double() for t in tensors)
    tensors = [t if t is None else t.requires_grad_() for t in (x, offset, weight, bias, mask)]

    def call(x, offset, weight, bias, mask):
        g = library.conv_geometry(x, weight, offset, mask, bias, (2, 1), (1, 0), (1, 2), 2)
        return reference.gather(g, x, weight, offset, mask, bias)

    return results(call, tensors)


def assert_close(got, wanted, like=None):
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        error = relative_error(a, b)
        assert error < 1e-5, (i, error)
        if like is not None:
            assert a.stride() == like[i].stride()


@contextlib.contextmanager
def counting(forward, backward):
    """Check that deformnd's kernels run so many times in the block."""
    with profile() as p:
        yield
    names = [e.name for e in p.events()]
    assert names.count("deformnd::deform_conv") == forward
    assert names.count("deformnd::deform_conv_backward") == backward


@needs_torchvision
@needs_core
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_eager(mask, bias, channels_last):
    tensors = arguments(mask, bias, channels_last)
    theirs, wanted = results(function, tensors), expected(tensors)
    with accelerate() as handle, counting(1, 1):
        assert "cpu" in handle.devices
        ours = results(function, tensors)
    assert_close(ours, wanted, theirs)
    assert_close(theirs, wanted)
    with counting(0, 0):
        results(function, tensors)
    with accelerate(), torch.inference_mode(), counting(1, 0):
        function(*tensors)


@needs_torchvision
@needs_gpu
@pytest.mark.parametrize("channels_last", [True, False])
def test_eager_on_a_gpu(channels_last):
    tensors = [
        None if t is None else t.detach().cuda().requires_grad_()
        for t in arguments(channels_last=channels_last)
    ]
    theirs, wanted = results(function, tensors), expected(tensors)
    with accelerate() as handle, counting(1, 1):
        assert "cuda" in handle.devices
        ours = results(function, tensors)
    assert_close(ours, wanted, theirs)
    with counting(0, 0):
        results(function, tensors)


@needs_torchvision
@needs_core
def test_module():
    layer = torchvision.ops.DeformConv2d(4, 6, 3, padding=1, groups=2)
    x, offset = torch.randn(1, 4, 8, 8), torch.randn(1, 18, 8, 8)
    theirs = layer(x, offset)
    with accelerate(), counting(1, 0):
        torch.testing.assert_close(layer(x, offset), theirs)
    converted = deformnd.convert(layer, inplace=False, verbose=False)
    torch.testing.assert_close(converted(x, offset), theirs)


@needs_torchvision
@needs_core
def test_scripted(tmp_path):
    scripted = torch.jit.script(torchvision.ops.deform_conv2d)
    layer = torch.jit.script(torchvision.ops.DeformConv2d(6, 4, 3, padding=1))
    layer.save(tmp_path / "layer.pt")
    x, offset = torch.rand(1, 6, 8, 8), torch.randn(1, 18, 8, 8)
    theirs = layer(x, offset)
    tensors = arguments()
    with accelerate():
        with counting(1, 1):
            ours = results(
                lambda x, offset, weight, bias, mask: scripted(
                    x, offset, weight, bias, (2, 1), (1, 0), (1, 2), mask
                ),
                tensors,
            )
        with counting(1, 0):
            loaded = torch.jit.load(tmp_path / "layer.pt")(x, offset)
    assert_close(ours, expected(tensors))
    torch.testing.assert_close(loaded, theirs)


@needs_torchvision
@needs_core
def test_compiled_and_exported():
    """Graphs made before, inside or after the block all call torchvision's operator."""
    before = torch.compile(function, fullgraph=True)
    for mask, channels_last in itertools.product((True, False), repeat=2):
        tensors = arguments(mask, True, channels_last)
        wanted, theirs = expected(tensors), results(function, tensors)
        assert_close(results(before, tensors), wanted)
        with accelerate():
            inside = torch.compile(function, fullgraph=True)
            for call in (before, inside):
                with counting(1, 1):
                    assert_close(results(call, tensors), wanted, theirs)
        with counting(0, 0):
            assert_close(results(inside, tensors), wanted)

    class Model(torch.nn.Module):
        forward = staticmethod(function)

    tensors = [t.detach() for t in arguments()]
    program = torch.export.export(Model(), tuple(tensors))
    theirs = function(*tensors)
    with accelerate(), counting(1, 0):
        torch.testing.assert_close(program.module()(*tensors), theirs, rtol=1e-4, atol=1e-4)


@needs_torchvision
@needs_core
def test_dtypes():
    tensors = arguments(dtype=torch.float64)
    with accelerate():
        assert_close(results(function, tensors), expected(tensors))
        half = function(*arguments(dtype=torch.bfloat16))  # On CPUs torchvision has no bfloat16.
    assert half.dtype == torch.bfloat16


@needs_torchvision
@needs_core
def test_uses_are_nested_and_undone():
    tensors = arguments()
    first = accelerate()
    with accelerate():
        pass
    with counting(1, 0):
        function(*tensors)
    with pytest.raises(ZeroDivisionError), accelerate() as second:
        first.undo()
        first.undo()
        with counting(1, 0):
            function(*tensors)
        raise ZeroDivisionError
    second.undo()
    with counting(0, 0):
        function(*tensors)
    assert accelerate._uses == 0 and accelerate._undo is None
    with accelerate(), counting(1, 0):
        function(*tensors)


@needs_torchvision
def test_without_kernels(monkeypatch):
    monkeypatch.setattr(library, "compiled_keys", list)
    with pytest.raises(RuntimeError, match="without its compiled kernels"):
        accelerate()


def test_without_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="torchvision is not installed"):
        accelerate()


F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


@needs_torchvision
@needs_core
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("autocast", [F16, BF16], ids=str)
@pytest.mark.parametrize(
    "dtypes",  # in the order of input, offset, weight, bias and mask
    [(t,) * 5 for t in (F32, F16, BF16, F64)]
    + [(F32, BF16, F32, F32, BF16), (BF16, BF16, F32, F32, BF16), (F16, F32, F32, F32, F32)]
    + [(F32, F32, F16, F32, F32), (F32, F32, F32, F32, F16), (BF16, F16, F32, F16, F32)],
    ids=str,
)
def test_autocast(dtypes, autocast, device):
    """torchvision's rule for CUDA, on every device: computed in float32, given in input's dtype."""
    tensors = [t.detach().to(device) for t in arguments()]
    tensors = [t.to(d).requires_grad_() for t, d in zip(tensors, dtypes, strict=True)]
    wanted = expected(tensors)
    with accelerate(), counting(1, 1):
        with torch.autocast(device, dtype=autocast):
            y = function(*tensors)
        grad = torch.linspace(-1, 1, y.numel(), device=device).view(y.shape).to(y.dtype)
        got = [y.detach(), *torch.autograd.grad(y, tensors, grad)]
    assert [t.dtype for t in got] == [dtypes[0], *dtypes]
    tolerance = {F32: 1e-5, F64: 1e-5, F16: 2e-3, BF16: 1e-2}
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        # The output's gradient has the output's dtype, which is that of the input.
        rough = max(tolerance[a.dtype], tolerance[dtypes[0]])
        assert relative_error(a, b) < rough, i
    with accelerate(), torch.autocast(device, dtype=autocast), counting(1, 0):
        torch.compiler.reset()
        compiled = torch.compile(function, backend="eager", fullgraph=True)(*tensors)
    assert compiled.dtype == dtypes[0]


@needs_torchvision
@needs_core
def test_wrong_offset_groups():
    """torchvision's raw operator is told the number of groups, which must fit the offset."""
    x, offset, weight, bias, mask = (t.detach() for t in arguments())
    sizes = [2, 1, 1, 0, 1, 2, 2]
    with accelerate():
        right = torch.ops.torchvision.deform_conv2d(x, weight, offset, mask, bias, *sizes, 2, True)
        torch.testing.assert_close(right, function(x, offset, weight, bias, mask))
        with pytest.raises(
            ValueError,
            match=r"offset has 24 channels, expected 12 \(offset_groups 1 x 2 axes x 6 kernel",
        ):
            torch.ops.torchvision.deform_conv2d(x, weight, offset, mask, bias, *sizes, 1, True)
        with pytest.raises(ValueError, match=r"mask has 6 channels, expected 12 \(offset_groups 2"):
            function(x, offset, weight, bias, mask[:, :6])
        with pytest.raises(ValueError, match="offset_groups 3 x 2"):
            torch.ops.torchvision._deform_conv2d_backward(
                right, x, weight, offset, mask, bias, *sizes, 3, True
            )
