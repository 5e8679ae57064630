"""ia3_kv_linear: k and v against torch, fp64 and two ia3_linear, one launch, gradients, layouts, tracing, bad input."""

from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import peft_ops
from peft_ops import ia3_kv_linear, ia3_linear, plan_tasks, reference
from peft_ops.ops import ia3_kv_linear as ops
from peft_ops.ops import ia3_linear as single
from tests.conftest import (
    BAD_IDS,
    DEVICE,
    DTYPES,
    ID_KINDS,
    INTERPRET,
    KERNELS,
    W_LAYOUTS,
    X_LAYOUTS,
    assert_guards,
    assert_like_torch,
    assert_same,
    doubled,
    fused,
    gradients,
    guarded,
    guarded_allocations,
    ids_like,
    launches,
    name_of,
    scales,
    truncates,
)

pytestmark = pytest.mark.kernels
needs_kernels = pytest.mark.skipif(not KERNELS, reason="a question where kernels run")
# for what the dtype does not change: the interpreter is slow
any_dtype = pytest.mark.parametrize("dtype", [torch.float16] if INTERPRET else DTYPES, ids=name_of)

NAN, INF = float("nan"), float("inf")
NAMES = "x", "k_weight", "v_weight", "k_bias", "v_bias", "k_ia3_l", "v_ia3_l"
# rows, widths, reduced features, and the kernel by the rule of the fixture below. Two: not aligned, one call each
SHAPES = {
    "two": (1, 257, 64, 31),
    "two large": (70, 33, 48, 32),
    "vector": (3, 48, 16, 144),
    "small": (17, 48, 80, 48),
    "split": (6, 16, 80, 1040),
    "dual": (130, 80, 80, 80),
    "unequal": (66, 32, 144, 48),
}


@pytest.fixture(autouse=True)
def large_above_64_rows():
    """By its own rule the large kernels start where 128 x 128 tiles fill half a GPU, which no test here can afford."""
    with pytest.MonkeyPatch.context() as patch:
        for tiles in (ops.tiles, single.tiles):
            patch.setattr(tiles, "linear_is_small", lambda M, N, capability: M <= 64)
        yield


def make(M, K_N, V_N, K, dtype=torch.float32, num_tasks=3, *, biases="kv", l_dtype=torch.float32):
    """The tensors of NAMES: the outputs are of order one."""
    x, weights = torch.randn(M, K), [torch.randn(N, K) / max(K, 1) ** 0.5 for N in (K_N, V_N)]
    b = [torch.randn(N) if side in biases else None for side, N in (("k", K_N), ("v", V_N))]
    tables = [torch.randn(num_tasks, N).to(DEVICE, l_dtype) for N in (K_N, V_N)]
    return *(None if t is None else t.to(DEVICE, dtype) for t in (x, *weights, *b)), *tables


def run(tensors, ids=None):
    x, k_weight, v_weight, k_bias, v_bias, k_l, v_l = tensors
    return ia3_kv_linear(x, k_weight, v_weight, k_bias, v_bias, k_ia3_l=k_l, v_ia3_l=v_l, task_ids=ids)


def sides(tensors):
    """x, weight, bias, ia3_l of the keys, and of the values."""
    x, k_weight, v_weight, k_bias, v_bias, k_l, v_l = tensors
    return (x, k_weight, k_bias, k_l), (x, v_weight, v_bias, v_l)


def run_two(tensors, ids=None):
    return tuple(ia3_linear(x, w, b, ia3_l=ia3_l, task_ids=ids) for x, w, b, ia3_l in sides(tensors))


def expected(tensors, rows):
    """The specification, written out in x's dtype: PEFT's arithmetic, one vector per row."""
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return tuple(
        (F.linear(x, w, b).to(dtype) * scales(ia3_l, rows, dtype)).to(x.dtype) for x, w, b, ia3_l in sides(tensors)
    )


def check(got, tensors, rows):
    """Bitwise where F.linear multiplies; the fp64 rule elsewhere."""
    dtype = tensors[0].dtype
    for y, same, fp64 in zip(got, expected(tensors, rows), expected(doubled(*tensors), rows), strict=True):
        assert y.dtype == dtype and y.is_contiguous()
        if not fused(dtype):
            assert_same(y, same, bitwise=True)
        assert_like_torch(y, same, fp64, elementwise=True)


def equal(got, want):
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@contextmanager
def launched():
    """Of each launch of a matmul: whose it is (kv, dual, linear), and vector, small, split, or its way to select."""
    kinds = []
    with launches(ops.kernels) as kv, launches(ops.dual) as dual, launches(single.kernels) as linear:
        yield kinds
    for owner, seen in (("kv", kv), ("dual", dual), ("linear", linear)):
        for name, kwargs in seen:
            small = "vector" if "vector" in name else "split" if kwargs.get("SPLIT", 1) > 1 else "small"
            kinds.append(f"{owner} {kwargs.get('TASKS', small)}")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward(shape, dtype):
    for biases in ("k", "v") if INTERPRET and dtype != torch.float16 else ("", "k", "v", "kv"):
        tensors = make(*shape, dtype, biases=biases)
        ids = ids_like("sorted" if INTERPRET and shape[0] > 64 else "uniform", shape[0], 3)
        got = run(tensors, ids)
        check(got, tensors, ids.tolist())
        if not fused(dtype):
            assert equal(got, run_two(tensors, ids))


@any_dtype
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_two_linears_bitwise_where_a_table_trains(shape, dtype):
    """There z is wanted, and each side has the launch of ia3_linear."""
    tensors = make(*shape, dtype)
    tensors[5].requires_grad_()
    ids = ids_like("sorted", shape[0], 3)
    assert equal(run(tensors, ids), run_two(tensors, ids))


@any_dtype
@pytest.mark.parametrize("l_dtype", DTYPES, ids=name_of)
def test_vectors_of_any_dtype(l_dtype, dtype):
    for shape in ((3, 32, 16, 32), (9, 32, 16, 32), (70, 32, 32, 32), (70, 32, 16, 32)):
        tensors, ids = make(*shape, dtype, l_dtype=l_dtype), ids_like("sorted", shape[0], 3)
        check(run(tensors, ids), tensors, ids.tolist())


def test_tables_of_two_dtypes(dtype):
    *rest, v_l = make(70, 32, 32, 32, dtype)
    tensors, ids = (*rest, v_l.to(torch.float16)), ids_like("sorted", 70, 3)
    check(run(tensors, ids), tensors, ids.tolist())


@any_dtype
@pytest.mark.parametrize("S", [2, 35], ids=["small", "large"])
@pytest.mark.parametrize("selection", ["one", "sequence", "token", "beams", "plan", "packed"])
def test_every_way_to_select_tasks(selection, S, dtype):
    B = 4
    ids = ids_like("uniform", 2 if selection == "beams" else B, 4, dtype=torch.int32 if S == 2 else torch.int64)
    rows = ids.repeat_interleave(B * S // len(ids))
    if selection == "token":
        ids = ids.repeat_interleave(S).view(B, S).flip(1)
        rows = ids.flatten()
    elif selection == "plan":
        ids = plan_tasks(ids, B * S, 4)
    elif selection == "packed":
        lengths = torch.tensor([1, 0, B * S - 3, 2], device=DEVICE)
        rows = ids.repeat_interleave(lengths)
        ids = plan_tasks(ids, B * S, 4, cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)))
    for V_N in (32, 16):
        x, *rest = tensors = make(B * S, 32, V_N, 32, dtype, 1 if selection == "one" else 4)
        got = run((x.view(B, S, 32), *rest), None if selection == "one" else ids)
        assert [tuple(y.shape) for y in got] == [(B, S, 32), (B, S, V_N)]
        check([y.view(B * S, -1) for y in got], tensors, [0] * B * S if selection == "one" else rows.tolist())


