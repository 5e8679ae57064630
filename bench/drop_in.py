"""What adapters cost a whole model: PEFT's (IA)^3, and the same model after `accelerate`, over the bare model.

    python -m bench.drop_in                # a Llama in bf16: a forward over 8 x 64 tokens, and decoding 8 rows
    python -m bench.drop_in --json FILE    # tables are written as they come; --resume goes on where it stopped
    python -m bench.drop_in --quick        # a tiny model, a moment for each table: walks the whole path

Random weights; every model has the same. Times are ABBA-interleaved with the bare model, or with the batch of one task;
on a GPU too what a caller waits for.
"""

import argparse
import copy
from collections.abc import Callable

import torch
from torch import nn

from bench.harness import Pieces, Ratio, compare
from bench.matrix import environment
from peft_ops.integrations.peft import accelerate

TASKS = [f"task{i}" for i in range(8)]
LLAMA = dict(
    hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=4,
    vocab_size=4096,
)  # fmt: skip
QUICK = dict(
    hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=256,
)  # fmt: skip
BARE, SINGLE = "bare model", "one task"


def make_models(sizes: dict, device: torch.device) -> dict[str, nn.Module]:
    """The bare model, PEFT's with eight (IA)^3 and with eight LoRA adapters, and the former accelerated."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**sizes)).to(device, torch.bfloat16).eval().requires_grad_(False)

    def copied(model: nn.Module) -> nn.Module:
        """With the same frozen weights: where a copy happens to lie in memory makes a difference of 2 %."""
        return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})

    def adapted(config: Callable[[], object]) -> nn.Module:
        model = peft.get_peft_model(copied(base), config(), TASKS[0])
        for name in TASKS[1:]:
            model.add_adapter(name, config())
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                nn.init.normal_(parameter, 1.0, 0.1)
            elif "lora_B" in name:
                nn.init.normal_(parameter, 0.0, 0.02)
        return model.eval()

    ia3 = adapted(lambda: peft.IA3Config(task_type="CAUSAL_LM"))
    lora = adapted(lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]))
    ours, modules = copied(ia3), copied(ia3)
    accelerate(ours)
    accelerate(modules, level="module")
    return {BARE: base, "PEFT": ia3, "peft_ops": ours, "peft_ops, level module": modules, "PEFT LoRA": lora}


def calls(models: dict[str, nn.Module], rows: int, tokens: int, new: int | None) -> tuple[dict, dict, dict]:
    """What to time over the bare model, over one task's batch, and LoRA's mixed batch over its batch of one task."""
    device = models[BARE].device
    ids = torch.randint(3, models[BARE].config.vocab_size, (rows, tokens), device=device)
    kwargs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    same, mixed = TASKS[:1] * rows, [TASKS[i % len(TASKS)] for i in range(rows)]

    def call(name: str, **more) -> Callable[[int], object]:
        model = models[name]

        def run(_: int):
            with torch.inference_mode():
                if new is None:
                    return model(**kwargs, use_cache=False, logits_to_keep=1, **more)
                return model.generate(
                    **kwargs, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, **more
                )

        return run

    over_bare = {
        BARE: call(BARE), "PEFT, one task": call("PEFT"), "peft_ops, one task": call("peft_ops"),
        "peft_ops, 8 tasks mixed": call("peft_ops", adapter_names=mixed),
        "peft_ops, level module, one task": call("peft_ops, level module"),
        "peft_ops, level module, 8 tasks mixed": call("peft_ops, level module", adapter_names=mixed),
    }  # fmt: skip
    over_single = {SINGLE: call("peft_ops", adapter_names=same), "8 tasks mixed": call("peft_ops", adapter_names=mixed)}
    lora = {SINGLE: call("PEFT LoRA"), "8 tasks mixed": call("PEFT LoRA", adapter_names=mixed)}
    return over_bare, over_single, lora


def show(title: str, ratios: dict[str, Ratio]) -> dict[str, list[float]]:
    print(title)
    for name, r in ratios.items():
        print(f"  {name:38} {r.seconds * 1e3:9.2f} ms {r.ratio:6.3f} ({r.low:.3f}-{r.high:.3f})")
    return {name: [round(v, 4) for v in (r.ratio, r.low, r.high)] for name, r in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the result here")
    parser.add_argument("--seconds", type=float, default=60.0, help="time to spend on each of six tables")
    parser.add_argument("--resume", action="store_true", help="leave out tables that the file already holds")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds, after which no table is begun")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device, sizes = torch.device(args.device), QUICK if args.quick else LLAMA
    seconds, new_tokens = (0.01, 2) if args.quick else (args.seconds, 32)
    models = make_models(sizes, device)
    found = Pieces(args.json, environment() | {"device type": device.type, "model": sizes}, args.resume, args.budget)
    for title, new in (
        ("forward, 8 x 64 tokens", None),
        (f"generate, 8 rows, {new_tokens} tokens after 1", new_tokens),
    ):
        tables = calls(models, 8, 64 if new is None else 1, new)
        for over, table in zip(("bare model", "one task", "one task, LoRA"), tables, strict=True):
            name = f"{title}, over {over}"

            def measured(name=name, table=table) -> dict:
                return show(name, compare(table, next(iter(table)), 1, device, seconds, wall=True))

            found.add(f"{name} (median, p10, p90)", measured)


if __name__ == "__main__":
    main()
