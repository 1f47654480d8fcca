// The operators on the CPU. They turn tensors into views and call the kernels.
#include <tuple>

#include "cpp/cpu/check.h"
#include "cpp/cpu/kernels.h"
#include "cpp/ops/calls.h"
#include "cpp/ops/codec_calls.h"
#include "cpp/ops/grouped_cpu.h"
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

// The dispatcher sends every kind of tensor to the operators over experts that has no kernel of its own, so they reject
// unsupported kinds.
template <class Args>
void are_dense_on_cpu(Args& args) {
  if constexpr (!kOverExperts<Args>) return;
  const auto check = [](const char* name, const Tensor& t) {
    if (!t.defined()) return;
    int32_t layout = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &layout));
    checks::require(layout == aoti_torch_layout_strided(), name, ": expected a dense tensor, got a sparse one");
    checks::require(t.is_cpu(), name, ": expected a tensor on the CPU, got ", checks::device_text(t));
  };
  for_each_field(args, [&](const auto& field) {
    using T = std::remove_reference_t<decltype(field.value)>;
    if constexpr (std::is_same_v<T, Tensor>) check(field.name, field.value);
    if constexpr (std::is_same_v<T, OptionalTensor>) {
      if (field.value) check(field.name, *field.value);
    }
  });
}

// Runs a call, unless it has nothing to compute.
template <class Call, class Problem>
void run(const Call& call, Kernel<Problem> kernel) {
  if constexpr (requires { call.problem.experts; })
    run_experts(call.problem, call.is_empty(), kernel);
  else if (!call.is_empty())
    cpu::check(kernel(pool(), call.problem));
}

template <bool kWithH, class Args>
auto linear_nf4(Args args) {
  are_dense_on_cpu(args);
  const LinearCall call(args, kWithH);
  run(call, cpu::linear_nf4);
  return checks::results<kWithH>(call.y, call.h);
}

template <bool kWithG, class Args>
auto linear_nf4_dx(Args args) {
  are_dense_on_cpu(args);
  const LinearDxCall call(args, kWithG);
  run(call, cpu::linear_nf4_dx);
  return checks::results<kWithG>(call.dx, call.g);
}

template <class Args>
std::tuple<Tensor, Tensor> linear_nf4_dlora(Args args) {
  are_dense_on_cpu(args);
  const LoraGradCall call(args);
  run(call, cpu::linear_nf4_dlora);
  return {call.da, call.db};
}

Tensor linear_dense(const Tensor& x, const Tensor& weight, OptionalTensor bias) {
  const DenseLinearCall call(x, weight, bias);
  run(call, cpu::linear_dense);
  return call.y;
}

Tensor linear_dense_dx(const Tensor& dy, const Tensor& weight) {
  const DenseLinearDxCall call(dy, weight);
  run(call, cpu::linear_dense_dx);
  return call.dx;
}

}  // namespace
}  // namespace qlora

STABLE_TORCH_LIBRARY_IMPL(qlora, CPU, m) {
  using namespace qlora;
  m.impl("quantize_nf4", QLORA_BOX(&quantize_nf4));
  m.impl("quantize_absmax", QLORA_BOX(&quantize_absmax));
  m.impl("dequantize_absmax", QLORA_BOX(&dequantize_absmax));
  m.impl("dequantize_nf4", QLORA_BOX_ARGS(&dequantize_nf4));
  m.impl("linear_nf4", QLORA_BOX_ARGS((&linear_nf4<false, LinearArgs>)));
  m.impl("linear_nf4_with_h", QLORA_BOX_ARGS((&linear_nf4<true, LinearArgs>)));
  m.impl("linear_nf4_dx", QLORA_BOX_ARGS((&linear_nf4_dx<false, LinearDxArgs>)));
  m.impl("linear_nf4_dx_with_g", QLORA_BOX_ARGS((&linear_nf4_dx<true, LinearDxArgs>)));
  m.impl("linear_nf4_dlora", QLORA_BOX_ARGS((&linear_nf4_dlora<LoraGradArgs>)));
  m.impl("linear_dense", QLORA_BOX(&linear_dense));
  m.impl("linear_dense_dx", QLORA_BOX(&linear_dense_dx));
}

// Registered for every kind of tensor except CUDA's, so that the checks report unsupported ones.
STABLE_TORCH_LIBRARY_IMPL(qlora, CompositeExplicitAutograd, m) {
  using namespace qlora;
  m.impl("grouped_linear_nf4", QLORA_BOX_ARGS((&linear_nf4<false, GroupedLinearArgs>)));
  m.impl("grouped_linear_nf4_with_h", QLORA_BOX_ARGS((&linear_nf4<true, GroupedLinearArgs>)));
  m.impl("grouped_linear_nf4_dx", QLORA_BOX_ARGS((&linear_nf4_dx<false, GroupedLinearDxArgs>)));
  m.impl("grouped_linear_nf4_dx_with_g", QLORA_BOX_ARGS((&linear_nf4_dx<true, GroupedLinearDxArgs>)));
  m.impl("grouped_linear_nf4_dlora", QLORA_BOX_ARGS((&linear_nf4_dlora<GroupedLoraGradArgs>)));
}
