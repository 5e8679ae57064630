"""Modules: PEFT's parameters and keys, mixed batches that equal single-adapter runs, gradients of own rows alone."""

import threading

import peft
import pytest
import torch
from torch import nn

from peft_ops.nn import IA3Linear, PromptEmbedding, PromptEncoder, TaskBatch, current_tasks, tasks
from tests.conftest import DEVICE, INTERPRET

ROWS = ["red", None, "green", "red"]
fast = pytest.mark.skipif(INTERPRET, reason="thousands of programs; the operators' own tests interpret the kernels")


def ia3_linear(is_feedforward: bool, names=("red", "green", "blue")) -> IA3Linear:
    layer = IA3Linear(nn.Linear(6, 10).requires_grad_(False), is_feedforward).to(DEVICE)
    for name in names:
        nn.init.normal_(layer.add_adapter(name), 1.0, 0.5)
    return layer


def peft_layer(layer: IA3Linear, name: str) -> nn.Module:
    """PEFT's layer with the same weights and the vector of one adapter."""
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=["0"] if layer.is_feedforward else [])
    model = (
        peft.get_peft_model(nn.Sequential(nn.Linear(6, 10)), config, adapter_name=name).base_model.model[0].to(DEVICE)
    )
    state = {key: value for key, value in layer.state_dict().items() if "ia3_l" not in key or key.endswith(f".{name}")}
    model.load_state_dict(state)  # strict: our keys are PEFT's
    return model


@pytest.mark.parametrize("is_feedforward", [False, True], ids=["output", "feedforward"])
class TestIA3Linear:
    def test_each_row_equals_peft(self, is_feedforward):
        layer, x = ia3_linear(is_feedforward), torch.randn(4, 3, 6, device=DEVICE)
        with tasks(ROWS, DEVICE):
            got = layer(x)
        for row, name in enumerate(ROWS):
            want = layer.base_layer(x) if name is None else peft_layer(layer, name)(x)
            if DEVICE == "cpu" and not INTERPRET:
                assert torch.equal(got[row], want[row])
            else:
                torch.testing.assert_close(got[row], want[row])

    def test_absent_adapters_get_no_gradient(self, is_feedforward):
        layer = ia3_linear(is_feedforward)
        layer(torch.randn(4, 6, device=DEVICE), TaskBatch.of_rows(ROWS, DEVICE)).sum().backward()
        assert layer.ia3_l["blue"].grad is None
        assert layer.ia3_l["red"].grad.shape == layer.ia3_l["red"].shape

    def test_gradient_comes_from_own_rows_alone(self, is_feedforward):
        layer, x = ia3_linear(is_feedforward), torch.randn(4, 6, device=DEVICE)

        def gradient(x, rows):
            layer.zero_grad()
            layer(x, TaskBatch.of_rows(rows, DEVICE, ("red", "green", "blue"))).square().sum().backward()
            return layer.ia3_l["red"].grad

        mixed = gradient(x, ROWS)
        others = x.clone()
        others[1:3] = torch.randn(2, 6)
        assert torch.equal(mixed, gradient(others, ["red", "blue", "blue", "red"]))
        torch.testing.assert_close(mixed, gradient(x[[0, 3]], ["red", "red"]))

    def test_adapter_of_other_modules_is_the_base_model_here(self, is_feedforward):
        layer, x = ia3_linear(is_feedforward), torch.randn(2, 6, device=DEVICE)
        with tasks(["elsewhere", "red"], DEVICE):
            mixed = layer(x)
        with tasks([None, "red"], DEVICE):
            assert torch.equal(layer(x), mixed)
        with tasks(["elsewhere", None], DEVICE):
            assert torch.equal(layer(x), layer.base_layer(x))

    def test_kept_table_is_served_until_a_vector_changes(self, is_feedforward):
        layer, x = ia3_linear(is_feedforward), torch.randn(4, 6, device=DEVICE)
        batch = TaskBatch.of_rows(ROWS, DEVICE)
        with torch.no_grad():
            before = layer(x, batch)
            layer.keep_table(batch.names)
            served = layer._served[batch.names][1]
            served.mul_(2)
            assert not torch.equal(layer(x, batch), before), "the table is not used"
            served.div_(2)
            assert torch.equal(layer(x, batch), before)
            layer.ia3_l["red"].mul_(2)
            assert not torch.equal(layer(x, batch), before), "a stale table is served"
        layer.keep_table(batch.names)
        assert layer(x, batch).requires_grad, "training must not read the snapshot"

    def test_kept_table_follows_an_optimizer_that_leaves_no_trace(self, is_feedforward):
        """Fused AdamW does not count its writes: a forward with gradients ends what is served."""
        layer, x = ia3_linear(is_feedforward), torch.randn(4, 6, device=DEVICE)
        batch = TaskBatch.of_rows(["red"] * 4, DEVICE)
        layer.keep_table(("red",))
        optimizer = torch.optim.AdamW(layer.ia3_l.parameters(), lr=0.5, fused=True)
        layer(x, batch).square().sum().backward()
        optimizer.step()
        want = layer(x, batch).detach()
        with torch.no_grad():
            assert torch.equal(layer(x, batch), want)

    def test_kept_table_ends_with_its_adapter(self, is_feedforward):
        """Another tenant under the same name, whose vector may lie where the old one lay."""
        layer, x = ia3_linear(is_feedforward, ("red",)), torch.randn(4, 6, device=DEVICE)
        batch = TaskBatch.of_rows(["red"] * 4, DEVICE)
        layer.keep_table(("red",))
        served = layer._served["red",]
        del layer.ia3_l["red"]
        with torch.no_grad():
            layer.add_adapter("red").copy_(7 * torch.ones_like(layer.ia3_l["red"]))
            got = layer(x, batch)
            layer.keep_table(None)
            assert torch.equal(got, layer(x, batch))
        assert served[0][0][0] is not layer.ia3_l["red"], "the stamp keeps the old vector, and its address, alive"

    def test_without_tasks_it_is_the_base_layer(self, is_feedforward):
        layer, x = ia3_linear(is_feedforward), torch.randn(2, 6, device=DEVICE)
        assert torch.equal(layer(x), layer.base_layer(x))


