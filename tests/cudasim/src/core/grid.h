// Races between the blocks of a launch (CUDASIM_CHECK=grid).
//
// Every word of global memory that the launch touches remembers who wrote it last and the last two
// blocks that read it. An access to what another block wrote, or a write to what another block read or
// wrote, needs a chain of PTX's memory model between the two: a fence and then a strong write (atomic,
// volatile, relaxed) on one side, a strong read of it and then a fence on the other, or release and
// acquire operations; block, cluster and grid barriers. What happened before is known as a vector
// clock over the grid's warps. Warps are the unit: lanes of a warp are taken as ordered.
#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

namespace cudasim {

struct Warp;
struct Block;
struct Group;
struct LaunchState;

// Clocks are shared and never changed: sorted (warp number, epoch), absent is 0.
using Clock = std::vector<std::pair<uint32_t, uint32_t>>;
using ClockPtr = std::shared_ptr<const Clock>;

// What a warp knows. A fence turns what was seen into what is known, and what is known into what the
// next strong write publishes. The *_sc halves are PTX's order of fence.sc: fences of other threads that
// come before (after) the atomic by way of a barrier count too, if both sides' are fence.sc (membar).
struct GridWarp {
  uint32_t number = 0, first = 0;  // in the grid; the first of the block
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
  // Checks and remembers one request. `data`: what a write will store, per lane, or null if unknown.
  void access(Warp& w, uint32_t lanes, const uint64_t* addr, uint32_t bytes, uint32_t kind, const uint8_t* const* data);
  void access_range(Warp& w, int lane, uint64_t addr, uint64_t bytes, uint32_t kind);  // bulk copies

  void fence(Warp& w, bool sc);
  // Strong reads and writes of global memory; call with `mutex` held, around the access itself.
  void observe(Warp& w, uint32_t lanes, const uint64_t* addr, uint32_t order);
  void publish(Warp& w, uint32_t lanes, const uint64_t* addr, uint32_t order);
  std::mutex mutex;

  // Barriers, and whatever else orders the threads of a cluster: all of `from`'s past precedes `to`.
  void barrier(Block& b, const std::vector<uint32_t>& arrived, const std::vector<uint32_t>& released);
  void hand_over(Warp& w, Handover& to);
  void take_over(Warp& w, const Handover& from);

  const bool orders;  // the kernel has a fence or the like: without one there is no edge at all
  std::atomic<bool> any_published{false};

 private:
  struct Written {
    uint32_t who, epoch, mark;
  };  // who: 1 + warp number, 0: nobody
  struct Seen {
    uint32_t who, epoch, mark, who2, epoch2;
  };  // the last two blocks
  struct Page;
  struct Access;
  Page* page(Warp& w, uint64_t number);
  void lane_access(Access& a, Page& p, int lane, uint64_t addr, uint32_t bytes, const uint8_t* data);
  bool ordered(const Warp& w, uint32_t who, uint32_t epoch) const;
  void report(Access& a, int lane, uint64_t addr, const char* before, uint32_t who, uint32_t epoch, uint32_t mark,
              bool same);
  std::string block_name(uint32_t who) const;

  const LaunchState& ls_;
  const bool same_value_is_fine_;
  const uint32_t nwarps_;  // of a block
  std::mutex pages_mutex_;
  std::unordered_map<uint64_t, std::unique_ptr<Page>> pages_;
  std::atomic<size_t> bytes_{0};
  std::atomic<bool> said_full_{false}, said_same_{false};
  std::unordered_map<uint64_t, Published> published_;
};

}  // namespace cudasim
