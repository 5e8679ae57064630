// y[m, n] = act(x[m, n]) * ia3_l[t(m), n], and its backward with the per-task sum dl.

#include "activations.h"

namespace peft_ops {

namespace {

constexpr int64_t kChunk = 256; // rows of one task that are summed before their sum joins the others

// One row, or a part of one, in fp32 or bf16. l is fp32: a table of another dtype is converted once per run of rows.
using ForwardRow = void (*)(const void* x, const float* l, void* y, int64_t n);
using BackwardRow = void (*)(const void* dy, const void* z, const float* l, void* dz, float* dl, int64_t n);

template <class T, class Act>
PEFT_OPS_CLONES void forward_row(const void* x_ptr, const float* __restrict l, void* y_ptr, int64_t n) {
  const T* __restrict x = static_cast<const T*>(x_ptr);
  T* __restrict y = static_cast<T*>(y_ptr);
  for (int64_t i = 0; i < n; i++)
    store(y + i, Act::value(load(x[i])) * l[i]);
}

template <class T, class Act>
PEFT_OPS_CLONES void backward_row(
    const void* dy_ptr, const void* z_ptr, const float* __restrict l, void* dz_ptr, float* __restrict dl, int64_t n) {
  const T* __restrict dy = static_cast<const T*>(dy_ptr);
  const T* __restrict z = static_cast<const T*>(z_ptr);
  T* __restrict dz = static_cast<T*>(dz_ptr);
  for (int64_t i = 0; i < n; i++) {
    float g = load(dy[i]), dz32;
    dl[i] += g * Act::backward(load(z[i]), g * l[i], dz32);
    store(dz + i, dz32);
  }
}

struct RowKernels {
  const char* activation;
  ForwardRow forward_f32, forward_bf16;
  BackwardRow backward_f32, backward_bf16;
  bool identity;

  void forward(Dtype dtype, const void* x, const float* l, void* y, int64_t n) const {
    if (dtype != Dtype::F16)
      return (dtype == Dtype::F32 ? forward_f32 : forward_bf16)(x, l, y, n);
    // through fp32 buffers: F16C has no place inside target_clones
    alignas(64) float x32[kBlock], y32[kBlock];
    for (int64_t c = 0; c < n; c += kBlock) {
      int64_t width = std::min(kBlock, n - c);
      to_float(dtype, static_cast<const uint16_t*>(x) + c, x32, width);
      forward_f32(x32, l + c, y32, width);
      from_float(dtype, y32, static_cast<uint16_t*>(y) + c, width);
    }
  }

  // n <= kBlock
  void backward(Dtype dtype, const void* dy, const void* z, const float* l, void* dz, float* dl, int64_t n) const {
    if (dtype != Dtype::F16)
      return (dtype == Dtype::F32 ? backward_f32 : backward_bf16)(dy, z, l, dz, dl, n);
    alignas(64) float dy32[kBlock], z32[kBlock], dz32[kBlock];
    to_float(dtype, dy, dy32, n);
    to_float(dtype, z, z32, n);
    backward_f32(dy32, z32, l, dz32, dl, n);
    from_float(dtype, dz32, dz, n);
  }
};

template <class Act>
constexpr RowKernels row_kernels(const char* activation, bool identity = false) {
  return {activation, forward_row<float, Act>, forward_row<BF16, Act>, backward_row<float, Act>, backward_row<BF16, Act>, identity};
}

const RowKernels& find_kernels(const char* op, const std::optional<std::string>& activation) {
  static const RowKernels kernels[] = {
      row_kernels<Identity>("", true), row_kernels<Relu>("relu"), row_kernels<Silu>("silu"),
      row_kernels<Gelu>("gelu"), row_kernels<GeluTanh>("gelu_tanh")};
  if (!activation)
    return kernels[0];
  for (const RowKernels& k : kernels)
    if (*activation == k.activation && !k.identity)
      return k;
  STD_TORCH_CHECK(false, op, ": activation must be None, relu, gelu, gelu_tanh or silu, got ", *activation);
}

Rows check_table(const char* op, const Tensor& ia3_l, int64_t N) {
  Rows l = float_rows(op, "ia3_l", ia3_l);
  STD_TORCH_CHECK(l.cols == N, op, ": ia3_l must have ", N, " columns as x has, got shape ", shape_of(ia3_l));
  return l;
}

Groups check_groups(const char* op, const std::optional<Tensor>& task_ids, int64_t num_tasks, int64_t M) {
  if (!task_ids) {
    STD_TORCH_CHECK(num_tasks > 0 || M == 0, op, ": ia3_l must have a row where task_ids is None, got none");
    return {{}, num_tasks, M > 0, M};
  }
  Ids ids = int_ids(op, "task_ids", *task_ids);
  STD_TORCH_CHECK(
      ids.size > 0 ? M % ids.size == 0 : M == 0, op, ": task_ids must divide the ", M, " rows of x, got ", ids.size, " ids");
  return {ids, num_tasks, ids.size, ids.size > 0 ? M / ids.size : 0};
}

// The scale rows of one thread as fp32: a row of the table, ones for the base model, NaN for a bad id.
class Scales {
 public:
  explicit Scales(const Rows& l) : l_(l) {}

