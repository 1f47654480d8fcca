// The table of NEON with SDOT: NEON's, with other kernels for int8.
#define QLORA_ISA neon_dotprod

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/parts/parts.h"

namespace qlora::cpu {

const Kernels& neon_dotprod_kernels() {
  using enum Kernel;
  using namespace neon_dotprod::parts;
  static const Kernels kernels = [] {
    Kernels k = neon_kernels();
    k.isa = &kNeonDotProdIsa;
    k.forward[kFewTokensInt8] = run<kFewTokensInt8>;
    k.forward[kManyTokensInt8] = run<kManyTokensInt8>;
    k.dx[kManyTokensInt8] = run<kManyTokensInt8>;
    return k;
  }();
  return kernels;
}

}  // namespace qlora::cpu
