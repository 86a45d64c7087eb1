"""deformnd in a model that exists: replace its layers, and train what is new."""

# ruff: noqa: UP007, UP045 (aliases that Python 3.10 evaluates)
from __future__ import annotations

import copy
import fnmatch
import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from . import ops
from .ops.modules import Activation, _DeformConvNd, _DeformConvTransposeNd, _Packed

__all__ = ["PackRule", "convert", "deformify", "parameter_groups", "watch_offsets"]


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
    """

    offset: str
    mask: str | None = None
    weight: str = ""
    interleaved: bool = True
    x_first: bool = False
    offset_activation: Callable[[Tensor], Tensor] | None = None
    mask_activation: Callable[[Tensor], Tensor] | None = torch.sigmoid


Rules = Mapping[str | type, PackRule | Callable[[nn.Module], PackRule]]


def convert(
    model: nn.Module,
    rules: Rules | None = None,
    *,
    inplace: bool = True,
    verbose: bool = True,
) -> nn.Module:
    """Replace other packages' deformable layers by deformnd's, with equal outputs.

    Known are torchvision's DeformConv2d; mmcv's DeformConv2d, ModulatedDeformConv2d and their
    Packs, also under the names and in the packages (mmdet, mmedit, BasicSR) that carried them
    before; all twelve layers of tvdcn. A subclass counts only if it does not change forward. Layers
    whose forward takes another input for the offset cannot be replaced:
    `deformnd.compat.torchvision.accelerate()` reaches them if they call torchvision's function.

    The new layers hold the same Parameter objects, so optimizers stay valid; only where one
    convolution predicted offset and mask, or the order of its channels changes, are there new ones.
    Hooks and the training flag come along. Load checkpoints of the old names before converting.

    Args:
        model: any module; it may itself be such a layer.
        rules: what hand-written layers are: from a class, or its name, to a `PackRule` or to a
            function of the layer that returns one.
        inplace: False to leave the model alone and convert a copy.
        verbose: print what was replaced.

    Returns:
        The model, or what replaces it.

    Raises:
        ValueError: nothing matched, a rule matched nothing, or a rule does not fit its layer. The
            model is then unchanged.

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
    if not inplace:
        model = copy.deepcopy(model)
    used: set[str | type] = set()

    def replacement(name: str, module: nn.Module) -> nn.Module | None:
        kind = type(module)
        for key in (kind, kind.__name__):
            if rules and key in rules:
                used.add(key)
                rule = rules[key]
                where = f"convert: {kind.__name__} {name!r}"
                if not isinstance(rule, PackRule):
                    rule = rule(module)
                return _from_rule(where, module, rule)
        return _from_package(f"convert: {kind.__name__} {name!r}", module)

    replaced = _replacements(model, replacement)
    unused = [k if isinstance(k, str) else k.__name__ for k in rules or () if k not in used]
    others = _others(model, replaced)
    if unused:
        raise ValueError(f"convert: no layer of the model is a {' or a '.join(unused)}; {others}")
    if not replaced:
        raise ValueError(f"convert: found nothing to replace; {others}")
    model, report = _replace(model, replaced)
    if verbose:
        print(f"deformnd.convert: {report}")
        if _deform_like(model):
            print(f"  left: {others}")
    return model


def _others(model: nn.Module, replaced: Collection[str]) -> str:
    names = _deform_like(model, replaced)
    if not names:
        return "no other layer of it looks deformable"
    found = ", ".join(f"{name} ({count})" for name, count in names.items())
    return f"without a rule: {found}"


def _deform_like(model: nn.Module, replaced: Collection[str] = ()) -> Counter[str]:
    """Layers, not deformnd's, not replaced and with none inside, that look deformable by name."""
    return Counter(
        f"{type(m).__module__}.{type(m).__name__}"
        for name, m in model.named_modules()
        if re.search(r"deform\w*conv|dcn", type(m).__name__, re.IGNORECASE)
        and not any(isinstance(c, (_DeformConvNd, _DeformConvTransposeNd)) for c in m.modules())
        and not _inside(name, replaced)
    )


def _inside(name: str, others: Collection[str]) -> bool:
    """Whether a module's name is among the others or below one of them."""
    parts = name.split(".")
    return any(".".join(parts[:i]) in others for i in range(len(parts) + 1))


