"""Malformed calls by a generator: each raises an error that names the argument, or is right.

A call is drawn from its number, so a failure says how to draw it again. By hand, for many:
DEFORMND_MALFORMED=2000 pytest tests/test_malformed.py
"""

import contextlib
import functools
import io
import os
import random
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import deformnd
from cases import Case
from deformnd import cli
from deformnd.compat import mmcv, tvdcn

COUNT, CHUNK = int(os.environ.get("DEFORMND_MALFORMED", "400")), 25
KINDS = ("", "Packed", "Lazy", "LazyPacked")


class Odd:
    """What no argument can be."""

    def __repr__(self):
        return "Odd()"


# What is wrong for every argument of a kind, made anew for each call; and what is as good as the
# value that was there. A sized argument is an int, or one for each axis.
NUMBERS = (
    *(lambda v=v: v for v in ("3", b"3", 1.5, float("nan"), float("inf"), 2j, np.float64(1))),
    *(lambda v=v: v for v in (-1, -(2**31), 2**31, 2**63, 10**30, -(10**30), {"a": 1})),
    *(Odd, dict, lambda: torch.tensor(2), lambda: torch.tensor([1.5, 2]), lambda: np.zeros(2)),
)
COUNTS = (*NUMBERS, lambda: None, lambda: True, lambda: 0, lambda: (2,), list)
SIZES = (
    *NUMBERS,
    *(lambda v=v: v for v in (None, True, (1,) * 5, (), ("a", "b"), (None,) * 2, [1.5] * 3)),
    *(lambda v=v: v for v in ((-1,) * 2, (2**31,) * 2, (True, True), ((1,), (1,)), {1, 2})),
)
STEPS = (*SIZES, lambda: 0)  # kernel_size, stride, dilation
SWITCHES = (lambda: "yes", lambda: 2, lambda: 0.5, Odd, list, lambda: torch.ones(2))
ACTIVATIONS = (lambda: 3, lambda: "tanh", list, lambda: torch.ones(2), Odd)
NAMES = (lambda: None, lambda: 3, lambda: "nonsense", list, Odd, lambda: 1.5, lambda: True)
OPTIONS = {
    "in_channels": (*NUMBERS, lambda: None, lambda: True, lambda: (2,)),
    "out_channels": (*NUMBERS, lambda: None, lambda: True, lambda: (2,)),
    **dict.fromkeys(("kernel_size", "stride", "dilation"), STEPS),
    **dict.fromkeys(("padding", "output_padding"), SIZES),
    **dict.fromkeys(("groups", "offset_groups", "mask_groups", "generator_groups"), COUNTS),
    **dict.fromkeys(("bias", "generator_bias", "deformable", "modulated"), SWITCHES),
    **dict.fromkeys(("offset_activation", "mask_activation"), ACTIVATIONS),
    "padding_mode": NAMES,
    "device": (lambda: "nonsense", lambda: 1.5, Odd, list),
    "dtype": (lambda: "float32", lambda: torch.int64, lambda: 3, lambda: float, Odd),
}


def jagged(t):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([t, t], layout=torch.jagged)


def nested(t):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([t, t])


def flat(t):
    return t.flatten()


TENSORS = (
    *(lambda t, v=v: v for v in (3, 1.5, "x", [1.0], (1, 2), Odd(), True, {})),
    *(lambda t: t.detach().numpy(), lambda t: [t], lambda t: nn.Parameter, lambda t: t.size()),
    *(lambda t: t.long(), lambda t: t.bool(), lambda t: t.cfloat(), lambda t: t.to(torch.uint8)),
    *(lambda t: t.to_sparse(), lambda t: t.to_mkldnn(), nested, jagged),
    lambda t: torch.quantize_per_tensor(t.contiguous(), 0.1, 0, torch.quint8),
    *(lambda t: t.to("meta"), lambda t: t[None, None], flat, lambda t: t.sum()),
    lambda t: torch.cat([t, t[:1]]) if t.dim() == 1 else torch.cat([t, t[:, :1]], 1),
)
# What leaves its own dtype to offset and mask is wrong for the others.
SHARED = (lambda t: t.double(), lambda t: t.half(), lambda t: None)
# With an offset there, so that its size and channels are wrong as well.
MOVED = (lambda t: torch.cat([t, t]), lambda t: torch.cat([t, t[..., :1]], -1))


class Call:
    """A call, and the arguments of which its error must name one."""

    def __init__(self, what, function, named):
        self.what, self.function, self.named = what, function, named


