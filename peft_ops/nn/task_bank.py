"""Vectors and prompts of many tasks: fixed slots on the device, the rest in host memory or at a loader."""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Condition
from typing import NamedTuple

import torch
from torch import Tensor

from peft_ops._checks import FLOATS, check_tensor, shape
from peft_ops.nn.adapters import check_names, check_size, check_type, similar
from peft_ops.nn.slot_tables import HostTask, SlotTables

BASE = "__base__"  # PEFT's name of the base model in adapter_names

Task = tuple[Mapping[str, Tensor], Tensor | None]


class BankStats(NamedTuple):
    """Counts since the bank was made; a batch counts each of its tasks once.

    hits, misses: tasks that `use` found on the device, and that it had to copy there; evictions: tasks that made room;
    loads: calls of the loader; copied_bytes: host to device; device_bytes, host_bytes: what the bank holds now.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    loads: int = 0
    copied_bytes: int = 0
    device_bytes: int = 0
    host_bytes: int = 0


class Held(NamedTuple):
    """Where a task is while it is held, known on the host: its slot, and the length of its prompt."""

    slot: int
    num_virtual_tokens: int


class SlotsInUse(RuntimeError):
    """Slots that a batch needs are held by other batches."""


class TaskBank:
    """(IA)^3 vectors and prompts of any number of tasks, `slots` of them on the device at a time.

        bank = TaskBank(64, {"layers.0.k_proj": 1024}, torch.bfloat16, "cuda")
        bank.put("reviews", {"layers.0.k_proj": vector})
        with bank.use(["reviews", None, "reviews"]) as task_ids:
            y = ia3_linear(x, weight, ia3_l=bank.table("layers.0.k_proj"), task_ids=task_ids)

    The tables are the operators' `ia3_l` and `prompts`, as views into one buffer: nothing is copied to call them, and
    they never move, so that a captured CUDA graph stays valid (capture with ids in a tensor of yours, copy a batch's
    into it inside `use`, replay there). Bringing a task in is one row copy, on a stream of its own; it takes the slot
    of the task whose last use is the longest ago, and waits for the work of the batches that read that slot. A module
    that a task does not name is a row of ones. Slots without a task are NaN.

    All methods may be called from several threads at once. For serving: no gradient reaches the tables. Pinned host
    copies, on CUDA, take the power of two above their size.

    Args:
        slots: tasks on the device, which is also the most that one batch may have.
        widths: features of each module, by the name it has in PEFT's state dict after `base_model.model.`.
        dtype: of the tables; fp32, fp16 or bf16 (or fp64). Tasks are cast to it when they are put.
        device: where the tables live.
        num_virtual_tokens: rows of the longest prompt; 0: no prompts.
        token_dim: features of a prompt.
        feedforward: modules whose vector scales their input instead of their output; None: not known. `accelerate` asks
            for modules that PEFT has not wrapped.
        loader: called with the name of a task that is not here, and gives its (vectors, prompt or None), or raises
            KeyError. It runs in the thread that asked, outside the lock, one call at a time for one name.
        host_capacity: how many of the loader's tasks keep a copy in host memory, those used last. None: all. What was
            put stays. On a CPU glibc's heap may fragment where copies come and go: 2.4 GB of copies and slots took 2.4
            to 3.5 GB from run to run, 2.43 with MALLOC_MMAP_THRESHOLD_=1000000 in the environment.

    Raises:
        TypeError, ValueError: sizes, dtype or device that make no tables; a host_capacity without a loader.
    """

    def __init__(
        self,
        slots: int,
        widths: Mapping[str, int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        num_virtual_tokens: int = 0,
        token_dim: int = 0,
        feedforward: Iterable[str] | None = None,
        loader: Callable[[str], Task] | None = None,
        host_capacity: int | None = None,
    ):
        op = "TaskBank"
        check_size(op, "slots", slots)
        check_type(op, "widths", widths, Mapping, "a mapping of modules to their features")
        for module, width in widths.items():
            check_size(op, f"widths[{module!r}]", width)
        if dtype not in FLOATS:
            raise TypeError(f"{op}: dtype must be one of {', '.join(map(str, FLOATS))}, got {dtype}")
        check_size(op, "num_virtual_tokens", num_virtual_tokens, 0)
        check_size(op, "token_dim", token_dim, min(num_virtual_tokens, 1))
        if not widths and not num_virtual_tokens:
            raise ValueError(f"{op}: widths must hold a module where there are no prompts, got {dict(widths)}")
        if host_capacity is not None:
            check_size(op, "host_capacity", host_capacity, 0)
            if loader is None:
                raise ValueError(f"{op}: host_capacity must be None without a loader, got {host_capacity}")
        if feedforward is not None:
            feedforward = frozenset(check_names(op, "feedforward", feedforward))
            for module in feedforward - set(widths):
                raise ValueError(f"{op}: feedforward must name modules of widths, got {module!r}")
        self.slots, self.widths, self.dtype, self.feedforward = slots, dict(widths), dtype, feedforward
        self._tables = tables = SlotTables(slots, widths, dtype, device, num_virtual_tokens, token_dim)
        self._rows = {module: tables.buffer[:, columns] for module, columns in tables.columns.items()}
        self._table = {module: rows[:slots] for module, rows in self._rows.items()}
        self._loader, self._capacity = loader, host_capacity
        self._changed = Condition()  # one lock for what follows; notified when a slot or a loaded task comes free
        self._put: dict[str, HostTask] = {}
        self._loaded: OrderedDict[str, HostTask] = OrderedDict()  # the one used last at the end
        self._loading: set[str] = set()
        self._slot_of: dict[str, int] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()  # tasks on the device that no batch uses, likewise
        self._task_of: list[str | None] = [None] * slots
        self._pins = [0] * slots
        self._free = [*range(slots)][::-1]
        self._stats = dict.fromkeys(("hits", "misses", "evictions", "loads", "copied_bytes"), 0)

    @property
    def device(self) -> torch.device:
        return self._tables.device

    @property
    def prompts(self) -> Tensor | None:
        """[slots, P, E], what prompt operators take as `prompts`; None in a bank without prompts."""
        return self._tables.prompts if self._tables.prompts.shape[1] else None

    @property
    def prompt_lengths(self) -> Tensor | None:
        """int32 [slots]; 0 for a task without a prompt."""
        return None if self.prompts is None else self._tables.lengths

    def table(self, module: str) -> Tensor:
        """[slots, width], a view with contiguous rows: what (IA)^3 operators take as `ia3_l`."""
        return self._view(self._table, module)

    def rows(self, module: str) -> Tensor:
        """[slots + 2, width], for gathers without masks: row `slots` is ones, the base model's, row `slots` + 1 NaN."""
        return self._view(self._rows, module)

    def copy_rows(self, slots: Sequence[int]) -> dict[str, Tensor]:
        """Each module's [len(slots), width], views into one copy: for what outlives the block that has them."""
        rows = torch.stack([self._tables.buffer[slot] for slot in slots])  # a list as index would synchronise a GPU
        return {module: rows[:, columns] for module, columns in self._tables.columns.items()}

    def _view(self, views: Mapping[str, Tensor], module: str) -> Tensor:
        if module not in views:
            raise KeyError(f"TaskBank: module must be one of the bank's, got {module!r}{similar(module, views)}")
        return views[module]

    def names(self) -> list[str]:
        """Tasks that are here, on the host or the device; a loader may know more."""
        with self._changed:
            return [*dict.fromkeys((*self._put, *self._loaded, *self._slot_of))]

    def __contains__(self, name) -> bool:
        with self._changed:
            return self._is_here(name)

    def __len__(self) -> int:
        return len(self.names())

    @property
    def stats(self) -> BankStats:
        with self._changed:
            host = sum(task.nbytes for tasks in (self._put, self._loaded) for task in tasks.values())
            return BankStats(**self._stats, device_bytes=self._tables.nbytes, host_bytes=host)

    def put(self, name: str, vectors: Mapping[str, Tensor], prompt: Tensor | None = None) -> None:
        """Keep a task in host memory; the first batch that uses it brings it to the device.

        A name that is here already gets the new vectors: batches that use the old ones keep them to their end, in their
        slot, and later batches get the new ones.

        Args:
            vectors: [width], or PEFT's [width, 1] or [1, width], of some of the bank's modules; any float dtype.
            prompt: [p, E] with p at most P, or None.

        Raises:
            TypeError, ValueError: a module or shape that the bank does not have; a value that is not finite, or becomes
                so in the bank's dtype.
        """
        op = "TaskBank.put"
        check_type(op, "name", name, str, "a name")
        if name in ("", BASE):
            raise ValueError(f"{op}: name must not be the base model's, got {name!r}")
        task = self._pack(op, name, vectors, prompt)
        with self._changed:
            self._forget(name)
            self._put[name] = task

    def remove(self, name: str) -> None:
        """Forget a task, on the host and, once no batch uses it, on the device; a loader may bring it again."""
        with self._changed:
            if not self._is_here(name):
                raise KeyError(f"TaskBank.remove: {self._unknown(name)}")
            self._forget(name)

    @contextmanager
    def use(self, rows: Sequence[str | None], timeout: float = 0.0) -> Iterator[Tensor]:
        """The ids of a batch, whose tasks keep their slots until the block ends; tasks that are not here are loaded.

        The ids mean nothing after the block, and a backward that reads the tables belongs inside. On CUDA everything
        that reads the tables belongs on the stream that is current at its end, or before it; nothing is synchronised.

        Args:
            rows: one name per row; None, or "__base__", is the base model.
            timeout: seconds to wait for slots that other batches use.

        Yields:
            int64 [len(rows)] on the bank's device, -1 for the base model.

        Raises:
            KeyError: a name that is not here, and that the loader does not know.
            ValueError: more tasks than slots.
            SlotsInUse: a RuntimeError: slots that other batches use are needed.
            RuntimeError: inside the capture of a CUDA graph.
        """
        op = "TaskBank.use"
        rows = [None if name == BASE else name for name in check_names(op, "rows", rows)]
        with self._held(op, rows, timeout) as slots:
            yield self._tables.ids([-1 if name is None else slots[name] for name in rows])

    @contextmanager
    def hold(self, names: Sequence[str | None], timeout: float = 0.0) -> Iterator[dict[str, Held]]:
        """`use` for ids of one's own: where each task is, until the block ends."""
        op = "TaskBank.hold"
        names = [None if name == BASE else name for name in check_names(op, "names", names)]
        with self._held(op, names, timeout) as slots:
            yield {name: Held(slot, self._tables.prompt_tokens[slot]) for name, slot in slots.items()}

    @contextmanager
    def _held(self, op: str, rows: Sequence[str | None], timeout: float) -> Iterator[dict[str, int]]:
        slots = self._pin(op, [*dict.fromkeys(name for name in rows if name is not None)], timeout)
        try:
            yield slots
        finally:
            self._unpin(slots.values())

    def prefetch(self, names: Sequence[str | None]) -> int:
        """Bring tasks to the device, into slots that no batch uses, before a batch needs them.

        On CUDA the copies run beside the work of the current stream. The loader runs in this thread: call from another
        one to read files in the background.

        Returns:
            How many of the names are on the device now: fewer than asked for where batches use the slots.

        Raises:
            KeyError, ValueError: as `use`.
        """
        op = "TaskBank.prefetch"
        names = [*dict.fromkeys(name for name in check_names(op, "names", names) if name not in (None, BASE))]
        self._check_batch(op, "names", names)
        brought: dict[str, HostTask] = {}
        self._bring(op, names, brought)
        with self._changed:
            for name in names:  # the oldest is one of ours only when all others are gone
                if name in self._idle:
                    self._idle.move_to_end(name)
            for name in names:
                room = bool(self._free) or (bool(self._idle) and next(iter(self._idle)) not in names)
                task = self._task(name) or brought.get(name)
                if name not in self._slot_of and room and task is not None:
                    self._place(name, task)
                    self._idle[name] = None
            return sum(name in self._slot_of for name in names)

    def __repr__(self) -> str:
        prompts = "" if self.prompts is None else f", prompts={shape(self.prompts)}"
        return (
            f"TaskBank(slots={self.slots}, modules={len(self.widths)}, features={sum(self.widths.values())}{prompts}, "
            f"{self.dtype}, {self.device}, tasks={len(self)})"
        )

    def _pack(self, op: str, name: str, vectors: Mapping[str, Tensor], prompt: Tensor | None) -> HostTask:
        check_type(op, "vectors", vectors, Mapping, "a mapping of modules to vectors")
        tables, pin = self._tables, self.device.type == "cuda"
        with torch.inference_mode(False), torch.no_grad():
            row = torch.ones(tables.row_size, dtype=self.dtype, pin_memory=pin)
            for module, vector in vectors.items():
                if module not in tables.columns:
                    got = f"{module!r}{similar(module, tables.columns)}"
                    raise ValueError(f"{op}: vectors of {name!r} must be of modules of the bank, got {got}")
                arg, width = f"{module!r} of {name!r}", self.widths[module]
                check_tensor(op, arg, vector, dtypes=FLOATS)
                if vector.numel() != width or width not in vector.shape:
                    raise ValueError(f"{op}: {arg} must have shape [{width}], got {shape(vector)}")
                row[tables.columns[module]] = vector.flatten()
            # a finite sum has finite terms; asking each number took 20 times as long, on half a million in bf16
            if not torch.isfinite(row.sum(dtype=torch.float32)):
                for module, vector in vectors.items():
                    _check_finite(op, f"{module!r} of {name!r}", row[tables.columns[module]], vector)
            if prompt is None:
                return HostTask(row, None)
            arg, (_, P, E) = f"the prompt of {name!r}", tables.prompts.shape
            check_tensor(op, arg, prompt, dtypes=FLOATS, dim=2)
            if not P:
                raise ValueError(
                    f"{op}: {arg} must be None in a bank made with num_virtual_tokens=0, got {shape(prompt)}"
                )
            if prompt.shape[1] != E or not 0 < len(prompt) <= P:
                raise ValueError(f"{op}: {arg} must have shape [p, {E}] with p from 1 to {P}, got {shape(prompt)}")
            copy = torch.empty(prompt.shape, dtype=self.dtype, pin_memory=pin).copy_(prompt)
            _check_finite(op, arg, copy, prompt)
            return HostTask(row, copy)

    def _pin(self, op: str, names: Sequence[str], timeout: float) -> dict[str, int]:
        """Slots of the names, all or none, so that two batches never wait for each other's."""
        self._check_batch(op, "rows", names)
        brought: dict[str, HostTask] = {}
        end = time.monotonic() + timeout

        def settled() -> bool:
            return bool(self._absent(names, brought)) or self._fits(names)

        while True:
            self._bring(op, names, brought)
            with self._changed:
                if not self._changed.wait_for(settled, max(0.0, end - time.monotonic())):
                    raise SlotsInUse(self._all_in_use(op, names))
                if self._absent(names, brought):  # others dropped it meanwhile: it is loaded again
                    continue
                missing = [name for name in names if name not in self._slot_of]
                for name in names:  # what is here is held before room is made for the others
                    if name in self._slot_of:
                        self._hold(name)
                for name in missing:
                    self._place(name, self._task(name) or brought[name])
                    self._hold(name)
                self._stats["hits"] += len(names) - len(missing)
                self._stats["misses"] += len(missing)
                slots = {name: self._slot_of[name] for name in names}
                self._tables.begin_reading(slots.values())
                return slots

    def _hold(self, name: str) -> None:
        self._idle.pop(name, None)
        self._pins[self._slot_of[name]] += 1
        if name in self._loaded:
            self._loaded.move_to_end(name)

    def _unpin(self, slots: Iterable[int]) -> None:
        with self._changed:
            self._tables.end_reading(slots)
            for slot in slots:
                self._pins[slot] -= 1
                if self._pins[slot]:
                    continue
                name = self._task_of[slot]
                if self._slot_of.get(name) == slot:
                    self._idle[name] = None
                else:  # replaced or removed while it was in use
                    self._release(slot)
            self._changed.notify_all()

    def _place(self, name: str, task: HostTask) -> None:
        """A slot for a task: a free one, or that of the task whose last use is the longest ago."""
        if self._free:
            slot = self._free.pop()
        else:
            oldest, _ = self._idle.popitem(last=False)
            slot = self._slot_of.pop(oldest)
            self._stats["evictions"] += 1
        self._tables.write(slot, task)
        self._stats["copied_bytes"] += task.nbytes
        self._slot_of[name], self._task_of[slot] = slot, name

    def _forget(self, name: str) -> None:
        self._put.pop(name, None)
        self._loaded.pop(name, None)
        slot = self._slot_of.pop(name, None)
        self._idle.pop(name, None)
        if slot is not None and not self._pins[slot]:
            self._release(slot)

    def _release(self, slot: int) -> None:
        self._tables.wipe(slot)
        self._task_of[slot] = None
        self._free.append(slot)
        self._changed.notify_all()

    def _bring(self, op: str, names: Iterable[str], brought: dict[str, HostTask]) -> None:
        """Add to `brought` what is not here, from the loader: its host copy may be dropped again before it is used."""
        for name in self._absent(names, brought):
            task = self._load(op, name)
            if task is not None:
                brought[name] = task

    def _load(self, op: str, name: str) -> HostTask | None:
        """A task from the loader, which one thread at a time calls for one name; None if another has brought it."""
        with self._changed:
            self._changed.wait_for(lambda: name not in self._loading)
            if self._is_here(name):
                return None
            if self._loader is None:
                raise KeyError(f"{op}: {self._unknown(name)}")
            self._loading.add(name)
        try:
            task = self._pack("TaskBank.loader", name, *self._loader(name))
            with self._changed:
                self._stats["loads"] += 1
                if name not in self._put:  # what was put meanwhile is newer
                    self._loaded[name] = task
                while self._capacity is not None and len(self._loaded) > self._capacity:
                    self._loaded.popitem(last=False)
                return task
        finally:
            with self._changed:
                self._loading.discard(name)
                self._changed.notify_all()

    def _task(self, name: str) -> HostTask | None:
        return self._put.get(name) or self._loaded.get(name)

    def _is_here(self, name) -> bool:
        return name in self._put or name in self._loaded or name in self._slot_of

    def _absent(self, names: Iterable[str], brought: Mapping[str, HostTask]) -> list[str]:
        with self._changed:
            return [name for name in names if not self._is_here(name) and name not in brought]

    def _fits(self, names: Sequence[str]) -> bool:
        needed = sum(name not in self._slot_of for name in names)
        return needed <= len(self._free) + len(self._idle) - sum(name in self._idle for name in names)

    def _check_batch(self, op: str, arg: str, names: Sequence[str]) -> None:
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{op}: must stand outside the capture of a CUDA graph; capture with ids of your own")
        if len(names) > self.slots:
            raise ValueError(
                f"{op}: {arg} must name at most {self.slots} tasks, as many as the bank has slots, got {len(names)}"
            )

    def _all_in_use(self, op: str, names: Sequence[str]) -> str:
        needed = sum(name not in self._slot_of for name in names)
        held = [f"{self._task_of[slot]!r} by {count}" for slot, count in enumerate(self._pins) if count]
        more = f" and {len(held) - 10} more" if len(held) > 10 else ""
        return (
            f"{op}: {needed} more tasks must find room in {self.slots} slots, got {len(held)} slots that batches use: "
            f"{', '.join(held[:10])}{more}; end a batch, or pass a timeout"
        )

    def _unknown(self, name) -> str:
        return f"a name must be of a task that was put, got {name!r}{similar(name, self.names())}"


def _check_finite(op: str, arg: str, copy: Tensor, source: Tensor) -> None:
    wrong = ~torch.isfinite(copy.flatten())
    if wrong.any():
        at, dtype = int(wrong.to(torch.uint8).argmax()), str(copy.dtype).removeprefix("torch.")
        raise ValueError(f"{op}: {arg} must be finite in {dtype}, got {source.flatten()[at].item()} at {at}")
