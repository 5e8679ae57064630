"""Compile what the launchers launch, for GPUs that are not here, and read what the compiler made of it.

    python -m bench.offline            # every launch below with every candidate of its table, for every architecture
    python -m bench.offline --sm 90 --match glu

Columns: registers, bytes of stack, spill instructions, bytes of shared memory, warps (12 where 4 were specialised),
tensor-core instructions, TMA loads and stores, 16-byte accesses, loads of 1 or 2 bytes.

A launcher runs on meta tensors with its kernels recorded instead of launched, so that types, divisibility and tiles are
those of the real call; the recorded call is then compiled for each architecture. Needs triton and its bundled tools, no
GPU.
"""

import argparse
import inspect
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime.jit import create_function_from_signature

from peft_ops._backend import LazyKernels
from peft_ops.kernels import tiles
from peft_ops.ops import (
    ia3_glu,
    ia3_kv_linear,
    ia3_linear,
    ia3_scale,
    prompt_concat,
    prompt_concat_packed,
    prompt_embed,
    task_plan,
)

ARCHITECTURES = (80, 90, 100)  # the fourth kind of table, 99 KB of shared memory, is sm_86's, sm_89's and sm_120's
# the older forms run on newer chips too, at a fraction; sm_120 has none of its own for 16 bit
MATRIX = dict.fromkeys((80, 86, 89, 120), r"\bHMMA\b") | {90: r"\bHGMMA\b", 100: r"\bUTC\w*MMA\b"}
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
    warps: int  # of the running kernel: 12 where 4 were specialised
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
    for lazy in (value for module in modules for value in vars(module).values() if isinstance(value, LazyKernels)):
        source = import_module(f"peft_ops.kernels.{lazy.stem}")
        for name in [name for name in vars(source) if name.endswith("_kernel")]:
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
        registers, stack, count(r"\b(?:STL|LDL)\b"), kernel.metadata.shared, kernel.metadata.num_warps,
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


def _scale_backward(M, N, dtype, ids, activation, need_dx, need_dl, which=2):
    def record(capability):
        x = _meta(M, N, dtype=dtype)
        with recorded(ia3_scale) as launches:
            table = _meta(4, N, dtype=torch.float32)
            ia3_scale.launch_scale_backward(x, x, table, _ids(8) if ids else None, activation, need_dx, need_dl)
        return launches[which]

    return record


@contextmanager
def _gpu(capability: int) -> Iterator[None]:
    """The launchers choose as on a GPU of this compute capability."""
    modules = ia3_linear, ia3_kv_linear, ia3_glu
    known = ia3_linear.capability_of
    for module in modules:
        module.capability_of = lambda x: (capability, tiles.chip(capability).multiprocessors)
    try:
        yield
    finally:
        for module in modules:
            module.capability_of = known


