// Detects races between the CTAs of a launch (CUDASIM_CHECK=grid).
//
// Every word of global memory that the launch touches remembers its last writer and the last two CTAs that read it. An
// access conflicts if it reads what another CTA wrote, or writes what another CTA read or wrote. Conflicting accesses
// need a chain of PTX's memory model between them. The chain is one of the following: a fence and then a strong write
// (atomic, volatile, relaxed) on one side, and a strong read of it and then a fence on the other; release and acquire
// operations; or barriers of CTAs, clusters and the grid. A vector clock over the grid's warps records what happened
// before. The unit is the warp: lanes of a warp count as ordered.
#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace cudasim {

struct Warp;
struct Block;
struct Group;
struct LaunchState;

// Clocks are shared and immutable. They are sorted by (warp number, epoch), and an absent warp is at 0.
using Clock = std::vector<std::pair<uint32_t, uint32_t>>;
using ClockPtr = std::shared_ptr<const Clock>;

// The knowledge of a warp. A fence turns what was seen into what is known, and what is known into what the next strong
// write publishes. The *_sc halves implement PTX's order of fence.sc: if a barrier orders another thread's fence before
// (after) the atomic, that fence counts, too, provided that both sides' fences are fence.sc (membar).
struct GridWarp {
  uint32_t number = 0, first = 0;  // its number in the grid, and that of its CTA's first warp
  uint32_t epoch = 1;
  ClockPtr known, fenced, fenced_sc, seen, seen_sc;
};
struct Published {
  ClockPtr clock, sc;
};  // at the address of a strong write
struct Handover {
  ClockPtr known, fenced_sc, seen_sc;
};  // at a barrier

class Grid {
 public:
  Grid(const LaunchState& ls, bool same_value_is_fine);
  ~Grid();
  enum Kind : uint32_t { Read = 1, Write = 2, Atomic = 4, Strong = 8, Constant = 16 };  // Constant: ld.global.nc
  enum Order : uint32_t { Acquire = 1, Release = 2, Modify = 4 };                       // Modify: one read-modify-write

  void start(Warp& w);
  // Checks and remembers one request. `data` is what a write will store, per lane, or null if unknown.
  void access(Warp& w, uint32_t lanes, const uint64_t* addr, uint32_t bytes, uint32_t kind, const uint8_t* const* data);
  void access_range(Warp& w, int lane, uint64_t addr, uint64_t bytes, uint32_t kind);  // bulk copies

  void fence(Warp& w, bool sc);
  // Strong reads and writes of global memory; call with `mutex` held, around the access itself.
  void observe(Warp& w, uint32_t lanes, const uint64_t* addr, uint32_t order);
  void publish(Warp& w, uint32_t lanes, const uint64_t* addr, uint32_t order);
  std::mutex mutex;

  // Barriers, and everything else that orders the threads of a cluster: all of `from`'s past precedes `to`.
  void barrier(Block& b, const std::vector<uint32_t>& arrived, const std::vector<uint32_t>& released);
  void hand_over(Warp& w, Handover& to);
  void take_over(Warp& w, const Handover& from);

  // Whether this launch, which has ended, wrote the memory or, if `or_read`, read it; `by` names who.
  bool touched(uint64_t addr, uint32_t bytes, bool or_read, std::string* by) const;

  const bool orders;  // whether the kernel has any fence or the like: otherwise nothing orders its CTAs
  std::atomic<bool> any_published{false};

 private:
  struct Written {
    uint32_t who, epoch, mark;
  };  // who: 1 + warp number, or 0 for none
  struct Seen {
    uint32_t who, epoch, mark, who2, epoch2;
  };  // the last two CTAs
  struct Page;
  struct Access;
  Page* page(Warp& w, uint64_t number);
  void check_earlier(Access& a, uint32_t lanes, const uint64_t* addr) const;
  void lane_access(Access& a, Page& p, int lane, uint64_t addr, uint32_t bytes, const uint8_t* data);
  bool ordered(const Warp& w, uint32_t who, uint32_t epoch) const;
  void report(Access& a, int lane, uint64_t addr, const char* before, uint32_t who, uint32_t epoch, uint32_t mark,
              bool same);
  std::string block_name(uint32_t who) const;

  const LaunchState& ls_;  // not after the launch
  const std::string kernel_;
  const std::pair<uint32_t, uint32_t> grid_;  // its first two dimensions
  const bool same_value_is_fine_;
  const uint32_t nwarps_;  // per CTA
  std::mutex pages_mutex_;
  std::unordered_map<uint64_t, std::unique_ptr<Page>> pages_;
  std::atomic<size_t> bytes_{0};
  std::atomic<bool> said_full_{false}, said_same_{false};
  std::unordered_map<uint64_t, Published> published_;
};

// Programmatic dependent launches start before these have ended: those that the first list names until they execute
// griddepcontrol.wait, and those of the second, for which the launch before them did not wait, even after it.
struct Unfinished {
  std::vector<std::shared_ptr<const Grid>> before_wait, after_wait;
};
bool ordered_after_wait(Warp& w);  // ops_barrier.cpp

}  // namespace cudasim
