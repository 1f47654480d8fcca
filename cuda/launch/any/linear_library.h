// The forward and dX of many tokens: decodes the weight panel by panel, and cuBLAS multiplies with each panel. A panel
// is a range of the output's columns and holds their complete sums. If LoRA or bias are added, the sums are float32,
// and only the total is rounded.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cpp/format/problem.h"
#include "cuda/launch/launch.h"

namespace qlora::cuda {

// Columns per panel: of y (rows of w), and of dx (columns of w).
int64_t library_panel(const LinearProblem& problem, const Device& device);
int64_t library_panel(const LinearDxProblem& problem, const Device& device);

// Launches on `device`, the current one. `blas` is torch's cuBLAS handle there, on `stream`. Throws std::runtime_error
// with cuBLAS's message if that fails.
cudaError_t launch_linear_by_library(const LinearProblem& problem, const Device& device, void* blas,
                                     const Allocator& allocate, cudaStream_t stream);
cudaError_t launch_linear_dx_by_library(const LinearDxProblem& problem, const Device& device, void* blas,
                                        const Allocator& allocate, cudaStream_t stream);

}  // namespace qlora::cuda
