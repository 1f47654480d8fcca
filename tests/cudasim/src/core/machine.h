// The machine state that executes a decoded program, and the services of its instructions.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "grid.h"
#include "program.h"
#include "tensor_memory.h"

namespace cudasim {

struct Warp;
struct Block;
struct Group;
struct Worker;
struct LaunchState;
struct Shadow;

// --- execution state ----------------------------------------------------------------------------

struct Frame {
  Frame* parent = nullptr;
  const Function* fn = nullptr;
  uint32_t depth = 0;
  uint32_t local_base = 0;
  uint8_t* regs = nullptr;
  uint8_t* pmem = nullptr;  // lane-major: pmem + lane * fn->param_bytes
  uint64_t serial = 0;
  uint32_t ret_pc[32] = {};
  std::vector<std::unique_ptr<Frame>> children;
  ~Frame();
};

Frame* new_frame(Frame* parent, const Function* fn);

enum class Wait : uint8_t { none, warp, warp_bar, block_bar, cluster_bar, mbar, registers };

// One cp.async per warp instruction: data already read, not yet visible in shared memory.
struct PendingCopy {
  uint32_t mask = 0;
  uint8_t bytes = 0;
  uint32_t dst[32];
  uint32_t group[32];  // commit group per lane
  const Op* op = nullptr;
  alignas(16) uint8_t data[32][16];
};

// First-in first-out; storage is reused.
class CopyQueue {
 public:
  PendingCopy& push() {
    if (tail_ == items_.size()) items_.emplace_back();
    return items_[tail_++];
  }
  void pop_finished(size_t* base) {
    while (head_ < tail_ && items_[head_].mask == 0) {
      ++head_;
      ++*base;
    }
    if (head_ == tail_)
      head_ = tail_ = 0;
    else if (head_ >= 64) {
      std::rotate(items_.begin(), items_.begin() + long(head_), items_.begin() + long(tail_));
      tail_ -= head_;
      head_ = 0;
    }
  }
  void clear() { head_ = tail_ = 0; }
  size_t size() const { return tail_ - head_; }
  PendingCopy& operator[](size_t i) { return items_[head_ + i]; }

 private:
  std::vector<PendingCopy> items_;
  size_t head_ = 0, tail_ = 0;
};

struct PendingArrive {
  uint32_t cta, mbar, lane;
  size_t seq;
};  // cp.async.mbarrier.arrive

struct PendingMma {
  const Op* op = nullptr;
  Frame* frame = nullptr;
  uint64_t desc_a = 0, desc_b = 0;
  bool scale_d = true;
};

// Bulk copies issued by one thread with bulk_group completion (shared -> global).
struct PendingStore {
  uint32_t group;
  std::function<void()> run;
};

struct Warp {
  // hot state of the running group of lanes
  uint8_t* R = nullptr;
  uint32_t active = 0, pc = 0, limit = NONE;
  uint32_t ev = 0;  // EV_* bits set by handlers
  Frame* frame = nullptr;
  Worker* wk = nullptr;
  Block* blk = nullptr;

  uint32_t cc = 0;     // carry flags of add.cc and friends
  uint32_t index = 0;  // in the CTA
  uint32_t live = 0;
  uint32_t blocked = 0;
  uint32_t bar_lanes = 0;  // lanes waiting at a CTA barrier
  uint32_t lane_pc[32];
  Frame* lane_frame[32];
  Wait wait[32];
  uint32_t need[32];  // membermask of lanes waiting for their mates
  std::unique_ptr<Frame> root;
  std::vector<uint8_t> local;  // local memory, lane-major
  uint32_t local_stride = 0;
  uint32_t stuck = 0;  // quanta spent in one divergent group
  bool finished = false;
  bool bar_arrived = false;  // counted at CTA barrier bar_id
  uint32_t bar_id = 0;
  uint32_t cluster_phase = 0;  // barrier.cluster: phase this warp last arrived in
  bool cluster_arrived = false;
  uint32_t mbar_lanes = 0;  // lanes asleep in mbarrier.try_wait
  uint64_t mbar_seen = 0;   // value of Group::mbar_events when the warp went to wait
  bool timed_out = false;   // a blocked try_wait may now answer false
  uint64_t executed = 0;

