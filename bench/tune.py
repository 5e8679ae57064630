"""Measure the candidates of kernels/tiles.py on this GPU and print the lines to paste into its table TUNED.

    python -m bench.tune                         # every layer and row count of bench/shapes.py
    python -m bench.tune --match kv --rows 1 16  # some of them
    python -m bench.tune --json FILE --budget 500  # kept as they come; the same command goes on where it stopped
    python -m bench.tune --dry-run               # without a GPU: what would be measured, and what to expect

A candidate is checked against fp64 before it is timed. A line is printed only where one beats what runs now by more
than the noise floor: another tile, or "vendor", the vendor's matmul and one elementwise pass.
"""

import argparse
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

import peft_ops
from bench import model, offline
from bench.harness import BASELINE_AGAIN, Journal, Pieces, Ratio, compare, copies_for, is_lost
from bench.shapes import LAYERS, ORDER, VIRTUAL_TOKENS, Layer
from peft_ops import reference
from peft_ops.kernels import tiles
from peft_ops.ops import ia3_glu, ia3_kv_linear, ia3_linear, ia3_scale, task_plan
from peft_ops.ops.ia3_linear import capability_of

TASKS, SEQUENCE = 8, 512  # prefill and training rows come in sequences of one task, decode rows one by one
ELEMENTWISE, PROMPTS = ("scale", "gate"), ("concat", "added", "embed", "packed")
NOW = "runs now"


class Inputs:
    """One set of buffers of a layer: random, at the scale of activations and of trained vectors.

    xs: what comes in, [sequences, tokens, features]: x, gate and up of an elementwise gate, or token ids.
    weights: frozen; of prompts, the embedding, and of "added", positions and token types. tables: trained, one row per
    task.
    trains: the gradients of xs and tables belong to it, at the outputs' gradients dys.
    """

    def __init__(
        self, layer: Layer, M: int, device: torch.device, dtype: torch.dtype, *, tasks: int = TASKS,
        sequence: int = SEQUENCE, trains: bool = False,
    ):  # fmt: skip
        self.layer, self.trains = layer, trains
        _, op, N, K, _ = layer
        sequences = M // sequence if M % sequence == 0 else M
        tokens = M // sequences

        def rows(features: int) -> Tensor:
            return torch.randn(sequences, tokens, features, device=device).to(dtype)

        self.ids = torch.randint(0 if op in PROMPTS else -1, tasks, (sequences,), device=device)
        if op in PROMPTS:
            self.xs = [torch.randint(0, K, (sequences, tokens), device=device)]
            if op == "embed":
                self.xs[0][:, :VIRTUAL_TOKENS] = K + torch.arange(VIRTUAL_TOKENS, device=device)[:tokens]
            counts = (K, VIRTUAL_TOKENS + tokens, 2) if op == "added" else (K,)
            self.weights = [torch.randn(count, N, device=device).to(dtype) for count in counts]
            self.tables = [torch.randn(tasks, VIRTUAL_TOKENS, N, device=device)]
        else:
            self.xs = [rows(N if op in ELEMENTWISE else K) for _ in range(1 + (op == "gate"))]
            count = 0 if op in ELEMENTWISE else 1 + (op in ("kv", "glu"))
            self.weights = [(torch.randn(N, K, device=device) * K**-0.5).to(dtype) for _ in range(count)]
            width = K if op == "feedforward" else N
            self.tables = [torch.rand(tasks, width, device=device) + 0.5 for _ in range(1 + (op == "kv"))]
        for t in self.leaves():
            t.requires_grad_(trains)
        with torch.no_grad():
            self.dys = [torch.randn_like(y) for y in apply(reference, self)] if trains else []

    @property
    def x(self) -> Tensor:
        return self.xs[0]

    @x.setter
    def x(self, x: Tensor) -> None:
        self.xs = [x, *self.xs[1:]]

    def leaves(self) -> list[Tensor]:
        return [t for t in (*self.xs, *self.tables) if t.is_floating_point()]

    def nbytes(self) -> int:
        """What a call reads: all of xs and weights, but of an embedding the rows of its tokens."""
        if self.layer.op in PROMPTS:
            rows = self.x.numel() + sum(len(table) for table in self.weights[1:])
            return 8 * self.x.numel() + rows * self.layer.N * self.weights[0].element_size()
        return sum(t.numel() * t.element_size() for t in (*self.xs, *self.weights))

    def double(self) -> "Inputs":
        def wide(tensors: list[Tensor]) -> list[Tensor]:
            return [
                t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in tensors
            ]

        other = object.__new__(Inputs)
        other.__dict__ |= self.__dict__
        other.xs, other.weights, other.tables = wide(self.xs), wide(self.weights), wide(self.tables)
        other.dys = wide(self.dys)
        return other