def same(function, options, key, rng):
    """The call with a value that is as good as the one that is there: must give the same."""
    value = options[key]
    as_good = [np.int64, np.int32]
    if isinstance(value, tuple):
        as_good = [list, torch.Size, lambda v: tuple(map(np.int64, v))]
    changed = {**options, key: rng.choice(as_good)(value)}

    def call():
        assert torch.equal(function(**changed), function(**options))

    return Call(f"{key}={changed[key]!r}, as good", call, None)


def draw_function(rng):
    n, family = rng.randint(1, 3), rng.choice(("conv", "transpose", "aggregate"))
    case = Case(
        (4, 5, 3)[:n],
        (2, 3, 2)[:n],
        family == "transpose",
        stride=rng.choice((1, 2)),
        padding=rng.choice((0, 1)),
        offset_groups=rng.choice((1, 2)),
        mask_groups=rng.choice((0, 1, 2)),
        groups=rng.choice((1, 2)),
        aggregate=family == "aggregate",
    )
    tensors, parameters = case.tensors(torch.float32), case.parameters()
    parameters |= {k: case.values(k) for k in parameters if k != "groups" and rng.random() < 0.5}
    function = getattr(deformnd, case.name)
    if rng.random() < 0.5:
        key = rng.choice(list(parameters))
        if rng.random() < 0.2:
            return same(functools.partial(function, **tensors), parameters, key, rng)
        wrong = rng.choice(OPTIONS[key])()
        plain = rng.random() < 0.3  # the way of torch's own convolution, where there is one
        if plain:
            tensors |= {"offset": None, "mask": None}
        call = functools.partial(function, **tensors, **{**parameters, key: wrong})
        return Call(f"{case} {key}={wrong!r}", call, {key})
    key = rng.choice([k for k, t in tensors.items() if t is not None])
    ways = list(TENSORS)
    if key in ("input", "weight", "bias"):
        ways += SHARED[: 2 if key == "bias" else 3]
    if case.aggregate and key == "input":  # without a weight, other channels and dtypes are right
        ways = [*TENSORS[:-1], SHARED[2]]
    if key in ("offset", "mask"):
        ways += MOVED
    if key == "bias":
        ways.remove(flat)  # it is already
    k = rng.randrange(len(ways))
    wrong = ways[k](tensors[key])
    # Sizes are wrong towards each other: any of them may be named.
    related = isinstance(wrong, torch.Tensor) and wrong.layout is torch.strided
    named = set(tensors) if related and wrong.is_floating_point() else {key}
    call = functools.partial(function, **{**tensors, key: wrong}, **parameters)
    return Call(f"{case} {key} changed by way {k}", call, named)


def draw_order(rng):
    """torchvision's and mmcv's arguments."""
    t = Case((4, 5), (2, 3), offset_groups=rng.choice((1, 2))).tensors(torch.float32)
    x, weight, offset, mask, bias = (t[k] for k in ("input", "weight", "offset", "mask", "bias"))
    ways = [
        (x, offset, weight),
        (x, offset, weight, bias),
        (x, offset, weight, None, 1),
        (x, offset, weight, bias, (1, 1), (0, 0), (1, 1), mask),
        (x, offset, weight, 1, 0, 1, 1, 1),
        (x, offset, mask, weight, bias, 1, 0),
    ]
    k = rng.randrange(len(ways))
    named = {"torchvision's and mmcv's order is another"}
    return Call(f"order {k}", lambda: deformnd.deform_conv2d(*ways[k]), named)


def draw_mask(rng):
    n = rng.randint(1, 3)
    if rng.random() < 0.4:
        t = torch.randn(2, 3)
        if rng.random() < 0.5:
            k = rng.randrange(len(TENSORS[:-5]))
            wrong = TENSORS[k](t)
            return Call(f"mask_sigmoid of way {k}", lambda: deformnd.mask_sigmoid(wrong), {"mask"})
        wrong = rng.choice((-1, 0, float("nan"), float("inf"), "2", None, True, Odd(), 2j, t))
        make = rng.choice((functools.partial(deformnd.mask_sigmoid, t), deformnd.MaskSigmoid))
        return Call(f"mask_sigmoid scale={wrong!r}", lambda: make(scale=wrong), {"scale"})
    function = getattr(deformnd, f"mask_softmax{n}d")
    t = torch.randn(2, 2 * 3**n, *(4, 5, 3)[:n])
    if rng.random() < 0.5:
        k = rng.randrange(len(TENSORS))
        wrong = TENSORS[k](t)
        if isinstance(wrong, torch.Tensor) and wrong.is_meta:
            wrong = None
        return Call(f"mask_softmax{n}d of way {k}", lambda: function(wrong, 3), {"mask"})
    wrong = rng.choice(STEPS)()
    module = getattr(deformnd, f"MaskSoftmax{n}d")
    make = rng.choice((functools.partial(function, t), module))
    return Call(f"mask_softmax{n}d {wrong!r}", lambda: make(kernel_size=wrong), {"kernel_size"})


