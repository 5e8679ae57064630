"""Launch parameters: pure functions of shape, item size and compute capability. Nothing tunes at run time.

None of the choices below is measured yet on a GPU; each compiles without a spill for sm_80, sm_90 and sm_100
(tests/compile).
"""

PLAN_TILE = 128  # rows of one tile of a task plan
CHUNK_ROWS = 256  # rows of one task that are summed in one piece; part of the result, so never a tuning parameter
SMALL_M = 64  # up to here a matmul reads its weights once in one row tile, and gathers each row's scale

# bytes of shared memory that one block may have, by compute capability
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def rowwise(M: int, N: int) -> dict:
    """Elementwise kernels: 4096 elements a tile, 4 warps, so that each thread has four 16-byte accesses in flight."""
    block_n = min(max(next_power_of_2(N), 16), 1024)
    block_m = min(4096 // block_n, next_power_of_2(M))
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4)


def scale_backward(N: int, erf: bool) -> dict:
    """16 x 256 with 4 warps: about 100 registers, five blocks per SM (sm_90). erf spills there: gelu takes half."""
    return dict(BLOCK_M=8 if erf else 16, BLOCK_N=min(max(next_power_of_2(N), 16), 256), num_warps=4)


def sum_chunks(N: int) -> dict:
    return dict(BLOCK_N=min(max(next_power_of_2(N), 16), 256), num_warps=2)


def linear_is_fused(itemsize: int) -> bool:
    """Whether ia3_linear runs its own matmul. fp32 does not: without tf32 Triton has no tensor-core form for it."""
    return itemsize == 2


def linear(M: int, N: int, K: int, capability: int, erf: bool) -> dict:
    """Persistent TMA matmul, M > SMALL_M. 128 x 256 has the best reuse; erf spills there, so gelu takes 128 x 128."""
    if SHARED_MEMORY.get(capability, 0) < 200_000:
        if SHARED_MEMORY.get(capability, 0) < 150_000:
            return dict(BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, GROUP_M=8, num_warps=4, num_stages=3)
        return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3)
    if erf or cdiv(M, 128) * cdiv(N, 256) < 132 or capability >= 100:
        return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=4)
    return dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3)


def linear_small(M: int, N: int, capability: int, contiguous_k: bool) -> dict:
    """Few rows: the weights stream once, bytes in flight count. Above 32 rows x itself fills wgmma's 64 rows."""
    small = SHARED_MEMORY.get(capability, 0) < 150_000
    if M > 32:
        return dict(
            SWAP=False, BLOCK_M=64, BLOCK_N=64 if small else 128, BLOCK_K=64, num_warps=8, num_stages=3 if small else 4
        )
    block_k = 128 if contiguous_k and not small else 64
    return dict(SWAP=True, BLOCK_M=16 if M <= 16 else 32, BLOCK_N=64, BLOCK_K=block_k, num_warps=4, num_stages=4)


def prompt_concat(E: int) -> dict:
    """A tile of 4096 elements, 4 warps: four 16-byte stores per thread."""
    block_e = min(max(next_power_of_2(E), 16), 4096)
    return dict(BLOCK_ROWS=4096 // block_e, BLOCK_E=block_e, num_warps=4)


def prompt_backward(E: int) -> dict:
    return dict(BLOCK_E=min(max(next_power_of_2(E), 16), 1024), num_warps=4)
