"""Training with adapter_names: each adapter gets PEFT's gradient of its own rows, recomputed or not, and no other."""

import copy
from functools import cache

import accelerate as hf_accelerate
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_ops import accelerate, using_adapters
from peft_ops.integrations import _layers
from peft_ops.integrations._swap import swap, unswap
from tests.conftest import DEVICE, assert_like_torch
from tests.tiny import BASE, alone, batch_for, ia3_model, prompt_model, set_vectors, text

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ["red", BASE, "green", "red", "green"]
FAMILIES = ["llama", "phi3", "opt", "gpt2", "t5", "t5-gated", "bert"]
LEVELS = ["module", "auto"]


@cache
def plain(family: str) -> nn.Module:
    return ia3_model(family, ["red", "green", "idle"]).to(DEVICE)


@cache
def plain_prompts(family: str, kind: str) -> nn.Module:
    return prompt_model(family, {"red": 2, "green": 4, "idle": 3}, kind).to(DEVICE)


def trainable(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy whose adapters all train: PEFT trains the active one."""
    model = copy.deepcopy(model).to(dtype)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(any(f".{name}" in key for name in ("red", "green", "idle")))
    return model


def batch_of(family: str, side: str | None = None) -> dict:
    batch = {key: value.to(DEVICE) for key, value in batch_for(plain(family), 5, side).items()}
    # checkpointing turns the cache off, and T5's dropout then rounds otherwise
    return batch if family == "bert" else batch | {"use_cache": False}


def row_losses(model: nn.Module, batch: dict, **kwargs) -> Tensor:
    """One number per row, over its real tokens."""
    out = model(**batch, **kwargs).logits
    target = torch.linspace(-1, 1, out.shape[-1], device=DEVICE, dtype=out.dtype)
    return (out - target).square().flatten(1).mean(1)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}


def of(name: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: grad for key, grad in found.items() if f".{name}" in key}


def pefts(model: nn.Module, batch: dict, dtype: torch.dtype | None = None, losses=row_losses) -> dict[str, Tensor]:
    """Gradients of plain PEFT's runs, each of the loss of its own adapter's rows."""
    model, found = trainable(model, dtype), {}
    for name in ("red", "green"):
        with alone(model, name) as one:
            for key, parameter in one.named_parameters():
                parameter.requires_grad_(f".{name}" in key)
            one.zero_grad()
            rows = torch.tensor([other == name for other in NAMES], device=DEVICE)
            losses(one, batch)[rows].sum().backward()
            found |= of(name, gradients(one))
    return found


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_pefts(family, level):
    batch = batch_of(family, "right")
    model = accelerate(trainable(plain(family)), level=level)
    row_losses(model, batch, adapter_names=NAMES).sum().backward()
    got = gradients(model)
    same, fp64 = (pefts(plain(family), batch, dtype) for dtype in (torch.float32, torch.float64))
    assert set(got) == set(same), "base weights and absent adapters have none"
    assert all(grad.abs().sum() > 0 for grad in fp64.values())
    for module in dict.fromkeys(key.rpartition(".")[0] for key in got):  # three numbers of a head's bias are no sample
        keys = [key for key in got if key.rpartition(".")[0] == module]
        assert_like_torch(*(torch.cat([found[key].flatten() for key in keys]) for found in (got, same, fp64)))


@pytest.mark.parametrize("family", ["llama", "t5-gated", "bert"])
def test_what_other_rows_do_leaves_a_gradient_alone(family):
    """Bitwise: another adapter's NaN, or another adapter in its place, for the rows that are not red."""
    batch, model = batch_of(family), accelerate(trainable(plain(family)))
    red = torch.tensor([name == "red" for name in NAMES], device=DEVICE)

    def grads(names) -> dict[str, Tensor]:
        model.zero_grad()
        losses = row_losses(model, batch, adapter_names=names)
        torch.where(red, losses, losses * 3).sum().backward()
        return {key: grad.clone() for key, grad in of("red", gradients(model)).items()}

    want = grads(NAMES)
    idle = grads(["red", "idle", "idle", "red", BASE])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".green" in key:
                parameter.fill_(float("nan"))
    broken = grads(NAMES)
    for key, grad in want.items():
        assert torch.equal(idle[key], grad) and torch.equal(broken[key], grad), key


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING"])
@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_gradients_of_prompts(family, kind):
    """Text without padding, so that a row's own run is PEFT's; through the encoder where there is one."""
    ids = text([6] * 5)["input_ids"].to(DEVICE)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == "t5":
        batch["decoder_input_ids"] = ids[:, :3]

    def losses(model, batch, **kwargs) -> Tensor:
        out = model(**batch, **kwargs).logits
        return ((out[:, -6:] if family == "llama" else out) - 1).square().flatten(1).mean(1)

    ours = accelerate(trainable(plain_prompts(family, kind)))
    losses(ours, batch, adapter_names=NAMES).sum().backward()
    got, want = gradients(ours), pefts(plain_prompts(family, kind), batch, losses=losses)
    assert set(got) == set(want)
    for key, grad in want.items():
        assert grad.abs().sum() > 0
        torch.testing.assert_close(got[key], grad, rtol=1e-3, atol=1e-5 * grad.abs().max().item())


class TestCheckpointing:
    """Activation checkpointing runs layers again in backward(), after the call with its names has ended."""

    def step(self, model: nn.Module, batch: dict, **kwargs) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        torch.manual_seed(1)  # dropout
        losses = row_losses(model, batch, **kwargs)
        losses.sum().backward()
        return losses.detach(), {key: grad.clone() for key, grad in gradients(model).items()}

    def same(self, got: tuple, want: tuple, relative: float = 0) -> None:
        assert torch.equal(got[0], want[0]) and set(got[1]) == set(want[1])
        for key, grad in want[1].items():
            assert (got[1][key] - grad).abs().max() <= relative * grad.abs().max(), key

    @pytest.mark.parametrize("when", ["before accelerate", "after accelerate", "after a step"])
    @pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "saved tensors"])
    @pytest.mark.parametrize("family", ["llama", "t5-gated", "bert", "gpt2"])
    def test_bitwise_as_without(self, family, reentrant, when):
        batch = batch_of(family)
        want = self.step(accelerate(trainable(plain(family))).train(), batch, adapter_names=NAMES)
        model, runs = trainable(plain(family)).train(), []

        def enable() -> None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()  # a reentrant checkpoint passes gradients on to inputs alone

        if when == "before accelerate":
            enable()
        accelerate(model)
        if when == "after a step":
            self.step(model, batch, adapter_names=NAMES)
        if when != "before accelerate":
            enable()
        first = next(module for module in model.modules() if hasattr(module, "ia3_l"))
        first.base_layer.register_forward_hook(lambda *_: runs.append(1))
        # the decoder's layers then add to the encoder's gradient in another order; in PEFT it differs by 5e-7, too
        self.same(self.step(model, batch, adapter_names=NAMES), want, 2e-6 if family == "t5-gated" and reentrant else 0)
        assert len(runs) == 2, "nothing was computed again"
        unnamed = self.step(model, batch)
        model.gradient_checkpointing_disable()
        self.same(self.step(model, batch), unnamed, 2e-6 if family == "t5-gated" and reentrant else 0)
        self.same(self.step(model, batch, adapter_names=NAMES), want)

    @pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "saved tensors"])
    def test_around_the_whole_call(self, reentrant):
        batch, model = batch_of("llama"), accelerate(trainable(plain("llama")))
        words = model.get_base_model().get_input_embeddings()
        embeds = words(batch.pop("input_ids")).detach().requires_grad_()
        want = self.step(model, batch | {"inputs_embeds": embeds}, adapter_names=NAMES)

        def run(embeds):
            return row_losses(model, batch, inputs_embeds=embeds, adapter_names=NAMES)

        model.zero_grad()
        losses = checkpoint(run, embeds, use_reentrant=reentrant)
        losses.sum().backward()
        self.same((losses.detach(), gradients(model)), want)

    @pytest.mark.parametrize("between", [False, True], ids=["at once", "after a call without names"])
    @pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "saved tensors"])
    def test_around_a_layer_it_raises(self, reentrant, between):
        """A layer that finds no names in backward() cannot know whether it had some: never another's gradient."""
        batch, model = batch_of("llama"), accelerate(trainable(plain("llama")))
        layer = model.get_base_model().model.layers[0].mlp
        inner = layer.forward
        layer.forward = lambda x: checkpoint(inner, x, use_reentrant=reentrant)
        model.enable_input_require_grads()
        losses = row_losses(model, batch, adapter_names=NAMES)
        if between:
            row_losses(model, batch)
        with pytest.raises(RuntimeError, match=r"a layer runs again in backward\(\), outside the call that named"):
            losses.sum().backward()

    def test_around_a_call_whose_block_has_ended_it_raises(self):
        batch, model = batch_of("llama"), accelerate(trainable(plain("llama")))
        words = model.get_base_model().get_input_embeddings()
        embeds = words(batch.pop("input_ids")).detach().requires_grad_()
        want = self.step(model, batch | {"inputs_embeds": embeds}, adapter_names=NAMES)

        def run(embeds):
            return row_losses(model, batch, inputs_embeds=embeds)

        with using_adapters(model, NAMES):
            losses = checkpoint(run, embeds, use_reentrant=True)
            model.zero_grad()
            losses.sum().backward()
            self.same((losses.detach(), gradients(model)), want)
            losses = checkpoint(run, embeds, use_reentrant=True)
        with pytest.raises(RuntimeError, match="using_adapters: the model runs again in backward"):
            losses.sum().backward()

    def test_around_a_layer_without_names_it_is_pefts(self):
        batch, model = batch_of("llama"), accelerate(trainable(plain("llama")))
        want = self.step(model, batch)
        layer = model.get_base_model().model.layers[0].mlp
        inner = layer.forward
        layer.forward = lambda x: checkpoint(inner, x, use_reentrant=False)
        self.same(self.step(model, batch), want)

    def test_prompts(self):
        batch = batch_of("llama")
        model = accelerate(trainable(plain_prompts("llama", "P_TUNING"))).train()
        want = self.step(model, batch, adapter_names=NAMES)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        self.same(self.step(model, batch, adapter_names=NAMES), want)


