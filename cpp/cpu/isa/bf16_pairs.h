// The words of the vocabulary stream:: for pairs of bfloat16. Not every instruction set has them.
// isa/scalar/bf16_pairs.h is their definition in plain C++.
#pragma once

#include "cpp/cpu/shared/instruction_set.h"

#include QLORA_ISA_HEADER(bf16_pairs.h)
