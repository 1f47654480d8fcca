// The checked arguments of the linear operators, over a single weight and over experts. Each call holds the plain
// problem, the tensors that own its data, and the output. CPU and CUDA differ only in who runs `problem`.
//
// The values of the offsets are not checked here: the CPU kernels check them, and on CUDA they stay on the device.
#pragma once

#include "cpp/format/grouped.h"
#include "cpp/ops/adapter_checks.h"
#include "cpp/ops/checks.h"

namespace qlora {

template <class Args, class Problem>
using ProblemOf = std::conditional_t<kOverExperts<Args>, Grouped<Problem>, Problem>;

namespace checks {

// Returns the number of experts of a call over experts, which is that of the slices of `stack`.
template <class Args>
Experts experts_of(const Args&, const char* name, const Tensor& stack) {
  is_given(name, stack);
  if constexpr (!kOverExperts<Args>) return {};
  return stack.dim() > 0 ? stack.size(0) : 0;
}

// Sets the experts and the offsets of `problem`, if it is one over experts.
template <class Args, class Problem>
void expert_offsets(const Args& args, Experts experts, const char* like_name, const Tensor& like, Problem* problem,
                    Tensor* keep) {
  if constexpr (kOverExperts<Args>) {
    const Tensor& t = args.offsets;
    has_shape("offsets", t, {*experts}, "experts");
    has_dtype("offsets", t, ScalarType::Long);
    same_device("offsets", t, like_name, like);
    *keep = t.is_contiguous() ? t : stable::contiguous(t);
    problem->offsets = keep->const_data_ptr<int64_t>();
    problem->experts = *experts;
  }
}

// Checks that packed holds `given` x `size` elements, over experts each. `given` is the last dimension of x or dy, and
// `size` is the argument `named`.
inline void packed_fits(const PackedArgs& w, const char* name, int64_t given, const char* given_is, const char* named,
                        int64_t size, Experts experts) {
  const Tensor& packed = w.packed;
  const int64_t bytes = packed_bytes(area(named, given, size), bits_of(code(w.code)));
  int64_t all = 0;
  const bool wraps = multiply_overflows(experts.value_or(1), bytes, &all);
  if (wraps || packed.numel() != all) {
    require(false, name, ": the last dimension (", given_is, ") is ", given, "; with ", named, " = ", size,
            " this needs ", bytes, " packed bytes", experts ? " per expert" : "", ", got packed of shape ",
            shape_text(packed));
  }
}

}  // namespace checks

template <class Args>
struct LinearCall {
  Tensor x, offsets, bias, y, h;
  checks::LoraOperands lora;
  ProblemOf<Args, LinearProblem> problem;

  LinearCall(const Args& a, bool keeps_h) {
    LinearProblem& p = stack_of(problem);
    p.dtype = checks::compute_dtype("x", a.x);
    p.activations = checks::activations(a.activations);
    const checks::Experts experts = checks::experts_of(a, "packed", a.w.packed);
    int64_t k = 0;
    p.m = checks::rows_of("x", a.x, &k, experts);
    checks::same_device("packed", a.w.packed, "x", a.x);
    checks::packed_fits(a.w, "x", k, "in_features", "out_features", a.out_features, experts);
    p.w = checks::weight(a.w, a.out_features, k, experts);
    checks::expert_offsets(a, experts, "x", a.x, &problem, &offsets);
    if (a.bias) {
      checks::has_shape("bias", *a.bias, {a.out_features}, "out_features", experts);
      p.bias = checks::operand("bias", *a.bias, "x", a.x, &bias);
    }
    lora = checks::lora(a.lora_a, a.lora_b, a.out_features, k, a.lora, "x", a.x, p.m, experts);
    checks::adapters(a.adapters, a.lora, p.m, k, "x", a.x, experts, &lora);
    p.lora = lora.lora;
    p.x = checks::operand("x", a.x, "x", a.x, &x);
    y = empty(a.x, checks::with_last(a.x, "out_features", a.out_features), a.x.scalar_type());
    p.y = y.mutable_data_ptr();
    if (keeps_h) p.h = checks::kept_low_rank(a.x, a.lora_a, p.lora, is_empty(), &h);
  }

