"""python -m peft_ops.demo.templates: ask a masked language model in hand-written words, and with P-Tuning.

After the LAMA experiment of P-Tuning (arXiv 2103.10385, table 1), where a few words more in a hand-written template
moved the accuracy from 31.3 to 19.8. Without --model, on a tiny BERT that first learns invented facts from a text
(facts.py). The model is frozen; a prompt is trained on the facts of some subjects and asked for those of others. The
control is the same training on facts that the model cannot know: what is right there comes from the prompt.
"""

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_ops.demo import facts
from peft_ops.demo.__main__ import describe, need_packages, pick_device, positive, publish, staging_folder
from peft_ops.demo.data import DemoError, Task
from peft_ops.demo.facts import Relation
from peft_ops.demo.model import read_pretrained
from peft_ops.demo.train import ROWS_PER_TASK, mixed_steps, rate_factor
from peft_ops.nn import PromptEmbedding, PromptEncoder, TaskBatch, Template

FORM = "<P*3> [MASK] <P*3> {text} <P*3>"  # the paper's (3, 3, 3)
PROMPT_STEPS, PROMPT_RATE = 300, 5e-3
MIN_PAIRS = 20  # of a real model's facts: held out are half of them


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m peft_ops.demo.templates", description=__doc__.partition(": ")[2].partition("\n")[0]
    )
    add = parser.add_argument
    add("--model", help="local folder or hub id of a masked language model, asked for countries and capitals")
    add("--out", metavar="DIR", default="out/templates", help="for templates.json and .png (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the facts, the text, both trainings (default: %(default)s)")
    add("--steps", type=positive, default=PROMPT_STEPS, help="of P-Tuning (default: %(default)s)")
    add("--rate", type=float, default=PROMPT_RATE, help="learning rate of P-Tuning (default: %(default)s)")
    add("--lm-steps", type=positive, default=facts.STEPS, help="of the tiny BERT (default: %(default)s)")
    add("--encoder", choices=("lstm", "mlp", "embedding"), default="lstm", help="of prompts (default: %(default)s)")
    add("--device", help="default: a CUDA device if there is one, else the CPU")
    return parser.parse_args(argv)


class Prompted(nn.Module):
    """A frozen masked language model, asked in words or through the prompts of tasks.

    Args:
        model: AutoModelForMaskedLM.
        tokenizer: with a mask token.
    """

    def __init__(self, model: nn.Module, tokenizer):
        super().__init__()
        self.model, self.tokenizer = model.requires_grad_(False).eval(), tokenizer
        self.prompts = PromptEmbedding()
        form = f"[CLS] {FORM} [SEP]" if tokenizer.cls_token and tokenizer.sep_token else FORM
        self.template = Template(form, tokenizer, len(self.words))

    @property
    def words(self) -> Tensor:
        return self.model.get_input_embeddings().weight

    def add_task(self, name: str, kind: str) -> None:
        P, E = self.template.num_virtual_tokens, self.words.shape[1]
        encoder = PromptEncoder.lama(P, E) if kind == "lstm" else PromptEncoder(P, E, kind)
        if kind == "embedding":
            encoder.from_vocab(self.words.detach().cpu())
        self.prompts.add_adapter(name, encoder.to(self.words.device))
        self.template.check(self.prompts, [name])

    def forward(self, subjects: Sequence[str], rows: Sequence[str], names: Sequence[str] | None = None) -> Tensor:
        """What the model says of each subject through the prompt of its row's task: [B, V]."""
        # to some tokenizers a word inside a sentence begins with its space
        batch = self.template(text=[f" {subject}" for subject in subjects])
        ids, mask = (batch[key].to(self.words.device) for key in ("input_ids", "attention_mask"))
        embeds = self.prompts.embed(ids, self.words, TaskBatch.of_rows(rows, ids.device, names))
        logits = self.model(inputs_embeds=embeds, attention_mask=mask).logits
        return logits.take_along_dim(self.template.mask_positions(ids)[..., None], 1)[:, 0]

    @torch.no_grad()
    def ask(self, wording: str, subjects: Sequence[str]) -> Tensor:
        """The same in words: the subject is {x}, the model is asked for {y}."""
        texts = [wording.format(x=subject, y=self.tokenizer.mask_token) for subject in subjects]
        batch = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.words.device)
        at = (batch["input_ids"] == self.tokenizer.mask_token_id).int().argmax(1)
        return self.model(**batch).logits.take_along_dim(at[:, None, None], 1)[:, 0]

    def answer_ids(self, task: Task) -> Tensor:
        """The token of each label."""
        ids = [self.tokenizer.encode(f" {label}", add_special_tokens=False) for label in task.labels]
        return torch.tensor(ids, device=self.words.device)[:, 0]

    def accuracy(self, logits: Tensor, task: Task) -> float:
        """Share of the held-out subjects whose answer is the first of the whole vocabulary."""
        wanted = self.answer_ids(task)[[label for _, label in task.held_out]]
        return (logits.argmax(1) == wanted).double().mean().item()


