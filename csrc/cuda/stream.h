// The device and stream of a tensor, for launchers.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "../common.h"

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
