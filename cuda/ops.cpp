// The operators on CUDA. They turn tensors into views and call the launchers, on the tensors' device and torch's
// current stream.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <string>
#include <tuple>

#include "cpp/format/print_kernels.h"
#include "cpp/ops/calls.h"
#include "cpp/ops/codec_calls.h"
#include "cpp/ops/encode_calls.h"
#include "cpp/ops/value_error.h"
#include "cuda/launch/device.h"
#include "cuda/launch/generic/adapters.h"
#include "cuda/launch/generic/codec.h"
#include "cuda/launch/generic/launchers.h"
#include "cuda/launch/launch.h"
#include "cuda/launch/registry.h"
#include "cuda/tuning/choose.h"
#include "cuda/tuning/forced.h"

namespace qlora {
namespace {

// A failed launch leaves its error behind, and a later call by other code would report it as its own. So the error is
// cleared here.
void check_launch(const char* op, cudaError_t error) {
  if (error == cudaSuccess) [[likely]]
    return;
  cudaGetLastError();
  throw std::runtime_error(std::string(op) + ": CUDA launch failed: " + cudaGetErrorName(error) + " (" +
                           cudaGetErrorString(error) + ")");
}

// Makes the device of `like` current for a scope, and holds its attributes and torch's stream on it.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& like) : like_(like), guard_(like.get_device_index()) {
    void* stream = nullptr;  // Stream::nativeHandle() needs torch 2.13
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    check_launch("device", cuda::device_at(like.get_device_index(), &device_));
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  const cuda::Device& device() const { return *device_; }
  // Whether a launch has given up the device's clusters. device() then has none.
  bool gave_up_clusters() {
    const cuda::Device* const before = device_;
    check_launch("device", cuda::device_at(before->index, &device_));
    return device_ != before;
  }
  cudaStream_t stream() const { return stream_; }

  // The workspace comes from torch's allocator, which keeps it alive until the stream has finished the launches. The
  // cuBLAS handle is torch's for this stream.
  cuda::Context context() {
    return {*device_, stream_, this,
            [](void* self, int64_t bytes) {
              auto* const on = static_cast<OnDevice*>(self);
              on->workspace_ = empty(on->like_, {bytes}, ScalarType::Byte);
              return on->workspace_.mutable_data_ptr();
            },
            [](void*) {
              void* handle = nullptr;
              TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
              return handle;
            }};
  }

