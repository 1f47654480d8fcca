// The words of the vocabulary panel:: for int8 beside the tile unit, in plain C++.
#pragma once

#include "cpp/cpu/isa/scalar/bytes.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace panel {

using SignedWordInt8 = WordInt8;

}  // namespace panel
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
