"""ia3_linear: values and gradients against torch, fp64 and PEFT, task selection, layouts, tracing, and bad input."""

from importlib import import_module

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import peft_ops
from peft_ops import ia3_linear, plan_tasks, reference
from peft_ops.ops import ia3_linear as ops
from tests.conftest import (
    BAD_IDS,
    DEVICE,
    DTYPES,
    ID_KINDS,
    INTERPRET,
    KERNELS,
    W_LAYOUTS,
    X_LAYOUTS,
    assert_as_good_as_torch,
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

NAN, INF = float("nan"), float("inf")
ACTIVATIONS = {
    None: lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}
# rows, features of the output, reduced features: one row, odd, just above the small kernel's rows, one tile and more
SHAPES = [
    (1, 257, 32),
    (7, 67, 7),
    (17, 33, 31),
    (64, 40, 24),
    (65, 48, 48),
    (70, 33, 31),
    (128, 144, 80),
    (129, 32, 80),
    (300, 16, 16),
]
SHAPE_IDS = [f"M{M}-N{N}-K{K}" for M, N, K in SHAPES]


@pytest.fixture(autouse=True)
def large_above_64_rows():
    """By its own rule the large kernel starts where 128 x 128 tiles fill half a GPU, which no test here can afford."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops.tiles, "linear_is_small", lambda M, N, capability: M <= 64)
        yield


@pytest.fixture
def real_rule(large_above_64_rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops.tiles, "linear_is_small", import_module("peft_ops.kernels.tiles").linear_is_small)
        yield


def make(M, N, K, dtype=torch.float32, num_tasks=3, *, bias=True, is_feedforward=False, l_dtype=torch.float32):
    """x, weight, bias, ia3_l: the outputs are of order one."""
    x, weight = torch.randn(M, K, device=DEVICE), torch.randn(N, K, device=DEVICE) / max(K, 1) ** 0.5
    table = torch.randn(num_tasks, K if is_feedforward else N, device=DEVICE)
    return x.to(dtype), weight.to(dtype), torch.randn(N, device=DEVICE).to(dtype) if bias else None, table.to(l_dtype)


def expected(x, weight, bias, ia3_l, rows, activation=None, is_feedforward=False):
    """The specification, written out in x's dtype: PEFT's arithmetic, one vector per row."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale = scales(ia3_l, rows, dtype)
    if is_feedforward:
        return F.linear((x.to(dtype) * scale).to(x.dtype), weight, bias)
    return (ACTIVATIONS[activation](F.linear(x, weight, bias).to(dtype)) * scale).to(x.dtype)


def check(got, x, weight, bias, ia3_l, rows, activation=None, is_feedforward=False):
    """Bitwise where F.linear multiplies and nothing but the scale follows or goes before; the fp64 rule elsewhere."""
    want = expected(x, weight, bias, ia3_l, rows, activation, is_feedforward)
    assert got.dtype == x.dtype and got.is_contiguous()
    if activation is None and not truncates(x.dtype) and (is_feedforward or not fused(x.dtype)):
        assert_same(got, want, bitwise=True)
    fp64 = expected(*doubled(x, weight, bias, ia3_l), rows, activation, is_feedforward)
    assert_like_torch(got, want, fp64, elementwise=not is_feedforward)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_forward(shape, activation, dtype):
    for bias in (shape[0] % 2 == 0,) if INTERPRET and shape[0] > 64 else (False, True):
        x, weight, b, ia3_l = make(*shape, dtype, bias=bias)
        ids = ids_like("sorted" if INTERPRET and shape[0] > 64 else "uniform", shape[0], 3)
        check(
            ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=ids, activation=activation),
            x,
            weight,
            b,
            ia3_l,
            ids.tolist(),
            activation,
        )


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_forward_feedforward(shape, dtype):
    for bias in (False, True):
        x, weight, b, ia3_l = make(*shape, dtype, bias=bias, is_feedforward=True)
        ids = ids_like("uniform", shape[0], 3)
        y = ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=ids, is_feedforward=True)
        check(y, x, weight, b, ia3_l, ids.tolist(), is_feedforward=True)


@pytest.mark.parametrize("l_dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("M", [9, 80])
def test_vector_of_any_dtype(M, l_dtype, dtype):
    for is_feedforward in (False, True):
        x, weight, b, ia3_l = make(M, 32, 16, dtype, l_dtype=l_dtype, is_feedforward=is_feedforward)
        ids = ids_like("sorted", M, 3)
        y = ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=ids, is_feedforward=is_feedforward)
        check(y, x, weight, b, ia3_l, ids.tolist(), is_feedforward=is_feedforward)


