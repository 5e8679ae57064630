"""Device functions that several kernels share: activations, the tensor-core product, a task's scale, an added row."""

import triton
import triton.language as tl

# The interpreter keeps bf16 as uint16 and multiplies those: operands of a product are upcast first where it runs.
INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z) in fp32. The exp forms of silu and gelu_tanh need one exp and never overflow."""
    if ACTIVATION == "relu":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "silu":
        z = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        z = z / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
    return z


@triton.jit
def activate_backward(z, g, ACTIVATION: tl.constexpr):
    """act(z) and g * act'(z) in fp32. relu chooses, not multiplies: g may be Inf, and NaN in z lets it pass."""
    if ACTIVATION == "relu":
        a = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        dz = tl.where(z <= 0.0, 0.0, g)
    elif ACTIVATION == "silu":
        sig = 1.0 / (1.0 + tl.exp(-z))
        a = z * sig
        dz = g * (sig + a * (1.0 - sig))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        a = z * cdf
        dz = g * (cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z))
    elif ACTIVATION == "gelu_tanh":
        sig = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
        a = z * sig
        dz = g * (sig + a * (1.0 - sig) * 1.5957691216057308 * (1.0 + 0.134145 * z * z))
    else:
        a = z
        dz = g
    return a, dz


@triton.jit
def mma(a, b, acc):
    """acc + a b on the tensor cores, fp32 operands never as tf32."""
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def grouped_tile(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of an output tile: GROUP_M row tiles go through the columns together, and share their weights."""
    group = GROUP_M * tiles_n
    first_m = (tile // group) * GROUP_M
    size_m = tl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + (tile % group) % size_m, (tile % group) // size_m


@triton.jit
def task_scale(l_ptr, task, offs, mask, num_tasks):
    """Scale of the ids `task` at the offsets `offs` (task * stride + column), fp32: 1 for the base model, NaN if bad.

    The base and bad cases enter through `other`: a lane that is off reads nothing, and in the [128, 256] epilogue of a
    matmul this form takes 165 registers where a select after the load takes 255.
    """
    known = (task >= 0) & (task < num_tasks)
    return tl.load(l_ptr + offs, mask=known & mask, other=tl.where(task == -1, 1.0, float("nan"))).to(tl.float32)


@triton.jit
def add_embedding(value, table_ptr, row, num_rows, E, offs_e, mask):
    """value + table[row] in fp32, NaN where the table has no such row. value: [ROWS, BLOCK_E]   row: [ROWS], int64."""
    known = (row >= 0) & (row < num_rows)
    added = tl.load(
        table_ptr + row[:, None] * E + offs_e[None, :], mask=known[:, None] & mask, other=float("nan"),
        eviction_policy="evict_last",
    )  # fmt: skip
    return value + added.to(tl.float32)
