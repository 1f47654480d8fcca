// Stream capture and CUDA graphs. Work on a capturing stream is recorded instead of executed, as a closure that holds
// its arguments by value. Launching the graph runs the closures in the order of recording.
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

// Memory allocated during a capture. It lives as long as the graph and its instances, even if the program frees it
// earlier.
struct GraphMemory {
  std::vector<void*> blocks;
  ~GraphMemory();
};

struct Capture;
// The capture that `stream` takes part in, or null.
Capture* capture_of(cudaStream_t stream);
bool any_capture();

// For work submitted to a stream. Returns true if nothing remains to be done, because the work was recorded or
// rejected; *error is then the call's result. If it returns false, the caller executes the work.
bool captured(cudaStream_t stream, cudaGraphNodeType type, std::function<cudaError_t()> run, cudaError_t* error);
// For calls that wait for the device, or might ("potentially unsafe" in CUDA's documentation). While a capture forbids
// them, they return an error and end the capture.
cudaError_t check_unsafe(const char* call);
// For calls that wait for `stream` or, if it is null, for the device. They always fail during a capture.
cudaError_t check_wait(cudaStream_t stream, const char* call);
cudaError_t check_wait_device(const char* call);
// For a synchronous call, which works on the legacy stream.
cudaError_t check_legacy(const char* call);
// Ends the capture with an error that states the reason.
cudaError_t invalidate(Capture*, cudaError_t error, const std::string& why);
// Memory allocated on a capturing stream.
void keep(Capture*, void* block);

// Events (stream.cpp) remember the place in a capture at which they were recorded.
struct CapturedEvent;
std::shared_ptr<CapturedEvent> record_event(cudaStream_t stream);  // null: not capturing
cudaError_t wait_event(cudaStream_t stream, const std::shared_ptr<CapturedEvent>& event, bool recorded_outside);

bool is_legacy(cudaStream_t);    // stream.cpp
bool is_blocking(cudaStream_t);  // waits for the legacy stream, which waits for it, too

}  // namespace cudasim::runtime
