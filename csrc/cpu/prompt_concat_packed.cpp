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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> packed_layout(
    const Tensor& tokens,
    const Tensor& cu_seqlens_in,
    const Tensor& prompts,
    const std::optional<Tensor>& task_ids,
    const std::optional<Tensor>& prompt_lengths,
    const std::optional<Tensor>& labels_in,
    int64_t num_rows,
    bool after_bos) {
  const char* op = "packed_layout";
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(tokens.dim() >= 1, op, ": tokens must be [total] or [total, E], got shape ", shape_of(tokens));
  STD_TORCH_CHECK(prompts.dim() == 3, op, ": prompts must be 3-D, got shape ", shape_of(prompts));
  STD_TORCH_CHECK(num_rows >= 0 && num_rows < (int64_t(1) << 31), op, ": num_rows must lie in [0, 2**31), got ", num_rows);
  Ids cu_seqlens = int_ids(op, "cu_seqlens", cu_seqlens_in);
  int64_t B = cu_seqlens.size - 1, total = tokens.size(0), num_tasks = prompts.size(0), P = prompts.size(1);
  STD_TORCH_CHECK(B >= 0, op, ": cu_seqlens must have B + 1 entries, got none");
  Ids ids = task_ids ? int_ids(op, "task_ids", *task_ids) : Ids{};
  Ids lengths = prompt_lengths ? int_ids(op, "prompt_lengths", *prompt_lengths) : Ids{};
  STD_TORCH_CHECK(!task_ids || ids.size == B, op, ": task_ids must have ", B, " entries, got ", ids.size);
  STD_TORCH_CHECK(
      !prompt_lengths || lengths.size == num_tasks, op, ": prompt_lengths must have ", num_tasks, " entries, got ", lengths.size);
  Integers labels = check_integers(op, "labels", labels_in, {total});

  std::vector<int64_t> offsets(B + 1); // read once: what is checked is what is used
  bool wrong = false;
  for (int64_t b = 0; b <= B; b++) {
    offsets[b] = cu_seqlens[b];
    wrong |= b == 0 ? offsets[b] != 0 : offsets[b] < offsets[b - 1];
  }
  wrong |= offsets[B] > total;
  Tensor layout_out = empty({B + 1, 4}, ScalarType::Int), cu_out = empty({B + 1}, ScalarType::Int);
  int32_t* layout = static_cast<int32_t*>(layout_out.data_ptr());
  int32_t* cu = static_cast<int32_t*>(cu_out.data_ptr());
  int64_t row = 0;
  cu[0] = 0;
  for (int64_t b = 0; b < B; b++) {
    int64_t id = task_ids ? ids[b] : 0;
    if (wrong || (task_ids && (id < kBase || id >= num_tasks)))
      id = kBad;
    int64_t length = id < 0 ? 0 : prompt_lengths && num_tasks > 0 ? std::clamp<int64_t>(lengths[id], 0, P) : P;
    int64_t start = std::clamp<int64_t>(offsets[b], 0, total);
    int64_t count = std::max<int64_t>(0, std::clamp<int64_t>(offsets[b + 1], 0, total) - start);
    row = std::min(row + count + length, num_rows);
    cu[b + 1] = int32_t(row);
    const int64_t fields[] = {id, start, std::min<int64_t>(count, after_bos), length};
    std::copy(fields, fields + 4, layout + b * 4);
  }
  const int32_t tail[] = {int32_t(wrong ? kBad : kBase), 0, 0, 0};
  std::copy(tail, tail + 4, layout + B * 4);

  Tensor positions_out = empty({num_rows}, ScalarType::Long), map_out = empty({num_rows}, ScalarType::Long);
  Tensor labels_out = labels_in ? empty({num_rows}, labels_in->scalar_type()) : empty({0}, ScalarType::Long);
  int64_t *positions = static_cast<int64_t*>(positions_out.data_ptr()), *map = static_cast<int64_t*>(map_out.data_ptr());
  char* labels_ptr = static_cast<char*>(labels_out.data_ptr());
  auto write = [&](int64_t i, int64_t position, int64_t source) {
    positions[i] = position;
    map[i] = source;
    if (labels_in)
      labels.set(labels_ptr, i, source < 0 ? -100 : labels[source]);
  };
  torch::stable::parallel_for(0, num_rows, kGrain, [&](int64_t begin, int64_t end) {
    int64_t b = std::upper_bound(cu, cu + B + 1, begin) - cu - 1; // the last that starts there: those before it are empty
    for (int64_t i = begin; i < end; i++) {
      while (b < B && i >= cu[b + 1])
        b++;
      if (b == B) {
        write(i, 0, -1);
        continue;
      }
      const int32_t* fields = layout + b * 4;
      int64_t slot = i - cu[b], before = fields[2], length = fields[3];
      if (slot < before)
        write(i, slot, fields[1] + slot);
      else
        write(i, slot, slot < before + length ? -1 : fields[1] + slot - length);
    }
  });
  return {layout_out, cu_out, positions_out, labels_out, map_out};
}

Tensor prompt_concat_packed(
    const Tensor& tokens,
    const std::optional<Tensor>& embedding,
    const Tensor& prompts_in,
    const Tensor& layout,
    const Tensor& cu_seqlens,
    int64_t num_rows,
    double embed_scale) {
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
  float scale = embedding ? float(embed_scale) : 1.0f;
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
          writer.write(i, table.dtype, table.row(token), scale);
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
