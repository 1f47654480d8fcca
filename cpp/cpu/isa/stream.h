// The vocabulary stream:: of the instruction set that is being compiled, which looks codes up in registers while W
// streams by. isa/scalar/stream.h is its definition in plain C++.
#pragma once

#include "cpp/cpu/shared/instruction_set.h"

#include QLORA_ISA_HEADER(stream.h)
