// Which kernel a problem runs with: pure functions of the problem's types and sizes and of the processor, so that they
// can be read and tested anywhere. Each bound says where it comes from; "measured" is bench/cpu_ragged.py, and
// docs/cpu_roofline.md says what limits each kernel. The twin for CUDA is cuda/tuning/choose.h.
#pragma once

#include <cstdint>

#include "cpp/cpu/isa/isa.h"
#include "cpp/format/code_tables.h"
#include "cpp/format/problem.h"

namespace qlora::cpu {

enum class Kernel {
  kFewTokensInt8,    // x and codes as int8, exact int32 sums, no fallback (few_tokens/forward_int8-inl.h)
  kFewTokensInt,     // codes as integers, exact int32 sums, float32 as fallback (few_tokens/*_int-inl.h)
  kFewTokensBf16,    // codes as bfloat16, multiplied in pairs (few_tokens/forward_bf16-inl.h)
  kFewTokensFloat,   // codes as float32 (few_tokens/*_float-inl.h)
  kManyTokensInt8,   // panels of int8, exact int32 sums, no fallback (many_tokens/*_int8-inl.h)
  kManyTokensTiles,  // bfloat16 in a tile unit (many_tokens_tiles/)
  kManyTokensBf16,   // panels of bfloat16 pairs (many_tokens/linear_bf16-inl.h)
  kManyTokensInt,    // panels of int16 pairs, exact int32 sums, float32 as fallback (many_tokens/*_int-inl.h)
  kManyTokensFloat,  // panels of float32 (many_tokens/*_float-inl.h)
  kFloat64,          // plain loops (float64/)
};

// A set of element types.
struct DTypes {
  unsigned bits = 0;

  constexpr DTypes() = default;
  template <class... Types>
  constexpr explicit DTypes(Types... types) : bits(((1u << static_cast<int>(types)) | ...)) {}
  constexpr bool has(DType dtype) const { return bits >> static_cast<int>(dtype) & 1u; }
};
inline constexpr DTypes kBFloat16Only(DType::kBFloat16), kFloat64Only(DType::kFloat64);
inline constexpr DTypes k16Bit(DType::kBFloat16, DType::kFloat16);
inline constexpr DTypes kUpTo32Bit(DType::kBFloat16, DType::kFloat16, DType::kFloat32);

// What a kernel is called, which types it takes, and whether it is one of those for few tokens. Everything else that
// depends on which kernels there are is derived from these rows.
struct KernelInfo {
  Kernel kernel;
  const char* name;
  DTypes types;
  bool few_tokens;
};
inline constexpr KernelInfo kKernelInfo[] = {
    {Kernel::kFewTokensInt8, "few_tokens_int8", kUpTo32Bit, true},
    {Kernel::kFewTokensInt, "few_tokens_int", k16Bit, true},
    {Kernel::kFewTokensBf16, "few_tokens_bf16", kBFloat16Only, true},
    {Kernel::kFewTokensFloat, "few_tokens_float", kUpTo32Bit, true},
    {Kernel::kManyTokensInt8, "many_tokens_int8", kUpTo32Bit, false},
    {Kernel::kManyTokensTiles, "many_tokens_tiles", kBFloat16Only, false},
    {Kernel::kManyTokensBf16, "many_tokens_bf16", kBFloat16Only, false},
    {Kernel::kManyTokensInt, "many_tokens_int", k16Bit, false},
    {Kernel::kManyTokensFloat, "many_tokens_float", kUpTo32Bit, false},
    {Kernel::kFloat64, "float64", kFloat64Only, false},
};
inline constexpr int kKernelCount = sizeof(kKernelInfo) / sizeof(kKernelInfo[0]);
constexpr const KernelInfo& info_of(Kernel kernel) { return kKernelInfo[static_cast<int>(kernel)]; }
static_assert(
    [] {
      for (int i = 0; i < kKernelCount; ++i)
        if (static_cast<int>(kKernelInfo[i].kernel) != i) return false;
      return true;
    }(),
    "the rows of kKernelInfo are in the order of Kernel");
constexpr const char* kernel_name(Kernel kernel) { return info_of(kernel).name; }

// The kernels that a problem goes to, one after the other until one serves it: a kernel may find out from the data,
// which no choice sees, that it cannot (Outcome, dispatch.h). The last one always can.
struct Choice {
  Kernel kernels[6];
  int count = 0;

