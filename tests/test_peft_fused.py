"""Which operator serves which module of a PEFT model, and that a module whose code is another's is left alone."""

import copy
import functools
import io
import pickle
import threading

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.opt.modeling_opt import OPTDecoderLayer
from transformers.pytorch_utils import Conv1D

from peft_ops import accelerate, report, restore
from peft_ops._backend import INTERPRET
from peft_ops.integrations import _fused, _layers
from peft_ops.nn import TaskBank
from tests import tiny

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

GLU, ACT, KV, SCALE = "ia3_glu_linear", "ia3_linear", "ia3_kv_linear", "ia3_linear"
# family -> operator of the first module whose name ends so
EXPECTED = {
    "llama": {"k_proj": KV, "v_proj": KV, "down_proj": GLU},
    "mistral": {"k_proj": KV, "v_proj": KV, "down_proj": GLU},
    "qwen2": {"q_proj": KV, "v_proj": KV, "down_proj": GLU},
    "gemma": {"q_proj": KV, "v_proj": KV, "down_proj": GLU},
    "phi3": {"qkv_proj": SCALE, "down_proj": GLU},
    "t5": {"SelfAttention.k": KV, "SelfAttention.v": KV, "EncDecAttention.k": KV, "wo": ACT},
    "t5-gated": {"SelfAttention.k": KV, "EncDecAttention.v": KV, "wo": GLU},
    "bert": {"key": KV, "value": KV, "0.output.dense": ACT, "attention.output.dense": SCALE},
    "roberta": {"key": KV, "value": KV, "0.output.dense": ACT},
    "gpt2": {"c_attn": SCALE, "mlp.c_proj": ACT},
    "opt": {"q_proj": KV, "k_proj": KV, "fc2": ACT},
    "bloom": {"query_key_value": SCALE, "dense_4h_to_h": ACT},
}


def operators(model) -> dict[str, str]:
    return {row.module: row.operator for row in report(model, file=io.StringIO())}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_report(family, capsys):
    model = accelerate(tiny.ia3_model(family, ["red"]))
    found = operators(model)
    for end, operator in EXPECTED[family].items():
        names = [name for name in found if name.endswith(end)]
        assert names, f"{end} of {sorted(found)}"
        assert {found[name] for name in names} == {operator}, end
    rows = report(model)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [row.module for row in rows]
    ends = "down_proj", "mlp.c_proj", "fc2", "dense_4h_to_h", ".wo", "0.output.dense", "1.output.dense"
    last = [row for row in rows if row.module.endswith(ends) and "attention" not in row.module]
    assert last and all(row.why_not_higher.startswith("with ") for row in last)


_SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
_BARE = dict(vocab_size=96, tie_word_embeddings=False, pad_token_id=0, eos_token_id=None)
_GPT = dict(n_embd=64, n_layer=2, n_head=4, n_positions=128)
_SEQ = dict(
    d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=96, decoder_ffn_dim=96,
)  # fmt: skip
# classes of transformers, sizes and dropouts -> the last layer of a feed-forward layer, and what is around it
FEED_FORWARD = {
    "GPTNeoX": (_SIZES | dict(hidden_dropout=0.3), "dense_4h_to_h", "mlp"),
    "GPTJ": (_GPT | dict(rotary_dim=8, resid_pdrop=0.3), "fc_out", "mlp"),
    "Starcoder2": (_SIZES | dict(num_key_value_heads=2, residual_dropout=0.3), "c_proj", "mlp"),
    "Falcon": (_SIZES | dict(hidden_dropout=0.3), "dense_4h_to_h", "mlp"),
    "Bloom": (dict(hidden_size=64, n_layer=2, n_head=4, hidden_dropout=0.3), "dense_4h_to_h", "mlp"),
    "Mpt": (dict(d_model=64, n_heads=4, n_layers=2), "down_proj", "ffn"),
    "OPT": (_SIZES | dict(ffn_dim=96, word_embed_proj_dim=64, dropout=0.3), "fc2", "layers.0"),
    "XGLM": (dict(d_model=64, ffn_dim=96, num_layers=2, attention_heads=4, activation_dropout=0.3), "fc2", "layers.0"),
    "Bart": (_SEQ | dict(activation_dropout=0.3), "fc2", "layers.0"),
}


