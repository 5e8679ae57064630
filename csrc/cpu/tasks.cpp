// Checks of a table and its ids, and the two ways through the rows of many tasks.

#include "tasks.h"

namespace peft_ops {

namespace {

constexpr int64_t kChunk = 256; // rows of one task that are summed before their sum joins the others

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
    std::vector<int64_t> start(T + 3), bucket(groups.count);
    // an id is read once: what counted a group also places it, whatever another thread writes to the ids meanwhile
    for (int64_t g = 0; g < groups.count; g++) {
      int64_t t = groups.task(g);
      bucket[g] = t >= 0 ? t : T - 1 - t; // base T, bad T + 1
      start[bucket[g] + 1]++;
    }
    for (int64_t b = 0; b < T + 2; b++)
      start[b + 1] += start[b];
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t g = 0; g < groups.count; g++)
      order[next[bucket[g]]++] = g;
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

Rows check_table(const char* op, const char* arg, const Tensor& ia3_l, int64_t N) {
  Rows l = float_rows(op, "ia3_l", ia3_l);
  STD_TORCH_CHECK(l.cols == N, op, ": ia3_l must have ", N, " columns as ", arg, " has, got shape ", shape_of(ia3_l));
  return l;
}

Groups check_groups(const char* op, const char* arg, const std::optional<Tensor>& task_ids, int64_t num_tasks, int64_t M) {
  if (!task_ids) {
    STD_TORCH_CHECK(num_tasks > 0 || M == 0, op, ": ia3_l must have a row where task_ids is None, got none");
    return {{}, num_tasks, M > 0, M};
  }
  Ids ids = int_ids(op, "task_ids", *task_ids);
  STD_TORCH_CHECK(
      ids.size > 0 ? M % ids.size == 0 : M == 0,
      op, ": task_ids must divide the ", M, " rows of ", arg, ", got ", ids.size, " ids");
  return {ids, num_tasks, ids.size, ids.size > 0 ? M / ids.size : 0};
}

Rows check_like(const char* op, const char* arg, const Tensor& t, const char* like_arg, const Rows& like) {
  Rows rows = batch_rows(op, arg, t);
  STD_TORCH_CHECK(
      rows.rows == like.rows && rows.cols == like.cols,
      op, ": ", arg, " must have ", like_arg, "'s shape [", like.rows, ", ", like.cols, "], got ", shape_of(t));
  STD_TORCH_CHECK(
      rows.dtype == like.dtype, op, ": ", arg, " must have ", like_arg, "'s dtype, got ", torch::headeronly::toString(t.scalar_type()));
  return rows;
}

const float* Scales::get(int64_t t, int64_t from, int64_t n) {
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

void for_rows(const Rows& l, const Groups& groups, int64_t M, int64_t N, const std::function<void(int64_t, int64_t, Scales&)>& row) {
  if (N == 0)
    return;
  torch::stable::parallel_for(0, M, std::max<int64_t>(1, kGrain / N), [&](int64_t begin, int64_t end) {
    Scales scales(l);
    for (int64_t m = begin; m < end; m++)
      row(m, groups.task(m / groups.per), scales);
  });
}

Tensor sum_by_task(
    const Rows& l, const Groups& groups, int64_t M, int64_t N, bool need_dl, const std::function<void(const Part&)>& add) {
  Tensor out = need_dl ? empty({l.rows, N}, torch::headeronly::ScalarType::Float) : empty({0}, torch::headeronly::ScalarType::Float);
  float* out_ptr = static_cast<float*>(out.data_ptr());
  if (N == 0)
    return out;
  Schedule schedule(groups);
  std::vector<float> partials(need_dl ? schedule.partials.back() * N : 0);
  int64_t num_blocks = (N + kBlock - 1) / kBlock, items = schedule.chunks.size() * num_blocks;
  int64_t per_item = M * N / std::max<int64_t>(1, items);
  torch::stable::parallel_for(0, items, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, per_item)), [&](int64_t begin, int64_t end) {
    alignas(64) float scratch[kBlock];
    Scales scales(l);
    for (int64_t item = begin; item < end; item++) {
      const Chunk& chunk = schedule.chunks[item / num_blocks];
      int64_t from = item % num_blocks * kBlock, width = std::min(kBlock, N - from);
      float* dl = scratch;
      if (need_dl && chunk.task >= 0)
        dl = (chunk.partial < 0 ? out_ptr + chunk.task * N : partials.data() + chunk.partial * N) + from;
      std::fill_n(dl, width, 0.0f);
      const float* scale = scales.get(chunk.task, from, width);
      for (int64_t i = chunk.first; i < chunk.first + chunk.rows; i++) {
        int64_t m = schedule.order[chunk.first_group + i / groups.per] * groups.per + i % groups.per;
        add({m, from, width, scale, dl});
      }
    }
  });
  if (need_dl)
    torch::stable::parallel_for(0, l.rows, std::max<int64_t>(1, kGrain / N), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        float* dl = out_ptr + t * N;
        if (schedule.num_chunks[t] != 1)
          std::fill_n(dl, N, 0.0f);
        const float* partial = partials.data() + schedule.partials[t] * N;
        for (int64_t p = schedule.partials[t]; p < schedule.partials[t + 1]; p++, partial += N)
          for (int64_t n = 0; n < N; n++)
            dl[n] += partial[n];
      }
    });
  return out;
}

} // namespace peft_ops
