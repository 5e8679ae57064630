"""The native CPU kernels, called below the operators, against peft_ops.reference."""

import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch

import peft_ops
from peft_ops import info, reference
from peft_ops._library import NATIVE_SCHEMAS, has_native, native
from peft_ops.ops.ia3_glu import glu_by
from peft_ops.ops.ia3_scale import scale_by
from tests.conftest import DTYPES, assert_as_good_as_torch, assert_guards, assert_same, guarded, name_of

if not has_native():
    pytest.skip(f"no native library: {info.why_absent()}", allow_module_level=True)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SIZES = [1, 3, 31, 33, 65, 255, 1023, 4097]  # around the vector widths and the 1024 columns of a block
ACTIVATIONS = list(reference.ACTIVATIONS)
TASKS = 5
IDS = {
    "none": None,
    "one": torch.tensor([3]),
    "mixed": torch.tensor([0, -1, 4, 2, 4, -1]),
    "int32": torch.tensor([4, 3, 2, 1, 0, -1], dtype=torch.int32),
    "bad": torch.tensor([0, TASKS, -2, 2**62, -(2**63), 1]),
    "bad-int32": torch.tensor([1, TASKS, -2, 2**31 - 1, -(2**31), 0], dtype=torch.int32),
    "strided": torch.tensor([[2, 9], [-1, 9], [0, 9]])[:, 0],
}
INF, NAN = float("inf"), float("nan")
PLAIN = (1.0, None, None, None, None)  # no scale, types or positions
SPECIAL = [INF, -INF, NAN, 0.0, -0.0, 1e-40, -1e-40, 6e-8, 65504.0, -65504.0, 3e38, 1.0, -2.5]


@pytest.fixture(autouse=True)
def on_a_cpu():
    """Two threads whatever the machine's default: the kernels cut their work by it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def bits(t: torch.Tensor) -> torch.Tensor:
    """The bit patterns, NaN replaced by one of them: a payload is not promised."""
    t = torch.where(t.isnan(), float("nan"), t)
    return t.view(torch.int32 if t.dtype == F32 else torch.int16)


def assert_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    assert_same(got, want, bitwise=True)
    assert torch.equal(bits(got), bits(want)), "zeros of other signs"
    assert got.is_contiguous()


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def fp64(f, *args):
    return f(*(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args))


@pytest.mark.parametrize("l_dtype", DTYPES, ids=lambda d: f"l_{name_of(d)}")
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("N", SIZES)
def test_ia3_scale_is_bitwise_the_reference(N, activation, l_dtype, dtype):
    x, ia3_l = randn(12, N, dtype=dtype), randn(TASKS, N, dtype=l_dtype)
    for name, ids in IDS.items():
        got = native.ia3_scale(x, ia3_l, ids, activation)
        try:
            assert_bits(got, reference.act_scale(x, ia3_l, ids, activation))
        except AssertionError as error:
            raise AssertionError(f"ids {name}: {error}") from error


@pytest.mark.parametrize("N", [1, 33, 1023, 4097])
@pytest.mark.parametrize("activation", ACTIVATIONS[2:])
def test_activations_are_as_good_as_torch(activation, N, dtype):
    # the widths: where activations bend, and their tails
    for width in (0.5, 1.0, 4.0):
        x, ia3_l, ids = (width * randn(24, N, dtype=F32)).to(dtype), randn(TASKS, N, dtype=F32), IDS["mixed"]
        torch_own = reference.act_scale(x, ia3_l, ids, activation)
        want = fp64(reference.act_scale, x, ia3_l, ids, activation)
        assert_as_good_as_torch(native.ia3_scale(x, ia3_l, ids, activation), torch_own, want, elementwise=dtype != F32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_special_values(activation, dtype):
    x = torch.tensor(SPECIAL * 5).to(dtype)[None]
    ia3_l = torch.tensor([[1.0], [-0.5], [0.0], [INF], [NAN], [1e-39]]).expand(-1, x.shape[1]).contiguous()
    for task in range(len(ia3_l)):
        ids = torch.tensor([task])
        got, want = native.ia3_scale(x, ia3_l, ids, activation), fp64(reference.act_scale, x, ia3_l, ids, activation)
        assert torch.equal(got.isnan(), want.isnan())
        for sign in (torch.isposinf, torch.isneginf):
            assert torch.equal(sign(got), sign(want.to(dtype)))
        if activation in (None, "relu"):
            assert_bits(got, reference.act_scale(x, ia3_l, ids, activation))


@pytest.mark.parametrize("activation", [None, "relu"])
def test_every_16_bit_number_comes_through(activation):
    for dtype in (F16, BF16):
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(64, 1024)
        for factor in (1.0, 1.0009765625, 0.3333, 1e-6):
            ia3_l = torch.full((1, 1024), factor)
            want = reference.act_scale(x, ia3_l, None, activation)
            assert_bits(native.ia3_scale(x, ia3_l, None, activation), want)
    base = native.ia3_scale(x, torch.zeros(1, 1024), torch.tensor([-1]), None)
    assert_bits(base, x)


@pytest.mark.parametrize("offset", range(8))
def test_misaligned_and_strided_rows(offset, dtype):
    N = 65
    x = randn(7 * 90 + 8, dtype=dtype)[offset:].as_strided((7, N), (90, 1))
    ia3_l = randn(TASKS * 77 + 8, dtype=F32)[offset:].as_strided((TASKS, N), (77, 1))
    ids = torch.tensor([0, 4, -1, 2, 2, 1, 7])
    assert_bits(native.ia3_scale(x, ia3_l, ids, None), reference.act_scale(x, ia3_l, ids))
    dy = randn(7 * 70 + 8, dtype=dtype)[offset:].as_strided((7, N), (70, 1))
    dz, dl = native.ia3_scale_backward(dy, x, ia3_l, ids, None, True, True)
    packed = dy.contiguous(), x.contiguous(), ia3_l.contiguous()
    want_dz, want_dl = native.ia3_scale_backward(*packed, ids, None, True, True)
    assert_bits(dz, want_dz)
    assert_bits(dl, want_dl)
    expanded = x[:1].expand(7, N)
    assert_bits(native.ia3_scale(expanded, ia3_l, ids, None), reference.act_scale(expanded, ia3_l, ids))


def test_no_read_outside_the_table_and_no_write_outside_the_rows():
    x, buffer = guarded(6, 33, dtype=BF16)
    ia3_l, table = guarded(TASKS, 33, dtype=F32)
    x.normal_(), ia3_l.normal_()
    y = native.ia3_scale(x, ia3_l, IDS["bad"], None)
    assert y[1:5].isnan().all() and y[[0, 5]].isfinite().all()
    dz, dl = native.ia3_scale_backward(x, x, ia3_l, IDS["bad"], "silu", True, True)
    assert dz[1:5].isnan().all() and dl.isfinite().all()
    h = native.ia3_glu(x, x, ia3_l, IDS["bad"], "silu")
    assert h[1:5].isnan().all() and h[[0, 5]].isfinite().all()
    dgate, dup, dl = native.ia3_glu_backward(x, x, x, ia3_l, IDS["bad"], "silu", True, True)
    assert dgate[1:5].isnan().all() and dup[1:5].isnan().all() and dl.isfinite().all()
    assert_guards(buffer)
    assert_guards(table)


def test_first_bad_id():
    for dtype in (torch.int32, torch.int64):
        for size in (0, 1, 3, 31, 1023):
            ids = torch.randint(-1, TASKS, (size,), dtype=dtype)
            assert native.first_bad_id(ids, -1, TASKS) == -1
            for at in {0, size // 2, size - 1} & set(range(size)):
                for bad in (TASKS, -2, torch.iinfo(dtype).max, torch.iinfo(dtype).min):
                    broken = ids.clone()
                    broken[at:] = bad
                    assert native.first_bad_id(broken, -1, TASKS) == at
    assert native.first_bad_id(torch.tensor([[0, 1], [2, 3]]), -1, 3) == 3
    assert native.first_bad_id(torch.tensor([0, 9, 1, 9])[::2], -1, 2) == -1
    assert native.first_bad_id(torch.tensor([-1]), -1, 0) == -1 and native.first_bad_id(torch.tensor([0]), -1, 0) == 0
    assert (
        native.first_bad_id(torch.tensor([3, 0, -1]), 0, 4) == 2 and native.first_bad_id(torch.tensor([0]), 0, 0) == 0
    )


@pytest.mark.parametrize("wide", [False, True], ids=["int32", "int64"])
@pytest.mark.parametrize(
    "offsets, at",
    [
        ([0], -1),
        ([0, 2, 2, 5], -1),
        ([0, 5, 5], 1),  # 5 tokens of at most 4
        ([1, 2], 0),
        ([-1, 2], 0),
        ([0, 3, 2, 5], 2),
        ([0, 4, 7, 8], 3),  # 8 of 7 tokens
        ([0, -(2**31)], 1),
        ([0, 2**31 - 1], 1),
    ],
)
def test_first_bad_offset(offsets, at, wide):
    cu = torch.tensor(offsets, dtype=torch.int64 if wide else torch.int32)
    assert native.first_bad_offset(cu, 7, 4) == at
    assert native.first_bad_offset(cu.repeat_interleave(2)[::2], 7, 4) == at


def assert_close(got: torch.Tensor, torch_own: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == torch_own.dtype
    if got.dtype != F32 or got.shape[1] > 1000:
        assert_as_good_as_torch(got, torch_own, want, elementwise=got.dtype != F32)
    else:  # the rms error of a handful of fp32 numbers is luck
        assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("l_dtype", DTYPES, ids=lambda d: f"l_{name_of(d)}")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_is_as_good_as_torch(activation, l_dtype, dtype):
    for N in (1, 33, 1025):
        z, dy, ia3_l = randn(12, N, dtype=dtype), randn(12, N, dtype=dtype), randn(TASKS, N, dtype=l_dtype)
        for ids in (torch.tensor([0]), IDS["mixed"], IDS["bad"]):
            args = dy, z, ia3_l, ids, activation, True, True
            got, torch_own = native.ia3_scale_backward(*args), reference.act_scale_backward(*args)
            want = fp64(reference.act_scale_backward, *args)
            if activation in (None, "relu"):
                assert_bits(got[0], torch_own[0])
            else:
                assert_close(got[0], torch_own[0], want[0])
            assert_close(got[1], torch_own[1], want[1])
        none = native.ia3_scale_backward(dy, z, ia3_l, None, activation, True, True)
        first = native.ia3_scale_backward(dy, z, ia3_l, torch.tensor([0]), activation, True, True)
        assert_bits(none[0], first[0])
        assert_bits(none[1], first[1])


@pytest.mark.parametrize("ids", [None, IDS["mixed"]], ids=["no ids", "mixed"])
@pytest.mark.parametrize("size", [(3, 4, 65), (2, 2, 3, 1), (12, 1, 0)], ids=str)
def test_more_dimensions_are_rows(size, ids, dtype):
    a, b, c = (randn(*size, dtype=dtype) for _ in range(3))
    ia3_l, rows = randn(TASKS, size[-1], dtype=F32), [t.reshape(12, size[-1]) for t in (a, b, c)]
    pairs = [
        ([native.ia3_scale(a, ia3_l, ids, "silu")], [native.ia3_scale(rows[0], ia3_l, ids, "silu")]),
        ([native.ia3_glu(a, b, ia3_l, ids, "silu")], [native.ia3_glu(*rows[:2], ia3_l, ids, "silu")]),
        *(
            (op(*tensors, ia3_l, ids, "silu", True, True), op(*flat, ia3_l, ids, "silu", True, True))
            for op, tensors, flat in (
                (native.ia3_scale_backward, (a, b), rows[:2]),
                (native.ia3_glu_backward, (a, b, c), rows),
            )
        ),
    ]
    for got, want in pairs:
        for x, y in zip(got, want, strict=True):
            assert x.is_contiguous() and (x.shape == size or x.shape == ia3_l.shape)
            assert_bits(x.reshape(y.shape), y)


def odd(t: torch.Tensor) -> torch.Tensor:
    """The same tensor, as contiguous in torch's eyes, with strides of dimensions of size 1 that no address may use."""
    strides = [1009 + i if size == 1 else t.stride(i) for i, size in enumerate(t.shape)]
    copy = t.clone().as_strided(t.shape, strides)
    assert copy.is_contiguous() and (1 not in t.shape or copy.stride() != t.stride())
    return copy


