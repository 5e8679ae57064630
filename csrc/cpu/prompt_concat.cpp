// out[b] = [front spare slots | tokens before | prompt | the other tokens | the other spare slots], and the prompts' gradient.

#include "common.h"

namespace peft_ops {

namespace {

// One row of the layout: peft_ops.reference.prompt_layout has the meaning.
struct RowLayout {
  int64_t id, front, before, length;
};

struct Layout {
  const char* data;
  int64_t rows, row_stride, col_stride;

  RowLayout operator[](int64_t b) const {
    auto column = [&](int64_t c) -> int64_t { return *reinterpret_cast<const int32_t*>(data + b * row_stride + c * col_stride); };
    return {column(0), column(1), column(2), column(3)};
  }
};

// Checked before any read: what the layout says is an address.
Layout check_layout(const char* op, const Tensor& t, int64_t B, int64_t S, int64_t num_tasks, int64_t P) {
  STD_TORCH_CHECK(
      t.scalar_type() == torch::headeronly::ScalarType::Int,
      op, ": layout must be int32, got ", torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == B && t.size(1) == 4, op, ": layout must be [", B, ", 4], got ", shape_of(t));
  Layout layout{static_cast<const char*>(t.data_ptr()), B, t.stride(0) * 4, t.stride(1) * 4};
  for (int64_t b = 0; b < B; b++) {
    RowLayout r = layout[b];
    bool inside = r.id >= kBad && r.id < num_tasks && r.front >= 0 && r.before >= 0 && r.before <= S && r.length >= 0 &&
        r.front + r.length <= P && (r.id >= 0 || r.length == 0);
    STD_TORCH_CHECK(
        inside, op, ": layout must stay inside ", num_tasks, " tasks, ", S, " tokens and ", P, " slots, got ",
        r.id, ", ", r.front, ", ", r.before, ", ", r.length, " in row ", b);
  }
  return layout;
}

// A 3-D tensor whose last dimension is contiguous; strides in bytes.
struct Cube {
  char* data;
  int64_t size0, size1, cols, stride0, stride1;
  Dtype dtype;

  char* row(int64_t i, int64_t j) const {
    return data + i * stride0 + j * stride1;
  }
};

Cube float_cube(const char* op, const char* arg, const Tensor& t) {
  Dtype dtype = float_dtype(op, arg, t);
  STD_TORCH_CHECK(t.dim() == 3, op, ": ", arg, " must be 3-D, got shape ", shape_of(t));
  int64_t cols = t.size(2), size = item_size(dtype);
  STD_TORCH_CHECK(
      t.stride(2) == 1 || cols <= 1, op, ": ", arg, " must be contiguous in its last dimension, got stride ", t.stride(2));
  return {static_cast<char*>(t.data_ptr()), t.size(0), t.size(1), cols, t.stride(0) * size, t.stride(1) * size, dtype};
}

void convert_row(Dtype from_dtype, const char* from, Dtype to_dtype, char* to, int64_t n) {
  if (from_dtype == to_dtype) {
    std::memcpy(to, from, n * item_size(to_dtype));
    return;
  }
  alignas(64) float buffer[kBlock];
  for (int64_t c = 0; c < n; c += kBlock) {
    int64_t width = std::min(kBlock, n - c);
    to_float(from_dtype, from + c * item_size(from_dtype), buffer, width);
    from_float(to_dtype, buffer, to + c * item_size(to_dtype), width);
  }
}

template <class T>
PEFT_OPS_CLONES void add_row(float* __restrict sum, const T* __restrict row, int64_t n) {
  for (int64_t i = 0; i < n; i++)
    sum[i] += load(row[i]);
}

// n <= kBlock
void add(Dtype dtype, float* sum, const char* row, int64_t n) {
  if (dtype == Dtype::F32)
    return add_row(sum, reinterpret_cast<const float*>(row), n);
  if (dtype == Dtype::BF16)
    return add_row(sum, reinterpret_cast<const BF16*>(row), n);
  alignas(64) float buffer[kBlock];
  to_float(dtype, row, buffer, n);
  add_row(sum, const_cast<const float*>(buffer), n);
}

// Where token rows come from: an embedding table and ids, or embeddings.
struct Tokens {
  Ids ids;       // of [B, S]; its data is null where the embeddings were given
  Rows table;
  Cube embedded;
  int64_t B, S, E;
  Dtype dtype;

