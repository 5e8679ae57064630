"""PEFT's adapter folders, adapter_config.json and adapter_model.safetensors, read and written without a model."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

CONFIG, SAFETENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MULTITASK = "MULTITASK_PROMPT_TUNING"
KINDS = {"IA3": "base_model.model.", **dict.fromkeys(("PROMPT_TUNING", "P_TUNING", MULTITASK), "base_model.")}  # prefix
FACTORS = {"prefix_task_cols", "prefix_task_rows"}
PROMPT = {"prompt_embeddings", *FACTORS}
VECTOR = ".ia3_l"


@dataclass(frozen=True)
class Adapter:
    """What a PEFT folder holds, as the operators want it.

    Attributes:
        config: adapter_config.json.
        vectors: (IA)^3, [width] by module, named as in the model without PEFT's prefix.
        feedforward: the modules whose input the vector scales; the others' output.
        prompt: [P, E]; of multitask prompt tuning [num_tasks, P, E]. What goes before the encoder's text, if there are
            two.
        decoder_prompt: of multitask prompt tuning with an encoder and a decoder, what goes before the decoder's.
        modules_to_save: other trained tensors by name in the model, say those of a classifier.
    """

    config: dict
    vectors: dict[str, Tensor] = field(default_factory=dict)
    feedforward: frozenset[str] = frozenset()
    prompt: Tensor | None = None
    decoder_prompt: Tensor | None = None
    modules_to_save: dict[str, Tensor] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """PEFT's type: IA3, PROMPT_TUNING, P_TUNING or MULTITASK_PROMPT_TUNING."""
        return self.config["peft_type"]


def ia3_adapter(vectors: Mapping[str, Tensor], feedforward: Iterable[str] = (), **config) -> Adapter:
    """An (IA)^3 adapter to write, of vectors [width] by module.

    Args:
        feedforward: modules whose input is scaled.
        config: further entries of adapter_config.json, say task_type and base_model_name_or_path; target_modules and
            feedforward_modules are the modules' whole names unless they are given.
    """
    feedforward = frozenset(feedforward)
    own = dict(peft_type="IA3", inference_mode=True, target_modules=[*vectors], feedforward_modules=sorted(feedforward))
    return Adapter(own | config, {module: vector.flatten() for module, vector in vectors.items()}, feedforward)


def prompt_adapter(prompt: Tensor, **config) -> Adapter:
    """A prompt [P, E] to write, as PROMPT_TUNING, which has no encoder; before the encoder's text if there are two.

    Args:
        config: further entries of adapter_config.json, say task_type, which PEFT needs, and base_model_name_or_path.
    """
    P, E = prompt.shape
    own = dict(peft_type="PROMPT_TUNING", inference_mode=True, num_virtual_tokens=P, token_dim=E)
    return Adapter(own | config | dict(num_transformer_submodules=1), prompt=prompt)


def read_adapter(path: str | PathLike) -> Adapter:
    """Read a folder that PEFT saved.

    Tensors stay in the dtype they were saved in, on the CPU. A P-Tuning folder holds the table its encoder computed.
    Of prompts with an encoder and a decoder, PEFT saves 2 P rows; PROMPT_TUNING and P_TUNING never read the second P,
    which are left out here. Pickled weights are read with `weights_only=True`.

    Raises:
        FileNotFoundError: no such folder, or not PEFT's.
        ValueError: another kind of adapter, a convolution's vectors, or tensors that its config does not tell of.
    """
    path = Path(path)
    op, config = "read_adapter", config_of(path)
    kind, state = config["peft_type"], _tensors(path)
    found, other = {}, {}
    for key, value in state.items():
        name = key.removeprefix(KINDS[kind])
        if (kind == "IA3" and key != name and name.endswith(VECTOR)) or (kind != "IA3" and key in PROMPT):
            found[name.removesuffix(VECTOR)] = value
        elif _is_saved(config, name):
            other[name] = value
        else:
            what = f"vectors, named {KINDS[kind]}<module>{VECTOR}," if kind == "IA3" else "prompt_embeddings"
            raise ValueError(f"{op}: {path} must hold {what} and tensors of modules_to_save, got {key!r}")
    if kind == "IA3":
        feedforward = {name for name, value in found.items() if scales_input(op, config, name, tuple(value.shape))}
        vectors = {name: value.flatten() for name, value in found.items()}
        return Adapter(config, vectors, frozenset(feedforward), modules_to_save=other)
    P, submodules = config.get("num_virtual_tokens") or 0, num_submodules(config)
    wanted = PROMPT if kind == MULTITASK else PROMPT - FACTORS
    if found.keys() != wanted:
        raise ValueError(f"{op}: {path} must hold {' and '.join(sorted(wanted))}, got {sorted(found)}")
    table = found["prompt_embeddings"]
    if table.dim() != 2 or not P or len(table) != P * submodules:
        raise ValueError(
            f"{op}: prompt_embeddings must have {P} rows for each of {submodules} transformers, as the config says, "
            f"got shape {list(table.shape)}"
        )
    if kind == MULTITASK:
        table = table * (found["prefix_task_cols"] @ found["prefix_task_rows"])
    rest = table[..., P:, :] if kind == MULTITASK and submodules == 2 else None
    return Adapter(config, prompt=table[..., :P, :], decoder_prompt=rest, modules_to_save=other)


