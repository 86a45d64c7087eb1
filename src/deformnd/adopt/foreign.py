"""Layers of other packages and hand-written ones become deformnd's: `convert`."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..compat import internimage, mmcv, transformers
from ..ops.modules import (
    _DeformConvNd,
    _DeformConvTransposeNd,
    _last_affine,
    _Packed,
)
from . import packages
from .exchange import (
    check_nothing_lost,
    everything,
    inside,
    layer_like,
    replace,
    replacements,
    take_place,
)
from .rules import PackRule, check_leftovers, from_rule

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
                return from_rule(where, module, rule)
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
    """How often each class stands in the model that sounds deformable and stays as it is.

    Layers of deformnd, and modules with one of those inside, are not counted.
    """
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
    """What replaces a layer of a package that is known; None for any other module."""
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
        return from_rule(where, module, PackRule("conv_offset", joint))
    if not packed:
        layer: Any = layer_like(where, module, module, False)
        check_nothing_lost(where, module)
        if package == "mmcv" and name.startswith("Modulated"):
            # Only the class with mmcv's name takes an offset that is larger than the output.
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
    check_leftovers(where, module, module, [getattr(module, key) for key in keys])
    layer.offset_generator = module.offset_generator
    layer.mask_generator = module.mask_generator
    take_place(layer, module)
    return layer  # type: ignore[no-any-return]


def _attention(where: str, module: Any, package: str) -> nn.Module:
    """What replaces attention: transformers' has no parameters, and mmcv's parts are taken over."""
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
    more = {k for k, _ in everything(module)} ^ {k for k, _ in everything(layer)}
    if more:
        raise ValueError(f"{where} has other parts than {package}'s: {sorted(more)}")
    take_place(layer, module)
    return layer  # type: ignore[no-any-return]


_SIZES = ("channels", "kernel_size", "dw_kernel_size", "stride", "pad", "dilation", "group")


def _from_opengvlab(where: str, module: Any, name: str) -> nn.Module:
    """DCNv3 or DCNv4 with the parts of the module, which have the same names in both."""
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
    # The original has a function of that name as a module, which holds no state.
    kept = {"center_feature_scale_module", *dict(layer.named_children())}
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


# How far outputs may be apart, relative to their norm. The arithmetic of two packages differs by
# less; a wrong order of channels or a wrong activation makes a far larger difference.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


def _compare(model: nn.Module, replaced: Mapping[str, nn.Module], check: Any) -> None:
    """Run the model once, and each replacement on the inputs that its layer is given."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(check, Mapping):
        kwargs = dict(check)
    else:
        args = tuple(check) if isinstance(check, (tuple, list)) else (check,)
    # By replacement, so that a module which stands in several places is compared once.
    todo = dict(zip(replaced.values(), replaced, strict=True))
    reached, running = set(), set()
    asleep = []

    def compare(new: nn.Module, where: str) -> Callable[..., None]:
        def hook(old: nn.Module, args: Any, kwargs: Any, expected: Any) -> None:
            if new in running:  # The replacement calls the layer itself, which it has inside.
                return
            reached.add(new)
            running.add(new)
            try:
                # Not by a call, which would run the hooks again that it shares with the layer.
                got = new.forward(*args, **kwargs)
            except Exception as error:
                raise ValueError(f"{where}: the replacement fails: {error}") from error
            finally:
                running.remove(new)
            _check_output(where, expected, got)

        return hook

    # The replacements are in no model yet, so their modes are set and restored beside the model's.
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


def _check_output(where: str, expected: Any, got: Any) -> None:
    """That a replacement gives the output that its layer gives."""
    if not isinstance(expected, Tensor) or not isinstance(got, Tensor):
        raise ValueError(
            f"{where} gives a {type(expected).__name__}, the replacement a "
            f"{type(got).__name__}, expected Tensors"
        )
    if got.shape != expected.shape:
        raise ValueError(f"{where} gives {list(expected.shape)}, the replacement {list(got.shape)}")
    norm = expected.double().norm()
    apart = float((got.double() - expected.double()).norm() / norm.clamp_min(1e-30))
    if not apart <= _TOLERANCE.get(expected.dtype, 5e-2):
        raise ValueError(
            f"{where}: the replacement's output is another; it is off by {apart:.2g} of "
            "the original's norm"
        )


def _asleep(layer: Any) -> bool:
    """Whether all offsets are zero, so that no order of their channels can be told from another."""
    last = None if layer.offset_generator is None else _last_affine(layer.offset_generator)
    parameters = [] if last is None else list(last.parameters())
    return bool(parameters) and not any(p.any() for p in parameters)
