// The vocabulary stream:: beside the tile unit: that of AVX-512.
#pragma once

#include "cpp/cpu/isa/avx512/stream.h"
