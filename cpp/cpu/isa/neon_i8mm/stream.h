// The vocabulary stream:: for NEON with I8MM: that of NEON with BF16. byte_matrices.h beside this file has the words of
// the kernel that multiplies matrices of bytes.
#pragma once

#include "cpp/cpu/isa/neon_bf16/stream.h"
