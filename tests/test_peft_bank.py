"""A PEFT model whose bank serves what it has not loaded: vectors and prompts, in one batch with its own adapters."""

import copy
import threading

import peft
import pytest
import torch

from peft_ops import accelerate, restore, using_adapters
from peft_ops.integrations import _layers
from peft_ops.integrations._calls import Call
from peft_ops.integrations.folder_bank import bank_from_folder
from peft_ops.nn import TaskBank
from tests import tiny

FAMILIES = ("llama", "gpt2", "t5-gated")
O_PROJ = "model.layers.0.self_attn.o_proj"
ROWS = ("red", "own", "short", tiny.BASE, "long")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def saved(model, root) -> None:
    for name in model.peft_config:
        model.set_adapter(name)
        model.save_pretrained(root, selected_adapters=[name])


@pytest.fixture(scope="module", params=FAMILIES)
def served(request, tmp_path_factory):
    """A directory with two (IA)^3 and two prompt adapters, the models that they came from, and two models to serve."""
    family, root = request.param, tmp_path_factory.mktemp("adapters")
    vectors = tiny.ia3_model(family, ["red", "green"])
    prompts = tiny.prompt_model(family, {"short": 3, "long": 5})
    saved(vectors, root)
    saved(prompts, root)
    models = {"vectors": tiny.ia3_model(family, ["own"]), "prompts": tiny.prompt_model(family, {"own": 4})}
    oracles = {"red": vectors, "green": vectors, "short": prompts, "long": prompts}
    return root, {name: accelerate(model, level="module") for name, model in oracles.items()}, models


def row_alone(i: int, name: str, model, oracles, batch):
    """Row i without its pads, which move the positions of a GPT-2 that is given none; with prompts they do not."""
    real = batch["attention_mask"][i].bool()
    row = {k: v[i : i + 1] if k.startswith("decoder") else v[i : i + 1, real] for k, v in batch.items()}
    return oracles.get(name, model)(**row, adapter_names=[name]).logits[0]


@torch.no_grad()
@pytest.mark.parametrize("which", ["vectors", "prompts"])
def test_both_methods_serve_rows_of_one_batch(served, which):
    root, oracles, models = served
    model = accelerate(models[which], bank=bank_from_folder(root, slots=3))
    batch = tiny.batch_for(model, len(ROWS))
    got = model(**batch, adapter_names=list(ROWS)).logits
    seen = []
    for i, name in enumerate(ROWS):
        want, own = row_alone(i, name, model, oracles, batch), got[i]
        if not model.config.is_encoder_decoder:  # of the text alone
            real = batch["attention_mask"][i].bool()
            want, own = want[-real.sum() :], own[-len(real) :][real]
        torch.testing.assert_close(own, want, rtol=1e-4, atol=1e-4)
        seen.append(own[-1])
    assert torch.pdist(torch.stack(seen)).min() > 0.01


@torch.no_grad()
def test_a_bank_changes_no_batch_that_it_does_not_serve(served):
    """Of a model with vectors: whether or not the bank has prompts, it is PEFT's result, positions of pads included."""
    root, _, models = served
    model, names = restore(models["vectors"]), ["own", tiny.BASE, "own"]
    batch = tiny.batch_for(model, 3, "left")
    want = tiny.row_by_row(model, names, lambda one: one(**batch).logits)
    accelerate(model, bank=bank_from_folder(root, slots=3), level="module")
    got = model(**batch, adapter_names=names).logits
    assert torch.equal(got, want)


@torch.no_grad()
@pytest.mark.parametrize("rows", [("own", tiny.BASE), ("own", "prompt")], ids=["without", "with"])
def test_positional_arguments_of_a_model_whose_bank_holds_prompts(rows):
    """In the order of PEFT's class, whose fourth are the labels; BERT's are positions."""
    model = tiny.ia3_model("bert", ["own"])
    bank = TaskBank(1, {"bert.encoder.layer.0.attention.self.key": 64}, num_virtual_tokens=2, token_dim=64)
    bank.put("prompt", {}, prompt=torch.ones(2, 64))
    accelerate(model, bank=bank)
    batch, labels = tiny.batch_for(model, 2), torch.tensor([0, 2])
    want = model(**batch, labels=labels, adapter_names=list(rows)).loss
    got = model(*batch.values(), None, labels, adapter_names=list(rows)).loss
    assert want is not None and torch.equal(got, want)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_generation(served, beams):
    root, oracles, models = served
    options = dict(max_new_tokens=8, num_beams=beams, do_sample=False)
    for model in models.values():
        accelerate(model, bank=bank_from_folder(root, slots=3))
        batch = tiny.batch_for(model, len(ROWS))
        batch.pop("decoder_input_ids", None)
        got = model.generate(**batch, **options, adapter_names=list(ROWS))
        for i, name in enumerate(ROWS):
            want = oracles.get(name, model).generate(**batch, **options, adapter_names=[name] * len(ROWS))
            assert torch.equal(got[i], want[i]), name


