// The CUDA kernels as a host library, one thread of theirs after the other: none waits for another. g++ with CUDA's headers.

#include <cmath>

#include "csrc/cuda/common.cuh"

namespace {
uint3 block, thread;
dim3 blocks, threads;
} // namespace
#define blockIdx block
#define threadIdx thread
#define gridDim blocks
#define blockDim threads
#define __launch_bounds__(...)

namespace peft_ops {

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), Shape shape, cudaStream_t, Args... args) {
  blocks = shape.grid;
  threads = shape.block;
  for (block.z = 0, block.y = 0; block.y < blocks.y; block.y++)
    for (block.x = 0; block.x < blocks.x; block.x++)
      for (thread.z = 0, thread.y = 0; thread.y < threads.y; thread.y++)
        for (thread.x = 0; thread.x < threads.x; thread.x++)
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
    const void* tokens, const void* table, const void* prompts, const void* layout, void* out,
    int B, int S, int P, int E, int64_t V, int64_t num_tasks, int wide, int dtype, int prompt_dtype) {
  launch_prompt_concat(
      tokens, table, prompts, layout, out, B, S, P, E, V, num_tasks, wide != 0, Dtype(dtype), Dtype(prompt_dtype), nullptr);
}
