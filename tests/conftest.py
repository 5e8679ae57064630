"""What the tests share: the device, the one tolerance rule, ids of every popularity, and poisoned allocations."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"
KERNELS = INTERPRET or DEVICE == "cuda"  # whether the operators run their Triton kernels here
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def name_of(dtype: torch.dtype) -> str:
    return {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


@pytest.fixture(params=DTYPES, ids=name_of)
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty returns NaN: an element that nobody wrote shows. Also seeds, so that a failure repeats alone."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread():
    """For models of a few thousand weights: threads that wait for each other took 17 s where one takes 0.2 s."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def truncates(dtype: torch.dtype) -> bool:
    """The interpreter truncates fp32 to bf16, where a GPU and aten round to nearest: one ulp apart."""
    return INTERPRET and dtype == torch.bfloat16


def fused(dtype: torch.dtype) -> bool:
    """Whether a kernel of our own multiplies; elsewhere it is F.linear, bit by bit."""
    return KERNELS and (INTERPRET or dtype.itemsize == 2)


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance to the next number of `dtype` at |x|, in fp64."""
    info = torch.finfo(dtype)
    x = x.double().abs().clamp(min=info.tiny)
    return torch.exp2(torch.floor(torch.log2(x))) * info.eps


def assert_same(got: Tensor, want: Tensor, *, bitwise: bool | None = None) -> None:
    """Bitwise equal, NaN at the same places; one ulp where the interpreter truncates, unless bitwise=True."""
    assert got.shape == want.shape and got.dtype == want.dtype, (got.shape, got.dtype, want.shape, want.dtype)
    assert torch.equal(got.isnan(), want.isnan()), "NaN at other places"
    got, want = got.nan_to_num(0, 1e30, -1e30), want.nan_to_num(0, 1e30, -1e30)
    if bitwise is not True and truncates(want.dtype):
        off = (got.double() - want.double()).abs() > ulp(want, want.dtype)
    else:
        off = got != want
    assert not off.any(), (
        f"{int(off.sum())} of {off.numel()} differ, first {got[off][0].item()} for {want[off][0].item()}"
    )


def assert_as_good_as_torch(got: Tensor, same_dtype: Tensor, fp64: Tensor, *, elementwise: bool = False) -> None:
    """The tolerance of every test that is not bitwise: as close to fp64 as torch's own arithmetic in the same dtype.

    Largest error at most twice torch's plus one ulp of the largest value, rms error at most 1.2 times torch's (plus a
    thousandth of an ulp, where torch is exact). elementwise: every element within twice torch's own error there plus
    one ulp, for 16-bit forwards.
    """
    assert got.shape == fp64.shape, (got.shape, fp64.shape)
    assert torch.equal(got.isnan(), same_dtype.isnan()), "NaN at other places"
    if got.numel() == 0:
        return
    unit = same_dtype.dtype
    got, same_dtype, fp64 = (t.detach().double().nan_to_num(0, 0, 0) for t in (got, same_dtype, fp64))
    error, allowed = (got - fp64).abs(), (same_dtype - fp64).abs()
    largest = ulp(fp64.abs().max(), unit)
    slack = 2 if truncates(unit) else 1  # truncation doubles the rounding error, and its rms too
    assert error.max() <= 2 * allowed.max() + slack * largest, (
        f"largest error {error.max():.3g}, torch's {allowed.max():.3g}"
    )
    rms, torch_rms = error.square().mean().sqrt(), allowed.square().mean().sqrt()
    floor = ulp(fp64, unit).square().mean().sqrt() * (0.6 if truncates(unit) else 1e-3)
    assert rms <= 1.2 * torch_rms + floor, f"rms error {rms:.3g}, torch's {torch_rms:.3g}"
    if elementwise:
        off = error > 2 * allowed + slack * ulp(fp64, unit)
        assert not off.any(), f"{int(off.sum())} of {off.numel()} elements further from fp64 than torch's"


def assert_like_torch(got: Tensor, same_dtype: Tensor, fp64: Tensor, *, elementwise: bool = False) -> None:
    """The fp64 rule; for fp32, where two orders of the same sum differ by chance, with twice to thrice its factors.

    elementwise: every 16-bit element too, but for 1e-6: terms of order one that cancel leave fp32's rounding behind.
    """
    error, allowed = (got.double() - fp64).abs(), (same_dtype.double() - fp64).abs()
    if same_dtype.dtype != torch.float32:
        assert_as_good_as_torch(got, same_dtype, fp64)
        off = error > 2 * allowed + (2 if truncates(same_dtype.dtype) else 1) * ulp(fp64, same_dtype.dtype) + 1e-6
        assert not (elementwise and off.any()), f"{int(off.sum())} elements further from fp64 than torch's"
        return
    assert got.shape == fp64.shape and torch.equal(got.isnan(), fp64.isnan())
    if got.numel():
        unit = ulp(fp64.abs().max(), torch.float32)
        largest, torchs = error.max(), allowed.max()
        assert largest <= 4 * torchs + 3 * unit, f"largest error {largest:.3g}, torch's {torchs:.3g}"
        rms, torch_rms = error.square().mean().sqrt(), allowed.square().mean().sqrt()
        assert rms <= 3 * torch_rms + unit / 2, f"rms error {rms:.3g}, torch's {torch_rms:.3g}"


def ids_like(kind: str, G: int, num_tasks: int, device=None, dtype=torch.int64) -> Tensor:
    """[G] ids: all the same, all different (as far as they go), uniform with base rows, one popular task, or sorted."""
    ids = {
        "identical": lambda: torch.full((G,), num_tasks - 1),
        "distinct": lambda: torch.arange(G) % num_tasks,
        "uniform": lambda: torch.randint(-1, num_tasks, (G,)),
        "skewed": lambda: torch.where(torch.rand(G) < 0.8, 0, torch.randint(-1, num_tasks, (G,))),
        "sorted": lambda: torch.randint(-1, num_tasks, (G,)).sort().values,
    }[kind]()
    return ids.to(dtype).to(device or DEVICE)


ID_KINDS = ["identical", "distinct", "uniform", "skewed", "sorted"]
BAD_IDS = [3, 4, -2, 2**31 - 1, -(2**31)]  # for three tasks

# x [B, S, K] and weight [N, K] in memory, by name
X_LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "permuted": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced rows": lambda x: torch.cat([x, x], 1)[:, ::2],
    "sliced columns": lambda x: torch.stack([x, x], -1)[..., 0],
    "wide rows": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "expanded": lambda x: x[:, :1].expand(-1, x.shape[1], -1),
}
W_LAYOUTS = {
    "rows": lambda w: w.contiguous(),
    "columns": lambda w: w.t().contiguous().t(),
    "sliced rows": lambda w: torch.stack([w, w], 1)[:, 0],
    "neither": lambda w: torch.stack([w, w], -1)[..., 0],
}


def scales(ia3_l: Tensor, rows: list[int] | None, dtype: torch.dtype) -> Tensor:
    """[len(rows), N]: the vector of each row's task, ones for the base model. rows: a list, or None for one task."""
    rows = [0] if rows is None else rows
    return torch.stack([torch.ones_like(ia3_l[0]) if t == -1 else ia3_l[t] for t in rows]).to(dtype)


