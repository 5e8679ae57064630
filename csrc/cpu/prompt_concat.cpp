// out[b] = [front spare slots | tokens before | prompt | the other tokens | the other spare slots], and the prompts' gradient.

#include "embeddings.h"

namespace peft_ops {

namespace {

// One row of the layout: peft_ops.reference.prompt_layout has the meaning.
struct RowLayout {
  int64_t id, front, before, length;
};

// Read once and checked: what the layout says is an address, and another thread may write to it meanwhile.
std::vector<RowLayout> read_layout(const char* op, const Tensor& t, int64_t B, int64_t S, int64_t num_tasks, int64_t P) {
  STD_TORCH_CHECK(
      t.scalar_type() == torch::headeronly::ScalarType::Int,
      op, ": layout must be int32, got ", torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == B && t.size(1) == 4, op, ": layout must be [", B, ", 4], got ", shape_of(t));
  const volatile int32_t* data = static_cast<const int32_t*>(t.data_ptr());
  int64_t row_stride = t.stride(0), col_stride = t.stride(1);
  std::vector<RowLayout> layout(B);
  for (int64_t b = 0; b < B; b++) {
    auto column = [&](int64_t c) -> int64_t { return data[b * row_stride + c * col_stride]; };
    RowLayout r = layout[b] = {column(0), column(1), column(2), column(3)};
    bool inside = r.id >= kBad && r.id < num_tasks && r.front >= 0 && r.before >= 0 && r.before <= S && r.length >= 0 &&
        r.front + r.length <= P && (r.id >= 0 || r.length == 0);
    STD_TORCH_CHECK(
        inside, op, ": layout must stay inside ", num_tasks, " tasks, ", S, " tokens and ", P, " slots, got ",
        r.id, ", ", r.front, ", ", r.before, ", ", r.length, " in row ", b);
  }
  return layout;
}

// Where token rows come from: an embedding table and ids, or embeddings.
struct Tokens {
  Ids ids;       // of [B, S]; its data is null where the embeddings were given
  Rows table;
  Cube embedded;
  int64_t B, S, E;
  Dtype dtype;

  // null for an id outside the table
  const char* row(int64_t b, int64_t s) const {
    if (ids.data == nullptr)
      return embedded.row(b, s);
    int64_t id = ids[b * S + s];
    return id >= 0 && id < table.rows ? table.row(id) : nullptr;
  }
};

Tokens check_tokens(const char* op, const Tensor& tokens, const std::optional<Tensor>& embedding) {
  if (!embedding) {
    Cube embedded = float_cube(op, "tokens", tokens);
    return {{}, {}, embedded, embedded.size0, embedded.size1, embedded.cols, embedded.dtype};
  }
  Rows table = float_rows(op, "embedding", *embedding);
  STD_TORCH_CHECK(tokens.dim() == 2, op, ": tokens must be [B, S] where there is an embedding, got shape ", shape_of(tokens));
  Ids ids = int_ids(op, "tokens", tokens);
  return {ids, table, {}, tokens.size(0), tokens.size(1), table.cols, table.dtype};
}

} // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prompt_layout(
    const Tensor& tokens,
    const Tensor& prompts,
    const std::optional<Tensor>& task_ids,
    const std::optional<Tensor>& prompt_lengths,
    const std::optional<Tensor>& attention_mask,
    const std::optional<Tensor>& labels_in,
    bool left,
    bool after_bos) {
  const char* op = "prompt_layout";
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(tokens.dim() >= 2, op, ": tokens must be [B, S] or [B, S, E], got shape ", shape_of(tokens));
  STD_TORCH_CHECK(prompts.dim() == 3, op, ": prompts must be 3-D, got shape ", shape_of(prompts));
  int64_t B = tokens.size(0), S = tokens.size(1), num_tasks = prompts.size(0), P = prompts.size(1);
  Ids ids = task_ids ? int_ids(op, "task_ids", *task_ids) : Ids{};
  Ids lengths = prompt_lengths ? int_ids(op, "prompt_lengths", *prompt_lengths) : Ids{};
  STD_TORCH_CHECK(!task_ids || ids.size == B, op, ": task_ids must have ", B, " entries, got ", ids.size);
  STD_TORCH_CHECK(
      !prompt_lengths || lengths.size == num_tasks, op, ": prompt_lengths must have ", num_tasks, " entries, got ", lengths.size);
  Integers mask = check_integers(op, "attention_mask", attention_mask, {B, S}, true);
  Integers labels = check_integers(op, "labels", labels_in, {B, S});
  int64_t L = P + S;
  Tensor layout_out = empty({B, 4}, ScalarType::Int), positions_out = empty({B, L}, ScalarType::Long);
  Tensor mask_out = empty({B, L}, attention_mask ? attention_mask->scalar_type() : ScalarType::Long);
  Tensor map_out = empty({B, L}, ScalarType::Long);
  Tensor labels_out = labels_in ? empty({B, L}, labels_in->scalar_type()) : empty({0}, ScalarType::Long);
  int32_t* layout = static_cast<int32_t*>(layout_out.data_ptr());
  int64_t* positions = static_cast<int64_t*>(positions_out.data_ptr());
  int64_t* map = static_cast<int64_t*>(map_out.data_ptr());
  char *mask_ptr = static_cast<char*>(mask_out.data_ptr()), *labels_ptr = static_cast<char*>(labels_out.data_ptr());
  torch::stable::parallel_for(0, B, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, L)), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      int64_t id = task_ids ? ids[b] : 0;
      if (task_ids && (id < kBase || id >= num_tasks))
        id = kBad;
      int64_t length = id < 0 ? 0 : prompt_lengths && num_tasks > 0 ? std::clamp<int64_t>(lengths[id], 0, P) : P;
      int64_t front = left ? P - length : 0, before = after_bos && S > 0;
      if (mask.data != nullptr && S > 0) {
        int64_t first = 0;
        while (first < S && mask[b * S + first] == 0)
          first++;
        before = first < S ? first + after_bos : left ? S : 0;
      }
      const int64_t row[] = {id, front, before, length};
      std::copy(row, row + 4, layout + b * 4);
      int64_t real = 0;
      for (int64_t j = 0; j < L; j++) {
        int64_t slot = j - front, source = slot < before ? slot : slot - length, i = b * L + j;
        bool prompt = slot >= before && slot < before + length, token = !prompt && source >= 0 && source < S;
        int64_t attended = prompt ? 1 : !token ? 0 : mask.data == nullptr ? 1 : mask[b * S + source];
        bool text = token && attended != 0;
        mask.set(mask_ptr, i, attended);
        positions[i] = attended != 0 ? real++ : 0;
        map[i] = text ? source : -1;
        if (labels_in)
          labels.set(labels_ptr, i, text ? labels[b * S + source] : -100);
      }
    }
  });
  return {layout_out, mask_out, positions_out, labels_out, map_out};
}

