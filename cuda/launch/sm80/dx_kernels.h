// dX's kernels by type and configuration, for a single weight and for experts alike.
#pragma once

#include "cuda/kernels/any/linear_nf4_dx_exact.cuh"
#include "cuda/kernels/sm80/linear_nf4_dx.cuh"
#include "cuda/launch/launch.h"

namespace qlora::cuda {

// One of the kernels, and its launch parameters.
template <class Args>
struct DxKernel {
  void (*kernel)(const Args);
  cudaError_t (*ctas_per_sm)(const Device& device, int threads, int shared_bytes, int* ctas);
  int threads, shared_bytes;
};

// Family: Args, kKernel<T, kTokenTiles, kRagged> on tensor cores, and kExact for float32.
template <class Family>
struct DxKernels {
  using Kernel = DxKernel<typename Family::Args>;

  template <class T, int kTokenTiles, bool kRagged>
  static Kernel on_tensor_cores() {
    return {Family::template kKernel<T, kTokenTiles, kRagged>,
            ctas_per_sm<Family::template kKernel<T, kTokenTiles, kRagged>>, tile::kDxThreads,
            tile::DxLayout<kTokenTiles, kRagged>::kBytes};
  }

  template <class T>
  static Kernel on_tensor_cores(const DxConfig& config) {
    if (config.kernel == cuda::Kernel::kRagged) {
      return config.tokens == DxConfig::kRaggedTokens ? on_tensor_cores<T, DxConfig::kRaggedTokens / 8, true>()
                                                      : on_tensor_cores<T, DxConfig::kSmallBlockTokens / 8, true>();
    }
    switch (config.tokens) {
      case 8:
        return on_tensor_cores<T, 1, false>();
      case 16:
        return on_tensor_cores<T, 2, false>();
      case 32:
        return on_tensor_cores<T, 4, false>();
      default:
        return on_tensor_cores<T, 8, false>();
    }
  }

  static Kernel of(DType dtype, const DxConfig& config) {
    if (dtype == DType::kBFloat16) return on_tensor_cores<bfloat16>(config);
    if (dtype == DType::kFloat16) return on_tensor_cores<float16>(config);
    return {Family::kExact, ctas_per_sm<Family::kExact>, kernels::kDxExactThreads, 0};
  }
};

}  // namespace qlora::cuda
