"""What only a GPU can say: every table entry and operator, gradients too, against fp64, streams, CUDA graphs, no sync.

    python -m bench.gpu_check              # one line per check; the exit status says whether one was not right
    python -m bench.gpu_check --first      # the most telling: bf16 operators, prompts, plans, streams, graphs, no sync
    python -m bench.gpu_check --done FILE  # what became of each is kept there; what was right is not done again
    python -m bench.gpu_check --jobs 8     # in so many processes: nearly all the time is Triton's compiler's
    python -m bench.gpu_check --small      # shapes for compute-sanitizer, or for the interpreter without a GPU

What was wrong, failed, or took the process with it comes last in the next run, and is left out after two tries.
"""

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

import peft_ops
from bench import offline, tune
from bench.harness import LOST, Journal
from bench.shapes import ELEMENTWISE, LAYERS, PROMPTS, QUICK_PROMPTS, Layer
from peft_ops import reference
from peft_ops._backend import INTERPRET
from peft_ops._library import has_native
from peft_ops.kernels import tiles
from peft_ops.ops.ia3_linear import capability_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SMALL = [
    Layer("small", op, N, K, activation)
    for op, N, K, activation in (
        ("kv", 48, 64, None),
        ("glu", 80, 64, "silu"),
        ("linear", 144, 1024, "gelu"),
        ("feedforward", 48, 64, None),
    )
]
SMALL_REST = [Layer("small", "scale", 80), Layer("small", "gate", 72, activation="gelu_tanh"), *QUICK_PROMPTS]

# one layer per operator: what a kernel does wrong on the others, it does on these
FIRST_NAMES = (
    "BERT-large kv", "T0-3B glu", "BERT-large linear", "GPT-2 feedforward", "Llama-2-7B scale", "T0-3B gate"
)  # fmt: skip
FIRST = [layer for layer in (*LAYERS, *ELEMENTWISE) if layer.name in FIRST_NAMES]
FORM_ROWS = (3, 16, 512, 1024, 4096)  # of the forms below: each kernel, and each bucket that asks other keys


class Form(NamedTuple):
    """A way to call a layer that asks other keys of the table, or other branches of the same kernels."""

    name: str
    ops: tuple[str, ...]
    change: Callable[[tune.Inputs], None] = lambda inputs: None
    activation: str | None = None  # in place of the layer's
    trains: bool = False
    backend: str = "auto"
    sequences: bool = False  # only where rows come in sequences of one task


def per_token(inputs: tune.Inputs) -> None:
    """Ids in runs: no tile of 128 rows is one task's."""
    inputs.x = inputs.x.flatten(0, 1)
    inputs.ids = torch.randint(-1, tune.TASKS, (len(inputs.x),), device=inputs.x.device)


def columns(inputs: tune.Inputs) -> None:
    """Weights stored as [K, N], as transformers' Conv1D has them."""
    inputs.weights = [w.t().contiguous().t() for w in inputs.weights]


def unaligned(inputs: tune.Inputs) -> None:
    """Rows of x that begin between two 16-byte addresses."""
    x = inputs.x
    inputs.x = torch.cat([x, x[..., :1]], -1)[..., : x.shape[-1]]


def unequal(inputs: tune.Inputs) -> None:
    """Keys and values of other widths, with the same sum."""
    cut = inputs.layer.N // 32 * 16
    both = torch.cat(inputs.weights)
    inputs.weights = [both[:cut], both[cut:]]
    tables = torch.cat(inputs.tables, 1)
    inputs.tables = [tables[:, :cut].contiguous(), tables[:, cut:].contiguous()]


MATMULS = "kv", "glu", "linear", "feedforward"
PLAIN = Form("", MATMULS)
FORMS = [
    Form("per token", MATMULS, per_token, sequences=True),
    Form("[K, N] weights", ("linear", "feedforward"), columns),
    Form("unaligned", ("linear", "glu"), unaligned, backend="triton"),  # by itself dispatch leaves them to the vendor
    Form("unequal widths", ("kv",), unequal),
    Form("gated erf", ("glu",), activation="gelu"),
    Form("saves", ("kv", "glu", "linear"), trains=True),
]


