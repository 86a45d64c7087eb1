"""Target "deformnd": one node for each call, and what stands in for it elsewhere.

Note [nodes and functions]
The nodes are of the domain "deformnd", whose operators the core has for ONNX Runtime (session.py).
For engines without these operators, the file holds a local function for each node, whose body is
the lowering of target "precise". A body holds sizes, and engines tell functions apart by name: most
know nothing of overloads, and take any function of that name. So calls of different sizes are nodes
of different names, DeformConv, DeformConv_2 ..., and the core has each operator by NAMES names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from .graph import Graph, Size, Value

DOMAIN = "deformnd"
NAMES = 32  # has to be kNames in csrc/onnxruntime.cpp
# The inputs of each operator. A question mark stands after those that are optional.
_CONV = ("input", "weight", "offset?", "mask?", "bias?")
OPERATORS = {
    "DeformConv": _CONV,
    "DeformConvTranspose": _CONV,
    "DeformAggregate": ("input", "offset?", "mask?"),
    "DeformAttention": ("value", "shapes", "locations", "weights"),
}
# These inputs may have another floating dtype than the first input.
_COORDINATES = ("offset", "mask", "locations", "weights")
_ATTRIBUTES = {"groups": "INT"} | dict.fromkeys(
    ("stride", "padding", "output_padding", "dilation", "kernel_size"), "INTS"
)


@functools.cache
def _operator(name: str) -> Any:
    from onnx.defs import OpSchema
    from onnxscript import values

    floats = ["tensor(float16)", "tensor(float)", "tensor(double)", "tensor(bfloat16)"]
    inputs, constraints = [], [("T", floats, ""), ("I", ["tensor(int64)"], "")]
    for given in OPERATORS[name]:
        key = given.rstrip("?")
        kind = "I" if key == "shapes" else key if key in _COORDINATES else "T"
        if kind == key:
            constraints.append((key, floats, ""))
        option = OpSchema.FormalParameterOption
        inputs.append(
            OpSchema.FormalParameter(
                key, kind, param_option=option.Optional if given != key else option.Single
            )
        )
    schema = OpSchema(
        name,
        DOMAIN,
        1,
        inputs=inputs,
        outputs=[OpSchema.FormalParameter("output", "T")],
        type_constraints=constraints,
        attributes=[
            OpSchema.Attribute(key, getattr(OpSchema.AttrType, kind), required=False)
            for key, kind in _ATTRIBUTES.items()
        ],
    )
    return values.Op(values.Opset(DOMAIN, 1), name, schema)


def write(op: Any, name: str, tensors: Sequence[Value | None], **attributes: Any) -> Value:
    """Write the node of a call."""
    given = list(tensors)
    while given[-1] is None:
        given.pop()
    for i, key in enumerate(OPERATORS[name][: len(given)]):
        t, first = given[i], given[0]
        assert first is not None
        if t is not None and key.rstrip("?") in ("weight", "bias") and t.dtype != first.dtype:
            given[i] = op.Cast(t, to=int(first.dtype))
    return _operator(name)(*given, **attributes)


def write_attention(
    op: Any, value: Value, locations: Value, weights: Value, shapes: list[Any]
) -> Value:
    """Write the node of a call of deform_attention, whose levels' sizes may be scalars of the
    graph."""
    b, n = Graph(op, []), int(locations.shape[-1])
    sizes: list[Size] = [s if isinstance(s, int) else b.reshape(s, 1) for s in shapes]
    levels = b.reshape(b.tensor(*sizes), len(shapes) // n, n)
    return write(op, "DeformAttention", (value, levels, locations, weights))


class _Recorder:
    """Stands in for an opset while a body is written: op.Add(x, y) adds a node to `nodes`."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []

    def __getattr__(self, name: str) -> Callable[..., Value]:
        import onnx_ir as ir

        def record(*inputs: Value | None, **attributes: Any) -> Value:
            if "value" in attributes:
                attributes["value"] = ir.serde.deserialize_tensor(attributes["value"])
            node = ir.node(name, inputs, attributes, name=f"{name}_{len(self.nodes)}")
            self.nodes.append(node)
            node.outputs[0].name = f"v{len(self.nodes)}"
            return node.outputs[0]

        return record


def add_functions(
    model: Any, body: Callable[..., Value], refuse: Callable[[str, str], Any]
) -> None:
    """Give each node of our domain in an onnx_ir.Model the function that stands in for it.

    body(op, name, inputs, attributes, sizes) writes what a node computes; sizes are those of an
    attention's levels, or None if they are not known. refuse(name, reason) raises the error for a
    node that cannot have a function.
    """
    import onnx_ir as ir

    names: dict[Any, str] = {}
    for node in model.graph.all_nodes():
        if node.domain != DOMAIN or node.op_type not in OPERATORS:
            continue
        name = node.op_type
        attributes = {
            key: attribute.value if key == "groups" else list(attribute.value)
            for key, attribute in node.attributes.items()
        }
        sizes = None
        if name == "DeformAttention":
            known = ir.convenience.get_const_tensor(node.inputs[1])
            sizes = None if known is None else known.numpy().reshape(-1).tolist()
        kinds: list[Any] = []
        for v in node.inputs:
            if v is None:
                kinds.append(None)
                continue
            if v.shape is None or v.dtype is None:
                refuse(name, f"the shape of {v.name} is not known")
            kinds.append((str(v.dtype), [s if isinstance(s, int) else None for s in v.shape]))
        key = repr((name, attributes, kinds, sizes))
        if key not in names:
            number = 1 + sum(found.split("_")[0] == name for found in names.values())
            if number > NAMES:
                refuse(name, f"it has more than {NAMES} calls of different sizes")
            names[key] = name if number == 1 else f"{name}_{number}"
            function = _function(model, node, names[key], attributes, sizes, body)
            model.functions[function.identifier()] = function
        node.op_type = names[key]


def _function(
    model: Any,
    node: Any,
    name: str,
    attributes: dict[str, Any],
    sizes: list[int] | None,
    body: Callable[..., Value],
) -> Any:
    import onnx_ir as ir

    keys = [key.rstrip("?") for key in OPERATORS[node.op_type]]
    given = [*node.inputs, *[None] * (len(keys) - len(node.inputs))]
    inputs = [
        ir.Value(name=key, shape=v.shape, type=v.type) if v is not None else ir.Value(name=key)
        for key, v in zip(keys, given, strict=True)
    ]
    op = _Recorder()
    used = [i if v is not None else None for i, v in zip(inputs, given, strict=True)]
    result = body(op, node.op_type, used, attributes, sizes)
    return ir.Function(
        DOMAIN,
        name,
        graph=ir.Graph(
            inputs, [result], nodes=op.nodes, opset_imports={"": model.opset_imports[""]}
        ),
        attributes=[ir.Attr(key, ir.AttributeType.UNDEFINED, None) for key in attributes],
    )
