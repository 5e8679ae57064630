"""Training: what is saved for backward beside PEFT's, mixed batches that train each task as if alone, merging."""

import copy
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import peft_ops
from bench import training
from bench.training import saved_bytes
from peft_ops.nn import IA3GatedMLP, IA3Linear, TaskBatch
from tests.conftest import DEVICE, INTERPRET, assert_as_good_as_torch

NAMES = ("red", "green", "blue")
fast = pytest.mark.skipif(INTERPRET, reason="thousands of programs; the operators' own tests interpret the kernels")


def peft_layer(base: nn.Linear, is_feedforward: bool) -> nn.Module:
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=["0"] if is_feedforward else [])
    return peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]


class TestMemory:
    """A frozen bf16 base with fp32 vectors, as PEFT trains by default, and an input that needs a gradient."""

    M, N = 64, 512

    def ratio_to_peft(self, is_feedforward: bool) -> tuple[float, float]:
        """Bytes saved per element of the scaled tensor: ours and PEFT's."""
        base = nn.Linear(self.N, self.N, dtype=torch.bfloat16, device=DEVICE).requires_grad_(False)
        theirs, ours = peft_layer(copy.deepcopy(base), is_feedforward), IA3Linear(base, is_feedforward)
        ours.add_adapter("default")
        x = torch.randn(self.M, self.N, dtype=torch.bfloat16, device=DEVICE, requires_grad=True) * 1
        batch = TaskBatch.of_rows(["default"] * self.M, DEVICE)
        peft_bytes = saved_bytes(lambda: theirs(x), theirs.parameters())
        own = saved_bytes(lambda: ours(x, batch), ours.parameters()) - self.table_bytes(ours)
        return own / x.numel(), peft_bytes / x.numel()

    def table_bytes(self, layer: IA3Linear) -> int:
        return 4 * layer.features * len(layer.ia3_l)

    def test_feedforward_saves_half_of_peft(self):
        ours, pefts = self.ratio_to_peft(is_feedforward=True)
        assert ours == 2 and pefts >= 2 * ours, (ours, pefts)

    def test_keys_and_values_save_no_more_than_peft(self):
        ours, pefts = self.ratio_to_peft(is_feedforward=False)
        assert ours == 2 and pefts >= ours, (ours, pefts)

    def test_gated_mlp_saves_its_two_pre_activations(self):
        gate, up = (nn.Linear(64, self.N, dtype=torch.bfloat16, device=DEVICE).requires_grad_(False) for _ in range(2))
        down = nn.Linear(self.N, 64, dtype=torch.bfloat16, device=DEVICE).requires_grad_(False)
        mlp = IA3GatedMLP(gate, up, down)
        mlp.add_adapter("red")
        x = torch.randn(self.M, 64, dtype=torch.bfloat16, device=DEVICE, requires_grad=True) * 1
        batch = TaskBatch.of_rows(["red"] * self.M, DEVICE)
        own = saved_bytes(lambda: mlp(x, batch), mlp.parameters()) - self.table_bytes(mlp.down_proj)
        eager = saved_bytes(lambda: down(F.silu(gate(x)) * up(x)), mlp.parameters())
        assert own == 2 * 2 * self.M * self.N
        assert eager == 3 * 2 * self.M * self.N, "the frozen layer itself saves silu's output too"

    @fast
    def test_llama_layer_saves_less_than_the_frozen_layer(self):
        """Llama-3-8B's proportions at a sixteenth: what k and v save more, the gated MLP saves twice over."""
        sizes = {name: size // 16 if "size" in name else size for name, size in training.LLAMA_3_8B.items()}
        sizes |= dict(num_attention_heads=8, num_key_value_heads=2, head_dim=32)
        found = training.kept_bytes(training.layers(sizes, 3, 128, DEVICE))
        assert found["peft_ops, mixed batch"] < 0.85 * found["frozen"] < 0.6 * found["PEFT, one adapter"], found


class TestMixedTraining:
    """One batch of rows of several tasks against each task's rows alone, everything else equal."""

    def layers(self):
        torch.manual_seed(0)
        linear = [
            nn.Linear(*size).to(DEVICE).requires_grad_(False) for size in ((16, 24), (16, 48), (16, 48), (48, 16))
        ]
        model = nn.ModuleList([IA3Linear(linear[0]), IA3GatedMLP(*linear[1:])])
        for module in model:
            for name in NAMES:
                module.add_adapter(name)
        return model

    def loss(self, model, x, rows, target) -> Tensor:
        """Per row, so that what one row adds does not depend on how many there are."""
        batch = TaskBatch.of_rows(rows, DEVICE, NAMES)
        y = torch.cat([model[0](x, batch), model[1](x, batch)], -1)
        return (y - target).square().mean(-1)

    def data(self, seed: int, rows: int):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(rows, 16, generator=generator).to(DEVICE), torch.randn(rows, 40, generator=generator).to(
            DEVICE
        )

    def gradients(self, model, x, rows, target) -> dict[str, list[Tensor | None]]:
        model.zero_grad(set_to_none=True)
        self.loss(model, x, rows, target).sum().backward()
        vectors = {name: [model[0].ia3_l[name], model[1].down_proj.ia3_l[name]] for name in NAMES}
        return {name: [v.grad for v in parameters] for name, parameters in vectors.items()}

    def test_other_rows_do_not_change_a_tasks_gradient(self):
        """Bitwise: the rows keep their places, what stands around them changes task and data."""
        model, (x, target) = self.layers(), self.data(1, 12)
        rows = ["red", "green", None, "red", "blue", "red"] * 2
        want = self.gradients(model, x, rows, target)["red"]
        others = [i for i, name in enumerate(rows) if name != "red"]
        x2, target2 = x.clone(), target.clone()
        x2[others] = torch.randn_like(x2[others])
        target2[others] = 100.0
        rows2 = [name if name == "red" else "green" if i % 2 else None for i, name in enumerate(rows)]
        got = self.gradients(model, x2, rows2, target2)
        assert all(torch.equal(a, b) for a, b in zip(got["red"], want, strict=True))
        assert any(not torch.equal(a, torch.zeros_like(a)) for a in want)

    def test_absent_adapters_get_no_gradient(self):
        model, (x, target) = self.layers(), self.data(2, 4)
        grads = self.gradients(model, x, ["red", None, "red", "red"], target)
        # the table is stacked from the names of the batch: blue and green are in it here, with no row of their own
        assert all((g is None or not g.any()) for name in ("green", "blue") for g in grads[name])

    def test_adamw_in_mixed_batches_equals_each_task_alone(self):
        """Three tasks take turns in the rows of a batch for ten steps; each optimizer sees its own task alone."""
        mixed, alone = self.layers(), {name: self.layers() for name in NAMES}
        optimizers = {name: self.adamw(mixed, name) for name in NAMES}
        single = {name: self.adamw(alone[name], name) for name in NAMES}
        for step in range(10):
            x, target = self.data(10 + step, 9)
            rows = [NAMES[(i + step) % 3] if i % 4 else None for i in range(9)]
            present = tuple(dict.fromkeys(name for name in rows if name))
            mixed.zero_grad(set_to_none=True)
            self.loss(mixed, x, rows, target).sum().backward()
            for name in NAMES:
                own = [i for i, row in enumerate(rows) if row == name]
                if name in present:
                    optimizers[name].step()
                    alone[name].zero_grad(set_to_none=True)
                    self.loss(alone[name], x[own], [name] * len(own), target[own]).sum().backward()
                    single[name].step()
        for name in NAMES:
            for a, b in zip(self.vectors(mixed, name), self.vectors(alone[name], name), strict=True):
                assert (a - 1).abs().max() > 0.01, "it has trained"
                torch.testing.assert_close(a, b, rtol=0, atol=3e-6)

    def vectors(self, model, name):
        return [model[0].ia3_l[name], model[1].down_proj.ia3_l[name]]

    def adamw(self, model, name):
        return torch.optim.AdamW(self.vectors(model, name), lr=0.01)


class TestScalingAndRecomputing:
    """What training loops wrap around a model changes no bit."""

    def model(self):
        torch.manual_seed(3)
        layers = [nn.Linear(*s, device=DEVICE).requires_grad_(False) for s in ((16, 48), (16, 48), (48, 16))]
        model = nn.ModuleList([IA3GatedMLP(*layers), IA3Linear(nn.Linear(16, 8, device=DEVICE).requires_grad_(False))])
        for module in model:
            for name in NAMES:
                module.add_adapter(name)
        return model, torch.randn(6, 16, device=DEVICE), TaskBatch.of_rows(["red", None, "green"] * 2, DEVICE, NAMES)

    def test_grad_scaler(self):
        """A scale that is a power of two, and an overflow that it skips."""
        trained = []
        for enabled in (False, True):
            model, x, batch = self.model()
            scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0, enabled=enabled)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                scaler.scale(model[1](model[0](x, batch), batch).square().sum()).backward()
                scaler.step(optimizer)
                scaler.update()
            trained.append([p.detach().clone() for p in model.parameters()])
            if enabled:
                optimizer.zero_grad()
                scaler.scale(model[1](x * 1e38, batch).square().sum()).backward()
                scaler.step(optimizer)
                assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained[-1], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))

    @pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
    def test_checkpointing(self, reentrant):
        grads = []
        for recompute in (False, True):
            model, x, batch = self.model()
            x.requires_grad_()
            h = checkpoint(model[0], x, batch, use_reentrant=reentrant) if recompute else model[0](x, batch)
            model[1](h, batch).square().sum().backward()
            vectors = [p for p in model.parameters() if p.requires_grad]
            grads.append([x.grad, *(p.grad for p in vectors)])
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(*grads, strict=True))
        assert any(g is not None and g.any() for g in grads[0][1:])


