"""h(P): what makes the prompt of one adapter, with the sizes, initialisation and state-dict keys of PEFT."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from peft_ops._checks import FLOATS, IDS, check_tensor, shape
from peft_ops.nn.adapters import check_size, check_type

KINDS = ("lstm", "mlp", "embedding")
# weights whose columns are token_dim and encoder_hidden_size
SIZES = {
    "lstm": ("lstm_head.weight_ih_l0", "lstm_head.weight_hh_l0"),
    "mlp": ("mlp_head.0.weight", "mlp_head.2.weight"),
    "embedding": ("embedding.weight", "embedding.weight"),
}


class PromptNetwork(nn.Module):
    """The network h alone, without pseudo tokens: [P, E] -> [P, E]. Several adapters may share one.

    Keys: `lstm_head.*`, `mlp_head.*`; none for "embedding". Arguments: those of PromptEncoder.
    """

    def __init__(
        self,
        token_dim: int,
        encoder_reparameterization_type: str = "mlp",
        encoder_hidden_size: int | None = None,
        encoder_num_layers: int = 2,
        encoder_dropout: float = 0.0,
    ):
        super().__init__()
        self._build(
            token_dim, encoder_reparameterization_type, encoder_hidden_size, encoder_num_layers, encoder_dropout
        )

    def _build(self, token_dim, kind, hidden, num_layers, dropout, num_virtual_tokens: int | None = None) -> None:
        """Check everything, then make the parts in PEFT's order: one seed gives the same numbers."""
        op = type(self).__name__
        check_size(op, "token_dim", token_dim)
        check_type(op, "encoder_reparameterization_type", kind, str, "a str")
        if kind.lower() not in KINDS:
            wanted = "'lstm', 'mlp' or 'embedding'"
            raise ValueError(f"{op}: encoder_reparameterization_type must be {wanted}, got {kind.lower()!r}")
        hidden = token_dim if hidden is None else hidden
        check_size(op, "encoder_hidden_size", hidden)
        check_size(op, "encoder_num_layers", num_layers)
        check_type(op, "encoder_dropout", dropout, (int, float), "a float")
        if not 0 <= dropout <= 1:
            raise ValueError(f"{op}: encoder_dropout must be in [0, 1], got {dropout}")
        self.token_dim, self.encoder_reparameterization_type = token_dim, kind.lower()
        if num_virtual_tokens is not None:
            self.embedding = nn.Embedding(num_virtual_tokens, token_dim)
        self.lstm_head = self.mlp_head = None
        if self.encoder_reparameterization_type == "lstm":
            self.lstm_head = nn.LSTM(
                token_dim, hidden, num_layers, dropout=dropout, bidirectional=True, batch_first=True
            )
            self.mlp_head = _mlp(2 * hidden, 2 * hidden, token_dim)
        elif self.encoder_reparameterization_type == "mlp":
            self.mlp_head = _mlp(token_dim, hidden, hidden, token_dim)

    def forward(self, pseudo: Tensor) -> Tensor:
        if self.lstm_head is not None:
            pseudo = self.lstm_head(pseudo[None])[0][0]
        return pseudo if self.mlp_head is None else self.mlp_head(pseudo)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], encoder_dropout: float = 0.0) -> "PromptNetwork":
        """Rebuild from a state dict: type and sizes are its shapes.

        The dropout leaves no trace in a state dict: say it again to train on.
        """
        op = cls.__name__
        check_type(op, "state", state, Mapping, "a state dict")
        kind = next((kind for kind, keys in SIZES.items() if all(key in state for key in keys)), None)
        own = issubclass(cls, PromptEncoder)
        if kind is None or (own and "embedding.weight" not in state):
            wanted = (
                "embedding.weight, and lstm_head or mlp_head if it has a network" if own else "lstm_head or mlp_head"
            )
            raise ValueError(f"{op}: state must hold {wanted}, got {list(state)}")
        first, hidden = (state[key] for key in SIZES[kind])
        layers = sum(key.startswith("lstm_head.weight_ih_l") and not key.endswith("_reverse") for key in state)
        sizes = [first.shape[1], kind, hidden.shape[1], max(layers, 1), encoder_dropout]
        if own:
            sizes = [state["embedding.weight"].shape[0], *sizes]
        module = cls(*sizes).to(first)
        module.load_state_dict(state)
        return module

    def extra_repr(self) -> str:
        return f"token_dim={self.token_dim}, encoder_reparameterization_type={self.encoder_reparameterization_type!r}"


