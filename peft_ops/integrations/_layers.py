"""PEFT's (IA)^3 layers with one operator each, and every row's own adapter where the call names them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_ops.integrations._calls import Call, call_of, forget_steps, step_of
from peft_ops.integrations._code import code_of
from peft_ops.integrations._swap import Swapped
from peft_ops.ops.ia3_linear import ia3_linear
from peft_ops.ops.ia3_scale import ia3_scale, scale_by
from peft_ops.reference import TaskPlan

ATTRIBUTES = "_peft_ops", "_peft_ops_key"


def why_not_exact(layer: nn.Module) -> str | None:
    """Why a layer is not a plain nn.Linear whose weight an operator may read past its forward; None if it is."""
    if type(layer) is not nn.Linear:
        return f"{type(layer).__name__}, not nn.Linear"
    return why_not_readable(layer)


def why_not_readable(layer: nn.Module) -> str | None:
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "has hooks"
    if "forward" in layer.__dict__:
        return "its forward is replaced (offloaded?)"
    if type(layer.weight) not in (nn.Parameter, Tensor):
        return f"weight is a {type(layer.weight).__name__}"
    if not layer.weight.dtype.is_floating_point or layer.weight.dtype.itemsize < 2:
        return f"weight is {layer.weight.dtype}"
    return None


# transformers' FalconLinear, an nn.Linear with a forward of its own
_FALCON_LINEAR = (
    "hidden_states = x @ self.weight.T\nif self.bias is None:\n    return hidden_states\n"
    "return hidden_states + self.bias"
)


def weight_of(layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight [N, K] and bias of a layer that computes x W^T + b; None where it may not be read past its forward."""
    if why_no_weight(layer) is not None:
        return None
    return (layer.weight.t() if is_conv1d(layer) else layer.weight), layer.bias


def why_no_weight(layer: nn.Module) -> str | None:
    """Why a layer is none of nn.Linear, transformers' Conv1D, whose weight lies the other way round, and FalconLinear,
    or its weight may not be read; None if it may."""
    if isinstance(layer, Swapped):
        return "has (IA)^3 vectors of its own"
    known = type(layer) is nn.Linear or is_conv1d(layer)
    known = known or (isinstance(layer, nn.Linear) and code_of(type(layer)) == _FALCON_LINEAR)
    return why_not_readable(layer) if known else f"{type(layer).__name__}, not nn.Linear"


