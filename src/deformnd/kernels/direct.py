"""Calls without the dispatcher, and all else that takes the dispatcher's private names of torch.

Note [the direct way]
Where nothing but autograd and a device's own kernel listens to a call, that kernel is called
without the dispatcher between them, nor Function.apply and what that does for torch.func: both
cost the host more than all else. Who listens is in the call's set of dispatch keys: any mode,
subclass, transform or view that torch still has to see to has a key of its own there.

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

_C: Any = torch._C

# Each a context manager, or None. Inside the first, a call's operators begin below autograd; with
# True, the second turns forward mode on again.
below_autograd: Any = getattr(_C, "_AutoDispatchBelowAutograd", None)
set_forward_mode: Any = getattr(forward_ad, "_set_fwd_grad_enabled", None)


def forward_mode() -> bool:
    """Whether forward-mode differentiation is on, or torch does not tell."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def kernels_by_keys(kernels: dict[str, Kernel]) -> dict[int, Kernel]:
    """The kernels of devices, by the keys of a call to which nobody else listens.

    Empty where torch lacks a private name. `kernels` are by dispatch key.
    """
    return {
        _keys(key, "Autograd" + key).raw_repr(): _below(kernel)
        for key, kernel in kernels.items()
        if _DEAF is not None and hasattr(_C.DispatchKey, "Autograd" + key)
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
        _USUAL is None
        or torch.compiler.is_compiling()
        or _C._autograd._profiler_enabled()
        or has_torch_function(tensors)
        or _C._dispatch_tls_local_exclude_set().raw_repr() != _USUAL
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


def _usual_exclusions() -> int:
    """The keys that a thread does not listen to before anything changes that, as autocast does."""
    found: list[int] = []
    thread = threading.Thread(
        target=lambda: found.append(int(_C._dispatch_tls_local_exclude_set().raw_repr()))
    )
    thread.start()
    thread.join()
    return found[0]


# Keys that every call has, and that mean nothing to a backward; None if a private name is missing.
# _USUAL: those that are left out in a thread where nothing has changed that.
_DEAF: Any = None
_USUAL: int | None = None
try:
    _DEAF = _keys("BackendSelect", "ADInplaceOrView", "AutocastCPU", "AutocastCUDA").raw_repr()
    with below_autograd():
        _listening([torch.empty(0, device="cpu")])
    _C._autograd._profiler_enabled()
    if hasattr(_C, "_dispatch_tls_local_exclude_set"):
        _USUAL = _usual_exclusions()
except (AttributeError, TypeError):
    _DEAF = None
