// The table of AVX-VNNI: AVX2's, with other kernels in integers.
#define QLORA_ISA avx_vnni

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/parts/parts.h"

namespace qlora::cpu {
namespace avx_vnni::parts {

template <>
Outcome run_with_offsets<Kernel::kFewTokensInt>(const Pool& pool, const LinearProblem& p) {
  return avx2_kernels().forward[Kernel::kFewTokensInt](pool, p);
}

}  // namespace avx_vnni::parts

const Kernels& avx_vnni_kernels() {
  using enum Kernel;
  using namespace avx_vnni::parts;
  static const Kernels kernels = [] {
    Kernels k = avx2_kernels();
    k.isa = &kAvxVnniIsa;
    k.forward[kFewTokensInt8] = run<kFewTokensInt8>;
    k.forward[kFewTokensInt] = run<kFewTokensInt>;
    k.forward[kManyTokensInt] = run<kManyTokensInt>;
    k.dx[kManyTokensInt] = run<kManyTokensInt>;
    k.forward[kManyTokensInt8] = run<kManyTokensInt8>;
    k.dx[kManyTokensInt8] = run<kManyTokensInt8>;
    return k;
  }();
  return kernels;
}

}  // namespace qlora::cpu
