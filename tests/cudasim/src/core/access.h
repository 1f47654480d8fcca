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

// The ordering and scope of a ld, st, atom or red.
enum : uint32_t {
  M_SIGNED = 1,
  M_VOLATILE = 2,
  M_ACQUIRE = 4,
  M_RELEASE = 8,
  M_CONSTANT = 16,
  M_BLOCK = 32  // of .cta scope
};
uint32_t order_flags(Decoder& d, const AInstr& in);
// The properties of an access that the check of races between CTAs needs.
uint32_t grid_kind(uint32_t flags, uint32_t kind);
uint32_t grid_order(uint32_t flags);

uint32_t vector_count(const AInstr& in);
Space space_of(const AInstr& in);
Decoder::Sym address_operand(Decoder& d, const AOperand& o, Op& op);
}  // namespace cudasim
