#include "cuda/launch/sm90/linear_nf4.h"

#include "cuda/kernels/sm90/linear_nf4.cuh"
#include "cuda/launch/any/low_rank.h"
#include "cuda/launch/choice.h"
#include "cuda/launch/sm90/clusters.h"

namespace qlora::cuda {
namespace {

template <class T>
using Tile64 = tile::LinearSm90Tile<T, 64>;
template <class T>
using Tile128 = tile::LinearSm90Tile<T, 128>;

Sm90Config config(const LinearProblem& p, const Device& device) {
  return linear_sm90_config(p.m, p.w.n, p.w.k, device);
}

template <class Tile>
cudaError_t launch(const LinearProblem& p, const Sm90Config& c, const void* h, const Device& device,
                   cudaStream_t stream) {
  using T = typename Tile::T;
  CUtensorMap x, packed;
  cudaError_t error = make_token_map<Tile>(p.x, p.m, p.w.k, &x);
  if (error == cudaSuccess) error = make_packed_map(p.w, Tile::kRows, &packed);
  if (error != cudaSuccess) return error;
  const kernels::LinearSm90Args<T> args{
      .scales = tile::make_scale_view(p.w),
      .code = tile::make_pair_view<T>(p.w.code),
      .m = p.m,
      .n = p.w.n,
      .k = p.w.k,
      .lora = {static_cast<const T*>(h), static_cast<const T*>(p.lora.b), p.lora.rank, p.m, p.w.n},
      .out = {static_cast<T*>(p.y), static_cast<const T*>(p.bias), nullptr, nullptr},
      .plan = make_sm90_plan(c, p.m, p.w.n, ceil_div(p.w.k, Tile::kStageK), p.lora.rank)};
  return launch_sm90<kernels::linear_nf4_sm90_kernel<Tile>, Tile>(device, c, x, packed, args, stream);
}

template <class T>
cudaError_t launch_tokens(const LinearProblem& p, const void* h, const Device& device, cudaStream_t stream) {
  const Sm90Config c = config(p, device);
  return c.tokens == 64 ? launch<Tile64<T>>(p, c, h, device, stream) : launch<Tile128<T>>(p, c, h, device, stream);
}

}  // namespace

bool sm90_takes(const LinearProblem& p, const Device& device) { return sm90_takes(p.dtype, p.m, p.w, device); }

std::string linear_nf4_sm90_choice(const LinearProblem& p, const Device& device) {
  const Sm90Config c = config(p, device);
  return describe(Kernel::kHopper, {{"tokens", c.tokens}, {"rows", Sm90Config::kOutputs}, {"splits", c.splits}});
}

cudaError_t launch_linear_nf4_sm90(const LinearProblem& p, const Device& device, const Allocator& allocate,
                                   cudaStream_t stream) {
  void* h = p.h;
  if (!h && p.lora.rank > 0) h = allocate(p.m * p.lora.rank * dtype_bytes(p.dtype));
  const cudaError_t error = launch_low_rank(h_problem(p.dtype, p.m, p.w.k, p.x, p.lora, h), stream);
  if (error != cudaSuccess) return error;
  return p.dtype == DType::kBFloat16 ? launch_tokens<bfloat16>(p, h, device, stream)
                                     : launch_tokens<float16>(p, h, device, stream);
}

}  // namespace qlora::cuda
