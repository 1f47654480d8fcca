// Which instruction set the CPU kernels run with. An instruction set is a set of processor features.
#pragma once

#include <cstdint>

#include "cpp/format/portable.h"

// The sets that this build compiles, QLORA_SET(name) for each; sources.cmake defines it.
#ifndef QLORA_CPU_ISAS  // a file that is compiled alone, by an editor or a test
#define QLORA_CPU_ISAS QLORA_SET(scalar)
#endif

namespace qlora::cpu {

enum Feature : uint32_t {
  kAvx2 = 1u << 0,
  kFma = 1u << 1,
  kF16c = 1u << 2,
  kAvx512f = 1u << 3,
  kAvx512bw = 1u << 4,
  kAvx512vl = 1u << 5,
  kAvx512dq = 1u << 6,
  kAvx512vbmi = 1u << 7,
  kAvx512bf16 = 1u << 8,
  kAvx512vnni = 1u << 9,
  kAmxBf16 = 1u << 10,  // with AMX-TILE, and the system's permission to use tiles
  kAsimd = 1u << 11,    // Advanced SIMD of ARMv8.0, which every AArch64 processor has
  kArmBf16 = 1u << 12,
  kAvxVnni = 1u << 13,
  kArmI8mm = 1u << 14,
  kArmDotProd = 1u << 15,
};

// The features that kernels are compiled for, and the set's name, which the folder in isa/, the file isa_<name>.cpp,
// the namespace and QLORA_CPU_ISA use.
struct Isa {
  const char* name;
  uint32_t needs;  // Features, or-ed
};
inline constexpr Isa kScalarIsa = {"scalar", 0};
inline constexpr Isa kAvx2Isa = {"avx2", kAvx2 | kFma | kF16c};
inline constexpr Isa kAvxVnniIsa = {"avx_vnni", kAvx2Isa.needs | kAvxVnni};
inline constexpr Isa kAvx512Isa = {
    "avx512", kAvx2Isa.needs | kAvx512f | kAvx512bw | kAvx512vl | kAvx512dq | kAvx512vbmi | kAvx512vnni};
inline constexpr Isa kAvx512Bf16Isa = {"avx512_bf16", kAvx512Isa.needs | kAvx512bf16};
inline constexpr Isa kAmxBf16Isa = {"amx_bf16", kAvx512Bf16Isa.needs | kAmxBf16};
inline constexpr Isa kNeonIsa = {"neon", kAsimd};
inline constexpr Isa kNeonDotProdIsa = {"neon_dotprod", kNeonIsa.needs | kArmDotProd};
inline constexpr Isa kNeonBf16Isa = {"neon_bf16", kNeonDotProdIsa.needs | kArmBf16};
inline constexpr Isa kNeonI8mmIsa = {"neon_i8mm", kNeonBf16Isa.needs | kArmI8mm};

// The best come first: the first one that a processor supports is used.
inline constexpr const Isa* kIsas[] = {&kNeonI8mmIsa,   &kNeonBf16Isa, &kNeonDotProdIsa, &kNeonIsa, &kAmxBf16Isa,
                                       &kAvx512Bf16Isa, &kAvx512Isa,   &kAvxVnniIsa,     &kAvx2Isa, &kScalarIsa};

QLORA_EXPORT bool compiled(const Isa&);              // whether this build has it
QLORA_EXPORT bool supported(const Isa&);             // whether it is compiled and this processor has its features
QLORA_EXPORT const Isa* find_isa(const char* name);  // null if there is none; neither case nor '_' and '-' matter
QLORA_EXPORT const char* isa_names();                // "scalar, .. or .."

// The set in use: the first supported one, or the one that the environment variable QLORA_CPU_ISA names at the first
// call. isa_error() says why that name cannot be used (unknown, not compiled, not on this processor), or is null.
QLORA_EXPORT const Isa& current_isa();
QLORA_EXPORT const char* isa_error();

// What the choice of a kernel depends on (tuning.h).
struct Cpu {
  uint32_t features;  // of the instruction set in use
  bool intel;         // the processor is Intel's, whose vdpbf16ps is slow
  bool isa_forced;    // QLORA_CPU_ISA names the set, so every instruction of it is wanted
  bool fast_pairs;    // products of int16 pairs are issued as often as those of float32
  bool integers;      // kernels may multiply in integers: QLORA_CPU_INTEGERS is not 0 at the first call

  constexpr bool has(Feature feature) const { return features & feature; }
};
QLORA_EXPORT const Cpu& current_cpu();

}  // namespace qlora::cpu
