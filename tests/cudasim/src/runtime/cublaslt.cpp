// The part of cuBLASLt that is simulated: cublasLtMatmul with real types, bias and activation epilogues.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "gemm.h"

using namespace cudasim::blas;

#define API extern "C" __attribute__((visibility("default")))

namespace {

// These lie in the opaque structures of the real header, whose sizes they must not exceed.
struct Layout {
  int32_t type, order;  // order: 0 by columns, 1 by rows
  uint64_t rows, cols;
  int64_t ld;
  int32_t batch;
  int64_t batch_stride;
};
static_assert(sizeof(Layout) <= 64);

struct Description {
  int32_t compute, scale_type, pointer_mode, op_a, op_b, op_c, bias_type;
  uint32_t epilogue;
  const void* bias;
  int64_t bias_stride;
  const void *scale_a, *scale_b, *scale_c, *scale_d;
  int32_t scale_modes[4];  // of A, B, C, D; 0: one number per matrix
};
static_assert(sizeof(Description) <= 256);

struct Preference {
  uint64_t data[8];
};

enum PointerMode { host, device_scalar, device_vector, alpha_vector_beta_zero, alpha_vector_beta_host };

constexpr Layout initial_layout(int type, uint64_t rows, uint64_t cols, int64_t ld) {
  return {.type = type, .order = 0, .rows = rows, .cols = cols, .ld = ld, .batch = 1, .batch_stride = 0};
}
constexpr Description initial_description(int compute, int scale_type) {
  Description d{};
  d.compute = compute;
  d.scale_type = scale_type;
  d.bias_type = -1;
  d.epilogue = epilogue_default;
  return d;
}

// A field by its attribute number.
struct Field {
  void* data;
  size_t size;
};
template <class T>
Field field(T& member) {
  return {&member, sizeof member};
}

Field find(Layout& l, int attribute) {
  switch (attribute) {
    case 0:
      return field(l.type);
    case 1:
      return field(l.order);
    case 2:
      return field(l.rows);
    case 3:
      return field(l.cols);
    case 4:
      return field(l.ld);
    case 5:
      return field(l.batch);
    case 6:
      return field(l.batch_stride);
    default:
      return {};
  }
}
Field find(Description& d, int attribute) {
  switch (attribute) {
    case 0:
      return field(d.compute);
    case 1:
      return field(d.scale_type);
    case 2:
      return field(d.pointer_mode);
    case 3:
      return field(d.op_a);
    case 4:
      return field(d.op_b);
    case 5:
      return field(d.op_c);
    case 7:
      return field(d.epilogue);
    case 8:
      return field(d.bias);
    case 10:
      return field(d.bias_stride);
    case 17:
      return field(d.scale_a);
    case 18:
      return field(d.scale_b);
    case 19:
      return field(d.scale_c);
    case 20:
      return field(d.scale_d);
    case 26:
      return field(d.bias_type);
    case 31:
    case 32:
    case 33:
    case 34:
      return field(d.scale_modes[attribute - 31]);
    default:
      return {};
  }
}

template <class T>
int set(T* object, int attribute, const void* value, size_t size) {
  if (!object || !value) return invalid_value;
  const Field f = find(*object, attribute);
  // Attributes without a field (the number of SMs to use, for example) do not change the result.
  if (f.data) std::memcpy(f.data, value, std::min(size, f.size));
  return success;
}
template <class T>
int get(T* object, int attribute, void* value, size_t size, size_t* written) {
  if (!object) return invalid_value;
  const Field f = find(*object, attribute);
  if (!f.data) return not_supported;
  if (written) *written = f.size;
  if (value) std::memcpy(value, f.data, std::min(size, f.size));
  return success;
}

Matrix matrix(const Layout& l, const void* data, bool transposed) {
  return {.data = const_cast<void*>(data),
          .type = static_cast<cudaDataType>(l.type),
          .ld = l.ld,
          .batch_stride = l.batch_stride,
          .transposed = transposed,
          .row_major = l.order == 1};
}

bool supported(const Description& d, const Layout& a, const Layout& b, const Layout& c, const Layout& out) {
  for (const Layout* l : {&a, &b, &c, &out})
    if ((l->order != 0 && l->order != 1) || size_of(static_cast<cudaDataType>(l->type)) == 0) return false;
  for (const int32_t mode : d.scale_modes)
    if (mode != 0) return false;
  if (out.type == CUDA_R_8F_E4M3 || out.type == CUDA_R_8F_E5M2 || d.op_c != 0) return false;
  constexpr uint32_t known = epilogue_default | epilogue_relu | epilogue_bias | epilogue_gelu;
  return (d.epilogue & ~known) == 0;
}

}  // namespace

