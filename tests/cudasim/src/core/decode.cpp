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
    register_bits(m);
    register_compare(m);
    register_move(m);
    register_float(m);
    register_half(m);
    register_convert(m);
    register_memory(m);
    register_atomic(m);
    register_control(m);
    register_barrier(m);
    register_warp(m);
    register_mma(m);
    register_wmma(m);
    register_async(m);
    register_mbarrier(m);
    register_wgmma(m);
    register_tcgen05(m);
    register_registers(m);
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

static uint32_t align_up(uint64_t v, uint64_t a) { return uint32_t((v + a - 1) / (a ? a : 1) * (a ? a : 1)); }

void Decoder::decode(Function* f) {
  fn = f;
  ast = f->ast;
  top_ = 64;  // offset 0 means "no operand"
  slots_.clear();
  const_slots_.clear();
  spec_slots_.clear();
  formal_offset_.clear();
  written.clear();

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
  track_registers(*this, *fn);
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