def apply(ops: ModuleType, inputs: Inputs) -> tuple[Tensor, ...]:
    """The layer by the public operators, or with ops=reference by their specification."""
    op, activation = inputs.layer.op, inputs.layer.activation
    x, ids, weights, tables = inputs.x, inputs.ids, inputs.weights, inputs.tables
    if op == "scale":
        return (ops.ia3_scale(x, tables[0], ids),)
    if op == "gate":
        return (ops.ia3_glu(*inputs.xs, tables[0], ids, activation),)
    if op == "concat":
        return (ops.prompt_concat(x, *weights, *tables, ids).inputs_embeds,)
    if op == "added":
        embedding, positions, types = weights
        more = dict(position_embedding=positions, token_type_embedding=types)
        return (ops.prompt_concat(x, embedding, *tables, ids, **more).inputs_embeds,)
    if op == "packed":  # sequences of one length; tests have all others
        B, S = x.shape
        starts = torch.arange(0, B * S + 1, S, dtype=torch.int32, device=x.device)
        return (ops.prompt_concat_packed(x.flatten(), starts, *weights, *tables, ids, max_seqlen=S).inputs_embeds,)
    if op == "embed":
        return (ops.prompt_embed(x, *weights, *tables, ids),)
    if op == "kv":
        return ops.ia3_kv_linear(x, *weights, k_ia3_l=tables[0], v_ia3_l=tables[1], task_ids=ids)
    if op == "glu":
        return (ops.ia3_glu_linear(x, *weights, ia3_l=tables[0], task_ids=ids, activation=activation),)
    keywords = dict(is_feedforward=True) if op == "feedforward" else dict(activation=activation)
    return (ops.ia3_linear(x, *weights, ia3_l=tables[0], task_ids=ids, **keywords),)


def results(ops: ModuleType, inputs: Inputs) -> tuple[Tensor, ...]:
    """The outputs, and the gradients of what trains."""
    ys = apply(ops, inputs)
    return (*ys, *torch.autograd.grad(ys, inputs.leaves(), inputs.dys)) if inputs.trains else ys


def is_right(inputs: Inputs) -> bool:
    """Whether the operator is as close to fp64 as torch's arithmetic in the same dtype: twice its largest error, plus
    the rounding of the largest value to the layer's dtype (tests hold fp32 gradients of tables to fp32's)."""
    eps = torch.finfo((inputs.weights or inputs.xs)[0].dtype).eps
    for ours, torchs, exact in zip(
        results(peft_ops, inputs), results(reference, inputs), results(reference, inputs.double()), strict=True
    ):
        unit = eps * exact.abs().max()
        if not (ours - exact).abs().max() <= 2 * (torchs - exact).abs().max() + unit:  # NaN is wrong too
            return False
    return True


def vendor_key(layer: Layer, M: int, capability: int) -> tuple:
    name = "vendor feedforward" if layer.op == "feedforward" else "vendor"
    width = layer.N * (2 if layer.op == "kv" else 1)
    return name, capability, tiles.bucket(M), width, layer.K, *(["gated"] if layer.op == "glu" else [])


def is_vendors(layer: Layer, M: int, capability: int) -> bool:
    """Whether an untuned table sends the layer to the vendor's matmul."""
    _, _, _, width, K, *gated = vendor_key(layer, M, capability)
    with offline.tuned({}):
        if layer.op == "feedforward":
            return not tiles.feedforward_is_fused(M, width, K, capability)
        return not tiles.linear_is_fused(M, width, K, capability, bool(gated))


def candidates(inputs: Inputs, M: int, capability: int) -> dict[str, dict]:
    """Entries of TUNED to try, by name: each tile of each table that the call asks, and the vendor's matmul.

    The call is made without its launches: a kernel that fails must not hide the candidates beside it.
    """
    vendor = vendor_key(inputs.layer, M, capability)
    modules = ia3_glu, ia3_kv_linear, ia3_linear, ia3_scale, task_plan
    with offline.tuned({vendor: False}) as asked, offline.recorded(*modules):
        apply(peft_ops, inputs)
    found = {
        f"{key[0]} {model.short(tile)}": {vendor: False, key: tile}
        for key in dict.fromkeys(asked.keys_asked)
        for tile in offline.candidates(key)
    }
    return found | {"vendor": {vendor: True}}


def measure(layer: Layer, M: int, device: torch.device, seconds: float) -> tuple[dict[str, Ratio], dict[str, dict]]:
    """Each candidate's time over that of what runs now."""
    first = Inputs(layer, M, device, torch.bfloat16)
    copies = copies_for(first.nbytes(), device)
    sets = [first, *(Inputs(layer, M, device, torch.bfloat16) for _ in range(copies - 1))]
    entries = candidates(first, M, capability_of(first.x)[0])

    def call(entry: dict):
        def run(i: int):
            with offline.tuned(entry):
                apply(peft_ops, sets[i])

        return run

    calls = {NOW: call(tiles.TUNED)}
    for name, entry in entries.items():
        try:
            with offline.tuned(entry):
                right = is_right(first)
            found = "" if right else "is WRONG"
        except Exception:
            found = "FAILED"
            traceback.print_exc(limit=-2)
        if found:
            print(f"# {layer.name} M={M}: {name} {found} and was not timed", flush=True)
            if is_lost(device):
                raise RuntimeError(f"{name} took the GPU context with it")
        else:
            calls[name] = call(entry)
    return compare(calls, NOW, copies, device, seconds), entries


