"""Prompts of several lengths in one batch: each row is what plain PEFT gives for its own text, alone and unpadded."""

import copy
from functools import cache

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from peft_ops import accelerate, restore
from peft_ops.integrations._prompts import is_decoder
from tests.conftest import DEVICE, assert_like_torch
from tests.tiny import BASE, CAUSAL, FAMILIES, SEQ2SEQ, VOCAB, alone, prompt_model, randomized, set_vectors, text

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = {"short": 2, "long": 5}
NAMES = ["short", BASE, "long", "short", BASE]
LENGTHS = [7, 4, 5, 6, 7]
SIDES = ["left", "right"]
ENCODERS = [family for family in FAMILIES if family not in CAUSAL + SEQ2SEQ]


def nightly(family: str):
    return pytest.param(family, marks=pytest.mark.nightly)


@cache
def plain(family: str, kind: str = "PROMPT_TUNING", task: str | None = None, dtype=torch.float32) -> nn.Module:
    return prompt_model(family, PROMPTS, kind, task).to(DEVICE, dtype)


def accelerated(family: str, kind: str = "PROMPT_TUNING", task: str | None = None) -> nn.Module:
    return accelerate(copy.deepcopy(plain(family, kind, task)))


# models of texts and images; PEFT takes the first matrix of VOCAB rows for the embeddings, and images come first
SIGHT = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, image_size=8, patch_size=4)
TEXT = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
IMAGE_TEXT = {
    "llava": (dict(model_type="llama"), dict(SIGHT, model_type="clip_vision_model", num_hidden_layers=1)),
    "idefics3": (dict(model_type="llama"), dict(SIGHT, num_hidden_layers=1)),
    "qwen2_vl": (
        dict(rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3]}),
        dict(embed_dim=16, hidden_size=64, depth=1, num_heads=2),
    ),
}


def of_prompts(base: nn.Module, task: str, lengths: dict[str, int] = PROMPTS, **options) -> nn.Module:
    """A PEFT model of a family that FAMILIES does not have."""
    model = None
    for name, length in lengths.items():
        prompt = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=length, **options)
        if model is None:
            model = peft.get_peft_model(randomized(base), prompt, name)
        else:
            model.add_adapter(name, prompt)
        set_vectors(model, name)
    return model.to(DEVICE).eval()


def image_text_model(kind: str, lengths: dict[str, int] = PROMPTS) -> nn.Module:
    of_text, of_images = IMAGE_TEXT[kind]
    of_text = dict(**TEXT, **of_text, vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=None)
    config = transformers.AutoConfig.for_model(kind, text_config=of_text, vision_config=of_images)
    config.tie_word_embeddings = False
    base = transformers.AutoModelForImageTextToText.from_config(config)
    return of_prompts(base, "CAUSAL_LM", lengths, token_dim=64, num_layers=2, num_attention_heads=4)


@cache
def numbering(kind: str) -> nn.Module:
    """An encoder-decoder that counts its encoder's slots: the left pads of a text move it."""
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=VOCAB, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=128, pad_token_id=0,
        bos_token_id=1, eos_token_id=None, decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    base = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager")
    return of_prompts(base, "SEQ_2_SEQ_LM")


def batch_of(family: str, side: str, seed: int = 0) -> dict[str, Tensor]:
    pad = plain(family).get_base_model().config.pad_token_id
    batch = {key: value.to(DEVICE) for key, value in text(LENGTHS, side, pad, seed).items()}
    if family in SEQ2SEQ:
        batch["decoder_input_ids"] = text([4] * 5, seed=1)["input_ids"].to(DEVICE)
    return batch


