"""The operators beside their peers on layers of real models: ratios to the bare layer, one JSON line each.

    python -m bench.matrix out.jsonl                # layers and row counts of bench/shapes.py, most telling first
    python -m bench.matrix out.jsonl --budget 500   # stop after 500 s; the same command goes on where it stopped
    python -m bench.matrix out.jsonl --quick        # small layers, a few milliseconds each: walks the whole path

Peers: `bare` the layer without adapters (of `scale`, a copy; of prompts, the text's embedding alone), `eager` PEFT's
arithmetic with each row's vector gathered, `peft` PEFT's module with one adapter, `ft_style` vendor GEMM and one fused
elementwise pass, `native` that, or ours if it is one pass, with the CUDA C++ kernel, `peft_ops` ours, `compile`
torch.compile of eager (--compile: minutes per shape). Where a peer would be another under a second name, or has no
module for the layer, it is left out. Training is forward and backward. Correctness, gradients too, is checked against
fp64 before anything is timed.

What failed, was wrong, or took the process with it comes last in the next run, and twice at most: OUT's .journal.

On a GPU `us` and `ratio` are kernel time, a graph replayed over rotating buffers, and `wall_us` and `wall_ratio` what
a caller waits for, launches and synchronisation included. `hot`: the buffers are too small to fill the L2 cache
thrice, so that some reads come from there. `saved`: bytes that a forward keeps for its backward.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import peft_ops
from bench.harness import Journal, Ratio, compare, copies_for, is_hot, wall_timer
from bench.shapes import CASES, CPU_CASES, QUICK_CASES, Case
from bench.training import saved_bytes
from bench.tune import ELEMENTWISE, PROMPTS, Inputs, apply, is_right
from peft_ops import reference
from peft_ops._library import has_native
from peft_ops.ops.ia3_glu import glu_forward
from peft_ops.ops.ia3_scale import scale_forward

PEERS = ("bare", "peft_ops", "ft_style", "native", "eager", "peft", "compile")


NVIDIA_SMI = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"


def environment() -> dict:
    """What a row must say to be compared: machine, versions, commit ($COMMIT where there is no git); of a GPU, driver,
    clocks, power and temperature as found."""
    cuda = torch.cuda.is_available()
    commit = _said(["git", "rev-parse", "--short", "HEAD"]) or os.environ.get("COMMIT", "")
    versions = {name: metadata.version(name) for name in ("torch", "triton", "peft") if _installed(name)}
    device = torch.cuda.get_device_name() if cuda else _cpu()
    python, kind = platform.python_version(), "gpu" if cuda else "cpu"
    found = versions | {
        "kind": kind,
        "device": device,
        "threads": torch.get_num_threads(),
        "python": python,
        "commit": commit,
    }
    return found | ({"nvidia-smi": as_found()} if cuda else {})


def as_found() -> dict[str, str]:
    """The state of the first GPU that is visible; nothing is set."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"
    said = _said(["nvidia-smi", f"--query-gpu={NVIDIA_SMI}", "--format=csv,noheader", "-i", first])
    values = [value.strip() for value in said.split(",")]
    return dict(zip(NVIDIA_SMI.split(","), values, strict=True)) if len(values) > 1 else {}


