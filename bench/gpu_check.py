"""What only a GPU can say: every table entry against fp64 in bf16 and fp16, repeats, streams, CUDA graphs, no sync.

python -m bench.gpu_check             # one line per check; the exit status counts failures
python -m bench.gpu_check --small     # shapes for compute-sanitizer, or for the interpreter without a GPU
"""

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator

import torch

import peft_ops
from bench import offline, tune
from bench.shapes import LAYERS, Layer
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
    yield from table_entries(layers, rows, device)
    if has_native(device.type):
        yield from native_kernels(rows, device)
    if device.type != "cuda":
        return
    for layer in layers:
        for M in rows[:: 1 if small else 2]:
            named = f"{layer.name} M={M}"
            yield f"{named} repeats", lambda a=layer, b=M: repeats(a, b, device, 20 if small else 100)
            yield f"{named} side streams", lambda a=layer, b=M: side_streams(a, b, device)
            yield f"{named} graph", lambda a=layer, b=M: graph(a, b, device)
            yield f"{named} no sync", lambda a=layer, b=M: no_sync(a, b, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    if args.small:  # by their own rule the persistent kernels begin where their tiles fill half a GPU
        tiles.linear_is_small = lambda M, N, capability: M <= tiles.SMALL_M
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    count = failed = 0
    for name, check in checks(device, args.small):
        count += 1
        try:
            with torch.no_grad():
                right = check()
        except Exception:  # a kernel that does not launch is one finding, and the others are still wanted
            right = False
            traceback.print_exc(limit=-2)
        failed += not right
        print(f"{'ok   ' if right else 'WRONG'} {name}", flush=True)
    print(f"{count - failed} of {count} right on {device}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
