"""Tiny random PEFT models, and plain PEFT as their oracle: one adapter for the whole batch, of which its rows count."""

import copy
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import peft
import torch
import transformers
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

BASE = "__base__"
VOCAB = 96

# untied: with tied embeddings of this size a model repeats its input
_BARE = dict(vocab_size=VOCAB, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=None)
_SIZES = _BARE | dict(max_position_embeddings=128)
_USUAL = _SIZES | dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
_GROUPED = _USUAL | dict(num_key_value_heads=2)
_T5 = _BARE | dict(d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0)
# family -> (configuration, PEFT's task, the modules that PEFT has no default for)
FAMILIES: dict[str, tuple[Callable, str, dict]] = {
    "llama": (lambda: transformers.LlamaConfig(**_GROUPED), "CAUSAL_LM", {}),
    "mistral": (lambda: transformers.MistralConfig(**_GROUPED, sliding_window=None), "CAUSAL_LM", {}),
    "qwen2": (lambda: transformers.Qwen2Config(**_GROUPED), "CAUSAL_LM", {}),
    "gemma": (lambda: transformers.GemmaConfig(**_GROUPED, head_dim=16), "CAUSAL_LM", {}),
    "phi3": (
        lambda: transformers.Phi3Config(**_GROUPED),
        "CAUSAL_LM",
        dict(target_modules=["qkv_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "opt": (
        lambda: transformers.OPTConfig(
            **_SIZES, hidden_size=64, word_embed_proj_dim=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4
        ),
        "CAUSAL_LM",
        {},
    ),
    "bloom": (
        lambda: transformers.BloomConfig(**_BARE, hidden_size=64, n_layer=2, n_head=4),
        "CAUSAL_LM",
        {},
    ),
    "gpt2": (
        lambda: transformers.GPT2Config(**_BARE, n_embd=64, n_layer=2, n_head=4, n_positions=128),
        "CAUSAL_LM",
        dict(fan_in_fan_out=True),
    ),
    "t5": (lambda: transformers.T5Config(**_T5), "SEQ_2_SEQ_LM", {}),
    "t5-gated": (lambda: transformers.T5Config(**_T5, feed_forward_proj="gated-gelu"), "SEQ_2_SEQ_LM", {}),
    "bert": (lambda: transformers.BertConfig(**_USUAL, num_labels=3), "SEQ_CLS", {}),
    "roberta": (lambda: transformers.RobertaConfig(**_USUAL | dict(pad_token_id=1), num_labels=3), "SEQ_CLS", {}),
}
CAUSAL = [name for name, (_, task, _) in FAMILIES.items() if task == "CAUSAL_LM"]
SEQ2SEQ = ["t5", "t5-gated"]
_AUTO = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
}


def base_model(family: str, task: str | None = None, **options) -> nn.Module:
    """Weights of order 0.3: adapters differ in the first digit of the logits, and no two beams are a near tie."""
    config = FAMILIES[family][0]()
    for name, value in options.items():
        setattr(config, name, value)
    model = _AUTO[task or FAMILIES[family][1]].from_config(config)
    if family in SEQ2SEQ:
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))  # T5's configuration always ties
    return randomized(model).eval()


# what is generated must depend on the last token, or it repeats: loud embeddings, and in T5, which does not scale its
# queries and reads the same text at every step, a quieter attention
STDS = {r"embed|shared": 2.0, r"Attention\.[qk]\.": 0.1, r"Attention\.o": 0.2, r"": 0.3}


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or (parameter == 0).all():  # not the norms' weights
                std = next(std for pattern, std in STDS.items() if re.search(pattern, name))
                parameter.normal_(0, std, generator=generator)
    return model


def set_vectors(model: nn.Module, name: str, seed: int | None = None) -> None:
    """An adapter's vectors of order one, some negative; heads of its own too."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) if seed is None else seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f"ia3_l.{name}" in key:
                parameter.copy_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))
            elif f"modules_to_save.{name}." in key:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif f"prompt_encoder.{name}." in key:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))


def ia3_model(family: str, names: Sequence[str] = ("red", "green"), task: str | None = None, **options):
    """A PEFT model with one (IA)^3 adapter per name; options are IA3Config's."""
    config = peft.IA3Config(task_type=task or FAMILIES[family][1], **{**FAMILIES[family][2], **options})
    model = peft.get_peft_model(base_model(family, task), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, copy.deepcopy(config))
    for name in names:
        set_vectors(model, name)
    return model.eval()


def prompt_model(family: str, lengths: dict[str, int], kind: str = "PROMPT_TUNING", task: str | None = None, **options):
    """A PEFT model with one prompt per name, of its own length; P_TUNING computes it by an LSTM."""
    task, model = task or FAMILIES[family][1], None
    base = base_model(family, task)
    for name, length in lengths.items():
        if kind == "PROMPT_TUNING":
            config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=length, **options)
        else:
            config = peft.PromptEncoderConfig(
                task_type=task,
                num_virtual_tokens=length,
                **{"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 8, "encoder_num_layers": 1}
                | options,
            )
        if model is None:
            model = peft.get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    for name in lengths:
        set_vectors(model, name)
    return model.eval()


def text(lengths: Sequence[int], side: str = "left", pad: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """input_ids and attention_mask of rows of these lengths."""
    generator, S = torch.Generator().manual_seed(seed), max(lengths)
    ids = torch.randint(2, VOCAB, (len(lengths), S), generator=generator)
    slots = torch.arange(S)
    real = slots >= S - torch.tensor(lengths)[:, None] if side == "left" else slots < torch.tensor(lengths)[:, None]
    return {"input_ids": torch.where(real, ids, pad), "attention_mask": real.long()}


def batch_for(model: nn.Module, rows: int, side: str | None = None) -> dict[str, Tensor]:
    """Text of several lengths, padded as the family is for generation."""
    config = model.get_base_model().config
    causal = model.active_peft_config.task_type == "CAUSAL_LM"
    lengths = [7 - i % 3 for i in range(rows)]
    batch = text(lengths, side or ("left" if causal else "right"), pad=config.pad_token_id or 0)
    if config.is_encoder_decoder:
        batch["decoder_input_ids"] = text([4] * rows, seed=1)["input_ids"]
    return batch


@contextmanager
def alone(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """What computes plain PEFT's result with this adapter for the whole batch."""
    if name != BASE:
        model.set_adapter(name)
        yield model
    elif model.active_peft_config.is_prompt_learning:
        # disable_adapter() leaves an encoder-decoder's generate() its prompt, and a classifier the adapter's head
        heads = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
        for head in heads:
            head.enable_adapters(False)
        yield model.get_base_model()
        for head in heads:
            head.enable_adapters(True)
    else:
        with model.disable_adapter():
            yield model


def row_by_row(model: nn.Module, names: Sequence[str], run: Callable[[nn.Module], Tensor]) -> Tensor:
    """The rows of plain PEFT's runs, each from the run of its own adapter; the runs all differ."""
    runs = {}
    for name in dict.fromkeys(names):
        with alone(model, name) as one:
            runs[name] = run(one)
    different = list(runs.values())
    for i, a in enumerate(different):
        for b in different[:i]:
            # by chance two adapters give one row of 67 the same text, and two of 11 in Bloom, which repeats itself
            agree = sum(torch.equal(x, y) for x, y in zip(a, b, strict=True))
            assert agree <= len(a) // 5, "adapters that do nothing"
    return torch.stack([runs[name][i] for i, name in enumerate(names)])
