#!/bin/sh
# Build the sdist, and from it the wheel; install that in a fresh environment where no compiler can
# be found, and run the tests on it.
#
#   tests/wheel.sh                        all tests; arguments go to pytest
#   TORCH='torch==2.13.0' tests/wheel.sh -x
#
# Leaves the sdist and the wheel in build/release/dist.
set -e
cd "$(dirname "$0")/.."
out=$PWD/build/release
rm -rf "$out"
mkdir -p "$out/run" "$out/tools"
python3 -m venv "$out/builder"
"$out/builder/bin/pip" install --quiet build
"$out/builder/bin/python" -m build --outdir "$out/dist" .
python3 -m venv "$out/fresh"
for tool in cat env ls mkdir rm sh tr uname; do ln -s "$(command -v $tool)" "$out/tools"; done
cp -r tests docs examples README.md pyproject.toml "$out/run"
cd "$out/run"
export PATH="$out/fresh/bin:$out/tools"
unset CC CXX PYTHONPATH
if command -v cc c++ g++ clang++ cmake ninja; then
    echo "there is a compiler on PATH" >&2
    exit 1
fi
wheel=$(ls "$out"/dist/*.whl)
pip install --quiet --only-binary :all: "${TORCH:-torch}"
pip install --quiet --only-binary :all: "$wheel[test]"
deformnd info
python -c "import deformnd; assert deformnd.has_ops(), 'the wheel has no core'"
exec python -m pytest -p no:cacheprovider tests --pyargs deformnd "$@"
