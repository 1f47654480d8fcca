// The table of plain C++.
#define QLORA_ISA scalar

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/float64/linear.h"
#include "cpp/cpu/parts/parts.h"

namespace qlora::cpu {

const Kernels& scalar_kernels() {
  using enum Kernel;
  using namespace scalar::parts;
  static constexpr Kernels kernels = {
      .isa = &kScalarIsa,
      .codec = &codec,
      .dense = &dense,
      .forward = kernels_for<kFewTokensInt8, kFewTokensInt, kFewTokensBf16, kFewTokensFloat, kManyTokensInt,
                             kManyTokensInt8, kManyTokensFloat>(float64::forward),
      .dx = kernels_for<kFewTokensInt, kFewTokensFloat, kManyTokensInt, kManyTokensInt8, kManyTokensFloat>(float64::dx),
      .dlora = kernels_for<kManyTokensFloat>(float64::dlora),
  };
  return kernels;
}

}  // namespace qlora::cpu
