// Runs PyTorch's own CUDA operators on the CPU. The simulated device's memory is host memory, so the CPU operator gets
// an operator's CUDA arguments as aliases, without a copy. Only new results are copied, into device memory. Operators
// of other libraries are untouched: they are what the simulation is for.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <array>
#include <cstring>
#include <mutex>
#include <string_view>
#include <unordered_map>
#include <unordered_set>

#include "capture.h"

namespace {

using namespace cudasim_torch;

using at::Tensor;
using c10::DispatchKey;
using c10::IValue;
using c10::OperatorHandle;

// Operators that only manage memory and metadata. CUDA's own versions work unchanged.
bool stays_native(const c10::OperatorName& op) {
  static const std::unordered_set<std::string_view> names = {"aten::as_strided", "aten::resize_",
                                                             "aten::resize_as_", "aten::_resize_output_",
                                                             "aten::set_",       "aten::record_stream",
                                                             "aten::is_pinned",  "aten::_pin_memory",
                                                             "aten::pin_memory", "aten::_efficientzerotensor",
                                                             "aten::_copy_from", "aten::_copy_from_and_resize"};
  return op.name.starts_with("aten::empty") || op.name.starts_with("aten::_empty") ||
         op.name.starts_with("aten::_cudnn") || op.name.starts_with("aten::cudnn") || names.count(op.name);
}

bool makes_view(const c10::FunctionSchema& schema) {
  for (const c10::Argument& r : schema.returns())
    if (r.alias_info() && !r.alias_info()->isWrite()) return true;
  return false;
}

// Operators that may mix CPU and CUDA tensors.
bool may_mix_devices(const std::string& name) {
  return name == "aten::copy_" || name == "aten::_ctc_loss" || name == "aten::index" ||
         name == "aten::_index_put_impl_" || name == "aten::index_put_";
}

class Call {
 public:
  Call(const OperatorHandle& op, torch::jit::Stack* stack) : op_(op), stack_(stack), schema_(op.schema()) {}

  void run() {
    C10_CUDA_CHECK(static_cast<cudaError_t>(cudasim_context_error()));
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    const bool capturing = cudasim_begin_work(stream);
    if (capturing) recorded_ = std::make_unique<Recorded>(op_, stream);
    const size_t count = schema_.arguments().size();
    const size_t first = stack_->size() - count;
    const std::vector<IValue> originals(stack_->begin() + static_cast<std::ptrdiff_t>(first), stack_->end());
    if (capturing) recorded_->check_arguments(originals);
    for (size_t i = 0; i < count; ++i) convert_argument((*stack_)[first + i], schema_.arguments()[i]);
    std::vector<IValue> aliases(stack_->begin() + static_cast<std::ptrdiff_t>(first), stack_->end());
    if (capturing) recorded_->arguments(aliases);
    op_.callBoxed(stack_);
    for (size_t i = 0; i < count; ++i)
      if (const auto* alias = schema_.arguments()[i].alias_info(); alias && alias->isWrite())
        follow_resize(originals[i], aliases[i]);
    const size_t returned = stack_->size() - schema_.returns().size();
    for (size_t i = 0; i < schema_.returns().size(); ++i)
      convert_result((*stack_)[returned + i], schema_.returns()[i], originals);
    if (capturing) {
      // Resized tensors have new memory.
      for (size_t i = 0; i < count; ++i) convert_written(aliases[i], originals[i], schema_.arguments()[i]);
      recorded_->finish(aliases, results_);
      recorded_.release()->record();
    }
  }

