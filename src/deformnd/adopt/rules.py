"""How hand-written layers are described to `convert`, and what it makes of them."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.bases import ConvNd
from ..ops.checkpoints import Part, take_original
from ..ops.modules import _last_convolution, _module
from .exchange import everything, layer_like, leftovers, take_place

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PackRule:
    """How a hand-written layer that predicts its own offset is laid out, for `convert`.

    What stride, padding, dilation and groups are is read off the convolution `weight`, or off the
    layer's attributes of these names; the number of offset groups is read off the predictors.

    Args:
        offset: name of the submodule that predicts the offset, such as 'conv_offset' or
            'head.offset'. A convolution or a module that ends in one.
        mask: name of the submodule that predicts the mask; None for no mask; the same name as
            offset if one convolution predicts both, offset first.
        weight: name of the convolution that has weight and bias; '' if the layer itself has them.
        interleaved: True for (dy, dx) of one kernel point after the other, as in torchvision;
            False for dy of all points, then dx of all points, in each offset group.
        x_first: True where dx comes before dy.
        offset_activation: what the layer applies to the predicted offset: None, a module or a
            callable. It must work elementwise if the order of the channels changes.
        mask_activation: the same for the mask. The default is torch.sigmoid;
            `deformnd.mask_sigmoid` is 2 * sigmoid.
        stride, padding, dilation: of the deformable convolution, where those of `weight` are
            others, as in layers that lay the samples out, k x k for each position, and convolve
            that with stride k.
        then: what the layer applies to the result, in this order, such as ('bn', 'act'): names of
            submodules, or modules and callables.
        drop: names of submodules, parameters and buffers that are not needed any more, such as a
            module that pads the input. All others must have a place in the rule.
        axes: which spatial axes the offset is of, in the order of its channels: (1, 2) in 3-D moves
            samples in H and W only. None for all.
    """

    offset: str
    mask: str | None = None
    weight: str = ""
    interleaved: bool = True
    x_first: bool = False
    offset_activation: Function | None = None
    mask_activation: Function | None = torch.sigmoid
    stride: int | Sequence[int] | None = None
    padding: int | str | Sequence[int] | None = None
    dilation: int | Sequence[int] | None = None
    then: Sequence[str | Function] = ()
    drop: Sequence[str] = ()
    axes: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for key in ("offset", "mask", "weight"):
            value = getattr(self, key)
            if not isinstance(value, str) and not (key == "mask" and value is None):
                raise TypeError(f"PackRule: {key} is {value!r}, expected a name")
        for key in ("then", "drop"):
            value = getattr(self, key)
            value = (value,) if isinstance(value, str) else value
            if not isinstance(value, Sequence) or not all(
                isinstance(v, str) or (key == "then" and callable(v)) for v in value
            ):
                raise TypeError(f"PackRule: {key} is {value!r}, expected names of submodules")
            object.__setattr__(self, key, tuple(value))
        axes = self.axes
        if axes is not None and not (
            isinstance(axes, Sequence) and all(isinstance(a, int) for a in axes)
        ):
            raise TypeError(f"PackRule: axes is {axes!r}, expected a tuple of ints")


def from_rule(where: str, module: nn.Module, rule: PackRule) -> nn.Module:
    """The layer that replaces a module which is as the rule says."""
    source: Any = _submodule(where, module, "weight", rule.weight) if rule.weight else module
    offset: Any = _submodule(where, module, "offset", rule.offset)
    mask: Any = _submodule(where, module, "mask", rule.mask) if rule.mask is not None else None
    then = [_submodule(where, module, "then", t) if isinstance(t, str) else t for t in rule.then]
    if not hasattr(source, "weight"):
        raise ValueError(f"{where} has no weight; name the submodule that has, as PackRule.weight")
    _check_forward(where, module)
    made = _predictors(where, rule, source.weight.shape[2:], offset, mask)
    layer: Any = layer_like(
        where,
        module,
        source,
        True,
        {"stride": rule.stride, "padding": rule.padding, "dilation": rule.dilation},
        offset_groups=made.offset_groups,
        mask_groups=made.mask_groups,
        modulated=made.mask is not None,
        offset_activation=made.offset_activation,
        mask_activation=rule.mask_activation,
    )
    kept = [offset, mask, *then, rule.offset_activation, rule.mask_activation]
    check_leftovers(where, module, source, kept, rule.drop)
    layer.offset_generator, layer.mask_generator = made.offset, made.mask
    for name, predictor in ((rule.offset, made.offset), (rule.mask, made.mask)):
        _check_size(where, name, predictor, layer)
    parts = [*made.parts, *_parts_of_activations(module, rule, made)]
    if rule.weight:
        parts += [Part(key, f"{rule.weight}.{key}") for key in ("weight", "bias")]
    new = layer
    if then:
        if not rule.weight:
            parts += [Part(key, key) for key in ("weight", "bias")]
        new, parts = _followed(module, layer, rule, then, parts)
    submodules = [name for name, _ in module.named_modules(remove_duplicate=False)]
    parts += [Part(None, f"{name}." if name in submodules else name) for name in rule.drop]
    new._original = tuple(parts)
    if _is_ambiguous(module, new):
        warnings.warn(
            f"{where}: the names in its state_dict are also those of what replaces it, where they "
            "mean something else; load a checkpoint of the original before convert, not after",
            stacklevel=5,
        )
    take_place(new, module)
    return new  # type: ignore[no-any-return]


class _Predictors(NamedTuple):
    """What predicts the offset and mask of the new layer."""

    offset: nn.Module
    mask: nn.Module | None
    offset_groups: int
    mask_groups: int
    offset_activation: Any
    spreads: bool  # whether the activation ends in a _Spread, and so is a Sequential
    parts: list[Part]  # where their parameters come from


def _predictors(
    where: str, rule: PackRule, kernel: Sequence[int], offset: Any, mask: Any
) -> _Predictors:
    """The old layer's predictors with their channels as ours are, in copies where they are not."""
    n, points = len(kernel), math.prod(kernel)
    axes = _axes(where, n, rule)
    channels = _out_channels(where, rule.offset, offset)
    joint = rule.mask == rule.offset
    unit = points * (len(axes) + 1 if joint else len(axes))
    if channels % unit:
        raise ValueError(
            f"{where}: {rule.offset} predicts {channels} channels, expected a multiple of {unit} "
            f"({n}-D, {points} kernel points{', offset and mask' if joint else ''}"
            f"{f', axes {axes}' if len(axes) < n else ''})"
        )
    groups = mask_groups = channels // unit
    activation = rule.offset_activation
    spreads = len(axes) < n
    if spreads:
        order = torch.arange(groups * points * len(axes))
        at = [axes.index(a) if a in axes else -1 for a in range(n)]
        spread = _Spread(points, at, rule.interleaved)
        first: Any = _module(activation)
        activation = spread if first is None else nn.Sequential(first, spread)
    else:
        order = _order(points, groups, axes, rule.interleaved)
    parts = [Part("offset_generator.", f"{rule.offset}.")]
    if joint:
        rows = (order, torch.arange(len(order), channels))
        offset, mask = (_rows(where, rule.offset, offset, r) for r in rows)
        parts = [
            Part(f"{key}_generator.", f"{rule.offset}.", tuple(r.tolist()), channels)
            for key, r in zip(("offset", "mask"), rows, strict=True)
        ]
    else:
        if mask is not None:
            mask_channels = _out_channels(where, str(rule.mask), mask)
            if mask_channels % points:
                raise ValueError(
                    f"{where}: {rule.mask} predicts {mask_channels} channels, expected a multiple "
                    f"of {points} (one for each kernel point)"
                )
            mask_groups = mask_channels // points
            parts.append(Part("mask_generator.", f"{rule.mask}."))
        if not torch.equal(order, torch.arange(channels)):
            offset = _rows(where, rule.offset, offset, order)
            parts[0] = Part("offset_generator.", parts[0].theirs, tuple(order.tolist()), channels)
    return _Predictors(offset, mask, groups, mask_groups, activation, spreads, parts)


