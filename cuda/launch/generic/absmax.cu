// Launches quantize_absmax and dequantize_absmax.
#include "cuda/kernels/generic/dequantize_absmax.cuh"
#include "cuda/kernels/generic/quantize_absmax.cuh"
#include "cuda/launch/generic/codec.h"
#include "cuda/launch/launch.h"
#include "cuda/tuning/codec.h"

namespace qlora::cuda {

int64_t quantize_absmax_workspace(int64_t count) { return ceil_div(count, kMeanChunk); }

cudaError_t launch_quantize_absmax(const float* absmax, int64_t count, int64_t nested_block_size, uint8_t* codes,
                                   float* nested_absmax, float* nested_offset, double* workspace, cudaStream_t stream) {
  if (count == 0) return cudaMemsetAsync(nested_offset, 0, sizeof(float), stream);
  constexpr int kThreads = kCodecThreads;
  const cudaError_t error =
      launch_kernel(kernels::absmax_sum_kernel, static_cast<unsigned>(quantize_absmax_workspace(count)), kMeanLanes, 0,
                    stream, absmax, count, workspace);
  if (error != cudaSuccess) return error;
  const int64_t grid = ceil_div(ceil_div(count, nested_block_size), int64_t{kThreads / tile::kWarp});
  return launch_kernel(kernels::quantize_absmax_kernel<kThreads>, static_cast<unsigned>(grid), kThreads, 0, stream,
                       absmax, count, nested_block_size, workspace, codes, nested_absmax, nested_offset);
}

cudaError_t launch_dequantize_absmax(const Scales& scales, int64_t count, float* absmax, const Device& device,
                                     cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  constexpr int kThreads = kCodecThreads;
  int ctas = 0;
  const cudaError_t error = ctas_per_sm<kernels::dequantize_absmax_kernel<kThreads>>(device, kThreads, 0, &ctas);
  if (error != cudaSuccess) return error;
  const int64_t grid = codec_grid(ceil_div(count, int64_t{kThreads}), ctas, device);
  return launch_kernel(kernels::dequantize_absmax_kernel<kThreads>, static_cast<unsigned>(grid), kThreads, 0, stream,
                       tile::make_scale_view(scales, count), absmax);
}

}  // namespace qlora::cuda
