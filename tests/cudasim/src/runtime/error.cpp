// Error codes: each thread's last error, pending faults of kernels, names and texts.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string_view>

#include "runtime.h"

namespace cudasim::runtime {
namespace {

thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaError_t detailed_error = cudaSuccess;  // which error the detail is about
thread_local const char* detail_text = nullptr;

std::mutex pending_mutex;
cudaError_t pending = cudaSuccess;
std::string pending_detail;

struct ErrorText {
  cudaError_t code;
  const char *name, *text;
};
#define E(code, text) {code, #code, text}
constexpr ErrorText kErrors[] = {
    E(cudaSuccess, "no error"),
    E(cudaErrorInvalidValue, "invalid argument"),
    E(cudaErrorMemoryAllocation, "out of memory"),
    E(cudaErrorInitializationError, "initialization error"),
    E(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    E(cudaErrorInvalidPitchValue, "invalid pitch argument"),
    E(cudaErrorInvalidSymbol, "invalid device symbol"),
    E(cudaErrorInvalidDevicePointer, "invalid device pointer"),
    E(cudaErrorInvalidMemcpyDirection, "invalid copy direction for memcpy"),
    E(cudaErrorInsufficientDriver, "CUDA driver version is insufficient for CUDA runtime version"),
    E(cudaErrorMissingConfiguration, "__global__ function call is not configured"),
    E(cudaErrorInvalidDeviceFunction, "invalid device function"),
    E(cudaErrorNoDevice, "no CUDA-capable device is detected"),
    E(cudaErrorInvalidDevice, "invalid device ordinal"),
    E(cudaErrorInvalidKernelImage, "device kernel image is invalid"),
    E(cudaErrorNoKernelImageForDevice, "no kernel image is available for execution on the device"),
    E(cudaErrorInvalidPtx, "a PTX JIT compilation failed"),
    E(cudaErrorInvalidResourceHandle, "invalid resource handle"),
    E(cudaErrorSymbolNotFound, "named symbol not found"),
    E(cudaErrorNotReady, "device not ready"),
    E(cudaErrorIllegalAddress, "an illegal memory access was encountered"),
    E(cudaErrorLaunchOutOfResources, "too many resources requested for launch"),
    E(cudaErrorLaunchTimeout, "the launch timed out and was terminated"),
    E(cudaErrorPeerAccessAlreadyEnabled, "peer access is already enabled"),
    E(cudaErrorPeerAccessNotEnabled, "peer access has not been enabled"),
    E(cudaErrorPeerAccessUnsupported, "peer access is not supported between these two devices"),
    E(cudaErrorAssert, "device-side assert triggered"),
    E(cudaErrorHostMemoryAlreadyRegistered, "part or all of the requested memory range is already mapped"),
    E(cudaErrorHostMemoryNotRegistered, "pointer does not correspond to a registered memory region"),
    E(cudaErrorIllegalInstruction, "an illegal instruction was encountered"),
    E(cudaErrorMisalignedAddress, "misaligned address"),
    E(cudaErrorLaunchFailure, "unspecified launch failure"),
    E(cudaErrorCooperativeLaunchTooLarge, "too many blocks in cooperative launch"),
    E(cudaErrorNotPermitted, "operation not permitted"),
    E(cudaErrorNotSupported, "operation not supported"),
    E(cudaErrorIllegalState, "the operation cannot be performed in the present state"),
    E(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing"),
    E(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture"),
    E(cudaErrorStreamCaptureMerge, "operation would result in a merge of separate capture sequences"),
    E(cudaErrorStreamCaptureUnmatched, "capture was not ended in the same stream as it began"),
    E(cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work"),
    E(cudaErrorStreamCaptureIsolation, "dependency created on uncaptured work in another stream"),
    E(cudaErrorStreamCaptureImplicit, "operation would make the legacy stream depend on a capturing blocking stream"),
    E(cudaErrorCapturedEvent, "operation not permitted on an event last recorded in a capturing stream"),
    E(cudaErrorStreamCaptureWrongThread, "attempt to terminate a thread-local capture sequence from another thread"),
    E(cudaErrorInvalidClusterSize, "invalid cluster size"),
    E(cudaErrorUnknown, "unknown error"),
};
#undef E

// cudaGetErrorString hands out pointers that live for ever.
const char* intern(const std::string& text) {
  static std::mutex mutex;
  static std::map<std::string, bool>& texts = *new std::map<std::string, bool>;
  const std::lock_guard lock(mutex);
  return texts.emplace(text, true).first->first.c_str();
}

const ErrorText* lookup(cudaError_t error) {
  for (const ErrorText& e : kErrors)
    if (e.code == error) return &e;
  return nullptr;
}

void print(const char* format, va_list args) {
  char buffer[4096];
  int length = std::snprintf(buffer, sizeof buffer, "cudasim: ");
  length += std::vsnprintf(buffer + length, sizeof buffer - length - 1, format, args);
  length = std::min<int>(length, sizeof buffer - 2);
  buffer[length] = '\n';
  std::fwrite(buffer, 1, length + 1, stderr);
}

bool enabled(const char* variable) {
  const char* value = std::getenv(variable);
  return value && *value && std::strcmp(value, "0") != 0;
}

// Whether a card's context ends with this fault, and the user asked for that.
bool ends_context(cudaError_t error) {
  static const bool sticky = enabled("CUDASIM_STICKY");
  return sticky && (error == cudaErrorIllegalAddress || error == cudaErrorMisalignedAddress ||
                    error == cudaErrorLaunchFailure || error == cudaErrorLaunchTimeout || error == cudaErrorAssert);
}

}  // namespace

cudaError_t report(cudaError_t error) {
  if (error != cudaSuccess && error != cudaErrorNotReady) last_error = error;
  return error;
}

cudaError_t report(cudaError_t error, const std::string& detail) {
  detailed_error = error;
  detail_text = intern(detail);
  log("error: %s", detail.c_str());
  return report(error);
}

cudaError_t report_kernel_fault(cudaError_t error, const std::string& detail) {
  complain("%s", detail.c_str());
  {
    const std::lock_guard lock(pending_mutex);
    pending = error;
    pending_detail = detail;
  }
  return report(error, detail);
}

cudaError_t take_pending_fault() {
  finish_launches();
  std::string detail;
  cudaError_t error;
  {
    const std::lock_guard lock(pending_mutex);
    if (pending == cudaSuccess) return cudaSuccess;
    error = pending;
    if (!ends_context(pending)) pending = cudaSuccess;
    detail = pending_detail;
  }
  return report(error, detail);
}

cudaError_t context_error() {
  {
    const std::lock_guard lock(pending_mutex);
    if (!ends_context(pending)) return cudaSuccess;
  }
  return take_pending_fault();
}

bool logging() {
  static const bool on = enabled("CUDASIM_LOG");
  return on;
}

void log(const char* format, ...) {
  if (!logging()) return;
  va_list args;
  va_start(args, format);
  print(format, args);
  va_end(args);
}

void complain(const char* format, ...) {
  va_list args;
  va_start(args, format);
  print(format, args);
  va_end(args);
}

}  // namespace cudasim::runtime

using namespace cudasim::runtime;

extern "C" __attribute__((visibility("default"))) int cudasim_context_error() { return context_error(); }

CUDASIM_API cudaError_t cudaGetLastError() {
  if (const cudaError_t error = context_error()) return error;
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  if (error != cudaSuccess) {
    const std::lock_guard lock(pending_mutex);
    if (pending == error) pending = cudaSuccess;
  }
  return error;
}

CUDASIM_API cudaError_t cudaPeekAtLastError() {
  const cudaError_t error = context_error();
  return error ? error : last_error;
}

CUDASIM_API const char* cudaGetErrorName(cudaError_t error) {
  const ErrorText* e = lookup(error);
  return e ? e->name : "unrecognized error code";
}

CUDASIM_API const char* cudaGetErrorString(cudaError_t error) {
  const ErrorText* e = lookup(error);
  const char* text = e ? e->text : "unrecognized error code";
  if (error == cudaSuccess || error != detailed_error || !detail_text) return text;
  return intern(std::string(text) + " [cudasim: " + detail_text + "]");
}
