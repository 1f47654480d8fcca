// The kernels of LoRA's gradients on mma.sync by type and ranks, for a single layer and for experts alike.
#pragma once

#include "cuda/kernels/sm80/linear_nf4_dlora.cuh"
#include "cuda/launch/generic/dlora.h"

namespace qlora::cuda::sm80 {

// Family: Args, and kKernel<T, kRankTiles, kRagged>.
template <class Family>
struct DLoraKernels {
  using Kernel = DLoraKernel<typename Family::Args>;

  template <class T, int kRanks, bool kRagged>
  static Kernel kernel() {
    constexpr auto kKernel = Family::template kKernel<T, kRanks / 16, kRagged>;
    return {kKernel, ctas_per_sm<kKernel>, earliest_start<kKernel>};
  }

  template <class T, bool kRagged>
  static Kernel of(int64_t ranks) {
    switch (ranks) {
      case 16:
        return kernel<T, 16, kRagged>();
      case 32:
        return kernel<T, 32, kRagged>();
      default:
        return kernel<T, 64, kRagged>();
    }
  }

  // float32 has kernels of its own (launch/generic).
  template <bool kRagged>
  static Kernel of(DType dtype, int64_t ranks) {
    return dtype == DType::kBFloat16 ? of<bfloat16, kRagged>(ranks) : of<float16, kRagged>(ranks);
  }
};

}  // namespace qlora::cuda::sm80
