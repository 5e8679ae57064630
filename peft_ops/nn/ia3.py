"""Frozen layers with one (IA)^3 vector per adapter; a batch may mix adapters and base-model rows."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from peft_ops._checks import check_activation
from peft_ops.nn.adapters import AdapterModule, check_names, check_new_name, check_type, same_stamp, stamp, writes
from peft_ops.nn.tasks import TaskBatch, batch_of
from peft_ops.ops.ia3_glu import ia3_glu_linear
from peft_ops.ops.ia3_linear import ia3_fold, ia3_linear

# what transformers calls the activations that the operators have
HF_ACTIVATIONS = {
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "swish": "silu"
}  # fmt: skip


class IA3Linear(AdapterModule):
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
        check_type("IA3Linear", "is_feedforward", is_feedforward, bool, "a bool")
        self.base_layer, self.is_feedforward = base, is_feedforward
        self.ia3_l = nn.ParameterDict()
        self.merged_adapters: list[str] = []
        self._original: list[Tensor] | None = None
        self._merged_at: list[tuple[Tensor, int | None]] = []
        self._served: dict[tuple[str, ...], tuple[list, Tensor]] = {}

    @property
    def adapters(self) -> Iterable[str]:
        return self.ia3_l.keys()

    @property
    def features(self) -> int:
        return self.base_layer.in_features if self.is_feedforward else self.base_layer.out_features

    def add_adapter(self, name: str) -> nn.Parameter:
        """A new vector of ones in PEFT's shape: [1, in] with is_feedforward, else [out, 1]."""
        check_new_name("IA3Linear", name, self.ia3_l)
        shape = (1, self.features) if self.is_feedforward else (self.features, 1)
        # fp32 whatever the base has: the product is taken in fp32, and half-precision vectors do not train
        self.ia3_l[name] = nn.Parameter(torch.ones(shape, device=self.base_layer.weight.device))
        return self.ia3_l[name]

    def table(self, names: Sequence[str]) -> Tensor:
        """[len(names), features]; an adapter that does not target this module is a row of ones."""
        names = check_names("IA3Linear", "names", names)
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
    def keep_table(self, names: Sequence[str] | None) -> None:
        """Keep the table of these adapters for batches without gradients; None drops all.

        It is served until a vector changes: by a torch operation, by another vector under its name, or by a forward
        with gradients, after which an optimizer may write without leaving a trace. Writes through `.data` do leave
        none: call it again after one.
        """
        if names is None:
            self._served.clear()
        else:
            names = check_names("IA3Linear", "names", names)
            self._served[names] = self._stamp(names), self.table(names)

    def _stamp(self, names: Sequence[str]) -> list[tuple]:
        return stamp(self.ia3_l[name] for name in names if name in self.ia3_l)

    def _served_table(self, names: tuple[str, ...]) -> Tensor | None:
        """The kept table while it is true; never in traced code, which would keep it for ever."""
        if torch.is_grad_enabled():
            self._served = {}  # traced, a plain assignment, which the graph's caller runs too
            return None
        if torch.compiler.is_compiling():
            return None
        kept, table = self._served.get(names, (None, None))
        if table is None:
            return None
        return table if same_stamp(kept, self._stamp(names)) else None

    def of_batch(self, batch: TaskBatch | None) -> tuple[TaskBatch, Tensor] | None:
        """The batch and its table; None where every row is the base model's at this layer."""
        batch = batch_of("IA3Linear", batch)
        if batch is None:
            return None
        if self.merged_adapters:  # base rows too: the base weights are not there
            raise ValueError(
                f"IA3Linear: {self.merged_adapters[0]!r} is merged into the base layer; unmerge() it before a batch "
                f"says which row uses which, got {list(batch.names)}"
            )
        if not any(name in self.ia3_l for name in batch.names):
            return None
        table = self._served_table(batch.names)
        return batch, self.table(batch.names) if table is None else table

    @torch.no_grad()
    def merge(self, name: str, safe_merge: bool = False, keep_original: bool = True) -> None:
        """Fold an adapter into the base layer, which then runs alone: a single task costs nothing.

        The weights are the merged ones until `unmerge`, in a state dict too.

        Args:
            safe_merge: refuse with ValueError, and change nothing, where the folded weight or bias is not finite.
            keep_original: keep the base weights in host memory, so that `unmerge` brings them back bitwise.
        """
        check_type("IA3Linear", "adapter", name, str, "a name")
        if name not in self.ia3_l:
            raise ValueError(f"IA3Linear: merge takes one of the adapters {list(self.ia3_l)}, got {name!r}")
        if name in self.merged_adapters:
            raise ValueError(f"IA3Linear: {name!r} is merged already")
        if self.merged_adapters:
            raise ValueError(f"IA3Linear: {self.merged_adapters[0]!r} is merged; unmerge it before {name!r}")
        base = self.base_layer
        weight, bias = ia3_fold(base.weight, base.bias, self.ia3_l[name], self.is_feedforward)
        for what, folded in (("weight", weight), ("bias", bias)):
            if safe_merge and folded is not None and not torch.isfinite(folded).all():
                raise ValueError(f"IA3Linear: the {what} merged with {name!r} is not finite; the adapter is broken")
        changed = [(base.weight, weight)] if bias is base.bias else [(base.weight, weight), (base.bias, bias)]
        if keep_original:
            self._original = [parameter.detach().to("cpu", copy=True) for parameter, _ in changed]
        for parameter, folded in changed:
            parameter.copy_(folded)  # in place: what shares the weight, a captured graph say, sees the merge
        self._merged_at = [(parameter, writes(parameter)) for parameter, _ in changed]
        self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """The base weights as they were before `merge`, bitwise. Nothing is divided: a scale of zero loses nothing."""
        if not self.merged_adapters:
            raise ValueError("IA3Linear: unmerge needs a merged adapter, got none")
        if self._original is None:
            raise RuntimeError(f"IA3Linear: {self.merged_adapters[0]!r} was merged with keep_original=False")
        now = self.base_layer.weight, self.base_layer.bias
        if any(a is not b or writes(a) != v for (a, v), b in zip(self._merged_at, now, strict=False)):
            raise RuntimeError(
                f"IA3Linear: the base weights have changed since {self.merged_adapters[0]!r} was merged; unmerge would "
                f"undo that too"
            )
        for parameter, original in zip((self.base_layer.weight, self.base_layer.bias), self._original, strict=False):
            parameter.copy_(original)
        self._original = None
        self.merged_adapters.clear()

    def forward(self, x: Tensor, batch: TaskBatch | None = None) -> Tensor:
        found = self.of_batch(batch)
        if found is None:
            return self.base_layer(x)
        batch, table = found
        base = self.base_layer
        ids = batch.for_rows(x)
        return ia3_linear(x, base.weight, base.bias, ia3_l=table, task_ids=ids, is_feedforward=self.is_feedforward)

    def extra_repr(self) -> str:
        merged = f", merged={self.merged_adapters}" if self.merged_adapters else ""
        return f"adapters={list(self.ia3_l)}, is_feedforward={self.is_feedforward}{merged}"


