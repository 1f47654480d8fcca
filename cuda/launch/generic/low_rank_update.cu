// Launches the epilogue of a library's matmul.
#include "cuda/launch/generic/low_rank_update.h"

#include <algorithm>

#include "cuda/kernels/generic/low_rank_update.cuh"
#include "cuda/launch/launch.h"
#include "cuda/launch/types.h"

namespace qlora::cuda {
namespace {

constexpr int64_t kMaxGridY = 65535;

template <class T>
cudaError_t launch(void (*kernel)(const kernels::LowRankUpdateArgs<T>), int64_t tokens_per_cta, const LowRankUpdate& u,
                   cudaStream_t stream) {
  const kernels::LowRankUpdateArgs<T> args{.sum = u.sum,
                                           .left = static_cast<const T*>(u.left),
                                           .right = static_cast<const T*>(u.right),
                                           .rank_stride = u.rank_stride,
                                           .column_stride = u.column_stride,
                                           .bias = static_cast<const T*>(u.bias),
                                           .out = static_cast<T*>(u.out),
                                           .out_stride = u.out_stride,
                                           .m = u.m,
                                           .columns = u.columns,
                                           .rank = u.rank,
                                           .dropout = u.dropout,
                                           .first_column = u.first_column};
  const dim3 grid(static_cast<unsigned>(ceil_div(u.columns, kernels::kUpdateColumns)),
                  static_cast<unsigned>(std::min(ceil_div(u.m, tokens_per_cta), kMaxGridY)));
  return launch_kernel(kernel, grid, kernels::kUpdateThreads, 0, stream, args);
}

}  // namespace

cudaError_t launch_low_rank_update(const LowRankUpdate& update, cudaStream_t stream) {
  if (update.m == 0 || update.columns == 0) return cudaSuccess;
  if (update.dtype == DType::kFloat32)
    return launch(kernels::low_rank_update_exact_kernel, kernels::kUpdateThreads / 32, update, stream);
  return with_16_bit_type(update.dtype, [&](auto element) {
    return launch(kernels::low_rank_update_kernel<decltype(element)>, kernels::kUpdateTokens, update, stream);
  });
}

}  // namespace qlora::cuda
