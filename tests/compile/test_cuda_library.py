"""The CUDA library, built where no GPU is: its architectures, what ptxas made of it, and what it asks of torch."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from bench.cuda_library import architectures, readable, resources
from peft_ops._native_rule import CUDA_OPS
from tests.test_architecture import ROOT
from tests.test_native import CONSTANTS, TORCH_2_10

NVCC = os.path.join(os.environ["CUDA_HOME"], "bin/nvcc") if "CUDA_HOME" in os.environ else "nvcc"  # setup.py's
pytestmark = pytest.mark.skipif(not (shutil.which(NVCC) and shutil.which("g++")), reason=f"no {NVCC}, or no g++")

# ten blocks of 128 threads share a multiprocessor's 65536 registers: 20 KiB of loads of x on their way
REGISTERS = 48
# what the CUDA library takes from torch beside what _C does, since 2.9 at the latest
TORCH_CUDA = """
    aoti_torch_create_device_guard aoti_torch_delete_device_guard aoti_torch_get_current_cuda_stream
    aoti_torch_get_device_index aoti_torch_get_device_type
""".split()


def build(folder, **env):
    """setup.py's build_ext into a folder; objects that are built already are taken from build/native."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PEFT_OPS_", "TORCH_CUDA"))}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", folder, "--build-temp", folder / "temp"]
    done = subprocess.run(
        command, cwd=ROOT, env=clean | {"PEFT_OPS_FORCE_CUDA": "1"} | env,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return {path.name: path for path in folder.glob("peft_ops/*.so")}, done.stdout


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    found, said = build(tmp_path_factory.mktemp("cuda"))
    assert found.keys() == {"_C.so", "_C_cuda.so"}, said
    return found["_C_cuda.so"]


@pytest.fixture(scope="module")
def kernels(library):
    return resources(library)


def test_it_runs_on_what_there_is_and_on_what_comes(library):
    machine_code, ptx = architectures(library)
    assert machine_code >= {"sm_80", "sm_90a", "sm_100a"} and ptx == {"sm_90"}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
def test_kernels_compile_clean(arch, kernels):
    found = {name: r for (where, name), r in kernels.items() if where == arch}
    assert len(found) == 54  # 3 x 3 types: ia3_scale with 5 activations, prompt_concat
    for name, r in zip(readable(list(found)), found.values(), strict=True):
        T, L = (4 if part == "float" else 2 for part in re.search(r"<(\w+), (\w+)", name).groups())
        assert r.stack == r.spills == r.generic == 0 and r.registers <= REGISTERS, f"{arch} {name}: {r}"
        # for each piece stored, one loaded, and as many elements of the vector or prompt: 32 bytes, 16, or just 8
        loads = r.wide_stores * (1 + L // T) + name.startswith("prompt_concat")  # which loads a row of the layout too
        assert r.wide_stores and r.wide_loads >= loads, f"{arch} {name}: {r}"


def symbols(library, which):
    listed = subprocess.run(["nm", "-D", which, library], capture_output=True, text=True, check=True).stdout
    return [line.split()[-2:] for line in listed.splitlines()]


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm to read the library with")
def test_it_asks_for_nothing_but_torch_2_10_and_the_c_and_cpp_libraries(library):
    """No Python, no CUDA library: the runtime is inside, the driver is looked up when it runs."""
    torchs = {*TORCH_2_10, *TORCH_CUDA} | {
        prefix + name for prefix, names in CONSTANTS.items() for name in names.split()
    }
    system = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_")
    unknown = [
        name for kind, name in symbols(library, "--undefined-only")
        if kind != "w" and name not in torchs and not system.search(name)
    ]  # fmt: skip
    assert unknown == []
    assert not [name for _, name in symbols(library, "--defined-only") if "cuda" in name or "peft_ops" in name]


@pytest.fixture
def loaded(library, tmp_path):
    """Runs code under a CPU build of torch, beside the one function that it lacks: so nothing else is missing."""
    if torch.version.cuda:
        pytest.skip("loaded with the package")
    (tmp_path / "stream.c").write_text(
        "int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }"
    )
    subprocess.run(["g++", "-xc", "-shared", "-fPIC", "stream.c", "-o", "stream.so"], cwd=tmp_path, check=True)
    load = f"""
import ctypes, torch, peft_ops
from peft_ops._library import NATIVE_SCHEMAS, native
ctypes.CDLL({str(tmp_path / "stream.so")!r}, ctypes.RTLD_GLOBAL)
torch.ops.load_library({str(library)!r})
"""

    def run(code):
        done = subprocess.run([sys.executable, "-c", load + code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def test_it_loads_and_registers_its_operators(loaded):
    code = """
has = torch._C._dispatch_has_kernel_for_dispatch_key
for name in NATIVE_SCHEMAS:
    if has("peft_ops_native::" + name, "CUDA"): print(name)"""
    assert loaded(code) == list(CUDA_OPS)


def test_arguments_are_checked_before_the_gpu_is_asked(loaded):
    """The operators of the CUDA key on CPU tensors, which the dispatcher hands them beside a single CUDA tensor."""
    code = """
def call(op, *args):
    try: getattr(native, op).default.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args)
    except RuntimeError as error: print(str(error).splitlines()[0].split(", ", 2)[2])  # after function and line

x, l, ids = torch.ones(4, 8), torch.ones(2, 8), torch.tensor([0, 1])
for args in ((x, l, ids, "tanh"), (x, l[:, :7], ids, None), (x, l, torch.tensor([0, 1, 0]), None), (x, l, ids, "gelu")):
    call("ia3_scale", *args)
tokens, table, prompts = torch.ones(2, 3, dtype=torch.int64), torch.ones(5, 8), torch.ones(1, 2, 8)
layout = torch.zeros(2, 4, dtype=torch.int32)
for args in (
    (tokens, table, prompts, layout, 2.0),
    (tokens, table, prompts, layout, 1.0, tokens, table),
    (tokens, table, prompts, layout, 1.0, None, None, None, table),
    (tokens.t(), table, prompts, layout),
    (tokens.float(), table, prompts, layout),
    (tokens, table, prompts[..., :4].contiguous(), layout),
    (tokens, table, prompts, layout.long()),
    (tokens, table, prompts, torch.zeros(9, dtype=torch.int32)[1:].view(2, 4)),
    (tokens, table, prompts, layout),
    (torch.ones(2, 3, 8), None, prompts, layout, 2.0),
):
    call("prompt_concat", *args, *[1.0, None, None, None, None][len(args) - 4:])"""
    assert loaded(code) == [
        "ia3_scale: activation must be None, relu, gelu, gelu_tanh or silu, got tanh",
        "ia3_scale: ia3_l must have 8 columns as x has, got shape [2, 7]",
        "ia3_scale: task_ids must divide the 4 rows of x, got 3 ids",
        "ia3_scale: x must be on a CUDA device, got another kind of device",
        "prompt_concat: scale must be 1, this kernel copies embeddings, got 2",
        "prompt_concat: types and positions must be None, this kernel copies embeddings, got types",
        "prompt_concat: types and positions must be None, this kernel copies embeddings, got positions",
        "prompt_concat: tokens must be 2-D and contiguous, got shape [3, 2]",
        "prompt_concat: tokens must be int32 or int64, got Float",
        "prompt_concat: prompts must have 8 columns as the embeddings have, got shape [1, 2, 4]",
        "prompt_concat: layout must be int32, got Long",
        "prompt_concat: layout must be [2, 4] and aligned to 16 bytes, got shape [2, 4]",
        "prompt_concat: prompts must be on a CUDA device, got another kind of device",
        "prompt_concat: prompts must be on a CUDA device, got another kind of device",
    ]


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"PEFT_OPS_SKIP_CUDA_BUILD": "1"}, "building peft_ops._C for"),
        ({"CUDA_HOME": "/nonexistent"}, "building peft_ops._C for"),
        ({"TORCH_CUDA_ARCH_LIST": "1.0"}, "peft_ops._C_cuda left out"),
    ],
    ids=lambda v: "".join(v) if isinstance(v, dict) else "",
)
def test_without_it_the_cpu_library_is_still_built(env, says, tmp_path):
    found, said = build(tmp_path, **env)
    assert found.keys() == {"_C.so"} and says in said, said


@pytest.mark.nightly
def test_architectures_are_what_the_variable_says(tmp_path):
    found, _ = build(tmp_path, TORCH_CUDA_ARCH_LIST="8.6+PTX", MAX_JOBS="1")
    machine_code, ptx = architectures(found["_C_cuda.so"])
    assert machine_code - {"sm_75"} == {"sm_86"} and ptx == {"sm_86"}  # sm_75: nvcc's link step, empty
