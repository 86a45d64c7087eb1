"""The pictures show what the operators do: positions are compared with what is really sampled."""

import importlib.util
import math

import pytest
import torch
from torch import nn

import deformnd
from cases import CASES
from deformnd import viz

needs_matplotlib = pytest.mark.skipif(
    not importlib.util.find_spec("matplotlib"), reason="matplotlib is not installed"
)


def sampled(step, size):
    """Where the operator samples, by the operator itself: positions [OG, K, n, *out].

    Each image channel holds a coordinate, and each output channel picks one kernel point of one
    channel, so that it returns the coordinate of the sample.
    """
    n, points = len(size), math.prod(step.kernel)
    groups = step.offset.shape[0] // (points * n)
    grids = torch.meshgrid(*[torch.arange(s, dtype=torch.float64) for s in size], indexing="ij")
    image = torch.stack(grids).repeat(groups, *[1] * n)
    weight = torch.zeros(groups, points, n, groups, n, points, dtype=torch.float64)
    for g in range(groups):
        for k in range(points):
            for a in range(n):
                weight[g, k, a, g, a, k] = 1
    weight = weight.reshape(groups * points * n, groups * n, *step.kernel)
    function = getattr(deformnd, f"deform_conv{n}d")
    out = function(image, weight, step.offset, None, None, *step[1:4])
    return out.reshape(groups, points, n, *out.shape[1:])


PLACED = [case for case in CASES if not case.transposed and case.batch and case.offset_groups]


