// The linear operators on mma.sync. A plan sets `splits`, as many as fill the device, where that is 0. Sums are
// float32, in a fixed order. The host never waits, so a graph can capture every launch.
//
// `launch` of a problem that is not empty, with a configuration that the kernel's plan has completed:
//
//   LinearProblem     y = x · wᵀ + h · lora_bᵀ + bias, h = round(scaling · dropout(x) · lora_aᵀ): one launch for h if
//                     there is LoRA, and one for y; few_tokens makes h in the same launch, unless it is kept
//   LinearDxProblem   dx = dy · w + mask ∘ (g · lora_a) · keep_scale, g = round(scaling · dy · lora_b): one launch for
//   g
//                     if there is LoRA, and one for dx
//   LoraGradProblem   da = gᵀ · dropout(x) and db = dyᵀ · h: one launch for each of h and g that is not given, and one
//                     for da and db
//   Grouped<...>      the same for all experts, each over its own rows, in as many launches, whatever the number of
//                     experts. Only the device reads the offsets. Unassigned rows become zeros.
#pragma once

#include <cuda_runtime_api.h>

#include "cpp/format/grouped.h"
#include "cuda/launch/launch.h"
#include "cuda/tuning/choice.h"

namespace qlora::cuda::sm80 {

cudaError_t plan_few_tokens(const LinearProblem& p, const Device& device, Config* config);
cudaError_t launch_few_tokens(const LinearProblem& p, const Config& config, const Context& context);

cudaError_t plan(const LinearProblem& p, const Device& device, Config* config);
cudaError_t launch(const LinearProblem& p, const Config& config, const Context& context);
cudaError_t launch(const Grouped<LinearProblem>& problem, const Config& config, const Context& context);

cudaError_t plan(const LinearDxProblem& p, const Device& device, Config* config);
cudaError_t launch(const LinearDxProblem& p, const Config& config, const Context& context);
cudaError_t launch(const Grouped<LinearDxProblem>& problem, const Config& config, const Context& context);

cudaError_t plan_ragged(const LinearDxProblem& p, const Device& device, Config* config);
cudaError_t launch_ragged(const LinearDxProblem& p, const Config& config, const Context& context);
cudaError_t launch_ragged(const Grouped<LinearDxProblem>& problem, const Config& config, const Context& context);

cudaError_t plan(const LoraGradProblem& p, const Device& device, Config* config);
cudaError_t launch(const LoraGradProblem& p, const Config& config, const Context& context);
cudaError_t launch(const Grouped<LoraGradProblem>& problem, const Config& config, const Context& context);

cudaError_t plan_ragged(const LoraGradProblem& p, const Device& device, Config* config);
cudaError_t launch_ragged(const LoraGradProblem& p, const Config& config, const Context& context);
cudaError_t launch_ragged(const Grouped<LoraGradProblem>& problem, const Config& config, const Context& context);

}  // namespace qlora::cuda::sm80
