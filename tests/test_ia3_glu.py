"""ia3_glu and ia3_glu_linear: values and gradients against torch and fp64, task selection, layouts, tracing, bad input.

Most tests run for both operators, and where kernels run for the persistent matmul too: see `kind`.
"""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import peft_ops
from peft_ops import ia3_glu, ia3_glu_linear, plan_tasks, reference
from peft_ops.ops import ia3_glu as ops
from tests.conftest import (
    DEVICE,
    DTYPES,
    ID_KINDS,
    INTERPRET,
    KERNELS,
    assert_as_good_as_torch,
    assert_guards,
    assert_same,
    guarded,
    ids_like,
    launches,
    name_of,
    truncates,
)
from tests.test_ia3_linear import ACTIVATIONS, BAD_IDS, TILES, assert_like_torch, doubled, gradients, scales, selections

pytestmark = pytest.mark.kernels

NAN, INF = float("nan"), float("inf")
BIASES = {"none": (False, False), "gate": (True, False), "up": (False, True), "both": (True, True)}


@pytest.fixture(params=["glu", "linear", "large"] if KERNELS else ["glu", "linear"])
def kind(request, monkeypatch):
    """The elementwise operator, the matmul, and the matmul with its persistent kernel from 65 rows on, not from 1025.

    Elsewhere than in kernels the two matmuls are one.
    """
    if request.param == "large":
        monkeypatch.setattr(ops.tiles, "linear_is_small", lambda M, N, capability: M <= 64)
    return request.param


# what strides, ids and autograd do, no dtype changes
one_dtype = pytest.mark.parametrize("dtype", [torch.float16], ids=name_of)
matmuls = pytest.mark.parametrize("kind", ["linear", "large"] if KERNELS else ["linear"], indirect=True)
persistent = pytest.mark.parametrize("kind", ["large"], indirect=True)


def rows_of(kind, few):
    """A number of rows that reaches the kernel meant: `few`, or just more than 64."""
    return 66 if kind == "large" else few


def make(kind, M, N, K, dtype=torch.float32, num_tasks=3, *, biases="both", l_dtype=torch.float32):
    """gate, up, ia3_l, or x, the two weights, the two biases, ia3_l: the outputs are of order one."""
    ia3_l = torch.randn(num_tasks, N, device=DEVICE).to(l_dtype)
    if kind == "glu":
        return [*(torch.randn(M, N, device=DEVICE).to(dtype) for _ in range(2)), ia3_l]
    x, *weights = torch.randn(M, K, device=DEVICE), *(torch.randn(N, K, device=DEVICE) for _ in range(2))
    bias = [torch.randn(N, device=DEVICE).to(dtype) if there else None for there in BIASES[biases]]
    return [x.to(dtype), *((w / max(K, 1) ** 0.5).to(dtype) for w in weights), *bias, ia3_l]


def call(tensors, ids=None, activation="silu", module=peft_ops):
    """The operator that takes so many tensors."""
    if len(tensors) == 3:
        return module.ia3_glu(*tensors, ids, activation)
    return module.ia3_glu_linear(*tensors[:5], ia3_l=tensors[5], task_ids=ids, activation=activation)


def expected(tensors, rows, activation="silu"):
    """The specification as torch computes it in the tensors' dtype: PEFT's arithmetic, one vector per row."""
    gate, up, ia3_l = tensors if len(tensors) == 3 else layers(tensors)
    dtype = torch.float64 if gate.dtype == torch.float64 else torch.float32
    return ((ACTIVATIONS[activation](gate) * up).to(dtype) * scales(ia3_l, rows, dtype)).to(gate.dtype)


def layers(tensors):
    """gate, up and ia3_l of the six tensors, by torch's own layers."""
    x, gate_weight, up_weight, gate_bias, up_bias, ia3_l = tensors
    return F.linear(x, gate_weight, gate_bias), F.linear(x, up_weight, up_bias), ia3_l


def check(got, tensors, rows, activation="silu", called=None):
    """The fp64 rule; a matmul that no kernel fuses is torch's two layers and the elementwise operator, bit by bit.

    tensors: rows as a matrix. called: as the operator got them, whose strides and batches show in F.linear's bits.
    """
    rows = [0] * tensors[0].shape[0] if rows is None else rows
    assert got.dtype == tensors[0].dtype and got.is_contiguous()
    called = tensors if called is None else called
    contiguous = all(w.is_contiguous() for w in called[1:3])
    if len(tensors) == 6 and not (contiguous and ops.is_fused("ia3_glu_linear", *tensors[:3])):
        gate, up, ia3_l = layers(called)
        gate, up, ids = *(t.reshape(len(rows), -1) for t in (gate, up)), torch.tensor(rows, device=DEVICE)
        assert_same(got, ia3_glu(gate, up, ia3_l[None] if ia3_l.dim() == 1 else ia3_l, ids, activation), bitwise=True)
        return
    same, fp64 = expected(tensors, rows, activation), expected(doubled(*tensors), rows, activation)
    assert_like_torch(got, same, fp64, elementwise=True)


def launched(seen):
    """Kernel, its way to select tasks or parts of K, of each forward launch."""
    return [
        ("large", kwargs["TASKS"]) if name.startswith("dual") else ("small", kwargs["SPLIT"])
        for name, kwargs in seen
        if "linear" in name
    ]


GLU_SHAPES = [(1, 64), (17, 33), (9, 1025), (130, 70)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", GLU_SHAPES, ids=lambda s: f"M{s[0]}-N{s[1]}")
def test_forward(shape, activation, dtype):
    tensors = make("glu", *shape, 0, dtype)
    ids = ids_like("uniform", shape[0], 3)
    got = call(tensors, ids, activation)
    check(got, tensors, ids.tolist(), activation)
    same, fp64 = (expected(t, ids.tolist(), activation) for t in (tensors, doubled(*tensors)))
    if dtype != torch.float32:  # fp32: the rms of another exp and erf, which `check` allows
        assert_as_good_as_torch(got, same, fp64, elementwise=activation != "gelu")


# rows, features of the output, reduced features: one row, odd, aligned with and without a remainder, several tiles
SHAPES = [(1, 257, 32), (7, 67, 7), (17, 33, 31), (64, 40, 24), (33, 48, 80), (70, 80, 64), (129, 24, 72)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"M{s[0]}-N{s[1]}-K{s[2]}")
def test_forward_linear(shape, dtype):
    for i, biases in enumerate(BIASES if shape[0] == 7 else [list(BIASES)[shape[0] % 4]]):
        tensors, activation = make("linear", *shape, dtype, biases=biases), list(ACTIVATIONS)[(shape[0] + i) % 5]
        ids = ids_like("uniform", shape[0], 3)
        check(call(tensors, ids, activation), tensors, ids.tolist(), activation)


# the launch parameters of two GPUs: BLOCK_M 128, a tile of the plan, and 64, half of one
CAPABILITIES = [(case, 90) for case in TILES] + [(c, 86) for c in ("one", "two of 150", "three of 171", "five of 31")]


@pytest.mark.skipif(not KERNELS, reason="without kernels there are no tiles")
@pytest.mark.parametrize("dtype", [torch.float32 if INTERPRET else torch.float16], ids=name_of)
@pytest.mark.parametrize(("case", "capability"), CAPABILITIES if INTERPRET else [(case, None) for case in TILES])
@persistent
def test_tasks_of_a_tile(kind, case, capability, dtype, monkeypatch):
    """Every way the persistent kernel applies scales: in fp32 the product of the unscaled result, bit by bit."""
    if capability is not None:
        monkeypatch.setattr(ops, "capability_of", lambda x: (capability, 2))
    G, S, mode = TILES[case]
    M, num_tasks = (G or 1) * S, 1 if G is None else 5
    biases, activation = list(BIASES)[S % 4], list(ACTIVATIONS)[S % 5]
    tensors = make("large", M, 32, 16, dtype, num_tasks, biases=biases)
    ids = None if G is None else torch.tensor([4, -1, 0, 3, 1], device=DEVICE)[torch.randperm(G, device=DEVICE) % 5]
    rows = None if G is None else ids.repeat_interleave(S).tolist()
    plan = None if G is None else plan_tasks(ids, M, num_tasks)
    shaped = tensors if G is None else [tensors[0].view(G, S, 16), *tensors[1:]]
    with launches(ops.dual) as seen:
        y = call(shaped, ids, activation).view(M, 32)
        same = call(tensors, plan, activation)
    assert launched(seen) == [("large", mode)] * 2
    check(y, tensors, rows, activation)
    assert torch.equal(y, same)
    if dtype == torch.float32 and rows is not None:
        bare = call([*tensors[:5], torch.ones(32, device=DEVICE)], None, activation)
        assert torch.equal(y, bare * scales(tensors[5], rows, dtype))


@one_dtype
@matmuls
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_bias(kind, activation, dtype):
    M = rows_of(kind, 20)
    for biases in BIASES if activation == "silu" else ("both",):
        tensors, ids = make(kind, M, 80, 48, dtype, biases=biases), ids_like("sorted", M, 3)
        check(call(tensors, ids, activation), tensors, ids.tolist(), activation)


@one_dtype
def test_packed_sequences_around_the_tile(kind, dtype):
    """Sequences of 127, 128, 129, 1 and 0 rows one after another: tiles with one, two and three tasks, by a plan."""
    lengths = torch.tensor([127, 1, 0, 129, 2, 40], device=DEVICE)
    M, ids = int(lengths.sum()), torch.tensor([1, 0, 3, 2, -1, 3], device=DEVICE)
    tensors = make(kind, M, 16, 16, dtype, 4)
    plan = plan_tasks(ids, M, 4, cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)))
    check(call(tensors, plan), tensors, ids.repeat_interleave(lengths).tolist())


