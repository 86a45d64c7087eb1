"""No private name of torch has to be there: without any one, all is right, only slower.

Each check runs in a process of its own, which hides the name from deformnd alone, since torch
needs many of its own names itself. They are copies of one that has not imported deformnd.
"""

import ast
import functools
import importlib
import importlib.util
import os
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from apart import apart

# deformnd itself is imported once the names are hidden.
SOURCE = Path(importlib.util.find_spec("deformnd").origin).parent

# Private names that operators and layers use, and without which they must still be right.
NAMES = [
    "torch._C.DispatchKey",
    "torch._C.DispatchKeySet",
    "torch._C.DispatchKeySet.raw_repr",
    "torch._C._AutoDispatchBelowAutograd",
    "torch._C._autograd",
    "torch._C._autograd._profiler_enabled",
    "torch._C._dispatch_has_kernel_for_dispatch_key",
    "torch._C._dispatch_keys",
    "torch._C._dispatch_tls_local_exclude_set",
    "torch._C._dispatch_tls_local_include_set",
    "torch._C._get_tracing_state",
    "torch._C._set_tracing_state",
    "torch.autograd.forward_ad._current_level",
    "torch.autograd.forward_ad._set_fwd_grad_enabled",
]
# This is no name, but a key of the dispatcher.
KEY = "FuncTorchDynamicLayerFrontMode"
# Private names that are needed for DTensors.
DTENSOR = [
    "torch.distributed.tensor.DTensor._op_dispatcher",
    "torch.distributed.tensor.experimental.register_sharding",
]
# Private names that only exports and the command line use.
ELSEWHERE = ["torch.utils._pytree"]
# A type that stands in annotations alone, which nobody evaluates.
ANNOTATIONS = ["torch._ops"]


def names_in(source):
    """The private names of torch in a file, written out or as strings for getattr."""
    roots = {"torch": "torch", "_C": "torch._C", "forward_ad": "torch.autograd.forward_ad"}
    for node in ast.walk(ast.parse(source)):
        owner = name = None
        if isinstance(node, ast.Attribute):
            owner, name = ast.unparse(node.value), node.attr
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "getattr"
            and (isinstance(node.args[1], ast.Constant))
        ):
            owner, name = ast.unparse(node.args[0]), ast.unparse(node.args[1]).strip("'")
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{a.name}" for a in node.names if private(a.name))
        root, _, rest = (owner or "").partition(".")
        if root in roots and re.fullmatch(r"[\w.]+", f"{owner}.{name}"):
            path = ".".join(p for p in (roots[root], rest, name) if p)
            if private(name) or path.startswith("torch._C."):
                yield path


def private(name):
    return name.startswith("_") and not name.endswith("__")


def in_type_checking(source):
    return re.sub(r"(?ms)^if TYPE_CHECKING:\n.*?^(?=\S)", "if True:\n    pass\n", source)


def test_all_private_names_are_listed():
    """All private names in the source but for those in kernels/gpu are in the lists above."""
    found = set()
    for file in SOURCE.rglob("*.py"):
        if not {"gpu"} & set(file.relative_to(SOURCE).parts):
            found |= {n for n in names_in(in_type_checking(file.read_text())) if "torch" in n[:6]}
    listed = {*NAMES, *ELSEWHERE, *ANNOTATIONS} - {"torch._C.DispatchKeySet.raw_repr"}
    found.discard("torch._C")
    found = {n for n in found if not any(n.startswith(e + ".") for e in (*ELSEWHERE, *ANNOTATIONS))}
    assert found == listed


def hide(path):
    """Make torch's name missing for deformnd."""
    owner, _, name = path.rpartition(".")
    try:
        owner = importlib.import_module(owner)
    except ModuleNotFoundError:  # The name before the last dot is a class.
        module, _, kind = owner.rpartition(".")
        owner = getattr(importlib.import_module(module), kind)
    value = getattr(owner, name)

    def asked_by_us():
        return sys._getframe(2).f_globals.get("__name__", "").startswith("deformnd")

    if isinstance(owner, types.ModuleType):

        class Hiding(type(owner)):
            def __getattribute__(self, asked):
                if asked == name and asked_by_us():
                    raise AttributeError(f"hidden: {path}")
                return super().__getattribute__(asked)

        owner.__class__ = Hiding
    elif isinstance(owner, type(torch._C.DispatchKeySet)):
        delattr(owner, name)
        return
    else:

        class Hidden:
            def __get__(self, *_):
                if asked_by_us():
                    raise AttributeError(f"hidden: {path}")
                return value

        setattr(owner, name, Hidden())


def hide_key(key):
    """Make torch fail for the key, as a torch that does not know it."""
    impl = torch.library.Library.impl

    def without(self, name, kernel, dispatch_key="", **options):
        if dispatch_key == key:
            raise RuntimeError(f"could not parse dispatch key: {key}")
        return impl(self, name, kernel, dispatch_key, **options)

    torch.library.Library.impl = without


