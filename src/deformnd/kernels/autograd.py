"""The operators' derivatives: backwards, forwards, of both, and under torch.func's transforms.

directional.py has the mathematics, direct.py the shortcut that a call takes where it can.

Note [functorch]
Under vmap, grad, jacrev ... torch.func's front key sees a call first. Its fallback would bring
the call to the Autograd key with the transform half undone, where autograd.Function cannot run.
So the operators have a kernel at that key, which hands the whole call to autograd.Function;
torch.func peels its transforms off that one by one, by the vmap rules below or by `backward`.

Note [the public way]
Not torch.library.register_autograd, since its functions refuse torch.func's transforms (torch
2.13) other than vmap, and know no forward mode. It is what is left, derivatives of any order
included, should torch lose the front key or the guard that a kernel at the Autograd key needs.
DTensor is then told only if it was imported first.
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

# Gradients by the operator's tensors, as by (input, weight, offset, mask, bias); None where not
# needed.
Gradients = tuple[Tensor | None, ...]


class Kind(Protocol):
    """What is the same for a Family of geometry.py and for deform_attention."""

    @property
    def name(self) -> str: ...
    @property
    def tensors(self) -> int:
        """How many the operator takes,"""

    @property
    def saved(self) -> int:
        """and how many of these its derivatives need."""

    @property
    def transposed(self) -> bool:
        """Whether plans of the backward have the result's gradient before all else."""


class _Call(threading.local):
    """Of the operator that this thread runs."""

    differentiated = False  # whether its result will have gradients
    # As what to remember a user's call: its key, the ids of its tensors, its sizes. `known_as` is
    # that of one whose checks have passed, until its kernel takes it.
    asked: tuple[Any, tuple[int, ...], tuple[Any, ...]] | None = None
    known_as = asked


call = _Call()


class _Known(NamedTuple):
    """A call that one like it repeats: Note [calls like earlier ones] in direct.py."""

    replay: direct.Replay
    sizes: tuple[Any, ...]  # those of the call, before they were brought to lists
    parameters: tuple[Any, ...]  # what came of them
    # How to run its backward again, by what that depends on beside this, and which of the
    # gradients that gives.
    backwards: dict[Any, tuple[direct.Replay, tuple[bool, ...]]]


class Operator:
    """An operator that goes the direct way (direct.py) where a call allows it.

    count: of its tensors. ways: by dispatch keys two functions, of calls that are differentiated
    and others. repeat: makes a result that of a known call that is differentiated.
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
        """The kernel of one of the ways, which says here how to run it again: what runs behind it,
        as hooks of saved tensors, may call this operator, too."""

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
        """The result of a user's call like an earlier one. None: the call has to be looked at,
        and will be known if it comes to this operator with the same tensors."""
        if not direct.replays(tensors[0]):
            return None
        try:
            keys = direct.forward_keys(tensors)
            if keys is None:
                return None
            call.asked = None  # what is left of a call that failed
            if keys not in self.ways or direct.forward_mode():
                return None
            parts, addresses = direct.described(tensors)
            key = (keys, *parts, *sizes)
            known = self.known.get(key)
        except TypeError:  # something that is no tensor, or sizes in a list
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
    """Whether sizes that are equal are of the same type, as 1, 1.0 and True are not."""
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

    Both have to be defined, and their kernels are given by dispatch key.
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
    """For an operator of which the first `count` arguments are tensors; the derivatives need the
    first `saved` of these."""
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
            # torch turns forward mode off in here, to spare this level; an outer one (jacfwd of
            # jacfwd) needs it, so it is this level's tangents that go.
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
        operator = f"deformnd::{name}"  # see Note [the public way]
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
    """`count`: of the tensors among the arguments."""
    if direct.forward_mode() or _recorded(args[:count]):
        call.differentiated = True
        try:
            return way[0](*args)
        finally:
            call.differentiated = False
    return way[1](*args)


def _recorded(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd records a call; in inference mode it does not, gradients enabled or not."""
    return (
        torch.is_grad_enabled()
        and any([t is not None and t.requires_grad for t in tensors])
        and not torch.is_inference_mode_enabled()
    )


def _at_front(lib: torch.library.Library, name: str, kernel: Callable[..., Any]) -> bool:
    """Register the kernel as Note [functorch] has it, if torch has that key."""
    try:
        lib.impl(name, kernel, "FuncTorchDynamicLayerFrontMode")
    except RuntimeError:
        return False
    return True


def _operators(family: Family, parameters: Sequence[Any]) -> tuple[Any, Any]:
    """The operator and its backward as functions of tensors only, as directional.py takes them."""
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
    """`kernels` are the backward's own, by keys as direct.py has them."""
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
    """`saved` are the context's, which whoever asks for them twice unpacks twice: the hooks of
    torch.utils.checkpoint forbid that."""
    tensors = (grad_output, *saved)
    backward = direct.backward_kernel(kernels, tensors)
    if backward is None:
        backward = getattr(torch.ops.deformnd, family.name + "_backward")
    needs = list(ctx.needs_input_grad[: family.tensors])
    grads: Gradients = backward(*tensors, *ctx.parameters, needs)
    return grads


def repeated(family: Kind, kernels: dict[int, Callable[..., Gradients]]) -> Any:
    """The `repeat` of the family's operator: its tensors, and what it knows of the call."""

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
            tensors = (*both, *others)  # as plans have them: the image is before the points
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
    """The rule, which divides by the number of calls that are mapped, also where there are none."""
    if info.batch_size != 0:
        return rule(info, in_dims, *args)  # type: ignore[no-any-return]
    # Such a call's shapes come of one on zeros: the sums of nothing, which derivatives pass.
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
        # A gradient of the weight for each: they are made groups.
        parameters[-1] *= size
        into, out_dims = (1, 1, 0, 1, 1), (1, 0, 1, 1, 0)
    folded = [_fold(t, d, size, i) for t, d, i in zip(args[:count], in_dims, into, strict=False)]
    grads = tuple(
        None if t is None else t.unflatten(d, (size, t.shape[d] // size))
        for t, d in zip(operator(*folded, *parameters, needs), out_dims, strict=True)
    )
    return grads, tuple(None if t is None else d for t, d in zip(grads, out_dims, strict=True))
