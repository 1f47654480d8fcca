// The forward and dX of many tokens: a panel of the weight is decoded, and cuBLAS multiplies by it, panel by panel. A
// panel is a range of the output's columns, whose sums are whole in it: where LoRA or bias come on top they are
// float32, and what is rounded is the total.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cpp/format/problem.h"
#include "cuda/launch/launch.h"

namespace qlora::cuda {

// Columns of y (rows of w), and of dx (columns of w), a panel.
int64_t library_panel(const LinearProblem& problem, const Device& device);
int64_t library_panel(const LinearDxProblem& problem, const Device& device);

// On `device`, which is current. `blas`: torch's cuBLAS handle there, on `stream`. Throws std::runtime_error with
// cuBLAS's words where that fails.
cudaError_t launch_linear_by_library(const LinearProblem& problem, const Device& device, void* blas,
                                     const Allocator& allocate, cudaStream_t stream);
cudaError_t launch_linear_dx_by_library(const LinearDxProblem& problem, const Device& device, void* blas,
                                        const Allocator& allocate, cudaStream_t stream);

}  // namespace qlora::cuda