  // asynchronous copies and wgmma
  CopyQueue copies;
  size_t copy_base = 0;     // sequence number of the oldest copy
  uint32_t copy_group[32];  // open commit group per lane
  std::vector<PendingArrive> arrives;
  struct MmaGroup {
    std::vector<PendingMma> ops;
  };
  std::deque<MmaGroup> mma_groups;  // committed, oldest first
  MmaGroup mma_open;
  std::vector<PendingStore> bulk[32];
  uint32_t bulk_group[32];

  // tensor memory
  std::vector<PendingTensorAccess> tensor_loads, tensor_stores;
  uint32_t tensor_clock = 0;          // race detection: of the tensor cores, at the warp's last tcgen05.mma
  std::vector<uint32_t> tensor_seen;  // what was published before the last tcgen05.fence::after_thread_sync

  // registers (ops_registers.cpp)
  uint32_t registers = 0;  // per thread, as setmaxnreg left it
  struct RegisterWrite {
    uint32_t fences = 0, line = 0;
  };
  uint32_t fences = 1;                         // 1 + the number of wgmma.fence executed
  std::vector<RegisterWrite> register_writes;  // the last ordinary write of each register that wgmma uses

  // programmatic dependent launch: the clock at griddepcontrol.wait, and whether the warp is ordered after one
  uint32_t waited_at = 0;
  bool after_wait = false;

  // race detection (intra-warp knowledge): see shadow.h
  uint32_t clock = 1;
  std::vector<uint32_t> vc;          // knowledge of other warps' clocks, by global warp number
  std::vector<uint32_t> lane_known;  // [lane][lane] clocks within the warp
  GridWarp grid;                     // races between CTAs: see grid.h

  template <class T>
  T* r(uint32_t off) const {
    return reinterpret_cast<T*>(R + off);
  }
  uint32_t& p(uint32_t off) const { return *reinterpret_cast<uint32_t*>(R + off); }

