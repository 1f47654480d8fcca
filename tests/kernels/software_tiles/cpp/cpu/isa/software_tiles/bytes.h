// The words of the vocabulary panel:: for int8 beside the tile unit, in plain C++.
#pragma once

#include "cpp/cpu/isa/scalar/bytes.h"
