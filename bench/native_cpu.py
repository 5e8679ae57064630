"""Native CPU kernels against plain PyTorch, ABBA-interleaved: `python bench/native_cpu.py [--threads 2] [--csv out.csv]`.

`ratio` is peer's time / native's time, the median over rounds of (B + B) / (A + A); the A/A row says what a ratio may be by chance.
peft_ops/_native_rule.py is read off this table.
"""

import argparse
import statistics
import time
from collections.abc import Callable

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


def abba(a: Callable, b: Callable, budget: float = 0.6) -> tuple[float, float, float]:
    """Median seconds of a and b, and the median of their ratio b / a."""
    a(), b()
    n = max(1, int(2e-3 / max(seconds(a, 3), seconds(b, 3))))
    times, end = [], time.perf_counter() + budget
    while time.perf_counter() < end or len(times) < 7:
        a1, b1, b2, a2 = seconds(a, n), seconds(b, n), seconds(b, n), seconds(a, n)
        times.append((a1 + a2, b1 + b2))
    mid = statistics.median
    return mid(a for a, _ in times) / 2, mid(b for _, b in times) / 2, mid(b / a for a, b in times)


def scale_cases():
    for name, dtype in DTYPES.items():
        for M, N in SHAPES:
            x, dy, l32 = torch.randn(M, N).to(dtype), torch.randn(M, N).to(dtype), torch.randn(min(M, 4), N)
            ids = torch.arange(min(M, 4)).repeat_interleave(-(-M // 4))
            case = f"{name} {M}x{N}"
            # 2 x M x N x size bytes move, and the scale's N x 4
            yield f"ia3_scale {case}", {
                "native": lambda x=x, v=l32: native.ia3_scale(x, v, None, None),
                "native again": lambda x=x, v=l32: native.ia3_scale(x, v, None, None),
                "peft": lambda x=x, v=l32[0], d=dtype: (x * v).to(d),
                "reference": lambda x=x, v=l32: reference.act_scale(x, v, None),
            }
            yield f"ia3_scale 4 tasks {case}", {
                "native": lambda x=x, v=l32, i=ids: native.ia3_scale(x, v, i, None),
                "gather": lambda x=x, v=l32, i=ids, d=dtype: (x * v[i]).to(d),
                "reference": lambda x=x, v=l32, i=ids: reference.act_scale(x, v, i),
            }
            for activation, act in (("silu", F.silu), ("gelu_tanh", reference.ACTIVATIONS["gelu_tanh"]), ("gelu", F.gelu)):
                yield f"ia3_scale {activation} {case}", {
                    "native": lambda x=x, v=l32, a=activation: native.ia3_scale(x, v, None, a),
                    "peft": lambda x=x, v=l32[0], d=dtype, f=act: (f(x) * v).to(d),
                    "reference": lambda x=x, v=l32, a=activation: reference.act_scale(x, v, None, a),
                }
            yield f"ia3_scale_backward {case}", {
                "native": lambda x=x, g=dy, v=l32[:1]: native.ia3_scale_backward(g, x, v, None, None, True, True),
                # what autograd runs for (x * v).to(dtype): both products and the sum in fp32
                "peft": lambda x=x, g=dy, v=l32[0], d=dtype: ((g.float() * v).to(d), (g.float() * x).sum(0)),
                "reference": lambda x=x, g=dy, v=l32[:1]: reference.act_scale_backward(g, x, v, None, None, True, True),
            }
            yield f"ia3_scale_backward 4 tasks silu {case}", {
                "native": lambda x=x, g=dy, v=l32, i=ids: native.ia3_scale_backward(g, x, v, i, "silu", True, True),
                "reference": lambda x=x, g=dy, v=l32, i=ids: reference.act_scale_backward(g, x, v, i, "silu", True, True),
            }


def prompt_cases():
    for name, dtype in DTYPES.items():
        for B, S, P, E in ((8, 512, 20, 4096), (1, 32, 20, 768), (8, 128, 20, 768)):
            table, prompt = torch.randn(8192, E).to(dtype), torch.randn(1, P, E)
            ids = torch.randint(0, 8192, (B, S))
            layout = torch.tensor([[0, 0, 0, P]] * B, dtype=torch.int32)
            dout = torch.randn(B, P + S, E).to(dtype)
            case = f"{name} {B}x{S} P{P} E{E}"
            yield f"prompt_concat {case}", {
                "native": lambda t=table, p=prompt, i=ids, y=layout: native.prompt_concat(i, t, p, y),
                "native again": lambda t=table, p=prompt, i=ids, y=layout: native.prompt_concat(i, t, p, y),
                "peft": lambda t=table, p=prompt, i=ids, B=B, d=dtype: torch.cat([p.repeat(B, 1, 1).to(d), F.embedding(i, t)], 1),
                "reference": lambda t=table, p=prompt, i=ids, y=layout: reference.concat_embeddings(i, t, p, y),
            }
            yield f"prompt_concat_backward {case}", {
                "native": lambda g=dout, y=layout, P=P: native.prompt_concat_backward(g, y, 1, P),
                "peft": lambda g=dout, P=P: g[:, :P].float().sum(0, keepdim=True),
                "reference": lambda g=dout, y=layout, P=P: reference.concat_backward(g, y, 1, P),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--budget", type=float, default=0.3, help="seconds per pair")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, {torch.backends.cpu.get_cpu_capability()}")
    print(f"{'case':46} {'native us':>10}   peer us (ratio)")
    for case, calls in [*scale_cases(), *prompt_cases()]:
        if args.only not in case:
            continue
        a, row = calls.pop("native"), []
        for peer, b in calls.items():
            ours, theirs, ratio = abba(a, b, args.budget)
            row.append(f"{'A/A' if peer == 'native again' else peer} {theirs * 1e6:.1f} ({ratio:.2f})")
        print(f"{case:46} {ours * 1e6:10.1f}   {', '.join(row)}", flush=True)


if __name__ == "__main__":
    main()
