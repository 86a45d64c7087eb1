"""Detectors of transformers before and after accelerate(): whole models, random weights, CPU.

    pip install transformers
    python benchmarks/detectors.py [--rounds 5]

What is printed are medians of the process's own time on one thread, so that other work on the
machine counts little; both ways take turns.
"""

import argparse
import contextlib
import platform
import statistics
import time

import torch
import transformers
from transformers import DeformableDetrConfig, ResNetConfig, RTDetrConfig

import deformnd
from deformnd.compat.transformers import accelerate


def models():
    torch.manual_seed(0)
    yield "RT-DETR", transformers.RTDetrForObjectDetection(RTDetrConfig())
    resnet = ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    config = DeformableDetrConfig(backbone_config=resnet)
    yield "Deformable DETR", transformers.DeformableDetrForObjectDetection(config)


def milliseconds(model, x, backward):
    start = time.process_time()
    if backward:
        model(x).logits.square().mean().backward()
    else:
        with torch.no_grad():
            model(x)
    return 1e3 * (time.process_time() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(
        f"{platform.machine()}, one thread; torch {torch.__version__}, transformers "
        f"{transformers.__version__}, deformnd {deformnd.__version__}; one image of 640 x 640"
    )
    x = torch.rand(1, 3, 640, 640)
    for name, model in models():
        model.eval()
        for backward in (False, True):
            times = {False: [], True: []}
            for _ in range(rounds):
                for fast in times:
                    with accelerate() if fast else contextlib.nullcontext():
                        times[fast].append(milliseconds(model, x, backward))
            before, after = (statistics.median(times[fast]) for fast in (False, True))
            kind = "with backward" if backward else "forward"
            print(f"{name}, {kind}: {before:.0f} -> {after:.0f} ms ({before / after:.2f} x)")


if __name__ == "__main__":
    main()
