"""What convert and deformify share: making a layer in place of another, and putting it there."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from .. import ops


def layer_like(
    where: str,
    module: nn.Module,
    source: Any,
    packed: bool,
    geometry: Mapping[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """The deformnd layer with source's weight, bias and geometry, for module's place.

    Settings that geometry does not have are read off source, or else off module. The predictors of
    a packed layer are made without memory (on the meta device), for the caller to fill or replace.
    """
    weight, bias = source.weight, getattr(source, "bias", None)
    if not isinstance(weight, nn.Parameter):
        raise ValueError(f"{where}: weight is computed (parametrized?), expected a Parameter")
    if bias is not None and not isinstance(bias, nn.Parameter):
        raise ValueError(f"{where}: bias is a {type(bias).__name__}, expected a Parameter or None")
    if not 3 <= weight.dim() <= 5:
        raise ValueError(f"{where}: weight has {weight.dim()} dimensions, expected 3, 4 or 5")

    def setting(key: str, default: Any) -> Any:
        if geometry and geometry.get(key) is not None:
            return geometry[key]
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
    return layer  # type: ignore[no-any-return]


_HOOKS = [k for k in vars(nn.Module()) if re.match(r"_(forward|backward)_(pre_)?hooks", k)]


def take_place(new: nn.Module, old: nn.Module) -> None:
    """Give new the training flag, hooks and plain attributes of old, such as a YOLO layer's f."""
    new.training = old.training
    # Where old becomes a part of new, it still runs its own hooks.
    if not any(m is old for m in new.modules()):
        if old._is_full_backward_hook is not None:
            new._is_full_backward_hook = old._is_full_backward_hook
        for key in _HOOKS:
            hooks = getattr(new, key)
            if hooks:
                hooks.update(getattr(old, key))
            else:  # One dictionary for both, so that a handle made before still removes its hook.
                setattr(new, key, getattr(old, key))
    for key, value in vars(old).items():
        # YOLO's layers have a string attribute `type`, and every module has a method of that name.
        hidden = key not in vars(new) and hasattr(nn.Module, key) and not callable(value)
        if not key.startswith("_") and (hidden or not hasattr(new, key)):
            setattr(new, key, value)


def leftovers(
    module: nn.Module, source: nn.Module, kept: Sequence[Any] = (), drop: Sequence[str] = ()
) -> Iterator[str]:
    """Say what module has beside source's weight and bias and what is kept or dropped."""

    def lost(m: nn.Module, prefix: str) -> Iterator[str]:
        for name, t in (*m._parameters.items(), *m._buffers.items()):
            known = (m is source and name in ("weight", "bias")) or prefix + name in drop
            if t is not None and not known:
                yield f"{prefix}{name} {list(t.shape)}"
        for name, child in m.named_children():
            if any(child is k for k in kept) or isinstance(child, nn.Identity):
                continue
            if prefix + name in drop:
                continue
            if any(d is source or any(d is k for k in kept) for d in child.modules()):
                yield from lost(child, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name} ({type(child).__name__})"

    return lost(module, "")


def everything(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """All modules, parameters and buffers below a module, by every name they have."""
    yield from module.named_modules(remove_duplicate=False)
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def check_nothing_lost(where: str, layer: nn.Module) -> None:
    """Raise ValueError if the layer has anything but a weight and a bias."""
    more = list(leftovers(layer, layer))
    if "forward" in vars(layer):
        more.append(f"a forward of its own, {vars(layer)['forward']}")
    if more:
        raise ValueError(f"{where} has what would be lost: {', '.join(more)}")


def replacements(
    model: nn.Module, replacement: Callable[[str, nn.Module], nn.Module | None]
) -> dict[str, nn.Module]:
    """The new modules by the names of the old ones.

    A module that stands in several places is replaced by the same new one in all of them.
    """
    made: dict[nn.Module, nn.Module | None] = {}
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if inside(name, found):
            continue
        if module not in made:
            made[module] = replacement(name, module)
        new = made[module]
        if new is not None:
            found[name] = new
    return found


def inside(name: str, others: Collection[str]) -> bool:
    """Whether a module's name is among the others or below one of them."""
    parts = name.split(".")
    return any(".".join(parts[:i]) in others for i in range(len(parts) + 1))


def replace(model: nn.Module, found: dict[str, nn.Module]) -> tuple[nn.Module, str]:
    """Put the replacements in; return the model and a report."""
    groups = defaultdict(list)
    for name, new in found.items():
        old = model.get_submodule(name)
        into = new if isinstance(new, nn.Sequential) else [new]
        kinds = " + ".join(type(m).__name__ for m in into)
        groups[f"{type(old).__name__} -> {kinds}"].append(name or "the model")
        if name == "":
            model = new
        else:
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, new)
    lines = [f"{len(found)} layer{'s' * (len(found) > 1)} replaced"]
    lines += [f"  {kind}: {', '.join(names)}" for kind, names in groups.items()]
    return model, "\n".join(lines)
