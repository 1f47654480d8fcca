// The operators over experts on the CPU: each expert's rows are a separate problem.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <tuple>
#include <vector>

#include "cpp/cpu/check.h"
#include "cpp/cpu/kernels.h"
#include "cpp/ops/grouped_calls.h"
#include "cpp/ops/pool.h"
#include "cpp/ops/value_error.h"

namespace qlora {
namespace {

// An expert and its rows [begin, end).
struct Part {
  int64_t expert, begin, end;
};

std::vector<Part> parts(const int64_t* offsets, int64_t experts, int64_t rows) {
  std::vector<Part> found;
  int64_t begin = 0;
  for (int64_t e = 0; e < experts; begin = offsets[e++]) {
    checks::require(begin <= offsets[e] && offsets[e] <= rows, "offsets: expected ascending row numbers up to ", rows,
                    ", got ", offsets[e], " for expert ", e);
    found.push_back({e, begin, offsets[e]});
  }
  return found;
}

const void* at(const void* p, int64_t bytes) { return p ? static_cast<const char*>(p) + bytes : nullptr; }
void* at(void* p, int64_t bytes) { return p ? static_cast<char*>(p) + bytes : nullptr; }

Weight weight_of(Weight w, int64_t expert) {
  const WeightStride stride = weight_stride(w);
  w.packed += expert * stride.packed_bytes;
  w.scales = expert_scales(w.scales, stride, expert);
  return w;
}

// The adapters of an expert's rows. Problems point into it.
struct ExpertAdapters {
  std::vector<Lora> each;
  Adapters adapters;
};
using AdaptersOfExperts = std::deque<ExpertAdapters>;  // never moves its elements

// The rank of lora_a and lora_b.
int64_t stack_rank(const Lora& lora) { return lora.adapters ? lora.adapters->stack_rank : lora.rank; }

// The LoRA of one expert, whose adapters are added to `owner`. `bytes` is the size of an element. Dropout is numbered
// by the elements of x [.., k].
Lora lora_of(const Lora& stack, const Part& part, int64_t n, int64_t k, int64_t bytes, AdaptersOfExperts* owner) {
  const auto of_expert = [&](Lora lora) {
    lora.a = at(lora.a, part.expert * stack_rank(stack) * k * bytes);
    lora.b = at(lora.b, part.expert * n * stack_rank(stack) * bytes);
    lora.dropout.first = part.begin * k;
    return lora;
  };
  Lora lora = of_expert(stack);
  if (!stack.adapters) return lora;
  ExpertAdapters& own = owner->emplace_back();
  own.adapters = *stack.adapters;
  for (int64_t i = 0; i < own.adapters.count; ++i) own.each.push_back(of_expert(stack.adapters->each[i]));
  own.adapters.each = own.each.data();
  own.adapters.of_token += part.begin;
  lora.adapters = &own.adapters;
  return lora;
}

LinearProblem problem_of(const LinearProblem& stack, const Part& part, AdaptersOfExperts* owner) {
  const int64_t n = stack.w.n, k = stack.w.k, bytes = dtype_bytes(stack.dtype);
  LinearProblem p = stack;
  p.m = part.end - part.begin;
  p.x = at(stack.x, part.begin * k * bytes);
  p.w = weight_of(stack.w, part.expert);
  p.bias = at(stack.bias, part.expert * n * bytes);
  p.lora = lora_of(stack.lora, part, n, k, bytes, owner);
  p.y = at(stack.y, part.begin * n * bytes);
  p.h = at(stack.h, part.begin * p.lora.rank * bytes);
  return p;
}

LinearDxProblem problem_of(const LinearDxProblem& stack, const Part& part, AdaptersOfExperts* owner) {
  const int64_t n = stack.w.n, k = stack.w.k, bytes = dtype_bytes(stack.dtype);
  LinearDxProblem p = stack;
  p.m = part.end - part.begin;
  p.dy = at(stack.dy, part.begin * n * bytes);
  p.w = weight_of(stack.w, part.expert);
  p.lora = lora_of(stack.lora, part, n, k, bytes, owner);
  p.dx = at(stack.dx, part.begin * k * bytes);
  p.g = at(stack.g, part.begin * p.lora.rank * bytes);
  return p;
}

LoraGradProblem problem_of(const LoraGradProblem& stack, const Part& part, AdaptersOfExperts* owner) {
  const int64_t n = stack.n, k = stack.k, r = stack.lora.rank, bytes = dtype_bytes(stack.dtype);
  LoraGradProblem p = stack;
  p.m = part.end - part.begin;
  p.x = at(stack.x, part.begin * k * bytes);
  p.dy = at(stack.dy, part.begin * n * bytes);
  p.lora = lora_of(stack.lora, part, n, k, bytes, owner);
  p.h = at(stack.h, part.begin * r * bytes);
  p.g = at(stack.g, part.begin * r * bytes);
  p.da = at(stack.da, part.expert * stack_rank(stack.lora) * k * bytes);
  p.db = at(stack.db, part.expert * n * stack_rank(stack.lora) * bytes);
  return p;
}

constexpr cpu::Pool kOneThread{[](int64_t count, int64_t, cpu::Pool::Body body, void* context) {
                                 body(context, 0, count);
                                 return true;
                               },
                               1};

// An expert with more rows than a thread's share runs on all threads. The others run on one thread each, if there are
// as many of them as threads.
template <class Problem>
void run(const std::vector<Part>& parts, const Problem& stack, cpu::Error (*kernel)(const cpu::Pool&, const Problem&)) {
  const cpu::Pool threads = pool();
  AdaptersOfExperts owner;
  std::vector<Problem> large, small;
  for (const Part& part : parts)
    ((part.end - part.begin) * threads.threads > stack.m ? large : small).push_back(problem_of(stack, part, &owner));
  if (static_cast<int>(small.size()) < threads.threads) {
    large.insert(large.end(), small.begin(), small.end());
    small.clear();
  }
  for (const Problem& p : large) cpu::check(kernel(threads, p));
  if (small.empty()) return;
  std::atomic<size_t> next{0};
  auto body = [&](int64_t, int64_t) {
    for (size_t i; (i = next++) < small.size();) cpu::check(kernel(kOneThread, small[i]));
  };
  stable::parallel_for(0, threads.threads, 1, body);
}

// Writes zeros to the rows of an output that belong to no expert. The output may be null.
void clear_unassigned_rows(const std::vector<Part>& parts, void* out, int64_t m, int64_t row_bytes) {
  const int64_t end = parts.empty() ? 0 : parts.back().end;
  if (out && end < m) std::memset(at(out, end * row_bytes), 0, (m - end) * row_bytes);
}

std::vector<Part> with_rows(std::vector<Part> parts) {
  std::erase_if(parts, [](const Part& part) { return part.begin == part.end; });
  return parts;
}

// The dispatcher sends every kind of tensor here that has no kernel of its own, so unsupported kinds are rejected here.
void is_dense_on_cpu(const char* name, const Tensor& t) {
  if (!t.defined()) return;
  int32_t layout = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &layout));
  checks::require(layout == aoti_torch_layout_strided(), name, ": expected a dense tensor, got a sparse one");
  checks::require(t.is_cpu(), name, ": expected a tensor on the CPU, got ", checks::device_text(t));
}

