"""A directory of PEFT folders as the tasks of a TaskBank, each read when a batch first asks for it."""

import re
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from peft_ops.integrations.folders import (
    CONFIG,
    KINDS,
    MULTITASK,
    VECTOR,
    config_of,
    num_submodules,
    read_adapter,
    scales_input,
    shapes_of,
)
from peft_ops.nn import TaskBank
from peft_ops.nn.adapters import similar

Task = tuple[dict[str, Tensor], Tensor | None]


def loader_from_folder(root: str | PathLike, *, ignore_heads: bool = False) -> Callable[[str], Task]:
    """The `loader` of a TaskBank that reads tasks from a directory of PEFT folders, each under its folder's name.

    Task i of a multitask prompt is named `folder[i]`. A name is one folder's in `root`: no path leads out of it.

    Args:
        ignore_heads: serve adapters with modules_to_save, a classifier say, without these: the caller adds them.

    Raises, when it is called:
        KeyError: no such folder, or task of it.
        ValueError: as `read_adapter`; heads; a decoder's prompt; a module whose output one adapter scales, and whose
            input another.
    """
    return _loader(Path(root), ignore_heads, {})


def _loader(root: Path, ignore_heads: bool, sides: dict[str, bool]) -> Callable[[str], Task]:
    lock = Lock()

    def load(name: str) -> Task:
        op = "loader_from_folder"
        folder, task = _find(op, root, name)
        adapter = read_adapter(root / folder)
        if adapter.modules_to_save and not ignore_heads:
            what = "no modules_to_save, which a bank does not serve (ignore_heads=True leaves them out)"
            raise ValueError(f"{op}: {name!r} must have {what}, got {sorted(adapter.modules_to_save)}")
        if adapter.decoder_prompt is not None:
            raise ValueError(f"{op}: {name!r} must have one prompt, got one more for the decoder")
        with lock:
            _check_sides(op, name, {module: module in adapter.feedforward for module in adapter.vectors}, sides)
        prompt = adapter.prompt
        if adapter.kind == MULTITASK:
            if task is None:
                raise ValueError(f"{op}: {name!r} has {len(prompt)} tasks and must be asked for one, got no [i]")
            if task >= len(prompt):
                raise KeyError(f"{op}: {folder!r} must have that task, one of {len(prompt)}, got {name!r}")
            prompt = prompt[task]
        elif task is not None:
            raise KeyError(f"{op}: {folder!r} must be a multitask prompt to have tasks, got {name!r}")
        return adapter.vectors, prompt

    return load


def bank_from_folder(
    root: str | PathLike,
    slots: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    host_capacity: int | None = None,
    ignore_heads: bool = False,
) -> TaskBank:
    """A TaskBank that serves every PEFT folder in a directory by its name, and reads each when it is first used.

    Modules, widths and the longest prompt are those of the folders that are there now, of which the configs and the
    tensors' shapes are read; a folder that comes later is served if its modules are among them.

    Args:
        slots, dtype, device, host_capacity: as TaskBank.
        ignore_heads: as `loader_from_folder`.

    Raises:
        ValueError: no folder there; adapters that are not of one model, or not of our kinds.
    """
    op, widths, sides, P, E = "bank_from_folder", {}, {}, 0, 0
    root = Path(root)
    for folder in _folders(root):
        try:
            config, shapes = config_of(root / folder), shapes_of(root / folder)
        except ValueError as error:
            raise ValueError(f"{op}: {error}; a bank serves every folder in {str(root)!r}, move this one out") from None
        own = {}
        for key, shape in shapes.items():
            module = key.removeprefix(KINDS[config["peft_type"]]).removesuffix(VECTOR)
            if config["peft_type"] == "IA3" and key.endswith(VECTOR):
                own[module] = scales_input(op, config, module, shape)
                width = max(shape)
                if widths.setdefault(module, width) != width:
                    wanted = f"{widths[module]} features, as in other adapters"
                    raise ValueError(f"{op}: {module!r} must have {wanted}, got {width} in {folder!r}")
            elif key == "prompt_embeddings":
                P = max(P, shape[0] // num_submodules(config))
                E = E or shape[1]
                if E != shape[1]:
                    raise ValueError(f"{op}: prompts must have {E} features each, got {shape[1]} in {folder!r}")
        _check_sides(op, folder, own, sides)
    if not widths and not P:
        raise ValueError(f"{op}: root must hold PEFT's folders, got {str(root)!r}")
    loader = _loader(root, ignore_heads, sides)
    sizes = dict(
        num_virtual_tokens=P, token_dim=E, feedforward=[module for module, is_input in sides.items() if is_input]
    )
    return TaskBank(slots, widths, dtype, device, **sizes, loader=loader, host_capacity=host_capacity)


def _check_sides(op: str, name: str, own: Mapping[str, bool], sides: dict[str, bool]) -> None:
    """One table per module serves all tasks: it scales the module's input, or its output."""
    for module, is_input in own.items():
        if sides.get(module, is_input) != is_input:
            ours, others = ("input", "output") if is_input else ("output", "input")
            raise ValueError(f"{op}: {name!r} must scale the {others} of {module!r}, as others do, got the {ours}")
    sides.update(own)


def _folders(root: Path) -> list[str]:
    return sorted(path.parent.name for path in root.glob(f"*/{CONFIG}"))


def _find(op: str, root: Path, name: str) -> tuple[str, int | None]:
    numbered = re.fullmatch(r"(.+)\[(\d+)\]", name)
    for folder, task in ((name, None), *([(numbered[1], int(numbered[2]))] if numbered else [])):
        # one component, below the directory: no name of a request leads out of it
        if Path(folder).name == folder and folder not in ("", "..") and (root / folder / CONFIG).is_file():
            return folder, task
    known = _folders(root)
    raise KeyError(f"{op}: a name must be of a PEFT folder in {str(root)!r}, got {name!r}{similar(name, known)}")
