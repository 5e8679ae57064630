"""What prompt_concat and prompt_embed add in their pass: scale, positions, token types; against loops and models."""

import re

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

import peft_ops
from peft_ops import prompt_concat, prompt_embed, reference
from peft_ops.ops import prompt_concat as concat_module
from peft_ops.ops import prompt_embed as embed_module
from tests import test_prompt_concat as concat_loop
from tests import test_prompt_embed as embed_loop
from tests.conftest import (
    DEVICE,
    DTYPES,
    INTERPRET,
    KERNELS,
    assert_as_good_as_torch,
    assert_guards,
    assert_same,
    guarded,
    launches,
    name_of,
)

pytestmark = pytest.mark.kernels

NAN = float("nan")
OPS = ["prompt_concat", "prompt_embed"]
MAX_POSITIONS, NUM_TYPES, V = 24, 3, concat_loop.V
each_op = pytest.mark.parametrize("op", OPS)


def tensor(values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def make(op, B=6, S=7, P=4, E=8, dtype=torch.float32, prompts_dtype=None):
    """The arguments of `op`, of which the fourth are the task ids."""
    if op == "prompt_embed":
        return embed_loop.make(B, S, P, E, dtype, prompts_dtype=prompts_dtype)
    tensors = concat_loop.make(B, S, P, E, dtype, prompts_dtype=prompts_dtype)
    return *tensors, concat_loop.ids_like("uniform", B, 3)


def tables(E=8, dtype=torch.float32):
    """Position and type embeddings, the shapes of their models far apart."""
    return dict(
        position_embedding=torch.randn(MAX_POSITIONS, E, device=DEVICE).to(dtype),
        token_type_embedding=torch.randn(NUM_TYPES, E, device=DEVICE).to(dtype),
    )


def slot_ids(op, B=6, S=7, ids_dtype=torch.int64):
    """The ids that `op` takes beside its tables: in any order, every type."""
    ids = dict(token_type_ids=torch.randint(NUM_TYPES, (B, S), device=DEVICE).to(ids_dtype))
    if op == "prompt_embed":
        ids["position_ids"] = torch.randint(MAX_POSITIONS - 2, (B, S), device=DEVICE).to(ids_dtype)
    return ids


def call(op, *args, f=None, **kwargs):
    """The embeddings of either operator."""
    f = f or {"prompt_concat": prompt_concat, "prompt_embed": prompt_embed}[op]
    out = f(*args, **kwargs)
    return out if op == "prompt_embed" else out.inputs_embeds


def expected(
    op, ids, embedding, prompts, task_ids, *, embed_scale=1.0, position_embedding=None, position_offset=0,
    position_ids=None, token_type_embedding=None, token_type_ids=None, inputs_embeds=None, **kwargs,
):  # fmt: skip
    """(e + type) + position one slot at a time in fp32, rounded in the end; and where a bad id left NaN."""
    dtype = (embedding if inputs_embeds is None else inputs_embeds).dtype
    scale = torch.tensor(embed_scale).to(dtype).float()
    table = None if embedding is None else embedding.float() * scale.to(DEVICE)
    if op == "prompt_embed":
        out, _ = embed_loop.expected(ids, table, prompts.float(), task_ids, **kwargs)
        types, positions = token_type_ids, position_ids
    else:
        embeds = None if inputs_embeds is None else inputs_embeds.float()
        batch, _ = concat_loop.expected(ids, table, prompts.float(), task_ids, inputs_embeds=embeds, **kwargs)
        out, positions = batch.inputs_embeds, batch.position_ids
        types = torch.zeros_like(positions)
        for b, r in (batch.token_map >= 0).nonzero().tolist():
            types[b, r] = 0 if token_type_ids is None else token_type_ids[b, batch.token_map[b, r]]
    for b in range(out.shape[0]):
        for r in range(out.shape[1]):
            if token_type_embedding is not None:
                t = 0 if types is None else int(types[b, r])
                out[b, r] += token_type_embedding[t].float() if 0 <= t < len(token_type_embedding) else NAN
            if position_embedding is not None:
                p = (r if positions is None else int(positions[b, r])) + position_offset
                out[b, r] += position_embedding[p].float() if 0 <= p < len(position_embedding) else NAN
    return out.to(dtype)


def check(op, *args, **kwargs):
    got = call(op, *args, **kwargs)
    with torch.no_grad():
        assert_same(got, expected(op, *args, **kwargs))
    assert got.is_contiguous()
    return got


# a power of two: its products are exact, so that a GPU's fused multiply-add rounds as the loop does
EVERYTHING = dict(embed_scale=4.0, position_offset=2)
WHICH = {
    "scale": dict(embed_scale=4.0),
    "positions": dict(names=["position_embedding", "position_ids"]),
    "positions_offset": dict(names=["position_embedding", "position_ids"], position_offset=2),
    "counted": dict(names=["position_embedding"], position_offset=1),
    "types": dict(names=["token_type_embedding", "token_type_ids"]),
    "type_0": dict(names=["token_type_embedding"]),
    "everything": dict(names=["position_embedding", "position_ids", "token_type_embedding", "token_type_ids"])
    | EVERYTHING,
}


def chosen(op, which, E=8, dtype=torch.float32, ids_dtype=torch.int64):
    scalars = dict(WHICH[which])
    names = scalars.pop("names", [])
    return scalars | {k: v for k, v in (tables(E, dtype) | slot_ids(op, ids_dtype=ids_dtype)).items() if k in names}


@each_op
@pytest.mark.parametrize("which", WHICH)
def test_each_by_the_loop(op, which, dtype):
    for ids_dtype in (torch.int32, torch.int64):
        kwargs = chosen(op, which, dtype=dtype, ids_dtype=ids_dtype)
        check(op, *make(op, dtype=dtype, prompts_dtype=torch.float32), **kwargs)
    check(op, *make(op, E=1100, dtype=dtype), **chosen(op, which, 1100, dtype))


@each_op
@pytest.mark.parametrize("table_dtype", DTYPES, ids=lambda d: f"tables_{name_of(d)}")
def test_tables_of_another_dtype(op, table_dtype, dtype):
    check(op, *make(op, dtype=dtype, prompts_dtype=torch.float16), **chosen(op, "everything", dtype=table_dtype))


@pytest.mark.parametrize("side", concat_loop.SIDES)
@pytest.mark.parametrize("after_bos", [False, True], ids=["first", "after_bos"])
def test_concat_follows_mask_and_lengths(side, after_bos, dtype):
    """Positions and types go with the slots, wherever pads, spare slots and prompts put them."""
    kwargs = chosen("prompt_concat", "everything", dtype=dtype) | dict(padding_side=side, after_bos=after_bos)
    kwargs |= dict(attention_mask=concat_loop.masks(7), prompt_lengths=tensor([4, 0, 2]))
    for roll in range(3):
        ids, embedding, prompts, _ = make("prompt_concat", dtype=dtype)
        check("prompt_concat", ids, embedding, prompts, tensor(concat_loop.IDS).roll(roll), **kwargs)
    embeds = embedding[ids]
    check("prompt_concat", None, None, prompts, tensor(concat_loop.IDS), inputs_embeds=embeds, **kwargs)


def test_the_type_of_prompts_and_pads_is_0():
    """As PEFT extends token_type_ids; what stands at pads is not read."""
    ids, embedding, prompts, _ = make("prompt_concat", 2, 3, 2)
    types, mask = tensor([[1, 2, 99], [2, -7, 99]]), tensor([[1, 1, 0], [1, 0, 0]])
    embedding, prompts = torch.zeros_like(embedding), torch.zeros_like(prompts)
    table = torch.arange(3.0, device=DEVICE)[:, None].expand(3, 8)
    kwargs = dict(attention_mask=mask, token_type_embedding=table, token_type_ids=types)
    got = prompt_concat(ids, embedding, prompts, tensor([0, 1]), **kwargs).inputs_embeds
    assert got[..., 0].tolist() == [[0, 0, 1, 2, 0], [0, 0, 2, 0, 0]]


@each_op
def test_nothing_is_added_where_nothing_is_asked(op, dtype):
    """The plain copy, to the bit, whatever the other arguments' defaults are; and its kernel is the plain one."""
    args, module = make(op, dtype=dtype), {"prompt_concat": concat_module, "prompt_embed": embed_module}[op]
    plain = call(op, *args)
    assert torch.equal(call(op, *args, embed_scale=1), plain)
    if not KERNELS:
        return
    for kwargs in (dict(), dict(embed_scale=1.0), dict(embed_scale=2.0), tables(dtype=dtype)):
        with launches(module.kernels) as seen:
            call(op, *args, **kwargs)
        (flags,) = [k for name, k in seen if name == f"{op}_kernel"]
        assert flags["ADJUSTS"] == (len(kwargs) > 1 or kwargs.get("embed_scale", 1.0) != 1.0)


def gemma(embedding, scale):
    from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding

    module = GemmaTextScaledWordEmbedding(*embedding.shape, None, scale).to(embedding.dtype).to(DEVICE)
    module.weight.data.copy_(embedding)
    return module


@each_op
@pytest.mark.parametrize("width", [8, 48, 1152])
def test_scales_as_gemma_does(op, width, dtype):
    """Bit by bit, gradient included; 1152 ** 0.5 = 33.94 is 34 in bf16. Prompts and inputs_embeds stay as they are."""
    pytest.importorskip("transformers")
    if INTERPRET and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates to bf16")
    ids, embedding, prompts, task_ids = make(op, E=width, dtype=dtype)
    task_ids = task_ids.clamp(min=0)
    scale = width**0.5
    module = gemma(embedding, scale)
    leaf = embedding.clone().requires_grad_()
    got = call(op, ids % V, leaf, prompts, task_ids, embed_scale=scale)
    want = module(ids % V)
    text = got[:, -7:]
    assert torch.equal(text, want) and torch.equal(got[:, :-7], prompts[task_ids][:, : got.shape[1] - 7])
    dout = torch.randn_like(want)
    assert torch.equal(torch.autograd.grad(text, leaf, dout)[0], torch.autograd.grad(want, module.weight, dout)[0])
    if op == "prompt_embed":
        virtual = call(op, ids * 0 + V, embedding, prompts, task_ids, embed_scale=scale)
        assert torch.equal(virtual, prompts[task_ids, :1].expand_as(virtual))
    else:
        given = call(op, None, None, prompts, task_ids, inputs_embeds=embedding[ids % V], embed_scale=scale)
        assert torch.equal(given[:, -7:], embedding[ids % V])


@each_op
def test_scale_with_the_rest(op, dtype):
    """Any scale, with positions and types: no worse than the same sum in torch."""
    args, kwargs = make(op, E=200, dtype=dtype), chosen(op, "everything", 200, dtype) | dict(embed_scale=200**0.5)
    scale = float(torch.tensor(200**0.5).to(dtype))
    doubles = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}
    doubles["embed_scale"] = scale
    reference_of = getattr(reference, op)
    same = call(op, *args, f=reference_of, **kwargs)
    fp64 = call(op, args[0], args[1].double(), args[2].double(), args[3], f=reference_of, **doubles)
    assert_as_good_as_torch(call(op, *args, **kwargs), same, fp64, elementwise=True)


