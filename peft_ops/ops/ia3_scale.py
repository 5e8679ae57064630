"""(IA)^3 row scaling: y[m, n] = x[m, n] * ia3_l[t(m), n]."""

from collections.abc import Callable

import torch
from torch import Tensor

from peft_ops import reference
from peft_ops._backend import INTERPRET, LazyKernels, get_backend, use_triton
from peft_ops._checks import FLOATS, check_ids_in_range, check_table, check_task_ids, check_tensor
from peft_ops._launch import launch
from peft_ops._library import Operator, native, use_native, use_reference
from peft_ops.ops.task_plan import per_sequence
from peft_ops.reference import TaskPlan

kernels, sorting, tiles = LazyKernels("ia3_scale"), LazyKernels("task_plan"), LazyKernels("tiles")


_native_scale = native.ia3_scale.default
_unsafe_view = torch.ops.aten._unsafe_view.default  # the packet would look for the overload at each call: 1 us


def as_rows(x: Tensor) -> Tensor:
    """x as [M, N], without a copy where only its leading dimensions are strided."""
    if x.dim() == 2 and x.stride(1) == 1:
        return x
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


def shaped(rows: Tensor, size: tuple) -> Tensor:
    """rows in another shape, no view in autograd's eyes: what an operator returns may be changed in place."""
    return rows if rows.shape == size else _unsafe_view(rows, size)


def launch_scale(x: Tensor, ia3_l: Tensor, task_ids: Tensor | None, activation: str | None) -> Tensor:
    M, N = x.shape
    task_ids = None if task_ids is None else task_ids.contiguous()
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    tile = tiles.rowwise(M, N)
    grid = tiles.cdiv(M, tile["BLOCK_M"]), tiles.cdiv(N, tile["BLOCK_N"])
    rows_per_id = 1 if task_ids is None else M // task_ids.numel()
    with torch.cuda.device_of(x):
        launch(
            kernels.ia3_scale_fwd_kernel, grid,
            x, ia3_l, task_ids, y,
            M, N, rows_per_id, ia3_l.shape[0],
            x.stride(0), ia3_l.stride(0),
            HAS_IDS=task_ids is not None, ACTIVATION=activation, **tile,
        )  # fmt: skip
    return y


