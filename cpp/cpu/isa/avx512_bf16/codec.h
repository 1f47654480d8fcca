// The vocabulary codec:: for AVX-512 with BF16: that of AVX-512, where decoding bfloat16 has an instruction more.
#pragma once

#include "cpp/cpu/isa/avx512/codec.h"
