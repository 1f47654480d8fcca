// The only header to include for PyTorch's stable ABI. Include it before any other torch header: it replaces the shim's
// error check, so that the text of an error raised inside torch (out of memory, for example) reaches the user. torch
// >= 2.13 has the getter; it is optional, so that 2.11 and 2.12 load.
#pragma once

#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpp/format/portable.h"

extern "C" QLORA_OPTIONAL const char* torch_exception_get_what_without_backtrace();

namespace qlora {

[[noreturn, maybe_unused, gnu::noinline, gnu::cold]] static void throw_torch_error(const char* call) {
  std::string text;
  const auto what = QLORA_FIND("torch_cpu.dll", torch_exception_get_what_without_backtrace);
  if (what) text = what();
  if (text.empty()) text = "a call into torch failed (torch 2.11 and 2.12 print the cause on stderr)";
  throw std::runtime_error(text + " [in " + std::string(call).substr(0, 60) + "]");
}

}  // namespace qlora

#undef TORCH_ERROR_CODE_CHECK
#define TORCH_ERROR_CODE_CHECK(call) \
  if ((call) != TORCH_SUCCESS) {     \
    qlora::throw_torch_error(#call); \
  }
#undef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace qlora {

namespace stable = torch::stable;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Returns an uninitialized contiguous tensor on the device of `like`, with sizes that checks::Count has accepted. It
// calls the shim directly, because stable::new_empty boxes its arguments for the dispatcher, which costs more than a
// small layer's matmul.
inline Tensor empty(const Tensor& like, const int64_t* sizes, int64_t dims, ScalarType dtype) {
  std::vector<int64_t> strides(static_cast<size_t>(dims));
  int64_t stride = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  int32_t device_type = 0, device_index = 0, dtype_code = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  dtype_code = stable::detail::to<int32_t>(stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides.data(), dtype_code, device_type, device_index, &handle));
  return Tensor(handle);
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return empty(like, sizes.data(), static_cast<int64_t>(sizes.size()), dtype);
}

}  // namespace qlora
