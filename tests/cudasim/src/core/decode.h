// The interface for instruction selectors while a function is decoded.
#pragma once
#include <string_view>

#include "machine.h"

namespace cudasim {

struct Module {
  AModule ast;
  std::vector<std::unique_ptr<Kernel>> kernels;
  std::unordered_map<std::string_view, uint64_t> var_address;  // host address of global/const variables
  std::vector<std::unique_ptr<uint8_t[]>> storage;
  std::vector<Range> ranges;
  std::vector<const AFunction*> function_list;  // by function-pointer number
};

struct Kernel {
  Module* module = nullptr;
  const AFunction* ast = nullptr;
  std::string name;
  std::unique_ptr<KernelImage> image;
  std::mutex mutex;
};

class Decoder;

// A selector fills `op` for one instruction; false means "not supported".
using Selector = bool (*)(Decoder&, const AInstr&, Op&);

class Decoder {
 public:
  Decoder(Module* m, KernelImage* img) : module(m), image(img) {}
  Module* module;
  KernelImage* image;
  Function* fn = nullptr;
  const AFunction* ast = nullptr;

  void decode(Function* f);

  // --- operands -----------------------------------------------------------------------------
  Slot reg(int id) const { return slots_[id]; }
  uint8_t reg_size(const AOperand& o) const;  // bytes of the lane value; 0 for constants
  // Source of exactly `size` bytes per lane; throws Unsupported on a mismatch.
  uint32_t src(const AOperand& o, int size, Ty t = Ty::none);
  uint32_t src(const AOperand& o, Ty t) { return src(o, ty_size(t), t); }
  uint32_t dst(const AOperand& o, int size);
  std::vector<std::pair<uint32_t, uint32_t>> written;  // (pc, frame offset) of every register that dst has returned
  uint32_t pred(const AOperand& o, bool* neg);         // predicate source
  uint32_t pred_dst(const AOperand& o);                // predicate destination ('_' allowed)
  uint32_t constant(uint64_t v, int size);
  uint32_t special(Special s, int size, int64_t addend = 0);
  uint32_t scratch(int size);
  OpExt& ext(Op& op) {
    fn->exts.emplace_back();
    op.ext = &fn->exts.back();
    fn->exts.back().instr = cur;
    return fn->exts.back();
  }
  uint32_t label(std::string_view name, int scope) const;
  bool is_special(std::string_view name, Special* s, int* size) const;

  struct Sym {
    enum { address, local, param, function, none } kind = none;
    Space space = Space::none;
    uint64_t value = 0;
  };
  Sym symbol(const AOperand& o) const;
  uint64_t param_address(uint32_t offset) const;
  Function* function_for(std::string_view name);
  const std::vector<Slot>& slots() const { return slots_; }

  // Emits an extra op before the current one.
  void before(const Op& op) { fn->code.push_back(op); }

  const AInstr* cur = nullptr;
  struct Unsupported {
    std::string why;
  };

 private:
  friend struct DecoderImpl;
  std::vector<Slot> slots_;
  uint32_t top_ = 0;
  std::map<std::pair<uint64_t, int>, uint32_t> const_slots_;
  std::map<std::tuple<int, int, int64_t>, uint32_t> spec_slots_;
  std::vector<uint32_t> var_offset_;                              // function-scope variables
  std::unordered_map<std::string_view, uint32_t> formal_offset_;  // params and returns of a .func
  uint32_t alloc(int size);
  std::vector<uint32_t> instr_pc_;
};

std::vector<uint32_t> colour_registers(const Decoder& d, const AFunction& f);  // empty: no sharing
void track_registers(Decoder& d, Function& f);                                 // ops_registers.cpp

bool has(const AInstr& in, std::string_view mod);
Ty last_type(const AInstr& in);                 // the last type qualifier
Ty first_type(const AInstr& in, int skip = 0);  // the first (after skipping some)

const std::unordered_map<std::string_view, Selector>& selectors();

// Each file of instructions registers its mnemonics here.
using SelectorMap = std::unordered_map<std::string_view, Selector>;
void register_integer(SelectorMap&);
void register_bits(SelectorMap&);
void register_compare(SelectorMap&);
void register_move(SelectorMap&);
void register_float(SelectorMap&);
void register_half(SelectorMap&);
void register_convert(SelectorMap&);
void register_memory(SelectorMap&);
void register_atomic(SelectorMap&);
void register_control(SelectorMap&);
void register_barrier(SelectorMap&);
void register_warp(SelectorMap&);
void register_mma(SelectorMap&);
void register_wmma(SelectorMap&);
void register_async(SelectorMap&);
void register_mbarrier(SelectorMap&);
void register_wgmma(SelectorMap&);
void register_tcgen05(SelectorMap&);
void register_registers(SelectorMap&);

}  // namespace cudasim
