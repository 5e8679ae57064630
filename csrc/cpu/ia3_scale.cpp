// y[m, n] = act(x[m, n]) * ia3_l[t(m), n], and its backward with the per-task sum dl.

#include "activations.h"
#include "tasks.h"

namespace peft_ops {

namespace {

// One row, or a part of one. l is fp32: a table of another dtype is converted once per run of rows.
using ForwardRow = void (*)(const void* x, const float* l, void* y, int64_t n);
using BackwardRow = void (*)(const void* dy, const void* z, const float* l, void* dz, float* dl, int64_t n);

template <class From, class To, class Act>
PEFT_OPS_CLONES void forward_row(const void* x_ptr, const float* __restrict l, void* y_ptr, int64_t n) {
  const From* __restrict x = static_cast<const From*>(x_ptr);
  To* __restrict y = static_cast<To*>(y_ptr);
  for (int64_t i = 0; i < n; i++)
    store(y + i, Act::value(load(x[i])) * l[i]);
}

template <class From, class To, class Act>
PEFT_OPS_CLONES void backward_row(
    const void* dy_ptr, const void* z_ptr, const float* __restrict l, void* dz_ptr, float* __restrict dl, int64_t n) {
  const From* __restrict dy = static_cast<const From*>(dy_ptr);
  const From* __restrict z = static_cast<const From*>(z_ptr);
  To* __restrict dz = static_cast<To*>(dz_ptr);
  for (int64_t i = 0; i < n; i++) {
    float g = load(dy[i]), dz32;
    dl[i] += g * Act::backward(load(z[i]), g * l[i], dz32);
    store(dz + i, dz32);
  }
}

// bf16 with an activation goes to an fp32 buffer and is rounded by a loop of its own: in one loop, rounding makes the compiler
// cut and glue the vectors of the whole formula, and silu takes 1.2 times as long. A plain product takes 0.9 times as long in one.
struct RowKernels {
  ForwardRow forward_f32, forward_bf16;
  BackwardRow backward_f32, backward_bf16;
  bool identity;

  bool direct(Dtype dtype) const {
    return dtype == Dtype::F32 || (dtype == Dtype::BF16 && identity);
  }

  void forward(Dtype dtype, const void* x, const float* l, void* y, int64_t n) const {
    if (direct(dtype))
      return (dtype == Dtype::F32 ? forward_f32 : forward_bf16)(x, l, y, n);
    alignas(64) float x32[kBlock], y32[kBlock];
    for (int64_t c = 0; c < n; c += kBlock) {
      int64_t width = std::min(kBlock, n - c);
      const uint16_t* from = static_cast<const uint16_t*>(x) + c;
      if (dtype == Dtype::F16) { // F16C has no place inside target_clones
        to_float(dtype, from, x32, width);
        forward_f32(x32, l + c, y32, width);
      } else {
        forward_bf16(from, l + c, y32, width);
      }
      from_float(dtype, y32, static_cast<uint16_t*>(y) + c, width);
    }
  }

  // n <= kBlock
  void backward(Dtype dtype, const void* dy, const void* z, const float* l, void* dz, float* dl, int64_t n) const {
    if (direct(dtype))
      return (dtype == Dtype::F32 ? backward_f32 : backward_bf16)(dy, z, l, dz, dl, n);
    alignas(64) float dy32[kBlock], z32[kBlock], dz32[kBlock];
    if (dtype == Dtype::F16) {
      to_float(dtype, dy, dy32, n);
      to_float(dtype, z, z32, n);
      backward_f32(dy32, z32, l, dz32, dl, n);
    } else {
      backward_bf16(dy, z, l, dz32, dl, n);
    }
    from_float(dtype, dz32, dz, n);
  }
};

template <class Act, class To = float>
constexpr RowKernels row_kernels(bool identity = false) {
  return {forward_row<float, float, Act>, forward_row<BF16, To, Act>, backward_row<float, float, Act>, backward_row<BF16, To, Act>, identity};
}

constexpr RowKernels kKernels[] = {
    row_kernels<Identity, BF16>(true), row_kernels<Relu>(), row_kernels<Silu>(), row_kernels<Gelu>(), row_kernels<GeluTanh>()};

Tensor scale_rows(const Rows& x, const Rows& l, const Groups& groups, const RowKernels& kernels, const Tensor& like) {
  Tensor out = contiguous_like(like);
  char* y_ptr = static_cast<char*>(out.data_ptr());
  int64_t N = x.cols, row_bytes = N * item_size(x.dtype);
  for_rows(l, groups, x.rows, N, [&](int64_t m, int64_t t, Scales& scales) {
    char* y = y_ptr + m * row_bytes;
    if (t == kBad)
      fill_nan(x.dtype, y, N);
    else if (t == kBase && kernels.identity)
      std::memcpy(y, x.row(m), row_bytes);
    else
      kernels.forward(x.dtype, x.row(m), scales.get(t, 0, N), y, N);
  });
  return out;
}

} // namespace

Tensor ia3_scale(
    const Tensor& x,
    const Tensor& ia3_l,
    const std::optional<Tensor>& task_ids,
    const std::optional<std::string>& activation) {
  const char* op = "ia3_scale";
  const RowKernels& kernels = find_kernels(op, activation, kKernels);
  Rows rows = batch_rows(op, "x", x), l = check_table(op, "x", ia3_l, rows.cols);
  return scale_rows(rows, l, check_groups(op, "x", task_ids, l.rows, rows.rows), kernels, x);
}

std::tuple<Tensor, Tensor> ia3_scale_backward(
    const Tensor& dy,
    const Tensor& z,
    const Tensor& ia3_l,
    const std::optional<Tensor>& task_ids,
    const std::optional<std::string>& activation,
    bool need_dz,
    bool need_dl) {
  const char* op = "ia3_scale_backward";
  using torch::headeronly::ScalarType;
  const RowKernels& kernels = find_kernels(op, activation, kKernels);
  Rows in = batch_rows(op, "z", z), grad = check_like(op, "dy", dy, "z", in), l = check_table(op, "z", ia3_l, in.cols);
  Groups groups = check_groups(op, "z", task_ids, l.rows, in.rows);
  if (!need_dl && (kernels.identity || !need_dz)) // dz = dy * l does not read z
    return {need_dz ? scale_rows(grad, l, groups, kernels, z) : empty({0}, z.scalar_type()), empty({0}, ScalarType::Float)};

  int64_t N = in.cols, size = item_size(in.dtype);
  Tensor dz_out = need_dz ? contiguous_like(z) : empty({0}, z.scalar_type());
  char* dz_ptr = static_cast<char*>(dz_out.data_ptr());
  Tensor dl_out = sum_by_task(l, groups, in.rows, N, need_dl, [&](const Part& part) {
    alignas(64) float scratch[kBlock];
    int64_t offset = part.from * size;
    void* dz = need_dz ? static_cast<void*>(dz_ptr + part.m * N * size + offset) : scratch;
    kernels.backward(in.dtype, grad.row(part.m) + offset, in.row(part.m) + offset, part.scale, dz, part.dl, part.n);
  });
  return {dz_out, dl_out};
}

} // namespace peft_ops
