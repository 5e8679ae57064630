"""What only a GPU can say: every table entry and operator, gradients too, against fp64, streams, CUDA graphs, no sync.

python -m bench.gpu_check                # one line per check; the exit status says whether one failed
python -m bench.gpu_check --done FILE    # what was right is kept there, and left out the next time
python -m bench.gpu_check --small        # shapes for compute-sanitizer, or for the interpreter without a GPU
"""

import argparse
import itertools
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import peft_ops
from bench import offline, tune
from bench.shapes import ELEMENTWISE, LAYERS, PROMPTS, QUICK_PROMPTS, Layer
from peft_ops import reference
from peft_ops._backend import INTERPRET
from peft_ops._library import has_native
from peft_ops.kernels import tiles
from peft_ops.ops.ia3_linear import capability_of

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


def table_entries(layers: list[Layer], rows: tuple[int, ...], device: torch.device) -> Iterator[tuple[str, Callable]]:
    """Each candidate of each table on each layer, against fp64; in both ways to select tasks."""
    for layer in layers:
        for M in rows:
            for dtype in (torch.bfloat16, torch.float16):
                inputs = tune.Inputs(layer, M, device, dtype)
                entries = tune.candidates(inputs, M, capability_of(inputs.x)[0])
                for name, entry in entries.items():

                    def check(inputs=inputs, entry=entry) -> bool:
                        with offline.tuned(entry):
                            per_token = tune.Inputs.__new__(tune.Inputs)
                            per_token.__dict__ |= inputs.__dict__
                            per_token.x = inputs.x.flatten(0, 1)
                            per_token.ids = torch.randint(-1, tune.TASKS, (len(per_token.x),), device=device)
                            return tune.is_right(inputs) and tune.is_right(per_token)

                    yield f"{layer.name} M={M} {str(dtype)[6:]} {name}", check


def operators(layers: list[Layer], rows: tuple[int, ...], device: torch.device) -> Iterator[tuple[str, Callable]]:
    """Each public operator as a model calls it, with the gradients of all that trains, against fp64."""
    for layer, M, dtype in itertools.product(layers, rows, (torch.bfloat16, torch.float16, torch.float32)):

        def check(layer=layer, M=M, dtype=dtype) -> bool:
            with torch.enable_grad():
                return tune.is_right(tune.Inputs(layer, M, device, dtype, trains=True))

        yield f"{layer.name} M={M} {str(dtype)[6:]} with gradients", check


def prompts(E: int, device: torch.device) -> Iterator[tuple[str, Callable]]:
    """All that prompts can come with: masks, lengths, labels, sides, BOS, and what is added; bad ids too."""
    B, S, P, V, num_tasks = 7, 33, 20, 50, 4
    ids = torch.tensor([0, -1, 3, 1, 2, num_tasks, 0], device=device)
    lengths = torch.tensor([0, 3, P, 7], device=device)
    table, types, positions = (torch.randn(count, E, device=device) for count in (V, 2, P + S + 2))
    tokens, kinds = (torch.randint(0, count, (B, S), device=device) for count in (V, 2))
    given = torch.randn(num_tasks, P, E, device=device)

    for dtype, added, bos in itertools.product((torch.bfloat16, torch.float16), (False, True), (False, True)):
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
    """Bit by bit; bf16 within one unit in the interpreter, which cuts fp32 off where a GPU rounds."""
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
    inputs = tune.Inputs(layer, M, device, torch.bfloat16)
    first = tune.apply(peft_ops, inputs)
    for i in range(count):
        if i % 10 == 0:
            torch.randn(512, 512, device=device) @ torch.randn(512, 512, device=device)
        if not all(torch.equal(a, b) for a, b in zip(tune.apply(peft_ops, inputs), first, strict=True)):
            return False
    return True