@pytest.fixture(scope="module")
def bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8,
        max_position_embeddings=MAX_POSITIONS, type_vocab_size=NUM_TYPES,
    )  # fmt: skip
    return transformers.BertModel(config).embeddings.eval().to(DEVICE).requires_grad_(False)


def summed(embeddings, **kwargs):
    """What an embedding module of transformers hands to its LayerNorm."""
    seen = []
    hook = embeddings.LayerNorm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    embeddings(**kwargs)
    hook.remove()
    return seen[0]


def tables_of(embeddings):
    return dict(
        position_embedding=embeddings.position_embeddings.weight,
        token_type_embedding=embeddings.token_type_embeddings.weight,
    )


def test_equals_bert(bert):
    """PEFT's way in fp32: cat((prompts, e)), token types extended by zeros."""
    ids, _, prompts, _ = make("prompt_concat", 4, 9, 3, 16)
    types, table = torch.randint(NUM_TYPES, (4, 9), device=DEVICE), bert.word_embeddings.weight
    got = prompt_concat(ids, table, prompts[0], token_type_ids=types, **tables_of(bert)).inputs_embeds
    embeds = torch.cat([prompts[:1].expand(4, -1, -1), table[ids]], 1)
    types = torch.cat([types.new_zeros(4, 3), types], 1)
    want = summed(bert, inputs_embeds=embeds, token_type_ids=types)
    assert torch.equal(got, want)
    virtual = torch.cat([V + torch.arange(3, device=DEVICE).expand(4, -1), ids], 1)
    assert torch.equal(prompt_embed(virtual, table, prompts[0], token_type_ids=types, **tables_of(bert)), want)
    positions = torch.randint(MAX_POSITIONS, (4, 9), device=DEVICE)
    got = prompt_embed(ids, table, prompts[0], position_ids=positions, **tables_of(bert))
    assert torch.equal(got, summed(bert, input_ids=ids, position_ids=positions))