Tensor prompt_concat(
    const Tensor& tokens_in,
    const std::optional<Tensor>& embedding,
    const Tensor& prompts_in,
    const Tensor& layout_in,
    double embed_scale,
    const std::optional<Tensor>& types,
    const std::optional<Tensor>& type_embedding,
    const std::optional<Tensor>& positions,
    const std::optional<Tensor>& position_embedding) {
  const char* op = "prompt_concat";
  Tokens tokens = check_tokens(op, tokens_in, embedding);
  Cube prompts = float_cube(op, "prompts", prompts_in);
  int64_t B = tokens.B, S = tokens.S, E = tokens.E, P = prompts.size1, L = P + S;
  STD_TORCH_CHECK(prompts.cols == E, op, ": prompts must have ", E, " columns as the embeddings have, got shape ", shape_of(prompts_in));
  std::vector<RowLayout> layout = read_layout(op, layout_in, B, S, prompts.size0, P);
  float scale = embedding ? float(embed_scale) : 1.0f;
  Tensor out = empty({B, L, E}, (embedding ? *embedding : tokens_in).scalar_type());
  SlotWriter writer{
      static_cast<char*>(out.data_ptr()), E, tokens.dtype,
      check_added(op, "types", types, "type_embedding", type_embedding, B * L, E),
      check_added(op, "positions", positions, "position_embedding", position_embedding, B * L, E)};
  if (E == 0)
    return out;
  torch::stable::parallel_for(0, B * L, std::max<int64_t>(1, kGrain / E), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const RowLayout& r = layout[i / L];
      int64_t slot = i % L - r.front;
      int64_t source = slot < r.before ? slot : slot - r.length;
      if (r.id == kBad)
        writer.write_nan(i);
      else if (slot >= r.before && slot < r.before + r.length)
        writer.write(i, prompts.dtype, prompts.row(r.id, slot - r.before));
      else if (source < 0 || source >= S)
        writer.write(i, tokens.dtype, nullptr);
      else if (const char* from = tokens.row(i / L, source))
        writer.write(i, tokens.dtype, from, scale);
      else
        writer.write_nan(i);
    }
  });
  return out;
}

Tensor prompt_concat_backward(const Tensor& dout_in, const Tensor& layout_in, int64_t num_tasks, int64_t P) {
  const char* op = "prompt_concat_backward";
  Cube dout = float_cube(op, "dout", dout_in);
  int64_t B = dout.size0, L = dout.size1;
  STD_TORCH_CHECK(num_tasks >= 0, op, ": num_tasks must not be negative, got ", num_tasks);
  STD_TORCH_CHECK(P >= 0 && P <= L, op, ": P must lie in [0, ", L, "], got ", P);
  std::vector<RowLayout> layout = read_layout(op, layout_in, B, L - P, num_tasks, P);
  std::vector<int64_t> bucket(B * L, -1);
  for (int64_t b = 0; b < B; b++)
    for (int64_t p = 0; p < layout[b].length; p++)
      bucket[b * L + layout[b].front + layout[b].before + p] = layout[b].id * P + p;
  return sum_slots(dout, bucket, num_tasks, P);
}

} // namespace peft_ops
