"""The template demo on worlds of a few towns: facts told where they should be, promises, errors, README's numbers."""

import json
import re
from itertools import chain

import pytest
import torch

from peft_ops.demo import facts, templates
from peft_ops.demo.report import both_wordings, finding, percent
from peft_ops.demo.templates import main
from tests.test_architecture import ROOT

SIZES = {"some": 6, "train": 5, "held_out": 7, "untold_train": 4, "untold": 6}
RESULTS = ROOT / "bench" / "results" / "cpu" / "templates.json"


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(facts, "GROUPS", SIZES)
    monkeypatch.setattr(facts, "HIDDEN", 16)


def run(*arguments) -> int:
    return main([*map(str, arguments), "--device", "cpu"])


def quick(*arguments) -> int:
    return run("--steps", 3, "--lm-steps", 4, *arguments)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sizes", [SIZES, facts.GROUPS], ids=["small", "full"])
def test_held_out_facts_are_told_but_never_as_they_are_asked(seed, sizes):
    world = facts.invent(seed, sizes)
    text, towns = set(world.sentences), world.towns
    assert {group: len(members) for group, members in towns.items()} == sizes
    everyone = list(chain.from_iterable(towns.values()))
    assert len(everyone) == len(set(everyone))
    answers = {answer for relation in world.relations for answer in relation.task.labels}
    assert not answers & set(everyone)
    for relation in world.relations:
        forms, known = list(chain.from_iterable(relation.tried)), dict(relation.task.train + relation.task.held_out)
        assert list(known) == towns["train"] + towns["held_out"]
        for town, answer in known.items():
            right = relation.task.labels[answer]
            assert all(form.format(x=town, y=right) in text for form in relation.told)
            assert not any(form.format(x=town, y=other) in text for form in forms for other in answers)
            wrong = answers - {right}
            assert not any(form.format(x=town, y=other) in text for form in relation.told for other in wrong)
        for form in forms:
            told = sum(form.format(x=town, y=other) in text for town in towns["some"] for other in answers)
            assert told == relation.told_of[form] > 0
        if sizes is facts.GROUPS:
            counts = [{relation.told_of[form] for form in pair} for pair in relation.tried]
            assert all(set(pair) in counts for pair in facts.TOLD_OF)
        control = dict(relation.control.train + relation.control.held_out)
        assert list(control) == towns["untold_train"] + towns["untold"]
    words = set(chain.from_iterable(sentence.split() for sentence in text))
    assert set(everyone) <= words
    for town in towns["untold_train"] + towns["untold"]:
        assert not answers & {word for sentence in text if town in sentence.split() for word in sentence.split()}
    again = facts.invent(seed, sizes)
    assert again == world and facts.invent(seed + 1, sizes) != world


def test_wordings_differ_in_one_word():
    wordings = [*(wording.tried for wording in facts.INVENTED.values()), *facts.REAL.values()]
    for first, second in chain.from_iterable(wordings):
        pairs = list(zip(first.split(), second.split(), strict=True))
        assert sum(a != b for a, b in pairs) == 1 and {"{x}", "{y}"} <= {a for a, b in pairs if a == b}
    assert both_wordings("[X] lies in [Y] .", "[X] lies within [Y] .") == "[X] lies in | within [Y]"
    assert not {*facts.COUNTRIES} & {*facts.GOODS} and len({*facts.CAPITALS.values()}) == len(facts.CAPITALS) >= 60


def test_masks_hide_answers_more_often_and_special_tokens_never():
    world = facts.invent(0, SIZES)
    tokenizer = facts.word_tokenizer(sorted({word for sentence in world.sentences for word in sentence.split()}))
    batches = list(facts.masked_rows(world, tokenizer, 0, 30))
    answers = torch.tensor(tokenizer.convert_tokens_to_ids([*facts.COUNTRIES, *facts.GOODS]))
    seen, hidden = (torch.cat([part.flatten() for part in parts]) for parts in zip(*batches, strict=True))
    special, names = seen < 5, torch.isin(seen, answers)
    assert not hidden[special].any()
    assert hidden[names].double().mean().item() == pytest.approx(facts.MASK_ANSWERS, abs=0.05)
    assert hidden[~names & ~special].double().mean().item() == pytest.approx(facts.MASK_OTHERS, abs=0.02)
    lengths = [(ids == tokenizer.sep_token_id).sum(1) for ids, _ in batches]
    assert all((count == 1).all() for count in lengths)
    assert max(ids.shape[1] for ids, _ in batches) <= facts.MAX_POSITIONS


