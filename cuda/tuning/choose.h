// Chooses the kernel that a linear operator runs with on a card. The choice is a pure function of the problem's types
// and sizes and of the card, so it can be tested on any machine (`_C.choose(device=...)`). The counterpart for the CPU
// is cpp/cpu/tuning.h.
//
// A kernel has a row in its operator's table here, which says what it accepts and how it is configured, and a row in
// launch/registry.cpp, which launches it. A problem goes to the first row that accepts it and expects to be the fastest
// (is_ahead). Each architecture's functions have their own file: generic.h, sm75.h, sm80.h, sm90.h, sm90_experts.h and
// sm100.h. Those of many tokens, which decode the weight once, are in gemm.h, gemm_experts.h and library.h.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "cpp/format/grouped.h"
#include "cpp/format/problem.h"
#include "cuda/tuning/choice.h"
#include "cuda/tuning/device.h"
#include "cuda/tuning/gemm.h"
#include "cuda/tuning/gemm_experts.h"
#include "cuda/tuning/generic.h"
#include "cuda/tuning/library.h"
#include "cuda/tuning/sm100.h"
#include "cuda/tuning/sm75.h"
#include "cuda/tuning/sm80.h"
#include "cuda/tuning/sm90.h"
#include "cuda/tuning/sm90_experts.h"