def _parts_of_activations(module: nn.Module, rule: PackRule, made: _Predictors) -> list[Part]:
    """A function that made the rule may have named modules of the layer itself as activations."""
    names = {m: name for name, m in module.named_modules()}
    parts = []
    for kind in ("offset", "mask"):
        activation: Any = getattr(rule, f"{kind}_activation")
        if isinstance(activation, nn.Module) and activation in names:
            place = "0." * (kind == "offset" and made.spreads)
            parts.append(Part(f"{kind}_activation.{place}", f"{names[activation]}."))
    return parts


def _followed(
    module: nn.Module, layer: nn.Module, rule: PackRule, then: Sequence[Any], parts: Sequence[Part]
) -> tuple[Any, list[Part]]:
    """The layer with what the rule applies to its result, and the parts of both."""
    names = {m: name for name, m in module.named_modules()}
    new = Converted(layer)
    parts = [Part(f"deform.{p.ours}", p.theirs, p.rows, p.of) for p in parts]
    for i, (said, m) in enumerate(zip(rule.then, then, strict=True)):
        name = said.replace(".", "_") if isinstance(said, str) else f"then{i}"
        while hasattr(new, name):  # A rule may apply one submodule twice.
            name = f"{name}_{i}"
        theirs = names.get(m) if isinstance(said, nn.Module) else said
        if isinstance(theirs, str):
            parts.append(Part(f"{name}.", f"{theirs}."))
        new.add_module(name, _module(m))
    return new, parts


