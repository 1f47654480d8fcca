// The kernels of the linear operators by name: a row per kernel, of a single weight and of experts. What a kernel
// accepts, and its configuration, are in the row of the same name in cuda/tuning/choose.h.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/launch/launch.h"
#include "cuda/tuning/choice.h"

namespace qlora::cuda {

template <class Problem>
struct Launcher {
  Kernel kernel;
  // Completes the configuration by what the device holds of the compiled kernel (Config::splits). Null: it is complete.
  cudaError_t (*plan)(const Problem& p, const Device& device, Config* config);
  // Of a problem that is not empty, with a planned configuration.
  cudaError_t (*launch)(const Problem& p, const Config& config, const Context& context);
};

// Problem: LinearProblem, LinearDxProblem or LoraGradProblem, or Grouped<> of them.
template <class Problem>
const Launcher<Problem>& launcher(Kernel kernel);

}  // namespace qlora::cuda
