// The checked arguments of the operators over experts, like cpp/ops/calls.h for a single weight. The values of the
// offsets are not checked here: the CPU kernels check them, and on CUDA they stay on the device.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "cpp/format/grouped.h"
#include "cpp/ops/adapter_checks.h"
#include "cpp/ops/checks.h"

namespace qlora {
namespace checks {

inline constexpr int64_t kAnySize = -1;

// Sizes of `shape` may be kAnySize.
inline void has_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
  is_given(name, t);
  bool fits = t.dim() == static_cast<int64_t>(shape.size());
  std::string expected;
  int64_t i = 0;
  for (const int64_t size : shape) {
    fits = fits && (size == kAnySize || t.size(i) == size);
    expected += (i++ ? ", " : "") + (size == kAnySize ? "any" : std::to_string(size));
  }
  require(fits, name, ": expected shape [", expected, "], got ", shape_text(t));
}

// Checks that `t` has one slice per expert.
inline void is_stack(const char* name, const OptionalTensor& t, int64_t experts) {
  if (!t) return;
  is_given(name, *t);
  require(t->dim() > 0 && t->size(0) == experts, name, ": expected ", experts, " slices, one per expert, got shape ",
          shape_text(*t));
}

inline const int64_t* offsets(const Tensor& t, int64_t experts, const char* like_name, const Tensor& like,
                              Tensor* keep) {
  has_shape("offsets", t, {experts});
  require(t.scalar_type() == ScalarType::Long, "offsets: expected a dense int64 tensor, got ",
          dtype_text(t.scalar_type()));
  same_device("offsets", t, like_name, like);
  *keep = t.is_contiguous() ? t : stable::contiguous(t);
  return keep->const_data_ptr<int64_t>();
}

// Checks the experts' weights [n, k]. x or dy gives one of the sizes (`given`), and the argument `named` the other
// (`size`).
inline Weight stacked_weight(const PackedArgs& p, const char* named, int64_t size, int64_t given, int64_t n, int64_t k,
                             int64_t* experts) {
  is_given("packed", p.packed);
  is_given("absmax", p.absmax);
  require(size >= 0, named, ": expected 0 or more, got ", size);
  *experts = p.packed.dim() > 0 ? p.packed.size(0) : 0;
  const int64_t bytes = packed_bytes(area(named, given, size));
  int64_t all = 0;
  const bool wraps = multiply_overflows(*experts, bytes, &all);
  require(p.packed.dim() > 0 && !wraps && p.packed.numel() == all, "packed: expected a stack of weights, ", bytes,
          " bytes each (", named, " = ", size, " by ", given, "), got shape ", shape_text(p.packed));
  is_stack("absmax", p.absmax, *experts);
  is_stack("nested_absmax", p.nested_absmax, *experts);
  is_stack("nested_offset", p.nested_offset, *experts);
  is_stack("scale_table", p.scale_table, *experts);
  is_stack("block_offsets", p.offsets, *experts);
  is_stack("offset_scale", p.offset_scale, *experts);
  return weight(p, n, k, *experts);
}

// Like checks::lora, for all experts.
inline LoraOperands stacked_lora(const OptionalTensor& a, const OptionalTensor& b, int64_t experts, int64_t n,
                                 int64_t k, const LoraNumbers& numbers, const char* like_name, const Tensor& like) {
  LoraOperands out = lora({}, {}, n, k, numbers, like_name, like, 0);
  require(a.has_value() || !b, "lora_a: expected with lora_b, got None");
  require(b.has_value() || !a, "lora_b: expected with lora_a, got None");
  if (!a) return out;
  is_stack("lora_a", a, experts);
  has_shape("lora_a", *a, {experts, kAnySize, k});
  out.lora.rank = a->size(1);
  area("lora_a", out.lora.rank, std::max({like.size(0), n, k}));
  has_shape("lora_b", *b, {experts, n, out.lora.rank});
  out.lora.a = operand("lora_a", *a, like_name, like, &out.a);
  out.lora.b = operand("lora_b", *b, like_name, like, &out.b);
  return out;
}

// Like checks::adapters, for all experts. The adapters get their parts of the first expert's lora_a and lora_b.
inline void stacked_adapters(const AdapterArgs& args, const LoraNumbers& lora, int64_t m, int64_t k,
                             const char* like_name, const Tensor& like, LoraOperands* operands) {
  require(!args.of_row || like.is_cpu(), "adapter_of_row: several adapters of experts per call run on the CPU only, ",
          "got ", like_name, " on ", device_text(like));
  adapters(args, lora, m, k, like_name, like, operands);
}

}  // namespace checks

struct GroupedLinearCall {
  Tensor x, offsets, bias, y, h;
  checks::LoraOperands lora;
  Grouped<LinearProblem> problem;

