// Launches the gradients of LoRA's weights on mma.sync.
#include "cuda/kernels/sm80/linear_nf4_dlora.cuh"

#include "cuda/launch/sm80/dlora_kernels.h"
#include "cuda/launch/sm80/launchers.h"

namespace qlora::cuda::sm80 {
namespace {

struct OneLayer {
  using Args = kernels::DLoraArgs;
  template <class T, int kRankTiles, bool kRagged>
  static constexpr auto kKernel = kernels::linear_nf4_dlora_kernel<T, kRankTiles, kRagged>;
};
using Kernels = DLoraKernels<OneLayer>;

}  // namespace

cudaError_t plan(const LoraGradProblem& p, const Device& device, Config* config) {
  return plan_dlora(Kernels::of<false>(p.dtype, config->ranks), p, device, config);
}
cudaError_t launch(const LoraGradProblem& p, const Config& config, const Context& context) {
  return launch_dlora(Kernels::of<false>(p.dtype, config.ranks), p, config, context);
}

cudaError_t plan_ragged(const LoraGradProblem& p, const Device& device, Config* config) {
  return plan_dlora(Kernels::of<true>(p.dtype, config->ranks), p, device, config);
}
cudaError_t launch_ragged(const LoraGradProblem& p, const Config& config, const Context& context) {
  return launch_dlora(Kernels::of<true>(p.dtype, config.ranks), p, config, context);
}

}  // namespace qlora::cuda::sm80