def selections(B, S, num_tasks, ids_dtype=torch.int64):
    """name -> (task_ids, the id of every row), for x [B, S, K]. Neighbours share an id now and then."""
    per_sequence, beams = (
        ids_like("uniform", B, num_tasks, dtype=ids_dtype),
        ids_like("uniform", B // 2, num_tasks, dtype=ids_dtype),
    )
    per_token = ids_like("uniform", -(-B * S // 5), num_tasks, dtype=ids_dtype).repeat_interleave(5)[: B * S].view(B, S)
    lengths = torch.tensor([0, S + 1, 1, 0, B * S - S - 2], device=DEVICE)
    packed, cu_seqlens = ids_like("uniform", 5, num_tasks, dtype=ids_dtype), F.pad(lengths.cumsum(0), (1, 0))
    return {
        "one": (None, None),
        "sequence": (per_sequence, per_sequence.repeat_interleave(S).tolist()),
        "token": (per_token, per_token.flatten().tolist()),
        "beams": (beams, beams.repeat_interleave(2 * S).tolist()),
        "plan": (plan_tasks(per_sequence, B * S, num_tasks), per_sequence.repeat_interleave(S).tolist()),
        "token plan": (plan_tasks(per_token, B * S, num_tasks), per_token.flatten().tolist()),
        "packed": (
            plan_tasks(packed, B * S, num_tasks, cu_seqlens=cu_seqlens),
            packed.repeat_interleave(lengths).tolist(),
        ),
    }


@pytest.mark.parametrize("S", [3, 37], ids=["small", "large"])
@pytest.mark.parametrize("selection", ["one", "sequence", "token", "beams", "plan", "token plan", "packed"])
def test_every_way_to_select_tasks(selection, S, dtype):
    B, N, K = 4, 48, 32
    cases = [(None, False), ("silu", False), (None, True)]
    for ids_dtype in (torch.int32, torch.int64):
        for activation, is_feedforward in cases if ids_dtype == torch.int64 else cases[:1]:
            if INTERPRET and S > 16 and (is_feedforward or ids_dtype == torch.int32):
                continue  # no kernel that the smaller batch does not run
            x, weight, b, ia3_l = make(
                B * S, N, K, dtype, 1 if selection == "one" else 4, is_feedforward=is_feedforward
            )
            ids, rows = selections(B, S, 4, ids_dtype)[selection]
            kwargs = dict(activation=activation, is_feedforward=is_feedforward)
            y = ia3_linear(x.view(B, S, K), weight, b, ia3_l=ia3_l, task_ids=ids, **kwargs)
            assert y.shape == (B, S, N)
            check(y.view(-1, N), x, weight, b, ia3_l, rows, **kwargs)


def test_one_task_needs_no_ids(dtype):
    x, weight, b, ia3_l = make(9, 24, 16, dtype, 1)
    want = ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=torch.zeros(9, dtype=torch.int64, device=DEVICE))
    for vector in (ia3_l, ia3_l[0]):
        assert torch.equal(ia3_linear(x, weight, b, ia3_l=vector), want)
    check(ia3_linear(x[0], weight, b, ia3_l=ia3_l[0])[None], x[:1], weight, b, ia3_l, None)


def peft_layer(weight, bias, ia3_l, is_feedforward):
    """PEFT's own layer over a torch.nn.Linear, with this vector in this vector's dtype."""
    layer = pytest.importorskip("peft.tuners.ia3.layer")
    from peft import IA3Config

    base = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    base.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    peft = layer.Linear(base, "default", IA3Config(), is_feedforward=is_feedforward).requires_grad_(False)
    vector = ia3_l.view_as(peft.ia3_l["default"])  # [N, 1], or [1, K]
    peft.ia3_l["default"] = torch.nn.Parameter(vector.clone())
    return peft


@pytest.mark.skipif(KERNELS, reason="PEFT's bits are those of F.linear, which the fused kernels do not call")
@pytest.mark.parametrize("is_feedforward", [False, True], ids=["output", "feedforward"])
@pytest.mark.parametrize("l_dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_equals_peft(bias, l_dtype, is_feedforward, dtype):
    if is_feedforward and l_dtype not in (torch.float32, dtype):
        pytest.skip("PEFT casts x to the vector's dtype first, which loses bits; the product here is taken in fp32")
    for shape in ((1, 64, 32), (33, 70, 31), (2, 5, 48, 64)):
        *lead, N, K = shape
        _, weight, b, ia3_l = make(1, N, K, dtype, 1, bias=bias, is_feedforward=is_feedforward, l_dtype=l_dtype)
        peft = peft_layer(weight, b, ia3_l, is_feedforward)
        x, dy = torch.randn(*lead, K).to(dtype).requires_grad_(), torch.randn(*lead, N).to(dtype)
        want = peft(x)
        got = ia3_linear(x, weight, b, ia3_l=ia3_l, is_feedforward=is_feedforward)
        assert torch.equal(got, want)
        vector = torch.nn.Parameter(ia3_l.clone())
        dx, dl = torch.autograd.grad(
            ia3_linear(x, weight, b, ia3_l=vector, is_feedforward=is_feedforward), (x, vector), dy
        )
        dx_peft, dl_peft = torch.autograd.grad(want, (x, peft.ia3_l["default"]), dy)
        assert torch.equal(dx, dx_peft)
        x64, weight64, b64, dy64 = doubled(x, weight, b, dy)
        exact = dy64 @ weight64 * x64 if is_feedforward else dy64 * F.linear(x64, weight64, b64)
        assert_like_torch(dl.flatten(), dl_peft.flatten(), exact.flatten(0, -2).sum(0))


PLACEMENTS = {
    "output": {},
    "relu": {"activation": "relu"},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "silu": {"activation": "silu"},
    "feedforward": {"is_feedforward": True},
}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(
    "shape",
    [(1, 48, 144), (1, 257, 136), (7, 67, 35), (80, 48, 48), (66 if INTERPRET else 300, 48, 32)],
    ids=lambda s: f"M{s[0]}-N{s[1]}-K{s[2]}",
)
def test_gradients(shape, placement, dtype):
    kwargs, M = PLACEMENTS[placement], shape[0]
    tensors = make(*shape, dtype, bias=M != 80, is_feedforward=placement == "feedforward")
    ids = ids_like("sorted" if INTERPRET and M > 64 else "uniform", M, 3)
    ids[0] = 1  # torch gives a table that no row reads no gradient at all
    dy = torch.randn(M, shape[1], device=DEVICE).to(dtype)

    def ours(x, weight, bias, ia3_l):
        return ia3_linear(x, weight, bias, ia3_l=ia3_l, task_ids=ids, **kwargs)

    def torchs(x, weight, bias, ia3_l):
        return expected(x, weight, bias, ia3_l, ids.tolist(), **kwargs)

    got, same = gradients(ours, tensors, dy), gradients(torchs, tensors, dy)
    fp64 = gradients(torchs, doubled(*tensors), dy.double())
    if "activation" not in kwargs and not truncates(dtype):
        assert torch.equal(got[0], same[0])
    for name, a, b, c, leaf in zip(("dx", "dweight", "dbias", "dl"), got, same, fp64, tensors, strict=True):
        if leaf is None:
            continue
        assert a.shape == leaf.shape and a.dtype == leaf.dtype, name
        assert torch.equal(a.isnan(), c.isnan()), name
        if truncates(dtype):  # sums of truncated terms: every term is up to an ulp off, all in one direction
            assert (a.double() - c).abs().max() <= 2**-6 * c.abs().max() + 2**-7, name
        else:
            assert_like_torch(a, b, c)


@pytest.mark.parametrize("l_dtype", DTYPES, ids=name_of)
def test_gradient_has_the_vectors_dtype(l_dtype, dtype):
    for is_feedforward in (False, True):
        tensors = make(9, 24, 16, dtype, l_dtype=l_dtype, is_feedforward=is_feedforward)
        ids, dy = ids_like("uniform", 9, 3), torch.randn(9, 24, device=DEVICE).to(dtype)

        def ours(x, weight, bias, ia3_l, ids=ids, ff=is_feedforward):
            return ia3_linear(x, weight, bias, ia3_l=ia3_l, task_ids=ids, is_feedforward=ff)

        def torchs(*tensors, ids=ids, ff=is_feedforward):
            return expected(*tensors, ids.tolist(), is_feedforward=ff)

        got, fp64 = gradients(ours, tensors, dy), gradients(torchs, doubled(*tensors), dy.double())
        assert [t.dtype for t in got] == [dtype, dtype, dtype, l_dtype]
        torch.testing.assert_close(got[3].double(), fp64[3], rtol=3e-2, atol=3e-2)


def test_gradcheck_in_fp64():
    for kwargs in PLACEMENTS.values():
        for M, N, K, num_tasks in ((1, 3, 2, 1), (5, 4, 3, 2)):
            tensors = doubled(*make(M, N, K, num_tasks=num_tasks, is_feedforward="is_feedforward" in kwargs))
            tensors = [t.requires_grad_() for t in tensors]
            ids = ids_like("uniform", M, num_tasks)
            assert torch.autograd.gradcheck(
                lambda x, w, b, v, ids=ids, kwargs=kwargs: ia3_linear(x, w, b, ia3_l=v, task_ids=ids, **kwargs),
                tensors,
                eps=1e-6,
                atol=1e-5,
            )


@pytest.mark.parametrize("placement", ["output", "silu", "feedforward"])
def test_gradient_only_where_asked(placement, dtype):
    kwargs = PLACEMENTS[placement]
    tensors = make(6, 20, 12, dtype, is_feedforward=placement == "feedforward")
    ids, dy = ids_like("distinct", 6, 3), torch.randn(6, 20, device=DEVICE).to(dtype)

    def f(x, weight, bias, ia3_l):
        return ia3_linear(x, weight, bias, ia3_l=ia3_l, task_ids=ids, **kwargs)

    everything = gradients(f, tensors, dy)
    for asked in range(1, 15):
        asked = [bool(asked & 1 << i) for i in range(4)]
        for got, want, wanted in zip(gradients(f, tensors, dy, asked), everything, asked, strict=True):
            assert (got is not None) == wanted and (not wanted or torch.equal(got, want))
    assert not f(*tensors).requires_grad
    with torch.no_grad():
        assert not f(*(t.detach().requires_grad_() for t in tensors)).requires_grad


# placement, what needs a gradient -> what of the size of an activation is saved
SAVED = [
    ("output", "x", ""),
    ("output", "b", ""),
    ("output", "xb", ""),
    ("output", "l", "z"),
    ("output", "xl", "z"),
    ("output", "w", "x"),
    ("output", "xwbl", "xz"),
    ("silu", "x", "z"),
    ("silu", "b", "z"),
    ("silu", "l", "z"),
    ("silu", "w", "xz"),
    ("silu", "xwbl", "xz"),
    ("feedforward", "x", ""),
    ("feedforward", "b", ""),
    ("feedforward", "l", "x"),
    ("feedforward", "w", "x"),
    ("feedforward", "xwbl", "x"),
]


@pytest.mark.parametrize(("placement", "grad", "saved"), SAVED, ids=[f"{p}-{g}" for p, g, _ in SAVED])
@pytest.mark.parametrize("M", [50, 90])
def test_saved_for_backward(M, placement, grad, saved, dtype):
    N, K = 48, 32
    tensors = dict(zip("xwbl", make(M, N, K, dtype, is_feedforward=placement == "feedforward"), strict=True))
    for name in grad:
        tensors[name].requires_grad_()
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        ids = ids_like("sorted", M, 3)
        y = ia3_linear(
            tensors["x"], tensors["w"], tensors["b"], ia3_l=tensors["l"], task_ids=ids, **PLACEMENTS[placement]
        )
    large = sorted("x" if t.shape[-1] == K else "z" for t in found if t.dim() > 1 and t.shape[0] == M)
    assert "".join(large) == saved, [(t.shape, t.dtype) for t in found]
    held = {t.untyped_storage().data_ptr() for t in tensors.values()} | {ids.untyped_storage().data_ptr()}
    for t in found:
        if t.numel() >= M * K:
            assert t.dtype == dtype, "an activation in another dtype"
        if t.untyped_storage().data_ptr() not in held:
            assert t.shape == (M, N), "a copy of an input"
    y.sum().backward()
    assert all((t.grad is not None) == (name in grad) for name, t in tensors.items())


@pytest.mark.parametrize(("placement", "grad", "saved"), SAVED, ids=[f"{p}-{g}" for p, g, _ in SAVED])
def test_z_is_written_only_where_it_is_saved(placement, grad, saved, monkeypatch):
    """The operator's last argument: z is an output of its own, that costs a write even if nobody keeps it."""
    asked, op = [], ops._op
    monkeypatch.setattr(ops, "_op", lambda *args, **kwargs: asked.append(args[-1]) or op(*args, **kwargs))
    tensors = dict(zip("xwbl", make(6, 8, 4, num_tasks=1, is_feedforward=placement == "feedforward"), strict=True))
    for name in grad:
        tensors[name].requires_grad_()
    for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with context:
            ia3_linear(tensors["x"], tensors["w"], tensors["b"], ia3_l=tensors["l"], **PLACEMENTS[placement])
    assert asked == ["z" in saved, False, False]


def launched(seen):
    """Of each launch of a linear kernel: vector, small, split, or the large one's way to select tasks."""

    def kind(name, kwargs):
        if "vector" in name:
            return "vector"
        return kwargs["TASKS"] if "SPLIT" not in kwargs else "split" if kwargs["SPLIT"] > 1 else "small"

    return [kind(name, kwargs) for name, kwargs in seen if name.startswith("ia3_linear")]


# sequences, rows of each, rows: a tile that two sequences share, three, many; none a multiple of the tile
TILES = {
    "one": (None, 150, "one"),
    "two of 128": (2, 128, "two"),
    "two of 129": (2, 129, "two"),
    "two of 150": (2, 150, "two"),
    "three of 171": (3, 171, "two"),
    "two of 127": (2, 127, "runs"),
    "three of 60": (3, 60, "runs"),
    "five of 31": (5, 31, "runs"),
    "token": (90, 1, "runs"),
}


@pytest.mark.parametrize("case", TILES)
def test_tasks_of_a_tile(case, dtype):
    """Every way the large kernel applies scales: in fp32 the product of the unscaled result, bit by bit."""
    G, S, mode = TILES[case]
    M, N, K, num_tasks = (G or 1) * S, 16, 16, 1 if G is None else 5
    x, weight, b, ia3_l = make(M, N, K, dtype, num_tasks)
    ids = None if G is None else torch.tensor([4, -1, 0, 3, 1], device=DEVICE)[torch.randperm(G, device=DEVICE) % 5]
    rows = None if G is None else ids.repeat_interleave(S).tolist()
    tensor = x if G is None else x.view(G, S, K)
    plan = None if G is None else plan_tasks(ids, M, num_tasks)
    with launches(ops.kernels) as seen:
        y = ia3_linear(tensor, weight, b, ia3_l=ia3_l, task_ids=ids).view(M, N)
        same = ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=plan)
    assert launched(seen) == ([mode, mode] if fused(dtype) else [])
    check(y, x, weight, b, ia3_l, rows)
    assert torch.equal(y, same)
    if dtype == torch.float32:
        assert torch.equal(y, ia3_linear(x, weight, b, ia3_l=torch.ones(N, device=DEVICE)) * scales(ia3_l, rows, dtype))


def test_packed_sequences_around_the_tile(dtype):
    """Sequences of 127, 128, 129, 1 and 0 rows one after another: tiles with one, two and three tasks, by a plan."""
    lengths = torch.tensor([127, 1, 0, 129, 2, 40], device=DEVICE)
    M, ids = int(lengths.sum()), torch.tensor([1, 0, 3, 2, -1, 3], device=DEVICE)
    x, weight, b, ia3_l = make(M, 32, 16, dtype, 4)
    plan = plan_tasks(ids, M, 4, cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)))
    with launches(ops.kernels) as seen:
        y = ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=plan)
    assert launched(seen) == (["runs"] if fused(dtype) else [])
    check(y, x, weight, b, ia3_l, ids.repeat_interleave(lengths).tolist())


