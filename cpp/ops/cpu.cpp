// The operators on the CPU: tensors -> views -> kernels.
#include <tuple>

#include "cpp/cpu/check.h"
#include "cpp/cpu/kernels.h"
#include "cpp/ops/calls.h"
#include "cpp/ops/pool.h"
#include "cpp/ops/value_error.h"

namespace qlora {
namespace {

std::tuple<Tensor, Tensor> quantize_nf4(const Tensor& w_arg, int64_t block_size, const CodeName& name) {
  const Code code = checks::code(name);
  const DType dtype = checks::storage_dtype("w", w_arg.scalar_type());
  checks::block_size("block_size", block_size);
  const int64_t numel = checks::numel("w", w_arg);
  const Tensor w = w_arg.is_contiguous() ? w_arg : stable::contiguous(w_arg);
  Tensor packed = empty(w, checks::packed_shape(w), ScalarType::Byte);
  Tensor absmax = empty(w, {ceil_div(numel, block_size)}, ScalarType::Float);
  cpu::check(cpu::quantize_nf4(pool(), code, dtype, w.const_data_ptr(), numel, block_size,
                               packed.mutable_data_ptr<uint8_t>(), absmax.mutable_data_ptr<float>()));
  return {packed, absmax};
}

std::tuple<Tensor, Tensor, Tensor> quantize_absmax(const Tensor& absmax_arg, int64_t nested_block_size) {
  checks::has_dtype("absmax", absmax_arg, ScalarType::Float);
  checks::nested_block_size(nested_block_size);
  const int64_t count = checks::numel("absmax", absmax_arg);
  const Tensor absmax = absmax_arg.is_contiguous() ? absmax_arg : stable::contiguous(absmax_arg);
  Tensor codes = empty(absmax, {count}, ScalarType::Byte);
  Tensor nested_absmax = empty(absmax, {ceil_div(count, nested_block_size)}, ScalarType::Float);
  Tensor nested_offset = empty(absmax, std::vector<int64_t>{}, ScalarType::Float);
  cpu::check(cpu::quantize_absmax(pool(), absmax.const_data_ptr<float>(), count, nested_block_size,
                                  codes.mutable_data_ptr<uint8_t>(), nested_absmax.mutable_data_ptr<float>(),
                                  nested_offset.mutable_data_ptr<float>()));
  return {codes, nested_absmax, nested_offset};
}

Tensor dequantize_absmax(const Tensor& codes, const Tensor& nested_absmax, const Tensor& nested_offset,
                         int64_t nested_block_size) {
  const Scales scales = checks::nested("codes", codes, nested_absmax, nested_offset, kMinBlockSize, nested_block_size);
  Tensor absmax = empty(codes, {codes.numel()}, ScalarType::Float);
  cpu::check(cpu::dequantize_absmax(pool(), scales, codes.numel(), absmax.mutable_data_ptr<float>()));
  return absmax;
}

Tensor dequantize_nf4(const Tensor& packed, const Tensor& absmax, OptionalTensor nested_absmax,
                      OptionalTensor nested_offset, int64_t block_size, int64_t nested_block_size,
                      std::vector<int64_t> shape, ScalarType dtype, const CodeName& code) {
  const DType out_dtype = checks::storage_dtype("dtype", dtype);
  const int64_t numel = checks::shape_numel(shape);
  const Weight w =
      checks::weight({packed, absmax, nested_absmax, nested_offset, block_size, nested_block_size, code}, 1, numel);
  Tensor out = empty(packed, shape, dtype);
  cpu::check(cpu::dequantize_nf4(pool(), w, out_dtype, out.mutable_data_ptr()));
  return out;
}

template <bool kWithH>
auto linear_nf4(LinearArgs args) {
  const LinearCall call(args, kWithH);
  if (!call.is_empty()) cpu::check(cpu::linear_nf4(pool(), call.problem));
  return checks::results<kWithH>(call.y, call.h);
}

template <bool kWithG>
auto linear_nf4_dx(LinearDxArgs args) {
  const LinearDxCall call(args, kWithG);
  if (!call.is_empty()) cpu::check(cpu::linear_nf4_dx(pool(), call.problem));
  return checks::results<kWithG>(call.dx, call.g);
}

std::tuple<Tensor, Tensor> linear_nf4_dlora(LoraGradArgs args) {
  const LoraGradCall call(args);
  if (!call.is_empty()) cpu::check(cpu::linear_nf4_dlora(pool(), call.problem));
  return {call.da, call.db};
}

}  // namespace
}  // namespace qlora

STABLE_TORCH_LIBRARY_IMPL(qlora, CPU, m) {
  m.impl("quantize_nf4", QLORA_BOX(&qlora::quantize_nf4));
  m.impl("quantize_absmax", QLORA_BOX(&qlora::quantize_absmax));
  m.impl("dequantize_absmax", QLORA_BOX(&qlora::dequantize_absmax));
  m.impl("dequantize_nf4", QLORA_BOX(&qlora::dequantize_nf4));
  m.impl("linear_nf4", QLORA_BOX_ARGS(&qlora::linear_nf4<false>));
  m.impl("linear_nf4_with_h", QLORA_BOX_ARGS(&qlora::linear_nf4<true>));
  m.impl("linear_nf4_dx", QLORA_BOX_ARGS(&qlora::linear_nf4_dx<false>));
  m.impl("linear_nf4_dx_with_g", QLORA_BOX_ARGS(&qlora::linear_nf4_dx<true>));
  m.impl("linear_nf4_dlora", QLORA_BOX_ARGS(&qlora::linear_nf4_dlora));
}
