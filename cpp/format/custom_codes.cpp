#include "cpp/format/custom_codes.h"

#include <atomic>
#include <cstring>
#include <mutex>
#include <new>

#include "cpp/format/code_tables.h"

namespace qlora {
namespace {

struct CustomCode {
  CodeTable table;
  IntCodeTable ints;
  Int8CodeTable bytes;
  Bf16CodeTable bf16;
  LargeCodes large;

  explicit CustomCode(const float (&values)[kCodes])
      : table("custom", false, values), ints(table), bytes(table), bf16(table), large(table) {}
};

// Entries are appended and never change. An entry is written before `count` says that it is there.
const CustomCode* codes[kMaxCustomCodes];
std::atomic<int> count{0};
std::mutex appending;

bool has_values(const CodeTable& table, const float (&values)[kCodes]) {
  return std::memcmp(table.value, values, sizeof values) == 0;
}

bool find(const float (&values)[kCodes], int first, int end, Code* code) {
  for (int i = first; i < end; ++i) {
    if (!has_values(codes[i]->table, values)) continue;
    *code = static_cast<Code>(kCodeTableCount + i);
    return true;
  }
  return false;
}

const CustomCode& entry(Code code) { return *codes[static_cast<int>(code) - kCodeTableCount]; }

}  // namespace

bool intern_code(const float (&values)[kCodes], Code* code) {
  for (const CodeTable& table : kCodeTables) {
    if (!has_values(table, values)) continue;
    *code = static_cast<Code>(&table - kCodeTables);
    return true;
  }
  const int seen = count.load(std::memory_order_acquire);
  if (find(values, 0, seen, code)) return true;
  const std::lock_guard<std::mutex> lock(appending);
  const int end = count.load(std::memory_order_relaxed);
  if (find(values, seen, end, code)) return true;
  if (end == kMaxCustomCodes) return false;
  codes[end] = new (std::nothrow) CustomCode(values);
  if (!codes[end]) return false;
  count.store(end + 1, std::memory_order_release);
  *code = static_cast<Code>(kCodeTableCount + end);
  return true;
}

const CodeTable& custom_table(Code code) { return entry(code).table; }
const IntCodeTable& custom_int_codes(Code code) { return entry(code).ints; }
const Int8CodeTable& custom_int8_codes(Code code) { return entry(code).bytes; }
const Bf16CodeTable& custom_bf16_codes(Code code) { return entry(code).bf16; }
const LargeCodes& custom_large_codes(Code code) { return entry(code).large; }

}  // namespace qlora
