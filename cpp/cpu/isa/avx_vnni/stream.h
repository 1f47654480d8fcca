// The vocabulary stream:: for AVX-VNNI: that of AVX2, where multiplying pairs and adding them is one instruction.
#pragma once

#include "cpp/cpu/isa/avx2/stream.h"