namespace qlora::cuda {

// The parts of a configuration that QLORA_CUDA_KERNEL may set (forced.h).
struct Options {
  int64_t tokens[4] = {}, ranks[3] = {}, multicast[2] = {};  // the values that the kernel was compiled for
  bool splits = false, ctas = false, panel = false;
};

template <class Problem>
struct KernelRow {
  Kernel kernel;
  bool (*accepts)(const Problem& p, const Device& device);   // whether the kernel can run
  bool (*is_ahead)(const Problem& p, const Device& device);  // whether it is faster than the rows below; null: always
  // `wish` holds the parameters that the environment forces, and zeros for the others.
  Config (*config)(const Problem& p, const Device& device, const Config& wish);
  Options options;
};

template <class Problem>
struct Kernels;

template <>
struct Kernels<LinearProblem> {
  static constexpr KernelRow<LinearProblem> kRows[] = {
      {Kernel::kSm100,
       sm100::accepts,
       sm100::is_ahead,
       sm100::config,
       {.tokens = {64, 128, 256}, .multicast = {1, 2}, .splits = true}},
      {Kernel::kSm90,
       sm90::accepts,
       sm90::is_ahead,
       sm90::config,
       {.tokens = {64, 128}, .multicast = {1, 2}, .splits = true}},
      {Kernel::kSm75, sm75::accepts, sm75::is_ahead, sm75::config, {.tokens = {sm75::kTokens}, .splits = true}},
      {Kernel::kGemm, gemm::accepts, gemm::is_ahead, gemm::config, {.ctas = true, .panel = true}},
      {Kernel::kLibrary, library::accepts, library::is_ahead, library::config, {.splits = true, .panel = true}},
      {Kernel::kFewTokens,
       sm80::few_tokens_accepts,
       nullptr,
       sm80::few_tokens_config,
       {.tokens = {4, 8, 16}, .splits = true, .ctas = true}},
      {Kernel::kTensorCores,
       sm80::accepts,
       nullptr,
       sm80::config,
       {.tokens = {16, 32, 64}, .splits = true, .ctas = true}},
      {Kernel::kExact, generic::exact_accepts, nullptr, generic::config, {.tokens = {4, 16, 64}}},
      {Kernel::kRagged, generic::ragged_accepts, nullptr, generic::config, {.tokens = {4, 16, 64}}},
  };
};

template <>
struct Kernels<LinearDxProblem> {
  static constexpr KernelRow<LinearDxProblem> kRows[] = {
      {Kernel::kSm100,
       sm100::accepts,
       sm100::is_ahead,
       sm100::config,
       {.tokens = {64, 128, 256}, .multicast = {1, 2}, .splits = true}},
      {Kernel::kSm90,
       sm90::accepts,
       sm90::is_ahead,
       sm90::config,
       {.tokens = {64, 128, 256}, .multicast = {1, 2}, .splits = true}},
      {Kernel::kGemm, gemm::accepts, gemm::is_ahead, gemm::config, {.ctas = true, .panel = true}},
      {Kernel::kLibrary, library::accepts, library::is_ahead, library::config, {.splits = true, .panel = true}},
      {Kernel::kTensorCores, sm80::accepts, nullptr, sm80::config, {.tokens = {8, 16, 32, 64}, .splits = true}},
      {Kernel::kExact, generic::exact_accepts, nullptr, generic::exact_config, {.splits = true}},
      {Kernel::kRagged, sm80::ragged_accepts, nullptr, sm80::ragged_config, {.tokens = {16, 32}, .splits = true}},
  };
};

template <>
struct Kernels<LoraGradProblem> {
  static constexpr KernelRow<LoraGradProblem> kRows[] = {
      {Kernel::kTensorCores, sm80::accepts, nullptr, sm80::config, {.ranks = {16, 32, 64}, .splits = true}},
      {Kernel::kExact, generic::exact_accepts, nullptr, generic::exact_config, {.splits = true}},
      {Kernel::kRagged, sm80::ragged_accepts, nullptr, sm80::config, {.ranks = {16, 32, 64}, .splits = true}},
  };
};

template <>
struct Kernels<Grouped<LinearProblem>> {
  static constexpr KernelRow<Grouped<LinearProblem>> kRows[] = {
      {Kernel::kSm90, sm90::accepts, sm90::is_ahead, sm90::config, {.tokens = {64, 128}, .multicast = {1, 2}}},
      {Kernel::kGemm, gemm::accepts, gemm::is_ahead, gemm::config, {.panel = true}},
      {Kernel::kTensorCores, sm80::accepts, nullptr, sm80::config, {.tokens = {8, 16, 32, 64}}},
      {Kernel::kExact, generic::exact_accepts, nullptr, generic::config, {.tokens = {16, 64}}},
      {Kernel::kRagged, generic::ragged_accepts, nullptr, generic::config, {.tokens = {16, 64}}},
  };
};

template <>
struct Kernels<Grouped<LinearDxProblem>> {
  static constexpr KernelRow<Grouped<LinearDxProblem>> kRows[] = {
      {Kernel::kSm90, sm90::accepts, sm90::is_ahead, sm90::config, {.tokens = {64, 128, 256}, .multicast = {1, 2}}},
      {Kernel::kGemm, gemm::accepts, gemm::is_ahead, gemm::config, {.panel = true}},
      {Kernel::kTensorCores, sm80::accepts, nullptr, sm80::config, {.tokens = {8, 16, 32, 64}}},
      {Kernel::kExact, generic::exact_accepts, nullptr, generic::exact_config, {}},
      {Kernel::kRagged, sm80::ragged_accepts, nullptr, sm80::ragged_config, {.tokens = {16, 32}}},
  };
};

template <>
struct Kernels<Grouped<LoraGradProblem>> {
  static constexpr KernelRow<Grouped<LoraGradProblem>> kRows[] = {
      {Kernel::kTensorCores, sm80::accepts, nullptr, sm80::config, {.ranks = {16, 32, 64}}},
      {Kernel::kExact, generic::exact_accepts, nullptr, generic::exact_config, {}},
      {Kernel::kRagged, sm80::ragged_accepts, nullptr, sm80::config, {.ranks = {16, 32, 64}}},
  };
};

// Throws std::invalid_argument if the device multiplies no numbers of the type.
constexpr void require_type(DType dtype, const Device& device) {
  if (dtype != DType::kBFloat16 || has_tensor_core_kernels(device)) return;
  throw std::invalid_argument("bfloat16 needs compute capability 8.0 or newer, and this device has " +
                              capability_text(device) + ": compute in float16 or float32");
}
template <class Problem>
constexpr void require_type(const Problem& p, const Device& device) {
  if constexpr (requires { p.stack; })
    require_type(p.stack.dtype, device);
  else
    require_type(p.dtype, device);
}

template <class Problem>
constexpr Choice choose(const Problem& p, const Device& device) {
  require_type(p, device);
  for (const KernelRow<Problem>& row : Kernels<Problem>::kRows) {
    if (row.accepts(p, device) && (row.is_ahead == nullptr || row.is_ahead(p, device)))
      return {row.kernel, row.config(p, device, {})};
  }
  return {};  // only for float64, which the operators reject: every other type has a row that accepts all shapes
}

}  // namespace qlora::cuda