@pytest.mark.parametrize("size", [(5, 1, 65), (1, 5, 65), (1, 1, 65), (5, 1, 1), (5, 2, 1), (1, 65), (5, 1)], ids=str)
def test_strides_of_dimensions_of_size_1_mean_nothing(size, dtype):
    """A convolution's one step, [B, N, 1] transposed, say."""
    tensors = [randn(*size, dtype=dtype) for _ in range(3)]
    ia3_l, ids = randn(1, size[-1], dtype=F32), torch.tensor([0, -1, 0, 0, -1])[: size[0]]
    for t, task_ids in ((ia3_l, ids), (odd(ia3_l), odd(ids)), (ia3_l, None)):
        for op, count in (("ia3_scale", 1), ("ia3_glu", 2)):
            got, want = (getattr(native, op)(*map(f, tensors[:count]), t, task_ids, "silu") for f in (odd, torch.clone))
            assert_bits(got, want)
            args = t, task_ids, "silu", True, True
            backward = getattr(native, f"{op}_backward")
            got, want = (backward(*map(f, tensors[: count + 1]), *args) for f in (odd, torch.clone))
            for a, b in zip(got, want, strict=True):
                assert_bits(a, b)
    with torch.no_grad():
        assert_bits(scale_by(ia3_l, ids)(odd(tensors[0])), scale_by(ia3_l, ids)(tensors[0]))
        glu = glu_by(ia3_l, ids, "silu")
        assert_bits(glu(*map(odd, tensors[:2])), glu(*tensors[:2]))


