"""Virtual tokens anywhere in a sequence: an id from V on is a row of the prompt of that sequence's task."""

import torch
from torch import Tensor

from peft_ops import reference
from peft_ops._backend import DEBUG, INTERPRET, LazyKernels, use_triton
from peft_ops._checks import check_ids_in_range, shape
from peft_ops._library import Operator, use_reference
from peft_ops.ops.prompt_concat import _check_prompts, _check_tokens, _embedding_backward

kernels, tiles = LazyKernels("prompt_embed"), LazyKernels("tiles")


def launch_embed(input_ids, embedding, prompts, task_ids, prompt_lengths) -> tuple[Tensor, Tensor]:
    """Embeddings [B, S, E], and which prompt row each slot is, int32 [B, S]. One launch."""
    (num_tasks, P, E), (B, S) = prompts.shape, input_ids.shape
    input_ids, embedding, prompts, task_ids, prompt_lengths = (
        None if t is None else t.contiguous() for t in (input_ids, embedding, prompts, task_ids, prompt_lengths)
    )
    out = torch.empty((B, S, E), dtype=embedding.dtype, device=input_ids.device)
    rows = torch.empty((B, S), dtype=torch.int32, device=input_ids.device)
    if B * S == 0:
        return out, rows
    tile = tiles.prompt_concat(E)
    with torch.cuda.device_of(input_ids):
        kernels.prompt_embed_kernel[tiles.cdiv(B * S, tile["BLOCK_ROWS"]), max(tiles.cdiv(E, tile["BLOCK_E"]), 1)](
            input_ids, embedding, prompts, task_ids, prompt_lengths, out, rows,
            B * S, S, P, E, embedding.shape[0], num_tasks,
            HAS_IDS=task_ids is not None, HAS_LENGTHS=prompt_lengths is not None and num_tasks > 0, **tile,
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
        kernels.prompt_embed_bwd_kernel[num_tasks * P, tiles.cdiv(E, tile["BLOCK_E"])](
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


def _prompt_embed(input_ids, embedding, prompts, task_ids, prompt_lengths):
    (num_tasks, P, _), V = prompts.shape, embedding.shape[0]
    check_ids_in_range("prompt_embed", task_ids, num_tasks)
    if prompt_lengths is not None:
        check_ids_in_range("prompt_embed", prompt_lengths, P + 1, "prompt_lengths", low=0)
    if use_triton("prompt_embed", prompts if prompts.dtype == torch.float64 else embedding):
        out, rows = launch_embed(input_ids, embedding, prompts, task_ids, prompt_lengths)
    else:
        rows = reference.embed_rows(input_ids, V, task_ids, prompt_lengths, num_tasks, P)
        out = None
    if DEBUG or not (rows.is_cuda or INTERPRET):
        _check_rows(rows, input_ids, V, task_ids, prompt_lengths, num_tasks, P)
    return reference.embed_tokens(input_ids, embedding, prompts, rows) if out is None else out, rows


def _prompt_embed_fake(input_ids, embedding, prompts, task_ids, prompt_lengths):
    device = input_ids.device
    out = torch.empty((*input_ids.shape, prompts.shape[2]), dtype=embedding.dtype, device=device)
    return out, torch.empty(input_ids.shape, dtype=torch.int32, device=device)


def _prompt_embed_backward(dout, rows, num_tasks, P):
    if use_triton("prompt_embed", dout):
        return launch_embed_backward(dout, rows, num_tasks, P)
    return reference.embed_backward(dout, rows, num_tasks, P)


def _prompt_embed_backward_fake(dout, rows, num_tasks, P):
    dtype = torch.float64 if dout.dtype == torch.float64 else torch.float32
    return torch.empty((num_tasks, P, dout.shape[2]), dtype=dtype, device=dout.device)


_backward_op = Operator("prompt_embed_backward", _prompt_embed_backward, _prompt_embed_backward_fake)


def _setup_context(ctx, inputs, output):
    input_ids, embedding, prompts = inputs[:3]
    ctx.mark_non_differentiable(output[1])
    ctx.prompts_like = prompts.shape[0], prompts.shape[1], prompts.dtype
    ctx.vocabulary = embedding.shape[0]
    ctx.save_for_backward(output[1], input_ids if ctx.needs_input_grad[1] else None)


def _backward(ctx, dout, _):
    rows, input_ids = ctx.saved_tensors
    num_tasks, P, dtype = ctx.prompts_like
    dembedding = dprompts = None
    dout = dout.contiguous()
    if ctx.needs_input_grad[2]:
        dprompts = _backward_op(dout, rows, num_tasks, P).to(dtype)
    if ctx.needs_input_grad[1]:
        tokens = torch.where(rows == num_tasks * P, input_ids, -1)
        dembedding = _embedding_backward(dout, tokens, ctx.vocabulary)
    return None, dembedding, dprompts, None, None


_op = Operator("prompt_embed", _prompt_embed, _prompt_embed_fake, _setup_context, _backward)


def prompt_embed(
    input_ids: Tensor,
    embedding: Tensor,
    prompts: Tensor,
    task_ids: Tensor | None = None,
    *,
    prompt_lengths: Tensor | None = None,
) -> Tensor:
    """Embed token ids of which some are virtual: prompts before, inside and after a text (P-Tuning, arXiv 2103.10385).

    Semantics: out[b, s] = embedding[i] if i < V else prompts[t, i - V] with i = input_ids[b, s], t = task_ids[b].
    A virtual token may stand anywhere and occur several times; `peft_ops.nn.Template` writes such ids.

    Args:
        input_ids: int32 or int64 [B, S]; ids from V on are virtual tokens.
        embedding: [V, E], fp32, fp16 or bf16.
        prompts: [num_tasks, P, E], or [P, E] for one task; any of those dtypes, cast to the embedding's.
        task_ids: int32 or int64 [B]; -1 is the base model, which has no virtual tokens. None: one task for all.
        prompt_lengths: int32 or int64 [num_tasks], at most P; None: all P.

    Returns:
        [B, S, E] in the embedding's dtype. Differentiable in prompts and embedding; saved for backward: 4 bytes per
        token, and input_ids if embedding needs a gradient.

    Raises:
        IndexError: a task id outside [-1, num_tasks), an id that is neither a token nor a virtual token of its task, a
            length outside [0, P], on a CPU. On a GPU that sequence's, or that token's, embeddings are NaN, and the
            length is clamped (PEFT_OPS_DEBUG=1 raises there too).
    """
    op = "prompt_embed"
    prompts, task_ids = _check_prompts(op, prompts, task_ids, prompt_lengths)
    if input_ids is None:
        raise TypeError(f"{op}: input_ids must be a tensor, got NoneType")
    _check_tokens(op, input_ids, embedding, None, prompts)
    if task_ids is not None and task_ids.shape[0] != input_ids.shape[0]:
        B = input_ids.shape[0]
        raise ValueError(f"{op}: task_ids must have shape [{B}], one per sequence, got {shape(task_ids)}")
    if use_reference(prompts):
        return reference.prompt_embed(input_ids, embedding, prompts, task_ids, prompt_lengths=prompt_lengths)
    args = [None if t is None else t.contiguous() for t in (input_ids, embedding, prompts, task_ids, prompt_lengths)]
    return _op(*args, differentiable=args[1:3])[0]
