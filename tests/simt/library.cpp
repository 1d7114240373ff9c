// What the tests set and read in the library of CUDA kernels that was compiled for the host.
#include "launch.cuh"

#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

SIMT_EXPORT void simt_configure(int schedule, int threads, int64_t blocks) {
  simt::schedule = static_cast<simt::Schedule>(schedule);
  simt::kThreads = threads;
  simt::kBlocks = blocks;
}

// Since the last call: launches, bytes loaded from and stored to global memory.
SIMT_EXPORT void simt_take_counts(int64_t* out) {
  out[0] = simt::counts.launches, out[1] = simt::counts.loaded, out[2] = simt::counts.stored;
  simt::counts = {};
}