class IA3GatedMLP(nn.Module):
    """y = down(act(gate(x)) * up(x) * l[t]): a gated feed-forward layer whose adapter costs one factor in one pass.

    PEFT scales the input of `down_proj`; the same vector scales here where that input is made, and `down_proj` runs
    bare. Rows of the base model too are rounded once where the eager layer rounds twice. Keys of the state dict are
    PEFT's where the model has these names: `gate_proj.weight`, `up_proj.weight`, `down_proj.base_layer.weight`,
    `down_proj.ia3_l.<adapter>`, and biases.

    Args:
        gate_proj, up_proj: two linear layers of one x, equally wide.
        down_proj: the layer that takes their product, or an IA3Linear of it with is_feedforward.
        activation: None, "relu", "gelu", "gelu_tanh" or "silu", or transformers' name for it. T5 v1.1 wants "gelu_new",
            and has dropout before its last layer, which is not here.
    """

    def __init__(
        self,
        gate_proj: nn.Linear,
        up_proj: nn.Linear,
        down_proj: nn.Linear | IA3Linear,
        activation: str | None = "silu",
    ):
        super().__init__()
        for name, layer in (("gate_proj", gate_proj), ("up_proj", up_proj)):
            if not isinstance(layer, nn.Linear):
                raise TypeError(f"IA3GatedMLP: {name} must be an nn.Linear, got {type(layer).__name__}")
        activation = HF_ACTIVATIONS.get(activation, activation) if isinstance(activation, str) else activation
        check_activation("IA3GatedMLP", activation)
        check_type("IA3GatedMLP", "down_proj", down_proj, (nn.Linear, IA3Linear), "an nn.Linear or an IA3Linear")
        down_proj = down_proj if isinstance(down_proj, IA3Linear) else IA3Linear(down_proj, is_feedforward=True)
        if not down_proj.is_feedforward:
            raise ValueError("IA3GatedMLP: down_proj must have is_feedforward=True, got False")
        sizes = gate_proj.in_features, gate_proj.out_features
        if (up_proj.in_features, up_proj.out_features) != sizes:
            got = f"{up_proj.in_features} to {up_proj.out_features}"
            raise ValueError(
                f"IA3GatedMLP: up_proj must map {sizes[0]} to {sizes[1]} features, as gate_proj, got {got}"
            )
        if down_proj.features != sizes[1]:
            raise ValueError(f"IA3GatedMLP: down_proj must take {sizes[1]} features, got {down_proj.features}")
        self.gate_proj, self.up_proj, self.down_proj, self.activation = gate_proj, up_proj, down_proj, activation

    def add_adapter(self, name: str) -> nn.Parameter:
        """A new vector of ones in PEFT's shape, [1, N]."""
        return self.down_proj.add_adapter(name)

    def merge(self, name: str, safe_merge: bool = False, keep_original: bool = True) -> None:
        """Fold an adapter into `down_proj`, as PEFT does."""
        self.down_proj.merge(name, safe_merge, keep_original)

    def unmerge(self) -> None:
        self.down_proj.unmerge()

    def forward(self, x: Tensor, batch: TaskBatch | None = None) -> Tensor:
        gate, up = self.gate_proj, self.up_proj
        found = self.down_proj.of_batch(batch)
        table, ids = (None, None) if found is None else (found[1], found[0].for_rows(x))
        if table is None:  # the base model: one task of ones, which multiplies exactly
            table = torch.ones(1, gate.out_features, device=gate.weight.device)
        h = ia3_glu_linear(
            x, gate.weight, up.weight, gate.bias, up.bias, ia3_l=table, task_ids=ids, activation=self.activation
        )
        return self.down_proj.base_layer(h)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
