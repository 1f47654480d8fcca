// The arguments of Hopper's kernels, for a single weight or the first expert's.
#pragma once

#include "cpp/format/problem.h"
#include "cuda/kernels/sm90/linear_nf4.cuh"
#include "cuda/kernels/sm90/linear_nf4_dx.cuh"
#include "cuda/launch/sm90/clusters.h"

namespace qlora::cuda::sm90 {

template <class Tile>
auto make_args(const LinearProblem& p, const Config& c, const void* h, const Device& device) {
  using T = typename Tile::T;
  return kernels::LinearSm90Args<T>{.scales = tile::make_scale_view(p.w),
                                    .code = tile::make_pair_view<T>(p.w.code),
                                    .m = p.m,
                                    .n = p.w.n,
                                    .k = p.w.k,
                                    .lora = {static_cast<const T*>(h), static_cast<const T*>(p.lora.b), p.lora.rank,
                                             p.m, p.w.n, adapter_ranks(p.lora)},
                                    .out = {static_cast<T*>(p.y), static_cast<const T*>(p.bias), nullptr, nullptr},
                                    .plan = make_plan(c, p.m, p.w.n, ceil_div(p.w.k, Tile::kStageK), p.lora, device)};
}

template <class Tile>
auto make_args(const LinearDxProblem& p, const Config& c, const void* g, const Device& device) {
  static_assert(Tile::kStageRows == kDxStageRows);
  using T = typename Tile::T;
  return kernels::DxSm90Args<T>{
      .scales = tile::make_scale_view(p.w),
      .code = tile::make_code_view(p.w.code),
      .m = p.m,
      .n = p.w.n,
      .k = p.w.k,
      .g = {static_cast<const T*>(g), nullptr, p.lora.rank, p.m, p.w.n, adapter_ranks(p.lora)},
      .lora_a = static_cast<const T*>(p.lora.a),
      .dropout = p.lora.dropout,
      .out = {static_cast<T*>(p.dx), nullptr, nullptr, nullptr},
      .plan = make_plan(c, p.m, p.w.k, ceil_div(p.w.n, Tile::kStageRows), p.lora, device)};
}

}  // namespace qlora::cuda::sm90