class _Asked(dict):
    """tiles.TUNED that remembers which tunable choices were asked for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.keys_asked: list[tuple] = []

    def get(self, key, default=None):
        self.keys_asked.append(key)
        return super().get(key, default)


@contextmanager
def tuned(entries: dict) -> Iterator[_Asked]:
    """The launchers find these entries in tiles.TUNED, and no others."""
    known, tiles.TUNED = tiles.TUNED, _Asked(entries)
    try:
        yield tiles.TUNED
    finally:
        tiles.TUNED = known


def candidates(key: tuple) -> list[dict]:
    """All tiles that the tunable function of a key of TUNED offers for it."""
    name, capability, M, N, K, *flags = key
    function = getattr(tiles, name).candidates
    known = [p.name for p in inspect.signature(function).parameters.values() if p.kind == p.KEYWORD_ONLY]
    return function(M, N, K, capability, **{flag: flag in flags for flag in known})


def entries(case: "Case", capability: int) -> list[Launch]:
    """The launch of a case with the tile that runs, then with each other candidate of the table."""
    with tuned({}) as asked:
        found = [case.record(capability)]
    for key in dict.fromkeys(asked.keys_asked):
        for tile in candidates(key):
            with tuned({key: tile}):
                launch = case.record(capability)
            if all(launch.kwargs != known.kwargs for known in found):
                found.append(launch)
    return found


def _tasks(M, ids):
    """Ids, plan and rows per id, as a launcher takes them. ids: None, "two" (long sequences), "runs" (per token)."""
    if ids is None:
        return None, None, 1
    plan = [_meta(3, dtype=torch.int32), _ids(M, torch.int32), _ids(M, torch.int32)]
    return _ids(M, torch.int32), plan, 128 if ids == "two" else 1


def _linear(M, N, K, dtype, ids, activation, bias=True, save=False, transposed=False):
    def record(capability):
        weight = _meta(K, N, dtype=dtype).t() if transposed else _meta(N, K, dtype=dtype)
        b, table = _meta(N, dtype=dtype) if bias else None, _meta(4, N, dtype=torch.float32)
        with recorded(ia3_linear) as launches, _gpu(capability):
            ia3_linear.launch_linear(_meta(M, K, dtype=dtype), weight, b, table, *_tasks(M, ids), activation, save)
        return launches[0]

    return record


def _feedforward(M, N, K, dtype, ids, transposed=False):
    def record(capability):
        weight = _meta(K, N, dtype=dtype).t() if transposed else _meta(N, K, dtype=dtype)
        table = _meta(4, K, dtype=torch.float32)
        with recorded(ia3_linear) as launches, _gpu(capability):
            x, bias = _meta(M, K, dtype=dtype), _meta(N, dtype=dtype)
            ia3_linear.launch_feedforward(x, weight, bias, table, _ids(8) if ids else None)
        return launches[0]

    return record


def _kv(M, k_n, v_n, K, dtype, ids, bias=True):
    def record(capability):
        weights = _meta(k_n, K, dtype=dtype), _meta(v_n, K, dtype=dtype)
        biases = (_meta(k_n, dtype=dtype), _meta(v_n, dtype=dtype)) if bias else (None, None)
        tables = _meta(4, k_n, dtype=torch.float32), _meta(4, v_n, dtype=torch.float32)
        with recorded(ia3_kv_linear) as launches, _gpu(capability):
            ia3_kv_linear.launch_kv(_meta(M, K, dtype=dtype), *weights, *biases, *tables, *_tasks(M, ids))
        return launches[0]

    return record


def _glu_linear(M, N, K, dtype, ids, activation, bias=True, save=False):
    def record(capability):
        weights = _meta(N, K, dtype=dtype), _meta(N, K, dtype=dtype)
        biases = (_meta(N, dtype=dtype), _meta(N, dtype=dtype)) if bias else (None, None)
        table = _meta(4, N, dtype=torch.float32)
        x = _meta(M, K, dtype=dtype)
        with recorded(ia3_glu) as launches, _gpu(capability):
            ia3_glu.launch_glu_linear(x, *weights, *biases, table, *_tasks(M, ids), activation, save)
        return launches[0]

    return record


def _glu(M, N, dtype, activation, backward):
    def record(capability):
        g, table = _meta(M, N, dtype=dtype), _meta(4, N, dtype=torch.float32)
        with recorded(ia3_glu, ia3_scale) as launches:
            if backward:
                ia3_glu.launch_glu_backward(g, g, g, table, _ids(8), activation, True, True)
            else:
                ia3_glu.launch_glu(g, g, table, _ids(8), activation)
        return launches[2 if backward else 0]

    return record


def _plan(packed):
    def record(capability):
        with recorded(task_plan) as launches:
            task_plan.launch_plan(_ids(8), _ids(9, torch.int32) if packed else None, 4096, 4)
        return launches[0]

    return record


def _added(E, dtype, positions, types):
    """Tables of positions and of types."""
    return _meta(1026, E, dtype=dtype) if positions else None, _meta(2, E, dtype=dtype) if types else None


def _concat(E, dtype, prompt_dtype, table, which, *, scale=1.0, positions=False, types=False, after_bos=False):
    def record(capability):
        tokens = _ids(8 * 512).view(8, 512) if table else _meta(8, 512, E, dtype=dtype)
        embedding = _meta(32000, E, dtype=dtype) if table else None
        mask, prompts = _meta(8, 512, dtype=torch.int64), _meta(4, 20, E, dtype=prompt_dtype)
        tables = _added(E, dtype, positions, types)
        with recorded(prompt_concat) as launches:
            prompt_concat.launch_concat(
                tokens, embedding, prompts, *tables, _ids(8), _ids(4), mask, mask, mask if types else None,
                2 * positions, scale, True, after_bos,
            )  # fmt: skip
        return launches[which]

    return record


def _concat_backward(E, dtype):
    def record(capability):
        with recorded(prompt_concat) as launches:
            prompt_concat.launch_concat_backward(_meta(8, 532, E, dtype=dtype), _meta(8, 4, dtype=torch.int32), 4, 20)
        return launches[0]

    return record


def _embed(E, dtype, prompt_dtype, *, scale=1.0, positions=False, types=False, with_ids=True):
    def record(capability):
        ids, embedding = _ids(8 * 512).view(8, 512), _meta(32000, E, dtype=dtype)
        prompts, tables = _meta(4, 20, E, dtype=prompt_dtype), _added(E, dtype, positions, types)
        slot_ids = [ids if given and with_ids else None for given in (positions, types)]
        with recorded(prompt_embed) as launches:
            prompt_embed.launch_embed(
                ids, embedding, prompts, *tables, _ids(8), _ids(4), *slot_ids, 2 * positions, scale
            )
        return launches[0]

    return record


def _embed_backward(E, dtype):
    def record(capability):
        with recorded(prompt_embed) as launches:
            rows = _meta(8, 512, dtype=torch.int32)
            prompt_embed.launch_embed_backward(_meta(8, 512, E, dtype=dtype), rows, 4, 20)
        return launches[0]

    return record


def _packed(E, dtype, prompt_dtype, table, which, scale=1.0):
    def record(capability):
        tokens = _ids(4096) if table else _meta(4096, E, dtype=dtype)
        embedding = _meta(32000, E, dtype=dtype) if table else None
        with recorded(prompt_concat_packed) as launches:
            prompt_concat_packed.launch_packed(
                tokens, _ids(9, torch.int32), embedding, _meta(4, 20, E, dtype=prompt_dtype), _ids(8), _ids(4),
                _ids(4096), 4256, scale, False,
            )  # fmt: skip
        return launches[which]

    return record


def _packed_backward(E, dtype):
    def record(capability):
        with recorded(prompt_concat_packed) as launches:
            layout, cu_seqlens = _meta(9, 4, dtype=torch.int32), _ids(9, torch.int32)
            prompt_concat_packed.launch_packed_backward(_meta(4256, E, dtype=dtype), layout, cu_seqlens, 4, 20)
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
        found.append(Case(f"prompt_concat_packed {d}", _packed(4096, dtype, fp32, True, 1), wide=True))
        found.append(Case(f"prompt_concat_packed_backward {d}", _packed_backward(4096, dtype)))
        found.append(Case(f"prompt_embed {d}", _embed(4096, dtype, fp32), wide=True))
        found.append(Case(f"prompt_embed_backward {d}", _embed_backward(4096, dtype)))
        added = dict(scale=64.0, positions=True, types=True)
        found.append(Case(f"prompt_concat {d} added", _concat(4096, dtype, fp32, True, 1, **added), wide=True))
        found.append(Case(f"prompt_embed {d} added", _embed(4096, dtype, fp32, **added), wide=True))
    found.append(Case("ia3_scale bf16 one task", _scale(4096, 4096, bf16, bf16, False, None), wide=True))
    found.append(Case("ia3_scale bf16 odd", _scale(37, 4095, bf16, fp32, True, None)))
    found.append(Case("ia3_scale bf16 one row", _scale(1, 4096, bf16, fp32, False, None), wide=True))
    found.append(
        Case("ia3_scale_backward bf16 dl only", _scale_backward(4096, 4096, bf16, True, None, False, True), wide=True)
    )
    for which, name in enumerate(("sort_ids", "chunk_rows")):
        found.append(Case(name, _scale_backward(4096, 4096, bf16, True, None, True, True, which)))
    found.append(Case("sum_chunks", _scale_backward(4096, 4096, bf16, True, None, True, True, which=3)))
    found.append(Case("prompt_concat bf16 scale", _concat(4096, bf16, fp32, True, 1, scale=64.0), wide=True))
    found.append(Case("prompt_concat bf16 positions", _concat(4096, bf16, fp32, True, 1, positions=True), wide=True))
    found.append(Case("prompt_embed bf16 scale", _embed(4096, bf16, fp32, scale=64.0), wide=True))
    counted = dict(positions=True, types=True, with_ids=False)
    found.append(Case("prompt_embed bf16 added, counted", _embed(4096, bf16, fp32, **counted), wide=True))
    found.append(Case("prompt_layout", _concat(4096, bf16, fp32, True, 0)))
    found.append(Case("prompt_layout after_bos", _concat(4096, bf16, fp32, True, 0, after_bos=True)))
    found.append(Case("prompt_concat inputs_embeds", _concat(1536, bf16, bf16, False, 1), wide=True))
    found.append(Case("prompt_concat_packed bf16 scale", _packed(4096, bf16, fp32, True, 1, scale=64.0), wide=True))
    found.append(Case("packed_layout", _packed(4096, bf16, fp32, True, 0)))
    for E in (1024, 1536):
        name = f"prompt_concat_packed inputs_embeds {E}"
        found.append(Case(name, _packed(E, bf16, bf16, False, 1), wide=True))
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
    for size in ((8192, 4096, 14336), (512, 768, 3072)):
        for ids in (True, False):
            name = f"ia3_linear bf16 {'x'.join(map(str, size))} feedforward{'' if ids else ' one'}"
            found.append(Case(name, _feedforward(*size, bf16, ids), matrix=True))
    conv1d = _feedforward(8192, 768, 3072, fp16, True, transposed=True)
    found.append(Case("ia3_linear fp16 8192x768x3072 feedforward conv1d", conv1d, matrix=True))
    for M in (1, 2, 4):
        for N in (1024, 4096):
            name = f"ia3_linear bf16 {M}x{N}x4096 vector"
            found.append(Case(name, _linear(M, N, 4096, bf16, "runs", "gelu", save=True), wide=True))
    found.append(Case("ia3_linear fp32 4x4096x4096 vector", _linear(4, 4096, 4096, fp32, "runs", None), wide=True))
    for M in (8, 32, 64, 512):
        for N in (1024, 4096, 14336):
            for activation in (None, "gelu"):
                name = f"ia3_linear bf16 {M}x{N}x4096 {activation or ''}"
                found.append(Case(name, _linear(M, N, 4096, bf16, "runs", activation), matrix=True))
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
    for activation in ("silu", "gelu", "gelu_tanh", "relu"):
        for backward in (False, True):
            name = f"ia3_glu{'_backward' * backward} bf16 {activation}"
            found.append(Case(name, _glu(4096, 4096, bf16, activation, backward), wide=True))
        for M, save in ((8192, False), (8192, True), (512, False), (16, False), (64, True)):
            name = f"ia3_glu_linear bf16 {M}x14336x4096 two {activation}{' save' * save}"
            found.append(Case(name, _glu_linear(M, 14336, 4096, bf16, "two", activation, save=save), matrix=True))
    found.append(
        Case("ia3_glu_linear bf16 8192x14336x4096 runs", _glu_linear(8192, 14336, 4096, bf16, "runs", "silu"), True)
    )
    found.append(Case("ia3_glu_linear bf16 4x1024x1021 odd", _glu_linear(4, 1024, 1021, bf16, "runs", "silu"), True))
    for k_n, v_n in ((1024, 1024), (4096, 4096), (4096, 1024)):
        for M in (1, 16, 64, 512, 8192):
            for mode in ("two", "runs"):
                name = f"ia3_kv_linear bf16 {M}x{k_n}+{v_n}x4096 {mode}"
                found.append(Case(name, _kv(M, k_n, v_n, 4096, bf16, mode), matrix=M > 4, wide=M <= 4))
    return found


def problems(case: Case, r: Resources, capability: int, specialized: bool = False) -> list[str]:
    """What is wrong with this compilation; empty if nothing is."""
    found = []
    if r.stack or r.spills:
        found.append(f"{r.stack} bytes of stack, {r.spills} spill instructions")
    if r.shared > tiles.chip(capability).shared_memory:
        found.append(f"{r.shared} bytes of shared memory, {tiles.chip(capability).shared_memory} fit")
    if specialized and r.warps != 12:
        found.append(f"{r.warps} warps: not specialised")
    if case.matrix and not r.matrix:
        found.append("no tensor-core instruction")
    if case.wide and (not r.wide or r.narrow):
        found.append(f"{r.wide} 16-byte accesses, {r.narrow} of 1 or 2 bytes")
    return found


def tile_of(launch: Launch) -> str:
    """A launch's tile in short, 128x256x64/3 w8: its blocks, stages and warps."""
    k = launch.kwargs
    blocks = "x".join(str(k[name]) for name in ("BLOCK_M", "BLOCK_ROWS", "BLOCK_N", "BLOCK_E", "BLOCK_K") if name in k)
    split = f" split {k['SPLIT']}" if k.get("SPLIT", 1) > 1 else ""
    return f"{blocks}{f'/{s}' if (s := k.get('num_stages')) else ''} w{k.get('num_warps', 4)}{split}" + (
        " specialised" if k.get("SPECIALIZE") else ""
    )


