// Detects races and uninitialized reads in shared memory (CUDASIM_CHECK=race,init).
//
// Every warp carries a vector clock over the warps of its cluster. CTA barriers, named barriers, mbarriers and atomics
// advance it. Within a warp, a 32x32 matrix records what each lane knows of the others, and bar.warp.sync advances it.
// Each byte of shared memory remembers its last writer and, per warp, the clock of the last read and the lanes that
// made it. An access that is not ordered after the conflicting one is a race.
#pragma once
#include <unordered_map>
#include <vector>

#include "machine.h"

namespace cudasim {

inline size_t clock_count(const Warp& w) { return w.vc.size() / 3; }

struct Shadow {
  struct Write {
    uint32_t clock = 0;
    uint16_t warp = 0;
    uint8_t lane = 0;
    uint8_t kind = 0;
    uint32_t line = 0;
  };
  enum Kind : uint8_t { plain = 1, atomic = 2, async = 3 };
  static constexpr uint32_t kAgents = 2;  // the copy engine, and the tensor core of tcgen05
  uint32_t bytes = 0, nwarps = 0;
  bool race = false, init = false;
  std::vector<Write> writes;
  std::vector<uint32_t> read_clock;  // [warp][byte]
  std::vector<uint32_t> read_lanes;  // [warp][byte]
  std::vector<uint32_t> read_line;   // [byte] PTX line of the last read
  std::vector<uint8_t> valid;        // byte was written
  std::vector<uint8_t> flight;       // number of asynchronous copies that will still write the byte
  std::unordered_map<uint64_t, std::vector<uint32_t>> sync;  // clocks released through a mbarrier or atomic
  std::vector<uint64_t> readers;                             // [byte] bit w % 64 for each warp w with a read_clock

  void reset(uint32_t bytes, uint32_t nwarps, bool race, bool init);
  // via_async: read by the async proxy (wgmma, bulk store), which needs a fence.proxy.async after st.shared.
  // tensor_clock: read until a tcgen05.commit completes, by the tcgen05.mma of this number.
  void read(Warp& w, int lane, uint32_t off, uint32_t n, bool atomic, bool via_async = false,
            uint32_t tensor_clock = 0);
  // `data` is what will be written (equal values by two writers are not reported), or null.
  void write(Warp& w, int lane, uint32_t off, uint32_t n, bool atomic, const uint8_t* data, const uint8_t* old);
  // An asynchronous copy: check against earlier accesses when issued, mark when it lands. A bulk copy writes by the
  // async proxy, which needs a fence.proxy.async after st.shared, too.
  void issue(Warp& w, int lane, uint32_t off, uint32_t n, bool bulk);
  void land(Warp& w, int lane, uint32_t off, uint32_t n, uint32_t line);
  void land_async(Group& g, uint32_t off, uint32_t n, uint64_t key);  // on behalf of the copy engine
  void release(Warp& w, uint64_t key);
  void acquire(Warp& w, uint64_t key);

 private:
  // Calls f(warp, clock) for the last read of a byte by each warp.
  template <class F>
  void each_read(uint32_t byte, F f) const {
    for (uint64_t t = readers[byte]; t; t &= t - 1)
      for (uint32_t k = uint32_t(__builtin_ctzll(t)); k < nwarps + kAgents; k += 64)
        if (uint32_t clock = read_clock[size_t(k) * bytes + byte]) f(k, clock);
  }
  // Whether the last write of a byte was an ordinary store that no fence.proxy.async has followed.
  bool hidden_from_async(const Warp& w, uint32_t byte) const {
    const Write& wr = writes[byte];
    return wr.clock && wr.kind == plain && wr.clock > w.vc[clock_count(w) + wr.warp];
  }
  [[noreturn]] void proxy_fault(Warp& w, int lane, uint32_t byte, const char* access) const;
};

// Vector clocks have one entry per warp of the cluster, one for the copy engine, and one for the tensor core. A second
// set of as many entries records what a fence.proxy.async has made visible to the async proxy, a third what a
// tcgen05.fence::before_thread_sync has published of accesses to tensor memory.
uint32_t warp_number(const Warp& w);  // in its cluster
inline uint32_t tensor_core(const Group& g) { return uint32_t(g.order.size()) + 1; }
void start_clocks(Warp& w, uint32_t nwarps);
void note_proxy_fence(Warp& w);
void note_tensor_fence(Warp& w, bool after_sync);
void join_clocks(std::vector<uint32_t>& into, const std::vector<uint32_t>& from);

}  // namespace cudasim
