"""Prompt modules: PEFT's encoders key by key, tables in and out of PEFT, training that goes on, multitask prompts."""

import copy

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from peft_ops.nn import (
    IA3GatedMLP,
    IA3Linear,
    MultitaskPromptEmbedding,
    PromptEmbedding,
    PromptEncoder,
    PromptNetwork,
    TaskBatch,
    check_adapters,
    tasks,
)
from tests.conftest import DEVICE

P, E, V = 5, 8, 11
KINDS = ["lstm", "mlp", "embedding"]
ROWS = ["red", None, "green", "red"]
IDS = torch.tensor([[5, 6, 0], [7, 0, 0], [8, 9, 1], [2, 3, 4]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]])
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def peft_encoder(kind: str, words: nn.Embedding | None = None, **options) -> nn.Module:
    sizes = {"num_transformer_submodules": 1, "num_virtual_tokens": P, "token_dim": E} | options
    if kind == "embedding":
        return peft.PromptEmbedding(peft.PromptTuningConfig(**sizes), words)
    return peft.PromptEncoder(peft.PromptEncoderConfig(encoder_reparameterization_type=kind.upper(), **sizes))


def embeddings(kind="mlp", lengths=(("red", 3), ("green", 2), ("blue", 3)), **options) -> PromptEmbedding:
    prompts = PromptEmbedding()
    for name, length in lengths:
        prompts.add_adapter(name, PromptEncoder(length, E, kind, **options))
    return prompts.to(DEVICE)


def shared_embeddings(kind="lstm") -> PromptEmbedding:
    prompts = PromptEmbedding(shared=PromptNetwork(E, kind, 6))
    for name, length in (("red", 3), ("green", 2), ("blue", 3)):
        prompts.add_adapter(name, PromptEncoder(length, E, "embedding"))
    return prompts.to(DEVICE)


def run(prompts, rows=ROWS, **kwargs):
    words = torch.arange(float(V * E), device=DEVICE).reshape(V, E)
    batch = TaskBatch.of_rows(rows, DEVICE)
    return prompts(IDS.to(DEVICE), words, MASK.to(DEVICE), batch, **kwargs).inputs_embeds


