// The vocabulary codec:: for NEON with BF16: that of NEON, where rounding to bfloat16 is an instruction.
#pragma once

#include "cpp/cpu/isa/neon/codec.h"
