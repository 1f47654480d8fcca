// The table of AVX-512 with BF16 and VNNI.
#define QLORA_ISA avx512_bf16

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/float64/linear.h"
#include "cpp/cpu/parts/parts.h"

namespace qlora::cpu {

const Kernels& avx512_bf16_kernels() {
  using enum Kernel;
  using namespace avx512_bf16::parts;
  static constexpr Kernels kernels = {
      .isa = &kAvx512Bf16Isa,
      .codec = &codec,
      .dense = &dense,
      .forward = kernels_for<kFewTokensInt8, kFewTokensInt, kFewTokensFloat, kManyTokensBf16, kManyTokensInt,
                             kManyTokensInt8, kManyTokensFloat>(float64::forward),
      .dx = kernels_for<kFewTokensInt, kFewTokensFloat, kManyTokensBf16, kManyTokensInt, kManyTokensInt8,
                        kManyTokensFloat>(float64::dx),
      .dlora = kernels_for<kManyTokensBf16, kManyTokensFloat>(float64::dlora),
  };
  return kernels;
}

}  // namespace qlora::cpu
