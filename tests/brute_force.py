"""The operators' definition as loops over single numbers, sharing no code with the package."""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

from cases import Case

Array = NDArray[np.float64]


def weights(position: tuple[float, ...], size: tuple[int, ...]) -> list[tuple[tuple, float]]:
    """Pixels inside the image and their interpolation weights."""
    if not all(math.isfinite(x) and -1 <= x < s for x, s in zip(position, size, strict=True)):
        return []
    found = []
    low = [math.floor(x) for x in position]
    for corner in itertools.product((0, 1), repeat=len(size)):
        pixel = tuple(a + b for a, b in zip(low, corner, strict=True))
        if all(0 <= i < s for i, s in zip(pixel, size, strict=True)):
            w = math.prod(1 - abs(x - i) for x, i in zip(position, pixel, strict=True))
            found.append((pixel, w))
    return found


def brute_force(case: Case, tensors: dict[str, Array | None]) -> Array:
    x, weight = tensors["input"], tensors.get("weight")
    offset, mask, bias = tensors["offset"], tensors["mask"], tensors.get("bias")
    cin, cout = case.channels
    stride, padding, dilation = (case.values(v) for v in ("stride", "padding", "dilation"))
    if case.transposed:
        size = tuple(
            (s - 1) * t - 2 * p + d * (k - 1) + extra + 1
            for s, t, p, d, k, extra in zip(
                case.size,
                stride,
                padding,
                dilation,
                case.kernel,
                case.values("output_padding"),
                strict=True,
            )
        )
        y = np.zeros((case.batch, cout, *size))
    else:
        size = case.size
        y = np.zeros((case.batch, cout, *case.point_size))
    # The image is what is sampled (or written to) at fractional positions.
    channels = cout if case.transposed else cin
    per_group = channels // case.groups
    others = (cin if case.transposed else cout) // case.groups
    for b in range(case.batch):
        for p in np.ndindex(*case.point_size):
            for k, tap in enumerate(np.ndindex(*case.kernel)):
                for c in range(channels):
                    position = [
                        p[a] * stride[a] - padding[a] + tap[a] * dilation[a] for a in range(case.n)
                    ]
                    if offset is not None:
                        g = c // (channels // case.offset_groups)
                        for a in range(case.n):
                            channel = (g * math.prod(case.kernel) + k) * case.n + a
                            position[a] += offset[(b, channel, *p)]
                    m = 1.0
                    if mask is not None:
                        g = c // (channels // case.mask_groups)
                        m = mask[(b, g * math.prod(case.kernel) + k, *p)]
                    group = c // per_group
                    for pixel, w in weights(tuple(position), size):
                        for o in range(group * others, (group + 1) * others):
                            factor = m * w
                            if weight is not None:
                                factor *= weight[(o, c % per_group, *tap)]
                            if case.transposed:
                                y[(b, c, *pixel)] += factor * x[(b, o, *p)]
                            else:
                                y[(b, o, *p)] += factor * x[(b, c, *pixel)]
    if bias is not None:
        y += bias.reshape(-1, *[1] * case.n)
    return y
