// Launches the gradients of experts' LoRA weights on mma.sync.
#include "cuda/kernels/sm80/grouped_linear_nf4_dlora.cuh"

#include "cuda/launch/sm80/dlora_kernels.h"
#include "cuda/launch/sm80/launchers.h"

namespace qlora::cuda::sm80 {
namespace {

struct Experts {
  using Args = kernels::GroupedDLoraArgs;
  template <class T, int kRankTiles, bool kRagged>
  static constexpr auto kKernel = kernels::grouped_linear_nf4_dlora_kernel<T, kRankTiles, kRagged>;
};
using Kernels = DLoraKernels<Experts>;

}  // namespace

cudaError_t launch(const Grouped<LoraGradProblem>& problem, const Config& config, const Context& context) {
  return launch_dlora(Kernels::of<false>(problem.stack.dtype, config.ranks), problem, config, context);
}
cudaError_t launch_ragged(const Grouped<LoraGradProblem>& problem, const Config& config, const Context& context) {
  return launch_dlora(Kernels::of<true>(problem.stack.dtype, config.ranks), problem, config, context);
}

}  // namespace qlora::cuda::sm80
