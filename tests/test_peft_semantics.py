"""What accelerate changes and what it leaves to PEFT: layers of every kind, switches, names, life cycle, restore."""

import copy
import importlib.util
import pickle
import sys
import threading
import types
import warnings

import peft
import pytest
import torch
from peft.tuners import ia3
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_ops
from peft_ops import accelerate, report, restore
from peft_ops.integrations import peft as integration
from peft_ops.integrations._swap import Swapped
from peft_ops.integrations.peft import using_adapters
from tests.conftest import DEVICE
from tests.tiny import BASE, alone, batch_for, ia3_model, prompt_model, randomized, row_by_row, set_vectors

pytestmark = pytest.mark.usefixtures("one_thread")
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="bitwise PEFT's on a CPU; on a GPU the linear layers are fused")
NAMES = ["red", BASE, "green", "red", "green"]
LEVELS = ["module", "auto"]
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def layer_model(layer: nn.Module, feedforward: bool, names=("red", "green"), vectors=FP32, **options) -> nn.Module:
    """A PEFT model of one layer, whose adapters hold their vectors in `vectors`."""
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=["0"] if feedforward else [], **options)
    model = peft.get_peft_model(nn.Sequential(layer), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, copy.deepcopy(config))
    for name in names:
        set_vectors(model, name)
    for key, parameter in model.named_parameters():
        if "ia3_l" in key:
            parameter.data = parameter.data.to(vectors)
    return model.to(DEVICE).eval()


LAYERS = {
    "linear": (lambda: nn.Linear(12, 20), (5, 3, 12), {}),
    "linear without bias": (lambda: nn.Linear(12, 20, bias=False), (5, 12), {}),
    "transposed": (lambda: Conv1D(20, 12), (5, 3, 12), {"fan_in_fan_out": True}),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), (5, 4, 5, 5), {}),
    "grouped conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), (5, 4, 5, 5), {}),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (5, 4, 3, 3, 3), {}),
}


