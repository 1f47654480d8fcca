// The table of NEON with BF16.
#define QLORA_ISA neon_bf16

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/float64/linear.h"
#include "cpp/cpu/parts/parts.h"

namespace qlora::cpu {

const Kernels& neon_bf16_kernels() {
  using enum Kernel;
  using namespace neon_bf16::parts;
  static constexpr Kernels kernels = {
      .isa = &kNeonBf16Isa,
      .codec = &codec,
      .dense = &dense,
      .forward = kernels_for<kFewTokensInt8, kFewTokensInt, kFewTokensBf16, kFewTokensFloat, kManyTokensInt8,
                             kManyTokensBf16, kManyTokensFloat>(float64::forward),
      .dx = kernels_for<kFewTokensFloat, kManyTokensInt8, kManyTokensBf16, kManyTokensFloat>(float64::dx),
      .dlora = kernels_for<kManyTokensBf16, kManyTokensFloat>(float64::dlora),
  };
  return kernels;
}

}  // namespace qlora::cpu
