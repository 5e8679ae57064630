"""Prompt and token embeddings of packed sequences in one pass: [h(P); e(X)] for each, and cu_seqlens to go with it."""

import torch
from torch import Tensor

from peft_ops import reference
from peft_ops._backend import DEBUG, INTERPRET, LazyKernels, use_triton
from peft_ops._checks import (
    IDS,
    check_bool,
    check_embed_scale,
    check_ids_in_range,
    check_length,
    check_prompts,
    check_tensor,
    check_tokens,
    shape,
)
from peft_ops._launch import launch
from peft_ops._library import Operator, has_native, native, use_native, use_reference
from peft_ops.reference import PackedPromptBatch

kernels, tiles = LazyKernels("prompt_concat_packed"), LazyKernels("tiles")


def launch_packed(
    tokens, cu_seqlens, embedding, prompts, task_ids, prompt_lengths, labels, num_rows, embed_scale, after_bos
):
    """The five tensors of a PackedPromptBatch (labels empty if there are none) and the layout, int32 [B + 1, 4].
    Two launches."""
    (num_tasks, P, E), total, B = prompts.shape, tokens.shape[0], cu_seqlens.shape[0] - 1
    tokens, cu_seqlens, embedding, prompts, task_ids, prompt_lengths, labels = (
        None if t is None else t.contiguous()
        for t in (tokens, cu_seqlens, embedding, prompts, task_ids, prompt_lengths, labels)
    )

    def new(*size, dtype=torch.int32):
        return torch.empty(size, dtype=dtype, device=tokens.device)

    scale = 1.0 if embedding is None else reference.scale_of(embed_scale, embedding.dtype)
    out = new(num_rows, E, dtype=(tokens if embedding is None else embedding).dtype)
    positions, token_map = new(num_rows, dtype=torch.int64), new(num_rows, dtype=torch.int64)
    out_labels = new(0, dtype=torch.int64) if labels is None else new(num_rows, dtype=labels.dtype)
    out_cu_seqlens, layout = new(B + 1), new(B + 1, 4)
    with torch.cuda.device_of(tokens):
        launch(
            kernels.packed_layout_kernel, (1,),
            cu_seqlens, task_ids, prompt_lengths, layout, out_cu_seqlens,
            B, total, P, num_tasks, num_rows,
            HAS_IDS=task_ids is not None, HAS_LENGTHS=prompt_lengths is not None and num_tasks > 0,
            AFTER_BOS=after_bos, BLOCK=1024, num_warps=4,
        )  # fmt: skip
        if num_rows:
            tile = tiles.prompt_concat(E)
            grid = tiles.cdiv(num_rows, tile["BLOCK_ROWS"]), max(tiles.cdiv(E, tile["BLOCK_E"]), 1)
            launch(
                kernels.prompt_concat_packed_kernel, grid,
                tokens, embedding, prompts, labels, out_cu_seqlens, layout,
                out, positions, out_labels, token_map,
                num_rows, B, P, E, 0 if embedding is None else embedding.shape[0], tiles.next_power_of_2(B + 1) // 2,
                scale,
                HAS_TABLE=embedding is not None, HAS_LABELS=labels is not None, SCALES=scale != 1.0, **tile,
            )  # fmt: skip
    return out, out_cu_seqlens, positions, out_labels, token_map, layout


def launch_packed_backward(dout: Tensor, layout: Tensor, cu_seqlens: Tensor, num_tasks: int, P: int) -> Tensor:
    E = dout.shape[1]
    dout, layout, cu_seqlens = dout.contiguous(), layout.contiguous(), cu_seqlens.contiguous()
    dprompts = torch.zeros((num_tasks, P, E), dtype=torch.float32, device=dout.device)
    if dprompts.numel() == 0 or dout.numel() == 0:
        return dprompts
    ids = layout[:-1, 0]
    key, order = torch.where(ids >= 0, ids, num_tasks).sort(stable=True)  # base and bad sequences last, read by nobody
    start = torch.searchsorted(key, torch.arange(num_tasks + 1, device=dout.device, dtype=key.dtype)).to(torch.int32)
    tile = tiles.prompt_backward(E)
    with torch.cuda.device_of(dout):
        launch(
            kernels.prompt_concat_packed_bwd_kernel, (num_tasks * P, tiles.cdiv(E, tile["BLOCK_E"])),
            dout, cu_seqlens, layout, order.to(torch.int32), start, dprompts,
            P, E,
            **tile,
        )  # fmt: skip
    return dprompts