@pytest.mark.parametrize("B, S, P, T", [(1, 3, 2, 1), (3, 1, 1, 2), (1, 1, 1, 1)])
@pytest.mark.parametrize("E", [1, 65])
def test_strides_of_dimensions_of_size_1_mean_nothing_to_prompts(B, S, P, T, E, dtype):
    def runs(f):
        prompts, embedding, embeds = (f(randn(*size, dtype=dtype)) for size in ((T, P, E), (7, E), (B, S, E)))
        tokens, mask, labels = (f(torch.randint(1, 6, (B, S))) for _ in range(3))
        tasks, lengths = f(torch.arange(B) % T), f(torch.full((T,), P, dtype=torch.int32))
        layout, *rest = native.prompt_layout(tokens, prompts, tasks, lengths, mask, labels, True, False)
        yield from (layout, *rest)
        types = f(torch.randint(0, 7, (B, P + S))), embedding
        yield native.prompt_concat(tokens, embedding, prompts, f(layout), 2.0, *types, *types)
        yield native.prompt_concat(embeds, None, prompts, f(layout), 1.0, *[None] * 4)
        dout = f(randn(B, P + S, E, dtype=dtype))
        yield native.prompt_concat_backward(dout, f(layout), T, P)
        words = f(torch.full((B, S), 7)), embedding, prompts, tasks, lengths, 1.0
        out, rows = native.prompt_embed(*words, *[None] * 4)
        yield from (out, rows, native.prompt_embed_backward(f(randn(B, S, E, dtype=dtype)), f(rows), T, P))

    state = torch.get_rng_state()
    want = list(runs(torch.clone))
    torch.set_rng_state(state)
    for got, wanted in zip(runs(odd), want, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_backward_gives_what_is_asked_for(activation, dtype):
    z, dy, ia3_l = randn(12, 65, dtype=dtype), randn(12, 65, dtype=dtype), randn(TASKS, 65, dtype=F32)
    ids = IDS["mixed"]
    dz, dl = native.ia3_scale_backward(dy, z, ia3_l, ids, activation, True, True)
    for need_dz, need_dl in ((True, False), (False, True), (False, False)):
        got = native.ia3_scale_backward(dy, z, ia3_l, ids, activation, need_dz, need_dl)
        assert_bits(got[0], dz if need_dz else torch.empty(0, dtype=dtype))
        assert_bits(got[1], dl if need_dl else torch.empty(0))


@pytest.mark.parametrize("l_dtype", DTYPES, ids=lambda d: f"l_{name_of(d)}")
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("N", SIZES)
def test_ia3_glu_is_bitwise_the_reference(N, activation, l_dtype, dtype):
    gate, up, ia3_l = randn(12, N, dtype=dtype), randn(12, N, dtype=dtype), randn(TASKS, N, dtype=l_dtype)
    for name, ids in IDS.items():
        got = native.ia3_glu(gate, up, ia3_l, ids, activation)
        try:
            assert_bits(got, reference.act_glu(gate, up, ia3_l, ids, activation))
        except AssertionError as error:
            raise AssertionError(f"ids {name}: {error}") from error


@pytest.mark.parametrize("N", [1, 33, 1023, 4097])
@pytest.mark.parametrize("activation", ACTIVATIONS[2:])
def test_ia3_glu_is_as_good_as_torch(activation, N, dtype):
    for width in (0.5, 1.0, 4.0):
        gate, up = (width * randn(24, N, dtype=F32)).to(dtype), randn(24, N, dtype=dtype)
        args = gate, up, randn(TASKS, N, dtype=F32), IDS["mixed"], activation
        torch_own, want = reference.act_glu(*args), fp64(reference.act_glu, *args)
        assert_close(native.ia3_glu(*args), torch_own, want)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_ia3_glu_with_special_values(activation, dtype):
    """Every gate beside every up: what is Inf or NaN is so where torch's is, and a base row's scale changes no bit."""
    gate, up = torch.cartesian_prod(torch.tensor(SPECIAL), torch.tensor(SPECIAL)).to(dtype).t()[:, None].contiguous()
    ia3_l = torch.tensor([[1.0], [-0.5], [0.0], [INF], [NAN], [1e-39]]).expand(-1, gate.shape[1]).contiguous()
    # act in fp64: aten's fp32 gelu of Inf is NaN in its vectors and Inf in what is left over. The products in fp32
    act = reference.ACTIVATIONS[activation](gate.double()).float()
    for task in range(-1, len(ia3_l) + 1):
        args = gate, up, ia3_l, torch.tensor([task]), activation
        got, want = native.ia3_glu(*args), reference.act_glu(act, up.float(), *args[2:4], None).to(dtype)
        assert torch.equal(got.isnan(), want.isnan())
        for sign in (torch.isposinf, torch.isneginf):
            assert torch.equal(sign(got), sign(want))
        if activation in (None, "relu"):
            assert_bits(got, want)
            dgate, dup, _ = native.ia3_glu_backward(up, *args, True, True)
            want = reference.act_glu_backward(up, *args, [True, True])
            assert_bits(dgate, want[0])
            assert_bits(dup, want[1])
    base = native.ia3_glu(gate, up, ia3_l, torch.tensor([-1]), activation)
    assert_bits(base, native.ia3_glu(gate, up, ia3_l, torch.tensor([0]), activation))


@pytest.mark.parametrize("offset", range(8))
def test_ia3_glu_with_misaligned_and_strided_rows(offset, dtype):
    N = 65
    gate, up, dh = (
        randn(7 * stride + 8, dtype=dtype)[offset:].as_strided((7, N), (stride, 1)) for stride in (90, 70, 65)
    )
    ia3_l = randn(TASKS * 77 + 8, dtype=F32)[offset:].as_strided((TASKS, N), (77, 1))
    ids = torch.tensor([0, 4, -1, 2, 2, 1, 7])
    assert_bits(native.ia3_glu(gate, up, ia3_l, ids, None), reference.act_glu(gate, up, ia3_l, ids, None))
    packed = (t.contiguous() for t in (dh, gate, up, ia3_l))
    want = native.ia3_glu_backward(*packed, ids, "silu", True, True)
    for got, one in zip(native.ia3_glu_backward(dh, gate, up, ia3_l, ids, "silu", True, True), want, strict=True):
        assert_bits(got, one)
    one_row = gate[:1].expand(7, N)
    assert_bits(native.ia3_glu(one_row, up, ia3_l, ids, None), reference.act_glu(one_row, up, ia3_l, ids, None))


@pytest.mark.parametrize("l_dtype", DTYPES, ids=lambda d: f"l_{name_of(d)}")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_ia3_glu_backward_is_as_good_as_torch(activation, l_dtype, dtype):
    for N in (1, 33, 1025):
        dh, gate, up = (randn(12, N, dtype=dtype) for _ in range(3))
        ia3_l = randn(TASKS, N, dtype=l_dtype)
        for ids in (torch.tensor([0]), IDS["mixed"], IDS["bad"]):
            args = dh, gate, up, ia3_l, ids, activation
            got = native.ia3_glu_backward(*args, True, True)
            torch_own = reference.act_glu_backward(*args, [True, True])
            want = fp64(reference.act_glu_backward, *args, [True, True])
            for i in range(3):
                if i < 2 and activation in (None, "relu"):
                    assert_bits(got[i], torch_own[i])
                else:
                    assert_close(got[i], torch_own[i], want[i])
        none = native.ia3_glu_backward(dh, gate, up, ia3_l, None, activation, True, True)
        first = native.ia3_glu_backward(dh, gate, up, ia3_l, torch.tensor([0]), activation, True, True)
        for one, other in zip(none, first, strict=True):
            assert_bits(one, other)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_ia3_glu_backward_gives_what_is_asked_for(activation, dtype):
    dh, gate, up = (randn(12, 65, dtype=dtype) for _ in range(3))
    args = dh, gate, up, randn(TASKS, 65, dtype=F32), IDS["mixed"], activation
    dgate, dup, dl = native.ia3_glu_backward(*args, True, True)
    for need_dx, need_dl in ((True, False), (False, True), (False, False)):
        got = native.ia3_glu_backward(*args, need_dx, need_dl)
        for one, want in ((got[0], dgate), (got[1], dup)):
            assert_bits(one, want if need_dx else torch.empty(0, dtype=dtype))
        assert_bits(got[2], dl if need_dl else torch.empty(0))


def fixed_order_sum(rows: torch.Tensor) -> torch.Tensor:
    """Rows in order within chunks of 256, then the chunks in order, in fp32."""
    total = torch.zeros(rows.shape[1])
    for chunk in rows.float().split(256):
        partial = torch.zeros(rows.shape[1])
        for row in chunk:
            partial += row
        total += partial
    return total


def test_dl_is_summed_in_its_fixed_order(dtype):
    M, N = 1200, 33
    ids, dy = torch.randint(-1, TASKS, (M,)), randn(M, N, dtype=dtype)
    ids[:700] = torch.where(ids[:700] == 1, 2, ids[:700])  # task 2: several chunks
    _, dl = native.ia3_scale_backward(dy, torch.ones_like(dy), randn(TASKS, N, dtype=F32), ids, None, False, True)
    assert (ids == 2).sum() > 256
    ones = torch.ones_like(dy)
    _, _, glu_dl = native.ia3_glu_backward(dy, ones, ones, randn(TASKS, N, dtype=F32), ids, None, False, True)
    for task in range(TASKS):
        assert_bits(dl[task], fixed_order_sum(dy[ids == task]))
    assert_bits(glu_dl, dl)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_dl_does_not_depend_on_other_rows_or_threads(activation, dtype):
    N = 1100
    own_z, own_dy, ia3_l = randn(600, N, dtype=dtype), randn(600, N, dtype=dtype), randn(TASKS, N, dtype=F32)
    own_ids = torch.tensor([2])
    alone = native.ia3_scale_backward(own_dy, own_z, ia3_l, own_ids, activation, True, True)
    glu_alone = native.ia3_glu_backward(own_dy, own_z, own_z, ia3_l, own_ids, activation, True, True)
    for others in (1, 300, 701):
        ids = torch.tensor([0, 1, 3, 4, -1])[torch.randint(0, 5, (600 + others,))]
        own = torch.randperm(600 + others)[:600].sort().values
        ids[own] = 2
        z = torch.full((600 + others, N), NAN, dtype=dtype)
        dy = torch.full((600 + others, N), INF, dtype=dtype)
        z[own], dy[own] = own_z, own_dy
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            dz, dl = native.ia3_scale_backward(dy, z, ia3_l, ids, activation, True, True)
            assert_bits(dz[own], alone[0])
            assert_bits(dl[2], alone[1][2])
            dgate, dup, dl = native.ia3_glu_backward(dy, z, z, ia3_l, ids, activation, True, True)
            for got, want in ((dgate[own], glu_alone[0]), (dup[own], glu_alone[1]), (dl[2], glu_alone[2][2])):
                assert_bits(got, want)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_row_is_the_same_in_every_batch(activation, dtype):
    x, ia3_l, ids = randn(257, 700, dtype=dtype), randn(TASKS, 700, dtype=BF16), torch.randint(-1, TASKS, (257,))
    up = randn(257, 700, dtype=dtype)
    want, want_h = native.ia3_scale(x, ia3_l, ids, activation), native.ia3_glu(x, up, ia3_l, ids, activation)
    for rows in (1, 2, 7, 64):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert_bits(native.ia3_scale(x[-rows:], ia3_l, ids[-rows:], activation), want[-rows:])
            assert_bits(native.ia3_glu(x[-rows:], up[-rows:], ia3_l, ids[-rows:], activation), want_h[-rows:])


def test_many_tasks():
    tasks, N = 100_000, 8
    ia3_l, ids = randn(tasks, N, dtype=F32), torch.randint(0, tasks, (4000,))
    x = randn(4000, N, dtype=BF16)
    assert_bits(native.ia3_scale(x, ia3_l, ids, None), reference.act_scale(x, ia3_l, ids))
    _, dl = native.ia3_scale_backward(x, x, ia3_l, ids, None, True, True)
    want = torch.zeros(tasks, N, dtype=torch.float64).index_add_(0, ids, x.double() ** 2)
    assert torch.allclose(dl.double(), want, rtol=1e-6) and torch.equal(dl == 0, want == 0)


def concat_case(B: int, S: int, P: int, left: bool, *, masked: bool = True):
    """A layout as the operator makes it: bad and base rows, prompts of every length, pads on either side."""
    ids = torch.randint(-1, TASKS, (B,))
    ids[::5] = TASKS  # bad
    lengths = torch.randint(0, P + 1, (TASKS,))
    pads = torch.randint(0, S + 1, (B, 1))
    mask = (torch.arange(S) >= pads if left else torch.arange(S) < pads).long() if masked else None
    return reference.prompt_layout(ids, lengths, mask, (B, S, TASKS, P), left, torch.device("cpu"))


@pytest.mark.parametrize("p_dtype", DTYPES, ids=lambda d: f"prompts_{name_of(d)}")
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("E", [1, 31, 65, 1023, 4097])
def test_prompt_concat_is_bitwise_the_reference(E, left, p_dtype, dtype):
    B, S, P, V = 7, 5, 3, 11
    layout, prompts = concat_case(B, S, P, left), randn(TASKS, P, E, dtype=p_dtype)
    table, ids = randn(V, E, dtype=dtype), torch.randint(0, V, (B, S))
    ids[2, 1], ids[4, 3] = V, -1
    for tokens in (ids, ids.int()):
        args = tokens, table, prompts, layout
        assert_bits(native.prompt_concat(*args, *PLAIN), reference.concat_embeddings(*args))
    embedded = randn(B, S, E, dtype=dtype)
    want = reference.concat_embeddings(embedded, None, prompts, layout)
    assert_bits(native.prompt_concat(embedded, None, prompts, layout, *PLAIN), want)


@pytest.mark.parametrize("after_bos", [False, True], ids=["before", "after bos"])
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("masks", [None, torch.int64, torch.int32, torch.bool], ids=str)
def test_prompt_layout_is_the_reference(masks, left, after_bos):
    for B, S, P, wide in [(7, 5, 3, True), (300, 9, 4, False), (3, 0, 2, True), (3, 4, 0, True), (0, 3, 2, True)]:
        dtype = torch.int64 if wide else torch.int32
        mask = None if masks is None else (torch.rand(B, S) < 0.7).to(masks) * (1 if masks is torch.bool else 3)
        if mask is not None and mask.numel():
            mask[0] = 0  # a row of padding
        ids, lengths = torch.randint(-3, TASKS + 2, (B,), dtype=dtype), torch.randint(-1, P + 2, (TASKS,), dtype=dtype)
        labels = torch.randint(-5, 99, (B, S), dtype=dtype)
        for task_ids, prompt_lengths, tasks in ((ids, lengths, TASKS), (ids, None, TASKS), (None, None, 1)):
            sizes = B, S, tasks, P
            device, tensors = torch.device("cpu"), (labels, torch.empty(tasks, P, 1))
            layout = reference.prompt_layout(task_ids, prompt_lengths, mask, sizes, left, device, after_bos)
            want = (layout, *reference.concat_metadata(layout, mask, labels, S, P))
            got = native.prompt_layout(*tensors, task_ids, prompt_lengths, mask, labels, left, after_bos)
            for a, b in zip(got, want, strict=True):
                assert a.dtype == b.dtype and a.is_contiguous() and torch.equal(a, b)
            none = native.prompt_layout(*tensors, task_ids, prompt_lengths, mask, None, left, after_bos)
            assert none[3].shape == (0,) and torch.equal(none[4], want[4])


@pytest.mark.parametrize("offset", range(8))
def test_prompt_concat_misaligned_and_strided(offset, dtype):
    B, S, P, E, V = 3, 4, 2, 33, 6
    layout, ids = concat_case(B, S, P, True), torch.randint(0, V, (B, 2 * S))[:, ::2].contiguous()
    table = randn(V * 40 + 8, dtype=dtype)[offset:].as_strided((V, E), (40, 1))
    prompts = randn(TASKS * P * 50 + 8, dtype=BF16)[offset:].as_strided((TASKS, P, E), (50, TASKS * 50, 1))
    want = reference.concat_embeddings(ids, table, prompts, layout)
    assert_bits(native.prompt_concat(ids, table, prompts, layout, *PLAIN), want)
    embedded = randn(S, B, 37, dtype=dtype)[..., 2 : 2 + E].transpose(0, 1)
    want = reference.concat_embeddings(embedded, None, prompts, layout)
    assert_bits(native.prompt_concat(embedded, None, prompts, layout, *PLAIN), want)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("E", [1, 33, 1025])
def test_prompt_concat_backward_is_summed_in_its_fixed_order(E, left, dtype):
    B, S, P = 23, 4, 3
    layout = concat_case(B, S, P, left)
    dout = randn(B, P + S, E + 2, dtype=dtype)[..., 1:-1]
    got = native.prompt_concat_backward(dout, layout, TASKS, P)
    want = torch.zeros(TASKS, P, E)
    for b, (task, front, before, length) in enumerate(layout.tolist()):
        if task >= 0:
            want[task, :length] += dout[b, front + before : front + before + length].float()
    assert_bits(got, want)
    torch.set_num_threads(1)
    assert_bits(native.prompt_concat_backward(dout, layout, TASKS, P), got)


@pytest.mark.parametrize("wide", [False, True], ids=["int32", "int64"])
@pytest.mark.parametrize("after_bos", [False, True], ids=["before", "after bos"])
@pytest.mark.parametrize("broken", [None, "start", "falls", "end"])
def test_packed_layout_is_the_reference(broken, after_bos, wide):
    dtype = torch.int64 if wide else torch.int32
    for B, P, room in [(7, 3, 0), (300, 4, 0), (23, 3, -20), (23, 3, 9), (3, 0, 0), (0, 2, 4), (5, 2, -99)]:
        counts = torch.randint(0, 6, (B,))
        counts[1::4] = 0
        cu, total = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(dtype), int(counts.sum()) + 2
        if broken == "start":
            cu[0] = 1
        elif broken == "falls" and B > 3:
            cu[3] = -2
        elif broken == "end":
            cu[-1] = total + 1
        num_rows = max(total + B * P + room, 0)
        ids, lengths = torch.randint(-3, TASKS + 2, (B,), dtype=dtype), torch.randint(-1, P + 2, (TASKS,), dtype=dtype)
        labels = torch.randint(-5, 99, (total,), dtype=dtype)
        for task_ids, prompt_lengths, tasks in ((ids, lengths, TASKS), (ids, None, TASKS), (None, None, 1)):
            sizes = total, tasks, P, num_rows
            layout, out_cu = reference.packed_layout(cu, task_ids, prompt_lengths, sizes, after_bos)
            rows = reference.packed_rows(layout, out_cu, num_rows)
            want = (layout, out_cu, *reference.packed_metadata(labels, rows))
            tensors = labels, cu, torch.empty(tasks, P, 1), task_ids, prompt_lengths
            got = native.packed_layout(*tensors, labels, num_rows, after_bos)
            for a, b in zip(got, want, strict=True):
                assert a.dtype == b.dtype and a.is_contiguous() and torch.equal(a, b)
            none = native.packed_layout(*tensors, None, num_rows, after_bos)
            assert none[3].shape == (0,) and torch.equal(none[4], want[4])


def packed_case(B: int, P: int, num_rows: int | None = None):
    """The layout and offsets of a packed batch as the operator makes them, with bad, base and empty sequences."""
    ids, counts = torch.randint(-1, TASKS, (B,)), torch.randint(0, 6, (B,))
    ids[::5], counts[1::4] = TASKS, 0
    cu, total = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]), int(counts.sum()) + 2
    num_rows = total + B * P if num_rows is None else num_rows
    lengths = torch.randint(0, P + 1, (TASKS,))
    return total, num_rows, *reference.packed_layout(cu, ids, lengths, (total, TASKS, P, num_rows), True)


