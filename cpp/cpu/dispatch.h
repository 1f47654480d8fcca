// One table of kernels for each instruction set. isa_<name>.cpp fills it from the set's parts (parts/parts.h);
// dispatch.cpp sends each call of kernels.h to the table in use, and there to the kernel that tuning.h chooses.
#pragma once

#include "cpp/cpu/isa/isa.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/tuning.h"

namespace qlora::cpu {

// How a kernel's attempt at a call has ended. Unless kDone, the output is undefined, and the call goes to the next
// kernel of its choice. All but kTooLarge are found in the data, which no choice has seen.
enum class Outcome {
  kDone,
  kTooLarge,    // for the scratch that the kernel may use, or its registers
  kOutOfRange,  // its values are so small that a multiplication which takes subnormals for zero would lose them
};

// The kernels of an instruction set for one operator. Null where the set or the operator has no such kernel.
template <class Problem>
struct KernelsFor {
  using Run = Outcome (*)(const Pool&, const Problem&);
  Run by_kernel[kKernelCount] = {};

  constexpr Run& operator[](Kernel kernel) { return by_kernel[static_cast<int>(kernel)]; }
  constexpr Run operator[](Kernel kernel) const { return by_kernel[static_cast<int>(kernel)]; }
};

// What a set has for a function of kernels.h: the same arguments, but it throws its error.
template <class... Arguments>
auto throwing(Error (*)(Arguments...)) -> void (*)(Arguments...);

struct Codec {
  decltype(throwing(&cpu::quantize_nf4)) quantize_nf4;
  decltype(throwing(&cpu::search_absmax_nf4)) search_absmax_nf4;
  decltype(throwing(&cpu::encode_nf4)) encode_nf4;
  decltype(throwing(&cpu::encode_nf4_with_feedback)) encode_nf4_with_feedback;
  decltype(throwing(&cpu::encode_nf4_stochastic)) encode_nf4_stochastic;
  decltype(throwing(&cpu::merge_lora_nf4)) merge_lora_nf4;
  decltype(throwing(&cpu::quantize_absmax)) quantize_absmax;
  decltype(throwing(&cpu::dequantize_absmax)) dequantize_absmax;
  decltype(throwing(&cpu::dequantize_nf4)) dequantize_nf4;
};

// The products of a dense weight, which have one kernel each.
struct Dense {
  decltype(throwing(&cpu::linear_dense)) linear_dense;
  decltype(throwing(&cpu::linear_dense_dx)) linear_dense_dx;
};

struct Kernels {
  const Isa* isa;
  const Codec* codec;
  const Dense* dense;
  KernelsFor<LinearProblem> forward;
  KernelsFor<LinearDxProblem> dx;
  KernelsFor<LoraGradProblem> dlora;
};

// Whether the instruction set in use has a kernel for the problem's operator that takes such a problem.
QLORA_EXPORT bool serves(Kernel, const LinearProblem&);
QLORA_EXPORT bool serves(Kernel, const LinearDxProblem&);
QLORA_EXPORT bool serves(Kernel, const LoraGradProblem&);

// The tables of this build, of which the one of current_isa() is in use.
#define QLORA_SET(name) const Kernels& name##_kernels();
QLORA_CPU_ISAS
#undef QLORA_SET
#define QLORA_SET(name) name##_kernels,
inline constexpr const Kernels& (*kTables[])() = {QLORA_CPU_ISAS};
#undef QLORA_SET

}  // namespace qlora::cpu