  void start(Block* b, uint32_t idx, uint32_t lanes, const Function* fn);
  void run(int budget);
  bool select();
  void park(uint32_t m, uint32_t at) {
    for (uint32_t t = m; t; t &= t - 1) {
      int l = __builtin_ctz(t);
      lane_pc[l] = at;
      lane_frame[l] = frame;
    }
  }
  // Puts lanes to sleep at the current instruction. They execute it again when woken.
  void block_lanes(uint32_t m, Wait kind) {
    for (uint32_t t = m; t; t &= t - 1) {
      int l = __builtin_ctz(t);
      lane_pc[l] = pc - 1;
      lane_frame[l] = frame;
      wait[l] = kind;
    }
    blocked |= m;
  }
  void exit_lanes(uint32_t m);
  Frame* enter(Frame* parent, const Function* fn);
  void refresh(Frame* f);
  bool runnable() const { return (live & ~blocked) != 0; }
  void grow_local(uint32_t bytes);
  uint32_t thread_number(int lane) const { return index * 32 + lane; }
};

enum : uint32_t { EV_RESCHED = 1, EV_PARKED = 2, EV_YIELD = 4, EV_YIELD_BLOCK = 8 };

struct Barrier {
  uint32_t arrived = 0;            // threads, in units of whole warps
  uint32_t expected = 0;           // 0: all threads of the CTA
  std::vector<uint32_t> waiting;   // warps
  std::vector<uint32_t> arrivals;  // warps that arrived without waiting (race clocks)
  uint32_t red_count = 0;          // bar.red
  bool red_and = true, red_or = false;
};

struct BulkCopy {                 // into shared memory, completes on an mbarrier
  uint32_t dst_cta = 0, dst = 0;  // offsets in the CTA's shared memory
  uint32_t mbar_cta = 0, mbar = 0;
  std::vector<uint8_t> data;  // in linear order; `swizzle` permutes its 16-byte granules
  uint8_t swizzle = 0;        // 0 none, 1 32B, 2 64B, 3 128B
};

struct Block {
  Group* group = nullptr;
  Worker* wk = nullptr;
  LaunchState* ls = nullptr;
  uint32_t rank = 0;  // in the cluster
  uint32_t ctaid[3], linear = 0;
  uint8_t* shared = nullptr;  // holds shared address kSharedBase
  uint8_t* shared_raw = nullptr;
  uint32_t shared_bytes = 0, shared_alloc = 0;
  uint32_t shared_window() const { return rank << 24; }  // of its shared addresses
  std::vector<std::unique_ptr<Warp>> warps;
  uint32_t nwarps = 0, live_warps = 0, nthreads = 0;
  Barrier bars[16];
  std::unique_ptr<Shadow> shadow;
  std::unique_ptr<TensorMemory> tensor_memory;  // once something is allocated
  uint32_t register_pool = 0;                   // free registers per thread, summed over warps
  bool triggered = false;                       // griddepcontrol.launch_dependents
  struct Visit {
    uint32_t clock = 0, line = 0;
  };
  std::vector<Visit> visits;  // the last access to its shared memory by each warp of the cluster (peers.cpp)
  ~Block();
  void check_barrier(uint32_t id);
  void warp_exited();
};

// A cluster of CTAs (usually one CTA): the unit that a host thread schedules.
struct Group {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Warp*> order;
  Worker* wk = nullptr;
  uint32_t live_warps = 0;
  uint64_t mbar_events = 0;  // counts changes that may release a waiting warp
  uint32_t idle_rounds = 0;
  uint64_t executed = 0;
  uint32_t cluster_arrived = 0, cluster_phase = 0;
  std::vector<uint32_t> cluster_vc;
  Handover cluster_grid;                               // races between CTAs: what arrived at the cluster barrier,
  std::unordered_map<uint64_t, Handover> shared_grid;  // and at mbarriers and atomics in shared memory
  std::deque<BulkCopy> bulk;                           // in flight
  uint32_t async_clock = 0;                            // race detection: landings of asynchronous copies
  std::deque<PendingTensorWork> tensor_work;           // in flight
  uint32_t tensor_clock = 0;                           // race detection: number of tcgen05.mma issued
  uint64_t serial = 0;
  size_t next = 0;
  void start(uint32_t cluster_index);
  // Runs for about `slice` warp instructions; true when every warp has exited.
  bool run(uint64_t slice);
  [[noreturn]] void stuck(std::string why);  // faults, listing where every warp stands
};

// --- memory ---------------------------------------------------------------------------------------

struct Range {
  uint64_t base, end;
};

// One bit per 32-byte sector, by 1 MiB page.
class Footprint {
 public:
  void add(uint64_t addr, uint32_t bytes) {
    uint64_t s = addr >> 5, e = (addr + bytes - 1) >> 5;
    for (; s <= e; ++s) {
      uint64_t page = s >> 15;
      if (page != last_) find(page);
      bits_[(s & 32767) >> 6] |= 1ull << (s & 63);
    }
  }
  void merge_from(const Footprint& o);
  uint64_t sectors() const;
  void clear() {
    pages_.clear();
    last_ = ~0ull;
    bits_ = nullptr;
  }

 private:
  void find(uint64_t page);
  uint64_t last_ = ~0ull;
  uint64_t* bits_ = nullptr;
  std::unordered_map<uint64_t, std::unique_ptr<uint64_t[]>> pages_;
};

struct Counters {
  uint64_t warp[C_count] = {}, threads = 0, mma_flops = 0, tcgen05_flops = 0, tcgen05_wavefronts = 0;
  uint64_t sectors_read = 0, sectors_written = 0, sectors_read_ideal = 0, sectors_written_ideal = 0;
  uint64_t async_sectors_read = 0, async_sectors_received = 0;
  uint64_t wavefronts = 0, wavefronts_ideal = 0, constant_wavefronts = 0;
};

class ParamBuffer {  // kernel parameters, aligned for tensor maps
 public:
  ~ParamBuffer() { free(p_); }
  void resize(size_t n) {
    n_ = (n + 127) / 128 * 128;
    p_ = static_cast<uint8_t*>(aligned_alloc(128, n_));
    memset(p_, 0, n_);
  }
  uint8_t* data() const { return p_; }
  size_t size() const { return n_; }

