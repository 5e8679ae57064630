"""PEFT's folders: what PEFT saves is read without a model, what is written PEFT loads, and a bank serves both."""

import json
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import peft_ops
from peft_ops.integrations.folder_bank import bank_from_folder, loader_from_folder
from peft_ops.integrations.folders import ia3_adapter, prompt_adapter, read_adapter, write_adapter
from tests.conftest import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET, reason="runs no kernel")
P, E = 3, 16


def llama():
    sizes = dict(num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)
    config = transformers.LlamaConfig(vocab_size=40, hidden_size=E, intermediate_size=24, **sizes)
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(vocab_size=40, n_embd=E, n_layer=2, n_head=2, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


def t5():
    sizes = dict(d_kv=4, d_ff=24, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    config = transformers.T5Config(vocab_size=40, d_model=E, decoder_start_token_id=0, **sizes)
    return transformers.T5ForConditionalGeneration(config)


def bert():
    sizes = dict(num_attention_heads=4, num_hidden_layers=2, max_position_embeddings=32)
    config = transformers.BertConfig(vocab_size=40, hidden_size=E, intermediate_size=24, num_labels=3, **sizes)
    return transformers.BertForSequenceClassification(config)


MODELS = {llama: "CAUSAL_LM", gpt2: "CAUSAL_LM", t5: "SEQ_2_SEQ_LM", bert: "SEQ_CLS"}


@pytest.fixture(params=MODELS, ids=lambda make: make.__name__)
def make(request):
    return request.param


def base(make) -> torch.nn.Module:
    """Each call the same weights."""
    torch.manual_seed(5)
    return make().eval()


def config_for(kind: str, make, **kwargs):
    task = dict(task_type=MODELS[make]) | kwargs
    return {
        "IA3": lambda: peft.IA3Config(**task),
        "PROMPT_TUNING": lambda: peft.PromptTuningConfig(num_virtual_tokens=P, **task),
        "P_TUNING": lambda: peft.PromptEncoderConfig(num_virtual_tokens=P, encoder_hidden_size=8, **task),
        "MULTITASK_PROMPT_TUNING": lambda: peft.MultitaskPromptTuningConfig(
            num_virtual_tokens=P, num_tasks=4, num_ranks=2, **task
        ),
    }[kind]()


def trained(kind: str, make, seed: int = 0, **kwargs) -> peft.PeftModel:
    """A PEFT model whose adapter is random, heads too."""
    model = peft.get_peft_model(base(make), config_for(kind, make, **kwargs)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(1, 0.5)
    return model


def saved(path, *args, **kwargs):
    model = trained(*args, **kwargs)
    model.save_pretrained(path)
    return model


@torch.no_grad()
def logits(model, **kwargs) -> torch.Tensor:
    torch.manual_seed(9)
    tokens = torch.randint(1, 40, (2, 5))
    if model.config.is_encoder_decoder:
        kwargs["decoder_input_ids"] = tokens[:, :3]
    return model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **kwargs).logits


class TestIA3:
    @pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
    def test_reads_what_peft_saved(self, make, safe, tmp_path):
        model = trained("IA3", make)
        if safe:
            model.save_pretrained(tmp_path)
        else:  # what older versions of PEFT wrote
            model.peft_config["default"].save_pretrained(tmp_path)
            torch.save(peft.get_peft_model_state_dict(model), tmp_path / "adapter_model.bin")
        adapter = read_adapter(tmp_path)
        layers = {
            name: m for name, m in model.base_model.model.named_modules() if isinstance(m, peft.tuners.ia3.IA3Layer)
        }
        assert adapter.kind == "IA3" and adapter.vectors.keys() == layers.keys() and len(layers) >= 4
        for name, layer in layers.items():
            assert torch.equal(adapter.vectors[name], layer.ia3_l["default"].flatten())
        assert adapter.feedforward == {name for name, layer in layers.items() if layer.is_feedforward}
        heads = {name for name, _ in model.named_parameters() if "modules_to_save" in name}
        assert len(adapter.modules_to_save) == len(heads) == (2 if make is bert else 0)
        assert adapter.prompt is None and adapter.decoder_prompt is None

    def test_peft_loads_what_is_written(self, make, tmp_path):
        model = saved(tmp_path / "a", "IA3", make)
        adapter = read_adapter(tmp_path / "a")
        write_adapter(tmp_path / "b", adapter)
        before, after = (load_file(tmp_path / f / "adapter_model.safetensors") for f in "ab")
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        again = peft.PeftModel.from_pretrained(base(make), tmp_path / "b")
        assert torch.equal(logits(again), logits(model))
        assert not torch.equal(logits(again), logits(base(make)))
        assert read_adapter(tmp_path / "b").vectors.keys() == adapter.vectors.keys()

    def test_vectors_of_our_own_reach_peft(self, make, tmp_path):
        """Whole names as targets: of these modules alone, on the side that was said."""
        model = saved(tmp_path / "a", "IA3", make)
        adapter = read_adapter(tmp_path / "a")
        some = {name: v for i, (name, v) in enumerate(adapter.vectors.items()) if i % 3 != 2}
        config = dict(task_type=MODELS[make], modules_to_save=adapter.config["modules_to_save"])
        ours = ia3_adapter(some, adapter.feedforward & some.keys(), **config)
        write_adapter(tmp_path / "b", replace(ours, modules_to_save=adapter.modules_to_save))
        again = peft.PeftModel.from_pretrained(base(make), tmp_path / "b")
        layers = {n for n, m in again.base_model.model.named_modules() if isinstance(m, peft.tuners.ia3.IA3Layer)}
        assert layers == some.keys() and 0 < len(some) < len(adapter.vectors)
        with torch.no_grad():
            for name in adapter.vectors.keys() - some.keys():
                model.base_model.model.get_submodule(name).ia3_l["default"].fill_(1)
        assert torch.equal(logits(again), logits(model))

    def test_regular_expressions_and_all_linear(self, tmp_path):
        layer = r"model\.layers\.\d+\."
        regex = dict(target_modules=layer + r".*\.(k_proj|down_proj)", feedforward_modules=layer + r"mlp\.down_proj")
        saved(tmp_path / "a", "IA3", llama, **regex)
        adapter = read_adapter(tmp_path / "a")
        assert len(adapter.vectors) == 4 and len(adapter.feedforward) == 2
        saved(tmp_path / "b", "IA3", llama, target_modules="all-linear", feedforward_modules=["down_proj"])
        assert len(read_adapter(tmp_path / "b").vectors) == 14 and len(read_adapter(tmp_path / "b").feedforward) == 2

    def test_bfloat16_stays(self, tmp_path):
        model = trained("IA3", llama).to(torch.bfloat16)
        model.save_pretrained(tmp_path)
        assert {v.dtype for v in read_adapter(tmp_path).vectors.values()} == {torch.bfloat16}


PROMPTS = ["PROMPT_TUNING", "P_TUNING"]


@pytest.mark.parametrize("kind", PROMPTS)
class TestPrompts:
    def test_there_and_back(self, kind, make, tmp_path):
        model = saved(tmp_path / "a", kind, make)
        adapter = read_adapter(tmp_path / "a")
        assert adapter.kind == kind and adapter.prompt.shape == (P, E) and not adapter.vectors
        assert torch.equal(adapter.prompt, model.get_prompt_embedding_to_save("default")[:P])
        assert len(adapter.modules_to_save) == (2 if make is bert else 0) and adapter.decoder_prompt is None
        write_adapter(tmp_path / "b", adapter)
        again = peft.PeftModel.from_pretrained(base(make), tmp_path / "b")
        assert torch.equal(logits(again), logits(model))
        assert torch.equal(read_adapter(tmp_path / "b").prompt, adapter.prompt)

    def test_as_prompt_tuning(self, kind, make, tmp_path):
        model = saved(tmp_path / "a", kind, make)
        adapter = read_adapter(tmp_path / "a")
        config = dict(task_type=MODELS[make], modules_to_save=adapter.config["modules_to_save"])
        ours = prompt_adapter(adapter.prompt, **config)
        write_adapter(tmp_path / "b", replace(ours, modules_to_save=adapter.modules_to_save))
        again = peft.PeftModel.from_pretrained(base(make), tmp_path / "b")
        assert torch.equal(logits(again), logits(model))


class TestMultitask:
    KIND = "MULTITASK_PROMPT_TUNING"

    @pytest.mark.parametrize("make", [llama, t5], ids=["llama", "t5"])
    def test_one_table_per_task(self, make, tmp_path):
        model = saved(tmp_path, self.KIND, make)
        adapter = read_adapter(tmp_path)
        encoder = model.prompt_encoder["default"]
        for task in range(4):
            with torch.no_grad():
                want = encoder(model.prompt_tokens["default"][None], torch.tensor([task]))[0]
            assert torch.equal(adapter.prompt[task], want[:P])
            if make is t5:
                assert torch.equal(adapter.decoder_prompt[task], want[P:])
        assert adapter.prompt.shape == (4, P, E) and (adapter.decoder_prompt is None) == (make is llama)

    def test_a_task_becomes_prompt_tuning(self, tmp_path):
        model = saved(tmp_path / "a", self.KIND, llama)
        write_adapter(tmp_path / "b", prompt_adapter(read_adapter(tmp_path / "a").prompt[2], task_type="CAUSAL_LM"))
        again = peft.PeftModel.from_pretrained(base(llama), tmp_path / "b")
        assert torch.equal(logits(again), logits(model, task_ids=torch.tensor([2, 2])))


class TestBank:
    def test_serves_folders_by_name(self, tmp_path):
        for seed, name in enumerate(("reviews", "legal", "news")):
            saved(tmp_path / name, "IA3", llama, seed)
        saved(tmp_path / "part", "IA3", llama, 7, target_modules=["v_proj"], feedforward_modules=[])
        bank = bank_from_folder(tmp_path, slots=2, host_capacity=1)
        module = "model.layers.1.self_attn.v_proj"
        assert bank.widths[module] == E // 2 and bank.widths["model.layers.0.mlp.down_proj"] == 24
        assert len(bank.widths) == 6 and not len(bank) and bank.prompts is None
        x, weight = torch.randn(3, 4, E), torch.randn(E // 2, E)
        for rows in (["reviews", None, "legal"], ["news", "part", None], ["part", "reviews", "part"]):
            with bank.use(rows) as ids:
                y = peft_ops.ia3_linear(x, weight, ia3_l=bank.table(module), task_ids=ids)
            for b, name in enumerate(rows):
                scale = read_adapter(tmp_path / name).vectors[module] if name else 1
                assert torch.equal(y[b], (x @ weight.T * scale)[b])

    def test_serves_prompts_of_several_lengths_and_kinds(self, tmp_path):
        saved(tmp_path / "tuned", "PROMPT_TUNING", llama)
        saved(tmp_path / "many", "MULTITASK_PROMPT_TUNING", llama)
        saved(tmp_path / "scaled", "IA3", llama)
        longer = prompt_adapter(torch.randn(5, E), task_type="CAUSAL_LM")
        write_adapter(tmp_path / "longer", longer)
        bank = bank_from_folder(tmp_path, slots=4)
        assert bank.prompts.shape == (4, 5, E)
        with bank.use(["longer", "many[3]", "tuned", "scaled"]) as ids:
            assert bank.prompt_lengths[ids].tolist() == [5, P, P, 0]
            assert torch.equal(bank.prompts[ids[0]], longer.prompt)
            assert torch.equal(bank.prompts[ids[1], :P], read_adapter(tmp_path / "many").prompt[3])
        for name, error in (("many", ValueError), ("many[4]", KeyError), ("tuned[0]", KeyError), ("tune", KeyError)):
            with pytest.raises(error, match=f"got .*{'no' if name == 'many' else name[:4]}"), bank.use([name]):
                pass

    def test_folders_that_come_later(self, tmp_path):
        saved(tmp_path / "first", "IA3", llama)
        bank = bank_from_folder(tmp_path, slots=1)
        saved(tmp_path / "second", "IA3", llama, 1)
        with bank.use(["second"]) as ids:
            name, vector = next(iter(read_adapter(tmp_path / "second").vectors.items()))
            assert torch.equal(bank.table(name)[ids[0]], vector)
        saved(tmp_path / "wider", "IA3", llama, target_modules=["q_proj"], feedforward_modules=[])
        with pytest.raises(ValueError, match="must be of modules of the bank, got 'model.layers.0.self_attn.q_proj'"):
            with bank.use(["wider"]):
                pass

    @pytest.mark.parametrize("name", ["..", ".", "", "../secret", "inner/../../secret", "inner/adapter", "/etc"])
    def test_no_name_leads_out_of_the_directory(self, name, tmp_path):
        for folder in ("secret", "root/ok", "root/inner/adapter"):
            saved(tmp_path / folder, "IA3", llama)
        (tmp_path / "root" / "adapter_config.json").write_text("{}")
        (tmp_path / "adapter_config.json").write_text("{}")
        load = loader_from_folder(tmp_path / "root")
        assert load("ok")[0]
        with pytest.raises(KeyError, match="must be of a PEFT folder"):
            load(name)

    def test_heads_are_refused_or_ignored(self, tmp_path):
        saved(tmp_path / "a", "IA3", bert)
        with pytest.raises(ValueError, match=r"no modules_to_save, .*ignore_heads=True.*, got \['classifier.bias'"):
            loader_from_folder(tmp_path)("a")
        vectors, prompt = loader_from_folder(tmp_path, ignore_heads=True)("a")
        assert vectors and prompt is None

    def test_decoder_prompts_are_refused(self, tmp_path):
        saved(tmp_path / "a", "MULTITASK_PROMPT_TUNING", t5)
        with pytest.raises(ValueError, match=r"'a\[1\]' must have one prompt, got one more for the decoder"):
            loader_from_folder(tmp_path)("a[1]")

    def test_one_table_scales_one_side(self, tmp_path):
        """q_proj is square: either side's vector would fit."""
        for name, feedforward in (("a", []), ("b", ["q_proj"])):
            saved(tmp_path / name, "IA3", llama, target_modules=["q_proj"], feedforward_modules=feedforward)
        load = loader_from_folder(tmp_path)
        load("a")
        with pytest.raises(
            ValueError, match="'b' must scale the output of 'model.layers.0.self_attn.q_proj', as others"
        ):
            load("b")
        with pytest.raises(ValueError, match="bank_from_folder: 'b' must scale the output"):
            bank_from_folder(tmp_path, 1)

    def test_a_folder_of_another_kind_among_them(self, tmp_path):
        write_adapter(tmp_path / "a", ia3_adapter({"k": torch.ones(4)}))
        (tmp_path / "lora").mkdir()
        (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        with pytest.raises(
            ValueError, match="^bank_from_folder: .*got 'LORA'; a bank serves every .*, move this one out$"
        ):
            bank_from_folder(tmp_path, 1)

    def test_folders_of_two_models(self, tmp_path):
        write_adapter(tmp_path / "a", ia3_adapter({"k": torch.ones(4)}))
        write_adapter(tmp_path / "b", ia3_adapter({"k": torch.ones(5)}))
        with pytest.raises(ValueError, match="'k' must have 4 features, as in other adapters, got 5 in 'b'"):
            bank_from_folder(tmp_path, 1)
        for name, width in (("x", 3), ("y", 4)):
            write_adapter(tmp_path / "prompts" / name, prompt_adapter(torch.ones(2, width)))
        with pytest.raises(ValueError, match="prompts must have 3 features each, got 4 in 'y'"):
            bank_from_folder(tmp_path / "prompts", 1)
        with pytest.raises(ValueError, match="root must hold PEFT's folders, got"):
            bank_from_folder(tmp_path / "a", 1)


def edit(path, config: dict = {}, tensors=None):  # noqa: B006
    """Change entries of a folder's config, and its tensors through a function of their dict."""
    found = json.loads((path / "adapter_config.json").read_text()) | config
    (path / "adapter_config.json").write_text(json.dumps(found))
    if tensors is not None:
        state = load_file(path / "adapter_model.safetensors")
        tensors(state)
        save_file(state, path / "adapter_model.safetensors")


def first(state: dict) -> str:
    return next(iter(sorted(state)))


class TestRefusals:
    @pytest.mark.parametrize("kind", ["LORA", "PREFIX_TUNING"])
    def test_other_kinds(self, kind, tmp_path):
        config = (
            peft.LoraConfig()
            if kind == "LORA"
            else peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
        )
        peft.get_peft_model(base(llama), config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=f"peft_type must be one of IA3, .*, got '{kind}'"):
            read_adapter(tmp_path)

    def test_no_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            read_adapter(tmp_path / "nowhere")
        with pytest.raises(ValueError, match="peft_type must be .*, got 'LORA'"):
            write_adapter(tmp_path, ia3_adapter({"k": torch.ones(2)}, peft_type="LORA"))

    @pytest.mark.parametrize(
        "kind, config, tensors, text",
        [
            (
                "IA3",
                {"target_modules": ["q_proj"]},
                None,
                r"target_modules must match every .*, got \['q_proj'\] for 'mod",
            ),
            (
                "IA3",
                {"feedforward_modules": []},
                None,
                r"down_proj' must have a vector of its output, as .*, got \[1, 24\]",
            ),
            (
                "IA3",
                {"feedforward_modules": ["v_proj"]},
                None,
                r"must have a vector of its (in|out)put, as feedforward_mod",
            ),
            (
                "IA3",
                {},
                lambda s: s.update({first(s): torch.ones(1, 4, 1, 1)}),
                r"must be a linear layer.*\[1, 4, 1, 1\]",
            ),
            ("IA3", {}, lambda s: s.update(lora=torch.ones(1)), "must hold vectors, .* got 'lora'"),
            (
                "IA3",
                {},
                lambda s: s.update({"k_proj.ia3_l": torch.ones(8, 1)}),
                "must hold vectors, .* got 'k_proj.ia3_l'",
            ),
            (
                "IA3",
                {},
                lambda s: s.update({"base_model.model.lm_head.weight": torch.ones(1)}),
                "got 'base_model.model.lm_",
            ),
            ("P_TUNING", {"num_virtual_tokens": 2}, None, r"2 rows for each of 1 transformers, .* got shape \[3, 16\]"),
            ("P_TUNING", {"num_virtual_tokens": None}, None, "must have 0 rows"),
            ("P_TUNING", {}, lambda s: s.pop("prompt_embeddings"), r"must hold prompt_embeddings, got \[\]"),
            (
                "MULTITASK_PROMPT_TUNING",
                {},
                lambda s: s.pop("prefix_task_cols"),
                "must hold prefix_task_cols and prefix_t",
            ),
            (
                "PROMPT_TUNING",
                {},
                lambda s: s.update(prefix_task_cols=torch.ones(1)),
                "must hold prompt_embeddings, got",
            ),
        ],
    )
    def test_tensors_that_the_config_does_not_tell_of(self, kind, config, tensors, text, tmp_path):
        saved(tmp_path, kind, llama)
        read_adapter(tmp_path)
        edit(tmp_path, config, tensors)
        with pytest.raises(ValueError, match=text):
            read_adapter(tmp_path)

    def test_writing_what_peft_would_put_elsewhere(self, tmp_path):
        vector, op = {"layers.0.k": torch.ones(4)}, "write_adapter: "
        with pytest.raises(ValueError, match=op + "target_modules must match"):
            write_adapter(tmp_path, ia3_adapter(vector, target_modules=["v"]))
        with pytest.raises(ValueError, match=op + "'layers.0.k' must have a vector of its input"):
            write_adapter(tmp_path, ia3_adapter(vector, feedforward_modules=["k"]))
        with pytest.raises(
            ValueError, match=op + "'a.layers.0.k' must have a vector of its input"
        ):  # by the end of a name
            write_adapter(
                tmp_path, ia3_adapter({"layers.0.k": torch.ones(4), "a.layers.0.k": torch.ones(4)}, ["layers.0.k"])
            )
        with pytest.raises(ValueError, match=op + "modules_to_save of the config must name .*, got 'score.weight'"):
            write_adapter(tmp_path, replace(ia3_adapter(vector), modules_to_save={"score.weight": torch.ones(2)}))
        with pytest.raises(ValueError, match=op + "vectors must be of one module at least"):
            write_adapter(tmp_path, ia3_adapter({}))
        with pytest.raises(ValueError, match=op + "peft_type must be .*, got 'MULTITASK_PROMPT_TUNING'"):
            write_adapter(tmp_path, prompt_adapter(torch.ones(2, 3), peft_type="MULTITASK_PROMPT_TUNING"))
        assert not any(tmp_path.iterdir())

    def test_pickles_run_no_code(self, tmp_path):
        saved(tmp_path, "IA3", llama)
        (tmp_path / "adapter_model.safetensors").unlink()
        torch.save({"x": Evil(tmp_path / "ran")}, tmp_path / "adapter_model.bin")
        with pytest.raises(Exception, match="[Ww]eights"):
            read_adapter(tmp_path)
        assert not (tmp_path / "ran").exists()


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")
