"""One decoder layer in training: frozen, with PEFT's (IA)^3, with ours. Bytes kept for its backward, and time of both.

    python -m bench.training               # a layer of Llama-3-8B's size in bf16, 512 tokens in 4 sequences
    python -m bench.training --json FILE

Bytes are counted with saved-tensor hooks: every storage once, without parameters and ids. The input needs a gradient,
as in every layer above the first adapter. Times are of forward and backward, ABBA-interleaved with the frozen layer.
"""

import argparse
import copy
import json
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from bench.harness import compare
from peft_ops.nn import IA3GatedMLP, IA3Linear, TaskBatch, tasks

ADAPTERS, FROZEN = ("reviews", "legal"), "frozen"
# transformers' names; head_dim and the ratio of query to key heads are Llama-3-8B's
LLAMA_3_8B = dict(
    hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, head_dim=128
)


def saved_bytes(forward: Callable[[], object], known: Iterable[Tensor]) -> int:
    """Bytes of the floating-point storages that `forward` keeps for its backward, those of `known` left out."""
    known = {t.untyped_storage().data_ptr() for t in known}
    kept = {}

    def pack(t: Tensor) -> Tensor:
        if t.is_floating_point() and t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def adapted_layer(frozen: nn.Module) -> nn.Module:
    """A Llama layer with our modules on k, v and the gated MLP; weights shared."""
    layer = copy.copy(frozen)
    layer._modules = dict(frozen._modules)
    attention = layer.self_attn = copy.copy(frozen.self_attn)
    attention._modules = dict(frozen.self_attn._modules)
    attention.k_proj, attention.v_proj = IA3Linear(attention.k_proj), IA3Linear(attention.v_proj)
    layer.mlp = IA3GatedMLP(frozen.mlp.gate_proj, frozen.mlp.up_proj, frozen.mlp.down_proj)
    for module in (attention.k_proj, attention.v_proj, layer.mlp):
        for name in ADAPTERS:
            module.add_adapter(name)
    return layer


def peft_layer(frozen: nn.Module) -> nn.Module:
    """The same layer with PEFT's adapter on the same places: what get_peft_model makes of a Llama."""
    import peft

    layer = copy.copy(frozen)
    layer._modules = dict(frozen._modules)
    layer.self_attn, layer.mlp = (copy.copy(module) for module in (frozen.self_attn, frozen.mlp))
    for module in (layer.self_attn, layer.mlp):
        module._modules = dict(module._modules)
    config = peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    return peft.get_peft_model(nn.ModuleDict({"layer": layer}), config).base_model.model["layer"]


def layers(sizes: dict, sequences: int, tokens: int, device: str = "cpu") -> dict[str, Callable[[], Tensor]]:
    """Forward passes over [sequences, tokens] in bf16: of the frozen layer, with PEFT's adapter, with ours."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(**sizes)
    config._attn_implementation = "sdpa"
    frozen = LlamaDecoderLayer(config, 0).to(device, torch.bfloat16).requires_grad_(False)
    x = torch.randn(sequences, tokens, config.hidden_size, dtype=torch.bfloat16, device=device, requires_grad=True)
    positions = LlamaRotaryEmbedding(config).to(device)(x, torch.arange(tokens, device=device)[None])
    ours, pefts = adapted_layer(frozen), peft_layer(frozen)
    batch = TaskBatch.of_rows([(*ADAPTERS, None)[i % 3] for i in range(sequences)], device)

    def mixed() -> Tensor:
        with tasks(batch):
            return ours(x * 1, position_embeddings=positions)

    mixed.module, forward = ours, {"peft_ops, mixed batch": mixed}
    for name, layer in ((FROZEN, frozen), ("PEFT, one adapter", pefts)):

        def run(layer=layer) -> Tensor:
            return layer(x * 1, position_embeddings=positions)

        run.module, forward[name] = layer, run
    return {name: forward[name] for name in (FROZEN, "PEFT, one adapter", "peft_ops, mixed batch")}


def kept_bytes(forwards: dict[str, Callable[[], Tensor]]) -> dict[str, int]:
    return {name: saved_bytes(forward, forward.module.parameters()) for name, forward in forwards.items()}


def step(forward: Callable[[], Tensor]) -> Callable[[int], None]:
    """Forward and backward, as the harness calls it."""

    def run(_: int) -> None:
        y = forward()
        y = y[0] if isinstance(y, tuple) else y
        y.backward(torch.ones_like(y))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the result here")
    parser.add_argument("--seconds", type=float, default=60.0, help="time to spend on timing")
    args = parser.parse_args()
    sequences, tokens = 4, 128
    forwards = layers(LLAMA_3_8B, sequences, tokens)
    kept = {name: round(value / (sequences * tokens)) for name, value in kept_bytes(forwards).items()}
    ratios = compare({n: step(f) for n, f in forwards.items()}, FROZEN, 1, torch.device("cpu"), args.seconds)
    print("one layer of Llama-3-8B's size, bf16: bytes kept for backward per token; forward and backward together")
    for name, r in ratios.items():
        size = f"{kept[name]:9,} {kept[name] / kept[FROZEN]:6.3f}" if name in kept else " " * 16
        print(f"{name:24} {size}   {r.seconds * 1e3:8.1f} ms {r.ratio:6.3f} ({r.low:.3f}-{r.high:.3f})")
    if args.json:
        times = {name: [round(v, 4) for v in (r.ratio, r.low, r.high)] for name, r in ratios.items()}
        found = {"torch": torch.__version__, "threads": torch.get_num_threads(), "bytes per token": kept}
        with open(args.json, "w") as f:
            json.dump(found | {"time / frozen (median, p10, p90)": times}, f, indent=2)
            f.write("\n")


if __name__ == "__main__":
    main()
