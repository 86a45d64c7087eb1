"""No file for target "standard" samples outside an image, where several engines are wrong."""

import dataclasses
import itertools

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

import test_onnx_attention as attention
from cases import relative_error
from test_onnx import DYNAMIC, MORE, SOME, Calls, Case, save

KINDS = ("input", "offset", "mask")
BAD = (7.0, -9.0, 1e4, -3e9, 3e38, float("inf"), -float("inf"), float("nan"))


class GridSample(OpRun):
    """NaN where a corner of the sample is outside the image, even if its weight is 0."""

    op_domain = ""

    def _run(self, image, grid, mode=None, padding_mode=None, align_corners=None):
        assert (mode, align_corners) == ("linear", 0)
        height, width = image.shape[2:]
        x, y = (((grid[..., i] + 1) * s - 1) / 2 for i, s in ((0, width), (1, height)))
        top, left = np.floor(y), np.floor(x)
        with np.errstate(invalid="ignore"):
            inside = (top >= 0) & (top < height - 1) & (left >= 0) & (left < width - 1)
        result = np.zeros((*image.shape[:2], *x.shape[1:]), image.dtype)
        batch = np.arange(len(image))[:, None, None]
        for i, j in itertools.product((0, 1), (0, 1)):
            row, column = top + i, left + j
            share = (1 - abs(y - row)) * (1 - abs(x - column))
            row, column = (np.where(inside, t, 0).astype(int) for t in (row, column))
            values = image.transpose(0, 2, 3, 1)[batch, row, column].transpose(0, 3, 1, 2)
            result += values * np.where(inside, share, np.nan)[:, None].astype(image.dtype)
        return (result,)


def run(path, args):
    proto = onnx.load(path)
    assert any(node.op_type == "GridSample" for node in proto.graph.node)
    feed = {i.name: a.numpy() for i, a in zip(proto.graph.input, args, strict=True)}
    return map(torch.from_numpy, ReferenceEvaluator(proto, new_ops=[GridSample]).run(None, feed))


def compare(results, exact, dtype):
    bound = {torch.float16: 1e-3, torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    for got, want in zip(results, exact, strict=True):
        assert got.dtype == dtype
        assert relative_error(got, want) < bound


CALLS = [c for c in SOME + MORE if not c.transposed and (c.offset_groups or c.mask_groups)]
CALLS += [Case((1,) * n, (2,) * n, padding=1, batch=1, channels=(2, 2)) for n in (1, 2, 3)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_convolutions(dtype, tmp_path):
    model = Calls(CALLS, dtype)
    save(model, tmp_path / "model.onnx", "standard")
    for bad in (0.5, *BAD):
        args = [a if a is None else a.clone() for a in model.args]
        for offset in args[1::3]:
            offset.view(-1)[:: 1 if bad == 0.5 else 3] = bad
        given = [a for a in args if a is not None]
        compare(run(tmp_path / "model.onnx", given), model.exact(args), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_attention(dtype, tmp_path):
    args = attention.inputs(dtype)
    attention.save(tmp_path / "model.onnx", args, "standard")
    for bad in (None, *BAD):
        given = [t.clone() for t in args]
        for locations in given[1::3] if bad is not None else ():
            locations.view(-1)[::3] = bad
        compare(run(tmp_path / "model.onnx", given), attention.exact(given), dtype)


def test_open_sizes(tmp_path):
    """Of convolutions and an aggregation in every rank, the sizes of which the graph computes."""
    cases = [Case(s, (2,) * len(s), padding=1, channels=(2, 2)) for s in ((5,), (4, 5), (3, 4, 2))]
    cases.append(dataclasses.replace(cases[1], aggregate=True, bias=False, groups=2))
    model = Calls(cases)
    axes = [{a: DYNAMIC for a in range(t.dim()) if a != 1} for t in model.args]
    save(model, tmp_path / "model.onnx", "standard", dynamic_shapes=(tuple(axes),))
    for grown in (0, 1):
        larger = [dataclasses.replace(c, size=tuple(s + grown for s in c.size)) for c in cases]
        args = [a.float() for c in larger for k, a in c.tensors().items() if k in KINDS]
        args[1].view(-1)[::3] = float("inf")
        compare(run(tmp_path / "model.onnx", args), model.exact(args), torch.float32)


def test_the_border_hides_no_pixel(tmp_path):
    """A sample far outside is 0 where the pixels are infinite, too."""
    model = Calls([Case((4, 5), (2, 2), padding=1, mask_groups=0)])
    save(model, tmp_path / "model.onnx", "standard")
    args = [a for a in model.args if a is not None]
    args[0], args[1] = torch.full_like(args[0], float("inf")), torch.full_like(args[1], 99.0)
    (got,) = run(tmp_path / "model.onnx", args)
    assert torch.equal(got, model.parameter_list[1].detach()[:, None, None].expand_as(got))
