// Launches dX of experts on mma.sync.
#include "cuda/kernels/sm80/grouped_linear_nf4_dx.cuh"

#include "cuda/launch/sm80/dx_kernels.h"
#include "cuda/launch/sm80/launchers.h"

namespace qlora::cuda::sm80 {
namespace {

struct Experts {
  using Args = kernels::GroupedDxArgs;
  template <class T, int kTokenTiles, bool kRagged, bool kHasOffsets>
  static constexpr auto kKernel = kernels::grouped_linear_nf4_dx_kernel<T, kTokenTiles, kRagged, kHasOffsets>;
};
using Of = DxKernels<Experts>;

}  // namespace

cudaError_t launch(const Grouped<LinearDxProblem>& problem, const Config& config, const Context& context) {
  return launch_dx(Of::regular(problem.stack, config.tokens), problem, config, context);
}
cudaError_t launch_ragged(const Grouped<LinearDxProblem>& problem, const Config& config, const Context& context) {
  return launch_dx(Of::ragged(problem.stack.dtype, config.tokens), problem, config, context);
}

}  // namespace qlora::cuda::sm80
