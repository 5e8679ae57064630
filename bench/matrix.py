"""The (IA)^3 operators beside their peers on layers of real models: ratios to the bare layer, one JSON line each.

    python -m bench.matrix out.jsonl                # layers and row counts of bench/shapes.py, most telling first
    python -m bench.matrix out.jsonl --budget 500   # stop after 500 s; the same command goes on where it stopped
    python -m bench.matrix out.jsonl --quick        # small layers, a few milliseconds each: walks the whole path

Peers: `bare` the layer without adapters, `eager` PEFT's arithmetic with each row's vector gathered, `peft` PEFT's
module with one adapter, `ft_style` vendor GEMM and one fused elementwise pass, `native` the same with the C++ kernel,
`peft_ops` ours, `compile` torch.compile of eager (--compile: minutes per shape). Correctness is checked against fp64
before anything is timed.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata

import torch
import torch.nn.functional as F
from torch import nn

import peft_ops
from bench.harness import compare, copies_for
from bench.shapes import LAYERS, Layer
from bench.tune import Inputs, apply, is_right
from peft_ops import reference
from peft_ops._library import has_native
from peft_ops.ops.ia3_glu import glu_forward
from peft_ops.ops.ia3_scale import scale_forward

ORDER = (16, 8192, 1, 64, 1024, 4, 32, 4096, 256, 8)  # row counts, most telling first
QUICK = [Layer("tiny", op, 64, 128, "silu" if op == "glu" else None) for op in ("kv", "glu", "linear", "feedforward")]


def environment() -> dict:
    """What a row must say to be compared: machine, versions, commit."""
    cuda = torch.cuda.is_available()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = {name: metadata.version(name) for name in ("torch", "triton", "peft") if _installed(name)}
    device = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    return versions | {"device": device, "python": platform.python_version(), "commit": commit}


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def bare(inputs: Inputs) -> tuple:
    layer, x = inputs.layer, inputs.x
    zs = tuple(F.linear(x, w) for w in inputs.weights)
    act = reference.ACTIVATIONS[layer.activation]
    if layer.op == "glu":
        return (act(zs[0]) * zs[1],)
    return tuple(act(z) for z in zs) if layer.op == "linear" else zs


def eager(inputs: Inputs) -> tuple:
    layer, x, ids = inputs.layer, inputs.x, inputs.ids
    scales = [torch.where(ids[:, None] < 0, 1.0, t[ids.clamp(min=0)])[:, None] for t in inputs.tables]
    if layer.op == "feedforward":
        return (F.linear((x * scales[0]).to(x.dtype), inputs.weights[0]),)
    outs = bare(inputs)
    return tuple((y * s).to(y.dtype) for y, s in zip(outs, scales, strict=True))


def ft_style(inputs: Inputs) -> tuple:
    layer, x, ids, tables = inputs.layer, inputs.x, inputs.ids, inputs.tables
    if layer.op == "feedforward":
        return (F.linear(scale_forward("ft_style", x, tables[0], ids), inputs.weights[0]),)
    zs = [F.linear(x, w) for w in inputs.weights]
    if layer.op == "glu":
        return (glu_forward("ft_style", *zs, tables[0], ids, layer.activation),)
    return tuple(scale_forward("ft_style", z, t, ids, layer.activation) for z, t in zip(zs, tables, strict=True))


def native(inputs: Inputs) -> tuple:
    with peft_ops.set_backend("native"):
        return ft_style(inputs)


def peft_modules(sets: list[Inputs]) -> list[list[nn.Module]]:
    """PEFT's layers on each set's weights, one adapter active: it cannot mix."""
    import peft

    found = []
    for inputs in sets:
        config = peft.IA3Config(
            target_modules=["0"], feedforward_modules=["0"] if inputs.layer.op == "feedforward" else []
        )
        modules = []
        for weight in inputs.weights:
            base = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
            base.weight = nn.Parameter(weight, requires_grad=False)
            modules.append(peft.get_peft_model(nn.Sequential(base), config).base_model.model[0].to(weight.device))
        found.append(modules)
    return found


def peers(layer: Layer, sets: list[Inputs], with_compile: bool) -> dict[str, Callable[[int], object]]:
    """Each peer's call on the i-th set. The plan is made once, as the layers of a model share it."""
    plans = []
    for inputs in sets:
        rows, tasks = inputs.x.shape[:-1].numel(), inputs.tables[0].shape[0]
        plans.append(peft_ops.plan_tasks(inputs.ids, rows, tasks) if inputs.x.is_cuda else inputs.ids)

    def ours(i: int):
        inputs, ids = sets[i], sets[i].ids
        inputs.ids = plans[i]
        try:
            return apply(peft_ops, inputs)
        finally:
            inputs.ids = ids

    calls = {
        "bare": lambda i: bare(sets[i]),
        "peft_ops": ours,
        "ft_style": lambda i: ft_style(sets[i]),
        "eager": lambda i: eager(sets[i]),
    }
    if layer.op != "glu" and has_native(sets[0].x.device.type):
        calls["native"] = lambda i: native(sets[i])
    if layer.op != "glu" and layer.activation is None and _installed("peft"):
        modules = peft_modules(sets)
        calls["peft"] = lambda i: [module(sets[i].x) for module in modules[i]]
    if with_compile:
        compiled = torch.compile(eager, mode="max-autotune-no-cudagraphs")
        calls["compile"] = lambda i: compiled(sets[i])
    return calls


def row(layer: Layer, M: int, device: torch.device, seconds: float, with_compile: bool) -> dict:
    first = Inputs(layer, M, device, torch.bfloat16)
    copies = copies_for(first.nbytes(), device)
    sets = [first, *(Inputs(layer, M, device, torch.bfloat16) for _ in range(copies - 1))]
    with torch.no_grad():
        if not is_right(first):
            return {"wrong": True}
        found = compare(peers(layer, sets, with_compile), "bare", copies, device, seconds)
    flops = 2 * M * layer.N * layer.K * len(first.weights)
    nbytes = first.nbytes() + 2 * M * layer.N * (2 if layer.op == "kv" else 1)
    return {
        "us": {name: round(r.seconds * 1e6, 3) for name, r in found.items()},
        "ratio": {name: [round(v, 4) for v in (r.ratio, r.low, r.high)] for name, r in found.items()},
        "flops": flops,
        "bytes": nbytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="JSON lines; shapes that it already holds are left out")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds, after which no shape is begun")
    parser.add_argument("--seconds", type=float, default=0.4, help="time to spend on one shape")
    parser.add_argument("--match", default="", help="only layers whose name contains this")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    done = set()
    if os.path.exists(args.out):
        with open(args.out) as f:
            done = {(r["layer"], r["rows"]) for r in map(json.loads, f)}
    torch.manual_seed(0)
    layers = QUICK if args.quick else LAYERS
    work = [(layer, M) for M in ((16, 1024) if args.quick else ORDER) for layer in layers if args.match in layer.name]
    end, where, wrong = time.monotonic() + args.budget, environment(), 0
    for layer, M in work:
        if (layer.name, M) in done or time.monotonic() > end:
            continue
        found = {"layer": layer.name, "rows": M} | row(
            layer, M, device, 0.02 if args.quick else args.seconds, args.compile
        )
        wrong += found.get("wrong", False)
        with open(args.out, "a") as f:
            f.write(json.dumps(found | where) + "\n")
        ratios = {name: values[0] for name, values in found.get("ratio", {}).items() if name != "bare"}
        print(
            f"{layer.name:24} {M:6} {found.get('us', {}).get('bare', 0):10.1f} us bare  {ratios or 'WRONG'}", flush=True
        )
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
