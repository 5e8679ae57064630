"""prompt_concat_packed: every row against a loop over sequences and tokens, against the padded operator, attention over
the rows, gradients, offsets gone wrong, layouts, tracing, and bad input."""

import re

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import peft_ops
from peft_ops import PackedPromptBatch, prompt_concat, prompt_concat_packed, reference
from peft_ops.ops import prompt_concat_packed as module
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
V = 11
COUNTS, TASKS, LENGTHS = [3, 0, 5, 1, 0, 4, 2], [0, 2, 1, -1, -1, 2, 0], [4, 0, 2]


def tensor(values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def offsets(counts, dtype=torch.int64):
    return tensor([0, *counts]).cumsum(0).to(dtype)


def make(total=15, P=4, E=8, dtype=torch.float32, num_tasks=3, prompts_dtype=None, ids_dtype=torch.int64):
    """input_ids [total], embedding [V, E] and prompts [num_tasks, P, E]."""
    return (
        torch.randint(V, (total,), device=DEVICE, dtype=ids_dtype),
        torch.randn(V, E, device=DEVICE).to(dtype),
        torch.randn(num_tasks, P, E, device=DEVICE).to(prompts_dtype or dtype),
    )


def sequences_of(total, cu_seqlens, prompts, task_ids=None, prompt_lengths=None, after_bos=False, num_rows=None):
    """For each sequence its task (-1 base, -2 bad) and what its rows hold, ("prompt", i) or ("token", index)."""
    (num_tasks, P), cu, room = prompts.shape[:2], cu_seqlens.tolist(), num_rows
    wrong = cu[0] != 0 or cu != sorted(cu) or cu[-1] > total
    for b, (start, end) in enumerate(zip(cu[:-1], cu[1:], strict=True)):
        task = 0 if task_ids is None else int(task_ids[b])
        task = task if -1 <= task < num_tasks and not wrong else -2
        length = P if prompt_lengths is None or task < 0 else min(max(int(prompt_lengths[task]), 0), P)
        rows = [("token", i) for i in range(min(max(start, 0), total), min(max(end, 0), total))]
        before = 1 if after_bos else 0
        rows[before:before] = [("prompt", i) for i in range(length if task >= 0 else 0)]
        if room is not None:
            rows, room = rows[:room], room - len(rows[:room])
        yield task, rows
    yield -2 if wrong else -1, []


def expected(
    input_ids, cu_seqlens, embedding, prompts, task_ids=None, *, max_seqlen=None, num_rows=None, labels=None,
    inputs_embeds=None, **kwargs
):  # fmt: skip
    """The specification, one row at a time: the PackedPromptBatch, and which rows hold a prompt."""
    prompts = prompts[None] if prompts.dim() == 2 else prompts
    tokens, P = (input_ids if inputs_embeds is None else inputs_embeds), prompts.shape[1]
    num_rows = len(tokens) + (len(cu_seqlens) - 1) * P if num_rows is None else num_rows
    dtype = (embedding if inputs_embeds is None else inputs_embeds).dtype
    out = torch.zeros(num_rows, prompts.shape[2], dtype=dtype, device=DEVICE)
    positions, token_map = torch.zeros(num_rows, dtype=torch.int64), torch.full((num_rows,), -1)
    new_labels = None if labels is None else torch.full((num_rows,), -100, dtype=labels.dtype)
    of_prompt, r, starts = torch.zeros(num_rows, dtype=torch.bool), 0, []
    for task, rows in sequences_of(len(tokens), cu_seqlens, prompts, task_ids, num_rows=num_rows, **kwargs):
        starts.append(r)
        for position, (kind, i) in enumerate(rows):
            if kind == "prompt":
                out[r], of_prompt[r] = prompts[task, i].to(dtype), True
            else:
                token_map[r] = i
                if labels is not None:
                    new_labels[r] = labels[i]
                if inputs_embeds is not None:
                    out[r] = inputs_embeds[i]
                else:
                    out[r] = embedding[input_ids[i]] if 0 <= int(input_ids[i]) < len(embedding) else NAN
            if task == -2:
                out[r] = NAN
            positions[r], r = position, r + 1
        if task == -2 and not rows and len(starts) == len(cu_seqlens):
            out[r:] = NAN  # the tail of a batch whose offsets are wrong
    positions, token_map, of_prompt = positions.to(DEVICE), token_map.to(DEVICE), of_prompt.to(DEVICE)
    new_labels = None if labels is None else new_labels.to(DEVICE)
    new_max = None if max_seqlen is None else max_seqlen + P
    batch = PackedPromptBatch(out, tensor(starts, torch.int32), new_max, positions, new_labels, token_map)
    return batch, of_prompt


def assert_batches_equal(got, want):
    for name, a, b in zip(want._fields, got, want, strict=True):
        if not isinstance(b, torch.Tensor):
            assert a == b, name
        elif b.is_floating_point():
            assert_same(a, b, bitwise=True)
        else:
            assert a.dtype == b.dtype and torch.equal(a, b), (name, a, b)


def check(*args, **kwargs):
    """Run the operator, compare all that it returns with the loop, and return it."""
    kwargs.setdefault("max_seqlen", 100)
    got = prompt_concat_packed(*args, **kwargs)
    with torch.no_grad():
        want, of_prompt = expected(*args, **kwargs)
    assert isinstance(got, PackedPromptBatch)
    assert_same(got.inputs_embeds, want.inputs_embeds)  # a prompt of another dtype is rounded, all else is copied
    assert_same(got.inputs_embeds[~of_prompt], want.inputs_embeds[~of_prompt], bitwise=True)
    assert_batches_equal(got._replace(inputs_embeds=want.inputs_embeds), want)
    assert all(t.is_contiguous() for t in got if isinstance(t, torch.Tensor))
    return got


@pytest.mark.parametrize("after_bos", [False, True], ids=["first", "after_bos"])
@pytest.mark.parametrize("with_lengths", [False, True], ids=["whole", "lengths"])
def test_every_row(with_lengths, after_bos, dtype):
    for roll in range(7):  # every count meets every task
        ids, embedding, prompts = make(dtype=dtype)
        kwargs = dict(prompt_lengths=tensor(LENGTHS)) if with_lengths else {}
        kwargs |= dict(labels=torch.randint(V, (15,), device=DEVICE), after_bos=after_bos)
        cu, task_ids = offsets(COUNTS), tensor(TASKS).roll(roll)
        want = check(ids, cu, embedding, prompts, task_ids, **kwargs)
        got = check(None, cu, None, prompts, task_ids, inputs_embeds=embedding[ids], **kwargs)
        assert_batches_equal(got, want)


def test_as_documented():
    """A prompt of two, none but the prompt, a prompt of one, the base model, and a tail of three rows."""
    embedding, prompts = torch.arange(10.0, device=DEVICE)[:, None], tensor([[[-1], [-2]], [[-3], [-4]]], torch.float32)
    ids, cu, task_ids = tensor([5, 6, 7, 8]), tensor([0, 2, 2, 3, 4]), tensor([0, 1, 1, -1])
    kwargs = dict(max_seqlen=2, prompt_lengths=tensor([2, 1]), labels=ids, num_rows=11)
    got = prompt_concat_packed(ids, cu, embedding, prompts, task_ids, **kwargs)
    assert got.inputs_embeds[:, 0].tolist() == [-1, -2, 5, 6, -3, -3, 7, 8, 0, 0, 0]
    assert got.cu_seqlens.tolist() == [0, 4, 5, 7, 8] and got.max_seqlen == 4
    assert got.position_ids.tolist() == [0, 1, 2, 3, 0, 0, 1, 0, 0, 0, 0]
    assert got.labels.tolist() == [-100, -100, 5, 6, -100, -100, 7, 8, -100, -100, -100]
    assert got.token_map.tolist() == [-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, -1]
    got = prompt_concat_packed(ids, cu, embedding, prompts, task_ids, after_bos=True, **kwargs)
    assert got.inputs_embeds[:, 0].tolist() == [5, -1, -2, 6, -3, 7, -3, 8, 0, 0, 0]
    assert got.token_map.tolist() == [0, -1, -1, 1, -1, 2, -1, 3, -1, -1, -1]


@pytest.mark.parametrize("counts", [[6], [0], [1], [0, 0, 0], [0, 4, 0], [1, 1, 1], []], ids=str)
@pytest.mark.parametrize("P", [0, 1, 4], ids="P{}".format)
def test_sizes(counts, P):
    total, B = sum(counts), len(counts)
    ids, embedding, prompts = make(total, P)
    for after_bos in (False, True):
        kwargs = dict(labels=ids, after_bos=after_bos)
        args = ids, offsets(counts), embedding, prompts
        check(*args, tensor([2, -1, 0][:B]), prompt_lengths=tensor([P, 0, P // 2]), **kwargs)
        check(*args, tensor([-1] * B), **kwargs)
        check(*args[:3], prompts[:1], **kwargs)
        check(*args[:3], prompts[1], prompt_lengths=tensor([P // 2]), num_rows=total + B * (P // 2), **kwargs)


@pytest.mark.parametrize("after_bos", [False, True], ids=["first", "after_bos"])
def test_thousands_of_sequences(after_bos):
    """The layout takes 1024 sequences at a time: the row that one piece ends at carries over, and so does what is
    wrong with the offsets of a later one."""
    B = 2500
    counts, task_ids = torch.randint(3, (B,), device=DEVICE), ids_like("uniform", B, 3)
    cu, (ids, embedding, prompts) = offsets(counts.tolist()), make(int(counts.sum()), 3, 2)
    kwargs = dict(prompt_lengths=tensor([3, 0, 1]), labels=ids, after_bos=after_bos)
    got = check(ids, cu, embedding, prompts, task_ids, **kwargs)
    assert got.cu_seqlens[-1] == len(ids) + (task_ids == 0).sum() * 3 + (task_ids == 2).sum()
    if KERNELS:
        cu[2400] += 5
        assert check(ids, cu, embedding, prompts, task_ids, **kwargs).inputs_embeds.isnan().all()


def test_base_batch_has_no_prompt(dtype):
    ids, embedding, prompts = make(dtype=dtype)
    cu, nobody = offsets(COUNTS), tensor([-1] * 7)
    for table in (prompts.fill_(NAN), prompts[:0]):
        got = check(ids, cu, embedding, table, nobody, labels=ids)
        assert torch.equal(got.inputs_embeds[:15], embedding[ids]) and not got.inputs_embeds[15:].any()
        assert torch.equal(got.cu_seqlens.long(), cu) and torch.equal(got.labels[:15], ids)
    check(ids, cu, embedding, prompts[:0], nobody, prompt_lengths=tensor([]).long())


@pytest.mark.parametrize("with_lengths", [False, True], ids=["whole", "lengths"])
def test_equals_the_padded_operator(with_lengths, dtype):
    """Right padding, taken out again: the same rows, positions and labels, and the same gradients to the bit."""
    ids, embedding, prompts = make(dtype=dtype, prompts_dtype=torch.float32)
    cu, counts, task_ids = offsets(COUNTS), tensor(COUNTS), tensor(TASKS)
    kwargs = dict(prompt_lengths=tensor(LENGTHS)) if with_lengths else {}
    mask = (torch.arange(5, device=DEVICE) < counts[:, None]).long()
    at = (cu[:-1, None] + torch.arange(5, device=DEVICE)).clamp(max=14)

    def run(f):
        e, p = embedding.clone().requires_grad_(), prompts.clone().requires_grad_()
        batch = f(e, p)
        return batch, lambda dout: torch.autograd.grad(batch.inputs_embeds, (e, p), dout)

    padded, padded_grads = run(
        lambda e, p: prompt_concat(ids[at], e, p, task_ids, attention_mask=mask, labels=ids[at], **kwargs)
    )
    packed, packed_grads = run(
        lambda e, p: prompt_concat_packed(ids, cu, e, p, task_ids, max_seqlen=5, labels=ids, **kwargs)
    )
    keep, rows = padded.attention_mask == 1, int(packed.cu_seqlens[-1])
    assert torch.equal(keep.sum(1), packed.cu_seqlens.diff())
    assert torch.equal(packed.inputs_embeds[:rows], padded.inputs_embeds[keep])
    assert torch.equal(packed.position_ids[:rows], padded.position_ids[keep])
    assert torch.equal(packed.labels[:rows], padded.labels[keep])
    index = torch.where(padded.token_map < 0, -1, padded.token_map + cu[:-1, None])
    assert torch.equal(packed.token_map[:rows], index[keep])
    dout = torch.randn_like(packed.inputs_embeds)
    dpadded = torch.zeros_like(padded.inputs_embeds)
    dpadded[keep] = dout[:rows]
    got, want = packed_grads(dout), padded_grads(dpadded)
    assert torch.equal(got[1], want[1])
    assert torch.allclose(got[0].float(), want[0].float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_integer_dtypes(ids_dtype):
    other = torch.int64 if ids_dtype == torch.int32 else torch.int32
    ids, embedding, prompts = make(ids_dtype=ids_dtype)
    labels = torch.randint(-(2**31), 2**31, (15,), device=DEVICE).to(other)
    for a, b in ((ids_dtype, other), (other, ids_dtype)):
        args = ids, offsets(COUNTS, a), embedding, prompts, tensor(TASKS, b)
        assert check(*args, prompt_lengths=tensor(LENGTHS, a), labels=labels).labels.dtype == other


@pytest.mark.parametrize("E", [1, 3, 31, 64, 65, 255, 1025, 4100])
def test_odd_widths_and_offsets(E, dtype):
    def shifted(t, offset):
        return torch.cat([t.new_zeros(offset), t.reshape(-1)])[offset:].view(t.shape)

    ids, embedding, prompts = make(7, 3, E, dtype)
    cu, task_ids = offsets([3, 0, 4]), tensor([1, 2, 0])
    for offset in (1, 4, 7):
        tables = shifted(embedding, offset), shifted(prompts, 8 - offset)
        args = shifted(cu, offset), *tables, shifted(task_ids, offset)
        check(shifted(ids, offset), *args, labels=shifted(ids, offset))
        embeds = shifted(torch.randn(7, E, device=DEVICE).to(dtype), offset)
        check(None, args[0], None, tables[1], task_ids, inputs_embeds=embeds)


@pytest.mark.parametrize("prompts_dtype", DTYPES, ids=lambda d: f"prompts_{name_of(d)}")
def test_prompts_of_another_dtype_are_rounded_once(prompts_dtype, dtype):
    ids, embedding, prompts = make(dtype=dtype, prompts_dtype=prompts_dtype)
    assert check(ids, offsets(COUNTS), embedding, prompts, tensor(TASKS)).inputs_embeds.dtype == dtype


def test_tokens_and_prompts_are_copied_to_the_bit(dtype):
    info, integer = torch.finfo(dtype), {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    row = tensor([INF, -INF, -0.0, info.tiny / 2, info.max, -info.max, info.tiny, 1.0], dtype)
    for tokens in ((tensor([0]), row[None], None), (None, None, row[None])):
        ids, table, embeds = tokens
        got = prompt_concat_packed(ids, tensor([0, 1]), table, row.flip(0)[None], max_seqlen=1, inputs_embeds=embeds)
        assert torch.equal(got.inputs_embeds.view(integer), torch.stack([row.flip(0), row]).view(integer))


STRIDED = {
    "every second": lambda t: torch.stack([t, torch.full_like(t, 7)], 1).flatten(0, 1)[::2],
    "last dimension": lambda t: torch.stack([t, torch.full_like(t, 7)], -1)[..., 0],
    "columns first": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
    "wide rows": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
}


@pytest.mark.parametrize("layout", STRIDED)
def test_strides(layout, dtype):
    strided, (ids, embedding, prompts) = STRIDED[layout], make(dtype=dtype)
    cu, task_ids, lengths = (strided(t) for t in (offsets(COUNTS), tensor(TASKS), tensor(LENGTHS)))
    kwargs = dict(prompt_lengths=lengths, labels=strided(ids))
    check(strided(ids), cu, strided(embedding), strided(prompts), task_ids, **kwargs)
    check(None, cu, None, strided(prompts), task_ids, inputs_embeds=strided(embedding[ids]), **kwargs)
    dout, args = torch.randn(43, 8, device=DEVICE).to(dtype), (ids, embedding, prompts, task_ids)
    for a, b in zip(gradients(args, strided(dout)), gradients(args, dout), strict=True):
        assert torch.equal(a, b)


def test_expanded_inputs():
    ids, embedding, prompts = make(num_tasks=1)
    task_ids = tensor([0]).expand(7)
    args = ids[:1].expand(15), offsets(COUNTS), embedding[:1].expand(V, -1), prompts.expand(3, -1, -1), task_ids
    check(*args, labels=ids[:1].expand(15), prompt_lengths=tensor([2]).expand(3))
    dout = torch.ones(1, 1, device=DEVICE).expand(43, 8)
    args = ids, embedding, prompts, task_ids
    for a, b in zip(gradients(args, dout), gradients(args, dout.contiguous()), strict=True):
        assert torch.equal(a, b)


def whole(message):
    """A pattern that is the whole message of a failed check."""
    return "^" + re.escape(f"prompt_concat_packed: {message}") + "$"


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("scale", [4.0, 48**0.5], ids=["exact", "gemma"])
def test_scale(scale, backend, dtype):
    """Rows of the table alone, as Gemma's module scales them: bit by bit, gradient included."""
    if INTERPRET and dtype == torch.bfloat16 and scale != 4.0:
        pytest.skip("the interpreter truncates to bf16")
    (ids, embedding, prompts), cu, task_ids = make(E=48, dtype=dtype), offsets(COUNTS), tensor(TASKS)
    kwargs, factor = dict(max_seqlen=5, labels=ids, after_bos=True), torch.tensor(scale).to(dtype)
    leaf, dout = embedding.clone().requires_grad_(), torch.randn(43, 48, device=DEVICE).to(dtype)
    with peft_ops.set_backend(backend):
        got = prompt_concat_packed(ids, cu, leaf, prompts, task_ids, embed_scale=scale, **kwargs)
        want = prompt_concat_packed(ids, cu, embedding * factor, prompts, task_ids, **kwargs)
        assert_batches_equal(got, want)
        (grad,) = torch.autograd.grad(got.inputs_embeds, leaf, dout)
        of_text = torch.where(got.token_map[:, None] >= 0, dout, 0)
        leaf = embedding.clone().requires_grad_()
        (leaf[ids.index_select(0, got.token_map.clamp(min=0))] * factor).backward(of_text)
        assert torch.allclose(grad.float(), leaf.grad.float(), rtol=0.02 if dtype != torch.float32 else 1e-5, atol=1e-2)
        given = prompt_concat_packed(
            None, cu, None, prompts, task_ids, inputs_embeds=embedding[ids], embed_scale=scale, **kwargs
        )
        assert_batches_equal(given, prompt_concat_packed(ids, cu, embedding, prompts, task_ids, **kwargs))


def test_max_position_embeddings():
    (ids, embedding, prompts), cu = make(), offsets(COUNTS)
    args = ids, cu, embedding, prompts, tensor(TASKS)
    prompt_concat_packed(*args, max_seqlen=5, max_position_embeddings=9)
    text = "max_position_embeddings must be at least max_seqlen + P = 5 + 4, got 8"
    with pytest.raises(ValueError, match=whole(text)):
        prompt_concat_packed(*args, max_seqlen=5, max_position_embeddings=8)


def test_number_of_rows():
    """As many as there are, more, and fewer: on a CPU an error that says how many, in a kernel rows left out."""
    ids, embedding, prompts = make()
    args, kwargs = (ids, offsets(COUNTS), embedding, prompts, tensor(TASKS)), dict(prompt_lengths=tensor(LENGTHS))
    needed, full = 15 + 4 + 2 + 2 + 4, None
    for num_rows in (needed, needed + 1, 43, 60):
        got = check(*args, num_rows=num_rows, labels=ids, **kwargs)
        full = got if full is None else full
        assert torch.equal(got.inputs_embeds[:needed], full.inputs_embeds) and not got.inputs_embeds[needed:].any()
        assert torch.equal(got.cu_seqlens, full.cu_seqlens)
    for num_rows in (needed - 1, 12, 7, 4, 1, 0):
        if not KERNELS:
            message = f"num_rows must be at least {needed} for these sequences and prompts, got {num_rows}"
            with pytest.raises(ValueError, match=whole(message)):
                check(*args, num_rows=num_rows, labels=ids, **kwargs)
            continue
        got = check(*args, num_rows=num_rows, labels=ids, **kwargs)
        assert torch.equal(got.inputs_embeds, full.inputs_embeds[:num_rows])
        assert torch.equal(got.cu_seqlens, full.cu_seqlens.clamp(max=num_rows))


def test_batch_of_fixed_sizes():
    """What a captured graph needs: tokens that no sequence covers, and empty sequences of the base model, add
    nothing."""
    ids, embedding, prompts = make(24)
    want = check(ids[:15], offsets(COUNTS), embedding, prompts, tensor(TASKS), num_rows=80, labels=ids[:15])
    cu, task_ids = offsets(COUNTS + [0] * 5), tensor(TASKS + [-1] * 5)
    ids[15:] = V + 5  # nobody reads what is not covered
    got = check(ids, cu, embedding, prompts, task_ids, num_rows=80, labels=ids)
    assert_batches_equal(got._replace(cu_seqlens=got.cu_seqlens[:8]), want)


BAD_OFFSETS = {
    "start": ([1, 3, 5], "start at 0, got 1"),
    "negative start": ([-3, 3, 5], "start at 0, got -3"),
    "smallest start": ([-(2**31), 3, 5], f"start at 0, got {-(2**31)}"),
    "decreasing": ([0, 7, 5, 9], "not decrease, got 5 after 7 at position 2"),
    "decreasing last": ([0, 7, 7, 6], "not decrease, got 6 after 7 at position 3"),
    "there and back": ([0, 15, 0, 15, 0, 15], "not decrease, got 0 after 15 at position 2"),
    "negative": ([0, -1, 5], "not decrease, got -1 after 0 at position 1"),
    "smallest": ([0, 5, -(2**31), 9], f"not decrease, got {-(2**31)} after 5 at position 2"),
    "largest inside": ([0, 2**31 - 1, 9], f"not decrease, got 9 after {2**31 - 1} at position 2"),
    "one too many": ([0, 4, 16], "end at 15 tokens at most, got 16"),
    "largest": ([0, 4, 2**31 - 1], f"end at 15 tokens at most, got {2**31 - 1}"),
    "all beyond": ([0, 100, 200, 300], "end at 15 tokens at most, got 300"),
    "no sequence": ([2], "start at 0, got 2"),
    "beyond 32 bits": ([0, 2**32, 2**33], f"end at 15 tokens at most, got {2**33}"),
    "beyond 32 bits inside": ([0, 2**32 + 4, 9], f"not decrease, got 9 after {2**32 + 4} at position 2"),
    "smallest of 64 bits": ([0, -(2**63), 9], f"not decrease, got {-(2**63)} after 0 at position 1"),
    "largest of 64 bits": ([0, 4, 2**63 - 1], f"end at 15 tokens at most, got {2**63 - 1}"),
}


@pytest.mark.parametrize("case", BAD_OFFSETS)
def test_bad_offsets(case, monkeypatch):
    """On a CPU an error with place and numbers; in a kernel all NaN, offsets that ascend, and nothing outside."""
    values, message = BAD_OFFSETS[case]
    dtypes = (torch.int32, torch.int64) if all(-(2**31) <= v < 2**31 for v in values) else (torch.int64,)
    for dtype, cu_dtype in ((dtype, cu) for dtype in DTYPES[:2] for cu in dtypes):
        tables = [guarded(V, 8, dtype=dtype, fill=7), guarded(3, 4, 8, dtype=dtype, fill=7)]
        (embedding, _), (prompts, _) = tables
        embedding.normal_(), prompts.normal_()
        ids, cu, task_ids = make()[0], tensor(values, cu_dtype), tensor([2, -1, 0, 1, 1])[: len(values) - 1]
        kwargs = dict(max_seqlen=2**62, labels=ids)
        if not KERNELS:
            with pytest.raises(ValueError, match=whole(f"cu_seqlens must {message}")):
                prompt_concat_packed(ids, cu, embedding, prompts, task_ids, **kwargs)
            continue
        with monkeypatch.context() as patch:
            patch.setattr(module, "torch", watched := _GuardedTorch())
            for num_rows in (None, 3, 200):
                got = check(ids, cu, embedding, prompts, task_ids, num_rows=num_rows, **kwargs)
                embeds = embedding[ids]
                check(None, cu, None, prompts, task_ids, inputs_embeds=embeds, num_rows=num_rows, **kwargs)
                assert got.inputs_embeds.isnan().all()
                assert (got.cu_seqlens.diff() >= 0).all() and got.cu_seqlens[-1] <= len(got.position_ids)
            assert watched.intact()
        assert all((buffer[:256] == 7).all() and (buffer[-256:] == 7).all() for _, buffer in tables)
        e, p, x = (t.clone().requires_grad_() for t in (embedding, prompts, embeds))
        out = prompt_concat_packed(ids, cu, e, p, task_ids, **kwargs).inputs_embeds
        grads = torch.autograd.grad(out, (e, p), torch.full_like(out, NAN))
        out = prompt_concat_packed(None, cu, None, p, task_ids, inputs_embeds=x, **kwargs).inputs_embeds
        grads += torch.autograd.grad(out, x, torch.full_like(out, NAN))
        assert not any(g.any() for g in grads)


@pytest.mark.skipif(not KERNELS, reason="elsewhere this is always on")
def test_debug_raises_for_kernels_too(monkeypatch):
    monkeypatch.setattr(module, "DEBUG", True)
    ids, embedding, prompts = make()
    rest = embedding, prompts, tensor(TASKS)
    for changes, message in (
        (dict(max_seqlen=4), "max_seqlen must be at least 5, as sequence 2 has, got 4"),
        (dict(num_rows=34), "num_rows must be at least 35 for these sequences and prompts, got 34"),
    ):
        with pytest.raises(ValueError, match=whole(message)):
            prompt_concat_packed(ids, offsets(COUNTS), *rest, **dict(max_seqlen=5) | changes)
    with pytest.raises(ValueError, match=whole("cu_seqlens must start at 0, got 1")):
        prompt_concat_packed(ids, offsets(COUNTS) + 1, *rest, max_seqlen=5)


@pytest.mark.skipif(KERNELS, reason="a kernel takes max_seqlen as it is")
def test_max_seqlen_too_small():
    ids, embedding, prompts = make()
    args = ids, offsets(COUNTS), embedding, prompts, tensor(TASKS)
    assert prompt_concat_packed(*args, max_seqlen=5).max_seqlen == 9
    with pytest.raises(ValueError, match=whole("max_seqlen must be at least 5, as sequence 2 has, got 4")):
        prompt_concat_packed(*args, max_seqlen=4)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("bad", [3, 4, -2, 2**31 - 1, -(2**31)])
def test_bad_task_id(bad, ids_dtype, dtype):
    ids, embedding, prompts = make(dtype=dtype)
    table, buffer = guarded(3, 4, 8, dtype=dtype, fill=7)  # a read outside would look like a number
    table.copy_(prompts)
    task_ids = tensor([0, 2, bad, -1, -1, 2, 0], ids_dtype)
    args, kwargs = (offsets(COUNTS), embedding, table, task_ids), dict(prompt_lengths=tensor(LENGTHS), labels=ids)
    if not KERNELS:
        with pytest.raises(IndexError, match=whole(f"task_ids must be in [-1, 3), got {bad} at position 2")):
            prompt_concat_packed(ids, *args, max_seqlen=5, **kwargs)
        return
    for tokens in (dict(), dict(inputs_embeds=embedding[ids])):
        head = (None, args[0], None) if tokens else (ids, *args[:2])
        got = check(*head, *args[2:], **tokens, **kwargs)
        nan = got.inputs_embeds.isnan().any(1)
        assert nan.sum() == 5 and nan[got.cu_seqlens[2] : got.cu_seqlens[3]].all()
    assert (buffer[:256] == 7).all() and (buffer[-256:] == 7).all()


@pytest.mark.parametrize("bad", [V, V + 1, -1, 2**31 - 1, -(2**31), 2**32, -(2**63)])
def test_bad_token(bad, dtype):
    ids, embedding, prompts = make(dtype=dtype, ids_dtype=torch.int32 if -(2**31) <= bad < 2**31 else torch.int64)
    table, buffer = guarded(V, 8, dtype=dtype, fill=7)
    table.copy_(embedding)
    ids[9] = bad
    args = ids, offsets(COUNTS), table, prompts, tensor(TASKS)
    if not KERNELS:
        with pytest.raises(IndexError, match=whole(f"input_ids must be in [0, {V}), got {bad} at position 9")):
            prompt_concat_packed(*args, max_seqlen=5)
        return
    got = check(*args, labels=ids)
    nan = got.inputs_embeds.isnan()
    assert nan.any(1).sum() == 1 and nan[got.token_map == 9].all()
    assert (buffer[:256] == 7).all() and (buffer[-256:] == 7).all()


@pytest.mark.parametrize("bad", [5, -1, 2**31 - 1, -(2**31), 2**32 + 1, -(2**63)])
def test_bad_length(bad):
    ids, embedding, prompts = make()
    lengths = tensor([2, bad, 4], torch.int32 if -(2**31) <= bad < 2**31 else torch.int64)
    args = ids, offsets(COUNTS), embedding, prompts, tensor(TASKS)
    if KERNELS:
        check(*args, prompt_lengths=lengths)
        return
    with pytest.raises(IndexError, match=whole(f"prompt_lengths must be in [0, 5), got {bad} at position 1")):
        prompt_concat_packed(*args, max_seqlen=5, prompt_lengths=lengths)


@pytest.mark.skipif(KERNELS, reason="refused before anything is allocated, on a CPU")
def test_more_rows_than_offsets_count():
    ids, embedding, prompts = make(E=0)
    with pytest.raises(ValueError, match=whole(f"num_rows must be below 2**31, as cu_seqlens are int32, got {2**31}")):
        prompt_concat_packed(ids, offsets(COUNTS), embedding, prompts, tensor(TASKS), max_seqlen=5, num_rows=2**31)


def gradients(args, dout, cu=None, embeds=None, f=prompt_concat_packed, **kwargs):
    """Of the embedding (or of inputs_embeds) and the prompts, from leaves of their own."""
    ids, embedding, prompts, task_ids = args
    source = (embedding if embeds is None else embeds).detach().clone().requires_grad_()
    p = prompts.detach().clone().requires_grad_()
    head = (ids, cu, source) if embeds is None else (None, cu, None)
    head = (head[0], offsets(COUNTS) if cu is None else cu, head[2])
    kwargs |= dict(inputs_embeds=None if embeds is None else source, max_seqlen=100)
    out = f(*head, p, task_ids, **kwargs).inputs_embeds
    return torch.autograd.grad(out, (source, p), dout.to(out.dtype))


def gradients_by_loop(args, dout, cu=None, **kwargs):
    """The embedding's in fp64, dprompts in fp32, summed over the batch in order; the tokens', copied."""
    ids, embedding, prompts, task_ids = args
    dtable = torch.zeros(embedding.shape, dtype=torch.float64, device=DEVICE)
    dprompts = torch.zeros(prompts.shape, dtype=torch.float32, device=DEVICE)
    dtokens, r = torch.zeros(len(ids), dout.shape[1], dtype=dout.dtype, device=DEVICE), 0
    cu = offsets(COUNTS) if cu is None else cu
    for task, rows in sequences_of(len(ids), cu, prompts, task_ids, num_rows=len(dout), **kwargs):
        for kind, i in rows:
            if kind == "prompt":
                dprompts[task, i] += dout[r].float()
            elif task != -2:
                dtokens[i] = dout[r]
                if 0 <= int(ids[i]) < len(embedding):
                    dtable[ids[i]] += dout[r].double()
            r += 1
    return dtable, dprompts, dtokens


@pytest.mark.parametrize("prompts_dtype", DTYPES, ids=lambda d: f"prompts_{name_of(d)}")
@pytest.mark.parametrize("E", [8, 1025], ids="E{}".format)
def test_gradients(E, prompts_dtype, dtype):
    ids, embedding, prompts = make(E=E, dtype=dtype, prompts_dtype=prompts_dtype)
    args, dout = (ids, embedding, prompts, tensor(TASKS)), torch.randn(43, E, device=DEVICE).to(dtype)
    kwargs = dict(prompt_lengths=tensor([4, 1, 2]), after_bos=dtype == torch.float16)
    dtable_64, dprompts_loop, dtokens_loop = gradients_by_loop(args, dout, **kwargs)
    dtable, dprompts = gradients(args, dout, **kwargs)
    dtable_ref, dprompts_ref = gradients(args, dout, f=reference.prompt_concat_packed, **kwargs)
    assert dprompts.dtype == prompts_dtype and torch.equal(dprompts, dprompts_loop.to(prompts_dtype))
    assert_as_good_as_torch(dtable, dtable_ref, dtable_64)
    doubles = ids, embedding.double(), prompts.double(), args[3]
    _, dprompts_64 = gradients(doubles, dout, f=reference.prompt_concat_packed, **kwargs)
    assert_as_good_as_torch(dprompts, dprompts_ref, dprompts_64)
    dtokens, dprompts = gradients(args, dout, embeds=embedding[ids], **kwargs)
    assert dtokens.dtype == dtype and torch.equal(dtokens, dtokens_loop)
    assert torch.equal(dprompts, dprompts_loop.to(prompts_dtype))


def test_gradient_of_many_sequences_of_one_task():
    """In the batch's order: against the loop, and no worse than torch's own sum against fp64."""
    B = 61 if INTERPRET else 1501
    ids, embedding, prompts = make(B, 2, 5)
    args, cu = (ids, embedding, prompts, ids_like("skewed", B, 3)), torch.arange(B + 1, device=DEVICE)
    dout = torch.randn(3 * B, 5, device=DEVICE)
    doubles, f = (ids, embedding.double(), prompts.double(), args[3]), reference.prompt_concat_packed
    _, got = gradients(args, dout, cu)
    assert_as_good_as_torch(got, gradients(args, dout, cu, f=f)[1], gradients(doubles, dout, cu, f=f)[1])
    assert torch.equal(got, gradients_by_loop(args, dout, cu)[1])


@pytest.mark.parametrize("after_bos", [False, True], ids=["first", "after_bos"])
def test_gradcheck_in_fp64(after_bos):
    for counts, P, E, num_tasks in [([2], 3, 2, 1), ([3, 0, 1, 2], 2, 3, 2), ([0, 0], 2, 1, 3), ([2, 1], 0, 2, 2)]:
        cu, task_ids = offsets(counts), ids_like("uniform", len(counts), num_tasks)
        ids, embedding, prompts = make(sum(counts) + 1, P, E, torch.float64, num_tasks)
        kwargs = dict(prompt_lengths=torch.randint(P + 1, (num_tasks,), device=DEVICE), after_bos=after_bos)
        leaves = embedding[ids].requires_grad_(), embedding.requires_grad_(), prompts.requires_grad_()

        def with_table(e, p, ids=ids, cu=cu, t=task_ids, kwargs=kwargs):
            return prompt_concat_packed(ids, cu, e, p, t, max_seqlen=9, **kwargs).inputs_embeds

        def with_embeds(x, p, cu=cu, t=task_ids, kwargs=kwargs):
            return prompt_concat_packed(None, cu, None, p, t, max_seqlen=9, inputs_embeds=x, **kwargs).inputs_embeds

        assert torch.autograd.gradcheck(with_table, leaves[1:], eps=1e-6, atol=1e-5)
        assert torch.autograd.gradcheck(with_embeds, leaves[::2], eps=1e-6, atol=1e-5)


def test_fp64_beside_another_dtype():
    for a, b in ((torch.float64, torch.float32), (torch.bfloat16, torch.float64)):
        ids, embedding, prompts = make(dtype=a, prompts_dtype=b)
        args, cu = (ids, embedding, prompts, tensor(TASKS)), offsets(COUNTS)
        dout = torch.randn_like(check(ids, cu, embedding, prompts, args[3]).inputs_embeds)
        de, dp = gradients(args, dout)
        assert de.dtype == a and dp.dtype == b
        assert torch.allclose(dp.double(), gradients_by_loop(args, dout)[1].double(), rtol=1e-6)


@pytest.mark.skipif(not KERNELS, reason="on a CPU what is bad raises before a gradient exists")
@pytest.mark.parametrize("num_rows", [43, 12, 7, 3, 0], ids="rows{}".format)
def test_what_is_bad_or_dropped_sends_no_gradient(num_rows):
    ids, embedding, prompts = make()
    ids[1], ids[4], ids[9], ids[14] = V, -1, 2**31 - 1, 2**32
    args, dout = (ids, embedding, prompts, tensor([0, 2, 7, -1, -2, 2, 0])), torch.randn(num_rows, 8, device=DEVICE)
    for kwargs in (dict(), dict(prompt_lengths=tensor(LENGTHS), after_bos=True)):
        dtable, dprompts, dtokens = gradients_by_loop(args, dout, **kwargs)
        got = gradients(args, dout, num_rows=num_rows, **kwargs)
        assert torch.allclose(got[0], dtable.float()) and torch.equal(got[1], dprompts)
        got = gradients(args, dout, embeds=embedding[ids % V], num_rows=num_rows, **kwargs)
        assert torch.equal(got[0], dtokens) and torch.equal(got[1], dprompts)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradient_of_text_and_tail_stays_out_of_the_prompts(backend):
    """dout is NaN wherever no prompt stands; a task without sequences, and rows beyond a prompt's length, get zeros."""
    args, kwargs = (*make(), tensor([0, 2, -1, -1, 2, 0, 0])), dict(prompt_lengths=tensor([4, 0, 2]))
    _, of_prompt = expected(args[0], offsets(COUNTS), *args[1:], **kwargs)
    with peft_ops.set_backend(backend):
        _, dprompts = gradients(args, torch.where(of_prompt, 1.0, NAN)[:, None].expand(-1, 8), **kwargs)
        dtable, _ = gradients(args, torch.where(of_prompt, NAN, 1.0)[:, None].expand(-1, 8), **kwargs)
    assert dprompts[..., 0].tolist() == [[3, 3, 3, 3], [0, 0, 0, 0], [2, 2, 0, 0]]
    assert torch.equal(dtable[:, 0], torch.bincount(args[0], minlength=V).float())


def test_gradient_only_where_asked(dtype, monkeypatch):
    ids, embedding, prompts = make(dtype=dtype)
    args, dout, calls = (ids, embedding, prompts, tensor(TASKS)), torch.randn(43, 8, device=DEVICE).to(dtype), []
    both, of_embeds = gradients(args, dout), gradients(args, dout, embeds=embedding[ids])
    for owner, name in ((module, "_backward_op"), (reference, "embedding_backward"), (reference, "take_packed_tokens")):
        f = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, f=f, name=name: calls.append(name) or f(*a))
    bytes_of = 20 * 8  # the layout and the offsets, of seven sequences and the tail
    cases = [
        ("embedding_backward", 1, both[0], bytes_of + 15 * 8),
        ("_backward_op", 2, both[1], bytes_of),
        ("take_packed_tokens", 0, of_embeds[0], bytes_of),
    ]
    for name, which, want, size in cases:
        leaves, saved = [embedding[ids], embedding.clone(), prompts.clone()], []
        leaves[which].requires_grad_()
        head = (ids, offsets(COUNTS), leaves[1]) if which else (None, offsets(COUNTS), None)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            embeds = None if which else leaves[0]
            batch = prompt_concat_packed(*head, leaves[2], args[3], max_seqlen=5, labels=ids, inputs_embeds=embeds)
        assert not any(t.requires_grad for t in batch[1:] if isinstance(t, torch.Tensor))
        assert torch.equal(torch.autograd.grad(batch.inputs_embeds, leaves[which], dout)[0], want)
        assert calls == [name] and calls.clear() is None
        assert sum(t.numel() * t.element_size() for t in saved) == size
    assert not check(ids, offsets(COUNTS), *args[1:]).inputs_embeds.requires_grad


def test_dprompts_do_not_depend_on_other_tasks(dtype):
    """Sequences of task 1 keep their order; what stands between them, and the others' gradients, change."""
    mine, P, E, seen = 12, 3, 24, []
    grads = torch.randn(mine, P + 2, E, device=DEVICE).to(dtype)
    for others in (0, 3, 20):
        B = mine + others
        at = torch.randperm(B, device=DEVICE)[:mine].sort().values
        task_ids = ids_like("uniform", B, 4)
        task_ids[task_ids == 1] = 2
        task_ids[at] = 1
        counts = torch.randint(5, (B,), device=DEVICE)
        counts[at] = 2
        cu, (ids, embedding, prompts) = offsets(counts.tolist()), make(int(counts.sum()), P, E, dtype, 4)
        args = ids, embedding, prompts.float(), task_ids
        new_cu = prompt_concat_packed(ids, cu, *args[1:], max_seqlen=5).cu_seqlens
        dout = torch.full((len(ids) + B * P, E), NAN if others == 3 else INF, device=DEVICE).to(dtype)
        for b, grad in zip(at.tolist(), grads, strict=True):
            dout[new_cu[b] : new_cu[b + 1]] = grad
        seen.append(gradients(args, dout, cu)[1][1])
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    assert seen[0].isfinite().all() and seen[0].any()


@pytest.mark.parametrize("after_bos", [False, True], ids=["first", "after_bos"])
def test_rows_are_independent(after_bos, dtype):
    """A sequence stays as it is when the others get other tasks, tokens and NaN, and when it stands alone."""
    ids, embedding, prompts = make(dtype=dtype)
    cu, task_ids, lengths = offsets(COUNTS), tensor(TASKS), tensor(LENGTHS)
    kwargs = dict(max_seqlen=5, prompt_lengths=lengths, after_bos=after_bos)

    def row(batch, b):
        rows = slice(batch.cu_seqlens[b], batch.cu_seqlens[b + 1])
        return batch.inputs_embeds[rows], batch.position_ids[rows], batch.labels[rows], batch.token_map[rows]

    before = prompt_concat_packed(ids, cu, embedding, prompts, task_ids, labels=ids, **kwargs)
    for b in range(7):
        mine = slice(cu[b], cu[b + 1])
        new_ids, new_tasks, tables = torch.full_like(ids, V), task_ids.roll(3), prompts.clone()
        new_ids[mine], new_tasks[b] = ids[mine], task_ids[b]
        tables[torch.arange(3, device=DEVICE) != task_ids[b]] = NAN
        table = torch.cat([embedding, torch.full_like(embedding[:1], NAN)])
        after = prompt_concat_packed(new_ids, cu, table, tables, new_tasks, labels=ids, **kwargs)
        assert all(torch.equal(x, y) for x, y in zip(row(before, b), row(after, b), strict=True))
        tokens = ids[mine]
        alone = tokens, offsets([len(tokens)]), embedding, prompts, task_ids[b : b + 1]
        after = row(prompt_concat_packed(*alone, labels=tokens, **kwargs), 0)
        assert all(torch.equal(x, y) for x, y in zip(row(before, b)[:3], after[:3], strict=True))


def test_repeats_are_bitwise_equal():
    ids, embedding, prompts = make(E=40, dtype=torch.bfloat16, prompts_dtype=torch.float32)
    args, dout = (ids, embedding, prompts, tensor(TASKS)), torch.randn(43, 40, device=DEVICE).bfloat16()

    def run():
        batch = prompt_concat_packed(ids, offsets(COUNTS), *args[1:], max_seqlen=5, labels=ids)
        return *(t for t in batch if isinstance(t, torch.Tensor)), *gradients(args, dout)

    first = run()
    for _ in range(250 if DEVICE == "cuda" else 50):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


class _GuardedTorch:
    """torch, but for allocations: they lie between two margins of 0x7F bytes, which `intact` looks at."""

    def __init__(self):
        self.buffers = []

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, size, *, dtype, device):
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
    for trial in range(12 if INTERPRET else 300):
        B, P, E, num_tasks = (int(torch.randint(1, n, (1,), generator=generator)) for n in (9, 12, 90, 4))
        counts, dtype = torch.randint(9, (B,), generator=generator).tolist(), DTYPES[trial % 3]
        total = sum(counts)
        (table, e_buffer), (prompts, p_buffer) = guarded(V, E, dtype=dtype), guarded(num_tasks, P, E, dtype=dtype)
        embeds, x_buffer = guarded(total, E, dtype=dtype)
        for t in (table, prompts, embeds):
            t.normal_().requires_grad_()
        ids, lengths = torch.randint(V, (total,), device=DEVICE), torch.randint(P + 1, (num_tasks,), device=DEVICE)
        kwargs = dict(prompt_lengths=lengths, labels=ids, max_seqlen=9, after_bos=trial % 2 == 1)
        rest = prompts, ids_like("uniform", B, num_tasks)
        for head, x in (((ids, offsets(counts), table), None), ((None, offsets(counts), None), embeds)):
            batch = prompt_concat_packed(*head, *rest, inputs_embeds=x, **kwargs)
            assert batch.inputs_embeds.isfinite().all(), "read outside a tensor"
            dout, d_buffer = guarded(*batch.inputs_embeds.shape, dtype=dtype)
            grads = torch.autograd.grad(
                batch.inputs_embeds, (prompts, table if x is None else x), dout.normal_(), allow_unused=not total
            )
            assert all(g is None or g.isfinite().all() for g in grads), "read outside the gradient"
            for buffer in (e_buffer, p_buffer, x_buffer, d_buffer):
                assert_guards(buffer.detach())
        assert watched.intact() and (watched.buffers or not KERNELS)
        watched.buffers.clear()


ZERO = [
    ([], 0, 2, 8, 3),
    ([], 4, 2, 8, 3),
    ([0, 0], 0, 2, 8, 3),
    ([2, 1], 3, 0, 8, 3),
    ([2, 1], 3, 2, 0, 3),
    ([2], 2, 2, 8, 0),
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("sizes", ZERO, ids=str)
def test_zero_sizes(sizes, backend, dtype):
    counts, total, P, E, num_tasks = sizes
    ids, embedding, prompts = make(total, P, E, dtype, num_tasks)
    args = ids, embedding, prompts, ids_like("uniform", len(counts), num_tasks)
    with peft_ops.set_backend(backend):
        got = check(ids, offsets(counts), *args[1:], labels=ids)
        embeds = torch.zeros(total, E, dtype=dtype, device=DEVICE)
        check(None, offsets(counts), None, *args[2:], inputs_embeds=embeds, labels=ids)
        if backend == "auto":  # plain PyTorch has no graph where nothing is gathered
            dout = torch.ones_like(got.inputs_embeds)
            (de, dp), (dx, _) = gradients(args, dout, offsets(counts)), gradients(args, dout, offsets(counts), embeds)
            want = gradients_by_loop(args, dout, offsets(counts))
            assert torch.equal(de.double(), want[0]) and torch.equal(dp.float(), want[1]) and torch.equal(dx, want[2])


def test_empty_vocabulary():
    ids, embedding, prompts = make(3)
    check(ids[:0], offsets([0, 0]), embedding[:0], prompts, tensor([1, -1]))
    if KERNELS:
        assert check(ids, offsets([2, 1]), embedding[:0], prompts, tensor([1, -1])).inputs_embeds.isnan().sum() == 24
        return
    with pytest.raises(IndexError, match=r"input_ids must be in \[0, 0\), got"):
        prompt_concat_packed(ids, offsets([2, 1]), embedding[:0], prompts, tensor([1, -1]), max_seqlen=2)


@settings(max_examples=20 if INTERPRET else 100, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 7), max_size=9), st.tuples(st.integers(0, 6), st.integers(1, 40), st.integers(1, 4)),
    st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)), st.tuples(*[st.booleans()] * 3),
    st.tuples(st.integers(0, 3), st.integers(0, 2**31)),
)  # fmt: skip
def test_anything_against_the_loop(counts, sizes, dtypes, flags, extra_and_seed):
    (P, E, num_tasks), (dtype, prompts_dtype), (embeds, with_lengths, after_bos) = sizes, dtypes, flags
    extra, seed = extra_and_seed
    torch.manual_seed(seed)
    ids, embedding, prompts = make(sum(counts) + extra, P, E, dtype, num_tasks, prompts_dtype)
    head = (None, offsets(counts), None) if embeds else (ids, offsets(counts), embedding)
    check(
        *head, prompts, ids_like("uniform", len(counts), num_tasks), inputs_embeds=embedding[ids] if embeds else None,
        prompt_lengths=torch.randint(P + 1, (num_tasks,), device=DEVICE) if with_lengths else None,
        labels=ids if with_lengths else None, after_bos=after_bos,
        num_rows=sum(counts) + len(counts) * P + extra,
    )  # fmt: skip


def varlen_attention(q, k, v, cu_seqlens, max_seqlen):
    """[rows, H, D], as a kernel for variable lengths has it: causal, each sequence by itself, 0 in rows of none."""
    out = torch.zeros_like(q)
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        assert end - start <= max_seqlen  # a kernel would leave out the rest
        rows = [t[None, start:end].transpose(1, 2) for t in (q, k, v)]
        out[start:end] = F.scaled_dot_product_attention(*rows, is_causal=True)[0].transpose(0, 1)
    return out


@pytest.mark.parametrize("after_bos", [False, True], ids=["first", "after_bos"])
def test_attention_over_the_rows_is_attention_over_a_padded_batch(after_bos):
    """Q, K and V from the rows, rotated by position_ids; per sequence as in a batch padded to the longest."""
    ids, embedding, prompts = make(E=16, dtype=torch.float64)
    cu, task_ids, H, D = offsets(COUNTS), tensor(TASKS), 2, 8
    kwargs = dict(max_seqlen=5, prompt_lengths=tensor(LENGTHS), after_bos=after_bos)
    batch = prompt_concat_packed(ids, cu, embedding, prompts, task_ids, **kwargs)
    weights = torch.randn(3, 16, 16, dtype=torch.float64, device=DEVICE)

    def qkv(x, positions):
        q, k, v = (x @ w for w in weights)
        angle = positions[..., None] / 10 ** torch.arange(16, device=DEVICE)
        return [t.unflatten(-1, (H, D)) for t in (q * angle.cos(), k * angle.cos(), v)]

    packed = varlen_attention(*qkv(batch.inputs_embeds, batch.position_ids), batch.cu_seqlens, batch.max_seqlen)
    new_counts = batch.cu_seqlens.diff()
    assert new_counts.max() <= batch.max_seqlen == 9
    position = torch.arange(9, device=DEVICE).expand(7, -1)
    valid = position < new_counts[:, None]
    x = torch.zeros(7, 9, 16, dtype=torch.float64, device=DEVICE)
    x[valid] = batch.inputs_embeds[: batch.cu_seqlens[-1]]
    q, k, v = (t.transpose(1, 2) for t in qkv(x, position))
    padded = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    assert torch.allclose(packed[: batch.cu_seqlens[-1]], padded[valid], rtol=1e-12, atol=1e-12)
    assert not packed[batch.cu_seqlens[-1] :].any()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_models_see_each_sequence_as_if_alone(name):
    """One row of packed sequences, a mask of blocks as varlen attention has it: logits as of each sequence alone."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=V, bos_token_id=0, eos_token_id=0)
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **sizes)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64, **sizes,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    model = model.eval().to(DEVICE)
    ids, _, prompts = make(E=16)
    embedding, cu, lengths = model.get_input_embeddings().weight, offsets(COUNTS), tensor([4, 1, 2])
    batch = prompt_concat_packed(ids, cu, embedding, prompts, tensor(TASKS), max_seqlen=5, prompt_lengths=lengths)
    row = torch.arange(43, device=DEVICE)
    sequence = torch.searchsorted(batch.cu_seqlens.long(), row, right=True)
    allowed = (sequence[:, None] == sequence) & (row[:, None] >= row)
    mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[None, None]
    inputs = dict(inputs_embeds=batch.inputs_embeds[None], position_ids=batch.position_ids[None], attention_mask=mask)
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[0]
        for b, task in enumerate(TASKS):
            start, end = batch.cu_seqlens[b : b + 2].tolist()
            prompt = prompts[task, : lengths[task]] if task >= 0 else prompts[0, :0]
            alone = torch.cat([prompt, embedding[ids[cu[b] : cu[b + 1]]]])[None]
            if end > start:
                want = model(inputs_embeds=alone, use_cache=False).logits[0]
                assert torch.allclose(logits[start:end], want, atol=1e-5), (logits[start:end] - want).abs().max()


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("with_ids", [False, True], ids=["one_task", "ids"])
@pytest.mark.parametrize("embeds", [False, True], ids=["input_ids", "inputs_embeds"])
def test_opcheck(embeds, with_ids, grad):
    ids, embedding, prompts = make(8, 3, num_tasks=3 if with_ids else 1)
    cu, prompts = offsets([3, 0, 4, 1]), prompts.requires_grad_(grad)
    tokens, table = (embedding[ids], None) if embeds else (ids, embedding)
    (tokens if embeds else table).requires_grad_(grad)
    task_ids, lengths, labels = (tensor([0, 2, -1, 1]), tensor([3, 0, 2]), ids.int()) if with_ids else (None,) * 3
    args = tokens, cu, table, prompts, task_ids, lengths, labels, 4, 22, 2.0, with_ids
    torch.library.opcheck(torch.ops.peft_ops.prompt_concat_packed, args)
    with torch.no_grad():
        out, new_cu, *_, layout = torch.ops.peft_ops.prompt_concat_packed(*args)
    sizes = 8, prompts.shape[0], 3, 22
    want = reference.packed_layout(cu, task_ids, lengths, sizes, with_ids)
    assert torch.equal(layout, want[0]) and torch.equal(new_cu, want[1])
    backward = torch.randn_like(out), layout, new_cu, prompts.shape[0], 3
    torch.library.opcheck(torch.ops.peft_ops.prompt_concat_packed_backward, backward)


@pytest.mark.parametrize("sizes", [([2, 3], 0), ([0, 0], 3), ([], 2), ([], 0)], ids=str)
def test_opcheck_of_nothing(sizes):
    counts, P = sizes
    ids, embedding, prompts = make(sum(counts), P)
    args = ids, offsets(counts), embedding, prompts, tensor([1, -1][: len(counts)]), None, None, 3, 8, 1.0, True
    torch.library.opcheck(torch.ops.peft_ops.prompt_concat_packed, args)


def test_operator_called_raw():
    ids, embedding, prompts = make()
    task_ids, dout = tensor(TASKS), torch.randn(43, 8, device=DEVICE)
    op, backward = torch.ops.peft_ops.prompt_concat_packed, torch.ops.peft_ops.prompt_concat_packed_backward
    e, p = embedding.clone().requires_grad_(), prompts.clone().requires_grad_()
    args = offsets(COUNTS), e, p, task_ids, tensor(LENGTHS), ids, 5, 43, 1.0, False
    batch = op(ids, *args)
    assert [t.requires_grad for t in batch] == [True] + [False] * 5
    want = gradients((ids, embedding, prompts, task_ids), dout, prompt_lengths=tensor(LENGTHS))
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(batch[0], (e, p), dout), want, strict=True))
    strided = STRIDED["last dimension"]
    with torch.no_grad():
        for a, b in zip(op(*(strided(t) for t in (ids, *args[:6])), *args[6:]), batch, strict=True):
            assert torch.equal(a, b)
        layout, cu = batch[5], batch[1]
        assert torch.equal(
            backward(strided(dout), strided(layout), strided(cu), 3, 4), backward(dout, layout, cu, 3, 4)
        )


@pytest.mark.parametrize("embeds", [False, True], ids=["input_ids", "inputs_embeds"])
def test_compiles_with_dynamic_shapes(embeds):
    def loss(ids, cu, embedding, prompts, task_ids, lengths, max_seqlen):
        head = (None, cu, None) if embeds else (ids, cu, embedding)
        kwargs = dict(max_seqlen=max_seqlen, prompt_lengths=lengths, labels=ids, after_bos=True)
        kwargs |= dict(inputs_embeds=embedding[ids]) if embeds else {}
        batch = prompt_concat_packed(*head, prompts, task_ids, **kwargs)
        weight = (1 + batch.position_ids + batch.labels.clamp(min=0) + batch.token_map)[:, None] + batch.cu_seqlens[-1]
        return (batch.inputs_embeds * weight).square().sum() * batch.max_seqlen

    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=frames, fullgraph=True, dynamic=True)
    for counts in ([3, 4], [3, 0, 4], [5, 6, 2], [2, 9, 4, 1, 0, 3], [7, 8, 9, 2]):
        ids, embedding, prompts = make(sum(counts))
        args = ids, offsets(counts), embedding.requires_grad_(), prompts.requires_grad_()
        args = *args, ids_like("uniform", len(counts), 3), tensor([4, 1, 0]), max(counts)
        want, got = loss(*args), compiled(*args)
        assert torch.allclose(got, want)
        for a, b in zip(torch.autograd.grad(got, args[2:4]), torch.autograd.grad(want, args[2:4]), strict=True):
            assert torch.allclose(a, b, rtol=1e-5)
    assert frames.frame_count <= 2


def test_exports_and_loads(tmp_path):
    class Prompted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Parameter(torch.randn(V, 8))
            self.prompts = torch.nn.Parameter(torch.randn(3, 4, 8))
            self.register_buffer("lengths", torch.tensor(LENGTHS))

        def forward(self, ids, cu, task_ids):
            args = ids, cu, self.embedding, self.prompts, task_ids
            return tuple(prompt_concat_packed(*args, max_seqlen=9, prompt_lengths=self.lengths, labels=ids))

    model, dims = Prompted().to(DEVICE), torch.export.Dim
    sequences = dims("sequences", min=2, max=64)
    dynamic = {"ids": {0: dims("total", min=2)}, "cu": {0: sequences + 1}, "task_ids": {0: sequences}}
    args = make()[0], offsets(COUNTS), tensor(TASKS)
    program = torch.export.export(model, args, dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "prompted.pt2")
    loaded = torch.export.load(tmp_path / "prompted.pt2").module()
    args = make(20)[0], offsets([7, 0, 9, 3]), tensor([1, 0, 2, -1])
    for a, b in zip(loaded(*args), model(*args), strict=True):
        assert a == b if isinstance(b, int) else torch.equal(a, b)
    assert any("prompt_concat_packed" in str(node.target) for node in program.graph.nodes)


def test_functorch_goes_through_the_reference():
    ids, embedding, prompts = make()
    args, weight = (ids, embedding, prompts, tensor(TASKS)), torch.randn(43, 8, device=DEVICE)

    def f(p):
        return prompt_concat_packed(ids, offsets(COUNTS), embedding, p, args[3], max_seqlen=5).inputs_embeds

    got = torch.func.grad(lambda p: (f(p) * weight).sum())(prompts)
    assert torch.allclose(got, gradients(args, weight)[1], atol=1e-6)
    stacked = torch.stack([prompts, 2 * prompts])
    batched = torch.vmap(f)(stacked)
    assert all(torch.equal(batched[i], f(stacked[i])) for i in range(2))


def test_higher_derivatives_refuse():
    ids, embedding, prompts = make()
    leaves = [t.clone().requires_grad_() for t in (embedding, prompts)]

    def f(e, p):
        return prompt_concat_packed(ids, offsets(COUNTS), e, p, tensor(TASKS), max_seqlen=5).inputs_embeds

    for i, leaf in enumerate(leaves):
        with pytest.raises(RuntimeError, match="prompt_concat_packed: double backward is not supported"):
            torch.autograd.grad(f(*leaves).square().sum(), leaf, create_graph=True)
        with torch.autograd.forward_ad.dual_level():
            tables = [embedding, prompts]
            tables[i] = torch.autograd.forward_ad.make_dual(tables[i], torch.ones_like(tables[i]))
            with pytest.raises(NotImplementedError, match="prompt_concat_packed: forward-mode AD is not supported"):
                f(*tables)


def test_checkpointing_recomputes_the_same():
    from torch.utils.checkpoint import checkpoint

    ids, embedding, prompts = make()
    args, dout = (ids, embedding, prompts, tensor(TASKS)), torch.randn(43, 8, device=DEVICE)

    def run(p):
        return prompt_concat_packed(ids, offsets(COUNTS), embedding, p, args[3], max_seqlen=5).inputs_embeds

    for reentrant in (False, True):
        (p := prompts.clone().requires_grad_()), checkpoint(run, p, use_reentrant=reentrant).backward(dout)
        assert torch.equal(p.grad, gradients(args, dout)[1])


def test_reference_backend_is_plain_torch(dtype):
    ids, embedding, prompts = make(dtype=dtype, prompts_dtype=torch.float32)
    args = ids, offsets(COUNTS), embedding, prompts.requires_grad_(), tensor(TASKS)
    kwargs = dict(max_seqlen=5, prompt_lengths=tensor(LENGTHS), labels=ids)
    with peft_ops.set_backend("reference"):
        got = prompt_concat_packed(*args, **kwargs)
    assert "prompt_concat_packed" not in got.inputs_embeds.grad_fn.name()
    with torch.no_grad():
        assert_batches_equal(got, expected(*args, **kwargs)[0])


TOKENS, TABLE, EMBEDS = torch.zeros(6, dtype=torch.int64), torch.zeros(5, 8), torch.zeros(6, 8)
PROMPTS, IDS, CU = torch.zeros(2, 3, 8), torch.zeros(2, dtype=torch.int64), torch.tensor([0, 4, 6])
GOOD = dict(input_ids=TOKENS, cu_seqlens=CU, embedding=TABLE, prompts=PROMPTS, task_ids=IDS, max_seqlen=4)
NO_IDS = dict(input_ids=None)
BAD_INPUT = {
    "prompts list": (dict(prompts=[1.0]), TypeError, "prompts must be a tensor, got list"),
    "prompts integer": (dict(prompts=PROMPTS.int()), TypeError, "prompts must have dtype float32, .* got int32"),
    "prompts rank": (dict(prompts=PROMPTS[0, 0]), ValueError, r"\[num_tasks, P, E\] or \[P, E\], got \[8\]"),
    "no ids for two tasks": (dict(task_ids=None), ValueError, "task_ids must be given, .* holds 2 tasks, got None"),
    "tasks a plan": (dict(task_ids=peft_ops.plan_tasks(IDS, 2, 2)), TypeError, "be a tensor, got TaskPlan"),
    "tasks float": (dict(task_ids=IDS.float()), TypeError, "task_ids must have dtype int32, int64, got float32"),
    "tasks per token": (dict(task_ids=TOKENS), ValueError, r"task_ids must have shape \[2\], one per seq.*got \[6\]"),
    "offsets None": (dict(cu_seqlens=None), TypeError, "cu_seqlens must be a tensor, got NoneType"),
    "offsets float": (dict(cu_seqlens=CU.float()), TypeError, "cu_seqlens must have dtype int32, int64, got float32"),
    "offsets rank": (dict(cu_seqlens=CU[None]), ValueError, r"cu_seqlens must have 1 dimension, got shape \[1, 3\]"),
    "offsets empty": (dict(cu_seqlens=CU[:0]), ValueError, r"cu_seqlens must have B \+ 1 entries .*, got none"),
    "offsets elsewhere": (dict(cu_seqlens=CU.to("meta")), ValueError, "cu_seqlens must be on cpu, .* got meta"),
    "lengths list": (dict(prompt_lengths=[3, 2]), TypeError, "prompt_lengths must be a tensor, got list"),
    "lengths per token": (dict(prompt_lengths=TOKENS), ValueError, r"shape \[2\], one per task, got \[6\]"),
    "no tokens": (NO_IDS, ValueError, "or inputs_embeds, but one of them, got neither"),
    "tokens twice": (dict(inputs_embeds=EMBEDS), ValueError, "but one of them, got both"),
    "input_ids float": (dict(input_ids=TOKENS.float()), TypeError, "input_ids must have dtype .* got float32"),
    "input_ids padded": (dict(input_ids=TOKENS[None]), ValueError, r"input_ids must have 1 dimension, .*\[1, 6\]"),
    "no embedding": (dict(embedding=None), TypeError, "embedding must be a tensor, got NoneType"),
    "embedding integer": (dict(embedding=TABLE.long()), TypeError, "embedding must have dtype .* got int64"),
    "embedding width": (dict(embedding=TABLE[:, :7]), ValueError, r"embedding must have 8 features, .* got \[5, 7\]"),
    "embedding elsewhere": (dict(embedding=TABLE.to("meta")), ValueError, "embedding must be on cpu, .* got meta"),
    "embeds padded": (NO_IDS | dict(inputs_embeds=EMBEDS[None]), ValueError, r"2 dimensions, got shape \[1, 6, 8\]"),
    "embeds width": (NO_IDS | dict(inputs_embeds=EMBEDS[:, :7]), ValueError, r"inputs_embeds must have 8 .*\[6, 7\]"),
    "embeds integer": (NO_IDS | dict(inputs_embeds=EMBEDS.int()), TypeError, "inputs_embeds must have .* got int32"),
    "labels float": (dict(labels=TOKENS.float()), TypeError, "labels must have dtype int32, int64, got float32"),
    "labels too few": (dict(labels=TOKENS[:2]), ValueError, r"labels must have shape \[6\], one per token, got \[2\]"),
    "longest a tensor": (dict(max_seqlen=CU[1]), TypeError, "max_seqlen must be an int, got Tensor"),
    "longest None": (dict(max_seqlen=None), TypeError, "max_seqlen must be an int, got NoneType"),
    "longest negative": (dict(max_seqlen=-1), ValueError, "max_seqlen must be at least 0, got -1"),
    "rows a float": (dict(num_rows=12.0), TypeError, "num_rows must be an int, got float"),
    "rows a bool": (dict(num_rows=True), TypeError, "num_rows must be an int, got bool"),
    "rows negative": (dict(num_rows=-1), ValueError, "num_rows must be at least 0, got -1"),
    "bos a number": (dict(after_bos=2), TypeError, "after_bos must be a bool, got int"),
    "scale a str": (dict(embed_scale="2"), TypeError, "embed_scale must be a number, got str"),
    "limit a str": (dict(max_position_embeddings="9"), TypeError, "max_position_embeddings must be an int, got str"),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case, backend):
    changes, error, match = BAD_INPUT[case]
    with peft_ops.set_backend(backend), pytest.raises(error, match=f"^prompt_concat_packed: .*{match}"):
        prompt_concat_packed(**GOOD | changes)


def test_fake_cuda_tensors():
    """Shapes, dtypes and checks without a GPU, as torch.compile and torch.export see them."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        ids, cu, task_ids = (torch.zeros(n, dtype=torch.int32, device="cuda") for n in (20, 5, 4))
        embedding, prompts = torch.empty(5, 8, device="cuda").bfloat16(), torch.empty(2, 6, 8, device="cuda")
        for num_rows, rows in ((None, 44), (31, 31)):
            args = ids, cu, embedding, prompts, task_ids
            got = prompt_concat_packed(*args, max_seqlen=7, num_rows=num_rows, labels=ids)
            tensors = [t for t in got if not isinstance(t, int)]
            assert got.max_seqlen == 13 and all(t.device.type == "cuda" for t in tensors)
            assert [list(t.shape) for t in tensors] == [[rows, 8], [5], [rows], [rows], [rows]]
            assert [t.dtype for t in tensors] == [
                torch.bfloat16, torch.int32, torch.int64, torch.int32, torch.int64
            ]  # fmt: skip
        layout = torch.ops.peft_ops.prompt_concat_packed(*args, None, None, 7, 44, 1.0, False)[5]
        assert layout.shape == (5, 4) and layout.dtype == torch.int32
        dprompts = torch.ops.peft_ops.prompt_concat_packed_backward(got.inputs_embeds, layout, got.cu_seqlens, 2, 6)
        assert dprompts.shape == (2, 6, 8) and dprompts.dtype == torch.float32 and dprompts.device.type == "cuda"
        with pytest.raises(ValueError, match=re.escape("task_ids must have shape [4], one per sequence, got [3]")):
            prompt_concat_packed(*args[:4], torch.zeros(3, dtype=torch.int32, device="cuda"), max_seqlen=7)