@pytest.mark.parametrize("num_rows", [None, 0, 9])
@pytest.mark.parametrize("E", [1, 31, 1025])
def test_prompt_concat_packed_is_bitwise_the_reference(E, num_rows, dtype):
    B, P, V = 23, 3, 11
    total, num_rows, layout, cu = packed_case(B, P, num_rows)
    prompts, table = randn(TASKS, P, E, dtype=torch.float32), randn(V, E, dtype=dtype)
    ids = torch.randint(0, V, (total,))
    ids[2], ids[4] = V, -1
    rows = reference.packed_rows(layout, cu, num_rows)
    for tokens, embedding in ((ids, table), (ids.int(), table), (randn(total, E, dtype=dtype), None)):
        want = reference.packed_embeddings(tokens, embedding, prompts, rows)
        assert_bits(native.prompt_concat_packed(tokens, embedding, prompts, layout, cu, num_rows, 1.0), want)
        torch.set_num_threads(1)
        assert_bits(native.prompt_concat_packed(tokens, embedding, prompts, layout, cu, num_rows, 1.0), want)
        torch.set_num_threads(2)


@pytest.mark.parametrize("num_rows", [None, 9])
def test_prompt_concat_packed_backward_is_summed_in_its_fixed_order(num_rows, dtype):
    P, E = 3, 33
    _, num_rows, layout, cu = packed_case(23, P, num_rows)
    dout, want = randn(num_rows, E, dtype=dtype), torch.zeros(TASKS, P, E)
    for (task, _, before, length), row, end in zip(layout.tolist(), cu.tolist(), cu[1:].tolist(), strict=False):
        for p in range(min(length, end - row - before)):
            want[task, p] += dout[row + before + p].float()
    assert_bits(native.prompt_concat_packed_backward(dout[None], layout, cu, TASKS, P), want)


