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
  // `low_rank` [m, rank]: the output for h or g, or null. `inner`: terms of a panel. `terms`: further terms of the
  // sums.
  Panels(DType dtype, int64_t m, int64_t inner, int64_t terms, int64_t panel, int64_t rank, void* low_rank,
         bool float32_sums, const Context& context)
      : dtype_(dtype), m_(m), terms_(terms) {
    const int64_t bytes = dtype_bytes(dtype);
    Workspace parts;
    const int64_t weight = parts.add(panel * (inner + terms) * bytes);
    const int64_t sums = parts.add(float32_sums ? m * panel * 4 : 0);
    const int64_t extended = parts.add(terms > 0 ? m * (inner + terms) * bytes : 0);
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

  // out [m, columns] = left [m, inner] · the decoded panel, which is [inner, columns] or, if `transposed`,
  // [columns, inner]. If there are further terms, extended() takes the place of left. If there are sums, they take the
  // place of out, and a panel that does not begin with the first term is added to them.
  void multiply_by_panel(void* blas, Matrix left, bool transposed, const PanelRange& panel, void* out,
                         int64_t out_stride) const {
    const int64_t inner = panel.inner + terms_;
    const Matrix w{weight_, transposed ? inner : panel.columns};
    if (sums_ == nullptr)
      multiply(blas, dtype_, m_, panel.columns, inner, extended_ ? Matrix{extended_, inner} : left, w, transposed,
               false, out, out_stride, dtype_);
    else
      multiply(blas, dtype_, m_, panel.columns, inner, left, w, transposed, panel.first_term > 0, sums_, panel.columns,
               DType::kFloat32);
  }

  // Adds LoRA and bias to the sums, if there are sums, and rounds. `update` has out and what is added.
  cudaError_t finish(LowRankUpdate update, cudaStream_t stream) const {
    if (sums_ == nullptr) return cudaSuccess;
    update.dtype = dtype_;
    update.m = m_;
    update.sum = sums_;
    update.left = low_rank_;
    return launch_low_rank_update(update, stream);
  }

 private:
  DType dtype_;
  int64_t m_, terms_;
  void* weight_;
  float* sums_;
  void* extended_;
  void* low_rank_;
};

}  // namespace

cudaError_t launch(const LinearProblem& p, const Config& config, const Context& context) {
  const int64_t n = p.w.n, k = p.w.k, part = part_terms(k, config.splits);
  const int64_t terms = config.splits == 1 ? further_terms(p, context.device) : 0;
  const bool float32_sums = product(p, context.device, config.splits).float32_sums;
  void* const blas = context.blas();
  const Panels panels(p.dtype, p.m, part, terms, config.panel, p.lora.rank, p.h, float32_sums, context);
  LowRankProblem low_rank = h_problem(p.dtype, p.m, k, p.x, p.lora, panels.low_rank());
  low_rank.extended = {panels.extended(), terms, p.bias != nullptr};
  cudaError_t error = launch_low_rank(low_rank, context.stream);
  for (int64_t first = 0; first < n && error == cudaSuccess; first += config.panel) {
    const int64_t columns = std::min(config.panel, n - first);
    void* const out = element(p.y, first, p.dtype);
    for (int64_t term = 0; term < k && error == cudaSuccess; term += part) {
      const PanelRange panel{first, columns, term, std::min(part, k - term)};
      error = decode_panel(p, panel, panels.weight(), context, terms);
      if (error == cudaSuccess) panels.multiply_by_panel(blas, {element(p.x, term, p.dtype), k}, true, panel, out, n);
    }
    if (error != cudaSuccess) break;
    error = panels.finish({.columns = columns,
                           .rank = p.lora.rank,
                           .right = element(p.lora.b, first * p.lora.rank, p.dtype),
                           .rank_stride = 1,
                           .column_stride = p.lora.rank,
                           .bias = element(p.bias, first, p.dtype),
                           .out = out,
                           .out_stride = n,
                           .dropout = {}},
                          context.stream);
  }
  return error;
}

cudaError_t launch(const LinearDxProblem& p, const Config& config, const Context& context) {
  const int64_t n = p.w.n, k = p.w.k, part = part_terms(n, config.splits);
  const int64_t terms = config.splits == 1 ? further_terms(p, context.device) : 0;
  const bool float32_sums = product(p, context.device, config.splits).float32_sums;
  void* const blas = context.blas();
  const Panels panels(p.dtype, p.m, part, terms, config.panel, p.lora.rank, p.g, float32_sums, context);
  LowRankProblem low_rank = g_problem(p.dtype, p.m, n, p.dy, p.lora, panels.low_rank());
  low_rank.extended = {panels.extended(), terms, false};
  cudaError_t error = launch_low_rank(low_rank, context.stream);
  for (int64_t first = 0; first < k && error == cudaSuccess; first += config.panel) {
    const int64_t columns = std::min(config.panel, k - first);
    void* const out = element(p.dx, first, p.dtype);
    for (int64_t term = 0; term < n && error == cudaSuccess; term += part) {
      const PanelRange panel{first, columns, term, std::min(part, n - term)};
      error = decode_panel(p, panel, panels.weight(), context, terms);
      if (error == cudaSuccess) panels.multiply_by_panel(blas, {element(p.dy, term, p.dtype), n}, false, panel, out, k);
    }
    if (error != cudaSuccess) break;
    error = panels.finish({.columns = columns,
                           .rank = p.lora.rank,
                           .right = element(p.lora.a, first, p.dtype),
                           .rank_stride = k,
                           .column_stride = 1,
                           .out = out,
                           .out_stride = k,
                           .dropout = p.lora.dropout,
                           .first_column = first},
                          context.stream);
  }
  return error;
}

}  // namespace qlora::cuda::library
