// The table of AVX2 + FMA + F16C.
#define QLORA_ISA avx2

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/float64/linear.h"
#include "cpp/cpu/parts/parts.h"

namespace qlora::cpu {

const Kernels& avx2_kernels() {
  static constexpr Kernels kernels = {
      .isa = &kAvx2Isa,
      .codec = &avx2::parts::codec,
      .forward =
          {
              .few_tokens_int = avx2::parts::forward_few_tokens_int,
              .few_tokens_float = avx2::parts::forward_few_tokens_float,
              .many_tokens_float = avx2::parts::forward_many_tokens_float,
              .float64 = float64::forward,
          },
      .dx =
          {
              .few_tokens_float = avx2::parts::dx_few_tokens_float,
              .many_tokens_float = avx2::parts::dx_many_tokens_float,
              .float64 = float64::dx,
          },
      .dlora =
          {
              .many_tokens_float = avx2::parts::dlora_many_tokens_float,
              .float64 = float64::dlora,
          },
  };
  return kernels;
}

}  // namespace qlora::cpu
