// The table of NEON.
#define QLORA_ISA neon

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/float64/linear.h"
#include "cpp/cpu/parts/parts.h"

namespace qlora::cpu {

const Kernels& neon_kernels() {
  using enum Kernel;
  using namespace neon::parts;
  static constexpr Kernels kernels = {
      .isa = &kNeonIsa,
      .codec = &codec,
      .dense = &dense,
      .forward = kernels_for<kFewTokensInt8, kFewTokensInt, kFewTokensFloat, kManyTokensInt8, kManyTokensFloat>(
          float64::forward),
      .dx = kernels_for<kFewTokensFloat, kManyTokensInt8, kManyTokensFloat>(float64::dx),
      .dlora = kernels_for<kManyTokensFloat>(float64::dlora),
  };
  return kernels;
}

}  // namespace qlora::cpu