def write_adapter(path: str | PathLike, adapter: Adapter) -> None:
    """Write a folder that `PeftModel.from_pretrained` loads; its own files there are replaced.

    Raises:
        ValueError: vectors that PEFT, by the config's target_modules and feedforward_modules, would put elsewhere;
            tensors of modules that the config's modules_to_save does not name;
            multitask prompts, whose factors are not here (write each task's with `prompt_adapter`).
    """
    from safetensors.torch import save_file

    op, kind, config = "write_adapter", adapter.kind, dict(adapter.config)
    if kind not in KINDS or kind == MULTITASK:
        raise ValueError(f"{op}: peft_type must be IA3, PROMPT_TUNING or P_TUNING, got {kind!r}")
    if kind == "IA3":
        if not adapter.vectors:
            raise ValueError(f"{op}: vectors must be of one module at least, got none")
        shapes = {m: (1, len(v)) if m in adapter.feedforward else (len(v), 1) for m, v in adapter.vectors.items()}
        for module, shape in shapes.items():
            scales_input(op, config, module, shape)
        state = {f"{KINDS[kind]}{m}{VECTOR}": vector.reshape(shapes[m]) for m, vector in adapter.vectors.items()}
    else:
        config["num_virtual_tokens"], config["token_dim"] = adapter.prompt.shape
        config["num_transformer_submodules"] = 1  # the only one that PEFT reads, of these kinds
        state = {"prompt_embeddings": adapter.prompt}
    unnamed = next((name for name in adapter.modules_to_save if not _is_saved(config, name)), None)
    if unnamed is not None:
        raise ValueError(f"{op}: modules_to_save of the config must name every module saved, got {unnamed!r}")
    state |= {KINDS[kind] + key: value for key, value in adapter.modules_to_save.items()}
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    # copies: views of one storage cannot be saved
    save_file({k: v.detach().cpu().clone() for k, v in state.items()}, path / SAFETENSORS, metadata={"format": "pt"})
    (path / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def config_of(path: Path) -> dict:
    config = json.loads((path / CONFIG).read_text())
    kind = config.get("peft_type")
    if kind not in KINDS:
        raise ValueError(f"{path / CONFIG}: peft_type must be one of {', '.join(KINDS)}, got {kind!r}")
    return config


def _weights(path: Path) -> Path:
    return path / (SAFETENSORS if (path / SAFETENSORS).is_file() else PICKLE)


def _tensors(path: Path) -> dict[str, Tensor]:
    path = _weights(path)
    if path.name == PICKLE:
        return torch.load(path, map_location="cpu", weights_only=True)
    from safetensors.torch import load_file

    return load_file(path)


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    path = _weights(path)
    if path.name == PICKLE:
        return {key: tuple(value.shape) for key, value in _tensors(path.parent).items()}
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def _is_saved(config: Mapping, name: str) -> bool:
    return any(f".{module}." in f".{name}" for module in config.get("modules_to_save") or ())


def num_submodules(config: Mapping) -> int:
    """How many transformers of the model get a prompt, by PEFT's rule."""
    return config.get("num_transformer_submodules") or (2 if config.get("task_type") == "SEQ_2_SEQ_LM" else 1)


def scales_input(op: str, config: Mapping, module: str, shape: tuple[int, ...]) -> bool:
    """Whether PEFT would scale the input of a module, by its rules of names; the vector's shape must say the same."""
    targets, inputs = config.get("target_modules"), config.get("feedforward_modules")
    if isinstance(targets, str):
        targeted = targets == "all-linear" or bool(re.fullmatch(targets, module))
    else:
        targeted = targets is None or f".{module}".endswith(tuple(f".{target}" for target in targets))
    if not targeted:
        raise ValueError(f"{op}: target_modules must match every vector's module, got {targets} for {module!r}")
    if len(shape) != 2 or 1 not in shape:
        raise ValueError(
            f"{op}: {module!r} must be a linear layer, whose vector is [n, 1] or [1, n], got {list(shape)}"
        )
    by_shape = shape[0] == 1 != shape[1]
    if inputs is None or shape == (1, 1):
        return by_shape
    # no dot before it: PEFT asks for the end of the name alone
    named = bool(re.fullmatch(inputs, module)) if isinstance(inputs, str) else module.endswith(tuple(inputs))
    if named != by_shape:
        side = "input" if named else "output"
        raise ValueError(
            f"{op}: {module!r} must have a vector of its {side}, as feedforward_modules says, got {list(shape)}"
        )
    return named
