// PyTorch operators over the kernels of ops.cu.
#include "ops.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

namespace {

using at::Tensor;

cudaStream_t stream() { return c10::cuda::getCurrentCUDAStream(); }
int count_of(const Tensor& t) { return static_cast<int>(t.numel()); }
Tensor floats(const Tensor& like, at::IntArrayRef sizes) { return at::empty(sizes, like.options().dtype(at::kFloat)); }

Tensor op_add(const Tensor& a, const Tensor& b, bool checked) {
  const c10::cuda::CUDAGuard guard(a.device());
  Tensor out = at::empty_like(a);
  add(a.const_data_ptr<float>(), b.const_data_ptr<float>(), out.mutable_data_ptr<float>(), count_of(a), checked,
      stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}
Tensor op_sum(const Tensor& in, bool synchronized) {
  Tensor out = floats(in, {});
  sum(in.const_data_ptr<float>(), out.mutable_data_ptr<float>(), count_of(in), synchronized, stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}
Tensor op_uninitialized(const Tensor& like) {
  Tensor out = floats(like, {32});
  uninitialized(out.mutable_data_ptr<float>(), stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}
Tensor op_silu(const Tensor& in) {
  Tensor out = at::empty_like(in);
  silu(in.const_data_ptr(), out.mutable_data_ptr(), count_of(in), stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}
Tensor op_mma(const Tensor& a, const Tensor& b_transposed) {
  Tensor out = floats(a, {16, 8});
  mma(a.const_data_ptr(), b_transposed.const_data_ptr(), out.mutable_data_ptr<float>(), stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}
Tensor op_reverse(const Tensor& in, bool opt_in) {
  Tensor out = at::empty_like(in);
  C10_CUDA_CHECK(reverse(in.const_data_ptr<float>(), out.mutable_data_ptr<float>(), count_of(in), opt_in, stream()));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}
std::tuple<int64_t, Tensor> op_count(const Tensor& like, double factor) {
  Tensor out = floats(like, {32});
  const int launches = count(out.mutable_data_ptr<float>(), static_cast<float>(factor), stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {launches, out};
}
Tensor op_bounded(const Tensor& like, int64_t threads) {
  Tensor out = floats(like, {threads});
  bounded(out.mutable_data_ptr<float>(), static_cast<int>(threads), stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}
Tensor op_check_below_three(const Tensor& in) {
  check_below_three(in.const_data_ptr<float>(), count_of(in), stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return in.clone();
}
Tensor op_overlap(const Tensor& like, double step) {
  Tensor out = floats(like, {64});
  overlap(out.mutable_data_ptr<float>(), static_cast<float>(step), stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}
void op_spin(const Tensor& flag) {
  spin(flag.const_data_ptr<float>(), stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}
Tensor op_cluster(const Tensor& like, int64_t size, int64_t clusters) {
  Tensor out = floats(like, {clusters});
  C10_CUDA_CHECK(cluster(out.mutable_data_ptr<float>(), static_cast<int>(size), static_cast<int>(clusters), stream()));
  return out;
}
Tensor op_dependent(const Tensor& in, bool waits) {
  Tensor out = at::empty_like(in);
  C10_CUDA_CHECK(dependent(in.const_data_ptr<float>(), out.mutable_data_ptr<float>(), count_of(in), waits, stream()));
  return out;
}
Tensor op_grid(const Tensor& like, int64_t blocks) {
  Tensor out = floats(like, {blocks}), arrived = at::zeros({1}, like.options().dtype(at::kInt));
  C10_CUDA_CHECK(
      grid(arrived.mutable_data_ptr<int>(), out.mutable_data_ptr<float>(), static_cast<int>(blocks), stream()));
  return out;
}
Tensor op_tile(const Tensor& in, int64_t x, int64_t y) {
  Tensor out = floats(in, {8, 16});
  TORCH_CHECK(tile(in.const_data_ptr<float>(), static_cast<int>(in.size(0)), static_cast<int>(in.size(1)),
                   static_cast<int>(x), static_cast<int>(y), out.mutable_data_ptr<float>(), stream()) == 0,
              "no tensor map");
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}
int64_t op_occupancy(int64_t threads, int64_t shared) {
  return occupancy(static_cast<int>(threads), static_cast<int>(shared));
}

int64_t op_active_clusters(int64_t size) { return active_clusters(static_cast<int>(size)); }

}  // namespace

TORCH_LIBRARY(cudasim_test, m) {
  m.def("add(Tensor a, Tensor b, bool checked=True) -> Tensor");
  m.def("sum(Tensor x, bool synchronized=True) -> Tensor");
  m.def("uninitialized(Tensor like) -> Tensor");
  m.def("silu(Tensor x) -> Tensor");
  m.def("mma(Tensor a, Tensor b_transposed) -> Tensor");
  m.def("reverse(Tensor x, bool opt_in=True) -> Tensor");
  m.def("count(Tensor like, float factor) -> (int, Tensor)");
  m.def("bounded(Tensor like, int threads) -> Tensor");
  m.def("check_below_three(Tensor x) -> Tensor");
  m.def("overlap(Tensor like, float step) -> Tensor");
  m.def("spin(Tensor flag) -> ()");
  m.def("cluster(Tensor like, int size, int clusters) -> Tensor");
  m.def("grid(Tensor like, int blocks) -> Tensor");
  m.def("tile(Tensor x, int column, int row) -> Tensor");
  m.def("occupancy(int threads, int shared) -> int", &op_occupancy);
  m.def("active_clusters(int size) -> int", &op_active_clusters);
  m.def("dependent(Tensor x, bool waits) -> Tensor");
}
TORCH_LIBRARY_IMPL(cudasim_test, CUDA, m) {
  m.impl("add", &op_add);
  m.impl("sum", &op_sum);
  m.impl("uninitialized", &op_uninitialized);
  m.impl("silu", &op_silu);
  m.impl("mma", &op_mma);
  m.impl("reverse", &op_reverse);
  m.impl("count", &op_count);
  m.impl("bounded", &op_bounded);
  m.impl("check_below_three", &op_check_below_three);
  m.impl("overlap", &op_overlap);
  m.impl("spin", &op_spin);
  m.impl("cluster", &op_cluster);
  m.impl("grid", &op_grid);
  m.impl("tile", &op_tile);
  m.impl("dependent", &op_dependent);
}