template <class Args>
void are_dense_on_cpu(Args& args) {
  for_each_field(args, [](const auto& field) {
    using T = std::remove_reference_t<decltype(field.value)>;
    if constexpr (std::is_same_v<T, Tensor>) is_dense_on_cpu(field.name, field.value);
    if constexpr (std::is_same_v<T, OptionalTensor>) {
      if (field.value) is_dense_on_cpu(field.name, *field.value);
    }
  });
}

template <bool kWithH>
auto grouped_linear_nf4(GroupedLinearArgs args) {
  are_dense_on_cpu(args);
  const GroupedLinearCall call(args, kWithH);
  const auto& [p, ends, experts] = call.problem;
  const std::vector<Part> all = parts(ends, experts, p.m);
  if (!call.is_empty()) {
    clear_unassigned_rows(all, p.y, p.m, p.w.n * dtype_bytes(p.dtype));
    clear_unassigned_rows(all, p.h, p.m, p.lora.rank * dtype_bytes(p.dtype));
    run(with_rows(all), p, cpu::linear_nf4);
  }
  return checks::results<kWithH>(call.y, call.h);
}

template <bool kWithG>
auto grouped_linear_nf4_dx(GroupedLinearDxArgs args) {
  are_dense_on_cpu(args);
  const GroupedLinearDxCall call(args, kWithG);
  const auto& [p, ends, experts] = call.problem;
  const std::vector<Part> all = parts(ends, experts, p.m);
  if (!call.is_empty()) {
    clear_unassigned_rows(all, p.dx, p.m, p.w.k * dtype_bytes(p.dtype));
    clear_unassigned_rows(all, p.g, p.m, p.lora.rank * dtype_bytes(p.dtype));
    run(with_rows(all), p, cpu::linear_nf4_dx);
  }
  return checks::results<kWithG>(call.dx, call.g);
}

std::tuple<Tensor, Tensor> grouped_linear_nf4_dlora(GroupedLoraGradArgs args) {
  are_dense_on_cpu(args);
  const GroupedLoraGradCall call(args);
  const auto& [p, ends, experts] = call.problem;
  const std::vector<Part> all = parts(ends, experts, p.m);
  if (!call.is_empty()) run(all, p, cpu::linear_nf4_dlora);  // sums over no rows are zeros
  return {call.da, call.db};
}

}  // namespace
}  // namespace qlora

// Registered for every kind of tensor except CUDA's, so that the checks report unsupported ones.
STABLE_TORCH_LIBRARY_IMPL(qlora, CompositeExplicitAutograd, m) {
  m.impl("grouped_linear_nf4", QLORA_BOX_ARGS(&qlora::grouped_linear_nf4<false>));
  m.impl("grouped_linear_nf4_with_h", QLORA_BOX_ARGS(&qlora::grouped_linear_nf4<true>));
  m.impl("grouped_linear_nf4_dx", QLORA_BOX_ARGS(&qlora::grouped_linear_nf4_dx<false>));
  m.impl("grouped_linear_nf4_dx_with_g", QLORA_BOX_ARGS(&qlora::grouped_linear_nf4_dx<true>));
  m.impl("grouped_linear_nf4_dlora", QLORA_BOX_ARGS(&qlora::grouped_linear_nf4_dlora));
}