 private:
  const Tensor& like_;
  stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  const cuda::Device* device_ = nullptr;
  Tensor workspace_;
};

// Returns the value of QLORA_CUDA_KERNEL, or an empty string. Like QLORA_CPU_KERNEL, it is read at each call if it is
// set at the first call, and never otherwise.
std::string forced_kernel() {
  static const bool looks = std::getenv("QLORA_CUDA_KERNEL");
  const char* const forced = looks ? std::getenv("QLORA_CUDA_KERNEL") : nullptr;
  return forced ? forced : "";
}

// Chooses a kernel for a nonempty problem, prints the choice if QLORA_PRINT_KERNELS is set, and launches it.
template <class Problem>
cudaError_t run_once(const char* op, const Problem& p, OnDevice& on) {
  const std::string forced = forced_kernel();
  cuda::Choice choice = forced.empty() ? cuda::choose(p, on.device()) : cuda::choose_forced(forced, op, p, on.device());
  const cuda::Launcher<Problem>& launcher = cuda::launcher<Problem>(choice.kernel);
  if (launcher.plan) {
    const cuda::Config wish = choice.config;
    if (const cudaError_t error = launcher.plan(p, on.device(), &choice.config); error != cudaSuccess) return error;
    cuda::check_granted(op, p, wish, choice);
  }
  print_kernel(op, "cuda", p, [&] { return cuda::describe(choice); });
  return launcher.launch(p, choice.config, on.context());
}

// Runs a nonempty problem. The first call whose clusters the driver refuses runs a second time, without clusters.
template <class Problem>
void run(const char* op, const Problem& p, OnDevice& on) {
  cudaError_t error = run_once(op, p, on);
  if (error != cudaSuccess && on.gave_up_clusters()) error = run_once(op, p, on);
  check_launch(op, error);
}

template <class Problem>
constexpr bool kIsGrouped = requires(Problem p) { p.offsets; };

// The same for a problem whose tokens use different adapters.
template <class Problem>
void run_adapters(const char* op, const Problem& p, const Tensor& like, OnDevice& on) {
  // Kernels that multiply in float32 add ranks in units of 32, and the others in units of 16. Over experts, two groups
  // of warps take these in turn, and do not begin anew with each adapter.
  const std::string forced = forced_kernel();
  const cuda::Kernel kernel =
      (forced.empty() ? cuda::choose(p, on.device()) : cuda::choose_forced(forced, op, p, on.device())).kernel;
  const bool in_float32 = kernel == cuda::Kernel::kExact || kernel == cuda::Kernel::kRagged;
  cuda::AdapterCall<Problem> call(p, in_float32 || kIsGrouped<Problem> ? 32 : 16);
  const Tensor workspace = empty(like, {call.workspace_bytes()}, ScalarType::Byte);
  check_launch(op, call.prepare(workspace.mutable_data_ptr<uint8_t>(), on.device(), on.stream()));
  for (int64_t pass = 0; pass < call.passes(); ++pass) {
    run(op, call.problem(pass), on);
    check_launch(op, call.finish(pass, on.stream()));
  }
}

// Tensor-core kernels copy 16 bytes at a time. A view with another alignment is copied first, which reads it once more:
// the kernels for any alignment would take several times as long.
Tensor on_16_bytes(const Tensor& t) {
  const bool other = !t.defined() || !t.is_cuda() || !t.is_contiguous();  // rejected later, or copied in any case
  if (other || reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0) return t;
  Tensor moved = stable::empty_like(t);
  return stable::copy_(moved, t);
}
OptionalTensor on_16_bytes(const OptionalTensor& t) { return t ? OptionalTensor(on_16_bytes(*t)) : t; }

// The tables for encoding are compiled in.
void require_named(Code code) {
  checks::require(static_cast<int>(code) < kCodeTableCount,
                  "code: expected a code with a name to encode on CUDA, got 16 values; encode on the CPU");
}

std::tuple<Tensor, Tensor> quantize_nf4(const Tensor& w, int64_t block_size, const CodeName& code) {
  const QuantizeCall call(w, block_size, code);
  const OnDevice on(call.w);
  require_named(call.code);
  check_launch("quantize_nf4", cuda::launch_quantize_nf4(call.code, call.dtype, call.w.const_data_ptr(), call.numel,
                                                         block_size, call.packed.mutable_data_ptr<uint8_t>(),
                                                         call.absmax.mutable_data_ptr<float>(), on.stream()));
  return {call.packed, call.absmax};
}

Tensor search_absmax_nf4(const Tensor& w, const Tensor& importance, int64_t block_size, const CodeName& code) {
  const SearchAbsmaxCall call(w, importance, block_size, code);
  const OnDevice on(call.w);
  require_named(call.code);
  check_launch("search_absmax_nf4",
               cuda::launch_search_absmax_nf4(call.code, call.dtype, call.w.const_data_ptr(),
                                              call.importance.const_data_ptr<float>(), call.numel, call.k, block_size,
                                              call.absmax.mutable_data_ptr<float>(), on.stream()));
  return call.absmax;
}

// The contents of order and feedback are not checked, unlike on the CPU, because the host would have to wait for them.
Tensor encode_nf4(const Tensor& w, const Tensor& absmax, int64_t block_size, OptionalTensor feedback,
                  OptionalTensor order, const CodeName& code) {
  const EncodeCall call(w, absmax, block_size, feedback, order, code);
  OnDevice on(call.w);
  require_named(call.code);
  auto* const packed = call.packed.mutable_data_ptr<uint8_t>();
  const auto* const scales = call.absmax.const_data_ptr<float>();
  if (!feedback) {
    check_launch("encode_nf4", cuda::launch_encode_nf4(call.code, call.dtype, call.w.const_data_ptr(), scales,
                                                       call.numel, block_size, packed, on.stream()));
    return call.packed;
  }
  const cuda::FeedbackProblem problem = {call.code,
                                         call.dtype,
                                         call.w.const_data_ptr(),
                                         scales,
                                         call.n,
                                         call.k,
                                         block_size,
                                         call.feedback.const_data_ptr<float>(),
                                         call.order.const_data_ptr<int64_t>(),
                                         packed};
  check_launch("encode_nf4", cuda::launch_encode_nf4_with_feedback(problem, on.context()));
  return call.packed;
}

Tensor encode_nf4_stochastic(const Tensor& w, const Tensor& absmax, int64_t block_size, int64_t seed,
                             const CodeName& code) {
  const EncodeCall call(w, absmax, block_size, std::nullopt, std::nullopt, code);
  const OnDevice on(call.w);
  require_named(call.code);
  check_launch("encode_nf4_stochastic",
               cuda::launch_encode_nf4_stochastic(
                   call.code, call.dtype, call.w.const_data_ptr(), call.absmax.const_data_ptr<float>(), call.numel,
                   block_size, static_cast<uint64_t>(seed), call.packed.mutable_data_ptr<uint8_t>(), on.stream()));
  return call.packed;
}

std::tuple<Tensor, Tensor, Tensor> quantize_absmax(const Tensor& absmax, int64_t nested_block_size) {
  const QuantizeAbsmaxCall call(absmax, nested_block_size);
  const OnDevice on(call.absmax);
  Tensor workspace = empty(call.absmax, {cuda::quantize_absmax_workspace(call.count)}, ScalarType::Double);
  check_launch("quantize_absmax",
               cuda::launch_quantize_absmax(
                   call.absmax.const_data_ptr<float>(), call.count, nested_block_size,
                   call.codes.mutable_data_ptr<uint8_t>(), call.nested_absmax.mutable_data_ptr<float>(),
                   call.nested_offset.mutable_data_ptr<float>(), workspace.mutable_data_ptr<double>(), on.stream()));
  return {call.codes, call.nested_absmax, call.nested_offset};
}

Tensor dequantize_absmax(const Tensor& codes, const Tensor& nested_absmax, const Tensor& nested_offset,
                         int64_t nested_block_size) {
  const DequantizeAbsmaxCall call(codes, nested_absmax, nested_offset, nested_block_size);
  const OnDevice on(codes);
  check_launch("dequantize_absmax",
               cuda::launch_dequantize_absmax(call.scales, call.count, call.absmax.mutable_data_ptr<float>(),
                                              on.device(), on.stream()));
  return call.absmax;
}

Tensor dequantize_nf4(DequantizeArgs args) {
  const DequantizeCall call(args);
  const OnDevice on(call.out);
  check_launch("dequantize_nf4",
               cuda::launch_dequantize_nf4(call.w, {.columns = call.w.k}, call.dtype, call.out.mutable_data_ptr(),
                                           false, on.device(), on.stream()));
  return call.out;
}

// Runs a nonempty problem over experts, or over a single weight, whose tokens may use different adapters. `grouped_op`
// is the name of the operator over experts.
template <class Problem>
void run_any(const char* grouped_op, const Problem& p, const Tensor& like) {
  const char* const op = grouped_op + (kIsGrouped<Problem> ? 0 : sizeof("grouped_") - 1);
  OnDevice on(like);
  if (stack_of(p).lora.adapters)
    run_adapters(op, p, like, on);
  else
    run(op, p, on);
}

template <bool kWithH, class Args>
auto linear_nf4(Args args) {
  for (Tensor* t : {&args.x, &args.w.packed}) *t = on_16_bytes(*t);
  for (OptionalTensor* t : {&args.lora_a, &args.lora_b}) *t = on_16_bytes(*t);
  const LinearCall call(args, kWithH);
  if (!call.is_empty()) run_any("grouped_linear_nf4", call.problem, call.x);
  return checks::results<kWithH>(call.y, call.h);
}

template <bool kWithG, class Args>
auto linear_nf4_dx(Args args) {
  for (Tensor* t : {&args.dy, &args.w.packed}) *t = on_16_bytes(*t);
  for (OptionalTensor* t : {&args.lora_a, &args.lora_b}) *t = on_16_bytes(*t);
  const LinearDxCall call(args, kWithG);
  if (!call.is_empty()) run_any("grouped_linear_nf4_dx", call.problem, call.dy);
  return checks::results<kWithG>(call.dx, call.g);
}

template <class Args>
std::tuple<Tensor, Tensor> linear_nf4_dlora(Args args) {
  for (Tensor* t : {&args.dy, &args.x, &args.lora_a, &args.lora_b}) *t = on_16_bytes(*t);
  for (OptionalTensor* t : {&args.h, &args.g}) *t = on_16_bytes(*t);
  const LoraGradCall call(args);
  if (call.is_empty()) return {call.da, call.db};
  if (const LoraGradProblem& p = stack_of(call.problem); p.m == 0) {
    const OnDevice on(call.dy);
    const int64_t ranks = call.da.size(0) * (kOverExperts<Args> ? call.da.size(1) : 1);
    check_launch("linear_nf4_dlora", cuda::generic::clear_gradients(p, ranks, on.stream()));
  } else {
    run_any("grouped_linear_nf4_dlora", call.problem, call.dy);
  }
  return {call.da, call.db};
}

}  // namespace
}  // namespace qlora

