#include <algorithm>

#include "cuda/kernels/encode_nf4.cuh"
#include "cuda/kernels/encode_nf4_feedback.cuh"
#include "cuda/launch/codec.h"
#include "cuda/launch/launch.h"
#include "cuda/tuning.h"

namespace qlora::cuda {
namespace {

int shift_of(int64_t block_size) {
  int shift = 0;
  while (int64_t{1} << shift < block_size) ++shift;
  return shift;
}

template <class T>
cudaError_t launch(const void* w, const float* absmax, int64_t numel, int64_t block_size, uint8_t* packed,
                   cudaStream_t stream) {
  constexpr int kThreads = kCodecThreads;
  constexpr int64_t kPerCta = int64_t{kernels::kEncodeSweeps} * tile::LaneValues<T>::kCount * kThreads;
  return launch_kernel(kernels::encode_nf4_kernel<T, kThreads>, static_cast<unsigned>(ceil_div(numel, kPerCta)),
                       kThreads, 0, stream, static_cast<const T*>(w), absmax, numel, shift_of(block_size), packed);
}

template <class T>
cudaError_t launch_feedback(const void* w, const float* absmax, int64_t n, int64_t k, int64_t block_size,
                            const float* feedback, const int64_t* order, uint8_t* packed, const Device& device,
                            const Allocator& allocate, cudaStream_t stream) {
  constexpr auto kKernel = kernels::encode_nf4_feedback_kernel<T>;
  constexpr int kShared = sizeof(kernels::FeedbackShared), kRows = kernels::FeedbackTile::kRows;
  int ctas = 0;
  const cudaError_t error = ctas_per_sm<kKernel>(device, kFeedbackWarps * tile::kWarp, kShared, &ctas);
  if (error != cudaSuccess) return error;
  // Each CTA of the grid has memory for the errors and the codes of a stripe, and takes one after another.
  const int warps = feedback_warps(n, kRows, device);
  const int64_t stripes = ceil_div(n, int64_t{warps} * kRows);
  const int64_t grid = std::min(stripes, int64_t{device.sm_count} * ctas);
  const int64_t errors = grid * warps * kRows * kernels::padded_places(k);
  auto* const workspace = static_cast<float*>(
      allocate(errors * static_cast<int64_t>(sizeof(float)) + grid * kernels::stripe_codes(k, warps)));
  const kernels::FeedbackArgs<T> args = {static_cast<const T*>(w),
                                         absmax,
                                         feedback,
                                         order,
                                         workspace,
                                         reinterpret_cast<uint8_t*>(workspace + errors),
                                         packed,
                                         n,
                                         static_cast<int>(k),
                                         shift_of(block_size)};
  return launch_kernel(kKernel, static_cast<unsigned>(grid), warps * tile::kWarp, kShared, stream, args);
}

}  // namespace

cudaError_t launch_encode_nf4(DType dtype, const void* w, const float* absmax, int64_t numel, int64_t block_size,
                              uint8_t* packed, cudaStream_t stream) {
  if (numel == 0) return cudaSuccess;
  switch (dtype) {
    case DType::kFloat32:
      return launch<float>(w, absmax, numel, block_size, packed, stream);
    case DType::kBFloat16:
      return launch<bfloat16>(w, absmax, numel, block_size, packed, stream);
    case DType::kFloat16:
      return launch<float16>(w, absmax, numel, block_size, packed, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t launch_encode_nf4_with_feedback(DType dtype, const void* w, const float* absmax, int64_t n, int64_t k,
                                            int64_t block_size, const float* feedback, const int64_t* order,
                                            uint8_t* packed, const Device& device, const Allocator& allocate,
                                            cudaStream_t stream) {
  if (n == 0 || k == 0) return cudaSuccess;
  switch (dtype) {
    case DType::kFloat32:
      return launch_feedback<float>(w, absmax, n, k, block_size, feedback, order, packed, device, allocate, stream);
    case DType::kBFloat16:
      return launch_feedback<bfloat16>(w, absmax, n, k, block_size, feedback, order, packed, device, allocate, stream);
    case DType::kFloat16:
      return launch_feedback<float16>(w, absmax, n, k, block_size, feedback, order, packed, device, allocate, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace qlora::cuda