needs_kernels = pytest.mark.skipif(not KERNELS, reason="a question where kernels run")


@needs_kernels
@pytest.mark.parametrize(
    ("M", "N", "K", "offset", "transposed", "kernel"),
    [
        (1, 48, 32, 0, False, "vector"),
        (4, 48, 32, 0, False, "vector"),
        (4, 48, 32, 0, True, "small"),  # its loads run along K
        (4, 40, 32, 0, False, "vector"),
        (4, 48, 24, 0, False, "small"),
        (4, 48, 32, 1, False, "small"),
        (4, 48, 512, 0, True, "split"),
        (5, 48, 32, 0, False, "small"),
        (5, 48, 1008, 0, False, "small"),
        (5, 48, 1024, 0, False, "split"),
        (64, 48, 496, 0, False, "small"),
        (64, 48, 512, 0, False, "split"),
        (65, 48, 32, 0, False, "small"),  # few tiles: too few for the large kernel to fill a GPU
        (65, 48, 512, 0, True, "split"),
        (65, 40, 512, 0, False, "split"),
        (65, 48, 520, 0, False, "small"),
        (65, 48, 512, 1, False, "small"),
        (1024, 128, 16, 0, False, "small"),
        (520, 1536, 16, 0, False, "runs"),  # counts as 1024 rows: 96 tiles fill half of an H200
        (1025, 48, 16, 0, True, "runs"),
    ],
)
def test_which_kernel_runs(M, N, K, offset, transposed, kernel, real_rule):
    dtype = torch.float16
    _, weight, b, ia3_l = make(M, N, K, dtype)
    weight = weight.t().contiguous().t() if transposed else weight
    x, ids = torch.randn(M * K + offset, device=DEVICE).to(dtype)[offset:].view(M, K), ids_like("sorted", M, 3)
    with launches(ops.kernels) as seen:
        y = ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=ids)
    assert launched(seen) == [kernel]
    check(y, x, weight, b, ia3_l, ids.tolist())


def prologue(x, weight, b, ia3_l, ids, num_tasks=3):
    """ia3_linear of the input side, and whether its kernel scaled x on the way to the tensor cores."""
    with launches(ops.kernels) as seen, peft_ops.set_backend("auto" if INTERPRET else "triton"):
        y = ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=ids, is_feedforward=True)
    return y, [name for name, _ in seen] == ["ia3_linear_feedforward_kernel"]


@needs_kernels
@pytest.mark.parametrize("transposed", [False, True], ids=["nk", "kn"])
@pytest.mark.parametrize("tasks", ["one", "sequences", "plan", "base", "bad"])
def test_feedforward_prologue(tasks, transposed, dtype):
    """Tiles of one task each: x is scaled and rounded in registers, as the pass of its own would have done it."""
    if not fused(dtype):
        pytest.skip("fp32 runs on F.linear")
    for B, S, N, K in ((3, 128, 48, 80), (1, 256, 144, 64)):
        x, weight, b, ia3_l = make(B * S, N, K, dtype, is_feedforward=True, bias=N == 48)
        weight = weight.t().contiguous().t() if transposed else weight
        x = torch.cat([x, x + NAN], 1)[:, :K].view(B, S, K)  # strided rows
        ids = {"base": [-1] * 3, "bad": [1, 7, -1]}.get(tasks, [2, 0, -1])[:B]
        task_ids = torch.tensor(ids, device=DEVICE)
        if tasks == "one":
            ids, task_ids, ia3_l = [0] * B, None, ia3_l[0]
        elif tasks == "plan":
            task_ids = plan_tasks(task_ids, B * S, 3)
        with guarded_allocations():
            y, fused_in = prologue(x, weight, b, ia3_l, task_ids)
        assert fused_in
        table, rows = ia3_l.view(-1, K), [i for i in ids for _ in range(S)]
        bad, rows = torch.tensor([i == 7 for i in rows], device=DEVICE), [i if i != 7 else -1 for i in rows]
        want = expected(x.reshape(-1, K), weight, b, table, rows, is_feedforward=True)
        fp64 = expected(*doubled(x.reshape(-1, K), weight, b, table), rows, is_feedforward=True)
        y = y.view(B * S, N)
        assert y[bad].isnan().all()
        assert_like_torch(y[~bad], want[~bad], fp64[~bad])


@needs_kernels
def test_feedforward_prologue_needs_tiles_of_one_task():
    """Tiles that two tasks share, few rows, unaligned rows: a pass of its own scales x, and the bits are PEFT's."""
    for B, S, N, K in (
        (3, 64, 48, 64),
        (2, 192, 48, 64),
        (130, 1, 48, 64),
        (1, 64, 48, 64),
        (1, 128, 40, 64),
        (1, 128, 48, 24),
    ):
        x, weight, b, ia3_l = make(B * S, N, K, torch.float16, is_feedforward=True)
        ids = ids_like("uniform", B, 3)
        y, fused_in = prologue(x.view(B, S, K), weight, b, ia3_l, ids)
        assert not fused_in, (B, S, N, K)
        check(y.view(B * S, N), x, weight, b, ia3_l, ids.repeat_interleave(S).tolist(), is_feedforward=True)


@needs_kernels
def test_feedforward_prologue_rows_are_independent():
    x, weight, b, ia3_l = make(384, 32, 48, torch.float16, is_feedforward=True)
    x, ids = x.view(3, 128, 48), torch.tensor([0, 2, 1], device=DEVICE)
    want, fused_in = prologue(x, weight, b, ia3_l, ids)
    assert fused_in
    for other in (-1, 0, 2):
        x2, ids2 = x.clone(), ids.clone()
        x2[[0, 2]], ids2[[0, 2]] = torch.randn_like(x2[[0, 2]]) * 100, other
        x2[0, 3, 5] = NAN
        assert torch.equal(prologue(x2, weight, b, ia3_l, ids2)[0][1], want[1])


@needs_kernels
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("M", [1, 2, 3, 4])
def test_vector_kernel(M, activation, dtype):
    """Columns past N, K that ends inside a step, ids of one row and of all, strided rows, z beside y."""
    if not fused(dtype):
        pytest.skip("fp32 runs on F.linear")
    bad = torch.tensor([2, -1, 7, 0], device=DEVICE)
    for N, K, ids, bias in ((21, 144, bad[:M], True), (5, 1040, bad[:1], False), (16, 16, None, True)):
        x, weight, b, ia3_l = make(M, N, K, dtype, 3, bias=bias)
        x, weight = torch.cat([x, x + NAN], 1)[:, :K], torch.cat([weight, weight + NAN], 1)[:, :K]
        with guarded_allocations():
            y, z = torch.empty((M, N), dtype=dtype, device=DEVICE), torch.empty((M, N), dtype=dtype, device=DEVICE)
            ops._launch_vector(x, weight, b, ia3_l, ids, activation, y, z, 90)
        rows = [0] * M if ids is None else (ids if len(ids) == M else ids.repeat(M)).tolist()
        good = [i for i, t in enumerate(rows) if t < 3]
        check(y[good], x[good], weight, b, ia3_l, [rows[i] for i in good], activation)
        check(z, x, weight, b, ia3_l, [-1] * M)
        assert y[[i for i in range(M) if i not in good]].isnan().all()


# rows, task_ids, K: few enough tiles that K is split, up to 1024 rows. It ends inside a step, and inside the last part
SPLITS = {"5": (5, 5, 1040), "64": (64, 4, 528), "65": (65, 5, 1040), "200": (200, 200, 528), "1024": (1024, 8, 528)}