def test_prompt_concat_packed_reads_nothing_outside_its_tensors():
    """A layout that points past the tokens gives NaN rows; what a layout may not say at all is refused below."""
    layout = torch.tensor([[0, 1 << 30, 0, 1], [-1, 2, 0, 0], [-1, 0, 0, 0]], dtype=torch.int32)
    cu = torch.tensor([0, 3, 5], dtype=torch.int32)
    for tokens, embedding in ((torch.zeros(3, dtype=torch.int64), torch.ones(4, 2)), (torch.ones(3, 2), None)):
        out = native.prompt_concat_packed(tokens, embedding, torch.ones(1, 2, 2) * 7, layout, cu, 6, 1.0)[:, 0]
        assert out.nan_to_num(-1).tolist() == [7, -1, -1, 1, -1, 0]


def embed_case(B: int, S: int, P: int, E: int, dtype, p_dtype):
    """The arguments of native.prompt_embed, bad and base rows among them, and bad ids of every kind."""
    ids, task_ids = torch.randint(0, 11 + P, (B, S)), torch.randint(-1, TASKS, (B,))
    ids[::3, 0], ids[1::3, 0], task_ids[::5] = -1, 11 + P, TASKS
    lengths = torch.randint(0, P + 1, (TASKS,))
    return ids, randn(11, E, dtype=dtype), randn(TASKS, P, E, dtype=p_dtype), task_ids, lengths


def embed_reference(ids, table, prompts, task_ids, lengths, scale=1.0, added=()):
    rows = reference.embed_rows(ids, table.shape[0], task_ids, lengths, *prompts.shape[:2])
    return reference.embed_tokens(ids, table, prompts, rows, scale, added), rows


