"""Prompt adapters of a mixed batch: each row's own prompt before its own text, in the inputs of the base model."""

import copy
import inspect
import re
import warnings
from functools import reduce

import torch
from torch import Tensor, nn

from peft_ops.integrations._calls import Call
from peft_ops.nn.task_bank import BASE
from peft_ops.ops.prompt_concat import prompt_concat
from peft_ops.reference import PromptBatch

KINDS = "PROMPT_TUNING", "P_TUNING"


def prompt_of(model: nn.Module, name: str) -> Tensor | None:
    """An adapter's prompt [P, E] as PEFT computes it, differentiable; None for an adapter without one.

    An encoder-decoder's table holds a second prompt, for the decoder, which PEFT does not use with these methods.
    """
    config = model.peft_config.get(name)
    if config is None or not config.is_prompt_learning:
        return None
    encoder, P = model.prompt_encoder[name], config.num_virtual_tokens
    if config.inference_mode:
        return encoder.embedding.weight[:P]
    tokens = model.prompt_tokens[name].unsqueeze(0).to(encoder.embedding.weight.device)
    return encoder(tokens)[0, :P]


def has_prompts(model: nn.Module, call: Call) -> bool:
    """Whether any name of the batch has a prompt, in the model or in its bank."""
    return bool(_names_with_prompts(model, call))


def _names_with_prompts(model: nn.Module, call: Call) -> set[str]:
    learned = {name for name in call.names if name in model.peft_config and model.peft_config[name].is_prompt_learning}
    return learned | {name for name, held in call.held.items() if held.num_virtual_tokens}


def refuse_bare_rows(model: nn.Module, call: Call) -> None:
    """Gemma 3n makes inputs of every layer of ids, ESM scales and normalises what it makes of them. Given embeddings,
    as PEFT gives them with prompts, they do not: a row without a prompt would miss it."""
    base, prompted = model.get_base_model(), _names_with_prompts(model, call)
    bare = [name or BASE for name in call.rows if name not in prompted]
    per_layer = any(getattr(module, "hidden_size_per_layer_input", None) for module in base.modules())
    if bare and (per_layer or base.config.model_type == "esm"):
        raise ValueError(
            f"adapter_names: all rows must have prompts, or none, in a {type(base).__name__}, which reads more from "
            f"input_ids than their embeddings, got {bare[0]!r} among prompts"
        )


