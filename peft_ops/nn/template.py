"""Templates of virtual tokens around a text: P-Tuning's (3, 3, 3) is `P0..P2 [MASK] P3..P5 {text} P6..P8`."""

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from peft_ops._checks import IDS, check_tensor
from peft_ops.nn.adapters import check_known_name, check_size, check_type
from peft_ops.nn.prompt_module import PromptModule

PIECE = re.compile(r"(<P(?:\*[1-9]\d*)?>|(?<!\S)P\d+(?:\.\.P\d+)?(?!\S)|\[(?:MASK|CLS|SEP|BOS|EOS)\]|\{[^\W\d]\w*\})")
MOST = 1 << 16  # virtual tokens; more are a slip of the pen
# what only looks like a piece would silently be text; how it is to be written
MISTAKES = {
    re.compile(r"<\s*p\s*[*\d\s-]*>", re.I): "virtual tokens as <P>, <P*n>, n from 1 on, P0 or P0..P2",
    re.compile(r"\bp\d+\s*(?:\.\.+|-)\s*p?\d+\b|\S*(?<!\w)P\d+(?!\w)\S*|\S*\.\.P\d+", re.I): (
        "virtual tokens as <P>, <P*n>, n from 1 on, P0 or P0..P2, with spaces around them"
    ),
    re.compile(
        r"\[\s*(?:[A-Z]+|(?i:mask|cls|sep|bos|eos))\s*\]"
    ): "special tokens as [MASK], [CLS], [SEP], [BOS] or [EOS]",
    re.compile(r"\{[^{}]*\}?|\}"): "texts as {name}, a name that Python could have",
}


