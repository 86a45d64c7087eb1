"""State dicts with the names of other packages, or of the layer that stood there before."""

# ruff: noqa: UP045
import functools
import itertools
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn

from .bases import ConvNd

__all__ = ["original_state_dict"]


@dataclass(frozen=True)
class Part:
    """Keys of a layer that begin with `ours` and, where it comes from, with `theirs`.

    Where rows are given, ours are these rows of theirs, which has `of` rows in all. Where ours is
    None, the layer has no use for theirs. A layer that stands in the place of another has a tuple
    of such parts as its attribute `_original`.
    """

    ours: Optional[str]
    theirs: str
    rows: Optional[tuple[int, ...]] = None
    of: int = 0


def joint_names(joint: str, layer: Any) -> tuple[Part, ...]:
    """The parts of a packed layer whose original predicts offset and mask by one `joint`."""
    keys = [k for k in ("offset_generator", "mask_generator") if getattr(layer, k) is not None]
    ends = list(itertools.accumulate(getattr(layer, key).out_channels for key in keys))
    return tuple(
        Part(f"{key}.", f"{joint}.", tuple(range(begin, end)), ends[-1])
        for key, begin, end in zip(keys, [0, *ends], ends)  # noqa: B905 (a begin too many)
    )


def _keys(state_dict: dict[str, Any], prefix: str, name: Optional[str]) -> list[str]:
    """The keys that belong to a module, whose name ends in a dot, or to a parameter.

    To a parameter belong also the keys that torch's pruning, weight_norm and spectral_norm have in
    its place.
    """
    if name is None:
        return []
    rest = ".*" if name.endswith(".") else "(_(orig|mask|g|v|u))?"
    pattern = re.compile(re.escape(prefix + name) + rest)
    return [k for k in state_dict if pattern.fullmatch(k)]


def take_original(layer: Any, state_dict: dict[str, Any], prefix: str) -> None:
    """Rename what stands in state_dict by the original's names to the layer's own.

    Some names may be both the original's and the layer's. So a state_dict counts as the original's
    only if it has a key that the layer does not have (or has with fewer rows), and no key that the
    original does not have.
    """
    found, taken = {}, set()
    parts: tuple[Part, ...] = getattr(layer, "_original", ())
    ours = {key for part in parts for key in _keys(state_dict, prefix, part.ours)}
    theirs = {key for part in parts for key in _keys(state_dict, prefix, part.theirs)}
    ours -= {
        key
        for part in parts
        if part.rows is not None and len(part.rows) < part.of
        for key in _keys(state_dict, prefix, part.theirs)
        if state_dict[key].shape[:1] == (part.of,)
    }
    if ours - theirs or not theirs - ours:
        return
    for part in parts:
        source = prefix + part.theirs
        for key in _keys(state_dict, prefix, part.theirs):
            if part.ours is None:
                taken.add(key)
                continue
            t = state_dict[key]
            if part.rows is not None:
                if t.shape[:1] != (part.of,):
                    if part.theirs not in (*(p.ours for p in parts), "conv_offset."):
                        _skipped(layer, f"{key} {list(t.shape)}", f"expected {part.of} rows")
                    continue
                t = t[list(part.rows)]
            found[prefix + part.ours + key.removeprefix(source)] = t
            taken.add(key)
    for key in taken:
        del state_dict[key]
    state_dict.update(found)