def train(prompts, rows=ROWS, steps=3) -> None:
    optimizer = torch.optim.AdamW([p for p in prompts.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for _ in range(steps):
        run(prompts, rows).sin().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class TestPromptEncoder:
    @pytest.mark.parametrize("kind", KINDS)
    def test_state_dicts_of_peft_load_both_ways(self, kind):
        options = {} if kind == "embedding" else {"encoder_hidden_size": 6}
        torch.manual_seed(1)
        ours = PromptEncoder(P, E, kind, 6)
        torch.manual_seed(1)
        theirs = peft_encoder(kind, **options)
        assert same_state(ours, theirs), "another initialisation"
        assert torch.equal(ours(), theirs(torch.arange(P)))
        other = PromptEncoder(P, E, kind, 6)
        theirs.load_state_dict(other.state_dict())  # strict
        assert torch.equal(other(), theirs(torch.arange(P)))
        ours.load_state_dict(theirs.state_dict())
        assert same_state(ours, other)

    def test_layers_and_dropout_of_the_lstm_are_pefts(self):
        torch.manual_seed(1)
        ours = PromptEncoder(P, E, "lstm", 6, 3, 0.5)
        torch.manual_seed(1)
        theirs = peft_encoder("lstm", encoder_hidden_size=6, encoder_num_layers=3, encoder_dropout=0.5)
        assert same_state(ours, theirs) and ours.lstm_head.dropout == theirs.lstm_head.dropout == 0.5
        assert torch.equal(ours.eval()(), theirs.eval()(torch.arange(P)))

    def test_pefts_names_of_the_types(self):
        kind = peft.PromptEncoderReparameterizationType.LSTM
        assert PromptEncoder(P, E, kind).encoder_reparameterization_type == "lstm"

    def test_embedding_is_a_table_and_nothing_else(self):
        encoder = PromptEncoder(P, E, "embedding")
        assert list(encoder.state_dict()) == ["embedding.weight"]
        assert encoder() is encoder.embedding.weight and encoder.num_virtual_tokens == P

    def test_lama_has_the_sizes_of_the_papers_code(self):
        """LAMA/p_tuning/prompt_encoder.py of THUDM/P-tuning: all E wide, the LSTM half of it in each direction."""
        theirs = nn.Module()
        theirs.embedding = nn.Embedding(9, E)
        theirs.lstm_head = nn.LSTM(E, E // 2, num_layers=2, dropout=0.1, bidirectional=True, batch_first=True)
        theirs.mlp_head = nn.Sequential(nn.Linear(E, E), nn.ReLU(), nn.Linear(E, E))
        ours = PromptEncoder.lama(9, E, lstm_dropout=0.1)
        ours.load_state_dict(theirs.state_dict())
        theirs.eval(), ours.eval()
        pseudo = theirs.embedding(torch.arange(9)).unsqueeze(0)
        assert torch.equal(ours(), theirs.mlp_head(theirs.lstm_head(pseudo)[0]).squeeze())
        assert ours.lstm_head.dropout == 0.1 and not same_state(PromptEncoder(9, E, "lstm"), ours)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_live_peft_encoder_is_rebuilt_from_its_state(self, kind):
        options = {"lstm": {"encoder_hidden_size": 6, "encoder_num_layers": 3}, "mlp": {"encoder_hidden_size": 6}}
        theirs = peft_encoder(kind, **options.get(kind, {})).double()
        ours = PromptEncoder.from_state_dict(theirs.state_dict())
        assert same_state(ours, theirs) and torch.equal(ours(), theirs(torch.arange(P)))

    def test_gradients_reach_every_parameter(self):
        for kind in KINDS:
            encoder = PromptEncoder(P, E, kind)
            encoder().sum().backward()
            assert all(p.grad is not None for p in encoder.parameters())


class TestFromTokens:
    @pytest.mark.parametrize("count", [1, 2, 3, P, 2 * P], ids=lambda n: f"{n}-tokens")
    @pytest.mark.parametrize("as_tensor", [False, True], ids=["list", "tensor"])
    def test_text_is_repeated_or_cut_as_in_peft(self, monkeypatch, count, as_tensor):
        ids, words = torch.randint(0, V, (count,)), nn.Embedding(V, E)
        tokenizer = lambda text: {"input_ids": ids.tolist()}  # noqa: E731
        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
        theirs = peft_encoder(
            "embedding", words, prompt_tuning_init="TEXT", prompt_tuning_init_text="x", tokenizer_name_or_path="x"
        )
        ours = PromptEncoder(P, E, "embedding")
        parameter = ours.embedding.weight
        got = ours.from_text(ids if as_tensor else ids.tolist(), words.weight if as_tensor else words)
        assert got is ours and ours.embedding.weight is parameter, "an optimizer holds the parameter"
        assert parameter.requires_grad and parameter.grad_fn is None
        assert same_state(ours, theirs)

    def test_vocabulary_samples_are_pefts(self):
        words = nn.Embedding(V, E, dtype=torch.bfloat16)
        torch.manual_seed(1)
        theirs = peft_encoder("embedding", words, prompt_tuning_init="SAMPLE_VOCAB")
        torch.manual_seed(1)
        ours = PromptEncoder(P, E, "embedding").from_vocab(words)
        assert same_state(ours, theirs) and ours.embedding.weight.dtype == torch.float32
        assert all((words.weight.float() == row).all(1).any() for row in ours())

    def test_an_embedding_that_scales_is_called(self):
        class Scaled(nn.Embedding):
            def forward(self, ids):
                return super().forward(ids) * 3

        words = Scaled(V, E)
        assert torch.equal(PromptEncoder(2, E, "embedding").from_text([4], words)(), 3 * words.weight[[4, 4]])

    @pytest.mark.parametrize("kind", ["lstm", "mlp"])
    def test_networks_refuse(self, kind):
        for start in (lambda e: e.from_text([1], torch.ones(V, E)), lambda e: e.from_vocab(torch.ones(V, E))):
            with pytest.raises(ValueError, match=f"encoder_reparameterization_type must be 'embedding', got '{kind}'"):
                start(PromptEncoder(P, E, kind))


class TestPromptEmbedding:
    @pytest.mark.parametrize("make", [*[lambda k=k: embeddings(k) for k in KINDS], shared_embeddings])
    def test_materialized_encoders_serve_the_same_bits(self, make):
        prompts = make()
        train(prompts)
        with torch.no_grad():
            want = run(prompts)
        prompts.materialize(["red"])
        with torch.no_grad():
            assert torch.equal(run(prompts), want)
        prompts.materialize()
        assert not list(prompts.parameters())
        assert set(prompts.state_dict()) == {f"encoders.{n}.prompt_embeddings" for n in ("red", "green", "blue")}
        with torch.no_grad():
            assert torch.equal(run(prompts), want)
        assert torch.equal(run(prompts.eval()), want)

    def test_materialized_under_inference_mode_serves_with_gradients_too(self):
        prompts = embeddings("embedding").eval()
        with torch.inference_mode():
            prompts.materialize(["green"])
            run(prompts)
            prompts.keep_table(("red", "green"))
        run(prompts).sum().backward()
        assert prompts.encoders["red"].embedding.weight.grad is not None

    def test_dropout_leaves_no_mark_in_what_is_kept(self):
        prompts = embeddings("lstm", encoder_dropout=0.5).eval()
        with torch.no_grad():
            want = run(prompts)
            prompts.train()
            prompts.encoders["blue"].eval()
            prompts.keep_table(("red", "green"))
            assert torch.equal(run(prompts), want)
        saved = prompts.peft_state_dict("red")["prompt_embeddings"].to(DEVICE)
        prompts.materialize(("red", "green"))
        assert torch.equal(prompts.encoders["red"](), saved)
        assert prompts.training and not prompts.encoders["blue"].training, "the modes are as they were"
        with torch.no_grad():
            assert torch.equal(run(prompts), want)

    def test_training_a_dropped_encoder_says_so(self):
        prompts = embeddings()
        prompts.materialize(["red"])
        with pytest.raises(RuntimeError, match="'red' has no encoder to train, only its table"):
            run(prompts)
        run(prompts, ["green", "blue", None, "green"]).sum().backward()
        run(prompts.eval())

    def test_unknown_name_drops_nothing(self):
        prompts = embeddings()
        with pytest.raises(ValueError, match=r"adapter must be one of \['red', 'green', 'blue'\], got 'pink'"):
            prompts.materialize(["red", "pink"])
        assert isinstance(prompts.encoders["red"], PromptEncoder)

    def test_encoders_of_sequence_to_sequence_models(self):
        """PEFT makes 2 P rows, all through the network, and reads the first P."""
        for kind in KINDS:
            sizes = {} if kind == "embedding" else dict(encoder_hidden_size=6)
            theirs = peft_encoder(kind, nn.Embedding(V, E), num_transformer_submodules=2, **sizes)
            state = theirs.state_dict()
            ours = PromptEncoder.from_state_dict(state, num_virtual_tokens=P)
            with torch.no_grad():
                want = theirs(torch.arange(2 * P)[None])[0, :P]
                assert ours.num_virtual_tokens == P and torch.equal(ours(), want)
                assert PromptEncoder.from_state_dict(state).num_virtual_tokens == 2 * P
            prompts = PromptEmbedding()
            prompts.add_adapter("red", ours)
            again = PromptEmbedding.from_state_dict(prompts.state_dict(), num_virtual_tokens={"red": P})
            again.eval().materialize()
            assert torch.equal(again.prompt("red"), want) and again.num_virtual_tokens("red") == P
            ours().sum().backward()
            assert all(p.grad is not None for p in ours.parameters())

    def test_packed_and_embeddings_in_place_of_ids(self):
        prompts, batch = embeddings().eval(), TaskBatch.of_rows(ROWS, DEVICE)
        words, ids = torch.randn(V, E, device=DEVICE), IDS.to(DEVICE)
        with torch.no_grad():
            want = prompts(ids, words, batch=batch)
            got = prompts(None, None, batch=batch, inputs_embeds=words[ids])
            assert torch.equal(got.inputs_embeds, want.inputs_embeds)
            starts = torch.arange(0, ids.numel() + 1, ids.shape[1], device=DEVICE)
            packed = prompts.packed(ids.flatten(), starts, words, batch, max_seqlen=3, labels=ids.flatten())
            given = prompts.packed(None, starts, None, batch, max_seqlen=3, inputs_embeds=words[ids].flatten(0, 1))
            assert torch.equal(packed.inputs_embeds, given.inputs_embeds)
            for b, (start, end) in enumerate(zip(packed.cu_seqlens[:-1], packed.cu_seqlens[1:], strict=True)):
                assert torch.equal(packed.inputs_embeds[start:end], want.inputs_embeds[b, : end - start])
            assert (packed.cu_seqlens.diff() - 3).tolist() == [3, 0, 2, 3] and packed.max_seqlen == 3 + 3
            with tasks(ROWS, DEVICE):
                assert torch.equal(
                    prompts.packed(ids.flatten(), starts, words, max_seqlen=3).inputs_embeds, packed.inputs_embeds
                )
            base = prompts.packed(ids.flatten(), starts, words, max_seqlen=3)  # outside: the base model's
            assert torch.equal(base.inputs_embeds, words[ids.flatten()])

    def test_a_compiled_step_and_an_optimizer_that_leaves_no_trace(self):
        prompts, batch = embeddings("embedding"), TaskBatch.of_rows(ROWS, DEVICE)
        words, ids = torch.randn(V, E, device=DEVICE), IDS.to(DEVICE)
        prompts.keep_table(batch.names)
        optimizer = torch.optim.AdamW(prompts.parameters(), lr=0.1, fused=True)

        @torch.compile(backend="eager", fullgraph=True)
        def loss():
            return prompts(ids, words, None, batch).inputs_embeds.sin().sum()

        loss().backward()
        optimizer.step()
        with torch.no_grad():
            got = prompts(ids, words, None, batch).inputs_embeds
            prompts.keep_table(None)
            assert torch.equal(got, prompts(ids, words, None, batch).inputs_embeds)

    def test_kept_prompts_survive_the_drop_and_end_with_the_adapter(self):
        prompts = embeddings()
        with torch.no_grad():
            want = run(prompts)
            prompts.keep_table(("red", "green"))
            prompts.materialize()
            assert torch.equal(run(prompts), want)
            prompts.keep_table(("red", "green"))
            prompts.delete_adapter("red")
            assert not torch.equal(run(prompts)[0, :2], want[0, :2]), "a deleted adapter is served"

    @pytest.mark.parametrize("make", [*[lambda k=k: embeddings(k) for k in KINDS], shared_embeddings])
    def test_training_goes_on_after_a_round_trip(self, make, tmp_path):
        prompts = make()
        train(prompts)
        save_file(prompts.state_dict(), tmp_path / "prompts.safetensors")
        again = PromptEmbedding.from_state_dict(load_file(tmp_path / "prompts.safetensors")).to(DEVICE)
        assert same_state(prompts, again) and list(again.adapters) and repr(again)
        train(prompts)
        train(again)
        assert same_state(prompts, again)

    def test_tables_and_encoders_make_the_round_trip_together(self):
        prompts = embeddings("lstm")
        prompts.materialize(["green"])
        again = PromptEmbedding.from_state_dict(prompts.state_dict())
        with torch.no_grad():
            assert same_state(prompts, again) and torch.equal(run(again), run(prompts))

    def test_a_shared_network_is_one_and_pseudo_tokens_are_each_adapters(self):
        prompts = shared_embeddings()
        assert {key.split(".")[1] for key in prompts.state_dict() if key.startswith("shared")} == {
            "lstm_head",
            "mlp_head",
        }
        assert sum(key.startswith("encoders") for key in prompts.state_dict()) == 3
        want = prompts.shared(prompts.encoders["red"].embedding.weight)
        got = run(prompts)
        assert torch.equal(got[0, :3], want)
        got.sum().backward()
        assert prompts.shared.mlp_head[0].weight.grad is not None
        assert prompts.encoders["blue"].embedding.weight.grad is None

    def test_a_changed_shared_network_makes_snapshots_stale(self):
        prompts = shared_embeddings()
        with torch.no_grad():
            prompts.keep_table(("red", "green"))
            before = run(prompts)
            prompts.shared.mlp_head[2].bias.add_(1)
            assert not torch.equal(run(prompts), before)

    def test_bits_do_not_depend_on_the_others(self):
        prompts = shared_embeddings()
        with torch.no_grad():
            assert torch.equal(run(prompts)[0, :3], run(prompts, ["red", "blue", "green", "green"])[0, :3])

    def test_the_widest_dtype_of_a_batch_is_kept(self):
        prompts = PromptEmbedding().eval()
        for name, dtype in (("red", torch.bfloat16), ("green", torch.float32)):
            prompts.load_peft_table(name, torch.randn(3, E, device=DEVICE).to(dtype))
        table, lengths = prompts.table(("red", "green"))
        assert table.dtype == torch.float32 and lengths.tolist() == [3, 3]
        assert torch.equal(table[1], prompts.encoders["green"]())

    def test_lengths_are_copied_to_the_device_once(self):
        prompts = embeddings()
        with torch.inference_mode():
            first = prompts.table(("red", "green"))[1]
        assert prompts.table(("red", "green"))[1] is first and not first.is_inference()
        assert prompts.table(("green", "red"))[1].tolist() == [2, 3]
        prompts.delete_adapter("green")
        assert prompts.table(("red", "green"))[1].tolist() == [3, 0]
        assert all(len(key[0]) == 2 for key in prompts._lengths)

    def test_without_tasks_all_rows_are_the_base_models(self):
        words = torch.randn(V, E, device=DEVICE)
        got = embeddings()(IDS.to(DEVICE), words, MASK.to(DEVICE))
        assert torch.equal(got.inputs_embeds, words[IDS.to(DEVICE)])

    @pytest.mark.parametrize("grad", [True, False], ids=["training", "serving"])
    def test_compiles_in_one_graph(self, grad):
        prompts = embeddings("embedding")
        words, batch = torch.randn(V, E, device=DEVICE), TaskBatch.of_rows(ROWS, DEVICE)
        with torch.set_grad_enabled(grad):
            compiled = torch.compile(lambda ids: prompts(ids, words, None, batch), backend="eager", fullgraph=True)
            got = compiled(IDS.to(DEVICE)).inputs_embeds
            assert torch.equal(got, prompts(IDS.to(DEVICE), words, None, batch).inputs_embeds)

    def test_deepcopy(self):
        prompts = embeddings()
        twin = copy.deepcopy(prompts)
        train(twin)
        assert not same_state(prompts, twin)


def tiny_gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=V, n_positions=32, n_embd=E, n_layer=1, n_head=2, bos_token_id=0)
    return transformers.GPT2LMHeadModel(config).eval()


def peft_config(kind: str):
    if kind == "embedding":
        return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    return peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=P,
        encoder_reparameterization_type=kind.upper(),
        encoder_hidden_size=6,
    )


class TestPeftFiles:
    """Adapters that PEFT wrote, and files that PEFT reads. Rows without pads: PEFT places prompts before those."""

    ids = torch.tensor([[5, 6, 1], [2, 3, 4]])

    def logits(self, prompts: PromptEmbedding, name: str):
        model, batch = tiny_gpt2(), TaskBatch.of_rows([name, name])
        with torch.no_grad():
            got = prompts(self.ids, model.get_input_embeddings().weight, torch.ones_like(self.ids), batch)
            return model(inputs_embeds=got.inputs_embeds, attention_mask=got.attention_mask).logits

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_saved_adapter_is_served(self, kind, tmp_path):
        model = peft.get_peft_model(tiny_gpt2(), peft_config(kind)).eval()
        nn.init.normal_(model.prompt_encoder["default"].embedding.weight)
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert list(saved) == ["prompt_embeddings"]
        prompts = PromptEmbedding().eval()
        prompts.load_peft_table("x", saved["prompt_embeddings"])
        with torch.no_grad():
            want = model(input_ids=self.ids, attention_mask=torch.ones_like(self.ids)).logits
        torch.testing.assert_close(self.logits(prompts, "x"), want, rtol=0, atol=1e-6)
        assert torch.equal(prompts.peft_state_dict("x")["prompt_embeddings"], saved["prompt_embeddings"])
        assert not torch.equal(self.logits(prompts, "x"), self.logits(prompts, "y"))

    @pytest.mark.parametrize("kind", KINDS)
    def test_peft_loads_what_is_saved_here(self, kind, tmp_path):
        prompts = PromptEmbedding()
        prompts.add_adapter("x", PromptEncoder(P, E, kind, 6))
        train(prompts.to(DEVICE), ["x"] * 4)
        state = prompts.cpu().peft_state_dict("x")
        fresh = peft.get_peft_model(tiny_gpt2(), peft_config(kind))
        fresh.save_pretrained(tmp_path)  # its adapter_config.json
        save_file(state, tmp_path / "adapter_model.safetensors")
        model = peft.PeftModel.from_pretrained(tiny_gpt2(), tmp_path).eval()
        assert torch.equal(model.prompt_encoder["default"].embedding.weight, state["prompt_embeddings"])
        with torch.no_grad():
            want = model(input_ids=self.ids, attention_mask=torch.ones_like(self.ids)).logits
        torch.testing.assert_close(self.logits(prompts, "x"), want, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("kind", ["lstm", "embedding"])
    def test_of_a_sequence_to_sequence_table_the_encoder_reads_the_first_half(self, kind):
        sizes = {"d_model": E, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
        base = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=V, **sizes)).eval()
        config = peft_config(kind)
        config.task_type, words = "SEQ_2_SEQ_LM", base.shared.weight
        model = peft.get_peft_model(base, config).eval()
        saved = peft.get_peft_model_state_dict(model)["prompt_embeddings"]
        assert saved.shape == (2 * P, E)
        prompts, mask = PromptEmbedding().eval(), torch.ones_like(self.ids)
        prompts.load_peft_table("x", saved[:P])
        with torch.no_grad():
            want = model(input_ids=self.ids, attention_mask=mask, decoder_input_ids=self.ids).logits
            got = prompts(self.ids, words, mask, TaskBatch.of_rows(["x", "x"]))
            inputs = {"inputs_embeds": got.inputs_embeds, "attention_mask": got.attention_mask}
            torch.testing.assert_close(base(**inputs, decoder_input_ids=self.ids).logits, want, rtol=0, atol=1e-6)

    def test_a_loaded_table_trains_on_when_asked(self):
        prompts, table = PromptEmbedding().to(DEVICE), torch.randn(P, E)
        prompts.load_peft_table("red", table.to(DEVICE), trainable=True)
        assert torch.equal(prompts.peft_state_dict("red")["prompt_embeddings"], table)
        train(prompts, ["red"] * 4)
        moved = prompts.peft_state_dict("red")["prompt_embeddings"]
        assert not torch.equal(moved, table), "the table did not train"
        prompts.load_peft_table("green", table.requires_grad_())
        assert not prompts.encoders["green"]().requires_grad
        with pytest.raises(RuntimeError, match="'green' has no encoder to train"):
            run(prompts)

    def test_a_loaded_table_is_a_copy(self):
        prompts, table = PromptEmbedding(), torch.ones(P, E)
        prompts.load_peft_table("red", table)
        table.zero_()
        assert prompts.encoders["red"]().all()


def peft_multitask(ranks: int, num_tasks=3) -> nn.Module:
    config = peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=P,
        num_transformer_submodules=1,
        token_dim=E,
        num_ranks=ranks,
        num_tasks=num_tasks,
    )
    return peft.tuners.MultitaskPromptEmbedding(config, nn.Embedding(V, E))


