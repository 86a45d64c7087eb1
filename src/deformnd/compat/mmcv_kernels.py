"""`deformnd.compat.mmcv.accelerate`: mmcv's own functions and layers on deformnd's kernels."""

from __future__ import annotations

import functools
import importlib
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

import torch
from torch import Tensor

from ..kernels import library
from . import _Acceleration, _attend, _check_groups, _check_kernels, _divert, _first_values

__all__ = ["accelerate"]


class accelerate(_Acceleration):
    """Run mmcv's deformable convolutions and attention on deformnd's kernels.

    It takes effect at once, for the whole process, until `undo()` or, as a context manager, until
    the block ends. What changes are the functions of mmcv's compiled module behind `deform_conv2d`
    and `modulated_deform_conv2d`, so that every caller gets there: these functions, the four
    layers, and 'DCN' and 'DCNv2' of mmcv's registry, imported or built before or inside the block.
    So do `MultiScaleDeformableAttention` and what else calls `multi_scale_deformable_attn_pytorch`
    or `MultiScaleDeformableAttnFunction`.
    mmcv's own Python stays around them, and so do its names, its checkpoints and its limits: no
    second derivatives. Offsets and masks that are larger than the output are read as mmcv reads
    them (see `modulated_deform_conv2d`).

    mmcv-lite has no compiled module. With it, or where mmcv's does not load, `mmcv.ops` can be
    imported while this is in effect, and its deformable operators run on any device; its other
    compiled operators, such as nms, raise a NotImplementedError when called. So enter before you
    import what imports mmcv.ops, as mmdet's models do. `undo()` takes mmcv.ops and what it
    registered away again, and the next use brings the same back.

    With compiled operators, devices whose kernels deformnd does not have compiled keep mmcv's own:
    `devices` has those that run on deformnd's. Uses may be nested.

    Raises:
        ImportError: mmcv 2 or newer is not installed.
        RuntimeError: mmcv has compiled operators and deformnd has none (see `deformnd.has_ops`).

    Example:
        >>> import torch, mmcv  # doctest: +SKIP
        >>> from mmcv.cnn import build_conv_layer  # doctest: +SKIP
        >>> from deformnd.compat.mmcv import accelerate
        >>> with accelerate():  # doctest: +SKIP
        ...     layer = build_conv_layer(dict(type="DCNv2"), 3, 4, kernel_size=3, padding=1)
        ...     layer(torch.rand(1, 3, 8, 8)).shape
        torch.Size([1, 4, 8, 8])
    """

    def __init__(self) -> None:
        _check()
        self.devices = tuple(key.lower() for key in library.compiled_keys())
        super().__init__(functools.partial(_exchange, self.devices))


def _check() -> None:
    try:
        import mmcv
        import mmengine  # noqa: F401 (which mmcv 1 does without)
    except ModuleNotFoundError as error:
        if error.name not in ("mmcv", "mmengine"):
            raise
        raise ImportError(
            f"accelerate: {error.name} is not installed, expected mmcv or mmcv-lite, 2.0 or newer "
            "(deformnd.compat.mmcv's own functions and layers need neither)"
        ) from error
    del mmcv


def _exchange(devices: tuple[str, ...]) -> Callable[[], None]:
    """Put our functions into mmcv's compiled module; return what takes them out again."""
    try:
        compiled: Any = importlib.import_module("mmcv._ext")
    except ImportError:
        take_away = _stand_in()
    else:
        _check_kernels(devices)
        importlib.import_module("mmcv.ops")  # The import fills mmcv's registry.
        theirs = {name: getattr(compiled, name) for name in _FUNCTIONS}
        for name, function in _FUNCTIONS.items():
            setattr(compiled, name, _on(devices, function, theirs[name]))

        def take_away() -> None:
            for name, function in theirs.items():
                setattr(compiled, name, function)

    # On CPUs attention is this function, whether or not there are compiled operators.
    in_torch = sys.modules["mmcv.ops.multi_scale_deform_attn"].multi_scale_deformable_attn_pytorch
    give_back = _divert(in_torch, devices, _attention_in_torch)

    def undo() -> None:
        give_back()
        take_away()

    return undo


def _on(devices: tuple[str, ...], ours: Any, theirs: Any) -> Callable[..., Any]:
    def call(input: Tensor, *args: Any, **sizes: Any) -> Any:
        return (ours if input.device.type in devices else theirs)(input, *args, **sizes)

    return call


