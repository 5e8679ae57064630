"""Builds the native libraries; the metadata is in pyproject.toml.

Three outcomes, never a failure: pure Python (no compiler, or no torch), `_C` (CPU kernels), or `_C_cuda` as well (a CUDA torch
and nvcc, or PEFT_OPS_FORCE_CUDA=1). PEFT_OPS_SKIP_BUILD=1, PEFT_OPS_SKIP_CUDA_BUILD=1, MAX_JOBS, TORCH_CUDA_ARCH_LIST, CXX,
CXXFLAGS and CUDA_HOME are read. The libraries know neither Python nor a torch newer than 2.10.
"""

import hashlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

os.chdir(Path(__file__).parent)  # relative paths keep this machine's out of the libraries
ENV = {name: os.environ.get(f"PEFT_OPS_{name}", "0") == "1" for name in ("SKIP_BUILD", "SKIP_CUDA_BUILD", "FORCE_CUDA")}
CXX = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("c++") or "c++"]
NVCC = shutil.which(str(Path(os.environ["CUDA_HOME"], "bin/nvcc"))) if "CUDA_HOME" in os.environ else shutil.which("nvcc")
CXXFLAGS = "-O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wall -Wextra".split()
DEFAULT_ARCHS = "8.0 9.0a 10.0a 9.0+PTX"  # PTX for the rest; PTX of 10.0a would run on nothing newer


def find_torch() -> tuple[Path | None, dict]:
    """Folder and version of torch. -I leaves pip's isolated build environment, which does not see the interpreter's packages."""
    code = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    for flags in (["-I"], []):
        found = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True).stdout.strip()
        if found and Path(found, "version.py").exists():
            return Path(found), runpy.run_path(str(Path(found, "version.py")))
    return None, {}


TORCH, VERSION = find_torch()


def gencode() -> list[str]:
    flags = []
    for arch in re.split(r"[;\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS).strip()):
        number = arch.removesuffix("+PTX").replace(".", "")
        codes = [f"sm_{number}"] + [f"compute_{number}"] * arch.endswith("+PTX")
        flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    return flags


def extensions() -> list[Extension]:
    """What this machine can build, said in one line."""
    cuda = sorted(map(str, Path("csrc/cuda").glob("*.c[up]*")))
    missing = next(
        reason
        for reason, holds in {
            "PEFT_OPS_SKIP_BUILD=1": ENV["SKIP_BUILD"],
            "the kernels are not written for Windows": sys.platform == "win32",
            "no torch found": TORCH is None,
            "torch is older than 2.10": TORCH and tuple(map(int, VERSION["__version__"].split(".")[:2])) < (2, 10),
            f"no C++ compiler ({CXX[0]}) found": shutil.which(CXX[0]) is None,
            "": True,
        }.items()
        if holds
    )
    if missing:
        print(f"peft_ops: pure Python, {missing}")
        return []
    names = {"peft_ops._C": [*map(str, sorted(Path("csrc/cpu").glob("*.cpp"))), "csrc/bindings.cpp"]}
    if cuda and not ENV["SKIP_CUDA_BUILD"] and NVCC and (VERSION["cuda"] or ENV["FORCE_CUDA"]):
        names["peft_ops._C_cuda"] = cuda
    print(f"peft_ops: building {' and '.join(names)} for torch {VERSION['__version__']}")
    return [Extension(name, sources, optional=True) for name, sources in names.items()]


class BuildNative(build_ext):
    """torch's own build_ext refuses nvcc beside a CPU torch, and takes torch into the build environment."""

    def get_ext_filename(self, name: str) -> str:
        return name.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        cuda = ext.name.endswith("_cuda")
        try:
            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
                objects = list(pool.map(self.compile, ext.sources))
            target = self.get_ext_fullpath(ext.name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            linker = [NVCC, "--cudart=static", "-ccbin", CXX[0]] if cuda else CXX
            libraries = ["-ltorch_cpu"] + ["-ltorch_cuda"] * (cuda and bool(VERSION["cuda"]))
            subprocess.run([*linker, "-shared", *objects, f"-L{TORCH / 'lib'}", *libraries, "-o", target], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"peft_ops: {ext.name} left out, {error}") from error

    def compile(self, source: str) -> str:
        """The object file of a source, compiled if its text, a header's or the command changed."""
        command = [*CXX, *CXXFLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        if source.startswith("csrc/cuda"):
            host = ["-Xcompiler", ",".join(CXXFLAGS[1:3])]
            command = [NVCC, "-O3", "-ccbin", CXX[0], *host, *gencode(), "-DUSE_CUDA"]
        command += ["-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(TORCH / "include"), "-c", source]
        headers = sorted(p for p in Path("csrc").rglob("*") if p.suffix in (".h", ".cuh"))
        text = b"".join(Path(p).read_bytes() for p in [source, *headers])
        key = hashlib.sha256(repr((command, VERSION["__version__"])).encode() + text).hexdigest()
        target = Path("build/native", source).with_suffix(f".{key[:16]}.o")
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(f".{os.getpid()}")
            subprocess.run([*command, "-o", str(partial)], check=True)
            partial.rename(target)
        return str(target)


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]  # one file for every Python


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    packages=[*find_packages(include=["peft_ops", "peft_ops.*"]), "peft_ops.kernels"],
    package_dir={"peft_ops": "peft_ops", "peft_ops.kernels": "kernels"},
)
