#!/bin/sh
# Run tests/test_triton.py without a GPU, in an environment of its own: the kernels interpreted on
# the CPU, and compiled for sm_80 and sm_90, those in Gluon too.
#
#   tests/triton.sh          with Triton 3.6, for which the tables and the Gluon kernels are made
#   tests/triton.sh 3.9      with another one; the Gluon kernels are left out
#
# Triton 3.6 interprets with NumPy below 2.4 only.
set -e
cd "$(dirname "$0")/.."
version=${1:-3.6}
python3 -m venv build/triton-$version
build/triton-$version/bin/pip install --quiet torch==2.13.0 "triton==$version.*" "numpy<2.4" pytest
PYTHONPATH=src exec build/triton-$version/bin/python -m pytest -o addopts= tests/test_triton.py -q -rs
