"""Layers of other packages and hand-written ones become deformnd's: `convert`."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..compat import internimage, mmcv, transformers
from ..ops.bases import ConvNd
from ..ops.checkpoints import Part, take_original
from ..ops.modules import (
    _DeformConvNd,
    _DeformConvTransposeNd,
    _last_affine,
    _last_convolution,
    _module,
    _Packed,
)
from . import packages
from .exchange import (
    check_nothing_lost,
    inside,
    layer_like,
    leftovers,
    replace,
    replacements,
    take_place,
)

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


Rules = Mapping[str | type, PackRule | Callable[[nn.Module], PackRule | nn.Module]]


def convert(
    model: nn.Module,
    rules: Rules | None = None,
    *,
    check: Any = None,
    inplace: bool = True,
    verbose: bool = True,
) -> nn.Module:
    """Replace other packages' deformable layers by deformnd's, with equal outputs.

    Known are torchvision's DeformConv2d; mmcv's DeformConv2d, ModulatedDeformConv2d and their
    Packs, also under the names and in the packages (mmdet, mmedit, BasicSR) that carried them
    before; mmcv's and transformers' MultiScaleDeformableAttention; all twelve layers of tvdcn;
    OpenGVLab's DCNv3 and DCNv4 of stride 1, wherever a file or folder dcnv3 or dcnv4 has them
    (Hugging Face's InternImage). A subclass counts only if it does not change forward. Layers
    whose forward takes another input for the offset cannot be replaced:
    `deformnd.compat.torchvision.accelerate()` reaches them if they call torchvision's function.

    The new layers hold the same Parameter objects, so optimizers stay valid; only where one
    convolution predicted offset and mask, or the order of its channels changes, are there new ones.
    Hooks, the training flag and plain attributes come along. load_state_dict takes the old names as
    well as the new, and `original_state_dict` gives them back; a layer whose old names are the new
    ones, in another order, takes them as new, and convert warns.

    Args:
        model: any module; it may itself be such a layer.
        rules: what hand-written layers are: from a class, or its name, to a `PackRule` or to a
            function of the layer that returns one, or returns the Module to put there.
        check: an input of the model, a tuple of its inputs, or a dictionary of them by name. The
            model runs once with it, in eval mode, and every output of each layer that shall be
            replaced is compared with what its replacement makes of the same inputs.
        inplace: False to leave the model alone and convert a copy.
        verbose: print what was replaced.

    Returns:
        The model, or what replaces it.

    Raises:
        ValueError: nothing matched, a rule matched nothing, a rule does not fit its layer or leaves
            parts of it out, or check found other outputs or a layer that it did not reach. The
            model is then unchanged.
        TypeError: an argument or a rule is of another type.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import deformnd
        >>> class Mine(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.both = nn.Conv2d(4, 27, 3, padding=1)
        ...         self.conv = nn.Conv2d(4, 6, 3, padding=1)
        ...
        ...     def forward(self, x):
        ...         offset, mask = self.both(x).split([18, 9], 1)
        ...         return deformnd.deform_conv2d(
        ...             x, self.conv.weight, offset, mask.sigmoid(), self.conv.bias, padding=1
        ...         )
        >>> model, x = nn.Sequential(Mine(), nn.ReLU()), torch.rand(1, 4, 8, 8)
        >>> expected = model(x)
        >>> rule = deformnd.PackRule(offset="both", mask="both", weight="conv")
        >>> model = deformnd.convert(model, {"Mine": rule})
        deformnd.convert: 1 layer replaced
          Mine -> PackedDeformConv2d: 0
        >>> torch.testing.assert_close(model(x), expected)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model is a {type(model).__name__}, expected a Module")
    _check_rules(rules)
    if not inplace:
        model = copy.deepcopy(model)
    used: set[str | type] = set()

    def replacement(name: str, module: nn.Module) -> nn.Module | None:
        kind = type(module)
        where = f"convert: {kind.__name__} {name!r}"
        for key in (kind, kind.__name__):
            if rules and key in rules:
                used.add(key)
                rule = rules[key]
                if not isinstance(rule, PackRule):
                    made = rule(module)
                    if isinstance(made, nn.Module):
                        take_place(made, module)
                        return made.train(module.training)
                    if not isinstance(made, PackRule):
                        raise TypeError(
                            f"{where}: its rule returned a {type(made).__name__}, expected a "
                            "PackRule or a Module"
                        )
                    rule = made
                return _from_rule(where, module, rule)
        return _from_package(where, module)

    replaced = replacements(model, replacement)
    unused = [k if isinstance(k, str) else k.__name__ for k in rules or () if k not in used]
    others = _others(model, replaced)
    if unused:
        raise ValueError(f"convert: no layer of the model is a {' or a '.join(unused)}; {others}")
    if not replaced:
        raise ValueError(f"convert: found nothing to replace; {others}")
    if check is not None:
        _compare(model, replaced, check)
    model, report = replace(model, replaced)
    if verbose:
        print(f"deformnd.convert: {report}")
        if _deform_like(model):
            print(f"  left: {others}")
    return model


def _check_rules(rules: Any) -> None:
    if rules is not None and not isinstance(rules, Mapping):
        raise TypeError(
            f"convert: rules is a {type(rules).__name__}, expected a dictionary from classes or "
            "their names to PackRules"
        )
    for key, rule in (rules or {}).items():
        if not isinstance(key, (str, type)):
            raise TypeError(f"convert: rules has the key {key!r}, expected a class or its name")
        if isinstance(rule, nn.Module) or not (isinstance(rule, PackRule) or callable(rule)):
            raise TypeError(
                f"convert: the rule of {getattr(key, '__name__', key)} is a "
                f"{type(rule).__name__}, expected a PackRule or a function of the layer"
            )


def _others(model: nn.Module, replaced: Collection[str]) -> str:
    names = _deform_like(model, replaced)
    if not names:
        return "no other layer of it looks deformable"
    found = ", ".join(f"{name} ({count})" for name, count in names.items())
    return f"without a rule: {found}"


_LAYERS = (_DeformConvNd, _DeformConvTransposeNd, internimage.DCNv3, internimage.DCNv4)


def _deform_like(model: nn.Module, replaced: Collection[str] = ()) -> Counter[str]:
    """Layers, not deformnd's, not replaced and with none inside, that look deformable by name."""
    return Counter(
        f"{type(m).__module__}.{type(m).__name__}"
        if not isinstance(m, torch.jit.ScriptModule)
        else f"a scripted {m.original_name}"
        for name, m in model.named_modules()
        if packages.looks_deformable(m)
        and not any(isinstance(c, _LAYERS) for c in m.modules())
        and not inside(name, replaced)
    )


def _from_package(where: str, module: Any) -> nn.Module | None:
    """What replaces a layer of a package that we know; None for any other module."""
    found = packages.known(module)
    if found is None:
        return None
    package, name, packed = found
    if package == "opengvlab":
        return _from_opengvlab(where, module, name)
    if name == "MultiScaleDeformableAttention":
        return _attention(where, module, package)
    if package == "mmcv" and packed:
        joint = "conv_offset" if name.startswith("Modulated") else None
        return _from_rule(where, module, PackRule("conv_offset", joint))
    if not packed:
        layer: Any = layer_like(where, module, module, False)
        check_nothing_lost(where, module)
        if package == "mmcv" and name.startswith("Modulated"):
            # mmcv's own class, since it alone takes an offset that is larger than the output.
            layer.__class__ = mmcv.ModulatedDeformConv2d
            old_name = getattr(module, "deformable_groups", 1)
            layer.deform_groups = getattr(module, "deform_groups", old_name)
        take_place(layer, module)
        return layer  # type: ignore[no-any-return]
    layer = layer_like(
        where,
        module,
        module,
        True,
        offset_groups=module.offset_groups,
        mask_groups=module.mask_groups,
        deformable=module.offset_generator is not None,
        modulated=module.mask_generator is not None,
        offset_activation=_activation_of_tvdcn(module.offset_activation),
        mask_activation=_activation_of_tvdcn(module.mask_activation),
    )
    keys = ("offset_generator", "mask_generator", "offset_activation", "mask_activation")
    _check_leftovers(where, module, module, [getattr(module, key) for key in keys])
    layer.offset_generator = module.offset_generator
    layer.mask_generator = module.mask_generator
    take_place(layer, module)
    return layer  # type: ignore[no-any-return]


def _attention(where: str, module: Any, package: str) -> nn.Module:
    """transformers' layer, which has no parameters, or mmcv's, whose parts are taken over."""
    if package == "transformers":
        layer: Any = transformers.MultiScaleDeformableAttention()
    else:
        keys = ("embed_dims", "num_heads", "num_levels", "num_points", "batch_first")
        options: dict[str, Any] = {key: getattr(module, key) for key in keys}
        ratio = module.value_proj.out_features / module.embed_dims
        with torch.device("meta"):
            layer = mmcv.MultiScaleDeformableAttention(**options, value_proj_ratio=ratio)
        for key, _ in layer.named_children():
            setattr(layer, key, getattr(module, key))
    more = {k for k, _ in _everything(module)} ^ {k for k, _ in _everything(layer)}
    if more:
        raise ValueError(f"{where} has other parts than {package}'s: {sorted(more)}")
    take_place(layer, module)
    return layer  # type: ignore[no-any-return]


_SIZES = ("channels", "kernel_size", "dw_kernel_size", "stride", "pad", "dilation", "group")


def _from_opengvlab(where: str, module: Any, name: str) -> nn.Module:
    """DCNv3 and DCNv4: what has the same parts by the same names takes them over."""
    keys = [*_SIZES, "offset_scale", "center_feature_scale"]
    for key in keys:
        if not hasattr(module, key):
            raise ValueError(f"{where} has no {key}, expected a {name} as OpenGVLab's")
    if module.stride != 1:
        raise ValueError(
            f"{where}: stride is {module.stride}, expected 1: with another it reads offsets of "
            "other positions, which deformnd does not imitate"
        )
    options = {key: getattr(module, key) for key in keys}
    options["remove_center"] = getattr(module, "remove_center", False)
    kind: Any = internimage.DCNv3
    if name == "DCNv4":
        kind = internimage.DCNv4
        options["without_pointwise"] = getattr(module, "without_pointwise", False)
    try:
        with torch.device("meta"):
            layer = kind(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    parts = [*layer.named_children(), *layer.named_parameters(recurse=False)]
    for key, _ in parts:
        if not hasattr(module, key):
            raise ValueError(f"{where} has no {key}, expected a {name} as OpenGVLab's")
        setattr(layer, key, getattr(module, key))
    kept = {"center_feature_scale_module", *dict(layer.named_children())}  # a function of no state
    more = {key for key, _ in module.named_children()} - kept
    more |= set(module.state_dict()) ^ set(layer.state_dict())
    if more:
        raise ValueError(f"{where} has other parts than OpenGVLab's {name}: {sorted(more)}")
    take_place(layer, module)
    return layer  # type: ignore[no-any-return]


def _activation_of_tvdcn(activation: Any) -> Any:
    if not type(activation).__module__.startswith("tvdcn."):
        return activation
    kind = type(activation).__name__
    if kind == "MaskSigmoid":
        return ops.MaskSigmoid(activation.scale)
    return getattr(ops, kind)(tuple(activation.kernel_size))


def _from_rule(where: str, module: nn.Module, rule: PackRule) -> nn.Module:
    source: Any = _submodule(where, module, "weight", rule.weight) if rule.weight else module
    offset: Any = _submodule(where, module, "offset", rule.offset)
    mask: Any = _submodule(where, module, "mask", rule.mask) if rule.mask is not None else None
    then = [_submodule(where, module, "then", t) if isinstance(t, str) else t for t in rule.then]
    if not hasattr(source, "weight"):
        raise ValueError(f"{where} has no weight; name the submodule that has, as PackRule.weight")
    _check_forward(where, module)
    kept = [offset, mask, *then, rule.offset_activation, rule.mask_activation]
    n, points = source.weight.dim() - 2, math.prod(source.weight.shape[2:])
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
    groups = channels // unit
    offset_activation = rule.offset_activation
    parts = [Part("offset_generator.", f"{rule.offset}.")]
    if len(axes) < n:
        order = torch.arange(groups * points * len(axes))
        at = [axes.index(a) if a in axes else -1 for a in range(n)]
        spread = _Spread(points, at, rule.interleaved)
        first: Any = _module(offset_activation)
        offset_activation = spread if first is None else nn.Sequential(first, spread)
    else:
        order = _order(points, groups, axes, rule.interleaved)
    mask_groups = groups
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
    layer: Any = layer_like(
        where,
        module,
        source,
        True,
        {"stride": rule.stride, "padding": rule.padding, "dilation": rule.dilation},
        offset_groups=groups,
        mask_groups=mask_groups,
        modulated=mask is not None,
        offset_activation=offset_activation,
        mask_activation=rule.mask_activation,
    )
    _check_leftovers(where, module, source, kept, rule.drop)
    layer.offset_generator, layer.mask_generator = offset, mask
    for name, predictor in ((rule.offset, offset), (rule.mask, mask)):
        _check_size(where, name, predictor, layer)
    if rule.weight:
        parts += [Part(key, f"{rule.weight}.{key}") for key in ("weight", "bias")]
    names = {m: name for name, m in module.named_modules()}
    for kind in ("offset", "mask"):  # one of the layer's own modules, from a function of the layer
        activation: Any = getattr(rule, f"{kind}_activation")
        if isinstance(activation, nn.Module) and activation in names:
            place = "0." * (kind == "offset" and len(axes) < n)
            parts.append(Part(f"{kind}_activation.{place}", f"{names[activation]}."))
    new = layer
    if then:
        if not rule.weight:
            parts += [Part(key, key) for key in ("weight", "bias")]
        parts = [Part(f"deform.{p.ours}", p.theirs, p.rows, p.of) for p in parts]
        new = Converted(layer)
        for i, (said, m) in enumerate(zip(rule.then, then, strict=True)):
            name = said.replace(".", "_") if isinstance(said, str) else f"then{i}"
            while hasattr(new, name):  # such as one that is applied twice
                name = f"{name}_{i}"
            theirs = names.get(m) if isinstance(said, nn.Module) else said
            if isinstance(theirs, str):
                parts.append(Part(f"{name}.", f"{theirs}."))
            new.add_module(name, _module(m))
    submodules = [name for name, _ in module.named_modules(remove_duplicate=False)]
    parts += [Part(None, f"{name}." if name in submodules else name) for name in rule.drop]
    new._original = tuple(parts)
    before = module.state_dict()
    after = dict(before)
    take_original(new, after, "")
    moved = any(p.rows or p.ours not in (p.theirs, None) for p in parts)
    if moved and all(after.get(key) is t for key, t in before.items()):
        warnings.warn(
            f"{where}: the names in its state_dict are also those of what replaces it, where they "
            "mean something else; load a checkpoint of the original before convert, not after",
            stacklevel=5,
        )
    take_place(new, module)
    return new  # type: ignore[no-any-return]


class Converted(nn.Sequential):
    """A deformable layer, `deform`, and what a `PackRule` says comes then."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.add_module("deform", layer)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        take_original(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _Spread(nn.Module):
    """An offset of some axes as one of all, with zero for the others."""

    def __init__(self, points: int, at: list[int], interleaved: bool) -> None:
        super().__init__()
        self.at = at  # for each axis its place in the predictor's order, or -1
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
    """For each axis that the predictor knows, in its order, which one it is."""
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
    """That the layer takes one input, by the forward of its class."""
    if "forward" in vars(module):
        raise ValueError(f"{where}: its forward was replaced, by {vars(module)['forward']}")
    try:
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    except (TypeError, ValueError):  # nothing to be known
        return
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in variable]
    if len(needed) > 1:
        raise ValueError(
            f"{where} takes {len(needed)} inputs, {', '.join(needed)}, expected one, from which a "
            "packed layer predicts its offset. accelerate() of deformnd.compat.torchvision, or of "
            "deformnd.compat.mmcv, runs such a layer on deformnd's kernels as it is"
        )


def _check_leftovers(
    where: str, module: nn.Module, source: nn.Module, kept: Sequence[Any], drop: Sequence[str] = ()
) -> None:
    """That nothing of the layer is lost but what the rule drops."""
    for name in drop:
        if name not in {k for k, _ in _everything(module)}:
            raise ValueError(
                f"{where} has no submodule, parameter or buffer {name!r}, PackRule.drop"
            )
    names = list(leftovers(module, source, kept, drop))
    if names:
        raise ValueError(
            f"{where}: nothing is said of {', '.join(names)}; name what is applied to the result "
            "in PackRule.then, and what is not needed any more in PackRule.drop"
        )


def _everything(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module.named_modules(remove_duplicate=False)
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _out_channels(where: str, name: str, predictor: nn.Module) -> int:
    last = _last_convolution(predictor)
    if last is None:
        raise ValueError(f"{where}: {name} is a {type(predictor).__name__} without a convolution")
    return last.out_channels


def _check_size(where: str, name: str | None, predictor: Any, layer: Any) -> None:
    """That a predictor which is one convolution has the output's size, whatever the input's."""
    if not isinstance(predictor, ConvNd) or layer.transposed or predictor.transposed:
        return

    def steps(convolution: Any) -> list[tuple[int, int]]:
        """For each axis the stride, and what the size loses before."""
        padding = convolution.padding
        same = padding == "same"
        padding = [0] * len(convolution.stride) if isinstance(padding, str) else padding
        zipped = zip(
            convolution.stride, convolution.kernel_size, padding, convolution.dilation, strict=True
        )
        return [(s, 0 if same else d * (k - 1) - 2 * p) for s, k, p, d in zipped]

    pairs = zip(steps(predictor), steps(layer), strict=True)
    # Less than a stride more or less before it is the same size for some inputs.
    if any(s != t or abs(a - b) >= s for (s, a), (t, b) in pairs):
        raise ValueError(
            f"{where}: the offset and mask must have the output's size, but {name} has stride "
            f"{predictor.stride}, padding {predictor.padding}, dilation {predictor.dilation}, and "
            f"the deformable convolution stride {layer.stride}, padding {layer.padding}, dilation "
            f"{layer.dilation}; say what these are, as PackRule.stride, padding and dilation"
        )


def _order(points: int, groups: int, axes: list[int], interleaved: bool) -> Tensor:
    """Channel of the old predictor for each channel of ours, which is [group, point, axis]."""
    n = len(axes)
    size = (groups, points, n) if interleaved else (groups, n, points)
    order = torch.arange(math.prod(size)).view(size)
    order = order if interleaved else order.mT
    return order[..., [axes.index(a) for a in range(n)]].flatten()


def _rows(where: str, name: str, convolution: nn.Module, rows: Tensor) -> nn.Module:
    """The convolution with these of its output channels."""
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
            vars(new).update(vars(t))  # such as lr_mult
            part._parameters[key] = new
    part.out_channels = len(rows)
    return part  # type: ignore[no-any-return]


# How far outputs may be apart, relative in their norm: what packages differ by in their arithmetic
# is below, a wrong order of channels or activation far above.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


def _compare(model: nn.Module, replaced: Mapping[str, nn.Module], check: Any) -> None:
    """Run the model, and each replacement with the inputs of its layer."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(check, Mapping):
        kwargs = dict(check)
    else:
        args = tuple(check) if isinstance(check, (tuple, list)) else (check,)
    todo = dict(zip(replaced.values(), replaced, strict=True))  # a module in several places once
    reached, running = set(), set()
    asleep = []

    def compare(new: nn.Module, where: str) -> Callable[..., None]:
        def hook(old: nn.Module, args: Any, kwargs: Any, expected: Any) -> None:
            if new in running:  # it has old inside
                return
            reached.add(new)
            running.add(new)
            try:
                got = new.forward(*args, **kwargs)  # hooks are shared with old: not again
            except Exception as error:
                raise ValueError(f"{where}: the replacement fails: {error}") from error
            finally:
                running.remove(new)
            if not isinstance(expected, Tensor) or not isinstance(got, Tensor):
                raise ValueError(
                    f"{where} gives a {type(expected).__name__}, the replacement a "
                    f"{type(got).__name__}, expected Tensors"
                )
            if got.shape != expected.shape:
                raise ValueError(
                    f"{where} gives {list(expected.shape)}, the replacement {list(got.shape)}"
                )
            norm = expected.double().norm()
            apart = float((got.double() - expected.double()).norm() / norm.clamp_min(1e-30))
            if not apart <= _TOLERANCE.get(expected.dtype, 5e-2):
                raise ValueError(
                    f"{where}: the replacement's output is another; it is off by {apart:.2g} of "
                    "the original's norm"
                )

        return hook

    # (module, its training flag): replacements are in no model yet.
    modes = [(m, m.training) for root in (model, *todo) for m in root.modules()]
    handles = []
    try:
        for new, name in todo.items():
            old = model.get_submodule(name)
            where = f"convert: {type(old).__name__} {name!r}"
            handles.append(
                old.register_forward_hook(compare(new, where), prepend=True, with_kwargs=True)
            )
            asleep += [
                name or "the model" for m in new.modules() if isinstance(m, _Packed) and _asleep(m)
            ]
        for m, _ in modes:
            m.training = False
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for m, training in modes:
            m.training = training
    missed = [name or "the model" for new, name in todo.items() if new not in reached]
    if missed:
        raise ValueError(f"convert: check did not reach {', '.join(missed)}")
    if asleep:
        warnings.warn(
            f"convert: the predictors of {', '.join(asleep)} are zero, so that check cannot tell "
            "in which order their channels are; check a trained model",
            stacklevel=3,
        )


def _asleep(layer: Any) -> bool:
    last = None if layer.offset_generator is None else _last_affine(layer.offset_generator)
    parameters = [] if last is None else list(last.parameters())
    return bool(parameters) and not any(p.any() for p in parameters)
