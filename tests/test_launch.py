"""launch(kernel, grid, ...) hands to the driver what kernel[grid](...) hands to it, call after call.

The driver records instead of launching, and kernels are not compiled: who is asked for which kernel is what counts.
"""

import gc
import random
import weakref
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import DEVICE, INTERPRET

if INTERPRET or not find_spec("triton"):
    pytest.skip("the interpreter's kernels are launched as they are", allow_module_level=True)

import triton
import triton.language as tl
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from bench import launcher, offline
from peft_ops import _launch
from peft_ops._launch import launch
from peft_ops.kernels import tiles

_devices = count(40)  # a device of its own for each test: Triton keeps what it compiled per device
GLOBAL = tl.constexpr(1)


@triton.jit
def mixed_kernel(x_ptr, y_ptr, n, m, f, FLAG: tl.constexpr, BLOCK: tl.constexpr = 16):
    tl.store(y_ptr, tl.load(x_ptr) + n * m * f * BLOCK * GLOBAL)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["y_ptr", "m"])
def unspecialized_kernel(x_ptr, y_ptr, n, m, f, FLAG: tl.constexpr, BLOCK: tl.constexpr = 16):
    tl.store(y_ptr, tl.load(x_ptr) + n * m * f * BLOCK)


@triton.jit
def annotated_kernel(x_ptr, y_ptr, n: tl.int64, m, f: tl.float32, FLAG: tl.constexpr, BLOCK: tl.constexpr = 16):
    tl.store(y_ptr, tl.load(x_ptr) + n * m * f * BLOCK)


@triton.jit
def add_one_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n) + 1, mask=offs < n)


class Recorder(launcher.NoDriver):
    """A driver that keeps what reaches it: compiled kernel, grid, stream, function, metadata, arguments."""

    def __init__(self):
        super().__init__(next(_devices))
        self.launched: list[tuple] = []
        self.plain = 0  # launches that went through JITFunction.run

    def compile(self, source, target, options, **kwargs) -> CompiledKernel:
        source.fn.cache_key  # noqa: B018  finds the globals that the kernel uses, as compiling does
        compiled = object.__new__(CompiledKernel)
        compiled.src, compiled.name, compiled.hash = source, source.fn.__name__, str(id(compiled))
        compiled.metadata = SimpleNamespace(target=target)
        compiled.packed_metadata, compiled.module, compiled.function = object(), object(), object()
        # neither hooks nor the dictionary made for them: Triton passes empty chains, a direct launch None
        compiled._run = lambda *args: self.launched.append((compiled, *args[:6], *args[9:]))
        return compiled


def same(left: tuple, right: tuple) -> bool:
    """The same objects, or equal ones that are no tensors: of equal constexpr values Triton too keeps the first."""
    return len(left) == len(right) and all(
        a is b or (not isinstance(a, torch.Tensor) and a == b) for a, b in zip(left, right, strict=True)
    )


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(_launch, "_sites", {})
    stub = Recorder()
    monkeypatch.setattr(triton.compiler, "compile", stub.compile)
    run = JITFunction.run

    def counted(self, *args, **kwargs):
        stub.plain += 1
        return run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", counted)
    with launcher.active(stub):
        yield stub


def pair(gpu: Recorder, kernel, grid, args, kwargs) -> int:
    """Launch both ways and compare; how often `launch` went Triton's way."""
    kernel[grid](*args, **kwargs)
    before = gpu.plain
    returned = launch(kernel, grid, *args, **kwargs)
    want, got = gpu.launched[-2:]
    assert same(got, want), (got, want)
    assert returned is got[0]
    gpu.launched.clear()
    return gpu.plain - before


FOLDER = Path(tiles.__file__).parent


def kernels_of(path: Path):
    return import_module(f"peft_ops.kernels.{path.stem}")


CASES = {case.name: case for case in offline.cases()}


@pytest.mark.parametrize("name", CASES)
def test_every_launch_of_the_package(name, gpu):
    kernel, args, kwargs = CASES[name].record(90)
    plain = [pair(gpu, kernel, grid, args, kwargs) for grid in [(7,), (7, 5), (7, 5, 3), (2,)]]
    assert plain == [1, 0, 0, 0], "the first launch is Triton's, the next ones are direct"