 private:
  Tensor alias(const Tensor& t) {
    if (!t.defined() || !t.is_cuda()) return t;
    if (t.layout() != c10::kStrided) return t.to(c10::kCPU);
    c10::StorageImpl* storage = t.storage().unsafeGetStorageImpl();
    auto [entry, fresh] = storages_.try_emplace(storage);
    if (fresh)
      entry->second = c10::Storage(c10::Storage::use_byte_size_t{}, storage->nbytes(),
                                   at::DataPtr(const_cast<void*>(storage->data()), c10::kCPU), at::getCPUAllocator(),
                                   /*resizable=*/true);
    Tensor out = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(entry->second),
                                                          c10::DispatchKeySet(DispatchKey::CPU), t.dtype());
    out.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    if (t.is_conj()) out._set_conj(true);
    if (t.is_neg()) out._set_neg(true);
    if (t.unsafeGetTensorImpl()->is_wrapped_number()) out.unsafeGetTensorImpl()->set_wrapped_number(true);
    return out;
  }

  void convert_written(IValue& v, const IValue& original, const c10::Argument& argument) {
    const auto* info = argument.alias_info();
    if (!info || !info->isWrite() || !original.isTensor() || !original.toTensor().defined()) return;
    storages_.clear();
    v = alias(original.toTensor());
  }

  void convert_argument(IValue& v, const c10::Argument& argument) {
    if (v.isTensor()) {
      const Tensor& t = v.toTensor();
      TORCH_CHECK(!t.defined() || t.is_cuda() || t.dim() == 0 || !t.is_cpu() || may_mix_devices(schema_.name()),
                  "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                  "(argument ",
                  argument.name(), " of ", schema_.name(), ")");
      v = alias(t);
    } else if (v.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : v.toTensorVector()) list.push_back(alias(t));
      v = std::move(list);
    } else if (v.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& t : v.toOptionalTensorVector())
        list.push_back(t ? std::optional<Tensor>(alias(*t)) : std::nullopt);
      v = std::move(list);
    } else if (v.isDevice() && v.toDevice().is_cuda()) {
      v = c10::Device(c10::kCPU);
    } else if (argument.type()->str().starts_with("Generator") && (v.isNone() || v.isGenerator())) {
      v = recorded_ ? recorded_->generator(v) : cpu_generator(v);
    }
  }

  // A CPU generator that follows the CUDA generator's seed and position.
  static IValue cpu_generator(const IValue& v) {
    at::Generator generator =
        v.isNone() ? at::globalContext().defaultGenerator(c10::Device(c10::kCUDA, 0)) : v.toGenerator();
    if (generator.device().is_cpu()) return v;
    const std::lock_guard<std::mutex> lock(generator.mutex());
    const uint64_t offset = generator.get_offset();
    generator.set_offset(offset + 4);
    return at::detail::createCPUGenerator(generator.current_seed() * 0x9e3779b97f4a7c15ull + offset);
  }

  // The operator may have resized an argument that it wrote. Its alias then has memory of its own.
  void follow_resize(const IValue& original, const IValue& aliased) {
    if (!original.isTensor() || !original.toTensor().defined() || !original.toTensor().is_cuda()) return;
    const Tensor& cuda = original.toTensor();
    const Tensor& cpu = aliased.toTensor();
    if (cuda.layout() != c10::kStrided) return;
    c10::TensorImpl* impl = cuda.unsafeGetTensorImpl();
    if (cpu.storage().data() != cuda.storage().data()) {
      impl->set_storage_keep_dtype(to_device(cpu).storage());
      impl->set_sizes_and_strides(cpu.sizes(), dense(cpu).strides(), 0);
    } else if (cpu.sizes() != cuda.sizes() || cpu.strides() != cuda.strides()) {
      impl->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    }
  }

  static Tensor dense(const Tensor& t) { return t.is_non_overlapping_and_dense() ? t : t.contiguous(); }

  static Tensor to_device(const Tensor& t) {
    if (!t.defined() || !t.is_cpu()) return t;
    if (t.layout() != c10::kStrided) return t.to(c10::kCUDA);
    const Tensor source = dense(t.resolve_conj().resolve_neg());
    Tensor out =
        at::empty_strided(source.sizes(), source.strides(), source.options().device(c10::Device(c10::kCUDA, 0)));
    if (source.numel()) std::memcpy(out.data_ptr(), source.const_data_ptr(), source.nbytes());
    if (t.unsafeGetTensorImpl()->is_wrapped_number()) out.unsafeGetTensorImpl()->set_wrapped_number(true);
    return out;
  }

  void convert_result(IValue& v, const c10::Argument& result, const std::vector<IValue>& originals) {
    if (const auto* alias = result.alias_info(); alias && alias->isWrite())
      for (size_t i = 0; i < originals.size(); ++i)
        if (const auto* source = schema_.arguments()[i].alias_info();
            source && source->beforeSets() == alias->beforeSets()) {
          v = originals[i];
          return;
        }
    if (v.isTensor()) {
      v = keep_result(to_device(v.toTensor()));
    } else if (v.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : v.toTensorVector()) list.push_back(keep_result(to_device(t)));
      v = std::move(list);
    }
  }
  Tensor keep_result(Tensor t) {
    if (recorded_) results_.push_back(alias(t));
    return t;
  }

  const OperatorHandle& op_;
  torch::jit::Stack* stack_;
  const c10::FunctionSchema& schema_;
  std::unordered_map<c10::StorageImpl*, c10::Storage> storages_;
  std::unique_ptr<Recorded> recorded_;  // during a stream capture
  std::vector<Tensor> results_;
};

