// The launchers of the forward and dX on wgmma and TMA. sm80/launchers.h describes their common interface. Their
// configurations need no plan, because an SM always holds exactly one CTA.
#pragma once

#include <cuda_runtime_api.h>

#include "cpp/format/grouped.h"
#include "cuda/launch/launch.h"
#include "cuda/tuning/choice.h"

namespace qlora::cuda::sm90 {

// See query_resident_clusters. All these kernels need an SM per CTA.
ResidentClusters query_clusters(const Device& device);

cudaError_t launch(const LinearProblem& p, const Config& config, const Context& context);
cudaError_t launch(const LinearDxProblem& p, const Config& config, const Context& context);
cudaError_t launch(const Grouped<LinearProblem>& problem, const Config& config, const Context& context);
cudaError_t launch(const Grouped<LinearDxProblem>& problem, const Config& config, const Context& context);

}  // namespace qlora::cuda::sm90
