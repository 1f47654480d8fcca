// The operators on CUDA: tensors -> views -> launchers, on the tensors' device and torch's current stream.
#include <cuda_runtime_api.h>

#include <tuple>

#include "cpp/format/print_kernels.h"
#include "cpp/ops/calls.h"
#include "cpp/ops/value_error.h"
#include "cuda/launch/choice.h"
#include "cuda/launch/codec.h"
#include "cuda/launch/device.h"
#include "cuda/launch/dropout.h"
#include "cuda/launch/linear_nf4.h"
#include "cuda/launch/linear_nf4_dlora.h"
#include "cuda/launch/linear_nf4_dx.h"
#include "cuda/launch/low_rank.h"
#include "cuda/tuning.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

namespace qlora {
namespace {

// Makes the device of `like` current for a scope, and knows torch's stream there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& like) : guard_(like.get_device_index()) {
    void* stream = nullptr;  // Stream::nativeHandle() needs torch 2.13
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

void check_launch(const char* op, cudaError_t error) {
  if (error == cudaSuccess) [[likely]]
    return;
  throw std::runtime_error(std::string(op) + ": CUDA launch failed: " + cudaGetErrorName(error) + " (" +
                           cudaGetErrorString(error) + ")");
}

// A launcher's choice, printed where QLORA_PRINT_KERNELS asks for it.
template <class Problem>
void print_choice(const char* op, const Problem& problem, cudaError_t (*choice)(const Problem&, std::string*)) {
  print_kernel(op, "cuda", problem, [&] {
    std::string text;
    check_launch(op, choice(problem, &text));
    return text;
  });
}

std::tuple<Tensor, Tensor> quantize_nf4(const Tensor& w_arg, int64_t block_size) {
  const DType dtype = checks::storage_dtype("w", w_arg.scalar_type());
  checks::block_size("block_size", block_size);
  const int64_t numel = checks::numel("w", w_arg);
  const OnDevice device(w_arg);
  const Tensor w = w_arg.is_contiguous() ? w_arg : stable::contiguous(w_arg);
  Tensor packed = stable::new_empty(w, checks::packed_shape(w), ScalarType::Byte);
  Tensor absmax = stable::new_empty(w, {ceil_div(numel, block_size)}, ScalarType::Float);
  check_launch("quantize_nf4", cuda::launch_quantize_nf4(dtype, w.const_data_ptr(), numel, block_size,
                                                         packed.mutable_data_ptr<uint8_t>(),
                                                         absmax.mutable_data_ptr<float>(), device.stream()));
  return {packed, absmax};
}

std::tuple<Tensor, Tensor, Tensor> quantize_absmax(const Tensor& absmax_arg, int64_t nested_block_size) {
  checks::has_dtype("absmax", absmax_arg, ScalarType::Float);
  checks::nested_block_size(nested_block_size);
  const int64_t count = checks::numel("absmax", absmax_arg);
  const OnDevice device(absmax_arg);
  const Tensor absmax = absmax_arg.is_contiguous() ? absmax_arg : stable::contiguous(absmax_arg);
  Tensor codes = stable::new_empty(absmax, {count}, ScalarType::Byte);
  Tensor nested_absmax = stable::new_empty(absmax, {ceil_div(count, nested_block_size)});
  Tensor nested_offset = stable::new_empty(absmax, {});
  Tensor workspace = stable::new_empty(absmax, {cuda::quantize_absmax_workspace(count)}, ScalarType::Double);
  check_launch("quantize_absmax",
               cuda::launch_quantize_absmax(absmax.const_data_ptr<float>(), count, nested_block_size,
                                            codes.mutable_data_ptr<uint8_t>(), nested_absmax.mutable_data_ptr<float>(),
                                            nested_offset.mutable_data_ptr<float>(),
                                            workspace.mutable_data_ptr<double>(), device.stream()));
  return {codes, nested_absmax, nested_offset};
}

Tensor dequantize_absmax(const Tensor& codes, const Tensor& nested_absmax, const Tensor& nested_offset,
                         int64_t nested_block_size) {
  const Scales scales = checks::nested_scales("codes", codes, nested_absmax, nested_offset, nested_block_size);
  const OnDevice device(codes);
  Tensor absmax = stable::new_empty(codes, {codes.numel()}, ScalarType::Float);
  check_launch("dequantize_absmax", cuda::launch_dequantize_absmax(scales, codes.numel(),
                                                                   absmax.mutable_data_ptr<float>(), device.stream()));
  return absmax;
}

Tensor dequantize_nf4(const Tensor& packed, const Tensor& absmax, OptionalTensor nested_absmax,
                      OptionalTensor nested_offset, int64_t block_size, int64_t nested_block_size,
                      std::vector<int64_t> shape, ScalarType dtype) {
  const DType out_dtype = checks::storage_dtype("dtype", dtype);
  const int64_t numel = checks::shape_numel(shape);
  const Weight w =
      checks::weight({packed, absmax, nested_absmax, nested_offset, block_size, nested_block_size}, 1, numel);
  const OnDevice device(packed);
  Tensor out = stable::new_empty(packed, shape, dtype);
  check_launch("dequantize_nf4", cuda::launch_dequantize_nf4(w.packed, w.scales, 0, numel, out_dtype,
                                                             out.mutable_data_ptr(), device.stream()));
  return out;
}

// Memory for a launcher's own use, from torch's allocator, which keeps it alive until the stream is past the launch.
Tensor workspace(const Tensor& like, int64_t bytes) { return stable::new_empty(like, {bytes}, ScalarType::Byte); }

// A matrix in memory that something else owns.
Tensor matrix(const void* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride,
              const Tensor& like) {
  return stable::from_blob(const_cast<void*>(data), {rows, cols}, {row_stride, col_stride}, like.device(),
                           like.scalar_type());
}

// out = a · b, or out += a · b rounded once: torch's own library GEMM.
void multiply(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  if (add) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()));
  }
}