def side_streams(layer: Layer, M: int, device: torch.device) -> bool:
    """Two streams at once: split-K's counters and the descriptors' scratch memory are not shared."""
    inputs = [tune.Inputs(layer, M, device, torch.bfloat16) for _ in range(2)]
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
    inputs = tune.Inputs(layer, M, device, torch.bfloat16)
    tune.apply(peft_ops, inputs)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = tune.apply(peft_ops, inputs)
    for i in range(100):
        if i % 25 == 0:
            other = tune.Inputs(layer, M, device, torch.bfloat16)
            inputs.x.copy_(other.x)
            inputs.ids.copy_(other.ids)
            want = [y.clone() for y in tune.apply(peft_ops, inputs)]
        captured.replay()
        torch.cuda.synchronize()
        if not all(torch.equal(a, b) for a, b in zip(out, want, strict=True)):
            return False
    return True


def no_sync(layer: Layer, M: int, device: torch.device) -> bool:
    inputs = tune.Inputs(layer, M, device, torch.bfloat16)
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
            for dtype in (torch.bfloat16, torch.float16, torch.float32):

                def check(M=M, N=N, dtype=dtype) -> bool:
                    x, table = torch.randn(M, N, device=device).to(dtype), torch.randn(tune.TASKS, N, device=device)
                    ids = torch.randint(-2, tune.TASKS + 1, (M,), device=device)
                    tokens, prompts = torch.randint(-1, M + 1, (M, 3), device=device), table[:, None].repeat(1, 5, 1)
                    found = []
                    for backend in ("native", "reference"):
                        with peft_ops.set_backend(backend):
                            batch = peft_ops.prompt_concat(tokens, x, prompts, ids)
                            found.append((peft_ops.ia3_scale(x, table, ids), *batch[:3]))
                    return all(torch.equal(a.nan_to_num(9e4), b.nan_to_num(9e4)) for a, b in zip(*found, strict=True))

                yield f"native M={M} N={N} {str(dtype)[6:]}", check


def checks(device: torch.device, small: bool) -> Iterator[tuple[str, Callable[[], bool]]]:
    layers, rows = (SMALL, (1, 3, 16, 70, 512)) if small else (LAYERS, (1, 3, 16, 50, 64, 200, 1024, 4096))
    rest = SMALL_REST if small else [*ELEMENTWISE, *PROMPTS]
    for E in (64, 1023) if small else (64, 1023, 4096):
        yield from prompts(E, device)
    yield from plans(device)
    yield "TaskBank", lambda: bank(device)
    yield from operators([*rest, *layers], rows[1::2], device)
    yield from table_entries(layers, rows, device)
    if has_native(device.type):
        yield from native_kernels(rows, device)
    if device.type != "cuda":
        return
    for layer in (*rest, *layers):
        for M in rows[:: 1 if small else 2]:
            named = f"{layer.name} M={M}"
            yield f"{named} repeats", lambda a=layer, b=M: repeats(a, b, device, 20 if small else 100)
            yield f"{named} side streams", lambda a=layer, b=M: side_streams(a, b, device)
            yield f"{named} graph", lambda a=layer, b=M: graph(a, b, device)
            yield f"{named} no sync", lambda a=layer, b=M: no_sync(a, b, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--done", type=Path, help="names of checks that are left out; what is right is added")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds, after which no check is begun")
    args = parser.parse_args()
    if args.small:  # by their own rule the persistent kernels begin where their tiles fill half a GPU
        tiles.linear_is_small = lambda M, N, capability: M <= tiles.SMALL_M
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    done = args.done.read_text().splitlines() if args.done and args.done.exists() else []
    count = failed = left = 0
    end = time.monotonic() + args.budget
    for name, check in checks(device, args.small):
        if name in done:
            continue
        if time.monotonic() > end:
            left += 1
            continue
        count += 1
        try:
            with torch.no_grad():
                right = check()
        except Exception:  # a kernel that does not launch is one finding, and the others are still wanted
            right = False
            traceback.print_exc(limit=-2)
        failed += not right
        if right and args.done:
            with args.done.open("a") as f:
                f.write(name + "\n")
        print(f"{'ok   ' if right else 'WRONG'} {name}", flush=True)
    print(f"{count - failed} of {count} right on {device}; {len(done)} were before, {left} are left")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
