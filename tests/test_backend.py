"""Which code runs an operator: set_backend, PEFT_OPS_BACKEND, and installs that lack Triton or the native library."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from peft_ops import _library, get_backend, ia3_glu, ia3_scale, prompt_concat, set_backend
from tests.conftest import DEVICE, KERNELS

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ["auto", "triton", "native", "reference"]
on_a_cpu = pytest.mark.skipif(KERNELS, reason="about CPU tensors in a process that does not interpret")


@pytest.fixture(autouse=True)
def unchanged():
    """Every test leaves the backend as it found it, or fails here."""
    before = get_backend()
    yield
    after = get_backend()
    set_backend(before)
    assert after == before


VARIABLES = ("PEFT_OPS_BACKEND", "PEFT_OPS_DEBUG", "TRITON_INTERPRET", "OMP_NUM_THREADS")  # info shows them


def run(code, **env):
    """A process of its own, for what is decided at import; its standard output."""
    clean = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, env=clean | {"PYTHONPATH": str(ROOT)} | env, cwd=ROOT
    )


def operators():
    """Operators with native kernels, forward and backward, on what DEVICE holds."""
    x, ia3_l = torch.ones(2, 8, device=DEVICE), torch.full((3, 8), 2.0, device=DEVICE, requires_grad=True)
    task_ids, ids = torch.tensor([1, -1], device=DEVICE), torch.tensor([[1, 2], [0, 1]], device=DEVICE)
    prompts, embedding = torch.ones(3, 2, 8, device=DEVICE, requires_grad=True), torch.ones(4, 8, device=DEVICE)
    return {
        "ia3_glu": lambda: ia3_glu(x, x, ia3_l, task_ids),
        "ia3_scale": lambda: ia3_scale(x, ia3_l, task_ids),
        "prompt_concat": lambda: prompt_concat(ids, embedding, prompts, task_ids).inputs_embeds,
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_choosing_for_the_process_and_for_a_block(backend):
    before = get_backend()
    with set_backend(backend):
        assert get_backend() == backend
    assert get_backend() == before
    set_backend(backend)
    assert get_backend() == backend
    set_backend(before)


def test_blocks_nest():
    before = get_backend()
    with set_backend("reference"):
        with set_backend("native"):
            with set_backend("reference"):
                assert get_backend() == "reference"
            assert get_backend() == "native"
        assert get_backend() == "reference"
    assert get_backend() == before


def test_an_exception_restores():
    before = get_backend()
    with pytest.raises(KeyError), set_backend("reference"), set_backend("native"):
        raise KeyError
    assert get_backend() == before


def test_a_block_can_be_entered_again():
    """`with` is what chooses: an object that is kept chooses each time, and returns to what was there each time."""
    before = get_backend()
    choice = set_backend("reference")
    set_backend(before)
    for outside in ("native", "auto"):
        with set_backend(outside):
            with choice:
                assert get_backend() == "reference"
            assert get_backend() == outside


@pytest.mark.parametrize("wrong", ["cuda", "Triton", "", None, 3, ["auto"]], ids=repr)
def test_wrong_name(wrong):
    before = get_backend()
    wanted = f"^set_backend: backend must be one of auto, triton, native, reference, got {wrong!r}$".replace("[", r"\[")
    with pytest.raises(ValueError, match=wanted):
        set_backend(wrong)
    assert get_backend() == before


def test_every_thread_sees_the_choice():
    """Autograd's own threads and a server's workers run what the process chose, and may choose for it."""
    seen = []
    with set_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(get_backend()))
        thread.start(), thread.join()
        thread = threading.Thread(target=lambda: set_backend("native"))
        thread.start(), thread.join()
        seen.append(get_backend())
    assert seen == ["reference", "native"]


@on_a_cpu
@pytest.mark.parametrize("op", ["ia3_scale", "prompt_concat"])
def test_triton_refuses_cpu_tensors(op):
    message = f"^{op}: backend 'triton' needs CUDA tensors, got cpu; set TRITON_INTERPRET=1 before the first import"
    y = operators()[op]()
    with set_backend("triton"):
        with pytest.raises(RuntimeError, match=message):
            operators()[op]()
        with pytest.raises(RuntimeError, match=message):  # the backward chooses by itself
            y.sum().backward()
    operators()[op]()


@on_a_cpu
@pytest.mark.parametrize("op", ["ia3_glu", "ia3_scale", "prompt_concat"])
def test_native_needs_the_library(op, monkeypatch):
    monkeypatch.setattr(_library, "_NATIVE", frozenset())
    want = operators()[op]()  # auto goes on without it
    message = (
        f"^{op}: backend 'native' needs the compiled library, which this install lacks; see python -m peft_ops.info$"
    )
    with set_backend("native"), pytest.raises(RuntimeError, match=message):
        operators()[op]()
    with set_backend("reference"):
        assert torch.equal(operators()[op](), want)


@on_a_cpu
@pytest.mark.skipif(not _library.has_native(), reason="the native library is not built")
@pytest.mark.parametrize("op", ["ia3_glu", "ia3_scale", "prompt_concat"])
def test_native_runs_native_code(op, monkeypatch):
    """And the reference does not: the library's operators are counted, forward and backward."""
    calls = []

    class Counting:
        def __getattr__(self, name):
            return lambda *args: calls.append(name) or getattr(torch.ops.peft_ops_native, name)(*args)

    module = sys.modules[f"peft_ops.ops.{op}"]
    monkeypatch.setattr(module, "native", Counting())
    # forward by its overload, which costs less to call
    monkeypatch.setattr(module, f"_native_{op.removeprefix('ia3_')}", getattr(Counting(), op), raising=False)
    with set_backend("native"):
        operators()[op]().sum().backward()
    expected = [*(["prompt_layout"] if op == "prompt_concat" else []), op, f"{op}_backward"]
    assert calls == expected
    with set_backend("reference"):
        operators()[op]().sum().backward()
    assert calls == expected


