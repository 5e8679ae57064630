"""Prompt and token embeddings in one pass: [h(P); e(X)], each sequence with the prompt of its own task."""

import torch
from torch import Tensor

from peft_ops import reference
from peft_ops._backend import LazyKernels, use_triton
from peft_ops._checks import FLOATS, IDS, check_ids_in_range, check_tensor, shape
from peft_ops._library import Operator, native, use_native, use_reference
from peft_ops.reference import PromptBatch

kernels, tiles = LazyKernels("prompt_concat"), LazyKernels("tiles")


def launch_concat(tokens, embedding, prompts, task_ids, prompt_lengths, attention_mask, labels, left):
    """The five tensors of a PromptBatch (labels empty if there are none) and the layout, int32 [B, 4]. Two launches."""
    (num_tasks, P, E), (B, S) = prompts.shape, tokens.shape[:2]
    device = tokens.device
    tokens, embedding, prompts, task_ids, prompt_lengths, attention_mask, labels = (
        None if t is None else t.contiguous()
        for t in (tokens, embedding, prompts, task_ids, prompt_lengths, attention_mask, labels)
    )
    size = B, P + S
    out = torch.empty((*size, E), dtype=(tokens if embedding is None else embedding).dtype, device=device)
    mask_dtype = torch.int64 if attention_mask is None else attention_mask.dtype
    mask = torch.empty(size, dtype=mask_dtype, device=device)
    positions, token_map = (torch.empty(size, dtype=torch.int64, device=device) for _ in range(2))
    out_labels = torch.empty(
        0 if labels is None else size, dtype=torch.int64 if labels is None else labels.dtype, device=device
    )
    layout = torch.empty((B, 4), dtype=torch.int32, device=device)
    if B == 0:
        return out, mask, positions, out_labels, token_map, layout

    def bytes_of(t):  # Triton has no pointer to bool
        return t.view(torch.uint8) if t is not None and t.dtype == torch.bool else t

    with torch.cuda.device_of(tokens):
        kernels.prompt_layout_kernel[(B,)](
            task_ids, prompt_lengths, bytes_of(attention_mask), labels,
            layout, bytes_of(mask), positions, out_labels, token_map,
            S, P, num_tasks,
            HAS_IDS=task_ids is not None, HAS_LENGTHS=prompt_lengths is not None and num_tasks > 0,
            HAS_MASK=attention_mask is not None, HAS_LABELS=labels is not None, LEFT=left,
            BLOCK=min(tiles.next_power_of_2(max(P + S, 1)), 1024), num_warps=4,
        )  # fmt: skip
        if E and P + S:
            tile = tiles.prompt_concat(E)
            grid = B * tiles.cdiv(P + S, tile["BLOCK_ROWS"]), tiles.cdiv(E, tile["BLOCK_E"])
            kernels.prompt_concat_kernel[grid](
                tokens, embedding, prompts, layout, out,
                S, P, E, 0 if embedding is None else embedding.shape[0],
                HAS_TABLE=embedding is not None, **tile,
            )  # fmt: skip
    return out, mask, positions, out_labels, token_map, layout


def launch_concat_backward(dout: Tensor, layout: Tensor, num_tasks: int, P: int) -> Tensor:
    B, length, E = dout.shape
    dout, layout = dout.contiguous(), layout.contiguous()
    dprompts = torch.zeros((num_tasks, P, E), dtype=torch.float32, device=dout.device)
    if dprompts.numel() == 0 or B == 0:
        return dprompts
    ids = layout[:, 0]
    key, order = torch.where(ids >= 0, ids, num_tasks).sort(stable=True)  # base and bad sequences last, read by nobody
    start = torch.searchsorted(key, torch.arange(num_tasks + 1, device=dout.device, dtype=key.dtype)).to(torch.int32)
    tile = tiles.prompt_backward(E)
    with torch.cuda.device_of(dout):
        kernels.prompt_concat_bwd_kernel[num_tasks * P, tiles.cdiv(E, tile["BLOCK_E"])](
            dout, layout, order.to(torch.int32), start, dprompts,
            length - P, P, E,
            **tile,
        )  # fmt: skip
    return dprompts


def _check_values(tokens, embedding, task_ids, prompt_lengths, num_tasks: int, P: int) -> None:
    """IndexError for an id or a length out of range, on a CPU (a kernel writes NaN, or clamps the length)."""
    op = "prompt_concat"
    check_ids_in_range(op, task_ids, num_tasks)
    if embedding is not None:
        check_ids_in_range(op, tokens.reshape(-1), embedding.shape[0], "input_ids", low=0)
    if prompt_lengths is not None:
        check_ids_in_range(op, prompt_lengths, P + 1, "prompt_lengths", low=0)


