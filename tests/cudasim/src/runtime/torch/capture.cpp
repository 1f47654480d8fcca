// Records operators during a stream capture. capture.h explains it.
#include "capture.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAException.h>

#include <cstring>
#include <string_view>
#include <unordered_set>

namespace cudasim_torch {
namespace {

using at::Tensor;
using c10::IValue;

// The size of the result depends on the values, so a GPU has to synchronize, too.
bool waits(const c10::FunctionSchema& schema) {
  static const std::unordered_set<std::string_view> names = {"aten::nonzero",
                                                             "aten::masked_select",
                                                             "aten::_unique",
                                                             "aten::_unique2",
                                                             "aten::unique_dim",
                                                             "aten::unique_consecutive",
                                                             "aten::unique_dim_consecutive",
                                                             "aten::repeat_interleave",
                                                             "aten::bincount",
                                                             "aten::argwhere",
                                                             "aten::equal",
                                                             "aten::is_nonzero",
                                                             "aten::_local_scalar_dense",
                                                             "aten::combinations"};
  if (names.count(schema.name())) return true;
  for (const c10::Argument& r : schema.returns())
    if (const auto kind = r.type()->kind(); kind != c10::TypeKind::TensorType && kind != c10::TypeKind::ListType)
      return true;
  return false;
}

bool indexes_by_mask(const IValue& v) {
  if (!v.isOptionalTensorList()) return false;
  for (const std::optional<Tensor>& t : v.toOptionalTensorVector())
    if (t && t->defined() && (t->scalar_type() == at::kBool || t->scalar_type() == at::kByte)) return true;
  return false;
}

template <class F>
void each_tensor(const IValue& v, F f) {
  if (v.isTensor())
    f(v.toTensor());
  else if (v.isTensorList())
    for (const Tensor& t : v.toTensorVector()) f(t);
  else if (v.isOptionalTensorList())
    for (const std::optional<Tensor>& t : v.toOptionalTensorVector())
      if (t) f(*t);
}

}  // namespace

void Recorded::refuse(const std::string& why) const {
  cudasim_refuse_capture(stream_, why.c_str());
  C10_CUDA_CHECK(cudaErrorStreamCaptureUnsupported);
  TORCH_CHECK(false, why);
}

void Recorded::check_arguments(const std::vector<IValue>& originals) const {
  const auto& schema = op_.schema();
  const std::string name = schema.name();
  if (waits(schema)) refuse(name + " needs the values of its input, which are not computed during a capture");
  const bool copy = name == "aten::copy_";
  for (const IValue& v : originals) {
    if (indexes_by_mask(v))
      refuse(name + " with a mask needs the mask's values, which are not computed during a capture");
    each_tensor(v, [&](const Tensor& t) {
      if (!t.defined()) return;
      if (t.layout() != c10::kStrided) refuse(name + " of a sparse tensor is not recorded during a capture");
      if (t.is_cuda() || (t.dim() == 0 && !copy)) return;
      if (!copy) refuse(name + " takes a CPU tensor, which has to be copied to the device before the capture");
      if (!t.is_pinned()) refuse("a copy between the host and the device during a capture needs pinned host memory");
      if (originals.size() > 2 && originals[2].isBool() && !originals[2].toBool())
        refuse("a copy between the host and the device during a capture has to be non_blocking");
    });
  }
}

void Recorded::arguments(const std::vector<IValue>& aliases) {
  const auto& schema = op_.schema();
  for (size_t i = 0; i < aliases.size(); ++i) {
    if (const auto* info = schema.arguments()[i].alias_info(); !info || !info->isWrite()) continue;
    each_tensor(aliases[i], [&](const Tensor& t) {
      if (!t.defined() || !t.storage().nbytes()) return;
      // Memory that the capture itself allocated has no contents yet, and later operators may need sensible values.
      char* p = static_cast<char*>(t.storage().mutable_data());
      if (!cudasim_in_graph(p)) before_.emplace_back(p, std::vector<char>(p, p + t.storage().nbytes()));
    });
  }
}

void Recorded::span(const Tensor& t) {
  if (t.defined() && t.storage().nbytes()) spans_.emplace_back(t.storage().data(), t.storage().nbytes());
}

void Recorded::finish(const std::vector<IValue>& aliases, std::vector<Tensor> results) {
  for (auto& [p, bytes] : before_) std::memcpy(p, bytes.data(), bytes.size());
  before_.clear();
  for (const IValue& v : aliases) {
    // Numbers in host memory are read now, by value.
    const bool number = v.isTensor() && v.toTensor().defined() && v.toTensor().dim() == 0 &&
                        !cudasim_bytes_at(v.toTensor().storage().data());
    arguments_.push_back(number ? IValue(v.toTensor().clone()) : v);
    if (!number) each_tensor(v, [&](const Tensor& t) { span(t); });
  }
  results_ = std::move(results);
  for (const Tensor& t : results_) span(t);
}

void Recorded::record() {
  C10_CUDA_CHECK(static_cast<cudaError_t>(
      cudasim_record(stream_, &Recorded::replay, this, [](void* p) { delete static_cast<Recorded*>(p); })));
}

// Like a kernel, starts at the position in the generator's sequence that the graph's launch sets.
IValue Recorded::generator(const IValue& original) {
  if (original.isGenerator() && original.toGenerator().device().is_cpu()) return original;
  std::optional<at::Generator> given;
  if (original.isGenerator()) given = original.toGenerator();
  auto* cuda = at::get_generator_or_default<at::CUDAGeneratorImpl>(given, at::cuda::detail::getDefaultCUDAGenerator());
  const std::lock_guard<std::mutex> lock(cuda->mutex_);
  random_.push_back(cuda->philox_cuda_state(4));
  return at::detail::createCPUGenerator(0);
}

int Recorded::replay(void* self) {
  Recorded& r = *static_cast<Recorded*>(self);
  const std::string name = r.op_.schema().name();
  try {
    for (const auto& [p, bytes] : r.spans_)
      TORCH_CHECK(cudasim_bytes_at(p) >= bytes, "the graph uses memory that has been freed since the capture");
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    torch::jit::Stack stack;
    size_t generators = 0;
    for (const IValue& v : r.arguments_) {
      if (v.isGenerator() && v.toGenerator().device().is_cpu() && generators < r.random_.size()) {
        const at::PhiloxCudaState& s = r.random_[generators++];
        const uint64_t seed = s.captured_ ? static_cast<uint64_t>(*s.seed_.ptr) : s.seed_.val;
        const uint64_t offset =
            s.captured_ ? static_cast<uint64_t>(*s.offset_.ptr) + s.offset_intragraph_ : s.offset_.val;
        stack.emplace_back(at::detail::createCPUGenerator(seed * 0x9e3779b97f4a7c15ull + offset));
      } else {
        stack.push_back(v);
      }
    }
    r.op_.callBoxed(&stack);
    // New results replace the first ones in memory.
    size_t next = 0;
    for (size_t i = 0; i < stack.size(); ++i) {
      if (const auto* alias = r.op_.schema().returns()[i].alias_info(); alias && alias->isWrite()) continue;
      each_tensor(stack[i], [&](const Tensor& t) {
        TORCH_CHECK(next < r.results_.size(), "a result more than during the capture");
        const Tensor& to = r.results_[next++];
        if (!t.defined()) return;
        TORCH_CHECK(t.sizes() == to.sizes(), "a result of size ", t.sizes(), ", which was ", to.sizes(),
                    " during the capture");
        to.copy_(t);
      });
    }
    return cudaSuccess;
  } catch (const std::exception& e) {
    const std::string text = e.what();
    cudasim_fail((name + " in a graph: " + text.substr(0, text.find('\n'))).c_str());
    return cudaErrorIllegalAddress;
  }
}

}  // namespace cudasim_torch
