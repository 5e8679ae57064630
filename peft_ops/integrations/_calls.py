"""One call of an accelerated model: which adapter each row of its batch belongs to, and where its layers read it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import reduce
from types import MappingProxyType

import torch
from torch import Tensor, nn

from peft_ops.nn.task_bank import Held
from peft_ops.nn.tasks import TaskBatch
from peft_ops.reference import TaskPlan


class Shared:
    """What the modules of one accelerated model share. It holds no module and no tensor: a deep copy is cheap.

    Attributes:
        level: "auto" or "module".
        bank: a TaskBank, or None.
        timeout: seconds to wait for slots of the bank that other batches use.
        configs: the adapters' configs that the model had when its modules were last looked at.
        disabled: inside disable_adapter(): every row is the base model's, a bank's too.
        layers, disabled_layers: the keys of all (IA)^3 layers, and of those whose adapters are disabled.
        mixed: a forward with gradients has had adapter names; a layer that runs without any in backward() may be its.
        in_blocks: such names came from using_adapters(); so may the whole model be that runs without any in backward().
    """

    def __init__(self, level: str, bank=None, timeout: float = 0.0):
        self.level, self.bank, self.timeout = level, bank, timeout
        self.configs: list = []
        self.layers: set[str] = set()
        self.disabled_layers: set[str] = set()
        self.mixed = self.in_blocks = self.disabled = False

    @property
    def is_off(self) -> bool:
        """Every row is the base model's, also in layers that only a bank has vectors for and PEFT does not know."""
        return self.disabled or (bool(self.layers) and self.disabled_layers >= self.layers)

    def __deepcopy__(self, memo):
        copy = Shared(self.level, self.bank, self.timeout)
        copy.configs = list(self.configs)
        copy.layers, copy.disabled_layers = set(self.layers), set(self.disabled_layers)
        return copy


