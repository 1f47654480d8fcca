// The parts of an instruction set. Each part of its table can be compiled separately, because compiling all of them at
// once takes more than 3 GB. sources.cmake says which parts a set has, and writes the files that compile <part>-inl.h.
#pragma once

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA::parts {

extern const Codec codec;
Outcome forward_few_tokens_int(const Pool&, const LinearProblem&);
Outcome forward_few_tokens_bf16(const Pool&, const LinearProblem&);
Outcome forward_few_tokens_float(const Pool&, const LinearProblem&);
Outcome forward_many_tokens_tiles(const Pool&, const LinearProblem&);
Outcome forward_many_tokens_bf16(const Pool&, const LinearProblem&);
Outcome forward_many_tokens_float(const Pool&, const LinearProblem&);
Outcome dx_few_tokens_int(const Pool&, const LinearDxProblem&);
Outcome dx_few_tokens_float(const Pool&, const LinearDxProblem&);
Outcome dx_many_tokens_tiles(const Pool&, const LinearDxProblem&);
Outcome dx_many_tokens_bf16(const Pool&, const LinearDxProblem&);
Outcome dx_many_tokens_float(const Pool&, const LinearDxProblem&);
Outcome dlora_many_tokens_tiles(const Pool&, const LoraGradProblem&);
Outcome dlora_many_tokens_bf16(const Pool&, const LoraGradProblem&);
Outcome dlora_many_tokens_float(const Pool&, const LoraGradProblem&);

}  // namespace qlora::cpu::QLORA_ISA::parts
