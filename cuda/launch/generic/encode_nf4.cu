// Launches the encoders under given scales: to the nearest code, stochastic, and with feedback.
#include <algorithm>
#include <type_traits>

#include "cuda/kernels/generic/encode_nf4.cuh"
#include "cuda/kernels/generic/encode_nf4_feedback.cuh"
#include "cuda/launch/generic/codec.h"
#include "cuda/launch/launch.h"
#include "cuda/launch/types.h"
#include "cuda/launch/workspace.h"
#include "cuda/tuning/codec.h"

namespace qlora::cuda {
namespace {

int shift_of(int64_t block_size) {
  int shift = 0;
  while (int64_t{1} << shift < block_size) ++shift;
  return shift;
}

template <class T, class Encode>
cudaError_t launch(Code code, const void* w, const float* absmax, int64_t numel, int64_t block_size,
                   const Encode& encode, uint8_t* packed, cudaStream_t stream) {
  constexpr int kThreads = kCodecThreads;
  constexpr int64_t kPerCta = int64_t{kernels::kEncodeSweeps} * tile::LaneValues<T>::kCount * kThreads;
  return launch_kernel(kernels::encode_nf4_kernel<T, Encode, kThreads>, static_cast<unsigned>(ceil_div(numel, kPerCta)),
                       kThreads, 0, stream, static_cast<const T*>(w), absmax, numel, shift_of(block_size), encode,
                       uint32_t{table_of(code).zero_code}, packed);
}

template <class Encode>
cudaError_t launch_as(Code code, DType dtype, const void* w, const float* absmax, int64_t numel, int64_t block_size,
                      const Encode& encode, uint8_t* packed, cudaStream_t stream) {
  if (numel == 0) return cudaSuccess;
  return with_type(dtype, [&](auto element) {
    return launch<decltype(element)>(code, w, absmax, numel, block_size, encode, packed, stream);
  });
}

template <class T, bool kAligned, class Round>
cudaError_t launch_feedback_on(const Round& round, const FeedbackProblem& p, const Context& context) {
  constexpr auto kKernel = kernels::encode_nf4_feedback_kernel<Round, T, kAligned>;
  constexpr int kRows = kernels::FeedbackTile::kRows;
  static_assert(kernels::feedback_shared_bytes<Round>(kFeedbackWarps75) <= kShared75);
  const int most_warps = most_feedback_warps(context.device);
  const int shared_bytes = kernels::feedback_shared_bytes<Round>(most_warps);
  int ctas = 0;
  const cudaError_t error = ctas_per_sm<kKernel>(context.device, most_warps * tile::kWarp, shared_bytes, &ctas);
  if (error != cudaSuccess) return error;
  // Each CTA of the grid has workspace for the errors and codes of one stripe, and processes one stripe after another.
  const int warps = feedback_warps(p.n, kRows, context.device);
  const int64_t stripes = ceil_div(p.n, int64_t{warps} * kRows);
  const int64_t grid = std::min(stripes, int64_t{context.device.sm_count} * ctas);
  Workspace parts;
  const int64_t errors =
      parts.add(grid * warps * kRows * kernels::padded_places(p.k) * static_cast<int64_t>(sizeof(float)));
  const int64_t codes = parts.add(grid * kernels::stripe_codes(p.k, warps));
  uint8_t* const memory = context.allocate(parts.bytes());
  const kernels::FeedbackArgs<T> args = {static_cast<const T*>(p.w),
                                         p.absmax,
                                         p.feedback,
                                         p.order,
                                         reinterpret_cast<float*>(memory + errors),
                                         memory + codes,
                                         p.packed,
                                         p.n,
                                         static_cast<int>(p.k),
                                         shift_of(p.block_size),
                                         table_of(p.code).zero_code};
  return launch_kernel(kKernel, static_cast<unsigned>(grid), warps * tile::kWarp, shared_bytes, context.stream, round,
                       args);
}

template <class T>
cudaError_t launch_feedback(const FeedbackProblem& p, const Context& context) {
  const bool aligned = p.k % 4 == 0 && reinterpret_cast<uintptr_t>(p.feedback) % 16 == 0;
  return tile::with_round(p.code, [&](const auto& round) {
    return aligned ? launch_feedback_on<T, true>(round, p, context) : launch_feedback_on<T, false>(round, p, context);
  });
}

}  // namespace

cudaError_t launch_encode_nf4(Code code, DType dtype, const void* w, const float* absmax, int64_t numel,
                              int64_t block_size, uint8_t* packed, cudaStream_t stream) {
  return tile::with_round(code, [&](const auto& round) {
    const kernels::NearestCode<std::decay_t<decltype(round)>, false> encode{round};
    return launch_as(code, dtype, w, absmax, numel, block_size, encode, packed, stream);
  });
}

cudaError_t launch_encode_own(Code code, DType dtype, const void* w, const float* absmax, int64_t numel,
                              int64_t block_size, uint8_t* packed, cudaStream_t stream) {
  const kernels::NearestCode<tile::RankRound, true> encode{{static_cast<int>(code)}};
  return launch_as(code, dtype, w, absmax, numel, block_size, encode, packed, stream);
}

cudaError_t launch_encode_nf4_stochastic(Code code, DType dtype, const void* w, const float* absmax, int64_t numel,
                                         int64_t block_size, uint64_t seed, uint8_t* packed, cudaStream_t stream) {
  return tile::with_stochastic(code, [&](const auto& stochastic) {
    const kernels::StochasticCode<std::decay_t<decltype(stochastic)>> encode{stochastic, seed};
    return launch_as(code, dtype, w, absmax, numel, block_size, encode, packed, stream);
  });
}

cudaError_t launch_encode_nf4_with_feedback(const FeedbackProblem& p, const Context& context) {
  if (p.n == 0 || p.k == 0) return cudaSuccess;
  return with_type(p.dtype, [&](auto element) { return launch_feedback<decltype(element)>(p, context); });
}

}  // namespace qlora::cuda
