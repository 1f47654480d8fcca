// The forward and dX on a decoded weight and cuBLAS.
#include "cuda/launch/generic/linear_library.h"

#include <algorithm>

#include "cuda/launch/generic/cublas.h"
#include "cuda/launch/generic/low_rank.h"
#include "cuda/launch/generic/low_rank_update.h"
#include "cuda/launch/generic/weight_panels.h"
#include "cuda/launch/workspace.h"
#include "cuda/tuning/library.h"

namespace qlora::cuda::library {
namespace {

// The workspace that all panels share, and what happens to every panel after it is decoded.
class Panels {
 public:
  // `low_rank` [m, rank]: the output for h or g, or null. `terms`: further terms of the sums, besides `inner`.
  Panels(DType dtype, int64_t m, int64_t inner, int64_t terms, int64_t panel, int64_t rank, void* low_rank,
         bool float32_sums, const Context& context)
      : dtype_(dtype), m_(m), inner_(inner + terms) {
    const int64_t bytes = dtype_bytes(dtype);
    Workspace parts;
    const int64_t weight = parts.add(panel * inner_ * bytes);
    const int64_t sums = parts.add(float32_sums ? m * panel * 4 : 0);
    const int64_t extended = parts.add(terms > 0 ? m * inner_ * bytes : 0);
    const int64_t own_low_rank = parts.add(low_rank || terms > 0 ? 0 : m * rank * bytes);
    uint8_t* const memory = context.allocate(parts.bytes());
    weight_ = memory + weight;
    sums_ = float32_sums ? reinterpret_cast<float*>(memory + sums) : nullptr;
    extended_ = terms > 0 ? memory + extended : nullptr;
    low_rank_ = low_rank || terms > 0 ? low_rank : memory + own_low_rank;
  }

  void* weight() const { return weight_; }
  void* low_rank() const { return low_rank_; }
  void* extended() const { return extended_; }

  // out [m, columns] = left · the decoded panel, which is [inner, columns] or, if `transposed`, [columns, inner]. If
  // there are further terms, extended() takes the place of left. `update` has out and what is added.
  cudaError_t multiply_by_panel(void* blas, const void* left, bool transposed, LowRankUpdate update,
                                cudaStream_t stream) const {
    const Matrix w{weight_, transposed ? inner_ : update.columns};
    if (sums_ == nullptr) {
      multiply(blas, dtype_, m_, update.columns, inner_, {extended_ ? extended_ : left, inner_}, w, transposed,
               update.out, update.out_stride, dtype_);
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
  void* extended_;
  void* low_rank_;
};

}  // namespace

cudaError_t launch(const LinearProblem& p, const Config& config, const Context& context) {
  const int64_t n = p.w.n, k = p.w.k, panel = config.panel, terms = further_terms(p, context.device);
  void* const blas = context.blas();
  const Panels panels(p.dtype, p.m, k, terms, panel, p.lora.rank, p.h, has_sums(p, context.device), context);
  LowRankProblem low_rank = h_problem(p.dtype, p.m, k, p.x, p.lora, panels.low_rank());
  low_rank.extended = {panels.extended(), terms, p.bias != nullptr};
  cudaError_t error = launch_low_rank(low_rank, context.stream);
  for (int64_t first = 0; first < n && error == cudaSuccess; first += panel) {
    const int64_t columns = std::min(panel, n - first);
    error = decode_panel(p, first, columns, panels.weight(), context, terms);
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
  const int64_t n = p.w.n, k = p.w.k, panel = config.panel, terms = further_terms(p, context.device);
  void* const blas = context.blas();
  const Panels panels(p.dtype, p.m, n, terms, panel, p.lora.rank, p.g, has_sums(p, context.device), context);
  LowRankProblem low_rank = g_problem(p.dtype, p.m, n, p.dy, p.lora, panels.low_rank());
  low_rank.extended = {panels.extended(), terms, false};
  cudaError_t error = launch_low_rank(low_rank, context.stream);
  for (int64_t first = 0; first < k && error == cudaSuccess; first += panel) {
    const int64_t columns = std::min(panel, k - first);
    error = decode_panel(p, first, columns, panels.weight(), context, terms);
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