@pytest.mark.parametrize("side", concat_loop.SIDES)
def test_equals_roberta_with_its_offset(side):
    """RoBERTa counts from padding_idx + 1 = 2, here over what the mask attends to."""
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(
        vocab_size=V, hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8,
        max_position_embeddings=MAX_POSITIONS, type_vocab_size=1, pad_token_id=1,
    )  # fmt: skip
    roberta = transformers.RobertaModel(config).embeddings.eval().to(DEVICE).requires_grad_(False)
    ids, mask = torch.randint(2, V, (3, 8), device=DEVICE), torch.ones(3, 8, dtype=torch.int64, device=DEVICE)
    for b, pads in enumerate((0, 3, 5)):
        mask[b, slice(0, pads) if side == "left" else slice(8 - pads, 8)] = 0
    ids = torch.where(mask == 1, ids, 1)
    want, nobody = summed(roberta, input_ids=ids), tensor([-1, -1, -1])
    kwargs = dict(attention_mask=mask, padding_side=side, position_offset=2, **tables_of(roberta))
    got = prompt_concat(ids, roberta.word_embeddings.weight, want.new_zeros(1, 2, 16), nobody, **kwargs)
    text = got.token_map >= 0
    assert torch.equal(got.inputs_embeds[text], want[mask == 1])