def _said(command: list[str]) -> str:
    """What a program prints; nothing where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.machine()])[0]}, {torch.backends.cpu.get_cpu_capability()}"


def roofs(device: torch.device) -> dict[str, float]:
    """What a large matmul and a large copy reach here: operations and bytes per second."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    source = torch.empty(1 << (30 if device.type == "cuda" else 27), dtype=torch.int8, device=device)
    target = torch.empty_like(source)

    def fastest(call: Callable[[int], object]) -> float:
        run = wall_timer(call, 1, device)
        return min(run() for _ in range(7))

    matmul, copy = fastest(lambda i: a @ b), fastest(lambda i: target.copy_(source))
    return {"flops": 2 * size**3 / matmul, "bytes": 2 * source.numel() / copy}


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def bare(inputs: Inputs) -> tuple:
    layer, x = inputs.layer, inputs.x
    act = reference.ACTIVATIONS[layer.activation]
    if layer.op in PROMPTS:
        tokens = F.embedding(x.clamp(max=layer.K - 1), inputs.weights[0])
        return (added(tokens, inputs) if layer.op == "added" else tokens,)
    if layer.op == "scale":
        return (x.clone(),)
    zs = inputs.xs if layer.op == "gate" else tuple(F.linear(x, w) for w in inputs.weights)
    if layer.op in ("glu", "gate"):
        return (act(zs[0]) * zs[1],)
    return tuple(act(z) for z in zs) if layer.op == "linear" else tuple(zs)


def eager(inputs: Inputs) -> tuple:
    layer, x, ids = inputs.layer, inputs.x, inputs.ids
    if layer.op in PROMPTS:
        return eager_prompts(inputs)
    scales = [torch.where(ids[:, None] < 0, 1.0, t[ids.clamp(min=0)])[:, None] for t in inputs.tables]
    if layer.op == "feedforward":
        return (F.linear((x * scales[0]).to(x.dtype), inputs.weights[0]),)
    outs = (x,) if layer.op == "scale" else bare(inputs)
    return tuple((y * s).to(y.dtype) for y, s in zip(outs, scales, strict=True))


