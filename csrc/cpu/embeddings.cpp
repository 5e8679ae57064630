// Rows of embeddings, slot by slot, and sums over slots.

#include "embeddings.h"

namespace peft_ops {

namespace {

template <class T>
PEFT_OPS_CLONES void add_row(float* __restrict sum, const T* __restrict row, int64_t n) {
  for (int64_t i = 0; i < n; i++)
    sum[i] += load(row[i]);
}

PEFT_OPS_CLONES void multiply(float* values, float scale, int64_t n) {
  for (int64_t i = 0; i < n; i++)
    values[i] *= scale;
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

} // namespace

Cube float_cube(const char* op, const char* arg, const Tensor& t) {
  Dtype dtype = float_dtype(op, arg, t);
  STD_TORCH_CHECK(t.dim() == 3, op, ": ", arg, " must be 3-D, got shape ", shape_of(t));
  int64_t cols = t.size(2), size = item_size(dtype);
  STD_TORCH_CHECK(
      t.stride(2) == 1 || cols <= 1 || t.numel() == 0, op, ": ", arg, " must be contiguous in its last dimension, got stride ", t.stride(2));
  return {static_cast<char*>(t.data_ptr()), t.size(0), t.size(1), cols, t.stride(0) * size, t.stride(1) * size, dtype};
}

Integers check_integers(
    const char* op, const char* arg, const std::optional<Tensor>& t, std::initializer_list<int64_t> sizes, bool may_be_bool) {
  using torch::headeronly::ScalarType;
  if (!t)
    return {nullptr, 8};
  ScalarType dtype = t->scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Long || dtype == ScalarType::Int || (may_be_bool && dtype == ScalarType::Bool),
      op, ": ", arg, " must be int32", may_be_bool ? ", int64 or bool" : " or int64", ", got ", torch::headeronly::toString(dtype));
  auto got = t->sizes();
  STD_TORCH_CHECK(
      std::equal(got.begin(), got.end(), sizes.begin(), sizes.end()) && t->is_contiguous(),
      op, ": ", arg, " must be contiguous, of shape ", shape_of(sizes), ", got shape ", shape_of(*t));
  return {static_cast<const char*>(t->data_ptr()), dtype == ScalarType::Long ? 8 : dtype == ScalarType::Int ? 4 : 1};
}

Added check_added(
    const char* op,
    const char* ids_arg,
    const std::optional<Tensor>& ids,
    const char* arg,
    const std::optional<Tensor>& table,
    int64_t slots,
    int64_t E) {
  STD_TORCH_CHECK(ids.has_value() == table.has_value(), op, ": ", ids_arg, " and ", arg, " must be given together, got one");
  if (!table)
    return {};
  Added added{true, int_ids(op, ids_arg, *ids), float_rows(op, arg, *table)};
  STD_TORCH_CHECK(added.ids.size == slots, op, ": ", ids_arg, " must have ", slots, " elements, got shape ", shape_of(*ids));
  STD_TORCH_CHECK(
      added.table.cols == E, op, ": ", arg, " must have ", E, " columns as the embeddings have, got shape ", shape_of(*table));
  return added;
}

void SlotWriter::write(int64_t slot, Dtype from_dtype, const char* from, float scale) const {
  char* to = out + slot * E * item_size(dtype);
  bool plain = !types.present && !positions.present;
  if (plain && from == nullptr) {
    std::memset(to, 0, E * item_size(dtype));
    return;
  }
  if (plain && scale == 1.0f && from_dtype == dtype) {
    std::memcpy(to, from, E * item_size(dtype));
    return;
  }
  const char* type = types.present ? types.row(slot) : nullptr;
  const char* position = positions.present ? positions.row(slot) : nullptr;
  if ((types.present && type == nullptr) || (positions.present && position == nullptr))
    return write_nan(slot);
  alignas(64) float buffer[kBlock];
  for (int64_t c = 0; c < E; c += kBlock) {
    int64_t n = std::min(kBlock, E - c);
    if (from != nullptr)
      to_float(from_dtype, from + c * item_size(from_dtype), buffer, n);
    else
      std::fill_n(buffer, n, 0.0f);
    if (scale != 1.0f)
      multiply(buffer, scale, n);
    if (type != nullptr)
      add(types.table.dtype, buffer, type + c * item_size(types.table.dtype), n);
    if (position != nullptr)
      add(positions.table.dtype, buffer, position + c * item_size(positions.table.dtype), n);
    from_float(dtype, buffer, to + c * item_size(dtype), n);
  }
}

Tensor sum_slots(const Cube& dout, const std::vector<int64_t>& bucket, int64_t num_tasks, int64_t P) {
  int64_t E = dout.cols, rows = num_tasks * P, num_blocks = (E + kBlock - 1) / kBlock;
  Tensor out = empty({num_tasks, P, E}, torch::headeronly::ScalarType::Float);
  float* out_ptr = static_cast<float*>(out.data_ptr());
  std::vector<int64_t> start(rows + 1);
  for (int64_t r : bucket)
    if (r >= 0)
      start[r + 1]++;
  for (int64_t r = 0; r < rows; r++)
    start[r + 1] += start[r];
  std::vector<int64_t> order(start[rows]), next(start);
  for (size_t slot = 0; slot < bucket.size(); slot++)
    if (bucket[slot] >= 0)
      order[next[bucket[slot]]++] = slot;

  torch::stable::parallel_for(0, rows * num_blocks, kGrain / kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; item++) {
      int64_t r = item / num_blocks, from = item % num_blocks * kBlock, n = std::min(kBlock, E - from);
      float* sum = out_ptr + r * E + from;
      std::fill_n(sum, n, 0.0f);
      for (int64_t i = start[r]; i < start[r + 1]; i++) {
        const char* row = dout.row(order[i] / dout.size1, order[i] % dout.size1);
        add(dout.dtype, sum, row + from * item_size(dout.dtype), n);
      }
    }
  });
  return out;
}

} // namespace peft_ops
