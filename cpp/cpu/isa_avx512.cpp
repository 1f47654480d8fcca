// The table of AVX-512 (F, BW, VL, DQ, VBMI).
#define QLORA_ISA avx512

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/float64/linear.h"
#include "cpp/cpu/parts/parts.h"

namespace qlora::cpu {

const Kernels& avx512_kernels() {
  using enum Kernel;
  using namespace avx512::parts;
  static constexpr Kernels kernels = {
      .isa = &kAvx512Isa,
      .codec = &codec,
      .dense = &dense,
      .forward = kernels_for<kFewTokensInt8, kFewTokensInt, kFewTokensFloat, kManyTokensInt, kManyTokensInt8,
                             kManyTokensFloat>(float64::forward),
      .dx = kernels_for<kFewTokensInt, kFewTokensFloat, kManyTokensInt, kManyTokensInt8, kManyTokensFloat>(float64::dx),
      .dlora = kernels_for<kManyTokensFloat>(float64::dlora),
  };
  return kernels;
}

}  // namespace qlora::cpu
