// The linear operators' checked arguments: each call holds the plain problem, the tensors that own its data, and the
// output. CPU and CUDA differ only in who runs `problem`.
#pragma once

#include "cpp/ops/checks.h"

namespace qlora {

// packed holds rows x cols elements, of which `given` (x's or dy's last dimension) and `named` (an argument) are sizes.
inline void check_packed_fits(const Tensor& packed, const char* name, int64_t given, const char* given_is,
                              const char* named, int64_t size) {
  const int64_t bytes = packed_bytes(checks::area(named, given, size));
  if (packed.numel() != bytes) {
    checks::require(false, name, ": its last dimension (", given_is, ") is ", given, ", which with ", named, " = ",
                    size, " needs ", bytes, " packed bytes, got packed ", checks::shape_text(packed));
  }
}

struct LinearCall {
  Tensor x, bias, y, h;
  checks::LoraArgs lora;
  LinearProblem problem;

  LinearCall(const Tensor& x_arg, const checks::PackedArgs& packed, int64_t out_features,
             const OptionalTensor& bias_arg, const OptionalTensor& lora_a, const OptionalTensor& lora_b, double scaling,
             double dropout_p, int64_t seed, const OptionalTensor& seed_tensor, bool keeps_h) {
    problem.dtype = checks::compute_dtype("x", x_arg);
    int64_t k = 0;
    problem.m = checks::rows_of("x", x_arg, &k);
    checks::same_device("packed", packed.packed, "x", x_arg);
    check_packed_fits(packed.packed, "x", k, "in_features", "out_features", out_features);
    problem.w = checks::weight(packed, out_features, k);
    if (bias_arg) {
      checks::require(bias_arg->dim() == 1 && bias_arg->size(0) == out_features, "bias: expected shape [", out_features,
                      "] (out_features), got ", checks::shape_text(*bias_arg));
      problem.bias = checks::operand("bias", *bias_arg, "x", x_arg, &bias);
    }
    lora = checks::lora(lora_a, lora_b, out_features, k, scaling, dropout_p, seed, seed_tensor, "x", x_arg, problem.m);
    problem.lora = lora.lora;
    problem.x = checks::operand("x", x_arg, "x", x_arg, &x);
    y = empty(x_arg, checks::with_last(x_arg, "out_features", out_features), x_arg.scalar_type());
    problem.y = y.mutable_data_ptr();
    if (keeps_h) problem.h = checks::kept_low_rank(x_arg, lora_a, problem.lora.rank, is_empty(), &h);
  }

  // Nothing to compute, however large the other sizes of an empty x are.
  bool is_empty() const { return problem.m == 0 || problem.w.n == 0; }
};

struct LinearDxCall {
  Tensor dy, dx, g;
  checks::LoraArgs lora;
  LinearDxProblem problem;

  LinearDxCall(const Tensor& dy_arg, const checks::PackedArgs& packed, int64_t in_features,
               const OptionalTensor& lora_a, const OptionalTensor& lora_b, double scaling, double dropout_p,
               int64_t seed, const OptionalTensor& seed_tensor, bool keeps_g) {
    problem.dtype = checks::compute_dtype("dy", dy_arg);
    int64_t n = 0;
    problem.m = checks::rows_of("dy", dy_arg, &n);
    checks::same_device("packed", packed.packed, "dy", dy_arg);
    check_packed_fits(packed.packed, "dy", n, "out_features", "in_features", in_features);
    problem.w = checks::weight(packed, n, in_features);
    lora = checks::lora(lora_a, lora_b, n, in_features, scaling, dropout_p, seed, seed_tensor, "dy", dy_arg, problem.m);
    problem.lora = lora.lora;
    problem.dy = checks::operand("dy", dy_arg, "dy", dy_arg, &dy);
    dx = empty(dy_arg, checks::with_last(dy_arg, "in_features", in_features), dy_arg.scalar_type());
    problem.dx = dx.mutable_data_ptr();
    if (keeps_g) problem.g = checks::kept_low_rank(dy_arg, lora_a, problem.lora.rank, is_empty(), &g);
  }

  bool is_empty() const { return problem.m == 0 || problem.w.k == 0; }
};

struct LoraGradCall {
  Tensor x, dy, h, g, da, db;
  checks::LoraArgs lora;
  LoraGradProblem problem;

  LoraGradCall(const Tensor& dy_arg, const Tensor& x_arg, const Tensor& lora_a, const Tensor& lora_b, double scaling,
               double dropout_p, int64_t seed, const OptionalTensor& seed_tensor, const OptionalTensor& h_arg,
               const OptionalTensor& g_arg) {
    problem.dtype = checks::compute_dtype("x", x_arg);
    problem.m = checks::rows_of("x", x_arg, &problem.k);
    const int64_t dy_rows = checks::rows_of("dy", dy_arg, &problem.n);
    if (dy_rows != problem.m) {
      checks::require(false, "dy: expected the leading dimensions of x ", checks::shape_text(x_arg), ", got shape ",
                      checks::shape_text(dy_arg));
    }
    checks::is_given("lora_a", lora_a);
    checks::is_given("lora_b", lora_b);
    lora = checks::lora(lora_a, lora_b, problem.n, problem.k, scaling, dropout_p, seed, seed_tensor, "x", x_arg,
                        problem.m);
    problem.lora = lora.lora;
    problem.x = checks::operand("x", x_arg, "x", x_arg, &x);
    problem.dy = checks::operand("dy", dy_arg, "x", x_arg, &dy);
    problem.h = checks::given_low_rank("h", h_arg, problem.lora.rank, x_arg, problem.m, &h);
    problem.g = checks::given_low_rank("g", g_arg, problem.lora.rank, x_arg, problem.m, &g);
    da = empty(x_arg, {problem.lora.rank, problem.k}, x_arg.scalar_type());
    db = empty(x_arg, {problem.n, problem.lora.rank}, x_arg.scalar_type());
    problem.da = da.mutable_data_ptr();
    problem.db = db.mutable_data_ptr();
  }

  bool is_empty() const { return problem.lora.rank == 0 || (problem.n == 0 && problem.k == 0); }
};

}  // namespace qlora
