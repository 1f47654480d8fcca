// The vocabulary panel:: beside the tile unit: that of AVX-512 with BF16.
#pragma once

#include "cpp/cpu/isa/avx512_bf16/panel.h"
