"""Checks of what a user passes, with one wording: `{op}: {arg} must {what}, got {value}`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_ops._backend import DEBUG, INTERPRET
from peft_ops._library import has_native, native
from peft_ops.reference import ACTIVATIONS, Added, TaskPlan

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NARROW_FLOATS = FLOATS[:3]
IDS = (torch.int32, torch.int64)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, *IDS)


def shape(t: Tensor) -> list[int]:
    return list(t.shape)


def check_tensor(op: str, arg: str, t, *, dtypes: tuple, dim: int | None = None, like: Tensor | None = None) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {arg} must be a tensor, got {type(t).__name__}")
    if t.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {arg} must have dtype {names}, got {str(t.dtype).removeprefix('torch.')}")
    if dim is not None and t.dim() != dim:
        raise ValueError(f"{op}: {arg} must have {dim} dimension{'s' * (dim != 1)}, got shape {shape(t)}")
    # a device is made anew each time it is asked for, is_cpu is not
    if like is not None and not (t.is_cpu and like.is_cpu) and t.device != like.device:
        raise ValueError(f"{op}: {arg} must be on {like.device}, as the other arguments are, got {t.device}")


def check_bool(op: str, arg: str, value) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {arg} must be a bool, got {type(value).__name__}")


def check_activation(op: str, activation) -> None:
    if not isinstance(activation, (str, type(None))) or activation not in ACTIVATIONS:
        wanted = ", ".join(repr(a) for a in ACTIVATIONS)
        raise ValueError(f"{op}: activation must be one of {wanted}, got {activation!r}")


def check_table(op: str, arg: str, table, N: int, like: Tensor, has_ids: bool) -> Tensor:
    """An (IA)^3 vector or table as [num_tasks, N] with contiguous rows."""
    check_tensor(op, arg, table, dtypes=FLOATS if like.dtype is torch.float64 else NARROW_FLOATS, like=like)
    if table.dim() == 1:
        table = table.unsqueeze(0)
    size = table.shape
    if len(size) != 2 or size[1] != N:
        hint = "; flatten PEFT's column" if tuple(size) == (N, 1) else ""
        raise ValueError(f"{op}: {arg} must have shape [{N}] or [num_tasks, {N}], got {shape(table)}{hint}")
    if not has_ids and size[0] != 1:
        raise ValueError(f"{op}: task_ids must be given, because {arg} holds {size[0]} tasks, got None")
    return table if table.is_contiguous() or table.stride(1) == 1 or N <= 1 else table.contiguous()


def check_task_ids(
    op: str, task_ids, lead: tuple, num_tasks: int, like: Tensor
) -> tuple[Tensor | None, list[Tensor] | None, int]:
    """Ids [G] where G divides the rows, the tensors of a plan or None, and how many rows share an id.

    lead: x.shape[:-1]. Ids may have the shape of a prefix of it, or [B] where x is 3-D or more and lead[0] is a
    multiple of B.
    """
    if task_ids is None:
        return None, None, 1
    rows = 1
    for size in lead:
        rows = rows * size
    if isinstance(task_ids, TaskPlan):
        plan = task_ids
        check_tensor(op, "task_ids", plan.task_ids, dtypes=IDS, like=like)
        if plan.num_tasks != num_tasks:
            raise ValueError(f"{op}: task_ids must be a plan for {num_tasks} tasks, got one for {plan.num_tasks}")
        if plan.task_ids.shape[0] != rows:
            raise ValueError(f"{op}: task_ids must be a plan for {rows} rows, got one for {plan.task_ids.shape[0]}")
        return plan.task_ids, [plan.tiles, plan.run_index, plan.run_end], plan.rows_per_id
    check_tensor(op, "task_ids", task_ids, dtypes=IDS, like=like)
    d = task_ids.dim()
    prefix = d > 0 and task_ids.shape == lead[:d]
    beams = not prefix and d == 1 and len(lead) >= 2 and task_ids.shape[0] > 0 and lead[0] % task_ids.shape[0] == 0
    if not (prefix or beams):
        hint = (
            "" if len(lead) >= 2 else "; for a packed batch pass plan_tasks(task_ids, rows, num_tasks, cu_seqlens=...)"
        )
        raise ValueError(
            f"{op}: task_ids must have a shape that starts {list(lead)}, or [B] with {lead[0] if lead else 1} "
            f"a multiple of B and x at least 3-D, got {shape(task_ids)}{hint}"
        )
    ids = task_ids if d == 1 and task_ids.is_contiguous() else task_ids.reshape(-1).contiguous()
    count = ids.shape[0]
    return ids, None, rows // count if count else 1


def check_prompts(op: str, prompts, task_ids, prompt_lengths) -> Tensor:
    """The prompts as [num_tasks, P, E]; whether there is one id per sequence is for the operator to see."""
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
    return prompts


def check_embedding(op: str, arg: str, table, prompts: Tensor) -> None:
    check_tensor(op, arg, table, dtypes=FLOATS, dim=2, like=prompts)
    if table.shape[1] != prompts.shape[2]:
        raise ValueError(f"{op}: {arg} must have {prompts.shape[2]} features, as prompts have, got {shape(table)}")


def check_tokens(
    op: str, input_ids, embedding, inputs_embeds, prompts: Tensor, packed: bool = False
) -> tuple[Tensor, Tensor | None]:
    """[B, S] and a table, or [B, S, E] and None; packed: [total] and a table, or [total, E] and None."""
    E, dim = prompts.shape[2], 1 if packed else 2
    if (input_ids is None) == (inputs_embeds is None):
        got = "both" if input_ids is not None else "neither"
        raise ValueError(f"{op}: input_ids must be given, or inputs_embeds, but one of them, got {got}")
    if inputs_embeds is not None:
        check_tensor(op, "inputs_embeds", inputs_embeds, dtypes=FLOATS, dim=dim + 1, like=prompts)
        if inputs_embeds.shape[dim] != E:
            raise ValueError(f"{op}: inputs_embeds must have {E} features, as prompts have, got {shape(inputs_embeds)}")
        return inputs_embeds, None
    check_tensor(op, "input_ids", input_ids, dtypes=IDS, dim=dim, like=prompts)
    check_embedding(op, "embedding", embedding, prompts)
    return input_ids, embedding


def check_embed_scale(op: str, embed_scale) -> None:
    if not isinstance(embed_scale, (float, int)) or isinstance(embed_scale, bool):
        raise TypeError(f"{op}: embed_scale must be a number, got {type(embed_scale).__name__}")


def check_length(op: str, max_position_embeddings, what: str, *sizes: int) -> None:
    """A sequence of sum(sizes) slots, `what` they are, in a model of so many positions; None: no limit."""
    if max_position_embeddings is None:
        return
    if not isinstance(max_position_embeddings, (int, torch.SymInt)) or isinstance(max_position_embeddings, bool):
        raise TypeError(f"{op}: max_position_embeddings must be an int, got {type(max_position_embeddings).__name__}")
    if sum(sizes) > max_position_embeddings:
        what = f"{what} = {' + '.join(map(str, sizes))}"  # not before: a size that is traced would be fixed by it
        raise ValueError(f"{op}: max_position_embeddings must be at least {what}, got {max_position_embeddings}")


def check_added(
    op: str,
    tokens: Tensor,
    prompts: Tensor,
    *,
    embed_scale,
    position_embedding,
    position_offset,
    token_type_embedding,
    token_type_ids,
    position_ids=None,
) -> None:
    """What goes onto the embeddings of tokens [B, S] or [B, S, E]."""
    check_embed_scale(op, embed_scale)
    if not isinstance(position_offset, int):
        raise TypeError(f"{op}: position_offset must be an int, got {type(position_offset).__name__}")
    if position_offset != 0 and position_embedding is None:
        raise ValueError(f"{op}: position_offset must be 0 without position_embedding, got {position_offset}")
    for arg, ids, table_arg, table in (
        ("position_ids", position_ids, "position_embedding", position_embedding),
        ("token_type_ids", token_type_ids, "token_type_embedding", token_type_embedding),
    ):
        if table is not None:
            check_embedding(op, table_arg, table, prompts)
        if ids is None:
            continue
        if table is None:
            raise ValueError(f"{op}: {table_arg} must be given, because {arg} are, got None")
        check_tensor(op, arg, ids, dtypes=IDS, dim=2, like=prompts)
        if shape(ids) != shape(tokens)[:2]:
            raise ValueError(f"{op}: {arg} must have shape {shape(tokens)[:2]}, got {shape(ids)}")


def check_ids_in_range(op: str, ids: Tensor | None, end: int, arg: str = "task_ids", low: int = -1) -> None:
    """Raise IndexError for an id outside [low, end). Called by implementations, on real tensors.

    On a GPU it would synchronise, so only with PEFT_OPS_DEBUG=1; the interpreter behaves as a GPU does. There the row
    is NaN.
    """
    if ids is None or ids.numel() == 0 or ((ids.is_cuda or INTERPRET) and not DEBUG):
        return
    if ids.dim() != 1:
        ids = ids.reshape(-1)
    if has_native() and not ids.is_cuda:
        at = native.first_bad_id.default(ids, low, end)
    else:
        bad = (ids < low) | (ids >= end)
        at = int(bad.to(torch.uint8).argmax()) if bool(bad.any()) else -1
    if at >= 0:
        raise IndexError(f"{op}: {arg} must be in [{low}, {end}), got {int(ids[at])} at position {at}")


def check_added_in_range(op: str, added: Sequence[Added], position_offset: int) -> None:
    """check_ids_in_range for the types and the positions that are added."""
    types, positions = added
    if types.table is not None:
        check_ids_in_range(op, types.ids, types.table.shape[0], "token_type_ids", low=0)
    if positions.table is not None:
        arg = "position_ids" + (f" + {position_offset}" if position_offset else "")
        check_ids_in_range(op, positions.ids, positions.table.shape[0], arg, low=0)