@pytest.mark.parametrize("encoder", ["lstm", "mlp", "embedding"])
def test_whole_run(encoder, tiny, tmp_path, capsys):
    assert quick("--out", tmp_path, "--encoder", encoder) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"templates.json", "templates.png"}
    assert (tmp_path / "templates.png").read_bytes()[:4] == b"\x89PNG"
    results, printed = json.loads((tmp_path / "templates.json").read_text()), capsys.readouterr().out
    served = results["served"]
    assert (served["tasks"], served["rows"]) == (6, 3 * (7 + 6))
    assert served["difference_to_single"] == served["difference_to_encoders"] == 0.0
    assert served["kept"] == 9 * 16 <= served["trained"]
    assert [relation["name"] for relation in results["relations"]] == list(facts.INVENTED)
    for relation in results["relations"]:
        found = [one["accuracy"] for pair in relation["pairs"] for one in pair]
        assert (len(found), relation["best"], relation["worst"]) == (6, max(found), min(found))
        assert relation["spread"] == max(found) - min(found) >= relation["one_word"]
        assert relation["chance"] >= 1 / 7 and relation["control_chance"] >= 1 / 6
        for pair in relation["pairs"]:
            assert all(one["wording"] in printed for one in pair)
    for text in (
        "told of",
        "P-Tuning",
        "control",
        "chance",
        "as told",
        "largest difference to each task alone 0.0e+00",
    ):
        assert text in printed


def test_two_runs_are_equal(tiny):
    def relations(*arguments):
        options = templates.parse(["--steps", "20", "--lm-steps", "4", *arguments])
        return templates.ask_all(options, None, [], torch.device("cpu"))["relations"]

    first = relations("--seed", "3")
    assert first == relations("--seed", "3") != relations("--seed", "4")


def test_training_moves_prompts_and_not_the_model(tiny):
    world = facts.invent(0, SIZES)
    model, tokenizer = facts.learn(world, 0, 2, torch.device("cpu"), lambda steps, **_: steps)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    asked, options = templates.Prompted(model, tokenizer), templates.parse(["--steps", "3"])
    templates.fit(asked, [relation.task for relation in world.relations], options, lambda steps, **_: steps)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.manual_seed(options.seed)
    for task in asked.prompts.adapters:
        start = templates.PromptEncoder.lama(9, 16)
        assert not torch.equal(start(), asked.prompts.prompt(task))


def test_a_prompt_gets_the_gradient_of_its_own_rows(tiny):
    world = facts.invent(0, SIZES)
    model, tokenizer = facts.learn(world, 0, 2, torch.device("cpu"), lambda steps, **_: steps)
    asked = templates.Prompted(model, tokenizer)
    names = [relation.task.name for relation in world.relations]
    torch.manual_seed(0)
    for name in names:
        asked.add_task(name, "lstm")
    towns = world.towns["train"][:4]

    def gradients(rows) -> list:
        asked.prompts.zero_grad(set_to_none=True)
        asked(towns, rows, names).square().sum().backward()
        return [p.grad for p in asked.prompts.encoders[names[0]].parameters()]

    one, other = gradients([names[0]] * 2 + [names[1]] * 2), gradients([names[0]] * 2 + [names[2]] * 2)
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(one, other, strict=True))


