// Blackwell's tensor memory (TMEM) and the work of its tensor cores: what tcgen05 instructions access and queue.
//
// A CTA has 128 lanes of 512 columns of 32 bits. Work takes effect as late as the program allows: tcgen05.st writes at
// tcgen05.wait::st, and tcgen05.mma runs when a thread checks the mbarrier of a tcgen05.commit behind it. Only with
// CUDASIM_CHECK=fence does tcgen05.ld write its registers at tcgen05.wait::ld.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <vector>

#include "program.h"

namespace cudasim {

class Decoder;
struct Block;
struct Frame;
struct Group;
struct Warp;

// Lanes and columns of one access.
struct TensorArea {
  uint32_t lane, lanes, column, columns;
};

class TensorMemory {
 public:
  static constexpr uint32_t kLanes = 128, kColumns = 512;
  // `check_init`: reads of what nobody has written are faults.
  explicit TensorMemory(bool check_init)
      : cells_(kLanes * kColumns),
        written_(kLanes * kColumns, !check_init),
        groups_(kLanes / kGroup * kColumns),
        check_init_(check_init) {}

  void write(uint32_t lane, uint32_t column, uint32_t value) {
    cells_[column * kLanes + lane] = value;
    written_[column * kLanes + lane] = true;
  }
  uint32_t read(uint32_t lane, uint32_t column) const {
    if (!written_[column * kLanes + lane]) unwritten(lane, column);
    return cells_[column * kLanes + lane];
  }

  // The first column, or kColumns if there is no room.
  uint32_t allocate(Warp& w, uint32_t columns);
  void release(Warp& w, uint32_t column, uint32_t columns);
  void check_released() const;
  void check_allocated(const TensorArea& a) const;
  bool permit = true;  // to allocate: until tcgen05.relinquish_alloc_permit

  // An access by a warp, between the instruction and the wait for it.
  void begin(Warp& w, const TensorArea& a, bool write, uint32_t line);
  void end(Warp& w, const TensorArea& a, bool write, uint32_t line);
  // An access by a tcgen05.mma that `w` issues at `clock` of the tensor cores.
  void access_by_mma(Warp& w, const TensorArea& a, bool write, uint32_t clock, uint32_t line);

 private:
  static constexpr uint32_t kGroup = 16;  // lanes that share a state
  struct Access {
    uint32_t clock = 0, agent = 0, line = 0;
  };
  struct State {
    Access write, read, mma_read;
    uint32_t loading = 0, storing = 0;  // accesses of warps without a wait
    uint32_t loading_line = 0, storing_line = 0, storing_warp = 0;
  };
  template <class F>
  void each_state(const TensorArea& a, F f);
  [[noreturn]] static void unwritten(uint32_t lane, uint32_t column);
  enum class By { warp, mma, release };
  void check_order(const Warp& w, const TensorArea& a, bool write, By by);

  std::vector<uint32_t> cells_;
  std::vector<uint8_t> written_;
  std::vector<State> groups_;
  std::map<uint32_t, uint32_t> allocations_;  // columns by first column
  bool check_init_;
};

// A tcgen05.ld or tcgen05.st without its wait.
struct PendingTensorAccess {
  const Op* op = nullptr;
  Frame* frame = nullptr;  // of a load
  uint32_t address = 0;
  bool done = false;             // has taken effect early
  std::vector<uint32_t> values;  // of a store: 32 for each register
};

// A tcgen05.mma or tcgen05.commit that has not completed.
struct PendingTensorWork {
  Warp* warp = nullptr;
  uint32_t lane = 0, line = 0;
  bool commit = false;
  uint32_t pair = 1;  // CTAs that compute, from `first` on
  uint32_t first = 0;
  // mma
  uint32_t d = 0, descriptor = 0;
  bool a_in_tensor_memory = false, accumulate = false;
  uint64_t a = 0, b = 0;
  std::array<uint32_t, 8> disabled_lanes{};
  // commit
  uint32_t mbar = 0, ctas = 0;   // its offset in each of the CTAs of a mask
  std::vector<uint32_t> clocks;  // what the issuing warp knew, for the race check
};

TensorMemory& tensor_memory(Block& b);  // faults if nothing has been allocated
bool uses_columns(const PendingTensorWork& p, uint32_t first, uint32_t columns);
// Completes the oldest tcgen05.commit in flight to this mbarrier, with the work before it. False if there is none.
bool complete_commit(Group& g, uint32_t cta, uint32_t mbar);
bool select_tensor_mma(Decoder& d, const AInstr& in, Op& op);  // tcgen05.mma and .commit

}  // namespace cudasim
