// Launches dX on mma.sync.
#include "cuda/kernels/sm80/linear_nf4_dx.cuh"

#include "cuda/launch/sm80/dx_kernels.h"
#include "cuda/launch/sm80/launchers.h"

namespace qlora::cuda::sm80 {
namespace {

struct OneWeight {
  using Args = kernels::DxArgs;
  template <class T, int kTokenTiles, bool kRagged, bool kHasOffsets>
  static constexpr auto kKernel = kernels::linear_nf4_dx_kernel<T, kTokenTiles, kRagged, kHasOffsets>;
};
using Of = DxKernels<OneWeight>;

}  // namespace

cudaError_t plan(const LinearDxProblem& p, const Device& device, Config* config) {
  return plan_dx(Of::regular(p, config->tokens), p, device, config);
}
cudaError_t launch(const LinearDxProblem& p, const Config& config, const Context& context) {
  return launch_dx(Of::regular(p, config.tokens), p, config, context);
}

cudaError_t plan_ragged(const LinearDxProblem& p, const Device& device, Config* config) {
  return plan_dx(Of::ragged(p.dtype, config->tokens), p, device, config);
}
cudaError_t launch_ragged(const LinearDxProblem& p, const Config& config, const Context& context) {
  return launch_dx(Of::ragged(p.dtype, config.tokens), p, config, context);
}

}  // namespace qlora::cuda::sm80
