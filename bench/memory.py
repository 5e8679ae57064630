"""Bytes that one decoder layer keeps for its backward, per token: frozen, with PEFT's (IA)^3, with ours.

    python -m bench.memory                 # a layer of Llama-3-8B's size in bf16, 512 tokens in 4 sequences
    python -m bench.memory --json FILE

Counted with saved-tensor hooks: every storage once, without parameters and ids. The input needs a gradient, as in every
layer above the first adapter.
"""

import argparse
import copy
import json
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from peft_ops.nn import IA3GatedMLP, IA3Linear, TaskBatch, tasks

ADAPTERS = ("reviews", "legal")
# transformers' names; head_dim and the ratio of query to key heads are Llama-3-8B's
LLAMA_3_8B = dict(
    hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, head_dim=128
)


def saved_bytes(forward: Callable[[], object], module: nn.Module) -> int:
    """Bytes of the floating-point storages that `forward` keeps for its backward, parameters of `module` left out."""
    known = {p.untyped_storage().data_ptr() for p in module.parameters()}
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


def measure(sizes: dict, sequences: int, tokens: int, device: str = "cpu") -> dict[str, int]:
    """Bytes kept by the frozen layer, PEFT's and ours, for [sequences, tokens] in bf16."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(**sizes)
    config._attn_implementation = "sdpa"
    frozen = LlamaDecoderLayer(config, 0).to(device, torch.bfloat16).requires_grad_(False)
    x = torch.randn(sequences, tokens, config.hidden_size, dtype=torch.bfloat16, device=device).requires_grad_() * 1
    positions = LlamaRotaryEmbedding(config).to(device)(x, torch.arange(tokens, device=device)[None])
    ours, pefts = adapted_layer(frozen), peft_layer(frozen)
    batch = TaskBatch.of_rows([(*ADAPTERS, None)[i % 3] for i in range(sequences)], device)

    def mixed():
        with tasks(batch):
            ours(x, position_embeddings=positions)

    return {
        "frozen": saved_bytes(lambda: frozen(x, position_embeddings=positions), frozen),
        "PEFT, one adapter": saved_bytes(lambda: pefts(x, position_embeddings=positions), pefts),
        "peft_ops, mixed batch": saved_bytes(mixed, ours),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the result here")
    args = parser.parse_args()
    sequences, tokens = 4, 128
    found = measure(LLAMA_3_8B, sequences, tokens)
    result = {name: round(value / (sequences * tokens)) for name, value in found.items()}
    print("bytes kept for backward per token, one layer of Llama-3-8B's size, bf16")
    for name, value in result.items():
        print(f"{name:24} {value:9,} {value / result['frozen']:6.3f} of the frozen layer")
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"torch": torch.__version__, "bytes per token": result}, f, indent=2)
            f.write("\n")


if __name__ == "__main__":
    main()
