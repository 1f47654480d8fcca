// The checked arguments of the linear operators. Each call holds the plain problem, the tensors that own its data, and
// the output. CPU and CUDA differ only in who runs `problem`.
#pragma once

#include "cpp/ops/adapter_checks.h"
#include "cpp/ops/checks.h"

namespace qlora {

// Checks that packed holds `given` x `size` elements. `given` is the last dimension of x or dy, and `size` is the
// argument `named`.
inline void check_packed_fits(const Tensor& packed, const char* name, int64_t given, const char* given_is,
                              const char* named, int64_t size) {
  const int64_t bytes = packed_bytes(checks::area(named, given, size));
  if (packed.numel() != bytes) {
    checks::require(false, name, ": the last dimension (", given_is, ") is ", given, "; with ", named, " = ", size,
                    " this needs ", bytes, " packed bytes, got packed of shape ", checks::shape_text(packed));
  }
}

struct LinearCall {
  Tensor x, bias, y, h;
  checks::LoraOperands lora;
  LinearProblem problem;

  LinearCall(const LinearArgs& a, bool keeps_h) {
    problem.dtype = checks::compute_dtype("x", a.x);
    int64_t k = 0;
    problem.m = checks::rows_of("x", a.x, &k);
    checks::same_device("packed", a.w.packed, "x", a.x);
    check_packed_fits(a.w.packed, "x", k, "in_features", "out_features", a.out_features);
    problem.w = checks::weight(a.w, a.out_features, k);
    if (a.bias) {
      checks::require(a.bias->dim() == 1 && a.bias->size(0) == a.out_features, "bias: expected shape [", a.out_features,
                      "] (out_features), got ", checks::shape_text(*a.bias));
      problem.bias = checks::operand("bias", *a.bias, "x", a.x, &bias);
    }
    lora = checks::lora(a.lora_a, a.lora_b, a.out_features, k, a.lora, "x", a.x, problem.m);
    checks::adapters(a.adapters, a.lora, problem.m, k, "x", a.x, &lora);
    problem.lora = lora.lora;
    problem.x = checks::operand("x", a.x, "x", a.x, &x);
    y = empty(a.x, checks::with_last(a.x, "out_features", a.out_features), a.x.scalar_type());
    problem.y = y.mutable_data_ptr();
    if (keeps_h) problem.h = checks::kept_low_rank(a.x, a.lora_a, problem.lora, is_empty(), &h);
  }

  // An empty call has nothing to compute, even if the other sizes of an empty x are large.
  bool is_empty() const { return problem.m == 0 || problem.w.n == 0; }
};

struct LinearDxCall {
  Tensor dy, dx, g;
  checks::LoraOperands lora;
  LinearDxProblem problem;

  LinearDxCall(const LinearDxArgs& a, bool keeps_g) {
    problem.dtype = checks::compute_dtype("dy", a.dy);
    int64_t n = 0;
    problem.m = checks::rows_of("dy", a.dy, &n);
    checks::same_device("packed", a.w.packed, "dy", a.dy);
    check_packed_fits(a.w.packed, "dy", n, "out_features", "in_features", a.in_features);
    problem.w = checks::weight(a.w, n, a.in_features);
    lora = checks::lora(a.lora_a, a.lora_b, n, a.in_features, a.lora, "dy", a.dy, problem.m);
    checks::adapters(a.adapters, a.lora, problem.m, a.in_features, "dy", a.dy, &lora);
    problem.lora = lora.lora;
    problem.dy = checks::operand("dy", a.dy, "dy", a.dy, &dy);
    dx = empty(a.dy, checks::with_last(a.dy, "in_features", a.in_features), a.dy.scalar_type());
    problem.dx = dx.mutable_data_ptr();
    if (keeps_g) problem.g = checks::kept_low_rank(a.dy, a.lora_a, problem.lora, is_empty(), &g);
  }

  bool is_empty() const { return problem.m == 0 || problem.w.k == 0; }
};

// The dense weight of an operator whose other operands are float32 and on the device of `like`.
inline DenseWeight dense_weight(const Tensor& weight, const char* like_name, const Tensor& like) {
  checks::has_dtype(like_name, like, ScalarType::Float);
  checks::same_device("weight", weight, like_name, like);
  const ScalarType dtype = weight.scalar_type();
  checks::require(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "weight: expected bfloat16 or float16, got ", checks::dtype_text(dtype));
  checks::require(weight.dim() == 2, "weight: expected shape [out_features, in_features], got ",
                  checks::shape_text(weight));
  checks::is_contiguous("weight", weight);
  checks::numel("weight", weight);
  return {checks::float_dtype("weight", dtype), weight.const_data_ptr(), weight.size(0), weight.size(1)};
}

struct DenseLinearCall {
  Tensor x, bias, y;
  DenseLinearProblem problem;

