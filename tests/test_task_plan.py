"""plan_tasks: every field against a plain Python oracle, packed batches, hostile offsets, tracing, bad input."""

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

import peft_ops
from peft_ops import ia3_linear, ia3_scale, plan_tasks, reference
from peft_ops.ops import ia3_scale as ia3_scale_ops
from peft_ops.ops import task_plan
from tests.conftest import DEVICE, ID_KINDS, INTERPRET, KERNELS, assert_same, ids_like, launches

pytestmark = pytest.mark.kernels

TILE = 128
FIELDS = ("task_ids", "tiles", "run_index", "run_end")
DTYPES = [torch.int32, torch.int64]
SIZES = [(rows, G) for rows in (1, 127, 128, 129, 300, 1000) for G in range(1, rows + 1) if rows % G == 0]
SIZES = [(rows, G) for rows, G in SIZES if G in (1, 2, 3, 4, 8, 10, 100, 125) or G == rows]


def oracle(ids: list[int], num_tasks: int) -> dict[str, list]:
    """The four tensors, one row at a time, from the id of every row."""
    ids = [t if -1 <= t < num_tasks else -2 for t in ids]
    tiles, run_index, run_end = [], [], []
    for begin in range(0, len(ids), TILE):
        rows = ids[begin : begin + TILE]
        runs = []  # [id, row after the last one]
        for row, t in enumerate(rows, begin):
            if not runs or runs[-1][0] != t:
                runs.append([t, row])
            runs[-1][1] = row + 1
            run_index.append(begin + len(runs) - 1)
        tiles.append([runs[0][0], runs[min(1, len(runs) - 1)][0], runs[0][1] - begin])
        run_end += [end for _, end in runs] + [0] * (TILE - len(runs))
    return {"task_ids": ids, "tiles": tiles, "run_index": run_index, "run_end": run_end}


def sequence_of(row: int, cu_seqlens: list[int]) -> int:
    """The last of the sequences that start at or before a row: an empty one gives way to the next."""
    return max((i for i, start in enumerate(cu_seqlens) if start <= row), default=-1)


def packed_ids(ids: list[int], cu_seqlens: list[int], rows: int) -> list[int]:
    found = [sequence_of(row, cu_seqlens) for row in range(rows)]
    return [ids[i] if 0 <= i < len(ids) else -2 for i in found]


def assert_plan(plan, ids: list[int], num_tasks: int) -> None:
    want = oracle(ids, num_tasks)
    for field in FIELDS:
        got = getattr(plan, field)
        assert got.dtype == torch.int32 and got.is_contiguous() and got.device.type == DEVICE, field
        assert (got.view(-1, 3) if field == "tiles" else got).tolist() == want[field], field


def assert_plans_equal(a, b) -> None:
    for field in FIELDS:
        assert torch.equal(getattr(a, field), getattr(b, field)), field
    assert a.num_tasks == b.num_tasks and a.rows_per_id == b.rows_per_id


