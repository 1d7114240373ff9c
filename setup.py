"""Builds segfast._C. Everything static is in pyproject.toml.

SEGFAST_BUILD=none   no compiler: the pure-Python package, every op on its reference
FORCE_CUDA=1         build the CUDA kernels although no GPU is visible (TORCH_CUDA_ARCH_LIST says for which)
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

TORCH_TARGET = "2.10"  # the stable ABI's floor: the binary serves this torch and every later one
CUDA_ARCHS = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"


def extension():
    import pybind11
    import torch
    from setuptools import Extension
    from torch.utils import cpp_extension

    major, minor = TORCH_TARGET.split(".")
    macros = [
        ("TORCH_TARGET_VERSION", f"0x{int(major):02x}{int(minor):02x}000000000000ull"),
        ("SEGFAST_TORCH_TARGET", f'"{TORCH_TARGET}"'),
        ("SEGFAST_TORCH_BUILT_WITH", f'"{torch.__version__}"'),
    ]
    cuda_sources = sorted(str(p) for p in Path("csrc/cuda").glob("*.cu"))
    with_cuda = bool(cuda_sources) and (os.environ.get("FORCE_CUDA") == "1" or torch.cuda.is_available())
    sources = ["csrc/module.cpp", *sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp"))]
    cxx = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-Wno-psabi", "-fno-math-errno"]
    nvcc = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xcompiler", "-fvisibility=hidden"]
    link = []
    if sys.platform == "win32":
        cxx = ["/O2", "/std:c++20"]
    include_dirs = [pybind11.get_include()]
    library_dirs = [str(Path(torch.__file__).parent / "lib")]
    libraries = ["c10", "torch_cpu", "torch"]
    if with_cuda:
        home = cuda_home()
        cpp_extension.CUDA_HOME = home
        os.environ["CUDA_HOME"] = home
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
        sources += cuda_sources
        macros += [
            ("SEGFAST_CUDA", f'"{torch.version.cuda or "nvcc"}"'),
            ("SEGFAST_CUDA_ARCHS", f'"{os.environ["TORCH_CUDA_ARCH_LIST"]}"'),
        ]
        include_dirs.append(str(Path(home) / "include"))
        library_dirs.append(str(Path(home) / "lib64"))
        libraries.append("cudart_static")
        if sys.platform == "linux":
            link.append("-Wl,--no-as-needed")  # through libtorch the loader finds libtorch_cuda, where there is one
    include_dirs += cpp_extension.include_paths("cpu")
    return Extension(
        "segfast._C",
        sources=sources,
        depends=[str(p) for pattern in ("*.h", "*/*.h", "*/*.cuh") for p in Path("csrc").glob(pattern)],
        include_dirs=include_dirs,
        library_dirs=library_dirs,
        libraries=libraries,
        define_macros=macros,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=link,
        language="c++",
    )


def cuda_home() -> str:
    """The toolkit's own folder: the nvcc on PATH may be a wrapper or a link outside it."""
    if "CUDA_HOME" in os.environ:
        return os.environ["CUDA_HOME"]
    nvcc = shutil.which("nvcc")
    candidates = [Path("/usr/local/cuda")] + ([Path(os.path.realpath(nvcc)).parent.parent] if nvcc else [])
    for home in candidates:
        if (home / "include" / "cuda_runtime.h").exists():
            return str(home)
    sys.exit("FORCE_CUDA=1: no CUDA toolkit found; set CUDA_HOME to the folder that holds include/cuda_runtime.h")


if os.environ.get("SEGFAST_BUILD", "").lower() == "none":
    print("SEGFAST_BUILD=none: no extension is built; every op runs on its PyTorch reference", file=sys.stderr)
    setup()
else:
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """The stable ABI needs no libtorch_python and no torch C++ ABI flags; depends= makes header edits rebuild."""

        def build_extensions(self):
            if any(Path("csrc").rglob("*.h")) and self.force is not True:
                newest = max(p.stat().st_mtime for p in Path("csrc").rglob("*") if p.is_file())
                built = [Path(self.get_ext_fullpath(e.name)) for e in self.extensions]
                self.force = any(not b.exists() or b.stat().st_mtime < newest for b in built)
            super().build_extensions()

    setup(ext_modules=[extension()], cmdclass={"build_ext": Build})
