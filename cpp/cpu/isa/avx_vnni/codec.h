// The vocabulary codec:: for AVX-VNNI: that of AVX2.
#pragma once

#include "cpp/cpu/isa/avx2/codec.h"
