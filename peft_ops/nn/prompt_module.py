"""Prompts of many adapters that a mixed batch reads as one table, computed once per adapter and batch."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from peft_ops.nn.adapters import AdapterModule, check_names, check_type, same_stamp, stamp
from peft_ops.nn.tasks import TaskBatch, batch_of
from peft_ops.ops.prompt_concat import prompt_concat
from peft_ops.ops.prompt_concat_packed import prompt_concat_packed
from peft_ops.ops.prompt_embed import prompt_embed
from peft_ops.reference import PackedPromptBatch, PromptBatch

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
    def keep_table(self, names: Sequence[str] | None) -> None:
        """Keep the prompts of these adapters, without dropout, for batches without gradients; None forgets all.

        They are served until an encoder changes; the encoders stay.
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
        """The kept prompts, if no encoder that is still there has changed; some may have been dropped. A forward with
        gradients ends them: an optimizer that leaves no trace may follow it."""
        if torch.is_grad_enabled():
            self._served = {}  # traced, a plain assignment, which the graph's caller runs too
            return None
        if torch.compiler.is_compiling():
            return None
        before, table = self._served.get(names, ({}, None))
        return table if all(same_stamp(before.get(n, []), now) for n, now in self._stamp(names).items()) else None

    def forward(
        self,
        input_ids: Tensor | None,
        embedding: Tensor | None,
        attention_mask: Tensor | None = None,
        batch: TaskBatch | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ) -> PromptBatch:
        """`prompt_concat` with the prompts of the batch; kwargs: its labels, padding_side, after_bos and what it adds.

        [B, S] -> [B, P + S]. `inputs_embeds` [B, S, E] may stand in for ids and embedding.
        """
        tokens, source = self._tokens(input_ids, embedding, inputs_embeds)
        batch, prompts, lengths = self._read(len(tokens), source, batch)
        return prompt_concat(
            input_ids, embedding, prompts, batch.ids, prompt_lengths=lengths, attention_mask=attention_mask,
            inputs_embeds=inputs_embeds, **kwargs,
        )  # fmt: skip

    def packed(
        self,
        input_ids: Tensor | None,
        cu_seqlens: Tensor,
        embedding: Tensor | None,
        batch: TaskBatch | None = None,
        *,
        max_seqlen: int,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ) -> PackedPromptBatch:
        """`prompt_concat_packed` with the prompts of the batch, which has a row per sequence; its kwargs."""
        check_type(type(self).__name__, "cu_seqlens", cu_seqlens, Tensor, "a tensor")
        _, source = self._tokens(input_ids, embedding, inputs_embeds)
        batch, prompts, lengths = self._read(len(cu_seqlens) - 1, source, batch)
        return prompt_concat_packed(
            input_ids, cu_seqlens, embedding, prompts, batch.ids, max_seqlen=max_seqlen, prompt_lengths=lengths,
            inputs_embeds=inputs_embeds, **kwargs,
        )  # fmt: skip

    def embed(self, input_ids: Tensor, embedding: Tensor, batch: TaskBatch | None = None, **kwargs) -> Tensor:
        """`prompt_embed` with the prompts of the batch, for ids that hold virtual tokens, say a Template's; its kwargs.

        [B, S] -> [B, S, E]. A row without a prompt, the base model's too, takes ids without virtual tokens only.
        """
        tokens, source = self._tokens(input_ids, embedding, None)
        batch, prompts, lengths = self._read(len(tokens), source, batch)
        return prompt_embed(input_ids, embedding, prompts, batch.ids, prompt_lengths=lengths, **kwargs)

    def _tokens(
        self, input_ids: Tensor | None, embedding: Tensor | None, inputs_embeds: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The tokens, ids or embeddings, and a tensor whose last dimension, dtype and device are the embeddings'."""
        op = type(self).__name__
        if inputs_embeds is not None:
            check_type(op, "inputs_embeds", inputs_embeds, Tensor, "a tensor")
            return inputs_embeds, inputs_embeds
        check_type(op, "input_ids", input_ids, Tensor, "a tensor")
        check_type(op, "embedding", embedding, Tensor, "a tensor [V, E], say model.get_input_embeddings().weight")
        return input_ids, embedding

    def _read(self, rows: int, source: Tensor, batch: TaskBatch | None) -> tuple[TaskBatch, Tensor, Tensor | None]:
        """The batch, or that of the context, its prompts and their lengths."""
        batch = batch_of(type(self).__name__, batch)
        if batch is None:
            batch = TaskBatch((), torch.full((rows,), -1, device=source.device))
        table = self._snapshot(batch.names)
        no_prompt = source.new_zeros(len(batch.names), 0, source.shape[-1]), None
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
