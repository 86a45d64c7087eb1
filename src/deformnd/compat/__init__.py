"""Other packages' names on deformnd's operators, so that a changed import is enough to move."""

# ruff: noqa: UP006, UP035, UP045 (TorchScript)
import inspect
import threading
import types
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, List, Optional, Tuple, TypeVar

import torch
from torch import Tensor

from ..ops.functional import _ints, _outside_a_trace, deform_attention

# Modules that are imported when they are first asked for, as in deformnd itself.
_LAZY = (
    "counters",
    "internimage",
    "mmcv",
    "torch_pruning",
    "torchvision",
    "transformers",
    "tvdcn",
)

if TYPE_CHECKING:
    from . import counters as counters
    from . import internimage as internimage
    from . import mmcv as mmcv
    from . import torch_pruning as torch_pruning
    from . import torchvision as torchvision
    from . import transformers as transformers
    from . import tvdcn as tvdcn
else:

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> List[str]:
    return sorted({*globals(), *_LAZY})


Use = TypeVar("Use", bound="_Acceleration")


class _Acceleration:
    """An exchange of code that is in effect for the whole process while any use of its class is."""

    devices: Tuple[str, ...]
    """Device types whose calls run on deformnd's kernels, such as ('cpu', 'cuda')."""

    _lock: ClassVar[threading.Lock]
    _uses: ClassVar[int]  # how many uses are in effect
    _undo: ClassVar[Optional[Callable[[], None]]]  # takes the exchange back while it is in effect

    def __init_subclass__(cls) -> None:
        cls._lock, cls._uses, cls._undo = threading.Lock(), 0, None

    def __init__(self, exchange: Callable[[], Callable[[], None]]) -> None:
        """`exchange` exchanges the code and returns a function that takes that back."""
        self._active = False
        kind = type(self)
        with kind._lock:
            if kind._uses == 0:
                kind._undo = exchange()
            kind._uses += 1
            self._active = True

    def undo(self) -> None:
        """Give the package its own back, unless another use is in effect. Idempotent."""
        kind = type(self)
        with kind._lock:
            if not self._active:
                return
            self._active = False
            kind._uses -= 1
            undo = kind._undo
            if kind._uses == 0 and undo is not None:
                undo()
                kind._undo = None

    def __enter__(self: Use) -> Use:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


def _diverted(*args: Any, _deformnd: Callable[..., Any], **options: Any) -> Any:
    return _deformnd(*args, **options)


def _divert(
    function: types.FunctionType, devices: Tuple[str, ...], ours: Callable[..., Any]
) -> Callable[[], None]:
    """Have a function of another package compute by `ours`; return a function that undoes that.

    The function's code is exchanged, and not what its name stands for. So the change reaches those
    who hold the function already, such as layers that keep it as an attribute. Tensors on devices
    other than `devices` keep the function's own code. `ours` has the same parameters, one of which
    is a tensor `value`.
    """
    signature = inspect.signature(function)
    at = list(signature.parameters).index("value")
    code, defaults, keywords = function.__code__, function.__defaults__, function.__kwdefaults__
    theirs = types.FunctionType(code, function.__globals__, function.__name__, defaults)
    theirs.__kwdefaults__ = keywords

    def call(*args: Any, **options: Any) -> Any:
        value = args[at] if len(args) > at else options.get("value")
        # A call without a value goes to theirs, which raises the error that its users know.
        there = isinstance(value, Tensor) and value.device.type in devices
        return (ours if there else theirs)(*args, **options)

    # The order matters: another thread may call the function between any two of these steps.
    told: Any = function
    told.__signature__ = signature
    function.__kwdefaults__ = {**(keywords or {}), "_deformnd": call}
    function.__code__ = _diverted.__code__
    function.__defaults__ = None

    def undo() -> None:
        function.__defaults__ = defaults
        function.__code__ = code
        function.__kwdefaults__ = keywords
        del told.__signature__

    return undo


def _attend(value: Tensor, shapes: Any, locations: Tensor, weights: Tensor) -> Tensor:
    """deform_attention, with the result's dtype that torch's own operations would give."""
    device = value.device.type
    # Autocast is only turned off where it is on, since exported graphs would have the context in
    # them. The meta device has none; torch's own question, is_autocast_available, is not asked,
    # because torch.compile cannot trace it in torch 2.11.
    if device != "meta" and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return _attend(value, shapes, locations, weights)
    output = deform_attention(value, shapes, locations, weights)
    if value.dtype == weights.dtype:
        return output
    return output.to(torch.promote_types(value.dtype, weights.dtype))


def _check_kernels(devices: Tuple[str, ...]) -> None:
    if not devices:
        raise RuntimeError(
            "accelerate: deformnd was installed without its compiled kernels, which are what "
            "would be faster (deformnd.has_ops() is False)"
        )


def _check_groups(
    name: str,
    argument: str,
    groups: int,
    weight: Tensor,
    offset: Optional[Tensor],
    mask: Optional[Tensor],
) -> None:
    """Check a given number of offset groups, which our functions read off the offset's channels."""
    if not torch.jit.is_scripting():
        if torch.jit.is_tracing():
            check: Any = _check_groups
            _outside_a_trace(check, name, argument, _ints(groups), weight, offset, mask)
            return
        if not isinstance(groups, int) or isinstance(groups, bool):
            raise TypeError(f"{name}: {argument} is {groups}, expected an int")
    if groups < 1:
        raise ValueError(f"{name}: {argument} is {groups}, expected at least 1")
    if not isinstance(weight, Tensor) or weight.dim() != 4:
        return  # The function called next has a better message for this.
    points = weight.shape[2] * weight.shape[3]
    if isinstance(offset, Tensor) and offset.dim() >= 3:
        channels = offset.shape[-3]
        if channels != groups * 2 * points:
            raise ValueError(
                f"{name}: offset has {channels} channels, expected {groups * 2 * points} "
                f"({argument} {groups} x 2 axes x {points} kernel points)"
            )
    if isinstance(mask, Tensor) and mask.dim() >= 3:
        channels = mask.shape[-3]
        if channels != groups * points:
            raise ValueError(
                f"{name}: mask has {channels} channels, expected {groups * points} "
                f"({argument} {groups} x {points} kernel points)"
            )


def _first_values(t: Optional[Tensor], out: List[int]) -> Optional[Tensor]:
    """The part of a too large offset or mask that mmcv's kernels read.

    They read the memory of each image from its beginning, as if it had the output's size.
    """
    if t is None or t.dim() != 4:
        return t
    size = t.shape[2:]
    if not torch.jit.is_scripting():
        if torch.jit.is_tracing():
            size = _ints(size)
    if size[0] * size[1] <= out[0] * out[1]:
        return t
    if not torch.jit.is_scripting():
        _warn_of_first_values(tuple(size), tuple(out))
    channels = t.shape[1]
    read: Tensor = t.flatten(1)[:, : channels * out[0] * out[1]]
    return read.view(t.shape[0], channels, out[0], out[1])


_warned = False


def _warn_of_first_values(given: tuple[int, ...], out: tuple[int, ...]) -> None:
    global _warned
    if not _warned and not torch.compiler.is_compiling():
        _warned = True
        warnings.warn(
            f"deformnd.compat.mmcv: an offset or mask of {given} for an output of {out} is read as "
            "mmcv reads it, from the beginning of its memory; models trained so depend on it (said "
            "once)",
            stacklevel=4,
        )
