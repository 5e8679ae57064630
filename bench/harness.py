"""Ratios that can be trusted: each run ABBA-interleaved with a baseline, beside what that gives against itself.

CUDA: a captured graph of several calls, each on buffers of its own, together three times the L2 cache, so that weights
come from memory as they do in a model; or, on request, wall time of windows of calls that end in a synchronisation.
CPU: wall time of windows of calls.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

BASELINE_AGAIN = "A/A"


class Ratio(NamedTuple):
    """Seconds per call (median) and time over the baseline's, paired: median, 10th and 90th percentile."""

    seconds: float
    ratio: float
    low: float
    high: float


class Pieces(dict):
    """Results that are written as they come, so that what is killed can go on where it stopped.

    Args:
        path: a JSON file, or None: nothing is written.
        place: what the file says first.
        resume: what the file already holds is kept; otherwise it is begun anew.
        budget: seconds, after which no piece is begun.
    """

    def __init__(self, path: str | None, place: dict, resume: bool = False, budget: float = float("inf")):
        super().__init__(place)
        self.path, self.end = path and Path(path), time.monotonic() + budget
        if resume and self.path and self.path.exists():
            self |= json.loads(self.path.read_text())

    def add(self, name: str, measure: Callable[[], object]) -> None:
        if name in self:
            return
        if time.monotonic() > self.end:
            print(f"left out, the budget is spent: {name}")
            return
        self[name] = measure()
        if self.path:  # replaced in one step: a file half written could not be read again
            half = self.path.with_suffix(".part")
            half.write_text(json.dumps(self, indent=2) + "\n")
            half.replace(self.path)


def copies_for(nbytes: int, device: torch.device) -> int:
    """How many sets of buffers of nbytes fill three times the L2 cache; 2 to 64."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(64, max(2, -(-3 * cache // max(nbytes, 1))))


def graph_timer(call: Callable[[int], object], copies: int, device: torch.device) -> Callable[[], float]:
    """Seconds per call, where call(i) works on the i-th set of buffers: one replay of a graph of all of them."""
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        call(0)  # compiles, and makes what is made once per stream
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    repeats = -(-32 // copies)
    with torch.cuda.graph(graph, stream=stream):
        for i in range(copies * repeats):
            call(i % copies)

    def run() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / (copies * repeats)

    return run


def wall_timer(
    call: Callable[[int], object], copies: int, device: torch.device, window: float = 2e-3
) -> Callable[[], float]:
    """Seconds per call in a window of calls long enough for the clock, until the last one's work is done."""

    def window_of(count: int) -> float:
        begin = time.perf_counter()
        for i in range(count):
            call(i % copies)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    window_of(1)  # compiles
    once = min(window_of(1) for _ in range(3))  # one alone may have been interrupted
    count = max(1, int(window / max(once, 1e-7)))

    def run() -> float:
        return window_of(count) / count

    return run


def compare(
    calls: dict[str, Callable[[int], object]], baseline: str, copies: int, device: torch.device, seconds: float = 1.0,
    wall: bool = False,
) -> dict[str, Ratio]:  # fmt: skip
    """Each call against the baseline, and the baseline against itself under "A/A".

    Args:
        calls: by name; call(i) works on the i-th of `copies` sets of buffers.
        seconds: time to spend; at least 10 rounds are taken.
        wall: on a GPU, what a caller waits for instead of the kernels' time. On a CPU it is always that.
    """
    timer = graph_timer if device.type == "cuda" and not wall else wall_timer
    runs = {name: timer(call, copies, device) for name, call in calls.items()}
    runs[BASELINE_AGAIN] = runs[baseline]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs if name != baseline}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 10:
        for name, pairs in times.items():
            base, ours = runs[baseline], runs[name]
            first, second, third, last = base(), ours(), ours(), base()
            pairs.append((second + third, first + last))
    found = {name: _ratio(pairs) for name, pairs in times.items()}
    return {baseline: Ratio(median(b / 2 for p in times.values() for _, b in p), 1.0, 1.0, 1.0), **found}


def _ratio(pairs: Sequence[tuple[float, float]]) -> Ratio:
    ratios = sorted(ours / base for ours, base in pairs)
    tenth = len(ratios) // 10
    return Ratio(median(ours / 2 for ours, _ in pairs), median(ratios), ratios[tenth], ratios[-1 - tenth])
