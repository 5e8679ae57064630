"""Checks of what a user passes, with one wording: `{op}: {arg} must {what}, got {value}`."""

import torch
from torch import Tensor

from peft_ops._backend import DEBUG, INTERPRET
from peft_ops._library import has_native, native
from peft_ops.reference import ACTIVATIONS, TaskPlan

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NARROW_FLOATS = FLOATS[:3]
IDS = (torch.int32, torch.int64)


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
    if like is not None and t.device != like.device:
        raise ValueError(f"{op}: {arg} must be on {like.device}, as the other arguments are, got {t.device}")


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


def check_ids_in_range(op: str, ids: Tensor | None, end: int, arg: str = "task_ids", low: int = -1) -> None:
    """Raise IndexError for an id outside [low, end). Called by implementations, on real tensors.

    On a GPU it would synchronise, so only with PEFT_OPS_DEBUG=1; the interpreter behaves as a GPU does. There the row
    is NaN.
    """
    if ids is None or ids.numel() == 0 or ((ids.is_cuda or INTERPRET) and not DEBUG):
        return
    ids = ids.reshape(-1)
    if has_native() and not ids.is_cuda and end > low:
        at = native.first_bad_id(ids if low == -1 else ids - (low + 1), end - low - 1)
    else:
        bad = (ids < low) | (ids >= end)
        at = int(bad.to(torch.uint8).argmax()) if bool(bad.any()) else -1
    if at >= 0:
        raise IndexError(f"{op}: {arg} must be in [{low}, {end}), got {int(ids[at])} at position {at}")
