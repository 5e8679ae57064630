"""Native CPU kernels against plain PyTorch, ABBA-interleaved: `python bench/native_cpu.py --threads 1`.

A ratio is the peer's time / the native time, each the tenth percentile of windows of 1 ms; the A/A column says what a
ratio may be by chance. `peft` is PEFT's arithmetic. peft_ops/_native_rule.py is read off this table.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import chain

import torch
import torch.nn.functional as F

from peft_ops import reference
from peft_ops._library import native

SHAPES = [(1, 4096), (8, 4096), (64, 4096), (512, 4096), (2048, 768)]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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
            yield from scale_shape(f"{name} {M}x{N}", x, dy, v, table, ids)


def scale_shape(case: str, x, dy, v, table, ids):
    dtype = x.dtype
    forward, backward = native.ia3_scale, native.ia3_scale_backward
    same = {
        "native": lambda: forward(x, v[None], None, None),
        "A/A": lambda: forward(x, v[None], None, None),
        "peft": lambda: (x * v).to(dtype),
        "reference": lambda: reference.act_scale(x, v[None], None),
    }
    yield f"ia3_scale {case}", same
    gathered = {
        "native": lambda: forward(x, table, ids, None),
        "peft, gathered": lambda: (x * table[ids]).to(dtype),
        "reference": lambda: reference.act_scale(x, table, ids),
    }
    yield f"ia3_scale tasks {case}", gathered
    for activation in ("relu", "silu", "gelu_tanh", "gelu"):
        act = reference.ACTIVATIONS[activation]
        fused = {
            "native": partial(forward, x, v[None], None, activation),
            "peft": lambda act=act: (act(x) * v).to(dtype),
            "reference": partial(reference.act_scale, x, v[None], None, activation),
        }
        yield f"ia3_scale {activation} {case}", fused
    both = {
        "native": lambda: backward(dy, x, v[None], None, None, True, True),
        # what autograd runs for (x * v).to(dtype): products and sum in fp32
        "peft": lambda: ((dy.float() * v).to(dtype), (dy.float() * x).sum(0)),
        "reference": lambda: reference.act_scale_backward(dy, x, v[None], None, None, True, True),
    }
    yield f"ia3_scale_backward {case}", both
    tasks = {
        "native": lambda: backward(dy, x, table, ids, "silu", True, True),
        "reference": lambda: reference.act_scale_backward(dy, x, table, ids, "silu", True, True),
    }
    yield f"ia3_scale_backward tasks silu {case}", tasks


def glu_cases():
    for name, dtype in DTYPES.items():
        for M, N in SHAPES:
            gate, up, dh = (torch.randn(M, N).to(dtype) for _ in range(3))
            v, table = torch.randn(N), torch.randn(min(M, 4), N)
            ids = torch.arange(M) * len(table) // M
            yield from glu_shape(f"{name} {M}x{N}", gate, up, dh, v, table, ids)


def glu_shape(case: str, gate, up, dh, v, table, ids):
    dtype, args = gate.dtype, (gate, up, v[None], None)
    for activation in ("silu", "gelu_tanh", "gelu", "relu", None):
        act = reference.ACTIVATIONS[activation]
        same = {
            "native": partial(native.ia3_glu, *args, activation),
            "A/A": partial(native.ia3_glu, *args, activation),
            # the model's act(gate) * up in its dtype, then the scale of the down projection's input
            "peft": lambda act=act: ((act(gate) * up) * v).to(dtype),
            "reference": partial(reference.act_glu, *args, activation),
        }
        yield f"ia3_glu {activation} {case}", same
        both = {
            "native": partial(native.ia3_glu_backward, dh, *args, activation, True, True),
            "peft": partial(peft_glu_backward, dh, gate, up, v, activation),
            "reference": partial(reference.act_glu_backward, dh, *args, activation, [True, True]),
        }
        yield f"ia3_glu_backward {activation} {case}", both
    tasks = {
        "native": lambda: native.ia3_glu(gate, up, table, ids, "silu"),
        "peft, gathered": lambda: ((F.silu(gate) * up) * table[ids]).to(dtype),
        "reference": lambda: reference.act_glu(gate, up, table, ids, "silu"),
    }
    yield f"ia3_glu tasks silu {case}", tasks
    both = {
        "native": lambda: native.ia3_glu_backward(dh, gate, up, table, ids, "silu", True, True),
        "reference": lambda: reference.act_glu_backward(dh, gate, up, table, ids, "silu", [True, True]),
    }
    yield f"ia3_glu_backward tasks silu {case}", both


def peft_glu_backward(dh, gate, up, v, activation):
    """What autograd runs for ((act(gate) * up) * v).to(dtype): the scale's part in fp32, the rest in dtype."""
    dtype, a = gate.dtype, reference.ACTIVATIONS[activation](gate)
    d = dh.float()
    dl, dz = (d * (a * up)).sum(0), (d * v).to(dtype)
    dgate = dz * up if activation is None else reference.ACTIVATION_BACKWARD[activation](dz * up, gate)
    return dgate, dz * a, dl


