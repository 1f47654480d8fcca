// The table of AVX-512 with BF16 and VNNI.
#define QLORA_ISA avx512_bf16

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/float64/linear.h"
#include "cpp/cpu/parts/parts.h"

namespace qlora::cpu {

const Kernels& avx512_bf16_kernels() {
  static constexpr Kernels kernels = {
      .isa = &kAvx512Bf16Isa,
      .codec = &avx512_bf16::parts::codec,
      .forward =
          {
              .few_tokens_int = avx512_bf16::parts::forward_few_tokens_int,
              .few_tokens_float = avx512_bf16::parts::forward_few_tokens_float,
              .many_tokens_bf16 = avx512_bf16::parts::forward_many_tokens_bf16,
              .many_tokens_float = avx512_bf16::parts::forward_many_tokens_float,
              .float64 = float64::forward,
          },
      .dx =
          {
              .few_tokens_int = avx512_bf16::parts::dx_few_tokens_int,
              .few_tokens_float = avx512_bf16::parts::dx_few_tokens_float,
              .many_tokens_bf16 = avx512_bf16::parts::dx_many_tokens_bf16,
              .many_tokens_float = avx512_bf16::parts::dx_many_tokens_float,
              .float64 = float64::dx,
          },
      .dlora =
          {
              .many_tokens_bf16 = avx512_bf16::parts::dlora_many_tokens_bf16,
              .many_tokens_float = avx512_bf16::parts::dlora_many_tokens_float,
              .float64 = float64::dlora,
          },
  };
  return kernels;
}

}  // namespace qlora::cpu
