"""Template: texts to ids with virtual tokens in order, and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_ops import prompt_embed
from peft_ops.nn import MultitaskPromptEmbedding, PromptEmbedding, PromptEncoder, TaskBatch, Template, tasks
from tests.conftest import DEVICE, KERNELS

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


@pytest.mark.parametrize(
    "form",
    [
        "P0..P2 [MASK] P3..P5 {text} P6..P8",
        "P0 P1 P2 [MASK] P3 P4 P5 {text} P6 P7 P8",
        "P0..P1 <P> [MASK] <P*3>{text} P6 P7..P8",
    ],
)
def test_numbers_as_decode_writes_them(form, tokenizer):
    template = Template(form, tokenizer, V)
    ids = template.encode(text="great film")
    assert ids == Template("<P*3> [MASK] <P*3> {text} <P*3>", tokenizer, V).encode(text="great film")
    assert template.num_virtual_tokens == 9
    back = Template(template.decode(ids), tokenizer, V)
    assert back.encode() == ids and back.decode(ids) == template.decode(ids)


def test_a_number_may_repeat(tokenizer):
    template = Template("P1 {text} P0..P1", tokenizer, V)
    assert template.encode(text="film") == [V + 1, 6, V, V + 1] and template.num_virtual_tokens == 2


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


some_texts = st.lists(st.sampled_from(WORDS[4:]), max_size=6).map(" ".join)
some_pieces = st.lists(
    st.sampled_from(["<P>", "<P*2>", "[MASK]", "[CLS]", "[SEP]", "{a}", "{b}", "it was", "."]), max_size=8
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(some_pieces, some_texts, some_texts, st.integers(0, 2))
def test_any_form_there_and_back(pieces, a, b, pads):
    """What comes back is the form, its virtual tokens numbered and its texts put in, whatever pads follow."""
    template, given, count, want = Template(" ".join(pieces), Tokenizer(), V), {"{a}": a, "{b}": b}, 0, []
    for piece in pieces:
        for _ in range({"<P>": 1, "<P*2>": 2}.get(piece, 0)):
            want.append(f"P{count}")
            count += 1
        want += given.get(piece, piece).split() if piece[0] != "<" else []
    ids = template.encode(**{piece[1]: given[piece] for piece in pieces if piece in given})
    assert (template.num_virtual_tokens, template.num_masks) == (count, pieces.count("[MASK]"))
    assert template.decode(ids + [0] * pads, [1] * len(ids) + [0] * pads) == " ".join(want)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(some_texts, some_texts, st.integers(0, 14), st.sampled_from(["right", "left"]))
def test_max_length_cuts_texts_alone(a, b, room, side):
    tokenizer = Tokenizer()
    tokenizer.truncation_side = side
    template = Template("[CLS] <P*2> {a} [MASK] {b} [SEP]", tokenizer, V, max_length=5 + room)
    ids, kept = template.encode(a=a, b=b), []
    assert len(ids) == 5 + min(len(a.split()) + len(b.split()), room)
    assert [ids[:3], ids[-1:]] == [[2, V, V + 1], [3]]
    at = ids.index(1)
    for part, text in ((ids[3:at], a), (ids[at + 1 : -1], b)):
        words = text.split()
        assert tokenizer.decode(part).split() == (
            words[len(words) - len(part) :] if side == "left" else words[: len(part)]
        )
        kept.append((len(part), len(words) - len(part)))
    assert all(length >= max(kept)[0] - 1 for length, lost in kept if lost), "no text is cut below a longer one"


def test_a_text_given_twice_fits_too(tokenizer):
    template = Template("{a}[MASK]{b}{a}", tokenizer, V, max_length=6)
    assert template.decode(template.encode(a="great bad film", b="it")) == "great bad [MASK] it great bad"
    assert len(template.encode(a="great bad film", b="it was it")) <= 6


@pytest.mark.parametrize("side", ["right", "left"])
def test_mask_positions_read_the_logits(side, tokenizer):
    template = Template("<P> {a} [MASK] {b} [MASK]", tokenizer, V)
    ids = template(a=["film", "", "great bad film"], b=["it", "was bad", ""], padding_side=side)["input_ids"]
    positions = template.mask_positions(ids)
    assert positions.shape == (3, template.num_masks) and positions.dtype == torch.int64
    assert positions.tolist() == [[p for p, i in enumerate(row) if i == 1] for row in ids.tolist()]
    assert torch.equal(template.mask_positions(ids.int()), positions)
    read = torch.nn.functional.one_hot(ids, V + 1).take_along_dim(positions[..., None], 1)
    assert read.argmax(-1).unique().tolist() == [1]
    assert template.mask_positions(ids[:0]).shape == (0, 2)


def test_prompt_embedding_fills_the_form(tokenizer):
    """A mixed batch, its prompts by name: as prompt_embed with a table made by hand, gradients too."""
    template, prompts = Template("<P> {text} <P*2>", tokenizer, V), PromptEmbedding()
    for name in ("red", "blue"):
        prompts.add_adapter(name, PromptEncoder.lama(template.num_virtual_tokens, 4))
    prompts.to(DEVICE)
    template.check(prompts)
    embedding, ids = torch.randn(V, 4, device=DEVICE), template(text=["film", "bad it", "was"])["input_ids"].to(DEVICE)
    rows = ["blue", "red", "blue"]
    out = prompts.embed(ids, embedding, TaskBatch.of_rows(rows, DEVICE))
    table = torch.stack([prompts.prompt(name) for name in ("blue", "red")])
    assert torch.equal(out, prompt_embed(ids, embedding, table, torch.tensor([0, 1, 0], device=DEVICE)))
    doubled = prompts.embed(ids, embedding, TaskBatch.of_rows(rows, DEVICE), embed_scale=2.0)
    assert torch.equal(doubled, torch.where(ids[..., None] < V, 2 * out, out))
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in prompts.parameters())
    with tasks(rows, DEVICE), torch.no_grad():
        served = prompts.embed(ids, embedding)
        torch.testing.assert_close(served, out)  # without gradients an LSTM takes other kernels
        prompts.keep_table(["blue", "red"])
        assert torch.equal(prompts.embed(ids, embedding), served)
    prompts.eval().materialize()
    with torch.no_grad():
        assert torch.equal(prompts.embed(ids, embedding, TaskBatch.of_rows(rows, DEVICE)), served)
    words = ids.clamp(max=V - 1)  # a row of the base model has words alone
    assert torch.equal(prompts.embed(words, embedding), embedding[words])
    if KERNELS:
        assert prompts.embed(ids, embedding, TaskBatch.of_rows([None, "red", "blue"], DEVICE))[0, 0].isnan().all()
    else:
        with pytest.raises(IndexError, match=f"^prompt_embed: input_ids must be in .0, {V}.* got {V} at position 0$"):
            prompts.embed(ids, embedding, TaskBatch.of_rows([None, "red", "blue"]))
    with pytest.raises(TypeError, match="^PromptEmbedding: input_ids must be a tensor, got list$"):
        prompts.embed([[1]], embedding)


def test_check_compares_the_prompts_with_the_form(tokenizer):
    template, prompts = Template("<P>{text}<P*2>", tokenizer, V), PromptEmbedding()
    prompts.add_adapter("red", PromptEncoder(3, 4))
    prompts.add_adapter("blue", PromptEncoder(2, 4))
    prompts.materialize(["blue"])
    template.check(prompts, ["red"])
    template.check(MultitaskPromptEmbedding(["red"], 3, 4))
    text = "^Template.check: prompts must have 3 virtual tokens, as '<P>{text}<P.2>' has, got 2 for 'blue'$"
    for names in (None, ["red", "blue"]):
        with pytest.raises(ValueError, match=text):
            template.check(prompts, names)
    with pytest.raises(ValueError, match="got 4 for 'red'$"):
        template.check(MultitaskPromptEmbedding(["red"], 4, 4))
    with pytest.raises(ValueError, match="^Template.check: adapter must be one of .'red', 'blue'., got 'green'$"):
        template.check(prompts, ["green"])
    with pytest.raises(TypeError, match="^Template.check: prompts must be a module of prompts, got PromptEncoder$"):
        template.check(PromptEncoder(3, 4))


def test_bad_input(tokenizer):
    template = Template("<P>{text}", tokenizer, V)
    with pytest.raises(ValueError, match=r"^Template: texts must be given for \['text'\], got \['words'\]$"):
        template.encode(words="film")
    with pytest.raises(ValueError, match=r"^Template: form must use tokens that the tokenizer has, got \[BOS\]$"):
        Template("[BOS] {text}", tokenizer, V)
    with pytest.raises(ValueError, match="^Template: padding_side must be 'right' or 'left', got 'both'$"):
        template(text=["film"], padding_side="both")
    with pytest.raises(ValueError, match="^Template: texts must be lists of one length, got {'a': 1, 'b': 0}$"):
        Template("{a}{b}", tokenizer, V)(a=["film"], b=[])
    with pytest.raises(TypeError, match="^Template: the texts 'text' must be a list of str, got str$"):
        template(text="film")
    with pytest.raises(ValueError, match="form must name its texts otherwise than padding_side"):
        Template("{padding_side}", tokenizer, V)
    assert Template("{self}", tokenizer, V)(self=["film"])["input_ids"].tolist() == [[6]]
    with pytest.raises(ValueError, match=r"^Template: max_length must be at least 3, the ids of .* texts, got 2$"):
        Template("<P*2>{text}[MASK]", tokenizer, V, max_length=2)
    with pytest.raises(TypeError, match="^Template: max_length must be an int, got str$"):
        Template("{text}", tokenizer, V, max_length="8")
    with pytest.raises(ValueError, match="^Template: vocab_size must be above every id of the tokenizer, got 6 and 7$"):
        Template("<P>{text}", tokenizer, 6).encode(text="film it bad")
    with pytest.raises(ValueError, match="^Template: vocab_size must be above every id of the tokenizer, got 1 and 1$"):
        Template("[MASK]", tokenizer, 1)
    with pytest.raises(
        ValueError, match=r"^Template: texts must leave \[MASK\] to the form, got 'it \[MASK\]' for 'a'$"
    ):
        Template("{a}[MASK]", tokenizer, V).encode(a="it [MASK]")
    with pytest.raises(ValueError, match=r"^Template.mask_positions: form must hold \[MASK\], got '<P>{text}'$"):
        template.mask_positions(torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="^Template.mask_positions: input_ids must have 2 dim"):
        Template("[MASK]", tokenizer, V).mask_positions(torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(
    "form, wanted, got",
    [
        *(
            (form, "virtual tokens as <P>, <P.n>", "<")
            for form in ("<P*0> it", "<P * 3>", "it <P*> it", "< P>", "<P3>")
        ),
        ("<p*3>", "virtual tokens as <P>", "<p.3>"),
        ("P0..2 it", "virtual tokens as <P>", "P0..2"),
        ("it P0-P2", "virtual tokens as <P>", "P0-P2"),
        ("P0...P2", "virtual tokens as <P>", "P0...P2"),
        ("P2..P0", "virtual tokens in ascending order", "P2..P0"),
        ("P0 ..P2 it", "virtual tokens as <P>", "..P2"),
        ("P0 P1, it", "virtual tokens as <P>", "P1,"),
        ("it (P0)", "virtual tokens as <P>", ".P0."),
        ("P0..P1000000000", "at most 65536 virtual tokens", "P0..P1000000000"),
        ("<P*1000000000>", "at most 65536 virtual tokens", "<P.1000000000>"),
        ("P0 it P2", "P0 to P2", "P0 it P2' without P1"),
        ("[mask]", r"special tokens as \[MASK\]", r"\[mask\]"),
        ("[PAD] it", r"special tokens as \[MASK\]", r"\[PAD\]"),
        ("{my text}", "texts as {name}", "{my text}"),
        ("it {}", "texts as {name}", "{}"),
        ("{text", "texts as {name}", "{text"),
        ("text}", "texts as {name}", "}"),
    ],
)
def test_what_only_looks_like_a_piece(form, wanted, got, tokenizer):
    with pytest.raises(ValueError, match=f"Template: form must hold {wanted}.*, got '{got}"):
        Template(form, tokenizer, vocab_size=40)


def test_bad_types(tokenizer):
    for args, what in (
        ((3, tokenizer, 40), "form must be a str, got int"),
        (("<P>", None, 40), "tokenizer must encode and decode, got NoneType"),
        (("<P>", tokenizer, "40"), "vocab_size must be .*got"),
    ):
        with pytest.raises(TypeError, match=f"Template: {what}"):
            Template(*args)
    with pytest.raises(TypeError, match="Template: the text 'text' must be a str, got list"):
        Template("<P> {text}", tokenizer, vocab_size=40).encode(text=["a"])
