// Launches what calls with several adapters need besides the kernels for one adapter.
#include "cuda/launch/generic/adapters.h"

#include <algorithm>

#include "cuda/kernels/generic/adapter_low_rank.cuh"
#include "cuda/kernels/generic/adapter_rows.cuh"
#include "cuda/kernels/generic/adapters.cuh"
#include "cuda/launch/generic/low_rank_splits.h"
#include "cuda/launch/launch.h"
#include "cuda/launch/types.h"
#include "cuda/launch/workspace.h"

namespace qlora::cuda {
namespace {

constexpr int64_t kMostGridY = 65535, kMostStrides = 4096;

unsigned grid_y(int64_t count) { return static_cast<unsigned>(std::clamp<int64_t>(count, 1, kMostGridY)); }

tile::AdapterStacks stacks_of(const DeviceAdapters& adapters, int64_t max_rank, const ExpertRows& experts, int64_t m) {
  return {adapters, max_rank, {experts.offsets, experts.count, m}};
}

// h, or g if `transposed`, of tokens that use different adapters.
struct AdapterLowRank {
  DType dtype;
  tile::AdapterStacks stacks;
  int64_t m, k, padded_rank;
  const void *x, *a;
  bool transposed;
  void *stack, *out;  // either may be null
  Dropout dropout;
};

template <class T, bool kTransposed>
cudaError_t launch_low_rank_of(const AdapterLowRank& p, const Device& device, cudaStream_t stream) {
  kernels::AdapterLowRankArgs<T> args{.stacks = p.stacks,
                                      .x = static_cast<const T*>(p.x),
                                      .a = static_cast<const T*>(p.a),
                                      .stack = static_cast<T*>(p.stack),
                                      .out = static_cast<T*>(p.out),
                                      .m = p.m,
                                      .k = p.k,
                                      .padded_rank = p.padded_rank,
                                      .dropout = p.dropout,
                                      .splits_of_16 = 1,
                                      .splits_of_more = {}};
  const auto rank_tiles = static_cast<unsigned>(ceil_div(p.padded_rank, kernels::kAdapterRanks));
  if constexpr (sizeof(T) == 2) {
    if (p.k % 8 == 0) {
      if (p.stacks.experts.offsets != nullptr) {  // whose sums are not split
        std::ranges::fill(args.splits_of_more, uint8_t{1});
      } else {
        const cudaError_t error =
            query_low_rank_splits(p.dtype, p.m, p.k, kTransposed, device, &args.splits_of_16, args.splits_of_more);
        if (error != cudaSuccess) return error;
      }
      const dim3 grid(static_cast<unsigned>(ceil_div(p.m, kernels::kAdapterTokens)), rank_tiles);
      return launch_kernel(kernels::adapter_low_rank_kernel<T, kTransposed>, grid, kernels::kLowRankThreads, 0, stream,
                           args);
    }
  }
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(p.m, 1 << 20)), rank_tiles);
  return launch_kernel(kernels::adapter_low_rank_scalar_kernel<T, kTransposed>, grid, kernels::kLowRankScalarThreads, 0,
                       stream, args);
}

cudaError_t launch_adapter_low_rank(const AdapterLowRank& p, const Device& device, cudaStream_t stream) {
  return with_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    return p.transposed ? launch_low_rank_of<T, true>(p, device, stream)
                        : launch_low_rank_of<T, false>(p, device, stream);
  });
}

template <class T>
kernels::AdapterProduct<T> make_product(const AdapterProducts& p) {
  return {.stacks = stacks_of(p.adapters, p.max_rank, p.experts, p.m),
          .from = static_cast<const T*>(p.is_dx ? p.a : p.b),
          .stack = static_cast<T*>(p.stack),
          .low_rank = static_cast<const T*>(p.stack_low_rank),
          .out = static_cast<T*>(p.out),
          .m = p.m,
          .columns = p.columns,
          .padded_rank = p.padded_rank,
          .dropout = p.is_dx ? p.dropout : Dropout{},
          .flagged = p.flagged};
}

}  // namespace

