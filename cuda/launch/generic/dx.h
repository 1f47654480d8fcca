// dX's launches, of a single weight and of experts, on any of the kernels that share DxArgs.
#pragma once

#include <cuda_runtime_api.h>

#include "cpp/format/grouped.h"
#include "cuda/kernels/generic/grouped_linear_nf4_dx_exact.cuh"
#include "cuda/launch/cluster.h"
#include "cuda/launch/launch.h"
#include "cuda/tuning/choice.h"

namespace qlora::cuda {

// A kernel, and its launch parameters.
template <class Args>
struct DxKernel {
  void (*kernel)(const Args);
  cudaError_t (*ctas_per_sm)(const Device& device, int threads, int shared_bytes, int* ctas);
  cudaError_t (*earliest_start)(const Device& device, Start* start);
  int threads, shared_bytes;
};

// Splits the sum over rows n over as many CTAs as fill the device, or as the environment forces.
cudaError_t plan_dx(const DxKernel<kernels::DxArgs>& kernel, const LinearDxProblem& p, const Device& device,
                    Config* config);

cudaError_t launch_dx(const DxKernel<kernels::DxArgs>& kernel, const LinearDxProblem& p, const Config& config,
                      const Context& context);

// The sum over rows n is not split, because experts fill the device.
cudaError_t launch_dx(const DxKernel<kernels::GroupedDxArgs>& kernel, const Grouped<LinearDxProblem>& problem,
                      const Config& config, const Context& context);

}  // namespace qlora::cuda