def fit(asked: Prompted, tasks: list[Task], options, progress: Callable) -> None:
    """P-Tuning of all tasks in mixed batches; a task's prompt gets the gradient of its own rows."""
    torch.manual_seed(options.seed)
    for task in tasks:
        asked.add_task(task.name, options.encoder)
    answers = [asked.answer_ids(task) for task in tasks]
    optimizer = torch.optim.AdamW(asked.prompts.parameters(), options.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, options.steps))
    for rows in progress(mixed_steps(tasks, options.steps, options.seed), total=options.steps, desc="P-Tuning"):
        logits = asked([subject for _, subject, _ in rows], [tasks[number].name for number, _, _ in rows])
        wanted = torch.stack([answers[number][label] for number, _, label in rows])
        (F.cross_entropy(logits, wanted, reduction="sum") / ROWS_PER_TASK).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()


@dataclass
class Served:
    """Held-out subjects of all tasks in one batch, without encoders."""

    tasks: int
    rows: int
    accuracies: dict[str, float]
    difference_to_single: float  # to each task alone in a batch of that shape: the largest of all logits
    difference_to_encoders: float  # to the same batch before they went
    trained: int  # parameters of one task
    kept: int  # of them, what serving needs


@torch.no_grad()
def serve(asked: Prompted, tasks: list[Task]) -> Served:
    subjects, rows = zip(*((subject, task.name) for task in tasks for subject, _ in task.held_out), strict=True)
    names, prompts = [task.name for task in tasks], asked.prompts.eval()
    trained, encoded = sum(p.numel() for p in prompts.encoders[names[0]].parameters()), asked(subjects, rows, names)
    prompts.materialize()
    prompts.keep_table(names)
    mixed, accuracies, difference = asked(subjects, rows, names), {}, 0.0
    for task in tasks:
        own = torch.tensor([name == task.name for name in rows])
        alone = asked(subjects, [task.name] * len(rows), names)
        difference = max(difference, (mixed[own] - alone[own]).abs().max().item())
        accuracies[task.name] = asked.accuracy(mixed[own], task)
    dropped, kept = (mixed - encoded).abs().max().item(), prompts.prompt(names[0]).numel()
    return Served(len(tasks), len(rows), accuracies, difference, dropped, trained, kept)


def probe(asked: Prompted, relation: Relation, served: Served) -> dict:
    """The results of one relation, as they go into the JSON file."""
    task, control = relation.task, relation.control
    subjects = [subject for subject, _ in task.held_out]

    def entry(wording: str) -> dict:
        return {
            "wording": wording.format(x="[X]", y="[Y]"),
            "told_of": relation.told_of.get(wording),
            "accuracy": asked.accuracy(asked.ask(wording, subjects), task),
        }

    pairs = [[entry(wording) for wording in pair] for pair in relation.tried]
    found = [one["accuracy"] for pair in pairs for one in pair]
    told = [asked.accuracy(asked.ask(wording, subjects), task) for wording in relation.told]
    return {
        "name": task.name,
        "train": len(task.train),
        "held_out": len(task.held_out),
        "pairs": pairs,
        "best": max(found),
        "worst": min(found),
        "spread": max(found) - min(found),
        "one_word": max(abs(a["accuracy"] - b["accuracy"]) for a, b in pairs),
        "as_told": sum(told) / len(told) if told else None,
        "p_tuning": served.accuracies[task.name],
        "control": served.accuracies[control.name],
        "chance": task.chance,
        "control_chance": control.chance,
    }


