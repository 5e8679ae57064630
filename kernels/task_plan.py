"""Task plan: each row's checked id, the tasks of each tile of 128 rows, the runs of rows that share one; and, for sums
over a task's rows, the ids sorted by task and cut into chunks."""

import triton
import triton.language as tl


@triton.jit
def row_ids(ids_ptr, cu_seqlens_ptr, rows, num_rows, num_ids, rows_per_id, num_tasks, PACKED: tl.constexpr):
    """Checked id of each row: -1 for the base model, -2 for an id out of range, or where no sequence covers the row."""
    live = (rows >= 0) & (rows < num_rows)
    if PACKED:  # the last sequence that starts at or before the row, by bisection over num_ids + 1 offsets
        low = tl.zeros_like(rows)
        high = tl.zeros_like(rows) + num_ids + 1
        span = num_ids + 1
        while span > 0:
            middle = (low + high) // 2
            start = tl.load(cu_seqlens_ptr + middle, mask=live & (low < high), other=0)
            right = start <= rows
            open = low < high
            low, high = tl.where(open & right, middle + 1, low), tl.where(open & (start > rows), middle, high)
            span = span // 2
        index = low - 1
        live = live & (index >= 0) & (index < num_ids)
    else:
        index = rows // rows_per_id
    id = tl.load(ids_ptr + index, mask=live, other=-2)
    return tl.where((id >= -1) & (id < num_tasks), id, -2).to(tl.int32)


