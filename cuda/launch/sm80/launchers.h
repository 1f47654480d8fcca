// The launchers of the linear operators on mma.sync. Where `splits` and `ctas` are 0, a plan sets one of them to what
// fills the device. Sums are float32, in a fixed order. The host never waits, so a CUDA graph can capture every launch.
//
// `launch` takes a nonempty problem, and a configuration that the kernel's plan has completed:
//
//   LinearProblem     y = x · wᵀ + h · lora_bᵀ + bias with h = round(scaling · dropout(x) · lora_aᵀ): one launch for h
//                     if there is LoRA, and one for y. few_tokens computes h in the same launch, unless it is retained.
//                     gemm has two launches per panel of the weight instead of one, also for dx.
//   LinearDxProblem   dx = dy · w + mask ∘ (g · lora_a) · keep_scale with g = round(scaling · dy · lora_b): one launch
//                     for g if there is LoRA, and one for dx.
//   LoraGradProblem   da = gᵀ · dropout(x) and db = dyᵀ · h: one launch for each of h and g that is not given, and one
//                     for da and db.
//   Grouped<...>      the same for all experts, each over its own rows, in the same number of launches for any number
//                     of experts. Only the device reads the offsets. Unassigned rows become zeros.
#pragma once

#include <cuda_runtime_api.h>

#include "cpp/format/grouped.h"
#include "cuda/launch/launch.h"
#include "cuda/tuning/choice.h"

namespace qlora::cuda::sm80 {

cudaError_t plan_few_tokens(const LinearProblem& p, const Device& device, Config* config);
cudaError_t launch_few_tokens(const LinearProblem& p, const Config& config, const Context& context);

cudaError_t launch_gemm(const LinearProblem& p, const Config& config, const Context& context);
cudaError_t launch_gemm(const LinearDxProblem& p, const Config& config, const Context& context);
cudaError_t launch_gemm(const Grouped<LinearProblem>& problem, const Config& config, const Context& context);
cudaError_t launch_gemm(const Grouped<LinearDxProblem>& problem, const Config& config, const Context& context);

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
