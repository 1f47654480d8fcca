// The vocabulary panel:: for NEON with I8MM: that of NEON with BF16.
#pragma once

#include "cpp/cpu/isa/neon_bf16/panel.h"
