"""Token and virtual-token embeddings in one pass: an id from V on is a row of its sequence's prompt."""

import triton
import triton.language as tl

from peft_ops.kernels.device import add_embedding


# sizes that change from call to call are not specialised: only E says how wide the loads are
@triton.jit(do_not_specialize=["M", "S", "P", "V", "num_tasks"])
def prompt_embed_kernel(
    ids_ptr, table_ptr, prompts_ptr, task_ids_ptr, lengths_ptr,
    positions_ptr, position_table_ptr, types_ptr, type_table_ptr, out_ptr, rows_ptr,
    M, S, P, E, V, num_tasks, num_positions, num_types,
    position_offset, scale,
    HAS_IDS: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_POSITIONS: tl.constexpr, HAS_POSITION_IDS: tl.constexpr,
    HAS_TYPES: tl.constexpr, HAS_TYPE_IDS: tl.constexpr, ADJUSTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """out[m] = table[ids[m]] below V, prompts[t(m), ids[m] - V] from V on, NaN where that is none, or t(m) is bad
    ids, rows: [M = B * S]   table: [V, E]   prompts: [num_tasks, P, E]   task_ids: [B]   lengths: [num_tasks]
    out: [M, E]. rows[m] is t * P + p, num_tasks * P for a token, one more for NaN. ADJUSTS: rows of
    the table times scale, every slot + type_table[types[m]] + position_table[positions[m] + position_offset], summed in
    fp32; without ids the type is 0, the position m % S. One program per [BLOCK_ROWS, BLOCK_E] tile; two masked loads,
    no branch: a lane that is off costs no traffic, both stay wide.
    """
    m = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_m, mask_e = m < M, (offs_e < E)[None, :]
    id = tl.load(ids_ptr + m, mask=mask_m, other=0).to(tl.int64)
    if HAS_IDS:
        task = tl.load(task_ids_ptr + m // S, mask=mask_m, other=-1)
        task = tl.where((task >= -1) & (task < num_tasks), task, -2).to(tl.int64)
    else:
        task = tl.zeros((BLOCK_ROWS,), tl.int64)
    length = tl.where(task >= 0, P, 0)
    if HAS_LENGTHS:
        wanted = tl.load(lengths_ptr + tl.maximum(task, 0), mask=task >= 0, other=0)
        length = tl.minimum(tl.maximum(wanted, 0), P).to(tl.int32)  # clamped as it came: an int64 may wrap
    p = tl.maximum(id, V) - V
    is_prompt = mask_m & (id >= V) & (p < length)
    is_token = mask_m & (id >= 0) & (id < V) & (task != -2)
    prompt_row = task * P + p
    prompt = tl.load(
        prompts_ptr + prompt_row[:, None] * E + offs_e[None, :], mask=is_prompt[:, None] & mask_e, other=0.0,
        eviction_policy="evict_last",
    )  # fmt: skip
    other = tl.where(is_prompt, 0.0, float("nan"))[:, None]
    token = tl.load(table_ptr + id[:, None] * E + offs_e[None, :], mask=is_token[:, None] & mask_e, other=other)
    mask = mask_m[:, None] & mask_e
    if ADJUSTS:
        value = tl.where(is_prompt[:, None], prompt.to(tl.float32), token.to(tl.float32) * scale)
        if HAS_TYPES:
            if HAS_TYPE_IDS:
                type = tl.load(types_ptr + m, mask=mask_m, other=0).to(tl.int64)
            else:
                type = tl.zeros((BLOCK_ROWS,), tl.int64)
            value = add_embedding(value, type_table_ptr, type, num_types, E, offs_e, mask)
        if HAS_POSITIONS:
            if HAS_POSITION_IDS:
                position = tl.load(positions_ptr + m, mask=mask_m, other=0).to(tl.int64)
            else:
                position = m % S
            position += position_offset
            value = add_embedding(value, position_table_ptr, position, num_positions, E, offs_e, mask)
        value = value.to(out_ptr.dtype.element_ty)
    else:
        value = tl.where(is_prompt[:, None], prompt.to(out_ptr.dtype.element_ty), token)
    tl.store(out_ptr + m[:, None] * E + offs_e[None, :], value, mask=mask)
    row = tl.where(is_prompt, prompt_row, num_tasks * P + tl.where(is_token, 0, 1)).to(tl.int32)
    tl.store(rows_ptr + m, row, mask=mask_m & (tl.program_id(1) == 0))


@triton.jit
def prompt_embed_bwd_kernel(
    dout_ptr, order_ptr, start_ptr, dprompts_ptr,
    E,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dprompts[r] = sum of dout[order[i]] over start[r] <= i < start[r + 1]: the slots of prompt row r, ascending
    dout: [M, E]   order: [M], slots by prompt row   start: [num_tasks * P + 1]   dprompts: [num_tasks * P, E] fp32.
    One program per prompt row and column tile: a fixed order, no atomics.
    """
    r = tl.program_id(0)
    offs_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_e = offs_e < E
    acc = tl.zeros((BLOCK_E,), tl.float32)
    for i in range(tl.load(start_ptr + r), tl.load(start_ptr + r + 1)):
        m = tl.load(order_ptr + i).to(tl.int64)
        acc += tl.load(dout_ptr + m * E + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    tl.store(dprompts_ptr + r.to(tl.int64) * E + offs_e, acc, mask=mask_e)