def _check_offsets(cu_seqlens: Tensor, total: int, max_seqlen: int) -> None:
    """ValueError for offsets that do not ascend from 0 to at most total, or a sequence longer than max_seqlen."""
    op, cu = "prompt_concat_packed", cu_seqlens.long()  # int32 compared with a larger int would wrap it
    if cu[0] != 0:
        raise ValueError(f"{op}: cu_seqlens must start at 0, got {int(cu[0])}")
    falls = cu[1:] < cu[:-1]
    if bool(falls.any()):
        at = int(falls.to(torch.uint8).argmax()) + 1
        raise ValueError(
            f"{op}: cu_seqlens must not decrease, got {int(cu[at])} after {int(cu[at - 1])} at position {at}"
        )
    if cu[-1] > total:
        raise ValueError(f"{op}: cu_seqlens must end at {total} tokens at most, got {int(cu[-1])}")
    too_long = cu.diff() > max_seqlen
    if bool(too_long.any()):
        b = int(too_long.to(torch.uint8).argmax())
        length = int(cu[b + 1] - cu[b])
        raise ValueError(f"{op}: max_seqlen must be at least {length}, as sequence {b} has, got {max_seqlen}")


def _check_room(covered: int | None, layout: Tensor, P: int, num_rows: int) -> None:
    """ValueError where num_rows does not hold `covered` tokens and the prompts of `layout`; None: nobody may ask."""
    if covered is None or num_rows >= covered + (layout.shape[0] - 1) * P:  # room for whole prompts
        return
    needed = covered + int(layout[:, 3].sum())
    if needed > num_rows:
        raise ValueError(
            f"prompt_concat_packed: num_rows must be at least {needed} for these sequences and prompts, got {num_rows}"
        )


def _prompt_concat_packed(
    tokens, cu_seqlens, embedding, prompts, task_ids, prompt_lengths, labels, max_seqlen, num_rows, embed_scale,
    after_bos,
):  # fmt: skip
    op, (num_tasks, P, _), total = "prompt_concat_packed", prompts.shape, tokens.shape[0]
    if num_rows >= 2**31:
        raise ValueError(f"{op}: num_rows must be below 2**31, as cu_seqlens are int32, got {num_rows}")
    check_ids_in_range(op, task_ids, num_tasks)
    if prompt_lengths is not None:
        check_ids_in_range(op, prompt_lengths, P + 1, "prompt_lengths", low=0)
    covered = None
    if DEBUG or not (tokens.is_cuda or INTERPRET):
        if tokens.is_cuda or not has_native() or native.first_bad_offset(cu_seqlens, total, max_seqlen) >= 0:
            _check_offsets(cu_seqlens, total, max_seqlen)
        covered = int(cu_seqlens[-1])
        if embedding is not None:  # what no sequence covers may be anything
            check_ids_in_range(op, tokens[:covered], embedding.shape[0], "input_ids", low=0)
    source = tokens if embedding is None else embedding
    widest = prompts if prompts.dtype == torch.float64 else source  # fp64 anywhere runs on plain PyTorch
    if use_triton(op, widest):
        outputs = launch_packed(
            tokens, cu_seqlens, embedding, prompts, task_ids, prompt_lengths, labels, num_rows, embed_scale, after_bos
        )
        _check_room(covered, outputs[5], P, num_rows)
        return outputs
    if use_native(op, widest):
        tokens, embedding, prompts, labels = (
            None if t is None else t.contiguous() for t in (tokens, embedding, prompts, labels)
        )
        layout, out_cu, positions, labels, token_map = native.packed_layout(
            tokens, cu_seqlens, prompts, task_ids, prompt_lengths, labels, num_rows, after_bos
        )
        _check_room(covered, layout, P, num_rows)
        scale = reference.scale_of(embed_scale, source.dtype)
        out = native.prompt_concat_packed(tokens, embedding, prompts, layout, out_cu, num_rows, scale)
        return out, out_cu, positions, labels, token_map, layout
    sizes = total, num_tasks, P, num_rows
    layout, out_cu = reference.packed_layout(cu_seqlens, task_ids, prompt_lengths, sizes, after_bos)
    _check_room(covered, layout, P, num_rows)
    rows = reference.packed_rows(layout, out_cu, num_rows)
    out = reference.packed_embeddings(tokens, embedding, prompts, rows, embed_scale)
    positions, labels, token_map = reference.packed_metadata(labels, rows)
    labels = tokens.new_empty(0, dtype=torch.int64) if labels is None else labels
    return out, out_cu, positions, labels, token_map, layout


