"""P-Tuning and prompt tuning: the encoders of many adapters, a network that they may share, and tables of PEFT's."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from peft_ops._checks import FLOATS, check_tensor
from peft_ops.nn.adapters import check_known_name, check_names, check_new_name, check_type
from peft_ops.nn.prompt_encoders import PromptEncoder, PromptNetwork, PromptTable
from peft_ops.nn.prompt_module import PromptModule, without_dropout


class PromptEmbedding(PromptModule):
    """The prompts of any number of adapters. A batch runs the encoders it needs, once each, for however many rows.

    Each adapter has an encoder of its own, or all share one network: then an adapter is its pseudo tokens, which go
    through `shared`. Prompts may differ in length; an adapter without an encoder here is served without a prompt.

    The state dict says what is there: `shared.*` is the network of all, `encoders.<adapter>.*` an adapter's own encoder
    (or its pseudo tokens, `embedding.weight` alone), `encoders.<adapter>.prompt_embeddings` a table whose encoder was
    dropped. `from_state_dict` rebuilds the module from it, and training goes on where it stopped.

    Args:
        shared: a PromptNetwork that all adapters share; None: an encoder each.
    """

    def __init__(self, shared: PromptNetwork | None = None):
        super().__init__()
        check_type("PromptEmbedding", "shared", shared, (PromptNetwork, type(None)), "a PromptNetwork or None")
        if isinstance(shared, PromptEncoder):
            raise TypeError("PromptEmbedding: shared must be a PromptNetwork, without pseudo tokens, got PromptEncoder")
        self.shared = shared
        self.encoders = nn.ModuleDict()

    @property
    def adapters(self) -> Iterable[str]:
        return self.encoders.keys()

    def add_adapter(self, name: str, encoder: PromptEncoder) -> PromptEncoder:
        """A new adapter. With a shared network, an encoder of type "embedding": its table is the pseudo tokens.

        Raises:
            TypeError: no name, no encoder.
            ValueError: a name that exists or cannot be a key; another token_dim than the others'; a network of its own
                beside a shared one.
        """
        op = "PromptEmbedding"
        check_new_name(op, name, self.encoders)
        check_type(op, "encoder", encoder, PromptEncoder, "a PromptEncoder")
        kind = encoder.encoder_reparameterization_type
        if self.shared is not None and kind != "embedding":
            raise ValueError(f"{op}: encoder must be of type 'embedding' where the network is shared, got {kind!r}")
        return self._add(name, encoder)

    def _add(self, name: str, encoder: PromptEncoder | PromptTable):
        other = next(iter(self.encoders.values()), encoder) if self.shared is None else self.shared
        if other.token_dim != encoder.token_dim:
            got = f"{encoder.token_dim} for {name!r}"
            raise ValueError(f"PromptEmbedding: token_dim must be {other.token_dim}, as the others have, got {got}")
        self.encoders[name] = encoder
        return encoder

    def delete_adapter(self, name: str) -> None:
        """Forget an adapter; its rows are then served without a prompt."""
        check_known_name("PromptEmbedding", name, self.adapters)
        del self.encoders[name]
        self._served = {names: kept for names, kept in self._served.items() if name not in names}

    def prompt(self, name: str) -> Tensor:
        """[P, E] of one adapter.

        Raises:
            RuntimeError: in training, where only the adapter's table is kept.
        """
        encoder = self._encoder(name)
        if isinstance(encoder, PromptTable):
            if self.training and torch.is_grad_enabled():
                raise RuntimeError(
                    f"PromptEmbedding: {name!r} has no encoder to train, only its table; serve it in eval() or "
                    "torch.no_grad(), or load the table with trainable=True to train it as it is"
                )
            return encoder()
        return encoder() if self.shared is None else self.shared(encoder())

    def num_virtual_tokens(self, name: str) -> int:
        return self._encoder(name).num_virtual_tokens

    def _encoder(self, name: str) -> nn.Module:
        check_known_name("PromptEmbedding", name, self.adapters)
        return self.encoders[name]

    def sources(self, name: str) -> Iterator[Tensor]:
        encoder = self.encoders[name]
        modules = [encoder] if self.shared is None or isinstance(encoder, PromptTable) else [encoder, self.shared]
        for module in modules:
            yield from (*module.parameters(), *module.buffers())

    def materialize(self, names: Sequence[str] | None = None) -> None:
        """Replace encoders by the tables they compute, bit by bit what they serve: for inference alone, and for good.

        What they serve without gradients, that is: where gradients are enabled, an LSTM on a CPU takes other kernels,
        which round otherwise. A shared network goes with the last adapter that needs it. Parameters that an optimizer
        holds are no longer those of the module.

        Args:
            names: adapters; None: all.

        Raises:
            ValueError: a name that is no adapter; nothing is dropped then.
        """
        names = check_names("PromptEmbedding", "names", self.adapters if names is None else names)
        for name in names:
            check_known_name("PromptEmbedding", name, self.adapters)
        # leaving inference mode turns gradients on, where an LSTM takes other kernels
        with without_dropout(self), torch.inference_mode(False), torch.no_grad():
            tables = {name: self.prompt(name).detach().clone() for name in names}
        for name, table in tables.items():
            self.encoders[name] = PromptTable(table).train(self.encoders[name].training)
        if all(isinstance(encoder, PromptTable) for encoder in self.encoders.values()):
            self.shared = None

    def load_peft_table(self, name: str, table: Tensor, trainable: bool = False) -> PromptEncoder | PromptTable:
        """A new adapter that serves what PEFT saved: the tensor `prompt_embeddings` of adapter_model.safetensors.

        Args:
            table: [P, E], of P-Tuning or prompt tuning. PEFT saves 2 P rows for a sequence-to-sequence model and reads
                the first P of them, before the encoder's text: pass table[:P]. It is copied, to the device of the
                adapters that are there already.
            trainable: train it on, as prompt tuning does. PEFT does not save an encoder, so there is none to train.

        Raises:
            TypeError, ValueError: as add_adapter, and trainable beside a shared network.
        """
        op = "PromptEmbedding.load_peft_table"
        check_new_name(op, name, self.encoders)
        check_tensor(op, "table", table, dtypes=FLOATS, dim=2)
        check_type(op, "trainable", trainable, bool, "a bool")
        if not len(table):
            raise ValueError(f"{op}: table must hold at least one virtual token, got shape {list(table.shape)}")
        if trainable and self.shared is not None:
            raise ValueError(f"{op}: trainable must be False where the network is shared, got True")
        device = next((t.device for other in self.adapters for t in self.sources(other)), table.device)
        with torch.inference_mode(False), torch.no_grad():
            table = table.detach().to(device, copy=True)
            if not trainable:
                return self._add(name, PromptTable(table).train(self.training))
            encoder = PromptEncoder(*table.shape, "embedding").to(table)
            encoder.embedding.weight.copy_(table)
        return self._add(name, encoder.train(self.training))

    @torch.no_grad()
    def peft_state_dict(self, name: str) -> dict[str, Tensor]:
        """What PEFT saves of an adapter, and loads: {"prompt_embeddings": [P, E]}, on the host, without the encoder."""
        check_known_name("PromptEmbedding", name, self.adapters)
        with without_dropout(self):
            return {"prompt_embeddings": self.prompt(name).detach().to("cpu", copy=True).contiguous()}

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Tensor],
        encoder_dropout: float = 0.0,
        num_virtual_tokens: Mapping[str, int] | None = None,
    ) -> "PromptEmbedding":
        """Rebuild the module that a state dict is of, adapters, encoders, tables and shared network.

        Args:
            state: keys start with `encoders.` and `shared.`: strip the prefix that a parent module puts before them.
            encoder_dropout: of the LSTMs, of which a state dict has no trace; to train on.
            num_virtual_tokens: P of adapters whose encoders make more than is read (PromptEncoder.from_state_dict).

        Raises:
            ValueError: a key that no PromptEmbedding has; a number for no encoder of the state.
        """
        check_type("PromptEmbedding", "state", state, Mapping, "a state dict")
        own: dict[str, dict[str, Tensor]] = {}
        shared = {}
        for key, value in state.items():
            top, _, rest = key.partition(".")
            name, _, inner = rest.partition(".")
            if top == "shared":
                shared[rest] = value
            elif top == "encoders" and inner:
                own.setdefault(name, {})[inner] = value
            else:
                raise ValueError(f"PromptEmbedding: state must hold encoders.<adapter>.* and shared.*, got {key!r}")
        what = "a mapping of adapters to numbers, or None"
        check_type("PromptEmbedding", "num_virtual_tokens", num_virtual_tokens, (Mapping, type(None)), what)
        read = dict(num_virtual_tokens or {})
        module = cls(PromptNetwork.from_state_dict(shared, encoder_dropout) if shared else None)
        for name, parts in own.items():
            if "prompt_embeddings" in parts:
                module.load_peft_table(name, parts["prompt_embeddings"])
            else:
                module.add_adapter(name, PromptEncoder.from_state_dict(parts, encoder_dropout, read.pop(name, None)))
        if read:
            encoders = [name for name, parts in own.items() if "prompt_embeddings" not in parts]
            raise ValueError(f"PromptEmbedding: num_virtual_tokens must name encoders of {encoders}, got {list(read)}")
        return module
