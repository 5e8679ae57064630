"""The main job on a tiny random BERT: promises of the mixed batch, PEFT's folders, and errors that name their place."""

import csv
import json
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from peft_ops.demo import data, model, peft_side, serve, train
from peft_ops.demo.__main__ import main
from peft_ops.nn import TaskBatch

CPU = torch.device("cpu")
WORDS = "red green blue cold warm fast slow tall short loud quiet dark light old new big small".split()
METHODS = ["ia3", "ptuning"]


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.2,  # at 0.02 so small a model hardly tells words apart
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


def sentences(label_of, count: int = 60) -> list[tuple[str, str]]:
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) for _ in range(count)]
    return [(text, label_of(text)) for text in texts]


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory):
    """A CSV and a JSONL file, two tasks of two and three labels."""
    folder = tmp_path_factory.mktemp("tasks")
    write_csv(folder / "first.csv", sentences(lambda text: "early" if text.split()[0] < "l" else "late"))
    lengths = sentences(lambda text: ["short", "middle", "long"][len(text.split()) // 4])
    (folder / "length.jsonl").write_text("".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in lengths))
    return folder


def write_csv(path, rows, header=("text", "label")) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def no_progress(steps, **_):
    return steps


@pytest.fixture(scope="session")
def trained(tiny_bert, task_folder):
    """Encoder, heads, tokens, tasks and results after a few steps of each method."""
    encoder, tokens = model.load(tiny_bert, CPU)
    heads, tasks = model.Heads(), data.load_tasks(str(task_folder), 16, 0)
    options = SimpleNamespace(steps=12, seed=0, encoder="lstm")
    results = [train.fit(encoder, heads, tokens, tasks, method, options, no_progress) for method in train.METHODS]
    return encoder, heads, tokens, tasks, results


@pytest.fixture(scope="session")
def exported(trained, tiny_bert, tmp_path_factory):
    encoder, heads, _, tasks, _ = trained
    folder = tmp_path_factory.mktemp("adapters")
    peft_side.export(tiny_bert, encoder, heads, tasks, METHODS, "lstm", folder)
    return folder


def test_training_moves_adapters_and_not_the_model(trained, tiny_bert):
    encoder, _, _, tasks, results = trained
    frozen = model.load_backbone(tiny_bert, CPU).state_dict()
    ours = {
        name.replace(".base_layer", ""): value
        for name, value in encoder.backbone.state_dict().items()
        if "ia3_l" not in name
    }
    assert ours.keys() == frozen.keys()
    assert all(torch.equal(ours[name], frozen[name]) for name in frozen)
    for layer in encoder.ia3.values():
        assert sorted(layer.ia3_l) == sorted(f"ia3-{task.name}" for task in tasks)
        assert not any(torch.equal(vector, torch.ones_like(vector)) for vector in layer.ia3_l.values())
    head, ia3, ptuning = results
    vectors = 2 * (32 * 3 + 64)  # per layer: keys, values, and the inputs of the two output projections
    assert [new - old for new, old in zip(ia3.trained, head.trained, strict=True)] == [vectors] * 2
    assert ptuning.kept[0] - head.kept[0] == train.NUM_VIRTUAL_TOKENS * 32


@pytest.mark.parametrize("method", METHODS)
def test_a_step_gives_each_adapter_the_gradient_of_its_own_rows(trained, method):
    encoder, heads, tokens, tasks, _ = trained
    first, second = (task.name for task in tasks)
    texts = [text for text, _ in tasks[0].train[:6]]

    def gradients(names, texts):
        encoder.zero_grad(set_to_none=True)
        hidden = encoder(
            tokens(texts, CPU), TaskBatch.of_rows(names, names=tuple(f"{method}-{task.name}" for task in tasks))
        )
        hidden.pooled()[:3].square().sum(1).log().sum().sub(hidden.pooled()[:3, 0].sum()).backward()
        return {name: p.grad for name, p in encoder.named_parameters() if f"{method}-" in name and p.grad is not None}

    others = texts[:3] + [text for text, _ in tasks[0].train[6:9]]
    longest = max(texts + others, key=lambda text: len(text.split()))
    texts[2] = others[2] = longest  # both batches have the same shape
    mixed = gradients([f"{method}-{first}"] * 3 + [f"{method}-{second}"] * 3, texts)
    changed = gradients([f"{method}-{first}"] * 3 + [None] + [f"{method}-{second}"] * 2, others)
    own = [name for name in mixed if first in name]
    assert own
    for name in own:
        assert mixed[name].abs().sum() > 0
        assert torch.equal(mixed[name], changed[name]), name


def test_absent_adapters_get_no_gradient(trained):
    encoder, _, tokens, tasks, _ = trained
    encoder.zero_grad(set_to_none=True)
    texts = tokens([text for text, _ in tasks[0].train[:4]], CPU)
    encoder(texts, train.batch_of("ia3", [tasks[0].name] * 4, CPU)).states.sum().backward()
    with_gradient = {name.rpartition(".")[2] for name, p in encoder.named_parameters() if p.grad is not None}
    assert with_gradient == {f"ia3-{tasks[0].name}"}


def test_mixed_batch_equals_single_task_runs_bitwise(trained):
    encoder, _, tokens, tasks, _ = trained
    request = serve.build_request(tasks, METHODS, rows=12)
    assert len(set(request.adapters)) == 5 and None in request.adapters
    texts = tokens(request.texts, CPU)
    assert serve.single_task_difference(encoder, texts, request) == [0.0] * 12
    with torch.no_grad():  # and the adapters do something
        mixed = encoder(texts, TaskBatch.of_rows(request.adapters, names=request.names)).pooled()
        base = encoder(texts, TaskBatch.of_rows([None] * 12, names=request.names)).pooled()
    changed = (mixed - base).abs().amax(1) > 1e-4
    assert changed.tolist() == [name is not None for name in request.adapters]


def test_texts_of_one_length_leave_a_pad(trained):
    """Without a pad transformers drops the mask, and on a GPU rows come out of another attention kernel."""
    encoder, _, tokens, tasks, _ = trained
    texts = [" ".join(WORDS[i : i + 5]) for i in range(6)]
    tokens.add(texts)
    names = ["ptuning-first", None] * 3
    request, batch = serve.Request(names, names, texts, [], []), tokens(texts, CPU)
    assert batch.attention_mask[:, :-1].all() and not batch.attention_mask[:, -1].any()
    assert not batch[torch.arange(2)].attention_mask.all()
    assert serve.single_task_difference(encoder, batch, request) == [0.0] * 6


def test_rows_are_classified_by_their_own_head(trained):
    encoder, heads, _, tasks, _ = trained
    features = torch.randn(4, 32)
    names = ["head-length", "head-first", "ia3-length", "head-first"]
    logits = heads(features, TaskBatch.of_rows(names))
    for row, name in enumerate(names):
        head = heads.linears[name]
        want = features[row] @ head.weight.T / model.TEMPERATURE + head.bias
        torch.testing.assert_close(logits[row, : head.out_features], want)
        assert (logits[row, head.out_features :] == -torch.inf).all()


def peft_servers(exported, tiny_bert, tasks, methods) -> dict[str, peft_side.PeftServer]:
    return {
        method: peft_side.PeftServer(
            model.load_backbone(tiny_bert, CPU), exported, [f"{method}-{task.name}" for task in tasks]
        )
        for method in methods
    }


def test_head_gradients_repeat_bitwise():
    torch.use_deterministic_algorithms(False)  # which would make a gather's gradient serial, here and not in the demo
    heads, names = model.Heads(), ["first", "second", "third"]
    for name in names:
        torch.nn.init.normal_(heads.add(name, 384, 6, CPU)[0])
    batch = TaskBatch.of_rows([name for name in names for _ in range(16)])
    features, want = torch.randn(48, 384), None
    for _ in range(200):  # threads that add as they come give another sum once in 15 to 50 times
        heads.zero_grad(set_to_none=True)
        heads(features, batch).sin().sum().backward()
        got = [p.grad for p in heads.parameters()]
        want = want or got
        assert all(map(torch.equal, got, want))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_export_loads_in_peft_with_equal_hidden_states(trained, exported, tiny_bert):
    encoder, heads, tokens, tasks, _ = trained
    servers = peft_servers(exported, tiny_bert, tasks, METHODS)
    for methods, tolerance in (
        (["ia3"], 0.0),
        (METHODS, 2e-5),
    ):  # prompts make another shape than PEFT's base and (IA)^3 rows have
        request = serve.build_request(tasks, methods, rows=12)
        differences = serve.peft_difference(encoder, tokens(request.texts, CPU), request, servers)
        assert max(differences) <= tolerance, dict(zip(request.adapters, differences, strict=True))
    saved = load_file(exported / "ptuning-first" / "adapter_model.safetensors")
    assert saved.keys() == {"prompt_embeddings"}
    assert torch.equal(saved["prompt_embeddings"], encoder.prompts.encoders["ptuning-first"]())
    head = load_file(exported / "ia3-length" / "head.safetensors")
    assert torch.equal(head["weight"], heads.linears["ia3-length"].weight)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_peft_loop_returns_every_row(trained, exported, tiny_bert):
    encoder, _, tokens, tasks, _ = trained
    request = serve.build_request(tasks, ["ia3"], rows=8)
    texts = tokens(request.texts, CPU)
    server = peft_servers(exported, tiny_bert, tasks, ["ia3"])["ia3"]
    with torch.no_grad():
        out = server.loop(peft_side.parts_of(texts, request.adapters), torch.zeros(*texts.input_ids.shape, 32))
        want = encoder(texts, TaskBatch.of_rows(request.adapters)).states
    real = texts.attention_mask.bool()
    torch.testing.assert_close(out[real], want[real])


def test_every_step_holds_rows_of_every_task():
    tasks = [
        data.Task(name, ["x", "y"], [(f"{name} {'w ' * i}", i % 2) for i in range(20)], []) for name in ("one", "two")
    ]
    steps = list(train.mixed_steps(tasks, 10, 0))
    assert (
        len(steps) == 10
        and steps == list(train.mixed_steps(tasks, 10, 0))
        and steps != list(train.mixed_steps(tasks, 10, 1))
    )
    for rows in steps:
        assert (
            sum(number == 0 for number, _, _ in rows)
            == sum(number == 1 for number, _, _ in rows)
            == train.ROWS_PER_TASK
        )
        assert all(text.startswith(tasks[number].name) for number, text, _ in rows)
    seen = [text for rows in steps for number, text, _ in rows if number == 0]
    assert {seen.count(text) for text in set(seen)} == {8}, "every text as often as the others"


def test_docstring_tasks():
    tasks = data.load_tasks(None, 20, 0)
    assert [(task.name, len(task.labels)) for task in tasks] == [("family", 6), ("kind", 2), ("returns", 2)]
    for task in tasks:
        assert not {text for text, _ in task.train} & {text for text, _ in task.held_out}
        counts = [sum(label == i for _, label in task.train) for i in range(len(task.labels))]
        assert counts == [20] * len(task.labels)
        assert task.chance == pytest.approx(1 / len(task.labels))
    words = " ".join(text for text, _ in tasks[0].train + tasks[0].held_out).lower().split()
    assert not {"asyncio", "email", "tarfile", "inspect"} & set(words)


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def test_whole_run_writes_its_results_and_keeps_foreign_files(tiny_bert, task_folder, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    for _ in range(2):  # the second run replaces the results of the first
        assert (
            run(
                "--model",
                tiny_bert,
                "--data",
                task_folder,
                "--out",
                out,
                "--quick",
                "--device",
                "cpu",
                "--encoder",
                "mlp",
            )
            == 0
        )
    names = {path.name for path in out.iterdir()}
    assert names == {"mine.txt", "report.png", "results.json"} | {
        f"{method}-{task}" for method in train.METHODS for task in ("first", "length")
    }
    results = json.loads((out / "results.json").read_text())
    assert [row["difference_to_single"] for row in results["served"]["rows"]] == [0.0] * serve.ROWS
    assert (out / "report.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    for text in ("held-out accuracy", "(IA)^3, mixed batch", "ratio to bare", "to PEFT's own run", "chance"):
        assert text in printed


FILES = {
    "empty.csv": ("", "empty.csv:1: the file is empty"),
    "header.csv": ("text,label\n", "header.csv:1: the file has a header but no rows"),
    "columns.csv": (
        "words,label\na,b\n",
        "columns.csv:1: the header must name the columns text and label, got words, label",
    ),
    "cells.csv": ("text,label\na,x\nb,c,y\n", "cells.csv:3: 3 cells where the header has 2; quote texts with commas"),
    "quote.csv": ('text,label\n"a\nb",x\n"open,y\n', "quote.csv:4: not readable as CSV: unexpected end of data"),
    "label.csv": ("text,label\na,x\nb,\n", "label.csv:3: label is missing or empty"),
    "bytes.csv": (b"text,label\na,x\n\xff,y\n", "bytes.csv:3: not UTF-8 text (byte 0xff)"),
    "unseen.csv": (
        "text,label,split\na,x,train\nb,y,test\n",
        "unseen.csv:3: label 'y' is held out but never seen in training",
    ),
    "single.csv": (
        "text,label\na,x\nb,x\nc,y\n",
        "single.csv:4: label 'y' has one row: held out, it is never seen in training",
    ),
    "split.csv": ("text,label,split\na,x,dev\n", "split.csv:2: split must be 'train' or 'test', got 'dev'"),
    "one.csv": ("text,label\na,x\nb,x\n", "one.csv:3: a task needs two labels or more, got only 'x'"),
    "held.csv": (
        "text,label,split\na,x,train\nb,y,train\n",
        "held.csv:3: no row is held out; mark some with split 'test'",
    ),
    "broken.jsonl": (
        '{"text": "a", "label": 1}\n{"text": \n',
        "broken.jsonl:2: not readable as JSON: Expecting value at column 10",
    ),
    "list.jsonl": ("[1]\n", "list.jsonl:1: a row must be an object with text and label, got list"),
    "text.jsonl": ('{"label": 1}\n', "text.jsonl:1: text is missing or empty"),
}


@pytest.mark.parametrize("name", FILES)
def test_unreadable_data(name, tiny_bert, tmp_path, capsys):
    content, text = FILES[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run("--model", tiny_bert, "--data", tmp_path, "--out", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {tmp_path}/{text}\n"
    assert not (tmp_path / "out").exists()


def test_missing_things(tiny_bert, task_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    cases = [
        (["--data", tmp_path / "nowhere"], "nowhere: not a folder; --data takes a folder"),
        (["--data", tmp_path / "folder"], "folder: holds no .csv or .jsonl file"),
        (["--data", task_folder, "--model", tmp_path / "nowhere"], f"--model: {tmp_path}/nowhere: no such folder"),
        (["--data", task_folder, "--model", tmp_path / "folder"], f"--model: {tmp_path}/folder: cannot be loaded: "),
        (["--data", task_folder, "--model", tiny_bert, "--out", tmp_path / "file"], "--out: "),
        (["--data", task_folder, "--model", tiny_bert, "--device", "nothing"], "--device: nothing: "),
    ]
    for arguments, text in cases:
        assert run(*arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ") and text in error and error.count("\n") == 1, error


def test_an_error_half_way_keeps_the_old_results(tiny_bert, task_folder, tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text("old")

    def fail(*_, **__):
        raise data.DemoError("out of luck")

    monkeypatch.setattr(serve, "serve", fail)
    assert run("--model", tiny_bert, "--data", task_folder, "--out", tmp_path, "--quick", "--device", "cpu") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_text() == "old"


def test_exit_code_and_stderr_of_the_command(tmp_path):
    command = [sys.executable, "-m", "peft_ops.demo", "--data", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
