// The vocabulary codec:: beside the tile unit in plain C++.
#pragma once

#include "cpp/cpu/isa/scalar/codec.h"
