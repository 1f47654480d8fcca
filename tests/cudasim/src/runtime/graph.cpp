// Stream capture and CUDA graphs. graph.h explains them.
#include "graph.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>

#include "runtime.h"

using namespace cudasim::runtime;

extern "C" size_t cudasim_bytes_at(const void* p);  // memory.cpp

struct CUgraph_st {
  std::vector<Node> nodes;
  std::shared_ptr<GraphMemory> memory;
};
struct CUgraphExec_st {
  std::vector<Node> nodes;
  std::vector<std::shared_ptr<GraphMemory>> memory;  // its own, and that of graphs launched during the capture
};

namespace cudasim::runtime {

using Reached = std::map<cudaStream_t, uint64_t>;  // how much of each stream's work precedes

struct Capture {
  unsigned long long id;
  cudaStream_t origin;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  bool invalid = false;
  std::string why;
  std::vector<Node> nodes;
  std::shared_ptr<GraphMemory> memory = std::make_shared<GraphMemory>();
  std::map<cudaStream_t, Reached> streams;  // the participating streams
  std::map<cudaStream_t, uint64_t> work;    // recorded on each
};
struct CapturedEvent {
  unsigned long long capture;
  Reached reached;
};

namespace {

std::recursive_mutex mutex;
std::vector<std::unique_ptr<Capture>>& captures() {
  static auto& all = *new std::vector<std::unique_ptr<Capture>>;
  return all;
}
std::atomic<int> active{0};
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

cudaError_t refuse(Capture& c, cudaError_t error, const std::string& why) {
  if (!c.invalid) {
    c.invalid = true;
    c.why = why;
  }
  return report(error, why);
}

bool forbids_unsafe(const Capture& c) {
  if (thread_mode == cudaStreamCaptureModeRelaxed) return false;
  if (c.thread == std::this_thread::get_id()) return c.mode != cudaStreamCaptureModeRelaxed;
  return thread_mode == cudaStreamCaptureModeGlobal && c.mode == cudaStreamCaptureModeGlobal;
}

cudaError_t invalidated(const Capture& c) {
  return report(cudaErrorStreamCaptureInvalidated, "the capture was ended by an earlier error: " + c.why);
}

}  // namespace

GraphMemory::~GraphMemory() {
  for (void* p : blocks) release_from_graph(p);
}

bool any_capture() { return active.load(std::memory_order_relaxed) > 0; }

Capture* capture_of(cudaStream_t stream) {
  if (!any_capture()) return nullptr;
  const std::lock_guard lock(mutex);
  for (auto& c : captures())
    if (c->streams.count(stream)) return c.get();
  return nullptr;
}

bool captured(cudaStream_t stream, cudaGraphNodeType type, std::function<cudaError_t()> run, cudaError_t* error) {
  if (!any_capture()) return false;
  const std::lock_guard lock(mutex);
  Capture* c = capture_of(stream);
  if (!c) {
    if (is_legacy(stream))
      for (auto& other : captures())
        for (auto& [s, reached] : other->streams)
          if (is_blocking(s)) {
            *error = refuse(*other, cudaErrorStreamCaptureImplicit,
                            "work on the legacy stream, which waits for the capturing stream");
            return true;
          }
    return false;
  }
  if (c->invalid)
    *error = invalidated(*c);
  else {
    c->nodes.push_back({type, std::move(run)});
    c->streams[stream][stream] = ++c->work[stream];
    *error = cudaSuccess;
  }
  return true;
}

cudaError_t check_unsafe(const char* call) {
  if (!any_capture()) return cudaSuccess;
  const std::lock_guard lock(mutex);
  cudaError_t error = cudaSuccess;
  for (auto& c : captures())
    if (forbids_unsafe(*c))
      error = refuse(*c, cudaErrorStreamCaptureUnsupported, std::string(call) + " during a stream capture");
  return error;
}

cudaError_t check_wait(cudaStream_t stream, const char* call) {
  if (!any_capture()) return cudaSuccess;
  const std::lock_guard lock(mutex);
  if (Capture* c = capture_of(stream))
    return refuse(*c, cudaErrorStreamCaptureUnsupported, std::string(call) + " of a capturing stream");
  return is_legacy(stream) ? check_legacy(call) : check_unsafe(call);
}

cudaError_t check_wait_device(const char* call) {
  if (!any_capture()) return cudaSuccess;
  const std::lock_guard lock(mutex);
  for (auto& c : captures())
    refuse(*c, cudaErrorStreamCaptureUnsupported, std::string(call) + " during a stream capture");
  return cudaErrorStreamCaptureUnsupported;
}

cudaError_t check_legacy(const char* call) {
  if (!any_capture()) return cudaSuccess;
  const std::lock_guard lock(mutex);
  for (auto& c : captures())
    for (auto& [s, reached] : c->streams)
      if (is_blocking(s))
        return refuse(*c, cudaErrorStreamCaptureImplicit,
                      std::string(call) + " uses the legacy stream, which waits for the capturing stream");
  return check_unsafe(call);
}

cudaError_t invalidate(Capture* c, cudaError_t error, const std::string& why) {
  const std::lock_guard lock(mutex);
  return refuse(*c, error, why);
}

void keep(Capture* c, void* block) {
  if (!block) return;
  const std::lock_guard lock(mutex);
  c->memory->blocks.push_back(block);
  share_with_graph(block);
}

std::shared_ptr<CapturedEvent> record_event(cudaStream_t stream) {
  const std::lock_guard lock(mutex);
  Capture* c = capture_of(stream);
  return c ? std::make_shared<CapturedEvent>(CapturedEvent{c->id, c->streams[stream]}) : nullptr;
}

cudaError_t wait_event(cudaStream_t stream, const std::shared_ptr<CapturedEvent>& event, bool recorded_outside) {
  if (!any_capture()) return cudaSuccess;
  const std::lock_guard lock(mutex);
  Capture* c = capture_of(stream);
  if (!event) {
    if (c && recorded_outside)
      return refuse(*c, cudaErrorStreamCaptureIsolation,
                    "a capturing stream is to wait for an event recorded outside of the capture");
    return cudaSuccess;
  }
  for (auto& other : captures()) {
    if (other->id != event->capture) continue;
    if (c && c != other.get())
      return refuse(*c, cudaErrorStreamCaptureMerge, "a capturing stream is to wait for an event of another capture");
    Reached& mine = other->streams[stream];
    for (auto& [s, n] : event->reached) mine[s] = std::max(mine[s], n);
    return cudaSuccess;
  }
  return report(cudaErrorCapturedEvent, "the event was last recorded in a capture that has ended");
}

}  // namespace cudasim::runtime