@triton.jit(do_not_specialize=["num_rows", "num_ids", "rows_per_id", "num_tasks"])
def plan_tasks_kernel(
    ids_ptr, cu_seqlens_ptr, row_id_ptr, tile_ptr, run_index_ptr, run_end_ptr,
    num_rows, num_ids, rows_per_id, num_tasks,
    PACKED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program per tile of TILE rows; runs never cross a tile, so no program waits for another.

    row_id, run_index: [num_rows]   tile: [tiles, 3]   run_end: [tiles * TILE]   cu_seqlens: [num_ids + 1] or absent.
    """
    tile = tl.program_id(0)
    lane = tl.arange(0, TILE)
    rows = tile * TILE + lane
    live = rows < num_rows
    id = row_ids(ids_ptr, cu_seqlens_ptr, rows, num_rows, num_ids, rows_per_id, num_tasks, PACKED)
    before = row_ids(ids_ptr, cu_seqlens_ptr, rows - 1, num_rows, num_ids, rows_per_id, num_tasks, PACKED)
    after = row_ids(ids_ptr, cu_seqlens_ptr, rows + 1, num_rows, num_ids, rows_per_id, num_tasks, PACKED)
    starts = live & ((lane == 0) | (id != before))
    ends = live & ((lane == TILE - 1) | (rows == num_rows - 1) | (id != after))
    run = tl.cumsum(starts.to(tl.int32), 0) - 1

    tl.store(row_id_ptr + rows, id, mask=live)
    tl.store(run_index_ptr + rows, tile * TILE + run, mask=live)
    tl.store(run_end_ptr + tile * TILE + run, rows + 1, mask=ends)
    num_runs = tl.sum(starts.to(tl.int32), 0)
    tl.store(run_end_ptr + rows, 0, mask=lane >= num_runs)

    first = tl.sum(tl.where(lane == 0, id, 0), 0)
    split = tl.sum(tl.where(ends & (run == 0), lane + 1, 0), 0)
    second = tl.sum(tl.where(starts & (run == 1), id, 0), 0)
    tl.store(tile_ptr + tile * 3, first)
    tl.store(tile_ptr + tile * 3 + 1, tl.where(num_runs > 1, second, first))
    tl.store(tile_ptr + tile * 3 + 2, split)


@triton.jit
def sort_key(ids_ptr, position, num_ids, num_tasks):
    """The task, num_tasks for the base model, num_tasks + 1 for a bad id, num_tasks + 2 past the end."""
    id = tl.load(ids_ptr + position, mask=position < num_ids, other=0)
    key = tl.where((id >= 0) & (id < num_tasks), id, tl.where(id == -1, num_tasks, num_tasks + 1)).to(tl.int32)
    return tl.where(position < num_ids, key, num_tasks + 2)


@triton.jit(do_not_specialize=["num_ids", "num_tasks"])
def sort_ids_kernel(ids_ptr, order_ptr, key_ptr, num_ids, num_tasks, BLOCK: tl.constexpr):
    """order[r], key[r]: position and sort key of the id of rank r; equal ids keep their order
    ids: [num_ids]   order, key: int32 [num_ids].
    One program per BLOCK ids: the rank of each is how many are smaller anywhere, or equal before it. num_ids^2
    comparisons, 128 programs of 128 steps for 8192 tokens, need no scan across programs and no second launch.
    """
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = sort_key(ids_ptr, position, num_ids, num_tasks)
    rank = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, num_ids, BLOCK):
        other_position = start + tl.arange(0, BLOCK)
        other = sort_key(ids_ptr, other_position, num_ids, num_tasks)[None, :]
        before = (other == key[:, None]) & (other_position[None, :] < position[:, None])
        rank += tl.sum(((other < key[:, None]) | before).to(tl.int32), 1)
    tl.store(order_ptr + rank, position, mask=position < num_ids)
    tl.store(key_ptr + rank, key, mask=position < num_ids)


@triton.jit
def first_at_least(key_ptr, wanted, num_ids):
    """Where the first sorted key >= wanted stands, num_ids if there is none; by bisection."""
    low = tl.zeros_like(wanted)
    high = tl.zeros_like(wanted) + num_ids
    span = num_ids
    while span > 0:
        open = low < high
        middle = (low + high) // 2
        less = tl.load(key_ptr + middle, mask=open, other=0) < wanted
        low, high = tl.where(open & less, middle + 1, low), tl.where(open & (less == 0), middle, high)
        span = span // 2
    return low


@triton.jit
def task_rows(key_ptr, task, num_ids, rows_per_id, num_tasks, CHUNK: tl.constexpr):
    """First and end row of each task in sorted order, and how many chunks they fill; base and bad ids are tasks too."""
    first = first_at_least(key_ptr, task, num_ids) * rows_per_id
    end = first_at_least(key_ptr, task + 1, num_ids) * rows_per_id
    end = tl.where(task < num_tasks + 2, end, first)
    return first, end, (end - first + CHUNK - 1) // CHUNK


@triton.jit(do_not_specialize=["num_ids", "rows_per_id", "num_tasks", "num_chunks"])
def chunk_rows_kernel(
    key_ptr, chunk_start_ptr, chunk_ptr,
    num_ids, rows_per_id, num_tasks, num_chunks,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """chunk[c] = first and end row, in sorted order, and task of a chunk: at most CHUNK rows of one task, in order
    key: int32 [num_ids], sorted   chunk_start: int32 [num_tasks + 1], where each task's chunks start   chunk: [C, 3].
    One program per BLOCK tasks, which counts the chunks of all before; the last one empties those that nobody needs.
    """
    begin = tl.program_id(0) * BLOCK
    chunks_before = 0
    for start in range(0, begin, BLOCK):
        _, _, chunks = task_rows(key_ptr, start + tl.arange(0, BLOCK), num_ids, rows_per_id, num_tasks, CHUNK)
        chunks_before += tl.sum(chunks, 0)
    task = begin + tl.arange(0, BLOCK)
    first, end, chunks = task_rows(key_ptr, task, num_ids, rows_per_id, num_tasks, CHUNK)
    start = chunks_before + tl.cumsum(chunks, 0) - chunks
    tl.store(chunk_start_ptr + task, start, mask=task <= num_tasks)
    code = tl.where(task < num_tasks, task, num_tasks - task - 1)
    for c in range(0, tl.max(chunks, 0)):
        here = c < chunks
        at = chunk_ptr + (start + c) * 3
        tl.store(at, first + c * CHUNK, mask=here)
        tl.store(at + 1, tl.minimum(first + (c + 1) * CHUNK, end), mask=here)
        tl.store(at + 2, code, mask=here)
    if begin + BLOCK >= num_tasks + 2:
        used = chunks_before + tl.sum(chunks, 0)
        for c in range(used, num_chunks, BLOCK):
            rest = c + tl.arange(0, BLOCK)
            for field in tl.static_range(3):
                tl.store(chunk_ptr + rest * 3 + field, 0, mask=rest < num_chunks)
