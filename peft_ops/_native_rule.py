"""Where a native CPU kernel beats plain PyTorch: what `auto` asks on a CPU, read off bench/native_cpu.py."""

import torch

# Time of peft_ops.reference over the native time; in brackets, of PEFT's arithmetic on one task. AVX-512, 1 thread,
# fp32 vectors, torch 2.13.0, A/A floor 0.97 to 1.03.
#
#                               1 x 4096    8 x 4096   64 x 4096  512 x 4096  2048 x 768
# ia3_scale            bf16    3.0 (1.7)   3.0 (2.1)   3.7 (3.5)   4.2 (4.3)   4.1 (3.5)
#                      fp16    2.5 (1.3)   1.8 (1.2)   2.3 (2.0)   2.1 (2.1)   2.8 (2.2)
#                      fp32    2.1 (0.80)  1.8 (0.91)  1.10 (0.94) 0.97 (0.94) 0.95 (0.91)
# ia3_scale, 4 tasks   bf16     10          11          17          17          16
#                      fp32     10          11          11           8          10
# ia3_scale, silu      bf16    2.4         1.6         1.7         2.4         2.0
#                      fp32    2.0         1.6         1.9         2.2         2.0
# ia3_scale, gelu      bf16    3.5         1.4         0.94        1.4         1.4
#                      fp32    3.2         1.4         0.94        1.6         1.1
# ia3_scale_backward   bf16    5.9         5.4         5.6         4.7         6.6
#                      fp32    7.7 (1.5)   5.8 (1.5)   3.0 (2.2)   1.2 (1.1)   2.0 (1.7)
#
#                            8 x 512, E 4096   8 x 128, E 768   1 x 32, E 768   1 x 1, E 768     (P 20, 20, 20, 1)
# prompt_concat          bf16   10 (1.8)         23 (2.0)          23 (2.6)       28 (4.5)
# prompt_concat_backward fp32    3.6 (1.04)       7.7 (1.2)        13 (1.9)       19 (1.5)
PLAIN_FP32 = 1 << 17  # elements from which one multiplication in fp32 is bound by memory, and aten's is 3 to 9 % faster


def native_wins(op: str, dtype: torch.dtype, numel: int, fused: bool = True) -> bool:
    """Whether the native kernel of `op` serves `numel` elements of `dtype` faster.

    fused: it does more than multiply by one vector: gathers one per task, applies an activation, or sums a gradient.
    """
    return fused or op != "ia3_scale" or dtype != torch.float32 or numel < PLAIN_FP32