def _mlp(*sizes: int) -> nn.Sequential:
    layers = [nn.Linear(sizes[0], sizes[1])]
    for k, n in zip(sizes[1:], sizes[2:], strict=False):
        layers += [nn.ReLU(), nn.Linear(k, n)]
    return nn.Sequential(*layers)


class FromTokens:
    """Start values for a prompt `embedding` that is the embedding of real tokens, as PEFT's PromptTuningInit has them.

    Both methods write in place, so that an optimizer may already hold the parameter, and return the module.
    """

    embedding: nn.Embedding

    def from_text(self, ids: Sequence[int] | Tensor, embedding: Tensor | nn.Embedding):
        """The embeddings of a phrase, cut or repeated to num_virtual_tokens (PromptTuningInit.TEXT).

        Args:
            ids: the phrase's tokens, int [any length but 0]; PEFT takes them with the tokenizer's special tokens.
            embedding: [V, E], or the model's embedding module, which is called: some scale what they look up.

        Raises:
            ValueError: an encoder of type "lstm" or "mlp", whose prompt is not its table; no ids; another E.
            IndexError: an id outside [0, V).
        """
        op = f"{type(self).__name__}.from_text"
        table = self._source(op, embedding)
        if not isinstance(ids, Tensor):
            check_type(op, "ids", ids, (list, tuple), "a tensor or a list of ints")
            for token in ids:
                check_type(op, "ids", token, int, "a tensor or a list of ints")
            ids = torch.tensor(ids, dtype=torch.int64)
        check_tensor(op, "ids", ids, dtypes=IDS, dim=1)
        if not len(ids):
            raise ValueError(f"{op}: ids must hold at least one token, got none")
        wrong = next((i for i in ids.tolist() if not 0 <= i < len(table)), None)
        if wrong is not None:
            raise IndexError(f"{op}: ids must be in [0, {len(table)}), got {wrong}")
        count = self.embedding.num_embeddings
        return self._take(ids.repeat(math.ceil(count / len(ids)))[:count], embedding)

    def from_vocab(self, embedding: Tensor | nn.Embedding):
        """The embeddings of random tokens, drawn evenly from the vocabulary (PromptTuningInit.SAMPLE_VOCAB).

        Args and errors: those of from_text.
        """
        table = self._source(f"{type(self).__name__}.from_vocab", embedding)
        return self._take(torch.randint(0, len(table), (self.embedding.num_embeddings,)), embedding)

    def _source(self, op: str, embedding: Tensor | nn.Embedding) -> Tensor:
        """The checked table [V, E] behind `embedding`."""
        kind = getattr(self, "encoder_reparameterization_type", "embedding")
        if kind != "embedding":
            raise ValueError(f"{op}: encoder_reparameterization_type must be 'embedding', got {kind!r}")
        check_type(op, "embedding", embedding, (Tensor, nn.Embedding), "a tensor or an nn.Embedding")
        table = embedding.weight if isinstance(embedding, nn.Embedding) else embedding
        check_tensor(op, "embedding", table, dtypes=FLOATS, dim=2)
        if not len(table) or table.shape[1] != self.embedding.embedding_dim:
            raise ValueError(f"{op}: embedding must have shape [V, {self.embedding.embedding_dim}], got {shape(table)}")
        return table

    @torch.no_grad()
    def _take(self, ids: Tensor, embedding: Tensor | nn.Embedding):
        rows = embedding(ids.to(embedding.weight.device)) if isinstance(embedding, nn.Embedding) else embedding[ids]
        self.embedding.weight.copy_(rows)
        return self


