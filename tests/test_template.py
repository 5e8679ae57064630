"""Template: texts to ids with virtual tokens in order, and back."""

import pytest
import torch

from peft_ops import prompt_embed
from peft_ops.nn import Template

V = 12
WORDS = ["[PAD]", "[MASK]", "[CLS]", "[SEP]", "great", "bad", "film", "it", "was", "."]


class Tokenizer:
    """Words at spaces."""

    pad_token_id, mask_token_id, cls_token_id, sep_token_id, bos_token_id = 0, 1, 2, 3, None

    def encode(self, text, add_special_tokens=True):
        ids = [WORDS.index(word) for word in text.split()]
        return [2, *ids, 3] if add_special_tokens else ids

    def decode(self, ids):
        return " ".join(WORDS[i] for i in ids)


def huggingface():
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[PAD]")
    plain = tokenizers.Tokenizer(model)
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    plain.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", mask_token="[MASK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture(params=[Tokenizer, huggingface])
def tokenizer(request):
    return request.param()


def test_the_papers_template_there_and_back(tokenizer):
    template = Template("<P*3> [MASK] <P*3> {text} <P*3>", tokenizer, V)
    assert template.num_virtual_tokens == 9 and "num_virtual_tokens=9" in repr(template)
    ids = template.encode(text="great film")
    assert ids == [V, V + 1, V + 2, 1, V + 3, V + 4, V + 5, 4, 6, V + 6, V + 7, V + 8]
    assert template.decode(ids) == "P0 P1 P2 [MASK] P3 P4 P5 great film P6 P7 P8"


def test_words_and_several_texts(tokenizer):
    template = Template("[CLS]<P>{a} it was [MASK] . <P*2>{b}[SEP]", tokenizer, V)
    ids = template.encode(a="film", b="bad film")
    assert ids == [2, V, 6, 7, 8, 1, 9, V + 1, V + 2, 5, 6, 3]
    assert template.decode(torch.tensor(ids)) == "[CLS] P0 film it was [MASK] . P1 P2 bad film [SEP]"
    assert template.encode(a="", b="") == [2, V, 7, 8, 1, 9, V + 1, V + 2, 3]
    assert template.decode(template.encode(a="it", b="was")[:3]) == "[CLS] P0 it"


@pytest.mark.parametrize("side", ["right", "left"])
def test_batch_is_padded(side, tokenizer):
    template, texts = Template("<P*2>{text}[MASK]", tokenizer, V), ["great film", "bad", ""]
    batch = template(text=texts, padding_side=side)
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert batch["attention_mask"].sum(1).tolist() == [5, 4, 3]
    row = [V, V + 1, 5, 1]
    assert batch["input_ids"][1].tolist() == ([0, *row] if side == "left" else [*row, 0])
    for b, text in enumerate(texts):
        assert template.decode(batch["input_ids"][b], batch["attention_mask"][b]) == f"P0 P1 {text} [MASK]".replace(
            "  ", " "
        )
    assert template(text=[], padding_side=side)["input_ids"].shape == (0, 0)


def test_feeds_prompt_embed(tokenizer):
    template = Template("<P*1> {text} <P*2>", tokenizer, V)
    embedding, prompts = torch.randn(V, 4), torch.randn(2, template.num_virtual_tokens, 4)
    ids = template(text=["film", "bad"])["input_ids"]
    out = prompt_embed(ids, embedding, prompts, torch.tensor([1, 0]))
    assert torch.equal(out[0], torch.stack([prompts[1, 0], embedding[6], prompts[1, 1], prompts[1, 2]]))
    assert torch.equal(out[1], torch.stack([prompts[0, 0], embedding[5], prompts[0, 1], prompts[0, 2]]))


def test_bad_input(tokenizer):
    template = Template("<P>{text}", tokenizer, V)
    with pytest.raises(ValueError, match=r"^Template: texts must be given for \['text'\], got \['words'\]$"):
        template.encode(words="film")
    with pytest.raises(ValueError, match=r"^Template: form must use tokens that the tokenizer has, got \[BOS\]$"):
        Template("[BOS] {text}", tokenizer, V)
    with pytest.raises(ValueError, match="^Template: padding_side must be 'right' or 'left', got 'both'$"):
        template(text=["film"], padding_side="both")
    with pytest.raises(ValueError, match="zip"):
        Template("{a}{b}", tokenizer, V)(a=["film"], b=[])