@pytest.mark.parametrize("case", SPLITS)
def test_split_k(case, dtype, real_rule):
    """y, and the z of the backward, as good as torch's: without the extra room that fp32 has elsewhere."""
    M, G, K = SPLITS[case]
    if INTERPRET and M == 1024:
        M = 136
    x, weight, b, ia3_l = tensors = make(M, 48, K, dtype)
    ids = ids_like("uniform", G, 3)
    rows = ids.repeat_interleave(M // G).tolist()
    with launches(ops.kernels) as seen:
        y, z = torch.ops.peft_ops.ia3_linear(*tensors, ids, None, M // G, "silu", False, True)
    assert launched(seen) == (["split"] if fused(dtype) else [])
    same, fp64 = expected(*tensors, rows, "silu"), expected(*doubled(*tensors), rows, "silu")
    assert_as_good_as_torch(y, same, fp64)
    assert_as_good_as_torch(z, F.linear(x, weight, b), F.linear(*doubled(x, weight, b)))


@needs_kernels
def test_split_k_adds_its_parts_in_ascending_order(dtype, monkeypatch):
    if not fused(dtype):
        pytest.skip("fp32 runs on F.linear")
    workspaces, real = [], ops.split_workspace
    monkeypatch.setattr(ops, "split_workspace", lambda *args: workspaces.append(real(*args)) or workspaces[-1])
    x, weight, b, ia3_l = make(5, 80, 4096, dtype)
    ids = torch.tensor([1, -1, 0, 2, 1], device=DEVICE)
    y = ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=ids)
    ((part, count),) = workspaces
    assert part.shape == (8, 5, 80) and not count.any()
    for p, xs, ws in zip(part, x.float().chunk(8, 1), weight.float().chunk(8, 1), strict=True):
        torch.testing.assert_close(p, xs @ ws.t())
    up, down = torch.zeros_like(part[0]), torch.zeros_like(part[0])
    for p, q in zip(part, part.flip(0), strict=True):
        up, down = up + p, down + q
    assert not torch.equal(up, down), "no order to see"
    want = ((up + b.float()) * scales(ia3_l, ids.tolist(), torch.float32)).to(dtype)
    assert_same(y, want)


@pytest.mark.skipif(not INTERPRET, reason="only the interpreter lets a test choose the order of programs")
def test_split_k_does_not_depend_on_who_arrives_last(dtype, monkeypatch):
    from triton.runtime.interpreter import interpreter_builder as builder

    x, weight, b, ia3_l = make(5, 80, 4096, dtype)
    ids, first = ids_like("uniform", 5, 3), builder.set_grid_idx
    want = ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=ids)
    for order in ([7, 6, 5, 4, 3, 2, 1, 0], [3, 0, 7, 1, 6, 2, 5, 4]):
        seen = []
        monkeypatch.setattr(
            builder, "set_grid_idx", lambda i, j, k, order=order, seen=seen: seen.append(j) or first(i, order[j], k)
        )
        assert torch.equal(ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=ids), want)
        assert max(seen) == 7


@needs_kernels
def test_split_k_leaves_its_counters_zero(monkeypatch):
    """One pool serves launches of every shape, one after another, as on a stream."""
    cases = [make(*shape, torch.float16) for shape in ((5, 80, 1024), (40, 400, 1024), (5, 80, 4096), (5, 80, 1024))]
    ids = torch.tensor([1, -1, 0, 2, 2], device=DEVICE)

    def run(x, weight, b, ia3_l):
        return ia3_linear(x.view(5, -1, x.shape[1]), weight, b, ia3_l=ia3_l, task_ids=ids)

    want = [run(*tensors) for tensors in cases]
    pool, asked = torch.zeros(64, dtype=torch.int32, device=DEVICE), []
    monkeypatch.setattr(ops, "_counters", lambda x, count: asked.append(count) or pool)
    for tensors, y in zip(cases, want, strict=True):
        assert torch.equal(run(*tensors), y)
        assert not pool.any()
    assert asked == [2, 7, 2, 2]


@pytest.mark.parametrize("M", [5, 70])
def test_split_k_keeps_rows_independent(M, dtype, real_rule):
    x, weight, b, ia3_l = make(M, 48, 1024 if M == 5 else 512, dtype)
    ids, row = ids_like("uniform", M, 3), M - 2
    ids[row] = 1
    before = ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=ids)[row].clone()
    others = torch.arange(M, device=DEVICE) != row
    x[others], ids[others], ia3_l[::2] = torch.randn_like(x[others]), -1, NAN
    x[0], x[2, 500], ids[0] = NAN, INF, 2
    with launches(ops.kernels) as seen:
        after = ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=ids)
    assert torch.equal(after[row], before) and after[0].isnan().all()
    assert launched(seen) == (["split"] if fused(dtype) else [])


def test_split_k_repeats_bitwise(dtype):
    x, weight, b, ia3_l = make(9, 48, 2048, dtype)
    ids = ids_like("uniform", 9, 3)
    first = ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=ids)
    for _ in range(250 if DEVICE == "cuda" else 50 if dtype == torch.float16 else 3):
        assert torch.equal(ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=ids), first)


def test_more_tiles_than_one_group(dtype):
    """Eight row tiles form a group, that reuses the weight; here are nine, and two columns of tiles."""
    x, weight, b, ia3_l = make(1100, 144, 16, dtype, 1)
    check(ia3_linear(x, weight, b, ia3_l=ia3_l), x, weight, b, ia3_l, None)


@pytest.mark.parametrize("M", [40, 140])
def test_mixed_batch_equals_each_task_alone(M, dtype):
    for num_tasks in (1, 2, 8, 64):
        for placement in ("output", "silu") if num_tasks == 8 else ("output",):
            x, weight, b, ia3_l = make(M, 32, 16, dtype, num_tasks)
            ids = ids_like("sorted" if INTERPRET and M > 64 else "uniform", M, num_tasks)
            if INTERPRET and num_tasks == 64 and M > 64:
                ids = ids[:1].expand(5).repeat_interleave(M // 5).clone()
                ids[: M // 2] = 63
            mixed = ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=ids, **PLACEMENTS[placement])
            for t in list(set(ids.tolist()))[: 2 if INTERPRET and M > 64 else 4]:
                alone = ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=torch.full_like(ids, t), **PLACEMENTS[placement])
                assert torch.equal(mixed[ids == t], alone[ids == t])
                if t >= 0 and num_tasks == 8:
                    one = ia3_linear(x, weight, b, ia3_l=ia3_l[t], **PLACEMENTS[placement])
                    assert torch.equal(mixed[ids == t], one[ids == t])


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRET, reason="asks oneDNN's matmuls")
@pytest.mark.parametrize("size", [1, 3, 31, 34, 64, 68, 257])
@pytest.mark.parametrize("is_feedforward", [False, True], ids=["output", "feedforward"])
def test_a_neighbours_nan_stays_out_of_the_vendors_matmul(is_feedforward, size):
    """bf16 on a CPU with AMX, where rows of some lengths read the next one; both ways, and in all linear operators."""
    M, dtype = 80, torch.bfloat16
    x, weight, b, ia3_l = make(M, size, size, dtype, 4, is_feedforward=is_feedforward)
    ids, clean = torch.arange(M) % 4, torch.randn(M, size).to(dtype)

    def results(x, dy):
        x = x.clone().requires_grad_()
        y = ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=ids, is_feedforward=is_feedforward)
        k, v = peft_ops.ia3_kv_linear(x, weight, weight, k_ia3_l=ia3_l, v_ia3_l=ia3_l, task_ids=ids)
        h = peft_ops.ia3_glu_linear(x, weight, weight, ia3_l=ia3_l, task_ids=ids)
        return [y, k, v, h, *(torch.autograd.grad(out, x, dy, retain_graph=True)[0] for out in (y, k, v, h))]

    want = results(x, clean)
    for row in (0, 7, M - 2):
        others = torch.arange(M) != row
        bad_x, bad_dy = x.clone(), clean.clone()
        bad_x[others], bad_dy[others] = NAN, INF
        for got, kept in zip(results(bad_x, bad_dy), want, strict=True):
            assert torch.equal(got[row], kept[row])
    between = torch.full((M, 3, size), NAN, dtype=dtype)  # rows of x, with others' between them
    between[:, 1] = x
    y = ia3_linear(between[:, 1], weight, b, ia3_l=ia3_l, task_ids=ids, is_feedforward=is_feedforward)
    assert torch.equal(y, want[0])
    swapped = between[:, 1:2].transpose(0, 1)  # 3-D and strided: the bias is added, or fused, in another rounding
    plain = ia3_linear(swapped, weight, b, ia3_l=ia3_l, task_ids=ids[None], is_feedforward=is_feedforward)
    between[5, 1] = NAN
    one_bad = ia3_linear(swapped, weight, b, ia3_l=ia3_l, task_ids=ids[None], is_feedforward=is_feedforward)
    assert torch.equal(one_bad[0, torch.arange(M) != 5], plain[0, torch.arange(M) != 5])


@pytest.mark.parametrize("placement", ["output", "gelu_tanh", "feedforward"])
def test_rows_are_independent(placement, dtype):
    """Other rows get other ids, NaN and Inf, and their tasks NaN and Inf in the vectors: this row stays, bit by bit."""
    generator = torch.Generator().manual_seed(1)

    def random(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    for i in range(8 if INTERPRET else 40):
        M, N, K = (
            (random(65, 90), 16 * random(1, 3), 16 * random(1, 3))
            if i % 4 == 0
            else (random(2, 40), random(1, 40), random(1, 40))
        )
        x, weight, b, ia3_l = make(M, N, K, dtype, 4, is_feedforward=placement == "feedforward")
        row = random(0, M)
        ids = ids_like("sorted", M, 4)
        before = ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=ids, **PLACEMENTS[placement])[row].clone()
        others, mine = torch.arange(M, device=DEVICE) != row, int(ids[row])
        x[others] = torch.randn(M - 1, K, device=DEVICE).to(dtype)
        x[others] *= torch.tensor([1, NAN, INF], device=DEVICE)[torch.randint(0, 3, (M - 1, 1), device=DEVICE)].to(
            dtype
        )
        ids[others] = ids_like("sorted", M - 1, 4)
        for t in range(4):
            if t != mine:
                ia3_l[t, torch.randint(0, ia3_l.shape[1], (1,))] = (NAN, INF, -INF, 0.0)[t]
        assert torch.equal(ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=ids, **PLACEMENTS[placement])[row], before)


