// Launches quantize_nf4, in one or two launches.
#include "cuda/kernels/generic/quantize_nf4.cuh"

#include "cuda/kernels/generic/block_scales.cuh"
#include "cuda/launch/generic/codec.h"
#include "cuda/launch/launch.h"
#include "cuda/launch/types.h"
#include "cuda/tuning/codec.h"

namespace qlora::cuda {
namespace {

template <class T, int kBlock>
cudaError_t launch(Code code, const void* w, int64_t numel, uint8_t* packed, float* absmax, cudaStream_t stream) {
  constexpr int kThreads = kCodecThreads;
  constexpr int64_t kPerCta = int64_t{kernels::QuantizeTile<T, kBlock>::kValues} * (kThreads / tile::kWarp);
  return launch_kernel(kernels::quantize_nf4_kernel<T, kBlock, kThreads>,
                       static_cast<unsigned>(ceil_div(numel, kPerCta)), kThreads, 0, stream, static_cast<const T*>(w),
                       numel, static_cast<int>(code), uint32_t{table_of(code).zero_code}, packed, absmax);
}

template <class T>
cudaError_t launch_block(Code code, const void* w, int64_t numel, int64_t block_size, uint8_t* packed, float* absmax,
                         cudaStream_t stream) {
  switch (block_size) {
    case 32:
      return launch<T, 32>(code, w, numel, packed, absmax, stream);
    case 64:
      return launch<T, 64>(code, w, numel, packed, absmax, stream);
    case 128:
      return launch<T, 128>(code, w, numel, packed, absmax, stream);
    case 256:
      return launch<T, 256>(code, w, numel, packed, absmax, stream);
    case 512:
      return launch<T, 512>(code, w, numel, packed, absmax, stream);
    case 1024:
      return launch<T, 1024>(code, w, numel, packed, absmax, stream);
    case 2048:
      return launch<T, 2048>(code, w, numel, packed, absmax, stream);
    case 4096:
      return launch<T, 4096>(code, w, numel, packed, absmax, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <class T>
cudaError_t launch_scales(Code code, const void* w, int64_t numel, int64_t block_size, float* scales,
                          cudaStream_t stream) {
  constexpr int kThreads = kCodecThreads;
  const int64_t grid = ceil_div(ceil_div(numel, block_size), int64_t{kThreads / tile::kWarp});
  return launch_kernel(kernels::block_scales_kernel<T, kThreads>, static_cast<unsigned>(grid), kThreads, 0, stream,
                       static_cast<const T*>(w), numel, static_cast<int>(block_size), table_of(code).largest, scales);
}

template <class T>
cudaError_t launch_as(Code code, DType dtype, const void* w, int64_t numel, int64_t block_size, uint8_t* packed,
                      float* absmax, cudaStream_t stream) {
  if (block_size >= 32 && tile::EncodeCells::serves(table_of(code)))
    return launch_block<T>(code, w, numel, block_size, packed, absmax, stream);
  const cudaError_t error = launch_scales<T>(code, w, numel, block_size, absmax, stream);
  return error == cudaSuccess ? launch_encode_own(code, dtype, w, absmax, numel, block_size, packed, stream) : error;
}

}  // namespace

cudaError_t launch_quantize_nf4(Code code, DType dtype, const void* w, int64_t numel, int64_t block_size,
                                uint8_t* packed, float* absmax, cudaStream_t stream) {
  if (numel == 0) return cudaSuccess;
  return with_type(dtype, [&](auto element) {
    return launch_as<decltype(element)>(code, dtype, w, numel, block_size, packed, absmax, stream);
  });
}

}  // namespace qlora::cuda