cudaError_t AdapterProducts::prepare(const Device& device, cudaStream_t stream) const {
  cudaError_t error = cudaMemsetAsync(flagged, 0, sizeof(*flagged), stream);
  if (error != cudaSuccess) return error;
  const int64_t work = std::max(experts.count * adapters.count * padded_rank * columns, m);
  const auto grid =
      static_cast<unsigned>(std::clamp<int64_t>(ceil_div(work, kernels::kAdapterThreads), 1, kMostStrides));
  error = with_type(dtype, [&](auto element) {
    using T = decltype(element);
    return launch_kernel(is_dx ? kernels::stack_adapters_kernel<T, true> : kernels::stack_adapters_kernel<T, false>,
                         grid, kernels::kAdapterThreads, 0, stream, make_product<T>(*this));
  });
  if (error != cudaSuccess || max_rank == 0) return error;
  // This launch comes last: the next one may start before its end, and reads the stack without waiting.
  return launch_adapter_low_rank({.dtype = dtype,
                                  .stacks = stacks_of(adapters, max_rank, experts, m),
                                  .m = m,
                                  .k = terms,
                                  .padded_rank = padded_rank,
                                  .x = input,
                                  .a = is_dx ? b : a,
                                  .transposed = is_dx,
                                  .stack = stack_low_rank,
                                  .out = low_rank,
                                  .dropout = is_dx ? Dropout{} : dropout},
                                 device, stream);
}

cudaError_t AdapterProducts::finish(cudaStream_t stream) const {
  const dim3 grid(static_cast<unsigned>(ceil_div(columns, kernels::kAdapterThreads)), grid_y(std::min<int64_t>(m, 64)));
  return with_type(dtype, [&](auto element) {
    using T = decltype(element);
    return launch_kernel(is_dx ? kernels::finish_adapters_kernel<T, true> : kernels::finish_adapters_kernel<T, false>,
                         grid, kernels::kAdapterThreads, 0, stream, make_product<T>(*this));
  });
}

cudaError_t AdapterProducts::copy_rows(int64_t adapter, const void* from, cudaStream_t stream) const {
  const dim3 grid(static_cast<unsigned>(ceil_div(columns, kernels::kAdapterThreads)), grid_y(m));
  return with_type(dtype, [&](auto element) {
    using T = decltype(element);
    return launch_kernel(kernels::copy_adapter_rows_kernel<T>, grid, kernels::kAdapterThreads, 0, stream,
                         adapters.of_token, adapter, static_cast<const T*>(from), static_cast<T*>(out), m, columns);
  });
}

namespace {

AdapterProducts products_of(const LinearProblem& p) {
  return {.m = p.m, .terms = p.w.k, .columns = p.w.n, .is_dx = false, .input = p.x, .out = p.y, .low_rank = p.h};
}
AdapterProducts products_of(const LinearDxProblem& p) {
  return {.m = p.m, .terms = p.w.n, .columns = p.w.k, .is_dx = true, .input = p.dy, .out = p.dx, .low_rank = p.g};
}

const DeviceAdapters& adapters_of(const Lora& lora) { return static_cast<const DeviceAdapters&>(*lora.adapters); }

}  // namespace

template <class Problem>
ProductCall<Problem>::ProductCall(const Problem& problem, int64_t unit, const ExpertRows& experts)
    : problem_(problem), products_(products_of(problem)) {
  const Lora& lora = problem.lora;
  products_.dtype = problem.dtype;
  products_.adapters = adapters_of(lora);
  products_.experts = experts;
  products_.max_rank = lora.rank;
  products_.padded_rank = ceil_div(lora.rank, unit) * unit;
  products_.a = lora.a, products_.b = lora.b;
  products_.dropout = lora.dropout;
  const int64_t count = products_.adapters.count, ranks = count * products_.padded_rank;
  stacked_ = {.count = count, .stack_rank = ranks};
  const bool seeds = products_.is_dx && lora.rank > 0 && lora.dropout.active() && products_.adapters.seeds != nullptr;
  passes_ = seeds ? count : 1;
  const int64_t bytes = dtype_bytes(problem.dtype);
  Workspace parts;
  stack_ = parts.add(experts.count * ranks * products_.columns * bytes);
  stack_low_rank_ = parts.add(problem.m * ranks * bytes);
  flagged_ = parts.add(sizeof(uint32_t));
  out_of_pass_ = parts.add(passes_ > 1 ? problem.m * products_.columns * bytes : 0);
  bytes_ = parts.bytes();
}

