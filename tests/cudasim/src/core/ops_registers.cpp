// Registers as a resource: setmaxnreg, and the order in which wgmma and other instructions use a register.
#include <algorithm>
#include <set>

#include "collective.h"
#include "select.h"

namespace cudasim {

namespace {

// --- setmaxnreg -------------------------------------------------------------------------------------------------
// A CTA starts with the registers of its launch. What .dec releases goes into a pool, from which .inc takes, and waits
// while there are too few.

enum : uint32_t { R_INC = 1 };

void setmaxnreg(Warp& w, const Op& o, uint32_t m) {
  if (!w.registers || !whole_warp(w, m)) return;
  Block& b = *w.blk;
  const uint32_t to = uint32_t(o.imm);
  const bool inc = o.flags & R_INC;
  if (inc ? to < w.registers : to > w.registers)
    fault(Fault::registers, -1,
          std::string("setmaxnreg.") + (inc ? "inc" : "dec") + " to " + std::to_string(to) +
              " registers, but the warp has " + std::to_string(w.registers) + " per thread");
  if (inc) {
    if (to - w.registers > b.register_pool) {
      w.block_lanes(m, Wait::registers);
      w.ev |= EV_RESCHED | EV_PARKED;
      return;
    }
    b.register_pool -= to - w.registers;
  } else {
    b.register_pool += w.registers - to;
    for (auto& other : b.warps)
      for (uint32_t t = other->live & other->blocked; t; t &= t - 1)
        if (const int l = __builtin_ctz(t); other->wait[l] == Wait::registers) other->blocked &= ~(1u << l);
  }
  w.registers = to;
  b.group->idle_rounds = 0;
}

bool sel_setmaxnreg(Decoder&, const AInstr& in, Op& op) {
  op.cls = C_control;
  if (in.ops.size() != 1 || in.ops[0].kind != AOperand::num) return false;
  op.imm = in.ops[0].imm;
  if (op.imm < 24 || op.imm > 256 || op.imm % 8)
    throw Decoder::Unsupported{"the register count is not a multiple of 8 from 24 to 256"};
  op.flags = has(in, "inc") ? R_INC : 0;
  return done(op, setmaxnreg);
}

// --- wgmma.fence ------------------------------------------------------------------------------------------------
// Runs an op that writes registers which wgmma uses, and remembers that. nvcc copies accumulators between virtual
// registers and sets them to constants anywhere before their use, also after the wgmma.fence of the source code. ptxas
// removes the copies and moves the constants, so a mov passes on what is known of its source, and constants are fine.

void tracked(Warp& w, const Op& o, uint32_t m) {
  const Function& f = *w.frame->fn;
  const Function::Tracked& t = f.tracked[size_t(&o - f.code.data())];
  auto write = Warp::RegisterWrite{w.fences, o.src->line};
  if (t.constant) write = {};
  if (t.copied != NONE) write = w.register_writes[t.copied];
  for (const uint32_t number : t.written) w.register_writes[number] = write;
  t.fn(w, o, m);
}

bool is_wgmma(const Op& op) { return op.src->mods[0] == "wgmma" && op.ext && has(*op.src, "mma_async"); }

}  // namespace

void track_registers(Decoder& d, Function& f) {
  std::set<uint32_t> used;  // frame offsets
  for (const Op& op : f.code)
    if (is_wgmma(op))
      for (const auto& operand : {op.ext->v[0], op.ext->v[1]}) used.insert(operand.begin(), operand.end());
  if (used.empty()) return;
  std::set<uint32_t> registers;  // and not constants
  for (const Slot& slot : d.slots()) registers.insert(slot.offset);
  const auto is_mov = [](const Op& op) { return op.src->mods[0] == "mov" && !op.ext && op.size == 0; };
  const auto copies = [&](const Op& op) { return is_mov(op) && registers.count(op.a); };
  for (bool more = true; more;) {  // also the sources of copies
    more = false;
    for (const Op& op : f.code)
      if (copies(op) && used.count(op.dst)) more |= used.insert(op.a).second;
  }
  f.tracked.resize(f.code.size());
  std::unordered_map<uint32_t, uint32_t> number;
  for (const uint32_t offset : used) number[offset] = d.image->tracked_registers++;
  for (const auto& [pc, offset] : d.written)
    if (used.count(offset) && !is_wgmma(f.code[pc])) f.tracked[pc].written.push_back(number[offset]);
  for (size_t pc = 0; pc < f.code.size(); ++pc) {
    Op& op = f.code[pc];
    Function::Tracked& t = f.tracked[pc];
    if (t.written.empty()) continue;
    if (copies(op)) t.copied = number[op.a];
    t.constant = is_mov(op) && op.src->ops[1].kind == AOperand::num;
    t.fn = op.fn;
    op.fn = tracked;
  }
  for (const Op& op : f.code)
    if (is_wgmma(op))
      for (const auto& operand : {op.ext->v[0], op.ext->v[1]})
        for (const uint32_t offset : operand) const_cast<OpExt*>(op.ext)->v[2].push_back(number[offset]);
}

void register_registers(SelectorMap& m) { m["setmaxnreg"] = sel_setmaxnreg; }

}  // namespace cudasim
