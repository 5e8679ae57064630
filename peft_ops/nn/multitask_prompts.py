"""Multitask prompt tuning: one prompt for all tasks, and per task a product of two thin factors that scales it."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from peft_ops._checks import FLOATS, check_tensor, shape
from peft_ops.nn.adapters import check_names, check_new_name, check_size, check_type
from peft_ops.nn.prompt_encoders import FromTokens
from peft_ops.nn.prompt_module import PromptModule

FACTORS = ("prefix_task_cols", "prefix_task_rows")


class MultitaskPromptEmbedding(FromTokens, PromptModule):
    """prompt[t] = E * (u[t] v[t]), elementwise: E [P, E] of all tasks, u[t] [P, r] and v[t] [r, E] of each.

    Multitask prompt tuning, arXiv 2303.02861. Tasks are adapters, named. The factors are one parameter per task, so
    that a task absent from a batch gets no gradient; E gets that of all rows. The state dict has the keys and shapes of
    a live peft.MultitaskPromptEmbedding: `embedding.weight` [P, E], `prefix_task_cols` [num_tasks, P, r],
    `prefix_task_rows` [num_tasks, r, E], task i being the i-th name. `from_text` and `from_vocab` set E as PEFT's
    PromptTuningInit does.

    Args:
        names: the tasks.
        num_virtual_tokens: P.
        token_dim: E.
        num_ranks: r.
    """

    def __init__(self, names: Sequence[str], num_virtual_tokens: int, token_dim: int, num_ranks: int = 1):
        super().__init__()
        op = "MultitaskPromptEmbedding"
        names = check_names(op, "names", names)
        for arg, size in (
            ("num_virtual_tokens", num_virtual_tokens),
            ("token_dim", token_dim),
            ("num_ranks", num_ranks),
        ):
            check_size(op, arg, size)
        self.embedding = nn.Embedding(num_virtual_tokens, token_dim)
        self.num_ranks = num_ranks
        self.prefix_task_cols, self.prefix_task_rows = nn.ParameterDict(), nn.ParameterDict()
        # drawn for all tasks at once, in PEFT's order: one seed gives the same numbers
        cols = torch.normal(0.0, 0.02, (len(names), num_virtual_tokens, num_ranks))
        rows = torch.normal(0.0, 0.02, (len(names), num_ranks, token_dim))
        for name, u, v in zip(names, cols, rows, strict=True):
            self._add(name, u.clone(), v.clone())
        self.register_state_dict_post_hook(_stack)
        self.register_load_state_dict_pre_hook(_unstack)

    @property
    def adapters(self) -> Iterable[str]:
        return self.prefix_task_cols.keys()

    def add_adapter(self, name: str) -> list[nn.Parameter]:
        """A new task; its factors [P, r] and [r, E] start as PEFT's do."""
        P, E = self.embedding.weight.shape
        u, v = torch.normal(0.0, 0.02, (P, self.num_ranks)), torch.normal(0.0, 0.02, (self.num_ranks, E))
        return self._add(name, u, v)

    def _add(self, name: str, *factors: Tensor) -> list[nn.Parameter]:
        check_new_name("MultitaskPromptEmbedding", name, self.prefix_task_cols)
        for key, factor in zip(FACTORS, factors, strict=True):
            getattr(self, key)[name] = nn.Parameter(factor.to(self.embedding.weight.device))
        return [getattr(self, key)[name] for key in FACTORS]

    def prompt(self, name: str) -> Tensor:
        """[P, E] of one task."""
        return self.embedding.weight * (self.prefix_task_cols[name] @ self.prefix_task_rows[name])

    def num_virtual_tokens(self, name: str) -> int:
        return self.embedding.num_embeddings

    def sources(self, name: str) -> Iterable[Tensor]:
        return self.embedding.weight, self.prefix_task_cols[name], self.prefix_task_rows[name]

    def peft_state_dict(self) -> dict[str, Tensor]:
        """What PEFT saves, and loads: E as `prompt_embeddings`, and the factors, on the host."""
        state = {key: value.detach().to("cpu", copy=True) for key, value in self.state_dict().items()}
        return {"prompt_embeddings": state.pop("embedding.weight"), **state}

    def load_peft_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The tensors of an adapter_model.safetensors that PEFT saved, with as many tasks as here."""
        op = "MultitaskPromptEmbedding.load_peft_state_dict"
        check_type(op, "state", state, Mapping, "a state dict")
        if set(state) != {"prompt_embeddings", *FACTORS}:
            raise ValueError(f"{op}: state must hold prompt_embeddings and {' and '.join(FACTORS)}, got {list(state)}")
        self.load_state_dict({"embedding.weight": state["prompt_embeddings"], **{key: state[key] for key in FACTORS}})

    @classmethod
    def from_state_dict(cls, names: Sequence[str], state: Mapping[str, Tensor]) -> "MultitaskPromptEmbedding":
        """Rebuild from a state dict of this module, a live PEFT module, or what PEFT saved; names in its order.

        PEFT's modules for sequence-to-sequence models hold P rows for the encoder and then P for the decoder: give
        their halves, of `embedding.weight` and `prefix_task_cols`, to two modules.
        """
        op = "MultitaskPromptEmbedding.from_state_dict"
        names = check_names(op, "names", names)
        check_type(op, "state", state, Mapping, "a state dict")
        shared = next((key for key in ("embedding.weight", "prompt_embeddings") if key in state), None)
        if shared is None or not set(FACTORS) <= set(state):
            raise ValueError(f"{op}: state must hold embedding.weight and {' and '.join(FACTORS)}, got {list(state)}")
        for key in FACTORS:
            check_tensor(op, key, state[key], dtypes=FLOATS, dim=3)
        if len(state[FACTORS[0]]) != len(names):
            raise ValueError(f"{op}: names must be of {len(state[FACTORS[0]])} tasks, got {len(names)}")
        module = cls(names, *shape(state[shared]), state[FACTORS[0]].shape[2]).to(state[shared])
        module.load_state_dict({"embedding.weight": state[shared], **{key: state[key] for key in FACTORS}})
        return module


def _stack(module: MultitaskPromptEmbedding, state: dict, prefix: str, _) -> None:
    for key in FACTORS:
        factors = [state.pop(f"{prefix}{key}.{name}") for name in module.adapters]
        if factors:
            state[prefix + key] = torch.stack(factors)


def _unstack(module: MultitaskPromptEmbedding, state: dict, prefix: str, _, __, ___, ____, errors: list[str]) -> None:
    for key in FACTORS:
        stacked = state.pop(prefix + key, None)
        if stacked is None:
            continue
        if len(stacked) != len(module.adapters):
            errors.append(f"{prefix}{key} holds {len(stacked)} tasks, the module {len(module.adapters)}")
        # copies: assign=True makes them the parameters, which must be views of nothing
        own = {f"{prefix}{key}.{name}": factor.clone() for name, factor in zip(module.adapters, stacked, strict=False)}
        state.update(own)
