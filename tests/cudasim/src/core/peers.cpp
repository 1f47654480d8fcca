// The lifetime of distributed shared memory. A CTA may access the shared memory of another CTA of its cluster only
// while that one runs: it must know that the other has begun, and the other must not end before it knows of the access.
//
// The race check's vector clocks answer both, whatever the order in which the CTAs were simulated. Without them, only
// what happens in this order is seen.
#include <algorithm>

#include "decode.h"
#include "shadow.h"

namespace cudasim {

static std::string block_in_cluster(const Block& b) { return "block " + std::to_string(b.rank) + " of the cluster"; }

void reach_peer(Warp& w, int lane, Block& peer, bool synchronous) {
  if (!peer.live_warps)
    fault(Fault::shared_lifetime, lane,
          "access to the shared memory of " + block_in_cluster(peer) + ", which has ended");
  const bool clocks = w.blk->ls->check_race;
  const bool begun = std::any_of(peer.warps.begin(), peer.warps.end(), [&](const std::unique_ptr<Warp>& other) {
    return clocks ? w.vc[warp_number(*other)] > 0 : other->executed > 0;
  });
  if (!begun)
    fault(Fault::shared_lifetime, lane,
          "access to the shared memory of " + block_in_cluster(peer) +
              ", which may not have begun: a cluster barrier has to come first");
  if (synchronous && clocks) peer.visits[warp_number(w)] = {w.clock, w.frame->fn->code[w.pc - 1].src->line};
}

void end_block(Block& b) {
  if (b.tensor_memory) b.tensor_memory->check_released();
  for (const BulkCopy& c : b.group->bulk)
    if (c.dst_cta == b.rank || c.mbar_cta == b.rank)
      fault(Fault::shared_lifetime, -1, "the block ends while a bulk copy to its shared memory is in flight");
  for (size_t i = 0; i < b.visits.size(); ++i) {
    const Block::Visit& visit = b.visits[i];
    if (!visit.clock) continue;
    const bool known = std::any_of(b.warps.begin(), b.warps.end(),
                                   [&](const std::unique_ptr<Warp>& own) { return own->vc[i] >= visit.clock; });
    if (!known)
      fault(Fault::shared_lifetime, -1,
            "the block may end before " + block_in_cluster(*b.group->blocks[i / b.nwarps]) +
                " accesses its shared memory at PTX line " + std::to_string(visit.line) +
                ": a cluster barrier has to come first");
  }
}

}  // namespace cudasim