def doubled(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().double() for t in tensors]


def gradients(f: Callable, tensors, dy, asked=None) -> list[Tensor | None]:
    """Gradients of the tensors asked for (all that are there), from leaves of their own."""
    leaves = [None if t is None else t.detach().clone() for t in tensors]
    wanted = [t for i, t in enumerate(leaves) if t is not None and (asked is None or asked[i])]
    for t in wanted:
        t.requires_grad_()
    grads = iter(torch.autograd.grad(f(*leaves), wanted, dy))
    return [next(grads) if any(t is w for w in wanted) else None for t in leaves]


def guarded(*shape: int, dtype: torch.dtype, fill: float = float("nan"), margin: int = 256) -> tuple[Tensor, Tensor]:
    """A tensor in the middle of a buffer filled with `fill`: the view, and the buffer to look at afterwards."""
    count = 1
    for size in shape:
        count *= size
    buffer = torch.full((count + 2 * margin,), fill, dtype=dtype, device=DEVICE)
    return buffer[margin : margin + count].view(shape), buffer


def assert_guards(buffer: Tensor, margin: int = 256) -> None:
    assert buffer[:margin].isnan().all() and buffer[-margin:].isnan().all(), "written outside the tensor"


@contextmanager
def guarded_allocations() -> Iterator[None]:
    """Tensors of floats that torch.empty makes meanwhile stand between guards, which are looked at in the end.

    They hold a number: a NaN in them was written.
    """
    empty, buffers = torch.empty, []

    def fenced(size, *, dtype, device):
        if not dtype.is_floating_point:
            return empty(size, dtype=dtype, device=device)
        view, buffer = guarded(*size, dtype=dtype)
        buffers.append(buffer)
        return view.fill_(1e4)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", fenced)
        patch.setattr(torch, "empty_like", lambda t: fenced(t.shape, dtype=t.dtype, device=t.device))
        yield
    assert buffers
    for buffer in buffers:
        assert_guards(buffer)


@contextmanager
def launches(lazy) -> Iterator[list[tuple[str, dict]]]:
    """Name and keyword arguments of every kernel of a module's `kernels` that is launched meanwhile."""
    source, seen = import_module(f"peft_ops.kernels.{lazy.stem}"), []

    class Recorder:
        def __init__(self, name: str):
            self.name = name

        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                seen.append((self.name, kwargs))
                return getattr(source, self.name)[grid](*args, **kwargs)

            return launch

    names = [name for name in vars(source) if name.endswith("_kernel")]
    for name in names:
        setattr(lazy, name, Recorder(name))
    try:
        yield seen
    finally:
        for name in names:
            delattr(lazy, name)  # looked up again on the next use
