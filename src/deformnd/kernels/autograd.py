"""The operators' derivatives: backwards, forwards, of both, and under torch.func's transforms.

directional.py has the mathematics, direct.py the shortcut that a call takes where it can.

Note [functorch]
Under vmap, grad, jacrev ... torch.func's front key sees a call first. Its fallback would bring
the call to the Autograd key with the transform half undone, where autograd.Function cannot run.
So the operators have a kernel at that key, which hands the whole call to autograd.Function;
torch.func peels its transforms off that one by one, by the vmap rules below or by `backward`.

Note [the public way] torch.library.register_autograd is not used where it can be avoided: what it
registers knows no forward mode, and refuses torch.func's transforms other than vmap (as of torch
2.13). It is the way out should torch lose the front key, or the guard that a kernel at the Autograd
key needs; derivatives of any order work by it, too. DTensor then learns of the operators only if it
was imported first.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import direct, directional, sharding
from .directional import Tensors
from .geometry import Family, Geometry, Slots, empty

# Gradients by the operator's tensors, such as (input, weight, offset, mask, bias); None for those
# that are not needed.
Gradients = tuple[Tensor | None, ...]


class Kind(Protocol):
    """What both a Family of geometry.py and deform_attention say of themselves."""

    @property
    def name(self) -> str: ...
    @property
    def tensors(self) -> int:
        """The number of tensors that the operator takes."""

    @property
    def saved(self) -> int:
        """How many of these, the first ones, its derivatives need."""

    @property
    def transposed(self) -> bool:
        """Whether the backward's plans have the result's gradient as their first tensor."""


class _Call(threading.local):
    """What is known of the call that this thread is making."""

    differentiated = False  # Whether gradients will be asked of its result.
    # What a user's call is to be remembered by: its key, the ids of its tensors, and its sizes.
    # Once the call has passed its checks, this becomes `known_as`, until the kernel takes it from
    # there.
    asked: tuple[Any, tuple[int, ...], tuple[Any, ...]] | None = None
    known_as = asked


call = _Call()


class _Known(NamedTuple):
    """A call that can be run again, see Note [calls like earlier ones] in direct.py."""

    replay: direct.Replay
    sizes: tuple[Any, ...]  # As the user gave them.
    parameters: tuple[Any, ...]  # As the operator gets them, in lists.
    # For each kind of backward seen so far, how to run it again, and which gradients that gives.
    backwards: dict[Any, tuple[direct.Replay, tuple[bool, ...]]]


class Operator:
    """An operator whose calls go the direct way (direct.py) where they can.

    dispatched: the operator as torch calls it. count: the number of its tensors. ways: for each set
    of dispatch keys two functions, one for calls that are differentiated and one for all others.
    repeat: gives the result of a repeated call its backward.
    """

    repeat: Callable[..., Tensor]

    def __init__(self, dispatched: Callable[..., Any], count: int, ways: dict[int, Any]) -> None:
        self.dispatched, self.count, self.ways = dispatched, count, ways
        self.known: dict[Any, _Known] = {}

    def __call__(self, *args: Any) -> Any:
        keys = direct.forward_keys(args[: self.count])
        way = None if keys is None else self.ways.get(keys)
        if way is None:
            return self.dispatched(*args)
        call.known_as, call.asked = call.asked, None
        return _go(way, args, self.count)

    def remembers(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        """A kernel that notes how to run its call again.

        It does so right after the kernel, since what runs later in the call, such as hooks of saved
        tensors, may call this operator as well.
        """

        def forward(*args: Any) -> Any:
            asked, call.known_as = call.known_as, None
            direct.latest.replay = None
            result = kernel(*args)
            replay = direct.latest.replay
            if asked and replay and asked[1] == tuple(map(id, args[: self.count])):
                if len(self.known) >= 4096:
                    self.known.clear()
                self.known[asked[0]] = _Known(replay, asked[2], args[self.count :], {})
            return result

        return forward

    def again(self, tensors: Tensors, sizes: tuple[Any, ...]) -> Tensor | None:
        """The result of a user's call that is like an earlier one, or None.

        After None the caller checks the call and makes it. If it comes to this operator with the
        same tensors, the next call like it will be known.
        """
        if not direct.replays(tensors[0]):
            return None
        try:
            keys = direct.forward_keys(tensors)
            if keys is None:
                return None
            call.asked = None  # Forget an earlier call that failed its checks.
            if keys not in self.ways or direct.forward_mode():
                return None
            parts, addresses = direct.described(tensors)
            key = (keys, *parts, *sizes)
            known = self.known.get(key)
        except TypeError:  # An argument is no tensor, or sizes are in a list, which has no hash.
            return None
        results = None
        if known is not None and all(map(_alike, known.sizes, sizes)):
            results = known.replay(addresses)
        if results is None:
            call.asked = key, tuple(map(id, tensors)), sizes
            return None
        result: Tensor = results[0]
        if _recorded(tensors):
            return self.repeat(*tensors, (known, result))
        return result


def _alike(known: Any, size: Any) -> bool:
    """Whether equal sizes have equal types: 1, 1.0 and True are equal, but only 1 is valid."""
    return known is size or (
        type(known) is type(size)
        and (not isinstance(size, tuple) or all([type(value) is int for value in size]))
    )


OPERATORS: dict[str, Operator] = {}


def register(
    lib: torch.library.Library,
    family: Family,
    kernels: dict[str, Callable[..., Tensor]],
    backward_kernels: dict[str, Callable[..., Gradients]],
) -> None:
    """Register the derivatives of the family's operator and of its backward.

    Both operators have to be defined already. Their kernels are given by dispatch key.
    """
    of = functools.partial
    direct_backward = direct.kernels_by_keys(backward_kernels)
    for name, own, count, saved, gradient, tangent, vmap_rule in (
        (
            family.name,
            kernels,
            family.tensors,
            family.saved,
            of(forward_gradient, family, direct_backward),
            of(_tangent, family),
            of(_forward_vmap, family),
        ),
        (
            family.name + "_backward",
            backward_kernels,
            1 + family.saved,
            1 + family.saved,
            of(_backward_gradient, family),
            of(_backward_tangent, family),
            of(_backward_vmap, family),
        ),
    ):
        register_one(lib, name, own, count, saved, gradient, tangent, vmap_rule)
    OPERATORS[family.name].repeat = repeated(family, direct_backward)


def register_one(
    lib: torch.library.Library,
    name: str,
    kernels: dict[str, Callable[..., Any]],
    count: int,
    saved: int,
    gradient: Callable[..., tuple[Any, ...]],
    tangent: Callable[[Tensors, Sequence[Any], Tensors], Any],
    vmap_rule: Callable[..., tuple[Any, Any]],
) -> None:
    """Register the derivatives of one operator.

    Its first `count` arguments are tensors, of which the derivatives need the first `saved`.
    """
    vmap_rule = functools.partial(_vmap_of_any, name, vmap_rule)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            with direct.below_autograd():
                return getattr(torch.ops.deformnd, name)(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*inputs[:saved])
            ctx.save_for_forward(*inputs[:saved])
            ctx.parameters = inputs[count:]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return gradient(ctx, *grads)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            if direct.set_forward_mode is None:
                raise NotImplementedError(f"deformnd::{name}: no forward mode with this torch")
            # torch turns forward mode off in here, so that this level's tangents are not used
            # again. An outer level (as in jacfwd of jacfwd) needs forward mode, so it is turned on
            # again, and this level's tangents are taken off the tensors instead.
            tensors = [
                None if t is None else forward_ad.unpack_dual(t, level=0).primal
                for t in ctx.saved_tensors
            ]
            with direct.set_forward_mode(True):
                return tangent(tensors, ctx.parameters, tangents[:count])

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
            return vmap_rule(info, in_dims, *args)

    apply: Any = Differentiable.apply
    if direct.below_autograd is None or not _at_front(lib, name, apply):
        operator = f"deformnd::{name}"  # See Note [the public way].
        setup = Differentiable.setup_context
        torch.library.register_autograd(operator, gradient, setup_context=setup, lib=lib)
        torch.library.register_vmap(operator, vmap_rule, lib=lib)
        OPERATORS[name] = Operator(getattr(torch.ops.deformnd, name), count, {})
        return

    ways: dict[int, Any] = {}
    OPERATORS[name] = Operator(getattr(torch.ops.deformnd, name), count, ways)
    for keys, below in direct.kernels_by_keys(kernels).items():
        below = OPERATORS[name].remembers(below)
        known: Any = type("Differentiable", (Differentiable,), {"forward": staticmethod(below)})
        ways[keys] = direct.apply(known), below
    otherwise = apply, Differentiable.forward

    def kernel(keys: Any, *args: Any) -> Any:
        if sharding.unknown and "torch.distributed.tensor" in sys.modules:
            sharding.register()
        return _go(ways.get(keys.raw_repr(), otherwise) if ways else otherwise, args, count)

    lib.impl(name, kernel, "Autograd", with_keyset=True)


def _go(way: tuple[Any, Any], args: Sequence[Any], count: int) -> Any:
    """Make a call, whose first `count` arguments are tensors, by one of a way's two functions."""
    if direct.forward_mode() or _recorded(args[:count]):
        call.differentiated = True
        try:
            return way[0](*args)
        finally:
            call.differentiated = False
    return way[1](*args)


