// Streams and events. All work is finished (or recorded: graph.h) before the call that submits it returns, so a stream
// is only a name. Events measure host time.
#include <atomic>
#include <chrono>

#include "graph.h"
#include "runtime.h"

using namespace cudasim::runtime;

struct CUstream_st {
  unsigned flags = 0;
  int priority = 0;
  unsigned long long id = 0;
};
struct CUevent_st {
  unsigned flags = 0;
  bool recorded = false;
  std::chrono::steady_clock::time_point time;
  std::shared_ptr<CapturedEvent> captured;  // if last recorded in a capture
};

namespace {

bool is_builtin(cudaStream_t stream) {
  return stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
}

cudaError_t create_stream(cudaStream_t* out, unsigned flags, int priority) {
  if (const cudaError_t error = context_error()) return error;
  if (!out) return report(cudaErrorInvalidValue);
  static std::atomic<unsigned long long> next_id{16};
  *out = new CUstream_st{flags, priority, next_id++};
  return cudaSuccess;
}

cudaError_t create_event(cudaEvent_t* out, unsigned flags) {
  if (const cudaError_t error = context_error()) return error;
  if (!out) return report(cudaErrorInvalidValue);
  *out = new CUevent_st{flags, false, {}, {}};
  return cudaSuccess;
}

cudaError_t record_now(cudaEvent_t e) {
  e->captured.reset();
  e->recorded = true;
  e->time = std::chrono::steady_clock::now();
  return cudaSuccess;
}

// For calls that wait for an event.
cudaError_t check_event(cudaEvent_t e, const char* call) {
  if (!e) return report(cudaErrorInvalidResourceHandle);
  if (e->captured) return report(cudaErrorCapturedEvent, std::string(call) + " of an event recorded in a capture");
  return check_unsafe(call);
}

}  // namespace

namespace cudasim::runtime {
bool is_legacy(cudaStream_t s) { return s == nullptr || s == cudaStreamLegacy; }
bool is_blocking(cudaStream_t s) { return is_builtin(s) || !(s->flags & cudaStreamNonBlocking); }
}  // namespace cudasim::runtime

CUDASIM_API cudaError_t cudaStreamCreate(cudaStream_t* s) { return create_stream(s, 0, 0); }
CUDASIM_API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned flags) {
  return create_stream(s, flags, 0);
}
CUDASIM_API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned flags, int priority) {
  return create_stream(s, flags, priority);
}
CUDASIM_API cudaError_t cudaStreamDestroy(cudaStream_t s) {
  if (is_builtin(s)) return report(cudaErrorInvalidResourceHandle);
  delete s;
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  if (const cudaError_t error = check_wait(s, "cudaStreamSynchronize")) return error;
  return take_pending_fault();
}
CUDASIM_API cudaError_t cudaStreamQuery(cudaStream_t s) {
  if (const cudaError_t error = check_wait(s, "cudaStreamQuery")) return error;
  return take_pending_fault();
}
CUDASIM_API cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t event, unsigned flags) {
  if (!event) return report(cudaErrorInvalidResourceHandle);
  return wait_event(s, event->captured, event->recorded && !(flags & cudaEventWaitExternal));
}
CUDASIM_API cudaError_t cudaStreamGetPriority(cudaStream_t s, int* priority) {
  *priority = is_builtin(s) ? 0 : s->priority;
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaStreamGetFlags(cudaStream_t s, unsigned* flags) {
  *flags = is_builtin(s) ? 0 : s->flags;
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaStreamGetId(cudaStream_t s, unsigned long long* id) {
  *id = is_builtin(s) ? reinterpret_cast<uintptr_t>(s) : s->id;
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaStreamGetDevice(cudaStream_t, int* device) {
  *device = 0;
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaStreamCopyAttributes(cudaStream_t, cudaStream_t) { return cudaSuccess; }
CUDASIM_API cudaError_t cudaStreamSetAttribute(cudaStream_t, cudaStreamAttrID, const cudaStreamAttrValue*) {
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaStreamGetAttribute(cudaStream_t, cudaStreamAttrID, cudaStreamAttrValue* value) {
  *value = {};
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaStreamAttachMemAsync(cudaStream_t, void*, size_t, unsigned) { return cudaSuccess; }
CUDASIM_API cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t callback, void* data, unsigned) {
  if (Capture* c = capture_of(s))
    return invalidate(c, cudaErrorStreamCaptureUnsupported, "cudaStreamAddCallback of a capturing stream");
  callback(s, cudaSuccess, data);
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t function, void* data) {
  const auto run = [=] {
    finish_launches();
    function(data);
    return cudaSuccess;
  };
  cudaError_t error;
  return captured(s, cudaGraphNodeTypeHost, run, &error) ? error : run();
}

// ---- events
CUDASIM_API cudaError_t cudaEventCreate(cudaEvent_t* e) { return create_event(e, 0); }
CUDASIM_API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned flags) { return create_event(e, flags); }
CUDASIM_API cudaError_t cudaEventDestroy(cudaEvent_t e) {
  if (!e) return report(cudaErrorInvalidResourceHandle);
  delete e;
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) {
  if (const cudaError_t error = context_error()) return error;
  if (!e) return report(cudaErrorInvalidResourceHandle);
  if (!any_capture()) return record_now(e);
  if (capture_of(s) && !(flags & cudaEventRecordExternal)) {
    e->recorded = false;
    e->captured = record_event(s);
    return cudaSuccess;
  }
  cudaError_t error;
  return captured(s, cudaGraphNodeTypeEventRecord, [e] { return record_now(e); }, &error) ? error : record_now(e);
}
CUDASIM_API cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return cudaEventRecordWithFlags(e, s, 0); }
CUDASIM_API cudaError_t cudaEventQuery(cudaEvent_t e) {
  if (const cudaError_t error = check_event(e, "cudaEventQuery")) return error;
  return take_pending_fault();
}
CUDASIM_API cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  if (const cudaError_t error = check_event(e, "cudaEventSynchronize")) return error;
  return take_pending_fault();
}
CUDASIM_API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
  if (!start || !end || !start->recorded || !end->recorded || (start->flags | end->flags) & cudaEventDisableTiming)
    return report(cudaErrorInvalidResourceHandle);
  *ms = std::chrono::duration<float, std::milli>(end->time - start->time).count();
  return cudaSuccess;
}
