// The kernels of the linear operators by name: one row per kernel, for single weights and for experts. The row of the
// same name in cuda/tuning/choose.h says what a kernel accepts, and how it is configured.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/launch/launch.h"
#include "cuda/tuning/choice.h"

namespace qlora::cuda {

template <class Problem>
struct Launcher {
  Kernel kernel;
  // Completes the configuration with the splits, which depend on the compiled kernel's occupancy (Config::splits). Null
  // if the configuration is complete without it.
  cudaError_t (*plan)(const Problem& p, const Device& device, Config* config);
  // Launches the kernel for a nonempty problem, with a planned configuration.
  cudaError_t (*launch)(const Problem& p, const Config& config, const Context& context);
};

// Problem: LinearProblem, LinearDxProblem or LoraGradProblem, or Grouped<> of them.
template <class Problem>
const Launcher<Problem>& launcher(Kernel kernel);

}  // namespace qlora::cuda
