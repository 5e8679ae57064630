// Checked views of tensors, allocation, and the search for a bad id.

#include "common.h"

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

namespace peft_ops {

using torch::headeronly::ScalarType;

namespace {

// Fresh memory of this size comes page by page from the system: of the 24 ms that 33 MB of embeddings take on two threads, 16 are
// page faults. Linux gives huge pages to a range that asks for them, and asking takes a microsecond.
constexpr int64_t kHugeFrom = 4 << 20;

void ask_for_huge_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHuge = 2 << 20;
  uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  if (begin < end)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE); // refused, the pages are as they were
#else
  (void)data, (void)bytes;
#endif
}

} // namespace

std::string shape_of(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::string text = "[";
  for (int64_t size : sizes)
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
  STD_TORCH_CHECK(t.dim() == 2, op, ": ", arg, " must be 2-D, got shape ", shape_of(t));
  return batch_rows(op, arg, t);
}

Rows batch_rows(const char* op, const char* arg, const Tensor& t) {
  Dtype dtype = float_dtype(op, arg, t);
  int64_t dim = t.dim();
  STD_TORCH_CHECK(
      dim == 2 || (dim > 2 && t.is_contiguous()), op, ": ", arg, " must be 2-D, or contiguous with more dimensions, got shape ", shape_of(t));
  int64_t rows = t.size(0), cols = t.size(dim - 1);
  for (int64_t d = 1; d < dim - 1; d++)
    rows *= t.size(d);
  STD_TORCH_CHECK(
      t.stride(dim - 1) == 1 || cols <= 1 || rows == 0,
      op, ": ", arg, " must be contiguous in its last dimension, got stride ", t.stride(dim - 1));
  // with more dimensions a contiguous tensor's rows follow one another, but its dimensions of size 1 may have any stride
  int64_t stride = dim == 2 ? t.stride(0) : cols;
  return {static_cast<char*>(t.data_ptr()), rows, cols, stride * item_size(dtype), dtype};
}

Tensor contiguous_like(const Tensor& t) {
  int64_t sizes[64]; // torch's most
  for (int64_t d = 0; d < t.dim(); d++)
    sizes[d] = t.size(d);
  return empty(sizes, t.dim(), t.scalar_type(), aoti_torch_device_type_cpu(), 0);
}

Tensor empty(const int64_t* sizes, int64_t dim, ScalarType dtype, int32_t device_type, int32_t device_index) {
  // past the dispatcher, which takes 0.6 us of the 2.6 us that a call with one row takes
  int64_t strides[64], stride = 1;
  for (int64_t d = dim; d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(1, sizes[d]);
  }
  int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, type, device_type, device_index, &handle));
  Tensor t(handle);
  int64_t bytes = stride * (dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ? 2 : 4);
  if (device_type == aoti_torch_device_type_cpu() && bytes >= kHugeFrom)
    ask_for_huge_pages(t.data_ptr(), bytes);
  return t;
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

int64_t first_bad_id(const Tensor& ids_in, int64_t low, int64_t end) {
  Ids ids = int_ids("first_bad_id", "ids", ids_in);
  for (int64_t i = 0; i < ids.size; i++) {
    int64_t id = ids[i];
    if (id < low || id >= end)
      return i;
  }
  return -1;
}

int64_t first_bad_offset(const Tensor& cu_seqlens, int64_t total, int64_t max_seqlen) {
  Ids offsets = int_ids("first_bad_offset", "cu_seqlens", cu_seqlens);
  int64_t previous = 0;
  for (int64_t i = 0; i < offsets.size; i++) {
    int64_t offset = offsets[i];
    if (offset < previous || offset > total || offset - previous > (i == 0 ? 0 : max_seqlen))
      return i;
    previous = offset;
  }
  return -1;
}

} // namespace peft_ops
