// out[b] = [front spare slots | tokens before | prompt | the other tokens | the other spare slots]

#include <type_traits>

#include "common.cuh"

namespace peft_ops {

namespace {

// Where a row of the output comes from: row `prompt` of the prompts or row `token` of the tokens' embeddings, or it is filled.
struct Source {
  int64_t prompt, token;
  float fill;
};

// layout[b]: checked id, spare slots in front, tokens before the prompt, prompt length. It is on the GPU, where checking it on the
// host would synchronise: so nothing in it, nor a token's id, leads outside its tensor.
__device__ Source source_of(
    unsigned row, const void* ids, const int4* layout, unsigned S, unsigned P, int64_t V, int64_t num_tasks, bool wide) {
  const Source zero{-1, -1, 0.0f}, bad{-1, -1, nanf("")};
  unsigned b = row / (P + S);
  int4 r = __ldg(layout + b); // spelled out: nvcc makes three loads of layout[b] for sm_100, two of them behind the id's check
  if (r.x < kBase || r.x >= num_tasks)
    return bad;
  int64_t slot = int64_t(row - b * (P + S)) - r.y, p = slot - r.z;
  if (p >= 0 && p < r.w)
    return r.x >= 0 && p < P ? Source{int64_t(r.x) * P + p, -1, 0.0f} : bad;
  int64_t source = p < 0 ? slot : slot - r.w;
  if (source < 0 || source >= S)
    return zero;
  int64_t at = int64_t(b) * S + source;
  if (ids == nullptr)
    return {-1, at, 0.0f};
  int64_t id = wide ? static_cast<const int64_t*>(ids)[at] : static_cast<const int32_t*>(ids)[at];
  return id >= 0 && id < V ? Source{-1, id, 0.0f} : bad;
}

template <class To, class From, int W>
__device__ Pack<To, W> convert(const Pack<From, W>& v) {
  if constexpr (std::is_same_v<To, From>) {
    return v;
  } else {
    Pack<To, W> to;
#pragma unroll
    for (int j = 0; j < W; j++)
      from_float(to_float(v.at[j]), to.at[j]);
    return to;
  }
}

// One piece of a row per thread. Rows of the output's own type are copied bit by bit.
template <class T, class Prompt>
__global__ void __launch_bounds__(kThreads) prompt_concat_kernel(
    const void* __restrict__ ids, const T* __restrict__ embedded, const Prompt* __restrict__ prompts, const int4* __restrict__ layout,
    T* __restrict__ out,
    unsigned rows, unsigned S, unsigned P, int E, int64_t V, int64_t num_tasks, bool wide) {
  constexpr int W = kWidth<T>;
  for (unsigned m = blockIdx.y * blockDim.y + threadIdx.y; m < rows; m += gridDim.y * blockDim.y) {
    Source from = source_of(m, ids, layout, S, P, V, num_tasks, wide);
    T* out_row = out + int64_t(m) * E;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x;; i += gridDim.x * blockDim.x) {
      Span s = piece(out_row, i, E);
      if (s.last <= 0)
        break;
      Pack<T, W> v;
      if (from.prompt >= 0)
        v = convert<T>(load<Prompt, W>(prompts + from.prompt * E, s));
      else if (from.token >= 0)
        v = load<T, W>(embedded + from.token * E, s);
      else
        v = filled<T, W>(from.fill);
      store(out_row, s, v);
    }
  }
}

} // namespace

cudaError_t launch_prompt_concat(
    const void* ids, const void* embedded, const void* prompts, const void* layout, void* out,
    int B, int S, int P, int E, int64_t V, int64_t num_tasks,
    bool wide, Dtype dtype, Dtype prompt_dtype, cudaStream_t stream) {
  return with_types(dtype, prompt_dtype, [&](auto t, auto prompt_t) {
    using T = decltype(t);
    using Prompt = decltype(prompt_t);
    unsigned rows = unsigned(B) * (S + P);
    return launch(
        prompt_concat_kernel<T, Prompt>, shape_of(rows, E, kWidth<T>), stream,
        ids, static_cast<const T*>(embedded), static_cast<const Prompt*>(prompts), static_cast<const int4*>(layout),
        static_cast<T*>(out),
        rows, unsigned(S), unsigned(P), E, V, num_tasks, wide);
  });
}

} // namespace peft_ops
