"""The operators by the C++ core (csrc/): the same functions as in reference.py, for CPU tensors.

The core is one shared library beside the package. It is loaded through ctypes, which releases the
GIL during a call. Where it is absent, cannot be loaded or is of another version, available() is
False.

Note [infinity]
By the definition a mask multiplies its sample, and 0 times infinity is NaN. The core multiplies the
corners' weights by the mask instead, and sums gradients corner by corner. The results are the same
unless a factor is infinite: an infinite mask times the sample is infinite, but times corners of
both signs it is a sum of both infinities, which is NaN. So the core reports a mask, or a gradient
by offset or mask, that is not finite. If infinite values came in, the reference then computes the
call again.

Note [backwards]
Some packages have the offsets of x before those of y, and kernel points column by column. Their
calls are ours on the image with its axes exchanged, which is a view. Where an image is such a view
of one with channels last, nothing is copied: the core is called with all axes in the order of
memory, and is told that offsets and masks have them backwards.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import __version__
from . import reference
from .geometry import (
    DTYPES,
    Attention,
    Geometry,
    backwards,
    empty,
    empty_gradient,
    lies_backwards,
)

# What the levels of instructions are called that best_level in csrc/core.cpp counts.
LEVELS = ("baseline instructions", "AVX2", "AVX-512", "AVX-512 with bfloat16", "AMX")
# Only tests set these two. The level of instructions to use, an index of LEVELS; -1 for the best.
level = -1
# The number of threads to use even for a small call; 0 for at most torch.get_num_threads().
threads = 0

# As enum Dtype in csrc/core.h has them. Channels last add 4 to the code.
_CODE = {dtype: code for code, dtype in enumerate(DTYPES)}
_ABSENT = (0, 0)
# Among the tensors of a call: the places of weights and biases, and where the gradients begin.
_WEIGHTS, _GRADIENTS = (2, 5, 7), 6
# As enum Status in csrc/core.h has them.
_NO_MEMORY, _ODD = 1, 2
_PACK = {n: struct.Struct(f"={4 + 6 + 6 * n + 2 * 10}q").pack for n in (1, 2, 3)}


_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
PATH: Path = Path(__file__).parent.parent / f"_core{_SUFFIX}"
"""Where the core is, if it was built."""


def _load() -> ctypes.CDLL | None:
    """The library or None. A library that is there and does not fit is warned of."""
    path = PATH
    if not path.exists():
        return None
    try:
        _check_whole(path)
        library = ctypes.CDLL(str(path))
        version = library.deformnd_version
    except (OSError, struct.error) as failure:
        problem = f"cannot be loaded ({failure})"
    except AttributeError:
        problem = f"is of another version, expected {__version__}"
    else:
        version.restype = ctypes.c_char_p
        found = version().decode(errors="replace")
        if found == __version__:
            return library
        problem = f"is of version {found}, expected {__version__}"
    warnings.warn(
        f"deformnd: {path.name} {problem}; CPU tensors take the slow reference. "
        "Reinstall deformnd, or build the core anew.",
        stacklevel=2,
    )
    return None


def _check_whole(path: Path) -> None:
    """Raise OSError for an ELF file that was cut off, since loading it would end the process."""
    file = path.read_bytes()
    if file[:5] != b"\x7fELF\x02":  # Only 64-bit ELF files are looked at.
        return
    (start,) = struct.unpack("=Q", file[32:40])
    size, count = struct.unpack("=2H", file[54:58])
    for header in range(start + 8, start + 8 + size * count, size or 1):
        # A segment's offset in the file and its size there say where it ends.
        if sum(struct.unpack("=Q16xQ", file[header : header + 32])) > len(file):
            raise OSError(f"the file has {len(file)} bytes and was cut off")


_library = _load()
_run: Callable[[bytes], int] | None = None if _library is None else _library.deformnd_run
_attend: Callable[[bytes], int] | None = None if _library is None else _library.deformnd_attend


def available() -> bool:
    """Whether the compiled core was found and loaded."""
    return _run is not None


def best_level() -> int:
    """The best level of instructions that this machine and the core have."""
    return -1 if _library is None else int(_library.deformnd_level())


def gather(
    g: Geometry,
    image: Tensor,
    weight: Tensor | None,
    offset: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """dF/dpoints [B, O, *point_size]: the forward of deform_conv."""
    if not _fits(g):
        return reference.gather(g, image, weight, offset, mask, bias)
    out = empty((g.batch, g.point_channels, *g.point_size), image)
    if _call(g, True, image, out, weight, offset, mask, bias) and _infinite(mask):
        return reference.gather(g, image, weight, offset, mask, bias)
    return out


def scatter(
    g: Geometry,
    points: Tensor,
    weight: Tensor | None,
    offset: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """dF/dimage [B, C, *image_size]: the forward of deform_conv_transpose."""
    if not _fits(g):
        return reference.scatter(g, points, weight, offset, mask, bias)
    out = empty((g.batch, g.image_channels, *g.image_size), points)
    grads = (out, None, None, None)
    if _call(g, False, None, points, weight, offset, mask, bias, grads) and _infinite(mask):
        return reference.scatter(g, points, weight, offset, mask, bias)
    return out


def gradients(
    g: Geometry,
    image: Tensor,
    points: Tensor,
    weight: Tensor | None,
    offset: Tensor | None,
    mask: Tensor | None,
    needs: Sequence[bool],
    summed: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Derivatives of F by (image, points, weight, offset, mask), None where not needed.

    And the channel sums of `summed`, which is the image or the points: a bias's gradient.
    """
    if not _fits(g):
        return reference.gradients(g, image, points, weight, offset, mask, needs, summed)
    by_image, by_points, by_weight, by_offset, by_mask = needs
    grad_image = empty(image.shape, image) if by_image else None
    grad_points = empty(points.shape, points) if by_points else None
    grad_weight = (
        None
        if weight is None or not by_weight
        else torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    )
    grad_offset = grad_mask = None
    if by_offset and offset is not None:
        grad_offset = empty_gradient(offset)
    if by_mask and mask is not None:
        grad_mask = empty_gradient(mask)
    odd = False
    if grad_points is not None:
        odd |= _call(g, True, image, grad_points, weight, offset, mask, None)
    grads = (grad_image, grad_weight, grad_offset, grad_mask)
    if grads != (None, None, None, None):
        odd |= _call(g, False, image, points, weight, offset, mask, None, grads)
    if odd and _infinite(image, points, weight, mask):
        return reference.gradients(g, image, points, weight, offset, mask, needs, summed)
    sums = None if summed is None else reference.channel_sums(summed)
    return grad_image, grad_points, grad_weight, grad_offset, grad_mask, sums


