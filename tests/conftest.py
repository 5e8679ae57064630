"""What the tests share: the device, the one tolerance rule, ids of every popularity, and poisoned allocations."""

import os
from collections.abc import Iterator
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


def truncates(dtype: torch.dtype) -> bool:
    """The interpreter truncates fp32 to bf16, where a GPU and aten round to nearest: one ulp apart."""
    return INTERPRET and dtype == torch.bfloat16


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
