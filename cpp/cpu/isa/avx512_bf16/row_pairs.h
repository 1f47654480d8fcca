// stream::'s words for weight rows in pairs: those of AVX-512.
#pragma once

#include "cpp/cpu/isa/avx512/row_pairs.h"
#include "cpp/cpu/isa/avx512_bf16/stream.h"
