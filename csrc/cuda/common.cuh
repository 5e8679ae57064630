// What the CUDA kernels share: a thread's 16 bytes of a row, element types, and the shape of a launch.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "launch.h"

namespace peft_ops {

constexpr unsigned kThreads = 128;

__device__ inline float to_float(float v) {
  return v;
}
__device__ inline float to_float(__half v) {
  return __half2float(v);
}
__device__ inline float to_float(__nv_bfloat16 v) {
  return __bfloat162float(v);
}
__device__ inline void from_float(float v, float& to) {
  to = v;
}
__device__ inline void from_float(float v, __half& to) {
  to = __float2half_rn(v);
}
__device__ inline void from_float(float v, __nv_bfloat16& to) {
  to = __float2bfloat16_rn(v);
}

template <class T>
constexpr int kWidth = 16 / sizeof(T); // elements that a thread holds

template <class T, int W>
struct alignas(W * sizeof(T) < 16 ? W * sizeof(T) : 16) Pack {
  T at[W];
};

// Columns [from + first, from + last) of a row, W or fewer where the row begins or ends.
struct Span {
  int from, first, last;

  __device__ bool has(int j) const {
    return first <= j && j < last;
  }
};

// What lies in the i-th 16-byte piece of the memory that the row starts in: rows of any address are stored 16 bytes at a time, but
// for their ends. Past the last piece: last <= 0.
template <class T>
__device__ Span piece(const T* row, int i, int N) {
  int from = i * kWidth<T> - int(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
  return {from, from < 0 ? -from : 0, N - from < kWidth<T> ? N - from : kWidth<T>};
}

// A span of another row, of W elements as the span: 16 bytes at a time where they are aligned there too, else one by one.
template <class T, int W>
__device__ bool whole(const T* at, Span s) {
  return s.last - s.first == W && reinterpret_cast<uintptr_t>(at) % alignof(Pack<T, W>) == 0;
}

template <class T, int W>
__device__ Pack<T, W> load(const T* row, Span s) {
  const T* at = row + s.from;
  if (whole<T, W>(at, s))
    return *reinterpret_cast<const Pack<T, W>*>(at);
  Pack<T, W> v;
#pragma unroll
  for (int j = 0; j < W; j++)
    v.at[j] = s.has(j) ? at[j] : T(0.0f);
  return v;
}

template <class T, int W>
__device__ void store(T* row, Span s, const Pack<T, W>& v) {
  T* at = row + s.from;
  if (whole<T, W>(at, s)) {
    *reinterpret_cast<Pack<T, W>*>(at) = v;
    return;
  }
#pragma unroll
  for (int j = 0; j < W; j++)
    if (s.has(j))
      at[j] = v.at[j];
}

template <class T, int W>
__device__ Pack<T, W> filled(float value) {
  Pack<T, W> v;
#pragma unroll
  for (int j = 0; j < W; j++)
    from_float(value, v.at[j]);
  return v;
}

struct Shape {
  dim3 grid, block;
};

// Threads for rows of N elements, W each: side by side in a row as many as it has work for, the others of a block on the next rows.
inline Shape shape_of(unsigned rows, unsigned N, unsigned W) {
  unsigned pieces = (N + W - 1) / W, x = 1;
  while (x < pieces && x < kThreads)
    x *= 2;
  unsigned y = kThreads / x, blocks = (rows + y - 1) / y;
  return {dim3((pieces + x - 1) / x, blocks < 65535 ? blocks : 65535), dim3(x, y)};
}

template <class F>
cudaError_t with_type(Dtype dtype, F f) {
  return dtype == Dtype::F32 ? f(float()) : dtype == Dtype::F16 ? f(__half()) : f(__nv_bfloat16());
}

// f(A(), B()) with the element types that two dtypes name
template <class F>
cudaError_t with_types(Dtype a_dtype, Dtype b_dtype, F f) {
  return with_type(a_dtype, [&](auto a) { return with_type(b_dtype, [&](auto b) { return f(a, b); }); });
}

#ifdef __CUDACC__ // tests/emulated.cpp runs the kernels on a host
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), Shape shape, cudaStream_t stream, Args... args) {
  kernel<<<shape.grid, shape.block, 0, stream>>>(args...);
  return cudaGetLastError();
}
#endif

} // namespace peft_ops
