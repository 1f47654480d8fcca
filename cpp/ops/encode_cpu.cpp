// The operators that search scales, those that encode under given scales, and the one that merges an adapter, on the
// CPU.
#include <vector>

#include "cpp/cpu/check.h"
#include "cpp/cpu/kernels.h"
#include "cpp/ops/codec_calls.h"
#include "cpp/ops/encode_calls.h"
#include "cpp/ops/pool.h"
#include "cpp/ops/value_error.h"

namespace qlora {
namespace {

// With a negative importance the search would look for the scale with the largest error. The CUDA operator does not
// read the values, because that would synchronize; Feedback (calibration/weighted_encoding.py) checks them.
void check_importance(const SearchAbsmaxCall& call) {
  const auto* const importance = call.importance.const_data_ptr<float>();
  for (int64_t column = 0; column < call.k; ++column) {
    const float value = importance[column];
    checks::require(value >= 0.0f && value <= std::numeric_limits<float>::max(),
                    "importance: expected finite values of 0 or more, got ", value, " at ", column);
  }
}

Tensor search_absmax_nf4(const Tensor& w, const Tensor& importance, int64_t block_size, const CodeName& code) {
  const SearchAbsmaxCall call(w, importance, block_size, code);
  check_importance(call);
  cpu::check(cpu::search_absmax_nf4(pool(), call.code, call.dtype, call.w.const_data_ptr(),
                                    call.importance.const_data_ptr<float>(), call.numel, call.k, block_size,
                                    call.absmax.mutable_data_ptr<float>()));
  return call.absmax;
}

// `order` has to name each column once, and the diagonal of `feedback` has to be positive.
void check_feedback(const EncodeCall& call) {
  const auto* const order = call.order.const_data_ptr<int64_t>();
  const auto* const feedback = call.feedback.const_data_ptr<float>();
  std::vector<bool> seen(static_cast<size_t>(call.k));
  for (int64_t place = 0; place < call.k; ++place) {
    const int64_t column = order[place];
    checks::require(column >= 0 && column < call.k && !seen[column], "order: expected each column from 0 to ",
                    call.k - 1, " once, got ", column, " at ", place);
    seen[column] = true;
    const float factor = feedback[place * call.k + place];
    checks::require(factor > 0.0f && factor <= std::numeric_limits<float>::max(),
                    "feedback: expected a positive diagonal, got ", factor, " at ", place);
  }
}

Tensor encode_nf4(const Tensor& w, const Tensor& absmax, int64_t block_size, OptionalTensor feedback,
                  OptionalTensor order, const CodeName& code) {
  const EncodeCall call(w, absmax, block_size, feedback, order, code);
  auto* const packed = call.packed.mutable_data_ptr<uint8_t>();
  const auto* const scales = call.absmax.const_data_ptr<float>();
  if (!feedback) {
    cpu::check(cpu::encode_nf4(pool(), call.code, call.dtype, call.w.const_data_ptr(), scales, call.numel, block_size,
                               packed));
    return call.packed;
  }
  check_feedback(call);
  cpu::check(cpu::encode_nf4_with_feedback(pool(), call.code, call.dtype, call.w.const_data_ptr(), scales, call.n,
                                           call.k, block_size, call.feedback.const_data_ptr<float>(),
                                           call.order.const_data_ptr<int64_t>(), packed));
  return call.packed;
}

Tensor encode_nf4_stochastic(const Tensor& w, const Tensor& absmax, int64_t block_size, int64_t seed,
                             const CodeName& code) {
  const EncodeCall call(w, absmax, block_size, std::nullopt, std::nullopt, code);
  cpu::check(cpu::encode_nf4_stochastic(pool(), call.code, call.dtype, call.w.const_data_ptr(),
                                        call.absmax.const_data_ptr<float>(), call.numel, block_size,
                                        static_cast<uint64_t>(seed), call.packed.mutable_data_ptr<uint8_t>()));
  return call.packed;
}

Tensor merge_lora_nf4(MergeArgs args) {
  const MergeCall call(args);
  cpu::check(cpu::merge_lora_nf4(pool(), call.problem));
  return call.merged;
}

}  // namespace
}  // namespace qlora

STABLE_TORCH_LIBRARY_IMPL(qlora, CPU, m) {
  m.impl("search_absmax_nf4", QLORA_BOX(&qlora::search_absmax_nf4));
  m.impl("encode_nf4", QLORA_BOX(&qlora::encode_nf4));
  m.impl("encode_nf4_stochastic", QLORA_BOX(&qlora::encode_nf4_stochastic));
  m.impl("merge_lora_nf4", QLORA_BOX_ARGS(&qlora::merge_lora_nf4));
}