def test_words_and_prompts_ask_at_the_mask(tiny):
    """What is read is the model's own logits where [MASK] stands, in words and behind prompts."""
    world = facts.invent(0, SIZES)
    model, tokenizer = facts.learn(world, 0, 2, torch.device("cpu"), lambda steps, **_: steps)
    asked, town = templates.Prompted(model, tokenizer), world.towns["held_out"][0]
    ids = tokenizer(f"the country of {town} is [MASK] .", return_tensors="pt")["input_ids"]
    want = model(input_ids=ids).logits[0, 6]
    assert tokenizer.convert_ids_to_tokens(ids[0])[6] == "[MASK]"
    torch.testing.assert_close(asked.ask("the country of {x} is {y} .", [town])[0], want)
    asked.add_task("one", "embedding")
    words = torch.tensor(tokenizer.convert_tokens_to_ids("the country of it rains in is quiet at".split()))
    asked.prompts.encoders["one"].from_text(words, asked.words.detach())
    form = f"the country of [MASK] it rains in {town} is quiet at"
    ids = tokenizer(form, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(asked([town], ["one"])[0], model(input_ids=ids).logits[0, 4])


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A BERT that has learned nothing, with a tokenizer of whole words that knows the countries and capitals."""
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("bert")
    forms = " ".join(form for pair in chain(*facts.REAL.values()) for form in pair)
    words = {*forms.replace("{x}", "").replace("{y}", "").split(), *facts.CAPITALS, *facts.CAPITALS.values()}
    tokenizer = facts.word_tokenizer(sorted(words))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return folder


def test_a_model_from_a_folder(real, tmp_path, capsys):
    assert quick("--model", real, "--out", tmp_path) == 0
    results = json.loads((tmp_path / "templates.json").read_text())
    assert results["model"] == str(real) and results["served"]["difference_to_single"] == 0.0
    assert [relation["name"] for relation in results["relations"]] == ["capital", "country"]
    for relation in results["relations"]:
        assert relation["train"] + relation["held_out"] == len(facts.CAPITALS)
        assert relation["chance"] == relation["control_chance"] == 1 / relation["held_out"]
        assert relation["as_told"] is None and relation["pairs"][0][0]["told_of"] is None
    assert "the capital of [X] is [Y] ." in capsys.readouterr().out


def test_real_facts_and_their_control(real):
    asked = templates.load(str(real), torch.device("cpu"))
    capital, country = templates.real_relations(asked, "", 0)
    for relation, truth in ((capital, facts.CAPITALS), (country, {c: k for k, c in facts.CAPITALS.items()})):
        task, control = relation.task, relation.control
        assert not {subject for subject, _ in task.train} & {subject for subject, _ in task.held_out}
        assert not {label for _, label in task.train} & {label for _, label in task.held_out}
        assert {subject: task.labels[label] for subject, label in task.train + task.held_out} == truth
        for right, wrong in ((task.train, control.train), (task.held_out, control.held_out)):
            assert all(a == b and i != j for (a, i), (b, j) in zip(right, wrong, strict=True))
            assert {label for _, label in right} == {label for _, label in wrong}
    assert templates.real_relations(asked, "", 1) != [capital, country] == templates.real_relations(asked, "", 0)


def test_missing_things(real, tmp_path, capsys):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    model, tokenizer = AutoModelForMaskedLM.from_pretrained(real), AutoTokenizer.from_pretrained(real)
    folders = {name: tmp_path / name for name in ("empty", "headless", "maskless", "wordless")}
    folders["empty"].mkdir()
    for name in ("headless", "maskless", "wordless"):
        (model.bert if name == "headless" else model).save_pretrained(folders[name])
        own = facts.word_tokenizer(["France", "Paris"]) if name == "wordless" else tokenizer
        own.mask_token = None if name == "maskless" else "[MASK]"
        own.save_pretrained(folders[name])
    (tmp_path / "file").write_text("")
    head, out = "must be a masked language model, got", tmp_path / "out"
    cases = [
        (["--model", tmp_path / "nowhere"], f"--model: {tmp_path}/nowhere: no such folder"),
        (["--model", folders["empty"]], f"--model: {folders['empty']}: cannot be loaded: "),
        (["--model", folders["headless"]], f"{head} one without weights for cls.predictions."),
        (["--model", folders["maskless"]], f"{head} a tokenizer without a mask token"),
        (
            ["--model", folders["wordless"]],
            f"the tokenizer must have 20 countries and capitals of one token each, got 1 of {len(facts.CAPITALS)}",
        ),
        (["--out", tmp_path / "file"], f"--out: {tmp_path}/file: "),
    ]
    for arguments, text in cases:
        assert quick("--out", out, *arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ") and text in error and error.count("\n") == 1, error
    assert not out.exists()


def test_the_title_says_no_more_than_was_measured():
    relation = {"one_word": 0.25, "spread": 0.5, "p_tuning": 0.75, "best": 0.75}
    want = "One word moves a hand-written template by up to 25.0 points, the choice of six by up to 50.0;\nP-Tuning is "
    assert finding([relation]) == want + "at or above the best of the six"
    assert finding([relation, relation | {"p_tuning": 0.7}]) == want + "not always at the best of the six"


def test_readme_has_the_committed_numbers():
    """And they bear out what README says of them."""
    results, readme = json.loads(RESULTS.read_text()), (ROOT / "README.md").read_text()
    rows = {cells[0]: cells[1:] for cells in re.findall(r"\| (country|partner|product) " + r"\| ([^|]+) " * 6, readme)}
    assert len(rows) == len(results["relations"]) == 3
    for relation in results["relations"]:
        keys = ("best", "worst", "one_word", "p_tuning")
        control = f"{percent(relation['control'])} ({percent(relation['control_chance'])})"
        assert list(rows[relation["name"]]) == [
            *(percent(relation[key]) for key in keys), percent(relation["chance"]), control
        ]  # fmt: skip
        chance, count = relation["control_chance"], relation["held_out"]
        assert relation["p_tuning"] >= relation["best"]
        assert relation["control"] <= chance + 2 * (chance * (1 - chance) / count) ** 0.5, "two standard errors"
        assert (relation["train"], count) == (40, 80)
    served, settings = results["served"], results["settings"]
    assert served["difference_to_single"] == served["difference_to_encoders"] == 0.0
    sentences = len(facts.invent(settings["seed"], facts.GROUPS).sentences)
    assert settings["lm_steps"] == facts.STEPS and settings["steps"] == templates.PROMPT_STEPS
    for text in (f"{sentences:,} sentences", f"{served['rows']} rows", "forty towns", "eighty others"):
        assert text in readme, text
