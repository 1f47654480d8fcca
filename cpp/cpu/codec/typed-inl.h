// The elements of a weight by their type.
#pragma once

#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/dtypes.h"

namespace qlora::cpu::QLORA_ISA {
namespace {

// use(w), w as a pointer to elements of `dtype`, of which there is a codec.
template <class Use>
inline void with_typed(DType dtype, const void* w, const Use& use) {
  switch (dtype) {
    case DType::kBFloat16:
      return use(static_cast<const bfloat16*>(w));
    case DType::kFloat16:
      return use(static_cast<const float16*>(w));
    default:
      return use(static_cast<const float*>(w));
  }
}

}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
