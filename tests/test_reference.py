"""The reference against brute force, the golden vectors, torch, and its own derivatives."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

import deformnd
from brute_force import brute_force
from cases import (
    AGGREGATES,
    ALL,
    CASES,
    Case,
    aggregate,
    golden,
    gradients,
    relative_error,
    requires_grad,
)
from deformnd.kernels import reference
from deformnd.kernels.geometry import FAMILIES

GOLDEN = golden()


FAMILY = {family.name: family for family in FAMILIES}


def reference_call(case, tensors):
    family, args = FAMILY[case.family], tuple(tensors.values())
    compute = reference.scatter if case.transposed else reference.gather
    return compute(family.geometry(*args, *case.operator_parameters()), *family.slots(args))


def reference_gradients(case, tensors, grad_output):
    family, args = FAMILY[case.family], tuple(tensors.values())
    g = family.geometry(*args, *case.operator_parameters())
    input, weight, offset, mask, _ = family.slots(args)
    pair = (grad_output, input) if case.transposed else (input, grad_output)
    needs = (True, True, weight is not None, offset is not None, mask is not None)
    found = reference.gradients(g, *pair, weight, offset, mask, needs)
    return {
        "input": found[1] if case.transposed else found[0],
        "weight": found[2],
        "offset": found[3],
        "mask": found[4],
    }


@pytest.mark.parametrize("case", ALL, ids=str)
def test_equals_brute_force(case):
    tensors = case.tensors()
    arrays = {k: None if t is None else t.numpy() for k, t in tensors.items()}
    expected = torch.from_numpy(brute_force(case, arrays))
    got = reference_call(case, tensors)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case, tensors, expected", GOLDEN, ids=[str(g[0]) for g in GOLDEN])
def test_golden_vectors(case, tensors, expected):
    tensors = requires_grad(tensors)
    output = case.call(tensors)
    torch.testing.assert_close(output, expected["output"], rtol=0, atol=1e-10)
    for name, grad in gradients(output, tensors, expected["grad_output"]).items():
        torch.testing.assert_close(grad, expected[f"grad_{name}"], rtol=0, atol=1e-10, msg=name)


def test_all_golden_vectors_are_there():
    assert len(GOLDEN) == 48


@pytest.mark.parametrize("case", ALL, ids=str)
def test_written_gradients_are_those_of_autograd(case):
    tensors = requires_grad(case.tensors())
    output = reference_call(case, tensors)
    grad_output = torch.randn_like(output)
    expected = gradients(output, tensors, grad_output)
    got = reference_gradients(case, tensors, grad_output)
    for name in expected.keys() - {"bias"}:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-11, msg=name)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_adjoint(n):
    """<deform_conv(x), y> == <x, deform_conv_transpose(y)> with the same weight."""
    case = Case((5, 6, 4)[:n], (3, 2, 3)[:n], padding=1, groups=2, offset_groups=2, mask_groups=4)
    tensors = case.tensors()
    x, weight, offset, mask, _ = tensors.values()
    conv = getattr(deformnd, f"deform_conv{n}d")
    transpose = getattr(deformnd, f"deform_conv_transpose{n}d")
    y = torch.randn_like(conv(x, weight, offset, mask, padding=1, groups=2))
    left = (conv(x, weight, offset, mask, padding=1, groups=2) * y).sum()
    right = (x * transpose(y, weight, offset, mask, padding=1, groups=2)).sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_zero_offset_and_unit_mask_is_the_ordinary_convolution(case):
    tensors = case.tensors()
    plain = dict(tensors, offset=None, mask=None)
    for name, value in (("offset", 0.0), ("mask", 1.0)):
        if tensors[name] is not None:
            tensors[name] = torch.full_like(tensors[name], value)
    torch.testing.assert_close(case.call(tensors), case.call(plain), rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", AGGREGATES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_aggregation_is_a_convolution_of_each_channel_with_ones(case, dtype):
    tensors = requires_grad(case.tensors(dtype))
    output = case.call(tensors)
    conv = dataclasses.replace(case, aggregate=False)
    expected = conv.call(case.as_conv(tensors))
    torch.testing.assert_close(output, expected)
    grad_output = torch.randn_like(output)
    wanted = gradients(expected, tensors, grad_output)
    for name, grad in gradients(output, tensors, grad_output).items():
        torch.testing.assert_close(grad, wanted[name], msg=name)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_whole_pixel_offset_is_a_shift(n):
    case = Case((6, 7, 5)[:n], (3, 3, 3)[:n], padding=1, mask_groups=0)
    tensors = case.tensors()
    shift = (1, -2, 1)[:n]
    offset = torch.zeros_like(tensors["offset"]).unflatten(1, (-1, n))
    for axis, pixels in enumerate(shift):
        offset[:, :, axis] = pixels
    tensors["offset"] = offset.flatten(1, 2)
    # What is `shift` pixels further on comes to the front; zeros follow.
    pad = [side for s in reversed(shift) for side in (-s, s)]
    shifted = F.pad(tensors["input"], pad)
    expected = case.call({**tensors, "input": shifted, "offset": None})
    got = case.call(tensors)
    # Border rows differ: the offset also reaches what the shifted image has cut off.
    keep = tuple(
        slice(1 + max(0, -s), size - 1 - max(0, s))
        for s, size in zip(shift, case.size, strict=True)
    )
    torch.testing.assert_close(got[(..., *keep)], expected[(..., *keep)], rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 1e-40])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "case",
    [
        Case((4, 5), (3, 3), padding=1, mask_groups=0, bias=False),
        Case((4, 5), (3, 3), True, padding=1, mask_groups=0, bias=False),
        aggregate((4, 5), (3, 3), 4, padding=1, mask_groups=0),
    ],
    ids=lambda case: case.family,
)
def test_extreme_positions_sample_zero_and_get_no_gradient(bad, dtype, case):
    tensors = requires_grad(case.tensors(dtype))
    outside = torch.tensor(bad, dtype=dtype).item() != 0 and abs(bad) != 1e-40
    with torch.no_grad():
        tensors["offset"][0, 4, 1, 2] = torch.tensor(bad, dtype=torch.float64)  # the y of one point
    output = case.call(tensors)
    grads = gradients(output, tensors, torch.ones_like(output))
    assert output.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads.values())
    if outside:
        # As if this one sample had mask 0, whatever its x is.
        mask = torch.ones(2, 9, *case.point_size, dtype=dtype)
        mask[0, 2, 1, 2] = 0
        with torch.no_grad():
            tensors["offset"][0, 4, 1, 2] = 0.5
        torch.testing.assert_close(output, case.call(dict(tensors, mask=mask)))
        assert grads["offset"][0, 4, 1, 2] == 0 and grads["offset"][0, 5, 1, 2] == 0


def test_whole_positions_lie_in_the_cell_that_begins_there():
    """At -1 the value is 0 but the offset has a gradient; at the far end it has none."""
    input = torch.ones(1, 1, 3, dtype=torch.float64)
    weight = torch.ones(1, 1, 1, dtype=torch.float64)
    offset = torch.tensor([[[-1.0, 2.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    output = deformnd.deform_conv1d(input, weight, offset)
    torch.testing.assert_close(output[0, 0], torch.tensor([0.0, 0, 1], dtype=torch.float64))
    (grad,) = torch.autograd.grad(output.sum(), offset)
    torch.testing.assert_close(grad[0, 0], torch.tensor([1.0, 0, -1], dtype=torch.float64))


def test_a_not_finite_pixel_does_not_leak_into_samples_outside():
    input = torch.full((1, 1, 3, 3), float("nan"))
    weight = torch.ones(1, 1, 1, 1)
    offset = torch.full((1, 2, 3, 3), 100.0)
    assert (deformnd.deform_conv2d(input, weight, offset) == 0).all()
    assert (deformnd.deform_aggregate2d(input, offset, None, 1) == 0).all()


@pytest.mark.parametrize("case", [c for c in ALL if c.batch], ids=str)
@pytest.mark.parametrize("dtype, limit", [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_half_precision(case, dtype, limit):
    half = case.tensors(dtype)
    half["offset"] = None if half["offset"] is None else half["offset"].float()
    half = requires_grad(half)
    exact = requires_grad({k: None if t is None else t.double() for k, t in half.items()})
    output, expected = case.call(half), case.call(exact)
    assert output.dtype == dtype
    assert relative_error(output, expected) < limit
    grad_output = torch.randn_like(expected).to(dtype)
    got = gradients(output, half, grad_output)
    for name, grad in gradients(expected, exact, grad_output.double()).items():
        assert got[name].dtype == half[name].dtype
        assert relative_error(got[name], grad) < limit, name
