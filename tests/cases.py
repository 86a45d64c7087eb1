"""The cases that every test shares: each is one call of one of the functions."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import deformnd

NAMES = ("input", "weight", "offset", "mask", "bias")


@dataclasses.dataclass(frozen=True)
class Case:
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    transposed: bool = False
    batch: int = 2
    channels: tuple[int, int] = (4, 6)  # in, out
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] = 0
    output_padding: int | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    offset_groups: int = 1  # 0 for no offset
    mask_groups: int = 1  # 0 for no mask
    bias: bool = True
    aggregate: bool = False  # True for deform_aggregate, which has neither weight nor bias

    @property
    def n(self) -> int:
        return len(self.size)

    @property
    def name(self) -> str:
        return f"{self.family}{self.n}d"

    @property
    def family(self) -> str:
        """The name of the operator in torch.ops.deformnd."""
        if self.aggregate:
            return "deform_aggregate"
        return "deform_conv_transpose" if self.transposed else "deform_conv"

    def __str__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)
            if f.name not in ("transposed", "aggregate") and getattr(self, f.name) != f.default
        ]
        return f"{self.name}({', '.join(changed)})".replace(" ", "")

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """The kernel by the parameter's name in deform_aggregate."""
        return self.kernel

    def values(self, name: str) -> tuple[int, ...]:
        value = getattr(self, name)
        return (value,) * self.n if isinstance(value, int) else value

    def parameters(self) -> dict[str, Any]:
        """Keyword arguments of the function."""
        if self.aggregate:
            names = ["kernel_size", "stride", "padding", "dilation"]
            return {name: getattr(self, name) for name in names}
        names = ["stride", "padding", "dilation", "groups"]
        if self.transposed:
            names.append("output_padding")
        return {name: getattr(self, name) for name in names}

    def operator_parameters(self) -> tuple[Any, ...]:
        """Positional parameters of the operator in torch.ops.deformnd."""
        names = ["stride", "padding", "dilation"]
        if self.transposed:
            names.insert(2, "output_padding")
        if self.aggregate:
            return (list(self.kernel), *(list(self.values(name)) for name in names))
        return (*(list(self.values(name)) for name in names), self.groups)

    @property
    def point_size(self) -> tuple[int, ...]:
        if self.transposed:
            return self.size
        return tuple(
            (s + 2 * p - d * (k - 1) - 1) // t + 1
            for s, p, d, k, t in zip(
                self.size,
                self.values("padding"),
                self.values("dilation"),
                self.kernel,
                self.values("stride"),
                strict=True,
            )
        )

    @property
    def output_size(self) -> tuple[int, ...]:
        if not self.transposed:
            return self.point_size
        return tuple(
            (s - 1) * t - 2 * p + d * (k - 1) + extra + 1
            for s, t, p, d, k, extra in zip(
                self.size,
                self.values("stride"),
                self.values("padding"),
                self.values("dilation"),
                self.kernel,
                self.values("output_padding"),
                strict=True,
            )
        )

    def tensors(
        self, dtype: torch.dtype = torch.float64, seed: int = 0, device: str = "cpu"
    ) -> dict[str, Tensor | None]:
        """Random tensors by name. Positions stay away from integers, where the slope jumps."""
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            t = torch.randn(*shape, dtype=torch.float64, generator=generator)
            return t.to(device, dtype)

        cin, cout = self.channels
        points = math.prod(self.kernel)
        weight = (cin, cout // self.groups) if self.transposed else (cout, cin // self.groups)
        offset = mask = None
        if self.offset_groups:
            shape = (self.batch, self.offset_groups * points * self.n, *self.point_size)
            whole = torch.randint(-2, 3, shape, generator=generator)
            part = torch.rand(shape, dtype=torch.float64, generator=generator)
            offset = (whole + 0.1 + 0.8 * part).to(device, dtype)
        if self.mask_groups:
            mask = randn(self.batch, self.mask_groups * points, *self.point_size)
        if self.aggregate:
            return {"input": randn(self.batch, cin, *self.size), "offset": offset, "mask": mask}
        return {
            "input": randn(self.batch, cin, *self.size),
            "weight": randn(*weight, *self.kernel) / math.sqrt(cin // self.groups * points),
            "offset": offset,
            "mask": mask,
            "bias": randn(cout) if self.bias else None,
        }

    def call(self, tensors: dict[str, Tensor | None]) -> Tensor:
        return getattr(deformnd, self.name)(**tensors, **self.parameters())

    def operator(self, backward: bool = False) -> Any:
        return getattr(torch.ops.deformnd, self.family + "_backward" * backward).default

    def saved(self, tensors: dict[str, Tensor | None]) -> list[Tensor | None]:
        """The tensors that the operator's backward takes: all but a bias."""
        return [t for name, t in tensors.items() if name != "bias"]

    def as_conv(self, tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        """The tensors of deform_conv that aggregates alike: a weight of ones."""
        input, offset, mask = tensors.values()
        weight = torch.ones(self.channels[0], 1, *self.kernel, dtype=input.dtype)
        return {"input": input, "weight": weight, "offset": offset, "mask": mask, "bias": None}


CASES = [
    # 1-D
    Case((9,), (3,)),
    Case((11,), (4,), stride=2, padding=3, dilation=2, groups=2, offset_groups=2, mask_groups=4),
    Case((7,), (1,), mask_groups=0, bias=False),
    Case((8,), (3,), padding=1, offset_groups=0, mask_groups=2),
    # 2-D
    Case((6, 7), (3, 3), padding=1),
    Case((7, 5), (3, 2), stride=(2, 1), padding=(2, 0), dilation=(1, 2), groups=2),
    Case((5, 6), (2, 3), padding=1, offset_groups=4, mask_groups=2, bias=False),
    Case((5, 6), (3, 3), padding=1, groups=2, offset_groups=2, mask_groups=0),
    Case((5, 6), (3, 3), padding=1, offset_groups=0, mask_groups=4),
    Case((5, 5), (3, 3), padding=1, channels=(4, 4), groups=4, offset_groups=4, mask_groups=1),
    Case((1, 1), (3, 3), padding=1, batch=1),
    Case((3, 4), (3, 3), padding=1, batch=0),
    # 3-D
    Case((4, 5, 3), (2, 3, 2), padding=1),
    Case((5, 4, 5), (3, 2, 1), stride=(2, 1, 2), padding=(1, 0, 2), groups=2, offset_groups=2),
    Case((3, 4, 3), (2, 2, 2), dilation=(1, 2, 1), mask_groups=0, bias=False),
    Case((3, 3, 4), (2, 1, 3), padding=1, offset_groups=0, mask_groups=2),
]
# Each case transposed, with the channels of input and output exchanged where groups allow it.
CASES += [
    dataclasses.replace(
        case,
        transposed=True,
        channels=case.channels[::-1] if case.groups in (1, 4) else (6, 4),
        output_padding=tuple(min(1, s - 1) for s in case.values("stride")),
    )
    for case in CASES
]


def aggregate(size: tuple[int, ...], kernel: tuple[int, ...], channels: int, **rest: Any) -> Case:
    return Case(
        size, kernel, channels=(channels,) * 2, groups=channels, bias=False, aggregate=True, **rest
    )


AGGREGATES = [
    aggregate((9,), (3,), 4),
    aggregate((11,), (4,), 8, stride=2, padding=3, dilation=2, offset_groups=2, mask_groups=4),
    aggregate((8,), (3,), 4, padding=1, offset_groups=0, mask_groups=2),
    aggregate((6, 7), (3, 3), 6, padding=1, offset_groups=2, mask_groups=2),
    aggregate((7, 5), (3, 2), 6, stride=(2, 1), padding=(2, 0), dilation=(1, 2), offset_groups=3),
    aggregate((5, 6), (2, 3), 4, padding=1, offset_groups=4, mask_groups=2),
    aggregate((5, 6), (3, 3), 4, padding=1, mask_groups=0),
    aggregate((5, 6), (3, 3), 4, padding=1, offset_groups=0, mask_groups=0),
    aggregate((1, 1), (3, 3), 2, padding=1, batch=1),
    aggregate((3, 4), (3, 3), 4, padding=1, batch=0),
    aggregate((4, 5, 3), (2, 3, 2), 4, padding=1, offset_groups=2, mask_groups=2),
    aggregate((5, 4, 5), (3, 2, 1), 6, stride=(2, 1, 2), padding=(1, 0, 2), offset_groups=2),
    aggregate((3, 3, 4), (2, 1, 3), 4, padding=1, offset_groups=0, mask_groups=2),
]
ALL = CASES + AGGREGATES


def golden() -> list[tuple[Case, dict[str, Tensor], dict[str, Tensor]]]:
    """The golden vectors: (case, tensors, expected output, grad_output and gradients)."""
    found = []
    with np.load(Path(__file__).parent / "data" / "operators.npz") as data:
        for i, meta in enumerate(json.loads(bytes(data["meta"]))):
            arrays = {
                key.split("/")[1]: torch.from_numpy(data[key])
                for key in data.files
                if key.startswith(f"{i:03}/")
            }
            tensors = {name: arrays.get(name) for name in NAMES}
            transposed = "transpose" in meta["op"]
            input, weight = arrays["input"], arrays["weight"]
            cout = weight.shape[1] * meta["groups"] if transposed else weight.shape[0]
            case = Case(
                size=tuple(input.shape[2:]),
                kernel=tuple(weight.shape[2:]),
                transposed=transposed,
                batch=input.shape[0],
                channels=(input.shape[1], cout),
                stride=tuple(meta["stride"]),
                padding=tuple(meta["padding"]),
                output_padding=tuple(meta.get("output_padding") or (0,) * (input.dim() - 2)),
                dilation=tuple(meta["dilation"]),
                groups=meta["groups"],
                offset_groups=meta["offset_groups"] or 0,
                mask_groups=meta["mask_groups"] or 0,
                bias="bias" in arrays,
            )
            found.append((case, tensors, arrays))
    return found


def gradients(
    output: Tensor, tensors: dict[str, Tensor | None], grad_output: Tensor
) -> dict[str, Tensor]:
    """Gradients by every tensor given."""
    given = {name: t for name, t in tensors.items() if t is not None}
    grads = torch.autograd.grad(output, list(given.values()), grad_output)
    return dict(zip(given, grads, strict=True))


def requires_grad(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {k: None if t is None else t.detach().requires_grad_() for k, t in tensors.items()}


def relative_error(got: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference over that of the expected; NaN counts as infinitely wrong."""
    got, expected = got.detach().double(), expected.detach().double()
    error = (got - expected).norm() / expected.norm().clamp_min(1e-300)
    return math.inf if error.isnan() else float(error)