API int cublasLtCreate(void** handle) {
  *handle = new int;
  return success;
}
API int cublasLtDestroy(void* handle) {
  delete static_cast<int*>(handle);
  return success;
}
API size_t cublasLtGetVersion() { return 130100; }
API size_t cublasLtGetCudartVersion() { return CUDART_VERSION; }
API const char* cublasLtGetStatusName(int status) {
  return status == success ? "CUBLAS_STATUS_SUCCESS" : "CUBLAS_STATUS_NOT_SUPPORTED";
}
API const char* cublasLtGetStatusString(int status) { return cublasLtGetStatusName(status); }

API int cublasLtMatrixLayoutCreate(Layout** out, cudaDataType type, uint64_t rows, uint64_t cols, int64_t ld) {
  *out = new Layout(initial_layout(type, rows, cols, ld));
  return success;
}
API int cublasLtMatrixLayoutInit_internal(Layout* out, size_t, cudaDataType type, uint64_t rows, uint64_t cols,
                                          int64_t ld) {
  *out = initial_layout(type, rows, cols, ld);
  return success;
}
API int cublasLtMatrixLayoutDestroy(Layout* l) {
  delete l;
  return success;
}
API int cublasLtMatrixLayoutSetAttribute(Layout* l, int attribute, const void* value, size_t size) {
  return set(l, attribute, value, size);
}
API int cublasLtMatrixLayoutGetAttribute(Layout* l, int attribute, void* value, size_t size, size_t* written) {
  return get(l, attribute, value, size, written);
}

API int cublasLtMatmulDescCreate(Description** out, int compute, cudaDataType scale_type) {
  *out = new Description(initial_description(compute, scale_type));
  return success;
}
API int cublasLtMatmulDescInit_internal(Description* out, size_t, int compute, cudaDataType scale_type) {
  *out = initial_description(compute, scale_type);
  return success;
}
API int cublasLtMatmulDescDestroy(Description* d) {
  delete d;
  return success;
}
API int cublasLtMatmulDescSetAttribute(Description* d, int attribute, const void* value, size_t size) {
  return set(d, attribute, value, size);
}
API int cublasLtMatmulDescGetAttribute(Description* d, int attribute, void* value, size_t size, size_t* written) {
  return get(d, attribute, value, size, written);
}

API int cublasLtMatmulPreferenceCreate(Preference** out) {
  *out = new Preference{};
  return success;
}
API int cublasLtMatmulPreferenceInit_internal(Preference* out, size_t) {
  *out = {};
  return success;
}
API int cublasLtMatmulPreferenceDestroy(Preference* p) {
  delete p;
  return success;
}
API int cublasLtMatmulPreferenceSetAttribute(Preference*, int, const void*, size_t) { return success; }

struct HeuristicResult {
  uint64_t algorithm[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

API int cublasLtMatmulAlgoGetHeuristic(void*, Description* d, Layout* a, Layout* b, Layout* c, Layout* out, Preference*,
                                       int requested, HeuristicResult* results, int* returned) {
  if (!d || !a || !b || !c || !out || requested < 1) return invalid_value;
  *returned = 0;
  if (!supported(*d, *a, *b, *c, *out)) return not_supported;
  results[0] = {};
  results[0].waves = 1;
  *returned = 1;
  return success;
}

API int cublasLtMatmul(void*, Description* d, const void* alpha, const void* a, Layout* a_layout, const void* b,
                       Layout* b_layout, const void* beta, const void* c, Layout* c_layout, void* out,
                       Layout* out_layout, const void*, void*, size_t, cudaStream_t stream) {
  if (!d || !a_layout || !b_layout || !c_layout || !out_layout) return invalid_value;
  if (!supported(*d, *a_layout, *b_layout, *c_layout, *out_layout)) return not_supported;
  Gemm g;
  g.caller = "cublasLtMatmul";
  g.a = matrix(*a_layout, a, d->op_a != 0);
  g.b = matrix(*b_layout, b, d->op_b != 0);
  g.c = matrix(*c_layout, c ? c : out, false);
  g.d = matrix(*out_layout, out, false);
  g.m = static_cast<int64_t>(out_layout->rows);
  g.n = static_cast<int64_t>(out_layout->cols);
  g.k = static_cast<int64_t>(d->op_a ? a_layout->rows : a_layout->cols);
  const auto k_of_b = static_cast<int64_t>(d->op_b ? b_layout->cols : b_layout->rows);
  if (g.k != k_of_b) return invalid_value;
  g.batch = out_layout->batch;
  g.alpha = alpha;
  g.beta = beta;
  g.compute = d->compute;
  g.scale_type = static_cast<cudaDataType>(d->scale_type);
  g.alpha_is_vector = d->pointer_mode >= device_vector;
  g.beta_is_zero = d->pointer_mode == alpha_vector_beta_zero || !beta;
  for (const void* scale : {d->scale_a, d->scale_b})
    if (scale) g.factor *= load(scale, 0, CUDA_R_32F);
  g.epilogue = d->epilogue;
  g.bias = d->bias;
  g.bias_type = d->bias_type >= 0 ? static_cast<cudaDataType>(d->bias_type) : g.d.type;
  g.bias_stride = d->bias_stride;
  g.stream = stream;
  return submit(g);
}
