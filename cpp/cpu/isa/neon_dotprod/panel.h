// The vocabulary panel:: for NEON with SDOT: that of NEON.
#pragma once

#include "cpp/cpu/isa/neon/panel.h"
