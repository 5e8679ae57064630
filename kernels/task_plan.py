"""Task plan: each row's checked id, the tasks of each tile of 128 rows, and the runs of rows that share one."""

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
