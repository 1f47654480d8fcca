// The table of NEON with BF16.
#define QLORA_ISA neon_bf16

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/float64/linear.h"
#include "cpp/cpu/parts/parts.h"

namespace qlora::cpu {

const Kernels& neon_bf16_kernels() {
  static constexpr Kernels kernels = {
      .isa = &kNeonBf16Isa,
      .codec = &neon_bf16::parts::codec,
      .forward =
          {
              .few_tokens_int = neon_bf16::parts::forward_few_tokens_int,
              .few_tokens_bf16 = neon_bf16::parts::forward_few_tokens_bf16,
              .few_tokens_float = neon_bf16::parts::forward_few_tokens_float,
              .many_tokens_bf16 = neon_bf16::parts::forward_many_tokens_bf16,
              .many_tokens_float = neon_bf16::parts::forward_many_tokens_float,
              .float64 = float64::forward,
          },
      .dx =
          {
              .few_tokens_float = neon_bf16::parts::dx_few_tokens_float,
              .many_tokens_bf16 = neon_bf16::parts::dx_many_tokens_bf16,
              .many_tokens_float = neon_bf16::parts::dx_many_tokens_float,
              .float64 = float64::dx,
          },
      .dlora =
          {
              .many_tokens_bf16 = neon_bf16::parts::dlora_many_tokens_bf16,
              .many_tokens_float = neon_bf16::parts::dlora_many_tokens_float,
              .float64 = float64::dlora,
          },
  };
  return kernels;
}

}  // namespace qlora::cpu
