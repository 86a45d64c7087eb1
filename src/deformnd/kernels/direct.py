"""Calls that go around torch's dispatcher, and all else that needs its private names.

Note [the direct way]
Where only autograd and a device's own kernel have to see a call, that kernel is called directly:
without the dispatcher, and without the part of Function.apply that serves torch.func. Both cost the
host more time than all else in a small call. Who has to see a call is in its set of dispatch keys:
every mode, subclass, transform or view that concerns torch has a key of its own there.

Note [calls like earlier ones]
What a call checks, looks up and works out depends only on its sizes and on what `described` tells
of its tensors, and it costs the host more time than launching the kernels. So a backend that has
run a plan on a call's tensors says in `latest` how to run it again, and the next call like it does
only that. gpu/__init__.py does so for calls that are dispatched, autograd.py for those by users.

Note [private names]
No private name of torch has to be there. They are looked for once, here. Without those of the
direct way all calls are dispatched, and autograd.py does without the other two.
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
# Runs a plan again on tensors at these addresses; gives its results, or None if it cannot now.
Replay = Callable[[Sequence[int]], Any]

_C: Any = torch._C

# Two context managers, or None where torch lacks them. Within the first, operators skip autograd.
# The second, given True, turns forward mode on again where torch has turned it off.
below_autograd: Any = getattr(_C, "_AutoDispatchBelowAutograd", None)
set_forward_mode: Any = getattr(forward_ad, "_set_fwd_grad_enabled", None)


def forward_mode() -> bool:
    """Whether forward-mode differentiation is on; True if this torch does not tell."""
    return getattr(forward_ad, "_current_level", 0) >= 0


class _Latest(threading.local):
    """How to run a call again that is like the last one of this thread."""

    def __init__(self) -> None:
        self.replay: Replay | None = None


latest = _Latest()


def replays(input: Any) -> bool:
    """Whether the input's backend says how to run a call again, which only the GPU's does."""
    return isinstance(input, Tensor) and input.is_cuda


def described(tensors: Sequence[Tensor | None]) -> tuple[list[Any], list[int]]:
    """What a plan depends on beside stride, padding and the like; and the tensors' addresses."""
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
    """A plan's results, each in its place, with None for those that were not wanted."""
    found = iter(results)
    return tuple([next(found) if want else None for want in wanted])


def kernels_by_keys(kernels: dict[str, Kernel]) -> dict[int, Kernel]:
    """The kernels by the sets of keys of calls that nobody but autograd and the kernel has to see.

    `kernels` are by dispatch key. Empty where torch lacks a private name.
    """
    return {
        _keys(*both).raw_repr(): _below(kernel)
        for key, kernel in kernels.items()
        if _DEAF is not None and hasattr(_C.DispatchKey, "Autograd" + key)
        for both in ((key, "Autograd" + key), (key,))  # Inference tensors have no Autograd key.
    }


def apply(function: Any) -> Kernel:
    """The `apply` of an autograd.Function, without the part that serves torch.func."""
    direct: Kernel = getattr(super(torch.autograd.Function, function), "apply", function.apply)
    return direct


def backward_kernel(kernels: dict[int, Kernel], tensors: Sequence[Tensor | None]) -> Kernel | None:
    """The one of `kernels_by_keys` for a call in a backward, or None if it must be dispatched."""
    if (
        not kernels
        or torch.is_grad_enabled()
        or forward_mode()
        or _C._autograd._profiler_enabled()  # The profiler sees what is dispatched alone.
        or has_torch_function(tensors)
    ):
        return None
    return kernels.get(_listening(tensors))


def forward_keys(tensors: Sequence[Tensor | None]) -> int | None:
    """A user's call's set of keys for `kernels_by_keys`, or None if it must be dispatched."""
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
    """The set of keys of a call with these tensors, without those that mean nothing."""
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
    """The sets of keys that a thread leaves out as it starts: in general, and in inference mode.

    Contexts such as autocast's change the set, and with another set calls are dispatched.
    """
    found: list[int] = []

    def look() -> None:
        found.append(int(_C._dispatch_tls_local_exclude_set().raw_repr()))
        with torch.inference_mode():
            found.append(int(_C._dispatch_tls_local_exclude_set().raw_repr()))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return frozenset(found)


# _DEAF: keys that calls have whether or not anybody has to see them; None if a private name is
# missing. _USUAL: what _usual_exclusions gives; empty if a private name is missing.
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
