// The words of the vocabulary panel:: for weight rows side by side with SDOT: those of NEON.
#pragma once

#include "cpp/cpu/isa/neon/byte_rows.h"
