// The vocabulary stream:: for NEON with BF16: that of NEON. bf16_pairs.h beside this file has the words of the kernel
// that multiplies bfloat16.
#pragma once

#include "cpp/cpu/isa/neon/stream.h"
