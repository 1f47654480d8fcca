#include "cuda/launch/sm80/linear_nf4.h"

#include <algorithm>

#include "cuda/kernels/any/linear_nf4_ragged.cuh"
#include "cuda/kernels/sm80/linear_nf4.cuh"
#include "cuda/kernels/sm80/linear_nf4_few_tokens.cuh"
#include "cuda/launch/any/low_rank.h"
#include "cuda/launch/choice.h"
#include "cuda/launch/cluster.h"
#include "cuda/launch/launch.h"
#include "cuda/launch/sm80/linear_tiles.h"
#include "cuda/launch/sm80/ragged.h"
#include "cuda/launch/sm90/linear_nf4.h"

namespace qlora::cuda {
namespace {

// The parts of the workspace, as offsets in bytes. h, if it is not kept, is at 0.
struct Workspace {
  int64_t tickets = 0, partials = 0, end = 0;

  Workspace(const LinearProblem& p, int64_t ticket_count, int64_t partial_count) {
    const auto round_up = [](int64_t bytes) { return ceil_div(bytes, 16) * 16; };
    tickets = p.h ? 0 : round_up(p.m * p.lora.rank * dtype_bytes(p.dtype));
    partials = tickets + round_up(ticket_count * 4);
    end = partials + partial_count * 4;
  }
};

uint8_t* at(void* workspace, int64_t offset) { return static_cast<uint8_t*>(workspace) + offset; }

cudaError_t launch_h(const LinearProblem& p, void* h, uint32_t* clear, int64_t clear_count, cudaStream_t stream) {
  LowRankProblem problem = h_problem(p.dtype, p.m, p.w.k, p.x, p.lora, h);
  problem.clear = clear;
  problem.clear_count = clear_count;
  return launch_low_rank(problem, stream);
}

// What the plans of tensor-core tiles share: k is split over CTAs in multiples of kUnit segments.
template <class Tile_, int kUnit>
struct SplitPlan {
  using Tile = Tile_;
  using T = typename Tile::T;

  const LinearProblem& p;
  int64_t token_tiles, tiles, segments_per_split, splits;
  bool cluster;
  Workspace workspace;

  // `slots`: CTAs that the device holds at once; `cluster_ctas`: how many a cluster may have.
  SplitPlan(const LinearProblem& problem, int64_t slots, int64_t cluster_ctas)
      : p(problem),
        token_tiles(ceil_div(p.m, Tile::kTokens)),
        tiles(token_tiles * ceil_div(p.w.n, Tile::kRows)),
        segments_per_split(linear_split_segments(tiles, p.w.k / tile::kSegment, kUnit, Tile::kTokens, slots,
                                                 cluster_ctas > 1 ? cluster_ctas : slots)),
        splits(ceil_div(p.w.k / tile::kSegment, segments_per_split)),
        cluster(splits > 1 && cluster_ctas > 1),
        workspace(p, ticket_count(), ticket_count() * splits * Tile::kTokens * Tile::kRows) {}

  int64_t ticket_count() const { return splits > 1 && !cluster ? tiles : 0; }

  std::string choice() const {
    return describe(Kernel::kTensorCores, {{"tokens", Tile::kTokens}, {"rows", Tile::kRows}, {"splits", splits}});
  }

  T* h(void* memory) const { return static_cast<T*>(p.h ? p.h : memory); }

  tile::LinearOutput<T> output(void* memory) const {
    return {static_cast<T*>(p.y), static_cast<const T*>(p.bias),
            reinterpret_cast<float*>(at(memory, workspace.partials)), cluster ? nullptr : tickets(memory)};
  }

  // Prepares the main launch: computes h, if it has its own launch, and clears the tickets, which h's launch can do.
  cudaError_t launch_before(bool makes_h, void* memory, cudaStream_t stream) const {
    if (makes_h) return launch_h(p, h(memory), tickets(memory), ticket_count(), stream);
    return ticket_count() > 0 ? cudaMemsetAsync(tickets(memory), 0, ticket_count() * sizeof(uint32_t), stream)
                              : cudaSuccess;
  }