NAMES = ("red", "green", "blue")


@pytest.mark.parametrize("ranks", [1, 3], ids=lambda r: f"rank{r}")
class TestMultitaskPrompts:
    def pair(self, ranks):
        theirs = peft_multitask(ranks)
        ours = MultitaskPromptEmbedding(NAMES, P, E, ranks)
        ours.load_state_dict(theirs.state_dict())  # strict
        return ours, theirs

    def test_keys_and_initialisation_are_pefts(self, ranks):
        torch.manual_seed(1)
        nn.Embedding(V, E)  # PEFT's argument
        ours = MultitaskPromptEmbedding(NAMES, P, E, ranks)
        torch.manual_seed(1)
        theirs = peft_multitask(ranks)
        assert same_state(ours, theirs)
        theirs.load_state_dict(MultitaskPromptEmbedding(NAMES, P, E, ranks).state_dict())

    def test_each_task_is_pefts(self, ranks):
        ours, theirs = self.pair(ranks)
        table, lengths = ours.table(NAMES)
        want = theirs(torch.arange(P).expand(3, P), torch.arange(3))
        torch.testing.assert_close(table, want, rtol=1e-6, atol=1e-8)
        assert ranks > 1 or torch.equal(table, want)
        assert table.shape == (3, P, E) and lengths.tolist() == [P] * 3
        assert torch.equal(ours.table(("blue", "red"))[0], table[[2, 0]]), "a task's bits depend on the others"

    def test_gradients_are_pefts_and_absent_tasks_have_none(self, ranks):
        ours, theirs = self.pair(ranks)
        ours, words = ours.to(DEVICE), torch.zeros(V, E, device=DEVICE)
        got = ours(IDS.to(DEVICE), words, None, TaskBatch.of_rows(["red", "green", "green", "red"], DEVICE))
        dy = torch.randn(4, P + 3, E, device=DEVICE)
        got.inputs_embeds.backward(dy)
        theirs(torch.arange(P).expand(4, P), torch.tensor([0, 1, 1, 0])).backward(dy[:, :P].cpu())
        torch.testing.assert_close(ours.embedding.weight.grad.cpu(), theirs.embedding.weight.grad)
        for key in ("prefix_task_cols", "prefix_task_rows"):
            own, want = getattr(ours, key), getattr(theirs, key).grad
            assert own["blue"].grad is None and not want[2].any()
            for i, name in enumerate(("red", "green")):
                torch.testing.assert_close(own[name].grad.cpu(), want[i])

    def test_a_mixed_batch(self, ranks):
        ours = MultitaskPromptEmbedding(NAMES, 3, E, ranks).to(DEVICE)
        with torch.no_grad():
            got = run(ours, ["red", None, "elsewhere", "blue"])
            assert torch.equal(got[0, :3], ours.prompt("red")) and torch.equal(got[3, :3], ours.prompt("blue"))
            assert got[2, 3:].eq(0).all()
            for changed in (ours.embedding.weight, ours.prefix_task_cols["red"], ours.prefix_task_rows["red"]):
                ours.keep_table(("red", "green"))
                before = run(ours)
                changed.add_(1)
                assert not torch.equal(run(ours), before), "a stale table is served"

    def test_absent_tasks_do_not_move(self, ranks):
        ours = MultitaskPromptEmbedding(NAMES, 3, E, ranks).to(DEVICE)
        before = copy.deepcopy(ours.state_dict())
        train(ours)
        after = ours.state_dict()
        ours.load_state_dict(after, assign=True)
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in ours.parameters()), "a parameter is a view"
        for key in ("prefix_task_cols", "prefix_task_rows"):
            moved = (after[key] != before[key]).flatten(1).any(1)
            assert moved.tolist() == [True, True, False]

    def test_peft_files_both_ways(self, ranks, tmp_path):
        config = peft.MultitaskPromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=P, num_ranks=ranks, num_tasks=3
        )
        model = peft.get_peft_model(tiny_gpt2(), config)
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        ours = MultitaskPromptEmbedding.from_state_dict(NAMES, saved)
        assert same_state(ours, model.prompt_encoder["default"])
        train(ours.to(DEVICE))
        save_file(ours.peft_state_dict(), tmp_path / "adapter_model.safetensors")
        again = peft.PeftModel.from_pretrained(tiny_gpt2(), tmp_path)
        assert same_state(ours.cpu(), again.prompt_encoder["default"])
        other = MultitaskPromptEmbedding(NAMES, P, E, ranks)
        other.load_peft_state_dict(ours.peft_state_dict())
        assert same_state(other, ours)

    def test_tasks_come_later_and_the_prompt_from_text(self, ranks):
        ours, words = MultitaskPromptEmbedding([], 3, E, ranks).from_text([1, 2], torch.randn(V, E)), None
        assert list(ours.state_dict()) == ["embedding.weight"]
        assert torch.equal(ours.embedding.weight[0], ours.embedding.weight[2]), words
        assert [p.shape for p in ours.add_adapter("red")] == [(3, ranks), (ranks, E)]
        assert ours.state_dict()["prefix_task_cols"].shape == (1, 3, ranks)
        with pytest.raises(RuntimeError, match="prefix_task_cols holds 1 tasks, the module 3"):
            MultitaskPromptEmbedding(NAMES, 3, E, ranks).load_state_dict(ours.state_dict())


