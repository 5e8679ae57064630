// The CPU operators, as bindings.cpp registers them.

#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace peft_ops {

using torch::stable::Tensor;

// the position of the first id outside [low, end), or -1
int64_t first_bad_id(const Tensor& ids, int64_t low, int64_t end);

// the position of the first offset that does not follow from those before it, or -1: they ascend from 0 to at most total in
// steps of at most max_seqlen
int64_t first_bad_offset(const Tensor& cu_seqlens, int64_t total, int64_t max_seqlen);

Tensor ia3_glu(
    const Tensor& gate,
    const Tensor& up,
    const Tensor& ia3_l,
    const std::optional<Tensor>& task_ids,
    const std::optional<std::string>& activation);

std::tuple<Tensor, Tensor, Tensor> ia3_glu_backward(
    const Tensor& dh,
    const Tensor& gate,
    const Tensor& up,
    const Tensor& ia3_l,
    const std::optional<Tensor>& task_ids,
    const std::optional<std::string>& activation,
    bool need_dx,
    bool need_dl);

Tensor ia3_scale(
    const Tensor& x,
    const Tensor& ia3_l,
    const std::optional<Tensor>& task_ids,
    const std::optional<std::string>& activation);

std::tuple<Tensor, Tensor> ia3_scale_backward(
    const Tensor& dy,
    const Tensor& z,
    const Tensor& ia3_l,
    const std::optional<Tensor>& task_ids,
    const std::optional<std::string>& activation,
    bool need_dz,
    bool need_dl);

// layout, attention_mask, position_ids, labels, token_map
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prompt_layout(
    const Tensor& tokens,
    const Tensor& prompts,
    const std::optional<Tensor>& task_ids,
    const std::optional<Tensor>& prompt_lengths,
    const std::optional<Tensor>& attention_mask,
    const std::optional<Tensor>& labels,
    bool left,
    bool after_bos);

Tensor prompt_concat(
    const Tensor& tokens,
    const std::optional<Tensor>& embedding,
    const Tensor& prompts,
    const Tensor& layout,
    double scale,
    const std::optional<Tensor>& types,
    const std::optional<Tensor>& type_embedding,
    const std::optional<Tensor>& positions,
    const std::optional<Tensor>& position_embedding);

Tensor prompt_concat_backward(const Tensor& dout, const Tensor& layout, int64_t num_tasks, int64_t P);

// layout, the new cu_seqlens, position_ids, labels, token_map
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> packed_layout(
    const Tensor& tokens,
    const Tensor& cu_seqlens,
    const Tensor& prompts,
    const std::optional<Tensor>& task_ids,
    const std::optional<Tensor>& prompt_lengths,
    const std::optional<Tensor>& labels,
    int64_t num_rows,
    bool after_bos);

Tensor prompt_concat_packed(
    const Tensor& tokens,
    const std::optional<Tensor>& embedding,
    const Tensor& prompts,
    const Tensor& layout,
    const Tensor& cu_seqlens,
    int64_t num_rows,
    double scale);

Tensor prompt_concat_packed_backward(
    const Tensor& dout, const Tensor& layout, const Tensor& cu_seqlens, int64_t num_tasks, int64_t P);

std::tuple<Tensor, Tensor> prompt_embed(
    const Tensor& input_ids,
    const Tensor& embedding,
    const Tensor& prompts,
    const std::optional<Tensor>& task_ids,
    const std::optional<Tensor>& prompt_lengths,
    double scale,
    const std::optional<Tensor>& types,
    const std::optional<Tensor>& type_embedding,
    const std::optional<Tensor>& positions,
    const std::optional<Tensor>& position_embedding);

Tensor prompt_embed_backward(const Tensor& dout, const Tensor& rows, int64_t num_tasks, int64_t P);

} // namespace peft_ops
