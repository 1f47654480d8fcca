// The one way into PyTorch's stable ABI. Include it before any other torch header: it replaces the shim's error check,
// so that the text of an error raised inside torch (out of memory, say) reaches the user. torch >= 2.13 has the getter;
// the weak reference lets 2.11 and 2.12 load.
#pragma once

#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#include <stdexcept>
#include <string>

extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace qlora {

[[noreturn]] __attribute__((noinline, cold, unused)) static void throw_torch_error(const char* call) {
  std::string text;
  if (&torch_exception_get_what_without_backtrace) text = torch_exception_get_what_without_backtrace();
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

}  // namespace qlora
