"""Two projections of one x, each with its own (IA)^3 vector: k = (x Wk^T + bk) * lk[t], v = (x Wv^T + bv) * lv[t]."""

import triton
import triton.language as tl

from peft_ops.kernels.device import grouped_tile, mma
from peft_ops.kernels.ia3_linear import scale_runs, small_tile, vector_rows


@triton.jit(do_not_specialize=["M", "num_tasks"])
def ia3_kv_linear_kernel(
    x_ptr, k_w_ptr, v_w_ptr, k_bias_ptr, v_bias_ptr, k_l_ptr, v_l_ptr, row_id_ptr, tile_ptr, run_index_ptr, run_end_ptr,
    k_ptr, v_ptr,
    M, K_N, V_N, K, num_tasks,
    stride_xm, stride_k_lt, stride_v_lt,
    HAS_K_BIAS: tl.constexpr, HAS_V_BIAS: tl.constexpr, TASKS: tl.constexpr, TILE: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """k = (x Wk^T + bk) * lk[t(m)],  v = (x Wv^T + bv) * lv[t(m)]
    x: [M, K] rows strided   Wk: [K_N, K]   Wv: [V_N, K]   k: [M, K_N]   v: [M, V_N]: widths may differ.
    One program per output tile. Which projection it belongs to is settled by a scalar branch before the descriptors are
    made; a branch between two descriptors inside the loop is not pipelined and takes 255 registers.
    """
    tiles_m, k_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(K_N, BLOCK_N)
    tiles_n = k_tiles + tl.cdiv(V_N, BLOCK_N)
    pid_m, pid_n = grouped_tile(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    is_k = pid_n < k_tiles
    if is_k:
        w_ptr, l_ptr, y_ptr, N, stride_lt = k_w_ptr, k_l_ptr, k_ptr, K_N, stride_k_lt
    else:
        w_ptr, l_ptr, y_ptr, N, stride_lt = v_w_ptr, v_l_ptr, v_ptr, V_N, stride_v_lt
    x_desc = tl.make_tensor_descriptor(x_ptr, [M, K], [stride_xm, 1], [BLOCK_M, BLOCK_K])
    w_desc = tl.make_tensor_descriptor(w_ptr, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    y_desc = tl.make_tensor_descriptor(y_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    m, n = pid_m * BLOCK_M, tl.where(is_k, pid_n, pid_n - k_tiles) * BLOCK_N
    offs_n = n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if HAS_K_BIAS:
        acc += tl.load(k_bias_ptr + offs_n, mask=mask_n & is_k, other=0.0).to(tl.float32)[None, :]
    if HAS_V_BIAS:
        acc += tl.load(v_bias_ptr + offs_n, mask=mask_n & (is_k == 0), other=0.0).to(tl.float32)[None, :]
    for k in range(0, K, BLOCK_K):
        acc = mma(x_desc.load([m, k]), w_desc.load([n, k]).T, acc)
    acc = scale_runs(
        acc, l_ptr, row_id_ptr, tile_ptr, run_index_ptr, run_end_ptr, pid_m, offs_n, mask_n, M, num_tasks, stride_lt,
        TASKS, BLOCK_M, TILE,
    )  # fmt: skip
    y_desc.store([m, n], acc.to(y_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["M", "rows_per_id", "num_tasks"])
def ia3_kv_linear_small_kernel(
    x_ptr, k_w_ptr, v_w_ptr, k_bias_ptr, v_bias_ptr, k_l_ptr, v_l_ptr, ids_ptr, k_ptr, v_ptr, part_ptr, count_ptr,
    M, K_N, V_N, K, rows_per_id, num_tasks, k_per_split,
    stride_xm, stride_k_lt, stride_v_lt,
    HAS_IDS: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, SWAP: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """k and v for few rows: program axis 2 picks the projection, the rest is ia3_linear_small_kernel
    x: [M, K] rows strided   Wk: [K_N, K]   Wv: [V_N, K]   k: [M, K_N]   v: [M, V_N]
    part: fp32 [SPLIT, M, K_N + V_N]   count: int32, a zero per tile of both. Tiles past the narrower one store nothing.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    if tl.program_id(2) == 0:
        N, w_ptr, bias_ptr, l_ptr, y_ptr, stride_lt = K_N, k_w_ptr, k_bias_ptr, k_l_ptr, k_ptr, stride_k_lt
    else:
        N, w_ptr, bias_ptr, l_ptr, y_ptr, stride_lt = V_N, v_w_ptr, v_bias_ptr, v_l_ptr, v_ptr, stride_v_lt
        if SPLIT > 1:
            part_ptr += SPLIT * M.to(tl.int64) * K_N
            count_ptr += tiles_m * tl.cdiv(K_N, BLOCK_N)
    if tl.program_id(0) < tiles_m * tl.cdiv(N, BLOCK_N):
        small_tile(
            x_ptr, w_ptr, bias_ptr, l_ptr, ids_ptr, y_ptr, y_ptr, part_ptr, count_ptr, M, N, K, rows_per_id, num_tasks,
            k_per_split, stride_xm, stride_lt, K, 1, HAS_IDS, HAS_BIAS, None, False, EVEN_K, SWAP, SPLIT,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "rows_per_id", "num_tasks"])
def ia3_kv_linear_vector_kernel(
    x_ptr, k_w_ptr, v_w_ptr, k_bias_ptr, v_bias_ptr, k_l_ptr, v_l_ptr, ids_ptr, k_ptr, v_ptr,
    M, K_N, V_N, K, rows_per_id, num_tasks,
    stride_xm, stride_k_lt, stride_v_lt,
    HAS_IDS: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """k and v for at most BLOCK_M = 4 rows: program axis 1 picks the projection, the rest is ia3_linear_vector_kernel
    x: [M, K] rows strided   Wk: [K_N, K]   Wv: [V_N, K]   k: [M, K_N]   v: [M, V_N].
    """
    if tl.program_id(1) == 0:
        N, w_ptr, bias_ptr, l_ptr, y_ptr, stride_lt = K_N, k_w_ptr, k_bias_ptr, k_l_ptr, k_ptr, stride_k_lt
    else:
        N, w_ptr, bias_ptr, l_ptr, y_ptr, stride_lt = V_N, v_w_ptr, v_bias_ptr, v_l_ptr, v_ptr, stride_v_lt
    if tl.program_id(0) * BLOCK_N < N:
        vector_rows(
            x_ptr, w_ptr, bias_ptr, l_ptr, ids_ptr, y_ptr, y_ptr, M, N, K, rows_per_id, num_tasks, stride_xm,
            stride_lt, K, HAS_IDS, HAS_BIAS, None, False, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, VECTOR,
        )  # fmt: skip
