#!/bin/sh
# Run tests/test_triton.py and the interpreted calls of tests/test_random.py without a GPU, in an
# environment of their own: the kernels interpreted on the CPU, and compiled for sm_80 and sm_90, those
# in Gluon too.
#
#   tests/triton.sh          with Triton 3.6, for which the tables and the Gluon kernels are made
#   tests/triton.sh 3.9      with another one; the Gluon kernels are left out
#
# Triton 3.6 interprets with NumPy below 2.4 only.
set -e
cd "$(dirname "$0")/.."
version=${1:-3.6}
python3 -m venv build/triton-$version
build/triton-$version/bin/pip install --quiet torch==2.13.0 "triton==$version.*" "numpy<2.4" pytest pytest-xdist
PYTHONPATH=src exec build/triton-$version/bin/python -m pytest -o addopts= -q -rs \
    -n auto --maxprocesses 4 tests/test_triton.py tests/test_random.py -k "not test_cpu and not test_compiled"
