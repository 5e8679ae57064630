"""Linear layer with the (IA)^3 scale of each row's task in its epilogue: y = act(x W^T + b) * l[t]."""

import triton
import triton.language as tl

from peft_ops.kernels.device import activate, grouped_tile, mma, task_scale


@triton.jit
def scale_runs(
    acc, l_ptr, row_id_ptr, tile_ptr, run_index_ptr, run_end_ptr, pid_m, offs_n, mask_n, M, num_tasks, stride_lt,
    TASKS: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """acc: [BLOCK_M, BLOCK_N] times the scale of each row's task, by the task plan; BLOCK_M divides TILE.

    TASKS "one": every row is task 0.   "two": at most two tasks in a plan tile, `acc *= where(row < split, s0, s1)`.
    "runs": any number, one pass over the tile per run. A gather of [BLOCK_M, BLOCK_N] scales spills at 128 x 256.
    """
    lane = tl.arange(0, BLOCK_M)
    if TASKS == "one":
        acc *= tl.load(l_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    elif TASKS == "two":
        row = pid_m * BLOCK_M
        tile = row // TILE
        task0, task1 = tl.load(tile_ptr + tile * 3), tl.load(tile_ptr + tile * 3 + 1)
        split = tl.load(tile_ptr + tile * 3 + 2) - row % TILE
        s0 = task_scale(l_ptr, task0, task0.to(tl.int64) * stride_lt + offs_n, mask_n, num_tasks)
        s1 = task_scale(l_ptr, task1, task1.to(tl.int64) * stride_lt + offs_n, mask_n, num_tasks)
        acc *= tl.where((lane < split)[:, None], s0[None, :], s1[None, :])
    else:
        begin = pid_m * BLOCK_M
        last = tl.minimum(begin + BLOCK_M, M) - 1
        for run in range(tl.load(run_index_ptr + begin), tl.load(run_index_ptr + last) + 1):
            task = tl.load(row_id_ptr + begin)
            end = tl.load(run_end_ptr + run)
            scale = task_scale(l_ptr, task, task.to(tl.int64) * stride_lt + offs_n, mask_n, num_tasks)
            row = pid_m * BLOCK_M + lane
            acc = tl.where(((row >= begin) & (row < end))[:, None], acc * scale[None, :], acc)
            begin = end
    return acc


# sizes that change from call to call are not specialised: decode must not compile again at a multiple of 16 rows
@triton.jit(do_not_specialize=["M", "num_tasks"])
def ia3_linear_kernel(
    x_ptr, w_ptr, bias_ptr, l_ptr, row_id_ptr, tile_ptr, run_index_ptr, run_end_ptr, y_ptr, z_ptr,
    M, N, K, num_tasks,
    stride_xm, stride_lt, stride_w,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr, TASKS: tl.constexpr, W_KN: tl.constexpr,
    SPECIALIZE: tl.constexpr, NUM_PROGRAMS: tl.constexpr, TILE: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[m, n] = act(z[m, n]) * l[t(m), n],  z = x W^T + b
    x: [M, K] rows strided   W: [N, K], or [K, N] if W_KN   b: [N]   l: [num_tasks, N]   y: [M, N]   z: [M, N] if SAVE.
    Persistent: program p takes the output tiles p, p + NUM_PROGRAMS, ...; operands and results by TMA, so every row is
    16-byte aligned. SPECIALIZE: one warp group loads while two multiply; only with 4 warps and a straight epilogue.
    """
    x_desc = tl.make_tensor_descriptor(x_ptr, [M, K], [stride_xm, 1], [BLOCK_M, BLOCK_K])
    if W_KN:
        w_desc = tl.make_tensor_descriptor(w_ptr, [K, N], [stride_w, 1], [BLOCK_K, BLOCK_N])
    else:
        w_desc = tl.make_tensor_descriptor(w_ptr, [N, K], [stride_w, 1], [BLOCK_N, BLOCK_K])
    y_desc = tl.make_tensor_descriptor(y_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    if SAVE:
        z_desc = tl.make_tensor_descriptor(z_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, NUM_PROGRAMS, warp_specialize=SPECIALIZE):
        pid_m, pid_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
        m, n = pid_m * BLOCK_M, pid_n * BLOCK_N
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if HAS_BIAS:  # as the start value: added after the loop it takes 80 registers more
            acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        for k in range(0, K, BLOCK_K):
            w = w_desc.load([k, n]) if W_KN else w_desc.load([n, k]).T
            acc = mma(x_desc.load([m, k]), w, acc)
        if SAVE:
            z_desc.store([m, n], acc.to(y_ptr.dtype.element_ty))
        acc = scale_runs(
            activate(acc, ACTIVATION), l_ptr, row_id_ptr, tile_ptr, run_index_ptr, run_end_ptr,
            pid_m, offs_n, mask_n, M, num_tasks, stride_lt, TASKS, BLOCK_M, TILE,
        )  # fmt: skip
        y_desc.store([m, n], acc.to(y_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["M", "num_tasks", "rows_per_id"])
def ia3_linear_feedforward_kernel(
    x_ptr, w_ptr, bias_ptr, l_ptr, ids_ptr, y_ptr,
    M, N, K, rows_per_id, num_tasks,
    stride_xm, stride_lt, stride_w,
    HAS_IDS: tl.constexpr, HAS_BIAS: tl.constexpr, W_KN: tl.constexpr,
    SPECIALIZE: tl.constexpr, NUM_PROGRAMS: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum over k of (x[m, k] * l[t(m), k]) W[n, k] + b[n], the scaled x rounded to x's dtype
    x: [M, K] rows strided   W: [N, K], or [K, N] if W_KN   l: [num_tasks, K]   ids: [M / rows_per_id]   y: [M, N].
    Persistent, as ia3_linear_kernel; BLOCK_M divides rows_per_id, so that a tile has one task and one row of scales. x
    is scaled on its way from shared memory to the tensor cores, which take their left operand from registers.
    """
    x_desc = tl.make_tensor_descriptor(x_ptr, [M, K], [stride_xm, 1], [BLOCK_M, BLOCK_K])
    if W_KN:
        w_desc = tl.make_tensor_descriptor(w_ptr, [K, N], [stride_w, 1], [BLOCK_K, BLOCK_N])
    else:
        w_desc = tl.make_tensor_descriptor(w_ptr, [N, K], [stride_w, 1], [BLOCK_N, BLOCK_K])
    y_desc = tl.make_tensor_descriptor(y_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, NUM_PROGRAMS, warp_specialize=SPECIALIZE):
        pid_m, pid_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
        m, n = pid_m * BLOCK_M, pid_n * BLOCK_N
        task = tl.zeros((), tl.int32)
        if HAS_IDS:
            task = tl.load(ids_ptr + m // rows_per_id)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if HAS_BIAS:
            offs_n = n + tl.arange(0, BLOCK_N)
            acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        for k in range(0, K, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            scale = task_scale(l_ptr, task, task.to(tl.int64) * stride_lt + offs_k, offs_k < K, num_tasks)
            scale = tl.where(offs_k < K, scale, 0.0)  # TMA gives x zeros there, and 0 x NaN is NaN
            x = (x_desc.load([m, k]).to(tl.float32) * scale[None, :]).to(x_ptr.dtype.element_ty)
            w = w_desc.load([k, n]) if W_KN else w_desc.load([n, k]).T
            acc = mma(x, w, acc)
        y_desc.store([m, n], acc.to(y_ptr.dtype.element_ty))


@triton.jit
def finish_tile(
    z, bias_ptr, l_ptr, ids_ptr, y_ptr, z_ptr, offs_m, offs_n, mask_m, mask_n, N, rows_per_id, num_tasks, stride_lt,
    HAS_IDS: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Bias, activation and scale of a tile small enough to gather one scale per element; stores y, and z if SAVE."""
    mask = mask_m[:, None] & mask_n[None, :]
    out = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    if HAS_BIAS:
        z += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if SAVE:
        tl.store(z_ptr + out, z.to(z_ptr.dtype.element_ty), mask=mask)
    if HAS_IDS:
        task = tl.load(ids_ptr + offs_m // rows_per_id, mask=mask_m, other=-1)[:, None]
        scale = task_scale(l_ptr, task, task.to(tl.int64) * stride_lt + offs_n[None, :], mask, num_tasks)
    else:
        scale = tl.load(l_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y = activate(z, ACTIVATION) * scale
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def small_tile(
    x_ptr, w_ptr, bias_ptr, l_ptr, ids_ptr, y_ptr, z_ptr, part_ptr, count_ptr,
    M, N, K, rows_per_id, num_tasks, k_per_split,
    stride_xm, stride_lt, stride_wn, stride_wk,
    HAS_IDS: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr, EVEN_K: tl.constexpr,
    SWAP: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One output tile, or with SPLIT the sum over one part of K: program axis 0 is the tile, axis 1 the part."""
    tile, pid_k = tl.program_id(0), tl.program_id(1)
    tiles_m = tl.cdiv(M, BLOCK_M)  # neighbours share a weight tile: it leaves DRAM once, whatever M is
    offs_m = tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    first = pid_k * k_per_split
    last = tl.minimum(first + k_per_split, K)
    offs_k = first + tl.arange(0, BLOCK_K)
    # rows and columns past the end read the last one, cheaper than masks in the loop; their results are not stored
    rows, cols = tl.minimum(offs_m, M - 1).to(tl.int64), tl.minimum(offs_n, N - 1).to(tl.int64)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]
    w_ptrs = w_ptr + cols[:, None] * stride_wn + offs_k[None, :].to(tl.int64) * stride_wk
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(first, last, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            mask_k = (k - first + offs_k < last)[None, :]
            x = tl.load(x_ptrs, mask=mask_k, other=0.0)
            w = tl.load(w_ptrs, mask=mask_k, other=0.0)
        acc = mma(w, x.T, acc) if SWAP else mma(x, w.T, acc)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wk
    z = acc.T if SWAP else acc
    if SPLIT > 1:
        # Every part goes to memory; the last program to arrive adds them in ascending order, so that which one it is
        # does not show, and resets the counter for the next launch on this stream.
        mask = mask_m[:, None] & mask_n[None, :]
        part_ptrs = part_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
        tl.store(part_ptrs + pid_k.to(tl.int64) * M * N, z, mask=mask)
        tl.debug_barrier()
        arrived = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel")
        if arrived == SPLIT - 1:
            tl.debug_barrier()
            z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for _ in tl.static_range(SPLIT):
                z += tl.load(part_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
                part_ptrs += M.to(tl.int64) * N
            finish_tile(
                z, bias_ptr, l_ptr, ids_ptr, y_ptr, z_ptr, offs_m, offs_n, mask_m, mask_n, N, rows_per_id, num_tasks,
                stride_lt, HAS_IDS, HAS_BIAS, ACTIVATION, SAVE,
            )  # fmt: skip
            tl.store(count_ptr + tile, 0)
    else:
        finish_tile(
            z, bias_ptr, l_ptr, ids_ptr, y_ptr, z_ptr, offs_m, offs_n, mask_m, mask_n, N, rows_per_id, num_tasks,
            stride_lt, HAS_IDS, HAS_BIAS, ACTIVATION, SAVE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "rows_per_id", "num_tasks"])
def ia3_linear_small_kernel(
    x_ptr, w_ptr, bias_ptr, l_ptr, ids_ptr, y_ptr, z_ptr, part_ptr, count_ptr,
    M, N, K, rows_per_id, num_tasks, k_per_split,
    stride_xm, stride_lt, stride_wn, stride_wk,
    HAS_IDS: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr, EVEN_K: tl.constexpr,
    SWAP: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[m, n] = act(z[m, n]) * l[t(m), n],  z = x W^T + b;  for few rows, and where TMA does not take sizes or strides
    x: [M, K] rows strided   W: [N, K], either dimension contiguous   ids: [M / rows_per_id] or absent   y, z: [M, N]
    part: fp32 [SPLIT, M, N]   count: int32, a zero per tile; both only with SPLIT > 1.
    One program per [BLOCK_M <= 64, BLOCK_N] tile and part of K: its gather of scales is small, no plan is needed.
    SWAP: the weight tile is the left operand: wgmma reads its 64 rows from shared memory, the few rows of x are its N.
    """
    small_tile(
        x_ptr, w_ptr, bias_ptr, l_ptr, ids_ptr, y_ptr, z_ptr, part_ptr, count_ptr, M, N, K, rows_per_id, num_tasks,
        k_per_split, stride_xm, stride_lt, stride_wn, stride_wk, HAS_IDS, HAS_BIAS, ACTIVATION, SAVE, EVEN_K, SWAP,
        SPLIT, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


@triton.jit
def vector_rows(
    x_ptr, w_ptr, bias_ptr, l_ptr, ids_ptr, y_ptr, z_ptr,
    M, N, K, rows_per_id, num_tasks,
    stride_xm, stride_lt, stride_wn,
    HAS_IDS: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of the output for all of at most BLOCK_M rows; BLOCK_K = warps * 32 * VECTOR.

    The whole block walks along K: x and W get matching layouts, and nothing crosses shared memory before the last sum.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M, offs_n < N
    rows, cols = tl.minimum(offs_m, M - 1).to(tl.int64), tl.minimum(offs_n, N - 1).to(tl.int64)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]
    w_ptrs = w_ptr + cols[:, None] * stride_wn + offs_k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K // VECTOR), tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            w = tl.load(w_ptrs, eviction_policy="evict_first")
            x = tl.load(x_ptrs)
        else:
            mask_k = (k + offs_k < K)[None, :]
            w = tl.load(w_ptrs, mask=mask_k, other=0.0, eviction_policy="evict_first")
            x = tl.load(x_ptrs, mask=mask_k, other=0.0)
        w = tl.reshape(w.to(tl.float32), (1, BLOCK_N, BLOCK_K // VECTOR, VECTOR))
        x = tl.reshape(x.to(tl.float32), (BLOCK_M, 1, BLOCK_K // VECTOR, VECTOR))
        acc += tl.sum(w * x, axis=3)  # inside one thread
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    finish_tile(
        tl.sum(acc, axis=2), bias_ptr, l_ptr, ids_ptr, y_ptr, z_ptr, offs_m, offs_n, mask_m, mask_n, N, rows_per_id,
        num_tasks, stride_lt, HAS_IDS, HAS_BIAS, ACTIVATION, SAVE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "rows_per_id", "num_tasks"])
def ia3_linear_vector_kernel(
    x_ptr, w_ptr, bias_ptr, l_ptr, ids_ptr, y_ptr, z_ptr,
    M, N, K, rows_per_id, num_tasks,
    stride_xm, stride_lt, stride_wn,
    HAS_IDS: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """y[m, n] = act(z[m, n]) * l[t(m), n],  z = x W^T + b;  for at most BLOCK_M = 4 rows, fp32 FMAs
    x: [M, K] rows strided   W: [N, K] rows strided   ids: [M / rows_per_id] or absent   y, z: [M, N].
    One program per BLOCK_N columns: each weight is read once, 16 bytes at a time.
    """
    vector_rows(
        x_ptr, w_ptr, bias_ptr, l_ptr, ids_ptr, y_ptr, z_ptr, M, N, K, rows_per_id, num_tasks, stride_xm, stride_lt,
        stride_wn, HAS_IDS, HAS_BIAS, ACTIVATION, SAVE, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, VECTOR,
    )  # fmt: skip
