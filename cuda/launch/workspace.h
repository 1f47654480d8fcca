// The one piece of memory that a launcher takes for a call, and what lies in it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cpp/format/packing.h"

namespace qlora::cuda {

// Parts of a workspace, by their offsets in bytes, each aligned to 16.
class Workspace {
 public:
  // The new part's offset.
  int64_t add(int64_t bytes) {
    const int64_t offset = bytes_;
    bytes_ += ceil_div(bytes, 16) * 16;
    return offset;
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

// Words that are zero when a kernel starts, one per tile: CTAs that share a tile's sum count themselves there.
struct Tickets {
  uint32_t* words = nullptr;
  int64_t count = 0;

  cudaError_t clear(cudaStream_t stream) const {
    return count > 0 ? cudaMemsetAsync(words, 0, static_cast<size_t>(count) * sizeof(uint32_t), stream) : cudaSuccess;
  }
};

// Tickets and partial sums of `tiles` whose sums are split over `splits` CTAs that are not a cluster. Nothing for one.
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
