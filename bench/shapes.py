"""Layers of real models that (IA)^3 adapts, by name, and the row counts that serving and training bring."""

from typing import NamedTuple


class Layer(NamedTuple):
    """op "linear": [N, K] with scaled output; "kv": two of [N, K]; "glu": gate and up of [N, K]; "feedforward": [N, K]
    with scaled input."""

    model: str
    op: str
    N: int
    K: int
    activation: str | None = None

    @property
    def name(self) -> str:
        return f"{self.model} {self.op}"


LAYERS = [
    Layer("Llama-3-8B", "kv", 1024, 4096),
    Layer("Llama-3-8B", "glu", 14336, 4096, "silu"),
    Layer("Llama-3-8B", "feedforward", 4096, 14336),
    Layer("Llama-3-70B", "kv", 1024, 8192),
    Layer("Llama-3-70B", "glu", 28672, 8192, "silu"),
    Layer("T0-3B", "kv", 2048, 2048),
    Layer("T0-3B", "glu", 5120, 2048, "gelu_tanh"),
    Layer("T0-11B", "kv", 4096, 4096),
    Layer("T0-11B", "glu", 10240, 4096, "gelu_tanh"),
    Layer("GPT-2", "linear", 2304, 768),
    Layer("GPT-2", "feedforward", 768, 3072),
    Layer("BERT-large", "kv", 1024, 1024),
    Layer("BERT-large", "linear", 4096, 1024, "gelu"),
    Layer("Llama-2-7B", "linear", 4096, 4096),
]

DECODE = (1, 4, 8, 16, 32, 64)  # sequences that take one token each
PREFILL = (256, 1024, 4096)  # tokens of one step
TRAIN = (8192,)  # tokens of one step
ROWS = DECODE + PREFILL + TRAIN