def test_equals_gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=V, n_embd=16, n_layer=1, n_head=2, n_positions=MAX_POSITIONS)
    gpt2 = transformers.GPT2Model(config).eval().to(DEVICE).requires_grad_(False)
    ids, _, prompts, _ = make("prompt_concat", 4, 9, 3, 16)
    seen = []
    hook = gpt2.h[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    gpt2(inputs_embeds=torch.cat([prompts[:1].expand(4, -1, -1), gpt2.wte.weight[ids]], 1))
    hook.remove()
    got = prompt_concat(ids, gpt2.wte.weight, prompts[0], position_embedding=gpt2.wpe.weight).inputs_embeds
    assert torch.equal(got, seen[0])


def gradients(op, args, kwargs, dout, f=None):
    """Of embedding, prompts and both tables, in this order."""
    ids, embedding, prompts, task_ids = args
    added = dict(kwargs)
    names = [name for name in ("position_embedding", "token_type_embedding") if name in added]
    leaves = [t.detach().clone().requires_grad_() for t in (embedding, prompts, *(added[name] for name in names))]
    added |= dict(zip(names, leaves[2:], strict=True))
    out = call(op, ids, *leaves[:2], task_ids, f=f, **added)
    return torch.autograd.grad(out, leaves, dout.to(out.dtype))


@each_op
@pytest.mark.parametrize("which", ["scale", "counted", "type_0", "everything"])
def test_gradients(op, which, dtype):
    """By the fp64 rule; the prompts' are bitwise those of the plain operator, which dout alone decides."""
    args, kwargs = make(op, dtype=dtype), chosen(op, which, dtype=dtype)
    if op == "prompt_concat":
        kwargs |= dict(attention_mask=concat_loop.masks(7), prompt_lengths=tensor([4, 1, 2]), padding_side="left")
    dout, reference_of = torch.randn_like(call(op, *args, **kwargs)), getattr(reference, op)
    doubles = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}
    args_64 = args[0], args[1].double(), args[2].double(), args[3]
    got = gradients(op, args, kwargs, dout)
    same = gradients(op, args, kwargs, dout, reference_of)
    fp64 = gradients(op, args_64, doubles, dout, reference_of)
    for a, b, c in zip(got, same, fp64, strict=True):
        assert a.dtype == b.dtype and c.any()
        assert_as_good_as_torch(a, b, c)
    plain = {k: v for k, v in kwargs.items() if k in ("attention_mask", "prompt_lengths", "padding_side")}
    assert torch.equal(got[1], gradients(op, args, plain, dout)[1])
    for _ in range(3 if INTERPRET else 50):
        assert all(torch.equal(a, b) for a, b in zip(gradients(op, args, kwargs, dout), got, strict=True))


@each_op
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_tables_of_few_rows_get_sums_of_many(op, backend, dtype):
    """Two types share 2,048 slots: summed in 16 bits, the gradient would be off by a tenth. Once rounded it is."""
    B, S, E = 8, 256, 4
    ids = torch.randint(0, 9, (B, S), device=DEVICE)
    embedding, prompts, types = (torch.randn(n, E, dtype=dtype, device=DEVICE) for n in (9, 3, 2))
    types.requires_grad_()
    with peft_ops.set_backend(backend):
        out = call(op, ids, embedding, prompts, None, token_type_embedding=types)
    dout = torch.randn_like(out)
    got, want = torch.autograd.grad(out, types, dout)[0].double(), dout.double().sum((0, 1))
    torch.testing.assert_close(got[0], want, rtol=torch.finfo(dtype).eps, atol=1e-3)
    assert not got[1].any()


