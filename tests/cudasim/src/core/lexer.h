// Characters, words and constant expressions of PTX text.
#pragma once
#include <cctype>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>

namespace cudasim {

inline bool digit(char c) { return c >= '0' && c <= '9'; }
inline bool ident_start(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || c == '$' || c == '%';
}
inline bool ident_char(char c) { return ident_start(c) || digit(c); }

struct ParseError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Lexer {
 protected:
  explicit Lexer(std::string_view text) : p_(text.data()), end_(p_ + text.size()) {}

  const char* p_;
  const char* end_;
  uint32_t line_ = 1;

  [[noreturn]] void fail(const std::string& what) { throw ParseError("line " + std::to_string(line_) + ": " + what); }

  void skip() {
    while (p_ < end_) {
      char c = *p_;
      if (c == '\n') {
        ++line_;
        ++p_;
      } else if (c == ' ' || c == '\t' || c == '\r' || c == '\0')
        ++p_;
      else if (c == '/' && p_ + 1 < end_ && p_[1] == '/') {
        while (p_ < end_ && *p_ != '\n') ++p_;
      } else if (c == '/' && p_ + 1 < end_ && p_[1] == '*') {
        p_ += 2;
        while (p_ + 1 < end_ && !(p_[0] == '*' && p_[1] == '/')) {
          if (*p_ == '\n') ++line_;
          ++p_;
        }
        p_ += 2;
      } else if (c == '#') {
        while (p_ < end_ && *p_ != '\n') ++p_;
      } else
        break;
    }
  }
  char peek() {
    skip();
    return p_ < end_ ? *p_ : '\0';
  }
  bool accept(char c) {
    if (peek() == c) {
      ++p_;
      return true;
    }
    return false;
  }
  void expect(char c) {
    if (!accept(c)) fail(std::string("expected '") + c + "' near '" + near() + "'");
  }
  std::string near() { return std::string(p_, std::min<size_t>(24, end_ - p_)); }

  // A dotted word: directive or opcode with its qualifiers ("ld.shared::cta.v4.f32", ".reg").
  std::string_view dotted() {
    skip();
    const char* s = p_;
    while (p_ < end_ && (ident_char(*p_) || *p_ == '.' || (*p_ == ':' && p_ + 1 < end_ && p_[1] == ':') ||
                         (*p_ == ':' && p_ > s && p_[-1] == ':')))
      ++p_;
    return {s, size_t(p_ - s)};
  }
  std::string_view ident() {
    skip();
    const char* s = p_;
    if (p_ < end_ && ident_start(*p_))
      while (p_ < end_ && ident_char(*p_)) ++p_;
    if (s == p_) fail("expected a name near '" + near() + "'");
    return {s, size_t(p_ - s)};
  }
  bool accept_word(std::string_view w) {
    skip();
    if (size_t(end_ - p_) >= w.size() && memcmp(p_, w.data(), w.size()) == 0 &&
        (p_ + w.size() == end_ || !ident_char(p_[w.size()]))) {
      p_ += w.size();
      return true;
    }
    return false;
  }
  void skip_to_semicolon() {
    while (p_ < end_ && *p_ != ';') {
      if (*p_ == '\n') ++line_;
      ++p_;
    }
    expect(';');
  }
  void skip_line() {
    while (p_ < end_ && *p_ != '\n') ++p_;
  }

  // --- numbers --------------------------------------------------------------------------------
  struct Number {
    int64_t value;
    uint8_t fp;
  };
  Number primary() {
    skip();
    if (accept('(')) {
      Number n = expression();
      expect(')');
      return n;
    }
    if (*p_ == '-') {
      ++p_;
      Number n = primary();
      return n.fp ? negate(n) : Number{-n.value, 0};
    }
    if (*p_ == '+') {
      ++p_;
      return primary();
    }
    if (*p_ == '~') {
      ++p_;
      Number n = primary();
      return {~n.value, 0};
    }
    if (*p_ == '!') {
      ++p_;
      Number n = primary();
      return {!n.value, 0};
    }
    if (!digit(*p_) && *p_ != '.') fail("expected a number near '" + near() + "'");
    if (p_[0] == '0' && (p_[1] == 'f' || p_[1] == 'F' || p_[1] == 'd' || p_[1] == 'D')) {
      bool dbl = p_[1] == 'd' || p_[1] == 'D';
      p_ += 2;
      uint64_t v = 0;
      int n = 0;
      while (p_ < end_ && isxdigit((unsigned char)*p_) && n < (dbl ? 16 : 8)) {
        v = v * 16 + hex(*p_++);
        ++n;
      }
      return {int64_t(v), uint8_t(dbl ? 64 : 32)};
    }
    const char* q = p_;
    bool is_hex = p_[0] == '0' && (p_[1] == 'x' || p_[1] == 'X');
    if (!is_hex) {
      while (q < end_ && digit(*q)) ++q;
      if (q < end_ && (*q == '.' || *q == 'e' || *q == 'E')) {
        char* e;
        double d = strtod(p_, &e);
        p_ = e;
        int64_t bits;
        memcpy(&bits, &d, 8);
        return {bits, 64};
      }
    }
    uint64_t v = 0;
    if (is_hex) {
      p_ += 2;
      while (p_ < end_ && isxdigit((unsigned char)*p_)) v = v * 16 + hex(*p_++);
    } else if (p_[0] == '0' && (p_[1] == 'b' || p_[1] == 'B')) {
      p_ += 2;
      while (*p_ == '0' || *p_ == '1') v = v * 2 + (*p_++ - '0');
    } else if (p_[0] == '0' && digit(p_[1])) {
      while (digit(*p_)) v = v * 8 + (*p_++ - '0');
    } else
      while (p_ < end_ && digit(*p_)) v = v * 10 + (*p_++ - '0');
    if (p_ < end_ && *p_ == 'U') ++p_;
    return {int64_t(v), 0};
  }
  static Number negate(Number n) {
    n.value ^= n.fp == 64 ? int64_t(1ull << 63) : int64_t(1ull << 31);
    return n;
  }
  static int hex(char c) { return digit(c) ? c - '0' : (c | 32) - 'a' + 10; }
  Number expression() {  // constant expressions: + - * / % << >> & | ^, no precedence subtleties needed
    Number a = primary();
    for (;;) {
      skip();
      char c = *p_;
      if (c == '<' && p_[1] == '<') {
        p_ += 2;
        a.value <<= primary().value;
      } else if (c == '>' && p_[1] == '>') {
        p_ += 2;
        a.value = int64_t(uint64_t(a.value) >> primary().value);
      } else if (c == '+') {
        ++p_;
        a.value += primary().value;
      } else if (c == '-') {
        ++p_;
        a.value -= primary().value;
      } else if (c == '*') {
        ++p_;
        a.value *= primary().value;
      } else if (c == '/') {
        ++p_;
        auto b = primary().value;
        if (b) a.value /= b;
      } else if (c == '%') {
        ++p_;
        auto b = primary().value;
        if (b) a.value %= b;
      } else if (c == '&') {
        ++p_;
        a.value &= primary().value;
      } else if (c == '|') {
        ++p_;
        a.value |= primary().value;
      } else if (c == '^') {
        ++p_;
        a.value ^= primary().value;
      } else
        return a;
    }
  }
  int64_t integer() { return expression().value; }
};

}  // namespace cudasim