@torch.no_grad()
def test_tasks_come_and_go_and_are_held_while_in_use(served):
    root, oracles, models = served
    bank = bank_from_folder(root, slots=1)
    model = accelerate(models["vectors"], bank=bank)
    batch = tiny.batch_for(model, 2)
    for name in ("red", "green", "red"):
        got = model(**batch, adapter_names=[name, "own"]).logits
        torch.testing.assert_close(
            got[:1], oracles[name](**batch, adapter_names=[name] * 2).logits[:1], rtol=1e-4, atol=1e-4
        )
    assert (bank.stats.misses, bank.stats.evictions) == (3, 2)
    with bank.use(["green"]), pytest.raises(RuntimeError, match="in use|hold"):
        model(**batch, adapter_names=["red", "own"])
    with pytest.raises(ValueError, match="at most 1 task"):
        model(**batch, adapter_names=["red", "green"])
    model(**batch, adapter_names=["red", "red"])  # nothing is held after a failure


@torch.no_grad()
def test_a_batch_of_the_bank_alone_copies_no_vector(served):
    root, oracles, models = served
    bank = bank_from_folder(root, slots=4)
    model = accelerate(models["vectors"], bank=bank)
    bank.prefetch(["green", "red"])  # so that slots are not the order of the batch
    names, batch = ["red", tiny.BASE, "green"], tiny.batch_for(model, 3, "right")
    layer = next(m for m in model.modules() if isinstance(m, _layers.MixedLinear))
    with bank.hold(["red", "green"]) as held:
        call = Call(model._peft_ops, ["red", None, "green"], 1, held)
        table, ids = call.select(layer, layer.ia3_l, layer._features, torch.zeros(3, 2, layer._features))
    assert table.data_ptr() == bank.table(layer._peft_ops_key).data_ptr()
    assert ids.tolist() == [held["red"].slot, -1, held["green"].slot] == [1, -1, 0]
    got = model(**batch, adapter_names=names).logits
    want = oracles["red"](**batch, adapter_names=names).logits
    real = slice(None) if model.config.is_encoder_decoder else batch["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-4)


def test_a_name_that_nobody_knows(served):
    root, _, models = served
    model = accelerate(models["vectors"], bank=bank_from_folder(root, slots=2))
    batch = tiny.batch_for(model, 2)
    with pytest.raises(ValueError, match=r"adapter_names must name adapters of the model, \['own'\].*got 'rde'.*red"):
        model(**batch, adapter_names=["rde", "own"])


def test_restore_gives_plain_layers_back():
    model = tiny.prompt_model("llama", {"own": 4})
    before = [(name, type(module)) for name, module in model.named_modules()]
    name = "model.layers.0.self_attn.k_proj"
    accelerate(model, bank=TaskBank(1, {name: 32}))
    assert isinstance(model.get_base_model().get_submodule(name), _layers.BankLinear)
    restore(model)
    assert [(name, type(module)) for name, module in model.named_modules()] == before


@pytest.mark.parametrize(
    "widths, options, message",
    [
        ({"model.layers.0.self_attn.o_proj": 64}, {}, "whether 64 features scale the input or the output"),
        ({"model.layers.0.self_attn.k_proj": 33}, {}, "whether 33 features|33"),
        ({"model.layers.9.self_attn.k_proj": 32}, {}, "no such module"),
        ({"model.norm": 64}, {}, "linear layers of the model"),
        ({"model.layers.0.mlp.down_proj": 64}, {"feedforward": ["model.layers.0.mlp.down_proj"]}, "96 features"),
        ({"model.layers.0.self_attn.k_proj": 32}, dict(num_virtual_tokens=2, token_dim=48), "prompts of 64 features"),
    ],
)
def test_banks_that_do_not_fit_the_model(widths, options, message):
    model = tiny.prompt_model("llama", {"own": 4})
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        accelerate(model, bank=TaskBank(2, widths, **options))
    assert [type(module) for module in model.modules()] == before


def test_a_bank_that_scales_the_other_side_of_a_layer():
    model = tiny.ia3_model("llama", ["own"])
    with pytest.raises(ValueError, match="input of 'model.layers.0.mlp.down_proj'"):
        accelerate(model, bank=TaskBank(2, {"model.layers.0.mlp.down_proj": 96}, feedforward=[]))


@torch.no_grad()
def test_disabled_adapters_disable_the_bank(served):
    root, _, models = served
    model = accelerate(models["vectors"], bank=bank_from_folder(root, slots=3))
    batch = tiny.batch_for(model, 2, "right")
    with model.disable_adapter():
        want, got = model(**batch).logits, model(**batch, adapter_names=["red", "long"]).logits
    real = slice(None) if model.config.is_encoder_decoder else batch["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-4)


def bank_of(model, slots: int, names=("a", "b"), more=(), **options) -> TaskBank:
    """Vectors for the layers that PEFT adapted, and for more that it did not."""
    layers = {name: module for name, module in model.get_base_model().named_modules() if hasattr(module, "ia3_l")}
    widths = {name: m.in_features if m.is_feedforward else m.out_features for name, m in layers.items()}
    for name in more:
        module = model.get_base_model().get_submodule(name)
        widths[name] = module.nf if hasattr(module, "nf") else module.out_features
    bank = TaskBank(slots, widths, feedforward=[name for name, m in layers.items() if m.is_feedforward], **options)
    generator = torch.Generator().manual_seed(2)
    for name in names:
        bank.put(name, {key: 1 + 0.5 * torch.randn(width, generator=generator) for key, width in widths.items()})
    return bank


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["kept", "reentrant", "saved tensors"])
@pytest.mark.parametrize("level", ["module", "auto"])
@pytest.mark.parametrize("names", [["a"] * 3, ["a", "own", "a"], ["a", tiny.BASE, "own"]], ids="-".join)
def test_a_backward_may_come_when_the_slots_are_others(names, level, checkpointing):
    """Autograd and checkpoints read in backward() what the batch had, not what another put there meanwhile."""
    found = []
    for slots, between in ((2, False), (1, False), (1, True)):
        model = tiny.ia3_model("llama", ["own"])
        accelerate(model, bank=bank_of(model, slots, more=[O_PROJ]), level=level)
        if checkpointing is not None:
            model.train().gradient_checkpointing_enable({"use_reentrant": checkpointing})
        batch = tiny.text([6] * 3)
        words = model.get_base_model().get_input_embeddings()
        embeds = words(batch.pop("input_ids")).detach().requires_grad_()
        loss = model(inputs_embeds=embeds, **batch, adapter_names=names).logits.square().sum()
        if between:
            with torch.no_grad():
                model(inputs_embeds=embeds, **batch, adapter_names=["b"] * 3)
            assert model._peft_ops.bank.stats.evictions
        loss.backward()
        own = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        assert bool(own) == ("own" in names)
        found.append([embeds.grad, *own.values()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_block_that_trains_and_infers_keeps_what_it_began_with():
    model = tiny.ia3_model("llama", ["own"])
    bank = bank_of(model, 1)
    accelerate(model, bank=bank)
    batch, names = tiny.text([6] * 2), ["a", tiny.BASE]
    with torch.no_grad():
        want = model(**batch, adapter_names=names).logits
        with using_adapters(model, names):
            assert torch.equal(model(**batch).logits, want)
            with torch.enable_grad():
                assert torch.equal(model(**batch).logits, want)
            assert torch.equal(model(**batch).logits, want)
    with using_adapters(model, names):
        logits = model(**batch).logits
    assert torch.equal(logits, want)


@torch.no_grad()
@pytest.mark.parametrize("level", ["module", "auto"])
def test_layers_disabled_by_the_tuner_disable_the_bank(level):
    """A layer that only the bank knows has no switch of PEFT's."""
    model = tiny.ia3_model("llama", ["own"])
    bank = bank_of(model, 2, more=[O_PROJ])
    accelerate(model, bank=bank, level=level)
    batch, names = tiny.text([6] * 3), ["a", "own", tiny.BASE]
    with model.disable_adapter():
        base = model(**batch).logits
    want = model(**batch, adapter_names=names).logits
    model.base_model.disable_adapter_layers()
    assert torch.equal(model(**batch, adapter_names=names).logits, base)
    twin = accelerate(copy.deepcopy(model), bank=bank, level=level)  # of layers that are disabled already
    assert torch.equal(twin(**batch, adapter_names=names).logits, base)
    model.base_model.enable_adapter_layers()
    assert torch.equal(model(**batch, adapter_names=names).logits, want)
    with using_adapters(model, names):
        assert torch.equal(model(**batch).logits, want)
        model.base_model.disable_adapter_layers()
        assert torch.equal(model(**batch).logits, base)
        model.base_model.enable_adapter_layers()
        assert torch.equal(model(**batch).logits, want)
    assert not torch.isclose(want[0], base[0]).any()


@torch.no_grad()
def test_unknown_names_where_adapters_are_disabled():
    model = tiny.ia3_model("llama", ["own"])
    batch = tiny.text([6] * 2)
    for bank in (None, bank_of(model, 2)):
        accelerate(model, bank=bank)
        with model.disable_adapter():
            want = model(**batch).logits
            assert torch.equal(model(**batch, adapter_names=["own", tiny.BASE]).logits, want)
            for call in (model, model.generate):
                with pytest.raises(ValueError, match=r"must name adapters of the model, \['own'\].*got 'rde'"):
                    call(**batch, adapter_names=["rde", "own"])
            if bank is not None:
                assert torch.equal(model(**batch, adapter_names=["a", "b"]).logits, want)


@torch.no_grad()
def test_a_busy_bank_is_waited_for():
    model = tiny.ia3_model("llama", ["own"])
    bank, batch = bank_of(model, 1), tiny.text([6] * 2)
    accelerate(model, bank=bank)
    want = {name: model(**batch, adapter_names=[name] * 2).logits for name in "ab"}
    with (
        bank.use(["a"]),
        pytest.raises(RuntimeError, match=r"adapter_names: .*accelerate\(model, bank=bank, timeout=sec"),
    ):
        model(**batch, adapter_names=["b"] * 2)
    accelerate(model, bank=bank, timeout=0.01)
    with bank.use(["a"]), pytest.raises(RuntimeError, match="'a' by 1"):
        model(**batch, adapter_names=["b"] * 2)
    accelerate(model, bank=bank, timeout=60)
    wrong = []

    @torch.no_grad()
    def serve(name: str) -> None:
        for _ in range(10):
            try:
                if not torch.equal(model(**batch, adapter_names=[name] * 2).logits, want[name]):
                    wrong.append(name)
            except RuntimeError as error:
                wrong.append(error)

    threads = [threading.Thread(target=serve, args=(name,)) for name in "abab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for timeout in (-1, "1", float("nan"), None):
        with pytest.raises(ValueError, match="accelerate: timeout must be seconds from 0 on, got"):
            accelerate(model, bank=bank, timeout=timeout)


@torch.no_grad()
def test_a_layer_of_the_bank_that_peft_wraps_later():
    model = tiny.ia3_model("llama", ["own"])
    accelerate(model, bank=bank_of(model, 2, more=[O_PROJ]))
    batch, names = tiny.text([6] * 2), ["a", tiny.BASE]
    want = model(**batch, adapter_names=names).logits
    model.add_adapter("wide", peft.IA3Config(task_type="CAUSAL_LM", target_modules=["o_proj"], feedforward_modules=[]))
    torch.testing.assert_close(model.eval()(**batch, adapter_names=names).logits, want, rtol=1e-5, atol=1e-5)


def test_vectors_in_the_middle_of_a_feed_forward_layer():
    """PEFT has wrapped its last layer, the bank scales its first one too: no operator may read past that."""
    model = tiny.ia3_model("gpt2", ["own"])
    bank, batch = bank_of(model, 2, more=["transformer.h.0.mlp.c_fc"]), tiny.text([6] * 3)
    found = []
    for level in ("module", "auto"):
        accelerate(model, bank=bank, level=level)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                found.append(model(**batch, adapter_names=["a", "own", "b"]).logits)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)


def test_two_models_of_one_base():
    first, second = tiny.ia3_model("llama", ["red"]), None
    accelerate(first)
    second = peft.get_peft_model(first.get_base_model(), peft.IA3Config(task_type="CAUSAL_LM"), "green")
    with pytest.raises(ValueError, match="must not be another accelerated model's"):
        accelerate(second)


@torch.no_grad()
def test_generation_takes_no_other_multiple_of_the_batch():
    """Classifier-free guidance, windows or a second modality: twice the rows, but not each name's in a row."""
    model = accelerate(tiny.ia3_model("llama", ["red", "green"]))
    batch = tiny.batch_for(model, 2)
    call = model.get_base_model().forward
    doubled = lambda ids, **kw: call(torch.cat([ids, ids]))  # noqa: E731
    with using_adapters(model, ["red", "green"]), pytest.raises(ValueError, match=r"2 rows, got \[4"):
        doubled(batch["input_ids"])
    options = dict(max_new_tokens=3, num_beams=3, num_return_sequences=2)
    assert len(model.generate(**batch, **options, adapter_names=["red", "green"])) == 4
