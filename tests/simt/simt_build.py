"""Compiles the CUDA sources for the host: a library of torch ops, and native drivers without torch."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
SIMT = Path(__file__).resolve().parent
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "c++"
WARNINGS = ("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi")
COMMON = ("-std=c++20", "-DSEGFAST_SIMT", f"-I{SIMT}", f"-I{CUDA}", *WARNINGS)
DRIVERS = {"shuffle": "SIMT_SHUFFLE", "pixelwise_kl": "SIMT_PIXELWISE_KL", "depthwise": "SIMT_DEPTHWISE"}  # .cuh: its driver


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def cache() -> Path:
    """A folder named by the contents of all sources: what was built from them once is used again."""
    digest = hashlib.sha256(COMPILER.encode())
    for path in sorted([*CUDA.glob("*.*"), *SIMT.glob("*.*"), ROOT / "csrc" / "common.h"]):
        digest.update(path.name.encode() + path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"segfast-simt-{os.getuid()}-{digest.hexdigest()[:16]}"
    folder.mkdir(exist_ok=True)
    return folder


def library(folder: Path, flags: tuple[str, ...] = ("-O1",)) -> Path:
    """The launchers of all ops, registered as CPU kernels of the namespace segfast_simt."""
    import torch
    from torch.utils import cpp_extension

    name = hashlib.sha256(f"{torch.__version__}{flags}".encode()).hexdigest()[:8]
    target = folder / f"simt-{name}.so"
    if target.exists():
        return target
    torch_flags = ["-DTORCH_TARGET_VERSION=0x020a000000000000ull", *(f"-isystem{p}" for p in cpp_extension.include_paths("cpu"))]
    sources = [*sorted(CUDA.glob("*.cu")), SIMT / "library.cpp"]
    objects = [folder / f"{name}-{source.stem}.o" for source in sources]
    commands = [
        [COMPILER, *flags, "-fPIC", "-fvisibility=hidden", *COMMON, *torch_flags, "-x", "c++", "-c", str(source), "-o", str(made)]
        for source, made in zip(sources, objects)
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, commands))
    link = Path(torch.__file__).parent / "lib"
    unfinished = target.with_suffix(f".{os.getpid()}")
    run([COMPILER, "-shared", *flags, *map(str, objects), f"-L{link}", "-lc10", "-ltorch_cpu", "-o", str(unfinished)])
    unfinished.replace(target)
    return target


def driver(kernels: str, target: Path, flags: tuple[str, ...] = (), headers: Path = CUDA) -> Path:
    """The program that checks the kernels of one .cuh, of those in `headers`."""
    if not target.exists():
        unfinished = target.with_suffix(f".{os.getpid()}")
        first = (f"-I{headers}",) if headers != CUDA else ()
        run(
            [
                COMPILER,
                *first,
                *COMMON,
                *flags,
                f"-D{DRIVERS[kernels]}",
                str(SIMT / "driver.cpp"),
                "-pthread",
                "-o",
                str(unfinished),
            ]
        )
        unfinished.replace(target)
    return target