def check_operators():
    """Forward, backward, second derivative, vmap, and a layer, against the reference."""
    import deformnd
    from cases import Case, aggregate, requires_grad
    from deformnd.kernels import reference
    from deformnd.kernels.geometry import FAMILIES, attention_geometry

    for family in FAMILIES:
        if family.weighted:
            case = Case((4, 3), (2, 2), family.transposed, channels=(2, 2), padding=1)
        else:
            case = aggregate((4, 3), (2, 2), 2, padding=1)
        plain = reference.scatter if family.transposed else reference.gather

        def expected(*tensors, case=case, family=family, plain=plain):
            g = family.geometry(*tensors, *case.operator_parameters())
            return plain(g, *family.slots(tensors))

        def got(*tensors, case=case):
            return case.operator()(*tensors, *case.operator_parameters())

        compare(got, expected, list(requires_grad(case.tensors()).values()))

    shapes = [(3, 4), (2, 1)]

    def attend(value, locations, weights):
        return deformnd.deform_attention(value, shapes, locations, weights)

    def defined(*tensors):
        return reference.attend(attention_geometry(*tensors, (3, 4, 2, 1)), *tensors)

    tensors = {
        "value": torch.randn(1, 14, 2, 3).double(),
        "locations": torch.rand(1, 5, 2, 2, 3, 2).double(),
        "weights": torch.rand(1, 5, 2, 2, 3).double(),
    }
    compare(attend, defined, list(requires_grad(tensors).values()))

    x = torch.rand(1, 3, 6, 6)
    layer = deformnd.PackedDeformConv2d(3, 4, 3, padding=1, modulated=True)
    dense = torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(x), dense)
    layer(x).sum().backward()
    assert layer.weight.grad.isfinite().all()
    torch.testing.assert_close(torch.jit.trace(layer, (x,), check_trace=False)(x), dense)


def compare(got, expected, tensors):
    for function in (lambda f, ts: [f(*ts)], first, second):
        torch.testing.assert_close(function(got, tensors), function(expected, tensors))
    with torch.no_grad():
        torch.testing.assert_close(got(*tensors), expected(*tensors))
    detached = [t.detach() for t in tensors]
    stacked = [torch.stack([t, -t]) for t in detached]
    each = torch.stack([expected(*detached), expected(*(-t for t in detached))])
    torch.testing.assert_close(torch.vmap(got)(*stacked), each)
    x, *rest = detached
    along = functools.partial(lambda got, rest, x: got(x, *rest), got, rest)
    limited(torch.func.vjp, along, x)
    limited(torch.func.jvp, along, (x,), (x,))


def first(f, tensors):
    return torch.autograd.grad(f(*tensors).square().sum(), tensors)


def second(f, tensors):
    grads = torch.autograd.grad(f(*tensors).square().sum(), tensors, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)


def limited(call, *args):
    """Make a call that must either run or raise a clear error."""
    try:
        call(*args)
    except (NotImplementedError, RuntimeError) as error:
        known = "no forward mode with this torch|register_autograd|setup_context"
        assert re.search(known, str(error)), error


def check_torchvision():
    """The registration of compat.torchvision, with torchvision's schema alone."""
    from cases import Case
    from deformnd.compat import torchvision

    library = torch.library.Library("torchvision", "DEF")
    tensors = "Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias"
    parameters = ", ".join(f"SymInt p{i}" for i in range(8)) + ", bool use_mask"
    library.define(f"deform_conv2d({tensors}, {parameters}) -> Tensor")
    library.define(
        f"_deform_conv2d_backward(Tensor grad, {tensors}, {parameters}) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    undo = torchvision._register(["CPU"])
    case = Case((4, 3), (2, 2), offset_groups=1, mask_groups=1)
    tensors = case.tensors()
    output = torch.ops.torchvision.deform_conv2d(
        *tensors.values(), 1, 1, 0, 0, 1, 1, case.groups, 1, True
    )
    torch.testing.assert_close(output, case.call(tensors))
    undo()


def check_dtensor():
    """Other tensors run as ever, and DTensors are refused rather than computed wrongly."""
    import tempfile
    import warnings

    from torch import distributed
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    import deformnd

    file = tempfile.NamedTemporaryFile()
    distributed.init_process_group("gloo", f"file://{file.name}", world_size=1, rank=0)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check_operators()
        assert ["DTensor" in str(w.message) for w in caught].count(True) <= 1  # at import: none
        mesh = init_device_mesh("cpu", (1,))
        x, w = (distribute_tensor(torch.rand(1, 2, 4, 4), mesh) for _ in range(2))
        o = distribute_tensor(torch.rand(1, 32, 1, 1), mesh)
        with pytest.raises(Exception, match=r"DTensor cannot run|sharding strategy"):
            deformnd.deform_conv2d(x, w, o)
    finally:
        distributed.destroy_process_group()


# For each name the lines that hide it.
WITHOUT = {name: f"hide({name!r})" for name in [*NAMES, *DTENSOR]} | {KEY: f"hide_key({KEY!r})"}


def check_without(name):
    if name in DTENSOR:
        return "check_dtensor()"
    more = "; check_torchvision()" if name.endswith("BelowAutograd") else ""
    return ("check_torchvision()" if "has_kernel" in name else "check_operators()") + more


def test_all_is_right_without_any_one():
    scripts = {name: f"{hiding}; {check_without(name)}" for name, hiding in WITHOUT.items()}
    scripts["none of them"] = "check_operators()"
    path = [str(Path(__file__).parent), str(SOURCE.parent), *sys.path]
    # torch imports SymPy and what forward mode needs when they are used, which takes long.
    first = """
import sympy
from test_sturdy import *
torch.func.jvp(torch.sin, *[(torch.ones(1),)] * 2)
"""
    runs = apart(first, [*scripts.values()], PYTHONPATH=os.pathsep.join(p for p in path if p))
    for name, (status, said) in zip(scripts, runs, strict=True):
        assert not status, f"{name}: {said}"
