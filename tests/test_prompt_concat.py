"""prompt_concat: every slot against a loop over rows and slots, gradients, models, layouts, tracing, and bad input."""

import re

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

import peft_ops
from peft_ops import PromptBatch, _library, prompt_concat, reference
from peft_ops.ops import prompt_concat as module
from tests.conftest import (
    DEVICE,
    DTYPES,
    INTERPRET,
    KERNELS,
    assert_as_good_as_torch,
    assert_guards,
    assert_same,
    guarded,
    ids_like,
    name_of,
)

pytestmark = pytest.mark.kernels

NAN, INF = float("nan"), float("inf")
SIDES = ["right", "left"]
V = 11
NOTHING_ADDED = (0, 1.0)  # position_offset and embed_scale of the raw operator


def make(B=5, S=6, P=4, E=8, dtype=torch.float32, num_tasks=3, prompts_dtype=None, ids_dtype=torch.int64):
    """input_ids [B, S], embedding [V, E] and prompts [num_tasks, P, E]."""
    return (
        torch.randint(V, (B, S), device=DEVICE, dtype=ids_dtype),
        torch.randn(V, E, device=DEVICE).to(dtype),
        torch.randn(num_tasks, P, E, device=DEVICE).to(prompts_dtype or dtype),
    )


def tensor(values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def slots_of(S, P, task, length, attended, left, after_bos):
    """What stands in each slot of one row: ("prompt", i), ("token", s), or None for a spare slot."""
    p = length if task >= 0 else 0
    real = [s for s in range(S) if attended[s]]
    first = real[0] + after_bos if real else (S if left else 0)
    text = [("token", s) for s in range(S)]
    row = text[:first] + [("prompt", i) for i in range(p)] + text[first:]
    return [None] * (P - p) + row if left else row + [None] * (P - p)


def layout_of(
    shape, prompts, task_ids=None, prompt_lengths=None, attention_mask=None, padding_side="right", after_bos=False
):
    """For each sequence its task (-1 base, -2 bad) and its slots."""
    (B, S), (num_tasks, P) = shape, prompts.shape[:2]
    rows = []
    for b in range(B):
        task = 0 if task_ids is None else int(task_ids[b])
        task = task if -1 <= task < num_tasks else -2
        length = P if prompt_lengths is None or task < 0 else min(max(int(prompt_lengths[task]), 0), P)
        attended = [True] * S if attention_mask is None else (attention_mask[b] != 0).tolist()
        rows.append((task, slots_of(S, P, task, length, attended, padding_side == "left", after_bos)))
    return rows


def expected(input_ids, embedding, prompts, task_ids=None, *, labels=None, inputs_embeds=None, **kwargs):
    """The specification, one slot at a time: the PromptBatch, and which slots hold a prompt."""
    attention_mask = kwargs.get("attention_mask")
    tensors = input_ids, embedding, prompts, task_ids, attention_mask, labels, inputs_embeds
    cpu = [None if t is None else t.detach().cpu() for t in tensors]
    input_ids, embedding, prompts, task_ids, attention_mask, labels, embeds = cpu
    prompts = prompts[None] if prompts.dim() == 2 else prompts
    (B, S), (P, E) = (input_ids if embeds is None else embeds).shape[:2], prompts.shape[1:]
    out = torch.zeros(B, P + S, E, dtype=(embedding if embeds is None else embeds).dtype)
    mask = torch.zeros(B, P + S, dtype=torch.int64 if attention_mask is None else attention_mask.dtype)
    positions = torch.zeros(B, P + S, dtype=torch.int64)
    new_labels = None if labels is None else torch.full((B, P + S), -100, dtype=labels.dtype)
    token_map = torch.full((B, P + S), -1)
    of_prompt = torch.zeros(B, P + S, dtype=torch.bool)
    for b, (task, slots) in enumerate(layout_of((B, S), prompts, task_ids, **kwargs)):
        count = 0
        for r, slot in enumerate(slots):
            if slot is None:
                continue
            kind, i = slot
            if kind == "prompt":
                out[b, r], mask[b, r], of_prompt[b, r] = prompts[task, i].to(out.dtype), 1, True
            else:
                if embeds is not None:
                    out[b, r] = embeds[b, i]
                else:
                    known = 0 <= int(input_ids[b, i]) < embedding.shape[0]
                    out[b, r] = embedding[input_ids[b, i]] if known else NAN
                mask[b, r] = 1 if attention_mask is None else attention_mask[b, i]
            if mask[b, r] != 0:
                positions[b, r], count = count, count + 1
                if kind == "token":
                    token_map[b, r] = i
                    if labels is not None:
                        new_labels[b, r] = labels[b, i]
        if task == -2:
            out[b] = NAN
    batch = (out, mask, positions, new_labels, token_map)
    return PromptBatch(*(None if t is None else t.to(DEVICE) for t in batch)), of_prompt.to(DEVICE)


def assert_equal(got, want):
    """The same values in the same dtype, to the bit but for NaN's."""
    if want is None:
        assert got is None
    elif want.is_floating_point():
        assert_same(got, want, bitwise=True)
    else:
        assert got.dtype == want.dtype and torch.equal(got, want), (got, want)


def check(*args, **kwargs):
    """Run the operator, compare all five outputs with the loop, and return them."""
    got = prompt_concat(*args, **kwargs)
    want, of_prompt = expected(*args, **kwargs)
    assert isinstance(got, PromptBatch)
    assert_same(got.inputs_embeds, want.inputs_embeds)  # a prompt of another dtype is rounded, all else is copied
    assert_same(got.inputs_embeds[~of_prompt], want.inputs_embeds[~of_prompt], bitwise=True)
    for a, b in zip(got[1:], want[1:], strict=True):
        assert_equal(a, b)
    assert all(t.is_contiguous() for t in got if t is not None)
    return got


def masks(S):
    """Six rows of every kind: full, padded right, padded left, both, holes, nothing but pads."""
    rows = torch.ones(6, S, dtype=torch.int64)
    rows[1, S - 2 :] = 0
    rows[2, :2] = 0
    rows[3, :1] = rows[3, S - 1 :] = 0
    rows[4] = torch.arange(S) % 3 % 2
    rows[5] = 0
    return rows.to(DEVICE)


IDS, LENGTHS = [0, 2, 1, -1, 2, 0], [4, 0, 2]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("after_bos", [False, True], ids=["first", "after_bos"])
@pytest.mark.parametrize("with_mask", [False, True], ids=["no_mask", "mask"])
@pytest.mark.parametrize("with_lengths", [False, True], ids=["whole", "lengths"])
def test_every_slot(side, after_bos, with_mask, with_lengths):
    for roll in range(6):  # every kind of mask meets every task
        args = make(6, 7, dtype=DTYPES[roll % 3])
        kwargs = dict(labels=torch.randint(V, (6, 7), device=DEVICE), padding_side=side, after_bos=after_bos)
        kwargs |= dict(prompt_lengths=tensor(LENGTHS)) if with_lengths else {}
        kwargs |= dict(attention_mask=masks(7)) if with_mask else {}
        check(*args, tensor(IDS).roll(roll), **kwargs)


def test_as_documented():
    """The two examples of the docstring, written out."""
    embedding, prompts = torch.arange(10.0, device=DEVICE)[:, None], tensor([[[-1], [-2]], [[-3], [-4]]], torch.float32)
    ids, lengths = tensor([[5, 6, 0], [7, 0, 0]]), tensor([2, 1])
    args = embedding, prompts, tensor([0, 1])
    right = prompt_concat(ids, *args, prompt_lengths=lengths, attention_mask=(ids > 0).long(), labels=ids)
    assert right.inputs_embeds[..., 0].tolist() == [[-1, -2, 5, 6, 0], [-3, 7, 0, 0, 0]]
    assert right.attention_mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert right.position_ids.tolist() == [[0, 1, 2, 3, 0], [0, 1, 0, 0, 0]]
    assert right.labels.tolist() == [[-100, -100, 5, 6, -100], [-100, 7, -100, -100, -100]]
    assert right.token_map.tolist() == [[-1, -1, 0, 1, -1], [-1, 0, -1, -1, -1]]
    ids = ids.flip(1)
    mask = (ids > 0).long()
    left = prompt_concat(ids, *args, prompt_lengths=lengths, attention_mask=mask, padding_side="left")
    assert left.inputs_embeds[..., 0].tolist() == [[0, -1, -2, 6, 5], [0, 0, 0, -3, 7]]
    assert left.attention_mask.tolist() == [[0, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert left.position_ids.tolist() == [[0, 0, 1, 2, 3], [0, 0, 0, 0, 1]]
    assert left.token_map.tolist() == [[-1, -1, -1, 1, 2], [-1, -1, -1, -1, 2]] and left.labels is None


@pytest.mark.parametrize("side", SIDES)
def test_after_bos_as_documented(side):
    """Token 1 is the BOS: pads stay outside, a row without tokens is as it is without after_bos."""
    embedding, prompts = torch.arange(10.0, device=DEVICE)[:, None], tensor([[[-1], [-2]]], torch.float32)
    ids, want, positions = {
        "right": ([[1, 5, 6], [1, 7, 0], [1, 0, 0], [0, 0, 0]],
                  [[1, -1, -2, 5, 6], [1, -1, -2, 7, 0], [1, -1, -2, 0, 0], [-1, -2, 0, 0, 0]],
                  [[0, 1, 2, 3, 4], [0, 1, 2, 3, 0], [0, 1, 2, 0, 0], [0, 1, 0, 0, 0]]),
        "left": ([[1, 5, 6], [0, 1, 7], [0, 0, 1], [0, 0, 0]],
                 [[1, -1, -2, 5, 6], [0, 1, -1, -2, 7], [0, 0, 1, -1, -2], [0, 0, 0, -1, -2]],
                 [[0, 1, 2, 3, 4], [0, 0, 1, 2, 3], [0, 0, 0, 1, 2], [0, 0, 0, 0, 1]]),
    }[side]  # fmt: skip
    ids = tensor(ids)
    got = prompt_concat(
        ids, embedding, prompts, attention_mask=(ids > 0).long(), labels=ids, padding_side=side, after_bos=True
    )
    assert got.inputs_embeds[..., 0].tolist() == want and got.position_ids.tolist() == positions
    assert torch.equal(got.labels, torch.where(got.inputs_embeds[..., 0] > 0, got.inputs_embeds[..., 0].long(), -100))
    whole = prompt_concat(ids[:1], embedding, prompts, padding_side=side, after_bos=True)
    assert torch.equal(whole.inputs_embeds, got.inputs_embeds[:1])


SIZES = [(1, 6, 4), (3, 0, 4), (3, 1, 4), (3, 6, 0), (3, 6, 1), (3, 0, 0), (1, 1, 1), (1, 1, 0), (1, 0, 1)]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "B{}-S{}-P{}".format(*s))
def test_sizes(sizes, side):
    B, S, P = sizes
    ids, embedding, prompts = make(B, S, P)
    mask = (torch.rand(B, S, device=DEVICE) < 0.5).long()
    for attention_mask in (None, mask, torch.zeros_like(mask)):
        args = dict(attention_mask=attention_mask, labels=ids, padding_side=side)
        check(ids, embedding, prompts, tensor([2, -1, 0])[:B], prompt_lengths=tensor([P, 0, P // 2]), **args)
        check(ids, embedding, prompts[:1], after_bos=True, **args)
        check(ids, embedding, prompts[1], prompt_lengths=tensor([P // 2]), **args)


@pytest.mark.parametrize("side", SIDES)
def test_base_batch_has_no_prompt(side, dtype):
    ids, embedding, prompts = make(6, 7, dtype=dtype)
    nobody = torch.full((6,), -1, device=DEVICE)
    for table in (prompts.fill_(NAN), prompts[:0]):
        got = check(ids, embedding, table, nobody, attention_mask=masks(7), labels=ids, padding_side=side)
        text = got.inputs_embeds[:, -7:] if side == "left" else got.inputs_embeds[:, :7]
        assert torch.equal(text, embedding[ids])
    check(ids, embedding, prompts[:0], nobody, prompt_lengths=tensor([]).long(), padding_side=side)


MASK_VALUES = {
    torch.bool: [True],
    torch.uint8: [2, 255],
    torch.int8: [-128, 3],
    torch.int16: [256, -1],
    torch.int32: [65536, -1],
    torch.int64: [2**40, -(2**63)],
    torch.float16: [0.5, 6e-8],
    torch.bfloat16: [0.5, -3.0],
    torch.float32: [1e-40, -INF],
    torch.float64: [1e-300, 1 / 3],
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("mask_dtype", MASK_VALUES, ids=lambda d: str(d).removeprefix("torch."))
def test_mask_keeps_dtype_and_values(mask_dtype, side):
    """Whatever is not 0 is attended to, and comes back as it was."""
    mask = masks(9).to(mask_dtype)
    for i, value in enumerate(MASK_VALUES[mask_dtype]):
        part = mask[:, 3 + i :: 3]
        part[part != 0] = tensor(value, mask_dtype)
    kwargs = dict(prompt_lengths=tensor(LENGTHS), attention_mask=mask, labels=make(6, 9)[0], padding_side=side)
    got = check(*make(6, 9), tensor(IDS), **kwargs)
    assert got.attention_mask.dtype == mask_dtype


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_integer_dtypes(ids_dtype):
    other = torch.int64 if ids_dtype == torch.int32 else torch.int32
    args = make(6, 7, ids_dtype=ids_dtype)
    labels = torch.randint(-(2**31), 2**31, (6, 7), device=DEVICE).to(other)
    lengths = tensor(LENGTHS, ids_dtype)
    got = check(*args, tensor(IDS, other), prompt_lengths=lengths, attention_mask=masks(7), labels=labels)
    assert got.labels.dtype == other
    check(*args, tensor(IDS, ids_dtype), prompt_lengths=tensor(LENGTHS, other), labels=args[0])


@pytest.mark.parametrize("E", [1, 3, 31, 64, 65, 255, 1025, 4100])
def test_odd_widths_and_offsets(E, dtype):
    def shifted(t, offset):
        return torch.cat([t.new_zeros(offset), t.reshape(-1)])[offset:].view(t.shape)

    ids, embedding, prompts = make(3, 4, 3, E, dtype)
    task_ids, embeds = tensor([1, -1, 0]), torch.randn(3, 4, E, device=DEVICE).to(dtype)
    for offset in range(1, 8, 1 if not INTERPRET else 3 if E < 1000 else 7):
        tables = shifted(embedding, offset), shifted(prompts, 8 - offset)
        assert tables[0].storage_offset() == offset
        kwargs = dict(labels=shifted(ids, offset), padding_side="left")
        check(shifted(ids, offset), *tables, shifted(task_ids, offset), **kwargs)
        check(None, None, tables[1], task_ids, inputs_embeds=shifted(embeds, offset))


@pytest.mark.parametrize("side", SIDES)
def test_sequences_longer_than_a_tile(side):
    """The layout runs in pieces of 1024 slots: the first token, and the count of attended ones, carry over."""
    S, P = 1500, 700
    ids, embedding, prompts = make(5, S, P, 3)
    mask = torch.ones(5, S, dtype=torch.int32, device=DEVICE)
    mask[0, :1100], mask[1, 1030:], mask[2, ::2], mask[3] = 0, 0, 0, 0
    kwargs = dict(prompt_lengths=tensor([P, 1, 333]), attention_mask=mask, labels=ids, padding_side=side)
    got = check(ids, embedding, prompts, tensor([0, 2, 1, 0, -1]), **kwargs)
    assert got.position_ids.amax(1).tolist() == [P + 399, 1030 + 332, 750, P - 1, S - 1]


def test_inputs_embeds_in_place_of_ids(dtype):
    ids, embedding, prompts = make(6, 7, dtype=dtype)
    kwargs = dict(prompt_lengths=tensor(LENGTHS), attention_mask=masks(7), labels=ids)
    for side in SIDES:
        want = check(ids, embedding, prompts, tensor(IDS), padding_side=side, **kwargs)
        got = check(None, None, prompts, tensor(IDS), inputs_embeds=embedding[ids], padding_side=side, **kwargs)
        for a, b in zip(got, want, strict=True):
            assert_equal(a, b)


@pytest.mark.parametrize("prompts_dtype", DTYPES, ids=lambda d: f"prompts_{name_of(d)}")
@pytest.mark.parametrize("E", [7, 1100])
def test_prompts_of_another_dtype_are_rounded_once(prompts_dtype, dtype, E):
    ids, embedding, prompts = make(3, 2, 5, E, dtype, prompts_dtype=prompts_dtype)
    prompts[1] *= 1e-6  # subnormal in fp16
    for tokens in (dict(), dict(inputs_embeds=embedding[ids])):
        table = (None, None) if tokens else (ids, embedding)
        got = check(*table, prompts, tensor([0, 1, 2]), **tokens)
        assert got.inputs_embeds.dtype == dtype


@pytest.mark.parametrize("prompts_dtype", DTYPES, ids=lambda d: f"prompts_{name_of(d)}")
def test_casting_rounds_ties_to_even_and_keeps_special_values(prompts_dtype, dtype):
    if INTERPRET and prompts_dtype != dtype and torch.bfloat16 in (prompts_dtype, dtype):
        pytest.skip("the interpreter truncates to bf16, and misreads bf16's subnormals")
    tiny, big = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    values = [INF, -INF, NAN, 0.0, -0.0, tiny, tiny / 2, -tiny / 3, big, -big, 65519.0, 65520.0, 3.4e38, 6e-8, 3e-8]
    ties = [1 + k / 2**m for m in (7, 8, 9, 10, 11, 12) for k in (1, 3, 5, 7)]
    prompts = tensor(values + ties, torch.float32).repeat(30).to(prompts_dtype)[None, None]
    ids = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    got = prompt_concat(ids, torch.zeros(1, prompts.shape[2], device=DEVICE, dtype=dtype), prompts).inputs_embeds[0, 0]
    want, keep = prompts[0, 0].to(dtype), ~prompts[0, 0].isnan()
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(got.isnan(), ~keep)
    assert torch.equal(got[keep].view(integer), want[keep].view(integer))


def test_tokens_are_copied_to_the_bit(dtype):
    info = torch.finfo(dtype)
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    row = tensor([INF, -INF, -0.0, info.tiny / 2, info.max, -info.max, info.tiny, 1.0], dtype)
    embedding, prompts = row.repeat(4, 1), row.flip(0).repeat(2, 3, 1)
    ids = tensor([[0, 1], [2, 3]])
    for tokens in ((ids, embedding, None), (None, None, embedding[ids])):
        out = prompt_concat(*tokens[:2], prompts, tensor([1, 0]), inputs_embeds=tokens[2]).inputs_embeds
        assert torch.equal(out[:, :3].view(integer), prompts.view(integer))
        assert torch.equal(out[:, 3:].contiguous().view(integer), embedding[ids].view(integer))


STRIDED = {
    "every second": lambda t: torch.stack([t, torch.full_like(t, 7)], 1).flatten(0, 1)[::2],
    "last dimension": lambda t: torch.stack([t, torch.full_like(t, 7)], -1)[..., 0],
    "columns first": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
    "wide rows": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "expanded": lambda t: t[:1].expand(t.shape),
    "flipped storage": lambda t: torch.cat([t[:1], t])[1:],
}


@pytest.mark.parametrize("layout", STRIDED)
def test_layouts(layout):
    """Every argument as a view of something larger; a stale neighbour or a wrong stride shows."""
    strided = STRIDED[layout]
    ids, embedding, prompts = make(6, 7, dtype=torch.bfloat16)
    embeds = torch.randn(6, 7, 8, device=DEVICE).bfloat16()
    for side in SIDES:
        kwargs = dict(prompt_lengths=strided(tensor(LENGTHS)), attention_mask=strided(masks(7)), padding_side=side)
        kwargs["labels"] = strided(ids)
        check(strided(ids), strided(embedding), strided(prompts), strided(tensor(IDS)), **kwargs)
        check(None, None, strided(prompts), strided(tensor(IDS)), inputs_embeds=strided(embeds), **kwargs)
    mask = strided(masks(7).bool())
    check(ids, embedding, prompts, tensor(IDS), attention_mask=mask)


def gradients_by_loop(dout, shape, embedding, prompts, task_ids, tokens=None, **kwargs):
    """dprompts in fp32, summed over the batch in order; the embedding's in fp64; the tokens', copied."""
    dout = dout.cpu()
    (B, S), E = shape, dout.shape[2]
    dprompts = torch.zeros(prompts.shape, dtype=torch.float32)
    dtable, dtokens = torch.zeros(V, E, dtype=torch.float64), torch.zeros(B, S, E, dtype=dout.dtype)
    for b, (task, slots) in enumerate(layout_of(shape, prompts, task_ids, **kwargs)):
        for r, slot in enumerate(slots):
            if slot is None or task == -2:
                continue
            kind, i = slot
            if kind == "prompt":
                dprompts[task, i] += dout[b, r].float()
            else:
                dtokens[b, i] = dout[b, r]
                if tokens is not None:
                    dtable[tokens[b, i]] += dout[b, r].double()
    return dprompts.to(DEVICE), dtable.to(DEVICE), dtokens.to(DEVICE)


@pytest.mark.parametrize("prompts_dtype", DTYPES, ids=lambda d: f"prompts_{name_of(d)}")
@pytest.mark.parametrize("sizes", [(6, 7, 4, 8), (6, 1, 3, 1025)], ids=lambda s: "B{}-S{}-P{}-E{}".format(*s))
def test_gradients(sizes, prompts_dtype, dtype):
    (B, S, P, E), side = sizes, SIDES[sizes[1] == 7]
    ids_dtype = torch.int32 if dtype == torch.float16 else torch.int64
    ids, embedding, prompts = make(B, S, P, E, dtype, prompts_dtype=prompts_dtype, ids_dtype=ids_dtype)
    mask, task_ids = (masks(S) if S > 1 else tensor([[1], [0], [1], [0], [0], [1]])), tensor([0, 0, 2, 1, -1, 2])
    kwargs = dict(prompt_lengths=tensor([P, 0, P // 2]), attention_mask=mask, padding_side=side, after_bos=S == 1)
    dout = torch.randn(B, P + S, E, device=DEVICE).to(dtype)
    by_loop = gradients_by_loop(dout, (B, S), embedding, prompts, task_ids, ids, **kwargs)
    dprompts_loop, dtable_64, dtokens_loop = by_loop

    def grads(f, table, prompts, embeds=None):
        source = (table if embeds is None else embeds).detach().clone().requires_grad_()
        p = prompts.detach().clone().requires_grad_()
        tokens = (ids, source) if embeds is None else (None, None)
        out = f(*tokens, p, task_ids, inputs_embeds=None if embeds is None else source, **kwargs).inputs_embeds
        return torch.autograd.grad(out, (source, p), dout.to(out.dtype))

    dtable, dprompts = grads(prompt_concat, embedding, prompts)
    dtable_ref, dprompts_ref = grads(reference.prompt_concat, embedding, prompts)
    assert dprompts.dtype == prompts_dtype and torch.equal(dprompts, dprompts_loop.to(prompts_dtype))
    assert_as_good_as_torch(dtable, dtable_ref, dtable_64)
    _, dprompts_64 = grads(reference.prompt_concat, embedding.double(), prompts.double())
    assert_as_good_as_torch(dprompts, dprompts_ref, dprompts_64)
    dtokens, dprompts = grads(prompt_concat, None, prompts, embedding[ids])
    assert dtokens.dtype == dtype and torch.equal(dtokens, dtokens_loop)
    assert torch.equal(dtokens, grads(reference.prompt_concat, None, prompts, embedding[ids])[0])
    assert torch.equal(dprompts, dprompts_loop.to(prompts_dtype))


def test_gradient_of_many_sequences_of_one_task():
    """More rows than any chunk: against fp64, and no worse than torch's own sum."""
    B = 60 if INTERPRET else 3000
    ids, embedding, prompts = make(B, 1, 2, 5)
    task_ids, dout = ids_like("skewed", B, 3), torch.randn(B, 3, 5, device=DEVICE)

    def grad(f, dtype):
        p = prompts.to(dtype).requires_grad_()
        return torch.autograd.grad(f(ids, embedding.to(dtype), p, task_ids).inputs_embeds, p, dout.to(dtype))[0]

    want = grad(reference.prompt_concat, torch.float64)
    assert_as_good_as_torch(grad(prompt_concat, torch.float32), grad(reference.prompt_concat, torch.float32), want)
    ids, task_ids, dout = ids[:60], task_ids[:60], dout[:60]  # few enough for one chunk: summed in the batch's order
    loop, _, _ = gradients_by_loop(dout, (60, 1), embedding, prompts, task_ids)
    assert torch.equal(grad(prompt_concat, torch.float32), loop)


@pytest.mark.parametrize("side", SIDES)
def test_gradcheck_in_fp64(side):
    for B, S, P, E, num_tasks in [(1, 2, 3, 2, 1), (4, 3, 2, 3, 2), (3, 0, 2, 1, 3), (3, 2, 0, 2, 2), (5, 4, 1, 1, 2)]:
        ids = torch.randint(4, (B, S), device=DEVICE)
        embedding = torch.randn(4, E, dtype=torch.float64, device=DEVICE, requires_grad=True)
        prompts = torch.randn(num_tasks, P, E, dtype=torch.float64, device=DEVICE, requires_grad=True)
        embeds = torch.randn(B, S, E, dtype=torch.float64, device=DEVICE, requires_grad=True)
        task_ids = ids_like("uniform", B, num_tasks)
        kwargs = dict(
            prompt_lengths=torch.randint(P + 1, (num_tasks,), device=DEVICE),
            attention_mask=torch.randint(2, (B, S), device=DEVICE), padding_side=side, after_bos=B == 4,
        )  # fmt: skip

        def with_table(e, p, ids=ids, t=task_ids, kwargs=kwargs):
            return prompt_concat(ids, e, p, t, **kwargs).inputs_embeds

        def with_embeds(x, p, t=task_ids, kwargs=kwargs):
            return prompt_concat(None, None, p, t, inputs_embeds=x, **kwargs).inputs_embeds

        assert torch.autograd.gradcheck(with_table, (embedding, prompts), eps=1e-6, atol=1e-5)
        assert torch.autograd.gradcheck(with_embeds, (embeds, prompts), eps=1e-6, atol=1e-5)


def test_fp64_beside_another_dtype():
    ids, embedding, prompts = make()
    for a, b in ((torch.float64, torch.float32), (torch.bfloat16, torch.float64)):
        e, p = embedding.to(a).requires_grad_(), prompts.to(b).requires_grad_()
        got = check(ids, e, p, tensor([0, 1, 2, -1, 1]))
        dout = torch.randn_like(got.inputs_embeds)
        de, dp = torch.autograd.grad(got.inputs_embeds, (e, p), dout)
        loop, _, _ = gradients_by_loop(dout, (5, 6), e, p, tensor([0, 1, 2, -1, 1]))
        assert de.dtype == a and dp.dtype == b
        assert torch.allclose(dp.double(), loop.double(), rtol=1e-6)


def test_gradients_of_strided_dout():
    dtype = torch.bfloat16
    ids, embedding, prompts = make(4, 5, 3, 6, dtype)
    embeds, task_ids = torch.randn(4, 5, 6, device=DEVICE).to(dtype), tensor([0, 2, 2, -1])
    dout = torch.randn(4, 8, 6, device=DEVICE).to(dtype)

    def grads(gradient):
        e, x, p = (t.clone().requires_grad_() for t in (embedding, embeds, prompts))
        out = prompt_concat(ids, e, p, task_ids).inputs_embeds
        out_of_embeds = prompt_concat(None, None, p, task_ids, inputs_embeds=x).inputs_embeds
        return *torch.autograd.grad(out, (e, p), gradient), *torch.autograd.grad(out_of_embeds, (x, p), gradient)

    want = grads(dout)
    for layout in ("last dimension", "columns first", "every second"):
        assert not STRIDED[layout](dout).is_contiguous()
        assert all(torch.equal(a, b) for a, b in zip(grads(STRIDED[layout](dout)), want, strict=True))
    same = dout[:1].expand(4, 8, 6)
    assert all(torch.equal(a, b) for a, b in zip(grads(same), grads(same.contiguous()), strict=True))


def test_strided_inputs_get_gradients():
    """A view's gradient reaches what it is a view of, and nothing beside it."""
    ids, embedding, prompts = make(4, 5, 3, 6)
    dout = torch.randn(4, 8, 6, device=DEVICE)
    wide = [torch.stack([t, t], -1).requires_grad_() for t in (embedding, prompts)]
    plain = [t.clone().requires_grad_() for t in (embedding, prompts)]
    views, task_ids = [t[..., 0] for t in wide], tensor([0, 2, 2, -1])
    got = torch.autograd.grad(prompt_concat(ids, *views, task_ids).inputs_embeds, wide, dout)
    want = torch.autograd.grad(prompt_concat(ids, *plain, task_ids).inputs_embeds, plain, dout)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a[..., 0], b) and not a[..., 1].any()


def test_gradient_only_where_asked(dtype):
    ids, embedding, prompts = make(5, 6, dtype=dtype)
    task_ids, dout = tensor([0, 2, 1, -1, 2]), torch.randn(5, 10, 8, device=DEVICE).to(dtype)

    def run(e_grad, p_grad):
        e, p = embedding.clone().requires_grad_(e_grad), prompts.clone().requires_grad_(p_grad)
        out = prompt_concat(ids, e, p, task_ids, attention_mask=torch.ones(5, 6, device=DEVICE), labels=ids)
        assert not any(t.requires_grad for t in out[1:])
        return torch.autograd.grad(out.inputs_embeds, [t for t in (e, p) if t.requires_grad], dout)

    both = run(True, True)
    assert torch.equal(run(True, False)[0], both[0]) and torch.equal(run(False, True)[0], both[1])
    assert not prompt_concat(ids, embedding, prompts, task_ids).inputs_embeds.requires_grad
    with torch.no_grad():
        assert not prompt_concat(ids, embedding, prompts.clone().requires_grad_(), task_ids).inputs_embeds.requires_grad


def test_backward_computes_only_what_is_asked(monkeypatch):
    ids, embedding, prompts = make()
    task_ids, calls = tensor([0, 1, 2, 0, 0]), []
    take, back = reference.take_tokens, module._backward_op
    monkeypatch.setattr(reference, "take_tokens", lambda *a: calls.append("tokens") or take(*a))
    monkeypatch.setattr(module, "_backward_op", lambda *a: calls.append("prompts") or back(*a))
    e, p = embedding.clone().requires_grad_(), prompts.clone().requires_grad_()
    for tables, want in (((embedding, p), ["prompts"]), ((e, prompts), ["tokens"]), ((e, p), ["prompts", "tokens"])):
        calls.clear()
        prompt_concat(ids, *tables, task_ids).inputs_embeds.sum().backward()
        assert sorted(calls) == want


@pytest.mark.parametrize("mixed", [False, True], ids=["one_dtype", "fp32_prompts"])
def test_saves_sixteen_bytes_per_sequence(mixed):
    B, S = 8, 32
    ids, embedding, prompts = make(B, S, 6, 64, torch.bfloat16, prompts_dtype=torch.float32 if mixed else None)

    def saved_bytes(e_grad, p_grad, embeds=False):
        saved = []
        e, p = embedding.clone().requires_grad_(e_grad), prompts.clone().requires_grad_(p_grad)
        x = embedding[ids].requires_grad_(e_grad) if embeds else None
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            tokens = (None, None) if embeds else (ids, e)
            kwargs = dict(attention_mask=torch.ones_like(ids), labels=ids, inputs_embeds=x)
            prompt_concat(*tokens, p, ids_like("uniform", B, 3), **kwargs)
        return sum(t.numel() * t.element_size() for t in saved)

    assert saved_bytes(False, True) == 16 * B
    assert saved_bytes(True, False) == saved_bytes(True, True) == 16 * B + ids.numel() * 8
    assert saved_bytes(True, True, embeds=True) == saved_bytes(True, False, embeds=True) == 16 * B


def test_dprompts_do_not_depend_on_other_tasks(dtype):
    """Sequences of task 1 keep their order; how many others stand between, and what their gradients hold, changes."""
    E, P, S, mine = 24, 3, 2, 20
    grads, seen = torch.randn(mine, P + S, E, device=DEVICE).to(dtype), []
    for others in (0, 3, 20 if INTERPRET else 60):
        B = mine + others
        at = torch.randperm(B, device=DEVICE)[:mine].sort().values
        task_ids = ids_like("uniform", B, 4)
        task_ids[task_ids == 1] = 2
        task_ids[at] = 1
        ids, embedding, prompts = make(B, S, P, E, dtype, num_tasks=4)
        dout = torch.randn(B, P + S, E, device=DEVICE).to(dtype)
        if others:
            dout[task_ids == 2], dout[task_ids == 3], dout[task_ids == -1] = NAN, INF, NAN
        dout[at] = grads
        p = prompts.float().requires_grad_()
        seen.append(torch.autograd.grad(prompt_concat(ids, embedding, p, task_ids).inputs_embeds, p, dout)[0][1])
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    assert seen[0].isfinite().all() and seen[0].any()


@pytest.mark.parametrize("side", SIDES)
def test_gradient_of_text_and_spare_slots_stays_out_of_the_prompts(side):
    """dout is NaN wherever no prompt stands; a task without sequences, and rows beyond a prompt's length, get zeros."""
    ids, embedding, prompts = make(6, 7)
    kwargs = dict(prompt_lengths=tensor([4, 0, 2]), attention_mask=masks(7), padding_side=side)
    _, of_prompt = expected(ids, embedding, prompts, tensor([0, 2, -1, -1, 2, 0]), **kwargs)
    dout = torch.where(of_prompt[..., None], 1.0, NAN).expand(-1, -1, 8)
    p = prompts.requires_grad_()
    out = prompt_concat(ids, embedding, p, tensor([0, 2, -1, -1, 2, 0]), **kwargs).inputs_embeds
    (dprompts,) = torch.autograd.grad(out, p, dout)
    assert dprompts[..., 0].tolist() == [[2, 2, 2, 2], [0, 0, 0, 0], [2, 2, 0, 0]]


@pytest.mark.parametrize("side", SIDES)
def test_rows_are_independent(side, dtype):
    """A row stays as it is when the other rows get other tasks, tokens, masks and NaN."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(4 if INTERPRET else 100):
        B, S, P, E = (int(torch.randint(1, n, (1,), generator=generator)) for n in (8, 12, 6, 40))
        ids, embedding, prompts = make(B, S, P, E, dtype)
        task_ids, mask = ids_like("uniform", B, 3), torch.randint(2, (B, S), device=DEVICE)
        row = int(torch.randint(B, (1,), generator=generator))
        before = prompt_concat(ids, embedding, prompts, task_ids, attention_mask=mask, labels=ids, padding_side=side)
        others = torch.arange(B, device=DEVICE) != row
        ids, task_ids, mask = ids.clone(), task_ids.clone(), mask.clone()
        ids[others], task_ids[others], mask[others] = V, ids_like("uniform", B, 3)[others], 1 - mask[others]
        embedding = torch.cat([embedding, torch.full_like(embedding[:1], NAN)])
        if task_ids[row] != 1:
            prompts[1] = NAN
        after = prompt_concat(ids, embedding, prompts, task_ids, attention_mask=mask, labels=ids, padding_side=side)
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a[row], b[row])


def test_batch_size_and_order_do_not_matter(dtype):
    ids, embedding, prompts = make(20, 5, dtype=dtype)
    task_ids, mask = ids_like("uniform", 20, 3), torch.randint(2, (20, 5), device=DEVICE)
    whole = prompt_concat(ids, embedding, prompts, task_ids, attention_mask=mask, labels=ids)
    order = torch.randperm(20, device=DEVICE)
    for rows in (slice(0, 1), slice(3, 10), order):
        part = prompt_concat(ids[rows], embedding, prompts, task_ids[rows], attention_mask=mask[rows], labels=ids[rows])
        assert all(torch.equal(a, b[rows]) for a, b in zip(part, whole, strict=True))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_nan_reaches_only_the_rows_that_use_it(backend, dtype):
    ids, embedding, prompts = make(6, 7, dtype=dtype)
    ids[ids == 3] = 4
    ids[2, 5] = 3
    prompts[2], embedding[3] = NAN, NAN
    kwargs = dict(prompt_lengths=tensor([4, 4, 3]), attention_mask=masks(7))
    with peft_ops.set_backend(backend):
        got = check(ids, embedding, prompts, tensor(IDS), **kwargs)
        check(None, None, prompts, tensor(IDS), inputs_embeds=embedding[ids], **kwargs)
    nan = got.inputs_embeds.isnan().any(-1)
    assert nan.sum(1).tolist() == [0, 3, 1, 0, 3, 0] and nan[2, got.token_map[2] == 5].all()


def test_repeats_are_bitwise_equal():
    B, P = (4, 2) if INTERPRET else (40, 20)
    ids, embedding, prompts = make(B, 9, P, 40, torch.bfloat16, prompts_dtype=torch.float32)
    task_ids, dout = ids_like("skewed", B, 3), torch.randn(B, P + 9, 40, device=DEVICE).bfloat16()

    def run():
        e, p = embedding.clone().requires_grad_(), prompts.clone().requires_grad_()
        batch = prompt_concat(ids, e, p, task_ids, attention_mask=torch.ones_like(ids), labels=ids)
        return *batch, *torch.autograd.grad(batch.inputs_embeds, (e, p), dout)

    first = run()
    for _ in range(250 if DEVICE == "cuda" else 50):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def whole(message):
    """A pattern that is the whole message of a failed check."""
    return "^" + re.escape(f"prompt_concat: {message}") + "$"


ID_AND_VALUE_DTYPES = [(torch.int32, torch.float32), (torch.int64, torch.bfloat16), (torch.int64, torch.float16)]
pairs = pytest.mark.parametrize(
    ("ids_dtype", "dtype"), ID_AND_VALUE_DTYPES, ids=["int32-fp32", "int64-bf16", "int64-fp16"]
)


@pairs
@pytest.mark.parametrize("bad", [3, 4, -2, 2**31 - 1, -(2**31)])
def test_bad_task_id(bad, ids_dtype, dtype):
    ids, embedding, prompts = make(6, 7, dtype=dtype)
    table, buffer = guarded(3, 4, 8, dtype=dtype, fill=7)  # a read outside would look like a number
    table.copy_(prompts)
    task_ids = tensor([0, bad, -1, 2, 1, 1], ids_dtype)
    kwargs = dict(prompt_lengths=tensor(LENGTHS), attention_mask=masks(7), labels=ids)
    if not KERNELS:
        with pytest.raises(IndexError, match=whole(f"task_ids must be in [-1, 3), got {bad} at position 1")):
            prompt_concat(ids, embedding, table, task_ids, **kwargs)
        return
    for side in SIDES:
        got = check(ids, embedding, table, task_ids, padding_side=side, **kwargs)
        assert got.inputs_embeds[1].isnan().all() and got.inputs_embeds[[0, 2, 3, 4, 5]].isfinite().all()
    got = check(None, None, table, task_ids, inputs_embeds=embedding[ids])
    assert got.inputs_embeds[1].isnan().all() and got.inputs_embeds[[0, 2, 3, 4, 5]].isfinite().all()
    assert (buffer[:256] == 7).all() and (buffer[-256:] == 7).all()


@pairs
@pytest.mark.parametrize("bad", [V, V + 1, -1, -2, 2**31 - 1, -(2**31)])
def test_bad_token(bad, ids_dtype, dtype):
    ids, embedding, prompts = make(6, 7, dtype=dtype, ids_dtype=ids_dtype)
    table, buffer = guarded(V, 8, dtype=dtype, fill=7)
    table.copy_(embedding)
    ids[1, 2] = bad
    if not KERNELS:
        with pytest.raises(IndexError, match=whole(f"input_ids must be in [0, {V}), got {bad} at position 9")):
            prompt_concat(ids, table, prompts, tensor(IDS))
        return
    got = check(ids, table, prompts, tensor(IDS), prompt_lengths=tensor(LENGTHS), labels=ids)
    nan = got.inputs_embeds.isnan()
    assert nan.any(-1).sum() == 1 and nan[1][got.token_map[1] == 2].all()
    assert (buffer[:256] == 7).all() and (buffer[-256:] == 7).all()


@pytest.mark.parametrize("bad", [5, -1, 2**31 - 1, -(2**31), 2**31, 2**32, 2**32 + 1, -(2**63)])
def test_bad_length(bad):
    ids, embedding, prompts = make(6, 7)
    lengths = tensor([2, bad, 4], torch.int32 if -(2**31) <= bad < 2**31 else torch.int64)
    if not KERNELS:
        with pytest.raises(IndexError, match=whole(f"prompt_lengths must be in [0, 5), got {bad} at position 1")):
            prompt_concat(ids, embedding, prompts, tensor(IDS), prompt_lengths=lengths)
        return
    for side in SIDES:
        check(ids, embedding, prompts, tensor(IDS), prompt_lengths=lengths, attention_mask=masks(7), padding_side=side)


def test_ids_beyond_32_bits():
    ids, embedding, prompts = make(2, 3)
    ids[1, 1] = 2**32  # 0 in 32 bits
    if KERNELS:
        got = check(ids, embedding, prompts, tensor([2**32 + 1, 0]))
        assert got.inputs_embeds[0].isnan().all() and got.inputs_embeds[1].isnan().any(-1).sum() == 1
        return
    with pytest.raises(IndexError, match=whole("input_ids must be in [0, 11), got 4294967296 at position 4")):
        prompt_concat(ids, embedding, prompts, tensor([0, 1]))
    with pytest.raises(IndexError, match=whole("task_ids must be in [-1, 3), got 4294967297 at position 0")):
        prompt_concat(ids, embedding, prompts, tensor([2**32 + 1, 0]))


def test_empty_vocabulary():
    ids, embedding, prompts = make(2, 3)
    check(ids[:, :0], embedding[:0], prompts, tensor([1, -1]))
    if KERNELS:
        check(ids, embedding[:0], prompts, tensor([1, -1]))
        return
    ids[0, 0] = 7
    with pytest.raises(IndexError, match=whole("input_ids must be in [0, 0), got 7 at position 0")):
        prompt_concat(ids, embedding[:0], prompts, tensor([1, -1]))


@pytest.mark.skipif(not KERNELS, reason="on a CPU a bad id raises before a gradient exists")
@pytest.mark.parametrize("bad", ["tokens", "task_ids"])
@pytest.mark.parametrize("count", [6, 1000], ids=["few", "many"])
def test_bad_ids_send_no_gradient(count, bad):
    """As in the reference: what is NaN has no gradient, and none is written outside the table."""
    ids, embedding, prompts = make(4, count)
    task_ids, dout = tensor([0, 1, 2, -1]), torch.randn(4, 4 + count, 8, device=DEVICE)
    if bad == "tokens":
        ids[0, 1], ids[0, 2], ids[1, 3], ids[1, 4], ids[2, 0] = V, -1, 2**31 - 1, -(2**31), V + 100
    else:
        task_ids[2:] = tensor([7, -2])

    def grads(f):
        e, p = embedding.clone().requires_grad_(), prompts.clone().requires_grad_()
        x = torch.ones(4, count, 8, device=DEVICE, requires_grad=True)
        of_ids = torch.autograd.grad(f(ids, e, p, task_ids).inputs_embeds, (e, p), dout)
        return *of_ids, *torch.autograd.grad(f(None, None, p, task_ids, inputs_embeds=x).inputs_embeds, x, dout)

    for got, want in zip(grads(prompt_concat), grads(reference.prompt_concat), strict=True):
        assert torch.allclose(got, want, atol=1e-4) and got.any()


class _GuardedTorch:
    """torch, but for allocations: they lie between two margins of 0x7F bytes, which `intact` looks at."""

    def __init__(self):
        self.buffers = []

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, size, *, dtype, device):
        size = (size,) if isinstance(size, int) else tuple(size)
        count = torch.Size(size).numel() * dtype.itemsize
        buffer = torch.full((count + 2048,), 0x7F, dtype=torch.uint8, device=device)
        self.buffers.append(buffer)
        return buffer[1024 : 1024 + count].view(dtype).view(size)

    def zeros(self, size, *, dtype, device):
        return self.empty(size, dtype=dtype, device=device).zero_()

    def intact(self):
        return all((b[:1024] == 0x7F).all() and (b[-1024:] == 0x7F).all() for b in self.buffers)


def test_guards_stay_intact(monkeypatch):
    """Random shapes between guards: nothing is read outside the inputs (NaN), nor written outside the outputs."""
    generator = torch.Generator().manual_seed(2)
    monkeypatch.setattr(module, "torch", watched := _GuardedTorch())
    for trial in range(12 if INTERPRET else 400):
        B, S, P, E, num_tasks = (int(torch.randint(1, n, (1,), generator=generator)) for n in (7, 20, 12, 90, 4))
        dtype = DTYPES[trial % 3]
        (table, e_buffer), (prompts, p_buffer) = guarded(V, E, dtype=dtype), guarded(num_tasks, P, E, dtype=dtype)
        (embeds, x_buffer), (mask, m_buffer) = guarded(B, S, E, dtype=dtype), guarded(B, S, dtype=torch.float32)
        for t in (table, prompts, embeds):
            t.normal_()
        mask.copy_(torch.rand(B, S) < 0.6)
        ids, lengths = torch.randint(V, (B, S), device=DEVICE), torch.randint(P + 1, (num_tasks,), device=DEVICE)
        for t in (table, prompts, embeds):
            t.requires_grad_()
        kwargs = dict(prompt_lengths=lengths, attention_mask=mask, labels=ids, padding_side=SIDES[trial % 2])
        task_ids = ids_like("uniform", B, num_tasks)
        for tokens, x in (((ids, table), None), ((None, None), embeds)):
            batch = prompt_concat(*tokens, prompts, task_ids, inputs_embeds=x, **kwargs)
            assert batch.inputs_embeds.isfinite().all() and batch.attention_mask.isfinite().all(), (
                "read outside a tensor"
            )
            sources = (prompts, table if x is None else x)
            dout, d_buffer = guarded(*batch.inputs_embeds.shape, dtype=dtype)
            grads = torch.autograd.grad(batch.inputs_embeds, sources, dout.normal_())
            assert all(g.isfinite().all() for g in grads), "read outside the gradient"
            for buffer in (e_buffer, p_buffer, x_buffer, m_buffer, d_buffer):
                assert_guards(buffer.detach())
        assert watched.intact()
        watched.buffers.clear()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("sizes", [(0, 3, 2, 8), (2, 0, 0, 8), (0, 0, 0, 8), (2, 3, 2, 0), (2, 0, 3, 0)], ids=str)
def test_zero_sizes(sizes, backend, dtype):
    B, S, P, E = sizes
    ids, embedding, prompts = make(B, S, P, E, dtype)
    task_ids = torch.zeros(B, dtype=torch.int64, device=DEVICE)
    kwargs = dict(attention_mask=torch.ones(B, S, device=DEVICE), labels=ids)
    with peft_ops.set_backend(backend):
        e, p = embedding.requires_grad_(), prompts.requires_grad_()
        got = check(ids, e, p, task_ids, **kwargs)
        x = torch.zeros(B, S, E, device=DEVICE, dtype=dtype, requires_grad=True)
        of_embeds = check(None, None, p, task_ids, inputs_embeds=x, **kwargs)
        if backend == "reference" and not S:
            return  # plain PyTorch has no graph where nothing is gathered
        de, dp = torch.autograd.grad(got.inputs_embeds, (e, p), torch.ones_like(got.inputs_embeds))
        assert torch.equal(de, torch.zeros_like(e)) and torch.equal(dp, torch.zeros_like(p))
        (dx,) = torch.autograd.grad(of_embeds.inputs_embeds, x, torch.ones_like(of_embeds.inputs_embeds))
        assert dx.shape == x.shape


@settings(max_examples=20 if INTERPRET else 80, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 6), st.integers(0, 12), st.integers(0, 6), st.integers(1, 40), st.integers(1, 4)),
    st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    st.sampled_from([None, torch.bool, torch.int64, torch.float16]),
    st.sampled_from(SIDES), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_anything_against_the_loop(sizes, dtypes, mask_dtype, side, after_bos, embeds, with_lengths, seed):
    torch.manual_seed(seed)
    (B, S, P, E, num_tasks), (dtype, prompts_dtype) = sizes, dtypes
    ids, embedding, prompts = make(B, S, P, E, dtype, num_tasks, prompts_dtype)
    tokens = (None, None) if embeds else (ids, embedding)
    check(
        *tokens, prompts, ids_like("uniform", B, num_tasks), inputs_embeds=embedding[ids] if embeds else None,
        prompt_lengths=torch.randint(P + 1, (num_tasks,), device=DEVICE) if with_lengths else None,
        attention_mask=None if mask_dtype is None else (torch.rand(B, S, device=DEVICE) < 0.6).to(mask_dtype),
        labels=ids if with_lengths else None, padding_side=side, after_bos=after_bos,
    )  # fmt: skip


@pytest.fixture(scope="module")
def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval().to(DEVICE)


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().to(DEVICE)


def padded(side, S=7, counts=(7, 4, 1, 5)):
    """Ragged texts as ids and mask, padded at one side with token 0."""
    ids, mask = (torch.zeros(len(counts), S, dtype=torch.int64, device=DEVICE) for _ in range(2))
    for b, n in enumerate(counts):
        at = slice(S - n, S) if side == "left" else slice(0, n)
        ids[b, at], mask[b, at] = torch.randint(1, 50, (n,), device=DEVICE), 1
    return ids, mask


def test_equals_peft_where_padding_is_right(gpt2):
    """What PEFT hands to the base model: cat((prompts, embeds)), cat((ones, mask)), cat((-100, labels))."""
    peft = pytest.importorskip("peft")
    P, seen = 3, {}
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    model = peft.get_peft_model(gpt2, config).to(DEVICE)
    prompts, embedding = model.prompt_encoder["default"].embedding.weight, gpt2.get_input_embeddings().weight
    hook = gpt2.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    try:
        for side in SIDES:
            ids, mask = padded(side)
            labels = torch.where(mask == 1, ids, -100)
            with torch.no_grad():
                model(input_ids=ids, attention_mask=mask, labels=labels)
            got = prompt_concat(ids, embedding, prompts, attention_mask=mask, labels=labels, padding_side=side)
            theirs = [seen[name] for name in ("inputs_embeds", "attention_mask", "labels")]
            ours = [got.inputs_embeds, got.attention_mask, got.labels]
            if side == "right":
                for a, b in zip(ours, theirs, strict=True):
                    assert torch.equal(a, b.to(a.dtype))
                continue
            # PEFT puts the pads between prompt and text; without them the rows are the same
            assert theirs[1][1].tolist() == [1] * P + [0] * 3 + [1] * 4
            assert got.attention_mask[1].tolist() == [0] * 3 + [1] * (P + 4)
            for b in range(len(ids)):
                keep, theirs_keep = got.attention_mask[b] == 1, theirs[1][b] == 1
                for a, t in zip(ours, theirs, strict=True):
                    assert torch.equal(a[b][keep], t[b][theirs_keep].to(a.dtype))
    finally:
        hook.remove()


def test_equals_peft_arithmetic(dtype):
    """PEFT casts fp32 prompts to the base model's dtype."""
    ids, embedding, prompts = make(4, 6, 3, 40, dtype, 1, torch.float32)
    want = torch.cat((prompts.expand(4, -1, -1).to(dtype), embedding[ids]), 1)
    assert_same(prompt_concat(ids, embedding, prompts).inputs_embeds, want)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_models_see_each_sequence_as_if_alone(name, side, request):
    """Ragged texts, prompts of several lengths: the last token's logits are those of the sequence without padding."""
    model = request.getfixturevalue(name)
    embedding, (ids, mask) = model.get_input_embeddings().weight, padded(side)
    prompts, lengths, task_ids = torch.randn(2, 5, 16, device=DEVICE), [5, 2], [0, -1, 1, 1]
    kwargs = dict(prompt_lengths=tensor(lengths), attention_mask=mask, padding_side=side)
    batch = prompt_concat(ids, embedding, prompts, tensor(task_ids), **kwargs)
    inputs = {name: getattr(batch, name) for name in ("inputs_embeds", "attention_mask", "position_ids")}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
        for b, t in enumerate(task_ids):
            prompt = prompts[t, : lengths[t]] if t >= 0 else prompts[0, :0]
            alone = torch.cat([prompt, embedding[ids[b][mask[b] == 1]]])[None]
            last = int(batch.attention_mask[b].nonzero().max())
            want = model(inputs_embeds=alone, use_cache=False).logits[0, -1]
            assert torch.allclose(logits[b, last], want, atol=1e-5), (logits[b, last] - want).abs().max()
            text = batch.token_map[b][batch.token_map[b] >= 0]
            assert torch.equal(ids[b, text], ids[b][mask[b] == 1])


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("with_ids", [False, True], ids=["one_task", "ids"])
@pytest.mark.parametrize("with_mask", [False, True], ids=["bare", "mask_labels"])
@pytest.mark.parametrize("embeds", [False, True], ids=["input_ids", "inputs_embeds"])
def test_opcheck(embeds, with_mask, with_ids, grad):
    if INTERPRET and with_mask != with_ids:
        pytest.skip("half of the cases take the interpreter as long as all of them the native kernels")
    ids, embedding, prompts = make(4, 5, 3, 8, num_tasks=3 if with_ids else 1)
    prompts.requires_grad_(grad)
    tokens = (embedding[ids], None) if embeds else (ids, embedding)
    tokens[0 if embeds else 1].requires_grad_(grad)
    task_ids, lengths = (tensor([0, 2, -1, 1]), tensor([3, 0, 2])) if with_ids else (None, None)
    metadata = (torch.randint(2, (4, 5), device=DEVICE).to(torch.bfloat16), ids.int()) if with_mask else (None, None)
    tables = [torch.randn(n, 8, device=DEVICE, requires_grad=grad) if with_mask else None for n in (9, 2)]
    types = torch.randint(2, (4, 5), device=DEVICE) if with_mask and with_ids else None
    scalars = (1, 2.5) if with_mask else NOTHING_ADDED
    args = (*tokens, prompts, *tables, task_ids, lengths, *metadata, types, *scalars, with_ids, with_mask)
    torch.library.opcheck(torch.ops.peft_ops.prompt_concat, args)
    layout = torch.ops.peft_ops.prompt_concat(*args)[5]
    dout = torch.randn(4, 8, 8, device=DEVICE)
    torch.library.opcheck(torch.ops.peft_ops.prompt_concat_backward, (dout, layout, prompts.shape[0], 3))


def test_operator_differentiates_when_called_raw():
    ids, embedding, prompts = make()
    e, p = embedding.requires_grad_(), prompts.requires_grad_()
    task_ids, dout = tensor([0, 1, 2, -1, 1]), torch.randn(5, 10, 8, device=DEVICE)
    out = torch.ops.peft_ops.prompt_concat(ids, e, p, None, None, task_ids, *[None] * 4, *NOTHING_ADDED, False, False)
    want = torch.autograd.grad(prompt_concat(ids, e, p, task_ids).inputs_embeds, (e, p), dout)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out[0], (e, p), dout), want, strict=True))
    assert [t.requires_grad for t in out] == [True] + [False] * 5


@pytest.mark.parametrize("sizes", [(2, 3, 0), (2, 0, 3), (0, 3, 2), (2, 0, 0)], ids=lambda s: "B{}-S{}-P{}".format(*s))
def test_opcheck_of_nothing(sizes):
    B, S, P = sizes
    task_ids = torch.zeros(B, dtype=torch.int64, device=DEVICE)
    args = *make(B, S, P), None, None, task_ids, *[None] * 4, *NOTHING_ADDED, True, True
    torch.library.opcheck(torch.ops.peft_ops.prompt_concat, args)
    layout = torch.ops.peft_ops.prompt_concat(*args)[5]
    assert torch.equal(layout, reference.prompt_layout(task_ids, None, None, (B, S, 3, P), True, layout.device, True))


def test_raw_operator_is_never_wrong_on_strided_tensors():
    """The public function makes its arguments contiguous; the operator takes any strides, or says that it does not."""
    op, backward = torch.ops.peft_ops.prompt_concat, torch.ops.peft_ops.prompt_concat_backward
    strided, (ids, embedding, prompts) = STRIDED["columns first"], make(4, 5)
    task_ids, lengths = tensor([0, 2, -1, 1]), tensor([3, 0, 2])
    tables = torch.randn(9, 8, device=DEVICE), torch.randn(V, 8, device=DEVICE)
    mask = torch.randint(2, (4, 5), device=DEVICE)
    args = [ids, embedding, prompts, *tables, task_ids, lengths, mask, ids, ids]
    want, dout = op(*args, *NOTHING_ADDED, True, False), torch.randn(4, 9, 8, device=DEVICE)
    for i in (0, 1, 2, 3, 4, 7, 8, 9):
        changed = [strided(t) if i == j else t for j, t in enumerate(args)]
        try:
            got = op(*changed, *NOTHING_ADDED, True, False)
        except RuntimeError as e:
            assert "must be contiguous" in str(e) or "must be 1-D or contiguous" in str(e)
            continue
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b), f"argument {i}"
    try:
        dprompts = backward(strided(dout), want[5], 3, 4)
    except RuntimeError as e:
        assert "must be contiguous" in str(e)
    else:
        assert torch.equal(dprompts, backward(dout, want[5], 3, 4))


@pytest.mark.parametrize("embeds", [False, True], ids=["input_ids", "inputs_embeds"])
def test_compiles_with_dynamic_shapes(embeds):
    def loss(ids, embedding, prompts, task_ids, lengths, mask):
        tokens = dict(inputs_embeds=embedding[ids]) if embeds else {}
        table = (None, None) if embeds else (ids, embedding)
        tokens |= dict(prompt_lengths=lengths, attention_mask=mask, labels=ids, padding_side="left")
        batch = prompt_concat(*table, prompts, task_ids, **tokens)
        weight = (batch.attention_mask * (1 + batch.position_ids) + batch.labels.clamp(min=0) + batch.token_map)[
            ..., None
        ]
        return (batch.inputs_embeds * weight).square().sum()

    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=frames, fullgraph=True, dynamic=True)
    for B, S in ((2, 5), (3, 5), (5, 9), (8, 4), (4, 13)):
        ids, embedding, prompts = make(B, S)
        args = ids, embedding.requires_grad_(), prompts.requires_grad_(), ids_like("uniform", B, 3), tensor([4, 1, 0])
        mask = torch.randint(2, (B, S), device=DEVICE)
        want, got = loss(*args, mask), compiled(*args, mask)
        assert torch.allclose(got, want)
        for a, b in zip(torch.autograd.grad(got, args[1:3]), torch.autograd.grad(want, args[1:3]), strict=True):
            assert torch.allclose(a, b, rtol=1e-5)
    assert frames.frame_count <= 2


def test_exports_and_loads(tmp_path):
    class Prompted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Parameter(torch.randn(V, 8))
            self.prompts = torch.nn.Parameter(torch.randn(3, 4, 8))
            self.register_buffer("lengths", torch.tensor([4, 0, 2]))

        def forward(self, ids, mask, task_ids):
            args = dict(prompt_lengths=self.lengths, attention_mask=mask, labels=ids, padding_side="left")
            return tuple(prompt_concat(ids, self.embedding, self.prompts, task_ids, **args))

    module = Prompted().to(DEVICE)
    ids, mask = make(4, 5)[0], torch.randint(2, (4, 5), device=DEVICE)
    batch, sequence = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("sequence", min=2, max=512)
    dynamic = {"ids": {0: batch, 1: sequence}, "mask": {0: batch, 1: sequence}, "task_ids": {0: batch}}
    program = torch.export.export(module, (ids, mask, tensor([0, 1, -1, 2])), dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "prompted.pt2")
    loaded = torch.export.load(tmp_path / "prompted.pt2").module()
    ids, mask, task_ids = make(7, 12)[0], torch.randint(2, (7, 12), device=DEVICE), ids_like("uniform", 7, 3)
    for a, b in zip(loaded(ids, mask, task_ids), module(ids, mask, task_ids), strict=True):
        assert torch.equal(a, b)
    assert any("prompt_concat" in str(node.target) for node in program.graph.nodes)


def test_functorch_goes_through_the_reference():
    ids, embedding, prompts = make()
    task_ids, weight = tensor([0, 2, 1, -1, 2]), torch.randn(5, 10, 8, device=DEVICE)

    def loss(p):
        return (prompt_concat(ids, embedding, p, task_ids).inputs_embeds * weight).sum()

    got = torch.func.grad(loss)(prompts)
    want = torch.autograd.grad(loss(p := prompts.clone().requires_grad_()), p)[0]
    assert torch.allclose(got, want, atol=1e-6)
    stacked = torch.stack([prompts, 2 * prompts])
    batched = torch.vmap(lambda p: prompt_concat(ids, embedding, p, task_ids).inputs_embeds)(stacked)
    for i in range(2):
        assert torch.equal(batched[i], prompt_concat(ids, embedding, stacked[i], task_ids).inputs_embeds)


def test_higher_derivatives_refuse():
    ids, embedding, prompts = make()
    task_ids, p = tensor([0, 2, 1, -1, 2]), prompts.clone().requires_grad_()
    for source in (p, e := embedding.clone().requires_grad_()):
        out = prompt_concat(ids, e, p, task_ids).inputs_embeds
        with pytest.raises(RuntimeError, match="prompt_concat: double backward is not supported"):
            torch.autograd.grad(out.square().sum(), source, create_graph=True)
    for tokens in ((prompts, embedding), (prompts, None)):
        with torch.autograd.forward_ad.dual_level():
            dual = [None if t is None else torch.autograd.forward_ad.make_dual(t, torch.ones_like(t)) for t in tokens]
            with pytest.raises(NotImplementedError, match="prompt_concat: forward-mode AD is not supported"):
                prompt_concat(ids, embedding if dual[1] is None else dual[1], dual[0], task_ids)


def test_checkpointing_recomputes_the_same():
    from torch.utils.checkpoint import checkpoint

    ids, embedding, prompts = make()
    task_ids, dout = tensor([0, 2, 1, -1, 2]), torch.randn(5, 10, 8, device=DEVICE)

    def run(p):
        return prompt_concat(ids, embedding, p, task_ids, attention_mask=torch.ones_like(ids)).inputs_embeds

    want = torch.autograd.grad(run(p := prompts.clone().requires_grad_()), p, dout)[0]
    for reentrant in (False, True):
        (p := prompts.clone().requires_grad_()), checkpoint(run, p, use_reentrant=reentrant).backward(dout)
        assert torch.equal(p.grad, want)


@pytest.mark.skipif(KERNELS, reason="about an install without the native library, on a CPU")
@pytest.mark.parametrize("side", SIDES)
def test_without_the_native_library(side, dtype, monkeypatch):
    monkeypatch.setattr(_library, "_NATIVE", frozenset())
    ids, embedding, prompts = make(6, 7, dtype=dtype, prompts_dtype=torch.float32)
    kwargs = dict(prompt_lengths=tensor(LENGTHS), attention_mask=masks(7), padding_side=side)
    p, x = prompts.clone().requires_grad_(), embedding[ids].requires_grad_()
    out = check(None, None, p, tensor(IDS), inputs_embeds=x, labels=ids, **kwargs).inputs_embeds
    check(ids, embedding, p, tensor(IDS), **kwargs)
    dout = torch.randn_like(out)
    dprompts, _, dtokens = gradients_by_loop(dout, (6, 7), embedding, prompts, tensor(IDS), **kwargs)
    got = torch.autograd.grad(out, (p, x), dout)
    assert torch.equal(got[0], dprompts) and torch.equal(got[1], dtokens)
    for arg, bad in (("task_ids", tensor([0, 3, -1, -1, 0, 0])), ("input_ids", ids + 1 - V), ("input_ids", ids + V)):
        args = dict(input_ids=ids, embedding=embedding, prompts=prompts, task_ids=tensor(IDS)) | {arg: bad}
        with pytest.raises(
            IndexError, match=f"^prompt_concat: {arg} must be in .*, got {int(bad.flatten()[1])} at pos"
        ):
            prompt_concat(**args | {arg: torch.where(bad == bad.flatten()[1], bad, 0)})


@pytest.mark.parametrize("side", SIDES)
def test_reference_backend_is_plain_torch(side, dtype):
    ids, embedding, prompts = make(6, 7, dtype=dtype, prompts_dtype=torch.float32)
    kwargs = dict(prompt_lengths=tensor(LENGTHS), attention_mask=masks(7), labels=ids, padding_side=side)
    with peft_ops.set_backend("reference"):
        p = prompts.clone().requires_grad_()
        got = prompt_concat(ids, embedding, p, tensor(IDS), **kwargs)
        assert "prompt_concat" not in got.inputs_embeds.grad_fn.name()
    want, _ = expected(ids, embedding, prompts, tensor(IDS), **kwargs)
    for a, b in zip(got, want, strict=True):
        assert_equal(a, b)


TOKENS, TABLE = torch.zeros(4, 3, dtype=torch.int64), torch.zeros(5, 8)
PROMPTS, TASKS, EMBEDS = torch.zeros(2, 3, 8), torch.zeros(4, dtype=torch.int64), torch.zeros(4, 3, 8)
PLAN = peft_ops.plan_tasks(TASKS, 4, 2)
GOOD = dict(input_ids=TOKENS, embedding=TABLE, prompts=PROMPTS, task_ids=TASKS)
NO_IDS = dict(input_ids=None)
BAD_INPUT = {
    "bos a str": (dict(after_bos="no"), TypeError, "after_bos must be a bool, got str"),
    "bos None": (dict(after_bos=None), TypeError, "after_bos must be a bool, got NoneType"),
    "prompts no tensor": (dict(prompts=[1.0]), TypeError, "prompts must be a tensor, got list"),
    "prompts integer": (dict(prompts=PROMPTS.int()), TypeError, "prompts must have dtype float32, .* got int32"),
    "prompts rank": (dict(prompts=PROMPTS[0, 0]), ValueError, r"\[num_tasks, P, E\] or \[P, E\], got \[8\]"),
    "prompts of rank 4": (dict(prompts=PROMPTS[None]), ValueError, r"got \[1, 2, 3, 8\]"),
    "no ids for two tasks": (dict(task_ids=None), ValueError, "task_ids must be given, .* holds 2 tasks, got None"),
    "no ids for no task": (dict(task_ids=None, prompts=PROMPTS[:0]), ValueError, "prompts holds 0 tasks, got None"),
    "task_ids no tensor": (dict(task_ids=[0, 1, 0, 1]), TypeError, "task_ids must be a tensor, got list"),
    "task_ids a plan": (dict(task_ids=PLAN), TypeError, "task_ids must be a tensor, got TaskPlan"),
    "task_ids float": (dict(task_ids=TASKS.float()), TypeError, "task_ids must have dtype int32, int64, got float32"),
    "task_ids rank": (dict(task_ids=TASKS[:, None]), ValueError, r"task_ids must have 1 dimension, got shape \[4, 1\]"),
    "task_ids too few": (dict(task_ids=TASKS[:2]), ValueError, r"shape \[4\], one per sequence, got \[2\]"),
    "task_ids elsewhere": (dict(task_ids=TASKS.to("meta")), ValueError, "task_ids must be on cpu, .* got meta"),
    "lengths no tensor": (dict(prompt_lengths=[3, 2]), TypeError, "prompt_lengths must be a tensor, got list"),
    "lengths float": (
        dict(prompt_lengths=TASKS[:2].float()),
        TypeError,
        "prompt_lengths must have dtype .* got float32",
    ),
    "lengths per sequence": (dict(prompt_lengths=TASKS), ValueError, r"shape \[2\], one per task, got \[4\]"),
    "lengths rank": (dict(prompt_lengths=TASKS[:2, None]), ValueError, r"have 1 dimension, got shape \[2, 1\]"),
    "no tokens": (dict(input_ids=None), ValueError, "or inputs_embeds, but one of them, got neither"),
    "tokens twice": (dict(inputs_embeds=EMBEDS), ValueError, "but one of them, got both"),
    "input_ids float": (dict(input_ids=TOKENS.float()), TypeError, "input_ids must have dtype .* got float32"),
    "input_ids rank": (dict(input_ids=TOKENS[0]), ValueError, r"input_ids must have 2 dimensions, got shape \[3\]"),
    "no embedding": (dict(embedding=None), TypeError, "embedding must be a tensor, got NoneType"),
    "embedding integer": (dict(embedding=TABLE.long()), TypeError, "embedding must have dtype .* got int64"),
    "embedding rank": (dict(embedding=TABLE[None]), ValueError, r"have 2 dimensions, got shape \[1, 5, 8\]"),
    "embedding width": (dict(embedding=TABLE[:, :7]), ValueError, r"embedding must have 8 features, .* got \[5, 7\]"),
    "embedding elsewhere": (dict(embedding=TABLE.to("meta")), ValueError, "embedding must be on cpu, .* got meta"),
    "embeds rank": (NO_IDS | dict(inputs_embeds=EMBEDS[0]), ValueError, r"have 3 dimensions, got shape \[3, 8\]"),
    "embeds width": (NO_IDS | dict(inputs_embeds=EMBEDS[..., :7]), ValueError, r"8 features, .* got \[4, 3, 7\]"),
    "embeds integer": (NO_IDS | dict(inputs_embeds=EMBEDS.int()), TypeError, "inputs_embeds must have .* got int32"),
    "mask no tensor": (dict(attention_mask=[[1] * 3] * 4), TypeError, "attention_mask must be a tensor, got list"),
    "mask complex": (dict(attention_mask=TOKENS.to(torch.complex64)), TypeError, "attention_mask .* got complex64"),
    "mask 4-D": (dict(attention_mask=TOKENS[:, None, None]), ValueError, r"got shape \[4, 1, 1, 3\]"),
    "mask of the output": (dict(attention_mask=torch.ones(4, 6)), ValueError, r"shape \[4, 3\], got \[4, 6\]"),
    "labels float": (dict(labels=TOKENS.float()), TypeError, "labels must have dtype int32, int64, got float32"),
    "labels shape": (dict(labels=TOKENS[:2]), ValueError, r"labels must have shape \[4, 3\], got \[2, 3\]"),
    "labels elsewhere": (dict(labels=TOKENS.to("meta")), ValueError, "labels must be on cpu, .* got meta"),
    "side": (dict(padding_side="LEFT"), ValueError, "padding_side must be 'right' or 'left', got 'LEFT'"),
    "side None": (dict(padding_side=None), ValueError, "padding_side must be 'right' or 'left', got None"),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case, backend):
    changes, error, match = BAD_INPUT[case]
    with peft_ops.set_backend(backend), pytest.raises(error, match=f"^prompt_concat: .*{match}"):
        prompt_concat(**GOOD | changes)


def test_fake_cuda_tensors():
    """Shapes, dtypes and checks without a GPU, as torch.compile and torch.export see them."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        ids = torch.zeros(4, 3, dtype=torch.int32, device="cuda")
        embedding = torch.empty(5, 8, device="cuda", dtype=torch.bfloat16)
        prompts, task_ids = torch.empty(2, 6, 8, device="cuda"), torch.zeros(4, dtype=torch.int32, device="cuda")
        for mask in (None, torch.ones(4, 3, dtype=torch.bool, device="cuda")):
            got = prompt_concat(ids, embedding, prompts, task_ids, attention_mask=mask, labels=ids)
            assert all(t.device.type == "cuda" and t.shape[:2] == (4, 9) for t in got)
            mask_dtype = torch.int64 if mask is None else torch.bool
            assert [t.dtype for t in got] == [torch.bfloat16, mask_dtype, torch.int64, torch.int32, torch.int64]
            assert got.inputs_embeds.shape == (4, 9, 8)
        layout = torch.ops.peft_ops.prompt_concat(
            ids, embedding, prompts, None, None, task_ids, *[None] * 4, *NOTHING_ADDED, False, False
        )[5]
        assert layout.shape == (4, 4) and layout.dtype == torch.int32
        dprompts = torch.ops.peft_ops.prompt_concat_backward(got.inputs_embeds, layout, 2, 6)
        assert dprompts.shape == (2, 6, 8) and dprompts.dtype == torch.float32 and dprompts.device.type == "cuda"
        with pytest.raises(ValueError, match=re.escape("task_ids must have shape [4], one per sequence, got [3]")):
            prompt_concat(ids, embedding, prompts, torch.zeros(3, dtype=torch.int32, device="cuda"))
