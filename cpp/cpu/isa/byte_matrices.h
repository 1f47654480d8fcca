// The words of the vocabulary stream:: for products of matrices of bytes. Only sets with such an instruction have them.
#pragma once

#include "cpp/cpu/shared/instruction_set.h"

#include QLORA_ISA_HEADER(byte_matrices.h)
