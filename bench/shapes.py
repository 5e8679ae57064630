"""Layers of real models that (IA)^3 and prompts adapt, by name, and the row counts that serving and training bring."""

from typing import NamedTuple


class Layer(NamedTuple):
    """A layer of a model, with an op of:

    "linear": [N, K] with scaled output; "kv": two of [N, K]; "glu": gate and up of [N, K]; "feedforward": [N, K] with
    scaled input; elementwise "scale" and "gate", N wide; prompts beside an embedding [K, N]: "concat", "added", the
    same with positions and token types, "packed" and "embed".
    """

    model: str
    op: str
    N: int
    K: int = 0
    activation: str | None = None

    @property
    def name(self) -> str:
        return f"{self.model} {self.op}"


class Case(NamedTuple):
    """What is measured of a layer: `rows` tokens of so many `tasks`, in sequences of one task of up to `sequence`."""

    layer: Layer
    phase: str  # a key of PHASES; "train" is forward and backward
    rows: int
    tasks: int = 8
    sequence: int = 512

    @property
    def name(self) -> str:
        return f"{self.layer.name} {self.phase} {self.rows} rows {self.tasks} tasks"


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
]  # matmuls: bench.tune and bench.model know these
ELEMENTWISE = [
    Layer("Llama-3-8B", "gate", 14336, activation="silu"),
    Layer("Llama-2-7B", "scale", 4096),
    Layer("T0-3B", "gate", 5120, activation="gelu_tanh"),
]
PROMPTS = [
    Layer("T0-3B", "concat", 2048, 32128),
    Layer("BERT-large", "added", 1024, 30522),
    Layer("GPT-2", "embed", 768, 50257),
    Layer("Llama-2-7B", "packed", 4096, 32000),
]
VIRTUAL_TOKENS = 20  # of a prompt

DECODE = (1, 4, 8, 16, 32, 64)  # sequences that take one token each
PREFILL = (256, 1024, 4096)  # tokens of one step
TRAIN = (8192,)  # tokens of one step
ROWS = DECODE + PREFILL + TRAIN
PHASES = {"decode": DECODE, "prefill": PREFILL, "train": TRAIN}
ORDER = (16, 8192, 1, 64, 1024, 4, 32, 4096, 256, 8)  # row counts, most telling first


def _cases() -> list[Case]:
    phase = {rows: name for name, known in PHASES.items() for rows in known}
    return [
        Case(layer, phase[rows], rows)
        for rows in ORDER
        for layer in (*LAYERS, *ELEMENTWISE, *PROMPTS)
        if layer not in PROMPTS or phase[rows] != "decode"  # a prompt stands before a text, not before its next token
    ]


# numbers of tasks in one batch, at one shape: a gather that costs more with each shows here
MANY_TASKS = [Case(Layer("BERT-large", "kv", 1024, 1024), "decode", 64, tasks) for tasks in (1, 2, 8, 64, 512)]
CASES = list(dict.fromkeys(_cases() + MANY_TASKS))
# what two CPU cores do in minutes: no layer of more than 50 MB, sequences of 64
CPU_LAYERS = [layer for layer in LAYERS if layer.N * layer.K < 12e6 and layer.model != "Llama-3-70B"]
CPU_ROWS = {"decode": 8, "prefill": 128, "train": 128}
CPU_CASES = [
    Case(layer, phase, rows, sequence=64)
    for layer in (*CPU_LAYERS, *ELEMENTWISE, *PROMPTS)
    for phase, rows in CPU_ROWS.items()
    if layer not in PROMPTS or phase != "decode"
] + MANY_TASKS
QUICK_PROMPTS = [Layer("tiny", op, 64, 100) for op in ("concat", "added", "embed", "packed")]
QUICK_LAYERS = [
    *(Layer("tiny", op, 64, 128, "silu" if op == "glu" else None) for op in ("kv", "glu", "linear", "feedforward")),
    Layer("tiny", "scale", 64),
    Layer("tiny", "gate", 64, activation="silu"),
    *QUICK_PROMPTS,
]
QUICK_CASES = [
    Case(layer, phase, rows, sequence=32)
    for layer in QUICK_LAYERS
    for phase, rows in (("decode", 16), ("train", 128))
    if layer not in QUICK_PROMPTS or phase == "train"
]
