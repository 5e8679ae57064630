"""The CUDA C++ kernels against peft_ops.reference: on a GPU, and thread by thread on a host (emulated.cpp)."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import peft_ops
from peft_ops import _library, _native_rule, info, reference, set_backend
from peft_ops._library import NATIVE_SCHEMAS, has_native, native
from peft_ops.ops import prompt_concat as module
from tests.conftest import (
    DTYPES,
    INTERPRET,
    assert_as_good_as_torch,
    assert_same,
    ids_like,
    name_of,
)
from tests.test_architecture import ROOT

pytestmark = pytest.mark.kernels
if INTERPRET:
    pytest.skip("no Triton kernel in it", allow_module_level=True)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CODES = {F32: 0, F16: 1, BF16: 2}  # csrc/dtype.h
ACTIVATIONS = [None, "relu", "silu", "gelu", "gelu_tanh"]
SIZES = [1, 3, 7, 8, 9, 33, 64, 520, 1023, 1024, 1025, 4097]  # around 16 bytes, and the 128 threads of a block
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
on_a_gpu = pytest.mark.skipif(not has_native("cuda"), reason="no GPU, or no CUDA library")


class Host:
    """The kernels on CPU tensors. `out`, a contiguous view, stands in for the tensor that the operator would make."""

    device = "cpu"

    def __init__(self, library):
        self.library = ctypes.CDLL(library)

    def call(self, name, tensors, *numbers):
        pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
        getattr(self.library, name)(*pointers, *(ctypes.c_int64(n) for n in numbers))
        return tensors[-1]

    def ia3_scale(self, x, ia3_l, ids, activation, out=None):
        (M, N), wide = x.shape, ids is not None and ids.dtype == torch.int64
        out = torch.empty(M, N, dtype=x.dtype) if out is None else out
        count, stride = (1, 0) if ids is None else (len(ids), ids.stride(0) * ids.element_size())
        sizes = M, N, x.stride(0), ia3_l.stride(0), stride, count, len(ia3_l)
        codes = CODES[x.dtype], CODES[ia3_l.dtype], ACTIVATIONS.index(activation)
        return self.call("ia3_scale", [x, ia3_l, ids, out], *sizes, wide, *codes)

    def prompt_concat(self, tokens, embedding, prompts, layout, out=None):
        (num_tasks, P, E), (B, S) = prompts.shape, tokens.shape[:2]
        ids, embedded = (None, tokens) if embedding is None else (tokens, embedding)
        out = torch.empty(B, P + S, E, dtype=embedded.dtype) if out is None else out
        sizes = B, S, P, E, len(embedded), num_tasks, tokens.dtype == torch.int64
        return self.call(
            "prompt_concat", [ids, embedded, prompts, layout, out], *sizes, CODES[out.dtype], CODES[prompts.dtype]
        )


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("no g++ to compile the kernels with")
    folder = tmp_path_factory.mktemp("emulated")
    for header in ("cuda_bf16.h", "cuda_fp16.h", "cuda_runtime.h", "driver_types.h"):
        (folder / header).touch()  # emulated.cpp has what is used of them
    # the sanitizer sees an access that is wider than its address allows
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fsanitize=undefined", f"-I{folder}", f"-I{ROOT}"]
    torchs = ["-isystem", Path(torch.__file__).parent / "include"]
    library = folder / "kernels.so"
    subprocess.run(["g++", *flags, *torchs, ROOT / "tests/emulated.cpp", "-o", library], check=True)
    return Host(library)


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors of a few rows: torch's threads waiting for each other would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def copied(*args):
    return native.prompt_concat(*args, 1.0, None, None, None, None)


@pytest.fixture(params=["host"] + ["gpu"] * has_native("cuda"))
def cuda(request, capfd):
    if request.param == "gpu":
        yield SimpleNamespace(device="cuda", ia3_scale=native.ia3_scale, prompt_concat=copied)
    else:
        yield request.getfixturevalue("host")
        assert "runtime error" not in (said := capfd.readouterr().err), said


def moved(cuda, *tensors):
    return [t if t is None else t.to(cuda.device) for t in tensors]


def randn(*shape, dtype):
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("l_dtype", DTYPES, ids=lambda d: f"l_{name_of(d)}")
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("N", SIZES)
def test_ia3_scale_is_bitwise_the_reference(N, activation, l_dtype, dtype, cuda):
    x, ia3_l = moved(cuda, randn(12, N, dtype=dtype), randn(TASKS, N, dtype=l_dtype))
    for ids in IDS.values():
        (ids,) = moved(cuda, ids)
        want = reference.act_scale(x, ia3_l, ids, activation)
        assert_same(cuda.ia3_scale(x, ia3_l, ids, activation), want, bitwise=True)


@pytest.mark.parametrize("N", [33, 1023, 4097])
@pytest.mark.parametrize("activation", ACTIVATIONS[2:])
def test_activations_are_as_good_as_torch(activation, N, dtype, cuda):
    for width in (0.5, 1.0, 4.0):
        x, ia3_l, ids = moved(
            cuda, (width * randn(24, N, dtype=F32)).to(dtype), randn(TASKS, N, dtype=F32), IDS["mixed"]
        )
        torch_own = reference.act_scale(x, ia3_l, ids, activation)
        z = x.double()
        if activation == "gelu_tanh":  # as aten writes it, with 1 + tanh, its tail has no digits left, in fp64 too
            z = z * torch.sigmoid(1.5957691216057308 * (z + 0.044715 * z**3))
        want = reference.act_scale(z, ia3_l.double(), ids, None if activation == "gelu_tanh" else activation)
        got = cuda.ia3_scale(x, ia3_l, ids, activation)
        assert_as_good_as_torch(got, torch_own, want, elementwise=dtype != F32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_special_values(activation, dtype, cuda):
    inf, nan = float("inf"), float("nan")
    special = torch.tensor([inf, -inf, nan, 0.0, -0.0, 1e-40, -1e-40, 6e-8, 65504.0, -65504.0, 3e38, 1.0, -2.5])
    x = special.repeat(5).to(dtype)[None]
    ia3_l = torch.tensor([[1.0], [-0.5], [0.0], [inf], [nan], [1e-39]]).expand(-1, x.shape[1]).contiguous()
    x, ia3_l = moved(cuda, x, ia3_l)
    for task in range(-1, len(ia3_l) + 1):
        (ids,) = moved(cuda, torch.tensor([task]))
        got = cuda.ia3_scale(x, ia3_l, ids, activation)
        want = reference.act_scale(x.double(), ia3_l.double(), ids, activation)
        assert torch.equal(got.isnan(), want.isnan())
        for sign in (torch.isposinf, torch.isneginf):
            assert torch.equal(sign(got), sign(want.to(dtype)))
        if activation in (None, "relu"):
            want = reference.act_scale(x, ia3_l, ids, activation)
            assert_same(got, want, bitwise=True)
            assert torch.equal(got.signbit() & ~got.isnan(), want.signbit() & ~want.isnan()), "zeros of other signs"


def test_every_16_bit_number_comes_through(cuda):
    for dtype in (F16, BF16):
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(64, 1024)
        for factor in (1.0, 1.0009765625, 0.3333, 1e-6):
            x, ia3_l = moved(cuda, x, torch.full((1, 1024), factor))
            assert_same(cuda.ia3_scale(x, ia3_l, None, None), reference.act_scale(x, ia3_l, None), bitwise=True)
        (ids,) = moved(cuda, torch.tensor([-1]))
        assert_same(cuda.ia3_scale(x, ia3_l, ids, None), x, bitwise=True)


@pytest.mark.parametrize("l_dtype", DTYPES, ids=lambda d: f"l_{name_of(d)}")
@pytest.mark.parametrize("offset", range(8))
def test_rows_of_any_address(offset, l_dtype, dtype, cuda):
    """Of x and of the table; test_outputs_of_any_address has the output, which an operator makes itself."""
    for N in (1, 5, 64, 65, 1030):
        x, ia3_l, ids = moved(
            cuda, randn(7 * 1120 + 8, dtype=dtype), randn(8000, dtype=l_dtype), ids_like("uniform", 7, 5, "cpu")
        )
        for stride in (N, 1119, 1120):
            rows, table = x[offset:].as_strided((7, N), (stride, 1)), ia3_l[7 - offset :].as_strided((5, N), (N + 3, 1))
            assert_same(cuda.ia3_scale(rows, table, ids, None), reference.act_scale(rows, table, ids), bitwise=True)
        rows = x[offset : offset + N].expand(7, N)
        assert_same(cuda.ia3_scale(rows, table, ids, None), reference.act_scale(rows, table, ids), bitwise=True)


@pytest.mark.parametrize("offset", range(8))
def test_outputs_of_any_address(offset, dtype, host):
    """Between guards: every element is written once, none beside them."""
    for N in (1, 7, 8, 65, 1023, 1030):
        x, ia3_l, ids = randn(6, N, dtype=dtype), randn(TASKS, N, dtype=F32), IDS["mixed"]
        buffer = torch.full((6 * N + 16,), float("nan"), dtype=dtype)
        out = buffer[offset : offset + 6 * N].view(6, N)
        host.ia3_scale(x, ia3_l, ids, None, out)
        assert_same(out, reference.act_scale(x, ia3_l, ids), bitwise=True)
        assert buffer[:offset].isnan().all() and buffer[offset + 6 * N :].isnan().all()


@pytest.mark.parametrize("size", [2, 4])
def test_pieces_are_aligned_and_cover_the_row_once(size, host):
    for N in (1, 3, 8, 9, 64, 1023):
        for address in range(0, 32, size):
            seen, span = [], (ctypes.c_int * 3)()
            for i in range(N + 2):
                host.library.piece_of(ctypes.c_void_p(address), i, N, size, span)
                start, first, last = span
                if last <= 0:
                    break
                assert (address + start * size) % 16 == 0 and 0 <= first < last <= 16 // size
                seen += range(start + first, start + last)
            assert seen == list(range(N))


@pytest.mark.parametrize("shape", [(65600, 513), (3, 300_000), (200_000, 1)], ids=str)
def test_more_rows_and_columns_than_a_grid_has(shape, cuda):
    """65535 blocks of one row of 513 fp16 columns; columns beyond them are further blocks, rows a further turn."""
    x, ia3_l = moved(cuda, torch.randn(shape).half(), torch.randn(2, shape[1]))
    (ids,) = moved(cuda, torch.arange(shape[0]) % 3 - 1)
    assert_same(cuda.ia3_scale(x, ia3_l, ids, None), reference.act_scale(x, ia3_l, ids), bitwise=True)


def test_offsets_beyond_2_to_the_31(cuda):
    """Two rows of x, of a table; the last embeddings and prompts. Only their pages are ever touched."""
    if cuda.device == "cuda" and torch.cuda.mem_get_info()[0] < 5e9:
        pytest.skip("needs 4.3 GB of GPU memory")
    torch.use_deterministic_algorithms(False)  # nothing fills the memory
    memory = torch.empty(2**31 + 128, dtype=BF16, device=cuda.device)
    near = randn(2, 64, dtype=BF16).to(cuda.device)
    far = memory.as_strided((2, 64), (2**31 + 8, 1)).copy_(near)
    (ids,) = moved(cuda, torch.tensor([1, 0]))
    want = reference.act_scale(near, near, ids)
    assert_same(cuda.ia3_scale(far, near, ids, None), want, bitwise=True)
    assert_same(cuda.ia3_scale(near, far, ids, None), want, bitwise=True)
    rows = memory.view(-1, 64)
    rows[-2:] = near
    tokens, layout = moved(cuda, torch.tensor([[2**25]]), torch.tensor([[2**25 + 1, 0, 0, 1]], dtype=torch.int32))
    assert_same(cuda.prompt_concat(tokens, rows, rows[:, None], layout), near.flip(0)[None], bitwise=True)


def layouts(B, S, P, num_tasks, left):
    """Ids of every kind, prompts of every length, pads of every number, as the operator makes them."""
    ids = torch.randint(-2, num_tasks + 1, (B,))
    lengths = torch.randint(0, P + 1, (num_tasks,))
    pads = torch.randint(0, S + 1, (B, 1))
    mask = (torch.arange(S) >= pads) if left else (torch.arange(S) < S - pads)
    return reference.prompt_layout(ids, lengths, mask.long(), (B, S, num_tasks, P), left, ids.device)


@pytest.mark.parametrize("prompt_dtype", DTYPES, ids=lambda d: f"prompts_{name_of(d)}")
@pytest.mark.parametrize("E", [1, 7, 8, 24, 33, 1030])
def test_prompt_concat_is_bitwise_the_reference(E, prompt_dtype, dtype, cuda):
    for B, S, P in ((7, 5, 3), (6, 0, 4), (6, 9, 0), (1, 1, 1)):
        table, prompts = moved(cuda, randn(11, E, dtype=dtype), randn(TASKS, P, E, dtype=prompt_dtype))
        for left in (False, True):
            for ids_dtype in (torch.int32, torch.int64):
                tokens = torch.randint(-1, 12, (B, S), dtype=ids_dtype)  # two of thirteen are bad
                tokens, layout = moved(cuda, tokens, layouts(B, S, P, TASKS, left))
                for args in ((tokens, table), (randn(B, S, E, dtype=dtype).to(cuda.device), None)):
                    want = reference.concat_embeddings(*args, prompts, layout)
                    assert_same(cuda.prompt_concat(*args, prompts, layout), want, bitwise=True)


def test_tables_without_rows(dtype, cuda):
    """Their address is null: base rows come back and prompts stand, every other id is bad."""
    x, tokens = randn(4, 9, dtype=dtype), torch.tensor([[0, 1, -1], [2, 0, 0]])
    ids, no_task, some = torch.tensor([-1, 0]), torch.empty(0, 9), randn(2, 2, 9, dtype=F32)
    x, tokens, ids, no_task, prompts = moved(cuda, x, tokens, ids, no_task, some)
    assert_same(cuda.ia3_scale(x, no_task, ids, None), reference.act_scale(x, no_task, ids), bitwise=True)
    for table, p in ((no_task.to(dtype), prompts), (x, prompts[:0])):
        layout = reference.prompt_layout(ids, None, None, (2, 3, len(p), 2), False, ids.device)
        want = reference.concat_embeddings(tokens, table, p, layout)
        assert_same(cuda.prompt_concat(tokens, table, p, layout), want, bitwise=True)


def test_a_wrong_layout_leads_nowhere_outside(cuda):
    """What the layout says is an address, and nobody checks it on a GPU: every row comes from inside, is 0, or NaN."""
    B, S, P, E, guard = 4096, 3, 2, 8, 777.0
    values = torch.tensor([-(2**31), -(2**31) + 1, -9, -3, -2, -1, 0, 1, 2, 3, 4, 5, 9, 2**31 - 2, 2**31 - 1])
    layout = values[torch.randint(len(values), (B, 4))].int()
    prompts, table = torch.full((40, P, E), guard), torch.full((40, E), guard)
    prompts[16:18], table[16:20] = 1.0, 2.0
    prompts, table, layout = moved(cuda, prompts, table, layout)
    tokens = torch.randint(-9, 13, (B, S)).to(cuda.device)
    got = cuda.prompt_concat(tokens, table[16:20], prompts[16:18], layout).unique()
    assert set(got[~got.isnan()].tolist()) == {0.0, 1.0, 2.0}


def test_the_table_of_auto_is_asked(monkeypatch):
    """Without a measurement Triton serves a GPU; with one, up to the size that it names; float64 nobody but PyTorch."""
    monkeypatch.setattr(_library, "_NATIVE", frozenset({"cpu", "cuda"}))

    def chosen(numel, op="ia3_scale", dtype=BF16):
        x = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, numel=lambda: numel)
        return _library.use_native(op, x)

    assert _native_rule.CUDA_WINS == {} and not chosen(1)
    monkeypatch.setitem(_native_rule.CUDA_WINS, "ia3_scale", 4096)
    assert chosen(1) and chosen(4096) and not chosen(4097) and not chosen(1, dtype=torch.float64)
    assert not chosen(1, "prompt_concat") and not chosen(1, "ia3_glu")
    with set_backend("native"):
        assert chosen(2**30)
        assert tuple(op for op in NATIVE_SCHEMAS if chosen(1, op)) == _native_rule.CUDA_OPS
    for name in ("triton", "reference"):
        with set_backend(name):
            assert not chosen(1)


ADDED = {
    "nothing": (True, {}),
    "scale": (False, dict(embed_scale=2.0)),
    "scale without a table": (True, dict(embed_scale=2.0, embedding=None)),
    "positions": (False, dict(position_embedding=(9, 8))),
    "types": (False, dict(token_type_embedding=(2, 8))),
}
OUT = 2 * 9 * 8  # elements of the output


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize(
    ("backend", "wins", "copied_by", "added_by"),
    [
        ("auto", {}, "triton", "triton"),
        ("auto", {"prompt_concat": OUT}, "native", "triton"),
        ("auto", {"prompt_concat": OUT - 1}, "triton", "triton"),
        ("native", {}, "native", "reference"),
    ],
    ids=["auto", "auto up to this size", "auto up to a smaller size", "native"],
)
def test_prompt_concat_is_native_only_where_it_copies(backend, wins, copied_by, added_by, added, monkeypatch):
    """What the CUDA C++ kernel does not add, Triton does, or plain PyTorch under "native"."""
    from torch._subclasses import FakeTensorMode

    ran = []
    monkeypatch.setattr(_library, "_NATIVE", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(_native_rule, "CUDA_WINS", wins)
    monkeypatch.setattr(module, "native", SimpleNamespace(prompt_concat=lambda *args: ran.append("native")))
    monkeypatch.setattr(module, "launch_concat", lambda *args: ran.append("triton"))
    monkeypatch.setattr(reference, "concat_embeddings", lambda *args: ran.append("reference"))
    # beside the choice, what a CPU build of torch cannot do with tensors that claim to be on a GPU
    monkeypatch.setattr(reference, "prompt_layout", lambda *args: None)
    monkeypatch.setattr(reference, "concat_metadata", lambda *args: [None] * 4)
    monkeypatch.setattr(module, "_added", lambda *args: reference.NOTHING_ADDED)
    copies, changed = ADDED[added]
    sizes = dict(embedding=(1000, 8), position_embedding=None, token_type_embedding=None, embed_scale=1.0) | changed
    scale = sizes.pop("embed_scale")
    with FakeTensorMode(), set_backend(backend):
        table, positions, types = (size and torch.empty(size, device="cuda") for size in sizes.values())
        tokens = torch.empty((2, 5, 8) if table is None else (2, 5), device="cuda")
        tokens, ids = tokens if table is None else tokens.int(), torch.empty(2, dtype=torch.int32, device="cuda")
        for dtype in (F32, torch.float64):  # which is plain PyTorch's alone
            prompts = torch.empty(3, 4, 8, dtype=dtype, device="cuda")
            module._prompt_concat(
                tokens, table, prompts, positions, types, ids, None, None, None, None, 0, scale, False, False
            )
    assert ran == [copied_by if copies else added_by, "reference"]


def test_native_on_a_gpu_needs_the_cuda_library(monkeypatch):
    monkeypatch.setattr(_library, "_NATIVE", frozenset({"cpu"}))
    x = SimpleNamespace(device=torch.device("cuda"), dtype=BF16, numel=lambda: 1)
    message = (
        "^ia3_scale: backend 'native' needs the compiled CUDA library, which this install lacks; see python -m peft"
    )
    with set_backend("native"), pytest.raises(RuntimeError, match=message):
        _library.use_native("ia3_scale", x)
    assert not _library.use_native("ia3_scale", x)


@pytest.mark.parametrize("backend", ["auto", "triton", "native", "reference"])
def test_info_says_what_runs_on_a_gpu(backend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(info, "find_spec", lambda name: name)
    monkeypatch.setattr(_library, "_NATIVE", frozenset({"cuda"}))
    monkeypatch.setitem(_native_rule.CUDA_WINS, "ia3_scale", 4096)
    wanted = {
        "auto": "Triton; ia3_scale native up to 4096 elements",
        "triton": "Triton",
        "native": "native for the forward of ia3_scale and prompt_concat (with nothing added), else plain PyTorch",
        "reference": "plain PyTorch",
    }
    with set_backend(backend):
        assert info.gpu_backend() == wanted[backend]


class OnGpu:
    """Calls of the public functions on a GPU, with what they take."""

    def __init__(self, dtype):
        self.x, self.ia3_l = torch.randn(6, 7, 130, device="cuda").to(dtype), torch.randn(3, 130, device="cuda")
        self.ids, self.table = (
            torch.tensor([0, -1, 2, 1, 0, 9], device="cuda"),
            torch.randn(50, 130, device="cuda").to(dtype),
        )
        self.tokens, self.prompts = torch.randint(50, (6, 9), device="cuda"), torch.randn(3, 4, 130, device="cuda")

    def __call__(self):
        batch = peft_ops.prompt_concat(self.tokens, self.table, self.prompts, self.ids)
        return peft_ops.ia3_scale(self.x, self.ia3_l, self.ids), batch.inputs_embeds


@on_a_gpu
def test_public_operators_on_a_gpu(dtype):
    """Native and reference agree bitwise; on a side stream; captured, and replayed on other inputs; never waiting."""
    call = OnGpu(dtype)
    with set_backend("reference"):
        want = call()
    with set_backend("native"):
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            aside = call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        for _ in range(3):
            call.x.normal_(), call.prompts.normal_(), call.ids.copy_(call.ids.roll(1))
            graph.replay()
            for one, other in zip(captured, call(), strict=True):
                assert_same(one, other, bitwise=True)
    for one, other, expected in zip(got, aside, want, strict=True):
        assert_same(one, expected, bitwise=True)
        assert_same(other, expected, bitwise=True)


@on_a_gpu
@pytest.mark.parametrize(
    "op, change, message",
    [
        ("ia3_scale", dict(ia3_l=lambda t: t.cpu()), "ia3_l must be on a CUDA device, got another kind of device"),
        ("ia3_scale", dict(ids=lambda t: t.cpu()), "task_ids must be on a CUDA device, got another kind of device"),
        ("ia3_scale", dict(ia3_l=lambda t: t[:, :7]), r"ia3_l must have 8 columns as x has, got shape \[2, 7\]"),
        ("prompt_concat", dict(layout=lambda t: t.long()), "layout must be int32, got Long"),
        ("prompt_concat", dict(layout=lambda t: t[:1]), r"layout must be \[2, 4\] and aligned to 16 bytes, got shape"),
        ("prompt_concat", dict(layout=lambda t: t.cpu()), "layout must be on a CUDA device, got another"),
        ("prompt_concat", dict(tokens=lambda t: t[:, ::2]), "tokens must be 2-D and contiguous, got shape"),
        ("prompt_concat", dict(prompts=lambda t: t[..., :4].contiguous()), "prompts must have 8 columns as the"),
    ],
)
def test_messages(op, change, message):
    layout = torch.zeros(2, 4, dtype=torch.int32)
    tensors = {
        "ia3_scale": dict(x=torch.ones(4, 8), ia3_l=torch.ones(2, 8), ids=torch.tensor([0, 1])),
        "prompt_concat": dict(
            tokens=torch.ones(2, 3, dtype=torch.int64),
            table=torch.ones(5, 8),
            prompts=torch.ones(1, 2, 8),
            layout=layout,
        ),
    }[op]
    args = [change.get(name, lambda t: t)(t.cuda()) for name, t in tensors.items()]
    with pytest.raises(RuntimeError, match=f"{op}: {message}"):
        native.ia3_scale(*args, None) if op == "ia3_scale" else copied(*args)