def original_state_dict(model: nn.Module) -> dict[str, Any]:
    """The model's state_dict with the names it had before `deformnd.convert`.

    So that what was trained after a conversion goes back to the package it came from. Layers of
    `deformnd.compat.mmcv` give mmcv's names. All other keys are those of state_dict. The way back
    is load_state_dict: a converted model takes both its own names and the original ones. What a
    rule dropped is not there.

    Returns:
        A state_dict; tensors that had to be put together again are copies.

    Raises:
        TypeError: model is no Module.

    Example:
        >>> from deformnd import original_state_dict
        >>> from deformnd.compat import mmcv
        >>> layer = mmcv.ModulatedDeformConv2dPack(4, 6, 3)
        >>> original_state_dict(layer)["conv_offset.weight"].shape
        torch.Size([27, 4, 3, 3])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"original_state_dict: model is a {type(model).__name__}, expected a Module"
        )
    state: dict[str, Any] = model.state_dict()
    for name, layer in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        found: dict[str, Any] = {}
        for part in getattr(layer, "_original", ()):
            source = f"{prefix}{part.ours}"
            for key in _keys(state, prefix, part.ours):
                theirs, t = prefix + part.theirs + key.removeprefix(source), state.pop(key)
                if part.rows is None:
                    found[theirs] = t
                else:
                    if theirs not in found:
                        found[theirs] = t.new_empty(part.of, *t.shape[1:])
                    found[theirs][list(part.rows)] = t
        state.update(found)
    return state


def take_mmcv(
    layer: Any, state_dict: dict[str, Any], prefix: str, unexpected: list[str], errors: list[str]
) -> None:
    """Split mmcv's `conv_offset`, or `conv_offset_mask` of DCNv2's forks, between the generators.

    What does not fit stays in state_dict, where strict loading reports it. A warning names it as
    well, since loading that is not strict would skip it silently. What fits but means something
    else here is an error.
    """
    generators = [g for g in (layer.offset_generator, layer.mask_generator) if g is not None]
    _take_mmdet(state_dict, prefix, unexpected)
    for key in ("weight", "bias"):
        old = f"{prefix[:-1]}_offset.{key}"
        if old in unexpected and f"{prefix}conv_offset.{key}" not in state_dict:
            _skipped(layer, old, f"rename it {prefix}conv_offset.{key}")
    for joint in ("conv_offset", "conv_offset_mask"):
        name = f"{prefix}{joint}."
        for key in [k for k in state_dict if k.startswith(name)]:
            t, parameter = state_dict[key], key.removeprefix(name)
            own = [f"{prefix}{into}_generator.{parameter}" for into in ("offset", "mask")]
            misfit = _misfit(layer, generators, parameter, t)
            if any(k in state_dict for k in own):
                misfit = "the layer's own names are there, too"
            if misfit:
                _skipped(layer, f"{key} {list(t.shape)}", misfit)
                continue
            del state_dict[key]
            rows = [g.out_channels for g in generators]
            for part, into in zip(t.split(rows), own):  # noqa: B905 (perhaps no mask)
                state_dict[into] = part
            if parameter == "weight":
                errors += _other_meaning(layer, key)
                if t.shape[1:2] == (layer.in_channels,) and any(g.groups > 1 for g in generators):
                    errors.append(
                        f"{type(layer).__name__}: {key} {list(t.shape)} is of generators of one "
                        "group; build the layer with generator_groups=1"
                    )


def _take_mmdet(state_dict: dict[str, Any], prefix: str, unexpected: list[str]) -> None:
    """Rename a predictor as mmdet 1.x has it, beside the layer: `conv2_offset` beside `conv2`."""
    for key in ("weight", "bias"):
        old, new = f"{prefix[:-1]}_offset.{key}", f"{prefix}conv_offset.{key}"
        own = f"{prefix}offset_generator.{key}"
        if prefix and old in state_dict and new not in state_dict and own not in state_dict:
            state_dict[new] = state_dict.pop(old)
            if old in unexpected:
                unexpected.remove(old)


def watch_beside(parent: nn.Module) -> None:
    """Have a module load what mmdet 1.x kept beside a packed layer in it.

    torch shows a layer only the keys below its own name, so the module above has to see to others.
    """
    hooks = [getattr(h, "hook", None) for h in parent._load_state_dict_pre_hooks.values()]
    if not any(getattr(h, "func", None) is _take_mmdet_below for h in hooks):
        # The hook gets the children and not the parent, which torch would hold by a weak reference
        # that is dead in a shallow copy.
        hook = functools.partial(_take_mmdet_below, parent._modules)
        parent._register_load_state_dict_pre_hook(hook)


def _take_mmdet_below(
    children: dict[str, Optional[nn.Module]], state_dict: dict[str, Any], prefix: str, *rest: Any
) -> None:
    """The load_state_dict pre-hook of a module with these children."""
    for name, child in children.items():
        if hasattr(child, "offset_generator") and f"{name}_offset" not in children:
            _take_mmdet(state_dict, f"{prefix}{name}.", [])


def _skipped(layer: Any, key: str, why: str) -> None:
    warnings.warn(
        f"{type(layer).__name__}: {key} of the checkpoint is not loaded: {why}", stacklevel=2
    )


def _misfit(layer: Any, generators: list[Any], parameter: str, t: Tensor) -> str:
    """Why the generators cannot share a parameter of the joint predictor, or '' if they can."""
    if layer.offset_generator is None:
        return "the layer has no offset_generator"
    if not all(isinstance(g, ConvNd) and "weight" in g._parameters for g in generators):
        return "a generator is no plain convolution"
    if len(generators) == 2 and layer.offset_groups != layer.mask_groups:
        return f"offset_groups is {layer.offset_groups} and mask_groups {layer.mask_groups}"
    if any(getattr(g, parameter, None) is None for g in generators):
        return f"a generator has no {parameter} (generator_bias=True?)"
    rows = sum(g.out_channels for g in generators)
    return "" if t.shape[:1] == (rows,) else f"the generators have {rows} channels"


def _other_meaning(layer: Any, key: str) -> list[str]:
    """A message for each activation by which this layer differs from mmcv's with equal weights."""
    expected: list[tuple[str, str, Callable[[Tensor], Tensor], str]] = []
    if layer.offset_generator is not None:
        expected.append(("offset", "as they are predicted", lambda t: t, "None"))
    if layer.mask_generator is not None:
        expected.append(("mask", "the sigmoid of the prediction", torch.sigmoid, "torch.sigmoid"))
    return [
        f"{type(layer).__name__}: {key} is of mmcv's layout, where {kind}s are {meaning}, but "
        f"{kind}_activation is {getattr(layer, f'{kind}_activation')}; build the layer with "
        f"{kind}_activation={wanted}, or as deformnd.compat.mmcv does"
        for kind, meaning, function, wanted in expected
        if not _computes(layer, kind, function)
    ]


def _computes(layer: Any, kind: str, function: Callable[[Tensor], Tensor]) -> bool:
    """Whether the activation has that function's values; True on devices that have no values."""
    activation = getattr(layer, f"{kind}_activation")
    channels = getattr(layer, f"{kind}_generator").out_channels
    given = torch.linspace(-4, 4, 2**layer.rank * channels)
    given = given.view(1, channels, *(2,) * layer.rank)
    if activation is None:
        return torch.equal(function(given), given)
    own = next(itertools.chain(activation.parameters(), activation.buffers()), None)
    given = given if own is None else given.to(own.device, own.dtype)
    with torch.no_grad():
        try:
            value, expected = activation(given), function(given)
        except Exception:  # An activation that fails for this size is another function.
            return False
    if value.is_meta or type(value) is not Tensor:
        return True
    same = value.shape == given.shape
    return same and torch.allclose(value.float(), expected.float(), 1e-2, 1e-2)
