"""Which adapter each row of a batch belongs to, said once: `with tasks(["reviews", None, "legal"]): model(...)`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from peft_ops._checks import IDS, check_task_ids, check_tensor
from peft_ops.nn.adapters import check_adapters, check_names, check_type
from peft_ops.ops.task_plan import plan_tasks
from peft_ops.reference import TaskPlan


class TaskBatch:
    """The adapters of one batch, in the order of the tables that modules stack, and the id of each row.

    Attributes:
        names: adapters present in the batch; id i means names[i].
        ids: int64 [B], -1 for rows of the base model. Plans made of them are kept: change them by torch operations,
            which count, or make a new batch; not through `.data` or from a kernel of your own.

    Raises:
        TypeError: names that are no sequence of str, ids that are no tensor of integers.
        ValueError: a name twice; in `of_rows`, a row that names no adapter of `names`.
    """

    def __init__(self, names: Sequence[str], ids: Tensor):
        self.names, self.ids = check_names("TaskBatch", "names", names), ids
        if None in self.names:
            raise TypeError("TaskBatch: names must hold adapter names, without None for the base model, got None")
        if len({*self.names}) != len(self.names):
            raise ValueError(f"TaskBatch: names must differ, got {list(self.names)}")
        check_tensor("TaskBatch", "ids", ids, dtypes=IDS)
        self._plans: dict[tuple, TaskPlan] = {}

    @classmethod
    def of_rows(
        cls, rows: Sequence[str | None], device: torch.device | str = "cpu", names: Sequence[str] | None = None
    ) -> "TaskBatch":
        """One adapter name per row, None for the base model. `names` fixes the order; default: of first appearance.

        All of `names` are computed, and in training one without a row gets a gradient of zeros, which some optimizers
        move it by: give it for batches of fixed shapes, of a captured graph say.
        """
        rows = check_names("TaskBatch", "rows", rows)
        if names is None:
            names = tuple(dict.fromkeys(name for name in rows if name is not None))
        names = check_names("TaskBatch", "names", names)
        check_type("TaskBatch", "device", device, (torch.device, str, int), "a device")
        index = {name: i for i, name in enumerate(names)} | {None: -1}
        unknown = next((name for name in rows if name not in index), None)
        if unknown is not None:
            raise ValueError(f"TaskBatch: rows must name adapters of {list(names)}, got {unknown!r}")
        return cls(names, torch.tensor([index[name] for name in rows], dtype=torch.int64, device=device))

    def to(self, device: torch.device | str) -> "TaskBatch":
        return TaskBatch(self.names, self.ids.to(device))

    def for_rows(self, x: Tensor) -> Tensor | TaskPlan:
        """What an (IA)^3 operator takes as task_ids of x: on a GPU a plan, made once and shared by all layers."""
        check_type("TaskBatch", "x", x, Tensor, "a tensor")
        if not x.is_cuda:
            return self.ids
        # the operators refuse ids that divide packed rows by chance; a plan would not know
        check_task_ids("TaskBatch", self.ids, x.shape[:-1], len(self.names), x)
        rows = x.shape[:-1].numel()
        if (
            torch.compiler.is_compiling()  # a dict of plans is nothing that can be traced
            or torch.cuda.is_current_stream_capturing()  # the graph makes its own, from the ids of each replay
            or torch.is_inference_mode_enabled()  # a plan made here could not be saved for a backward later
            or self.ids.is_inference()
        ):
            return plan_tasks(self.ids, rows, len(self.names))
        key = tuple(x.shape[:-1]), self.ids._version
        if key not in self._plans:
            self._plans = {k: plan for k, plan in self._plans.items() if k[1] == key[1]}
            self._plans[key] = plan_tasks(self.ids, rows, len(self.names))
        return self._plans[key]


_current: ContextVar[TaskBatch | None] = ContextVar("peft_ops_tasks", default=None)


@contextmanager
def tasks(
    rows: "TaskBatch | Sequence[str | None]",
    device: torch.device | str = "cpu",
    model: nn.Module | None = None,
) -> Iterator[TaskBatch]:
    """Modules called inside, on this thread, read the batch's adapters from here unless they are given them.

    Outside, and on a thread that was started inside, every row is the base model's.

    Activation checkpointing runs a forward again after the block has ended: call backward() inside it, or pass the
    batch to the modules. torch.compile(fullgraph=True) cannot read a context: pass the batch there too.

    Args:
        rows: one adapter name per row, None for the base model; or a TaskBatch.
        model: where given, a name that none of its modules knows is a ValueError (`check_adapters`, which walks over
            all its modules). Without it such rows are the base model's: a module cannot tell a misspelt name from that
            of an adapter that lives in other modules.
    """
    batch = rows if isinstance(rows, TaskBatch) else TaskBatch.of_rows(rows, device)
    if model is not None:
        check_adapters(model, batch.names)
    token = _current.set(batch)
    try:
        yield batch
    finally:
        _current.reset(token)


def current_tasks() -> TaskBatch | None:
    """The batch of the innermost `with tasks(...)`, None outside: every row is the base model's."""
    return _current.get()


def batch_of(op: str, batch: TaskBatch | None) -> TaskBatch | None:
    """The batch that a module was given, or that of the context."""
    check_type(op, "batch", batch, (TaskBatch, type(None)), "a TaskBatch or None")
    return current_tasks() if batch is None else batch
