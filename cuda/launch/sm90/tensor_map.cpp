// Builds the descriptors of TMA with the driver.
#include "cuda/launch/sm90/tensor_map.h"

namespace qlora::cuda {
namespace {

// The only driver function without a counterpart in the runtime. It is looked up by name, so the library does not link
// to libcuda.
auto encode_tiled() {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    constexpr unsigned kSince = 12000;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, kSince, cudaEnableDefault, &result) !=
            cudaSuccess ||
        result != cudaDriverEntryPointSuccess)
      found = nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return function;
}

}  // namespace

cudaError_t make_tensor_map(const TensorMapProblem& p, CUtensorMap* map) {
  const auto encode = encode_tiled();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(p.columns), static_cast<cuuint64_t>(p.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(p.row_bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(p.box_columns), static_cast<cuuint32_t>(p.box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result =
      encode(map, p.type, 2, const_cast<void*>(p.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             p.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace qlora::cuda
