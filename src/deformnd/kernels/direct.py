"""Calls without the dispatcher, and all else that takes the dispatcher's private names of torch.

Note [the direct way]
Where nothing but autograd and a device's own kernel listens to a call, that kernel is called
without the dispatcher between them, nor Function.apply and what that does for torch.func: both
cost the host more than all else. Who listens is in the call's set of dispatch keys: any mode,
subclass, transform or view that torch still has to see to has a key of its own there.

Note [calls like earlier ones]
What a call checks, looks up and works out depends on what `described` tells of its tensors and on
its sizes, and costs the host more than the launches that come of it. So a backend that has run a
plan with a call's tensors as they were says how to run it again (`latest`), and the next call alike
does only that: gpu/__init__.py has it for what is dispatched, autograd.py for calls by users.

Note [private names]
No private name has to be there. They are looked for once, here: without those of the direct way,
all calls are dispatched; what the other two are missed for, autograd.py says.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

Kernel = Callable[..., Any]
# Runs a plan again with tensors at these addresses: its results, or None if it cannot now.
Replay = Callable[[Sequence[int]], Any]

_C: Any = torch._C

# Each a context manager, or None. Inside the first, a call's operators begin below autograd; with
# True, the second turns forward mode on again.
below_autograd: Any = getattr(_C, "_AutoDispatchBelowAutograd", None)
set_forward_mode: Any = getattr(forward_ad, "_set_fwd_grad_enabled", None)


def forward_mode() -> bool:
    """Whether forward-mode differentiation is on, or torch does not tell."""
    return getattr(forward_ad, "_current_level", 0) >= 0


class _Latest(threading.local):
    """Of the call that this thread ran last: how to run one like it."""

    def __init__(self) -> None:
        self.replay: Replay | None = None


latest = _Latest()


def replays(input: Any) -> bool:
    """Whether the backend of such a call would say how to run it again: the core does not."""
    return isinstance(input, Tensor) and input.is_cuda


def described(tensors: Sequence[Tensor | None]) -> tuple[list[Any], list[int]]:
    """What a plan depends on beside sizes that are no tensor's, and the tensors' addresses."""
    parts: list[Any] = [torch.are_deterministic_algorithms_enabled()]
    addresses = []
    for t in tensors:
        if t is None:
            parts.append(None)
        else:
            parts += (t.shape, t.stride(), t.dtype, t.get_device())
            addresses.append(t.data_ptr())
    return parts, addresses


def spread(results: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The results of a plan in their order, and None for what was not wanted."""
    found = iter(results)
    return tuple([next(found) if want else None for want in wanted])


def kernels_by_keys(kernels: dict[str, Kernel]) -> dict[int, Kernel]:
    """The kernels of devices, by the keys of a call to which nobody else listens.

    Empty where torch lacks a private name. `kernels` are by dispatch key.
    """
    return {
        _keys(*both).raw_repr(): _below(kernel)
        for key, kernel in kernels.items()
        if _DEAF is not None and hasattr(_C.DispatchKey, "Autograd" + key)
        for both in ((key, "Autograd" + key), (key,))  # the latter of tensors made for inference
    }


def apply(function: Any) -> Kernel:
    """The `apply` of an autograd.Function without torch.func's part in it."""
    direct: Kernel = getattr(super(torch.autograd.Function, function), "apply", function.apply)
    return direct


def backward_kernel(kernels: dict[int, Kernel], tensors: Sequence[Tensor | None]) -> Kernel | None:
    """The one of `kernels_by_keys` for a call in a backward, None: the call is dispatched."""
    if (
        not kernels
        or torch.is_grad_enabled()
        or forward_mode()
        or _C._autograd._profiler_enabled()  # which learns of operators by dispatch
        or has_torch_function(tensors)
    ):
        return None
    return kernels.get(_listening(tensors))


def forward_keys(tensors: Sequence[Tensor | None]) -> int | None:
    """The keys of a call by a user, as `kernels_by_keys` has them; None: it is dispatched."""
    if (
        not _USUAL
        or torch.compiler.is_compiling()
        or _C._autograd._profiler_enabled()
        or has_torch_function(tensors)
        or _C._dispatch_tls_local_exclude_set().raw_repr() not in _USUAL
    ):
        return None
    return _listening(tensors)


def _listening(tensors: Sequence[Tensor | None]) -> int:
    """The keys of a call with these tensors."""
    keys = _C._dispatch_tls_local_include_set().raw_repr()
    for t in tensors:
        if t is not None:
            keys |= _C._dispatch_keys(t).raw_repr()
    return int(keys & ~_DEAF)


def _below(kernel: Kernel) -> Kernel:
    def below(*args: Any) -> Any:
        with below_autograd():
            return kernel(*args)

    return below


def _keys(*names: str) -> Any:
    """The set of these dispatch keys."""
    sets = [_C.DispatchKeySet(getattr(_C.DispatchKey, name)) for name in names]
    return functools.reduce(lambda a, b: a | b, sets)


def _usual_exclusions() -> frozenset[int]:
    """The keys that a thread does not listen to before anything changes that, as autocast does:
    otherwise, and in inference mode."""
    found: list[int] = []

    def look() -> None:
        found.append(int(_C._dispatch_tls_local_exclude_set().raw_repr()))
        with torch.inference_mode():
            found.append(int(_C._dispatch_tls_local_exclude_set().raw_repr()))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return frozenset(found)


# Keys that every call has, and that mean nothing to a backward; None if a private name is missing.
# _USUAL: the sets of those that are left out in a thread where nothing has changed that.
_DEAF: Any = None
_USUAL: frozenset[int] = frozenset()
try:
    _DEAF = _keys("BackendSelect", "ADInplaceOrView", "AutocastCPU", "AutocastCUDA").raw_repr()
    with below_autograd():
        _listening([torch.empty(0, device="cpu")])
    _C._autograd._profiler_enabled()
    if hasattr(_C, "_dispatch_tls_local_exclude_set"):
        _USUAL = _usual_exclusions()
except (AttributeError, TypeError):
    _DEAF = None
