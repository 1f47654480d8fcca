// stream::'s words for bfloat16 in pairs: those of NEON with BF16.
#pragma once

#include "cpp/cpu/isa/neon_bf16/bf16_pairs.h"
