// For each packed sequence [tokens before | prompt | the other tokens], zeros in the tail, and the prompts' gradient.

#include "embeddings.h"

namespace peft_ops {

namespace {

// One sequence: peft_ops.reference.packed_layout has the meaning. It covers rows [row, end).
struct Sequence {
  int64_t id, begin, before, length, row, end;
};

// Read once and checked: what it says is an address. The last one is the tail, which no sequence covers.
std::vector<Sequence> read_sequences(
    const char* op, const Tensor& layout, const Tensor& cu_seqlens, int64_t num_rows, int64_t num_tasks, int64_t P) {
  Ids fields = int_ids(op, "layout", layout), offsets = int_ids(op, "cu_seqlens", cu_seqlens);
  int64_t B = offsets.size - 1;
  STD_TORCH_CHECK(B >= 0, op, ": cu_seqlens must have B + 1 entries, got none");
  STD_TORCH_CHECK(
      layout.dim() == 2 && layout.size(0) == B + 1 && layout.size(1) == 4,
      op, ": layout must be [", B + 1, ", 4], got ", shape_of(layout));
  std::vector<Sequence> sequences(B + 1);
  int64_t row = 0;
  for (int64_t b = 0; b <= B; b++) {
    int64_t end = b < B ? offsets[b + 1] : num_rows;
    Sequence s = sequences[b] = {fields[b * 4], fields[b * 4 + 1], fields[b * 4 + 2], fields[b * 4 + 3], row, end};
    bool inside = s.id >= kBad && s.id < num_tasks && s.begin >= 0 && s.before >= 0 && s.length >= 0 && s.length <= P &&
        (s.id >= 0 || s.length == 0) && s.end >= row && s.end <= num_rows;
    STD_TORCH_CHECK(
        inside, op, ": layout must stay inside ", num_tasks, " tasks, ", P, " slots and ", num_rows, " rows, got ",
        s.id, ", ", s.begin, ", ", s.before, ", ", s.length, " in sequence ", b, " of rows ", row, " to ", end);
    row = end;
  }
  return sequences;
}

} // namespace

Tensor prompt_concat_packed(
    const Tensor& tokens,
    const std::optional<Tensor>& embedding,
    const Tensor& prompts_in,
    const Tensor& layout,
    const Tensor& cu_seqlens,
    int64_t num_rows) {
  const char* op = "prompt_concat_packed";
  Ids ids = embedding ? int_ids(op, "tokens", tokens) : Ids{};
  Rows table = embedding ? float_rows(op, "embedding", *embedding) : float_rows(op, "tokens", tokens);
  Cube prompts = float_cube(op, "prompts", prompts_in);
  int64_t E = table.cols, total = embedding ? ids.size : table.rows;
  STD_TORCH_CHECK(prompts.cols == E, op, ": prompts must have ", E, " columns as the embeddings have, got shape ", shape_of(prompts_in));
  STD_TORCH_CHECK(num_rows >= 0, op, ": num_rows must not be negative, got ", num_rows);
  std::vector<Sequence> sequences = read_sequences(op, layout, cu_seqlens, num_rows, prompts.size0, prompts.size1);
  Tensor out = empty({num_rows, E}, (embedding ? *embedding : tokens).scalar_type());
  SlotWriter writer{static_cast<char*>(out.data_ptr()), E, table.dtype, {}, {}};
  torch::stable::parallel_for(0, num_rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, E)), [&](int64_t begin, int64_t end) {
    auto after = [](int64_t row, const Sequence& s) { return row < s.end; };
    auto s = std::upper_bound(sequences.begin(), sequences.end(), begin, after);
    for (int64_t i = begin; i < end; i++) {
      while (i >= s->end)
        s++;
      int64_t slot = i - s->row;
      if (s->id == kBad) {
        writer.write_nan(i);
      } else if (slot >= s->before && slot < s->before + s->length) {
        writer.write(i, prompts.dtype, prompts.row(s->id, slot - s->before));
      } else if (s + 1 == sequences.end()) {
        writer.write(i, table.dtype, nullptr);
      } else {
        int64_t token = s->begin + slot - (slot < s->before ? 0 : s->length);
        if (embedding)
          token = token < total ? ids[token] : -1;
        if (token >= 0 && token < table.rows)
          writer.write(i, table.dtype, table.row(token));
        else
          writer.write_nan(i);
      }
    }
  });
  return out;
}

Tensor prompt_concat_packed_backward(
    const Tensor& dout_in, const Tensor& layout, const Tensor& cu_seqlens, int64_t num_tasks, int64_t P) {
  const char* op = "prompt_concat_packed_backward";
  Cube dout = float_cube(op, "dout", dout_in); // [1, num_rows, E]
  STD_TORCH_CHECK(dout.size0 == 1, op, ": dout must be [1, num_rows, E], got shape ", shape_of(dout_in));
  STD_TORCH_CHECK(num_tasks >= 0 && P >= 0, op, ": num_tasks and P must not be negative, got ", num_tasks, " and ", P);
  std::vector<int64_t> bucket(dout.size1, -1);
  for (const Sequence& s : read_sequences(op, layout, cu_seqlens, dout.size1, num_tasks, P))
    for (int64_t p = 0; p < s.length && s.row + s.before + p < s.end; p++)
      bucket[s.row + s.before + p] = s.id * P + p;
  return sum_slots(dout, bucket, num_tasks, P);
}

} // namespace peft_ops