class TestMerge:
    @pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def dtype(self, request):
        return request.param

    @pytest.mark.parametrize("is_feedforward", [False, True], ids=["output", "feedforward"])
    def test_merge_is_pefts_and_unmerge_is_exact(self, is_feedforward, dtype):
        """Bitwise PEFT's merged weights; bitwise the old ones back, where PEFT loses rows whose scale is zero."""
        base = nn.Linear(12, 20, dtype=dtype, device=DEVICE).requires_grad_(False)
        theirs, ours = peft_layer(copy.deepcopy(base), is_feedforward), IA3Linear(base, is_feedforward)
        vector = torch.randn_like(ours.add_adapter("default"))
        vector.view(-1)[[0, 3]] = 0.0
        for module in (ours, theirs):
            module.ia3_l["default"].data.copy_(vector)
        before = copy.deepcopy(base.state_dict())
        ours.merge("default")
        theirs.merge()
        for key, value in theirs.base_layer.state_dict().items():
            assert torch.equal(base.state_dict()[key], value), key
        ours.unmerge()
        assert all(torch.equal(base.state_dict()[key], value) for key, value in before.items())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs.unmerge()
        assert not torch.equal(theirs.base_layer.weight, before["weight"]), "PEFT's division is not exact"

    def test_merged_model_runs_the_bare_operators(self):
        """No operator more than the bare layer: the same list of calls."""

        class Calls(TorchDispatchMode):
            def __init__(self):
                super().__init__()
                self.names = []

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                self.names.append(str(func))
                return func(*args, **(kwargs or {}))

        base = nn.Linear(12, 20, device=DEVICE).requires_grad_(False)
        layer, x = IA3Linear(copy.deepcopy(base)), torch.randn(4, 12, device=DEVICE)
        nn.init.normal_(layer.add_adapter("red"))
        with torch.no_grad():
            want = layer(x, TaskBatch.of_rows(["red"] * 4, DEVICE))
            layer.merge("red")
            with Calls() as bare:
                base(x)
            with Calls() as merged:
                got = layer(x)
        assert merged.names == bare.names and len(merged.names) > 0
        torch.testing.assert_close(got, want)

    def test_a_merged_layer_refuses_names(self):
        layer = IA3Linear(nn.Linear(4, 4, device=DEVICE).requires_grad_(False))
        for name in NAMES:
            layer.add_adapter(name)
        layer.merge("red")
        with pytest.raises(ValueError, match=r"IA3Linear: 'red' is merged .* got \['green'\]"):
            layer(torch.randn(2, 4, device=DEVICE), TaskBatch.of_rows(["green", None], DEVICE))
        for rows in ([None, None], ["green", None], ["elsewhere", None]):  # base rows have no base weights here
            with pytest.raises(ValueError, match="'red' is merged into the base layer"):
                layer(torch.randn(2, 4, device=DEVICE), TaskBatch.of_rows(rows, DEVICE))
        with pytest.raises(ValueError, match="'red' is merged; unmerge it before 'green'"):
            layer.merge("green")
        with pytest.raises(ValueError, match=r"one of the adapters \['red', 'green', 'blue'\], got 'pink'"):
            layer.merge("pink")

    def test_unmerge_without_the_original_refuses(self):
        layer = IA3Linear(nn.Linear(4, 4, device=DEVICE).requires_grad_(False))
        layer.add_adapter("red")
        with pytest.raises(ValueError, match="unmerge needs a merged adapter, got none"):
            layer.unmerge()
        layer.merge("red", keep_original=False)
        with pytest.raises(RuntimeError, match="'red' was merged with keep_original=False"):
            layer.unmerge()

    def test_unmerge_refuses_to_undo_what_came_after(self):
        """New weights loaded into the merged layer, or a second merge of the same weight elsewhere."""
        base = nn.Linear(4, 4, device=DEVICE).requires_grad_(False)
        first, second = IA3Linear(base), IA3Linear(base)
        for layer in (first, second):
            layer.add_adapter("red").data.fill_(3.0)
        before = base.weight.clone()
        first.merge("red")
        second.merge("red")
        with pytest.raises(RuntimeError, match="base weights have changed since 'red' was merged"):
            first.unmerge()
        second.unmerge()
        torch.testing.assert_close(base.weight, 3 * before)
        loaded = IA3Linear(nn.Linear(4, 4, device=DEVICE).requires_grad_(False))
        loaded.add_adapter("red")
        loaded.merge("red")
        loaded.load_state_dict(loaded.state_dict())
        with pytest.raises(RuntimeError, match="base weights have changed"):
            loaded.unmerge()

    @pytest.mark.parametrize("broken", ["weight", "bias"])
    def test_safe_merge_checks_weight_and_bias(self, broken):
        """PEFT's check of the bias came late; here neither is touched when one overflows."""
        base = nn.Linear(4, 4, device=DEVICE).requires_grad_(False)
        (base.weight if broken == "weight" else base.bias).fill_(1e30)
        layer = IA3Linear(base)
        layer.add_adapter("red").data.fill_(1e30)
        if broken == "bias":
            base.weight.fill_(0.0)
        before = copy.deepcopy(base.state_dict())
        with pytest.raises(ValueError, match=f"the {broken} merged with 'red' is not finite"):
            layer.merge("red", safe_merge=True)
        assert all(torch.equal(base.state_dict()[key], value) for key, value in before.items())
        assert not layer.merged_adapters

    def test_merge_writes_in_place(self):
        """Whoever shares the weight, a tied layer or a captured graph, sees the merge."""
        base = nn.Linear(4, 4, device=DEVICE).requires_grad_(False)
        where = base.weight.data_ptr(), base.bias.data_ptr()
        layer = IA3Linear(base)
        layer.add_adapter("red")
        layer.merge("red")
        layer.unmerge()
        assert (base.weight.data_ptr(), base.bias.data_ptr()) == where


