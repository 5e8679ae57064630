"""Every operator beside its peers, one group per (operator, shape): absolute times, for trends from commit to commit.

    pytest bench --benchmark-autosave           # the CPU's shapes, or, where there is a GPU, all
    pytest bench --quick -k "glu and decode"    # tiny layers; some of them

Layers, row counts and peers are those of bench.matrix. Each group also holds every peer's ratio to the bare layer from
bench.harness, which pytest-benchmark cannot measure: it runs one peer after the other. Both are in `extra_info`.
"""

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch

from bench.harness import BASELINE_AGAIN
from bench.matrix import PEERS, Measured, rounded
from bench.shapes import CASES, CPU_CASES, QUICK_CASES, Case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = QUICK_CASES if metafunc.config.getoption("quick") else CPU_CASES if DEVICE.type == "cpu" else CASES
    names = [name for name in PEERS if name != "compile" or not metafunc.config.getoption("no_compile")]
    metafunc.parametrize(
        ("case", "peer"), [pytest.param(c, p, id=f"{c.name}-{p}".replace(" ", "-")) for c in cases for p in names]
    )


@lru_cache(maxsize=1)  # the peers of a case follow one another, and its buffers then go
def measured(case: Case, with_compile: bool, seconds: float) -> tuple[Measured, dict, dict]:
    torch.manual_seed(0)
    group = Measured(case, DEVICE, with_compile)
    assert group.right, f"{case.name}: peft_ops is further from fp64 than torch's arithmetic; nothing is timed"
    return group, rounded(group.ratios(seconds))[1], group.facts()


def finished(call: Callable[[int], object]) -> Callable[[], None]:
    def run() -> None:
        call(0)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return run


@pytest.mark.benchmark(min_rounds=5, max_time=0.25, disable_gc=True)
def test_operator(case: Case, peer: str, benchmark, request):
    quick = request.config.getoption("quick")
    group, ratios, facts = measured(
        case, not request.config.getoption("no_compile"), seconds=0.02 if quick else 0.1 * len(PEERS)
    )
    if peer not in group.calls:
        pytest.skip(f"{peer} has no form of its own of {case.layer.name}")
    benchmark.group = case.name
    benchmark.extra_info |= facts | {"peer": peer, "ratio": ratios[peer], "noise": ratios[BASELINE_AGAIN]}
    with torch.set_grad_enabled(case.phase == "train"):
        benchmark(finished(group.calls[peer]))
