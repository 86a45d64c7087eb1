"""Programs of torch.export for converters that do not know the operators of this package.

    ov.convert_model(deformnd.export.to_torchvision(program))

Every converter knows torch's own operators, and some know torchvision's deform_conv2d. OpenVINO can
also be taught the operators of this package themselves.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn import functional as F

from .kernels import library
from .kernels.geometry import FAMILIES, Geometry, aggregate_geometry, conv_geometry
from .kernels.reference import _compute_dtype as compute_dtype
from .onnx.lowerings import FAR
from .onnx.table import short

__all__ = ["openvino_extensions", "to_core_aten", "to_torchvision"]


def to_torchvision(program: ExportedProgram) -> ExportedProgram:
    """The program with torchvision's deform_conv2d in place of deform_conv and deform_aggregate.

    It is for converters that have a rule for torchvision's operator, which are OpenVINO's,
    coremltools and onnxscript. In 1-D the image becomes one row, and in 3-D a tall image, its
    planes one below the other. torchvision's operator cannot express transposed convolutions,
    attention, and 3-D images of more than 1024 such rows or of open depth or height. They become
    torch's own operators, as by to_core_aten.

    Half dtypes are computed in float32. The new program can be run like any other, and computes the
    same, also where an offset is NaN or infinite.

    Args:
        program: the program, made by torch.export.export. It is not changed.

    Returns:
        The new program.

    Raises:
        TypeError: program is no ExportedProgram.
        ImportError: torchvision is not installed, or not for this version of torch.

    Example:
        >>> import torch, deformnd.export  # doctest: +SKIP
        >>> layer = deformnd.PackedDeformConv2d(3, 8, 3, padding=1).eval()  # doctest: +SKIP
        >>> program = torch.export.export(layer, (torch.rand(1, 3, 8, 8),))  # doctest: +SKIP
        >>> program = deformnd.export.to_torchvision(program)  # doctest: +SKIP
        >>> any("torchvision" in str(node.target) for node in program.graph.nodes)  # doctest: +SKIP
        True
    """
    _check("to_torchvision", program)
    if not hasattr(torch.ops.torchvision, "deform_conv2d"):
        try:
            import torchvision  # noqa: F401
        except (ImportError, RuntimeError) as error:  # RuntimeError: made for another torch
            raise ImportError(
                "deformnd.export.to_torchvision needs torchvision, whose operator it writes: "
                f"pip install torchvision ({error})"
            ) from error
    table = library.decompositions()
    ops = torch.ops.deformnd
    table[ops.deform_conv.default] = _conv
    table[ops.deform_aggregate.default] = _aggregate
    changed: ExportedProgram = program.run_decompositions(table)
    return changed


def to_core_aten(program: ExportedProgram) -> ExportedProgram:
    """The program in torch's core operators alone, for runtimes that know no others.

    It is for ExecuTorch, LiteRT, and any converter that to_torchvision does not serve. The new
    program computes the same, but slower than the kernels do, as `deformnd.decompositions` says.

    Args:
        program: the program, made by torch.export.export. It is not changed.

    Returns:
        The new program.

    Raises:
        TypeError: program is no ExportedProgram.

    Example:
        >>> import torch, deformnd.export
        >>> layer = deformnd.PackedDeformConv2d(3, 8, 3, padding=1).eval()
        >>> x = torch.rand(1, 3, 8, 8)
        >>> program = deformnd.export.to_core_aten(torch.export.export(layer, (x,)))
        >>> {node.target.namespace for node in program.graph.nodes if node.op == "call_function"}
        {'aten'}
        >>> torch.allclose(program.module()(x), layer(x), atol=1e-5)
        True
    """
    _check("to_core_aten", program)
    table = torch.export.default_decompositions()
    table.update(library.decompositions())
    changed: ExportedProgram = program.run_decompositions(table)
    return changed


def _check(name: str, program: Any) -> None:
    if not isinstance(program, ExportedProgram):
        kind = type(program).__name__
        raise TypeError(
            f"deformnd.export.{name}: program is a {kind}, expected a torch.export.ExportedProgram"
        )


def _conv(
    input: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    call = (input, weight, offset, mask, bias, stride, padding, dilation, groups)
    return _sampled(conv_geometry(*call), input, weight, offset, mask, bias)


def _aggregate(
    input: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    g = aggregate_geometry(input, offset, mask, kernel_size, stride, padding, dilation)
    weight = input.new_ones(g.image_channels, 1, *g.kernel)
    return _sampled(g, input, weight, offset, mask, None)


def _sampled(
    g: Geometry,
    input: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    n = len(g.kernel)
    if offset is None and mask is None:
        convolution = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
        return convolution(input, weight, bias, g.stride, g.padding, g.dilation, g.groups)
    if n == 3 and not short(g):
        kernel = library.decompositions()[torch.ops.deformnd.deform_conv.default]
        result: Tensor = kernel(
            input, weight, offset, mask, bias, g.stride, g.padding, g.dilation, g.groups
        )
        return result
    if offset is None:
        assert mask is not None
        offset = mask.new_zeros(g.batch, g.mask_groups * n * math.prod(g.kernel), *g.point_size)
        g = g._replace(offset_groups=g.mask_groups)
    # torchvision's operator has one dtype for all tensors, and one number of groups for offset and
    # mask.
    dtype = compute_dtype(input, offset, mask)
    image, weight, offset = input.to(dtype), weight.to(dtype), offset.to(dtype)
    mask, bias = (None if t is None else t.to(dtype) for t in (mask, bias))
    # torchvision's kernels, and OpenVINO's, read out of bounds at NaN; see Note [bounded offsets]
    # in onnx/lowerings.py.
    offset = torch.where(offset.abs() < FAR, offset, FAR)
    groups = math.lcm(g.offset_groups, g.mask_groups or 1)
    offset = _repeat(offset, g.offset_groups, groups)
    mask = None if mask is None else _repeat(mask, g.mask_groups, groups)
    g = g._replace(offset_groups=groups)
    kind = (_row, _deform_conv2d, _tall_image)[n - 1]
    return kind(g, image, weight, offset, mask, bias).to(input.dtype)


def _repeat(t: Tensor, groups: int, common: int) -> Tensor:
    """An offset or mask of `groups` groups, each repeated, so that there are `common` groups."""
    if groups == common:
        return t
    batch, channels, *size = t.shape
    t = t.reshape(batch, groups, 1, channels // groups, *size)
    t = t.expand(-1, -1, common // groups, *[-1] * (1 + len(size)))
    return t.reshape(batch, channels // groups * common, *size)


def _deform_conv2d(
    g: Geometry,
    image: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    # A mask or bias that is left out is given as torchvision's own function gives it.
    result: Tensor = torch.ops.torchvision.deform_conv2d(
        image,
        weight,
        offset,
        image.new_zeros(g.batch, 1) if mask is None else mask,
        image.new_zeros(g.point_channels) if bias is None else bias,
        *g.stride,
        *g.padding,
        *g.dilation,
        g.groups,
        g.offset_groups,
        mask is not None,
    )
    return result


def _row(
    g: Geometry,
    image: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """A 1-D call, as a 2-D call on an image of one row."""
    offset = torch.stack((torch.zeros_like(offset), offset), 2).flatten(1, 2)  # dx as (0, dx)
    flat = g._replace(stride=(1, *g.stride), padding=(0, *g.padding), dilation=(1, *g.dilation))
    mask = None if mask is None else mask.unsqueeze(2)
    image, weight, offset = (t.unsqueeze(2) for t in (image, weight, offset))
    return _deform_conv2d(flat, image, weight, offset, mask, bias).squeeze(2)


def _tall_image(
    g: Geometry,
    image: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """A 3-D call, as native3d in onnx/lowerings.py writes it; see Note [tall image] there."""
    points, groups = math.prod(g.kernel), g.offset_groups
    depth, height, width = g.image_size
    plane = height + 1
    tall = F.pad(image, [0, 0, 0, 1]).reshape(g.batch, g.image_channels, depth * plane, width)
    # The size of the operator's output follows from its image. So the image is padded where the
    # output would be too small, and the points are padded where it is too large.
    stride = (g.stride[0] * g.stride[1], g.stride[2])
    wanted = (g.point_size[0] * g.point_size[1], g.point_size[2])
    grow, extra = [], []
    for size, count, step, reach in zip(
        (depth * plane, width), wanted, stride, (2, points), strict=True
    ):
        grow.append(torch.sym_max((count - 1) * step + reach - size, 0))
        extra.append((size + grow[-1] - reach) // step + 1 - count)
    tall = F.pad(tall, [0, grow[1], 0, grow[0]])

    offset = offset.reshape(g.batch, groups, points, 3, *g.point_size)
    z, y, x = (offset[:, :, :, a] + _regular(g, a, offset) for a in range(3))  # [B, G, K, *size]
    z, y = z.clamp(-1, depth), y.clamp(-1, height)
    low = z.floor()
    part = z - low
    row = low * plane + y
    shape = (g.batch, groups, points, *wanted)
    # The operator adds its own regular positions, which are taken off here.
    r = torch.arange(wanted[0], device=x.device).unsqueeze(1) * stride[0]
    c = torch.arange(wanted[1], device=x.device) * stride[1]
    k = torch.arange(points, device=x.device).view(-1, 1, 1)
    dy, dx = row.reshape(shape) - r, x.reshape(shape) - (c + k)
    pairs = [torch.stack((rows, dx), 3) for rows in (dy, dy + (plane - 1))]
    offset = torch.stack(pairs, 2).reshape(g.batch, groups * points * 4, *wanted)
    shares = torch.stack((1 - part, part), 2).reshape(g.batch, groups, 2, points, *wanted)
    if mask is not None:
        shares = shares * mask.reshape(g.batch, groups, 1, points, *wanted)
    mask = shares.reshape(g.batch, groups * points * 2, *wanted)
    more = [0, extra[1], 0, extra[0]]
    flat = g._replace(stride=stride, padding=(0, 0), dilation=(1, 1))
    weight = weight.reshape(*weight.shape[:2], 1, points).expand(-1, -1, 2, -1)
    result = _deform_conv2d(flat, tall, weight, F.pad(offset, more), F.pad(mask, more), bias)
    result = result[:, :, : wanted[0], : wanted[1]]
    return result.reshape(g.batch, g.point_channels, *g.point_size)


def _regular(g: Geometry, axis: int, like: Tensor) -> Tensor:
    """Where the points of the kernel lie along an axis without an offset: [K, *point_size], with
    size 1 in place of the sizes of the other axes."""
    n = len(g.kernel)
    along = [-1 if a == axis else 1 for a in range(n)]
    p = torch.arange(g.point_size[axis], device=like.device) * g.stride[axis] - g.padding[axis]
    k = torch.arange(g.kernel[axis], device=like.device) * g.dilation[axis]
    k = k.view(along).expand(g.kernel).reshape(-1, *[1] * n)
    return (p.view(along) + k).to(like.dtype)


def openvino_extensions() -> list[Any]:
    """The extensions that teach OpenVINO the operators, which then run on deformnd's kernels.

    They are for the argument `extension` of openvino.convert_model, together with a program of
    torch.export that holds deform_conv, its transpose, deform_aggregate or deform_attention, and
    they work only in a process with deformnd. A saved model that was converted so can be read again
    by a Core that was given each extension by `add_extension`.

    Returns:
        The extensions, for OpenVINO's PyTorch front end, and the operator that they write.

    Raises:
        ImportError: OpenVINO is not installed.
        The conversion itself raises OpenVINO's error for an attention whose levels' sizes are open,
            since OpenVINO's operator holds them as numbers.

    Example:
        >>> import openvino, torch, deformnd.export
        >>> layer = deformnd.PackedDeformConv2d(3, 8, 3, padding=1).eval()
        >>> program = torch.export.export(layer, (torch.rand(1, 3, 16, 16),))
        >>> extensions = deformnd.export.openvino_extensions()
        >>> model = openvino.convert_model(program, extension=extensions)
        >>> openvino.compile_model(model, "CPU")(torch.rand(1, 3, 16, 16).numpy())[0].shape
        (1, 8, 16, 16)
    """
    try:
        from openvino import OpExtension
        from openvino.frontend.pytorch import ConversionExtension
    except ImportError as error:
        raise ImportError(
            "deformnd.export.openvino_extensions needs OpenVINO: pip install openvino"
        ) from error
    operator = _openvino_operator()

    def rule(name: str, count: int) -> Any:
        def convert(context: Any) -> Any:
            tensors, given = [], []
            for i in range(count):
                t = context.get_input(i)
                given.append(t.get_node().get_type_name() != "PtFrameworkNode")  # a None
                if given[-1]:
                    tensors.append(t)
            parameters = [
                context.get_values_from_const_input(i)
                for i in range(count, context.get_input_size())
            ]
            return operator(tensors, name, json.dumps(given), json.dumps(parameters)).outputs()

        return ConversionExtension(f"deformnd.{name}.default", convert)

    return [*(rule(name, count) for name, count in _TENSORS.items()), OpExtension(operator)]


# The operators, and how many tensors each takes.
_TENSORS = {family.name: family.tensors for family in FAMILIES} | {"deform_attention": 3}


@functools.cache
def _openvino_operator() -> Any:
    import openvino

    class DeformndCall(openvino.Op):  # type: ignore[misc]
        """A call of an operator: its name, and as JSON which tensors are given, and its
        parameters."""

        def __init__(
            self,
            inputs: Sequence[Any] | None = None,
            operator: str = "",
            given: str = "",
            parameters: str = "",
        ) -> None:
            self.call = {"operator": operator, "given": given, "parameters": parameters}
            # Without inputs the operator is being read from a file, and its attributes come later.
            super().__init__(self, None if inputs is None else list(inputs))

        def clone_with_new_inputs(self, inputs: Sequence[Any]) -> Any:
            return DeformndCall(inputs, **self.call)

        def visit_attributes(self, visitor: Any) -> bool:
            visitor.on_attributes(self.call)
            return True

        def run(self, given: Iterator[Tensor]) -> Tensor:
            operator = getattr(torch.ops.deformnd, self.call["operator"]).default
            tensors = [next(given) if there else None for there in json.loads(self.call["given"])]
            result: Tensor = operator(*tensors, *json.loads(self.call["parameters"]))
            return result

        def validate_and_infer_types(self) -> None:
            shapes = [self.get_input_partial_shape(i) for i in range(self.get_input_size())]
            if all(shape.is_static for shape in shapes):
                like = (torch.empty(list(shape.to_shape()), device="meta") for shape in shapes)
                shape = list(self.run(like).shape)
            else:
                shape = self.open_shape(shapes)
            self.set_output_type(0, self.get_input_element_type(0), openvino.PartialShape(shape))

        def open_shape(self, shapes: Sequence[Any]) -> list[Any]:
            """What is known of the result's shape where not all sizes of the inputs are known."""
            open_size = openvino.Dimension()

            def product(*sizes: Any) -> Any:
                known = all(size.is_static for size in sizes)
                return math.prod(s.get_length() for s in sizes) if known else open_size

            first, name = shapes[0], self.call["operator"]
            if name == "deform_attention":
                return [first[0], shapes[1][1], product(first[2], first[3])]
            if name == "deform_aggregate":
                channels = first[1]
            elif name == "deform_conv":
                channels = shapes[1][0]
            else:
                groups = json.loads(self.call["parameters"])[-1]
                channels = product(shapes[1][1], openvino.Dimension(groups))
            return [first[0], channels, *[open_size] * (len(first) - 2)]

        def has_evaluate(self) -> bool:
            return True

        def evaluate(self, outputs: Any, inputs: Any) -> bool:
            result = self.run(torch.from_numpy(t.data) for t in inputs)
            outputs[0].shape = list(result.shape)
            outputs[0].data[:] = result.numpy()
            return True

    return DeformndCall