def work(capabilities: Iterable[int], others: bool = True) -> list[tuple[Case, int, Launch]]:
    """Everything to compile: each case on each architecture, with the other candidates of its table if asked for."""
    return [
        (case, capability, launch)
        for case in cases()
        for capability in capabilities
        for launch in (entries(case, capability) if others else entries(case, capability)[:1])
    ]


_known: dict[str, Resources] = {}  # by the compiled kernel's hash: several launches share one


def check(case: Case, capability: int, launch: Launch) -> tuple[Resources | None, list[str]]:
    """What the compiler made of a launch, and what is wrong with it."""
    try:
        kernel = compile_launch(launch, capability)
        if kernel.hash not in _known:
            _known[kernel.hash] = resources(kernel)
        r = _known[kernel.hash]
    except Exception as error:  # whatever the compiler raises is a finding about this launch, and the next one goes on
        return None, [f"{type(error).__name__}: {str(error).splitlines()[0]}"]
    return r, problems(case, r, capability, bool(launch.kwargs.get("SPECIALIZE")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(tiles.CHIPS)
    parser.add_argument("--sm", type=int, nargs="+", default=known, choices=known, help="compute capabilities")
    parser.add_argument("--match", default="", help="only launches whose name contains this")
    args = parser.parse_args()
    found = [w for w in work(args.sm) if args.match in w[0].name]
    if not found:
        parser.error(f"no launch's name contains {args.match!r}")
    print(f"triton {triton.__version__}: {len(found)} compilations")
    print(f"{'launch':50} {'tile':38}", *(f"{name:>9}" for name in ("sm", *Resources._fields)), " verdict")
    bad = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (case, capability, launch), (r, wrong) in zip(found, pool.map(lambda w: check(*w), found), strict=True):
            bad += bool(wrong)
            values = [f"{v:9}" for v in (capability, *(r or ()))]
            print(f"{case.name:50} {tile_of(launch):38}", *values, "", "; ".join(wrong) or "ok", flush=True)
    print(f"{len(found) - bad} of {len(found)} clean")
    raise SystemExit(bad > 0)


if __name__ == "__main__":
    main()