template <class Problem>
cudaError_t ProductCall<Problem>::prepare(uint8_t* workspace, const Device& device, cudaStream_t stream) {
  workspace_ = workspace;
  products_.stack = workspace + stack_;
  products_.stack_low_rank = workspace + stack_low_rank_;
  products_.flagged = reinterpret_cast<uint32_t*>(workspace + flagged_);
  return products_.prepare(device, stream);
}

template <class Problem>
Problem ProductCall<Problem>::problem(int64_t pass) const {
  Problem p = problem_;
  void* const low_rank = products_.stack_low_rank;
  void* const out = pass > 0 ? workspace_ + out_of_pass_ : products_.out;
  if constexpr (requires { p.y; })
    p.h = low_rank, p.y = out;
  else
    p.g = low_rank, p.dx = out;
  p.lora = {};
  if (stacked_.stack_rank == 0) return p;
  (products_.is_dx ? p.lora.a : p.lora.b) = products_.stack;
  p.lora.rank = stacked_.stack_rank;
  p.lora.adapters = &stacked_;
  if (!products_.is_dx) return p;
  p.lora.dropout = products_.dropout;
  if (products_.adapters.seeds != nullptr) p.lora.dropout.device_seed = products_.adapters.seeds + pass;
  return p;
}

template <class Problem>
cudaError_t ProductCall<Problem>::finish(int64_t pass, cudaStream_t stream) const {
  if (pass > 0) {
    const cudaError_t error = products_.copy_rows(pass, workspace_ + out_of_pass_, stream);
    if (error != cudaSuccess) return error;
  }
  return pass + 1 == passes_ ? products_.finish(stream) : cudaSuccess;
}

template class ProductCall<LinearProblem>;
template class ProductCall<LinearDxProblem>;

AdapterCall<LoraGradProblem>::AdapterCall(const LoraGradProblem& problem, int64_t, const ExpertRows& experts)
    : problem_(problem), experts_(experts), groups_(experts.count * problem.lora.adapters->count) {
  const auto& [dtype, m, n, k, x, dy, lora, h, g, da, db] = problem;
  const int64_t bytes = dtype_bytes(dtype), rank = lora.rank;
  Workspace parts;
  tokens_ = parts.add(m * static_cast<int64_t>(sizeof(int32_t)));
  ends_ = parts.add(groups_ * static_cast<int64_t>(sizeof(int64_t)));
  x_ = parts.add(m * k * bytes), dy_ = parts.add(m * n * bytes);
  h_ = parts.add(h != nullptr ? 0 : m * rank * bytes), g_ = parts.add(g != nullptr ? 0 : m * rank * bytes);
  h_rows_ = parts.add(m * rank * bytes), g_rows_ = parts.add(m * rank * bytes);
  da_ = parts.add(groups_ * rank * k * bytes), db_ = parts.add(groups_ * n * rank * bytes);
  bytes_ = parts.bytes();
}

