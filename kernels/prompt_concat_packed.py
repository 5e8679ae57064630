"""Prompt and token embeddings of packed sequences, [h(P); e(X)] for each without a pad between: offsets and rows."""

import triton
import triton.language as tl


# sizes that change from call to call are not specialised: only E says how wide the loads are
@triton.jit(do_not_specialize=["B", "total", "P", "num_tasks", "num_rows"])
def packed_layout_kernel(
    cu_seqlens_ptr, ids_ptr, lengths_ptr, layout_ptr, out_cu_seqlens_ptr,
    B, total, P, num_tasks, num_rows,
    HAS_IDS: tl.constexpr, HAS_LENGTHS: tl.constexpr, AFTER_BOS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out_cu_seqlens[b + 1] = min(out_cu_seqlens[b] + prompt length + tokens of sequence b, num_rows)
    cu_seqlens, out_cu_seqlens: [B + 1]   ids: [B]   lengths: [num_tasks]   layout: [B + 1, 4] (checked id, first token,
    tokens before the prompt, prompt length; the last row is the tail's). One program for all sequences, BLOCK at a
    time. Offsets that do not ascend from 0 to at most `total` make every id bad: whose rows are whose, nobody knows.
    """
    wrong = (tl.load(cu_seqlens_ptr) != 0).to(tl.int32)
    for first in range(0, B, BLOCK):
        b = first + tl.arange(0, BLOCK)
        start = tl.load(cu_seqlens_ptr + b, mask=b < B, other=0)
        end = tl.load(cu_seqlens_ptr + b + 1, mask=b < B, other=0)
        wrong |= tl.max(((end < start) | (end > total)).to(tl.int32), 0)

    rows = tl.full((), 0, tl.int64)
    for first in range(0, B, BLOCK):
        b = first + tl.arange(0, BLOCK)
        live = b < B
        if HAS_IDS:
            id = tl.load(ids_ptr + b, mask=live, other=-1)
            task = tl.where((id >= -1) & (id < num_tasks) & (wrong == 0), id, -2).to(tl.int32)
        else:
            task = tl.where(wrong == 0, tl.zeros((BLOCK,), tl.int32), -2)
        length = tl.where(task >= 0, P, 0)
        if HAS_LENGTHS:
            wanted = tl.load(lengths_ptr + tl.maximum(task, 0), mask=live & (task >= 0), other=0)
            length = tl.minimum(tl.maximum(wanted, 0), P).to(tl.int32)  # clamped as it came: an int64 may wrap
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + b, mask=live, other=0), 0), total)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + b + 1, mask=live, other=0), 0), total)
        tokens = tl.maximum(end - start, 0)
        size = tl.where(live, tokens + length, 0).to(tl.int64)
        end_row = tl.minimum(rows + tl.cumsum(size, 0), num_rows).to(tl.int32)
        rows += tl.sum(size, 0)
        tl.store(out_cu_seqlens_ptr + b + 1, end_row, mask=live)
        tl.store(layout_ptr + b * 4, task, mask=live)
        tl.store(layout_ptr + b * 4 + 1, start.to(tl.int32), mask=live)
        tl.store(layout_ptr + b * 4 + 2, tl.minimum(tokens, 1 if AFTER_BOS else 0).to(tl.int32), mask=live)
        tl.store(layout_ptr + b * 4 + 3, length, mask=live)
    tl.store(out_cu_seqlens_ptr, 0)
    field = tl.arange(0, 4)
    tl.store(layout_ptr + B * 4 + field, tl.where(field == 0, -1 - wrong, 0))


@triton.jit(do_not_specialize=["num_rows", "B", "P", "V", "half"])
def prompt_concat_packed_kernel(
    tokens_ptr, table_ptr, prompts_ptr, labels_ptr, cu_seqlens_ptr, layout_ptr,
    out_ptr, positions_ptr, out_labels_ptr, token_map_ptr,
    num_rows, B, P, E, V, half,
    scale,
    HAS_TABLE: tl.constexpr, HAS_LABELS: tl.constexpr, SCALES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """out[r] = prompts[t(b), .] or table[tokens[.]] (or tokens[.] itself), 0 in the tail, NaN at a bad id; b the last
    sequence with cu_seqlens[b] <= r, found by bisection from `half`, the largest power of two up to B
    tokens: [total] ids, or [total, E]   table: [V, E]   prompts: [num_tasks, P, E]   labels: [total]
    cu_seqlens: [B + 1], of out   layout: [B + 1, 4]   out: [num_rows, E]   positions, out_labels, token_map: [num_rows]
    SCALES: table rows times scale, in fp32. One program per [BLOCK_ROWS, BLOCK_E] tile. Two masked loads, no branch: a
    lane that is off costs no traffic, the rows of a tile overlap, and both loads stay 16 bytes wide (a select between
    the two addresses makes them 2 bytes).
    """
    r = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    live, mask_e = r < num_rows, (offs_e < E)[None, :]
    b, first = tl.zeros((BLOCK_ROWS,), tl.int32), tl.zeros((BLOCK_ROWS,), tl.int32)
    while half > 0:
        start = tl.load(cu_seqlens_ptr + b + half, mask=b + half <= B, other=0)
        ahead = (b + half <= B) & (start <= r)
        b, first = tl.where(ahead, b + half, b), tl.where(ahead, start, first)
        half = half // 2
    at = layout_ptr + b.to(tl.int64) * 4
    task, begin, before, length = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)

    slot = (r - first).to(tl.int32)
    is_prompt = live & (slot >= before) & (slot < before + length)
    is_token = live & (b < B) & (is_prompt == 0)
    source = begin.to(tl.int64) + slot - tl.where(slot < before, 0, length)
    bad_row = live & (task == -2)
    if tl.program_id(1) == 0:
        tl.store(positions_ptr + r, tl.where(b < B, slot, 0).to(tl.int64), mask=live)
        tl.store(token_map_ptr + r, tl.where(is_token, source, -1), mask=live)
        if HAS_LABELS:
            tl.store(out_labels_ptr + r, tl.load(labels_ptr + source, mask=is_token, other=-100), mask=live)

    is_token = is_token & (bad_row == 0)
    if HAS_TABLE:
        source_row = tl.load(tokens_ptr + source, mask=is_token, other=0).to(tl.int64)
        known = (source_row >= 0) & (source_row < V)
        bad_row = bad_row | (is_token & (known == 0))
        is_token = is_token & known
        source_ptr = table_ptr
    else:
        source_row = source
        source_ptr = tokens_ptr
    other = tl.where(bad_row, float("nan"), 0.0)[:, None]
    prompt_row = task.to(tl.int64) * P + (slot - before)
    prompt = tl.load(
        prompts_ptr + prompt_row[:, None] * E + offs_e[None, :], mask=is_prompt[:, None] & mask_e, other=0.0,
        eviction_policy="evict_last",
    )  # fmt: skip
    token = tl.load(
        source_ptr + source_row[:, None] * E + offs_e[None, :], mask=is_token[:, None] & mask_e, other=other
    )
    if SCALES:
        token = (token.to(tl.float32) * scale).to(out_ptr.dtype.element_ty)
    value = tl.where(is_prompt[:, None], prompt.to(out_ptr.dtype.element_ty), token)
    out = r[:, None] * E + offs_e[None, :]
    tl.store(out_ptr + out, value, mask=live[:, None] & mask_e, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["P"])
def prompt_concat_packed_bwd_kernel(
    dout_ptr, cu_seqlens_ptr, layout_ptr, order_ptr, start_ptr, dprompts_ptr,
    P, E,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dprompts[t, p] = sum over the sequences b of task t, ascending, of dout[cu_seqlens[b] + before + p], where
    p < length and the row was not dropped
    dout: [num_rows, E]   cu_seqlens: [B + 1], of rows   layout: [B + 1, 4]   order: [B], sequences by task
    start: [num_tasks + 1]   dprompts: [num_tasks, P, E] fp32.
    One program per (t, p) and column tile: a fixed order, no atomics. Four rows are on their way at a time.
    """
    task, p = tl.program_id(0) // P, tl.program_id(0) % P
    offs_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_e = offs_e < E
    acc = tl.zeros((BLOCK_E,), tl.float32)
    for i in tl.range(tl.load(start_ptr + task), tl.load(start_ptr + task + 1), loop_unroll_factor=4):
        b = tl.load(order_ptr + i).to(tl.int64)
        row = tl.load(cu_seqlens_ptr + b).to(tl.int64) + tl.load(layout_ptr + b * 4 + 2) + p
        has = (p < tl.load(layout_ptr + b * 4 + 3)) & (row < tl.load(cu_seqlens_ptr + b + 1))
        dout = tl.load(dout_ptr + row * E + offs_e, mask=mask_e & has, other=0.0, eviction_policy="evict_first")
        acc += dout.to(tl.float32)
    tl.store(dprompts_ptr + (task.to(tl.int64) * P + p) * E + offs_e, acc, mask=mask_e)