def is_conv1d(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils"


_global_hooks = getattr(nn.modules.module, "_has_any_global_hook", lambda: True)  # private


def linear_of(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """What layer(x) computes, past nn.Module's call (2 us hot, 4 between other code) where nobody else would see it."""
    if why_not_exact(layer) is not None or _global_hooks():
        return layer
    weight, bias, own = layer.weight, layer.bias, layer.__dict__
    hooks, pre_hooks = layer._forward_hooks, layer._forward_pre_hooks  # may get some before the call ends
    return lambda x: layer(x) if hooks or pre_hooks or "forward" in own else F.linear(x, weight, bias)


def runs_whole(x: Tensor) -> bool:
    """Layers read past their forward, as one operator with their scale; on a CPU that would not be bitwise PEFT's."""
    return x.is_cuda


def _switch(name: str) -> Callable:
    """A method of PEFT's layers by which what they compute changes."""

    def method(self, *args, **kwargs):
        forget_steps(self._peft_ops)
        return getattr(super(MixedLayer, self), name)(*args, **kwargs)

    method.__name__ = name
    return method


class MixedLayer(Swapped):
    """What the layers share: the vectors that a call, or PEFT's own switches, select."""

    set_adapter, delete_adapter, merge, unmerge = map(_switch, ("set_adapter", "delete_adapter", "merge", "unmerge"))

    def enable_adapters(self, enabled: bool) -> None:
        forget_steps(self._peft_ops)
        super().enable_adapters(enabled)
        (set.discard if enabled else set.add)(self._peft_ops.disabled_layers, self._peft_ops_key)

    def _call(self) -> Call | None:
        call = call_of(self._peft_ops)
        if call is not None and not self.disable_adapters and self.merged:
            raise ValueError(
                f"adapter_names: {self.merged_adapters[0]!r} is merged into {self._peft_ops_key}; call "
                f"model.unmerge_adapter() before a batch names its adapters"
            )
        return call

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.ia3_l]

    def _product(self, active: list[str]) -> Tensor:
        scale = self.ia3_l[active[0]].flatten()
        for name in active[1:]:
            scale = (scale * self.ia3_l[name].flatten()).to(scale.dtype)  # PEFT's is in place: the first's dtype stays
        return scale

    def _narrows(self, dtype: torch.dtype, names) -> bool:
        """A feed-forward input that PEFT rounds to the vector's dtype before it multiplies: its own arithmetic then."""
        names = [name for name in names if name in self.ia3_l]
        return any(torch.promote_types(dtype, self.ia3_l[name].dtype) != self.ia3_l[name].dtype for name in names)


class ScaledLinear(Swapped):
    """y = bare(x) * l[t], or bare(x * l[t]) with is_feedforward: a linear layer whose rows may have vectors."""

    is_feedforward: bool

    def selection(self, x: Tensor) -> tuple[Tensor, Tensor | TaskPlan | None] | None:
        """The table and the ids that x runs with; None where the layer runs alone."""
        raise NotImplementedError

    def needs_peft(self, x: Tensor, table: Tensor) -> bool:
        """PEFT's arithmetic is not the operator's."""
        return False

    def bare(self, x: Tensor, *args, **kwargs) -> Tensor:
        raise NotImplementedError

    def bare_by(self) -> Callable[[Tensor], Tensor]:
        """The same for the rest of a call."""
        return self.bare

    def why_no_weight(self) -> str | None:
        """Why the bare layer's weight may not be read past its forward; None if it may."""
        raise NotImplementedError

    def why_not_plain(self) -> str | None:
        """Why the bare layer is not an nn.Linear, or may not be read."""
        raise NotImplementedError

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """Weight [N, K] and bias, where they may be read."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        step = None if args or kwargs else step_of(self, x)
        return self.unprepared(x, *args, **kwargs) if step is None else step(x)

    def prepare(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        call = call_of(self._peft_ops)
        selected = None if x.is_cuda or (call is not None and call.is_flat(x, self)) else self.selection(x)
        if selected is None or self.needs_peft(x, selected[0]):
            return self.unprepared
        scale, linear = scale_by(*selected), self.bare_by()
        if self.is_feedforward:
            return lambda x: linear(scale(x))
        return lambda x: scale(linear(x))

    def unprepared(self, x: Tensor, *args, **kwargs) -> Tensor:
        call = call_of(self._peft_ops)
        if call is not None and call.is_flat(x, self):
            return self.unprepared(x.unflatten(0, (len(call.rows), -1)), *args, **kwargs).flatten(0, 1)
        selected = self.selection(x)
        if selected is None:
            return super().forward(x, *args, **kwargs)  # unmerges, too, as PEFT does where adapters are disabled
        table, ids = selected
        if self.needs_peft(x, table):
            return self._as_peft(x, *args, **kwargs)
        if runs_whole(x) and not args and not kwargs and self.why_no_weight() is None:
            return ia3_linear(x, *self.weights(), ia3_l=table, task_ids=ids, is_feedforward=self.is_feedforward)
        if self.is_feedforward:
            return self.bare(ia3_scale(x, table, ids), *args, **kwargs)
        return ia3_scale(self.bare(x, *args, **kwargs), table, ids)


class MixedLinear(ScaledLinear, MixedLayer):
    """peft.tuners.ia3.Linear, around its base layer."""

    def selection(self, x: Tensor) -> tuple[Tensor, Tensor | TaskPlan | None] | None:
        call = self._call()
        if self.disable_adapters or self.merged:
            return None
        if call is not None:
            return call.select(self, self.ia3_l, self._features, x)
        active = self._active()
        return (self._product(active).unsqueeze(0), None) if active else None

    @property
    def _features(self) -> int:
        return self.in_features if self.is_feedforward else self.out_features

    def needs_peft(self, x: Tensor, table: Tensor) -> bool:
        """The vectors are narrower than a feed-forward input, or fp64."""
        if table.dtype is torch.float64 and x.dtype is not torch.float64:
            return True
        call = call_of(self._peft_ops)
        return self.is_feedforward and self._narrows(x.dtype, self._active()[-1:] if call is None else call.names)

    def bare(self, x: Tensor, *args, **kwargs) -> Tensor:
        return self.base_layer(x, *args, **kwargs)

    def bare_by(self) -> Callable[[Tensor], Tensor]:
        return linear_of(self.base_layer)

    def why_no_weight(self) -> str | None:
        return why_no_weight(self.base_layer)

    def why_not_plain(self) -> str | None:
        return why_not_exact(self.base_layer)

    def weights(self) -> tuple[Tensor, Tensor | None]:
        return weight_of(self.base_layer)

    def _as_peft(self, x: Tensor, *args, **kwargs) -> Tensor:
        call = call_of(self._peft_ops)
        if call is None:
            return super().forward(x, *args, **kwargs)

        def scaled(y: Tensor, name: str | None) -> Tensor:
            vector = self.ia3_l[name] if name in self.ia3_l else call.of_bank(self._peft_ops_key, name)
            if vector is None:
                return y
            scale = vector.flatten()
            return ((y.to(scale.dtype) if self.is_feedforward else y) * scale).to(y.dtype)

        if self.is_feedforward:
            return self.base_layer(call.by_row(x, self, scaled), *args, **kwargs)
        return call.by_row(self.base_layer(x, *args, **kwargs), self, scaled)


class MixedConv(MixedLayer):
    """peft.tuners.ia3.Conv2d and Conv3d: PEFT's arithmetic, chosen by row."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        call = self._call()
        if call is None or self.disable_adapters:
            return super().forward(x, *args, **kwargs)

        dtype = self.get_base_layer().weight.dtype if self.is_feedforward else x.dtype

        def scaled(y: Tensor, name: str | None) -> Tensor:
            if name not in self.ia3_l:
                return y.to(dtype)
            return (y.to(self.ia3_l[name].dtype) * self.ia3_l[name]).to(dtype)

        if self.is_feedforward:
            return self.base_layer(call.by_row(x, self, scaled), *args, **kwargs).to(x.dtype)
        return call.by_row(self.base_layer(x, *args, **kwargs), self, scaled)


class MixedQuantized(MixedLayer):
    """peft.tuners.ia3's bitsandbytes layers: PEFT's arithmetic, chosen by row."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        call = self._call()
        if call is None or self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        x = x if torch.is_autocast_enabled() or x.dtype == torch.float32 else x.float()

        def scaled(y: Tensor, name: str | None) -> Tensor:
            return y * self.ia3_l[name].flatten() if name in self.ia3_l else y

        if self.is_feedforward:
            return self.base_layer(call.by_row(x, self, scaled))
        y = self.base_layer(x)
        return call.by_row(y, self, scaled).to(y.dtype)


class MixedHead(Swapped):
    """peft.utils.ModulesToSaveWrapper: a head of each adapter's own; rows of other adapters get the original."""

    def forward(self, *args, **kwargs):
        call = call_of(self._peft_ops)
        if call is None or self.disable_adapters:
            return super().forward(*args, **kwargs)
        args, names = list(args), list(dict.fromkeys(call.rows))
        if not args or not isinstance(args[0], Tensor):
            raise TypeError(f"adapter_names: {self._peft_ops_key} must be called with a tensor first, to tell its rows")
        x = args[0]
        masks = dict(zip(names, call.masks(x, self, names), strict=True))
        heads: dict[nn.Module, Tensor] = {}
        for name in names:
            head = self.modules_to_save[name] if name in self.modules_to_save else self.original_module
            heads[head] = heads[head] | masks[name] if head in heads else masks[name]
        out = None
        for head, mask in heads.items():
            # rows of others are zero: in the backward, 0 times their NaN would reach this head's weights
            mine = x if len(heads) == 1 else torch.where(mask.view(-1, *[1] * (x.dim() - 1)), x, 0)
            y = head(mine, *args[1:], **kwargs)
            if not isinstance(y, Tensor):
                raise TypeError(f"adapter_names: {self._peft_ops_key} must return a tensor, got {type(y).__name__}")
            out = y if out is None else torch.where(mask.view(-1, *[1] * (y.dim() - 1)), y, out)
        return out


class BankLinear(ScaledLinear):
    """A linear layer that PEFT left alone and a TaskBank has vectors for."""

    @property
    def is_feedforward(self) -> bool:
        return self._peft_ops_feedforward

    def selection(self, x: Tensor) -> tuple[Tensor, Tensor | TaskPlan | None] | None:
        call = None if self._peft_ops.is_off else call_of(self._peft_ops)
        return None if call is None else call.select(self, {}, self._peft_ops.bank.widths[self._peft_ops_key], x)

    def bare(self, x: Tensor, *args, **kwargs) -> Tensor:
        return self._kind.forward(self, x, *args, **kwargs)

    @property
    def _kind(self) -> type:
        return type(self)._swapped_with[1]

    def why_no_weight(self) -> str | None:
        return why_not_readable(self) if is_conv1d(self) else self.why_not_plain()

    def why_not_plain(self) -> str | None:
        return why_not_readable(self) if self._kind is nn.Linear else f"{self._kind.__name__}, not nn.Linear"

    def weights(self) -> tuple[Tensor, Tensor | None]:
        return (self.weight.t() if is_conv1d(self) else self.weight), self.bias
