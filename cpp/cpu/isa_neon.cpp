// The table of NEON.
#define QLORA_ISA neon

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/float64/linear.h"
#include "cpp/cpu/parts/parts.h"

namespace qlora::cpu {

const Kernels& neon_kernels() {
  static constexpr Kernels kernels = {
      .isa = &kNeonIsa,
      .codec = &neon::parts::codec,
      .forward =
          {
              .few_tokens_int = neon::parts::forward_few_tokens_int,
              .few_tokens_float = neon::parts::forward_few_tokens_float,
              .many_tokens_float = neon::parts::forward_many_tokens_float,
              .float64 = float64::forward,
          },
      .dx =
          {
              .few_tokens_float = neon::parts::dx_few_tokens_float,
              .many_tokens_float = neon::parts::dx_many_tokens_float,
              .float64 = float64::dx,
          },
      .dlora =
          {
              .many_tokens_float = neon::parts::dlora_many_tokens_float,
              .float64 = float64::dlora,
          },
  };
  return kernels;
}

}  // namespace qlora::cpu