class PromptEncoder(FromTokens, PromptNetwork):
    """h(P): pseudo tokens and a network that turns them into prompt embeddings [num_virtual_tokens, token_dim].

    "lstm" is a bidirectional LSTM and two linear layers, "mlp" three linear layers, "embedding" nothing: the table is
    the prompt (prompt tuning, arXiv 2104.08691). Modules, sizes, initialisation and state-dict keys are those of a live
    peft.PromptEncoder, or peft.PromptEmbedding for "embedding". (What PEFT saves is only the table that it computes.)

    Args:
        num_virtual_tokens: P. PEFT's num_transformer_submodules is 1 here: one encoder per place that reads a prompt.
        token_dim: E.
        encoder_reparameterization_type: "lstm", "mlp" or "embedding".
        encoder_hidden_size: default token_dim.
        encoder_num_layers, encoder_dropout: of the LSTM; the MLP has neither.

    Raises:
        TypeError, ValueError: an argument of a wrong type, or outside its range.
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
        nn.Module.__init__(self)
        self._num_read: int | None = None
        check_size("PromptEncoder", "num_virtual_tokens", num_virtual_tokens)
        self._build(
            token_dim,
            encoder_reparameterization_type,
            encoder_hidden_size,
            encoder_num_layers,
            encoder_dropout,
            num_virtual_tokens,
        )

    @classmethod
    def lama(cls, num_virtual_tokens: int, token_dim: int, lstm_dropout: float = 0.0) -> "PromptEncoder":
        """The encoder of the P-Tuning paper's own code (THUDM/P-tuning, LAMA/p_tuning/prompt_encoder.py).

        Two bidirectional LSTM layers of half the width and Linear-ReLU-Linear, all [token_dim]; its templates (3, 3, 3)
        have nine virtual tokens. PEFT's default is twice as wide.

        Raises:
            ValueError: an odd token_dim, which two directions cannot halve.
        """
        check_size("PromptEncoder.lama", "token_dim", token_dim)
        if token_dim % 2:
            raise ValueError(f"PromptEncoder.lama: token_dim must be even, got {token_dim}")
        return cls(num_virtual_tokens, token_dim, "lstm", token_dim // 2, 2, lstm_dropout)

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], encoder_dropout: float = 0.0, num_virtual_tokens: int | None = None
    ) -> "PromptEncoder":
        """Rebuild from a state dict, also from that of a live peft.PromptEncoder: type and sizes are its shapes.

        What leaves no trace in a state dict has to be said again: the LSTM's dropout, to train on, and how much of the
        output is read.

        Args:
            num_virtual_tokens: P; None: all that the encoder makes. PEFT's encoders for sequence-to-sequence models
                have 2 P pseudo tokens (num_transformer_submodules 2), all of which go through the network, and PEFT
                reads the first P of what comes out: give P of those.

        Raises:
            ValueError: keys that no encoder has; more tokens than the encoder makes.
        """
        encoder = super().from_state_dict(state, encoder_dropout)
        if num_virtual_tokens is not None:
            check_size("PromptEncoder.from_state_dict", "num_virtual_tokens", num_virtual_tokens)
            made = encoder.embedding.num_embeddings
            if num_virtual_tokens > made:
                raise ValueError(
                    f"PromptEncoder.from_state_dict: num_virtual_tokens must be at most {made}, as the encoder makes, "
                    f"got {num_virtual_tokens}"
                )
            encoder._num_read = None if num_virtual_tokens == made else num_virtual_tokens
        return encoder

    @property
    def num_virtual_tokens(self) -> int:
        return self.embedding.num_embeddings if self._num_read is None else self._num_read

    def forward(self) -> Tensor:
        prompt = super().forward(self.embedding.weight)
        return prompt if self._num_read is None else prompt[: self._num_read]


class PromptTable(nn.Module):
    """The prompt that an encoder left behind: [P, E], a buffer under the name that PEFT saves, not trainable."""

    def __init__(self, prompt_embeddings: Tensor):
        super().__init__()
        self.register_buffer("prompt_embeddings", prompt_embeddings)

    @property
    def num_virtual_tokens(self) -> int:
        return self.prompt_embeddings.shape[0]

    @property
    def token_dim(self) -> int:
        return self.prompt_embeddings.shape[1]

    def forward(self) -> Tensor:
        return self.prompt_embeddings

    def extra_repr(self) -> str:
        return f"num_virtual_tokens={self.num_virtual_tokens}, token_dim={self.token_dim}"