class TestCheckAdapters:
    def model(self) -> nn.Module:
        layer, prompts = IA3Linear(nn.Linear(E, E)), embeddings()
        layer.add_adapter("scaled")
        multitask = MultitaskPromptEmbedding(["many"], P, E)
        return nn.ModuleDict({"layer": nn.Sequential(layer), "prompts": prompts, "multitask": multitask}).to(DEVICE)

    def test_a_name_that_one_module_knows_is_known(self):
        check_adapters(self.model(), ["scaled", None, "red", "many"])
        check_adapters(self.model(), TaskBatch.of_rows(["scaled", "green"]))
        check_adapters(nn.Linear(1, 1), [None])

    def test_an_unknown_name_is_named_with_those_that_exist(self):
        with pytest.raises(
            ValueError, match=r"adapters of the model, \['scaled', 'red', 'green', 'blue', 'many'\], got 'rde'"
        ):
            check_adapters(self.model(), ["red", "rde"])

    def test_a_long_list_is_cut(self):
        many = MultitaskPromptEmbedding([f"t{i}" for i in range(25)], 1, 1)
        with pytest.raises(ValueError, match=r"'t19' and 5 more\], got 'x'"):
            check_adapters(many, ["x"])

    def test_the_context_asks_the_model_when_given_one(self):
        model = self.model()
        with tasks(["red", "elsewhere"], DEVICE):  # without a model nobody is asked
            pass
        with tasks(["red", None, "scaled"], DEVICE, model=model) as batch:
            assert batch.names == ("red", "scaled")
        with pytest.raises(ValueError, match="got 'elsewhere'"), tasks(["red", "elsewhere"], DEVICE, model=model):
            pytest.fail("the block ran")


