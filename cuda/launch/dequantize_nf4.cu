#include "cuda/kernels/dequantize_nf4.cuh"

#include "cuda/launch/codec.h"
#include "cuda/launch/device.h"
#include "cuda/tuning.h"

namespace qlora::cuda {
namespace {

template <class T, int kChunk>
cudaError_t launch(const uint8_t* packed, const tile::ScaleView& scales, int64_t first, int64_t count, void* out,
                   cudaStream_t stream) {
  constexpr int kThreads = CodecConfig::kThreads;
  Device device;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  const int64_t grid =
      codec_grid(ceil_div(count, int64_t{kChunk} * kernels::kDequantizeRun * (kThreads / tile::kWarp)), device);
  kernels::dequantize_nf4_kernel<T, kChunk, kThreads><<<static_cast<unsigned>(grid), kThreads, 0, stream>>>(
      packed, scales, first, first + count, static_cast<T*>(out));
  return cudaGetLastError();
}

// A chunk has at most one quantization block per lane.
template <class T>
cudaError_t launch_chunk(const uint8_t* packed, const tile::ScaleView& scales, int64_t first, int64_t count, void* out,
                         cudaStream_t stream) {
  return scales.scales.block_size < 64 ? launch<T, 1024>(packed, scales, first, count, out, stream)
                                       : launch<T, 2048>(packed, scales, first, count, out, stream);
}

}  // namespace

cudaError_t launch_dequantize_nf4(const uint8_t* packed, const Scales& s, int64_t first, int64_t count, DType dtype,
                                  void* out, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const tile::ScaleView scales = tile::make_scale_view(s, ceil_div(first + count, s.block_size));
  switch (dtype) {
    case DType::kFloat32:
      return launch_chunk<float>(packed, scales, first, count, out, stream);
    case DType::kBFloat16:
      return launch_chunk<bfloat16>(packed, scales, first, count, out, stream);
    case DType::kFloat16:
      return launch_chunk<float16>(packed, scales, first, count, out, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace qlora::cuda
