"""Two weights over one x in one pass: the gated product act(g) * u * l, or the two scaled projections k and v."""

import triton
import triton.language as tl

from peft_ops.kernels.device import activate, grouped_tile, mma
from peft_ops.kernels.ia3_linear import scale_runs


@triton.jit(do_not_specialize=["M", "num_tasks"])
def dual_linear_kernel(
    x_ptr, a_w_ptr, b_w_ptr, a_bias_ptr, b_bias_ptr, a_l_ptr, b_l_ptr, row_id_ptr, tile_ptr, run_index_ptr, run_end_ptr,
    a_ptr, b_ptr, a_z_ptr, b_z_ptr,
    M, N, K, num_tasks,
    stride_xm, stride_a_lt, stride_b_lt,
    GATED: tl.constexpr, HAS_A_BIAS: tl.constexpr, HAS_B_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    SAVE: tl.constexpr, TASKS: tl.constexpr, SPECIALIZE: tl.constexpr, NUM_PROGRAMS: tl.constexpr, TILE: tl.constexpr,
    GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """z_a = x Wa^T + ba,  z_b = x Wb^T + bb;   a = act(z_a) * z_b * la[t(m)] if GATED
    else a = z_a * la[t(m)], b = z_b * lb[t(m)]
    x: [M, K] rows strided   Wa, Wb: [N, K]   la, lb: [num_tasks, N]   a, b: [M, N]   z_a, z_b: [M, N] if SAVE.
    Persistent, as ia3_linear_kernel; each x tile is read once for both products.
    """
    x_desc = tl.make_tensor_descriptor(x_ptr, [M, K], [stride_xm, 1], [BLOCK_M, BLOCK_K])
    a_w_desc = tl.make_tensor_descriptor(a_w_ptr, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    b_w_desc = tl.make_tensor_descriptor(b_w_ptr, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    a_desc = tl.make_tensor_descriptor(a_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    if not GATED:
        b_desc = tl.make_tensor_descriptor(b_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    if SAVE:
        a_z_desc = tl.make_tensor_descriptor(a_z_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
        b_z_desc = tl.make_tensor_descriptor(b_z_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, NUM_PROGRAMS, warp_specialize=SPECIALIZE):
        pid_m, pid_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
        m, n = pid_m * BLOCK_M, pid_n * BLOCK_N
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        b = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if HAS_A_BIAS:  # as the start value: added after the loop it takes 80 registers more
            a += tl.load(a_bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        if HAS_B_BIAS:
            b += tl.load(b_bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([m, k])
            a = mma(x, a_w_desc.load([n, k]).T, a)
            b = mma(x, b_w_desc.load([n, k]).T, b)
        if SAVE:
            a_z_desc.store([m, n], a.to(a_ptr.dtype.element_ty))
            b_z_desc.store([m, n], b.to(a_ptr.dtype.element_ty))
        if GATED:
            a = activate(a, ACTIVATION) * b
        a = scale_runs(
            a, a_l_ptr, row_id_ptr, tile_ptr, run_index_ptr, run_end_ptr, pid_m, offs_n, mask_n, M, num_tasks,
            stride_a_lt, TASKS, BLOCK_M, TILE,
        )  # fmt: skip
        a_desc.store([m, n], a.to(a_ptr.dtype.element_ty))
        if not GATED:
            b = scale_runs(
                b, b_l_ptr, row_id_ptr, tile_ptr, run_index_ptr, run_end_ptr, pid_m, offs_n, mask_n, M, num_tasks,
                stride_b_lt, TASKS, BLOCK_M, TILE,
            )  # fmt: skip
            b_desc.store([m, n], b.to(b_ptr.dtype.element_ty))
