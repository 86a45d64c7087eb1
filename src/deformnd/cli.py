"""The command line: `deformnd` or `python -m deformnd`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 it failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="deformnd", description="Deformable convolution for PyTorch: tools and demo."
    )
    parser.add_argument("--version", action="version", version=f"deformnd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train a deformable and an ordinary network on real images, export, compare",
        description="Trains the same small network twice on scikit-learn's handwritten digits, "
        "enlarged and randomly rotated, sheared and scaled: with ordinary and with packed "
        "deformable convolutions. Exports the deformable one to ONNX, runs it in ONNX Runtime, "
        "and writes model.onnx, report.md and sampling.png.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--epochs", type=_positive, default=20, help="passes over the images")
    demo.add_argument("--out", type=Path, default=Path("deformnd-demo"), help="folder to write")
    demo.add_argument("--seed", type=int, default=0, help="seed of data, weights and order")
    demo.add_argument("--device", default="cpu", help="torch device to train on")
    options = parser.parse_args(arguments)
    try:
        from .demo import run
    except ImportError as error:
        print(f"deformnd demo needs more packages: {error}", file=sys.stderr)
        print("install them with: pip install 'deformnd[demo]'", file=sys.stderr)
        return 1
    try:
        run(options.epochs, options.out, options.seed, options.device)
    except (RuntimeError, OSError) as error:  # no such device, no such folder
        print(f"deformnd demo: {error}", file=sys.stderr)
        return 1
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value
