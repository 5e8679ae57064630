"""A frozen linear layer with one (IA)^3 vector per adapter; a batch may mix adapters and base-model rows."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peft_ops.nn.tasks import TaskBatch, current_tasks
from peft_ops.ops.ia3_linear import ia3_linear


class IA3Linear(nn.Module):
    """y = base(x) * l[t], or base(x * l[t]) with is_feedforward; row b belongs to adapter t(b).

    Keys of the state dict are PEFT's: `base_layer.weight`, `base_layer.bias`, `ia3_l.<adapter>`. Each adapter is a
    parameter of its own, so that one absent from a batch gets no gradient and an optimizer leaves it alone.

    Args:
        base: the layer to wrap; its weights are shared, and trained or frozen as they are.
        is_feedforward: scale the layer's input instead of its output.
    """

    def __init__(self, base: nn.Linear, is_feedforward: bool = False):
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise TypeError(f"IA3Linear: base must be an nn.Linear, got {type(base).__name__}")
        self.base_layer, self.is_feedforward = base, is_feedforward
        self.ia3_l = nn.ParameterDict()
        self._served: dict[tuple[str, ...], tuple[list, Tensor]] = {}

    @property
    def features(self) -> int:
        return self.base_layer.in_features if self.is_feedforward else self.base_layer.out_features

    def add_adapter(self, name: str) -> nn.Parameter:
        """A new vector of ones in PEFT's shape: [1, in] with is_feedforward, else [out, 1]."""
        if name in self.ia3_l:
            raise ValueError(f"IA3Linear: adapter must have a new name, got {name!r}")
        if "." in name or hasattr(nn.ParameterDict(), name):
            raise ValueError(f"IA3Linear: adapter must not be named as an attribute of a module, got {name!r}")
        shape = (1, self.features) if self.is_feedforward else (self.features, 1)
        # fp32 whatever the base has: the product is taken in fp32, and half-precision vectors do not train
        self.ia3_l[name] = nn.Parameter(torch.ones(shape, device=self.base_layer.weight.device))
        return self.ia3_l[name]

    def table(self, names: Sequence[str]) -> Tensor:
        """[len(names), features]; an adapter that does not target this module is a row of ones."""
        ones = None
        rows = []
        for name in names:
            if name in self.ia3_l:
                rows.append(self.ia3_l[name].flatten())
            else:
                ones = torch.ones(self.features, device=self.base_layer.weight.device) if ones is None else ones
                rows.append(ones)
        return torch.stack(rows)

    @torch.no_grad()
    def materialize(self, names: Sequence[str] | None) -> None:
        """Keep the table of these adapters for batches without gradients; None drops all.

        It is served until a vector changes.
        """
        if names is None:
            self._served.clear()
        else:
            self._served[tuple(names)] = self._stamp(names), self.table(names)

    def _stamp(self, names: Sequence[str]) -> list[tuple[int, int] | None]:
        """Where each vector lies and how often it was written: a snapshot is served only while nothing moved."""
        return [
            (v.data_ptr(), v._version) if (v := self.ia3_l[n] if n in self.ia3_l else None) is not None else None
            for n in names
        ]

    def forward(self, x: Tensor, batch: TaskBatch | None = None) -> Tensor:
        batch = batch or current_tasks()
        if batch is None or not any(name in self.ia3_l for name in batch.names):
            return self.base_layer(x)
        stamp, table = (None, None) if torch.is_grad_enabled() else self._served.get(batch.names, (None, None))
        if table is None or stamp != self._stamp(batch.names):
            table = self.table(batch.names)
        base = self.base_layer
        ids = batch.for_rows(x)
        return ia3_linear(x, base.weight, base.bias, ia3_l=table, task_ids=ids, is_feedforward=self.is_feedforward)

    def extra_repr(self) -> str:
        return f"adapters={list(self.ia3_l)}, is_feedforward={self.is_feedforward}"
