// The C entry point of linear_nf4 for code compiled by AOTInductor. It bypasses torch's dispatcher, which boxes every
// argument: for a small layer and one token, boxing costs more than the matmul.
#include <cstdio>
#include <exception>

#include "cpp/cpu/check.h"
#include "cpp/cpu/kernels.h"
#include "cpp/ops/calls.h"
#include "cpp/ops/pool.h"

namespace qlora {
namespace {

// The C type in which AOTInductor passes an argument, and the conversion to the C++ argument.
template <class T>
struct InC {
  using Type = T;
  static T taken(T number) { return number; }
};
template <>
struct InC<Tensor> {
  using Type = AtenTensorHandle;
  static Tensor taken(AtenTensorHandle borrowed) {
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(borrowed, &handle));
    return Tensor(handle);
  }
};
template <>
struct InC<OptionalTensor> {
  using Type = const AtenTensorHandle*;
  static OptionalTensor taken(const AtenTensorHandle* borrowed) {
    return borrowed ? OptionalTensor(InC<Tensor>::taken(*borrowed)) : std::nullopt;
  }
};
template <IsName Name>
struct InC<Name> {
  using Type = const char*;
  static Name taken(const char* name) { return Name(name); }
};

template <class Fields>
struct LinearInC;
template <class... T>
struct LinearInC<std::tuple<Field<T>...>> {
  using Function = AOTITorchError (*)(typename InC<T>::Type..., AtenTensorHandle* y);

  static AOTITorchError linear_nf4(typename InC<T>::Type... given, AtenTensorHandle* y) {
    try {
      LinearArgs args;
      std::apply([&](const auto&... field) { ((field.value = InC<T>::taken(given)), ...); }, fields_of(args));
      const LinearCall call(args, false);
      if (!call.is_empty()) cpu::check(cpu::linear_nf4(pool(), call.problem));
      TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(call.y.get(), y));
      return AOTI_TORCH_SUCCESS;
    } catch (const std::exception& error) {
      std::fprintf(stderr, "linear_nf4: %s\n", error.what());
      return AOTI_TORCH_FAILURE;
    }
  }
};
using InCOfArgs = LinearInC<decltype(fields_of(std::declval<LinearArgs&>()))>;

}  // namespace
}  // namespace qlora

// AOTInductor prescribes the name. The symbol is a function pointer, because a function would have to repeat all
// argument types here. decoding/packages.py declares it to compiled code.
extern "C" {
extern QLORA_EXPORT const qlora::InCOfArgs::Function aoti_torch_cpu_linear_nf4;
const qlora::InCOfArgs::Function aoti_torch_cpu_linear_nf4 = qlora::InCOfArgs::linear_nf4;
}