def test_every_kernel_has_a_case():
    known = {name for path in FOLDER.glob("*.py") for name in vars(kernels_of(path)) if name.endswith("_kernel")}
    assert known == {case.record(90).kernel.__name__ for case in CASES.values()}


INTS = [0, 1, 2, 8, 15, 16, 17, 32, 4096, -1, -16, 2**31 - 1, 2**31, 2**31 + 16, -(2**31), -(2**31) - 1, -(2**31) - 16]
INTS += [2**63 - 1, 2**63 - 16, 2**63, 2**63 + 16, 2**64 - 1, -(2**63)]


def draw(rng: random.Random) -> tuple[tuple, dict]:
    """Arguments of every kind that Triton tells apart."""

    def pointer():
        dtype = rng.choice([torch.float32, torch.bfloat16, torch.int32, torch.int64])
        return rng.choice([None, torch.zeros(64, dtype=dtype)[rng.choice([0, 0, 1, 2, 4, 8]) :]])

    def number():
        return rng.choice([rng.choice(INTS), rng.choice(INTS), 1, True, False, 0.5, 1.0, None])

    kwargs = dict(FLAG=rng.choice([True, False, None, "relu", 2, 3.5]))
    if rng.random() < 0.5:
        kwargs["BLOCK"] = rng.choice([16, 32])
    if rng.random() < 0.5:
        kwargs["num_warps"] = rng.choice([4, 8])
    if rng.random() < 0.2:
        kwargs["num_stages"] = rng.choice([2, 3])
    names = list(kwargs)
    rng.shuffle(names)
    return (pointer(), pointer(), number(), number(), number()), {name: kwargs[name] for name in names}


@pytest.mark.parametrize("kernel", [mixed_kernel, unspecialized_kernel, annotated_kernel], ids=lambda k: k.__name__)
def test_random_specialisations_alternate(kernel, gpu):
    rng = random.Random(0)
    drawn = [draw(rng) for _ in range(1500)]
    plain = sum(pair(gpu, kernel, (3, 2), *drawn[i]) for i in (*range(1500), *rng.choices(range(1500), k=1500)))
    assert plain <= 1500, "what was drawn again is known"


BYTES = torch.zeros(64, dtype=torch.uint8)
POINTERS = [None, *(BYTES[i:] for i in (0, 1, 2, 4, 8, 16)), BYTES.view(torch.bool), BYTES.view(torch.bfloat16)]
POINTERS += [torch.nn.Parameter(torch.zeros(4)), torch.zeros(0)]
KEYWORDS = [
    dict(FLAG=16, BLOCK=32), dict(BLOCK=16, FLAG=32), dict(FLAG=16), dict(FLAG=None), dict(FLAG="None"),
    dict(FLAG=16, num_warps=8), dict(FLAG=16, num_stages=8), dict(FLAG=16, num_warps=4), dict(FLAG=16, maxnreg=64),
]  # fmt: skip


@pytest.mark.parametrize("kernel", [mixed_kernel, unspecialized_kernel, annotated_kernel], ids=lambda k: k.__name__)
@pytest.mark.parametrize(
    ("position", "values"), [(0, POINTERS), (1, POINTERS), (2, INTS), (3, INTS), (3, [1, True, 1.0, None, 0.5]),
    (None, KEYWORDS)], ids=["first pointer", "second pointer", "n", "m", "types", "keywords"],
)  # fmt: skip
@pytest.mark.parametrize(
    "base", [(BYTES, BYTES, 3, 3, 0.5), (BYTES[1:], BYTES[1:], 2**31, 2**31, 0.5)], ids=["", "odd"]
)
def test_one_difference(base, position, values, kernel, gpu):
    """Each value beside each other one, all else equal: a key coarser than Triton's launches the other's kernel."""
    for value in values:
        for other in values:
            for chosen in (value, other, value):
                args, kwargs = list(base), dict(FLAG=True)
                if position is None:
                    kwargs = chosen
                else:
                    args[position] = chosen
                pair(gpu, kernel, (1,), tuple(args), kwargs)