@each_op
def test_gradient_only_where_asked(op):
    """And what is kept for it: position ids, types and the map of tokens only where their table learns."""
    args, kwargs = make(op), chosen(op, "everything")
    dout = torch.randn_like(call(op, *args, **kwargs))
    every, (B, L) = gradients(op, args, kwargs, dout), dout.shape[:2]
    plain = 16 * B if op == "prompt_concat" else 4 * B * 7
    both = {"position_embedding": (2, 8 * B * L), "token_type_embedding": (3, 8 * B * 7 + 8 * B * L)}
    if op == "prompt_embed":
        both["token_type_embedding"] = 3, 8 * B * 7
    for name, (i, nbytes) in both.items():
        leaf, saved = kwargs[name].clone().requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            out = call(op, *args, **kwargs | {name: leaf})
        assert sum(t.numel() * t.element_size() for t in saved) == plain + nbytes
        assert torch.equal(torch.autograd.grad(out, leaf, dout)[0], every[i])


@each_op
def test_gradcheck_in_fp64(op):
    for which in ("everything", "counted"):
        ids, embedding, prompts, task_ids = make(op, E=3, dtype=torch.float64)
        kwargs = chosen(op, which, 3, torch.float64)
        names = [name for name in ("position_embedding", "token_type_embedding") if name in kwargs]
        leaves = [t.requires_grad_() for t in (embedding, prompts, *(kwargs[name] for name in names))]

        def f(e, p, *added, ids=ids, t=task_ids, kwargs=kwargs, names=names):
            return call(op, ids, e, p, t, **kwargs | dict(zip(names, added, strict=True)))

        assert torch.autograd.gradcheck(f, leaves, eps=1e-6, atol=1e-5)


@each_op
def test_fp64_anywhere_runs_in_fp64(op):
    args, kwargs = make(op, dtype=torch.bfloat16), chosen(op, "everything", dtype=torch.float64)
    got = call(op, *args, **kwargs)
    want = call(op, args[0], *(t.double() for t in args[1:3]), args[3], f=getattr(reference, op), **kwargs)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want.bfloat16())


def message(op, text):
    return "^" + re.escape(f"{op}: {text}") + "$"


BAD_SLOTS = [NUM_TYPES, -1, 2**31 - 1, -(2**31)]


@each_op
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("bad", BAD_SLOTS)
def test_bad_type(op, bad, ids_dtype, dtype):
    args, kwargs = make(op, dtype=dtype), chosen(op, "everything", dtype=dtype, ids_dtype=ids_dtype)
    table, buffer = guarded(NUM_TYPES, 8, dtype=dtype, fill=7)  # a read outside would look like a number
    kwargs["token_type_embedding"] = table.copy_(kwargs["token_type_embedding"])
    kwargs["token_type_ids"][1, 2] = bad
    if not KERNELS:
        text = message(op, f"token_type_ids must be in [0, 3), got {bad} at position 9")
        with pytest.raises(IndexError, match=text):
            call(op, *args, **kwargs)
        return
    nan = check(op, *args, **kwargs).isnan()
    assert nan.any(-1).sum() == 1 and nan[1].all(-1).sum() == 1
    assert (buffer[:256] == 7).all() and (buffer[-256:] == 7).all()


# position_offset: where the first bad position stands, and what it is, in rows of more slots than the table of 6 has
BAD_POSITIONS_AT = {0: (6, 6), 2: (4, 6), -1: (0, -1)}


@each_op
@pytest.mark.parametrize("offset", BAD_POSITIONS_AT)
@pytest.mark.parametrize("given", [False, True], ids=["counted", "given"])
def test_bad_position(op, offset, given, dtype):
    args, (table, buffer) = make(op, 3, 7, dtype=dtype), guarded(6, 8, dtype=dtype, fill=7)
    kwargs, (at, got) = dict(position_embedding=table.normal_(), position_offset=offset), BAD_POSITIONS_AT[offset]
    if given and op == "prompt_embed":
        kwargs["position_ids"] = torch.arange(7, device=DEVICE).expand(3, -1)
    elif op == "prompt_concat":
        args = *args[:3], tensor([0, 1, 2])
    if not KERNELS:
        arg = "position_ids" + (f" + {offset}" if offset else "")
        with pytest.raises(IndexError, match=message(op, f"{arg} must be in [0, 6), got {got} at position {at}")):
            call(op, *args, **kwargs)
        return
    nan = check(op, *args, **kwargs).isnan()
    outside = [not 0 <= p + offset < 6 for p in range(nan.shape[1])]
    assert torch.equal(nan.any(-1), nan.all(-1)) and nan.all(-1).tolist() == [outside] * 3
    assert (buffer[:256] == 7).all() and (buffer[-256:] == 7).all()


