"""Few-shot training in mixed batches: a step holds rows of all tasks, an adapter gets the gradient of its own rows."""

import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_ops.demo.data import Task
from peft_ops.demo.model import Encoder, Heads, Tokens
from peft_ops.nn import PromptEncoder, TaskBatch

METHODS = {"head": "trained head only", "ia3": "(IA)^3", "ptuning": "P-Tuning"}
ROWS_PER_TASK = 16  # of one task in one step
POOL = 8  # steps whose rows are sorted by length together
EVAL_ROWS = 64
# chosen on docstrings that no run holds out
HEAD_RATE, RATES = 3e-3, {"ia3": 3e-2, "ptuning": 1e-3}
WARM_UP = 10  # steps
NUM_VIRTUAL_TOKENS, ENCODER_HIDDEN_SIZE = 4, 128


@dataclass
class Result:
    """What one method learned; the lists follow the tasks."""

    method: str
    train: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)  # parameters, the head's included
    kept: list[int] = field(default_factory=list)  # of them, those that serving needs
    seconds: float = 0.0
    loss: float = 0.0


def adapter(method: str, task: str) -> str:
    return f"{method}-{task}"


def batch_of(method: str, tasks: Iterable[str], device: torch.device) -> TaskBatch:
    """The adapters of one method, one per row; the trained head alone has none."""
    return TaskBatch.of_rows([None if method == "head" else adapter(method, task) for task in tasks], device)


def heads_of(method: str, tasks: Iterable[str], device: torch.device) -> TaskBatch:
    return TaskBatch.of_rows([adapter(method, task) for task in tasks], device)


def mixed_steps(tasks: list[Task], steps: int, seed: int) -> Iterator[list[tuple[int, str, int]]]:
    """Rows (task, text, label) of each step, as many of every task; texts of like length meet, which saves pads."""
    rng = random.Random(seed)
    queues: list[list[tuple[str, int]]] = [[] for _ in tasks]
    for start in range(0, steps, POOL):
        count = min(POOL, steps - start)
        pool: list[list] = [[] for _ in range(count)]
        for number, task in enumerate(tasks):
            while len(queues[number]) < count * ROWS_PER_TASK:
                queues[number] += rng.sample(task.train, len(task.train))
            rows = sorted(queues[number][: count * ROWS_PER_TASK], key=lambda row: len(row[0]))
            del queues[number][: count * ROWS_PER_TASK]
            for step in range(count):
                pool[step] += [(number, *row) for row in rows[step * ROWS_PER_TASK : (step + 1) * ROWS_PER_TASK]]
        rng.shuffle(pool)
        yield from pool


def add_adapters(encoder: Encoder, method: str, tasks: list[Task], kind: str) -> dict[str, list[nn.Parameter]]:
    """New parameters per task."""
    if method == "ia3":
        return {task.name: encoder.add_ia3(adapter(method, task.name)) for task in tasks}
    if method == "ptuning":
        width = encoder.word_embeddings.shape[1]
        return {
            task.name: encoder.add_prompt(
                adapter(method, task.name), PromptEncoder(NUM_VIRTUAL_TOKENS, width, kind, ENCODER_HIDDEN_SIZE)
            )
            for task in tasks
        }
    return {task.name: [] for task in tasks}


def fit(
    encoder: Encoder, heads: Heads, tokens: Tokens, tasks: list[Task], method: str, options, progress: Callable
) -> Result:
    """Train one method's adapters and heads on all tasks together. Options: steps, seed, encoder."""
    torch.manual_seed(options.seed)
    device = encoder.device
    adapters = add_adapters(encoder, method, tasks, options.encoder)
    classifiers = {
        task.name: heads.add(adapter(method, task.name), encoder.hidden_size, len(task.labels), device)
        for task in tasks
    }
    result = Result(method)
    started = time.perf_counter()
    features = Features(encoder, tokens, method, tasks)
    groups = [{"params": [p for head in classifiers.values() for p in head], "lr": HEAD_RATE}]
    if method in RATES:
        groups.append({"params": [p for own in adapters.values() for p in own], "lr": RATES[method]})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, options.steps))
    for rows in progress(mixed_steps(tasks, options.steps, options.seed), total=options.steps, desc=METHODS[method]):
        names = [tasks[number].name for number, _, _ in rows]
        logits = heads(features([text for _, text, _ in rows], names), heads_of(method, names, device))
        labels = torch.tensor([label for _, _, label in rows], device=device)
        loss = (
            F.cross_entropy(logits, labels, reduction="sum") / ROWS_PER_TASK
        )  # a task's mean does not depend on the others
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        result.loss = loss.item() / len(tasks)
    result.seconds = time.perf_counter() - started
    for task in tasks:
        head = sum(p.numel() for p in classifiers[task.name])
        own = sum(p.numel() for p in adapters[task.name])
        table = NUM_VIRTUAL_TOKENS * encoder.word_embeddings.shape[1]
        result.trained.append(head + own)
        result.kept.append(head + (table if method == "ptuning" else own))
    return result


def rate_factor(step: int, steps: int) -> float:
    """Warm-up, then a straight line down to a twentieth."""
    return min(1.0, (step + 1) / WARM_UP) * max(0.05, 1 - step / steps)


class Features:
    """Pooled features of texts under one method. Those of the frozen model never change: each text is computed once."""

    def __init__(self, encoder: Encoder, tokens: Tokens, method: str, tasks: list[Task]):
        self.encoder, self.tokens, self.method = encoder, tokens, method
        self.cache: dict[str, Tensor] = {}
        for task in tasks:
            tokens.add([text for text, _ in task.train + task.held_out])
        if method == "head":
            self._fill(sorted({text for task in tasks for text, _ in task.train}, key=len))

    @torch.no_grad()
    def _fill(self, texts: list[str]) -> None:
        for start in range(0, len(texts), EVAL_ROWS):
            chunk = texts[start : start + EVAL_ROWS]
            self.cache.update(zip(chunk, self.compute(chunk, [""] * len(chunk)), strict=True))

    def compute(self, texts: list[str], names: list[str]) -> Tensor:
        device = self.encoder.device
        return self.encoder(self.tokens(texts, device), batch_of(self.method, names, device)).pooled()

    def __call__(self, texts: list[str], names: list[str]) -> Tensor:
        if self.method == "head":
            return torch.stack([self.cache[text] for text in texts])
        return self.compute(texts, names)


@torch.no_grad()
def predict(encoder: Encoder, heads: Heads, tokens: Tokens, method: str, rows: list[tuple[str, str]]) -> Tensor:
    """Label indices of (task, text) rows, in mixed batches of like length."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][1]))
    predicted = torch.empty(len(rows), dtype=torch.int64)
    device = encoder.device
    for start in range(0, len(rows), EVAL_ROWS):
        chunk = order[start : start + EVAL_ROWS]
        names = [rows[i][0] for i in chunk]
        hidden = encoder(tokens([rows[i][1] for i in chunk], device), batch_of(method, names, device))
        predicted[chunk] = heads(hidden.pooled(), heads_of(method, names, device)).argmax(1).cpu()
    return predicted


def accuracies(
    encoder: Encoder, heads: Heads, tokens: Tokens, tasks: list[Task], method: str, part: str
) -> list[float]:
    """Share of right answers per task; part is "train" or "held_out"."""
    rows = [(task.name, text, label) for task in tasks for text, label in getattr(task, part)]
    predicted = predict(encoder, heads, tokens, method, [row[:2] for row in rows])
    right = predicted == torch.tensor([label for _, _, label in rows])
    return [right[[row[0] == task.name for row in rows]].double().mean().item() for task in tasks]
