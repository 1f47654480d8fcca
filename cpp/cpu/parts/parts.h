// The parts of an instruction set, of which isa_<set>.cpp makes its table. sources.cmake says which parts a set has,
// and writes the files that compile <part>-inl.h.
#pragma once

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/tuning.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA::parts {

extern const Codec codec;
extern const Dense dense;

// The kernels of each operator. A part defines those that its name says.
template <Kernel>
Outcome run(const Pool&, const LinearProblem&);
template <Kernel>
Outcome run(const Pool&, const LinearDxProblem&);
template <Kernel>
Outcome run(const Pool&, const LoraGradProblem&);

// Those of few tokens for weights with offsets, which the others call. They are parts of their own because they take
// the compiler as much memory.
template <Kernel>
Outcome run_with_offsets(const Pool&, const LinearProblem&);
template <Kernel>
Outcome run_with_offsets(const Pool&, const LinearDxProblem&);

// kFewTokensFloat for weights of wide codes.
Outcome run_wide(const Pool&, const LinearProblem&);
Outcome run_wide(const Pool&, const LinearDxProblem&);

// An operator's kernels of the set: some of its parts, and the float64 kernel, which all sets share.
template <Kernel... kernels, class Problem>
constexpr KernelsFor<Problem> kernels_for(Outcome (*float64)(const Pool&, const Problem&)) {
  KernelsFor<Problem> found;
  ((found[kernels] = run<kernels>), ...);
  found[Kernel::kFloat64] = float64;
  return found;
}

}  // namespace qlora::cpu::QLORA_ISA::parts
