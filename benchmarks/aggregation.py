"""deform_aggregate2d beside a study of it, and beside depthwise deform_conv2d, on a GPU.

    python benchmarks/aggregation.py [--study FILE] [--out FILE] [--dtypes float16 float32]

The shapes are those of InternImage's four stages at batch 64, and two of detectors', channels
last. Times are medians of triton.testing.do_bench in rounds in turns. `study` are the kernels
`run_fwd` and `run_bwd` of a file, which take offsets and masks channels last, too. Errors are
relative L2 against the float64 reference on one image: of the output, and of the gradients.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from attention import DTYPES, Call, calls, load, medians, parser_of, show_times, write
from torch import Tensor

from deformnd import bench, deform_aggregate2d, deform_conv2d
from deformnd.kernels import reference
from deformnd.kernels.geometry import aggregate_geometry

# Batch, height, width, channels, channels of a group.
SHAPES = [
    (64, 56, 56, 128, 16),
    (64, 28, 28, 256, 16),
    (64, 14, 14, 512, 16),
    (64, 7, 7, 1024, 16),
    (1, 200, 320, 128, 16),
    (2, 100, 100, 192, 32),
]


def of_study(study: Any, x: Tensor, groups: int, grad: Tensor) -> tuple[Call, Call]:
    """Its calls with the best of its tiles."""
    x, grad = (t.permute(0, 2, 3, 1) for t in (x, grad))
    others = torch.randn(*x.shape[:3], -(-groups * 27 // 8) * 8, device="cuda", dtype=x.dtype)
    best = []
    for function, given in ((study.run_fwd, (x, others)), (study.run_bwd, (x, others, grad))):
        choices = [functools.partial(function, *given, groups, rows, 4) for rows in (32, 64)]
        best.append(min(choices, key=lambda call: bench.gpu_ms(call, 20)))
    return best[0], best[1]


def errors(given: list[Tensor], grad: Tensor) -> list[float]:
    leaves = [t[:1].detach().clone().requires_grad_() for t in given]
    y = deform_aggregate2d(*leaves, 3, padding=1)
    got = (y, *torch.autograd.grad(y, leaves, grad[:1]))
    x, offset, mask = (t[:1].double() for t in given)
    g = aggregate_geometry(x, offset, mask, (3, 3), (1, 1), (1, 1), (1, 1))
    found = reference.gradients(
        g, x, grad[:1].double(), None, offset, mask, (True, False, False, True, True)
    )
    wanted = (reference.gather(g, x, None, offset, mask, None), found[0], *found[3:5])
    return [bench.relative(a.detach(), b) for a, b in zip(got, wanted, strict=True)]


def measure(shape: tuple[int, ...], dtype: torch.dtype, study: Any) -> dict[str, Any]:
    batch, height, width, channels, of_group = shape
    groups = channels // of_group

    def random(count: int) -> Tensor:
        return torch.randn(batch, count, height, width, device="cuda", dtype=dtype)

    x, grad = (random(channels).to(memory_format=torch.channels_last) for _ in range(2))
    given = [x, random(groups * 18), random(groups * 9).sigmoid()]
    weight = torch.ones(channels, 1, 3, 3, device="cuda", dtype=dtype)
    pairs = {
        "deformnd": calls(lambda *t: deform_aggregate2d(*t, 3, padding=1), [*given, grad]),
        "deformnd, depthwise deform_conv2d": calls(
            lambda x, w, o, m: deform_conv2d(x, w, o, m, padding=1, groups=channels),
            [x, weight, *given[1:], grad],
        ),
    }
    if study is not None:
        pairs["study"] = of_study(study, x, groups, grad)
    result: dict[str, Any] = {"errors": errors(given, grad), **medians(pairs)}
    result["peak MiB"] = [bench.gpu_peak(call) for call in pairs["deformnd"]]
    return result


def main() -> None:
    options = parser_of(__doc__, "`run_fwd` and `run_bwd`").parse_args()
    study = options.study and load(options.study)
    results = []
    for shape, dtype in itertools.product(SHAPES, options.dtypes):
        found = measure(shape, DTYPES[dtype], study)
        results.append({"shape": shape, "dtype": dtype, **found})
        show_times(f"{shape}, {dtype}", found)
        print("    errors", *(f"{e:.1e}" for e in found["errors"]), flush=True)
        write(results, options.out)


if __name__ == "__main__":
    main()
