// Tensor memory: allocation, and the order of accesses.
#include "tensor_memory.h"

#include <algorithm>

#include "machine.h"
#include "shadow.h"

namespace cudasim {

namespace {

std::string area_name(uint32_t lane, uint32_t column) {
  return "tensor memory at lane " + std::to_string(lane) + ", column " + std::to_string(column);
}
[[noreturn]] void not_waited(const char* what, uint32_t line, const char* wait, uint32_t lane, uint32_t column) {
  fault(Fault::tensor_memory, -1,
        "access to " + area_name(lane, column) + ", which a " + what + " at PTX line " + std::to_string(line) +
            " uses, without a " + wait + " in between");
}

}  // namespace

template <class F>
void TensorMemory::each_state(const TensorArea& a, F f) {
  const uint32_t per_column = kLanes / kGroup;
  for (uint32_t c = a.column; c < a.column + a.columns; ++c)
    for (uint32_t g = a.lane / kGroup; g <= (a.lane + a.lanes - 1) / kGroup; ++g)
      f(groups_[c * per_column + g], g * kGroup, c);
}

void TensorMemory::unwritten(uint32_t lane, uint32_t column) {
  fault(Fault::uninitialized_shared, -1, "read of " + area_name(lane, column) + ", which nobody has written");
}

// With CUDASIM_SEED anywhere: a card's first column depends on what other CTAs of the SM have.
uint32_t TensorMemory::allocate(Warp& w, uint32_t columns) {
  std::vector<uint32_t> room;
  for (uint32_t first = 0; first + columns <= kColumns; first += columns) {
    const auto next = allocations_.lower_bound(first);
    const bool before = next != allocations_.begin() && std::prev(next)->first + std::prev(next)->second > first;
    if (!before && (next == allocations_.end() || next->first >= first + columns)) room.push_back(first);
  }
  if (room.empty()) return kColumns;
  const uint32_t first = room[w.wk->ls->seeded ? w.wk->random(uint32_t(room.size())) : 0];
  allocations_[first] = columns;
  std::fill_n(cells_.begin() + first * kLanes, columns * kLanes, ~0u);
  std::fill_n(written_.begin() + first * kLanes, columns * kLanes, uint8_t(!check_init_));
  each_state({0, kLanes, first, columns}, [](State& s, uint32_t, uint32_t) { s = {}; });
  return first;
}

void TensorMemory::release(Warp& w, uint32_t column, uint32_t columns) {
  const auto found = allocations_.find(column);
  if (found == allocations_.end() || found->second != columns)
    fault(Fault::tensor_memory, -1,
          "tcgen05.dealloc of " + std::to_string(columns) + " columns from " + std::to_string(column) +
              " on, which no tcgen05.alloc has returned");
  check_order(w, {0, kLanes, column, columns}, true, By::release);
  allocations_.erase(found);
}

void TensorMemory::check_released() const {
  if (allocations_.empty()) return;
  fault(Fault::tensor_memory, -1,
        "the block ends without tcgen05.dealloc of " + std::to_string(allocations_.begin()->second) + " columns from " +
            std::to_string(allocations_.begin()->first) + " on");
}

void TensorMemory::check_allocated(const TensorArea& a) const {
  for (uint32_t c = a.column; c < a.column + a.columns; ++c) {
    const auto next = allocations_.upper_bound(c);
    if (next == allocations_.begin() || std::prev(next)->first + std::prev(next)->second <= c)
      fault(Fault::tensor_memory, -1,
            "access to column " + std::to_string(c) + " of tensor memory, which is not allocated");
  }
  if (a.lane + a.lanes > kLanes)
    fault(Fault::tensor_memory, -1,
          "access to lane " + std::to_string(a.lane + a.lanes - 1) + " of tensor memory, which has 128");
}

void TensorMemory::check_order(const Warp& w, const TensorArea& a, bool write, By by) {
  const bool race = w.blk->ls->check_race;
  const uint32_t me = race ? warp_number(w) : 0, tensor = race ? tensor_core(*w.blk->group) : 0;
  each_state(a, [&](const State& s, uint32_t lane, uint32_t column) {
    if (s.storing && (by != By::warp || !write || s.storing_warp != w.index))
      not_waited("tcgen05.st", s.storing_line, "tcgen05.wait::st", lane, column);
    if (write && s.loading) not_waited("tcgen05.ld", s.loading_line, "tcgen05.wait::ld", lane, column);
    if (!race) return;
    const auto check = [&](const Access& before, const char* what) {
      const bool mma = before.agent == tensor;
      // The products of a thread are computed in the order in which it issues them.
      if (!before.clock || before.agent == me || (mma && by == By::mma)) return;
      const auto not_ordered = [&](const std::string& why) {
        fault(Fault::shared_race, -1,
              std::string(write ? "write of " : "read of ") + area_name(lane, column) + " is not ordered after a " +
                  what + (mma ? " by the tcgen05.mma" : " by warp " + std::to_string(before.agent)) + " at PTX line " +
                  std::to_string(before.line) + why);
      };
      if (before.clock > w.vc[before.agent]) not_ordered(mma ? ": wait for its tcgen05.commit" : "");
      if (!w.blk->ls->check_fence || by == By::release || before.clock <= w.tensor_seen[before.agent]) return;
      const bool published = before.clock <= w.vc[2 * clock_count(w) + before.agent];
      not_ordered(published ? ": tcgen05.fence::after_thread_sync is missing behind the synchronization"
                            : ": tcgen05.fence::before_thread_sync is missing before the synchronization");
    };
    check(s.write, "write");
    if (!write) return;
    check(s.read, "read");
    check(s.mma_read, "read");
  });
}

void TensorMemory::begin(Warp& w, const TensorArea& a, bool write, uint32_t line) {
  check_allocated(a);
  check_order(w, a, write, By::warp);
  each_state(a, [&](State& s, uint32_t, uint32_t) {
    (write ? s.storing : s.loading)++;
    (write ? s.storing_line : s.loading_line) = line;
    if (write) s.storing_warp = w.index;
  });
}
void TensorMemory::end(Warp& w, const TensorArea& a, bool write, uint32_t line) {
  const uint32_t me = w.blk->ls->check_race ? warp_number(w) : 0;
  each_state(a, [&](State& s, uint32_t, uint32_t) {
    (write ? s.storing : s.loading)--;
    (write ? s.write : s.read) = {w.clock, me, line};
  });
}
void TensorMemory::access_by_mma(Warp& w, const TensorArea& a, bool write, uint32_t clock, uint32_t line) {
  check_allocated(a);
  check_order(w, a, write, By::mma);
  if (!w.blk->ls->check_race) return;
  const uint32_t tensor = tensor_core(*w.blk->group);
  each_state(a, [&](State& s, uint32_t, uint32_t) { (write ? s.write : s.mma_read) = {clock, tensor, line}; });
}

}  // namespace cudasim