def draw_module(rng):
    n, kind, transposed = rng.randint(1, 3), rng.choice(KINDS), rng.random() < 0.5
    packed, lazy = kind.endswith("Packed"), kind.startswith("Lazy")
    name = f"{kind}DeformConv{'Transpose' * transposed}{n}d"
    make = getattr(deformnd, name)
    options = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "stride": 1, "padding": 1}
    options |= {"dilation": 1, "groups": 2, "bias": True, "padding_mode": "zeros"}
    options |= {"device": None, "dtype": None}
    if transposed:
        options["output_padding"] = 0
    if packed:
        options |= {"offset_groups": 2, "mask_groups": 1, "generator_bias": True}
        options |= {"deformable": True, "modulated": True, "generator_groups": 1}
        options |= {"offset_activation": None, "mask_activation": "sigmoid"}
    if lazy:
        del options["in_channels"]
    if rng.random() < 0.6:
        if rng.random() < 0.1:
            key = rng.choice(("offset_groups", "deform_groups", "deformable_groups", "strde"))
            if key not in options:
                return Call(f"{name} {key}", lambda: make(**options, **{key: 2}), {key})
        key = rng.choice(list(options))
        numbers = [k for k, v in options.items() if type(v) is int and k != "output_padding"]
        if rng.random() < 0.1 and key in numbers:
            changed = {**options, key: np.int64(options[key])}
            plain = functools.partial(lambda **o: torch.tensor(len(repr(make(**o)))))
            return Call(
                f"{name} {key} of numpy",
                lambda: torch.equal(plain(**changed), plain(**options)) or pytest.fail("repr"),
                None,
            )
        wrong = rng.choice(OPTIONS[key])()
        return Call(f"{name} {key}={wrong!r}", lambda: make(**{**options, key: wrong}), {key})
    mode = rng.choice(("zeros", "reflect", "circular")) if not transposed else "zeros"
    module = make(**{**options, "padding_mode": mode})
    size = (5, 4, 6)[:n]
    args = {"input": torch.randn(2, 4, *size)}
    if not packed:
        args["offset"] = torch.randn(2, n * 3**n, *size)
        args["mask"] = torch.rand(2, 3**n, *size)
    if transposed and rng.random() < 0.2:
        wrong = rng.choice((3, "abc", (1.5,) * n, [None] * n, [10**6] * n, [1] * 7, Odd()))
        call = functools.partial(module, *args.values(), output_size=wrong)
        return Call(f"{name} output_size={wrong!r}", call, {"output_size"})
    key = rng.choice(list(args))
    ways = TENSORS[:-1] if lazy else TENSORS
    if key == "input":
        ways += SHARED[:2]
    k = rng.randrange(len(ways))
    wrong = ways[k](args[key])
    named = {key}
    if isinstance(wrong, torch.Tensor) and wrong.layout is torch.strided:
        named = {*args, "weight"}
    call = functools.partial(module, **{**args, key: wrong})
    return Call(f"{name} {mode} {key} changed by way {k}", call, named)