def _prompt_concat(tokens, embedding, prompts, task_ids, prompt_lengths, attention_mask, labels, left):
    num_tasks, P, E = prompts.shape
    _check_values(tokens, embedding, task_ids, prompt_lengths, num_tasks, P)
    source = tokens if embedding is None else embedding
    widest = prompts if prompts.dtype == torch.float64 else source  # fp64 anywhere runs on plain PyTorch
    on_native = use_native("prompt_concat", widest)
    if not on_native and use_triton("prompt_concat", widest):
        return launch_concat(tokens, embedding, prompts, task_ids, prompt_lengths, attention_mask, labels, left)
    B, S = tokens.shape[:2]
    layout = reference.prompt_layout(
        task_ids, prompt_lengths, attention_mask, (B, S, num_tasks, P), left, tokens.device
    )
    if on_native:
        out = native.prompt_concat(tokens, embedding, prompts, layout)
    else:
        out = reference.concat_embeddings(tokens, embedding, prompts, layout)
    mask, positions, labels, token_map = reference.concat_metadata(layout, attention_mask, labels, S, P)
    return out, mask, positions, tokens.new_empty(0, dtype=torch.int64) if labels is None else labels, token_map, layout


def _prompt_concat_fake(tokens, embedding, prompts, task_ids, prompt_lengths, attention_mask, labels, left):
    P, E = prompts.shape[1:]
    B, S = tokens.shape[:2]
    size, device = (B, P + S), tokens.device

    def new(size, dtype):
        return torch.empty(size, dtype=dtype, device=device)

    return (
        new((*size, E), (tokens if embedding is None else embedding).dtype),
        new(size, torch.int64 if attention_mask is None else attention_mask.dtype),
        new(size, torch.int64),
        new(0, torch.int64) if labels is None else new(size, labels.dtype),
        new(size, torch.int64),
        new((B, 4), torch.int32),
    )


def _prompt_concat_backward(dout, layout, num_tasks, P):
    if use_native("prompt_concat_backward", dout):
        return native.prompt_concat_backward(dout, layout, num_tasks, P)
    if use_triton("prompt_concat", dout):
        return launch_concat_backward(dout, layout, num_tasks, P)
    return reference.concat_backward(dout, layout, num_tasks, P)


def _prompt_concat_backward_fake(dout, layout, num_tasks, P):
    dtype = torch.float64 if dout.dtype == torch.float64 else torch.float32
    return torch.empty((num_tasks, P, dout.shape[2]), dtype=dtype, device=dout.device)


_backward_op = Operator("prompt_concat_backward", _prompt_concat_backward, _prompt_concat_backward_fake)


def _embedding_backward(dtokens: Tensor, tokens: Tensor, V: int) -> Tensor:
    """Sum of dtokens per token, in a fixed order. aten checks no ids on a GPU: a bad one becomes its padding_idx."""
    tokens = torch.where((tokens >= 0) & (tokens < V), tokens, -1).long()
    return torch.ops.aten.embedding_dense_backward(dtokens, tokens, V, -1, False)


def _setup_context(ctx, inputs, output):
    tokens, embedding, prompts = inputs[:3]
    layout = output[5]
    ctx.mark_non_differentiable(*output[1:])
    ctx.prompts_like = prompts.shape[0], prompts.shape[1], prompts.dtype
    ctx.vocabulary = None if embedding is None else embedding.shape[0]
    ctx.save_for_backward(layout, tokens if ctx.needs_input_grad[1] else None)


def _backward(ctx, dout, *_):
    layout, tokens = ctx.saved_tensors
    num_tasks, P, dtype = ctx.prompts_like
    dtokens = dembedding = dprompts = None
    dout = dout.contiguous()
    if ctx.needs_input_grad[2]:
        dprompts = _backward_op(dout, layout, num_tasks, P).to(dtype)
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        dtokens = reference.take_tokens(dout, layout, P)
    if ctx.needs_input_grad[1]:
        dembedding = _embedding_backward(dtokens, tokens, ctx.vocabulary)
        dtokens = None
    return dtokens, dembedding, dprompts, None, None, None, None, None


_op = Operator("prompt_concat", _prompt_concat, _prompt_concat_fake, _setup_context, _backward)