@pytest.mark.parametrize("case", PLACED, ids=str)
def test_positions_are_those_the_operator_samples(case):
    tensors = case.tensors()
    n, points = case.n, math.prod(case.kernel)
    parameters = [case.values(name) for name in ("stride", "padding", "dilation")]
    offset, mask = (None if t is None else t[0] for t in (tensors["offset"], tensors["mask"]))
    step = viz.Step(case.kernel, *parameters, offset, mask)
    expected = sampled(step, case.size)
    size = torch.tensor(case.size, dtype=torch.float64)
    inside = 0
    for at in [
        (0,) * n,
        tuple(s - 1 for s in case.point_size),
        tuple(s // 2 for s in case.point_size),
    ]:
        for group in range(case.offset_groups):
            found = viz.follow([step], at, group=group)
            assert found.positions.shape == (points, n)
            ok = ((found.positions >= 0) & (found.positions <= size - 1)).all(1)
            inside += int(ok.sum())
            here = expected[(group, slice(None), slice(None), *at)]
            torch.testing.assert_close(found.positions[ok], here[ok])
        together = viz.follow([step], at)
        assert len(together.positions) == case.offset_groups * points
        if mask is not None and case.mask_groups == case.offset_groups:
            torch.testing.assert_close(together.weights, mask[(slice(None), *at)])
    assert inside or case.size == (1, 1)


def test_masks_of_other_groups():
    """Channels in quarters: two offset groups meet masks (0, 1) and (2, 3); or all meet one."""
    offset, mask = torch.zeros(2 * 2, 3, 3), torch.arange(4.0)[:, None, None].expand(4, 3, 3)
    step = viz.Step((1, 1), (1, 1), (0, 0), (1, 1), offset, mask)
    assert viz.follow([step], (0, 0)).weights.tolist() == [0.5, 2.5]
    step = step._replace(mask=mask[2:3])
    assert viz.follow([step], (0, 0)).weights.tolist() == [2, 2]
    assert viz.follow([step._replace(offset=None)], (1, 2)).positions.tolist() == [[1, 2]]


def test_stacked_layers():
    """A stem with stride 2, and two deformable layers: each sample is looked up one layer below."""
    torch.manual_seed(0)
    first = deformnd.PackedDeformConv2d(4, 4, 3, padding=1, modulated=True)
    second = deformnd.PackedDeformConv2d(4, 4, (1, 3), 2, padding="valid", dilation=(1, 2))
    for layer in (first, second):
        nn.init.normal_(layer.offset_generator.weight)
    nn.init.normal_(first.mask_generator.weight)
    stem = nn.Conv2d(1, 4, 3, stride=2, padding=1)
    network = nn.Sequential(stem, nn.Sequential(nn.ReLU(), first), nn.BatchNorm2d(4), second).eval()
    image = torch.randn(2, 1, 40, 36)
    steps = viz.steps(network, image, index=1)
    assert [step.stride for step in steps] == [(2, 2), (1, 1), (2, 2)]
    found, regular = viz.follow(steps, (3, 2)), viz.follow(steps, (3, 2), deformed=False)

    with torch.no_grad():
        features = stem(image)[1:].relu()
        offset, mask = first._offset(features)[0], first._mask(features)[0]
        upper = second._offset(network[2](first(features)))[0, :, 3, 2].view(3, 2)
    positions, weights = [], []
    for k in range(3):
        y, x = (torch.tensor([6, 4 + 2 * k]) + upper[k]).round().long().tolist()
        if not (0 <= y < 20 and 0 <= x < 18):
            continue
        for tap in range(9):
            dy, dx = offset[2 * tap, y, x], offset[2 * tap + 1, y, x]
            # The stem's stride is 2, and its window's centre the pixel itself.
            positions.append([2 * (y - 1 + tap // 3 + dy), 2 * (x - 1 + tap % 3 + dx)])
            weights.append(mask[tap, y, x])
    assert positions
    torch.testing.assert_close(found.positions, torch.tensor(positions))
    torch.testing.assert_close(found.weights, torch.tensor(weights))
    assert len(regular.positions) == 27 and regular.weights.eq(1).all()
    assert regular.positions[:2].tolist() == [[10, 6], [10, 8]]


def test_aggregations():
    torch.manual_seed(0)
    layer = deformnd.PackedDeformAggregate2d(4, 3, 2, "valid", offset_groups=2, mask_groups=2)
    nn.init.normal_(layer.offset_generator.weight)
    nn.init.normal_(layer.mask_generator.weight)
    image = torch.randn(2, 4, 9, 8)
    (step,) = viz.steps(layer, image, index=1)
    assert step[:4] == ((3, 3), (2, 2), (0, 0), (1, 1))
    torch.testing.assert_close(step.offset, layer.offset_generator(image)[1])
    found = viz.follow([step], (2, 1), group=1)
    assert found.positions.shape == (9, 2)
    torch.testing.assert_close(found.weights.sum(), torch.tensor(1.0))


class Pack(nn.Module):
    """A hand-written pack, with names of its own, around one DeformConv2d."""

    def __init__(self):
        super().__init__()
        self.where = nn.Conv2d(2, 18, 3, padding=1)
        self.layer = deformnd.DeformConv2d(2, 2, 3, padding=1)

    def forward(self, x):
        return self.layer(x, offset=self.where(x))


def test_hand_written_pack_and_pooling():
    torch.manual_seed(0)
    pack, image = Pack(), torch.randn(1, 2, 9, 9)
    pool, step = viz.steps([nn.MaxPool2d(2), pack], image)
    assert pool.kernel == (2, 2) and pool.stride == (2, 2) and pool.offset is None
    torch.testing.assert_close(step.offset, pack.where(nn.MaxPool2d(2)(image))[0])
    # The corner tap of the pooled position (1, 1) is (0, 0), whose window's centre is (.5, .5).
    zero = step._replace(offset=torch.zeros_like(step.offset))
    assert viz.follow([pool, zero], (1, 1)).positions[0].tolist() == [0.5, 0.5]


def test_errors():
    image = torch.rand(1, 4, 8, 8)
    with pytest.raises(ValueError, match="cannot be followed through AdaptiveAvgPool2d"):
        viz.steps([nn.AdaptiveAvgPool2d(1)], image)
    with pytest.raises(ValueError, match="through PackedDeformConvTranspose2d"):
        viz.steps([deformnd.PackedDeformConvTranspose2d(4, 4, 3)], image)
    steps = viz.steps([deformnd.PackedDeformConv2d(4, 4, 3)], image)
    with pytest.raises(ValueError, match=r"at is \(6, 0\), expected 2 indices within \(6, 6\)"):
        viz.follow(steps, (6, 0))
    with pytest.raises(ValueError, match="group is 1, expected one of the 1 offset groups"):
        viz.follow(steps, (0, 0), group=1)
    with pytest.raises(ValueError, match=r"offset has shape \[9, 4, 4\]"):
        viz.draw_offset(torch.zeros(9, 4, 4), 3)


@needs_matplotlib
def test_flow_colours():
    down, left = torch.tensor([[[2.0]], [[0.0]]]), torch.tensor([[[0.0]], [[-1.0]]])
    torch.testing.assert_close(viz.flow_colours(down, 2.0).flatten(), torch.tensor([0.5, 1, 0]))
    torch.testing.assert_close(viz.flow_colours(left, 2.0).flatten(), torch.tensor([0.5, 1, 1]))
    assert viz.flow_colours(torch.full((2, 1, 1), math.nan), 1.0).tolist() == [[[1, 1, 1]]]


@needs_matplotlib
def test_drawings_show_the_values():
    """What matplotlib was given, for each rank; groups in their own tiles, (dy, dx) in order."""
    import matplotlib.pyplot as plt

    torch.manual_seed(0)
    for n in (1, 2, 3):
        size, points = (5, 6, 7)[:n], 2**n
        offset, mask = torch.randn(2 * points * n, *size), torch.rand(3 * points, *size)
        figure = viz.draw_offset(offset, 2)
        assert len(figure.axes) == 2
        shown = torch.as_tensor(figure.axes[1].images[0].get_array())
        second = offset.view(2, points, n, *size)[1]
        if n == 1:
            torch.testing.assert_close(shown, second[:, 0])
        else:
            flow = second.mean(0)[-2:] if n == 2 else second.mean(0)[-2:, 2]
            largest = offset.view(2, points, n, *size).mean(1)[:, -2:]
            largest = largest if n == 2 else largest[:, :, 2]
            bound = float(largest.norm(dim=1).max())
            torch.testing.assert_close(shown, viz.flow_colours(flow, bound))
        figure = viz.draw_mask(mask, 2, point=1)
        heat = torch.as_tensor(figure.axes[2].images[0].get_array())
        expected = mask.view(3, points, *size)[2, 1]
        torch.testing.assert_close(heat, {1: expected[None], 2: expected, 3: expected[2:3][0]}[n])

        kernel, one = (2,) * n, (1,) * n
        samples = viz.follow([viz.Step(kernel, one, one, one, offset, None)], (1,) * n)
        axes = viz.draw_samples(torch.rand(1, *size), samples, samples)
        drawn = [
            torch.as_tensor(axis.collections[1].get_offsets()).float()
            for axis in (axes if n == 3 else [axes])
        ]
        if n == 1:
            torch.testing.assert_close(drawn[0][:, 0], samples.positions[:, 0])
        elif n == 2:
            torch.testing.assert_close(drawn[0], samples.positions.flip(1))
        else:
            inside = (samples.positions[:, 0] > -0.5) & (samples.positions[:, 0] < 4.5)
            assert sum(map(len, drawn)) == int(inside.sum())
    plt.close("all")


@needs_matplotlib
def test_animation(tmp_path):
    from PIL import Image

    torch.manual_seed(0)
    layer = deformnd.PackedDeformConv2d(1, 1, 3, padding=1)
    nn.init.normal_(layer.offset_generator.weight)
    path = tmp_path / "moving.gif"
    viz.animate(path, layer, torch.rand(3, 1, 12, 12), [(4, 4), (8, 6)])
    with Image.open(path) as image:
        assert image.format == "GIF" and image.n_frames == 3
    with pytest.raises(ValueError, match="frames have 3 axes"):
        viz.animate(path, layer, torch.rand(3, 1, 4, 4, 4), [(0, 0, 0)])
