"""The pictures show what the operators do: positions are compared with what is really sampled."""

import importlib.util
import math
import sys

import pytest
import torch
from torch import nn

import deformnd
from cases import CASES
from deformnd import viz
from deformnd.compat import internimage

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
    """Two offset groups share channels with mask groups (0, 1) and (2, 3), or all with one."""
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


class Aggregation(nn.Module):
    """A hand-written block that calls functions, not layers."""

    def __init__(self, kernel=3, padding="same"):
        super().__init__()
        self.options = kernel, 1, padding
        points = kernel**2
        self.where = nn.Conv2d(4, 2 * points, 1)
        self.mask = nn.Conv2d(4, points, 1)

    def forward(self, x):
        return deformnd.deform_aggregate2d(x, self.where(x), self.mask(x), *self.options)


@pytest.mark.parametrize("kernel", [3, 2])
def test_hand_written_calls_of_functions(kernel):
    """The zero that padding='same' puts behind an even kernel's input moves nothing."""
    torch.manual_seed(0)
    block, image = Aggregation(kernel), torch.randn(2, 4, 9, 8)
    (step,) = viz.steps(block, image, index=1)
    assert step[:4] == ((kernel,) * 2, (1, 1), ((kernel - 1) // 2,) * 2, (1, 1))
    torch.testing.assert_close(step.offset, block.where(image)[1])
    torch.testing.assert_close(step.mask, block.mask(image)[1])
    smaller = nn.Sequential(nn.AvgPool2d(2), Aggregation())
    smaller.add_module("up", nn.Upsample(scale_factor=2))
    assert len(viz.steps(smaller[:2], image)) == 2
    whole = nn.Module()
    whole.inner = smaller
    whole.forward = smaller.forward
    message = "Module does not call its deform_aggregate2d on an input of its own size"
    with pytest.raises(ValueError, match=message):
        viz.steps(whole, image)


def test_layers_without_offset_and_of_another_padding():
    image = torch.randn(1, 4, 9, 8)
    plain = deformnd.PackedDeformConv2d(4, 4, 3, padding=1, deformable=False)
    assert viz.steps(plain, image) == [viz.Step((3, 3), (1, 1), (1, 1), (1, 1))]
    layer = deformnd.PackedDeformConv2d(4, 4, 2, padding=(1, 2), padding_mode="reflect")
    (step,) = viz.steps(layer, image)
    assert step.padding == (1, 2) and step.offset.shape == (8, 10, 11)


def test_batches():
    """Where one image is expected, one of a batch may be named."""
    torch.manual_seed(0)
    offset, mask = torch.randn(3, 18, 8, 7), torch.rand(3, 9, 8, 7)
    step = viz.Step((3, 3), (1, 1), (1, 1), (1, 1), offset, mask)
    alone = step._replace(offset=offset[2], mask=mask[2])
    for found, expected in zip(
        viz.follow([step], (2, 3), index=2), viz.follow([alone], (2, 3)), strict=True
    ):
        torch.testing.assert_close(found, expected)
    one = step._replace(offset=offset[:1], mask=mask[:1])
    assert len(viz.follow([one], (0, 0)).positions) == 9
    with pytest.raises(ValueError, match="follow: offset is of 3 images, expected an index"):
        viz.follow([step], (0, 0))
    with pytest.raises(ValueError, match="follow: index is 3, expected one of the 3 images"):
        viz.follow([step], (0, 0), index=3)
    with pytest.raises(ValueError, match=r"follow: mask has shape \[9, 8\], expected"):
        viz.follow([alone._replace(mask=mask[0, :, :, 0])], (0, 0))


@needs_matplotlib
@pytest.mark.parametrize("kernel", [3, (3, 3)])
def test_batches_drawn(kernel):
    import matplotlib.pyplot as plt

    torch.manual_seed(0)
    offset, mask = torch.randn(3, 36, 8, 7), torch.rand(3, 9, 8, 7)

    def pixels(figure):
        return [torch.as_tensor(a.images[0].get_array()) for a in figure.axes if a.images]

    for draw, field in ((viz.draw_offset, offset), (viz.draw_mask, mask)):
        expected = pixels(draw(field[1], kernel))
        for figure in (draw(field, kernel, index=1), draw(field[1:2], kernel)):
            for found, tile in zip(pixels(figure), expected, strict=True):
                torch.testing.assert_close(found, tile)
        with pytest.raises(ValueError, match="index"):
            draw(field, kernel)
    plt.close("all")


class Model(nn.Module):
    """Branches, layouts and layers of every family, none of them on a chain from the input."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.left = nn.ModuleDict(
            {
                "packed": deformnd.PackedDeformConv2d(8, 8, 3, padding=1, offset_groups=2),
                "lazy": deformnd.LazyPackedDeformConv2d(8, 3, padding=1, modulated=True),
                "plain": deformnd.DeformConv2d(8, 8, 1),
                "aggregate": deformnd.PackedDeformAggregate2d(8, 3, padding=1),
                "up": deformnd.PackedDeformConvTranspose2d(8, 8, 4, stride=2, padding=1),
                "regular": deformnd.PackedDeformConv2d(8, 8, 1, deformable=False),
                "pack": Pack(),
            }
        )
        self.v3 = internimage.DCNv3(8, group=2, offset_scale=2.0)
        self.v4 = internimage.DCNv4(8, group=2, remove_center=True)
        self.functions = Aggregation()
        self.unused = nn.Linear(1, 1)

    def forward(self, x):
        x = self.norm(self.stem(x))
        batch, _, height, width = x.shape
        found = []
        for name, layer in self.left.items():
            if name == "plain":
                found.append(layer(x, x.new_full((batch, 2, height, width), 1.5)))
            else:
                found.append(layer(x[:, :2] if name == "pack" else x))
        found.append(self.v3(x.permute(0, 2, 3, 1)))
        found.append(self.v4(x.flatten(2).transpose(1, 2), shape=(height, width)))
        return [*found, self.functions(x[:, :4]), self.functions(x[:, 4:, ::2])]


def drawn(figure, part=0):
    """The samples on the first axes of a part of a figure, [N, 2] as (y, x), for each location."""
    dots = figure.subfigs[part].axes[0].collections[1::2]
    return [torch.as_tensor(d.get_offsets()).float().flip(1) for d in dots]


@needs_matplotlib
def test_show_every_layer_of_a_model():
    import matplotlib.pyplot as plt

    torch.manual_seed(0)
    model, images = Model(), torch.rand(2, 3, 32, 24)
    for name, layer in model.left.items():
        if hasattr(layer, "offset_generator") and name not in ("lazy", "regular"):
            nn.init.normal_(layer.offset_generator.weight)
    before = model.norm.running_mean.clone()
    parts = {"packed": 2, "lazy": 3, "plain": 2, "aggregate": 3, "up": 2, "pack": 2}
    names = {f"left.{name}": count for name, count in parts.items()}
    names |= {"left.pack.layer": 2, "v3": 3, "v4": 3, "functions": 3}
    for name, count in names.items():
        figure = viz.show(model, name, images, index=1)
        assert len(figure.subfigs) == count and len(drawn(figure)) == 4, name
        assert figure.get_suptitle().startswith(f"{name}: ")
        plt.close(figure)
    # It was run as in eval mode, and left as it was.
    assert model.training and model.norm.training
    torch.testing.assert_close(model.norm.running_mean, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    # Positions of the layer's input in pixels of the image: four times those, with equal borders.
    model.eval()
    with torch.no_grad():
        x = model.norm(model.stem(images))
        offset = model.left["packed"]._offset(x)[1]
    step = viz.Step((3, 3), (1, 1), (1, 1), (1, 1), offset)
    figure = viz.show(model, "left.packed", images[1], (3, 2))
    (found,) = drawn(figure)
    expected = (viz.follow([step], (3, 2)).positions + 0.5) * 4 - 0.5
    torch.testing.assert_close(found, expected)
    figure = viz.show(model, "left.packed", images, [(3, 2), [0, 5]], index=1, group=1)
    expected = (viz.follow([step], (0, 5), group=1).positions + 0.5) * 4 - 0.5
    torch.testing.assert_close(drawn(figure)[1], expected)
    assert [a.get_title()[:7] for a in figure.subfigs[1].axes] == ["group 1"]
    (found,) = drawn(viz.show(model, "left.plain", images, (3, 2)))
    torch.testing.assert_close(
        found, torch.tensor([[(4.5 + 0.5) * 4 - 0.5, (3.5 + 0.5) * 4 - 0.5]])
    )
    # A transposed layer's positions are in its output, which has twice the input's size here.
    offset = model.left["up"]._offset(x)[0]
    step = viz.Step((4, 4), (2, 2), (1, 1), (1, 1), offset)
    (found,) = drawn(viz.show(model, "left.up", images, (3, 2)))
    expected = (viz.follow([step], (3, 2)).positions + 0.5) * 2 - 0.5
    torch.testing.assert_close(found, expected)
    # Half of the second input's rows are as many rows of the image.
    (found,) = drawn(viz.show(model, "functions", images, (1, 2), call=1))
    (step,) = viz.steps(model.functions, x[:, 4:, ::2])
    expected = (viz.follow([step], (1, 2)).positions + 0.5) * torch.tensor([8, 4]) - 0.5
    torch.testing.assert_close(found, expected)
    plt.close("all")


@pytest.mark.parametrize("remove_center", [False, True])
def test_positions_of_internimages_layers(remove_center):
    """Channels hold coordinates: with all mask on one point, the output is where that samples."""
    torch.manual_seed(0)
    points = 9 - remove_center
    layer = internimage.DCNv4(
        2, group=1, offset_scale=1.5, remove_center=remove_center, without_pointwise=True
    )
    image = torch.stack(torch.meshgrid(torch.arange(9.0), torch.arange(7.0), indexing="ij"), -1)
    bias = torch.zeros_like(layer.offset_mask.bias)
    bias[: 2 * points] = torch.rand(2 * points) - 0.5
    for point in range(points):
        bias[2 * points : 3 * points] = 0
        bias[2 * points + point] = 1
        layer.offset_mask.bias.data.copy_(bias)
        with torch.no_grad():
            expected = layer(image.flatten(0, 1)[None], shape=(9, 7)).view(9, 7, 2)[4, 3]
        with viz._watch(layer) as calls, torch.no_grad():
            layer(image.flatten(0, 1)[None], shape=(9, 7))
        assert calls[0].size == (9, 7)
        found = viz.follow([calls[0].step], (4, 3))
        assert found.weights.sum() == 1
        torch.testing.assert_close(found.positions[found.weights.argmax()], expected)
    v3, images = internimage.DCNv3(4, group=2), torch.rand(1, 9, 7, 4)  # channels last
    assert viz.steps(v3, images)[0].offset.shape == (36, 9, 7)


@needs_matplotlib
@pytest.mark.parametrize("n", [1, 2, 3])
def test_show_in_each_rank(n):
    import matplotlib.pyplot as plt

    torch.manual_seed(0)
    layer = getattr(deformnd, f"PackedDeformConv{n}d")(2, 2, 3, padding=1, modulated=True)
    nn.init.normal_(layer.offset_generator.weight)
    image = torch.rand(2, *(9, 8, 7)[:n])
    compiled = torch.compile(nn.Sequential(layer), backend="eager")
    scripted = nn.Sequential(torch.jit.script(layer))
    for model, name, given in (
        (layer, "", image),
        (compiled, "_orig_mod.0", image),
        (scripted, "", image[None]),
    ):
        figure = viz.show(model, name, given)
        samples = sum(map(len, drawn(figure)))
        assert len(figure.subfigs) == 3
        assert samples == {1: 2 * 3, 2: 4 * 9}[n] if n < 3 else 0 < samples <= 4 * 27
        plt.close(figure)
    with pytest.raises(ValueError, match=rf"image has {n % 3 + 1} axes, expected the {n}"):
        viz.show(layer, "", torch.rand(1, 2, *[8] * (n % 3 + 1)), inputs=(image[None],))
    plt.close("all")


@needs_matplotlib
def test_show_says_what_is_wrong():
    model, images = Model(), torch.rand(2, 3, 32, 24)
    for name, message in {
        "left.pakced": "the model has no module 'left.pakced'; names like it: 'left.packed'",
        "nonsense": "no module 'nonsense'; deformable layers of the model: 'left.packed', ",
        "norm": "'norm', a BatchNorm2d, made no call of deform_conv, deform_conv_transpose or",
        "unused": "'unused', a Linear, made no call",
        "left.regular": "'left.regular' has neither offset nor mask",
    }.items():
        with pytest.raises(ValueError, match=f"show: .*{message}"):
            viz.show(model, name, images)
    for options, message in (
        ({"at": (8, 0)}, r"at is \(8, 0\), expected 2 indices within \(8, 6\)"),
        ({"at": (1, 1, 1)}, r"at is \(1, 1, 1\), expected 2 indices"),
        ({"at": []}, r"at is \[\], expected a location of 2 indices"),
        ({"at": (1.5, 2)}, r"at is \(1.5, 2\), expected a location of 2 indices"),
        ({"at": "ab"}, "at is 'ab', expected a location of 2 indices"),
        ({"index": 2}, "index is 2, expected one of the 2 images"),
        ({"group": 2}, "group is 2, expected one of the 2 offset groups"),
        ({"call": 1}, "call is 1, expected one of the 1 of 'left.packed'"),
        ({"inputs": (torch.rand(3, 3, 32, 24),)}, "is given a batch of 3, expected 1, or 2"),
    ):
        with pytest.raises(ValueError, match=f"show: .*{message}"):
            viz.show(model, "left.packed", images, **options)
    for arguments, message in (
        ((None, "left.packed", images), "model is a NoneType, expected a Module"),
        ((model, 1, images), "name is 1, expected the name of a module"),
        ((model, "left.packed", [images]), "image is a list"),
    ):
        with pytest.raises(TypeError, match=f"show: {message}"):
            viz.show(*arguments)


def test_without_matplotlib(monkeypatch):
    class Absent:
        @staticmethod
        def find_spec(name, *_):
            if name == "matplotlib":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])
    layer = deformnd.PackedDeformConv2d(1, 1, 3)
    samples = viz.Samples(torch.zeros(1, 2), torch.ones(1))
    for draw in (
        lambda: viz.show(layer, "", torch.rand(1, 8, 8)),
        lambda: viz.draw_samples(torch.rand(1, 8, 8), samples),
        lambda: viz.draw_offset(torch.rand(18, 8, 8), 3),
        lambda: viz.draw_mask(torch.rand(9, 8, 8), 3),
        lambda: viz.flow_colours(torch.rand(2, 8, 8), 1.0),
        lambda: viz.animate("none.gif", layer, torch.rand(2, 1, 8, 8), [(0, 0)]),
    ):
        with pytest.raises(ImportError, match="matplotlib is not installed: pip install 'deform"):
            draw()


def test_errors():
    image = torch.rand(1, 4, 8, 8)
    with pytest.raises(TypeError, match="layers has 'a', expected Modules"):
        viz.steps("a", image)
    for draw, what in ((viz.draw_offset, "offset"), (viz.draw_mask, "mask")):
        with pytest.raises(TypeError, match=f"{what} is None, expected a Tensor"):
            draw(None, 3)
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
    with pytest.raises(ValueError, match="frames has no image"):
        viz.animate(path, layer, torch.rand(0, 1, 4, 4), [(0, 0)])
    for at in ((3, 3), [], [(1.5, 2)]):
        with pytest.raises(ValueError, match=r"at is .*, expected a list of locations"):
            viz.animate(path, layer, torch.rand(3, 1, 12, 12), at)
