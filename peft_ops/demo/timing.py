"""The bare model, the mixed batch, and PEFT switching adapters, interleaved: paired ratios beside a noise floor."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from peft_ops.demo.model import Encoder, Texts
from peft_ops.demo.peft_side import PeftServer, parts_of
from peft_ops.demo.train import METHODS
from peft_ops.nn import TaskBatch

MIN_ROUNDS, MAX_ROUNDS = 5, 60
BARE, AGAIN = "bare model", "bare model again"


@dataclass
class Timing:
    """Seconds (median) and ratio to the bare model (median, first and third quartile) of each run on one batch."""

    rows: int
    rounds: int
    seconds: dict[str, float]
    ratios: dict[str, tuple[float, float, float]]


def time_serving(
    bare: nn.Module,
    encoder: Encoder,
    servers: dict[str, PeftServer],
    adapters: dict[str, list[str]],
    texts: Texts,
    seconds: float,
    progress: Callable,
) -> Timing:
    """Forward passes over the same texts, whose rows go round the adapters of one method and the base model."""
    count = len(texts.input_ids)

    def run_bare():
        bare(input_ids=texts.input_ids, attention_mask=texts.attention_mask)

    runs = {BARE: run_bare, AGAIN: run_bare}
    for method, names in adapters.items():
        owners = [*names, None]
        rows = [owners[i % len(owners)] for i in range(count)]
        runs[f"peft_ops {METHODS[method]}, mixed batch"] = mixed_run(encoder, texts, rows)
        runs[f"PEFT {METHODS[method]}, adapter by adapter"] = peft_run(
            servers[method], texts, rows, encoder.hidden_size
        )
    times = interleaved(runs, seconds, encoder.device, progress)
    medians = {name: median(values) for name, values in times.items()}
    return Timing(count, len(times[BARE]), medians, paired_ratios(times))


def mixed_run(encoder: Encoder, texts: Texts, rows: list[str | None]) -> Callable:
    batch = TaskBatch.of_rows(rows, encoder.device)
    encoder.keep_table(batch.names)
    return lambda: encoder(texts, batch)


def peft_run(server: PeftServer, texts: Texts, rows: list[str | None], width: int) -> Callable:
    """Sorting the batch by adapter is left out of the time: a server could do it when the requests come in."""
    parts = parts_of(texts, rows)
    out = torch.zeros(*texts.input_ids.shape, width, device=texts.input_ids.device)
    return lambda: server.loop(parts, out)


def interleaved(
    runs: dict[str, Callable], seconds: float, device: torch.device, progress: Callable
) -> dict[str, list[float]]:
    """Seconds of every run per round. A round goes through all of them forwards and back (ABBA): drift cancels."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = [*runs, *reversed(runs)]
    deadline = time.perf_counter() + seconds
    for number in progress(range(MAX_ROUNDS), desc="timing", total=MAX_ROUNDS):
        if number >= MIN_ROUNDS and time.perf_counter() > deadline:
            break
        spent = dict.fromkeys(runs, 0.0)
        for name in order:
            spent[name] += timed(runs[name], device)
        for name, value in spent.items():
            times[name].append(value / 2)
    return times


def timed(run: Callable, device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def paired_ratios(times: dict[str, list[float]]) -> dict[str, tuple[float, float, float]]:
    result = {}
    for name, values in times.items():
        ratios = sorted(value / bare for value, bare in zip(values, times[BARE], strict=True))
        quarter = len(ratios) // 4
        result[name] = (median(ratios), ratios[quarter], ratios[-1 - quarter])
    return result
