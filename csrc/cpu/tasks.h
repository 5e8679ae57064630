// Rows and their tasks: the scale row of each, and sums over a task's own rows in a fixed order.

#pragma once

#include <functional>

#include "common.h"

namespace peft_ops {

// The id groups of M rows: row m belongs to group m / per.
struct Groups {
  Ids ids; // data is null for one task that all rows have
  int64_t num_tasks, count, per;

  int64_t task(int64_t group) const {
    if (ids.data == nullptr)
      return 0;
    int64_t t = ids[group];
    return t >= kBase && t < num_tasks ? t : kBad;
  }
};

// ia3_l and task_ids beside `arg`, which is [M, N]
Rows check_table(const char* op, const char* arg, const Tensor& ia3_l, int64_t N);
Groups check_groups(const char* op, const char* arg, const std::optional<Tensor>& task_ids, int64_t num_tasks, int64_t M);
// the rows of t, which must have the shape and dtype of `like`
Rows check_like(const char* op, const char* arg, const Tensor& t, const char* like_arg, const Rows& like);

// The scale rows of one thread as fp32: a row of the table, ones for the base model, NaN for a bad id.
class Scales {
 public:
  explicit Scales(const Rows& l) : l_(l) {}

  // columns [from, from + n) of task t's row; valid until the next call
  const float* get(int64_t t, int64_t from, int64_t n);

 private:
  const Rows l_;
  int64_t task_ = kBad - 1, from_ = 0;
  std::vector<float> buffer_;
};

// row(m, t, scales) for each of M rows of N columns, on torch's threads
void for_rows(const Rows& l, const Groups& groups, int64_t M, int64_t N, const std::function<void(int64_t, int64_t, Scales&)>& row);

// A part of a row: columns [from, from + n), n <= kBlock, with their scale, and where their terms of dl are added.
struct Part {
  int64_t m, from, n;
  const float* scale;
  float* dl;
};

// add(part) for each part of M rows of N columns, on torch's threads: rows in order in chunks of 256 of a task's own, the
// chunks in order. Returns dl, fp32 [num_tasks, N], or [0] where it is not needed.
Tensor sum_by_task(
    const Rows& l, const Groups& groups, int64_t M, int64_t N, bool need_dl, const std::function<void(const Part&)>& add);

} // namespace peft_ops
