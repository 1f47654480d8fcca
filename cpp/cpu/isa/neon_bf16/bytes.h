// The words of the vocabulary panel:: for int8 with BF16: those of NEON, multiplied by SDOT.
#pragma once

#include "cpp/cpu/isa/neon/bytes.h"
