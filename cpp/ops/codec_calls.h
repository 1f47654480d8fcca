// The checked arguments of the operators that quantize and dequantize. Each call holds the plain views, the tensors
// that own their data, and the output. CPU and CUDA differ only in who fills the output.
#pragma once

#include "cpp/ops/checks.h"

namespace qlora {

// w of any shape.
struct QuantizeCall {
  Code code;
  DType dtype;
  int64_t numel;
  Tensor w, packed, absmax;

  QuantizeCall(const Tensor& w_arg, int64_t block_size, const CodeName& name) {
    code = checks::code_of_4_bits(name);
    dtype = checks::storage_dtype("w", w_arg.scalar_type());
    checks::block_size("block_size", block_size);
    numel = checks::numel("w", w_arg);
    w = w_arg.is_contiguous() ? w_arg : stable::contiguous(w_arg);
    packed = empty(w_arg, checks::packed_shape(w_arg), ScalarType::Byte);
    absmax = empty(w_arg, {ceil_div(numel, block_size)}, ScalarType::Float);
  }
};

struct QuantizeAbsmaxCall {
  int64_t count;
  Tensor absmax, codes, nested_absmax, nested_offset;

  QuantizeAbsmaxCall(const Tensor& absmax_arg, int64_t nested_block_size) {
    checks::has_dtype("absmax", absmax_arg, ScalarType::Float);
    checks::nested_block_size(nested_block_size);
    count = checks::numel("absmax", absmax_arg);
    absmax = absmax_arg.is_contiguous() ? absmax_arg : stable::contiguous(absmax_arg);
    codes = empty(absmax_arg, {count}, ScalarType::Byte);
    nested_absmax = empty(absmax_arg, {ceil_div(count, nested_block_size)}, ScalarType::Float);
    nested_offset = empty(absmax_arg, std::vector<int64_t>{}, ScalarType::Float);
  }
};

struct DequantizeAbsmaxCall {
  Scales scales;
  int64_t count;
  Tensor absmax;

  DequantizeAbsmaxCall(const Tensor& codes, const Tensor& nested_absmax, const Tensor& nested_offset,
                       int64_t nested_block_size) {
    scales = checks::nested("codes", codes, nested_absmax, nested_offset, kMinBlockSize, nested_block_size);
    count = codes.numel();
    absmax = empty(codes, {count}, ScalarType::Float);
  }
};

// The weight is treated as a single row.
struct DequantizeCall {
  Weight w;
  DType dtype;
  Tensor out;

  explicit DequantizeCall(const DequantizeArgs& args) {
    dtype = checks::storage_dtype("dtype", args.dtype);
    w = checks::weight(args.w, 1, checks::shape_numel(args.shape));
    out = empty(args.w.packed, args.shape, args.dtype);
  }
};

// w [N, K]; lora_a [R, K] and lora_b [N, R] in float32.
struct MergeCall {
  MergeProblem problem;
  Tensor a, b, merged;

  explicit MergeCall(const MergeArgs& args) {
    for (const auto& [name, t] : {std::pair("lora_a", &args.lora_a), std::pair("lora_b", &args.lora_b)}) {
      checks::same_device(name, *t, "packed", args.w.packed);
      checks::has_dtype(name, *t, ScalarType::Float);
      checks::require(t->dim() == 2, name, ": expected a matrix, got shape ", checks::shape_text(*t));
    }
    problem.rank = args.lora_a.size(0);
    const int64_t n = args.lora_b.size(0), k = args.lora_a.size(1);
    checks::has_shape("lora_b", args.lora_b, {n, problem.rank}, "out_features, rank");
    for (const int64_t size : {n, k}) checks::area("lora_a", problem.rank, size);
    checks::scaling(args.scaling);
    checks::code_of_4_bits(args.w.code);
    problem.w = checks::weight(args.w, n, k);
    a = args.lora_a.is_contiguous() ? args.lora_a : stable::contiguous(args.lora_a);
    b = args.lora_b.is_contiguous() ? args.lora_b : stable::contiguous(args.lora_b);
    merged = empty(args.w.packed, checks::sizes_of(args.w.packed), ScalarType::Byte);
    problem.a = a.const_data_ptr<float>();
    problem.b = b.const_data_ptr<float>();
    problem.scaling = static_cast<float>(args.scaling);
    problem.seed = static_cast<uint64_t>(args.seed);
    problem.packed = merged.mutable_data_ptr<uint8_t>();
  }
};

}  // namespace qlora