def test_new_vectors_are_ones_in_peft_shape():
    assert torch.equal(ia3_linear(False, ()).add_adapter("x"), torch.ones(10, 1, device=DEVICE))
    assert torch.equal(ia3_linear(True, ()).add_adapter("x"), torch.ones(1, 6, device=DEVICE))


def test_half_precision_base_gets_fp32_vectors():
    layer = IA3Linear(nn.Linear(6, 10, dtype=torch.bfloat16, device=DEVICE))
    assert layer.add_adapter("red").dtype == torch.float32
    assert (
        layer(torch.ones(1, 6, dtype=torch.bfloat16, device=DEVICE), TaskBatch.of_rows(["red"], DEVICE)).dtype
        == torch.bfloat16
    )


class TestTasks:
    def test_rows_become_ids(self):
        batch = TaskBatch.of_rows(["green", None, "red", "green"])
        assert batch.names == ("green", "red") and batch.ids.tolist() == [0, -1, 1, 0]
        assert TaskBatch.of_rows(["green", None], names=("red", "green")).ids.tolist() == [1, -1]

    def test_context_nests_and_ends_with_an_exception(self):
        assert current_tasks() is None
        with tasks(["red"]) as outer:
            with pytest.raises(RuntimeError), tasks(["green"]):
                raise RuntimeError
            assert current_tasks() is outer
        assert current_tasks() is None

    def test_context_belongs_to_one_thread(self):
        seen = []
        with tasks(["red"]):
            thread = threading.Thread(target=lambda: seen.append(current_tasks()))
            thread.start()
            thread.join()
        assert seen == [None]

    def test_given_batch_wins_over_the_context(self):
        layer, x = ia3_linear(False), torch.randn(1, 6, device=DEVICE)
        with tasks(["red"], DEVICE):
            assert torch.equal(
                layer(x, TaskBatch.of_rows(["green"], DEVICE)), layer(x, TaskBatch.of_rows(["green"], DEVICE))
            )
            assert not torch.equal(layer(x, TaskBatch.of_rows(["green"], DEVICE)), layer(x))


def peft_encoder(kind: str, **sizes) -> nn.Module:
    config = peft.PromptEncoderConfig(
        encoder_reparameterization_type=kind.upper(),
        num_transformer_submodules=1,
        num_virtual_tokens=5,
        token_dim=8,
        **sizes,
    )
    return peft.PromptEncoder(config)


@pytest.mark.parametrize("kind", ["lstm", "mlp"])
def test_prompt_encoder_is_pefts(kind):
    torch.manual_seed(1)
    ours = PromptEncoder(5, 8, kind, 6)
    torch.manual_seed(1)
    theirs = peft_encoder(kind, encoder_hidden_size=6)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), f"{key}: another initialisation"
    assert torch.equal(ours(), theirs(torch.arange(5)))
    other = PromptEncoder(5, 8, kind, 6)
    theirs.load_state_dict(other.state_dict())
    assert torch.equal(other(), theirs(torch.arange(5)))


def prompt_embedding(lengths=(("red", 3), ("green", 2), ("blue", 3))) -> PromptEmbedding:
    embedding = PromptEmbedding()
    for name, length in lengths:
        embedding.add_adapter(name, PromptEncoder(length, 4, "mlp"))
    return embedding.to(DEVICE)


