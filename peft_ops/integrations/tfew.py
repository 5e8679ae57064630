"""The (IA)^3 authors' own checkpoints (T-Few, arXiv 2205.05638) as PEFT adapters, and back.

    python -m peft_ops.integrations.tfew finish.pt OUT --base-model bigscience/T0_3B

T-Few scales k, v and the output of wi_1, the half of a gated feed-forward layer that has no activation; PEFT scales k,
v and the input of wo, h = act(wi_0(x)) * wi_1(x). The two are one: act(wi_0(x)) * (wi_1(x) * l) = h * l.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from peft_ops.integrations.folders import Adapter, ia3_adapter, read_adapter, write_adapter

LAYER = r"(?:encoder|decoder)\.block\.\d+\.layer\.\d+\."
ATTENTION = re.compile(LAYER + r"(?:Self|EncDec)Attention\.[qkvo]")
GATED, INPUT_OF_WO = re.compile(LAYER + r"DenseReluDense\.wi_1"), re.compile(LAYER + r"DenseReluDense\.wo")
WHY_NOT = {
    "wi": "scaled before its activation, which PEFT does not do; only gated models map",
    "wi_0": "scaled before its activation, which PEFT does not do",
    "wo": "scaled at its output, where PEFT scales the input",
}


def from_tfew(state: Mapping[str, Tensor], base_model: str | None = None) -> Adapter:
    """An adapter for PEFT of a T-Few state dict: `<module>.multi_lora_b` [d, 1], for k, v (q, o) and wi_1 of a T5 v1.1.

    Args:
        base_model: what `base_model_name_or_path` of the config says.

    Raises:
        ValueError: what PEFT's (IA)^3 cannot say: another module, a rank above 1, a `multi_lora_a`, which scales a
            module's input, other than ones.
    """
    op, vectors, feedforward = "from_tfew", {}, set()
    for key, value in state.items():
        module, _, what = key.rpartition(".")
        last = module.rpartition(".")[2]
        if what not in ("multi_lora_a", "multi_lora_b") or not (ATTENTION.fullmatch(module) or GATED.fullmatch(module)):
            why = f"; it is {WHY_NOT[last]}" if last in WHY_NOT and what == "multi_lora_b" else ""
            raise ValueError(f"{op}: state must hold multi_lora_b of k, v and wi_1 of a T5's blocks, got {key!r}{why}")
        if not isinstance(value, Tensor) or value.dim() != 2 or value.shape[what == "multi_lora_b"] != 1:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{op}: {key} must be a vector, of rank 1, got {got}")
        if what == "multi_lora_a":
            if not bool((value == 1).all()):
                got = f"values from {value.min():.4g} to {value.max():.4g}"
                raise ValueError(f"{op}: {key} must be ones, PEFT having no scale there, got {got}")
            continue
        if last == "wi_1":
            module = f"{module[: -len(last)]}wo"
            feedforward.add(module)
        vectors[module] = value.flatten()
    if not vectors:
        raise ValueError(f"{op}: state must hold vectors, got none")

    def names(modules) -> list[str]:
        return sorted({module.rpartition(".")[2] for module in modules})

    return ia3_adapter(
        vectors,
        feedforward,
        target_modules=names(vectors),
        feedforward_modules=names(feedforward),
        task_type="SEQ_2_SEQ_LM",
        base_model_name_or_path=base_model,
    )


def to_tfew(adapter: Adapter) -> dict[str, Tensor]:
    """The T-Few state dict of a PEFT (IA)^3 adapter of a gated T5, [d, 1] each: `from_tfew` backwards.

    Raises:
        ValueError: another kind of adapter, heads, or a module that T-Few does not scale there.
    """
    op, state = "to_tfew", {}
    if adapter.kind != "IA3" or adapter.modules_to_save:
        got = f"{adapter.kind} with {sorted(adapter.modules_to_save)}" if adapter.modules_to_save else adapter.kind
        raise ValueError(f"{op}: adapter must be IA3, without modules_to_save, got {got}")
    for module, vector in adapter.vectors.items():
        scales_input = module in adapter.feedforward
        if not (INPUT_OF_WO if scales_input else ATTENTION).fullmatch(module):
            where = "input" if scales_input else "output"
            raise ValueError(
                f"{op}: adapter must scale outputs of a T5's attention and inputs of wo, got the {where} of {module!r}"
            )
        name = f"{module.removesuffix('wo')}wi_1" if scales_input else module
        state[f"{name}.multi_lora_b"] = vector[:, None].clone()
    return state


def read_tfew(path: str | PathLike, base_model: str | None = None) -> Adapter:
    """`from_tfew` of a file that torch saved, a `finish.pt`; nothing but tensors is unpickled."""
    return from_tfew(torch.load(path, map_location="cpu", weights_only=True), base_model)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m peft_ops.integrations.tfew", description=__doc__.splitlines()[0])
    parser.add_argument("source", help="a T-Few checkpoint, .pt; with --inverse a PEFT folder")
    parser.add_argument("out", help="the PEFT folder to write; with --inverse the .pt file")
    parser.add_argument("--base-model", help="for the config, say bigscience/T0_3B")
    parser.add_argument("--inverse", action="store_true", help="from PEFT to T-Few")
    args = parser.parse_args(argv)
    wanted = "a PEFT folder, with --inverse" if args.inverse else "a T-Few checkpoint; --inverse takes a PEFT folder"
    if Path(args.source).is_dir() != args.inverse or not Path(args.source).exists():
        parser.error(f"source must be {wanted}, got {args.source}")
    if args.inverse:
        adapter = read_adapter(args.source)
        torch.save(to_tfew(adapter), args.out)
    else:
        adapter = read_tfew(args.source, args.base_model)
        write_adapter(args.out, adapter)
    size = sum(vector.numel() for vector in adapter.vectors.values())
    print(f"{len(adapter.vectors)} vectors, {size} numbers -> {args.out}")


if __name__ == "__main__":
    main()
