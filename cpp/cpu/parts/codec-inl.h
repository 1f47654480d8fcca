// The codec.
#pragma once

#include "cpp/cpu/codec/dequantize-inl.h"
#include "cpp/cpu/codec/encode-inl.h"
#include "cpp/cpu/codec/encode_stochastic-inl.h"
#include "cpp/cpu/codec/merge_lora-inl.h"
#include "cpp/cpu/codec/quantize-inl.h"
#include "cpp/cpu/codec/search_absmax-inl.h"
#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/parts/parts.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA::parts {

const Codec codec = {
    .quantize_nf4 = QLORA_ISA::quantize_nf4,
    .search_absmax_nf4 = QLORA_ISA::search_absmax_nf4,
    .encode_nf4 = QLORA_ISA::encode_nf4,
    .encode_nf4_with_feedback = QLORA_ISA::encode_nf4_with_feedback,
    .encode_nf4_stochastic = QLORA_ISA::encode_nf4_stochastic,
    .merge_lora_nf4 = QLORA_ISA::merge_lora_nf4,
    .quantize_absmax = QLORA_ISA::quantize_absmax,
    .dequantize_absmax = QLORA_ISA::dequantize_absmax,
    .dequantize_nf4 = QLORA_ISA::dequantize_nf4,
};

}  // namespace qlora::cpu::QLORA_ISA::parts
