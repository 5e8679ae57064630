"""prompt_embed: every token against a loop over rows and tokens, gradients, layouts, tracing, and bad input."""

import re

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

import peft_ops
from peft_ops import prompt_concat, prompt_embed, reference
from peft_ops.ops import prompt_embed as module
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
NOTHING_ADDED = (None, None, 0, 1.0)  # position_ids, token_type_ids, position_offset, embed_scale of the raw operator


def tensor(values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def make(B=5, S=9, P=4, E=8, dtype=torch.float32, num_tasks=3, prompts_dtype=None, ids_dtype=torch.int64, lengths=None):
    """input_ids, half of them virtual, embedding [V, E], prompts [num_tasks, P, E], and good task ids."""
    task_ids = ids_like("uniform", B, num_tasks)
    ends = torch.full((num_tasks,), P, device=DEVICE) if lengths is None else lengths
    end = torch.where(task_ids < 0, 0, ends[task_ids.clamp(min=0)] if num_tasks else 0)[:, None]
    virtual = V + torch.randint(2**20, (B, S), device=DEVICE) % end.clamp(min=1)
    ids = torch.where((torch.rand(B, S, device=DEVICE) < 0.5) & (end > 0), virtual, torch.randint(V, (B, S)).to(DEVICE))
    return (
        ids.to(ids_dtype),
        torch.randn(V, E, device=DEVICE).to(dtype),
        torch.randn(num_tasks, P, E, device=DEVICE).to(prompts_dtype or dtype),
        task_ids,
    )


def slots_of(input_ids, vocabulary, prompts, task_ids=None, prompt_lengths=None):
    """For each sequence and token (b, s, "token" | (task, p) | None for NaN)."""
    num_tasks, P = prompts.shape[:2]
    for b, row in enumerate(input_ids.tolist()):
        task = 0 if task_ids is None else int(task_ids[b])
        good = -1 <= task < num_tasks
        length = 0
        if good and task >= 0:
            length = P if prompt_lengths is None else min(max(int(prompt_lengths[task]), 0), P)
        for s, i in enumerate(row):
            if good and 0 <= i < vocabulary:
                yield b, s, "token"
            else:
                yield b, s, (task, i - vocabulary) if vocabulary <= i < vocabulary + length else None


def expected(input_ids, embedding, prompts, task_ids=None, **kwargs):
    prompts = prompts[None] if prompts.dim() == 2 else prompts
    out = torch.full((*input_ids.shape, embedding.shape[1]), NAN, dtype=embedding.dtype, device=DEVICE)
    of_prompt = torch.zeros(input_ids.shape, dtype=torch.bool, device=DEVICE)
    for b, s, slot in slots_of(input_ids, len(embedding), prompts, task_ids, **kwargs):
        if slot == "token":
            out[b, s] = embedding[input_ids[b, s]]
        elif slot is not None:
            out[b, s], of_prompt[b, s] = prompts[slot].to(out.dtype), True
    return out, of_prompt


def check(*args, **kwargs):
    got = prompt_embed(*args, **kwargs)
    with torch.no_grad():
        want, of_prompt = expected(*args, **kwargs)
    assert_same(got, want)  # a prompt of another dtype is rounded, all else is copied
    assert_same(got[~of_prompt], want[~of_prompt], bitwise=True)
    assert got.is_contiguous()
    return got


def gradients_by_loop(dout, input_ids, embedding, prompts, task_ids=None, **kwargs):
    """dprompts in fp32, summed over the batch in row-major order; the embedding's in fp64."""
    dprompts = torch.zeros(prompts.shape, dtype=torch.float32, device=DEVICE)
    dtable = torch.zeros(embedding.shape, dtype=torch.float64, device=DEVICE)
    for b, s, slot in slots_of(input_ids, len(embedding), prompts, task_ids, **kwargs):
        if slot == "token":
            dtable[input_ids[b, s]] += dout[b, s].double()
        elif slot is not None:
            dprompts[slot] += dout[b, s].float()
    return dtable, dprompts


def gradients(f, args, dout, **kwargs):
    ids, embedding, prompts, task_ids = args
    leaves = [t.detach().clone().requires_grad_() for t in (embedding, prompts)]
    out = f(ids, *leaves, task_ids, **kwargs)
    return torch.autograd.grad(out, leaves, dout.to(out.dtype))


@pytest.mark.parametrize("with_lengths", [False, True], ids=["whole", "lengths"])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_every_token(ids_dtype, with_lengths, dtype):
    kwargs = dict(prompt_lengths=tensor([4, 0, 2], ids_dtype)) if with_lengths else {}
    args = make(dtype=dtype, ids_dtype=ids_dtype, lengths=kwargs.get("prompt_lengths"))
    check(*args, **kwargs)
    check(*args[:3], args[3].int(), **kwargs)


def test_as_documented():
    """Prefix, infix and suffix, a token twice, and a base row."""
    embedding, prompts = torch.arange(10.0, device=DEVICE)[:, None], tensor([[[-1], [-2]], [[-3], [-4]]], torch.float32)
    ids = tensor([[10, 5, 11, 6, 10], [7, 11, 8, 11, 9], [1, 2, 3, 4, 5]])
    got = prompt_embed(ids, embedding, prompts, tensor([0, 1, -1]))
    assert got[..., 0].tolist() == [[-1, 5, -2, 6, -1], [7, -4, 8, -4, 9], [1, 2, 3, 4, 5]]
    assert torch.equal(prompt_embed(ids[:1], embedding, prompts[0]), got[:1])
    assert torch.equal(prompt_embed(ids[1:2], embedding, prompts[1:]), got[1:2])


@pytest.mark.parametrize("E", [1, 3, 31, 64, 65, 255, 1025, 4100])
def test_odd_widths_and_offsets(E, dtype):
    def shifted(t, offset):
        return torch.cat([t.new_zeros(offset), t.reshape(-1)])[offset:].view(t.shape)

    args = make(3, 4, 3, E, dtype)
    for offset in (1, 4, 7):
        check(*(shifted(t, offset) for t in args))


@pytest.mark.parametrize("prompts_dtype", DTYPES, ids=lambda d: f"prompts_{name_of(d)}")
def test_prompts_of_another_dtype_are_rounded_once(prompts_dtype, dtype):
    assert check(*make(dtype=dtype, prompts_dtype=prompts_dtype)).dtype == dtype


def test_tokens_and_prompts_are_copied_to_the_bit(dtype):
    info, integer = torch.finfo(dtype), {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    row = tensor([INF, -INF, -0.0, info.tiny / 2, info.max, -info.max, info.tiny, 1.0], dtype)
    got = prompt_embed(tensor([[0, 1]]), row[None], row.flip(0)[None])
    assert torch.equal(got[0].view(integer), torch.stack([row, row.flip(0)]).view(integer))


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_prefix_without_padding_is_prompt_concat(side, dtype):
    ids, embedding, prompts, _ = make(6, 7, dtype=dtype, prompts_dtype=torch.float32)
    ids, task_ids, dout = ids % V, tensor([0, 2, 1, 1, 2, 0]), torch.randn(6, 11, 8, device=DEVICE).to(dtype)
    prefix = V + torch.arange(4, device=DEVICE).expand(6, -1)
    with_prefix = torch.cat([prefix, ids], 1), embedding, prompts, task_ids
    assert torch.equal(
        prompt_embed(*with_prefix), prompt_concat(ids, embedding, prompts, task_ids, padding_side=side).inputs_embeds
    )

    def concat(*args):
        return prompt_concat(*args).inputs_embeds

    got, want = gradients(prompt_embed, with_prefix, dout), gradients(concat, (ids, *with_prefix[1:]), dout)
    assert torch.equal(got[1], want[1])
    assert_same(got[0], want[0])


STRIDED = {
    "every second": lambda t: torch.stack([t, torch.full_like(t, 7)], 1).flatten(0, 1)[::2],
    "last dimension": lambda t: torch.stack([t, torch.full_like(t, 7)], -1)[..., 0],
    "columns first": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
    "wide rows": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
}


@pytest.mark.parametrize("layout", STRIDED)
def test_strides(layout, dtype):
    strided, lengths = STRIDED[layout], tensor([4, 1, 2])
    args, dout = make(6, 7, dtype=dtype, lengths=lengths), torch.randn(6, 7, 8, device=DEVICE).to(dtype)
    check(*map(strided, args), prompt_lengths=strided(lengths))
    got, want = gradients(prompt_embed, args, strided(dout)), gradients(prompt_embed, args, dout)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_expanded_inputs():
    ids, embedding, prompts, _ = make(4, 6, num_tasks=1)
    task_ids = tensor([0]).expand(4)
    check(ids[:1].clamp(max=V).expand(4, -1), embedding[:1].expand(V, -1), prompts.expand(3, -1, -1), task_ids)
    dout = torch.ones(1, 1, 1, device=DEVICE).expand(4, 6, 8)
    args = ids, embedding, prompts, task_ids
    for a, b in zip(gradients(prompt_embed, args, dout), gradients(prompt_embed, args, dout.contiguous()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("prompts_dtype", DTYPES, ids=lambda d: f"prompts_{name_of(d)}")
@pytest.mark.parametrize("sizes", [(6, 9, 4, 8), (3, 5, 2, 1025)], ids=lambda s: "B{}-S{}-P{}-E{}".format(*s))
def test_gradients(sizes, prompts_dtype, dtype):
    B, S, P, E = sizes
    lengths = tensor([P, 1, P // 2])
    args = make(B, S, P, E, dtype, prompts_dtype=prompts_dtype, lengths=lengths)
    dout, kwargs = torch.randn(B, S, E, device=DEVICE).to(dtype), dict(prompt_lengths=lengths)
    dtable, dprompts = gradients(prompt_embed, args, dout, **kwargs)
    dtable_64, dprompts_loop = gradients_by_loop(dout, *args, **kwargs)
    assert dprompts.dtype == prompts_dtype and torch.equal(dprompts, dprompts_loop.to(prompts_dtype))
    dtable_ref, dprompts_ref = gradients(reference.prompt_embed, args, dout, **kwargs)
    doubles = args[0], args[1].double(), args[2].double(), args[3]
    _, dprompts_64 = gradients(reference.prompt_embed, doubles, dout, **kwargs)
    assert_as_good_as_torch(dtable, dtable_ref, dtable_64)
    assert_as_good_as_torch(dprompts, dprompts_ref, dprompts_64)


def test_gradient_of_one_token_many_times():
    """One virtual token in every slot: added in row-major order, whatever stands at the others."""
    B, S = (4, 30) if INTERPRET else (8, 300)
    ids, embedding, prompts, _ = make(B, S, num_tasks=1)
    ids[:, ::2] = V + 1
    args, dout = (ids.clamp(max=V + 1), embedding, prompts, None), torch.randn(B, S, 8, device=DEVICE)
    _, want = gradients_by_loop(dout, *args)
    assert torch.equal(gradients(prompt_embed, args, dout)[1], want)


def test_gradcheck_in_fp64():
    for B, S, P, E, num_tasks in [(1, 2, 3, 2, 1), (4, 3, 2, 3, 2), (3, 2, 0, 2, 2), (5, 4, 1, 1, 2)]:
        ids, embedding, prompts, task_ids = make(B, S, P, E, torch.float64, num_tasks)
        leaves = embedding.requires_grad_(), prompts.requires_grad_()
        f = lambda e, p, ids=ids, t=task_ids: prompt_embed(ids, e, p, t)  # noqa: E731
        assert torch.autograd.gradcheck(f, leaves, eps=1e-6, atol=1e-5)


def test_fp64_beside_another_dtype():
    for a, b in ((torch.float64, torch.float32), (torch.bfloat16, torch.float64)):
        args = make(dtype=a, prompts_dtype=b)
        dout = torch.randn_like(check(*args))
        de, dp = gradients(prompt_embed, args, dout)
        assert de.dtype == a and dp.dtype == b
        assert torch.allclose(dp.double(), gradients_by_loop(dout, *args)[1].double(), rtol=1e-6)


def test_gradient_only_where_asked(dtype, monkeypatch):
    ids, embedding, prompts, task_ids = args = make(dtype=dtype)
    dout, calls = torch.randn(5, 9, 8, device=DEVICE).to(dtype), []
    both = gradients(prompt_embed, args, dout)
    for owner, name in ((module, "_backward_op"), (reference, "embedding_backward")):
        f = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, f=f, name=name: calls.append(name) or f(*a))
    for i, name in enumerate(("embedding_backward", "_backward_op")):
        leaves, saved = [embedding.clone(), prompts.clone()], []
        leaves[i].requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            out = prompt_embed(ids, *leaves, task_ids)
        assert torch.equal(torch.autograd.grad(out, leaves[i], dout)[0], both[i])
        assert calls == [name] and calls.clear() is None
        assert sum(t.numel() * t.element_size() for t in saved) == 45 * (4 if i else 12)
    assert not prompt_embed(*args).requires_grad


def test_dprompts_do_not_depend_on_other_tasks(dtype):
    """Sequences of task 1 keep their order; what stands between them, and the others' gradients, change."""
    mine, seen = 12, []
    ids_mine, grads = (
        V + torch.randint(-3, 3, (mine, 4), device=DEVICE),
        torch.randn(mine, 4, 24, device=DEVICE).to(dtype),
    )
    for others in (0, 3, 20):
        ids, embedding, prompts, task_ids = make(mine + others, 4, 3, 24, dtype, 4)
        at = torch.randperm(mine + others, device=DEVICE)[:mine].sort().values
        ids[task_ids == 1], task_ids[task_ids == 1] = V, 2
        dout = torch.full((mine + others, 4, 24), NAN, device=DEVICE, dtype=dtype)
        dout[task_ids == 3] = INF
        ids[at], task_ids[at], dout[at] = ids_mine, 1, grads
        seen.append(gradients(prompt_embed, (ids, embedding, prompts.float(), task_ids), dout)[1][1])
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    assert seen[0].isfinite().all() and seen[0].any()


def test_rows_are_independent(dtype):
    args = ids, embedding, prompts, task_ids = make(8, 6, dtype=dtype)
    before = prompt_embed(*args)
    for row in range(8):
        others = torch.arange(8, device=DEVICE) != row
        table, tables = torch.cat([embedding, torch.full_like(embedding[:1], NAN)]), prompts.clone()
        new_ids, new_tasks = torch.where(ids >= V, ids + 1, ids), task_ids.clone()  # the vocabulary grew by one
        new_ids[others], new_tasks[others] = V, -1
        tables[torch.arange(3, device=DEVICE) != task_ids[row]] = NAN
        after = prompt_embed(new_ids, table, tables, new_tasks)
        assert torch.equal(after[row], before[row]) and after[others].isnan().all()
    order = torch.randperm(8, device=DEVICE)
    for rows in (slice(0, 1), slice(3, 8), order):
        assert torch.equal(prompt_embed(ids[rows], embedding, prompts, task_ids[rows]), before[rows])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradient_of_nan_stays_where_it_is(backend):
    """dout is NaN at every other kind of slot."""
    args = ids, embedding, prompts, _ = make(6, 7)
    with peft_ops.set_backend(backend):
        _, dp = gradients(prompt_embed, args, torch.where(ids >= V, 1.0, NAN)[..., None].expand(-1, -1, 8))
        de, _ = gradients(prompt_embed, args, torch.where(ids < V, 1.0, NAN)[..., None].expand(-1, -1, 8))
    assert dp.isfinite().all() and de.isfinite().all() and dp.any() and de.any()


def test_repeats_are_bitwise_equal():
    args = make(4, 9, 3, 40, torch.bfloat16, prompts_dtype=torch.float32)
    dout = torch.randn(4, 9, 40, device=DEVICE).bfloat16()

    def run():
        return prompt_embed(*args), *gradients(prompt_embed, args, dout)

    first = run()
    for _ in range(250 if DEVICE == "cuda" else 30):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def whole(message):
    return "^" + re.escape(f"prompt_embed: {message}") + "$"


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("bad", [3, 4, -2, 2**31 - 1, -(2**31)])
def test_bad_task_id(bad, ids_dtype, dtype):
    ids, embedding, prompts, _ = make(4, 5, dtype=dtype)
    table, buffer = guarded(3, 4, 8, dtype=dtype, fill=7)  # a read outside would look like a number
    table.copy_(prompts)
    task_ids = tensor([0, bad, 2, 1], ids_dtype)
    if not KERNELS:
        with pytest.raises(IndexError, match=whole(f"task_ids must be in [-1, 3), got {bad} at position 1")):
            prompt_embed(ids, embedding, table, task_ids)
        return
    got = check(ids, embedding, table, task_ids)
    assert got[1].isnan().all() and got[[0, 2, 3]].isfinite().all() and (buffer[:256] == 7).all()


BAD_TOKENS = {  # position 2 of a sequence of task: the id, and where good ones end
    "beyond all": (0, V + 4, V + 4),
    "beyond its own": (1, V + 2, V + 2),
    "no prompt": (2, V, V),
    "base": (-1, V, V),
    "negative": (0, -1, V + 4),
    "largest": (0, 2**31 - 1, V + 4),
    "smallest": (1, -(2**31), V + 2),
    "beyond 32 bits": (0, 2**32, V + 4),
    "beyond 32 bits, virtual": (0, 2**32 + V, V + 4),
    "smallest of 64 bits": (0, -(2**63), V + 4),
}


@pytest.mark.parametrize("case", BAD_TOKENS)
def test_bad_token(case, dtype):
    task, bad, end = BAD_TOKENS[case]
    for ids_dtype in (torch.int32, torch.int64) if -(2**31) <= bad < 2**31 else (torch.int64,):
        ids, embedding, prompts, _ = make(3, 5, dtype=dtype, ids_dtype=ids_dtype)
        ids, kwargs = ids % V, dict(prompt_lengths=tensor([4, 2, 0]))
        ids[1, 2] = bad
        task_ids = tensor([0, task, 1])
        (e, e_buffer), (p, p_buffer) = guarded(V, 8, dtype=dtype, fill=7), guarded(3, 4, 8, dtype=dtype, fill=7)
        e.copy_(embedding), p.copy_(prompts)
        if not KERNELS:
            message = f"input_ids must be in [0, {end}) where task_ids is {task}, got {bad} at position 7"
            with pytest.raises(IndexError, match=whole(message)):
                prompt_embed(ids, e, p, task_ids, **kwargs)
            continue
        nan = check(ids, e, p, task_ids, **kwargs).isnan()
        assert nan.any(-1).sum() == 1 and nan[1, 2].all()
        assert (e_buffer[:256] == 7).all() and (p_buffer[-256:] == 7).all()


@pytest.mark.skipif(KERNELS, reason="a kernel writes NaN")
def test_bad_token_of_one_task():
    with pytest.raises(IndexError, match=whole(f"input_ids must be in [0, {V + 4}), got {V + 4} at position 1")):
        prompt_embed(tensor([[0, V + 4]]), torch.zeros(V, 8), torch.zeros(4, 8))


@pytest.mark.parametrize("bad", [5, -1, 2**31 - 1, -(2**31), 2**32 + 1, -(2**63)])
def test_bad_length(bad):
    ids, embedding, prompts, _ = make(4, 5)
    lengths = tensor([4, bad, 4], torch.int32 if -(2**31) <= bad < 2**31 else torch.int64)
    args = ids, embedding, prompts, tensor([0, 1, 1, 2])
    if KERNELS:
        check(*args, prompt_lengths=lengths)
        return
    with pytest.raises(IndexError, match=whole(f"prompt_lengths must be in [0, 5), got {bad} at position 1")):
        prompt_embed(*args, prompt_lengths=lengths)


@pytest.mark.skipif(not KERNELS, reason="on a CPU a bad id raises before a gradient exists")
def test_bad_ids_send_no_gradient():
    ids, embedding, prompts, _ = make(4, 6)
    ids[0, 1], ids[0, 2], ids[1, 3], ids[1, 4] = V + 4, -1, 2**31 - 1, -(2**31)
    args, dout = (ids, embedding, prompts, tensor([0, 1, 7, -1])), torch.randn(4, 6, 8, device=DEVICE)
    dout[torch.isnan(prompt_embed(*args))] = NAN
    got, want = gradients(prompt_embed, args, dout), gradients_by_loop(dout, *args)
    assert torch.equal(got[1], want[1]) and torch.allclose(got[0], want[0].float())


def test_guards_stay_intact():
    """Random shapes between guards: nothing is read outside the inputs (NaN), nor written."""
    generator = torch.Generator().manual_seed(2)
    for trial in range(8 if INTERPRET else 200):
        B, S, P, E, num_tasks = (int(torch.randint(1, n, (1,), generator=generator)) for n in (7, 20, 12, 90, 4))
        dtype = DTYPES[trial % 3]
        ids, embedding, prompts, task_ids = make(B, S, P, E, dtype, num_tasks)
        (e, e_buffer), (p, p_buffer) = guarded(V, E, dtype=dtype), guarded(num_tasks, P, E, dtype=dtype)
        (dout, d_buffer) = guarded(B, S, E, dtype=dtype)
        e.copy_(embedding), p.copy_(prompts), dout.normal_()
        leaves = e.requires_grad_(), p.requires_grad_()
        out = prompt_embed(ids, *leaves, task_ids)
        assert out.isfinite().all() and all(g.isfinite().all() for g in torch.autograd.grad(out, leaves, dout))
        for buffer in (e_buffer, p_buffer, d_buffer):
            assert_guards(buffer.detach())


ZERO = [(0, 3, 2, 8, 3), (2, 0, 2, 8, 3), (2, 3, 2, 0, 3), (2, 3, 0, 8, 3), (2, 3, 2, 8, 0), (0, 0, 0, 0, 0)]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("sizes", ZERO, ids=str)
def test_zero_sizes(sizes, backend, dtype):
    args = make(*sizes[:4], dtype, sizes[4])
    with peft_ops.set_backend(backend):
        got = check(*args)
        if backend == "reference":
            return
        de, dp = gradients(prompt_embed, args, torch.ones_like(got))
        assert de.shape == args[1].shape and torch.equal(dp, torch.zeros_like(args[2]))


def test_empty_vocabulary_and_no_prompt_read():
    prompts = torch.randn(2, 3, 8, device=DEVICE)
    check(tensor([[0, 2], [1, 1]]), prompts.new_zeros(0, 8), prompts, tensor([1, 0]))
    nobody, ids = tensor([-1, -1]), torch.randint(V, (2, 3), device=DEVICE)
    embedding = torch.randn(V, 8, device=DEVICE)
    assert torch.equal(check(ids, embedding, torch.full_like(prompts, NAN), nobody), embedding[ids])
    check(ids, embedding, prompts[:0], nobody, prompt_lengths=tensor([]).long())


@settings(max_examples=15 if INTERPRET else 80, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 6), st.integers(0, 12), st.integers(0, 6), st.integers(1, 40), st.integers(1, 4)),
    st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)), st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_anything_against_the_loop(sizes, dtypes, with_lengths, seed):
    torch.manual_seed(seed)
    (B, S, P, E, num_tasks), (dtype, prompts_dtype) = sizes, dtypes
    lengths = torch.randint(P + 1, (num_tasks,), device=DEVICE) if with_lengths else None
    check(*make(B, S, P, E, dtype, num_tasks, prompts_dtype, lengths=lengths), prompt_lengths=lengths)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("sizes", [(4, 5, 3), (2, 3, 0), (2, 0, 3), (0, 3, 2)], ids=lambda s: "B{}-S{}-P{}".format(*s))
def test_opcheck(sizes, grad):
    lengths = tensor([min(sizes[2], 1)] * 3)
    ids, embedding, prompts, task_ids = make(*sizes, lengths=lengths)
    tables = embedding.requires_grad_(grad), prompts.requires_grad_(grad)
    args = ids, *tables, None, None, task_ids, lengths, *NOTHING_ADDED
    torch.library.opcheck(torch.ops.peft_ops.prompt_embed, args)
    with torch.no_grad():
        out, rows = torch.ops.peft_ops.prompt_embed(*args)
    assert torch.equal(rows, reference.embed_rows(ids, V, task_ids, lengths, 3, sizes[2]))
    torch.library.opcheck(torch.ops.peft_ops.prompt_embed_backward, (torch.randn_like(out), rows, 3, sizes[2]))


def test_operator_called_raw():
    ids, embedding, prompts, task_ids = args = make()
    e, p, dout = (
        embedding.clone().requires_grad_(),
        prompts.clone().requires_grad_(),
        torch.randn(5, 9, 8, device=DEVICE),
    )
    out, rows = torch.ops.peft_ops.prompt_embed(ids, e, p, None, None, task_ids, None, *NOTHING_ADDED)
    assert not rows.requires_grad
    for a, b in zip(torch.autograd.grad(out, (e, p), dout), gradients(prompt_embed, args, dout), strict=True):
        assert torch.equal(a, b)
    strided = STRIDED["columns first"]
    *tables, tasks = map(strided, args)
    assert torch.equal(torch.ops.peft_ops.prompt_embed(*tables, None, None, tasks, None, *NOTHING_ADDED)[0], out)
    backward = torch.ops.peft_ops.prompt_embed_backward
    assert torch.equal(backward(strided(dout), strided(rows), 3, 4), backward(dout, rows, 3, 4))


def test_compiles_with_dynamic_shapes():
    def loss(ids, embedding, prompts, task_ids, lengths):
        return prompt_embed(ids, embedding, prompts, task_ids, prompt_lengths=lengths).square().sum()

    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled, lengths = torch.compile(loss, backend=frames, fullgraph=True, dynamic=True), tensor([4, 1, 2])
    for B, S in ((2, 5), (3, 5), (5, 9), (8, 4), (4, 13)):
        ids, embedding, prompts, task_ids = make(B, S, lengths=lengths)
        args = ids, embedding.requires_grad_(), prompts.requires_grad_(), task_ids, lengths
        want, got = loss(*args), compiled(*args)
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

        def forward(self, ids, task_ids):
            return prompt_embed(ids, self.embedding, self.prompts, task_ids)

    prompted = Prompted().to(DEVICE)
    ids, _, _, task_ids = make(4, 5)
    batch, sequence = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("sequence", min=2, max=512)
    dynamic = {"ids": {0: batch, 1: sequence}, "task_ids": {0: batch}}
    program = torch.export.export(prompted, (ids, task_ids), dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "prompted.pt2")
    ids, _, _, task_ids = make(7, 12)
    loaded = torch.export.load(tmp_path / "prompted.pt2").module()
    assert torch.equal(loaded(ids, task_ids), prompted(ids, task_ids))
    assert any("prompt_embed" in str(node.target) for node in program.graph.nodes)


def test_functorch_goes_through_the_reference():
    ids, embedding, prompts, task_ids = make()
    weight = torch.randn(5, 9, 8, device=DEVICE)

    def loss(p):
        return (prompt_embed(ids, embedding, p, task_ids) * weight).sum()

    want = torch.autograd.grad(loss(p := prompts.clone().requires_grad_()), p)[0]
    assert torch.allclose(torch.func.grad(loss)(prompts), want, atol=1e-6)
    stacked = torch.stack([prompts, 2 * prompts])
    batched = torch.vmap(lambda p: prompt_embed(ids, embedding, p, task_ids))(stacked)
    assert all(torch.equal(batched[i], prompt_embed(ids, embedding, stacked[i], task_ids)) for i in range(2))


def test_higher_derivatives_refuse():
    ids, embedding, prompts, task_ids = make()
    e, p = embedding.clone().requires_grad_(), prompts.clone().requires_grad_()
    for source in (e, p):
        with pytest.raises(RuntimeError, match="prompt_embed: double backward is not supported"):
            torch.autograd.grad(prompt_embed(ids, e, p, task_ids).square().sum(), source, create_graph=True)
    for i in range(2):
        with torch.autograd.forward_ad.dual_level():
            tables = [embedding, prompts]
            tables[i] = torch.autograd.forward_ad.make_dual(tables[i], torch.ones_like(tables[i]))
            with pytest.raises(NotImplementedError, match="prompt_embed: forward-mode AD is not supported"):
                prompt_embed(ids, *tables, task_ids)


def test_checkpointing_recomputes_the_same():
    from torch.utils.checkpoint import checkpoint

    ids, embedding, prompts, task_ids = args = make()
    dout = torch.randn(5, 9, 8, device=DEVICE)
    for reentrant in (False, True):
        p = prompts.clone().requires_grad_()
        checkpoint(lambda p: prompt_embed(ids, embedding, p, task_ids), p, use_reentrant=reentrant).backward(dout)
        assert torch.equal(p.grad, gradients(prompt_embed, args, dout)[1])


def test_reference_backend_is_plain_torch(dtype):
    ids, embedding, prompts, task_ids = make(dtype=dtype)
    with peft_ops.set_backend("reference"):
        assert "prompt_embed" not in check(ids, embedding, prompts.requires_grad_(), task_ids).grad_fn.name()


TOKENS, TABLE = torch.zeros(4, 3, dtype=torch.int64), torch.zeros(5, 8)
PROMPTS, TASKS = torch.zeros(2, 3, 8), torch.zeros(4, dtype=torch.int64)
GOOD = dict(input_ids=TOKENS, embedding=TABLE, prompts=PROMPTS, task_ids=TASKS)
BAD_INPUT = {
    "ids None": (dict(input_ids=None), TypeError, "input_ids must be a tensor, got NoneType"),
    "ids float": (dict(input_ids=TOKENS.float()), TypeError, "input_ids must have dtype .* got float32"),
    "ids rank": (dict(input_ids=TOKENS[0]), ValueError, r"input_ids must have 2 dimensions, got shape \[3\]"),
    "ids elsewhere": (dict(input_ids=TOKENS.to("meta")), ValueError, "input_ids must be on cpu, .* got meta"),
    "embedding None": (dict(embedding=None), TypeError, "embedding must be a tensor, got NoneType"),
    "embedding integer": (dict(embedding=TABLE.long()), TypeError, "embedding must have dtype .* got int64"),
    "embedding rank": (dict(embedding=TABLE[None]), ValueError, r"have 2 dimensions, got shape \[1, 5, 8\]"),
    "embedding width": (dict(embedding=TABLE[:, :7]), ValueError, r"embedding must have 8 features, .* got \[5, 7\]"),
    "prompts list": (dict(prompts=[1.0]), TypeError, "prompts must be a tensor, got list"),
    "prompts integer": (dict(prompts=PROMPTS.int()), TypeError, "prompts must have dtype float32, .* got int32"),
    "prompts rank": (dict(prompts=PROMPTS[None]), ValueError, r"got \[1, 2, 3, 8\]"),
    "tasks None": (dict(task_ids=None), ValueError, "task_ids must be given, .* holds 2 tasks, got None"),
    "tasks a plan": (dict(task_ids=peft_ops.plan_tasks(TASKS, 4, 2)), TypeError, "be a tensor, got TaskPlan"),
    "tasks float": (dict(task_ids=TASKS.float()), TypeError, "task_ids must have dtype int32, int64, got float32"),
    "tasks too few": (dict(task_ids=TASKS[:2]), ValueError, r"shape \[4\], one per sequence, got \[2\]"),
    "lengths list": (dict(prompt_lengths=[3, 2]), TypeError, "prompt_lengths must be a tensor, got list"),
    "lengths float": (dict(prompt_lengths=TABLE[0, :2]), TypeError, "prompt_lengths must have dtype .* got float32"),
    "lengths per row": (dict(prompt_lengths=TASKS), ValueError, r"shape \[2\], one per task, got \[4\]"),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case, backend):
    changes, error, match = BAD_INPUT[case]
    with peft_ops.set_backend(backend), pytest.raises(error, match=f"^prompt_embed: .*{match}"):
        prompt_embed(**GOOD | changes)


def test_fake_cuda_tensors():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        ids, task_ids = (torch.zeros(*n, dtype=torch.int32, device="cuda") for n in ((4, 3), (4,)))
        embedding, prompts = torch.empty(5, 8, device="cuda").bfloat16(), torch.empty(2, 6, 8, device="cuda")
        got = prompt_embed(ids, embedding, prompts, task_ids)
        assert got.shape == (4, 3, 8) and got.dtype == torch.bfloat16 and got.device.type == "cuda"
        dprompts = torch.ops.peft_ops.prompt_embed_backward(got, ids, 2, 6)
        assert dprompts.shape == (2, 6, 8) and dprompts.dtype == torch.float32