  // columns [from, from + n) of task t's row; valid until the next call
  const float* get(int64_t t, int64_t from, int64_t n) {
    if (t >= 0 && l_.dtype == Dtype::F32)
      return reinterpret_cast<const float*>(l_.row(t)) + from;
    if (t != task_ || from != from_) {
      buffer_.resize(n);
      if (t < 0)
        std::fill(buffer_.begin(), buffer_.end(), t == kBase ? 1.0f : __builtin_nanf(""));
      else
        to_float(l_.dtype, l_.row(t) + from * item_size(l_.dtype), buffer_.data(), n);
      task_ = t;
      from_ = from;
    }
    return buffer_.data();
  }

 private:
  const Rows l_;
  int64_t task_ = kBad - 1, from_ = 0;
  std::vector<float> buffer_;
};

Tensor scale_rows(const Rows& x, const Rows& l, const Groups& groups, const RowKernels& kernels, torch::headeronly::ScalarType dtype) {
  Tensor out = empty({x.rows, x.cols}, dtype);
  char* y_ptr = static_cast<char*>(out.data_ptr());
  int64_t N = x.cols, row_bytes = N * item_size(x.dtype);
  if (N == 0)
    return out;
  torch::stable::parallel_for(0, x.rows, std::max<int64_t>(1, kGrain / N), [&](int64_t begin, int64_t end) {
    Scales scales(l);
    for (int64_t m = begin; m < end; m++) {
      int64_t t = groups.task(m / groups.per);
      char* y = y_ptr + m * row_bytes;
      if (t == kBad)
        fill_nan(x.dtype, y, N);
      else if (t == kBase && kernels.identity)
        std::memcpy(y, x.row(m), row_bytes);
      else
        kernels.forward(x.dtype, x.row(m), scales.get(t, 0, N), y, N);
    }
  });
  return out;
}

// Up to kChunk rows of one task, `first` counting that task's own rows. The sum goes straight to dl where the task has one chunk.
struct Chunk {
  int64_t task, first_group, first, rows, partial;
};

// Groups stably sorted by task, base and bad last, cut into chunks: what a sum adds does not depend on the other tasks' rows.
struct Schedule {
  std::vector<int64_t> order;      // groups
  std::vector<Chunk> chunks;
  std::vector<int64_t> partials;   // per task its first row in the partial sums; the last entry is their number
  std::vector<int64_t> num_chunks; // per task

  explicit Schedule(const Groups& groups) : order(groups.count), num_chunks(groups.num_tasks) {
    int64_t T = groups.num_tasks, partial = 0;
    std::vector<int64_t> start(T + 3);
    auto bucket = [&](int64_t g) {
      int64_t t = groups.task(g);
      return t >= 0 ? t : T - 1 - t; // base T, bad T + 1
    };
    for (int64_t g = 0; g < groups.count; g++)
      start[bucket(g) + 1]++;
    for (int64_t b = 0; b < T + 2; b++)
      start[b + 1] += start[b];
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t g = 0; g < groups.count; g++)
      order[next[bucket(g)]++] = g;
    partials.reserve(T + 1);
    for (int64_t b = 0; b < T + 2; b++) {
      int64_t rows = (start[b + 1] - start[b]) * groups.per, count = (rows + kChunk - 1) / kChunk;
      bool summed = b < T && count > 1;
      for (int64_t c = 0; c < count; c++)
        chunks.push_back({b < T ? b : T - 1 - b, start[b], c * kChunk, std::min(kChunk, rows - c * kChunk), summed ? partial + c : -1});
      if (b < T) {
        num_chunks[b] = count;
        partials.push_back(partial);
        partial += summed ? count : 0;
      }
    }
    partials.push_back(partial);
  }
};

} // namespace