def feed_forward_model(kind: str):
    sizes, last, _ = FEED_FORWARD[kind]
    config = getattr(transformers, f"{kind}Config")(
        **{k: v for k, v in sizes.items() if k != "intermediate_size"}, **_BARE
    )
    if hasattr(config, "intermediate_size") and "intermediate_size" in sizes:
        config.intermediate_size = 96
    base = tiny.randomized(transformers.AutoModelForCausalLM.from_config(config)).eval()
    adapters = peft.IA3Config(task_type="CAUSAL_LM", target_modules=[last], feedforward_modules=[last])
    model = peft.get_peft_model(base, adapters, adapter_name="red")
    model.add_adapter("green", copy.deepcopy(adapters))
    for name in ("red", "green"):
        tiny.set_vectors(model, name)
    return model.eval()


@pytest.mark.parametrize("kind", FEED_FORWARD)
def test_feed_forward_layers(kind, monkeypatch):
    """One operator before the last layer of each, and PEFT's results: in a batch of several, in training with dropout,
    in a copy, and after restore."""
    theirs, calls = feed_forward_model(kind), []
    ours, batch, names = copy.deepcopy(theirs), tiny.text([6] * 3), ["red", tiny.BASE, "green"]
    accelerate(ours)
    _, last, parent = FEED_FORWARD[kind]
    for row in report(ours, file=io.StringIO()):
        assert row.operator == "ia3_linear" and row.why_not_higher.startswith("with "), row
    assert report(ours, file=io.StringIO())[0].why_not_higher.endswith(parent)
    operator = _fused.ia3_linear
    monkeypatch.setattr(_fused, "ia3_linear", lambda *a, **kw: calls.append(kw["activation"]) or operator(*a, **kw))
    want = tiny.row_by_row(theirs, names, lambda model: model(**batch).logits)
    got = ours(**batch, adapter_names=names).logits
    assert len(calls) == 2 and None not in calls
    close = dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got, want, **close)
    with torch.no_grad():
        for again in (ours, pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
            torch.testing.assert_close(again(**batch, adapter_names=names).logits, want, **close)
    runs, grads = [], []
    for model, options in ((theirs, {}), (ours, {}), (ours, {"adapter_names": ["green"] * 3})):
        model.set_adapter("green")
        model.train().zero_grad()
        torch.manual_seed(5)
        runs.append(model(**batch, **options).logits)
        runs[-1].square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for key, p in model.named_parameters() if p.grad is not None]))
    for run, grad in zip(runs[1:], grads[1:], strict=True):
        torch.testing.assert_close(run, runs[0], **close)
        torch.testing.assert_close(grad, grads[0], rtol=1e-3, atol=1e-3 * float(grads[0].abs().max()))
    classes = [type(module) for module in theirs.modules()]
    assert [type(module) for module in restore(ours).modules()] == classes
    monkeypatch.undo()


def test_bloom_that_reads_its_weight_past_the_layer():
    model = feed_forward_model("Bloom")
    for module in model.modules():
        if hasattr(module, "slow_but_exact"):
            module.slow_but_exact, module.pretraining_tp = True, 2
    accelerate(model)
    assert {row.why_not_higher for row in report(model, file=io.StringIO())} == {
        "no feed-forward code that an operator computes"
    }


