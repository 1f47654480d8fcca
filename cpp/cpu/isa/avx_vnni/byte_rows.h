// The words of the vocabulary panel:: for weight rows side by side with AVX-VNNI: those of AVX2.
#pragma once

#include "cpp/cpu/isa/avx2/byte_rows.h"
