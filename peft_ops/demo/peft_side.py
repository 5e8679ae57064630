"""PEFT's side of the demo: adapters written in its format, and the way it serves a batch of several."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_ops.demo.data import Task
from peft_ops.demo.model import Encoder, Heads, Texts, ia3_targets, load_backbone
from peft_ops.demo.train import ENCODER_HIDDEN_SIZE, NUM_VIRTUAL_TOKENS, adapter


def export(
    path: str, encoder: Encoder, heads: Heads, tasks: list[Task], methods: Sequence[str], kind: str, folder: Path
) -> None:
    """Write every adapter through PEFT itself, and every head beside its adapter."""
    for method in methods:
        config = peft_config(method, encoder, kind)
        model = None
        for task in tasks:
            name = adapter(method, task.name)
            model = add_to_peft(model, path, config, name)
            copy_into(model, encoder, method, name)
            model.save_pretrained(str(folder), selected_adapters=[name])
            (folder / name / "README.md").unlink(missing_ok=True)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card has nothing to say about these
    for task in tasks:
        for method in (*methods, "head"):
            name = adapter(method, task.name)
            (folder / name).mkdir(exist_ok=True)
            head = {key: value.detach().cpu().contiguous() for key, value in heads.linears[name].state_dict().items()}
            save_file(head, folder / name / "head.safetensors", metadata={"labels": json.dumps(task.labels)})


def peft_config(method: str, encoder: Encoder, kind: str):
    from peft import IA3Config, PromptEncoderConfig, TaskType

    if method == "ia3":
        targets, feedforward = ia3_targets(encoder.backbone.config.model_type)
        return IA3Config(
            task_type=TaskType.FEATURE_EXTRACTION, target_modules=list(targets), feedforward_modules=list(feedforward)
        )
    return PromptEncoderConfig(
        task_type=TaskType.FEATURE_EXTRACTION,
        num_virtual_tokens=NUM_VIRTUAL_TOKENS,
        encoder_reparameterization_type=kind.upper(),
        encoder_hidden_size=ENCODER_HIDDEN_SIZE,
    )


def add_to_peft(model, path: str, config, name: str):
    from peft import get_peft_model

    if model is None:
        backbone = load_backbone(path, torch.device("cpu"))
        return get_peft_model(backbone, config, adapter_name=name)
    model.add_adapter(name, config)
    return model


@torch.no_grad()
def copy_into(model, encoder: Encoder, method: str, name: str) -> None:
    """Our parameters have PEFT's shapes and keys: only the place differs."""
    if method == "ia3":
        for layer, ours in encoder.ia3.items():
            model.base_model.model.get_submodule(layer).ia3_l[name].copy_(ours.ia3_l[name])
    else:
        model.prompt_encoder[name].load_state_dict(encoder.prompts.encoders[name].state_dict())


class PeftServer:
    """PEFT's way with several adapters: sort the batch by adapter, switch, run each part, put the rows back.

    Args:
        backbone: a model of its own, unchanged.
        folder: where the adapters lie, one folder each.
        names: adapters of one PEFT type; None rows run with adapters switched off.
    """

    def __init__(self, backbone: nn.Module, folder: Path, names: Sequence[str]):
        from peft import PeftModel

        self.model = PeftModel.from_pretrained(backbone, folder / names[0], adapter_name=names[0])
        for name in names[1:]:
            self.model.load_adapter(folder / name, adapter_name=name)
        self.model.eval()

    def run(self, texts: Texts, name: str | None) -> Tensor:
        """Hidden states of the text [B, S, hidden_size]."""
        inputs = {"input_ids": texts.input_ids, "attention_mask": texts.attention_mask}
        if name is None:
            if self.model.active_peft_config.is_prompt_learning:  # disable_adapter() needs a model that generates
                return self.model.base_model(**inputs).last_hidden_state
            with self.model.disable_adapter():
                return self.model(**inputs).last_hidden_state
        self.model.set_adapter(name)
        return self.model(**inputs).last_hidden_state[:, -texts.input_ids.shape[1] :]

    def loop(self, parts: list[tuple[str | None, Tensor, Texts]], out: Tensor) -> Tensor:
        for name, rows, texts in parts:
            states = self.run(texts, name)
            out[rows, : states.shape[1]] = states
        return out


def parts_of(texts: Texts, adapters: Sequence[str | None]) -> list[tuple[str | None, Tensor, Texts]]:
    """Rows and texts of each adapter, cut to the longest text of the part."""
    parts = []
    for name in dict.fromkeys(adapters):
        rows = torch.tensor([i for i, owner in enumerate(adapters) if owner == name], device=texts.input_ids.device)
        parts.append((name, rows, texts[rows]))
    return parts