@on_cpu
@pytest.mark.parametrize("feedforward", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("kind", LAYERS)
class TestLayers:
    """Bitwise PEFT's, also where vectors are narrower than what they scale, which PEFT then rounds."""

    @pytest.mark.parametrize(
        "dtype, vectors", [(FP32, FP32), (BF16, FP32), (BF16, BF16), (FP32, BF16), (FP32, FP64), (FP64, FP32)]
    )
    def test_rows(self, kind, feedforward, dtype, vectors):
        make, shape, options = LAYERS[kind]
        model = layer_model(randomized(make()).to(dtype), feedforward, vectors=vectors, **options)
        x = torch.randn(shape, dtype=dtype)
        want = row_by_row(model, NAMES, lambda model: model(x))
        assert torch.equal(accelerate(model)(x, adapter_names=NAMES), want)

    @pytest.mark.parametrize("first, second", [(FP32, FP32), (BF16, FP32), (FP32, BF16)])
    def test_several_active_adapters(self, kind, feedforward, first, second):
        make, shape, options = LAYERS[kind]
        model = layer_model(randomized(make()).to(BF16), feedforward, vectors=first, **options)
        layer = model.base_model.model[0]
        layer.ia3_l["green"].data = layer.ia3_l["green"].data.to(second)
        x, found = torch.randn(shape, dtype=BF16), []
        for active in (["red", "green"], ["green", "red"], ["red"], ["absent"]):
            layer._active_adapter = active  # as a layer has it that only some of the active adapters target
            want = restore(model)(x)
            assert torch.equal(accelerate(model)(x), want), active
            found.append(want)
        assert not torch.equal(found[0], found[2]) and not torch.equal(found[2], found[3])

    def test_switches(self, kind, feedforward):
        make, shape, options = LAYERS[kind]
        ours = layer_model(randomized(make()), feedforward, **options)
        theirs, x = copy.deepcopy(ours), torch.randn(shape)
        accelerate(ours)

        def same(ids: bool = False) -> torch.Tensor:
            want = theirs(x)
            assert torch.equal(ours(x), want)
            return want

        red = same()
        for model in (ours, theirs):
            model.set_adapter("green")
        green = same()
        with ours.disable_adapter(), theirs.disable_adapter():
            base = same()
            assert torch.equal(ours(x, adapter_names=NAMES), base), "disabled adapters stay so for every row"
        for model in (ours, theirs):
            model.merge_adapter()
        merged = same()
        torch.testing.assert_close(merged, green)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that unmerging is inexact
            for model in (ours, theirs):
                model.unmerge_adapter()
        torch.testing.assert_close(same(), green)
        assert not torch.equal(red, green) and not torch.equal(green, base)


def bitsandbytes_layers(monkeypatch) -> dict[str, type]:
    """PEFT's own source of these layers, run without bitsandbytes: their base layer is then any linear one."""
    for name in ("is_bnb_available", "is_bnb_4bit_available"):
        monkeypatch.setattr(f"peft.import_utils.{name}", lambda: True)
    quantized = types.SimpleNamespace(Linear8bitLt=nn.Linear, Linear4bit=nn.Linear)
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.SimpleNamespace(nn=quantized))
    spec = importlib.util.spec_from_file_location("peft.tuners.ia3.bnb_of_tests", f"{ia3.__path__[0]}/bnb.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: getattr(module, name) for name in ("Linear8bitLt", "Linear4bit")}


class Quantized(nn.Linear):
    """Stands in for a quantized layer: any input, whose dtype the output has."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


@on_cpu
@pytest.mark.parametrize("feedforward", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("kind", ["Linear8bitLt", "Linear4bit"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_quantized_layers(kind, feedforward, dtype, monkeypatch):
    cls = bitsandbytes_layers(monkeypatch)[kind]
    monkeypatch.setattr(ia3, kind, cls, raising=False)
    model = layer_model(randomized(Quantized(12, 20)), feedforward)
    plain = model.base_model.model[0]
    layer = cls(plain.get_base_layer(), "red", is_feedforward=feedforward, config=peft.IA3Config())
    layer.ia3_l = plain.ia3_l
    model.base_model.model[0] = layer.eval()
    x = torch.randn(5, 3, 12, dtype=dtype)
    names = ["red", "green", "green", "red", "green"]
    want = row_by_row(model, names, lambda model: model(x))
    with model.disable_adapter():
        base = model(x.float())  # PEFT's adapted rows are computed, and returned, in fp32
    names[1], want[1] = BASE, base[1]
    accelerate(model)
    assert report(model)[0].operator == "PEFT by row"
    assert torch.equal(model(x, adapter_names=names), want)
    with model.disable_adapter():
        assert torch.equal(model(x.float(), adapter_names=names), base)


@on_cpu
@pytest.mark.parametrize("feedforward", [False, True], ids=["output", "input"])
def test_one_vector_of_features(feedforward):
    """A batch needs a dimension, a call without names does not."""
    model, x = layer_model(nn.Linear(12, 20), feedforward), torch.randn(12)
    with torch.no_grad():
        want = model(x)
        assert torch.equal(accelerate(model)(x), want)


class Sequence(nn.Module):
    """A model whose layer sees what `order` makes of [B, S, K]."""

    def __init__(self, order):
        super().__init__()
        self.proj, self.order = nn.Linear(12, 20), order

    def forward(self, inputs_embeds):
        return self.proj(self.order(inputs_embeds))


ORDERS = {
    "sequence first": lambda x: x.transpose(0, 1),
    "tokens": lambda x: x.flatten(0, 1),
    "an expert's tokens": lambda x: x.flatten(0, 1)[::2],
    "some rows": lambda x: x[1:],
    "rows twice": lambda x: torch.cat([x, x]),
}


@pytest.mark.parametrize("order", ORDERS)
def test_layers_that_do_not_see_the_batch_raise(order):
    config = peft.IA3Config(target_modules=["proj"], feedforward_modules=[])
    model = accelerate(peft.get_peft_model(Sequence(ORDERS[order]), config, adapter_name="red")).to(DEVICE)
    x = torch.randn(5, 3, 12, device=DEVICE)
    with pytest.raises(ValueError, match=r"must see the batch in its first dimension, 5 rows, got .* in proj"):
        model(x, adapter_names=["red"] * 4 + [BASE])


class TestNames:
    @pytest.fixture(scope="class")
    def model(self):
        return accelerate(ia3_model("llama")).to(DEVICE)

    @pytest.mark.parametrize("names, error, message", [
        ("red", TypeError, "must be a list of names, one per row, got str"),
        (3, TypeError, "must be a list of names, one per row, got int"),
        ({"red"}, TypeError, "must be a list of names, one per row, got set"),
        (["red", None, "red", "red", "red"], TypeError, "must hold names, '__base__' for the base model, got NoneType"),
        (["red"] * 4, ValueError, "must hold one name per row, for 5 rows, got 4"),
        (["red"] * 6, ValueError, "must hold one name per row, for 5 rows, got 6"),
        ([], ValueError, "must hold one name per row, for 5 rows, got 0"),
        (
            ["red", "blue", "red", "red", "red"],
            ValueError,
            r"must name adapters of the model, \['red', 'green'\] or '__base__', got 'blue'; load it with "
            r"model.load_adapter\(..., adapter_name='blue'\)",
        ),
    ])  # fmt: skip
    @pytest.mark.parametrize("call", ["forward", "generate"])
    def test_wrong_names(self, model, call, names, error, message):
        with pytest.raises(error, match=f"^adapter_names {message}"):
            getattr(model, call)(**batch_for(model, 5), adapter_names=names)

    @pytest.mark.parametrize("call", ["forward", "generate"])
    def test_a_wrong_count_for_what_an_encoder_has_read(self, call):
        """Five rows for three names of one adapter, which no layer could tell."""
        model = accelerate(ia3_model("t5")).to(DEVICE)
        batch = batch_for(model, 5)
        encoded = model.get_base_model().encoder(batch["input_ids"], batch["attention_mask"])
        for outputs in (encoded, encoded.to_tuple()):
            given = {"encoder_outputs": outputs, "attention_mask": batch["attention_mask"]}
            given |= {"decoder_input_ids": batch["decoder_input_ids"]} if call == "forward" else {"max_new_tokens": 2}
            with pytest.raises(ValueError, match="one name per row, for 5 rows, got 3"):
                getattr(model, call)(**given, adapter_names=["red"] * 3)
        with pytest.raises(ValueError, match="one name per row, for 5 rows, got 3"):
            model(encoder_outputs=encoded, labels=batch["decoder_input_ids"], adapter_names=["red"] * 3)
        given["encoder_outputs"] = encoded
        assert len(getattr(model, call)(**given, adapter_names=["red"] * 5)[0])

    def test_a_tuple_serves(self, model):
        batch = batch_for(model, 5)
        assert torch.equal(
            model(**batch, adapter_names=tuple(NAMES)).logits, model(**batch, adapter_names=NAMES).logits
        )

    def test_merged_adapters(self):
        model = accelerate(ia3_model("llama"))
        model.set_adapter("green")
        model.merge_adapter()
        batch = batch_for(model, 5)
        with pytest.raises(
            ValueError, match=r"'green' is merged into model.layers.0.*; call model.unmerge_adapter\(\)"
        ):
            model(**batch, adapter_names=NAMES)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that unmerging is inexact
            model.unmerge_adapter()
        assert model(**batch, adapter_names=NAMES).logits.isfinite().all()

    def test_a_call_that_fails_leaves_nothing_behind(self, model):
        batch = batch_for(model, 5)
        want = model(**batch).logits
        hook = model.get_base_model().lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**batch, adapter_names=NAMES)
        hook.remove()
        assert torch.equal(model(**batch).logits, want)

    def test_using_adapters(self, model):
        batch = batch_for(model, 5)
        want = model(**batch, adapter_names=NAMES).logits
        with using_adapters(model, NAMES):
            assert torch.equal(model(**batch).logits, want)
            with torch.no_grad():
                assert torch.equal(model(**batch).logits, want) and torch.equal(model(**batch).logits, want)
        assert not torch.equal(model(**batch).logits, want)

    def test_using_adapters_sees_what_is_written(self):
        model = accelerate(ia3_model("llama"))
        batch, names = batch_for(model, 3), ["red", BASE, "green"]
        with using_adapters(model, names), torch.no_grad():
            before = model(**batch).logits
            set_vectors(model, "green", seed=1)
            after = model(**batch).logits
            assert torch.equal(after, model(**batch, adapter_names=names).logits)
            assert torch.equal(before[:2], after[:2])
            assert not torch.isclose(before[2], after[2]).any()
            model.delete_adapter("green")
            with pytest.raises(ValueError, match="must name adapters of the model.*got 'green'"):
                model(**batch)

    @pytest.mark.parametrize("part", ["self_attn.k_proj.base_layer", "mlp.gate_proj", "mlp.down_proj.base_layer"])
    @pytest.mark.parametrize("how", ["hook", "global hook", "pre-hook", "forward"])
    def test_what_comes_in_the_middle_of_a_call_is_called(self, part, how):
        model = accelerate(ia3_model("llama"))
        batch, layer, seen = batch_for(model, 3), model.get_base_model().model.layers[0].get_submodule(part), []
        if how == "global hook":
            hook = nn.modules.module.register_module_forward_hook(
                lambda m, *args: seen.append(m) if m is layer else None
            )
        with using_adapters(model, ["red", BASE, "green"]), torch.no_grad():
            model(**batch)
            if how == "hook":
                layer.register_forward_hook(lambda *args: seen.append(layer))
            elif how == "pre-hook":
                layer.register_forward_pre_hook(lambda *args: seen.append(layer))
            elif how == "forward":
                layer.forward = lambda x: seen.append(layer) or nn.Linear.forward(layer, x)
            model(**batch)
        if how == "global hook":
            hook.remove()
        assert len(seen) == (2 if how == "global hook" else 1)

    def test_using_adapters_inferring_then_training(self):
        model = accelerate(ia3_model("llama", modules_to_save=["lm_head"]))
        batch, names = batch_for(model, 3), ["red", BASE, "green"]
        with using_adapters(model, names):
            with torch.inference_mode():
                want = model(**batch).logits
            logits = model(**batch).logits
            logits.sum().backward()
        torch.testing.assert_close(logits, want)

    def test_blocks_that_take_turns(self, model):
        def steps(names):
            with using_adapters(model, names):
                yield

        one, other = steps(["red"] * 3), steps(["green"] * 3)
        next(one), next(other)
        with pytest.raises(RuntimeError, match="must be left in the reverse order in which they were entered"):
            next(one)

    @pytest.mark.parametrize("below", ["base_model", "get_base_model"])
    @pytest.mark.parametrize(
        "make", [ia3_model, lambda family: prompt_model(family, {"red": 2})], ids=["ia3", "prompt"]
    )
    def test_names_given_below_the_model(self, make, below):
        model = accelerate(make("llama"))
        inner = model.base_model if below == "base_model" else model.get_base_model()
        with pytest.raises(
            ValueError, match=f"given to the PeftModel .* got them in a call of its {type(inner).__name__}"
        ):
            inner(**batch_for(model, 3), adapter_names=["red"] * 3)
        assert inner(**batch_for(model, 3)).logits.isfinite().all()

    def test_using_adapters_follows_the_switches(self, model):
        """What layers keep for the rest of the call does not outlive a switch of PEFT's."""
        batch = batch_for(model, 5)
        with model.disable_adapter():
            base = model(**batch).logits
        with torch.no_grad(), using_adapters(model, NAMES):
            want = model(**batch).logits
            with model.disable_adapter():
                assert torch.equal(model(**batch).logits, base)
            assert torch.equal(model(**batch).logits, want) and not torch.equal(want, base)

    def test_using_adapters_refuses_prompts(self):
        model = accelerate(prompt_model("llama", {"red": 3}))
        with pytest.raises(ValueError, match=r"using_adapters: adapter_names must name \(IA\)\^3 adapters"):
            with using_adapters(model, ["red"]):
                pass


def behind_the_text(forward):
    """PEFT's forward with a prompt, if it stood behind the text."""

    def changed(self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, **kwargs):
        if not self.active_peft_config.is_prompt_learning:
            return forward(self, input_ids, attention_mask, inputs_embeds, labels, **kwargs)
        embeds = self.word_embeddings(input_ids)
        embeds = torch.cat([embeds, self.get_prompt(batch_size=len(embeds))], dim=1)
        return self.base_model(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), labels=labels)

    return changed


