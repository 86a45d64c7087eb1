"""Writing ONNX nodes: a small vocabulary on top of the exporters' operator objects."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Value = Any  # a tensor in the graph that is being written
Size = Any  # an int where it is known, else a Value, which is an int64 tensor [1]


class Graph:
    """Writes nodes through `op`: op.Add(x, y) writes one and returns its output.

    All floating tensors of a call have one dtype, float32 or float64. Sizes are ints as long as
    they are known, so that a static model holds no arithmetic on them.
    """

    comparisons = True  # whether the engine has Less and Where

    def __init__(self, op: Any, tensors: Iterable[Value]) -> None:
        self.op = op
        self.float: Any = np.result_type(np.float32, *map(self.dtype, tensors))

    def shape(self, t: Value) -> Sequence[Any]:
        """The sizes of an operator's argument. A size that is not an int is not known."""
        return t.shape  # type: ignore[no-any-return]

    def dtype(self, t: Value) -> Any:
        """The numpy dtype of an operator's argument."""
        return t.dtype.numpy()

    def array(self, array: npt.ArrayLike, dtype: Any) -> Value:
        from onnx import numpy_helper

        return self.op.Constant(value=numpy_helper.from_array(np.asarray(array, dtype)))

    def number(self, value: float) -> Value:
        """A floating scalar."""
        return self.array(value, self.float)

    def zeros(self, *sizes: Size) -> Value:
        from onnx import numpy_helper

        value = numpy_helper.from_array(np.zeros(1, self.float))
        return self.op.ConstantOfShape(self.tensor(*sizes), value=value)

    def cast(self, t: Value, dtype: npt.DTypeLike) -> Value:
        from onnx import helper

        return self.op.Cast(t, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def sizes(self, t: Value) -> list[Size]:
        shape: Any = None
        found: list[Size] = []
        for axis, size in enumerate(self.shape(t)):
            if isinstance(size, int):
                found.append(size)
                continue
            shape = self.op.Shape(t) if shape is None else shape
            found.append(self.op.Gather(shape, self.array([axis], np.int64), axis=0))
        return found

    def tensor(self, *sizes: Size) -> Value:
        """The sizes as one int64 tensor."""
        if all(isinstance(s, int) for s in sizes):
            return self.array(sizes, np.int64)
        parts = [self.array([s], np.int64) if isinstance(s, int) else s for s in sizes]
        return parts[0] if len(parts) == 1 else self.op.Concat(*parts, axis=0)

    def scalar(self, size: Size, dtype: Any = np.int64) -> Value:
        """The size as a tensor [1] of a dtype."""
        if isinstance(size, int):
            return self.array([size], dtype)
        if dtype is np.int64:
            return size
        return self.cast(size, dtype)

    def add(self, a: Size, b: Size) -> Size:
        if isinstance(a, int) and isinstance(b, int):
            return a + b
        return self.op.Add(self.tensor(a), self.tensor(b))

    def mul(self, *sizes: Size) -> Size:
        known = math.prod(s for s in sizes if isinstance(s, int))
        unknown = [s for s in sizes if not isinstance(s, int)]
        if known != 1 or not unknown:
            unknown.insert(0, known)
        product = unknown[0]
        for size in unknown[1:]:
            product = self.op.Mul(self.tensor(product), size)
        return product

    def div(self, a: Size, b: int) -> Size:
        if isinstance(a, int):
            return a // b
        return a if b == 1 else self.op.Div(a, self.tensor(b))

    def max(self, a: Size, b: Size) -> Size:
        if isinstance(a, int) and isinstance(b, int):
            return max(a, b)
        return self.op.Max(self.tensor(a), self.tensor(b))

    def reshape(self, t: Value, *sizes: Size) -> Value:
        # No size is written as -1, which has no meaning in an empty batch.
        return self.op.Reshape(t, self.tensor(*sizes))

    def expand(self, t: Value, *sizes: Size) -> Value:
        return self.op.Expand(t, self.tensor(*sizes))

    def unsqueeze(self, t: Value, *axes: int) -> Value:
        return self.op.Unsqueeze(t, self.tensor(*axes))

    def transpose(self, t: Value, *axes: int) -> Value:
        return self.op.Transpose(t, perm=list(axes))

    def take(self, t: Value, index: int, axis: int) -> Value:
        """t[..., index, ...], without the axis."""
        return self.op.Gather(t, self.array(index, np.int64), axis=axis)

    def pad(self, t: Value, before: list[Size], after: list[Size]) -> Value:
        """t with zeros before and after it along each axis."""
        if all(isinstance(s, int) and s == 0 for s in before + after):
            return t
        return self.op.Pad(t, self.tensor(*before, *after))

    def crop(self, t: Value, start: int, sizes: list[Size]) -> Value:
        """t[:, :, start : start + size, ...] along the last axes."""
        n = len(sizes)
        ends = self.tensor(*(self.add(s, start) for s in sizes))
        axes = self.tensor(*range(2, 2 + n))
        return self.op.Slice(t, self.tensor(*[start] * n), ends, axes)

    def arange(self, size: Size, dtype: Any = np.int32) -> Value:
        """0, 1, ... size - 1."""
        if isinstance(size, int):
            return self.array(np.arange(size), dtype)
        stop = self.op.Squeeze(self.scalar(size, dtype), self.tensor(0))
        return self.op.Range(self.array(0, dtype), stop, self.array(1, dtype))

    def scaled(self, t: Value, factor: int, dtype: Any = np.int32) -> Value:
        return t if factor == 1 else self.op.Mul(t, self.array(factor, dtype))


class WithoutComparisons(Graph):
    comparisons = False
