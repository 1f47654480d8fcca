// The words of the vocabulary panel:: for int8 beside the tile unit: those of AVX-512.
#pragma once

#include "cpp/cpu/isa/avx512/bytes.h"