@lru_cache(maxsize=1)  # the candidates of one call follow one another, and its buffers then go
def inputs_of(form: Form, layer: Layer, M: int, device: torch.device, dtype: torch.dtype) -> tune.Inputs:
    if form.activation:
        layer = layer._replace(activation=form.activation)
    inputs = tune.Inputs(layer, M, device, dtype, trains=form.trains)
    form.change(inputs)
    return inputs


def table_entries(
    layers: list[Layer], rows: tuple[int, ...], device: torch.device, dtype: torch.dtype = BF16, form: Form = PLAIN
) -> Iterator[tuple[str, Callable]]:
    """Each candidate of each table that the layers ask, against fp64. Without kernels no table is asked."""
    if not INTERPRET and device.type != "cuda":
        return
    for M, layer in itertools.product(rows, layers):
        if layer.op not in form.ops or form.sequences and M % tune.SEQUENCE:
            continue
        call = form, layer, M, device, dtype
        with torch.set_grad_enabled(form.trains), peft_ops.set_backend(form.backend):
            inputs = inputs_of(*call)
            entries = tune.candidates(inputs, M, capability_of(inputs.x)[0])
        del inputs
        for name, entry in entries.items():

            def check(call=call, form=form, entry=entry) -> bool:
                grad = torch.set_grad_enabled(form.trains)
                with offline.tuned(entry), grad, peft_ops.set_backend(form.backend):
                    return tune.is_right(inputs_of(*call))

            yield f"{layer.name} M={M} {str(dtype)[6:]} {name} {form.name}".rstrip(), check


def operators(
    layers: list[Layer], rows: tuple[int, ...], device: torch.device, dtypes: tuple[torch.dtype, ...], trains: bool
) -> Iterator[tuple[str, Callable]]:
    """Each public operator as a model calls it, with the gradients of all that trains, against fp64."""
    for layer, M, dtype in itertools.product(layers, rows, dtypes):

        def check(layer=layer, M=M, dtype=dtype) -> bool:
            with torch.set_grad_enabled(trains):
                return tune.is_right(tune.Inputs(layer, M, device, dtype, trains=trains))

        yield f"{layer.name} M={M} {str(dtype)[6:]}{' with gradients' * trains}", check


