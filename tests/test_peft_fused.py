"""Which operator serves which module of a PEFT model, and that a module whose code is another's is left alone."""

import functools
import io

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from peft_ops import accelerate, report, restore
from peft_ops._backend import INTERPRET
from peft_ops.integrations import _fused
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
    "gpt2": {"c_attn": "ia3_scale", "mlp.c_proj": ACT},
    "opt": {"q_proj": KV, "k_proj": KV, "fc2": SCALE},
    "bloom": {"query_key_value": SCALE, "dense_4h_to_h": SCALE},
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
    in_layer = [row for row in rows if row.module.endswith("fc2") or row.module.endswith("dense_4h_to_h")]
    assert all("no feed-forward code" in row.why_not_higher for row in in_layer)


def test_level_module_fuses_nothing():
    model = accelerate(tiny.ia3_model("llama", ["red"]), level="module")
    assert set(operators(model).values()) == {SCALE}


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
