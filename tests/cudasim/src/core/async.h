// Objects in shared memory that count arrivals (mbarriers), and asynchronous copies on their way.
//
// Copies take effect as late as the program allows. cp.async data reaches shared memory when the issuing thread waits
// for it, bulk copies when a thread checks their mbarrier, and bulk stores read shared memory when their group is
// waited for. A forgotten wait therefore shows stale data. With CUDASIM_SEED, some copies take effect at once instead.
#pragma once
#include "decode.h"

namespace cudasim {

struct Mbar {
  uint32_t pending, expected;
  int32_t tx;
  bool phase, valid;
};
Mbar load_mbar(const uint8_t* p);
void store_mbar(uint8_t* p, const Mbar& b);
// Resolves an mbarrier address of one lane. `synchronous`: the instruction itself accesses the barrier.
uint8_t* mbar_pointer(Warp& w, int lane, uint64_t addr, Block** blk, uint32_t* off, bool synchronous = true);
void need_valid(const Mbar& b, int lane, uint32_t off);
// Begins the next phase if nothing is pending.
void settle(Group& g, Mbar& b);
void arrive(Group& g, Mbar& b, uint32_t count, int lane, uint32_t off);
// The key of an mbarrier among what orders memory accesses.
inline uint64_t sync_key(uint32_t cta, uint32_t off) { return 1ull << 63 | uint64_t(cta) << 32 | off; }

// Copies take effect.
void land_copy(Warp& w, PendingCopy& c, uint32_t lanes);
void land_bulk(Group& g, BulkCopy& c);

bool select_bulk(Decoder& d, const AInstr& in, Op& op);  // cp.async.bulk and cp.reduce.async.bulk

}  // namespace cudasim
