// From a DType to the type of its elements.
#pragma once

#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/dtypes.h"

namespace qlora::cpu::QLORA_ISA {
namespace {

// use.operator()<T>(), where T has the elements of `dtype`. No kernel of an instruction set takes float64.
template <class Use>
inline auto with_type(DType dtype, const Use& use) {
  switch (dtype) {
    case DType::kBFloat16:
      return use.template operator()<bfloat16>();
    case DType::kFloat16:
      return use.template operator()<float16>();
    default:
      return use.template operator()<float>();
  }
}

}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
