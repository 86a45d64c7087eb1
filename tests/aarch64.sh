#!/bin/sh
# Build the core for aarch64 on a machine of another kind, and run its tests on it by QEMU.
#
#   tests/aarch64.sh                            a small set
#   tests/aarch64.sh tests/test_cpu.py -k half  what pytest shall run instead
#   tests/aarch64.sh --install                  nothing, but bring what it needs, by Debian's apt-get
#
# Python, torch and the reference run on this machine's processor, see emulated.py.
set -e
cd "$(dirname "$0")/.."
if [ "$1" = --install ]; then
    apt-get update -qq
    exec apt-get install -qq --no-install-recommends g++-aarch64-linux-gnu qemu-user
fi
out=build/aarch64
cmake -S . -B $out/cmake -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DDEFORMND_OUTPUT="$PWD/$out" >/dev/null
cmake --build $out/cmake
aarch64-linux-gnu-g++ -std=c++17 -O1 -Wall -Wextra -o $out/emulated tests/emulated.cpp -ldl
export DEFORMND_EMULATED="qemu-aarch64 -L /usr/aarch64-linux-gnu $out/emulated $out/_core.so"
export PYTHONPATH="$PWD/src:$PWD/tests" OMP_WAIT_POLICY=passive
if [ $# = 0 ]; then
    set -- tests/test_cpu.py tests/test_random.py \
        -k "test_cases or golden or odd_pos or half_conv or layouts or test_cpu[0]"
fi
exec python -m pytest -o addopts= -q -p emulated -p no:cacheprovider "$@"
