// Which instruction set the CPU kernels run with.
#pragma once

namespace qlora::cpu {

// In order of preference; each includes the ones before it. kAvx2 means AVX2 + FMA + F16C, kAvx512 means F + BW + VL +
// DQ + VBMI, kAvx512Bf16 adds AVX512_BF16 and VNNI.
enum class Isa { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };
inline constexpr int kIsaCount = 4;

const char* isa_name(Isa);  // "scalar", "avx2", "avx512", "avx512_bf16"
Isa best_isa();             // the best this processor has

// The one in use: best_isa(), or the one named by the environment variable QLORA_CPU_ISA when first asked.
// `isa_error()` is null, or says why that name cannot be honoured (unknown, or not on this processor).
Isa current_isa();
const char* isa_error();

// Whether large bfloat16 products should use vdpbf16ps: on Intel's cores it issues every second cycle, which makes it
// half as fast as widening to float32 and fma; on AMD's it is twice as fast. QLORA_CPU_ISA=avx512_bf16 insists on it.
bool prefers_bf16_dot();

}  // namespace qlora::cpu
