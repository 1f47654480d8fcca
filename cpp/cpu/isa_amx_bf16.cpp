// The table of AMX with BF16: AVX-512's, and the kernels of the tile unit.
#define QLORA_ISA amx_bf16

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/parts/parts.h"

namespace qlora::cpu {

const Kernels& amx_bf16_kernels() {
  using enum Kernel;
  using namespace amx_bf16::parts;
  static const Kernels kernels = [] {
    Kernels k = avx512_bf16_kernels();
    k.isa = &kAmxBf16Isa;
    k.forward[kManyTokensTiles] = run<kManyTokensTiles>;
    k.dx[kManyTokensTiles] = run<kManyTokensTiles>;
    k.dlora[kManyTokensTiles] = run<kManyTokensTiles>;
    k.forward[kManyTokensInt8] = run<kManyTokensInt8>;
    k.dx[kManyTokensInt8] = run<kManyTokensInt8>;
    return k;
  }();
  return kernels;
}

}  // namespace qlora::cpu