# what of PEFT -> where it is, what it becomes, and what accelerate says
CHANGES = {
    "another product": (ia3.Linear, "forward", lambda f: lambda self, x, *a, **kw: f(self, x) + 1, "something else"),
    "another signature": (ia3.Linear, "forward", lambda f: lambda self, x, scale: f(self, x), "TypeError"),
    "another convolution": (ia3.Conv2d, "forward", lambda f: lambda self, x: f(self, x) * 2, "something else"),
    "another 3-D convolution": (ia3.Conv3d, "forward", lambda f: lambda self, x: f(self, x) * 2, "something else"),
    "other heads": (
        ModulesToSaveWrapper,
        "_forward_wrapped",
        lambda f: lambda self, *args, **kwargs: f(self, *args, **kwargs) * 2,
        "layers and heads of several adapters",
    ),
    "another prompt": (
        peft.PeftModel,
        "get_prompt",
        lambda f: lambda self, *args, **kwargs: f(self, *args, **kwargs) * 2,
        r"a model with a prompt \(PROMPT_TUNING, CAUSAL_LM\)",
    ),
    "prompts elsewhere": (peft.PeftModelForCausalLM, "forward", behind_the_text, "a model with a prompt"),
    "an encoder-decoder's prompts elsewhere": (
        peft.PeftModelForSeq2SeqLM, "forward", behind_the_text, "SEQ_2_SEQ_LM"
    ),
    "an older release": (peft, "__version__", lambda version: "0.18.1", "it is older"),
}  # fmt: skip


