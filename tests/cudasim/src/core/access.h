// Memory access services shared by the instruction files.
#pragma once
#include "decode.h"

namespace cudasim {
void fill_addresses(Warp& w, const Op& o, uint64_t* out);  // op.a, op.size2, op.imm
void resolve(Warp& w, uint32_t m, Space s, const uint64_t* addr, uint32_t bytes, Access a, uint8_t** ptr, bool count);
void check_shadow(Warp& w, uint32_t m, Space s, const uint64_t* addr, uint32_t bytes, Access a, bool atomic,
                  uint8_t* const* ptr, const uint8_t* const* data);
// The same for races between CTAs. `kind` and `order` are Grid's. Shared memory orders only the threads of a cluster.
void check_grid(Warp& w, uint32_t m, Space s, const uint64_t* addr, uint32_t bytes, uint32_t kind,
                const uint8_t* const* data);
uint32_t global_lanes(uint32_t m, Space s, const uint64_t* addr);
void order_shared(Warp& w, uint32_t m, Space s, const uint64_t* addr, bool read, bool write);
Space space_of(const AInstr& in);
Decoder::Sym address_operand(Decoder& d, const AOperand& o, Op& op);
}  // namespace cudasim
