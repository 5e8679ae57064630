"""Compile what the launchers launch, for GPUs that are not here, and read what the compiler made of it.

    python -m bench.offline            # every launch below, for sm_80, sm_90 and sm_100

A launcher runs on meta tensors with its kernels recorded instead of launched, so that types, divisibility and tiles are
those of the real call; the recorded call is then compiled for each architecture. Needs triton and its bundled tools, no
GPU.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime.jit import create_function_from_signature

from peft_ops.kernels import tiles
from peft_ops.ops import ia3_linear, ia3_scale, prompt_concat, task_plan

ARCHITECTURES = (80, 90, 100)
MATRIX = {
    80: r"\bHMMA\b",
    90: r"\bHGMMA\b",
    100: r"\bUTC\w*MMA\b",
}  # the older forms run on newer chips too, at a fraction
TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


class Launch(NamedTuple):
    kernel: triton.runtime.JITFunction
    args: tuple
    kwargs: dict


class Resources(NamedTuple):
    registers: int
    stack: int
    spills: int
    shared: int
    matrix: int  # tensor-core instructions of this architecture
    tma: int  # bulk tensor loads and stores
    wide: int  # 16-byte global loads and stores, asynchronous copies included
    narrow: int  # 1- and 2-byte global loads


class _Recorder:
    def __init__(self, kernel, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append(Launch(self.kernel, args, kwargs))


@contextmanager
def recorded(*modules) -> Iterator[list[Launch]]:
    """The kernels of these ops modules record their launches instead of running."""
    launches: list[Launch] = []
    replaced = []
    for module in modules:
        lazy = module.kernels
        source = __import__(f"peft_ops.kernels.{lazy.stem}", fromlist=["*"])
        for name in vars(source):
            if name.endswith("_kernel"):
                replaced.append((lazy, name, lazy.__dict__.get(name)))
                setattr(lazy, name, _Recorder(getattr(source, name), launches))
    try:
        yield launches
    finally:
        for lazy, name, old in replaced:
            delattr(lazy, name) if old is None else setattr(lazy, name, old)


def compile_launch(launch: Launch, capability: int):
    """The compiled kernel, specialised as Triton would for these arguments."""
    fn = launch.kernel
    backend = CUDABackend(GPUTarget("cuda", capability, 32))
    bind = create_function_from_signature(fn.signature, fn.params, backend)
    bound, specialization, options = bind(*launch.args, **launch.kwargs)
    kwargs = {k: v for k, v in launch.kwargs.items() if k not in bound}
    options, signature, constexprs, attrs = fn._pack_args(backend, kwargs, bound, specialization, options)
    return triton.compile(
        ASTSource(fn, signature, constexprs, attrs), target=GPUTarget("cuda", capability, 32), options=options.__dict__
    )


def resources(kernel) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        usage = subprocess.run(
            [f"{TOOLS}/cuobjdump", "-res-usage", f.name], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run([f"{TOOLS}/nvdisasm", f.name], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    return Resources(
        registers, stack, count(r"\b(?:STL|LDL)\b"), kernel.metadata.shared,
        count(MATRIX[kernel.metadata.target.arch]), count(r"\bUTMA(?:LDG|STG)\b"),
        count(r"\b(?:LDG|STG|LDGSTS)\.[\w.]*128\b"), count(r"\bLDG\.[\w.]*[US](?:8|16)\b"),
    )  # fmt: skip


class Case(NamedTuple):
    """One launch to compile, and what must hold of it."""

    name: str
    record: Callable[[int], Launch]  # capability -> launch
    matrix: bool = False  # tensor-core instructions on every architecture, HGMMA on sm_90 and TMA where aligned
    wide: bool = False  # memory-bound and aligned: 16-byte accesses, none narrower than 4 bytes to the big tensors


def _meta(*size, dtype=torch.bfloat16):
    return torch.empty(size, dtype=dtype, device="meta")


def _ids(n, dtype=torch.int64):
    return _meta(n, dtype=dtype)


def _scale(M, N, dtype, l_dtype, ids, activation):
    def record(capability):
        with recorded(ia3_scale) as launches:
            ia3_scale.launch_scale(
                _meta(M, N, dtype=dtype), _meta(4, N, dtype=l_dtype), _ids(8) if ids else None, activation
            )
        return launches[0]

    return record


def _scale_backward(M, N, dtype, ids, activation, need_dx, need_dl, which=0):
    def record(capability):
        x = _meta(M, N, dtype=dtype)
        with recorded(ia3_scale) as launches:
            table = _meta(4, N, dtype=torch.float32)
            ia3_scale.launch_scale_backward(x, x, table, _ids(8) if ids else None, activation, need_dx, need_dl)
        return launches[which]

    return record


def _linear(M, N, K, dtype, ids, activation, bias=True, save=False, transposed=False):
    def record(capability):
        x, y = _meta(M, K, dtype=dtype), _meta(M, N, dtype=dtype)
        weight = _meta(K, N, dtype=dtype).t() if transposed else _meta(N, K, dtype=dtype)
        table, b = _meta(4, N, dtype=torch.float32), _meta(N, dtype=dtype) if bias else None
        z = _meta(M, N, dtype=dtype) if save else None
        task_ids = None if ids is None else _ids(M, torch.int32)
        with recorded(ia3_linear) as launches:
            if M > tiles.SMALL_M and ia3_linear._tma_takes(x, weight.t() if transposed else weight, y):
                plan = (
                    None if ids is None else [_meta(3, dtype=torch.int32), _ids(M, torch.int32), _ids(M, torch.int32)]
                )
                rows_per_id = 128 if ids == "two" else 1
                ia3_linear._launch_large(
                    x, weight, b, table, task_ids, plan, rows_per_id, activation, y, z, capability, 132
                )
            else:
                ia3_linear._launch_small(x, weight, b, table, task_ids, activation, y, z, capability)
        return launches[0]

    return record


def _plan(packed):
    def record(capability):
        with recorded(task_plan) as launches:
            task_plan.launch_plan(_ids(8), _ids(9, torch.int32) if packed else None, 4096, 4)
        return launches[0]

    return record


def _concat(E, dtype, prompt_dtype, table, which):
    def record(capability):
        tokens = _ids(8 * 512).view(8, 512) if table else _meta(8, 512, E, dtype=dtype)
        embedding = _meta(32000, E, dtype=dtype) if table else None
        mask = _meta(8, 512, dtype=torch.int64)
        with recorded(prompt_concat) as launches:
            prompt_concat.launch_concat(
                tokens, embedding, _meta(4, 20, E, dtype=prompt_dtype), _ids(8), _ids(4), mask, mask, True
            )
        return launches[which]

    return record


def _concat_backward(E, dtype):
    def record(capability):
        with recorded(prompt_concat) as launches:
            prompt_concat.launch_concat_backward(_meta(8, 532, E, dtype=dtype), _meta(8, 4, dtype=torch.int32), 4, 20)
        return launches[0]

    return record


def cases() -> list[Case]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    names = {bf16: "bf16", fp16: "fp16", fp32: "fp32"}
    found = [Case("plan_tasks", _plan(False)), Case("plan_tasks packed", _plan(True))]
    for dtype in (bf16, fp16, fp32):
        d = names[dtype]
        found.append(Case(f"ia3_scale {d} ids", _scale(4096, 4096, dtype, fp32, True, None), wide=True))
        found.append(
            Case(f"ia3_scale_backward {d} ids", _scale_backward(4096, 4096, dtype, True, None, True, True), wide=True)
        )
        found.append(Case(f"prompt_concat {d}", _concat(4096, dtype, fp32, True, 1), wide=True))
        found.append(Case(f"prompt_concat_backward {d}", _concat_backward(4096, dtype)))
    found.append(Case("ia3_scale bf16 one task", _scale(4096, 4096, bf16, bf16, False, None), wide=True))
    found.append(Case("ia3_scale bf16 odd", _scale(37, 4095, bf16, fp32, True, None)))
    found.append(Case("ia3_scale bf16 one row", _scale(1, 4096, bf16, fp32, False, None), wide=True))
    found.append(
        Case("ia3_scale_backward bf16 dl only", _scale_backward(4096, 4096, bf16, True, None, False, True), wide=True)
    )
    found.append(Case("sum_chunks", _scale_backward(4096, 4096, bf16, True, None, True, True, which=1)))
    found.append(Case("prompt_layout", _concat(4096, bf16, fp32, True, 0)))
    found.append(Case("prompt_concat inputs_embeds", _concat(1536, bf16, bf16, False, 1), wide=True))
    for activation in ("relu", "gelu", "gelu_tanh", "silu"):
        found.append(Case(f"ia3_scale bf16 {activation}", _scale(4096, 4096, bf16, fp32, True, activation), wide=True))
        backward = _scale_backward(4096, 4096, bf16, True, activation, True, True)
        found.append(Case(f"ia3_scale_backward bf16 {activation}", backward, wide=True))
        for save in (False, True):
            name = f"ia3_linear bf16 8192x4096x4096 two {activation}{' save' * save}"
            found.append(Case(name, _linear(8192, 4096, 4096, bf16, "two", activation, save=save), matrix=True))
    for mode in (None, "two", "runs"):
        for size in ((8192, 4096, 4096), (256, 1024, 1024)):
            name = f"ia3_linear bf16 {'x'.join(map(str, size))} {mode or 'one'}"
            found.append(Case(name, _linear(*size, bf16, mode, None), matrix=True))
    found.append(
        Case(
            "ia3_linear fp16 8192x4096x4096 runs",
            _linear(8192, 4096, 4096, fp16, "runs", None, bias=False),
            matrix=True,
        )
    )
    found.append(
        Case(
            "ia3_linear bf16 8192x4096x4096 conv1d",
            _linear(8192, 4096, 4096, bf16, "two", None, transposed=True),
            matrix=True,
        )
    )
    for M in (1, 16, 32, 64):
        for activation in (None, "gelu"):
            name = f"ia3_linear bf16 {M}x4096x4096 {activation or ''}"
            found.append(Case(name, _linear(M, 4096, 4096, bf16, "ids", activation), matrix=True))
    found.append(
        Case("ia3_linear bf16 300x1023x1021 odd", _linear(300, 1023, 1021, bf16, "ids", "silu", save=True), matrix=True)
    )
    found.append(
        Case(
            "ia3_linear fp16 8x4096x4096 conv1d",
            _linear(8, 4096, 4096, fp16, "ids", None, transposed=True),
            matrix=True,
        )
    )
    return found


def problems(case: Case, r: Resources, capability: int) -> list[str]:
    """What is wrong with this compilation; empty if nothing is."""
    found = []
    if r.stack or r.spills:
        found.append(f"{r.stack} bytes of stack, {r.spills} spill instructions")
    if r.shared > tiles.SHARED_MEMORY[capability]:
        found.append(f"{r.shared} bytes of shared memory, {tiles.SHARED_MEMORY[capability]} fit")
    if case.matrix and not r.matrix:
        found.append("no tensor-core instruction")
    if case.wide and (not r.wide or r.narrow):
        found.append(f"{r.wide} 16-byte accesses, {r.narrow} of 1 or 2 bytes")
    return found


def main() -> None:
    print(f"triton {triton.__version__}")
    columns = ("sm", *Resources._fields)
    print(f"{'launch':50}", *(f"{name:>9}" for name in columns), " verdict")
    bad = 0
    for case in cases():
        for capability in ARCHITECTURES:
            r = resources(compile_launch(case.record(capability), capability))
            found = problems(case, r, capability)
            bad += bool(found)
            print(f"{case.name:50}", *(f"{value:9}" for value in (capability, *r)), "", "; ".join(found) or "ok")
    raise SystemExit(bad > 0)


if __name__ == "__main__":
    main()
