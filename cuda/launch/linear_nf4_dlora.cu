#include "cuda/launch/linear_nf4_dlora.h"

#include "cuda/kernels/linear_nf4_dlora.cuh"
#include "cuda/kernels/linear_nf4_dlora_exact.cuh"
#include "cuda/launch/choice.h"
#include "cuda/launch/device.h"
#include "cuda/launch/low_rank.h"

namespace qlora::cuda {
namespace {

bool is_ragged(const LoraGradProblem& p) {
  const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  return p.k % 8 != 0 || p.n % 8 != 0 || !aligned(p.x) || !aligned(p.dy);
}

// The launch's shape, and where the parts of the workspace begin, in bytes.
struct Plan {
  DLoraConfig config;
  int64_t a_tiles, column_tiles, rank_tiles;
  int64_t g, counters, partials, end;  // h lies at 0

  Plan(const LoraGradProblem& p, const Device& device)
      : config(dlora_config(p.m, p.n, p.k, p.lora.rank, fused_kernel(p.dtype, is_ragged(p)), device)) {
    a_tiles = ceil_div(p.k, kernels::kDLoraColumns);
    column_tiles = a_tiles + ceil_div(p.n, kernels::kDLoraColumns);
    rank_tiles = ceil_div(p.lora.rank, config.ranks);
    const auto round_up = [](int64_t bytes) { return ceil_div(bytes, 16) * 16; };
    const bool split = config.splits > 1;
    g = round_up(p.m * p.lora.rank * dtype_bytes(p.dtype));
    counters = 2 * g;
    partials = counters + (split ? round_up(4 * tiles()) : 0);
    end = partials + (split ? tiles() * config.splits * config.ranks * kernels::kDLoraColumns * 4 : 0);
  }

  int64_t tiles() const { return column_tiles * rank_tiles; }
};

cudaError_t launch_h_and_g(const LoraGradProblem& p, const Plan& plan, char* workspace, cudaStream_t stream) {
  LowRankProblem h;
  h.dtype = p.dtype;
  h.m = p.m;
  h.k = p.k;
  h.rank = p.lora.rank;
  h.x = p.x;
  h.a = p.lora.a;
  h.scaling = p.lora.scaling;
  h.dropout = p.lora.dropout;
  h.out = workspace;
  h.clear = reinterpret_cast<uint32_t*>(workspace + plan.counters);
  h.clear_count = plan.config.splits > 1 ? plan.tiles() : 0;
  if (const cudaError_t error = launch_low_rank(h, stream); error != cudaSuccess) return error;

  LowRankProblem g;
  g.dtype = p.dtype;
  g.m = p.m;
  g.k = p.n;
  g.rank = p.lora.rank;
  g.x = p.dy;
  g.a = p.lora.b;
  g.transposed = true;
  g.scaling = p.lora.scaling;
  g.out = workspace + plan.g;
  return launch_low_rank(g, stream);
}

kernels::DLoraArgs make_args(const LoraGradProblem& p, const Plan& plan, char* workspace) {
  kernels::DLoraArgs args;
  const bool dropout = p.lora.dropout.active();
  args.a = {
      p.x,    workspace + plan.g, p.da, p.k, dropout ? static_cast<float>(p.lora.dropout.keep_scale) : 1.0f, false,
      dropout};
  args.b = {p.dy, workspace, p.db, p.n, 1.0f, true, false};
  args.a_tiles = plan.a_tiles;
  args.m = p.m;
  args.rank = p.lora.rank;
  args.tokens_per_split = plan.config.tokens_per_split;
  args.splits = static_cast<int32_t>(plan.config.splits);
  args.dropout = p.lora.dropout;
  args.counters = reinterpret_cast<uint32_t*>(workspace + plan.counters);
  args.partials = reinterpret_cast<float*>(workspace + plan.partials);
  return args;
}

template <class T, bool kRagged>
void launch_ranks(const kernels::DLoraArgs& args, int64_t ranks, dim3 grid, cudaStream_t stream) {
  switch (ranks) {
    case 16:
      kernels::linear_nf4_dlora_kernel<T, 1, kRagged><<<grid, kernels::kDLoraThreads, 0, stream>>>(args);
      break;
    case 32:
      kernels::linear_nf4_dlora_kernel<T, 2, kRagged><<<grid, kernels::kDLoraThreads, 0, stream>>>(args);
      break;
    default:
      kernels::linear_nf4_dlora_kernel<T, 4, kRagged><<<grid, kernels::kDLoraThreads, 0, stream>>>(args);
      break;
  }
}

template <class T>
void launch(const kernels::DLoraArgs& args, const DLoraConfig& config, dim3 grid, cudaStream_t stream) {
  if (config.kernel == Kernel::kRagged) {
    launch_ranks<T, true>(args, config.ranks, grid, stream);
  } else {
    launch_ranks<T, false>(args, config.ranks, grid, stream);
  }
}

// The sums over no tokens.
cudaError_t clear(const LoraGradProblem& p, cudaStream_t stream) {
  const int64_t column = p.lora.rank * dtype_bytes(p.dtype);  // bytes of da per column of x, and of db per column of dy
  const cudaError_t error = p.k > 0 ? cudaMemsetAsync(p.da, 0, column * p.k, stream) : cudaSuccess;
  return error == cudaSuccess && p.n > 0 ? cudaMemsetAsync(p.db, 0, column * p.n, stream) : error;
}

}  // namespace

cudaError_t linear_nf4_dlora_workspace_bytes(const LoraGradProblem& p, int64_t* bytes) {
  *bytes = 0;
  if (p.lora.rank == 0 || p.m == 0) return cudaSuccess;
  Device device;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  *bytes = Plan(p, device).end;
  return cudaSuccess;
}

cudaError_t linear_nf4_dlora_choice(const LoraGradProblem& p, std::string* choice) {
  Device device;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  const DLoraConfig c = Plan(p, device).config;
  *choice = describe(c.kernel, {{"ranks", c.ranks}, {"columns", kernels::kDLoraColumns}, {"splits", c.splits}});
  return cudaSuccess;
}

cudaError_t launch_linear_nf4_dlora(const LoraGradProblem& p, void* workspace, cudaStream_t stream) {
  if (p.lora.rank == 0 || p.n + p.k == 0) return cudaSuccess;
  if (p.m == 0) return clear(p, stream);
  Device device;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  const Plan plan(p, device);
  char* const bytes = static_cast<char*>(workspace);
  if (const cudaError_t error = launch_h_and_g(p, plan, bytes, stream); error != cudaSuccess) return error;

  const kernels::DLoraArgs args = make_args(p, plan, bytes);
  const dim3 grid(static_cast<unsigned>(plan.column_tiles), static_cast<unsigned>(plan.rank_tiles),
                  static_cast<unsigned>(plan.config.splits));
  switch (p.dtype) {
    case DType::kFloat32:
      kernels::linear_nf4_dlora_exact_kernel<<<grid, kernels::kDLoraThreads, 0, stream>>>(args);
      break;
    case DType::kBFloat16:
      launch<bfloat16>(args, plan.config, grid, stream);
      break;
    case DType::kFloat16:
      launch<float16>(args, plan.config, grid, stream);
      break;
    case DType::kFloat64:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace qlora::cuda