def added(tokens: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Positions and token types, all 0, as a model's embedding layer adds them."""
    _, positions, types = inputs.weights
    return tokens + types[0] + positions[: tokens.shape[1]]


def eager_prompts(inputs: Inputs) -> tuple:
    """What PEFT runs with a prompt per row gathered: [h(P); e(X)] and its mask; of virtual ids, a gather per slot."""
    (B, S), V, weight = inputs.x.shape, inputs.layer.K, inputs.weights[0]
    op, prompts = inputs.layer.op, inputs.tables[0][inputs.ids].to(weight.dtype)
    tokens = F.embedding(inputs.x.clamp(max=V - 1), weight)
    if op == "packed":
        return (torch.cat([prompts, tokens], 1).flatten(0, 1),)
    if op == "embed":
        virtual = (inputs.x - V).clamp(min=0)[..., None].expand(-1, -1, tokens.shape[2])
        return (torch.where((inputs.x >= V)[..., None], prompts.gather(1, virtual), tokens),)
    mask = torch.ones(B, prompts.shape[1], dtype=torch.int64, device=tokens.device)
    embeds = torch.cat([prompts, tokens], 1)
    return added(embeds, inputs) if op == "added" else embeds, torch.cat([mask, mask.new_ones(B, S)], 1)


def ft_style(inputs: Inputs) -> tuple:
    layer, x, ids, tables, act = inputs.layer, inputs.x, inputs.ids, inputs.tables, inputs.layer.activation
    scale, glu = (torch.ops.peft_ops.ia3_scale, torch.ops.peft_ops.ia3_glu) if inputs.trains else (_scale, _glu)
    if layer.op == "feedforward":
        return (F.linear(scale(x, tables[0], ids, None), inputs.weights[0]),)
    zs = [F.linear(x, w) for w in inputs.weights]
    if layer.op == "glu":
        return (glu(*zs, tables[0], ids, act),)
    return tuple(scale(z, t, ids, act) for z, t in zip(zs, tables, strict=True))


def _scale(*args) -> torch.Tensor:
    return scale_forward("ft_style", *args)


def _glu(*args) -> torch.Tensor:
    return glu_forward("ft_style", *args)


def natively(call: Callable[[int], object]) -> Callable[[int], object]:
    """The call, and its backward, with the C++ kernels where there are any."""

    def run(i: int):
        with peft_ops.set_backend("native"):
            return call(i)

    run.forward = getattr(call, "forward", None)
    return run


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


def peers(sets: list[Inputs], with_compile: bool) -> dict[str, Callable[[int], object]]:
    """Each peer's call on the i-th set. The plan is made once, as the layers of a model share it."""
    layer, plans = sets[0].layer, []
    for inputs in sets:
        rows, tasks = inputs.x.shape[:-1].numel(), inputs.tables[0].shape[0]
        takes_plan = inputs.x.is_cuda and layer.op not in PROMPTS
        plans.append(peft_ops.plan_tasks(inputs.ids, rows, tasks) if takes_plan else inputs.ids)

    def ours(i: int):
        inputs, ids = sets[i], sets[i].ids
        inputs.ids = plans[i]
        try:
            return apply(peft_ops, inputs)
        finally:
            inputs.ids = ids

    calls = {"bare": lambda i: bare(sets[i]), "peft_ops": ours}
    if layer.op not in (*ELEMENTWISE, *PROMPTS):  # elsewhere ours is that one pass
        calls["ft_style"] = lambda i: ft_style(sets[i])
    calls["eager"] = lambda i: eager(sets[i])
    if layer.op in ("linear", "kv", "feedforward") and layer.activation is None and _installed("peft"):
        modules = peft_modules(sets)
        calls["peft"] = lambda i: [module(sets[i].x) for module in modules[i]]
    if with_compile:
        torch.compiler.reset()  # after 8 shapes it would run the function uncompiled, without a word
        mode = "max-autotune-no-cudagraphs" if sets[0].x.is_cuda else "default"
        compiled = torch.compile(eager, mode=mode, dynamic=False)
        calls["compile"] = lambda i: compiled(sets[i])
    one_pass = layer.op in ("scale", *PROMPTS)
    without = "glu", "gate", "embed", "packed", "added"  # no CUDA C++ kernel, nor for any backward
    if sets[0].x.is_cuda and has_native("cuda") and layer.op not in without and not sets[0].trains:
        calls["native"] = ours if one_pass else calls["ft_style"]
    calls = {name: trained(call, sets) if sets[0].trains else call for name, call in calls.items()}
    return {name: natively(call) if name == "native" else call for name, call in calls.items()}


def trained(forward: Callable[[int], object], sets: list[Inputs]) -> Callable[[int], None]:
    """Forward and backward, down to what comes in, where a gradient flows at all."""

    def run(i: int) -> None:
        for t in sets[i].leaves():
            t.grad = None
        ys = [y for y in forward(i) if y.requires_grad]
        if ys:  # a bare embedding is frozen
            torch.autograd.backward(ys, sets[i].dys)

    run.forward = forward
    return run


def cost(inputs: Inputs) -> tuple[int, int]:
    """Operations and bytes that the bare layer cannot do without: each tensor once; backward, both again."""
    _, op, N, K, _ = inputs.layer
    M, item = inputs.ids.numel() * inputs.x.shape[1], 2
    if op in PROMPTS:  # frozen: nothing is due backward
        return 0, inputs.nbytes() + item * M * N
    flops = M * N * (1 + (op == "gate")) if op in ELEMENTWISE else 2 * M * N * K * len(inputs.weights)
    nbytes = inputs.nbytes() + item * M * N * (2 if op == "kv" else 1)
    return (2 * flops, 2 * nbytes) if inputs.trains else (flops, nbytes)


class Measured:
    """One case: its buffers, its peers' calls, and whether ours is right. A group of the suite, a row of the matrix."""

    def __init__(self, case: Case, device: torch.device, with_compile: bool):
        trains = case.phase == "train"

        def make() -> Inputs:
            return Inputs(
                case.layer, case.rows, device, torch.bfloat16, tasks=case.tasks, sequence=case.sequence, trains=trains
            )

        first = make()
        copies = copies_for(first.nbytes(), device)
        self.is_hot = is_hot(first.nbytes(), device)
        self.case, self.device, self.sets = case, device, [first]
        while len(self.sets) < copies:
            self.sets.append(make())
            if case.layer.op in PROMPTS:  # other tokens read other rows: one embedding serves them all
                self.sets[-1].weights = first.weights
        with torch.set_grad_enabled(trains):
            self.right = is_right(first)
            self.calls = peers(self.sets, with_compile) if self.right else {}

    def ratios(self, seconds: float, wall: bool = False) -> dict[str, Ratio]:
        with torch.set_grad_enabled(self.case.phase == "train"):
            return compare(self.calls, "bare", len(self.sets), self.device, seconds, wall=wall)

    def saved(self) -> dict[str, int]:
        """Bytes that each peer's forward keeps for its backward, weights and tables left out."""
        known = [*self.sets[0].weights, *self.sets[0].tables]
        return {name: saved_bytes(lambda c=call: c.forward(0), known) for name, call in self.calls.items()}

    def facts(self) -> dict:
        """What a row says besides times."""
        case, (flops, nbytes) = self.case, cost(self.sets[0])
        found = {"layer": case.layer.name, "phase": case.phase, "rows": case.rows, "tasks": case.tasks}
        found |= {"flops": flops, "bytes": nbytes} | ({"hot": True} if self.is_hot else {})
        return found | {"saved": self.saved()} if case.phase == "train" else found


def rounded(ratios: dict[str, Ratio]) -> tuple[dict, dict]:
    us = {name: round(r.seconds * 1e6, 3) for name, r in ratios.items()}
    return us, {name: [round(v, 4) for v in (r.ratio, r.low, r.high)] for name, r in ratios.items()}


def row(case: Case, device: torch.device, seconds: float, with_compile: bool) -> dict:
    measured = Measured(case, device, with_compile)
    if not measured.right:
        return identity(case) | {"wrong": True}
    us, ratio = rounded(measured.ratios(seconds))
    found = measured.facts() | {"us": us, "ratio": ratio}
    if device.type == "cuda":
        found["wall_us"], found["wall_ratio"] = rounded(measured.ratios(seconds, wall=True))
    return found


def identity(case: Case) -> dict:
    return {"layer": case.layer.name, "phase": case.phase, "rows": case.rows, "tasks": case.tasks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="JSON lines; shapes that it already holds are left out")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds, after which no shape is begun")
    parser.add_argument("--seconds", type=float, default=0.4, help="time to spend on one shape")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--limit", type=float, default=None, help="seconds, after which one shape ends the process")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out, done = Path(args.out), []
    if out.exists():
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        done = [{key: r[key] for key in ("layer", "phase", "rows", "tasks")} for r in rows if "us" in r]
    torch.manual_seed(0)
    cases = QUICK_CASES if args.quick else CASES if device.type == "cuda" else CPU_CASES
    cases = {case.name: case for case in cases if args.match in case.name}
    seconds = 0.02 if args.quick else args.seconds
    place = cache(lambda: environment() | {"roofs": roofs(device)})  # seconds on a GPU: only if a case is left

    def add(found: dict) -> None:
        with out.open("a") as f:
            f.write(json.dumps(found | place()) + "\n")

    def measure(case: Case) -> bool:
        place()
        found = row(case, device, seconds, args.compile)
        add(found)
        ratios = {name: values[0] for name, values in found.get("ratio", {}).items() if name != "bare"}
        print(f"{case.name:44} {found.get('us', {}).get('bare', 0):10.1f} us bare  {ratios or 'WRONG'}", flush=True)
        return "us" in found

    pieces = ((name, lambda case=case: measure(case)) for name, case in cases.items())
    measured = [name for name, case in cases.items() if identity(case) in done]
    journal, bad = Journal(out.with_suffix(".journal")), 0
    for name, state in journal.work(pieces, device, budget=args.budget, limit=args.limit, done=measured):
        bad += state != "right"
        if state == "failed":
            add(identity(cases[name]) | {"failed": True})
            print(f"{name:44} FAILED", flush=True)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
