"""P-Tuning: prompt encoders as PEFT has them, and a set of them that a mixed batch reads as one table."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from peft_ops.nn.tasks import TaskBatch, current_tasks
from peft_ops.ops.prompt_concat import prompt_concat
from peft_ops.reference import PromptBatch


class PromptEncoder(nn.Module):
    """h(P): pseudo tokens and a network that turns them into prompt embeddings [num_virtual_tokens, token_dim].

    Modules, initialisation and state-dict keys are those of a live peft.PromptEncoder. (What PEFT saves of it is only
    the table that it computes, without the encoder.)

    Args:
        encoder_reparameterization_type: "lstm" or "mlp".
        encoder_hidden_size: default token_dim.
        encoder_num_layers, encoder_dropout: of the LSTM; the MLP has neither.
    """

    def __init__(
        self,
        num_virtual_tokens: int,
        token_dim: int,
        encoder_reparameterization_type: str = "mlp",
        encoder_hidden_size: int | None = None,
        encoder_num_layers: int = 2,
        encoder_dropout: float = 0.0,
    ):
        super().__init__()
        hidden = token_dim if encoder_hidden_size is None else encoder_hidden_size
        kind = encoder_reparameterization_type.lower()
        if kind not in ("lstm", "mlp"):
            raise ValueError(f"PromptEncoder: encoder_reparameterization_type must be 'lstm' or 'mlp', got {kind!r}")
        self.embedding = nn.Embedding(num_virtual_tokens, token_dim)
        if kind == "lstm":
            self.lstm_head = nn.LSTM(
                token_dim, hidden, encoder_num_layers, dropout=encoder_dropout, bidirectional=True, batch_first=True
            )
            sizes = (2 * hidden, 2 * hidden, token_dim)
        else:
            self.lstm_head = None
            sizes = (token_dim, hidden, hidden, token_dim)
        layers = [nn.Linear(sizes[0], sizes[1])]
        for k, n in zip(sizes[1:], sizes[2:], strict=False):
            layers += [nn.ReLU(), nn.Linear(k, n)]
        self.mlp_head = nn.Sequential(*layers)

    def forward(self) -> Tensor:
        pseudo = self.embedding.weight
        if self.lstm_head is not None:
            pseudo = self.lstm_head(pseudo[None])[0][0]
        return self.mlp_head(pseudo)


class PromptEmbedding(nn.Module):
    """One prompt encoder per adapter. A batch runs those it needs, once each, however many rows they serve.

    Prompts may differ in length; an adapter without an encoder here is served without a prompt.
    """

    def __init__(self):
        super().__init__()
        self.encoders = nn.ModuleDict()
        self._served: dict[tuple[str, ...], tuple[dict, tuple[Tensor, Tensor]]] = {}

    def add_adapter(self, name: str, encoder: PromptEncoder) -> PromptEncoder:
        if name in self.encoders:
            raise ValueError(f"PromptEmbedding: adapter must have a new name, got {name!r}")
        self.encoders[name] = encoder
        return encoder

    def table(self, names: Sequence[str]) -> tuple[Tensor, Tensor] | None:
        """Prompts [len(names), P, E], padded to the longest, and lengths [len(names)]; None if no adapter has one."""
        some = next((self.encoders[name] for name in names if name in self.encoders), None)
        if some is None:
            return None
        nothing = some.embedding.weight.new_zeros(0, some.embedding.embedding_dim)
        prompts = [self.encoders[name]() if name in self.encoders else nothing for name in names]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=nothing.device)
        return pad_sequence(prompts, batch_first=True), lengths

    @torch.no_grad()
    def materialize(self, names: Sequence[str] | None) -> None:
        """Keep the prompts of these adapters for batches without gradients; None drops all.

        They are served until an encoder changes.
        """
        if names is None:
            self._served.clear()
        elif (table := self.table(names)) is not None:
            self._served[tuple(names)] = self._stamp(names), table

    def _stamp(self, names: Sequence[str]) -> dict[str, list[tuple[int, int]]]:
        """Where the parameters of each encoder lie and how often they were written."""
        present = {name: self.encoders[name] for name in names if name in self.encoders}
        return {name: [(p.data_ptr(), p._version) for p in e.parameters()] for name, e in present.items()}

    def _snapshot(self, names: tuple[str, ...]) -> tuple[Tensor, Tensor] | None:
        """The materialized prompts, if no encoder that is still there has changed; some may have been dropped."""
        stamp, table = self._served.get(names, ({}, None))
        return table if all(stamp.get(name) == now for name, now in self._stamp(names).items()) else None

    def forward(
        self,
        input_ids: Tensor,
        embedding: Tensor,
        attention_mask: Tensor | None = None,
        batch: TaskBatch | None = None,
        **kwargs,
    ) -> PromptBatch:
        """`prompt_concat` with the prompts of the batch; kwargs: labels, padding_side. [B, S] -> [B, P + S]."""
        batch = batch or current_tasks() or TaskBatch.of_rows([None] * len(input_ids), input_ids.device)
        table = None if torch.is_grad_enabled() else self._snapshot(batch.names)
        no_prompt = embedding.new_zeros(len(batch.names), 0, embedding.shape[1]), None
        prompts, lengths = table or self.table(batch.names) or no_prompt
        return prompt_concat(
            input_ids, embedding, prompts, batch.ids, prompt_lengths=lengths, attention_mask=attention_mask, **kwargs
        )
