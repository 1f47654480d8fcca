// The words of the vocabulary panel:: for int8 beside the tile unit: those of AVX-512.
#pragma once

#include "cpp/cpu/isa/avx512/bytes.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace panel {

using SignedWordInt8 = WordInt8Adding<0>;

}  // namespace panel
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