def _prompt_concat_packed_fake(
    tokens, cu_seqlens, embedding, prompts, task_ids, prompt_lengths, labels, max_seqlen, num_rows, *_
):
    B = cu_seqlens.shape[0] - 1

    def new(*size, dtype):
        return torch.empty(size, dtype=dtype, device=tokens.device)

    return (
        new(num_rows, prompts.shape[2], dtype=(tokens if embedding is None else embedding).dtype),
        new(B + 1, dtype=torch.int32),
        new(num_rows, dtype=torch.int64),
        new(0, dtype=torch.int64) if labels is None else new(num_rows, dtype=labels.dtype),
        new(num_rows, dtype=torch.int64),
        new(B + 1, 4, dtype=torch.int32),
    )


def _prompt_concat_packed_backward(dout, layout, cu_seqlens, num_tasks, P):
    if use_triton("prompt_concat_packed", dout):
        return launch_packed_backward(dout, layout, cu_seqlens, num_tasks, P)
    if use_native("prompt_concat_packed_backward", dout):
        dout, layout, cu_seqlens = dout.contiguous(), layout.contiguous(), cu_seqlens.contiguous()
        return native.prompt_concat_packed_backward(dout[None], layout, cu_seqlens, num_tasks, P)
    return reference.packed_backward(dout, layout, cu_seqlens, num_tasks, P)


def _prompt_concat_packed_backward_fake(dout, layout, cu_seqlens, num_tasks, P):
    dtype = torch.float64 if dout.dtype == torch.float64 else torch.float32
    return torch.empty((num_tasks, P, dout.shape[1]), dtype=dtype, device=dout.device)


_backward_op = Operator(
    "prompt_concat_packed_backward", _prompt_concat_packed_backward, _prompt_concat_packed_backward_fake
)


def _setup_context(ctx, inputs, output):
    tokens, _, embedding, prompts = inputs[:4]
    ctx.mark_non_differentiable(*output[1:])
    ctx.prompts_like = prompts.shape[0], prompts.shape[1], prompts.dtype
    ctx.embed_scale = inputs[9]
    ctx.total, ctx.vocabulary = tokens.shape[0], None if embedding is None else embedding.shape[0]
    ctx.save_for_backward(output[5], output[1], tokens if ctx.needs_input_grad[2] else None)


def _backward(ctx, dout, *_):
    layout, cu_seqlens, tokens = ctx.saved_tensors
    num_tasks, P, dtype = ctx.prompts_like
    dtokens = dembedding = dprompts = None
    dout = dout.contiguous()
    if ctx.needs_input_grad[3]:
        dprompts = _backward_op(dout, layout, cu_seqlens, num_tasks, P).to(dtype)
    if ctx.needs_input_grad[0]:
        dtokens = reference.take_packed_tokens(dout, layout, cu_seqlens, ctx.total)
    if ctx.needs_input_grad[2]:
        ids = reference.packed_tokens(tokens, layout, cu_seqlens, dout.shape[0])
        dscaled = reference.scaled(dout, ctx.embed_scale, dout.dtype)
        dembedding = reference.embedding_backward(dscaled, ids, ctx.vocabulary)
    return dtokens, None, dembedding, dprompts, *(None,) * 7


_op = Operator("prompt_concat_packed", _prompt_concat_packed, _prompt_concat_packed_fake, _setup_context, _backward)