def prompt_concat(
    input_ids: Tensor | None,
    embedding: Tensor | None,
    prompts: Tensor,
    task_ids: Tensor | None = None,
    *,
    prompt_lengths: Tensor | None = None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    padding_side: str = "right",
) -> PromptBatch:
    """Put each sequence's continuous prompt before its text (P-Tuning, arXiv 2103.10385; prompt tuning, 2104.08691).

    Semantics: inputs_embeds[b] = cat(prompts[t, :prompt_lengths[t]], embedding[input_ids[b]]) with t = task_ids[b]
    in P + S slots, with the prompt right before the first slot that attention_mask attends to, so that pads never come
    between a prompt and its text: right padding gives [prompt; tokens; pad], left padding [pad; prompt; tokens]. Slots
    that a shorter prompt leaves over are zeros that nobody attends to; `padding_side` says at which end they lie, and
    where the prompt goes in a row without any token.

    Args:
        input_ids: int32 or int64 [B, S]; None if inputs_embeds is given.
        embedding: [V, E], fp32, fp16 or bf16; None if inputs_embeds is given.
        prompts: [num_tasks, P, E], or [P, E] for one task; any of those dtypes, cast to the embedding's.
        task_ids: int32 or int64 [B]; -1 is the base model: no prompt. None: one task for all.
        prompt_lengths: int32 or int64 [num_tasks], at most P; None: all P.
        attention_mask: [B, S], 0 at pads; any dtype. None: no pads.
        labels: int32 or int64 [B, S], or None.
        inputs_embeds: [B, S, E] in place of input_ids and embedding.
        padding_side: "right" or "left"; a decoder that generates needs "left": each row ends with its last token.

    Returns:
        PromptBatch(inputs_embeds, attention_mask, position_ids, labels, token_map). Differentiable in prompts,
        embedding and inputs_embeds; saved for backward: 16 bytes per sequence, and input_ids if embedding needs a
        gradient.

    Raises:
        IndexError: an id outside [-1, num_tasks), a token outside [0, V), a length outside [0, P], on a CPU. On a GPU
            that sequence's, or that token's, embeddings are NaN, and the length is clamped (PEFT_OPS_DEBUG=1 raises
            there too).
    """
    op = "prompt_concat"
    prompts, task_ids = _check_prompts(op, prompts, task_ids, prompt_lengths)
    tokens, embedding = _check_tokens(op, input_ids, embedding, inputs_embeds, prompts)
    B, S = tokens.shape[:2]
    if task_ids is not None and task_ids.shape[0] != B:
        raise ValueError(f"{op}: task_ids must have shape [{B}], one per sequence, got {shape(task_ids)}")
    for arg, value in (("attention_mask", attention_mask), ("labels", labels)):
        if value is not None:
            check_tensor(op, arg, value, dtypes=IDS if arg == "labels" else (*FLOATS, *INTEGERS), dim=2, like=prompts)
            if shape(value) != [B, S]:
                raise ValueError(f"{op}: {arg} must have shape [{B}, {S}], got {shape(value)}")
    if padding_side not in ("right", "left"):
        raise ValueError(f"{op}: padding_side must be 'right' or 'left', got {padding_side!r}")
    if use_reference(prompts):
        return reference.prompt_concat(
            input_ids, embedding, prompts, task_ids, prompt_lengths=prompt_lengths, attention_mask=attention_mask,
            labels=labels, inputs_embeds=inputs_embeds, padding_side=padding_side,
        )  # fmt: skip
    args = [
        None if t is None else t.contiguous()
        for t in (tokens, embedding, prompts, task_ids, prompt_lengths, attention_mask, labels)
    ]
    out, mask, positions, out_labels, token_map, _ = _op(*args, padding_side == "left", differentiable=args[:3])
    return PromptBatch(out, mask, positions, None if labels is None else out_labels, token_map)


INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _check_prompts(op: str, prompts, task_ids, prompt_lengths) -> tuple[Tensor, Tensor | None]:
    check_tensor(op, "prompts", prompts, dtypes=FLOATS)
    if prompts.dim() == 2:
        prompts = prompts.unsqueeze(0)
    if prompts.dim() != 3:
        raise ValueError(f"{op}: prompts must have shape [num_tasks, P, E] or [P, E], got {shape(prompts)}")
    num_tasks = prompts.shape[0]
    if task_ids is None:
        if num_tasks != 1:
            raise ValueError(f"{op}: task_ids must be given, because prompts holds {num_tasks} tasks, got None")
    else:
        check_tensor(op, "task_ids", task_ids, dtypes=IDS, dim=1, like=prompts)
    if prompt_lengths is not None:
        check_tensor(op, "prompt_lengths", prompt_lengths, dtypes=IDS, dim=1, like=prompts)
        if prompt_lengths.shape[0] != num_tasks:
            raise ValueError(
                f"{op}: prompt_lengths must have shape [{num_tasks}], one per task, got {shape(prompt_lengths)}"
            )
    return prompts, task_ids


def _check_tokens(op: str, input_ids, embedding, inputs_embeds, prompts: Tensor) -> tuple[Tensor, Tensor | None]:
    E = prompts.shape[2]
    if (input_ids is None) == (inputs_embeds is None):
        got = "both" if input_ids is not None else "neither"
        raise ValueError(f"{op}: input_ids must be given, or inputs_embeds, but one of them, got {got}")
    if inputs_embeds is not None:
        check_tensor(op, "inputs_embeds", inputs_embeds, dtypes=FLOATS, dim=3, like=prompts)
        if inputs_embeds.shape[2] != E:
            raise ValueError(f"{op}: inputs_embeds must have {E} features, as prompts have, got {shape(inputs_embeds)}")
        return inputs_embeds, None
    check_tensor(op, "input_ids", input_ids, dtypes=IDS, dim=2, like=prompts)
    check_tensor(op, "embedding", embedding, dtypes=FLOATS, dim=2, like=prompts)
    if embedding.shape[1] != E:
        raise ValueError(f"{op}: embedding must have {E} features, as prompts have, got {shape(embedding)}")
    return input_ids, embedding