// ---- capture
CUDASIM_API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  const std::lock_guard lock(mutex);
  if (is_legacy(stream)) return report(cudaErrorStreamCaptureUnsupported, "the legacy stream cannot be captured");
  if (capture_of(stream)) return report(cudaErrorIllegalState, "the stream is capturing already");
  static unsigned long long next = 1;
  auto c = std::make_unique<Capture>();
  c->id = next++;
  c->origin = stream;
  c->mode = mode;
  c->thread = std::this_thread::get_id();
  c->streams[stream];
  captures().push_back(std::move(c));
  ++active;
  return cudaSuccess;
}

CUDASIM_API cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* out) {
  std::unique_ptr<Capture> c;
  {
    const std::lock_guard lock(mutex);
    if (out) *out = nullptr;
    Capture* found = capture_of(stream);
    if (!found) return report(cudaErrorIllegalState, "the stream is not capturing");
    if (found->origin != stream)
      return refuse(*found, cudaErrorStreamCaptureUnmatched, "the capture was not begun on this stream");
    if (found->mode != cudaStreamCaptureModeRelaxed && found->thread != std::this_thread::get_id())
      return refuse(*found, cudaErrorStreamCaptureWrongThread, "the capture was begun by another thread");
    auto& all = captures();
    const auto at = std::find_if(all.begin(), all.end(), [&](auto& p) { return p.get() == found; });
    c = std::move(*at);
    all.erase(at);
    --active;
  }
  if (c->invalid) return invalidated(*c);
  Reached& joined = c->streams[stream];
  for (auto& [s, n] : c->work)
    if (s != stream && joined[s] < n)
      return report(cudaErrorStreamCaptureUnjoined,
                    "another stream's captured work was not joined by an event that the first stream waits for");
  // Nothing has been computed yet.
  for (void* p : c->memory->blocks) std::memset(p, 0xff, cudasim_bytes_at(p));
  if (out) *out = new CUgraph_st{std::move(c->nodes), c->memory};
  return cudaSuccess;
}

