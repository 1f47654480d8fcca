// The words of the vocabulary stream:: for two weight rows at a time, which the integer kernel of dx needs. Not every
// instruction set has them. isa/scalar/row_pairs.h is their definition in plain C++.
#pragma once

#include "cpp/cpu/shared/instruction_set.h"

#include QLORA_ISA_HEADER(row_pairs.h)
