"""Task plan: which task each row belongs to, made once per batch and shared by every layer."""

import torch
from torch import Tensor

from peft_ops import reference
from peft_ops._backend import LazyKernels, use_triton
from peft_ops._checks import IDS, check_ids_in_range, check_tensor
from peft_ops._launch import launch
from peft_ops._library import Operator, use_reference
from peft_ops.reference import TaskPlan

kernels, tiles = LazyKernels("task_plan"), LazyKernels("tiles")


def per_sequence(task_ids: Tensor | None, plan, rows_per_id: int) -> Tensor | None:
    """A plan's ids, one for each of its rows, as one per sequence where they came so: a backward sorts fewer."""
    if task_ids is None or plan is None or not isinstance(rows_per_id, int) or rows_per_id <= 1:
        return task_ids  # a symbolic size stays as it is: nothing is traced for it
    return task_ids.view(-1, rows_per_id).select(1, 0)


def launch_plan(
    task_ids: Tensor, cu_seqlens: Tensor | None, rows: int, num_tasks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids, tiles, run_index and run_end of a TaskPlan, in one launch."""
    num_tiles = tiles.cdiv(rows, tiles.PLAN_TILE)

    def new(*size):
        return torch.empty(size, dtype=torch.int32, device=task_ids.device)

    plan = new(rows), new(num_tiles * 3), new(rows), new(num_tiles * tiles.PLAN_TILE)
    if rows == 0:
        return plan
    ids, tile, run_index, run_end = plan
    with torch.cuda.device_of(task_ids):
        launch(
            kernels.plan_tasks_kernel, (num_tiles,),
            task_ids, cu_seqlens, ids, tile, run_index, run_end,
            rows, task_ids.numel(), max(rows // max(task_ids.numel(), 1), 1), num_tasks,
            PACKED=cu_seqlens is not None, TILE=tiles.PLAN_TILE, num_warps=4,
        )  # fmt: skip
    return plan


def _plan_tasks(task_ids: Tensor, cu_seqlens: Tensor | None, rows: int, num_tasks: int):
    check_ids_in_range("plan_tasks", task_ids, num_tasks)
    if use_triton("plan_tasks", task_ids):
        return launch_plan(task_ids, cu_seqlens, rows, num_tasks)
    return tuple(reference.plan_tasks(task_ids, rows, num_tasks, cu_seqlens=cu_seqlens)[:4])


def _plan_tasks_fake(task_ids, cu_seqlens, rows, num_tasks):
    num_tiles = (rows + 127) // 128

    def new(*size):
        return task_ids.new_empty(size, dtype=torch.int32)

    return new(rows), new(num_tiles * 3), new(rows), new(num_tiles * 128)


_plan_tasks_op = Operator("plan_tasks", _plan_tasks, _plan_tasks_fake)


def plan_tasks(task_ids: Tensor, rows: int, num_tasks: int, *, cu_seqlens: Tensor | None = None) -> TaskPlan:
    """Prepare a batch's task selection once, for every (IA)^3 operator: they take the plan as `task_ids`.

    One launch, no synchronisation, no shape that depends on data. It is valid for every layer with `num_tasks` tasks
    whose input has `rows` rows (all leading dimensions of x together).

    Semantics: task_ids.repeat_interleave(rows // len(task_ids)), or .repeat_interleave(cu_seqlens.diff()) if packed

    Args:
        task_ids: int32 or int64, one per sequence (any shape whose element count divides `rows`); -1 is the base model.
        rows: rows of x, `x.shape[:-1].numel()`.
        num_tasks: rows of the (IA)^3 table.
        cu_seqlens: int32 or int64 [len(task_ids) + 1], where each sequence of a packed batch starts, ascending from 0.
            A row that no sequence covers counts as a bad id.

    Raises:
        IndexError: an id outside [-1, num_tasks), on a CPU. On a GPU such a row becomes NaN (PEFT_OPS_DEBUG=1 raises
            there too).
    """
    op = "plan_tasks"
    check_tensor(op, "task_ids", task_ids, dtypes=IDS)
    task_ids = task_ids if task_ids.dim() == 1 else task_ids.reshape(-1)
    count = task_ids.shape[0]
    for arg, value in (("rows", rows), ("num_tasks", num_tasks)):
        if type(value) is not int and (not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool)):
            raise TypeError(f"{op}: {arg} must be an int, got {type(value).__name__}")
        if value < 0:
            raise ValueError(f"{op}: {arg} must be at least 0, got {value}")
    if cu_seqlens is not None:
        check_tensor(op, "cu_seqlens", cu_seqlens, dtypes=IDS, dim=1, like=task_ids)
        if cu_seqlens.shape[0] != count + 1:
            raise ValueError(
                f"{op}: cu_seqlens must have {count + 1} entries for {count} task_ids, got {cu_seqlens.shape[0]}"
            )
    elif (count == 0 and rows > 0) or (count > 0 and rows % count != 0):
        raise ValueError(f"{op}: rows must be a multiple of the {count} task_ids, got {rows}")
    if use_reference(task_ids):
        return reference.plan_tasks(task_ids, rows, num_tasks, cu_seqlens=cu_seqlens)
    tensors = _plan_tasks_op(
        task_ids.contiguous(), None if cu_seqlens is None else cu_seqlens.contiguous(), rows, num_tasks
    )
    return TaskPlan(*tensors, num_tasks, 1 if cu_seqlens is not None or count == 0 else rows // count)
