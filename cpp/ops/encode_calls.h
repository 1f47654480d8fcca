// The checked arguments of the operators that search scales, and of those that encode under given scales. Each call
// holds the plain views, the tensors that own their data, and the output.
#pragma once

#include "cpp/ops/checks.h"

namespace qlora {

// w [..., K] of any shape.
struct SearchAbsmaxCall {
  Code code;
  DType dtype;
  Tensor w, importance, absmax;
  int64_t numel, k;

  SearchAbsmaxCall(const Tensor& w_arg, const Tensor& importance_arg, int64_t block_size, const CodeName& name) {
    code = checks::code_of_4_bits(name);
    dtype = checks::storage_dtype("w", w_arg.scalar_type());
    checks::block_size("block_size", block_size);
    checks::rows_of("w", w_arg, &k);
    numel = w_arg.numel();
    checks::same_device("importance", importance_arg, "w", w_arg);
    checks::has_dtype("importance", importance_arg, ScalarType::Float);
    checks::has_shape("importance", importance_arg, {k}, "the last dimension of w");
    w = w_arg.is_contiguous() ? w_arg : stable::contiguous(w_arg);
    importance = importance_arg.is_contiguous() ? importance_arg : stable::contiguous(importance_arg);
    absmax = empty(w_arg, {ceil_div(numel, block_size)}, ScalarType::Float);
  }
};

// w of any shape; with feedback [N, K].
struct EncodeCall {
  Code code;
  DType dtype;
  Tensor w, absmax, feedback, order, packed;
  int64_t numel, n = 0, k = 0;

  EncodeCall(const Tensor& w_arg, const Tensor& absmax_arg, int64_t block_size, const OptionalTensor& feedback_arg,
             const OptionalTensor& order_arg, const CodeName& name) {
    code = checks::code_of_4_bits(name);
    dtype = checks::storage_dtype("w", w_arg.scalar_type());
    checks::block_size("block_size", block_size);
    numel = checks::numel("w", w_arg);
    checks::same_device("absmax", absmax_arg, "w", w_arg);
    checks::has_dtype("absmax", absmax_arg, ScalarType::Float);
    checks::has_numel("absmax", absmax_arg, ceil_div(numel, block_size), "one per block");
    checks::require(order_arg.has_value() || !feedback_arg, "order: expected with feedback, got None");
    checks::require(feedback_arg.has_value() || !order_arg, "feedback: expected with order, got None");
    if (feedback_arg) {
      checks::require(w_arg.dim() == 2, "w: expected shape [N, K] with feedback, got ", checks::shape_text(w_arg));
      n = w_arg.size(0), k = w_arg.size(1);
      checks::same_device("feedback", *feedback_arg, "w", w_arg);
      checks::has_dtype("feedback", *feedback_arg, ScalarType::Float);
      checks::has_shape("feedback", *feedback_arg, {k, k}, "K, K");
      checks::same_device("order", *order_arg, "w", w_arg);
      checks::has_dtype("order", *order_arg, ScalarType::Long);
      checks::has_shape("order", *order_arg, {k}, "K");
      feedback = feedback_arg->is_contiguous() ? *feedback_arg : stable::contiguous(*feedback_arg);
      order = order_arg->is_contiguous() ? *order_arg : stable::contiguous(*order_arg);
    }
    w = w_arg.is_contiguous() ? w_arg : stable::contiguous(w_arg);
    absmax = absmax_arg.is_contiguous() ? absmax_arg : stable::contiguous(absmax_arg);
    packed = empty(w_arg, checks::packed_shape(w_arg), ScalarType::Byte);
  }
};

}  // namespace qlora
