// The table of AVX2 + FMA + F16C.
#define QLORA_ISA avx2

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/float64/linear.h"
#include "cpp/cpu/parts/parts.h"

namespace qlora::cpu {

const Kernels& avx2_kernels() {
  using enum Kernel;
  using namespace avx2::parts;
  static constexpr Kernels kernels = {
      .isa = &kAvx2Isa,
      .codec = &codec,
      .dense = &dense,
      .forward = kernels_for<kFewTokensInt8, kFewTokensInt, kFewTokensFloat, kManyTokensInt, kManyTokensInt8,
                             kManyTokensFloat>(float64::forward),
      .dx = kernels_for<kFewTokensFloat, kManyTokensInt, kManyTokensInt8, kManyTokensFloat>(float64::dx),
      .dlora = kernels_for<kManyTokensFloat>(float64::dlora),
  };
  return kernels;
}

}  // namespace qlora::cpu