  constexpr void add(Kernel kernel) { kernels[count++] = kernel; }
  constexpr const Kernel* begin() const { return kernels; }
  constexpr const Kernel* end() const { return kernels + count; }
};

// ---- what a kernel can serve at all ----

// Tokens. The integer kernel of dx keeps all of them in registers; in the other one a strip of sums must fit half of
// the scratch, whatever the shift of the rows of W.
inline constexpr int64_t kMostDxIntTokens = 16, kMostDxFloatTokens = 64;
inline constexpr int64_t kMostForwardTokens = 64;  // a 64-bit mask marks rejected tokens
inline constexpr int64_t kDxIntColumns = 64;       // that must have one scale: four nibbles of 16 lanes

// Rows that are streamed in lanes of eight weights: a chunk of NEON holds at most four scales, which are five of blocks
// of 16 in a row that begins within one.
constexpr bool has_streamable_rows(const Weight& w) {
  return w.k > 0 && (w.scales.block_size > 16 || has_one_scale_per(16, w));
}
// Whether panels of integers can hold the weight: rows are whole groups of kIntColumns columns, each half of them has
// one scale, and integers serve the code. An offset may cancel most of a weight's value, so beside one they must be the
// values. dX rounds dy · scale twice, which is accurate enough for bfloat16 only.
inline constexpr int kIntColumns = 64, kLeastIntBlock = 32;
constexpr bool has_int_columns(const Weight& w) {
  if (is_wide(w.code)) return false;
  const IntCodeTable& ints = int_codes(w.code);
  return w.n > 0 && w.k > 0 && w.k % kIntColumns == 0 && has_one_scale_per(kLeastIntBlock, w) &&
         (w.scales.offsets ? ints.exact : ints.serves);
}
// Whether x and dy can be rounded to int8 for the weight: rows are whole segments, and a word of four weights never has
// two scales.
constexpr bool has_int8_segments(const Weight& w) {
  return !is_wide(w.code) && w.n > 0 && w.k > 0 && has_one_scale_per(16, w) && w.k % kInt8Segment == 0;
}
inline constexpr int64_t kInt8Rows = 16;  // that few tokens are multiplied with side by side
// Whether few tokens can be multiplied by the weight in matrices of bytes: each chunk has one scale.
constexpr bool has_byte_matrices(const Weight& w) { return has_one_scale_per(64, w) && !w.scales.offsets; }
constexpr bool accepts(Kernel kernel, const LinearProblem& p) {
  if (!info_of(kernel).types.has(p.dtype)) return false;
  if (kernel == Kernel::kManyTokensInt8)
    return p.activations == Activations::kInt8 && p.m > 0 && has_int8_segments(p.w);
  if (kernel == Kernel::kFewTokensInt8)
    return p.activations == Activations::kInt8 && p.m > 0 && p.m <= kMostForwardTokens && p.w.n >= kInt8Rows &&
           has_int8_segments(p.w);
  if (kernel == Kernel::kManyTokensInt) return p.m > 0 && has_int_columns(p.w);
  if (!info_of(kernel).few_tokens) return true;
  if (p.m == 0 || p.w.n == 0 || !has_streamable_rows(p.w)) return false;
  if (is_wide(p.w.code)) return kernel == Kernel::kFewTokensFloat;
  // An offset may cancel most of a weight's value, so integers that are only near the values do not serve beside one.
  const IntCodeTable& ints = int_codes(p.w.code);
  if (kernel == Kernel::kFewTokensInt && !(p.w.scales.offsets ? ints.exact : ints.serves)) return false;
  if (kernel == Kernel::kFewTokensBf16 && p.w.scales.offsets) return false;
  return kernel == Kernel::kFewTokensFloat || p.m <= kMostForwardTokens;
}
constexpr bool accepts(Kernel kernel, const LinearDxProblem& p) {
  if (!info_of(kernel).types.has(p.dtype)) return false;
  if (kernel == Kernel::kManyTokensInt8)
    return p.activations == Activations::kInt8 && p.m > 0 && has_int8_segments(p.w) &&
           has_one_scale_per(kLeastIntBlock, p.w);
  if (kernel == Kernel::kFewTokensInt8) return false;
  if (kernel == Kernel::kManyTokensInt)
    return p.dtype == DType::kBFloat16 && p.m > 0 && p.w.n % kIntColumns == 0 && has_int_columns(p.w);
  if (!info_of(kernel).few_tokens) return true;
  if (!k16Bit.has(p.dtype) || p.m == 0 || p.w.n == 0 || !has_streamable_rows(p.w)) return false;
  if (is_wide(p.w.code) && kernel != Kernel::kFewTokensFloat) return false;
  if (kernel == Kernel::kFewTokensInt && !int_codes(p.w.code).serves) return false;
  if (kernel == Kernel::kFewTokensInt)
    return p.m <= kMostDxIntTokens && has_one_scale_per(kDxIntColumns, p.w) && !p.w.scales.offsets;
  return kernel == Kernel::kFewTokensFloat && p.m <= kMostDxFloatTokens;
}
constexpr bool accepts(Kernel kernel, const LoraGradProblem& p) {
  return info_of(kernel).types.has(p.dtype) && !info_of(kernel).few_tokens && kernel != Kernel::kManyTokensInt &&
         kernel != Kernel::kManyTokensInt8;
}

// Whether a kernel takes a call of several adapters. The others run once per adapter.
constexpr bool takes_adapters(Kernel kernel) {
  return kernel != Kernel::kManyTokensTiles && kernel != Kernel::kFloat64;
}

// ---- which of them is chosen ----

// bfloat16 is multiplied in pairs where the processor does that well. On Intel's cores vdpbf16ps issues every second
// cycle, half as fast as widening to float32 and fma; on AMD's (Zen 4, Zen 5) it is twice as fast. Asking for the
// instruction set by name insists on it. ARM's BFDOT issues as often as FMLA, and does twice as much.
constexpr bool multiplies_pairs(DType dtype, const Cpu& cpu) {
  if (dtype != DType::kBFloat16) return false;
  return cpu.has(kArmBf16) || (cpu.has(kAvx512bf16) && (cpu.isa_forced || !cpu.intel));
}

// bfloat16 is multiplied by tiles where there is a tile unit, which takes 16 tokens at the cost of one.
constexpr bool has_tiles(DType dtype, const Cpu& cpu) { return dtype == DType::kBFloat16 && cpu.has(kAmxBf16); }

// The minimum number of weights in a row (forward) or column (dx) for integer products. With fewer weights, the search
// for concentrated ones (verdict/rows-inl.h) reads all of them. These thresholds are estimates, not
// measured. Columns of dx in panels, whose W is rounded too, must also be long enough for errors to average out.
inline constexpr int64_t kLeastRowWeights = 128, kLeastColumnWeights = 64, kLeastPanelColumnWeights = 256;

// 16-bit types are multiplied as int16 pairs where the processor has nothing better for bfloat16: an instruction then
// does twice what one of float32 does. Measured on Zen 3: 1.4 to 1.7 times as fast, 1.2 with offsets.
constexpr bool has_long_sums(const LinearProblem& p) { return p.w.k >= kLeastRowWeights; }
constexpr bool has_long_sums(const LinearDxProblem& p) { return p.w.n >= kLeastPanelColumnWeights; }
constexpr bool has_long_sums(const LoraGradProblem&) { return false; }
template <class Problem>
constexpr bool multiplies_int_pairs(const Problem& p, const Cpu& cpu) {
  return cpu.integers && cpu.has(kAvx2) && cpu.fast_pairs && !has_tiles(p.dtype, cpu) &&
         !multiplies_pairs(p.dtype, cpu) && has_long_sums(p) && accepts(Kernel::kManyTokensInt, p);
}

// Matrices of bytes hold integers, so the same minimum applies.
constexpr bool multiplies_byte_matrices(const LinearProblem& p, const Cpu& cpu) {
  return cpu.integers && cpu.has(kArmI8mm) && p.w.k >= kLeastRowWeights && has_byte_matrices(p.w) &&
         accepts(Kernel::kFewTokensInt, p);
}

// Beyond this the float32 kernel, which decodes W again for each group of tokens (kMaxFloatTokens of
// isa/<set>/stream.h), is behind panels: after one group with AVX-512, two with AVX2 (Zen 3, one thread, 4096x4096, 5
// tokens: 5.0 ms against 6.7, 8: 6.6 against 6.7; 1536x576, 8: 0.40 against 0.39, 12: 0.57 against 0.53).
inline constexpr int64_t kMostFloatTokens = 8;

// The kernels for many tokens decode W once for all tokens, and those for few once for each group that registers can
// sum; the former are ahead from some number of tokens on, and sooner where they multiply pairs. Plain C++ has no
// look-up worth decoding in registers for.
//
// Forward, measured on Zen 5 with AVX-512: without pairs up to 48 tokens (1024x1024 in float16, one thread, 48 tokens:
// 351 us against 434), but half as many where K is no multiple of 4, for x is then arranged for four or eight shifts
// first; AVX2 up to 20 where many tokens are multiplied as integers (Zen 3, one thread, 4096x4096, 20 tokens: 8.0 ms
// against 8.8, 24: 9.0 against 8.6). With pairs, 10 tokens (8 tokens 0.92 ms against 1.20, 10: 1.22 against 1.30,
// 12: 1.48 against 1.31), 12 where panels decode ragged rows, and 6 where there are four or eight shifts. Against tiles
// 6, and 12 of ragged rows (Intel, two threads, 4096x4096, 6 tokens 0.90 ms against 0.93, 8: 1.00 against 0.91;
// 1024x1000, 12: 127 us against 142). Wide codes, which are multiplied in float32: with pairs 5 (Zen 4, one thread,
// 1536x576 in Q8_0, 4 tokens: 181 us against 237, 8: 285 against 270), with AVX-512 8 (1536x512, 219 us against 228),
// with AVX2 4 (229 us against 234).
//
// On ARM nothing has been measured. The bounds are from cycles of the inner loops by llvm-mca for Neoverse N1 and V2
// (docs/cpu_static.md), which agree: decoding 64 weights for panels costs what two to three groups of tokens
// cost in registers. So one group of 4 tokens; with pairs, whose groups are of 6 tokens and half as dear, two groups;
// and four groups of 6 by matrices of bytes where many tokens are multiplied in float32.
constexpr int64_t most_few_tokens(const LinearProblem& p, const Cpu& cpu) {
  if (cpu.has(kAsimd)) return multiplies_pairs(p.dtype, cpu) ? 12 : multiplies_byte_matrices(p, cpu) ? 24 : 4;
  constexpr int64_t kPanelGroup = 64;  // weights that AVX-512 panels decode at once, in rows that begin with a group
  if (!cpu.has(kAvx2)) return 0;
  if (is_wide(p.w.code)) return !cpu.has(kAvx512f) ? 4 : multiplies_pairs(p.dtype, cpu) ? 5 : kMostFloatTokens;
  if (has_tiles(p.dtype, cpu)) return p.w.k % 4 ? 8 : p.w.k % kPanelGroup ? 12 : 6;
  if (!cpu.has(kAvx512f) && multiplies_int_pairs(p, cpu)) return 20;
  if (!multiplies_pairs(p.dtype, cpu)) return p.w.k % 4 ? 24 : 48;
  return p.w.k % 4 ? 6 : p.w.k % kPanelGroup ? 12 : 10;
}

// Int8 is taken wherever it is asked for and rows are whole segments; other shapes are multiplied exactly. Beyond these
// tokens, panels of int8 are ahead of decoding W once for each group of 8. Measured on Zen 4, one thread, 2048x2048 and
// 576x576, with and without rank 16: with AVX-512, 32 tokens take 0.88 to 1.04 of the panels' time. With AVX2, 12
// tokens take 0.66 to 0.86, and 16 take 0.83 to 1.17, more than 1 for codes that are no small integers. On ARM nothing
// has been measured; the bound is one group.
constexpr int64_t most_int8_few_tokens(const Cpu& cpu) {
  return cpu.has(kAvx512f) ? 32 : cpu.has(kAvx2) ? 12 : cpu.has(kAsimd) ? 8 : 0;
}

// Of 16-bit types: integers, or on ARM pairs of bfloat16. SMLAL multiplies half as fast as FMLA, and beyond 2 tokens
// that costs more than decoding to float32 does (V2: 64 weights and 2 tokens 20 cycles against 24, 3: 31 against 28).
// Matrices of bytes are ahead of both (V2: 64 weights and 1 token 6.8 cycles against 9.7, 6: 23 against 25).
constexpr Kernel few_tokens_kernel(const LinearProblem& p, const Cpu& cpu) {
  if (p.dtype == DType::kFloat32 || is_wide(p.w.code)) return Kernel::kFewTokensFloat;
  if (multiplies_byte_matrices(p, cpu)) return Kernel::kFewTokensInt;
  if (cpu.has(kAsimd) && multiplies_pairs(p.dtype, cpu) && !p.w.scales.offsets) return Kernel::kFewTokensBf16;
  if (!cpu.integers || p.w.k < kLeastRowWeights || (cpu.has(kAsimd) && p.m > 2)) return Kernel::kFewTokensFloat;
  return accepts(Kernel::kFewTokensInt, p) ? Kernel::kFewTokensInt : Kernel::kFewTokensFloat;
}

// dx, measured likewise. Float32 has no kernel for few tokens. With AVX-512 up to 16 tokens where columns can be taken
// 64 at a time, with pairs 6 (6 tokens 0.83 ms against 0.87, 8: 1.10 against 0.97). Elsewhere AVX-512 is ahead up to 8
// tokens, with pairs 4; against tiles 8 (1536x576, 8 tokens 108 us against 115, 12: 141 against 114), and 16 of ragged
// rows; and 6 where rows of W begin inside a lane, since sums are then kept for up to eight shifts. AVX2 (Zen 3, one
// thread) is ahead up to 3 tokens where many are multiplied as integers (1536x576, 3 tokens: 0.23 ms against 0.24, 4:
// 0.30 against 0.26), up to 4 where panels decode whole groups (4: 0.30 against 0.36, 5: 0.39 against 0.37), and else
// up to 8 (1000x1000, 8: 0.64 against 0.67, 10: 0.84 against 0.71). On ARM, from llvm-mca as above: 3 tokens, and 1
// with pairs.
constexpr int64_t most_few_tokens(const LinearDxProblem& p, const Cpu& cpu) {
  if (!k16Bit.has(p.dtype)) return 0;
  if (cpu.has(kAsimd)) return multiplies_pairs(p.dtype, cpu) ? 1 : 3;
  if (!cpu.has(kAvx2)) return 0;
  constexpr int64_t kPanelGroup = 32;  // weights that AVX2 panels decode at once
  if (!cpu.has(kAvx512f)) return multiplies_int_pairs(p, cpu) ? 3 : p.w.k % kPanelGroup ? 8 : 4;
  const bool integers = cpu.integers && accepts(Kernel::kFewTokensInt, p);
  if (has_tiles(p.dtype, cpu)) return integers ? 8 : p.w.k % 8 ? 6 : 16;
  if (multiplies_pairs(p.dtype, cpu)) return integers ? 6 : 4;
  return integers ? 16 : p.w.k % 8 ? 6 : 8;
}

// The kernels for many tokens, which take everything; those in pairs leave what is out of their range to the others.
template <class Problem>
constexpr void add_many_tokens(const Problem& p, const Cpu& cpu, Choice* c) {
  if (p.dtype == DType::kFloat64) return c->add(Kernel::kFloat64);
  if (has_tiles(p.dtype, cpu)) c->add(Kernel::kManyTokensTiles);
  if (multiplies_pairs(p.dtype, cpu)) c->add(Kernel::kManyTokensBf16);
  if (multiplies_int_pairs(p, cpu)) return c->add(Kernel::kManyTokensInt);
  c->add(Kernel::kManyTokensFloat);
}

constexpr Choice choose(const LinearProblem& p, const Cpu& cpu) {
  Choice c;
  if (accepts(Kernel::kManyTokensInt8, p)) {
    if (p.m <= most_int8_few_tokens(cpu) && accepts(Kernel::kFewTokensInt8, p)) c.add(Kernel::kFewTokensInt8);
    c.add(Kernel::kManyTokensInt8);
  }
  if (p.m <= most_few_tokens(p, cpu) && accepts(Kernel::kFewTokensFloat, p)) {
    const Kernel kernel = few_tokens_kernel(p, cpu);
    if (kernel != Kernel::kFewTokensFloat || p.m <= kMostFloatTokens) c.add(kernel);
  }
  add_many_tokens(p, cpu, &c);
  return c;
}

constexpr Choice choose(const LinearDxProblem& p, const Cpu& cpu) {
  Choice c;
  if (accepts(Kernel::kManyTokensInt8, p)) c.add(Kernel::kManyTokensInt8);
  if (p.m <= most_few_tokens(p, cpu) && accepts(Kernel::kFewTokensFloat, p)) {
    if (cpu.integers && cpu.has(kAvx512vbmi) && p.w.n >= kLeastColumnWeights && accepts(Kernel::kFewTokensInt, p)) {
      c.add(Kernel::kFewTokensInt);
      return c;
    }
    c.add(Kernel::kFewTokensFloat);
  }
  add_many_tokens(p, cpu, &c);
  return c;
}

constexpr Choice choose(const LoraGradProblem& p, const Cpu& cpu) {
  Choice c;
  add_many_tokens(p, cpu, &c);
  return c;
}

}  // namespace qlora::cpu
