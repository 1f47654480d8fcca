#include "cuda/launch/sm80/grouped_linear_nf4_dlora.h"

#include "cuda/kernels/sm80/grouped_linear_nf4_dlora.cuh"
#include "cuda/launch/any/grouped_low_rank.h"
#include "cuda/launch/choice.h"
#include "cuda/launch/launch.h"
#include "cuda/launch/sm80/ragged.h"

namespace qlora::cuda {
namespace {

Kernel kernel_of(const LoraGradProblem& p) { return fused_kernel(p.dtype, is_ragged(p)); }

// Of h or g.
int64_t low_rank_bytes(const LoraGradProblem& p) { return ceil_div(p.m * p.lora.rank * dtype_bytes(p.dtype), 16) * 16; }

kernels::GroupedDLoraArgs make_args(const Grouped<LoraGradProblem>& problem, const void* h, const void* g) {
  const LoraGradProblem& p = problem.stack;
  const Dropout& dropout = p.lora.dropout;
  kernels::GroupedDLoraArgs args{};
  args.stack.a = {.wide = p.x,
                  .low_rank = g,
                  .out = p.da,
                  .columns = p.k,
                  .factor = dropout.active() ? static_cast<float>(dropout.keep_scale) : 1.0f,
                  .columns_first = false,
                  .masked = dropout.active()};
  args.stack.b = {
      .wide = p.dy, .low_rank = h, .out = p.db, .columns = p.n, .factor = 1.0f, .columns_first = true, .masked = false};
  args.stack.a_tiles = ceil_div(p.k, kernels::kDLoraColumns);
  args.stack.m = p.m;
  args.stack.rank = p.lora.rank;
  args.stack.splits = 1;
  args.stack.dropout = dropout;
  args.groups = {problem.offsets, problem.experts, p.m};
  args.column_tiles = static_cast<uint32_t>(args.stack.a_tiles + ceil_div(p.n, kernels::kDLoraColumns));
  return args;
}

using GroupedDLoraKernel = void (*)(const kernels::GroupedDLoraArgs);

template <class T, bool kRagged>
GroupedDLoraKernel on_tensor_cores(int64_t ranks) {
  switch (ranks) {
    case 16:
      return kernels::grouped_linear_nf4_dlora_kernel<T, 1, kRagged>;
    case 32:
      return kernels::grouped_linear_nf4_dlora_kernel<T, 2, kRagged>;
    default:
      return kernels::grouped_linear_nf4_dlora_kernel<T, 4, kRagged>;
  }
}

template <class T>
GroupedDLoraKernel on_tensor_cores(Kernel kernel, int64_t ranks) {
  return kernel == Kernel::kRagged ? on_tensor_cores<T, true>(ranks) : on_tensor_cores<T, false>(ranks);
}

GroupedDLoraKernel dlora_kernel(DType dtype, Kernel kernel, int64_t ranks) {
  if (dtype == DType::kBFloat16) return on_tensor_cores<bfloat16>(kernel, ranks);
  if (dtype == DType::kFloat16) return on_tensor_cores<float16>(kernel, ranks);
  return kernels::grouped_linear_nf4_dlora_exact_kernel;
}

}  // namespace

cudaError_t grouped_linear_nf4_dlora_choice(const Grouped<LoraGradProblem>& problem, const Device&,
                                            std::string* choice) {
  const LoraGradProblem& p = problem.stack;
  const Kernel kernel = kernel_of(p);
  *choice = describe(kernel, {{"ranks", dlora_ranks(p.lora.rank, kernel)}, {"columns", kernels::kDLoraColumns}});
  return cudaSuccess;
}

cudaError_t launch_grouped_linear_nf4_dlora(const Grouped<LoraGradProblem>& problem, const Device&,
                                            const Allocator& allocate, cudaStream_t stream) {
  const LoraGradProblem& p = problem.stack;
  if (problem.experts == 0 || p.lora.rank == 0 || p.n + p.k == 0) return cudaSuccess;
  const int64_t bytes = low_rank_bytes(p);
  char* const workspace = p.h && p.g ? nullptr : static_cast<char*>(allocate(2 * bytes));
  const auto launch = [&](const LowRankProblem& low_rank) {
    return launch_grouped_low_rank({low_rank, problem.offsets, problem.experts}, stream);
  };
  cudaError_t error = cudaSuccess;
  if (!p.h) error = launch(h_problem(p.dtype, p.m, p.k, p.x, p.lora, workspace));
  if (!p.g && error == cudaSuccess) error = launch(g_problem(p.dtype, p.m, p.n, p.dy, p.lora, workspace + bytes));
  if (error != cudaSuccess) return error;

  const kernels::GroupedDLoraArgs args = make_args(problem, p.h ? p.h : workspace, p.g ? p.g : workspace + bytes);
  const Kernel kernel = kernel_of(p);
  const int64_t ranks = dlora_ranks(p.lora.rank, kernel);
  const dim3 grid(static_cast<unsigned>(args.column_tiles * problem.experts),
                  static_cast<unsigned>(ceil_div(p.lora.rank, ranks)));
  return launch_kernel(dlora_kernel(p.dtype, kernel, ranks), grid, kernels::kDLoraThreads, 0, stream, args);
}

}  // namespace qlora::cuda
