// dX's kernels on mma.sync by type and number of tokens, for a single weight and for experts alike.
#pragma once

#include "cuda/kernels/sm80/linear_nf4_dx.cuh"
#include "cuda/launch/generic/dx.h"
#include "cuda/tuning/sm80.h"

namespace qlora::cuda::sm80 {

static_assert(tile::kDxColumns == kDxColumns && tile::kDxStageRows == kDxStageRows);

// Family: Args, and kKernel<T, kTokenTiles, kRagged, kHasOffsets>.
template <class Family>
struct DxKernels {
  using Kernel = DxKernel<typename Family::Args>;

  template <class T, int kTokens, bool kRagged, bool kHasOffsets = false>
  static Kernel kernel() {
    constexpr auto kKernel = Family::template kKernel<T, kTokens / 8, kRagged, kHasOffsets>;
    return {kKernel, ctas_per_sm<kKernel>, earliest_start<kKernel>, tile::kDxThreads,
            tile::DxLayout<kTokens / 8, kRagged, kHasOffsets>::kBytes};
  }

  template <class T>
  static Kernel regular(int64_t tokens, bool offsets) {
    if (offsets) {
      static_assert(tile::DxLayout<8, false, true>::kBytes <= kSharedDxOffsets64);
      return tokens == 16   ? kernel<T, 16, false, true>()
             : tokens == 32 ? kernel<T, 32, false, true>()
                            : kernel<T, 64, false, true>();
    }
    switch (tokens) {
      case 8:
        return kernel<T, 8, false>();
      case 16:
        return kernel<T, 16, false>();
      case 32:
        return kernel<T, 32, false>();
      default:
        return kernel<T, 64, false>();
    }
  }

  template <class T>
  static Kernel ragged(int64_t tokens) {
    return tokens == kDxSmallBlockTokens ? kernel<T, kDxSmallBlockTokens, true>() : kernel<T, kDxRaggedTokens, true>();
  }

  // float32 has kernels of its own (launch/generic).
  static Kernel regular(const LinearDxProblem& p, int64_t tokens) {
    const bool offsets = has_offsets(p.w);
    return p.dtype == DType::kBFloat16 ? regular<bfloat16>(tokens, offsets) : regular<float16>(tokens, offsets);
  }
  static Kernel ragged(DType dtype, int64_t tokens) {
    return dtype == DType::kBFloat16 ? ragged<bfloat16>(tokens) : ragged<float16>(tokens);
  }
};

}  // namespace qlora::cuda::sm80
