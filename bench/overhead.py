"""What a public function costs over its operator: checks, shapes, dispatch and, with gradients, the autograd node.

    python -m bench.overhead               # every public operator
    python -m bench.overhead --strict      # exits with 1 where one is over its budget
    python -m bench.overhead --json FILE

Raw is `torch.ops.peft_ops.<op>.default` below autograd, with the very arguments that the public function hands over.
Tiny tensors on a CPU, one thread; raw and public in turns, in windows of 50 calls. Each side counts with the smallest
of its rounds' medians, the one that other processes disturbed least.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch

import peft_ops
from bench.matrix import environment
from peft_ops import _library, reference

BUDGET = {"no gradients": 5.0, "gradients": 8.0}  # microseconds over the raw call
M, S, N, K, E, TASKS = 4, 2, 16, 16, 16, 3
CALLS, WINDOWS = 50, 9


def cases(gradients: bool) -> dict[str, Callable[[], object]]:
    """Every public operator as a model calls it: ids per sequence or a plan, tables in fp32 that train if gradients."""

    def table(*size: int) -> torch.Tensor:
        return torch.rand(*size).requires_grad_(gradients)

    x, gate, up, bias = torch.randn(M, S, K), torch.randn(M, S, N), torch.randn(M, S, N), torch.randn(N)
    first, second, ids = torch.randn(N, K), torch.randn(N, K), torch.tensor([0, -1, 2, 1])
    tokens, embedding, prompts = torch.randint(0, 10, (M, S)), torch.randn(10, E), table(TASKS, 2, E)
    plan, l = peft_ops.plan_tasks(ids, M * S, TASKS), table(TASKS, N)  # noqa: E741
    starts = torch.arange(0, M * S + 1, S, dtype=torch.int32)
    p = peft_ops
    return {
        "ia3_scale": partial(p.ia3_scale, gate, l, ids),
        "ia3_scale, plan": partial(p.ia3_scale, gate, l, plan),
        "ia3_scale, one task": partial(p.ia3_scale, gate, table(N)),
        "ia3_linear": partial(p.ia3_linear, x, first, bias, ia3_l=l, task_ids=ids),
        "ia3_linear, plan": partial(p.ia3_linear, x, first, bias, ia3_l=l, task_ids=plan),
        "ia3_linear, feedforward": partial(p.ia3_linear, x, first, ia3_l=l, task_ids=ids, is_feedforward=True),
        "ia3_kv_linear": partial(p.ia3_kv_linear, x, first, second, k_ia3_l=l, v_ia3_l=table(TASKS, N), task_ids=ids),
        "ia3_glu": partial(p.ia3_glu, gate, up, l, ids),
        "ia3_glu_linear": partial(p.ia3_glu_linear, x, first, second, ia3_l=l, task_ids=ids),
        "prompt_concat": partial(p.prompt_concat, tokens, embedding, prompts, ids),
        "prompt_concat_packed": partial(
            p.prompt_concat_packed, tokens.flatten(), starts, embedding, prompts, ids, max_seqlen=S
        ),
        "prompt_embed": partial(p.prompt_embed, tokens, embedding, prompts, ids),
        "plan_tasks": partial(p.plan_tasks, ids, M * S, TASKS),
        "ia3_fold": partial(p.ia3_fold, first, bias, table(N)),
    }


def raw_of(public: Callable[[], object]) -> Callable[[], object]:
    """The operator call at the bottom of a public one, below autograd; of ia3_fold, which has none, the reference's."""
    if public.func is peft_ops.ia3_fold:
        return partial(reference.ia3_fold, *public.args, **public.keywords)
    found, through = [], _library.Operator.__call__

    def record(self, *args, **kwargs):
        found.append(partial(self.overload, *args))
        return through(self, *args, **kwargs)

    _library.Operator.__call__ = record
    try:
        public()
    finally:
        _library.Operator.__call__ = through
    (call,) = found
    return call


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - begin) / CALLS


class Pair:
    """A raw and a public call, and the smallest median that each has had so far, in seconds."""

    def __init__(self, public: Callable[[], object]):
        self.raw, self.public, self.best = raw_of(public), public, [float("inf")] * 2

    def round(self) -> None:
        times = [], []
        for _ in range(WINDOWS):
            with torch._C._AutoDispatchBelowAutograd():
                times[0].append(seconds(self.raw))
            times[1].append(seconds(self.public))
        self.best = [min(b, median(t)) for b, t in zip(self.best, times, strict=True)]


def measure(rounds: int, match: str = "") -> dict[str, dict[str, list[float]]]:
    """By operator and mode: microseconds of the raw call, and of the public one over it."""
    pairs = {}
    for mode in BUDGET:
        with torch.set_grad_enabled(mode == "gradients"):
            found = cases(mode == "gradients").items()
            pairs |= {(name, mode): Pair(public) for name, public in found if match in name}
    for _ in range(rounds):  # each case's rounds lie apart: a busy neighbour spoils some of them, not all
        for (_, mode), pair in pairs.items():
            with torch.set_grad_enabled(mode == "gradients"):
                pair.round()
    found = {name: {} for name, _ in pairs}
    for (name, mode), pair in pairs.items():
        raw, public = pair.best
        found[name][mode] = [round(raw * 1e6, 2), round((public - raw) * 1e6, 2)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the result here")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--match", default="", help="only operators whose name contains this")
    parser.add_argument("--strict", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(args.rounds, args.match)
    print(f"{'microseconds':24}" + "".join(f"   {mode + ': raw':>18} {'over':>6}" for mode in BUDGET))
    over = 0
    for name, modes in found.items():
        late = any(modes[mode][1] > budget for mode, budget in BUDGET.items())
        over += late
        columns = "".join(f"   {raw:18.2f} {more:6.2f}" for raw, more in modes.values())
        print(f"{name:24}{columns}{'   over its budget' if late else ''}")
    if args.json:
        with open(args.json, "w") as f:
            json.dump(environment() | {"threads": 1, "us": found, "budget": BUDGET}, f, indent=1)
            f.write("\n")
    sys.exit(args.strict and over > 0)


if __name__ == "__main__":
    main()