class Twice(OPTDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        hidden_states = self.fc1(hidden_states)
        hidden_states = self.activation_fn(hidden_states)
        hidden_states = hidden_states * 2
        hidden_states = self.fc2(hidden_states)
        return hidden_states


def test_statements_decide_not_the_name():
    assert _fused.inline_of(OPTDecoderLayer)[0] == _fused.Form("fc1", "activation_fn", "fc2")
    assert _fused.inline_of(Twice) is None
    assert _fused.inline_of(nn.Linear) is None


@pytest.mark.parametrize("attention, operators_", [("self_attn", {KV}), ("encoder_attn", {SCALE})])
def test_cross_attention_reads_two_texts(attention, operators_):
    config = transformers.BartConfig(**_SEQ, **_BARE)
    model = transformers.BartForConditionalGeneration(config)
    model = accelerate(peft.get_peft_model(model, peft.IA3Config(task_type="SEQ_2_SEQ_LM"), adapter_name="red"))
    rows = [row for row in report(model, file=io.StringIO()) if f"{attention}." in row.module]
    assert {row.module.split(".")[-1] for row in rows} == {"q_proj", "v_proj"}
    assert {row.operator for row in rows} == operators_


@torch.no_grad()
@pytest.mark.parametrize("feedforward", [False, True], ids=["output", "input"])
def test_a_layer_that_lies_the_other_way_round_is_read_where_it_lies(feedforward, monkeypatch):
    """On a GPU; its weight transposed, not copied."""
    base = nn.Sequential(Conv1D(20, 12))
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=["0"] if feedforward else [], fan_in_fan_out=True)
    model = peft.get_peft_model(base, config, adapter_name="red")
    tiny.set_vectors(model, "red")
    x, seen = torch.randn(3, 5, 12), []
    want = model(x)
    operator = _layers.ia3_linear
    monkeypatch.setattr(_layers, "runs_whole", lambda x: True)
    monkeypatch.setattr(_layers, "ia3_linear", lambda x, w, b, **kw: seen.append(w) or operator(x, w, b, **kw))
    with torch.enable_grad():
        torch.testing.assert_close(accelerate(model)(x, adapter_names=["red"] * 3), want)
    weight = model.base_model.model[0].base_layer.weight
    assert seen[0].data_ptr() == weight.data_ptr() and seen[0].shape == (20, 12)
    assert report(model, file=io.StringIO())[0].operator == "ia3_linear"


def prompts_and_a_bank(family: str, ends: tuple[str, ...], feedforward: str):
    """A model with a prompt, and a bank with vectors of the layers whose names end so."""
    model = tiny.prompt_model(family, {"own": 2})
    layers = {k: m for k, m in model.get_base_model().named_modules() if k.endswith(ends) and hasattr(m, "weight")}
    sizes = {k: (m.nx, m.nf) if hasattr(m, "nx") else (m.in_features, m.out_features) for k, m in layers.items()}
    inputs = [name for name in layers if name.endswith(feedforward)]
    widths = {name: size[name not in inputs] for name, size in sizes.items()}
    bank = TaskBank(2, widths, feedforward=inputs)
    for i, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(i)
        bank.put(name, {k: 1 + 0.5 * torch.randn(width, generator=generator) for k, width in widths.items()})
    return model, bank


BANKS = {
    "llama": (("k_proj", "v_proj", "down_proj"), "down_proj", {"k_proj": KV, "v_proj": KV, "down_proj": GLU}),
    "opt": (("q_proj", "k_proj", "fc2"), "fc2", {"q_proj": KV, "k_proj": KV, "fc2": ACT}),
    "bert": (("key", "value", "output.dense"), "output.dense", EXPECTED["bert"]),
    "gpt2": (("c_attn", "c_fc", "mlp.c_proj"), "mlp.c_proj", {"c_attn": SCALE, "c_fc": SCALE, "c_proj": "ia3_scale"}),
    "t5": ((".k", ".v", "wo"), "wo", EXPECTED["t5"]),
}


@pytest.mark.kernels
@pytest.mark.parametrize("family", BANKS)
def test_layers_that_a_bank_alone_has_vectors_for(family):
    """Of a model with prompts: the same operators, and the same results, as where PEFT has wrapped them."""
    ends, feedforward, expected = BANKS[family]
    model, bank = prompts_and_a_bank(family, ends, feedforward)
    batch, names = tiny.batch_for(model, 3, "right"), ["a", tiny.BASE, "b"]
    accelerate(model, bank=bank, level="module")
    want = model(**batch, adapter_names=names).logits
    base = model(**batch, adapter_names=[tiny.BASE] * 3).logits
    accelerate(model, bank=bank)
    found = {row.module: row.operator for row in report(model, file=io.StringIO()) if row.module in bank.widths}
    assert len(found) == len(bank.widths)
    for end, operator in expected.items():
        assert {op for name, op in found.items() if name.endswith(end)} == {operator}, end
    close = dict(rtol=1e-3, atol=1e-3) if INTERPRET else dict(rtol=1e-4, atol=1e-4)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(**batch, adapter_names=names).logits, want, **close)
            torch.testing.assert_close(model(**batch, adapter_names=[tiny.BASE] * 3).logits, base, **close)
    assert not torch.isclose(want[0], base[0]).all(-1).any()
    if not model.config.is_encoder_decoder and family != "bert":
        options = dict(max_new_tokens=6, do_sample=False)
        batch = tiny.text([5] * 3)
        got = model.generate(**batch, **options, adapter_names=names)
        accelerate(model, bank=bank, level="module")
        assert torch.equal(got, model.generate(**batch, **options, adapter_names=names))
    classes = {type(module) for module in restore(model).modules()}
    assert not any("_peft_ops" in key for module in model.modules() for key in vars(module)) and nn.Embedding in classes


