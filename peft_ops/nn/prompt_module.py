"""Prompts of many adapters that a mixed batch reads as one table, computed once per adapter and batch."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from peft_ops.nn.adapters import AdapterModule, check_names, check_type, same_stamp, stamp
from peft_ops.nn.tasks import TaskBatch, batch_of
from peft_ops.ops.prompt_concat import prompt_concat
from peft_ops.ops.prompt_embed import prompt_embed
from peft_ops.reference import PromptBatch

LENGTHS_KEPT = 256  # small tensors, each of which saves a copy to the device


class PromptModule(AdapterModule):
    """What modules of prompts share: the table of a batch, its snapshot for serving, and the call of the operator.

    A prompt is computed by itself, whichever others the batch needs, so that its bits do not depend on them.
    """

    def __init__(self):
        super().__init__()
        self._served: dict[tuple[str, ...], tuple[dict, tuple[Tensor, Tensor]]] = {}
        self._lengths: dict[tuple, Tensor] = {}

    def prompt(self, name: str) -> Tensor:
        """[P, E] of one adapter."""
        raise NotImplementedError

    def num_virtual_tokens(self, name: str) -> int:
        """P of one adapter."""
        raise NotImplementedError

    def sources(self, name: str) -> Iterable[Tensor]:
        """Every tensor that the prompt of an adapter is made of."""
        raise NotImplementedError

    def table(self, names: Sequence[str]) -> tuple[Tensor, Tensor] | None:
        """Prompts [len(names), P, E], padded to the longest, and lengths [len(names)]; None if no adapter has one."""
        names = check_names(type(self).__name__, "names", names)
        present = {name: self.prompt(name) for name in names if name in self.adapters}
        if not present:
            return None
        first, *others = present.values()
        dtype = first.dtype
        for prompt in others:  # never narrowed by what else is in the batch
            dtype = torch.promote_types(dtype, prompt.dtype)
        nothing = first.new_zeros(0, first.shape[1])
        prompts = [present.get(name, nothing).to(dtype) for name in names]
        return pad_sequence(prompts, batch_first=True), self._lengths_of(tuple(map(len, prompts)), nothing.device)

    def _lengths_of(self, lengths: tuple[int, ...], device: torch.device) -> Tensor:
        """A copy from host memory waits for the GPU and does not belong in a graph: made once for the same lengths."""
        key = lengths, device
        if key not in self._lengths:
            if len(self._lengths) == LENGTHS_KEPT:
                self._lengths.clear()
            with torch.inference_mode(False):  # training may read it later
                self._lengths[key] = torch.tensor(lengths, device=device)
        return self._lengths[key]

    @torch.no_grad()
    def materialize(self, names: Sequence[str] | None) -> None:
        """Keep the prompts of these adapters, without dropout, for batches without gradients; None drops all.

        They are served until an encoder changes.
        """
        if names is None:
            return self._served.clear()
        names = check_names(type(self).__name__, "names", names)
        with without_dropout(self):
            table = self.table(names)
        if table is not None:
            self._served[names] = self._stamp(names), table

    def _stamp(self, names: Sequence[str]) -> dict[str, list[tuple]]:
        return {name: stamp(self.sources(name)) for name in names if name in self.adapters}

    def _snapshot(self, names: tuple[str, ...]) -> tuple[Tensor, Tensor] | None:
        """The materialized prompts, if no encoder that is still there has changed; some may have been dropped. A
        forward with gradients ends them: an optimizer that leaves no trace may follow it."""
        if torch.compiler.is_compiling():
            return None
        if torch.is_grad_enabled():
            self._served.clear()
            return None
        before, table = self._served.get(names, ({}, None))
        return table if all(same_stamp(before.get(n, []), now) for n, now in self._stamp(names).items()) else None

    def forward(
        self,
        input_ids: Tensor,
        embedding: Tensor,
        attention_mask: Tensor | None = None,
        batch: TaskBatch | None = None,
        **kwargs,
    ) -> PromptBatch:
        """`prompt_concat` with the prompts of the batch; kwargs: labels, padding_side. [B, S] -> [B, P + S]."""
        batch, prompts, lengths = self._read(input_ids, embedding, batch)
        return prompt_concat(
            input_ids, embedding, prompts, batch.ids, prompt_lengths=lengths, attention_mask=attention_mask, **kwargs
        )

    def embed(self, input_ids: Tensor, embedding: Tensor, batch: TaskBatch | None = None, **kwargs) -> Tensor:
        """`prompt_embed` with the prompts of the batch, for ids that hold virtual tokens, say a Template's; its kwargs.

        [B, S] -> [B, S, E]. A row without a prompt, the base model's too, takes ids without virtual tokens only.
        """
        batch, prompts, lengths = self._read(input_ids, embedding, batch)
        return prompt_embed(input_ids, embedding, prompts, batch.ids, prompt_lengths=lengths, **kwargs)

    def _read(
        self, input_ids: Tensor, embedding: Tensor, batch: TaskBatch | None
    ) -> tuple[TaskBatch, Tensor, Tensor | None]:
        """The batch, or that of the context, its prompts and their lengths."""
        op = type(self).__name__
        check_type(op, "input_ids", input_ids, Tensor, "a tensor")
        check_type(op, "embedding", embedding, Tensor, "a tensor [V, E], say model.get_input_embeddings().weight")
        batch = batch_of(op, batch)
        if batch is None:
            batch = TaskBatch((), torch.full(input_ids.shape[:1], -1, device=input_ids.device))
        table = self._snapshot(batch.names)
        no_prompt = embedding.new_zeros(len(batch.names), 0, embedding.shape[-1]), None
        return batch, *(table or self.table(batch.names) or no_prompt)

    def extra_repr(self) -> str:
        return f"adapters={list(self.adapters)}"


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, and then every part's own mode again."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True
