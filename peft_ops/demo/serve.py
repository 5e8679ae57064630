"""One batch for everyone: adapters of both methods and the base model side by side, compared with PEFT and timed against it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from peft_ops.demo.data import Task
from peft_ops.demo.model import Encoder, Heads, Hidden, Texts, Tokens, load_backbone
from peft_ops.demo.peft_side import PeftServer
from peft_ops.demo.train import METHODS, adapter
from peft_ops.nn import TaskBatch

ROWS = 32  # of the served batch


@dataclass
class Request:
    """A served batch: who each row belongs to, its text and its right answer."""

    adapters: list[str | None]
    heads: list[str]
    texts: list[str]
    labels: list[int]
    label_names: list[list[str]]

    @property
    def names(self) -> list[str]:
        return sorted({name for name in self.adapters if name is not None})


def build_request(tasks: list[Task], methods: Sequence[str], rows: int = ROWS) -> Request:
    """Held-out texts; neighbouring rows belong to different adapters, and every (methods + 1)th to the base model's head."""
    owners = [(task, method) for task in tasks for method in (*methods, "head")]
    picked = []
    for i in range(rows):
        task, method = owners[i % len(owners)]
        text, label = task.held_out[i * 37 % len(task.held_out)]  # a stride: the held-out texts are ordered by label
        picked.append((None if method == "head" else adapter(method, task.name), adapter(method, task.name), text, label, task.labels))
    return Request(*map(list, zip(*picked, strict=True)))


@torch.no_grad()
def answer(encoder: Encoder, heads: Heads, texts: Texts, request: Request) -> tuple[Hidden, Tensor]:
    """Hidden states and predicted label indices of a mixed batch, in one pass."""
    hidden = encoder(texts, TaskBatch.of_rows(request.adapters, encoder.device, request.names))
    return hidden, heads(hidden.pooled(), TaskBatch.of_rows(request.heads, encoder.device)).argmax(1).cpu()


@torch.no_grad()
def single_task_difference(encoder: Encoder, texts: Texts, request: Request) -> list[float]:
    """Per row, the largest difference between the mixed batch and a batch of the same shape in which every row is the row's task."""
    names, device = request.names, encoder.device
    mixed = encoder(texts, TaskBatch.of_rows(request.adapters, device, names)).states
    worst = [0.0] * len(request.texts)
    for name in dict.fromkeys(request.adapters):
        alone = encoder(texts, TaskBatch.of_rows([name] * len(worst), device, names)).states
        for row, owner in enumerate(request.adapters):
            if owner == name:
                worst[row] = (mixed[row] - alone[row]).abs().max().item()
    return worst


def parts_of(texts: Texts, adapters: Sequence[str | None]) -> list[tuple[str | None, Tensor, Texts]]:
    """Rows and texts of each adapter, cut to the longest text of the part."""
    parts = []
    for name in dict.fromkeys(adapters):
        rows = torch.tensor([i for i, owner in enumerate(adapters) if owner == name], device=texts.input_ids.device)
        parts.append((name, rows, texts[rows]))
    return parts


@torch.no_grad()
def peft_difference(encoder: Encoder, texts: Texts, request: Request, servers: dict[str, PeftServer]) -> list[float]:
    """Per row, the largest difference of the text's hidden states to PEFT's run of the whole batch with that one adapter."""
    hidden = encoder(texts, TaskBatch.of_rows(request.adapters, encoder.device, request.names))
    worst = [0.0] * len(request.texts)
    lengths = texts.attention_mask.sum(1).tolist()
    for name in dict.fromkeys(request.adapters):
        server = servers[name.partition("-")[0]] if name else next(iter(servers.values()))
        want = server.run(texts, name)
        for row, owner in enumerate(request.adapters):
            if owner == name:
                got = hidden.states[row][hidden.text_mask[row].bool()]
                worst[row] = (got - want[row, : lengths[row]]).abs().max().item()
    return worst


def interleaved(
    runs: dict[str, Callable], seconds: float, device: torch.device, progress: Callable, rounds: int = 60
) -> dict[str, list[float]]:
    """Seconds of every run per round. A round goes through all of them forwards and back (ABBA), so that drift cancels."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = [*runs, *reversed(runs)]
    for name in runs:
        runs[name]()
    deadline = time.perf_counter() + seconds
    for number in progress(range(rounds), desc="timing", total=rounds):
        spent = dict.fromkeys(runs, 0.0)
        for name in order:
            spent[name] += timed(runs[name], device)
        for name, value in spent.items():
            times[name].append(value / 2)
        if number >= 4 and time.perf_counter() > deadline:
            break
    return times


def timed(run: Callable, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def ratios(times: dict[str, list[float]], base: str) -> dict[str, tuple[float, float, float]]:
    """Median, first and third quartile of the paired ratios to `base`."""
    result = {}
    for name, values in times.items():
        paired = sorted(value / reference for value, reference in zip(values, times[base], strict=True))
        result[name] = (median(paired), paired[len(paired) // 4], paired[-1 - len(paired) // 4])
    return result


@dataclass
class Served:
    """What came of the served batches."""

    request: Request
    answers: list[int]
    to_single: list[float]
    to_peft: list[float]
    seconds: dict[str, float]
    ratios: dict[str, tuple[float, float, float]]
    rounds: int


@torch.no_grad()
def serve(
    path: str,
    encoder: Encoder,
    heads: Heads,
    tokens: Tokens,
    tasks: list[Task],
    methods: Sequence[str],
    folder: Path,
    seconds: float,
    progress: Callable,
) -> Served:
    """Answer a batch of everyone, compare each of its rows, and time one batch per method against the bare model and PEFT."""
    device = encoder.device
    request = build_request(tasks, methods)
    texts = tokens(request.texts, device)
    encoder.materialize(request.names)
    bare = load_backbone(path, device)
    servers = {
        method: PeftServer(load_backbone(path, device), folder, [adapter(method, task.name) for task in tasks])
        for method in methods
    }
    _, answers = answer(encoder, heads, texts, request)
    to_single = single_task_difference(encoder, texts, request)
    to_peft = peft_difference(encoder, texts, request, servers)

    def run_bare():
        return bare(input_ids=texts.input_ids, attention_mask=texts.attention_mask).last_hidden_state

    runs = {"bare model": run_bare, "bare model again": run_bare}
    for method in methods:
        owners = [adapter(method, task.name) for task in tasks] + [None]
        rows = [owners[i % len(owners)] for i in range(len(request.texts))]
        runs[f"peft_ops {METHODS[method]}, mixed batch"] = mixed_run(encoder, texts, rows)
        runs[f"PEFT {METHODS[method]}, adapter by adapter"] = peft_run(servers[method], texts, rows, encoder.hidden_size)
    times = interleaved(runs, seconds, device, progress)
    medians = {name: median(values) for name, values in times.items()}
    return Served(request, answers.tolist(), to_single, to_peft, medians, ratios(times, "bare model"), len(times["bare model"]))


def mixed_run(encoder: Encoder, texts: Texts, rows: list[str | None]) -> Callable:
    batch = TaskBatch.of_rows(rows, encoder.device)
    encoder.materialize(batch.names)
    return lambda: encoder(texts, batch).states


def peft_run(server: PeftServer, texts: Texts, rows: list[str | None], width: int) -> Callable:
    parts = parts_of(texts, rows)
    out = torch.zeros(*texts.input_ids.shape, width, device=texts.input_ids.device)
    return lambda: server.loop(parts, out)