def load(path: str, device: torch.device) -> Prompted:
    """A masked language model that was trained as one, from a local folder or by its hub id."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    tokenizer, (model, loading) = read_pretrained(
        path,
        lambda: (
            AutoTokenizer.from_pretrained(path, padding_side="right"),
            AutoModelForMaskedLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True),
        ),
    )
    if tokenizer.mask_token is None:
        raise DemoError(f"--model: {path}: must be a masked language model, got a tokenizer without a mask token")
    if loading["missing_keys"]:
        lacks = sorted(loading["missing_keys"])[0]
        raise DemoError(f"--model: {path}: must be a masked language model, got one without weights for {lacks}")
    return Prompted(model.to(device), tokenizer)


def real_relations(asked: Prompted, path: str, seed: int) -> list[Relation]:
    """Countries and capitals that the tokenizer writes in one token; as controls, the same with wrong answers."""

    def single(word: str) -> bool:
        ids = asked.tokenizer.encode(f" {word}", add_special_tokens=False)
        return len(ids) == 1 and ids[0] != asked.tokenizer.unk_token_id

    pairs = [pair for pair in facts.CAPITALS.items() if all(map(single, pair))]
    if len(pairs) < MIN_PAIRS:
        what = f"{MIN_PAIRS} countries and capitals of one token each"
        raise DemoError(f"--model: {path}: the tokenizer must have {what}, got {len(pairs)} of {len(facts.CAPITALS)}")
    random.Random(seed).shuffle(pairs)
    parts = range(len(pairs) // 2), range(len(pairs) // 2, len(pairs))
    relations = []
    for name, tried in facts.REAL.items():
        subjects, labels = zip(*(pair if name == "capital" else pair[::-1] for pair in pairs), strict=True)

        def task(label: str, shift: int, subjects=subjects, labels=labels) -> Task:
            """The answer of each subject is that of the one `shift` places before it in the same part."""
            train, held_out = ([(subjects[i], part[i - part[0] - shift]) for i in part] for part in parts)
            return Task(label, list(labels), train, held_out)

        relations.append(Relation(task(name, 0), task(f"{name}_wrong", 1), tried))
    return relations


def run(options: argparse.Namespace) -> None:
    need_packages()
    from peft_ops.demo.report import draw_templates, templates_text

    started, device, out = time.perf_counter(), pick_device(options.device), Path(options.out)
    asked = load(options.model, device) if options.model else None
    relations = real_relations(asked, options.model, options.seed) if asked else []
    staging = staging_folder(out)
    try:
        results = ask_all(options, asked, relations, device)
        (staging / "templates.json").write_text(json.dumps(results, indent=2) + "\n")
        draw_templates(staging / "templates.png", results)
        publish(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(templates_text(results))
    print(f"{out}/: templates.png, templates.json ({time.perf_counter() - started:.0f} s in all)")


def ask_all(options: argparse.Namespace, asked: Prompted | None, relations: list[Relation], device) -> dict:
    """Everything that is measured, for the JSON file; without a model, on one that learns an invented world."""
    from tqdm import tqdm

    started, progress = time.perf_counter(), partial(tqdm, leave=False, dynamic_ncols=True)
    if asked is None:
        world = facts.invent(options.seed, facts.GROUPS)
        asked = Prompted(*facts.learn(world, options.seed, options.lm_steps, device, progress))
        relations = world.relations
        spent = f"{options.lm_steps} steps, {time.perf_counter() - started:.0f} s, seed {options.seed}"
        towns = sum(map(len, world.towns.values()))
        print(f"a tiny BERT has read {len(world.sentences):,} sentences about {towns} towns: {spent}", flush=True)
    tasks = [task for relation in relations for task in (relation.task, relation.control)]
    fit(asked, tasks, options, progress)
    served = serve(asked, tasks)
    return {
        "settings": vars(options),
        "model": options.model or "a tiny BERT, invented facts",
        "parameters": sum(p.numel() for p in asked.model.parameters()),
        "torch": torch.__version__,
        "place": describe(device),
        "relations": [probe(asked, relation, served) for relation in relations],
        "served": asdict(served),
    }


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    try:
        run(options)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