def _recorded(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd records a call, which it never does in inference mode."""
    return (
        torch.is_grad_enabled()
        and any([t is not None and t.requires_grad for t in tensors])
        and not torch.is_inference_mode_enabled()
    )


def _at_front(lib: torch.library.Library, name: str, kernel: Callable[..., Any]) -> bool:
    """Register the kernel at the key of Note [functorch]; False if this torch has no such key."""
    try:
        lib.impl(name, kernel, "FuncTorchDynamicLayerFrontMode")
    except RuntimeError:
        return False
    return True


def _operators(family: Family, parameters: Sequence[Any]) -> tuple[Any, Any]:
    """The operator and its backward as functions of (input, weight, offset, mask) and of needs.

    This is the form in which directional.py takes them, for every family.
    """
    forward = getattr(torch.ops.deformnd, family.name)
    backward = getattr(torch.ops.deformnd, family.name + "_backward")
    return (
        lambda *tensors: forward(*family.own((*tensors, None)), *parameters),
        lambda grad_output, *tensors_needs: family.slots(
            backward(
                grad_output,
                *family.own(tensors_needs[:-1]),
                *parameters,
                list(family.own([*tensors_needs[-1], False])),
            )
        ),
    )


def _geometry(family: Family, slots: Slots, parameters: Sequence[Any]) -> Geometry:
    return family.geometry(*family.own((*slots[:4], None)), *parameters)


def forward_gradient(
    family: Kind,
    kernels: dict[int, Callable[..., Gradients]],
    ctx: Any,
    grad_output: Tensor | None,
) -> tuple[Any, ...]:
    """The first derivative. `kernels` are the backward's, by sets of keys as in direct.py."""
    if grad_output is None:
        return (None,) * (family.tensors + len(ctx.parameters))
    grads = _gradients(family, kernels, ctx, grad_output, ctx.saved_tensors)
    return (*grads, *(None for _ in ctx.parameters))


def _gradients(
    family: Kind,
    kernels: dict[int, Callable[..., Gradients]],
    ctx: Any,
    grad_output: Tensor,
    saved: Tensors,
) -> Gradients:
    """The gradients by the backward's kernel.

    `saved` are the context's saved tensors. They are given and not asked for again, since that
    would unpack them a second time, which the hooks of torch.utils.checkpoint forbid.
    """
    tensors = (grad_output, *saved)
    backward = direct.backward_kernel(kernels, tensors)
    if backward is None:
        backward = getattr(torch.ops.deformnd, family.name + "_backward")
    needs = list(ctx.needs_input_grad[: family.tensors])
    grads: Gradients = backward(*tensors, *ctx.parameters, needs)
    return grads


def repeated(family: Kind, kernels: dict[int, Callable[..., Gradients]]) -> Any:
    """Operator.repeat for a family: a function of its tensors and of (what is known, result)."""

    class Repeated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*args[: family.saved])
            ctx.known, result = args[family.tensors]
            ctx.parameters = ctx.known.parameters
            return result

        @staticmethod
        def backward(ctx: Any, grad_output: Any) -> Any:
            if grad_output is None:
                return (None,) * (family.tensors + 1)
            saved = ctx.saved_tensors
            input, *others = saved
            both = (grad_output, input) if family.transposed else (input, grad_output)
            tensors = (*both, *others)  # In the order of plans, with the image before the points.
            if direct.backward_kernel(kernels, tensors) is None:
                return (*_gradients(family, kernels, ctx, grad_output, saved), None)
            parts, addresses = direct.described(tensors)
            key = (ctx.needs_input_grad, *parts)
            backwards = ctx.known.backwards
            if key in backwards:
                replay, wanted = backwards[key]
                results = replay(addresses)
                if results is not None:
                    return (*direct.spread(results, wanted), None)
            direct.latest.replay = None
            found = _gradients(family, kernels, ctx, grad_output, saved)
            if direct.latest.replay is not None:
                backwards[key] = direct.latest.replay, tuple([t is not None for t in found])
            return (*found, None)

    return direct.apply(Repeated)