class Call:
    """The adapters of one batch, for every layer of one model.

    Args:
        shared: of the model that is called; another model called meanwhile does not see it.
        rows: one adapter name per row, None for the base model; empty for a call without names, where PEFT's switches
            say what is active.
        repeats: layers see one row per name, or this many in a row: beams, or sequences to return.
        held: where a TaskBank has the adapters that it serves.

    Attributes:
        input_ids: what the model is called with, if it is ids; a model of texts and images tells by them which row an
            image belongs to.
    """

    def __init__(
        self,
        shared: Shared,
        rows: Sequence[str | None] = (),
        repeats: int = 1,
        held: Mapping[str, Held] = MappingProxyType({}),
    ):
        self.shared, self.rows, self.repeats, self.held = shared, tuple(rows), repeats, held
        self.steps: dict[nn.Module, tuple] = {}
        self.names = tuple(dict.fromkeys(name for name in rows if name is not None))
        self.input_ids: Tensor | None = None
        self.is_mixed = len(set(rows)) > 1
        self._batches: dict[tuple, TaskBatch] = {}
        self._tables: dict[nn.Module, Tensor] = {}
        self._masks: dict[tuple, list[Tensor]] = {}
        self._places: dict[tuple, tuple[list[Tensor], Tensor]] = {}
        self._sources: list[tuple[Tensor, int]] = []
        self._copies: dict[str, Tensor] | None = None

    def keep_bank_rows(self) -> None:
        """Copy the bank's vectors where a backward may read them: by then their slots may be other tasks'."""
        if self._copies is None and self.held and torch.is_grad_enabled():
            self._copies = self.shared.bank.copy_rows([held.slot for held in self.held.values()])

    def select(self, layer: nn.Module, vectors, features: int, x: Tensor) -> tuple[Tensor, Tensor | TaskPlan]:
        """The table [tasks, features] and the ids that an operator takes for x at this layer; ones where the layer has
        no vector of a name."""
        self.check_rows(x, layer)
        key, of_bank = getattr(layer, "_peft_ops_key", None), self.uses_bank(layer)
        if of_bank:  # without gradients no copy of a vector
            table = self._bank_table(key)
        else:
            table = self._table(layer, key, vectors, features, x.device)
        if self._sees_rows(x):
            return table, self._batch(x.device, of_bank).for_rows(x)
        return (table[(row := self._bank_rows()[self.names[0]]) : row + 1] if of_bank else table), None

    def uses_bank(self, layer: nn.Module) -> bool:
        """All names are a bank's, which has this layer: its own table serves, and no vector is copied."""
        known = bool(self.names) and self.held.keys() >= set(self.names)
        return known and getattr(layer, "_peft_ops_key", None) in self.shared.bank.widths

    def renew(self) -> None:
        """Drop what was made from vectors that have been written since: a call may outlive a step of an optimizer."""
        if any(vector._version != count for vector, count in self._sources):
            self.forget()

    def forget(self) -> None:
        for kept in (self.steps, self._tables, self._sources):
            kept.clear()

    def _batch(self, device: torch.device, of_bank: bool = False) -> TaskBatch:
        in_slots = of_bank and self._copies is None
        # autograd takes no tensor that was made in that mode
        key = device, of_bank, in_slots, torch.is_inference_mode_enabled()
        if key not in self._batches:
            index = self._bank_rows() if of_bank else {name: i for i, name in enumerate(self.names)}
            ids = torch.tensor([-1 if name is None else index[name] for name in self.rows], device=device)
            tasks = tuple(map(str, range(self.shared.bank.slots))) if in_slots else tuple(index) or ("",)
            self._batches[key] = TaskBatch(tasks, ids)
        return self._batches[key]

    def _table(self, layer: nn.Module, key: str | None, vectors, features: int, device: torch.device) -> Tensor:
        # kept for the rest of the call where nothing needs a gradient: activation checkpointing runs without gradients
        # first, and must not find that table when it runs again with them
        keep = not torch.is_grad_enabled()
        if not keep:  # an optimizer may write before the next call
            self.forget()
        if layer in self._tables:
            return self._tables[layer]
        rows = [vectors[name].flatten() if name in vectors else self.of_bank(key, name) for name in self.names]
        dtypes = {row.dtype for row in rows if row is not None}
        if len(rows) == 1 and dtypes:
            table = rows[0].unsqueeze(0)
        else:
            dtype = reduce(torch.promote_types, dtypes) if dtypes else torch.float32
            ones = torch.ones(features, dtype=dtype, device=device)
            table = torch.stack([ones if row is None else row.to(dtype) for row in rows] or [ones])
        if keep:
            self._tables[layer] = table
            self._sources += [(row, row._version) for row in rows if row is not None and not row.is_inference()]
        return table

    def of_bank(self, key: str | None, name: str | None) -> Tensor | None:
        """The bank's vector of a name, None where it has none for this layer."""
        if name not in self.held or key not in self.shared.bank.widths:
            return None
        return self._bank_table(key)[self._bank_rows()[name]]

    def _bank_table(self, key: str) -> Tensor:
        self.keep_bank_rows()
        return self.shared.bank.table(key) if self._copies is None else self._copies[key]

    def _bank_rows(self) -> dict[str, int]:
        """Where a name stands in the bank's tables, or in the copy of its rows."""
        if self._copies is None:
            return {name: held.slot for name, held in self.held.items()}
        return {name: i for i, name in enumerate(self.held)}

    def is_flat(self, x: Tensor, layer: nn.Module) -> bool:
        """The layer's model has flattened [B, S] to rows in that order before it (OPT)."""
        flat = getattr(layer, "_peft_ops_flat", False) and x.dim() == 2
        return flat and x.shape[0] != len(self.rows) and x.shape[0] % len(self.rows) == 0

    def check_rows(self, x: Tensor, layer: nn.Module) -> None:
        """Refuse an input whose first dimension is not the batch: ids that divide it by chance would mix tenants."""
        if not self.is_mixed:
            return
        sees, tokens = getattr(layer, "_peft_ops_sees", (None, ()))
        if sees is not None and not self._one_in_each_row(tokens):
            raise ValueError(
                f"adapter_names: {layer._peft_ops_key} sees {sees} where other layers see rows of the batch: all rows "
                f"must name one adapter, got {len(set(self.rows))}; or train adapters that leave such layers alone"
            )
        if not self._sees_rows(x):
            B = len(self.rows)
            raise ValueError(
                f"adapter_names: a layer must see the batch in its first dimension, {B} rows"
                f"{'' if self.repeats == 1 else f' or, in 3 dimensions, {B * self.repeats}'}, got {list(x.shape)} in "
                f"{getattr(layer, '_peft_ops_key', None) or type(layer).__name__}; give one name per row "
                f"(generate() takes adapter_names itself), one adapter, or adapters that leave such layers alone"
            )

    def _sees_rows(self, x: Tensor) -> bool:
        B, rows = len(self.rows), x.shape[0]
        return rows == B or (rows == B * self.repeats and x.dim() >= 3)

    def _one_in_each_row(self, tokens: tuple[int, ...]) -> bool:
        """As many images as rows are one in each row if no row lacks an image; sounds likewise."""
        if self.input_ids is None or not tokens:
            return False
        kinds = [(self.input_ids == token).any(1) for token in tokens]
        return any(map(torch.any, kinds)) and all(kind.all() or not kind.any() for kind in kinds)

    def by_row(self, x: Tensor, layer: nn.Module, fn: Callable[[Tensor, str | None], Tensor]) -> Tensor:
        """fn(x's rows of a name, the name), back in the rows' order. fn must be elementwise: a row's result may not
        depend on how many others share its name. What it does not see reaches no gradient of it; of rows chosen after
        the product a NaN would, as 0 * NaN."""
        names = list(dict.fromkeys(self.rows))
        self.check_rows(x, layer)
        if len(names) == 1:
            return fn(x, names[0])
        places, back = self._places_of(x, names)
        return torch.cat([fn(x[place], name) for name, place in zip(names, places, strict=True)])[back]

    def _places_of(self, x: Tensor, names: Sequence[str | None]) -> tuple[list[Tensor], Tensor]:
        """The rows of x of each name, and where each row of x is among all these."""
        key = x.shape[0], x.device, torch.is_inference_mode_enabled()
        if key not in self._places:
            repeats = x.shape[0] // len(self.rows)
            rows = [name for name in self.rows for _ in range(repeats)]
            places = [[i for i, row in enumerate(rows) if row == name] for name in names]
            back = torch.tensor([i for place in places for i in place]).argsort()
            self._places[key] = [torch.tensor(place, device=x.device) for place in places], back.to(x.device)
        return self._places[key]

    def masks(self, x: Tensor, layer: nn.Module, names: Sequence[str | None]) -> list[Tensor]:
        """For each name, bool [x.shape[0]]: which rows are its."""
        self.check_rows(x, layer)
        key = x.shape[0], x.device, tuple(names), torch.is_inference_mode_enabled()
        if key not in self._masks:
            self._masks[key] = [
                torch.tensor([row == name for row in self.rows], device=x.device).repeat_interleave(
                    x.shape[0] // len(self.rows)
                )
                for name in names
            ]
        return self._masks[key]