cudaError_t AdapterCall<LoraGradProblem>::prepare(uint8_t* workspace, const Device& device, cudaStream_t stream) {
  workspace_ = workspace;
  const LoraGradProblem& p = problem_;
  const tile::AdapterStacks stacks = stacks_of(adapters_of(p.lora), p.lora.rank, experts_, p.m);
  const void* const h = p.h != nullptr ? p.h : workspace + h_;
  const void* const g = p.g != nullptr ? p.g : workspace + g_;
  const AdapterLowRank low_rank{
      .dtype = p.dtype, .stacks = stacks, .m = p.m, .padded_rank = p.lora.rank, .stack = nullptr};
  cudaError_t error = cudaSuccess;
  if (p.h == nullptr) {
    AdapterLowRank of_x = low_rank;
    of_x.k = p.k, of_x.x = p.x, of_x.a = p.lora.a, of_x.transposed = false, of_x.dropout = p.lora.dropout;
    of_x.out = workspace + h_;
    error = launch_adapter_low_rank(of_x, device, stream);
  }
  if (p.g == nullptr && error == cudaSuccess) {
    AdapterLowRank of_dy = low_rank;
    of_dy.k = p.n, of_dy.x = p.dy, of_dy.a = p.lora.b, of_dy.transposed = true;
    of_dy.out = workspace + g_;
    error = launch_adapter_low_rank(of_dy, device, stream);
  }
  auto* const tokens = reinterpret_cast<int32_t*>(workspace + tokens_);
  auto* const ends = reinterpret_cast<int64_t*>(workspace + ends_);
  if (error == cudaSuccess)
    error = launch_kernel(kernels::order_adapter_rows_kernel, static_cast<unsigned>(groups_),
                          kernels::kAdapterRowThreads, 0, stream, stacks, p.m, tokens, ends);
  if (error != cudaSuccess) return error;
  return with_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    const kernels::AdapterRowArgs<T> args{.stacks = stacks,
                                          .tokens = tokens,
                                          .ends = ends,
                                          .x = static_cast<const T*>(p.x),
                                          .dy = static_cast<const T*>(p.dy),
                                          .h = static_cast<const T*>(h),
                                          .g = static_cast<const T*>(g),
                                          .x_rows = reinterpret_cast<T*>(workspace + x_),
                                          .dy_rows = reinterpret_cast<T*>(workspace + dy_),
                                          .h_rows = reinterpret_cast<T*>(workspace + h_rows_),
                                          .g_rows = reinterpret_cast<T*>(workspace + g_rows_),
                                          .m = p.m,
                                          .k = p.k,
                                          .n = p.n,
                                          .dropout = p.lora.dropout};
    return launch_kernel(kernels::copy_adapter_tokens_kernel<T>,
                         static_cast<unsigned>(std::min<int64_t>(p.m, kMostStrides)), kernels::kAdapterRowThreads, 0,
                         stream, args);
  });
}

Grouped<LoraGradProblem> AdapterCall<LoraGradProblem>::problem(int64_t) const {
  LoraGradProblem p = problem_;
  p.x = workspace_ + x_, p.dy = workspace_ + dy_;
  p.h = workspace_ + h_rows_, p.g = workspace_ + g_rows_;
  p.da = workspace_ + da_, p.db = workspace_ + db_;
  p.lora = {.rank = problem_.lora.rank};
  p.lora.dropout.keep_scale = problem_.lora.dropout.keep_scale;  // x has been masked
  return {p, reinterpret_cast<const int64_t*>(workspace_ + ends_), groups_};
}

cudaError_t AdapterCall<LoraGradProblem>::finish(int64_t, cudaStream_t stream) const {
  const LoraGradProblem& p = problem_;
  const tile::AdapterStacks stacks = stacks_of(adapters_of(p.lora), p.lora.rank, experts_, p.m);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.k + p.n, kernels::kAdapterRowThreads)),
                  grid_y(experts_.count * stacks.adapters.stack_rank));
  return with_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    return launch_kernel(kernels::unstack_gradients_kernel<T>, grid, kernels::kAdapterRowThreads, 0, stream, stacks,
                         reinterpret_cast<const T*>(workspace_ + da_), reinterpret_cast<const T*>(workspace_ + db_),
                         static_cast<T*>(p.da), static_cast<T*>(p.db), p.n, p.k);
  });
}

}  // namespace qlora::cuda
