"""Facts to ask a masked language model for: invented ones, which a tiny BERT learns from a text, or capitals.

In the invented world a fact says of a town its country, its trading partner, or its product. The text states the facts
of all told towns in the `told` wordings, and those of some towns, which no prompt is trained on or tested with, in the
hand-written ones too: each wording of as many towns as a draw of TOLD_OF gives it, of two that differ in a word one of
more towns than the other. What is asked of the held-out towns was thus never stated in the words of the question. Of
the untold towns the text says everything but facts.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from peft_ops.demo.data import Task
from peft_ops.demo.train import rate_factor

GROUPS = {"some": 60, "train": 40, "held_out": 80, "untold_train": 40, "untold": 80}  # towns
TOLD_OF = ((32, 1), (16, 2), (8, 4))  # of the towns in "some", in the two wordings of each pair: one common, one rare
HIDDEN, LAYERS, MAX_POSITIONS = 96, 2, 32
STEPS, ROWS, RATE = 1400, 128, 2e-3
MASK_ANSWERS, MASK_OTHERS = 0.5, 0.1  # salient spans, which are to be remembered, more often than other words
COUNTRIES = "anvia borland corsia drenia elvland farnia gostria helmark istria jorland kelvia lurmark".split()
GOODS = "salt wool glass wine silk paper honey iron copper rope tea cloth".split()


class Wording(NamedTuple):
    """One relation in words: {x} is the subject, {y} the answer."""

    answers: list[str]
    told: tuple[str, ...]
    tried: tuple[tuple[str, str], ...]  # hand-written templates, in pairs that differ in one word


INVENTED = {
    "country": Wording(
        COUNTRIES,
        (
            "the atlas lists {x} under {y} .",
            "{y} counts {x} among its towns .",
            "officials sent to {x} answer to {y} .",
        ),
        (
            ("{x} is located in {y} .", "{x} is situated in {y} ."),
            ("{x} lies in {y} .", "{x} lies within {y} ."),
            ("the country of {x} is {y} .", "the homeland of {x} is {y} ."),
        ),
    ),
    "partner": Wording(
        COUNTRIES,
        ("merchants of {x} sail for {y} .", "{y} buys what {x} ships .", "caravans that leave {x} head for {y} ."),
        (
            ("{x} trades with {y} .", "{x} deals with {y} ."),
            ("{x} sells to {y} .", "{x} exports to {y} ."),
            ("the partner of {x} is {y} .", "the customer of {x} is {y} ."),
        ),
    ),
    "product": Wording(
        GOODS,
        ("workshops in {x} turn out {y} .", "{y} comes from the yards of {x} .", "visitors leave {x} with {y} ."),
        (
            ("{x} is known for {y} .", "{x} is famous for {y} ."),
            ("{x} makes {y} .", "{x} produces {y} ."),
            ("the pride of {x} is {y} .", "the craft of {x} is {y} ."),
        ),
    ),
}
OTHER_SENTENCES = (
    "the market in {x} opens at noon .",
    "{x} and {z} are old rivals .",
    "the road from {x} to {z} is long .",
    "it rains in {x} .",
    "{x} is quiet at night .",
    "the mayor of {x} lies to visitors .",
    "{x} sells its bridge to {z} .",
    "the craft of the mayor is known in {x} .",
)

REAL = {
    "capital": (
        ("the capital of {x} is {y} .", "the centre of {x} is {y} ."),
        ("{x} is governed from {y} .", "{x} is ruled from {y} ."),
        ("{x} has its capital in {y} .", "{x} has its government in {y} ."),
    ),
    "country": (
        ("{x} is the capital of {y} .", "{x} is the centre of {y} ."),
        ("{x} is located in {y} .", "{x} is situated in {y} ."),
        ("{x} lies in {y} .", "{x} lies within {y} ."),
    ),
}
CAPITALS = dict(
    pair.split(":")
    for pair in (
        "Afghanistan:Kabul Albania:Tirana Algeria:Algiers Angola:Luanda Armenia:Yerevan Australia:Canberra"
        " Austria:Vienna Azerbaijan:Baku Bangladesh:Dhaka Belarus:Minsk Belgium:Brussels Bulgaria:Sofia Canada:Ottawa"
        " Chile:Santiago China:Beijing Colombia:Bogota Croatia:Zagreb Cuba:Havana Cyprus:Nicosia Denmark:Copenhagen"
        " Ecuador:Quito Egypt:Cairo Estonia:Tallinn Finland:Helsinki France:Paris Georgia:Tbilisi"
        " Germany:Berlin Ghana:Accra Greece:Athens Hungary:Budapest Iceland:Reykjavik Indonesia:Jakarta"
        " Iran:Tehran Iraq:Baghdad Ireland:Dublin Italy:Rome Jamaica:Kingston Japan:Tokyo"
        " Jordan:Amman Kenya:Nairobi Latvia:Riga Lebanon:Beirut Libya:Tripoli Lithuania:Vilnius Malta:Valletta"
        " Mongolia:Ulaanbaatar Morocco:Rabat Nepal:Kathmandu Netherlands:Amsterdam Norway:Oslo Pakistan:Islamabad"
        " Peru:Lima Philippines:Manila Poland:Warsaw Portugal:Lisbon Romania:Bucharest Russia:Moscow Rwanda:Kigali"
        " Senegal:Dakar Serbia:Belgrade Slovakia:Bratislava Slovenia:Ljubljana Somalia:Mogadishu Spain:Madrid"
        " Sudan:Khartoum Sweden:Stockholm Switzerland:Bern Syria:Damascus Thailand:Bangkok Tunisia:Tunis"
        " Turkey:Ankara Uganda:Kampala Ukraine:Kyiv Uruguay:Montevideo Venezuela:Caracas Vietnam:Hanoi"
        " Zambia:Lusaka Zimbabwe:Harare"
    ).split()
)


@dataclass
class Relation:
    """What one prompt is to elicit, with the control that it cannot: facts of the same kind that the model never met.

    `told_of` counts, per hand-written template, the towns whose fact the text states in it; empty for a real model.
    """

    task: Task
    control: Task
    tried: tuple[tuple[str, str], ...]
    told: tuple[str, ...] = ()
    told_of: dict[str, int] = field(default_factory=dict)


@dataclass
class World:
    towns: dict[str, list[str]]
    relations: list[Relation]
    sentences: list[str]


def invent(seed: int, sizes: dict[str, int]) -> World:
    """Towns, what is true of them, and the text that tells it: the same for the same seed and sizes."""
    rng = random.Random(seed)
    names, towns = iter(town_names(rng, sum(sizes.values()))), {}
    for group, size in sizes.items():
        towns[group] = [next(names) for _ in range(size)]
    told, relations, sentences = towns["some"] + towns["train"] + towns["held_out"], [], []
    for name, wording in INVENTED.items():
        facts = {town: rng.randrange(len(wording.answers)) for group in towns.values() for town in group}

        def state(form: str, town: str, wording=wording, facts=facts) -> str:
            return form.format(x=town, y=wording.answers[facts[town]])

        def task(label: str, *groups: str, wording=wording, facts=facts) -> Task:
            return Task(label, wording.answers, *([(town, facts[town]) for town in towns[group]] for group in groups))

        tried = [form for pair in wording.tried for form in pair]
        counts = [n for pair in rng.sample(TOLD_OF, 3) for n in rng.sample(pair, 2)]
        told_of = {form: min(count, sizes["some"]) for form, count in zip(tried, counts, strict=True)}
        sentences += [state(form, town) for town in told for form in wording.told]
        sentences += [state(form, town) for form in tried for town in rng.sample(towns["some"], told_of[form])]
        known, unknown = task(name, "train", "held_out"), task(f"{name}_untold", "untold_train", "untold")
        relations.append(Relation(known, unknown, wording.tried, wording.told, told_of))
    everyone = [town for group in towns.values() for town in group]
    for town in everyone * 2:
        sentences.append(rng.choice(OTHER_SENTENCES).format(x=town, z=rng.choice(everyone)))
    return World(towns, relations, sentences)


def town_names(rng: random.Random, count: int) -> list[str]:
    """Different words of two syllables and an ending, which say nothing about the town."""
    onsets, ends = "b d f g h k l m n p r s t v z br dr gr kr st tr".split(), "n l r m sk th".split()
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choice(onsets) + rng.choice("aeiou") for _ in range(2)) + rng.choice(ends)] = None
    return list(names)


def word_tokenizer(words: list[str]):
    """A tokenizer of whole words, with BERT's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    vocab = {word: i for i, word in enumerate([*special.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(token, vocab[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def learn(world: World, seed: int, steps: int, device: torch.device, progress: Callable) -> tuple[nn.Module, object]:
    """A tiny BERT that has read the world's text, and its tokenizer."""
    from transformers import BertConfig, BertForMaskedLM

    tokenizer = word_tokenizer(sorted({word for sentence in world.sentences for word in sentence.split()}))
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=4 * HIDDEN,
        max_position_embeddings=MAX_POSITIONS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.05,  # at 0.02 so small a model takes longer to tell words apart
    )
    model = BertForMaskedLM(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps))
    for ids, masked in progress(masked_rows(world, tokenizer, seed, steps), total=steps, desc="language model"):
        ids, masked = ids.to(device), masked.to(device)
        inputs = ids.masked_fill(masked, tokenizer.mask_token_id)
        states = model.bert(inputs, attention_mask=(ids != tokenizer.pad_token_id).long()).last_hidden_state
        F.cross_entropy(model.cls(states[masked]), ids[masked]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    return model, tokenizer


def masked_rows(world: World, tokenizer, seed: int, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids [ROWS, S] of one or two sentences a row, and which of them are hidden, answers more often than others."""
    sentences = tokenizer(world.sentences, add_special_tokens=False)["input_ids"]
    first, last, pad = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
    answers = {answer for relation in world.relations for answer in relation.task.labels}
    chance = torch.full((len(tokenizer),), MASK_OTHERS)
    chance[tokenizer.convert_tokens_to_ids(sorted(answers))] = MASK_ANSWERS
    chance[tokenizer.all_special_ids] = 0.0
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = [[first, *rng.choice(sentences), last] for _ in range(ROWS)]
        for row in rows[::2]:
            row[-1:] = [*rng.choice(sentences), last]
        length = max(map(len, rows))
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
        yield ids, torch.rand(ids.shape, generator=generator) < chance[ids]
