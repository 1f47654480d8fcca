// The vocabulary stream:: for NEON with SDOT: that of NEON.
#pragma once

#include "cpp/cpu/isa/neon/stream.h"
