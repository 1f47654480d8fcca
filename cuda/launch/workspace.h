// The workspace of a launch: a single allocation per call, and its parts.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cpp/format/packing.h"

namespace qlora::cuda {

// Lays out the parts of a workspace, each aligned to 16 bytes.
class Workspace {
 public:
  // Adds a part and returns its offset in bytes.
  int64_t add(int64_t bytes) {
    const int64_t offset = bytes_;
    bytes_ += ceil_div(bytes, 16) * 16;
    return offset;
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

// One word per tile, zero when a kernel starts. The CTAs that share a tile's sum count their arrivals in it.
struct Tickets {
  uint32_t* words = nullptr;
  int64_t count = 0;

  cudaError_t clear(cudaStream_t stream) const {
    return count > 0 ? cudaMemsetAsync(words, 0, static_cast<size_t>(count) * sizeof(uint32_t), stream) : cudaSuccess;
  }
};

// Tickets and partial sums of `tiles` tiles whose sums are split over `splits` CTAs that are not a cluster. Takes no
// memory for a single split.
class SplitSums {
 public:
  SplitSums(Workspace* workspace, int64_t tiles, int64_t splits, int64_t tile_outputs)
      : count_(splits > 1 ? tiles : 0),
        tickets_(workspace->add(count_ * static_cast<int64_t>(sizeof(uint32_t)))),
        partials_(workspace->add(count_ * splits * tile_outputs * static_cast<int64_t>(sizeof(float)))) {}

  Tickets tickets(uint8_t* memory) const { return {reinterpret_cast<uint32_t*>(memory + tickets_), count_}; }
  float* partials(uint8_t* memory) const { return reinterpret_cast<float*>(memory + partials_); }

 private:
  int64_t count_, tickets_, partials_;
};

}  // namespace qlora::cuda
