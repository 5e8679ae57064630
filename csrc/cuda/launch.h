// The CUDA launchers, as bindings.cpp calls them: raw pointers on one device, strides in elements, sizes below 2^30.

#pragma once

#include <driver_types.h>

#include "../dtype.h"

namespace peft_ops {

// Row m belongs to the task that id m / rows_per_id names, an int64 where ids are wide, else an int32. Without ids: to task 0.
struct TaskIds {
  const char* data;
  int64_t stride; // bytes
  bool wide;
  uint32_t rows_per_id;
  int64_t num_tasks;
};

// x, y: [M, N], y contiguous   l: [num_tasks, N]
using LaunchScale = cudaError_t (*)(
    const void* x, const void* l, const TaskIds& ids, void* y,
    int M, int N, int64_t stride_xm, int64_t stride_lt,
    Dtype dtype, Dtype l_dtype, cudaStream_t stream);
extern const LaunchScale kLaunchScale[5]; // None, relu, silu, gelu, gelu_tanh

// ids: [B, S] with embedded [V, E], or null with embedded [B, S, E]   prompts: [num_tasks, P, E]   layout: int32 [B, 4]
// out: [B, P + S, E]. All contiguous, the layout aligned to 16 bytes.
cudaError_t launch_prompt_concat(
    const void* ids, const void* embedded, const void* prompts, const void* layout, void* out,
    int B, int S, int P, int E, int64_t V, int64_t num_tasks,
    bool wide, Dtype dtype, Dtype prompt_dtype, cudaStream_t stream);

} // namespace peft_ops
