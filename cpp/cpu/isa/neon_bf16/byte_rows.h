// The words of the vocabulary panel:: for weight rows side by side with BF16: those of NEON.
#pragma once

#include "cpp/cpu/isa/neon/byte_rows.h"
