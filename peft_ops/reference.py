"""Every operator in plain PyTorch: the specification, the oracle of the tests, and the fallback.

The functions have the names and signatures of the public operators. They differentiate through autograd, trace, and run
on any device. An id outside `[-1, num_tasks)` gives a NaN row here, as it does in a kernel; the public operators raise
on a CPU.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    None: lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
PLAN_TILE = 128  # rows of one tile of a TaskPlan; smaller GEMM tiles derive theirs from it
BASE, BAD = -1, -2  # what a checked id says beside a task: the base model, or an id that was out of range


class TaskPlan(NamedTuple):
    """Which task each row belongs to, prepared once per batch; the (IA)^3 operators take it as `task_ids`.

    Attributes:
        task_ids: int32 [rows], the id of every row: `0 <= id < num_tasks`, -1 for the base model, -2 if out of range.
        tiles: int32 [ceil(rows / 128) * 3], per tile the ids of its first two runs, and where the second starts.
        run_index: int32 [rows], the slot in `run_end` of the run that the row belongs to. A run never crosses a tile.
        run_end: int32 [ceil(rows / 128) * 128], the row after the last one of each run; unused slots hold 0.
        num_tasks: tasks that the ids choose from.
        rows_per_id: rows that are known from the shapes alone to share one id, 1 where nothing is known.
    """

    task_ids: Tensor
    tiles: Tensor
    run_index: Tensor
    run_end: Tensor
    num_tasks: int
    rows_per_id: int


class PromptBatch(NamedTuple):
    """What `prompt_concat` returns; a base row has no prompt.

    Attributes:
        inputs_embeds: [B, P + S, E], in the dtype of the embedding.
        attention_mask: [B, P + S], in the dtype of the given mask (default int64): 1 on the prompt, 0 on spare slots.
        position_ids: int64 [B, P + S], counting attended slots from 0; 0 at pads. RoBERTa counts from padding_idx + 1.
        labels: [B, P + S], -100 on prompt and pad; None if no labels were given.
        token_map: int64 [B, P + S], the index in the row of `input_ids` that a slot came from; -1 for prompt and pad.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor | None
    token_map: Tensor


def check_ids(task_ids: Tensor, num_tasks: int) -> Tensor:
    """The ids as int32, those out of range replaced by -2."""
    known = (task_ids >= BASE) & (task_ids < num_tasks)
    return torch.where(known, task_ids, BAD).to(torch.int32)


def plan_tasks(task_ids: Tensor, rows: int, num_tasks: int, *, cu_seqlens: Tensor | None = None) -> TaskPlan:
    task_ids = task_ids.reshape(-1)
    if cu_seqlens is None:
        rows_per_id = rows // task_ids.numel() if task_ids.numel() else 1
        ids = check_ids(task_ids, num_tasks)[:, None].expand(-1, rows_per_id).reshape(-1).contiguous()
    else:
        rows_per_id = 1
        row = torch.arange(rows, device=task_ids.device, dtype=cu_seqlens.dtype)
        sequence = torch.searchsorted(cu_seqlens, row, right=True) - 1
        # a row that no sequence covers has no task: NaN there is loud, the base model would be a silent guess
        inside = (sequence >= 0) & (sequence < task_ids.numel())
        padded = torch.cat([check_ids(task_ids, num_tasks), task_ids.new_full((1,), BAD, dtype=torch.int32)])
        ids = padded[torch.where(inside, sequence, task_ids.numel())]
    return TaskPlan(ids, *_runs(ids), num_tasks, rows_per_id)


