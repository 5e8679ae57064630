"""Ratios that can be trusted: each run ABBA-interleaved with a baseline, beside what that gives against itself.

CUDA: a captured graph of several calls, each on buffers of its own, together three times the L2 cache, so that weights
come from memory as they do in a model; or, on request, wall time of windows of calls that end in a synchronisation.
CPU: wall time of windows of calls.
"""

import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from threading import Timer
from typing import NamedTuple

import torch

BASELINE_AGAIN = "A/A"
LOST = 75  # exit status of a process that a piece of work took with it; the same command goes on behind that piece
TRIES = 2  # of a piece that fails, is wrong, or does not end
MOST_COPIES = 256  # sets of buffers: a set is a dozen tensors, and a graph holds a call on each
CALLS, GRAPH_SECONDS = 32, 2e-3  # what one graph holds at most, unless one rotation over the buffers is more
FEWEST, ENOUGH = 5, 10  # rounds of a comparison: those it always takes, and those it takes while it has time


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


def leave(why: str) -> None:
    """Ends the process here and now: with its GPU context gone, or a kernel that hangs, nothing of it can be used, and
    an orderly end would wait for that kernel."""
    print(f"{why}; this process ends here", flush=True)
    sys.stderr.flush()
    os._exit(LOST)


def is_lost(device: torch.device) -> bool:
    """Whether an error has taken the GPU context with it, as an illegal access does: every later call then fails."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return True
    return False


@contextmanager
def watched(name: str, limit: float | None) -> Iterator[None]:
    """What takes longer than `limit` seconds ends the process."""
    if limit is None:
        yield
        return
    timer = Timer(limit, leave, [f"{name} did not end within {limit:g} s"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Journal:
    """What became of named pieces of work: a line in a file when one begins, and one when it ends.

    A piece that began and did not end took its process with it. In the next run it comes after all that is new, as do
    those that were wrong or failed; after TRIES tries it is left out. So one bad kernel holds nothing up.
    """

    def __init__(self, path: Path | None):
        self.path, self.begun, self.ended = path, Counter(), {}
        for line in path.read_text().splitlines() if path and path.exists() else []:
            state, _, name = line.partition(" ")
            self._note(state, name)

    def _note(self, state: str, name: str) -> None:
        if state == "begun":
            self.begun[name] += 1
            self.ended.pop(name, None)
        elif state == "stopped":
            self.begun[name] -= 1
        else:
            self.ended[name] = state

    def write(self, state: str, name: str) -> None:
        self._note(state, name)
        if self.path:
            with self.path.open("a") as f:  # a line at a time, whole: several processes may share the file
                f.write(f"{state} {name}\n")

    def right(self) -> set[str]:
        return {name for name, state in self.ended.items() if state == "right"}

    def is_spent(self, name: str) -> bool:
        return self.begun[name] >= TRIES

    def work(
        self, pieces: Iterable[tuple[str, Callable[[], bool]]], device: torch.device, *, budget: float = float("inf"),
        limit: float | None = None, done: Collection[str] | None = None,
    ) -> Iterator[tuple[str, str]]:  # fmt: skip
        """Does what is left; yields each piece's name and outcome: right, wrong, failed, left out.

        Args:
            pieces: each says whether it is right. Nothing is asked of the iterator once the budget is spent.
            budget: seconds, after which no piece is begun.
            limit: seconds, after which a piece ends the process.
            done: names of pieces that are done; by default those that the file says were right.
        """
        end, done, again = time.monotonic() + budget, self.right() if done is None else done, []
        for name, piece in pieces:
            if time.monotonic() > end:
                print("the budget is spent, what follows is left")
                return
            if name in done:
                continue
            if self.is_spent(name):
                print(f"after {self.begun[name]} tries {self.ended.get(name, 'it never ended')}: {name}")
                yield name, "left out"
            elif self.begun[name]:
                again.append((name, piece))
            else:
                yield name, self._outcome(name, piece, device, limit)
        for name, piece in again:
            if time.monotonic() > end:
                print(f"the budget is spent, left: {name}")
                return
            print(f"once more, the last try {self.ended.get(name, 'did not end')}: {name}", flush=True)
            yield name, self._outcome(name, piece, device, limit)

    def _outcome(self, name: str, piece: Callable[[], bool], device: torch.device, limit: float | None) -> str:
        self.write("begun", name)
        try:
            with watched(name, limit):
                state = "right" if piece() else "wrong"
        except KeyboardInterrupt:  # whose time is up, through no fault of the piece
            self.write("stopped", name)
            raise
        except Exception:  # a kernel that does not launch is one finding, and the others are still wanted
            traceback.print_exc(limit=-3)
            if is_lost(device):
                leave(f"{name} took the GPU context with it")
            state = "failed"
        self.write(state, name)
        return state


def copies_for(nbytes: int, device: torch.device) -> int:
    """How many sets of buffers of nbytes fill three times the L2 cache; 2 to MOST_COPIES."""
    if device.type != "cuda":
        return 1
    return min(MOST_COPIES, max(2, -(-3 * _cache(device) // max(nbytes, 1))))


def is_hot(nbytes: int, device: torch.device) -> bool:
    """Whether even MOST_COPIES sets of buffers fill less than that: some of the reads are then served by the cache."""
    return device.type == "cuda" and copies_for(nbytes, device) * nbytes < 3 * _cache(device)


def _cache(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


def rotations(once: float, copies: int) -> int:
    """How often a graph goes over all buffers, where a call takes `once` seconds: CALLS calls, or GRAPH_SECONDS."""
    calls = max(1, min(CALLS, int(GRAPH_SECONDS / max(once, 1e-9))))
    return -(-calls // copies)


def graph_timer(call: Callable[[int], object], copies: int, device: torch.device) -> Callable[[], float]:
    """Seconds per call, where call(i) works on the i-th set of buffers: one replay of a graph of all of them."""
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        call(0)  # compiles, and makes what is made once per stream
        begin, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call(0)
        done.record()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    repeats = rotations(begin.elapsed_time(done) * 1e-3, copies)
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
        seconds: time to spend. FEWEST rounds are taken even so, and up to ENOUGH within three times that.
        wall: on a GPU, what a caller waits for instead of the kernels' time. On a CPU it is always that.
    """
    timer = graph_timer if device.type == "cuda" and not wall else wall_timer
    runs = {name: timer(call, copies, device) for name, call in calls.items()}
    runs[BASELINE_AGAIN] = runs[baseline]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs if name != baseline}
    begin, rounds = time.perf_counter(), 0
    while (spent := time.perf_counter() - begin) < seconds or rounds < (ENOUGH if spent < 3 * seconds else FEWEST):
        rounds += 1
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