def _is_ambiguous(module: nn.Module, new: Any) -> bool:
    """Whether the original's state_dict would be taken for one of what replaces it."""
    before = module.state_dict()
    after = dict(before)
    take_original(new, after, "")
    moved = any(p.rows or p.ours not in (p.theirs, None) for p in new._original)
    return moved and all(after.get(key) is t for key, t in before.items())


class Converted(nn.Sequential):
    """A deformable layer, `deform`, and after it what the `PackRule` has as `then`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.add_module("deform", layer)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        take_original(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _Spread(nn.Module):
    """Makes an offset along some axes one along all, with zero along the others."""

    def __init__(self, points: int, at: list[int], interleaved: bool) -> None:
        super().__init__()
        self.at = at  # Where each axis stands in the predictor's order, or -1 if it does not.
        size = [points, max(at) + 1] if interleaved else [max(at) + 1, points]
        self.size, self.interleaved = size, interleaved

    def forward(self, offset: Tensor) -> Tensor:
        some = offset.unflatten(1, [-1, self.size[0], self.size[1]])
        if not self.interleaved:
            some = some.transpose(2, 3)  # [B, OG, K, axes, *out]
        zero = torch.zeros_like(some[:, :, :, 0])
        axes = [some[:, :, :, i] if i >= 0 else zero for i in self.at]
        return torch.stack(axes, 3).flatten(1, 3)


def _axes(where: str, n: int, rule: PackRule) -> list[int]:
    """The axes along which the predictor gives offsets, in the order of its channels."""
    axes = list(range(n)) if rule.axes is None else list(rule.axes)
    if not axes or len(set(axes)) < len(axes) or not set(axes) <= set(range(n)):
        raise ValueError(
            f"{where}: PackRule.axes is {rule.axes!r}, expected different ones of {list(range(n))}"
        )
    return axes[::-1] if rule.x_first else axes


def _submodule(where: str, module: nn.Module, role: str, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{where} has no submodule {name!r}, PackRule.{role}") from None


def _check_forward(where: str, module: nn.Module) -> None:
    """Raise ValueError unless the layer takes one input and has the forward of its class."""
    if "forward" in vars(module):
        raise ValueError(f"{where}: its forward was replaced, by {vars(module)['forward']}")
    try:
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    except (TypeError, ValueError):  # A forward in C has no signature to look at.
        return
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in variable]
    if len(needed) > 1:
        raise ValueError(
            f"{where} takes {len(needed)} inputs, {', '.join(needed)}, expected one, from which a "
            "packed layer predicts its offset. accelerate() of deformnd.compat.torchvision, or of "
            "deformnd.compat.mmcv, runs such a layer on deformnd's kernels as it is"
        )


def check_leftovers(
    where: str, module: nn.Module, source: nn.Module, kept: Sequence[Any], drop: Sequence[str] = ()
) -> None:
    """Raise ValueError if something of the layer would be lost that the rule does not drop."""
    for name in drop:
        if name not in {k for k, _ in everything(module)}:
            raise ValueError(
                f"{where} has no submodule, parameter or buffer {name!r}, PackRule.drop"
            )
    names = list(leftovers(module, source, kept, drop))
    if names:
        raise ValueError(
            f"{where}: nothing is said of {', '.join(names)}; name what is applied to the result "
            "in PackRule.then, and what is not needed any more in PackRule.drop"
        )


def _out_channels(where: str, name: str, predictor: nn.Module) -> int:
    last = _last_convolution(predictor)
    if last is None:
        raise ValueError(f"{where}: {name} is a {type(predictor).__name__} without a convolution")
    return last.out_channels


def _check_size(where: str, name: str | None, predictor: Any, layer: Any) -> None:
    """Raise ValueError if a predictor's output has not the layer's size.

    This can only be said of a predictor that is one convolution; it is said for every input size.
    """
    if not isinstance(predictor, ConvNd) or layer.transposed or predictor.transposed:
        return

    def steps(convolution: Any) -> list[tuple[int, int]]:
        """For each axis the stride, and by how much the size shrinks before it is divided by it."""
        padding = convolution.padding
        same = padding == "same"
        padding = [0] * len(convolution.stride) if isinstance(padding, str) else padding
        zipped = zip(
            convolution.stride, convolution.kernel_size, padding, convolution.dilation, strict=True
        )
        return [(s, 0 if same else d * (k - 1) - 2 * p) for s, k, p, d in zipped]

    pairs = zip(steps(predictor), steps(layer), strict=True)
    # Where they shrink by amounts that differ by less than a stride, some inputs give equal sizes.
    if any(s != t or abs(a - b) >= s for (s, a), (t, b) in pairs):
        raise ValueError(
            f"{where}: the offset and mask must have the output's size, but {name} has stride "
            f"{predictor.stride}, padding {predictor.padding}, dilation {predictor.dilation}, and "
            f"the deformable convolution stride {layer.stride}, padding {layer.padding}, dilation "
            f"{layer.dilation}; say what these are, as PackRule.stride, padding and dilation"
        )


def _order(points: int, groups: int, axes: list[int], interleaved: bool) -> Tensor:
    """For each channel of our offset, [group, point, axis], which of the old predictor's it is."""
    n = len(axes)
    size = (groups, points, n) if interleaved else (groups, n, points)
    order = torch.arange(math.prod(size)).view(size)
    order = order if interleaved else order.mT
    return order[..., [axes.index(a) for a in range(n)]].flatten()


def _rows(where: str, name: str, convolution: nn.Module, rows: Tensor) -> nn.Module:
    """A convolution like this one, with only these output channels, in this order."""
    if (
        not isinstance(convolution, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        or convolution.groups != 1
        or "weight" not in convolution._parameters
    ):
        raise ValueError(
            f"{where}: {name} is {convolution}, expected one convolution of groups 1, with a "
            "weight that is not computed, since its output channels must be split or reordered"
        )
    part: Any = copy.copy(convolution)
    part.__dict__ = {**convolution.__dict__, "_parameters": dict(convolution._parameters)}
    for key, t in convolution._parameters.items():
        if t is not None:
            with torch.no_grad():
                new = nn.Parameter(t[rows.to(t.device)], t.requires_grad)
            vars(new).update(vars(t))  # Some users put marks on a Parameter, such as lr_mult.
            part._parameters[key] = new
    part.out_channels = len(rows)
    return part  # type: ignore[no-any-return]
