// The vocabulary tiles:: of the instruction set that is being compiled: the five operations of a tile unit.
#pragma once

#include "cpp/cpu/shared/instruction_set.h"

#include QLORA_ISA_HEADER(tiles.h)
