"""Random layers and those of public models beside torchvision and the dense convolution.

    python benchmarks/sweep.py --json benchmarks/results/sweep_h200.json --seconds 540

`deformnd bench --sweep 200`, on a GPU if there is one. The arguments are its own, and the last one
counts: `--sweep 50 --seed 1 --models --dtypes float16` and so on. The report that --json names
holds device, versions, seed and command, and is written anew after each layer.
"""

import sys

import torch

from deformnd.cli import main

if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sys.exit(main(["bench", "--sweep", "200", "--device", device, *sys.argv[1:]]))
