"""Virtual tokens anywhere in a sequence: an id from V on is a row of the prompt of that sequence's task."""

import torch
from torch import Tensor

from peft_ops import reference
from peft_ops._backend import DEBUG, INTERPRET, LazyKernels, use_triton
from peft_ops._checks import (
    check_added,
    check_added_in_range,
    check_ids_in_range,
    check_length,
    check_prompts,
    check_tokens,
    shape,
)
from peft_ops._launch import launch
from peft_ops._library import Operator, native, use_native, use_reference

kernels, tiles = LazyKernels("prompt_embed"), LazyKernels("tiles")


def launch_embed(
    input_ids, embedding, prompts, position_embedding, type_embedding, task_ids, prompt_lengths, position_ids, type_ids,
    position_offset, embed_scale,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Embeddings [B, S, E], and which prompt row each slot is, int32 [B, S]. One launch."""
    (num_tasks, P, E), (B, S) = prompts.shape, input_ids.shape
    input_ids, embedding, prompts, task_ids, prompt_lengths = (
        None if t is None else t.contiguous() for t in (input_ids, embedding, prompts, task_ids, prompt_lengths)
    )
    position_ids, position_embedding, type_ids, type_embedding = (
        None if t is None else t.contiguous() for t in (position_ids, position_embedding, type_ids, type_embedding)
    )
    scale = reference.scale_of(embed_scale, embedding.dtype)
    out = torch.empty((B, S, E), dtype=embedding.dtype, device=input_ids.device)
    rows = torch.empty((B, S), dtype=torch.int32, device=input_ids.device)
    if B * S == 0:
        return out, rows
    tile = tiles.prompt_concat(E)
    grid = tiles.cdiv(B * S, tile["BLOCK_ROWS"]), max(tiles.cdiv(E, tile["BLOCK_E"]), 1)
    with torch.cuda.device_of(input_ids):
        launch(
            kernels.prompt_embed_kernel, grid,
            input_ids, embedding, prompts, task_ids, prompt_lengths,
            position_ids, position_embedding, type_ids, type_embedding, out, rows,
            B * S, S, P, E, embedding.shape[0], num_tasks,
            *(0 if t is None else t.shape[0] for t in (position_embedding, type_embedding)),
            position_offset, scale,
            HAS_IDS=task_ids is not None, HAS_LENGTHS=prompt_lengths is not None and num_tasks > 0,
            HAS_POSITIONS=position_embedding is not None, HAS_POSITION_IDS=position_ids is not None,
            HAS_TYPES=type_embedding is not None, HAS_TYPE_IDS=type_ids is not None,
            ADJUSTS=scale != 1.0 or position_embedding is not None or type_embedding is not None, **tile,
        )  # fmt: skip
    return out, rows


def launch_embed_backward(dout: Tensor, rows: Tensor, num_tasks: int, P: int) -> Tensor:
    E = dout.shape[2]
    dout = dout.contiguous()
    dprompts = torch.zeros((num_tasks, P, E), dtype=torch.float32, device=dout.device)
    if dprompts.numel() == 0 or rows.numel() == 0:
        return dprompts
    key, order = rows.reshape(-1).sort(stable=True)  # what is no prompt stands last, read by nobody
    start = torch.searchsorted(key, torch.arange(num_tasks * P + 1, device=dout.device, dtype=key.dtype))
    tile = tiles.prompt_backward(E)
    with torch.cuda.device_of(dout):
        launch(
            kernels.prompt_embed_bwd_kernel, (num_tasks * P, tiles.cdiv(E, tile["BLOCK_E"])),
            dout, order.to(torch.int32), start.to(torch.int32), dprompts,
            E,
            **tile,
        )  # fmt: skip
    return dprompts


def _check_rows(rows: Tensor, input_ids: Tensor, V: int, task_ids, prompt_lengths, num_tasks: int, P: int) -> None:
    """IndexError for an id that names neither a token nor a virtual token of its sequence's task."""
    bad = (rows == num_tasks * P + 1).reshape(-1)
    if not bool(bad.any()):
        return
    at = int(bad.to(torch.uint8).argmax())
    task = 0 if task_ids is None else int(task_ids[at // rows.shape[1]])
    end, where = V, "" if task_ids is None else f" where task_ids is {task}"
    if task >= 0:
        end += P if prompt_lengths is None else int(prompt_lengths[task])
    got = int(input_ids.reshape(-1)[at])
    raise IndexError(f"prompt_embed: input_ids must be in [0, {end}){where}, got {got} at position {at}")


def _prompt_embed(
    input_ids, embedding, prompts, position_embedding, type_embedding, task_ids, prompt_lengths, position_ids, type_ids,
    position_offset, embed_scale,
):  # fmt: skip
    (num_tasks, P, _), V = prompts.shape, embedding.shape[0]
    check_ids_in_range("prompt_embed", task_ids, num_tasks)
    if prompt_lengths is not None:
        check_ids_in_range("prompt_embed", prompt_lengths, P + 1, "prompt_lengths", low=0)
    others = (t for t in (prompts, position_embedding, type_embedding) if t is not None)
    widest = next((t for t in others if t.dtype == torch.float64), embedding)
    triton = use_triton("prompt_embed", widest)
    added = reference.NOTHING_ADDED
    if (DEBUG or not triton) and not (position_embedding is None and type_embedding is None):
        nowhere = torch.zeros((), dtype=torch.bool, device=input_ids.device).expand(input_ids.shape)
        added = reference.added_embeddings(
            nowhere, position_ids, position_embedding, position_offset, type_ids, type_embedding
        )
        check_added_in_range("prompt_embed", added, position_offset)
    if triton:
        out, rows = launch_embed(
            input_ids, embedding, prompts, position_embedding, type_embedding, task_ids, prompt_lengths, position_ids,
            type_ids, position_offset, embed_scale,
        )  # fmt: skip
    elif use_native("prompt_embed", widest):
        scale = reference.scale_of(embed_scale, embedding.dtype)
        tensors = input_ids, embedding, prompts, task_ids, prompt_lengths, scale, *added[0], *added[1]
        out, rows = native.prompt_embed(*(t.contiguous() if isinstance(t, Tensor) else t for t in tensors))
    else:
        rows = reference.embed_rows(input_ids, V, task_ids, prompt_lengths, num_tasks, P)
        out = reference.embed_tokens(input_ids, embedding, prompts, rows, embed_scale, added)
    if DEBUG or not (rows.is_cuda or INTERPRET):
        _check_rows(rows, input_ids, V, task_ids, prompt_lengths, num_tasks, P)
    return out, rows


def _prompt_embed_fake(input_ids, embedding, prompts, *_):
    device = input_ids.device
    out = torch.empty((*input_ids.shape, prompts.shape[2]), dtype=embedding.dtype, device=device)
    return out, torch.empty(input_ids.shape, dtype=torch.int32, device=device)


def _prompt_embed_backward(dout, rows, num_tasks, P):
    if use_triton("prompt_embed", dout):
        return launch_embed_backward(dout, rows, num_tasks, P)
    if use_native("prompt_embed_backward", dout):
        return native.prompt_embed_backward(dout.contiguous(), rows.contiguous(), num_tasks, P)
    return reference.embed_backward(dout, rows, num_tasks, P)


def _prompt_embed_backward_fake(dout, rows, num_tasks, P):
    dtype = torch.float64 if dout.dtype == torch.float64 else torch.float32
    return torch.empty((num_tasks, P, dout.shape[2]), dtype=dtype, device=dout.device)


_backward_op = Operator("prompt_embed_backward", _prompt_embed_backward, _prompt_embed_backward_fake)


def _setup_context(ctx, inputs, output):
    input_ids, embedding, prompts, *tables = inputs[:5]
    position_ids, type_ids, ctx.position_offset, ctx.embed_scale = inputs[7:11]
    _, of_embedding, _, of_positions, of_types = ctx.needs_input_grad[:5]
    ctx.mark_non_differentiable(output[1])
    ctx.prompts_like = prompts.shape[0], prompts.shape[1], prompts.dtype
    ctx.vocabulary = embedding.shape[0]
    ctx.tables_like = [(0, None) if t is None else (t.shape[0], t.dtype) for t in tables]
    ctx.save_for_backward(
        output[1],
        input_ids if of_embedding else None,
        position_ids if of_positions else None,
        type_ids if of_types else None,
    )


def _backward(ctx, dout, _):
    rows, input_ids, position_ids, type_ids = ctx.saved_tensors
    num_tasks, P, dtype = ctx.prompts_like
    _, of_embedding, of_prompts, of_positions, of_types = ctx.needs_input_grad[:5]
    (num_positions, positions_dtype), (num_types, types_dtype) = ctx.tables_like
    dembedding = dprompts = dpositions = dtypes = None
    dout, bad = dout.contiguous(), rows > num_tasks * P
    if of_prompts:
        dprompts = _backward_op(dout, rows, num_tasks, P).to(dtype)
    if of_embedding:
        tokens = torch.where(rows == num_tasks * P, input_ids, -1)
        dtokens = reference.scaled(dout, ctx.embed_scale, dout.dtype)
        dembedding = reference.embedding_backward(dtokens, tokens, ctx.vocabulary)
    if of_positions:
        ids = reference.position_rows(bad, position_ids, ctx.position_offset)
        dpositions = reference.embedding_backward(dout, ids, num_positions, wide=True).to(positions_dtype)
    if of_types:
        ids = reference.type_rows(bad, type_ids)
        dtypes = reference.embedding_backward(dout, ids, num_types, wide=True).to(types_dtype)
    return None, dembedding, dprompts, dpositions, dtypes, *(None,) * 6


_op = Operator("prompt_embed", _prompt_embed, _prompt_embed_fake, _setup_context, _backward)


def prompt_embed(
    input_ids: Tensor,
    embedding: Tensor,
    prompts: Tensor,
    task_ids: Tensor | None = None,
    *,
    prompt_lengths: Tensor | None = None,
    embed_scale: float = 1,
    position_embedding: Tensor | None = None,
    position_ids: Tensor | None = None,
    position_offset: int = 0,
    token_type_embedding: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    max_position_embeddings: int | None = None,
) -> Tensor:
    """Embed token ids of which some are virtual: prompts before, inside and after a text (P-Tuning, arXiv 2103.10385).

    Semantics: out[b, s] = embedding[i] if i < V else prompts[t, i - V] with i = input_ids[b, s], t = task_ids[b].
    A virtual token may stand anywhere and occur several times; `peft_ops.nn.Template` writes such ids.

    What a model does before its first layer can come along, in the same pass: out = (e + type) + position, summed in
    fp32 and rounded once. A model that adds its own, as transformers' do, must not get them twice.

    Args:
        input_ids: int32 or int64 [B, S]; ids from V on are virtual tokens.
        embedding: [V, E], fp32, fp16 or bf16.
        prompts: [num_tasks, P, E], or [P, E] for one task; any of those dtypes, cast to the embedding's.
        task_ids: int32 or int64 [B]; -1 is the base model, which has no virtual tokens. None: one task for all.
        prompt_lengths: int32 or int64 [num_tasks], at most P; None: all P.
        embed_scale: multiplies rows of the embedding, rounded to its dtype first (Gemma: E ** 0.5), and not prompts.
        position_embedding: [max_positions, E], added by position_ids + position_offset; any of those dtypes.
        position_ids: int32 or int64 [B, S]; None: 0 to S - 1.
        position_offset: 0 for GPT-2 and BERT, 2 for OPT and RoBERTa.
        token_type_embedding: [num_types, E], added by token_type_ids; any of those dtypes.
        token_type_ids: int32 or int64 [B, S]; None: all 0.
        max_position_embeddings: raise if S exceeds it; None: no limit.

    Returns:
        [B, S, E] in the embedding's dtype. Differentiable in prompts, embedding, position_embedding and
        token_type_embedding; saved for backward: 4 bytes per token, and where their tables need a gradient input_ids,
        position_ids and token_type_ids.

    Raises:
        ValueError: S exceeds max_position_embeddings.
        IndexError: a task id outside [-1, num_tasks), an id that is neither a token nor a virtual token of its task, a
            length outside [0, P], a position or a type outside its table, on a CPU. On a GPU that sequence's, or that
            token's, embeddings are NaN, and the length is clamped (PEFT_OPS_DEBUG=1 raises there too).
    """
    op = "prompt_embed"
    prompts = check_prompts(op, prompts, task_ids, prompt_lengths)
    if input_ids is None:
        raise TypeError(f"{op}: input_ids must be a tensor, got NoneType")
    check_tokens(op, input_ids, embedding, None, prompts)
    if task_ids is not None and task_ids.shape[0] != input_ids.shape[0]:
        B = input_ids.shape[0]
        raise ValueError(f"{op}: task_ids must have shape [{B}], one per sequence, got {shape(task_ids)}")
    added = dict(
        embed_scale=embed_scale, position_embedding=position_embedding, position_ids=position_ids,
        position_offset=position_offset, token_type_embedding=token_type_embedding, token_type_ids=token_type_ids,
    )  # fmt: skip
    check_added(op, input_ids, prompts, **added)
    check_length(op, max_position_embeddings, "S", input_ids.shape[1])
    if use_reference(prompts):
        return reference.prompt_embed(input_ids, embedding, prompts, task_ids, prompt_lengths=prompt_lengths, **added)
    tensors = (
        input_ids, embedding, prompts, position_embedding, token_type_embedding, task_ids, prompt_lengths, position_ids,
        token_type_ids,
    )  # fmt: skip
    args = [None if t is None else t.contiguous() for t in tensors]
    return _op(*args, position_offset, float(embed_scale), differentiable=args[1:5])[0]
