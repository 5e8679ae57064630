"""Prompt and token embeddings in one row, [h(P); e(X)]: each sequence's task says which prompt and how long."""

import triton
import triton.language as tl

from peft_ops.kernels.device import add_embedding


# sizes that change from call to call are not specialised: only E says how wide the loads are
@triton.jit(do_not_specialize=["S", "P", "num_tasks"])
def prompt_layout_kernel(
    ids_ptr, lengths_ptr, mask_ptr, labels_ptr,
    layout_ptr, out_mask_ptr, positions_ptr, out_labels_ptr, token_map_ptr,
    S, P, num_tasks,
    HAS_IDS: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LABELS: tl.constexpr,
    LEFT: tl.constexpr, AFTER_BOS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where things stand in each sequence, and what goes with the embeddings. One program per sequence.
    ids: [B]   lengths: [num_tasks]   mask, labels: [B, S]   layout: [B, 4] (checked id, spare slots in front, tokens
    before the prompt, prompt length)   out_mask, positions, out_labels, token_map: [B, P + S].
    """
    b = tl.program_id(0).to(tl.int64)
    if HAS_IDS:
        id = tl.load(ids_ptr + b)
        task = tl.where((id >= -1) & (id < num_tasks), id, -2).to(tl.int32)
    else:
        task = tl.full((), 0, tl.int32)
    length = tl.where(task >= 0, P, 0)
    if HAS_LENGTHS:
        wanted = tl.load(lengths_ptr + tl.maximum(task, 0), mask=task >= 0, other=0)
        length = tl.minimum(tl.maximum(wanted, 0), P).to(tl.int32)  # clamped as it came: an int64 may wrap
    front = P - length if LEFT else 0
    before = 0
    if HAS_MASK:
        before = S
        for start in range(0, S, BLOCK):
            s = start + tl.arange(0, BLOCK)
            real = tl.load(mask_ptr + b * S + s, mask=s < S, other=0) != 0
            before = tl.minimum(before, tl.min(tl.where(real, s, S), 0))
        if AFTER_BOS:
            before = tl.where(before == S, S if LEFT else 0, before + 1)
        elif not LEFT:
            before = tl.where(before == S, 0, before)
    elif AFTER_BOS:
        before = tl.minimum(S, 1)
    tl.store(layout_ptr + b * 4, task)
    tl.store(layout_ptr + b * 4 + 1, front)
    tl.store(layout_ptr + b * 4 + 2, before)
    tl.store(layout_ptr + b * 4 + 3, length)

    attended = 0
    for start in range(0, P + S, BLOCK):
        r = start + tl.arange(0, BLOCK)
        live = r < P + S
        slot = r - front
        is_prompt = (slot >= before) & (slot < before + length)
        source = tl.where(slot < before, slot, slot - length)
        is_token = (source >= 0) & (source < S) & (slot >= 0) & (is_prompt == 0) & live
        if HAS_MASK:
            value = tl.load(mask_ptr + b * S + source, mask=is_token, other=0)
            if mask_ptr.dtype.element_ty.is_floating() and mask_ptr.dtype.element_ty.primitive_bitwidth == 16:
                value = value.to(tl.float32)
        else:
            value = is_token.to(tl.int64)
        value = tl.where(is_prompt, 1, value)
        real = (value != 0) & live
        count = attended + tl.cumsum(real.to(tl.int32), 0)
        text = is_token & real
        out = b * (P + S) + r
        tl.store(out_mask_ptr + out, value.to(out_mask_ptr.dtype.element_ty), mask=live)
        tl.store(positions_ptr + out, tl.where(real, count - 1, 0).to(tl.int64), mask=live)
        tl.store(token_map_ptr + out, tl.where(text, source, -1).to(tl.int64), mask=live)
        if HAS_LABELS:
            label = tl.load(labels_ptr + b * S + source, mask=text, other=-100)
            tl.store(out_labels_ptr + out, label, mask=live)
        attended += tl.sum(real.to(tl.int32), 0)


@triton.jit(do_not_specialize=["S", "P", "V"])
def prompt_concat_kernel(
    tokens_ptr, table_ptr, prompts_ptr, layout_ptr,
    positions_ptr, position_table_ptr, token_map_ptr, types_ptr, type_table_ptr, out_ptr,
    S, P, E, V, num_positions, num_types,
    position_offset, scale,
    HAS_TABLE: tl.constexpr, HAS_POSITIONS: tl.constexpr, HAS_TYPES: tl.constexpr, HAS_TYPE_IDS: tl.constexpr,
    ADJUSTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """out[b, r] = prompts[t(b), .] or table[tokens[b, .]] (or tokens[b, .] itself), 0 at spare slots, NaN at a bad id
    tokens: [B, S] ids, or [B, S, E]   table: [V, E]   prompts: [num_tasks, P, E]   layout: [B, 4]   out: [B, P + S, E].
    ADJUSTS: table rows times scale; every slot + type_table[types[b, token_map[b, r]]], 0 where there is no token,
    + position_table[positions[b, r] + position_offset], in fp32. One program per [BLOCK_ROWS, BLOCK_E] tile. Two masked
    loads, no branch: a lane that is off costs no traffic, the rows of a tile overlap, and both loads stay 16 bytes wide
    (a select between the two addresses makes them 2 bytes).
    """
    row_tiles = tl.cdiv(P + S, BLOCK_ROWS)
    b = (tl.program_id(0) // row_tiles).to(tl.int64)
    r = tl.program_id(0) % row_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    task, front = tl.load(layout_ptr + b * 4), tl.load(layout_ptr + b * 4 + 1)
    before, length = tl.load(layout_ptr + b * 4 + 2), tl.load(layout_ptr + b * 4 + 3)
    slot = r - front
    live = r < P + S
    is_prompt = live & (slot >= before) & (slot < before + length)
    source = tl.where(slot < before, slot, slot - length)
    is_token = live & (slot >= 0) & (source < S) & ((slot < before) | (slot >= before + length))
    bad = task == -2
    if HAS_TABLE:
        token = tl.load(tokens_ptr + b * S + source, mask=is_token, other=0).to(tl.int64)
        known = (token >= 0) & (token < V)
        bad_row = bad | (is_token & (known == 0))
        is_token = is_token & known
        source_row = token
        source_ptr = table_ptr
    else:
        bad_row = bad | (r < 0)
        source_row = b * S + source
        source_ptr = tokens_ptr
    mask_e = (offs_e < E)[None, :]
    other = tl.where(bad_row, float("nan"), 0.0)[:, None]
    is_prompt = is_prompt & (bad == 0)
    is_token = is_token & (bad == 0)
    prompt_row = task.to(tl.int64) * P + (slot - before)
    prompt = tl.load(
        prompts_ptr + prompt_row[:, None] * E + offs_e[None, :], mask=is_prompt[:, None] & mask_e, other=0.0,
        eviction_policy="evict_last",
    )  # fmt: skip
    token_e = tl.load(
        source_ptr + source_row[:, None] * E + offs_e[None, :], mask=is_token[:, None] & mask_e, other=other
    )
    mask = live[:, None] & mask_e
    if ADJUSTS:
        value = tl.where(is_prompt[:, None], prompt.to(tl.float32), token_e.to(tl.float32) * scale)
        if HAS_TYPES:
            if HAS_TYPE_IDS:
                of = tl.load(token_map_ptr + b * (P + S) + r, mask=live, other=-1)
                type = tl.load(types_ptr + b * S + of, mask=of >= 0, other=0).to(tl.int64)
            else:
                type = tl.zeros((BLOCK_ROWS,), tl.int64)
            value = add_embedding(value, type_table_ptr, type, num_types, E, offs_e, mask)
        if HAS_POSITIONS:
            position = tl.load(positions_ptr + b * (P + S) + r, mask=live, other=0) + position_offset
            value = add_embedding(value, position_table_ptr, position, num_positions, E, offs_e, mask)
        value = value.to(out_ptr.dtype.element_ty)
    else:
        value = tl.where(is_prompt[:, None], prompt.to(out_ptr.dtype.element_ty), token_e)
    out = (b * (P + S) + r)[:, None] * E + offs_e[None, :]
    tl.store(out_ptr + out, value, mask=mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["S", "P"])
def prompt_concat_bwd_kernel(
    dout_ptr, layout_ptr, order_ptr, start_ptr, dprompts_ptr,
    S, P, E,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dprompts[t, p] = sum over the sequences b of task t, ascending, of dout[b, front + before + p], where p < length
    dout: [B, P + S, E]   order: [B], sequences by task   start: [num_tasks + 1]   dprompts: [num_tasks, P, E] fp32.
    One program per (t, p) and column tile: a fixed order, no atomics.
    """
    task, p = tl.program_id(0) // P, tl.program_id(0) % P
    offs_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_e = offs_e < E
    acc = tl.zeros((BLOCK_E,), tl.float32)
    for i in range(tl.load(start_ptr + task), tl.load(start_ptr + task + 1)):
        b = tl.load(order_ptr + i).to(tl.int64)
        row = b * (P + S) + tl.load(layout_ptr + b * 4 + 1) + tl.load(layout_ptr + b * 4 + 2) + p
        has = p < tl.load(layout_ptr + b * 4 + 3)
        dout = tl.load(dout_ptr + row * E + offs_e, mask=mask_e & has, other=0.0, eviction_policy="evict_first")
        acc += dout.to(tl.float32)
    tl.store(dprompts_ptr + (task.to(tl.int64) * P + p) * E + offs_e, acc, mask=mask_e)
