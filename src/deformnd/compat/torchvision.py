"""torchvision's deform_conv2d on deformnd's kernels, without a change to the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels import direct, library
from . import _Acceleration, _check_groups, _check_kernels

__all__ = ["accelerate"]


class accelerate(_Acceleration):
    """Run every call of torchvision's deform_conv2d on deformnd's kernels.

    It takes effect at once, for the whole process, until `undo()` or, as a context manager, until
    the block ends. What changes are the kernels that the dispatcher finds for
    `torchvision::deform_conv2d` and its backward, so that every caller gets there: functional or
    module, eager, scripted, exported or compiled, before or inside the block. torchvision's own
    autograd and shape rules stay around them, and so do its limits: no second derivatives. Its
    autocast rule, too, which it has for CUDA alone, holds on every device: half and float32
    tensors are computed in float32, and the result has the input's dtype.

    Devices whose kernels deformnd does not have compiled keep torchvision's own: `devices` has
    those that run on deformnd's. Uses may be nested.

    Raises:
        ImportError: torchvision is not installed, or not for this version of torch.
        RuntimeError: deformnd has no compiled kernels here (see `deformnd.has_ops`).

    Example:
        >>> import torch, torchvision  # doctest: +SKIP
        >>> from deformnd.compat.torchvision import accelerate
        >>> layer = torchvision.ops.DeformConv2d(3, 4, kernel_size=3, padding=1)  # doctest: +SKIP
        >>> with accelerate():  # doctest: +SKIP
        ...     layer(torch.rand(1, 3, 8, 8), torch.randn(1, 18, 8, 8)).shape
        torch.Size([1, 4, 8, 8])
    """

    def __init__(self) -> None:
        _check()
        keys = library.compiled_keys()
        self.devices = tuple(key.lower() for key in keys)
        _check_kernels(self.devices)
        super().__init__(functools.partial(_register, keys))


def _register(keys: list[str]) -> Callable[[], None]:
    """Register our kernels; return what takes them back."""
    ours: Any = torch.library.Library("torchvision", "IMPL")
    for key in keys:
        ours.impl("deform_conv2d", _forward, key)
        ours.impl("_deform_conv2d_backward", _backward, key)
        if not _has_autocast(key):
            rule = functools.partial(_autocast, key.lower())
            ours.impl("deform_conv2d", rule, "Autocast" + key)
    # Without this private method the library is dropped, and takes its kernels back once nothing
    # else holds it.
    return getattr(ours, "_destroy", [ours].clear)


def _has_autocast(key: str) -> bool:
    """Whether torchvision has registered its autocast rule for the device of a dispatch key."""
    ask: Any = getattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", None)
    if ask is None:  # This name is private to torch and may be gone.
        return key == "CUDA"
    return bool(ask("torchvision::deform_conv2d", "Autocast" + key))


def _check() -> None:
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise ImportError(
            "accelerate: torchvision is not installed, so there is nothing to accelerate "
            "(deformnd's own operators need no acceleration)"
        ) from error
    except RuntimeError as error:  # Its compiled operators are for another torch.
        raise ImportError(
            f"accelerate: torchvision does not work with torch {torch.__version__}: {error}"
        ) from error
    if not hasattr(torch.ops.torchvision, "deform_conv2d"):
        raise ImportError(
            f"accelerate: torchvision has no compiled operators for torch {torch.__version__}"
        )


def _autocast(device: str, *args: Any) -> Tensor:
    """torchvision's autocast rule, in which float64 stays, as in all rules of torch.

    Without it our operator, which is called below autograd, would cast where autograd cannot see
    it.
    """

    def single(t: Tensor) -> Tensor:
        return t.float() if t.is_floating_point() and t.dtype != torch.float64 else t

    with torch.autocast(device, enabled=False):
        output: Tensor = torch.ops.torchvision.deform_conv2d(*map(single, args[:5]), *args[5:])
    return output.to(args[0].dtype)


_below_autograd = direct.below_autograd or torch.no_grad


# These run below autograd. Results are contiguous, whatever the input's layout, since that is what
# torchvision's kernels give and its fakes promise to torch.compile.


def _forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor,
    bias: Tensor,
    *parameters: Any,
) -> Tensor:
    stride, padding, dilation, groups, use_mask = _parameters(parameters)
    given = mask if use_mask else None
    _check_groups("deform_conv2d", "offset_groups", parameters[7], weight, offset, given)
    with _below_autograd():
        output: Tensor = torch.ops.deformnd.deform_conv.default(
            input, weight, offset, given, bias, stride, padding, dilation, groups
        )
    return output.contiguous()


def _backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor,
    bias: Tensor,
    *parameters: Any,
) -> tuple[Tensor, ...]:
    stride, padding, dilation, groups, use_mask = _parameters(parameters)
    given = mask if use_mask else None
    _check_groups("deform_conv2d", "offset_groups", parameters[7], weight, offset, given)
    with _below_autograd():
        grads = torch.ops.deformnd.deform_conv_backward.default(
            grad,
            input,
            weight,
            offset,
            given,
            stride,
            padding,
            dilation,
            groups,
            [True, True, True, use_mask, True],
        )
    grad_mask = grads[3].contiguous() if use_mask else torch.zeros_like(mask)
    by_input, by_weight, by_offset, by_bias = (grads[i].contiguous() for i in (0, 1, 2, 4))
    return by_input, by_weight, by_offset, grad_mask, by_bias


def _parameters(p: tuple[Any, ...]) -> tuple[Any, ...]:
    """stride, padding, dilation, groups, use_mask."""
    return p[0:2], p[2:4], p[4:6], p[6], p[8]
