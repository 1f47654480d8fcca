#include "cpp/ops/grouped_cpu.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <vector>

#include "cpp/cpu/check.h"
#include "cpp/ops/checks.h"
#include "cpp/ops/pool.h"

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
void run(const std::vector<Part>& parts, const Problem& stack, Kernel<Problem> kernel) {
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

// Writes zeros to the rows [begin, end) of an output, which may be null.
void clear_rows(void* out, int64_t begin, int64_t end, int64_t row_bytes) {
  if (out && begin < end) std::memset(at(out, begin * row_bytes), 0, (end - begin) * row_bytes);
}

// Writes zeros to the outputs' rows from `begin` on.
void clear_from(int64_t begin, const LinearProblem& p) {
  clear_rows(p.y, begin, p.m, p.w.n * dtype_bytes(p.dtype));
  clear_rows(p.h, begin, p.m, p.lora.rank * dtype_bytes(p.dtype));
}
void clear_from(int64_t begin, const LinearDxProblem& p) {
  clear_rows(p.dx, begin, p.m, p.w.k * dtype_bytes(p.dtype));
  clear_rows(p.g, begin, p.m, p.lora.rank * dtype_bytes(p.dtype));
}

}  // namespace

template <class Problem>
void run_experts(const Grouped<Problem>& problem, bool is_empty, Kernel<Problem> kernel) {
  std::vector<Part> all = parts(problem.offsets, problem.experts, problem.stack.m);
  if (is_empty) return;
  if constexpr (!std::is_same_v<Problem, LoraGradProblem>) {  // whose sums over no rows are zeros
    clear_from(all.empty() ? 0 : all.back().end, problem.stack);
    std::erase_if(all, [](const Part& part) { return part.begin == part.end; });
  }
  run(all, problem.stack, kernel);
}
template void run_experts(const Grouped<LinearProblem>&, bool, Kernel<LinearProblem>);
template void run_experts(const Grouped<LinearDxProblem>&, bool, Kernel<LinearDxProblem>);
template void run_experts(const Grouped<LoraGradProblem>&, bool, Kernel<LoraGradProblem>);

}  // namespace qlora
