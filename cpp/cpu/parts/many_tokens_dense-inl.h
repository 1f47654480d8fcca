// The products of a dense weight.
#pragma once

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/many_tokens/linear_dense-inl.h"
#include "cpp/cpu/parts/parts.h"
#include "cpp/cpu/shared/instruction_set.h"

namespace qlora::cpu::QLORA_ISA::parts {

const Dense dense = {
    .linear_dense = many_tokens::linear_dense,
    .linear_dense_dx = many_tokens::linear_dense_dx,
};

}  // namespace qlora::cpu::QLORA_ISA::parts