@torch.no_grad()
def test_a_bank_is_disabled_in_the_middle_of_a_call():
    """Of a model with prompts, whose layers PEFT has no switches of."""
    model, bank = prompts_and_a_bank("llama", *BANKS["llama"][:2])
    accelerate(model, bank=bank)
    ids, found = tiny.text([5] * 3)["input_ids"], []

    def contrast(ids, scores):
        with model.disable_adapter():
            found.append(model(input_ids=ids).logits[:, -1])
        return scores

    names = ["a", tiny.BASE, "b"]
    out = model.generate(
        input_ids=ids, max_new_tokens=4, logits_processor=[contrast], do_sample=False, adapter_names=names
    )
    want = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, adapter_names=names)
    assert torch.equal(out, want)
    for i, base in enumerate(found):
        plain = model.get_base_model()(input_ids=out[:, : 5 + i]).logits[:, -1]
        torch.testing.assert_close(base, plain, rtol=1e-4, atol=1e-4)


def test_level_module_fuses_nothing():
    model = accelerate(tiny.ia3_model("llama", ["red"]), level="module")
    assert set(operators(model).values()) == {SCALE}
    assert {row.why_not_higher for row in report(model)} == {"level='module'"}


def test_report_needs_an_accelerated_model():
    model = tiny.ia3_model("llama", ["red"])
    with pytest.raises(TypeError, match="peft_ops.accelerate"):
        report(model)


class Other(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) + 1


class Wrapped(LlamaMLP):
    forward = functools.wraps(LlamaMLP.forward)(lambda self, x: LlamaMLP.forward(self, x) * 2)


class Renamed(LlamaMLP):
    def forward(self, states):
        """Llama's, in other words."""
        down_proj = self.down_proj(self.act_fn(self.gate_proj(states)) * self.up_proj(states))
        return down_proj


def test_code_decides_not_the_name():
    assert _fused.FORMS.get(_fused.code_of(LlamaMLP)) is not None
    assert _fused.FORMS.get(_fused.code_of(Renamed)) == _fused.FORMS[_fused.code_of(LlamaMLP)]
    assert _fused.FORMS.get(_fused.code_of(Other)) is None
    assert _fused.code_of(Wrapped) is None
    assert _fused.code_of(nn.Identity, "no_such_method") is None


def changed_by_a_hook(mlp):
    mlp.gate_proj.register_forward_hook(lambda module, args, y: y * 2)


def changed_by_a_pre_hook(mlp):
    mlp.up_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def changed_activation(mlp):
    mlp.act_fn = nn.Tanh()


def changed_layer(mlp):
    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    mlp.gate_proj.__class__ = Doubled


def changed_forward(mlp):
    plain = mlp.up_proj.forward
    mlp.up_proj.forward = lambda x: plain(x) * 2


def changed_down_by_a_hook(mlp):
    mlp.down_proj.register_forward_hook(lambda module, args, y: y * 2)


def changed_act_forward(mlp):
    mlp.act_fn.forward = torch.tanh


CHANGES = [
    changed_by_a_hook,
    changed_down_by_a_hook,
    changed_act_forward,
    changed_by_a_pre_hook,
    changed_activation,
    changed_layer,
    changed_forward,
]


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_changed_child_is_noticed_at_the_call(change):
    model = tiny.ia3_model("llama", ["red", "green"])
    batch = tiny.batch_for(model, 2)
    accelerate(model)
    before = model(**batch).logits
    change(model.get_base_model().model.layers[0].mlp)
    got = model(**batch).logits
    rows = model(**batch, adapter_names=["red", "red"]).logits
    restore(model)
    want = model(**batch).logits
    assert not torch.allclose(before, want, atol=1e-2)
    assert torch.equal(got, want) or torch.allclose(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows, got)


