#include "cpp/cpu/shared/scratch.h"

#include <memory>
#include <new>

namespace qlora::cpu {
namespace {

constexpr std::align_val_t kAlignment{64};

struct Free {
  void operator()(char* p) const { ::operator delete(p, kAlignment); }
};
struct Buffer {
  std::unique_ptr<char, Free> data;
  int64_t bytes = 0;
};

}  // namespace

void* scratch(ScratchUse use, int64_t bytes) {
  static thread_local Buffer buffers[4];
  Buffer& buffer = buffers[static_cast<int>(use)];
  if (bytes > buffer.bytes) {
    buffer.data.reset();
    buffer.bytes = 0;
    buffer.data.reset(static_cast<char*>(::operator new(static_cast<size_t>(bytes), kAlignment)));
    buffer.bytes = bytes;
  }
  return buffer.data.get();
}

}  // namespace qlora::cpu
