#include "cuda/kernels/quantize_nf4.cuh"

#include "cuda/launch/codec.h"
#include "cuda/launch/launch.h"
#include "cuda/tuning.h"

namespace qlora::cuda {
namespace {

template <class T, int kBlock>
cudaError_t launch(const void* w, int64_t numel, uint8_t* packed, float* absmax, cudaStream_t stream) {
  constexpr int kThreads = kCodecThreads;
  constexpr int64_t kPerCta = int64_t{kernels::QuantizeTile<T, kBlock>::kValues} * (kThreads / tile::kWarp);
  return launch_kernel(kernels::quantize_nf4_kernel<T, kBlock, kThreads>,
                       static_cast<unsigned>(ceil_div(numel, kPerCta)), kThreads, 0, stream, static_cast<const T*>(w),
                       numel, packed, absmax);
}

template <class T>
cudaError_t launch_block(const void* w, int64_t numel, int64_t block_size, uint8_t* packed, float* absmax,
                         cudaStream_t stream) {
  switch (block_size) {
    case 32:
      return launch<T, 32>(w, numel, packed, absmax, stream);
    case 64:
      return launch<T, 64>(w, numel, packed, absmax, stream);
    case 128:
      return launch<T, 128>(w, numel, packed, absmax, stream);
    case 256:
      return launch<T, 256>(w, numel, packed, absmax, stream);
    case 512:
      return launch<T, 512>(w, numel, packed, absmax, stream);
    case 1024:
      return launch<T, 1024>(w, numel, packed, absmax, stream);
    case 2048:
      return launch<T, 2048>(w, numel, packed, absmax, stream);
    case 4096:
      return launch<T, 4096>(w, numel, packed, absmax, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_quantize_nf4(DType dtype, const void* w, int64_t numel, int64_t block_size, uint8_t* packed,
                                float* absmax, cudaStream_t stream) {
  if (numel == 0) return cudaSuccess;
  switch (dtype) {
    case DType::kFloat32:
      return launch_block<float>(w, numel, block_size, packed, absmax, stream);
    case DType::kBFloat16:
      return launch_block<bfloat16>(w, numel, block_size, packed, absmax, stream);
    case DType::kFloat16:
      return launch_block<float16>(w, numel, block_size, packed, absmax, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace qlora::cuda