def linear() -> nn.Linear:
    return nn.Linear(E, E, device=DEVICE)


TYPE_ERRORS = {
    "tokens-type": (lambda: PromptEncoder("5", E), "PromptEncoder: num_virtual_tokens must be an int, got str"),
    "tokens-bool": (lambda: PromptEncoder(True, E), "num_virtual_tokens must be an int, got bool"),
    "token_dim": (lambda: PromptEncoder(P, 8.0), "PromptEncoder: token_dim must be an int, got float"),
    "kind": (lambda: PromptEncoder(P, E, None), "encoder_reparameterization_type must be a str, got NoneType"),
    "layers": (lambda: PromptEncoder(P, E, "lstm", 6, "2"), "encoder_num_layers must be an int, got str"),
    "dropout-type": (lambda: PromptEncoder(P, E, "lstm", 6, 2, "0"), "encoder_dropout must be a float, got str"),
    "text-type": (lambda: table().from_text("a phrase", words()), "ids must be a tensor or a list of ints, got str"),
    "text-float": (lambda: table().from_text([1.0], words()), "ids must be a tensor or a list of ints, got float"),
    "text-words": (lambda: table().from_vocab([[1.0]]), "embedding must be a tensor or an nn.Embedding, got list"),
    "adapter-type": (lambda: embeddings().add_adapter(3, table()), "PromptEmbedding: adapter must be a name, got int"),
    "encoder": (lambda: embeddings().add_adapter("x", linear()), "encoder must be a PromptEncoder, got Linear"),
    "shared-type": (lambda: PromptEmbedding(3), "PromptEmbedding: shared must be a PromptNetwork or None, got int"),
    "shared-tokens": (lambda: PromptEmbedding(table()), "shared must be a PromptNetwork, without pseudo tokens"),
    "keep_table": (lambda: embeddings().keep_table("red"), "names must be a sequence of adapter names, got str"),
    "table": (lambda: embeddings().table("red"), "PromptEmbedding: names must be a sequence of adapter names, got str"),
    "load-type": (lambda: embeddings().load_peft_table("x", [1.0]), "table must be a tensor, got list"),
    "forward-ids": (lambda: embeddings()([[1]], words()), "PromptEmbedding: input_ids must be a tensor, got list"),
    "forward-words": (lambda: embeddings()(IDS, nn.Embedding(V, E)), "embedding must be a tensor .* got Embedding"),
    "forward-batch": (lambda: embeddings()(IDS, words(), batch=ROWS), "batch must be a TaskBatch or None, got list"),
    "ia3-batch": (lambda: IA3Linear(linear())(words(), ["red"]), "IA3Linear: batch must be a TaskBatch or None"),
    "ia3-flag": (lambda: IA3Linear(linear(), "yes"), "IA3Linear: is_feedforward must be a bool, got str"),
    "ia3-name": (lambda: IA3Linear(linear()).add_adapter(["x"]), "IA3Linear: adapter must be a name, got list"),
    "ia3-merge": (lambda: IA3Linear(linear()).merge(["x"]), "IA3Linear: adapter must be a name, got list"),
    "ia3-table": (lambda: IA3Linear(linear()).table("red"), "names must be a sequence of adapter names, got str"),
    "ia3-x": (lambda: ia3("red")([1.0], TaskBatch.of_rows(["red"])), "TaskBatch: x must be a tensor, got list"),
    "mlp-down": (lambda: IA3GatedMLP(linear(), linear(), 3), "down_proj must be an nn.Linear or an IA3Linear, got int"),
    "rows-str": (lambda: TaskBatch.of_rows("red"), "TaskBatch: rows must be a sequence of adapter names, got str"),
    "rows-int": (lambda: TaskBatch.of_rows(["red", 3]), "TaskBatch: rows must hold adapter names or None, got int"),
    "rows-none": (lambda: TaskBatch.of_rows(None), "TaskBatch: rows must be a sequence of adapter names, got NoneType"),
    "rows-device": (lambda: TaskBatch.of_rows(["red"], 1.5), "TaskBatch: device must be a device, got float"),
    "names-str": (lambda: TaskBatch.of_rows(["red"], names="red"), "names must be a sequence of adapter names"),
    "names-none": (lambda: TaskBatch([None], IDS[0]), "names must hold adapter names, without None"),
    "ids": (lambda: TaskBatch(["x"], [0]), "TaskBatch: ids must be a tensor, got list"),
    "ids-dtype": (lambda: TaskBatch(["x"], torch.ones(1)), "TaskBatch: ids must have dtype int32, int64, got float32"),
    "tasks-str": (lambda: tasks("red").__enter__(), "rows must be a sequence of adapter names, got str"),
    "check-model": (lambda: check_adapters(3, ["x"]), "check_adapters: model must be an nn.Module, got int"),
    "check-names": (lambda: check_adapters(linear(), "x"), "check_adapters: names must be a sequence"),
    "multi-names": (lambda: MultitaskPromptEmbedding("ab", P, E), "names must be a sequence of adapter names, got str"),
    "multi-none": (lambda: MultitaskPromptEmbedding([None], P, E), "adapter must be a name, got NoneType"),
}
VALUE_ERRORS = {
    "tokens": (lambda: PromptEncoder(0, E), "PromptEncoder: num_virtual_tokens must be at least 1, got 0"),
    "hidden": (lambda: PromptNetwork(E, "mlp", 0), "PromptNetwork: encoder_hidden_size must be at least 1"),
    "dropout": (lambda: PromptEncoder(P, E, "lstm", 6, 2, 2), r"encoder_dropout must be in \[0, 1\], got 2"),
    "lama-odd": (lambda: PromptEncoder.lama(P, 7), "PromptEncoder.lama: token_dim must be even, got 7"),
    "state": (lambda: PromptEncoder.from_state_dict({"x": 1}), r"state must hold .* got \['x'\]"),
    "state-tokens": (
        lambda: PromptEncoder.from_state_dict(PromptNetwork(E).state_dict()),
        "embedding.weight, and lstm",
    ),
    "text-empty": (lambda: table().from_text([], words()), "from_text: ids must hold at least one token"),
    "text-width": (lambda: table().from_text([1], words(9)), r"embedding must have shape \[V, 8\], got \[11, 9\]"),
    "adapter-dot": (lambda: embeddings().add_adapter("a.b", table()), "adapter must not be named .* got 'a.b'"),
    "adapter-key": (lambda: embeddings().add_adapter("keys", table()), "adapter must not be named .* got 'keys'"),
    "adapter-empty": (lambda: embeddings().add_adapter("", table()), "adapter must not be named .* got ''"),
    "width": (lambda: embeddings().add_adapter("x", table(9)), "must be 8, as the others have, got 9 for 'x'"),
    "shared-width": (lambda: PromptEmbedding(PromptNetwork(4)).add_adapter("x", table()), "token_dim must be 4"),
    "shared-own": (lambda: shared_embeddings().add_adapter("x", PromptEncoder(P, E)), "of type 'embedding' where"),
    "load-shape": (lambda: embeddings().load_peft_table("x", torch.ones(E)), "table must have 2 dimensions"),
    "load-width": (lambda: embeddings().load_peft_table("x", torch.ones(1, 9)), "token_dim must be 8"),
    "load-empty": (lambda: embeddings().load_peft_table("x", torch.ones(0, E)), "at least one virtual token"),
    "load-taken": (lambda: embeddings().load_peft_table("red", torch.ones(1, E)), "a new name, got 'red'"),
    "load-shared": (lambda: load_beside_a_shared_network(), "trainable must be False where the network"),
    "prompt-name": (lambda: embeddings().prompt("x"), "adapter must be one of .* got 'x'"),
    "length-name": (lambda: embeddings().num_virtual_tokens("x"), "adapter must be one of .* got 'x'"),
    "peft-name": (lambda: embeddings().peft_state_dict("x"), "adapter must be one of .* got 'x'"),
    "rebuild": (lambda: PromptEmbedding.from_state_dict({"x.y": 1}), r"encoders.<adapter>.\* and .* got 'x.y'"),
    "mlp-up": (lambda: IA3GatedMLP(linear(), nn.Linear(E, 9), linear()), "up_proj must map 8 to 8 features"),
    "mlp-width": (lambda: IA3GatedMLP(linear(), linear(), nn.Linear(9, E)), "down_proj must take 8 features, got 9"),
    "names-twice": (lambda: TaskBatch(["x", "x"], IDS[0]), r"TaskBatch: names must differ, got \['x', 'x'\]"),
    "multi-twice": (lambda: MultitaskPromptEmbedding(["x", "x"], P, E), "adapter must have a new name, got 'x'"),
    "multi-ranks": (lambda: MultitaskPromptEmbedding(["x"], P, E, 0), "num_ranks must be at least 1, got 0"),
    "multi-tasks": (lambda: multitask_of(peft_multitask(1).state_dict()), "names must be of 3 tasks, got 1"),
    "multi-state": (lambda: multitask_of({}), r"state must hold .* got \[\]"),
}