class TestOtherModels:
    def test_not_a_peft_model(self):
        with pytest.raises(TypeError, match="accelerate: model must be a peft.PeftModel, got Linear"):
            accelerate(nn.Linear(2, 2))

    def test_level(self):
        with pytest.raises(ValueError, match="accelerate: level must be 'auto' or 'module', got 'fast'"):
            accelerate(ia3_model("llama"), level="fast")

    def test_another_method(self):
        config = peft.LoraConfig(target_modules=["0"])
        model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
        with pytest.raises(ValueError, match="adapters must be of type IA3, PROMPT_TUNING or P_TUNING, got LORA"):
            accelerate(model)
        assert not any(isinstance(module, Swapped) for module in model.modules())

    def test_a_method_that_comes_later(self):
        model = accelerate(prompt_model("llama", {"red": 3}))
        model.peft_config["prefix"] = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        with pytest.raises(ValueError, match="got PREFIX_TUNING"):
            model(**batch_for(model, 1), adapter_names=["red"])

    def test_a_replaced_forward(self):
        model = ia3_model("llama")
        layer = model.base_model.model.model.layers[0].self_attn.k_proj
        layer.forward = lambda x: x
        with pytest.raises(ValueError, match="the forward of a Linear has been replaced by .* call accelerate before"):
            accelerate(model)
        assert not any(isinstance(module, Swapped) for module in model.modules())

    def test_functions_of_accelerated_models(self):
        model = ia3_model("llama")
        with pytest.raises(TypeError, match="accelerate: bank must be a peft_ops.nn.TaskBank, got dict"):
            accelerate(ia3_model("llama"), bank={"x": 1})
        for function in (report, lambda model: using_adapters(model, ["red"]).__enter__()):
            with pytest.raises(TypeError, match="must have been given to peft_ops.accelerate"):
                function(model)

    @pytest.mark.parametrize("change", CHANGES)
    def test_a_peft_that_computes_something_else(self, change, monkeypatch):
        target, name, make, message = CHANGES[change]
        monkeypatch.setattr(target, name, make(getattr(target, name)))
        monkeypatch.setattr(integration, "_probed", False)
        model = ia3_model("llama")
        expected = f"accelerate: peft {peft.__version__} is not one of the releases .* and later\\): .*{message}"
        with pytest.raises(RuntimeError, match=expected):
            accelerate(model)
        assert not any(isinstance(module, Swapped) for module in model.modules())
        monkeypatch.undo()
        assert isinstance(accelerate(model), Swapped)

    def test_trying_peft_leaves_nothing_behind(self, monkeypatch):
        monkeypatch.setattr(integration, "_probed", False)
        model, state = ia3_model("llama"), torch.get_rng_state()
        with warnings.catch_warnings(), torch.device("meta"), torch.inference_mode():
            warnings.simplefilter("error")
            accelerate(model)
        assert torch.equal(torch.get_rng_state(), state)

    def test_trying_peft_asks_no_backend(self, monkeypatch):
        """Kernels that cannot run on a CPU are no reason to distrust PEFT."""
        monkeypatch.setattr(integration, "_probed", False)
        with peft_ops.set_backend("triton"):
            accelerate(ia3_model("llama"))


