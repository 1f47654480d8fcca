// The vocabulary panel:: of the instruction set that is being compiled, which fills panels and multiplies them.
// isa/scalar/panel.h is its definition in plain C++.
#pragma once

#include "cpp/cpu/shared/instruction_set.h"

#include QLORA_ISA_HEADER(panel.h)
