#!/bin/sh
# Run tests/test_gpu.py and the interpreted calls of tests/test_random.py without a GPU, in an
# environment of their own: the kernels interpreted on the CPU, and compiled for NVIDIA's and AMD's,
# those in Gluon too.
#
#   tests/gpu.sh             with Triton 3.6, for which the tables and the Gluon kernels are made
#   tests/gpu.sh 3.9         with another one
#   tests/gpu.sh --install   no tests, but what they need
#
# Triton 3.6 interprets with NumPy below 2.4 only.
set -e
cd "$(dirname "$0")/.."
version=${1:-3.6}
if [ "$version" = --install ]; then version=3.6; fi
python3 -m venv build/triton-$version
build/triton-$version/bin/pip install --quiet torch==2.13.0 "triton==$version.*" "numpy<2.4" pytest pytest-xdist
if [ "$1" = --install ]; then exit; fi
PYTHONPATH=src exec build/triton-$version/bin/python -m pytest -o addopts= -q -rs \
    -n auto --maxprocesses 4 --dist worksteal tests/test_random.py tests/test_gpu.py -k "not test_cpu and not test_compiled"