@pytest.mark.parametrize("level", LEVELS)
class TestLifeCycle:
    @pytest.mark.parametrize("family", ["llama", "t5-gated", "bert", "gpt2", "opt"])
    def test_restore_undoes_everything(self, family, level):
        model = ia3_model(family)
        model.gradient_checkpointing_enable()
        with model.disable_adapter():  # leaves methods of the class on an instance
            pass
        model.get_base_model().register_forward_pre_hook(lambda module, args: None)

        def seen():
            return [(type(module), set(vars(module)), [*module._forward_pre_hooks]) for module in model.modules()]

        before, batch = seen(), batch_for(model, 5)
        want = model(**batch).logits
        accelerate(model, level=level)
        assert any(isinstance(module, Swapped) for module in model.modules())
        model.train()
        model(**batch, adapter_names=NAMES).logits.sum().backward()
        model.zero_grad()
        restore(model.eval())
        assert seen() == before
        assert torch.equal(model(**batch).logits, want)

    def test_twice_is_once(self, level):
        model = accelerate(ia3_model("llama"), level=level)
        classes, batch = [*map(type, model.modules())], batch_for(model, 5)
        want = model(**batch, adapter_names=NAMES).logits
        accelerate(model, level=level)
        assert [*map(type, model.modules())] == classes
        assert torch.equal(model(**batch, adapter_names=NAMES).logits, want)
        assert not any(isinstance(module, Swapped) for module in restore(model).modules())

    def test_names_of_classes_and_isinstance(self, level):
        model = ia3_model("llama")
        classes = [type(module) for module in model.modules()]
        for module, cls in zip(accelerate(model, level=level).modules(), classes, strict=True):
            assert isinstance(module, cls) and type(module).__name__ == cls.__name__

    def test_what_is_saved(self, level, tmp_path):
        model = ia3_model("bert")
        keys = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        model.save_pretrained(tmp_path / "before")
        accelerate(model, level=level)
        assert list(model.state_dict()) == list(keys)
        assert all(torch.equal(tensor, keys[key]) for key, tensor in model.state_dict().items())
        model.save_pretrained(tmp_path / "after")
        files = [path.relative_to(tmp_path / "before") for path in (tmp_path / "before").rglob("*") if path.is_file()]
        assert {path.name for path in files} >= {"adapter_model.safetensors", "adapter_config.json"}
        for path in files:
            assert (tmp_path / "after" / path).read_bytes() == (tmp_path / "before" / path).read_bytes(), path
        model.load_state_dict(keys)

    def test_adapters_come_and_go(self, level, tmp_path):
        """Loaded, added with other targets, combined, deleted, trained: plain PEFT beside it does the same."""
        other = ia3_model("llama", ["blue"])
        other.save_pretrained(tmp_path)
        ours, theirs = ia3_model("llama"), ia3_model("llama")
        accelerate(ours, level=level)
        wider = peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]
        )
        for model in (ours, theirs):
            model.load_adapter(tmp_path / "blue", adapter_name="blue")
            model.add_adapter("wide", copy.deepcopy(wider))
            set_vectors(model, "wide")
            model.add_weighted_adapter(["red", "green"], [0.3, 0.9], "both")
            model.delete_adapter("green")
            model.eval()
        assert list(ours.state_dict()) == list(theirs.state_dict())
        names = ["wide", BASE, "blue", "both", "red"]
        batch = batch_for(theirs, 5)
        want = row_by_row(theirs, names, lambda model: model(**batch).logits)
        got = ours(**batch, adapter_names=names).logits
        torch.testing.assert_close(got, want, rtol=0, atol=0 if level == "module" and DEVICE == "cpu" else 2e-5)
        assert {row.module.split(".")[-1] for row in report(ours)} == {"q_proj", "k_proj", "v_proj", "down_proj"}
        with pytest.raises(ValueError, match="got 'green'"):
            ours(**batch, adapter_names=["green"] * 5)
        for model in (ours, theirs):
            model.set_adapter("wide")
        assert [key for key, p in ours.named_parameters() if p.requires_grad] == [
            key for key, p in theirs.named_parameters() if p.requires_grad
        ]

    def test_an_adapter_added_below_the_model(self, level):
        """PEFT's tuner adds one without the model's add_adapter; the next call sees it."""
        model, batch = accelerate(ia3_model("llama", ["red"]), level=level), None
        config = peft.IA3Config(task_type="CAUSAL_LM", target_modules=["o_proj"], feedforward_modules=[])
        model.peft_config["low"] = config
        model.base_model.inject_adapter(model.base_model.model, "low")
        set_vectors(model, "low")
        batch = batch_for(model, 5)
        names = ["low", BASE, "red", "low", "red"]
        got = model.eval()(**batch, adapter_names=names).logits
        want = row_by_row(restore(model), names, lambda model: model(**batch).logits)
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5)

    @pytest.mark.parametrize("family", ["llama", "bert"])
    def test_merge_and_unload(self, family, level):
        model, plain = ia3_model(family), ia3_model(family)
        merged, want = accelerate(model, level=level).merge_and_unload(), plain.merge_and_unload()
        assert not any(isinstance(module, Swapped) for module in merged.modules())
        assert [type(module) for module in merged.modules()] == [type(module) for module in want.modules()]
        batch = batch_for(ia3_model(family), 5)
        assert torch.equal(merged(**batch).logits, want(**batch).logits)

    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    @pytest.mark.parametrize("family", ["llama", "bert", "t5-gated"])
    def test_copies(self, family, how, level):
        """A copy computes the same and is independent: names, vectors and switches are its own."""
        model = accelerate(ia3_model(family), level=level)
        batch = batch_for(model, 5)
        want = model(**batch, adapter_names=NAMES).logits
        twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        assert torch.equal(twin(**batch, adapter_names=NAMES).logits, want)
        with torch.no_grad():
            for key, parameter in twin.named_parameters():
                if "ia3_l" in key:
                    parameter.fill_(2.0)
        changed = twin(**batch, adapter_names=NAMES).logits
        assert torch.equal(changed[1], want[1]) and not torch.equal(changed[0], want[0])
        twin.delete_adapter("green")
        assert torch.equal(model(**batch, adapter_names=NAMES).logits, want)
        assert not any(isinstance(module, Swapped) for module in restore(twin).modules())
        assert isinstance(model, Swapped)


