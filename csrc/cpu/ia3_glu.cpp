// h[m, n] = act(gate[m, n]) * up[m, n] * ia3_l[t(m), n], and its backward with the per-task sum dl.

#include "activations.h"
#include "tasks.h"

namespace peft_ops {

namespace {

// One row, or a part of one, in fp32 or bf16, to fp32, as in ia3_scale.cpp.
using ForwardRow = void (*)(const void* gate, const void* up, const float* l, float* h, int64_t n);
using BackwardRow =
    void (*)(const void* dh, const void* gate, const void* up, const float* l, float* dgate, float* dup, float* dl, int64_t n);

template <class T, class Act>
PEFT_OPS_CLONES void forward_row(
    const void* gate_ptr, const void* up_ptr, const float* __restrict l, float* __restrict h, int64_t n) {
  const T* __restrict gate = static_cast<const T*>(gate_ptr);
  const T* __restrict up = static_cast<const T*>(up_ptr);
  for (int64_t i = 0; i < n; i++)
    h[i] = Act::value(load(gate[i])) * load(up[i]) * l[i];
}

template <class T, class Act>
PEFT_OPS_CLONES void backward_row(
    const void* dh_ptr, const void* gate_ptr, const void* up_ptr, const float* __restrict l,
    float* __restrict dgate, float* __restrict dup, float* __restrict dl, int64_t n) {
  const T* __restrict dh = static_cast<const T*>(dh_ptr);
  const T* __restrict gate = static_cast<const T*>(gate_ptr);
  const T* __restrict up = static_cast<const T*>(up_ptr);
  for (int64_t i = 0; i < n; i++) {
    float d = load(dh[i]), u = load(up[i]), scaled = d * l[i];
    float a = Act::backward(load(gate[i]), scaled * u, dgate[i]);
    dl[i] += d * (a * u);
    dup[i] = scaled * a;
  }
}

struct RowKernels {
  ForwardRow forward_f32, forward_bf16;
  BackwardRow backward_f32, backward_bf16;

  void forward(Dtype dtype, const void* gate, const void* up, const float* l, void* h, int64_t n) const {
    if (dtype == Dtype::F32)
      return forward_f32(gate, up, l, static_cast<float*>(h), n);
    alignas(64) float gate32[kBlock], up32[kBlock], h32[kBlock];
    for (int64_t c = 0; c < n; c += kBlock) {
      int64_t width = std::min(kBlock, n - c);
      const uint16_t* g = static_cast<const uint16_t*>(gate) + c;
      const uint16_t* u = static_cast<const uint16_t*>(up) + c;
      if (dtype == Dtype::F16) {
        to_float(dtype, g, gate32, width);
        to_float(dtype, u, up32, width);
        forward_f32(gate32, up32, l + c, h32, width);
      } else {
        forward_bf16(g, u, l + c, h32, width);
      }
      from_float(dtype, h32, static_cast<uint16_t*>(h) + c, width);
    }
  }

  // n <= kBlock
  void backward(
      Dtype dtype, const void* dh, const void* gate, const void* up, const float* l, void* dgate, void* dup, float* dl, int64_t n) const {
    if (dtype == Dtype::F32)
      return backward_f32(dh, gate, up, l, static_cast<float*>(dgate), static_cast<float*>(dup), dl, n);
    alignas(64) float dh32[kBlock], gate32[kBlock], up32[kBlock], dgate32[kBlock], dup32[kBlock];
    if (dtype == Dtype::F16) {
      to_float(dtype, dh, dh32, n);
      to_float(dtype, gate, gate32, n);
      to_float(dtype, up, up32, n);
      backward_f32(dh32, gate32, up32, l, dgate32, dup32, dl, n);
    } else {
      backward_bf16(dh, gate, up, l, dgate32, dup32, dl, n);
    }
    from_float(dtype, dgate32, dgate, n);
    from_float(dtype, dup32, dup, n);
  }
};

template <class Act>
constexpr RowKernels row_kernels() {
  return {forward_row<float, Act>, forward_row<BF16, Act>, backward_row<float, Act>, backward_row<BF16, Act>};
}

constexpr RowKernels kKernels[] = {
    row_kernels<Identity>(), row_kernels<Relu>(), row_kernels<Silu>(), row_kernels<Gelu>(), row_kernels<GeluTanh>()};

} // namespace

Tensor ia3_glu(
    const Tensor& gate_in,
    const Tensor& up_in,
    const Tensor& ia3_l,
    const std::optional<Tensor>& task_ids,
    const std::optional<std::string>& activation) {
  const char* op = "ia3_glu";
  const RowKernels& kernels = find_kernels(op, activation, kKernels);
  Rows gate = batch_rows(op, "gate", gate_in), up = check_like(op, "up", up_in, "gate", gate);
  Rows l = check_table(op, "gate", ia3_l, gate.cols);
  Groups groups = check_groups(op, "gate", task_ids, l.rows, gate.rows);
  int64_t N = gate.cols, row_bytes = N * item_size(gate.dtype);
  Tensor out = contiguous_like(gate_in);
  char* h = static_cast<char*>(out.data_ptr());
  for_rows(l, groups, gate.rows, N, [&](int64_t m, int64_t t, Scales& scales) {
    kernels.forward(gate.dtype, gate.row(m), up.row(m), scales.get(t, 0, N), h + m * row_bytes, N);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> ia3_glu_backward(
    const Tensor& dh_in,
    const Tensor& gate_in,
    const Tensor& up_in,
    const Tensor& ia3_l,
    const std::optional<Tensor>& task_ids,
    const std::optional<std::string>& activation,
    bool need_dx,
    bool need_dl) {
  const char* op = "ia3_glu_backward";
  const RowKernels& kernels = find_kernels(op, activation, kKernels);
  Rows gate = batch_rows(op, "gate", gate_in), up = check_like(op, "up", up_in, "gate", gate);
  Rows dh = check_like(op, "dh", dh_in, "gate", gate), l = check_table(op, "gate", ia3_l, gate.cols);
  Groups groups = check_groups(op, "gate", task_ids, l.rows, gate.rows);
  int64_t N = gate.cols, size = item_size(gate.dtype);
  auto out = [&] { return need_dx ? contiguous_like(gate_in) : empty({0}, gate_in.scalar_type()); };
  Tensor dgate_out = out(), dup_out = out();
  if (!need_dx && !need_dl)
    return {dgate_out, dup_out, empty({0}, torch::headeronly::ScalarType::Float)};
  char* dgate_ptr = static_cast<char*>(dgate_out.data_ptr());
  char* dup_ptr = static_cast<char*>(dup_out.data_ptr());
  Tensor dl_out = sum_by_task(l, groups, gate.rows, N, need_dl, [&](const Part& part) {
    alignas(64) float dgate_scratch[kBlock], dup_scratch[kBlock];
    int64_t offset = part.from * size, to = part.m * N * size + offset;
    void* dgate = need_dx ? static_cast<void*>(dgate_ptr + to) : dgate_scratch;
    void* dup = need_dx ? static_cast<void*>(dup_ptr + to) : dup_scratch;
    kernels.backward(
        gate.dtype, dh.row(part.m) + offset, gate.row(part.m) + offset, up.row(part.m) + offset, part.scale,
        dgate, dup, part.dl, part.n);
  });
  return {dgate_out, dup_out, dl_out};
}

} // namespace peft_ops