 private:
  uint8_t* p_ = nullptr;
  size_t n_ = 0;
};

struct LaunchState {
  Kernel* kernel = nullptr;
  const KernelImage* image = nullptr;
  Dim3 grid, block, cluster;
  uint32_t cluster_size = 1;
  uint32_t dynamic_shared = 0, shared_bytes = 0, registers = 0;
  bool explicit_cluster = false;
  ParamBuffer params;      // followed by the grid barrier's workspace
  uint32_t workspace = 0;  // its offset
  std::shared_ptr<const std::vector<Range>> ranges;
  std::atomic<uint64_t> next_group{0};
  uint64_t group_count = 0;
  std::atomic<bool> stop{false};
  std::mutex mutex;  // guards result
  LaunchResult result;
  int arch = 90;
  bool card_sums = false;  // mma and wgmma add as cards do (card_sum.h)
  bool check_race = false, check_init = false, check_fence = false;
  std::shared_ptr<Grid> grid_check;  // set if races between CTAs are checked
  std::shared_ptr<const Unfinished> after;
  // Some warp executed griddepcontrol.wait; and did so before its CTA allowed dependents to start.
  std::atomic<bool> waited{false}, waited_first{false};
  double time_limit = 0;  // seconds; 0: none
  std::chrono::steady_clock::time_point started;
  uint64_t seed = 0;
  bool seeded = false;
};

struct Worker {
  LaunchState* ls = nullptr;
  uint32_t id = 0;
  Counters count;
  uint64_t busiest = 0;  // instructions of the longest group
  Footprint read, written;
  Range hit{1, 0}, hit2{1, 0};  // most recent allocations
  Grid* grid = nullptr;
  std::pair<uint64_t, void*> grid_pages[64];  // recently used
  std::minstd_rand rng;
  uint64_t serial = 0;
  std::vector<std::unique_ptr<Group>> pool;  // finished groups, for reuse
  uint32_t random(uint32_t n) { return n ? uint32_t(rng() % n) : 0; }
};

// --- services for instruction handlers -------------------------------------------------------------

void arrive_if_complete(Warp& w);  // CTA barrier: has the whole warp arrived?
[[noreturn]] void fault(Fault f, int lane, const std::string& message);
std::string hex(uint64_t v);

// Host pointers for one access of `bytes` per lane; faults on bad addresses. `space` must not be
// generic (see resolve_generic).
enum class Access : uint8_t { read, write, atomic };
void global_pointers(Warp& w, uint32_t m, const uint64_t* addr, uint32_t bytes, Access a, uint8_t** out);
bool global_ok(Worker& wk, uint64_t addr, uint64_t bytes);
void shared_pointers(Warp& w, uint32_t m, const uint64_t* addr, uint32_t bytes, Access a, uint8_t** out, const Op* op);
void local_pointers(Warp& w, uint32_t m, const uint64_t* addr, uint32_t bytes, uint8_t** out);
void count_global(Warp& w, uint32_t m, const uint64_t* addr, uint32_t bytes, bool write);
void count_shared(Warp& w, uint32_t m, const uint64_t* addr, uint32_t bytes);
void count_constant(Warp& w, uint32_t m, const uint64_t* addr);
Block* shared_target(Warp& w, uint32_t addr, uint32_t* offset);  // CTA and offset of a 32-bit shared address
// Checks that shared memory of another CTA of the cluster exists. `synchronous`: the access ends with the instruction.
void reach_peer(Warp& w, int lane, Block& peer, bool synchronous);
void end_block(Block& b);  // its last warp exits
uint8_t* generic_pointer(Warp& w, int lane, uint64_t addr, uint32_t bytes, Access a);
std::string generic_string(Warp& w, int lane, uint64_t addr);

// race / init checks (no-ops unless enabled)
void note_barrier(Block& b, const std::vector<uint32_t>& arrived, const std::vector<uint32_t>& released);
void note_syncwarp(Warp& w, uint32_t m);

// asynchronous machinery
void complete_copies(Warp& w, uint32_t m, uint32_t keep_groups, bool all);
bool deliver_to_mbar(Warp& w, uint32_t cta, uint32_t mbar);
inline uint32_t swizzled(uint32_t addr, uint32_t mode) {  // mode: 0 none, 1 32B, 2 64B, 3 128B
  return addr ^ ((addr >> 7 & ((1u << mode) - 1)) << 4);
}
void run_pending_mma(Warp& w, size_t keep_groups);
void finish_bulk(Warp& w, uint32_t m, uint32_t keep, bool read_only);
void run_wgmma(Warp& w, const PendingMma& p);

KernelImage* decode_kernel(Module* m, const AFunction* entry, std::string* error);

}  // namespace cudasim
