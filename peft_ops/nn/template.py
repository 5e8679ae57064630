"""Templates of virtual tokens around a text: P-Tuning's (3, 3, 3) is `<P*3> [MASK] <P*3> {text} <P*3>`."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

PIECE = re.compile(r"(<P(?:\*\d+)?>|\[(?:MASK|CLS|SEP|BOS|EOS)\]|\{\w+\})")


class Template:
    """Turns texts into ids for `peft_ops.prompt_embed`, in which the virtual tokens are vocab_size, vocab_size + 1, ...

    Args:
        form: `<P>` or `<P*n>`: virtual tokens, numbered in order; `[MASK]`, `[CLS]`, `[SEP]`, `[BOS]`, `[EOS]`: the
            tokenizer's; `{name}`: a text that the caller gives; anything else is encoded as it stands, stripped.
        tokenizer: encodes and decodes as Hugging Face's do, with `mask_token_id`, `pad_token_id` and the like.
        vocab_size: rows of the model's embedding, which may be more than the tokenizer knows.
    """

    def __init__(self, form: str, tokenizer, vocab_size: int):
        self.form, self.tokenizer, self.vocab_size = form, tokenizer, vocab_size
        self.num_virtual_tokens, self._special, self._pieces = 0, {}, []
        for piece in filter(None, map(str.strip, PIECE.split(form))):
            if not PIECE.fullmatch(piece):
                self._pieces.append(self._encode(piece))
            elif piece[0] == "{":
                self._pieces.append(piece[1:-1])
            elif piece[0] == "[":
                token = getattr(tokenizer, f"{piece[1:-1].lower()}_token_id", None)
                if token is None:
                    raise ValueError(f"Template: form must use tokens that the tokenizer has, got {piece}")
                self._special[token] = piece
                self._pieces.append([token])
            else:
                start = vocab_size + self.num_virtual_tokens
                self.num_virtual_tokens += int(piece[3:-1] or 1)
                self._pieces.append(list(range(start, vocab_size + self.num_virtual_tokens)))

    def __repr__(self) -> str:
        return f"Template({self.form!r}, num_virtual_tokens={self.num_virtual_tokens})"

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def encode(self, **texts: str) -> list[int]:
        """The ids of one sequence."""
        names = {piece for piece in self._pieces if isinstance(piece, str)}
        if names != texts.keys():
            raise ValueError(f"Template: texts must be given for {sorted(names)}, got {sorted(texts)}")
        return [i for piece in self._pieces for i in (self._encode(texts[piece]) if isinstance(piece, str) else piece)]

    def __call__(self, padding_side: str = "right", **texts: Sequence[str]) -> dict[str, Tensor]:
        """input_ids and attention_mask [B, S] of texts given as lists, padded to the longest."""
        rows = [self.encode(**dict(zip(texts, row, strict=True))) for row in zip(*texts.values(), strict=True)]
        if padding_side not in ("right", "left"):
            raise ValueError(f"Template: padding_side must be 'right' or 'left', got {padding_side!r}")
        pad = getattr(self.tokenizer, "pad_token_id", None) or 0
        size = len(rows), max(map(len, rows), default=0)
        ids, mask = torch.full(size, pad), torch.zeros(size, dtype=torch.int64)
        for b, row in enumerate(rows):
            at = slice(size[1] - len(row), None) if padding_side == "left" else slice(0, len(row))
            ids[b, at], mask[b, at] = torch.tensor(row, dtype=torch.int64), 1
        return dict(input_ids=ids, attention_mask=mask)

    def decode(self, input_ids: Tensor | Sequence[int], attention_mask: Tensor | Sequence[int] | None = None) -> str:
        """One sequence as text: `P0 P1 P2 [MASK] ...`; slots that the mask does not attend to are left out."""
        keep = [1] * len(input_ids) if attention_mask is None else list(attention_mask)
        words, text = [], []
        for i in [*(int(i) for i, k in zip(input_ids, keep, strict=True) if k), None]:  # None writes the last text
            if i is not None and i < self.vocab_size and i not in self._special:
                text.append(i)
                continue
            words += [self.tokenizer.decode(text).strip()] if text else []
            text = []
            if i is not None:
                words.append(self._special.get(i, f"P{i - self.vocab_size}"))
        return " ".join(words)