def draw_converter(rng):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    no_module = rng.choice((None, 3, "net", [net], nn.Conv2d, lambda x: x, Odd(), torch.ones(2)))
    rule = deformnd.PackRule(offset="a")
    packed = deformnd.PackedDeformConv2d(3, 4, 3)
    choice = rng.randrange(9)
    if choice < 3:
        function = (deformnd.convert, deformnd.deformify, deformnd.parameter_groups)[choice]
        more = (1e-3,) if choice == 2 else ()
        return Call(
            f"{function.__name__} {no_module!r}", lambda: function(no_module, *more), {"model"}
        )
    if choice == 3:
        wrong = rng.choice((3, "rule", [rule], {"X": 3}, {3: rule}, Odd()))
        return Call(f"convert rules={wrong!r}", lambda: deformnd.convert(net, wrong), {"rule"})
    if choice == 4:
        key = rng.choice(("offset_groups", "mask_groups", "generator_groups", "generator_bias"))
        wrong = rng.choice(OPTIONS[key])()
        if key == "generator_groups" and wrong is None:
            wrong = 0
        return Call(
            f"deformify {key}={wrong!r}",
            lambda: deformnd.deformify(net, "0", verbose=False, **{key: wrong}),
            {key},
        )
    if choice == 5:
        wrong = rng.choice((3, 1.5, Odd(), "nothing.*", [3], ""))
        return Call(
            f"deformify where={wrong!r}",
            lambda: deformnd.deformify(net, wrong),
            {"where", "matches", "matched", "convolution"},
        )
    if choice == 6:
        key, wrong = rng.choice(
            [
                *(("limit", v) for v in (-1, float("nan"), "5", None, Odd())),
                *(("every", v) for v in (0, -1, 1.5, "5", None, Odd(), torch.ones(2))),
                ("model", no_module),
            ]
        )
        options = {"model": nn.Sequential(packed), key: wrong}
        return Call(
            f"watch_offsets {key}={wrong!r}", lambda: deformnd.watch_offsets(**options), {key}
        )
    if choice == 7:
        key = rng.choice(("layer", "norm"))
        options = {"layer": packed.eval(), "norm": nn.BatchNorm2d(4).eval()}
        wrong = rng.choice((None, 3, Odd(), nn.ReLU().eval(), nn.GroupNorm(2, 4).eval()))
        options[key] = wrong
        return Call(
            f"fuse_batch_norm {key}={wrong!r}", lambda: deformnd.fuse_batch_norm(**options), {key}
        )
    wrong = rng.choice((3, 1.5, Odd(), [3]))
    return Call(
        f"parameter_groups names={wrong!r}",
        lambda: deformnd.parameter_groups(nn.Sequential(packed), 1e-3, names=wrong),
        {"names"},
    )


def draw_compat(rng):
    x, offset = torch.randn(1, 4, 6, 6), torch.randn(1, 18, 4, 4)
    weight, mask = torch.randn(6, 4, 3, 3), torch.rand(1, 9, 4, 4)
    k = rng.randrange(len(TENSORS))
    if rng.random() < 0.5:
        package = rng.choice((mmcv, tvdcn))
        modulated = package is mmcv and rng.random() < 0.5
        args = {"input": x, "offset": offset, "weight": weight}
        if modulated:
            args["mask"] = mask
        function = mmcv.modulated_deform_conv2d if modulated else package.deform_conv2d
        key = rng.choice(list(args))
        wrong = TENSORS[k](args[key])
        named = {key}
        if isinstance(wrong, torch.Tensor) and wrong.layout is torch.strided:
            named = set(args)
        call = functools.partial(function, **{**args, key: wrong})
        return Call(f"{function.__module__} {key} by way {k}", call, named)
    names = (
        "DeformConv2d",
        "ModulatedDeformConv2d",
        "DeformConv2dPack",
        "ModulatedDeformConv2dPack",
    )
    make = getattr(mmcv, rng.choice(names))
    options = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "stride": 1, "padding": 1}
    options |= {"dilation": 1, "groups": 1}
    key = rng.choice(list(options))
    wrong = rng.choice(OPTIONS[key])()
    return Call(
        f"mmcv.{make.__name__} {key}={wrong!r}", lambda: make(**{**options, key: wrong}), {key}
    )


