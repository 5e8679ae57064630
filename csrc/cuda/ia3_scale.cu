// y[m, n] = act(x[m, n]) * l[t(m), n]

#include "common.cuh"

namespace peft_ops {

namespace {

struct Identity {
  __device__ static float value(float z) {
    return z;
  }
};

struct Relu {
  __device__ static float value(float z) {
    return z < 0.0f ? 0.0f : z;
  }
};

struct Silu {
  __device__ static float value(float z) {
    return z / (1.0f + expf(-z));
  }
};

struct Gelu {
  __device__ static float value(float z) {
    return 0.5f * z * (1.0f + erff(z * 0.7071067811865476f));
  }
};

struct GeluTanh {
  __device__ static float value(float z) {
    return z / (1.0f + expf(-1.5957691216057308f * (z + 0.044715f * z * z * z)));
  }
};

__device__ int64_t task_of(const TaskIds& ids, unsigned m) {
  if (ids.data == nullptr)
    return 0;
  const char* at = ids.data + m / ids.rows_per_id * ids.stride;
  int64_t t = ids.wide ? *reinterpret_cast<const int64_t*>(at) : *reinterpret_cast<const int32_t*>(at);
  return t >= kBase && t < ids.num_tasks ? t : kBad;
}

// One piece of a row per thread. The scale is 1 on a row of the base model and NaN on one with a bad id; the product is fp32.
template <class T, class L, class Act>
__global__ void __launch_bounds__(kThreads) ia3_scale_kernel(
    const T* __restrict__ x, const L* __restrict__ l, TaskIds ids, T* __restrict__ y,
    unsigned M, int N, int64_t stride_xm, int64_t stride_lt) {
  constexpr int W = kWidth<T>;
  for (unsigned m = blockIdx.y * blockDim.y + threadIdx.y; m < M; m += gridDim.y * blockDim.y) {
    T* y_row = y + int64_t(m) * N;
    int64_t t = task_of(ids, m);
    for (int i = blockIdx.x * blockDim.x + threadIdx.x;; i += gridDim.x * blockDim.x) {
      Span s = piece(y_row, i, N);
      if (s.last <= 0)
        break;
      Pack<T, W> v = load<T, W>(x + m * stride_xm, s);
      Pack<L, W> scale = t < 0 ? filled<L, W>(t == kBase ? 1.0f : nanf("")) : load<L, W>(l + t * stride_lt, s);
#pragma unroll
      for (int j = 0; j < W; j++)
        from_float(Act::value(to_float(v.at[j])) * to_float(scale.at[j]), v.at[j]);
      store(y_row, s, v);
    }
  }
}

template <class Act>
cudaError_t launch_with(
    const void* x, const void* l, const TaskIds& ids, void* y,
    int M, int N, int64_t stride_xm, int64_t stride_lt, Dtype dtype, Dtype l_dtype, cudaStream_t stream) {
  return with_types(dtype, l_dtype, [&](auto t, auto l_t) {
    using T = decltype(t);
    using L = decltype(l_t);
    return launch(
        ia3_scale_kernel<T, L, Act>, shape_of(M, N, kWidth<T>), stream,
        static_cast<const T*>(x), static_cast<const L*>(l), ids, static_cast<T*>(y),
        unsigned(M), N, stride_xm, stride_lt);
  });
}

} // namespace

const LaunchScale kLaunchScale[] = {
    launch_with<Identity>, launch_with<Relu>, launch_with<Silu>, launch_with<Gelu>, launch_with<GeluTanh>};

} // namespace peft_ops