@pytest.mark.skipif(not KERNELS, reason="groups of tiles are a question where kernels run")
@persistent
def test_more_tiles_than_one_group(kind):
    """Eight row tiles form a group, that reuses the weights; here are nine, and two columns of tiles."""
    tensors = make("large", 1100, 80, 16, torch.float16, 1)
    check(call(tensors), tensors, None)


@one_dtype
@pytest.mark.parametrize("selection", ["one", "sequence", "token", "beams", "plan", "token plan", "packed"])
def test_every_way_to_select_tasks(kind, selection, dtype):
    B, S, N, K = 4, 18 if kind == "large" else 3, 32, 16
    for ids_dtype in (torch.int32, torch.int64) if selection in ("sequence", "packed") else (torch.int64,):
        tensors = make(kind, B * S, N, K, dtype, 1 if selection == "one" else 4)
        options = selections(B, S, 4, ids_dtype)
        ids, rows = options[selection]
        batched = [t if t is None or t.shape[0] != B * S else t.view(B, S, -1) for t in tensors]
        y = call(batched, ids)
        assert y.shape == (B, S, N)
        check(y.view(-1, N), tensors, rows, called=batched)
        of = {"plan": "sequence", "token plan": "token"}.get(selection)
        assert of is None or torch.equal(y, call(batched, options[of][0]))


@one_dtype
def test_plan_gives_the_gradients_of_ids(kind, dtype):
    M = rows_of(kind, 12)
    tensors = make(kind, M, 32, 16, dtype)
    ids, dy = ids_like("sorted", M, 3), torch.randn(M, 32, device=DEVICE).to(dtype)
    got, want = (gradients(lambda *t, by=by: call(t, by), tensors, dy) for by in (plan_tasks(ids, M, 3), ids))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@one_dtype
@pytest.mark.parametrize("l_dtype", DTYPES, ids=name_of)
def test_vector_of_any_dtype(kind, l_dtype, dtype):
    M = rows_of(kind, 9)
    tensors = make(kind, M, 32, 16, dtype, l_dtype=l_dtype)
    ids, dy = ids_like("sorted", M, 3), torch.randn(M, 32, device=DEVICE).to(dtype)
    check(call(tensors, ids), tensors, ids.tolist())
    got = gradients(lambda *t: call(t, ids), tensors, dy)
    fp64 = gradients(lambda *t: expected(t, ids.tolist()), doubled(*tensors), dy.double())
    assert [t.dtype for t in got] == [t.dtype for t in tensors]
    torch.testing.assert_close(got[-1].double(), fp64[-1], rtol=3e-2, atol=6e-2)


@one_dtype
def test_one_task_needs_no_ids(kind, dtype):
    M = rows_of(kind, 9)
    tensors = make(kind, M, 32, 16, dtype, 1)
    want = call(tensors, torch.zeros(M, dtype=torch.int64, device=DEVICE))
    *others, ia3_l = tensors
    assert torch.equal(call(tensors), want) and torch.equal(call([*others, ia3_l[0]]), want)
    single = [t[0] if t is not None and t.shape[0] == M else t for t in others]
    alone = [t[:1] if t is not None and t.shape[0] == M else t for t in others]
    y = call([*single, ia3_l[0]])
    assert y.shape == (32,)
    check(y[None], [*alone, ia3_l], None, called=[*single, ia3_l])


# M, N, K, elements before x -> kernel and parts of K, as the launch parameters of sm_90 say
WHICH = [
    (1, 32, 32, 0, ("small", 1)),
    (16, 64, 512, 0, ("small", 2)),
    (16, 64, 528, 0, ("small", 2)),
    (16, 64, 1024, 0, ("small", 4)),
    (20, 64, 1024, 0, ("small", 2)),
    (64, 48, 32, 0, ("small", 1)),
    (65, 48, 32, 0, ("large", "runs")),
    (65, 41, 32, 0, ("small", 1)),
    (65, 48, 24, 0, ("small", 1)),
    (65, 48, 32, 1, ("small", 1)),
]


@one_dtype
@pytest.mark.skipif(not INTERPRET, reason="the launch parameters of another GPU may split otherwise")
@persistent
@pytest.mark.parametrize(("M", "N", "K", "offset", "kernel"), WHICH)
def test_which_kernel_runs_in_one_launch(M, N, K, offset, kernel, kind, dtype):
    _, *others = make("linear", M, N, K, dtype)
    x, ids = torch.randn(M * K + offset, device=DEVICE).to(dtype)[offset:].view(M, K), ids_like("sorted", M, 3)
    with launches(ops.kernels) as small, launches(ops.dual) as large:
        y = call([x, *others], ids)
    assert launched(small + large) == [kernel] and len(small + large) == 1
    check(y, [x, *others], ids.tolist())


@one_dtype
@pytest.mark.skipif(not KERNELS, reason="which kernel runs is a question where kernels run")
def test_elementwise_is_one_launch(dtype):
    tensors = make("glu", 6, 20, 0, dtype)
    with launches(ops.kernels) as seen:
        call(tensors, ids_like("uniform", 6, 3))
    assert [name for name, _ in seen] == ["ia3_glu_fwd_kernel"]
    leaves = [t.requires_grad_() for t in tensors]
    y = call(leaves, ids_like("uniform", 6, 3))
    with launches(ops.kernels) as seen:
        y.sum().backward()
    assert [name for name, _ in seen] == ["ia3_glu_bwd_kernel"]


@pytest.mark.skipif(not KERNELS, reason="K is split where kernels run")
@pytest.mark.parametrize(("M", "K"), [(1, 1000), (20, 512)])
def test_split_k(M, K, monkeypatch):
    """Parts of K meet in a fixed order: run to run the same bits, whatever stands in other rows; counters end zero."""
    dtype, N = torch.float16, 72
    tile = ops.tiles.glu_linear_small(M, N, K, 90)
    monkeypatch.setattr(ops.tiles, "glu_linear_small", lambda *args, **flags: tile | dict(SPLIT=4, BLOCK_K=64))
    made, workspace = [], ops.split_workspace
    monkeypatch.setattr(ops, "split_workspace", lambda *args: made.append(workspace(*args)) or made[-1])
    tensors, ids, dy = make("linear", M, N, K, dtype, 4), ids_like("distinct", M, 4), torch.randn(M, N, device=DEVICE)
    y, got = call(tensors, ids), gradients(lambda *t: call(t, ids), tensors, dy.to(dtype))
    check(y, tensors, ids.tolist())
    check_gradients(got, tensors, ids.tolist(), dy.to(dtype))  # g and u are stored by the last part too
    for _ in range(3 if INTERPRET else 250):
        assert torch.equal(call(tensors, ids), y)
    row = M // 2
    others = torch.arange(M, device=DEVICE) != row
    tensors[0][others], ids[others] = NAN, (ids[others] + 1) % 4
    assert torch.equal(call(tensors, ids)[row], y[row])
    assert made and all(part.shape == (4, 2 * M, N) and not count.any() for part, count in made)


