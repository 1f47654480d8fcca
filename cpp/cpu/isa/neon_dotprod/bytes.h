// The words of the vocabulary panel:: for int8 with SDOT: those of NEON, multiplied by it.
#pragma once

#include "cpp/cpu/isa/neon/bytes.h"