class TestFold:
    @pytest.mark.parametrize("is_feedforward", [False, True], ids=["output", "feedforward"])
    @pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
    def test_folded_layer_is_the_adapted_one(self, is_feedforward, with_bias):
        x, weight, ia3_l = torch.randn(5, 12), torch.randn(20, 12), torch.randn(12 if is_feedforward else 20)
        bias = torch.randn(20) if with_bias else None
        x, weight, ia3_l = (t.to(DEVICE) for t in (x, weight, ia3_l))
        bias = None if bias is None else bias.to(DEVICE)
        args = weight, bias, ia3_l, is_feedforward

        def layer(ops, *tensors):
            x, weight, bias, ia3_l = tensors
            return ops.ia3_linear(x, weight, bias, ia3_l=ia3_l, is_feedforward=is_feedforward)

        got = F.linear(x, *peft_ops.ia3_fold(*args))
        double = [None if t is None else t.double() for t in (x, weight, bias, ia3_l)]
        same = F.linear(x, *peft_ops.reference.ia3_fold(*args))
        assert_as_good_as_torch(got, same, layer(peft_ops.reference, *double))

    def test_shapes_of_peft_vectors(self):
        weight, bias = torch.randn(6, 4), torch.randn(6)
        vector = torch.randn(6)
        want = peft_ops.ia3_fold(weight, bias, vector)
        for shaped in (vector[:, None], vector[None]):
            got = peft_ops.ia3_fold(weight, bias, shaped)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    def test_differentiates(self):
        weight, bias, ia3_l = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((6, 4), (6,), (6,)))
        assert torch.autograd.gradcheck(peft_ops.ia3_fold, (weight, bias, ia3_l))
        ff = torch.randn(4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda w, v: peft_ops.ia3_fold(w, None, v, True)[0], (weight, ff))

    @pytest.mark.parametrize(
        ("arguments", "error", "text"),
        [
            (dict(weight=torch.ones(3)), ValueError, r"ia3_fold: weight must have 2 dimensions, got shape \[3\]"),
            (dict(weight=torch.ones(6, 4).int()), TypeError, "ia3_fold: weight must have dtype .*, got int32"),
            (dict(bias=torch.ones(4)), ValueError, r"ia3_fold: bias must have shape \[6\], got \[4\]"),
            (dict(ia3_l=torch.ones(4)), ValueError, r"ia3_fold: ia3_l must have shape \[6\], .*, got \[4\]"),
            (dict(ia3_l=torch.ones(2, 3)), ValueError, r"ia3_fold: ia3_l must have shape \[6\], .*, got \[2, 3\]"),
            (dict(is_feedforward=True), ValueError, r"ia3_fold: ia3_l must have shape \[4\], .*, got \[6\]"),
        ],
        ids=["rank", "dtype", "bias", "length", "matrix", "feedforward"],
    )
    def test_errors(self, arguments, error, text):
        defaults = dict(weight=torch.ones(6, 4), bias=torch.ones(6), ia3_l=torch.ones(6))
        with pytest.raises(error, match=text):
            peft_ops.ia3_fold(**defaults | arguments)


