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

pytestmark = pytest.mark.skipif(not (shutil.which("nvcc") and shutil.which("g++")), reason="no nvcc or no g++")

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
        assert r.wide_stores and r.wide_loads >= r.wide_stores * (1 + L // T), f"{arch} {name}: {r}"


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


def test_it_loads_and_registers_its_operators(library, tmp_path):
    """Under a CPU build of torch too, beside the one function that such a build lacks: so nothing else is missing."""
    if torch.version.cuda:
        pytest.skip("loaded with the package")
    (tmp_path / "stream.c").write_text(
        "int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }"
    )
    subprocess.run(["g++", "-xc", "-shared", "-fPIC", "stream.c", "-o", "stream.so"], cwd=tmp_path, check=True)
    code = f"""
import ctypes, torch, peft_ops
from peft_ops._library import NATIVE_SCHEMAS
ctypes.CDLL({str(tmp_path / "stream.so")!r}, ctypes.RTLD_GLOBAL)
torch.ops.load_library({str(library)!r})
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(*[name for name in NATIVE_SCHEMAS if has("peft_ops_native::" + name, "CUDA")])"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == list(CUDA_OPS), done.stdout + done.stderr


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