@pytest.mark.parametrize("op", ["ia3_scale", "prompt_concat"])
def test_compile_sees_plain_torch_under_reference(op):
    """And one opaque operator otherwise; changing the backend recompiles what was compiled under another one."""
    seen = []

    def backend(graph, example_inputs):
        seen.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return graph

    torch._dynamo.reset()
    x, task_ids, ids = torch.ones(3, 2, 8), torch.tensor([1, -1, 0]), torch.tensor([[1, 0], [0, 1], [1, 1]])
    table = {"ia3_scale": torch.ones(3, 8), "prompt_concat": torch.ones(3, 2, 8)}[op].to(DEVICE)
    x, task_ids, ids = x.to(DEVICE), task_ids.to(DEVICE), ids.to(DEVICE)

    def call():
        return ia3_scale(x, table, task_ids) if op == "ia3_scale" else prompt_concat(ids, x[0], table, task_ids)[0]

    compiled = torch.compile(call, backend=backend, fullgraph=True)
    want = call()
    for name, graphs in (("auto", 1), ("reference", 2), ("auto", 2), ("reference", 2)):
        with set_backend(name):
            assert torch.equal(compiled(), want)
        assert len(seen) == graphs
    opaque, plain = ([target for target in targets if "peft_ops" in target] for targets in seen)
    assert opaque == [f"peft_ops.{op}.default"] and not plain and len(seen[1]) > 5


FORWARD_AND_BACKWARD = """
import sys, torch, peft_ops
x, v = torch.randn(4, 8), torch.ones(2, 8, requires_grad=True)
ids = torch.tensor([0, 1, -1, 0])
peft_ops.ia3_scale(x, v, ids).sum().backward()
peft_ops.ia3_linear(x, torch.randn(8, 8), ia3_l=v, task_ids=ids).sum().backward()
p = torch.randn(2, 3, 8, requires_grad=True)
batch = peft_ops.prompt_concat(torch.zeros(4, 2, dtype=torch.int64), x, p, ids, attention_mask=torch.ones(4, 2))
batch.inputs_embeds.sum().backward()
assert p.grad[0].eq(2).all() and p.grad[1].eq(1).all()
peft_ops.plan_tasks(ids, 8, 2)
"""


def test_nothing_imports_triton_until_a_kernel_runs():
    """Neither the import, nor operators on CPU tensors: it takes a second, and its interpreter flag is read then."""
    code = (
        "import torch; print('triton' in sys.modules); import peft_ops; print('triton' in sys.modules)\n"
        "import peft_ops.info\n"
    )
    done = run(
        "import sys\n" + code + FORWARD_AND_BACKWARD + "print('triton' in sys.modules, 'transformers' in sys.modules)"
    )
    assert done.stdout.split() == ["False"] * 4, done.stdout + done.stderr


def test_works_where_triton_cannot_be_imported():
    blocker = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocker())
"""
    rest = """
for backend in ("reference", "auto"):
    with peft_ops.set_backend(backend):
        peft_ops.ia3_scale(x, v, ids)
with peft_ops.set_backend("triton"):
    try: peft_ops.ia3_scale(x, v, ids)
    except RuntimeError as e: print(e)