@pytest.mark.parametrize("p_dtype", DTYPES, ids=lambda d: f"prompts_{name_of(d)}")
@pytest.mark.parametrize("E", [1, 31, 65, 1023, 4097])
def test_prompt_embed_is_bitwise_the_reference(E, p_dtype, dtype):
    ids, table, prompts, task_ids, lengths = embed_case(7, 5, 3, E, dtype, p_dtype)
    for tokens, tasks, ends in ((ids, task_ids, lengths), (ids.int(), task_ids.int(), None)):
        out, rows = native.prompt_embed(tokens, table, prompts, tasks, ends, *PLAIN)
        want, want_rows = embed_reference(tokens, table, prompts, tasks, ends)
        assert_bits(out, want)
        assert torch.equal(rows, want_rows) and rows.dtype == torch.int32
    out, rows = native.prompt_embed(ids, table, prompts[1:2], None, lengths[1:2], *PLAIN)
    want, want_rows = embed_reference(ids, table, prompts[1:2], None, lengths[1:2])
    assert_bits(out, want)
    assert torch.equal(rows, want_rows)


@pytest.mark.parametrize("offset", range(8))
def test_prompt_embed_misaligned_and_strided(offset, dtype):
    ids, table, prompts, task_ids, lengths = embed_case(3, 4, 2, 33, dtype, BF16)
    table = randn(11 * 40 + 8, dtype=dtype)[offset:].as_strided((11, 33), (40, 1))
    prompts = randn(TASKS * 2 * 50 + 8, dtype=BF16)[offset:].as_strided((TASKS, 2, 33), (50, TASKS * 50, 1))
    args = ids, table, prompts, task_ids.repeat_interleave(2)[::2], lengths.repeat_interleave(2)[::2]
    assert_bits(native.prompt_embed(*args, *PLAIN)[0], embed_reference(*args)[0])


@pytest.mark.parametrize("t_dtype", DTYPES, ids=lambda d: f"tables_{name_of(d)}")
@pytest.mark.parametrize("E", [1, 33, 1025])
@pytest.mark.parametrize("which", ["scale", "types", "positions", "all"])
def test_what_is_added_is_bitwise_the_reference(which, E, t_dtype, dtype):
    """Of both prompt operators; ids outside a table are NaN rows."""
    B, S, P, scale = 7, 5, 3, 33.9 if which in ("scale", "all") else 1.0
    rounded = float(reference.rounded_scale(scale, dtype))

    def added(slots):
        ids = torch.randint(-1, 5, (B, slots)), torch.randint(-1, 10, (B, slots))
        pairs = (ids[0], randn(4, E, dtype=t_dtype)), (ids[1], randn(9, E + 2, dtype=t_dtype)[:, 1:-1])
        return [
            reference.Added(*pair) if which in (name, "all") else reference.Added()
            for name, pair in zip(("types", "positions"), pairs, strict=True)
        ]

    args, extra = embed_case(B, S, P, E, dtype, F16), added(S)
    got, _ = native.prompt_embed(*args, rounded, *extra[0], *extra[1])
    assert_bits(got, embed_reference(*args, scale, extra)[0])
    for left in (False, True):
        (ids, table, prompts, _, _), extra = args, added(P + S)
        layout = concat_case(B, S, P, left)
        got = native.prompt_concat(ids, table, prompts, layout, rounded, *extra[0], *extra[1])
        assert_bits(got, reference.concat_embeddings(ids, table, prompts, layout, scale, extra))
        embedded = randn(B, S, E, dtype=dtype)
        got = native.prompt_concat(embedded, None, prompts, layout, rounded, *extra[0], *extra[1])
        assert_bits(got, reference.concat_embeddings(embedded, None, prompts, layout, scale, extra))


@pytest.mark.parametrize("E", [1, 33, 1025])
def test_prompt_embed_backward_is_summed_in_its_fixed_order(E, dtype):
    B, S, P = 23, 4, 3
    rows = torch.randint(-1, TASKS * P + 2, (B, S))
    dout = randn(B, S, E + 2, dtype=dtype)[..., 1:-1]
    got = native.prompt_embed_backward(dout, rows.int(), TASKS, P)
    want = torch.zeros(TASKS * P, E)
    for row, d in zip(rows.flatten().tolist(), dout.flatten(0, 1), strict=True):
        if 0 <= row < TASKS * P:
            want[row] += d.float()
    assert_bits(got, want.view(TASKS, P, E))
    torch.set_num_threads(1)
    assert_bits(native.prompt_embed_backward(dout, rows, TASKS, P), got)


def test_outputs_of_huge_pages(dtype):
    """From 4 MiB on the output's memory is asked for in another way."""
    args = embed_case(30, 40, 3, 1801, dtype, F32)
    assert_bits(native.prompt_embed(*args, *PLAIN)[0], embed_reference(*args)[0])


def test_two_threads_give_the_bits_of_one(dtype):
    x, ia3_l, ids = randn(128, 2049, dtype=dtype), randn(TASKS, 2049, dtype=F32), torch.randint(-1, TASKS, (128,))
    layout, tokens = concat_case(64, 8, 4, True), randn(64, 8, 1025, dtype=dtype)
    prompts = randn(TASKS, 4, 1025, dtype=F32)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        dz, dl = native.ia3_scale_backward(x, x, ia3_l, ids, "gelu_tanh", True, True)
        y, out = native.ia3_scale(x, ia3_l, ids, "silu"), native.prompt_concat(tokens, None, prompts, layout, *PLAIN)
        h = native.ia3_glu(x, x, ia3_l, ids, "gelu")
        dprompts = native.prompt_concat_backward(out, layout, TASKS, 4)
        results.append((y, dz, dl, out, h, dprompts, *native.ia3_glu_backward(x, x, x, ia3_l, ids, "silu", True, True)))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert_bits(got, want)


def test_zero_sizes(dtype):
    for M, N, tasks in ((0, 8, 2), (4, 0, 2), (0, 0, 0), (4, 8, 0)):
        x, ia3_l, ids = torch.zeros(M, N, dtype=dtype), torch.zeros(tasks, N), torch.full((M,), -1)
        assert_bits(native.ia3_scale(x, ia3_l, ids, "silu"), x)
        dz, dl = native.ia3_scale_backward(x, x, ia3_l, ids, None, True, True)
        assert_bits(dz, x)
        assert_bits(dl, ia3_l)
        assert_bits(native.ia3_glu(x, x, ia3_l, ids, "silu"), x)
        dgate, dup, dl = native.ia3_glu_backward(x, x, x, ia3_l, ids, "silu", True, True)
        for got, want in ((dgate, x), (dup, x), (dl, ia3_l)):
            assert_bits(got, want)
    assert native.ia3_scale_backward(x[:0], x[:0], torch.ones(2, 8), None, None, False, True)[1].eq(0).all()
    for B, S, P, E, V in ((0, 3, 2, 4, 5), (2, 0, 2, 4, 5), (2, 3, 0, 4, 5), (2, 3, 2, 0, 5), (2, 3, 2, 4, 0)):
        layout = torch.tensor([[0, 0, 0, P], [-1, 0, 0, 0]], dtype=torch.int32)[:B]
        tokens, table = torch.zeros(B, S, dtype=torch.int64), torch.full((V, E), 2.0, dtype=dtype)
        want = torch.full((B, P + S, E), 2.0 if V else float("nan"), dtype=dtype)
        if B:
            want[0, :P], want[1:, S:] = 1, 0
        assert_bits(native.prompt_concat(tokens, table, torch.ones(1, P, E), layout, *PLAIN), want)
        dout = torch.ones(B, P + S, E, dtype=dtype)
        assert_bits(native.prompt_concat_backward(dout, layout, 1, P), torch.ones(1, P, E) * (B > 0))
        ids = torch.full((B, S), V)
        out, rows = native.prompt_embed(ids, table, torch.ones(1, P, E), None, None, *PLAIN)
        assert_bits(out, torch.full((B, S, E), 1.0 if P else NAN, dtype=dtype))
        assert rows.eq(0 if P else 1).all() and rows.shape == (B, S)
        want = torch.zeros(1, P, E)
        want[:, :1] = B * S
        assert_bits(native.prompt_embed_backward(torch.ones(B, S, E, dtype=dtype), rows, 1, P), want)