@pytest.mark.skipif(not KERNELS, reason="F.linear does not promise the same bits at another place of the batch")
@pytest.mark.parametrize("S", [5, 14])
def test_order_of_sequences_does_not_matter(S, dtype):
    B = 6
    x, weight, b, ia3_l = make(B * S, 32, 48, dtype)
    x, ids = x.view(B, S, 48), ids_like("uniform", B, 3)
    whole = ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=ids, activation="silu")
    for _ in range(3):
        order = torch.randperm(B, device=DEVICE)
        got = ia3_linear(x[order], weight, b, ia3_l=ia3_l, task_ids=ids[order], activation="silu")
        if DEVICE == "cuda" and fused(dtype):
            assert torch.equal(got, whole[order])
        else:  # the interpreter multiplies by numpy, whose rows at the edge of a block are summed in another order
            torch.testing.assert_close(
                got, whole[order], rtol=2e-2 if truncates(dtype) else None, atol=1e-2 if truncates(dtype) else None
            )


@pytest.mark.parametrize("M", [10, 80])
def test_base_rows_are_the_unscaled_result(M, dtype):
    for placement, kwargs in PLACEMENTS.items():
        x, weight, b, ia3_l = make(M, 32, 16, dtype, is_feedforward=placement == "feedforward")
        x[0], x[3, 0], ia3_l[:] = 0, INF, NAN
        ids = torch.where(torch.arange(M, device=DEVICE) < M // 2, -1, 1)
        y = ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=ids, **kwargs)
        bare = ia3_linear(x, weight, b, ia3_l=torch.ones_like(ia3_l), task_ids=torch.zeros_like(ids), **kwargs)
        assert_same(y[: M // 2], bare[: M // 2], bitwise=True)
        assert y[M // 2 :].isnan().all()
        if "activation" not in kwargs and not fused(dtype):
            assert_same(y[: M // 2], F.linear(x, weight, b)[: M // 2], bitwise=True)


@pytest.mark.parametrize("placement", ["output", "silu", "feedforward"])
@pytest.mark.parametrize("bad", BAD_IDS)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_bad_id(bad, ids_dtype, placement, dtype):
    kwargs = PLACEMENTS[placement]
    for M in (4,) if INTERPRET and ids_dtype == torch.int32 else (4, 68):
        x, weight, b, memory = make(M, 32, 16, dtype, 9, is_feedforward=placement == "feedforward")
        # beside the table stand numbers: a read there would not give the NaN that is asked for
        table, kept = memory[3:6], memory.clone()
        ids = torch.tensor([0, bad, -1, 2], dtype=ids_dtype, device=DEVICE).repeat_interleave(M // 4)
        if not KERNELS:
            with pytest.raises(
                IndexError, match=rf"^ia3_linear: task_ids must be in \[-1, 3\), got {bad} at position {M // 4}$"
            ):
                ia3_linear(x, weight, b, ia3_l=table, task_ids=ids, **kwargs)
            continue
        y = ia3_linear(x, weight, b, ia3_l=table, task_ids=ids, **kwargs)
        good = torch.tensor([t != bad for t in ids.tolist()], device=DEVICE)
        assert y[~good].isnan().all() and y[good].isfinite().all()
        ids = torch.where(good, ids, 0)
        assert torch.equal(y[good], ia3_linear(x, weight, b, ia3_l=kept[3:6], task_ids=ids, **kwargs)[good])
        assert torch.equal(memory, kept)


# sequences, rows of each, N, K -> the kernel. In the large one's tiles: two tasks, three, and one per row
KERNELS_WITH_IDS = {
    "vector": (4, 1, 32, 32, "vector"),
    "small": (4, 5, 33, 19, "small"),
    "split": (4, 5, 48, 1024, "split"),
    "two": (4, 140, 32, 32, "two"),
    "runs": (4, 50, 32, 32, "runs"),
    "token": (90, 1, 32, 32, "runs"),
}


@needs_kernels
@pytest.mark.parametrize("bad", BAD_IDS)
@pytest.mark.parametrize("case", KERNELS_WITH_IDS)
def test_bad_id_in_every_kernel(case, bad):
    """NaN in its own rows of y, written there; z, the other rows, and what stands around all tensors stay right."""
    G, S, N, K, kernel = KERNELS_WITH_IDS[case]
    x, weight, b, memory = make(G * S, N, K, torch.float16, 9)
    table, kept = memory[3:6], memory.clone()
    ids = torch.tensor([0, bad, -1, 2], device=DEVICE).repeat(-(-G // 4))[:G]
    rows = ids.repeat_interleave(S)
    with launches(ops.kernels) as seen, guarded_allocations():
        y, z = ops.launch_linear(x, weight, b, table, ids, None, S, None, True)
    assert launched(seen) == [kernel]
    assert y[rows == bad].isnan().all() and torch.equal(memory, kept)
    good = rows != bad
    check(y[good], x[good], weight, b, table, rows[good].tolist())
    check(z, x, weight, b, table, [-1] * (G * S))


@pytest.mark.skipif(KERNELS, reason="on a GPU a bad id gives NaN, without a synchronisation")
def test_bad_id_of_64_bits_and_of_an_uncovered_row():
    x, weight, b, ia3_l = make(6, 8, 8)
    with pytest.raises(IndexError, match="got 4294967296 at position 1"):
        ia3_linear(x[:2], weight, b, ia3_l=ia3_l, task_ids=torch.tensor([0, 2**32]))
    plan = plan_tasks(torch.tensor([1]), 6, 3, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(IndexError, match=r"^ia3_linear: task_ids must be in \[-1, 3\), got -2 at position 5$"):
        ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=plan)


@pytest.mark.skipif(not KERNELS, reason="on a CPU a bad id raises before a gradient exists")
@pytest.mark.parametrize("placement", ["output", "silu", "feedforward"])
@pytest.mark.parametrize("M", [3, 66])
def test_bad_id_has_nan_gradient_of_its_own_row_only(M, placement):
    x, weight, b, ia3_l = make(M, 16, 16, is_feedforward=placement == "feedforward")
    ids = torch.tensor([1, 7, 1], device=DEVICE).repeat_interleave(M // 3)

    def f(x, weight, bias, ia3_l):
        return ia3_linear(x, weight, bias, ia3_l=ia3_l, task_ids=ids, **PLACEMENTS[placement])

    dx, _, _, dl = gradients(f, (x, weight, b, ia3_l), torch.ones(M, 16, device=DEVICE), [True, False, False, True])
    assert dx[ids == 7].isnan().all() and dx[ids == 1].isfinite().all() and dl.isfinite().all()
    assert torch.equal(dl[[0, 2]], torch.zeros_like(dl[[0, 2]])) and dl[1].any()


def test_guards_stay_intact():
    generator = torch.Generator().manual_seed(2)

    def random(high, low=1):
        return int(torch.randint(low, high, (1,), generator=generator))

    for i in range(24 if INTERPRET else 200):
        M, N, K = (
            (random(90, 65), 16 * random(4), 16 * random(4)) if i % 4 == 0 else (random(70), random(70), random(70))
        )
        dtype, num_tasks, is_feedforward = DTYPES[random(3, 0)], random(5), random(4) == 1
        tensors, buffers = zip(
            *(guarded(*s, dtype=d) for s, d in (((M, K), dtype), ((N, K), dtype), ((N,), dtype),
                                                ((num_tasks, K if is_feedforward else N), torch.float32))), strict=True
        )  # fmt: skip
        for t in tensors:
            t.uniform_(-1, 1)
        ids = ids_like("sorted", M, num_tasks)
        y = ia3_linear(*tensors[:3], ia3_l=tensors[3], task_ids=ids, is_feedforward=is_feedforward)
        assert y.isfinite().all(), "read outside a tensor"
        for buffer in buffers:
            assert_guards(buffer)


@pytest.mark.parametrize("placement", ["output", "silu", "feedforward"])
@pytest.mark.parametrize(
    "shape", [(0, 8, 4), (4, 0, 8), (4, 8, 0), (70, 8, 0), (4, 0, 0), (0, 0, 0)], ids=lambda s: "M{}-N{}-K{}".format(*s)
)
def test_zero_sizes(shape, placement, dtype):
    M, N, K = shape
    tensors = make(*shape, dtype, is_feedforward=placement == "feedforward")
    ids = ids_like("uniform", M, 3)

    def f(x, weight, bias, ia3_l):
        return ia3_linear(x, weight, bias, ia3_l=ia3_l, task_ids=ids, **PLACEMENTS[placement])

    y = f(*tensors)
    assert y.shape == (M, N) and y.dtype == dtype
    check(y, *tensors, ids.tolist(), **PLACEMENTS[placement]) if M else None
    dy = torch.randn(M, N, device=DEVICE).to(dtype)
    got = gradients(f, tensors, dy)
    assert all(g.shape == t.shape and g.isfinite().all() for g, t in zip(got, tensors, strict=True))
    assert M or not any(g.any() for g in got)


def test_zero_sequences_and_zero_tokens(dtype):
    _, weight, b, ia3_l = make(1, 8, 4, dtype)
    for lead in ((0, 3), (2, 0), (2, 0, 3)):
        x = torch.randn(*lead, 4, device=DEVICE).to(dtype).requires_grad_()
        ids = torch.zeros(lead[0], dtype=torch.int64, device=DEVICE)
        for task_ids in (ids, plan_tasks(ids, 0, 3)):
            y = ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=task_ids)
            assert y.shape == (*lead, 8)
            assert torch.autograd.grad(y, x, torch.ones_like(y))[0].shape == x.shape


def test_table_without_tasks_serves_the_base_model(dtype):
    for M in (3, 66):
        x, weight, b, _ = make(M, 16, 16, dtype)
        base = torch.full((M,), -1, device=DEVICE)
        got = ia3_linear(x, weight, b, ia3_l=torch.empty(0, 16, device=DEVICE), task_ids=base)
        assert torch.equal(got, ia3_linear(x, weight, b, ia3_l=torch.ones(16, device=DEVICE)))


@pytest.mark.parametrize("w_layout", W_LAYOUTS)
@pytest.mark.parametrize("x_layout", X_LAYOUTS)
def test_layouts(x_layout, w_layout, dtype):
    """Whatever the strides: values, contiguous results, and gradients, of the small kernel and of the large one."""
    sizes = (17 if dtype == torch.float16 else 5,) if INTERPRET else (5, 17)
    for S in sizes:
        x, weight, b, ia3_l = make(4 * S, 48, 32, dtype)
        x, weight = X_LAYOUTS[x_layout](x.view(4, S, 32)), W_LAYOUTS[w_layout](weight)
        leaves, ids = [x.detach().requires_grad_(), weight.detach().requires_grad_()], ids_like("uniform", 4, 3)
        y = out = ia3_linear(*leaves, b, ia3_l=ia3_l, task_ids=ids)
        y = y.detach()
        assert y.is_contiguous()
        rows = ids.repeat_interleave(S).tolist()
        fp64 = expected(*doubled(x.reshape(4 * S, 32), weight, b, ia3_l), rows)
        as_it_came = weight.contiguous() if w_layout == "neither" else weight  # F.linear gets x as it came
        same = (F.linear(x, as_it_came, b).float() * scales(ia3_l, ids.tolist(), torch.float32)[:, None]).to(dtype)
        assert_like_torch(y.view(4 * S, 48), same.view(4 * S, 48), fp64, elementwise=True)
        if not fused(dtype):  # asked again: torch folds a strided x that needs a gradient, and other bits come out
            assert torch.equal(ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=ids), same)
        dy = torch.randn(4, S, 48, device=DEVICE).to(dtype)
        for gradient in (dy, dy.transpose(0, 1).contiguous().transpose(0, 1), dy[:, :1].expand(-1, S, -1)):
            got = torch.autograd.grad(out, leaves, gradient, retain_graph=True)
            dz = (gradient.float() * scales(ia3_l, ids.tolist(), torch.float32)[:, None]).to(dtype)
            want = dz @ weight, dz.flatten(0, 1).t() @ x.reshape(4 * S, 32)
            for a, c in zip(got, want, strict=True):
                if truncates(dtype):
                    assert (a.float() - c.float()).abs().max() <= 2**-5 * c.float().abs().max()
                else:
                    torch.testing.assert_close(a, c)


@pytest.mark.skipif(DEVICE == "cuda", reason="what aten copies is read from the CPU profiler")
@pytest.mark.parametrize("M", [5, 80])
def test_transposed_weight_is_not_copied(M, dtype):
    """A transposed Conv1D weight [K, N]: the operator and its backward read it in place."""
    x, weight, b, ia3_l = make(M, 48, 32, dtype)
    for w in (weight, weight.t().contiguous().t()):
        with torch.profiler.profile(record_shapes=True) as profile:
            y = ia3_linear(x.requires_grad_(), w, b, ia3_l=ia3_l, task_ids=ids_like("sorted", M, 3))
            y.backward(torch.ones_like(y))
        copies = [e for e in profile.events() if e.name in ("aten::copy_", "aten::clone", "aten::contiguous")]
        assert not [e for e in copies if sorted(e.input_shapes[0]) == [32, 48]], copies


@pytest.mark.parametrize("M", [6, 68])
def test_bias_and_table_strided(M, dtype):
    """Read by their strides: views of something wider, and one value for all."""
    x, weight, b, ia3_l = make(M, 48, 32, dtype)
    ids = ids_like("sorted", M, 3)
    want = ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=ids)
    wide, tall = torch.cat([ia3_l, ia3_l], 1)[:, 48:], torch.stack([ia3_l, ia3_l], 1)[:, 0]
    for table in (wide, tall, ia3_l.t().contiguous().t(), torch.stack([ia3_l, ia3_l], -1)[..., 0]):
        assert torch.equal(ia3_linear(x, weight, b, ia3_l=table, task_ids=ids), want)
    every_second, one_for_all = torch.stack([b, b + 1], -1)[:, 0], b[:1].expand(48)
    assert torch.equal(ia3_linear(x, weight, every_second, ia3_l=ia3_l, task_ids=ids), want)
    want = ia3_linear(x, weight, one_for_all.contiguous(), ia3_l=ia3_l, task_ids=ids)
    assert torch.equal(ia3_linear(x, weight, one_for_all, ia3_l=ia3_l, task_ids=ids), want)
    vector = torch.stack([ia3_l[1], ia3_l[2]], 1)[:, 0]
    want = ia3_linear(x, weight, b, ia3_l=vector.contiguous())
    assert torch.equal(ia3_linear(x, weight, b, ia3_l=vector), want)


@pytest.mark.parametrize("placement", ["output", "feedforward"])
@pytest.mark.parametrize("M", [6, 68])
def test_ids_strided(M, placement, dtype):
    """Ids out of a wider tensor: no row may get what stands beside its id, another tenant's or nobody's."""
    x, weight, b, ia3_l = make(M, 32, 32, dtype)
    ids = ids_like("sorted", M, 3)

    def linear(task_ids):
        return ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=task_ids, **PLACEMENTS[placement])

    for beside in (0, 9):
        assert torch.equal(linear(torch.stack([ids, torch.full_like(ids, beside)], 1)[:, 0]), linear(ids))
    assert torch.equal(linear(ids[:1].expand(M)), linear(ids[:1].repeat(M)))


def test_repeats_are_bitwise_equal(dtype):
    for placement, M, times in (("silu", 20, 50), ("feedforward", 20, 50), ("silu", 66, 3 if INTERPRET else 50)):
        if INTERPRET and dtype != torch.float16:
            times = 3
        tensors = make(M, 16, 16, dtype, is_feedforward=placement == "feedforward")
        ids, dy = ids_like("sorted", M, 3), torch.randn(M, 16, device=DEVICE).to(dtype)

        def run(tensors=tensors, placement=placement, ids=ids, dy=dy):
            x, weight, bias, ia3_l = leaves = [t.clone().requires_grad_() for t in tensors]
            y = ia3_linear(x, weight, bias, ia3_l=ia3_l, task_ids=ids, **PLACEMENTS[placement])
            return y, *torch.autograd.grad(y, leaves, dy)

        first = run()
        for _ in range(250 if DEVICE == "cuda" else times):
            assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_loss_scale_of_a_power_of_two_is_exact():
    for dtype in (torch.float32, torch.bfloat16):
        for kwargs in PLACEMENTS.values():
            tensors = make(9, 16, 8, dtype, is_feedforward="is_feedforward" in kwargs)
            ids, dy = ids_like("uniform", 9, 3), torch.randn(9, 16, device=DEVICE).to(dtype)

            def f(x, weight, bias, ia3_l, ids=ids, kwargs=kwargs):
                return ia3_linear(x, weight, bias, ia3_l=ia3_l, task_ids=ids, **kwargs)

            for got, want in zip(gradients(f, tensors, dy * 1024), gradients(f, tensors, dy), strict=True):
                assert torch.equal(got, want * 1024)


@settings(max_examples=15 if INTERPRET else 60, deadline=None, derandomize=True)
@given(
    st.integers(1, 90), st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.booleans(), st.booleans(),
    st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.sampled_from(list(PLACEMENTS)),
    st.sampled_from(ID_KINDS), st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(M, N, K, num_tasks, aligned, bias, dtype, l_dtype, placement, kind, seed):
    torch.manual_seed(seed)
    N, K = (-(-N // 16) * 16, -(-K // 16) * 16) if aligned else (N, K)
    kwargs = PLACEMENTS[placement]
    x, weight, b, ia3_l = make(
        M, N, K, dtype, num_tasks, bias=bias, is_feedforward=placement == "feedforward", l_dtype=l_dtype
    )
    ids = ids_like(kind, M, num_tasks)
    y = ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=ids, **kwargs)
    want = expected(x, weight, b, ia3_l, ids.tolist(), **kwargs)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 4e-2 if truncates(dtype) else 2e-2}[dtype]
    torch.testing.assert_close(y, want, rtol=tolerance, atol=tolerance * 4)


@pytest.mark.parametrize("is_feedforward", [False, True], ids=["output", "feedforward"])
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=name_of)
def test_autocast(cast, is_feedforward):
    """x, weight and bias as F.linear casts them, ia3_l never; gradients come back in the dtypes of the leaves."""
    x, weight, b, ia3_l = make(7, 24, 16, is_feedforward=is_feedforward)
    ids, dy = ids_like("uniform", 7, 3), torch.randn(7, 24, device=DEVICE).to(cast)

    def autocast(f):
        def run(*tensors):
            with torch.autocast(DEVICE, cast):
                return f(*tensors)

        return run

    @autocast
    def ours(x, weight, bias, ia3_l):
        return ia3_linear(x, weight, bias, ia3_l=ia3_l, task_ids=ids, is_feedforward=is_feedforward)

    @autocast
    def torchs(x, weight, bias, ia3_l):
        scale = scales(ia3_l, ids.tolist(), torch.float32)
        if is_feedforward:
            return F.linear((x.to(cast).float() * scale).to(cast), weight, bias)
        return (F.linear(x, weight, bias).float() * scale).to(cast)

    for tensors in (
        (x, weight, b, ia3_l),
        (x.to(cast), weight, None, ia3_l),
        (x, weight.to(cast), b, ia3_l),
        (x.half(), weight, b, ia3_l),
    ):
        got, want = ours(*tensors), torchs(*tensors)
        assert got.dtype == cast == want.dtype
        quantised = [None if t is None else t.to(cast) for t in tensors[:3]]
        check(got, *quantised, ia3_l, ids.tolist(), is_feedforward=is_feedforward)
        if not fused(cast) or (is_feedforward and not truncates(cast)):
            assert torch.equal(got, want)
        for a, c, leaf in zip(gradients(ours, tensors, dy), gradients(torchs, tensors, dy), tensors, strict=True):
            if leaf is not None:
                assert a.dtype == leaf.dtype
                torch.testing.assert_close(a, c, rtol=3e-2, atol=3e-2)
    assert ours(*doubled(x, weight, b, ia3_l)).dtype == torch.float64


def test_autocast_casts_no_more_than_torch_does():
    x, weight, b, ia3_l = make(7, 24, 16, num_tasks=1)
    with torch.autocast(DEVICE, torch.bfloat16):
        with torch.autocast(DEVICE, enabled=False):
            assert ia3_linear(x, weight, b, ia3_l=ia3_l).dtype == torch.float32
        with pytest.raises(TypeError, match="^ia3_linear: weight must be a tensor, got list$"):
            ia3_linear(x, [1.0], ia3_l=ia3_l)
        with pytest.raises(TypeError, match="^ia3_linear: weight must have dtype .*, got int32$"):
            ia3_linear(x, weight.int(), ia3_l=ia3_l)
        with pytest.raises(TypeError, match="^ia3_linear: bias must have dtype .*, got int64$"):
            ia3_linear(x, weight, b.long(), ia3_l=ia3_l)


OPCHECK_LAYOUTS = {
    "contiguous": lambda: torch.randn(4, 6, 8),
    "permuted": lambda: torch.randn(6, 4, 8).transpose(0, 1),
    "sliced": lambda: torch.randn(4, 12, 8)[:, ::2],
    "empty": lambda: torch.randn(4, 0, 8),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("with_ids", [False, True], ids=["one_task", "ids"])
@pytest.mark.parametrize("placement", ["silu", "feedforward"])
@pytest.mark.parametrize("layout", OPCHECK_LAYOUTS)
def test_opcheck(layout, placement, with_ids, grad):
    x = OPCHECK_LAYOUTS[layout]().to(DEVICE).requires_grad_(grad)
    feedforward = placement == "feedforward"
    weight, b = (
        torch.randn(16, 8, device=DEVICE, requires_grad=grad),
        torch.randn(16, device=DEVICE, requires_grad=grad),
    )
    ia3_l = torch.randn(3 if with_ids else 1, 8 if feedforward else 16, device=DEVICE, requires_grad=grad)
    ids = torch.tensor([0, 2, -1, 1], device=DEVICE) if with_ids else None
    activation, save = None if feedforward else placement, grad and not feedforward
    args = x, weight, b, ia3_l, ids, None, 6 if with_ids else 1, activation, feedforward, save
    torch.library.opcheck(torch.ops.peft_ops.ia3_linear, args)


def test_opcheck_with_a_plan_and_a_large_batch():
    x, weight, _, ia3_l = (t if t is None else t.requires_grad_() for t in make(130, 16, 16, bias=False))
    plan = plan_tasks(torch.tensor([0, 2], device=DEVICE), 130, 3)
    tensors = [plan.tiles, plan.run_index, plan.run_end]
    torch.library.opcheck(
        torch.ops.peft_ops.ia3_linear,
        (x.detach(), weight.detach(), None, ia3_l, plan.task_ids, tensors, 65, None, False, True),
    )
    torch.library.opcheck(
        torch.ops.peft_ops.ia3_linear, (x, weight, None, ia3_l.detach(), None, None, 1, None, False, False)
    )


@pytest.mark.parametrize("placement", ["output", "silu", "feedforward", "plan", "packed"])
def test_compiles_with_dynamic_batches(placement):
    kwargs = PLACEMENTS.get(placement, {})

    def loss(x, weight, bias, ia3_l, ids):
        rows = x.shape[0] * x.shape[1]
        if placement == "plan":
            ids = plan_tasks(ids, rows, 3)
        elif placement == "packed":
            cu_seqlens = torch.arange(x.shape[0] + 1, device=x.device) * x.shape[1]
            ids = plan_tasks(ids, rows, 3, cu_seqlens=cu_seqlens)
        return (ia3_linear(x, weight, bias, ia3_l=ia3_l, task_ids=ids, **kwargs) * 1.5).relu().sum()

    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=frames, fullgraph=True, dynamic=True)
    _, *parameters = (t.requires_grad_() for t in make(1, 16, 16, is_feedforward=placement == "feedforward"))
    for B in (2, 3, 5, 20, 13):
        x, ids = torch.randn(B, 4, 16, device=DEVICE, requires_grad=True), ids_like("uniform", B, 3)
        want, got = loss(x, *parameters, ids), compiled(x, *parameters, ids)
        assert torch.equal(got, want)
        leaves = x, *parameters
        for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
            assert torch.equal(a, b)
    assert frames.frame_count <= 2


def test_compiles_under_autocast_and_with_a_frozen_weight():
    x, weight, b, ia3_l = make(6, 16, 8)
    ids = ids_like("uniform", 6, 3)

    def f(x, ia3_l):
        with torch.autocast(DEVICE, torch.bfloat16):
            return ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=ids, activation="relu")

    torch._dynamo.reset()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    leaves = x.requires_grad_(), ia3_l.requires_grad_()
    got, want = compiled(*leaves), f(*leaves)
    assert torch.equal(got, want) and got.dtype == torch.bfloat16
    dy = torch.randn(6, 16, device=DEVICE).bfloat16()
    for a, c in zip(torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True):
        assert torch.equal(a, c)


@pytest.mark.parametrize("placement", ["silu", "feedforward", "plan"])
def test_exports_and_loads(placement, tmp_path):
    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(16, 16)
            self.ia3_l = torch.nn.Parameter(torch.randn(3, 16))

        def forward(self, x, ids):
            if placement == "plan":
                ids = plan_tasks(ids, x.shape[0] * x.shape[1], 3)
            kwargs = PLACEMENTS.get(placement, {})
            return ia3_linear(x, self.linear.weight, self.linear.bias, ia3_l=self.ia3_l, task_ids=ids, **kwargs)

    module, x, ids = (
        Linear().to(DEVICE),
        torch.randn(4, 5, 16, device=DEVICE),
        torch.tensor([0, 1, -1, 2], device=DEVICE),
    )
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, (x, ids), dynamic_shapes={"x": {0: batch}, "ids": {0: batch}})
    torch.export.save(program, tmp_path / "linear.pt2")
    loaded = torch.export.load(tmp_path / "linear.pt2").module()
    for B in (7, 30):
        x, ids = torch.randn(B, 5, 16, device=DEVICE), ids_like("uniform", B, 3)
        assert torch.equal(loaded(x, ids), module(x, ids))


def test_functorch_goes_through_the_reference():
    x, weight, b, ia3_l = make(6, 8, 4)
    ids = ids_like("uniform", 6, 3)
    for kwargs in ({}, {"activation": "silu"}):
        got = torch.func.grad(
            lambda w, v, kwargs=kwargs: ia3_linear(x, w, b, ia3_l=v, task_ids=ids, **kwargs).sum(), (0, 1)
        )(weight, ia3_l)
        leaves = weight.clone().requires_grad_(), ia3_l.clone().requires_grad_()
        want = torch.autograd.grad(ia3_linear(x, leaves[0], b, ia3_l=leaves[1], task_ids=ids, **kwargs).sum(), leaves)
        torch.testing.assert_close(got, want)
    whole = ia3_linear(x, weight, b, ia3_l=ia3_l[0])
    torch.testing.assert_close(torch.vmap(lambda row: ia3_linear(row, weight, b, ia3_l=ia3_l[0]))(x), whole)
    per_sample = torch.vmap(torch.func.grad(lambda v, row: ia3_linear(row, weight, b, ia3_l=v).sum()), (None, 0))(
        ia3_l[0], x
    )
    torch.testing.assert_close(per_sample, F.linear(x, weight, b))


def test_gradient_of_a_single_vector_as_x():
    """x [K], no leading dimension at all."""
    for placement in ("output", "silu", "feedforward"):
        tensors = make(1, 8, 4, num_tasks=1, is_feedforward=placement == "feedforward")
        x, *others = tensors

        def f(x, weight, bias, ia3_l, placement=placement):
            return ia3_linear(x, weight, bias, ia3_l=ia3_l, **PLACEMENTS[placement])

        dy = torch.randn(8, device=DEVICE)
        got, want = gradients(f, (x[0], *others), dy), gradients(f, tensors, dy[None])
        assert torch.equal(got[0], want[0][0])
        for a, c in zip(got[1:], want[1:], strict=True):
            torch.testing.assert_close(a, c)


def test_higher_derivatives_refuse():
    x, weight, b, ia3_l = make(3, 8, 4, num_tasks=1)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="ia3_linear: double backward is not supported"):
        torch.autograd.grad(ia3_linear(x, weight, b, ia3_l=ia3_l).square().sum(), x, create_graph=True)
    for dual_argument in range(4):
        with torch.autograd.forward_ad.dual_level():
            tensors = [t.detach() for t in (x, weight, b, ia3_l)]
            tensors[dual_argument] = torch.autograd.forward_ad.make_dual(
                tensors[dual_argument], torch.ones_like(tensors[dual_argument])
            )
            with pytest.raises(NotImplementedError, match="ia3_linear: forward-mode AD is not supported"):
                ia3_linear(*tensors[:3], ia3_l=tensors[3])


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.parametrize("placement", ["output", "silu", "feedforward"])
def test_activation_checkpointing_is_bitwise(placement, reentrant, dtype):
    for M, task_ids in ((9, lambda ids: ids), (66, lambda ids: plan_tasks(ids, 66, 3))):
        tensors = make(M, 16, 16, dtype, is_feedforward=placement == "feedforward")
        dy = torch.randn(M, 16, device=DEVICE).to(dtype)
        ids = task_ids(ids_like("sorted", M, 3))

        def f(x, weight, bias, ia3_l, ids=ids):
            return ia3_linear(x, weight, bias, ia3_l=ia3_l, task_ids=ids, **PLACEMENTS[placement])

        def recomputed(*tensors, f=f):
            return checkpoint(f, *tensors, use_reentrant=reentrant)

        leaves = [[t.clone().requires_grad_() for t in tensors] for _ in range(2)]
        for tensors_of, run in zip(leaves, (f, recomputed), strict=True):
            run(*tensors_of).backward(dy)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(*leaves, strict=True))


def test_reference_backend_is_plain_torch(dtype):
    x, weight, b, ia3_l = make(6, 8, 4, dtype)
    ids = ids_like("uniform", 6, 3)
    for task_ids in (ids, plan_tasks(ids, 6, 3)):
        for activation in ACTIVATIONS:
            with peft_ops.set_backend("reference"):
                y = ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=task_ids, activation=activation)
            assert torch.equal(y, reference.ia3_linear(x, weight, b, ia3_l=ia3_l, task_ids=ids, activation=activation))
            assert_same(y, expected(x, weight, b, ia3_l, ids.tolist(), activation), bitwise=True)