  DenseLinearCall(const Tensor& x_arg, const Tensor& weight, const OptionalTensor& bias_arg) {
    problem.w = dense_weight(weight, "x", x_arg);
    int64_t k = 0;
    problem.m = checks::rows_of("x", x_arg, &k);
    checks::require(k == problem.w.k, "x: expected ", problem.w.k, " as the last dimension (in_features), got shape ",
                    checks::shape_text(x_arg));
    if (bias_arg) {
      checks::require(bias_arg->dim() == 1 && bias_arg->size(0) == problem.w.n, "bias: expected shape [", problem.w.n,
                      "] (out_features), got ", checks::shape_text(*bias_arg));
      problem.bias = static_cast<const float*>(checks::operand("bias", *bias_arg, "x", x_arg, &bias));
    }
    problem.x = static_cast<const float*>(checks::operand("x", x_arg, "x", x_arg, &x));
    y = empty(x_arg, checks::with_last(x_arg, "weight", problem.w.n), ScalarType::Float);
    problem.y = y.mutable_data_ptr<float>();
  }

  bool is_empty() const { return problem.m == 0 || problem.w.n == 0; }
};

struct DenseLinearDxCall {
  Tensor dy, dx;
  DenseLinearDxProblem problem;

  DenseLinearDxCall(const Tensor& dy_arg, const Tensor& weight) {
    problem.w = dense_weight(weight, "dy", dy_arg);
    int64_t n = 0;
    problem.m = checks::rows_of("dy", dy_arg, &n);
    checks::require(n == problem.w.n, "dy: expected ", problem.w.n, " as the last dimension (out_features), got shape ",
                    checks::shape_text(dy_arg));
    problem.dy = static_cast<const float*>(checks::operand("dy", dy_arg, "dy", dy_arg, &dy));
    dx = empty(dy_arg, checks::with_last(dy_arg, "weight", problem.w.k), ScalarType::Float);
    problem.dx = dx.mutable_data_ptr<float>();
  }

  bool is_empty() const { return problem.m == 0 || problem.w.k == 0; }
};

struct LoraGradCall {
  Tensor x, dy, h, g, da, db;
  checks::LoraOperands lora;
  LoraGradProblem problem;

  explicit LoraGradCall(const LoraGradArgs& a) {
    problem.dtype = checks::compute_dtype("x", a.x);
    problem.m = checks::rows_of("x", a.x, &problem.k);
    const int64_t dy_rows = checks::rows_of("dy", a.dy, &problem.n);
    if (dy_rows != problem.m) {
      checks::require(false, "dy: expected the leading dimensions of x ", checks::shape_text(a.x), ", got shape ",
                      checks::shape_text(a.dy));
    }
    checks::is_given("lora_a", a.lora_a);
    checks::is_given("lora_b", a.lora_b);
    lora = checks::lora(a.lora_a, a.lora_b, problem.n, problem.k, a.lora, "x", a.x, problem.m);
    checks::adapters(a.adapters, a.lora, problem.m, problem.k, "x", a.x, &lora);
    problem.lora = lora.lora;
    problem.x = checks::operand("x", a.x, "x", a.x, &x);
    problem.dy = checks::operand("dy", a.dy, "x", a.x, &dy);
    problem.h = checks::given_low_rank("h", a.h, problem.lora.rank, a.x, problem.m, &h);
    problem.g = checks::given_low_rank("g", a.g, problem.lora.rank, a.x, problem.m, &g);
    da = empty(a.x, {a.lora_a.size(0), problem.k}, a.x.scalar_type());
    db = empty(a.x, {problem.n, a.lora_a.size(0)}, a.x.scalar_type());
    problem.da = da.mutable_data_ptr();
    problem.db = db.mutable_data_ptr();
  }

  bool is_empty() const { return da.size(0) == 0 || (problem.n == 0 && problem.k == 0); }
};

}  // namespace qlora