class TestPromptEmbedding:
    ids = torch.tensor([[5, 6, 0], [7, 0, 0], [8, 9, 1], [2, 3, 4]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]])

    def run(self, prompts, rows, **kwargs):
        table = torch.arange(40.0, device=DEVICE).reshape(10, 4)
        return prompts(
            self.ids.to(DEVICE), table, self.mask.to(DEVICE), TaskBatch.of_rows(rows, DEVICE), **kwargs
        ), table

    def test_prompt_before_the_text_and_none_for_base_rows(self):
        prompts = prompt_embedding()
        got, table = self.run(prompts, ROWS)
        assert got.inputs_embeds.shape == (4, 6, 4)
        assert torch.equal(got.inputs_embeds[0, :5], torch.cat([prompts.encoders["red"](), table[[5, 6]]]))
        assert torch.equal(got.inputs_embeds[1, :1], table[[7]])
        assert torch.equal(got.inputs_embeds[2, :5], torch.cat([prompts.encoders["green"](), table[[8, 9, 1]]]))
        assert got.attention_mask.tolist()[:3] == [[1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]]

    def test_runs_the_encoders_of_the_batch_once_each(self):
        prompts, calls = prompt_embedding(), []
        for name, encoder in prompts.encoders.items():
            encoder.register_forward_hook(lambda *_, name=name: calls.append(name))
        got, _ = self.run(prompts, ROWS)
        assert sorted(calls) == ["green", "red"]
        got.inputs_embeds.sum().backward()
        assert all(p.grad is None for p in prompts.encoders["blue"].parameters())
        assert all(p.grad is not None for p in prompts.encoders["green"].parameters())

    def test_gradient_comes_from_own_rows_alone(self):
        prompts = prompt_embedding()

        def gradients(rows):
            prompts.zero_grad()
            got, _ = self.run(prompts, rows)
            got.inputs_embeds[[0, 3]].square().sum().backward()
            return [p.grad for p in prompts.encoders["red"].parameters()]

        for mixed, alone in zip(gradients(ROWS), gradients(["red", "blue", "blue", "red"]), strict=True):
            assert torch.equal(mixed, alone)

    def test_kept_prompts_need_no_encoder(self):
        prompts = prompt_embedding()
        with torch.no_grad():
            want, _ = self.run(prompts, ROWS)
            prompts.keep_table(("red", "green"))
            del prompts.encoders["red"]
            assert torch.equal(self.run(prompts, ROWS)[0].inputs_embeds, want.inputs_embeds)
            prompts.keep_table(None)
            assert not torch.equal(self.run(prompts, ROWS)[0].inputs_embeds[0], want.inputs_embeds[0])

    def test_kept_prompts_are_not_served_stale(self):
        prompts = prompt_embedding()
        with torch.no_grad():
            want, _ = self.run(prompts, ROWS)
            prompts.keep_table(("red", "green"))
            nn.init.zeros_(prompts.encoders["red"].embedding.weight)
            assert not torch.equal(self.run(prompts, ROWS)[0].inputs_embeds, want.inputs_embeds)

    def test_adapters_without_a_prompt(self):
        got, table = self.run(prompt_embedding(), ["elsewhere", None, "green", "elsewhere"])
        assert got.inputs_embeds.shape == (4, 5, 4)
        assert torch.equal(got.inputs_embeds[3, :3], table[[2, 3, 4]])
        got, table = self.run(prompt_embedding(), ["elsewhere"] * 4)
        assert torch.equal(got.inputs_embeds, table[self.ids.to(DEVICE)])

    def test_labels_follow(self):
        got, _ = self.run(prompt_embedding(), ROWS, labels=self.ids.to(DEVICE))
        assert got.labels[0].tolist() == [-100, -100, -100, 5, 6, -100]


@fast
def test_mixed_training_equals_training_alone():
    """Five steps of AdamW: an adapter that shares its batches with others ends where it ends without them."""

    def train(rows):
        torch.manual_seed(0)
        layer = ia3_linear(False)
        x = torch.randn(4, 3, 6, device=DEVICE)
        optimizer = torch.optim.AdamW(layer.ia3_l.parameters(), lr=0.1, weight_decay=0.1)
        for _ in range(5):
            layer(x, TaskBatch.of_rows(rows, DEVICE)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return layer.ia3_l

    mixed, alone = train(["red", None, "green", "red"]), train(["red", None, None, "red"])
    assert torch.equal(mixed["red"], alone["red"])
    assert torch.equal(mixed["blue"], alone["blue"]), "weight decay moved an absent adapter"


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: IA3Linear(nn.Conv2d(1, 1, 1)), TypeError, "IA3Linear: base must be an nn.Linear, got Conv2d"),
        (
            lambda: ia3_linear(False).add_adapter("red"),
            ValueError,
            "IA3Linear: adapter must have a new name, got 'red'",
        ),
        (
            lambda: prompt_embedding().add_adapter("red", PromptEncoder(1, 4)),
            ValueError,
            "PromptEmbedding: adapter must have a new name, got 'red'",
        ),
        (
            lambda: PromptEncoder(1, 4, "gru"),
            ValueError,
            "PromptEncoder: encoder_reparameterization_type must be 'lstm', 'mlp' or 'embedding', got 'gru'",
        ),
        (
            lambda: TaskBatch.of_rows(["x"], names=("red",)),
            ValueError,
            "TaskBatch: rows must name adapters of \\['red'\\], got 'x'",
        ),
    ],
    ids=["base", "ia3-name", "prompt-name", "encoder-type", "row-name"],
)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()