def draw_onnx(rng, folder):
    pytest.importorskip("onnxscript")
    import deformnd.onnx as to

    model = deformnd.PackedDeformConv2d(3, 4, 3, padding=1).eval()
    here = str(folder / "no.onnx")
    function = rng.choice((to.export, to.check, to.translation_table, to.read_openvino_model))
    wrongs = {
        "target": (None, 3, "coreml", [], Odd()),
        "opset": ("20", 1.5, True, 0, -1, 10**30, [20], Odd()),
        "path": (None, 3, str(folder), here + "/x.onnx", "", Odd(), 1.5),
        "model": (None, 3, "model", nn.Conv2d, Odd()),
        "args": (None, 3, [torch.ones(1)], "x", Odd()),
        "kwargs": (3, "x", [1], Odd()),
        "dynamic_shapes": (3, "batch", Odd(), {1, 2}),
        "engine": (None, 3, "tensorrt", [], Odd()),
        "core": (3, "core", Odd()),
    }
    args = (torch.rand(1, 3, 8, 8),)
    options = {
        "export": {"model": model, "args": args, "path": here, "target": "precise"},
        "check": {"path": __file__, "model": model, "args": args},
        "translation_table": {},
        "read_openvino_model": {"path": __file__},
    }[function.__name__]
    keys = {
        "export": ("target", "opset", "path", "model", "args", "kwargs", "dynamic_shapes"),
        "check": ("path", "model", "args", "kwargs", "engine"),
        "translation_table": ("target", "opset"),
        "read_openvino_model": ("path", "core"),
    }[function.__name__]
    if function is to.read_openvino_model:
        pytest.importorskip("openvino")
    key = rng.choice(keys)
    wrong = rng.choice(wrongs[key])
    return Call(
        f"onnx.{function.__name__} {key}={wrong!r}",
        lambda: function(**{**options, key: wrong}),
        {key},
    )


MODEL = """
import sys, torch, deformnd
def build():
    return deformnd.PackedDeformConv2d(3, 4, 3, padding=1)
def two():
    inputs = torch.rand(1, 3, 8, 8), torch.rand(1, 17, 8, 8)
    return deformnd.DeformConv2d(3, 4, 3, padding=1), inputs
def number(): return 3
def leaves(): sys.exit(3)
def stopped(): raise KeyboardInterrupt
def raises(): raise KeyError("x")
def needs(a): return a
broken = 3
"""


