// The operators on CUDA: tensors -> views -> launchers, on the tensors' device and torch's current stream.
#include <cuda_runtime_api.h>

#include <tuple>

#include "cpp/ops/calls.h"
#include "cuda/launch/codec.h"
#include "cuda/launch/linear_nf4_dlora.h"
#include "cuda/launch/linear_nf4_dx.h"

namespace qlora {
namespace {

// Makes the device of `like` current for a scope, and knows torch's stream there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& like) : guard_(like.get_device_index()) {
    void* stream = nullptr;  // Stream::nativeHandle() needs torch 2.13
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

void check_launch(const char* op, cudaError_t error) {
  if (error == cudaSuccess) [[likely]]
    return;
  throw std::runtime_error(std::string(op) + ": CUDA launch failed: " + cudaGetErrorName(error) + " (" +
                           cudaGetErrorString(error) + ")");
}

std::tuple<Tensor, Tensor> quantize_nf4(const Tensor& w_arg, int64_t block_size) {
  const DType dtype = checks::storage_dtype("w", w_arg.scalar_type());
  checks::block_size("block_size", block_size);
  const OnDevice device(w_arg);
  const Tensor w = w_arg.is_contiguous() ? w_arg : stable::contiguous(w_arg);
  Tensor packed = stable::new_empty(w, checks::packed_shape(w), ScalarType::Byte);
  Tensor absmax = stable::new_empty(w, {ceil_div(w.numel(), block_size)}, ScalarType::Float);
  check_launch("quantize_nf4", cuda::launch_quantize_nf4(dtype, w.const_data_ptr(), w.numel(), block_size,
                                                         packed.mutable_data_ptr<uint8_t>(),
                                                         absmax.mutable_data_ptr<float>(), device.stream()));
  return {packed, absmax};
}

std::tuple<Tensor, Tensor, Tensor> quantize_absmax(const Tensor& absmax_arg, int64_t nested_block_size) {
  checks::has_dtype("absmax", absmax_arg, ScalarType::Float);
  checks::nested_block_size(nested_block_size);
  const OnDevice device(absmax_arg);
  const Tensor absmax = absmax_arg.is_contiguous() ? absmax_arg : stable::contiguous(absmax_arg);
  const int64_t count = absmax.numel();
  Tensor codes = stable::new_empty(absmax, {count}, ScalarType::Byte);
  Tensor nested_absmax = stable::new_empty(absmax, {ceil_div(count, nested_block_size)});
  Tensor nested_offset = stable::new_empty(absmax, {});
  Tensor workspace = stable::new_empty(absmax, {cuda::quantize_absmax_workspace(count)}, ScalarType::Double);
  check_launch("quantize_absmax",
               cuda::launch_quantize_absmax(absmax.const_data_ptr<float>(), count, nested_block_size,
                                            codes.mutable_data_ptr<uint8_t>(), nested_absmax.mutable_data_ptr<float>(),
                                            nested_offset.mutable_data_ptr<float>(),
                                            workspace.mutable_data_ptr<double>(), device.stream()));
  return {codes, nested_absmax, nested_offset};
}

Tensor dequantize_absmax(const Tensor& codes, const Tensor& nested_absmax, const Tensor& nested_offset,
                         int64_t nested_block_size) {
  const Scales scales = checks::nested_scales("codes", codes, nested_absmax, nested_offset, nested_block_size);
  const OnDevice device(codes);
  Tensor absmax = stable::new_empty(codes, {codes.numel()}, ScalarType::Float);
  check_launch("dequantize_absmax", cuda::launch_dequantize_absmax(scales, codes.numel(),
                                                                   absmax.mutable_data_ptr<float>(), device.stream()));
  return absmax;
}

Tensor dequantize_nf4(const Tensor& packed, const Tensor& absmax, OptionalTensor nested_absmax,
                      OptionalTensor nested_offset, int64_t block_size, int64_t nested_block_size,
                      std::vector<int64_t> shape, ScalarType dtype) {
  const DType out_dtype = checks::storage_dtype("dtype", dtype);
  const int64_t numel = checks::shape_numel(shape);
  const Weight w =
      checks::weight({packed, absmax, nested_absmax, nested_offset, block_size, nested_block_size}, 1, numel);
  const OnDevice device(packed);
  Tensor out = stable::new_empty(packed, shape, dtype);
  check_launch("dequantize_nf4", cuda::launch_dequantize_nf4(w.packed, w.scales, numel, out_dtype,
                                                             out.mutable_data_ptr(), device.stream()));
  return out;
}

// Memory for a launcher's own use, from torch's allocator, which keeps it alive until the stream is past the launch.
Tensor workspace(const Tensor& like, int64_t bytes) { return stable::new_empty(like, {bytes}, ScalarType::Byte); }

Tensor linear_nf4_dx(const Tensor& dy, const Tensor& packed, const Tensor& absmax, OptionalTensor nested_absmax,
                     OptionalTensor nested_offset, int64_t block_size, int64_t nested_block_size, int64_t in_features,
                     OptionalTensor lora_a, OptionalTensor lora_b, double scaling, double dropout_p, int64_t seed) {
  const OnDevice device(dy);
  const LinearDxCall call(dy, {packed, absmax, nested_absmax, nested_offset, block_size, nested_block_size},
                          in_features, lora_a, lora_b, scaling, dropout_p, seed);
  int64_t bytes = 0;
  check_launch("linear_nf4_dx", cuda::linear_nf4_dx_workspace_bytes(call.problem, &bytes));
  Tensor scratch = workspace(dy, bytes);
  check_launch("linear_nf4_dx", cuda::launch_linear_nf4_dx(call.problem, scratch.mutable_data_ptr(), device.stream()));
  return call.dx;
}

std::tuple<Tensor, Tensor> linear_nf4_dlora(const Tensor& dy, const Tensor& x, const Tensor& lora_a,
                                            const Tensor& lora_b, double scaling, double dropout_p, int64_t seed) {
  const OnDevice device(dy);
  const LoraGradCall call(dy, x, lora_a, lora_b, scaling, dropout_p, seed);
  int64_t bytes = 0;
  check_launch("linear_nf4_dlora", cuda::linear_nf4_dlora_workspace_bytes(call.problem, &bytes));
  Tensor scratch = workspace(dy, bytes);
  check_launch("linear_nf4_dlora",
               cuda::launch_linear_nf4_dlora(call.problem, scratch.mutable_data_ptr(), device.stream()));
  return {call.da, call.db};
}

}  // namespace
}  // namespace qlora

STABLE_TORCH_LIBRARY_IMPL(qlora, CUDA, m) {
  m.impl("quantize_nf4", TORCH_BOX(&qlora::quantize_nf4));
  m.impl("quantize_absmax", TORCH_BOX(&qlora::quantize_absmax));
  m.impl("dequantize_absmax", TORCH_BOX(&qlora::dequantize_absmax));
  m.impl("dequantize_nf4", TORCH_BOX(&qlora::dequantize_nf4));
  m.impl("linear_nf4_dx", TORCH_BOX(&qlora::linear_nf4_dx));
  m.impl("linear_nf4_dlora", TORCH_BOX(&qlora::linear_nf4_dlora));
}
