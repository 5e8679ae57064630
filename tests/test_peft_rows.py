"""Layers that see no rows of the batch first: refused where tasks would mix, right where they cannot."""

import copy

import peft
import pytest
import torch
import transformers

from peft_ops import accelerate, restore
from tests.conftest import DEVICE
from tests.tiny import BASE, randomized, row_by_row, set_vectors, text

pytestmark = pytest.mark.usefixtures("one_thread")
FOUR = ["red", BASE, "green", "red"]
IMAGE = 59
SMALL = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
BART = dict(**SMALL, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=50)
SEEN = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2)


def xlnet():
    config = transformers.XLNetConfig(vocab_size=50, d_model=32, n_layer=1, n_head=2, d_inner=48)
    return transformers.XLNetLMHeadModel(config), ["layer_1", "layer_2"], ["layer_2"]


def fsmt():
    config = transformers.FSMTConfig(langs=["en", "de"], src_vocab_size=50, tgt_vocab_size=50, **BART)
    return transformers.FSMTModel(config), ["k_proj", "v_proj", "fc2"], ["fc2"]


def led():
    config = transformers.LEDConfig(
        attention_window=[4], max_encoder_position_embeddings=64, max_decoder_position_embeddings=64, **BART
    )
    return transformers.LEDModel(config), ["key", "value", "fc2"], ["fc2"]


def longformer():
    config = transformers.LongformerConfig(
        vocab_size=50, num_hidden_layers=1, attention_window=[4], max_position_embeddings=64, **SEEN
    )
    return transformers.LongformerModel(config), ["key", "value", "output.dense"], ["output.dense"]


def switch():
    config = transformers.SwitchTransformersConfig(
        vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=2, num_experts=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
    )  # fmt: skip
    return transformers.SwitchTransformersModel(config), ["k", "v", "wo"], ["wo"]


def llava():
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**SEEN, num_hidden_layers=2, image_size=8, patch_size=4),
        text_config=transformers.LlamaConfig(**SEEN, num_hidden_layers=1, vocab_size=60),
        image_token_index=IMAGE,
        image_seq_length=4,
    )
    return transformers.LlavaForConditionalGeneration(config), ["k_proj", "v_proj", "down_proj"], ["down_proj"]


def adapted(make):
    base, targets, feedforward = make()
    config = peft.IA3Config(target_modules=targets, feedforward_modules=feedforward)
    model = peft.get_peft_model(randomized(base).eval(), config, adapter_name="red")
    model.add_adapter("green", copy.deepcopy(config))
    for name in ("red", "green"):
        set_vectors(model, name)
    return model.to(DEVICE).eval()


def square(model) -> dict:
    """As many rows as tokens: eight, which is also two windows of the models that have windows."""
    ids = text([8] * 8, seed=3)["input_ids"].to(DEVICE) % 50
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if model.get_base_model().config.is_encoder_decoder else {})


@pytest.mark.parametrize("level", ["module", "auto"])
@pytest.mark.parametrize(
    "make, sees",
    [(xlnet, "positions"), (fsmt, "positions"), (led, "positions"), (longformer, "positions"), (switch, "tokens")],
)
def test_no_rows_first(make, sees, level):
    model = adapted(make)
    batch = square(model)
    want = row_by_row(model, FOUR * 2, lambda model: model(**batch)[0])
    accelerate(model, level=level)
    with pytest.raises(ValueError, match=f"sees {sees} .* where other layers see rows of the batch.*, got 3"):
        model(**batch, adapter_names=FOUR * 2)
    got = model(**batch, adapter_names=["green"] * 8)[0]
    torch.testing.assert_close(got[2], want[2], rtol=1e-4, atol=1e-4)
    restore(model)
    assert not any("_peft_ops" in name for module in model.modules() for name in vars(module))


class TestImages:
    def batch(self, counts):
        ids = text([12] * len(counts), seed=5)["input_ids"] % IMAGE
        for row, count in zip(ids, counts, strict=True):
            row[1 : 1 + 4 * count] = IMAGE
        pixels = torch.randn(sum(counts), 3, 8, 8, generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": ids, "pixel_values": pixels} if sum(counts) else {"input_ids": ids}
        return {name: value.to(DEVICE) for name, value in batch.items()}

    @pytest.mark.parametrize("counts", [[1, 1, 1, 1], [0, 0, 0, 0]], ids=["one in each row", "none"])
    def test_rows(self, counts):
        model, batch = adapted(llava), self.batch(counts)
        want = row_by_row(model, FOUR, lambda model: model(**batch).logits)
        torch.testing.assert_close(accelerate(model)(**batch, adapter_names=FOUR).logits, want, rtol=1e-4, atol=1e-4)

    def test_as_many_images_as_rows_but_elsewhere(self):
        model, batch = accelerate(adapted(llava)), self.batch([2, 1, 0, 1])
        with pytest.raises(ValueError, match="vision_tower.* sees images or sounds where"):
            model(**batch, adapter_names=FOUR)
        assert model(**batch, adapter_names=["red"] * 4).logits.isfinite().all()

    def test_generate(self):
        model, batch = adapted(llava), self.batch([1, 1, 1, 1])
        options = dict(max_new_tokens=4, do_sample=False, num_beams=3, pad_token_id=0)
        want = row_by_row(model, FOUR, lambda model: model.generate(**batch, **options))
        assert torch.equal(accelerate(model).generate(**batch, **options, adapter_names=FOUR), want)