def two_layers(layer, *sizes, feedforward=(), vectors=torch.float32) -> nn.Module:
    """layer, ReLU, layer, and an adapter on both for each of two names."""
    base = nn.Sequential(layer(*sizes), nn.ReLU(), layer(sizes[1], *sizes[1:]))
    config = peft.IA3Config(target_modules=["0", "2"], feedforward_modules=list(feedforward))
    model = peft.get_peft_model(base, config, adapter_name="red")
    model.add_adapter("green", copy.deepcopy(config))
    for name in ("red", "green"):
        set_vectors(model, name)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("ia3_l" in key)
        if "ia3_l" in key:
            parameter.data = parameter.data.to(vectors)
    return model.to(DEVICE).eval()


BY_ROW = {
    "conv2d": (lambda: two_layers(nn.Conv2d, 4, 4, 3), (4, 8, 8)),
    "conv2d input": (lambda: two_layers(nn.Conv2d, 4, 4, 3, feedforward=["0", "2"]), (4, 8, 8)),
    "conv3d": (lambda: two_layers(nn.Conv3d, 3, 3, 2), (3, 4, 4, 4)),
    "narrow vectors": (lambda: two_layers(nn.Linear, 6, 8, feedforward=["2"], vectors=torch.bfloat16), (6,)),
    "linear": (lambda: two_layers(nn.Linear, 6, 8), (6,)),
    "quantized": (lambda: quantized(two_layers(nn.Linear, 6, 6)), (6,)),
    "quantized input": (lambda: quantized(two_layers(nn.Linear, 6, 6, feedforward=["0", "2"])), (6,)),
}


