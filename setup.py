"""Builds the native libraries; the metadata is in pyproject.toml.

Three outcomes, never a failure: pure Python (no compiler, or no torch), `_C` (CPU kernels), or `_C_cuda` as well (a
CUDA torch and nvcc, or PEFT_OPS_FORCE_CUDA=1). The environment may set PEFT_OPS_SKIP_BUILD, PEFT_OPS_SKIP_CUDA_BUILD,
MAX_JOBS, TORCH_CUDA_ARCH_LIST, CUDA_HOME, CXX, CXXFLAGS. The libraries need no Python, and of torch what 2.10 has.
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

os.chdir(Path(__file__).parent)  # relative names of the sources: this folder's does not get into the libraries
CXX = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or "c++"]
NVCC = shutil.which(os.path.join(os.environ["CUDA_HOME"], "bin/nvcc") if "CUDA_HOME" in os.environ else "nvcc")
ARCHS = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0 9.0a 10.0a 9.0+PTX")  # 10.0a's PTX would run on nothing newer
CHECKS = [f"csrc/cpu/{name}.cpp" for name in ("common", "convert", "tasks")]  # of arguments: worded as on a CPU
MATH = [
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
]  # a choice then compiles to a blend, and vectorises


def asked(name: str) -> bool:
    return os.environ.get(f"PEFT_OPS_{name}", "0") == "1"


def find_torch() -> tuple[Path | None, dict]:
    """Folder and version of torch. -I leaves pip's isolated environment for the packages of the interpreter itself."""
    code = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    for flags in (["-I"], []):
        found = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True).stdout.strip()
        if found and Path(found, "version.py").exists():
            return Path(found), runpy.run_path(str(Path(found, "version.py")))
    return None, {}


TORCH, VERSION = find_torch()


def why_pure() -> str | None:
    if asked("SKIP_BUILD"):
        return "PEFT_OPS_SKIP_BUILD=1"
    if sys.platform == "win32":
        return "the kernels are not written for Windows"
    if TORCH is None:
        return "no torch found"
    if tuple(map(int, VERSION["__version__"].split(".")[:2])) < (2, 10):
        return f"torch {VERSION['__version__']} is older than 2.10"
    return None if shutil.which(CXX[0]) else f"no C++ compiler ({CXX[0]}) found"


def extensions() -> list[Extension]:
    """What can be built here, said in one line."""
    if reason := why_pure():
        print(f"peft_ops: pure Python, {reason}")
        return []
    sources = {"peft_ops._C": ["csrc/bindings.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]}
    cuda = sorted(str(path) for path in Path("csrc/cuda").glob("*") if path.suffix in (".cpp", ".cu"))
    if cuda and NVCC and (VERSION["cuda"] or asked("FORCE_CUDA")) and not asked("SKIP_CUDA_BUILD"):
        sources["peft_ops._C_cuda"] = [*cuda, *CHECKS]
    print(f"peft_ops: building {' and '.join(sources)} for torch {VERSION['__version__']}")
    return [Extension(name, files, optional=True) for name, files in sources.items()]


def gencode() -> list[str]:
    flags = []
    for arch in re.split(r"[;\s]+", ARCHS.strip()):
        number = arch.removesuffix("+PTX").replace(".", "")
        codes = [f"sm_{number}"] + [f"compute_{number}"] * arch.endswith("+PTX")
        flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    return flags


def compile_object(source: str) -> str:
    """The object file of a source: compiled if its text, a header's, torch or the command changed, else as it is."""
    host = ["-fPIC", "-fvisibility=hidden", f"-ffile-prefix-map={TORCH}=torch"]
    command = [*CXX, "-O3", *host, *MATH, "-Wall", "-Wextra", *shlex.split(os.environ.get("CXXFLAGS", ""))]
    if source.startswith("csrc/cuda"):
        command = [NVCC, "-O3", "-ccbin", CXX[0], "-Xcompiler", ",".join(host), *gencode(), "-DUSE_CUDA"]
    command += ["-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(TORCH / "include")]
    headers = sorted(path for path in Path("csrc").rglob("*") if path.suffix in (".h", ".cuh"))
    text = b"".join(Path(path).read_bytes() for path in [source, *headers])
    key = hashlib.sha256(repr((command, VERSION["__version__"])).encode() + text).hexdigest()[:16]
    target = Path("build/native", source).with_suffix(f".{key}.o")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-c", source, "-o", str(partial)], check=True)
        partial.rename(target)
    return str(target)


class BuildNative(build_ext):
    """torch's own build_ext refuses nvcc beside a CPU torch, and needs torch in the build environment."""

    def get_ext_filename(self, name: str) -> str:
        return name.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        linker, libraries = CXX, ["-ltorch_cpu"]
        if ext.name.endswith("_cuda"):
            linker = [NVCC, "--cudart=static", "-ccbin", CXX[0]]
            # a CPU build of torch has no libtorch_cuda.so to name, but libtorch.so, through which a CUDA build finds it
            libraries = ["-Xlinker=--no-as-needed", "-ltorch", *libraries]
        try:
            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
                objects = list(pool.map(compile_object, ext.sources))
            subprocess.run([*linker, "-shared", *objects, f"-L{TORCH / 'lib'}", *libraries, "-o", target], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"peft_ops: {ext.name} left out, {error}") from error


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]  # one file for every Python


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    packages=[*find_packages(include=["peft_ops", "peft_ops.*"]), "peft_ops.kernels"],
    package_dir={"peft_ops": "peft_ops", "peft_ops.kernels": "kernels"},
)
