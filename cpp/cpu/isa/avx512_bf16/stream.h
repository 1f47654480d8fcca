// The vocabulary stream:: for AVX-512 with BF16 and VNNI: that of AVX-512.
#pragma once

#include "cpp/cpu/isa/avx512/stream.h"