@pytest.mark.skipif(not KERNELS, reason="device memory for descriptors is asked for where kernels run")
def test_callers_allocator_is_untouched():
    allocation = pytest.importorskip("triton.runtime._allocation")
    before = allocation._allocator.get()
    x, weight, b, ia3_l = make(66, 16, 16, torch.float16, 1)
    with launches(ops.kernels) as seen:
        ia3_linear(x, weight, b, ia3_l=ia3_l)
    assert launched(seen) == ["one"] and allocation._allocator.get() is before


X, W, B, L = torch.zeros(4, 3, 8), torch.zeros(6, 8), torch.zeros(6), torch.ones(2, 6)
IDS, LX = torch.zeros(4, dtype=torch.int64), torch.ones(2, 8)
BAD_INPUT = {
    "x no tensor": (([1.0], W, B), {}, TypeError, "x must be a tensor, got list"),
    "x integer": ((X.int(), W, B), {}, TypeError, "x must have dtype float32, .* got int32"),
    "x complex": ((X.to(torch.complex64), W, B), {}, TypeError, "x must have dtype .* got complex64"),
    "x scalar": (
        (X[0, 0, 0], W, B),
        {},
        ValueError,
        r"x must have 8 features, as weight \[6, 8\] takes, got shape \[\]",
    ),
    "x features": (
        (X[..., :7], W, B),
        {},
        ValueError,
        r"x must have 8 features, as weight \[6, 8\] takes, got shape \[4, 3, 7\]",
    ),
    "weight no tensor": ((X, None, B), {}, TypeError, "weight must be a tensor, got NoneType"),
    "weight dtype": ((X, W.half(), B), {}, TypeError, "weight must have dtype float32, got float16"),
    "weight of a wider x": ((X.bfloat16(), W, B), {}, TypeError, "weight must have dtype bfloat16, got float32"),
    "weight rank": ((X, W[0], B), {}, ValueError, r"weight must have 2 dimensions, got shape \[8\]"),
    "weight as for Conv1D": (
        (X, W.t(), B),
        {},
        ValueError,
        r"x must have 6 features, as weight \[8, 6\] takes, got shape \[4, 3, 8\]",
    ),
    "weight elsewhere": ((X, W.to("meta"), B), {}, ValueError, "weight must be on cpu, .* got meta"),
    "bias no tensor": ((X, W, 1.0), {}, TypeError, "bias must be a tensor, got float"),
    "bias dtype": ((X, W, B.double()), {}, TypeError, "bias must have dtype float32, got float64"),
    "bias shape": ((X, W, B[:5]), {}, ValueError, r"bias must have shape \[6\], got \[5\]"),
    "bias rank": ((X, W, B[None]), {}, ValueError, r"bias must have 1 dimension, got shape \[1, 6\]"),
    "bias elsewhere": ((X, W, B.to("meta")), {}, ValueError, "bias must be on cpu, .* got meta"),
    "activation": (
        (X, W, B),
        dict(activation="tanh"),
        ValueError,
        "activation must be one of None, 'relu', .* got 'tanh'",
    ),
    "activation no string": (
        (X, W, B),
        dict(activation=1),
        ValueError,
        "activation must be one of None, 'relu', .* got 1",
    ),
    "activation a function": (
        (X, W, B),
        dict(activation=F.relu),
        ValueError,
        "activation must be one of .* got <function relu",
    ),
    "activation a list": (
        (X, W, B),
        dict(activation=["relu"]),
        ValueError,
        r"activation must be one of .* got \['relu'\]",
    ),
    "activation of a feedforward": (
        (X, W, B),
        dict(activation="silu", is_feedforward=True, ia3_l=LX),
        ValueError,
        "activation must be None with is_feedforward, got 'silu'; scale the layer that produces x",
    ),
    "table no tensor": ((X, W, B), dict(ia3_l=None), TypeError, "ia3_l must be a tensor, got NoneType"),
    "table integer": ((X, W, B), dict(ia3_l=L.long()), TypeError, "ia3_l must have dtype .* got int64"),
    "table fp64": ((X, W, B), dict(ia3_l=L.double()), TypeError, "ia3_l must have dtype .* got float64"),
    "table of the input's width": (
        (X, W, B),
        dict(ia3_l=LX),
        ValueError,
        r"ia3_l must have shape \[6\] or \[num_tasks, 6\], got \[2, 8\]",
    ),
    "table of the output's width": (
        (X, W, B),
        dict(is_feedforward=True),
        ValueError,
        r"ia3_l must have shape \[8\] or \[num_tasks, 8\], got \[2, 6\]",
    ),
    "table of PEFT's shape": (
        (X, W, B),
        dict(ia3_l=L[0][:, None]),
        ValueError,
        r"ia3_l must have shape .* got \[6, 1\]",
    ),
    "table elsewhere": ((X, W, B), dict(ia3_l=L.to("meta")), ValueError, "ia3_l must be on cpu, .* got meta"),
    "no ids for two tasks": (
        (X, W, B),
        dict(task_ids=None),
        ValueError,
        "task_ids must be given, because ia3_l holds 2 tasks, got None",
    ),
    "ids no tensor": ((X, W, B), dict(task_ids=[0, 0, 0, 0]), TypeError, "task_ids must be a tensor, got list"),
    "ids float": (
        (X, W, B),
        dict(task_ids=IDS.float()),
        TypeError,
        "task_ids must have dtype int32, int64, got float32",
    ),
    "ids too many": ((X, W, B), dict(task_ids=IDS.repeat(2)), ValueError, r"task_ids must have a shape .* got \[8\]"),
    "ids do not divide": ((X, W, B), dict(task_ids=IDS[:3]), ValueError, r"task_ids must have a shape .* got \[3\]"),
    "ids empty": ((X, W, B), dict(task_ids=IDS[:0]), ValueError, r"task_ids must have a shape .* got \[0\]"),
    "ids of no rank": ((X, W, B), dict(task_ids=IDS[0]), ValueError, r"task_ids must have a shape .* got \[\]"),
    "ids of a single vector": (
        (X[0, 0], W, B),
        dict(task_ids=IDS[:1]),
        ValueError,
        r"task_ids must have a shape .* got \[1\]",
    ),
    "ids for packed rows": (
        (X.view(12, 8), W, B),
        {},
        ValueError,
        "task_ids must .* for a packed batch pass plan_tasks",
    ),
    "ids elsewhere": ((X, W, B), dict(task_ids=IDS.to("meta")), ValueError, "task_ids must be on cpu, .* got meta"),
    "plan for other rows": (
        (X, W, B),
        dict(task_ids=plan_tasks(IDS, 4, 2)),
        ValueError,
        "task_ids must be a plan for 12 rows, got one for 4",
    ),
    "plan for other tasks": (
        (X, W, B),
        dict(task_ids=plan_tasks(IDS, 12, 3)),
        ValueError,
        "task_ids must be a plan for 2 tasks, got one for 3",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case):
    args, kwargs, error, match = BAD_INPUT[case]
    with pytest.raises(error, match=f"^ia3_linear: {match}"):
        ia3_linear(*args, **{"ia3_l": L, "task_ids": IDS, **kwargs})


def test_checks_hold_on_fake_cuda_tensors():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x, weight = (
            torch.empty(4, 3, 8, device="cuda", dtype=torch.bfloat16),
            torch.empty(6, 8, device="cuda", dtype=torch.bfloat16),
        )
        ia3_l, ids = torch.empty(2, 6, device="cuda"), torch.zeros(4, dtype=torch.int32, device="cuda")
        for task_ids in (ids, plan_tasks(ids, 12, 2)):
            y = ia3_linear(x, weight, ia3_l=ia3_l, task_ids=task_ids, activation="gelu")
            assert y.shape == (4, 3, 6) and y.device.type == "cuda" and y.dtype == x.dtype
        assert ia3_linear(x, weight, ia3_l=torch.empty(8, device="cuda"), is_feedforward=True).shape == (4, 3, 6)
        with pytest.raises(ValueError, match="got one for 4"):
            ia3_linear(x, weight, ia3_l=ia3_l, task_ids=plan_tasks(ids, 4, 2))
        with pytest.raises(ValueError, match="weight must be on cuda:0, as the other arguments are, got cpu"):
            ia3_linear(x, torch.empty(6, 8, dtype=torch.bfloat16), ia3_l=ia3_l, task_ids=ids)


def test_shapes_on_the_meta_device():
    x, weight, b, ia3_l = (t.to("meta") for t in make(4, 6, 8, num_tasks=1))
    assert ia3_linear(x, weight, b, ia3_l=ia3_l).shape == (4, 6)