CUDASIM_API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const std::lock_guard lock(mutex);
  const Capture* c = capture_of(stream);
  *status = !c           ? cudaStreamCaptureStatusNone
            : c->invalid ? cudaStreamCaptureStatusInvalidated
                         : cudaStreamCaptureStatusActive;
  if (!c && is_legacy(stream) && any_capture())
    for (auto& other : captures())
      for (auto& [s, reached] : other->streams)
        if (is_blocking(s)) return report(cudaErrorStreamCaptureImplicit);
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                                 unsigned long long* id, cudaGraph_t* graph,
                                                 const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges,
                                                 size_t* count) {
  const std::lock_guard lock(mutex);
  const Capture* c = capture_of(stream);
  if (status)
    *status = !c           ? cudaStreamCaptureStatusNone
              : c->invalid ? cudaStreamCaptureStatusInvalidated
                           : cudaStreamCaptureStatusActive;
  if (id) *id = c ? c->id : 0;
  if (graph) *graph = nullptr;  // the graph is made when the capture ends
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}

// ---- graphs
CUDASIM_API cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  if (!graph) return report(cudaErrorInvalidValue);
  delete graph;
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  if (!graph || !count) return report(cudaErrorInvalidValue);
  if (nodes)
    for (size_t i = 0; i < *count; ++i)
      nodes[i] = i < graph->nodes.size() ? reinterpret_cast<cudaGraphNode_t>(&graph->nodes[i]) : nullptr;
  *count = graph->nodes.size();
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaGraphNodeGetType(cudaGraphNode_t node, cudaGraphNodeType* type) {
  if (!node || !type) return report(cudaErrorInvalidValue);
  *type = reinterpret_cast<const Node*>(node)->type;
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long) {
  if (!out || !graph) return report(cudaErrorInvalidValue);
  *out = new CUgraphExec_st{graph->nodes, {graph->memory}};
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* out, cudaGraph_t graph,
                                                      unsigned long long flags) {
  return cudaGraphInstantiate(out, graph, flags);
}
CUDASIM_API cudaError_t cudaGraphUpload(cudaGraphExec_t exec, cudaStream_t) {
  return exec ? cudaSuccess : report(cudaErrorInvalidValue);
}
CUDASIM_API cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  if (!exec) return report(cudaErrorInvalidValue);
  const auto run = [nodes = exec->nodes, memory = exec->memory] {
    finish_launches();
    for (const Node& node : nodes) {
      if (node.type != cudaGraphNodeTypeKernel) finish_launches();
      if (const cudaError_t error = node.run()) return error;
    }
    finish_launches();
    return cudaSuccess;
  };
  cudaError_t error;
  if (captured(stream, cudaGraphNodeTypeGraph, run, &error)) return error;
  return run();
}
CUDASIM_API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  if (!exec) return report(cudaErrorInvalidValue);
  delete exec;
  return cudaSuccess;
}

// ---- for libcudasim_torch
// Records run(data) on a capturing stream; drop(data) when the last graph that holds it goes.
extern "C" __attribute__((visibility("default"))) int cudasim_record(cudaStream_t stream, int (*run)(void*), void* data,
                                                                     void (*drop)(void*)) {
  const std::shared_ptr<void> held(data, drop);
  cudaError_t error = cudaErrorIllegalState;
  captured(stream, cudaGraphNodeTypeHost, [run, held] { return static_cast<cudaError_t>(run(held.get())); }, &error);
  return error;
}
// Recorded work calls this to report an error.
extern "C" __attribute__((visibility("default"))) void cudasim_fail(const char* why) {
  report_kernel_fault(cudaErrorIllegalAddress, why);
}
// Before work that is no simulated launch is submitted to `stream`. Returns whether the stream is capturing.
extern "C" __attribute__((visibility("default"))) int cudasim_begin_work(cudaStream_t stream) {
  if (capture_of(stream)) return 1;
  finish_launches();
  return 0;
}
extern "C" __attribute__((visibility("default"))) void cudasim_refuse_capture(cudaStream_t stream, const char* why) {
  if (Capture* c = capture_of(stream)) invalidate(c, cudaErrorStreamCaptureUnsupported, why);
}
