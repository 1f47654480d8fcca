// Stream capture and CUDA graphs. Work on a capturing stream is not done but recorded, as a closure that
// holds its arguments by value; launching the graph runs the closures in the order in which they came.
#pragma once
#include <cuda_runtime_api.h>

#include <functional>
#include <memory>
#include <vector>

namespace cudasim::runtime {

struct Node {
  cudaGraphNodeType type;
  std::function<cudaError_t()> run;
};

// Memory allocated during a capture. It lives as long as the graph (and whatever was instantiated from
// it), even if the program frees it before.
struct GraphMemory {
  std::vector<void*> blocks;
  ~GraphMemory();
};

struct Capture;
// The capture that `stream` takes part in, or null.
Capture* capture_of(cudaStream_t stream);
bool any_capture();

// For work given to a stream: true if there is nothing to do now, because the work has been recorded or
// refused; *error then is the call's result. False: do it.
bool captured(cudaStream_t stream, cudaGraphNodeType type, std::function<cudaError_t()> run, cudaError_t* error);
// For calls that would wait for the device or may do so ("potentially unsafe" in CUDA's documentation):
// an error, and the end of the capture, while a capture forbids them.
cudaError_t check_unsafe(const char* call);
// For calls that wait for `stream` or (null) for the device: never possible while it captures.
cudaError_t check_wait(cudaStream_t stream, const char* call);
cudaError_t check_wait_device(const char* call);
// For a synchronous call, which works on the legacy stream.
cudaError_t check_legacy(const char* call);
// Ends the capture with an error that tells why.
cudaError_t invalidate(Capture*, cudaError_t error, const std::string& why);
// Memory allocated on a capturing stream.
void keep(Capture*, void* block);

// Events (stream.cpp) remember the place in a capture at which they were recorded.
struct CapturedEvent;
std::shared_ptr<CapturedEvent> record_event(cudaStream_t stream);  // null: not capturing
cudaError_t wait_event(cudaStream_t stream, const std::shared_ptr<CapturedEvent>& event, bool recorded_outside);

bool is_legacy(cudaStream_t);    // stream.cpp
bool is_blocking(cudaStream_t);  // waits for the legacy stream, and it for this

}  // namespace cudasim::runtime