@pytest.mark.parametrize("ids_dtype", DTYPES, ids=["int32", "int64"])
@pytest.mark.parametrize(("rows", "G"), SIZES, ids=[f"rows{rows}-ids{G}" for rows, G in SIZES])
def test_every_field_means_what_it_says(rows, G, ids_dtype):
    for kind in ID_KINDS:
        ids = ids_like(kind, G, 3, dtype=ids_dtype)
        plan = plan_tasks(ids, rows, 3)
        assert_plan(plan, ids.repeat_interleave(rows // G).tolist(), 3)
        assert (plan.num_tasks, plan.rows_per_id) == (3, rows // G)
        assert_plans_equal(plan, reference.plan_tasks(ids, rows, 3))


# ids, offsets, rows
PACKED = {
    "one sequence": ([1], [0, 300], 300),
    "one row each": ([0, 1, 2, -1], [0, 1, 2, 3, 4], 4),
    "tile borders": ([0, 1, 2, 0], [0, 127, 128, 257, 385], 385),
    "ends inside a tile": ([0, 1, 1, 2], [0, 100, 110, 120, 300], 300),
    "empty first": ([2, 0, 1], [0, 0, 50, 130], 130),
    "empty in the middle": ([0, 2, 2, 1], [0, 60, 60, 60, 200], 200),
    "empty last": ([0, 1, 2], [0, 60, 129, 129], 129),
    "all but one empty": ([0, 1, 2, 0, 1], [0, 0, 0, 150, 150, 150], 150),
    "rows after the last": ([0, 1], [0, 40, 100], 300),
    "first offset above 0": ([0, 1], [50, 200, 260], 260),
    "first offset beyond the rows": ([0, 1], [400, 500, 600], 300),
    "offsets beyond the rows": ([0, 1, 2], [0, 90, 500, 900], 200),
    "negative first offset": ([2, 1], [-5, 20, 140], 140),
    "no sequences": ([], [0], 200),
    "no sequences, no rows": ([], [0], 0),
    "no rows": ([0, 1], [0, 0, 0], 0),
    "64 of 5": ([i % 4 - 1 for i in range(64)], list(range(0, 325, 5)), 320),
}


@pytest.mark.parametrize("case", PACKED)
@pytest.mark.parametrize("offsets_dtype", DTYPES, ids=["int32", "int64"])
@pytest.mark.parametrize("ids_dtype", DTYPES, ids=["int32", "int64"])
def test_packed(case, ids_dtype, offsets_dtype):
    ids, offsets, rows = PACKED[case]
    task_ids = torch.tensor(ids, dtype=ids_dtype, device=DEVICE)
    cu_seqlens = torch.tensor(offsets, dtype=offsets_dtype, device=DEVICE)
    plan = plan_tasks(task_ids, rows, 3, cu_seqlens=cu_seqlens)
    assert_plan(plan, packed_ids(ids, offsets, rows), 3)
    assert (plan.num_tasks, plan.rows_per_id) == (3, 1)
    assert_plans_equal(plan, reference.plan_tasks(task_ids, rows, 3, cu_seqlens=cu_seqlens))


def test_packed_is_repeat_interleave():
    lengths = torch.tensor([5, 0, 128, 1, 0, 200], device=DEVICE)
    ids = torch.tensor([0, 1, 2, -1, 2, 1], device=DEVICE)
    plan = plan_tasks(ids, 334, 3, cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)))
    assert torch.equal(plan.task_ids, ids.repeat_interleave(lengths).int())


@pytest.mark.parametrize(
    "offsets", [[300, 200, 100, 0], [0, 200, 100, 300], [150, 0, 299, 1], [2**31 - 1, 0, -(2**31), 7]], ids=str
)
@pytest.mark.parametrize("offsets_dtype", DTYPES, ids=["int32", "int64"])
def test_offsets_in_any_order_read_nothing_else(offsets, offsets_dtype):
    """Whatever the offsets: a row gets an id of the batch or none, and no element beside ids and offsets is read."""
    beside = 4  # a task of somebody else: it shows if an id outside the view is read
    buffer = torch.full((3 + 64,), beside, device=DEVICE)
    buffer[32:35] = torch.tensor([0, 1, 2], device=DEVICE)
    plans = []
    for filler in (0, 300):  # an offset outside the view would change the answer
        around = torch.full((4 + 64,), filler, dtype=offsets_dtype, device=DEVICE)
        around[32:36] = torch.tensor(offsets, dtype=offsets_dtype, device=DEVICE)
        plans.append(plan_tasks(buffer[32:35], 300, 5, cu_seqlens=around[32:36]))
    assert_plans_equal(*plans)
    assert set(plans[0].task_ids.tolist()) <= {-2, 0, 1, 2}
    assert_plan(plans[0], plans[0].task_ids.tolist(), 5)


@settings(max_examples=20 if INTERPRET else 60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 90)), max_size=12),
    st.integers(0, 200),
    st.sampled_from(DTYPES),
)
def test_any_packed_batch(sequences, tail, dtype):
    ids, lengths = [t for t, _ in sequences], [n for _, n in sequences]
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    rows = offsets[-1] + tail
    plan = plan_tasks(
        torch.tensor(ids, dtype=dtype, device=DEVICE),
        rows,
        4,
        cu_seqlens=torch.tensor(offsets, dtype=dtype, device=DEVICE),
    )
    want = [t for t, n in sequences for _ in range(n)] + [-2] * tail
    assert_plan(plan, want, 4)
    # what the kernels rely on: from a run's first row its end follows, and no run leaves its tile
    row = 0
    while row < rows:
        end = int(plan.run_end[plan.run_index[row]])
        assert row < end <= min(rows, (row // TILE + 1) * TILE)
        assert plan.run_index[row:end].unique().numel() == 1 and plan.task_ids[row:end].unique().numel() == 1
        row = end
    used = torch.zeros(plan.run_end.numel(), dtype=torch.bool, device=DEVICE)
    used[plan.run_index.long()] = True
    assert torch.equal(plan.run_end > 0, used)


@settings(max_examples=20 if INTERPRET else 60, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_any_padded_batch(G, each, num_tasks, dtype, seed):
    torch.manual_seed(seed)
    ids = ids_like("uniform", G, num_tasks, dtype=dtype)
    assert_plan(plan_tasks(ids, G * each, num_tasks), ids.repeat_interleave(each).tolist(), num_tasks)


@pytest.mark.parametrize("ids", [[], [0], [0, 1, 2]], ids=str)
def test_zero_rows(ids):
    plan = plan_tasks(torch.tensor(ids, dtype=torch.int64, device=DEVICE), 0, 3)
    assert_plan(plan, [], 3)


def test_no_tasks_leaves_the_base_model():
    assert_plan(plan_tasks(torch.full((4,), -1, device=DEVICE), 300, 0), [-1] * 300, 0)


BAD_IDS = [3, 4, -2, -3, 2**31 - 1, -(2**31)]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("ids_dtype", DTYPES, ids=["int32", "int64"])
@pytest.mark.parametrize("bad", BAD_IDS)
def test_bad_id(bad, ids_dtype, packed):
    ids = torch.tensor([0, 2, bad, -1], dtype=ids_dtype, device=DEVICE)
    cu_seqlens = torch.tensor([0, 10, 20, 150, 200], device=DEVICE) if packed else None
    if not KERNELS:
        with pytest.raises(IndexError, match=rf"^plan_tasks: task_ids must be in \[-1, 3\), got {bad} at position 2$"):
            plan_tasks(ids, 200, 3, cu_seqlens=cu_seqlens)
        return
    rows = ids.repeat_interleave(cu_seqlens.diff() if packed else 50).tolist()
    plan = plan_tasks(ids, 200, 3, cu_seqlens=cu_seqlens)
    assert plan.task_ids.tolist() == [-2 if t == bad else t for t in rows]
    assert_plan(plan, rows, 3)


def test_bad_id_of_64_bits_is_no_small_one():
    ids = torch.tensor([0, 2**32 + 1, 1], device=DEVICE)
    if KERNELS:
        assert plan_tasks(ids, 3, 3).task_ids.tolist() == [0, -2, 1]
    else:
        with pytest.raises(IndexError, match="got 4294967297 at position 1"):
            plan_tasks(ids, 3, 3)


@pytest.mark.skipif(not KERNELS, reason="a kernel is launched on a GPU or by the interpreter only")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_one_launch(packed):
    ids = ids_like("uniform", 3, 3)
    with launches(task_plan.kernels) as seen:
        plan_tasks(ids, 300, 3, cu_seqlens=torch.tensor([0, 100, 150, 300], device=DEVICE) if packed else None)
        assert [(name, kwargs["PACKED"]) for name, kwargs in seen] == [("plan_tasks_kernel", packed)]
        plan_tasks(ids, 0, 3)
        assert len(seen) == 1, "nothing to do for zero rows"


def test_operators_given_a_plan_launch_none():
    if not KERNELS:
        pytest.skip("a kernel is launched on a GPU or by the interpreter only")
    x, weight, ia3_l = (torch.randn(*s, device=DEVICE).half() for s in ((3, 350, 16), (32, 16), (3, 32)))
    ids = torch.tensor([0, 2, 1], device=DEVICE)  # 1050 rows: fewer take the small kernel, which needs no plan
    plan = plan_tasks(ids, 1050, 3)
    with launches(task_plan.kernels) as seen:
        ia3_linear(x, weight, ia3_l=ia3_l, task_ids=plan)
        assert seen == []
        ia3_linear(x, weight, ia3_l=ia3_l, task_ids=ids)
        assert len(seen) == 1


def chunks_oracle(ids: list[int], rows_per_id: int, num_tasks: int, size: int = 256):
    """Positions by task, and the pieces of each task's rows: (first, end, task), base and bad ids last."""
    key = [t if 0 <= t < num_tasks else num_tasks if t == -1 else num_tasks + 1 for t in ids]
    order = sorted(range(len(ids)), key=key.__getitem__)  # stable
    chunks, starts, first = [], [], 0
    for task in range(num_tasks + 2):
        end = first + key.count(task) * rows_per_id
        starts.append(len(chunks))
        code = task if task < num_tasks else num_tasks - task - 1
        chunks += [[at, min(at + size, end), code] for at in range(first, end, size)]
        first = end
    return order, chunks, starts[: num_tasks + 1]


@pytest.mark.skipif(not KERNELS, reason="the C++ backward has a schedule of its own")
@pytest.mark.parametrize("kind", [*ID_KINDS, "bad"])
@pytest.mark.parametrize(
    ("G", "rows_per_id", "num_tasks"),
    [(1, 1, 1), (5, 1, 3), (130, 5, 4), (3, 256, 1), (8, 300, 300), (1, 1000, 2), (7, 77, 127), (4, 3, 0)],
)
@pytest.mark.parametrize("limit", [4096, 4], ids=["kernel", "torch"])
def test_rows_sorted_by_task_in_chunks(G, rows_per_id, num_tasks, kind, limit, monkeypatch):
    """What backward sums follow: bounded in number by the shapes, each of one task, its rows in their own order."""
    monkeypatch.setattr(ia3_scale_ops.tiles, "SORT_LIMIT", limit)
    if kind == "bad" or num_tasks == 0:
        ids = torch.randint(-4, num_tasks + 3, (G,), dtype=torch.int32, device=DEVICE)
    else:
        ids = ids_like(kind, G, num_tasks)
    order, chunks, starts = ia3_scale_ops.chunks_by_task(ids, G * rows_per_id, num_tasks, ids.device)
    want_order, want_chunks, want_starts = chunks_oracle(ids.tolist(), rows_per_id, num_tasks)
    assert order.tolist() == want_order and starts.tolist() == want_starts
    assert chunks[: len(want_chunks)].tolist() == want_chunks
    assert not chunks[len(want_chunks) :].any(), "chunks that nobody needs are empty"


@pytest.mark.parametrize("S", [3, 33, 128])
def test_one_plan_serves_every_operator_with_its_tasks(S):
    B, K, N = 3, 16, 24
    x, weight = torch.randn(B, S, K, device=DEVICE), torch.randn(N, K, device=DEVICE)
    in_l, out_l = torch.randn(3, K, device=DEVICE), torch.randn(3, N, device=DEVICE)
    for ids in (torch.tensor([2, -1, 0], device=DEVICE), ids_like("sorted", B * S, 3).view(B, S)):
        plan = plan_tasks(ids, B * S, 3)
        assert torch.equal(ia3_scale(x, in_l, plan), ia3_scale(x, in_l, ids))
        assert torch.equal(ia3_scale(x.view(B * S, K), in_l, plan), ia3_scale(x, in_l, ids).view(B * S, K))
        for kwargs in (dict(ia3_l=out_l), dict(ia3_l=out_l, activation="silu"), dict(ia3_l=in_l, is_feedforward=True)):
            assert_same(
                ia3_linear(x, weight, **kwargs, task_ids=plan),
                ia3_linear(x, weight, **kwargs, task_ids=ids),
                bitwise=True,
            )


def test_plan_of_other_rows_or_tasks_is_refused():
    x, weight, ia3_l = (
        torch.zeros(4, 8, device=DEVICE),
        torch.zeros(8, 8, device=DEVICE),
        torch.ones(2, 8, device=DEVICE),
    )
    ids = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    for op, call in (
        ("ia3_scale", lambda p: ia3_scale(x, ia3_l, p)),
        ("ia3_linear", lambda p: ia3_linear(x, weight, ia3_l=ia3_l, task_ids=p)),
    ):
        with pytest.raises(ValueError, match=f"^{op}: task_ids must be a plan for 4 rows, got one for 8$"):
            call(plan_tasks(ids, 8, 2))
        with pytest.raises(ValueError, match=f"^{op}: task_ids must be a plan for 2 tasks, got one for 3$"):
            call(plan_tasks(ids, 4, 3))


def test_layouts_of_ids_and_offsets():
    """A view of something else: every second element, one element repeated, the other dimension first."""
    ids = ids_like("uniform", 6, 3)
    want = plan_tasks(ids, 300, 3)
    assert_plans_equal(plan_tasks(torch.stack([ids, ids + 9], 1)[:, 0], 300, 3), want)
    assert_plans_equal(plan_tasks(ids.view(2, 3).t().contiguous().t(), 300, 3), want)
    assert plan_tasks(torch.ones(1, dtype=torch.int64, device=DEVICE).expand(6), 300, 3).task_ids.tolist() == [1] * 300
    offsets = torch.tensor([0, 20, 130, 140, 150, 260, 300], device=DEVICE)
    want = plan_tasks(ids, 300, 3, cu_seqlens=offsets)
    assert_plans_equal(plan_tasks(ids, 300, 3, cu_seqlens=torch.stack([offsets, offsets + 7], 1)[:, 0]), want)


def test_repeats_are_equal_and_inputs_unchanged():
    ids = ids_like("skewed", 100, 3)
    kept, first = ids.clone(), plan_tasks(ids, 300, 3)
    for _ in range(250 if DEVICE == "cuda" else 50):
        assert_plans_equal(plan_tasks(ids, 300, 3), first)
    assert torch.equal(ids, kept)


def test_reference_backend_gives_the_same_plan():
    ids = ids_like("uniform", 6, 3)
    offsets = torch.tensor([0, 1, 2, 2, 200, 201, 290], device=DEVICE)
    for rows, task_ids, cu_seqlens in ((300, ids, None), (300, ids, offsets), (0, ids, None), (0, ids[:0], None)):
        with peft_ops.set_backend("reference"):
            want = plan_tasks(task_ids, rows, 3, cu_seqlens=cu_seqlens)
        assert_plans_equal(plan_tasks(task_ids, rows, 3, cu_seqlens=cu_seqlens), want)


@pytest.mark.parametrize("rows", [0, 6, 300])
@pytest.mark.parametrize("ids_dtype", DTYPES, ids=["int32", "int64"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_opcheck(packed, ids_dtype, rows):
    ids = torch.tensor([0, 2, -1], dtype=ids_dtype, device=DEVICE)
    cu_seqlens = torch.tensor([0, rows // 2, rows // 2, rows], dtype=torch.int32, device=DEVICE) if packed else None
    torch.library.opcheck(torch.ops.peft_ops.plan_tasks, (ids, cu_seqlens, rows, 3))


def test_compiles_with_dynamic_rows():
    def plans(x, ids, lengths):
        rows = x.shape[0] * x.shape[1]
        padded = plan_tasks(ids, rows, 3)
        packed = plan_tasks(ids, rows, 3, cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)))
        return *padded[:4], *packed[:4], padded.rows_per_id, packed.rows_per_id

    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(plans, backend=frames, fullgraph=True, dynamic=True)
    for B, S in ((2, 3), (3, 60), (5, 64), (8, 5), (13, 31)):
        x, ids = torch.randn(B, S, 4, device=DEVICE), ids_like("uniform", B, 3)
        lengths = torch.full((B,), S, device=DEVICE)
        lengths[0], lengths[1] = S - 1, S + 1
        for got, want in zip(compiled(x, ids, lengths), plans(x, ids, lengths), strict=True):
            assert got == want if isinstance(want, int) else torch.equal(got, want)
    assert frames.frame_count <= 2


def test_exports_with_dynamic_batch(tmp_path):
    class Plan(torch.nn.Module):
        def forward(self, x, ids):
            return plan_tasks(ids, x.shape[0] * x.shape[1], 3)[:4]

    x, ids = torch.randn(4, 50, device=DEVICE), ids_like("uniform", 4, 3)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Plan(), (x, ids), dynamic_shapes={"x": {0: batch}, "ids": {0: batch}})
    torch.export.save(program, tmp_path / "plan.pt2")
    loaded = torch.export.load(tmp_path / "plan.pt2").module()
    x, ids = torch.randn(7, 50, device=DEVICE), ids_like("uniform", 7, 3)
    assert all(torch.equal(a, b) for a, b in zip(loaded(x, ids), plan_tasks(ids, 350, 3)[:4], strict=True))


IDS, CU = torch.zeros(4, dtype=torch.int64), torch.tensor([0, 1, 2, 3, 8])
BAD_INPUT = {
    "ids no tensor": (([0, 1], 4, 2), {}, TypeError, "task_ids must be a tensor, got list"),
    "ids none": ((None, 4, 2), {}, TypeError, "task_ids must be a tensor, got NoneType"),
    "ids float": ((IDS.float(), 4, 2), {}, TypeError, "task_ids must have dtype int32, int64, got float32"),
    "ids bool": ((IDS.bool(), 4, 2), {}, TypeError, "task_ids must have dtype int32, int64, got bool"),
    "ids int16": ((IDS.short(), 4, 2), {}, TypeError, "got int16"),
    "rows no int": ((IDS, 4.0, 2), {}, TypeError, "rows must be an int, got float"),
    "rows a tensor": ((IDS, torch.tensor(4), 2), {}, TypeError, "rows must be an int, got Tensor"),
    "rows a bool": ((IDS, True, 2), {}, TypeError, "rows must be an int, got bool"),
    "rows a shape": ((IDS, torch.Size([4]), 2), {}, TypeError, "rows must be an int, got Size"),
    "rows negative": ((IDS, -4, 2), {}, ValueError, "rows must be at least 0, got -4"),
    "rows no multiple": ((IDS, 10, 2), {}, ValueError, "rows must be a multiple of the 4 task_ids, got 10"),
    "rows fewer": ((IDS, 2, 2), {}, ValueError, "rows must be a multiple of the 4 task_ids, got 2"),
    "rows without ids": ((IDS[:0], 3, 2), {}, ValueError, "rows must be a multiple of the 0 task_ids, got 3"),
    "num_tasks no int": ((IDS, 4, "2"), {}, TypeError, "num_tasks must be an int, got str"),
    "num_tasks none": ((IDS, 4, None), {}, TypeError, "num_tasks must be an int, got NoneType"),
    "num_tasks negative": ((IDS, 4, -1), {}, ValueError, "num_tasks must be at least 0, got -1"),
    "offsets no tensor": ((IDS, 8, 2), dict(cu_seqlens=[0, 8]), TypeError, "cu_seqlens must be a tensor, got list"),
    "offsets float": (
        (IDS, 8, 2),
        dict(cu_seqlens=CU.float()),
        TypeError,
        "cu_seqlens must have dtype int32, int64, got float32",
    ),
    "offsets rank": (
        (IDS, 8, 2),
        dict(cu_seqlens=CU[None]),
        ValueError,
        r"cu_seqlens must have 1 dimension, got shape \[1, 5\]",
    ),
    "offsets too few": (
        (IDS, 8, 2),
        dict(cu_seqlens=CU[:4]),
        ValueError,
        "cu_seqlens must have 5 entries for 4 task_ids, got 4",
    ),
    "offsets too many": (
        (IDS[:3], 8, 2),
        dict(cu_seqlens=CU),
        ValueError,
        "cu_seqlens must have 4 entries for 3 task_ids, got 5",
    ),
    "offsets elsewhere": (
        (IDS, 8, 2),
        dict(cu_seqlens=CU.to("meta")),
        ValueError,
        "cu_seqlens must be on cpu, .* got meta",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case):
    args, kwargs, error, match = BAD_INPUT[case]
    with pytest.raises(error, match=f"^plan_tasks: .*{match}$"):
        plan_tasks(*args, **kwargs)


def test_checks_hold_on_fake_cuda_tensors():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        ids = torch.zeros(4, dtype=torch.int32, device="cuda")
        for cu_seqlens in (None, torch.zeros(5, dtype=torch.int64, device="cuda")):
            plan = plan_tasks(ids, 300, 3, cu_seqlens=cu_seqlens)
            assert [getattr(plan, f).numel() for f in FIELDS] == [300, 9, 300, 384]
            assert all(getattr(plan, f).device.type == "cuda" and getattr(plan, f).dtype == torch.int32 for f in FIELDS)
        with pytest.raises(ValueError, match="rows must be a multiple of the 4 task_ids, got 301"):
            plan_tasks(ids, 301, 3)
        with pytest.raises(ValueError, match="must be on cuda:0, as the other arguments are, got cpu"):
            plan_tasks(ids, 300, 3, cu_seqlens=torch.zeros(5, dtype=torch.int64))


@pytest.mark.skipif(not KERNELS, reason="a question where kernels run")
def test_a_backward_sorts_sequences_not_rows():
    """A plan holds the id of every row; where the shapes say that sequences share one, that many are sorted."""
    ids, x = torch.tensor([1, -1, 0], device=DEVICE), torch.randn(3, 50, 16, device=DEVICE)
    plan, ia3_l = plan_tasks(ids, 150, 2), torch.randn(2, 16, device=DEVICE, requires_grad=True)
    with launches(ia3_scale_ops.sorting) as seen:
        ia3_scale(x, ia3_l, plan).sum().backward()
        by_plan, ia3_l.grad = ia3_l.grad, None
        ia3_scale(x, ia3_l, ids).sum().backward()
    assert torch.equal(by_plan, ia3_l.grad)
    assert [name for name, _ in seen] == ["sort_ids_kernel", "chunk_rows_kernel"] * 2
    assert ia3_scale_ops.per_sequence(plan.task_ids, [plan.tiles], plan.rows_per_id).tolist() == ids.tolist()
