"""One batch for everyone: adapters of both methods beside the base model, compared with PEFT and timed against it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from peft_ops.demo.data import Task
from peft_ops.demo.model import Encoder, Heads, Hidden, Texts, Tokens, load_backbone
from peft_ops.demo.peft_side import PeftServer
from peft_ops.demo.timing import Timing, time_serving
from peft_ops.demo.train import adapter
from peft_ops.nn import TaskBatch

ROWS = 32  # of the served batch
TIMED_ROWS = (8, 32)  # a few requests at a time, and many


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
    """Held-out texts; neighbouring rows belong to different adapters, every third to the base model."""
    owners = [(task, method) for task in tasks for method in (*methods, "head")]
    picked = []
    for i in range(rows):
        task, method = owners[i % len(owners)]
        text, label = task.held_out[i * 37 % len(task.held_out)]  # a stride: the held-out texts are ordered by label
        picked.append(
            (
                None if method == "head" else adapter(method, task.name),
                adapter(method, task.name),
                text,
                label,
                task.labels,
            )
        )
    return Request(*map(list, zip(*picked, strict=True)))


@torch.no_grad()
def answer(encoder: Encoder, heads: Heads, texts: Texts, request: Request) -> tuple[Hidden, Tensor]:
    """Hidden states and predicted label indices of a mixed batch, in one pass."""
    hidden = encoder(texts, TaskBatch.of_rows(request.adapters, encoder.device, request.names))
    return hidden, heads(hidden.pooled(), TaskBatch.of_rows(request.heads, encoder.device)).argmax(1).cpu()


@torch.no_grad()
def single_task_difference(encoder: Encoder, texts: Texts, request: Request) -> list[float]:
    """Per row, the largest difference to a batch of the same shape in which all rows belong to the row's adapter."""
    names, device = request.names, encoder.device
    mixed = encoder(texts, TaskBatch.of_rows(request.adapters, device, names)).states
    worst = [0.0] * len(request.texts)
    for name in dict.fromkeys(request.adapters):
        alone = encoder(texts, TaskBatch.of_rows([name] * len(worst), device, names)).states
        for row, owner in enumerate(request.adapters):
            if owner == name:
                worst[row] = (mixed[row] - alone[row]).abs().max().item()
    return worst


@torch.no_grad()
def peft_difference(encoder: Encoder, texts: Texts, request: Request, servers: dict[str, PeftServer]) -> list[float]:
    """Per row, the largest difference of the text's states to PEFT's run of the whole batch with that one adapter."""
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


@dataclass
class Served:
    """What came of the served batches."""

    request: Request
    answers: list[int]
    to_single: list[float]
    to_peft: list[float]
    timings: list[Timing]


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
    """Answer a batch of everyone, compare its rows, and time one batch per method against the bare model and PEFT."""
    device = encoder.device
    request = build_request(tasks, methods)
    texts = tokens(request.texts, device)
    encoder.keep_table(request.names)
    adapters = {method: [adapter(method, task.name) for task in tasks] for method in methods}
    servers = {method: PeftServer(load_backbone(path, device), folder, names) for method, names in adapters.items()}
    _, answers = answer(encoder, heads, texts, request)
    to_single = single_task_difference(encoder, texts, request)
    to_peft = peft_difference(encoder, texts, request, servers)
    bare = load_backbone(path, device)
    timings = [
        time_serving(bare, encoder, servers, adapters, texts[torch.arange(rows)], seconds / len(TIMED_ROWS), progress)
        for rows in TIMED_ROWS
    ]
    return Served(request, answers.tolist(), to_single, to_peft, timings)
