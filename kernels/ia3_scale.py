"""(IA)^3 row scaling: y[m, n] = act(x[m, n]) * l[t(m), n], and its gradient with a reduction in a fixed order."""

import triton
import triton.language as tl

from peft_ops.kernels.device import activate, activate_backward, task_scale


# sizes that change from call to call are not specialised: at a multiple of 16 rows Triton would compile again
@triton.jit(do_not_specialize=["M", "rows_per_id", "num_tasks"])
def ia3_scale_fwd_kernel(
    x_ptr, l_ptr, ids_ptr, y_ptr,
    M, N, rows_per_id, num_tasks,
    stride_xm, stride_lt,
    HAS_IDS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[m, n] = act(x[m, n]) * l[t(m), n]
    x: [M, N] rows strided   y: [M, N]   l: [num_tasks, N]   ids: [M / rows_per_id] or absent (task 0).
    One program per [BLOCK_M, BLOCK_N] tile; product in fp32, one rounding.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    rows = offs_m.to(tl.int64)

    x = tl.load(x_ptr + rows[:, None] * stride_xm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_IDS:
        task = tl.load(ids_ptr + offs_m // rows_per_id, mask=mask_m, other=-1)
        scale = task_scale(
            l_ptr, task[:, None], task[:, None].to(tl.int64) * stride_lt + offs_n[None, :], mask, num_tasks
        )
    else:
        scale = tl.load(l_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y = activate(x, ACTIVATION) * scale
    tl.store(y_ptr + rows[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows_per_id", "num_tasks"])
def ia3_scale_bwd_kernel(
    dy_ptr, x_ptr, l_ptr, order_ptr, chunk_ptr, dx_ptr, part_ptr,
    N, rows_per_id, num_tasks,
    stride_dym, stride_xm, stride_lt,
    HAS_IDS: tl.constexpr, ACTIVATION: tl.constexpr, NEED_DX: tl.constexpr, NEED_DL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx[m, n] = dy[m, n] * l[t(m), n] * act'(x[m, n]);  part[c, n] = sum over chunk c of dy[m, n] * act(x[m, n])
    dy, x: [M, N] rows strided   dx: [M, N]   part: fp32 [chunks, N]   order: [M / rows_per_id], ids by task.
    chunk: [chunks, 3], first and end position in that order, and the task: a chunk holds rows of one task alone.
    One program per chunk and column tile, its rows in order: the sum knows nothing of other tasks' rows.
    """
    chunk = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    first, end = tl.load(chunk_ptr + chunk * 3), tl.load(chunk_ptr + chunk * 3 + 1)
    task = tl.load(chunk_ptr + chunk * 3 + 2)
    if NEED_DX:
        scale = task_scale(l_ptr, task, task.to(tl.int64) * stride_lt + offs_n, mask_n, num_tasks)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, end, BLOCK_M):
        position = start + tl.arange(0, BLOCK_M)
        mask_m = position < end
        row = position
        if HAS_IDS:
            group = tl.load(order_ptr + position // rows_per_id, mask=mask_m, other=0)
            row = group * rows_per_id + position % rows_per_id
        row = row.to(tl.int64)
        mask = mask_m[:, None] & mask_n[None, :]
        dy = tl.load(
            dy_ptr + row[:, None] * stride_dym + offs_n[None, :], mask=mask, other=0.0, eviction_policy="evict_first"
        )
        dy = dy.to(tl.float32)
        dx = dy
        if NEED_DX:
            dx = dy * scale[None, :]
        if NEED_DL or ACTIVATION is not None:
            x = tl.load(
                x_ptr + row[:, None] * stride_xm + offs_n[None, :], mask=mask, other=0.0, eviction_policy="evict_first"
            )
            a, dx = activate_backward(x.to(tl.float32), dx, ACTIVATION)
        if NEED_DL:
            acc += dy * a
        if NEED_DX:
            tl.store(dx_ptr + row[:, None] * N + offs_n[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if NEED_DL:
        tl.store(part_ptr + chunk.to(tl.int64) * N + offs_n, tl.sum(acc, axis=0), mask=mask_n)


@triton.jit
def sum_chunks_kernel(part_ptr, chunk_start_ptr, dl_ptr, N, BLOCK_N: tl.constexpr):
    """dl[t, n] = sum of part[c, n] over chunk_start[t] <= c < chunk_start[t + 1], in ascending order
    part: fp32 [chunks, N]   chunk_start: [num_tasks + 1]   dl: fp32 [num_tasks, N].
    One program per task and column tile.
    """
    task = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    acc = tl.zeros((BLOCK_N,), tl.float32)
    first, end = tl.load(chunk_start_ptr + task), tl.load(chunk_start_ptr + task + 1)
    part_ptrs = part_ptr + first.to(tl.int64) * N + offs_n
    for _ in range(first, end):
        acc += tl.load(part_ptrs, mask=mask_n, other=0.0)
        part_ptrs += N
    tl.store(dl_ptr + task.to(tl.int64) * N + offs_n, acc, mask=mask_n)
