#include "cuda/launch/dropout.h"

#include "cuda/kernels/dropout.cuh"
#include "cuda/launch/device.h"
#include "cuda/tuning.h"

namespace qlora::cuda {
namespace {

template <class T>
cudaError_t launch(void* x, int64_t numel, const Dropout& dropout, cudaStream_t stream) {
  constexpr int kThreads = CodecConfig::kThreads;
  Device device;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  const int64_t grid = codec_grid(ceil_div(numel, int64_t{4} * kThreads), device);
  kernels::dropout_kernel<T, kThreads>
      <<<static_cast<unsigned>(grid), kThreads, 0, stream>>>(static_cast<T*>(x), numel, dropout);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_dropout(DType dtype, void* x, int64_t numel, const Dropout& dropout, cudaStream_t stream) {
  if (numel == 0 || !dropout.active()) return cudaSuccess;
  switch (dtype) {
    case DType::kFloat32:
      return launch<float>(x, numel, dropout, stream);
    case DType::kBFloat16:
      return launch<bfloat16>(x, numel, dropout, stream);
    case DType::kFloat16:
      return launch<float16>(x, numel, dropout, stream);
    case DType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace qlora::cuda
