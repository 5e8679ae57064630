"""What this install has and what will run where, for a bug report: `python -m peft_ops.info`."""

import importlib.metadata
import os
import platform
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch

import peft_ops
from peft_ops import _backend
from peft_ops._library import NATIVE_SCHEMAS, has_native
from peft_ops._native_rule import CUDA_OPS, CUDA_WINS, native_wins

PACKAGES = ("torch", "triton", "transformers", "peft", "numpy")
VARIABLES = ("PEFT_OPS_BACKEND", "PEFT_OPS_DEBUG", "TRITON_INTERPRET", "OMP_NUM_THREADS")
NATIVE_OPS = tuple(op for op in NATIVE_SCHEMAS if not op.startswith("first_bad_"))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def version(package: str) -> str:
    """From the metadata: importing a package to ask its version takes seconds."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def libraries() -> dict[str, str]:
    folder = Path(peft_ops.__file__).parent
    found = {
        path.name.split(".")[0]: f"{path.name}, {path.stat().st_size // 1024} KiB" for path in folder.glob("_C*.so")
    }
    cpu = found.get("_C", f"absent: {why_absent()}")
    cuda = found.get("_C_cuda", "absent: it is built where nvcc and a CUDA build of torch are; Triton needs none of it")
    if "_C_cuda" in found and not has_native("cuda"):
        cuda += ", not loaded: " + ("see the warning" if torch.version.cuda else "torch is not built for CUDA")
    return {"native CPU library": cpu, "native CUDA library": cuda}


def why_absent() -> str:
    """The likeliest reason: the build itself is long over."""
    if platform.system() == "Windows":
        return "the kernels are not written for Windows; plain PyTorch runs instead"
    if not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")):
        return "there is no C++ compiler; plain PyTorch runs instead"
    return (
        "a checkout is not built yet (`make setup`), or the build did not see torch or a compiler, failed, or was told "
        "PEFT_OPS_SKIP_BUILD=1; plain PyTorch runs instead. `pip install -v --no-build-isolation .` says which"
    )


def cpu_rule(op: str) -> str:
    """What `auto` runs on CPU tensors."""
    alone = [str(d).removeprefix("torch.") for d in DTYPES if not native_wins(op, d, fused=False)]
    return "native" + (f", but plain PyTorch for {', '.join(alone)} with one vector" if alone else "")


def gpu_backend() -> str:
    backend = _backend.get_backend()
    if not torch.cuda.is_available():
        return "no GPU"
    if backend == "reference":
        return "plain PyTorch"
    if backend == "native":
        ours = f"native for the forward of {' and '.join(CUDA_OPS)} (with nothing added), else plain PyTorch"
        return ours if has_native("cuda") else "fails: backend 'native' needs the CUDA library"
    if not find_spec("triton"):
        return "fails: Triton is not installed; set_backend('reference') works"
    wins = CUDA_WINS.items() if backend == "auto" and has_native("cuda") else ()
    return "; ".join(["Triton", *(f"{op} native up to {numel} elements" for op, numel in wins)])


def dispatch() -> dict[str, str]:
    backend = _backend.get_backend()
    interpreted = _backend.INTERPRET and backend in ("auto", "triton")
    rows = {}
    for op in NATIVE_OPS:
        if interpreted:
            rows[op] = "Triton's interpreter"
        elif backend == "native" and has_native():
            rows[op] = "native"
        elif backend == "auto" and has_native():
            rows[op] = cpu_rule(op)
        elif backend in ("auto", "reference"):
            rows[op] = "plain PyTorch"
        else:
            rows[op] = f"fails: backend {backend!r} serves no CPU tensors in this install"
    return {f"{op} on a CPU": value for op, value in rows.items()} | {"every operator on a GPU": gpu_backend()}


def info() -> dict[str, str]:
    gpus = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU"
    machine = {
        "peft_ops": f"{peft_ops.__version__} in {Path(peft_ops.__file__).parent}",
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "packages": ", ".join(f"{package} {version(package)}" for package in PACKAGES),
        "CPU": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "GPU": gpus or f"none; torch is built for {build}",
    }
    variables = ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ)
    settings = {"backend": _backend.get_backend(), "environment": variables or "nothing set"}
    return machine | libraries() | settings | dispatch()


if __name__ == "__main__":
    rows = info()
    width = max(map(len, rows))
    print("\n".join(f"{name:{width}}  {value}" for name, value in rows.items()))
