// The device and stream of a tensor and the kernels' type of its dtype, for launchers.
#pragma once

#include "launch.cuh"
#ifndef SEGFAST_SIMT
#include <torch/csrc/stable/accelerator.h>
#endif

#include "../common.h"

#ifdef SEGFAST_SIMT
// Compiled for the host: the same launchers serve CPU tensors, in a namespace of the tests' own.
#define SEGFAST_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(segfast_simt, CPU, m)

namespace segfast::cuda {

struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};

inline void check_launch(const char*) {}

}  // namespace segfast::cuda
#else
#define SEGFAST_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(segfast, CUDA, m)

// Weak: the symbol lives in libtorch_cuda, which a CPU-only PyTorch lacks, and a module built with FORCE_CUDA=1 loads there too.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                                          void** stream);

namespace segfast::cuda {

// Makes the device of `x` current while it lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) : index_(x.get_device_index()), guard_(index_) {}

  cudaStream_t stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  torch::stable::accelerator::DeviceIndex index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

}  // namespace segfast::cuda
#endif

namespace segfast::cuda {

// f(T{}) for the kernels' type of a float dtype: dispatch_float of the CPU, with CUDA's half types.
template <class F>
void dispatch(const char* op, ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(__nv_bfloat16{});
    case ScalarType::Half:
      return f(__half{});
    default:
      STD_TORCH_CHECK(false, op, ": want float32, float64, float16 or bfloat16");
  }
}

}  // namespace segfast::cuda
