// The launcher of the forward on tcgen05 and TMA. sm80/launchers.h describes its interface. Its configuration needs no
// plan, because an SM always holds exactly one CTA.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/launch/launch.h"
#include "cuda/tuning/choice.h"

namespace qlora::cuda::sm100 {

// See sm90::query_resident_clusters.
ResidentClusters query_clusters(const Device& device);

cudaError_t launch(const LinearProblem& p, const Config& config, const Context& context);

}  // namespace qlora::cuda::sm100