def lines(layer: Layer, M: int, ratios: dict[str, Ratio], entries: dict[str, dict]) -> list[str]:
    """What to paste into TUNED: the best candidate, if it wins by more than the noise floor."""
    again = ratios[BASELINE_AGAIN]
    floor = max(abs(again.low - 1), abs(again.high - 1))
    best = min(entries.keys() & ratios.keys(), key=lambda name: ratios[name].ratio, default=None)
    if best is None or ratios[best].ratio >= 1 - floor:
        return []
    r = ratios[best]
    vendor = next(key for key in entries[best] if key[0].startswith("vendor"))
    needless = {vendor: is_vendors(layer, M, vendor[1])}  # what an untuned table does anyway
    pasted = {key: value for key, value in entries[best].items() if (key, value) not in needless.items()}
    note = f"# {layer.name}: {r.ratio:.3f} of the first candidate's time, noise {floor:.3f}"
    return [f"    {key!r}: {value!r},  {note}" for key, value in pasted.items()]


def measured(layer: Layer, M: int, device: torch.device, seconds: float) -> dict:
    """The lines to paste, each candidate's microseconds and ratio (median, p10, p90), and what was wrong or failed."""
    with torch.no_grad():
        ratios, entries = measure(layer, M, device, seconds)
    for name, r in sorted(ratios.items(), key=lambda item: item[1].ratio):
        print(f"# {layer.name:24} {M:6} {name:34} {r.seconds * 1e6:9.1f} us {r.ratio:7.3f} ({r.low:.3f}-{r.high:.3f})")
    times = {name: [round(v, 4) for v in (1e6 * r.seconds, *r[1:])] for name, r in ratios.items()}
    return {
        "lines": lines(layer, M, ratios, entries),
        "us, ratio, p10, p90": times,
        "not timed": sorted(entries.keys() - ratios.keys()),
    }


def expectations(layer: Layer, M: int, capability: int) -> list[str]:
    base = model.bare(layer, M, tiles.chip(capability))
    return [
        f"{layer.name:24} {M:6} {f'{name} {model.short(tile)}':34} {p.seconds * 1e6:9.1f} {p.seconds / base:7.3f}"
        for name, tile, p in model.choices(layer, M, capability)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--match", default="", help="only layers whose name contains this")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ORDER))
    parser.add_argument("--seconds", type=float, default=0.5, help="time to spend on one layer and row count")
    parser.add_argument("--json", help="keep the lines to paste, and every candidate's time, here")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds, after which no layer is begun")
    parser.add_argument("--limit", type=float, default=120, help="seconds, after which one layer ends the process")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--sm", type=int, default=90, choices=sorted(tiles.CHIPS), help="for --dry-run")
    args = parser.parse_args()
    work = [(layer, M) for M in args.rows for layer in LAYERS if args.match in layer.name]
    if not work:
        parser.error(f"no layer's name contains {args.match!r}")
    if args.dry_run:
        print(f"predicted for sm_{args.sm}, nothing is measured; the first candidate of each is what runs now")
        print(f"{'layer':24} {'rows':>6} {'candidate':34} {'us':>9} {'/ bare':>7}")
        for layer, M in work:
            print("\n".join(expectations(layer, M, args.sm)))
        return
    if not torch.cuda.is_available():
        parser.error("no GPU here: --dry-run shows what would be measured")
    from bench.matrix import environment  # which imports this module

    device = torch.device("cuda")
    torch.manual_seed(0)
    found = Pieces(args.json, {"environment": environment()}, resume=True)
    journal = Journal(Path(args.json).with_suffix(".journal") if args.json else None)

    def piece(layer: Layer, M: int) -> tuple[str, Callable[[], bool]]:
        name = f"{layer.name} {M}"

        def tuned() -> bool:
            found.add(name, lambda: measured(layer, M, device, args.seconds))
            return not found[name]["not timed"]

        return name, tuned

    pieces = [piece(layer, M) for layer, M in work]
    for name, state in journal.work(pieces, device, budget=args.budget, limit=args.limit, done=found.keys()):
        if state in ("failed", "left out"):
            print(f"# {state}: {name}", flush=True)
    kept = (found[name]["lines"] for name, _ in pieces if name in found)
    print("\n".join(["", "TUNED = {", *(line for lines in kept for line in lines), "}"]))


if __name__ == "__main__":
    main()
