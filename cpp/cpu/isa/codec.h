// The vocabulary codec:: of the instruction set that is being compiled, which encodes and decodes the format.
// isa/scalar/codec.h is its definition in plain C++.
#pragma once

#include "cpp/cpu/shared/instruction_set.h"

#include QLORA_ISA_HEADER(codec.h)
