// The operators on the CPU. They turn tensors into views and call the kernels.
#include <tuple>

#include "cpp/cpu/check.h"
#include "cpp/cpu/kernels.h"
#include "cpp/ops/calls.h"
#include "cpp/ops/codec_calls.h"
#include "cpp/ops/pool.h"
#include "cpp/ops/value_error.h"

namespace qlora {
namespace {

std::tuple<Tensor, Tensor> quantize_nf4(const Tensor& w, int64_t block_size, const CodeName& code) {
  const QuantizeCall call(w, block_size, code);
  cpu::check(cpu::quantize_nf4(pool(), call.code, call.dtype, call.w.const_data_ptr(), call.numel, block_size,
                               call.packed.mutable_data_ptr<uint8_t>(), call.absmax.mutable_data_ptr<float>()));
  return {call.packed, call.absmax};
}

std::tuple<Tensor, Tensor, Tensor> quantize_absmax(const Tensor& absmax, int64_t nested_block_size) {
  const QuantizeAbsmaxCall call(absmax, nested_block_size);
  cpu::check(cpu::quantize_absmax(pool(), call.absmax.const_data_ptr<float>(), call.count, nested_block_size,
                                  call.codes.mutable_data_ptr<uint8_t>(), call.nested_absmax.mutable_data_ptr<float>(),
                                  call.nested_offset.mutable_data_ptr<float>()));
  return {call.codes, call.nested_absmax, call.nested_offset};
}

Tensor dequantize_absmax(const Tensor& codes, const Tensor& nested_absmax, const Tensor& nested_offset,
                         int64_t nested_block_size) {
  const DequantizeAbsmaxCall call(codes, nested_absmax, nested_offset, nested_block_size);
  cpu::check(cpu::dequantize_absmax(pool(), call.scales, call.count, call.absmax.mutable_data_ptr<float>()));
  return call.absmax;
}

Tensor dequantize_nf4(DequantizeArgs args) {
  const DequantizeCall call(args);
  cpu::check(cpu::dequantize_nf4(pool(), call.w, call.dtype, call.out.mutable_data_ptr()));
  return call.out;
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

Tensor linear_dense(const Tensor& x, const Tensor& weight, OptionalTensor bias) {
  const DenseLinearCall call(x, weight, bias);
  if (!call.is_empty()) cpu::check(cpu::linear_dense(pool(), call.problem));
  return call.y;
}

Tensor linear_dense_dx(const Tensor& dy, const Tensor& weight) {
  const DenseLinearDxCall call(dy, weight);
  if (!call.is_empty()) cpu::check(cpu::linear_dense_dx(pool(), call.problem));
  return call.dx;
}

}  // namespace
}  // namespace qlora

STABLE_TORCH_LIBRARY_IMPL(qlora, CPU, m) {
  m.impl("quantize_nf4", QLORA_BOX(&qlora::quantize_nf4));
  m.impl("quantize_absmax", QLORA_BOX(&qlora::quantize_absmax));
  m.impl("dequantize_absmax", QLORA_BOX(&qlora::dequantize_absmax));
  m.impl("dequantize_nf4", QLORA_BOX_ARGS(&qlora::dequantize_nf4));
  m.impl("linear_nf4", QLORA_BOX_ARGS(&qlora::linear_nf4<false>));
  m.impl("linear_nf4_with_h", QLORA_BOX_ARGS(&qlora::linear_nf4<true>));
  m.impl("linear_nf4_dx", QLORA_BOX_ARGS(&qlora::linear_nf4_dx<false>));
  m.impl("linear_nf4_dx_with_g", QLORA_BOX_ARGS(&qlora::linear_nf4_dx<true>));
  m.impl("linear_nf4_dlora", QLORA_BOX_ARGS(&qlora::linear_nf4_dlora));
  m.impl("linear_dense", QLORA_BOX(&qlora::linear_dense));
  m.impl("linear_dense_dx", QLORA_BOX(&qlora::linear_dense_dx));
}