  template <class Args>
  cudaError_t launch_main(void (*kernel)(const Args), const Args& args, cudaStream_t stream) const {
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(splits));
    return launch_cluster(kernel, grid, dim3(1, cluster ? grid.y : 1), Tile::kThreads, Tile::kSharedBytes, stream,
                          args);
  }

 private:
  uint32_t* tickets(void* memory) const { return reinterpret_cast<uint32_t*>(at(memory, workspace.tickets)); }
};

template <class Tile>
struct TensorCorePlan : SplitPlan<Tile, Tile::kStageSegments> {
  using SplitPlan<Tile, Tile::kStageSegments>::SplitPlan;

  cudaError_t launch(void* memory, cudaStream_t stream) const {
    using T = typename Tile::T;
    const LinearProblem& p = this->p;
    const cudaError_t error = this->launch_before(p.lora.rank > 0, memory, stream);
    if (error != cudaSuccess) return error;
    const kernels::LinearArgs<T> args{
        .x = static_cast<const T*>(p.x),
        .packed = p.w.packed,
        .scales = tile::make_scale_view(p.w),
        .code = tile::make_pair_view<T>(p.w.code),
        .m = p.m,
        .n = p.w.n,
        .k = p.w.k,
        .lora = {this->h(memory), static_cast<const T*>(p.lora.b), p.lora.rank, p.m, p.w.n},
        .out = this->output(memory),
        .token_tiles = this->token_tiles,
        .segments_per_split = this->segments_per_split};
    return this->launch_main(kernels::linear_nf4_kernel<Tile>, args, stream);
  }
};

// Few tokens: one launch, unless h needs its own launch, or the device has no clusters for the splits.
template <class Tile>
struct FewPlan : SplitPlan<Tile, Tile::kRoundSegments> {
  using SplitPlan<Tile, Tile::kRoundSegments>::SplitPlan;

  cudaError_t launch(void* memory, cudaStream_t stream) const {
    using T = typename Tile::T;
    const LinearProblem& p = this->p;
    const Lora& lora = p.lora;
    // If h is kept, the parts of all CTAs would have to be summed first.
    const bool folds = !p.h && lora.rank > 0 && lora.rank <= Tile::kFoldedRanks && p.w.k < tile::kMostFoldedK;
    const cudaError_t error = this->launch_before(lora.rank > 0 && !folds, memory, stream);
    if (error != cudaSuccess) return error;
    const kernels::FewLinearArgs<T> args{
        .x = static_cast<const T*>(p.x),
        .packed = p.w.packed,
        .scales = tile::make_scale_view(p.w),
        .code = tile::make_pair_view<T>(p.w.code),
        .m = p.m,
        .n = p.w.n,
        .k = p.w.k,
        .lora = {folds ? static_cast<const T*>(lora.a) : nullptr, this->h(memory), static_cast<const T*>(lora.b),
                 lora.rank, static_cast<float>(lora.scaling * lora.dropout.keep_scale), lora.dropout},
        .out = this->output(memory),
        .segments_per_split = this->segments_per_split};
    return this->launch_main(kernels::linear_nf4_few_kernel<Tile>, args, stream);
  }
};

template <class T>
struct RaggedPlan {
  const LinearProblem& p;
  Workspace workspace;

  explicit RaggedPlan(const LinearProblem& problem) : p(problem), workspace(p, 0, 0) {}

  template <int kTokens>
  cudaError_t launch_tokens(const T* h, cudaStream_t stream) const {
    const int64_t token_tiles = ceil_div(p.m, kTokens);
    const kernels::RaggedLinearArgs<T> args{.x = static_cast<const T*>(p.x),
                                            .packed = p.w.packed,
                                            .scales = tile::make_scale_view(p.w),
                                            .code = tile::make_code_view(p.w.code),
                                            .m = p.m,
                                            .n = p.w.n,
                                            .k = p.w.k,
                                            .h = h,
                                            .lora_b = static_cast<const T*>(p.lora.b),
                                            .rank = p.lora.rank,
                                            .bias = static_cast<const T*>(p.bias),
                                            .y = static_cast<T*>(p.y),
                                            .token_tiles = token_tiles};
    const auto grid = static_cast<unsigned>(token_tiles * ceil_div(p.w.n, kernels::kRaggedRows));
    return launch_kernel(kernels::linear_nf4_ragged_kernel<T, kTokens>, grid, kernels::kRaggedThreads, 0, stream, args);
  }

