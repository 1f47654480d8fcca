// Launches search_absmax_nf4.
#include "cuda/kernels/generic/search_absmax.cuh"

#include <type_traits>

#include "cuda/launch/generic/codec.h"
#include "cuda/launch/launch.h"
#include "cuda/launch/types.h"
#include "cuda/tuning/codec.h"

namespace qlora::cuda {
namespace {

template <class T>
cudaError_t launch(Code code, const void* w, const float* importance, int64_t numel, int64_t k, int64_t block_size,
                   float* absmax, cudaStream_t stream) {
  constexpr int kThreads = kCodecThreads;
  const int64_t grid = ceil_div(ceil_div(numel, block_size), int64_t{kThreads / kernels::kSearchLanes});
  return tile::with_round(code, [&](const auto& round) {
    return launch_kernel(kernels::search_absmax_kernel<std::decay_t<decltype(round)>, T, kThreads>,
                         static_cast<unsigned>(grid), kThreads, 0, stream, round, table_of(code).largest,
                         static_cast<const T*>(w), importance, numel, k, static_cast<int>(block_size), absmax);
  });
}

}  // namespace

cudaError_t launch_search_absmax_nf4(Code code, DType dtype, const void* w, const float* importance, int64_t numel,
                                     int64_t k, int64_t block_size, float* absmax, cudaStream_t stream) {
  if (numel == 0) return cudaSuccess;
  return with_type(dtype, [&](auto element) {
    return launch<decltype(element)>(code, w, importance, numel, k, block_size, absmax, stream);
  });
}

}  // namespace qlora::cuda
