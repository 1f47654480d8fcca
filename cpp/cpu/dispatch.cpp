#include "cpp/cpu/dispatch.h"

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "cpp/cpu/adapters.h"
#include "cpp/format/print_kernels.h"

namespace qlora::cpu {
namespace {

const Kernels& table() {
  static const Kernels* const in_use = [] {
    for (const auto kernels : kTables)
      if (kernels().isa == &current_isa()) return &kernels();
    return &scalar_kernels();
  }();
  return *in_use;
}

const char* text(Outcome outcome) {
  constexpr const char* kTexts[] = {"done", "too large for its scratch", "out of its range"};
  return kTexts[static_cast<int>(outcome)];
}

// The kernel that QLORA_CPU_KERNEL asks for, or null. Read at the first call. If set then, read again at each call, for
// tests.
const Kernel* forced_kernel() {
  static const bool looks = std::getenv("QLORA_CPU_KERNEL");
  if (!looks) return nullptr;
  const char* const name = std::getenv("QLORA_CPU_KERNEL");
  if (!name || !*name) return nullptr;
  std::string names;
  for (const KernelInfo& info : kKernelInfo) {
    if (std::string(name) == info.name) return &info.kernel;
    names += (names.empty() ? "" : ", ") + std::string(info.name);
  }
  throw std::invalid_argument("QLORA_CPU_KERNEL: expected one of " + names + ", got " + name);
}

// Returns false if the problem has several adapters and needs a kernel that takes one.
template <class Problem>
bool run(const char* name, const KernelsFor<Problem>& kernels, const Pool& pool, const Problem& p) {
  Choice choice;
  const Kernel* const forced = forced_kernel();
  if (!forced) {
    choice = choose(p, current_cpu());
  } else if (kernels[*forced] && accepts(*forced, p)) {
    choice.add(*forced);
  } else {
    throw std::invalid_argument(std::string("QLORA_CPU_KERNEL: ") + kernel_name(*forced) + " of " + current_isa().name +
                                " does not take " + name + " of " + problem_text(p));
  }
  std::string tried;
  for (const Kernel kernel : choice) {
    if (p.lora.adapters && !takes_adapters(kernel)) return false;
    const Outcome outcome = kernels[kernel](pool, p);
    if (outcome == Outcome::kDone) {
      print_kernel(name, "cpu", p, [&] { return tried + kernel_name(kernel) + " isa=" + current_isa().name; });
      return true;
    }
    if (p.lora.adapters) return false;  // each adapter may have an outcome of its own
    tried += std::string(kernel_name(kernel)) + " (" + text(outcome) + "), ";
  }
  tried.resize(tried.size() - 2);
  throw std::invalid_argument(std::string("QLORA_CPU_KERNEL: ") + name + " of " + problem_text(p) +
                              " was not served by " + tried);
}

template <class Problem>
void run_linear(const char* name, const KernelsFor<Problem>& kernels, const Pool& pool, const Problem& p) {
  if (!run(name, kernels, pool, p)) run_per_adapter(p, [&](const Problem& one) { run(name, kernels, pool, one); });
}

Error failed(Error::Kind kind, const char* text) {
  static thread_local char kept[1024];
  std::snprintf(kept, sizeof kept, "%s", text);
  return {kind, kept};
}

template <class F>
Error guarded(const F& call) {
  try {
    call();
    return {};
  } catch (const std::invalid_argument& error) {
    return failed(Error::kInvalidArgument, error.what());
  } catch (const std::bad_alloc& error) {
    return failed(Error::kOutOfMemory, error.what());
  } catch (const std::exception& error) {
    return failed(Error::kOther, error.what());
  }
}

}  // namespace

void throw_of_pool(bool finished) {
  if (finished) throw std::bad_alloc();
  throw std::runtime_error("the thread pool has failed");
}

bool serves(Kernel kernel, const LinearProblem& p) { return table().forward[kernel] && accepts(kernel, p); }
bool serves(Kernel kernel, const LinearDxProblem& p) { return table().dx[kernel] && accepts(kernel, p); }
bool serves(Kernel kernel, const LoraGradProblem& p) { return table().dlora[kernel] && accepts(kernel, p); }

Error quantize_nf4(const Pool& pool, Code code, DType dtype, const void* w, int64_t numel, int64_t block_size,
                   uint8_t* packed, float* absmax) {
  return guarded([&] { table().codec->quantize_nf4(pool, code, dtype, w, numel, block_size, packed, absmax); });
}
Error search_absmax_nf4(const Pool& pool, Code code, DType dtype, const void* w, const float* importance, int64_t numel,
                        int64_t k, int64_t block_size, float* absmax) {
  return guarded(
      [&] { table().codec->search_absmax_nf4(pool, code, dtype, w, importance, numel, k, block_size, absmax); });
}
Error encode_nf4(const Pool& pool, Code code, DType dtype, const void* w, const float* absmax, int64_t numel,
                 int64_t block_size, uint8_t* packed) {
  return guarded([&] { table().codec->encode_nf4(pool, code, dtype, w, absmax, numel, block_size, packed); });
}
Error encode_nf4_with_feedback(const Pool& pool, Code code, DType dtype, const void* w, const float* absmax, int64_t n,
                               int64_t k, int64_t block_size, const float* feedback, const int64_t* order,
                               uint8_t* packed) {
  return guarded([&] {
    table().codec->encode_nf4_with_feedback(pool, code, dtype, w, absmax, n, k, block_size, feedback, order, packed);
  });
}
Error encode_nf4_stochastic(const Pool& pool, Code code, DType dtype, const void* w, const float* absmax, int64_t numel,
                            int64_t block_size, uint64_t seed, uint8_t* packed) {
  return guarded(
      [&] { table().codec->encode_nf4_stochastic(pool, code, dtype, w, absmax, numel, block_size, seed, packed); });
}
Error merge_lora_nf4(const Pool& pool, const MergeProblem& problem) {
  return guarded([&] { table().codec->merge_lora_nf4(pool, problem); });
}
Error quantize_absmax(const Pool& pool, const float* absmax, int64_t count, int64_t nested_block_size, uint8_t* codes,
                      float* nested_absmax, float* nested_offset) {
  return guarded([&] {
    table().codec->quantize_absmax(pool, absmax, count, nested_block_size, codes, nested_absmax, nested_offset);
  });
}
Error dequantize_absmax(const Pool& pool, const Scales& scales, int64_t count, float* absmax) {
  return guarded([&] { table().codec->dequantize_absmax(pool, scales, count, absmax); });
}
Error dequantize_nf4(const Pool& pool, const Weight& w, DType dtype, void* out) {
  return guarded([&] { table().codec->dequantize_nf4(pool, w, dtype, out); });
}
Error linear_nf4(const Pool& pool, const LinearProblem& p) {
  return guarded([&] { run_linear("linear_nf4", table().forward, pool, p); });
}
Error linear_nf4_dx(const Pool& pool, const LinearDxProblem& p) {
  return guarded([&] { run_linear("linear_nf4_dx", table().dx, pool, p); });
}
Error linear_nf4_dlora(const Pool& pool, const LoraGradProblem& p) {
  return guarded([&] {
    const auto run_one = [&](const LoraGradProblem& one) { run("linear_nf4_dlora", table().dlora, pool, one); };
    p.lora.adapters ? run_per_adapter(pool, p, run_one) : run_one(p);
  });
}

Error linear_dense(const Pool& pool, const DenseLinearProblem& p) {
  return guarded([&] { table().dense->linear_dense(pool, p); });
}
Error linear_dense_dx(const Pool& pool, const DenseLinearDxProblem& p) {
  return guarded([&] { table().dense->linear_dense_dx(pool, p); });
}

}  // namespace qlora::cpu
