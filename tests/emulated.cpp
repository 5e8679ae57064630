// The CUDA kernels as a host library, one thread of theirs after the other: none waits for another. What they take from CUDA stands
// here, so that any C++ compiler runs them: test_native_cuda.py puts empty files in the place of CUDA's headers.

#include <cmath>
#include <cstdint>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x, unsigned y) : x(x), y(y) {}
};
struct alignas(16) int4 {
  int x, y, z, w;
};
using __half = c10::Half;
using __nv_bfloat16 = c10::BFloat16;
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };

inline int4 __ldg(const int4* at) {
  return *at;
}
inline float __half2float(__half v) {
  return v;
}
inline float __bfloat162float(__nv_bfloat16 v) {
  return v;
}
inline __half __float2half_rn(float v) {
  return v;
}
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  return v;
}

static dim3 blockIdx, threadIdx, gridDim, blockDim;
#define __device__
#define __global__
#define __launch_bounds__(...)

#include "csrc/cuda/common.cuh"

namespace peft_ops {

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), Shape shape, cudaStream_t, Args... args) {
  gridDim = shape.grid;
  blockDim = shape.block;
  for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++)
      for (threadIdx.y = 0; threadIdx.y < blockDim.y; threadIdx.y++)
        for (threadIdx.x = 0; threadIdx.x < blockDim.x; threadIdx.x++)
          kernel(args...);
  return cudaSuccess;
}

} // namespace peft_ops

#include "csrc/cuda/ia3_scale.cu"
#include "csrc/cuda/prompt_concat.cu"

using namespace peft_ops;

extern "C" void piece_of(const char* row, int i, int N, int size, int* span) {
  Span s = size == 4 ? piece(reinterpret_cast<const float*>(row), i, N) : piece(reinterpret_cast<const __half*>(row), i, N);
  span[0] = s.from;
  span[1] = s.first;
  span[2] = s.last;
}

extern "C" void ia3_scale(
    const void* x, const void* l, const char* ids, void* y,
    int M, int N, int64_t stride_xm, int64_t stride_lt, int64_t stride_id, int64_t num_ids, int64_t num_tasks,
    int wide, int dtype, int l_dtype, int activation) {
  TaskIds task_ids{ids, stride_id, wide != 0, uint32_t(M / num_ids), num_tasks};
  kLaunchScale[activation](x, l, task_ids, y, M, N, stride_xm, stride_lt, Dtype(dtype), Dtype(l_dtype), nullptr);
}

extern "C" void prompt_concat(
    const void* ids, const void* embedded, const void* prompts, const void* layout, void* out,
    int B, int S, int P, int E, int64_t V, int64_t num_tasks, int wide, int dtype, int prompt_dtype) {
  launch_prompt_concat(
      ids, embedded, prompts, layout, out, B, S, P, E, V, num_tasks, wide != 0, Dtype(dtype), Dtype(prompt_dtype), nullptr);
}
