// The pybind11 module segfast._C. Loading it registers the kernels; what it exports is for people and tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "common.h"

#if SEGFAST_HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifndef SEGFAST_CUDA_ARCHS
#define SEGFAST_CUDA_ARCHS ""
#endif

namespace py = pybind11;

namespace segfast {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512bf16", "amx"};

// Tiles of bfloat16 and bytes, which the system lets a process use that asks for it.
bool has_amx() {
#if SEGFAST_HAS_AMX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles = (d >> 24 & 1) != 0, bfloat16 = (d >> 22 & 1) != 0, bytes = (d >> 25 & 1) != 0;
  return tiles && bfloat16 && bytes && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa detect() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni")) return Isa::avx512;
    return has_amx() ? Isa::amx : Isa::avx512bf16;
  }
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

const Isa best = detect();
std::atomic<Isa> chosen{best};

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "msvc " + std::to_string(_MSC_VER);
#endif
#ifdef SEGFAST_CUDA
  info["cuda"] = SEGFAST_CUDA;
#else
  info["cuda"] = py::none();
#endif
  info["cuda_archs"] = SEGFAST_CUDA_ARCHS;
  info["torch_built_with"] = SEGFAST_TORCH_BUILT_WITH;
  info["torch_target"] = SEGFAST_TORCH_TARGET;
  return info;
}

py::dict cpu_features() {
  py::dict features;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
#define SEGFAST_FEATURE(name) features[name] = static_cast<bool>(__builtin_cpu_supports(name))
  SEGFAST_FEATURE("avx2");
  SEGFAST_FEATURE("fma");
  SEGFAST_FEATURE("avx512f");
  SEGFAST_FEATURE("avx512bw");
  SEGFAST_FEATURE("avx512dq");
  SEGFAST_FEATURE("avx512vl");
  SEGFAST_FEATURE("avx512bf16");
  SEGFAST_FEATURE("avx512vnni");
#undef SEGFAST_FEATURE
  features["amx"] = best == Isa::amx;
#endif
  std::vector<std::string> sets;
  for (int i = 0; i <= static_cast<int>(best); ++i) sets.emplace_back(kNames[i]);
  features["kernel_sets"] = sets;
  features["kernel_set"] = kNames[static_cast<int>(isa())];
  return features;
}

void set_kernel_set(const std::string& name) {
  if (name == "auto") return chosen.store(best);
  for (int i = 0; i <= static_cast<int>(best); ++i) {
    if (name == kNames[i]) return chosen.store(static_cast<Isa>(i));
  }
  throw py::value_error("set_kernel_set: want \"auto\" or one of cpu_features()[\"kernel_sets\"], got \"" + name + "\"");
}

std::map<std::string, int64_t> kernel_calls() {
  std::map<std::string, int64_t> calls;
  for (const Counter* c = Counter::head(); c != nullptr; c = c->next) calls[c->name] += c->calls.load(std::memory_order_relaxed);
  return calls;
}

}  // namespace

Isa isa() { return chosen.load(std::memory_order_relaxed); }

}  // namespace segfast

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of segfast. Importing it registers them with the PyTorch dispatcher.";
  m.def("build_info", &segfast::build_info,
        "Compiler, CUDA version or None, architectures, torch version built with and targeted.");
  m.def("cpu_features", &segfast::cpu_features, "What this processor has, the kernel sets it can run, the one that is chosen.");
  m.def("set_kernel_set", &segfast::set_kernel_set, pybind11::arg("name"),
        "Force a kernel set (for tests); \"auto\" takes the best.");
  m.def("advise_huge_pages", pybind11::overload_cast<uintptr_t, uintptr_t>(&segfast::advise_huge_pages), pybind11::arg("address"),
        pybind11::arg("bytes"), "Ask the system for large pages behind memory that has not been touched yet; elsewhere nothing.");
  m.def(
      "place_next",
      [](uintptr_t address, int64_t bytes, uintptr_t then, int64_t then_bytes) {
        segfast::next_places() = {{{reinterpret_cast<void*>(address), bytes}, {reinterpret_cast<void*>(then), then_bytes}}};
      },
      pybind11::arg("address"), pybind11::arg("bytes"), pybind11::arg("then") = 0, pybind11::arg("then_bytes") = 0,
      "Put this thread's next result of exactly so many bytes at an address, and one of other bytes at another; neither owns its "
      "memory. 0 bytes: nowhere.");
  m.def("kernel_calls", &segfast::kernel_calls, "{op: how many times its compiled kernels ran in this process}.");
}
