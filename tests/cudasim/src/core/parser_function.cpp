// Functions: their parameters, declarations, labels and instructions.
#include "parser.h"

namespace cudasim {

// --- functions ------------------------------------------------------------------------------

void Parser::param_list(std::vector<AVar>& out) {
  expect('(');
  if (accept(')')) return;
  do {
    std::string_view d = dotted();
    if (d == ".reg") {  // .reg parameters (hand-written PTX) behave as .param for our purposes
      out.push_back(variable(Space::param, false));
    } else if (d == ".param") {
      out.push_back(variable(Space::param, false));
    } else
      fail("expected .param, found '" + std::string(d) + "'");
  } while (accept(','));
  expect(')');
}
void Parser::function(bool entry) {
  AFunction fn;
  fn.is_entry = entry;
  skip_attributes();
  if (!entry && peek() == '(') param_list(fn.returns);
  fn.name = ident();
  if (peek() == '(') param_list(fn.params);
  for (;;) {
    if (peek() != '.') break;
    std::string_view d = dotted();
    if (d == ".maxntid" || d == ".reqntid") {
      uint32_t n = uint32_t(integer());
      while (accept(',')) n *= uint32_t(integer());
      (d == ".maxntid" ? fn.maxntid : fn.reqntid) = n;
    } else if (d == ".reqnctapercluster") {
      fn.cluster[0] = uint32_t(integer());
      fn.cluster[1] = fn.cluster[2] = 1;
      for (int i = 1; i < 3 && accept(','); ++i) fn.cluster[i] = uint32_t(integer());
    } else if (d == ".minnctapersm" || d == ".maxnreg" || d == ".maxnctapersm" || d == ".maxclusterrank") {
      integer();
    } else if (d == ".explicitcluster" || d == ".noreturn" || d == ".blocksareclusters") {
    } else if (d == ".unified" || d == ".attribute") {
      if (accept('(')) {
        while (p_ < end_ && *p_ != ')') ++p_;
        expect(')');
      }
    } else if (d == ".pragma") {
      skip_to_semicolon();
    } else if (d == ".abi_preserve" || d == ".abi_preserve_control") {
      integer();
    } else
      fail("unknown function directive " + std::string(d));
  }
  auto it = m_.func_index.find(fn.name);
  if (accept(';')) {
    if (it == m_.func_index.end()) {
      m_.func_index[fn.name] = uint32_t(m_.functions.size());
      m_.functions.push_back(std::move(fn));
    }
    return;
  }
  AFunction* slot;
  if (it == m_.func_index.end()) {
    m_.func_index[fn.name] = uint32_t(m_.functions.size());
    m_.functions.push_back(std::move(fn));
    slot = &m_.functions.back();
  } else {
    slot = &m_.functions[it->second];
    if (slot->has_body) slot = nullptr;
  }
  AFunction scratch;  // second definition of the same (weak) function: parsed and dropped
  AFunction& f = slot ? (it == m_.func_index.end() ? *slot : (*slot = std::move(fn))) : scratch;
  f.has_body = true;
  f_ = &f;
  expect('{');
  open_scope();
  body();
  scopes_.clear();
  f_ = nullptr;
}
void Parser::skip_attributes() {
  while (peek() == '.') {
    std::string_view d = dotted();
    if (d == ".attribute" && accept('(')) {
      while (p_ < end_ && *p_ != ')') ++p_;
      expect(')');
    }
  }
}
void Parser::open_scope() {
  Scope s;
  s.id = int32_t(f_->scope_parent.size());
  f_->scope_parent.push_back(scopes_.empty() ? -1 : scopes_.back().id);
  scopes_.push_back(std::move(s));
}
void Parser::body() {
  int depth = 1;
  while (depth > 0) {
    char c = peek();
    if (c == '\0') fail("unexpected end of text inside a function");
    if (c == '}') {
      ++p_;
      --depth;
      scopes_.pop_back();
      continue;
    }
    if (c == '{') {
      ++p_;
      ++depth;
      open_scope();
      continue;
    }
    if (c == ';') {
      ++p_;
      continue;
    }
    if (c == '.') {
      body_directive();
      continue;
    }
    if (c == '@') {
      instruction();
      continue;
    }
    // label or instruction
    const char* s = p_;
    uint32_t l = line_;
    if (ident_start(c)) {
      std::string_view n = ident();
      if (peek() == ':' && p_[1] != ':') {
        ++p_;
        label(n);
        continue;
      }
    }
    p_ = s;
    line_ = l;
    instruction();
  }
}
void Parser::label(std::string_view n) {
  if (peek() == '.') {
    const char* s = p_;
    uint32_t l = line_;
    std::string_view d = dotted();
    if (d == ".callprototype" || d == ".calltargets") {
      skip_to_semicolon();
      return;
    }
    if (d == ".branchtargets") {
      ABranchTable t{n, scopes_.back().id, {}};
      do t.targets.push_back(ident());
      while (accept(','));
      expect(';');
      f_->tables.push_back(std::move(t));
      return;
    }
    p_ = s;
    line_ = l;
  }
  f_->labels.push_back({n, scopes_.back().id, uint32_t(f_->body.size())});
}
void Parser::body_directive() {
  std::string_view d = dotted();
  if (d == ".reg") {
    reg_decl();
    return;
  }
  if (d == ".local" || d == ".shared" || d == ".param" || d == ".global" || d == ".const") {
    do {
      AVar v = variable(space_of(d), false);
      scopes_.back().vars[v.name] = int32_t(f_->vars.size());
      f_->vars.push_back(std::move(v));
    } while (accept(','));
    expect(';');
    return;
  }
  if (d == ".loc" || d == ".file") {
    skip_line();
    return;
  }
  if (d == ".pragma") {
    skip_to_semicolon();
    return;
  }
  if (d == ".maxntid" || d == ".minnctapersm") {
    skip_line();
    return;
  }
  if (d == ".section") {
    skip_section();
    return;
  }
  fail("unknown directive " + std::string(d) + " in a function");
}
void Parser::reg_decl() {
  Ty t = Ty::none;
  uint32_t vec = 1;
  while (peek() == '.') {
    std::string_view d = dotted();
    if (d == ".v2")
      vec = 2;
    else if (d == ".v4")
      vec = 4;
    else
      t = parse_type(d.substr(1));
    if (t == Ty::none && vec == 1) fail("unknown register type " + std::string(d));
  }
  if (vec != 1) fail("vector register variables are not supported");
  do {
    std::string_view n = ident();
    int32_t first = int32_t(f_->regs.size());
    if (accept('<')) {
      uint32_t count = uint32_t(integer());
      expect('>');
      f_->regs.insert(f_->regs.end(), count, t);
      scopes_.back().ranges[n] = {first, count};
    } else {
      f_->regs.push_back(t);
      scopes_.back().regs[n] = first;
    }
  } while (accept(','));
  expect(';');
}
int32_t Parser::find_reg(std::string_view n) {
  size_t stem = n.size();
  while (stem > 0 && digit(n[stem - 1])) --stem;
  for (auto s = scopes_.rbegin(); s != scopes_.rend(); ++s) {
    auto r = s->regs.find(n);
    if (r != s->regs.end()) return r->second;
    if (stem < n.size() && !s->ranges.empty()) {
      auto g = s->ranges.find(n.substr(0, stem));
      if (g != s->ranges.end()) {
        uint32_t i = 0;
        for (size_t k = stem; k < n.size(); ++k) i = i * 10 + uint32_t(n[k] - '0');
        if (i < g->second.count) return g->second.first + int32_t(i);
      }
    }
  }
  return -1;
}
int32_t Parser::find_var(std::string_view n) {
  for (auto s = scopes_.rbegin(); s != scopes_.rend(); ++s) {
    auto v = s->vars.find(n);
    if (v != s->vars.end()) return v->second;
  }
  return -1;
}

// --- instructions ---------------------------------------------------------------------------

void Parser::instruction() {
  f_->body.emplace_back();
  AInstr in;
  skip();
  const char* start = p_;
  in.line = line_;
  if (accept('@')) {
    in.pred_neg = accept('!');
    std::string_view n = ident();
    in.pred = find_reg(n);
    if (in.pred < 0) fail("unknown predicate " + std::string(n));
  }
  std::string_view op = dotted();
  if (op.empty()) fail("expected an instruction near '" + near() + "'");
  for (size_t i = 0; i <= op.size();) {
    size_t j = op.find('.', i);
    if (j == op.npos) j = op.size();
    in.mods.push_back(op.substr(i, j - i));
    i = j + 1;
  }
  if (peek() != ';') {
    do in.ops.push_back(operand());
    while (accept(','));
  }
  in.text = std::string_view(start, p_ - start);
  expect(';');
  f_->body.back() = std::move(in);
}
AOperand Parser::operand() {
  AOperand a = simple_operand();
  if (peek() == '|') {
    AOperand pr;
    pr.kind = AOperand::pair;
    pr.elems.push_back(std::move(a));
    ++p_;
    pr.elems.push_back(simple_operand());
    return pr;
  }
  return a;
}
AOperand Parser::simple_operand() {
  AOperand a;
  a.scope = scopes_.back().id;
  char c = peek();
  if (c == '{') {
    ++p_;
    a.kind = AOperand::vec;
    if (accept('}')) return a;
    do a.elems.push_back(operand());
    while (accept(','));
    expect('}');
    return a;
  }
  if (c == '(') {
    const char* s = p_;
    uint32_t l = line_;
    ++p_;
    skip();
    if (*p_ == ')' || ident_start(*p_)) {
      a.kind = AOperand::list;
      if (accept(')')) return a;
      do a.elems.push_back(operand());
      while (accept(','));
      expect(')');
      return a;
    }
    // a parenthesised constant, or a call argument list that begins with a literal
    p_ = s;
    line_ = l;
    ++p_;
    a.kind = AOperand::list;
    do a.elems.push_back(operand());
    while (accept(','));
    expect(')');
    return a;
  }
  if (c == '[') {
    ++p_;
    a.kind = AOperand::addr;
    skip();
    if (ident_start(*p_)) {
      a.elems.push_back(name_operand());
      if (peek() == '+') {
        ++p_;
        a.imm = integer();
      } else if (peek() == '-')
        a.imm = integer();
      a.imm += a.elems[0].imm;
      a.elems[0].imm = 0;
    } else
      a.imm = integer();
    while (accept(',')) a.elems.push_back(operand());
    expect(']');
    return a;
  }
  if (c == '!') {
    ++p_;
    a = simple_operand();
    a.neg = true;
    return a;
  }
  if (c == '-') {
    const char* q = p_ + 1;
    while (q < end_ && (*q == ' ' || *q == '\t')) ++q;
    if (ident_start(*q)) {
      ++p_;
      a = simple_operand();
      a.neg = true;
      return a;
    }
  }
  if (ident_start(c)) {
    a = name_operand();
    if (a.kind == AOperand::sym && (peek() == '+' || peek() == '-')) {
      if (*p_ == '+') ++p_;
      a.imm += integer();
    }
    return a;
  }
  Number n = expression();
  a.kind = AOperand::num;
  a.imm = n.value;
  a.imm_float = n.fp;
  return a;
}
AOperand Parser::name_operand() {
  AOperand a;
  a.scope = scopes_.back().id;
  std::string_view n = ident();
  if (n == "_") {
    a.kind = AOperand::sink;
    return a;
  }
  a.reg_id = find_reg(n);
  a.name = n;
  if (a.reg_id >= 0) {
    a.kind = AOperand::reg;
    return a;
  }
  if (n[0] == '%') {
    const char* s = n.data();
    while (p_ < end_ && (*p_ == '.' && p_ + 1 < end_ && ident_start(p_[1]))) {
      ++p_;
      while (p_ < end_ && ident_char(*p_)) ++p_;
    }
    a.name = std::string_view(s, p_ - s);
    a.kind = AOperand::special;
    return a;
  }
  if (n == "WARP_SZ") {
    a.kind = AOperand::num;
    a.imm = 32;
    return a;
  }
  a.kind = AOperand::sym;
  a.var_id = find_var(n);
  return a;
}

}  // namespace cudasim
