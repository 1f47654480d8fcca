// The words of the vocabulary panel:: for int8 with AVX-VNNI: those of AVX2, multiplied by vpdpbusd.
#pragma once

#include "cpp/cpu/isa/avx2/bytes.h"
