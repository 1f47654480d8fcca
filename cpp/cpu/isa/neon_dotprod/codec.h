// The vocabulary codec:: for NEON with SDOT: that of NEON.
#pragma once

#include "cpp/cpu/isa/neon/codec.h"
