"""Which code runs an operator: `auto`, or one backend for the whole process, or for a `with` block."""

import os
from importlib import import_module

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "native", "reference")
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"  # CPU tensors then go through the Triton kernels
DEBUG = os.environ.get("PEFT_OPS_DEBUG", "0") == "1"  # ids are checked on a GPU too, which synchronises

_backend = "auto"


class set_backend:
    """Choose what runs the operators: `set_backend("triton")`, or `with set_backend("reference"): ...`.

    Args:
        backend: "auto" (a GPU: Triton; a CPU: the native kernels where they win, else plain PyTorch), "triton",
            "native" (C++, and plain PyTorch for what has no such kernel on that device), or "reference" (plain PyTorch,
            visible to torch.compile; an id out of range gives NaN there, as on a GPU). It holds for every thread of the
            process; the environment variable PEFT_OPS_BACKEND gives the start value.
    """

    def __init__(self, backend: str):
        global _backend
        if backend not in BACKENDS:
            raise ValueError(f"set_backend: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        self.backend, self.before = backend, _backend
        _backend = backend

    def __enter__(self):
        global _backend
        # entered right after it was made, the block ends with what was before; entered later, with what is now
        self.previous = self.before if self.before is not None and _backend == self.backend else _backend
        self.before, _backend = None, self.backend
        return self

    def __exit__(self, *exc):
        global _backend
        _backend = self.previous


def get_backend() -> str:
    return _backend


class LazyKernels:
    """The module `peft_ops.kernels.<stem>`, imported when a kernel first runs: the package works without Triton."""

    def __init__(self, stem: str):
        self.stem = stem

    def __getattr__(self, name: str):
        value = getattr(import_module(f"peft_ops.kernels.{self.stem}"), name)
        setattr(self, name, value)  # the next look-up is a plain attribute
        return value


def use_triton(op: str, x: Tensor) -> bool:
    """Whether the implementation of `op` launches Triton kernels for x; otherwise it runs on aten and native code."""
    if x.dtype == torch.float64:
        return False  # gradcheck's dtype: the reference serves it
    if INTERPRET:
        return _backend in ("auto", "triton")
    if _backend == "triton" and not x.is_cuda:
        raise RuntimeError(
            f"{op}: backend 'triton' needs CUDA tensors, got {x.device}; "
            f"set TRITON_INTERPRET=1 before the first import to interpret the kernels on a CPU"
        )
    return x.is_cuda and _backend in ("auto", "triton")


_wanted = os.environ.get("PEFT_OPS_BACKEND") or "auto"
if _wanted not in BACKENDS:
    raise ValueError(f"PEFT_OPS_BACKEND: backend must be one of {', '.join(BACKENDS)}, got {_wanted!r}")
set_backend(_wanted)