class Template:
    """Turns texts into ids for `peft_ops.prompt_embed`, in which the virtual tokens are vocab_size, vocab_size + 1, ...

    Args:
        form: `P0`, `P0..P2`: virtual tokens, as `decode` writes them; `<P>`, `<P*n>`: the next one, or n; `[MASK]`,
            `[CLS]`, `[SEP]`, `[BOS]`, `[EOS]`: the tokenizer's; `{name}`: a text that the caller gives; anything else
            is encoded as it stands, stripped. Numbers may repeat, and leave out none below the highest.
        tokenizer: encodes and decodes as Hugging Face's do, with `mask_token_id`, `pad_token_id` and the like.
        vocab_size: rows of the model's embedding, which may be more than the tokenizer knows.
        max_length: ids of a sequence, at most: texts are cut, the longest first, at the tokenizer's `truncation_side`,
            and nothing else is. None: as long as they come.

    Raises:
        ValueError: a special token that the tokenizer does not have; what only looks like a piece (`<p*3>`, `[mask]`,
            `{a text}`); a gap in the virtual tokens' numbers; a max_length that leaves out more than texts.
    """

    def __init__(self, form: str, tokenizer, vocab_size: int, max_length: int | None = None):
        check_type("Template", "form", form, str, "a str")
        check_size("Template", "vocab_size", vocab_size)
        if not hasattr(tokenizer, "encode"):
            raise TypeError(f"Template: tokenizer must encode and decode, got {type(tokenizer).__name__}")
        self.form, self.tokenizer, self.vocab_size, self.max_length = form, tokenizer, vocab_size, max_length
        self.num_virtual_tokens, self._special, self._pieces = 0, {}, []
        for piece in filter(None, map(str.strip, PIECE.split(form))):
            if not PIECE.fullmatch(piece):
                for mistake, wanted in MISTAKES.items():
                    if found := mistake.search(piece):
                        raise ValueError(f"Template: form must hold {wanted}, got {found[0]!r}")
                self._pieces.append(self._encode(piece))
            elif piece[0] == "{":
                if piece == "{padding_side}":
                    raise ValueError(
                        "Template: form must name its texts otherwise than padding_side, got {padding_side}"
                    )
                self._pieces.append(piece[1:-1])
            elif piece[0] == "[":
                token = getattr(tokenizer, f"{piece[1:-1].lower()}_token_id", None)
                if token is None:
                    raise ValueError(f"Template: form must use tokens that the tokenizer has, got {piece}")
                self._special[token] = piece
                self._pieces.append(self._known([token]))
            else:
                self._pieces.append([vocab_size + i for i in self._virtual(piece)])
        numbers = {i - vocab_size for piece in self._pieces if not isinstance(piece, str) for i in piece}
        gap = next((i for i in range(self.num_virtual_tokens) if i not in numbers), None)
        if gap is not None:
            raise ValueError(
                f"Template: form must hold P0 to P{self.num_virtual_tokens - 1}, got {form!r} without P{gap}"
            )
        fixed = [i for piece in self._pieces if not isinstance(piece, str) for i in piece]
        self._num_fixed, mask = len(fixed), getattr(tokenizer, "mask_token_id", None)
        self.num_masks = fixed.count(mask)
        if max_length is not None:
            check_size("Template", "max_length", max_length)
            if max_length < len(fixed):
                what = f"be at least {len(fixed)}, the ids of {form!r} without texts"
                raise ValueError(f"Template: max_length must {what}, got {max_length}")

    def __repr__(self) -> str:
        return f"Template({self.form!r}, num_virtual_tokens={self.num_virtual_tokens})"

    def _virtual(self, piece: str) -> range:
        """The numbers of a piece of virtual tokens."""
        if piece[0] == "<":
            first, last = self.num_virtual_tokens, self.num_virtual_tokens + int(piece[3:-1] or 1) - 1
        else:
            first, *rest = (int(number) for number in re.findall(r"\d+", piece))
            last = rest[0] if rest else first
            if last < first:
                raise ValueError(f"Template: form must hold virtual tokens in ascending order, got {piece!r}")
        if last >= MOST:
            raise ValueError(f"Template: form must hold at most {MOST} virtual tokens, got {piece!r}")
        self.num_virtual_tokens = max(self.num_virtual_tokens, last + 1)
        return range(first, last + 1)

    def _encode(self, text: str) -> list[int]:
        return self._known(list(self.tokenizer.encode(text, add_special_tokens=False)))

    def _known(self, ids: list[int]) -> list[int]:
        """The ids, none of which would be read as a virtual token."""
        if max(ids, default=-1) >= self.vocab_size:
            got = f"{self.vocab_size} and {max(ids)}"
            raise ValueError(f"Template: vocab_size must be above every id of the tokenizer, got {got}")
        return ids

    def _texts(self, texts: dict[str, str]) -> dict[str, list[int]]:
        """The ids of each text, as many as max_length leaves room for."""
        names = [piece for piece in self._pieces if isinstance(piece, str)]
        if set(names) != texts.keys():
            raise ValueError(f"Template: texts must be given for {sorted(set(names))}, got {sorted(texts)}")
        for name, text in texts.items():
            check_type("Template", f"the text {name!r}", text, str, "a str")
        ids = {name: self._encode(text) for name, text in texts.items()}
        for name, own in ids.items():
            if self.num_masks and self.tokenizer.mask_token_id in own:
                raise ValueError(f"Template: texts must leave [MASK] to the form, got {texts[name]!r} for {name!r}")
        if self.max_length is not None:
            room, left = self.max_length - self._num_fixed, len(names)
            for name in sorted(names, key=lambda name: len(ids[name])):  # what a short text leaves, longer ones share
                keep = min(len(ids[name]), room // left)
                start = len(ids[name]) - keep if getattr(self.tokenizer, "truncation_side", "") == "left" else 0
                ids[name] = ids[name][start : start + keep]
                room, left = room - keep, left - 1
        return ids

    def encode(self, /, **texts: str) -> list[int]:
        """The ids of one sequence."""
        ids = self._texts(texts)
        return [i for piece in self._pieces for i in (ids[piece] if isinstance(piece, str) else piece)]

    def __call__(self, /, padding_side: str = "right", **texts: Sequence[str]) -> dict[str, Tensor]:
        """input_ids and attention_mask [B, S] of texts given as lists, padded to the longest."""
        for name, column in texts.items():
            check_type("Template", f"the texts {name!r}", column, (list, tuple), "a list of str")
        sizes = {name: len(column) for name, column in texts.items()}
        if len({*sizes.values()}) > 1:
            raise ValueError(f"Template: texts must be lists of one length, got {sizes}")
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

    def mask_positions(self, input_ids: Tensor) -> Tensor:
        """Where the form's [MASK]s stand in ids [B, S] of this template: int64 [B, num_masks], in order.

        `logits.take_along_dim(positions[..., None], 1)` is what the model says there. A GPU is not synchronised.

        Raises:
            ValueError: a form without [MASK].
        """
        check_tensor("Template.mask_positions", "input_ids", input_ids, dtypes=IDS, dim=2)
        if not self.num_masks:
            raise ValueError(f"Template.mask_positions: form must hold [MASK], got {self.form!r}")
        others = (input_ids != self.tokenizer.mask_token_id).to(torch.uint8)
        return others.argsort(dim=1, stable=True)[:, : self.num_masks]

    def check(self, prompts: PromptModule, names: Iterable[str] | None = None) -> None:
        """Notice prompts of another length: rows that the form does not have, or that it asks for in vain.

        Args:
            prompts: a PromptEmbedding or MultitaskPromptEmbedding.
            names: adapters that are to fill this form; None: all.

        Raises:
            ValueError: a name that is no adapter; an adapter whose prompt has not num_virtual_tokens rows.
        """
        check_type("Template.check", "prompts", prompts, PromptModule, "a module of prompts")
        for name in prompts.adapters if names is None else names:
            check_known_name("Template.check", name, prompts.adapters)
            got = prompts.num_virtual_tokens(name)
            if got != self.num_virtual_tokens:
                what = f"have {self.num_virtual_tokens} virtual tokens, as {self.form!r} has"
                raise ValueError(f"Template.check: prompts must {what}, got {got} for {name!r}")

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