X, TABLE, LAYOUT = torch.zeros(4, 8), torch.zeros(2, 8), torch.tensor([[0, 0, 0, 2]] * 2, dtype=torch.int32)
TOKENS, EMBEDDING, PROMPTS = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(5, 8), torch.zeros(1, 2, 8)
SLOTS, EMBED, CONCAT = torch.zeros(2, 5).long(), (EMBEDDING, PROMPTS), (TOKENS, EMBEDDING, PROMPTS, LAYOUT)
DOUT, NO_IDS, THREE_IDS = torch.zeros(2, 5, 8), torch.tensor([], dtype=torch.int64), torch.tensor([0, 0, 0])
PACKED, OFFSETS = (
    torch.tensor([[0, 0, 0, 2], [-1, 0, 0, 0]], dtype=torch.int32),
    torch.tensor([0, 5], dtype=torch.int32),
)
IDS3 = torch.zeros(3, dtype=torch.int64)
BAD_CALLS = [
    ("first_bad_id", (X, 0, 2), "ids must be int32 or int64, got Float"),
    ("first_bad_offset", (X, 0, 2), "cu_seqlens must be int32 or int64, got Float"),
    ("ia3_scale", (X.double(), TABLE, None, None), "x must be float32, float16 or bfloat16, got Double"),
    ("ia3_scale", (X[0], TABLE, None, None), r"x must be 2-D, or contiguous with more dimensions, got shape \[8\]"),
    ("ia3_scale", (X[None].mT, TABLE, None, None), "x must be 2-D, or contiguous with more dimensions, got shape"),
    ("ia3_scale", (X.t(), TABLE[:, :4], None, None), "x must be contiguous in its last dimension, got stride 8"),
    ("ia3_scale", (X, TABLE.long(), None, None), "ia3_l must be float32, float16 or bfloat16, got Long"),
    ("ia3_scale", (X, TABLE[:, :7], None, None), r"ia3_l must have 8 columns as x has, got shape \[2, 7\]"),
    ("ia3_scale", (X, TABLE[:0], None, None), "ia3_l must have a row where task_ids is None, got none"),
    ("ia3_scale", (X, TABLE, THREE_IDS, None), "task_ids must divide the 4 rows of x, got 3 ids"),
    ("ia3_scale", (X, TABLE, NO_IDS, None), "task_ids must divide the 4 rows of x, got 0 ids"),
    ("ia3_scale", (X, TABLE, THREE_IDS.short(), None), "task_ids must be int32 or int64, got Short"),
    ("ia3_scale", (X, TABLE, None, "tanh"), "activation must be None, relu, gelu, gelu_tanh or silu, got tanh"),
    ("ia3_scale_backward", (X[:3], X, TABLE, None, None, True, True), r"dy must have z's shape \[4, 8\], got \[3, 8\]"),
    ("ia3_scale_backward", (X.half(), X, TABLE, None, None, True, True), "dy must have z's dtype, got Half"),
    ("ia3_glu", (X.double(), X, TABLE, None, None), "gate must be float32, float16 or bfloat16, got Double"),
    ("ia3_glu", (X, X[:3], TABLE, None, None), r"up must have gate's shape \[4, 8\], got \[3, 8\]"),
    ("ia3_glu", (X, X.half(), TABLE, None, None), "up must have gate's dtype, got Half"),
    ("ia3_glu", (X, X, TABLE[:, :7], None, None), r"ia3_l must have 8 columns as gate has, got shape \[2, 7\]"),
    ("ia3_glu", (X, X, TABLE[:0], None, None), "ia3_l must have a row where task_ids is None, got none"),
    ("ia3_glu", (X, X, TABLE, THREE_IDS, None), "task_ids must divide the 4 rows of gate, got 3 ids"),
    ("ia3_glu", (X, X, TABLE, None, "tanh"), "activation must be None, relu, gelu, gelu_tanh or silu, got tanh"),
    ("ia3_glu_backward", (X[:3], X, X, TABLE, None, None, True, True), r"dh must have gate's shape \[4, 8\], got"),
    ("ia3_glu_backward", (X, X, X.half(), TABLE, None, None, True, True), "up must have gate's dtype, got Half"),
    ("prompt_concat", (TOKENS[0], EMBEDDING, PROMPTS, LAYOUT, *PLAIN), r"tokens must be \[B, S\] where there is an"),
    ("prompt_concat", (TOKENS, None, PROMPTS, LAYOUT, *PLAIN), "tokens must be float32, float16 or bfloat16, got Long"),
    ("prompt_concat", (TOKENS, EMBEDDING[0], PROMPTS, LAYOUT, *PLAIN), r"embedding must be 2-D, got shape \[8\]"),
    ("prompt_concat", (TOKENS, EMBEDDING, PROMPTS[0], LAYOUT, *PLAIN), r"prompts must be 3-D, got shape \[2, 8\]"),
    ("prompt_concat", (TOKENS, EMBEDDING, PROMPTS[..., :4], LAYOUT, *PLAIN), "prompts must have 8 columns as the"),
    ("prompt_concat", (TOKENS, EMBEDDING, PROMPTS, LAYOUT.long(), *PLAIN), "layout must be int32, got Long"),
    ("prompt_concat", (TOKENS, EMBEDDING, PROMPTS, LAYOUT[:1], *PLAIN), r"layout must be \[2, 4\], got \[1, 4\]"),
    ("prompt_concat", (TOKENS, EMBEDDING, PROMPTS, LAYOUT + 1, *PLAIN), "layout must stay inside 1 tasks, 3"),
    ("prompt_layout", (IDS3, PROMPTS, None, None, None, None, True, False), "tokens must be .B, S. or .B, S, E., got"),
    ("prompt_layout", (TOKENS, X, None, None, None, None, True, False), "prompts must be 3-D, got shape"),
    ("prompt_layout", (TOKENS, PROMPTS, IDS3, None, None, None, True, False), "task_ids must have 2 entries"),
    ("prompt_layout", (TOKENS, PROMPTS, None, IDS3, None, None, True, False), "prompt_lengths must have 1 en"),
    ("prompt_layout", (TOKENS, PROMPTS, None, None, X, None, True, False), "attention_mask must be int32, in"),
    ("prompt_layout", (TOKENS, PROMPTS, None, None, None, TOKENS[:1], True, False), "labels must be contiguous, of sh"),
    ("prompt_concat_backward", (DOUT, LAYOUT, 1, 6), r"P must lie in \[0, 5\], got 6"),
    ("prompt_concat_backward", (DOUT, LAYOUT, -1, 2), "num_tasks must not be negative, got -1"),
    ("prompt_concat_backward", (DOUT, LAYOUT, 0, 2), "layout must stay inside 0 tasks"),
    ("packed_layout", (IDS3, OFFSETS, X, None, None, None, 9, False), "prompts must be 3-D, got shape"),
    ("packed_layout", (IDS3, OFFSETS, PROMPTS, None, None, None, 2**31, False), r"num_rows must lie in \[0, 2\*\*31"),
    ("packed_layout", (IDS3, OFFSETS[:0], PROMPTS, None, None, None, 9, False), "cu_seqlens must have B . 1 entries"),
    ("packed_layout", (IDS3, OFFSETS, PROMPTS, IDS3, None, None, 9, False), "task_ids must have 1 entries, got 3"),
    ("packed_layout", (IDS3, OFFSETS, PROMPTS, None, IDS3, None, 9, False), "prompt_lengths must have 1 entries"),
    ("packed_layout", (IDS3, OFFSETS, PROMPTS, None, None, IDS3[:2], 9, False), "labels must be contiguous, of sh"),
    ("prompt_concat_packed", (TOKENS[0], EMBEDDING, PROMPTS, PACKED, OFFSETS, 3, 1.0), "layout must stay inside 1"),
    ("prompt_concat_packed", (TOKENS[0], EMBEDDING, PROMPTS, PACKED + 1, OFFSETS, 9, 1.0), "layout must stay inside 1"),
    ("prompt_concat_packed", (TOKENS[0], EMBEDDING, PROMPTS, PACKED[:1], OFFSETS, 9, 1.0), r"layout must be \[2, 4\]"),
    ("prompt_concat_packed", (TOKENS[0], EMBEDDING, PROMPTS, PACKED, -OFFSETS, 9, 1.0), "layout must stay inside"),
    ("prompt_concat_packed", (TOKENS[0], EMBEDDING, PROMPTS[..., :4], PACKED, OFFSETS, 9, 1.0), "prompts must have 8"),
    ("prompt_concat_packed_backward", (DOUT, PACKED, OFFSETS, 1, 2), r"dout must be \[1, num_rows, E\], got shape"),
    ("prompt_concat_packed_backward", (DOUT[:1], PACKED, OFFSETS, -1, 2), "num_tasks and P must not be negative"),
    ("prompt_concat", (*CONCAT, 1.0, SLOTS, None, None, None), "types and type_embedding must be given together"),
    ("prompt_concat", (*CONCAT, 1.0, TOKENS, EMBEDDING, None, None), "types must have 10 elements, got shape"),
    ("prompt_concat", (*CONCAT, 1.0, SLOTS, DOUT, None, None), r"type_embedding must be 2-D, got shape \[2, 5, 8\]"),
    ("prompt_concat", (*CONCAT, 1.0, None, None, SLOTS, X[:, 1:]), "position_embedding must have 8 columns as the"),
    ("prompt_embed", (TOKENS[0], *EMBED, None, None, *PLAIN), r"input_ids must be \[B, S\], got shape \[3\]"),
    ("prompt_embed", (TOKENS, EMBEDDING.long(), PROMPTS, None, None, *PLAIN), "embedding must be float32, float16 or"),
    ("prompt_embed", (TOKENS, EMBEDDING, PROMPTS[..., 1:], None, None, *PLAIN), "prompts must have 8 columns as the"),
    ("prompt_embed", (TOKENS, EMBEDDING, PROMPTS[:0], None, None, *PLAIN), "prompts must have a task where task_ids"),
    ("prompt_embed", (TOKENS, *EMBED, THREE_IDS, None, *PLAIN), "task_ids must be one per sequence, 2, got 3"),
    ("prompt_embed", (TOKENS, *EMBED, None, THREE_IDS, *PLAIN), "prompt_lengths must be one per task, 1, got 3"),
    ("prompt_embed", (TOKENS, *EMBED, None, None, 1.0, None, None, TOKENS, None), "positions and position_embedding"),
    ("prompt_embed_backward", (DOUT, TOKENS, 1, 2), r"rows must be \[2, 5\], got \[2, 3\]"),
    ("prompt_embed_backward", (DOUT, SLOTS, 1, -1), "num_tasks and P must not be negative, got 1 and -1"),
]  # fmt: skip