// LoRA's low-rank product [m, rank], written to `out`: h of the forward, g of the backward.
void low_rank(const char* op, cuda::LowRankProblem problem, DType dtype, const Lora& lora, void* out,
              cudaStream_t stream) {
  problem.dtype = dtype;
  problem.rank = lora.rank;
  problem.scaling = lora.scaling;
  problem.out = out;
  check_launch(op, cuda::launch_low_rank(problem, stream));
}

// Many tokens: w is decoded a panel of rows at a time into one workspace, and multiplied by torch's library. Bias and
// LoRA come first, so that each element of y is summed in float32 over all of k on top of them, and rounded at the end.
void linear_by_library(const LinearCall& call, cudaStream_t stream) {
  constexpr const char* kOp = "linear_nf4";
  const auto& [dtype, m, x_data, w, bias_data, lora, y_data] = call.problem;
  const int64_t n = w.n, k = w.k, element = dtype_bytes(dtype);
  const int64_t panel_rows = cuda::library_panel_rows(n, k, dtype);
  print_kernel(kOp, "cuda", call.problem,
               [&] { return cuda::describe(cuda::Kernel::kLibrary, {{"panel_rows", panel_rows}}); });
  Tensor workspace = stable::new_empty(call.x, {panel_rows * k + m * lora.rank});
  uint8_t* const panel = static_cast<uint8_t*>(workspace.mutable_data_ptr());

  const bool has_lora = lora.rank > 0;
  Tensor y = matrix(y_data, m, n, n, 1, call.y);
  if (bias_data) stable::copy_(y, matrix(bias_data, m, n, 0, 1, call.x));
  if (has_lora) {
    void* const h_data = panel + panel_rows * k * element;
    low_rank(kOp, {.m = m, .k = k, .x = x_data, .a = lora.a, .dropout = lora.dropout}, dtype, lora, h_data, stream);
    multiply(y, matrix(h_data, m, lora.rank, lora.rank, 1, call.x), matrix(lora.b, lora.rank, n, 1, lora.rank, call.x),
             bias_data != nullptr);
  }
  const Tensor x = matrix(x_data, m, k, k, 1, call.x);
  for (int64_t first = 0; first < n; first += panel_rows) {
    const int64_t rows = std::min(panel_rows, n - first);
    check_launch(kOp, cuda::launch_dequantize_nf4(w.packed, w.scales, first * k, rows * k, dtype, panel, stream));
    const Tensor part = matrix(static_cast<uint8_t*>(y_data) + first * element, m, rows, n, 1, call.y);
    multiply(part, x, matrix(panel, k, rows, 1, k, call.x), bias_data || has_lora);
  }
}

// The same for dx, with the whole of w decoded: see library_takes_dx.
void linear_dx_by_library(const LinearDxCall& call, cudaStream_t stream) {
  constexpr const char* kOp = "linear_nf4_dx";
  const auto& [dtype, m, dy_data, w, lora, dx_data] = call.problem;
  const int64_t n = w.n, k = w.k;
  print_kernel(kOp, "cuda", call.problem, [] { return cuda::describe(cuda::Kernel::kLibrary); });
  Tensor workspace = stable::new_empty(call.dy, {n * k + m * lora.rank});
  uint8_t* const decoded = static_cast<uint8_t*>(workspace.mutable_data_ptr());
  check_launch(kOp, cuda::launch_dequantize_nf4(w.packed, w.scales, 0, n * k, dtype, decoded, stream));

  const Tensor dx = matrix(dx_data, m, k, k, 1, call.dx);
  const Tensor dy = matrix(dy_data, m, n, n, 1, call.dy);
  const Tensor weight = matrix(decoded, n, k, k, 1, call.dy);
  if (lora.rank > 0) {
    void* const g_data = decoded + n * k * dtype_bytes(dtype);
    low_rank(kOp, {.m = m, .k = n, .x = dy_data, .a = lora.b, .transposed = true}, dtype, lora, g_data, stream);
    multiply(dx, matrix(g_data, m, lora.rank, lora.rank, 1, call.dy), matrix(lora.a, lora.rank, k, k, 1, call.dy),
             false);
    check_launch(kOp, cuda::launch_dropout(dtype, dx_data, m * k, lora.dropout, stream));
  }
  multiply(dx, dy, weight, lora.rank > 0);
}

