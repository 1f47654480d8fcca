// The forward and dX on a decoded weight and cuBLAS.
#include "cuda/launch/any/linear_library.h"

#include <algorithm>

#include "cuda/launch/any/cublas.h"
#include "cuda/launch/any/low_rank.h"
#include "cuda/launch/any/low_rank_update.h"
#include "cuda/launch/any/weight_panels.h"
#include "cuda/launch/workspace.h"
#include "cuda/tuning/library.h"

namespace qlora::cuda::library {
namespace {

// The workspace that all panels share, and what happens to every panel after it is decoded.
class Panels {
 public:
  // `low_rank` [m, rank]: the output for h or g, or null.
  Panels(DType dtype, int64_t m, int64_t inner, int64_t panel, int64_t rank, void* low_rank, bool float32_sums,
         const Context& context)
      : dtype_(dtype), m_(m), inner_(inner) {
    Workspace parts;
    const int64_t weight = parts.add(panel * inner * dtype_bytes(dtype));
    const int64_t sums = parts.add(float32_sums ? m * panel * 4 : 0);
    const int64_t own_low_rank = parts.add(low_rank ? 0 : m * rank * dtype_bytes(dtype));
    uint8_t* const memory = context.allocate(parts.bytes());
    weight_ = memory + weight;
    sums_ = float32_sums ? reinterpret_cast<float*>(memory + sums) : nullptr;
    low_rank_ = low_rank ? low_rank : memory + own_low_rank;
  }

  void* weight() const { return weight_; }
  void* low_rank() const { return low_rank_; }

  // out [m, columns] = left · the decoded panel, which is [inner, columns] or, if `transposed`, [columns, inner].
  // `update` has out and what is added.
  cudaError_t multiply_by_panel(void* blas, const void* left, bool transposed, LowRankUpdate update,
                                cudaStream_t stream) const {
    const Matrix w{weight_, transposed ? inner_ : update.columns};
    if (sums_ == nullptr) {
      multiply(blas, dtype_, m_, update.columns, inner_, {left, inner_}, w, transposed, update.out, update.out_stride,
               dtype_);
      return cudaSuccess;
    }
    multiply(blas, dtype_, m_, update.columns, inner_, {left, inner_}, w, transposed, sums_, update.columns,
             DType::kFloat32);
    update.dtype = dtype_;
    update.m = m_;
    update.sum = sums_;
    update.left = low_rank_;
    return launch_low_rank_update(update, stream);
  }

 private:
  DType dtype_;
  int64_t m_, inner_;
  void* weight_;
  float* sums_;
  void* low_rank_;
};

const void* element(const void* base, int64_t index, DType dtype) {
  return base == nullptr ? nullptr : static_cast<const uint8_t*>(base) + index * dtype_bytes(dtype);
}
void* element(void* base, int64_t index, DType dtype) {
  return static_cast<uint8_t*>(base) + index * dtype_bytes(dtype);
}

}  // namespace

cudaError_t launch(const LinearProblem& p, const Config& config, const Context& context) {
  const int64_t n = p.w.n, k = p.w.k, panel = config.panel;
  void* const blas = context.blas();
  const Panels panels(p.dtype, p.m, k, panel, p.lora.rank, p.h, has_sums(p), context);
  cudaError_t error = launch_low_rank(h_problem(p.dtype, p.m, k, p.x, p.lora, panels.low_rank()), context.stream);
  for (int64_t first = 0; first < n && error == cudaSuccess; first += panel) {
    const int64_t columns = std::min(panel, n - first);
    error = decode_panel(p, first, columns, panels.weight(), context);
    if (error != cudaSuccess) break;
    error = panels.multiply_by_panel(blas, p.x, true,
                                     {.columns = columns,
                                      .rank = p.lora.rank,
                                      .right = element(p.lora.b, first * p.lora.rank, p.dtype),
                                      .rank_stride = 1,
                                      .column_stride = p.lora.rank,
                                      .bias = element(p.bias, first, p.dtype),
                                      .out = element(p.y, first, p.dtype),
                                      .out_stride = n,
                                      .dropout = {}},
                                     context.stream);
  }
  return error;
}

cudaError_t launch(const LinearDxProblem& p, const Config& config, const Context& context) {
  const int64_t n = p.w.n, k = p.w.k, panel = config.panel;
  void* const blas = context.blas();
  const Panels panels(p.dtype, p.m, n, panel, p.lora.rank, p.g, has_sums(p), context);
  cudaError_t error = launch_low_rank(g_problem(p.dtype, p.m, n, p.dy, p.lora, panels.low_rank()), context.stream);
  for (int64_t first = 0; first < k && error == cudaSuccess; first += panel) {
    const int64_t columns = std::min(panel, k - first);
    error = decode_panel(p, first, columns, panels.weight(), context);
    if (error != cudaSuccess) break;
    error = panels.multiply_by_panel(blas, p.dy, false,
                                     {.columns = columns,
                                      .rank = p.lora.rank,
                                      .right = element(p.lora.a, first, p.dtype),
                                      .rank_stride = k,
                                      .column_stride = 1,
                                      .out = element(p.dx, first, p.dtype),
                                      .out_stride = k,
                                      .dropout = p.lora.dropout,
                                      .first_column = first},
                                     context.stream);
  }
  return error;
}

}  // namespace qlora::cuda::library