@pytest.fixture
def kv_calls(monkeypatch):
    calls = []
    operator = _fused.ia3_kv_linear
    monkeypatch.setattr(
        _fused, "ia3_kv_linear", lambda *args, **kw: calls.append(args[0].shape) or operator(*args, **kw)
    )
    return calls


@pytest.mark.kernels
@pytest.mark.skipif(not INTERPRET, reason="on a CPU two projections are two products")
@torch.no_grad()
@pytest.mark.parametrize("family, pairs", [("llama", 2), ("qwen2", 2), ("opt", 2), ("bert", 2), ("t5", 6)])
def test_two_projections_of_one_input_take_one_launch(family, pairs, kv_calls):
    model = tiny.ia3_model(family, ["red", "green"]).half()
    batch, names = tiny.batch_for(model, 3), ["green", tiny.BASE, "red"]
    accelerate(model, level="module")
    want = model(**batch, adapter_names=names).logits
    assert not kv_calls
    accelerate(model)
    got = model(**batch, adapter_names=names).logits
    assert len(kv_calls) == pairs
    assert (got - want).abs().max() <= 0.02 * want.abs().max()


@pytest.mark.kernels
@pytest.mark.skipif(not INTERPRET, reason="on a CPU two projections are two products")
@torch.no_grad()
def test_projections_of_two_inputs_stay_apart(kv_calls):
    model = accelerate(tiny.ia3_model("llama", ["red"]).half())
    attention = model.get_base_model().model.layers[0].self_attn
    x, other = (torch.randn(1, 3, 64, dtype=torch.half) for _ in range(2))
    k, v = attention.k_proj(x), attention.v_proj(other)
    assert len(kv_calls) == 1
    k_again, v_again = attention.k_proj(x), attention.v_proj(other)
    assert len(kv_calls) == 1  # it has been seen that the second reads something else
    for a, b in ((k, k_again), (v, v_again)):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
    want = attention.v_proj.base_layer(other) * attention.v_proj.ia3_l["red"].flatten()
    torch.testing.assert_close(v, want.half(), rtol=2e-3, atol=2e-3)


@pytest.mark.kernels
@pytest.mark.skipif(not INTERPRET, reason="on a CPU two projections are two products")
@torch.no_grad()
def test_an_input_that_was_written_meanwhile_is_read_again():
    model = accelerate(tiny.ia3_model("llama", ["red"]).half())
    attention = model.get_base_model().model.layers[0].self_attn
    x = torch.randn(1, 3, 64, dtype=torch.half)
    attention.k_proj(x)
    x.mul_(2)
    want = attention.v_proj.base_layer(x) * attention.v_proj.ia3_l["red"].flatten()
    torch.testing.assert_close(attention.v_proj(x), want.half(), rtol=2e-3, atol=2e-3)


@torch.no_grad()
def test_pairs_of_two_threads_stay_apart(kv_calls, monkeypatch):
    """One thread between the two projections of another: neither loses its pair, and no wrong one is remembered."""
    monkeypatch.setattr(_fused, "use_triton", lambda op, x: True)
    model = accelerate(tiny.ia3_model("llama", ["red"]))
    attention = model.get_base_model().model.layers[0].self_attn
    inputs, results, turn = [torch.randn(1, 3, 64) for _ in range(2)], {}, threading.Barrier(2)

    @torch.no_grad()
    def run(i: int) -> None:
        for _ in range(3):
            k = attention.k_proj(inputs[i])
            turn.wait()
            results[i] = k, attention.v_proj(inputs[i])
            turn.wait()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kv_calls) == 6 and not attention.v_proj._peft_ops_alone
    for i, x in enumerate(inputs):
        for got, layer in zip(results[i], (attention.k_proj, attention.v_proj), strict=True):
            torch.testing.assert_close(got, layer.base_layer(x) * layer.ia3_l["red"].flatten())