def check_gradients(got, tensors, rows, dy, activation="silu"):
    same = gradients(lambda *t: expected(t, rows, activation), tensors, dy)
    fp64 = gradients(lambda *t: expected(t, rows, activation), doubled(*tensors), dy.double())
    for i, (a, b, c, leaf) in enumerate(zip(got, same, fp64, tensors, strict=True)):
        if leaf is None:
            assert a is None
            continue
        assert a.shape == leaf.shape and a.dtype == leaf.dtype and torch.equal(a.isnan(), c.isnan()), i
        if truncates(dy.dtype):  # sums of truncated terms: every term is up to an ulp off, all in one direction
            assert (a.double() - c).abs().max() <= 2**-6 * c.abs().max() + 2**-7, i
        else:
            assert_like_torch(a, b, c)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(kind, activation, dtype):
    M, (N, K) = rows_of(kind, 9), (128, 16) if kind == "large" else (131, 19)
    tensors = make(kind, M, N, K, dtype, biases="gate" if activation == "relu" else "both")
    ids, dy = ids_like("sorted", M, 3), torch.randn(M, N, device=DEVICE).to(dtype)
    got = gradients(lambda *t: call(t, ids, activation), tensors, dy)
    check_gradients(got, tensors, ids.tolist(), dy, activation)


def test_gradcheck_in_fp64():
    for activation in ACTIVATIONS:
        for which, M, N, K, num_tasks in (("glu", 5, 4, 0, 2), ("linear", 1, 3, 2, 1), ("linear", 5, 4, 3, 2)):
            tensors = [t.requires_grad_() for t in doubled(*make(which, M, N, K, num_tasks=num_tasks))]
            ids = ids_like("uniform", M, num_tasks)
            assert torch.autograd.gradcheck(
                lambda *t, ids=ids, activation=activation: call(t, ids, activation), tensors, eps=1e-6, atol=1e-5
            )


@one_dtype
def test_gradient_only_where_asked(kind, dtype):
    M = rows_of(kind, 6)
    tensors = make(kind, M, 32, 16, dtype)
    ids, dy, n = ids_like("sorted", M, 3), torch.randn(M, 32, device=DEVICE).to(dtype), len(tensors)

    def f(*t):
        return call(t, ids)

    everything = gradients(f, tensors, dy)
    masks = [1 << i for i in range(n)] + [2**n - 1 - (1 << i) for i in range(n if kind != "large" else 0)]
    for asked in ([bool(mask & 1 << i) for i in range(n)] for mask in masks):
        for got, want, wanted in zip(gradients(f, tensors, dy, asked), everything, asked, strict=True):
            assert (got is not None) == wanted and (not wanted or torch.equal(got, want))
    assert not f(*tensors).requires_grad
    with torch.no_grad():
        assert not f(*(t.detach().requires_grad_() for t in tensors)).requires_grad


@matmuls
# what needs a gradient, of x, the gate's and the up weight, the gate's and the up bias and ia3_l -> whether x is saved
@one_dtype
@pytest.mark.parametrize(("grad", "saves_x"), [("x", 0), ("w", 1), ("v", 1), ("b", 0), ("c", 0), ("l", 0), ("xwl", 1)])
def test_saved_for_backward(kind, grad, saves_x, dtype):
    M, N, K = rows_of(kind, 40), 32, 16
    tensors = dict(zip("xwvbcl", make(kind, M, N, K, dtype), strict=True))
    for name in grad:
        tensors[name].requires_grad_()
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        y = call(list(tensors.values()), ids_like("sorted", M, 3))
    large = [t for t in found if t.dim() > 1 and t.shape[0] == M]
    assert sorted(t.shape[1] for t in large) == [K] * saves_x + [N, N] and all(t.dtype == dtype for t in large)
    y.sum().backward()
    assert all((t.grad is not None) == (name in grad) for name, t in tensors.items())


def test_pre_activations_are_written_only_where_they_are_saved(monkeypatch):
    asked, op = [], ops._glu_linear_op
    monkeypatch.setattr(ops, "_glu_linear_op", lambda *args, **kw: asked.append(args[-1]) or op(*args, **kw))
    for grad in range(6):
        tensors = make("linear", 6, 8, 4, num_tasks=1)
        call(tensors)
        tensors[grad].requires_grad_()
        for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
            with context:
                call(tensors)
    assert asked == [False, True, False, False] * 6
    with pytest.raises(RuntimeError, match="^ia3_glu_linear: save must be True where a gradient is needed, got False"):
        torch.ops.peft_ops.ia3_glu_linear(*tensors, None, None, 1, "silu", False)


def test_dl_does_not_depend_on_other_tasks(dtype):
    """Rows of task 1 keep their order; how many rows of others stand between, and what they hold, changes."""
    N, mine = 32, 300  # whole vectors: the last few elements of a tensor meet another exp of aten's
    values = [torch.randn(mine, N, device=DEVICE).to(dtype) for _ in range(3)]
    seen = []
    for others in (0, 5, 400):
        M = mine + others
        at = torch.randperm(M, device=DEVICE)[:mine].sort().values
        ids = ids_like("uniform", M, 4)
        ids[ids == 1] = 2
        ids[at] = 1
        gate, up, dy = (torch.randn(M, N, device=DEVICE).to(dtype) for _ in range(3))
        for t, value in zip((gate, up, dy), values, strict=True):
            t[at] = value
        if others:
            gate[ids == 2], up[ids == -1], dy[ids == 3] = NAN, NAN, INF  # a neighbour's overflow stays his own
        ia3_l = torch.ones(4, N, device=DEVICE, requires_grad=True)
        seen.append(torch.autograd.grad(ia3_glu(gate, up, ia3_l, ids), ia3_l, dy)[0][1])
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    assert seen[0].isfinite().all()