def table(width: int = E) -> PromptEncoder:
    return PromptEncoder(2, width, "embedding")


def words(width: int = E) -> torch.Tensor:
    return torch.ones(V, width)


def ia3(name: str) -> IA3Linear:
    layer = IA3Linear(nn.Linear(E, E))
    layer.add_adapter(name)
    return layer


def load_beside_a_shared_network():
    shared_embeddings().load_peft_table("x", torch.ones(1, E), trainable=True)


def multitask_of(state: dict) -> MultitaskPromptEmbedding:
    return MultitaskPromptEmbedding.from_state_dict(["x"], state)


@pytest.mark.parametrize("call, text", TYPE_ERRORS.values(), ids=TYPE_ERRORS)
def test_type_errors(call, text):
    with pytest.raises(TypeError, match=text):
        call()


@pytest.mark.parametrize("call, text", VALUE_ERRORS.values(), ids=VALUE_ERRORS)
def test_value_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_a_phrase_outside_the_vocabulary():
    with pytest.raises(IndexError, match=r"PromptEncoder.from_text: ids must be in \[0, 11\), got 11"):
        table().from_text([1, V], words())


def test_peft_state_of_other_keys():
    with pytest.raises(ValueError, match=r"must hold prompt_embeddings and prefix_task_cols .* got \[\]"):
        MultitaskPromptEmbedding(["x"], P, E).load_peft_state_dict({})
