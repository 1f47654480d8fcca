// Which problems the tensor-core kernels for regular shapes do not take. Every operand begins at a multiple of 16
// bytes: cuda/ops.cpp moves those that do not.
#pragma once

#include "cpp/format/problem.h"

namespace qlora::cuda {

// The forward reads w in segments of 64 k, which have one scale a row.
inline bool is_ragged(const LinearProblem& p) { return p.w.k == 0 || p.w.k % 64 != 0 || p.w.scales.block_size < 64; }

// dX reads 16 bytes of a row of w, and of dy, at a time.
inline bool is_ragged(const LinearDxProblem& p) { return p.w.k % 32 != 0 || p.w.n % 8 != 0; }

// LoRA's gradients read 16 bytes of x and dy at a time.
inline bool is_ragged(const LoraGradProblem& p) { return p.k % 8 != 0 || p.n % 8 != 0; }

}  // namespace qlora::cuda
