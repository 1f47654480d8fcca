// The vocabulary codec:: for AVX-512 with BF16: that of AVX-512, with an instruction for decoding to bfloat16.
#pragma once

#include "cpp/cpu/isa/avx512/codec.h"