@pytest.mark.parametrize("family", ["llama", "t5-gated", "bert"])
def test_without_names_nothing_changes(family):
    """Adapters one by one, disabled and merged, and generation; bitwise where the layers are PEFT's own."""
    plain = ia3_model(family)
    batch = batch_for(plain, 5)
    for level, atol in (("module", 0 if DEVICE == "cpu" else 2e-5), ("auto", 2e-5)):
        ours = accelerate(copy.deepcopy(plain), level=level)
        for name in ("red", "green", BASE):
            with alone(plain, name) as one, alone(ours, name) as other:
                want, got = one(**batch).logits, other(**batch).logits
                torch.testing.assert_close(got, want, rtol=0, atol=atol)
                with torch.no_grad():
                    torch.testing.assert_close(other(**batch).logits, want, rtol=0, atol=atol)


@on_cpu
@pytest.mark.parametrize("level", LEVELS)
def test_heads_follow_their_rows(level):
    """modules_to_save: an adapter's own head, the original for base rows and for adapters without one."""
    options = dict(target_modules=["0"], feedforward_modules=[])
    base = randomized(nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6)))
    model = peft.get_peft_model(base, peft.IA3Config(**options, modules_to_save=["2"]), adapter_name="red")
    model.add_adapter("green", peft.IA3Config(**options, modules_to_save=["2"]))
    model.add_adapter("headless", peft.IA3Config(**options))
    for name in ("red", "green", "headless"):
        set_vectors(model, name)
    head, x = model.base_model.model[2], torch.randn(5, 3, 12)
    assert set(head.modules_to_save) == {"red", "green"}
    names = ["red", BASE, "green", "headless", "red"]
    want = row_by_row(model, names, lambda model: model(x))
    accelerate(model, level=level)
    assert torch.equal(model(x, adapter_names=names), want)
    for name in ("red", "green"):
        head.modules_to_save[name].weight.data.fill_(float("nan"))
    got = model(x, adapter_names=names)
    assert torch.equal(got[[1, 3]], want[[1, 3]]) and got[[0, 2, 4]].isnan().all()