  // null for an id outside the table
  const char* row(int64_t b, int64_t s) const {
    if (ids.data == nullptr)
      return embedded.row(b, s);
    int64_t id = ids[b * S + s];
    return id >= 0 && id < table.rows ? table.row(id) : nullptr;
  }
};

Tokens check_tokens(const char* op, const Tensor& tokens, const std::optional<Tensor>& embedding) {
  if (!embedding) {
    Cube embedded = float_cube(op, "tokens", tokens);
    return {{}, {}, embedded, embedded.size0, embedded.size1, embedded.cols, embedded.dtype};
  }
  Rows table = float_rows(op, "embedding", *embedding);
  STD_TORCH_CHECK(tokens.dim() == 2, op, ": tokens must be [B, S] where there is an embedding, got shape ", shape_of(tokens));
  Ids ids = int_ids(op, "tokens", tokens);
  return {ids, table, {}, tokens.size(0), tokens.size(1), table.cols, table.dtype};
}

} // namespace

Tensor prompt_concat(
    const Tensor& tokens_in,
    const std::optional<Tensor>& embedding,
    const Tensor& prompts_in,
    const Tensor& layout_in) {
  const char* op = "prompt_concat";
  Tokens tokens = check_tokens(op, tokens_in, embedding);
  Cube prompts = float_cube(op, "prompts", prompts_in);
  int64_t B = tokens.B, S = tokens.S, E = tokens.E, P = prompts.size1, L = P + S;
  STD_TORCH_CHECK(prompts.cols == E, op, ": prompts must have ", E, " columns as the embeddings have, got shape ", shape_of(prompts_in));
  Layout layout = check_layout(op, layout_in, B, S, prompts.size0, P);
  Tensor out = empty({B, L, E}, (embedding ? *embedding : tokens_in).scalar_type());
  char* out_ptr = static_cast<char*>(out.data_ptr());
  int64_t row_bytes = E * item_size(tokens.dtype);
  if (E == 0)
    return out;
  torch::stable::parallel_for(0, B * L, std::max<int64_t>(1, kGrain / E), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      RowLayout r = layout[i / L];
      char* to = out_ptr + i * row_bytes;
      int64_t slot = i % L - r.front;
      int64_t source = slot < r.before ? slot : slot - r.length;
      if (r.id == kBad) {
        fill_nan(tokens.dtype, to, E);
      } else if (slot >= r.before && slot < r.before + r.length) {
        convert_row(prompts.dtype, prompts.row(r.id, slot - r.before), tokens.dtype, to, E);
      } else if (source < 0 || source >= S) {
        std::memset(to, 0, row_bytes);
      } else if (const char* from = tokens.row(i / L, source)) {
        std::memcpy(to, from, row_bytes);
      } else {
        fill_nan(tokens.dtype, to, E);
      }
    }
  });
  return out;
}

Tensor prompt_concat_backward(const Tensor& dout_in, const Tensor& layout_in, int64_t num_tasks, int64_t P) {
  const char* op = "prompt_concat_backward";
  Cube dout = float_cube(op, "dout", dout_in);
  int64_t B = dout.size0, E = dout.cols, num_blocks = (E + kBlock - 1) / kBlock;
  STD_TORCH_CHECK(num_tasks >= 0, op, ": num_tasks must not be negative, got ", num_tasks);
  STD_TORCH_CHECK(P >= 0 && P <= dout.size1, op, ": P must lie in [0, ", dout.size1, "], got ", P);
  Layout layout = check_layout(op, layout_in, B, dout.size1 - P, num_tasks, P);
  Tensor out = empty({num_tasks, P, E}, torch::headeronly::ScalarType::Float);
  float* out_ptr = static_cast<float*>(out.data_ptr());

  // rows of each task in ascending order
  std::vector<int64_t> start(num_tasks + 1), rows(B);
  for (int64_t b = 0; b < B; b++)
    if (layout[b].id >= 0)
      start[layout[b].id + 1]++;
  for (int64_t t = 0; t < num_tasks; t++)
    start[t + 1] += start[t];
  std::vector<int64_t> next(start);
  for (int64_t b = 0; b < B; b++)
    if (layout[b].id >= 0)
      rows[next[layout[b].id]++] = b;

  torch::stable::parallel_for(0, num_tasks * P * num_blocks, kGrain / kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; item++) {
      int64_t from = item % num_blocks * kBlock, width = std::min(kBlock, E - from);
      int64_t t = item / num_blocks / P, p = item / num_blocks % P;
      float* sum = out_ptr + (t * P + p) * E + from;
      std::fill_n(sum, width, 0.0f);
      for (int64_t i = start[t]; i < start[t + 1]; i++) {
        RowLayout r = layout[rows[i]];
        if (p < r.length)
          add(dout.dtype, sum, dout.row(rows[i], r.front + r.before + p) + from * item_size(dout.dtype), width);
      }
    }
  });
  return out;
}

} // namespace peft_ops
