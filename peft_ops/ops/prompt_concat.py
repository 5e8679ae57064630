"""Prompt and token embeddings in one pass: [h(P); e(X)], each sequence with the prompt of its own task."""

import torch
from torch import Tensor

from peft_ops import reference
from peft_ops._backend import DEBUG, INTERPRET, LazyKernels, use_triton
from peft_ops._checks import (
    FLOATS,
    IDS,
    INTEGERS,
    check_added,
    check_added_in_range,
    check_bool,
    check_ids_in_range,
    check_length,
    check_prompts,
    check_tensor,
    check_tokens,
    shape,
)
from peft_ops._launch import launch
from peft_ops._library import Operator, native, use_native, use_reference
from peft_ops.reference import PromptBatch

kernels, tiles = LazyKernels("prompt_concat"), LazyKernels("tiles")


def launch_concat(
    tokens, embedding, prompts, position_embedding, type_embedding, task_ids, prompt_lengths, attention_mask, labels,
    type_ids, position_offset, embed_scale, left, after_bos,
):  # fmt: skip
    """The five tensors of a PromptBatch (labels empty if there are none) and the layout, int32 [B, 4]. Two launches."""
    (num_tasks, P, E), (B, S) = prompts.shape, tokens.shape[:2]
    device = tokens.device
    tokens, embedding, prompts, task_ids, prompt_lengths, attention_mask, labels = (
        None if t is None else t.contiguous()
        for t in (tokens, embedding, prompts, task_ids, prompt_lengths, attention_mask, labels)
    )
    position_embedding, type_embedding, type_ids = (
        None if t is None else t.contiguous() for t in (position_embedding, type_embedding, type_ids)
    )
    scale = 1.0 if embedding is None else reference.scale_of(embed_scale, embedding.dtype)
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
        launch(
            kernels.prompt_layout_kernel, (B,),
            task_ids, prompt_lengths, bytes_of(attention_mask), labels,
            layout, bytes_of(mask), positions, out_labels, token_map,
            S, P, num_tasks,
            HAS_IDS=task_ids is not None, HAS_LENGTHS=prompt_lengths is not None and num_tasks > 0,
            HAS_MASK=attention_mask is not None, HAS_LABELS=labels is not None, LEFT=left, AFTER_BOS=after_bos,
            BLOCK=min(tiles.next_power_of_2(max(P + S, 1)), 1024), num_warps=4,
        )  # fmt: skip
        if E and P + S:
            tile = tiles.prompt_concat(E)
            grid = B * tiles.cdiv(P + S, tile["BLOCK_ROWS"]), tiles.cdiv(E, tile["BLOCK_E"])
            launch(
                kernels.prompt_concat_kernel, grid,
                tokens, embedding, prompts, layout,
                positions, position_embedding, token_map, type_ids, type_embedding, out,
                S, P, E, *(0 if t is None else t.shape[0] for t in (embedding, position_embedding, type_embedding)),
                position_offset, scale,
                HAS_TABLE=embedding is not None, HAS_POSITIONS=position_embedding is not None,
                HAS_TYPES=type_embedding is not None, HAS_TYPE_IDS=type_ids is not None,
                ADJUSTS=scale != 1.0 or position_embedding is not None or type_embedding is not None, **tile,
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
        launch(
            kernels.prompt_concat_bwd_kernel, (num_tasks * P, tiles.cdiv(E, tile["BLOCK_E"])),
            dout, layout, order.to(torch.int32), start, dprompts,
            length - P, P, E,
            **tile,
        )  # fmt: skip
    return dprompts


def _check_values(
    tokens, embedding, task_ids, prompt_lengths, attention_mask, type_ids, type_embedding, num_tasks: int, P: int
) -> None:
    """IndexError for an id or a length out of range, on a CPU (a kernel writes NaN, or clamps the length)."""
    op = "prompt_concat"
    if (tokens.is_cuda or INTERPRET) and not DEBUG:
        return
    check_ids_in_range(op, task_ids, num_tasks)
    if embedding is not None:
        check_ids_in_range(op, tokens.reshape(-1), embedding.shape[0], "input_ids", low=0)
    if prompt_lengths is not None:
        check_ids_in_range(op, prompt_lengths, P + 1, "prompt_lengths", low=0)
    if type_ids is not None:
        read = type_ids if attention_mask is None else torch.where(attention_mask != 0, type_ids, 0)
        check_ids_in_range(op, read, type_embedding.shape[0], "token_type_ids", low=0)


def _added(layout, positions, token_map, position_embedding, position_offset, type_embedding, type_ids):
    if position_embedding is None and type_embedding is None:
        return reference.NOTHING_ADDED
    bad = (layout[:, :1] == reference.BAD).expand_as(token_map)
    types = None if type_ids is None else reference.slot_types(type_ids, token_map)
    return reference.added_embeddings(bad, positions, position_embedding, position_offset, types, type_embedding)


def _prompt_concat(
    tokens, embedding, prompts, position_embedding, type_embedding, task_ids, prompt_lengths, attention_mask, labels,
    type_ids, position_offset, embed_scale, left, after_bos,
):  # fmt: skip
    (num_tasks, P, E), (B, S) = prompts.shape, tokens.shape[:2]
    _check_values(tokens, embedding, task_ids, prompt_lengths, attention_mask, type_ids, type_embedding, num_tasks, P)
    tables = position_embedding, position_offset, type_embedding, type_ids
    source = tokens if embedding is None else embedding
    others = (t for t in (prompts, position_embedding, type_embedding) if t is not None)
    widest = next((t for t in others if t.dtype == torch.float64), source)  # fp64 anywhere runs on plain PyTorch
    copies = position_embedding is None and type_embedding is None and (embedding is None or embed_scale == 1.0)
    on_native = use_native("prompt_concat", widest, numel=B * (P + S) * E)
    on_native = on_native and (copies or not widest.is_cuda)  # the CUDA C++ kernel scales and adds nothing
    if not on_native and use_triton("prompt_concat", widest):
        outputs = launch_concat(
            tokens, embedding, prompts, position_embedding, type_embedding, task_ids, prompt_lengths, attention_mask,
            labels, type_ids, position_offset, embed_scale, left, after_bos,
        )  # fmt: skip
        if DEBUG:
            _, _, positions, _, token_map, layout = outputs
            check_added_in_range("prompt_concat", _added(layout, positions, token_map, *tables), position_offset)
        return outputs
    sizes = B, S, num_tasks, P
    if on_native and tokens.is_cpu:
        tokens, embedding, prompts, attention_mask, labels = (
            None if t is None else t.contiguous() for t in (tokens, embedding, prompts, attention_mask, labels)
        )
    if on_native and tokens.is_cpu and (attention_mask is None or attention_mask.dtype in (torch.bool, *IDS)):
        layout, mask, positions, labels, token_map = native.prompt_layout(
            tokens, prompts, task_ids, prompt_lengths, attention_mask, labels, left, after_bos
        )
    else:
        layout = reference.prompt_layout(
            task_ids, prompt_lengths, attention_mask, sizes, left, tokens.device, after_bos
        )
        mask, positions, labels, token_map = reference.concat_metadata(layout, attention_mask, labels, S, P)
        labels = tokens.new_empty(0, dtype=torch.int64) if labels is None else labels
    added = _added(layout, positions, token_map, *tables)
    check_added_in_range("prompt_concat", added, position_offset)
    if on_native:
        scale = reference.scale_of(embed_scale, source.dtype)
        out = native.prompt_concat(tokens, embedding, prompts, layout, scale, *added[0], *added[1])
    else:
        out = reference.concat_embeddings(tokens, embedding, prompts, layout, embed_scale, added)
    return out, mask, positions, labels, token_map, layout


def _prompt_concat_fake(
    tokens, embedding, prompts, position_embedding, type_embedding, task_ids, prompt_lengths, attention_mask, labels, *_
):
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
    if use_triton("prompt_concat", dout):
        return launch_concat_backward(dout, layout, num_tasks, P)
    if use_native("prompt_concat_backward", dout):
        return native.prompt_concat_backward(dout, layout, num_tasks, P)
    return reference.concat_backward(dout, layout, num_tasks, P)


def _prompt_concat_backward_fake(dout, layout, num_tasks, P):
    dtype = torch.float64 if dout.dtype == torch.float64 else torch.float32
    return torch.empty((num_tasks, P, dout.shape[2]), dtype=dtype, device=dout.device)


_backward_op = Operator("prompt_concat_backward", _prompt_concat_backward, _prompt_concat_backward_fake)


def _setup_context(ctx, inputs, output):
    tokens, embedding, prompts, *tables = inputs[:5]
    _, _, positions, _, token_map, layout = output
    type_ids, ctx.position_offset, ctx.embed_scale = inputs[9:12]
    _, of_embedding, _, of_positions, of_types = ctx.needs_input_grad[:5]
    ctx.mark_non_differentiable(*output[1:])
    ctx.prompts_like = prompts.shape[0], prompts.shape[1], prompts.dtype
    ctx.vocabulary = None if embedding is None else embedding.shape[0]
    ctx.tables_like = [(0, None) if t is None else (t.shape[0], t.dtype) for t in tables]
    ctx.save_for_backward(
        layout,
        tokens if of_embedding else None,
        positions if of_positions else None,
        token_map if of_types else None,
        type_ids if of_types else None,
    )


def _backward(ctx, dout, *_):
    layout, tokens, positions, token_map, type_ids = ctx.saved_tensors
    num_tasks, P, dtype = ctx.prompts_like
    of_tokens, of_embedding, of_prompts, of_positions, of_types = ctx.needs_input_grad[:5]
    (num_positions, positions_dtype), (num_types, types_dtype) = ctx.tables_like
    dtokens = dembedding = dprompts = dpositions = dtypes = None
    dout, bad = dout.contiguous(), layout[:, :1] == reference.BAD
    if of_prompts:
        dprompts = _backward_op(dout, layout, num_tasks, P).to(dtype)
    if of_tokens or of_embedding:
        dtokens = reference.take_tokens(dout, layout, P)
    if of_embedding:
        dtokens = reference.scaled(dtokens, ctx.embed_scale, dout.dtype)
        dembedding = reference.embedding_backward(dtokens, tokens, ctx.vocabulary)
        dtokens = None
    if of_positions:
        rows = reference.position_rows(bad, positions, ctx.position_offset)
        dpositions = reference.embedding_backward(dout, rows, num_positions, wide=True).to(positions_dtype)
    if of_types:
        types = None if type_ids is None else reference.slot_types(type_ids, token_map)
        rows = reference.type_rows(bad.expand_as(token_map), types)
        dtypes = reference.embedding_backward(dout, rows, num_types, wide=True).to(types_dtype)
    return dtokens, dembedding, dprompts, dpositions, dtypes, *(None,) * 9


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
    after_bos: bool = False,
    embed_scale: float = 1,  # no 1.0: torch.compile traces a default that is a float twice
    position_embedding: Tensor | None = None,
    position_offset: int = 0,
    token_type_embedding: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    max_position_embeddings: int | None = None,
) -> PromptBatch:
    """Put each sequence's continuous prompt before its text (P-Tuning, arXiv 2103.10385; prompt tuning, 2104.08691).

    Semantics: inputs_embeds[b] = cat(prompts[t, :prompt_lengths[t]], embedding[input_ids[b]]) with t = task_ids[b]
    in P + S slots, with the prompt right before the first slot that attention_mask attends to, so that pads never come
    between a prompt and its text: right padding gives [prompt; tokens; pad], left padding [pad; prompt; tokens]. Slots
    that a shorter prompt leaves over are zeros that nobody attends to; `padding_side` says at which end they lie, and
    where the prompt goes in a row without any token.

    What a model does before its first layer can come along, in the same pass: inputs_embeds = (e + type) + position,
    summed in fp32 and rounded once. Every slot gets both, spare ones too, whose position and type are 0. A model that
    adds its own, as transformers' do, must not get them twice.

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
        after_bos: the prompt goes right after the first slot that attention_mask attends to, the row's BOS.
        embed_scale: multiplies rows of the embedding, rounded to its dtype first (Gemma: E ** 0.5); prompts and
            inputs_embeds stand for what a scaling module returns, and are taken as they are.
        position_embedding: [max_positions, E], added by position_ids + position_offset; any of those dtypes.
        position_offset: 0 for GPT-2 and BERT, 2 for OPT and RoBERTa.
        token_type_embedding: [num_types, E], added by the token's type; any of those dtypes.
        token_type_ids: int32 or int64 [B, S]; None: all 0. Prompts and pads are of type 0, as PEFT has it.
        max_position_embeddings: raise if P + S exceeds it; None: no limit.

    Returns:
        PromptBatch(inputs_embeds, attention_mask, position_ids, labels, token_map). Differentiable in prompts,
        embedding, inputs_embeds, position_embedding and token_type_embedding; saved for backward: 16 bytes per
        sequence, and where their tables need a gradient input_ids, position_ids, token_map and token_type_ids.

    Raises:
        ValueError: P + S exceeds max_position_embeddings.
        IndexError: an id outside [-1, num_tasks), a token outside [0, V), a length outside [0, P], a position or a type
            outside its table, on a CPU. On a GPU the embeddings of that sequence, or of that slot, are NaN, and the
            length is clamped (PEFT_OPS_DEBUG=1 raises there too).
    """
    op = "prompt_concat"
    prompts = check_prompts(op, prompts, task_ids, prompt_lengths)
    tokens, embedding = check_tokens(op, input_ids, embedding, inputs_embeds, prompts)
    (B, S), P = tokens.shape[:2], prompts.shape[1]
    if task_ids is not None and task_ids.shape[0] != B:
        raise ValueError(f"{op}: task_ids must have shape [{B}], one per sequence, got {shape(task_ids)}")
    for arg, value in (("attention_mask", attention_mask), ("labels", labels)):
        if value is not None:
            check_tensor(op, arg, value, dtypes=IDS if arg == "labels" else (*FLOATS, *INTEGERS), dim=2, like=prompts)
            if shape(value) != [B, S]:
                raise ValueError(f"{op}: {arg} must have shape [{B}, {S}], got {shape(value)}")
    check_bool(op, "after_bos", after_bos)
    if padding_side not in ("right", "left"):
        raise ValueError(f"{op}: padding_side must be 'right' or 'left', got {padding_side!r}")
    added = dict(
        embed_scale=embed_scale, position_embedding=position_embedding, position_offset=position_offset,
        token_type_embedding=token_type_embedding, token_type_ids=token_type_ids,
    )  # fmt: skip
    check_added(op, tokens, prompts, **added)
    check_length(op, max_position_embeddings, "P + S", P, S)
    if use_reference(prompts):
        return reference.prompt_concat(
            input_ids, embedding, prompts, task_ids, prompt_lengths=prompt_lengths, attention_mask=attention_mask,
            labels=labels, inputs_embeds=inputs_embeds, padding_side=padding_side, after_bos=after_bos, **added,
        )  # fmt: skip
    tensors = (
        tokens, embedding, prompts, position_embedding, token_type_embedding, task_ids, prompt_lengths, attention_mask,
        labels, token_type_ids,
    )  # fmt: skip
    args = [None if t is None else t.contiguous() for t in tensors]
    scalars = position_offset, float(embed_scale), padding_side == "left", after_bos
    out, mask, positions, out_labels, token_map, _ = _op(*args, *scalars, differentiable=args[:5])
    return PromptBatch(out, mask, positions, None if labels is None else out_labels, token_map)