def prompt_cases():
    for name, dtype in DTYPES.items():
        for B, S, P, E in ((8, 512, 20, 4096), (8, 128, 20, 768), (1, 32, 20, 768), (1, 1, 1, 768)):
            table, prompt, ids = torch.randn(8192, E).to(dtype), torch.randn(1, P, E), torch.randint(0, 8192, (B, S))
            dout = torch.randn(B, P + S, E).to(dtype)
            yield from prompt_shape(f"{name} {B}x{S} P{P} E{E}", table, prompt, ids, dout)


def prompt_shape(case: str, table, prompt, ids, dout):
    (B, S), P, E = ids.shape, prompt.shape[1], prompt.shape[2]
    layout, plain = torch.tensor([[0, 0, 0, P]] * B, dtype=torch.int32), (1.0, None, None, None, None)
    concat = {
        "native": lambda: native.prompt_concat(ids, table, prompt, layout, *plain),
        "A/A": lambda: native.prompt_concat(ids, table, prompt, layout, *plain),
        "peft": lambda: torch.cat([prompt.to(table.dtype).repeat(B, 1, 1), F.embedding(ids, table)], 1),
        "reference": lambda: reference.concat_embeddings(ids, table, prompt, layout),
    }
    yield f"prompt_concat {case}", concat
    backward = {
        "native": lambda: native.prompt_concat_backward(dout, layout, 1, P),
        "peft": lambda: dout[:, :P].float().sum(0, keepdim=True),
        "reference": lambda: reference.concat_backward(dout, layout, 1, P),
    }
    yield f"prompt_concat_backward {case}", backward
    virtual = ids.clone()
    virtual[:, : min(P, S)] = len(table) + torch.arange(min(P, S))
    rows = reference.embed_rows(virtual, len(table), None, None, 1, P)
    embed = {
        "native": lambda: native.prompt_embed(virtual, table, prompt, None, None, *plain),
        "A/A": lambda: native.prompt_embed(virtual, table, prompt, None, None, *plain),
        "F.embedding": lambda: F.embedding(ids, table),
        "reference": lambda: reference.embed_tokens(virtual, table, prompt, rows),
    }
    yield f"prompt_embed {case}", embed
    types, places = torch.zeros(B, S, dtype=torch.int64), torch.arange(S).repeat(B, 1)
    type_table, place_table = torch.randn(2, E).to(table.dtype), torch.randn(S, E).to(table.dtype)
    added = types, type_table, places, place_table
    bert = {
        "native": lambda: native.prompt_embed(virtual, table, prompt, None, None, 1.0, *added),
        "bert": lambda: F.embedding(ids, table) + F.embedding(types, type_table) + F.embedding(places, place_table),
    }
    yield f"prompt_embed added {case}", bert
    dout = dout[:, P:].contiguous()
    backward = {
        "native": lambda: native.prompt_embed_backward(dout, rows, 1, P),
        "reference": lambda: reference.embed_backward(dout, rows, 1, P),
    }
    yield f"prompt_embed_backward {case}", backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--budget", type=float, default=0.3, help="seconds per pair")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, {torch.backends.cpu.get_cpu_capability()}")
    print(f"{'case':50} {'native us':>10}   peer us (ratio)")
    for case, calls in chain(scale_cases(), glu_cases(), prompt_cases()):
        if args.only not in case:
            continue
        a, row = calls.pop("native"), []
        for peer, b in calls.items():
            ours, theirs = abba(a, b, args.budget)
            row.append(f"{peer} {theirs * 1e6:.1f} ({theirs / ours:.2f})")
        print(f"{case:50} {ours * 1e6:10.1f}   {', '.join(row)}", flush=True)


if __name__ == "__main__":
    main()