@functools.lru_cache(4096)  # Without this it is a twentieth of the time of a small call.
def _fits(g: Geometry) -> bool:
    """Whether the call has anything to compute, and positions and pixels fit 32-bit indices."""
    return (
        g.batch > 0
        and g.image_channels > 0
        and g.point_channels > 0
        and math.prod([size + 3 for size in g.image_size]) < 2**31
        and all(
            p * s + k * d + e < 2**30
            for p, s, k, d, e in zip(
                g.point_size, g.stride, g.kernel, g.dilation, g.padding, strict=True
            )
        )
    )


def _infinite(*tensors: Tensor | None) -> bool:
    return any(t is not None and bool(t.isinf().any()) for t in tensors)


def _layout(t: Tensor) -> tuple[Tensor, int]:
    """The tensor, copied unless its channels are first or last, and what its code adds for last."""
    if t.is_contiguous():
        return t, 0
    if t.movedim(1, -1).is_contiguous():
        return t, 4
    return t.contiguous(), 0


def _turned_kernel(weight: Tensor) -> Tensor:
    """A weight with its spatial axes in the reverse order, and a bias as it is."""
    return weight.permute(*range(min(weight.dim(), 2)), *range(weight.dim() - 1, 1, -1))


def _call(
    g: Geometry,
    gather: bool,
    image: Tensor | None,
    points: Tensor,
    weight: Tensor | None,
    offset: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    grads: Sequence[Tensor | None] = (None, None, None, None),
) -> bool:
    """Run the core, which writes the points or, if it does not gather, the gradients given.

    grads: room for those by image, weight, offset and mask. Returns whether infinite tensors may
    need the reference, see Note [infinity].
    """
    turned = lies_backwards(points if image is None else image)
    axes = slice(None, None, -1 if turned else 1)
    words: list[int] = []
    keep = []  # The core gets addresses alone, so copies have to be held until it is done.
    results = []  # Results that do not lie as the core writes them, and what it writes instead.
    for i, t in enumerate((image, points, weight, offset, mask, bias, *grads)):
        if t is None:
            words += _ABSENT
            continue
        if i in _WEIGHTS:
            there, last = (_turned_kernel(t) if turned else t).contiguous(), 0
            back = _turned_kernel(there) if turned else there
        elif turned:
            there, last = backwards(t).contiguous(), 4
            back = backwards(there)
        else:
            there, last = _layout(t)
            back = there
        if there is not t and (i >= _GRADIENTS or (i == 1 and gather)):
            if there.data_ptr() != t.data_ptr():
                results.append((t, back))
        keep.append(there)
        words += (there.data_ptr(), _CODE[t.dtype] + last)
    assert _run is not None
    status = _run(
        _PACK[len(g.kernel)](
            level,
            gather + 2 * turned,
            -threads or torch.get_num_threads(),
            len(g.kernel),
            *g[:6],
            *g.image_size[axes],
            *g.point_size[axes],
            *g.kernel[axes],
            *g.stride[axes],
            *g.padding[axes],
            *g.dilation[axes],
            *words,
        )
    )
    if status == _NO_MEMORY:
        raise MemoryError("deformnd: no memory for the workspace of a CPU call")
    for t, back in results:
        t.copy_(back)
    return status == _ODD