try: import triton
except ImportError as e: print(e)
"""
    done = run(blocker + FORWARD_AND_BACKWARD + rest)
    assert "ia3_scale: backend 'triton' needs CUDA tensors, got cpu" in done.stdout, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("blocked: triton"), done.stdout + done.stderr


@pytest.mark.parametrize("value", ["reference", "native", "triton"])
def test_environment_gives_the_start_value(value):
    done = run(
        "import peft_ops; print(peft_ops.get_backend())\n"
        "with peft_ops.set_backend('auto'): print(peft_ops.get_backend())\n"
        "print(peft_ops.get_backend())\n"
        "from peft_ops.info import info; print(info()['backend'], info()['environment'])",
        PEFT_OPS_BACKEND=value,
    )
    assert done.stdout.split() == [value, "auto", value, value, f"PEFT_OPS_BACKEND={value}"], done.stdout + done.stderr


def test_environment_with_a_wrong_name_says_which_variable():
    done = run("import peft_ops", PEFT_OPS_BACKEND="cuda")
    assert done.returncode != 0
    last = done.stderr.rstrip().splitlines()[-1]
    assert (
        "backend must be one of auto, triton, native, reference, got 'cuda'" in last and "PEFT_OPS_BACKEND" in last
    ), last


def test_an_empty_variable_is_an_unset_one():
    """As `PEFT_OPS_BACKEND= make test` and a container's empty default have it."""
    done = run("import peft_ops; print(peft_ops.get_backend())", PEFT_OPS_BACKEND="")
    assert done.stdout.split() == ["auto"], done.stderr.rstrip().splitlines()[-1:]


def test_interpreter_serves_cpu_tensors():
    code = FORWARD_AND_BACKWARD + (
        "print('triton' in sys.modules)\n"
        f"for name in {('triton', 'reference') + ('native',) * _library.has_native()}:\n"
        "    with peft_ops.set_backend(name): print(bool(peft_ops.ia3_scale(x, v, ids).eq(x).all()))\n"
    )
    done = run(code, TRITON_INTERPRET="1")
    assert done.stdout.split() == ["True"] * (3 + _library.has_native()), done.stdout + done.stderr


def test_debug_checks_values_where_kernels_run():
    """A kernel gives NaN for a bad id and clamps a length; PEFT_OPS_DEBUG=1 raises as a CPU does."""
    code = """
import torch, peft_ops
ids, e, p = torch.zeros(1, 2, dtype=torch.int64), torch.ones(3, 4), torch.ones(1, 2, 4)
for tokens, task, length in ((ids, 1, 2), (ids + 3, 0, 2), (ids, 0, 3), (ids, 0, 2)):
    args = tokens, e, p, torch.tensor([task])
    try: print(peft_ops.prompt_concat(*args, prompt_lengths=torch.tensor([length])).inputs_embeds.isnan().any().item())
    except IndexError as error: print(error)
types = dict(token_type_embedding=e, token_type_ids=ids + 3)
for op in (peft_ops.prompt_concat, peft_ops.prompt_embed):
    for added in (types, dict(position_embedding=e[:2], position_offset=1)):
        try: print(torch.as_tensor(op(ids, e, p, **added)[0]).isnan().any().item())
        except IndexError as error: print(error)
"""
    done = run(code, TRITON_INTERPRET="1", PEFT_OPS_DEBUG="1")
    assert done.stdout.splitlines() == [
        "prompt_concat: task_ids must be in [-1, 1), got 1 at position 0",
        "prompt_concat: input_ids must be in [0, 3), got 3 at position 0",
        "prompt_concat: prompt_lengths must be in [0, 3), got 3 at position 0",
        "False",
        "prompt_concat: token_type_ids must be in [0, 3), got 3 at position 0",
        "prompt_concat: position_ids + 1 must be in [0, 2), got 2 at position 1",
        "prompt_embed: token_type_ids must be in [0, 3), got 3 at position 0",
        "prompt_embed: position_ids + 1 must be in [0, 2), got 2 at position 1",
    ], done.stdout + done.stderr
    assert run(code, TRITON_INTERPRET="1").stdout.split() == ["True", "True", "False", "False"] + ["True"] * 4


def test_info_follows_the_backend():
    from peft_ops.info import info

    with set_backend("reference"):
        rows = info()
    assert rows["backend"] == "reference" and rows["prompt_concat on a CPU"] == "plain PyTorch"
    if not KERNELS:
        with set_backend("triton"):
            assert info()["ia3_scale on a CPU"].startswith("fails: backend 'triton' serves no CPU tensors")
        with set_backend("native"):
            assert info()["ia3_scale_backward on a CPU"] == "native" if _library.has_native() else True
