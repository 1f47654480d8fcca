// The launches of the gradients of LoRA's weights, of a single layer and of experts, on any of the kernels that share
// DLoraArgs.
#pragma once

#include <cuda_runtime_api.h>

#include "cpp/format/grouped.h"
#include "cuda/kernels/generic/grouped_linear_nf4_dlora_exact.cuh"
#include "cuda/launch/cluster.h"
#include "cuda/launch/launch.h"
#include "cuda/tuning/choice.h"

namespace qlora::cuda {

// A kernel, and its occupancy on a device.
template <class Args>
struct DLoraKernel {
  void (*kernel)(const Args);
  cudaError_t (*ctas_per_sm)(const Device& device, int threads, int shared_bytes, int* ctas);
  cudaError_t (*earliest_start)(const Device& device, Start* start);
};

// Splits the sum over tokens over as many CTAs as fill the device, or as the environment forces.
cudaError_t plan_dlora(const DLoraKernel<kernels::DLoraArgs>& kernel, const LoraGradProblem& p, const Device& device,
                       Config* config);

cudaError_t launch_dlora(const DLoraKernel<kernels::DLoraArgs>& kernel, const LoraGradProblem& p, const Config& config,
                         const Context& context);

// The sum over tokens is not split, because experts fill the device.
cudaError_t launch_dlora(const DLoraKernel<kernels::GroupedDLoraArgs>& kernel, const Grouped<LoraGradProblem>& problem,
                         const Config& config, const Context& context);

}  // namespace qlora::cuda