def _backward_gradient(family: Family, ctx: Any, *along: Tensor | None) -> tuple[Any, ...]:
    """The second derivative. See Note [directions] in directional.py."""
    grad_output, *saved = ctx.saved_tensors
    *parameters, _ = ctx.parameters
    by_grad_output, *by_saved = ctx.needs_input_grad[: 1 + len(saved)]
    first = _tangent(family, saved, parameters, along) if by_grad_output else None
    tensors, direction, needs = (family.slots(own)[:4] for own in (saved, along, by_saved))
    g = _geometry(family, tensors, parameters)
    _, backward = _operators(family, parameters)
    rest = directional.gradients(backward, g, grad_output, tensors, direction, needs)
    return (first, *family.own(rest), *(None for _ in ctx.parameters))


def _tangent(family: Family, saved: Tensors, parameters: Sequence[Any], along: Tensors) -> Tensor:
    """The operator's derivative along a direction in its tensors."""
    tensors = family.slots(saved)[:4]
    *direction, along_bias = family.slots(along)
    g = _geometry(family, tensors, parameters)
    forward, _ = _operators(family, parameters)
    total = directional.tangent(forward, g, tensors, direction)
    input = tensors[0]
    if total is None:
        total = empty(family.output_shape(g), input).zero_()
    if along_bias is not None:
        total = total + along_bias.view(-1, *[1] * (total.dim() - 2))
    return total.to(input.dtype)


