// Checked views of tensors, allocation, and the search for a bad id.

#include "common.h"

namespace peft_ops {

using torch::headeronly::ScalarType;

std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t size : t.sizes())
    text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

Dtype float_dtype(const char* op, const char* arg, const Tensor& t) {
  ScalarType dtype = t.scalar_type();
  if (dtype == ScalarType::Float)
    return Dtype::F32;
  if (dtype == ScalarType::Half)
    return Dtype::F16;
  STD_TORCH_CHECK(
      dtype == ScalarType::BFloat16, op, ": ", arg, " must be float32, float16 or bfloat16, got ", torch::headeronly::toString(dtype));
  return Dtype::BF16;
}

Rows float_rows(const char* op, const char* arg, const Tensor& t) {
  Dtype dtype = float_dtype(op, arg, t);
  STD_TORCH_CHECK(t.dim() == 2, op, ": ", arg, " must be 2-D, got shape ", shape_of(t));
  int64_t rows = t.size(0), cols = t.size(1);
  STD_TORCH_CHECK(
      t.stride(1) == 1 || cols <= 1, op, ": ", arg, " must be contiguous in its last dimension, got stride ", t.stride(1));
  return {static_cast<char*>(t.data_ptr()), rows, cols, t.stride(0) * item_size(dtype), dtype};
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

Ids int_ids(const char* op, const char* arg, const Tensor& t) {
  ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Int || dtype == ScalarType::Long,
      op, ": ", arg, " must be int32 or int64, got ", torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(
      t.dim() == 1 || t.is_contiguous(), op, ": ", arg, " must be 1-D or contiguous, got shape ", shape_of(t));
  bool wide = dtype == ScalarType::Long;
  int64_t stride = t.dim() == 1 ? t.stride(0) : 1;
  return {static_cast<const char*>(t.data_ptr()), t.numel(), stride * (wide ? 8 : 4), wide};
}

int64_t first_bad_id(const Tensor& task_ids, int64_t num_tasks) {
  STD_TORCH_CHECK(num_tasks >= 0, "first_bad_id: num_tasks must not be negative, got ", num_tasks);
  Ids ids = int_ids("first_bad_id", "task_ids", task_ids);
  for (int64_t i = 0; i < ids.size; i++)
    if (ids[i] < kBase || ids[i] >= num_tasks)
      return i;
  return -1;
}

} // namespace peft_ops