def quantized(model: nn.Module) -> nn.Module:
    """What serves bitsandbytes' layers, on plain ones."""
    accelerate(model)
    for module in model.modules():
        if isinstance(module, _layers.MixedLinear):
            unswap(module)
            swap(module, _layers.MixedQuantized)
    return model


@pytest.mark.parametrize("kind", BY_ROW)
@pytest.mark.parametrize("broken", ["vector", "data"])
def test_a_tenants_nan_reaches_no_others_gradient(kind, broken):
    make, size = BY_ROW[kind]
    model, names = make(), ["red", "green", BASE]
    model = model if kind.startswith("quantized") else accelerate(model)
    x = torch.randn(3, *size, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()

    def step() -> dict[str, Tensor]:
        model.zero_grad()
        x.grad = None
        model(x, adapter_names=names)[1:].sum().backward()
        return of("green", gradients(model)) | {"x": x.grad[1:]}

    want = step()
    assert len(want) == 3 and all(grad.abs().sum() > 0 for grad in want.values())
    with torch.no_grad():
        if broken == "data":
            x[0] = float("nan")
        for key, parameter in model.named_parameters():
            if broken == "vector" and key.endswith("2.ia3_l.red"):
                parameter.fill_(float("nan"))
    got = step()
    assert all(torch.equal(got[key], grad) for key, grad in want.items())


def test_images_keep_their_memory_format():
    model = accelerate(two_layers(nn.Conv2d, 4, 4, 3)).to(memory_format=torch.channels_last)
    x = torch.randn(3, 4, 8, 8, device=DEVICE).to(memory_format=torch.channels_last)
    with torch.no_grad():
        want = torch.stack([model(x, adapter_names=[name] * 3)[i] for i, name in enumerate(["red", "green", BASE])])
        got = model(x, adapter_names=["red", "green", BASE])
    assert got.is_contiguous(memory_format=torch.channels_last) and torch.equal(got, want)


@pytest.mark.parametrize("family", ["t5", "t5-gated", "bert", "gpt2"])
def test_dropout_is_pefts(family):
    """The same elements are dropped with the same seed; one after another of two factors rounds otherwise."""
    batch, theirs = batch_of(family), copy.deepcopy(plain(family)).train()
    ours = accelerate(copy.deepcopy(theirs))

    def run(model, **kwargs) -> Tensor:
        torch.manual_seed(5)
        return model(**batch, **kwargs).logits

    with alone(theirs, "red"), alone(ours, "red"):
        want = run(theirs)
        torch.testing.assert_close(run(ours, adapter_names=["red"] * 5), want, rtol=0, atol=1e-4)
        torch.testing.assert_close(run(ours), want, rtol=0, atol=1e-4)
        assert not torch.allclose(run(theirs.eval()), want, atol=0.1)
    got = run(ours, adapter_names=NAMES)
    for name in (BASE, "green"):
        with alone(theirs.train(), name):
            rows = [i for i, other in enumerate(NAMES) if other == name]
            torch.testing.assert_close(got[rows], run(theirs)[rows], rtol=0, atol=1e-4)


def test_bf16_base_trains_fp32_vectors():
    """No further from fp64 than PEFT's gradients."""
    model, batch = trainable(plain("llama")), batch_of("llama", "right")
    for key, parameter in model.named_parameters():
        if "ia3_l" not in key:
            parameter.data = parameter.data.bfloat16()
    ours = accelerate(copy.deepcopy(model))
    row_losses(ours, batch, adapter_names=NAMES).sum().backward()
    got, same, fp64 = gradients(ours), pefts(model, batch), pefts(model, batch, torch.float64)
    assert set(got) == set(same) and all(grad.dtype == torch.float32 for grad in got.values())
    got, same, fp64 = (torch.cat([found[key].double().flatten() for key in same]) for found in (got, same, fp64))
    assert (got - fp64).norm() <= 1.2 * (same - fp64).norm()


class Rows(torch.utils.data.Dataset):
    """Texts of two tasks, and none of the third's."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> dict:
        ids = text([6], seed=i)["input_ids"][0]
        return {"input_ids": ids, "labels": ids, "adapter_names": NAMES[i % 5]}


def collate(rows: list[dict]) -> dict:
    batch = {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels")}
    return batch | {"adapter_names": [row["adapter_names"] for row in rows]}


class TestLoops:
    """Trainer and Accelerator run unchanged on batches that carry adapter_names, and train what a plain loop trains."""

    def loop(self, model: nn.Module) -> list[float]:
        optimizer, losses = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), []
        for i in range(0, len(Rows()), 4):
            batch = collate([Rows()[j] for j in range(i, i + 4)])
            batch = {key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in batch.items()}
            # what Trainer divides by: it does not know that a prompt predicts the first token, in PEFT either
            loss = model(**batch, num_items_in_batch=torch.tensor(4 * 5)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def models(self, make) -> tuple[nn.Module, nn.Module, dict]:
        ours = accelerate(make())
        return ours, copy.deepcopy(ours), {key: value.clone() for key, value in ours.state_dict().items()}

    def assert_trained(self, model: nn.Module, other: nn.Module, before: dict) -> None:
        after, want = model.state_dict(), other.state_dict()
        for key, value in before.items():
            torch.testing.assert_close(after[key], want[key], rtol=1e-4, atol=1e-5)
            assert torch.equal(after[key], value) != (".red" in key or ".green" in key), key

    @pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
    @pytest.mark.parametrize("method", ["ia3", "prompts"])
    def test_trainer(self, method, checkpointing, tmp_path):
        make = {
            "ia3": lambda: trainable(plain("llama")),
            "prompts": lambda: trainable(plain_prompts("llama", "PROMPT_TUNING")),
        }[method]
        model, other, before = self.models(make)
        arguments = transformers.TrainingArguments(
            output_dir=tmp_path, per_device_train_batch_size=4, max_steps=6, learning_rate=0.1, optim="sgd",
            lr_scheduler_type="constant", max_grad_norm=0, logging_steps=1, report_to=[], save_strategy="no",
            remove_unused_columns=False, gradient_checkpointing=checkpointing, disable_tqdm=True,
            use_cpu=DEVICE == "cpu",
        )  # fmt: skip

        class InOrder(transformers.Trainer):
            def _get_train_sampler(self, *args):
                return torch.utils.data.SequentialSampler(self.train_dataset)

        trainer = InOrder(model, arguments, train_dataset=Rows(), data_collator=collate)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses == pytest.approx(self.loop(other.train()), rel=1e-3)
        self.assert_trained(model, other, before)

    def test_accelerator(self):
        model, other, before = self.models(lambda: trainable(plain("llama")))
        accelerator = hf_accelerate.Accelerator(cpu=DEVICE == "cpu")
        loader = torch.utils.data.DataLoader(Rows(), batch_size=4, collate_fn=collate)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        losses = []
        for batch in loader:
            loss = prepared(**batch, num_items_in_batch=torch.tensor(4 * 5)).loss
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        assert losses == pytest.approx(self.loop(other), rel=1e-4)
        self.assert_trained(accelerator.unwrap_model(prepared), other, before)

    def test_adamw_leaves_absent_adapters_alone(self):
        """A gradient of zero would decay them."""
        model, batch = accelerate(trainable(plain("llama"))), batch_of("llama")
        before = {key: value.clone() for key, value in model.state_dict().items()}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
        for names in (NAMES, ["red"] * 5, [BASE, "red", BASE, BASE, BASE]):
            optimizer.zero_grad()
            row_losses(model, batch, adapter_names=names).sum().backward()
            optimizer.step()
            present = {name for name in names if name != BASE}
            moved = {
                key.split(".")[-1] for key, value in model.state_dict().items() if not torch.equal(value, before[key])
            }
            assert moved == present
            before = {key: value.clone() for key, value in model.state_dict().items()}

    def test_base_rows_alone(self):
        """Nothing to train: the result needs no gradient, as of a model whose adapters are disabled."""
        model = accelerate(trainable(plain("llama")))
        assert not model(**batch_of("llama"), adapter_names=[BASE] * 5).logits.requires_grad