@pytest.mark.parametrize("op, args, message", BAD_CALLS, ids=[f"{op}-{i}" for i, (op, _, _) in enumerate(BAD_CALLS)])
def test_messages(op, args, message):
    with pytest.raises(RuntimeError, match=f"{op}: {message}"):
        getattr(native, op)(*args)


# the names that this library takes from torch, each of them exported by torch 2.10.0: a later one would not load there
TORCH_2_10 = """
    aoti_torch_abi_version aoti_torch_delete_library_object aoti_torch_delete_tensor_object
    aoti_torch_empty_strided aoti_torch_get_data_ptr aoti_torch_get_dim aoti_torch_get_dtype
    aoti_torch_get_numel aoti_torch_get_size aoti_torch_get_sizes aoti_torch_get_stride
    aoti_torch_is_contiguous aoti_torch_library_init_impl aoti_torch_new_tensor_handle torch_delete_string
    torch_library_impl torch_parallel_for torch_string_c_str torch_string_length
""".split()
CONSTANTS = {  # functions that return the number of a dtype or a device
    "aoti_torch_dtype_": "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 bfloat16"
    " complex32 complex64 complex128 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz",
    "aoti_torch_device_type_": "cpu cuda meta mps privateuse1 xpu",
}


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm to read the library with")
def test_the_library_needs_nothing_newer_than_torch_2_10_and_no_python():
    (library,) = (p for p in Path(peft_ops.__file__).parent.glob("_C*.so") if not p.name.startswith("_C_cuda"))
    listing = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    names = {line.split()[-1].split("@")[0] for line in listing.stdout.splitlines()}
    allowed = set(TORCH_2_10) | {prefix + name for prefix, names in CONSTANTS.items() for name in names.split()}
    ours = {name for name in names if "torch" in name or "c10" in name or name.startswith("_ZN2at")}
    assert ours - allowed == set()
    assert not {name for name in names if name.startswith(("Py", "_Py"))}


def test_ids_may_change_meanwhile():
    """Another thread rewrites the ids of a backward: whatever it read of them, it stays inside its buffers."""
    tasks, M = 64, 4096
    ids, x, ia3_l, stop = torch.zeros(M, dtype=torch.int64), torch.ones(M, 2), torch.ones(tasks, 2), threading.Event()
    choices = [torch.randint(-1, tasks, (M,)), torch.full((M,), tasks - 1), torch.zeros(M, dtype=torch.int64)]

    def change():
        while not stop.is_set():
            for choice in choices:
                ids.copy_(choice)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(200):
            dz, dl = native.ia3_scale_backward(x, x, ia3_l, ids, None, True, True)
            assert dz.eq(1).all() and dl.sum() <= 2 * M
    finally:
        stop.set()
        thread.join()


def test_every_native_schema_has_its_kernel():
    for name in NATIVE_SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"peft_ops_native::{name}", "CPU"), name


def test_info_says_what_runs():
    rows = info.info()
    assert rows["native CPU library"].startswith("_C")
    assert "native" in rows["ia3_scale on a CPU"] or "Triton" in rows["ia3_scale on a CPU"]


def test_no_tokens_of_any_stride():
    """A tensor without elements is contiguous whatever its strides are."""
    embeds, cu_seqlens, prompts = torch.empty(8, 5).t()[:0], torch.zeros(3, dtype=torch.int32), torch.randn(2, 4, 8)
    with peft_ops.set_backend("native"):
        batch = peft_ops.prompt_concat_packed(
            None, cu_seqlens, None, prompts, torch.tensor([1, 0]), max_seqlen=4, inputs_embeds=embeds
        )
    assert torch.equal(batch.inputs_embeds, prompts[[1, 0]].flatten(0, 1))