STABLE_TORCH_LIBRARY_IMPL(qlora, CUDA, m) {
  using namespace qlora;
  m.impl("quantize_nf4", QLORA_BOX(&quantize_nf4));
  m.impl("search_absmax_nf4", QLORA_BOX(&search_absmax_nf4));
  m.impl("encode_nf4", QLORA_BOX(&encode_nf4));
  m.impl("encode_nf4_stochastic", QLORA_BOX(&encode_nf4_stochastic));
  m.impl("quantize_absmax", QLORA_BOX(&quantize_absmax));
  m.impl("dequantize_absmax", QLORA_BOX(&dequantize_absmax));
  m.impl("dequantize_nf4", QLORA_BOX_ARGS(&dequantize_nf4));
  m.impl("linear_nf4", QLORA_BOX_ARGS((&linear_nf4<false, LinearArgs>)));
  m.impl("linear_nf4_with_h", QLORA_BOX_ARGS((&linear_nf4<true, LinearArgs>)));
  m.impl("linear_nf4_dx", QLORA_BOX_ARGS((&linear_nf4_dx<false, LinearDxArgs>)));
  m.impl("linear_nf4_dx_with_g", QLORA_BOX_ARGS((&linear_nf4_dx<true, LinearDxArgs>)));
  m.impl("linear_nf4_dlora", QLORA_BOX_ARGS((&linear_nf4_dlora<LoraGradArgs>)));
  m.impl("grouped_linear_nf4", QLORA_BOX_ARGS((&linear_nf4<false, GroupedLinearArgs>)));
  m.impl("grouped_linear_nf4_with_h", QLORA_BOX_ARGS((&linear_nf4<true, GroupedLinearArgs>)));
  m.impl("grouped_linear_nf4_dx", QLORA_BOX_ARGS((&linear_nf4_dx<false, GroupedLinearDxArgs>)));
  m.impl("grouped_linear_nf4_dx_with_g", QLORA_BOX_ARGS((&linear_nf4_dx<true, GroupedLinearDxArgs>)));
  m.impl("grouped_linear_nf4_dlora", QLORA_BOX_ARGS((&linear_nf4_dlora<GroupedLoraGradArgs>)));
}
