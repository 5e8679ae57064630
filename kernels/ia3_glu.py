"""Gated (IA)^3 feed-forward: h = act(g) * u * l[t], elementwise with its gradient, and as a matmul of few rows."""

import triton
import triton.language as tl

from peft_ops.kernels.device import activate, activate_backward, mma, task_scale


@triton.jit(do_not_specialize=["M", "rows_per_id", "num_tasks"])
def ia3_glu_fwd_kernel(
    g_ptr, u_ptr, l_ptr, ids_ptr, h_ptr,
    M, N, rows_per_id, num_tasks,
    stride_gm, stride_um, stride_lt,
    HAS_IDS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """h[m, n] = act(g[m, n]) * u[m, n] * l[t(m), n]
    g, u: [M, N] rows strided   h: [M, N]   l: [num_tasks, N]   ids: [M / rows_per_id] or absent (task 0).
    One program per [BLOCK_M, BLOCK_N] tile; products in fp32, one rounding.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    rows = offs_m.to(tl.int64)[:, None]

    g = tl.load(g_ptr + rows * stride_gm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + rows * stride_um + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_IDS:
        task = tl.load(ids_ptr + offs_m // rows_per_id, mask=mask_m, other=-1)[:, None]
        scale = task_scale(l_ptr, task, task.to(tl.int64) * stride_lt + offs_n[None, :], mask, num_tasks)
    else:
        scale = tl.load(l_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    h = activate(g, ACTIVATION) * u * scale
    tl.store(h_ptr + rows * N + offs_n[None, :], h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows_per_id", "num_tasks"])
def ia3_glu_bwd_kernel(
    dh_ptr, g_ptr, u_ptr, l_ptr, order_ptr, chunk_ptr, dg_ptr, du_ptr, part_ptr,
    N, rows_per_id, num_tasks,
    stride_dhm, stride_gm, stride_um, stride_lt,
    HAS_IDS: tl.constexpr, ACTIVATION: tl.constexpr, NEED_DX: tl.constexpr, NEED_DL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dg = dh * l[t] * u * act'(g),  du = dh * l[t] * act(g),  part[c] = sum over chunk c of dh * act(g) * u
    dh, g, u: [M, N] rows strided   dg, du: [M, N]   part: fp32 [chunks, N]   order, chunk: as in ia3_scale_bwd_kernel.
    One program per chunk and column tile: one task's rows in order, one pass over dh, g and u.
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
        row = row.to(tl.int64)[:, None]
        mask = mask_m[:, None] & mask_n[None, :]
        cols = offs_n[None, :]
        dh = tl.load(dh_ptr + row * stride_dhm + cols, mask=mask, other=0.0, eviction_policy="evict_first")
        g = tl.load(g_ptr + row * stride_gm + cols, mask=mask, other=0.0, eviction_policy="evict_first")
        u = tl.load(u_ptr + row * stride_um + cols, mask=mask, other=0.0, eviction_policy="evict_first")
        dh, u = dh.to(tl.float32), u.to(tl.float32)
        dz = dh
        if NEED_DX:
            dz = dh * scale[None, :]
        a, dg = activate_backward(g.to(tl.float32), dz * u, ACTIVATION)
        if NEED_DL:
            acc += dh * (a * u)
        if NEED_DX:
            tl.store(dg_ptr + row * N + cols, dg.to(dg_ptr.dtype.element_ty), mask=mask)
            tl.store(du_ptr + row * N + cols, (dz * a).to(du_ptr.dtype.element_ty), mask=mask)
    if NEED_DL:
        tl.store(part_ptr + chunk.to(tl.int64) * N + offs_n, tl.sum(acc, axis=0), mask=mask_n)


@triton.jit
def finish_glu(
    g, u, g_bias_ptr, u_bias_ptr, l_ptr, ids_ptr, h_ptr, g_ptr, u_ptr, offs_m, offs_n, mask_m, mask_n,
    N, rows_per_id, num_tasks, stride_lt,
    HAS_IDS: tl.constexpr, HAS_G_BIAS: tl.constexpr, HAS_U_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    SAVE: tl.constexpr,
):  # fmt: skip
    """Biases, gate and scale of a tile small enough to gather one scale per element; stores h, and g and u if SAVE."""
    mask = mask_m[:, None] & mask_n[None, :]
    out = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    if HAS_G_BIAS:
        g += tl.load(g_bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if HAS_U_BIAS:
        u += tl.load(u_bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if SAVE:
        tl.store(g_ptr + out, g.to(g_ptr.dtype.element_ty), mask=mask)
        tl.store(u_ptr + out, u.to(u_ptr.dtype.element_ty), mask=mask)
    if HAS_IDS:
        task = tl.load(ids_ptr + offs_m // rows_per_id, mask=mask_m, other=-1)[:, None]
        scale = task_scale(l_ptr, task, task.to(tl.int64) * stride_lt + offs_n[None, :], mask, num_tasks)
    else:
        scale = tl.load(l_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    h = activate(g, ACTIVATION) * u * scale
    tl.store(h_ptr + out, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "rows_per_id", "num_tasks"])
def ia3_glu_linear_small_kernel(
    x_ptr, g_w_ptr, u_w_ptr, g_bias_ptr, u_bias_ptr, l_ptr, ids_ptr, h_ptr, g_ptr, u_ptr, part_ptr, count_ptr,
    M, N, K, rows_per_id, num_tasks, k_per_split,
    stride_xm, stride_lt, stride_wn, stride_wk,
    HAS_IDS: tl.constexpr, HAS_G_BIAS: tl.constexpr, HAS_U_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    SAVE: tl.constexpr, EVEN_K: tl.constexpr, SWAP: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h = act(g) * u * l[t],  g = x Wg^T + bg,  u = x Wu^T + bu;  for few rows
    x: [M, K] rows strided   Wg, Wu: [N, K], equal strides   h, g, u: [M, N]   part: fp32 [2, SPLIT, M, N].
    One program per output tile and part of K; SWAP and parts as in ia3_linear_small_kernel.
    """
    tile, pid_k = tl.program_id(0), tl.program_id(1)
    tiles_m = tl.cdiv(M, BLOCK_M)  # neighbours share their weight tiles: they leave DRAM once, whatever M is
    offs_m = tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    first = pid_k * k_per_split
    last = tl.minimum(first + k_per_split, K)
    offs_k = first + tl.arange(0, BLOCK_K)
    rows, cols = tl.minimum(offs_m, M - 1).to(tl.int64), tl.minimum(offs_n, N - 1).to(tl.int64)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]
    w_offs = cols[:, None] * stride_wn + offs_k[None, :].to(tl.int64) * stride_wk
    if SWAP:
        g = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        u = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        u = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(first, last, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            g_w = tl.load(g_w_ptr + w_offs)
            u_w = tl.load(u_w_ptr + w_offs)
        else:
            mask_k = (k - first + offs_k < last)[None, :]
            x = tl.load(x_ptrs, mask=mask_k, other=0.0)
            g_w = tl.load(g_w_ptr + w_offs, mask=mask_k, other=0.0)
            u_w = tl.load(u_w_ptr + w_offs, mask=mask_k, other=0.0)
        g = mma(g_w, x.T, g) if SWAP else mma(x, g_w.T, g)
        u = mma(u_w, x.T, u) if SWAP else mma(x, u_w.T, u)
        x_ptrs += BLOCK_K
        w_offs += BLOCK_K * stride_wk
    if SWAP:
        g, u = g.T, u.T
    if SPLIT > 1:
        mask = mask_m[:, None] & mask_n[None, :]
        g_ptrs = part_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
        size = M.to(tl.int64) * N
        u_ptrs = g_ptrs + SPLIT * size
        tl.store(g_ptrs + pid_k * size, g, mask=mask)
        tl.store(u_ptrs + pid_k * size, u, mask=mask)
        tl.debug_barrier()
        arrived = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel")
        if arrived == SPLIT - 1:
            tl.debug_barrier()
            g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            u = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for _ in tl.static_range(SPLIT):
                g += tl.load(g_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
                u += tl.load(u_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
                g_ptrs += size
                u_ptrs += size
            finish_glu(
                g, u, g_bias_ptr, u_bias_ptr, l_ptr, ids_ptr, h_ptr, g_ptr, u_ptr, offs_m, offs_n, mask_m, mask_n,
                N, rows_per_id, num_tasks, stride_lt, HAS_IDS, HAS_G_BIAS, HAS_U_BIAS, ACTIVATION, SAVE,
            )  # fmt: skip
            tl.store(count_ptr + tile, 0)
    else:
        finish_glu(
            g, u, g_bias_ptr, u_bias_ptr, l_ptr, ids_ptr, h_ptr, g_ptr, u_ptr, offs_m, offs_n, mask_m, mask_n,
            N, rows_per_id, num_tasks, stride_lt, HAS_IDS, HAS_G_BIAS, HAS_U_BIAS, ACTIVATION, SAVE,
        )  # fmt: skip
