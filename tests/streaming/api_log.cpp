// Preloaded into a program that uses CUDA: writes every call that copies, or that the host waits in, as a line of JSON
// to the file that API_LOG names, between the marks that the program sets.
#include <dlfcn.h>

#include <atomic>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <mutex>

using Stream = void*;  // a cudaStream_t or cudaEvent_t
using Error = int;     // a cudaError_t

namespace {

std::atomic<bool> enabled{false};

void note(const char* call, Stream stream) {
  static std::mutex mutex;
  static std::FILE* file = std::fopen(std::getenv("API_LOG"), "w");
  if (!enabled) return;
  const std::lock_guard lock(mutex);
  std::fprintf(file, "{\"call\": \"%s\", \"stream\": %zu}\n", call, reinterpret_cast<std::size_t>(stream));
  std::fflush(file);
}

}  // namespace

// What the program calls, by ctypes, where the log begins and ends.
extern "C" void api_log_enable(int on) { enabled = on != 0; }

// The name as the runtime exports it, the parameters, the arguments, and the stream that the call is on.
#define LOGGED(name, parameters, arguments, stream)                                          \
  extern "C" Error name parameters {                                                         \
    note(#name, stream);                                                                     \
    static const auto next = reinterpret_cast<Error(*) parameters>(dlsym(RTLD_NEXT, #name)); \
    return next arguments;                                                                   \
  }

LOGGED(cudaMemcpy, (void* to, const void* from, std::size_t size, int kind), (to, from, size, kind), nullptr)
LOGGED(cudaMemcpyAsync, (void* to, const void* from, std::size_t size, int kind, Stream stream),
       (to, from, size, kind, stream), stream)
LOGGED(cudaMemcpy2DAsync,
       (void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch, std::size_t width, std::size_t height,
        int kind, Stream stream),
       (to, to_pitch, from, from_pitch, width, height, kind, stream), stream)
LOGGED(cudaMemset, (void* to, int value, std::size_t size), (to, value, size), nullptr)
LOGGED(cudaDeviceSynchronize, (), (), nullptr)
LOGGED(cudaStreamSynchronize, (Stream stream), (stream), stream)
LOGGED(cudaEventSynchronize, (Stream event), (event), nullptr)
LOGGED(cudaHostRegister, (void* memory, std::size_t size, unsigned flags), (memory, size, flags), nullptr)
LOGGED(cudaMalloc, (void** memory, std::size_t size), (memory, size), nullptr)
LOGGED(cudaFree, (void* memory), (memory), nullptr)
LOGGED(cudaHostAlloc, (void** memory, std::size_t size, unsigned flags), (memory, size, flags), nullptr)
LOGGED(cudaEventRecord, (Stream event, Stream stream), (event, stream), stream)
LOGGED(cudaEventRecordWithFlags, (Stream event, Stream stream, unsigned flags), (event, stream, flags), stream)
LOGGED(cudaStreamWaitEvent, (Stream stream, Stream event, unsigned flags), (stream, event, flags), stream)
