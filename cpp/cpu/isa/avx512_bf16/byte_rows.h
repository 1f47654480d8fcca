// The words of the vocabulary panel:: for weight rows side by side with AVX-512 and BF16: those of AVX-512.
#pragma once

#include "cpp/cpu/isa/avx512/byte_rows.h"
