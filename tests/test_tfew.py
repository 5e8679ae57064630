"""The (IA)^3 authors' checkpoints: as PEFT adapters they compute what T-Few computes, and come back bit by bit."""

import os

import peft
import pytest
import torch
import transformers

from peft_ops.integrations.folders import Adapter, ia3_adapter, prompt_adapter, read_adapter, write_adapter
from peft_ops.integrations.tfew import from_tfew, main, read_tfew, to_tfew
from tests.conftest import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET, reason="runs no kernel")
CHECKPOINT = os.environ.get("PEFT_OPS_TFEW_CHECKPOINT")
LAYER = "encoder.block.0.layer."


def t5(**sizes) -> torch.nn.Module:
    """A random T5 v1.1 of two layers each, tiny unless told otherwise."""
    torch.manual_seed(3)
    tiny = dict(d_model=16, d_ff=40, d_kv=4, num_heads=4)
    config = transformers.T5Config(
        vocab_size=64, num_layers=2, feed_forward_proj="gated-gelu", decoder_start_token_id=0, **tiny | sizes
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def checkpoint(d_model=16, d_ff=40, blocks=2) -> dict[str, torch.Tensor]:
    """Of T-Few's names and shapes; values as in the real one, some negative."""
    state = {}
    for stack, attentions in (("encoder", ["SelfAttention"]), ("decoder", ["SelfAttention", "EncDecAttention"])):
        for block in range(blocks):
            layer = f"{stack}.block.{block}.layer."
            for i, attention in enumerate(attentions):
                for name in "kv":
                    state[f"{layer}{i}.{attention}.{name}.multi_lora_b"] = 1 + torch.randn(d_model, 1) / 2
            state[f"{layer}{len(attentions)}.DenseReluDense.wi_1.multi_lora_b"] = 1 + torch.randn(d_ff, 1) / 2
    return state


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(4)
    tokens, target = torch.randint(1, 64, (3, 12)), torch.randint(1, 64, (3, 7))
    return model(input_ids=tokens, decoder_input_ids=target).logits


def tfew_logits(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """T-Few's forward: the output of each layer times its multi_lora_b."""
    hooks = []
    for key, scale in state.items():
        layer = model.get_submodule(key.removesuffix(".multi_lora_b"))
        hooks.append(layer.register_forward_hook(lambda layer, args, y, scale=scale: y * scale.flatten()))
    got = logits(model)
    for hook in hooks:
        hook.remove()
    return got


def assert_same_model(state: dict[str, torch.Tensor], folder, **sizes) -> None:
    """PEFT with the folder, beside T-Few with the checkpoint, within 1e-5 of the largest logit; and not by chance."""
    want, bare = tfew_logits(t5(**sizes), state), logits(t5(**sizes))
    got = logits(peft.PeftModel.from_pretrained(t5(**sizes), folder))
    error = ((got - want).abs().max() / want.abs().max()).item()
    assert error < 1e-5, error
    assert (bare - want).abs().max() > 1e-2 * want.abs().max(), "the vectors do nothing"


def test_peft_computes_what_tfew_computes(tmp_path):
    state = checkpoint()
    torch.save(state, tmp_path / "finish.pt")
    main([str(tmp_path / "finish.pt"), str(tmp_path / "out"), "--base-model", "google/t5-v1_1-small"])
    adapter = read_adapter(tmp_path / "out")
    assert adapter.config["base_model_name_or_path"] == "google/t5-v1_1-small"
    assert adapter.config["target_modules"] == ["k", "v", "wo"] and adapter.config["feedforward_modules"] == ["wo"]
    assert len(adapter.vectors) == 16 and len(adapter.feedforward) == 4
    assert_same_model(state, tmp_path / "out")


def test_there_and_back_bit_by_bit(tmp_path, capsys):
    state = checkpoint()
    torch.save(state, tmp_path / "finish.pt")
    main([str(tmp_path / "finish.pt"), str(tmp_path / "out")])
    main([str(tmp_path / "out"), str(tmp_path / "again.pt"), "--inverse"])
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)
    assert capsys.readouterr().out.startswith("16 vectors, 352 numbers -> ")
    for wrong in (["out", "x"], ["finish.pt", "x", "--inverse"], ["missing.pt", "x"]):
        with pytest.raises(SystemExit):
            main([str(tmp_path / wrong[0]), str(tmp_path / wrong[1]), *wrong[2:]])
        assert "source must be a" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_an_adapter_that_peft_trained_goes_to_tfew(tmp_path):
    model = peft.get_peft_model(t5(), peft.IA3Config(task_type="SEQ_2_SEQ_LM"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(1, 0.5)
    model.save_pretrained(tmp_path)
    want, state = logits(model), to_tfew(read_adapter(tmp_path))
    torch.testing.assert_close(tfew_logits(t5(), state), want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
    assert len(state) == 16


def test_input_scales_of_one_are_nothing():
    state = checkpoint()
    ones = {key.replace("multi_lora_b", "multi_lora_a"): torch.ones(1, 7) for key in state}
    assert from_tfew(state | ones).vectors.keys() == from_tfew(state).vectors.keys()


K, WI = f"{LAYER}0.SelfAttention.k.multi_lora_b", f"{LAYER}1.DenseReluDense.wi_1.multi_lora_b"


@pytest.mark.parametrize(
    "state, text",
    [
        ({K.replace("_b", "_a"): torch.tensor([[1.0, 0.5]])}, "multi_lora_a must be ones, .*got values from 0.5 to 1"),
        ({WI.replace("wi_1", "wi"): torch.ones(8, 1)}, "scaled before its activation, .*; only gated models map"),
        ({WI.replace("wi_1", "wi_0"): torch.ones(8, 1)}, "wi_0.multi_lora_b'; it is scaled before its activation"),
        ({WI.replace("wi_1", "wo"): torch.ones(8, 1)}, "it is scaled at its output, where PEFT scales the input"),
        ({K: torch.ones(8, 2)}, r"must be a vector, of rank 1, got \[8, 2\]"),
        ({K: torch.ones(8)}, r"must be a vector, of rank 1, got \[8\]"),
        ({K: 3}, "must be a vector, of rank 1, got int"),
        ({K.replace(".k.", ".qkv."): torch.ones(8, 1)}, "state must hold multi_lora_b of k, v and wi_1 .*qkv"),
        ({K.replace("multi_lora_b", "lora_b"): torch.ones(8, 1)}, "state must hold .*k.lora_b"),
        ({"transformer.h.0.attn.k.multi_lora_b": torch.ones(8, 1)}, "of a T5's blocks, got 'transformer.h.0"),
        ({"shared.weight": torch.ones(8, 1)}, "state must hold .* got 'shared.weight'$"),
        ({}, "state must hold vectors, got none"),
    ],
)
def test_what_does_not_map_is_refused(state, text):
    with pytest.raises(ValueError, match=f"from_tfew: .*{text}"):
        from_tfew(state)


@pytest.mark.parametrize(
    "adapter, text",
    [
        (prompt_adapter(torch.ones(2, 3)), "IA3, without modules_to_save, got PROMPT_TUNING"),
        (
            Adapter({"peft_type": "IA3"}, modules_to_save={"head.weight": torch.ones(2)}),
            r"got IA3 with \['head.weight'\]",
        ),
        (ia3_adapter({f"{LAYER}1.DenseReluDense.wo": torch.ones(2)}), "got the output of '.*wo'"),
        (ia3_adapter({f"{LAYER}1.DenseReluDense.wi": torch.ones(2)}), "got the output of '.*wi'"),
        (ia3_adapter({K[:-13]: torch.ones(2)}, [K[:-13]]), "got the input of '.*k'"),
        (ia3_adapter({"model.layers.0.self_attn.k_proj": torch.ones(2)}), "got the output of 'model.layers"),
    ],
)
def test_what_tfew_does_not_scale_is_refused(adapter, text):
    with pytest.raises(ValueError, match=f"to_tfew: adapter must .*{text}"):
        to_tfew(adapter)


@pytest.mark.skipif(not CHECKPOINT, reason="PEFT_OPS_TFEW_CHECKPOINT names no t03b_ia3_finish.pt")
class TestAuthorsCheckpoint:
    def test_converts_and_comes_back(self, tmp_path):
        state, adapter = torch.load(CHECKPOINT, weights_only=True), read_tfew(CHECKPOINT, "bigscience/T0_3B")
        assert len(adapter.vectors) == 192 and sum(v.numel() for v in adapter.vectors.values()) == 540_672
        write_adapter(tmp_path, adapter)
        back = to_tfew(read_adapter(tmp_path))
        assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)

    def test_two_layers_of_its_width(self, tmp_path):
        """d_model 2048, d_ff 5120, as T0-3B; random weights, the authors' vectors of the first two blocks."""
        state = torch.load(CHECKPOINT, weights_only=True)
        state = {key: value for key, value in state.items() if key.split(".")[2] in ("0", "1")}
        assert len(state) == 16
        write_adapter(tmp_path, from_tfew(state))
        assert_same_model(state, tmp_path, d_model=2048, d_ff=5120, d_kv=64, num_heads=32)