@one_dtype
def test_gradients_of_one_task_do_not_depend_on_others(kind, dtype):
    M = rows_of(kind, 12)
    tensors = make(kind, M, 32, 16, dtype)
    ids, dy = ids_like("sorted", M, 3), torch.randn(M, 32, device=DEVICE).to(dtype)
    ids[: M // 2] = ids[: M // 2].clamp(max=0)
    ids[M // 2 :] = 1
    rows = 2 if kind == "glu" else 1

    def row_gradients():
        grads = gradients(lambda *t: call(t, ids), tensors, dy, [i < rows for i in range(len(tensors) - 1)] + [True])
        return [t[ids == 1] for t in grads[:rows]] + [grads[-1][1]]

    before = row_gradients()
    for t in tensors[:rows]:
        t[ids != 1] = NAN
    dy[ids != 1], tensors[-1][0] = INF, NAN
    after = row_gradients()
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(after, before, strict=True))


@one_dtype
def test_vector_of_zero_or_negative(kind, dtype):
    """dl comes from what was saved, never from h / l."""
    M = rows_of(kind, 6)
    tensors = make(kind, M, 32, 16, dtype, 2)
    tensors[-1][0], tensors[-1][1] = 0, -tensors[-1][1].abs()
    ids, dy = ids_like("sorted", M, 2).clamp(min=0), torch.randn(M, 32, device=DEVICE).to(dtype)
    got = gradients(lambda *t: call(t, ids), tensors, dy)
    ones = [*tensors[:-1], torch.ones_like(tensors[-1])]
    assert torch.equal(got[-1], gradients(lambda *t: call(t, ids), ones, dy)[-1])
    assert not got[0][ids == 0].any() and not call(tensors, ids)[ids == 0].any()


@one_dtype
def test_mixed_batch_equals_each_task_alone(kind, dtype):
    M = rows_of(kind, 40)
    for num_tasks in (1, 8, 64):
        tensors = make(kind, M, 32, 16, dtype, num_tasks)
        ids = ids_like("sorted" if kind == "large" else "uniform", M, num_tasks)
        if kind == "large" and num_tasks == 64:
            ids = torch.tensor([63, -1, 17], device=DEVICE).repeat_interleave(22)
        mixed = call(tensors, ids)
        for t in list(set(ids.tolist()))[:2]:
            assert torch.equal(mixed[ids == t], call(tensors, torch.full_like(ids, t))[ids == t])
            vector = tensors[-1][t] if t >= 0 else torch.ones_like(tensors[-1][0])
            assert torch.equal(mixed[ids == t], call([*tensors[:-1], vector])[ids == t])


@one_dtype
def test_rows_are_independent(kind, dtype):
    """Other rows get other ids, NaN and Inf, and their tasks NaN and Inf in the vectors: this row stays, bit by bit."""
    generator = torch.Generator().manual_seed(1)

    def random(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    for _ in range(3 if INTERPRET else 20):
        M, N, K = (random(65, 90), 32, 16) if kind == "large" else (random(2, 40), random(1, 40), random(1, 40))
        tensors, row, ids = make(kind, M, N, K, dtype, 4), random(0, M), ids_like("sorted", M, 4)
        before = call(tensors, ids)[row].clone()
        others, mine = torch.arange(M, device=DEVICE) != row, int(ids[row])
        for t in tensors[: 2 if kind == "glu" else 1]:
            factor = torch.tensor([1, NAN, INF], device=DEVICE)[torch.randint(0, 3, (M - 1, 1), device=DEVICE)]
            t[others] = (torch.randn(M - 1, t.shape[1], device=DEVICE) * factor).to(dtype)
        ids[others] = ids_like("sorted", M - 1, 4)
        for t in range(4):
            if t != mine:
                tensors[-1][t, random(0, N)] = (NAN, INF, -INF, 0.0)[t]
        assert torch.equal(call(tensors, ids)[row], before)


def test_batch_size_and_order_do_not_matter_elementwise(dtype):
    gate, up, ia3_l = make("glu", 257, 33, 0, dtype)
    ids = ids_like("uniform", 257, 3)
    whole = ia3_glu(gate, up, ia3_l, ids)
    for B in (1, 2, 7, 64) if KERNELS else ():  # aten's exp of a last few elements may end in another bit
        assert torch.equal(ia3_glu(gate[:B], up[:B], ia3_l, ids[:B]), whole[:B])
    order = torch.randperm(257, device=DEVICE)
    got = ia3_glu(gate[order], up[order], ia3_l, ids[order])
    assert torch.equal(got, whole[order]) if KERNELS else torch.allclose(got, whole[order], rtol=1e-2)


@one_dtype
@pytest.mark.skipif(not KERNELS, reason="F.linear does not promise the same bits at another place of the batch")
def test_order_of_sequences_does_not_matter(kind, dtype):
    S = 11 if kind == "large" else 5
    tensors = make(kind, 6 * S, 32, 48, dtype)
    ids = ids_like("uniform", 6, 3).repeat_interleave(S)
    whole = call(tensors, ids)
    order = torch.randperm(6 * S, device=DEVICE).sort().values.view(6, S)[torch.randperm(6, device=DEVICE)].flatten()
    got = call([t[order] if t.shape[0] == 6 * S else t for t in tensors], ids[order])
    if DEVICE == "cuda" or kind == "glu":
        assert torch.equal(got, whole[order])
    else:  # the interpreter multiplies by numpy, whose rows at the edge of a block are summed in another order
        tolerance = dict(rtol=2e-2, atol=1e-2) if truncates(dtype) else {}
        torch.testing.assert_close(got, whole[order], **tolerance)


@one_dtype
def test_base_rows_are_the_unscaled_result(kind, dtype):
    M = rows_of(kind, 10)
    for activation in (None, "silu"):
        tensors = make(kind, M, 32, 16, dtype)
        tensors[0][0], tensors[0][3, 0], tensors[-1][:] = 0, INF, NAN
        ids = torch.where(torch.arange(M, device=DEVICE) < M // 2, -1, 1)
        y, bare = call(tensors, ids, activation), call([*tensors[:-1], torch.ones(32, device=DEVICE)], None, activation)
        assert_same(y[: M // 2], bare[: M // 2], bitwise=True)
        assert y[M // 2 :].isnan().all()


def special_values(dtype):
    info = torch.finfo(dtype)
    return torch.tensor([INF, -INF, NAN, 0.0, -0.0, info.max, -info.max, info.tiny, 1.0], dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_special_values_propagate_as_in_torch(activation, dtype):
    """Forward and backward of every triple of values, and NaN and Inf as the incoming gradient."""
    values = special_values(dtype)
    n = len(values)
    gate, up, scale = (t.reshape(1, -1) for t in torch.meshgrid(values, values, values, indexing="ij"))
    scale = scale.float()
    ids = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    got = ia3_glu(gate, up, scale.contiguous(), ids, activation)
    want = reference.act_glu(gate, up, scale, ids, activation)
    # aten's vector code has gelu(Inf) NaN and gelu of the largest fp32 Inf; its scalar code and fp64 agree with ours
    known = ~(gate >= torch.finfo(dtype).max) if activation == "gelu" else torch.ones_like(gate, dtype=torch.bool)
    assert got.shape == (1, n**3) and got[(gate == INF) & (up == 1) & (scale == 1)].isinf().all() | (not KERNELS)
    for of in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(of(got)[known], of(want)[known]), of.__name__
    for dh in (1.0, 0.0, INF, NAN):
        dh = torch.full_like(gate, dh)
        leaves = [t.contiguous().clone().requires_grad_() for t in (gate, up, scale)]
        grads = torch.autograd.grad(ia3_glu(*leaves, ids, activation), leaves, dh)
        wanted = reference.act_glu_backward(dh, gate, up, scale, ids, activation, [True, True])
        for name, a, b in zip(("dgate", "dup", "dl"), grads, wanted, strict=True):
            for of in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(of(a)[known], of(b)[known]), (name, float(dh[0, 0]), of.__name__)


@one_dtype
@matmuls
def test_special_values_of_a_matmul_stay_in_their_rows_and_columns(kind, dtype):
    """One in each of the first rows, the last one too, and in the last column of a weight: where torch has them."""
    M, N, K = rows_of(kind, 9), 32, 16
    for activation in (None, "relu", "silu"):
        tensors = make(kind, M, N, K, dtype)
        ids = ids_like("sorted", M, 3)
        for row, (at, value) in zip((0, 1, 2, 3, M - 1), enumerate((INF, -INF, NAN, -0.0, INF)), strict=True):
            tensors[0][row, at * 3] = value
        tensors[1][N - 1, 0], tensors[2][N - 2, K - 1] = NAN, INF
        got = call(tensors, ids, activation)
        want = call(tensors, ids, activation, reference)
        for of in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(of(got), of(want)), (activation, of.__name__)


@one_dtype
@pytest.mark.parametrize("bad", BAD_IDS)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_bad_id(kind, bad, ids_dtype, dtype):
    M = 68 if kind == "large" else 4
    *others, memory = make(kind, M, 32, 16, dtype, 9)
    # beside the table stand numbers: a read there would not give the NaN that is asked for
    table, kept = memory[3:6], memory.clone()
    ids = torch.tensor([0, bad, -1, 2], dtype=ids_dtype, device=DEVICE).repeat_interleave(M // 4)
    if not KERNELS:
        op = "ia3_glu" if kind == "glu" else "ia3_glu_linear"
        match = rf"^{op}: task_ids must be in \[-1, 3\), got {bad} at position {M // 4}$"
        for task_ids in (ids,) if bad == -2 or ids_dtype == torch.int64 else (ids, ids.long()):
            with pytest.raises(IndexError, match=match):
                call([*others, table], task_ids)
        return
    y, good = call([*others, table], ids), ids != bad
    assert y[~good].isnan().all() and y[good].isfinite().all()
    assert torch.equal(y[good], call([*others, kept[3:6]], torch.where(good, ids, 0))[good])
    assert torch.equal(memory, kept)


@pytest.mark.skipif(KERNELS, reason="on a GPU a bad id gives NaN, without a synchronisation")
def test_bad_id_of_64_bits_and_of_an_uncovered_row(kind):
    tensors = make(kind, 6, 8, 8)
    with pytest.raises(IndexError, match="got 4294967296 at position 1"):
        call(tensors, torch.tensor([0, 2**32, 0, 0, 0, 0]))
    plan = plan_tasks(torch.tensor([1]), 6, 3, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(IndexError, match=r"task_ids must be in \[-1, 3\), got -2 at position 5$"):
        call(tensors, plan)


@pytest.mark.skipif(not KERNELS, reason="on a CPU a bad id raises before a gradient exists")
def test_bad_id_has_nan_gradient_of_its_own_row_only(kind):
    M = rows_of(kind, 3)
    tensors = make(kind, M, 32, 16)
    ids = torch.tensor([1, 7, 1], device=DEVICE).repeat_interleave(M // 3)
    grads = gradients(lambda *t: call(t, ids), tensors, torch.ones(M, 32, device=DEVICE))
    for dx in grads[: 2 if kind == "glu" else 1]:
        assert dx[ids == 7].isnan().all() and dx[ids == 1].isfinite().all()
    assert grads[-1].isfinite().all() and not grads[-1][[0, 2]].any() and grads[-1][1].any()


def test_guards_stay_intact(kind):
    generator = torch.Generator().manual_seed(2)

    def random(high, low=1):
        return int(torch.randint(low, high, (1,), generator=generator))

    for _ in range(6 if INTERPRET else 20):
        M, N, K = (random(90, 65), 16 * random(4), 16 * random(3)) if kind == "large" else (random(70) for _ in "MNK")
        plain = make(kind, M, N, K, DTYPES[random(3, 0)], num_tasks := random(5))
        tensors, buffers = zip(*(guarded(*t.shape, dtype=t.dtype) for t in plain), strict=True)
        for t in tensors:
            t.uniform_(-1, 1)
        ids = ids_like("sorted", M, num_tasks)
        leaves = [t.requires_grad_() for t in tensors]
        y = call(leaves, ids)
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
        assert all(t.isfinite().all() for t in (y, *grads)), "read outside a tensor, or left unwritten"
        for buffer in buffers:
            assert_guards(buffer)


@one_dtype
@pytest.mark.skipif(not KERNELS, reason="where the results are allocated is seen at a launch")
def test_results_stay_inside_their_tensors(kind, dtype, monkeypatch):
    """h, and g and u beside it, in the middle of guarded buffers, with a bad id among the rows."""
    M, N = rows_of(kind, 5), 32
    tensors, ids = make(kind, M, N, 16, dtype), ids_like("uniform", M, 3)
    ids[M // 2] = 10**6
    buffers, plain = [], torch.empty

    def empty(*size, **kwargs):
        if kwargs["dtype"] != dtype:
            return plain(*size, **kwargs)
        view, buffer = guarded(*(size[0] if isinstance(size[0], tuple) else size), dtype=dtype)
        buffers.append(buffer)
        return view

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "empty_like", lambda t: empty(*t.shape, dtype=t.dtype))
        if kind == "glu":
            y = ops.launch_glu(*tensors, ids, "silu")
        else:
            y, g, u = ops.launch_glu_linear(*tensors, ids, None, 1, "silu", True)
    if kind != "glu":
        assert g.isfinite().all() and u.isfinite().all()
    bad = ids == 10**6
    assert len(buffers) == (1 if kind == "glu" else 3) and y[bad].isnan().all() and y[~bad].isfinite().all()
    for buffer in buffers:
        assert_guards(buffer)


ZERO_SIZES = [(0, 8, 4), (4, 0, 8), (4, 8, 0), (70, 16, 0), (4, 0, 0), (0, 0, 0)]


@one_dtype
@pytest.mark.parametrize("shape", ZERO_SIZES, ids=lambda s: "M{}-N{}-K{}".format(*s))
def test_zero_sizes(kind, shape, dtype):
    M, N, _ = shape
    tensors, ids = make(kind, *shape, dtype), ids_like("uniform", M, 3)
    y = call(tensors, ids)
    assert y.shape == (M, N) and y.dtype == dtype
    if M:
        check(y, tensors, ids.tolist())
    got = gradients(lambda *t: call(t, ids), tensors, torch.randn(M, N, device=DEVICE).to(dtype))
    assert all(g.shape == t.shape and g.isfinite().all() for g, t in zip(got, tensors, strict=True))
    assert M or not any(g.any() for g in got)


@one_dtype
def test_zero_sequences_and_zero_tokens(kind, dtype):
    *others, ia3_l = make(kind, 1, 8, 4, dtype)
    for lead in ((0, 3), (2, 0), (2, 0, 3)):
        rows = [torch.randn(*lead, t.shape[-1], device=DEVICE).to(dtype).requires_grad_() for t in others[:2]]
        tensors = [*rows, ia3_l] if kind == "glu" else [rows[0], *others[1:], ia3_l]
        ids = torch.zeros(lead[0], dtype=torch.int64, device=DEVICE)
        for task_ids in (ids, plan_tasks(ids, 0, 3)):
            y = call(tensors, task_ids)
            assert y.shape == (*lead, 8)
            assert torch.autograd.grad(y, rows[0], torch.ones_like(y))[0].shape == rows[0].shape


@one_dtype
def test_table_without_tasks_serves_the_base_model(kind, dtype):
    M = rows_of(kind, 3)
    *others, _ = make(kind, M, 16, 16, dtype)
    got = call([*others, torch.empty(0, 16, device=DEVICE)], torch.full((M,), -1, device=DEVICE))
    assert torch.equal(got, call([*others, torch.ones(16, device=DEVICE)]))


LAYOUTS = {
    "permuted": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced rows": lambda x: torch.cat([x, x], 1)[:, ::2],
    "sliced columns": lambda x: torch.stack([x, x], -1)[..., 0],
    "wide rows": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "expanded": lambda x: x[:, :1].expand(-1, x.shape[1], -1),
    "columns first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
}
W_LAYOUTS = {
    "columns": lambda w: w.t().contiguous().t(),
    "sliced rows": lambda w: torch.stack([w, w], 1)[:, 0],
    "sliced columns": lambda w: torch.stack([w, w], -1)[..., 0],
}


@one_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(kind, layout, dtype):
    """Whatever the strides of x, or of gate and up apart: the values and gradients of contiguous ones."""
    S = 17 if kind == "large" else 5
    tensors = make(kind, 4 * S, 32, 16, dtype)
    ids, dy = ids_like("uniform", 4, 3), torch.randn(4, S, 32, device=DEVICE).to(dtype)
    batched = [t.view(4, S, -1) if t.shape[0] == 4 * S else t for t in tensors]
    rows = ids.repeat_interleave(S).tolist()
    for which in ((0,), (1,), (0, 1)) if kind == "glu" else ((0,),):
        strided = [LAYOUTS[layout](t) if i in which else t for i, t in enumerate(batched)]
        plain = [t.reshape(4 * S, -1) if t.dim() == 3 else t for t in strided]
        check(call(strided, ids).view(4 * S, 32), plain, rows, called=strided)
        leaves = [t.detach().requires_grad_() for t in strided]
        got = torch.autograd.grad(call(leaves, ids), leaves, dy)
        check_gradients([t.reshape(p.shape) for t, p in zip(got, plain, strict=True)], plain, rows, dy.view(4 * S, 32))


@one_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_incoming_gradient(kind, layout, dtype):
    S = 17 if kind == "large" else 5
    tensors, ids = make(kind, 4 * S, 32, 16, dtype), ids_like("uniform", 4, 3)
    leaves = [t.requires_grad_() for t in tensors]
    y = call([t.view(4, S, -1) if t.shape[0] == 4 * S else t for t in leaves], ids)
    dy = LAYOUTS[layout](torch.randn(4, S, 32, device=DEVICE).to(dtype))
    got = torch.autograd.grad(y, leaves, dy)
    check_gradients(got, [t.detach() for t in tensors], ids.repeat_interleave(S).tolist(), dy.reshape(4 * S, 32))


@one_dtype
@matmuls
@pytest.mark.parametrize("layout", W_LAYOUTS)
def test_weight_layouts(kind, layout, dtype):
    """Each weight, and both: strides of one are never taken for the other's."""
    M = rows_of(kind, 7)
    tensors = make(kind, M, 32, 16, dtype)
    ids, dy = ids_like("sorted", M, 3), torch.randn(M, 32, device=DEVICE).to(dtype)
    for which in ((1,), (2,), (1, 2)):
        strided = [W_LAYOUTS[layout](t) if i in which else t for i, t in enumerate(tensors)]
        check(call(strided, ids), tensors, ids.tolist(), called=strided)
    leaves = [t.detach().requires_grad_() for t in strided]
    check_gradients(torch.autograd.grad(call(leaves, ids), leaves, dy), tensors, ids.tolist(), dy)


@one_dtype
def test_table_biases_and_ids_strided(kind, dtype):
    """Read by their strides: views of something wider, one value for all, ids out of a wider tensor."""
    M = rows_of(kind, 6)
    *others, ia3_l = make(kind, M, 32, 16, dtype)
    ids = ids_like("sorted", M, 3)
    want = call([*others, ia3_l], ids)
    wide, tall = torch.cat([ia3_l, ia3_l], 1)[:, 32:], torch.stack([ia3_l, ia3_l], 1)[:, 0]
    for table in (wide, tall, ia3_l.t().contiguous().t(), torch.stack([ia3_l, ia3_l], -1)[..., 0]):
        assert torch.equal(call([*others, table], ids), want)
    for beside in (0, 9):
        assert torch.equal(call([*others, ia3_l], torch.stack([ids, torch.full_like(ids, beside)], 1)[:, 0]), want)
    assert torch.equal(call([*others, ia3_l], ids[:1].expand(M)), call([*others, ia3_l], ids[:1].repeat(M)))
    if kind != "glu":
        for i in (3, 4):
            strided = [torch.stack([t, t + 1], -1)[:, 0] if j == i else t for j, t in enumerate(others)]
            assert torch.equal(call([*strided, ia3_l], ids), want)
            one = [t[:1].expand(32) if j == i else t for j, t in enumerate(others)]
            assert torch.equal(call([*one, ia3_l], ids), call([*map(torch.Tensor.contiguous, one), ia3_l], ids))


@pytest.mark.parametrize("N", [1, 2, 3, 5, 31, 32, 33, 63, 65, 127, 255, 1023, 1025, 4097])
def test_odd_widths_and_offsets(N, dtype):
    for offset in range(1, 8, 3):
        M = 24 if N < 64 else 3
        rows = [torch.randn(M * N + offset, device=DEVICE).to(dtype)[offset:].view(M, N) for _ in range(2)]
        tensors = [*rows, torch.randn(2 * N + offset, device=DEVICE)[offset:].view(2, N)]
        ids = ids_like("uniform", M, 2)
        check(call(tensors, ids), tensors, ids.tolist())


@one_dtype
def test_misaligned_operands(kind, dtype):
    """x, a weight, a bias or the vector some elements after a 16-byte address: the same values."""
    M = rows_of(kind, 5)
    tensors, ids = make(kind, M, 32, 16, dtype), ids_like("sorted", M, 3)
    for offset, at in zip((1, 3, 7, 5, 2, 1), range(len(tensors)), strict=False):
        moved = torch.cat([tensors[at].flatten()[:offset], tensors[at].flatten()])[offset:].view(tensors[at].shape)
        assert moved.data_ptr() % 16
        strided = [moved if i == at else t for i, t in enumerate(tensors)]
        check(call(strided, ids), tensors, ids.tolist(), called=strided)


def test_repeats_are_bitwise_equal(kind, dtype):
    M = rows_of(kind, 20)
    tensors, ids = make(kind, M, 32, 16, dtype), ids_like("sorted", M, 3)
    dy = torch.randn(M, 32, device=DEVICE).to(dtype)

    def run():
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = call(leaves, ids)
        return y, *torch.autograd.grad(y, leaves, dy)

    first = run()
    times = 50 if dtype == torch.float16 and kind != "large" else 2
    for _ in range(250 if DEVICE == "cuda" else times):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_loss_scale_of_a_power_of_two_is_exact(kind):
    for dtype in (torch.float32, torch.bfloat16):
        M = rows_of(kind, 9)
        tensors, ids = make(kind, M, 32, 16, dtype), ids_like("sorted", M, 3)
        dy = torch.randn(M, 32, device=DEVICE).to(dtype)
        got, want = (gradients(lambda *t, ids=ids: call(t, ids), tensors, d) for d in (dy * 1024, dy))
        assert all(torch.equal(a, b * 1024) for a, b in zip(got, want, strict=True))


@settings(max_examples=12 if INTERPRET else 60, deadline=None, derandomize=True)
@given(
    st.sampled_from(["glu", "linear"]), st.integers(1, 70), st.integers(1, 40), st.integers(1, 40), st.integers(1, 5),
    st.booleans(), st.sampled_from(list(BIASES)), st.sampled_from(DTYPES), st.sampled_from(DTYPES),
    st.sampled_from(list(ACTIVATIONS)), st.sampled_from(ID_KINDS), st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(which, M, N, K, num_tasks, aligned, biases, dtype, l_dtype, activation, ids, seed):
    torch.manual_seed(seed)
    N, K = (-(-N // 16) * 16, -(-K // 16) * 16) if aligned else (N, K)
    tensors = make(which, M, N, K, dtype, num_tasks, biases=biases, l_dtype=l_dtype)
    ids = ids_like(ids, M, num_tasks)
    check(call(tensors, ids, activation), tensors, ids.tolist(), activation)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=name_of)
def test_autocast(cast):
    """x, weights and biases as F.linear casts them, ia3_l never; gradients come back in the dtypes of the leaves."""
    plain = make("linear", 7, 24, 16)
    x, gate_weight, up_weight, _, up_bias, ia3_l = plain
    ids, dy = ids_like("uniform", 7, 3), torch.randn(7, 24, device=DEVICE).to(cast)

    def autocast(f):
        def run(*tensors):
            with torch.autocast(DEVICE, cast):
                return f(tensors, ids)

        return run

    def torchs(tensors, ids):
        gate, up, ia3_l = layers(tensors)
        return (F.silu(gate).float() * up.float() * scales(ia3_l, ids.tolist(), torch.float32)).to(cast)

    for tensors in (plain, [x.to(cast), gate_weight, up_weight.to(cast), None, up_bias, ia3_l], [x.half(), *plain[1:]]):
        got = autocast(call)(*tensors)
        assert got.dtype == cast
        check(got, [*(None if t is None else t.to(cast) for t in tensors[:5]), ia3_l], ids.tolist())
        grads, want = (gradients(autocast(f), tensors, dy) for f in (call, torchs))
        for a, b, leaf in zip(grads, want, tensors, strict=True):
            if leaf is not None:
                assert a.dtype == leaf.dtype
                torch.testing.assert_close(a, b, rtol=3e-2, atol=6e-2)
    assert autocast(call)(*doubled(*plain)).dtype == torch.float64
    with torch.autocast(DEVICE, cast):
        assert call(make("glu", 7, 24, 0), ids).dtype == torch.float32, "the elementwise operator casts nothing"
        with torch.autocast(DEVICE, enabled=False):
            assert call(plain, ids).dtype == torch.float32


def test_backward_under_autocast_keeps_the_forward_dtypes(kind):
    M = rows_of(kind, 5)
    leaves, ids = [t.requires_grad_() for t in make(kind, M, 32, 16)], ids_like("sorted", M, 3)
    grads = []
    for enabled in (False, True):
        y = call(leaves, ids)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(y, leaves, torch.ones_like(y)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@one_dtype
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_outputs_may_be_changed_in_place(kind, grad, dtype):
    """A view made inside the operator would refuse it, and relu_() or `y += residual` are common."""
    *others, ia3_l = make(kind, rows_of(kind, 6), 32, 16, dtype)
    tensors = [*others, ia3_l.requires_grad_(grad)]
    ids = ids_like("sorted", others[0].shape[0], 3)
    y, want = call(tensors, ids), call(tensors, ids).detach() * 2
    y.mul_(2)
    assert torch.equal(y.detach(), want)
    if grad:
        (dl,) = torch.autograd.grad(y, tensors[-1], torch.ones_like(y))
        assert dl.isfinite().all() and dl.any()


OPCHECK_LAYOUTS = {
    "contiguous": lambda: torch.randn(4, 6, 8),
    "permuted": lambda: torch.randn(6, 4, 8).transpose(0, 1),
    "sliced": lambda: torch.randn(4, 12, 8)[:, ::2],
    "empty": lambda: torch.randn(4, 0, 8),
}


OPCHECK_CASES = [(layout, True, True) for layout in OPCHECK_LAYOUTS]
OPCHECK_CASES += [(layout, layout == "permuted", False) for layout in OPCHECK_LAYOUTS]


@pytest.mark.parametrize(("layout", "with_ids", "grad"), OPCHECK_CASES)
def test_opcheck(layout, with_ids, grad):
    x, up = (OPCHECK_LAYOUTS[layout]().to(DEVICE).requires_grad_(grad) for _ in range(2))
    ia3_l = torch.randn(3 if with_ids else 1, 8, device=DEVICE, requires_grad=grad)
    ids = torch.tensor([0, 2, -1, 1], device=DEVICE) if with_ids else None
    torch.library.opcheck(torch.ops.peft_ops.ia3_glu, (x, up, ia3_l, ids, "silu"))
    detached = [t.detach() for t in (torch.randn_like(x), x, up, ia3_l)]
    needs = [grad, not grad] if with_ids else [True, True]
    torch.library.opcheck(torch.ops.peft_ops.ia3_glu_backward, (*detached, ids, "relu", needs))
    weights = [torch.randn(8, 8, device=DEVICE, requires_grad=grad) for _ in range(2)]
    biases = torch.randn(8, device=DEVICE, requires_grad=grad), None
    args = x, *weights, *biases, ia3_l, ids, None, 6 if with_ids else 1, "gelu", grad
    torch.library.opcheck(torch.ops.peft_ops.ia3_glu_linear, args)


@matmuls
def test_opcheck_with_a_plan(kind):
    M = rows_of(kind, 10)
    leaves = [t.requires_grad_() for t in make(kind, M, 16, 16)]
    plan = plan_tasks(torch.tensor([0, 2], device=DEVICE), M, 3)
    tensors = [plan.tiles, plan.run_index, plan.run_end]
    args = *leaves, plan.task_ids, tensors, plan.rows_per_id, "silu", True
    torch.library.opcheck(torch.ops.peft_ops.ia3_glu_linear, args)


@pytest.mark.parametrize("placement", ["glu", "linear", "plan"])
def test_compiles_with_dynamic_batches(placement):
    def loss(tensors, ids):
        if placement == "plan":
            ids = plan_tasks(ids, tensors[0].shape[0] * tensors[0].shape[1], 3)
        return (call(tensors, ids) * 1.5).relu().sum()

    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=frames, fullgraph=True, dynamic=True)
    of = "glu" if placement == "glu" else "linear"
    parameters = [t.requires_grad_() for t in make(of, 1, 16, 8)][2 if of == "glu" else 1 :]
    for B in (2, 3, 5, 20, 13):
        rows = [torch.randn(B, 4, 16 if of == "glu" else 8, device=DEVICE) for _ in range(2 if of == "glu" else 1)]
        leaves, ids = [*(t.requires_grad_() for t in rows), *parameters], ids_like("uniform", B, 3)
        want, got = loss(leaves, ids), compiled(leaves, ids)
        assert torch.equal(got, want)
        for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
            assert torch.equal(a, b)
    assert frames.frame_count <= 2


def test_compiled_code_calls_the_operators():
    """Dynamo must see one operator: traced through the reference, it would compute the same and never run a kernel."""
    for which, op in (("glu", "ia3_glu"), ("linear", "ia3_glu_linear")):
        seen = []

        def record(graph, inputs, seen=seen):
            seen.extend(str(node.target) for node in graph.graph.nodes)
            return graph

        torch._dynamo.reset()
        torch.compile(call, backend=record, fullgraph=True)(make(which, 4, 8, 4), ids_like("uniform", 4, 3))
        assert f"peft_ops.{op}.default" in seen and not any("mul" in t or "linear" == t for t in seen), seen


def test_exports_and_loads(tmp_path):
    class Feedforward(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = torch.nn.Linear(8, 16), torch.nn.Linear(8, 16, bias=False)
            self.ia3_l = torch.nn.Parameter(torch.randn(3, 16))

        def forward(self, x, ids):
            fused = call([x, self.gate.weight, self.up.weight, self.gate.bias, None, self.ia3_l], ids)
            return fused + call([self.gate(x), self.up(x), self.ia3_l], plan_tasks(ids, x.shape[0] * x.shape[1], 3))

    module, x, ids = Feedforward().to(DEVICE), torch.randn(4, 5, 8, device=DEVICE), ids_like("uniform", 4, 3)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, (x, ids), dynamic_shapes={"x": {0: batch}, "ids": {0: batch}})
    torch.export.save(program, tmp_path / "glu.pt2")
    loaded = torch.export.load(tmp_path / "glu.pt2").module()
    for B in (7, 30):
        x, ids = torch.randn(B, 5, 8, device=DEVICE), ids_like("uniform", B, 3)
        assert torch.equal(loaded(x, ids), module(x, ids))


def test_functorch_goes_through_the_reference():
    ids = ids_like("uniform", 6, 3)
    for tensors in (make("glu", 6, 8, 0), make("linear", 6, 8, 4)):
        n = len(tensors)
        got = torch.func.grad(lambda *t: call(t, ids).sum(), tuple(range(n)))(*tensors)
        want = gradients(lambda *t: call(t, ids), tensors, torch.ones(6, 8, device=DEVICE))
        torch.testing.assert_close(list(got), want)
        rows = [0, 1] if n == 3 else [0]
        dims = tuple(0 if i in rows else None for i in range(n - 1))
        one = [*tensors[:-1], tensors[-1][0]]
        torch.testing.assert_close(torch.vmap(lambda *t: call(t), (*dims, None))(*one), call(one))

        def loss(v, *rest):
            return call([*rest, v]).sum()

        per_sample = torch.vmap(torch.func.grad(loss), (None, *dims))(one[-1], *one[:-1])
        torch.testing.assert_close(per_sample, call([*one[:-1], torch.ones_like(one[-1])]))


def test_higher_derivatives_refuse():
    for op, tensors in (("ia3_glu", make("glu", 3, 8, 0)), ("ia3_glu_linear", make("linear", 3, 8, 4))):
        ids = ids_like("uniform", 3, 3)
        leaf = tensors[0].clone().requires_grad_()
        with pytest.raises(RuntimeError, match=f"^{op}: double backward is not supported"):
            torch.autograd.grad(call([leaf, *tensors[1:]], ids).square().sum(), leaf, create_graph=True)
        for at in range(len(tensors)):
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(tensors[at], torch.ones_like(tensors[at]))
                with pytest.raises(NotImplementedError, match=f"^{op}: forward-mode AD is not supported"):
                    call([dual if i == at else t for i, t in enumerate(tensors)], ids)


@one_dtype
@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_activation_checkpointing_is_bitwise(kind, reentrant, dtype):
    M = rows_of(kind, 9)
    tensors, dy = make(kind, M, 16, 16, dtype), torch.randn(M, 16, device=DEVICE).to(dtype)
    ids = ids_like("sorted", M, 3)

    def f(*t):
        return call(t, ids if M == 9 else plan_tasks(ids, M, 3))

    leaves = [[t.clone().requires_grad_() for t in tensors] for _ in range(2)]
    f(*leaves[0]).backward(dy)
    checkpoint(f, *leaves[1], use_reentrant=reentrant).backward(dy)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(*leaves, strict=True))


@one_dtype
def test_reference_backend_is_plain_torch(kind, dtype):
    M = rows_of(kind, 6)
    tensors, ids = make(kind, M, 16, 16, dtype), ids_like("sorted", M, 3)
    for task_ids in (ids, plan_tasks(ids, M, 3)):
        for activation in ACTIVATIONS:
            with peft_ops.set_backend("reference"):
                y = call(tensors, task_ids, activation)
            assert torch.equal(y, call(tensors, task_ids, activation, reference))


@pytest.mark.skipif(not KERNELS, reason="device memory for descriptors is asked for where kernels run")
@persistent
def test_callers_allocator_is_untouched(kind):
    allocation = pytest.importorskip("triton.runtime._allocation")
    before = allocation._allocator.get()
    tensors = make("large", 66, 16, 16, torch.float16, 1)
    with launches(ops.dual) as seen:
        call(tensors)
    assert launched(seen) == [("large", "one")] and allocation._allocator.get() is before


G, L = torch.zeros(4, 3, 8), torch.ones(2, 8)
X, W, B = torch.zeros(4, 3, 6), torch.zeros(8, 6), torch.zeros(8)
IDS = torch.zeros(4, dtype=torch.int64)
GLU_ARGS = dict(gate=G, up=G, ia3_l=L, task_ids=IDS)
LINEAR_ARGS = dict(x=X, gate_weight=W, up_weight=W, gate_bias=B, up_bias=B, ia3_l=L, task_ids=IDS)
# arguments that differ from those above
ANY_BAD_INPUT = {
    "activation": (dict(activation="tanh"), ValueError, "activation must be one of None, 'relu', .* got 'tanh'"),
    "activation no string": (dict(activation=1), ValueError, "activation must be one of None, 'relu', .* got 1"),
    "activation a function": (dict(activation=F.silu), ValueError, "activation must be .* got <function silu"),
    "table no tensor": (dict(ia3_l=None), TypeError, "ia3_l must be a tensor, got NoneType"),
    "table integer": (dict(ia3_l=L.long()), TypeError, "ia3_l must have dtype .* got int64"),
    "table fp64": (dict(ia3_l=L.double()), TypeError, "ia3_l must have dtype .* got float64"),
    "table width": (dict(ia3_l=L[:, :5]), ValueError, r"ia3_l must have shape \[.\] or .* got \[2, 5\]"),
    "table of PEFT's shape": (dict(ia3_l=L[0][:, None]), ValueError, r"ia3_l must have shape .* got \[8, 1\]"),
    "table elsewhere": (dict(ia3_l=L.to("meta")), ValueError, "ia3_l must be on cpu, .* got meta"),
    "no ids": (dict(task_ids=None), ValueError, "task_ids must be given, because ia3_l holds 2 tasks, got None"),
    "ids no tensor": (dict(task_ids=[0] * 4), TypeError, "task_ids must be a tensor, got list"),
    "ids float": (dict(task_ids=IDS.float()), TypeError, "task_ids must have dtype int32, int64, got float32"),
    "ids too many": (dict(task_ids=IDS.repeat(2)), ValueError, r"task_ids must have a shape .* got \[8\]"),
    "ids do not divide": (dict(task_ids=IDS[:3]), ValueError, r"task_ids must have a shape .* got \[3\]"),
    "ids empty": (dict(task_ids=IDS[:0]), ValueError, r"task_ids must have a shape .* got \[0\]"),
    "ids of no rank": (dict(task_ids=IDS[0]), ValueError, r"task_ids must have a shape .* got \[\]"),
    "ids elsewhere": (dict(task_ids=IDS.to("meta")), ValueError, "task_ids must be on cpu, .* got meta"),
    "plan for other rows": (
        dict(task_ids=plan_tasks(IDS, 4, 2)), ValueError, "task_ids must be a plan for 12 rows, got one for 4"),
    "plan for other tasks": (
        dict(task_ids=plan_tasks(IDS, 12, 3)), ValueError, "task_ids must be a plan for 2 tasks, got one for 3"),
}  # fmt: skip
GLU_BAD_INPUT = {
    "gate no tensor": (dict(gate=[1.0]), TypeError, "gate must be a tensor, got list"),
    "gate integer": (dict(gate=G.int()), TypeError, "gate must have dtype float32, .* got int32"),
    "gate complex": (dict(gate=G.to(torch.complex64)), TypeError, "gate must have dtype .* got complex64"),
    "up no tensor": (dict(up=None), TypeError, "up must be a tensor, got NoneType"),
    "up dtype": (dict(up=G.half()), TypeError, "up must have dtype float32, got float16"),
    "up elsewhere": (dict(up=G.to("meta")), ValueError, "up must be on cpu, .* got meta"),
    "up shape": (dict(up=G[:1]), ValueError, r"up must have gate's shape \[4, 3, 8\], .* got \[1, 3, 8\]"),
    "up of another width": (dict(up=G[..., :7]), ValueError, r"up must have gate's shape .* got \[4, 3, 7\]"),
    "scalars": (dict(gate=G[0, 0, 0], up=G[0, 0, 0]), ValueError, r"up must have .* 1 dimension, got \[\]"),
    "ids for packed rows": (dict(gate=G.view(12, 8), up=G.view(12, 8)), ValueError, "task_ids .* pass plan_tasks"),
}
LINEAR_BAD_INPUT = {
    "x no tensor": (dict(x=[1.0]), TypeError, "x must be a tensor, got list"),
    "x integer": (dict(x=X.int()), TypeError, "x must have dtype float32, .* got int32"),
    "x scalar": (dict(x=X[0, 0, 0]), ValueError, r"x must have 6 features, as gate_weight .* got shape \[\]"),
    "x features": (dict(x=X[..., :5]), ValueError, r"x must have 6 features, .* got shape \[4, 3, 5\]"),
    "gate weight no tensor": (dict(gate_weight=None), TypeError, "gate_weight must be a tensor, got NoneType"),
    "up weight no tensor": (dict(up_weight=1.0), TypeError, "up_weight must be a tensor, got float"),
    "gate weight dtype": (dict(gate_weight=W.half()), TypeError, "gate_weight must have dtype float32, got float16"),
    "up weight dtype": (dict(up_weight=W.bfloat16()), TypeError, "up_weight must have dtype float32, got bfloat16"),
    "gate weight rank": (dict(gate_weight=W[0]), ValueError, r"gate_weight must have 2 dimensions, got shape \[6\]"),
    "up weight rows": (dict(up_weight=W[:5]), ValueError, r"up_bias must have shape \[5\], got \[8\]"),
    "up weight rows, no bias": (
        dict(up_weight=W[:5], up_bias=None), ValueError,
        r"up_weight must have gate_weight's shape \[8, 6\], got \[5, 6\]"),
    "up weight features": (
        dict(up_weight=W[:, :5]), ValueError,
        r"x must have 5 features, as up_weight \[8, 5\] takes, got shape \[4, 3, 6\]"),
    "up weight elsewhere": (dict(up_weight=W.to("meta")), ValueError, "up_weight must be on cpu, .* got meta"),
    "gate bias shape": (dict(gate_bias=B[:5]), ValueError, r"gate_bias must have shape \[8\], got \[5\]"),
    "up bias shape": (dict(up_bias=B[:5]), ValueError, r"up_bias must have shape \[8\], got \[5\]"),
    "up bias dtype": (dict(up_bias=B.double()), TypeError, "up_bias must have dtype float32, got float64"),
    "up bias rank": (dict(up_bias=B[None]), ValueError, r"up_bias must have 1 dimension, got shape \[1, 8\]"),
    "gate bias elsewhere": (dict(gate_bias=B.to("meta")), ValueError, "gate_bias must be on cpu, .* got meta"),
    "table of the input's width": (
        dict(ia3_l=L[:, :6]), ValueError, r"ia3_l must have shape \[8\] or .* got \[2, 6\]"),
    "ids for packed rows": (dict(x=X.view(12, 6)), ValueError, "task_ids must .* for a packed batch pass plan_tasks"),
}  # fmt: skip


@pytest.mark.parametrize("case", ANY_BAD_INPUT | GLU_BAD_INPUT)
def test_bad_input(case):
    kwargs, error, match = (ANY_BAD_INPUT | GLU_BAD_INPUT)[case]
    with pytest.raises(error, match=f"^ia3_glu: {match}"):
        ia3_glu(**GLU_ARGS | kwargs)


@pytest.mark.parametrize("case", ANY_BAD_INPUT | LINEAR_BAD_INPUT)
def test_bad_input_of_the_matmul(case):
    kwargs, error, match = (ANY_BAD_INPUT | LINEAR_BAD_INPUT)[case]
    if (
        case.startswith("table")
        and kwargs["ia3_l"] is not None
        and kwargs["ia3_l"].shape == L.shape
        and case != ("table of the input's width")
    ):
        kwargs = dict(ia3_l=kwargs["ia3_l"][:, :6])
    with pytest.raises(error, match=f"^ia3_glu_linear: {match}"):
        ia3_glu_linear(**LINEAR_ARGS | kwargs)


def test_checks_hold_on_fake_cuda_tensors():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(4, 3, 8, device="cuda", dtype=torch.bfloat16)
        weight, bias = (torch.empty(*s, device="cuda", dtype=torch.bfloat16) for s in ((6, 8), (6,)))
        ia3_l, ids = torch.empty(2, 6, device="cuda"), torch.zeros(4, dtype=torch.int32, device="cuda")
        for task_ids in (ids, plan_tasks(ids, 12, 2)):
            y = ia3_glu_linear(x, weight, weight, bias, ia3_l=ia3_l, task_ids=task_ids)
            assert y.shape == (4, 3, 6) and y.device.type == "cuda" and y.dtype == x.dtype
            assert ia3_glu(y, y, ia3_l, task_ids).shape == y.shape
        with pytest.raises(ValueError, match="got one for 4"):
            ia3_glu_linear(x, weight, weight, ia3_l=ia3_l, task_ids=plan_tasks(ids, 4, 2))
        with pytest.raises(ValueError, match="up_weight must be on cuda:0, as the other arguments are, got cpu"):
            ia3_glu_linear(x, weight, torch.empty(6, 8, dtype=torch.bfloat16), ia3_l=ia3_l, task_ids=ids)


def test_shapes_on_the_meta_device():
    for which in ("glu", "linear"):
        tensors = [t.to("meta") for t in make(which, 4, 6, 8, num_tasks=1)]
        assert call(tensors).shape == (4, 6)