def _runs(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles, run index and run ends of a TaskPlan."""
    rows = ids.numel()
    num_tiles = (rows + PLAN_TILE - 1) // PLAN_TILE
    row = torch.arange(rows, device=ids.device)
    starts = torch.cat([torch.ones_like(ids[:1]), (ids[1:] != ids[:-1]).to(ids.dtype)]).bool() | (row % PLAN_TILE == 0)
    ends = torch.cat([starts[1:], torch.ones_like(starts[:1])])
    padded = F.pad(starts, (0, num_tiles * PLAN_TILE - rows)).view(num_tiles, PLAN_TILE)
    local = padded.cumsum(1).sub(1).view(-1)[:rows]
    run_index = row // PLAN_TILE * PLAN_TILE + local
    run_end = torch.zeros(num_tiles * PLAN_TILE, dtype=torch.int32, device=ids.device)
    # every row of a run but its last writes 0 to a slot that the last one then overwrites: amax keeps the end
    run_end.scatter_reduce_(0, run_index, torch.where(ends, row + 1, 0).to(torch.int32), "amax")
    tile = torch.arange(num_tiles, device=ids.device) * PLAN_TILE
    split = run_end[tile] - tile
    second = torch.minimum(run_end[tile].long(), row[-1:].expand(num_tiles)) if rows else tile
    same_tile = second < tile + PLAN_TILE
    first_id = ids[tile]
    second_id = torch.where(same_tile, ids[second], first_id) if rows else first_id
    tiles = torch.stack([first_id, second_id, split.to(torch.int32)], 1).view(-1)
    return tiles, run_index.to(torch.int32), run_end


def scale_rows(ia3_l: Tensor, task_ids: Tensor) -> Tensor:
    """The scale of each id, [len(task_ids), N]: its task's vector, ones for the base model, NaN if out of range."""
    num_tasks = ia3_l.shape[0]
    if num_tasks == 0:
        scale = ia3_l.new_ones(task_ids.numel(), ia3_l.shape[1])
    else:
        scale = ia3_l.index_select(0, task_ids.clamp(0, num_tasks - 1))
    scale = torch.where((task_ids == BASE)[:, None], 1.0, scale)
    bad = (task_ids < BASE) | (task_ids >= num_tasks)
    return torch.where(bad[:, None], float("nan"), scale)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def act_scale(z: Tensor, ia3_l: Tensor, task_ids: Tensor | None, activation: str | None = None) -> Tensor:
    """act(z) * ia3_l[t], the elementwise half of every (IA)^3 operator. task_ids: [G], where G divides the rows."""
    dtype = compute_dtype(z, ia3_l)
    y = ACTIVATIONS[activation](z.to(dtype))
    if task_ids is None:
        return (y * ia3_l[0].to(dtype)).to(z.dtype)
    groups, N = task_ids.numel(), z.shape[-1]
    rows = z.numel() // max(N, 1)
    scale = scale_rows(ia3_l, task_ids).to(dtype)
    y = y.reshape(groups, rows // max(groups, 1), N) * scale[:, None]
    return y.to(z.dtype).reshape(z.shape)


ACTIVATION_BACKWARD = {
    "relu": lambda g, z: torch.ops.aten.threshold_backward(g, z, 0),
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "silu": torch.ops.aten.silu_backward,
}


def act_scale_backward(
    dy: Tensor, z: Tensor, ia3_l: Tensor, task_ids: Tensor | None, activation: str | None, need_dz: bool, need_dl: bool
) -> tuple[Tensor, Tensor]:
    """dz in z's dtype and dl [num_tasks, N] in fp32, in a fixed order; what is not needed is empty."""
    dtype = compute_dtype(z, ia3_l)
    N, num_tasks = z.shape[-1], ia3_l.shape[0]
    groups = 1 if task_ids is None else task_ids.numel()
    view = groups, z.numel() // max(groups * N, 1), N
    dy = dy.to(dtype).reshape(view)
    dz, dl = z.new_empty(0), z.new_empty(0, dtype=dtype)
    if need_dz:
        scale = ia3_l[:1] if task_ids is None else scale_rows(ia3_l, task_ids)
        dz = dy * scale.to(dtype)[:, None]
        if activation is not None:
            dz = ACTIVATION_BACKWARD[activation](dz, z.to(dtype).reshape(view))
        dz = dz.to(z.dtype).reshape(z.shape).contiguous()
    if need_dl:
        per_group = (dy * ACTIVATIONS[activation](z.to(dtype)).reshape(view)).sum(1)
        ids = torch.zeros(groups, dtype=torch.int64, device=z.device) if task_ids is None else task_ids
        # base rows and bad ids add to a slot of their own that nobody reads
        slot = torch.where((ids >= 0) & (ids < num_tasks), ids, num_tasks)
        dl = torch.zeros(num_tasks + 1, N, dtype=dtype, device=z.device).index_add_(0, slot, per_group)
        dl = dl[:num_tasks].clone()
    return dz, dl


def _table_and_ids(ia3_l: Tensor, task_ids) -> tuple[Tensor, Tensor | None]:
    ids = task_ids.task_ids if isinstance(task_ids, TaskPlan) else task_ids
    return (ia3_l.unsqueeze(0) if ia3_l.dim() == 1 else ia3_l), None if ids is None else ids.reshape(-1)


def ia3_scale(x: Tensor, ia3_l: Tensor, task_ids: Tensor | TaskPlan | None = None) -> Tensor:
    return act_scale(x, *_table_and_ids(ia3_l, task_ids))


def ia3_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    ia3_l: Tensor,
    task_ids: Tensor | TaskPlan | None = None,
    activation: str | None = None,
    is_feedforward: bool = False,
) -> Tensor:
    table, ids = _table_and_ids(ia3_l, task_ids)
    if is_feedforward:
        return F.linear(act_scale(x, table, ids), weight, bias)
    return act_scale(F.linear(x, weight, bias), table, ids, activation)


def ia3_fold(
    weight: Tensor, bias: Tensor | None, ia3_l: Tensor, is_feedforward: bool = False
) -> tuple[Tensor, Tensor | None]:
    """A task's vector inside the weights; the product in fp32, rounded once, as PEFT merges."""
    l = ia3_l.reshape(-1).to(compute_dtype(weight, ia3_l))  # noqa: E741
    if is_feedforward:
        return (weight * l).to(weight.dtype), bias
    return (weight * l[:, None]).to(weight.dtype), None if bias is None else (bias * l).to(bias.dtype)


def ia3_kv_linear(
    x: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    *,
    k_ia3_l: Tensor,
    v_ia3_l: Tensor,
    task_ids: Tensor | TaskPlan | None = None,
) -> tuple[Tensor, Tensor]:
    k = ia3_linear(x, k_weight, k_bias, ia3_l=k_ia3_l, task_ids=task_ids)
    return k, ia3_linear(x, v_weight, v_bias, ia3_l=v_ia3_l, task_ids=task_ids)


def act_glu(gate: Tensor, up: Tensor, ia3_l: Tensor, task_ids: Tensor | None, activation: str | None) -> Tensor:
    """act(gate) * up * ia3_l[t] with one rounding. ia3_l: [num_tasks, N]; task_ids: [G], where G divides the rows."""
    dtype = compute_dtype(gate, ia3_l)
    h = ACTIVATIONS[activation](gate.to(dtype)) * up.to(dtype)
    return act_scale(h, ia3_l, task_ids).to(gate.dtype)


def act_glu_backward(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    ia3_l: Tensor,
    task_ids: Tensor | None,
    activation: str | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dgate and dup in their dtype and dl [num_tasks, N] in fp32, in a fixed order; what is not needed is empty."""
    need_dx, need_dl = needs
    dtype = compute_dtype(gate, ia3_l)
    g, u, a = gate.to(dtype), up.to(dtype), ACTIVATIONS[activation](gate.to(dtype))
    dz, dl = act_scale_backward(dh.to(dtype), a * u, ia3_l, task_ids, None, need_dx, need_dl)
    if not need_dx:
        return dz.to(gate.dtype), dz.to(gate.dtype), dl
    dgate = dz * u if activation is None else ACTIVATION_BACKWARD[activation](dz * u, g)
    return dgate.to(gate.dtype).contiguous(), (dz * a).to(gate.dtype).contiguous(), dl


def ia3_glu(
    gate: Tensor,
    up: Tensor,
    ia3_l: Tensor,
    task_ids: Tensor | TaskPlan | None = None,
    activation: str | None = "silu",
) -> Tensor:
    return act_glu(gate, up, *_table_and_ids(ia3_l, task_ids), activation)


def ia3_glu_linear(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    ia3_l: Tensor,
    task_ids: Tensor | TaskPlan | None = None,
    activation: str | None = "silu",
) -> Tensor:
    gate, up = F.linear(x, gate_weight, gate_bias), F.linear(x, up_weight, up_bias)
    return ia3_glu(gate, up, ia3_l, task_ids, activation)


def prompt_layout(
    task_ids: Tensor | None,
    prompt_lengths: Tensor | None,
    attention_mask: Tensor | None,
    sizes: tuple[int, int, int, int],
    left: bool,
    device: torch.device,
    after_bos: bool = False,
) -> Tensor:
    """Where things stand in each row, int32 [B, 4]: checked id, spare slots in front, tokens before the prompt, length.

    A row reads `[front spare slots | tokens before | prompt | the other tokens | the other spare slots]`. sizes: B, S,
    num_tasks, P.
    """
    B, S, num_tasks, P = sizes
    ids = torch.zeros(B, dtype=torch.int32, device=device) if task_ids is None else check_ids(task_ids, num_tasks)
    if num_tasks == 0 or prompt_lengths is None:
        length = torch.full((B,), P, device=device)
    else:
        length = prompt_lengths.long().clamp(0, P)[ids.clamp(min=0)]
    length = torch.where(ids >= 0, length, 0)
    front = P - length if left else torch.zeros_like(length)
    if attention_mask is None or S == 0:
        before = torch.full_like(length, int(after_bos and S > 0))
    else:
        real = attention_mask != 0
        first = real.to(torch.uint8).argmax(1) + int(after_bos)
        before = torch.where(real.any(1), first, S if left else 0)
    return torch.stack([ids, front, before, length], 1).to(torch.int32)


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
    embed_scale: float = 1,
    position_embedding: Tensor | None = None,
    position_offset: int = 0,
    token_type_embedding: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    max_position_embeddings: int | None = None,  # a check of the public operator
) -> PromptBatch:
    prompts = prompts[None] if prompts.dim() == 2 else prompts
    tokens = inputs_embeds if input_ids is None else input_ids
    (num_tasks, P, _), (B, S) = prompts.shape, tokens.shape[:2]
    sizes, left = (B, S, num_tasks, P), padding_side == "left"
    layout = prompt_layout(task_ids, prompt_lengths, attention_mask, sizes, left, prompts.device, after_bos)
    mask, positions, labels, token_map = concat_metadata(layout, attention_mask, labels, S, P)
    types = None if token_type_ids is None else slot_types(token_type_ids, token_map)
    bad = (layout[:, :1] == BAD).expand_as(token_map)
    added = added_embeddings(bad, positions, position_embedding, position_offset, types, token_type_embedding)
    table = None if input_ids is None else embedding
    out = concat_embeddings(tokens, table, prompts, layout, embed_scale, added)
    return PromptBatch(out, mask, positions, labels, token_map)


def _slots(layout: Tensor, S: int, P: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each slot [B, P + S]: whether it holds a prompt row, and which, whether it holds a token, and which."""
    _, front, before, length = layout.long().unsqueeze(2).unbind(1)  # [B, 1] each
    slot = torch.arange(P + S, device=layout.device)[None] - front
    is_prompt = (slot >= before) & (slot < before + length)
    source = torch.where(slot < before, slot, slot - length)
    return is_prompt, slot - before, ~is_prompt & (source >= 0) & (source < S), source


class Added(NamedTuple):
    """What every slot has added: table[ids], ids int64 [B, slots]; both None for nothing."""

    ids: Tensor | None = None
    table: Tensor | None = None


NOTHING_ADDED = Added(), Added()  # types, positions


def added_embeddings(
    bad: Tensor,
    position_ids: Tensor | None,
    position_embedding: Tensor | None,
    position_offset: int,
    token_type_ids: Tensor | None,
    token_type_embedding: Tensor | None,
) -> tuple[Added, Added]:
    """Types, then positions, the order in which BERT adds them. bad: [B, slots], what is NaN whatever is added."""
    types, positions = NOTHING_ADDED
    if token_type_embedding is not None:
        types = Added(type_rows(bad, token_type_ids), token_type_embedding)
    if position_embedding is not None:
        positions = Added(position_rows(bad, position_ids, position_offset), position_embedding)
    return types, positions


def type_rows(bad: Tensor, token_type_ids: Tensor | None) -> Tensor:
    """Rows of the type table, int64 [B, slots]; -1 where the slot is bad: the table gets no gradient from it."""
    ids = torch.zeros_like(bad, dtype=torch.int64) if token_type_ids is None else token_type_ids.long()
    return torch.where(bad, -1, ids)


def position_rows(bad: Tensor, position_ids: Tensor | None, position_offset: int) -> Tensor:
    """Rows of the position table, likewise; without ids they count."""
    ids = torch.arange(bad.shape[1], device=bad.device) if position_ids is None else position_ids.long()
    return torch.where(bad, -1, ids + position_offset)


def add_embeddings(out: Tensor, added: Sequence[Added]) -> Tensor:
    for ids, table in added:
        if table is not None:
            out = out + lookup(ids, table.to(out.dtype))  # cast first: its gradient is summed in that dtype
    return out


def sum_dtype(dtype: torch.dtype, prompts: Tensor, added: Sequence[Added]) -> torch.dtype:
    """What embeddings of `dtype` are added in: one rounding, at the end. Where nothing is added, they are copied."""
    tables = [table for _, table in added if table is not None]
    return torch.promote_types(dtype, compute_dtype(prompts, *tables)) if tables else dtype


def lookup(ids: Tensor, table: Tensor) -> Tensor:
    """table[ids], NaN for an id outside the table."""
    n = table.shape[0]
    rows = F.embedding(ids.clamp(0, n - 1), table) if n else table.new_zeros(*ids.shape, table.shape[1])
    return torch.where(((ids >= 0) & (ids < n))[..., None], rows, float("nan"))


def rounded_scale(embed_scale: float, dtype: torch.dtype) -> Tensor:
    """What transformers' Gemma multiplies embeddings of `dtype` by: a buffer in fp32, cast where it is used."""
    return torch.tensor(embed_scale, dtype=torch.float32).to(dtype)


def scale_of(embed_scale: float, dtype: torch.dtype) -> float:
    """The same as a number, for a kernel."""
    return 1.0 if embed_scale == 1.0 else rounded_scale(embed_scale, dtype).item()


def scaled(embeddings: Tensor, embed_scale: float, dtype: torch.dtype) -> Tensor:
    return embeddings if embed_scale == 1.0 else embeddings * rounded_scale(embed_scale, dtype)


def slot_types(token_type_ids: Tensor, token_map: Tensor) -> Tensor:
    """The type of each slot: its token's; 0, which PEFT gives prompts, where there is no token."""
    return _take(token_type_ids, token_map, token_map >= 0)


def concat_embeddings(
    tokens: Tensor,
    embedding: Tensor | None,
    prompts: Tensor,
    layout: Tensor,
    embed_scale: float = 1.0,
    added: Sequence[Added] = (),
) -> Tensor:
    """[B, P + S, E] from ids [B, S] and a table, or from embeddings [B, S, E]."""
    num_tasks, P, E = prompts.shape
    B, S = tokens.shape[:2]
    is_prompt, prompt_row, is_token, source = _slots(layout, S, P)
    out_dtype = tokens.dtype if embedding is None else embedding.dtype
    dtype = sum_dtype(out_dtype, prompts, added)
    if embedding is not None:
        tokens = scaled(lookup(tokens, embedding).to(dtype), embed_scale, out_dtype)
    out = _take(tokens.to(dtype), source, is_token)
    task = layout[:, :1].long()
    if num_tasks and P:
        row = task.clamp(min=0) * P + prompt_row.clamp(0, P - 1)
        prompt = prompts.reshape(num_tasks * P, E).index_select(0, row.reshape(-1)).reshape(B, P + S, E)
        out = torch.where(is_prompt[..., None], prompt.to(dtype), out)
    out = add_embeddings(out, added).to(out_dtype)
    return torch.where((task == BAD)[..., None], float("nan"), out)


def concat_metadata(
    layout: Tensor, attention_mask: Tensor | None, labels: Tensor | None, S: int, P: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """attention_mask, position_ids, labels and token_map of a PromptBatch."""
    is_prompt, _, is_token, source = _slots(layout, S, P)
    if attention_mask is None:
        mask = (is_prompt | is_token).long()
    else:
        mask = torch.where(is_prompt, 1, _take(attention_mask, source, is_token)).to(attention_mask.dtype)
    real = mask != 0
    positions = torch.where(real, real.cumsum(1) - 1, 0)
    text = is_token & real
    if labels is not None:
        labels = torch.where(text, _take(labels, source, is_token), -100)
    return mask, positions, labels, torch.where(text, source, -1)


def concat_backward(dout: Tensor, layout: Tensor, num_tasks: int, P: int) -> Tensor:
    """dprompts [num_tasks, P, E] in fp32: each task's rows of the batch in order."""
    B, E = dout.shape[0], dout.shape[2]
    ids, front, before, length = layout.long().unbind(1)
    p = torch.arange(P, device=dout.device)
    row = torch.arange(B, device=dout.device)[:, None] * dout.shape[1] + (front + before)[:, None] + p
    has = p < length[:, None]
    # what is no prompt adds to a last slot that nobody reads
    slot = torch.where(has & (ids >= 0)[:, None], ids[:, None] * P + p, num_tasks * P)
    dtype = compute_dtype(dout)
    rows = dout.reshape(B * dout.shape[1], E).index_select(0, torch.where(has, row, 0).reshape(-1)).to(dtype)
    dprompts = torch.zeros(num_tasks * P + 1, E, dtype=dtype, device=dout.device)
    return dprompts.index_add_(0, slot.reshape(-1), rows)[:-1].clone().view(num_tasks, P, E)


def take_tokens(dout: Tensor, layout: Tensor, P: int) -> Tensor:
    """The gradient of the token embeddings, [B, S, E]: the slots of dout that hold them."""
    S = dout.shape[1] - P
    _, front, before, length = layout.long().unsqueeze(2).unbind(1)
    s = torch.arange(S, device=dout.device)[None]
    valid = (layout[:, :1] != BAD).expand(-1, S)  # a bad sequence is NaN: its gradient must not reach what others share
    return _take(dout, front + s + torch.where(s < before, 0, length), valid)


def _take(values: Tensor, source: Tensor, valid: Tensor) -> Tensor:
    """values[b, source[b, j]] where valid, else 0. values: [B, S] or [B, S, E]."""
    B, S = values.shape[:2]
    if S == 0:
        return values.new_zeros((B, source.shape[1], *values.shape[2:]))
    row = torch.arange(B, device=values.device)[:, None] * S
    taken = values.reshape(B * S, *values.shape[2:]).index_select(0, (row + source.clamp(0, S - 1)).reshape(-1))
    taken = taken.reshape(B, source.shape[1], *values.shape[2:])
    return torch.where(valid.view(*valid.shape, *[1] * (values.dim() - 2)), taken, 0)


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
    max_position_embeddings: int | None = None,  # a check of the public operator
) -> Tensor:
    prompts = prompts[None] if prompts.dim() == 2 else prompts
    rows = embed_rows(input_ids, embedding.shape[0], task_ids, prompt_lengths, *prompts.shape[:2])
    bad = rows > prompts.shape[0] * prompts.shape[1]
    added = added_embeddings(
        bad, position_ids, position_embedding, position_offset, token_type_ids, token_type_embedding
    )
    return embed_tokens(input_ids, embedding, prompts, rows, embed_scale, added)


def embed_rows(
    input_ids: Tensor, V: int, task_ids: Tensor | None, prompt_lengths: Tensor | None, num_tasks: int, P: int
) -> Tensor:
    """Which prompt row each id is, int32 [B, S]: t * P + p; num_tasks * P for a token, one more for what is neither."""
    layout = prompt_layout(
        task_ids, prompt_lengths, None, (*input_ids.shape, num_tasks, P), False, input_ids.device
    ).long()
    task, length = layout[:, :1], layout[:, 3:]
    p = input_ids.clamp(min=V) - V
    is_token = (input_ids >= 0) & (input_ids < V) & (task != BAD)
    no_prompt = torch.where(is_token, num_tasks * P, num_tasks * P + 1)
    return torch.where((input_ids >= V) & (p < length), task * P + p, no_prompt).to(torch.int32)


def embed_tokens(
    input_ids: Tensor,
    embedding: Tensor,
    prompts: Tensor,
    rows: Tensor,
    embed_scale: float = 1.0,
    added: Sequence[Added] = (),
) -> Tensor:
    """[B, S, E] from ids and what `embed_rows` says of them."""
    num_tasks, P, E = prompts.shape
    dtype = sum_dtype(embedding.dtype, prompts, added)
    out = lookup(torch.where(rows == num_tasks * P, input_ids, -1), embedding)
    out = scaled(out.to(dtype), embed_scale, embedding.dtype)
    if num_tasks and P:
        row = rows.clamp(max=num_tasks * P - 1).reshape(-1)
        prompt = prompts.reshape(num_tasks * P, E).index_select(0, row).reshape(*rows.shape, E)
        out = torch.where((rows < num_tasks * P)[..., None], prompt.to(dtype), out)
    return add_embeddings(out, added).to(embedding.dtype)


def embed_backward(dout: Tensor, rows: Tensor, num_tasks: int, P: int) -> Tensor:
    """dprompts [num_tasks, P, E] in fp32: the slots of each prompt row, in the batch's order."""
    dtype, E = compute_dtype(dout), dout.shape[2]
    dprompts = torch.zeros(num_tasks * P + 2, E, dtype=dtype, device=dout.device)  # the last two are read by nobody
    dprompts.index_add_(0, rows.reshape(-1), dout.flatten(0, 1).to(dtype))
    return dprompts[:-2].clone().view(num_tasks, P, E)


def embedding_backward(dout: Tensor, ids: Tensor, n: int, wide: bool = False) -> Tensor:
    """Sum of dout per id, [n, E], in a fixed order. aten checks no ids on a GPU: a bad one becomes its padding_idx.

    wide: for few ids with many rows each. On a CPU aten sums 16-bit rows in 16 bits: of 4,128 one is lost in ten.
    """
    if wide and not dout.is_cuda and dout.dtype.itemsize == 2:
        dout = dout.float()
    ids = torch.where((ids >= 0) & (ids < n), ids, -1).long()
    return torch.ops.aten.embedding_dense_backward(dout, ids, n, -1, False)


class PackedPromptBatch(NamedTuple):
    """What `prompt_concat_packed` returns; a base sequence has no prompt.

    Attributes:
        inputs_embeds: [num_rows, E], in the dtype of the embedding; 0 in the tail, which no sequence covers.
        cu_seqlens: int32 [B + 1], where each sequence starts and the last one ends, as variable-length attention
            takes them.
        max_seqlen: no sequence is longer than this.
        position_ids: int64 [num_rows], counting from 0 in each sequence; 0 in the tail.
        labels: [num_rows], -100 on prompts and in the tail; None if no labels were given.
        token_map: int64 [num_rows], the index in `input_ids` that a row came from; -1 for prompts and the tail.
    """

    inputs_embeds: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    position_ids: Tensor
    labels: Tensor | None
    token_map: Tensor


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
    max_position_embeddings: int | None = None,  # a check of the public operator
) -> PackedPromptBatch:
    prompts = prompts[None] if prompts.dim() == 2 else prompts
    tokens = inputs_embeds if input_ids is None else input_ids
    (num_tasks, P, _), total = prompts.shape, tokens.shape[0]
    num_rows = total + (cu_seqlens.shape[0] - 1) * P if num_rows is None else num_rows
    layout, cu_seqlens = packed_layout(cu_seqlens, task_ids, prompt_lengths, (total, num_tasks, P, num_rows), after_bos)
    rows = packed_rows(layout, cu_seqlens, num_rows)
    out = packed_embeddings(tokens, None if input_ids is None else embedding, prompts, rows, embed_scale)
    positions, labels, token_map = packed_metadata(labels, rows)
    return PackedPromptBatch(out, cu_seqlens, max_seqlen + P, positions, labels, token_map)


def packed_layout(
    cu_seqlens: Tensor,
    task_ids: Tensor | None,
    prompt_lengths: Tensor | None,
    sizes: tuple[int, int, int, int],
    after_bos: bool,
) -> tuple[Tensor, Tensor]:
    """Where things stand: int32 [B + 1, 4] (checked id, first token, tokens before the prompt, prompt length), whose
    last row is the tail's, and the new cu_seqlens. sizes: total, num_tasks, P, num_rows.

    Offsets that do not ascend from 0 to at most total make every id bad: whose rows are whose, nobody knows.
    """
    total, num_tasks, P, num_rows = sizes
    B, cu = cu_seqlens.shape[0] - 1, cu_seqlens.long()
    wrong = (cu[0] != 0) | (cu[1:] < cu[:-1]).any() | (cu[-1] > total)
    start, end = cu[:-1].clamp(0, total), cu[1:].clamp(0, total)
    count = (end - start).clamp(min=0)
    ids, _, _, length = prompt_layout(task_ids, prompt_lengths, None, (B, 0, num_tasks, P), False, cu.device).unbind(1)
    ids, length = torch.where(wrong, BAD, ids), torch.where(wrong, 0, length)
    before = count.clamp(max=int(after_bos))
    layout = F.pad(torch.stack([ids, start, before, length], 1), (0, 0, 0, 1))
    layout[B, 0] = torch.where(wrong, BAD, BASE)
    ends = (count + length).cumsum(0).clamp(max=num_rows)
    return layout.to(torch.int32), F.pad(ends, (1, 0)).to(torch.int32)


class PackedRows(NamedTuple):
    """Per row of a packed batch: what stands there, and where. Each [num_rows].

    Attributes:
        position: its place in its sequence, 0 in the tail.
        task: its sequence's checked id.
        is_prompt, prompt_row: whether it holds a row of the prompt, and which.
        source: the token that it holds, -1 for none.
    """

    position: Tensor
    task: Tensor
    is_prompt: Tensor
    prompt_row: Tensor
    source: Tensor


def packed_rows(layout: Tensor, cu_seqlens: Tensor, num_rows: int) -> PackedRows:
    row = torch.arange(num_rows, device=layout.device, dtype=torch.int32)
    b = torch.searchsorted(cu_seqlens, row, right=True) - 1  # the last that starts there: those before it are empty
    task, start, before, length = layout.long().index_select(0, b).unbind(1)
    slot = row - cu_seqlens.index_select(0, b)
    p = slot - before
    is_prompt = (p >= 0) & (p < length)
    covered = b < cu_seqlens.shape[0] - 1
    source = torch.where(covered & ~is_prompt, start + slot - torch.where(p < 0, 0, length), -1)
    return PackedRows(torch.where(covered, slot, 0).long(), task, is_prompt, p, source)


def packed_embeddings(
    tokens: Tensor, embedding: Tensor | None, prompts: Tensor, rows: PackedRows, embed_scale: float = 1.0
) -> Tensor:
    """[num_rows, E] from ids [total] and a table, or from embeddings [total, E]."""
    num_tasks, P, E = prompts.shape
    bad = rows.task == BAD
    is_token = (rows.source >= 0) & ~bad
    taken = _take_or(tokens, rows.source, 0)
    if embedding is not None:
        V = embedding.shape[0]
        known = (taken >= 0) & (taken < V)
        bad, is_token = bad | (is_token & ~known), is_token & known
        taken = F.embedding(taken.clamp(0, V - 1), embedding) if V else embedding.new_zeros(taken.shape[0], E)
        taken = scaled(taken, embed_scale, embedding.dtype)
    out = torch.where(is_token[:, None], taken, torch.where(bad, float("nan"), 0.0).to(taken.dtype)[:, None])
    if num_tasks and P:
        row = rows.task.clamp(min=0) * P + rows.prompt_row.clamp(0, P - 1)
        prompt = prompts.reshape(num_tasks * P, E).index_select(0, row)
        out = torch.where(rows.is_prompt[:, None], prompt.to(out.dtype), out)
    return out


def packed_metadata(labels: Tensor | None, rows: PackedRows) -> tuple[Tensor, Tensor | None, Tensor]:
    """position_ids, labels and token_map of a PackedPromptBatch."""
    return rows.position, None if labels is None else _take_or(labels, rows.source, -100), rows.source


def packed_backward(dout: Tensor, layout: Tensor, cu_seqlens: Tensor, num_tasks: int, P: int) -> Tensor:
    """dprompts [num_tasks, P, E] in fp32: each task's sequences of the batch in order."""
    ids, _, before, length = layout[:-1].long().unbind(1)
    p = torch.arange(P, device=dout.device)
    row = (cu_seqlens[:-1] + before)[:, None] + p
    has = (p < length[:, None]) & (row < cu_seqlens[1:, None])
    # what is no prompt, or was dropped, adds to a last slot that nobody reads
    slot = torch.where(has, ids[:, None] * P + p, num_tasks * P)
    dtype, E = compute_dtype(dout), dout.shape[1]
    rows = _take_or(dout, torch.where(has, row, -1).reshape(-1), 0).to(dtype)
    dprompts = torch.zeros(num_tasks * P + 1, E, dtype=dtype, device=dout.device)
    return dprompts.index_add_(0, slot.reshape(-1), rows)[:-1].clone().view(num_tasks, P, E)


def packed_tokens(input_ids: Tensor, layout: Tensor, cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """The token id of each row, [num_rows]; -1 where there is none, or the sequence is bad."""
    rows = packed_rows(layout, cu_seqlens, num_rows)
    return _take_or(input_ids, torch.where(rows.task == BAD, -1, rows.source), -1)


def take_packed_tokens(dout: Tensor, layout: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """The gradient of the token embeddings, [total, E]: the rows of dout that hold them, 0 where none does."""
    B = cu_seqlens.shape[0] - 1
    if B == 0:
        return dout.new_zeros(total, dout.shape[1])
    token = torch.arange(total, device=dout.device, dtype=torch.int32)
    b = torch.searchsorted(layout[:-1, 1].contiguous(), token, right=True).clamp(min=1) - 1
    task, start, before, length = layout.long().index_select(0, b).unbind(1)
    slot = token - start
    row = cu_seqlens[b] + slot + torch.where(slot < before, 0, length)
    # a bad sequence is NaN: its gradient must not reach what others share
    return _take_or(dout, torch.where((task != BAD) & (row < cu_seqlens[b + 1]), row, -1), 0)


def _take_or(values: Tensor, source: Tensor, other: int) -> Tensor:
    """values[source[i]], or `other` where source is -1. values: [n] or [n, E]."""
    if values.shape[0] == 0:
        return values.new_full((source.shape[0], *values.shape[1:]), other)
    taken = values.index_select(0, source.clamp(min=0))
    return torch.where(source.view(-1, *[1] * (values.dim() - 1)) >= 0, taken, other)
