// The CUDA operators: arguments checked as on a CPU, outputs made, kernels launched on torch's stream without a synchronisation.
// Their schemas are in peft_ops/_library.py.

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../cpu/activations.h"
#include "../cpu/tasks.h"
#include "launch.h"

namespace peft_ops {

namespace {

constexpr int64_t kMaxSize = int64_t(1) << 30; // rows and columns are counted in 32 bits, with room for a grid's stride

// The device that the tensors share, as long as a launch takes.
class Device {
 public:
  Device(const char* op, const char* arg, const Tensor& t) : op_(op), arg_(arg), index_(cuda_index(op, arg, t)), guard_(index_) {}

  void check(const char* arg, const Tensor& t) const {
    int32_t index = cuda_index(op_, arg, t);
    STD_TORCH_CHECK(index == index_, op_, ": ", arg, " must be on ", arg_, "'s device cuda:", index_, ", got cuda:", index);
  }

  Tensor empty(std::initializer_list<int64_t> sizes, torch::headeronly::ScalarType dtype) const {
    return peft_ops::empty(sizes, dtype, aoti_torch_device_type_cuda(), index_);
  }

  cudaStream_t stream() const {
    void* stream;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

  void check(cudaError_t error) const {
    STD_TORCH_CHECK(error == cudaSuccess, op_, ": the launch failed, ", cudaGetErrorString(error));
  }

 private:
  // one CUDA tensor among the arguments is enough for the dispatcher to come here
  static int32_t cuda_index(const char* op, const char* arg, const Tensor& t) {
    STD_TORCH_CHECK(t.is_cuda(), op, ": ", arg, " must be on a CUDA device, got another kind of device");
    return t.get_device_index();
  }

  const char* op_;
  const char* arg_;
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

void check_size(const char* op, const char* arg, int64_t size) {
  STD_TORCH_CHECK(size < kMaxSize, op, ": ", arg, " must be below 2^30, got ", size);
}

void check_contiguous(const char* op, const char* arg, const Tensor& t, int64_t dim) {
  STD_TORCH_CHECK(t.dim() == dim && t.is_contiguous(), op, ": ", arg, " must be ", dim, "-D and contiguous, got shape ", shape_of(t));
}

Tensor ia3_scale_cuda(
    const Tensor& x,
    const Tensor& ia3_l,
    const std::optional<Tensor>& task_ids,
    const std::optional<std::string>& activation) {
  const char* op = "ia3_scale";
  LaunchScale launch = find_kernels(op, activation, kLaunchScale);
  Rows rows = float_rows(op, "x", x), l = check_table(op, "x", ia3_l, rows.cols);
  Groups groups = check_groups(op, "x", task_ids, l.rows, rows.rows);
  check_size(op, "x's rows", rows.rows);
  check_size(op, "x's columns", rows.cols);
  Device device(op, "x", x);
  device.check("ia3_l", ia3_l);
  if (task_ids)
    device.check("task_ids", *task_ids);
  Tensor y = device.empty({rows.rows, rows.cols}, x.scalar_type());
  if (rows.rows == 0 || rows.cols == 0)
    return y;
  TaskIds ids{groups.ids.data, groups.ids.stride, groups.ids.wide, uint32_t(groups.per), l.rows};
  device.check(launch(
      rows.data, l.data, ids, y.data_ptr(),
      int(rows.rows), int(rows.cols), rows.stride / item_size(rows.dtype), l.stride / item_size(l.dtype),
      rows.dtype, l.dtype, device.stream()));
  return y;
}

Tensor prompt_concat_cuda(
    const Tensor& tokens,
    const std::optional<Tensor>& embedding,
    const Tensor& prompts,
    const Tensor& layout,
    double scale,
    const std::optional<Tensor>& types,
    const std::optional<Tensor>& type_embedding,
    const std::optional<Tensor>& positions,
    const std::optional<Tensor>& position_embedding) {
  const char* op = "prompt_concat";
  STD_TORCH_CHECK(!embedding || scale == 1.0, op, ": scale must be 1, this kernel copies embeddings, got ", scale);
  STD_TORCH_CHECK(
      !(types || type_embedding || positions || position_embedding),
      op, ": types and positions must be None, this kernel copies embeddings, got ", types || type_embedding ? "types" : "positions");
  const Tensor& source = embedding ? *embedding : tokens;
  Dtype dtype = float_dtype(op, embedding ? "embedding" : "tokens", source), prompt_dtype = float_dtype(op, "prompts", prompts);
  check_contiguous(op, "tokens", tokens, embedding ? 2 : 3);
  check_contiguous(op, "prompts", prompts, 3);
  int64_t B = tokens.size(0), S = tokens.size(1), P = prompts.size(1), E = prompts.size(2);
  bool wide = false;
  if (embedding) {
    check_contiguous(op, "embedding", *embedding, 2);
    wide = int_ids(op, "tokens", tokens).wide;
  }
  STD_TORCH_CHECK(
      source.size(source.dim() - 1) == E,
      op, ": prompts must have ", source.size(source.dim() - 1), " columns as the embeddings have, got shape ", shape_of(prompts));
  check_contiguous(op, "layout", layout, 2);
  STD_TORCH_CHECK(
      layout.scalar_type() == torch::headeronly::ScalarType::Int,
      op, ": layout must be int32, got ", torch::headeronly::toString(layout.scalar_type()));
  STD_TORCH_CHECK(
      layout.size(0) == B && layout.size(1) == 4 && reinterpret_cast<uintptr_t>(layout.data_ptr()) % 16 == 0,
      op, ": layout must be [", B, ", 4] and aligned to 16 bytes, got shape ", shape_of(layout));
  check_size(op, "the output's rows", B * (P + S));
  check_size(op, "the embeddings' columns", E);
  Device device(op, "prompts", prompts);
  device.check("tokens", tokens);
  device.check("layout", layout);
  if (embedding)
    device.check("embedding", *embedding);
  Tensor out = device.empty({B, P + S, E}, source.scalar_type());
  if (B * (P + S) == 0 || E == 0)
    return out;
  device.check(launch_prompt_concat(
      embedding ? tokens.data_ptr() : nullptr, source.data_ptr(), prompts.data_ptr(), layout.data_ptr(), out.data_ptr(),
      int(B), int(S), int(P), int(E), embedding ? embedding->size(0) : 0, prompts.size(0),
      wide, dtype, prompt_dtype, device.stream()));
  return out;
}

} // namespace

} // namespace peft_ops

STABLE_TORCH_LIBRARY_IMPL(peft_ops_native, CUDA, m) {
  m.impl("ia3_scale", TORCH_BOX(&peft_ops::ia3_scale_cuda));
  m.impl("prompt_concat", TORCH_BOX(&peft_ops::prompt_concat_cuda));
}
