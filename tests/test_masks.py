import pytest
import torch

import deformnd


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("unbatched", [False, True])
def test_softmax_over_the_kernel_points_of_each_group(n, unbatched):
    kernel = (3, 2, 1)[:n]
    points = torch.Size(kernel).numel()
    mask = torch.randn(2, 4 * points, *(5, 4, 3)[:n], dtype=torch.float64, requires_grad=True)
    function = getattr(deformnd, f"mask_softmax{n}d")
    expected = torch.cat([part.softmax(1) for part in mask.split(points, 1)], 1)
    if unbatched:
        mask, expected = mask[0], expected[0]
    torch.testing.assert_close(function(mask, kernel), expected)
    module = getattr(deformnd, f"MaskSoftmax{n}d")(kernel)
    assert torch.equal(module(mask), function(mask, kernel))
    assert torch.equal(torch.jit.script(module)(mask), function(mask, kernel))
    assert torch.autograd.gradcheck(module, (mask,))
    assert str(kernel) in repr(module)


def test_sigmoid():
    mask = torch.tensor([0.0, 50.0, -50.0])
    torch.testing.assert_close(deformnd.mask_sigmoid(mask), torch.tensor([1.0, 2.0, 0.0]))
    module = deformnd.MaskSigmoid(scale=3)
    assert torch.equal(torch.jit.script(module)(mask), deformnd.mask_sigmoid(mask, 3.0))
    assert repr(module) == "MaskSigmoid(scale=3.0)"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: deformnd.mask_sigmoid(torch.zeros(1), 0.0), "mask_sigmoid: scale is 0.0"),
        (
            lambda: deformnd.mask_softmax2d(torch.zeros(1, 10, 2, 2), 3),
            "mask_softmax2d: mask has 10 channels, expected a multiple of 9 kernel points",
        ),
        (
            lambda: deformnd.mask_softmax2d(torch.zeros(1, 0, 2, 2), 3),
            "mask_softmax2d: mask has 0 channels",
        ),
        (
            lambda: deformnd.mask_softmax1d(torch.zeros(1, 9, 2, 2), 3),
            "mask_softmax1d: mask has 4 dimensions, expected 3 or 2",
        ),
        (
            lambda: deformnd.mask_softmax3d(torch.zeros(1, 9, 2, 2, 2), (3, 3)),
            "mask_softmax3d: kernel_size is (3, 3), expected an int or 3 ints",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)


MASK = torch.zeros(1, 18, 4, 4)


@pytest.mark.parametrize(
    "error, size, message",
    [
        (ValueError, (-3, -3), "kernel_size is (-3, -3), expected an int or 2 ints from 1 to"),
        (ValueError, -3, "kernel_size is -3, expected an int or 2 ints from 1 to"),
        (ValueError, 10**30, "kernel_size is 1000"),
        (TypeError, True, "kernel_size is True, expected an int or 2 ints"),
        (TypeError, torch.tensor(3), "kernel_size is tensor(3), expected an int or 2 ints"),
        (TypeError, 3.0, "kernel_size is 3.0, expected an int or 2 ints"),
    ],
)
def test_kernel_sizes_that_are_none(error, size, message):
    for make in (deformnd.MaskSoftmax2d, lambda size: deformnd.mask_softmax2d(MASK, size)):
        with pytest.raises(error) as caught:
            make(size)
        assert message in str(caught.value)


def test_masks_that_are_none():
    for mask, message in (
        (MASK.long(), "mask has dtype torch.int64, expected one of float16"),
        (MASK.to_sparse(), "mask has layout torch.sparse_coo, expected torch.strided"),
        ([1.0], "mask is a list, expected a Tensor"),
    ):
        for call in (deformnd.mask_sigmoid, lambda m: deformnd.mask_softmax2d(m, 3)):
            with pytest.raises(TypeError, match=r"mask_s.*: ") as caught:
                call(mask)
            assert message in str(caught.value)
    for error, scale in (
        *((ValueError, v) for v in (-1, float("nan"), float("inf"))),
        *((TypeError, v) for v in ("2", True, None)),
    ):
        for make in (deformnd.MaskSigmoid, lambda scale: deformnd.mask_sigmoid(MASK, scale)):
            with pytest.raises(error, match=r"(?i)mask_?sigmoid: scale is "):
                make(scale)


def test_checks_in_torchscript():
    with pytest.raises(torch.jit.Error, match="scale is -1"):
        torch.jit.script(deformnd.mask_sigmoid)(MASK, -1.0)
    with pytest.raises(torch.jit.Error, match="kernel_size is"):
        torch.jit.script(deformnd.mask_softmax2d)(MASK, (-3, -3))


def test_a_scale_that_is_a_tensor():
    mask, scale = torch.randn(1, 9, 4, 4), torch.tensor(2.0, requires_grad=True)
    result = deformnd.mask_sigmoid(mask, scale)
    assert torch.equal(result, deformnd.mask_sigmoid(mask, 2.0))
    result.sum().backward()
    torch.testing.assert_close(scale.grad, mask.sigmoid().sum())
    assert deformnd.MaskSigmoid(scale).scale == 2.0
    traced = torch.jit.trace(lambda m: deformnd.mask_sigmoid(m, m.shape[2]), mask)
    for m in (mask, mask[:, :, :3]):
        assert torch.equal(traced(m), deformnd.mask_sigmoid(m, m.shape[2]))
    with pytest.raises(ValueError, match=r"mask_sigmoid: scale is -2\.0"):
        deformnd.mask_sigmoid(mask, -scale)
    with pytest.raises(TypeError, match="scale is tensor"):
        deformnd.mask_sigmoid(mask, torch.ones(2))