def _backward_tangent(
    family: Family, tensors: Tensors, parameters: Sequence[Any], direction: Tensors
) -> Gradients:
    grad_output, *saved = tensors
    along_grad_output, *along = direction
    assert grad_output is not None
    *parameters, needs = parameters
    slots = family.slots(saved)[:4]
    g = _geometry(family, slots, parameters)
    _, backward = _operators(family, parameters)
    total = directional.gradients(
        backward, g, grad_output, slots, family.slots(along)[:4], family.slots(needs)[:4]
    )
    bias_like = grad_output.new_empty(grad_output.shape[1])
    grads: Slots = family.own([*total, None])
    if along_grad_output is not None:
        operator = getattr(torch.ops.deformnd, family.name + "_backward")
        more = operator(along_grad_output, *saved, *parameters, needs)
        grads = [directional.plus(a, b) for a, b in zip(grads, more, strict=True)]
    return tuple(
        torch.zeros_like(like) if need and t is None and like is not None else t
        for need, t, like in zip(needs, grads, family.own([*slots, bias_like]), strict=True)
    )


def _vmap_of_any(
    name: str, rule: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[Any, Any]:
    """The vmap rule, or for a dimension of size 0, by which rules would divide, an empty result."""
    if info.batch_size != 0:
        return rule(info, in_dims, *args)  # type: ignore[no-any-return]
    # The shapes of an empty result are those of a call on zeros. The zeros are sums over the empty
    # dimension, so that derivatives still reach the tensors.
    one = [t.sum(d) if isinstance(d, int) else t for t, d in zip(args, in_dims, strict=True)]
    results = getattr(torch.ops.deformnd, name)(*one)
    if isinstance(results, Tensor):
        return results.unsqueeze(0)[:0], 0
    none = tuple(None if t is None else t.unsqueeze(0)[:0] for t in results)
    return none, tuple(None if t is None else 0 for t in none)


def _fold(t: Tensor | None, dim: int | None, size: int, into: int) -> Tensor | None:
    """Merge the mapped dimension `dim` of t (None: not mapped) into dimension `into`."""
    if t is None:
        return None
    t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.movedim(0, into).flatten(into, into + 1)


def _forward_vmap(
    family: Family, info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[Tensor, int]:
    operator = getattr(torch.ops.deformnd, family.name)
    size: int = info.batch_size
    tensors, dims = family.slots(args[: family.tensors]), family.slots(in_dims[: family.tensors])
    parameters = args[family.tensors :]
    if dims[1] is None and dims[4] is None:
        _, weight, _, _, bias = tensors
        input, offset, mask = (_fold(tensors[i], dims[i], size, 0) for i in (0, 2, 3))
        output = operator(*family.own((input, weight, offset, mask, bias)), *parameters)
        return output.unflatten(0, (size, output.shape[0] // size)), 0
    into = (1, 0, 1, 1, 0)
    folded = [_fold(t, d, size, i) for t, d, i in zip(tensors, dims, into, strict=True)]
    output = operator(*folded, *parameters[:-1], parameters[-1] * size)
    return output.unflatten(1, (size, output.shape[1] // size)), 1


def _backward_vmap(
    family: Family, info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[Any, Any]:
    operator = getattr(torch.ops.deformnd, family.name + "_backward")
    size: int = info.batch_size
    count = 1 + family.saved
    *parameters, needs = args[count:]
    into, out_dims = (0,) * count, (0,) * family.tensors
    if family.weighted:
        # Each mapped call has a weight gradient of its own, so the calls become groups of one call.
        parameters[-1] *= size
        into, out_dims = (1, 1, 0, 1, 1), (1, 0, 1, 1, 0)
    folded = [_fold(t, d, size, i) for t, d, i in zip(args[:count], in_dims, into, strict=False)]
    grads = tuple(
        None if t is None else t.unflatten(d, (size, t.shape[d] // size))
        for t, d in zip(operator(*folded, *parameters, needs), out_dims, strict=True)
    )
    return grads, tuple(None if t is None else d for t, d in zip(grads, out_dims, strict=True))
