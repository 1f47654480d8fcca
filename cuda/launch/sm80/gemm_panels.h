// The GEMM's arguments for a decoded panel of a weight, or of the first of several experts.
#pragma once

#include <cstdint>

#include "cuda/kernels/sm80/linear_gemm.cuh"
#include "cuda/launch/generic/weight_panels.h"
#include "cuda/tuning/gemm.h"

namespace qlora::cuda::sm80 {

static_assert(tile::kGemmTokens == gemm::kTokens && tile::kGemmColumns == gemm::kColumns &&
              tile::kGemmTerms == gemm::kTerms && tile::kGemmSharedBytes == gemm::kSharedBytes);

template <class T>
const T* at(const void* base, int64_t index) {
  return base == nullptr ? nullptr : static_cast<const T*>(base) + index;
}

// `low_rank` is h [m, r].
template <class T>
kernels::GemmArgs<T> gemm_args(const LinearProblem& p, const PanelRange& panel, const void* low_rank,
                               const void* weight, const kernels::GemmUnits& units) {
  const int64_t n = p.w.n, k = p.w.k, rank = p.lora.rank;
  return {.lora = {at<T>(low_rank, 0), at<T>(p.lora.b, panel.first * rank), rank, rank},
          .main = {at<T>(p.x, 0), at<T>(weight, 0), k, k},
          .bias = at<T>(p.bias, panel.first),
          .out = static_cast<T*>(p.y) + panel.first,
          .out_stride = n,
          .m = p.m,
          .columns = panel.columns,
          .dropout = {},
          .first_column = panel.first,
          .units = units};
}

// `low_rank` is g [m, r].
template <class T>
kernels::GemmArgs<T> gemm_args(const LinearDxProblem& p, const PanelRange& panel, const void* low_rank,
                               const void* weight, const kernels::GemmUnits& units) {
  const int64_t n = p.w.n, k = p.w.k, rank = p.lora.rank;
  return {.lora = {at<T>(low_rank, 0), at<T>(p.lora.a, panel.first), k, rank},
          .main = {at<T>(p.dy, 0), at<T>(weight, 0), panel.columns, n},
          .bias = nullptr,
          .out = static_cast<T*>(p.dx) + panel.first,
          .out_stride = k,
          .m = p.m,
          .columns = panel.columns,
          .dropout = p.lora.dropout,
          .first_column = panel.first,
          .units = units};
}

}  // namespace qlora::cuda::sm80