void run_on_cpu(const OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) { Call(op, stack).run(); }

// Exists only for CUDA: y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps) over the normalized dimensions.
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& input, at::IntArrayRef normalized_shape,
                                             const Tensor& rstd, const std::optional<Tensor>& weight,
                                             std::array<bool, 2> wanted) {
  const bool weighted = weight && weight->defined();
  const Tensor g = grad.to(at::kFloat), x = input.to(at::kFloat), r = rstd.to(at::kFloat);
  Tensor grad_input, grad_weight;
  if (wanted[0]) {
    std::vector<int64_t> inner;
    for (size_t i = 0; i < normalized_shape.size(); ++i) inner.push_back(-1 - static_cast<int64_t>(i));
    const Tensor gw = weighted ? g * weight->to(at::kFloat) : g;
    grad_input = (r * gw - x * r.pow(3) * (gw * x).mean(inner, /*keepdim=*/true)).to(input.scalar_type());
  }
  if (wanted[1] && weighted) grad_weight = (g * x * r).sum_to_size(weight->sizes()).to(weight->scalar_type());
  return {grad_input, grad_weight};
}

struct Silence : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

torch::Library& library() {
  static auto& lib = *new torch::Library(torch::Library::IMPL, "aten", DispatchKey::CUDA, __FILE__, __LINE__);
  return lib;
}

[[maybe_unused]] const bool registered = [] {
  install_allocator();
  Silence silence;  // PyTorch warns about operators that are registered again
  const c10::WarningUtils::WarningHandlerGuard guard(&silence);
  auto& dispatcher = c10::Dispatcher::singleton();
  const std::unordered_set<std::string_view> composite = {"aten::copy_", "aten::convolution",
                                                          "aten::convolution_backward", "aten::_convolution"};
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    if (!name.name.starts_with("aten::") || stays_native(name)) continue;
    const auto op = dispatcher.findSchema(name);
    if (!op || makes_view(op->schema())) continue;
    const bool on_cuda = op->hasKernelForDispatchKey(DispatchKey::CUDA);
    const bool on_cpu = op->hasComputedKernelForDispatchKey(DispatchKey::CPU);
    if ((on_cuda && on_cpu) || (composite.count(name.name) && name.overload_name.empty()))
      library().impl(c10::toString(name).substr(6).c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  }
  library().impl("_fused_rms_norm_backward", torch::CppFunction(TORCH_FN(rms_norm_backward)));
  // These choose operators that exist only for CUDA.
  auto& context = at::globalContext();
  context.setUserEnabledCuDNN(false);
  context.setSDPUseFlash(false);
  context.setSDPUseMemEfficient(false);
  context.setSDPUseCuDNN(false);
  return true;
}();

}  // namespace