  std::string choice() const {
    return describe(fused_kernel(p.dtype, true),
                    {{"tokens", linear_ragged_tokens(p.m)}, {"rows", kernels::kRaggedRows}});
  }

  cudaError_t launch(void* memory, cudaStream_t stream) const {
    T* const h = static_cast<T*>(p.h ? p.h : memory);
    const cudaError_t error = launch_h(p, h, nullptr, 0, stream);
    if (error != cudaSuccess) return error;
    switch (linear_ragged_tokens(p.m)) {
      case 4:
        return launch_tokens<4>(h, stream);
      case 16:
        return launch_tokens<16>(h, stream);
      default:
        return launch_tokens<64>(h, stream);
    }
  }
};

// Calls use(Plan<Tile>) for this problem and device, whose kernel is kKernel.
template <template <class> class Plan, class Tile, auto kKernel, class Use>
cudaError_t with_tile(const LinearProblem& p, const Device& device, const Use& use) {
  int ctas = 0, cluster_ctas = 1;
  cudaError_t error = ctas_per_sm<kKernel>(device, Tile::kThreads, Tile::kSharedBytes, &ctas);
  if (error == cudaSuccess)
    error = ctas_per_cluster<kKernel>(device, Tile::kThreads, Tile::kSharedBytes, &cluster_ctas);
  return error == cudaSuccess ? use(Plan<Tile>(p, int64_t{device.sm_count} * ctas, cluster_ctas)) : error;
}

template <class Tile, class Use>
cudaError_t with_tensor_core_tile(const LinearProblem& p, const Device& device, const Use& use) {
  return with_tile<TensorCorePlan, Tile, kernels::linear_nf4_kernel<Tile>>(p, device, use);
}

template <class Tile, class Use>
cudaError_t with_few_tile(const LinearProblem& p, const Device& device, const Use& use) {
  return with_tile<FewPlan, Tile, kernels::linear_nf4_few_kernel<Tile>>(p, device, use);
}

// Calls use(plan) with the plan for this problem and device.
template <class T, class Use>
cudaError_t with_typed_plan(const LinearProblem& p, const Device& device, const Use& use) {
  if constexpr (sizeof(T) == 2) {
    if (!is_ragged(p)) {
      switch (linear_tile_size(p.m, device)) {
        case LinearTileSize::k4:
          return with_few_tile<tile::FewTile<T, 1>>(p, device, use);
        case LinearTileSize::k8:
          return with_few_tile<tile::FewTile<T, 2>>(p, device, use);
        case LinearTileSize::k16:
          return with_few_tile<tile::FewTile<T, 4>>(p, device, use);
        case LinearTileSize::k32:
          return with_tensor_core_tile<Tile32<T>>(p, device, use);
        case LinearTileSize::k64:
          return with_tensor_core_tile<Tile64<T>>(p, device, use);
      }
    }
  }
  return use(RaggedPlan<T>(p));
}

template <class Use>
cudaError_t with_plan(const LinearProblem& p, const Device& device, const Use& use) {
  switch (p.dtype) {
    case DType::kFloat32:
      return with_typed_plan<float>(p, device, use);
    case DType::kBFloat16:
      return with_typed_plan<bfloat16>(p, device, use);
    case DType::kFloat16:
      return with_typed_plan<float16>(p, device, use);
    case DType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t linear_nf4_choice(const LinearProblem& problem, const Device& device, std::string* choice) {
  if (sm90_takes(problem, device)) return *choice = linear_nf4_sm90_choice(problem, device), cudaSuccess;
  return with_plan(problem, device, [&](const auto& plan) {
    *choice = plan.choice();
    return cudaSuccess;
  });
}

cudaError_t launch_linear_nf4(const LinearProblem& problem, const Device& device, const Allocator& allocate,
                              cudaStream_t stream) {
  if (problem.m == 0 || problem.w.n == 0) return cudaSuccess;
  if (sm90_takes(problem, device)) return launch_linear_nf4_sm90(problem, device, allocate, stream);
  return with_plan(problem, device,
                   [&](const auto& plan) { return plan.launch(allocate(plan.workspace.end), stream); });
}

}  // namespace qlora::cuda