@pytest.mark.skipif(not KERNELS, reason="on a CPU a position that no table holds raises")
def test_positions_beyond_32_bits():
    args = make("prompt_embed", 1, 4)
    table, positions = torch.randn(6, 8, device=DEVICE), tensor([[2**32, -(2**63), 5, 2**62]])
    kwargs = dict(position_embedding=table, position_ids=positions)
    assert check("prompt_embed", *args, **kwargs).isnan().any(-1).tolist() == [[True, True, False, True]]


@each_op
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_sequences_send_no_gradient_to_the_tables(op, backend):
    """What is NaN for its task or its token: the tables, which all share, learn nothing from it."""
    if backend == "auto" and not KERNELS:
        pytest.skip("on a CPU a bad id raises before a gradient exists")
    ids, embedding, prompts, task_ids = make(op, 4)
    task_ids[1] = 7
    kwargs = {k: v[:4] if k.endswith("_ids") else v for k, v in chosen(op, "everything").items()}
    with peft_ops.set_backend(backend):
        out = call(op, ids, embedding, prompts, task_ids, **kwargs)
        assert out[1].isnan().all() and out[[0, 2, 3]].isfinite().all()
        dout = torch.where(out.isnan(), NAN, torch.randn_like(out))
        got = gradients(op, (ids, embedding, prompts, task_ids), kwargs, dout)
    keep = [0, 2, 3]
    part = {k: v[keep] if k.endswith("_ids") else v for k, v in kwargs.items()}
    want = gradients(op, (ids[keep], embedding, prompts, task_ids[keep]), part, dout[keep])
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@each_op
def test_guards_stay_intact(op):
    """Random shapes between guards: nothing is read outside the tables (NaN), nor written."""
    generator = torch.Generator().manual_seed(2)
    for trial in range(6 if INTERPRET else 100):
        B, S, P, E = (int(torch.randint(1, n, (1,), generator=generator)) for n in (7, 12, 8, 90))
        dtype = DTYPES[trial % 3]
        ids, embedding, prompts, task_ids = make(op, B, S, P, E, dtype)
        (positions, p_buffer), (types, t_buffer) = guarded(P + S, E, dtype=dtype), guarded(2, E, dtype=dtype)
        added = dict(position_embedding=positions.normal_(), token_type_embedding=types.normal_())
        added["token_type_ids"] = torch.randint(2, (B, S), device=DEVICE)
        out = call(op, ids, embedding, prompts, task_ids, embed_scale=2.0, **added)
        assert out.isfinite().all(), "read outside a table"
        grads = gradients(op, (ids, embedding, prompts, task_ids), added, torch.randn_like(out))
        assert all(g.isfinite().all() for g in grads)
        assert_guards(p_buffer), assert_guards(t_buffer)


@each_op
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("sizes", [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8), (2, 3, 2, 0), (0, 0, 0, 0)], ids=str)
def test_zero_sizes(op, sizes, backend, dtype):
    B, S, P, E = sizes
    args, kwargs = make(op, B, S, P, E, dtype), tables(E, dtype) | slot_ids(op, B, S) | EVERYTHING
    with peft_ops.set_backend(backend):
        got = check(op, *args, **kwargs)
        if backend == "auto":
            grads = gradients(op, args, kwargs, torch.ones_like(got))
            assert [g.shape for g in grads[2:]] == [(MAX_POSITIONS, E), (NUM_TYPES, E)]
            assert got.numel() or not any(g.any() for g in grads)


@each_op
def test_nan_stays_in_its_own_row(op, dtype):
    """Rows of the tables that no slot has do not reach the output."""
    args, kwargs = make(op, dtype=dtype), tables(dtype=dtype)
    kwargs["position_embedding"][11:], kwargs["token_type_embedding"][1:] = NAN, NAN
    assert check(op, *args, **kwargs).isfinite().all()


STRIDED = concat_loop.STRIDED