def prompt_concat_packed(
    input_ids: Tensor | None,
    cu_seqlens: Tensor,
    embedding: Tensor | None,
    prompts: Tensor,
    task_ids: Tensor | None = None,
    *,
    max_seqlen: int,
    prompt_lengths: Tensor | None = None,
    num_rows: int | None = None,
    labels: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    after_bos: bool = False,
    embed_scale: float = 1,
    max_position_embeddings: int | None = None,
) -> PackedPromptBatch:
    """Put each sequence's continuous prompt before its text in a packed batch (P-Tuning, arXiv 2103.10385).

    Semantics: cat([cat(prompts[t, :prompt_lengths[t]], embedding[input_ids[cu_seqlens[b]:cu_seqlens[b + 1]]]) for each
    b]) with t = task_ids[b], then zeros up to num_rows: no padding, and no shape that depends on data. The new
    cu_seqlens and max_seqlen are those that variable-length attention (FlashAttention's) takes.

    A batch of fixed sizes, as a captured graph needs, ends in tokens that no sequence covers, and in empty sequences of
    the base model: the last entry of cu_seqlens repeated, with -1 in task_ids. Other empty sequences get their prompt.

    Args:
        input_ids: int32 or int64 [total]; None if inputs_embeds is given.
        cu_seqlens: int32 or int64 [B + 1], where each sequence starts and the last one ends: ascending from 0 to at
            most total. Tokens after the last sequence are left out.
        embedding: [V, E], fp32, fp16 or bf16; None if inputs_embeds is given.
        prompts: [num_tasks, P, E], or [P, E] for one task; any of those dtypes, cast to the embedding's.
        task_ids: int32 or int64 [B]; -1 is the base model: no prompt. None: one task for all.
        max_seqlen: no sequence has more tokens than this.
        prompt_lengths: int32 or int64 [num_tasks], at most P; None: all P.
        num_rows: rows of the result; None: total + B * P, the most that can be needed.
        labels: int32 or int64 [total], or None.
        inputs_embeds: [total, E] in place of input_ids and embedding.
        after_bos: the prompt goes after each sequence's first token, if it has one.
        embed_scale: multiplies rows of the embedding, rounded to its dtype first (Gemma: E ** 0.5); prompts and
            inputs_embeds stand for what a scaling module returns, and are taken as they are.
        max_position_embeddings: raise if max_seqlen + P exceeds it; None: no limit.

    Returns:
        PackedPromptBatch(inputs_embeds, cu_seqlens, max_seqlen + P, position_ids, labels, token_map). Differentiable in
        prompts, embedding and inputs_embeds; saved for backward: 20 (B + 1) bytes, and input_ids if embedding needs a
        gradient.

    Raises:
        IndexError: an id outside [-1, num_tasks), a token outside [0, V), a length outside [0, P], on a CPU. On a GPU
            that sequence's, or that token's, embeddings are NaN, and the length is clamped.
        ValueError: max_seqlen + P exceeds max_position_embeddings. On a CPU also cu_seqlens that do not ascend from 0
            to at most total, a sequence longer than max_seqlen, num_rows too small. On a GPU all embeddings are NaN for
            bad cu_seqlens, max_seqlen is taken as it is, and rows beyond num_rows are dropped: the new cu_seqlens end
            there. Nothing is ever read or written outside the tensors (PEFT_OPS_DEBUG=1 raises there too).
    """
    op = "prompt_concat_packed"
    prompts = check_prompts(op, prompts, task_ids, prompt_lengths)
    tokens, embedding = check_tokens(op, input_ids, embedding, inputs_embeds, prompts, packed=True)
    check_tensor(op, "cu_seqlens", cu_seqlens, dtypes=IDS, dim=1, like=prompts)
    if cu_seqlens.shape[0] == 0:
        raise ValueError(f"{op}: cu_seqlens must have B + 1 entries for B sequences, got none")
    total, B = tokens.shape[0], cu_seqlens.shape[0] - 1
    if task_ids is not None and task_ids.shape[0] != B:
        raise ValueError(f"{op}: task_ids must have shape [{B}], one per sequence, got {shape(task_ids)}")
    if labels is not None:
        check_tensor(op, "labels", labels, dtypes=IDS, dim=1, like=prompts)
        if labels.shape[0] != total:
            raise ValueError(f"{op}: labels must have shape [{total}], one per token, got {shape(labels)}")
    check_bool(op, "after_bos", after_bos)
    num_rows = total + B * prompts.shape[1] if num_rows is None else num_rows
    for arg, value in (("max_seqlen", max_seqlen), ("num_rows", num_rows)):
        if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
            raise TypeError(f"{op}: {arg} must be an int, got {type(value).__name__}")
        if value < 0:
            raise ValueError(f"{op}: {arg} must be at least 0, got {value}")
    check_embed_scale(op, embed_scale)
    P = prompts.shape[1]
    check_length(op, max_position_embeddings, "max_seqlen + P", max_seqlen, P)
    if use_reference(prompts):
        return reference.prompt_concat_packed(
            input_ids, cu_seqlens, embedding, prompts, task_ids, max_seqlen=max_seqlen, prompt_lengths=prompt_lengths,
            num_rows=num_rows, labels=labels, inputs_embeds=inputs_embeds, after_bos=after_bos, embed_scale=embed_scale,
        )  # fmt: skip
    args = [
        None if t is None else t.contiguous()
        for t in (tokens, cu_seqlens, embedding, prompts, task_ids, prompt_lengths, labels)
    ]
    differentiable = args[0], args[2], args[3]
    out, cu_seqlens, positions, out_labels, token_map, _ = _op(
        *args, max_seqlen, num_rows, float(embed_scale), after_bos, differentiable=differentiable
    )
    out_labels = None if labels is None else out_labels
    return PackedPromptBatch(out, cu_seqlens, max_seqlen + P, positions, out_labels, token_map)