def test_stream_and_device_are_asked_for_at_each_launch(gpu):
    x, devices = torch.zeros(64), (gpu.device, next(_devices))
    for device in devices * 3:
        for stream in (11, 12):
            gpu.device, gpu.stream = device, stream
            launch(mixed_kernel, (1,), x, x, 3, 3, 0.5, FLAG=True)
    assert [call[4] for call in gpu.launched] == [11, 12] * 6
    compiled = [call[0] for call in gpu.launched[::2]]
    assert compiled == compiled[:2] * 3 and compiled[0] is not compiled[1]
    assert gpu.plain == 2


def test_memory_is_bounded(gpu, monkeypatch):
    x = torch.zeros(64)
    for length in range(1, 5000):
        launch(mixed_kernel, (length,), x, x, length, 3, 0.5, FLAG=True)
    (site,) = _launch._sites.values()
    assert len(site.kinds) == 3, "1, a multiple of 16, neither"
    monkeypatch.setattr(_launch, "KINDS", 5)
    for i in range(100):
        launch(mixed_kernel, (1,), x, x, 3, 3, 0.5, FLAG=i)
        assert len(site.kinds) <= 5


def test_no_tensor_is_kept(gpu):
    x, y = torch.zeros(64), torch.zeros(64)
    for _ in range(2):
        launch(mixed_kernel, (1,), x, y, 3, 3, 0.5, FLAG=True)
        launch(mixed_kernel, (1,), x, y_ptr=y, n=3, m=3, f=0.5, FLAG=True)
    gpu.launched.clear()
    dead = [weakref.ref(t) for t in (x, y)]
    del x, y
    gc.collect()
    assert [ref() for ref in dead] == [None, None]


