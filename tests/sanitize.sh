#!/bin/sh
# Build the core with AddressSanitizer and UndefinedBehaviorSanitizer and run its tests on it.
#
#   tests/sanitize.sh                 all of tests/test_cpu.py
#   tests/sanitize.sh -k "cases or odd_positions"
#
# The workspace has fences between its parts there, and is filled with NaN before each call.
set -e
cd "$(dirname "$0")/.."
out=build/sanitize
mkdir -p $out/deformnd
cp -r src/deformnd/. $out/deformnd
rm -f $out/deformnd/_core.*  # the one of src, or cmake takes it for its own
cmake -S . -B $out/cmake -DDEFORMND_SANITIZE=ON -DDEFORMND_OUTPUT="$PWD/$out/deformnd" >/dev/null
cmake --build $out/cmake --parallel 2
# Python itself is not instrumented, and keeps memory until it exits.
LD_PRELOAD="$(${CXX:-c++} -print-file-name=libasan.so) $(${CXX:-c++} -print-file-name=libubsan.so)" \
ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 PYTHONPATH="$PWD/$out" \
    exec python -m pytest tests/test_cpu.py -p no:cacheprovider "$@"
