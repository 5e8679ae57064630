"""Native CPU kernels against plain PyTorch, ABBA-interleaved; public prompt operators against what is written for them.

    python -m bench.native_cpu --threads 1
    python -m bench.native_cpu --threads 1 --json FILE
    python -m bench.native_cpu --threads 1 --strict      # exits with 1 where what `auto` runs natively is behind

A ratio is the peer's time / the native time, each the tenth percentile of windows of 1 ms; A/A, the native kernel
against itself, says what a ratio may be by chance. `peft` is PEFT's arithmetic, with one task or with vectors gathered.
peft_ops/_native_rule.py is read off this table. Behind: below 0.95 of the reference or of PEFT's arithmetic from 16,384
elements up, or over 5 us slower below.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F

import peft_ops
from bench.harness import BASELINE_AGAIN
from bench.matrix import environment
from peft_ops import reference
from peft_ops._library import native
from peft_ops._native_rule import native_wins

# kernel, dtype, shape: how many times as long PEFT's arithmetic is to take, at least
TARGETS = [
    ("ia3_scale", "bf16", "64x4096", 4.0),
    ("ia3_scale", "bf16", "512x4096", 2.5),
    ("ia3_glu silu", "bf16", "64x4096", 3.0),
    ("ia3_glu silu", "bf16", "512x4096", 3.0),
    ("prompt_concat, public", "bf16", "8x512 P20 E4096", 1.5),
    ("prompt_concat_packed, public", "bf16", "8x512 P20 E4096", 1.5),
    ("prompt_embed, public", "bf16", "8x512 P20 E4096", 1.5),
]
FLOOR, LARGE, LATE_US = 0.95, 1 << 14, 5.0  # ratio from so many elements up; below, microseconds
LIKE = "reference", "peft"  # peers that do the same work: F.embedding alone knows no prompts
SHAPES = [(1, 4096), (8, 4096), (64, 4096), (512, 4096), (2048, 768)]
PUBLIC = 8, 512, 20, 4096  # sequences, tokens, virtual tokens, features
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Shape(NamedTuple):
    """What a kernel is measured on: a table of the page, dtype, sizes as text, elements of its output."""

    group: str
    dtype: str
    sizes: str
    elements: int


class Case(NamedTuple):
    """A kernel on a shape: its own call under "native", those of its peers, and whether `auto` takes it there."""

    kernel: str
    shape: Shape
    calls: dict[str, Callable]
    auto: bool


def case(kernel: str, shape: Shape, calls: dict[str, Callable]) -> Case:
    op, *more = kernel.removesuffix(", public").split()
    return Case(kernel, shape, calls, native_wins(op, DTYPES[shape.dtype], fused=bool(more)))


def seconds(f: Callable, n: int) -> float:
    start = time.perf_counter()
    for _ in range(n):
        f()
    return (time.perf_counter() - start) / n


def abba(a: Callable, b: Callable, budget: float) -> tuple[float, float]:
    """Seconds of a and of b: each one's fastest tenth of the windows, which other processes disturbed least."""
    a(), b()
    n = max(1, int(1e-3 / max(seconds(a, 3), seconds(b, 3))))
    ours, theirs, end = [], [], time.perf_counter() + budget
    while time.perf_counter() < end or len(ours) < 20:
        for call, times in ((a, ours), (b, theirs), (b, theirs), (a, ours)):
            times.append(seconds(call, n))
    return tuple(sorted(times)[len(times) // 10] for times in (ours, theirs))


def scale_cases():
    for name, dtype in DTYPES.items():
        for M, N in SHAPES:
            x, dy = torch.randn(M, N).to(dtype), torch.randn(M, N).to(dtype)
            v, table = torch.randn(N), torch.randn(min(M, 4), N)  # fp32, as PEFT keeps its adapters
            ids = torch.arange(M) * len(table) // M
            yield from scale_shape(Shape("elementwise", name, f"{M}x{N}", M * N), x, dy, v, table, ids)


def scale_shape(shape: Shape, x, dy, v, table, ids):
    dtype = x.dtype
    forward, backward = native.ia3_scale, native.ia3_scale_backward
    same = {
        "native": lambda: forward(x, v[None], None, None),
        BASELINE_AGAIN: lambda: forward(x, v[None], None, None),
        "peft": lambda: (x * v).to(dtype),
        "reference": lambda: reference.act_scale(x, v[None], None),
    }
    yield case("ia3_scale", shape, same)
    gathered = {
        "native": lambda: forward(x, table, ids, None),
        "peft, gathered": lambda: (x * table[ids]).to(dtype),
        "reference": lambda: reference.act_scale(x, table, ids),
    }
    yield case("ia3_scale tasks", shape, gathered)
    for activation in ("relu", "silu", "gelu_tanh", "gelu"):
        act = reference.ACTIVATIONS[activation]
        fused = {
            "native": partial(forward, x, v[None], None, activation),
            "peft": lambda act=act: (act(x) * v).to(dtype),
            "reference": partial(reference.act_scale, x, v[None], None, activation),
        }
        yield case(f"ia3_scale {activation}", shape, fused)
    both = {
        "native": lambda: backward(dy, x, v[None], None, None, True, True),
        # what autograd runs for (x * v).to(dtype): products and sum in fp32
        "peft": lambda: ((dy.float() * v).to(dtype), (dy.float() * x).sum(0)),
        "reference": lambda: reference.act_scale_backward(dy, x, v[None], None, None, True, True),
    }
    yield case("ia3_scale_backward", shape, both)
    tasks = {
        "native": lambda: backward(dy, x, table, ids, "silu", True, True),
        "reference": lambda: reference.act_scale_backward(dy, x, table, ids, "silu", True, True),
    }
    yield case("ia3_scale_backward tasks silu", shape, tasks)


def glu_cases():
    for name, dtype in DTYPES.items():
        for M, N in SHAPES:
            gate, up, dh = (torch.randn(M, N).to(dtype) for _ in range(3))
            v, table = torch.randn(N), torch.randn(min(M, 4), N)
            ids = torch.arange(M) * len(table) // M
            yield from glu_shape(Shape("elementwise", name, f"{M}x{N}", M * N), gate, up, dh, v, table, ids)


def glu_shape(shape: Shape, gate, up, dh, v, table, ids):
    dtype, args = gate.dtype, (gate, up, v[None], None)
    for activation in ("silu", "gelu_tanh", "gelu", "relu", None):
        act = reference.ACTIVATIONS[activation]
        same = {
            "native": partial(native.ia3_glu, *args, activation),
            BASELINE_AGAIN: partial(native.ia3_glu, *args, activation),
            # the model's act(gate) * up in its dtype, then the scale of the down projection's input
            "peft": lambda act=act: ((act(gate) * up) * v).to(dtype),
            "reference": partial(reference.act_glu, *args, activation),
        }
        yield case(f"ia3_glu {activation}", shape, same)
        both = {
            "native": partial(native.ia3_glu_backward, dh, *args, activation, True, True),
            "peft": partial(peft_glu_backward, dh, gate, up, v, activation),
            "reference": partial(reference.act_glu_backward, dh, *args, activation, [True, True]),
        }
        yield case(f"ia3_glu_backward {activation}", shape, both)
    tasks = {
        "native": lambda: native.ia3_glu(gate, up, table, ids, "silu"),
        "peft, gathered": lambda: ((F.silu(gate) * up) * table[ids]).to(dtype),
        "reference": lambda: reference.act_glu(gate, up, table, ids, "silu"),
    }
    yield case("ia3_glu tasks silu", shape, tasks)
    both = {
        "native": lambda: native.ia3_glu_backward(dh, gate, up, table, ids, "silu", True, True),
        "reference": lambda: reference.act_glu_backward(dh, gate, up, table, ids, "silu", [True, True]),
    }
    yield case("ia3_glu_backward tasks silu", shape, both)


def peft_glu_backward(dh, gate, up, v, activation):
    """What autograd runs for ((act(gate) * up) * v).to(dtype): the scale's part in fp32, the rest in dtype."""
    dtype, a = gate.dtype, reference.ACTIVATIONS[activation](gate)
    d = dh.float()
    dl, dz = (d * (a * up)).sum(0), (d * v).to(dtype)
    dgate = dz * up if activation is None else reference.ACTIVATION_BACKWARD[activation](dz * up, gate)
    return dgate, dz * a, dl


def prompt_cases():
    for name, dtype in DTYPES.items():
        for B, S, P, E in (PUBLIC, (8, 128, 20, 768), (1, 32, 20, 768), (1, 1, 1, 768)):
            table, prompt, ids = torch.randn(8192, E).to(dtype), torch.randn(1, P, E), torch.randint(0, 8192, (B, S))
            dout = torch.randn(B, P + S, E).to(dtype)
            shape = Shape("prompts", name, f"{B}x{S} P{P} E{E}", B * (P + S) * E)
            yield from prompt_shape(shape, table, prompt, ids, dout)
        yield from public_shape(name, dtype, *PUBLIC)


def prompt_shape(shape: Shape, table, prompt, ids, dout):
    (B, S), P, E = ids.shape, prompt.shape[1], prompt.shape[2]
    layout, plain = torch.tensor([[0, 0, 0, P]] * B, dtype=torch.int32), (1.0, None, None, None, None)
    concat = {
        "native": lambda: native.prompt_concat(ids, table, prompt, layout, *plain),
        BASELINE_AGAIN: lambda: native.prompt_concat(ids, table, prompt, layout, *plain),
        "peft": lambda: torch.cat([prompt.to(table.dtype).repeat(B, 1, 1), F.embedding(ids, table)], 1),
        "reference": lambda: reference.concat_embeddings(ids, table, prompt, layout),
    }
    yield case("prompt_concat", shape, concat)
    backward = {
        "native": lambda: native.prompt_concat_backward(dout, layout, 1, P),
        "peft": lambda: dout[:, :P].float().sum(0, keepdim=True),
        "reference": lambda: reference.concat_backward(dout, layout, 1, P),
    }
    yield case("prompt_concat_backward", shape, backward)
    shape, virtual = shape._replace(elements=ids.numel() * E), ids.clone()
    virtual[:, : min(P, S)] = len(table) + torch.arange(min(P, S))
    rows = reference.embed_rows(virtual, len(table), None, None, 1, P)
    embed = {
        "native": lambda: native.prompt_embed(virtual, table, prompt, None, None, *plain),
        BASELINE_AGAIN: lambda: native.prompt_embed(virtual, table, prompt, None, None, *plain),
        "F.embedding": lambda: F.embedding(ids, table),
        "reference": lambda: reference.embed_tokens(virtual, table, prompt, rows),
    }
    yield case("prompt_embed", shape, embed)
    types, places = torch.zeros(B, S, dtype=torch.int64), torch.arange(S).repeat(B, 1)
    type_table, place_table = torch.randn(2, E).to(table.dtype), torch.randn(S, E).to(table.dtype)
    added = types, type_table, places, place_table
    bert = {
        "native": lambda: native.prompt_embed(virtual, table, prompt, None, None, 1.0, *added),
        "bert": lambda: F.embedding(ids, table) + F.embedding(types, type_table) + F.embedding(places, place_table),
    }
    yield case("prompt_embed added", shape, bert)
    dout = dout[:, P:].contiguous()
    backward = {
        "native": lambda: native.prompt_embed_backward(dout, rows, 1, P),
        "reference": lambda: reference.embed_backward(dout, rows, 1, P),
    }
    yield case("prompt_embed_backward", shape, backward)


def public_shape(name: str, dtype: torch.dtype, B: int, S: int, P: int, E: int) -> Iterator[Case]:
    """The public operators on what a model hands over, checks and all, beside what PEFT runs or would have to."""
    V, shape = 8192, Shape("prompts", name, f"{B}x{S} P{P} E{E}", B * (P + S) * E)
    table, prompt, ids = torch.randn(V, E).to(dtype), torch.randn(1, P, E), torch.randint(0, V, (B, S))
    mask, starts = torch.ones(B, S, dtype=torch.int64), torch.arange(0, B * S + 1, S, dtype=torch.int32)
    virtual, flat = ids.clone(), ids.flatten()
    virtual[:, :P] = V + torch.arange(P)

    def concat() -> tuple:
        embeds = torch.cat([prompt.to(dtype).repeat(B, 1, 1), F.embedding(ids, table)], 1)
        return embeds, torch.cat([mask.new_ones(B, P), mask], 1)

    def packed() -> tuple:
        one, texts = prompt[0].to(dtype), F.embedding(flat, table).split(S)
        parts = chain.from_iterable((one, text) for text in texts)
        return torch.cat([*parts]), starts + P * torch.arange(B + 1, dtype=torch.int32)

    def embed() -> torch.Tensor:
        tokens = F.embedding(virtual.clamp(max=V - 1), table)
        prompts = prompt[0].to(dtype)[(virtual - V).clamp(min=0)]
        return torch.where((virtual >= V)[..., None], prompts, tokens)

    p = peft_ops
    calls = {"native": lambda: p.prompt_concat(ids, table, prompt, attention_mask=mask), "peft": concat}
    yield case("prompt_concat, public", shape, calls)
    calls = {"native": lambda: p.prompt_concat_packed(flat, starts, table, prompt, max_seqlen=S), "peft": packed}
    yield case("prompt_concat_packed, public", shape, calls)
    shape = shape._replace(elements=B * S * E)
    calls = {"native": lambda: p.prompt_embed(virtual, table, prompt), "peft": embed}
    yield case("prompt_embed, public", shape, calls)


def measured(case: Case, budget: float) -> dict:
    """What a case says in the file; a ratio is the peer's time / the native time, taken together."""
    calls, us, ratio = dict(case.calls), {}, {}
    own = []
    for peer, call in calls.items():
        if peer != "native":
            ours, theirs = abba(calls["native"], call, budget)
            own.append(ours * 1e6)
            us[peer], ratio[peer] = round(theirs * 1e6, 2), round(theirs / ours, 4)
    shape = case.shape
    place = {"group": shape.group, "kernel": case.kernel, "dtype": shape.dtype, "shape": shape.sizes}
    us = {"native": round(median(own), 2)} | us
    return place | {"elements": shape.elements, "auto": case.auto, "us": us, "ratio": ratio}


def verdict(cases: list[dict]) -> list[str]:
    """Where `auto` runs a native kernel that is behind a peer that does the same work."""
    late = []
    for one in cases:
        for peer, ratio in one["ratio"].items():
            if not one["auto"] or not peer.startswith(LIKE):
                continue
            more = one["us"][peer] * (1 / ratio - 1)  # from the ratio: both of its times were taken together
            if ratio < FLOOR if one["elements"] >= LARGE else more > LATE_US:
                late.append(f"{one['kernel']} {one['dtype']} {one['shape']}: {ratio:.2f} of {peer}, {more:+.1f} us")
    return late


def missed(cases: list[dict]) -> list[str]:
    late = []
    for one in cases:
        name = one["kernel"], one["dtype"], one["shape"]
        for *target, aim in TARGETS:
            if tuple(target) == name and one["ratio"]["peft"] < aim:
                late.append(f"{' '.join(name)}: {one['ratio']['peft']:.2f}, the target is {aim:g}")
    return late


def cases() -> Iterator[Case]:
    return chain(scale_cases(), glu_cases(), prompt_cases())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--budget", type=float, default=0.3, help="seconds per pair")
    parser.add_argument("--json", help="also write the result here")
    parser.add_argument("--strict", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, {torch.backends.cpu.get_cpu_capability()}")
    print(f"{'case':50} {'native us':>10}   peer us (ratio)")
    found, begin = [], time.perf_counter()
    for one in cases():
        name = f"{one.kernel} {one.shape.dtype} {one.shape.sizes}"
        if args.only not in name:
            continue
        found.append(row := measured(one, args.budget))
        peers = [f"{peer} {row['us'][peer]:.1f} ({ratio:.2f})" for peer, ratio in row["ratio"].items()]
        plain = "" if one.auto else "   auto: plain PyTorch"
        print(f"{name:50} {row['us']['native']:10.1f}   {', '.join(peers)}{plain}", flush=True)
    late = verdict(found)
    for title, lines in (("behind", late), ("below its target", missed(found))):
        print(f"{title}: {len(lines)}", *lines, sep="\n  ")
    if args.json:
        again = [row["ratio"][BASELINE_AGAIN] for row in found if BASELINE_AGAIN in row["ratio"]] or [1.0]
        malloc = {name: value for name, value in os.environ.items() if name.startswith(("MALLOC_", "LD_PRELOAD"))}
        place = environment() | {"malloc": malloc, "budget": args.budget}
        place["suite_seconds"] = round(time.perf_counter() - begin)
        with open(args.json, "w") as f:
            json.dump(place | {BASELINE_AGAIN: [min(again), max(again)], "cases": found}, f, indent=1)
            f.write("\n")
    sys.exit(args.strict and bool(late))


if __name__ == "__main__":
    main()
