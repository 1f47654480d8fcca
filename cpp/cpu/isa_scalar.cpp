// The table of plain C++.
#define QLORA_ISA scalar

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/float64/linear.h"
#include "cpp/cpu/parts/parts.h"

namespace qlora::cpu {

const Kernels& scalar_kernels() {
  static constexpr Kernels kernels = {
      .isa = &kScalarIsa,
      .codec = &scalar::parts::codec,
      .forward =
          {
              .few_tokens_int = scalar::parts::forward_few_tokens_int,
              .few_tokens_bf16 = scalar::parts::forward_few_tokens_bf16,
              .few_tokens_float = scalar::parts::forward_few_tokens_float,
              .many_tokens_float = scalar::parts::forward_many_tokens_float,
              .float64 = float64::forward,
          },
      .dx =
          {
              .few_tokens_int = scalar::parts::dx_few_tokens_int,
              .few_tokens_float = scalar::parts::dx_few_tokens_float,
              .many_tokens_float = scalar::parts::dx_many_tokens_float,
              .float64 = float64::dx,
          },
      .dlora =
          {
              .many_tokens_float = scalar::parts::dlora_many_tokens_float,
              .float64 = float64::dlora,
          },
  };
  return kernels;
}

}  // namespace qlora::cpu