def chunks_by_task(
    task_ids: Tensor | None, M: int, num_tasks: int, device: torch.device
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Rows grouped by task, in pieces of CHUNK_ROWS of a task's own rows in row order; static shapes, no sync.

    Returns the positions of task_ids sorted by task (stable), chunks int32 [C, 3] (first row in that order, end, task),
    and int32 [num_tasks + 1], where each task's chunks start. C bounds their number; the ones left over are empty.
    The base model (-1) and bad ids (-2) come last: they have gradients of x alone, and their sums are read by nobody.
    """

    def new(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=device)

    size, block = tiles.CHUNK_ROWS, tiles.SORT_BLOCK
    groups = 1 if task_ids is None else task_ids.numel()
    num_chunks = M // size + min(num_tasks + 2, groups)
    chunks, chunk_start = new(num_chunks, 3), new(num_tasks + 1)
    with torch.cuda.device_of(chunks):
        if task_ids is None:
            order, key = None, torch.zeros(1, dtype=torch.int32, device=device)
        elif groups > tiles.SORT_LIMIT:
            known = (task_ids >= 0) & (task_ids < num_tasks)
            key = torch.where(known, task_ids, torch.where(task_ids == -1, num_tasks, num_tasks + 1))
            key, order = (t.to(torch.int32) for t in key.sort(stable=True))
        else:
            # zeros: ids that another stream changes meanwhile leave ranks out, and every row number must be one
            order, key = torch.zeros((2, groups), dtype=torch.int32, device=device)
            launch(
                sorting.sort_ids_kernel, (tiles.cdiv(groups, block),),
                task_ids.contiguous(), order, key, groups, num_tasks, BLOCK=block, num_warps=4,
            )  # fmt: skip
        launch(
            sorting.chunk_rows_kernel, (tiles.cdiv(num_tasks + 2, block),),
            key, chunk_start, chunks, groups, M // groups, num_tasks, num_chunks,
            CHUNK=size, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return order, chunks, chunk_start


def launch_scale_backward(
    dy: Tensor, x: Tensor, ia3_l: Tensor, task_ids: Tensor | None, activation: str | None, need_dx: bool, need_dl: bool
) -> tuple[Tensor, Tensor]:
    """dx like x, contiguous, and dl fp32 [num_tasks, N]; what is not needed is empty."""
    M, N = x.shape
    num_tasks = ia3_l.shape[0]
    dx = x.new_empty((M, N) if need_dx else 0)
    dl = torch.zeros((num_tasks, N) if need_dl else 0, dtype=torch.float32, device=x.device)
    if M * N == 0:
        return dx, dl
    order, chunks, chunk_start = chunks_by_task(task_ids, M, num_tasks, x.device)
    part = torch.empty((chunks.shape[0], N) if need_dl else 0, dtype=torch.float32, device=x.device)
    tile = tiles.scale_backward(N, erf=activation == "gelu")
    with torch.cuda.device_of(x):
        launch(
            kernels.ia3_scale_bwd_kernel, (chunks.shape[0], tiles.cdiv(N, tile["BLOCK_N"])),
            dy, x, ia3_l, order, chunks, dx, part,
            N, 1 if task_ids is None else M // task_ids.numel(), num_tasks,
            dy.stride(0), x.stride(0), ia3_l.stride(0),
            HAS_IDS=task_ids is not None, ACTIVATION=activation, NEED_DX=need_dx, NEED_DL=need_dl, **tile,
        )  # fmt: skip
    if need_dl and num_tasks:
        sum_chunks(part, chunk_start, dl)
    return dx, dl


def sum_chunks(part: Tensor, chunk_start: Tensor, dl: Tensor) -> None:
    """dl[t] = the sum of task t's chunks, in ascending order."""
    num_tasks, N = dl.shape
    tile = tiles.sum_chunks(N)
    with torch.cuda.device_of(dl):
        grid = num_tasks, tiles.cdiv(N, tile["BLOCK_N"])
        launch(kernels.sum_chunks_kernel, grid, part, chunk_start, dl, N, **tile)


def scale_forward(op: str, x: Tensor, ia3_l: Tensor, task_ids: Tensor | None, activation: str | None = None) -> Tensor:
    """act(x) * ia3_l[t], contiguous. The elementwise half of every (IA)^3 operator: ids checked, kernel chosen."""
    check_ids_in_range(op, task_ids, ia3_l.shape[0])
    if use_native("ia3_scale", x, fused=task_ids is not None or activation is not None):
        if x.is_contiguous() and x.dim() > 1 and x.is_cpu:  # the C++ kernel for a CPU takes any dimensions
            return _native_scale(x, ia3_l, task_ids, activation)
        return shaped(_native_scale(as_rows(x), ia3_l, task_ids, activation), x.shape)
    if use_triton(op, x):
        return shaped(launch_scale(as_rows(x), ia3_l, task_ids, activation), x.shape)
    if task_ids is None and activation is None and x.dtype is ia3_l.dtype is torch.float32:
        return shaped((x * ia3_l[0]).contiguous(), x.shape)  # the reference, without 3 us of conversions to itself
    return _unsafe_view(reference.act_scale(x, ia3_l, task_ids, activation).contiguous(), x.shape)  # it may be a view


def _ia3_scale(x: Tensor, ia3_l: Tensor, task_ids: Tensor | None, activation: str | None) -> Tensor:
    return scale_forward("ia3_scale", x, ia3_l, task_ids, activation)


def _ia3_scale_backward(
    dy: Tensor, x: Tensor, ia3_l: Tensor, task_ids: Tensor | None, activation: str | None, needs: list[bool]
):
    need_dx, need_dl = needs
    if use_triton("ia3_scale", x):
        dx, dl = launch_scale_backward(as_rows(dy), as_rows(x), ia3_l, task_ids, activation, need_dx, need_dl)
    elif use_native("ia3_scale_backward", x):
        dx, dl = native.ia3_scale_backward(as_rows(dy), as_rows(x), ia3_l, task_ids, activation, need_dx, need_dl)
    else:
        dx, dl = reference.act_scale_backward(dy, x, ia3_l, task_ids, activation, need_dx, need_dl)
    return dx.view(x.shape) if need_dx else dx, dl


def _ia3_scale_backward_fake(dy, x, ia3_l, task_ids, activation, needs):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    dx = torch.empty(x.shape if needs[0] else 0, dtype=x.dtype, device=x.device)
    return dx, torch.empty(ia3_l.shape if needs[1] else 0, dtype=dtype, device=x.device)


_backward_op = Operator("ia3_scale_backward", _ia3_scale_backward, _ia3_scale_backward_fake)


def scale_backward(dy, x, ia3_l, task_ids, activation, need_dx, need_dl) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of act(x) * ia3_l[t] for x and ia3_l, in their dtypes; None where not needed."""
    if not (need_dx or need_dl):
        return None, None
    dx, dl = _backward_op(dy, x, ia3_l, task_ids, activation, [need_dx, need_dl])
    return dx if need_dx else None, dl.to(ia3_l.dtype) if need_dl else None


def _setup_context(ctx, inputs, output):
    x, ia3_l, task_ids, activation = inputs
    ctx.activation = activation
    ctx.needs_x = ctx.needs_input_grad[1] or activation is not None
    ctx.save_for_backward(x if ctx.needs_x else None, ia3_l, task_ids)


def _backward(ctx, dy):
    x, ia3_l, task_ids = ctx.saved_tensors
    # without dl and activation nothing of x is read: dy, which has its shape, stands in for it
    x = dy if x is None else x
    dx, dl = scale_backward(dy, x, ia3_l, task_ids, ctx.activation, ctx.needs_input_grad[0], ctx.needs_input_grad[1])
    return dx, dl, None, None


_op = Operator(
    "ia3_scale",
    _ia3_scale,
    lambda x, ia3_l, task_ids, activation: torch.empty(x.shape, dtype=x.dtype, device=x.device),
    _setup_context,
    _backward,
)


def scale_by(ia3_l: Tensor, task_ids: Tensor | None, activation: str | None = None) -> Callable[[Tensor], Tensor]:
    """x -> act(x) * ia3_l[t] for CPU tensors of one size, without gradient and without checks (8 us): of a table and
    ids that are known good. What serves a dtype is asked once."""
    served: dict[torch.dtype, bool] = {}
    row = ia3_l[0] if task_ids is None and activation is None and ia3_l.dtype == torch.float32 else None

    def scale(x: Tensor) -> Tensor:
        if row is not None and x.dtype is torch.float32 and get_backend() == "auto" and not INTERPRET:
            return (x * row).contiguous()  # as `scale_forward` has it
        by_native = served.get(x.dtype)
        if by_native is None:
            fused = task_ids is not None or activation is not None
            by_native = served[x.dtype] = use_native("ia3_scale", x, fused)
        if by_native and x.dim() > 1 and x.is_contiguous():
            return _native_scale(x, ia3_l, task_ids, activation)
        return _op(x, ia3_l, task_ids, activation)

    return scale


def ia3_scale(x: Tensor, ia3_l: Tensor, task_ids: Tensor | TaskPlan | None = None) -> Tensor:
    """Scale every feature of x by the (IA)^3 vector of its row's task (arXiv 2205.05638).

    Semantics: (x * ia3_l[task_ids]).to(x.dtype), where row -1 of ia3_l is ones: the base model. The product is fp32.

    Args:
        x: [..., N]; fp32, fp16 or bf16 (fp64 runs on plain PyTorch).
        ia3_l: [N] or [num_tasks, N], any of those dtypes.
        task_ids: int32 or int64; its shape is a prefix of x.shape[:-1], or [B] where x is at least 3-D and x.shape[0] a
            multiple of B (beams); or a plan of `plan_tasks`. -1 is the base model: that row comes back bitwise. None:
            one task for all.

    Returns:
        Like x, contiguous. Saved for backward: x if ia3_l needs a gradient, and ia3_l.

    Raises:
        IndexError: an id outside [-1, num_tasks), on a CPU. On a GPU that row is NaN (PEFT_OPS_DEBUG=1 raises there
            too).
        NotImplementedError, RuntimeError: forward-mode AD, double backward.
    """
    op = "ia3_scale"
    check_tensor(op, "x", x, dtypes=FLOATS)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least 1 dimension, got shape []")
    table = check_table(op, "ia3_l", ia3_l, x.shape[-1], x, task_ids is not None)
    ids = per_sequence(*check_task_ids(op, task_ids, x.shape[:-1], table.shape[0], x))
    if use_reference(x):
        return reference.act_scale(x, table, ids)
    return _op(x, table, ids, None, differentiable=(x, table))