class _Missing(types.ModuleType):
    """Stands in for mmcv's compiled module, which asserts that each operator is there."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **sizes: Any) -> None:
            raise NotImplementedError(
                f"mmcv's compiled operator {name} is not there"
                + (
                    ": it runs while deformnd.compat.mmcv.accelerate() is in effect"
                    if name in _FUNCTIONS
                    else "; deformnd.compat.mmcv.accelerate() brings those of the deformable "
                    "convolutions and of deformable attention alone"
                )
            )

        return missing


# What an import of mmcv.ops beside a stand-in leaves: modules by name, and entries of the registry.
# Both are kept between uses, since a class made in one use must be the same in the next.
_imported: dict[str, types.ModuleType] = {}
_registered: dict[str, Any] = {}


def _stand_in() -> Callable[[], None]:
    """Put a stand-in where mmcv has no compiled module, and import mmcv.ops beside it."""
    import mmcv
    from mmengine.registry import MODELS

    if not _imported:
        stand_in = _Missing("mmcv._ext")
        stand_in.__spec__ = ModuleSpec("mmcv._ext", None)
        sys.modules["mmcv._ext"] = stand_in
        before = set(MODELS.module_dict)
        try:
            importlib.import_module("mmcv.ops")
        except BaseException:
            del sys.modules["mmcv._ext"]
            raise
        _registered.update({k: v for k, v in MODELS.module_dict.items() if k not in before})
        names = [k for k in sys.modules if (k + ".").startswith(("mmcv._ext.", "mmcv.ops."))]
        _imported.update({name: sys.modules[name] for name in names})
    sys.modules.update(_imported)
    MODELS.module_dict.update(_registered)
    mmcv.ops = _imported["mmcv.ops"]
    vars(_imported["mmcv._ext"]).update(_FUNCTIONS)

    def undo() -> None:
        for name in _FUNCTIONS:
            delattr(_imported["mmcv._ext"], name)
        for name in _imported:
            sys.modules.pop(name, None)
        for name in _registered:
            MODELS.module_dict.pop(name, None)
        del mmcv.ops

    return undo


# Functions in the place of mmcv's compiled ones. The caller has made dtypes equal, and has made the
# tensors for results, into which these write. The tensors for columns and ones are working memory
# of mmcv's own functions and are not needed here.


def _deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, *memory: Tensor, **sizes: int
) -> None:
    _forward("deform_conv2d", output, input, weight, offset, None, None, sizes)


def _deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    *memory: Tensor,
    **sizes: int,
) -> None:
    into = (grad_input, None, grad_offset, None, None)
    _backward("deform_conv2d", into, grad_output, input, weight, offset, None, sizes)


def _deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    *memory: Tensor,
    scale: float,
    **sizes: int,
) -> None:
    into = (None, grad_weight, None, None, None)
    weight = torch.empty_like(grad_weight)  # A weight's gradient depends on its sizes alone.
    if scale != 1:
        grad_output = grad_output * scale
    _backward("deform_conv2d", into, grad_output, input, weight, offset, None, sizes)


def _modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    **sizes: int,
) -> None:
    given = bias if sizes["with_bias"] else None
    _forward("modulated_deform_conv2d", output, input, weight, offset, mask, given, sizes)


def _modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    **sizes: int,
) -> None:
    given = grad_bias if sizes["with_bias"] else None
    into = (grad_input, grad_weight, grad_offset, grad_mask, given)
    _backward("modulated_deform_conv2d", into, grad_output, input, weight, offset, mask, sizes)


def _attention_in_torch(
    value: Tensor,
    value_spatial_shapes: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    return _attend(value, value_spatial_shapes, sampling_locations, attention_weights)


# Of these two, the forward returns its result, and the backward overwrites the gradients given.


def _attention_forward(
    value: Tensor,
    shapes: Tensor,
    level_start_index: Tensor,
    locations: Tensor,
    weights: Tensor,
    im2col_step: int,
) -> Tensor:
    return _attend(value, shapes, locations, weights)


def _attention_backward(
    value: Tensor,
    shapes: Tensor,
    level_start_index: Tensor,
    locations: Tensor,
    weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_locations: Tensor,
    grad_weights: Tensor,
    im2col_step: int,
) -> None:
    sizes = shapes.flatten().tolist()
    grads = torch.ops.deformnd.deform_attention_backward.default(
        grad_output, value, locations, weights, sizes, [True] * 3
    )
    for target, grad in zip((grad_value, grad_locations, grad_weights), grads, strict=True):
        target.copy_(grad)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "deform_conv_forward": _deform_conv_forward,
    "deform_conv_backward_input": _deform_conv_backward_input,
    "deform_conv_backward_parameters": _deform_conv_backward_parameters,
    "modulated_deform_conv_forward": _modulated_deform_conv_forward,
    "modulated_deform_conv_backward": _modulated_deform_conv_backward,
    "ms_deform_attn_forward": _attention_forward,
    "ms_deform_attn_backward": _attention_backward,
}

# The names that the two families of functions give to stride, padding and dilation.
_NAMES = {
    "deform_conv2d": (("dH", "dW"), ("padH", "padW"), ("dilationH", "dilationW")),
    "modulated_deform_conv2d": (
        ("stride_h", "stride_w"),
        ("pad_h", "pad_w"),
        ("dilation_h", "dilation_w"),
    ),
}


def _parameters(name: str, sizes: dict[str, int]) -> tuple[Any, ...]:
    return (*([sizes[h], sizes[w]] for h, w in _NAMES[name]), sizes["group"])


def _checked(
    name: str,
    output: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    sizes: dict[str, int],
) -> tuple[Tensor | None, Tensor | None]:
    """Offset and mask as mmcv reads them for this output, once their groups have been checked."""
    _check_groups(name, "deform_groups", sizes["deformable_group"], weight, offset, mask)
    if mask is not None:
        size = list(output.shape[2:])
        offset, mask = _first_values(offset, size), _first_values(mask, size)
    return offset, mask


def _forward(
    name: str,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    sizes: dict[str, int],
) -> None:
    offset, mask = _checked(name, output, weight, offset, mask, sizes)
    # mmcv has chosen the dtype, which autocast must not change.
    with torch.autocast(input.device.type, enabled=False):
        output.copy_(
            torch.ops.deformnd.deform_conv.default(
                input, weight, offset, mask, bias, *_parameters(name, sizes)
            )
        )


def _backward(
    name: str,
    into: tuple[Tensor | None, ...],
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    sizes: dict[str, int],
) -> None:
    offset, mask = _checked(name, grad_output, weight, offset, mask, sizes)
    needs = [t is not None for t in into]
    grads = torch.ops.deformnd.deform_conv_backward.default(
        grad_output, input, weight, offset, mask, *_parameters(name, sizes), needs
    )
    for target, grad in zip(into, grads, strict=True):
        if target is None:
            continue
        if target.shape == grad.shape:
            target.copy_(grad)
        else:
            whole = target.new_zeros(len(target), target[0].numel())
            whole[:, : grad[0].numel()] = grad.flatten(1)
            target.copy_(whole.view(target.shape))
