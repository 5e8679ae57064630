"""accelerate on models of every family: each row of a mixed batch is what plain PEFT gives for its adapter alone."""

import copy
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from peft_ops import accelerate
from tests.conftest import DEVICE, DTYPES, assert_like_torch, name_of
from tests.tiny import BASE, CAUSAL, FAMILIES, SEQ2SEQ, batch_for, ia3_model, randomized, row_by_row, set_vectors, text

pytestmark = pytest.mark.usefixtures("one_thread")
LEVELS = ["module", "auto"]
GENERATING = CAUSAL + SEQ2SEQ
KERNELS = ["llama", "gpt2", "t5-gated", "bert"]
LENGTH = 64


def often(*names: str, of=FAMILIES) -> list:
    """These families in every run, the others in the nightly one."""
    return [f if f in names else pytest.param(f, marks=pytest.mark.nightly) for f in of]


@cache
def plain(family: str, adapters: int = 2, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Base weights in dtype, vectors in fp32, as PEFT trains them."""
    model = ia3_model(family, [f"task{i}" for i in range(adapters)]).to(DEVICE)
    for name, parameter in model.named_parameters():
        if "ia3_l" not in name or dtype == torch.float64:
            parameter.data = parameter.data.to(dtype)
    return model


def accelerated(family: str, adapters: int = 2, dtype: torch.dtype = torch.float32, level: str = "auto") -> nn.Module:
    return accelerate(copy.deepcopy(plain(family, adapters, dtype)), level=level)


def rows_of(adapters: int) -> list[str]:
    """Every adapter, base rows among them, one adapter twice; in no order."""
    names = [f"task{i}" for i in range(adapters)] + [BASE, BASE, "task0"]
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(1))
    return [names[i] for i in order]


def batch_of(family: str, rows: int, side: str | None = None) -> dict[str, Tensor]:
    return {key: value.to(DEVICE) for key, value in batch_for(plain(family), rows, side).items()}


@torch.no_grad()
def logits(model: nn.Module, batch: dict, **kwargs) -> Tensor:
    return model(**batch, **kwargs).logits


def pefts(family: str, adapters: int, dtype: torch.dtype, batch: dict) -> Tensor:
    return row_by_row(plain(family, adapters, dtype), rows_of(adapters), lambda model: logits(model, batch))


def answers_to_fp64(family: str, adapters: int, dtype: torch.dtype) -> None:
    """The fp64 rule, over all real tokens; padded on the right, because on the left fp64 Bloom's masks make NaN."""
    rows, batch = rows_of(adapters), batch_of(family, adapters + 3, "right")
    got = logits(accelerated(family, adapters, dtype), batch, adapter_names=rows)
    real = batch["attention_mask"].bool() if family in CAUSAL else ...
    same, fp64 = (pefts(family, adapters, d, batch)[real] for d in (dtype, torch.float64))
    assert fp64.isfinite().all()
    assert_like_torch(got[real], same, fp64)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the linear layers are fused")
class TestModuleLevel:
    @pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_rows_are_bitwise_pefts(self, family, dtype):
        rows, batch = rows_of(2), batch_of(family, 5)
        got = logits(accelerated(family, 2, dtype, "module"), batch, adapter_names=rows)
        assert torch.equal(got, pefts(family, 2, dtype, batch))

    @pytest.mark.parametrize("adapters", [1, 8, 64])
    @pytest.mark.parametrize("family", often("t5-gated"))
    def test_any_number_of_adapters(self, family, adapters):
        rows, batch = rows_of(adapters), batch_of(family, adapters + 3)
        got = logits(accelerated(family, adapters, level="module"), batch, adapter_names=rows)
        assert torch.equal(got, pefts(family, adapters, torch.float32, batch))


class TestFusedLevel:
    @pytest.mark.kernels
    @pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_rows_answer_to_fp64(self, family, dtype):
        answers_to_fp64(family, 2, dtype)

    @pytest.mark.parametrize("adapters", [1, 8, 64])
    @pytest.mark.parametrize("family", often("llama"))
    def test_any_number_of_adapters(self, family, adapters):
        answers_to_fp64(family, adapters, torch.float32)


@pytest.mark.parametrize("level", LEVELS)
class TestRows:
    """Bitwise at either level: what a row gets does not depend on who else is in its batch."""

    @pytest.mark.parametrize(
        "family", [pytest.param(f, marks=[pytest.mark.kernels] * (f in KERNELS)) for f in FAMILIES]
    )
    def test_a_mixed_batch_is_the_uniform_ones_row_by_row(self, family, level):
        model, rows, batch = accelerated(family, level=level), rows_of(2), batch_of(family, 5)
        got = logits(model, batch, adapter_names=rows)
        uniform = {name: logits(model, batch, adapter_names=[name] * 5) for name in rows}
        assert not torch.equal(uniform["task0"], uniform["task1"])
        assert all(torch.equal(got[i], uniform[name][i]) for i, name in enumerate(rows))

    @pytest.mark.kernels
    @pytest.mark.parametrize("family", often("llama", "t5-gated", "bert", "gpt2", "opt"))
    def test_other_rows_names_and_data_leave_a_row_alone(self, family, level):
        model, rows, batch = accelerated(family, level=level), rows_of(2), batch_of(family, 5)
        words = model.get_base_model().get_input_embeddings()
        batch["inputs_embeds"] = words(batch.pop("input_ids")).detach()
        want = logits(model, batch, adapter_names=rows)
        for i in range(5):
            others = torch.arange(5, device=DEVICE) != i
            disturbed = batch | {"inputs_embeds": batch["inputs_embeds"].clone()}
            disturbed["inputs_embeds"][others] = float("nan")
            names = [name if j == i else rows[(j + 2) % 5] for j, name in enumerate(rows)]
            got = logits(model, disturbed, adapter_names=names)
            assert torch.equal(got[i], want[i]) and got[others].isnan().any()

    @pytest.mark.parametrize("family", often("llama", "t5", "bert"))
    def test_a_tenants_broken_vectors_stay_its_own(self, family, level):
        model, rows, batch = accelerated(family, level=level), rows_of(2), batch_of(family, 5)
        want = logits(model, batch, adapter_names=rows)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "ia3_l.task1" in name or "modules_to_save.task1" in name:
                    parameter.fill_(float("nan"))
        got = logits(model, batch, adapter_names=rows)
        mine = torch.tensor([name == "task1" for name in rows])
        assert torch.equal(got[~mine], want[~mine]) and got[mine].isnan().all(-1).any()


class TestGeneration:
    def prompt(self, family: str, rows: int) -> dict[str, Tensor]:
        batch = batch_of(family, rows)
        batch.pop("decoder_input_ids", None)
        return batch

    def run(self, model, batch, **options) -> Tensor:
        options = dict(max_new_tokens=LENGTH, do_sample=False) | options
        return model.generate(**batch, **options)

    @pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
    @pytest.mark.parametrize("family", often("llama", "gemma", "opt", "bloom", "gpt2", "t5", "t5-gated", of=GENERATING))
    def test_tokens_are_pefts(self, family, beams):
        self.compare(family, 2, beams)

    @pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
    @pytest.mark.parametrize("adapters", [1, 8, pytest.param(64, marks=pytest.mark.nightly)])
    @pytest.mark.parametrize("family", often("llama", of=[f for f in GENERATING if f != "bloom"]))
    def test_any_number_of_adapters(self, family, adapters, beams):
        """Not Bloom, which repeats itself: with 8 adapters as with one."""
        self.compare(family, adapters, beams)

    def compare(self, family: str, adapters: int, beams: int) -> None:
        rows, batch = rows_of(adapters), self.prompt(family, adapters + 3)
        want = row_by_row(plain(family, adapters), rows, lambda model: self.run(model, batch, num_beams=beams))
        assert want.shape[1] >= LENGTH
        for level in LEVELS:
            got = self.run(accelerated(family, adapters, level=level), batch, num_beams=beams, adapter_names=rows)
            assert torch.equal(got, want), level

    @pytest.mark.parametrize("family", often("llama", "t5", of=GENERATING))
    def test_every_beam_and_its_score(self, family):
        rows, batch = rows_of(2), self.prompt(family, 5)
        options = dict(
            num_beams=4, num_return_sequences=3, max_new_tokens=12, return_dict_in_generate=True, output_scores=True
        )
        found = []

        def run(model, **names) -> Tensor:
            result = self.run(model, batch, **options, **names)
            found.append(result.sequences_scores.view(5, 3))
            return result.sequences.view(5, 3, -1)

        want = row_by_row(plain(family), rows, run)
        names = list(dict.fromkeys(rows))
        scores = torch.stack([found[names.index(name)][i] for i, name in enumerate(rows)])
        assert torch.equal(run(accelerated(family), adapter_names=rows), want)
        torch.testing.assert_close(found[-1], scores, rtol=0, atol=1e-4)

    def test_sampled_sequences(self):
        """num_return_sequences repeats rows without beams; a row of its own samples alike under its adapter."""
        rows, batch = rows_of(2), self.prompt("llama", 5)

        def run(model, **names) -> Tensor:
            torch.manual_seed(3)
            options = dict(do_sample=True, num_return_sequences=3, max_new_tokens=8)
            return self.run(model, batch, **options, **names).view(5, 3, -1)

        want = row_by_row(plain("llama"), rows, run)
        assert torch.equal(run(accelerated("llama", level="module"), adapter_names=rows), want)

    @pytest.mark.parametrize(
        "options", [{"max_length": 20}, {"max_new_tokens": 9}, {}], ids=["total", "new", "default"]
    )
    def test_lengths(self, options):
        rows, batch = rows_of(2), self.prompt("llama", 5)
        want = plain("llama").generate(**batch, do_sample=False, **options)
        got = accelerated("llama").generate(**batch, do_sample=False, **options, adapter_names=rows)
        assert got.shape == want.shape

    def test_without_cache(self):
        rows, batch = rows_of(2), self.prompt("llama", 5)
        want = row_by_row(plain("llama"), rows, lambda model: self.run(model, batch, max_new_tokens=8))
        got = self.run(accelerated("llama"), batch, max_new_tokens=8, use_cache=False, adapter_names=rows)
        assert torch.equal(got, want)

    def test_ids_alone(self):
        """The ids as the first argument, all of one length and without a mask."""
        rows, ids = rows_of(2), text([6] * 5)["input_ids"].to(DEVICE)
        want = row_by_row(plain("gpt2"), rows, lambda model: model.generate(input_ids=ids, max_new_tokens=8))
        assert torch.equal(accelerated("gpt2").generate(ids, max_new_tokens=8, adapter_names=rows), want)

    def test_an_encoder_sees_rows_and_a_decoder_beams(self):
        rows, batch, seen = rows_of(2), self.prompt("t5", 5), {}
        model = accelerated("t5")
        for stack in ("encoder", "decoder"):
            module = getattr(model.get_base_model(), stack).block[0].layer[0].SelfAttention.k
            module.register_forward_pre_hook(lambda _, args, stack=stack: seen.update({stack: args[0].shape[0]}))
        self.run(model, batch, num_beams=3, max_new_tokens=2, adapter_names=rows)
        assert seen == {"encoder": 5, "decoder": 15}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["Mamba", "FalconMamba"])
