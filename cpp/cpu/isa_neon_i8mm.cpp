// The table of NEON with I8MM: that of NEON with BF16, with other kernels for few tokens and for int8.
#define QLORA_ISA neon_i8mm

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/parts/parts.h"

namespace qlora::cpu {
namespace {

Outcome few_tokens_int(const Pool& pool, const LinearProblem& p) {
  if (has_byte_matrices(p.w)) return neon_i8mm::parts::run<Kernel::kFewTokensInt>(pool, p);
  return neon_bf16_kernels().forward[Kernel::kFewTokensInt](pool, p);
}

}  // namespace

const Kernels& neon_i8mm_kernels() {
  static const Kernels kernels = [] {
    Kernels k = neon_bf16_kernels();
    k.isa = &kNeonI8mmIsa;
    k.forward[Kernel::kFewTokensInt] = few_tokens_int;
    k.forward[Kernel::kFewTokensInt8] = neon_i8mm::parts::run<Kernel::kFewTokensInt8>;
    k.forward[Kernel::kManyTokensInt8] = neon_i8mm::parts::run<Kernel::kManyTokensInt8>;
    k.dx[Kernel::kManyTokensInt8] = neon_i8mm::parts::run<Kernel::kManyTokensInt8>;
    return k;
  }();
  return kernels;
}

}  // namespace qlora::cpu