  GroupedLinearCall(const GroupedLinearArgs& args, bool keeps_h) {
    LinearProblem& p = problem.stack;
    p.dtype = checks::compute_dtype("x", args.x);
    checks::has_shape("x", args.x, {checks::kAnySize, checks::kAnySize});
    int64_t k = 0;
    p.m = checks::rows_of("x", args.x, &k);
    p.w = checks::stacked_weight(args.w, "out_features", args.out_features, k, args.out_features, k, &problem.experts);
    checks::same_device("packed", args.w.packed, "x", args.x);
    problem.offsets = checks::offsets(args.offsets, problem.experts, "x", args.x, &offsets);
    if (args.bias) {
      checks::has_shape("bias", *args.bias, {problem.experts, args.out_features});
      p.bias = checks::operand("bias", *args.bias, "x", args.x, &bias);
    }
    lora =
        checks::stacked_lora(args.lora_a, args.lora_b, problem.experts, args.out_features, k, args.lora, "x", args.x);
    checks::stacked_adapters(args.adapters, args.lora, p.m, k, "x", args.x, &lora);
    p.lora = lora.lora;
    p.x = checks::operand("x", args.x, "x", args.x, &x);
    y = empty(args.x, checks::with_last(args.x, "out_features", args.out_features), args.x.scalar_type());
    p.y = y.mutable_data_ptr();
    if (keeps_h) p.h = checks::kept_low_rank(args.x, args.lora_a, p.lora, is_empty(), &h);
  }

  bool is_empty() const { return problem.stack.m == 0 || problem.stack.w.n == 0; }
};

struct GroupedLinearDxCall {
  Tensor dy, offsets, dx, g;
  checks::LoraOperands lora;
  Grouped<LinearDxProblem> problem;

  GroupedLinearDxCall(const GroupedLinearDxArgs& args, bool keeps_g) {
    LinearDxProblem& p = problem.stack;
    p.dtype = checks::compute_dtype("dy", args.dy);
    checks::has_shape("dy", args.dy, {checks::kAnySize, checks::kAnySize});
    int64_t n = 0;
    p.m = checks::rows_of("dy", args.dy, &n);
    p.w = checks::stacked_weight(args.w, "in_features", args.in_features, n, n, args.in_features, &problem.experts);
    checks::same_device("packed", args.w.packed, "dy", args.dy);
    problem.offsets = checks::offsets(args.offsets, problem.experts, "dy", args.dy, &offsets);
    lora =
        checks::stacked_lora(args.lora_a, args.lora_b, problem.experts, n, args.in_features, args.lora, "dy", args.dy);
    checks::stacked_adapters(args.adapters, args.lora, p.m, args.in_features, "dy", args.dy, &lora);
    p.lora = lora.lora;
    p.dy = checks::operand("dy", args.dy, "dy", args.dy, &dy);
    dx = empty(args.dy, checks::with_last(args.dy, "in_features", args.in_features), args.dy.scalar_type());
    p.dx = dx.mutable_data_ptr();
    if (keeps_g) p.g = checks::kept_low_rank(args.dy, args.lora_a, p.lora, is_empty(), &g);
  }

  bool is_empty() const { return problem.stack.m == 0 || problem.stack.w.k == 0; }
};

struct GroupedLoraGradCall {
  Tensor x, dy, offsets, h, g, da, db;
  checks::LoraOperands lora;
  Grouped<LoraGradProblem> problem;

  explicit GroupedLoraGradCall(const GroupedLoraGradArgs& args) {
    LoraGradProblem& p = problem.stack;
    p.dtype = checks::compute_dtype("x", args.x);
    checks::has_shape("x", args.x, {checks::kAnySize, checks::kAnySize});
    p.m = checks::rows_of("x", args.x, &p.k);
    checks::has_shape("dy", args.dy, {p.m, checks::kAnySize});
    checks::rows_of("dy", args.dy, &p.n);
    checks::is_given("lora_b", args.lora_b);
    checks::has_shape("lora_a", args.lora_a, {checks::kAnySize, checks::kAnySize, p.k});
    problem.experts = args.lora_a.size(0);
    lora = checks::stacked_lora(args.lora_a, args.lora_b, problem.experts, p.n, p.k, args.lora, "x", args.x);
    checks::stacked_adapters(args.adapters, args.lora, p.m, p.k, "x", args.x, &lora);
    problem.offsets = checks::offsets(args.offsets, problem.experts, "x", args.x, &offsets);
    p.lora = lora.lora;
    p.x = checks::operand("x", args.x, "x", args.x, &x);
    p.dy = checks::operand("dy", args.dy, "x", args.x, &dy);
    p.h = checks::given_low_rank("h", args.h, p.lora.rank, args.x, p.m, &h);
    p.g = checks::given_low_rank("g", args.g, p.lora.rank, args.x, p.m, &g);
    const int64_t rank = args.lora_a.size(1);  // of several adapters, the sum
    da = empty(args.x, {problem.experts, rank, p.k}, args.x.scalar_type());
    db = empty(args.x, {problem.experts, p.n, rank}, args.x.scalar_type());
    p.da = da.mutable_data_ptr();
    p.db = db.mutable_data_ptr();
  }

  bool is_empty() const { return da.numel() == 0 && db.numel() == 0; }
};

}  // namespace qlora