def attend(a: Attention, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """The forward of deform_attention: [B, Q, H * C]."""
    if not _attends(a):
        return reference.attend(a, value, locations, weights)
    out = value.new_empty(a.batch, a.queries, a.heads * _room(a))
    if _call_attention(a, (value, locations, weights), out, None) and _infinite(weights):
        return reference.attend(a, value, locations, weights)
    if _room(a) > a.channels:  # What an operator returns must not be a view of a larger tensor.
        out = out.unflatten(2, (a.heads, -1))[..., : a.channels].flatten(2).contiguous()
    return out


def attend_gradients(
    a: Attention,
    grad_output: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of deform_attention by (value, locations, weights), None where not needed."""
    tensors = value, locations, weights
    if not _attends(a):
        return reference.attend_gradients(a, grad_output, *tensors, needs)
    room = _room(a)
    shapes = ((*value.shape[:3], room), locations.shape, weights.shape)
    grads = [
        torch.empty(shape, dtype=t.dtype, device=t.device) if need else None
        for shape, t, need in zip(shapes, tensors, needs, strict=True)
    ]
    grad_output = grad_output.reshape(a.batch, a.queries, a.heads, a.channels)
    odd = _call_attention(a, tensors, _with_room(grad_output, room).contiguous(), grads)
    if odd and _infinite(grad_output, *tensors):
        return reference.attend_gradients(a, grad_output.flatten(2), *tensors, needs)
    by_value, *rest = grads
    if by_value is not None and room > a.channels:
        by_value = by_value[..., : a.channels].contiguous()
    return (by_value, *rest)


def _attends(a: Attention) -> bool:
    """As _fits, of a call of deform_attention."""
    sizes = (a.batch, a.queries, a.heads, a.channels, a.points)
    return min(sizes) > 0 and a.pixels < 2**30 and a.heads * _room(a) < 2**31


def _room(a: Attention) -> int:
    """The channels that a head has in the core, which takes them in fours."""
    return (a.channels + 3) // 4 * 4


def _with_room(t: Tensor, room: int) -> Tensor:
    return t if t.shape[-1] == room else F.pad(t, (0, room - t.shape[-1]))


def _call_attention(
    a: Attention,
    tensors: tuple[Tensor, Tensor, Tensor],
    output: Tensor,
    grads: Sequence[Tensor | None] | None,
) -> bool:
    """Run the core, which writes the output or, with grads, reads it as the output's gradient.

    Returns what _call does.
    """
    value, locations, weights = tensors
    dtype = torch.promote_types(torch.float32, value.dtype)
    for t in (locations, weights):
        dtype = torch.promote_types(dtype, t.dtype)
    value = _with_room(value.to(dtype), _room(a)).contiguous()
    arrays = (value, locations.contiguous(), weights.contiguous(), output)
    words: list[int] = []
    for array in (*arrays, *(grads or (None, None, None))):
        words += _ABSENT if array is None else (array.data_ptr(), _CODE[array.dtype])
    sizes = [size for shape in a.shapes for size in shape]
    numbers = (
        level,
        grads is not None,
        -threads or torch.get_num_threads(),
        len(a.shapes[0]),
        a.batch,
        a.queries,
        a.heads,
        _room(a),
        len(a.shapes),
        a.points,
        a.pixels,
        *words,
        *sizes,
    )
    assert _attend is not None
    status = _attend(struct.pack(f"={len(numbers)}q", *numbers))
    if status == _NO_MEMORY:
        raise MemoryError("deformnd: no memory for the workspace of a CPU call")
    return status == _ODD
