// The words of the vocabulary panel:: for kLanes weight rows that are decoded side by side, a row per lane, of the
// instruction set that is being compiled. isa/scalar/byte_rows.h is their definition in plain C++.
#pragma once

#include "cpp/cpu/shared/instruction_set.h"

#include QLORA_ISA_HEADER(byte_rows.h)
