// linear_nf4 as code compiled by AOTInductor calls it: directly, without torch's dispatcher, which boxes every
// argument. At one token, boxing costs a small layer more than its product.
#include <cstdio>
#include <exception>

#include "cpp/cpu/check.h"
#include "cpp/cpu/kernels.h"
#include "cpp/ops/calls.h"
#include "cpp/ops/pool.h"

namespace qlora {
namespace {

// Another handle of the caller's tensor.
Tensor tensor_of(AtenTensorHandle borrowed) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(borrowed, &handle));
  return Tensor(handle);
}

OptionalTensor tensor_of(const AtenTensorHandle* borrowed) {
  return borrowed ? OptionalTensor(tensor_of(*borrowed)) : std::nullopt;
}

}  // namespace
}  // namespace qlora

// The name and the types of the arguments follow from the operator's schema by AOTInductor's rules.
extern "C" QLORA_EXPORT AOTITorchError aoti_torch_cpu_linear_nf4(
    AtenTensorHandle x, AtenTensorHandle packed, AtenTensorHandle absmax, const AtenTensorHandle* nested_absmax,
    const AtenTensorHandle* nested_offset, int64_t block_size, int64_t nested_block_size, int64_t out_features,
    const AtenTensorHandle* bias, const AtenTensorHandle* lora_a, const AtenTensorHandle* lora_b, double scaling,
    double dropout_p, int64_t seed, const AtenTensorHandle* seed_tensor, const char* code, AtenTensorHandle* y) {
  using namespace qlora;
  try {
    LinearArgs args;
    args.x = tensor_of(x);
    args.w = {tensor_of(packed), tensor_of(absmax), tensor_of(nested_absmax), tensor_of(nested_offset), block_size,
              nested_block_size, CodeName(code)};
    args.out_features = out_features;
    args.bias = tensor_of(bias), args.lora_a = tensor_of(lora_a), args.lora_b = tensor_of(lora_b);
    args.lora = {scaling, dropout_p, seed, tensor_of(seed_tensor)};
    const LinearCall call(args, false);
    if (!call.is_empty()) cpu::check(cpu::linear_nf4(pool(), call.problem));
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(call.y.get(), y));
    return AOTI_TORCH_SUCCESS;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "linear_nf4: %s\n", error.what());
    return AOTI_TORCH_FAILURE;
  }
}
