"""What the GPU kernels take of a GPU, as far as compilers can say: registers, spills, shared memory, occupancy, wide accesses.

    python benchmarks/gpu_resources.py [--part cuda] [--architectures 80 90] [--sources shuffle]

renews benchmarks/gpu_resources.json, which tests/test_gpu_resources.py compares with a fresh compilation. A part is a function
below, with its name in PARTS; it gives what stands under its key in the file.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_suffix(".json")
SOURCES = sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("75", "80", "86", "87", "89", "90", "100", "120")
# Threads, blocks, shared bytes of a multiprocessor, shared bytes that a block pays on top; registers are 65536 everywhere.
LIMITS = {
    "75": (1024, 16, 64 << 10, 0),
    "80": (2048, 32, 164 << 10, 1024),
    "86": (1536, 16, 100 << 10, 1024),
    "87": (1536, 16, 164 << 10, 1024),
    "89": (1536, 24, 100 << 10, 1024),
    "90": (2048, 32, 228 << 10, 1024),
    "100": (2048, 32, 228 << 10, 1024),
    "120": (1536, 24, 100 << 10, 1024),
}
THREADS = 256


def toolkit() -> Path | None:
    nvcc = shutil.which("nvcc")
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and Path(os.path.realpath(nvcc)).parent.parent):
        if home and (Path(home) / "include" / "cuda_runtime.h").exists() and (Path(home) / "bin" / "nvcc").exists():
            return Path(home)
    return None


def nvcc_version() -> str:
    out = subprocess.run([str(toolkit() / "bin" / "nvcc"), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", out)[1]


def occupancy(architecture: str, registers: int, shared: int) -> float:
    """The share of a multiprocessor's threads that blocks of THREADS can fill, by registers, shared memory and block slots."""
    most_threads, most_blocks, shared_bytes, overhead = LIMITS[architecture]
    a_warp = math.ceil(registers * 32 / 256) * 256
    by_registers = 65536 // (a_warp * (THREADS // 32))
    by_shared = shared_bytes // (shared + overhead) if shared + overhead else most_blocks
    return min(most_blocks, most_threads // THREADS, by_registers, by_shared) * THREADS / most_threads


def dynamic_shared(kernel: str) -> int:
    """Of a depthwise tile of full size, twin of depthwise_tile_of in csrc/cuda/depthwise.cuh."""
    found = re.match(r"depthwise_tile<(\w+), (\d), (\d)", kernel)
    if not found:
        return 0
    k, stride = int(found[2]) or 3, int(found[3]) or 1
    bytes_, columns, rows = (8 if found[1] == "double" else 4), 64, THREADS // 64
    while rows * 8 > 1 and ((rows * 8 - 1) * stride + k) * ((columns - 1) * stride + k) * bytes_ > 40 << 10:
        rows -= 1
    return ((rows * 8 - 1) * stride + k) * ((columns - 1) * stride + k) * bytes_


def demangle(names: list[str]) -> list[str]:
    out = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    short = [re.sub(r"^void ", "", re.sub(r"segfast::(cuda::)?", "", name)) for name in out]
    return [re.sub(r"\((?!Way\)|bool\)|int\)|Act\)).*$", "", re.sub(r"\((Way|bool|int)\)", "", name)) for name in short]


@functools.cache
def compile_cuda(source: str, architecture: str) -> dict[str, dict[str, float]]:
    """{kernel: resources} of one .cu for one architecture."""
    from torch.utils import cpp_extension

    with tempfile.TemporaryDirectory() as folder:
        command = [
            str(toolkit() / "bin" / "nvcc"),
            *("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v"),
            *(f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "--keep", "--keep-dir", folder),
            "-DTORCH_TARGET_VERSION=0x020a000000000000ull",
            *(f"-I{path}" for path in cpp_extension.include_paths("cpu")),
            *("-c", str(ROOT / "csrc" / "cuda" / f"{source}.cu"), "-o", f"{folder}/kernel.o"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        ptx = next(Path(folder).glob("*.ptx")).read_text()
    wide = {}
    for body in re.split(r"\.entry ", ptx)[1:]:
        wide[body.split("(")[0].strip()] = tuple(
            len(re.findall(rf"{kind}\.global(?:\.nc)?(?:\.\w+)*?\.(?:v4\.[bufs]32|v2\.[bufs]64)", body)) for kind in ("ld", "st")
        )
    pattern = (
        r"Compiling entry function '(\w+)'[^\n]*\n[^\n]*\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill"
        r" loads\n[^\n]*Used (\d+) registers([^\n]*)"
    )
    found = re.findall(pattern, done.stderr)
    names = demangle([name for name, *_ in found])
    kernels = {}
    for name, (mangled, stack, stores, loads, registers, rest) in zip(names, found):
        static = int((re.search(r"(\d+) bytes smem", rest) or [0, 0])[1])
        shared = static + dynamic_shared(name)
        kernels[name] = {
            "registers": int(registers),
            "spill_bytes": int(stores) + int(loads),
            "stack_bytes": int(stack),
            "shared_bytes": shared,
            "occupancy": round(occupancy(architecture, int(registers), shared), 3),
            "loads_of_16_bytes": wide[mangled][0],
            "stores_of_16_bytes": wide[mangled][1],
        }
    return dict(sorted(kernels.items()))


def host_compiler() -> str | None:
    sys.path[:0] = [str(ROOT / "tests" / "simt")]
    import simt_build

    return shutil.which(simt_build.COMPILER)


def bytes_moved() -> dict[str, dict[str, float]]:
    """Of calls on the host build, where every access is counted: against the ideal of the roofline."""
    import torch

    sys.path[:0] = [str(ROOT / "tests" / "simt")]
    import simt_host

    kernels = simt_host.kernels()
    rows = {}
    with kernels.own_every_op():
        for op in simt_host.RAW:
            for dtype in (torch.float32, torch.float16):
                for layout in ("contiguous", "channels_last"):
                    for name, call, ideal in simt_host.roofline(op, dtype, layout):
                        kernels.take_counts()
                        call()
                        _, loaded, stored = kernels.take_counts()
                        row = {"loaded": loaded, "stored": stored, "ideal": ideal, "ratio": round((loaded + stored) / ideal, 3)}
                        rows[f"{op} {name} {str(dtype).removeprefix('torch.')} {layout}"] = row
    return rows


def cuda(known: dict, architectures: tuple[str, ...], sources: list[str]) -> dict:
    pairs = [(source, architecture) for source in sources for architecture in architectures]
    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(lambda pair: compile_cuda(*pair), pairs))
    resources = known.get("resources", {})
    for (source, architecture), kernels in zip(pairs, compiled):
        resources.setdefault(architecture, {})[source] = kernels
    return {"nvcc": nvcc_version(), "resources": resources, "bytes": bytes_moved()}


def count_triton_bytes(select: str = "") -> dict[str, dict]:
    """What benchmarks/gpu_bytes_triton.py counts, in a process of its own: kernels are interpreted from their definition on."""
    environment = {"TRITON_INTERPRET": "1", "SEGFAST_BACKEND": "triton", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("gpu_bytes_triton.py")), "--select", select]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def triton_bytes(known: dict, architectures: tuple[str, ...], sources: list[str]) -> dict:
    return count_triton_bytes()


PARTS: dict[str, Callable[..., dict]] = {"cuda": cuda, "triton_bytes": triton_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--architectures", nargs="*", default=list(ARCHITECTURES))
    parser.add_argument("--sources", nargs="*", default=SOURCES)
    options = parser.parse_args()
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    for part in options.part:
        table[part] = PARTS[part](table.get(part, {}), tuple(options.architectures), options.sources)
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