class TestGuests:
    """What else runs in the process: threads, torch.compile, autocast, callbacks that call the model again."""

    @pytest.mark.parametrize("level", LEVELS)
    def test_threads(self, level):
        model = accelerate(ia3_model("llama"), level=level)
        batch = batch_for(model, 5)
        lists = [NAMES, [BASE] * 5, ["green"] * 5, NAMES[::-1]]
        with torch.no_grad():
            want = [model(**batch, adapter_names=names).logits for names in lists]
        wrong = []

        def serve(i: int) -> None:
            with torch.no_grad():
                for _ in range(20):
                    if not torch.equal(model(**batch, adapter_names=lists[i]).logits, want[i]):
                        wrong.append(i)

        threads = [threading.Thread(target=serve, args=(i,)) for i in range(len(lists))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_autocast(self):
        plain = ia3_model("llama")
        batch = batch_for(plain, 5)
        with torch.no_grad(), torch.autocast(DEVICE, BF16):
            want = row_by_row(plain, NAMES, lambda model: model(**batch).logits)
            got = accelerate(copy.deepcopy(plain), level="module")(**batch, adapter_names=NAMES).logits
            fused = accelerate(copy.deepcopy(plain))(**batch, adapter_names=NAMES).logits
        assert got.dtype == fused.dtype == want.dtype and torch.equal(got, want)
        exact = row_by_row(plain.double(), NAMES, lambda model: model(**batch).logits)
        rms = lambda logits: (logits - exact).square().mean().sqrt()  # noqa: E731
        assert rms(fused) <= 1.2 * rms(want)

    def test_autocast_in_the_middle_of_a_call(self):
        """A layer that ran in fp32 runs in bf16 next, in the same call and on the same shape."""
        model = accelerate(ia3_model("llama"))
        batch = batch_for(model, 5)
        with torch.no_grad(), torch.autocast("cpu", BF16):
            want = model(**batch, adapter_names=NAMES).logits
        with torch.no_grad(), using_adapters(model, NAMES):
            model(**batch)
            with torch.autocast("cpu", BF16):
                assert torch.equal(model(**batch).logits, want)

    @pytest.mark.parametrize("names", [None, NAMES], ids=["without names", "with names"])
    def test_a_callback_that_disables_adapters(self, names):
        """Contrastive decoding: a logits processor that runs the base model in the middle of generate()."""
        found = []

        def run(model, **kwargs):
            def contrast(ids, scores):
                with model.disable_adapter():
                    base = model(input_ids=ids).logits[:, -1]
                found.append(base)
                return scores - 0.5 * base

            return model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=4,
                logits_processor=[contrast],
                **kwargs,
            )

        plain = ia3_model("llama")
        ids = batch_for(plain, 1)["input_ids"].repeat(5, 1)
        want = row_by_row(plain, names, run) if names else run(plain)
        count = len(found)
        got = run(accelerate(copy.deepcopy(plain), level="module"), **({"adapter_names": names} if names else {}))
        assert torch.equal(got, want)
        if not names:
            assert all(torch.equal(a, b) for a, b in zip(found[:count], found[count:], strict=True))

    def test_compile(self):
        model = accelerate(ia3_model("llama"))
        batch, base = batch_for(model, 5), model.get_base_model()
        del base.model.layers[1:]  # half the time
        want = [model(**batch, adapter_names=names).logits for names in (NAMES, NAMES[::-1], [BASE] * 5)]
        unnamed = model(**batch).logits
        base.forward = torch.compile(base.forward, backend="eager")
        for _ in range(2):
            for names, logits in zip((NAMES, NAMES[::-1], [BASE] * 5), want, strict=True):
                torch.testing.assert_close(model(**batch, adapter_names=names).logits, logits, rtol=0, atol=2e-5)
            torch.testing.assert_close(model(**batch).logits, unnamed, rtol=0, atol=2e-5)
        assert not torch.allclose(want[0], want[1], atol=1e-2) and not torch.allclose(want[0], unnamed, atol=1e-2)

    def test_two_models_at_once(self):
        """A copy that is called inside the call of its original does not see its names."""
        outer = accelerate(ia3_model("llama"))
        inner = copy.deepcopy(outer)
        batch = batch_for(outer, 5)
        want = inner(**batch).logits
        got = []
        outer.get_base_model().model.layers[0].register_forward_hook(
            lambda *_: got.append(inner(**batch).logits) or None
        )
        outer(**batch, adapter_names=["green"] * 5)
        assert torch.equal(got[0], want)
