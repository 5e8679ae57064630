"""ia3_scale: values and gradients against the reference and fp64, task selection, layouts, tracing, and bad input."""

import os
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

import peft_ops
from peft_ops import ia3_scale, plan_tasks, reference
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
    name_of,
)

pytestmark = pytest.mark.kernels

SHAPES = [(1, 64), (3, 5), (7, 31), (17, 33), (64, 256), (33, 1025), (130, 70), (5, 4097)]
NAN, INF = float("nan"), float("inf")


def make(M, N, dtype=torch.float32, num_tasks=3, l_dtype=torch.float32):
    return torch.randn(M, N, dtype=dtype, device=DEVICE), torch.randn(num_tasks, N, dtype=l_dtype, device=DEVICE)


def expected(x, ia3_l, rows):
    """The specification, written out: one row at a time, the product in fp32 and one rounding."""
    scale = [torch.ones_like(ia3_l[0]) if t == -1 else ia3_l[t] for t in rows]
    return (x.float() * torch.stack(scale).float()).to(x.dtype)


@pytest.mark.parametrize("l_dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"M{s[0]}-N{s[1]}")
def test_forward_is_the_product_rounded_once(shape, dtype, l_dtype):
    x, ia3_l = make(*shape, dtype, l_dtype=l_dtype)
    ids = ids_like("uniform", shape[0], 3)
    assert_same(ia3_scale(x, ia3_l, ids), expected(x, ia3_l, ids.tolist()))


@pytest.mark.parametrize("kind", ID_KINDS)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_every_way_to_select_tasks(kind, ids_dtype, dtype):
    B, S, N, num_tasks = 6, 7, 40, 4
    x, ia3_l = make(B * S, N, dtype, num_tasks)
    x = x.view(B, S, N)
    per_sequence = ids_like(kind, B, num_tasks, dtype=ids_dtype)
    per_token = ids_like(kind, B * S, num_tasks, dtype=ids_dtype).view(B, S)
    beams = per_sequence[: B // 2]
    for ids, rows in (
        (per_sequence, per_sequence.repeat_interleave(S)),
        (per_token, per_token.reshape(-1)),
        (beams, beams.repeat_interleave(2 * S)),
        (plan_tasks(per_sequence, B * S, num_tasks), per_sequence.repeat_interleave(S)),
        (plan_tasks(per_token, B * S, num_tasks), per_token.reshape(-1)),
    ):
        want = expected(x.view(B * S, N), ia3_l, rows.tolist()).view(B, S, N)
        assert_same(ia3_scale(x, ia3_l, ids), want)


def test_one_task_needs_no_ids(dtype):
    x, ia3_l = make(9, 24, dtype, 1)
    want = (x.float() * ia3_l[0]).to(dtype)
    assert_same(ia3_scale(x, ia3_l), want)
    assert_same(ia3_scale(x, ia3_l[0]), want)
    assert_same(ia3_scale(x[0], ia3_l[0]), want[0])


def test_equals_peft_arithmetic(dtype):
    """PEFT's layer: (result * ia3_l.flatten()).to(result.dtype), with an fp32 vector on a base of any dtype."""
    x, ia3_l = make(12, 96, dtype, 1)
    assert_same(ia3_scale(x, ia3_l), (x * ia3_l.flatten()).to(x.dtype))


@pytest.mark.parametrize("l_dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(1, 64), (7, 31), (300, 70), (1100, 16)], ids=lambda s: f"M{s[0]}-N{s[1]}")
def test_gradients(shape, dtype, l_dtype):
    x, ia3_l = make(*shape, dtype, l_dtype=l_dtype)
    ids, dy = ids_like("uniform", shape[0], 3), torch.randn(shape, device=DEVICE).to(dtype)

    def grads(f, *tensors):
        tensors = [t.detach().clone().requires_grad_() for t in tensors]
        return torch.autograd.grad(f(*tensors, ids), tensors, dy.to(tensors[0].dtype))

    dx, dl = grads(ia3_scale, x, ia3_l)
    dx_ref, dl_ref = grads(reference.ia3_scale, x, ia3_l)
    _, dl_64 = grads(reference.ia3_scale, x.double(), ia3_l.double())
    assert_same(dx, dx_ref)
    assert dl.dtype == l_dtype
    # fp32 sums in different orders: against the same sum rounded as the vector's dtype rounds
    assert_as_good_as_torch(dl, dl_ref, dl_64)


def test_gradcheck_in_fp64():
    for M, N, num_tasks in [(1, 3, 1), (5, 4, 2), (9, 2, 3)]:
        x = torch.randn(M, N, dtype=torch.float64, device=DEVICE, requires_grad=True)
        ia3_l = torch.randn(num_tasks, N, dtype=torch.float64, device=DEVICE, requires_grad=True)
        ids = ids_like("uniform", M, num_tasks)
        assert torch.autograd.gradcheck(lambda x, v, ids=ids: ia3_scale(x, v, ids), (x, ia3_l), eps=1e-6, atol=1e-5)


def test_gradient_only_where_asked(dtype):
    x, ia3_l = make(6, 20, dtype)
    ids, dy = ids_like("distinct", 6, 3), torch.randn(6, 20, device=DEVICE).to(dtype)
    both = torch.autograd.grad(
        ia3_scale(a := x.clone().requires_grad_(), b := ia3_l.clone().requires_grad_(), ids), (a, b), dy
    )
    (dx,) = torch.autograd.grad(ia3_scale(a := x.clone().requires_grad_(), ia3_l, ids), (a,), dy)
    (dl,) = torch.autograd.grad(ia3_scale(x, b := ia3_l.clone().requires_grad_(), ids), (b,), dy)
    assert torch.equal(dx, both[0]) and torch.equal(dl, both[1])
    assert not ia3_scale(x, ia3_l, ids).requires_grad


def test_saves_x_only_for_the_vector():
    x, ia3_l = make(64, 128)
    for x_grad, l_grad in ((True, False), (False, True)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            ia3_scale(
                x.clone().requires_grad_(x_grad), ia3_l.clone().requires_grad_(l_grad), ids_like("distinct", 64, 3)
            )
        large = [t for t in saved if t.numel() == x.numel()]
        assert len(large) == l_grad, [t.shape for t in saved]


def test_dl_does_not_depend_on_other_tasks(dtype):
    """Rows of task 1 keep their order among themselves; how many rows of others stand between, and what they hold,
    changes."""
    N, mine = 24, 600
    values, grads = torch.randn(mine, N, device=DEVICE).to(dtype), torch.randn(mine, N, device=DEVICE).to(dtype)
    seen = []
    for others in (0, 5, 700):
        M = mine + others
        at = torch.randperm(M, device=DEVICE)[:mine].sort().values
        ids = ids_like("uniform", M, 4)
        ids[ids == 1] = 2
        ids[at] = 1
        x, dy = torch.randn(M, N, device=DEVICE).to(dtype), torch.randn(M, N, device=DEVICE).to(dtype)
        x[at], dy[at] = values, grads
        if others:
            x[ids == 2], dy[ids == 3] = NAN, INF  # a neighbour's overflow stays his own
        ia3_l = torch.ones(4, N, device=DEVICE, requires_grad=True)
        seen.append(torch.autograd.grad(ia3_scale(x, ia3_l, ids), ia3_l, dy)[0][1])
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    assert seen[0].isfinite().all()


def test_mixed_batch_equals_each_task_alone(dtype):
    for num_tasks in (1, 2, 8, 64):
        x, ia3_l = make(40, 48, dtype, num_tasks)
        ids = ids_like("uniform", 40, num_tasks)
        mixed = ia3_scale(x, ia3_l, ids)
        for t in set(ids.tolist()):
            alone = ia3_scale(x, ia3_l, torch.full_like(ids, t))
            assert torch.equal(mixed[ids == t], alone[ids == t])


def test_rows_are_independent(dtype):
    generator = torch.Generator().manual_seed(1)
    for _ in range(20 if INTERPRET else 200):
        M, N = (int(torch.randint(1, 40, (1,), generator=generator)) for _ in range(2))
        x, ia3_l = make(M, N, dtype)
        ids, row = ids_like("uniform", M, 3), int(torch.randint(M, (1,), generator=generator))
        before = ia3_scale(x, ia3_l, ids)[row].clone()
        others = torch.arange(M, device=DEVICE) != row
        x[others], ids[others] = (
            torch.randn(int(others.sum()), N, device=DEVICE).to(dtype),
            ids_like("uniform", int(others.sum()), 3),
        )
        x[others] *= torch.where(torch.rand(int(others.sum()), 1, device=DEVICE) < 0.2, NAN, 1.0).to(dtype)
        assert torch.equal(ia3_scale(x, ia3_l, ids)[row], before)


def test_batch_size_and_order_do_not_matter(dtype):
    x, ia3_l = make(257, 33, dtype)
    ids = ids_like("uniform", 257, 3)
    whole = ia3_scale(x, ia3_l, ids)
    for B in (1, 2, 7, 64):
        assert torch.equal(ia3_scale(x[:B], ia3_l, ids[:B]), whole[:B])
    order = torch.randperm(257, device=DEVICE)
    assert torch.equal(ia3_scale(x[order], ia3_l, ids[order]), whole[order])


def special_values(dtype):
    info = torch.finfo(dtype)
    subnormal = (
        info.tiny if INTERPRET and dtype == torch.bfloat16 else info.tiny / 2
    )  # it flushes subnormal bf16 to zero
    return torch.tensor([INF, -INF, NAN, -0.0, subnormal, info.max, info.tiny, 1.0], dtype=dtype, device=DEVICE)


def test_base_rows_come_back_bitwise(dtype):
    x = special_values(dtype).repeat(3, 5)
    ia3_l = torch.full((2, 40), NAN, device=DEVICE)
    y = ia3_scale(x, ia3_l, torch.tensor([-1, 0, -1], device=DEVICE))
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    keep = ~x.isnan()
    for row in (0, 2):
        assert torch.equal(y[row][keep[row]].view(integer), x[row][keep[row]].view(integer))
        assert torch.equal(y[row].isnan(), x[row].isnan())
    assert y[1].isnan().all()


def test_special_values_propagate_as_in_torch(dtype):
    values = special_values(dtype)
    x, scale = values.repeat_interleave(8)[None], values.repeat(8)[None].float()
    want = (x.float() * scale).to(dtype)
    got = ia3_scale(x, scale, torch.zeros(1, dtype=torch.int64, device=DEVICE))
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    assert torch.equal(got.signbit() & ~got.isnan(), want.signbit() & ~want.isnan())


BAD_IDS = [3, 4, -2, 2**31 - 1, -(2**31)]


@pytest.mark.parametrize("bad", BAD_IDS)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_bad_id(bad, ids_dtype, dtype):
    x = torch.randn(4, 40, device=DEVICE).to(dtype)
    table, buffer = guarded(3, 40, dtype=torch.float32)
    table.normal_()
    ids = torch.tensor([0, bad, -1, 2], dtype=ids_dtype, device=DEVICE)
    if not KERNELS:
        with pytest.raises(IndexError, match=rf"ia3_scale: task_ids must be in \[-1, 3\), got {bad} at position 1"):
            ia3_scale(x, table, ids)
        return
    y = ia3_scale(x, table, ids)
    assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all()
    assert_same(y[[0, 2, 3]], expected(x[[0, 2, 3]], table, [0, -1, 2]))
    assert_guards(buffer)


@pytest.mark.skipif(KERNELS, reason="on a GPU a bad id gives NaN, without a synchronisation")
def test_bad_id_64_bit_and_in_backward():
    x, ia3_l = make(2, 8)
    with pytest.raises(IndexError, match="got 4294967296 at position 1"):
        ia3_scale(x, ia3_l, torch.tensor([0, 2**32]))


@pytest.mark.skipif(not KERNELS, reason="on a CPU a bad id raises before a gradient exists")
def test_bad_id_has_nan_gradient_of_its_own_row_only():
    x, ia3_l = make(3, 16)
    x, ia3_l = x.requires_grad_(), ia3_l.requires_grad_()
    y = ia3_scale(x, ia3_l, torch.tensor([1, 7, 1], device=DEVICE))
    dx, dl = torch.autograd.grad(y, (x, ia3_l), torch.ones_like(y))
    assert dx[1].isnan().all() and dx[[0, 2]].isfinite().all() and dl.isfinite().all()
    assert torch.equal(dl[[0, 2]], torch.zeros(2, 16, device=DEVICE))


def test_guards_stay_intact():
    generator = torch.Generator().manual_seed(2)
    for _ in range(40 if INTERPRET else 1000):
        M, N, num_tasks = (int(torch.randint(1, 70, (1,), generator=generator)) for _ in range(3))
        dtype = DTYPES[int(torch.randint(3, (1,), generator=generator))]
        x, x_buffer = guarded(M, N, dtype=dtype)
        table, table_buffer = guarded(num_tasks, N, dtype=torch.float32)
        x.normal_(), table.normal_()
        y = ia3_scale(x, table, ids_like("uniform", M, num_tasks))
        assert y.isfinite().all(), "read outside a tensor"
        assert_guards(x_buffer), assert_guards(table_buffer)


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0), (2, 0, 8), (0, 3, 8)], ids=str)
def test_zero_sizes(shape, dtype):
    x = torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()
    ia3_l = torch.randn(3, shape[-1], device=DEVICE, requires_grad=True)
    y = ia3_scale(x, ia3_l, torch.zeros(shape[0], dtype=torch.int64, device=DEVICE))
    assert y.shape == x.shape and y.dtype == dtype
    dx, dl = torch.autograd.grad(y, (x, ia3_l), torch.ones_like(y))
    assert dx.shape == x.shape and torch.equal(dl, torch.zeros_like(ia3_l))


def test_table_without_tasks_serves_the_base_model(dtype):
    x = torch.randn(3, 8, device=DEVICE).to(dtype)
    assert torch.equal(ia3_scale(x, torch.empty(0, 8, device=DEVICE), torch.full((3,), -1, device=DEVICE)), x)


@pytest.mark.parametrize("N", [1, 2, 3, 5, 31, 32, 33, 63, 65, 127, 255, 1023, 1025, 4097])
def test_odd_widths_and_offsets(N, dtype):
    for offset in range(1, 8, 3 if INTERPRET else 1):
        x = torch.randn(3 * N + offset, device=DEVICE).to(dtype)[offset:].view(3, N)
        ia3_l = torch.randn(2 * N + offset, device=DEVICE)[offset:].view(2, N)
        assert_same(ia3_scale(x, ia3_l, torch.tensor([1, -1, 0], device=DEVICE)), expected(x, ia3_l, [1, -1, 0]))


LAYOUTS = {
    "permuted": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced rows": lambda x: torch.cat([x, x], 1)[:, ::2],
    "sliced columns": lambda x: torch.stack([x, x], -1)[..., 0],
    "wide rows": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "expanded": lambda x: x[:, :1].expand(-1, x.shape[1], -1),
    "columns first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    x, ia3_l = make(4 * 6, 40, dtype)
    x = LAYOUTS[layout](x.view(4, 6, 40)).requires_grad_()
    ids = ids_like("uniform", 4, 3)
    y = ia3_scale(x, ia3_l, ids)
    assert_same(y, ia3_scale(x.contiguous(), ia3_l, ids), bitwise=True)
    assert y.is_contiguous()
    dy = torch.randn(4, 6, 40, device=DEVICE).to(dtype)
    want = torch.autograd.grad(ia3_scale(c := x.detach().contiguous().requires_grad_(), ia3_l, ids), c, dy)[0]
    for gradient in (dy, LAYOUTS["columns first"](dy), dy.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(torch.autograd.grad(ia3_scale(x, ia3_l, ids), x, gradient)[0], want)


def test_table_layouts():
    x, ia3_l = make(6, 40)
    ids = ids_like("uniform", 6, 3)
    want = ia3_scale(x, ia3_l, ids)
    wide = torch.cat([ia3_l, ia3_l], 1)
    for table in (wide[:, :40], wide[:, 40:], ia3_l.t().contiguous().t()):
        assert torch.equal(ia3_scale(x, table, ids), want)


def test_repeats_are_bitwise_equal(dtype):
    M = 300 if INTERPRET else 700
    x, ia3_l = make(M, 40, dtype)
    ids, dy = ids_like("skewed", M, 3), torch.randn(M, 40, device=DEVICE).to(dtype)

    def run():
        a, b = x.clone().requires_grad_(), ia3_l.clone().requires_grad_()
        y = ia3_scale(a, b, ids)
        return y, *torch.autograd.grad(y, (a, b), dy)

    first = run()
    for _ in range(250 if DEVICE == "cuda" else 50):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


@settings(max_examples=30 if INTERPRET else 100, deadline=None, derandomize=True)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(1, 5),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)
def test_any_shape(M, N, num_tasks, dtype, l_dtype, seed):
    torch.manual_seed(seed)
    x, ia3_l = make(M, N, dtype, num_tasks, l_dtype)
    ids = ids_like("uniform", M, num_tasks)
    assert_same(ia3_scale(x, ia3_l, ids), expected(x, ia3_l, ids.tolist()))


OPCHECK_LAYOUTS = {
    "contiguous": lambda: torch.randn(4, 6, 8),
    "permuted": lambda: torch.randn(6, 4, 8).transpose(0, 1),
    "sliced": lambda: torch.randn(4, 12, 8)[:, ::2],
    "empty": lambda: torch.randn(4, 0, 8),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("with_ids", [False, True], ids=["one_task", "ids"])
@pytest.mark.parametrize("layout", OPCHECK_LAYOUTS)
def test_opcheck(layout, with_ids, grad):
    x = OPCHECK_LAYOUTS[layout]().to(DEVICE).requires_grad_(grad)
    ia3_l = torch.randn(3 if with_ids else 1, 8, device=DEVICE, requires_grad=grad)
    ids = torch.tensor([0, 2, -1, 1], device=DEVICE) if with_ids and x.numel() else None
    if with_ids and ids is None:
        ids = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    torch.library.opcheck(torch.ops.peft_ops.ia3_scale, (x, ia3_l, ids, None))
    dy = torch.randn(x.shape, device=DEVICE)
    torch.library.opcheck(
        torch.ops.peft_ops.ia3_scale_backward, (dy, x.detach(), ia3_l.detach(), ids, "silu", [True, True])
    )


def test_compiles_with_dynamic_batches():
    def loss(x, ia3_l, ids):
        return (ia3_scale(x, ia3_l, ids) * 1.5).relu().sum()

    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=frames, fullgraph=True, dynamic=True)
    ia3_l = torch.randn(3, 16, device=DEVICE, requires_grad=True)
    for B in (2, 3, 5, 8, 13):
        x, ids = torch.randn(B, 4, 16, device=DEVICE, requires_grad=True), ids_like("uniform", B, 3)
        want, got = loss(x, ia3_l, ids), compiled(x, ia3_l, ids)
        assert torch.allclose(got, want)
        for a, b in zip(torch.autograd.grad(got, (x, ia3_l)), torch.autograd.grad(want, (x, ia3_l)), strict=True):
            assert torch.equal(a, b)
    assert frames.frame_count <= 2


def test_compiled_code_calls_the_operator():
    """Dynamo must see one operator: traced through the reference, it would compute the same and never run a kernel."""
    seen = []

    def record(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    x, ia3_l = make(4, 8)
    torch.compile(ia3_scale, backend=record, fullgraph=True)(x, ia3_l, ids_like("uniform", 4, 3))
    assert "peft_ops.ia3_scale.default" in seen and not any("mul" in target for target in seen), seen


def test_exports_and_loads(tmp_path):
    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.ia3_l = torch.nn.Parameter(torch.randn(3, 16))

        def forward(self, x, ids):
            return ia3_scale(x, self.ia3_l, ids)

    module, x, ids = (
        Scale().to(DEVICE),
        torch.randn(4, 5, 16, device=DEVICE),
        torch.tensor([0, 1, -1, 2], device=DEVICE),
    )
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, (x, ids), dynamic_shapes={"x": {0: batch}, "ids": {0: batch}})
    torch.export.save(program, tmp_path / "scale.pt2")
    loaded = torch.export.load(tmp_path / "scale.pt2").module()
    x, ids = torch.randn(7, 5, 16, device=DEVICE), ids_like("uniform", 7, 3)
    assert torch.equal(loaded(x, ids), module(x, ids))


def test_functorch_goes_through_the_reference():
    x, ia3_l = make(6, 8)
    ids = ids_like("uniform", 6, 3)
    got = torch.func.grad(lambda v: ia3_scale(x, v, ids).sum())(ia3_l)
    want = torch.autograd.grad(ia3_scale(x, v := ia3_l.clone().requires_grad_(), ids).sum(), v)[0]
    assert torch.allclose(got, want, atol=1e-5)
    batched = torch.vmap(lambda row: ia3_scale(row, ia3_l[0]))(x)
    assert torch.equal(batched, ia3_scale(x, ia3_l[0]))


def test_higher_derivatives_refuse():
    x, ia3_l = make(3, 8)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(ia3_scale(x, ia3_l[0]).square().sum(), x)
    assert torch.allclose(dx, 2 * x * ia3_l[0] ** 2)
    with pytest.raises(RuntimeError, match="ia3_scale: double backward is not supported"):
        torch.autograd.grad(ia3_scale(x, ia3_l[0]).square().sum(), x, create_graph=True)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="ia3_scale: forward-mode AD is not supported"):
            ia3_scale(dual, ia3_l[0])


def test_reference_backend_is_plain_torch(dtype):
    x, ia3_l = make(6, 8, dtype)
    ids = ids_like("uniform", 6, 3)
    with peft_ops.set_backend("reference"):
        y = ia3_scale(x, ia3_l, ids)
    assert peft_ops.get_backend() == "auto"
    assert_same(ia3_scale(x, ia3_l, ids), y)


X, L, IDS = torch.zeros(4, 3, 8), torch.ones(2, 8), torch.zeros(4, dtype=torch.int64)
BAD_INPUT = {
    "x no tensor": (([1.0], L, IDS), TypeError, "x must be a tensor, got list"),
    "x integer": ((X.int(), L, IDS), TypeError, "x must have dtype float32, .* got int32"),
    "x scalar": ((X[0, 0, 0], L, None), ValueError, r"x must have at least 1 dimension, got shape \[\]"),
    "x complex": ((X.to(torch.complex64), L, IDS), TypeError, "got complex64"),
    "table no tensor": ((X, None, IDS), TypeError, "ia3_l must be a tensor, got NoneType"),
    "table integer": ((X, L.long(), IDS), TypeError, "ia3_l must have dtype .* got int64"),
    "table fp64": ((X, L.double(), IDS), TypeError, "ia3_l must have dtype .* got float64"),
    "table width": ((X, L[:, :7], IDS), ValueError, r"ia3_l must have shape \[8\] or \[num_tasks, 8\], got \[2, 7\]"),
    "table rank": ((X, L[None], IDS), ValueError, r"got \[1, 2, 8\]"),
    "table of PEFT's shape": ((X, L[0][:, None], IDS), ValueError, r"got \[8, 1\]"),
    "no ids for two tasks": ((X, L), ValueError, "task_ids must be given, because ia3_l holds 2 tasks, got None"),
    "ids no tensor": ((X, L, [0, 1, 0, 1]), TypeError, "task_ids must be a tensor, got list"),
    "ids float": ((X, L, IDS.float()), TypeError, "task_ids must have dtype int32, int64, got float32"),
    "ids bool": ((X, L, IDS.bool()), TypeError, "got bool"),
    "ids too many": ((X, L, IDS.repeat(2)), ValueError, r"task_ids must have a shape that starts \[4, 3\].* got \[8\]"),
    "ids do not divide": ((X, L, IDS[:3]), ValueError, r"got \[3\]"),
    "ids of another rank": ((X, L, IDS.view(2, 2)), ValueError, r"got \[2, 2\]"),
    "ids of no rank": ((X, L, IDS[0]), ValueError, r"got \[\]"),
    "ids empty": ((X, L, IDS[:0]), ValueError, r"got \[0\]"),
    "ids divide packed rows by chance": ((X.view(12, 8), L, IDS), ValueError, "for a packed batch pass plan_tasks"),
    "plan for other rows": ((X, L, plan_tasks(IDS, 4, 2)), ValueError, "must be a plan for 12 rows, got one for 4"),
    "plan for other tasks": ((X, L, plan_tasks(IDS, 12, 3)), ValueError, "must be a plan for 2 tasks, got one for 3"),
    "ids elsewhere": (
        (X, L, IDS.to("meta")),
        ValueError,
        "task_ids must be on cpu, as the other arguments are, got meta",
    ),
    "table elsewhere": (
        (X, L.to("meta"), IDS),
        ValueError,
        "ia3_l must be on cpu, as the other arguments are, got meta",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case):
    args, error, match = BAD_INPUT[case]
    with pytest.raises(error, match=f"^ia3_scale: .*{match}"):
        ia3_scale(*args)


def test_checks_hold_on_fake_cuda_tensors():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x, ia3_l = torch.empty(4, 3, 8, device="cuda", dtype=torch.bfloat16), torch.empty(2, 8, device="cuda")
        ids = torch.zeros(4, dtype=torch.int32, device="cuda")
        y = ia3_scale(x, ia3_l, ids)
        assert y.shape == x.shape and y.device.type == "cuda" and y.dtype == x.dtype
        with pytest.raises(ValueError, match="got one for 4"):
            ia3_scale(x, ia3_l, plan_tasks(ids, 4, 2))


@pytest.mark.skipif(KERNELS, reason="the check of the environment variable needs a process of its own; once is enough")
def test_debug_checks_ids_where_kernels_run():
    code = (
        "import torch, peft_ops\n"
        "try: peft_ops.ia3_scale(torch.ones(2, 4), torch.ones(1, 4), torch.tensor([0, 5]))\n"
        "except IndexError as e: print(e)"
    )
    env = {**os.environ, "TRITON_INTERPRET": "1", "PEFT_OPS_DEBUG": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=os.getcwd())
    assert "task_ids must be in [-1, 1), got 5 at position 1" in done.stdout, done.stderr


@pytest.mark.parametrize("with_grad", [False, True], ids=["no_grad", "grad"])
def test_outputs_may_be_changed_in_place(with_grad, dtype):
    """A view made inside the operator would refuse it, and relu_() or `y += residual` are common."""
    x, ia3_l = make(6, 16, dtype)
    x, ids = x.view(2, 3, 16).requires_grad_(with_grad), ids_like("uniform", 2, 3)
    weight, vector = torch.eye(16, device=DEVICE, dtype=dtype), ia3_l.requires_grad_(with_grad)
    for y in (ia3_scale(x, vector, ids), peft_ops.ia3_linear(x, weight, ia3_l=vector, task_ids=ids)):
        want = y.detach().clone() * 2
        y.mul_(2)
        assert torch.equal(y.detach(), want)
        if with_grad:
            y.float().sum().backward()


def test_backward_under_autocast_keeps_the_forward_dtypes():
    x, ia3_l = make(4, 16)
    x, weight = x.requires_grad_(), torch.randn(8, 16, device=DEVICE)
    for kwargs in (dict(ia3_l=ia3_l, is_feedforward=True), dict(ia3_l=torch.randn(3, 8, device=DEVICE))):
        kwargs["ia3_l"].requires_grad_()
        want, got = [], []
        for grads, enabled in ((want, False), (got, True)):
            y = peft_ops.ia3_linear(x, weight, task_ids=torch.tensor([0, 1, -1, 2], device=DEVICE), **kwargs)
            with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=enabled):
                grads.extend(torch.autograd.grad(y, (x, kwargs["ia3_l"]), torch.ones_like(y)))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_no_zeros_are_made_for_outputs_without_a_gradient():
    x, ia3_l = make(64, 64)
    y = peft_ops.ia3_linear(
        x, torch.randn(64, 64, device=DEVICE), ia3_l=ia3_l.requires_grad_(), task_ids=ids_like("uniform", 64, 3)
    )
    dy = torch.ones_like(y)
    with torch.profiler.profile(record_shapes=True) as profile:
        y.backward(dy)
    filled = [
        e.name for e in profile.events() if e.name in ("aten::fill_", "aten::zero_") and [64, 64] in e.input_shapes
    ]
    assert not filled, filled


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_comes_back_may_be_changed_in_place(dtype, backend, monkeypatch):
    """Also where plain PyTorch serves the operator, whose result ends in a reshape."""
    monkeypatch.setattr("peft_ops.ops.ia3_scale.use_native", lambda *args, **kwargs: False)
    x = torch.randn(2, 3, 4, dtype=dtype, device=DEVICE, requires_grad=True)
    ids = torch.tensor([0, 1], device=DEVICE)
    with peft_ops.set_backend(backend):
        peft_ops.ia3_scale(x, torch.ones(2, 4, device=DEVICE), ids).mul_(2).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))
