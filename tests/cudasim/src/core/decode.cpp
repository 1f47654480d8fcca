// Turns a kernel's syntax tree into compact ops with resolved frame offsets.
#include "decode.h"

#include <algorithm>
#include <set>
#include <tuple>

#include "lanes.h"

namespace cudasim {

bool has(const AInstr& in, std::string_view mod) {
  for (size_t i = 1; i < in.mods.size(); ++i)
    if (in.mods[i] == mod) return true;
  return false;
}
Ty last_type(const AInstr& in) {
  for (size_t i = in.mods.size(); i-- > 1;) {
    Ty t = parse_type(in.mods[i]);
    if (t != Ty::none) return t;
  }
  return Ty::none;
}
Ty first_type(const AInstr& in, int skip) {
  for (size_t i = 1; i < in.mods.size(); ++i) {
    Ty t = parse_type(in.mods[i]);
    if (t != Ty::none && skip-- == 0) return t;
  }
  return Ty::none;
}

const SelectorMap& selectors() {
  static const SelectorMap map = [] {
    SelectorMap m;
    register_integer(m);
    register_float(m);
    register_half(m);
    register_convert(m);
    register_memory(m);
    register_control(m);
    register_warp(m);
    register_mma(m);
    register_async(m);
    register_wgmma(m);
    return m;
  }();
  return map;
}

// The function to which the profile attributes a group of instructions, if the selector did not say.
static Class class_of(const AInstr& in) {
  Ty t = last_type(in);
  switch (t) {
    case Ty::f32:
    case Ty::f64:
    case Ty::tf32:
      return C_fp32;
    case Ty::f16:
    case Ty::bf16:
    case Ty::f16x2:
    case Ty::bf16x2:
      return C_half;
    default:
      return C_integer;
  }
}

static void op_unsupported(Warp&, const Op& o, uint32_t) {
  throw SimFault{Fault::unsupported_instruction,
                 "unsupported instruction" + (o.ext && !o.ext->text.empty() ? " (" + o.ext->text + ")" : std::string()),
                 -1};
}

// --- registers, constants, specials -----------------------------------------------------------------

static int storage_bytes(int size) {  // bytes of one register across the warp
  switch (size) {
    case 0:
      return 32;  // predicate mask (padded)
    case 1:
    case 2:
      return 64;
    case 4:
      return 128;
    case 8:
      return 256;
    default:
      return 512;
  }
}
uint32_t Decoder::alloc(int size) {
  uint32_t o = top_;
  top_ += uint32_t(storage_bytes(size));
  return o;
}
uint32_t Decoder::scratch(int size) { return alloc(size); }

uint32_t Decoder::constant(uint64_t v, int size) {
  if (size == 1) size = 2;
  if (size == 2) v &= 0xffff;
  if (size == 4) v &= 0xffffffffu;
  auto [it, fresh] = const_slots_.try_emplace({v, size}, 0);
  if (fresh) {
    it->second = alloc(size);
    fn->consts.push_back({it->second, uint8_t(size), v});
  }
  return it->second;
}
uint32_t Decoder::special(Special s, int size, int64_t addend) {
  auto [it, fresh] = spec_slots_.try_emplace({int(s), size, addend}, 0);
  if (fresh) {
    it->second = alloc(size);
    fn->specials.push_back({it->second, uint8_t(size), s, addend});
  }
  return it->second;
}

bool Decoder::is_special(std::string_view n, Special* s, int* size) const {
  static const std::unordered_map<std::string_view, std::pair<Special, int>> table = [] {
    std::unordered_map<std::string_view, std::pair<Special, int>> t;
    using S = Special;
    auto xyz = [&](const char* x, const char* y, const char* z, S s0) {
      t[x] = {s0, 4};
      t[y] = {S(int(s0) + 1), 4};
      t[z] = {S(int(s0) + 2), 4};
    };
    xyz("%tid.x", "%tid.y", "%tid.z", S::tid_x);
    xyz("%ntid.x", "%ntid.y", "%ntid.z", S::ntid_x);
    xyz("%ctaid.x", "%ctaid.y", "%ctaid.z", S::ctaid_x);
    xyz("%nctaid.x", "%nctaid.y", "%nctaid.z", S::nctaid_x);
    xyz("%clusterid.x", "%clusterid.y", "%clusterid.z", S::clusterid_x);
    xyz("%nclusterid.x", "%nclusterid.y", "%nclusterid.z", S::nclusterid_x);
    xyz("%cluster_ctaid.x", "%cluster_ctaid.y", "%cluster_ctaid.z", S::cluster_ctaid_x);
    xyz("%cluster_nctaid.x", "%cluster_nctaid.y", "%cluster_nctaid.z", S::cluster_nctaid_x);
    t["%cluster_ctarank"] = {S::cluster_ctarank, 4};
    t["%cluster_nctarank"] = {S::cluster_nctarank, 4};
    t["%is_explicit_cluster"] = {S::is_explicit_cluster, 0};
    t["%laneid"] = {S::laneid, 4};
    t["%warpid"] = {S::warpid, 4};
    t["%nwarpid"] = {S::nwarpid, 4};
    t["%smid"] = {S::smid, 4};
    t["%nsmid"] = {S::nsmid, 4};
    t["%gridid"] = {S::gridid, 8};
    t["%lanemask_eq"] = {S::lanemask_eq, 4};
    t["%lanemask_le"] = {S::lanemask_le, 4};
    t["%lanemask_lt"] = {S::lanemask_lt, 4};
    t["%lanemask_ge"] = {S::lanemask_ge, 4};
    t["%lanemask_gt"] = {S::lanemask_gt, 4};
    t["%clock"] = {S::clock, 4};
    t["%clock_hi"] = {S::clock_hi, 4};
    t["%clock64"] = {S::clock64, 8};
    t["%globaltimer"] = {S::globaltimer, 8};
    t["%globaltimer_lo"] = {S::globaltimer_lo, 4};
    t["%globaltimer_hi"] = {S::globaltimer_hi, 4};
    t["%dynamic_smem_size"] = {S::dynamic_smem_size, 4};
    t["%total_smem_size"] = {S::total_smem_size, 4};
    t["%aggr_smem_size"] = {S::aggr_smem_size, 4};
    t["%reserved_smem_offset_begin"] = {S::zero32, 4};
    t["%reserved_smem_offset_end"] = {S::zero32, 4};
    t["%reserved_smem_offset_cap"] = {S::zero32, 4};
    t["%reserved_smem_offset_0"] = {S::zero32, 4};
    t["%reserved_smem_offset_1"] = {S::zero32, 4};
    t["%current_graph_exec"] = {S::zero64, 8};
    return t;
  }();
  auto it = table.find(n);
  if (it == table.end()) {
    if (n.substr(0, 7) == "%envreg") {
      *s = n == "%envreg1"   ? Special::grid_workspace_hi
           : n == "%envreg2" ? Special::grid_workspace_lo
                             : Special::zero32;
      *size = 4;
      return true;
    }
    if (n.substr(0, 3) == "%pm") {
      *s = n.size() > 3 && n.substr(n.size() - 3) == "_64" ? Special::zero64 : Special::zero32;
      *size = *s == Special::zero64 ? 8 : 4;
      return true;
    }
    return false;
  }
  *s = it->second.first;
  *size = it->second.second;
  return true;
}

uint8_t Decoder::reg_size(const AOperand& o) const {
  if (o.kind == AOperand::reg) return slots_[o.reg_id].size;
  if (o.kind == AOperand::special) {
    Special s;
    int size;
    if (is_special(o.name, &s, &size)) return uint8_t(size);
  }
  return 0;
}

Decoder::Sym Decoder::symbol(const AOperand& o) const {
  Sym r;
  if (o.var_id >= 0) {
    const AVar& v = ast->vars[o.var_id];
    r.space = v.space;
    r.kind = v.space == Space::local ? Sym::local : v.space == Space::param ? Sym::param : Sym::address;
    if (v.space == Space::shared)
      r.value = kSharedBase + image->shared_layout.at(&v) + o.imm;
    else if (v.space == Space::global || v.space == Space::constant) {
      auto it = module->var_address.find(v.name);
      if (it == module->var_address.end()) return {};
      r.value = it->second + o.imm;
    } else
      r.value = var_offset_[o.var_id] + o.imm;
    return r;
  }
  auto f = formal_offset_.find(o.name);
  if (f != formal_offset_.end()) {
    r.kind = Sym::param;
    r.space = Space::param;
    r.value = f->second + o.imm;
    return r;
  }
  auto v = module->ast.var_index.find(o.name);
  if (v != module->ast.var_index.end()) {
    const AVar& var = module->ast.vars[v->second];
    r.kind = Sym::address;
    r.space = var.space;
    if (var.space == Space::shared)
      r.value = kSharedBase + image->shared_layout.at(&var) + o.imm;
    else {
      auto it = module->var_address.find(o.name);
      if (it == module->var_address.end()) return {};
      r.value = it->second + o.imm;
    }
    return r;
  }
  auto fi = module->ast.func_index.find(o.name);
  if (fi != module->ast.func_index.end()) {
    r.kind = Sym::function;
    r.value = kFunctionWindow + 16 * (fi->second + 1);
  }
  return r;
}

uint32_t Decoder::src(const AOperand& o, int size, Ty t) {
  switch (o.kind) {
    case AOperand::reg: {
      Slot s = slots_[o.reg_id];
      int want = size == 1 ? 2 : size;
      if (s.size != want) throw Unsupported{"register width does not match the instruction type"};
      if (o.neg) throw Unsupported{"negated register operand"};
      return s.offset;
    }
    case AOperand::num: {
      uint64_t v = uint64_t(o.imm);
      if (ty_float(t)) {
        if (t == Ty::f32 && o.imm_float == 64)
          v = bits<uint32_t>(float(bits<double>(o.imm)));
        else if (t == Ty::f64 && o.imm_float == 32)
          v = bits<uint64_t>(double(bits<float>(uint32_t(o.imm))));
        else if (t == Ty::f64 && o.imm_float == 0)
          v = bits<uint64_t>(double(o.imm));
        else if (t == Ty::f32 && o.imm_float == 0)
          v = bits<uint32_t>(float(o.imm));
      } else if (o.imm_float == 64 && size == 4)
        v = bits<uint32_t>(float(bits<double>(o.imm)));
      return constant(v, size);
    }
    case AOperand::special: {
      Special s;
      int sz;
      if (!is_special(o.name, &s, &sz)) throw Unsupported{"unknown special register " + std::string(o.name)};
      if (sz != size) {
        // 32-bit specials may be read through a narrower or wider move
        if (sz == 4 && size == 8) return special(s, 8);
        if (sz == 4 && size == 2) return special(s, 2);
        if (sz == 8 && size == 4) return special(s, 4);
        throw Unsupported{"special register width"};
      }
      return special(s, sz);
    }
    case AOperand::sym: {
      Sym y = symbol(o);
      if (y.kind == Sym::none) throw Unsupported{"unknown symbol " + std::string(o.name)};
      if (y.kind == Sym::local) return special(Special::local_base, size, int64_t(y.value));
      if (y.kind == Sym::param) {
        if (ast->is_entry && o.var_id < 0) return special(Special::param_base, size, int64_t(y.value));
        return special(Special::pmem_base, size, int64_t(y.value));
      }
      return constant(y.value, size);
    }
    case AOperand::sink:
      return alloc(size);
    default:
      throw Unsupported{"operand kind"};
  }
}

uint32_t Decoder::dst(const AOperand& o, int size) {
  if (o.kind == AOperand::sink) return alloc(size);
  if (o.kind != AOperand::reg) throw Unsupported{"destination is not a register"};
  Slot s = slots_[o.reg_id];
  if (s.size != (size == 1 ? 2 : size)) throw Unsupported{"destination width does not match the instruction type"};
  return s.offset;
}
uint32_t Decoder::pred(const AOperand& o, bool* neg) {
  *neg = o.neg;
  if (o.kind == AOperand::num) return constant(o.imm ? FULL : 0, 0);
  if (o.kind == AOperand::special) {
    Special s;
    int size;
    if (is_special(o.name, &s, &size) && size == 0) return special(s, 0);
  }
  if (o.kind != AOperand::reg || slots_[o.reg_id].size != 0) throw Unsupported{"predicate operand expected"};
  return slots_[o.reg_id].offset;
}
uint32_t Decoder::pred_dst(const AOperand& o) {
  if (o.kind == AOperand::sink) return alloc(0);
  if (o.kind != AOperand::reg || slots_[o.reg_id].size != 0) throw Unsupported{"predicate destination expected"};
  return slots_[o.reg_id].offset;
}

// Index of the instruction that a label precedes.
uint32_t Decoder::label(std::string_view name, int scope) const {
  for (int s = scope; s >= 0; s = ast->scope_parent[s])
    for (auto& l : ast->labels)
      if (l.scope == s && l.name == name) return l.index;
  // a label inside a nested scope that this one can't see: accept a unique match
  const ALabel* found = nullptr;
  for (auto& l : ast->labels)
    if (l.name == name) {
      if (found) return NONE;
      found = &l;
    }
  return found ? found->index : NONE;
}

Function* Decoder::function_for(std::string_view name) {
  auto it = module->ast.func_index.find(name);
  if (it == module->ast.func_index.end()) return nullptr;
  const AFunction* a = &module->ast.functions[it->second];
  auto f = image->by_ast.find(a);
  return f == image->by_ast.end() ? nullptr : f->second;
}

// --- functions ----------------------------------------------------------------------------------------

static uint32_t align_up(uint64_t v, uint64_t a) { return uint32_t((v + a - 1) / (a ? a : 1) * (a ? a : 1)); }

void Decoder::decode(Function* f) {
  fn = f;
  ast = f->ast;
  top_ = 64;  // offset 0 means "no operand"
  slots_.clear();
  const_slots_.clear();
  spec_slots_.clear();
  formal_offset_.clear();

  std::vector<uint32_t> colour = colour_registers(*this, *ast);
  std::map<std::pair<int, uint32_t>, uint32_t> shared_slot;
  for (size_t i = 0; i < ast->regs.size(); ++i) {
    Ty t = ast->regs[i];
    int size = t == Ty::pred ? 0 : ty_size(t) == 1 ? 2 : ty_size(t);
    if (colour.empty()) {
      slots_.push_back({alloc(size), uint8_t(size)});
      continue;
    }
    auto [it, fresh] = shared_slot.try_emplace({size, colour[i]}, 0);
    if (fresh) it->second = alloc(size);
    slots_.push_back({it->second, uint8_t(size)});
  }

  // .param memory: returns, formals, then variables declared in the body
  uint32_t pm = 0;
  auto place = [&](const AVar& v) {
    pm = align_up(pm, std::max<uint32_t>(v.align, 1));
    uint32_t o = pm;
    pm += uint32_t(v.size);
    return o;
  };
  if (ast->is_entry) {
    for (size_t i = 0; i < ast->params.size(); ++i) formal_offset_[ast->params[i].name] = image->param_offset[i];
  } else {
    for (auto& v : ast->returns) {
      uint32_t o = place(v);
      fn->return_offset.push_back(o);
      formal_offset_[v.name] = o;
    }
    for (auto& v : ast->params) {
      uint32_t o = place(v);
      fn->param_offset.push_back(o);
      formal_offset_[v.name] = o;
    }
  }
  uint32_t local = 0;
  var_offset_.assign(ast->vars.size(), 0);
  for (size_t i = 0; i < ast->vars.size(); ++i) {
    const AVar& v = ast->vars[i];
    if (v.space == Space::param)
      var_offset_[i] = place(v);
    else if (v.space == Space::local) {
      local = align_up(local, std::max<uint32_t>(v.align, 1));
      var_offset_[i] = local;
      local += uint32_t(v.size);
    }
  }
  fn->param_bytes = align_up(pm, 16);
  fn->local_bytes = align_up(local, 16);

  instr_pc_.clear();
  for (auto& in : ast->body) {
    instr_pc_.push_back(uint32_t(fn->code.size()));
    cur = &in;
    Op op;
    op.src = &in;
    if (in.pred >= 0) {
      op.pred = slots_[in.pred].offset;
      op.pred_neg = in.pred_neg;
    }
    op.cls = class_of(in);
    std::string why;
    bool ok = false;
    size_t code_size = fn->code.size();
    auto it = selectors().find(in.mods[0]);
    if (it != selectors().end()) {
      try {
        ok = it->second(*this, in, op);
      } catch (const Unsupported& u) {
        why = u.why;
        fn->code.resize(code_size);
      }
    }
    if (!ok) {
      op.fn = op_unsupported;
      ext(op).text = why;
    }
    fn->code.push_back(op);
  }
  // Falling off the end returns.
  instr_pc_.push_back(uint32_t(fn->code.size()));
  {
    static const AInstr end_ret{"ret", 0, {"ret"}, {}, -1, false};
    cur = &end_ret;
    Op op;
    op.src = &end_ret;
    selectors().at("ret")(*this, end_ret, op);
    fn->code.push_back(op);
  }
  // Branch operands were recorded as instruction numbers.
  for (auto& op : fn->code) {
    if (op.flags & 0x80000000u) op.imm = instr_pc_[size_t(op.imm)];
    if (op.ext && !op.ext->table.empty())
      for (auto& t : const_cast<OpExt*>(op.ext)->table) t = instr_pc_[t];
  }
  fn->frame_bytes = align_up(top_, 64);
  fn->decoded = true;
}

namespace {

template <class F>
void each_symbol(const AOperand& o, F f) {
  if (o.kind == AOperand::sym) f(o);
  for (auto& e : o.elems) each_symbol(e, f);
}

}  // namespace

KernelImage* decode_kernel(Module* m, const AFunction* entry, std::string* error) {
  auto img = std::make_unique<KernelImage>();
  AModule& am = m->ast;

  // Functions reachable from the entry. An indirect call may reach any function.
  std::vector<const AFunction*> list{entry};
  std::set<const AFunction*> seen{entry};
  std::vector<const AVar*> shared;
  std::set<const AVar*> shared_seen;
  bool indirect = false;
  for (size_t i = 0; i < list.size(); ++i) {
    const AFunction* f = list[i];
    for (auto& v : f->vars)
      if (v.space == Space::shared && shared_seen.insert(&v).second) shared.push_back(&v);
    for (auto& in : f->body) {
      if (in.mods[0] == "call")
        for (auto& o : in.ops) indirect |= o.kind == AOperand::reg;
      for (auto& o : in.ops)
        each_symbol(o, [&](const AOperand& s) {
          auto v = am.var_index.find(s.name);
          if (s.var_id < 0 && v != am.var_index.end() && am.vars[v->second].space == Space::shared &&
              shared_seen.insert(&am.vars[v->second]).second)
            shared.push_back(&am.vars[v->second]);
          auto g = am.func_index.find(s.name);
          if (g != am.func_index.end() && am.functions[g->second].has_body &&
              seen.insert(&am.functions[g->second]).second)
            list.push_back(&am.functions[g->second]);
        });
    }
    if (indirect && i + 1 == list.size())
      for (auto& g : am.functions)
        if (g.has_body && !g.is_entry && seen.insert(&g).second) list.push_back(&g);
  }

  uint32_t top = 0;
  for (auto* v : shared)
    if (!(v->external && v->size == 0)) {
      top = align_up(top, v->align);
      img->shared_layout[v] = top;
      top += uint32_t(v->size);
    }
  img->static_shared = top;
  for (auto* v : shared)
    if (v->external && v->size == 0) img->dynamic_align = std::max(img->dynamic_align, v->align);
  for (auto* v : shared)
    if (v->external && v->size == 0) img->shared_layout[v] = align_up(top, img->dynamic_align);

  uint32_t pm = 0;
  for (auto& v : entry->params) {
    pm = align_up(pm, v.align);
    img->param_offset.push_back(pm);
    pm += uint32_t(v.size);
  }
  img->param_bytes = pm;

  for (auto* f : list) {
    img->functions.emplace_back();
    Function& fn = img->functions.back();
    fn.ast = f;
    fn.index = uint32_t(img->functions.size() - 1);
    img->by_ast[f] = &fn;
  }
  Decoder d(m, img.get());
  for (auto& fn : img->functions) d.decode(&fn);
  (void)error;
  return img.release();
}

}  // namespace cudasim