def test_one_step_of_a_recurrence(kind, level):
    """Their layers see [B, N, 1] transposed while they decode, which is contiguous with a row's stride of 1."""
    sizes = dict(vocab_size=96, hidden_size=64, state_size=8, num_hidden_layers=2, tie_word_embeddings=False)
    config = getattr(transformers, f"{kind}Config")(**sizes, pad_token_id=0, eos_token_id=None)
    base = randomized(getattr(transformers, f"{kind}ForCausalLM")(config)).eval()
    targets = peft.IA3Config(target_modules=["in_proj", "out_proj"], feedforward_modules=["out_proj"])
    model = peft.get_peft_model(base, targets, adapter_name="task0")
    model.add_adapter("task1", copy.deepcopy(targets))
    for name in ("task0", "task1"):
        set_vectors(model, name)
    model, rows = model.to(DEVICE).eval(), rows_of(2)
    batch = {key: value.to(DEVICE) for key, value in text([6] * 5).items()}
    want = row_by_row(model, rows, lambda model: model.generate(**batch, max_new_tokens=8, do_sample=False))
    accelerate(model, level=level)
    assert torch.equal(model.generate(**batch, max_new_tokens=8, do_sample=False, adapter_names=rows), want)


def test_the_readmes_first_script():
    """What it says beside its lines: PEFT gives every row the first adapter, and `accelerate` each its own."""
    readme = Path(__file__).parents[1].joinpath("README.md").read_text()
    script = readme.partition("```python\n")[2].partition("```")[0]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    theirs, ours = (
        [float(number) for number in re.findall(r"-?\d+\.\d+", line)] for line in done.stdout.strip().splitlines()
    )
    assert len({*theirs}) == 1 and len(theirs) == 3, done.stderr
    assert len({*ours}) == 3 and abs(ours[0] - theirs[0]) < 2e-4, done.stderr