def test_threads(gpu, monkeypatch):
    """Eight threads that meet the same new kinds at once, and clear them under each other."""
    monkeypatch.setattr(_launch, "KINDS", 20)
    tensors, failed = [torch.zeros(64)[i:] for i in (0, 1)], []

    def work(seed: int):
        rng = random.Random(seed)
        try:
            for _ in range(300):
                x, y = rng.choices(tensors, k=2)
                launch(mixed_kernel, (1,), x, y, rng.choice(INTS), 3, 0.5, FLAG=rng.randrange(4))
        except Exception as error:
            failed.append(error)

    threads = [Thread(target=work, args=(seed % 4,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed[0]
    calls = list(gpu.launched)
    assert len(calls) == 8 * 300

    def kind(compiled):  # two threads may both have compiled it
        return compiled.src.signature, compiled.src.constants, compiled.src.attrs

    for compiled, *_, x, y, n, m, f, flag, block in calls:
        want = mixed_kernel[(1,)](x, y, n, m, f, FLAG=flag, BLOCK=block)
        assert kind(compiled) == kind(want)


X = torch.zeros(64)
ARGS, KWARGS = (X, X, 3, 3, 0.5), dict(FLAG=True)


def known(gpu: Recorder) -> None:
    """From here on a launch of ARGS is direct."""
    assert [pair(gpu, mixed_kernel, (1,), ARGS, KWARGS) for _ in range(2)] == [1, 0]


class Hook:
    calls = ()  # as a chain has, that calls nobody

    def __call__(self, *args) -> None:
        pass


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("chained", [True, False])
def test_launch_hooks_are_passed_on(name, chained, gpu, monkeypatch):
    known(gpu)
    chain = knobs.HookChain()
    chain.add(Hook())
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, name, chain if chained else Hook())
        assert pair(gpu, mixed_kernel, (1,), ARGS, KWARGS) == 1
    assert pair(gpu, mixed_kernel, (1,), ARGS, KWARGS) == 0
    monkeypatch.setattr(knobs.runtime, name, None)
    assert pair(gpu, mixed_kernel, (1,), ARGS, KWARGS) == 0


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (knobs.runtime, "debug", True),
        (knobs.compilation, "instrumentation_mode", "other"),
        (knobs.runtime, "add_stages_inspection_hook", lambda: ("key", "hash")),
        (mixed_kernel, "debug", True),
        (mixed_kernel, "pre_run_hooks", [lambda *args, **kwargs: None]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_changes_a_launch_is_left_to_triton(owner, name, value, gpu, monkeypatch):
    known(gpu)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, value)
        assert [pair(gpu, mixed_kernel, (1,), ARGS, KWARGS) for _ in range(2)] == [1, 1]
    assert pair(gpu, mixed_kernel, (1,), ARGS, KWARGS) == 0


def test_a_changed_global_is_an_error_as_in_triton(gpu, monkeypatch):
    known(gpu)
    monkeypatch.setitem(globals(), "GLOBAL", tl.constexpr(2))
    with pytest.raises(RuntimeError, match="GLOBAL has changed"):
        launch(mixed_kernel, (1,), *ARGS, **KWARGS)


@pytest.fixture
def forgotten():
    """What is known of the installed Triton is found out again, in the test and after it."""
    _launch._triton.cache_clear()
    yield
    _launch._triton.cache_clear()


def test_another_version_is_left_alone(forgotten, gpu, monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.99.0")
    assert [pair(gpu, mixed_kernel, (1,), ARGS, KWARGS) for _ in range(2)] == [1, 1]


def test_missing_internals_are_left_alone(forgotten, gpu, monkeypatch):
    monkeypatch.delattr(type(knobs.compilation), "instrumentation_mode")
    assert _launch._triton() is None
    launched = []
    launch(Plain(launched), (2,), 1, a=3)
    assert launched == [((2,), (1,), {"a": 3})]


class Plain:
    """Launched like a kernel, without being Triton's: an autotuner, the interpreter's, a recorder."""

    def __init__(self, launched: list):
        self.launched = launched

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launched.append((grid, args, kwargs))


def test_what_is_no_jit_function_is_launched_as_it_is(gpu):
    launched = []
    for _ in range(2):
        launch(Plain(launched), (2,), 1, a=3)
    assert launched == [((2,), (1,), {"a": 3})] * 2


@pytest.mark.parametrize(
    ("grid", "args", "kwargs"),
    [
        (lambda bound: (bound["n"],), ARGS, KWARGS),
        ([2, 3], ARGS, KWARGS),
        ((1,), ARGS[:3], dict(m=3, f=0.5, FLAG=True)),
        ((1,), (*ARGS, True), {}),
        ((1,), (X, X, (3, 4), 3, 0.5), KWARGS),
        ((1,), ARGS, dict(FLAG=tl.float32)),
        ((1,), ARGS, dict(FLAG=True, extern_libs={"libdevice": __file__})),
    ],
    ids=[
        "callable grid",
        "list",
        "size by keyword",
        "constexpr by position",
        "tuple as an argument",
        "Triton's dtype",
        "option without a hash",
    ],
)
def test_unusual_arguments_go_tritons_way(grid, args, kwargs, gpu):
    assert [pair(gpu, mixed_kernel, grid, args, kwargs) for _ in range(2)] == [1, 1]


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        (ARGS[:4], KWARGS),
        (ARGS, {}),
        ((*ARGS, 1, 2, 3), {}),
        (ARGS, dict(FLAG=True, num_warps=4, unknown_option=1)),
        ((X, X, 2**64, 3, 0.5), KWARGS),
        (ARGS, dict(FLAG=[])),
    ],
    ids=["too few", "no constexpr", "too many", "unknown option", "65 bits", "no hash"],
)
def test_errors_are_tritons(args, kwargs, gpu):
    for _ in range(2):
        with pytest.raises(Exception) as want:  # noqa: B017  whatever Triton raises
            mixed_kernel[(1,)](*args, **kwargs)
        with pytest.raises(want.type) as got:
            launch(mixed_kernel, (1,), *args, **kwargs)
        assert str(got.value) == str(want.value)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_results_and_graphs_on_a_gpu():
    """Real launches: aligned, misaligned and 64-bit, on a side stream, captured and replayed."""
    x = torch.arange(1025, device="cuda", dtype=torch.float32)
    stream = torch.cuda.Stream()
    for n, start in [(1024, 0), (1000, 0), (1000, 1), (1, 0), (1024, 0), (1000, 1)] * 2:
        want, got, replayed = (torch.zeros(1024, device="cuda") for _ in range(3))
        add_one_kernel[(8,)](x[start:], want, n, BLOCK=128)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            launch(add_one_kernel, (8,), x[start:], got, n, BLOCK=128)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch(add_one_kernel, (8,), x[start:], replayed, n, BLOCK=128)
        assert replayed.count_nonzero() == 0, "captured, not run"
        graph.replay()
        assert torch.equal(got, want) and torch.equal(replayed, want)