class TestGatedMLP:
    def make(self, activation="silu"):
        layers = [nn.Linear(*s, device=DEVICE).requires_grad_(False) for s in ((16, 48), (16, 48), (48, 16))]
        mlp = IA3GatedMLP(*layers, activation=activation)
        for name in NAMES:
            nn.init.normal_(mlp.add_adapter(name), 1.0, 0.5)
        return mlp

    def test_each_row_is_pefts_down_projection(self):
        mlp, x = self.make(), torch.randn(4, 3, 16, device=DEVICE)
        rows = ["red", None, "green", "red"]
        got = mlp(x, TaskBatch.of_rows(rows, DEVICE))
        for row, name in enumerate(rows):
            down = peft_layer(copy.deepcopy(mlp.down_proj.base_layer), is_feedforward=True)
            if name:
                down.ia3_l["default"].data.copy_(mlp.down_proj.ia3_l[name])
            want = down(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
            torch.testing.assert_close(got[row], want[row])

    def test_keys_are_pefts(self):
        """PEFT wraps down_proj inside the model's own MLP: the same keys, strictly."""
        own = {key for key in self.make().state_dict() if "ia3_l" not in key}
        assert own == {f"{m}.{p}" for m in ("gate_proj", "up_proj", "down_proj.base_layer") for p in ("weight", "bias")}
        assert {k for k in self.make().state_dict() if "ia3_l" in k} == {f"down_proj.ia3_l.{name}" for name in NAMES}

    def test_without_tasks_it_is_the_frozen_layer(self):
        mlp, x = self.make("gelu_tanh"), torch.randn(5, 16, device=DEVICE)
        want = mlp.down_proj.base_layer(F.gelu(mlp.gate_proj(x), approximate="tanh") * mlp.up_proj(x))
        torch.testing.assert_close(mlp(x), want)

    def test_merging_goes_to_the_down_projection(self):
        mlp, x = self.make(), torch.randn(4, 16, device=DEVICE)
        want = mlp(x, TaskBatch.of_rows(["red"] * 4, DEVICE))
        bare = mlp(x)
        mlp.merge("red")
        torch.testing.assert_close(mlp(x), want)
        mlp.unmerge()
        assert torch.equal(mlp(x), bare)

    @pytest.mark.parametrize("name", ["gelu_new", "gelu_pytorch_tanh", "gelu_fast", "swish", "silu", "relu", "gelu"])
    def test_activations_by_transformers_names(self, name):
        from transformers.activations import ACT2FN

        mlp, x = self.make(name), torch.randn(5, 16, device=DEVICE)
        want = mlp.down_proj.base_layer(ACT2FN[name](mlp.gate_proj(x)) * mlp.up_proj(x))
        torch.testing.assert_close(mlp(x), want)

    def test_errors(self):
        good = nn.Linear(4, 8)
        with pytest.raises(TypeError, match="IA3GatedMLP: up_proj must be an nn.Linear, got Identity"):
            IA3GatedMLP(good, nn.Identity(), nn.Linear(8, 4))
        with pytest.raises(ValueError, match="down_proj must have is_feedforward=True"):
            IA3GatedMLP(good, good, IA3Linear(nn.Linear(8, 4)))
        with pytest.raises(ValueError, match="IA3GatedMLP: activation must be one of .*, got 'mish'"):
            IA3GatedMLP(good, good, nn.Linear(8, 4), activation="mish")
