"""Whether the installed PEFT computes what accelerate puts in its place: both run on tiny models, once per process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

OLDEST = "0.19"
NAMES, BASE = ("first", "second"), "__base__"


class Tiny(nn.Module):
    """A language model of 5 words with a layer of each kind that PEFT adapts; it returns what it was given to read.

    In fp64, which no kernel serves, so that no backend's choice and no rounding has a say.
    """

    device = torch.device("cpu")

    def __init__(self, is_encoder_decoder: bool = False):
        from transformers import PretrainedConfig

        super().__init__()
        sizes = dict(vocab_size=5, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
        self.config = PretrainedConfig(**sizes, is_encoder_decoder=is_encoder_decoder)
        self.words = nn.Embedding(5, 4)
        self.up, self.down, self.head = nn.Linear(4, 3), nn.Linear(3, 4), nn.Linear(4, 2)
        self.flat, self.deep = nn.Conv2d(1, 2, 1), nn.Conv3d(2, 2, 1)
        self.double()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def can_generate(self) -> bool:
        return True

    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict:
        return kwargs

    _prepare_encoder_decoder_kwargs_for_generation = prepare_inputs_for_generation  # PEFT 0.19 asks for it

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, **kwargs):
        x = self.words(input_ids) if inputs_embeds is None else inputs_embeds
        h = self.head(self.down(self.up(x)))
        y = self.deep(self.flat(h[:, None])[:, :, None])
        return [t for t in (x, y, attention_mask, labels) if t is not None]


def problem(put: Callable[[nn.Module], None]) -> str | None:
    """What the installed PEFT does otherwise than what `put` makes of its models; None if nothing."""
    import peft

    if TorchVersion(peft.__version__) < OLDEST:
        return "it is older"
    try:
        with _nothing_left_behind():
            return _layers_differ(put) or _prompts_differ(put)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        return f"{type(error).__name__}: {error}"


@contextmanager
def _nothing_left_behind() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        yield


def _fill(model: nn.Module) -> None:
    """Numbers that differ from adapter to adapter and from feature to feature."""
    for i, parameter in enumerate(model.parameters()):
        parameter.copy_(torch.linspace(-1, 1 + 0.1 * i, parameter.numel()).view_as(parameter))


def _same(got: list[Tensor], want: list[Tensor]) -> bool:
    return len(got) == len(want) and all(torch.equal(a, b.to(a.dtype)) for a, b in zip(got, want, strict=True))


def _layers_differ(put: Callable[[nn.Module], None]) -> str | None:
    import peft

    def config():
        return peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["up", "down", "flat", "deep"], feedforward_modules=["down", "deep"],
            modules_to_save=["head"],
        )  # fmt: skip

    model = peft.get_peft_model(Tiny(), config(), adapter_name=NAMES[0])
    model.add_adapter(NAMES[1], config())
    _fill(model.double().eval())
    batch = {"input_ids": torch.tensor([[1, 2, 3], [4, 0, 1], [2, 2, 0]]), "labels": torch.arange(9).view(3, 3)}

    def runs() -> list[list[Tensor]]:
        found = []
        for name in NAMES:
            model.set_adapter(name)
            found.append(model(**batch))
        with model.disable_adapter():
            found.append(model(**batch))
        for layer in model.modules():
            if hasattr(layer, "ia3_l"):  # of a head one alone may be active
                layer.set_adapter([*NAMES])
        return [*found, model(**batch)]

    want = runs()
    put(model)
    for what, ours, pefts in zip(("one adapter", "another", "no adapter", "two adapters"), runs(), want, strict=True):
        if not _same(ours, pefts):
            return f"a model with (IA)^3 layers, {what} active, computes something else"
    rows = [torch.stack([found[i] for i, found in enumerate(of_name)]) for of_name in zip(*want[:3], strict=True)]
    if not _same(model(**batch, adapter_names=[*NAMES, BASE]), rows):
        return "layers and heads of several adapters compute something else"
    return None


def _prompts_differ(put: Callable[[nn.Module], None]) -> str | None:
    import peft

    batch = {"input_ids": torch.tensor([[1, 2, 3], [4, 0, 1]]), "labels": torch.arange(6).view(2, 3)}
    batch["attention_mask"] = torch.ones_like(batch["labels"])
    for kind, task in (("PROMPT_TUNING", "CAUSAL_LM"), ("P_TUNING", "CAUSAL_LM"), ("PROMPT_TUNING", "SEQ_2_SEQ_LM")):
        if kind == "PROMPT_TUNING":
            config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=2)
        else:
            config = peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=2, encoder_hidden_size=3)
        model = peft.get_peft_model(Tiny(task == "SEQ_2_SEQ_LM"), config, adapter_name=NAMES[0])
        _fill(model.double().eval())
        want = []
        for config.inference_mode in (False, True):  # what is computed from an encoder, and its table
            want.append(model(**batch))
        put(model)
        for config.inference_mode, pefts in zip((False, True), want, strict=True):
            for names in ({}, {"adapter_names": [NAMES[0]] * 2}):
                if not _same(model(**batch, **names), pefts):
                    return f"a model with a prompt ({kind}, {task}) reads something else"
    return None