def prompts(
    E: int, device: torch.device, dtypes: tuple[torch.dtype, ...] = (BF16, FP16)
) -> Iterator[tuple[str, Callable]]:
    """All that prompts can come with: masks, lengths, labels, sides, BOS, and what is added; bad ids too."""
    B, S, P, V, num_tasks = 7, 33, 20, 50, 4
    ids = torch.tensor([0, -1, 3, 1, 2, num_tasks, 0], device=device)
    lengths = torch.tensor([0, 3, P, 7], device=device)
    table, types, positions = (torch.randn(count, E, device=device) for count in (V, 2, P + S + 2))
    tokens, kinds = (torch.randint(0, count, (B, S), device=device) for count in (V, 2))
    given = torch.randn(num_tasks, P, E, device=device)

    for dtype, added, bos in itertools.product(dtypes, (False, True), (False, True)):
        embedding, at, of = (t.to(dtype) for t in (table, positions, types))
        more = dict(prompt_lengths=lengths)
        if added:
            more |= dict(embed_scale=3.5, position_embedding=at, position_offset=2, token_type_embedding=of)
        named = f"E={E} {str(dtype)[6:]}{' added' * added}"

        if not bos:

            def embed(ops, prompts, embedding=embedding, more=more, added=added) -> tuple:
                virtual = torch.where(tokens % 3 == 0, V + tokens % P, tokens)
                kind = dict(token_type_ids=kinds) if added else {}
                return (ops.prompt_embed(virtual, embedding, prompts, ids, **more, **kind),)

            yield f"prompt_embed {named}", lambda f=embed: same(f, given)

        for side in ("left", "right"):

            def concat(ops, prompts, embedding=embedding, more=more, added=added, side=side, bos=bos) -> tuple:
                real = torch.arange(S, device=device) < torch.arange(B, device=device)[:, None] * 5
                mask = (real if side == "right" else real.flip(1)).long()
                kind = dict(token_type_ids=kinds) if added else {}
                return ops.prompt_concat(
                    tokens, embedding, prompts, ids, attention_mask=mask, labels=tokens, padding_side=side,
                    after_bos=bos, **more, **kind,
                )  # fmt: skip

            yield f"prompt_concat {side} {named}{' after_bos' * bos}", lambda f=concat: same(f, given)

        if not added:

            def packed(ops, prompts, embedding=embedding, bos=bos) -> tuple:
                starts = torch.tensor([0, 1, 1, 40, 41, 90, 150, 200], dtype=torch.int32, device=device)
                return ops.prompt_concat_packed(
                    tokens.flatten(), starts, embedding, prompts, ids, max_seqlen=60, prompt_lengths=lengths,
                    labels=tokens.flatten(), after_bos=bos,
                )  # fmt: skip

            yield f"prompt_concat_packed {named}{' after_bos' * bos}", lambda f=packed: same(f, given)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit by bit, NaN where NaN is; bf16 within one unit in the interpreter, which cuts fp32 off where a GPU rounds."""
    slack = torch.finfo(torch.bfloat16).eps if INTERPRET and a.dtype == torch.bfloat16 else 0
    shaped = a.shape == b.shape and a.dtype == b.dtype
    return shaped and torch.allclose(a, b, rtol=slack, atol=0, equal_nan=a.is_floating_point())


def same(call: Callable, prompts: torch.Tensor) -> bool:
    """Every tensor of the result equals plain PyTorch's, and the prompts' gradients are as near as fp32 sums can be."""
    with torch.enable_grad():
        found = []
        for ops in (peft_ops, reference):
            leaf = prompts.clone().requires_grad_()
            out = call(ops, leaf)
            embeds = next(t for t in out if isinstance(t, torch.Tensor))
            dy = torch.linspace(-1, 1, embeds.numel(), device=embeds.device).reshape(embeds.shape).to(embeds.dtype)
            found.append((out, torch.autograd.grad(embeds, leaf, dy)[0]))
    (ours, gradient), (theirs, expected) = found
    near = torch.allclose(gradient, expected, rtol=1e-5, atol=1e-5)
    return near and all(
        equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(ours, theirs, strict=True)
    )


def plans(device: torch.device) -> Iterator[tuple[str, Callable]]:
    for B, per_row in itertools.product((1, 7, 300), (1, 5, 128, 700)):

        def check(B=B, rows=B * per_row) -> bool:
            ids = torch.randint(-2, tune.TASKS + 1, (B,), device=device)
            ours, theirs = (ops.plan_tasks(ids, rows, tune.TASKS) for ops in (peft_ops, reference))
            return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True) if isinstance(a, torch.Tensor))

        yield f"plan_tasks B={B} rows={B * per_row}", check


def bank(device: torch.device) -> bool:
    """Tasks that come and go in two slots: each row gets the vector that was put under its name."""
    vectors = {f"task{i}": torch.rand(80, device=device) for i in range(5)}
    kept = peft_ops.nn.TaskBank(2, {"m": 80}, torch.float32, device)
    for name, vector in vectors.items():
        kept.put(name, {"m": vector})
    x = torch.randn(3, 4, 80, device=device).bfloat16()
    for a, b in itertools.permutations(vectors, 2):
        with kept.use([a, None, b]) as ids:
            y = peft_ops.ia3_scale(x, kept.table("m"), ids)
        want = torch.stack([vectors[a], torch.ones(80, device=device), vectors[b]])[:, None]
        if not equal(y, (x.float() * want).bfloat16()):
            return False
    return True


def repeats(layer: Layer, M: int, device: torch.device, count: int) -> bool:
    """The same bits every time, with other work on the GPU in between."""
    inputs = tune.Inputs(layer, M, device, BF16)
    first = tune.apply(peft_ops, inputs)
    for i in range(count):
        if i % 10 == 0:
            torch.randn(512, 512, device=device) @ torch.randn(512, 512, device=device)
        if not all(torch.equal(a, b) for a, b in zip(tune.apply(peft_ops, inputs), first, strict=True)):
            return False
    return True


def side_streams(layer: Layer, M: int, device: torch.device) -> bool:
    """Two streams at once: split-K's counters and the descriptors' scratch memory are not shared."""
    inputs = [tune.Inputs(layer, M, device, BF16) for _ in range(2)]
    want = [tune.apply(peft_ops, one) for one in inputs]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in inputs], [[], []]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i].append(tune.apply(peft_ops, inputs[i]))
    torch.cuda.synchronize()
    return all(torch.equal(a, b) for i in range(2) for y in found[i] for a, b in zip(y, want[i], strict=True))


def graph(layer: Layer, M: int, device: torch.device) -> bool:
    """Captured with everything it makes; 100 replays with new inputs give what eager gives, bit by bit."""
    inputs = tune.Inputs(layer, M, device, BF16)
    tune.apply(peft_ops, inputs)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = tune.apply(peft_ops, inputs)
    for i in range(100):
        if i % 25 == 0:
            other = tune.Inputs(layer, M, device, BF16)
            inputs.x.copy_(other.x)
            inputs.ids.copy_(other.ids)
            want = [y.clone() for y in tune.apply(peft_ops, inputs)]
        captured.replay()
        torch.cuda.synchronize()
        if not all(torch.equal(a, b) for a, b in zip(out, want, strict=True)):
            return False
    return True


def no_sync(layer: Layer, M: int, device: torch.device) -> bool:
    inputs = tune.Inputs(layer, M, device, BF16)
    for t in inputs.tables:
        t.requires_grad_()
    tune.apply(peft_ops, inputs)  # compiles
    with torch.enable_grad():
        torch.cuda.set_sync_debug_mode("error")
        try:
            ys = tune.apply(peft_ops, inputs)
            torch.autograd.grad(ys, inputs.tables, [torch.ones_like(y) for y in ys])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return True


def native_kernels(rows: tuple[int, ...], device: torch.device) -> Iterator[tuple[str, Callable]]:
    """The CUDA C++ kernels beside plain PyTorch, bit by bit, at widths that are and are not whole 16-byte accesses."""
    for M in rows:
        for N in (64, 1023, 4096):
            for dtype in (BF16, FP16, FP32):

                def check(M=M, N=N, dtype=dtype) -> bool:
                    x, table = torch.randn(M, N, device=device).to(dtype), torch.randn(tune.TASKS, N, device=device)
                    ids = torch.randint(-2, tune.TASKS + 1, (M,), device=device)
                    tokens, prompts = torch.randint(-1, M + 1, (M, 3), device=device), table[:, None].repeat(1, 5, 1)
                    found = []
                    for backend in ("native", "reference"):
                        with peft_ops.set_backend(backend):
                            batch = peft_ops.prompt_concat(tokens, x, prompts, ids)
                            found.append((peft_ops.ia3_scale(x, table, ids), *batch[:3]))
                    return all(equal(a, b) for a, b in zip(*found, strict=True))

                yield f"native M={M} N={N} {str(dtype)[6:]}", check


def only_on_a_gpu(layers: list[Layer], rows: tuple[int, ...], device: torch.device, small: bool) -> Iterator:
    graphs = not os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING")  # a capture needs PyTorch's own allocator
    for layer, M in itertools.product(layers, rows if device.type == "cuda" else ()):
        named = f"{layer.name} M={M}"
        yield f"{named} repeats", lambda a=layer, b=M: repeats(a, b, device, 20 if small else 100)
        yield f"{named} side streams", lambda a=layer, b=M: side_streams(a, b, device)
        if graphs:
            yield f"{named} graph", lambda a=layer, b=M: graph(a, b, device)
        yield f"{named} no sync", lambda a=layer, b=M: no_sync(a, b, device)


def first_checks(device: torch.device, small: bool) -> Iterator[tuple[str, Callable[[], bool]]]:
    """Every kernel once in bf16, then what nothing but a GPU shows."""
    layers = [*SMALL, *SMALL_REST] if small else [*FIRST, *PROMPTS]
    rows = (1, 16, 70, 512) if small else (1, 16, 64, 4096)  # FMAs, split K with either operand first, persistent
    for trains in (False, True):
        yield from operators(layers, rows, device, (BF16,), trains)
    yield from prompts(64, device, (BF16,))
    yield from plans(device)
    yield "TaskBank", lambda: bank(device)
    yield from only_on_a_gpu(layers, rows, device, small)


def checks(device: torch.device, small: bool) -> Iterator[tuple[str, Callable[[], bool]]]:
    """All, most telling first. What stands in two groups has one name, and is done once."""
    yield from first_checks(device, small)
    layers, rows = (SMALL, (1, 3, 16, 70, 512)) if small else (LAYERS, (1, 3, 16, 50, 64, 200, 1024, 4096))
    rest = SMALL_REST if small else [*ELEMENTWISE, *PROMPTS]
    forms = tuple(M for M in FORM_ROWS if M <= rows[-1])
    if has_native(device.type):
        yield from native_kernels(rows, device)
    for E in (64, 1023) if small else (64, 1023, 4096):
        yield from prompts(E, device)
    yield from table_entries(layers, rows, device)
    for form in FORMS:
        yield from table_entries(layers, forms, device, form=form)
    yield from operators([*rest, *layers], rows[1::2], device, (BF16, FP16, FP32), trains=True)
    yield from table_entries(layers, rows, device, FP16)
    for form in FORMS:
        yield from table_entries(layers, forms, device, FP16, form)
    yield from only_on_a_gpu([*rest, *layers], rows[:: 1 if small else 2], device, small)


def once(found: Iterator[tuple[str, Callable]]) -> Iterator[tuple[str, Callable]]:
    seen = set()
    for name, check in found:
        if name not in seen:
            seen.add(name)
            yield name, check


def shared(jobs: int) -> int:
    """The same call in so many processes, each with its share; the exit status of the whole."""
    command = [sys.executable, "-m", "bench.gpu_check", *sys.argv[1:]]
    running = [subprocess.Popen([*command, "--share", str(i), str(jobs)]) for i in range(jobs)]
    found = [process.wait() for process in running]
    return LOST if any(status == LOST or status < 0 for status in found) else max(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--first", action="store_true")
    parser.add_argument("--done", type=Path, help="keep here what became of each check; what was right is left out")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds, after which no check is begun")
    parser.add_argument("--limit", type=float, default=None, help="seconds, after which one check ends the process")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument(
        "--share", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="every N-th from the I-th"
    )
    args = parser.parse_args()
    if args.jobs > 1 and args.share == (0, 1):
        sys.exit(shared(args.jobs))
    if args.small:  # by their own rule the persistent kernels begin where their tiles fill half a GPU
        tiles.linear_is_small = lambda M, N, capability: M <= tiles.SMALL_M
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    journal, found = Journal(args.done), {}
    known = len(journal.right())
    pieces = once((first_checks if args.first else checks)(device, args.small))
    share = itertools.islice(pieces, args.share[0], None, args.share[1])
    for name, state in journal.work(share, device, budget=args.budget, limit=args.limit):
        found[name] = state
        print(f"{'ok' if state == 'right' else state.upper():8} {name}", flush=True)
    right = sum(state == "right" for state in found.values())
    print(f"{right} of {len(found)} right on {device}; {known} were before")
    sys.exit(right < len(found))


if __name__ == "__main__":
    main()