Tensor ia3_scale(
    const Tensor& x,
    const Tensor& ia3_l,
    const std::optional<Tensor>& task_ids,
    const std::optional<std::string>& activation) {
  const char* op = "ia3_scale";
  const RowKernels& kernels = find_kernels(op, activation);
  Rows rows = float_rows(op, "x", x), l = check_table(op, ia3_l, rows.cols);
  return scale_rows(rows, l, check_groups(op, task_ids, l.rows, rows.rows), kernels, x.scalar_type());
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
  const RowKernels& kernels = find_kernels(op, activation);
  Rows grad = float_rows(op, "dy", dy), in = float_rows(op, "z", z), l = check_table(op, ia3_l, in.cols);
  STD_TORCH_CHECK(
      grad.rows == in.rows && grad.cols == in.cols, op, ": dy must have z's shape ", shape_of(z), ", got ", shape_of(dy));
  STD_TORCH_CHECK(grad.dtype == in.dtype, op, ": dy must have z's dtype, got ", torch::headeronly::toString(dy.scalar_type()));
  Groups groups = check_groups(op, task_ids, l.rows, in.rows);
  if (!need_dl && (kernels.identity || !need_dz)) // dz = dy * l does not read z
    return {need_dz ? scale_rows(grad, l, groups, kernels, z.scalar_type()) : empty({0}, z.scalar_type()), empty({0}, ScalarType::Float)};

  int64_t N = in.cols, size = item_size(in.dtype), num_blocks = (N + kBlock - 1) / kBlock;
  Tensor dz_out = need_dz ? empty({in.rows, N}, z.scalar_type()) : empty({0}, z.scalar_type());
  Tensor dl_out = need_dl ? empty({l.rows, N}, ScalarType::Float) : empty({0}, ScalarType::Float);
  char* dz_ptr = static_cast<char*>(dz_out.data_ptr());
  float* dl_ptr = static_cast<float*>(dl_out.data_ptr());
  if (N == 0)
    return {dz_out, dl_out};
  Schedule schedule(groups);
  std::vector<float> partials(need_dl ? schedule.partials.back() * N : 0);

  int64_t items = schedule.chunks.size() * num_blocks;
  int64_t per_item = in.rows * N / std::max<int64_t>(1, items);
  torch::stable::parallel_for(0, items, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, per_item)), [&](int64_t begin, int64_t end) {
    alignas(64) float dl_scratch[kBlock], dz_scratch[kBlock];
    Scales scales(l);
    for (int64_t item = begin; item < end; item++) {
      const Chunk& chunk = schedule.chunks[item / num_blocks];
      int64_t from = item % num_blocks * kBlock, width = std::min(kBlock, N - from);
      float* dl = dl_scratch;
      if (need_dl && chunk.task >= 0)
        dl = (chunk.partial < 0 ? dl_ptr + chunk.task * N : partials.data() + chunk.partial * N) + from;
      std::fill_n(dl, width, 0.0f);
      const float* scale = scales.get(chunk.task, from, width);
      for (int64_t i = chunk.first; i < chunk.first + chunk.rows; i++) {
        int64_t m = schedule.order[chunk.first_group + i / groups.per] * groups.per + i % groups.per;
        void* dz = need_dz ? static_cast<void*>(dz_ptr + (m * N + from) * size) : dz_scratch;
        kernels.backward(in.dtype, grad.row(m) + from * size, in.row(m) + from * size, scale, dz, dl, width);
      }
    }
  });
  if (need_dl)
    torch::stable::parallel_for(0, l.rows, std::max<int64_t>(1, kGrain / N), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        float* dl = dl_ptr + t * N;
        if (schedule.num_chunks[t] != 1)
          std::fill_n(dl, N, 0.0f);
        const float* partial = partials.data() + schedule.partials[t] * N;
        for (int64_t p = schedule.partials[t]; p < schedule.partials[t + 1]; p++, partial += N)
          for (int64_t n = 0; n < N; n++)
            dl[n] += partial[n];
      }
    });
  return {dz_out, dl_out};
}

} // namespace peft_ops
