// The table that maps the kernels of cuda/tuning/choose.h to their launchers.
#include "cuda/launch/registry.h"

#include <iterator>

#include "cuda/launch/generic/launchers.h"
#include "cuda/launch/generic/linear_library.h"
#include "cuda/launch/sm100/launchers.h"
#include "cuda/launch/sm75/launchers.h"
#include "cuda/launch/sm80/launchers.h"
#include "cuda/launch/sm90/launchers.h"
#include "cuda/tuning/choose.h"

namespace qlora::cuda {
namespace {

template <class Problem>
struct Launchers;

template <>
struct Launchers<LinearProblem> {
  static constexpr Launcher<LinearProblem> kRows[] = {
      {Kernel::kSm100, nullptr, sm100::launch},
      {Kernel::kSm90, nullptr, sm90::launch},
      {Kernel::kSm75, sm75::plan, sm75::launch},
      {Kernel::kGemm, nullptr, sm80::launch_gemm},
      {Kernel::kLibrary, nullptr, library::launch},
      {Kernel::kFewTokens, sm80::plan_few_tokens, sm80::launch_few_tokens},
      {Kernel::kTensorCores, sm80::plan, sm80::launch},
      {Kernel::kExact, nullptr, generic::launch},
      {Kernel::kRagged, nullptr, generic::launch},
  };
};

template <>
struct Launchers<LinearDxProblem> {
  static constexpr Launcher<LinearDxProblem> kRows[] = {
      {Kernel::kSm100, nullptr, sm100::launch},
      {Kernel::kSm90, nullptr, sm90::launch},
      {Kernel::kGemm, nullptr, sm80::launch_gemm},
      {Kernel::kLibrary, nullptr, library::launch},
      {Kernel::kTensorCores, sm80::plan, sm80::launch},
      {Kernel::kExact, generic::plan_exact, generic::launch_exact},
      {Kernel::kRagged, sm80::plan_ragged, sm80::launch_ragged},
  };
};

template <>
struct Launchers<LoraGradProblem> {
  static constexpr Launcher<LoraGradProblem> kRows[] = {
      {Kernel::kTensorCores, sm80::plan, sm80::launch},
      {Kernel::kExact, generic::plan_exact, generic::launch_exact},
      {Kernel::kRagged, sm80::plan_ragged, sm80::launch_ragged},
  };
};

template <>
struct Launchers<Grouped<LinearProblem>> {
  static constexpr Launcher<Grouped<LinearProblem>> kRows[] = {
      {Kernel::kSm90, nullptr, sm90::launch},        {Kernel::kGemm, nullptr, sm80::launch_gemm},
      {Kernel::kTensorCores, nullptr, sm80::launch}, {Kernel::kExact, nullptr, generic::launch},
      {Kernel::kRagged, nullptr, generic::launch},
  };
};

template <>
struct Launchers<Grouped<LinearDxProblem>> {
  static constexpr Launcher<Grouped<LinearDxProblem>> kRows[] = {
      {Kernel::kSm90, nullptr, sm90::launch},          {Kernel::kGemm, nullptr, sm80::launch_gemm},
      {Kernel::kTensorCores, nullptr, sm80::launch},   {Kernel::kExact, nullptr, generic::launch_exact},
      {Kernel::kRagged, nullptr, sm80::launch_ragged},
  };
};

template <>
struct Launchers<Grouped<LoraGradProblem>> {
  static constexpr Launcher<Grouped<LoraGradProblem>> kRows[] = {
      {Kernel::kTensorCores, nullptr, sm80::launch},
      {Kernel::kExact, nullptr, generic::launch_exact},
      {Kernel::kRagged, nullptr, sm80::launch_ragged},
  };
};

// The table holds exactly the kernels that choose.h may choose.
template <class Problem>
constexpr bool has_the_chosen_kernels() {
  const auto& chosen = Kernels<Problem>::kRows;
  const auto& launched = Launchers<Problem>::kRows;
  if (std::size(chosen) != std::size(launched)) return false;
  for (size_t i = 0; i < std::size(chosen); ++i)
    if (chosen[i].kernel != launched[i].kernel) return false;
  return true;
}

}  // namespace

template <class Problem>
const Launcher<Problem>& launcher(Kernel kernel) {
  static_assert(has_the_chosen_kernels<Problem>());
  const auto& rows = Launchers<Problem>::kRows;
  const Launcher<Problem>* row = rows;
  while (row->kernel != kernel) ++row;
  return *row;
}

template const Launcher<LinearProblem>& launcher(Kernel);
template const Launcher<LinearDxProblem>& launcher(Kernel);
template const Launcher<LoraGradProblem>& launcher(Kernel);
template const Launcher<Grouped<LinearProblem>>& launcher(Kernel);
template const Launcher<Grouped<LinearDxProblem>>& launcher(Kernel);
template const Launcher<Grouped<LoraGradProblem>>& launcher(Kernel);

}  // namespace qlora::cuda
