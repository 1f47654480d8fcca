#include "cuda/launch/any/linear_library.h"

#include <algorithm>
#include <numeric>

#include "cuda/launch/any/codec.h"
#include "cuda/launch/any/cublas.h"
#include "cuda/launch/any/low_rank.h"
#include "cuda/launch/any/low_rank_update.h"
#include "cuda/tuning.h"

namespace qlora::cuda {
namespace {

constexpr int64_t kPanelStep = 256;  // columns: fits a GEMM's tiles and vector accesses

bool has_sums(const LinearProblem& p) { return p.lora.rank > 0 || p.bias != nullptr; }
bool has_sums(const LinearDxProblem& p) { return p.lora.rank > 0; }

// The workspace that all panels share, and what happens to every panel after it is decoded.
class Panels {
 public:
  // `low_rank` [m, rank]: the output for h or g, or null.
  Panels(DType dtype, int64_t m, int64_t inner, int64_t panel, int64_t rank, void* low_rank, bool float32_sums,
         const Allocator& allocate)
      : dtype_(dtype), m_(m), inner_(inner) {
    const auto round_up = [](int64_t bytes) { return ceil_div(bytes, 16) * 16; };
    const int64_t weight = round_up(panel * inner * dtype_bytes(dtype));
    const int64_t sums = float32_sums ? round_up(m * panel * 4) : 0;
    uint8_t* const memory =
        static_cast<uint8_t*>(allocate(weight + sums + (low_rank ? 0 : m * rank * dtype_bytes(dtype))));
    weight_ = memory;
    sums_ = float32_sums ? reinterpret_cast<float*>(memory + weight) : nullptr;
    low_rank_ = low_rank ? low_rank : memory + weight + sums;
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

// Rows of w are contiguous, and decoding is fast if it begins at a multiple of the largest block.
int64_t library_panel(const LinearProblem& p, const Device& device) {
  const int64_t step = std::max(kPanelStep, kMaxBlockSize / std::gcd(kMaxBlockSize, std::max<int64_t>(p.w.k, 1)));
  return library_panel_columns(p.m, p.w.k, p.w.n, step, has_sums(p), p.dtype, device);
}

int64_t library_panel(const LinearDxProblem& p, const Device& device) {
  return library_panel_columns(p.m, p.w.n, p.w.k, kPanelStep, has_sums(p), p.dtype, device);
}

cudaError_t launch_linear_by_library(const LinearProblem& p, const Device& device, void* blas,
                                     const Allocator& allocate, cudaStream_t stream) {
  const int64_t n = p.w.n, k = p.w.k, panel = library_panel(p, device);
  const Panels panels(p.dtype, p.m, k, panel, p.lora.rank, p.h, has_sums(p), allocate);
  cudaError_t error = launch_low_rank(h_problem(p.dtype, p.m, k, p.x, p.lora, panels.low_rank()), stream);
  for (int64_t first = 0; first < n && error == cudaSuccess; first += panel) {
    const int64_t columns = std::min(panel, n - first);
    error = launch_dequantize_nf4(p.w, {.first = first * k, .columns = columns * k}, p.dtype, panels.weight(), true,
                                  device, stream);
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
                                     stream);
  }
  return error;
}

cudaError_t launch_linear_dx_by_library(const LinearDxProblem& p, const Device& device, void* blas,
                                        const Allocator& allocate, cudaStream_t stream) {
  const int64_t n = p.w.n, k = p.w.k, panel = library_panel(p, device);
  const Panels panels(p.dtype, p.m, n, panel, p.lora.rank, p.g, has_sums(p), allocate);
  cudaError_t error = launch_low_rank(g_problem(p.dtype, p.m, n, p.dy, p.lora, panels.low_rank()), stream);
  for (int64_t first = 0; first < k && error == cudaSuccess; first += panel) {
    const int64_t columns = std::min(panel, k - first);
    const PackedPart whole{.columns = n * k}, part{.first = first, .rows = n, .columns = columns, .stride = k};
    error = launch_dequantize_nf4(p.w, columns == k ? whole : part, p.dtype, panels.weight(), true, device, stream);
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
                                     stream);
  }
  return error;
}

}  // namespace qlora::cuda