def unpadded(batch: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    """Row i by itself, what belongs to its tokens cut to them."""
    real = batch["attention_mask"][i].bool()
    return {
        key: value[i : i + 1] if key.startswith("decoder") else value[i : i + 1, real] for key, value in batch.items()
    }


@torch.no_grad()
def logits(model: nn.Module, batch: dict, **kwargs) -> Tensor:
    return model(**batch, **kwargs).logits


def by_row(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Plain PEFT's logits of each row, without those of the prompt; another adapter would have given others."""
    found = []
    for i, name in enumerate(NAMES):
        alternatives = {}
        for other in dict.fromkeys([name, *NAMES]):
            with alone(model, other) as one:
                out = logits(one, unpadded(batch, i))[0]
            count = len(out) if "decoder_input_ids" in batch or out.dim() == 1 else LENGTHS[i]
            alternatives[other] = out[-count:]
        got = alternatives.pop(name)
        assert not any(torch.allclose(got, other, atol=1e-2) for other in alternatives.values())
        found.append(got)
    return found


def of_tokens(out: Tensor, batch: dict[str, Tensor], decoder: bool) -> list[Tensor]:
    """Each row's logits at its tokens: after the longest prompt in a decoder, after their own one elsewhere."""
    if out.dim() == 2 or "decoder_input_ids" in batch:
        return list(out)
    starts = [max(PROMPTS.values()) if decoder else PROMPTS.get(name, 0) for name in NAMES]
    rows = zip(out, starts, batch["attention_mask"].bool(), strict=True)
    return [row[start : start + len(real)][real] for row, start, real in rows]


def assert_rows(family: str, batch: dict, kind: str = "PROMPT_TUNING", task: str | None = None) -> None:
    out = logits(accelerated(family, kind, task), batch, adapter_names=NAMES)
    got = torch.cat([row.flatten() for row in of_tokens(out, batch, family in CAUSAL)])
    same, fp64 = (
        torch.cat([row.flatten() for row in by_row(plain(family, kind, task, dtype), in_dtype(batch, dtype))])
        for dtype in (torch.float32, torch.float64)
    )
    assert_like_torch(got, same, fp64)


def in_dtype(batch: dict, dtype: torch.dtype) -> dict:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


class TestForward:
    @pytest.mark.parametrize("side", SIDES)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_rows_are_pefts_unpadded_ones(self, family, side):
        assert_rows(family, batch_of(family, side))

    @pytest.mark.parametrize("family", ["llama", "t5", "bert"])
    def test_p_tuning(self, family):
        assert_rows(family, batch_of(family, "right"), kind="P_TUNING")

    @pytest.mark.parametrize("side", SIDES)
    @pytest.mark.parametrize("family", ENCODERS)
    def test_every_token_of_an_encoder(self, family, side):
        assert_rows(family, batch_of(family, side), task="TOKEN_CLS")

    @pytest.mark.parametrize("family", ["llama", "opt", "t5-gated", "roberta"])
    def test_inputs_embeds(self, family):
        batch = batch_of(family, "right")
        words = plain(family).get_base_model().get_input_embeddings()
        batch["inputs_embeds"] = words(batch.pop("input_ids")).detach()
        assert_rows(family, batch)

    @pytest.mark.parametrize("side", SIDES)
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_a_classifier_that_reads_the_last_token(self, family, side):
        """PEFT's reads the last slot, be it padding."""
        assert_rows(family, batch_of(family, side), task="SEQ_CLS")
        batch = batch_of(family, side)
        words = plain(family, task="SEQ_CLS").get_base_model().get_input_embeddings()
        batch["inputs_embeds"] = words(batch.pop("input_ids")).detach()
        assert_rows(family, batch, task="SEQ_CLS")

    def test_token_types_follow_their_tokens(self):
        """PEFT puts zeros before them, as here."""
        batch = batch_of("bert", "right")
        batch["token_type_ids"] = torch.randint(0, 2, batch["input_ids"].shape, device=DEVICE)
        assert_rows("bert", batch)
        types = batch["token_type_ids"]
        out = logits(accelerated("bert"), batch | {"token_type_ids": 1 - types}, adapter_names=NAMES)
        assert not torch.allclose(out, logits(accelerated("bert"), batch, adapter_names=NAMES), atol=1e-2)

    @pytest.mark.parametrize("side", SIDES)
    @pytest.mark.parametrize("kind", IMAGE_TEXT)
    def test_an_image_text_model_is_a_decoder(self, kind, side):
        """Where padding is on the left, the last slot of every row is its last token."""
        theirs, batch = image_text_model(kind), batch_of("llama", side)
        ours = accelerate(copy.deepcopy(theirs))
        out = logits(ours, batch, adapter_names=NAMES)
        got = of_tokens(out, batch, decoder=True)
        assert side == "right" or torch.equal(out[:, -1], torch.stack([row[-1] for row in got]))
        for row, want in zip(got, by_row(theirs, batch), strict=True):
            torch.testing.assert_close(row, want, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("cls, options, decoder", [
        ("BertForMaskedLM", {}, False), ("BertLMHeadModel", {}, False), ("BertLMHeadModel", {"is_decoder": True}, True),
        ("ElectraForCausalLM", {}, False), ("LlamaForCausalLM", {}, True), ("LlamaForSequenceClassification", {}, True),
        ("LlamaModel", {}, True), ("BertModel", {}, False), ("XLNetLMHeadModel", {}, True),
    ])  # fmt: skip
    def test_what_is_a_decoder(self, cls, options, decoder):
        cls = getattr(transformers, cls)
        with torch.device("meta"):
            assert is_decoder(cls(cls.config_class(**options))) == decoder

    def test_pefts_left_padding_stands_between_prompt_and_text(self):
        """PEFT's rows with padding on the left are not those without; ours are, as above."""
        batch, model = batch_of("llama", "left"), plain("llama")
        want = by_row(model, batch)
        with alone(model, "short"):
            got = logits(model, batch)
        torch.testing.assert_close(got[0, PROMPTS["short"] :], want[0])  # a row without padding
        assert not torch.allclose(got[3, -LENGTHS[3] :], want[3], atol=1e-2)

    def test_positional_arguments(self):
        batch, model = batch_of("llama", "left"), accelerated("llama")
        want = logits(model, batch, adapter_names=NAMES)
        got = model(batch["input_ids"], batch["attention_mask"], adapter_names=NAMES).logits
        assert torch.equal(got, want)

    @pytest.mark.parametrize("names", [NAMES, [BASE] * 5], ids=["mixed", "base"])
    @pytest.mark.parametrize("family", ["llama", "t5", "bert"])
    def test_positional_arguments_are_in_pefts_order(self, family, names):
        """Embeddings come third and labels behind them, where the base model has positions or token types."""
        batch, model = batch_of(family, "right"), accelerated(family)
        decoder_ids = batch.pop("decoder_input_ids", None)
        given = [None] if family != "t5" else [None, decoder_ids, None, None]  # embeddings, and the decoder's
        labels = {"llama": batch["input_ids"], "t5": decoder_ids, "bert": torch.arange(5, device=DEVICE) % 3}[family]
        options = {} if decoder_ids is None else {"decoder_input_ids": decoder_ids}
        want = model(**batch, **options, labels=labels, adapter_names=names)
        got = model(*batch.values(), *given, labels, adapter_names=names)
        assert torch.equal(got.loss, want.loss) and torch.equal(got.logits, want.logits)

    def test_position_ids_are_the_prompts(self):
        """As PEFT does, positions that were given are replaced."""
        batch, model = batch_of("llama", "left"), accelerated("llama")
        got = logits(model, batch | {"position_ids": torch.zeros_like(batch["input_ids"])}, adapter_names=NAMES)
        assert torch.equal(got, logits(model, batch, adapter_names=NAMES))

    def test_without_a_mask(self):
        batch, model = text([6] * 5), accelerated("llama")
        want = logits(model, batch, adapter_names=NAMES)
        assert torch.equal(logits(model, {"input_ids": batch["input_ids"]}, adapter_names=NAMES), want)

    @pytest.mark.parametrize("family, side", [
        ("llama", "left"), ("llama", "right"), ("gemma", "left"), ("t5", "left"), ("t5", "right"), ("bert", "right"),
    ])  # fmt: skip
    def test_loss(self, family, side):
        """Labels move with their tokens, none is on a prompt: the mean over the rows' own losses."""
        batch, ours, theirs = batch_of(family, side), accelerated(family), plain(family)
        if family == "bert":
            labels = torch.tensor([0, 2, 1, 1, 0], device=DEVICE)
            counts = torch.ones(5)
        elif family == "t5":
            labels = batch.pop("decoder_input_ids")
            counts = torch.full((5,), labels.shape[1])
        else:
            labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
            # a causal model predicts a row's first token from its prompt
            counts = torch.tensor([n - (name == BASE) for n, name in zip(LENGTHS, NAMES, strict=True)])
        losses = []
        for i, name in enumerate(NAMES):
            row = unpadded(batch, i)
            mine = labels[i : i + 1] if family != "llama" and family != "gemma" else row["input_ids"]
            with alone(theirs, name) as one:
                losses.append(one(**row, labels=mine).loss.item())
        want = (torch.tensor(losses) * counts).sum() / counts.sum()
        got = ours(**batch, labels=labels, adapter_names=NAMES).loss.item()
        assert got == pytest.approx(want.item(), rel=1e-5)

    @pytest.mark.parametrize("family", ["llama", "t5", "bert", "roberta"])
    def test_base_rows_alone(self, family):
        """Whether or not another row of the batch has a prompt."""
        batch, model = batch_of(family, "left"), accelerated(family)
        got = logits(model, batch, adapter_names=[BASE] * 5)
        mixed = logits(model, batch, adapter_names=NAMES)
        tokens = [*zip(list(got), batch["attention_mask"].bool(), strict=True)]
        got = [row[real] if family == "llama" else row for row, real in tokens]
        mixed = of_tokens(mixed, batch, family in CAUSAL)
        for i in (1, 4):
            torch.testing.assert_close(mixed[i], got[i], rtol=0, atol=2e-5)

    @pytest.mark.parametrize("family", ["llama", "t5", "bert"])
    def test_other_rows_leave_a_row_alone(self, family):
        model, batch = accelerated(family), batch_of(family, "left")
        words = model.get_base_model().get_input_embeddings()
        batch["inputs_embeds"] = words(batch.pop("input_ids")).detach()
        want = logits(model, batch, adapter_names=NAMES)
        for i in range(5):
            others = torch.arange(5, device=DEVICE) != i
            disturbed = batch | {"inputs_embeds": batch["inputs_embeds"].clone()}
            disturbed["inputs_embeds"][others] = float("nan")
            names = [name if j == i else NAMES[::-1][j] for j, name in enumerate(NAMES)]
            names[0 if i else 2] = "long"  # the batch's longest prompt, which sets its length
            if names[i] != NAMES[i]:
                continue
            assert torch.equal(logits(model, disturbed, adapter_names=names)[i], want[i])

    def test_an_adapter_loaded_for_inference(self, tmp_path):
        """Saved by PEFT as a table, without its encoder; the same rows come out."""
        model, batch = accelerated("llama", "P_TUNING"), batch_of("llama", "left")
        want = logits(model, batch, adapter_names=NAMES)
        model.save_pretrained(tmp_path)
        base = copy.deepcopy(plain("llama", "P_TUNING")).get_base_model()
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "short", adapter_name="short")
        accelerate(loaded)
        loaded.load_adapter(tmp_path / "long", adapter_name="long")
        assert all(config.inference_mode for config in loaded.peft_config.values())
        torch.testing.assert_close(logits(loaded.eval(), batch, adapter_names=NAMES), want, rtol=0, atol=2e-5)

    @pytest.mark.parametrize("family", ["llama", "t5"])
    def test_disabled_adapters(self, family):
        """Then every row is the base model's, in generate() too. (BERT's prompts PEFT cannot disable: it raises.)"""
        model, batch = accelerated(family), batch_of(family, "right")
        want = logits(model, batch, adapter_names=[BASE] * 5)
        with model.disable_adapter():
            assert torch.equal(logits(model, batch, adapter_names=NAMES), want)
        decoder_ids = {"decoder_input_ids": batch.pop("decoder_input_ids")} if family == "t5" else {}
        options = dict(max_new_tokens=6, do_sample=False)
        tokens = model.generate(**batch, **options, adapter_names=[BASE] * 5)
        with model.disable_adapter():
            assert torch.equal(model.generate(**batch, **options, adapter_names=NAMES), tokens)
        assert not torch.equal(logits(model, batch | decoder_ids, adapter_names=NAMES)[0], want[0])

    def test_without_names_and_restored(self):
        plainly, model = plain("llama"), accelerated("llama")
        batch = batch_of("llama", "left")
        for name in ("short", "long"):
            with alone(plainly, name), alone(model, name):
                want = logits(plainly, batch)
                assert torch.equal(logits(model, batch), want)
        attributes = [set(vars(module)) for module in plainly.modules()]
        assert [set(vars(module)) for module in restore(model).modules()] == attributes
        assert torch.equal(logits(model, batch), want)


class TestEncodersThatNumberSlots:
    """BART and its kin take no positions: with pads behind the text, prompt and text stand where they do alone."""

    KINDS = ["bart", "m2m_100", *map(nightly, ("mbart", "pegasus", "marian", "blenderbot"))]

    def batch(self, side: str) -> dict[str, Tensor]:
        batch = {key: value.to(DEVICE) for key, value in text(LENGTHS, side).items()}
        return batch | {"decoder_input_ids": text([4] * 5, seed=1)["input_ids"].to(DEVICE)}

    @pytest.mark.parametrize("side", SIDES)
    @pytest.mark.parametrize("kind", KINDS)
    def test_rows_are_pefts_unpadded_ones(self, kind, side):
        batch, ours = self.batch(side), accelerate(copy.deepcopy(numbering(kind)))
        got = logits(ours, batch, adapter_names=NAMES)
        torch.testing.assert_close(got, torch.stack(by_row(numbering(kind), batch)), rtol=0, atol=1e-3)
        bare = logits(ours, batch, adapter_names=[BASE] * 5)  # whether or not another row of the batch has a prompt
        torch.testing.assert_close(bare[[1, 4]], got[[1, 4]], rtol=0, atol=1e-3)
        ids = batch.pop("decoder_input_ids")
        got = ours(**batch, labels=ids, return_dict=False, adapter_names=[BASE] * 5)
        assert torch.equal(got[0], ours(**batch, labels=ids, adapter_names=[BASE] * 5).loss)

    @torch.no_grad()
    @pytest.mark.parametrize("generate", [False, True], ids=["forward", "generate"])
    @pytest.mark.parametrize("side", SIDES)
    def test_what_is_returned_of_the_encoder_stands_where_the_text_does(self, side, generate):
        """The prompt right before the first real token, as everywhere."""
        batch, theirs = self.batch(side), numbering("bart")
        ours = accelerate(copy.deepcopy(theirs))
        options, ids = dict(output_hidden_states=True, output_attentions=True), batch["decoder_input_ids"]
        if generate:
            options |= dict(return_dict_in_generate=True, num_beams=2, max_new_tokens=2, do_sample=False)
            found = ours.generate(**batch, **options, adapter_names=NAMES)
        else:
            found = ours(**batch, **options, adapter_names=NAMES)
            flat = ours(**batch, **options, adapter_names=NAMES, return_dict=False)
            assert torch.equal(flat[-3], found.encoder_last_hidden_state)
        for i, name in enumerate(NAMES):
            row, p = unpadded(batch, i) | dict(decoder_input_ids=ids[i : i + 1]), PROMPTS.get(name, 0)
            with alone(theirs, name) as one:
                want = one(**row, output_hidden_states=True, output_attentions=True)
            first = int(batch["attention_mask"][i].argmax())
            mine = slice(first, first + p + LENGTHS[i])
            for got, layer in zip(found.encoder_hidden_states, want.encoder_hidden_states, strict=True):
                torch.testing.assert_close(got[i, mine], layer[0], rtol=0, atol=1e-4)
            for got, layer in zip(found.encoder_attentions, want.encoder_attentions, strict=True):
                torch.testing.assert_close(got[i, :, mine, mine], layer[0], rtol=0, atol=1e-5)
            cross = found.cross_attentions[0][0][2 * i] if generate else found.cross_attentions[0][i]
            cross = cross[..., mine].sum(-1)
            torch.testing.assert_close(cross, torch.ones_like(cross), rtol=0, atol=1e-5)
            if not generate:
                torch.testing.assert_close(
                    found.encoder_last_hidden_state[i, mine], want.encoder_last_hidden_state[0], rtol=0, atol=1e-4
                )

    @pytest.mark.parametrize("generate", [False, True], ids=["forward", "generate"])
    def test_more_positions_than_the_model_has(self, generate):
        model = accelerate(copy.deepcopy(numbering("bart")))
        batch = {key: value.to(DEVICE) for key, value in text([126] * 5).items()}
        start = {} if generate else {"decoder_input_ids": batch["input_ids"][:, :1]}
        with pytest.raises(ValueError, match="prompt and text must fit 128 positions, got 131"):
            (model.generate if generate else model)(**batch, **start, adapter_names=NAMES)

    @pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
    @pytest.mark.parametrize("side", SIDES)
    @pytest.mark.parametrize("kind", KINDS)
    def test_generation(self, kind, side, beams):
        batch, options = self.batch(side), dict(num_beams=beams, max_new_tokens=12, do_sample=False)
        batch.pop("decoder_input_ids")
        ours = accelerate(copy.deepcopy(numbering(kind)))
        got = ours.generate(**batch, **options, adapter_names=NAMES)
        bare = ours.generate(**batch, **options, adapter_names=[BASE] * 5)
        for i, name in enumerate(NAMES):
            with alone(numbering(kind), name) as one:
                want = one.generate(**unpadded(batch, i), **options)[0]
            assert torch.equal(got[i], want), name
            assert name != BASE or torch.equal(bare[i], want)


class TestModelsThatReadIds:
    """More than embeddings: PEFT's prompts leave it out, so that only batches of prompts alone are PEFT's."""

    def model(self, kind: str) -> nn.Module:
        sizes = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
        if kind == "esm":
            config = transformers.EsmConfig(**sizes, max_position_embeddings=128, pad_token_id=1, mask_token_id=3)
            return of_prompts(transformers.EsmForSequenceClassification(config), "SEQ_CLS")
        config = transformers.Gemma3nTextConfig(
            **sizes, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8, num_key_value_heads=2,
            head_dim=16, num_kv_shared_layers=0, laurel_rank=4, altup_num_inputs=2, pad_token_id=0, bos_token_id=1,
            eos_token_id=None, layer_types=["sliding_attention", "full_attention"],
            activation_sparsity_pattern=[0.0, 0.0],
        )  # fmt: skip
        return of_prompts(transformers.Gemma3nForCausalLM(config), "CAUSAL_LM")

    @pytest.mark.parametrize("kind", ["gemma3n", "esm"])
    def test_batches_of_prompts_or_of_none(self, kind):
        theirs, names = self.model(kind), ["short", "long", "long", "short", "long"]
        ours = accelerate(copy.deepcopy(theirs))
        batch = {key: value.to(DEVICE) for key, value in text(LENGTHS, "left", pad=1).items()}
        out = logits(ours, batch, adapter_names=names)
        rows = of_tokens(out, batch, decoder=True)
        for i, name in enumerate(names):
            with alone(theirs, name) as one:
                want = logits(one, unpadded(batch, i))[0]
            want = want if want.dim() == 1 else want[-LENGTHS[i] :]
            torch.testing.assert_close(rows[i], want, rtol=0, atol=1e-4)
        same = {key: value[:1] for key, value in batch.items()}  # without pads
        with alone(theirs, BASE) as one:
            assert torch.equal(logits(ours, same, adapter_names=[BASE]), logits(one, same))

    @pytest.mark.parametrize("kind", ["gemma3n", "esm"])
    def test_rows_without_a_prompt_among_them(self, kind):
        model, batch = accelerate(self.model(kind)), {"input_ids": torch.full((5, 7), 5, device=DEVICE)}
        for call in [model] + [model.generate] * (kind == "gemma3n"):
            with pytest.raises(ValueError, match="all rows must have prompts, or none, .* got '__base__' among"):
                call(**batch, adapter_names=NAMES)


class TestGeneration:
    def run(self, model, batch, **options) -> Tensor:
        return model.generate(**batch, **dict(max_new_tokens=16, do_sample=False) | options)

    def text(self, family: str, side: str) -> dict[str, Tensor]:
        batch = batch_of(family, side)
        batch.pop("decoder_input_ids", None)
        return batch

    def new_tokens(self, family: str, out: Tensor, length: int) -> Tensor:
        return out[..., length if family in CAUSAL else 1 :]

    def compare(self, family: str, side: str, kind: str = "PROMPT_TUNING", **options) -> None:
        batch, theirs = self.text(family, side), plain(family, kind)
        got = self.run(accelerated(family, kind), batch, **options, adapter_names=NAMES)
        if family in CAUSAL:
            assert torch.equal(got[:, : max(LENGTHS)], batch["input_ids"].repeat_interleave(len(got) // 5, 0))
        got = self.new_tokens(family, got, max(LENGTHS)).view(5, len(got) // 5, -1)
        for i, name in enumerate(NAMES):
            with alone(theirs, name) as one:
                want = self.new_tokens(family, self.run(one, unpadded(batch, i), **options), LENGTHS[i])
            assert torch.equal(got[i], want), name
        assert len({tuple(row[0].tolist()) for row in got}) >= 4  # Bloom repeats itself

    @pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
    @pytest.mark.parametrize("side", SIDES)
    @pytest.mark.parametrize(
        "family", [nightly(f) if f in ("mistral", "qwen2", "phi3") else f for f in CAUSAL + SEQ2SEQ]
    )
    def test_tokens_are_pefts_unpadded_ones(self, family, side, beams):
        long = family in ("llama", "t5")
        self.compare(family, side, num_beams=beams, max_new_tokens=64 if long else 16)

    @pytest.mark.parametrize("family", ["llama", "t5-gated"])
    def test_p_tuning(self, family):
        self.compare(family, "left", "P_TUNING", num_beams=3)

    @pytest.mark.parametrize("family", ["llama", "t5"])
    def test_several_sequences(self, family):
        self.compare(family, "left", num_beams=4, num_return_sequences=3)

    def test_without_cache(self):
        self.compare("llama", "left", use_cache=False, max_new_tokens=8)

    @pytest.mark.parametrize("options", [
        {"max_length": 20}, {"max_new_tokens": 9}, {"max_length": 30, "max_new_tokens": 9},
        {"max_length": 12, "min_length": 9}, {},
    ], ids=["total", "new", "both", "least", "default"])  # fmt: skip
    def test_lengths_are_those_of_the_ids(self, options):
        """A total counts the text and not the prompt: the base model's, whichever names there are."""
        batch, model = self.text("llama", "left"), accelerated("llama")
        want = model.get_base_model().generate(**batch, **options, do_sample=False).shape
        for names in (NAMES, [BASE] * 5, ["long"] * 5):
            assert model.generate(**batch, **options, do_sample=False, adapter_names=names).shape == want

    @pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
    @pytest.mark.parametrize("side", SIDES)
    @pytest.mark.parametrize("options", [
        {"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 2},
        {"encoder_repetition_penalty": 5.0}, {"encoder_no_repeat_ngram_size": 1}, {"encoder_no_repeat_ngram_size": 2},
        {"bad_words_ids": [[6], [50, 3]]}, {"guidance_scale": 1.5}, {"min_new_tokens": 12, "eos_token_id": [6, 93]},
    ], ids=lambda options: next(iter(options)))  # fmt: skip
    def test_options_count_a_rows_own_text(self, options, side, beams):
        """Neither its pads nor the prompt's slots, of which transformers sees the mask."""
        self.compare("llama", side, num_beams=beams, **options)

    def test_a_processor_of_ones_own_is_the_only_one_of_its_kind(self):
        """As in transformers, where it takes the option's place."""
        batch, model = self.text("llama", "left"), accelerated("llama")
        own = transformers.LogitsProcessorList([transformers.RepetitionPenaltyLogitsProcessor(1.5)])
        want = self.run(model, batch, adapter_names=NAMES, logits_processor=own)
        got = self.run(model, batch, adapter_names=NAMES, logits_processor=own, repetition_penalty=5.0)
        assert torch.equal(got, want) and len(own) == 1
        assert not torch.equal(got, self.run(model, batch, adapter_names=NAMES))

    @pytest.mark.parametrize("side", SIDES)
    def test_pads_without_a_mask(self, side):
        """transformers infers the mask from ids that hold pads, unless those end a text."""
        batch, model = self.text("llama", side), accelerated("llama")
        names = ["short", BASE, BASE, "long", BASE]
        run = lambda **kwargs: self.run(model, kwargs, adapter_names=names)  # noqa: E731
        want, ids = run(**batch), batch["input_ids"]
        assert torch.equal(run(input_ids=ids), want)
        all_text = run(input_ids=ids, attention_mask=torch.ones_like(ids))
        assert not torch.equal(all_text, want)
        for options in ({"eos_token_id": [95, 0]}, {"pad_token_id": 95}):
            masked = run(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            assert torch.equal(run(input_ids=ids, **options), masked)

    @pytest.mark.parametrize("side", SIDES)
    def test_a_dictionary_of_results(self, side):
        batch, model = self.text("llama", side), accelerated("llama")
        options = dict(num_beams=3, num_return_sequences=2, adapter_names=NAMES)
        out = self.run(model, batch, **options, return_dict_in_generate=True, output_scores=True)
        assert torch.equal(out.sequences, self.run(model, batch, **options)) and len(out.scores) == 16

    def test_a_generation_config_and_the_models_own(self):
        """What the first leaves open, the second may say."""
        batch, model = self.text("llama", "left"), accelerated("llama")
        base, given = model.get_base_model(), transformers.GenerationConfig(do_sample=False, repetition_penalty=5.0)
        base.generation_config.max_length = 11
        want = self.run(model, batch, max_new_tokens=4, repetition_penalty=5.0, adapter_names=NAMES)
        assert torch.equal(model.generate(**batch, generation_config=given, adapter_names=NAMES), want)
        assert (given.max_length, given.max_new_tokens, given.repetition_penalty) == (None, None, 5.0)

    def test_a_generation_config(self):
        batch, model = self.text("llama", "left"), accelerated("llama")
        config = copy.deepcopy(model.get_base_model().generation_config)
        config.max_length = 11
        assert model.generate(**batch, generation_config=config, adapter_names=NAMES).shape == (5, 11)
        assert config.max_length == 11

    def test_ids_alone(self):
        model, ids = accelerated("gpt2"), text([6] * 5)["input_ids"].to(DEVICE)
        want = self.run(model, {"input_ids": ids}, adapter_names=NAMES)
        for args, kwargs in (((ids,), {}), ((), {"inputs": ids})):
            got = model.generate(*args, **kwargs, max_new_tokens=16, do_sample=False, adapter_names=NAMES)
            assert torch.equal(got, want)


class TestRefused:
    @pytest.fixture(scope="class")
    def model(self):
        return accelerated("llama")

    @pytest.mark.parametrize("generate", [False, True], ids=["forward", "generate"])
    def test_what_an_encoder_made_without_the_prompts(self, generate):
        model, batch = accelerated("t5"), batch_of("t5", "right")
        made = model.get_base_model().encoder(batch.pop("input_ids"), attention_mask=batch["attention_mask"])
        if generate:
            batch.pop("decoder_input_ids")
            with pytest.raises(ValueError, match="with prompt adapters must not be given encoder_outputs"):
                model.generate(**batch, encoder_outputs=made, adapter_names=NAMES)
        else:
            with pytest.raises(ValueError, match="encoder_outputs cannot be given together with prompt .* must see"):
                model(**batch, encoder_outputs=made, adapter_names=NAMES)
            assert model(**batch, encoder_outputs=made, adapter_names=[BASE] * 5).logits.shape[:2] == (5, 4)

    @pytest.mark.parametrize("name", ["start_positions", "end_positions", "past_key_values"])
    def test_arguments_that_prompts_would_move(self, model, name):
        batch = batch_of("llama", "left") | {name: torch.zeros(5, device=DEVICE)}
        with pytest.raises(ValueError, match=f"adapter_names: {name} cannot be given together with prompt adapters"):
            model(**batch, adapter_names=NAMES)

    def test_no_text(self, model):
        with pytest.raises(ValueError, match="input_ids or inputs_embeds must be given with prompt adapters, got neit"):
            model(attention_mask=torch.ones(5, 3), adapter_names=NAMES)

    def test_generate_from_embeddings(self, model):
        with pytest.raises(ValueError, match="with prompt adapters must be given input_ids, not inputs_embeds"):
            model.generate(inputs_embeds=torch.zeros(5, 3, 64, device=DEVICE), adapter_names=NAMES)

    def test_generate_with_positional_arguments(self, model):
        batch = batch_of("llama", "left")
        with pytest.raises(TypeError, match="with prompt adapters takes keyword arguments"):
            model.generate(batch["input_ids"], None, adapter_names=NAMES)

    @pytest.mark.parametrize(
        "name",
        ["past_key_values", "position_ids", "assistant_model", "prefill_chunk_size", "prompt_lookup_num_tokens",
         "token_healing"],
    )  # fmt: skip
    def test_what_generate_cannot_do_with_prompts(self, model, name):
        value = [None] if name == "past_key_values" else 1
        with pytest.raises(ValueError, match=f"with prompt adapters must not be given {name}"):
            model.generate(**batch_of("llama", "left"), adapter_names=NAMES, **{name: value})
        config = transformers.GenerationConfig()
        if hasattr(config, name):
            setattr(config, name, value)
            with pytest.raises(ValueError, match=f"with prompt adapters must not be given {name}"):
                model.generate(**batch_of("llama", "left"), adapter_names=NAMES, generation_config=config)

    def test_generate_into_an_empty_cache(self, model):
        batch, options = batch_of("llama", "left"), dict(max_new_tokens=4, do_sample=False, adapter_names=NAMES)
        cache = transformers.DynamicCache(config=model.get_base_model().config)
        assert torch.equal(
            model.generate(**batch, past_key_values=cache, **options), model.generate(**batch, **options)
        )
        with pytest.raises(ValueError, match="must not be given past_key_values"):
            model.generate(**batch, past_key_values=cache, **options)

    def test_labels_of_another_shape(self, model):
        batch = batch_of("llama", "left")
        with pytest.raises(ValueError, match=r"labels must have the text's shape \[5, 7\], got \[5, 3\]"):
            model(**batch, labels=batch["input_ids"][:, :3], adapter_names=NAMES)

    @pytest.mark.parametrize("generate", [False, True], ids=["forward", "generate"])
    @pytest.mark.parametrize("family", ["gpt2", "opt"])
    def test_more_positions_than_the_model_has(self, family, generate):
        model = accelerated(family)
        call = (lambda **batch: model.generate(**batch, max_new_tokens=1)) if generate else model
        batch = {key: value.to(DEVICE) for key, value in text([124, 120, 120, 126, 128], "left").items()}
        with pytest.raises(ValueError, match="prompt and text must fit 128 positions, got 131"):
            call(**batch, adapter_names=["short", BASE, "long", "long", "short"])
        if not generate:  # a base row may use all, and shorter texts leave room
            assert call(**batch, adapter_names=["short", BASE, "long", "short", BASE]).logits.isfinite().all()

    def test_position_ids_are_noticed(self, model):
        batch = batch_of("llama", "left")
        with pytest.warns(UserWarning, match="position_ids are ignored"):
            model(**batch, position_ids=batch["input_ids"], adapter_names=NAMES)

    @pytest.mark.parametrize("generate", [False, True], ids=["forward", "generate"])
    def test_images_whose_positions_come_from_ids(self, generate):
        model = accelerate(image_text_model("qwen2_vl", {"red": 3}))
        batch = batch_of("llama", "left")
        call = model.generate if generate else model
        assert call(**batch, adapter_names=["red", "__base__"] * 2 + ["red"]) is not None
        with pytest.raises(ValueError, match="image_grid_thw must not be given .* whose positions of images come from"):
            call(**batch, image_grid_thw=torch.ones(1, 3), adapter_names=["red"] * 5)

    def test_a_total_length_within_the_text(self, model):
        with pytest.raises(ValueError, match="max_length must exceed the 7 input ids, got 7"):
            model.generate(**batch_of("llama", "left"), max_length=7, adapter_names=NAMES)
