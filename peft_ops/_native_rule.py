"""Where a native kernel wins, over plain PyTorch on a CPU (bench/native_cpu.py), over Triton on a GPU: `auto` asks."""

import torch

# Time of peft_ops.reference over the native time; in brackets, of PEFT's arithmetic on one task. AVX-512, 1 thread,
# fp32 vectors, torch 2.13.0, A/A floor 0.97 to 1.03. ia3_glu, silu and gelu with MALLOC_MMAP_THRESHOLD_=1073741824
# MALLOC_TRIM_THRESHOLD_=4294967296: without, the peers' page faults at 512 x 4096 make ratios of 17 to 28.
#
#                               1 x 4096    8 x 4096   64 x 4096  512 x 4096  2048 x 768
# ia3_scale            bf16    3.0 (1.7)   3.0 (2.1)   3.7 (3.5)   4.2 (4.3)   4.1 (3.5)
#                      fp16    2.5 (1.3)   1.8 (1.2)   2.3 (2.0)   2.1 (2.1)   2.8 (2.2)
#                      fp32    2.1 (0.80)  1.8 (0.91)  1.10 (0.94) 0.97 (0.94) 0.95 (0.91)
# ia3_scale, 4 tasks   bf16     10          11          17          17          16
#                      fp32     10          11          11           8          10
# ia3_scale, silu      bf16    3.1 (2.3)   2.3 (2.4)   2.2 (2.6)   2.9 (3.3)   2.6 (3.0)
#                      fp32    2.4 (1.4)   1.8 (1.5)   2.0 (2.0)   2.2 (2.2)   2.2 (2.1)
# ia3_scale, gelu      bf16    3.7 (3.1)   1.6 (1.4)   1.1 (1.1)   2.2 (1.7)   1.9 (1.6)
#                      fp32    3.3 (2.5)   1.3 (1.1)   0.85 (0.81) 1.5 (1.4)   1.4 (1.3)
# ia3_scale_backward   bf16    5.9         5.4         5.6         4.7         6.6
#                      fp32    7.7 (1.5)   5.8 (1.5)   3.0 (2.2)   1.2 (1.1)   2.0 (1.7)
# ia3_glu, silu        bf16    4.5 (2.7)   2.8 (2.6)   2.8 (3.0)   4.0 (3.6)   4.1 (3.7)
#                      fp16    4.0 (2.1)   2.2 (1.8)   2.3 (2.1)   2.7 (2.1)   2.9 (2.6)
#                      fp32    3.7 (1.8)   2.4 (1.7)   2.5 (2.3)   2.2 (2.1)   2.5 (2.4)
# ia3_glu, gelu        bf16    4.7 (3.2)   2.0 (1.5)   1.5 (1.3)   2.8 (2.0)   2.4 (1.8)
#                      fp32    4.2 (2.7)   1.6 (1.3)   1.2 (1.1)   2.3 (2.2)   2.0 (1.9)
# ia3_glu, None        bf16    5.2 (2.5)   4.0 (2.8)   4.5 (3.8)   3.9 (3.1)   4.8 (4.5)
#                      fp32    3.7 (1.4)   2.1 (1.1)   1.6 (1.4)   1.5 (1.4)   1.8 (1.6)
# ia3_glu, 4 tasks     bf16   11   (3.6)   7.7 (3.7)   7.3 (4.3)   7.9 (4.8)   8.9 (5.1)
# ia3_glu_backward     bf16    9.5 (3.7)   6.0 (3.9)   4.2 (4.1)   6.5 (5.5)    13 (5.0)
#   silu               fp32    9.0 (2.9)   6.3 (3.4)   4.3 (3.9)   2.5 (2.3)   4.5 (3.9)
#
#                            8 x 512, E 4096   8 x 128, E 768   1 x 32, E 768   1 x 1, E 768     (P 20, 20, 20, 1)
# prompt_concat          bf16   35 (6.5)         24 (1.8)          32 (2.7)       28 (3.9)
#                        fp32   26 (6.5)         11 (2.0)          33 (3.1)       28 (3.7)
# prompt_concat_backward fp32    3.4 (1.01)       6.8 (1.06)       13 (1.8)       19 (1.5)
# prompt_embed           bf16   22 (3.3)         20 (0.77)         12 (0.58)      10 (0.68)   in brackets: F.embedding,
#                        fp32   16 (3.8)          8 (1.03)         13 (0.79)       9 (0.69)   which knows no prompts
# prompt_embed, added    bf16      (9.8)            (2.9)             (2.5)          (2.4)    in brackets: three
#                        fp32      (11)             (2.0)             (1.9)          (2.4)    F.embedding and two sums
# prompt_embed_backward  bf16  340               17                 4.0            4.3
#                        fp32   22               10                 3.2            3.8
PLAIN_FP32 = 1 << 17  # elements from which one multiplication in fp32 is bound by memory, and aten's is 3 to 9 % faster


def native_wins(op: str, dtype: torch.dtype, numel: int, fused: bool = True) -> bool:
    """Whether the native kernel of `op` serves `numel` elements of `dtype` faster.

    fused: it does more than multiply by one vector: gathers one per task, applies an activation, or sums a gradient.
    """
    return fused or op != "ia3_scale" or dtype != torch.float32 or numel < PLAIN_FP32


CUDA_OPS = ("ia3_scale", "prompt_concat")  # what csrc/cuda has: set_backend("native") runs it on CUDA tensors
# Elements of the output up to which an operator's CUDA C++ kernel beats Triton's in a benchmark: none was run so far.
CUDA_WINS: dict[str, int] = {}


def native_wins_on_cuda(op: str, numel: int) -> bool:
    return numel <= CUDA_WINS.get(op, -1)
