#!/bin/sh
# Build the core with AddressSanitizer and UndefinedBehaviorSanitizer, or with ThreadSanitizer, and run
# its tests on it.
#
#   tests/sanitize.sh                 all of tests/test_cpu.py
#   tests/sanitize.sh -k "cases or odd_positions"
#   tests/sanitize.sh --threads [-k ...]   the latter, by clang and LLVM's OpenMP (clang libomp-dev)
#
# For the former, the workspace has fences between its parts, and is filled with NaN before each call.
# For the latter, LLVM's OpenMP says which thread waits for which, as GCC's does not, and the core runs
# in a process of its own (emulated.py), where all is instrumented that shares its memory.
set -e
cd "$(dirname "$0")/.."
if [ "$1" = --threads ]; then
    shift
    out=build/sanitize-threads
    cmake -S . -B $out/cmake -DCMAKE_CXX_COMPILER=clang++ \
        -DCMAKE_CXX_FLAGS="-fsanitize=thread -g1" -DDEFORMND_OUTPUT="$PWD/$out" >/dev/null
    cmake --build $out/cmake --parallel 2
    clang++ -std=c++17 -fsanitize=thread -fopenmp -o $out/emulated tests/emulated.cpp -ldl
    export DEFORMND_EMULATED="$out/emulated $out/_core.so" OMP_WAIT_POLICY=passive
    export TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1
    PYTHONPATH="$PWD/src:$PWD/tests" exec python -m pytest -o addopts= -q -p emulated \
        -p no:cacheprovider tests/test_cpu.py "$@"
fi
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
