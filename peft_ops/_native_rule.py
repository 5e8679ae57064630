"""Where a native kernel wins, over plain PyTorch on a CPU (bench/native_cpu.py), over Triton on a GPU: `auto` asks."""

import torch


def native_wins(op: str, dtype: torch.dtype, fused: bool = True) -> bool:
    """Whether the native kernel of `op` serves `dtype` faster (`python -m bench.native_cpu`).

    One multiplication in fp32 is one pass of aten's as well, which costs less to call and is as fast: 0.80 to 0.98 of
    its speed was measured from 16,384 elements up. In 16 bits PEFT's arithmetic is three passes.

    fused: it does more than multiply by one vector: gathers one per task, applies an activation, or sums a gradient.
    """
    return fused or op != "ia3_scale" or dtype != torch.float32


CUDA_OPS = ("ia3_scale", "prompt_concat")  # what csrc/cuda has: set_backend("native") runs it on CUDA tensors
# Elements of the output up to which an operator's CUDA C++ kernel beats Triton's in a benchmark: none was run so far.
CUDA_WINS: dict[str, int] = {}


def native_wins_on_cuda(op: str, numel: int) -> bool:
    return numel <= CUDA_WINS.get(op, -1)