def prompts_of(model: nn.Module, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts [tasks, P, E] padded to the longest, their lengths, and the prompt's index of each row, -1 for none."""
    device, bank = model.get_base_model().get_input_embeddings().weight.device, call.shared.bank
    slots = {name: held.slot for name, held in call.held.items() if held.num_virtual_tokens}
    learned = {name: prompt for name in call.names if (prompt := prompt_of(model, name)) is not None}
    if not learned:  # the bank's own tables
        table, lengths, index = bank.prompts, bank.prompt_lengths, slots
    else:
        prompts = list(learned.values())
        prompts += [bank.prompts[slot, : call.held[name].num_virtual_tokens] for name, slot in slots.items()]
        dtype = reduce(torch.promote_types, (prompt.dtype for prompt in prompts))
        table = nn.utils.rnn.pad_sequence([prompt.to(device, dtype) for prompt in prompts], batch_first=True)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        index = {name: i for i, name in enumerate([*learned, *slots])}
    return table, lengths, torch.tensor([index.get(name, -1) for name in call.rows], device=device)


def with_prompts(
    model: nn.Module,
    prompts: tuple[Tensor, Tensor, Tensor],
    left: bool,
    input_ids,
    inputs_embeds,
    mask,
    labels,
) -> PromptBatch:
    table, lengths, ids = prompts
    module = model.get_base_model().get_input_embeddings()
    plain = type(module) is nn.Embedding and module.max_norm is None and "forward" not in module.__dict__
    if inputs_embeds is None and (not plain or module._forward_hooks or module._forward_pre_hooks):
        inputs_embeds, input_ids = module(input_ids), None  # Gemma's, which scales; PEFT's own, which has hooks
    return prompt_concat(
        input_ids, module.weight if inputs_embeds is None else None, table, ids, prompt_lengths=lengths,
        attention_mask=mask, labels=labels, inputs_embeds=inputs_embeds,
        padding_side="left" if left else "right",
    )  # fmt: skip


def positions_of(base: nn.Module, mask: Tensor) -> dict[str, Tensor]:
    """position_ids that count real tokens, if the model's forward takes any: RoBERTa and its kin count from
    padding_idx + 1; T5's are relative, and Bloom's come from the mask."""
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return {}
    real = mask != 0
    positions = torch.where(real, real.cumsum(1) - 1, 0)
    for name, module in base.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return {"position_ids": torch.where(real, positions + module.padding_idx + 1, module.padding_idx)}
    return {"position_ids": positions}


def _check_positions(base: nn.Module, mask: Tensor) -> None:
    """A table of positions must hold those of prompt and text. A GPU is synchronised only where it may not."""
    names = "wpe", "position_embeddings", "embed_positions"
    tables = (m for name, m in base.named_modules() if name.endswith(names) and isinstance(m, nn.Embedding))
    table = next(tables, None)
    if table is None:
        return
    limit = table.num_embeddings - (getattr(table, "offset", 0) if table.padding_idx is None else table.padding_idx + 1)
    if mask.shape[1] <= limit:
        return
    counted = "position_ids" in inspect.signature(base.forward).parameters  # real tokens, not slots
    longest = int((mask != 0).sum(1).max()) if counted else mask.shape[1]
    if longest > limit:
        raise ValueError(f"adapter_names: prompt and text must fit {limit} positions, got {longest}")


def by_name(model: nn.Module, args: tuple, kwargs: dict) -> dict:
    """The base model's arguments, by the names that PEFT's class for the task gives to the positional ones: its order
    is not the base model's."""
    signature = inspect.signature(type(model)._swapped_with[1].forward)
    bound = signature.bind_partial(model, *args).arguments
    if "task_ids" in signature.parameters:
        named = {name: value for name, value in bound.items() if name != "self"} | kwargs
        named.pop("task_ids", None)  # of multitask prompts
    else:  # a model without a task: PEFT passes them on
        named = inspect.signature(model.get_base_model().forward).bind_partial(*args).arguments | kwargs
    return {name: value for name, value in named.items() if value is not None}


def without_prompts(model: nn.Module, kwargs: dict) -> dict:
    """The arguments of a batch without prompts for a model that holds some: the positions of a mixed batch."""
    base, mask = model.get_base_model(), kwargs.get("attention_mask")
    if mask is None or mask.dim() != 2 or kwargs.get("position_ids") is not None or _counts_in_3d(base):
        return kwargs
    if reads_an_end(base):
        names = "input_ids", "inputs_embeds", "token_type_ids", "attention_mask"
        moved = pads_aside(mask, *map(kwargs.get, names[:-1]), last=is_decoder(base))
        kwargs = kwargs | {name: t for name, t in zip(names, moved, strict=True) if t is not None}
        mask = moved[-1]
    return kwargs | positions_of(base, mask)


def follow(values: Tensor, token_map: Tensor, fill: int) -> Tensor:
    """What belongs to the tokens [B, S] at the slots that hold them now [B, P + S], `fill` elsewhere."""
    return torch.where(token_map >= 0, values.gather(1, token_map.clamp(min=0)), fill)


def forward_inputs(model: nn.Module, call: Call, kwargs: dict) -> dict:
    """The base model's arguments with the prompts in them.

    Spare slots of shorter prompts stand at the front for a decoder, so that token s of every row is at P + s, and at
    the back for an encoder, whose first slot is what a classifier reads.
    """
    prompts, base = prompts_of(model, call), model.get_base_model()
    kwargs = {k: v for k, v in kwargs.items() if v is not None}
    hints = {"past_key_values": "; generate() decodes with prompts", "encoder_outputs": ", which the encoder must see"}
    for name in ("start_positions", "end_positions", *hints):
        if name in kwargs:
            hint = hints.get(name, "")
            raise ValueError(f"adapter_names: {name} cannot be given together with prompt adapters{hint}")
    if kwargs.pop("position_ids", None) is not None:
        warnings.warn("adapter_names: position_ids are ignored, as in PEFT: a prompt moves the text", stacklevel=3)
    ids, embeds = kwargs.pop("input_ids", None), kwargs.pop("inputs_embeds", None)
    if ids is None and embeds is None:
        raise ValueError("adapter_names: input_ids or inputs_embeds must be given with prompt adapters, got neither")
    if embeds is None:
        refuse_bare_rows(model, call)
    labels = kwargs.get("labels")
    _refuse_images(base, kwargs)
    decoder_only = not base.config.is_encoder_decoder
    text = (ids if embeds is None else embeds).shape[:2]
    left, mask = decoder_only and is_decoder(base), kwargs.get("attention_mask")
    per_token = labels is not None and decoder_only and not reads_an_end(base)  # whose labels are of rows
    if per_token and labels.shape != text:
        raise ValueError(f"adapter_names: labels must have the text's shape {list(text)}, got {list(labels.shape)}")
    if mask is not None and reads_an_end(base):
        ids, embeds, types, mask = pads_aside(mask, ids, embeds, kwargs.get("token_type_ids"), last=left)
        kwargs |= {} if types is None else {"token_type_ids": types}
    batch = with_prompts(model, prompts, left, ids, embeds, mask, labels if per_token else None)
    _check_positions(base, batch.attention_mask)
    kwargs |= {"inputs_embeds": batch.inputs_embeds, "attention_mask": batch.attention_mask}
    if per_token:
        # the shift of a decoder's loss drops the first slot, which was a base row's first token: nothing predicts it
        first = (batch.position_ids == 0) & (batch.attention_mask != 0)
        kwargs["labels"] = batch.labels.masked_fill(first, -100) if left else batch.labels
    if "token_type_ids" in kwargs:
        kwargs["token_type_ids"] = follow(kwargs["token_type_ids"], batch.token_map, 0)
    return kwargs | positions_of(base, batch.attention_mask)


def is_decoder(base: nn.Module) -> bool:
    """A decoder's result is read at its last token, an encoder's at its first slot."""
    from transformers.models.auto import modeling_auto as auto

    kind = base.config.model_type
    if getattr(base.config, "is_decoder", False) or kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return getattr(base.config, "is_decoder", False)  # BERT's kind can generate, from either end
    if getattr(base, "can_generate", bool)():
        return True
    # a classifier of such a kind cannot
    return kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or kind in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def reads_an_end(base: nn.Module) -> bool:
    """Given embeddings, a classifier of a decoder's kind reads the last slot of every row, an encoder's the first."""
    return type(base).__name__.endswith("ForSequenceClassification") and not base.config.is_encoder_decoder


def pads_aside(mask: Tensor, *of_tokens: Tensor | None, last: bool = False) -> list[Tensor | None]:
    """What belongs to tokens [B, S, ...] with all pads behind the tokens, or before them; at its end the mask."""
    real = mask != 0
    order = (real if last else ~real).long().argsort(dim=1, stable=True)

    def moved(t: Tensor | None) -> Tensor | None:
        return t if t is None else t.gather(1, order.view(*order.shape, *[1] * (t.dim() - 2)).expand_as(t))

    return [moved(t) for t in (*of_tokens, mask)]


def run_with_pads_behind(base: nn.Module, function, kwargs: dict):
    """The base model's forward or generate(). One that numbers its encoder's slots, pads too, gets all pads behind
    prompt and text, and what it returns of those slots is in the order that they had."""
    texts, mask = ("input_ids", "inputs", "inputs_embeds"), kwargs.get("attention_mask")
    given = [name for name in texts if isinstance(kwargs.get(name), Tensor)]
    if mask is None or mask.dim() != 2 or not given or "encoder_outputs" in kwargs or not _numbers_slots(base):
        return function(**kwargs)
    starts = "decoder_input_ids", "decoder_inputs_embeds", *(["labels"] if base.can_generate() else [])
    if function is base and "input_ids" in given and not any(name in kwargs for name in starts):
        return function(**kwargs)  # the decoder's text is made of these ids, where they are
    slots = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    *moved, slots, mask = pads_aside(mask, *map(kwargs.get, given), slots)
    kwargs = kwargs | dict(zip(given, moved, strict=True), attention_mask=mask)
    as_tuple = function is base and not kwargs.get("return_dict", getattr(base.config, "return_dict", True))
    if as_tuple:
        kwargs["return_dict"] = True
    out = put_back(function(**kwargs), slots.argsort(dim=1))
    return out.to_tuple() if as_tuple else out


def _numbers_slots(base: nn.Module) -> bool:
    """An encoder-decoder that takes no position_ids (BART), if it is none that knows distances alone (T5)."""
    return (
        base.config.is_encoder_decoder
        and "position_ids" not in inspect.signature(base.forward).parameters
        and not any(name.endswith("relative_attention_bias") for name, _ in base.named_modules())
    )


def put_back(out, back: Tensor):
    """What an encoder-decoder returns of its encoder's slots, each from where it is now [B, L]."""

    def put(value, dims: tuple[int, ...]):
        if isinstance(value, (tuple, list)):
            return tuple(put(item, dims) for item in value)
        for dim in dims if isinstance(value, Tensor) and value.shape[dims[0]] == back.shape[1] else ():
            shape = [1] * value.dim()
            shape[0], shape[dim] = len(value), back.shape[1]
            order = back.repeat_interleave(len(value) // len(back), 0).view(shape)  # beams of a row
            value = value.gather(dim, order.expand(value.shape))
        return value

    for name, dims in (
        ("encoder_last_hidden_state", (1,)), ("encoder_hidden_states", (1,)), ("encoder_attentions", (-1, -2)),
        ("cross_attentions", (-1,)),
    ):  # fmt: skip
        if getattr(out, name, None) is not None:
            out[name] = put(out[name], dims)
    return out


def _refuse_images(base: nn.Module, kwargs: dict) -> None:
    given = next((k for k, v in kwargs.items() if v is not None and re.search(r"pixel_values|grid_thw", k)), None)
    if given is not None and _counts_in_3d(base):
        raise ValueError(
            f"adapter_names: {given} must not be given together with prompt adapters to a {type(base).__name__}, whose "
            f"positions of images come from input_ids"
        )


def _counts_in_3d(base: nn.Module) -> bool:
    """Positions of text and images are of time, height and width (Qwen2-VL)."""
    return any(hasattr(module, "get_rope_index") for module in base.modules())


def _length(past) -> int:
    return past.get_seq_length() if hasattr(past, "get_seq_length") else len(past)


# of the text alone, or made by a model that would not see the prompts
GENERATE_REFUSES = (
    "past_key_values", "position_ids", "token_type_ids", "assistant_model", "prompt_lookup_num_tokens",
    "prefill_chunk_size", "token_healing", "encoder_outputs",
)  # fmt: skip


def option_of(base: nn.Module, kwargs: dict, name: str):
    """What generate() finds for an option: its own argument, the configuration that it is given, or the model's."""
    configs = kwargs.get("generation_config"), base.generation_config
    values = kwargs.get(name), *(getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), None)


def generate_with_prompts(model: nn.Module, call: Call, args: tuple, kwargs: dict):
    """The base model's generate() with the prompts prefilled; its result starts with the ids as they are given."""
    base, (ids, kwargs) = model.get_base_model(), generate_inputs(model, call, args, kwargs)
    out = run_with_pads_behind(base, base.generate, kwargs)
    if not base.config.is_encoder_decoder:
        sequences = out if isinstance(out, Tensor) else out.sequences
        sequences[:, : ids.shape[1]] = ids.repeat_interleave(len(sequences) // len(ids), 0)
    return out


def generate_inputs(model: nn.Module, call: Call, args: tuple, kwargs: dict) -> tuple[Tensor, dict]:
    """The ids that are given, and what the base model's generate() takes in place of them."""
    prompts, base, kwargs = prompts_of(model, call), model.get_base_model(), dict(kwargs)
    if args:
        kwargs["input_ids"], *rest = args
        if rest:
            raise TypeError("adapter_names: generate() with prompt adapters takes keyword arguments")
    for name in GENERATE_REFUSES:
        value = option_of(base, kwargs, name)
        if value is not None and value is not False and (name != "past_key_values" or _length(value)):
            raise ValueError(f"adapter_names: generate() with prompt adapters must not be given {name}")
    _refuse_images(base, kwargs)
    ids = kwargs.pop("inputs", None) if kwargs.get("input_ids") is None else kwargs.pop("input_ids")
    if ids is None or kwargs.get("inputs_embeds") is not None:
        raise ValueError("adapter_names: generate() with prompt adapters must be given input_ids, not inputs_embeds")
    refuse_bare_rows(model, call)
    encoder_decoder, text, mask = base.config.is_encoder_decoder, ids, kwargs.get("attention_mask")
    if not encoder_decoder:
        mask = mask_of(base, kwargs, ids) if mask is None else mask
        text, mask = pads_aside(mask, ids, last=True)  # what comes next continues the last slot
    batch = with_prompts(model, prompts, not encoder_decoder, text, None, mask, None)
    _check_positions(base, batch.attention_mask)
    inputs = {"inputs_embeds": batch.inputs_embeds, "attention_mask": batch.attention_mask}
    if not encoder_decoder:
        kwargs = text_options(base, kwargs, text, mask, call.repeats)
        inputs["input_ids"] = text
    return ids, kwargs | inputs


def mask_of(base: nn.Module, kwargs: dict, ids: Tensor) -> Tensor:
    """The mask that transformers infers where none is given: pads are ids like pad_token_id, if that ends no text."""
    pad, ends = (option_of(base, kwargs, name) for name in ("pad_token_id", "eos_token_id"))
    if pad is None or (ends is not None and torch.isin(torch.as_tensor(pad), torch.as_tensor(ends)).any()):
        return torch.ones_like(ids)
    return (ids != torch.as_tensor(pad, device=ids.device)).long()


class _OfText:
    """A processor of logits that sees other ids than the result's at the text's slots."""

    def __init__(self, inner, text: Tensor):
        self.inner, self.text = inner, text

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.inner(torch.cat([self.text, input_ids[:, self.text.shape[1] :]], 1), scores)


def text_options(base: nn.Module, kwargs: dict, text: Tensor, mask: Tensor, repeats: int) -> dict:
    """generate()'s arguments with those options made the text's that transformers would take from the prompt's slots:
    total lengths, and what is counted in ids, for which it would read the mask, or want ids and find embeddings."""
    from transformers.generation import logits_process

    changed, length = {}, text.shape[1]
    for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        wanted = option_of(base, kwargs, total)
        if wanted and option_of(base, kwargs, new) is None:
            if total == "max_length" and wanted <= length:
                raise ValueError(f"adapter_names: max_length must exceed the {length} input ids, got {wanted}")
            changed[new] = max(wanted - length, 0)
    given = kwargs.pop("logits_processor", None) or []
    # a row's own tokens alone: its pads, which come first, become its last token; in n-grams, what is no token
    real, added = mask != 0, logits_process.LogitsProcessorList()
    tokens = torch.where(real, text, text[:, -1:]).repeat_interleave(repeats, 0)
    spaced = torch.where(real, text, -1).repeat_interleave(repeats, 0)
    for name, off, kind in (
        ("encoder_repetition_penalty", 1.0, logits_process.EncoderRepetitionPenaltyLogitsProcessor),
        ("repetition_penalty", 1.0, logits_process.RepetitionPenaltyLogitsProcessor),
        ("no_repeat_ngram_size", 0, logits_process.NoRepeatNGramLogitsProcessor),
        ("encoder_no_repeat_ngram_size", 0, logits_process.EncoderNoRepeatNGramLogitsProcessor),
    ):
        value = option_of(base, kwargs, name)
        if value is None or value == off or any(type(processor) is kind for processor in given):
            continue
        changed[name] = off
        ids = spaced if off == 0 and value > 1 else tokens
        added.append(kind(value, ids) if name.startswith("encoder") else _OfText(kind(value), ids))
    added.extend(given)
    if added:
        kwargs["logits_processor"] = added
    kwargs = {name: value for name, value in kwargs.items() if name not in ("max_length", "min_length", *changed)}
    config = copy.deepcopy(kwargs.get("generation_config"))
    if config is None:
        return kwargs | changed
    for name, value in (changed | {"max_length": None, "min_length": None}).items():
        setattr(config, name, value)  # transformers deprecates options beside a configuration
    return kwargs | {"generation_config": config}