_OLD_AND_NEW = ("DeformConv", "DeformConv2d")
_MMCV = {
    **{prefix + name: False for prefix in ("", "Modulated") for name in _OLD_AND_NEW},
    **{prefix + name + "Pack": True for prefix in ("", "Modulated") for name in _OLD_AND_NEW},
}
_MMCV_PACKAGES = ("mmcv", "mmdet", "mmedit", "basicsr")


def _from_package(where: str, module: nn.Module) -> nn.Module | None:
    """What replaces a layer of a package that we know; None for any other module."""
    for kind in type(module).__mro__:
        package, name = kind.__module__.split(".")[0], kind.__name__
        if type(module).forward is not getattr(kind, "forward", None):
            break  # a subclass that does something else
        if package == "torchvision" and name == "DeformConv2d":
            return _layer(where, module, module, False)
        if package in _MMCV_PACKAGES and name in _MMCV:
            if not _MMCV[name]:
                return _layer(where, module, module, False)
            modulated = name.startswith("Modulated")
            return _from_rule(
                where, module, PackRule("conv_offset", "conv_offset" if modulated else None)
            )
        if package == "tvdcn" and re.fullmatch(r"(Packed)?DeformConv(Transpose)?[123]d", name):
            if not name.startswith("Packed"):
                return _layer(where, module, module, False)
            layer: Any = _layer(
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
            layer.offset_generator = module.offset_generator
            layer.mask_generator = module.mask_generator
            return layer  # type: ignore[no-any-return]
    return None


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
    if not hasattr(source, "weight"):
        raise ValueError(f"{where} has no weight; name the submodule that has, as PackRule.weight")
    n, points = source.weight.dim() - 2, math.prod(source.weight.shape[2:])
    channels = _out_channels(where, rule.offset, offset)
    joint = rule.mask == rule.offset
    unit = points * (n + 1 if joint else n)
    if channels % unit:
        raise ValueError(
            f"{where}: {rule.offset} predicts {channels} channels, expected a multiple of {unit} "
            f"({n}-D, {points} kernel points{', offset and mask' if joint else ''})"
        )
    groups = channels // unit
    order = _order(n, points, groups, rule.interleaved, rule.x_first)
    mask_groups = groups
    if joint:
        offset, mask = (
            _rows(where, rule.offset, offset, order),
            _rows(where, rule.offset, offset, torch.arange(groups * n * points, channels)),
        )
    else:
        if mask is not None:
            mask_groups = _out_channels(where, str(rule.mask), mask) // points
        if not torch.equal(order, torch.arange(channels)):
            offset = _rows(where, rule.offset, offset, order)
    layer: Any = _layer(
        where,
        module,
        source,
        True,
        offset_groups=groups,
        mask_groups=mask_groups,
        modulated=mask is not None,
        offset_activation=rule.offset_activation,
        mask_activation=rule.mask_activation,
    )
    layer.offset_generator, layer.mask_generator = offset, mask
    return layer  # type: ignore[no-any-return]


def _submodule(where: str, module: nn.Module, role: str, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{where} has no submodule {name!r}, PackRule.{role}") from None


def _out_channels(where: str, name: str, predictor: nn.Module) -> int:
    convolutions = [m for m in predictor.modules() if isinstance(m, _ConvNd)]
    if not convolutions:
        raise ValueError(f"{where}: {name} is a {type(predictor).__name__} without a convolution")
    return convolutions[-1].out_channels


def _order(n: int, points: int, groups: int, interleaved: bool, x_first: bool) -> Tensor:
    """Channel of the old predictor for each channel of ours, which is [group, point, axis]."""
    size = (groups, points, n) if interleaved else (groups, n, points)
    order = torch.arange(math.prod(size)).view(size)
    order = order if interleaved else order.mT
    return (order.flip(-1) if x_first else order).flatten()


def _rows(where: str, name: str, convolution: nn.Module, rows: Tensor) -> nn.Module:
    """The convolution with these of its output channels."""
    if not isinstance(convolution, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or convolution.groups != 1:
        raise ValueError(
            f"{where}: {name} is {convolution}, expected one convolution of groups 1, since its "
            "output channels must be split or reordered"
        )
    part: Any = copy.copy(convolution)
    part.__dict__ = {**convolution.__dict__, "_parameters": dict(convolution._parameters)}
    for key, t in convolution._parameters.items():
        if t is not None:
            with torch.no_grad():
                part._parameters[key] = nn.Parameter(t[rows.to(t.device)], t.requires_grad)
    part.out_channels = len(rows)
    return part  # type: ignore[no-any-return]


def _layer(where: str, module: nn.Module, source: Any, packed: bool, **options: Any) -> nn.Module:
    """The deformnd layer with source's weight, bias and geometry, in place of module.

    Predictors of a packed one are made without memory (on the meta device), for the caller to fill
    or replace.
    """
    weight, bias = source.weight, getattr(source, "bias", None)
    if not isinstance(weight, nn.Parameter):
        raise ValueError(f"{where}: weight is computed (parametrized?), expected a Parameter")

    def setting(key: str, default: Any) -> Any:
        return getattr(source, key, getattr(module, key, default))

    n, transposed, groups = weight.dim() - 2, setting("transposed", False), setting("groups", 1)
    channels = (weight.shape[1] * groups, weight.shape[0])
    if transposed:
        channels = (weight.shape[0], weight.shape[1] * groups)
        options["output_padding"] = setting("output_padding", 0)
    name = f"{'Packed' * packed}DeformConv{'Transpose' * transposed}{n}d"
    layer: Any = getattr(ops, name)(
        *channels,
        kernel_size=tuple(weight.shape[2:]),
        stride=setting("stride", 1),
        padding=setting("padding", 0),
        dilation=setting("dilation", 1),
        groups=groups,
        bias=bias is not None,
        padding_mode=setting("padding_mode", "zeros"),
        device="meta",
        dtype=weight.dtype,
        **options,
    )
    layer.weight, layer.bias = weight, bias
    layer.training = module.training
    for key in _HOOKS:
        setattr(layer, key, getattr(module, key))
    return layer  # type: ignore[no-any-return]


_HOOKS = [k for k in vars(nn.Module()) if re.match(r"_(forward|backward)_(pre_)?hooks", k)]


def _replacements(
    model: nn.Module, replacement: Callable[[str, nn.Module], nn.Module | None]
) -> dict[str, nn.Module]:
    """What to put where. A module that stands in several places is replaced by one."""
    made: dict[nn.Module, nn.Module | None] = {}
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if _inside(name, found):
            continue
        if module not in made:
            made[module] = replacement(name, module)
        new = made[module]
        if new is not None:
            found[name] = new
    return found


def _replace(model: nn.Module, found: dict[str, nn.Module]) -> tuple[nn.Module, str]:
    """Put the replacements in; return the model and a report."""
    groups = defaultdict(list)
    for name, new in found.items():
        old = model.get_submodule(name)
        groups[f"{type(old).__name__} -> {type(new).__name__}"].append(name or "the model")
        if name == "":
            model = new
        else:
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, new)
    lines = [f"{len(found)} layer{'s' * (len(found) > 1)} replaced"]
    lines += [f"  {kind}: {', '.join(names)}" for kind, names in groups.items()]
    return model, "\n".join(lines)


_TORCHS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)

Chooser = Callable[[str, nn.Module], bool]
Where = Optional[Union[str, type, Chooser, Sequence[Union[str, type]]]]


def deformify(
    model: nn.Module,
    where: Where = None,
    *,
    modulated: bool = True,
    offset_groups: int = 1,
    mask_groups: int = 1,
    generator_bias: bool = True,
    generator_groups: int | None = None,
    offset_activation: Activation = None,
    mask_activation: Activation = "sigmoid",
    inplace: bool = True,
    verbose: bool = True,
) -> nn.Module:
    """Make convolutions deformable. The model's outputs are the same until it is trained.

    Each chosen torch.nn.Conv or ConvTranspose, of any rank, becomes the packed deformable layer
    with the same weight and bias (the same Parameter objects) and predictors of zeros: offset 0,
    mask 1. Train on with `parameter_groups`.

    Args:
        model: any module.
        where: which convolutions. None: the 3x3 ones in layer3 and layer4, the last two stages of a
            ResNet of torchvision or timm. A pattern of names with * and ?, such as
            'layer4.*.conv2'; a type, such as torch.nn.Conv3d; a list of these, any of which
            suffices; or a function of the name and the module that returns a bool.
        modulated ... mask_activation: as for `PackedDeformConv2d`. The activations must map 0 to
            offset 0 and to mask 1.
        inplace: False to leave the model alone and change a copy.
        verbose: print what was replaced.

    Returns:
        The model, or what replaces it.

    Raises:
        ValueError: nothing matched, or an argument does not fit a layer. The model is then
            unchanged.

    References:
        Deformable ConvNets v2 (which stages), arXiv 1811.11168.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import deformnd
        >>> model = nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.ConvTranspose3d(4, 1, 3))
        >>> x = torch.rand(1, 1, 5, 6, 7)
        >>> expected = model(x)
        >>> model = deformnd.deformify(model, nn.ConvTranspose3d)
        deformnd.deformify: 1 layer replaced
          ConvTranspose3d -> PackedDeformConvTranspose3d: 2
        >>> torch.testing.assert_close(model(x), expected)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"deformify: model is a {type(model).__name__}, expected a Module")
    chosen = _chooser(where)
    if not inplace:
        model = copy.deepcopy(model)

    def replacement(name: str, module: nn.Module) -> nn.Module | None:
        if type(module) not in _TORCHS or not chosen(name, module):
            return None
        layer: Any = _layer(
            f"deformify: {name}",
            module,
            module,
            True,
            modulated=modulated,
            offset_groups=offset_groups,
            mask_groups=mask_groups,
            generator_bias=generator_bias,
            generator_groups=generator_groups,
            offset_activation=offset_activation,
            mask_activation=mask_activation,
        )
        for generator in (layer.offset_generator, layer.mask_generator):
            if generator is not None:
                generator.to_empty(device=module.weight.device)
                for parameter in generator.parameters():
                    nn.init.zeros_(parameter)
                generator.train(module.training)
        _check_start(layer)
        return layer  # type: ignore[no-any-return]

    replaced = _replacements(model, replacement)
    if not replaced:
        wanted = (
            "3x3 convolution in layer3 or layer4, as a ResNet has; choose others by where="
            if where is None
            else f"convolution that fits where={where!r}"
        )
        raise ValueError(f"deformify: the model has no {wanted}")
    model, report = _replace(model, replaced)
    if verbose:
        print(f"deformnd.deformify: {report}")
    return model


def _chooser(where: Where) -> Chooser:
    if where is None:
        return lambda name, m: (
            isinstance(m, nn.Conv2d)
            and m.kernel_size == (3, 3)
            and re.search(r"(^|\.)layer[34]\.", name) is not None
        )
    if isinstance(where, (str, type)):
        where = [where]
    if isinstance(where, Sequence):
        for w in where:
            if not isinstance(w, (str, type)):
                raise TypeError(f"deformify: where has {w!r}, expected names and types")
        choices = where
        return lambda name, m: any(
            fnmatch.fnmatchcase(name, w) if isinstance(w, str) else isinstance(m, w)
            for w in choices
        )
    if not callable(where):
        raise TypeError(f"deformify: where is {where!r}, expected a name, a type or a function")
    return where


def _check_start(layer: Any) -> None:
    """That predictors of zeros mean offset 0 and mask 1."""
    if layer.weight.is_meta:
        return
    for kind, start in (("offset", 0.0), ("mask", 1.0)):
        generator, activation = (getattr(layer, f"{kind}_{k}") for k in ("generator", "activation"))
        if generator is None:
            continue
        zeros = layer.weight.new_zeros(1, generator.out_channels, *(1,) * layer.rank)
        with torch.no_grad():
            value = zeros if activation is None else activation(zeros)
        if not torch.all(value == start):
            raise ValueError(
                f"deformify: {kind}_activation is {activation}, which maps 0 to "
                f"{float(value.flatten()[0]):.4g}, expected {start:.0f}"
                + (", as 'sigmoid' (2 * sigmoid) does" if kind == "mask" else "")
            )


def parameter_groups(
    model: nn.Module,
    lr: float,
    factor: float = 0.1,
    names: Sequence[str] = ("offset_generator", "mask_generator"),
) -> list[dict[str, Any]]:
    """Two parameter groups for an optimizer: all others, and the predictors with a smaller rate.

    Args:
        model: has packed layers.
        lr: learning rate of all parameters but the predictors'.
        factor: the predictors' rate is factor * lr.
        names: what predictors' attributes are called; for layers that are not deformnd's, such as
            BasicSR's, say ('conv_offset',).

    Raises:
        ValueError: no trainable parameter belongs to a predictor.

    References:
        Deformable Convolutional Networks, arXiv 1703.06211; v2, arXiv 1811.11168 (factor 0.1).

    Example:
        >>> import torch
        >>> import deformnd
        >>> model = deformnd.PackedDeformConv2d(3, 8, kernel_size=3)
        >>> optimizer = torch.optim.SGD(deformnd.parameter_groups(model, lr=0.1), momentum=0.9)
        >>> [(len(group["params"]), round(group["lr"], 4)) for group in optimizer.param_groups]
        [(2, 0.1), (1, 0.01)]
    """
    others: list[nn.Parameter] = []
    predictors: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            inside = not set(names).isdisjoint(name.split("."))
            (predictors if inside else others).append(parameter)
    if not predictors:
        raise ValueError(
            f"parameter_groups: the model has no trainable parameter in {' or '.join(names)}"
        )
    return [{"params": others, "lr": lr}, {"params": predictors, "lr": factor * lr}]


class watch_offsets:
    """Warn when the offsets of a layer run away.

    A training that diverges shows first in the offsets. Every so many calls of each deformnd layer
    the mean of |offset| is compared with a limit; beyond it, or not finite, a RuntimeWarning names
    the layer. Works until `remove()`, or as a context manager. Calls that torch.compile or a tracer
    sees are not watched; remove it before torch.jit.script.

    Args:
        model: has deformnd layers.
        limit: in pixels. 50 is what BasicSR warns at.
        every: look at the first of so many calls (each look waits for the device).

    Raises:
        ValueError: the model has no deformnd layer with an offset.

    Example:
        >>> import torch
        >>> import deformnd
        >>> model = deformnd.PackedDeformConv2d(3, 8, kernel_size=3)
        >>> with deformnd.watch_offsets(model, limit=50):
        ...     model(torch.rand(1, 3, 8, 8)).shape
        torch.Size([1, 8, 6, 6])
    """

    def __init__(self, model: nn.Module, limit: float = 50.0, every: int = 100) -> None:
        self.limit = limit
        self.every = every
        self._calls: Counter[str] = Counter()
        self._handles: list[Any] = []
        for name, module in model.named_modules():
            if isinstance(module, _Packed):
                self._watch_packed(name, module)
            elif isinstance(module, (_DeformConvNd, _DeformConvTransposeNd)):
                self._watch_plain(name, module)
        if not self._handles:
            raise ValueError("watch_offsets: the model has no deformnd layer with an offset")

    def _watch_packed(self, name: str, layer: Any) -> None:
        def hook(module: nn.Module, args: Any, offset: Tensor) -> None:
            self._look(name, offset, layer.offset_activation)

        if layer.offset_generator is not None:
            self._handles.append(layer.offset_generator.register_forward_hook(hook))

    def _watch_plain(self, name: str, layer: nn.Module) -> None:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            offset = kwargs["offset"] if "offset" in kwargs else args[1]
            self._look(name, offset, None)

        self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))

    def _look(
        self, name: str, offset: Tensor | None, activation: Callable[[Tensor], Tensor] | None
    ) -> None:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or offset is None:
            return
        self._calls[name] += 1
        if (self._calls[name] - 1) % self.every:
            return
        with torch.no_grad():
            mean = (offset if activation is None else activation(offset)).abs().mean().item()
        if not mean <= self.limit:
            warnings.warn(
                f"watch_offsets: mean |offset| of {name or 'the model'} is {mean:.4g} pixels, "
                f"above {self.limit:g}",
                RuntimeWarning,
                stacklevel=2,
            )

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> watch_offsets:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()