def test_one_task_needs_no_ids(dtype):
    x, *weights, k_l, v_l = tensors = make(9, 32, 16, 32, dtype, 1)
    want = run(tensors, torch.zeros(9, dtype=torch.int64, device=DEVICE))
    assert equal(run(tensors), want) and equal(run((x, *weights, k_l[0], v_l[0])), want)
    check(want, tensors, [0] * 9)
    assert equal([y[None] for y in run((x[0], *weights, k_l[0], v_l[0]))], run((x[:1], *tensors[1:])))


# sequences, rows of each, way to select: tiles of one task, two, three, and many; none a multiple of the tile
TILES = {
    "one": (None, 150, "one"),
    "two of 128": (2, 128, "two"),
    "two of 150": (2, 150, "two"),
    "three of 60": (3, 60, "runs"),
    "token": (90, 1, "runs"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
@pytest.mark.parametrize("V_N", [16, 32], ids=["dual", "unequal"])
@pytest.mark.parametrize("case", TILES)
def test_tasks_of_a_tile(case, V_N, dtype):
    """Every way a large kernel applies scales: in fp32 the product of the unscaled result, bit by bit."""
    G, S, mode = TILES[case]
    M, num_tasks = (G or 1) * S, 1 if G is None else 5
    x, *rest = tensors = make(M, 16, V_N, 16, dtype, num_tasks)
    ids = None if G is None else torch.tensor([4, -1, 0, 3, 1], device=DEVICE)[torch.randperm(G, device=DEVICE) % 5]
    rows = [0] * M if G is None else ids.repeat_interleave(S).tolist()
    with launched() as kinds:
        got = run(tensors if G is None else (x.view(G, S, 16), *rest), ids)
        same = run(tensors, None if G is None else plan_tasks(ids, M, num_tasks))
    assert kinds == ([f"{'dual' if V_N == 16 else 'kv'} {mode}"] * 2 if fused(dtype) else [])
    got = [y.view(M, -1) for y in got]
    check(got, tensors, rows)
    assert equal(got, same)
    if dtype == torch.float32:
        bare = run((*tensors[:5], *(torch.ones_like(t[0]) for t in tensors[5:])))
        assert equal(got, [z * scales(t, rows, dtype) for z, t in zip(bare, tensors[5:], strict=True)])


@needs_kernels
@pytest.mark.parametrize(
    ("shape", "grad", "kernels"),
    [
        ((1, 48, 48, 32), "", ["kv vector"]),
        ((4, 16, 48, 32), "", ["kv vector"]),
        ((5, 48, 16, 32), "", ["kv small"]),
        ((5, 48, 16, 1024), "", ["kv split"]),
        ((64, 48, 48, 32), "", ["kv small"]),
        ((65, 48, 48, 32), "", ["dual runs"]),
        ((65, 48, 16, 32), "", ["kv runs"]),
        ((65, 48, 48, 32), "x", ["dual runs"]),
        ((65, 48, 16, 32), "xwb", ["kv runs"]),
        ((65, 48, 48, 32), "l", ["linear runs"] * 2),  # z is wanted
        ((3, 48, 48, 32), "l", ["linear vector"] * 2),
        ((65, 40, 48, 32), "", ["linear small", "linear runs"]),
        ((65, 48, 48, 24), "", ["linear small"] * 2),
    ],
)
def test_which_kernel_runs(shape, grad, kernels):
    tensors = make(*shape, torch.float16)
    for name, t in zip("xwwbbll", tensors, strict=True):
        t.requires_grad_(name in grad)
    ids = ids_like("sorted", shape[0], 3)
    with launched() as kinds:
        got = run(tensors, ids)
    assert kinds == kernels
    check([y.detach() for y in got], [t.detach() for t in tensors], ids.tolist())


@needs_kernels
@pytest.mark.parametrize("M", [3, 9, 70])
def test_tables_of_two_dtypes_have_a_launch_each(M):
    """A kernel that branches on the pointers wants them of one type; the interpreter would not mind."""
    *rest, k_l, v_l = make(M, 48, 16, 32, torch.float16)
    tensors, ids = (*rest, k_l, v_l.to(torch.bfloat16)), ids_like("sorted", M, 3)
    with launched() as kinds:
        got = run(tensors, ids)
    assert len(kinds) == 2 and all(kind.startswith("linear") for kind in kinds)
    check(got, tensors, ids.tolist())


@needs_kernels
def test_which_kernel_runs_by_its_own_rule(monkeypatch):
    """A few tiles of both widths together go to split K up to 1024 rows; many do not."""
    monkeypatch.setattr(ops.tiles, "linear_is_small", import_module("peft_ops.kernels.tiles").linear_is_small)
    for shape, kernel in (
        ((65, 48, 48, 32), "kv small"),
        ((130, 48, 16, 528), "kv split"),
        ((513, 1424, 16, 16), "kv runs"),
    ):
        tensors, ids = make(*shape, torch.float16), ids_like("sorted", shape[0], 3)
        with launched() as kinds:
            got = run(tensors, ids)
        assert kinds == [kernel]
        check(got, tensors, ids.tolist())


@needs_kernels
@pytest.mark.parametrize("w_layout", [name for name in W_LAYOUTS if name != "rows"])
def test_one_launch_takes_contiguous_weights_only(w_layout):
    for side in (1, 2):
        tensors = list(make(5, 48, 48, 32, torch.float16))
        tensors[side] = W_LAYOUTS[w_layout](tensors[side])
        with launched() as kinds:
            got = run(tensors, ids := ids_like("uniform", 5, 3))
        assert kinds == ["linear small"] * 2
        check(got, tensors, ids.tolist())


@needs_kernels
def test_split_k_adds_its_parts_in_ascending_order(dtype, monkeypatch):
    """Each side has its own partial sums and counters, the narrower fewer tiles."""
    if not fused(dtype):
        pytest.skip("fp32 runs on F.linear")
    workspaces, real = [], ops.split_workspace
    monkeypatch.setattr(ops, "split_workspace", lambda *args: workspaces.append(real(*args)) or workspaces[-1])
    tensors = make(5, 80, 144, 4096, dtype)
    ids = torch.tensor([1, -1, 0, 2, 1], device=DEVICE)
    with guarded_allocations():
        got = run(tensors, ids)
    ((part, count),) = workspaces
    assert part.shape == (8, 5, 224) and count.numel() >= 5 and not count.any()
    parts = part.flatten().split([8 * 5 * 80, 8 * 5 * 144])
    for y, p, (x, weight, bias, ia3_l) in zip(got, parts, sides(tensors), strict=True):
        p, total = p.view(8, 5, -1), 0
        for some, xs, ws in zip(p, x.float().chunk(8, 1), weight.float().chunk(8, 1), strict=True):
            torch.testing.assert_close(some, xs @ ws.t())
            total = total + some
        assert_same(y, ((total + bias.float()) * scales(ia3_l, ids.tolist(), torch.float32)).to(dtype))


@pytest.mark.skipif(not INTERPRET, reason="only the interpreter lets a test choose the order of programs")
def test_split_k_does_not_depend_on_who_arrives_last(monkeypatch):
    from triton.runtime.interpreter import interpreter_builder as builder

    tensors, ids, first = make(5, 80, 16, 4096), ids_like("uniform", 5, 3), builder.set_grid_idx
    want = run(tensors, ids)
    order = [3, 0, 7, 1, 6, 2, 5, 4]
    monkeypatch.setattr(builder, "set_grid_idx", lambda i, j, k: first(i, order[j], 1 - k))
    assert equal(run(tensors, ids), want)


@needs_kernels
def test_split_k_shares_its_counters_with_ia3_linear(monkeypatch):
    pool = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    cases = [make(*shape, torch.float16) for shape in ((5, 80, 144, 1024), (40, 400, 16, 2048), (5, 80, 144, 1024))]
    ids = torch.tensor([1, -1, 0, 2, 2], device=DEVICE)

    def everything(tensors):
        tensors = tensors[0].view(5, -1, tensors[0].shape[1]), *tensors[1:]
        return *run(tensors, ids), *run_two(tensors, ids)

    want = [everything(tensors) for tensors in cases]
    monkeypatch.setattr(single, "_counters", lambda x, count: pool)
    for tensors, ys in zip(cases, want, strict=True):
        assert equal(everything(tensors), ys)
        assert not pool.any()


@any_dtype
@pytest.mark.parametrize("shape", [(40, 32, 16, 32), (140, 32, 32, 32)], ids=["small", "large"])
def test_mixed_batch_equals_each_task_alone(shape, dtype):
    for num_tasks in (1, 2, 8, 64):
        tensors, ids = make(*shape, dtype, num_tasks), ids_like("sorted", shape[0], num_tasks)
        mixed = run(tensors, ids)
        for t in list(set(ids.tolist()))[: 2 if INTERPRET else 4]:
            alone = run(tensors, torch.full_like(ids, t))
            assert equal([y[ids == t] for y in mixed], [y[ids == t] for y in alone])


@any_dtype
def test_rows_are_independent(dtype):
    """Other rows get other ids, NaN and Inf, and their tasks NaN and Inf in the vectors: this row stays, bit by bit."""
    generator = torch.Generator().manual_seed(1)

    def random(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    for i in range(8 if INTERPRET else 40):
        unit = (1, 16, 16, 16)[i % 4]
        M = random(65, 90) if i % 4 == 3 else random(2, 40)
        tensors = make(M, unit * random(1, 4), unit * random(1, 4), unit * random(1, 4), dtype, 4)
        row, ids = random(0, M), ids_like("sorted", M, 4)
        before = [y[row].clone() for y in run(tensors, ids)]
        others, mine, x = torch.arange(M, device=DEVICE) != row, int(ids[row]), tensors[0]
        special = torch.tensor([1, NAN, INF], device=DEVICE)[torch.randint(0, 3, (M - 1, 1), device=DEVICE)]
        x[others] = torch.randn_like(x[others]) * special.to(dtype)
        ids[others] = ids_like("sorted", M - 1, 4)
        for t in range(4):
            if t != mine:
                tensors[5][t, 0], tensors[6][t, -1] = (NAN, INF, -INF, 0.0)[t], (INF, 0.0, NAN, -INF)[t]
        assert equal([y[row] for y in run(tensors, ids)], before)


@needs_kernels
@pytest.mark.parametrize("S", [5, 14], ids=["small", "large"])
def test_order_of_sequences_does_not_matter(S, dtype):
    x, *rest = make(6 * S, 32, 48, 48, dtype)
    x, ids, order = x.view(6, S, 48), ids_like("uniform", 6, 3), torch.randperm(6, device=DEVICE)
    for got, want in zip(run((x[order], *rest), ids[order]), run((x, *rest), ids), strict=True):
        if DEVICE == "cuda" and fused(dtype):
            assert torch.equal(got, want[order])
        else:  # the interpreter multiplies by numpy, whose rows at the edge of a block are summed in another order
            tolerance = dict(rtol=2e-2, atol=1e-2) if truncates(dtype) else {}
            torch.testing.assert_close(got, want[order], **tolerance)


@pytest.mark.parametrize("V_N", [32, 16])
@pytest.mark.parametrize("M", [3, 10, 80])
def test_base_rows_are_the_unscaled_result(M, V_N, dtype):
    *rest, k_l, v_l = make(M, 32, V_N, 16, dtype)
    rest[0][0] = 0
    ids = torch.where(torch.arange(M, device=DEVICE) < M // 2, -1, 1)
    got = run((*rest, torch.full_like(k_l, NAN), torch.full_like(v_l, NAN)), ids)
    bare = run((*rest, torch.ones_like(k_l[0]), torch.ones_like(v_l[0])))
    for y, z in zip(got, bare, strict=True):
        assert_same(y[: M // 2], z[: M // 2], bitwise=True)
        assert y[M // 2 :].isnan().all()


def test_specials_propagate_as_in_torch(dtype):
    """NaN, both infinities, -0.0, the largest and the smallest number, in x and in the vectors."""
    info = torch.finfo(dtype)
    special = torch.tensor([NAN, INF, -INF, -0.0, info.max, info.smallest_normal / 2])
    for M, V_N in ((4, 32), (24, 32), (72, 32), (72, 16)):
        *rest, k_l, v_l = make(M, 32, V_N, 16, dtype, 2)
        rest[0][torch.arange(M), torch.arange(M) % 16] = special.repeat(M // 6 + 1)[:M].to(DEVICE, dtype)
        rest[1:3] = (w / 8 for w in rest[1:3])  # the largest number stays one
        for table in (k_l, v_l):
            table[0], table[1, :12] = 0.5, special.repeat(2).to(DEVICE)
        ids = torch.arange(M, device=DEVICE) // 8 % 3 - 1
        tensors = *rest, k_l.clamp(max=2), v_l.clamp(max=2)
        for y, want in zip(run(tensors, ids), expected(tensors, ids.tolist()), strict=True):
            assert want.isnan().any() and want.isinf().any()
            assert torch.equal(y.isnan(), want.isnan())
            assert torch.equal(y.isposinf(), want.isposinf()) and torch.equal(y.isneginf(), want.isneginf())


@any_dtype
@pytest.mark.parametrize("bad", BAD_IDS)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_bad_id(bad, ids_dtype, dtype):
    for shape in ((4, 33, 16, 16), (68, 32, 32, 16)):
        M = shape[0]
        *rest, k_memory, v_memory = make(*shape, dtype, 9)
        tensors = *rest, k_memory[3:6], v_memory[3:6]  # beside the tables stand numbers, which no row may get
        ids = torch.tensor([0, bad, -1, 2], dtype=ids_dtype, device=DEVICE).repeat_interleave(M // 4)
        if not KERNELS:
            message = rf"^ia3_kv_linear: task_ids must be in \[-1, 3\), got {bad} at position {M // 4}$"
            with pytest.raises(IndexError, match=message):
                run(tensors, ids)
            continue
        good = ids != bad
        for y, want in zip(run(tensors, ids), run(tensors, torch.where(good, ids, 0)), strict=True):
            assert y[~good].isnan().all() and torch.equal(y[good], want[good])


# sequences, rows of each, widths, K -> the kernel. Widths that are no multiple of a block; tiles of 2, 3 and many tasks
KERNELS_WITH_IDS = {
    "vector": (4, 1, 21, 5, 144, "kv vector"),
    "small": (4, 5, 33, 69, 24, "kv small"),
    "split": (4, 5, 80, 16, 1040, "kv split"),
    "dual two": (3, 130, 32, 32, 32, "dual two"),
    "dual runs": (4, 50, 32, 32, 32, "dual runs"),
    "unequal two": (3, 130, 32, 144, 32, "kv two"),
    "unequal runs": (90, 1, 144, 32, 32, "kv runs"),
}


@needs_kernels
@pytest.mark.parametrize("bad", [BAD_IDS[0], *BAD_IDS[3:]])
@pytest.mark.parametrize("case", KERNELS_WITH_IDS)
def test_bad_id_in_every_kernel(case, bad):
    """NaN in its own rows, written there; the other rows, and what stands around all results, stay right."""
    G, S, K_N, V_N, K, kernel = KERNELS_WITH_IDS[case]
    *rest, k_memory, v_memory = make(G * S, K_N, V_N, K, torch.float16, 9)
    tensors = *rest, k_memory[3:6], v_memory[3:6]
    ids = torch.tensor([0, bad, -1, 2], device=DEVICE).repeat(-(-G // 4))[:G]
    rows = ids.repeat_interleave(S)
    with launched() as kinds, guarded_allocations():
        got = ops.launch_kv(*tensors, ids, None, S)
    assert kinds == [kernel]
    good = rows != bad
    assert all(y[~good].isnan().all() for y in got)
    check([y[good] for y in got], (tensors[0][good], *tensors[1:]), rows[good].tolist())


def test_guards_stay_intact():
    generator = torch.Generator().manual_seed(2)

    def random(high, low=1):
        return int(torch.randint(low, high, (1,), generator=generator))

    for i in range(20 if INTERPRET else 200):
        unit, M = (1, 16, 16, 16)[i % 4], random(90, 65) if i % 4 == 3 else random(30)
        K_N, V_N, K, dtype, num_tasks = *(unit * random(64 // unit) for _ in range(3)), DTYPES[random(3, 0)], random(5)
        shapes = (M, K), (K_N, K), (V_N, K), (K_N,), (V_N,), (num_tasks, K_N), (num_tasks, V_N)
        tensors, buffers = zip(
            *(guarded(*s, dtype=torch.float32 if n > 4 else dtype) for n, s in enumerate(shapes)), strict=True
        )
        for t in tensors:
            t.uniform_(-1, 1)
        for y in run(tensors, ids_like("sorted", M, num_tasks)):
            assert y.isfinite().all(), "read outside a tensor"
        for buffer in buffers:
            assert_guards(buffer)


@any_dtype
@pytest.mark.parametrize(
    "shape",
    [(0, 16, 16, 16), (3, 0, 16, 16), (5, 16, 0, 16), (70, 0, 16, 16), (70, 16, 0, 16), (70, 0, 0, 16), (3, 0, 0, 16),
     (4, 16, 8, 0), (0, 0, 0, 0)],
    ids=lambda s: "M{}-K_N{}-V_N{}-K{}".format(*s),
)  # fmt: skip
def test_zero_sizes(shape, dtype):
    M, K_N, V_N, K = shape
    tensors, ids = make(*shape, dtype), ids_like("uniform", M, 3)
    for got in (run(tensors, ids), run([t.detach().requires_grad_() for t in tensors], ids)):
        assert [tuple(y.shape) for y in got] == [(M, K_N), (M, V_N)]
        check([y.detach() for y in got], tensors, ids.tolist()) if M else None
    dy = [torch.randn(M, N, device=DEVICE).to(dtype) for N in (K_N, V_N)]
    grads = gradients(lambda *t: run(t, ids), tensors, dy)
    assert all(g.shape == t.shape and g.isfinite().all() for g, t in zip(grads, tensors, strict=True))
    assert M or not any(g.any() for g in grads)


@any_dtype
def test_zero_sequences_and_zero_tokens(dtype):
    _, *rest = make(1, 16, 32, 16, dtype)
    for lead in ((0, 3), (2, 0), (2, 0, 3)):
        x = torch.randn(*lead, 16, device=DEVICE).to(dtype).requires_grad_()
        ids = torch.zeros(lead[0], dtype=torch.int64, device=DEVICE)
        for task_ids in (ids, plan_tasks(ids, 0, 3)):
            k, v = run((x, *rest), task_ids)
            assert k.shape == (*lead, 16) and v.shape == (*lead, 32)
            assert torch.autograd.grad((k, v), x, (torch.ones_like(k), torch.ones_like(v)))[0].shape == x.shape


@any_dtype
def test_tables_without_tasks_serve_the_base_model(dtype):
    for M in (3, 9, 66):
        *rest, k_l, v_l = make(M, 16, 32, 16, dtype)
        got = run((*rest, k_l[:0], v_l[:0]), torch.full((M,), -1, device=DEVICE))
        assert equal(got, run((*rest, torch.ones_like(k_l[0]), torch.ones_like(v_l[0]))))


@any_dtype
@pytest.mark.parametrize("w_layout", W_LAYOUTS)
@pytest.mark.parametrize("x_layout", X_LAYOUTS)
def test_layouts(x_layout, w_layout, dtype):
    """Whatever the strides, of one weight or of both: values, contiguous results, and the gradient of x."""
    for S in (17 if dtype == torch.float16 else 2,) if INTERPRET else (2, 17):
        x, *rest = make(4 * S, 48, 48, 32, dtype)
        x, rest[1] = X_LAYOUTS[x_layout](x.view(4, S, 32)), W_LAYOUTS[w_layout](rest[1])
        if x_layout == "permuted":
            rest[0] = W_LAYOUTS[w_layout](rest[0])
        ids = ids_like("uniform", 4, 3)
        leaf = x.detach().requires_grad_()
        out = run((leaf, *rest), ids)
        assert all(y.is_contiguous() for y in out)
        flat, rows = (x.reshape(4 * S, 32), *rest), ids.repeat_interleave(S).tolist()
        came = x, *(w.contiguous() if w_layout == "neither" else w for w in rest[:2]), *rest[2:]  # as F.linear gets it
        for y, side, fp64 in zip(out, sides(came), expected(doubled(*flat), rows), strict=True):
            z, scale = F.linear(*side[:3]), scales(side[3], ids.tolist(), torch.float32)[:, None]
            same = (z.float() * scale).to(dtype).view(4 * S, 48)
            assert_like_torch(y.detach().view(4 * S, 48), same, fp64, elementwise=True)
        dy = [torch.randn(4, S, 48, device=DEVICE).to(dtype) for _ in range(2)]
        dy[1] = dy[1].transpose(0, 1).contiguous().transpose(0, 1)
        (dx,) = torch.autograd.grad(out, leaf, dy)
        scaled = [(d.float() * scales(t, ids.tolist(), torch.float32)[:, None]).to(dtype)
                  for d, t in zip(dy, rest[4:], strict=True)]  # fmt: skip
        want = (scaled[0] @ rest[0]).reshape(4 * S, 32).addmm_(scaled[1].reshape(4 * S, 48), rest[1]).view(4, S, 32)
        if truncates(dtype):
            assert (dx.float() - want.float()).abs().max() <= 2**-5 * want.float().abs().max()
        else:
            torch.testing.assert_close(dx, want)


@any_dtype
@pytest.mark.parametrize("shape", [(3, 32, 16, 32), (6, 32, 16, 32), (68, 32, 32, 32), (68, 32, 16, 32)])
def test_bias_table_and_ids_strided(shape, dtype):
    """Read by their strides: views of something wider. Beside them stand other numbers."""
    tensors, ids = make(*shape, dtype), ids_like("sorted", shape[0], 3)
    want = run(tensors, ids)
    x, k_weight, v_weight, k_bias, v_bias, k_l, v_l = tensors
    assert equal(run((*tensors[:5], torch.cat([k_l + 1, k_l], 1)[:, 32:], v_l), ids), want)
    assert equal(run((*tensors[:5], k_l, torch.stack([v_l, v_l + 1], 1)[:, 0]), ids), want)
    assert equal(run((*tensors[:5], k_l.t().contiguous().t(), v_l), ids), want)
    k_bias, v_bias = (torch.stack([b, b + 1], 1)[:, 0] for b in (k_bias, v_bias))
    assert equal(run((x, k_weight, v_weight, k_bias, v_bias, k_l, v_l), ids), want)
    assert equal(run(tensors, torch.stack([ids, torch.full_like(ids, 9)], 1)[:, 0]), want)


GRADIENT_SHAPES = {"vector": (1, 48, 32, 144), "two": (7, 67, 33, 35), "dual": (80, 48, 48, 48), "kv": (66, 48, 32, 32)}


@pytest.mark.parametrize("shape", GRADIENT_SHAPES.values(), ids=GRADIENT_SHAPES)
def test_gradients(shape, dtype):
    M, K_N, V_N, _ = shape
    tensors = make(*shape, dtype, biases="v" if M == 80 else "kv")
    ids = ids_like("sorted" if INTERPRET and M > 64 else "uniform", M, 3)
    ids[0] = 1  # torch gives a table that no row reads no gradient at all
    dy = [torch.randn(M, N, device=DEVICE).to(dtype) for N in (K_N, V_N)]

    def torchs(*tensors):
        return expected(tensors, ids.tolist())

    got, same = gradients(lambda *t: run(t, ids), tensors, dy), gradients(torchs, tensors, dy)
    fp64 = gradients(torchs, doubled(*tensors), [d.double() for d in dy])
    for name, a, b, c, leaf in zip(NAMES, got, same, fp64, tensors, strict=True):
        if leaf is None:
            continue
        assert a.shape == leaf.shape and a.dtype == leaf.dtype, name
        if truncates(dtype):  # sums of truncated terms: every term is up to an ulp off, all in one direction
            assert (a.double() - c).abs().max() <= 2**-6 * c.abs().max() + 2**-7, name
        else:
            assert_like_torch(a, b, c)


@any_dtype
@pytest.mark.parametrize("used", [0, 1], ids=["k", "v"])
@pytest.mark.parametrize("M", [6, 70])
def test_gradients_of_one_output(M, used, dtype):
    """The other output has no gradient, not even zeros: what only it needs gets none, and x that of one ia3_linear."""
    tensors, ids = make(M, 32, 32, 16, dtype), ids_like("sorted", M, 3)
    dy = torch.randn(M, 32, device=DEVICE).to(dtype)
    leaves = [t.clone().requires_grad_() for t in tensors]
    got = torch.autograd.grad(run(leaves, ids)[used], leaves, dy, allow_unused=True)
    x, weight, bias, ia3_l = sides(tensors)[used]
    want = gradients(
        lambda x, w, b, v: ia3_linear(x, w, b, ia3_l=v, task_ids=ids), (x, weight, bias, ia3_l), dy
    )  # fmt: skip
    assert equal([got[0], *got[1 + used :: 2]], want)
    assert all(g is None for g in got[2 - used :: 2])


def test_gradcheck_in_fp64():
    for M, K_N, V_N, K, num_tasks in ((1, 3, 2, 2, 1), (5, 4, 3, 3, 2), (4, 1, 5, 2, 3)):
        tensors = [t.requires_grad_() for t in doubled(*make(M, K_N, V_N, K, num_tasks=num_tasks))]
        ids = ids_like("uniform", M, num_tasks)
        assert torch.autograd.gradcheck(lambda *t, ids=ids: run(t, ids), tensors, eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("M", [6, 66])
def test_gradient_only_where_asked(M):
    tensors, ids = make(M, 32, 16, 16), ids_like("sorted", M, 3)
    dy = [torch.randn(M, N, device=DEVICE) for N in (32, 16)]

    def f(*tensors):
        return run(tensors, ids)

    everything = gradients(f, tensors, dy)
    for asked in [1 << i for i in range(7)] + [0b1100000, 0b0000111, 0b1000010, 0b0011001, 0b0100100]:
        asked = [bool(asked & 1 << i) for i in range(7)]
        for got, want, wanted in zip(gradients(f, tensors, dy, asked), everything, asked, strict=True):
            assert (got is not None) == wanted and (not wanted or torch.equal(got, want))
    assert not any(y.requires_grad for y in f(*tensors))
    with torch.no_grad():
        assert not any(y.requires_grad for y in f(*(t.detach().requires_grad_() for t in tensors)))


@pytest.mark.parametrize("l_dtype", DTYPES, ids=name_of)
def test_gradient_has_the_vectors_dtype(l_dtype, dtype):
    tensors, ids = make(9, 24, 16, 16, dtype, l_dtype=l_dtype), ids_like("uniform", 9, 3)
    dy = [torch.randn(9, N, device=DEVICE).to(dtype) for N in (24, 16)]
    got = gradients(lambda *t: run(t, ids), tensors, dy)
    fp64 = gradients(lambda *t: expected(t, ids.tolist()), doubled(*tensors), [d.double() for d in dy])
    assert [t.dtype for t in got] == [dtype] * 5 + [l_dtype] * 2
    for a, c in zip(got[5:], fp64[5:], strict=True):
        torch.testing.assert_close(a.double(), c, rtol=3e-2, atol=3e-2)


# what needs a gradient -> what of the size of an activation is saved: nothing, x, zk, zv
SAVED = [
    ([], []), (["x"], []), (["x", "k_bias", "v_bias"], []), (["k_weight"], ["x"]), (["v_weight", "x"], ["x"]),
    (["k_ia3_l"], ["zk"]), (["v_ia3_l"], ["zv"]), (["k_ia3_l", "v_ia3_l"], ["zk", "zv"]), (NAMES, ["x", "zk", "zv"]),
]  # fmt: skip


@any_dtype
@pytest.mark.parametrize(("grad", "saved"), SAVED, ids=["+".join(g) or "nothing" for g, _ in SAVED])
@pytest.mark.parametrize("M", [50, 90])
def test_saved_for_backward(M, grad, saved, dtype, monkeypatch):
    """Also: z costs a write even if nobody keeps it, so the operator is asked for it only where a table trains."""
    K_N, V_N, K = 48, 16, 32
    tensors = dict(zip(NAMES, make(M, K_N, V_N, K, dtype), strict=True))
    for name in grad:
        tensors[name].requires_grad_()
    asked, op = [], ops._op
    monkeypatch.setattr(ops, "_op", lambda *args, **kwargs: asked.append(args[-1]) or op(*args, **kwargs))
    found, ids = [], ids_like("sorted", M, 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        k, v = run(tensors.values(), ids)
    with torch.no_grad():
        run(tensors.values(), ids)
    assert asked == ["zk" in saved or "zv" in saved, False]
    large = [t for t in found if t.dim() > 1 and t.shape[0] == M]
    assert sorted({K: "x", K_N: "zk", V_N: "zv"}[t.shape[1]] for t in large) == saved
    assert all(t.dtype == dtype for t in large), "an activation in another dtype"
    if grad:
        (k.sum() + v.sum()).backward()
    assert all((t.grad is not None) == (name in grad) for name, t in tensors.items())


def test_results_may_be_changed_in_place():
    for M in (6, 70):
        tensors, ids = make(M, 32, 16, 16), ids_like("sorted", M, 3)

        def f(*tensors, ids=ids):
            k, v = run(tensors, ids)
            return k.mul_(2), v.add_(1).mul_(4)

        dy = torch.randn(M, 32, device=DEVICE), torch.randn(M, 16, device=DEVICE)
        want = gradients(lambda *t, ids=ids: run(t, ids), tensors, (2 * dy[0], 4 * dy[1]))
        assert equal(gradients(f, tensors, dy), want)


@needs_kernels
@pytest.mark.parametrize("M", [3, 66])
def test_bad_id_has_nan_gradient_of_its_own_row_only(M):
    tensors = make(M, 16, 32, 16)
    ids = torch.tensor([1, 7, 1], device=DEVICE).repeat_interleave(M // 3)
    dy = torch.ones(M, 16, device=DEVICE), torch.ones(M, 32, device=DEVICE)
    dx, *_, dkl, dvl = gradients(lambda *t: run(t, ids), tensors, dy, [True] + [False] * 4 + [True] * 2)
    assert dx[ids == 7].isnan().all() and dx[ids == 1].isfinite().all()
    for dl in (dkl, dvl):
        assert dl.isfinite().all() and dl[1].any() and not dl[[0, 2]].any()


def test_repeats_are_bitwise_equal(dtype):
    for shape in ((3, 32, 16, 32), (9, 16, 32, 1024), (66, 16, 16, 16), (66, 16, 32, 16)):
        tensors, ids = make(*shape, dtype), ids_like("sorted", shape[0], 3)
        dy = [torch.randn(shape[0], N, device=DEVICE).to(dtype) for N in shape[1:3]]
        first, grads = run(tensors, ids), gradients(lambda *t, ids=ids: run(t, ids), tensors, dy)
        often = dtype == torch.float16 and shape[0] == 9
        for i in range(250 if DEVICE == "cuda" else 50 if often else 2):
            assert equal(run(tensors, ids), first)
            if DEVICE == "cuda" or i < 2:
                assert equal(gradients(lambda *t, ids=ids: run(t, ids), tensors, dy), grads)


def test_loss_scale_of_a_power_of_two_is_exact():
    for dtype in (torch.float32, torch.bfloat16):
        tensors, ids = make(9, 16, 32, 16, dtype), ids_like("uniform", 9, 3)
        dy = [torch.randn(9, N, device=DEVICE).to(dtype) for N in (16, 32)]
        scaled = gradients(lambda *t, ids=ids: run(t, ids), tensors, [d * 1024 for d in dy])
        assert equal(scaled, [g * 1024 for g in gradients(lambda *t, ids=ids: run(t, ids), tensors, dy)])


@settings(max_examples=20 if INTERPRET else 60, deadline=None, derandomize=True)
@given(
    st.integers(1, 90), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.booleans(),
    st.sampled_from(["", "k", "v", "kv"]), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.sampled_from(ID_KINDS),
    st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(M, K_N, V_N, K, num_tasks, aligned, biases, dtype, l_dtype, kind, seed):
    torch.manual_seed(seed)
    K_N, V_N, K = (-(-n // 16) * 16 if aligned else n for n in (K_N, V_N, K))
    tensors = make(M, K_N, V_N, K, dtype, num_tasks, biases=biases, l_dtype=l_dtype)
    ids = ids_like(kind, M, num_tasks)
    check(run(tensors, ids), tensors, ids.tolist())


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=name_of)
def test_autocast(cast):
    """x, weights and biases as F.linear casts them, the vectors never; gradients have the dtypes of the leaves."""
    x, k_weight, v_weight, k_bias, v_bias, k_l, v_l = tensors = make(7, 24, 16, 16)
    ids, dy = ids_like("uniform", 7, 3), [torch.randn(7, N, device=DEVICE).to(cast) for N in (24, 16)]

    def autocast(f):
        def inside(*tensors):
            with torch.autocast(DEVICE, cast):
                return f(*tensors)

        return inside

    ours = autocast(lambda *t: run(t, ids))
    torchs = autocast(
        lambda *t: tuple(
            (F.linear(x, w, b).float() * scales(v, ids.tolist(), torch.float32)).to(cast) for x, w, b, v in sides(t)
        )
    )
    for some in (
        tensors,
        (x.to(cast), k_weight, v_weight, None, v_bias, k_l, v_l),
        (x, k_weight.to(cast), v_weight, k_bias, None, k_l, v_l),
        (x.half(), k_weight, v_weight.to(cast), None, None, k_l, v_l),
    ):
        got = ours(*some)
        check(got, [None if t is None else t.to(cast) for t in some[:5]] + [k_l, v_l], ids.tolist())
        if not fused(cast):
            assert equal(got, torchs(*some))
        for a, c, leaf in zip(gradients(ours, some, dy), gradients(torchs, some, dy), some, strict=True):
            if leaf is not None:
                assert a.dtype == leaf.dtype
                torch.testing.assert_close(a, c, rtol=3e-2, atol=3e-2)
    assert all(y.dtype == torch.float64 for y in ours(*doubled(*tensors)))


OPCHECK_LAYOUTS = {
    "contiguous": lambda: torch.randn(4, 6, 16),
    "permuted": lambda: torch.randn(6, 4, 16).transpose(0, 1),
    "sliced": lambda: torch.randn(4, 12, 16)[:, ::2],
    "empty": lambda: torch.randn(4, 0, 16),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(
    "with_ids", [True] if INTERPRET else [False, True], ids=lambda ids: "ids" if ids else "one_task"
)
@pytest.mark.parametrize("layout", OPCHECK_LAYOUTS)
def test_opcheck(layout, with_ids, grad):
    _, *rest = make(1, 16, 32, 16, num_tasks=3 if with_ids else 1)
    x, *rest = (t.requires_grad_(grad) for t in (OPCHECK_LAYOUTS[layout]().to(DEVICE), *rest))
    ids = torch.tensor([0, 2, -1, 1], device=DEVICE) if with_ids else None
    torch.library.opcheck(torch.ops.peft_ops.ia3_kv_linear, (x, *rest, ids, None, 6 if with_ids else 1, grad))


def test_opcheck_with_a_plan_a_large_batch_and_frozen_tables():
    x, k_weight, v_weight, _, v_bias, k_l, v_l = make(130, 16, 16, 16)
    plan = plan_tasks(torch.tensor([0, 2], device=DEVICE), 130, 3)
    args = x.requires_grad_(), k_weight, v_weight.requires_grad_(), None, v_bias, k_l, v_l, plan.task_ids
    tensors = [plan.tiles, plan.run_index, plan.run_end]
    torch.library.opcheck(torch.ops.peft_ops.ia3_kv_linear, (*args, tensors, 65, False))


def test_operator_refuses_a_table_gradient_without_z():
    *rest, k_l, v_l = make(4, 16, 16, 16)
    for tables in ((k_l.requires_grad_(), v_l), (k_l.detach(), v_l.requires_grad_())):
        with pytest.raises(RuntimeError, match="^ia3_kv_linear: save must be True for a gradient of k_ia3_l or v_ia3"):
            torch.ops.peft_ops.ia3_kv_linear(*rest, *tables, ids_like("uniform", 4, 3), None, 1, False)


@pytest.mark.parametrize("selection", ["packed", "k alone"] if INTERPRET else ["ids", "plan", "packed", "k alone"])
def test_compiles_with_dynamic_batches(selection):
    def loss(*tensors):
        *tensors, ids = tensors
        rows, cu_seqlens = tensors[0].shape[0] * tensors[0].shape[1], None
        if selection == "packed":
            cu_seqlens = torch.arange(tensors[0].shape[0] + 1, device=DEVICE) * tensors[0].shape[1]
        if selection in ("plan", "packed"):
            ids = plan_tasks(ids, rows, 3, cu_seqlens=cu_seqlens)
        k, v = run(tensors, ids)
        return (k * 1.5).relu().sum() + (0 if selection == "k alone" else v.square().sum())

    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=frames, fullgraph=True, dynamic=True)
    _, *parameters = (t.requires_grad_() for t in make(1, 16, 32, 16))
    for B in (2, 3, 5, 20, 13):
        leaves = torch.randn(B, 4, 16, device=DEVICE, requires_grad=True), *parameters
        ids = ids_like("uniform", B, 3)
        want, got = loss(*leaves, ids), compiled(*leaves, ids)
        assert torch.equal(got, want)
        a, b = (torch.autograd.grad(y, leaves, allow_unused=True) for y in (got, want))
        for one, other in zip(a, b, strict=True):  # traced, an unused output may have zeros
            assert not one.any() if other is None and one is not None else one is other or torch.equal(one, other)
    assert frames.frame_count <= 2


def test_compiles_under_autocast_and_with_frozen_weights():
    x, *weights, k_l, v_l = make(6, 16, 32, 16)
    ids = ids_like("uniform", 6, 3)

    def f(x, k_l, v_l):
        with torch.autocast(DEVICE, torch.bfloat16):
            return run((x, *weights, k_l, v_l), ids)

    torch._dynamo.reset()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    leaves = [t.requires_grad_() for t in (x, k_l, v_l)]
    got, want = compiled(*leaves), f(*leaves)
    assert equal(got, want) and got[0].dtype == torch.bfloat16
    dy = [torch.randn_like(y) for y in want]
    assert equal(torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy))


@pytest.mark.parametrize("selection", ["ids", "plan"])
def test_exports_and_loads(selection, tmp_path):
    class KeyValue(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.k, self.v = torch.nn.Linear(16, 16), torch.nn.Linear(16, 32, bias=False)
            self.k_l, self.v_l = (torch.nn.Parameter(torch.randn(3, n)) for n in (16, 32))

        def forward(self, x, ids):
            ids = plan_tasks(ids, x.shape[0] * x.shape[1], 3) if selection == "plan" else ids
            return run((x, self.k.weight, self.v.weight, self.k.bias, None, self.k_l, self.v_l), ids)

    module, x = KeyValue().to(DEVICE), torch.randn(4, 5, 16, device=DEVICE)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        module, (x, ids_like("distinct", 4, 3)), dynamic_shapes={"x": {0: batch}, "ids": {0: batch}}
    )
    torch.export.save(program, tmp_path / "kv.pt2")
    loaded = torch.export.load(tmp_path / "kv.pt2").module()
    for B in (7, 30):
        x, ids = torch.randn(B, 5, 16, device=DEVICE), ids_like("uniform", B, 3)
        assert equal(loaded(x, ids), module(x, ids))


def test_functorch_goes_through_the_reference():
    x, *weights, k_l, v_l = tensors = make(6, 8, 5, 4)
    ids = ids_like("uniform", 6, 3)
    got = torch.func.grad(lambda k_l, v_l: sum(y.sum() for y in run((x, *weights, k_l, v_l), ids)), (0, 1))(k_l, v_l)
    dy = torch.ones(6, 8, device=DEVICE), torch.ones(6, 5, device=DEVICE)
    torch.testing.assert_close(list(got), gradients(lambda *t: run(t, ids), tensors, dy)[5:])
    rows = torch.vmap(lambda row: run((row, *weights, k_l[0], v_l[0])))(x)
    torch.testing.assert_close(rows, run((x, *weights, k_l[0], v_l[0])))
    per_sample = torch.vmap(
        torch.func.grad(lambda v, row: run((row, *weights, k_l[0], v))[1].sum()), (None, 0)
    )(v_l[0], x)  # fmt: skip
    torch.testing.assert_close(per_sample, F.linear(x, weights[1], weights[3]))


def test_higher_derivatives_refuse():
    tensors = make(3, 8, 4, 4, num_tasks=1)
    leaf = tensors[0].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="ia3_kv_linear: double backward is not supported"):
        torch.autograd.grad(run((leaf, *tensors[1:]))[0].square().sum(), leaf, create_graph=True)
    for i in range(7):
        with torch.autograd.forward_ad.dual_level():
            duals = [torch.autograd.forward_ad.make_dual(t, t) if i == j else t for j, t in enumerate(tensors)]
            with pytest.raises(NotImplementedError, match="ia3_kv_linear: forward-mode AD is not supported"):
                run(duals)


@any_dtype
@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_activation_checkpointing_is_bitwise(reentrant, dtype):
    for M in (9, 66):
        tensors, ids = make(M, 16, 32, 16, dtype), plan_tasks(ids_like("sorted", M, 3), M, 3)
        dy = [torch.randn(M, N, device=DEVICE).to(dtype) for N in (16, 32)]

        def recomputed(*tensors, ids=ids):
            return checkpoint(lambda *leaves: run(leaves, ids), *tensors, use_reentrant=reentrant)

        both = [[t.clone().requires_grad_() for t in tensors] for _ in range(2)]
        torch.autograd.backward(run(both[0], ids), dy)
        torch.autograd.backward(recomputed(*both[1]), dy)
        assert equal([t.grad for t in both[1]], [t.grad for t in both[0]])


def test_reference_backend_is_plain_torch(dtype):
    tensors, ids = make(6, 8, 5, 4, dtype), ids_like("uniform", 6, 3)
    for task_ids in (ids, plan_tasks(ids, 6, 3)):
        with peft_ops.set_backend("reference"):
            got = run(tensors, task_ids)
        for y, want in zip(got, expected(tensors, ids.tolist()), strict=True):
            assert_same(y, want, bitwise=True)
        *rest, k_l, v_l = tensors
        assert equal(got, reference.ia3_kv_linear(*rest, k_ia3_l=k_l, v_ia3_l=v_l, task_ids=ids))


@needs_kernels
@pytest.mark.parametrize("V_N", [16, 32], ids=["dual", "unequal"])
def test_callers_allocator_is_untouched(V_N):
    allocation = pytest.importorskip("triton.runtime._allocation")
    before = allocation._allocator.get()
    with launched() as kinds:
        run(make(66, 16, V_N, 16, torch.float16, 1))
    assert kinds == ["dual one" if V_N == 16 else "kv one"] and allocation._allocator.get() is before


GOOD = dict(
    x=torch.zeros(4, 3, 8), k_weight=torch.zeros(6, 8), v_weight=torch.zeros(5, 8), k_bias=torch.zeros(6),
    v_bias=torch.zeros(5), k_ia3_l=torch.ones(2, 6), v_ia3_l=torch.ones(2, 5),
    task_ids=torch.zeros(4, dtype=torch.int64),
)  # fmt: skip
# the argument and what it is instead -> error and message
BAD_INPUT = {
    "x no tensor": ("x", [1.0], TypeError, "x must be a tensor, got list"),
    "x integer": ("x", GOOD["x"].int(), TypeError, "x must have dtype float32, .* got int32"),
    "x scalar": ("x", torch.tensor(1.0), ValueError, r"x must have 8 features, as k_weight \[6, 8\] .* got shape \[\]"),
    "x features": ("x", GOOD["x"][..., :7], ValueError, r"x must have 8 features, .* got shape \[4, 3, 7\]"),
    "x of another dtype": ("x", GOOD["x"].half(), TypeError, "k_weight must have dtype float16, got float32"),
    "k_weight no tensor": ("k_weight", None, TypeError, "k_weight must be a tensor, got NoneType"),
    "k_weight dtype": ("k_weight", GOOD["k_weight"].half(), TypeError, "k_weight must have dtype float32, got float16"),
    "v_weight rank": ("v_weight", torch.zeros(8), ValueError, r"v_weight must have 2 dimensions, got shape \[8\]"),
    "v_weight as for Conv1D": (
        "v_weight", GOOD["v_weight"].t(), ValueError,
        r"x must have 5 features, as v_weight \[8, 5\] takes, got shape \[4, 3, 8\]",
    ),
    "v_weight elsewhere": (
        "v_weight", GOOD["v_weight"].to("meta"), ValueError, "v_weight must be on cpu, as the other .* got meta"
    ),
    "k_bias no tensor": ("k_bias", 1.0, TypeError, "k_bias must be a tensor, got float"),
    "k_bias shape": ("k_bias", GOOD["v_bias"], ValueError, r"k_bias must have shape \[6\], got \[5\]"),
    "v_bias rank": ("v_bias", GOOD["v_bias"][None], ValueError, r"v_bias must have 1 dimension, got shape \[1, 5\]"),
    "v_bias dtype": ("v_bias", GOOD["v_bias"].double(), TypeError, "v_bias must have dtype float32, got float64"),
    "k_ia3_l no tensor": ("k_ia3_l", None, TypeError, "k_ia3_l must be a tensor, got NoneType"),
    "k_ia3_l integer": ("k_ia3_l", torch.ones(2, 6).long(), TypeError, "k_ia3_l must have dtype .* got int64"),
    "k_ia3_l of the values": (
        "k_ia3_l", GOOD["v_ia3_l"], ValueError, r"k_ia3_l must have shape \[6\] or \[num_tasks, 6\], got \[2, 5\]"
    ),
    "v_ia3_l of PEFT's shape": (
        "v_ia3_l", torch.ones(5, 1), ValueError, r"v_ia3_l must have shape \[5\] or \[num_tasks, 5\], got \[5, 1\]"
    ),
    "v_ia3_l fp64": ("v_ia3_l", torch.ones(2, 5).double(), TypeError, "v_ia3_l must have dtype .* got float64"),
    "v_ia3_l elsewhere": ("v_ia3_l", torch.ones(2, 5).to("meta"), ValueError, "v_ia3_l must be on cpu, .* got meta"),
    "v_ia3_l of more tasks": (
        "v_ia3_l", torch.ones(3, 5), ValueError, r"v_ia3_l must hold 2 tasks as k_ia3_l does, got shape \[3, 5\]"
    ),
    "v_ia3_l of one task": (
        "v_ia3_l", torch.ones(5), ValueError, r"v_ia3_l must hold 2 tasks as k_ia3_l does, got shape \[1, 5\]"
    ),
    "no ids for two tasks": (
        "task_ids", None, ValueError, "task_ids must be given, because k_ia3_l holds 2 tasks, got None"
    ),
    "ids no tensor": ("task_ids", [0] * 4, TypeError, "task_ids must be a tensor, got list"),
    "ids float": ("task_ids", torch.zeros(4), TypeError, "task_ids must have dtype int32, int64, got float32"),
    "ids do not divide": (
        "task_ids", GOOD["task_ids"][:3], ValueError, r"task_ids must have a shape that starts \[4, 3\], .* got \[3\]"
    ),
    "ids elsewhere": ("task_ids", GOOD["task_ids"].to("meta"), ValueError, "task_ids must be on cpu, .* got meta"),
    "plan for other rows": (
        "task_ids", plan_tasks(GOOD["task_ids"], 4, 2), ValueError, "task_ids must be a plan for 12 rows, got one for 4"
    ),
    "plan for other tasks": (
        "task_ids", plan_tasks(GOOD["task_ids"], 12, 3), ValueError,
        "task_ids must be a plan for 2 tasks, got one for 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case):
    name, value, error, match = BAD_INPUT[case]
    ia3_kv_linear(**GOOD)
    with pytest.raises(error, match=f"^ia3_kv_linear: {match}"):
        ia3_kv_linear(**{**GOOD, name: value})


def test_checks_hold_on_fake_cuda_tensors():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        good = {name: torch.empty(t.shape, dtype=t.dtype, device="cuda") for name, t in GOOD.items()}
        for task_ids in (good["task_ids"], plan_tasks(good["task_ids"], 12, 2)):
            k, v = ia3_kv_linear(**{**good, "task_ids": task_ids})
            assert k.shape == (4, 3, 6) and v.shape == (4, 3, 5) and {k.device.type, v.device.type} == {"cuda"}
        for name, value, match in (
            ("task_ids", plan_tasks(good["task_ids"], 4, 2), "got one for 4"),
            ("v_weight", torch.empty(5, 8), "v_weight must be on cuda:0, as the other arguments are, got cpu"),
            ("v_ia3_l", torch.empty(3, 5, device="cuda"), r"v_ia3_l must hold 2 tasks .* got shape \[3, 5\]"),
        ):
            with pytest.raises(ValueError, match=match):
                ia3_kv_linear(**{**good, name: value})


def test_shapes_on_the_meta_device():
    k, v = run([t.to("meta") for t in make(4, 6, 5, 8, num_tasks=1)])
    assert k.shape == (4, 6) and v.shape == (4, 5)
