// The launchers of the forward and dX on tcgen05 and TMA. sm80/launchers.h describes their common interface. Their
// configurations need no plan, because an SM always holds exactly one CTA.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/launch/launch.h"
#include "cuda/tuning/choice.h"

namespace qlora::cuda::sm100 {

// See sm90::query_resident_clusters.
ResidentClusters query_clusters(const Device& device);

cudaError_t launch(const LinearProblem& p, const Config& config, const Context& context);
cudaError_t launch(const LinearDxProblem& p, const Config& config, const Context& context);

}  // namespace qlora::cuda::sm100
