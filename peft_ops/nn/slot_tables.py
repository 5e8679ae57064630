"""The device side of a TaskBank: tables of fixed slots, and the order of writes to a slot and reads from it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

ALIGN = 16  # columns: kernels load 128 bits at once where a row's address and stride are multiples of 16


class HostTask(NamedTuple):
    """A task in host memory, in the tables' dtype: its vectors as one row, its prompt [p, E] or None."""

    row: Tensor
    prompt: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.row.nbytes + (0 if self.prompt is None else self.prompt.nbytes)


class SlotTables:
    """One buffer [slots + 2, sum of widths]: a row per slot, ones for the base model, NaN for a bad id; and prompts.

    A slot that holds nothing is NaN too. Nothing is ever allocated again, so that captured CUDA graphs stay valid. On
    CUDA slots are written on a stream of their own, after the last batch that read the slot; a reader waits for the
    write. Not thread-safe: the bank's lock is held around every call.
    """

    def __init__(
        self, slots: int, widths: Mapping[str, int], dtype: torch.dtype, device: torch.device | str, P: int, E: int
    ):
        self.columns, end = {}, 0
        for module, width in widths.items():
            self.columns[module] = slice(end, end + width)
            end += -(-width // ALIGN) * ALIGN
        with torch.inference_mode(False):
            self.buffer = torch.full((slots + 2, end), float("nan"), dtype=dtype, device=device)
            self.buffer[slots] = 1
            # of an empty slot: NaN, and all of it
            self.prompts = torch.full((slots, P, E), float("nan"), dtype=dtype, device=device)
            self.lengths = torch.full((slots,), P, dtype=torch.int32, device=device)
        self.prompt_tokens = [P] * slots  # lengths, on the host
        # .data: a write to another slot is not one to what autograd saved, whose slots are in use
        self._rows, self._prompts, self._lengths = self.buffer.data, self.prompts.data, self.lengths.data
        self.device, self.row_size = self.buffer.device, end
        self._written: list[torch.cuda.Event | None] = [None] * slots
        self._read: list[dict[int, torch.cuda.Event]] = [{} for _ in range(slots)]  # the last of each stream
        self._stream = None
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)
            torch.cuda.current_stream(self.device).synchronize()  # once: whichever streams read these fills later

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes + self.prompts.nbytes + self.lengths.nbytes

    def write(self, slot: int, task: HostTask) -> None:
        """Host memory that is freed meanwhile is safe: torch's pinned allocator waits for the copies that read it."""
        length = 0 if task.prompt is None else len(task.prompt)
        with self._writing(slot):
            self._rows[slot].copy_(task.row, non_blocking=True)
            if not self.prompts.numel():
                return
            if length:
                self._prompts[slot, :length].copy_(task.prompt, non_blocking=True)
            self._prompts[slot, length:].zero_()  # nothing stays of the task before
            self._lengths[slot].fill_(length)
        self.prompt_tokens[slot] = length

    def wipe(self, slot: int) -> None:
        with self._writing(slot):
            self._rows[slot].fill_(float("nan"))
            self._prompts[slot].fill_(float("nan"))
            self._lengths[slot].fill_(self.prompts.shape[1])

    @contextmanager
    def _writing(self, slot: int) -> Iterator[None]:
        with torch.no_grad():
            if self._stream is None:
                yield
                return
            with torch.cuda.stream(self._stream):
                for event in self._read[slot].values():
                    self._stream.wait_event(event)
                self._read[slot].clear()
                yield
                self._written[slot] = self._stream.record_event()

    def begin_reading(self, slots: Iterable[int]) -> None:
        """What the current stream does from here on sees the slots as they were last written."""
        if self._stream is None:
            return
        stream = torch.cuda.current_stream(self.device)
        for slot in slots:
            event = self._written[slot]
            if event is not None and event.query():
                self._written[slot] = None  # done: the next batch need not ask
            elif event is not None:
                stream.wait_event(event)

    def end_reading(self, slots: Iterable[int]) -> None:
        """The next write to the slots waits for all that the current stream has been given up to here."""
        if self._stream is None:
            return
        stream = torch.cuda.current_stream(self.device)
        event = stream.record_event()
        for slot in slots:
            self._read[slot][stream.cuda_stream] = event

    def ids(self, ids: Sequence[int]) -> Tensor:
        """int64 on the device, without waiting for it."""
        on_host = torch.tensor(ids, dtype=torch.int64, pin_memory=self._stream is not None)
        return on_host.to(self.device, non_blocking=True)
