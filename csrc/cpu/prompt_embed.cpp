// out[m] = embedding[ids[m]] below V, prompts[t, ids[m] - V] from V on, NaN where that is none, and the prompts' gradient.

#include "embeddings.h"

namespace peft_ops {

std::tuple<Tensor, Tensor> prompt_embed(
    const Tensor& input_ids,
    const Tensor& embedding,
    const Tensor& prompts_in,
    const std::optional<Tensor>& task_ids,
    const std::optional<Tensor>& prompt_lengths,
    double embed_scale,
    const std::optional<Tensor>& types,
    const std::optional<Tensor>& type_embedding,
    const std::optional<Tensor>& positions,
    const std::optional<Tensor>& position_embedding) {
  const char* op = "prompt_embed";
  STD_TORCH_CHECK(input_ids.dim() == 2, op, ": input_ids must be [B, S], got shape ", shape_of(input_ids));
  Ids ids = int_ids(op, "input_ids", input_ids);
  Rows table = float_rows(op, "embedding", embedding);
  Cube prompts = float_cube(op, "prompts", prompts_in);
  int64_t B = input_ids.size(0), S = input_ids.size(1), V = table.rows, E = table.cols;
  int64_t num_tasks = prompts.size0, P = prompts.size1;
  STD_TORCH_CHECK(prompts.cols == E, op, ": prompts must have ", E, " columns as the embeddings have, got shape ", shape_of(prompts_in));
  STD_TORCH_CHECK(task_ids || num_tasks > 0, op, ": prompts must have a task where task_ids is None, got none");
  Ids tasks = task_ids ? int_ids(op, "task_ids", *task_ids) : Ids{};
  STD_TORCH_CHECK(!task_ids || tasks.size == B, op, ": task_ids must be one per sequence, ", B, ", got ", tasks.size);
  Ids lengths = prompt_lengths ? int_ids(op, "prompt_lengths", *prompt_lengths) : Ids{};
  STD_TORCH_CHECK(
      !prompt_lengths || lengths.size == num_tasks,
      op, ": prompt_lengths must be one per task, ", num_tasks, ", got ", lengths.size);
  Tensor out = empty({B, S, E}, embedding.scalar_type());
  Tensor rows = empty({B, S}, torch::headeronly::ScalarType::Int);
  int32_t* row = static_cast<int32_t*>(rows.data_ptr());
  SlotWriter writer{
      static_cast<char*>(out.data_ptr()), E, table.dtype,
      check_added(op, "types", types, "type_embedding", type_embedding, B * S, E),
      check_added(op, "positions", positions, "position_embedding", position_embedding, B * S, E)};
  torch::stable::parallel_for(0, B * S, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, E)), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) {
      int64_t id = ids[m], task = tasks.data ? tasks[m / S] : 0;
      bool known = task >= kBase && task < num_tasks;
      int64_t length = 0;
      if (known && task >= 0)
        length = lengths.data ? std::clamp<int64_t>(lengths[task], 0, P) : P;
      if (known && id >= 0 && id < V) {
        row[m] = num_tasks * P;
        writer.write(m, table.dtype, table.row(id), float(embed_scale));
      } else if (id >= V && id - V < length) {
        row[m] = task * P + id - V;
        writer.write(m, prompts.dtype, prompts.row(task, id - V));
      } else {
        row[m] = num_tasks * P + 1;
        writer.write_nan(m);
      }
    }
  });
  return {out, rows};
}

Tensor prompt_embed_backward(const Tensor& dout_in, const Tensor& rows, int64_t num_tasks, int64_t P) {
  const char* op = "prompt_embed_backward";
  Cube dout = float_cube(op, "dout", dout_in);
  STD_TORCH_CHECK(num_tasks >= 0 && P >= 0, op, ": num_tasks and P must not be negative, got ", num_tasks, " and ", P);
  STD_TORCH_CHECK(
      rows.dim() == 2 && rows.size(0) == dout.size0 && rows.size(1) == dout.size1,
      op, ": rows must be [", dout.size0, ", ", dout.size1, "], got ", shape_of(rows));
  Ids ids = int_ids(op, "rows", rows);
  std::vector<int64_t> bucket(ids.size);
  for (int64_t m = 0; m < ids.size; m++) {
    int64_t row = ids[m];
    bucket[m] = row >= 0 && row < num_tasks * P ? row : -1;
  }
  return sum_slots(dout, bucket, num_tasks, P);
}

} // namespace peft_ops