def draw_command(rng, folder):
    """A command, in a folder with files that are none."""
    pytest.importorskip("onnxscript")
    bad = lambda *values: rng.choice(values)  # noqa: E731
    number = bad("abc", "-1", "0", "1.5", "", "nan", "1e3", str(10**30))
    sizes = bad("1,three", "0,3", "", "1,,3", "-1,3,8,8", "1,3,100000,100000", "x", "1;3")
    factory = bad(
        *("model.py", "none.py:build", "model.py:nothing", "model.py:number", "model.py:leaves"),
        *("model.py:stopped", "model.py:raises", "model.py:needs", "model.py:broken", ":build"),
        *("model.py:", "nowhere_at_all:x", "..:x", "syntax.py:build", "copy.py:build", "", "a:b:c"),
    )
    weights = bad("none.pt", "empty.pt", "text.pt", "ints.pt", "list.pt", "other.pt", ".")
    file = bad("none.onnx", "empty.onnx", "text.pt", ".", "model.py", "odd.onnx", "shapeless.onnx")
    fine = ["export", "model.py:build", "--input", "1,3,8,8", "--no-verify", "--out", "o.onnx"]
    nowhere = bad("none/x.onnx", ".", "model.py/x")
    ways = [
        ["demo", "--epochs", number],
        ["demo", "--device", bad("nonsense", "", "cuda:99", "meta", "cpu:x"), "--out", "demo"],
        ["demo", "--seed", bad("abc", "1.5", str(2**64), str(-(2**64)), "")],
        ["demo", "--out", bad("model.py", "model.py/x")],
        ["bench", "--seconds", bad("-1", "abc", "nan", "inf", "0", "")],
        ["bench", "--threads", number],
        ["bench", "--device", bad("abacus", "cuda:99", "", "cuda:x", "meta")],
        ["bench", bad("--shapes", "--dtypes", "--peers", "--phases"), bad("x", "", "tiny,", "3")],
        ["bench", "--shapes", "tiny", bad("--json", "--plot"), bad("none/x.png", ".")],
        ["bench", "--shapes", "tiny", "--plot", "x.nonsense"],
        ["bench", "--sweep", bad("-1", "abc", "0", "", "1.5")],
        [
            "bench",
            "--sweep",
            "1",
            bad("--against", "--json", "--peers", "--seed"),
            bad("none/x", "."),
        ],
        ["export", factory, "--input", "1,3,8,8"],
        ["export", "model.py:build", "--input", sizes],
        ["export", "model.py:build", "--input", bad("1,4,8,8", "8", "1,3", "1,3,8,8,8")],
        ["export", "model.py:build"],
        ["export", "model.py:two"],
        [*fine[:4], "--input", "1,3,8,8"],
        [*fine, "--weights", weights],
        [*fine, "--target", bad("x", "", "onnx")],
        [*fine, "--opset", bad("99", "0", "-1", "abc", "5", "1.5", str(10**30))],
        [*fine[:5], "--out", nowhere],
        ["check", file],
        ["check", "fine.onnx", "--size", number],
        ["check", "fine.onnx", "--seconds", bad("-1", "abc", "nan", "0")],
        ["check", "fine.onnx", "--input", sizes],
        ["check", "fine.onnx", "--input", bad("1,4,8,8", "8", "1,3", "2,3,8,8,8")],
        ["check", "fine.onnx", "--weights", weights],
        ["check", "fine.onnx", "--size", "30000"],
        ["check", "fine.onnx", "--model", factory],
        ["check", "fine.onnx", "--model", "model.py:build", "--weights", weights],
        [bad("", "train", "--nonsense", "exprot")],
        [bad("info", "export", "demo", "bench", "check"), bad("--nonsense", "--inputt")],
    ]
    arguments = rng.choice(ways)

    def call():
        before = sorted(p.name for p in folder.rglob("*") if "__pycache__" not in p.parts)
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.chdir(folder) if hasattr(contextlib, "chdir") else moved(folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                code = cli.main(arguments)
            except SystemExit as leaving:
                code = leaving.code
        said = err.getvalue()
        last = said.strip().splitlines()[-1] if said.strip() else ""
        assert code == 2, (code, out.getvalue(), said)
        assert last.startswith("deformnd"), said
        assert "Traceback" not in out.getvalue() + said, said
        assert len(said.strip().splitlines()) == 1, said
        after = sorted(p.name for p in folder.rglob("*") if "__pycache__" not in p.parts)
        assert after == before, set(after) ^ set(before)

    return Call(" ".join(arguments), call, None)


@contextlib.contextmanager
def moved(folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("malformed")
    (folder / "model.py").write_text(MODEL)
    (folder / "copy.py").write_text("raise RuntimeError('not this one')")
    (folder / "syntax.py").write_text("def build(:")
    (folder / "empty.pt").write_text("")
    (folder / "empty.onnx").write_text("")
    (folder / "text.pt").write_text("no checkpoint")
    torch.save({1: torch.ones(2)}, folder / "ints.pt")
    torch.save([torch.ones(2)], folder / "list.pt")
    torch.save({"weight": torch.ones(2)}, folder / "other.pt")
    with contextlib.suppress(ImportError):
        from onnx import TensorProto, helper, save

        def write(name, kind, shape):
            node = helper.make_node("Identity", ["x"], ["y"])
            x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
            if isinstance(kind, int):
                x.type.tensor_type.elem_type = kind
            y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
            graph = helper.make_graph([node], "g", [x], [y])
            opset = helper.make_opsetid("", 18)
            save(helper.make_model(graph, opset_imports=[opset], ir_version=8), folder / name)

        write("fine.onnx", None, ["batch", 3, "height", "width"])
        write("odd.onnx", 77, [1, 3])
        write("shapeless.onnx", None, None)
    return folder


def draw(number, folder):
    rng = random.Random(number)
    torch.manual_seed(number)
    kinds = {
        draw_function: 40,
        draw_module: 35,
        draw_mask: 8,
        draw_order: 2,
        draw_converter: 10,
        draw_compat: 10,
        functools.partial(draw_onnx, folder=folder): 8,
        functools.partial(draw_command, folder=folder): 12,
    }
    return rng.choices(list(kinds), kinds.values())[0](rng)


def problem(call):
    """What is wrong with a call's answer, or None."""
    try:
        call.function()
    except AssertionError as error:
        return f"is wrong: {error}"
    except (ValueError, TypeError) as error:
        said = str(error)
        if call.named is None:
            return f"raised {error!r}, expected to work"
        words = said.replace("output size", "output_size").replace("padding mode", "padding_mode")
        if not any(re.search(rf"(?<!\w){re.escape(name)}", words) for name in call.named):
            return f"names none of {sorted(call.named)}: {error!r}"
        return None
    except BaseException as error:
        return f"raised {error!r}, expected ValueError or TypeError"
    return None if call.named is None else "worked"


@pytest.mark.parametrize("first", range(0, COUNT, CHUNK))
def test_malformed_calls(first, folder):
    found = {}
    for number in range(first, min(first + CHUNK, COUNT)):
        call = draw(number, folder)
        wrong = problem(call)
        if wrong:
            found[f"{number}: {call.what}"] = wrong
    assert not found, "\n".join(f"{what} {wrong}" for what, wrong in found.items())