_graph_task = getattr(torch._C, "_current_graph_task_id", lambda: -1)  # private: -1 outside of backward()


def in_backward() -> bool:
    return _graph_task() != -1


_current: ContextVar[Call | None] = ContextVar("peft_ops_call", default=None)


def call_of(shared: Shared) -> Call | None:
    """The call that a layer of this model runs in; None where no adapter names were given."""
    call = _current.get()
    if call is not None and call.shared is shared:
        return call if call.rows else None
    if shared.mixed and in_backward():
        raise RuntimeError(
            "adapter_names: a layer runs again in backward(), outside the call that named its adapters; use the "
            "model's own gradient_checkpointing_enable(), or torch.utils.checkpoint around the whole call"
        )
    return None


def step_of(layer: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor] | None:
    """What the layer does with inputs like x until the call ends, prepared when it saw the first; None where it has to
    look again each time. In decoding, the looking costs more than the step."""
    call = _current.get()
    if call is None or call.shared is not layer._peft_ops or torch.is_grad_enabled():
        return None
    key, kept = (x.shape, x.dtype, x.device), call.steps.get(layer)
    if kept is not None and kept[0] == key:
        return kept[1]
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return None
    step = layer.prepare(x)
    call.steps[layer] = key, step
    return step


def forget_steps(shared: Shared) -> None:
    """A switch of PEFT's was turned in the middle of a call: a callback of generate() that disables adapters, say."""
    call = _current.get()
    if call is not None and call.shared is shared:
        call.forget()


@contextmanager
def calling(call: Call | None) -> Iterator[None]:
    token = _current.set(call)
    try:
        yield
        if _current.get() is not call:
            raise RuntimeError(
                "using_adapters: blocks must be left in the reverse order in which they were entered; generators that "
                "take turns must each enter theirs anew for every step"
            )
    finally:
        _current.reset(token)


def current_call() -> Call | None:
    return _current.get()
