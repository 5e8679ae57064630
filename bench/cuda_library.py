"""What nvcc made of csrc/cuda: registers, bytes of stack, spills and accesses of each kernel in a library.

    python -m bench.cuda_library                      # peft_ops/_C_cuda.so
    python -m bench.cuda_library --match bfloat16 some/_C_cuda.so

Reading it needs cuobjdump, which the triton package brings, and no GPU. Where there is none,
`PEFT_OPS_FORCE_CUDA=1 python setup.py build_ext --inplace` builds it.
"""

import argparse
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import peft_ops
from bench.offline import TOOLS

LIBRARY = Path(peft_ops.__file__).parent / "_C_cuda.so"


# spilled, 16 bytes loaded, 16 bytes stored, fewer than 4 loaded, generic
ACCESSES = r"\b(?:LDL|STL)\b", r"\bLDG\.E\.128\b", r"\bSTG\.E\.128\b", r"\bLDG\.E\.[US](?:8|16)\b", r"\b(?:LD|ST)\.E\b"


class Resources(NamedTuple):
    registers: int
    stack: int  # bytes, local memory included
    spills: int  # loads and stores of it
    wide_loads: int  # 16 bytes
    wide_stores: int
    narrow_loads: int  # 1 or 2 bytes: rows that are not aligned, and their ends
    generic: int  # loads and stores through an address that the compiler does not know to be global


def cuobjdump(option: str, library: Path) -> str:
    command = [f"{TOOLS}/cuobjdump", option, library]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def architectures(library: Path) -> tuple[set[str], set[str]]:
    """Those that the library has machine code for, and those of its PTX."""
    kinds = {"-lelf": "cubin", "-lptx": "ptx"}
    return tuple(
        set(re.findall(rf"\.(sm_\w+)\.{kind}$", cuobjdump(option, library), re.M)) for option, kind in kinds.items()
    )


def resources(library: Path) -> dict[tuple[str, str], Resources]:
    """Of every kernel, by architecture and mangled name."""
    found, usage = {}, {}
    for arch, text in _by_architecture(cuobjdump("-res-usage", library)):
        for name, registers, stack, local in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", text):
            usage[arch, name] = int(registers), int(stack) + int(local)
    for arch, text in _by_architecture(cuobjdump("-sass", library)):
        for name, code in re.findall(r"Function : (\w+)\n(.*?)(?=Function : |\Z)", text, re.S):
            counts = (len(re.findall(pattern, code)) for pattern in ACCESSES)
            found[arch, name] = Resources(*usage[arch, name], *counts)
    return found


def _by_architecture(text: str) -> list[tuple[str, str]]:
    parts = re.split(r"^arch = (\w+)$", text, flags=re.M)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def readable(names: list[str]) -> list[str]:
    if not shutil.which("c++filt"):
        return names
    listed = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    return [re.sub(r"^void |\(anonymous namespace\)::|peft_ops::|\(.*", "", name) for name in listed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", nargs="?", type=Path, default=LIBRARY)
    parser.add_argument("--match", default="", help="only kernels whose name contains this")
    args = parser.parse_args()
    found = resources(args.library)
    print(f"{'':92}{' '.join(f'{field:>12}' for field in Resources._fields)}")
    for (arch, _), name, r in zip(found, readable([name for _, name in found]), found.values(), strict=True):
        if args.match in name:
            print(f"{arch:8}{name:84}{' '.join(f'{value:12}' for value in r)}")


if __name__ == "__main__":
    main()