bool library_is_ahead(DType dtype, int64_t m, const Weight& w) {
  cuda::Device device;
  check_launch("device", cuda::current_device(&device));
  return m >= cuda::library_crossover(dtype, w.k, w.scales.block_size, device);
}

Tensor linear_nf4(const Tensor& x, const Tensor& packed, const Tensor& absmax, OptionalTensor nested_absmax,
                  OptionalTensor nested_offset, int64_t block_size, int64_t nested_block_size, int64_t out_features,
                  OptionalTensor bias, OptionalTensor lora_a, OptionalTensor lora_b, double scaling, double dropout_p,
                  int64_t seed) {
  const LinearCall call(x, {packed, absmax, nested_absmax, nested_offset, block_size, nested_block_size}, out_features,
                        bias, lora_a, lora_b, scaling, dropout_p, seed);
  if (call.is_empty()) return call.y;
  const OnDevice device(x);
  const auto& p = call.problem;
  if (library_is_ahead(p.dtype, p.m, p.w)) {
    linear_by_library(call, device.stream());
    return call.y;
  }
  print_choice("linear_nf4", p, cuda::linear_nf4_choice);
  int64_t bytes = 0;
  check_launch("linear_nf4", cuda::linear_nf4_workspace_bytes(p, &bytes));
  Tensor scratch = workspace(x, bytes);
  check_launch("linear_nf4", cuda::launch_linear_nf4(p, scratch.mutable_data_ptr(), device.stream()));
  return call.y;
}

Tensor linear_nf4_dx(const Tensor& dy, const Tensor& packed, const Tensor& absmax, OptionalTensor nested_absmax,
                     OptionalTensor nested_offset, int64_t block_size, int64_t nested_block_size, int64_t in_features,
                     OptionalTensor lora_a, OptionalTensor lora_b, double scaling, double dropout_p, int64_t seed) {
  const LinearDxCall call(dy, {packed, absmax, nested_absmax, nested_offset, block_size, nested_block_size},
                          in_features, lora_a, lora_b, scaling, dropout_p, seed);
  if (call.is_empty()) return call.dx;
  const OnDevice device(dy);
  const auto& p = call.problem;
  if (library_is_ahead(p.dtype, p.m, p.w) && cuda::library_takes_dx(p.w.n, p.w.k, p.dtype)) {
    linear_dx_by_library(call, device.stream());
    return call.dx;
  }
  print_choice("linear_nf4_dx", p, cuda::linear_nf4_dx_choice);
  int64_t bytes = 0;
  check_launch("linear_nf4_dx", cuda::linear_nf4_dx_workspace_bytes(p, &bytes));
  Tensor scratch = workspace(dy, bytes);
  check_launch("linear_nf4_dx", cuda::launch_linear_nf4_dx(p, scratch.mutable_data_ptr(), device.stream()));
  return call.dx;
}

std::tuple<Tensor, Tensor> linear_nf4_dlora(const Tensor& dy, const Tensor& x, const Tensor& lora_a,
                                            const Tensor& lora_b, double scaling, double dropout_p, int64_t seed) {
  const LoraGradCall call(dy, x, lora_a, lora_b, scaling, dropout_p, seed);
  if (call.is_empty()) return {call.da, call.db};
  const OnDevice device(dy);
  if (call.problem.m > 0) print_choice("linear_nf4_dlora", call.problem, cuda::linear_nf4_dlora_choice);
  int64_t bytes = 0;
  check_launch("linear_nf4_dlora", cuda::linear_nf4_dlora_workspace_bytes(call.problem, &bytes));
  Tensor scratch = workspace(dy, bytes);
  check_launch("linear_nf4_dlora",
               cuda::launch_linear_nf4_dlora(call.problem, scratch.mutable_data_ptr(), device.stream()));
  return {call.da, call.db};
}

}  // namespace
}  // namespace qlora

STABLE_TORCH_LIBRARY_IMPL(qlora, CUDA, m) {
  m.impl("quantize_nf4", QLORA_BOX(&qlora::quantize_nf4));
  m.impl("quantize_absmax", QLORA_BOX(&qlora::quantize_absmax));
  m.impl("dequantize_absmax", QLORA_BOX(&qlora::dequantize_absmax));
  m.impl("dequantize_nf4", QLORA_BOX(&qlora::dequantize_nf4));
  m.impl("linear_nf4", QLORA_BOX(&qlora::linear_nf4));
  m.impl("linear_nf4_dx", QLORA_BOX(&qlora::linear_nf4_dx));
  m.impl("linear_nf4_dlora", QLORA_BOX(&qlora::linear_nf4_dlora));
}