@each_op
@pytest.mark.parametrize("layout", STRIDED)
def test_strides(op, layout, dtype):
    args, kwargs = make(op, dtype=dtype), chosen(op, "everything", dtype=dtype)
    kwargs = {k: STRIDED[layout](v) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    check(op, *args, **kwargs)


@settings(max_examples=10 if INTERPRET else 60, deadline=None, derandomize=True)
@given(
    st.sampled_from(OPS), st.sampled_from(list(WHICH)),
    st.tuples(st.integers(1, 6), st.integers(0, 8), st.integers(0, 6), st.integers(1, 40)),
    st.tuples(*[st.sampled_from(DTYPES)] * 3), st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_anything_against_the_loop(op, which, sizes, dtypes, after_bos, seed):
    torch.manual_seed(seed)
    (B, S, P, E), (dtype, prompts_dtype, table_dtype) = sizes, dtypes
    names = WHICH[which].get("names", [])
    kwargs = {k: v for k, v in (tables(E, table_dtype) | slot_ids(op, B, S)).items() if k in names}
    kwargs |= {k: v for k, v in WHICH[which].items() if k != "names"}
    if op == "prompt_concat":
        kwargs |= dict(attention_mask=torch.randint(2, (B, S), device=DEVICE), after_bos=after_bos)
    check(op, *make(op, B, S, P, E, dtype, prompts_dtype), **kwargs)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("with_ids", [False, True], ids=["counted", "ids"])
def test_opcheck_of_prompt_embed(with_ids, grad):
    ids, embedding, prompts, task_ids = make("prompt_embed")
    floats = [t.requires_grad_(grad) for t in (embedding, prompts, *tables().values())]
    slots = slot_ids("prompt_embed") if with_ids else dict(position_ids=None, token_type_ids=None)
    args = ids, *floats, task_ids, None, slots["position_ids"], slots["token_type_ids"], 2, 1.5
    torch.library.opcheck(torch.ops.peft_ops.prompt_embed, args)


@each_op
def test_compiles_with_dynamic_shapes(op):
    def loss(ids, embedding, prompts, task_ids, positions, types, type_ids):
        kwargs = dict(position_embedding=positions, token_type_embedding=types, token_type_ids=type_ids)
        extra = dict(after_bos=True, max_position_embeddings=40) if op == "prompt_concat" else {}
        out = call(op, ids, embedding, prompts, task_ids, embed_scale=8**0.5, position_offset=2, **kwargs, **extra)
        return out.square().sum()

    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=frames, fullgraph=True, dynamic=True)
    for B, S in ((2, 5), (3, 5), (5, 9), (8, 4), (4, 13)):
        ids, embedding, prompts, task_ids = make(op, B, S)
        floats = [t.requires_grad_() for t in (embedding, prompts, *tables().values())]
        args = ids, *floats[:2], task_ids, *floats[2:], slot_ids(op, B, S)["token_type_ids"]
        want, got = loss(*args), compiled(*args)
        assert torch.allclose(got, want)
        for a, b in zip(torch.autograd.grad(got, floats), torch.autograd.grad(want, floats), strict=True):
            assert torch.allclose(a, b, rtol=1e-5)
    assert frames.frame_count <= 2


@each_op
def test_exports_and_loads(op, tmp_path):
    class Embedded(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.prompts = (torch.nn.Parameter(torch.randn(s)) for s in ((V, 8), (3, 4, 8)))
            self.positions, self.types = (torch.nn.Parameter(torch.randn(n, 8)) for n in (40, NUM_TYPES))

        def forward(self, ids, task_ids, types):
            kwargs = dict(position_embedding=self.positions, position_offset=2, token_type_embedding=self.types)
            return call(
                op, ids, self.embedding, self.prompts, task_ids, embed_scale=3.0, token_type_ids=types, **kwargs
            )

    embedded = Embedded().to(DEVICE)
    batch, sequence = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("sequence", min=2, max=32)
    dynamic = {"ids": {0: batch, 1: sequence}, "task_ids": {0: batch}, "types": {0: batch, 1: sequence}}
    example = make(op, 4, 5)[0], tensor([0, 1, 2, 0]), slot_ids(op, 4, 5)["token_type_ids"]
    program = torch.export.export(embedded, example, dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "embedded.pt2")
    ids, _, _, task_ids = make(op, 7, 12)
    args = ids, task_ids, slot_ids(op, 7, 12)["token_type_ids"]
    assert torch.equal(torch.export.load(tmp_path / "embedded.pt2").module()(*args), embedded(*args))


@each_op
def test_functorch_goes_through_the_reference(op):
    ids, embedding, prompts, task_ids = make(op)
    kwargs = chosen(op, "everything")
    weight = torch.randn_like(call(op, ids, embedding, prompts, task_ids, **kwargs))

    def loss(t):
        return (call(op, ids, embedding, prompts, task_ids, **kwargs | dict(position_embedding=t)) * weight).sum()

    want = torch.autograd.grad(loss(t := kwargs["position_embedding"].clone().requires_grad_()), t)[0]
    assert torch.allclose(torch.func.grad(loss)(kwargs["position_embedding"]), want, atol=1e-6)
    with pytest.raises(RuntimeError, match=f"{op}: double backward is not supported"):
        torch.autograd.grad(loss(t) ** 2, t, create_graph=True)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_max_position_embeddings(backend):
    from torch._subclasses import FakeTensorMode

    ids, embedding, prompts, task_ids = args = make("prompt_concat", 2, 7, 4)
    with pytest.raises(
        ValueError, match=message("prompt_embed", "max_position_embeddings must be at least S = 7, got 6")
    ):
        prompt_embed(*args, max_position_embeddings=6)
    with pytest.raises(TypeError, match=message("prompt_concat", "max_position_embeddings must be an int, got str")):
        prompt_concat(*args, max_position_embeddings="11")
    text = message("prompt_concat", "max_position_embeddings must be at least P + S = 4 + 7, got 10")
    with peft_ops.set_backend(backend):
        prompt_concat(*args, max_position_embeddings=11)
        with pytest.raises(ValueError, match=text):
            prompt_concat(*args, max_position_embeddings=10)
        with pytest.raises(ValueError, match=text):
            prompt_concat(None, None, prompts, task_ids, inputs_embeds=embedding[ids], max_position_embeddings=10)
        with FakeTensorMode() as mode, pytest.raises(ValueError, match=text):
            prompt_concat(*(mode.from_tensor(t) for t in args), max_position_embeddings=10)


IDS, TABLE = torch.zeros(4, 3, dtype=torch.int64), torch.zeros(5, 8)
PROMPTS, TASKS = torch.zeros(2, 3, 8), torch.zeros(4, dtype=torch.int64)
BAD_INPUT = {
    "scale": (dict(embed_scale="2"), TypeError, "embed_scale must be a number, got str"),
    "scale tensor": (dict(embed_scale=TABLE[0, 0]), TypeError, "embed_scale must be a number, got Tensor"),
    "offset": (dict(position_offset=2.0), TypeError, "position_offset must be an int, got float"),
    "offset alone": (dict(position_offset=2), ValueError, "must be 0 without position_embedding, got 2"),
    "types alone": (dict(token_type_ids=IDS), ValueError, "token_type_embedding must be given, .* got None"),
    "types float": (dict(token_type_ids=IDS.float()), TypeError, "token_type_ids must have dtype .* got float32"),
    "types rank": (dict(token_type_ids=IDS[0]), ValueError, r"have 2 dimensions, got shape \[3\]"),
    "types shape": (dict(token_type_ids=IDS[:2]), ValueError, r"must have shape \[4, 3\], got \[2, 3\]"),
    "types elsewhere": (dict(token_type_ids=IDS.to("meta")), ValueError, "must be on cpu, .* got meta"),
}
BAD_TABLES = {
    "list": ([[0.0] * 8], TypeError, "must be a tensor, got list"),
    "integer": (TABLE.long(), TypeError, "must have dtype .* got int64"),
    "rank": (TABLE[None], ValueError, r"must have 2 dimensions, got shape \[1, 5, 8\]"),
    "width": (TABLE[:, :7], ValueError, r"must have 8 features, as prompts have, got \[5, 7\]"),
    "elsewhere": (TABLE.to("meta"), ValueError, "must be on cpu, .* got meta"),
}
BAD_POSITIONS = {
    "alone": (dict(position_ids=IDS), ValueError, "position_embedding must be given, .* got None"),
    "float": (dict(position_ids=IDS.float(), position_embedding=TABLE), TypeError, "position_ids .* got float32"),
    "shape": (dict(position_ids=IDS[:1], position_embedding=TABLE), ValueError, r"shape \[4, 3\], got \[1, 3\]"),
}


def assert_refused(op, changes, error, match):
    args = dict(input_ids=IDS, embedding=TABLE, prompts=PROMPTS, task_ids=TASKS)
    for backend in ("auto", "reference"):
        with peft_ops.set_backend(backend), pytest.raises(error, match=f"^{op}: .*{match}"):
            call(op, **args | changes)


@each_op
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(op, case):
    changes, error, match = BAD_INPUT[case]
    needed = {} if case == "types alone" else dict(token_type_embedding=TABLE)
    assert_refused(op, needed | changes, error, match)


@each_op
@pytest.mark.parametrize("arg", ["position_embedding", "token_type_embedding"])
@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_table(op, arg, case):
    table, error, match = BAD_TABLES[case]
    assert_refused(op, {arg: table}, error, f"{arg} {match}")


@pytest.mark.parametrize("case", BAD_POSITIONS)
def test_bad_position_ids(case):
    assert_refused("prompt_embed", *BAD_POSITIONS[case])
