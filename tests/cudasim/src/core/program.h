// A decoded program: what the machine (machine.h) executes.
//
// Registers are stored "structure of arrays": a register is an array of 32 lane values inside the
// frame of the function that declared it, so an instruction is one loop over 32 lanes that the
// compiler vectorises. Predicates are 32-bit lane masks. Constants used by a function live in its
// frame too, already broadcast, so that every source operand is simply an offset into the frame.
#pragma once
#include <cstdint>
#include <deque>
#include <string>
#include <unordered_map>
#include <vector>

#include "ast.h"
#include "cudasim.h"

namespace cudasim {

constexpr uint32_t FULL = 0xffffffffu;
constexpr uint32_t NONE = 0xffffffffu;

// Generic address windows (far outside any host pointer).
constexpr uint64_t kSharedWindow = 1ull << 56;
constexpr uint64_t kLocalWindow = 2ull << 56;
constexpr uint64_t kFunctionWindow = 3ull << 56;
constexpr uint64_t kWindowMask = 0xff00000000000000ull;
// Shared memory of a CTA begins here in its part of the cluster's window: bits 24.. hold the CTA's rank, as on cards.
constexpr uint32_t kSharedBase = 1024;
constexpr uint32_t kLocalBase = 256;

struct Warp;
struct Op;
struct Function;

using Handler = void (*)(Warp&, const Op&, uint32_t mask);

enum Class : uint8_t {
  C_integer,
  C_fp32,
  C_half,
  C_convert,
  C_special,
  C_control,
  C_mma,
  C_load_global,
  C_store_global,
  C_load_shared,
  C_store_shared,
  C_load_local,
  C_store_local,
  C_load_const,
  C_async,
  C_barrier,
  C_shuffle,
  C_atomic,
  C_other,
  C_count
};

struct OpExt {                 // payload of the wider instructions
  std::vector<uint32_t> v[4];  // vector operands: frame offsets
  std::vector<int64_t> n;      // numbers
  const AInstr* instr = nullptr;
  Function* callee = nullptr;
  std::vector<uint32_t> table;  // branch targets
  std::string text;
};

struct Op {
  Handler fn = nullptr;
  uint32_t dst = 0, dst2 = 0, a = 0, b = 0, c = 0, d = 0;  // frame offsets
  uint32_t pred = NONE;                                    // frame offset of the guard mask
  uint8_t pred_neg = 0;
  Class cls = C_other;
  uint8_t size = 0, size2 = 0;  // element size in memory / size of the register
  uint32_t flags = 0;
  int64_t imm = 0;
  const OpExt* ext = nullptr;
  const AInstr* src = nullptr;
};

struct Slot {
  uint32_t offset;
  uint8_t size;
};

enum class Special : uint8_t {
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  nctaid_y,
  nctaid_z,
  laneid,
  warpid,
  nwarpid,
  smid,
  nsmid,
  gridid,
  lanemask_eq,
  lanemask_le,
  lanemask_lt,
  lanemask_ge,
  lanemask_gt,
  clock,
  clock_hi,
  clock64,
  globaltimer,
  globaltimer_lo,
  globaltimer_hi,
  dynamic_smem_size,
  total_smem_size,
  aggr_smem_size,
  clusterid_x,
  clusterid_y,
  clusterid_z,
  nclusterid_x,
  nclusterid_y,
  nclusterid_z,
  cluster_ctaid_x,
  cluster_ctaid_y,
  cluster_ctaid_z,
  cluster_nctaid_x,
  cluster_nctaid_y,
  cluster_nctaid_z,
  cluster_ctarank,
  cluster_nctarank,
  is_explicit_cluster,
  zero32,
  zero64,
  grid_workspace_hi,
  grid_workspace_lo,  // cooperative groups' grid barrier
  shared_base,        // the CTA's own part of the cluster's window
  local_base,
  param_base,
  pmem_base  // addresses that depend on the frame or launch
};

struct Function {
  const AFunction* ast = nullptr;
  std::vector<Op> code;
  uint32_t index = 0;  // in its kernel image
  uint32_t frame_bytes = 0;
  uint32_t param_bytes = 0;  // .param memory per lane
  uint32_t local_bytes = 0;
  struct Const {
    uint32_t offset;
    uint8_t size;
    uint64_t value;
  };
  std::vector<Const> consts;
  struct Spec {
    uint32_t offset;
    uint8_t size;
    Special id;
    int64_t addend;
  };
  std::vector<Spec> specials;
  std::vector<uint32_t> param_offset, return_offset;  // of formal parameters in .param memory
  std::deque<OpExt> exts;
  // Ops that write registers which wgmma uses, or copy into one: see ops_registers.cpp.
  struct Tracked {
    Handler fn = nullptr;
    std::vector<uint32_t> written;  // numbers among KernelImage::tracked_registers
    uint32_t copied = NONE;         // the number of the register that a mov copies
    bool constant = false;          // a mov of a constant
  };
  std::vector<Tracked> tracked;  // by pc, empty in functions without wgmma
  bool decoded = false;
};

// A kernel with the functions it can reach, decoded with one layout of shared memory.
struct KernelImage {
  std::deque<Function> functions;  // [0] is the entry
  std::unordered_map<const AFunction*, Function*> by_ast;
  std::unordered_map<const AVar*, uint32_t> shared_layout;  // byte offsets of .shared variables
  uint32_t static_shared = 0;
  uint32_t dynamic_align = 16;
  std::vector<uint32_t> param_offset;
  uint32_t param_bytes = 0;
  uint32_t tracked_registers = 0;
  bool has_fences = false;  // or other instructions that order memory between CTAs
};

struct SimFault {
  Fault fault;
  std::string message;
  int lane = -1;
};

}  // namespace cudasim
