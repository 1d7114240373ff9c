#!/usr/bin/env bash
# tests/sanitize.sh [fuzz.py's arguments ...]: compiles segfast._C under AddressSanitizer and UndefinedBehaviorSanitizer, outside the checkout,
# and runs tests/fuzz.py on it. Needs g++, and a python with torch, pybind11 and numpy.
#
# PYTHON           the interpreter (python)
# SEGFAST_EFFORT   ci or full: how many descriptors
# SANITIZE_BUILD   a folder to build in; what is newer than its source there is used again
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
if [ -n "${SANITIZE_BUILD:-}" ]; then
  mkdir -p "$SANITIZE_BUILD"
  build=$(realpath "$SANITIZE_BUILD")
else
  build=$(mktemp -d)
  trap 'rm -rf "$build"' EXIT
fi

# A report ends the process: going on would hide which descriptor it was. -O1 keeps the build short and the frames readable.
sanitizers=(-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all)
mapfile -t config < <("$python" - <<'PY'
import pathlib
import sysconfig

import pybind11
import torch
from torch.utils import cpp_extension

for folder in (*cpp_extension.include_paths("cpu"), pybind11.get_include(), sysconfig.get_path("include")):
    print(f"-isystem{folder}")
print(pathlib.Path(torch.__file__).parent / "lib")
print(sysconfig.get_config_var("EXT_SUFFIX"))
PY
)
suffix=${config[-1]}
libraries=${config[-2]}
flags=(-O1 -g1 -fno-omit-frame-pointer "${sanitizers[@]}" -fPIC -std=c++20 -fvisibility=hidden -Wno-psabi -fno-math-errno
  -DTORCH_TARGET_VERSION=0x020a000000000000ull '-DSEGFAST_TORCH_TARGET="2.10"' '-DSEGFAST_TORCH_BUILT_WITH="sanitizers"'
  "${config[@]:0:${#config[@]}-2}")

newest=$(find csrc -name '*.h' -printf '%T@ %p\n' | sort -n | tail -1 | cut -d' ' -f2-)
sources=()
for source in $(ls -S csrc/module.cpp csrc/cpu/*.cpp); do # the longest first
  object=$build/$(basename "$source" .cpp).o
  [ "$object" -nt "$source" ] && [ "$object" -nt "$newest" ] || sources+=("$source")
done
compile() { g++ "${flags[@]}" -c "$1" -o "$build/$(basename "$1" .cpp).o.part" && mv "$build/$(basename "$1" .cpp).o.part" "$build/$(basename "$1" .cpp).o"; }
started=$SECONDS
pids=()
for source in "${sources[@]}"; do
  while [ "$(jobs -pr | wc -l)" -ge "${MAX_JOBS:-$(nproc)}" ]; do sleep 0.2; done
  compile "$source" &
  pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done

mkdir -p "$build/package"
rm -rf "$build/package/segfast"
cp -r segfast "$build/package/segfast"
rm -f "$build/package/segfast/"_C*
g++ "${sanitizers[@]}" -shared "$build"/*.o -o "$build/package/segfast/_C$suffix" -L"$libraries" -lc10 -ltorch_cpu -ltorch
echo "built in $((SECONDS - started)) s"

# Python itself frees little at its end: leaks are not looked for.
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) $(g++ -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
  PYTHONPATH="$build/package" PYTHONSAFEPATH=1 "$python" tests/fuzz.py "$@"
