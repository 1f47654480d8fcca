// Which problems the tensor-core kernels for regular shapes do not take. Every operand begins at a multiple of 16
// bytes: cuda/ops.cpp moves those that do not.
#pragma once

#include "cpp/format/problem.h"

namespace qlora::cuda {

// The forward reads w in segments of 64 k, which have one scale a row.
inline bool is_ragged(const LinearProblem& p) { return p.w.k == 0 || !has_one_scale_per(64, p.w); }

// dX reads 16 bytes of a row of w, which have one scale, and of dy, at a time.
inline bool is_ragged(const LinearDxProblem& p) { return !has_one_scale_per(32, p.w) || p.w.n % 8 != 0; }

// LoRA's gradients read 16 bytes of x and dy at a time.
inline bool is_ragged(const LoraGradProblem& p) { return p.k % 8 != 0 || p.n % 8 != 0; }

}  // namespace qlora::cuda