  // An empty call has nothing to compute, even if the other sizes of an empty x are large.
  bool is_empty() const { return stack_of(problem).m == 0 || stack_of(problem).w.n == 0; }
};

template <class Args>
struct LinearDxCall {
  Tensor dy, offsets, dx, g;
  checks::LoraOperands lora;
  ProblemOf<Args, LinearDxProblem> problem;

  LinearDxCall(const Args& a, bool keeps_g) {
    LinearDxProblem& p = stack_of(problem);
    p.dtype = checks::compute_dtype("dy", a.dy);
    p.activations = checks::activations(a.activations);
    const checks::Experts experts = checks::experts_of(a, "packed", a.w.packed);
    int64_t n = 0;
    p.m = checks::rows_of("dy", a.dy, &n, experts);
    checks::same_device("packed", a.w.packed, "dy", a.dy);
    checks::packed_fits(a.w, "dy", n, "out_features", "in_features", a.in_features, experts);
    p.w = checks::weight(a.w, n, a.in_features, experts);
    checks::expert_offsets(a, experts, "dy", a.dy, &problem, &offsets);
    lora = checks::lora(a.lora_a, a.lora_b, n, a.in_features, a.lora, "dy", a.dy, p.m, experts);
    checks::adapters(a.adapters, a.lora, p.m, a.in_features, "dy", a.dy, experts, &lora);
    p.lora = lora.lora;
    p.dy = checks::operand("dy", a.dy, "dy", a.dy, &dy);
    dx = empty(a.dy, checks::with_last(a.dy, "in_features", a.in_features), a.dy.scalar_type());
    p.dx = dx.mutable_data_ptr();
    if (keeps_g) p.g = checks::kept_low_rank(a.dy, a.lora_a, p.lora, is_empty(), &g);
  }

  bool is_empty() const { return stack_of(problem).m == 0 || stack_of(problem).w.k == 0; }
};

template <class Args>
struct LoraGradCall {
  Tensor x, dy, offsets, h, g, da, db;
  checks::LoraOperands lora;
  ProblemOf<Args, LoraGradProblem> problem;

  explicit LoraGradCall(const Args& a) {
    LoraGradProblem& p = stack_of(problem);
    p.dtype = checks::compute_dtype("x", a.x);
    const checks::Experts experts = checks::experts_of(a, "lora_a", a.lora_a);
    p.m = checks::rows_of("x", a.x, &p.k, experts);
    const int64_t dy_rows = checks::rows_of("dy", a.dy, &p.n, experts);
    if (dy_rows != p.m) {
      checks::require(false, "dy: expected the leading dimensions of x ", checks::shape_text(a.x), ", got shape ",
                      checks::shape_text(a.dy));
    }
    checks::is_given("lora_b", a.lora_b);
    lora = checks::lora(a.lora_a, a.lora_b, p.n, p.k, a.lora, "x", a.x, p.m, experts);
    checks::adapters(a.adapters, a.lora, p.m, p.k, "x", a.x, experts, &lora);
    checks::expert_offsets(a, experts, "x", a.x, &problem, &offsets);
    p.lora = lora.lora;
    p.x = checks::operand("x", a.x, "x", a.x, &x);
    p.dy = checks::operand("dy", a.dy, "x", a.x, &dy);
    p.h = checks::given_low_rank("h", a.h, p.lora.rank, a.x, p.m, &h);
    p.g = checks::given_low_rank("g", a.g, p.lora.rank, a.x, p.m, &g);
    da = empty(a.x, checks::sizes_of(a.lora_a), a.x.scalar_type());
    db = empty(a.x, checks::sizes_of(a.lora_b), a.x.scalar_type());
    p.da = da.mutable_data_ptr();
    p.db = db.mutable_data_ptr();
  }

  bool is_empty() const { return da.numel() == 0 && db.numel() == 0; }
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
      checks::has_shape("bias", *bias_arg, {problem.w.n}, "out_features");
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

}  // namespace qlora
