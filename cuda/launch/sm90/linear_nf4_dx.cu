#include "cuda/launch/sm90/linear_nf4_dx.h"

#include "cuda/kernels/sm90/linear_nf4_dx.cuh"
#include "cuda/launch/any/low_rank.h"
#include "cuda/launch/choice.h"
#include "cuda/launch/sm90/clusters.h"

namespace qlora::cuda {
namespace {

template <class T>
using Tile64 = tile::DxSm90Tile<T, 64>;
template <class T>
using Tile128 = tile::DxSm90Tile<T, 128>;
template <class T>
using Tile256 = tile::DxSm90Tile<T, 256>;

Sm90Config config(const LinearDxProblem& p, const Device& device) { return dx_sm90_config(p.m, p.w.n, p.w.k, device); }

template <class Tile>
cudaError_t launch(const LinearDxProblem& p, const Sm90Config& c, const void* g, const Device& device,
                   cudaStream_t stream) {
  using T = typename Tile::T;
  CUtensorMap dy, packed;
  cudaError_t error = make_token_map<Tile>(p.dy, p.m, p.w.n, &dy);
  if (error == cudaSuccess) error = make_packed_map(p.w, Tile::kStageRows, &packed);
  if (error != cudaSuccess) return error;
  const kernels::DxSm90Args<T> args{
      .scales = tile::make_scale_view(p.w),
      .code = tile::make_code_view(p.w.code),
      .m = p.m,
      .n = p.w.n,
      .k = p.w.k,
      .g = {static_cast<const T*>(g), nullptr, p.lora.rank, p.m, p.w.n},
      .lora_a = static_cast<const T*>(p.lora.a),
      .dropout = p.lora.dropout,
      .out = {static_cast<T*>(p.dx), nullptr, nullptr, nullptr},
      .plan = make_sm90_plan(c, p.m, p.w.k, ceil_div(p.w.n, Tile::kStageRows), p.lora.rank)};
  return launch_sm90<kernels::linear_nf4_dx_sm90_kernel<Tile>, Tile>(device, c, dy, packed, args, stream);
}

template <class T>
cudaError_t launch_tokens(const LinearDxProblem& p, const void* g, const Device& device, cudaStream_t stream) {
  const Sm90Config c = config(p, device);
  switch (c.tokens) {
    case 64:
      return launch<Tile64<T>>(p, c, g, device, stream);
    case 128:
      return launch<Tile128<T>>(p, c, g, device, stream);
    default:
      return launch<Tile256<T>>(p, c, g, device, stream);
  }
}

}  // namespace

bool sm90_takes(const LinearDxProblem& p, const Device& device) {
  return sm90_takes(p.dtype, p.m, p.w, device) && p.w.n % 8 == 0;
}

std::string linear_nf4_dx_sm90_choice(const LinearDxProblem& p, const Device& device) {
  const Sm90Config c = config(p, device);
  return describe(Kernel::kHopper, {{"tokens", c.tokens}, {"columns", Sm90Config::kOutputs}, {"splits", c.splits}});
}

cudaError_t launch_linear_nf4_dx_sm90(const LinearDxProblem& p, const Device& device, const Allocator& allocate,
                                      cudaStream_t stream) {
  void* g = p.g;
  if (!g && p.lora.rank > 0) g = allocate(p.m * p.lora.rank * dtype_bytes(p.dtype));
  const cudaError_t error = launch_low_rank(g_problem(p.dtype, p.m, p.w.n, p.dy, p.lora, g), stream);
  if (error != cudaSuccess) return error;
  return p.dtype == DType::kBFloat16 ? launch_tokens<bfloat16>(p, g, device, stream)
                                     : launch_tokens<float16>(p, g, device, stream);
}

}  // namespace qlora::cuda
